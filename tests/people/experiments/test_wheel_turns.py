"""What turns of the wheel do to each other: who serves meanwhile, and which judgements still count."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from judging_kit import ab_rows, append, choices, settings
from letter_models import rows_of

from steersman.data import Row, RowError
from steersman.people.judgements import Judgement, JudgementFiles, judgement
from steersman.people.serving import Serving, read_serving
from steersman.people.store.database import StoreAwayError
from steersman.people.wheel.evaluation import human_metrics, queries
from steersman.people.wheel.gates import Gate, check
from steersman.people.wheel.lessons import is_held_out
from steersman.people.wheel.recipe import WheelRecipe
from steersman.people.wheel.run import Turn, run


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


def test_a_turn_waits_until_a_prompt_is_held_out(tmp_path, mini_model):
    """Nothing is collected or trained before, so that a larger share, or more judgements, are of use."""
    values = settings(tmp_path, mini_model, experiment=None, gates={"length": {"at_most": 99}})
    values["judgements"]["held_out"] = 0.05
    rows = [row for row in choices(160, seed=8) if not is_held_out(judgement(Row(row, "said", 1)), 0.05)]
    said = Said(rows[:80])
    assert turned(values, said, resume=False)["state"].startswith("turn 1 begins once a prompt is held out")
    assert not (tmp_path / "run/round-01").exists()
    said.add([{**rows[80], "id": "new"}])
    values["judgements"]["held_out"] = 0.3
    assert turned(values, said)["state"] == "done"
    assert len(rows_of(tmp_path / "run/round-01/collected.jsonl")) == 81


def test_what_taught_while_fewer_prompts_were_held_out_measures_nothing(tmp_path, mini_model):
    values = settings(tmp_path, mini_model, experiment=None, turns=2, gates={"length": {"at_most": 99}})
    values["judgements"]["held_out"] = 0.1
    said = Said(choices(80, seed=8))
    turned(values, said, resume=False)
    values["judgements"]["held_out"] = 0.5
    said.add(choices(60, seed=9))
    assert turned(values, said)["state"] == "done"
    prompts = {one.id: one.prompt for one in said.rows}
    one, two = (tmp_path / f"run/round-0{number}" for number in (1, 2))
    taught = {prompts[i] for row in rows_of(one / "pairs.jsonl") for i in row["judgements"]}
    read = {prompts[row["id"]] for row in rows_of(two / "readings.jsonl")}
    assert len(read) > 20
    assert not read & taught
    assert not read & {prompts[i] for row in rows_of(two / "pairs.jsonl") for i in row["judgements"]}


def test_a_test_goes_on_as_it_began(tmp_path, mini_model, capsys):
    """Its share and its salt, too: users who change arms, or a share other than theirs, make a difference of none."""
    values = settings(tmp_path, mini_model, experiment={"share": 0.1, "metric": "thumb"})
    said = Said(choices(80, seed=4))
    turned(values, said, resume=False)
    before = (tmp_path / "run/serving.json").read_text()
    values |= {"experiment": {"share": 0.5, "metric": "thumb"}, "run": {**values["run"], "seed": 5}}
    assert "turn 1 is tested" in turned(values, said)["state"]
    assert (tmp_path / "run/serving.json").read_text() == before
    assert "turn 1: its test goes on as it began" in capsys.readouterr().out


def test_what_is_said_while_it_trains_belongs_to_no_arm(tmp_path, mini_model, monkeypatch):
    """All of it is about the model that stands, which everybody meets then."""
    values = settings(tmp_path, mini_model, experiment={"share": 0.5, "metric": "thumb", "most_units": 40})
    said, train = Said(choices(80, seed=4)), Turn.train

    def thumbs(name, first):
        about = {"prompt": "hm,", "completion": "a", "model": name, "time": 10**6}
        return [about | {"id": f"t{i}", "user": f"u{i}", "label": i % 2} for i in range(first, first + 50)]

    def beside(self, *lessons):
        said.add(thumbs("turn-00", 0))
        return train(self, *lessons)

    monkeypatch.setattr(Turn, "train", beside)
    assert "has no value yet" in turned(values, said, resume=False)["state"]
    monkeypatch.undo()
    assert "has no value yet" in turned(values, said)["state"]
    said.add(thumbs("turn-01", 50))
    assert turned(values, said)["decisions"][0]["test"]["primary"]["look"]["n"] == 50


def test_a_row_that_is_still_being_written_is_waited_for(tmp_path, mini_model):
    """And bad rows are counted once, however often the folder was read."""
    values = settings(tmp_path, mini_model, experiment=None, gates={"length": {"at_most": 99}})
    inbox = append(tmp_path / "inbox", "day", choices(30, seed=1))
    rest = "".join(json.dumps(row) + "\n" for row in choices(60, seed=2))
    with (inbox / "day.jsonl").open("a") as file:
        file.write(rest[:70])
    told = run(WheelRecipe.model_validate(values))
    assert "day.jsonl has no end" in told["state"]
    with (inbox / "day.jsonl").open("a") as file:
        file.write(rest[70:] + "{}\n")
    with pytest.raises(RowError, match=r"day\.jsonl, line 91"):
        run(WheelRecipe.model_validate(values), resume=True)
    values["judgements"] |= {"on_bad_row": "skip", "at_least": 91}
    values["poll"] = 0.05
    late = threading.Timer(0.5, append, (tmp_path / "inbox", "late", choices(1, seed=3)))
    late.start()
    assert run(WheelRecipe.model_validate(values), resume=True)["state"] == "done"
    late.join()
    made = json.loads((tmp_path / "run/round-01/collected.provenance.json").read_text())
    assert made["left_out"] == {"missing field": 1}


def test_rows_without_ids_are_the_same_wherever_they_are_read_from(tmp_path, monkeypatch):
    rows = [{k: v for k, v in row.items() if k != "id"} for row in choices(2)]
    for day in ("a", "b"):
        (tmp_path / "inbox" / day).mkdir(parents=True)
        append(tmp_path / "inbox" / day, "rows", [*rows, {**rows[0], "id": None}])
    monkeypatch.chdir(tmp_path)
    wanted = {f"{day}/rows.jsonl:{n}" for day in "ab" for n in (1, 2, 3)}
    for place in ("inbox", str(tmp_path / "inbox"), "inbox/*/rows.jsonl", "./inbox/"):
        assert {one.id for one in JudgementFiles(place)} == wanted, place
    assert {one.id for one in JudgementFiles("inbox/a/rows.jsonl")} == {f"rows.jsonl:{n}" for n in (1, 2, 3)}
