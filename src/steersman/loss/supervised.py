"""Supervised losses: of each token of given answers."""

from __future__ import annotations

from collections.abc import Callable

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


def dft(logp: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Dynamic fine-tuning: each token's negative log-likelihood weighed by its own probability; `reduce` it likewise.

        L_t = -sg[pi(y_t | x, y_<t)] log pi(y_t | x, y_<t),     sg the stop-gradient

    Its gradient is that of -pi(y_t | x, y_<t): it raises the mean probability of the data's tokens in the place of
    their mean log-probability. A token that the policy finds impossible teaches nothing, and where the data say
    several things it comes to say only the commonest of them.

    Source: arXiv 2508.05629.
    """
    return -logp.detach().exp() * logp


TOKEN_LOSSES: dict[str, Callable[[Tensor], Tensor]] = {"nll": nll, "dft": dft}
