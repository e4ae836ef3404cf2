"""Real vLLM servers; `make test-vllm` runs these. They need an environment with vLLM: STEERSMAN_VLLM_PYTHON names its
Python, which otherwise is looked for in env/vllm beside the checkout."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from letter_models import LETTERS, letters, write_jsonl
from remote_kit import asked, move

from steersman.model import Policy
from steersman.rollout import Sampling
from steersman.rollout.remote import ReceiptError, ServerSettings, open_vllm, snapshot
from steersman.rollout.remote.launch import ServerProcess
from steersman.rollout.remote.servers import EXTENSION, lora_words, vllm_command, vllm_environment
from steersman.rollout.remote.wire import VLLM_KEY, ServerGoneError
from steersman.types import SteersmanError, Tokens

PYTHON = Path(
    os.environ.get("STEERSMAN_VLLM_PYTHON", Path(__file__).resolve().parents[4] / "env" / "vllm" / "bin" / "python")
)
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not PYTHON.exists(), reason=f"needs vLLM, and there is no {PYTHON}"),
]


def save_llama(folder: Path, *, tied: bool = True, padding: int = 13, hidden: int = 128) -> Path:
    """Head size 64, which vLLM's CPU build takes; embedding and output layer are one, the vocabulary is padded."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(LETTERS) + padding, hidden_size=hidden, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=64, max_position_embeddings=512, bos_token_id=1,
        eos_token_id=2, pad_token_id=None, initializer_range=0.2, tie_word_embeddings=tied,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    letters().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    from steersman.model import load_policy

    key = pytest.MonkeyPatch()
    key.setenv(VLLM_KEY, "a key")  # as whoever starts a server of their own sets it for the run too
    torch.set_num_threads(1)
    policy: Policy = load_policy(save_llama(tmp_path_factory.mktemp("llama")), device="cpu", dtype="float32")
    generator = open_vllm(
        policy,
        ServerSettings(ends=(2,), max_batch=16, timeout=600.0, python=str(PYTHON), sampling=Sampling(1, top_k=5)),
    )
    yield policy, generator
    generator.close()
    key.undo()


def move_adapters(policy: Policy) -> None:
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)


def gap(policy: Policy, samples, temperature: float = 1.0) -> float:
    """Largest difference between what was recorded and what the policy says of the same tokens."""
    support = None if samples[0].support is None else [s.support for s in samples]
    tokens = Tokens.from_ids([s.prompt.ids for s in samples], [s.ids for s in samples], support=support)
    with torch.no_grad():
        logp = policy.logp(tokens, temperature=temperature).logp
    told = torch.nn.utils.rnn.pad_sequence([torch.tensor(s.logp) for s in samples], batch_first=True)
    return float((logp - told).abs().max())


def test_recorded_log_probabilities_are_the_policy_s(served):
    policy, generator = served
    for version in range(3):
        move(policy, 0.02)
        assert generator.update_weights(version)["sync/gap"] < 1e-4
        samples = generator.generate(
            asked(), Sampling(16, temperature=0.8), n=2, seed=(1, version), record_support=True
        )
        assert len(samples) == 10
        assert gap(policy, samples, 0.8) < 1e-4
        assert all(s.version == [version] * len(s.ids) for s in samples)
        assert max(i for s in samples for i in s.ids) < len(LETTERS)


def test_the_same_seed_gives_the_same_samples_and_others_differ(served):
    _, generator = served
    generator.update_weights(5)
    one, two = (generator.generate(asked(), Sampling(16), n=2, seed=7) for _ in range(2))
    assert [s.ids for s in one] == [s.ids for s in two]
    assert [s.ids for s in one] != [s.ids for s in generator.generate(asked(), Sampling(16), n=2, seed=8)]
    assert len({tuple(s.ids) for s in one}) > 5


def test_truncated_sampling_has_its_support(served):
    policy, generator = served
    generator.update_weights(6)
    sampling = Sampling(8, top_k=5, top_p=0.8)
    samples = generator.generate(asked(), sampling, seed=1, record_support=True)
    assert all(1 <= len(s) <= 5 for sample in samples for s in sample.support)
    assert gap(policy, samples) < 1e-4
    with pytest.raises(SteersmanError, match="only beside a top_k"):
        generator.generate(asked(), Sampling(8, top_p=0.8), record_support=True)


