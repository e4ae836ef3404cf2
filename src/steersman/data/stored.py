"""Tokenised rows on disk: written once in bounded memory, named by what they are made of, and read memory-mapped.

A set is a folder: `rows.arrow` (prompt, answers, their masks, and what the kind of example says beside its texts),
`lengths.npy` (tokens of each row) and `set.json` (what was counted and said); and of every example that was read,
those that are too long for a row included, `keys.npy` (52 bits of the prompt's hash, by which examples are held out)
and `marks.npy` (what was counted of it). So what is held out, and what is counted of the rest, is as in memory, where
examples become tokens after that.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import numpy as np

from steersman.atomic import locked, save_dir, saving
from steersman.data import labels
from steersman.data.config import DataConfig
from steersman.data.describe import Summary, count_lines, describe
from steersman.data.encode import COUNTED, Encoded, EncodedSet, nothing_left, put, require_known
from steersman.data.examples import Example
from steersman.data.load import LoadedExamples, each_example, files_of
from steersman.data.rows import BadRows, Row
from steersman.data.shapes import Kind
from steersman.data.split import HELD_OUT, held_keys, key_of, passed_over, prompt_key
from steersman.data.tokenize import Layout
from steersman.distributed.ranks import ranks
from steersman.types import SteersmanError

T = TypeVar("T")
CHUNK = 1024
"""Rows that are tokenised and written together."""
LAYOUT = 6
"""Counts up where the same rows and settings come out otherwise than before."""
MARK = {name: 1 << place for place, name in enumerate(COUNTED)}
"""The bit of `marks.npy` for each of what is counted."""
NO_ROW = MARK["dropped"] | MARK["equal"]
"""An example with one of these is no row."""
NAME = 32
"""Letters of a set's name."""
FILES = ("keys.npy", "marks.npy")
"""What there is of every example that was read."""
SPLITS = {"path", "mix", "held_out", "held_out_files", "shuffle", "cache", "cache_gb", "stream", "buffer"}
"""Keys of the section that do not change what a path's rows become."""


def store(config: Any, kind: Kind, path: Any, laid: Layout, context: int | None, held: Sequence[Example]) -> Path:
    """The folder with a path's rows as tokens, made now where it is not there yet. Where another run is making it,
    this one waits.

    Its name is the SHA-256 of the files' content, what their rows are read as, the section's settings, the tokenizer
    with its special tokens and chat template, and the limits of length; with `data.limit` also of the prompts of
    `held`, which are passed over before the first so many are taken. Raises SteersmanError as `load` and `encode` do.
    """
    over = frozenset() if config.limit is None else frozenset(prompt_key(e) for e in held)
    folder = Path(config.cache).expanduser() / _name(config, kind, path, laid, context, over)

    def make() -> None:
        with locked(folder), saving(folder):
            if not (folder / "set.json").is_file():
                save_dir(folder, lambda tmp: _write(tmp, config, kind, path, laid, context, over))
            (folder / "set.json").touch()

    ranks().from_main(make, "tokenised rows")
    return folder


