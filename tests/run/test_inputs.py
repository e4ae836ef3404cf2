"""What a run reads is known by content; what the run itself writes there is not part of it."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest

from steersman.config.sections import Section
from steersman.run.files.folder import RunFolder
from steersman.run.files.inputs import BLOCK, WHOLE, fingerprints
from steersman.run.run_config import RunConfig
from steersman.types import SteersmanError


class Asked(Section):
    path: str
    folder: str = ""
    cache: str = ""


class Logged(Section):
    run: RunConfig


def test_the_runs_own_folder_within_the_data_does_not_count(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}")
    run = tmp_path / "runs" / "one"
    run.mkdir(parents=True)
    asked = Asked(path=str(tmp_path), folder=str(tmp_path), cache=str(tmp_path))
    before = fingerprints(asked, run)
    (run / "metrics.jsonl").write_text("{}")
    assert fingerprints(asked, run) == before
    assert list(before) == ["path"]
    (tmp_path / "rows.jsonl").write_text("{ }")
    assert fingerprints(asked, run) != before


def test_a_folder_named_like_a_tracker_is_no_input(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "numbers.db").write_text("1")
    assert fingerprints(Logged(run=RunConfig(sinks=["wandb"])), tmp_path / "runs" / "one") == {}


def test_hidden_files_do_not_count(tmp_path):
    """They are no data: an editor's copies, and what another process has not written to its end."""
    (tmp_path / "rows.jsonl").write_text("{}")
    before = fingerprints(Asked(path=str(tmp_path)), tmp_path / "run")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / ".ipynb_checkpoints" / "rows-checkpoint.jsonl").write_text("{}")
    (tmp_path / ".tmp-rows.jsonl").write_text("{")
    assert fingerprints(Asked(path=str(tmp_path)), tmp_path / "run") == before


def test_adapters_count_with_the_model_that_they_are_on(tmp_path):
    base, adapters = tmp_path / "base", tmp_path / "adapters"
    base.mkdir()
    adapters.mkdir()
    (base / "config.json").write_text("{}")
    file = adapters / "adapter_config.json"
    file.write_text(json.dumps({"base_model_name_or_path": str(base)}))
    before = fingerprints(Asked(path=str(adapters)), tmp_path / "run")
    (base / "tokenizer_config.json").write_text('{"bos_token": "a"}')
    assert fingerprints(Asked(path=str(adapters)), tmp_path / "run") != before
    for odd in ("[]", "{", "{}", '{"base_model_name_or_path": null}'):  # what can not be loaded is refused elsewhere
        file.write_text(odd)
        assert fingerprints(Asked(path=str(adapters)), tmp_path / "run")


def test_of_a_large_file_its_ends_and_its_size_count(tmp_path):
    file = tmp_path / "weights.bin"
    with file.open("wb") as out:
        out.truncate(WHOLE + 7 * BLOCK)
    seen = [fingerprints(Asked(path=str(file)), tmp_path / "run")]
    for at in (0, WHOLE + 7 * BLOCK - 1):
        with file.open("r+b") as out:
            out.seek(at)
            out.write(b"x")
        seen.append(fingerprints(Asked(path=str(file)), tmp_path / "run"))
    with file.open("r+b") as out:
        out.truncate(WHOLE + 8 * BLOCK)
    seen.append(fingerprints(Asked(path=str(file)), tmp_path / "run"))
    assert all(a != b for a, b in pairwise(seen))


def test_a_run_of_another_verb_is_not_resumed(tmp_path):
    class Other(Asked):
        """What another verb asks for, with the same keys."""

    run = tmp_path / "run"
    with RunFolder(run, Asked(path="")) as folder:
        kept = (folder / "config.yaml").read_text()
    with pytest.raises(
        SteersmanError, match=r"folder .*run: the run in it was begun by another verb.*by its own verb"
    ):
        RunFolder(run, Other(path="x"), resume=True)
    assert (run / "config.yaml").read_text() == kept
    with RunFolder(run, Asked(path="x"), resume=True) as folder:
        assert folder.changes
