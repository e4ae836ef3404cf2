"""Supervised loss beside torch's own cross-entropy."""

from __future__ import annotations

import torch

from steersman.loss.reduce import denominator, reduce, token_weight
from steersman.loss.supervised import nll


def test_token_average_is_cross_entropy_over_the_answer():
    torch.manual_seed(0)
    logits = torch.randn(3, 5, 11, dtype=torch.float64)
    ids, length = torch.randint(0, 11, (3, 5)), torch.tensor([5, 2, 3])
    mask = torch.arange(5) < length[:, None]
    logp = torch.log_softmax(logits, -1).gather(-1, ids[..., None])[..., 0]
    loss = reduce(nll(logp), token_weight(mask, "token"), denominator(mask, "token"))
    labels = torch.where(mask, ids, -100)
    expected = torch.nn.functional.cross_entropy(logits.reshape(-1, 11), labels.reshape(-1))
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
