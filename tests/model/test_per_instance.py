"""No patch of transformers outlives or leaves its model: files and registries stay, other models know nothing."""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from collections.abc import Iterator
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

import pytest
import torch
from letter_models import WORDS, save_mini, write_jsonl
from tiny_models import tiny_model
from transformers import AttentionInterface, AttentionMaskInterface

from steersman import native
from steersman.cli import main
from steersman.model.fast.fused import quicken
from steersman.model.policy import Policy
from steersman.rollout import Engine, Sampling
from steersman.types import Prompt

compiled = pytest.mark.skipif(native.library() is None, reason=f"no compiled loops: {native.why_not()}")

Contents = dict[tuple[str, ...], Any]
CONTAINERS = (dict, list, set, tuple)


def files() -> list[ModuleType]:
    return [module for name, module in sorted(sys.modules.items())
            if module is not None and name.partition(".")[0] == "transformers"]  # fmt: skip


def contents() -> Contents:
    """Every name of every file of transformers, every attribute of its classes, every entry of its registries."""
    return {place: thing for module in files() for place, thing in of_module(module)}


def of_module(module: ModuleType) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, thing in list(vars(module).items()):
        yield (module.__name__, name), thing
        if isinstance(thing, type) and thing.__module__ == module.__name__:
            for attribute, value in list(vars(thing).items()):
                yield (module.__name__, name, attribute), value
                yield from entries((module.__name__, name, attribute), value)
        yield from entries((module.__name__, name), thing)


