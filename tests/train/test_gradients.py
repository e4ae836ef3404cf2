"""Micro-batches change no gradient, and nothing under a False mask does (invariants 3 and 4)."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from letter_models import LETTERS, letters, write_jsonl
from tiny_models import tiny_model

from steersman.advantage.gae import Advantage
from steersman.algorithms import ALGORITHMS, Coefficients
from steersman.data import DataConfig, collate, demonstrations, encode, layout, preferences
from steersman.loss.supervised import nll
from steersman.model import Policy, SharedCritic, load_scalar
from steersman.objectives.reward_config import RewardModelConfig
from steersman.objectives.reward_pairs import PairwiseReward
from steersman.objectives.supervised import SFT
from steersman.run.run_config import RunConfig
from steersman.train.offline import Offline
from steersman.train.policy_update import Learner
from steersman.train.tally import Tally
from steersman.types import Tokens, Trajectory
from steersman.update.optimizer import NotFiniteError, Optimizer, OptimizerConfig
from steersman.verbs.sft import SFTConfig

T = 9
LENGTHS = [9, 1, 5, 8, 3, 0]


def experience(seed: int = 0, holes: bool = True) -> tuple[Tokens, Trajectory, Advantage]:
    """Six ragged rows; with holes in the mask, at the end of a row too."""
    g = torch.Generator().manual_seed(seed)

    def ids(n):
        return torch.randint(0, len(LETTERS), (n,), generator=g).tolist()

    masks = [[True] * n for n in LENGTHS]
    if holes:
        masks[0][3:5] = [False, False]
        masks[3][6:] = [False, False]
    tokens = Tokens.from_ids([ids(n) for n in (2, 7, 1, 4, 3, 5)], [ids(n) for n in LENGTHS], masks)
    shape = tokens.mask.shape
    x = [0.5 * torch.randn(shape, generator=g) for _ in range(6)]
    value = 0.5 * torch.randn(shape[0], shape[1] + 1, generator=g)
    traj = Trajectory(tokens.mask, x[0], torch.ones(shape), -3 + x[1], -3 + x[2], value, torch.arange(6) // 2)
    return tokens, traj, Advantage(x[4], x[5])


def learner(name: str = "ppo", shared: bool = False, micro: int = 10**6, tmp_path=None, **settings) -> Learner:
    settings = {"beta": 0.3, "kl_in": "loss", "kl_estimator": "k2", "entropy_coef": 0.1, "minibatches": 1} | settings
    algorithm = ALGORITHMS[name](**settings)
    policy = Policy(tiny_model("llama", vocab=len(LETTERS), scale=2.0), letters())
    if shared:
        critic = SharedCritic(policy)
        torch.nn.init.constant_(critic.value_head.weight, 0.05)
        one = Optimizer(critic.parameters(), OptimizerConfig(), 9)
        return Learner(algorithm, policy, one, critic, None, 0.8, 12.0, micro, 0.2)
    policy.model.save_pretrained(tmp_path)
    policy.tokenizer.save_pretrained(tmp_path)
    critic = load_scalar(tmp_path)
    torch.nn.init.constant_(critic.model.score.weight, 0.05)
    actor, own = (Optimizer(m.parameters(), OptimizerConfig(), 9) for m in (policy, critic))
    return Learner(algorithm, policy, actor, critic, own, 0.8, 12.0, micro, 0.2)


class TakenError(Exception):
    pass


def gradients(who: Learner, tokens, traj, advantage, **given) -> dict[str, torch.Tensor]:
    """Of one whole minibatch, taken from `update` just before the first step of each optimiser."""
    found: dict[str, torch.Tensor] = {}
    stepped = (None if given.get("only_critic") else who.actor, who.critic_optimizer)
    due = [optimizer for optimizer in stepped if optimizer is not None]

    def take(self):
        due.remove(self)
        own = set(map(id, self.parameters))
        for role, module in (("actor", who.policy), ("critic", who.critic)):
            taken = {n: p.grad for n, p in module.named_parameters() if p.grad is not None and id(p) in own}
            found.update({f"{role}.{name}": grad.clone() for name, grad in taken.items()})
        if not due:
            raise TakenError
        return {}

    generator = torch.Generator().manual_seed(3)
    with patch.object(Optimizer, "step", take), pytest.raises(TakenError):
        who.update(tokens, traj, advantage, Coefficients(0.3, 0.5), generator, **given)
    return found


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], exactly: bool = False) -> None:
    assert a.keys() == b.keys()
    assert a
    scale = max(float(x.abs().max()) for x in a.values())
    assert scale > 1e-3
    for name in a:
        if exactly:
            assert torch.equal(a[name], b[name]), name
        else:
            torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=3e-6 * scale, msg=name)


@pytest.mark.parametrize("average", ["token", "sequence", "episode"])
@pytest.mark.parametrize("shared", [False, True])
def test_micro_batches_change_no_gradient_of_actor_and_critic(average, shared, tmp_path):
    given = experience()
    whole = gradients(learner(average=average, shared=shared, tmp_path=tmp_path), *given)
    for micro in (1, 20):
        parts = gradients(learner(average=average, shared=shared, micro=micro, tmp_path=tmp_path), *given)
        same(whole, parts)


@pytest.mark.parametrize("micro", [10**6, 20])
@pytest.mark.parametrize("holes", [False, True])
def test_a_critic_that_is_read_and_fitted_in_one_pass_gets_the_gradient_of_two(micro, holes, tmp_path):
    tokens, traj, _ = experience(holes=holes)
    settings: dict = {"epochs": 1, "micro": micro, "tmp_path": tmp_path}
    apart, once = learner(**settings), learner(**settings)
    with torch.no_grad():
        first = replace(traj, value=apart.critic.value(tokens))
    second = replace(traj, value=None)
    second.value, loss = once.value(tokens, second)
    torch.testing.assert_close(second.value[:, :-1][traj.mask], first.value[:, :-1][traj.mask])
    advantages = [who.algorithm.advantage(t) for who, t in ((apart, first), (once, second))]
    taken = gradients(once, tokens, second, advantages[1], critic_loss=loss)
    same(gradients(apart, tokens, first, advantages[0]), taken)
    assert loss is not None
    apart_again, once_again = learner(**settings), learner(**settings)
    two = apart_again.update(tokens, first, advantages[0], Coefficients(0.3, 0.5), torch.Generator().manual_seed(3))
    loss = once_again.value(tokens, replace(traj, value=None)).critic_loss
    generator = torch.Generator().manual_seed(3)
    one = once_again.update(tokens, second, advantages[1], Coefficients(0.3, 0.5), generator, critic_loss=loss)
    assert one.keys() == two.keys()
    for name in two:
        assert one[name] == pytest.approx(two[name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("stop_kl", [None, 1e9])
def test_a_critic_that_is_fitted_already_moves_before_the_actor_is_read_unless_that_may_be_called_off(
    stop_kl, tmp_path, monkeypatch
):
    tokens, traj, _ = experience()
    who = learner(epochs=1, stop_kl=stop_kl, tmp_path=tmp_path)
    traj.value, loss = who.value(tokens, traj)
    held, read = [], Policy.logp

    def logp(self, *args, **named):
        held.append(any(p.grad is not None for p in who.critic.parameters()))
        return read(self, *args, **named)

    monkeypatch.setattr(Policy, "logp", logp)
    advantage, generator = who.algorithm.advantage(traj), torch.Generator().manual_seed(3)
    who.update(tokens, traj, advantage, Coefficients(0.3, 0.5), generator, critic_loss=loss)
    assert set(held) == {stop_kl is not None}
    assert who.critic_optimizer.updates == who.actor.updates == 1


def test_values_of_samples_that_are_used_again_are_only_read(tmp_path):
    tokens, traj, _ = experience()
    for settings in ({"epochs": 2}, {"epochs": 1, "minibatches": 2}, {"epochs": 1, "shared": True}):
        who = learner(**settings, tmp_path=tmp_path)
        value, loss = who.value(tokens, traj)
        assert value is not None
        assert loss is None
        assert all(p.grad is None for p in who.critic.parameters())


@pytest.mark.parametrize("name", ["grpo", "gspo", "cispo", "ppo-kl", "nlpo", "rloo", "luspo", "vespo"])
def test_micro_batches_change_no_gradient_of_other_losses(name, tmp_path):
    given = experience(seed=4)
    whole = gradients(learner(name, tmp_path=tmp_path), *given)
    same(whole, gradients(learner(name, micro=1, tmp_path=tmp_path), *given))


def test_micro_batches_change_no_trust_region_step(tmp_path):
    tokens, traj, advantage = experience(seed=2)
    moved = []
    for micro in (10**6, 20):
        who = learner("trpo", micro=micro, tmp_path=tmp_path, kl_estimator="k2", max_kl=0.01, epochs=1, cg_steps=4)
        stats = who.update(tokens, traj, advantage, Coefficients(0.3), torch.Generator().manual_seed(0))
        assert 0 < stats["trpo/kl"] <= 0.01
        moved.append(torch.cat([p.detach().flatten() for p in who.policy.parameters()]))
    torch.testing.assert_close(moved[0], moved[1], rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("name", ["ppo", "grpo", "gspo", "cispo", "ppo-kl", "trpo"])
@pytest.mark.parametrize("junk", [7.0, 1e30, float("nan")])
def test_what_stands_under_a_false_mask_changes_nothing(name, junk, tmp_path):
    tokens, traj, advantage = experience()
    off = ~traj.mask

    def spoil(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[:, : off.shape[1]][off] = junk
        return x

    dirty = replace(
        traj, reward=spoil(traj.reward), discount=spoil(traj.discount), logp_old=spoil(traj.logp_old),
        logp_ref=spoil(traj.logp_ref),
    )  # fmt: skip
    # V after the last step belongs to the row although its column has no step, so it stays
    value = spoil(traj.value)
    after = (traj.mask * torch.arange(1, T + 1)).amax(-1, keepdim=True)
    value.scatter_(1, after, traj.value.gather(1, after))
    value[:, T:] = torch.where(after == T, traj.value[:, T:], torch.full_like(value[:, T:], junk))
    dirty.value = value

    # tokens that no token that counts comes after may be anything too: padding, and holes at a row's end
    columns = torch.arange(tokens.response.shape[1])
    other = replace(
        tokens,
        response=torch.where(columns >= after, 11, tokens.response),
        prompt=torch.where(torch.arange(tokens.prompt.shape[1]) >= tokens.prompt_length[:, None], 11, tokens.prompt),
    )
    assert not torch.equal(other.response, tokens.response)

    algorithm = ALGORITHMS[name]()
    for x, y in zip(algorithm.advantage(traj), algorithm.advantage(dirty), strict=True):
        assert x is y or torch.equal(x, y)
    spoiled = Advantage(spoil(advantage.adv), spoil(advantage.ret))
    if name == "trpo":
        ends = []
        for given in ((tokens, traj, advantage), (other, dirty, spoiled)):
            who = learner(name, tmp_path=tmp_path, epochs=1, cg_steps=2)
            who.update(*given, Coefficients(0.3), torch.Generator().manual_seed(0))
            ends.append(torch.cat([p.detach().flatten() for p in who.policy.parameters()]))
        assert torch.equal(*ends)
        return
    clean = gradients(learner(name, tmp_path=tmp_path), tokens, traj, advantage)
    same(clean, gradients(learner(name, tmp_path=tmp_path), other, dirty, spoiled), exactly=True)


def test_the_critic_alone_learns_without_the_policy(tmp_path):
    given = experience()
    both = gradients(learner(tmp_path=tmp_path), *given)
    alone = gradients(learner(tmp_path=tmp_path), *given, only_critic=True)
    assert {n for n in both if n.startswith("critic")} == set(alone)
    same({n: both[n] for n in alone}, alone)


def test_a_loss_that_is_not_finite_is_named_and_nothing_is_updated(tmp_path):
    tokens, traj, advantage = experience()
    who = learner(tmp_path=tmp_path)
    before = [p.detach().clone() for p in who.policy.parameters()]
    bad = Advantage(advantage.adv, torch.where(traj.mask, torch.inf, 0.0))
    with pytest.raises(NotFiniteError, match=r"value: inf"):
        who.update(tokens, traj, bad, Coefficients(), torch.Generator())
    assert all(torch.equal(a, b) for a, b in zip(before, who.policy.parameters(), strict=True))


ANSWERS = ["yes it is.", "no", "a cat, a dog, and two more of them", "ok", "look there", "e", "so she said", "hm"]


def sft_state(tmp_path, micro: int, pack: int | None = None, loss: str = "nll") -> Offline:
    rows = [{"prompt": "ask " * (1 + i % 3), "completion": text} for i, text in enumerate(ANSWERS)]
    data = DataConfig(path=str(write_jsonl(tmp_path / "sft.jsonl", rows)))
    policy = Policy(tiny_model("llama", vocab=len(LETTERS), scale=2.0), letters(), pack=pack)
    encoded = encode(demonstrations(data).train, layout(policy.tokenizer, data), data, 128)
    run = RunConfig(micro_tokens=micro)
    return Offline(SFT(policy, encoded, encoded, micro, loss=loss), SFTConfig(), OptimizerConfig(), run)


def offline_gradients(state: Offline) -> dict[str, torch.Tensor]:
    found = {}

    def take():
        found.update({n: p.grad.clone() for n, p in state.objective.module.named_parameters() if p.grad is not None})
        return {}

    state.optimizer.step = take  # type: ignore[method-assign]
    state.step(list(range(len(state.objective.cost))))
    return found


@pytest.mark.parametrize("loss", ["nll", "dft"])
def test_micro_batches_and_packing_change_no_gradient_of_sft(loss, tmp_path):
    whole = offline_gradients(sft_state(tmp_path, 10**6, loss=loss))
    for micro, pack in ((1, None), (60, None), (10**6, 64)):
        same(whole, offline_gradients(sft_state(tmp_path, micro, pack, loss)))


def test_dynamic_fine_tuning_raises_the_mean_probability_and_tells_the_usual_loss(tmp_path):
    state, usual = sft_state(tmp_path, 50, loss="dft"), sft_state(tmp_path, 50).objective
    got, examples = offline_gradients(state), state.objective.train.first
    policy = sft_state(tmp_path, 50).objective.module
    probability, count = torch.zeros(()), sum(sum(e.mask) for e in examples)
    for e in examples:
        p = policy.model(torch.tensor([e.prompt + e.response])).logits[0].softmax(-1)
        for t, (token, counts) in enumerate(zip(e.response, e.mask, strict=True)):
            probability = probability + counts * p[len(e.prompt) + t - 1, token]
    (-probability / count).backward()
    same(got, {n: p.grad for n, p in policy.named_parameters()})
    told, stats = state.objective.evaluate(), usual.evaluate()
    mean = told.pop("held_out/probability")
    assert mean == pytest.approx(float(probability.detach()) / count, rel=1e-5)
    assert told == pytest.approx(stats, rel=1e-6)
    tally, plain, rows = Tally(), Tally(), list(range(len(examples)))
    state.objective.loss(rows, float(count), tally)
    usual.loss(rows, float(count), plain)
    assert tally.means() == pytest.approx({**plain.means(), "probability": mean}, rel=1e-5)


def test_the_sft_gradient_is_that_of_the_mean_over_tokens_that_count(tmp_path):
    state = sft_state(tmp_path, 50)
    got, examples = offline_gradients(state), state.objective.train.first
    policy = sft_state(tmp_path, 50).objective.module
    total = torch.zeros(())
    for e in examples:
        logits = policy.model(torch.tensor([e.prompt + e.response])).logits[0].log_softmax(-1)
        for t, (token, counts) in enumerate(zip(e.response, e.mask, strict=True)):
            total = total - counts * logits[len(e.prompt) + t - 1, token]
    (total / sum(sum(e.mask) for e in examples)).backward()
    same(got, {n: p.grad for n, p in policy.named_parameters()})
    assert nll(policy.logp(collate(examples)).logp).min() >= 0


@pytest.mark.parametrize("settings", [{}, {"centre": 0.1}])
def test_micro_batches_change_no_gradient_of_the_reward_model(settings, tmp_path):
    rows = [
        {"prompt": "which" + "?" * (i % 3), "chosen": text, "rejected": ANSWERS[i - 1] + ",", "margin": 0.1 * i}
        for i, text in enumerate(ANSWERS)
    ]
    data = DataConfig(path=str(write_jsonl(tmp_path / "pairs.jsonl", rows)))
    folder = tmp_path / "scalar"
    tiny_model("gpt2", vocab=len(LETTERS), scale=2.0).save_pretrained(folder)
    letters().save_pretrained(folder)

    def state(micro: int) -> Offline:
        model = load_scalar(folder)
        torch.nn.init.normal_(model.model.score.weight, generator=torch.Generator().manual_seed(1))
        encoded = encode(preferences(data).train, layout(model.tokenizer, data), data, 128)
        objective = PairwiseReward(model, encoded, None, RewardModelConfig(**settings), micro)
        return Offline(objective, RewardModelConfig(), OptimizerConfig(), RunConfig(micro_tokens=micro))

    whole = offline_gradients(state(10**6))
    same(whole, offline_gradients(state(1)))
    same(whole, offline_gradients(state(90)))


def test_a_minibatch_tells_what_it_saw():
    tally = Tally()
    tally.add("loss", torch.tensor(6.0), 2)
    tally.add("loss", 3.0, 1)
    assert tally.means() == {"loss": 3.0}
