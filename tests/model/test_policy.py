"""Log-probabilities of a policy: right against an unpadded float64 account, and invariant to every layout."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from model_inputs import logits_alone, ragged
from tiny_models import tiny_config, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, BertConfig, BertLMHeadModel, CohereConfig, Gemma2Config, GraniteConfig

from steersman.model import Policy
from steersman.types import SteersmanError, Tokens

TIGHT = {"rtol": 1e-4, "atol": 2e-4}


def one_by_one(model, tokens: Tokens, temperature: float = 1.0, allowed=None):
    """Each row alone, without padding, through the model's own forward; log_softmax in float64."""
    logp = torch.zeros(tokens.response.shape, dtype=torch.float64)
    entropy = torch.zeros_like(logp)
    for b in range(len(tokens)):
        z = logits_alone(model, tokens, b).double() / temperature
        for t in range(int(tokens.response_length[b])):
            row = z[t]
            if allowed is not None:
                row = row.masked_fill(~allowed[b][t], -torch.inf)
            distribution = torch.distributions.Categorical(logits=row)
            logp[b, t] = distribution.log_prob(tokens.response[b, t])
            entropy[b, t] = distribution.entropy()
    return logp, entropy


def value_and_gradients(policy: Policy, tokens: Tokens, weight: torch.Tensor):
    policy.zero_grad()
    logp = policy.logp(tokens).logp
    loss = torch.where(tokens.mask, weight[:, : logp.shape[1]] * logp, 0.0).sum()
    loss.backward()
    return (
        logp.detach(),
        loss.detach(),
        {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None},
    )


def assert_same(a, b, order=slice(None)):
    """Values, loss and every gradient; the second was computed over rows in the given order."""
    T = min(a[0].shape[1], b[0].shape[1])
    torch.testing.assert_close(b[0][:, :T], a[0][order][:, :T], **TIGHT)
    torch.testing.assert_close(b[1], a[1], rtol=1e-4, atol=1e-3)
    assert a[2].keys() == b[2].keys()
    for name, g in a[2].items():
        assert (b[2][name] - g).abs().max() <= 1e-4 * g.abs().max() + 1e-6, name


@pytest.fixture
def policy(live_model, tokenizer) -> Policy:
    return Policy(live_model, tokenizer)


@pytest.fixture
def weight(tokens) -> torch.Tensor:
    return torch.randn(tokens.response.shape, generator=torch.Generator().manual_seed(1))


def padded(tokens: Tokens, prompt: int, response: int, garbage: bool = False) -> Tokens:
    """The same rows with more padding, which may hold any ids."""

    def wider(x, lengths, extra):
        out = torch.zeros(len(x), x.shape[1] + extra, dtype=x.dtype)
        out[:, : x.shape[1]] = x
        if garbage:
            column = torch.arange(out.shape[1])
            out = torch.where(column < lengths[:, None], out, torch.randint(0, 97, out.shape))
        return out

    T = tokens.response.shape[1] + response
    mask = torch.zeros(len(tokens), T, dtype=torch.bool)
    mask[:, : tokens.mask.shape[1]] = tokens.mask
    return replace(
        tokens,
        prompt=wider(tokens.prompt, tokens.prompt_length, prompt),
        response=wider(tokens.response, tokens.response_length, response),
        mask=mask,
    )


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_equals_each_row_alone(policy, tokens, temperature):
    expected, entropy = one_by_one(policy.model, tokens, temperature)
    out = policy.logp(tokens, temperature=temperature, entropy=True)
    torch.testing.assert_close(out.logp.double(), expected, **TIGHT)
    torch.testing.assert_close(out.entropy.double(), entropy, **TIGHT)
    assert policy.logp(tokens).entropy is None
    past = torch.arange(9) >= tokens.response_length[:, None]
    assert not out.logp[past].any()
    assert out.logp[~past].abs().min() > 1e-3  # the check above sees something


def test_padding_garbage_and_order_change_nothing(policy, tokens, weight):
    base = value_and_gradients(policy, tokens, weight)
    wider = torch.cat([weight, torch.ones(5, 4)], 1)
    assert_same(base, value_and_gradients(policy, padded(tokens, 3, 4, garbage=True), wider))
    order = torch.tensor([3, 0, 4, 2, 1])
    assert_same(base, value_and_gradients(policy, tokens.rows(order), weight[order]), order)


