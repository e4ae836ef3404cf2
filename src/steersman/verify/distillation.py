"""Where every form of distillation leads: descent on the token MDP beside the fixed point that is stated.

The teacher is the language's reference. A student with a table of its own can be the teacher in every state, and all
divergences then agree; where they differ is seen on a *tied* student, which has one distribution for all states.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from steersman.advantage.group import first_success, leave_one_out
from steersman.loss.distillation import distillation, still_to_come
from steersman.ops.divergence import Divergence, TeacherStates, TeacherTopK, linear_divergence, sorted_distance
from steersman.ops.logprob import Head
from steersman.tabular.oracle import OracleBatch, exact_gradient, expected_gradient, relative_deviation
from steersman.tabular.population import descend, descend_frozen
from steersman.tabular.preference_check import FixedPoint
from steersman.tabular.token_mdp import TokenMDP
from steersman.verify.gradient import gap


def example() -> TokenMDP:
    """Two prompts, answers of one to three of four tokens, normal rewards; KL to the teacher costs 1 per nat."""
    rough = TokenMDP.random(4, 3, 1.0, seed=0, prompts=2)
    return TokenMDP(4, 3, rough.score, rough.logp_ref, 1.0, prompts=2)


def step_divergence(
    mdp: TokenMDP,
    logits: Float[Tensor, "S V"],
    kind: Divergence,
    mix: float = 0.5,
    teacher: TeacherTopK | None = None,
) -> Float[Tensor, " S"]:
    """D(teacher, student) in every state, by the same code that training uses."""
    table = Head(torch.eye(mdp.vocab, dtype=torch.float64))
    return linear_divergence(logits, table, teacher or TeacherStates(mdp.logp_ref, table), kind, mix=mix)


def _tied(mdp: TokenMDP) -> Tensor:
    return torch.zeros(1, mdp.vocab, dtype=torch.float64)


def check_forward(mdp: TokenMDP) -> FixedPoint:
    """On the teacher's own answers; which states come does not depend on the student."""
    states = mdp.state_prob(mdp.logp_ref)
    spread = len(states)
    theta = descend(lambda x: states @ step_divergence(mdp, x.expand(spread, -1), "forward_kl"), _tied(mdp))
    mean = (states[:, None] * mdp.logp_ref.exp()).sum(0) / states.sum()
    statement = "tied: the mean of the teacher's distributions over the states of the teacher's answers"
    return _row(mdp, "forward_kl", "1503.02531", statement, theta.expand(spread, -1), gap(theta.softmax(-1)[0], mean))


def check_reverse(mdp: TokenMDP) -> FixedPoint:
    """On the student's own answers: how often a state comes is taken as it is, and carries no gradient."""
    spread = len(mdp.states)
    theta = descend_frozen(
        lambda x, states: states @ step_divergence(mdp, x.expand(spread, -1), "reverse_kl"),
        lambda x: mdp.state_prob(x.expand(spread, -1)).detach(),
        _tied(mdp),
    )
    logits = theta.expand(spread, -1)
    states = mdp.state_prob(logits)
    mean = torch.softmax((states[:, None] * mdp.logp_ref).sum(0) / states.sum(), -1)
    statement = "tied: the normalised geometric mean of the teacher's, over the states of the student's own answers"
    return _row(mdp, "reverse_kl", "2306.13649", statement, logits, gap(theta.softmax(-1)[0], mean))


def _reaches(kind: Divergence, mix: float, source: str) -> Callable[[TokenMDP], FixedPoint]:
    def check(mdp: TokenMDP) -> FixedPoint:
        states = mdp.state_prob(mdp.logp_ref)
        start = torch.zeros_like(mdp.logp_ref)
        logits = descend(lambda x: states @ step_divergence(mdp, x, kind, mix), start)
        deviation = gap(logits.softmax(-1), mdp.logp_ref.exp())
        return _row(mdp, kind, source, f"the teacher, in every state (mix {mix:g})", logits, deviation)

    return check


def _own_with_demonstrations(
    kind: Divergence, source: str, mean: str, pooled: Callable[[Tensor], Tensor]
) -> Callable[[TokenMDP], FixedPoint]:
    """The teacher is the model before training with one of two demonstrations in its prompt, each as often; here they
    are two tables, of which the student, who sees neither, is to make one."""

    def check(mdp: TokenMDP) -> FixedPoint:
        generator = torch.Generator().manual_seed(5)
        noise = torch.randn(2, *mdp.logp_ref.shape, generator=generator, dtype=torch.float64)
        shown, states = torch.log_softmax(mdp.logp_ref + noise, -1), mdp.state_prob(mdp.logp_ref)
        table = Head(torch.eye(mdp.vocab, dtype=torch.float64))

        def loss(x: Tensor) -> Tensor:
            each = [linear_divergence(x, table, TeacherStates(logp, table), kind) for logp in shown]
            return states @ torch.stack(each).mean(0)

        logits = descend(loss, mdp.logp_ref)
        statement = f"own model shown demonstrations: the {mean} mean of what it says with each, in every state"
        return _row(
            mdp, f"{kind}, shown", source, statement, logits, gap(logits.softmax(-1), pooled(shown).softmax(-1))
        )

    return check


