"""Whoever answers prompts: a model, loaded when it is needed, and its answers as rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from steersman.data import DataConfig, Query, encode_prompts, layout
from steersman.data.examples import Content, user
from steersman.data.load import prompts
from steersman.distributed.micro import over_rows
from steersman.flywheel.sections import Unfinished
from steersman.model import Policy, context_length, whole_weights
from steersman.ops.masked import masked_sum
from steersman.ops.text import whole_sentences
from steersman.recipe.sections import PLACE_ONLY, ModelConfig, RolloutConfig
from steersman.rollout import Generator
from steersman.run.files.ledger import Ledger
from steersman.run.files.pieces import Rows
from steersman.run.run_config import RunConfig
from steersman.setup.generators import open_generator, piece_size, sample_on_all_ranks
from steersman.setup.models import policy_from
from steersman.train.experience import tokens_of
from steersman.types import Progress, Sample, SteersmanError


class Player:
    """A frozen model that answers; its weights are read at the first question and let go by `release`, or at the end
    of a `with` block."""

    def __init__(self, config: ModelConfig, run: RunConfig, device: torch.device) -> None:
        self.config, self.run, self.device = config, run, device
        self._policy: Policy | None = None
        self._engine: Generator | None = None

    @property
    def policy(self) -> Policy:
        if self._policy is None:
            self._policy = policy_from(self.config, self.run, self.device, trainable=False)
        return self._policy

    def engine(self, rollout: RolloutConfig) -> Generator:
        """What samples from it, opened at the first call and closed by `release`."""
        if self._engine is None:
            self._engine = open_generator(rollout, self.policy)
        return self._engine

    def answer(
        self, queries: Sequence[Query], places: Sequence[int], data: DataConfig, rollout: RolloutConfig, *,
        n: int, seed: Sequence[int], progress: Progress | None = None,
    ) -> tuple[Rows, list[Sample]]:  # fmt: skip
        """`n` answers to the queries at `places`, as rows and as samples; a query too long may be left out.

        A row has `prompt` (text or turns), `completion`, `index` (of its query), `sample`, `finish`, `tokens`.
        """
        asked, _, _ = encode_prompts(
            [queries[i] for i in places], layout(self.policy, data), data,
            context_length(self.policy.model), rollout.max_new_tokens,
        )  # fmt: skip
        found = [places[p.index] for p in asked]
        for prompt, place in zip(asked, found, strict=True):
            prompt.index = place  # the random stream is the query's, whatever batch it stands in
        with whole_weights(self.policy):
            samples = sample_on_all_ranks(
                self.engine(rollout), asked, rollout.sampling(), n=n, seed=list(seed), progress=progress
            )
        rows = [
            {
                "prompt": queries[s.prompt.index].prompt, "completion": s.text, "index": s.prompt.index,
                "sample": s.index, "finish": s.finish, "tokens": len(s.ids),
            }
            for s in samples
        ]  # fmt: skip
        return rows, samples

    def answers(
        self, ledger: Ledger, name: str, queries: Sequence[Query], places: Sequence[int], data: DataConfig,
        rollout: RolloutConfig, *, n: int, seed: Sequence[int], **about: Any,
    ) -> Rows:  # fmt: skip
        """Table: the rows of `answer`, kept as they come."""

        def make(span: range, progress: Progress) -> Rows:
            some = places[span.start : span.stop]
            return self.answer(queries, some, data, rollout, n=n, seed=seed, progress=progress)[0]

        return ledger.parts(
            name, len(places), make, size=piece_size(rollout, n), model=ledger.model(self.config.path),
            streams=list(seed), samples=n, rollout=rollout.model_dump(exclude={"held_out", *PLACE_ONLY}), **about,
        )  # fmt: skip

    @torch.no_grad()
    def logp(self, samples: Sequence[Sample], temperature: float = 1.0) -> list[float]:
        """log-probability (nats) of each answer under this model's whole distribution."""
        tokens = tokens_of(samples).untruncated()
        logp = over_rows(
            tokens,
            self.run.micro_tokens,
            lambda part: self.policy.logp(part, temperature=temperature).logp,
            tokens.response.shape[1],
        )
        return masked_sum(logp, tokens.mask, dim=-1).tolist()

    def __enter__(self) -> Player:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Gives the memory back, and ends what samples elsewhere."""
        if self._engine is not None:
            self._engine.close()
        self._policy = self._engine = None


def load_queries(data: DataConfig, held: int, *, wrap: bool) -> tuple[list[Query], list[Query]]:
    """Training prompts and held ones; without held-out rows the last few training prompts are looked at.

    With `wrap` plain-text prompts become a user's turn.
    """
    loaded = prompts(data)
    for query in [*loaded.train, *loaded.held_out]:
        if wrap and isinstance(query.prompt, str):
            query.prompt = user(query.prompt)
    if not loaded.held_out and len(loaded.train) <= held:
        raise SteersmanError(
            f"data: {len(loaded.train)} prompts, and rollout.held_out is {held}: none is left to train on"
        )
    if loaded.held_out or not held:
        return loaded.train, loaded.held_out[:held]
    return loaded.train[:-held], loaded.train[-held:]


def met_in(row: dict[str, Any]) -> tuple[int, int]:
    """Which answers are compared with each other: those to one prompt, or of one duel."""
    return row["index"], row.get("duel", -1)


def usable(rows: Rows, unfinished: Unfinished) -> tuple[Rows, dict[str, int]]:
    """The rows that may teach, trimmed where asked for, and how many were left out, by reason.

    An answer counts as finished when it ended by itself: the length limit's cut is no end to be learned. Of answers
    in duels only the two of one duel are told to repeat each other. The tokens of a trimmed one are counted by its
    share of the characters.
    """
    kept: Rows = []
    left_out = {"empty": 0, "unfinished": 0, "repeated": 0}
    seen: set[tuple[int, int, str]] = set()
    for row in rows:
        text, cut = row["completion"], row["finish"] == "length"
        if cut and unfinished == "trim":
            text, cut = sentences_of(text), False
            row = {**row, "tokens": round(row["tokens"] * len(text) / len(row["completion"]))}
        if not text.strip():
            left_out["empty"] += 1
        elif cut and unfinished == "drop":
            left_out["unfinished"] += 1
        elif (key := (*met_in(row), text.strip())) in seen:
            left_out["repeated"] += 1
        else:
            seen.add(key)
            kept.append({**row, "completion": text})
    return kept, left_out


def sentences_of(text: str) -> str:
    """The text up to the end of its last whole sentence, with a closing quotation mark that belongs to it."""
    whole = whole_sentences(text)
    return whole + '"' if whole.count('"') % 2 else whole


def text_of(content: Content) -> str:
    """A prompt to show: text as it is, of turns the last one's."""
    return content if isinstance(content, str) else content[-1]["content"]
