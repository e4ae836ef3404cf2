"""What a loop is done with leaves memory at once: by reference counting, with Python's collector switched off."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
from letter_models import WORDS, rows_of, save_mini, write_jsonl
from test_loops import LOOPS
from wheel_kit import loop_settings

from steersman.flywheel import best_of_n
from steersman.run.files.ledger import Ledger
from steersman.verbs import reward_model

COUNTING = '''
import gc, json
from collections import Counter
from pathlib import Path

KINDS = ("LlamaForCausalLM", "LlamaForSequenceClassification", "ScalarModel", "AdamW")

def live():
    """How many models and optimizers there are in this process."""
    names = Counter(type(thing).__name__ for thing in gc.get_objects())
    return {kind: names[kind] for kind in KINDS}

def count_a(prompts, completions):
    with Path(__file__).with_name("live.jsonl").open("a") as file:
        file.write(json.dumps(live()) + "\\n")
    return [float(c.count("a") - c.count("e")) for c in completions]
'''


@pytest.fixture
def uncollected():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def counted(name: str, folder: Path, model: Path, **extra: Any) -> list[dict[str, int]]:
    """Runs two rounds of a loop whose judge counts, each time that it is asked, what there is beside what the process
    had before."""
    run, recipe, own = LOOPS[name]
    if name == "arena":
        own = own | {"opponents": {"other": str(save_mini(folder / "other", seed=1, context=128))}}
        own |= {"stages": ["sft", "dpo"], "ppo": {}}
    settings = loop_settings(folder, model, "run", **(own | extra))
    (folder / "rewards.py").write_text(COUNTING)
    names: dict[str, Any] = {}
    exec(COUNTING.replace("__file__", "'nowhere'"), names)
    before = names["live"]()
    run(recipe.model_validate(settings))
    assert names["live"]() == before
    return [{kind: row[kind] - before[kind] for kind in row} for row in rows_of(folder / "live.jsonl")]


@pytest.mark.parametrize(
    ("name", "extra"),
    [("best-of-n", {}), ("online-dpo", {}), ("online-dpo", {"pairs": {"against": "start"}}), ("arena", {})],
)
def test_a_loop_has_one_model_open_at_a_time(name, extra, tmp_path, mini_model, uncollected):
    seen = counted(name, tmp_path, mini_model, **extra)
    assert len(seen) >= 5
    assert all(row["LlamaForCausalLM"] <= 1 for row in seen), seen  # the first one, which looks are measured by
    assert not any(row["AdamW"] for row in seen), seen


def test_a_judge_that_is_trained_again_takes_the_place_of_the_one_before(tmp_path, mini_model, uncollected):
    pairs = [{"prompt": "x" * (1 + i % 4), "chosen": "a a", "rejected": "e" * (1 + i % 3)} for i in range(12)]
    file = write_jsonl(tmp_path / "pairs.jsonl", pairs)
    train = {"batch_size": 6, "keep": "last"}
    values = {
        "model": {"path": str(mini_model)}, "data": {"path": str(file)}, "train": train,
        "run": {"dir": str(tmp_path / "rm"), "threads": 1, "eval_every": 99},
    }  # fmt: skip
    judge = reward_model.run(reward_model.RewardModelRecipe.model_validate(values))["model"]
    gc.collect()
    seen = counted(
        "best-of-n", tmp_path, mini_model, judge={"reward": {"rm": {"model": judge}}}, rounds=3,
        watch={"gold": {"function": f"{tmp_path / 'rewards.py'}:count_a"}},
        refresh={"by": "gold", "first": [str(file)], "train": train},
    )  # fmt: skip
    assert all(row["LlamaForCausalLM"] <= 1 and row["ScalarModel"] <= 1 for row in seen), seen
    assert not any(row["AdamW"] for row in seen), seen


def test_a_stage_that_a_library_has_tied_to_itself_goes_when_it_ends(tmp_path, mini_model, uncollected):
    class Engine:
        def __init__(self) -> None:
            self.myself = self

    left = []

    def stage(made: Any, *, resume: bool) -> dict[str, Any]:
        left.append(ref(Engine()))
        return {"finished": True}

    recipe = best_of_n.BestOfNRecipe.model_validate(loop_settings(tmp_path, mini_model, "run"))
    with Ledger("best-of-n", recipe, resume=False, rounds=1) as ledger:
        ledger.stage("round-01/sft", stage, lambda values: values, {})
    assert left[0]() is None


RUN = """
import gc, json, sys
from steersman.verbs import reward_model, sft

gc.disable()
verb = {"sft": (sft.run, sft.SFTRecipe), "reward": (reward_model.run, reward_model.RewardModelRecipe)}[sys.argv[1]]
verb[0](verb[1].model_validate(json.loads(sys.argv[2])))
assert "matplotlib" in sys.modules
names = [type(thing).__name__ for thing in gc.get_objects()]
print(json.dumps([names.count(kind) for kind in ("LlamaForCausalLM", "ScalarModel", "AdamW")]))
"""


@pytest.mark.parametrize("verb", ["sft", "reward"])
def test_a_run_that_drew_its_report_leaves_nothing(verb, tmp_path, mini_model):
    """A report imports matplotlib where nobody has, and what that catches on its way must not keep the run."""
    rows = [{"prompt": w, "chosen": "a a", "rejected": "e", "completion": "a"} for w in WORDS]
    values = {
        "model": {"path": str(mini_model)}, "run": {"dir": str(tmp_path / "run"), "threads": 1},
        "data": {"path": str(write_jsonl(tmp_path / "rows.jsonl", rows)), "held_out": 0.5},
        "train": {"batch_size": 4, "keep": "last", "max_steps": 2},
    }  # fmt: skip
    if verb == "sft":
        values["train"].pop("keep")
    done = subprocess.run(
        [sys.executable, "-c", RUN, verb, json.dumps(values)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "run" / "report.html").exists()
    assert json.loads(done.stdout.splitlines()[-1]) == [0, 0, 0]
