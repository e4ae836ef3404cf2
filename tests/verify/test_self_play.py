"""Rounds of self-play rest at the equilibria of a preference game that no reward explains."""

import pytest
import torch

from steersman.verify import self_play
from steersman.verify.self_play import CHECKS, equilibrium, example, play


@pytest.mark.parametrize("name", CHECKS)
def test_rounds_rest_at_the_equilibrium(name):
    row = CHECKS[name](example())
    assert row.holds, f"off by {row.deviation}"


def test_the_game_has_a_circle_and_its_equilibrium_is_one():
    mdp, beats = example()
    wins = beats > 0.5
    circle = any(wins[i, j] and wins[j, k] and wins[k, i] for i in range(8) for j in range(8) for k in range(8))
    assert circle
    tau, first = 0.5, mdp.sequence_logp_ref.sum(-1)
    pi = equilibrium(mdp, beats, tau).exp()

    def worth(policy):
        return policy @ beats @ pi - tau * (policy * (policy.log() - first)).sum()

    # no policy does better against it, each paying for its distance from the start
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        rival = torch.softmax(pi.log() + 0.3 * torch.randn(len(pi), generator=generator, dtype=torch.float64), 0)
        assert worth(rival) < worth(pi)


def test_without_the_anchor_there_is_no_such_rest():
    mdp, beats = example()
    logits = play(mdp, lambda pair: self_play.ipo(pair, beta=2.0)[0], beats, share=0.0, rounds=20)
    found = mdp.sequence_logp(logits).sum(-1).exp()
    assert float((found - equilibrium(mdp, beats, 0.5).exp()).abs().sum() / 2) > 0.02


def test_the_bonus_leads_beyond_the_optimum_away_from_the_start():
    """Without it pairs with the first policy rest at pi*; with it at more KL, the more the larger it is; a check
    without the bonus in its condition would not hold."""
    found = [self_play.check_xpo(example(), explore=alpha) for alpha in (0.0, 0.02, 0.05)]
    assert all(row.holds for row in found)
    assert found[0].gap + 0.02 < found[1].gap < found[2].gap - 0.02
    mdp, _ = example()
    reward, first = mdp.total_reward, mdp.sequence_logp_ref.sum(-1)
    best = torch.log_softmax(first + reward / 0.5, 0)
    assert float((best.exp() * (best - first)).sum()) == pytest.approx(found[0].gap, abs=1e-6)


def test_a_bonus_too_large_has_no_rest():
    assert not self_play.check_xpo(example(), explore=0.3, rounds=8).holds
