"""What the health watch sees in the answers themselves: repetition, and answers that grow alike."""

from __future__ import annotations

from steersman.run.health.history import History
from steersman.run.health.limits import HealthConfig


def repetition(history: History, c: HealthConfig) -> str | None:
    """Silent on what was measured before the first step: a model's own habit is nothing that training did."""
    start, now = history.start("text/distinct2"), history.recent_mean("text/distinct2", 2)
    rep_start, rep = history.start("text/repeated"), history.recent_mean("text/repeated", 2)
    if start is None or now is None or rep_start is None or rep is None or history.latest.get("step") == 0:
        return None
    seen = (
        f"distinct-2 per response is {now:.2f} (start {start:.2f}) and {rep:.0%} of the words repeat one of the four "
        f"before them (start {rep_start:.0%})"
    )
    if _repeats_more(history, c):
        return f"repetition collapse: {seen}. {_remedy(history)}"
    if now < c.distinct2_floor or rep > 1.5 * c.repeated_rise + 0.1:
        return (
            f"repetition: {seen}. The answers repeated themselves about as much at the start, so training is not the "
            "cause; look at the model, its prompt format and the temperature."
        )
    return None


def answers_alike(history: History, c: HealthConfig) -> str | None:
    """Answers that grow alike, each of them varied within itself; the plainer findings go before it."""
    start, now = history.start("text/distinct2_all"), history.recent_mean("text/distinct2_all", 2)
    if start is None or now is None or now >= c.diversity_fraction * start:
        return None
    if _repeats_more(history, c) or same_answer(history, c) is not None or same_phrase(history, c) is not None:
        return None
    return (
        f"answers grow alike: distinct-2 over all answers together is {now:.2f} (start {start:.2f}, limit "
        f"{c.diversity_fraction * start:.2f}). Different prompts get the same words. {_remedy(history)}"
    )


def same_phrase(history: History, c: HealthConfig) -> str | None:
    start, now = history.start("text/phrase"), history.recent_mean("text/phrase", 2)
    if start is None or now is None or now <= start + c.phrase_rise:
        return None
    if _repeats_more(history, c) or same_answer(history, c) is not None:
        return None
    return (
        f"one phrase in most answers: {now:.0%} of the responses hold the same five words in a row (start "
        f"{start:.0%}). {_remedy(history)}"
    )


def same_answer(history: History, c: HealthConfig) -> str | None:
    start, now = history.start("text/unique"), history.recent_mean("text/unique", 2)
    if start is None or now is None or now >= c.unique_fraction * start:
        return None
    return (
        f"one answer to everything: only {now:.0%} of the responses differ from each other (start {start:.0%}). "
        f"{_remedy(history)}"
    )


def empty_answers(history: History, c: HealthConfig) -> str | None:
    now = history.recent_mean("text/empty", 2)
    if now is None or now < 0.9:
        return None
    return f"{now:.0%} of the responses are empty: the policy ends at once. Set a minimum length, or mend the reward."


def _repeats_more(history: History, c: HealthConfig) -> bool:
    """Whether responses repeat themselves more than they did at the start."""
    start, now = history.start("text/distinct2"), history.recent_mean("text/distinct2", 2)
    rep_start, rep = history.start("text/repeated"), history.recent_mean("text/repeated", 2)
    if start is None or now is None or rep_start is None or rep is None:
        return False
    return now < c.distinct2_fraction * start or rep > rep_start + c.repeated_rise


def _remedy(history: History) -> str:
    """What to do, in terms of a reward only where the run has one."""
    if any(key.startswith("reward/") for key in history.series):
        return (
            "Read the samples, raise the KL coefficient (beta) or the temperature, or let the reward count variety."
        )
    return "Read the samples, lower the learning rate, train for fewer steps, or make the data more varied."
