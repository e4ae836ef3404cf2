"""f-DPO: DPO whose policy is held to the reference by another divergence than the reverse KL (arXiv 2309.16240).

With u = pi / pi_ref of a whole answer and f the divergence's generator, the implicit reward is beta f'(u), and the
loss is -log sigma of what the chosen answer's leads by. A number that f' is shifted by drops out.
"""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from steersman.loss.pairs import Explain, PairLogp, implicit_rewards, less_offset, log_ratios, power_reward


def fdpo_alpha(pair: PairLogp, *, beta: float = 0.1, alpha: float = 0.5) -> tuple[Float[Tensor, " B"], Explain]:
    """f-DPO with the alpha-divergence, between reverse KL (alpha = 0, DPO) and forward KL (alpha = 1).

        f'(u) = (1 - u^(-alpha)) / alpha

    The larger `alpha` in [0, 1], the more it costs to give up an answer of the reference's. A log-ratio below
    -60 / alpha counts as that.

    Source: arXiv 2309.16240, table 1.
    """
    return _leading(pair, *(beta * power_reward(ratio, alpha) for ratio in log_ratios(pair)))


def fdpo_js(pair: PairLogp, *, beta: float = 0.1) -> tuple[Float[Tensor, " B"], Explain]:
    """f-DPO with the Jensen-Shannon divergence, of which no reward is above beta log 2.

        f'(u) = log(2 u / (1 + u))

    Source: arXiv 2309.16240, table 1.
    """
    return _leading(pair, *(beta * (math.log(2) + ratio - softplus(ratio)) for ratio in log_ratios(pair)))


def _leading(pair: PairLogp, reward_w: Tensor, reward_l: Tensor) -> tuple[Tensor, Explain]:
    return -logsigmoid(less_offset(reward_w - reward_l, pair)), implicit_rewards(reward_w, reward_l)
