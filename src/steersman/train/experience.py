"""From samples and scores to `Tokens` and a `Trajectory`: what was said, and what it was worth step by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from steersman.algorithms.base import Algorithm
from steersman.environments.config import BaselinePer, DiscountPer
from steersman.ops.masked import last_step, whiten
from steersman.recipe.on_policy import Cut, OnPolicyRecipe
from steersman.reward.shaping import kl_shaped
from steersman.types import Sample, Stats, Tokens, Trajectory


def tokens_of(samples: Sequence[Sample]) -> Tokens:
    """The samples as one right-padded batch; of each response the tokens count that its mask marks, or all."""
    support = [s.support for s in samples]
    masks = None if all(s.mask is None for s in samples) else [s.mask or [True] * len(s.ids) for s in samples]
    return Tokens.from_ids(
        [s.prompt.ids for s in samples],
        [s.ids for s in samples],
        masks,
        support=None if any(s is None for s in support) else support,  # type: ignore[arg-type]
    )


def behaviour_logp(samples: Sequence[Sample], T: int) -> Float[Tensor, "B T"]:
    """Log-probabilities recorded while sampling; 0 beyond each response."""
    logp = torch.zeros(len(samples), T)
    for b, sample in enumerate(samples):
        logp[b, : len(sample.logp)] = torch.tensor(sample.logp)
    return logp


@dataclass(frozen=True, slots=True)
class EpisodeRules:
    """How rewards and ends of episodes count.

    `cut` says what the length limit's cut is: "end", the response is judged as it stands and nothing follows;
    "bootstrap", it would have gone on, so its score is withheld, the discount stays gamma, and the critic's value
    after the last token stands for what is missing. (Paying the score and bootstrapping too counts it twice, and the
    critic, which learns from its own value there, runs away: see docs/log.md.) What an episode of several turns has
    earned by its turns is its own, cut or not: with "bootstrap" it is kept, and the value is that of what its next
    turn would have seen (`SegmentRows.values`).
    With `discount_per` "turn" gamma counts once a turn, after its last token. With `baseline_per` "turn" turns are
    numbered, and what each step was paid without the KL penalty is kept apart, for baselines that compare turn with
    turn. `whiten` scales the token rewards, KL penalty included, to unit variance and keeps their mean.
    """

    cut: Cut = "end"
    discount_per: DiscountPer = "token"
    baseline_per: BaselinePer = "episode"
    whiten: bool = False

    @classmethod
    def of(cls, recipe: OnPolicyRecipe) -> EpisodeRules:
        """The rules that a recipe's sections give."""
        cut = "end" if recipe.critic is None else recipe.critic.cut
        if recipe.environment is None:
            return cls(cut, whiten=recipe.reward.whiten)
        return cls(cut, recipe.environment.discount_per, recipe.environment.baseline_per, recipe.reward.whiten)


def trajectory(
    samples: Sequence[Sample],
    tokens: Tokens,
    score: Float[Tensor, " B"],
    algorithm: Algorithm,
    *,
    beta: float = 0.0,
    logp_old: Float[Tensor, "B T"] | None = None,
    logp_ref: Float[Tensor, "B T"] | None = None,
    judged: Float[Tensor, " B"] | None = None,
    per_token: Float[Tensor, "B T"] | None = None,
    rules: EpisodeRules = EpisodeRules(),
) -> Trajectory:
    """One row per sample: the score at the last token (or per token), the KL penalty at every token.

    `score` is the shaped score of each response, `judged` what the rewards gave before shaping. The discount is
    gamma, and 0 after the last token that counts, whatever stands behind it under the mask.
    `logp_old`, where given, is the policy's own account of the samples; what the engine recorded is then kept as
    `logp_rollout`. Otherwise the recorded log-probabilities are the old ones.
    All numbers have the precision and device of `score`.
    """
    mask, B = tokens.mask, len(samples)
    terminated = torch.tensor([s.terminated for s in samples], device=mask.device)
    if rules.cut == "bootstrap":
        kept = terminated | torch.tensor([s.turns is not None for s in samples], device=mask.device)
        score = torch.where(kept, score, torch.zeros_like(score))
        judged = None if judged is None else torch.where(kept, judged, torch.zeros_like(judged))
        per_token = None if per_token is None else torch.where(kept[:, None], per_token, 0.0)
    else:
        terminated = torch.ones_like(terminated)
    recorded = behaviour_logp(samples, mask.shape[1]).to(score)
    logp_rollout = None if logp_old is None else recorded
    logp_old = recorded if logp_old is None else logp_old
    penalty = beta if algorithm.kl_in == "reward" and logp_ref is not None else 0.0
    reward = kl_shaped(
        score,
        logp_old,
        logp_old if logp_ref is None else logp_ref,
        mask,
        penalty,
        algorithm.kl_estimator,
        per_token,
    )
    if rules.whiten:
        reward = whiten(reward, mask, shift_mean=False)
    discount = torch.full_like(reward, algorithm.gamma)
    if rules.discount_per == "turn":
        discount = torch.where(_turn_ends(samples, mask), algorithm.gamma, torch.ones_like(discount))
    last = last_step(mask).clamp(min=0)
    rows = torch.arange(B, device=mask.device)
    discount[rows, last] = algorithm.gamma * (~terminated).to(discount.dtype)
    group = torch.tensor([s.prompt.index for s in samples], device=mask.device)
    turn = paid = None
    if rules.baseline_per == "turn":
        ends = _turn_ends(samples, mask).long()
        turn, paid = ends.cumsum(1) - ends, kl_shaped(score, logp_old, logp_old, mask, 0.0, per_token=per_token)
    return Trajectory(
        mask, reward, discount, logp_old, logp_ref, None, group, logp_rollout=logp_rollout, score=score, turn=turn,
        paid=paid, judged=judged,
    )  # fmt: skip


def _turn_ends(samples: Sequence[Sample], mask: Tensor) -> Tensor:
    """True at the last token of each turn `[B, T]`; a response of one turn ends at its last token that counts."""
    ends = torch.zeros_like(mask)
    for b, (sample, last) in enumerate(zip(samples, last_step(mask).tolist(), strict=True)):
        ends[b, [turn.end - 1 for turn in sample.turns or [] if turn.end > turn.begin] or [max(last, 0)]] = True
    return ends


def length_said(samples: Sequence[Sample]) -> float:
    """Mean number of tokens that the policy said: all of an answer, and of an episode its turns alone."""
    return sum(len(s.ids) if s.turns is None else sum(s.mask or []) for s in samples) / len(samples)


def episode_stats(samples: Sequence[Sample]) -> Stats:
    """Turns per episode, tokens that the policy said, and how episodes ended (shares that add up to 1); nothing where
    there are no episodes of several turns."""
    samples = [s for s in samples if s.turns is not None]
    if not samples:
        return {}
    kinds = [s.outcome.split(" at ")[0] for s in samples]
    turns = sum(len(s.turns or []) for s in samples) / len(samples)
    stats = {"episode/turns": turns, "episode/said": length_said(samples)}
    return stats | {
        f"episode/{kind.replace(' ', '_')}": kinds.count(kind) / len(kinds) for kind in sorted(set(kinds))
    }
