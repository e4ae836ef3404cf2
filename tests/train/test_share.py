"""Actor, critic, reward and reference on one frozen base: what four separate models compute, with one's weights."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from letter_models import LETTERS, letters, save_mini, write_jsonl
from test_reward_lora import settings as reward_settings
from test_reward_lora import trained
from tiny_models import tiny_model
from train_kit import merge, plain, recipe, rows, save_tiny, weights

from steersman import cli
from steersman.data import Batches
from steersman.model import LoraConfig, Policy, SharedBase, load_policy, load_reward, load_scalar
from steersman.model.modes import checkpoint_activations
from steersman.plan.memory import Load, foresee
from steersman.train.on_policy import OnPolicy
from steersman.train.roles import build_roles
from steersman.types import Prompt, SteersmanError, Tokens
from steersman.verbs import rl

CPU = torch.device("cpu")
LORA = LoraConfig(r=2, alpha=4)
TOKENS = Tokens.from_ids([[5, 6, 7], [9, 4]], [[9, 10, 12], [3]])


def stirred(module: torch.nn.Module, seed: int) -> None:
    """Gives everything that is trained other numbers."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.1)


def free(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def copied(source: torch.nn.Module, target: torch.nn.Module) -> None:
    with torch.no_grad():
        theirs = free(source)
        assert set(theirs) == set(free(target))
        for name, p in free(target).items():
            p.copy_(theirs[name])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_role_computes_in_float64_what_it_computes_alone(family, checkpointing, tmp_path):
    folder = save_tiny(tmp_path / "base", family, scale=2.0)
    actor = load_policy(folder, device="cpu").double()
    base = SharedBase(actor)
    critic, judge = base.fresh(), base.fresh()
    actor.adapt(LORA)
    critic.adapt(LORA)
    judge.adapt(LORA)
    alone = [load_policy(folder, device="cpu", lora=LORA).double()]
    alone += [load_scalar(folder, device="cpu").double() for _ in range(2)]
    for i, (one, other) in enumerate(zip((actor, critic, judge), alone, strict=True)):
        if i:
            other.adapt(LORA)
        stirred(one, i)
        copied(one, other)
        for model in (one, other):
            if checkpointing:
                checkpoint_activations(model.model)

    def losses(policy, value, reward) -> list[torch.Tensor]:
        # all forward passes first, all backward passes after them: nothing may depend on who ran last
        return [policy.logp(TOKENS).logp.sum(), value.value(TOKENS).square().sum(), reward.score(TOKENS).sum()]

    expected, found = losses(*alone), losses(actor, critic, judge)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        a.backward()
        b.backward()
    for one, other in zip((actor, critic, judge), alone, strict=True):
        theirs = free(other)
        for name, p in free(one).items():
            torch.testing.assert_close(p.grad, theirs[name].grad, rtol=1e-10, atol=1e-12)
    with torch.no_grad(), actor.reference() as reference:
        start = load_policy(folder, device="cpu").double()
        torch.testing.assert_close(reference.logp(TOKENS).logp, start.logp(TOKENS).logp, rtol=1e-12, atol=1e-12)


def test_no_weight_of_the_base_is_there_twice():
    actor = Policy(tiny_model("llama", len(LETTERS)), letters())
    base = SharedBase(actor)
    critic = base.fresh()
    actor.adapt(LORA)
    critic.adapt(LORA)
    own = {p.data_ptr() for p in actor.parameters()}
    new = [name for name, p in critic.named_parameters() if p.data_ptr() not in own]
    assert new
    assert all("lora_" in name or name.endswith("score.weight") for name in new)
    assert not any(p.requires_grad for name, p in critic.named_parameters() if name not in new)


@pytest.fixture(scope="module")
def judged(tmp_path_factory) -> tuple[Path, Path]:
    """A base and a reward model trained on it, saved as adapters."""
    folder = tmp_path_factory.mktemp("judged")
    base = save_mini(folder / "base")
    trained(reward_settings(folder, base, **{"model.merge": False}))
    return base, folder / "run" / "model"


def test_adapters_and_head_are_saved_as_peft_reads_them(judged):
    import peft
    from transformers import AutoModelForSequenceClassification

    base, folder = judged
    assert not (folder / "model.safetensors").exists()
    ours = load_reward(folder, device="cpu", trainable=False)
    assert ours.meaning.kind == "preference"
    assert any(p.any() for name, p in ours.named_parameters() if "lora_B" in name)
    plain_model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    theirs = peft.PeftModel.from_pretrained(plain_model, str(folder))
    with torch.no_grad():
        for ids in ([5, 6, 7, 9, 10, 12], [9, 4, 3]):
            whole = Tokens.from_ids([ids[:1]], [ids[1:]])
            torch.testing.assert_close(theirs(torch.tensor([ids])).logits[:, 0], ours.score(whole))


def ppo(base: dict[str, Any], judged, **extra) -> Any:
    model, judge = judged
    parts = {"parts": {"rm": {"model": str(judge)}}}
    return recipe("ppo", merge(base, {"model.path": str(model), "model.lora": {"r": 2}, "reward": parts}), **extra)


def state_of(asked: Any) -> OnPolicy:
    prompts = [Prompt([3 + i], "a", index=i) for i in range(8)]
    return OnPolicy(asked, build_roles(asked, CPU), prompts, Batches(8, asked.rollout.prompts, 0, drop_last=True))


def test_ppo_learns_what_it_learns_with_separate_models(base, judged):
    shared, apart = state_of(ppo(base, judged, share="base")), state_of(ppo(base, judged))
    for one, other in ((shared.roles.learner.policy, apart.roles.learner.policy),
                       (shared.roles.learner.critic, apart.roles.learner.critic)):  # fmt: skip
        copied(one, other)
    judge: Any = shared.roles.reward.parts["rm"][1]
    memory = {p.data_ptr() for p in shared.roles.policy.parameters()}
    own = [name for name, p in judge.model.named_parameters() if p.data_ptr() not in memory]
    assert all("lora_" in name or "score" in name for name in own)
    for _ in range(3):
        a, b = shared.iteration(), apart.iteration()
        assert [s.ids for s in a.samples] == [s.ids for s in b.samples]
        for name, x in a.stats.items():
            if not name.startswith(("time", "throughput")):
                assert x == pytest.approx(b.stats[name], rel=1e-3, abs=1e-5), name
    for name, p in free(shared.roles.policy).items():
        torch.testing.assert_close(p, free(apart.roles.policy)[name], rtol=1e-3, atol=1e-5)
    assert a.stats["explained_variance"] != 0
    assert a.stats["ratio_gap"] < 1e-4


def test_the_critic_begins_as_the_reward_model(base, judged):
    state = state_of(ppo(base, judged, share="base"))
    critic: Any = state.roles.learner.critic
    with torch.no_grad():
        torch.testing.assert_close(critic.score(TOKENS), load_reward(judged[1], device="cpu").score(TOKENS))
    assert any("lora_A" in name for name in free(critic))
    fresh: Any = state_of(ppo(base, judged, share="base", critic__init="policy")).roles.learner.critic
    with torch.no_grad():
        assert not fresh.score(TOKENS).any()


def test_a_run_that_was_cut_resumes_to_the_same_weights_and_saves_a_plain_model(base, judged, tmp_path):
    whole = ppo(base, judged, share="base", iterations=3, run__dir=str(tmp_path / "whole"))
    rl.run(whole)
    cut = ppo(base, judged, share="base", iterations=2, run__dir=str(tmp_path / "cut"))
    rl.run(cut)
    rl.run(cut.model_copy(update={"iterations": 3}), resume=True)
    a, b = weights(tmp_path / "whole" / "model"), weights(tmp_path / "cut" / "model")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not any("lora" in name for name in a)
    assert plain(rows(tmp_path / "whole")[-1]) == plain(rows(tmp_path / "cut")[-1])


def test_the_forecast_counts_the_base_once(base, judged):
    roles = {share: build_roles(ppo(base, judged, share=share), CPU) for share in ("base", "none")}
    found = {}
    for share, each in roles.items():
        models = rl._models(ppo(base, judged, share=share), each)
        found[share] = foresee(CPU, models, Load(40, 40))[0].shares["weights"]
    policy = roles["base"].policy
    whole = sum(p.nbytes for p in policy.parameters())
    adapters = sum(p.nbytes for p in free(policy).values())
    assert found["base"] < whole + 4 * adapters + 1024
    assert found["none"] > 2.5 * whole


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"model.lora": None}, "share: base needs adapters"),
        ({"critic.init": "MERGED"}, "no such model folder|not adapters|can not be read"),
    ],
)
def test_what_can_not_share_is_refused(extra, said, base, judged, tmp_path, capsys):
    model, judge = judged
    asked = merge(base, {"model.path": str(model), "model.lora": {"r": 2}, "share": "base",
                         "reward": {"parts": {"rm": {"model": str(judge)}}}})  # fmt: skip
    extra = {key: str(model) if value == "MERGED" else value for key, value in extra.items()}
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(merge(asked, extra)))
    assert cli.main(["ppo", str(file)]) == 2
    assert re.search(said, capsys.readouterr().err)


