"""The judge as label maker: pairs, rankings and ratings come out, and bad rows are named."""

from __future__ import annotations

import signal
from contextlib import suppress

import pytest
from judge_server import serving
from letter_models import rows_of, write_jsonl

from steersman.api import load_recipe
from steersman.data import DataConfig
from steersman.data.load import preferences, rankings
from steersman.judge.label import LabelRecipe, run
from steersman.types import SteersmanError

JUDGE = {"reward": {"n": {"builtin": "length"}}}


def label(tmp_path, rows, name="run", resume=False, **extra):
    path = write_jsonl(tmp_path / "in.jsonl", rows)
    section = {"data": {"path": str(path)}, "judge": JUDGE, "run": {"dir": str(tmp_path / name), "threads": 1}}
    for key, value in extra.items():
        section[key] = section.get(key, {}) | value if isinstance(value, dict) else value
    summary = run(LabelRecipe.model_validate(section), resume=resume)
    return summary, rows_of(tmp_path / name / "labelled.jsonl")


def test_pairs_are_turned_round_where_the_judge_says_so(tmp_path):
    rows = [{"prompt": "p", "chosen": "a b c", "rejected": "a"}, {"prompt": "q", "chosen": "a", "rejected": "a b"}]
    summary, out = label(tmp_path, rows)
    assert [(r["chosen"], r["rejected"], r["chosen_was"]) for r in out] == [
        ("a b c", "a", "chosen"),
        ("a b", "a", "rejected"),
    ]
    assert summary["judge/agrees_with_data"] == 0.5
    assert len(preferences(DataConfig(path=str(tmp_path / "run/labelled.jsonl"))).train) == 2


def test_the_judge_reads_the_system_prompt_of_a_row(tmp_path):
    (tmp_path / "prompts.py").write_text(
        "def length(prompts, completions):\n    return [float(len(p)) for p in prompts]\n"
    )
    judge = {"reward": {"n": {"function": f"{tmp_path / 'prompts.py'}:length"}}}
    rows = [{"prompt": "p", "system": system, "completion": "a"} for system in ("", "Be kind.")]
    _, out = label(tmp_path, rows, judge=judge)
    assert [row["grade"] for row in out] == [1.0, float(len("System: Be kind.\n\nUser: p"))]


@pytest.mark.parametrize(("ties", "count"), [("drop", 1), ("keep", 2)])
def test_ties_are_dropped_or_kept_as_such(tmp_path, ties, count):
    rows = [{"prompt": "p", "first": "a b", "second": "c d"}, {"prompt": "q", "first": "a", "second": "a b"}]
    _, out = label(tmp_path, rows, ties=ties)
    assert len(out) == count
    assert [r["agreement"] for r in out] == ([0.5, 1.0] if ties == "keep" else [1.0])


def test_several_answers_become_a_ranking_and_single_ones_get_a_grade(tmp_path):
    _, out = label(tmp_path, [{"prompt": "p", "responses": ["a", "a b c", "a b", "b a"]}])
    assert out[0]["ranks"] == [3, 0, 1, 1]
    assert rankings(DataConfig(path=str(tmp_path / "run/labelled.jsonl"), ties="keep")).train[0].ranks == [3, 0, 1, 1]
    _, out = label(tmp_path, [{"prompt": "p", "completion": "a b"}], "other")
    assert out[0]["grade"] == 2


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"prompt": "p", "chosen": "a", "rejected": " a"}, "line 2, field 'chosen': the chosen answer equals"),
        ({"prompt": " ", "completion": "a"}, "line 2, field 'prompt': the prompt is empty"),
        ({"prompt": "p", "first": "a", "second": ""}, "line 2, field 'second': the answer is empty"),
        ({"prompt": "p", "responses": ["a"]}, "line 2, field 'responses': a ranking needs two"),
        ({"completion": "a"}, "line 2, field 'prompt': the row has no such field"),
    ],
)
def test_bad_rows_are_named_or_counted(tmp_path, row, what, capsys):
    rows = [{"prompt": "p", "completion": "fine words"}, row]
    with pytest.raises(SteersmanError, match=what):
        label(tmp_path, rows)
    _, out = label(tmp_path, rows, data={"on_bad_row": "skip"})
    assert len(out) == 1
    assert "1 rows left out" in capsys.readouterr().out


