"""A whole PPO run with every fast path has the learning curve of the same run without any.

The plain run samples token by token with an uncached forward of one row, reads rows one by one and unpadded, takes a
whole log-softmax over the vocabulary, and has neither compiled loops nor micro-batches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from letter_models import rows_of, save_mini, write_jsonl
from torch import Tensor
from train_kit import plain, recipe, save_tiny, weights

from steersman import native
from steersman.model import policy as policy_module
from steersman.model import reader as reader_module
from steersman.model.reader import CausalReader
from steersman.native import sequences, step
from steersman.rollout import Engine
from steersman.rollout.fast import packed
from steersman.rollout.sampling import uniforms
from steersman.train.policy_update import Learner, Values
from steersman.train.roles import build_roles
from steersman.types import Sample, Tokens
from steersman.verbs import rl

OPENINGS = [
    "the cat sat down and saw a dog, no?",
    "once there was a bird who said so, and it",
    "a fox",
    "look at the sun, said she, it is red and",
    "we go far and up the hill to see a big",
    "hm, you and me",
]
CLOSE = {"float32": 1e-4, "float64": 1e-9}


@pytest.mark.parametrize(
    ("family", "dtype", "cut"), [("llama", "float32", 2), ("gpt2", "float64", 2), ("gpt2", "float64", 1)]
)
def test_the_curves_are_the_same(family, dtype, cut, tmp_path, base, monkeypatch, compiled_again):
    if dtype == "float64":
        monkeypatch.setattr(rl, "build_roles", in_double)
        torch.set_default_dtype(torch.float64)
    folder = tmp_path / "model"
    # with some models the rounding of gradients near zero grows, presumably in Adam, beyond what is asked here
    model = save_mini(folder, seed=5, head_dim=16) if family == "llama" else save_tiny(folder, family, scale=2.0)
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": text} for text in OPENINGS])
    shared = count_calls(monkeypatch, (reader_module, "read_shared"), (reader_module, "read_shared_apart"))
    monkeypatch.setattr(packed, "STEPS", 1)
    compiled = count_calls(monkeypatch, (step, "decode_step"), (sequences, "attend"))
    fast = run(tmp_path / "fast", base, model, cut, micro_tokens=300)
    apart = family == "llama" and native.library() is not None
    assert shared["read_shared_apart" if apart else "read_shared"] > 0
    if family == "llama" and native.library() is not None:
        assert min(compiled[name] for name in ("decode_step", "attend")) > 0
    calls = without_fast_paths(monkeypatch)
    look_again()
    slow = run(tmp_path / "slow", base, model, cut, micro_tokens=1_000_000)
    assert native.library() is None
    assert min(calls[name] for name in ("hidden", "logp", "generate")) > 0
    compare(fast, slow, CLOSE[dtype])
    before, after = weights(model), weights(tmp_path / "fast" / "model")
    assert max(float((after[name] - x).abs().max()) for name, x in before.items()) > 0.005


def count_calls(patch: pytest.MonkeyPatch, *places: tuple[Any, str]) -> Counter[str]:
    """How often each function, given by its module and name, was called."""
    calls: Counter[str] = Counter()

    def counted(name: str, inner: Any) -> Any:
        return lambda *args, **named: (calls.update([name]), inner(*args, **named))[1]

    for room, name in places:
        patch.setattr(room, name, counted(name, getattr(room, name)))
    return calls


def look_again() -> None:
    """The compiled loops are looked for anew."""
    native.library.cache_clear()
    native._load.cache_clear()


@pytest.fixture
def compiled_again(monkeypatch) -> Iterator[None]:
    yield
    monkeypatch.undo()
    torch.set_default_dtype(torch.float32)
    look_again()


def in_double(chosen: Any, device: torch.device) -> Any:
    """All models in float64, in which there are no compiled loops, and rounding is far below what is compared."""
    roles: Any = build_roles(chosen, device)
    for model in (roles.policy, roles.reference, roles.learner.critic):
        model.double()
    return roles


def run(folder: Path, base: dict[str, Any], model: Path, cut: int, micro_tokens: int) -> list[dict[str, Any]]:
    """The metrics of 3 iterations: 4 prompts x 4 samples of up to 12 tokens, `cut` epochs of `cut` minibatches."""
    chosen = recipe(
        "ppo", base, model__path=str(model), rollout__samples=4, rollout__max_new_tokens=12,
        rollout__temperature=0.8, rollout__eos_token_id=[2, 11], rollout__max_batch=7, algorithm__entropy_coef=0.01,
        algorithm__epochs=cut, algorithm__minibatches=cut, critic__init="policy", iterations=3, run__dir=str(folder),
        run__eval_every=1, run__micro_tokens=micro_tokens,
    )  # fmt: skip
    rl.run(chosen)
    return [plain(row) for row in rows_of(folder / "metrics.jsonl")]


def compare(fast: list[dict[str, Any]], slow: list[dict[str, Any]], close: float) -> None:
    """Every number of every row; `ratio_gap` is itself the size of the rounding."""
    assert len(fast) == len(slow) == 4
    assert any(abs(row["held_out/kl"]) > 0.01 for row in fast)
    for a, b in zip(fast, slow, strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - {"ratio_gap"}:
            assert a[key] == pytest.approx(b[key], rel=close, abs=close), f"{key} at step {a.get('step')}"
        assert a.get("ratio_gap", 0.0) < 1e-5


def without_fast_paths(patch: pytest.MonkeyPatch) -> Counter[str]:
    """Plain code in the place of everything that was made to be fast; returns how often it was called."""
    calls: Counter[str] = Counter()
    patch.setenv("STEERSMAN_NATIVE", "0")

    def states(self: CausalReader, tokens: Tokens) -> Iterator[tuple[Tensor, int, int]]:
        calls["hidden"] += 1
        for b in range(len(tokens)):
            first, length = int(tokens.prompt_length[b]), int(tokens.response_length[b])
            ids = torch.cat([tokens.prompt[b, :first], tokens.response[b, :length]])[None]
            yield self.trunk(input_ids=ids, use_cache=False).last_hidden_state[0], first - 1, length

    def hidden(self: CausalReader, tokens: Tokens, extra: int = 0) -> Tensor:
        return torch.cat([x[first : first + length + extra] for x, first, length in states(self, tokens)])

    def ends(self: CausalReader, tokens: Tokens) -> tuple[Tensor, Tensor]:
        rows = [(x[first], x[first + length]) for x, first, length in states(self, tokens)]
        return torch.stack([before for before, _ in rows]), torch.stack([after for _, after in rows])

    def linear_logp(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, **form: Any
    ) -> tuple[Tensor, Tensor | None]:
        calls["logp"] += 1
        assert (bias, form["softcap"], form["logit_scale"], form["support"]) == (None, None, 1.0, None)
        logp = (hidden @ weight.T / form["temperature"]).log_softmax(-1)
        entropy = -(logp.exp() * logp).sum(-1) if form["entropy"] else None
        return logp.gather(1, target[:, None])[:, 0], entropy

    @torch.no_grad()
    def generate(self: Engine, prompts: Any, sampling: Any, *, n: int = 1, seed: Any = 0, **other: Any) -> Any:
        calls["generate"] += 1
        samples = []
        for prompt in prompts:
            for index in range(n):
                ids, logp = [], []
                for u in uniforms(seed, prompt.index, 0, index, sampling.max_new_tokens):
                    row = self.model(torch.tensor([prompt.ids + ids])).logits[0, -1].double() / sampling.temperature
                    p = row.softmax(-1)
                    ids.append(int((p.cumsum(-1) <= float(u)).sum()))
                    logp.append(float(p[ids[-1]].log()))
                    if ids[-1] in self.end_ids:
                        break
                ended = ids[-1] in self.end_ids
                text = self.tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=True)
                samples.append(Sample(prompt, ids, logp, "eos" if ended else "length", text, index))
        return samples

    @torch.no_grad()
    def value(self: Learner, tokens: Tokens, *rest: Any, **named: Any) -> Values:
        assert self.critic is not None
        return Values(self.critic.value(tokens))

    patch.setattr(Learner, "value", value)
    patch.setattr(CausalReader, "hidden", hidden)
    patch.setattr(CausalReader, "ends", ends)
    patch.setattr(policy_module, "linear_logp", linear_logp)
    patch.setattr(Engine, "generate", generate)
    return calls
