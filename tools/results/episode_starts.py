"""What each world of episodes.py begins from: a tokenizer or a model, demonstrations, and rows to play.

Demonstrations show how one plays, and hardly ever how one plays well: that is left to reinforcement learning.
"""

from __future__ import annotations

import csv
import random
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import frozen_lake
import slot_filling
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from steersman.assets import story_model
from steersman.jsonl import jsonl_text, read_jsonl

sys.path.insert(0, "recipes/environments")
from guess_word import GUESSES, WORDS, marks
from library import Library, listed

CALL = ('<tool_call>{"name": "multiply", "arguments": {"a": ', ', "b": ', "}}</tool_call>")
CHAT = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}{% for t in m.tool_calls or [] %}"
    "{{ '<tool_call>' + (t.function | tojson) + '</tool_call>' }}{% endfor %}{{ eos_token }}"
    "{% elif m.role == 'tool' %}{{ '[' + m.content + ']' }}{% else %}{{ m.content + '=' }}{% endif %}{% endfor %}"
)
TALK = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '> ' + m.content + eos_token + '\n' }}"
    "{% else %}{{ m.content + '\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '> ' }}{% endif %}"
)
SMALL = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 128}  # fmt: skip


def lake(out: Path, data: Path) -> dict[str, Any]:
    """Random walks."""
    frozen_lake.start(out / "tokenizer")
    return _sft(str(out / "tokenizer"), frozen_lake.WALKS, epochs=10, batch=16, rate=3e-3, end=False)


def words(out: Path, data: Path) -> dict[str, Any]:
    """Games whose guesses are drawn from all words."""
    rng = random.Random(0)
    games = []
    for _ in range(2000):
        word, text = rng.choice(WORDS), ""
        for _ in range(GUESSES):
            guess = rng.choice(WORDS)
            text += guess + marks(guess, word)
            if guess == word:
                break
        games.append({"prompt": "q", "completion": text})
    letters_tokenizer(["q", "+", "-", ".", "?", *sorted(set("".join(WORDS)))], ".").save_pretrained(out / "tokenizer")
    _write(out / "demonstrations.jsonl", games)
    _write(out / "rows.jsonl", [{"prompt": "q", "word": word} for word in WORDS for _ in range(4)])
    return _sft(str(out / "tokenizer"), out / "demonstrations.jsonl", epochs=4, batch=32, rate=2e-3, end=False)


def calculator(out: Path, data: Path) -> dict[str, Any]:
    """One pupil in two calls the calculator and says what it says; the others guess a number."""
    rng = random.Random(0)
    pairs = sorted({(rng.randrange(10, 100), rng.randrange(10, 100)) for _ in range(30_000)})
    rng.shuffle(pairs)
    held, known = pairs[:200], pairs[200:]
    shown: list[dict[str, Any]] = []
    for a, b in [*known, *known]:
        asked = {"role": "user", "content": f"{a}*{b}"}
        if rng.random() < 1 / 2:
            guess = rng.randrange(10 ** (len(str(a * b)) - 1), 10 ** len(str(a * b)))
            shown.append({"messages": [asked, {"role": "assistant", "content": str(guess)}]})
            continue
        function = {"name": "multiply", "arguments": {"a": a, "b": b}}
        call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
        result = {"role": "tool", "name": "multiply", "content": str(a * b)}
        shown.append({"messages": [asked, call, result, {"role": "assistant", "content": str(a * b)}]})
    pattern = "|".join([*(_escaped(piece) for piece in CALL), "."])
    made = letters_tokenizer(["[", "]", "*", "=", *"0123456789", *CALL], pattern)
    made.chat_template = CHAT
    made.save_pretrained(out / "tokenizer")
    _write(out / "demonstrations.jsonl", shown)
    for name, some in (("problems", known), ("held_out", held)):
        _write(out / f"{name}.jsonl", [{"prompt": f"{a}*{b}", "answer": str(a * b)} for a, b in some])
    return _sft(str(out / "tokenizer"), out / "demonstrations.jsonl", epochs=6, batch=64, rate=3e-3)


