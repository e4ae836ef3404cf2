"""Reward per sample, by where the samples come from and by how old they are.

    python tools/results/asynchronous_learning.py engines --python ../env/vllm/bin/python
    python tools/results/asynchronous_learning.py lag
    python tools/results/asynchronous_learning.py receipts --python ../env/vllm/bin/python \\
        --model HuggingFaceTB/SmolLM2-135M-Instruct
    python tools/results/asynchronous_learning.py draw --docs docs/results

`engines`: GRPO and PPO by the verbs with `rollout.engine` inside, process and vllm, the same recipe and seeds; the
runs with vLLM share one server by its address (`rollout.url`). `lag`: GRPO whose batch b is sampled by the weights of
version max(0, b - k), as `rollout.in_flight: finish` has it, once for each correction and k above 0 (at k = 0 there
is nothing to correct); in one process, since where it is sampled changes nothing (that is what `engines` and
asynchronous_kills.py show). The task of both: the story model towards positive sentiment. `receipts`: a few
iterations of GRPO and PPO on a real chat model with vLLM, for the gap of each receipt. What is finished is not made
again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from recording import finished, options, over_seeds, plain_axes, plt, rows_of, run_cells, verb

from steersman.assets import openings, story_model
from steersman.atomic import write_atomic
from steersman.data import Batches
from steersman.loss.correction import CAPS
from steersman.model import load_policy
from steersman.reward import Scores
from steersman.rollout.remote import ServerSettings, open_vllm
from steersman.train.on_policy import Clock, OnPolicy
from steersman.train.roles import build_roles
from steersman.types import Sample
from steersman.verbs import rl
from steersman.verbs.on_policy_recipes import RECIPES

METHODS, ENGINES = ("grpo", "ppo"), ("inside", "process", "vllm")
LAGS = (0, 1, 2, 4)
RECORDED = "recorded"
"""No correction: the clipped loss takes the recorded log-probabilities as the old ones."""
KINDS = (RECORDED, "none", *CAPS, "decoupled")
ITERATIONS, HELD = 16, 64


def settings(folder: Path, method: str, seed: int, **rollout: Any) -> dict[str, Any]:
    """The recipe that all runs share but for their `rollout` section."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    prompts = folder.parent / "prompts.jsonl"
    if not prompts.exists():
        write_atomic(prompts, "".join(json.dumps({"prompt": text}) + "\n" for text in openings()))
    return {
        "model": {"path": str(story_model()), "dtype": "float32"},
        "data": {"path": str(prompts), "held_out": HELD},
        "reward": {"parts": {"vader": {"builtin": "vader_sentiment"}}},
        "rollout": {
            "prompts": 8,
            "samples": 4,
            "max_new_tokens": 20,
            "held_out": HELD,
            "timeout": 1800.0,
            **rollout,
        },
        "algorithm": {"beta": 0.05, "minibatches": 4},
        "optimizer": {"lr": 3e-4},
        "critic": {"optimizer": {"lr": 1e-3}} if method == "ppo" else None,
        "iterations": ITERATIONS,
        "run": {"dir": str(folder), "seed": seed, "threads": 1, "eval_every": ITERATIONS, "save_every": ITERATIONS},
    }


# -- where ---------------------------------------------------------------------------------------------------------


def engines(given: Any) -> None:
    with vllm_server(given.python, str(story_model())) as url:
        where: dict[str, dict[str, Any]] = {name: {"engine": name} for name in ENGINES}
        where["vllm"]["url"] = [url]
        cells = []
        for seed in given.seeds:
            for method in METHODS:
                for name, rollout in where.items():
                    folder = given.out / "engines" / f"{method}-{name}-{seed}"
                    values = settings(folder, method, seed, **rollout)
                    run = lambda m=method, f=folder, s=seed, v=values: verb(rl, RECIPES[m], f, s, v)  # noqa: E731
                    cells.append((folder, run))
        run_cells(cells, given.minutes)


