"""What the health watch looks for, and the limits from which it speaks.

Each check is a pure function of the history (`history.History`) and the limits; it gives a
sentence with the numbers that it saw and what to do, or None. What it reads, where it is there:
`reward/total`, `reward/<name>`, `kl` (nats per response), `entropy` (nats per token), `ratio_gap`
(max |logp_train - logp_rollout|), `explained_variance`, `finish/length`, `finish/eos` (shares),
`length/mean` (tokens), and `text/*` made from the responses themselves (`text_stats`). Offline preference methods
measure `held_out/kl` with `held_out/length` in the place of `kl` and `length/mean`, and the log-probabilities of the
given answers, `logp/<side>` (nats per answer), where a side is chosen and rejected, or liked and disliked, and the
implicit reward's `margin` and `held_out/margin`. `lr` is the learning rate. `held_out/perplexity` is that of sampled
answers under the starting model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

from steersman.run.health.history import History, Series, mean_or_nan
from steersman.run.health.limits import HealthConfig
from steersman.run.health.text import answers_alike, empty_answers, repetition, same_answer, same_phrase

Severity = Literal["note", "warning", "stop"]

READ = {
    "step", "kl", "entropy", "ratio_gap", "explained_variance", "finish/length", "finish/eos", "length/mean",
    "held_out/kl", "held_out/length", "held_out/perplexity", "held_out/margin", "margin", "lr",
    *(f"{where}logp/{side}" for where in ("", "held_out/") for side in ("chosen", "rejected", "liked", "disliked")),
}  # fmt: skip
"""Numbers that the checks read, beside `reward/...` and `text/...`."""


def kl_runaway(history: History, c: HealthConfig) -> str | None:
    last, length = history.last("kl", 3), history.last("length/mean", 1)
    if last is None and not history.of("kl").count:
        last, length = history.last("held_out/kl", 1), history.last("held_out/length", 1)
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


def entropy_collapse(history: History, c: HealthConfig) -> str | None:
    start, now = history.start("entropy"), history.recent_mean("entropy", 3)
    if start is None or now is None or now >= max(c.entropy_floor, c.entropy_fraction * start):
        return None
    if start <= c.entropy_floor:
        return (
            f"no entropy: {start:.3f} nats per token from the start. The policy answers the same each time, so there "
            "is little to choose from; raise rollout.temperature, or begin from a model that is less sure."
        )
    return (
        f"entropy collapse: {now:.3f} nats per token, from {start:.3f} at the start. The policy hardly explores "
        "any more; lower the learning rate, raise the KL coefficient or add an entropy bonus."
    )


def all_cut(history: History, c: HealthConfig) -> str | None:
    if not c.expect_eos or eos_never(history, c) is not None:
        return None
    cut = history.last("finish/length", 3)
    if cut is None or len(cut) < 3 or min(cut) < 0.99:
        return None
    return (
        "every response of the last 3 iterations was cut by the length limit. Raise the limit, penalise a missing "
        "end of sequence, or set health.expect_eos to false if responses are meant to fill it."
    )


def eos_never(history: History, c: HealthConfig) -> str | None:
    seen = history.of("finish/eos")
    if not c.expect_eos or seen.count < 3 or seen.high > 0:
        return None
    return (
        f"no response has ended by itself in {seen.count} iterations. Either the limit is short for this model, or "
        "it never learned its end of sequence (was EOS in the SFT loss?). If responses are meant to fill the limit, "
        "set health.expect_eos to false."
    )


def ratio_gap(history: History, c: HealthConfig) -> str | None:
    gap = history.latest.get("ratio_gap", 0.0)
    if gap <= c.ratio_gap:
        return None
    return (
        f"log-probabilities recorded while sampling and computed for training differ by up to {gap:.3f} nats "
        f"(limit {c.ratio_gap}). The ratio is not 1 where it should be: temperature, precision, dropout or a cache "
        "differs between the two."
    )


def bad_critic(history: History, c: HealthConfig) -> str | None:
    last = history.last("explained_variance", c.critic_window)
    if last is None or len(last) < c.critic_window or sum(v < 0 for v in last) < 0.8 * len(last):
        return None
    return (
        f"the critic is worse than a constant: explained variance {sum(last) / len(last):.2f} on average over "
        f"{len(last)} iterations. Raise the critic's learning rate or its epochs, normalise the rewards, or begin "
        "from a reward model."
    )


def reward_hacking(history: History, c: HealthConfig) -> str | None:
    for key, pairs in sorted(history.partings.items()):
        if key.removeprefix("reward/") in c.reward_ignore:
            continue
        found = pairs.diverged(c.reward_window, c.reward_sigma)
        if found is not None:
            (total0, total1), (other0, other1) = found
            return (
                f"reward hacking: the reward rose from {total0:.3f} to {total1:.3f} while {key} fell from "
                f"{other0:.3f} to {other1:.3f}. The policy has found what the reward pays for beside what you want; "
                "stop at the best checkpoint, raise the KL coefficient, or mend the reward."
            )
    return None


def chosen_falls(history: History, c: HealthConfig) -> str | None:
    """On held-out answers where there are some, which are the same each time; else on means of five batches."""
    for good, bad in (("chosen", "rejected"), ("liked", "disliked")):
        held = history.of(f"held_out/logp/{good}").count > 0
        where, span = ("held_out/", 1) if held else ("", 5)
        seen = [history.of(f"{where}logp/{x}") for x in (good, bad)]
        if f"{where}logp/{good}" not in history.latest or seen[0].count < 2 * span:
            continue
        first = [mean_or_nan(x.first[:span]) for x in seen]
        last = [mean_or_nan(x.last[-span:]) for x in seen]
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


def nothing_moved(history: History, c: HealthConfig) -> str | None:
    """By KL to the reference, and by the margin of given pairs, on held-out ones where there are some; where both are
    measured, neither has moved. While the rate still rises to its peak nothing is said."""
    rates, step = history.of("lr").last, history.latest.get("step", 0.0)
    if step < c.still_steps or (len(rates) > 1 and rates[-1] > rates[-2]):
        return None
    kl = next((k for k in ("kl", "held_out/kl") if history.of(k).count), "held_out/kl")
    margin = "held_out/margin" if history.of("held_out/margin").count else "margin"
    asked = [k for k in (margin, kl) if history.of(k).count]
    if not any(k in history.latest and history.of(k).count > 1 for k in asked):
        return None
    moved = {k: _range(history.of(k), from_start=k == margin) for k in asked}
    if any(x > (c.still_margin if margin in asked else c.still_kl) for x in moved.values()):
        return None
    names = {kl: "KL to the reference (nats per response)", margin: "the margin of the pairs"}
    said = " and ".join(f"{names[k]} by {x:.1e}" for k, x in moved.items())
    return (
        f"nothing moves: in {step:.0f} steps there changed {said} at most. The updates are too small to see; raise "
        "the learning rate, shorten the warm-up, or see whether all answers get the same reward."
    )


def _range(values: Series, *, from_start: bool) -> float:
    """How far a number ever was from its first value, or from 0."""
    origin = values.first[0] if from_start else 0.0
    return max(abs(values.low - origin), abs(values.high - origin))


def strange_answers(history: History, c: HealthConfig) -> str | None:
    seen = history.of("held_out/perplexity")
    if "held_out/perplexity" not in history.latest or seen.last[-1] <= c.perplexity_factor * seen.first[0]:
        return None
    return (
        "answers turn strange: on held-out prompts their perplexity under the starting model went from "
        f"{seen.first[0]:.2f} to {seen.last[-1]:.2f} (limit {c.perplexity_factor:g} times). The policy writes what "
        "that model would not; read the samples, lower the learning rate or raise beta."
    )


Check = Callable[[History, HealthConfig], str | None]
CHECKS: dict[str, tuple[Severity, Check]] = {
    "kl_runaway": ("warning", kl_runaway),
    "entropy_collapse": ("warning", entropy_collapse),
    "repetition": ("warning", repetition),
    "answers_alike": ("warning", answers_alike),
    "same_phrase": ("warning", same_phrase),
    "same_answer": ("warning", same_answer),
    "empty_answers": ("warning", empty_answers),
    "all_cut": ("note", all_cut),
    "eos_never": ("note", eos_never),
    "ratio_gap": ("warning", ratio_gap),
    "bad_critic": ("warning", bad_critic),
    "reward_hacking": ("warning", reward_hacking),
    "chosen_falls": ("warning", chosen_falls),
    "nothing_moved": ("warning", nothing_moved),
    "strange_answers": ("warning", strange_answers),
}
