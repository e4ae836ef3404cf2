"""User turns that praise or complain are found and become examples; feedback without prompt is named or counted."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from letter_models import rows_of, write_jsonl

from steersman.data import DataConfig
from steersman.data.load import demonstrations, feedback
from steersman.flywheel.feedback import FeedbackRecipe, run
from steersman.flywheel.reactions import category, overlap
from steersman.flywheel.reading import Reading, parse_reading
from steersman.statistics.agreement import cohen_kappa
from steersman.types import SteersmanError

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "judge"))


def said(role, text):
    return {"role": role, "content": text}


CHATS = [
    [said("user", "Tell me of a cat."), said("assistant", "A cat sat."), said("user", "Thank you, lovely!")],
    [said("user", "And a dog?"), said("assistant", "No."), said("user", "That is not what I asked."),
     said("assistant", "A dog ran."), said("user", "Great, thanks.")],
    [said("assistant", "Hello there."), said("user", "Great idea, thanks!")],
    [said("user", "Sing."), said("assistant", "La la."), said("user", "Who wrote it?")],
]  # fmt: skip


def recipe(tmp_path, rows, run_name="run", **extra):
    path = rows if isinstance(rows, str) else str(write_jsonl(tmp_path / "chats.jsonl", rows))
    section = {"data": {"path": path}, "run": {"dir": str(tmp_path / run_name), "threads": 1}}
    for key, value in extra.items():
        section[key] = section.get(key, {}) | value if isinstance(value, dict) else value
    return FeedbackRecipe.model_validate(section)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Thanks, that helps!", "praise"), ("Wow, thank you so much.", "praise"), ("That makes sense", "praise"),
        ("Good idea. And then?", "praise"), ("You're right", "praise"), ("thank youuu", "none"),
        ("No, thank you.", "none"), ("Thanks anyway", "none"), ("Thanks, but I meant the other one", "mixed"),
        ("That's great, but too long", "mixed"), ("That is wrong.", "correction"),
        ("No, I meant the river", "correction"), ("that\u2019s not what i asked", "correction"),
        ("That doesn't answer the question", "complaint"), ("You are useless", "complaint"),
        ("What do you mean?", "clarification"), ("Are you sure?", "clarification"), ("huh?", "clarification"),
        ("What is a river?", "none"), ("It is a great wall in China", "none"), ("", "none"),
    ],
)  # fmt: skip
def test_reactions_are_read_by_rules(text, wanted):
    assert category(text) == wanted


def test_a_repeated_question_is_a_complaint_of_its_own():
    assert category("Show me cheap hotels in Rome, please", "show me cheap hotels in Rome") == "rephrase"
    assert category("Show me cheap flights to Oslo", "show me cheap hotels in Rome") == "none"
    assert overlap("yes", "yes") == 0


def test_conversations_become_thumbs_and_demonstrations_that_the_loaders_read(tmp_path):
    summary = run(recipe(tmp_path, [{"messages": m} for m in CHATS]))
    assert (summary["data/exchanges"], summary["data/kto"], summary["data/sft"]) == (4, 3, 2)
    thumbs = feedback(DataConfig(path=str(tmp_path / "run/kto.jsonl")))
    assert [(e.completion[0]["content"], e.label) for e in thumbs.train] == [
        ("A cat sat.", True), ("No.", False), ("A dog ran.", True),
    ]  # fmt: skip
    assert [m["content"] for m in thumbs.train[2].prompt] == ["And a dog?", "No.", "That is not what I asked."]
    praised = demonstrations(DataConfig(path=str(tmp_path / "run/sft.jsonl")))
    assert len(praised.train) == 2
    told = json.loads((tmp_path / "run/reactions.provenance.json").read_text())
    assert told["judge"] == "rules"


def test_the_column_system_is_the_first_turn(tmp_path):
    words = {"prompt": "Say hi.", "completion": "Hi!", "feedback": "Thanks!"}
    for i, row in enumerate(({"messages": CHATS[0]}, words)):
        run(recipe(tmp_path, [row | {"system": "Be kind."}], f"run{i}"))
        for made in rows_of(tmp_path / f"run{i}" / "kto.jsonl"):
            assert made["prompt"][0] == said("system", "Be kind.")
            assert [turn["role"] for turn in made["prompt"]] == ["system", "user"]


def test_feedback_without_prompt_is_counted_or_stops(tmp_path, capsys):
    run(recipe(tmp_path, [{"messages": m} for m in CHATS]))
    assert "1 feedback without prompt" in capsys.readouterr().out
    with pytest.raises(SteersmanError, match=r"chats\.jsonl, line 3, field 'prompt': the feedback 'Great idea"):
        run(recipe(tmp_path, [{"messages": m} for m in CHATS], "other", no_prompt="stop"))


def test_feedback_in_words_beside_an_answer(tmp_path):
    rows = [
        {"prompt": "Say hi.", "completion": "Hi!", "feedback": "Thanks!"},
        {"prompt": "Say no.", "completion": "Yes.", "feedback": "That is wrong."},
        {"prompt": "", "completion": "Yes.", "feedback": "That is wrong."},
        {"prompt": "x", "completion": "y", "feedback": 7},
    ]
    with pytest.raises(SteersmanError, match=r"line 4, field 'feedback': must be text"):
        run(recipe(tmp_path, rows))
    summary = run(recipe(tmp_path, rows, data={"on_bad_row": "skip"}))
    assert [r["label"] for r in rows_of(tmp_path / "run/kto.jsonl")] == [True, False]
    assert summary["data/exchanges"] == 2


def test_rows_that_hold_no_conversation_are_named(tmp_path):
    with pytest.raises(SteersmanError, match=r"line 1: the row holds no conversation \(it has text\)"):
        run(recipe(tmp_path, [{"text": "hm"}]))
    with pytest.raises(SteersmanError, match="none of 1 user turns praises or complains"):
        run(recipe(tmp_path, [{"messages": CHATS[3]}]))


def test_a_reward_can_read_the_mood_in_the_place_of_rules(tmp_path):
    judge = {"reward": {"mood": {"builtin": "vader_sentiment"}}}
    run(recipe(tmp_path, [{"messages": m} for m in CHATS], judge=judge))
    kto = rows_of(tmp_path / "run/kto.jsonl")
    assert [r["label"] for r in kto if r["reaction"].startswith(("Thank", "Great"))] == [True, True]


def test_training_on_feedback_runs_both_verbs(tmp_path, mini_model):
    rows = [{"messages": m} for m in CHATS for _ in range(1)]
    rows += [{"messages": [said("user", f"ask {c}"), *CHATS[0][1:]]} for c in "abcdef"]
    train = {"train": {"batch_size": 4}, "optimizer": {"lr": 1e-2}}
    asked = {"model": {"path": str(mini_model)}, "then": ["sft", "kto"], "sft": train, "kto": train}
    summary = run(recipe(tmp_path, rows, **asked))
    assert summary["model"].endswith("2-kto/model")
    assert (tmp_path / "run/1-sft/model/model.safetensors").exists()
    with pytest.raises(ValueError, match="belong together"):
        recipe(tmp_path, rows, then=["sft"])


@pytest.mark.parametrize(
    ("folder", "least"), [("hh_rlhf", 150), ("oasst_trees", 20), ("taskmaster_reward", 10), ("sgd_dialogues", 1000)]
)
def test_real_conversations_are_read(shared, tmp_path, folder, least):
    summary = run(recipe(tmp_path, str(shared / folder), data={"on_bad_row": "skip"}))
    assert summary["data/kto"] >= least
    assert 0 < summary["yield"] < 0.3


# A model that reads -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "turn", "wanted"),
    [
        ("KIND: praise\nSPAN: Thank you", "Thank you, lovely!", Reading("praise", "Thank you")),
        (
            '**Kind**: Correction.\n**Span**: "that\'s wrong"',
            "No, that’s  WRONG.",
            Reading("correction", "that's wrong"),
        ),
        ("I think\nKIND: none\nSPAN:", "Who wrote it?", Reading("none")),
        ("KIND: praise\nSPAN: wonderful answer", "Thank you", None),
        ("KIND: praise\nSPAN:", "Thank you", None),
        ("KIND: joy\nSPAN: Thank you", "Thank you", None),
        ("It is praise.", "Thank you", None),
        ("KIND: none\nKIND: praise\nSPAN: Thank you", "Thank you", Reading("none")),
    ],
)
def test_a_reading_counts_only_with_words_that_the_turn_has(reply, turn, wanted):
    assert parse_reading(reply, turn) == wanted


ROWS = [{"messages": chat} for chat in CHATS]


def reads(_: int, text: str) -> str:
    """A reader over HTTP; it also writes what a user should have got."""
    turn = text.rsplit("<newest turn ", 1)[-1].partition(">")[2].split("</newest turn ")[0].strip()
    if "<newest turn " not in text:
        return "A dog ran, and that is what you asked."
    if "not what I asked" in turn:
        return "KIND: correction\nSPAN: not what I asked"
    if "thank" in turn.lower():
        return f"KIND: praise\nSPAN: {turn}"
    return "KIND: praise\nSPAN: what nobody said"


def test_a_model_reads_the_turns_and_writes_what_should_have_been_said(tmp_path):
    from judge_server import serving

    with serving(reads) as server:
        reader = {"endpoint": {"url": server.url, "model": "m", "retries": 0}}
        told = run(recipe(tmp_path, ROWS, reader=reader, revise=True))
        asked = len(server.seen)
        run(recipe(tmp_path, ROWS, reader=reader, revise=True), resume=True)
        assert len(server.seen) == asked
    rows = rows_of(tmp_path / "run/reactions.jsonl")
    assert [r["category"] for r in rows] == ["praise", "correction", "praise", "unread"]
    assert [r["span"] for r in rows] == ["Thank you, lovely!", "not what I asked", "Great, thanks.", ""]
    assert told["reader/unread"] == 0.25
    assert told["agreement/thumbs"] == 1
    assert told["kappa/kinds"] == 1
    (revised,) = rows_of(tmp_path / "run/revised.jsonl")
    assert revised["rejected"] == "No."
    assert revised["chosen"].startswith("A dog ran")
    assert len(rows_of(tmp_path / "run/kto.jsonl")) == 3


def test_reader_and_rules_that_say_one_thing_throughout_have_no_kappa(tmp_path):
    from judge_server import serving

    with serving(reads) as server:
        reader = {"endpoint": {"url": server.url, "model": "m", "retries": 0}}
        told = run(recipe(tmp_path, ROWS[:1], reader=reader))
    assert told["agreement/kinds"] == 1
    assert not [name for name in told if name.startswith("kappa/")]


def test_a_revised_answer_that_its_limit_cut_is_not_taught_and_a_reading_stands(tmp_path):
    from judge_server import cut, serving

    with serving(lambda n, text: cut(reads(n, text))) as server:
        reader = {"endpoint": {"url": server.url, "model": "m", "retries": 0}}
        told = run(recipe(tmp_path, ROWS, reader=reader, revise=True))
    assert [r["category"] for r in rows_of(tmp_path / "run/reactions.jsonl")][:2] == ["praise", "correction"]
    assert told["data/revised"] == 0
    assert told["writer/cut"] == told["writer/replies"] == 5


def test_readers_that_can_not_read_and_recipes_that_ask_two_are_refused(tmp_path):
    from judge_server import serving

    with serving(lambda n, text: "well") as server:
        reader = {"endpoint": {"url": server.url, "model": "m", "retries": 0}}
        with pytest.raises(SteersmanError, match=r"praises or complains|no reply told a kind"):
            run(recipe(tmp_path, ROWS, reader=reader))
        with pytest.raises(ValueError, match="give one of them"):
            recipe(tmp_path, ROWS, reader=reader, judge={"reward": {"l": {"builtin": "length"}}})
    with pytest.raises(ValueError, match="revise: the reader writes"):
        recipe(tmp_path, ROWS, revise=True)


def test_rules_agree_with_the_labelled_sample(shared):
    """200 turns of two real sets, labelled by hand: far above chance, and far from perfect."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools" / "results"))
    import reactions

    root = Path(__file__).resolve().parents[2]
    found = reactions.labelled(shared, root / "recipes" / "data" / "reactions-labelled.jsonl")
    assert len(found) == 200
    told = [category(e.reaction, e.last_question) for e, _ in found]
    assert 0.6 < cohen_kappa(told, [kind for _, kind in found]) < 0.8
