"""What the training verbs tell before they start: batch vocabulary and data."""

from __future__ import annotations

from steersman.data import Summary
from steersman.run.device import device_text, resolve_dtype
from steersman.run.preflight import Preflight
from steersman.train.session import Session


def describe_run(pre: Preflight, session: Session, batch: int, updates: int, data: Summary) -> None:
    """The lines that every offline verb has, and three rendered samples."""
    run = session.config
    pre.fact("run folder", str(session.path))
    pre.fact("device", device_text(session.device, resolve_dtype(session.recipe.model.dtype, session.device)))
    for line in data.lines:
        pre.fact("data", line)
    pre.fact("examples per update", batch)
    pre.fact("optimizer updates", updates)
    pre.fact("micro-batches", f"of up to {run.micro_tokens:,} padded tokens, sorted by length")
    for sample in data.samples:
        pre.sample(sample)
