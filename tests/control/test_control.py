"""The loops and the verb: they learn, repeat, resume, and refuse what they can not do."""

from __future__ import annotations

import io
import json
import math

import pytest
import torch
from PIL import Image

from steersman import api
from steersman.algorithms import ALGORITHMS, Coefficients
from steersman.cli import main
from steersman.config.dump import dump_recipe
from steersman.config.load import load_recipe
from steersman.control.envs import maker
from steersman.control.evaluate import evaluate
from steersman.control.learner import Learner, flatten
from steersman.control.recipe import RECIPES, ControlRecipe, recipe_class, refusal
from steersman.control.run import build
from steersman.loss.masks import top_entropy
from steersman.loss.reduce import token_weight
from steersman.run.seed import seed_everything
from steersman.train.session import Session
from steersman.types import SteersmanError

GRADIENT = [name for name in ALGORITHMS if refusal(ALGORITHMS[name]) is None]
SMALL = ["--rollout.copies", "2", "--iterations", "4", "--network.hidden", "[16]"]


def recipe(*words: str) -> ControlRecipe:
    return load_recipe(recipe_class(None, list(words)), None, list(words))


def small(name: str, *words: str) -> ControlRecipe:
    if name == "dqn":
        size = ["--settings.learning_starts", "32", "--settings.updates", "4", "--rollout.steps", "32"]
    elif RECIPES[name]().rollout.episodes is None:
        size = ["--settings.epochs", "2", "--rollout.steps", "32"]
    else:
        size = ["--rollout.episodes", "3"]
    return recipe("--algorithm", name, *SMALL, *size, *words)


def fresh(made: ControlRecipe):
    seed_everything(made.run.seed)
    return build(made, maker(made.env, made.env_options), torch.device("cpu"))


def weights(state) -> torch.Tensor:
    networks = state.networks()
    return torch.cat([x.flatten() for x in networks.get("policy", networks.get("q")).values()])


@pytest.mark.parametrize("name", [*GRADIENT, "dqn"])
def test_same_seed_same_result_and_resumed_run_ends_with_the_same_bits(name):
    options = ["--rollout.normalise", "true"] if name in ("ppo", "reinforce") else []
    made = small(name, *options)
    once, twice = fresh(made), fresh(made)
    start = weights(once).clone()
    stats = [[state.iteration() for _ in range(2)] for state in (once, twice)]
    assert stats[0] == stats[1]
    saved = twice.state_dict()
    torch.save(saved, buffer := io.BytesIO())
    buffer.seek(0)
    resumed = fresh(made)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    for _ in range(2):
        assert once.iteration() == resumed.iteration()
    assert torch.equal(weights(once), weights(resumed))
    assert not torch.equal(weights(once), start)
    if once.__class__.__name__ == "ControlLoop" and once.critic is not None:
        for a, b in zip(once.critic.parameters(), resumed.critic.parameters(), strict=True):
            assert torch.equal(a, b)
    other = fresh(small(name, *options, "--run.seed", "1"))
    assert not torch.equal(weights(other), start), "another seed, another run"


@pytest.mark.parametrize("name", ["ppo", "trpo", "reinforce"])
@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_ratio_is_one_before_the_first_update(name, env):
    state = fresh(small(name, "--env", env, "--env_options.max_episode_steps", "40"))
    for _ in range(2):
        stats = state.iteration()
        assert stats.get("ratio_gap", 0.0) < 1e-5
    if name == "trpo":
        assert 0 < stats["trpo/kl"] <= 0.01
        assert stats["trpo/improvement"] > 0


def test_the_controller_of_ppo_kl_sees_the_step_that_was_made(monkeypatch):
    state = fresh(small("ppo-kl", "--settings.target_old", "1e9"))
    seen, update = [], Learner.update

    def watched(self, obs, action, traj, *given):
        seen.append((obs, action, traj))
        return update(self, obs, action, traj, *given)

    monkeypatch.setattr(Learner, "update", watched)
    first = state.coefficients.beta_old.coef
    stats = state.iteration()
    obs, action, traj = seen[0]
    with torch.no_grad():
        logp = state.policy.distribution(obs[:, :-1][traj.mask]).log_prob(action[traj.mask])
    log_ratio = (logp - traj.logp_old[traj.mask]).double()
    expected = float((log_ratio.exp() - 1 - log_ratio).mean())
    assert expected > 1e-6
    assert stats["kl/old"] == pytest.approx(expected, rel=1e-3)
    assert state.coefficients.beta_old.coef == first / 2


