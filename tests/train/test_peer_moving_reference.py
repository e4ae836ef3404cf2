"""A moving reference beside TRL's own callbacks: `sync_ref_model`, and BEMA with `update_ref_model`.

Runs where TRL is installed (`tests/loss/test_peer_losses.py` says how) and skips elsewhere.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from letter_models import letters, save_mini

from steersman.model import Policy, frozen_copy, load_policy
from steersman.recipe.moving_reference import MovingReference
from steersman.train.moving import moving
from steersman.verbs.import_recipe import translate_settings

trl = pytest.importorskip("trl", reason="TRL is not installed here; the comparison with it is left out")
pytest.importorskip("accelerate", reason="TRL's trainers need accelerate")

UPDATES = 13


@pytest.fixture
def policy(tmp_path):
    torch.set_num_threads(1)
    return load_policy(str(save_mini(tmp_path / "m")), dtype="float64")


def both_follow(policy: Policy, section: MovingReference, callback, **asked) -> None:
    """The policy wanders, and after each of its updates their reference and ours are the same."""
    theirs = copy.deepcopy(policy.model).requires_grad_(False)
    ours = moving(section, frozen_copy(policy), policy)
    callback = callback(theirs)
    state, generator = SimpleNamespace(global_step=0, is_world_process_zero=True), torch.Generator().manual_seed(0)
    callback.on_train_begin(SimpleNamespace(**asked), state, None, model=policy.model)
    away = 0
    for step in range(1, UPDATES + 1):
        with torch.no_grad():
            for p in policy.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
        state.global_step = step
        callback.on_step_end(SimpleNamespace(**asked), state, None, model=policy.model, ref_model=theirs)
        ours.follow(step)
        for p, q, now in zip(ours.copy.parameters(), theirs.parameters(), policy.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)
            away += not torch.equal(p, now)
    assert away


@pytest.mark.parametrize(("alpha", "steps"), [(0.6, 3), (1.0, 4), (0.05, 1)])
def test_a_synced_reference(policy, alpha, steps):
    from accelerate import Accelerator
    from trl.trainer.callbacks import SyncRefModelCallback

    Accelerator(cpu=True)  # whose state theirs looks at
    asked = {"sync_ref_model": True, "ref_model_mixup_alpha": alpha, "ref_model_sync_steps": steps}
    keys, left = translate_settings(asked, "dpo")
    assert not left
    section = MovingReference(**{key.removeprefix("moving_reference."): v for key, v in keys.items() if "." in key})
    both_follow(policy, section, lambda theirs: SyncRefModelCallback(theirs, None), **asked)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"every": 3}, {"update_freq": 3}),
        (
            {"every": 2, "after": 3, "ema_power": 0.7, "bias_power": 0.4, "lag": 4, "multiplier": 0.5},
            {"update_freq": 2, "update_after": 3, "ema_power": 0.7, "bias_power": 0.4, "lag": 4, "multiplier": 0.5},
        ),
    ],
)
def test_bema(policy, monkeypatch, ours, theirs):
    """Its average and its reference are updated at once, as here they always are; theirs may be apart. With a start
    after the first updates theirs leaves the reference alone until then, too."""
    from trl.experimental.bema_for_ref_model import BEMACallback

    build = type(policy.model).__init__  # theirs makes its average in the default precision
    monkeypatch.setattr(type(policy.model), "__init__", lambda self, config: (build(self, config), self.double())[0])
    often, begun = theirs["update_freq"], theirs.get("update_after", 0)
    section = MovingReference(kind="bema", **ours)
    both_follow(policy, section, lambda _: BEMACallback(
        **theirs, update_ref_model=True, ref_model_update_freq=often, ref_model_update_after=begun,
    ))  # fmt: skip


def test_the_defaults_are_theirs(tmp_path):
    config = trl.DPOConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, report_to=[])
    section = MovingReference()
    assert (1 - section.decay, section.every) == (config.ref_model_mixup_alpha, config.ref_model_sync_steps)
    from trl.experimental.bema_for_ref_model import BEMACallback

    peer, bema = BEMACallback(), MovingReference(kind="bema")
    assert bema.every == peer.update_freq == peer.ref_model_update_freq
    for key in ("ema_power", "bias_power", "lag", "multiplier"):
        assert getattr(bema, key) == getattr(peer, key)
    assert bema.after == peer.update_after


def test_a_whole_run_of_their_trainer(policy, tmp_path):
    """Four updates of TRL's DPOTrainer with `sync_ref_model`, and of `steersman dpo` with the imported keys. AdamW's
    epsilon is above rounding, which would decide where a gradient is near 0."""
    from datasets import Dataset
    from letter_models import write_jsonl
    from ranks_kit import trained_weights

    from steersman.verbs import preference
    from steersman.verbs.preference import PreferenceRecipe

    rows = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in (
        ("the cat", " sat on it.", " no"), ("a dog", " ran.", " was so slow."), ("we", " go, you see", " up"),
    )]  # fmt: skip
    tokenizer = letters()
    tokenizer.pad_token = tokenizer.eos_token
    settings = {
        "sync_ref_model": True, "ref_model_mixup_alpha": 0.7, "ref_model_sync_steps": 2, "beta": 0.3,
        "learning_rate": 0.01, "lr_scheduler_type": "constant", "max_steps": 4, "max_grad_norm": 1e9,
        "warmup_steps": 0, "adam_epsilon": 1e-3,
    }  # fmt: skip
    trainer = trl.DPOTrainer(
        model=copy.deepcopy(policy.model), ref_model=copy.deepcopy(policy.model), processing_class=tokenizer,
        train_dataset=Dataset.from_list(rows),
        args=trl.DPOConfig(
            output_dir=str(tmp_path / "out"), report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False,
            per_device_train_batch_size=3, max_length=None, save_strategy="no", **settings,
        ),
    )  # fmt: skip
    trainer.train()
    keys, _ = translate_settings({**settings, "num_processes": 1, "per_device_train_batch_size": 3}, "dpo")
    asked = {
        "model": {"path": str(tmp_path / "m"), "dtype": "float64"}, "train": {"epochs": 9},
        "data": {"path": str(write_jsonl(tmp_path / "rows.jsonl", rows))},
        "samples": {"prompts": 0}, "run": {"dir": str(tmp_path / "run"), "threads": 1},
    }  # fmt: skip
    for key, value in sorted(keys.items(), key=lambda item: item[0].count(".")):
        *path, last = key.split(".")
        spot = asked
        for name in path:
            spot = spot.setdefault(name, {})
        spot[last] = value
    preference.run(PreferenceRecipe.model_validate(asked))
    found, before = trained_weights(tmp_path / "run"), dict(policy.model.named_parameters())
    for key, wanted in trainer.model.named_parameters():
        torch.testing.assert_close(found[f"model.model.{key}"], wanted.detach(), rtol=1e-5, atol=1e-6)
        assert not torch.equal(before[key], wanted)
