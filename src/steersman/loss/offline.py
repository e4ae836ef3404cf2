"""Every offline preference loss by name: what it looks at, and where it leads.

The fixed points are the population optima over all policies, for pairs drawn from a distribution mu and judged
by Bradley-Terry with a reward r; q(y) is how often an answer is the chosen one. `tabular/preference_check.py`
reaches each of them on the token MDP.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from steersman.loss.feedback import apo_zero_unpaired, bco, kto
from steersman.loss.preference import (
    alphapo,
    aot,
    aot_unpaired,
    apo_down,
    apo_zero,
    bco_pair,
    cal_dpo,
    cpo,
    discopop,
    dpo,
    dpo_norm,
    dpo_shift,
    dpop,
    exo,
    fdpo_alpha,
    fdpo_js,
    hinge,
    ipo,
    nca,
    orpo,
    robust_dpo,
    rso,
    simpo,
    sppo,
    tdpo1,
    tdpo2,
    wpo,
)


class OfflineLoss(NamedTuple):
    """One offline loss. `data` says what its rows are: pairs, or single answers with a thumb up or down.

    `fixed_point` says where training ends up with the default options.
    `takes_offset` says whether the margins of the data can be asked for, `needs_log_weight` whether it weighs
    answers by how much they are like the policy's own. `only_differences` says that of the log-ratios to the
    reference it takes their difference alone, so that a number which all answers to a prompt share drops out,
    `has_likelihood_term` that it has such a term of its own beside what compares the answers, `of_batch` that it is a
    loss of the whole batch's distributions.
    """

    function: Callable[..., Any]
    data: Literal["pair", "feedback"]
    source: str
    needs_reference: bool
    needs_full_kl: bool
    length_normalised: bool
    fixed_point: str
    takes_offset: bool = False
    needs_log_weight: bool = False
    only_differences: bool = False
    has_likelihood_term: bool = False
    of_batch: bool = False

    @property
    def takes_ld_alpha(self) -> bool:
        """Whether an answer's tokens beyond the other one's length can weigh less: all that it takes of an answer are
        sums over its tokens, to compare answers."""
        per_token = self.length_normalised or self.needs_full_kl
        return self.data == "pair" and not (per_token or self.has_likelihood_term)


LOSSES: dict[str, OfflineLoss] = {
    "dpo": OfflineLoss(
        dpo, "pair", "arXiv 2305.18290", True, False, False,
        "pi proportional to pi_ref exp(r / beta); with label smoothing eps, the win rate of every answer under "
        "the implicit reward matches (1 - eps) p + eps (1 - p), a flatter policy", takes_offset=True,
        only_differences=True,
    ),
    "robust_dpo": OfflineLoss(
        robust_dpo, "pair", "arXiv 2403.00409", True, False, False,
        "pi proportional to pi_ref exp(r / beta), from labels flipped with the stated probability",
        only_differences=True,
    ),
    "ipo": OfflineLoss(
        ipo, "pair", "arXiv 2310.12036", True, False, False,
        "pi proportional to pi_ref exp(P(y beats mu) / beta): win rates in the place of rewards, so bounded",
        only_differences=True,
    ),
    "hinge": OfflineLoss(
        hinge, "pair", "arXiv 2305.10425", False, False, False,
        "beta log pi differs by whole multiples of the margin: order is learnt, strength is not; whatever pi_ref was",
        takes_offset=True,
    ),
    "rso": OfflineLoss(
        rso, "pair", "arXiv 2309.06657", True, False, False,
        "beta log pi/pi_ref differs by whole multiples of the margin: order is learnt, strength is not",
        takes_offset=True,
        only_differences=True,
    ),
    "dpop": OfflineLoss(
        dpop, "pair", "arXiv 2402.13228", True, False, False,
        "between DPO's optimum (lambda = 0) and pi_ref, which it is exactly from a finite lambda on when every "
        "answer is chosen now and then",
    ),
    "tdpo1": OfflineLoss(
        tdpo1, "pair", "arXiv 2404.11999", True, True, False,
        "pi(a|s) proportional to pi_ref(a|s) exp(Q_ref(s, a) / beta), with the action values of the reference "
        "itself: one step of improvement per token, not the optimum over sequences",
    ),
    "tdpo2": OfflineLoss(
        tdpo2, "pair", "arXiv 2404.11999", True, True, False,
        "where the semi-gradient vanishes: nearer to pi_ref than TDPO1's fixed point at alpha = 1; DPO's optimum "
        "at alpha = 0",
    ),
    "simpo": OfflineLoss(
        simpo, "pair", "arXiv 2405.14734", False, False, True,
        "at gamma = 0, log pi(y) = |y| (r(y) + c) / beta, whatever pi_ref was; gamma > 0 overstates every lead",
        takes_offset=True,
    ),
    "alphapo": OfflineLoss(
        alphapo, "pair", "arXiv 2501.03884", False, False, True,
        "at gamma = 0, pi(y) = (1 - alpha (r(y) + c) / beta)^(-|y| / alpha), whatever pi_ref was", takes_offset=True,
    ),
    "dpo_shift": OfflineLoss(
        dpo_shift, "pair", "arXiv 2502.07599", True, False, False,
        "where what an answer is pulled up as chosen, less f times what it is pushed down as rejected, is its share "
        "pi of all that is left over; DPO's optimum at f = 1",
    ),
    "wpo": OfflineLoss(
        wpo, "pair", "arXiv 2406.11827", True, False, False,
        "pi proportional to pi_ref exp(r / beta): weights that a pair's two orders share move no optimum",
        needs_log_weight=True,
        only_differences=True,
    ),
    "cal_dpo": OfflineLoss(
        cal_dpo, "pair", "arXiv 2412.14516", True, False, False,
        "a compromise between pi_ref exp(r) and log-ratios of (P(y beats mu) - 1/2) / beta",
    ),
    "sppo": OfflineLoss(
        sppo, "pair", "arXiv 2405.00675", True, False, False,
        "mu(y) (rho(y) - (P(y beats mu) - 1/2) / beta) is in proportion to pi(y): nearly pi_ref exp(P(y beats mu) / "
        "beta), less its normaliser, which the paper leaves out",
    ),
    "dpo_norm": OfflineLoss(
        dpo_norm, "pair", "arXiv 2411.15124", True, False, True,
        "pi proportional to pi_ref exp(|y| (r + c) / beta): a reward is worth more to a longer answer",
        takes_offset=True,
    ),
    "exo": OfflineLoss(
        exo, "pair", "arXiv 2402.00856", True, False, False,
        "each answer's leads beta (rho(y) - rho(y')) are, as weighted by how undecided they are, those of "
        "(2 p - 1) log((1 - eps) / eps)",
        only_differences=True,
    ),
    "discopop": OfflineLoss(
        discopop, "pair", "arXiv 2406.08414", True, False, False,
        "where the pulls of every answer's pairs balance: near DPO's optimum for a wide tau; for a narrow one pairs "
        "that raters are not sure of rest a little below 0, in the wrong order",
        only_differences=True,
    ),
    "fdpo_alpha": OfflineLoss(
        fdpo_alpha, "pair", "arXiv 2309.16240", True, False, False,
        "pi = pi_ref (1 - alpha (r + c) / beta)^(-1 / alpha): the optimum of the reward less beta times the "
        "alpha-divergence; alpha = 1 is the forward KL's", takes_offset=True,
    ),
    "fdpo_js": OfflineLoss(
        fdpo_js, "pair", "arXiv 2309.16240", True, False, False,
        "pi = pi_ref / (2 exp(-(r + c) / beta) - 1): the optimum of the reward less beta times the Jensen-Shannon "
        "divergence", takes_offset=True,
    ),
    "nca": OfflineLoss(
        nca, "pair", "arXiv 2402.05369", True, False, False,
        "what an answer is pulled up by as chosen, less what it is held back by, is in proportion to pi",
    ),
    "bco_pair": OfflineLoss(
        bco_pair, "pair", "arXiv 2404.04656", True, False, False,
        "what an answer is pulled up by as chosen, less what it is pushed down by as rejected, is in proportion to "
        "pi: nearly pi_ref (wins / losses)^(1 / beta), less its normaliser, which nothing takes off",
    ),
    "apo_zero": OfflineLoss(
        apo_zero, "pair", "arXiv 2408.06266", True, False, False,
        "no mass on answers that are rejected more often than chosen; the others share it",
    ),
    "apo_down": OfflineLoss(
        apo_down, "pair", "arXiv 2408.06266", True, False, False,
        "all mass on one answer of each prompt: every answer is to fall below pi_ref, and all but one can",
    ),
    "aot": OfflineLoss(
        aot, "pair", "arXiv 2406.05882", True, False, False,
        "where the pulls of every answer's pairs balance, each pair's lead beside the reference's at the same rank "
        "of the batch: near DPO's optimum", only_differences=True, of_batch=True,
    ),
    "aot_unpaired": OfflineLoss(
        aot_unpaired, "pair", "arXiv 2406.05882", True, False, False,
        "all mass on one answer of each prompt, not always the best: which answer lost to which is not read; for few "
        "steps", of_batch=True,
    ),
    "orpo": OfflineLoss(
        orpo, "pair", "arXiv 2403.07691", False, False, True,
        "a compromise between the chosen answers' distribution (per token) and the odds term's own optimum, "
        "pi(y) = sigma(r(y) + c)^|y|", has_likelihood_term=True,
    ),
    "cpo": OfflineLoss(
        cpo, "pair", "arXiv 2401.08417", False, False, False,
        "a compromise between pi proportional to exp(r / beta) and the chosen answers' distribution q; "
        "whatever pi_ref was", has_likelihood_term=True,
    ),
    "kto": OfflineLoss(
        kto, "feedback", "arXiv 2402.01306", True, False, False,
        "no mass on answers whose weighted dislikes outnumber their weighted likes; the others share it, less those "
        "that fell too low on the way for the saturated sigmoid to recover",
    ),
    "apo_zero_unpaired": OfflineLoss(
        apo_zero_unpaired, "feedback", "arXiv 2408.06266", True, False, False,
        "no mass on answers whose weighted dislikes outnumber their weighted likes; the others share it, less those "
        "that fell too low on the way for the saturated sigmoid to recover",
    ),
    "bco": OfflineLoss(
        bco, "feedback", "arXiv 2404.04656", True, False, False,
        "pi proportional to pi_ref exp(r / beta) when likes are sigma(r - r0) and r0 is half-way between the mean "
        "rewards of liked and disliked answers",
    ),
}  # fmt: skip
