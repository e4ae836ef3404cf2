"""`steersman generate` on a tiny model: rows on disk, text on the terminal, and what it refuses."""

from __future__ import annotations

import json

import pytest
import torch
from train_kit import prompts_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from steersman.cli import main


@pytest.fixture
def words(mini):
    return ["generate", "--model.path", str(mini), "--run.threads", "1", "--rollout.max_new_tokens", "6"]


def rows(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_come_prompt_by_prompt_with_their_log_probability(words, tmp_path, mini):
    out = tmp_path / "out.jsonl"
    data = prompts_file(tmp_path, 3)
    assert main([*words, "--data.path", str(data), "--rollout.samples", "2", "--out", str(out)]) == 0
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


def test_a_prompt_that_commands_the_terminal_is_written_out(words, capsys):
    attack = "\x1b[2J\x07\x9b\u202e[red]we"
    plain = "the cat and a dog sat so "  # most tokens must be known
    assert main([*words, "--prompts", json.dumps([plain + attack])]) == 0
    said = capsys.readouterr().out
    assert r"\x1b[2J\x07\x9b\u202e[red]we" in said.replace("\n", "")
    assert not set(said) & set("\x1b\x07\x9b\u202e")
