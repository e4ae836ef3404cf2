"""Episodes that a limit cuts: what stands for the turns that did not come, and of which state it is the value."""

from __future__ import annotations

import pytest
import torch
from letter_models import LETTERS, letters, save_chat_mini
from tiny_models import tiny_model
from train_kit import merge, recipe, rows

from steersman.advantage.gae import gae
from steersman.algorithms import ALGORITHMS
from steersman.data import Layout
from steersman.tabular.two_turns import TwoTurns
from steersman.train.experience import EpisodeRules, tokens_of, trajectory
from steersman.train.on_policy import OnPolicy
from steersman.train.policy_update import Learner
from steersman.train.roles import build_roles
from steersman.train.segments import SegmentRows
from steersman.types import Prompt, Sample, Tokens, Turn
from steersman.verbs import rl
from steersman.verbs.rl import _prompts

GAMMA, START = 0.6, 3
CUTS = """
import time
from dataclasses import dataclass


class Cuts:
    \"\"\"Pays 1 a turn and ends at its second one in its own way.\"\"\"

    def __init__(self, way="no", says="go on,"):
        self.way, self.says = way, says

    def begin(self, row):
        self.turn = 0
        return None

    def step(self, text):
        self.turn += 1
        if self.turn == 2 and self.way == "raise":
            raise RuntimeError
        if self.way == "slow":
            time.sleep(0.02)
        return Said(self.says, truncated=self.turn == 2 and self.way == "limit")


@dataclass
class Said:
    text: str
    truncated: bool = False
    reward: float = 1.0
    done: bool = False
"""


class Table:
    """A critic that knows V of the states in which the policy speaks, and says 50 of all others."""

    shares_trunk = False

    def __init__(self, game, logits):
        exact, _ = game.evaluate(logits)
        self.known = {(START, *tokens): exact[s] for s, (_, tokens) in enumerate(game.states) if len(tokens) != 1}

    def value(self, tokens):
        found = torch.full((len(tokens), tokens.response.shape[1] + 1), 50.0, dtype=torch.float64)
        for b in range(len(tokens)):
            ids = tokens.prompt[b, : tokens.prompt_length[b]].tolist()
            for t, token in enumerate([*tokens.response[b].tolist(), 0]):
                found[b, t] = self.known.get(tuple(ids), 50.0)
                ids.append(token)
        return found


@pytest.mark.parametrize("name", ["ppo", "a2c"])
@pytest.mark.parametrize(("cut", "missing"), [("bootstrap", 0.0), ("end", 1.0)])
def test_an_exact_critic_is_worth_the_turns_that_did_not_come(name, cut, missing):
    """Every course of the game of `verify`, cut behind the world's answer, with the probability that it has: at the
    first turn E[A + V | a] is E[r_1 + gamma r_2 | a] where the loop bootstraps, and E[r_1 | a] where it ends."""
    game = TwoTurns(seed=5, beta=0.0)
    logits = game.logits(torch.randn(game.next_state.shape, generator=torch.Generator().manual_seed(1)).double())
    samples, first = [], Prompt([START], "")
    for course, length in zip(game.sequences.tolist(), game.length.tolist(), strict=True):
        finish, onward = ("length", [START, *course[:2]]) if length == 3 else ("eos", None)
        turns = [Turn(0, 1, 0.0, "", "")]
        samples.append(Sample(first, course[:1], [0.0], finish, mask=[True], turns=turns, onward=onward))
    algorithm, tokens = ALGORITHMS[name](gamma=GAMMA), tokens_of(samples)
    paid = game.reward[:, :2].sum(1)
    rules = EpisodeRules(cut, discount_per="turn")
    traj = trajectory(samples, tokens, paid, algorithm, per_token=paid[:, None], rules=rules)
    learner = Learner(algorithm, None, None, critic=Table(game, logits))
    if cut == "bootstrap":  # else the method reads values and learns in one pass, which a table can not
        traj.value, _ = SegmentRows(samples).values(learner, tokens, traj)
    else:
        traj.value = learner.read_values(tokens)
    found = gae(traj, 1.0).adv[:, 0] + traj.value[:, 0]
    wanted = paid + (1 - missing) * GAMMA * game.reward[:, 2]
    prob, action = game.sequence_prob(logits), game.sequences[:, 0]
    for a in range(3):
        weight = torch.where(action == a, prob, 0.0) / prob[action == a].sum()
        assert float(weight @ found) == pytest.approx(float(weight @ wanted), abs=1e-10)


