"""A policy, and our engine in another process that samples from it."""

from __future__ import annotations

import torch
from letter_models import LETTERS, letters
from tiny_models import tiny_model

from steersman.model import Policy
from steersman.rollout.remote import RemoteGenerator, ServerSettings, open_process
from steersman.types import Prompt

ENDS = (2,)


def make_policy(seed: int = 0, family: str = "llama", vocab: int = len(LETTERS)) -> Policy:
    return Policy(tiny_model(family, vocab=vocab, seed=seed).eval(), letters())


def opened(policy: Policy, **extra) -> RemoteGenerator:
    return open_process(policy, ServerSettings(**{"ends": ENDS, "max_batch": 8, "timeout": 60.0, **extra}))


def asked(count: int = 5, length: int = 6) -> list[Prompt]:
    return [Prompt([3 + (7 * i + j) % 20 for j in range(length + i)], "", index=i) for i in range(count)]


def move(policy: Policy, by: float = 0.05) -> None:
    """Weights as a training step would leave them."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn_like(parameter) * by)
