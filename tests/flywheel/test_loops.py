"""Each loop runs end to end, leaves its data with provenance, and goes on after any kill as if nothing had been."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from collections import Counter
from contextlib import nullcontext

import pytest
import yaml
from forked import steersman
from letter_models import rows_of, save_mini, write_jsonl
from wheel_kit import left, loop_settings

from steersman.config.load import load_recipe
from steersman.flywheel import arena, best_of_n, online_dpo, players
from steersman.model import LoraConfig, load_policy, save
from steersman.recipe.sections import ADAPTER_RATE
from steersman.run.files import ledger, pieces
from steersman.run.report.page import write_report
from steersman.train import offline
from steersman.types import SteersmanError

QUICK = {"train": {"batch_size": 4}, "optimizer": {"lr": 1e-2}}
PPO = {"iterations": 2, "prompts": 3, "samples": 2, "algorithm": {"epochs": 1, "minibatches": 2}}
LOOPS = {
    "best-of-n": (best_of_n.run, best_of_n.BestOfNRecipe, QUICK),
    "online-dpo": (online_dpo.run, online_dpo.OnlineDPORecipe, QUICK | {"history": "all"}),
    "arena": (arena.run, arena.ArenaRecipe, {"sft": QUICK, "dpo": QUICK, "ppo": PPO, "draws": 20}),
}


def turn(name, tmp_path, model, folder="run", *, resume=False, **extra):
    run, recipe, own = LOOPS[name]
    if name == "arena":
        own = own | {"opponents": {"other": str(model.parent / "other")}, "rounds": 1}
        if not (model.parent / "other").exists():
            save_mini(model.parent / "other", seed=1, context=128)
    settings = loop_settings(tmp_path, model, folder, **own)
    for key, value in extra.items():
        settings[key] = settings.get(key, {}) | value if isinstance(value, dict) else value
    return run(recipe.model_validate(settings), resume=resume)


class Cut:
    """Ends a run by KeyboardInterrupt at the n-th call of a function, before or after it did its work."""

    def __init__(self, monkeypatch, module, name, n, after):
        self.real, self.left, self.after = getattr(module, name), n, after
        monkeypatch.setattr(module, name, self)

    def __call__(self, *args, **kwargs):
        self.left -= 1
        if self.left == 0 and not self.after:
            raise KeyboardInterrupt
        out = self.real(*args, **kwargs)
        if self.left == 0:
            raise KeyboardInterrupt
        return out

    def __get__(self, instance, owner):
        return self if instance is None else lambda *a, **k: self(instance, *a, **k)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, mini_model):
    """What an unkilled run of each loop left."""
    out = {}

    def get(name):
        if name not in out:
            folder = tmp_path_factory.mktemp(name)
            turn(name, folder, mini_model)
            out[name] = left(folder / "run")
        return out[name]

    return get


CUTS = [
    *(("best-of-n", ledger, "write_atomic", n, n % 2 == 0) for n in (2, 5, 13)),
    *(pytest.param("best-of-n", ledger, "write_atomic", n, True, marks=pytest.mark.slow) for n in (1, 8, 18)),
    *(("best-of-n", pieces, "write_atomic", n, n % 2 == 1) for n in (2, 3)),
    ("best-of-n", offline.Offline, "step", 2, True),
    *(("online-dpo", ledger, "write_atomic", n, n % 2 == 1) for n in (6, 11)),
    ("online-dpo", offline.Offline, "step", 2, False),
    ("arena", ledger, "write_atomic", 22, False),
    pytest.param("arena", ledger, "write_atomic", 9, True, marks=pytest.mark.slow),
    pytest.param("arena", offline.Offline, "step", 3, True, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "module", "function", "n", "after"), CUTS)
def test_a_loop_cut_anywhere_goes_on_to_the_same_data_and_weights(
    name, module, function, n, after, whole, tmp_path, mini_model, monkeypatch
):
    expected = whole(name)
    with monkeypatch.context() as patch:
        Cut(patch, module, function, n, after)
        with pytest.raises(KeyboardInterrupt):
            turn(name, tmp_path, mini_model)
    assert turn(name, tmp_path, mini_model, resume=True)["finished"]
    got = left(tmp_path / "run")
    assert got.keys() == expected.keys()
    differ = [k for k in got if got[k] != expected[k] and not k.endswith("provenance.json")]
    assert differ == []
    for key in (k for k in got if k.endswith("provenance.json")):  # the reward's own file lies in another folder
        assert without_paths(got[key]) == without_paths(expected[key]), key


def without_paths(text):
    return {k: v for k, v in json.loads(text).items() if k != "judge"}


def test_a_killed_process_goes_on_too(whole, tmp_path, mini_model):
    """SIGKILL in the middle of a round's training, for real."""
    run, recipe, own = LOOPS["online-dpo"]
    settings = loop_settings(tmp_path, mini_model, "run", **own)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    process = steersman("online-dpo", str(tmp_path / "recipe.yaml"))
    mark, end = tmp_path / "run" / "round-01" / "dpo" / "config.yaml", time.monotonic() + 120
    while not mark.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert mark.exists()
    assert not (tmp_path / "run" / "round-02" / "round.json").exists()
    assert run(recipe.model_validate(settings), resume=True)["finished"]
    got, expected = left(tmp_path / "run"), whole("online-dpo")
    assert got.keys() == expected.keys()
    assert [k for k in got if got[k] != expected[k] and not k.endswith("provenance.json")] == []


