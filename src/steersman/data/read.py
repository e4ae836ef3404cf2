"""Files, folders and hub sets -> rows that know where they came from.

Local paths come first; only a name that is no local path is looked up on the hub.
"""

from __future__ import annotations

import glob
import gzip
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

from steersman.data import parse
from steersman.data.encoding import decode
from steersman.data.rows import BadRows, Row, nearest
from steersman.data.stores import is_store
from steersman.types import SteersmanError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")


def read_rows(
    source: str | Path | Iterable[str | Path],
    bad: BadRows | None = None,
    *,
    text_split: str = "auto",
    encoding: str | None = None,
    encoding_key: str | None = None,
    subset: str | None = None,
    hub_split: str = "train",
) -> Iterator[Row]:
    """The rows of a file, a folder, a glob, a list of these, or a hub data set, in a stable order.

    `text_split` says how plain text is cut into rows: "lines", "blank" (at blank lines), a separator line
    such as `<|endoftext|>`, or "auto" (that separator if it occurs, else blank lines, else lines).
    `encoding` is that of all files but Parquet's; None is UTF-8. Errors name the recipe's key for it, `encoding_key`.

    Raises SteersmanError for a path that does not exist, an empty or unreadable file, and, unless `bad` says
    to skip, at the first row that is broken or no object.
    """
    bad = bad or BadRows(key=None)
    sources = [source] if isinstance(source, str | Path) else list(source)
    if not sources:
        raise SteersmanError("data.path is an empty list: name a file, a folder, a glob or a hub data set")
    for one in sources:
        if is_store(str(one)):
            raise SteersmanError(
                f"{one}: a store of judgements is read where examples or prompts are wanted, not here; "
                "`steersman export-feedback` writes it into a file"
            )
        paths = local_files(one)
        if paths is None:
            yield from _hub(str(one), subset, hub_split, bad)
        for path in paths or []:
            yield from _file(path, bad, text_split, encoding, encoding_key)


def local_files(source: str | Path) -> list[Path] | None:
    """The data files that a local path, folder or glob stands for, sorted; None where it names a hub set.

    Of a folder, hidden files and those in hidden folders are no data: copies that editors keep, and files that were
    not written to their end.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        there = [p for p in path.rglob("*") if not any(part.startswith(".") for part in p.relative_to(path).parts)]
        found = sorted(p for p in there if p.is_file() and _kind(p) is not None)
        if (path / "config.yaml").exists() and (path / "metrics.jsonl").exists():
            rows = [p.name for p in found if p.parent == path and p.name.startswith(("samples.", "evaluation."))]
            what = f"{' and '.join(rows)}, its held-out answers" if rows else "the file in it that holds rows"
            raise SteersmanError(f"{path}: this is a run's folder, not data; name {what}")
        if any((path / name).exists() for name in ("dataset_info.json", "dataset_dict.json")):
            return None
        # a README.txt beside the data is no data; text files count where there is nothing else
        found = [p for p in found if _kind(p) != ".txt"] or found
        if not found:
            raise SteersmanError(
                f"{path}: no data file in this folder (looked for {', '.join(SUFFIXES)}, .gz too; "
                "hidden files are left out)"
            )
        return found
    if path.exists():
        return [path]
    if any(c in str(source) for c in "*?["):
        found = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
        if not found:
            raise SteersmanError(f"{source}: no file matches this pattern")
        return found
    looks_local = str(source).startswith((".", "/", "~")) or str(source).count("/") > 1
    if looks_local or _kind(path) is not None:
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise SteersmanError(f"{source}: no such file or folder{nearest(path.name, siblings)}")
    return None


def _kind(path: Path) -> str | None:
    name = path.name.lower().removesuffix(".gz")
    return next((s for s in SUFFIXES if name.endswith(s)), None)


def _file(path: Path, bad: BadRows, text_split: str, encoding: str | None, key: str | None) -> Iterator[Row]:
    kind = _kind(path)
    if kind is None:
        raise SteersmanError(f"{path}: unknown kind of file; known are {', '.join(SUFFIXES)}, each also as .gz")
    name, count = str(path), 0
    if kind in (".jsonl", ".ndjson") and encoding is None:
        rows = _line_by_line(path, bad, key)
    elif kind == ".parquet" and path.suffix.lower() != ".gz":
        rows = parse.parquet(path, name, bad)
    else:
        rows = _whole(path, kind, bad, text_split, encoding, key)
    for row in rows:
        count += 1
        yield row
    if count == 0 and not bad.counts:
        what = "is empty" if _empty(path) else "holds no rows"
        raise SteersmanError(f"{path}: the file {what}")


def _line_by_line(path: Path, bad: BadRows, key: str | None) -> Iterator[Row]:
    with _readable(path), gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as stream:
        yield from parse.jsonl(stream, str(path), bad, key)  # type: ignore[arg-type]


def _whole(
    path: Path, kind: str, bad: BadRows, text_split: str, encoding: str | None, key: str | None
) -> Iterator[Row]:
    name, content = str(path), _bytes(path)
    if not content.strip():
        return iter(())
    if encoding is not None and kind != ".parquet":
        content = decode(content, name, encoding, key).encode("utf-8")
    if kind in (".jsonl", ".ndjson"):
        return parse.jsonl(BytesIO(content), name, bad, key)
    if kind == ".parquet":
        return parse.parquet(content, name, bad)
    if kind == ".json":
        return parse.json_file(decode(content, name, key=key), name, bad)
    if kind == ".txt":
        return parse.text(decode(content, name, key=key), name, text_split)
    return parse.csv_file(decode(content, name, key=key), name, kind, bad)


def _empty(path: Path) -> bool:
    with _readable(path), gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as stream:
        return not stream.read(parse.HEAD).strip()


def _bytes(path: Path) -> bytes:
    with _readable(path), gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as stream:
        return stream.read()


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Says of which file it was that it could not be read."""
    try:
        yield
    except SteersmanError:
        raise
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise SteersmanError(f"{path}: not a whole gzip file ({error}); copy or download it again") from error
    except OSError as error:
        raise SteersmanError(f"{path}: can not be read ({error.strerror or error})") from error


def _hub(name: str, subset: str | None, split: str, bad: BadRows) -> Iterator[Row]:
    import datasets

    try:
        if Path(name).is_dir():
            data = datasets.load_from_disk(name)
            data = data[split] if isinstance(data, datasets.DatasetDict) else data
        else:
            data = datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # the library and its network layers raise many kinds
        raise SteersmanError(
            f"{name}: neither a local file nor a data set that could be loaded from the hub (split {split!r}): "
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}. Without network, give a "
            "local path or fetch the set beforehand."
        ) from error
    for number, data_row in enumerate(data, 1):
        yield Row(parse.without_nulls(dict(data_row), bad), name, number)
