"""A real chat model beside TRL: SFT, reward model, DPO, GRPO and PPO steps, whole and with LoRA.

python benchmarks/chat.py MODEL --pairs hh_rlhf.jsonl [--only sft dpo ...] [--repeats 3] [--threads 2]

MODEL is a folder of a chat model (SmolLM2-135M-Instruct is the one that is recorded). SFT, reward and DPO steps take
8 real pairs of up to 512 tokens; GRPO 4 prompts x 4 samples and PPO 16 prompts of up to 128 tokens, and 48 new ones.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from duel import about, duel, parser, told, write

SCENARIOS: dict[str, tuple[str, str, int, int]] = {
    "sft": ("trl116", "1.16.0", 1, 1),
    "sft-lora": ("trl116", "1.16.0", 1, 1),
    "reward": ("trl116", "1.16.0", 1, 1),
    "dpo": ("trl116", "1.16.0", 1, 1),
    "dpo-lora": ("trl116", "1.16.0", 1, 1),
    "grpo": ("trl116", "1.16.0", 4, 4),
    "grpo-lora": ("trl116", "1.16.0", 4, 4),
    "ppo": ("trl112", "1.12.0", 16, 1),
}
"""The peer's environment and version, prompts (or batches of 8) in a turn, and samples of each prompt."""


def main() -> None:
    given = parser(__doc__ or "", [])
    given.add_argument("model", type=Path)
    given.add_argument("--only", nargs="+", choices=list(SCENARIOS), default=list(SCENARIOS))
    args = given.parse_args()
    if args.pairs is None:
        given.error("--pairs names the file of real pairs")
    path = args.out / "chat.json"
    known: dict[str, Any] = json.loads(path.read_text())["results"] if path.exists() else {}
    for name in args.only:
        peer, version, rows, samples = SCENARIOS[name]
        result = duel(name, peer, str(args.model.resolve()), args, rows, samples)
        print(told(name, result), flush=True)
        known[name] = {**result, "trl": version}
        write(args, "chat", {**about(args, {"trl": "1.16.0, and 1.12.0 for PPO"}), "results": known})


if __name__ == "__main__":
    main()
