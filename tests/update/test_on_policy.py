"""The update that language models, Gymnasium and the oracle share, beside a loop written out in the test."""

from __future__ import annotations

import pytest
import torch

from steersman.algorithms import ALGORITHMS, Coefficients
from steersman.loss.reduce import denominator, reduce, token_weight
from steersman.update.kl_controller import KLCoefficients
from steersman.update.on_policy import Problem, learn, policy_loss
from steersman.verify import training


class Counted:
    """A batch of eight rows whose policy moves a hundredth of a nat with each update, and which notes its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []
        self.updates = 0
        self.x = torch.nn.Parameter(torch.tensor([0.0]))

    def __len__(self) -> int:
        return 8

    def gradients(self, rows, *, actor, first):
        self.calls.append(("gradients", sorted(rows.tolist()), actor, first))
        return self.updates / 100

    def step(self, *, actor):
        self.updates += 1
        self.calls.append(("step", actor))
        return {"lr/actor": float(self.updates)}

    def zero_grad(self):
        self.calls.append(("zero_grad",))

    def problem(self):
        return Problem([self.x], [lambda: -self.x.sum()], [lambda: 0.5 * (self.x * self.x).sum()])

    def moved(self):
        return self.updates / 100


def kinds(batch: Counted) -> list[str]:
    return [call[0] for call in batch.calls]


def test_every_epoch_holds_each_row_once_in_an_order_of_its_own():
    batch = Counted()
    stats = learn(ALGORITHMS["ppo"](epochs=3, minibatches=3), batch, torch.Generator().manual_seed(0))
    assert kinds(batch) == ["gradients", "step"] * 9
    drawn = [call[1] for call in batch.calls if call[0] == "gradients"]
    orders = [drawn[i : i + 3] for i in (0, 3, 6)]
    assert all(sorted(row for part in order for row in part) == list(range(8)) for order in orders)
    assert orders[0] != orders[1] != orders[2]
    assert [call[3] for call in batch.calls if call[0] == "gradients"] == [True] + [False] * 8
    assert stats == {"lr/actor": 9.0}


def test_updates_end_before_the_one_at_which_the_policy_is_too_far():
    batch = Counted()
    stats = learn(ALGORITHMS["ppo"](epochs=4, minibatches=2, stop_kl=0.025), batch, torch.Generator())
    assert batch.updates == 3  # 0, 0.01 and 0.02 are near enough, 0.03 is not
    assert kinds(batch)[-2:] == ["gradients", "zero_grad"]
    assert stats["epochs"] == 1.5


def test_a_trust_region_moves_the_actor_once_and_minibatches_are_the_critics():
    batch = Counted()
    stats = learn(ALGORITHMS["trpo"](epochs=2, minibatches=2, max_kl=0.02, damping=0.0), batch, torch.Generator())
    share = stats["trpo/step"]
    assert share in (1.0, 0.8)  # the whole step ends on the edge of the ball, x^2 / 2 = 0.02, or a rounding outside
    assert batch.x.item() == pytest.approx(0.2 * share, rel=1e-3)
    assert stats["grad_norm/actor"] == 1.0
    assert {call[-1] for call in batch.calls if call[0] == "step"} == {False}
    alone = Counted()
    assert "trpo/step" not in learn(ALGORITHMS["trpo"](), alone, torch.Generator(), actor=False)
    assert alone.x.item() == 0.0


def test_the_step_of_a_method_that_steers_it_is_measured_after_the_updates():
    assert learn(ALGORITHMS["ppo-kl"](epochs=2, minibatches=1), Counted(), torch.Generator())["kl/old"] == 0.02
    assert "kl/old" not in learn(ALGORITHMS["ppo"](), Counted(), torch.Generator())
    assert "kl/old" not in learn(ALGORITHMS["ppo-kl"](), Counted(), torch.Generator(), actor=False)


def test_coefficients_move_by_what_was_measured_while_the_actor_learned():
    one = KLCoefficients(ALGORITHMS["ppo-kl"](beta=0.1, kl_target=1.0, kl_horizon=100, target_old=0.01), 50)
    assert one.current() == Coefficients(0.1, 1.0)
    one.adapt({"kl": 9.0, "kl/old": 1.0}, actor=False)
    assert one.current() == Coefficients(0.1, 1.0)
    one.adapt({"kl": 9.0, "kl/old": 1.0})
    assert one.current() == Coefficients(pytest.approx(0.1 * 1.1), 2.0)
    again = KLCoefficients(ALGORITHMS["ppo-kl"](beta=0.1, kl_target=1.0), 50)
    again.load_state_dict(one.state_dict())
    assert again.current() == one.current()
    still = KLCoefficients(ALGORITHMS["ppo"](beta=0.1), 50)
    still.adapt({"kl": 9.0, "kl/old": 1.0})
    assert still.current() == Coefficients(0.1, 0.0)


@pytest.mark.parametrize("name", ["ppo", "a2c", "ppo-kl", "grpo"])
def test_the_oracles_weights_are_those_of_a_loop_written_out(name):
    """Advantage once, then Adam on the method's loss and on the squared error, minibatch by minibatch."""
    mdp, budget = training.example(), training.Budget(iterations=3, prompts=6)
    algorithm = ALGORITHMS[name](beta=mdp.beta)
    run = training.Run(algorithm, mdp, 5, budget)
    for i in range(3):
        run.iteration(i)

    generator = torch.Generator().manual_seed(5)
    logits = torch.nn.Parameter(mdp.logp_ref.clone())
    critic = torch.nn.Parameter(torch.zeros(len(mdp.states), dtype=torch.float64))
    actor_step, critic_step = torch.optim.Adam([logits], lr=0.1), torch.optim.Adam([critic], lr=0.1)
    beta_old = 1.0 if name == "ppo-kl" else 0.0
    size = 4 if algorithm.group else 1
    for i in range(3):
        actor_step.param_groups[0]["lr"] = 0.1 * (1 - 0.98 * i / 3)
        rows = mdp.sample(logits.detach(), 24 // size, generator, size)
        traj = mdp.trajectory(
            logits.detach(), rows, gamma=1.0, kl=algorithm.kl_in == "reward",
            value=critic.detach() if algorithm.critic else torch.zeros_like(critic),
            group=torch.arange(24 // size).repeat_interleave(size),
        )  # fmt: skip
        adv, ret = algorithm.advantage(traj)
        for _ in range(algorithm.epochs):
            for part in torch.randperm(len(rows), generator=generator).tensor_split(algorithm.minibatches):
                some = traj.rows(part)
                T = some.mask.shape[1]
                logp = mdp.sequence_logp(logits)[rows[part]][:, :T]
                per_step = policy_loss(algorithm, logp, some, adv[part, :T], Coefficients(mdp.beta, beta_old))
                weight = token_weight(some.mask, algorithm.average, dtype=logp.dtype)
                actor_step.zero_grad()
                reduce(per_step, weight, denominator(some.mask, algorithm.average)).backward()
                actor_step.step()
                if ret is not None:
                    value = mdp.along(critic, rows[part])[:, :T]
                    critic_step.zero_grad()
                    error = torch.where(some.mask, (value - ret[part, :T]).square() / 2, 0.0)
                    (error.sum() / some.mask.sum()).backward()
                    critic_step.step()
        if name == "ppo-kl":
            new = mdp.sequence_logp(logits.detach())[rows]
            ratio = torch.where(traj.mask, new - traj.logp_old, 0.0)
            moved = float((ratio.exp() - 1 - ratio).sum() / traj.mask.sum())
            beta_old *= 0.5 if moved < 0.01 / 1.5 else 2.0 if moved > 0.015 else 1.0
    torch.testing.assert_close(run.logits, logits, rtol=0, atol=1e-12)
    torch.testing.assert_close(run.critic, critic, rtol=0, atol=1e-12)
    assert run.coefficients.beta_old.coef == beta_old
