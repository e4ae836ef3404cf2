"""`steersman check-env my_env.py:Env`: tries an environment before anything is trained in it."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from steersman.algorithms import ALGORITHMS
from steersman.algorithms.base import Coefficients
from steersman.config.sections import Section, key_names
from steersman.data import DataConfig, encode_prompts, episode_rows, keys_of_other_kinds, layout
from steersman.environments.check import Findings, try_episodes
from steersman.environments.config import EnvironmentConfig, open_environment
from steersman.environments.port import Environment
from steersman.guards.terminal import printable
from steersman.loss.reduce import denominator, reduce, token_weight
from steersman.model import Policy, context_length
from steersman.recipe.sections import LEARNED_ONLY, ModelConfig, RolloutConfig
from steersman.reward.episodes import EpisodeReward
from steersman.run.console import new_console
from steersman.run.run_config import KEPT_ONLY, RunConfig, device_of
from steersman.setup.generators import open_episodes, open_generator
from steersman.setup.models import policy_from
from steersman.train.experience import tokens_of, trajectory
from steersman.train.segments import SegmentRows
from steersman.types import Prompt, Sample, SteersmanError

LARGEST_GAP = {torch.float32: 1e-3, torch.float16: 0.15, torch.bfloat16: 1.0}
"""Nats by which rounding may part the log-probability of one token while sampling from that in training, by the
precision of the weights. In bfloat16 the same model's forward passes over other batches differ by 0.3 at the worst of
some hundred tokens."""


class CheckEnvRecipe(Section):
    """What is tried, and how often."""

    environment: EnvironmentConfig
    data: DataConfig | None = Field(default=None, description="rows that episodes begin with; null: one empty row")
    model: ModelConfig | None = Field(default=None, description="the model that is to play; null: no model plays")
    rollout: RolloutConfig = RolloutConfig(max_new_tokens=16)
    episodes: int = Field(default=16, ge=1, description="episodes of each player")
    reward_low: float = Field(default=-1e16, description="least reward that a turn may pay")
    reward_high: float = Field(default=1e16, description="largest reward that a turn may pay")
    run: RunConfig = RunConfig()

    @classmethod
    def unread_keys(cls) -> frozenset[str]:
        return keys_of_other_kinds("query") | key_names(
            model=("max_shard_size", "merge", "save_dtype", "offload_activations"),
            run=KEPT_ONLY,
            rollout=("prompts", "samples", "held_out", *LEARNED_ONLY),
            data=("max_length", "mix", "shuffle"),
            environment=("baseline_per", "discount_per"),
        )


def run(recipe: CheckEnvRecipe) -> dict[str, Any]:
    """Prints one page of findings. Raises SteersmanError, after printing, where something must be mended."""
    environment = open_environment(recipe.environment)
    rows = _rows(recipe)
    found = try_episodes(
        environment, rows, episodes=recipe.episodes, max_turns=recipe.environment.max_turns,
        time_limit=recipe.environment.time_limit, low=recipe.reward_low, high=recipe.reward_high,
    )  # fmt: skip
    if recipe.model is not None:
        with ExitStack() as stack:
            _with_model(recipe, environment, rows, found, stack)
    _print(environment, found)
    if found.wrong:
        raise SteersmanError(f"check-env: {len(found.wrong)} to mend: " + "; ".join(found.wrong))
    return {"wrong": found.wrong, "notes": found.notes, "facts": found.facts}


def _rows(recipe: CheckEnvRecipe) -> list[Prompt]:
    if recipe.data is None:
        return [Prompt([0], "", {}, 0, [])]
    queries = episode_rows(recipe.data).train[: recipe.episodes]
    turns = [[{"role": "user", "content": q.prompt}] if isinstance(q.prompt, str) else q.prompt for q in queries]
    return [Prompt([0], "", q.columns, i, t) for i, (q, t) in enumerate(zip(queries, turns, strict=True))]


def _with_model(
    recipe: CheckEnvRecipe, environment: Environment, rows: list[Prompt], found: Findings, stack: ExitStack
) -> None:
    """What only a model can show: its template, its tokens, what it earns, and that nothing heard reaches a loss."""
    assert recipe.model is not None
    data = recipe.data or DataConfig(path="")
    policy = policy_from(recipe.model, recipe.run, device_of(recipe.run))
    if recipe.data is not None:
        queries = episode_rows(data).train[: recipe.episodes]
        context = context_length(policy.model)
        rows, _, _ = encode_prompts(queries, layout(policy, data), data, context, recipe.rollout.max_new_tokens)
    rows = [Prompt(r.ids, r.text, r.row, i, r.turns or [{"role": "user", "content": ""}]) for i, r in enumerate(rows)]
    try:
        generator = open_generator(recipe.rollout, policy)
        stack.callback(generator.close)
        play = open_episodes(recipe.environment, environment, data, recipe.rollout, policy, generator)
        play.prepare(max(len(row.ids) for row in rows) + recipe.rollout.max_new_tokens)
    except SteersmanError as error:
        found.wrong.append(str(error))
        return
    sampling, many = recipe.rollout.sampling(), (rows * recipe.episodes)[: recipe.episodes]
    sampled = play.generate(many, sampling, seed=recipe.run.seed, record_support=True)
    greedy = play.generate(many, sampling.as_greedy(), seed=recipe.run.seed)
    again = play.generate(many, sampling.as_greedy(), seed=recipe.run.seed)
    if [s.ids for s in greedy] != [s.ids for s in again]:
        found.notes.append("the model's greedy episodes differ from one time to the next")
    found.wrong += [
        f"the model's episode ended so: {s}" for s in {x.outcome for x in sampled if "fault" in x.outcome}
    ]
    found.wrong += _inexact(policy, sampled, recipe.rollout.temperature)
    for name, samples in (("the model", sampled), ("the greedy model", greedy)):
        totals = [sum(t.reward for t in s.turns or []) for s in samples]
        turns = sum(len(s.turns or []) for s in samples) / len(samples)
        found.facts[f"{name} earns"] = f"{sum(totals) / len(totals):.3g} on average, in {turns:.1f} turns"
    longest = max(len(s.prompt.ids) + len(s.ids) for s in sampled)
    found.facts["longest episode"] = f"{longest} tokens, of {play.limit} that fit"
    found.facts["ends"] = ", ".join(sorted({s.outcome for s in sampled}))


def _inexact(policy: Policy, samples: list[Sample], temperature: float) -> list[str]:
    """Where sampled tokens are not those that are trained on, or what was heard reaches a loss."""
    wrong = []
    tokens, rows = tokens_of(samples), SegmentRows(samples)
    with torch.no_grad():
        logp = rows.join(policy.logp(rows.tokens(tokens), temperature=temperature).logp.cpu(), tokens.mask.shape[1])
    recorded = trajectory(samples, tokens, torch.zeros(len(samples)), ALGORITHMS["grpo"]()).logp_old
    gaps = (logp - recorded).abs()[tokens.mask]
    precision: Any = next(policy.model.parameters()).dtype
    most = LARGEST_GAP.get(precision, LARGEST_GAP[torch.bfloat16]) / min(temperature, 1.0)
    if len(gaps) and not float(gaps.max()) <= most:
        wrong.append(
            f"log-probabilities while sampling and in training differ by up to {gaps.max():.2g} nats, and rounding "
            f"in {str(precision).removeprefix('torch.')} explains {most:.2g}"
        )
    for s in samples:
        said = sum(t.end - t.begin for t in s.turns or [])
        if s.turns and sum(s.mask or []) != said:
            wrong.append(f"{sum(s.mask or [])} tokens count where {said} were said")
    grad, junk = (_gradient(samples, tokens, logp, fill) for fill in (0.0, 30.0))
    if not torch.equal(grad, junk):
        wrong.append("what the environment said reaches the loss")
    return wrong


def _gradient(samples: list[Sample], tokens: Any, logp: Tensor, fill: float) -> Tensor:
    """The gradient of GRPO's loss by the log-probabilities, with `fill` wherever the environment spoke."""
    algorithm = ALGORITHMS["grpo"]()
    scores = EpisodeReward("episode").score(samples)
    assert scores.per_token is not None
    pay = scores.per_token.to(logp.device)[:, : tokens.mask.shape[1]]
    pay = torch.where(tokens.mask, pay, fill)
    traj = trajectory(samples, tokens, scores.total.to(logp.device), algorithm, per_token=pay)
    traj.logp_old = torch.where(tokens.mask, traj.logp_old, -fill)
    free = torch.where(tokens.mask, logp[:, : tokens.mask.shape[1]], fill).detach().requires_grad_()
    loss = algorithm.loss(free, traj, algorithm.advantage(traj).adv, Coefficients())
    total = reduce(loss, token_weight(traj.mask, algorithm.average), denominator(traj.mask, algorithm.average))
    return torch.autograd.grad(total, free)[0]


def _print(environment: Environment, found: Findings) -> None:
    console = new_console()
    console.print(f"steersman check-env: {printable(environment.describe())}", style="bold", soft_wrap=True)
    for name, value in found.facts.items():
        console.print(f"  {name:<24}{printable(value)}", soft_wrap=True)
    for note in found.notes:
        console.print(f"  note   {printable(note)}", style="yellow", soft_wrap=True)
    for fault in found.wrong:
        console.print(f"  wrong  {printable(fault)}", style="red", soft_wrap=True)
    if not found.wrong:
        console.print("  nothing to mend", style="green")
