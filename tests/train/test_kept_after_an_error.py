"""An error that ends a run saves the last whole step, and the run goes on from it as if nothing had happened."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch
from letter_models import rows_of, save_mini
from test_evaluation_at_looks import made
from train_kit import merge, plain, recipe, rows, settings, weights

from steersman.config.load import load_recipe
from steersman.control.recipe import ControlRecipe, recipe_class
from steersman.control.run import run as run_control
from steersman.distill import run as distill
from steersman.distill.recipe import DistillRecipe
from steersman.guards.user_code import CtrlCError
from steersman.reward import core
from steersman.run.files.checkpoint import Checkpointer
from steersman.types import SteersmanError
from steersman.update.optimizer import Optimizer
from steersman.verbs import rl

NEVER = {"run.save_every": 50, "iterations": 5, "run.eval_every": 2}


class Gone:
    """A function that works, but for its call of this number, in which the service behind it does not answer."""

    def __init__(self, call: int, error: Callable[[], BaseException] = lambda: ConnectionError("judge gone")) -> None:
        self.left, self.error = call, error

    def count_a(self, prompts, completions):
        self.left -= 1
        if self.left == 0:
            raise self.error()
        return [c.count("a") / 4 for c in completions]


@contextmanager
def reward_that_fails(monkeypatch, call: int, **how: Any) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(core, "load_function", lambda _: Gone(call, **how).count_a)
        yield


def saved(run: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in sorted((run / "checkpoints").glob("step-*"))]


def assert_same_run(a: Path, b: Path) -> None:
    one, two = weights(a / "model"), weights(b / "model")
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert [unlike_syncs(row) for row in rows(a)] == [unlike_syncs(row) for row in rows(b)]
    for name in ("samples.jsonl", "evaluation.jsonl", "health.jsonl"):
        if (a / name).exists():
            assert (a / name).read_text() == (b / name).read_text(), name


def unlike_syncs(row):
    return {k: v for k, v in plain(row).items() if not k.startswith("sync/")}


def fails_and_goes_on(name, asked, tmp_path, monkeypatch, call: int, step: int) -> None:
    """The reward fails in that call, after which that step is saved; calls: a look, an iteration each, looks."""
    rl.run(recipe(name, asked))
    cut = recipe(name, merge(asked, {"run.dir": str(tmp_path / "cut")}))
    with (
        reward_that_fails(monkeypatch, call),
        pytest.raises(SteersmanError, match=rf"judge gone.*\. Step {step} is saved: mend .* go on with --resume"),
    ):
        rl.run(cut)
    assert saved(tmp_path / "cut")[-1] == step
    assert not (tmp_path / "cut" / "model").exists()
    rl.run(cut, resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "cut")


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("grpo", {"curriculum": {}}),
        ("ppo", {"reward.normalise": True, "algorithm.kl_target": 0.01, "algorithm.kl_horizon": 50}),
        ("reinforce", {"optimizer.schedule": "cosine"}),
    ],
)
def test_a_reward_that_fails_loses_no_step(name, more, base, tmp_path, monkeypatch):
    fails_and_goes_on(name, merge(base, {**NEVER, **more}), tmp_path, monkeypatch, call=6, step=3)


def test_neither_does_one_that_fails_after_prompts_were_drawn_anew(base, tmp_path, monkeypatch):
    """What the failed iteration had drawn and averaged before is undone."""
    asked = merge(base, {**NEVER, "reward.normalise": True})
    fails_and_goes_on("dapo", asked, tmp_path, monkeypatch, call=6, step=1)


@pytest.mark.parametrize(("call", "step"), [(4, 2), (9, 5)])
def test_a_look_that_fails_is_made_up_for(call, step, base, tmp_path, monkeypatch):
    """The step's own numbers are in the log then, too; after the last step as in the middle."""
    fails_and_goes_on("grpo", merge(base, NEVER), tmp_path, monkeypatch, call=call, step=step)


