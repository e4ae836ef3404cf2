"""A rate for whole models under adapters is told before the run."""

from __future__ import annotations

import pytest
from letter_models import write_jsonl

from steersman import cli
from steersman.train.models import slow_rate
from steersman.train.sections import LoraSection, ModelConfig


@pytest.mark.parametrize(("lora", "lr", "told"), [(True, 1e-5, True), (True, 2e-4, False), (False, 1e-5, False)])
def test_it_is_told_for_adapters_alone(lora, lr, told):
    config = ModelConfig(path="m", lora=LoraSection() if lora else None)
    assert (slow_rate(config, lr) is not None) == told


def test_preflight_shows_it(tmp_path, mini, capsys):
    data = write_jsonl(
        tmp_path / "rows.jsonl", [{"prompt": f"a{'?' * i}", "chosen": "b", "rejected": "c"} for i in range(4)]
    )
    words = ["--data.path", str(data), "--run.dir", str(tmp_path / "run"), "--train.batch_size", "2"]
    assert cli.main(["dpo", "--model.path", str(mini), "--model.lora", "{r: 2}", *words]) == 0
    assert "1e-05 is a rate for whole models" in " ".join(capsys.readouterr().out.split())
