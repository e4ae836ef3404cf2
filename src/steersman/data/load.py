"""The room's front door: a data section -> typed examples, split, with an account of what was left out."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any, Generic, TypeVar, cast

from steersman.data.config import DataConfig
from steersman.data.examples import (
    Demonstration,
    Example,
    Feedback,
    Preference,
    Query,
    Ranking,
    Rating,
    Steps,
)
from steersman.data.prepare import finish_example, prepared_rows
from steersman.data.ranked import rank_ratings
from steersman.data.read import local_files, read_rows
from steersman.data.rows import BadRows, Row, RowError, nearest
from steersman.data.shapes import Kind, Shape, examples, kind_of, recognise
from steersman.data.sources import FORMATS
from steersman.data.split import HELD_OUT, passed_over, prompt_key, row_key, split, without
from steersman.data.stores import is_store, open_rows
from steersman.types import SteersmanError

E = TypeVar("E", bound=Example)
PROBED = 64


@dataclass(slots=True)
class LoadedExamples(Generic[E]):
    """Examples in the order of the files, the held-out ones apart; `shape.sentence` says what they were."""

    train: list[E]
    held_out: list[E]
    shape: Shape
    left_out: BadRows


def demonstrations(config: DataConfig) -> LoadedExamples[Demonstration]:
    """What the model should say, for supervised fine-tuning."""
    return cast(LoadedExamples[Demonstration], load(config, "demonstration"))


def preferences(config: DataConfig) -> LoadedExamples[Preference]:
    """Pairs of a better and a worse answer, for reward models and direct preference optimisation."""
    return cast(LoadedExamples[Preference], load(config, "preference"))


def triples(config: DataConfig) -> LoadedExamples[Preference]:
    """Preference pairs with a gold answer."""
    return cast(LoadedExamples[Preference], load(config, "triple"))


def feedback(config: DataConfig) -> LoadedExamples[Feedback]:
    """Thumbs up and down. Raises SteersmanError where all are the same: nothing can be learned from that."""
    loaded = cast(LoadedExamples[Feedback], load(config, "feedback"))
    ups = sum(e.label for e in loaded.train)
    if ups in (0, len(loaded.train)):
        name = "true" if ups else "false"
        raise SteersmanError(
            f"{_name(config)}: all {len(loaded.train)} labels are {name}; thumbs up and thumbs down are both needed"
        )
    return loaded


def rankings(config: DataConfig) -> LoadedExamples[Ranking]:
    """K ranked answers per prompt."""
    return cast(LoadedExamples[Ranking], load(config, "ranking"))


def ratings(config: DataConfig) -> LoadedExamples[Rating]:
    """Answers with a number per attribute; a row need not rate all of them.

    Raises SteersmanError for an attribute that no training row rates.
    """
    loaded = cast(LoadedExamples[Rating], load(config, "rating"))
    rated = attributes(loaded.train)
    for name in [*config.scores, *attributes(loaded.held_out)]:
        if name not in rated:
            raise SteersmanError(
                f"{_name(config)}: no training row rates {name!r}; rated are {', '.join(map(repr, rated))}"
                f"{nearest(name, loaded.train[0].row.data)}. Mend data.scores or the files"
            )
    return loaded


def attributes(rated: Iterable[Rating]) -> list[str]:
    """The attributes that occur, in the order of their first row."""
    return list(dict.fromkeys(name for e in rated for name in e.scores))


def steps(config: DataConfig) -> LoadedExamples[Steps]:
    """Answers in steps, each step with a label."""
    return cast(LoadedExamples[Steps], load(config, "steps"))


def recognise_kind(config: DataConfig, among: Sequence[Kind]) -> Kind:
    """Which of some kinds the rows are by themselves; the typed functions above then load them.

    Raises SteersmanError naming the columns where they are none of them.
    """
    if config.rank_by and "ranking" in among:
        return "ranking"
    stores = [one for one in _listed(config.path) if is_store(one)]
    if stores:
        of_store: list[Kind] = [kind for kind in open_rows(stores[0]).kinds(config.judgements) if kind in among]
        if not of_store:
            raise SteersmanError(f"{stores[0]}: it has no judgements that can be learned from here")
        return of_store[0]
    bad = BadRows("skip")
    rows = section_rows(config, bad)
    first = list(islice(prepared_rows(iter(rows), config, bad), PROBED))
    if not first:
        raise SteersmanError(f"{_name(config)}: no usable row ({bad.sentence}){_first(bad)}")
    return kind_of(first, among, FORMATS) or recognise(first, among[0], FORMATS).want


def section_rows(
    config: DataConfig, bad: BadRows, path: str | list[str] | None = None, want: Kind | None = None
) -> Iterator[Row]:
    """The rows of a data section, or of other files read in the same way, as `read_rows` gives them.

    A store of judgements has rows for every kind of examples; it gives those of the kind that is wanted, and without
    one it is refused.
    """
    for one in _listed(config.path if path is None else path):
        if want is not None and is_store(one):
            yield from open_rows(one).rows(want, config.judgements)
        else:
            yield from _read(config, bad, one)


def _read(config: DataConfig, bad: BadRows, path: str) -> Iterator[Row]:
    return read_rows(
        path,
        bad,
        text_split=config.text_split,
        encoding=config.encoding,
        encoding_key="data.encoding",
        subset=config.subset,
        hub_split=config.hub_split,
    )


LOADERS: dict[Kind, Callable[[DataConfig], LoadedExamples[Any]]] = {
    "demonstration": demonstrations,
    "preference": preferences,
    "triple": triples,
    "feedback": feedback,
    "ranking": rankings,
    "rating": ratings,
    "steps": steps,
}


def prompts(config: DataConfig) -> LoadedExamples[Query]:
    """Prompts for the policy to answer, with their rows' columns for rewards."""
    return cast(LoadedExamples[Query], load(config, "query"))


