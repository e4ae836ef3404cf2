"""What offline methods train on: rows in memory; or, of sets that need not fit there, on disk or in a stream."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from pydantic import Field, model_validator

from steersman.data.config import DataConfig
from steersman.data.describe import Summary, describe
from steersman.data.encode import EncodedSet, TrainingSet, encode, nothing_left, put, require_known
from steersman.data.examples import Example
from steersman.data.load import LOADERS, LoadedExamples, held_out_rows
from steersman.data.mixing import Mixture, mixture
from steersman.data.rows import BadRows
from steersman.data.shapes import Kind
from steersman.data.stored import Stored, make_room, store
from steersman.data.streamed import Order, Streamed, open_streams
from steersman.data.tokenize import Layout
from steersman.distributed.ranks import ranks
from steersman.types import SteersmanError

E = TypeVar("E", bound=Example)


class LargeDataConfig(DataConfig):
    """Which rows, how they are read and become tokens, and where the tokens are."""

    cache: str | None = Field(
        default=None,
        description="folder in which tokenised rows are stored, by their content, and read from disk; null: in "
        "memory",
    )
    cache_gb: float = Field(
        default=50.0,
        gt=0,
        description="largest size of the cache; above it, sets that were not used for longest are deleted",
    )
    stream: bool = Field(
        default=False, description="read and tokenise while training, without a pass over all rows before"
    )
    buffer: int = Field(default=10_000, ge=1, description="rows of a stream that are shuffled together")

    @model_validator(mode="after")
    def _fits(self) -> LargeDataConfig:
        if not self.large:
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

    @property
    def large(self) -> bool:
        """Whether the rows are not kept in memory."""
        return self.stream or self.cache is not None

    def require_end(self, max_steps: int | None) -> None:
        """Raises ValueError for a stream without `train.max_steps`."""
        if self.stream and max_steps is None:
            raise ValueError("data.stream: how many rows there are is not known before; say train.max_steps")


@dataclass(slots=True)
class Training(Generic[E]):
    """What an offline method trains on. `stream` gives its own batches, None where all rows are known; `mix` says how
    known rows are drawn, and `content` which stored sets they are."""

    train: TrainingSet[E]
    held_out: EncodedSet[E] | None
    summary: Summary
    mix: Mixture | None = None
    stream: Streamed | None = None
    content: tuple[str, ...] = ()


def training(
    config: LargeDataConfig,
    kind: Kind,
    laid: Layout,
    *,
    context: int | None,
    order: Order,
    loaded: LoadedExamples[Any] | None = None,
) -> Training[Any]:
    """The section's rows as examples of a kind, in memory, on disk or as a stream; `loaded` where they were read
    before.

    Raises SteersmanError as the loader of the kind and `encode` do, and for thumbs that all say the same.
    """
    if config.stream:
        found = _streamed(config, kind, laid, context, order)
    elif config.cache is not None:
        found = _stored(config, kind, laid, context)
    else:
        loaded = LOADERS[kind](config) if loaded is None else loaded
        train = encode(loaded.train, laid, config, context)
        held = _encoded(loaded.held_out, laid, config, context)
        found = Training(train, held, describe(loaded, train, laid), mixture(config, train.parts))
    if kind == "feedback":
        _require_both(found)
    return found


def _stored(config: LargeDataConfig, kind: Kind, laid: Layout, context: int | None) -> Training[Any]:
    bad = BadRows(config.on_bad_row)
    outside = held_out_rows(config, kind, bad)
    sets = [store(config, kind, path, laid, context, outside) for path in _paths(config)]
    ranks().from_main(lambda: make_room(sets, config.cache_gb), "room in the cache")
    found = Stored(sets, kind, config, outside, bad)
    count = len(outside) + found.apart
    held = _held(outside, found, laid, config, context) if count else None
    mix = mixture(config, found.parts)
    return Training(found, held, found.summary(count), mix, content=tuple(folder.name for folder in sets))


def _held(
    outside: list[Any], found: Stored, laid: Layout, config: LargeDataConfig, context: int | None
) -> EncodedSet[Any]:
    """The rows of the held-out files, and behind them those of the sets that are held out by their hash."""
    held, room = EncodedSet[Any](), laid.room(config.max_prompt_tokens, config.max_length, context)
    for example in outside:
        put(held, example, laid, config, room)
    require_known(held, laid)
    held.add(found.held_out)
    if not held.groups:
        raise nothing_left(held, room)
    return held


def _streamed(config: LargeDataConfig, kind: Kind, laid: Layout, context: int | None, order: Order) -> Training[Any]:
    bad = BadRows(config.on_bad_row)
    held = held_out_rows(config, kind, bad)
    shapes, passes = open_streams(config, kind, _paths(config), held)
    stream = Streamed(passes, laid, config, context, order, bad)
    window: EncodedSet[Any] = stream.window
    shape = replace(shapes[0], sentence="; ".join(dict.fromkeys(s.sentence for s in shapes)))
    summary = describe(LoadedExamples(window.examples, held, shape, bad), window, laid)
    summary.lines = [
        f"a stream, shuffled in buffers of {len(window.groups):,} rows; of the first buffer:",
        *summary.lines,
    ]
    return Training(stream, _encoded(held, laid, config, context), summary, stream=stream)


def _paths(config: DataConfig) -> list[Any]:
    return list(config.path) if config.mix else [config.path]


def _encoded(examples: list[Any], laid: Layout, config: DataConfig, context: int | None) -> EncodedSet[Any] | None:
    return encode(examples, laid, config, context) if examples else None


def _require_both(found: Training[Any]) -> None:
    """Raises SteersmanError where all thumbs are of one kind; what was too long may have been all of the other."""
    labels = found.train.values("label")
    if labels.min() == labels.max():
        where = "in the first buffer (data.buffer)" if found.stream is not None else "that fit"
        raise SteersmanError(
            f"all {len(labels)} answers {where} have thumbs {'up' if labels[0] else 'down'}, and "
            f"{found.summary.dropped} were too long; thumbs up and down are both needed (data.max_length, "
            "data.on_too_long)"
        )
