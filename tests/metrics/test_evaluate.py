"""`steersman evaluate` over a file and over a model's answers; a metric as a part of a reward."""

import json
import re

import pytest

from steersman.cli import main
from steersman.metrics import metric
from steersman.reward import RewardConfig, build_reward
from steersman.types import Prompt, Sample, SteersmanError

ROWS = [
    {"prompt": "a", "completion": "the cat sat on the mat", "reference": "a cat sat on the mat"},
    {"prompt": "b", "completion": "", "reference": ["a dog", "dogs"]},
    {"prompt": "c", "completion": "a dog ran home", "reference": ["a dog went home"]},
]
STORY = "src/steersman/assets/story-model"


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_evaluate_a_file(rows, tmp_path, capsys):
    out = tmp_path / "out.json"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"file: {rows}\nmetrics:\n"
        "  rouge: {metric: rougeL, args: {stem: false}, columns: {references: reference}}\n"
        f"  distinct: {{}}\nout: {out}\n"
    )
    assert main(["evaluate", str(recipe)]) == 0
    shown = capsys.readouterr().out
    assert "3 completions, 1 of them empty; rows 1" in shown
    assert "95% interval" in shown
    found = json.loads(out.read_text())
    texts, references = [r["completion"] for r in ROWS], [r["reference"] for r in ROWS]
    expected = metric("rougeL", {"stem": False}).corpus(texts, references)
    assert found["metrics"]["rouge"]["value"] == expected.value
    assert found["metrics"]["rouge"]["low"] == expected.low
    assert found["empty"] == [1]
    assert main(["evaluate", str(rows), "--metrics", "[rougeL, ter]", "--as-json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["metrics"]) == {"rougeL", "ter"}


def test_a_file_in_another_encoding_is_named_and_read(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    row = {"completion": "今天天气很好", "reference": "今天天气不错"}
    path.write_bytes((json.dumps(row, ensure_ascii=False) + "\n").encode("gb18030"))
    words = ["evaluate", str(path), "--metrics", "[chrf]", "--as-json"]
    assert main(words) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "set encoding: gb18030 if that is right" in told
    assert "on_bad_row" not in told  # which evaluate has not
    assert main([*words, "--encoding", "gb18030"]) == 0
    found = json.loads(capsys.readouterr().out)["metrics"]["chrf"]["value"]
    assert found == pytest.approx(metric("chrf", {}).corpus([row["completion"]], [row["reference"]]).value)
    assert main([*words, "--encoding", "ascii"]) == 2
    assert "is not in the encoding that encoding names, ascii" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--metrics", "[rouge]"], "there is no metric 'rouge'. Did you mean rouge"),
        (
            ["--metrics", "[parent]"],
            "needs table, and the data have no column 'table'; they have: prompt, completion.*"
            "Point to one: `parent: {metric: parent, columns: {table: NAME}}`",
        ),
        (["--metrics", "[rougeL]", "--completion", "text"], "line 1: there is no text in the column 'text'"),
        (["--metrics", "[bleu]", "--generate.model.path", "x", "--generate.prompts", "[a]"], "either a file of"),
        ([], "give metrics"),
        (
            ["--metrics", f"{{p: {{metric: perplexity, args: {{path: {STORY}}}}}}}"],
            "metrics.p: .*row 1: the text is empty",
        ),
    ],
)
def test_what_can_not_be_evaluated_is_named(rows, words, match, capsys):
    assert main(["evaluate", str(rows), *words]) == 2
    assert re.search(match, capsys.readouterr().err)


def test_evaluate_a_models_answers(tmp_path, capsys, monkeypatch):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        "".join(json.dumps({"prompt": f"One day, {n} ", "reference": "a dog"}) + "\n" for n in ("Tom", "Mia"))
    )
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"generate:\n  model: {{path: {STORY}}}\n  data: {{path: {prompts}}}\n  greedy: true\n"
        f"  rollout: {{max_new_tokens: 8, held_out: 0}}\nmetrics: [rougeL, length]\nas_json: true\n"
    )
    assert main(["evaluate", str(recipe)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["completions"] == 2
    assert found["metrics"]["length"]["value"] > 2


def samples(*texts, **row):
    return [Sample(Prompt([1], "Say:", dict(row), i), [5, 6], [0.0, 0.0], "eos", t) for i, t in enumerate(texts)]


def reward(**part):
    return build_reward(RewardConfig.model_validate({"parts": {"mine": part}}), None)  # type: ignore[arg-type]


def test_a_metric_is_a_part_of_a_reward():
    made = reward(metric="rougeL", args={"stem": False}, columns={"references": "gold"}, weight=2.0)
    scores = made.score(samples("a dog ran", "cats", gold=["a dog ran home", "cat"]))
    expected = metric("rougeL", {"stem": False}).score(["a dog ran", "cats"], [["a dog ran home", "cat"]] * 2)
    assert scores.parts["mine"].tolist() == pytest.approx(expected)
    assert scores.total.tolist() == pytest.approx([2 * x for x in expected])
    assert "rouge-score" in made.describe()
    assert reward(metric="exact_match").score(samples("A dog.", reference="dog")).total.tolist() == [1]


def test_an_empty_response_is_scored_as_told_or_named(caplog):
    made = reward(metric="rougeL", columns={"references": "gold"})
    with caplog.at_level("WARNING", logger="steersman.reward"):
        assert made.score(samples("a", "", gold="a")).total.tolist() == [1, 0]
    assert "sample 1 is empty; rougeL scores it by its own rule" in caplog.text
    told = reward(metric="rougeL", columns={"references": "gold"}, empty=-1)
    assert told.score(samples("", "a", "", gold="a")).total.tolist() == [-1, 1, -1]
    assert told.score(samples("", gold="a")).total.tolist() == [-1]
    likely = {"metric": "perplexity", "args": {"path": STORY, "unit": "nats"}, "weight": -1.0}
    with pytest.raises(SteersmanError, match="reward 'mine': metric 'perplexity', row 0: the text is empty"):
        reward(**likely).score(samples(""))
    assert reward(**likely, empty=9).score(samples("")).total.tolist() == [-9]


@pytest.mark.parametrize(
    ("part", "match"),
    [
        ({"metric": "cider"}, "can not be a reward as it is; give it `args: {corpus_file"),
        ({"metric": "ter"}, "a lower ter is better, and its weight is 1"),
        ({"metric": "rougeL", "columns": {"reference": "x"}}, "has no 'reference'; it needs references"),
        ({"metric": "rougeL", "args": {"stm": 1}}, "no setting 'stm'"),
        ({"metric": "rouge_l"}, "there is no metric 'rouge_l'"),
        ({"metric": "rougeL", "builtin": "length"}, "exactly one of"),
        ({"builtin": "length", "workers": 2}, "belong to a metric"),
        ({"metric": "spice"}, "can't be offered"),
    ],
)
def test_a_metric_that_can_not_be_a_reward_is_named(part, match):
    with pytest.raises((SteersmanError, ValueError), match=match):
        reward(**part)


def test_a_missing_reference_is_named():
    made = reward(metric="rougeL")
    with pytest.raises(
        SteersmanError, match="needs references, and the data have no column 'references'; they have: gold"
    ):
        made.score(samples("a", gold="b"))
    with pytest.raises(SteersmanError, match="row 0: the reference is missing"):
        made.score(samples("a", references=None))


@pytest.mark.parametrize(
    ("metrics", "rows", "said", "counted"),
    [
        ("[rougeL]", [{"completion": "a"}], "the data have no column 'references'", False),
        ("[concept_coverage]", [{"completion": "a", "concepts": []}], "row 0: the concepts are empty", True),
    ],
)
def test_how_rows_are_counted_is_said_where_one_is_named(metrics, rows, said, counted, tmp_path, capsys):
    file = tmp_path / "answers.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["evaluate", "--file", str(file), "--metrics", metrics]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert said in told
    assert ("(rows count from 0)" in told) == counted