def test_a_failure_before_the_first_step_has_nothing_to_save(base, tmp_path, monkeypatch):
    with reward_that_fails(monkeypatch, 2), pytest.raises(SteersmanError, match="judge gone") as caught:
        rl.run(recipe("grpo", merge(base, NEVER)))
    assert "saved" not in str(caught.value)
    assert saved(tmp_path / "run") == []


def test_the_second_failure_tells_the_step_again(base, tmp_path, monkeypatch):
    asked = recipe("grpo", merge(base, NEVER))
    for resume, call in ((False, 4), (True, 1), (True, 2)):
        with reward_that_fails(monkeypatch, call), pytest.raises(SteersmanError, match="Step 2 is saved: mend"):
            rl.run(asked, resume=resume)
        assert saved(tmp_path / "run") == [2]


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_other_errors_save_as_well(error, base, tmp_path, monkeypatch, capsys):
    """A plain interrupt is no second Ctrl-C."""
    asked = recipe("grpo", merge(base, NEVER))

    def out_of_memory(*_):
        if (tmp_path / "run" / "metrics.jsonl").exists() and len(rows(tmp_path / "run")) > 2:
            raise error("no room")
        return before(*_)

    before = rl.OnPolicy.experience
    monkeypatch.setattr(rl.OnPolicy, "experience", out_of_memory)
    with pytest.raises(error) as caught:
        rl.run(asked)
    assert saved(tmp_path / "run") == [2]
    told = " ".join([*getattr(caught.value, "__notes__", []), *capsys.readouterr().out.split()])
    assert "Step 2 is saved" in told


def test_weights_in_the_middle_of_an_update_are_not_saved(base, tmp_path, monkeypatch):
    step = Optimizer.step

    def breaks(self):
        if self.updates == 2:
            with torch.no_grad():
                self.parameters[0].add_(1)
            raise RuntimeError("device lost")
        return step(self)

    monkeypatch.setattr(Optimizer, "step", breaks)
    for every, told in ((50, "nothing is saved"), (1, r"step 2 is the last that is saved; --resume goes on from it")):
        changes = {
            **NEVER,
            "run.save_every": every,
            "run.eval_every": 50,
            "run.dir": str(tmp_path / f"every-{every}"),
        }
        with pytest.raises(RuntimeError, match="device lost") as caught:
            rl.run(recipe("grpo", merge(base, {**changes, "algorithm.minibatches": 1})))
        (note,) = caught.value.__notes__
        assert (every == 1 and note.startswith("Step 2 is saved")) or told in note
        assert saved(tmp_path / f"every-{every}") == ([1, 2] if every == 1 else [])


def test_numbers_that_are_not_finite_save_nothing(base, tmp_path, monkeypatch):
    real = rl.RewardLooks.look

    def nan(self, session, step):
        return {**real(self, session, step), **({"held_out/length": float("nan")} if step == 4 else {})}

    monkeypatch.setattr(rl.RewardLooks, "look", nan)
    with pytest.raises(SteersmanError, match=r"held_out/length = nan.*Nothing was saved with it; .*step-00000002"):
        rl.run(recipe("grpo", merge(base, {**NEVER, "run.save_every": 2, "run.keep_last": 1})))
    assert saved(tmp_path / "run") == [2]


def test_a_step_is_saved_before_its_look(base, tmp_path, monkeypatch):
    """A look that is killed, and has no time to save, takes no step with it; the checkpoint is ranked after it."""
    asked = merge(base, {**NEVER, "run.save_every": 2})
    rl.run(recipe("grpo", asked))
    cut = recipe("grpo", merge(asked, {"run.dir": str(tmp_path / "cut")}))
    with reward_that_fails(monkeypatch, 7, error=CtrlCError), pytest.raises(KeyboardInterrupt):
        rl.run(cut)
    assert saved(tmp_path / "cut") == [2, 4]
    files = [json.loads((p / "manifest.json").read_text()) for p in sorted((tmp_path / "cut/checkpoints").iterdir())]
    assert [bool(file["metrics"]) for file in files] == [True, False]
    rl.run(cut, resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "cut")
    a, b = (Checkpointer(tmp_path / run, metric="held_out/reward/total") for run in ("run", "cut"))
    assert a.best().name == b.best().name
    assert saved(tmp_path / "run") == saved(tmp_path / "cut")


