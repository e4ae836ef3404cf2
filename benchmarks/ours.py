"""steersman's side of a benchmark: the product's own loops, driven turn by turn.

    python benchmarks/ours.py SCENARIO FOLDER THREADS DEVICE DTYPE PROMPTS SAMPLES

Started by the scripts; see duel.py.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import SETTINGS, Turns, sizes

from steersman.data import Batches, demonstrations, encode, encode_prompts, layout, preferences, prompts
from steersman.objectives.preference import PairObjective
from steersman.objectives.supervised import SFT
from steersman.recipe.sections import ModelConfig
from steersman.rollout import Engine, Sampling
from steersman.run.device import resolve_device
from steersman.run.run_config import RunConfig
from steersman.setup.models import policy_from, scalar_from
from steersman.train.offline import Offline
from steersman.train.on_policy import OnPolicy
from steersman.train.roles import build_roles
from steersman.types import Prompt
from steersman.verbs.on_policy_recipes import RECIPES
from steersman.verbs.preference import PreferenceRecipe
from steersman.verbs.reward_model import PairwiseReward, RewardModelRecipe
from steersman.verbs.sft import SFTRecipe

OPTIMIZER = {"lr": SETTINGS["lr"], "max_grad_norm": SETTINGS["max_grad_norm"]}


def model_of(folder: Path, kind: str, dtype: str, adapters: str) -> dict[str, Any]:
    """The `model` section: the whole model, or LoRA of rank 16 on all linear layers; qlora has a base of 4 bits."""
    whole = {"path": str(folder / kind), "dtype": dtype}
    lora = {"lora": {"r": 16, "alpha": 32}} if adapters else {}
    return whole | lora | ({"quantise": "nf4"} if adapters == "qlora" else {})


def on_policy(
    name: str, folder: Path, run: dict[str, Any], dtype: str, rows: int, samples: int, turns: Turns
) -> None:
    """PPO with a critic and a reward model, or GRPO with a reward function; one turn is one iteration."""
    new, _ = sizes(folder)
    name, _, adapters = name.partition("-")
    # TRL's PPO has no samples of a prompt: it gets copies of the first prompts, and so these are ours too
    limit = rows if name == "ppo" and samples > 1 else None
    settings: dict[str, Any] = {
        "model": model_of(folder, "policy", dtype, adapters),
        "data": {"path": str(folder / "prompts.jsonl"), "wrap_in_chat": False, "limit": limit},
        "rollout": {"prompts": rows, "samples": samples, "max_new_tokens": new},
        "algorithm": {"beta": SETTINGS["beta"], "epochs": 1, "minibatches": 1},
        "optimizer": OPTIMIZER,
        "run": run,
        "iterations": 1000,
        "offload": not adapters,  # which leave no reference of its own
    }
    if name == "ppo":
        settings["reward"] = {"parts": {"judge": {"model": str(folder / "scalar")}}}
        settings["critic"] = {"init": str(folder / "scalar"), "optimizer": OPTIMIZER}
    else:
        settings["reward"] = {"parts": {"even": {"function": f"{folder / 'rewards.py'}:even"}}}
    recipe: Any = RECIPES[name].model_validate(settings)
    roles = build_roles(recipe, resolve_device(run["device"]))
    # no end token, so that every response has the same length
    roles.engine = Engine(
        roles.policy.model, roles.policy.tokenizer, max_batch=recipe.rollout.max_batch, eos_token_id=[]
    )
    laid = layout(roles.policy.tokenizer, recipe.data)
    train, _, _ = encode_prompts(prompts(recipe.data).train, laid, recipe.data, None, new)
    state = OnPolicy(recipe, roles, train, Batches(len(train), rows, 0, drop_last=True))
    turns.ready()
    while True:
        turns.wait()
        stats = state.iteration().stats
        phases = {key: stats[f"time/{key}"] for key in ("rollout", "reward", "score", "update")}
        turns.done(tokens=rows * samples * new, phases=phases, ratio_gap=stats["ratio_gap"])


def offline(name: str, folder: Path, run: dict[str, Any], dtype: str, steps: int, turns: Turns) -> None:
    """DPO, reward model or SFT; one turn is one epoch of `steps` batches.

    DPO's reference is scored once, before the first step. One epoch pays for that, so its seconds are told and
    counted.
    """
    _, batch = sizes(folder)
    name, _, adapters = name.partition("-")
    path = "sft.jsonl" if name == "sft" else "pairs.jsonl"
    kind = "scalar" if name == "reward" else "policy"
    recipe_of: dict[str, Any] = {"dpo": PreferenceRecipe, "reward": RewardModelRecipe, "sft": SFTRecipe}
    recipe = recipe_of[name].model_validate(
        {
            "model": model_of(folder, kind, dtype, adapters),
            "data": {"path": str(folder / path), "limit": steps * batch, "wrap_in_chat": False},
            "train": {"batch_size": batch, "epochs": 1000},
            "optimizer": {**OPTIMIZER, "schedule": "constant"},
            "run": run,
        }
    )
    device = resolve_device(run["device"])
    started = time.perf_counter()
    once = 0.0
    model: Any = (scalar_from if name == "reward" else policy_from)(recipe.model, recipe.run, device)
    laid = layout(model.tokenizer, recipe.data)
    loaded: Any = demonstrations(recipe.data) if name == "sft" else preferences(recipe.data)
    train = encode(loaded.train, laid, recipe.data)
    objective: Any
    if name == "sft":
        objective = SFT(model, train, None, recipe.run.micro_tokens)
    elif name == "reward":
        objective = PairwiseReward(model, train, None, recipe.train, recipe.run.micro_tokens)
    else:
        reference = policy_from(recipe.model, recipe.run, device, trainable=False)
        started = time.perf_counter()
        objective = PairObjective(model, reference, train, None, recipe.loss, recipe.run.micro_tokens)
        objective.read_reference(range(len(train.groups)))
        once = time.perf_counter() - started
    state = Offline(objective, recipe.train, recipe.optimizer, recipe.run)
    order = state.batches.forever()
    tokens = sum(len(e) for group in train.groups for e in group)
    turns.ready(once=once)
    while True:
        turns.wait()
        for _ in range(steps):
            state.step(next(order))
        turns.done(tokens=tokens)


def rollout(folder: Path, run: dict[str, Any], dtype: str, rows: int, samples: int, turns: Turns) -> None:
    """The engine alone, on a policy as the on-policy loop loads it; one turn is one call."""
    device = resolve_device(run["device"])
    policy = policy_from(ModelConfig(path=str(folder / "policy"), dtype=dtype), RunConfig(**run), device)  # type: ignore
    texts = [json.loads(line)["prompt"] for line in (folder / "prompts.jsonl").open(encoding="utf-8")]
    ids = policy.tokenizer(texts[:rows])["input_ids"]
    given = [Prompt(row, text, index=i) for i, (row, text) in enumerate(zip(ids, texts, strict=False))]
    engine = Engine(policy.model, eos_token_id=[])
    turns.ready()
    for seed in itertools.count():
        turns.wait()
        turns.done(tokens=sum(len(s.ids) for s in engine.generate(given, Sampling(128), n=samples, seed=seed)))


def main() -> None:
    turns = Turns()
    name, folder, threads, device, dtype, rows, samples = sys.argv[1:]
    torch.set_num_threads(int(threads))
    run = {"device": device, "threads": int(threads)}
    if name == "rollout":
        rollout(Path(folder), run, dtype, int(rows), int(samples), turns)
    elif name.partition("-")[0] in ("ppo", "grpo"):
        on_policy(name, Path(folder), run, dtype, int(rows), int(samples), turns)
    else:
        offline(name, Path(folder), run, dtype, int(rows), turns)


if __name__ == "__main__":
    main()
