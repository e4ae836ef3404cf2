"""What tests of `steersman distill` run it with."""

import pytest
from train_kit import merge

from steersman.distill import run as verb
from steersman.distill.loop import Distill
from steersman.distill.recipe import DistillRecipe
from steersman.guards.user_code import CtrlCError


def distil(settings, **extra):
    """The summary of a run; `train__epochs=2` sets train.epochs."""
    values = merge(settings, {k.replace("__", "."): v for k, v in extra.items()})
    return verb.run(DistillRecipe.model_validate(values))


def stopped_and_resumed(settings, steps, monkeypatch):
    """A run that dies after so many steps, and goes on."""
    recipe, step, done = DistillRecipe.model_validate(settings), Distill.step, []

    def dies(self):
        if len(done) == steps:
            raise CtrlCError  # at which nothing is saved
        done.append(1)
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Distill, "step", dies)
        with pytest.raises(KeyboardInterrupt):
            verb.run(recipe)
    verb.run(recipe, resume=True)
