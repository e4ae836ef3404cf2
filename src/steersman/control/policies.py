"""Multilayer perceptrons: policies over discrete and continuous actions, values, and action values.

Sampling takes its noise from a generator on the CPU, so that a run does not depend on the device it is drawn on.
"""

from __future__ import annotations

import itertools
import math

import torch
from gymnasium import spaces
from jaxtyping import Float
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal

from steersman.config.sections import Section


class NetworkConfig(Section):
    """The shape of the perceptrons; policy and critic share no weights."""

    hidden: list[PositiveInt] = Field(default=[64, 64], min_length=1, description="widths of the hidden layers")
    activation: str = Field(default="tanh", pattern="^(tanh|relu)$", description="tanh or relu")
    log_std: float = Field(default=0.0, description="initial log of the standard deviation of continuous actions")


ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU}


def perceptron(inputs: int, outputs: int, config: NetworkConfig, gain: float) -> nn.Sequential:
    """Linear layers with orthogonal weights (gain sqrt(2), the last one `gain`) and zero biases."""
    widths = [inputs, *config.hidden, outputs]
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(itertools.pairwise(widths)):
        last = i == len(widths) - 2
        linear = nn.Linear(a, b)
        nn.init.orthogonal_(linear.weight, gain if last else math.sqrt(2))
        nn.init.zeros_(linear.bias)
        layers += [linear] if last else [linear, ACTIVATIONS[config.activation]()]
    return nn.Sequential(*layers)


class CategoricalPolicy(nn.Module):
    """pi(a | s) = softmax(net(s))."""

    def __init__(self, inputs: int, actions: int, config: NetworkConfig) -> None:
        super().__init__()
        self.net = perceptron(inputs, actions, config, gain=0.01)

    def distribution(self, obs: Float[Tensor, "M D"]) -> Distribution:
        return Categorical(logits=self.net(obs), validate_args=False)

    def sample(self, obs: Float[Tensor, "M D"], generator: torch.Generator) -> Tensor:
        """Gumbel-max: argmax(logits - log(-log(u))) is a draw from the softmax."""
        logits = self.net(obs)
        noise = torch.rand(logits.shape, generator=generator).clamp(min=1e-20).to(logits.device)
        return (logits - (-noise.log()).log()).argmax(-1)

    def mode(self, obs: Float[Tensor, "M D"]) -> Tensor:
        return self.net(obs).argmax(-1)


class GaussianPolicy(nn.Module):
    """pi(a | s) = N(net(s), exp(log_std)^2) per dimension, log_std the same in all states.

    Actions are in units of the action box, -1 to 1, where it is bounded. They are clipped to it only on the way
    into the environment and not squashed: the log-probability is that of the unclipped action, which is exact for
    the policy that acts, at the price that actions beyond the edge all do the same.
    """

    def __init__(self, inputs: int, actions: int, config: NetworkConfig) -> None:
        super().__init__()
        self.net = perceptron(inputs, actions, config, gain=0.01)
        self.log_std = nn.Parameter(torch.full((actions,), config.log_std))

    def distribution(self, obs: Float[Tensor, "M D"]) -> Distribution:
        return Independent(Normal(self.net(obs), self.log_std.exp(), validate_args=False), 1, validate_args=False)

    def sample(self, obs: Float[Tensor, "M D"], generator: torch.Generator) -> Tensor:
        mean = self.net(obs)
        return mean + self.log_std.exp() * torch.randn(mean.shape, generator=generator).to(mean.device)

    def mode(self, obs: Float[Tensor, "M D"]) -> Tensor:
        return self.net(obs)


MLPPolicy = CategoricalPolicy | GaussianPolicy


def policy_for(space: spaces.Space, inputs: int, actions: int, config: NetworkConfig) -> MLPPolicy:
    """The policy that acts in the space."""
    kind = CategoricalPolicy if isinstance(space, spaces.Discrete) else GaussianPolicy
    return kind(inputs, actions, config)


class Value(nn.Module):
    """V(s)."""

    def __init__(self, inputs: int, config: NetworkConfig) -> None:
        super().__init__()
        self.net = perceptron(inputs, 1, config, gain=1.0)

    def forward(self, obs: Float[Tensor, "*lead D"]) -> Float[Tensor, "*lead"]:
        return self.net(obs).squeeze(-1)


class ActionValue(nn.Module):
    """Q(s, a) for every action."""

    def __init__(self, inputs: int, actions: int, config: NetworkConfig) -> None:
        super().__init__()
        self.net = perceptron(inputs, actions, config, gain=1.0)

    def forward(self, obs: Float[Tensor, "*lead D"]) -> Float[Tensor, "*lead A"]:
        return self.net(obs)

    def mode(self, obs: Float[Tensor, "M D"]) -> Tensor:
        return self.net(obs).argmax(-1)
