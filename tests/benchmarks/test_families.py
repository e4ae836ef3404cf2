"""The page of model families: each is made from its own config class and tried, or the page says why not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

from families import families, make, one, page, shrink, tries  # type: ignore


def test_the_registry_is_transformers_own_and_sizes_become_small():
    from transformers import Qwen2MoeConfig

    known = families()
    assert known["llama"] == known["falcon_h1"] == "causal"
    assert known["t5"] == "encoder-decoder"
    config = Qwen2MoeConfig()
    shrink(config, 35)
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers, config.num_experts) == (35, 32, 2, 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("gemma4_text", "works"),
        ("qwen2_moe", "works"),
        ("mixtral", "works"),
        ("t5", "works"),
        ("falcon_h1", "works"),
        ("inkling2_text", "refused"),
    ],
)
def test_a_family_works_or_is_refused_by_name(kind, status):
    found = one(kind, families()[kind])
    assert found["status"] == status, found
    assert (kind in found["why"]) == (status == "refused")


def test_the_round_of_adapters_saves_merges_and_reads_them_back(tmp_path, monkeypatch):
    from steersman import model

    assert not make("mixtral", "causal", tmp_path / "model")
    tries(tmp_path / "model", tmp_path, [])["lora"]()
    assert (tmp_path / "adapters" / "adapter_model.safetensors").exists()
    assert (tmp_path / "merged" / "model.safetensors").exists()
    monkeypatch.setattr(model, "save", lambda *_, **__: tmp_path / "model")  # a save that loses the adapters
    with pytest.raises(AssertionError, match="adapters that were saved and read back give"):
        tries(tmp_path / "model", tmp_path, [])["lora"]()


def test_the_page_has_a_row_for_each_and_no_markup_of_others():
    found = {
        "a": {"status": "works", "why": "", "style": "causal"},
        "b": {"status": "failed", "why": "<b> | x", "at": "ratio", "style": "causal"},
    }
    text = page(found, "5.0")
    assert "| a | causal | works |  |" in text
    assert "| b | causal | failed | &lt;b> / x (at ratio) |" in text
    assert "1 work, 0 are refused by name, 1 fail" in text
    assert "adapters saved, merged and read back" in text