FAILING = """
from steersman.metrics import Scorer

class Judge(Scorer):
    name, implementation, calls, fails = "judge", "one of our own", 0, FAILS

    def rows(self, batch):
        Judge.calls += 1
        if Judge.calls == self.fails:
            raise ConnectionError("the judge did not answer")
        return [float(len(text)) for text in batch.texts]
"""


@pytest.mark.parametrize("name", ["sft", "dpo"])
@pytest.mark.parametrize(("look", "keep"), [(2, "last"), (4, "best")])
def test_offline_looks_that_fail_are_made_up_for(name, look, keep, tmp_path, mini):
    """Looks come at 0, 2, 4 and 5; the last one's failure leaves the trained step, too."""
    for run, fails in (("whole", None), ("cut", look)):
        folder = tmp_path / run
        folder.mkdir()
        (folder / "judge.py").write_text(FAILING.replace("FAILS", str(fails)))
        changes = {
            "train.max_steps": 5, "train.epochs": 9.0, "run.save_every": 50, "run.eval_every": 2, "train.keep": keep,
            "evaluation.metrics": {"j": {"metric": f"{folder}/judge.py:Judge"}}, "evaluation.harness": None,
            "evaluation.data": {"path": str(tmp_path / "asked.jsonl")}, "run.dir": str(folder / "run"),
        }  # fmt: skip
        verb, asked = made(name, tmp_path, mini, {"run.save_every": 50})
        asked = type(asked).model_validate(merge(asked.model_dump(mode="json", exclude_unset=True), changes))
        if fails:
            step = [0, 2, 4, 5][look - 1]
            with pytest.raises(SteersmanError, match=rf"did not answer.*\. Step {step} is saved: mend"):
                verb.here(asked, resume=False)
            assert saved(folder / "run")[-1] == step
            # Python takes a file of the same size, changed within one second, for the one it had compiled.
            (folder / "judge.py").write_text(FAILING.replace("FAILS", "None"))
        verb.here(asked, resume=bool(fails))
    assert_same_run(tmp_path / "whole" / "run", tmp_path / "cut" / "run")


def test_a_student_whose_reward_fails_loses_no_step(tmp_path, mini, monkeypatch):
    asked = merge(settings(tmp_path, mini), {
        "teacher": {"path": str(mini)}, "train": {"batch_size": 4, "on_policy": 1.0, "max_steps": 4, "epochs": 9.0},
        "run.save_every": 50, "run.eval_every": 50, "reward.normalise": True,
    })  # fmt: skip
    asked["rollout"] = {"samples": 2, "max_new_tokens": 6, "held_out": 2}
    del asked["iterations"]
    distill.run(DistillRecipe.model_validate(asked))
    cut = DistillRecipe.model_validate(merge(asked, {"run.dir": str(tmp_path / "cut")}))
    for resume, call, step in ((False, 3, 1), (True, 2, 2)):
        with reward_that_fails(monkeypatch, call), pytest.raises(SteersmanError, match=f"Step {step} is saved"):
            distill.run(cut, resume=resume)
    distill.run(cut, resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "cut")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "call", "exact"), [("grpo", 4, True), ("dapo", 9, False)])
def test_what_was_sampled_ahead_is_kept(name, call, exact, base, tmp_path, monkeypatch):
    """The samples of a batch whose rewards failed are rewarded when the run goes on."""
    asked = merge(base, {**NEVER, "rollout.engine": "process", "rollout.ahead": 2, "rollout.timeout": 400})
    rl.run(recipe(name, asked))
    cut = recipe(name, merge(asked, {"run.dir": str(tmp_path / "cut")}))
    with reward_that_fails(monkeypatch, call), pytest.raises(SteersmanError, match=r"Step \d is saved"):
        rl.run(cut)
    assert saved(tmp_path / "cut")
    rl.run(cut, resume=True)
    used = [[r["prompts"] for r in rows_of(tmp_path / run / "rollouts.jsonl") if r["stands"] == "used"]
            for run in ("run", "cut")]  # fmt: skip
    assert len(used[0]) == len(used[1]) == 5
    if exact:
        assert used[0] == used[1]
        assert_same_run(tmp_path / "run", tmp_path / "cut")