@contextmanager
def vllm_server(python: str, model: str) -> Iterator[str]:
    """The address of a vLLM server of the model's shape, which lives as long as the block."""
    policy = load_policy(model, device="cpu", dtype="float32")
    wanted = ServerSettings(ends=(policy.tokenizer.eos_token_id,), max_batch=32, timeout=1800.0, python=python)
    generator = open_vllm(policy, wanted)
    try:
        yield generator.stations[0].server.url
    finally:
        generator.close()


def receipts(given: Any) -> None:
    with vllm_server(given.python, given.model) as url:
        cells = []
        for method in METHODS:
            folder = given.out / "receipts" / method
            short = {"prompts": 2, "samples": 4, "max_new_tokens": 16, "held_out": 2}
            values = settings(folder, method, 0, engine="vllm", url=[url], **short)
            values["model"]["path"] = given.model
            values |= {"iterations": 3, "optimizer": {"lr": 1e-6}}
            cells.append((folder, lambda m=method, f=folder, v=values: verb(rl, RECIPES[m], f, 0, v)))
        run_cells(cells, given.minutes)


# -- how old -------------------------------------------------------------------------------------------------------


class Lagged(OnPolicy):
    """The synchronous loop with samples of the weights of `lag` iterations ago."""

    lag = 0

    def next_samples(self, clock: Clock) -> tuple[list[Sample], Scores]:
        policy = self.roles.policy
        self.versions = {**getattr(self, "versions", {}), self.done: _copy(policy.state_dict())}
        self.versions.pop(self.done - self.lag - 1, None)
        policy.load_state_dict(self.versions[max(0, self.done - self.lag)])
        sampled = super().next_samples(clock)
        policy.load_state_dict(self.versions[self.done])
        return sampled


def _copy(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}


def lagged(folder: Path, kind: str, lag: int, seed: int) -> None:
    """One run; its rewards, effective sample sizes and held-out reward go to `summary.json` in the folder."""
    correction = {} if kind == RECORDED else {"recompute_logp": True, "correction": {"kind": kind}}
    recipe = RECIPES["grpo"].model_validate(settings(folder, "grpo", seed, **correction))
    torch.set_num_threads(1)
    roles = build_roles(recipe, torch.device("cpu"))
    train, held, _ = rl._prompts(recipe, roles.policy)
    batches = Batches(len(train), recipe.rollout.prompts, seed, shuffle=True, drop_last=True)
    loop = Lagged(recipe, roles, train, batches)
    loop.lag = lag
    rows = [loop.iteration().stats for _ in range(ITERATIONS)]
    samples = roles.generate(held, seed=(seed, 1 << 40), n=1)
    found = {
        "finished": True, "kind": kind, "lag": lag, "seed": seed,
        "reward": [row["reward/total"] for row in rows], "kl": rows[-1]["kl"],
        "ess": [row["rollout/ess"] for row in rows if "rollout/ess" in row],
        "held_out": float(roles.reward.score(samples).total.mean()),
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "summary.json", json.dumps(found))


def lag(given: Any) -> None:
    cells = []
    for seed in given.seeds:
        for k in LAGS:
            for kind in KINDS if k else (RECORDED,):
                folder = given.out / "lag" / f"{kind}-{k}-{seed}"
                cells.append((folder, lambda f=folder, c=kind, k=k, s=seed: lagged(f, c, k, s)))
    run_cells(cells, given.minutes)


# -- what came of it -----------------------------------------------------------------------------------------------


