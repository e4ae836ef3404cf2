"""The memory that `steersman plan` foresees, beside what is in use: of recipes that run, and of real shapes.

    python benchmarks/plan_memory.py recipes [NAME ...]   # on the tests' stand-in accelerator, whose bytes count
    python benchmarks/plan_memory.py shapes [NAME ...]    # one step of 1B to 70B on tensors without memory
    python benchmarks/plan_memory.py page                 # docs/results/plan-memory.md again

Recipes run whole, in a process of their own each, on a device that counts what is allocated on it (needs a C++
compiler); attention is written out there, so its scores count. Shapes go forward, back and through AdamW with
PyTorch's FakeTensorMode, which knows the size of every tensor and holds none. Each run adds its rows to
docs/results/plan-memory.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import preflight
import torch

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
MODEL, PROMPT, LENGTH = "5M", 32, 96
preflight.MODELS[MODEL] = {
    "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "vocab_size": 4096, "tie_word_embeddings": False,
}  # fmt: skip
preflight.TOKENS[MODEL] = 1024
RECIPES = [
    "sft", "sft, checkpointing", "sft, LoRA", "sft, bfloat16", "dpo", "kto", "reward", "grpo", "grpo, LoRA", "ppo",
    "ppo, shared critic", "ppo, share: base",
]  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "Llama-3.2-1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
                     "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128_256,
                     "tie_word_embeddings": True},
    "Qwen2.5-7B": {"hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28,
                   "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152_064},
    "Llama-3.1-70B": {"hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80,
                      "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128_256},
}  # fmt: skip
"""Qwen2.5 has biases besides, which are left out."""


def inputs(folder: Path) -> None:
    """A policy, a reward model, and data whose rows all have `LENGTH` tokens."""
    preflight.inputs(folder, MODEL)
    draw = random.Random(0)

    def words(n: int) -> str:
        return " ".join(f"t{draw.randrange(4, 4096)}" for _ in range(n))

    new = LENGTH - PROMPT - 1  # and the end token
    rows = [{"prompt": words(PROMPT), "chosen": f" {words(new)}", "rejected": f" {words(new)}"} for _ in range(64)]
    sft = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    for name, data in (("pairs", rows), ("sft", sft)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))


def recipe_rows(names: list[str]) -> Iterator[tuple[str, dict[str, float]]]:
    """Runs the recipes here, one after the other: the most bytes in use in any step, and what is planned."""
    sys.path.insert(0, str(ROOT / "tests" / "train"))
    import pretend_device

    pretend_device.start()
    from steersman.train.offline import Offline
    from steersman.train.on_policy import OnPolicy
    from steersman.verb_table import VERBS, import_object

    peaks: list[int] = []

    def measured(kind: type, method: str) -> None:
        plain = getattr(kind, method)

        def one(self: Any, *given: Any, **named: Any) -> Any:
            with pretend_device.memory() as most:
                made = plain(self, *given, **named)
            peaks.extend(most)
            return made

        setattr(kind, method, one)

    measured(OnPolicy, "iteration")
    measured(Offline, "step")
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            inputs(Path(folder))
            given = preflight.settings(name, Path(folder))
            given["run"]["device"] = "pretend"
            gc.collect()
            with pretend_device.memory() as before:
                pass
            peaks.clear()
            verb = VERBS[preflight.CASES[name][0]]
            recipe: Any = verb.recipe_class(None, []).model_validate(given)
            import_object(verb.run)(recipe)
            yield name, {"used": max(peaks) - before[0]}


def plan_again(rows: dict[str, dict[str, float]]) -> None:
    """Adds what is planned of each recipe to its row."""
    from steersman.verb_table import VERBS

    with tempfile.TemporaryDirectory() as folder:
        inputs(Path(folder))
        for name, row in rows.items():
            given = preflight.settings(name, Path(folder))
            recipe = VERBS[preflight.CASES[name][0]].recipe_class(None, []).model_validate(given)
            row |= planned(recipe, "rollout" in given)


def planned(recipe: Any, sampled: bool) -> dict[str, float]:
    """What the plan adds up for one device, without the driver's share."""
    from steersman.plan.costs import weigh
    from steersman.plan.devices import Cluster, Device
    from steersman.plan.layouts import Layout
    from steersman.verbs.plan import roles_of, work_of

    work = replace(work_of(recipe, PROMPT if sampled else LENGTH), scores=LENGTH)
    device = Device("pretend", 64e9, 1e12, 1e12, 1e12, process=0)
    found = weigh(Layout("replicas", 1), roles_of(recipe, ""), work, Cluster(device, 1))
    return {"planned": found.peak, **{f"of which {k}": v for k, v in found.memory.items()}}


