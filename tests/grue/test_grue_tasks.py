"""The seven tasks on their stand-ins and on rows of the originals' shape, and what is wrong with a matrix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from grue_kit import TASK, settings, write_task
from pydantic import ValidationError

from steersman.assets import story_model
from steersman.grue.check import check_matrix
from steersman.grue.evaluate import corpus_value, metrics_of
from steersman.grue.recipe import GrueRecipe
from steersman.grue.rows import task_rows
from steersman.grue.run import run
from steersman.grue.task import TASKS, in_split, json_lines, load_task, text_lines
from steersman.grue.tasks.table_to_text import page
from steersman.types import SteersmanError


def recipe_of(folder: Path, **more: Any) -> GrueRecipe:
    return GrueRecipe.model_validate(settings(folder, **more))


@pytest.mark.parametrize("name", TASKS)
def test_each_task_reads_its_stand_in(name, shared):
    recipe = GrueRecipe.model_validate(
        {"model": {"path": str(story_model())}, "tasks": [name],
         "data": {"source": "files", "folder": str(shared), "train": 50, "held_out": 20}}
    )  # fmt: skip
    task = load_task(name)
    rows = task_rows(task, recipe)
    assert (len(rows.train), len(rows.held_out)) == (50, 20)
    every = [*rows.train, *rows.held_out]
    assert all(row["references"] and row["prompt"].strip() for row in every)
    assert not {r["prompt"] for r in rows.train} & {r["prompt"] for r in rows.held_out}
    for made, spec in metrics_of(task).values():
        own = corpus_value(made, spec, [r["references"][0] for r in rows.held_out], rows.held_out)
        other = corpus_value(made, spec, ["zzz"] * 20, rows.held_out)
        if made.needs and made.better != "neither":  # a reference beats nonsense
            assert (own.value > other.value) == (made.better == "higher"), made.name


ORIGINALS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "imdb": (
        {"text": "a<br />" + "b " * 59 + "c " * 60 + "4", "label": 0},  # a hash in the smallest fifth
        {"prompt": " ".join(["b"] * 48), "references": [" ".join(["c"] * 36)], "label": 0},
    ),
    "commongen": (
        {"concept_set_idx": 0, "concepts": ["ski", "mountain"], "target": "Skier skis down the mountain"},
        {"prompt": "Words: ski, mountain. Sentence:", "references": ["Skier skis down the mountain"]},
    ),
    "summarisation": (
        {"article": "It rained. " * 300, "highlights": "Rain .", "id": "x"},
        {"references": ["Rain ."], "prompt": " ".join(["It rained."] * 180) + "\nSummary:"},
    ),
    "table-to-text": (
        {
            "id": 0,
            "table_page_title": "A. Smith",
            "table_webpage_url": "http://example.org/A._Smith",
            "table_section_title": "Career",
            "table_section_text": "",
            "table": [
                [
                    {"column_span": 1, "is_header": True, "row_span": 1, "value": "Year"},
                    {"column_span": 1, "is_header": True, "row_span": 1, "value": "Club"},
                ],
                [
                    {"column_span": 1, "is_header": False, "row_span": 1, "value": "2001"},
                    {"column_span": 1, "is_header": False, "row_span": 1, "value": "York"},
                ],
            ],
            "highlighted_cells": [[1, 1]],
            "example_id": "17",
            "sentence_annotations": {
                "original_sentence": ["He also played for York."],
                "sentence_after_deletion": ["He played for York."],
                "sentence_after_ambiguity": ["Smith played for York."],
                "final_sentence": ["Smith played for York."],
            },
            "overlap_subset": "none",
        },
        {
            "prompt": "Facts: page: A. Smith; section: Career; Club: York. Sentence:",
            "table": [["page", "A. Smith"], ["section", "Career"], ["Club", "York"]],
            "precision_table": [
                ["header", "Year"],
                ["header", "Club"],
                ["cell", "2001"],
                ["cell", "York"],
                ["page", "A. Smith"],
                ["section", "Career"],
            ],
            "references": ["Smith played for York."],
        },
    ),
    "narrative-qa": (
        {
            "document": {
                "id": "x1",
                "kind": "gutenberg",
                "url": "http://example.org/fox",
                "file_size": 900,
                "word_count": 120,
                "start": "Once there was",
                "end": "the end .",
                "summary": {"text": "A fox ran.", "tokens": ["A", "fox", "ran", "."], "url": "", "title": "Fox"},
                "text": "Once there was a fox.",
            },
            "question": {"text": "Who ran?", "tokens": ["Who", "ran", "?"]},
            "answers": [{"text": "a fox", "tokens": ["a", "fox"]}, {"text": "the fox", "tokens": ["the", "fox"]}],
        },
        {"prompt": "A fox ran.\nQuestion: Who ran?\nAnswer:", "references": ["a fox", "the fox"]},
    ),
    "translation": (
        {"translation": {"en": "Good day", "de": "Guten Tag"}},
        {"prompt": "Translate English to German: Good day\nGerman:", "references": ["Guten Tag"]},
    ),
    "dialogue": (
        {"dialog": [f"turn {i} " for i in range(8)], "act": [1, 1, 1, 1, 1, 3, 2, 4], "emotion": [0] * 8},
        {
            "prompt": "A: turn 0\nB: turn 1\nA: turn 2\nB: turn 3\nA: turn 4\nB:",
            "references": ["turn 5"],
            "last": "turn 4",
            "intent": 2,
        },
    ),
}


@pytest.mark.parametrize("name", TASKS)
def test_each_task_reads_a_saved_copy_of_the_original(name, tmp_path):
    raw, expected = ORIGINALS[name]
    task = load_task(name)
    assert task.original is not None
    (tmp_path / name).mkdir()
    changed = json.loads(json.dumps(raw).replace("rain", "snow"))
    for split, row in (("train", {**changed, **_other(name)}), ("validation", raw)):
        with (tmp_path / name / f"{task.original.splits[split]}.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
    recipe = GrueRecipe.model_validate(
        {"model": {"path": "none"}, "tasks": [name], "data": {"source": "hub", "folder": str(tmp_path)}}
    )
    rows = task_rows(task, recipe).held_out
    assert any(expected.items() <= row.items() for row in rows), rows
    if name == "dialogue":  # three of the eight turns have five before them
        assert [(row["prompt"].count("\n"), row["intent"]) for row in sorted(rows, key=lambda r: r["last"])] == [
            (5, 2), (5, 1), (5, 3),
        ]  # fmt: skip
    if name == "imdb":
        assert len(rows) == 1


def test_the_original_of_totto_is_rewarded_and_judged_by_its_own_program(tmp_path):
    folder = tmp_path / "table-to-text"
    folder.mkdir()
    raw = ORIGINALS["table-to-text"][0]
    for split, title in (("train", "B. Jones"), ("validation", "A. Smith")):
        (folder / f"{split}.jsonl").write_text(json.dumps({**raw, "table_page_title": title}) + "\n")
    values = {
        "model": {"path": str(story_model())}, "tasks": ["table-to-text"], "methods": ["zero-shot", "supervised"],
        "seeds": [0], "data": {"source": "hub", "folder": str(tmp_path)},
        "run": {"dir": str(tmp_path / "matrix"), "threads": 1},
    }  # fmt: skip
    [task], rows, every = check_matrix(GrueRecipe.model_validate(values))
    assert every[0].judged["reward"]["parent"]["args"] == {"program": "totto"}
    made, spec = metrics_of(task)["parent"]
    held, text = rows["table-to-text"].held_out, ["In 2001 Smith played for York."]
    one_table, _ = metrics_of(load_task("table-to-text"))["parent"]
    assert corpus_value(made, spec, text, held).value > corpus_value(one_table, {}, text, held).value + 0.05
    stand_in = load_task("table-to-text")
    assert stand_in.metrics["parent"] == {"metric": "parent"}  # DART has no second table
    assert stand_in.of_original().metrics.keys() == stand_in.metrics.keys()


def test_cells_of_totto_have_all_their_headers_by_their_place():
    def cell(value, header=False, columns=1, rows=1):
        return {"value": value, "is_header": header, "column_span": columns, "row_span": rows}

    raw = dict(ORIGINALS["table-to-text"][0])
    raw["table"] = [
        [cell("Season", True, rows=2), cell("League", True, columns=2), cell("Goals", True, rows=2)],
        [cell("Apps", True), cell("Caps", True)],
        [cell("1999", True, rows=2), cell("30"), cell("2"), cell("12")],
        [cell("31"), cell("", columns=2)],
        [cell("Ajax", columns=3), cell("9")],
    ]
    raw["highlighted_cells"] = [[2, 1], [2, 3], [3, 0], [4, 0], [4, 1], [1, 1], [2, 0]]
    (made,) = page(raw)
    assert made["table"][2:] == [
        ["1999, League, Apps", "30"],
        ["1999, Goals", "12"],
        ["1999, League, Apps", "31"],
        ["Season, League, Apps, Caps", "Ajax"],
        ["Goals", "9"],
        ["League", "Caps"],
        ["Season", "1999"],
    ]


def test_the_authors_own_files_are_read_where_the_hub_has_a_script(tmp_path):
    page = dict(ORIGINALS["table-to-text"][0])
    said = "a __eou__ b __eou__ c __eou__ d __eou__ Hi . __eou__ Bye __eou__"
    first = {**page, "table_page_title": "B. Jones"}
    told = page["sentence_annotations"]
    for row in (page, first):  # as in the authors' file
        row["sentence_annotations"] = [{name: values[0] for name, values in told.items()}]
    folder = tmp_path / "table-to-text"
    folder.mkdir()
    (folder / "train.jsonl").write_text(json.dumps(first) + "\n")
    (folder / "validation.jsonl").write_text(json.dumps(page) + "\n")
    folder = tmp_path / "dialogue"
    folder.mkdir()
    (folder / "train.txt").write_text(said.replace("a _", "What ? _") + "\n" + said.replace("a _", "Why ? _") + "\n")
    (folder / "validation.txt").write_text(said + "\n")
    data = {"source": "hub", "folder": str(tmp_path)}
    recipe = GrueRecipe.model_validate(
        {"model": {"path": "none"}, "tasks": ["table-to-text", "dialogue"], "data": data}
    )
    rows = task_rows(load_task("table-to-text"), recipe)
    assert rows.held_out[0]["references"] == ["Smith played for York."]
    rows = task_rows(load_task("dialogue"), recipe)
    rest = "\nB: b\nA: c\nB: d\nA: Hi .\nB:"
    assert {row["prompt"] for row in rows.train} == {f"A: What ?{rest}", f"A: Why ?{rest}"}
    assert [(row["prompt"], row["references"], row["last"]) for row in rows.held_out] == [
        (f"A: a{rest}", ["Bye"], "Hi ."),
    ]
    (folder / "validation.txt").unlink()
    (folder / "validation.jsonl").write_text(json.dumps({"dialog": ["a", "b"], "act": [1]}) + "\n")
    with pytest.raises(SteersmanError, match=r"validation\.jsonl.*2 turns and 1 acts: 'a b'"):
        task_rows(load_task("dialogue"), recipe)


def _other(name: str) -> dict[str, Any]:
    """Makes the training row another prompt than the validation row's."""
    return {
        "imdb": {"text": "other " * 60 + "1", "label": 1},
        "commongen": {"concepts": ["ball"]},
        "summarisation": {"article": "Sun."},
        "table-to-text": {"table_page_title": "B. Jones"},
        "narrative-qa": {"question": {"text": "Why?"}},
        "translation": {"translation": {"en": "Bye", "de": "Tschau"}},
        "dialogue": {"dialog": ["hm"] * 6, "act": [1] * 6},
    }[name]