WORLD = """
import gymnasium as gym
from gymnasium import spaces

class World(gym.Env):
    observation_space, action_space = spaces.Box(-1, 1, (2,)), spaces.Discrete(2)
    steps, fails = 0, None

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.state = self.np_random.uniform(-1, 1, 2).astype("float32")
        return self.state, {}

    def step(self, action):
        World.steps += 1
        if World.steps == World.fails:
            raise ConnectionError("simulator gone")
        self.state = (0.9 * self.state + 0.1 * (2 * action - 1)).clip(-1, 1).astype("float32")
        return self.state, float(self.state[0]), bool(self.np_random.uniform() < 0.1), False, {}
"""


@pytest.mark.parametrize("name", ["ppo", "dqn"])
@pytest.mark.parametrize("where", ["collecting", "looking"])
def test_an_environment_of_a_control_run_that_fails_loses_no_step(name, where, tmp_path, monkeypatch):
    def control(*words: str) -> ControlRecipe:
        return load_recipe(recipe_class(None, list(words)), None, list(words))

    scope: dict[str, Any] = {}
    exec(WORLD, scope)
    world = scope["World"]
    gym.register(f"Failing{name}{where}-v0", entry_point=world, max_episode_steps=30)
    words = ["--env", f"Failing{name}{where}-v0", "--algorithm", name, "--rollout.copies", "2", "--iterations", "4"]
    words += ["--rollout.steps", "32", "--network.hidden", "[8]", "--run.eval_every", "2", "--run.save_every", "50"]
    words += ["--evaluation.during", "2", "--evaluation.episodes", "2"]
    words += ["--settings.learning_starts", "32", "--settings.updates", "4"] if name == "dqn" else []
    whole = run_control(control(*words, "--run.dir", str(tmp_path / "run")))
    cut = control(*words, "--run.dir", str(tmp_path / "cut"))
    world.steps, world.fails = 0, 2 * 32 + 9 if where == "collecting" else 4 * 32 + 3
    with pytest.raises(Exception, match="simulator gone") as caught:
        run_control(cut)
    step = 1 if where == "collecting" else 2
    assert f"tep {step} is saved" in str(caught.value) + str(getattr(caught.value, "__notes__", ""))
    world.fails = None
    again = run_control(cut, resume=True)
    assert {k: v for k, v in whole.items() if k not in ("run", "seconds")} == {
        k: v for k, v in again.items() if k not in ("run", "seconds")
    }
    a, b = (torch.load(tmp_path / run / "policy.pt", weights_only=True) for run in ("run", "cut"))
    assert str(a) == str(b)
    assert [plain(row) for row in rows(tmp_path / "run")] == [plain(row) for row in rows(tmp_path / "cut")]


BROKEN = """
class Broken:
    def begin(self, row):
        pass

    def step(self, text):
        if self.only and text.count("a") < 1:
            return "no", 1.0, True
        return "x", 1.0

    only = ONLY
"""


@pytest.mark.parametrize("only", [False, True])
def test_a_batch_of_nothing_but_faults_ends_the_run(only, tmp_path):
    (tmp_path / "broken.py").write_text(BROKEN.replace("ONLY", str(only)))
    values = {
        "reward.parts": {"play": {"environment": "turn"}}, "rollout.max_new_tokens": 4, "rollout.samples": 4,
        "environment": {"path": f"{tmp_path / 'broken.py'}:Broken"}, "iterations": 2, "run.eval_every": 1,
    }  # fmt: skip
    asked = recipe("grpo", merge(settings(tmp_path, save_mini(tmp_path / "mini", context=128)), values))
    if only:
        rl.run(asked)
        assert 0 < rows(tmp_path / "run")[-1]["episode/fault"] < 1
        return
    with pytest.raises(SteersmanError, match=r"each of the batch's 16 episodes ended by a fault, .*2 values"):
        rl.run(asked)