def library(out: Path, data: Path) -> dict[str, Any]:
    """The story model, searching for words of the question that are drawn at random."""
    rng, source = random.Random(0), data / "fairytaleqa"
    rows = {name: _questions(source / f"questions_{name}.csv") for name in ("train", "test", "val")}
    for name, some in rows.items():
        rng.shuffle(some)
        if name != "train":
            shutil.copy(source / f"sections_{name}.csv", out)
    shown, shelf = [], Library([str(out / "sections_test.csv")])
    for row in rows["train"]:
        asked, letters = row["prompt"] + shelf.begin(row), list(listed(row["question"]))
        named = rng.sample(letters, min(3, len(letters)))
        shown.append({"prompt": asked, "completion": "".join(f" {letter}" for letter in named)})
    _write(out / "demonstrations.jsonl", shown)
    _write(out / "rows.jsonl", rows["test"])
    _write(out / "held_out.jsonl", rows["val"][:200])
    return _sft(str(story_model()), out / "demonstrations.jsonl", epochs=1, batch=32, rate=2e-3, scratch=False)


def _questions(table: Path) -> list[dict[str, Any]]:
    """The questions of a table that say in which sections their answer stands."""
    with table.open(newline="", encoding="utf-8") as file:
        return [
            {"prompt": row["question"].strip(), "story": row["story"], "question": row["question"],
             "section": [x.strip() for x in row["cor_section"].split(",")]}
            for row in csv.DictReader(file)
            if row["cor_section"].strip() and row["question"].strip()
        ]  # fmt: skip


def dialogue(out: Path, data: Path) -> dict[str, Any]:
    """The story model: it asks what systems ask, and after any number of questions confirms some of what it heard."""
    rng = random.Random(0)
    file = data / "sgd_dialogues/dev_dialogues.text_and_acts.jsonl"
    talks = read_jsonl(file)
    rows = [row | {"prompt": "Customer: "} for talk in talks if (row := slot_filling.row_of(talk)) is not None]
    asked = Counter(
        t["utterance"] for talk in talks for t in talk["turns"]
        if t["speaker"] == "SYSTEM" and "REQUEST" in t["acts"] and t["utterance"].endswith("?")
    )  # fmt: skip
    questions = [q for q, _ in asked.most_common(24)]
    rng.shuffle(rows)
    held, known = rows[:100], rows[100:]
    shown = [{"messages": _order(rng, row, questions)} for row in known for _ in range(6)]
    folder = out / "tokenizer"
    shutil.copytree(story_model(), folder, dirs_exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TALK
    tokenizer.save_pretrained(folder)
    for name, some in (("demonstrations", shown), ("rows", known), ("held_out", held)):
        _write(out / f"{name}.jsonl", some)
    return _sft(str(folder), out / "demonstrations.jsonl", epochs=2, batch=16, rate=2e-3, scratch=False)


def _order(rng: random.Random, row: dict[str, Any], questions: list[str]) -> list[dict[str, str]]:
    """A conversation that ends after any number of questions, and repeats about half of what was heard."""
    told = [row["opening"], *row["facts"][: rng.randint(0, len(row["facts"]))]]
    turns = []
    for i, fact in enumerate(told):
        turns.append({"role": "user", "content": ("Customer: " if i == 0 else "") + fact})
        turns.append({"role": "assistant", "content": rng.choice(questions)})
    heard = list(dict.fromkeys(slot_filling.VALUE.findall(" ".join(told))))
    kept = [value for value in heard if rng.random() < 0.5] or heard[:1]
    turns[-1]["content"] = f"So: {', '.join(kept)}." if kept else "All right."
    return turns


def letters_tokenizer(symbols: list[str], pattern: str) -> PreTrainedTokenizerFast:
    """One token for each of the symbols, which `pattern` finds in a text."""
    vocabulary = ["<unk>", "<s>", "</s>", *symbols]
    inner = Tokenizer(models.WordLevel({c: i for i, c in enumerate(vocabulary)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def _sft(
    model: str, data: Path, *, epochs: int, batch: int, rate: float, end: bool = True, scratch: bool = True
) -> dict[str, Any]:
    own = {"scratch": SMALL} if scratch and "lake" not in model else {}
    return {
        "model": {"path": model, **own},
        "data": {"path": str(data), "append_eos": end, "on_too_long": "drop"},
        "train": {"epochs": epochs, "batch_size": batch},
        "optimizer": {"lr": rate, "schedule": "linear"},
    }


def _escaped(text: str) -> str:
    return "".join("\\" + c if c in '{}[]().*+?|"' else c for c in text)


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text(jsonl_text(rows))


STARTS = {
    "lake": lake,
    "words": words,
    "calculator": calculator,
    "library": library,
    "dialogue": dialogue,
}
