"""The health watch: names what goes wrong with a run while it goes wrong, and stops it at numbers that are none."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from steersman.ops.text import text_stats
from steersman.run.health.checks import CHECKS, READ, Severity
from steersman.run.health.history import History
from steersman.run.health.limits import HealthConfig
from steersman.types import Stats


@dataclass(frozen=True, slots=True)
class Finding:
    """Something seen: "note" and "warning" let the run go on, after "stop" it can not."""

    step: int
    code: str
    severity: Severity
    text: str


class HealthWatch:
    """Feed it each iteration's numbers and responses; it gives the findings that are new, or still there.

    The loop must stop on severity "stop". `state_dict` goes into the checkpoint, so that a resumed run is
    still measured against its start.
    """

    def __init__(self, config: HealthConfig | None = None) -> None:
        self.config = config or HealthConfig()
        self.history = History(length=self.config.critic_window, window=self.config.reward_window)
        self.findings: list[Finding] = []
        self._said: dict[str, int] = {}

    def update(self, step: int, stats: Stats, texts: Sequence[str] = ()) -> list[Finding]:
        row = {"step": float(step), **stats, **text_stats(texts)}
        broken = non_finite(step, row)
        if broken is not None:
            self.findings.append(broken)
            return [broken]
        self.history.add({k: float(v) for k, v in row.items() if k in READ or k.startswith(("reward/", "text/"))})
        new = []
        for code, (severity, check) in CHECKS.items():
            text = check(self.history, self.config)
            last = self._said.get(code)
            if text is not None and (last is None or step - last >= self.config.repeat_every):
                self._said[code] = step
                new.append(Finding(step, code, severity, text))
        self.findings += new
        return new

    def state_dict(self) -> dict[str, Any]:
        return {
            "history": self.history.state_dict(),
            "said": dict(self._said),
            "findings": [asdict(replace(f, text="")) for f in self.findings],  # health.jsonl has the texts
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history.load_state_dict(state["history"])
        self._said = dict(state["said"])
        self.findings = [Finding(**f) for f in state["findings"]]


def non_finite(step: int, stats: Stats) -> Finding | None:
    """A "stop" finding that names every number of the step that is NaN or infinite."""
    bad = [f"{k} = {v}" for k, v in stats.items() if not math.isfinite(v)]
    if not bad:
        return None
    return Finding(
        step, "non_finite", "stop",
        f"at step {step} {', '.join(bad)}. The run stops here; its last checkpoint is good. Usual causes: a "
        "learning rate that is too high, a reward of infinite size, float16 without a loss scale.",
    )  # fmt: skip
