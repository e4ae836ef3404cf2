"""The last stages of the on-policy loop: minibatches -> loss -> update, for actor and critic."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad

from steersman.advantage.gae import Advantage
from steersman.algorithms.base import Algorithm, Coefficients
from steersman.loss.correction import Correction
from steersman.loss.policy import clip_fraction
from steersman.loss.reduce import denominator, reduce, token_weight
from steersman.loss.value import value_loss
from steersman.model import Policy, ScalarModel, SharedCritic
from steersman.model.fast.plain import plain_layers
from steersman.ops.kl import kl_estimate, kl_loss
from steersman.ops.masked import masked_sum
from steersman.run.micro import my_micro_batches, over_rows, split_evenly
from steersman.run.ranks import ranks
from steersman.train.tally import Tally
from steersman.types import Stats, Tokens, Trajectory
from steersman.update.natural import trust_region_step
from steersman.update.optimizer import Optimizer, not_finite

Critic = ScalarModel | SharedCritic


@dataclass(slots=True)
class Learner:
    """Actor and critic with their optimisers, and the algorithm that says what their losses are.

    `temperature` is the one sampled with; `length_limit` the fixed divisor of the "episode" average.
    With a `SharedCritic` one optimiser holds everything, and the value loss counts `vf_coef` times.
    `correction` weighs the steps of a trajectory that has a `logp_rollout`.
    """

    algorithm: Algorithm
    policy: Policy
    actor: Optimizer
    critic: Critic | None = None
    critic_optimizer: Optimizer | None = None
    temperature: float = 1.0
    length_limit: float = 1.0
    micro_tokens: int = 16_384
    value_clip: float | None = None
    vf_coef: float = 0.5
    correction: Correction = field(default_factory=Correction)
    fitted: Tally | None = None
    """What `value` found of the critic's loss where it has taken its gradient already."""

    def value(self, tokens: Tokens, traj: Trajectory) -> Tensor | None:
        """Values `[B, T+1]` of the samples' states, or None without a critic.

        Where one update uses all samples once, the critic that is trained is the one that these values come from:
        its loss is taken in the same pass, and `update` then only has to step.
        """
        if self.critic is None:
            return None
        apart = len(tokens) != len(traj)  # episodes in segments: their advantages are known only once they are joined
        if isinstance(self.critic, SharedCritic) or self.algorithm.epochs * self.algorithm.minibatches > 1 or apart:
            with torch.no_grad():
                width = tokens.response.shape[1] + 1
                return over_rows(tokens, self.micro_tokens, self.critic.value, width, None if apart else traj.group)
        self.fitted = Tally()
        steps = denominator(traj.mask, "token")
        values = traj.reward.new_zeros(len(tokens), traj.mask.shape[1] + 1)
        losses = []
        for micro in my_micro_batches(tokens.length, self.micro_tokens, traj.group):
            part = traj.rows(micro.rows)
            found = self.critic.value(tokens.rows(micro.rows))
            part.value = found.detach()[:, : part.mask.shape[1] + 1]
            if micro.counts:
                values[micro.rows, : part.value.shape[1]] = part.value.to(values.dtype)
            part, advantage = _zeroed(part, self.algorithm.advantage(part))
            value = seen(found[:, :-1], part.mask)
            if value is not None and advantage.ret is not None:
                tally = self.fitted if micro.counts else Tally()
                loss = self._value_loss(value, part, advantage.ret, steps, tally)
                (loss * micro.weight).backward()
                losses.append({"value": loss.detach()})
        ranks().agree(not_finite(losses))
        return ranks().sum(values, "values")

    def update(
        self,
        tokens: Tokens,
        traj: Trajectory,
        advantage: Advantage,
        coef: Coefficients,
        generator: torch.Generator,
        *,
        only_critic: bool = False,
    ) -> Stats:
        """All epochs over one iteration's samples; returns losses, norms and how far the policy moved.

        With `only_critic` the policy stays as it is. Minibatches end before the update at which KL to the sampler
        exceeds the algorithm's `stop_kl`; `epochs` then tells how many passes were made. `kl/old` is KL(old || new)
        as a mean over the minibatches, or, for a method that steers it, measured once the updates are done.

        `ratio_gap` is the largest |logp - logp_old| before the first update: rounding, unless the rollout was
        made by something else than this policy. Raises NotFiniteError naming the loss that is not a number.
        """
        tally, stats = self.fitted or Tally(), Stats()
        traj, advantage = _zeroed(traj, advantage)
        trust_region = self.algorithm.update == "trust_region"
        with_policy = not trust_region and not only_critic
        if trust_region and not only_critic:
            stats |= self._trust_region(tokens, traj, advantage.adv, coef)
        stats |= self._epochs(tokens, traj, advantage, coef, generator, with_policy, tally)
        self.fitted = None
        stats = tally.means() | stats
        if with_policy and self.algorithm.kl_to_sampler() is not None:
            stats["kl/old"] = self.moved(tokens, traj)
        return stats

    @torch.no_grad()
    def moved(self, tokens: Tokens, traj: Trajectory) -> float:
        """KL(old || policy as it is now) in nats per token, over all the iteration's samples (k3)."""
        total = torch.zeros(())
        for micro in my_micro_batches(tokens.length, self.micro_tokens, traj.group):
            batch, part = tokens.rows(micro.rows), traj.rows(micro.rows)
            logp = seen(self.policy.logp(batch, temperature=self.temperature).logp, part.mask)
            assert logp is not None
            if micro.counts:
                total = total + masked_sum(kl_estimate(part.logp_old, logp, "k3"), part.mask).cpu()
        return float(ranks().sum(total, "KL to the sampler")) / denominator(traj.mask, "token")

    def _epochs(
        self,
        tokens: Tokens,
        traj: Trajectory,
        advantage: Advantage,
        coef: Coefficients,
        generator: torch.Generator,
        with_policy: bool,
        tally: Tally,
    ) -> Stats:
        """All minibatches of all epochs, or those before `stop_kl`; gives the last step's rates and norms."""
        stats = Stats()
        for epoch in range(self.algorithm.epochs):
            order = torch.randperm(len(tokens), generator=generator)
            for part, rows in enumerate(split_evenly(order, self.algorithm.minibatches)):
                first = epoch == 0 and part == 0
                moved = self._minibatch(tokens, traj, advantage, coef, rows, tally, first, with_policy)
                if self.algorithm.stop_kl is not None and moved > self.algorithm.stop_kl:
                    self._zero_grad()
                    return stats | {"epochs": epoch + part / self.algorithm.minibatches}
                stats |= self._step(with_policy)
        return stats

    def _minibatch(
        self,
        tokens: Tokens,
        traj: Trajectory,
        advantage: Advantage,
        coef: Coefficients,
        rows: Tensor,
        tally: Tally,
        first: bool,
        with_policy: bool,
    ) -> float:
        """Gradients of one minibatch, micro-batch by micro-batch; returns its KL to the sampler per token."""
        mask = traj.mask[rows]
        steps, policy_count = denominator(mask, "token"), denominator(mask, self.algorithm.average)
        moved, gap = torch.zeros(()), torch.zeros(())
        group = None if traj.group is None else traj.group[rows]
        found: list[dict[str, Tensor]] = []
        whole = tally
        for micro in my_micro_batches(tokens.length[rows], self.micro_tokens, group):
            index = rows[micro.rows]
            tally = whole if micro.counts else Tally()
            batch, part = tokens.rows(index), traj.rows(index)
            T = part.mask.shape[1]
            losses: dict[str, Tensor] = {}
            logp, entropy, value = (seen(x, part.mask) for x in self._forward(batch, with_policy))
            if logp is not None:
                per_step = self._policy_loss(logp, entropy, part, advantage.adv[index, :T], coef)
                weight = token_weight(part.mask, self.algorithm.average, self.length_limit, per_step.dtype)
                losses["policy"] = reduce(per_step, weight, policy_count)
                share = denominator(part.mask, self.algorithm.average)
                tally.add("loss/policy", losses["policy"] * policy_count, share)
                distance = kl_estimate(part.logp_old, logp.detach(), "k3")
                moved = moved + masked_sum(distance, part.mask).cpu() * micro.weight
                if first:
                    difference = torch.where(part.mask, (logp.detach() - part.logp_old).abs(), 0.0)
                    gap = torch.maximum(gap, difference.max().cpu())
                self._note_clipping(logp.detach(), part, tally)
            if self.critic is not None and not isinstance(self.critic, SharedCritic) and self.fitted is None:
                _backward(losses, micro.weight, found)  # the actor's activations go before the critic's come
                losses, value = {}, seen(self.critic.value(batch)[:, :-1], part.mask)
            if value is not None and advantage.ret is not None and part.value is not None:
                loss = self._value_loss(value, part, advantage.ret[index, :T], steps, tally)
                losses["value"] = loss * self.vf_coef if isinstance(self.critic, SharedCritic) else loss
            _backward(losses, micro.weight, found)
        ranks().agree(not_finite(found))
        if not with_policy:
            return 0.0
        moved = ranks().sum(moved, "KL to the sampler")
        whole.add("kl/old", moved, steps)
        if first:
            whole.add("ratio_gap", ranks().largest(gap, "the first ratio"), 1)
        return float(moved) / steps

    def _forward(self, batch: Tokens, with_policy: bool) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """log-probabilities, entropies and a shared critic's values of the response tokens, each only if needed."""
        want_entropy = self.algorithm.entropy_coef > 0
        if isinstance(self.critic, SharedCritic):
            out, value = self.critic.logp_value(batch, temperature=self.temperature, entropy=want_entropy)
            return out.logp if with_policy else None, out.entropy, value[:, :-1]
        logp = entropy = None
        if with_policy:
            out = self.policy.logp(batch, temperature=self.temperature, entropy=want_entropy)
            logp, entropy = out.logp, out.entropy
        return logp, entropy, None

    def _value_loss(self, value: Tensor, part: Trajectory, ret: Tensor, steps: float, tally: Tally) -> Tensor:
        """The critic's share of the mean over `steps`, told to the tally."""
        assert part.value is not None
        per_step = value_loss(value, part.value[:, :-1], ret, self.value_clip)
        loss = reduce(per_step, token_weight(part.mask, "token", dtype=per_step.dtype), steps)
        tally.add("loss/value", loss * steps, denominator(part.mask, "token"))
        return loss

    def _policy_loss(
        self, logp: Tensor, entropy: Tensor | None, part: Trajectory, adv: Tensor, coef: Coefficients
    ) -> Tensor:
        """The algorithm's loss with the KL term (where it belongs in the loss) and the entropy bonus.

        What is an average over sampled actions is weighted by `correction` where another policy sampled
        them; the entropy needs no action.
        """
        loss = self.algorithm.loss(logp, part, adv, coef)
        if self.algorithm.kl_in == "loss" and part.logp_ref is not None:
            loss = loss + coef.beta * kl_loss(logp, part.logp_ref, part.mask, self.algorithm.kl_estimator)
        if part.logp_rollout is not None:
            loss = loss * self.correction.weight(part.logp_old, part.logp_rollout, part.mask)
        if entropy is not None:
            loss = loss - self.algorithm.entropy_coef * entropy
        return loss

    def _note_clipping(self, logp: Tensor, part: Trajectory, tally: Tally) -> None:
        clipped = self.algorithm.clip_range()
        if clipped is not None:
            count = int(part.mask.sum())
            tally.add("clip_fraction", clip_fraction(logp, part.logp_old, part.mask, *clipped) * count, count)

    def _step(self, with_policy: bool) -> Stats:
        stats: Stats = {}
        if with_policy:
            stats |= {f"{name}/actor": x for name, x in self.actor.step().items()}
        if self.critic_optimizer is not None:
            stats |= {f"{name}/critic": x for name, x in self.critic_optimizer.step().items()}
        return stats

    def _zero_grad(self) -> None:
        self.actor.zero_grad()
        if self.critic_optimizer is not None:
            self.critic_optimizer.zero_grad()

    def _trust_region(self, tokens: Tokens, traj: Trajectory, adv: Tensor, coef: Coefficients) -> Stats:
        """TRPO's step on the actor: surrogate and exact KL over whole distributions, in micro-batches."""
        config: Any = self.algorithm
        policy_count, steps = denominator(traj.mask, config.average), denominator(traj.mask, "token")
        surrogates, distances = [], []
        for micro in my_micro_batches(tokens.length, self.micro_tokens):
            rows = micro.rows
            batch, part = tokens.rows(rows), traj.rows(rows)
            part_adv = adv[rows, : part.mask.shape[1]]
            weight = token_weight(part.mask, config.average, self.length_limit)

            def surrogate(batch=batch, part=part, part_adv=part_adv, weight=weight) -> Tensor:
                out = self.policy.logp(batch, temperature=self.temperature, entropy=config.entropy_coef > 0)
                logp, entropy = seen(out.logp, part.mask), seen(out.entropy, part.mask)
                assert logp is not None
                return reduce(self._policy_loss(logp, entropy, part, part_adv, coef), weight, policy_count)

            with torch.no_grad():
                old = self._distribution(batch)

            def distance(batch=batch, old=old) -> Tensor:
                with sdpa_kernel(SDPBackend.MATH), plain_layers():  # fused kernels have no second derivative
                    new = self._distribution(batch)
                return (old.exp() * (old - new)).sum() / steps

            surrogates.append(surrogate)
            distances.append(distance)
        stats = trust_region_step(
            self.actor.parameters,
            surrogates,
            distances,
            max_kl=config.max_kl,
            cg_steps=config.cg_steps,
            damping=config.damping,
            backtracks=config.backtracks,
            backtrack_ratio=config.backtrack_ratio,
        )
        stats["grad_norm/actor"] = stats.pop("grad_norm")
        return stats

    def _distribution(self, batch: Tokens) -> Tensor:
        """log pi(. | s) at every response token that counts, `[N, V]`, twice differentiable."""
        columns = torch.arange(batch.mask.shape[1], device=batch.mask.device)
        counts = batch.mask[columns < batch.response_length[:, None]]
        return self.policy.head().log_softmax(self.policy.hidden(batch)[counts], self.temperature)


