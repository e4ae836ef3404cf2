"""Simulated users over a real HTTP endpoint and with a model here: who talks, who wins, and whether people agree."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from judging_kit import append
from letter_models import letters, rows_of, save_mini

sys.path.insert(0, str(Path(__file__).parents[2] / "judge"))
from judge_server import cut, serving  # type: ignore

from steersman.people.simulated_user import END, SimulateRecipe, run
from steersman.types import SteersmanError

CALM, LOUD = "Rest a little.", "RUN NOW."


def play(n: int, text: str) -> str:
    """One endpoint plays all: the user, both candidates, and a judge who likes calm answers."""
    if "Write this person's next message" in text:
        said = text.count("\n\nYou: ") + text.startswith("You: ")
        return END if said > 3 else "You: I am tired. What now?\n\nThe assistant: Sleep."
    if "<answer A " in text:
        first, second = text.split("<answer B ")
        return f"[[{'A' if CALM in first and CALM not in second else 'B' if CALM in second else 'C'}]]"
    return CALM


def candidate(url: str, system: str) -> dict:
    return {"endpoint": {"url": url, "model": system, "retries": 0}}


def recipe(tmp_path, url: str, loud: str, name: str = "run", **extra) -> SimulateRecipe:
    return SimulateRecipe.model_validate(
        {
            "candidates": {"loud": candidate(loud, "loud"), "calm": candidate(url, "calm")},
            "personas": {
                f"p{i}": {"character": f"person {i}", "goal": "sleep {so_far}", "opening": "Hello." if i % 2 else ""}
                for i in range(6)
            },
            "user": candidate(url, "user"), "judge": candidate(url, "judge"),
            "turns": 3, "conversations": 2, "run": {"dir": str(tmp_path / name), "threads": 1}, **extra,
        }
    )  # fmt: skip


def judged(count: int, right: bool = True) -> list[dict]:
    """Judgements of people who like calm answers (or loud ones)."""
    return [
        {"id": f"j{i}", "user": f"r{i % 4}", "time": i, "prompt": f"ask {i}",
         "answers": [f"{CALM} {i}", f"{LOUD} {i}"],
         "choice": "first" if right == (i % 10 != 0) else "second"}
        for i in range(count)
    ]  # fmt: skip


def test_a_second_candidate_that_is_not_there_is_told_before_anybody_speaks(tmp_path):
    asked = []

    def listening(n, text):
        asked.append(text)
        return play(n, text)

    with serving(listening) as server:
        values = recipe(tmp_path, server.url, server.url).model_dump()
        values["candidates"] = {"calm": candidate(server.url, "calm"), "gone": {"path": str(tmp_path / "gone")}}
        with pytest.raises(SteersmanError, match="gone"):
            run(SimulateRecipe.model_validate(values))
    assert asked == []


def test_the_better_candidate_wins_and_the_judge_is_checked(tmp_path, capsys):
    with serving(play) as server, serving(lambda n, text: LOUD) as loud:
        inbox = append(tmp_path / "people", "day", judged(80))
        values = recipe(tmp_path, server.url, loud.url, human={"folder": str(inbox)})
        told = run(values)
        said = " ".join(capsys.readouterr().out.split())
        calm = told["win_rates"]["calm"]
        assert (calm["value"], calm["n"]) == (1.0, 12)
        assert told["checked"]
        assert "agrees with people on 0.900" in told["agreement"]
        assert "kappa" in said
        talks = rows_of(tmp_path / "run/conversations-calm.jsonl")
        assert len(talks) == 12
        assert [m["role"] for m in talks[0]["messages"]] == ["user", "assistant"] * 3
        assert talks[2]["messages"][0]["content"] == "Hello."
        assert talks[0]["messages"][0]["content"] == "I am tired. What now?"
        # candidates are asked with the turns, not with a text about them
        bodies = [b for b in server.bodies if b["model"] == "calm"]
        assert {len(b["messages"]) for b in bodies} == {1, 3, 5}
        asked = len(server.seen)
        assert run(values, resume=True)["win_rates"] == told["win_rates"]
        assert len(server.seen) == asked  # nothing is asked twice


def test_without_people_the_verdict_says_that_it_is_unchecked(tmp_path, capsys):
    with serving(play) as server, serving(lambda n, text: LOUD) as loud:
        told = run(recipe(tmp_path, server.url, loud.url))
        assert not told["checked"]
        assert "is not checked against people: 0 of 50" in " ".join(capsys.readouterr().out.split())
        inbox = append(tmp_path / "people", "day", judged(30))
        told = run(recipe(tmp_path, server.url, loud.url, "few", human={"folder": str(inbox)}))
        assert "30 of 50" in told["agreement"]


def test_a_judge_who_says_the_opposite_of_people_is_seen(tmp_path):
    with serving(play) as server, serving(lambda n, text: LOUD) as loud:
        inbox = append(tmp_path / "people", "day", judged(60, right=False))
        told = run(recipe(tmp_path, server.url, loud.url, human={"folder": str(inbox)}))
        assert "agrees with people on 0.100" in told["agreement"]
        kappa = re.search(r"kappa (-?[\d.]+)", told["agreement"])
        assert kappa
        assert float(kappa[1]) < 0.05


def test_a_user_who_leaves_and_a_candidate_without_words(tmp_path, capsys):
    with serving(lambda n, text: END) as server, serving(lambda n, text: "") as silent:
        told = run(recipe(tmp_path, server.url, silent.url))
        talks = rows_of(tmp_path / "run/conversations-calm.jsonl")
        assert [len(t["messages"]) for t in talks[:4]] == [0, 0, 2, 2]  # two openings were answered
        assert (told["win_rates"]["calm"]["value"], told["win_rates"]["calm"]["n"]) == (1.0, 6)
        assert {row["by"] for row in rows_of(tmp_path / "run/battles.jsonl")} == {"silence"}
        assert not any("<answer A " in text for text in server.seen)  # silence needs no judge
    said = " ".join(capsys.readouterr().out.split())
    assert "candidates.loud said nothing in 6 of 6 conversations" in said
    assert "user said nothing to candidates.calm in 6 of 12 conversations" in said


def test_a_candidate_that_is_now_and_then_silent_loses_these_conversations(tmp_path):
    def now_and_then(n, text):
        return "" if "tired" in text else CALM

    def answering(n, text):
        return "[[C]]" if "<answer A " in text else play(n, text)

    with serving(answering) as server, serving(now_and_then) as mute:
        told = run(recipe(tmp_path, server.url, mute.url, turns=1))
    # of 12 conversations 6 begin with "I am tired", to which it says nothing, and 6 are a tie by the judge
    assert (told["win_rates"]["calm"]["value"], told["win_rates"]["calm"]["n"]) == (0.75, 12)


def test_without_a_decided_comparison_the_reasons_are_told(tmp_path):
    def unsure(n, text):
        return "hm" if "<answer A " in text else play(n, text)

    with (
        serving(unsure) as server,
        serving(lambda n, text: LOUD) as loud,
        pytest.raises(SteersmanError, match="judge gave no verdict on 12 of 12"),
    ):
        run(recipe(tmp_path, server.url, loud.url, turns=1))


def test_messages_that_a_limit_cut_are_counted_and_the_user_s_end_with_a_whole_sentence(tmp_path, capsys):
    def cut_short(n, text):
        if "<answer A " in text:
            return "[[C]]"
        return cut("I am tired. What should I d" if "next message" in text else "Rest a litt")

    with serving(cut_short) as server, serving(lambda n, text: LOUD) as loud:
        run(recipe(tmp_path, server.url, loud.url, turns=1))
    talks = rows_of(tmp_path / "run/conversations-calm.jsonl")
    assert [m["content"] for m in talks[0]["messages"]] == ["I am tired.", "Rest a litt"]
    said = " ".join(capsys.readouterr().out.split())
    assert "candidates.calm: the limit cut 12 of 12 messages" in said
    assert "user: the limit cut 12 of 24 messages" in said
    assert "candidates.loud: the limit" not in said


def test_a_model_on_this_machine_talks(tmp_path):
    model = save_mini(tmp_path / "chat", context=256)
    tokenizer = letters()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    tokenizer.save_pretrained(model)
    local = {"path": str(model), "max_new_tokens": 6}
    with serving(play) as server, serving(lambda n, text: LOUD) as loud:
        values = recipe(tmp_path, server.url, loud.url).model_dump(exclude_unset=True)
        values["candidates"]["calm"] = local
        run(SimulateRecipe.model_validate(values))
    talks = rows_of(tmp_path / "run/conversations-calm.jsonl")
    assert all(m["content"].strip() for t in talks for m in t["messages"])
    assert any(len(t["messages"]) > 2 for t in talks)


def test_what_is_missing_is_told_before_anybody_is_asked(tmp_path):
    with serving(play) as server:
        with pytest.raises(SteersmanError, match="no-people: "):
            run(recipe(tmp_path, server.url, server.url, human={"folder": str(tmp_path / "no-people")}))
        assert server.seen == []


def test_who_does_not_answer_is_named_by_its_section(tmp_path):
    with pytest.raises(SteersmanError, match=r"^user http://127\.0\.0\.1:9/v1"):
        run(recipe(tmp_path, "http://127.0.0.1:9/v1", "http://127.0.0.1:9/v1"))


def test_refusals(tmp_path):
    values = recipe(tmp_path, "http://x/v1", "http://y/v1").model_dump(exclude_unset=True)
    for change, said in (
        ({"candidates": {"one": {"path": "m"}}}, "two candidates"),
        ({"candidates": {"../a": {"path": "m"}, "b": {"path": "m"}}}, "they become files"),
        ({"user": {"path": "m", "endpoint": values["user"]["endpoint"]}}, "exactly one of path and endpoint"),
        ({"personas": {}}, "one persona at least"),
    ):
        with pytest.raises(ValueError, match=said):
            SimulateRecipe.model_validate({**values, **change})


def test_what_was_made_with_other_settings_is_not_told_as_of_these(tmp_path):
    """Another address or more requests at once change nothing of what is said."""
    with serving(play) as server, serving(play) as moved, serving(lambda n, text: LOUD) as loud:
        values = recipe(tmp_path, server.url, loud.url, turns=1).model_dump()
        told = run(SimulateRecipe.model_validate(values))
        calm, personas = values["candidates"]["calm"], values["personas"]
        for change, what in (
            ({"conversations": 1}, "conversations: 2 -> 1"),
            ({"personas": {**personas, "p0": {**personas["p0"], "goal": "eat"}}}, "personas.p0.goal: "),
            ({"personas": {f"q{who}": one for who, one in personas.items()}}, "personas.qp0"),
            ({"candidates": {**values["candidates"], "third": calm}}, r"battles\.jsonl .*candidates: "),
            ({"judge": candidate(server.url, "other")}, "judge.endpoint.model: judge -> other"),
        ):
            for _ in range(2):  # the folder's recipe is the refused one then
                with pytest.raises(SteersmanError, match=what):
                    run(SimulateRecipe.model_validate({**values, **change}), resume=True)
        calm["endpoint"] |= {"url": moved.url, "concurrency": 2}
        assert run(SimulateRecipe.model_validate(values), resume=True)["win_rates"] == told["win_rates"]
