"""Sets that are mixed, in the loops: what is trained on, and that a run goes on from any checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from letter_models import WORDS, rows_of, write_jsonl
from train_kit import merge, prompts_file, recipe, weights

from steersman.types import SteersmanError
from steersman.verbs import feedback, preference, reward_model, rl, sft


def settings(tmp_path: Path, mini: Path, **more) -> dict:
    one = write_jsonl(
        tmp_path / "one.jsonl", [{"prompt": "ask" + "?" * i, "completion": w} for i, w in enumerate(WORDS)]
    )
    two = write_jsonl(tmp_path / "two.jsonl", [{"text": w + " " + w} for w in WORDS])
    return merge(
        {
            "model": {"path": str(mini)}, "data": {"path": [str(one), str(two)]}, "optimizer": {"lr": 0.01},
            "train": {"batch_size": 4, "epochs": 2}, "run": {"threads": 1, "save_every": 2, "keep_last": 99},
        },
        more,
    )  # fmt: skip


VERBS = {
    "sft": (sft.run, sft.SFTRecipe),
    "dpo": (preference.run, preference.PreferenceRecipe),
    "kto": (feedback.run, feedback.RECIPES["kto"]),
    "reward": (reward_model.run, reward_model.RewardModelRecipe),
}


def carry_out(verb: str, asked: dict, **how) -> None:
    start, recipe = VERBS[verb]
    start(recipe.model_validate(asked), **how)


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in rows_of(run / "metrics.jsonl") if "loss" in row]


def cut_short(run: Path, from_step: int) -> None:
    """Takes away all that a run did after a step."""
    shutil.rmtree(run / "model")
    late = [p for p in (run / "checkpoints").glob("step-*") if int(p.name[5:]) > from_step]
    assert late
    for path in late:
        shutil.rmtree(path)


def goes_on(asked: dict, tmp_path: Path, from_step: int, verb: str = "sft") -> None:
    """Takes away all that a run did after a step, resumes it, and compares weights and log."""
    run = tmp_path / "run"
    asked = merge(asked, {"run.dir": str(run)})
    carry_out(verb, asked)
    before, log = weights(run / "model"), losses(run)
    cut_short(run, from_step)
    carry_out(verb, asked, resume=True)
    after = weights(run / "model")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert losses(run) == log


def test_a_mixture_goes_on_from_a_checkpoint_in_its_middle(tmp_path, mini):
    goes_on(settings(tmp_path, mini, **{"data.mix": [3, 1]}), tmp_path, from_step=6)


def test_prompts_of_several_sets_are_sampled_in_their_shares(base, tmp_path, monkeypatch):
    other = write_jsonl(tmp_path / "other.jsonl", [{"prompt": "x" * (i + 1)} for i in range(4)])
    asked = recipe("rloo", merge(base, {"data.path": [str(prompts_file(tmp_path)), str(other)], "data.mix": [1, 3]}))
    seen: list[str] = []
    real = rl.OnPolicy.next_prompts
    monkeypatch.setattr(
        rl.OnPolicy, "next_prompts", lambda *a: (got := real(*a), seen.extend(p.text for p in got))[0]
    )
    rl.run(asked)
    share = sum(text.startswith("x") for text in seen) / len(seen)
    assert share == pytest.approx(0.75, abs=0.15)


def many(tmp_path: Path, count: int = 50) -> Path:
    rows = [{"prompt": f"ask{'?' * (i % 9)}", "completion": WORDS[i % 12] + " a" * (i // 12)} for i in range(count)]
    return write_jsonl(tmp_path / "many.jsonl", rows)


def test_rows_on_disk_train_bit_for_bit_as_rows_in_memory(tmp_path, mini):
    asked = settings(tmp_path, mini, data={"path": str(many(tmp_path)), "held_out": 0.2})
    runs = {}
    for name, cache in (("memory", None), ("disk", str(tmp_path / "cache")), ("again", str(tmp_path / "cache"))):
        made = merge(asked, {"data.cache": cache, "run.dir": str(tmp_path / name)})
        sft.run(sft.SFTRecipe.model_validate(made))
        runs[name] = weights(tmp_path / name / "model")
    for name in ("disk", "again"):
        assert all(torch.equal(runs["memory"][k], runs[name][k]) for k in runs["memory"])
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_stream_goes_on_from_a_checkpoint_in_its_middle(tmp_path, mini):
    """Also in the middle of a buffer, and in a later pass over the file."""
    data = {"path": str(many(tmp_path)), "stream": True, "buffer": 12, "on_too_long": "drop", "max_length": 20}
    asked = settings(tmp_path, mini, data=data, train={"batch_size": 4, "max_steps": 24})
    goes_on(asked, tmp_path, from_step=16)


def test_a_stream_of_a_mixture_goes_on_too(tmp_path, mini):
    more = {"data.mix": [3, 1], "data.stream": True, "data.buffer": 8, "train.max_steps": 16}
    goes_on(settings(tmp_path, mini, **more), tmp_path, from_step=10)


def judged(tmp_path: Path, mini: Path, verb: str, **data) -> dict:
    """A run of a verb on pairs, or on thumbs, without held prompts."""
    pairs = [
        {"prompt": f"ask{'?' * (i % 9)}", "chosen": f"{WORDS[i % 12]} a", "rejected": "no e" + " a" * (i % 5)}
        for i in range(50)
    ]
    thumbs = [
        {"prompt": p["prompt"], "completion": p["chosen"] if i % 2 else p["rejected"], "label": i % 2 > 0}
        for i, p in enumerate(pairs)
    ]
    file = write_jsonl(tmp_path / f"{verb}.jsonl", thumbs if verb == "kto" else pairs)
    asked = settings(tmp_path, mini, data={"path": str(file), **data}, train={"batch_size": 4, "max_steps": 24})
    return asked if verb == "reward" else merge(asked, {"samples.prompts": 0})


@pytest.mark.parametrize("verb", ["dpo", "kto", "reward"])
def test_pairs_and_thumbs_on_disk_train_as_those_in_memory(verb, tmp_path, mini):
    """The same batches; the reference is read batch by batch there, so its numbers are the same to rounding."""
    logged = {}
    for name, cache in (("memory", None), ("disk", str(tmp_path / "cache"))):
        asked = judged(tmp_path, mini, verb, held_out=0.2, cache=cache)
        carry_out(verb, merge(asked, {"run.dir": str(tmp_path / name)}))
        logged[name] = rows_of(tmp_path / name / "metrics.jsonl")[-1]
        if verb == "reward":
            told = [(tmp_path / name / "evaluation.json").read_text() for name in logged]
            assert len(set(told)) == 1
    first, second = (losses(tmp_path / name) for name in logged)
    assert first == pytest.approx(second, rel=1e-4, abs=1e-5)
    held = [name for name in logged["memory"] if name.startswith("held_out/")]
    assert held
    for name in held:
        assert logged["memory"][name] == pytest.approx(logged["disk"][name], rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("verb", ["dpo", "kto", "reward"])
def test_a_stream_of_pairs_or_thumbs_goes_on_from_its_middle(verb, tmp_path, mini):
    asked = judged(tmp_path, mini, verb, stream=True, buffer=12)
    if verb == "kto":
        with pytest.raises(ValueError, match="how many thumbs are up is not known before"):
            VERBS[verb][1].model_validate(asked)
        asked = merge(asked, {"loss.desirable_weight": 1.0, "loss.undesirable_weight": 1.0})
    goes_on(asked, tmp_path, from_step=16, verb=verb)


def test_a_run_on_stored_pairs_goes_on_whatever_else_the_cache_has_and_refuses_changed_ones(tmp_path, mini):
    (tmp_path / "cache").mkdir()
    asked = merge(judged(tmp_path, mini, "dpo", cache=str(tmp_path / "cache")), {"run.dir": str(tmp_path / "run")})
    carry_out("dpo", asked)
    carry_out("reward", judged(tmp_path, mini, "reward", cache=str(tmp_path / "cache")) | {
        "run": {"threads": 1, "dir": str(tmp_path / "other")}
    })  # fmt: skip
    before = weights(tmp_path / "run" / "model")
    cut_short(tmp_path / "run", 6)
    carry_out("dpo", asked, resume=True)
    after = weights(tmp_path / "run" / "model")
    assert all(torch.equal(before[name], after[name]) for name in before)
    cut_short(tmp_path / "run", 6)
    file = tmp_path / "dpo.jsonl"
    file.write_text(file.read_text().replace("ask", "say", 1))
    with pytest.raises(SteersmanError, match=r"has changed since it began.*dpo\.jsonl"):
        carry_out("dpo", asked, resume=True)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"data.stream": True}, "say train.max_steps"),
        ({"data.stream": True, "train.max_steps": 3, "train.heads": 3}, "use data.cache"),
        ({"data.cache": "c", "stage": "evaluate"}, "is for stage train"),
        ({"data.cache": "c", "data.held_out": 2, "evaluation.subset": "file"}, "keeps no columns"),
    ],
)
def test_what_goes_through_all_rows_is_refused_for_rows_that_are_not_at_hand(more, message):
    plain = {"model": {"path": "m"}, "data": {"path": "d"}}
    with pytest.raises(ValueError, match=message):
        VERBS["reward"][1].model_validate(merge(plain, more))


def test_pairs_in_packed_rows_learn_what_they_learn_apart(tmp_path, mini):
    """No answer sees another one in its row: the losses are the same, and so is what they lead to."""
    pairs = [
        {"prompt": f"ask{'?' * (i % 5)}", "chosen": w, "rejected": "no e" + " a" * (i % 3)}
        for i, w in enumerate(WORDS)
    ]
    data = write_jsonl(tmp_path / "pairs.jsonl", pairs)
    runs = []
    for pack in (0, 90):
        asked = {
            "model": {"path": str(mini)}, "data": {"path": str(data)}, "optimizer": {"lr": 0.01},
            "train": {"batch_size": 4, "epochs": 2, "pack": pack}, "samples": {"prompts": 0},
            "run": {"threads": 1, "dir": str(tmp_path / f"run{pack}")},
        }  # fmt: skip
        preference.run(preference.PreferenceRecipe.model_validate(asked))
        logged = rows_of(tmp_path / f"run{pack}" / "metrics.jsonl")
        runs.append([(row["loss"], row["margin"]) for row in logged if "loss" in row])
    assert len(runs[0]) == 6
    torch.testing.assert_close(torch.tensor(runs[0]), torch.tensor(runs[1]), rtol=1e-4, atol=1e-5)
