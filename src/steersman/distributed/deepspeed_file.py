"""DeepSpeed's own JSON: what of it is taken, and what the recipe says in its place.

Source: https://www.deepspeed.ai/docs/config-json, version 0.19.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steersman.guards.untrusted import parse_json

TAKEN = {"communication_data_type", "comms_logger", "steps_per_print", "zero_allow_untested_optimizer"}
IN_ZERO = {
    "stage", "allgather_bucket_size", "allgather_partitions", "contiguous_gradients", "ignore_unused_parameters",
    "overlap_comm", "reduce_bucket_size", "reduce_scatter", "round_robin_gradients",
    "use_multi_rank_bucket_allreduce",
}  # fmt: skip
NOT_IN = {
    1: {"overlap_comm": "stages 2 and 3"},
    2: {},
    3: dict.fromkeys(
        ("allgather_bucket_size", "allgather_partitions", "ignore_unused_parameters", "round_robin_gradients",
         "use_multi_rank_bucket_allreduce"), "stages 1 and 2",
    ),
}  # fmt: skip
"""Of each stage: what it does not read of the above, and which do."""
SAID = {
    "optimizer": "optimizer",
    "scheduler": "optimizer.schedule and optimizer.warmup",
    "train_batch_size": "train.batch_size, or rollout.prompts and algorithm.minibatches",
    "train_micro_batch_size_per_gpu": "run.micro_tokens",
    "gradient_accumulation_steps": "run.micro_tokens",
    "gradient_clipping": "optimizer.max_grad_norm",
    "fp16": "model.dtype", "bf16": "model.dtype", "amp": "model.dtype", "torch_autocast": "model.dtype",
    "activation_checkpointing": "model.gradient_checkpointing",
    "seed": "run.seed",
    "tensorboard": "run.sinks", "wandb": "run.sinks", "csv_monitor": "run.sinks",
}  # fmt: skip
"""Their key: the recipe's key that says it here."""
LARGEST = 1 << 20


def read_deepspeed(path: Path, stage: int, clips: Mapping[str, float]) -> dict[str, Any]:
    """The file's settings that `deepspeed.initialize` takes beside the recipe's.

    What is "auto", false or not enabled asks for nothing and is left out. The stage and the clip may be said again
    where they are the recipe's; `clips` are its clips by key, one for each optimizer. Raises ValueError for what can
    not be read, for another stage or clip, and for keys that the recipe answers, or nothing here does.
    """
    asked = _wanted(_read(path))
    clip = asked.pop("gradient_clipping", None)
    for key, own in clips.items():
        if clip not in (None, own):
            why = f"gradient_clipping is {clip}, and {key} is {own}"
            raise ValueError(f"deepspeed {path}: {why}; set {key} to {clip}, or take it out of the file")
    zero = asked.pop("zero_optimization", {})
    for key in asked.keys() - TAKEN:
        raise _refused(path, key, f"is said by {SAID[key]} here" if key in SAID else "is not for steersman")
    if not isinstance(zero, dict):
        raise _refused(path, "zero_optimization", "is no mapping")
    zero = _wanted(zero) | {key: False for key, value in zero.items() if value is False and key in IN_ZERO}
    zero.setdefault("stage", stage)
    if zero["stage"] != stage:
        raise _refused(path, "zero_optimization.stage", f"is {zero['stage']}, and parallel.mode is zero{stage}")
    for key in zero.keys() - IN_ZERO:
        raise _refused(path, f"zero_optimization.{key}", "is not for steersman")
    for key, stages in NOT_IN[stage].items():
        if zero.get(key):
            raise _refused(path, f"zero_optimization.{key}", f"goes with {stages}, and parallel.mode is zero{stage}")
    return asked | {"zero_optimization": zero}


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"it has more than {LARGEST:,} bytes")
        found = parse_json(path.read_text(encoding="utf-8"), str(path))
    except (OSError, ValueError) as error:
        raise ValueError(f"deepspeed {path}: it can not be read as JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"deepspeed {path}: it is no mapping of DeepSpeed's keys")
    return found


def _wanted(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings without those that ask for nothing."""

    def idle(value: Any) -> bool:
        off = isinstance(value, dict) and value.get("enabled") in (False, "auto")
        return off or value is None or value is False or value == "auto"

    return {key: value for key, value in settings.items() if not idle(value)}


def _refused(path: Path, key: str, why: str) -> ValueError:
    return ValueError(f"deepspeed {path}: {key} {why}; take it out of the file")
