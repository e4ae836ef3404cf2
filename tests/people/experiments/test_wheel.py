"""The wheel on a mini model: it waits, learns, is stopped by its gates or by people, and goes on after kills."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from pathlib import Path

import pytest
import yaml
from forked import steersman
from judging_kit import ab_rows, append, choices, settings
from letter_models import rows_of

from steersman.cli import main
from steersman.data import Row
from steersman.people.judgements import judgement
from steersman.people.serving import read_serving
from steersman.people.sources import open_judgements
from steersman.people.store import open_store
from steersman.people.store.database import StoreAwayError
from steersman.people.wheel.lessons import is_held_out
from steersman.people.wheel.recipe import WheelRecipe
from steersman.people.wheel.run import run
from steersman.run.files.ledger import Ledger, StoppedError
from steersman.types import SteersmanError


def turn(values, resume=True):
    return run(WheelRecipe.model_validate(values), resume=resume)


def test_the_command_ends_with_what_the_wheel_waits_for(tmp_path, mini_model, capsys):
    values = settings(tmp_path, mini_model)
    append(tmp_path / "inbox", "day1", choices(30, seed=1))
    (tmp_path / "wheel.yaml").write_text(yaml.safe_dump(values))
    assert main(["wheel", str(tmp_path / "wheel.yaml")]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("wheel: turn 1 begins with 60 new judgements, and 30 are in; its files are in")


def test_it_waits_learns_tests_and_promotes(tmp_path, mini_model, capsys):
    values = settings(tmp_path, mini_model)
    inbox = append(tmp_path / "inbox", "day1", choices(30, seed=1))
    told = turn(values, resume=False)
    waits = "turn 1 begins with 60 new judgements, and 30 are in"
    assert (told["state"], f"the wheel waits: {waits}\n" in capsys.readouterr().out) == (waits, True)
    assert (tmp_path / "run/config.yaml").exists()  # `--resume --run.dir` goes on with a wheel that waits
    append(inbox, "day2", choices(60, seed=2))
    told = turn(values)
    assert told["state"].startswith("turn 1 is tested")
    serving = read_serving(tmp_path / "run/serving.json")
    assert serving.current.name == "turn-00"
    assert serving.candidate is not None
    assert serving.candidate.share == 0.2
    assert 0.1 < sum(serving.arm(f"user {i}") == serving.candidate for i in range(500)) / 500 < 0.3
    folder = tmp_path / "run/round-01"
    kept = {row["id"]: judgement(Row(row, "kept", 1)) for row in rows_of(folder / "kept.jsonl")}
    assert all(is_held_out(kept[row["id"]], 0.3) for row in rows_of(folder / "readings.jsonl"))
    assert not any(is_held_out(kept[i], 0.3) for row in rows_of(folder / "pairs.jsonl") for i in row["judgements"])
    gates = rows_of(folder / "gates.jsonl")
    assert [g["passed"] for g in gates] == [True, True]
    append(inbox, "day3", ab_rows(10, 0.8, "turn-00", "turn-01"))
    assert "is tested" in turn(values)["state"]
    append(inbox, "day4", ab_rows(200, 0.8, "turn-00", "turn-01", seed=8))
    told = turn(values)
    assert told["state"] == "done"
    assert told["decisions"][0]["decision"] == "promoted"
    assert told["decisions"][0]["test"]["primary"]["look"]["low"] > 0.5
    assert Path(told["model"]).name == "model"
    serving = read_serving(tmp_path / "run/serving.json")
    assert (serving.current.name, serving.candidate) == ("turn-01", None)
    page = (tmp_path / "run/wheel.html").read_text()
    for said in ("promoted", "90 judgements by 10 people", "human/accuracy", "share won", "pairs.jsonl"):
        assert said in page
    assert "\u2013 to \u2013" not in page  # of what has no interval
    # what the test was about teaches the next turn
    more = turn({**values, "turns": 2})
    assert "turn 2 is tested" in more["state"] or more["decisions"][-1]["turn"] == 2
    assert len(rows_of(tmp_path / "run/round-02/collected.jsonl")) == 210


def test_a_bad_model_is_refused_by_the_gates(tmp_path, mini_model):
    """Prompts to learn from are judged the wrong way round: the candidate learns the opposite of those held out."""
    rows = choices(120, seed=3)
    flip = {"first": "second", "second": "first"}
    bad = [r if is_held_out(judgement(Row(r, "f", 1)), 0.3) else {**r, "choice": flip[r["choice"]]} for r in rows]
    append(tmp_path / "inbox", "day", bad)
    told = turn(settings(tmp_path, mini_model), resume=False)
    assert told["state"] == "done"
    assert told["decisions"][0]["decision"] == "refused"
    assert told["decisions"][0]["reason"].startswith("human/accuracy")
    assert told["serving"] == "turn-00"
    assert read_serving(tmp_path / "run/serving.json").candidate is None
    assert "refused: " in (tmp_path / "run/wheel.html").read_text()


def test_people_who_prefer_the_old_model_roll_it_back(tmp_path, mini_model):
    values = settings(tmp_path, mini_model)
    append(tmp_path / "inbox", "day", choices(80, seed=4))
    assert "is tested" in turn(values, resume=False)["state"]
    append(tmp_path / "inbox", "day", ab_rows(200, 0.2, "turn-00", "turn-01"))
    told = turn(values)
    assert told["decisions"][0]["decision"] == "rolled back"
    assert told["serving"] == "turn-00"


def test_thumbs_of_two_arms_decide(tmp_path, mini_model):
    """Each user meets the model that the serving file says, and gives a thumb."""
    values = settings(tmp_path, mini_model, experiment={"share": 0.5, "metric": "thumb"})
    values["model"]["lora"] = {"r": 2}
    early = [
        {
            "id": f"e{i}",
            "user": f"u{i}",
            "time": 1,
            "prompt": f"ask {'abcdefgh'[i % 8]}",
            "completion": "a",
            "model": "turn-00",
            "label": 1,
        }
        for i in range(30)
    ]  # thumbs from before the test belong to no arm of it
    append(tmp_path / "inbox", "day", [*choices(80, seed=4), *early])
    assert "is tested" in turn(values, resume=False)["state"]
    serving = read_serving(tmp_path / "run/serving.json")
    rows = []
    for i in range(1500):
        name = serving.arm(f"u{i}").name
        row = {"id": f"t{i}", "user": f"u{i}", "time": 10**7 + i, "prompt": "hm,", "completion": "a", "model": name}
        rows.append(row | {"label": i % 10 < (8 if name == "turn-01" else 5)})
    append(tmp_path / "inbox", "day", rows)
    told = turn(values)["decisions"][0]
    assert told["decision"] == "promoted"
    assert told["test"]["primary"]["look"]["low"] > 0
    assert told["test"]["warnings"] == []
    assert told["test"]["primary"]["look"]["n"] == 1500


@pytest.mark.parametrize("then", [["sft", "kto"], ["ppo"]])
def test_every_stage_trains(tmp_path, mini_model, then):
    thumbs = [
        {"id": f"t{i}", "user": f"r{i % 5}", "time": i, "prompt": f"ask {'abcdefgh'[i % 8]}",
         "completion": "aa" if i % 2 else "ee", "label": bool(i % 2), "correction": "" if i % 2 else "ab"}
        for i in range(40)
    ]  # fmt: skip
    append(tmp_path / "inbox", "day", [*choices(60, seed=5), *thumbs])
    stages = {
        "ppo": {"iterations": 1, "prompts": 2, "samples": 2, "reward_train": {"epochs": 1, "batch_size": 8}},
        "kto": {"train": {"batch_size": 8, "epochs": 1}}, "sft": {"train": {"batch_size": 8, "epochs": 1}},
    }  # fmt: skip
    extra = {"then": then, "experiment": None, "gates": {"length": {"at_most": 99}}, "dpo": {}}
    told = turn(settings(tmp_path, mini_model, **extra, **{name: stages[name] for name in then}), resume=False)
    assert told["decisions"][0]["decision"] == "promoted"
    assert (Path(told["model"]) / "model.safetensors").exists()


def test_a_judge_is_shown_with_how_far_it_agrees_with_people(tmp_path, mini_model):
    (tmp_path / "rewards.py").write_text(
        "def count_a(prompts, completions):\n    return [float(c.count('a') - c.count('e')) for c in completions]\n"
    )
    append(tmp_path / "inbox", "day", choices(400, seed=6))
    extra = {
        "experiment": None, "judge": {"reward": {"a": {"function": f"{tmp_path / 'rewards.py'}:count_a"}}},
        "gates": {"judge/agreement": {"at_least": 0.9, "sure": True}},
    }  # fmt: skip
    values = settings(tmp_path, mini_model, **extra)
    values["judgements"]["held_out"] = 0.4
    told = turn(values, resume=False)
    agreed = rows_of(tmp_path / "run/round-01/agreement.jsonl")[0]
    assert agreed["accuracy"]["value"] == 1.0
    assert agreed["items"] >= 50
    assert told["decisions"][0]["decision"] == "promoted"
    assert "The judge agrees with people on 1.000" in (tmp_path / "run/wheel.html").read_text()
    few = settings(tmp_path, mini_model, "few", **extra)
    few["judgements"] |= {"folder": str(append(tmp_path / "few-inbox", "day", choices(60, seed=6)))}
    assert turn(few, resume=False)["decisions"][0]["decision"] == "refused"
    agreed = rows_of(tmp_path / "few/round-01/agreement.jsonl")[0]
    assert agreed["accuracy"] is None
    assert "The judge is not checked against people" in (tmp_path / "few/wheel.html").read_text()


def test_a_kill_at_any_table_changes_nothing(tmp_path, mini_model, monkeypatch):
    """The run is stopped right before each of its tables in turn, and resumed; it leaves what a whole one does."""
    rows = [*choices(80, seed=7), *ab_rows(150, 0.8, "turn-00", "turn-01")]
    append(tmp_path / "inbox", "day", choices(80, seed=7))
    whole = settings(tmp_path, mini_model, "whole")
    turn(whole, resume=False)
    append(tmp_path / "inbox", "day", rows[80:])
    turn(whole)
    (tmp_path / "inbox/day.jsonl").unlink()
    append(tmp_path / "inbox", "day", choices(80, seed=7))
    killed, made, original = settings(tmp_path, mini_model, "killed"), set(), Ledger.table

    def table(self, name, make, **about):
        if name not in made:
            made.add(name)
            raise StoppedError
        return original(self, name, make, **about)

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "table", table)
        for attempt in range(40):
            told = turn(killed, resume=attempt > 0)
            if told["finished"] and "is tested" in told["state"]:
                append(tmp_path / "inbox", "day", rows[80:])
            if told["finished"] and told["state"] == "done":
                break
    assert len(made) > 10
    tables = sorted(p.name for p in (tmp_path / "whole/round-01").glob("*.jsonl"))
    assert "decision.jsonl" in tables
    for name in tables:
        left, right = ((tmp_path / run / "round-01" / name).read_text() for run in ("whole", "killed"))
        assert left.replace("/whole/", "/killed/") == right, name


@pytest.mark.slow
@pytest.mark.parametrize("cut", ["collected", "decision"])
def test_a_kill_between_a_table_and_its_provenance_changes_nothing(tmp_path, mini_model, cut):
    append(tmp_path / "inbox", "day", choices(80, seed=7))
    values = settings(tmp_path, mini_model, experiment=None)
    decided = turn(values, resume=False)["decisions"]
    folder = tmp_path / "run/round-01"
    (folder / f"{cut}.provenance.json").unlink()
    (folder / "round.json").unlink()
    before = (folder / f"{cut}.jsonl").read_text()
    assert turn(values)["decisions"] == decided
    assert (folder / f"{cut}.jsonl").read_text() == before


def test_sigkill_at_any_moment(tmp_path, mini_model):
    """The process is killed after ever longer times and started again; it ends as one that was left in peace."""
    for run_name in ("whole", "killed"):
        folder = tmp_path / run_name
        folder.mkdir()
        append(folder / "inbox", "day", choices(80, seed=7))
        (folder / "recipe.yaml").write_text(yaml.safe_dump(settings(folder, mini_model, experiment=None)))
        words, out = ["wheel", str(folder / "recipe.yaml"), "--resume"], folder / "out.txt"
        if run_name == "whole":
            steersman("--help", out=out).wait()  # the server imports
            started = time.monotonic()
            assert steersman(*words, out=out).wait() == 0, out.read_text()
            took = time.monotonic() - started
            continue
        kills = 0
        for i in range(60):
            process = steersman(*words, out=out)
            try:
                assert process.wait(took * (0.2 + 0.08 * i)) == 0, out.read_text()
                break
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                kills += 1
        assert kills >= 2
    for name in ("pairs", "kept", "readings", "answers-candidate", "evaluation", "gates", "decision"):
        left, right = ((tmp_path / run / "run/round-01" / f"{name}.jsonl").read_text() for run in ("whole", "killed"))
        assert left.replace("/whole/", "/killed/") == right, name
    assert not list((tmp_path / "killed/run").rglob(".tmp-*.jsonl"))


def test_it_polls_and_mixes_in_files_of_ones_own(tmp_path, mini_model):
    anchor = [{"prompt": f"own {'abcdef'[i % 6]}", "chosen": "a" * (1 + i), "rejected": "e"} for i in range(40)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in anchor))
    append(tmp_path / "inbox", "day", choices(20, seed=1))
    mix = {"new": 0.8, "earlier": 0.0, "anchor": 0.2, "anchors": {"pairs": str(tmp_path / "own.jsonl")}}
    values = settings(tmp_path, mini_model, experiment=None, poll=0.1, mix=mix)
    late = threading.Timer(0.7, append, (tmp_path / "inbox", "late", choices(60, seed=2)))
    late.start()
    told = turn(values, resume=False)
    late.join()
    assert told["state"] == "done"
    sources = [row["source"] for row in rows_of(tmp_path / "run/round-01/pairs.jsonl")]
    assert sources.count("anchor") == round(sources.count("new") / 4)


class Interrupted:
    """A store in PostgreSQL that lets nobody in at the second look, and has what people said from the third on."""

    def __init__(self, address: str, rows: list) -> None:
        self.address, self.rows, self.looks = address, rows, 0

    def __iter__(self):
        import psycopg

        self.looks += 1
        server, _, name = self.address.rpartition("/")
        with psycopg.connect(f"{server}/postgres", autocommit=True) as connection:
            connection.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS {self.looks != 2}")
        yield from open_judgements(self.address)
        if self.looks > 2:
            yield from self.rows


@pytest.mark.parametrize("address", ["postgresql"], indirect=True)
def test_a_wheel_that_polls_waits_for_a_store_that_is_away(tmp_path, mini_model, address, capsys):
    open_store(address).close()
    rows = [judgement(Row(row, "day", i)) for i, row in enumerate(choices(80, seed=2))]
    values = settings(tmp_path, mini_model, experiment=None, poll=0.05)
    told = run(WheelRecipe.model_validate(values), source=Interrupted(address, rows))
    assert told["state"] == "done"
    out = " ".join(capsys.readouterr().out.split())
    assert "it can not be opened" in out
    assert "it is asked again in 0.05 seconds" in out
    away = Interrupted(address, rows)
    away.looks = 1
    other = settings(tmp_path, mini_model, "other", experiment=None, poll=0.05)
    with pytest.raises(StoreAwayError, match="it can not be opened"):  # at its beginning: the address may be wrong
        run(WheelRecipe.model_validate(other), source=away)


def test_refusals(tmp_path, mini_model):
    values = settings(tmp_path, mini_model)
    with pytest.raises(SteersmanError, match="inbox: no such file or folder"):
        turn(values, resume=False)
    with pytest.raises(ValueError, match="needs a judge"):
        WheelRecipe.model_validate({**values, "gates": {"judge/win_rate": {"at_least": 0.5}}})
    with pytest.raises(ValueError, match="no file for every table"):
        WheelRecipe.model_validate({**values, "mix": {"anchor": 0.1}})
    same = [{**row, "prompt": "two"} for row in choices(80, seed=8)]
    append(tmp_path / "inbox", "day", same)
    told = turn({**values, "run": {**values["run"], "dir": str(tmp_path / "other")}}, resume=False)
    assert told["state"].startswith("turn 1 begins once a prompt is held out")


def test_a_stage_that_would_be_refused_is_refused_before_the_first_judgement(tmp_path, mini_model):
    values = settings(tmp_path, mini_model)
    for more, told in (
        ({"then": ["kto"], "kto": {"train": {"batch_size": 1}}}, r"stage kto: .*kto\.train\.batch_size"),
        ({"then": ["ppo"], "ppo": {"iterations": 1, "critic": {"warmup": 1}}}, r"stage ppo: .*ppo\.critic\.warmup"),
        ({"then": ["dpo"], "dpo": {"train": {"keep": "best"}}, "run": {**values["run"], "keep_best": 0}},
         r"stage dpo: .*dpo\.train\.keep"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=told):
            WheelRecipe.model_validate({**values, "dpo": {}, **more})


def test_serving_is_read_back(tmp_path, mini_model):
    append(tmp_path / "inbox", "day", choices(80, seed=4))
    turn(settings(tmp_path, mini_model), resume=False)
    told = json.loads((tmp_path / "run/serving.json").read_text())
    assert set(told) == {"turn", "current", "candidate", "salt"}