def draw(given: Any) -> None:
    """Writes what there is to asynchronous-learning.json, and draws it."""
    found = {
        "engines": engine_table(given.out, given.seeds), "lag": lag_table(given.out, given.seeds),
        "receipts": receipt_table(given.out),
    }  # fmt: skip
    write_atomic(given.docs / "asynchronous-learning.json", json.dumps(found, indent=1) + "\n")
    figure, axes = plt.subplots(1, 3, figsize=(10, 3), constrained_layout=True)
    for axis, method in zip(axes, METHODS, strict=False):
        plain_axes(axis, f"{method}: reward per iteration, mean of {len(given.seeds)} seeds")
        for name in ENGINES:
            if rows := [row for row in found["engines"] if row["method"] == method and row["engine"] == name]:
                axis.plot(rows[0]["curve"], label=name, linestyle={"process": "--"}.get(name, "-"))
        axis.legend(fontsize=7)
    plain_axes(axes[2], "GRPO: held-out reward against k")
    for kind in KINDS:
        rows = [row for row in found["lag"] if row["kind"] == kind]
        rows = [row for row in found["lag"] if not row["lag"]] + [row for row in rows if row["lag"]]
        axes[2].plot([row["lag"] for row in rows], [row["held_out"]["mean"] for row in rows], label=kind)
    axes[2].legend(fontsize=5)
    figure.savefig(given.docs / "asynchronous-learning.png", dpi=120)


def engine_table(out: Path, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """By method and engine: the mean reward of all iterations, its difference from `inside` seed by seed, and the
    held-out reward at the end."""
    table = []
    for method in METHODS:
        folders = {name: [out / "engines" / f"{method}-{name}-{seed}" for seed in seeds] for name in ENGINES}
        curves = {}
        for name, of in folders.items():
            if not all(finished(folder) for folder in of):
                continue
            rows = [[row for row in rows_of(folder) if "reward/total" in row] for folder in of]
            curves[name] = torch.tensor([[row["reward/total"] for row in run] for run in rows])
            apart = (curves[name] - curves["inside"]).mean(1).tolist()
            gaps = [row["sync/gap"] for run in rows for row in run if "sync/gap" in row]
            table.append(
                {
                    "method": method, "engine": name, "curve": curves[name].mean(0).tolist(),
                    "reward": over_seeds(curves[name].mean(1).tolist()), "apart": over_seeds(apart),
                    "held_out": over_seeds([run[-1]["held_out/reward/total"] for run in rows]),
                    "same_bits": bool((curves[name] == curves["inside"]).all()), "gap": max(gaps, default=0.0),
                }
            )  # fmt: skip
    return table


def receipt_table(out: Path) -> list[dict[str, Any]]:
    """By method: the gap of each receipt, in nats."""
    table = []
    for method in METHODS:
        folder = out / "receipts" / method
        if finished(folder):
            gaps = [row["sync/gap"] for row in rows_of(folder) if "sync/gap" in row]
            table.append({"method": method, "gaps": gaps})
    return table


def lag_table(out: Path, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """By correction and k: reward over the last quarter of the iterations, held-out reward and effective sample
    size."""
    table = []
    for kind in KINDS:
        for k in LAGS:
            runs = [finished(out / "lag" / f"{kind}-{k}-{seed}") for seed in seeds]
            if any(run is None for run in runs):
                continue
            late = [sum(run["reward"][-4:]) / 4 for run in runs if run]
            table.append(
                {
                    "kind": kind, "lag": k, "reward": over_seeds(late),
                    "held_out": over_seeds([run["held_out"] for run in runs if run]),
                    "kl": over_seeds([run["kl"] for run in runs if run]),
                    "ess": over_seeds([sum(run["ess"]) / max(len(run["ess"]), 1) for run in runs if run]),
                }
            )  # fmt: skip
    return table


def main() -> None:
    steps = {"engines": engines, "lag": lag, "receipts": receipts, "draw": draw}
    parser = options(__doc__, tuple(steps), "runs/asynchronous-learning")
    parser.add_argument("--python", help="the Python that has vLLM")
    parser.add_argument("--model", help="the chat model of `receipts`")
    given = parser.parse_args()
    given.out = given.out.resolve()
    steps[given.what](given)


if __name__ == "__main__":
    main()
