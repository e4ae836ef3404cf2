"""`steersman generate` on a tiny model: rows on disk, text on the terminal, and what it refuses."""

from __future__ import annotations

import json

import pytest
import torch
from letter_models import letters, write_jsonl
from train_kit import prompts_file, weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from steersman.cli import main
from steersman.recipe.sections import LoraSection


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

    generate = [f"--generate.{w.removeprefix('--')}" if w.startswith("--") else w for w in words[1:]]
    asked = ["evaluate", *generate, "--generate.data.path", str(data), "--metrics", "[chrf]", "--out", str(table)]
    assert main(asked) == 0
    assert rows(tmp_path / "table.completions.jsonl") == rows(out)


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