def episode_rows(config: DataConfig) -> LoadedExamples[Query]:
    """Rows for an environment to begin episodes with; held out by all columns, since many may share one prompt."""
    return cast(LoadedExamples[Query], load(config, "query", row_key))


def load(config: DataConfig, want: Kind, key: Callable[[Any], str] = prompt_key) -> LoadedExamples[Any]:
    """Read, recognise, check and split by `key`; the typed functions above are this with a kind.

    Raises SteersmanError for what `read_rows` refuses, for rows of no known or no fitting shape, and at the
    first bad row unless `on_bad_row` is skip.
    """
    left_out = BadRows(config.on_bad_row)
    inside = _held_out_inside(config)
    outside = [p for p in config.held_out_files if p not in inside]
    held: list[Any] = list(each_example(config, outside, want, left_out)[1]) if outside else []
    over = frozenset(map(key, held))

    def read(path: str | list[str]) -> tuple[Shape, list[Any]]:
        shape, found = each_example(config, path, want, left_out)
        # held-out files that are part of the path may come after the limit, so it stops reading only without them
        return shape, list(islice(passed_over(found, over, left_out, key), None if inside else config.limit))

    shape, found = _mixed(config, read) if config.mix else read(config.path)
    if inside:
        own = [e for e in found if any(_same(e.row.file, p) for p in inside)]
        found, shared = without([e for e in found if not any(_same(e.row.file, p) for p in inside)], own, key)
        held = own + held
        for e in shared:
            left_out.note(HELD_OUT, e.row.where())
        if config.limit is not None:
            found = _first_of_each(found, config.limit)
    if not found:
        raise SteersmanError(f"{_name(config)}: no usable row ({left_out.sentence}){_first(left_out)}")
    if config.held_out:
        found, more = split(found, config.held_out, key)
        held = held + more
    return LoadedExamples(found, held, shape, left_out)


def held_out_rows(config: DataConfig, want: Kind, bad: BadRows) -> list[Any]:
    """The examples of `held_out_files` that are no part of `path`. Raises SteersmanError for a file that is."""
    inside = _held_out_inside(config)
    if inside:
        raise SteersmanError(
            f"data.held_out_files: {inside[0]} is a file of data.path too; with data.cache or data.stream give them "
            "apart"
        )
    return list(each_example(config, config.held_out_files, want, bad)[1]) if config.held_out_files else []


def _held_out_inside(config: DataConfig) -> list[str]:
    """Those of the held-out files that are part of the path."""
    files = files_of(config.path) if config.held_out_files else []
    return [p for p in config.held_out_files if any(_same(file, p) for file in files)]


def _mixed(config: DataConfig, read: Callable[[str], tuple[Shape, list[Any]]]) -> tuple[Shape, list[Any]]:
    """The examples of each path, which may be of different shapes; the sentence says all."""
    found: list[Any] = []
    shapes: list[Shape] = []
    for part, path in enumerate(config.path):
        shape, own = read(path)
        for e in own:
            e.row.part = part
        found += own
        shapes.append(shape)
    said = "; ".join(f"{path}: {shape.sentence}" for path, shape in zip(config.path, shapes, strict=True))
    return replace(shapes[0], sentence=said), found


def _first_of_each(found: Sequence[Example], limit: int) -> list[Example]:
    """The first so many examples of each set."""
    seen: Counter[int] = Counter()
    out = []
    for e in found:
        seen[e.row.part] += 1
        if seen[e.row.part] <= limit:
            out.append(e)
    return out


def each_example(
    config: DataConfig, path: str | list[str], want: Kind, bad: BadRows
) -> tuple[Shape, Iterator[Example]]:
    """What the rows of a path are, and their examples one by one. Raises SteersmanError as `load` does."""
    prepared = prepared_rows(iter(section_rows(config, bad, path, want)), config, bad)
    if config.rank_by:
        prepared = iter(rank_ratings(prepared, config.rank_by, bad))
    first = list(islice(prepared, PROBED))
    if not first:
        raise SteersmanError(f"{_name(config)}: no usable row ({bad.sentence}){_first(bad)}")
    shape = recognise(first, want, FORMATS)
    everything: Iterable[Row] = chain(first, prepared)
    if shape.format.regroup:
        everything = shape.format.regroup(everything, bad)
    return shape, _of_rows(shape, everything, config, bad)


def _of_rows(shape: Shape, rows: Iterable[Row], config: DataConfig, bad: BadRows) -> Iterator[Example]:
    for row in rows:
        try:
            found = [e for e in examples(shape, row) if finish_example(e, config, bad)]
        except RowError as error:
            bad.add(error)
        else:
            yield from found


def files_of(path: str | list[str]) -> list[str]:
    """The local files that paths stand for; none for hub sets and stores."""
    return [str(file) for one in _listed(path) if not is_store(one) for file in local_files(one) or []]


def _listed(path: str | list[str]) -> list[str]:
    if not path:
        raise SteersmanError("data.path is an empty list: name a file, a folder, a glob or a hub data set")
    return [path] if isinstance(path, str) else path


def _same(file: str, pattern: str) -> bool:
    """True where a file is meant by a pattern: its path, its name, or a glob of either."""
    return fnmatch.fnmatch(file, pattern) or fnmatch.fnmatch(file.rsplit("/", 1)[-1], pattern)


def _name(config: DataConfig) -> str:
    return config.path if isinstance(config.path, str) else ", ".join(config.path)


def _first(bad: BadRows) -> str:
    return "".join(f"; for example {message}" for message in list(bad.first.values())[:1])
