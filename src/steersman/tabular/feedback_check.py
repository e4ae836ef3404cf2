"""Where the losses over single judged answers lead."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from steersman.loss.feedback import apo_zero_unpaired, bco, kto
from steersman.tabular.fixed_point import FixedPoint, row_of
from steersman.tabular.population import Population, descend, descend_frozen
from steersman.tabular.token_mdp import TokenMDP


def check_kto(mdp: TokenMDP, desirable_weight: float = 1.0, undesirable_weight: float = 1.33) -> FixedPoint:
    """Per answer the loss is linear in sigma(beta (rho - z)): the sign of weighted likes decides all or nothing."""
    world = Population(mdp)
    liked = torch.sigmoid(mdp.total_reward)
    mismatched = _mismatched(world)
    desirable = torch.cat([torch.ones(len(mdp)), torch.zeros(len(mdp))]).bool()
    prob = torch.cat([world.shown_prob * liked, world.shown_prob * (1 - liked)])

    def loss(logits: Tensor, reference_point: Tensor) -> Tensor:
        logp, ref = mdp.sequence_logp(logits).sum(-1).repeat(2), mdp.sequence_logp_ref.sum(-1).repeat(2)
        each, _ = kto(
            logp, ref, desirable, reference_point, beta=mdp.beta,
            desirable_weight=desirable_weight, undesirable_weight=undesirable_weight,
        )  # fmt: skip
        return (prob * each).sum()

    def reference_point(logits: Tensor) -> Tensor:
        return (mismatched * world.log_ratio(logits)).sum().clamp(min=0)

    logits = descend_frozen(loss, reference_point, mdp.logp_ref)
    disliked = desirable_weight * liked < undesirable_weight * (1 - liked)
    mass = mdp.sequence_prob(logits)[disliked].sum()
    statement = "no mass where lambda_U dislikes outnumber lambda_D likes"
    return row_of("kto", statement, world, logits, float(mass))


def check_apo_zero_unpaired(
    mdp: TokenMDP, desirable_weight: float = 1.0, undesirable_weight: float = 1.33
) -> FixedPoint:
    """KTO's, of a reference point that stays 0."""
    world = Population(mdp)
    liked = torch.sigmoid(mdp.total_reward)
    desirable = torch.cat([torch.ones(len(mdp)), torch.zeros(len(mdp))]).bool()
    prob = torch.cat([world.shown_prob * liked, world.shown_prob * (1 - liked)])

    def loss(logits: Tensor) -> Tensor:
        logp, ref = mdp.sequence_logp(logits).sum(-1).repeat(2), mdp.sequence_logp_ref.sum(-1).repeat(2)
        each, _ = apo_zero_unpaired(
            logp, ref, desirable, beta=mdp.beta, desirable_weight=desirable_weight,
            undesirable_weight=undesirable_weight,
        )  # fmt: skip
        return (prob * each).sum()

    logits = descend(loss, mdp.logp_ref)
    mass = mdp.sequence_prob(logits)[desirable_weight * liked < undesirable_weight * (1 - liked)].sum()
    statement = "no mass where lambda_U dislikes outnumber lambda_D likes"
    return row_of("apo_zero_unpaired", statement, world, logits, float(mass))


def check_bco(mdp: TokenMDP) -> FixedPoint:
    """Likes are sigma(A - a) with A = r - beta log Z(x); a is set half-way between the classes' means of A."""
    world = Population(mdp)
    advantage = mdp.total_reward - mdp.closed_form()[1][mdp.prompt]

    def halfway(score: Tensor, liked: Tensor) -> Tensor:
        good, bad = world.shown_prob * liked, world.shown_prob * (1 - liked)
        return (good * score).sum() / good.sum() / 2 + (bad * score).sum() / bad.sum() / 2

    low, high = advantage.min(), advantage.max()
    for _ in range(60):
        a = (low + high) / 2
        above = halfway(advantage, torch.sigmoid(advantage - a)) > a
        low, high = (a, high) if above else (low, a)
    liked = torch.sigmoid(advantage - (low + high) / 2)
    desirable = torch.cat([torch.ones(len(mdp)), torch.zeros(len(mdp))]).bool()
    prob = torch.cat([world.shown_prob * liked, world.shown_prob * (1 - liked)])

    def loss(logits: Tensor, shift: Tensor) -> Tensor:
        logp, ref = mdp.sequence_logp(logits).sum(-1).repeat(2), mdp.sequence_logp_ref.sum(-1).repeat(2)
        return (prob * bco(logp, ref, desirable, shift, beta=mdp.beta)[0]).sum()

    def shift(logits: Tensor) -> Tensor:
        return halfway(mdp.beta * world.log_ratio(logits), liked)

    logits = descend_frozen(loss, shift, mdp.logp_ref)
    deviation = world.distance(logits, mdp.closed_form()[0])
    statement = "pi ~ pi_ref exp(r / beta), where likes are sigma(r - r0) around the classes' midpoint"
    return row_of("bco", statement, world, logits, deviation, reaches_optimum=True)


def _mismatched(world: Population) -> Float[Tensor, " N"]:
    """How often an answer meets a prompt when prompts and answers of the data are drawn apart."""
    mdp = world.mdp
    words = mdp.sequences + mdp.mask  # told apart from padding
    _, same = torch.unique(words, dim=0, return_inverse=True)
    answer = torch.zeros(int(same.max()) + 1, dtype=torch.float64).index_add(0, same, world.shown_prob)
    return mdp.prompt_prob[mdp.prompt] * answer[same]