def check_shown_success(mdp: TokenMDP) -> FixedPoint:
    """SDPO: a judge is right `trust` of the time, and whom it is told to have been content says what the model would
    say then: p(y|x) ~ start(y|x) P(content|y). A sample learns from it where another one of its group succeeded.

    The gradient over groups of two is that of the divergence in every state, times how often another answer succeeds;
    at p there is none.
    """
    trust, good = 0.95, mdp.total_reward >= 0
    told = torch.where(good, trust, 1 - trust).log()
    shown = TokenMDP(mdp.vocab, mdp.horizon, told, mdp.logp_ref, 1.0, prompts=2).pi_star()
    table = Head(torch.eye(mdp.vocab, dtype=torch.float64))

    def divergence(logits: Tensor) -> Tensor:
        return linear_divergence(logits, table, TeacherStates(shown, table), "reverse_kl")

    def loss(batch: OracleBatch) -> Tensor:
        rows, group = batch.rows, batch.trajectory.group
        assert group is not None
        taught = first_success(good[rows].double(), group, 1.0) >= 0
        mask = batch.trajectory.mask & taught[:, None]
        along = mdp.along(divergence(batch.logits), rows)[:, :-1]
        return distillation(along, batch.logp, mask) / (len(rows) // batch.batches)

    def exact(logits: Tensor) -> Tensor:
        free, own = logits.clone().requires_grad_(), mdp.sequence_prob(logits)
        prompts = torch.arange(len(mdp.prompts))[:, None]
        share = (own * good * (mdp.prompt == prompts)).sum(-1) / (own * (mdp.prompt == prompts)).sum(-1)
        steps = mdp.along(divergence(free), torch.arange(len(mdp)))[:, :-1] * mdp.mask
        (gradient,) = torch.autograd.grad((own * share[mdp.prompt] * steps.sum(-1)).sum(), free)
        return gradient.flatten()

    some, deviation = _some(mdp), 0.0
    for at, wanted in ((some, exact(some)), (shown, 0.0)):
        deviation = max(deviation, float((expected_gradient(mdp, at, loss, size=2, kl=False) - wanted).abs().max()))
    statement = "own model shown a success: p(y|x) ~ start(y|x) P(success|y), as fast as another answer succeeds"
    return _row(mdp, "reverse_kl, success", "2601.20802", statement, shown, deviation, 1e-8)


def check_minillm(mdp: TokenMDP) -> FixedPoint:
    logits = _some(mdp)
    found = expected_gradient(mdp, logits, _loss(mdp, whole=True), kl=False)
    free = logits.clone().requires_grad_()
    (exact,) = torch.autograd.grad(mdp.kl(free), free)
    statement = "its gradient is that of KL(student || teacher) over whole answers (normalised: off)"
    return _row(
        mdp, "minillm", "2306.08543", statement, mdp.logp_ref, relative_deviation(found, exact.flatten()), 1e-8
    )


def check_minillm_reward(mdp: TokenMDP) -> FixedPoint:
    """The exact gradient of E[r] - KL away from its rest, and none at pi*."""
    logits, best, deviation = _some(mdp), mdp.pi_star(), 0.0
    loss = _loss(mdp, whole=True, reward=True)
    for at in (logits, best):
        found = expected_gradient(mdp, at, loss, size=2, kl=False)
        deviation = max(deviation, float((found + exact_gradient(mdp, at)).abs().max()))
    row = _row(mdp, "minillm + reward", "2306.08543", "pi ~ teacher exp(w r)", best, deviation, 1e-8)
    row.gap, row.reaches_optimum = float(mdp.j_star() - mdp.objective(best)), True
    return row


def check_reverse_reward(mdp: TokenMDP) -> FixedPoint:
    """Every state weighs its tokens' rewards to come against its own divergence, and not against later ones."""
    logits = mdp.logp_ref
    for _ in range(mdp.horizon):  # the last level is right after one pass, the one before it after two
        logits = mdp.logp_ref + mdp.evaluate(logits, kl=False)[1]
    found = expected_gradient(mdp, logits, _loss(mdp, reward=True), size=2, kl=False)
    statement = "pi(a|s) ~ teacher(a|s) exp(w Q(s, a)), Q the student's rewards to come without their divergence"
    return _row(mdp, "reverse_kl + reward", "2306.13649", statement, logits, float(found.abs().max()), 1e-8)


def check_listed(mdp: TokenMDP, k: int = 2) -> FixedPoint:
    """Of what is not listed only the sum is compared, on the student's side too."""
    ids = mdp.logp_ref.topk(k).indices
    few = TeacherTopK(ids, mdp.logp_ref.gather(1, ids))
    states = mdp.state_prob(mdp.logp_ref)
    logits = descend(lambda x: states @ step_divergence(mdp, x, "reverse_kl", teacher=few), _some(mdp))
    deviation = gap(logits.softmax(-1).gather(1, ids), few.logp.exp())
    statement = f"the teacher on the {k} tokens that it lists; how the others share the rest is left open"
    return _row(mdp, "top_k", "2306.13649", statement, logits, deviation)


def check_sorted(mdp: TokenMDP) -> FixedPoint:
    """Adam with a falling rate, because the distance has kinks at its rest."""
    table = Head(torch.eye(mdp.vocab, dtype=torch.float64))
    logits = _some(mdp).requires_grad_()
    optimiser = torch.optim.Adam([logits], lr=0.1, betas=(0.9, 0.9))
    steps = 600
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = 0.1 * 1e-6 ** (step / steps)
        optimiser.zero_grad()
        sorted_distance(logits, table, TeacherStates(mdp.logp_ref, table), chunk=1024).sum().backward()
        optimiser.step()
    logits = logits.detach()
    ranked = [x.sort(-1).values for x in (logits.softmax(-1), mdp.logp_ref.exp())]
    statement = "the teacher's probabilities in order, on whichever tokens the student gives them"
    return _row(mdp, "uld", "2402.12030", statement, logits, gap(*ranked))


def _loss(mdp: TokenMDP, *, whole: bool = False, reward: bool = False) -> Callable[[OracleBatch], Tensor]:
    """What each step of an answer adds to what training descends, averaged by "episode"."""

    def loss(batch: OracleBatch) -> Tensor:
        rows, mask = batch.rows, batch.trajectory.mask
        per_state = step_divergence(mdp, batch.logits, "reverse_kl")
        divergence = mdp.along(per_state, rows)[:, :-1]
        weight = torch.zeros_like(batch.logp.detach())
        if whole:
            gap = mdp.sequence_logp_ref[rows] - batch.logp.detach()
            weight = still_to_come(gap, mask, normalised=False)
        if reward:
            assert batch.trajectory.group is not None
            weight = weight + leave_one_out(mdp.total_reward[rows], batch.trajectory.group)[:, None]
        return distillation(divergence, batch.logp, mask, weight=weight) / (len(rows) // batch.batches)

    return loss


def _some(mdp: TokenMDP) -> Float[Tensor, "S V"]:
    """Some student that is not the teacher."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(mdp.next_state.shape, generator=generator, dtype=torch.float64)


def _row(
    mdp: TokenMDP,
    name: str,
    source: str,
    statement: str,
    logits: Tensor,
    deviation: float,
    tolerance: float = 1e-4,
) -> FixedPoint:
    """`gap` is KL(student || teacher) over whole answers, in nats, where the student rests."""
    return FixedPoint(name, f"arXiv {source}", statement, float(mdp.kl(logits)), deviation, tolerance)


CHECKS: dict[str, Callable[[TokenMDP], FixedPoint]] = {
    "forward_kl": check_forward,
    "reverse_kl": check_reverse,
    "jsd": _reaches("jsd", 0.3, "2306.13649"),
    "skew_kl": _reaches("skew_kl", 0.1, "2402.03898"),
    "skew_reverse_kl": _reaches("skew_reverse_kl", 0.1, "2402.03898"),
    "reverse_kl, shown": _own_with_demonstrations(
        "reverse_kl", "2601.19897", "normalised geometric", lambda logp: logp.mean(0)
    ),
    "forward_kl, shown": _own_with_demonstrations(
        "forward_kl", "2601.19897", "arithmetic", lambda logp: logp.exp().mean(0).log()
    ),
    "reverse_kl, success": check_shown_success,
    "minillm": check_minillm,
    "minillm + reward": check_minillm_reward,
    "reverse_kl + reward": check_reverse_reward,
    "top_k": check_listed,
    "uld": check_sorted,
}