@pytest.fixture
def cuts(base, tmp_path):
    (tmp_path / "cuts.py").write_text(CUTS)
    environment = {"path": f"{tmp_path / 'cuts.py'}:Cuts", "max_turns": 9}
    return merge({**base, "environment": environment}, {"critic.cut": "bootstrap", "rollout.max_new_tokens": 4})


def played(values, name="ppo"):
    made = recipe(name, values)
    roles = build_roles(made, torch.device("cpu"))
    train = _prompts(made, roles).train
    return made, roles, train, roles.generate(train[:3], seed=(0, 0), n=2)


@pytest.mark.parametrize(
    ("changes", "outcome"),
    [({"max_turns": 2}, "turn limit"), ({"max_tokens": 40}, "token limit"),
     ({"args": {"way": "slow"}, "episode_limit": 0.03}, "time limit"),
     ({"args": {"way": "limit"}}, "the environment's limit")],
)  # fmt: skip
@pytest.mark.parametrize("chat", [False, True])
def test_an_episode_would_go_on_behind_its_last_answer(cuts, tmp_path, changes, outcome, chat):
    if chat:
        cuts = merge(cuts, {"model.path": str(save_chat_mini(tmp_path / "chat", 128))})
    _, roles, _, samples = played(merge(cuts, {f"environment.{k}": v for k, v in changes.items()}))
    layout, new = Layout(roles.policy.tokenizer, wrap_in_chat=chat), "go on,"
    if chat:  # what the template writes behind the reply, which has no end token of its own
        talk = [{"role": "assistant", "content": "x"}, {"role": "user", "content": new}]
        new = layout.template.render(talk, for_reply=True).removeprefix("a x")
    for s in samples:
        assert s.outcome == outcome
        assert s.turns[-1].end == len(s.ids)
        onward = [*s.prompt.ids, *s.ids, *layout.codec.more(new)]
        assert s.onward == (onward if len(onward) < changes.get("max_tokens", 999) else None)
    assert any(s.onward for s in samples)


@pytest.mark.parametrize(
    "changes",
    [{"args": {"way": "raise"}, "on_fault": "truncate"}, {"args": {"says": "on " * 40}, "max_tokens": 60}],
    ids=["no answer", "no room"],
)
def test_where_nothing_could_follow_there_is_nothing_to_read(cuts, changes):
    for s in played(merge(cuts, {f"environment.{k}": v for k, v in changes.items()}))[3]:
        assert not s.terminated
        assert s.onward is None


@pytest.mark.parametrize(
    ("name", "changes"),
    [("ppo", {}), ("a2c", {}), ("ppo", {"critic.init": "shared"}), ("ppo", {"model": "t5"})],
    ids=["ppo", "in one pass", "shared", "encoder-decoder"],
)
def test_the_value_is_that_of_the_state_it_would_go_on_from(cuts, tmp_path, name, changes):
    if changes.get("model") == "t5":
        tiny_model("t5", vocab=len(LETTERS), scale=1.0).save_pretrained(tmp_path / "t5")
        letters().save_pretrained(tmp_path / "t5")
        changes = {"model.path": str(tmp_path / "t5")}
    cuts = merge(cuts, {"environment.max_turns": 2, **changes})
    made, roles, train, samples = played(cuts, name)
    critic = roles.learner.critic
    with torch.no_grad():  # a new critic says 0 of everything
        head = critic.value_head if critic.shares_trunk else critic.output
        head.weight.normal_(generator=torch.Generator().manual_seed(0))
    loop = OnPolicy(made, roles, train, _Batches())
    tokens, traj, _ = loop.experience(samples, roles.reward.score(samples))
    value, loss = SegmentRows(samples).values(roles.learner, tokens, traj)
    assert loss is None  # advantages need more than one pass gives
    for b, s in enumerate(samples):
        alone = roles.learner.read_values(Tokens.from_ids([s.onward], [[4]]))[0, 0]
        assert float(value[b, s.turns[-1].end]) == pytest.approx(float(alone), abs=1e-5)
        assert float(traj.discount[b, s.turns[-1].end - 1]) == made.algorithm.gamma


class _Batches:
    def forever(self):
        while True:
            yield [0]


@pytest.mark.parametrize("name", ["ppo", "a2c"])
def test_cut_episodes_train(cuts, tmp_path, name):
    rl.run(recipe(name, merge(cuts, {"environment.max_turns": 2})))
    seen = rows(tmp_path / "run")[-1]
    assert seen["episode/turn_limit"] == 1
    assert seen["ratio_gap"] < 1e-4