def test_offline_the_original_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    recipe = GrueRecipe.model_validate({"model": {"path": "none"}, "tasks": ["commongen"]})
    with pytest.raises(SteersmanError, match=r"load_dataset\('allenai/common_gen'\).*save_to_disk.*source: files"):
        task_rows(load_task("commongen"), recipe)
    with pytest.raises(SteersmanError, match=r"loading script.*totto_dev_data\.jsonl.*source: files"):
        task_rows(load_task("table-to-text"), recipe)


def test_a_row_of_another_set_is_named(tmp_path):
    (tmp_path / "commongen").mkdir()
    for split in ("train", "validation"):
        (tmp_path / "commongen" / f"{split}.jsonl").write_text('{"words": ["a"]}\n')
    recipe = GrueRecipe.model_validate(
        {"model": {"path": "none"}, "tasks": ["commongen"], "data": {"folder": str(tmp_path)}}
    )
    with pytest.raises(SteersmanError, match=r"commongen.*train\.jsonl.*not a row of allenai/common_gen.*words"):
        task_rows(load_task("commongen"), recipe)


def test_rows_of_one_prompt_are_one_row_with_all_references(tmp_path):
    recipe, path = recipe_of(tmp_path), tmp_path / "colours.py"
    row = {"thing": "ball", "references": ["round.", "red and the ball is nice."]}
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"train": 100})})
    [ball] = [r for r in task_rows(load_task(str(path)), recipe).train if r["thing"] == "ball"]
    assert ball["references"] == ["red and the ball is nice.", "blue ball.", "round."]


