"""A real chat model beside TRL: SFT, reward model, DPO, GRPO and PPO steps, whole, with LoRA and QLoRA.

python benchmarks/chat.py MODEL --pairs hh_rlhf.jsonl [--only sft dpo ...] [--repeats 3] [--threads 2]

MODEL is a folder of a chat model (SmolLM2-135M-Instruct is the one that is recorded). SFT, reward and DPO steps take
8 real pairs of up to 512 tokens; GRPO and PPO 4 prompts of up to 128 tokens x 4 samples of 48 new ones, ppo16 16 x 1.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from duel import about, duel, parser, told, write
from torch.nn import functional

from steersman.ops import products


class Row(NamedTuple):
    """What both sides do, the peer's environment and version, prompts (or batches of 8) in a turn, and samples."""

    scenario: str
    peer: str
    version: str
    prompts: int = 1
    samples: int = 1


def _rows(scenario: str, prompts: int = 1, samples: int = 1) -> dict[str, Row]:
    """Beside TRL 1.16: the whole model, LoRA and QLoRA."""
    names = [scenario, f"{scenario}-lora", f"{scenario}-qlora"]
    return {name: Row(name, "trl116", "1.16.0", prompts, samples) for name in names}


ROWS: dict[str, Row] = {
    **_rows("sft"),
    "reward": Row("reward", "trl116", "1.16.0"),
    **_rows("dpo"),
    **_rows("grpo", 4, 4),
    "ppo": Row("ppo", "trl112", "1.12.0", 4, 4),
    "ppo16": Row("ppo", "trl112", "1.12.0", 16, 1),
}
"""The rows of the table, by their names on the page."""


def main() -> None:
    given = parser(__doc__ or "", [])
    given.add_argument("model", type=Path)
    given.add_argument("--only", nargs="+", choices=list(ROWS), default=list(ROWS))
    args = given.parse_args()
    if args.pairs is None:
        given.error("--pairs names the file of real pairs")
    path = args.out / "chat.json"
    machines: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    here = processor()
    results = machines.get(here, {}).get("results", {})
    for name in args.only:
        row = ROWS[name]
        result = duel(row.scenario, row.peer, str(args.model.resolve()), args, row.prompts, row.samples)
        print(told(name, result), flush=True)
        results = {**results, name: {**result, "trl": row.version}}
        results = {each: results[each] for each in ROWS if each in results}
        known = about(args, {"trl": "1.16.0, and 1.12.0 for PPO"})
        machines[here] = {**known, "products": rates(args.threads), "results": results}
        write(args, "chat", machines)


def processor() -> str:
    """The maker, family and model of the processor: how fast products are depends on them."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = [line.partition(":") for line in cpuinfo.read_text().splitlines()] if cpuinfo.exists() else []
    found: dict[str, str] = {}
    for key, _, value in lines:
        found.setdefault(key.strip(), value.strip())
    if "vendor_id" not in found:
        return platform.machine()
    return f"{found['vendor_id']} family {found['cpu family']} model {found['model']}"


def rates(threads: int) -> dict[str, Any]:
    """GFLOP/s of a layer's product: as torch computes it, and as steersman does."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    x, weight = torch.randn(1024, 576), torch.randn(1536, 576)
    found = {"torch": _rate(functional.linear, x, weight), "steersman": _rate(products.linear, x, weight)}
    torch.set_num_threads(before)
    return {"of": f"1,024 x 576 x 1,536 in {threads} threads", **found}


def _rate(multiply: Callable[..., torch.Tensor], x: torch.Tensor, weight: torch.Tensor) -> float:
    best = float("inf")
    for _ in range(50):
        start = time.perf_counter()
        multiply(x, weight)
        best = min(best, time.perf_counter() - start)
    return 2 * x.numel() * weight.shape[0] / best / 1e9


if __name__ == "__main__":
    main()
