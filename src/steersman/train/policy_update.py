"""The last stages of the on-policy loop: minibatches -> loss -> update, for actor and critic."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad

from steersman.advantage.gae import Advantage
from steersman.algorithms.base import Algorithm, Coefficients
from steersman.distributed.micro import Part, my_micro_batches, over_rows
from steersman.distributed.ranks import ranks
from steersman.loss.correction import Correction
from steersman.loss.masks import top_entropy
from steersman.loss.reduce import counted, denominator, reduce, token_weight
from steersman.loss.value import value_loss
from steersman.model import Policy, ScalarModel, SharedCritic
from steersman.model.fast.plain import plain_layers
from steersman.model.layout import masked_indices
from steersman.ops.kl import kl_estimate
from steersman.ops.masked import masked_sum
from steersman.train.tally import Tally
from steersman.types import Stats, Tokens, Trajectory, send
from steersman.update.on_policy import Problem, clipped_steps, dropped, learn, policy_loss, step_both, zero_both
from steersman.update.optimizer import Optimizer, not_finite
from steersman.update.returned import advantage_of

if TYPE_CHECKING:
    from steersman.train.segments import SegmentRows

Critic = ScalarModel | SharedCritic


class Values(NamedTuple):
    """Values `[B, T+1]`, None without a critic; and the critic's loss, if its gradient was taken in that pass."""

    value: Tensor | None
    critic_loss: Tally | None = None


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

    def value(self, tokens: Tokens, traj: Trajectory, *, at_once: bool = True) -> Values:
        """What the critic says of the samples' states.

        Where one update uses all samples once, and `at_once` says that advantages need no more than these values, the
        critic that is trained is the one that they come from: its loss is taken in the same pass, and `update`, which
        is given `critic_loss`, then only has to step.
        """
        if self.critic is None:
            return Values(None)
        if self.critic.shares_trunk or self.algorithm.epochs * self.algorithm.minibatches > 1 or not at_once:
            return Values(self.read_values(tokens, traj.group if len(tokens) == len(traj) else None))
        critic_loss, steps = Tally(), denominator(traj.mask, "token")
        values = traj.reward.new_zeros(len(tokens), traj.mask.shape[1] + 1)
        losses = []
        for micro in my_micro_batches(tokens.length, self.micro_tokens, traj.group):
            part = traj.rows(micro.rows)
            read = self.critic.value(tokens.rows(micro.rows))
            part.value = read.detach()[:, : part.mask.shape[1] + 1].cpu()
            if micro.counts:
                values[micro.rows, : part.value.shape[1]] = part.value.to(values.dtype)
            count = counted(part.mask, "token")
            part, advantage = _zeroed(part, advantage_of(self.algorithm, part, finite=False))
            part, advantage = part.to(read.device), advantage.to(read.device)
            value = unmasked(read[:, :-1], part.mask)
            if value is not None and advantage.ret is not None:
                told = critic_loss if micro.counts else Tally()
                loss = self.value_loss(value, part, advantage.ret, steps, told, count)
                (loss * micro.weight).backward()
                losses.append({"value": loss.detach()})
        ranks().agree(not_finite(losses))
        return Values(ranks().sum(values, "values"), critic_loss)

    @torch.no_grad()
    def read_values(self, tokens: Tokens, group: Tensor | None = None) -> Tensor:
        """The critic's values `[B, T+1]` of any rows."""
        assert self.critic is not None
        return over_rows(tokens, self.micro_tokens, self.critic.value, tokens.response.shape[1] + 1, group)

    @torch.no_grad()
    def read_entropy(self, tokens: Tokens, group: Tensor | None = None) -> Tensor:
        """The policy's entropies `[B, T]` in nats, where the responses' tokens were sampled."""

        def entropy(rows: Tokens) -> Tensor:
            found = self.policy.logp(rows, temperature=self.temperature, entropy=True).entropy
            assert found is not None
            return found

        return over_rows(tokens, self.micro_tokens, entropy, tokens.response.shape[1], group)

    @torch.no_grad()
    def read_logp(self, tokens: Tokens) -> Tensor:
        """The policy's log-probabilities `[B, T]` as they are now."""

        def logp(rows: Tokens) -> Tensor:
            return self.policy.logp(rows, temperature=self.temperature).logp

        return over_rows(tokens, self.micro_tokens, logp, tokens.response.shape[1])

    def update(
        self,
        tokens: Tokens,
        traj: Trajectory,
        advantage: Advantage,
        coef: Coefficients,
        generator: torch.Generator,
        *,
        segments: SegmentRows | None = None,
        only_critic: bool = False,
        critic_loss: Tally | None = None,
    ) -> Stats:
        """All epochs over one iteration's samples; returns losses, norms and how far the policy moved.

        A row of `traj` is an episode, of which `tokens` has one row, or those that `segments` tells of: a model reads
        these, and minibatches and losses are of episodes all the same.
        With `only_critic` the policy stays as it is; with `critic_loss` the critic has its gradient already, from
        `value`, and is updated before the actor is read, so that their gradients do not lie in memory together; a
        `stop_kl` may yet call the update off, and has it wait. Where `learn` measures no `kl/old` after the updates,
        it is a mean over the minibatches.

        `ratio_gap` is the largest |logp - logp_old| before the first update: rounding, unless the rollout was
        made by something else than this policy. Raises NotFiniteError naming the loss that is not a number.
        With the method's `top_entropy` each update of the policy learns from the steps of its minibatch at which the
        policy was least sure before the first one.
        """
        traj, advantage = _zeroed(traj, advantage)
        batch = LanguageBatch(self, tokens, traj, advantage, coef, critic_loss=critic_loss, segments=segments)
        if self.algorithm.top_entropy < 1 and not only_critic:
            batch.read_entropy()
        first = Stats()
        if critic_loss is not None and self.algorithm.stop_kl is None:
            first = batch.step(actor=False)
            batch.critic = None  # has moved
        stats = learn(self.algorithm, batch, generator, actor=not only_critic)
        return batch.tally.means() | first | stats

    def value_loss(
        self, value: Tensor, part: Trajectory, ret: Tensor, steps: float, tally: Tally, count: int
    ) -> Tensor:
        """The critic's share of the mean over `steps`, told to the tally as that of `count` of them."""
        assert part.value is not None
        per_step = value_loss(value, part.value[:, :-1], ret, self.value_clip)
        loss = reduce(per_step, token_weight(part.mask, "token", dtype=per_step.dtype), steps)
        tally.add("loss/value", loss * steps, count)
        return loss