class Alive(torch.utils._python_dispatch.TorchDispatchMode):
    """Bytes of the tensors that live, and the most that did at once; those of a model's weights are left out."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known = {p.untyped_storage()._cdata for p in model.parameters()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.note(x.untyped_storage())
        return out

    def note(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def shape_row(name: str, checkpointing: bool, tokens: int = 4096, length: int = 1024) -> dict[str, float]:
    """One step on tensors without memory, weights in float32 under computation in bfloat16 left out: all bfloat16."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import LlamaConfig, LlamaForCausalLM

    from steersman.ops.logprob import TILE, linear_logp

    config = LlamaConfig(**SHAPES[name], attn_implementation="sdpa")
    TILE["cpu"] = TILE["accelerator"]  # these tensors are a CPU's by name
    torch.set_default_dtype(torch.bfloat16)
    with FakeTensorMode():
        model = LlamaForCausalLM(config).train()
        torch.set_default_dtype(torch.float32)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        held = sum(p.untyped_storage().nbytes() for p in {id(p): p for p in model.parameters()}.values())
        steps = torch.optim.AdamW(model.parameters(), fused=True)
        ids = torch.zeros(tokens // length, length, dtype=torch.long)
        with Alive(model) as alive:
            found = []
            for _ in range(2):  # moments are there from the second step on
                alive.most = alive.now
                hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
                head = model.lm_head.weight
                logp, _ = linear_logp(hidden, head, None, ids.flatten())
                kept = alive.now
                logp.sum().backward()
                del hidden, logp
                found.append((alive.most, kept))
                steps.step()
                after = alive.now
                steps.zero_grad()
                kept -= alive.now
    return {
        "used": held + found[-1][0], "used, weights": held, "used, gradients and moments": after,
        "used, kept of the layers": kept,
    }  # fmt: skip


def planned_shape(name: str, checkpointing: bool, tokens: int = 4096, length: int = 1024) -> dict[str, float]:
    """The same step as the plan counts it."""
    from transformers import LlamaConfig

    from steersman.model.shape import shape_from
    from steersman.plan.costs import weigh
    from steersman.plan.devices import Cluster, Device
    from steersman.plan.layouts import Layout, Role, Work

    shape = shape_from(LlamaConfig(**SHAPES[name]), name)
    work = Work(
        tokens // length, length, 0, 1, tokens, 2, 2, optimizer_bytes=4, checkpointing=checkpointing, sampled=False
    )
    device = Device(name, 1e15, 1e12, 1e12, 1e12, process=0)
    found = weigh(Layout("one", 1), [Role("model", shape, shape.parameters)], work, Cluster(device, 1))
    each = shape.hidden * 2 if checkpointing else shape.activations(2)
    return {
        "planned": found.peak, "planned, weights": shape.parameters * 2,
        "planned, gradients and moments": shape.parameters * 6,
        "planned, kept of the layers": shape.layers * tokens * each,
    }  # fmt: skip


def table(rows: dict[str, dict[str, float]], unit: float, name: str) -> list[str]:
    out = [f"| | in use, {name} | planned, {name} | planned / in use |", "| --- | --- | --- | --- |"]
    for key, row in rows.items():
        used, planned = row["used"] / unit, row["planned"] / unit
        out.append(f"| {key} | {used:,.1f} | {planned:,.1f} | {planned / used:.2f} |")
    return out


def page(found: dict[str, Any]) -> str:
    recipes, shapes = found.get("recipes", {}), found.get("shapes", {})
    ratios = [row["planned"] / row["used"] for row in recipes.values()]
    near = sum(abs(r - 1) <= 0.15 for r in ratios)
    parts = []
    for key, row in shapes.items():
        for name in ("weights", "gradients and moments", "kept of the layers"):
            used, planned = row[f"used, {name}"], row[f"planned, {name}"]
            ratio = planned / used if used else float("nan")
            parts.append(f"| {key} | {name} | {used / 1e9:,.2f} | {planned / 1e9:,.2f} | {ratio:.2f} |")
    return "\n".join([
        "# The plan's memory beside what is in use", "",
        "Written by `python benchmarks/plan_memory.py page`; do not edit.", "",
        "## Recipes that run", "",
        "A model of 5M parameters (4 layers of width 256, 4,096 words), micro-batches of 1,024 tokens, on the tests'",
        "stand-in accelerator, which counts the bytes of every tensor on it: the most in use in any step, beside",
        "what `steersman plan` adds up for one device, without the driver's share. The formulas were mended while",
        "these rows were looked at, so they are no independent check.", "",
        *table(recipes, 2**20, "MiB"), "",
        f"{near} of {len(ratios)} are within 15%. What is not counted: a reward model's last feed-forward part,",
        "which is done for the last tokens alone, and gradients that go while others come.", "",
        "## Shapes of 1B to 70B", "",
        "One step of 4 sequences of 1,024 tokens in bfloat16, AdamW with moments of 2 bytes (the weights' own), on",
        "tensors without memory (PyTorch's FakeTensorMode): forward, the last layer's log-probabilities in tiles,",
        "backward, update. The optimizer's float32 copy is left out on both sides. Two things are in use here and",
        "not on a GPU: keys and values repeated for each query, since a traced attention is given a mask, and",
        "factors of the last layer's products in float32, which a CPU needs.", "",
        *table(shapes, 1e9, "GB"), "",
        "| shape | part | in use, GB | planned, GB | planned / in use |", "| --- | --- | --- | --- | --- |",
        *parts, "",
    ]) + "\n"  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["recipes", "shapes", "page", "child"])
    parser.add_argument("names", nargs="*")
    asked = parser.parse_args()
    preflight.CASES = {k: (verb, MODEL, *rest) for k, (verb, _, *rest) in preflight.CASES.items()}
    if asked.what == "child":
        for name, row in recipe_rows(asked.names):
            print(json.dumps([name, row]), flush=True)
        return
    file = RESULTS / "plan-memory.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    if asked.what == "recipes":
        words = [sys.executable, __file__, "child", *(asked.names or RECIPES)]
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as running:
            assert running.stdout is not None
            for line in running.stdout:
                if line.startswith('["'):
                    name, row = json.loads(line)
                    found.setdefault("recipes", {})[name] = row
                    print(f"{name}: {row['used'] / 2**20:.1f} MiB", flush=True)
                    file.write_text(json.dumps(found, indent=1))
    for name in (asked.names or SHAPES) if asked.what == "shapes" else ():
        for checkpointing in (False, True):
            key = f"{name}, checkpointing" if checkpointing else name
            found.setdefault("shapes", {})[key] = row = shape_row(name, checkpointing)
            print(f"{key}: {row['used'] / 1e9:.1f} GB", flush=True)
            file.write_text(json.dumps(found, indent=1))
    plan_again(found.get("recipes", {}))
    for key, row in found.get("shapes", {}).items():
        row |= planned_shape(key.split(",")[0], "checkpointing" in key)
    file.write_text(json.dumps(found, indent=1))
    (RESULTS / "plan-memory.md").write_text(page(found))


if __name__ == "__main__":
    main()