def _name(config: Any, kind: Kind, path: Any, laid: Layout, context: int | None, over: frozenset[str]) -> str:
    files = files_of(path)
    if not files:
        raise SteersmanError(f"data.cache: {path} is no local file or folder; only those are kept by their content")
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as stream:
            digest.update(f"{Path(file).name}\0{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    tokenizer = laid.codec.tokenizer
    if not tokenizer.is_fast:
        raise SteersmanError(
            f"data.cache: {tokenizer.name_or_path} has a tokenizer without a file of its own (tokenizer.json), by "
            "which sets could be told apart; use data.stream, or rows in memory"
        )
    about = {
        "layout": LAYOUT,
        "examples": kind,
        "section": config.model_dump(mode="json", exclude=SPLITS),
        "tokenizer": _state(tokenizer),
        "template": laid.template.source,
        "special": [str(laid.codec.eos_id), laid.codec.prefix, laid.codec.suffix],
        "kind": [type(laid).__name__, asdict(laid.room(None, None, context))],
        "context": context,
        "passed_over": sorted(over),
    }
    digest.update(json.dumps(about, sort_keys=True).encode())
    return digest.hexdigest()[:NAME]


def _state(tokenizer: Any) -> str:
    """The SHA-256 of all that the tokenizer saves of itself: its vocabulary and rules, its class and settings, and
    its special tokens by name, which the chat template may write."""
    digest = hashlib.sha256()
    tokenizer.encode("")  # takes back the padding of a call before, which would be saved too
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for file in sorted(file for file in Path(folder).rglob("*") if file.is_file()):
            digest.update(f"{file.relative_to(folder)}\0{hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def _write(
    folder: Path,
    config: DataConfig,
    kind: Kind,
    path: Any,
    laid: Layout,
    context: int | None,
    over: frozenset[str],
) -> None:
    import pyarrow as pa

    schema, bad = _schema(kind), BadRows(config.on_bad_row)
    shape, found = each_example(config, path, kind, bad)
    first: EncodedSet[Any] | None = None
    lengths: list[np.ndarray] = []
    keys, marks = array("q"), array("B")
    chunk: EncodedSet[Any] = EncodedSet()
    examples = islice(passed_over(found, over, bad), config.limit)
    with pa.OSFile(str(folder / "rows.arrow"), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        for chunk in _chunks(examples, laid, config, context, keys, marks):
            writer.write_batch(_record(chunk, schema))
            lengths.append(chunk.lengths.astype(np.int32))
            first = first or chunk
    if first is None or not first.groups:
        raise SteersmanError(
            f"{path}: no row is left to train on ({bad.sentence}); "
            f"{nothing_left(chunk, laid.room(config.max_prompt_tokens, config.max_length, context))}"
        )
    np.save(folder / "lengths.npy", np.concatenate(lengths))
    np.save(folder / "keys.npy", np.array(keys, dtype=np.int64))
    np.save(folder / "marks.npy", np.array(marks, dtype=np.uint8))
    for name in COUNTED:
        setattr(first, name, 0)
    summary = describe(LoadedExamples(first.examples, [], shape, BadRows(nulls=bad.nulls)), first, laid)
    about = {"sentence": shape.sentence, "lines": summary.lines[2:], "samples": summary.samples}
    about |= {"end_share": summary.end_share, "loss_share": summary.loss_share, "left_out": bad.counts}
    (folder / "set.json").write_text(json.dumps(about), encoding="utf-8")


def _schema(kind: Kind) -> Any:
    import pyarrow as pa

    ints, flags = pa.list_(pa.int32()), pa.list_(pa.bool_())
    tokens = {"prompt": ints, "answers": pa.list_(ints), "masks": pa.list_(flags)}
    return pa.schema({**tokens, **labels.schema(kind)})


def _record(chunk: EncodedSet[Any], schema: Any) -> Any:
    """The rows of a chunk as one Arrow batch."""
    import pyarrow as pa

    columns: dict[str, list[Any]] = {
        "prompt": [group[0].prompt for group in chunk.groups],
        "answers": [[e.response for e in group] for group in chunk.groups],
        "masks": [[e.mask for e in group] for group in chunk.groups],
    }
    columns |= {name: labels.column(chunk.examples, name) for name in schema.names[3:]}
    arrays = [pa.array(columns[name], kind) for name, kind in zip(schema.names, schema.types, strict=True)]
    return pa.record_batch(arrays, schema=schema)


def _chunks(
    found: Iterable[Any],
    laid: Layout,
    config: DataConfig,
    context: int | None,
    keys: array[int],
    marks: array[int],
) -> Iterator[EncodedSet[Any]]:
    """Sets of `CHUNK` rows; the last one, which may be empty, has what is left, and what came to nothing after it.
    Key and marks of every example are put behind those that are there.
    """
    room = laid.room(config.max_prompt_tokens, config.max_length, context)
    out = EncodedSet[Any]()
    for example in found:
        if len(out.groups) == CHUNK:
            require_known(out, laid)
            yield out
            out = EncodedSet[Any]()
        before = _counts(out)
        put(out, example, laid, config, room)
        marks.append(sum(MARK[name] for name, count in _counts(out).items() if count > before[name]))
        keys.append(key_of(prompt_key(example)))
    require_known(out, laid)
    yield out


def _counts(out: EncodedSet[Any]) -> dict[str, int]:
    return {name: getattr(out, name) for name in COUNTED}


def make_room(used: Sequence[Path], gigabytes: float) -> None:
    """Removes sets of the cache that were not used for longest, until what is left fits; never those in use, nor one
    that another run begins to use meanwhile."""
    cache = used[0].parent
    with locked(cache / "room"), saving(cache):
        sets = [p.parent for p in cache.glob("*/set.json") if len(p.parent.name) == NAME]
        last_used = {folder: (folder / "set.json").stat().st_mtime_ns for folder in sets}
        total = 0
        for folder in sorted(sets, key=last_used.__getitem__, reverse=True):
            total += sum(file.stat().st_size for file in folder.iterdir())
            if total > gigabytes * 1e9 and folder not in used:
                _remove(folder, last_used[folder])


def _remove(folder: Path, last_used: int) -> None:
    about = folder / "set.json"
    with locked(folder):
        if about.stat().st_mtime_ns == last_used:
            about.unlink()  # first, so that a kill leaves no set that looks whole
            shutil.rmtree(folder, ignore_errors=True)


class ByPlace(Sequence[T]):
    """What is read anew whenever it is asked for, by place."""

    def __init__(self, size: int, read: Callable[[int], T]) -> None:
        self.size, self.read = size, read

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, place: Any) -> Any:
        if not 0 <= place < self.size:
            raise IndexError(f"place {place} of {self.size} rows")
        return self.read(int(place))


class Stored:
    """The training rows of one or several stored sets by place, read from disk when asked for; a `TrainingSet`.

    A row is held out by its prompt's hash, as `split` does, or left out because an example of `held` has its prompt,
    which `bad` counts beside what was left out of the sets. In memory are 22 bytes a row: its length, its place, its
    set and its prompt's key. Examples come without their texts.

    `apart` is how many examples are held out by their hash, those that are too long for a row of `held_out` included.
    """

    def __init__(
        self, folders: Sequence[Path], kind: Kind, config: DataConfig, held: Sequence[Example], bad: BadRows
    ) -> None:
        self.folders, self.tables = list(folders), [_mapped(folder) for folder in folders]
        self.kind: Kind = kind
        self.specials_read = config.allow_special_tokens
        self.about = [json.loads((folder / "set.json").read_text(encoding="utf-8")) for folder in folders]
        lengths = [np.load(folder / "lengths.npy") for folder in folders]
        sizes = [len(x) for x in lengths]
        self.begins = np.concatenate([[0], np.cumsum(sizes)])
        keys, marks = (np.concatenate([np.load(folder / name) for folder in folders]) for name in FILES)
        over = np.isin(keys, np.array([key_of(prompt_key(e)) for e in held], dtype=np.int64))
        for about in self.about:
            bad.counts.update(about["left_out"])
        bad.counts.update({HELD_OUT: int(over.sum())} if over.any() else {})
        chosen = np.zeros(len(keys), dtype=bool)
        chosen[~over] = held_keys(keys[~over], config.held_out)
        train, is_row = ~chosen & ~over, marks & NO_ROW == 0
        self.left_out, self.apart = bad, int(chosen.sum())
        self.counts, left = _marked(marks[train]), int((~over).sum())
        if not train.any() or (config.held_out and not self.apart):
            side = "training" if not train.any() else "held-out"
            raise SteersmanError(
                f"data.held_out: {config.held_out:g} of {left} examples leaves no {side} example; {bad.sentence}. "
                "Change data.held_out or data.held_out_files"
            )
        self.places = np.flatnonzero(train[is_row])
        if not len(self.places):
            raise SteersmanError(
                f"no row is left to train on: of {int(train.sum())} examples {self.counts['dropped']} are too long, "
                f"and {self.counts['equal']} are pairs of equal answers. Raise data.max_length, or hold out less"
            )
        self.keys = keys[is_row]
        self.lengths = np.concatenate(lengths)[self.places]
        self.parts = np.repeat(np.arange(len(sizes), dtype=np.int16), sizes)[self.places]
        self.groups = ByPlace(len(self.places), lambda i: self._group(int(self.places[i])))
        self.examples = ByPlace(len(self.places), lambda i: self._example(int(self.places[i])))
        apart = [int(place) for place in np.flatnonzero(chosen[is_row])]
        counts = _marked(marks[chosen])
        self.held_out = EncodedSet([self._group(i) for i in apart], [self._example(i) for i in apart], **counts)

    @property
    def in_memory(self) -> bool:
        return False

    def values(self, name: str) -> np.ndarray:
        """A field of all examples as numbers; NaN where there is none."""
        found = [np.asarray(table.column(name).to_numpy(), dtype=float) for table in self.tables]
        return np.concatenate(found)[self.places]

    def _at(self, place: int) -> tuple[int, int, int]:
        """Which set a row is in, which chunk of it, and where there."""
        k = int(np.searchsorted(self.begins, place, side="right")) - 1
        return k, *divmod(place - int(self.begins[k]), CHUNK)

    def _group(self, place: int) -> list[Encoded]:
        k, chunk, at = self._at(place)
        prompt, answers, masks = (self.tables[k].column(i).chunk(chunk)[at].values for i in range(3))
        ids = prompt.to_numpy().tolist()
        return [
            Encoded(ids, answer.values.to_numpy().tolist(), mask.values.to_numpy(zero_copy_only=False).tolist())
            for answer, mask in zip(answers, masks, strict=True)
        ]

    def _example(self, place: int) -> Example:
        k, chunk, at = self._at(place)
        told = {name: self.tables[k].column(name).chunk(chunk)[at].as_py() for name in labels.schema(self.kind)}
        row = Row({}, str(self.folders[k] / "rows.arrow"), place - int(self.begins[k]) + 1, part=k)
        return labels.example(self.kind, str(self.keys[place]), row, told)

    def summary(self, held: int) -> Summary:
        """What is told of the sets before a run: lengths of all rows, and the rest of the first ones of each."""
        lengths = {"p50": int(np.percentile(self.lengths, 50)), "p95": int(np.percentile(self.lengths, 95))}
        lengths["max"] = int(self.lengths.max())
        counts = self.counts
        size = sum(file.stat().st_size for folder in self.folders for file in folder.iterdir())
        lines = [
            f"{len(self.places):,} examples, {held:,} held out; "
            + "; ".join(about["sentence"] for about in self.about),
            f"{lengths['p50']} tokens in the middle, {lengths['p95']} at the 95th percentile, "
            f"{lengths['max']} at most",
            f"read from {', '.join(map(str, self.folders))} ({size / 1e6:,.0f} MB on disk)",
            *dict.fromkeys(line for about in self.about for line in about["lines"]),
            *([self.left_out.sentence] if self.left_out.counts else []),
            *count_lines(counts, len(self.places), specials_read=self.specials_read),
        ]
        first = self.about[0]
        return Summary(
            len(self.places), held, counts["dropped"], lengths, first["end_share"],
            first["loss_share"], lines,
            [[(text, bool(counted)) for text, counted in sample] for sample in first["samples"]],
        )  # fmt: skip


def _marked(marks: np.ndarray) -> dict[str, int]:
    """How many examples have each of the marks."""
    return {name: int((marks & bit != 0).sum()) for name, bit in MARK.items()}


def _mapped(folder: Path) -> Any:
    import pyarrow as pa

    try:
        return pa.ipc.open_file(pa.memory_map(str(folder / "rows.arrow"))).read_all()
    except (pa.ArrowException, OSError) as error:
        raise SteersmanError(f"{folder}: the stored rows can not be read ({error}); remove this folder") from error
