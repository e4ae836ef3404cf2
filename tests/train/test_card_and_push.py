"""A run leaves a model card that tells what happened; push shows what would go, and sends nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from letter_models import save_mini, write_jsonl

from steersman import cli
from steersman.distributed.join import free_port
from steersman.run.report.card import write_card


@pytest.fixture
def run_folder(tmp_path) -> Path:
    base = save_mini(tmp_path / "base")
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\nA model.\n")
    data = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": f"hm{'?' * i}", "completion": "a cat"} for i in range(8)])
    told = ["--model.path", str(base), "--data.path", str(data), "--data.held_out", "2", "--train.batch_size", "2"]
    assert cli.main(["sft", *told, "--run.dir", str(tmp_path / "run"), "--run.threads", "1"]) == 0
    return tmp_path / "run"


def test_the_card_tells_base_licence_data_course_and_settings(run_folder):
    text = (run_folder / "model" / "README.md").read_text()
    assert yaml.safe_load(text.split("---")[1]) == {
        "library_name": "transformers", "tags": ["steersman", "sft"], "license": "apache-2.0",
    }  # fmt: skip
    assert "`steersman sft` on" in text
    assert "`rows.jsonl`" in text
    assert "| held_out/loss |" in text
    assert "batch_size: 2" in text


def test_what_others_wrote_can_not_break_out_of_the_card(run_folder):
    (run_folder / "health.jsonl").write_text(
        json.dumps({"step": 1, "code": "x", "severity": "note", "text": "<script>a</script> `b` | \x1b[31m"}) + "\n"
    )
    text = write_card(run_folder).read_text()
    assert "<script>" not in text
    assert "\x1b" not in text
    assert "`b`" not in text


def test_a_card_names_no_folder_and_no_password_of_the_machine(run_folder, tmp_path):
    """Whatever a config.yaml of an older steersman holds."""
    config = run_folder / "config.yaml"
    assert str(tmp_path) in config.read_text()
    more = {"judge": {"endpoint": {"url": "http://ada:s3cr3t@judge.example/v1", "cache": f"{tmp_path}/a b.jsonl"}}}
    config.write_text(config.read_text() + yaml.safe_dump(more))
    text = write_card(run_folder).read_text()
    assert "s3cr3t" not in text
    assert str(tmp_path) not in text
    settings = yaml.safe_load(text.split("```yaml")[1].split("```")[0])
    assert settings["model"]["path"] == "base"
    assert settings["data"]["path"] == "rows.jsonl"
    assert settings["judge"]["endpoint"] == {"url": "http://[...]@judge.example/v1", "cache": "a b.jsonl"}
    assert "`steersman sft` on `base`" in text


@pytest.mark.parametrize("name", ["MODEL.BIN", "x.pth.tar", "last.ckpt", "head.joblib", "table.npy"])
def test_a_file_that_could_run_code_is_known_however_it_is_called(run_folder, name, capsys):
    (run_folder / "model" / name).write_bytes(b"1")
    assert cli.main(["push", str(run_folder), "--name", "me/polite", "--dry_run", "true"]) == 2
    assert f"could run code, or links: {name}" in capsys.readouterr().err


def test_a_dry_run_shows_the_files_and_sends_nothing(run_folder, capsys):
    assert cli.main(["push", str(run_folder), "--name", "me/polite", "--dry_run", "true"]) == 0
    told = capsys.readouterr().out
    for name in ("README.md", "config.json", "model.safetensors", "tokenizer.json"):
        assert name in told
    assert "nothing was pushed to me/polite" in told


def test_a_card_written_by_hand_stays_and_one_that_is_missing_is_written(run_folder):
    card, push = run_folder / "model" / "README.md", ["push", str(run_folder), "--name", "me/x", "--dry_run", "true"]
    card.write_text("My own card.\n")
    assert cli.main(push) == 0
    assert card.read_text() == "My own card.\n"
    card.unlink()
    assert cli.main(push) == 0
    assert "`steersman sft` on" in card.read_text()


def adapters_on(folder: Path, base: str) -> None:
    told = {"base_model_name_or_path": base, "peft_type": "LORA", "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(told))


def test_a_model_folder_is_pushed_as_it_is(run_folder, tmp_path, capsys):
    out = tmp_path / "exported"
    assert cli.main(["export", str(run_folder / "model"), "--out", str(out)]) == 0
    assert cli.main(["push", str(out), "--name", "me/polite", "--dry_run", "true"]) == 0
    assert "model.safetensors" in capsys.readouterr().out
    assert not (out / "README.md").exists()
    adapters_on(out, "org/base")  # a hub's name anybody can load
    assert cli.main(["push", str(out), "--name", "me/polite", "--dry_run", "true"]) == 0


def test_a_hub_that_is_not_reached_is_told_as_that(run_folder, monkeypatch, capsys):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free_port()}")
    assert cli.main(["push", str(run_folder), "--name", "me/polite"]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "the hub did not take me/polite" in told
    assert "see that there is a network" in told
    assert "hf auth login" not in told


@pytest.mark.parametrize(
    ("prepare", "name", "said"),
    [
        (lambda run: None, "me/po lite", "is no name of a repository"),
        (lambda run: (run / "model" / "x.pkl").write_bytes(b"1"), "me/polite", "could run code"),
        (lambda run: (run / "model" / "config.json").unlink(), "me/polite", "was stopped before it left a model"),
        (lambda run: [(run / "model" / "config.json").unlink(), shutil.rmtree(run / "checkpoints")], "me/polite",
         "is no run folder with a model"),
        (lambda run: adapters_on(run / "model", "/home/me/base"), "me/polite", "a folder of this machine"),
        (lambda run: [p.unlink() for p in (run / "config.yaml", run / "model" / "README.md")], "me/polite",
         "has no config.yaml to tell of in a model card"),
        (lambda run: None, "me/polite", "the hub did not take me/polite"),  # offline here
    ],
)  # fmt: skip
def test_what_can_not_be_pushed_is_refused(prepare, name, said, run_folder, capsys):
    prepare(run_folder)
    assert cli.main(["push", str(run_folder), "--name", name]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
