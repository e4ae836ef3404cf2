"""A run that was killed and resumed ends with the same weights, bit for bit, as one that was not (invariant 6)."""

from __future__ import annotations

import json
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from forked import Python, steersman
from letter_models import write_jsonl
from train_kit import cut_after, merge, plain, recipe, rows, weights

from steersman import cli
from steersman.algorithms import ALGORITHMS
from steersman.types import SteersmanError
from steersman.verbs import reward_model, rl, sft

SLOW_REWARD = """
import time

def count_a(prompts, completions):
    time.sleep(0.04)
    return [c.count("a") / 4 for c in completions]
"""
WORDS = ["yes it is.", "no", "a cat, a dog, and two", "ok", "look there", "e", "so she said", "hm", "what?", "go on"]


FULL = {
    "optimizer.schedule": "cosine", "optimizer.warmup": 2, "reward.normalise": True, "rollout.top_p": 0.95,
    "iterations": 5, "run.save_every": 2, "run.eval_every": 3, "run.keep_last": 2,
}  # fmt: skip
OWN = {
    "ppo": {"critic.warmup": 1, "algorithm.kl_target": 0.01, "algorithm.kl_horizon": 50},
    "nlpo": {"algorithm.mask_every": 2, "algorithm.kl_target": 0.01, "algorithm.kl_horizon": 50},
    "a2c": {"critic.init": "shared"},
    "rloo": {"model.lora": {"r": 2}, "optimizer.lr": 0.05},
    "gdpo": {"reward.normalise": False},
    "a2po": {"reward.normalise": False},
    "trpo": {"rollout.top_p": 1.0, "algorithm.cg_steps": 3},
}


QUICK = {"ppo", "nlpo", "dapo", "reinforce"}  # critic and controllers; mask copy; waiting prompts; moving baseline


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ALGORITHMS]
)
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(name, base, tmp_path, monkeypatch):
    asked = merge(base, FULL | OWN.get(name, {}))
    rl.run(recipe(name, asked))
    again = merge(asked, {"run.dir": str(tmp_path / "cut")})
    with monkeypatch.context() as patch:
        from steersman.reward import core

        stop = cut_after({"remax": 11, "dapo": 7}.get(name, 5))
        patch.setattr(core, "load_function", lambda _: stop)
        with pytest.raises(KeyboardInterrupt):
            rl.run(recipe(name, again))
    assert max(row["step"] for row in rows(tmp_path / "cut")) in (2, 3, 4)
    rl.run(recipe(name, again), resume=True)
    compare(tmp_path / "run", tmp_path / "cut")


def compare(whole: Path, cut: Path) -> None:
    assert [row["step"] for row in rows(cut)] == [row["step"] for row in rows(whole)]
    for a, b in zip(rows(whole), rows(cut), strict=True):
        assert plain(a) == plain(b)
    a, b = weights(whole / "model"), weights(cut / "model")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert {p.name for p in (whole / "checkpoints").iterdir()} == {p.name for p in (cut / "checkpoints").iterdir()}
    one, two = (json.loads((f / "summary.json").read_text()) for f in (whole, cut))
    differ = {"seconds", "run", "model"}
    assert {k: v for k, v in one.items() if k not in differ} == {k: v for k, v in two.items() if k not in differ}
    if (whole / "samples.jsonl").exists():
        assert (whole / "samples.jsonl").read_text() == (cut / "samples.jsonl").read_text()


def test_a_run_resumed_after_its_last_step_still_knows_how_it_ended(base, tmp_path):
    first = rl.run(recipe("rloo", base))
    (tmp_path / "run" / "summary.json").unlink()
    again = rl.run(recipe("rloo", base), resume=True)
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in first.items() if k != "seconds"}


def offline_settings(verb: str, tmp_path: Path, mini: Path, folder: str) -> dict:
    """Short runs of the verbs that look at held-out rows and held prompts."""
    asked = (
        sft_settings(tmp_path, mini, folder) if verb in ("sft", "kto") else reward_settings(tmp_path, mini, folder)
    )
    asked["train"] |= {"epochs": 1, "keep": "last"}
    if verb == "kto":
        thumbs = [
            {"prompt": f"ask{'?' * (i % 4)}", "completion": WORDS[i % 10], "label": i % 2 == 0} for i in range(30)
        ]
        asked["data"]["path"] = str(write_jsonl(tmp_path / "thumbs.jsonl", thumbs))
    if verb in ("dpo", "kto"):
        asked["samples"] = {"prompts": 3, "max_new_tokens": 4}
    return asked


@pytest.mark.parametrize("verb", ["sft", "reward", "dpo", "kto"])
def test_resumed_after_the_last_step_nothing_is_written_again(verb, tmp_path, mini):
    """The last step was saved, the process died before the model was: the answers of that step are there already."""
    run = tmp_path / "run"
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(offline_settings(verb, tmp_path, mini, "run")))
    assert cli.main([verb, str(file)]) == 0
    kept = {name: (run / name).read_text() for name in ("metrics.jsonl", "samples.jsonl") if (run / name).exists()}
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").unlink()
    assert cli.main([verb, "--resume", "--run.dir", str(run)]) == 0
    assert {name: (run / name).read_text() for name in kept} == kept
    again = json.loads((run / "summary.json").read_text())
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in summary.items() if k != "seconds"}


