"""Values and scores stand at the right tokens, against one unpadded row through the ecosystem's own class."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_models import FAMILIES, PAIR_FAMILIES, tiny_config, tiny_model, tiny_pair_config
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

from steersman.model import Policy, ScalarModel, SharedCritic
from steersman.types import SteersmanError

TIGHT = {"rtol": 1e-4, "atol": 1e-4}


def tiny_classifier(family: str, labels: int = 1):
    config = tiny_config(family) if family in FAMILIES else tiny_pair_config(family)
    config.num_labels = labels
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3.0 if p.ndim > 1 else 1.0)
    return model


@pytest.fixture(params=[*FAMILIES, *PAIR_FAMILIES])
def scalar(request, tokenizer) -> ScalarModel:
    return ScalarModel(tiny_classifier(request.param), tokenizer)


def alone(model, tokens, b: int, t: int) -> float:
    """The class's own logit after prompt b and t response tokens; one row, so nothing is padding."""
    P = int(tokens.prompt_length[b])
    if model.config.is_encoder_decoder:  # the class itself reads one text on both sides; trunk and head are its own
        shifted = torch.cat([torch.tensor([model.config.decoder_start_token_id]), tokens.response[b, :t]])[None]
        with torch.no_grad():
            trunk = model.base_model(tokens.prompt[b : b + 1, :P], decoder_input_ids=shifted)
            return float(model.classification_head(trunk.last_hidden_state[:, -1]))
    ids = torch.cat([tokens.prompt[b, :P], tokens.response[b, :t]])[None]
    model.config.pad_token_id = None
    with torch.no_grad():
        return float(model(input_ids=ids).logits)


def test_value_and_score_stand_where_they_should(scalar, tokens):
    value, score = scalar.value(tokens).detach(), scalar.score(tokens).detach()
    assert value.shape == (5, 10)
    expected = torch.zeros_like(value)
    for b, n in enumerate(tokens.response_length.tolist()):
        for t in range(n + 1):
            expected[b, t] = alone(scalar.model, tokens, b, t)
        assert float(score[b]) == pytest.approx(float(expected[b, n]), abs=1e-4)
    torch.testing.assert_close(value, expected, **TIGHT)
    assert expected[0, :5].std() > 1e-2


def test_padding_order_and_groups_change_nothing(scalar, tokens):
    value, score = scalar.value(tokens), scalar.score(tokens)
    garbage = replace(tokens, response=tokens.response.clone(), prompt=tokens.prompt.clone())
    for b in range(5):
        garbage.prompt[b, tokens.prompt_length[b] :] = 88
        garbage.response[b, tokens.response_length[b] :] = 2
    torch.testing.assert_close(scalar.value(garbage), value, **TIGHT)
    order = torch.tensor([2, 4, 1, 0, 3])
    torch.testing.assert_close(scalar.value(tokens.rows(order)), value[order], **TIGHT)
    scalar.max_tokens = 20
    with torch.no_grad():
        torch.testing.assert_close(scalar.value(tokens), value, **TIGHT)
        torch.testing.assert_close(scalar.score(tokens), score, **TIGHT)


@pytest.mark.parametrize("family", ["llama", "t5", "bart"])
def test_gradients_do_not_see_padding(tokens, family):
    scalar = ScalarModel(tiny_classifier(family), None)
    scalar.value(tokens).square().sum().backward()
    base = [p.grad.clone() for p in scalar.parameters()]
    scalar.zero_grad()
    for rows in ([1], [0, 2], [3, 4]):
        scalar.value(tokens.rows(torch.tensor(rows))).square().sum().backward()
    for p, g in zip(scalar.parameters(), base, strict=True):
        assert (p.grad - g).abs().max() <= 1e-4 * g.abs().max() + 1e-6


def test_two_labels_are_refused():
    with pytest.raises(SteersmanError, match=r"config\.num_labels is 2"):
        ScalarModel(tiny_classifier("llama", labels=2), None)


def test_a_head_that_does_not_fit_its_config_is_refused():
    model = tiny_classifier("llama", labels=3)
    model.config.num_labels = 1
    with pytest.raises(SteersmanError, match=r"\(3, 32\).*needs \[1, 32\]"):
        ScalarModel(model, None)


def test_an_encoder_is_refused():
    config = BertConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
                        intermediate_size=48, num_labels=1)  # fmt: skip
    with pytest.raises(SteersmanError, match="no linear `score` head"):
        ScalarModel(BertForSequenceClassification(config), None)


def test_a_head_that_reads_something_else_is_refused():
    model = tiny_classifier("llama")
    model.score.register_forward_pre_hook(lambda _m, args: (args[0].tanh(),))
    with pytest.raises(SteersmanError, match="does not read the trunk's last hidden state"):
        ScalarModel(model, None)


@pytest.mark.parametrize("pack", [None, 24])
def test_shared_critic_runs_the_trunk_once(tokens, pack):
    policy = Policy(tiny_model("qwen3"), None, pack=pack)
    critic = SharedCritic(policy)
    assert not critic.value(tokens).any()
    torch.nn.init.normal_(critic.value_head.weight)
    calls = []
    handle = policy.form.trunk.register_forward_hook(lambda *_: calls.append(1))
    out, value = critic.logp_value(tokens, temperature=0.7, entropy=True)
    assert len(calls) == 1
    handle.remove()
    expected = policy.logp(tokens, temperature=0.7, entropy=True)
    torch.testing.assert_close(out.logp, expected.logp, **TIGHT)
    torch.testing.assert_close(out.entropy, expected.entropy, **TIGHT)
    torch.testing.assert_close(value, critic.value(tokens), **TIGHT)
    row = policy.form.trunk(input_ids=tokens.prompt[:1, :3]).last_hidden_state[0, -1]
    torch.testing.assert_close(value[0, 0], row @ critic.value_head.weight[0], **TIGHT)
    policy.max_tokens = 20
    with torch.no_grad():
        grouped, grouped_value = critic.logp_value(tokens, temperature=0.7)
    torch.testing.assert_close(grouped.logp, expected.logp, **TIGHT)
    torch.testing.assert_close(grouped_value, value, **TIGHT)
    (value.sum() + out.logp.sum()).backward()
    assert critic.value_head.weight.grad.any()
