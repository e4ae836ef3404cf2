"""`steersman control --env CartPole-v1 --algorithm ppo`: trains, evaluates, saves, draws the learning curve."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch
from gymnasium import spaces

from steersman.atomic import write_atomic
from steersman.control.curve import learning_curves
from steersman.control.dqn import DQN
from steersman.control.envs import Worlds, maker
from steersman.control.evaluate import Video, evaluate
from steersman.control.experience import longest
from steersman.control.loop import ControlLoop
from steersman.control.recipe import TABULAR, ControlRecipe
from steersman.control.tabular import Tabular
from steersman.run.device import device_text
from steersman.run.files.ledger import StoppedError
from steersman.run.preflight import Preflight
from steersman.train.session import Session
from steersman.types import Stats, SteersmanError


def run(recipe: ControlRecipe, *, resume: bool = False) -> dict[str, Any]:
    """Trains, and leaves `policy.pt`, `curve.png` and the report in the run folder; returns its summary."""
    session = Session(
        "control", recipe, resume=resume, metric="held_out/return",
        headline=("reward/return", "length/episode", "held_out/return"),
    )  # fmt: skip
    make = maker(recipe.env, recipe.env_options)
    with session:
        state = None if recipe.algorithm in TABULAR else build(recipe, make, session.device)
        video = None if recipe.video is None else Video(recipe, Path(recipe.video))
        try:
            numbers = _tables(session, recipe, make) if state is None else _networks(session, recipe, make, state)
        except StoppedError:
            return session.summary({})
        if any("reward/return" in row for row in session.metrics()):
            learning_curves({recipe.algorithm: [session.path]}, session.path / "curve.png")
        told = "  ".join(f"{name.removeprefix('held_out/')} {x:.4g}" for name, x in numbers.items())
        session.log.note(f"{recipe.env}, {recipe.algorithm}: {told}")
        summary = session.summary(numbers)
        if state is not None and video is not None:
            session.log.note(f"video: {recipe.video}, {video.record(state, lambda: bool(session.signal))}")
        return summary


def build(recipe: ControlRecipe, make: Callable[[], gym.Env], device: torch.device) -> ControlLoop | DQN:
    """The run's state before its first step.

    Raises SteersmanError for spaces that the method can not take.
    """
    worlds = Worlds(make, recipe.rollout.copies, recipe.run.seed, "training")
    if recipe.algorithm != "dqn":
        return ControlLoop(recipe, worlds, device)
    if not isinstance(worlds.action_space, spaces.Discrete):
        raise SteersmanError(
            f"DQN takes the largest of a few action values, and {recipe.env} acts in {worlds.action_space}; use a "
            "policy-gradient method such as ppo"
        )
    if recipe.rollout.episodes is not None or recipe.rollout.normalise:
        raise SteersmanError(
            "rollout.episodes and rollout.normalise: DQN learns from single steps, old ones too, so it neither needs "
            "whole episodes nor can take observations on a scale that moves; remove them"
        )
    return DQN(recipe, worlds, device)


def _networks(
    session: Session, recipe: ControlRecipe, make: Callable[[], gym.Env], state: ControlLoop | DQN
) -> Stats:
    _preflight(session, recipe, state)
    session.begin(state, recipe.iterations)
    look = partial(_look, session, recipe, make, state, recipe.evaluation.during)
    session.make_up(look)
    for step in session.steps():
        stats = state.iteration()
        session.observe(step, stats, look=look if step % recipe.run.eval_every == 0 else None)
    state.worlds.close()
    if session.stopped:
        raise StoppedError
    buffer = io.BytesIO()
    torch.save(state.networks(), buffer)
    write_atomic(session.path / "policy.pt", buffer.getvalue())
    numbers = _look(session, recipe, make, state, recipe.evaluation.episodes)
    if not numbers:
        session.check("after the last step")
    return numbers | {"env_steps": float(state.env_steps)}


def _look(
    session: Session, recipe: ControlRecipe, make: Callable[[], gym.Env], state: ControlLoop | DQN, episodes: int
) -> Stats:
    """What the policy is worth now; no numbers where a signal asks to stop meanwhile."""
    found = evaluate(state, make, recipe, episodes, stopping=lambda: bool(session.signal))
    if not found:
        session.log.note(f"the look after step {session.step} was left out: a signal asked to stop", style="yellow")
    elif found["held_out/cut"] > 0:
        session.log.note(
            f"the look after step {session.step}: {found['held_out/cut']:.0%} of {episodes} episodes had no end and "
            f"were cut; their return is that of their first {_longest(state.worlds)}",
            style="yellow",
        )
    return found


def _longest(worlds: Worlds) -> str:
    whose = ", since the environment names no limit" if worlds.own_limit is None else ", the environment's limit"
    return f"{longest(worlds):,} steps{whose}"


def _tables(session: Session, recipe: ControlRecipe, make: Callable[[], gym.Env]) -> Stats:
    state = Tabular(recipe, make())
    session.begin(state, state.rows)
    state.learn(lambda: session.check() if session.signal else None)
    for step in session.steps():
        session.observe(step, state.row(step))
    if session.stopped:
        raise StoppedError
    return state.against_optimum(session.log.note)


def _preflight(session: Session, recipe: ControlRecipe, state: ControlLoop | DQN) -> None:
    rollout, worlds, settings = recipe.rollout, state.worlds, recipe.settings
    pre = Preflight(f"steersman control: {settings.title} ({settings.paper}) on {recipe.env}")
    pre.fact("run folder", str(session.path))
    pre.fact("device", device_text(session.device, torch.float32))
    pre.fact("observations", str(worlds.observation_space))
    pre.fact("actions", str(worlds.action_space))
    pre.fact("longest episode of a look", _longest(worlds))
    what = f"{rollout.steps} steps" if rollout.episodes is None else f"{rollout.episodes} whole episodes"
    per = f"{what} of {rollout.copies} copies" if rollout.episodes is None else f"{what} on {rollout.copies} copies"
    pre.fact("per iteration", per)
    pre.fact("iterations", recipe.iterations)
    for name, network in state.modules().items():
        if network is not None:
            pre.fact(name, f"{sum(p.numel() for p in network.parameters()):,} parameters")
    pre.show()
