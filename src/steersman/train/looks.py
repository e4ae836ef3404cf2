"""What looks at held-out prompts have in common, whatever is measured there.

A look answers the same prompts with the same random streams as the one before. What is said of the answers differs:

    verbs/rl.py RewardLooks                the run's reward, the distance to the reference of what was sampled from
    train/reference_looks.py               the whole distributions' distance to the reference, for offline verbs
    distill/teacher_looks.py               the same to the teacher, and the loss on given answers
    flywheel/flywheel.py Flywheel.look     the judge's grades and the watched reward, as tables of a loop's rounds
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from steersman.train.session import Session
from steersman.types import Sample, Stats


def answer_row(sample: Sample) -> dict[str, Any]:
    """An answer as `samples.jsonl` holds it."""
    return {
        "index": sample.prompt.index,
        "prompt": sample.prompt.text,
        "completion": sample.text,
        "finish": sample.finish,
    }


def standard_error(name: str, values: Tensor) -> Stats:
    """`NAME` is the standard error of the mean over prompts, where there are several: 1.96 of it to each side are a
    95% interval."""
    return {name: float(values.double().std()) / math.sqrt(len(values))} if len(values) > 1 else {}


def first_and_last(session: Session) -> tuple[Stats, Stats]:
    """The `held_out/...` numbers of the first and the newest look in the log, which a resumed run goes on with."""
    rows = [{k: v for k, v in row.items() if k.startswith("held_out/")} for row in session.metrics()]
    looks = [row for row in rows if row] or [{}]
    return looks[0], looks[-1]


def before_and_after(before: Stats, after: Stats) -> Stats:
    """Both looks by name, as a run's summary holds them."""
    named = (("before", before), ("after", after))
    return {f"{k.removeprefix('held_out/')}_{when}": v for when, look in named for k, v in look.items()}
