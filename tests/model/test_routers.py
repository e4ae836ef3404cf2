"""The loss of a mixture's routers: the field's formula, over tokens and no padding; refused where it does nothing."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from letter_models import LETTERS, letters
from tiny_models import tiny_config, tiny_pair_config
from torch import Tensor

from steersman.model import Policy
from steersman.recipe.sections import ModelConfig
from steersman.run.run_config import RunConfig
from steersman.setup.models import policy_from
from steersman.types import SteersmanError, Tokens

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
from families import small_config  # type: ignore

RAGGED = Tokens.from_ids([[5, 6, 9, 4, 8], [7], [5, 6]], [[7, 8, 9], [4, 5, 6, 11, 3, 9, 12], [14]])
SHARED = Tokens.from_ids([[5, 6, 9, 4, 8, 7] * 4] * 3, [[7, 8], [4], [14, 6, 6]])


def mixture(kind: str) -> Any:
    """A tiny random model, whose experts are in unequal use."""
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(small_config(kind, len(LETTERS), whole=True)).float().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.mul_(8.0 if p.ndim > 1 and ("gate." in name or "router" in name) else 3.0 if p.ndim > 1 else 1.0)
    return model


def of_rows(policy: Policy, tokens: Tokens) -> Tensor:
    routers = policy.routers
    assert routers is not None
    with routers.listening():
        policy.hidden(tokens)
        return routers.loss()


def transcribed(model: Any, tokens: Tokens) -> Tensor:
    """E sum_e f_e P_e in float64, token by token, of what transformers records when each row is read by itself."""
    top, chosen, likely = model.config.num_experts_per_tok, [], []
    for row in range(len(tokens)):
        one = tokens.rows(torch.tensor([row]))
        ids = torch.cat([one.prompt[:, : one.prompt_length[0]], one.response[:, : one.response_length[0]]], 1)
        for layer in model.base_model(ids, output_router_logits=True, use_cache=False).router_logits:
            for token in layer.double():
                best = set(token.argsort(descending=True)[:top].tolist())
                chosen.append([float(e in best) for e in range(len(token))])
                likely.append(token.exp() / token.exp().sum())
    f, p = torch.tensor(chosen, dtype=torch.float64).mean(0), torch.stack(likely).mean(0)
    return len(f) * (f * p).sum()


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model: Any, found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found.double(), wanted.double(), rtol=1e-6, atol=0)
    got, expected = gradients(model, found), gradients(model, wanted)
    assert max(float(g.abs().max()) for n, g in expected.items() if "gate." in n or "router" in n) > 1e-3
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("tokens", "pack"), [(RAGGED, None), (RAGGED, 16), (SHARED, None)], ids=["padded", "packed", "shared prompt"]
)
def test_every_token_of_every_row_counts_once_and_padding_does_not(tokens, pack):
    model = mixture("mixtral")
    policy = Policy(model, letters(), pack=pack)
    policy.watch_routers()
    assert_same(model, of_rows(policy, tokens), transcribed(model, tokens))


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_it_is_the_loss_that_transformers_gives_of_one_batch(kind):
    model = mixture(kind)
    policy, ids = Policy(model, letters()), torch.randint(3, len(LETTERS), (3, 9))
    policy.watch_routers()
    found = of_rows(policy, Tokens.from_ids(ids[:, :4].tolist(), ids[:, 4:].tolist()))
    assert_same(model, found, model(ids, output_router_logits=True, use_cache=False).aux_loss)


def test_layers_that_run_again_give_the_same_gradient(tmp_path):
    mixture("qwen3_moe").save_pretrained(tmp_path)
    letters().save_pretrained(tmp_path)
    found = []
    for again in (False, True):
        config = ModelConfig(path=str(tmp_path), gradient_checkpointing=again)
        policy = policy_from(config, RunConfig(), torch.device("cpu"), routers=True)
        assert policy.routers is not None
        with policy.routers.listening():
            logp = policy.logp(RAGGED).logp
            found.append(gradients(policy.model, logp.sum() + policy.routers.loss()))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_what_is_read_without_gradients_does_not_count():
    policy = Policy(mixture("mixtral"), letters())
    routers = policy.watch_routers()
    with routers.listening():
        policy.hidden(RAGGED)
        wanted = routers.loss()
        with torch.no_grad():
            policy.hidden(SHARED)
        torch.testing.assert_close(routers.loss(), wanted, rtol=0, atol=0)
    policy.hidden(SHARED)  # after the end
    torch.testing.assert_close(of_rows(policy, RAGGED), wanted, rtol=0, atol=0)
    reference = copy.deepcopy(policy)  # as of a reference that moves
    with routers.listening():
        reference.hidden(RAGGED)
        with pytest.raises(SteersmanError, match=r"train\.router_loss: no router of .* was asked for a token"):
            routers.loss()


def test_a_model_without_such_routers_is_refused_before_its_weights_are_read(tmp_path):
    sparse = hf.AutoConfig.for_model(  # all of its layers are dense
        "qwen3_moe", vocab_size=len(LETTERS), hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=32, mlp_only_layers=[0],
    )  # fmt: skip
    configs = {"no layer with a router": sparse}
    configs |= {"no causal mixture of experts": tiny_config("llama"), "no causal mixture": tiny_pair_config("t5")}
    for why, config in configs.items():
        config.save_pretrained(tmp_path)
        letters().save_pretrained(tmp_path)
        with pytest.raises(SteersmanError, match=f"train.router_loss.*{why}"):
            policy_from(ModelConfig(path=str(tmp_path)), RunConfig(), torch.device("cpu"), routers=True)


def test_adapters_behind_the_last_router_are_refused_and_those_before_one_learn(tmp_path):
    mixture("mixtral").save_pretrained(tmp_path)
    letters().save_pretrained(tmp_path)

    def policy(targets: str) -> Policy:
        config = ModelConfig.model_validate({"path": str(tmp_path), "lora": {"r": 2, "targets": targets}})
        return policy_from(config, RunConfig(), torch.device("cpu"), routers=True)

    last = json.loads((tmp_path / "config.json").read_text())["num_hidden_layers"] - 1
    with pytest.raises(SteersmanError, match=r"train.router_loss: nothing that is trained .* leads to a router"):
        policy(rf"model\.layers\.{last}\.mlp\.experts\.down_proj")
    before = policy("all-linear")
    assert before.routers is not None
    found = gradients(before.model, of_rows(before, RAGGED))
    assert any("v_proj" in name and bool(g.any()) for name, g in found.items())
    assert not any(".gate." in name for name in found)
