"""The on-policy loop: prompts -> rollout -> reward -> advantage -> minibatches -> loss -> update -> observe."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from steersman.advantage.by_turn import by_turn
from steersman.advantage.group import no_signal
from steersman.advantage.returns import values
from steersman.distributed.micro import over_rows
from steersman.loss.correction import effective_sample_size
from steersman.loss.value import explained_variance
from steersman.model import at_hand
from steersman.ops.masked import masked_mean, masked_sum
from steersman.reward import Scores
from steersman.reward.shaping import constant_note
from steersman.run.seed import stream
from steersman.train.curriculum import Curriculum
from steersman.train.experience import EpisodeRules, episode_stats, length_said, tokens_of, trajectory
from steersman.train.roles import Roles
from steersman.train.segments import SegmentRows
from steersman.types import Prompt, Sample, Stats, SteersmanError, Tokens, Trajectory
from steersman.update.kl_controller import KLCoefficients
from steersman.update.returned import advantage_of


@dataclass(slots=True)
class Observation:
    """What one iteration leaves to be logged."""

    stats: Stats
    samples: list[Sample]
    scores: Scores
    notes: list[str]


class OnPolicy:
    """One on-policy run: models, optimisers and every state that a resumed run needs."""

    def __init__(self, recipe: Any, roles: Roles, prompts: Sequence[Prompt], batches: Any) -> None:
        self.recipe, self.roles, self.prompts, self.batches = recipe, roles, prompts, batches
        self._order = batches.forever()
        by = recipe.curriculum
        self.curriculum = None if by is None else Curriculum(by, prompts, recipe.run.seed)
        self.waiting: list[int] = []
        self.optimal: dict[int, float] = {}
        """The optimal value of each prompt, by its index, for a method that asks for it."""
        self.left_out: frozenset[int] = frozenset()
        """Places of prompts that are not trained on."""
        self.algorithm = recipe.algorithm
        self.coefficients = KLCoefficients(self.algorithm, recipe.rollout.prompts * recipe.rollout.samples)
        self.moving_mean, self.moving_count = 0.0, 0
        self.done, self.whole = 0, True

    def iteration(self) -> Observation:
        """One pass through the loop."""
        clock = Clock()
        drawn, scores = self.next_samples(clock)
        require_one_without_fault(drawn)
        samples, scores = begun(drawn, scores)
        tokens, traj, shaping = self.experience(samples, scores)
        rows = SegmentRows(samples)
        traj.value, critic_loss = rows.values(self.roles.learner, tokens, traj)
        clock.lap("score")
        advantage = by_turn(partial(advantage_of, self.algorithm), traj)
        order = stream(self.recipe.run.seed, "minibatches", self.done)
        self.whole = False
        stats = self.roles.learner.update(
            rows.tokens(tokens), traj, advantage, self.coefficients.current(), order,
            segments=rows, only_critic=self.warming_up, critic_loss=critic_loss,
        )  # fmt: skip
        clock.lap("update")
        stats |= (
            shaping
            | self.observe(samples, scores, tokens, traj, advantage.ret)
            | episode_stats(drawn)
            | clock.stats(int(tokens.mask.sum()))
        )
        self.adapt(stats)
        self.done += 1
        note = constant_note(scores.total)
        return Observation(stats, samples, scores, [note] if note else [])

    @property
    def warming_up(self) -> bool:
        """Whether this iteration trains the critic alone."""
        return self.recipe.critic is not None and self.done < self.recipe.critic.warmup

    def next_prompts(self, count: int | None = None) -> list[Prompt]:
        """The next prompts of the data's order, an iteration's worth by default; none is passed over but those that
        are left out of the run. With a curriculum they are drawn by difficulty."""
        wanted: int = self.recipe.rollout.prompts if count is None else count
        if self.curriculum is not None:
            return [self.prompts[i] for i in self.curriculum.draw(wanted)]
        while len(self.waiting) < wanted:
            self.waiting += [i for i in next(self._order) if i not in self.left_out]
        taken, self.waiting = self.waiting[:wanted], self.waiting[wanted:]
        return [self.prompts[i] for i in taken]

    def next_samples(self, clock: Clock) -> tuple[list[Sample], Scores]:
        """What this iteration learns from."""
        return self.sample(self.next_prompts(), clock)

    def sample(
        self, prompts: list[Prompt], clock: Clock | None = None, number: int | None = None
    ) -> tuple[list[Sample], Scores]:
        """Responses to the prompts with their scores; groups without signal replaced where the method asks.

        `number` is that of the iteration which they are for, this one by default; it names their random streams.
        """
        for_ = self.done if number is None else number
        n, extra = self.recipe.rollout.samples, self.algorithm.resampling()
        clock = clock or Clock()
        samples, scores = self._scored(prompts, (self.recipe.run.seed, for_), clock)
        for attempt in range(extra):
            keep = with_signal(samples, scores)
            missing = len(prompts) - len(keep) // n
            if missing <= 0:
                break
            seed = (self.recipe.run.seed, for_, attempt + 1)
            more, theirs = self._scored(self.next_prompts(missing), seed, clock)
            samples = [samples[i] for i in keep] + more
            scores = _join(scores, keep, theirs)
        return samples, scores

    def _scored(self, prompts: list[Prompt], seed: tuple[int, ...], clock: Clock) -> tuple[list[Sample], Scores]:
        samples = self.roles.generate(prompts, seed=seed, n=self.recipe.rollout.samples)
        clock.lap("rollout")
        scores = self.roles.score(samples)
        clock.lap("reward")
        return samples, scores

    def experience(self, samples: list[Sample], scores: Scores) -> tuple[Tokens, Trajectory, Stats]:
        """Reference log-probabilities and baselines of the samples, and their shaped rewards.

        All of it is on the CPU: numbers of each token, from which whatever needs the device takes its part.
        The policy is taken as it was sampled from, the reference whole: what top-k, top-p, min-p, a minimum length
        or NLPO's mask cut away is part of the KL (arXiv 1909.08593, eq. 2).
        With `rollout.recompute_logp` the old log-probabilities are the policy's own, not the engine's.
        """
        roles, recipe = self.roles, self.recipe
        tokens = tokens_of(samples)
        score, stats = self.shape(samples, scores)
        like = torch.zeros((), dtype=roles.number)
        rows, T = SegmentRows(samples), tokens.mask.shape[1]
        read = rows.tokens(tokens)
        logp_old = rows.join(self._logp(roles.policy, read), T) if recipe.rollout.recompute_logp else None
        logp_ref = None
        if roles.reference is not None:
            with at_hand(roles.reference.separate):
                logp_ref = rows.join(self._logp(roles.reference, read.untruncated()), T)
        traj = trajectory(
            samples, tokens, score.to(like), self.algorithm, beta=self.coefficients.beta.coef,
            logp_old=logp_old, logp_ref=logp_ref, judged=scores.total.to(like),
            per_token=None if scores.per_token is None else scores.per_token.to(like), rules=EpisodeRules.of(recipe),
        )  # fmt: skip
        if self.algorithm.parts:
            traj.parts = scores.with_weights({k: w for k, (w, _) in roles.reward.parts.items()})
        traj.baseline = self.baseline(samples, traj)
        if self.curriculum is not None:
            asked = [s.prompt for s in samples]
            weight = self.curriculum.weight(asked)
            traj.weight = None if weight is None else weight.to(like)
            stats = stats | self.curriculum.outcome(asked, scores.total)
        return tokens, traj, stats

    @torch.no_grad()
    def _logp(self, model: Any, tokens: Tokens) -> Tensor:
        """log pi of the responses `[B, T]` at the rollout's temperature, each row on one rank."""
        return over_rows(
            tokens,
            self.recipe.run.micro_tokens,
            lambda rows: model.logp(rows, temperature=self.recipe.rollout.temperature).logp,
            tokens.response.shape[1],
        )

    def shape(self, samples: list[Sample], scores: Scores, *, update: bool = True) -> tuple[Tensor, Stats]:
        """Scores as the reward section shapes them; `update` counts them in the running mean and deviation."""
        terminated = torch.tensor([s.terminated for s in samples])
        length = torch.tensor([len(s.ids) for s in samples])
        limit = self.recipe.rollout.max_new_tokens
        return self.roles.shaping(scores.total, terminated, length, limit, update=update)

    def baseline(self, samples: list[Sample], traj: Trajectory) -> Tensor | None:
        """Greedy responses' scores (ReMax), the mean return of earlier iterations (REINFORCE), or the optimal values
        of the prompts (A*-PO)."""
        if self.algorithm.baseline == "greedy":
            prompts = list({s.prompt.index: s.prompt for s in samples}.values())
            drawn = self.roles.generate(prompts, seed=0, n=1, greedy=True)
            greedy, scores = begun(drawn, self.roles.score(drawn))
            shaped, _ = self.shape(greedy, scores, update=False)
            score = dict(zip((s.prompt.index for s in greedy), shaped.tolist(), strict=True))
            of_others = float(
                shaped.mean()
            )  # any number that the samples have no part in leaves the gradient unbiased
            return traj.reward.new_tensor([score.get(s.prompt.index, of_others) for s in samples])
        if self.algorithm.baseline == "moving":
            before = self.moving_mean
            returns = masked_sum(traj.reward, traj.mask, dim=-1)
            self.moving_count += len(returns)
            self.moving_mean += (float(returns.mean()) - before) * max(len(returns) / self.moving_count, 0.1)
            return torch.full_like(returns, before)
        if self.algorithm.baseline == "optimal":
            return traj.reward.new_tensor([self.optimal[s.prompt.index] for s in samples])
        return None

    def observe(
        self, samples: list[Sample], scores: Scores, tokens: Tokens, traj: Trajectory, ret: Tensor | None
    ) -> Stats:
        """What an iteration looked like: rewards by name, KL, entropy, ends, lengths, the critic's fit."""
        ends = [s.finish for s in samples]
        stats: Stats = {"reward/total": float(scores.total.mean())}
        stats |= {f"reward/{name}": float(part.mean()) for name, part in scores.parts.items()}
        stats |= {f"finish/{end}": ends.count(end) / len(ends) for end in ("eos", "stop", "length")}
        stats["length/mean"] = length_said(samples)
        # -log pi of a sampled token is an unbiased estimate of the entropy, and costs nothing
        stats["entropy"] = -float(masked_mean(traj.logp_old, traj.mask))
        if traj.logp_ref is not None:
            stats["kl"] = float(masked_sum(traj.logp_old - traj.logp_ref, traj.mask, dim=-1).mean())
            stats["beta"] = self.coefficients.beta.coef
        if self.algorithm.baseline == "optimal" and traj.baseline is not None:
            stats["value/optimal"] = float(traj.baseline.mean())
        if traj.logp_rollout is not None:
            stats |= self._mismatch(traj)
        if ret is not None and traj.value is not None:
            stats["explained_variance"] = float(explained_variance(values(traj)[0], ret, traj.mask))
            stats["value/mean"] = float(masked_mean(traj.value[:, :-1], traj.mask))
        return stats

    def _mismatch(self, traj: Trajectory) -> Stats:
        """How far the engine's log-probabilities are from training's, and what the weights do about it."""
        assert traj.logp_rollout is not None
        correction, logp_old, logp_rollout = self.roles.learner.correction, traj.logp_old, traj.logp_rollout
        weight = correction.weight(logp_old, logp_rollout, traj.mask)
        gap = torch.where(traj.mask, traj.logp_old - traj.logp_rollout, 0.0)
        return {
            "rollout/gap": float(gap.abs().max()),
            "rollout/weight": float(masked_mean(weight, traj.mask)),
            "rollout/capped": float(correction.bound(logp_old, logp_rollout, traj.mask)),
            "rollout/ess": float(effective_sample_size(weight, traj.mask)),
        }

    def adapt(self, stats: Stats) -> None:
        """Lets the controllers of the KL coefficients see this iteration's KL."""
        self.coefficients.adapt(stats, actor=not self.warming_up)
        self.roles.refresh(self.done + 1)

    def publish(self) -> Stats:
        """Hands the new weights to what samples."""
        return self.roles.engine.update_weights(self.done)

    def position(self) -> dict[str, Any]:
        return {**self._averages(), **self._order_now(), "roles": {"shaping": self.roles.shaping.norm.state_dict()}}

    def state_dict(self) -> dict[str, Any]:
        return {
            "done": self.done,
            **self.coefficients.state_dict(),
            **self._averages(),
            **self._order_now(),
            "roles": self.roles.state_dict(),
        }

    def _averages(self) -> dict[str, Any]:
        """What scores move as they come."""
        return {
            "moving": [self.moving_mean, self.moving_count],
            "curriculum": None if self.curriculum is None else self.curriculum.state_dict(),
        }

    def _order_now(self) -> dict[str, Any]:
        """Which prompts come next."""
        return {"batches": self.batches.state_dict(), "waiting": self.waiting}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.done = state["done"]
        self.coefficients.load_state_dict(state)
        self.moving_mean, self.moving_count = state["moving"]
        self.batches.load_state_dict(state["batches"])
        self.waiting = list(state["waiting"])
        if self.curriculum is not None:
            self.curriculum.load_state_dict(state["curriculum"])
        self.roles.load_state_dict(state["roles"])
        self.roles.engine.update_weights(self.done)