def test_gaussian_policy_samples_what_its_log_probability_says():
    state = fresh(small("ppo", "--env", "Pendulum-v1", "--network.log_std", "-0.7"))
    obs = torch.randn(1, 3).expand(40_000, 3)
    action = state.policy.sample(obs, torch.Generator().manual_seed(0))
    distribution = state.policy.distribution(obs)
    assert float(action.detach().std()) == pytest.approx(torch.tensor(-0.7).exp().item(), rel=0.02)
    assert -float(distribution.log_prob(action).mean()) == pytest.approx(float(distribution.entropy()[0]), abs=0.02)


def test_categorical_policy_samples_its_probabilities():
    state = fresh(small("ppo", "--env", "Acrobot-v1"))
    torch.nn.init.normal_(state.policy.net[-1].weight)
    obs = torch.randn(1, 6).expand(40_000, 6)
    action = state.policy.sample(obs, torch.Generator().manual_seed(0))
    share = torch.bincount(action, minlength=3) / len(action)
    torch.testing.assert_close(share, state.policy.distribution(obs).probs[0], atol=0.01, rtol=0)


def test_minibatch_gradients_average_to_the_whole_batch():
    """The gradient of 4 minibatches, weighted by size, is that of one; `episode` weights as the formula says."""
    state = fresh(small("reinforce", "--settings.average", "episode"))
    learner = state.learner
    seen = state.collect(torch.Generator().manual_seed(0))
    obs, action, traj = state.experience(seen)
    adv = learner.algorithm.advantage(traj)
    weight = token_weight(traj.mask, "episode", 500.0) / len(traj) * traj.mask.sum()
    batch = flatten(obs, action, traj, adv, weight)
    total = learner.policy_loss(batch, Coefficients())[0]
    parts = [batch.rows(i) for i in torch.arange(len(batch)).tensor_split(4)]
    apart = sum(learner.policy_loss(p, Coefficients())[0] * len(p) for p in parts) / len(batch)
    torch.testing.assert_close(apart, total)
    expected = 0.0
    for b, n in enumerate(seen.length.tolist()):
        logp = state.policy.distribution(obs[b, :n]).log_prob(action[b, :n])
        to_go = [sum(0.99 ** (k - t) * float(seen.reward[b, k]) for k in range(t, n)) for t in range(n)]
        expected -= float((torch.tensor(to_go) * logp.detach()).sum())
    assert float(total) == pytest.approx(expected / 500 / len(traj), rel=1e-4)


def test_entropy_bonus_lowers_the_loss_by_its_coefficient_times_the_entropy():
    losses = []
    for coef in ("0.0", "0.5"):
        state = fresh(small("ppo", "--settings.entropy_coef", coef))
        obs, action, traj = state.experience(state.collect(torch.Generator().manual_seed(0)))
        batch = flatten(obs, action, traj, state.algorithm.advantage(traj), traj.mask.float())
        loss, _, entropy = state.learner.policy_loss(batch, Coefficients())
        losses.append(float(loss))
    assert losses[0] - losses[1] == pytest.approx(0.5 * float(entropy.mean()), rel=1e-4)


def test_double_dqn_target_by_hand():
    from steersman.control.dqn import td_target

    learning, lagging = torch.tensor([[1.0, 3.0], [5.0, 2.0]]), torch.tensor([[10.0, 20.0], [30.0, 40.0]])
    reward, discount = torch.tensor([1.0, 2.0]), torch.tensor([0.9, 0.0])
    after = torch.tensor([[0], [1]])
    q, target = (lambda obs, table=t: table[obs[:, 0]] for t in (learning, lagging))
    assert td_target(q, target, reward, discount, after, double=True).tolist() == [19.0, 2.0]
    discount = torch.tensor([0.9, 0.9])
    assert td_target(q, target, reward, discount, after, double=True).tolist() == pytest.approx([19.0, 29.0])
    assert td_target(q, target, reward, discount, after, double=False).tolist() == pytest.approx([19.0, 38.0])


