"""What is not text is refused by its name, with what is missing."""

from __future__ import annotations

import pytest
from letter_models import write_jsonl

from steersman.data import DataConfig, demonstrations
from steersman.model import load_policy
from steersman.types import SteersmanError


def test_an_image_in_a_message_is_a_bad_row_that_names_it(tmp_path):
    shown = [{"type": "image", "url": "a.png"}, {"type": "text", "text": "what is it?"}]
    rows = [
        {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "a cat"}]}
        for content in (shown, "hm")
    ]
    config = DataConfig(path=str(write_jsonl(tmp_path / "rows.jsonl", rows)))
    with pytest.raises(SteersmanError, match=r"line 1, field 'messages'.* \(image\); images and sound are not read"):
        demonstrations(config)
    assert len(demonstrations(config.model_copy(update={"on_bad_row": "skip"})).train) == 1


def test_a_vision_language_model_is_refused_before_its_weights_are_read(tmp_path):
    from transformers import Qwen2VLConfig

    Qwen2VLConfig().save_pretrained(tmp_path)  # and no weights at all
    with pytest.raises(SteersmanError, match="'qwen2_vl' reads images beside text"):
        load_policy(tmp_path, device="cpu")
