"""Advantages against loops written from the papers, one step at a time, in float64."""

import pytest
import torch

from steersman.advantage.gae import gae, vtrace
from steersman.advantage.group import first_success, group_mean, leave_one_out, no_signal
from steersman.advantage.returns import episode_return, return_to_go, td_error
from steersman.types import Trajectory


def episodes(seed=0, holes=False, B=6, T=7):
    """Random episodes of random length, half of them truncated; NaN wherever nothing may be read."""
    g = torch.Generator().manual_seed(seed)
    length = torch.randint(1, T + 1, (B,), generator=g)
    mask = torch.arange(T) < length[:, None]
    if holes:
        mask &= torch.rand(B, T, generator=g) > 0.3
        mask[torch.arange(B), length - 1] = True
    terminated = torch.arange(B) % 2 == 0
    discount = torch.full((B, T), 0.9, dtype=torch.float64)
    discount[torch.arange(B), length - 1] = torch.where(terminated, 0.0, 0.9).double()
    reward = torch.randn(B, T, generator=g, dtype=torch.float64)
    value = torch.randn(B, T + 1, generator=g, dtype=torch.float64)
    nan = torch.nan
    reward[~mask], discount[~mask] = nan, nan
    readable = torch.zeros(B, T + 1, dtype=torch.bool)
    readable[:, :T] |= mask
    readable[torch.arange(B), length] = True
    value[~readable] = nan
    logp = torch.randn(B, T, generator=g, dtype=torch.float64).where(mask, torch.tensor(nan).double())
    return Trajectory(mask, reward, discount, logp, value=value), length


def steps(traj, b):
    """The row's counting steps as plain lists: rewards, discounts, values with the bootstrap at the end."""
    at = traj.mask[b].nonzero().flatten().tolist()
    values = [float(traj.value[b, t]) for t in at] + [float(traj.value[b, at[-1] + 1])]
    return at, [float(traj.reward[b, t]) for t in at], [float(traj.discount[b, t]) for t in at], values


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
def test_gae_is_the_sum_of_discounted_td_errors(lam, holes):
    traj, _ = episodes(1, holes)
    adv, ret = gae(traj, lam)
    for b in range(len(traj)):
        at, r, d, v = steps(traj, b)
        delta = [r[k] + d[k] * v[k + 1] - v[k] for k in range(len(at))]
        for k, t in enumerate(at):
            weight, expected = 1.0, 0.0
            for j in range(k, len(at)):
                expected += weight * delta[j]
                weight *= d[j] * lam
            assert adv[b, t].item() == pytest.approx(expected, rel=1e-12, abs=1e-12)
            assert ret[b, t].item() == pytest.approx(expected + v[k], rel=1e-12, abs=1e-12)
    assert (adv[~traj.mask] == 0).all()
    assert (ret[~traj.mask] == 0).all()


@pytest.mark.parametrize("holes", [False, True])
def test_limits_of_gae_are_td_and_monte_carlo(holes):
    traj, _ = episodes(2, holes)
    value = torch.where(traj.mask, traj.value[:, :-1], 0.0)
    assert torch.equal(gae(traj, 0.0).adv, td_error(traj))
    torch.testing.assert_close(gae(traj, 1.0).adv, return_to_go(traj) - value, rtol=1e-12, atol=1e-12)


def test_terminated_forgets_what_follows_and_truncated_bootstraps():
    mask = torch.ones(2, 2, dtype=torch.bool)
    discount = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    traj = Trajectory(
        mask, torch.tensor([[0.0, 1.0]] * 2), discount, torch.zeros(2, 2), value=torch.full((2, 3), 5.0)
    )
    assert return_to_go(traj).tolist() == [[1.0, 1.0], [6.0, 6.0]]


