"""The supervised loss: negative log-likelihood of given answers."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def nll(logp: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Negative log-likelihood of each token, in nats; `reduce` it over the tokens that count.

        L_t = -log pi(y_t | x, y_<t)

    Averaged over all tokens of the batch ("token") it is the usual fine-tuning loss and its exponential is the
    perplexity. Label smoothing is left out: it needs the whole vocabulary's log-probabilities, and a policy
    that is sampled from afterwards should not be taught to spread mass over it.
    """
    return -logp