class Clock:
    """Seconds of each stage of an iteration; a stage may come several times."""

    def __init__(self) -> None:
        self.start = self.last = time.monotonic()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name] = self.laps.get(name, 0.0) + now - self.last
        self.last = now

    def stats(self, tokens: int) -> Stats:
        total = time.monotonic() - self.start
        stats = {f"time/{name}": seconds for name, seconds in self.laps.items()}
        return stats | {
            "time/iteration": total,
            "throughput/iteration": tokens / max(total, 1e-9),
            "throughput/rollout": tokens / max(self.laps.get("rollout", total), 1e-9),
        }


def begun(samples: list[Sample], scores: Scores) -> tuple[list[Sample], Scores]:
    """The samples of which any token counts, with their scores. An episode that could not begin, in which the policy
    said nothing, has no part in groups, baselines and means.

    Raises SteersmanError where that leaves none, with how the first one ended.
    """
    kept = [i for i, sample in enumerate(samples) if sample.counts]
    if not kept:
        raise SteersmanError(
            f"environment: in none of {len(samples)} episodes did the policy say anything; the first ended with "
            f"'{samples[0].outcome}'. Mend the environment or what it needs, and go on with --resume"
        )
    if len(kept) == len(samples):
        return samples, scores
    return [samples[i] for i in kept], scores.of(kept)


