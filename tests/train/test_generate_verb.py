"""`steersman generate` on a tiny model: rows on disk, text on the terminal, and what it refuses."""

from __future__ import annotations

import json
import shutil
import signal
import time

import pytest
import torch
from forked import steersman
from letter_models import letters, write_jsonl
from train_kit import prompts_file, weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from steersman.cli import main
from steersman.recipe.sections import LoraSection
from steersman.types import SteersmanError
from steersman.verbs import generate


@pytest.fixture
def words(mini):
    return ["generate", "--model.path", str(mini), "--run.threads", "1", "--rollout.max_new_tokens", "6"]


def rows(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_come_prompt_by_prompt_with_their_log_probability(words, tmp_path, mini, capsys):
    out = tmp_path / "out.jsonl"
    data = prompts_file(tmp_path, 3)
    assert main([*words, "--data.path", str(data), "--rollout.samples", "2", "--out", str(out)]) == 0
    assert f"6 responses written to {out}\n" in capsys.readouterr().err
    found = rows(out)
    assert [row["prompt"] for row in found] == [p for p in ("the cat", "a dog sat", "we") for _ in range(2)]
    assert len({row["completion"] for row in found}) > 1
    model, tokenizer = AutoModelForCausalLM.from_pretrained(mini), AutoTokenizer.from_pretrained(mini)
    checked = 0
    for row in found:
        prompt, answer = (tokenizer.encode(row[k], add_special_tokens=False) for k in ("prompt", "completion"))
        answer += [2] if row["finish"] == "eos" else []
        if len(answer) != row["tokens"]:
            continue  # a special token was sampled, which the text does not show
        with torch.no_grad():
            logp = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        assert row["logp"] == pytest.approx(float(logp[range(len(answer)), answer].sum()), abs=1e-3)
        checked += 1
    assert checked >= 3

    again, other = tmp_path / "again.jsonl", tmp_path / "other.jsonl"
    assert main([*words, "--data.path", str(data), "--rollout.samples", "2", "--out", str(again)]) == 0
    assert again.read_bytes() == out.read_bytes()
    seed = ["--run.seed", "1"]
    assert main([*words, *seed, "--data.path", str(data), "--rollout.samples", "2", "--out", str(other)]) == 0
    assert other.read_bytes() != out.read_bytes()


def test_greedy_takes_the_likeliest_token(words, tmp_path, mini):
    out = tmp_path / "out.jsonl"
    assert main([*words, "--prompts", '["hm"]', "--greedy", "true", "--out", str(out)]) == 0
    [row] = rows(out)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(mini), AutoTokenizer.from_pretrained(mini)
    ids = tokenizer.encode("hm", add_special_tokens=False)
    start = len(ids)
    while len(ids) < start + 6 and ids[-1] != 2:
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert row["completion"] == tokenizer.decode([i for i in ids[start:] if i != 2])


def test_without_a_file_the_responses_are_printed(words, capsys):
    assert main([*words, "--prompts", '["hm [bold]", "oh"]']) == 0
    told = capsys.readouterr().out
    assert "hm [bold]" in told, "text is not read as markup"
    assert "oh" in told


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([], "give either prompts"),
        (["--prompts", '["hm"]', "--data.path", "x.jsonl"], "give either prompts"),
        (["--data.path", "nothing.jsonl"], "nothing.jsonl"),
        (["--prompts", f'["{"a" * 60}"]'], "at most 58 fit"),
    ],
)
def test_what_can_not_be_sampled_is_refused(more, said, words, capsys):
    assert main([*words, *more]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}u {{ m.content }}\n{% else %}a {{ m.content }}</s>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}a {% endif %}"
)


