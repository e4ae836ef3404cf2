"""What a server tells beside its tokens must be what the loss takes it for, and is looked at before a run begins."""

from __future__ import annotations

import json

import pytest
import torch
from letter_models import LETTERS, letters, save_mini, write_jsonl
from remote_kit import asked, make_policy
from test_faults import Elsewhere, Stub

from steersman.cli import main
from steersman.guards import retry
from steersman.model import LoraConfig, Policy
from steersman.rollout import Sampling
from steersman.rollout.remote import ReceiptError, ServerSettings, open_process, open_vllm
from steersman.types import Prompt, SteersmanError

DRAWN = [Sampling(1), Sampling(1, temperature=0.6), Sampling(1, temperature=1.8, top_k=6), Sampling(1, top_p=0.7),
         Sampling(1, top_k=6, top_p=0.9, min_p=0.05)]  # fmt: skip


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.01)


@pytest.fixture
def server():
    made = Elsewhere()
    yield made
    made.close()


def wanted(server, sampling: Sampling = DRAWN[0]) -> ServerSettings:
    return ServerSettings((2,), 8, urls=(server.url,), timeout=20.0, sampling=sampling)


def tell_raw(server: Elsewhere) -> None:
    """As vLLM does by default: log-probabilities of temperature 1 over the whole vocabulary, whatever is drawn."""
    real = server.desk.generate

    def generate(body):
        found = real(body)
        for choice, one in zip(found["choices"], (o for o in body["batch"] for _ in range(o["n"])), strict=True):
            ids = torch.tensor([[*one["token_ids"], *choice["token_ids"]]])
            with torch.no_grad():
                logp = torch.log_softmax(server.desk.policy.model(ids).logits[0].float(), -1)
            for t, told in enumerate(choice["logprobs"]["content"]):
                told["logprob"] = float(logp[len(one["token_ids"]) - 1 + t, told["token_id"]])
        return found

    server.desk.generate = generate


@pytest.mark.parametrize("sampling", DRAWN)
def test_a_receipt_asks_for_tokens_as_the_run_draws_them(server, sampling):
    generator = open_process(make_policy(), wanted(server, sampling))
    drawn, real = [], server.desk.generate
    server.desk.generate = lambda body: drawn.append(body["sampling_params"]) or real(body)
    assert generator.update_weights(1)["sync/gap"] < 1e-4
    told = [(p["temperature"], p["top_k"], p["top_p"], p["min_p"]) for p in drawn]
    temperature = 1.25 if sampling.temperature == 1 else sampling.temperature
    assert told == [(1.0, 0, 1.0, 0.0), (temperature, sampling.top_k, sampling.top_p, sampling.min_p)]
    generator.close()


@pytest.mark.parametrize("sampling", DRAWN)
def test_a_server_of_raw_log_probabilities_gets_no_receipt(server, sampling):
    tell_raw(server)
    generator = open_process(make_policy(), wanted(server, sampling))
    said = r"not those of the distribution that it draws from: with temperature .* --logprobs-mode processed_logprobs"
    with pytest.raises(ReceiptError, match=f"{server.url}: .*{said}"):
        generator.prepare(20)
    generator.close()


def vllm(policy: Policy, **told) -> Stub:
    """What vLLM 0.32 says of itself, started with the command of the documentation but for what is `told`."""
    own = policy.model.config.to_dict()
    held = {name: own[name] for name in ("hidden_size", "num_hidden_layers")} | {"vocab_size": 35}
    settings = {
        "max_num_seqs": 4,
        "model": held,
        "logprobs_mode": "processed_logprobs",
        "max_logprobs": 20,
        "max_lora_rank": 0,
    } | told
    return Stub(
        version={"version": "0.32.0"}, v1__models={"data": [{"id": "policy", "max_model_len": 64}]},
        weight_info={"weight_version": ""},
        collective_rpc={"results": [{name: value for name, value in settings.items() if value is not None}]},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("told", "sampling", "said"),
    [
        ({"logprobs_mode": "raw_logprobs"}, DRAWN[0], "it tells raw_logprobs, .*--logprobs-mode processed_logprobs"),
        ({"logprobs_mode": "processed_logits"}, DRAWN[0], "it tells processed_logits"),
        ({"logprobs_mode": None}, DRAWN[0], "Its extension may be of another steersman"),
        (
            {},
            Sampling(1, top_k=13),
            r"of 20 tokens at most, and rollout\.top_k needs 21; .*--max-logprobs 21 or more",
        ),
        ({"max_logprobs": 34}, Sampling(1, top_k=500), r"rollout\.top_k needs 35;"),
    ],
)
def test_what_vllm_was_started_with_is_looked_at_when_it_is_opened(told, sampling, said):
    policy = make_policy()
    stub = vllm(policy, **told)
    with pytest.raises(SteersmanError, match=f"rollout server {stub.url}: .*{said}"):
        open_vllm(policy, ServerSettings((2,), 4, urls=(stub.url,), timeout=5.0, sampling=sampling))


