"""An episode whose history was shown anew is one episode: every loss reads it whole, whatever rows a model reads."""

from __future__ import annotations

import math
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from letter_models import LETTERS, letters, save_mini
from test_gradients import TakenError, gradients, learner, same
from tiny_models import tiny_model
from train_kit import merge, recipe, settings

from steersman.advantage.gae import Advantage
from steersman.algorithms import ALGORITHMS, Coefficients
from steersman.loss.correction import Correction
from steersman.model import Policy
from steersman.reward import Scores
from steersman.train.experience import tokens_of
from steersman.train.on_policy import OnPolicy
from steersman.train.policy_update import Learner
from steersman.train.roles import build_roles
from steersman.train.segments import SegmentRows
from steersman.types import Prompt, Sample, Segment, Tokens, Trajectory
from steersman.update.optimizer import Optimizer, OptimizerConfig

CUTS = [[], [3], [2, 5], [4]]
"""Where each of four episodes of eight tokens was shown anew."""


def ids(count, g):
    return torch.randint(3, len(LETTERS), (count,), generator=g).tolist()


def episodes(apart, anew=False):
    """Four episodes of two prompts, with a hole each; `anew` shows other tokens before a segment than were said."""
    g = torch.Generator().manual_seed(0)
    samples = []
    for b, cuts in enumerate(CUTS):
        prompt, said = ids(4, g), ids(8, g)
        s = Sample(Prompt(prompt, "", {}, b // 2), said, [-3.0] * 8, "eos", mask=[t != 6 for t in range(8)])
        if apart:
            edges = [0, *cuts, 8]
            shown = [prompt + (ids(i, g) if anew else said[:i]) for i in edges[:-1]]
            s.segments = [Segment(p, i, j) for p, i, j in zip(shown, edges, edges[1:], strict=False)]
        samples.append(s)
    return samples


class _Batches:
    def forever(self):
        while True:
            yield [0, 1]

    def state_dict(self):
        return {}


@pytest.fixture
def gradient(tmp_path):
    """The gradient and the numbers of the loop's first update on the episodes, read whole or in segments that show
    the very same text. What was recorded while sampling, and the reference, are of other policies."""
    torch.set_num_threads(1)
    values = merge(settings(tmp_path, save_mini(tmp_path / "m")), {"rollout.prompts": 2, "rollout.samples": 2})
    other = tiny_model("llama", vocab=len(LETTERS), seed=5, scale=1.0)
    other.save_pretrained(tmp_path / "other")
    letters().save_pretrained(tmp_path / "other")

    def found(name, apart, **changes):
        made = recipe(name, merge(values, changes), reference=str(tmp_path / "other"))
        roles = build_roles(made, torch.device("cpu"))
        whole, samples = tokens_of(episodes(False)), episodes(apart)
        with torch.no_grad():
            logp = roles.policy.logp(whole, temperature=made.rollout.temperature).logp
        noise = 0.3 * torch.randn(logp.shape, generator=torch.Generator().manual_seed(5))
        for s, row in zip(samples, (logp + noise).tolist(), strict=True):
            s.logp = row
        loop = OnPolicy(made, roles, [s.prompt for s in samples], _Batches())
        score = torch.tensor([1.0, 0.0, 0.2, 0.9])
        taken = []

        def take(self):
            taken.append(torch.cat([p.grad.flatten().double() for p in self.parameters if p.grad is not None]))
            raise TakenError

        with (
            patch.object(loop, "next_samples", lambda clock: (samples, Scores(score, {"score": score}))),
            patch.object(Optimizer, "step", take),
            pytest.raises(TakenError),
        ):
            loop.iteration()
        return taken[0]

    return found


RECOMPUTED = {"rollout.recompute_logp": True}
LOOPS = {
    "dapo": ("dapo", {}),
    "sequence": ("grpo", {"algorithm.beta": 0.0}),
    "episode": ("rloo", {"algorithm.beta": 0.0}),
    "gspo": ("gspo", {"algorithm.clip_low": 0.05, "algorithm.clip_high": 0.05}),
    "luspo": ("luspo", {"algorithm.clip_low": 0.05, "algorithm.clip_high": 0.05}),
    "gmpo": ("gmpo", {}),
    "vespo": ("vespo", {}),
    "k1_to_go": ("dapo", {"algorithm.kl_in": "loss", "algorithm.kl_estimator": "k1_to_go", "algorithm.beta": 0.3}),
    "off_policy_threshold": ("dapo", {"algorithm.off_policy_threshold": 0.02}),
    "top_entropy": ("dapo", {"algorithm.top_entropy": 0.3}),
    **{
        kind: ("dapo", {**RECOMPUTED, "rollout.correction": {"kind": kind, "cap": cap}})
        for kind, cap in (("token_truncated", 1.2), ("sequence_truncated", 1.5), ("sequence_masked", 1.5),
                          ("geometric_masked", 1.02), ("k3_masked", 0.045))
    },
}  # fmt: skip


@pytest.mark.parametrize("case", LOOPS)
@pytest.mark.parametrize("micro", [16_384, 1], ids=["together", "apart"])
def test_segments_that_show_the_same_text_have_the_gradient_of_the_whole(gradient, case, micro):
    name, changes = LOOPS[case]
    whole = gradient(name, False, **changes)
    assert float(whole.norm()) > 1e-4
    apart = gradient(name, True, **changes, **{"run.micro_tokens": micro})
    torch.testing.assert_close(apart, whole, rtol=1e-3, atol=2e-5 * float(whole.abs().max()))


BETA, TEMPERATURE, LIMIT = 0.3, 0.8, 12.0
ADV = [1.0, -1.0, -0.7, 0.6]


def experience(policy):
    """Episodes shown anew, their trajectory in float64, and the log-probabilities of each one's steps by hand."""
    samples = episodes(True, anew=True)
    tokens, rows = tokens_of(samples), SegmentRows(samples)
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        now = torch.stack([alone(policy, s) for s in samples])
    old, ref, mu = (now + size * torch.randn(now.shape, generator=g).double() for size in (0.3, 0.4, 0.2))
    steps = torch.zeros_like(now)
    traj = Trajectory(tokens.mask, steps, steps + 1, old, ref, None, torch.tensor([0, 0, 1, 1]), None, old + mu - now)
    adv = Advantage(torch.tensor(ADV, dtype=torch.float64)[:, None].expand_as(now).contiguous())
    return samples, rows.tokens(tokens), rows, traj, adv


def alone(policy, sample):
    """log pi [T] of an episode's tokens, each segment read by itself, behind its own prompt."""
    found = []
    for part in sample.segments:
        read = Tokens.from_ids([part.prompt], [sample.ids[part.begin : part.end]])
        found.append(policy.logp(read, temperature=TEMPERATURE).logp[0])
    return torch.cat(found)


def mean(values):
    return torch.as_tensor(sum(values) / len(values))


def oracle(case, now, traj):
    """The loss of a method over whole episodes, written out step by step."""
    total = torch.zeros((), dtype=torch.float64)
    counted = [[t for t in range(8) if traj.mask[b, t]] for b in range(4)]
    for b, steps in enumerate(counted):
        adv = ADV[b]
        every = (now, traj.logp_old, traj.logp_ref, traj.logp_rollout)
        x, old, ref, mu = ({t: row[b, t] for t in steps} for row in every)
        away = mean([float((mu[t] - x[t]).detach()) for t in steps])
        d = {t: x[t] - old[t] for t in steps}
        w = {t: (old[t] - mu[t]).exp() for t in steps}
        loss = dict.fromkeys(steps, torch.zeros(()))
        for t in steps:
            if case in ("gspo", "luspo"):
                s = mean([*d.values()]).exp()
                loss[t] = -torch.minimum(s * adv, s.clamp(0.95, 1.05) * adv)
            elif case == "vespo":
                W = float(torch.stack([*d.values()]).sum().detach().exp())
                k, lam = (2.0, 3.0) if adv >= 0 else (3.0, 2.0)
                loss[t] = -(W**k * math.exp(lam * (1 - W))) * adv * x[t]
            elif case == "a2po":
                loss[t] = (BETA * sum(x[u] - ref[u] for u in steps) - adv) ** 2
            elif case in ("sequence", "episode"):
                loss[t] = -adv * x[t]
            else:
                rho = d[t].exp()
                loss[t] = -torch.minimum(rho * adv, rho.clamp(0.8, 1.28) * adv)
            if case == "k1_to_go":
                loss[t] = loss[t] + BETA * x[t] * sum(float((x[u] - ref[u]).detach()) for u in steps if u >= t)
            if case == "off_policy_threshold" and adv < 0 and away > 0.02:
                loss[t] = torch.zeros(())
            product = math.prod(float(v) for v in w.values())
            if case == "sequence_masked":
                loss[t] = loss[t] * (product if product <= 1.1 else 0.0)
            if case == "k3_masked":
                k3 = mean([float(v - 1 - v.log()) for v in w.values()])
                loss[t] = loss[t] * (float(w[t]) if k3 <= 0.02 else 0.0)
        own = sum(loss.values())
        by_sequence, by_episode = own / len(steps) / 4, own / LIMIT / 4
        total = total + {
            "sequence": by_sequence, "a2po": by_sequence, "episode": by_episode, "luspo": by_episode
        }.get(case, own / sum(map(len, counted)))  # fmt: skip
    return total


METHODS = {
    "gspo": ("gspo", {"average": "token", "clip_low": 0.05, "clip_high": 0.05}, None),
    "luspo": ("luspo", {"clip_low": 0.05, "clip_high": 0.05}, None),
    "vespo": ("vespo", {}, None),
    "a2po": ("a2po", {"beta": BETA}, None),
    "sequence": ("rloo", {"average": "sequence"}, None),
    "episode": ("rloo", {}, None),
    "k1_to_go": ("dapo", {"kl_in": "loss", "kl_estimator": "k1_to_go", "beta": BETA}, None),
    "off_policy_threshold": ("dapo", {"off_policy_threshold": 0.02}, None),
    "sequence_masked": ("dapo", {}, Correction("sequence_masked", 1.1)),
    "k3_masked": ("dapo", {}, Correction("k3_masked", 0.02)),
}


@pytest.mark.parametrize("case", METHODS)
def test_the_gradient_is_that_of_whole_episodes_written_out(case):
    """Segments that show other text than was said; in one micro-batch, and every segment in one of its own."""
    torch.set_num_threads(1)
    name, changes, correction = METHODS[case]
    policy = Policy(tiny_model("llama", vocab=len(LETTERS), scale=2.0).double(), letters())
    samples, tokens, rows, traj, adv = experience(policy)
    if correction is None and case != "off_policy_threshold":
        traj = replace(traj, logp_rollout=traj.logp_old)
    names, weights = zip(*policy.model.named_parameters(), strict=True)
    now = torch.stack([alone(policy, s) for s in samples])
    expected = oracle(case, now, traj)
    wanted = torch.autograd.grad(expected, weights)
    scale = max(float(x.abs().max()) for x in wanted)
    assert scale > 1e-4
    told = []
    for micro in (10**6, 1):
        algorithm = ALGORITHMS[name](**{"beta": 0.0, "minibatches": 1, "epochs": 1} | changes)
        actor = Optimizer(policy.parameters(), OptimizerConfig(), 9)
        who = Learner(algorithm, policy, actor, None, None, TEMPERATURE, LIMIT, micro)
        who.correction = Correction("none") if correction is None else correction
        with patch.object(Optimizer, "step", lambda self: {}):
            order = torch.Generator().manual_seed(0)
            told.append(who.update(tokens, traj, adv, Coefficients(BETA), order, segments=rows))
        assert told[-1]["loss/policy"] == pytest.approx(float(expected.detach()), rel=1e-9)
        for key, parameter, grad in zip(names, weights, wanted, strict=True):
            torch.testing.assert_close(parameter.grad, grad, rtol=1e-7, atol=1e-9 * scale, msg=key)
        actor.zero_grad()
    assert told[0] == pytest.approx(told[1], rel=1e-9)


def test_minibatches_are_of_whole_episodes():
    """Two of four episodes to an update, whatever number of segments they have."""
    torch.set_num_threads(1)
    policy = Policy(tiny_model("llama", vocab=len(LETTERS), scale=2.0), letters())
    _, tokens, rows, traj, adv = experience(Policy(policy.model.double(), letters()))
    algorithm = ALGORITHMS["rloo"](beta=0.0, minibatches=2)
    who = Learner(algorithm, policy, Optimizer(policy.parameters(), OptimizerConfig(), 9))
    seen, read = [], Policy.logp

    def logp(self, tokens: Tokens, **named):
        seen.append([tokens.response_length[b].item() for b in range(len(tokens))])
        return read(self, tokens, **named)

    with patch.object(Policy, "logp", logp), patch.object(Optimizer, "step", lambda self: {}):
        who.update(tokens, traj, adv, Coefficients(), torch.Generator().manual_seed(0), segments=rows)
    assert [sum(lengths) for lengths in seen] == [16, 16]


@pytest.mark.parametrize("shared", [False, True])
def test_values_and_entropies_of_segments_do_not_depend_on_micro_batches(shared, tmp_path):
    _, tokens, rows, traj, adv = experience(Policy(tiny_model("llama", vocab=len(LETTERS), scale=2.0), letters()))
    number, g = torch.float32, torch.Generator().manual_seed(3)
    x = {name: getattr(traj, name).to(number) for name in ("reward", "discount", "logp_old", "logp_ref")}
    traj = replace(traj, **x, logp_rollout=None, value=torch.randn(4, 9, generator=g))
    adv = Advantage(adv.adv.to(number), torch.randn(4, 8, generator=g))
    found, told = [], []
    for micro in (10**6, 1):
        made = {"shared": shared, "micro": micro, "tmp_path": tmp_path, "kl_estimator": "k1_to_go"}
        found.append(gradients(learner(**made), tokens, traj, adv, segments=rows))
        who = learner(**made)
        order = torch.Generator().manual_seed(3)
        told.append(who.update(tokens, traj, adv, Coefficients(0.3), order, segments=rows))
    same(*found)
    assert told[0] == pytest.approx(told[1], rel=1e-4, abs=1e-6)


def test_a_trust_region_step_reads_episodes_whole(tmp_path):
    """The line search compares values, so none of its micro-batches holds a part of an episode alone."""
    _, tokens, rows, traj, adv = experience(Policy(tiny_model("llama", vocab=len(LETTERS), scale=2.0), letters()))
    x = {name: getattr(traj, name).float() for name in ("reward", "discount", "logp_old", "logp_ref")}
    traj, adv = replace(traj, **x, logp_rollout=None), Advantage(adv.adv.float())
    settings = {"kl_estimator": "k1_to_go", "max_kl": 0.01, "epochs": 1, "cg_steps": 4, "entropy_coef": 0.0}
    moved = []
    for micro in (10**6, 1):
        who = learner("trpo", tmp_path=tmp_path, micro=micro, **settings)
        stats = who.update(tokens, traj, adv, Coefficients(0.3), torch.Generator().manual_seed(0), segments=rows)
        assert 0 < stats["trpo/kl"] <= 0.01
        moved.append(torch.cat([p.detach().flatten() for p in who.policy.parameters()]))
    torch.testing.assert_close(moved[0], moved[1], rtol=1e-3, atol=2e-4)
