"""Our engine in another process: the same samples, weights with a receipt, and nothing lost by a kill."""

from __future__ import annotations

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx2
import pytest
import torch
from forked import ENGINES, Python
from letter_models import LETTERS, letters
from remote_kit import ENDS, asked, make_policy, move, opened

from steersman.model import LoraConfig, Policy, load_policy
from steersman.rollout import Engine, Sampling
from steersman.rollout.remote import ReceiptError, ServerSettings, launch, open_process, snapshot
from steersman.rollout.remote.serve import READ, EngineRoutes, routes
from steersman.rollout.remote.wire import ENGINE_KEY
from steersman.types import Prompt, SteersmanError

SAMPLING = Sampling(20)


@pytest.fixture(autouse=True)
def forked_engines(monkeypatch):
    """An engine that a test starts imports nothing first; `running` is a new Python, as a user's is."""
    monkeypatch.setattr(launch, "subprocess", ENGINES)


def inside(policy: Policy, max_batch: int = 8) -> Engine:
    return Engine(policy.model, policy.tokenizer, max_batch=max_batch, eos_token_id=[2])


def same(one, other) -> bool:
    return all(
        a.ids == b.ids and a.logp == b.logp and a.text == b.text and a.finish == b.finish and a.index == b.index
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize(
    "sampling",
    [
        SAMPLING,
        Sampling(20, temperature=0.7, min_new_tokens=5),
        Sampling(12).as_greedy(),
        Sampling(30, stop=("a", "bc")),
    ],
)
def test_samples_are_those_of_the_engine_inside_bit_for_bit(running, sampling):
    policy, generator = running
    generator.update_weights(1)
    prompts = [*asked(), asked()[0]]  # an index that comes twice has two sets of streams
    here = inside(policy).generate(prompts, sampling, n=2, seed=(3, 4), record_support=True)
    there = generator.generate(prompts, sampling, n=2, seed=(3, 4), record_support=True)
    assert same(here, there)
    for a, b in zip(here, there, strict=True):
        assert (a.support is None) == (b.support is None)
        assert a.support is None or all(torch.equal(x, y) for x, y in zip(a.support, b.support, strict=True))
    assert all(s.version == [1] * len(s.ids) for s in there)


def test_truncated_sampling_comes_with_its_support(running):
    policy, generator = running
    generator.update_weights(1)
    sampling = Sampling(8, top_p=0.7, min_p=0.05)
    here = inside(policy).generate(asked(), sampling, seed=1, record_support=True)
    there = generator.generate(asked(), sampling, seed=1, record_support=True)
    assert same(here, there)
    assert all(
        torch.equal(x, y) for a, b in zip(here, there, strict=True) for x, y in zip(a.support, b.support, strict=True)
    )


def test_new_weights_are_sampled_from_and_proven(running):
    policy, generator = running
    before = generator.generate(asked(), SAMPLING, seed=9)
    move(policy)
    stats = generator.update_weights(7)
    assert stats["sync/version"] == 7
    assert stats["sync/gap"] < 1e-5
    (receipt,) = generator.receipts
    assert receipt.compared == receipt.tensors == len(policy.model.state_dict())
    after = generator.generate(asked(), SAMPLING, seed=9)
    assert same(after, inside(policy).generate(asked(), SAMPLING, seed=9))
    assert not same(before, after)


@pytest.mark.parametrize("lost", ["first", "middle", "last"])
def test_a_tensor_that_is_dropped_on_the_way_is_named(running, monkeypatch, lost):
    policy, generator = running
    move(policy, 1e-6)  # by so little that no log-probability would tell
    real, names = snapshot.save_file, sorted(policy.model.state_dict())
    name = names[{"first": 0, "middle": len(names) // 2, "last": -1}[lost]]
    monkeypatch.setattr(
        snapshot, "save_file", lambda state, path: real({k: v for k, v in state.items() if k != name}, path)
    )
    with pytest.raises(ReceiptError, match=f"{name} did not arrive"):
        generator.update_weights(8)
    monkeypatch.undo()
    assert generator.update_weights(9)["sync/version"] == 9


def test_old_weights_under_a_new_version_are_named(running, monkeypatch):
    policy, generator = running
    real, old = snapshot.save_file, {k: v.clone() for k, v in policy.model.state_dict().items()}
    move(policy, 1e-6)
    monkeypatch.setattr(snapshot, "save_file", lambda state, path: real(old, path))
    with pytest.raises(ReceiptError, match="arrived with other values than the policy has"):
        generator.update_weights(10)


def test_weights_that_arrive_and_are_not_used_are_named(running, monkeypatch):
    """A server that takes the file, confirms the version and goes on with what it had."""
    policy, generator = running
    generator.update_weights(11)
    move(policy, 1e-6)
    server = generator.stations[0].server
    real = server.post_once
    monkeypatch.setattr(server, "post_once", lambda path, body=None: path == "/update_weights" or real(path, body))
    with pytest.raises(ReceiptError, match="arrived, and the server samples with other values"):
        generator.update_weights(12)


def test_canaries_see_what_checksums_can_not(running, monkeypatch):
    """Every tensor is there, and the server computes otherwise: here, the trainer's account is another model's."""
    policy, generator = running
    told = generator.publish(13)
    other = generator.publish(14)
    move(policy)
    other.canaries[:] = generator.publish(15).canaries
    with pytest.raises(ReceiptError, match=r"differ from the policy's by up to .* nats, and 0\.0001"):
        generator.load(other)
    assert generator.load(told)["sync/gap"] < 1e-4


@pytest.mark.slow
def test_a_tied_model_arrives_whole(tmp_path):
    """Embedding and output layer are one here and two on the server, so an update reaches both."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(LETTERS) + 11, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    policy = Policy(LlamaForCausalLM(config).eval(), letters())
    generator = opened(policy)
    try:
        for version in range(2):
            move(policy)
            assert generator.update_weights(version)["sync/gap"] < 1e-4
            here = inside(policy).generate(asked(), SAMPLING, seed=2, record_support=True)
            there = generator.generate(asked(), SAMPLING, seed=2, record_support=True)
            assert [s.ids for s in here] == [s.ids for s in there]
            # eleven rows pad the vocabulary: they are not sent, never sampled, and no part of the support
            assert max(i for s in there for i in s.ids) < len(LETTERS)
            assert there[0].support[0].tolist() == [~i for i in range(len(LETTERS), len(LETTERS) + 11)]
            assert torch.equal(here[0].support[0], there[0].support[0])
            # whether ids are allowed or forbidden by name: the server knows nothing of the padding
            for p in (0.3, 0.999):
                cut = replace(SAMPLING, top_p=p)
                here = inside(policy).generate(asked(), cut, seed=2, record_support=True)
                there = generator.generate(asked(), cut, seed=2, record_support=True)
                told = [[{*ids.tolist()} for s in samples for ids in s.support] for samples in (here, there)]
                assert told[0] == told[1]
                assert all(any(i < 0 for i in ids) == (p > 0.9) for ids in told[0])
    finally:
        generator.close()


@pytest.mark.slow
def test_adapters_arrive_added_in(tmp_path):
    make_policy().model.save_pretrained(tmp_path)
    letters().save_pretrained(tmp_path)
    policy = load_policy(tmp_path, lora=LoraConfig(r=2), device="cpu", dtype="float32")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    generator = opened(policy)
    try:
        assert generator.update_weights(1)["sync/gap"] < 1e-4
        there = generator.generate(asked(), SAMPLING, seed=2)
        logp = policy.logp(_tokens(there)).logp
        told = torch.nn.utils.rnn.pad_sequence([torch.tensor(s.logp) for s in there], batch_first=True)
        assert (logp - told).abs().max() < 1e-4
    finally:
        generator.close()


@pytest.fixture
def adapted(tmp_path):
    """(policy with adapters, generator whose server has the base)."""
    make_policy().model.save_pretrained(tmp_path)
    letters().save_pretrained(tmp_path)
    policy = load_policy(tmp_path, lora=LoraConfig(r=2), device="cpu", dtype="float32")
    generator = opened(policy, adapter=True)
    yield policy, generator
    generator.close()


def move_adapters(policy: Policy, by: float = 0.1) -> None:
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * by)


@pytest.mark.slow
def test_an_adapter_travels_alone_under_a_name_of_its_version(adapted, monkeypatch):
    policy, generator = adapted
    torch.manual_seed(0)
    whole = sum(x.numel() * x.element_size() for x in snapshot.weights_of(policy).values())
    for version in (1, 2):
        move_adapters(policy)
        stats = generator.update_weights(version)
        assert stats["sync/gap"] < 1e-4
        assert stats["sync/bytes"] < whole / 2
        (receipt,) = generator.receipts
        assert receipt.compared == receipt.tensors == sum(".lora_" in name for name in policy.model.state_dict())
        station = generator.stations[0]
        assert station.server.models() == ["policy", f"{station.owner}:{version}"]
        there = generator.generate(asked(), SAMPLING, n=2, seed=2)
        assert same(there, inside(policy).generate(asked(), SAMPLING, n=2, seed=2))
        assert all(s.version == [version] * len(s.ids) for s in there)
    os.kill(generator.stations[0].process.pid, signal.SIGKILL)  # the next one has the base, and gets them too
    assert same(there, generator.generate(asked(), SAMPLING, n=2, seed=2))
    real = snapshot.save_file
    lost = next(name for name in policy.adapters.state_dict() if "lora_B" in name).replace(".default", "")
    move_adapters(policy, 1e-6)  # by so little that no log-probability would tell
    monkeypatch.setattr(
        snapshot, "save_file", lambda state, path: real({k: v for k, v in state.items() if k != lost}, path)
    )
    with pytest.raises(ReceiptError, match=f"{lost} did not arrive"):
        generator.update_weights(3)
    monkeypatch.undo()
    url = generator.stations[0].server.url
    other = open_process(make_policy(), ServerSettings(ENDS, 8, urls=(url,), timeout=60.0))
    assert other.update_weights(1)["sync/gap"] < 1e-4  # a run of whole weights on a server that had adapters
    other.close()


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        (None, "the policy has no adapters"),
        (LoraConfig(r=2, dora=True), "plain LoRA of linear layers.*lora_magnitude_vector"),
        (LoraConfig(r=2, targets=["q_proj", "embed_tokens"]), "plain LoRA of linear layers.*lora_embedding"),
        (LoraConfig(r=2, train_whole=("lm_head",)), "plain LoRA of linear layers"),
    ],
)
def test_adapters_that_no_server_takes_are_refused_before_it_starts(lora, said):
    policy = make_policy()
    if lora is not None:
        policy.adapt(lora)
    with pytest.raises(SteersmanError, match=said):
        opened(policy, adapter=True)


def _tokens(samples):
    from steersman.types import Tokens

    return Tokens.from_ids([s.prompt.ids for s in samples], [s.ids for s in samples])


@pytest.mark.slow
def test_two_servers_share_the_prompts(running):
    policy, _ = running
    generator = opened(policy, servers=2)
    try:
        prompts = [*asked(), asked()[0]]
        there = generator.generate(prompts, SAMPLING, n=2, seed=5)
        here = inside(policy).generate(prompts, SAMPLING, n=2, seed=5)
        assert [s.ids for s in there] == [s.ids for s in here]
        assert len(generator.receipts) == 2
    finally:
        generator.close()


def kill_when(generator, ready) -> threading.Thread:
    """Kills the first server once `ready` says so."""

    def run():
        while not ready():
            time.sleep(0.002)
        os.kill(generator.stations[0].process.pid, signal.SIGKILL)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


@pytest.mark.slow
def test_a_server_killed_in_the_middle_of_a_batch_loses_nothing():
    """Two callers notice it, and it is started again once."""
    policy = make_policy()
    generator = opened(policy, max_batch=2)
    try:
        generator.update_weights(3)
        long = [Prompt([5 + i % 20, 6 + i % 7], "", index=i) for i in range(60)]
        sampling = Sampling(100, min_new_tokens=100)
        began = time.monotonic()
        thread = kill_when(generator, lambda: time.monotonic() - began > 0.15)
        with ThreadPoolExecutor(2) as pool:
            both = list(pool.map(lambda seed: generator.generate(long, sampling, n=2, seed=seed), (1, 2)))
        thread.join()
        assert generator.stations[0].restarts == 1
        for seed, there in zip((1, 2), both, strict=True):
            assert same(there, inside(policy, 2).generate(long, sampling, n=2, seed=seed))
            assert all(set(s.version) == {3} for s in there)
    finally:
        generator.close()


@pytest.mark.slow
def test_a_server_killed_before_and_in_a_sync_gets_the_weights():
    policy = make_policy()
    generator = opened(policy)
    try:
        generator.update_weights(0)
        os.kill(generator.stations[0].process.pid, signal.SIGKILL)
        move(policy)
        assert generator.update_weights(1)["sync/gap"] < 1e-4
        server = generator.stations[0].server
        real = server.digests

        def dies(path):
            os.kill(generator.stations[0].process.pid, signal.SIGKILL)
            time.sleep(0.05)
            return real(path)

        server.digests = dies
        assert generator.update_weights(2)["sync/version"] == 2
        assert generator.stations[0].restarts == 2
        assert same(generator.generate(asked(), SAMPLING, seed=2), inside(policy).generate(asked(), SAMPLING, seed=2))
    finally:
        generator.close()


@pytest.mark.slow
def test_a_server_killed_while_it_starts_is_started_once_more():
    policy = make_policy()
    generator = opened(policy)
    try:
        launched = generator.stations[0].process
        os.kill(launched.pid, signal.SIGKILL)
        there = generator.generate(asked(), SAMPLING, seed=2)
        assert same(there, inside(policy).generate(asked(), SAMPLING, seed=2))
        real = launched.start

        def dies():  # while it is started in the place of one that died
            real()
            launched.start = real
            os.kill(launched.pid, signal.SIGKILL)

        launched.start = dies
        os.kill(launched.pid, signal.SIGKILL)
        assert same(generator.generate(asked(), SAMPLING, seed=2), there)
        assert generator.stations[0].restarts == 3
    finally:
        generator.close()


@pytest.mark.slow
def test_what_is_cut_goes_on_under_the_new_weights():
    """Tokens of both versions in one answer, each with the log-probability of the weights that it was drawn from."""
    policy = make_policy()
    generator = opened(policy, max_batch=4)
    try:
        generator.update_weights(0)
        prompts = [Prompt([5 + i % 20, 6 + i % 7], "", index=i) for i in range(90)]
        old = {k: v.clone() for k, v in policy.model.state_dict().items()}
        out = []
        thread = threading.Thread(
            target=lambda: out.extend(generator.generate(prompts, Sampling(120, min_new_tokens=120), n=2, seed=1))
        )
        thread.start()
        time.sleep(0.1)
        move(policy)
        for version in (1, 2, 3):  # a cut may come between two answers; the later ones are of the same weights
            generator.load(generator.publish(version), cut=True)
            time.sleep(0.05)
        thread.join()
        assert {0, 3} <= {v for s in out for v in s.version} <= {0, 1, 2, 3}
        assert any(len(set(s.version)) > 1 for s in out)
        for s in out:
            assert len(s.ids) == len(s.logp) == len(s.version) == 120
            assert s.version == sorted(s.version)
        support = [[torch.arange(len(LETTERS))[torch.arange(len(LETTERS)) != 2]] * 120 for _ in out]
        tokens = _tokens(out)
        tokens.support = support
        new = policy.logp(tokens).logp
        policy.model.load_state_dict(old)
        first = policy.logp(tokens).logp
        version = torch.tensor([s.version for s in out])
        told = torch.tensor([s.logp for s in out])
        assert (torch.where(version == 0, first, new) - told).abs().max() < 1e-4
    finally:
        generator.close()


@pytest.mark.slow
def test_nothing_stays_behind():
    generator = opened(make_policy())
    folder, pid = generator._folder.path, generator.stations[0].process.pid
    assert folder.is_dir()
    generator.close()
    assert not folder.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_shared_memory_that_is_full_is_told_and_the_server_keeps_its_weights(running, monkeypatch):
    _, generator = running
    generator.update_weights(20)
    before = generator.generate(asked(), SAMPLING, seed=1)

    def full(state, path):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(snapshot, "save_file", full)
    with pytest.raises(SteersmanError, match="the disk is full"):
        generator.update_weights(21)
    assert not list(generator._folder.path.glob("weights-21*"))
    assert same(before, generator.generate(asked(), SAMPLING, seed=1))


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_an_engine_obeys_nobody_without_its_key(method, monkeypatch):
    """Neither another user of the machine nor a web page that is open on it, whatever it asks."""
    monkeypatch.delenv(ENGINE_KEY)
    policy = make_policy()
    generator = opened(policy)
    generator.update_weights(1)
    server, prompts = generator.stations[0].server, asked(2)
    key = {"authorization": f"Bearer {server.key}"}
    page = {"host": "evil.example", "origin": "http://evil.example", "content-type": "text/plain"}
    paths = list(routes(EngineRoutes(lambda: policy, 8)))
    with httpx2.Client(base_url=server.url, trust_env=False, timeout=30) as client:
        for path in paths:
            assert client.request(method, path).status_code == 401, path
            assert client.request(method, path, headers={"authorization": "Bearer guessed"}).status_code == 401, path
            assert client.request(method, path, headers=page | key).status_code == 400, path
        for path in set(paths) - set(READ):
            assert client.get(path, headers=key).status_code == 405, path
        assert client.get("/version", headers=key).json() == {"steersman": True}
    assert len(server.key) >= 32
    drawn = generator.generate(prompts, SAMPLING, n=1, seed=(3,))
    assert same(drawn, inside(policy).generate(prompts, SAMPLING, n=1, seed=(3,)))  # nothing paused it
    generator.close()


def test_an_engine_without_a_key_does_not_start(tmp_path, monkeypatch):
    monkeypatch.delenv(ENGINE_KEY, raising=False)
    words = ["--model", str(tmp_path), "--port", "0", "--threads", "1", "--max-batch", "1", "--dtype", "float32"]
    engine = Python("-m", "steersman.rollout.remote.serve", *words, "--device", "cpu")
    _, said = engine.communicate(timeout=120)
    assert engine.returncode == 2
    assert "set the environment variable STEERSMAN_ENGINE_KEY" in " ".join(said.split())


def test_a_server_at_an_address_wants_the_same_key(running, monkeypatch):
    policy, generator = running
    there = {"urls": (generator.stations[0].server.url,)}
    for key in ("", "another key"):
        monkeypatch.setenv(ENGINE_KEY, key)
        with pytest.raises(SteersmanError, match=r"status 401.*STEERSMAN_ENGINE_KEY"):
            opened(policy, **there)
    monkeypatch.setenv(ENGINE_KEY, generator.stations[0].server.key)
    opened(policy, **there).close()
