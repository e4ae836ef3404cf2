"""Rewards that do harm, through the command line: the run says so, fails, and leaves its files."""

from __future__ import annotations

import pytest
import yaml
from train_kit import merge, settings

from steersman import cli

ODD = """
import asyncio, os, random, signal, sys, threading, time, torch, warnings

CALLS = []

def later(act, completions):
    CALLS.append(1)
    if len(CALLS) > 2:
        act()
    return [float(len(c)) for c in completions]

def exits(prompts, completions):
    return later(lambda: sys.exit(0), completions)

def leaves(prompts, completions):
    return later(lambda: os._exit(0), completions)

def hangs(prompts, completions):
    return later(lambda: time.sleep(1000), completions)

def closes(prompts, completions):
    return later(lambda: os.close(1), completions)

def moves(prompts, completions):
    return later(lambda: os.chdir("/"), completions)

def stops_gradients(prompts, completions):
    return later(lambda: torch.set_grad_enabled(False), completions)

def widens(prompts, completions):
    return later(lambda: torch.set_default_dtype(torch.float64), completions)

def raising(error):
    raise error

def quits(prompts, completions):
    return later(lambda: raising(GeneratorExit), completions)

def interrupts(prompts, completions):
    return later(lambda: raising(KeyboardInterrupt), completions)

def plain(prompts, completions):
    return [float(len(c)) for c in completions]

async def waits(prompts, completions):
    await asyncio.sleep(0.001)
    return plain(prompts, completions)

async def waits_too_long(prompts, completions):
    await asyncio.sleep(1000 if len(CALLS) > 1 else 0)
    return later(lambda: None, completions)

async def leaves_late(prompts, completions):
    await asyncio.sleep(0.001)
    return later(lambda: sys.exit(0), completions)

def empties(prompts, completions):
    values = plain(prompts, completions)
    prompts.clear(), completions.clear()
    return values

def shouts(prompts, completions):
    for _ in range(500):
        print("[red]spam[/] \x1b[31m" * 5)
    return plain(prompts, completions)

def warns(prompts, completions):
    warnings.warn("odd")
    return plain(prompts, completions)

def seeds(prompts, completions):
    torch.manual_seed(time.time_ns() % 2**31)
    random.seed()
    return plain(prompts, completions)

def deafens(prompts, completions):
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    return plain(prompts, completions)

def differentiable(prompts, completions):
    return torch.tensor(plain(prompts, completions), requires_grad=True)

class Locked:
    def __init__(self):
        self.lock = threading.Lock()

    def __call__(self, prompts, completions):
        return plain(prompts, completions)

unpicklable = Locked()
nameless = lambda prompts, completions: plain(prompts, completions)

def generated(prompts, completions):
    return (float(len(c)) for c in completions)

def keyed(prompts, completions):
    return {c: 1.0 for c in completions}

def imaginary(prompts, completions):
    return [1 + 2j] * len(completions)

def large(prompts, completions):
    return [10**40] * len(completions)

def largest(prompts, completions):
    return [10**400] * len(completions)

def infinite(prompts, completions):
    return [-float("inf")] * len(completions)

def wild(prompts, completions):
    return [3e38 * (-1) ** i for i in range(len(completions))]
"""


def run(function, base, tmp_path, more=None, **part):
    (tmp_path / "odd.py").write_text(ODD)
    parts = {"score": {"function": f"{tmp_path / 'odd.py'}:{function}", **part}}
    changed = merge(base, {"reward.parts": parts, "iterations": 4, "run.eval_every": 100, "run.save_every": 1})
    changed = merge(changed, more or {})
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(changed))
    return cli.main(["rloo", str(recipe)])


@pytest.mark.parametrize(
    ("function", "told"),
    [
        ("exits", "it asked the process to end, by sys.exit(0)"),
        ("leaves", "it asked the process to end, by os._exit(0)"),
        ("hangs", "it took longer than its limit of 0.3 seconds"),
        ("quits", "it asked the process to end, by GeneratorExit"),
        ("interrupts", "it asked the process to end, by KeyboardInterrupt"),
        ("leaves_late", "it asked the process to end, by sys.exit(0)"),
        ("waits_too_long", "it took longer than its limit of 0.3 seconds"),
    ],
)
def test_a_reward_that_ends_or_holds_the_run(function, told, base, tmp_path, capsys):
    assert run(function, base, tmp_path, time_limit=0.3) == 2
    error = capsys.readouterr().err
    assert told in error
    assert all(word in error for word in ("reward 'score'", "first prompt:", "first completion:"))
    folder = tmp_path / "run"
    assert (folder / "metrics.jsonl").read_text().count("\n") >= 1, "what was done before stays"
    assert list((folder / "checkpoints").glob("step-*"))
    assert not (folder / "summary.json").exists()


@pytest.mark.parametrize("function", ["large", "largest", "infinite", "wild"])
def test_a_number_that_training_can_not_hold_is_named(function, base, tmp_path, capsys):
    assert run(function, base, tmp_path) == 2
    error = capsys.readouterr().err
    assert "reward 'score': gave " in error
    assert "for sample 0 (prompt: " in error
    assert "completion: " in error


def test_weights_that_make_a_sum_too_large_are_named(base, tmp_path, capsys):
    assert run("exits", base, tmp_path, weight=1e30) == 2
    error = capsys.readouterr().err
    assert "reward: the sum for sample " in error
    assert "1e+30 x " in error


def test_a_reward_that_closes_standard_output_does_not_end_the_run(base, tmp_path):
    assert run("closes", base, tmp_path) == 0
    assert (tmp_path / "run" / "summary.json").exists()


@pytest.mark.parametrize("function", ["moves", "stops_gradients", "widens"])
def test_settings_of_the_process_that_a_reward_changes_are_put_back(function, base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(function, base, tmp_path, {"run.dir": "its-own"}) == 0
    assert (tmp_path / "its-own/summary.json").exists()
    assert (tmp_path / "its-own/model/model.safetensors").exists()


HARMLESS = [
    "waits", "empties", "shouts", "warns", "seeds", "deafens", "differentiable", "unpicklable", "nameless",
]  # fmt: skip


@pytest.fixture(scope="module")
def plainly(tmp_path_factory, mini):
    folder = tmp_path_factory.mktemp("plain")
    assert run("plain", settings(folder, mini), folder, {"iterations": 2}) == 0
    return (folder / "run/model/model.safetensors").read_bytes()


@pytest.mark.parametrize("function", HARMLESS)
@pytest.mark.filterwarnings("ignore:odd")
def test_what_a_reward_does_beside_its_scores_changes_no_weight(function, base, tmp_path, plainly):
    assert run(function, base, tmp_path, {"iterations": 2}) == 0
    assert (tmp_path / "run/model/model.safetensors").read_bytes() == plainly


@pytest.mark.parametrize(
    ("function", "told"),
    [
        ("generated", "returned generator; return a list of one float per completion"),
        ("keyed", "returned dict; return a list of one float per completion"),
        ("imaginary", "gave complex '(1+2j)' for sample 0 (prompt: "),
    ],
)
def test_another_kind_of_answer_is_named(function, told, base, tmp_path, capsys):
    assert run(function, base, tmp_path) == 2
    assert f"reward 'score': {told}" in " ".join(capsys.readouterr().err.split())
