"""Episodes of several turns over seeds: a lake, a word game, a calculator, a library and a customer.

    python tools/results/episodes.py start --data ../shared/data     # models to begin from, and rows
    python tools/results/episodes.py run --seeds 0 1 2 --minutes 8   # goes on where it was
    python tools/results/episodes.py draw

`--only` takes names of worlds. A run that has finished is not made again; `--minutes` begins no further run after so
much CPU time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from episode_page import write_page
from episode_starts import STARTS
from recording import options, run_cells, verb

from steersman.config.load import load_recipe
from steersman.control import run as control
from steersman.control.recipe import recipe_class
from steersman.verbs import rl, sft
from steersman.verbs.on_policy_recipes import RECIPES

HOME = Path("recipes/environments")
STILL: dict[str, Any] = {
    "environment": {"args": {"is_slippery": False}, "max_turns": 30},
    "rollout": {"prompts": 16, "held_out": 50},
    "algorithm": {"epochs": 2, "minibatches": 2},
    "iterations": 25,
}
"""The lake without slipping, which a small model learns in a minute."""
WORLDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "words": ("dr-grpo", "guess-word", {}),
    "calculator": ("grpo", "calculator", {}),
    "calculator, no tool": ("grpo", "calculator", {"environment": None}),
    "lake": ("ppo", "frozen-lake", STILL),
    "lake, slippery": ("ppo", "frozen-lake", {}),
    "library": ("grpo", "library", {}),
    "dialogue": ("grpo", "orders", {}),
}
"""Method, recipe, and what is set otherwise than there."""
BESIDE = {
    "lake, control PPO": ("ppo", False),
    "lake, Q-learning": ("q-learning", False),
    "lake, slippery, control PPO": ("ppo", True),
    "lake, slippery, Q-learning": ("q-learning", True),
}
"""The same two maps, their cells as numbers: method, and whether the lake is slippery."""


def play(world: str, out: Path, folder: Path, seed: int) -> dict[str, Any]:
    """One run of a world's recipe."""
    method, name, changes = WORLDS[world]
    values = yaml.safe_load((HOME / f"{name}.yaml").read_text())
    start = out / world.partition(",")[0] / "sft/model"
    values["model"] = {"path": str(start)}
    for section, change in changes.items():
        values[section] = {**values[section], **change} if isinstance(change, dict) else change
    if values["environment"] is None:
        del values["environment"]
    every = max(values["iterations"] // 10, 1)
    values["run"] = {"eval_every": every, "save_every": values["iterations"]}
    return verb(rl, RECIPES[method], folder, seed, values)


def beside(algorithm: str, slippery: bool, folder: Path, seed: int) -> dict[str, Any]:
    """A lake under the control verb."""
    words = [f"--algorithm={algorithm}", "--env=FrozenLake-v1", f"--env_options.is_slippery={str(slippery).lower()}"]
    if algorithm == "ppo":
        words += [
            f"--iterations={200 if slippery else 60}",
            "--rollout.steps=128",
            "--settings.gamma=0.99",
            "--settings.entropy_coef=0.01",
        ]
    else:
        words += ["--settings.gamma=0.99", f"--settings.episodes={20_000 if slippery else 4000}"]
    recipe = load_recipe(recipe_class(None, words), None, words)
    return verb(control, type(recipe), folder, seed, recipe.model_dump(exclude={"run": {"dir", "seed"}}))


def main() -> None:
    parser = options(__doc__, ("start", "run", "draw"), "runs/episodes")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--only", nargs="*", default=[*WORLDS, *BESIDE])
    args = parser.parse_args()
    cells: list[tuple[Path, Callable[[], Any]]] = []
    if args.what == "start":
        for name in dict.fromkeys(only.partition(",")[0] for only in args.only):
            folder = args.out / name
            folder.mkdir(parents=True, exist_ok=True)
            cells.append((folder / "sft", partial(begin, name, folder, args.data)))
        run_cells(cells, args.minutes)
    elif args.what == "run":
        for seed in args.seeds:
            for world in [w for w in [*WORLDS, *BESIDE] if w in args.only]:
                folder = args.out / f"seed-{seed}" / world.replace(", ", "-").replace(" ", "-")
                make = (
                    partial(play, world, args.out, folder, seed)
                    if world in WORLDS
                    else partial(beside, *BESIDE[world], folder, seed)
                )
                cells.append((folder, make))
        run_cells(cells, args.minutes)
    else:
        write_page(args.out, args.docs, args.seeds)


def begin(name: str, folder: Path, data: Path) -> dict[str, Any]:
    """Writes a world's rows and trains the model that it begins from."""
    return verb(sft, sft.SFTRecipe, folder / "sft", 0, STARTS[name](folder, data))


if __name__ == "__main__":
    main()