def test_batch_composition_changes_nothing(policy, tokens, weight):
    base = value_and_gradients(policy, tokens, weight)
    split = [torch.tensor([0, 3]), torch.tensor([1]), torch.tensor([2, 4])]
    total: dict[str, torch.Tensor] = {}
    for rows in split:
        logp, _, gradients = value_and_gradients(policy, tokens.rows(rows), weight[rows])
        torch.testing.assert_close(logp, base[0][rows][:, : logp.shape[1]], **TIGHT)
        for name, g in gradients.items():
            total[name] = total.get(name, 0) + g
    for name, g in base[2].items():
        assert (total[name] - g).abs().max() <= 1e-4 * g.abs().max() + 1e-6, name


@pytest.mark.parametrize("capacity", [1, 17, 24, 100])
def test_packing_changes_nothing(policy, tokens, weight, capacity):
    if policy.decoder_start:
        with pytest.raises(SteersmanError, match="leave packing off"):
            Policy(policy.model, policy.tokenizer, pack=capacity)
        return
    base = value_and_gradients(policy, tokens, weight)
    packed = Policy(policy.model, policy.tokenizer, pack=capacity)
    assert_same(base, value_and_gradients(packed, tokens, weight))


def test_packing_beyond_the_learned_positions():
    model = tiny_model("gpt2")  # 128 positions
    tokens = Tokens.from_ids(**ragged((50,) * 6 + (2,), (10,) * 6 + (1,)))
    expected = Policy(model, None).logp(tokens).logp
    torch.testing.assert_close(Policy(model, None, pack=360).logp(tokens).logp, expected, **TIGHT)


def test_groups_without_gradient_change_nothing(policy, tokens):
    whole = policy.logp(tokens, entropy=True)
    for most in (1, 20, 31):
        policy.max_tokens = most
        with torch.no_grad():
            parts = policy.logp(tokens, entropy=True)
        torch.testing.assert_close(parts.logp, whole.logp, **TIGHT)
        torch.testing.assert_close(parts.entropy, whole.entropy, **TIGHT)
        assert parts.logp.shape == tokens.response.shape


def test_what_stands_under_a_false_mask_after_a_row_counts_for_nothing(policy, tokens, weight):
    tokens.mask[1, 5:] = False
    tokens.mask[0, :2] = False
    base = value_and_gradients(policy, tokens, weight)
    changed = replace(tokens, response=tokens.response.clone())
    changed.response[1, 5:] = 41  # nothing that counts comes after
    other = value_and_gradients(policy, changed, torch.where(tokens.mask, weight, 1e6))
    assert_same((base[0][:, :5], *base[1:]), (other[0][:, :5], *other[1:]))


def test_a_hole_is_computed_but_not_counted(policy, tokens):
    with_hole = replace(tokens, mask=tokens.mask.clone())
    with_hole.mask[1, 3:6] = False
    assert torch.equal(policy.logp(with_hole).logp, policy.logp(tokens).logp)


def test_pad_that_is_eos_is_harmless(live_model, tokens, tokenizer):
    expected = Policy(live_model, tokenizer).logp(tokens).logp
    live_model.config.pad_token_id = live_model.config.eos_token_id = 2
    tokenizer.pad_token = tokenizer.eos_token
    policy = Policy(live_model, tokenizer)
    assert torch.equal(policy.logp(padded(tokens, 0, 0, garbage=True)).logp, expected)
    torch.testing.assert_close(expected.double(), one_by_one(live_model, tokens)[0], **TIGHT)


def test_no_response_at_all(policy):
    tokens = Tokens.from_ids([[4, 5], [6]], [[], []])
    logp = policy.logp(tokens, entropy=True)
    assert not logp.logp.any()
    assert policy.hidden(tokens).shape == (0, 32)
    (logp.logp.sum() + logp.entropy.sum()).backward()