def test_resume_and_the_folder_are_enough(base, tmp_path):
    """What a stopped run says to type goes on by the folder's own recipe; settings beside it win as ever."""
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(merge(base, {"iterations": 2})))
    assert cli.main(["rloo", str(file)]) == 0
    file.unlink()
    assert cli.main(["rloo", "--resume", f"--run.dir={tmp_path / 'run'}", "--iterations", "3"]) == 0
    assert [row["step"] for row in rows(tmp_path / "run")] == [0, 1, 2, 3]


@pytest.mark.parametrize("what", ["data.path", "model.path"])
def test_data_or_a_start_that_changed_is_refused_by_name(what, tmp_path, mini, capsys):
    asked = sft_settings(tmp_path, mini, "run")
    own = tmp_path / "own"
    shutil.copytree(mini, own)
    asked["model"]["path"], asked["train"]["epochs"] = str(own), 1
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(asked))
    assert cli.main(["sft", str(file)]) == 0
    before = (tmp_path / "run" / "config.yaml").read_text()
    changed = Path(asked["data"]["path"]) if what == "data.path" else own / "model.safetensors"
    raw = bytearray(changed.read_bytes())
    raw[-5] ^= 1
    changed.write_bytes(raw)
    assert cli.main(["sft", str(file), "--resume"]) == 2
    said = capsys.readouterr().err
    assert f"has changed since it began ({what}: " in said
    assert (tmp_path / "run" / "config.yaml").read_text() == before
    raw[-5] ^= 1
    changed.write_bytes(raw)
    assert cli.main(["sft", str(file), "--resume"]) == 0


def test_a_checkpoint_of_another_shape_is_named(base, tmp_path):
    rl.run(recipe("rloo", merge(base, {"iterations": 2, "model.lora": {"r": 2}})))
    with pytest.raises(SteersmanError, match=r"does not fit this run .*model\.lora\.r: 2 -> 3"):
        rl.run(recipe("rloo", merge(base, {"iterations": 3, "model.lora": {"r": 3}})), resume=True)


def test_a_step_asks_for_no_row_of_the_log(base, tmp_path, monkeypatch):
    """Whether a step was the best is known without reading metrics.jsonl again: the work per step stays the same."""
    from steersman.run.files import log
    from steersman.train import session

    read = []
    for module in (log, session):
        monkeypatch.setattr(module, "read_jsonl", lambda path, real=log.read_jsonl: read.append(path) or real(path))
    rl.run(recipe("rloo", merge(base, {"iterations": 2, "run.eval_every": 1})))
    few = len(read)
    rl.run(recipe("rloo", merge(base, {"iterations": 9, "run.eval_every": 1, "run.dir": str(tmp_path / "long")})))
    assert len(read) == 2 * few


