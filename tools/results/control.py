"""Classic control over seeds: every method on CartPole, PPO on LunarLander, Acrobot and Pendulum.

    python tools/results/control.py run --out runs/control --seeds 0 1 2 --only CartPole-v1
    python tools/results/control.py draw --out runs/control --docs docs/results --seeds 0 1 2

A run that has finished is not made again; `--minutes` begins no further run after so much CPU time.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from recording import finished, options, over_seeds, plain_axes, plt, rows_of, run_cells, verb

from steersman.config.load import load_recipe
from steersman.control import run as control
from steersman.control.curve import learning_curves
from steersman.control.recipe import recipe_class

RECIPES = {
    "LunarLander-v3": Path("recipes/control-lunarlander-ppo.yaml"),
    "Acrobot-v1": Path("recipes/control-acrobot-ppo.yaml"),
    "Pendulum-v1": Path("recipes/control-pendulum-ppo.yaml"),
}
CARTPOLE = ("ppo", "ppo-kl", "trpo", "a2c", "reinforce-baseline", "reinforce++", "reinforce", "dqn")
SOLVED = {"CartPole-v1": 475.0, "LunarLander-v3": 200.0, "Acrobot-v1": -100.0}
"""Gymnasium's thresholds; Pendulum has none."""


def train(env: str, method: str, folder: Path, seed: int) -> dict[str, Any]:
    """One run with the method's defaults (CartPole) or the environment's recipe."""
    path, words = RECIPES.get(env), ["--algorithm", method]
    recipe = load_recipe(recipe_class(path, words), path, words)
    return verb(control, type(recipe), folder, seed, recipe.model_dump(exclude={"run": {"dir", "seed"}}))


def cells(out: Path, seeds: list[int], only: list[str]) -> list[tuple[Path, Callable[[], Any]]]:
    """Every run that is asked for, seed by seed."""
    asked = [("CartPole-v1", method) for method in CARTPOLE] + [(env, "ppo") for env in RECIPES]
    return [
        (folder := out / env / f"{method}-{seed}", partial(train, env, method, folder, seed))
        for seed in seeds
        for env, method in asked
        if not only or env in only
    ]


def collect(out: Path, seeds: list[int]) -> dict[str, Any]:
    """Returns of the final 100 greedy episodes, steps and seconds, by environment and method."""
    table: dict[str, Any] = {}
    for env in ("CartPole-v1", *RECIPES):
        for method in CARTPOLE if env == "CartPole-v1" else ("ppo",):
            found = [s for seed in seeds if (s := finished(out / env / f"{method}-{seed}"))]
            if found:
                table.setdefault(env, {})[method] = {
                    key: over_seeds([s[name] for s in found])
                    for key, name in (
                        ("return", "held_out/return"),
                        ("worst episode", "held_out/return_min"),
                        ("deviation between episodes", "held_out/return_std"),
                        ("environment steps", "env_steps"),
                        ("seconds", "seconds"),
                    )
                }
    return table


def draw(out: Path, seeds: list[int], docs: Path) -> None:
    """CartPole's methods in one picture, the other environments side by side in another."""
    runs = {m: [out / "CartPole-v1" / f"{m}-{seed}" for seed in seeds] for m in CARTPOLE}
    learning_curves(runs, docs / "control-cartpole.png", SOLVED["CartPole-v1"])
    figure, axes = plt.subplots(1, len(RECIPES), figsize=(9.6, 2.8), layout="constrained")
    for axis, env in zip(axes, RECIPES, strict=True):
        for seed in seeds:
            rows = [r for r in rows_of(out / env / f"ppo-{seed}") if "reward/return" in r]
            steps, returns = [r["env_steps"] for r in rows], [r["reward/return"] for r in rows]
            axis.plot(steps, returns, color="#1f5f8b", lw=1.0, alpha=0.7)
        if env in SOLVED:
            axis.axhline(SOLVED[env], color="0.5", lw=0.8, ls="--")
        plain_axes(axis, f"{env}, PPO, {len(seeds)} seeds")
        axis.set_xlabel("environment steps", fontsize=8)
        axis.ticklabel_format(axis="x", style="sci", scilimits=(0, 3))
    axes[0].set_ylabel("return while training", fontsize=8)
    figure.savefig(docs / "control-others.png", dpi=110)


def main() -> None:
    parser = options(__doc__, ("run", "draw"), "runs/control")
    parser.add_argument("--only", nargs="*", default=[], help="environments")
    args = parser.parse_args()
    if args.what == "run":
        run_cells(cells(args.out, args.seeds, args.only), args.minutes)
    else:
        table = collect(args.out, args.seeds)
        (args.docs / "control.json").write_text(json.dumps(table, indent=1) + "\n")
        print(json.dumps(table, indent=1))
        draw(args.out, args.seeds, args.docs)


if __name__ == "__main__":
    main()