@pytest.fixture
def chatty(tmp_path, mini):
    """The smallest model with a chat template of its own, its weights saved in bfloat16."""
    folder = tmp_path / "chatty"
    model = AutoModelForCausalLM.from_pretrained(mini, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(mini)
    tokenizer.chat_template = TEMPLATE
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def greedy(folder, ids: list[int], count: int) -> str:
    """Greedy decoding by the model's whole forward pass."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), letters()
    start = len(ids)
    while len(ids) < start + count and ids[-1] != 2:
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return tokenizer.decode([i for i in ids[start:] if i != 2])


@pytest.mark.parametrize(("more", "seen"), [([], "u hm\na "), (["--wrap_in_chat", "false"], "hm")])
def test_a_chat_model_is_asked_through_its_template(more, seen, chatty, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    args = ["generate", "--model.path", str(chatty), "--prompts", '["hm"]', "--greedy", "true", "--out", str(out)]
    assert main([*args, "--rollout.max_new_tokens", "6", "--run.threads", "1", *more]) == 0
    [row] = rows(out)
    assert row["prompt"] == "hm"
    assert row["completion"] == greedy(chatty, letters().encode(seen, add_special_tokens=False), 6)
    assert ("chat template" in capsys.readouterr().err) == (not more)


@pytest.mark.parametrize(("place", "said"), [("no/out.jsonl", "there is no folder"), (".", "a folder has this name")])
def test_a_file_that_can_not_be_written_is_refused_before_anything_is_sampled(place, said, tmp_path, capsys):
    """The model is none, so that whatever came before the check would be told instead."""
    asked = ["--model.path", str(tmp_path / "none"), "--prompts", "[a]"]
    assert main(["generate", *asked, "--out", str(tmp_path / place)]) == 2
    assert said in capsys.readouterr().err
    asked = [word.replace("--", "--generate.") for word in asked]
    for key in ("--out", "--generate.out"):
        assert main(["evaluate", *asked, "--metrics", "[distinct]", key, str(tmp_path / place)]) == 2
        assert said in capsys.readouterr().err


def test_rows_keep_their_columns_and_evaluate_keeps_the_answers(words, tmp_path):
    data = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "hm", "kind": "a", "reference": "oh"}])
    out, table = tmp_path / "out.jsonl", tmp_path / "table.json"
    assert main([*words, "--data.path", str(data), "--out", str(out)]) == 0
    [row] = rows(out)
    assert (row["kind"], row["reference"], row["prompt"]) == ("a", "oh", "hm")
    assert main(["evaluate", str(out), "--metrics", "[chrf]", "--as_json"]) == 0

    sampled = [f"--generate.{w.removeprefix('--')}" if w.startswith("--") else w for w in words[1:]]
    asked = ["evaluate", *sampled, "--generate.data.path", str(data), "--metrics", "[chrf]", "--out", str(table)]
    assert main(asked) == 0
    assert rows(tmp_path / "table.completions.jsonl") == rows(out)


@pytest.fixture
def many(words, tmp_path):
    """A call for two responses to each of 40 prompts, in ten pieces of four prompts."""
    data = prompts_file(tmp_path, 40)
    more = ["--data.path", str(data), "--rollout.samples", "2", "--rollout.max_batch", "1"]
    return [*words, *more, "--out", str(tmp_path / "out.jsonl")]


def end_in_fourth_piece(call: list[str], monkeypatch) -> None:
    """Runs the call and ends it by Ctrl-C."""
    real, calls = generate.sample_on_all_ranks, []

    def ended(*args, **how):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args, **how)

    with monkeypatch.context() as patch:
        patch.setattr(generate, "sample_on_all_ranks", ended)
        assert main(call) == 130


@pytest.fixture
def cut_short(many, tmp_path, monkeypatch, capsys):
    """The same call, ended by Ctrl-C in its fourth piece; three are kept."""
    end_in_fourth_piece(many, monkeypatch)
    assert "the responses so far are in" in capsys.readouterr().err
    assert len(list((tmp_path / "out.jsonl.parts").glob("0*.jsonl"))) == 3
    assert not (tmp_path / "out.jsonl").exists()
    return many


def asked(monkeypatch) -> list[int]:
    """Prompts that are sampled from now on, by index."""
    found: list[int] = []
    real = generate.sample_on_all_ranks

    def seen(engine, prompts, *args, **how):
        found.extend(p.index for p in prompts)
        return real(engine, prompts, *args, **how)

    monkeypatch.setattr(generate, "sample_on_all_ranks", seen)
    return found


def test_the_same_call_goes_on_where_an_earlier_one_was_ended(cut_short, tmp_path, monkeypatch, capsys):
    again = asked(monkeypatch)
    assert main(cut_short) == 0
    assert "12 of 40 prompts were answered before" in capsys.readouterr().err
    assert again == list(range(12, 40))
    assert not (tmp_path / "out.jsonl.parts").exists()
    whole = tmp_path / "whole.jsonl"
    assert main([*cut_short[:-1], str(whole)]) == 0
    assert rows(whole) == rows(tmp_path / "out.jsonl")
    assert len(rows(whole)) == 80


@pytest.mark.parametrize("whole_pieces", [0, 2])
def test_a_server_that_is_gone_does_not_hide_where_the_responses_are(many, monkeypatch, capsys, whole_pieces):
    real, calls = generate.sample_on_all_ranks, []

    def gone(*args, **how):
        calls.append(1)
        if len(calls) > whole_pieces:
            raise SteersmanError("the server is gone")
        return real(*args, **how)

    monkeypatch.setattr(generate, "sample_on_all_ranks", gone)
    assert main(many) == 2
    told = capsys.readouterr().err
    assert "the server is gone" in told
    assert ("out.jsonl.parts; the same command goes on from there" in told) == bool(whole_pieces)


def test_where_samples_are_made_may_change_when_a_call_goes_on(cut_short, tmp_path, monkeypatch):
    again = asked(monkeypatch)
    assert main([*cut_short, "--rollout.max_batch", "8"]) == 0
    assert again == list(range(12, 40))
    assert [row["prompt"] for row in rows(tmp_path / "out.jsonl")][::2] == [
        row["prompt"] for row in rows(tmp_path / "prompts.jsonl")
    ]


def test_responses_of_another_call_are_not_mixed_in(cut_short, tmp_path, mini, capsys):
    kept = sorted((tmp_path / "out.jsonl.parts").iterdir())
    hot = [*cut_short, "--rollout.temperature", "2"]
    other = shutil.copytree(mini, tmp_path / "other")
    for call, said in (
        (hot, "recipe.rollout.temperature: 1.0 -> 2.0"),
        ([*cut_short, "--model.path", str(other)], f"-> {other}"),
        ([*cut_short, "--data.limit", "30"], "items: 40 -> 30"),
    ):
        assert main(call) == 2
        told = " ".join(capsys.readouterr().err.split())
        assert "out.jsonl.parts: it keeps the responses of a call that was ended early" in told
        assert said in told
        assert sorted((tmp_path / "out.jsonl.parts").iterdir()) == kept
    (tmp_path / "prompts.jsonl").write_text((tmp_path / "prompts.jsonl").read_text().replace("the cat", "the dog"))
    assert main(cut_short) == 2
    assert f"read.data.path.{tmp_path}/prompts" in capsys.readouterr().err.replace("\n", "")
    shutil.rmtree(tmp_path / "out.jsonl.parts")
    assert main(hot) == 0


def test_a_disk_that_is_full_at_the_end_costs_no_response(many, tmp_path, monkeypatch, capsys):
    def full(path, data):
        raise SteersmanError(f"{path}: the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(generate, "write_atomic", full)
        assert main(many) == 2
        assert "out.jsonl: the disk is full" in capsys.readouterr().err
    again = asked(monkeypatch)
    assert main(many) == 0
    assert again == []
    assert len(rows(tmp_path / "out.jsonl")) == 80


def test_a_killed_process_goes_on_too(many, tmp_path):
    """SIGKILL while it samples, for real."""
    process = steersman(*many)
    parts, end = tmp_path / "out.jsonl.parts", time.monotonic() + 120
    while not list(parts.glob("0*.jsonl")) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "out.jsonl").exists()
    kept = {file.name: file.stat().st_mtime_ns for file in parts.glob("0*.jsonl")}
    assert 1 <= len(kept) < 10
    assert main(many) == 0
    whole = tmp_path / "whole.jsonl"
    assert main([*many[:-1], str(whole)]) == 0
    assert rows(whole) == rows(tmp_path / "out.jsonl")


def test_answers_to_evaluate_are_kept_as_they_come(many, tmp_path, monkeypatch):
    table = tmp_path / "table.json"
    call = [f"--generate.{w.removeprefix('--')}" if w.startswith("--") else w for w in many[1:-2]]
    call = ["evaluate", *call, "--metrics", "[distinct]", "--out", str(table)]
    end_in_fourth_piece(call, monkeypatch)
    again = asked(monkeypatch)
    assert main(call) == 0
    assert again == list(range(12, 40))
    assert json.loads(table.read_text())["completions"] == 80
    assert len(rows(tmp_path / "table.completions.jsonl")) == 80
    assert not list(tmp_path.glob("*.parts"))


def test_long_calls_tell_how_far_they_are_on_standard_error(many, monkeypatch, capsys):
    clock = iter(range(0, 10**7, 7))
    monkeypatch.setattr("steersman.run.progress.time.monotonic", lambda: next(clock))
    assert main(many) == 0
    told = capsys.readouterr()
    assert "responses to prompts: 10 of 40, about " in told.err
    assert "responses to prompts" not in told.out


def test_a_model_is_saved_in_the_precision_that_it_was_loaded_from(chatty, tmp_path):
    """Training computes in float32; `save_dtype: same` means the files, not the arithmetic."""
    data = write_jsonl(
        tmp_path / "rows.jsonl", [{"prompt": w, "completion": "yes"} for w in ("hm", "oh", "we", "no")]
    )
    args = ["--model.path", str(chatty), "--data.path", str(data), "--run.threads", "1"]
    for dtype, expected in (("same", torch.bfloat16), ("float32", torch.float32)):
        run = tmp_path / dtype
        assert main(["sft", *args, "--run.dir", str(run), "--model.save_dtype", dtype]) == 0
        assert {x.dtype for x in weights(run / "model").values()} == {expected}
    # and what a rate that bfloat16 can not resolve has taught is in both files, on average
    start, (narrow, wide) = weights(chatty), [weights(tmp_path / dtype / "model") for dtype in ("same", "float32")]
    moves = [[(x[k].double() - start[k].double()).flatten() for k in sorted(start)] for x in (narrow, wide)]
    kept, learned = map(torch.cat, moves)
    assert not torch.equal(kept, learned)
    assert 0.8 < (kept @ learned) / (learned @ learned) < 1.2


def test_the_scale_of_adapters_does_not_follow_their_rank():
    assert [LoraSection(r=r).alpha / r for r in (1, 8, 64)] == [2, 2, 2]
    assert LoraSection(r=4, alpha=3).alpha == 3


def test_a_prompt_that_commands_the_terminal_is_written_out(words, capsys):
    attack = "\x1b[2J\x07\x9b\u202e[red]we"
    plain = "the cat and a dog sat so "  # most tokens must be known
    assert main([*words, "--prompts", json.dumps([plain + attack])]) == 0
    said = capsys.readouterr().out
    assert r"\x1b[2J\x07\x9b\u202e[red]we" in said.replace("\n", "")
    assert not set(said) & set("\x1b\x07\x9b\u202e")


def test_what_is_printed_is_what_was_said(words, capsys, monkeypatch):
    """No name of an emoji is replaced, and no line broken where the text has no line break."""
    monkeypatch.setenv("COLUMNS", "30")
    prompt = "the cat and a dog sat so the a:b:c of :key:"
    assert main([*words, "--prompts", json.dumps([prompt])]) == 0
    assert prompt in capsys.readouterr().out