def test_an_empty_prompt_is_refused():
    policy = Policy(tiny_model("llama"), None)
    with pytest.raises(SteersmanError, match="row 1 of the batch has an empty prompt"):
        policy.logp(Tokens.from_ids([[4], []], [[5], [6]]))


def test_support_restricts_the_distribution(tokens):
    policy = Policy(tiny_model("qwen2"), None)
    generator = torch.Generator().manual_seed(3)
    allowed, support = [], []
    for b, n in enumerate(tokens.response_length.tolist()):
        allowed.append(torch.rand(n, 97, generator=generator) < 0.3)
        for t in range(n):
            allowed[b][t, tokens.response[b, t]] = True
        support.append([row.nonzero().flatten() for row in allowed[b]])
    allowed[2][:] = True
    support[2] = []  # nothing recorded for this row: the whole vocabulary
    restricted = replace(tokens, support=support)
    out = policy.logp(restricted, temperature=0.8, entropy=True)
    logp, entropy = one_by_one(policy.model, tokens, 0.8, allowed)
    torch.testing.assert_close(out.logp.double(), logp, **TIGHT)
    torch.testing.assert_close(out.entropy.double(), entropy, **TIGHT)
    policy.max_tokens = 20
    with torch.no_grad():
        torch.testing.assert_close(policy.logp(restricted, temperature=0.8).logp, out.logp, **TIGHT)


def test_bfloat16(family, tokens):
    exact = Policy(tiny_model(family, scale=1.0), None).logp(tokens).logp
    policy = Policy(tiny_model(family, scale=1.0).bfloat16(), None)
    logp = policy.logp(tokens).logp
    assert logp.dtype == torch.float32
    assert (logp - exact).abs().max() < 0.1
    logp.sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.bfloat16 for p in policy.parameters())


SMALL = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "bos_token_id": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize(("config", "scale", "cap"), [
    (GraniteConfig(**SMALL, logits_scaling=4.0), 0.25, None),
    (CohereConfig(**SMALL, logit_scale=0.0625), 0.0625, None),
    (Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=30.0), 1.0, 30.0),
])  # fmt: skip
def test_scales_and_caps_of_the_logits_are_found(config, scale, cap, tokens):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3.0 if p.ndim > 1 else 1.0)
    policy = Policy(model, None)
    assert (policy.form.logit_scale, policy.form.softcap) == (scale, cap)
    torch.testing.assert_close(policy.logp(tokens).logp.double(), one_by_one(model, tokens)[0], **TIGHT)


def test_a_model_that_does_something_else_to_its_logits_is_refused():
    class Odd(type(tiny_model("llama"))):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits.square()
            return out

    with pytest.raises(SteersmanError, match="changes the output layer's result"):
        Policy(Odd(tiny_config("llama")), None)


def test_a_model_that_changes_its_states_before_the_output_layer_is_refused():
    model = tiny_model("llama")
    model.lm_head.register_forward_pre_hook(lambda _m, args: (args[0] * 1.5,))
    with pytest.raises(SteersmanError, match="does not read the trunk's last hidden state"):
        Policy(model, None)


def test_an_output_layer_that_is_not_linear_is_refused():
    model = tiny_model("llama")
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(SteersmanError, match="output layer is Sequential"):
        Policy(model, None)


def test_a_trunk_that_sees_the_future_is_refused():
    model = tiny_model("llama")

    def blend(_module, _args, out):
        out.last_hidden_state = out.last_hidden_state + out.last_hidden_state.mean(1, keepdim=True)
        return out

    model.model.register_forward_hook(blend)
    with pytest.raises(SteersmanError, match="not a causal language model"):
        Policy(model, None)


def test_an_encoder_with_a_language_model_head_is_refused():
    config = BertConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    with pytest.raises(SteersmanError, match="does not read the trunk's last hidden state"):
        Policy(BertLMHeadModel(config), None)


def test_probing_leaves_the_model_as_it_was():
    model = tiny_model("gpt2").train()
    before = {n: p.clone() for n, p in model.named_parameters()}
    Policy(model, None)
    assert all(m.training for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in model.named_parameters())


def test_a_policy_without_adapters_has_no_reference():
    with pytest.raises(SteersmanError, match="no reference"), Policy(tiny_model("gpt2"), None).reference():
        pass
