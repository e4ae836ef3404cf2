"""What turns of the wheel do to each other: who serves meanwhile, and which judgements still count."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from judging_kit import ab_rows, choices, settings
from letter_models import rows_of

from steersman.data import Row
from steersman.people.judgements import Judgement, judgement
from steersman.people.serving import Serving, read_serving
from steersman.people.store.database import StoreAwayError
from steersman.people.wheel.evaluation import human_metrics, queries
from steersman.people.wheel.gates import Gate, check
from steersman.people.wheel.lessons import is_held_out
from steersman.people.wheel.recipe import WheelRecipe
from steersman.people.wheel.run import run


class Said:
    """Judgements that grow, and whose store may be away or lose some."""

    def __init__(self, rows) -> None:
        self.rows, self.away = [judgement(Row(row, "said", i)) for i, row in enumerate(rows, 1)], False

    def add(self, rows) -> None:
        self.rows += Said(rows).rows

    def __iter__(self):
        if self.away:
            raise StoreAwayError("it can not be opened")
        return iter(self.rows)


def turned(values, source, *, resume=True):
    return run(WheelRecipe.model_validate(values), resume=resume, source=source)


@pytest.fixture
def written(monkeypatch):
    """(model that stands, candidate) of every serving.json that was written."""
    names, write = [], Serving.write

    def noted(self, path):
        names.append((self.current.name, None if self.candidate is None else self.candidate.name))
        write(self, path)

    monkeypatch.setattr(Serving, "write", noted)
    return names


def test_who_serves_is_written_when_it_changes(tmp_path, mini_model, written):
    """Two turns: each is tested and promoted. A wheel that is resumed does not go through its past models again."""
    values, said = settings(tmp_path, mini_model, turns=2), Said(choices(80, seed=4))
    assert "turn 1 is tested" in turned(values, said, resume=False)["state"]
    said.add([*ab_rows(200, 0.8, "turn-00", "turn-01"), *choices(80, seed=5)])
    assert "turn 2 is tested" in turned(values, said)["state"]
    one, two = ("turn-00", "turn-01"), ("turn-01", "turn-02")
    assert written == [("turn-00", None), one, ("turn-01", None), two]
    assert "turn 2 is tested" in turned(values, said)["state"]
    said.away = True
    with pytest.raises(StoreAwayError):
        turned(values, said)
    assert len(written) == 4
    assert read_serving(tmp_path / "run/serving.json").candidate is not None
    said.away = False
    said.add(ab_rows(200, 0.8, "turn-01", "turn-02", seed=11))
    assert turned(values, said)["state"] == "done"
    assert written[4:] == [("turn-02", None)]
    assert turned(values, said)["state"] == "done"
    assert len(written) == 5
    # Killed between a decision and serving.json, it serves what was decided before it waits for anything
    stands = read_serving(tmp_path / "run/serving.json").current
    before = Serving(2, replace(stands, name="turn-01"), replace(stands, name="turn-02"))
    before.write(tmp_path / "run/serving.json")
    turned({**values, "turns": 3}, said)
    assert written[-1] == ("turn-02", None)


def test_models_are_found_from_any_working_directory(tmp_path, mini_model, monkeypatch):
    """The recipe has relative paths, and a server is started elsewhere; then the project moves."""
    home, here = tmp_path / "home", os.path.relpath(mini_model, tmp_path / "home")
    home.mkdir()
    monkeypatch.chdir(home)
    values = settings(Path(), Path(here), turns=2)
    said = Said(choices(80, seed=4))
    turned(values, said, resume=False)
    said.add([*ab_rows(200, 0.8, "turn-00", "turn-01"), *choices(80, seed=5)])
    state = turned(values, said)["state"]
    assert "turn 2 is tested" in state
    serving = read_serving(home / "run/serving.json")
    assert serving.candidate is not None
    for one in (serving.current, serving.candidate):
        assert Path(one.path).is_absolute()
        assert (Path(one.path) / "model.safetensors").exists()
    (decided,) = rows_of(home / "run/round-01/decision.jsonl")
    assert decided["path"] == "round-01/1-dpo/model"
    moved = tmp_path / "moved"
    home.rename(moved)
    monkeypatch.chdir(tmp_path)
    told = turned(settings(Path("moved"), mini_model, turns=2), said)
    assert told["state"] == state
    assert (Path(told["decisions"][0]["path"]) / "model.safetensors").exists()


def test_a_rater_who_is_found_bad_later_teaches_and_measures_nothing_more(tmp_path, mini_model):
    """So with judgements that were taken back after their turn, and those that their rater gave anew otherwise."""
    free = {"experiment": None, "gates": {"length": {"at_most": 99}}, "mix": {"new": 0.5, "earlier": 0.5}}
    values, said = settings(tmp_path, mini_model, turns=2, **free), Said(choices(120, seed=1))
    turned(values, said, resume=False)
    early = {one.id: one for one in said.rows}
    bad = {i for i, one in early.items() if one.user == "r3"}
    back, again = sorted(i for i, one in early.items() if one.user == "r4"), "1-5"
    said.rows = [one for one in said.rows if one.id not in back]
    said.add(choices(60, seed=2, models=None))
    gold = [
        {"id": f"g{i}", "user": "r3", "time": 9000 + i, "prompt": f"gold {i}", "answers": ["x", "y"],
         "choice": "first", "expected": "second"}
        for i in range(5)
    ]  # fmt: skip
    said.add(gold)
    other = "second" if early[again].choice == "first" else "first"
    said.rows.append(replace(early[again], id="anew", time=9999.0, choice=other))
    assert turned(values, said)["state"] == "done"
    folder = tmp_path / "run/round-02"
    pairs = rows_of(folder / "pairs.jsonl")
    assert {"new", "earlier"} == {row["source"] for row in pairs}
    used = {i for row in pairs for i in row["judgements"]} | {row["id"] for row in rows_of(folder / "readings.jsonl")}
    assert not used & (bad | set(back) | {again})
    assert used & set(early)
    assert {row["id"] for row in rows_of(folder / "taken-back.jsonl")} == set(back)
    # the first turn knew nothing of that
    first = {i for row in rows_of(tmp_path / "run/round-01/pairs.jsonl") for i in row["judgements"]}
    assert first & bad
    assert first & set(back)


def test_a_prompt_is_held_out_as_text_and_as_chat_alike():
    rows = [Judgement(str(i), "u", 0.0, f"Hi {i}", ("a", "b"), choice="first") for i in range(300)]
    chats = [replace(one, prompt=[{"role": "user", "content": str(one.prompt)}]) for one in rows]
    sides = [is_held_out(one, 0.5) for one in rows]
    assert [is_held_out(one, 0.5) for one in chats] == sides
    assert len(queries([*rows, *chats], 1000)) == 300
    longer = [replace(one, prompt=[*one.prompt, {"role": "assistant", "content": "?"}]) for one in chats]
    system = [replace(one, prompt=[{"role": "system", "content": str(one.prompt)}]) for one in rows]
    for others in (longer, system):
        assert 90 < sum(is_held_out(one, 0.5) != side for one, side in zip(others, sides, strict=True)) < 210


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_the_standard_gate_lets_no_few_held_out_items_through(n):
    """n items that all came out right, which a coin does once in 2^n times, for pairs and for thumbs."""
    gate = {"human/accuracy": Gate(at_least=0.5, sure=True)}
    pairs = [Judgement(str(i), "u", 0.0, f"p{i}", ("a", "b"), choice="first") for i in range(n)]
    right = [{"id": str(i), "answer": k, "logp": 1.0 - k, "logp_current": 0.0} for i in range(n) for k in (0, 1)]
    assert not check(gate, human_metrics(pairs, right))[0].passed
    thumbs = [Judgement(str(i), "u", 0.0, f"p{i}", ("a",), label=i < n) for i in range(2 * n)]
    read = [{"id": str(i), "answer": 0, "logp": float(i < n), "logp_current": 0.0} for i in range(2 * n)]
    assert not check(gate, human_metrics(thumbs, read))[0].passed


def test_the_standard_gate_lets_twelve_right_items_through():
    pairs = [Judgement(str(i), "u", 0.0, f"p{i}", ("a", "b"), choice="first") for i in range(12)]
    right = [{"id": str(i), "answer": k, "logp": 1.0 - k, "logp_current": 0.0} for i in range(12) for k in (0, 1)]
    assert check({"human/accuracy": Gate(at_least=0.5, sure=True)}, human_metrics(pairs, right))[0].passed
    one_prompt = [replace(one, prompt="p", answers=(f"a{one.id}", "b")) for one in pairs]
    assert not check({"human/accuracy": Gate(at_least=0.5, sure=True)}, human_metrics(one_prompt, right))[0].passed