def seen(x: Tensor | None, mask: Tensor) -> Tensor | None:
    """`x` cut to the mask's width and 0 where it is False, so that nothing there reaches a gradient, not even NaN."""
    return None if x is None else torch.where(mask, x[:, : mask.shape[1]], 0.0)


def _backward(losses: dict[str, Tensor], weight: float, found: list[dict[str, Tensor]]) -> None:
    """The gradient of their sum, `weight` times; `found` remembers them, to be asked whether they are numbers."""
    if losses:
        (torch.stack([*losses.values()]).sum() * weight).backward()
        found.append({name: loss.detach() for name, loss in losses.items()})


def _zeroed(traj: Trajectory, advantage: Advantage) -> tuple[Trajectory, Advantage]:
    """The same experience with 0 under the mask: exp of what stands there could be infinite, and 0 x inf is NaN."""
    mask = traj.mask
    value = None if traj.value is None else pad(torch.where(mask, traj.value[:, :-1], 0.0), (0, 1))
    logp_old, adv = torch.where(mask, traj.logp_old, 0.0), torch.where(mask, advantage.adv, 0.0)
    return (
        replace(
            traj,
            logp_old=logp_old,
            logp_ref=seen(traj.logp_ref, mask),
            value=value,
            logp_rollout=seen(traj.logp_rollout, mask),
        ),
        Advantage(adv, seen(advantage.ret, mask)),
    )