def test_tokens_as_likely_as_the_last_of_top_k_are_in_the_support(served):
    """vLLM keeps all that are as likely as the k-th."""
    policy, generator = served
    table = policy.model.get_output_embeddings().weight.data
    before = table.clone()
    table[[7, 9]] = before[5]
    generator.update_weights(8)
    samples = generator.generate(asked(), Sampling(16, top_k=2), n=4, seed=1, record_support=True)
    assert max(len(ids) for s in samples for ids in s.support) > 2
    assert gap(policy, samples) < 1e-4
    table.copy_(before)


def test_an_update_that_nobody_finished_does_not_hold_the_next(served):
    _, generator = served
    server = generator.stations[0].server
    server.post_once("/start_weight_update")
    assert generator.update_weights(9)["sync/gap"] < 1e-4
    for _ in range(8):
        server.post_once("/start_weight_update")
        with pytest.raises(SteersmanError, match="already active") as caught:
            server.post_once("/start_weight_update")
        assert not isinstance(caught.value, ServerGoneError)  # a 500 of a server that is well
        server.post_once("/finish_weight_update", {"weight_version": ""})
    generator.update_weights(10)


def test_stop_strings_and_shortest_lengths(served):
    policy, generator = served
    generator.update_weights(7)
    samples = generator.generate(
        asked(12), Sampling(40, stop=("a", "b"), min_new_tokens=3), seed=1, record_support=True
    )
    stopped = [s for s in samples if s.finish == "stop"]
    assert stopped
    for s in stopped:
        assert policy.tokenizer.decode(s.ids)[-1] in "ab"
        assert len(s.ids) >= 3
    assert gap(policy, samples) < 1e-4


def test_ends_other_than_the_tokenizer_s_are_accounted_for(served):
    """vLLM withholds the tokenizer's own end too until there are min_new_tokens; it is likely here."""
    policy, owner = served
    assert policy.tokenizer.eos_token_id == 2
    table = policy.model.get_output_embeddings().weight.data
    before = table.clone()
    table[2] = 4 * before[2]
    generator = open_vllm(policy, ServerSettings((5,), 16, timeout=600.0, urls=(owner.stations[0].server.url,)))
    samples = generator.generate(asked(12), Sampling(16, min_new_tokens=6), n=4, seed=1, record_support=True)
    assert not any(i in (2, 5) for s in samples for i in s.ids[:6])
    assert any(2 in s.ids[6:] for s in samples)
    assert gap(policy, samples) < 1e-4
    generator.close()
    table.copy_(before)


def test_many_samples_of_a_prompt_and_greedy_ones(served):
    policy, generator = served
    generator.update_weights(11)
    most = generator.stations[0].limits.most
    assert most >= 64
    samples = generator.generate(asked(2), Sampling(8), n=2 * most + 3, seed=1, record_support=True)
    assert len(samples) == 2 * (2 * most + 3)
    assert gap(policy, samples) < 1e-4
    few = generator.generate(asked(2), Sampling(8), n=most, seed=1)
    assert [s.ids for s in few] == [s.ids for s in samples if s.index < most]
    greedy = generator.generate(asked(2), Sampling(8).as_greedy(), n=3)
    alone = generator.generate(asked(2), Sampling(8).as_greedy())
    assert [s.ids for s in greedy] == [s.ids for s in alone for _ in range(3)]


