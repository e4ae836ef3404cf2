"""What both sides of a benchmark share: models, data, taking turns, memory. Imports nothing of steersman."""

from __future__ import annotations

import json
import os
import random
import resource
import sys
import time
from pathlib import Path
from typing import Any

SHAPES = {
    "llama5m": {"hidden": 256, "layers": 4, "inner": 688, "vocab": 4096},
    "llama36m": {"hidden": 512, "layers": 8, "inner": 1376, "vocab": 4096},
    "llama128k": {"hidden": 256, "layers": 4, "inner": 688, "vocab": 128_000},
    "llama1b": {"hidden": 2048, "layers": 16, "inner": 8192, "vocab": 32_000},
}
"""Llama-style models with random weights; the last one is for a GPU."""

HEADS = 8
PROMPT, NEW, BATCH = 32, 64, 16
CHAT = {"new": 48, "batch": 8, "longest": 512}
"""What a real chat model is given instead, and the longest of its pairs, in tokens."""
SETTINGS = {"lr": 1e-5, "clip": 0.2, "beta": 0.05, "max_grad_norm": 1.0, "dpo_beta": 0.1}
"""The hyper-parameters that both sides are given."""

REWARD = '''
def even(prompts, completions, **columns):
    """Share of a completion's words that end in an even digit."""
    words = [c.split() for c in completions]
    return [sum(w[-1] in "02468" for w in row) / max(len(row), 1) for row in words]
'''


def build_model(name: str, kind: str = "policy", seed: int = 0) -> Any:
    """A random model, policy or scalar."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    shape = SHAPES[name]
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=shape["vocab"], hidden_size=shape["hidden"], intermediate_size=shape["inner"],
        num_hidden_layers=shape["layers"], num_attention_heads=HEADS, num_key_value_heads=HEADS,
        max_position_embeddings=1024, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    config.num_labels = 1
    return (LlamaForCausalLM if kind == "policy" else LlamaForSequenceClassification)(config)


def build_tokenizer(vocab: int) -> Any:
    """One token per word: `t3`, `t4`, ..."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"t{i}" for i in range(4, vocab))]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def sizes(folder: Path) -> tuple[int, int]:
    """New tokens of an answer, and rows of a batch, for the inputs in a folder."""
    given = json.loads((folder / "sizes.json").read_text())
    return given["new"], given["batch"]


def write_chat_inputs(folder: Path, model: Path, pairs: Path, rows: int = 192) -> None:
    """The inputs of a real chat model: its weights, and real pairs in the layout of `hh_rlhf`.

    The scalar model is the chat model with a fresh head. The end token is replaced by one that the model never
    says, so that both sides write answers of the same length.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model)
    never = tokenizer.convert_ids_to_tokens(len(tokenizer) - 1)
    tokenizer.eos_token = never
    for kind, cls in (("policy", AutoModelForCausalLM), ("scalar", AutoModelForSequenceClassification)):
        given = {} if kind == "policy" else {"num_labels": 1}
        loaded = cls.from_pretrained(model, dtype=torch.float32, **given)
        loaded.config.eos_token_id = tokenizer.eos_token_id
        loaded.config.pad_token_id = tokenizer.pad_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
        if kind == "policy":
            loaded.generation_config.eos_token_id = tokenizer.eos_token_id
            loaded.generation_config.pad_token_id = tokenizer.pad_token_id
        loaded.save_pretrained(folder / kind)
        tokenizer.save_pretrained(folder / kind)
    kept: list[dict[str, str]] = []
    with pairs.open() as lines:
        for line in lines:
            row = json.loads(line)
            prompt, _, chosen = row["chosen"].rpartition("\n\nAssistant:")
            before, _, rejected = row["rejected"].rpartition("\n\nAssistant:")
            longest = max(len(tokenizer(row[side])["input_ids"]) for side in ("chosen", "rejected"))
            if prompt == before and chosen and rejected and longest <= CHAT["longest"]:
                prompt += "\n\nAssistant:"
                kept.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
            if len(kept) == rows:
                break
    short = [row for row in kept if len(tokenizer(row["prompt"])["input_ids"]) <= 128]
    prompts = [{"prompt": short[i % len(short)]["prompt"]} for i in range(1024)]
    sft = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in kept]
    for file, data in (("prompts", prompts), ("pairs", kept), ("sft", sft)):
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    (folder / "rewards.py").write_text(REWARD)
    (folder / "sizes.json").write_text(json.dumps({"new": CHAT["new"], "batch": CHAT["batch"]}))


def write_inputs(folder: Path, name: str, rows: int = 192, *, models: bool = True) -> None:
    """Models and data of one shape: policy/, scalar/, prompts.jsonl, pairs.jsonl, sft.jsonl, rewards.py.

    Prompts of 32 tokens; pairs and demonstrations of mixed lengths: prompts of 8 to 64 tokens, responses of 16
    to 256 (log-uniform).
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(SHAPES[name]["vocab"]) if models else None
    for kind in ("policy", "scalar") if models else ():
        build_model(name, kind).save_pretrained(folder / kind)
        tokenizer.save_pretrained(folder / kind)
    draw = random.Random(0)

    def words(n: int) -> str:
        return " ".join(f"t{draw.randrange(4, SHAPES[name]['vocab'])}" for _ in range(n))

    def length() -> int:
        return round(16 * 16 ** draw.random())

    prompts = [{"prompt": words(PROMPT)} for _ in range(1024)]
    pairs = [
        {"prompt": words(draw.randint(8, 64)), "chosen": " " + words(length()), "rejected": " " + words(length())}
        for _ in range(rows)
    ]
    sft = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in pairs]
    for file, data in (("prompts", prompts), ("pairs", pairs), ("sft", sft)):
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    (folder / "rewards.py").write_text(REWARD)
    (folder / "sizes.json").write_text(json.dumps({"new": NEW, "batch": BATCH}))


class Turns:
    """A worker's end of the conversation: it works when told to and tells how long that took.

    The parent writes `go` or `end` to standard input; each answer is one line of JSON on standard output, which
    is kept clean by sending everything else that is printed to standard error.
    """

    def __init__(self) -> None:
        self.out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self.started = 0.0
        self.imported = peak_mib()

    def wait(self) -> None:
        """Returns when it is this side's turn; does not return when there is none left."""
        if sys.stdin.readline().strip() != "go":
            self._say({"peak_mib": peak_mib(), "imported_mib": self.imported, **device_memory()})
            os._exit(0)
        self.started = time.perf_counter()

    def done(self, **numbers: Any) -> None:
        """The turn is over."""
        synchronize()
        self._say({"seconds": time.perf_counter() - self.started, **numbers})

    def ready(self, **facts: Any) -> None:
        """Everything is loaded."""
        self._say(facts)

    def _say(self, message: dict[str, Any]) -> None:
        self.out.write(json.dumps(message) + "\n")
        self.out.flush()


def peak_mib() -> float:
    """The largest resident memory that this process has had.

    From /proc where there is one: `getrusage` also counts what the parent held when it started this process.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def synchronize() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.synchronize()


def device_memory() -> dict[str, float]:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return {}
    return {"device_peak_mib": torch.cuda.max_memory_allocated() / 2**20}
