"""Asking a judge: both orders, the cache, the budget, and replies that can not be read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from steersman.data.examples import Content
from steersman.distributed.ranks import ranks
from steersman.guards.terminal import say
from steersman.judge import prompts
from steersman.judge.cache import Reply, ReplyCache, UnansweredError, key_of
from steersman.judge.config import JudgeConfig
from steersman.judge.endpoint import Endpoint, Lose
from steersman.judge.local import Local, expected, likeliest
from steersman.judge.prompts import Question
from steersman.judge.scored import Scorer, as_text
from steersman.run.files.ledger import StoppedError
from steersman.types import Need, Stats, SteersmanError

MOST_FAILED = 10
"""Questions without a reply, one after another, behind which the judge and not the questions is to blame."""


class InterruptedJudgeError(SteersmanError, StoppedError):
    """A signal asked the run to stop while the judge was at work; what was judged is kept."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """How one answer did against another: `share` 1 won, 0 lost, 0.5 tied.

    `consistent` is False where the judge contradicted itself when the answers changed places, which is a tie.
    """

    share: float
    consistent: bool = True


class Judge:
    """Compares pairs of answers, or grades answers; every reply is kept in the cache as it comes.

    A comparison is asked in both orders, (a, b) and (b, a): won or lost only where both say so, else a tie. A
    reward sees no order and is asked once. Equal answers are a tie and cost nothing; equal questions are asked
    once. `counts` tell what happened since the judge was opened, `stopping` is asked between questions.

    Source: MT-Bench, arXiv 2306.05685, section 3.4 (swapping positions; contradictions are ties).
    """

    def __init__(
        self, config: JudgeConfig, cache: Path | None = None, *, stopping: Callable[[], bool] = lambda: False,
        device: Any = "cpu",
    ) -> None:  # fmt: skip
        self.config, self.stopping, self.counts = config, stopping, Counter[str]()
        self.endpoint = Endpoint(config.endpoint, "judge") if config.endpoint is not None else None
        self.local: Local | None = None
        self._load()
        self.scorer = Scorer(config.reward, device) if config.reward else None
        self.failed: dict[Question, str] = {}
        """Questions that the judge was asked and that got no reply, and why."""
        self._failed_in_a_row = 0
        path = Path(config.cache) if config.cache is not None else cache
        self.cache = ReplyCache(None if self.scorer is not None else path)
        self.spent = Counter(calls=0, tokens=0)
        for reply in self.cache.replies.values():
            self._pay(reply)

    def _load(self) -> None:
        """Loads a judge that is a model on this machine."""
        if self.config.local is not None:
            self.local = Local(self.config.local)

    def needs(self, rows: Sequence[Mapping[str, Any]]) -> list[Need]:
        """The columns that the judge, where it is a reward, needs of every prompt's row. Raises SteersmanError for
        one that no row has."""
        return [] if self.scorer is None else self.scorer.needs(rows)

    def compare(
        self, items: Sequence[tuple[Content, str, str]], columns: Sequence[dict[str, Any]] | None = None
    ) -> list[Comparison | None]:
        """For each (prompt, a, b) how a did; None where no verdict was to be had and the recipe drops those.

        `columns` are the prompts' rows, for rewards that are functions of them.

        None, too, where a question got no reply and the recipe drops those.

        Raises SteersmanError where the judge fails for good, the budget is spent, or a question has no reply, or a
        reply no verdict, and the recipe says stop: what was judged is kept, and the same call goes on from there.
        """
        self.counts["comparisons"] += len(items)
        asked = [Question(as_text(p), a, b) for p, a, b in items]
        if self.scorer is not None:
            found = self._by_score(items, columns)
        else:
            swapped = [replace(q, first=q.second or "", second=q.first) for q in asked]
            once = [
                q for pair in zip(asked, swapped, strict=True) for q in pair if q.first.strip() != _bare(q.second)
            ]
            replies = self._replies(once)
            found = [self._both(replies, *pair) for pair in zip(asked, swapped, strict=True)]
        for outcome in found:
            self.counts["ties"] += outcome is not None and outcome.share == 0.5
            self.counts["contradictions"] += outcome is not None and not outcome.consistent
        return found

    def grade(
        self, items: Sequence[tuple[Content, str]], columns: Sequence[dict[str, Any]] | None = None
    ) -> list[float | None]:
        """A grade for each (prompt, answer), on the recipe's scale, or a reward's own; None where there is none.

        A reply without grade, where the recipe calls those ties, counts as the middle of the scale.
        Raises SteersmanError as `compare` does.
        """
        if self.scorer is not None:
            return list(self.scorer([p for p, _ in items], [a for _, a in items], columns)["total"])
        low, high = self.config.scale
        asked = [Question(as_text(p), a) for p, a in items]
        replies = self._replies(asked)
        return [self._read(replies, q, (low + high) / 2) for q in asked]

    def describe(self) -> str:
        """One line: what kind of judge, which model."""
        if self.config.endpoint is not None:
            return f"{self.config.endpoint.model} at {self.config.endpoint.url}"
        return f"model {self.config.local.path}" if self.config.local else f"reward: {self._scorer.describe()}"

    def stats(self) -> Stats:
        """`judge/...` shares since the judge was opened, the same for a resumed run as for a whole one; but
        `judge/retries`, the requests sent to an endpoint again, for each question, are those of this process."""
        n, out = self.counts["comparisons"], {}
        if n:
            out = {f"judge/{k}": self.counts[k] / n for k in ("ties", "contradictions")}
        questions = self.counts["questions"]
        if questions:
            out |= {
                f"judge/{k}": self.counts[k] / questions
                for k in ("unparsable", "cut", "failed", "unjudged", "claims")
            }
            if self.endpoint is not None:
                out["judge/retries"] = self.endpoint.retried / questions
        return out

    @property
    def _scorer(self) -> Scorer:
        assert self.scorer is not None
        return self.scorer

    def _by_score(
        self, items: Sequence[tuple[Content, str, str]], columns: Sequence[dict[str, Any]] | None
    ) -> list[Comparison | None]:
        out: list[Comparison | None] = [Comparison(0.5)] * len(items)
        unlike = [i for i, (_, a, b) in enumerate(items) if a.strip() != b.strip()]
        if not unlike:
            return out
        pairs = [i for i in unlike for _ in range(2)]
        asked, answers = [items[i][0] for i in pairs], [x for i in unlike for x in items[i][1:]]
        twice = None if columns is None else [columns[i] for i in pairs]
        scores = self._scorer(asked, answers, twice, pairs)["total"]
        for i, a, b in zip(unlike, scores[::2], scores[1::2], strict=True):
            tie = abs(a - b) <= self.config.tie_margin
            out[i] = Comparison(0.5 if tie else float(a > b))
        return out

    def _both(self, replies: dict[Question, Reply], asked: Question, swapped: Question) -> Comparison | None:
        if asked.first.strip() == _bare(asked.second):
            return Comparison(0.5)
        first, second = self._read(replies, asked, 0.5), self._read(replies, swapped, 0.5)
        if first is None or second is None:
            return None
        agree = first == 1 - second
        return Comparison(first if agree else 0.5, consistent=agree)

    def _read(self, replies: dict[Question, Reply], asked: Question, middle: float) -> float | None:
        """The share or grade that the reply to a question gives."""
        self.counts["questions"] += 1
        self.counts["claims"] += prompts.claims(asked.first) or prompts.claims(asked.second or "")
        reply = replies.get(asked)
        if reply is None:
            self.counts["failed" if asked in self.failed else "unjudged"] += 1
            return None
        compares = asked.second is not None
        if "logp" in reply:
            return likeliest(reply["logp"], self.config.tie_margin) if compares else expected(reply["logp"])
        text, cut = str(reply.get("text", "")), bool(reply.get("cut"))
        self.counts["cut"] += cut
        found = None if cut else self._said(text, asked)
        if found is None:
            self.counts["unparsable"] += 1
            if self.config.on_unparsable == "stop":
                wanted = "verdict" if compares else f"grade within {list(self.config.scale)}"
                template = "judge.compare" if compares else "judge.grade"
                how = "was cut by the limit, and what it says before that is no" if cut else "holds no"
                mend = "Raise max_tokens of judge.endpoint or judge.local" if cut else f"Change {template}"
                raise SteersmanError(
                    f"judge {self.describe()}: the reply {text[-160:]!r} {how} {wanted} (question on the prompt "
                    f"{asked.prompt[:80]!r}). {mend}, or set judge.on_unparsable to drop or tie"
                )
            return middle if self.config.on_unparsable == "tie" else None
        return found

    def _said(self, text: str, asked: Question) -> float | None:
        """The verdict or grade in a whole reply."""
        return prompts.verdict(text) if asked.second is not None else prompts.grade(text, *self.config.scale)

    def _replies(self, questions: Sequence[Question]) -> dict[Question, Reply]:
        """Replies from the cache, and from the judge where the cache has none."""
        keys = {q: self._key(q) for q in questions}
        new = [q for q in keys if keys[q] not in self.cache]
        texts = [self._text(q) for q in new]

        def keep(index: int, reply: Reply) -> None:
            asked = new[index]
            self.cache.add(keys[asked], reply, {"prompt": asked.prompt, "first": asked.first, "second": asked.second})
            self._pay(reply)
            self.failed.pop(asked, None)
            self._failed_in_a_row = 0

        def lose(index: int, error: UnansweredError) -> SteersmanError | None:
            asked = new[index]
            self.failed[asked] = str(error)
            self._failed_in_a_row = 0 if error.refused else self._failed_in_a_row + 1
            told = type(error)(f"{error} (question on the prompt {asked.prompt[:80]!r})")
            if self.config.on_failed == "stop":
                return type(error)(f"{told}. To leave such questions out, set judge.on_failed to drop")
            none = not self.cache.replies and len(self.failed) >= MOST_FAILED
            if none or self._failed_in_a_row >= MOST_FAILED:
                return told
            say(f"left out: {told}")
            return None

        try:
            self._ask(new, texts, keep, lose)
            lost = [q for q in new if q in self.failed]
            if lost and not self.cache.replies:
                raise SteersmanError(f"{self.failed[lost[0]]} (question on the prompt {lost[0].prompt[:80]!r})")
        except SteersmanError as error:
            raise type(error)(f"{error}. {self._kept(keys.values())}") from error
        missing = [q for q in new if keys[q] not in self.cache and q not in self.failed]
        if missing and self.stopping():
            raise InterruptedJudgeError(f"the judge was interrupted. {self._kept(keys.values())}")
        if missing and self.config.on_budget == "stop":
            raise SteersmanError(
                f"judge {self.describe()}: the budget is spent ({self.spent['calls']:,} replies, "
                f"{self.spent['tokens']:,} tokens) with {len(missing):,} questions open. "
                f"{self._kept(keys.values())}; raise judge.max_calls or judge.max_tokens, or let "
                "judge.on_budget drop the rest"
            )
        return {q: self.cache[k] for q, k in keys.items() if k in self.cache}

    def _ask(self, new: list[Question], texts: list[str], keep: Callable[[int, Reply], None], lose: Lose) -> None:
        if self.endpoint is not None:
            under_way = 0

            def may_ask() -> bool:
                # Requests under way are paid for when they come back, so count them before.
                nonlocal under_way
                if not self._may_ask(under_way - self.spent["calls"] + before):
                    return False
                under_way += 1
                return True

            def lose_unpaid(index: int, error: UnansweredError) -> SteersmanError | None:
                nonlocal under_way
                under_way -= 1
                return lose(index, error)

            before = self.spent["calls"]
            self.endpoint.ask(texts, keep, may_ask, lose_unpaid)
            return
        assert self.local is not None
        if self.config.local is not None and self.config.local.read == "text":
            self.local.write(texts, keep, self._may_ask, lose)
            return
        for compares in (True, False):
            rows = [i for i, q in enumerate(new) if (q.second is not None) == compares]
            if rows:
                self.local.weigh(
                    [texts[i] for i in rows],
                    self._verdicts(compares),
                    lambda r, reply, rows=rows: keep(rows[r], reply),
                    self._may_ask,
                    lose=lambda r, error, rows=rows: lose(rows[r], error),
                )

    def _verdicts(self, compares: bool) -> list[str]:
        low, high = self.config.scale
        return ["A", "B", "C"] if compares else [str(grade) for grade in range(low, high + 1)]

    def _may_ask(self, under_way: int = 0) -> bool:
        calls, tokens = self.config.max_calls, self.config.max_tokens
        within = calls is None or self.spent["calls"] + under_way < calls
        return within and (tokens is None or self.spent["tokens"] < tokens) and not self.stopping()

    def _pay(self, reply: Reply) -> None:
        self.spent.update(calls=1, tokens=int(reply.get("tokens", 0)))

    def _kept(self, keys: Any) -> str:
        keys = list(keys)
        done = sum(k in self.cache for k in keys)
        told = f"{done:,} of {len(keys):,} questions are answered"
        where = f" in {self.cache.path}; run again with --resume to go on from there" if self.cache.path else ""
        return f"{told} and kept{where}" if done else told

    def _text(self, asked: Question) -> str:
        low, high = self.config.scale
        code = prompts.code_of(asked.prompt, asked.first, asked.second or "")
        values = {"rubric": self.config.rubric, "prompt": asked.prompt, "low": low, "high": high, "code": code}
        if asked.second is None:
            return prompts.fill(self.config.grade or prompts.GRADE, values | {"answer": asked.first})
        return prompts.fill(
            self.config.compare or prompts.COMPARE, values | {"first": asked.first, "second": asked.second}
        )

    def _key(self, asked: Question) -> str:
        """Of judge, template and texts, and of the grades that were weighed; where and how it is reached (address,
        key, pace) does not matter."""
        config: Any = self.config.endpoint or self.config.local
        how = {"url", "timeout", "retries", "max_wait", "concurrency", "key_env", "batch", "device"}
        grades = asked.second is None and self.config.local is not None and self.config.local.read == "logp"
        weighed = [self._verdicts(compares=False)] if grades else []
        return key_of(config.model_dump(mode="json", exclude=how), self._text(asked), *weighed)


class SharedJudge(Judge):
    """A judge that all ranks ask with the same items, and that gives all the same answers: a model or a server is
    asked by rank 0, which alone loads it, and a reward shares out its rows."""

    def _load(self) -> None:
        ranks().from_main(super()._load, "the judge's model")

    def compare(
        self, items: Sequence[tuple[Content, str, str]], columns: Sequence[dict[str, Any]] | None = None
    ) -> list[Comparison | None]:
        if self.scorer is not None:
            return super().compare(items, columns)
        return ranks().from_main(lambda: Judge.compare(self, items, columns), "the judge")

    def grade(
        self, items: Sequence[tuple[Content, str]], columns: Sequence[dict[str, Any]] | None = None
    ) -> list[float | None]:
        if self.scorer is not None:
            return super().grade(items, columns)
        return ranks().from_main(lambda: Judge.grade(self, items, columns), "the judge")


def open_judge(
    config: JudgeConfig, folder: Path, *, stopping: Callable[[], bool] = lambda: False, device: Any = "cpu"
) -> Judge:
    """The recipe's judge with its cache in the run folder, unless the recipe names another file."""
    return Judge(config, folder / "judge.jsonl", stopping=stopping, device=device)


def _bare(text: str | None) -> str | None:
    return None if text is None else text.strip()