def test_a_prompt_on_both_sides_is_held_out(tmp_path):
    path = write_task(tmp_path)
    with (tmp_path / "validation.jsonl").open("a") as file:
        file.write('{"thing": "cat", "references": ["x"]}\n')
    data = {"source": "files", "folder": str(tmp_path), "held_out": 7}
    rows = task_rows(load_task(str(path)), GrueRecipe.model_validate({"model": {"path": "none"}, "data": data}))
    assert "A cat is" not in {r["prompt"] for r in rows.train}
    assert "A cat is" in {r["prompt"] for r in rows.held_out}
    assert "1 training prompts are held out" in rows.note


def test_references_that_are_empty_are_left_out_and_counted(tmp_path):
    recipe, path = recipe_of(tmp_path), tmp_path / "colours.py"
    row = {"thing": "sun", "references": ["", "red.", " "]}
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"train": 100})})
    rows = task_rows(load_task(str(path)), recipe)
    assert next(r for r in rows.train if r["thing"] == "sun")["references"] == ["red."]
    assert "2 empty references left out, the first in row 13" in rows.note


def test_in_split_is_stable_and_about_a_tenth():
    held = [k for k in map(str, range(2000)) if in_split(k, "validation")]
    assert 150 < len(held) < 250
    assert not any(in_split(k, "train") for k in held)