def test_a_finished_run_says_the_same_again(tmp_path):
    rows = [{"prompt": "p", "chosen": "a b c", "rejected": "a"}]
    first, _ = label(tmp_path, rows)
    again, _ = label(tmp_path, rows, resume=True)
    assert {k: v for k, v in first.items() if k != "seconds"} == {k: v for k, v in again.items() if k != "seconds"}


def prefers_the_first(_n, _text):
    return "[[A]]"


def says_nothing(_n, _text):
    return "Both have their merits."


def calls_it_a_tie(_n, _text):
    return "[[C]]"


@pytest.mark.parametrize(
    ("behave", "why"),
    [
        (prefers_the_first, "2 pairs on which it said the other thing in the other order"),
        (says_nothing, "4 replies without a verdict or grade"),
        (calls_it_a_tie, r"2 ties \(ties: keep labels them\)"),
    ],
)
def test_a_judge_that_labels_nothing_says_why_and_where_its_replies_are(tmp_path, behave, why):
    rows = [{"prompt": p, "first": "a b", "second": "c d"} for p in "pq"]
    with serving(behave) as server:
        judge = {"endpoint": {"url": server.url, "model": "m"}, "reward": {}, "on_unparsable": "drop"}
        with pytest.raises(SteersmanError, match=rf"none of 2 rows: {why}; its replies are in .*judge\.jsonl"):
            label(tmp_path, rows, judge=judge)


def goes_away(n, text):
    return "[[A]]" if n < 2 else (503, {}, "")


def is_stopped(n, text):
    if n == 1:
        signal.raise_signal(signal.SIGTERM)
    return "[[A]]"


@pytest.mark.parametrize("trouble", [goes_away, is_stopped])
def test_a_run_that_ends_while_it_judges_is_there_to_go_on_with(tmp_path, trouble):
    """By its folder alone, as its message says: the recipe is there beside the replies."""
    rows = [{"prompt": p, "first": "a b", "second": "c d"} for p in "pqr"]
    endpoint = {"model": "m", "retries": 0, "concurrency": 1}
    with serving(trouble) as server:
        judge = {"endpoint": endpoint | {"url": server.url}, "reward": {}}
        with suppress(SteersmanError, FileNotFoundError):  # there is no labelled.jsonl
            label(tmp_path, rows, judge=judge, ties="keep")
        server.behave = lambda n, text: "[[A]]"
        recipe = load_recipe("judge", tmp_path / "run/config.yaml")
        assert run(recipe, resume=True)["data/labelled"] == 3
        assert len(set(server.seen)) == 6


TALK = "\n\nHuman: Hi\n\nAssistant: "
HELLO = {"role": "assistant", "content": "Hello there!"}
NO = {"role": "assistant", "content": "No."}
HI = {"role": "user", "content": "Hi"}
WANTED = {"prompt": [HI], "chosen": [HELLO], "rejected": [NO]}


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"prompt": [HI], "chosen": [NO], "rejected": [HELLO]}, WANTED),
        ({"prompt": "Hi", "first": [HELLO], "second": [NO]}, WANTED),
        ({"chosen": [HI, NO], "rejected": [HI, HELLO]}, WANTED),
        ({"prompt": "Hi", "chosen": [HI, HELLO], "rejected": [HI, NO]}, WANTED),
        ({"conversations": [{"from": "human", "value": "Hi"}], "chosen": {"from": "gpt", "value": "No."},
          "rejected": {"from": "gpt", "value": "Hello there!"}}, WANTED),
        ({"chosen": f"{TALK}Hello there!", "rejected": f"{TALK}No."}, WANTED),
        ({"instruction": "Hi", "chosen": "No.", "rejected": "Hello there!"}, WANTED),
        ({"prompt": "Hi", "responses": [[HELLO], [NO]]},
         {"prompt": [HI], "responses": [[HELLO], [NO]], "ranks": [0, 1]}),
        ({"prompt": "Hi", "completion": [HELLO]}, {"prompt": [HI], "completion": [HELLO], "grade": 2}),
    ],
)  # fmt: skip
def test_answers_in_turns_stay_turns_and_are_judged_by_their_words(tmp_path, row, wanted):
    _, (out,) = label(tmp_path, [row])
    kept = {name: turns_of(out[name]) for name in wanted}
    assert kept == {name: turns_of(value) for name, value in wanted.items()}


def turns_of(value):
    """Texts as they are, turns by role and content alone."""
    if isinstance(value, list) and value and isinstance(value[0], list):
        return [turns_of(x) for x in value]
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [{"role": m["role"], "content": m["content"]} for m in value]
    return value
