"""Frozen copies of a policy whose weights follow it: a reference or a teacher that moves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from steersman.distributed.ranks import ranks
from steersman.model import Policy, as_local_shards, frozen_copy
from steersman.recipe.moving_reference import MovingReference
from steersman.recipe.sections import ModelConfig
from steersman.run.run_config import RunConfig
from steersman.setup.models import policy_from
from steersman.train.offline import put_back, trainable
from steersman.train.session import kept_state


class MovingCopy:
    """A frozen copy of a policy, and how the copy's weights follow what the policy trains: of low-rank adapters their
    two factors, each by itself."""

    def __init__(self, copy: Policy, policy: Policy, *, every: int) -> None:
        self.copy, self.policy, self.every = copy, policy, every

    def follow(self, done: int) -> None:
        """Moves the copy where that is due after `done` updates of the policy."""
        raise NotImplementedError

    def beside(self) -> dict[str, nn.Module]:
        """Weights that are held beside the copy's, by what they are."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """What a run that goes on must have of it."""
        raise NotImplementedError

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes a `state_dict` up again."""
        raise NotImplementedError

    def _weights(self) -> dict[str, Tensor]:
        """The copy's weights that the policy trains, by name."""
        trained = trainable(self.policy)
        as_local_shards(self.copy)
        return {name: p for name, p in self.copy.named_parameters() if name in trained}


class MovingAverage(MovingCopy):
    """The weights phi of a copy, which follow the policy's theta:

        phi <- decay phi + (1 - decay) theta        after every `every`-th update

    Half precision would lose steps as small as 1 - decay of a difference, so there the average is kept in float32
    (`wide`) and rounded into the copy.

    Source: arXiv 2404.09656 (TR-DPO, soft and hard update) and arXiv 2601.19897, algorithm 1, whose alpha is
    1 - decay.
    """

    def __init__(self, copy: Policy, policy: Policy, *, decay: float, every: int) -> None:
        super().__init__(copy, policy, every=every)
        self.decay = decay
        half = [p for p in self._weights().values() if p.element_size() < 4]
        self.wide = nn.ParameterList(nn.Parameter(p.float(), requires_grad=False) for p in half)

    @torch.no_grad()
    def follow(self, done: int) -> None:
        if done % self.every:
            return
        theta = trainable(self.policy)
        for name, phi in self._means().items():
            phi.lerp_(theta[name].to(phi.dtype), 1 - self.decay)
        self._round()

    def beside(self) -> dict[str, nn.Module]:
        return {"average": self.wide} if len(self.wide) else {}

    def state_dict(self) -> dict[str, Tensor]:
        return kept_state(self._means())

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        put_back(self._means(), state)
        self._round()

    def _means(self) -> dict[str, Tensor]:
        wide = iter(self.wide)
        return {name: next(wide) if p.element_size() < 4 else p for name, p in self._weights().items()}

    @torch.no_grad()
    def _round(self) -> None:
        for phi, p in zip(self._means().values(), self._weights().values(), strict=True):
            if phi is not p:
                p.copy_(phi)


class BiasCorrectedAverage(MovingCopy):
    """The weights phi of a copy, which follow the policy's theta without the lag of a moving average mu:

        mu  <- (1 - beta_t) mu + beta_t theta_t,    beta_t = (rho + gamma t)^-kappa
        phi <- mu + alpha_t (theta_t - theta_0),    alpha_t = (rho + gamma t)^-eta

    after every `every`-th update t. theta_0 and the first mu are the policy's weights when this is made, or with
    `after` (tau) above 0 those after so many updates; before the first update of phi the copy is what it was. mu and
    theta_0 are in float32 at least, and phi is rounded into the copy.

    Source: arXiv 2508.00180, algorithm 1 (BEMA), as TRL has it: t counts from the beginning of the run, also with
    `after`.
    """

    def __init__(self, copy: Policy, policy: Policy, section: MovingReference) -> None:
        super().__init__(copy, policy, every=section.every)
        self.section = section
        self.average, self.start = _wide(self._weights()), _wide(self._weights())

    @torch.no_grad()
    def follow(self, done: int) -> None:
        here, theta = self.section, trainable(self.policy)
        if done == here.after:
            for kept in (self.average, self.start):
                put_back(self._named(kept), theta)
        if done <= here.after or (done - here.after) % self.every:
            return
        age = here.lag + here.multiplier * done
        beta, alpha = age**-here.ema_power, age**-here.bias_power
        for (name, p), mu, start in zip(self._weights().items(), self.average, self.start, strict=True):
            now = theta[name].to(mu.dtype)
            mu.lerp_(now, beta)
            p.copy_(mu + alpha * (now - start))

    def beside(self) -> dict[str, nn.Module]:
        return {"average": self.average, "first weights": self.start}

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        return {name: kept_state(tensors) for name, tensors in self._kept().items()}

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        for name, tensors in self._kept().items():
            put_back(tensors, state[name])

    def _kept(self) -> dict[str, dict[str, Tensor]]:
        return {"copy": self._weights(), "average": self._named(self.average), "start": self._named(self.start)}

    def _named(self, kept: nn.ParameterList) -> dict[str, Tensor]:
        return dict(zip(self._weights(), kept, strict=True))


def _wide(weights: dict[str, Tensor]) -> nn.ParameterList:
    """Copies of the weights, in float32 at least."""
    kept = (p.detach().to(torch.promote_types(p.dtype, torch.float32)).clone() for p in weights.values())
    return nn.ParameterList(nn.Parameter(p, requires_grad=False) for p in kept)


def moving(section: MovingReference, copy: Policy, policy: Policy) -> MovingCopy:
    """The copy as it follows the policy by a recipe's section."""
    if section.kind == "ema":
        return MovingAverage(copy, policy, decay=section.decay, every=section.every)
    return BiasCorrectedAverage(copy, policy, section)


def copy_to_move(policy: Policy, config: ModelConfig, run: RunConfig) -> Policy:
    """A frozen copy of the policy as it is, which `config` has loaded: with adapters on the policy's own base, unless
    that lies in pieces."""
    if not ranks().sharded:
        return frozen_copy(policy)
    copy = policy_from(config, run, policy.device).requires_grad_(False)
    trained = trainable(policy)
    put_back({name: p for name, p in copy.named_parameters() if name in trained}, trained)
    return copy