def test_vtrace_matches_its_definition_and_on_policy_is_the_return():
    traj, _ = episodes(4)
    on_policy = vtrace(traj, traj.logp_old)
    torch.testing.assert_close(on_policy.ret, return_to_go(traj))
    logp = traj.logp_old + 0.5 * torch.randn(traj.logp_old.shape, generator=torch.Generator().manual_seed(9)).double()
    out = vtrace(traj, logp, lam=0.9, clip_rho=1.1, clip_c=0.8)
    for b in range(len(traj)):
        at, r, d, v = steps(traj, b)
        ratio = [(logp[b, t] - traj.logp_old[b, t]).exp().item() for t in at]
        rho, c = [min(1.1, x) for x in ratio], [0.9 * min(0.8, x) for x in ratio]
        target = [0.0] * len(at) + [v[-1]]
        for s in range(len(at)):
            total, product = v[s], 1.0
            for t in range(s, len(at)):
                total += product * rho[t] * (r[t] + d[t] * v[t + 1] - v[t])
                product *= d[t] * c[t]
            target[s] = total
        for k, t in enumerate(at):
            assert out.ret[b, t].item() == pytest.approx(target[k])
            assert out.adv[b, t].item() == pytest.approx(rho[k] * (r[k] + d[k] * target[k + 1] - v[k]))


def test_group_baselines():
    score = torch.tensor([1.0, 5.0, 2.0, 3.0, 9.0, 7.0], dtype=torch.float64)
    group = torch.tensor([4, 7, 4, 4, 7, 1])
    assert leave_one_out(score, group).tolist() == pytest.approx([1 - 2.5, 5 - 9, 2 - 2, 3 - 1.5, 9 - 5, 0])
    assert group_mean(score, group, "none").tolist() == pytest.approx([-1, -2, 0, 1, 2, 0])
    scaled = group_mean(score, group, "group", eps=0.0)
    assert scaled[:5].tolist() == pytest.approx([-1, -2 / 8**0.5, 0, 1, 2 / 8**0.5])
    batch = group_mean(score, group, "batch", eps=0.0)
    assert batch.tolist() == pytest.approx([x / 2**0.5 for x in (-1, -2, 0, 1, 2, 0)])


def test_the_two_deviations_of_a_batch():
    """Of what is left after the group means, and of the scores as they are: two prompts of unequal difficulty."""
    score = torch.tensor([1.0, 3.0, 11.0, 15.0], dtype=torch.float64)
    group = torch.tensor([0, 0, 1, 1])
    left = torch.tensor([-1.0, 1.0, -2.0, 2.0], dtype=torch.float64)
    assert group_mean(score, group, "batch").tolist() == pytest.approx((left / ((10 / 3) ** 0.5 + 1e-4)).tolist())
    raw = (sum((x - 7.5) ** 2 for x in score.tolist()) / 3) ** 0.5
    assert group_mean(score, group, "batch_scores").tolist() == pytest.approx((left / (raw + 1e-4)).tolist())


def test_constant_reward_gives_exactly_zero_and_is_named():
    score = torch.tensor([0.1 + 0.2, 0.3000000000000000444, 1.0, 2.0], dtype=torch.float64)
    group = torch.tensor([0, 0, 1, 1])
    assert no_signal(score, group).tolist() == [True, True, False, False]
    assert group_mean(score, group)[:2].tolist() == [0.0, 0.0]
    third = torch.full((3,), 1 / 3)
    assert group_mean(third, torch.zeros(3, dtype=torch.long)).tolist() == [0.0] * 3


def test_episode_return_sums_counting_steps_only():
    traj, _ = episodes(5, holes=True)
    expected = [sum(steps(traj, b)[1]) for b in range(len(traj))]
    assert episode_return(traj).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("own", [False, True])
def test_the_first_success_of_a_group_is_looked_for_row_by_row(own):
    generator = torch.Generator().manual_seed(3)
    group, score = torch.randint(5, (40,), generator=generator), torch.rand(40, generator=generator)
    found = first_success(score, group, 0.7, own=own).tolist()
    for i in range(40):
        others = [j for j in range(40) if group[j] == group[i] and score[j] >= 0.7 and (own or j != i)]
        assert found[i] == (others[0] if others else -1)
    assert first_success(torch.tensor([1.0]), torch.tensor([7]), 1.0).tolist() == [-1]
