"""SIGKILL while episodes are under way: the resumed run is the one that was not killed, or says why it may not be."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from forked import Python, steersman
from train_kit import merge, plain, recipe, rows, weights

from steersman.verbs import rl

SEEDED = '''
import random, time
from pathlib import Path

class Seeded:
    """Writes a line at every step, so that a test knows that episodes are under way."""

    def __init__(self, log, pause=0.0, seeded=True):
        self.log, self.pause, self.seeded = Path(log), pause, seeded

    def begin(self, row, seed=0):
        self.luck = random.Random(seed)
        self.left = 3
        return None if self.seeded else str(time.time_ns())

    def step(self, text):
        with self.log.open("a") as file:
            file.write("step\\n")
        time.sleep(self.pause)
        self.left -= 1
        return self.luck.choice(["more.", "go on,", "oh!"]), text.count("a") / 4, self.left == 0
'''


def seeded(base, tmp_path: Path, name: str, **args) -> dict:
    (tmp_path / "seeded.py").write_text(SEEDED)
    log = tmp_path / f"{name}.log"
    return merge(
        base,
        {
            "environment": {
                "path": f"{tmp_path / 'seeded.py'}:Seeded", "max_turns": 5, "overlap": True,
                "args": {"log": str(log), **args},
            },
            "rollout.max_batch": 3, "iterations": 5, "run.dir": str(tmp_path / name),
        },
    )  # fmt: skip


def count(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


def started(verb: str, values: dict, out: Path, *flags: str) -> Python:
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(values))
    return steersman(verb, str(path), *flags, out=out)


def killed_between_turns(verb: str, values: dict, out: Path, iteration: int, luck: int) -> None:
    """Kills the run once so many iterations are logged and some turns of the next one are answered."""
    process = started(verb, values, out)
    metrics, log = Path(values["run"]["dir"]) / "metrics.jsonl", Path(values["environment"]["args"]["log"])
    end = time.monotonic() + 120
    while count(metrics) < 1 + iteration and process.poll() is None:
        assert time.monotonic() < end, out.read_text()
        time.sleep(0.001)
    before, wanted = count(log), random.Random(luck).randint(2, 12)
    while count(log) < before + wanted and process.poll() is None:
        assert time.monotonic() < end, out.read_text()
        time.sleep(0.0005)
    process.kill()
    assert process.wait() == -signal.SIGKILL, out.read_text()
    assert count(metrics) < 1 + values["iterations"]


@pytest.mark.slow
@pytest.mark.parametrize(("verb", "luck"), [("ppo", 1), ("grpo", 2)])
def test_a_run_killed_between_turns_resumes_bit_for_bit(base, tmp_path, verb, luck):
    rl.run(recipe(verb, seeded(base, tmp_path, "whole")))
    cut = seeded(base, tmp_path, "cut", pause=0.02)
    killed_between_turns(verb, cut, tmp_path / "cut.txt", iteration=2, luck=luck)
    process = started(verb, cut, tmp_path / "cut.txt", "--resume")
    assert process.wait(300) == 0, (tmp_path / "cut.txt").read_text()[-3000:]
    a, b = (weights(tmp_path / name / "model") for name in ("whole", "cut"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert [plain(r) for r in rows(tmp_path / "whole")] == [plain(r) for r in rows(tmp_path / "cut")]


def test_a_run_says_that_its_environment_does_not_repeat(base, tmp_path, capsys):
    rl.run(recipe("grpo", seeded(base, tmp_path, "unseeded", seeded=False), iterations=1))
    assert "the same seed gives another episode: a resumed run will not be the same bit for bit" in " ".join(
        capsys.readouterr().out.split()
    )