def test_replay_keeps_the_newest_and_marks_ends():
    from steersman.control.dqn import Replay
    from steersman.control.envs import Worlds
    from steersman.control.experience import collect

    worlds = Worlds(maker("CartPole-v1", {"max_episode_steps": 12}), 2, 0, "test")
    replay = Replay(50, 4)
    falling = lambda obs: torch.zeros(len(obs), dtype=torch.int64)  # noqa: E731
    for _ in range(4):
        seen = collect(worlds, falling, 20)
        replay.add(seen, 0.9, 1.0)
    assert replay.count == 50
    # pushed to one side the pole falls in 8 to 11 steps: every episode terminates
    ends = replay.discount == 0
    assert int(ends.sum()) > 2
    # within an episode the next observation of one transition is the observation of the following
    order = (replay.next + torch.arange(50)) % 50
    obs, after, ends = replay.obs[order], replay.next_obs[order], ends[order]
    linked = (after[:-2] == obs[2:]).all(-1)  # the two copies take turns
    assert bool((linked | ends[:-2]).all())


@pytest.mark.parametrize("size", [7, 20, 100, 256, 300])
def test_replay_keeps_the_newest_steps_of_every_copy(size):
    from steersman.control.dqn import Replay
    from steersman.control.experience import Experience

    copies, steps = 4, 64
    replay = Replay(size, 1)
    for first in (0, steps):
        # each copy's steps as two rows, copy by copy, as a collection has them
        rows = [(c, start, n) for c in range(copies) for start, n in ((0, 10 + c), (10 + c, steps - 10 - c))]
        obs = torch.stack([1000.0 * c + first + start + torch.arange(61.0) for c, start, _ in rows])[..., None]
        B = len(rows)
        zeros = torch.zeros(B, 60)
        seen = Experience(
            obs=obs, action=zeros.long(), reward=obs[:, :-1, 0], length=torch.tensor([n for *_, n in rows]),
            begun=torch.tensor([start for _, start, _ in rows]), terminated=torch.zeros(B, dtype=torch.bool),
            returns=[], lengths=[],
        )  # fmt: skip
        replay.add(seen, 0.9, 1.0)
    assert replay.count == min(size, 2 * copies * steps)
    assert torch.equal(replay.reward, replay.obs[:, 0]), "fields of one transition lie apart"
    time, last = replay.obs[:, 0] % 1000, 2 * steps - 1
    assert int(time.min()) == last - -(-size // copies) + 1
    for copy in range(copies):
        own = time[replay.obs[:, 0] // 1000 == copy]
        assert size // copies <= len(own) <= -(-size // copies)
        assert int(own.max()) == last


def test_fast_learning():
    """CartPole from about 20 to beyond 150 in a few seconds."""
    made = recipe("--algorithm", "ppo", "--iterations", "12")
    state = fresh(made)
    for _ in range(made.iterations):
        state.iteration()
    assert evaluate(state, maker(made.env, {}), made, 20)["held_out/return"] > 150


@pytest.mark.slow
def test_cartpole_is_solved_by_ppo():
    made = recipe("--algorithm", "ppo")  # as docs/results/control.md records it
    state = fresh(made)
    for _ in range(made.iterations):
        state.iteration()
    assert evaluate(state, maker(made.env, {}), made, 100)["held_out/return"] >= 475


def test_verb_leaves_policy_curve_report_and_video(tmp_path):
    video = tmp_path / "out.gif"
    words = ["control", "--algorithm", "trpo", *SMALL, "--rollout.steps", "32", "--video", str(video)]
    words += ["--evaluation.episodes", "5", "--run.eval_every", "2", "--evaluation.during", "2"]
    assert main([*words, "--run.dir", str(tmp_path / "run")]) == 0
    run = tmp_path / "run"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["finished"]
    assert summary["held_out/return"] > 5
    assert Image.open(run / "curve.png").size[0] > 300
    assert "CartPole" in (run / "config.yaml").read_text()
    assert (run / "report.html").exists()
    assert Image.open(video).n_frames > 3
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [1, 2, 3, 4]
    assert {"held_out/return", "reward/return", "env_steps", "trpo/kl"} <= rows[3].keys() | rows[1].keys() | rows[
        0
    ].keys()
    saved = torch.load(run / "policy.pt", weights_only=True)
    assert saved["policy"]["net.0.weight"].shape == (16, 4)


def test_a_video_that_fails_at_the_end_costs_nothing_else(tmp_path, monkeypatch, capsys):
    save = Image.Image.save

    def full(image, place, *given, **how):
        if str(place).endswith(".gif"):
            raise OSError("No space left on device")
        save(image, place, *given, **how)

    monkeypatch.setattr(Image.Image, "save", full)
    words = ["control", "--algorithm", "ppo", *SMALL, "--rollout.steps", "32", "--evaluation.episodes", "2"]
    assert main([*words, "--video", str(tmp_path / "x.gif"), "--run.dir", str(tmp_path / "run")]) == 2
    assert "No space left" in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["finished"]
    assert (tmp_path / "run" / "policy.pt").exists()


def test_a_number_that_is_not_finite_is_told_in_whole_sentences(tmp_path):
    made = small("ppo", "--run.dir", str(tmp_path / "run"))
    session = Session("control", made, resume=False, metric="held_out/return")
    session.__enter__()
    session.begin(fresh(made), 1)
    with pytest.raises(SteersmanError, match=r"loss = nan.*without a loss scale\. Nothing was saved") as caught:
        session.observe(1, {"loss": float("nan")})
    session.__exit__(SteersmanError, caught.value, None)


def test_verb_finishes_what_a_shorter_run_began(tmp_path):
    """Four iterations in one go, and two resumed to four, end with the same weights."""
    words = [
        "control",
        "--algorithm",
        "ppo",
        "--rollout.copies",
        "2",
        "--rollout.steps",
        "32",
        "--evaluation.episodes",
    ]
    words += ["3", "--optimizer.schedule", "constant", "--critic.optimizer.schedule", "constant"]
    assert main([*words, "--iterations", "4", "--run.dir", str(tmp_path / "a")]) == 0
    assert main([*words, "--iterations", "2", "--run.dir", str(tmp_path / "b")]) == 0
    assert main([*words, "--iterations", "4", "--run.dir", str(tmp_path / "b"), "--resume"]) == 0
    a, b = (torch.load(tmp_path / x / "policy.pt", weights_only=True)["policy"] for x in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_tabular_learner_reaches_the_optimum_through_the_verb(tmp_path):
    words = ["control", "--env", "CliffWalking-v1", "--algorithm", "q-learning", "--settings.episodes", "600"]
    words += ["--settings.epsilon_start", "0.1", "--settings.alpha_scale", "1e9", "--settings.alpha", "1"]
    assert main([*words, "--iterations", "20", "--run.dir", str(tmp_path / "run")]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["optimal"] == 1.0
    assert summary["value"] == pytest.approx(-sum(0.99**t for t in range(13)))


@pytest.mark.parametrize("episodes", [1, 7])
def test_a_tabular_run_of_few_episodes_has_a_row_for_each(tmp_path, episodes):
    words = ["control", "--env", "FrozenLake-v1", "--algorithm", "q-learning", "--run.dir", str(tmp_path / "run")]
    assert main([*words, "--settings.episodes", str(episodes)]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, episodes + 1))
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["finished"]


def test_a_learned_policy_that_never_ends_is_a_result_without_a_value(tmp_path, capsys):
    words = ["control", "--env", "CliffWalking-v1", "--algorithm", "sarsa", "--settings.gamma", "1"]
    words += ["--settings.episodes", "20", "--iterations", "10", "--env_options.max_episode_steps", "50"]
    assert main([*words, "--run.dir", str(tmp_path / "run")]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["finished"]
    assert (summary["optimum"], summary["optimal"]) == (pytest.approx(-13), 0.0)
    assert "value" not in summary
    assert (tmp_path / "run" / "curve.png").exists()
    assert "no finite value" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("name", ["ppo", "reinforce"])
def test_only_the_steps_of_most_entropy_teach(name, monkeypatch):
    """They are chosen by the policy's own entropies, and where none is chosen it stays as it is."""
    state, asked = fresh(small(name, "--settings.top_entropy", "0.25")), []

    def chosen(entropy, mask, share):
        asked.append((entropy[mask], int(mask.sum()), share))
        return top_entropy(entropy, mask, share) if len(asked) == 1 else torch.zeros_like(mask)

    monkeypatch.setattr("steersman.control.learner.top_entropy", chosen)
    start = weights(state).clone()
    state.iteration()
    (entropy, count, share), after = asked[0], weights(state).clone()
    assert (len(entropy), share) == (count, 0.25)
    assert len(entropy.unique()) > count / 2
    assert 0.6 < float(entropy.min()) < float(entropy.max()) <= math.log(2) + 1e-6, "two actions, near even at first"
    assert not torch.equal(after, start)
    for group in state.learner.actor.adamw.param_groups:
        group["betas"] = (0.0, 0.999)  # what moved it before does not move it on
    state.iteration()
    assert torch.equal(weights(state), after)


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_every_algorithm_is_taken_or_refused_with_its_reason(name):
    if name in RECIPES:
        made = recipe("--algorithm", name)
        assert load_recipe(RECIPES[name], None, []) == made
        assert dump_recipe(made)
    else:
        with pytest.raises(SteersmanError, match="for control choose one of reinforce"):
            recipe("--algorithm", name)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--algorithm", "grpo"], "GRPO compares several answers to one prompt"),
        (["--algorithm", "remax"], "greedy answer"),
        (["--algorithm", "nlpo"], "vocabulary"),
        (["--algorithm", "pppo"], "there is no method 'pppo'"),
        (["--algorithm=reinforce", "--critic.value_clip", "0.2"], "REINFORCE has no critic; remove"),
        (["--algorithm", "dqn", "--critic.value_clip", "0.2"], "dqn has no critic; remove"),
        (["--algorithm", "ppo", "--critic", "null"], "PPO needs a critic"),
        (["--algorithm", "reinforce", "--rollout.episodes", "null"], "set rollout.episodes"),
        (["--algorithm", "a2c", "--settings.average", "episode"], "fragments"),
        (["--algorithm", "ppo", "--settings.beta", "0.1"], "leaving a reference"),
        (["--algorithm", "ppo", "--settings.lam", "1.5"], "settings.lam"),
        (["--algorithm", "ppo", "--settings.gamma", "-0.1"], "settings.gamma"),
        (["--algorithm", "ppo", "--settings.double", "true"], "settings.double"),
        (["--algorithm", "ppo", "--settings.kl_in", "loss"], "settings.kl_in: this verb does not read it"),
        (
            ["--algorithm", "ppo", "--settings.off_policy_threshold", "0.5"],
            "settings.off_policy_threshold: this verb does not read it",
        ),
        (["--algorithm", "trpo", "--optimizer.lr", "1"], "optimizer.lr: this verb does not read it"),
        (["--algorithm", "sarsa", "--video", "x.gif"], "only runs with networks record one"),
        (
            ["--algorithm", "dqn", "--iterations", "1", "--settings.learning_starts", "999"],
            "nothing would be learned",
        ),
        (["--algorithm", "sarsa", "--network.hidden", "[4]"], "network.hidden: this verb does not read it"),
        (["--algorithm", "ppo", "--network.hidden", "[64, 0]"], "network.hidden"),
        (["--algorithm", "ppo", "--network.hidden", "[-3]"], "network.hidden"),
        (["--algorithm", "dqn", "--settings.replay", "255"], "a collection has 256 transitions"),
        (["--algorithm", "dqn", "--settings.replay", "256", "--settings.batch", "300"], "a batch has 300"),
        (["--algorithm", "dqn", "--settings.replay", "900"], "at the first update has 1,000 transitions"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(words, said):
    with pytest.raises(SteersmanError, match=said):
        recipe(*words)


@pytest.mark.parametrize("name", RECIPES)
def test_the_method_is_read_as_every_other_setting_is(name):
    """From the Python interface, quoted, in either form of the command line; of two the last one counts."""
    words = (
        [f"--algorithm={json.dumps(name)}"],
        ["--algorithm", f"'{name}'"],
        ["--algorithm=a2c", f"--algorithm={name}"],
    )
    for made in (api.load_recipe("control", None, {"algorithm": name}), *(recipe(*some) for some in words)):
        assert made.algorithm == name
        assert type(made) is RECIPES[name]
    with pytest.raises(SteersmanError, match="there is no method 'pppo'"):
        api.load_recipe("control", None, {"algorithm": "pppo"})


@pytest.mark.parametrize(("starts", "idle"), [(1, 0), (64, 0), (65, 1), (640, 9)])
def test_the_schedule_of_dqn_spans_the_updates_that_are_made(starts, idle):
    """Iterations that only fill the buffer make none: the last update is one step of the schedule above its end."""
    words = ["--optimizer.schedule", "linear", "--iterations", "10", "--settings.learning_starts", str(starts)]
    run = fresh(small("dqn", *words))  # 64 steps and 4 updates an iteration
    rates = [seen["lr/q"] for seen in (run.iteration() for _ in range(10)) if "lr/q" in seen]
    updates = 4 * (10 - idle)
    assert len(rates) == 10 - idle
    assert run.optimizer.updates == run.optimizer.total == updates
    assert run.optimizer.rate() == 0
    assert rates[-1] == pytest.approx(run.recipe.optimizer.lr * 2.5 / updates)  # the mean of 4, 3, 2 and 1 to go


def test_dqn_refuses_continuous_actions_by_name():
    with pytest.raises(SteersmanError, match="Pendulum-v1 acts in Box"):
        fresh(small("dqn", "--env", "Pendulum-v1"))


def test_tabular_learner_refuses_continuous_observations(tmp_path, capsys):
    assert main(["control", "--algorithm", "sarsa", "--run.dir", str(tmp_path / "r")]) == 2
    assert "discrete observation space" in capsys.readouterr().err


def test_tuples_are_not_sent_to_methods_that_refuse_them_too(tmp_path, capsys):
    words = ["control", "--env", "Blackjack-v1", "--algorithm", "sarsa", "--run.dir", str(tmp_path / "r")]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "each observation is one number" in " ".join(said.split())
    assert "PPO" not in said


UNSEEN = """
import gymnasium as gym
import numpy as np


class Blind(gym.Env):
    observation_space, action_space = gym.spaces.Box(-1, 1, (4,), np.float32), gym.spaces.Discrete(2)

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        return self.observation_space.sample(), {}


class Plain(Blind):
    def __init__(self):
        pass
"""


@pytest.mark.parametrize(
    ("env", "video", "said"),
    [
        ("unseen.py:Blind", "x.gif", "renders no pictures"),
        ("unseen.py:Plain", "x.gif", "can not be made with render_mode rgb_array, which `video` needs"),
        ("CartPole-v1", "taken/x.gif", "can not be written"),
        ("CartPole-v1", "folder.gif", "is a folder"),
        ("CartPole-v1", "x.mp4", "ends in .gif"),
    ],
)
def test_a_video_that_can_not_be_taken_is_refused_before_the_run(env, video, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "unseen.py").write_text(UNSEEN)
    (tmp_path / "taken").write_text("a file where a folder should be")
    (tmp_path / "folder.gif").mkdir()
    words = ["control", "--env", env, "--algorithm", "ppo", *SMALL, "--video", video, "--run.dir", "run"]
    assert main(words) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


OWN = '''
from typing import ClassVar

import gymnasium as gym
import numpy as np
from steersman.advantage.gae import Advantage
from steersman.advantage.returns import return_to_go
from steersman.algorithms import Algorithm


class Bandit(gym.Env):
    """Two arms; the second one pays `pays`."""

    observation_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, pays=1.0, render_mode=None):
        self.pays = pays

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        return np.zeros(1, np.float32), self.pays * float(action), True, False, {}


class Plain(Algorithm):
    name = "plain"
    title = "Plain REINFORCE"
    paper = "a test"

    def advantage(self, traj):
        return Advantage(return_to_go(traj))

    def loss(self, logp, traj, adv, coef):
        return -logp * adv
'''


def test_an_environment_and_a_method_of_ones_own_learn(tmp_path):
    (tmp_path / "mine.py").write_text(OWN)
    words = ["control", "--env", f"{tmp_path}/mine.py:Bandit", "--env_options", "{pays: 2}"]
    words += ["--algorithm", f"{tmp_path}/mine.py:Plain", "--rollout.episodes", "32", "--optimizer.lr", "0.05"]
    assert main([*words, "--iterations", "30", "--run.dir", str(tmp_path / "run")]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["held_out/return"] == 2.0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--algorithm", "mine.py:Bandit"], "a method is a subclass"),
        (["--algorithm", "mine.py:Plan"], "did you mean Plain"),
        (["--env", "mine.py:Plain"], "is no gymnasium.Env|can not be made"),
        (["--env", "mine.py:Bandit", "--env_options", "{pay: 2}"], "can not be made"),
    ],
)
def test_what_a_path_does_not_hold_is_refused(words, said, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SteersmanError, match=said):
        fresh(recipe(*words))


def test_help_lists_the_methods(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["control", "--help"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert all(name in told for name in RECIPES)
    assert "my_method.py:Class" in told
    assert "one of ppo" not in told