def test_adapters_of_another_base_stand_alone_as_a_reward_and_are_refused_as_critic(base, judged, tmp_path):
    other = save_mini(tmp_path / "other", seed=3)
    asked = ppo(base, (other, judged[1]), share="base", critic__init="policy")
    roles = build_roles(asked, CPU)
    judge: Any = roles.reward.parts["rm"][1]
    mine = {p.data_ptr() for p in roles.policy.parameters()}
    assert not any(p.data_ptr() in mine for p in judge.model.parameters())
    with pytest.raises(SteersmanError, match="not on the shared base"):
        build_roles(ppo(base, (other, judged[1]), share="base", critic__init=str(judged[1])), CPU)


def test_an_encoder_decoder_and_a_language_models_adapters_are_refused_by_name(judged, tmp_path):
    with pytest.raises(SteersmanError, match="has no sequence classifier"):
        SharedBase(Policy(tiny_model("t5", len(LETTERS)), letters()))
    base, _ = judged
    data = write_jsonl(tmp_path / "sft.jsonl", [{"prompt": "a", "completion": "b"}] * 4)
    told = ["--model.path", str(base), "--model.lora", "{r: 2}", "--model.merge", "false", "--train.batch_size", "2"]
    assert cli.main(["sft", *told, "--data.path", str(data), "--run.dir", str(tmp_path / "sft")]) == 0
    with pytest.raises(SteersmanError, match="adapters of a language model"):
        load_reward(tmp_path / "sft" / "model")
