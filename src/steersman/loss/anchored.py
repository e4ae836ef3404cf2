"""Losses of pairs that hold each answer against the reference itself, and not only against the other answer.

They take and return what those of `preference` do: `(loss [B], explain)` of a `PairLogp`, with rho(y) the log-ratio
of an answer to the reference.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from steersman.loss.pairs import Explain, PairLogp, implicit_rewards, log_ratios


def cal_dpo(pair: PairLogp, *, beta: float = 0.1) -> tuple[Float[Tensor, " B"], Explain]:
    """Calibrated DPO: the log-ratios themselves are pulled to their rewards over beta, not only their difference.

        L = -log sigma(rho(w) - rho(l)) + (rho(w) - 1 / (2 beta))^2 + (rho(l) + 1 / (2 beta))^2

    The rewards are 1/2 for a chosen answer and -1/2 for a rejected one.

    Source: arXiv 2412.14516, eq. 11.
    """
    ratio_w, ratio_l = log_ratios(pair)
    calibrated = (ratio_w - 0.5 / beta).square() + (ratio_l + 0.5 / beta).square()
    return calibrated - logsigmoid(ratio_w - ratio_l), implicit_rewards(beta * ratio_w, beta * ratio_l)


def sppo(pair: PairLogp, *, beta: float = 0.1) -> tuple[Float[Tensor, " B"], Explain]:
    """Self-play preference optimisation: each answer's log-ratio is fitted to how often it wins, less one half.

        L = (rho(w) - 1 / (2 beta))^2 + (rho(l) + 1 / (2 beta))^2

    1 / beta is its eta. With soft labels (`soft_labelled`) the target of an answer that wins a share a is
    (a - 1/2) / beta, as the paper has it. In rounds whose reference is the last policy (`online-dpo` with
    `reference: last`) the policy climbs toward the equilibrium of the preference game.

    Source: arXiv 2405.00675, eq. 4.7.
    """
    ratio_w, ratio_l = log_ratios(pair)
    loss = (ratio_w - 0.5 / beta).square() + (ratio_l + 0.5 / beta).square()
    return loss, implicit_rewards(beta * ratio_w, beta * ratio_l)


def nca(pair: PairLogp, *, beta: float = 0.1) -> tuple[Float[Tensor, " B"], Explain]:
    """Noise contrastive alignment: the chosen answer is told from the reference's, and neither moves far from it.

        L = -log sigma(beta rho(w)) - 1/2 log sigma(-beta rho(w)) - 1/2 log sigma(-beta rho(l))

    The chosen answer's own likelihood is held up, which DPO's difference leaves free.

    Source: arXiv 2402.05369 (NCA from pairs: of two answers the chosen one has all the reward).
    """
    reward_w, reward_l = (beta * ratio for ratio in log_ratios(pair))
    loss = -logsigmoid(reward_w) - 0.5 * logsigmoid(-reward_w) - 0.5 * logsigmoid(-reward_l)
    return loss, implicit_rewards(reward_w, reward_l)


def bco_pair(pair: PairLogp, *, beta: float = 0.1) -> tuple[Float[Tensor, " B"], Explain]:
    """Binary classifier optimisation of pairs: each answer's implicit reward is the logit of "chosen", by itself.

        L = -log sigma(beta rho(w)) - log sigma(-beta rho(l))

    The "quality loss" of mixed preference optimisation (MPO, arXiv 2411.10442), which adds it to DPO.

    Source: arXiv 2404.04656. Departure, as in TRL 1.16: no reward shift is taken off beta rho. Both papers take off a
    moving mean of the rewards; `feedback.bco` does.
    """
    reward_w, reward_l = (beta * ratio for ratio in log_ratios(pair))
    return -logsigmoid(reward_w) - logsigmoid(-reward_l), implicit_rewards(reward_w, reward_l)


def apo_zero(pair: PairLogp, *, beta: float = 0.1) -> tuple[Float[Tensor, " B"], Explain]:
    """Anchored preference optimisation for chosen answers that are better than the model's own: up with these, down
    with the rejected.

        L = 1 - sigma(beta rho(w)) + sigma(beta rho(l))

    Source: arXiv 2408.06266, eq. 7.
    """
    reward_w, reward_l = (beta * ratio for ratio in log_ratios(pair))
    return (-reward_w).sigmoid() + reward_l.sigmoid(), implicit_rewards(reward_w, reward_l)


def apo_down(pair: PairLogp, *, beta: float = 0.1) -> tuple[Float[Tensor, " B"], Explain]:
    """Anchored preference optimisation for chosen answers that are worse than the model's own: both go down, the
    rejected ones further. What they lose goes to answers that the data does not show; it is for few steps.

        L = sigma(beta rho(w)) + 1 - sigma(beta (rho(w) - rho(l)))

    Source: arXiv 2408.06266, eq. 8.
    """
    reward_w, reward_l = (beta * ratio for ratio in log_ratios(pair))
    return reward_w.sigmoid() + (reward_l - reward_w).sigmoid(), implicit_rewards(reward_w, reward_l)
