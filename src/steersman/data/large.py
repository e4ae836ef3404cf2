"""Demonstrations for sets that need not fit in memory: kept tokenised on disk, or read as a stream."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from pydantic import Field, model_validator

from steersman.data.config import DataConfig
from steersman.data.describe import Summary, describe
from steersman.data.encode import Encoded, EncodedRows, EncodedSet, encode
from steersman.data.load import LoadedExamples, demonstrations, held_out_rows
from steersman.data.mixing import Mixture, mixture
from steersman.data.rows import BadRows
from steersman.data.stored import Stored, make_room, store
from steersman.data.streamed import Streamed, open_streams
from steersman.data.tokenize import Layout
from steersman.distributed.ranks import ranks


class LargeDataConfig(DataConfig):
    """Which rows, how they are read and become tokens, and where the tokens are."""

    cache: str | None = Field(
        default=None,
        description="folder where tokenised rows are kept by their content and read from disk; null: in memory",
    )
    cache_gb: float = Field(
        default=50.0, gt=0, description="sets in the cache that were not used for longest go above this size"
    )
    stream: bool = Field(
        default=False, description="read and tokenise while training, without a pass over all rows before"
    )
    buffer: int = Field(default=10_000, ge=1, description="rows of a stream that are shuffled together")

    @model_validator(mode="after")
    def _fits(self) -> LargeDataConfig:
        if not self.stream and self.cache is None:
            return self
        key = "stream" if self.stream else "cache"
        if self.stream and self.cache is not None:
            raise ValueError("stream reads rows while training, and cache tokenises all before; give one of both")
        if self.rank_by:
            raise ValueError(f"{key} reads rows one by one, and rank_by gathers them; remove one of both")
        if self.stream and self.held_out:
            raise ValueError(
                "held_out takes rows out of all that there are, which a stream does not know; name held_out_files"
            )
        if self.stream and not self.shuffle:
            raise ValueError("a stream is shuffled in its buffer; remove shuffle: false, or give buffer: 1")
        return self


@dataclass(slots=True)
class Training:
    """What SFT trains on. `stream` gives its own batches, None where all rows are known; `mix` says how
    known rows are drawn."""

    train: EncodedRows
    held_out: list[Encoded]
    summary: Summary
    mix: Mixture | None = None
    stream: Streamed | None = None


def training(config: LargeDataConfig, laid: Layout, context: int | None, *, batch_size: int, seed: int) -> Training:
    """The section's rows, in memory, on disk or as a stream. Raises SteersmanError as `demonstrations` and `encode`
    do."""
    if config.stream:
        return _streamed(config, laid, context, batch_size, seed)
    if config.cache is not None:
        return _stored(config, laid, context)
    loaded = demonstrations(config)
    train = encode(loaded.train, laid, config, context)
    held = encode(loaded.held_out, laid, config, context).first if loaded.held_out else []
    return Training(train.first, held, describe(loaded, train, laid), mixture(config, train.parts))


def _stored(config: LargeDataConfig, laid: Layout, context: int | None) -> Training:
    held = held_out_rows(config, "demonstration")
    sets = [store(config, path, laid, context) for path in _paths(config)]
    ranks().from_main(lambda: make_room(sets, config.cache_gb), "room in the cache")
    found = Stored(sets, config, [e.prompt for e in held])
    kept = [*found.held_out, *_encoded(held, laid, config, context)]
    return Training(found, kept, found.summary(len(kept)), mixture(config, found.parts))


def _streamed(config: LargeDataConfig, laid: Layout, context: int | None, batch_size: int, seed: int) -> Training:
    held, bad = held_out_rows(config, "demonstration"), BadRows(config.on_bad_row)
    shapes, passes = open_streams(config, _paths(config), bad, held)
    order = Streamed(passes, laid, config, context, batch_size, seed)
    window: EncodedSet[Any] = order.window
    shape = replace(shapes[0], sentence="; ".join(dict.fromkeys(s.sentence for s in shapes)))
    summary = describe(LoadedExamples(window.examples, held, shape, bad), window, laid)
    summary.lines = [
        f"a stream, shuffled in buffers of {len(window.groups):,} rows; of the first buffer:",
        *summary.lines,
    ]
    return Training(order, _encoded(held, laid, config, context), summary, stream=order)


def _paths(config: DataConfig) -> list[Any]:
    return list(config.path) if config.mix else [config.path]


def _encoded(examples: list[Any], laid: Layout, config: DataConfig, context: int | None) -> list[Encoded]:
    return encode(examples, laid, config, context).first if examples else []
