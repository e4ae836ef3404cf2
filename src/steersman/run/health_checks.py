"""What the health watch looks for, and the limits from which it speaks.

Each check is a pure function of the history (one dict of numbers per iteration) and the limits; it gives a
sentence with the numbers that it saw and what to do, or None. What it reads, where it is there:
`reward/total`, `reward/<name>`, `kl` (nats per response), `entropy` (nats per token), `ratio_gap`
(max |logp_train - logp_rollout|), `explained_variance`, `finish/length`, `finish/eos` (shares),
`length/mean` (tokens), and `text/*` made from the responses themselves (`text_stats`). Offline preference methods
measure `held_out/kl` with `held_out/length` in the place of `kl` and `length/mean`, and the log-probabilities of the
given answers, `logp/<side>` (nats per answer), where a side is chosen and rejected, or liked and disliked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

from pydantic import Field

from steersman.run.config import Section

Row = dict[str, float]
Severity = Literal["note", "warning", "stop"]


class HealthConfig(Section):
    """When the health watch speaks."""

    kl_per_token: float = Field(default=0.5, gt=0, description="KL running away: nats per response token")
    kl_per_response: float = Field(
        default=50.0, gt=0, description="the same in nats per response, where lengths are unknown"
    )
    entropy_fraction: float = Field(
        default=0.2, ge=0, le=1, description="entropy collapse: below this fraction of its start"
    )
    entropy_floor: float = Field(default=0.02, ge=0, description="entropy collapse: below this, nats per token")
    distinct2_fraction: float = Field(
        default=0.75, ge=0, le=1, description="repetition: distinct-2 below this fraction of its start"
    )
    distinct2_floor: float = Field(
        default=0.5, ge=0, le=1, description="repetition: distinct-2 per response below this"
    )
    repeated_rise: float = Field(
        default=0.2, ge=0, le=1, description="repetition: share of words repeated at once, above its start by this"
    )
    unique_fraction: float = Field(
        default=0.3,
        ge=0,
        le=1,
        description="one answer to everything: share of different responses, fraction of its start",
    )
    expect_eos: bool = Field(default=True, description="false: responses are meant to fill the length limit")
    ratio_gap: float = Field(
        default=0.05, gt=0, description="rollout and training log-probabilities differ by this, nats"
    )
    critic_window: int = Field(
        default=10, gt=0, description="iterations of explained variance below 0 before it is named"
    )
    reward_window: int = Field(default=8, ge=3, description="iterations in each mean when rewards are compared")
    reward_sigma: float = Field(
        default=4.0, gt=0, description="reward hacking: by how many standard errors they part"
    )
    reward_ignore: list[str] = Field(
        default=["total", "kl", "penalty"], description="reward/<name> that are no reward of their own"
    )
    chosen_fall: float = Field(
        default=0.1, gt=0, description="chosen likelihood falls: by this share of its negative log-likelihood"
    )
    repeat_every: int = Field(default=20, gt=0, description="iterations before a finding that lasts is said again")


READ = {
    "step", "kl", "entropy", "ratio_gap", "explained_variance", "finish/length", "finish/eos", "length/mean",
    "held_out/kl", "held_out/length",
    *(f"{where}logp/{side}" for where in ("", "held_out/") for side in ("chosen", "rejected", "liked", "disliked")),
}  # fmt: skip
"""Numbers that the checks read, beside `reward/...` and `text/...`."""


def kl_runaway(history: list[Row], c: HealthConfig) -> str | None:
    last, length = _tail(history, "kl", 3), _tail(history, "length/mean", 1)
    if last is None and not any("kl" in row for row in history):
        last, length = _tail(history, "held_out/kl", 1), _tail(history, "held_out/length", 1)
    if last is None:
        return None
    kl = sum(last) / len(last)
    limit = c.kl_per_token * length[0] if length else c.kl_per_response
    if kl <= limit:
        return None
    per = f" over {length[0]:.0f} tokens" if length else ""
    return (
        f"KL to the reference runs away: {kl:.1f} nats per response{per}, limit {limit:.1f}. The policy has left "
        "the text that its reward was made for; raise the KL coefficient (beta) or lower the learning rate."
    )


def entropy_collapse(history: list[Row], c: HealthConfig) -> str | None:
    start, now = _start(history, "entropy"), _now(history, "entropy", 3)
    if start is None or now is None or now >= max(c.entropy_floor, c.entropy_fraction * start):
        return None
    return (
        f"entropy collapse: {now:.3f} nats per token, from {start:.3f} at the start. The policy hardly explores "
        "any more; lower the learning rate, raise the KL coefficient or add an entropy bonus."
    )


def repetition(history: list[Row], c: HealthConfig) -> str | None:
    start, now = _start(history, "text/distinct2"), _now(history, "text/distinct2", 2)
    rep_start, rep = _start(history, "text/repeated"), _now(history, "text/repeated", 2)
    if start is None or now is None or rep_start is None or rep is None:
        return None
    fell = now < c.distinct2_floor or now < c.distinct2_fraction * start
    rose = rep > rep_start + c.repeated_rise or rep > 1.5 * c.repeated_rise + 0.1
    if not (fell or rose):
        return None
    return (
        f"repetition collapse: distinct-2 per response is {now:.2f} (start {start:.2f}) and {rep:.0%} of the words "
        f"repeat one of the four before them (start {rep_start:.0%}). The policy earns its reward by saying the same "
        "thing again; read the samples, raise the KL coefficient, or let the reward count repetition."
    )


def same_answer(history: list[Row], c: HealthConfig) -> str | None:
    start, now = _start(history, "text/unique"), _now(history, "text/unique", 2)
    if start is None or now is None or now >= c.unique_fraction * start:
        return None
    return (
        f"one answer to everything: only {now:.0%} of the responses differ from each other (start {start:.0%}). "
        "Raise the KL coefficient or the temperature, and look at what the reward pays."
    )


def empty_answers(history: list[Row], c: HealthConfig) -> str | None:
    now = _now(history, "text/empty", 2)
    if now is None or now < 0.9:
        return None
    return f"{now:.0%} of the responses are empty: the policy ends at once. Set a minimum length, or mend the reward."


def all_cut(history: list[Row], c: HealthConfig) -> str | None:
    if not c.expect_eos or eos_never(history, c) is not None:
        return None
    cut = _tail(history, "finish/length", 3)
    if cut is None or len(cut) < 3 or min(cut) < 0.99:
        return None
    return (
        "every response of the last 3 iterations was cut by the length limit. Raise the limit, penalise a missing "
        "end of sequence, or set health.expect_eos to false if responses are meant to fill it."
    )


def eos_never(history: list[Row], c: HealthConfig) -> str | None:
    seen = [row["finish/eos"] for row in history if "finish/eos" in row]
    if not c.expect_eos or len(seen) < 3 or max(seen) > 0:
        return None
    return (
        f"no response has ended by itself in {len(seen)} iterations. Either the limit is short for this model, or "
        "it never learned its end of sequence (was EOS in the SFT loss?). If responses are meant to fill the limit, "
        "set health.expect_eos to false."
    )


def ratio_gap(history: list[Row], c: HealthConfig) -> str | None:
    gap = history[-1].get("ratio_gap", 0.0)
    if gap <= c.ratio_gap:
        return None
    return (
        f"log-probabilities recorded while sampling and computed for training differ by up to {gap:.3f} nats "
        f"(limit {c.ratio_gap}). The ratio is not 1 where it should be: temperature, precision, dropout or a cache "
        "differs between the two."
    )


def bad_critic(history: list[Row], c: HealthConfig) -> str | None:
    last = _tail(history, "explained_variance", c.critic_window)
    if last is None or len(last) < c.critic_window or sum(v < 0 for v in last) < 0.8 * len(last):
        return None
    return (
        f"the critic is worse than a constant: explained variance {sum(last) / len(last):.2f} on average over "
        f"{len(last)} iterations. Raise the critic's learning rate or its epochs, normalise the rewards, or begin "
        "from a reward model."
    )


def reward_hacking(history: list[Row], c: HealthConfig) -> str | None:
    names = {k for row in history for k in row if k.startswith("reward/") and k != "reward/total"}
    for key in sorted(names):
        if key.removeprefix("reward/") in c.reward_ignore:
            continue
        pairs = [(r["reward/total"], r[key]) for r in history if key in r and "reward/total" in r]
        found = _parted(pairs, c.reward_window, c.reward_sigma)
        if found is not None:
            (total0, total1), (other0, other1) = found
            return (
                f"reward hacking: the reward rose from {total0:.3f} to {total1:.3f} while {key} fell from "
                f"{other0:.3f} to {other1:.3f}. The policy has found what the reward pays for beside what you want; "
                "stop at the best checkpoint, raise the KL coefficient, or mend the reward."
            )
    return None


def chosen_falls(history: list[Row], c: HealthConfig) -> str | None:
    """On held-out answers where there are some, which are the same each time; else on means of five batches."""
    for good, bad in (("chosen", "rejected"), ("liked", "disliked")):
        held = any(f"held_out/logp/{good}" in row for row in history)
        where, span = ("held_out/", 1) if held else ("", 5)
        seen = [row for row in history if f"{where}logp/{good}" in row]
        if seen[-1:] != history[-1:] or len(seen) < 2 * span:
            continue
        first, last = (
            [_average(rows, f"{where}logp/{x}") for x in (good, bad)] for rows in (seen[:span], seen[-span:])
        )
        fall = first[0] - last[0]
        if fall <= max(c.chosen_fall * -first[0], 1.0):
            continue
        other = "" if math.isnan(first[1]) else f", and of {bad} ones from {first[1]:.1f} to {last[1]:.1f}"
        return (
            f"{good} likelihood falls: log pi of {good} answers went from {first[0]:.1f} to {last[0]:.1f} nats per "
            f"answer on {'held-out' if held else 'training'} data{other}. The loss asks for a difference alone, and "
            "gets it by making both unlikely; their probability goes to answers that nobody judged. Remedies: "
            "an NLL term (loss.nll, such as 0.2), a larger beta, a lower learning rate, or for pairs the loss dpop."
        )
    return None


Check = Callable[[list[Row], HealthConfig], str | None]
CHECKS: dict[str, tuple[Severity, Check]] = {
    "kl_runaway": ("warning", kl_runaway),
    "entropy_collapse": ("warning", entropy_collapse),
    "repetition": ("warning", repetition),
    "same_answer": ("warning", same_answer),
    "empty_answers": ("warning", empty_answers),
    "all_cut": ("note", all_cut),
    "eos_never": ("note", eos_never),
    "ratio_gap": ("warning", ratio_gap),
    "bad_critic": ("warning", bad_critic),
    "reward_hacking": ("warning", reward_hacking),
    "chosen_falls": ("warning", chosen_falls),
}


def _tail(history: list[Row], key: str, n: int) -> list[float] | None:
    """The last n values of a key, as many as there are; None where the newest row has none."""
    if key not in history[-1]:
        return None
    return [row[key] for row in history if key in row][-n:]


def _start(history: list[Row], key: str) -> float | None:
    first = [row[key] for row in history if key in row][:3]
    return sum(first) / len(first) if first else None


def _now(history: list[Row], key: str, n: int) -> float | None:
    last = _tail(history, key, n)
    return sum(last) / len(last) if last else None


def _parted(
    pairs: list[tuple[float, float]], n: int, sigma: float
) -> tuple[tuple[float, float], tuple[float, float]] | None:
    """Whether the first rose and the second fell, both by `sigma` standard errors, since the second was highest.

    Means over n rows, Welch's standard error. Gives ((first then, first now), (second then, second now)).
    """
    if len(pairs) < 2 * n:
        return None
    now = pairs[-n:]
    windows = [pairs[i : i + n] for i in range(len(pairs) - 2 * n + 1)]
    then = max(windows, key=lambda w: sum(second for _, second in w))
    rise = _welch([a for a, _ in then], [a for a, _ in now])
    fall = _welch([b for _, b in now], [b for _, b in then])
    if rise <= sigma or fall <= sigma:
        return None
    return (_mean([a for a, _ in then]), _mean([a for a, _ in now])), (
        _mean([b for _, b in then]),
        _mean([b for _, b in now]),
    )


def _average(rows: list[Row], key: str) -> float:
    """The mean of a key over the rows that have it; NaN where none has."""
    values = [row[key] for row in rows if key in row]
    return sum(values) / len(values) if values else math.nan


def _mean(x: Sequence[float]) -> float:
    return sum(x) / len(x)


def _welch(low: Sequence[float], high: Sequence[float]) -> float:
    """(mean of `high` - mean of `low`) in standard errors of that difference."""
    difference = _mean(high) - _mean(low)
    error = math.sqrt(sum(_variance(x) / len(x) for x in (low, high)))
    return difference / max(error, 1e-12)


def _variance(x: Sequence[float]) -> float:
    return sum((v - _mean(x)) ** 2 for v in x) / (len(x) - 1)