@pytest.mark.parametrize(
    "name", ["embed_tokens", "0.self_attn.k_proj", "1.mlp.up_proj", "0.mlp.down_proj", "lm_head"]
)
def test_an_update_that_is_refused_is_told_and_does_not_hold_the_next(served, monkeypatch, name):
    policy, generator = served
    real = snapshot.save_file

    def cut(state, path):
        half = {k: v[:, : v.shape[1] // 2].contiguous() for k, v in state.items() if f"{name}.weight" in k}
        assert len(half) == 1
        real(state | half, path)

    with monkeypatch.context() as patch:
        patch.setattr(snapshot, "save_file", cut)
        for version in (12, 13):
            with pytest.raises(SteersmanError, match=rf"does not take \S*{name}.weight \[\d+, \d+\]"):
                generator.update_weights(version)
    move(policy, 0.02)
    assert generator.update_weights(14)["sync/gap"] < 1e-4
    samples = generator.generate(asked(), Sampling(8), n=2, seed=1, record_support=True)
    assert gap(policy, samples) < 1e-4


def test_a_server_of_another_model_is_named(served, tmp_path):
    from steersman.model import load_policy

    _, owner = served
    other = load_policy(save_llama(tmp_path, hidden=64), device="cpu", dtype="float32")
    wanted = ServerSettings((2,), 16, timeout=600.0, urls=(owner.stations[0].server.url,))
    with pytest.raises(SteersmanError, match="not the policy's: hidden_size is 128 there, and must be 64"):
        open_vllm(other, wanted)
    assert owner.update_weights(15)["sync/gap"] < 1e-4


@pytest.mark.parametrize("which", [0, 5, -1])
def test_a_dropped_tensor_is_caught(served, monkeypatch, which):
    policy, generator = served
    move(policy, 1e-6)
    real, name = snapshot.save_file, sorted(policy.model.state_dict())[which]
    cut = lambda state, path: real({k: v for k, v in state.items() if k != name}, path)  # noqa: E731
    monkeypatch.setattr(snapshot, "save_file", cut)
    with pytest.raises(ReceiptError, match=f"{name} did not arrive"):
        generator.update_weights(20)
    monkeypatch.undo()
    assert generator.update_weights(21)["sync/gap"] < 1e-4


def test_old_weights_are_caught(served, monkeypatch):
    policy, generator = served
    real, old = snapshot.save_file, {k: v.clone() for k, v in snapshot.weights_of(policy).items()}
    move(policy, 1e-6)
    monkeypatch.setattr(snapshot, "save_file", lambda state, path: real(old, path))
    with pytest.raises(ReceiptError, match="arrived with other values"):
        generator.update_weights(22)


def test_a_server_that_is_killed_comes_back_with_its_weights(served):
    policy, generator = served
    generator.update_weights(30)
    before = generator.generate(asked(), Sampling(16), seed=3, record_support=True)
    os.killpg(generator.stations[0].process.pid, signal.SIGKILL)
    time.sleep(0.5)
    after = generator.generate(asked(), Sampling(16), seed=3, record_support=True)
    assert generator.stations[0].restarts == 1
    assert [s.ids for s in before] == [s.ids for s in after]
    assert gap(policy, after) < 1e-4


def test_adapters_travel_alone(tmp_path):
    """A server with the base from the start; each version is an adapter under a name of its own."""
    from steersman.model import LoraConfig, load_policy

    policy = load_policy(save_llama(tmp_path), lora=LoraConfig(r=4), device="cpu", dtype="float32")
    wanted = ServerSettings((2,), 16, timeout=600.0, python=str(PYTHON), adapter=True)
    generator = open_vllm(policy, wanted)
    torch.manual_seed(0)
    try:
        for version in (1, 2, 3):
            move_adapters(policy)
            assert generator.update_weights(version)["sync/gap"] < 1e-4
            samples = generator.generate(asked(), Sampling(16), n=2, seed=version, record_support=True)
            assert gap(policy, samples) < 1e-4
            assert all(s.version == [version] * len(s.ids) for s in samples)
        station = generator.stations[0]
        assert station.server.models() == ["policy", f"{station.owner}:3"]
        real = snapshot.save_file
        dropped = lambda state, path: real(dict(list(state.items())[:-2]), path)  # noqa: E731
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(snapshot, "save_file", dropped)
            with pytest.raises(ReceiptError, match="did not arrive"):
                generator.update_weights(4)
        assert generator.update_weights(5)["sync/gap"] < 1e-4
    finally:
        generator.close()


def test_a_server_with_the_base_as_it_lies_in_its_folder_never_samples_padding(tmp_path, monkeypatch):
    """A server of the user's has the base's whole table; a third of its rows is padding here, and as likely."""
    from steersman.model import LoraConfig, load_policy

    monkeypatch.setenv(VLLM_KEY, "a key")
    folder = save_llama(tmp_path / "base")
    policy, larger = (load_policy(str(folder), lora=LoraConfig(r=r), device="cpu", dtype="float32") for r in (4, 20))
    words = vllm_command(str(PYTHON), str(folder), "float32", 20, True)
    words[words.index("dummy")] = "auto"
    launched = ServerProcess(
        "server of the user", lambda port: [*words, *lora_words(policy), "--port", str(port)], tmp_path / "log",
        timeout=600.0, key="a key",
        environment={
            **vllm_environment(True), "PYTHONPATH": str(EXTENSION), "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
            VLLM_KEY: "a key",
        },
    )  # fmt: skip
    launched.start()
    try:
        server = launched.wait()
        wanted = ServerSettings((2,), 16, timeout=600.0, urls=(server.url,), adapter=True)
        with pytest.raises(
            SteersmanError, match=r"takes adapters up to rank 8, .* have rank 20; .*--max-lora-rank 32"
        ):
            open_vllm(larger, wanted)
        generator = open_vllm(policy, wanted)
        move_adapters(policy)
        assert generator.update_weights(1)["sync/gap"] < 1e-4
        samples = generator.generate(asked(), Sampling(40, temperature=1.5), n=4, seed=1, record_support=True)
        assert max(i for s in samples for i in s.ids) < len(LETTERS)
        assert gap(policy, samples, 1.5) < 1e-4
        assert len(server.models()) == 2
        generator.close()
        assert server.models() == ["policy"]
    finally:
        launched.stop()


def test_a_prefix_cache_that_outlives_its_weights_is_caught(served, monkeypatch):
    """The first canary is longer than a block of the cache, so what was kept of it under older weights shows."""
    policy, generator = served
    generator.update_weights(40)
    server = generator.stations[0].server
    real = server.post
    kept = lambda path, *a, **k: None if path == "/reset_prefix_cache" else real(path, *a, **k)  # noqa: E731
    monkeypatch.setattr(server, "post", kept)
    move(policy, 0.02)
    with pytest.raises(ReceiptError, match=r"differ from the policy's by up to .* a stale cache"):
        generator.update_weights(41)
    monkeypatch.undo()
    assert generator.update_weights(42)["sync/gap"] < 1e-4


def train(name: str, tmp_path: Path, **rollout: Any) -> list[dict[str, Any]]:
    """A short run by the verb; the rows of its metrics."""
    from steersman.verbs import rl
    from steersman.verbs.on_policy_recipes import RECIPES

    prompts = [{"prompt": word} for word in ("the cat", "a dog sat", "we", "look at", "no", "she said so")]
    values = {
        "model": {"path": str(save_llama(tmp_path / "model"))},
        "data": {"path": str(write_jsonl(tmp_path / "prompts.jsonl", prompts)), "held_out": 2},
        "reward": {"parts": {"length": {"builtin": "length"}}},
        "rollout": {"prompts": 2, "samples": 4, "max_new_tokens": 8, "engine": "vllm", "timeout": 600, **rollout},
        "iterations": 3,
        "run": {"dir": str(tmp_path / "run"), "threads": 1},
    }  # fmt: skip
    rl.run(RECIPES[name].model_validate(values))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    gaps = [row["sync/gap"] for row in rows if "sync/gap" in row]
    assert len(gaps) == 3
    assert max(gaps) < 1e-4
    return rows


def test_grpo_trains_on_vllm(tmp_path):
    """Three iterations by the verb, sampled ahead, with a receipt after each update."""
    train("grpo", tmp_path, python=str(PYTHON), ahead=1)


@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_a_verb_trains_on_a_server_that_runs_already(name, served, tmp_path):
    """`rollout.url`: the run leaves the server running, with weights that are the run's."""
    _, generator = served
    server = generator.stations[0].server
    train(name, tmp_path, url=[server.url])
    assert server.healthy()
    assert server.weights().endswith(":3")
    generator.update_weights(50)
