"""Checkpoints in pieces: every rank writes its own share, and any layout goes on from it."""

from __future__ import annotations

import json
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Python
from letter_models import write_jsonl
from ranks_kit import launch, trained_weights
from train_kit import merge, save_tiny
from transformers import AutoModelForCausalLM

from steersman.distributed.ranks import Ranks, as_one_of
from steersman.distributed.stored import StoredTensor
from steersman.distributed.waiting import NoStore
from steersman.run.files import checkpoint
from steersman.run.files.checkpoint import Checkpointer
from steersman.train.session import Session
from steersman.types import SteersmanError
from steersman.verb_table import VERBS

WORDS = ["yes it is.", "no", "a cat, a dog", "ok", "look there", "e", "so she said", "hm", "what?"]
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "alone": (1, {}),
    "replicas": (2, {}),
    "shards": (2, {"mode": "fsdp"}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("stored")


@pytest.fixture(scope="module")
def model(folder) -> Path:
    return save_tiny(folder / "model")


def case(folder: Path, model: Path, run: str, layout: str, steps: int, **extra: Any) -> dict[str, Any]:
    rows = [{"prompt": "ask" + "?" * (i % 4), "chosen": WORDS[i % 9], "rejected": WORDS[i % 5] + " a"}
            for i in range(18)]  # fmt: skip
    world, parallel = LAYOUTS[layout]
    recipe = {
        "model": {"path": str(model), "dtype": "float64"},
        "data": {"path": str(write_jsonl(folder / "pairs.jsonl", rows)), "held_out": 3},
        "train": {"batch_size": 4, "epochs": 9, "max_steps": steps},
        "optimizer": {"lr": 3e-3},
        "run": {"dir": str(folder / run), "threads": 1, "eval_every": 4, "save_every": 2, "devices": world},
        "parallel": parallel,
    }
    return {"verb": "dpo", "recipe": merge(recipe, extra)}


@pytest.fixture(scope="module")
def sharded(folder, model) -> Path:
    """Runs on two ranks whose weights lie in pieces; one is saved beside the loop, one has tied embeddings."""
    beside = {"run.save_async": True, "run.save_every": 1, "model.max_shard_size": "20KB"}
    tied = save_tiny(folder / "gpt2", "gpt2")
    cases = [
        case(folder, model, "to-alone", "shards", 4),
        case(folder, model, "to-replicas", "shards", 4),
        case(folder, model, "beside", "shards", 6, **beside),
        case(folder, tied, "tied", "shards", 2),
    ]
    launch(folder / "sharded.json", cases, 2)
    return folder


@pytest.fixture(scope="module")
def alone(folder, model) -> Path:
    launch(folder / "alone.json", [case(folder, model, "alone", "alone", 6),
                                   case(folder, model, "to-shards", "alone", 4)], 1)  # fmt: skip
    return folder / "alone"


def assert_same(run: Path, wanted: Path) -> None:
    found, expected = trained_weights(run), trained_weights(wanted)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-9)


@pytest.mark.slow
def test_each_rank_writes_its_own_share_and_no_file_of_code(sharded):
    newest = max((sharded / "to-alone" / "checkpoints").glob("step-*"))
    told = json.loads((newest / "manifest.json").read_text())["files"]
    pieces = {name: file["bytes"] for name, file in told.items() if name.startswith("pieces/")}
    assert sorted(name.split("/shard-")[1][:5] for name in pieces) == ["00001", "00002"]
    assert all(name.endswith(".safetensors") for name in pieces)
    assert max(pieces.values()) < 0.6 * sum(pieces.values())
    state = torch.load(newest / "state.pt", weights_only=True)["state"]
    assert not any(isinstance(x, torch.Tensor) for x in state["model"].values())
    moments = [x for one in state["optimizer"]["adamw"]["state"].values() for x in one.values()]
    assert sum(x.numel() for x in moments if isinstance(x, torch.Tensor)) == len(moments) / 3  # the counts of steps


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["alone", "replicas"])
def test_a_run_in_pieces_goes_on_on_another_layout(layout, sharded, folder, model, alone):
    again = case(folder, model, f"to-{layout}", layout, 6) | {"resume": True}
    launch(folder / f"again-{layout}.json", [again], LAYOUTS[layout][0])
    assert_same(folder / f"to-{layout}", alone)


@pytest.mark.slow
def test_a_run_of_one_process_goes_on_in_pieces(folder, model, alone):
    launch(folder / "again.json", [case(folder, model, "to-shards", "shards", 6) | {"resume": True}], 2)
    assert_same(folder / "to-shards", alone)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["replicas", "shards"])