class Read(NamedTuple):
    """A micro-batch: the rows that a model reads, and the episodes that these are of, wholly or in part.

    `first` [episodes] is True where an episode's first row is among them, so that it is counted once.
    """

    micro: Part
    rows: Tensor
    episodes: Tensor
    first: Tensor


class LanguageBatch:
    """One iteration's responses, in micro-batches, beside actor and critic.

    A response is an episode of one row or of several `segments`. A loss is given episodes whole: of one whose rows
    are not all in one micro-batch, the steps that stand in others come from a reading without gradients. Each
    micro-batch then has the exact gradient with respect to its own steps, and those of all add up to the whole.
    """

    def __init__(
        self,
        learner: Learner,
        tokens: Tokens,
        traj: Trajectory,
        advantage: Advantage,
        coef: Coefficients,
        *,
        critic_loss: Tally | None = None,
        segments: SegmentRows | None = None,
    ) -> None:
        self.learner, self.algorithm = learner, learner.algorithm
        self.tokens, self.traj, self.advantage, self.coef = tokens, traj, advantage, coef
        self.critic_is_due, self.critic = critic_loss is None, learner.critic_optimizer
        self.tally = Tally() if critic_loss is None else critic_loss
        self.segments = segments if segments is not None and segments.apart else None
        self.entropy: Tensor | None = None

    def __len__(self) -> int:
        return len(self.traj)

    def read_entropy(self) -> None:
        """Reads the entropies `[B, T]` that `top_entropy` goes by."""
        if self.segments is None:
            self.entropy = self.learner.read_entropy(self.tokens, self.traj.group)
        else:
            found = self.learner.read_entropy(self.tokens)
            self.entropy = self.segments.join(found, self.traj.mask.shape[1])

    def gradients(self, rows: Tensor, *, actor: bool, first: bool) -> float:
        """Gradients of one minibatch, micro-batch by micro-batch."""
        learner, traj, advantage, average = self.learner, self.traj, self.advantage, self.algorithm.average
        taught = torch.zeros_like(traj.mask)
        taught[rows] = self._taught(rows)
        steps, policy_count = denominator(traj.mask[rows], "token"), denominator(taught[rows], average)
        device = learner.policy.device
        moved, gap = torch.zeros((), device=device), torch.zeros((), device=device)
        seen_losses: list[dict[str, Tensor]] = []
        reads = self._reads(rows)
        elsewhere = self._read_in_parts(reads) if actor else None
        for read in reads:
            micro, index = read.micro, read.episodes
            tally = self.tally if micro.counts else Tally()
            batch, own = self.tokens.rows(read.rows), traj.rows(index)
            part, T = own.to(device), own.mask.shape[1]
            own_held, own_taught = self._held(read, batch, own), taught[index, :T]
            held, count = send(own_held, device), counted(own_held, "token")
            losses: dict[str, Tensor] = {}
            found_logp, found_entropy, found_value = self._forward(batch, actor)
            logp = self._whole(found_logp, read, batch, part, elsewhere)
            entropy, value = (self._whole(x, read, batch, part) for x in (found_entropy, found_value))
            if logp is not None:
                adv = send(advantage.adv[index, :T], device)
                per_step = self._policy_loss(logp, entropy, part, adv)
                weight = token_weight(send(own_taught, device), average, learner.length_limit, per_step.dtype)
                losses["policy"] = reduce(per_step, weight, policy_count)
                told = own_taught & own_held if average == "token" else own_taught[read.first]
                tally.add("loss/policy", reduce(per_step.detach(), weight * held, 1), counted(told, average))
                distance = kl_estimate(part.logp_old, logp.detach(), "k3")
                moved = moved + masked_sum(distance, held) * micro.weight
                if first:
                    difference = torch.where(held, (logp.detach() - part.logp_old).abs(), 0.0)
                    gap = torch.maximum(gap, difference.max())
                for name, left_out in self._left_out(logp.detach(), part, adv).items():
                    tally.add(name, (left_out & held).sum(), count)
            critic = learner.critic
            if critic is not None and not critic.shares_trunk and self.critic_is_due:
                _backward(losses, micro.weight, seen_losses)  # the actor's activations go before the critic's come
                losses, value = {}, self._whole(critic.value(batch)[:, :-1], read, batch, part)
            if critic is not None and value is not None and advantage.ret is not None and part.value is not None:
                ret, read_here = send(advantage.ret[index, :T], device), replace(part, mask=held)
                loss = learner.value_loss(value, read_here, ret, steps, tally, count)
                losses["value"] = loss * learner.vf_coef if critic.shares_trunk else loss
            _backward(losses, micro.weight, seen_losses)
        ranks().agree(not_finite(seen_losses))
        if not actor:
            return 0.0
        # in one precision on every rank, whether it had a row or not
        moved, gap = torch.stack([moved, gap.to(moved.dtype)]).cpu().double()
        moved = ranks().sum(moved, "KL to the sampler")
        self.tally.add("kl/old", moved, steps)
        if first:
            self.tally.add("ratio_gap", ranks().largest(gap, "the first ratio"), 1)
        return float(moved) / steps

    def step(self, *, actor: bool) -> Stats:
        return step_both(self.learner.actor, self.critic, with_actor=actor)

    def zero_grad(self) -> None:
        zero_both(self.learner.actor, self.critic)

    @torch.no_grad()
    def moved(self) -> float:
        learner = self.learner
        total = torch.zeros((), device=learner.policy.device)
        for read in self._reads(torch.arange(len(self))):
            batch, own = self.tokens.rows(read.rows), self.traj.rows(read.episodes)
            part, held = own.to(total.device), send(self._held(read, batch, own), total.device)
            found = learner.policy.logp(batch, temperature=learner.temperature).logp
            logp = self._whole(found, read, batch, part)
            assert logp is not None
            if read.micro.counts:
                total = total + masked_sum(kl_estimate(part.logp_old, logp, "k3"), held)
        return float(ranks().sum(total.cpu().double(), "KL to the sampler")) / denominator(self.traj.mask, "token")

    def problem(self) -> Problem:
        """Surrogate and exact KL over whole distributions, in micro-batches of whole episodes."""
        learner, traj, average = self.learner, self.traj, self.algorithm.average
        taught = self._taught(torch.arange(len(self)))
        policy_count, steps = denominator(taught, average), denominator(traj.mask, "token")
        surrogates, distances = [], []
        for read in self._whole_reads():
            batch, part = self.tokens.rows(read.rows), traj.rows(read.episodes).to(learner.policy.device)
            part_adv = send(self.advantage.adv[read.episodes, : part.mask.shape[1]], part.mask.device)
            part_taught = send(taught[read.episodes, : part.mask.shape[1]], part.mask.device)
            weight = token_weight(part_taught, average, learner.length_limit)

            def surrogate(read=read, batch=batch, part=part, part_adv=part_adv, weight=weight) -> Tensor:
                logp, entropy, _ = (self._whole(x, read, batch, part) for x in self._forward(batch, True))
                assert logp is not None
                return reduce(self._policy_loss(logp, entropy, part, part_adv), weight, policy_count)

            with torch.no_grad():
                old = self._distribution(batch)

            def distance(batch=batch, old=old) -> Tensor:
                with sdpa_kernel(SDPBackend.MATH), plain_layers():  # fused kernels have no second derivative
                    new = self._distribution(batch)
                return (old.exp() * (old - new)).sum() / steps

            surrogates.append(surrogate)
            distances.append(distance)
        return Problem(learner.actor.parameters, surrogates, distances)

    def _reads(self, episodes: Tensor) -> list[Read]:
        """This rank's micro-batches of these episodes. The rows of an episode stand together where they fit."""
        length, most, segments = self.tokens.length, self.learner.micro_tokens, self.segments
        if segments is None:
            group = None if self.traj.group is None else self.traj.group[episodes]
            return [_alone(micro, episodes) for micro in my_micro_batches(length[episodes], most, group)]
        rows = segments.rows_of(episodes)
        parts = my_micro_batches(length[rows], most, segments.owner[rows])
        return [self._read(micro, rows[micro.rows]) for micro in parts]

    def _whole_reads(self) -> list[Read]:
        """This rank's micro-batches of all episodes, none of which is in two."""
        length, most, segments = self.tokens.length, self.learner.micro_tokens, self.segments
        if segments is None:
            return [_alone(micro, torch.arange(len(self))) for micro in my_micro_batches(length, most)]
        longest = torch.zeros(len(self), dtype=length.dtype).scatter_reduce(0, segments.owner, length, "amax")
        parts = my_micro_batches(longest * segments.owner.bincount(), most)
        return [self._read(micro, segments.rows_of(micro.rows)) for micro in parts]

    def _read(self, micro: Part, rows: Tensor) -> Read:
        """What these rows of segments are of."""
        assert self.segments is not None
        owner = self.segments.owner
        episodes = owner[rows].unique()
        return Read(micro, rows, episodes, torch.isin(episodes, owner[rows[self.segments.leads[rows]]]))

    def _held(self, read: Read, batch: Tokens, own: Trajectory) -> Tensor:
        """The steps that count of the micro-batch's episodes `[b, T]`, those that are read in it."""
        if self.segments is None:
            return own.mask
        return self.segments.put(batch.mask, batch.mask, read.rows, torch.zeros_like(own.mask))

    def _whole(
        self, x: Tensor | None, read: Read, batch: Tokens, part: Trajectory, elsewhere: Tensor | None = None
    ) -> Tensor | None:
        """What a model read of rows, as steps of their episodes `[b, T]`: 0 where none counts, and `elsewhere`'s at
        what is read in other micro-batches."""
        if x is None or self.segments is None:
            return unmasked(x, part.mask)
        into = torch.zeros_like(part.mask, dtype=x.dtype)
        if elsewhere is not None:
            into = send(elsewhere[read.episodes, : part.mask.shape[1]], x.device).to(x.dtype)
        return self.segments.put(x, batch.mask, read.rows, into)

    def _read_in_parts(self, reads: list[Read]) -> Tensor | None:
        """log pi as it is now `[B, T]` of the episodes whose rows are in several micro-batches, of any rank; 0 of all
        others. None where there are none."""
        segments = self.segments
        if segments is None:
            return None
        mine = [e for read in reads for e in read.episodes[~self._complete(read)].tolist()]
        found = sorted({e for of_rank in ranks().gather(mine, "episodes in parts") for e in of_rank})
        if not found:
            return None
        rows = segments.rows_of(torch.tensor(found))
        batch = self.tokens.rows(rows)
        logp, out = self.learner.read_logp(batch), torch.zeros_like(self.traj.logp_old)
        out[found] = segments.put(logp.to(out), batch.mask, rows, out[found])
        return out

    def _complete(self, read: Read) -> Tensor:
        """Which of the micro-batch's episodes have all their rows in it."""
        assert self.segments is not None
        here = self.segments.owner[read.rows].bincount(minlength=len(self))
        return (here == self.segments.owner.bincount(minlength=len(self)))[read.episodes]

    def _taught(self, rows: Tensor) -> Tensor:
        """The steps `[b, T]` of these rows, one update's, that the policy learns from."""
        mask = self.traj.mask[rows]
        return mask if self.entropy is None else top_entropy(self.entropy[rows], mask, self.algorithm.top_entropy)

    def _forward(self, batch: Tokens, actor: bool) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """log-probabilities, entropies and a shared critic's values of the response tokens, each only if needed."""
        learner, want_entropy = self.learner, self.algorithm.entropy_coef > 0
        critic = learner.critic
        if critic is not None and critic.shares_trunk is True:
            out, value = critic.logp_value(batch, temperature=learner.temperature, entropy=want_entropy)
            return out.logp if actor else None, out.entropy, value[:, :-1]
        if not actor:
            return None, None, None
        out = learner.policy.logp(batch, temperature=learner.temperature, entropy=want_entropy)
        return out.logp, out.entropy, None

    def _policy_loss(self, logp: Tensor, entropy: Tensor | None, part: Trajectory, adv: Tensor) -> Tensor:
        correction = self.learner.correction
        return policy_loss(self.algorithm, logp, part, adv, self.coef, entropy=entropy, correction=correction)

    def _left_out(self, logp: Tensor, part: Trajectory, adv: Tensor) -> dict[str, Tensor]:
        """The steps `[b, T]` whose ratio is clipped, and those that are too far from the sampler, by name."""
        found = {"clip_fraction": clipped_steps(self.algorithm, logp, part)}
        found["off_policy_fraction"] = dropped(self.algorithm, logp, part, adv)
        return {name: steps for name, steps in found.items() if steps is not None}

    def _distribution(self, batch: Tokens) -> Tensor:
        """log pi(. | s) at every response token that counts, `[N, V]`, twice differentiable."""
        policy, columns = self.learner.policy, torch.arange(batch.mask.shape[1])
        counts = batch.mask[columns < batch.response_length[:, None]]
        hidden = policy.hidden(batch)
        return policy.head().log_softmax(hidden[masked_indices(counts, hidden.device)], self.learner.temperature)