def entries(place: tuple[str, ...], thing: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    if type(thing) is dict:
        yield from (((*place, repr(key)), value) for key, value in list(thing.items()))
    elif isinstance(thing, AttentionInterface | AttentionMaskInterface):
        yield from (((*place, key), value) for key, value in thing.items())


def inside(thing: Any) -> Any:
    """What a partial or a bound function calls."""
    inner = thing.func if isinstance(thing, partial) else thing
    return inner.__func__ if isinstance(inner, MethodType | classmethod | staticmethod) else inner


def is_ours(thing: Any) -> bool:
    """A function or class of ours, an object of such a class, or what is bound to one."""
    inner = inside(thing)
    if isinstance(inner, FunctionType):
        return (inner.__module__ or "").startswith("steersman")
    kind = inner if isinstance(inner, type) else type(inner)
    return str(type.__getattribute__(kind, "__module__")).startswith("steersman")


def is_over_other_names(thing: Any) -> bool:
    """A function that reads its names elsewhere than in its file."""
    inner = inside(thing)
    file = sys.modules.get(str(inner.__globals__.get("__name__"))) if isinstance(inner, FunctionType) else None
    return file is not None and inner.__globals__ is not vars(file)


def changed(before: Contents, after: Contents) -> list[tuple[str, ...]]:
    """Places where a function or class is another one than before, and all where something of ours is."""
    moved = [
        place for place, thing in before.items()
        if place in after and after[place] is not thing and isinstance(thing, FunctionType | type | classmethod)
    ]  # fmt: skip
    # transformers makes stand-ins of old files while it runs, whose __getattr__ and __dir__ read names elsewhere
    ours = [
        place for place, thing in after.items()
        if is_ours(thing) or (is_over_other_names(thing) and before.get(place) is not thing
                              and place[-1] not in ("__getattr__", "__dir__"))
    ]  # fmt: skip
    return moved + ours


@compiled
def test_the_walk_sees_what_it_should(monkeypatch):
    from transformers.models.llama import modeling_llama as file

    before = contents()
    assert changed(before, contents()) == []
    rotation, attention = file.apply_rotary_pos_emb, quicken(tiny_model("llama"))[1].forward
    for where, name, thing in (
        (file, "apply_rotary_pos_emb", lambda *args: rotation(*args)),
        (file.LlamaAttention, "forward", attention),
        (file.LlamaMLP, "forward", Policy.logp),
        (file, "repeat_kv", FunctionType(file.repeat_kv.__code__, {**vars(file)})),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, thing)
            assert (file.__name__, *([where.__name__] if where is not file else []), name) in changed(
                before, contents()
            )
    with monkeypatch.context() as patch:
        patch.setitem(AttentionInterface._global_mapping, "mine", Policy.logp)
        assert ("transformers.modeling_utils", "ALL_ATTENTION_FUNCTIONS", "mine") in changed(before, contents())


@pytest.mark.parametrize("verb", ["sft", "grpo"])
def test_after_a_run_no_function_of_transformers_is_ours(verb, tmp_path, capsys):
    from transformers.models.llama import modeling_llama  # noqa: F401  (in the walk before the run)

    mini = save_mini(tmp_path / "mini")
    before, masks = contents(), dict(AttentionMaskInterface._global_mapping)
    attentions = dict(AttentionInterface._global_mapping)
    if verb == "sft":
        data = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": word, "completion": " a cat"} for word in WORDS])
        more = ["--train.epochs", "1"]
    else:  # responses long enough for compiled steps
        data = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": word} for word in WORDS])
        more = ["--iterations", "1", "--rollout.prompts", "4", "--rollout.max_new_tokens", "40"]
        more += ["--reward.parts", "{short: {builtin: length}}"]
    common = ["--model.path", str(mini), "--run.dir", str(tmp_path / "run"), "--data.path", str(data)]
    assert main([verb, *common, *more]) == 0, capsys.readouterr()
    assert changed(before, contents()) == []
    assert attentions == AttentionInterface._global_mapping
    assert masks == AttentionMaskInterface._global_mapping


@compiled
def test_another_model_of_the_family_is_plain_transformers_bit_for_bit():
    ids = torch.arange(20).view(2, 10)
    expected = logits_and_gradients(tiny_model("qwen3"), ids)
    ours = Policy(tiny_model("qwen3"), None)
    Engine(ours.model).generate([Prompt([3, 4], "")], Sampling(4))
    other = tiny_model("qwen3")
    found = logits_and_gradients(other, ids)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not torch.equal(logits_and_gradients(ours.model, ids)[0], expected[0])
    assert not [module for module in other.modules() if "forward" in vars(module)]


@compiled
def test_an_engine_leaves_its_model_as_it_was():
    model, ids = tiny_model("llama"), torch.arange(20).view(2, 10)
    expected, settings = logits_and_gradients(model, ids), model.config.to_dict()
    engine = Engine(model)
    engine.generate([Prompt([3, 4], "")], Sampling(40))
    with pytest.raises(ZeroDivisionError):
        engine.generate([Prompt([3, 4], "")], Sampling(4), progress=lambda *_: 1 / 0)
    assert all(torch.equal(a, b) for a, b in zip(logits_and_gradients(model, ids), expected, strict=True))
    assert model.config.to_dict() == settings
    assert not [module for module in model.modules() if "forward" in vars(module)]


@compiled
def test_deleting_ours_leaves_nothing():
    before = contents()
    policy = Policy(tiny_model("llama"), None)
    left = weakref.ref(policy.model), weakref.ref(policy.model.model.layers[0].self_attn)
    del policy
    gc.collect()
    assert [ref() for ref in left] == [None, None]
    assert changed(before, contents()) == []


@compiled
def test_a_quick_and_a_plain_model_side_by_side_in_two_threads():
    """Each computes what it computes alone, while the other runs and while models are made quick and plain again."""
    ids = torch.arange(40).view(2, 20)
    plain, quick = tiny_model("llama"), tiny_model("llama")
    quicken(quick)
    alone = {id(model): logits_and_gradients(model, ids) for model in (plain, quick)}
    wrong: list[str] = []

    def repeat(model: Any) -> None:
        for _ in range(15):
            found = logits_and_gradients(model, ids)
            if not all(torch.equal(a, b) for a, b in zip(found, alone[id(model)], strict=True)):
                wrong.append("another result")

    threads = [threading.Thread(target=repeat, args=(model,)) for model in (plain, quick)]
    for thread in threads:
        thread.start()
    engine = Engine(tiny_model("llama"))
    while any(thread.is_alive() for thread in threads):
        engine.generate([Prompt([3, 4], "")], Sampling(3))
    assert not wrong


def logits_and_gradients(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    logits = model(input_ids=ids, use_cache=False).logits
    logits.square().mean().backward()
    return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