def test_answers_that_are_kept_fit_those_of_a_larger_batch(whole, tmp_path, mini_model, monkeypatch):
    """As after a run that had too little memory: the pieces so far have another size than those to come."""
    with monkeypatch.context() as patch:
        Cut(patch, pieces, "write_atomic", 2, True)
        with pytest.raises(KeyboardInterrupt):
            turn("best-of-n", tmp_path, mini_model)
    assert len(list((tmp_path / "run/round-01/samples.parts").glob("0*.jsonl"))) == 1
    assert turn("best-of-n", tmp_path, mini_model, resume=True, rollout={"max_batch": 16})["finished"]
    got, expected = left(tmp_path / "run"), whole("best-of-n")
    assert got["round-01/samples.jsonl"] == expected["round-01/samples.jsonl"]
    assert got["round-01/samples.provenance.json"] == expected["round-01/samples.provenance.json"]


def test_answers_of_another_temperature_are_not_mixed_in(tmp_path, mini_model, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        Cut(patch, pieces, "write_atomic", 2, True)
        with pytest.raises(KeyboardInterrupt):
            turn("best-of-n", tmp_path, mini_model)
    hot = {"temperature": 3.0}
    assert turn("best-of-n", tmp_path, mini_model, resume=True, rollout=hot)["finished"]
    said = " ".join(capsys.readouterr().out.split())
    assert "round-01/samples is made anew, since the recipe changed: rollout.temperature: 1.0 -> 3.0" in said
    turn("best-of-n", tmp_path, mini_model, folder="hot", rollout=hot)
    assert rows_of(tmp_path / "run/round-01/samples.jsonl") == rows_of(tmp_path / "hot/round-01/samples.jsonl")


@pytest.mark.parametrize("file", ["graded.jsonl", "graded.provenance.json"])
def test_a_damaged_table_is_named(file, tmp_path, mini_model, monkeypatch):
    with monkeypatch.context() as patch:
        Cut(patch, offline.Offline, "step", 1, True)
        with pytest.raises(KeyboardInterrupt):
            turn("best-of-n", tmp_path, mini_model)
    damaged = tmp_path / "run/round-01" / file
    damaged.write_bytes(damaged.read_bytes()[:-40])
    with pytest.raises(SteersmanError, match=r"round-01/graded\.jsonl: it is not what the run wrote there"):
        turn("best-of-n", tmp_path, mini_model, resume=True)
    for name in ("graded.jsonl", "graded.provenance.json"):
        (tmp_path / "run/round-01" / name).unlink()
    assert turn("best-of-n", tmp_path, mini_model, resume=True)["finished"]


def test_a_signal_stops_between_steps_and_says_so(tmp_path, mini_model, monkeypatch, capsys):
    real = offline.Offline.step

    def step(self, rows):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(offline.Offline, "step", step)
        summary = turn("best-of-n", tmp_path, mini_model)
    assert summary["finished"] is False
    for done in (False, True):
        capsys.readouterr()
        assert turn("best-of-n", tmp_path, mini_model, resume=True)["finished"] is True
        told = capsys.readouterr().out
        assert ("resumed after round 0\n" in told) == (not done)
        assert ("resumed after round 2, the last one: the run was done\n" in told) == done


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_after_a_stage_s_last_step_stops_the_loop_too(number, tmp_path, mini_model, monkeypatch):
    """A stage saves its model and writes its report then, which takes longer than its steps where these are few."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it would be ignored, as it should
    with monkeypatch.context() as patch:
        patch.setattr("steersman.train.session.write_report", lambda folder: os.kill(os.getpid(), number))
        summary = turn("best-of-n", tmp_path, mini_model)
    signal.signal(signal.SIGHUP, before)
    assert summary["finished"] is False
    assert not (tmp_path / "run" / "round-02").exists()
    assert turn("best-of-n", tmp_path, mini_model, resume=True)["finished"] is True


def test_a_folder_that_holds_a_run_is_not_overwritten(tmp_path, mini_model):
    turn("best-of-n", tmp_path, mini_model)
    with pytest.raises(SteersmanError, match="holds another run"):
        turn("best-of-n", tmp_path, mini_model)


def test_the_data_says_where_it_came_from(tmp_path, mini_model):
    turn("best-of-n", tmp_path, mini_model)
    folder = tmp_path / "run" / "round-02"
    told = json.loads((folder / "samples.provenance.json").read_text())
    weights = (tmp_path / "run" / "round-01" / "sft" / "model" / "model.safetensors").read_bytes()
    assert told["model"] == {"path": "round-01/sft/model", "sha256": hashlib.sha256(weights).hexdigest()}
    assert told["sha256"] == hashlib.sha256((folder / "samples.jsonl").read_bytes()).hexdigest()
    graded = json.loads((folder / "graded.provenance.json").read_text())
    assert graded["made_from"] == {"round-02/samples": told["sha256"]}
    assert "count_a" in graded["judge"]["reward"]["a"]["function"]


def test_best_of_n_keeps_the_best_of_each_prompt_and_trains_on_them(tmp_path, mini_model):
    summary = turn("best-of-n", tmp_path, mini_model, rounds=1)
    graded = rows_of(tmp_path / "run/round-01/graded.jsonl")
    kept = rows_of(tmp_path / "run/round-01/kept.jsonl")
    assert len(kept) == len({r["index"] for r in graded}) == 4
    for row in kept:
        siblings = [r["grade"] for r in graded if r["index"] == row["index"]]
        assert row["grade"] == max(siblings) == row["completion"].count("a") - row["completion"].count("e")
    metrics = rows_of(tmp_path / "run/metrics.jsonl")
    assert [r["step"] for r in metrics] == [0, 1]
    assert metrics[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert summary["kl_after"] != 0
    page = write_report(tmp_path / "run").read_text()
    assert "reward/judge" in page or "Reward" in page


def test_a_loop_from_saved_adapters_trains_adapters_in_every_round(tmp_path, mini_model):
    """A round's model is saved whole; without new adapters the second would train all weights at their rate."""
    adapters = save(load_policy(mini_model, lora=LoraConfig(r=2)), None, tmp_path / "adapters", merged=False)
    settings = loop_settings(tmp_path, adapters, "run", train={"batch_size": 4})
    (tmp_path / "loop.yaml").write_text(yaml.safe_dump(settings))
    best_of_n.run(load_recipe(best_of_n.BestOfNRecipe, tmp_path / "loop.yaml"))
    stages = [yaml.safe_load(file.read_text()) for file in sorted((tmp_path / "run").glob("round-*/sft/config.yaml"))]
    assert [stage["model"]["path"] for stage in stages] == [
        str(adapters),
        str(tmp_path / "run/round-01/sft/model"),
    ]
    assert [(stage["model"]["lora"]["r"], stage["optimizer"]["lr"]) for stage in stages] == [(2, ADAPTER_RATE)] * 2


@pytest.mark.slow
def test_a_model_that_is_rewarded_for_a_letter_learns_it(tmp_path, mini_model):
    summary = turn(
        "online-dpo", tmp_path, mini_model, rounds=3, optimizer={"lr": 3e-2},
        rollout={"prompts": 9, "samples": 6, "max_batch": 64}, train={"epochs": 4, "batch_size": 3},
    )  # fmt: skip
    assert summary["reward/judge_after"] > summary["reward/judge_before"] + 0.5
    assert rows_of(tmp_path / "run/metrics.jsonl")[-1]["win_rate/start"] > 0.5


@pytest.mark.parametrize(
    ("rule", "count"), [({"rule": "top", "share": 0.5}, 2), ({"rule": "threshold", "threshold": 2.0}, 3)]
)
def test_other_rules_of_keeping(rule, count):
    rows = [{"index": i // 2, "grade": g} for i, g in enumerate([1.0, 3.0, 2.0, 2.0])]
    kept = best_of_n.keep(rows, best_of_n.KeepConfig(**rule))
    assert len(kept) == count
    assert kept[0]["grade"] == 3.0
    with pytest.raises(SteersmanError, match=r"threshold 9: no answer reaches it; grades go from 1 over 2"):
        best_of_n.keep(rows, best_of_n.KeepConfig(rule="threshold", threshold=9))


def graded(*grades, index=0):
    return [{"prompt": "p", "completion": f"c{g}", "index": index, "grade": float(g)} for g in grades]


def test_pairs_need_a_lead():
    config = online_dpo.PairsConfig(min_lead=1.0)
    pairs = list(online_dpo.pairs_of([*graded(2, 5, 3), *graded(4, 4, index=1), *graded(1, 2, index=2)], config))
    assert [(p["chosen"], p["rejected"], p["lead"]) for p in pairs] == [("c5", "c2", 3.0)]
    every = list(online_dpo.pairs_of(graded(2, 5, 3), online_dpo.PairsConfig(form="all")))
    assert {(p["chosen"], p["rejected"]) for p in every} == {("c5", "c2"), ("c5", "c3"), ("c3", "c2")}


@pytest.mark.parametrize("form", ["best_worst", "all"])
def test_pairs_by_comparison(form, tmp_path, mini_model):
    turn("online-dpo", tmp_path, mini_model, rounds=1, pairs={"by": "compare", "form": form})
    pairs = rows_of(tmp_path / "run/round-01/pairs.jsonl")
    worth = lambda t: t.count("a") - t.count("e")  # noqa: E731
    assert pairs
    assert all(worth(p["chosen"]) > worth(p["rejected"]) for p in pairs)
    if form == "best_worst":
        assert max(Counter(p["index"] for p in pairs).values()) == 1


def test_long_answers_pay_for_their_length():
    rows = [{**row, "tokens": 10 * n} for n, row in enumerate(graded(2, 5, 3))]
    pairs = list(online_dpo.pairs_of(rows, online_dpo.PairsConfig(length_penalty=0.5)))
    assert [(p["chosen"], p["rejected"]) for p in pairs] == [("c2", "c3")]
    assert pairs[0]["lead"] == 2.0 - (3.0 - 0.5 * 20)


def test_the_data_s_own_answers_are_chosen_and_must_be_there(tmp_path, mini_model):
    data = write_jsonl(tmp_path / "given.jsonl", [{"prompt": w, "completion": f"{w} a"} for w in "abcdefghi"])
    extra = {
        "data": {"path": str(data)},
        "rollout": {"prompts": 4, "samples": 1, "max_new_tokens": 10, "held_out": 3},
    }
    turn("online-dpo", tmp_path, mini_model, rounds=1, pairs={"by": "given"}, reference="last", **extra)
    pairs = rows_of(tmp_path / "run/round-01/pairs.jsonl")
    assert [p["chosen"] for p in pairs] == [f"{p['prompt']} a" for p in pairs]
    assert len(pairs) == 4
    with pytest.raises(SteersmanError, match="no text in column 'reply'"):
        turn("online-dpo", tmp_path, mini_model, folder="b", pairs={"by": "given", "column": "reply"}, **extra)


def test_a_refused_loop_leaves_no_folder(tmp_path, mini_model):
    data = write_jsonl(tmp_path / "given.jsonl", [{"letters": "a"}] * 9)
    with pytest.raises(SteersmanError, match="letters"):
        turn("online-dpo", tmp_path, mini_model, data={"path": str(data)})
    assert not (tmp_path / "run").exists(), "made for this run, which is none"


def test_the_reference_stays_or_moves(tmp_path, mini_model):
    seen = {}
    for reference in ("start", "last", "mixed"):
        turn("online-dpo", tmp_path, mini_model, folder=reference, reference=reference)
        config = yaml.safe_load((tmp_path / reference / "round-02/dpo/config.yaml").read_text())
        seen[reference] = config["reference"]
        assert config["anchor"] == (str(mini_model) if reference == "mixed" else None)
        assert config["model"]["path"].endswith("round-01/dpo/model")
    assert seen["start"] == str(mini_model)
    assert seen["last"].endswith("round-01/dpo/model")


def test_the_arena_makes_lessons_pairs_and_ratings(tmp_path, mini_model):
    summary = turn("arena", tmp_path, mini_model)
    folder = tmp_path / "run/round-01"
    battles = rows_of(folder / "1-sft/battles.jsonl")
    worth = lambda t: t.count("a") - t.count("e")  # noqa: E731
    for b in battles:
        lead = worth(b["mine"]) - worth(b["theirs"])
        assert b["share"] == (1.0 if lead > 0 else 0.0 if lead < 0 else 0.5)
    lost = {b["index"]: b["theirs"] for b in battles if b["share"] == 0}
    lessons = rows_of(folder / "1-sft/lessons.jsonl") if lost else []
    assert {r["index"]: r["completion"] for r in lessons} == lost
    for p in rows_of(folder / "2-dpo/pairs.jsonl"):
        assert worth(p["chosen"]) > worth(p["rejected"])
    metrics = rows_of(tmp_path / "run/metrics.jsonl")[-1]
    assert metrics["rating/low"] <= metrics["rating/model"] <= metrics["rating/high"]
    assert {r["player"] for r in summary["table"]} == {"round-00", "round-01", "other"}
    prompts = [{r["index"] for r in rows_of(folder / f"{s}/battles.jsonl")} for s in ("1-sft", "2-dpo")]
    assert not prompts[0] & prompts[1], "each stage battles on prompts of its own"


def test_recipes_that_can_not_go_round_are_refused(tmp_path, mini_model):
    with pytest.raises(SteersmanError, match=r"reward/judge|graded none|can be used \(.*unfinished"):
        turn("best-of-n", tmp_path, mini_model, unfinished="drop", rollout={"max_new_tokens": 1})
    settings = loop_settings(tmp_path, mini_model, "x", rollout={"samples": 1})
    with pytest.raises(ValueError, match="needs 2 answers"):
        online_dpo.OnlineDPORecipe.model_validate(settings)
    with pytest.raises(ValueError, match="held_out is 0"):
        best_of_n.BestOfNRecipe.model_validate(loop_settings(tmp_path, mini_model, "x", rollout={"held_out": 0}))
    with pytest.raises(ValueError, match="model's own"):
        arena.ArenaRecipe.model_validate(loop_settings(tmp_path, mini_model, "x", opponents={"model": "x"}))


def test_constant_judges_give_no_pairs_and_that_is_said(tmp_path, mini_model):
    with pytest.raises(SteersmanError, match=r"no pair from 12 answers .*sample more or warmer"):
        turn("online-dpo", tmp_path, mini_model, pairs={"min_lead": 1e6})


def test_conversations_as_prompts(tmp_path, mini_model):
    data = write_jsonl(
        tmp_path / "chats.jsonl", [{"prompt": [{"role": "user", "content": f"say {i}"}]} for i in "abcdefghi"]
    )
    turn("best-of-n", tmp_path, mini_model, rounds=1, data={"path": str(data)})
    kept = rows_of(tmp_path / "run/round-01/kept.jsonl")
    assert kept[0]["prompt"][0]["role"] == "user"


@pytest.mark.slow
@pytest.mark.parametrize("broken", [False, True])
def test_engines_elsewhere_end_with_the_run(broken, tmp_path, mini_model, monkeypatch):
    """Processes that a loop started to sample are gone when it is done, and when an error ends it."""
    opened = []
    real = players.open_generator
    monkeypatch.setattr(players, "open_generator", lambda *a: opened.append(real(*a)) or opened[-1])
    if broken:
        Cut(monkeypatch, players, "tokens_of", 1, after=False)
    extra = {"rollout": {"engine": "process", "timeout": 120}, "rounds": 1}
    with pytest.raises(KeyboardInterrupt) if broken else nullcontext():
        turn("best-of-n", tmp_path, mini_model, **extra)
    assert opened
    for generator in opened:
        assert not generator.stations[0].process.alive()
        assert not generator._folder.path.exists()