BAD_TASKS = [
    (
        'prompt="A {thing} is"',
        'prompt="A {thingy} is"',
        "the prompt needs 'thingy', and the row has thing, references",
    ),
    ('"metric": "length"', '"metric": "lenght"', "did you mean length"),
    ('{"metric": "length"}', '{"metric": "concept_coverage"}', "needs concepts, and a row has no concepts"),
    ('rewards={"rougeL": {"metric": "rougeL"}}', 'rewards={"d": {"metric": "cider"}}', "reward.*can not be a reward"),
    ('rewards={"rougeL": {"metric": "rougeL"}}', 'rewards={"d": {"function": "nix.py:f"}}', "reward.*no file nix.py"),
    ("files=files", 'file_splits=("train",), files=files', "it has no split 'validation'; it has train"),
    ("files=files", "files=None", "it reads no local files"),
    ("yield json.loads(line)", "yield 3", "the reader gives int"),
    ("yield json.loads(line)", "yield {**json.loads(line), 'references': 'x'}", "references must be a list"),
    ("yield json.loads(line)", "yield {'thing': line}", "needs references, and a row has no references"),
    ('f"{split}.jsonl"', 'f"{split}.json"', "reading split 'train'.*FileNotFoundError"),
    ("yield json.loads(line)", "yield {'thing': json.loads(line)['nix']}", "after 0 rows: KeyError: 'nix'"),
    ("TASK =", "THING =", "it has no TASK"),
    ('name="colours"', 'name="imdb"', "taken by a task of the project"),
    ("import json\n", "import jsom\n", "ModuleNotFoundError"),
]


@pytest.mark.parametrize(("old", "new", "told"), BAD_TASKS, ids=[t[:30] for *_, t in BAD_TASKS])
def test_a_bad_task_is_named_before_any_cell_runs(old, new, told, tmp_path):
    values = settings(tmp_path)
    assert old in TASK
    write_task(tmp_path, TASK.replace(old, new))
    with pytest.raises(SteersmanError, match=told):
        run(GrueRecipe.model_validate(values))
    assert not (tmp_path / "matrix").exists()


def test_all_problems_are_told_at_once(tmp_path):
    values = settings(tmp_path, tasks=["comongen", str(tmp_path / "none.py"), str(write_task(tmp_path))])
    values["data"]["held_out_split"] = "tset"
    with pytest.raises(SteersmanError) as caught:
        check_matrix(GrueRecipe.model_validate(values))
    told = str(caught.value)
    assert "3 problems" in told
    assert "did you mean commongen?" in told
    assert "there is no file" in told
    assert "it has no split 'tset'" in told


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"methods": ["zero-shot", "superviced"]}, "did you mean supervised"),
        ({"methods": ["ppo", "ppo"]}, "listed twice"),
        ({"algorithms": {"gropo": {}}}, "did you mean grpo"),
        ({"data": {"source": "files"}}, "say where the files are"),
        ({"model": {"path": "x", "scratch": {"model_type": "t5"}}}, "zero-shot.*nothing to say"),
    ],
)
def test_a_bad_recipe_is_named(more, told, tmp_path):
    with pytest.raises(ValidationError, match=told):
        recipe_of(tmp_path, **more)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"per_task": {"colour": {"train": 3}}}, "did you mean colours"),
        ({"algorithms": {"grpo": {"minibatches": 3}}}, r"cell colours supervised\+grpo.*do not divide"),
        ({"algorithms": {"grpo": {"clip": 3}}}, r"cell colours supervised\+grpo.*algorithm\.clip"),
        ({"per_task": {"colours": {"reward": {"r": {"metric": "parent"}}}}}, "reward.*needs"),
        ({"generation": {"min_new_tokens": 9}}, "min_new_tokens"),
    ],
)
def test_a_cell_that_can_not_run_is_named_before_any_runs(more, told, tmp_path):
    with pytest.raises(SteersmanError, match=told):
        run(recipe_of(tmp_path, **more))
    assert not (tmp_path / "matrix").exists()


def test_lines_end_at_line_feeds_alone(tmp_path):
    """Parallel texts hold U+2028 and its like inside their lines, which would no longer stand beside each other."""
    path = tmp_path / "text.txt"
    path.write_bytes("one\u2028two\r\n\nthree\x85four\n".encode())
    assert text_lines(path) == ["one\u2028two", "", "three\x85four"]
    path.write_bytes('{"a": "one\u2028two"}\n'.encode())
    assert list(json_lines(path)) == [{"a": "one\u2028two"}]
