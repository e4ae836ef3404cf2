"""FrozenLake 4x4 in text: the model that recipes/environments/frozen-lake.yaml begins from, and what can be reached.

python tools/results/frozen_lake.py start      # runs/environments/frozen-lake: a small Llama, and random walks
steersman sft recipes/environments/frozen-lake-sft.yaml      # it learns what a move is, and none in particular
python tools/results/frozen_lake.py optimum    # success of the best policy within 100 steps, by dynamic programming
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import gymnasium as gym
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from tokenizers.decoders import Fuse
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CELLS = "abcdefghijklmnop"
START = Path("runs/environments/frozen-lake-start")
WALKS = Path("runs/environments/walks.jsonl")


def start(folder: Path = START, seed: int = 0) -> None:
    """A Llama of two layers whose tokens are the cells, the four moves, and a beginning."""
    vocabulary = ["<unk>", "<s>", "</s>", "q", "L", "D", "R", "U", *CELLS]
    vocabulary = list(dict.fromkeys(vocabulary))
    inner = Tokenizer(models.WordLevel({c: i for i, c in enumerate(vocabulary)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    inner.decoder = Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=640, bos_token_id=1, eos_token_id=2, initializer_range=0.1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    luck = random.Random(seed)
    walks = ["".join(luck.choice(CELLS) + luck.choice("LDRU") for _ in range(20)) for _ in range(400)]
    WALKS.parent.mkdir(parents=True, exist_ok=True)
    WALKS.write_text("".join(json.dumps({"prompt": "q", "completion": walk}) + "\n" for walk in walks))
    print(folder, WALKS)


def optimum(slippery: bool = True, steps: int = 100) -> float:
    """The largest probability of reaching the goal within `steps` steps."""
    world = gym.make("FrozenLake-v1", is_slippery=slippery).unwrapped
    value = [0.0] * 16
    for _ in range(steps):
        value = [
            max(
                sum(p * (r + (0.0 if over else value[after])) for p, after, r, over in world.P[s][a])  # type: ignore[attr-defined]
                for a in range(4)
            )
            for s in range(16)
        ]
    return value[0]


if __name__ == "__main__":
    if sys.argv[1:] == ["start"]:
        start()
    else:
        print(f"slippery: {optimum():.4f}; not slippery: {optimum(False):.4f}")