def require_one_without_fault(samples: Sequence[Sample]) -> None:
    """Raises SteersmanError where every one of several episodes ended by a fault of its environment: that is a
    program that does not work, and no episode that went wrong."""
    faults = [sample.outcome for sample in samples if sample.outcome.startswith("fault at ")]
    if len(faults) == len(samples) > 1:
        raise SteersmanError(
            f"environment: each of the batch's {len(samples)} episodes ended by a fault, the first with "
            f"'{faults[0]}'; nothing can be learned of them. Mend the environment (steersman check-env plays it by "
            "itself) or what it needs, and go on with --resume"
        )


def with_signal(samples: Sequence[Sample], scores: Scores) -> list[int]:
    """The places of samples in groups whose scores differ, those that could not begin left out of the comparison."""
    group, counts = torch.tensor([s.prompt.index for s in samples]), torch.tensor([s.counts for s in samples])
    silent = no_signal(scores.total[counts], group[counts])
    return torch.isin(group, group[counts][~silent]).nonzero().flatten().tolist()


def _join(scores: Scores, keep: list[int], more: Scores) -> Scores:
    """The kept rows of `scores`, then all of `more`."""
    kept, per_token = scores.of(keep), None
    if kept.per_token is not None and more.per_token is not None:
        width = max(kept.per_token.shape[1], more.per_token.shape[1])
        parts = [kept.per_token, more.per_token]
        per_token = torch.cat([torch.nn.functional.pad(p, (0, width - p.shape[1])) for p in parts])
    return Scores(
        torch.cat([kept.total, more.total]),
        {name: torch.cat([part, more.parts[name]]) for name, part in kept.parts.items()},
        per_token,
    )
