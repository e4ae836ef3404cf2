"""Tokenised rows on disk: written once in bounded memory, named by what they are made of, and read memory-mapped.

A set is a folder: `rows.arrow` (prompt, answers, their masks, and what the kind of example says beside its texts),
`lengths.npy` (tokens of each row), `keys.npy` (52 bits of each prompt's hash, by which rows are held out) and
`set.json` (what was counted and said).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from steersman.atomic import save_dir
from steersman.data import labels
from steersman.data.config import DataConfig
from steersman.data.describe import COUNTED, Summary, count_lines, describe
from steersman.data.encode import Encoded, EncodedSet, nothing_left, put, require_known
from steersman.data.examples import Example
from steersman.data.load import LoadedExamples, each_example, files_of
from steersman.data.rows import BadRows, Row
from steersman.data.shapes import Kind
from steersman.data.split import held_keys, key_of, prompt_key
from steersman.data.tokenize import Layout
from steersman.distributed.ranks import ranks
from steersman.types import SteersmanError

T = TypeVar("T")
CHUNK = 1024
"""Rows that are tokenised and written together."""
LAYOUT = 2
"""Counts up where the same rows and settings come out otherwise than before."""
NAME = 32
"""Letters of a set's name."""
SPLITS = {"path", "mix", "held_out", "held_out_files", "shuffle", "cache", "cache_gb", "stream", "buffer"}
"""Keys of the section that do not change what a path's rows become."""


def store(config: Any, kind: Kind, path: Any, laid: Layout, context: int | None) -> Path:
    """The folder with a path's rows as tokens, made now where it is not there yet.

    Its name is the SHA-256 of the files' content, what their rows are read as, the section's settings, the tokenizer
    with its chat template, and the limits of length. Raises SteersmanError as `load` and `encode` do.
    """
    folder = Path(config.cache).expanduser() / _name(config, kind, path, laid, context)

    def make() -> None:
        if not (folder / "set.json").is_file():
            save_dir(folder, lambda tmp: _write(tmp, config, kind, path, laid, context))
        (folder / "set.json").touch()

    ranks().from_main(make, "tokenised rows")
    return folder


def _name(config: Any, kind: Kind, path: Any, laid: Layout, context: int | None) -> str:
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
        "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "template": laid.template.source,
        "special": [str(laid.codec.eos_id), laid.codec.prefix, laid.codec.suffix],
        "kind": type(laid).__name__,
        "context": context,
    }
    digest.update(json.dumps(about, sort_keys=True).encode())
    return digest.hexdigest()[:NAME]