def test_dropout_on_two_ranks_goes_on_as_if_nothing_had_happened(layout, folder, model):
    lora = {"model.lora": {"r": 4, "dropout": 0.3}, "run.micro_tokens": 40}
    whole, cut = (case(folder, model, f"dropout-{layout}-{steps}", layout, steps, **lora) for steps in (6, 4))
    launch(folder / f"dropout-{layout}.json", [whole, cut], 2)
    launch(folder / f"dropout-{layout}-again.json", [merge(cut, {"recipe.train.max_steps": 6, "resume": True})], 2)
    found, expected = (trained_weights(folder / f"dropout-{layout}-{steps}") for steps in (4, 6))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_ranks_share_no_dropout_mask(folder, model):
    recipe = VERBS["dpo"].recipe_class(None, []).model_validate(case(folder, model, "masks", "alone", 2)["recipe"])

    def masks(rank: int) -> list[torch.Tensor]:
        session = Session("dpo", recipe, resume=False, metric="loss")
        session.total = 1
        with as_one_of(Ranks(rank, 2, store=NoStore())):
            next(session.steps())
        return [torch.nn.functional.dropout(torch.ones(64), 0.5) for _ in range(2)]

    first, second = masks(0), masks(1)
    assert not torch.equal(first[0], second[0])
    assert all(map(torch.equal, masks(0), first))


@pytest.mark.slow
def test_saved_beside_the_loop_it_is_the_same(sharded, alone):
    assert_same(sharded / "beside", alone)
    steps = sorted(path.name for path in (sharded / "beside" / "checkpoints").iterdir())
    assert steps[-1] == "step-00000006"
    assert not any(name.startswith(".tmp") for name in steps)


@pytest.mark.slow
def test_the_model_of_sharded_runs_is_exported_file_by_file(sharded):
    folder = sharded / "beside" / "model"
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    for name, value in trained_weights(sharded / "beside").items():
        torch.testing.assert_close(plain.state_dict()[name.removeprefix("model.model.")], value, rtol=0, atol=1e-6)
    tied = AutoModelForCausalLM.from_pretrained(sharded / "tied" / "model", dtype=torch.float64)
    assert tied.lm_head.weight is tied.transformer.wte.weight
    for name, value in trained_weights(sharded / "tied").items():
        found = tied.state_dict()[name.removeprefix("model.model.")]
        torch.testing.assert_close(found, value, rtol=0, atol=1e-6)  # stored in the start's float32


@pytest.mark.slow
def test_a_damaged_piece_is_a_damaged_checkpoint(sharded):
    newest = max((sharded / "beside" / "checkpoints").glob("step-*"))
    piece = next((newest / "pieces").iterdir())
    raw = bytearray(piece.read_bytes())
    raw[-5] ^= 1
    piece.write_bytes(raw)
    keeper = Checkpointer(sharded / "beside")
    found = keeper.load()
    assert found is not None
    assert found.step < 6
    assert "SHA-256" in keeper.damaged[0]


@pytest.mark.slow
def test_a_tensor_of_another_shape_is_refused_by_name(sharded):
    found = Checkpointer(sharded / "beside").load()
    assert found is not None
    stored = next(x for x in found.state["state"]["model"].values() if isinstance(x, StoredTensor))
    with pytest.raises(SteersmanError, match=r"model\..*can not be read"):
        stored.read(torch.empty(3, 3))


def test_the_loop_goes_on_while_a_checkpoint_is_written_and_can_not_change_it(tmp_path, monkeypatch):
    keeper, may_write, weight = Checkpointer(tmp_path), threading.Event(), torch.ones(4)
    plain = torch.save
    monkeypatch.setattr(checkpoint.torch, "save", lambda state, file: (may_write.wait(20), plain(state, file)))
    path = keeper.save(1, {"w": weight}, wait=False)
    weight.fill_(7.0)  # the next step
    assert not path.exists()
    may_write.set()
    keeper.wait()
    found = keeper.load()
    assert found is not None
    assert found.state["w"].tolist() == [1.0] * 4


def test_what_fails_beside_the_loop_is_told_at_its_next_step(tmp_path, monkeypatch):
    def full(state, file):
        raise OSError(28, "No space left on device")

    keeper = Checkpointer(tmp_path)
    keeper.save(1, {"w": torch.ones(4)})
    monkeypatch.setattr(checkpoint.torch, "save", full)
    keeper.save(2, {"w": torch.ones(4)}, wait=False)
    with pytest.raises(SteersmanError, match="disk is full"):
        keeper.wait()
    assert [path.name for path in keeper.folder.iterdir()] == ["step-00000001"]


def test_killed_while_a_checkpoint_is_written_the_one_before_stands(tmp_path):
    code = textwrap.dedent("""
        import os, signal, sys, time
        from pathlib import Path
        import torch
        from steersman.run.files import checkpoint
        keeper = checkpoint.Checkpointer(Path(sys.argv[1]))
        keeper.save(1, {"w": torch.ones(4)})
        plain = torch.save
        def slow(state, file):
            plain(state, file)
            file.flush()
            Path(sys.argv[1], "written").touch()
            time.sleep(60)
        checkpoint.torch.save = slow
        keeper.save(2, {"w": torch.zeros(4)}, wait=False)
        while not Path(sys.argv[1], "written").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    """)
    done = Python("-c", code, str(tmp_path))
    assert done.wait(timeout=120) == -9, done.communicate()
    found = Checkpointer(tmp_path).load()
    assert found is not None
    assert (found.step, found.state["w"].tolist()) == (1, [1.0] * 4)
