"""A method of one's own whose advantage or loss is of the wrong kind is refused by name before it has learned."""

from __future__ import annotations

import pytest
import yaml
from train_kit import settings

from steersman.cli import main

METHODS = """
from steersman.advantage.gae import Advantage
from steersman.algorithms.ppo import PPO
from steersman.algorithms.reinforce import REINFORCE
from steersman.algorithms.rloo import RLOO


class Right(RLOO):
    name = "right"
    title = "as it should be"

    def loss(self, logp, traj, adv, coef):
        return -(logp * adv)


class Reduced(RLOO):
    def loss(self, logp, traj, adv, coef):
        return (-(logp * adv)).mean()


class PerRow(RLOO):
    def loss(self, logp, traj, adv, coef):
        return -(logp * adv).sum(1, keepdim=True)


class NoGradient(RLOO):
    def loss(self, logp, traj, adv, coef):
        return -(logp.detach() * adv)


class Nothing(RLOO):
    def loss(self, logp, traj, adv, coef):
        print(end="")


class AdvantageOfRows(RLOO):
    def advantage(self, traj):
        return Advantage(super().advantage(traj).adv[:, 0])


class Bare(RLOO):
    def advantage(self, traj):
        return super().advantage(traj).adv


class Whole(RLOO):
    def advantage(self, traj):
        return Advantage(super().advantage(traj).adv.long())


class NotANumber(RLOO):
    def advantage(self, traj):
        adv = super().advantage(traj).adv
        adv[1, 0] = float("nan")
        return Advantage(adv)


class Raises(RLOO):
    def loss(self, logp, traj, adv, coef):
        return logp / self.unknown


class Exits(RLOO):
    def loss(self, logp, traj, adv, coef):
        raise SystemExit(0)


class WritesAdvantage(RLOO):
    def advantage(self, traj):
        traj.mask.fill_(False)
        return super().advantage(traj)


class WritesLoss(RLOO):
    def loss(self, logp, traj, adv, coef):
        traj.reward.zero_()
        return -(logp * adv)


class OneBound(RLOO):
    def clip_range(self):
        return 1


class NotEpochs(RLOO):
    epochs: str = "two"


class NoTarget(PPO):
    def advantage(self, traj):
        return Advantage(super().advantage(traj).adv)


class Steps(REINFORCE):
    def loss(self, logp, traj, adv, coef):
        return super().loss(logp, traj, adv, coef).mean()
"""

FAULTS = {
    "Reduced": "Reduced.loss: the loss is a tensor of shape []; a floating tensor of shape [B, T] = [",
    "PerRow": "PerRow.loss: the loss is a tensor of shape [",
    "NoGradient": "NoGradient.loss gave a loss without a gradient",
    "Nothing": "Nothing.loss: the loss is a NoneType; a floating tensor",
    "AdvantageOfRows": "advantage: adv is a tensor of shape [8]; a floating tensor of shape [B, T] = [8, ",
    "Bare": "Bare.advantage gave a tensor of shape [8, ",
    "Whole": "Whole.advantage: adv is a tensor of torch.int64",
    "NotANumber": "NotANumber.advantage: the advantage of row 1, step 0 is nan",
    "Raises": "Raises.loss: it raised AttributeError: 'Raises' object has no attribute 'unknown' (",
    "Exits": "Exits.loss: it asked the process to end, by sys.exit(0)",
    "WritesAdvantage": "WritesAdvantage.advantage changed traj.mask in place; work on a copy of it",
    "WritesLoss": "WritesLoss.loss changed traj.reward in place",
    "OneBound": "OneBound.clip_range gave 1; give (below, above), two numbers, or None",
    "NotEpochs": "the setting epochs is 'two' by default, and every method's epochs must be so",
    "NoTarget": "NoTarget.advantage: ret, what the critic regresses to, is a NoneType",
}


def told(capsys) -> str:
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("name", ["Right", *FAULTS])
def test_a_language_models_loop_refuses_what_would_be_broadcast(name, tmp_path, mini, capsys):
    (tmp_path / "mine.py").write_text(METHODS)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings(tmp_path, mini)))
    done = main([f"{tmp_path}/mine.py:{name}", str(path), "--iterations", "1"])
    said = told(capsys)
    assert done == (0 if name == "Right" else 2), said
    assert FAULTS.get(name, "") in said
    if name == "Raises":
        assert "mine.py, line " in said
        assert "in loss" in (tmp_path / "run" / "tracebacks.txt").read_text()


def test_so_does_the_loop_on_gymnasium(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(METHODS)
    words = ["control", "--algorithm", f"{tmp_path}/mine.py:Steps", "--rollout.episodes", "2", "--iterations", "1"]
    assert main([*words, "--run.dir", str(tmp_path / "run")]) == 2
    assert "Steps.loss: the loss is a tensor of shape []; a floating tensor of shape [B, T] = [" in told(capsys)
