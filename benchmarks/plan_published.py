"""The plan's seconds beside published tables of other systems: figure, predicted, ratio.

    python benchmarks/plan_published.py

Writes docs/results/plan-published.md and .json. What a table does not say is assumed, and said. No model is made.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers as hf

from steersman.model.shape import Shape, shape_from, shape_of
from steersman.plan.costs import weigh
from steersman.plan.devices import KNOWN, Cluster
from steersman.plan.layouts import Role, Work, layouts
from steersman.plan.simulate import Lengths, best_apart, simulate

RESULTS = Path(__file__).parents[1] / "docs" / "results"
NEMO = "NeMo RL 0.4, performance summary, DGX-H100"
OPENRLHF = "OpenRLHF, README, A800-80GB"
DEEPSPEED = "DeepSpeed-Chat, arXiv 2308.01320, table 1, A100-80GB"
QWEN32: dict[str, Any] = {
    "hidden_size": 5120, "intermediate_size": 25_600, "num_hidden_layers": 64, "num_attention_heads": 64,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936,
}  # fmt: skip
LLAMA34: dict[str, Any] = {
    "hidden_size": 8192, "intermediate_size": 22_016, "num_hidden_layers": 48, "num_attention_heads": 64,
    "num_key_value_heads": 8, "vocab_size": 32_000,
}  # fmt: skip


@dataclass(frozen=True)
class Published:
    """A row of a table. `seconds` of an iteration; `ahead` of None is not simulated: every response is as long."""

    source: str
    what: str
    shape: Shape
    critic: Shape | None
    there: Cluster
    work: Work
    seconds: float
    lengths: Lengths | None = None
    ahead: int = 0


def a100(count: int) -> Cluster:
    return Cluster(KNOWN["A100-80GB"], 8, count // 8)


def opt(hidden: int, layers: int, heads: int) -> Shape:
    config = hf.OPTConfig(
        hidden_size=hidden, ffn_dim=4 * hidden, num_hidden_layers=layers, num_attention_heads=heads,
        vocab_size=50_272, word_embed_proj_dim=hidden,
    )  # fmt: skip
    return shape_from(config, "opt")


def rows() -> list[Published]:
    eight, qwen = shape_of("8b"), shape_from(hf.LlamaConfig(**QWEN32), "Qwen3-32B")
    h100 = KNOWN["H100-80GB"]
    found = []
    for name, shape, nodes, ahead, mean, seconds in (
        ("Llama 3.1 8B, 16 GPUs, on policy", eight, 2, 0, 1060, 97.7),
        ("Llama 3.1 8B, 16 GPUs, 1 step off", eight, 2, 1, 1129, 74.6),
        ("Qwen3-32B, 32 GPUs, on policy", qwen, 4, 0, 3206, 393.0),
        ("Qwen3-32B, 64 GPUs, 1 step off", qwen, 8, 1, 3207, 215.0),
    ):
        work = Work(2048, 150, 4096 - 150, 1, 8192, 4, 2, checkpointing=False)
        lengths = Lengths(mean - 150, 4096 - 150)
        found.append(Published(NEMO, name, shape, None, Cluster(h100, 8, nodes), work, seconds, lengths, ahead))
    for size, count, seconds in (("7b", 16, 471.11), ("13b", 32, 608.93), ("34b", 32, 1526.4), ("70b", 32, 4488.53)):
        shape = shape_from(hf.LlamaConfig(**LLAMA34), size) if size == "34b" else shape_of(size)
        work = Work(1024, 1024, 1024, 1, 8192, 2, 2, optimizer_bytes=12, checkpointing=True)
        found.append(
            Published(OPENRLHF, f"PPO, {size}, {count} GPUs, 1,024 prompts", shape, shape, a100(count), work, seconds)
        )
    critic = opt(1024, 24, 16)
    steps = 264_292 / 1024
    for name, shape, hours in (("OPT-13B", opt(5120, 40, 40), 9.0), ("OPT-30B", opt(7168, 48, 56), 18.0)):
        work = Work(1024, 256, 256, 1, 8192, 2, 2, optimizer_bytes=12, checkpointing=True)
        found.append(
            Published(DEEPSPEED, f"PPO, {name}, 8 GPUs, a step", shape, critic, a100(8), work, hours * 3600 / steps)
        )
    return found


def predicted(row: Published) -> float:
    roles = [Role("actor", row.shape, row.shape.parameters), Role("reference", row.shape)]
    if row.critic is not None:
        roles += [Role("critic", row.critic, row.critic.parameters), Role("reward", row.critic)]
    if row.lengths is None:
        verdicts = [weigh(one, roles, row.work, row.there) for one in layouts(row.there, row.work)]
        return min(verdict.iteration for verdict in verdicts if not verdict.layout.generators)
    if row.ahead:
        found = best_apart(row.there, roles, row.work, row.lengths, row.ahead)
        assert found is not None
        return found.seconds
    return simulate(row.there, roles, row.work, row.lengths).seconds


def main() -> None:
    found = []
    for row in rows():
        seconds = predicted(row)
        found.append({"source": row.source, "what": row.what, "published": row.seconds, "predicted": seconds})
        print(f"{row.what}: {seconds / row.seconds:.2f}", flush=True)
    (RESULTS / "plan-published.json").write_text(json.dumps(found, indent=1))
    lines = [
        f"| {r['source']} | {r['what']} | {r['published']:,.0f} | {r['predicted']:,.0f} | "
        f"{r['predicted'] / r['published']:.2f} |"
        for r in found
    ]
    off, on = (
        next(r for r in found if r["what"] == f"Llama 3.1 8B, 16 GPUs, {k}") for k in ("1 step off", "on policy")
    )
    (RESULTS / "plan-published.md").write_text("\n".join([
        "# The plan's seconds beside published tables", "",
        "Written by `python benchmarks/plan_published.py`; do not edit. Nothing here was measured by us: the",
        "figures are",
        "others', of their own systems; predicted is what `steersman plan` would say of steersman's layout on those",
        "devices, which no GPU has confirmed. Seconds of an iteration.", "",
        "| source | what | published, s | predicted, s | predicted / published |", "| --- | --- | --- | --- | --- |",
        *lines, "",
        "How far to trust it: the plan says what the hardware allows at the shares it names (40% of the data sheet's",
        "rate in training, 60% of its bandwidth in decoding), and what a system adds is not in it:",
        "offloading (OpenRLHF",
        "keeps Adam on the CPU in these runs), rewards, data, engines that start and stop. So most ratios",
        "are below 1,",
        "and lower the more a system moves. The order of layouts is what it is for. Qwen3-32B is the other",
        "way round:",
        "NeMo RL spreads a generator over four devices, while steersman samples with whole weights on each,",
        "and 65 GB of",
        "weights leave room for few responses on 80 GB. The plan says so, and such a model wants a server",
        "that shares",
        "its weights out (`rollout.engine: vllm`).", "",
        f"Sampling one step ahead took {on['published'] / off['published']:.2f} times as long without it in",
        "NeMo RL's",
        f"table (16 GPUs, 8B); the simulation says {on['predicted'] / off['predicted']:.2f}.", "",
        "Assumed where the tables are silent: prompts of 150 tokens and lengths with a deviation of 0.7 of",
        "the mean (NeMo",
        "RL); prompts and responses of 1,024 tokens, all of them full (OpenRLHF's scripts); a critic and a",
        "reward model of",
        "350M (DeepSpeed-Chat's recipes), 264,292 samples of 256 + 256 tokens in steps of 1,024 (its",
        "benchmark settings).",
        "",
        "Sources: NVIDIA-NeMo/RL `docs/about/performance-summary.md`; OpenRLHF/OpenRLHF `README.md` (which",
        "calls its table",
        "outdated); arXiv 2308.01320 and microsoft/DeepSpeedExamples `BenckmarkSetting.md`. ReaLHF (arXiv",
        "2406.14088) and",
        "verl (arXiv 2409.19256) publish figures as plots, which are left out.", "",
    ]))  # fmt: skip


if __name__ == "__main__":
    main()