def _alone(micro: Part, episodes: Tensor) -> Read:
    """Of episodes that are a row each."""
    rows = episodes[micro.rows]
    return Read(micro, rows, rows, torch.ones_like(rows, dtype=torch.bool))


def unmasked(x: Tensor | None, mask: Tensor) -> Tensor | None:
    """`x` cut to the mask's width and 0 where it is False, so that nothing there reaches a gradient, not even NaN."""
    return None if x is None else torch.where(mask, x[:, : mask.shape[1]], 0.0)


def _backward(losses: dict[str, Tensor], weight: float, kept: list[dict[str, Tensor]]) -> None:
    """The gradient of their sum, `weight` times; they are added to `kept`, to be asked whether they are numbers."""
    if losses:
        (torch.stack([*losses.values()]).sum() * weight).backward()
        kept.append({name: loss.detach() for name, loss in losses.items()})


def _zeroed(traj: Trajectory, advantage: Advantage) -> tuple[Trajectory, Advantage]:
    """The same experience with 0 under the mask: exp of what stands there could be infinite, and 0 x inf is NaN."""
    mask = traj.mask
    value = None if traj.value is None else pad(torch.where(mask, traj.value[:, :-1], 0.0), (0, 1))
    logp_old, adv = torch.where(mask, traj.logp_old, 0.0), torch.where(mask, advantage.adv, 0.0)
    ref, rollout = unmasked(traj.logp_ref, mask), unmasked(traj.logp_rollout, mask)
    zeroed = replace(traj, logp_old=logp_old, logp_ref=ref, value=value, logp_rollout=rollout)
    return zeroed, Advantage(adv, unmasked(advantage.ret, mask))