def test_a_checkpoint_cut_in_half_is_passed_over(base, tmp_path, capsys):
    asked = merge(base, {"iterations": 4})
    rl.run(recipe("ppo", asked))
    whole = weights(tmp_path / "run" / "model")
    newest = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))[-1]
    state = newest / "state.pt"
    state.write_bytes(state.read_bytes()[: state.stat().st_size // 2])
    rl.run(recipe("ppo", asked), resume=True)
    assert "is damaged (state.pt has" in " ".join(capsys.readouterr().out.split())
    assert [row["step"] for row in rows(tmp_path / "run")] == [0, 1, 2, 3, 4]
    again = weights(tmp_path / "run" / "model")
    assert all(torch.equal(whole[k], again[k]) for k in whole)


def test_the_best_checkpoint_is_one_that_was_measured(tmp_path, mini):
    """Saving at steps without a look at the held-out data must not lend them an older number."""
    asked = sft_settings(tmp_path, mini, "run", keep="best")
    asked["run"] |= {"save_every": 1, "eval_every": 4, "keep_last": 20}
    sft.run(sft.SFTRecipe.model_validate(asked))
    measured = {row["step"] for row in rows(tmp_path / "run") if "held_out/loss" in row}
    for path in (tmp_path / "run" / "checkpoints").glob("step-*"):
        manifest = json.loads((path / "manifest.json").read_text())
        assert ("held_out/loss" in manifest["metrics"]) == (manifest["step"] in measured)


# --- processes that are really killed -----------------------------------------------------------------------------


def sft_settings(tmp_path, mini, folder: str, keep: str = "last") -> dict:
    data = [{"prompt": "ask" + "?" * (i % 4), "completion": WORDS[i % 10] + " " * (i // 10)} for i in range(30)]
    return {
        "model": {"path": str(mini)},
        "data": {"path": str(write_jsonl(tmp_path / "sft.jsonl", data)), "held_out": 6},
        "train": {"batch_size": 4, "epochs": 6, "keep": keep},
        "optimizer": {"lr": 0.01, "schedule": "linear", "warmup": 3},
        "run": {"dir": str(tmp_path / folder), "threads": 1, "save_every": 2, "eval_every": 4, "micro_tokens": 40},
    }


def reward_settings(tmp_path, mini, folder: str) -> dict:
    pairs = [
        {
            "prompt": "which" + "?" * (i % 4),
            "chosen": WORDS[i % 10] + " a" * (i // 10),
            "rejected": WORDS[(i + 3) % 10],
        }
        for i in range(30)
    ]
    asked = sft_settings(tmp_path, mini, folder, "best")
    asked["data"]["path"] = str(write_jsonl(tmp_path / "pairs.jsonl", pairs))
    return asked


def nlpo_settings(base, tmp_path, folder: str) -> dict:
    (tmp_path / "rewards.py").write_text(SLOW_REWARD)
    own = {"iterations": 14, "run.dir": str(tmp_path / folder), "run.save_every": 1, "critic.init": "policy"}
    return merge(base, FULL | OWN["nlpo"] | own)


def start(verb: str, settings: dict, tmp_path: Path, *flags: str) -> Python:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    return steersman(verb, str(path), *flags, out=tmp_path / "out.txt")


def lines(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


def wait_for(process: Python, path: Path, count: int) -> None:
    """Until the file has so many lines, or the process has ended."""
    end = time.monotonic() + 120
    while process.poll() is None and lines(path) < count:
        assert time.monotonic() < end, "no progress"
        time.sleep(0.002)


def kill_and_resume(verb: str, settings: dict, tmp_path: Path, seed: int, kills: int = 1) -> int:
    """Kills the run by SIGKILL at random moments, resumes until it is done; returns how often it died."""
    r, died, metrics = random.Random(seed), 0, Path(settings["run"]["dir"]) / "metrics.jsonl"
    while True:
        process = start(verb, settings, tmp_path, *(["--resume"] if died else []))
        if died < kills:
            wait_for(process, metrics, lines(metrics) + r.randint(2, 5))
            time.sleep(r.random() * 0.08)
            process.kill()
        code = process.wait(120)
        if code == 0:
            return died
        assert code == -signal.SIGKILL, (tmp_path / "out.txt").read_text()[-3000:]
        died += 1


@pytest.mark.slow
def test_sigkill_sft(tmp_path, mini):
    sft.run(sft.SFTRecipe.model_validate(sft_settings(tmp_path, mini, "whole", "best")))
    assert kill_and_resume("sft", sft_settings(tmp_path, mini, "cut", "best"), tmp_path, seed=1) == 1
    compare(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.slow
def test_sigkill_reward_model(tmp_path, mini):
    reward_model.run(reward_model.RewardModelRecipe.model_validate(reward_settings(tmp_path, mini, "whole")))
    assert kill_and_resume("reward", reward_settings(tmp_path, mini, "cut"), tmp_path, seed=2) == 1
    compare(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.slow
def test_sigkill_on_policy(base, tmp_path):
    """Critic, adaptive KL, running normalisation, the masking copy and their optimisers all come back."""
    rl.run(recipe("nlpo", nlpo_settings(base, tmp_path, "whole")))
    betas = {row["beta"] for row in rows(tmp_path / "whole")[1:]}
    assert len(betas) > 5
    assert kill_and_resume("nlpo", nlpo_settings(base, tmp_path, "cut"), tmp_path, seed=3, kills=2) == 2
    compare(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_finishes_the_step_saves_and_says_so(name, base, tmp_path, capfd):
    """In this process: the signal comes from within the third iteration's reward."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it would be ignored, as it should
    asked = merge(base, FULL | OWN["nlpo"] | {"run.save_every": 100, "run.eval_every": 100})
    path = tmp_path / "recipe.yaml"
    rl.run(recipe("nlpo", asked))
    (tmp_path / "rewards.py").write_text(
        "import os, signal\nleft = [4]\n\n"
        "def count_a(prompts, completions):\n"
        "    left[0] -= 1\n"
        "    if left[0] == 0:\n"
        f"        os.kill(os.getpid(), signal.{name})\n"
        "    return [c.count('a') / 4 for c in completions]\n"
    )
    path.write_text(yaml.safe_dump(merge(asked, {"run.dir": str(tmp_path / "cut")})))
    sys.modules.pop("rewards", None)
    assert cli.main(["nlpo", str(path)]) == 130
    signal.signal(signal.SIGHUP, before)
    said = "".join(capfd.readouterr())
    assert name in said
    assert "--resume" in said
    assert [row["step"] for row in rows(tmp_path / "cut")] == [0, 1, 2, 3]
    summary = json.loads((tmp_path / "cut" / "summary.json").read_text())
    assert (summary["finished"], summary["steps"]) == (False, 3)
    assert [p.name for p in (tmp_path / "cut" / "checkpoints").iterdir()] == ["step-00000003"]
    assert not (tmp_path / "cut" / "model").exists()
    assert cli.main(["nlpo", str(path), "--resume"]) == 0
    a, b = weights(tmp_path / "run" / "model"), weights(tmp_path / "cut" / "model")
    assert all(torch.equal(a[k], b[k]) for k in a)