def _write(folder: Path, config: DataConfig, kind: Kind, path: Any, laid: Layout, context: int | None) -> None:
    import pyarrow as pa

    schema, bad = _schema(kind), BadRows(config.on_bad_row)
    shape, found = each_example(config, path, kind, bad)
    first: EncodedSet[Any] | None = None
    lengths: list[np.ndarray] = []
    keys: list[np.ndarray] = []
    counts: Counter[str] = Counter()
    chunk: EncodedSet[Any] = EncodedSet()
    with pa.OSFile(str(folder / "rows.arrow"), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        for chunk in _chunks(islice(found, config.limit), laid, config, context):
            writer.write_batch(_record(chunk, schema))
            lengths.append(chunk.lengths.astype(np.int32))
            keys.append(np.array([key_of(prompt_key(e)) for e in chunk.examples], dtype=np.int64))
            counts.update({name: getattr(chunk, name) for name in COUNTED})
            first = first or chunk
    if first is None or not first.groups:
        raise SteersmanError(
            f"{path}: no row is left to train on ({bad.sentence}); "
            f"{nothing_left(chunk, laid.room(config.max_prompt_tokens, config.max_length, context))}"
        )
    np.save(folder / "lengths.npy", np.concatenate(lengths))
    np.save(folder / "keys.npy", np.concatenate(keys))
    for name in COUNTED:
        setattr(first, name, 0)
    summary = describe(LoadedExamples(first.examples, [], shape, bad), first, laid)
    about = {"sentence": shape.sentence, "lines": summary.lines[2:], "samples": summary.samples, "counts": counts}
    about |= {"end_share": summary.end_share, "loss_share": summary.loss_share}
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


def _chunks(found: Iterable[Any], laid: Layout, config: DataConfig, context: int | None) -> Iterator[EncodedSet[Any]]:
    """Sets of `CHUNK` rows; the last one, which may be empty, has what is left, and what came to nothing after it."""
    room = laid.room(config.max_prompt_tokens, config.max_length, context)
    out = EncodedSet[Any]()
    for example in found:
        if len(out.groups) == CHUNK:
            require_known(out, laid)
            yield out
            out = EncodedSet[Any]()
        put(out, example, laid, config, room)
    require_known(out, laid)
    yield out


def make_room(used: Sequence[Path], gigabytes: float) -> None:
    """Removes sets of the cache that were not used for longest, until what is left fits; never those in use."""
    sets = [p.parent for p in used[0].parent.glob("*/set.json") if len(p.parent.name) == NAME]
    sets.sort(key=lambda p: (p / "set.json").stat().st_mtime, reverse=True)
    total = 0
    for folder in sets:
        total += sum(file.stat().st_size for file in folder.iterdir())
        if total > gigabytes * 1e9 and folder not in used:
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

    A row is held out by its prompt's hash, as `split` does, or because an example of `held` has its prompt. In memory
    are 22 bytes a row: its length, its place, its set and its prompt's key. Examples come without their texts.
    """

    def __init__(self, folders: Sequence[Path], kind: Kind, config: DataConfig, held: Sequence[Example]) -> None:
        self.folders, self.tables = list(folders), [_mapped(folder) for folder in folders]
        self.kind: Kind = kind
        self.about = [json.loads((folder / "set.json").read_text(encoding="utf-8")) for folder in folders]
        lengths = [np.load(folder / "lengths.npy") for folder in folders]
        self.keys = np.concatenate([np.load(folder / "keys.npy", mmap_mode="r") for folder in folders])
        sizes = [len(x) for x in lengths]
        self.begins = np.concatenate([[0], np.cumsum(sizes)])
        out = np.isin(self.keys, np.array([key_of(prompt_key(e)) for e in held], dtype=np.int64))
        chosen = held_keys(self.keys, config.held_out) & ~out
        self.places = np.flatnonzero(~chosen & ~out)
        if not len(self.places) or (config.held_out and not chosen.any()):
            side = "training" if not len(self.places) else "held-out"
            raise SteersmanError(f"data.held_out: {config.held_out:g} of {len(self.keys)} rows leaves no {side} row")
        self.lengths = np.concatenate(lengths)[self.places]
        self.parts = np.repeat(np.arange(len(sizes), dtype=np.int16), sizes)[self.places]
        self.groups = ByPlace(len(self.places), lambda i: self._group(int(self.places[i])))
        self.examples = ByPlace(len(self.places), lambda i: self._example(int(self.places[i])))
        apart = [int(place) for place in np.flatnonzero(chosen)]
        self.held_out = EncodedSet([self._group(i) for i in apart], [self._example(i) for i in apart])

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
        counts = Counter[str]()
        for about in self.about:
            counts.update(about["counts"])
        size = sum(file.stat().st_size for folder in self.folders for file in folder.iterdir())
        lines = [
            f"{len(self.places):,} examples, {held:,} held out; "
            + "; ".join(about["sentence"] for about in self.about),
            f"{lengths['p50']} tokens in the middle, {lengths['p95']} at the 95th percentile, "
            f"{lengths['max']} at most",
            f"read from {', '.join(map(str, self.folders))} ({size / 1e6:,.0f} MB on disk)",
            *dict.fromkeys(line for about in self.about for line in about["lines"]),
            *count_lines(counts, len(self.places)),
        ]
        first = self.about[0]
        return Summary(
            len(self.places), held, counts["dropped"], lengths, counts["cut"] / len(self.places), first["end_share"],
            first["loss_share"], lines,
            [[(text, bool(counted)) for text, counted in sample] for sample in first["samples"]],
        )  # fmt: skip


def _mapped(folder: Path) -> Any:
    import pyarrow as pa

    try:
        return pa.ipc.open_file(pa.memory_map(str(folder / "rows.arrow"))).read_all()
    except (pa.ArrowException, OSError) as error:
        raise SteersmanError(f"{folder}: the stored rows can not be read ({error}); remove this folder") from error