@pytest.mark.parametrize(
    ("told", "rank", "said"),
    [
        (0, 4, "it takes no adapters, and the policy's have rank 24; .*--enable-lora --max-lora-rank 32 "),
        (16, 4, "it takes adapters up to rank 16, and the policy's have rank 24"),
        (512, 600, r"rollout\.sync adapter: vLLM takes adapters up to rank 512, and the policy's have rank 600"),
    ],
)
def test_a_server_must_take_the_largest_rank_of_all_adapters(told, rank, said):
    policy = make_policy()
    policy.adapt(LoraConfig(r=rank))
    policy.adapters.peft_config["default"].rank_pattern = {"down_proj": 24}
    stub = vllm(policy, max_lora_rank=told)
    with pytest.raises(SteersmanError, match=said):
        open_vllm(policy, ServerSettings((2,), 4, urls=(stub.url,), timeout=5.0, adapter=True))


def test_all_that_vllm_can_tell_is_enough(capsys):
    policy = make_policy()
    for most in (-1, 35):
        stub = vllm(policy, max_logprobs=most)
        sampling = Sampling(1, top_k=500)
        open_vllm(policy, ServerSettings((2,), 4, urls=(stub.url,), timeout=5.0, sampling=sampling)).close()
    assert capsys.readouterr().err.count("it has no /tokenize") == 2


def test_a_server_of_another_tokenizer_is_named_when_it_is_opened(server, capsys):
    """As many ids, some of which are other letters: weights would arrive, and stop strings be found elsewhere."""
    open_process(make_policy(), wanted(server)).close()
    assert not capsys.readouterr().err
    moved = [*LETTERS[:3], *LETTERS[:2:-1]]
    server.desk.policy.tokenizer = letters(vocabulary=moved)
    with pytest.raises(
        SteersmanError, match=r"it has another tokenizer: id \d+ is '.' there, and is '.' in the model"
    ):
        open_process(make_policy(), wanted(server))


def test_other_ids_of_the_same_vocabulary_are_no_other_tokenizer(server, capsys):
    real = server.desk.tokenize

    def cut_otherwise(body):
        return {name: told[::-1] for name, told in real(body).items()}

    server.desk.tokenize = cut_otherwise
    open_process(make_policy(), wanted(server)).close()
    assert "it cuts texts into tokens otherwise, of the same vocabulary" in capsys.readouterr().err


def test_what_is_longer_than_a_server_s_window_is_refused_before_it_is_asked(server):
    server.desk.models = lambda _: {"data": [{"id": "policy", "max_model_len": 60}]}
    generator = open_process(make_policy(), wanted(server))
    generator.prepare(60)
    batches, real = [], server.desk.generate
    server.desk.generate = lambda body: batches.append(body) or real(body)
    said = r"its window \(--max-model-len\) is 60 tokens, .* may have 61; .*rollout\.max_new_tokens"
    with pytest.raises(SteersmanError, match=f"{server.url}: {said}"):
        generator.prepare(61)
    with pytest.raises(SteersmanError, match=said):
        generator.generate([*asked(2), Prompt([5] * 51, "", index=2)], Sampling(10))
    assert not batches
    assert len(generator.generate([Prompt([5] * 50, "", index=2)], Sampling(10))) == 1
    generator.close()


def settings(tmp_path, *more: str) -> list[str]:
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": word} for word in ("we", "no", "up", "far")])
    rollout = {"prompts": 2, "samples": 2, "max_new_tokens": 6, "engine": "process", "timeout": 20}
    words = [f"--rollout.{name}={value}" for name, value in rollout.items()]
    parts = {"length": {"builtin": "length"}}
    return [
        "grpo", "--model.path", str(save_mini(tmp_path / "model")), "--data.path", str(rows), "--iterations", "1",
        "--reward.parts", json.dumps(parts), "--run.dir", str(tmp_path / "run"), *words, *more,
    ]  # fmt: skip


def test_a_run_is_refused_before_there_is_one(server, tmp_path, capsys):
    """A mistyped address, a server without room, one that tells something else: each is named, no folder is left, and
    the mended command needs no --resume."""
    words = settings(tmp_path)
    assert main([*words, "--rollout.url", '["http://127.0.0.1:1"]']) == 2
    assert "rollout.url: rollout server http://127.0.0.1:1: it can not be reached" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    ours = [*words, "--rollout.url", json.dumps([server.url])]
    server.desk.make = lambda: Policy(make_mini(tmp_path), letters())
    server.desk._begin(server.desk.make())
    real, models = server.desk.generate, server.desk.models
    server.desk.models = lambda _: {"data": [{"id": "policy", "max_model_len": 41}]}
    assert main([*ours, "--rollout.max_new_tokens", "48"]) == 2
    assert "its window (--max-model-len) is 41 tokens" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    server.desk.models = models
    tell_raw(server)
    assert main([*ours, "--rollout.temperature", "0.7", "--rollout.recompute_logp", "true"]) == 2
    assert "with temperature 0.7 they differ from the policy's" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    server.desk.generate = real
    assert main(ours) == 0, capsys.readouterr().err


def make_mini(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_pretrained(tmp_path / "model")
    config.tie_word_embeddings = False
    return LlamaForCausalLM(config).eval()


def test_generate_is_refused_before_it_keeps_anything(tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    words = [
        "generate",
        "--model.path",
        str(save_mini(tmp_path / "model")),
        "--prompts",
        '["we"]',
        "--out",
        str(out),
        "--rollout.max_new_tokens",
        "6",
    ]
    assert main([*words, "--rollout.engine", "process", "--rollout.url", '["http://127.0.0.1:1"]']) == 2
    assert "rollout.url: rollout server http://127.0.0.1:1" in capsys.readouterr().err
    assert not list(tmp_path.glob("out.jsonl*"))
