"""The worlds of the recipes: what the best player earns is right, and searches find what they should."""

from __future__ import annotations

import importlib.util
from itertools import permutations
from pathlib import Path

import pytest

from steersman.environments.gym import GymEnvironment

FOLDER = Path(__file__).parents[2] / "recipes" / "environments"


def world(name: str):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_reply_names_an_action_in_letters_of_any_case():
    actions = ["west", "south", "Straße", "east"]
    gym = GymEnvironment("FrozenLake-v1", args={"is_slippery": False}, actions=actions)
    replies = {
        "EAST": 3, "Ea\u017ft": 3, "go \u017fouth": 1, "not east, SOUTH": 1, "straße.": 2, "STRA\u1e9eE": 2,
        "northeast": None, "": None,
    }  # fmt: skip
    assert {reply: gym.action_of(reply) for reply in replies} == replies


def returns(game, guesses, word):
    """What a fixed list of guesses earns in the game itself."""
    play = game.GuessWord()
    play.begin({"word": word})
    total = 0.0
    for guess in guesses:
        _, reward, over = play.step(guess)
        total += reward
        if over:
            break
    return total


def test_the_best_player_of_the_word_game(monkeypatch):
    game = world("guess_word")
    assert game.optimum() == pytest.approx(0.7625)
    lists = max(
        sum(returns(game, [first, second, *game.WORDS], word) for word in game.WORDS) / len(game.WORDS)
        for first, second in permutations(game.WORDS, 2)
    )
    assert lists < game.optimum()  # who does not listen earns less
    # of three words that tell each other apart, any order of guessing is best: 1, 0.8 or (told by the mark) 0.8
    monkeypatch.setattr(game, "WORDS", ("cat", "cot", "tip"))
    game.optimum.cache_clear()
    assert game.optimum(frozenset(game.WORDS)) == pytest.approx((1 + 0.8 + 0.8) / 3)


def test_marks_and_what_is_no_word():
    game = world("guess_word")
    assert game.marks("cat", "cot") == "+.+"
    assert game.marks("act", "cat") == "--+"
    play = game.GuessWord()
    play.begin({"word": "cat"})
    assert play.step("zzz") == ("???", -0.2, False)
    assert play.step(" cat ") == ("+++", 1.0, True)


def test_the_library_pays_by_rank_and_the_better_search_counts(tmp_path):
    texts = ["The golden fox slept.", "A fox and a hen and a fox.", "Nothing here."]
    lines = [f'tale,{i},"{text}"' for i, text in enumerate(texts, 1)]
    (tmp_path / "sections.csv").write_text("\n".join(["story,section,text", *lines]) + "\n")
    play = world("library").Library([str(tmp_path / "sections.csv")])
    row = {"story": "tale", "section": ["1"], "question": "Is the fox golden, or text the fox?"}
    assert play.begin(row) == "\nWords: a is b the c fox d golden e or f text\nSearch:"
    told, first, over = play.step(" c c")
    assert (told, first, over) == (" -> A fox and a hen and a fox.\nSearch:", 0.5, False)
    assert play.step("d! c d") == (" -> The golden fox slept.\nSearch:", 0.5, True)  # 1 in all
    play.begin({**row, "section": ["3"]})
    assert play.step('" e f:* --')[1:] == (0.0, False)  # words alone reach the index
    assert play.step("")[1:] == (0.0, True)
