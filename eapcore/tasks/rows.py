"""The rows of a task file, whatever holds them: JSON lines, JSON, or a table with commas, semicolons or tabs."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
FORM = 'an entry is {"clean": …, "corrupt": …, "answer": …, "wrong": …}, prompts as text or lists of token ids'
_LISTED = 16  # names in an error


@dataclass(frozen=True, slots=True)
class Rows:
    """fields: all names, in order. rows: (where one is, what it holds by name). typed: whether its values are JSON's,
    text or numbers or lists, rather than the cells of a table, which are all text. aside: fields that name no row's
    content: row numbers, or what a JSON file says beside its rows."""

    fields: tuple[str, ...]
    rows: list[tuple[str, dict[str, Any]]]
    typed: bool
    aside: tuple[str, ...] = ()


def shown(value: object, most: int = 60) -> str:
    """A value in an error, short and on one line; most: characters."""
    text = repr(value)
    return text if len(text) <= most else text[: most - 1] + "…"


def listed(names: Collection[str]) -> str:
    """Names in an error, in order."""
    few = ", ".join(shown(name)[1:-1] or "one without a name" for name in list(names)[:_LISTED])
    return few + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")


def read_rows(path: Path, known: Collection[str], n: int | None) -> Rows:
    """The first n rows of a file, or all; known: names of fields, by which a table's separator is told.

    Raises:
        ValueError: another ending than ENDINGS, or a file that is not what its ending says. The line is named.
    """
    readers: dict[str, Callable[[Path, Collection[str], int | None], Rows]]
    readers = {".jsonl": _jsonl, ".json": _json, ".csv": _table, ".tsv": _table, ".parquet": _parquet}
    ending = path.suffix.lower()
    if ending not in readers:
        raise ValueError(f"a task file must end in {', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}, got {shown(path.name)}")
    try:
        return readers[ending](path, known, n)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8 text: {error}") from error


def blocks(path: Path, size: int, n: int, wanted: Callable[[int], bool]) -> Iterator[Rows | None]:
    """The first n rows of a JSONL or Parquet file, so many at a time; None for a block whose number is not wanted."""
    try:
        yield from (_jsonl_blocks if path.suffix.lower() == ".jsonl" else _parquet_blocks)(path, size, n, wanted)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8 text: {error}") from error


def count_rows(path: Path) -> tuple[int, str]:
    """How many rows a JSONL or Parquet file has, and the sha256 of its bytes."""
    digest, rows = hashlib.sha256(), 0
    with path.open("rb") as file:
        if path.suffix.lower() == ".jsonl":
            for line in file:
                digest.update(line)
                rows += bool(line.strip())
            return rows, digest.hexdigest()
        while piece := file.read(1 << 20):
            digest.update(piece)
    return _parquet_file(path).metadata.num_rows, digest.hexdigest()


def _jsonl(path: Path, known: Collection[str], n: int | None) -> Rows:
    return next(_jsonl_blocks(path, sys.maxsize, n, lambda number: True), None) or Rows((), [], typed=True)


def _jsonl_blocks(path: Path, size: int, n: int | None, wanted: Callable[[int], bool]) -> Iterator[Rows | None]:
    rows: list[tuple[str, dict[str, Any]]] = []
    seen = 0
    # newline: not as splitlines, which also breaks at U+2028 and the like, and JSON allows those inside a string.
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, 1):
            if seen == n:
                break
            if not line.strip():
                continue
            if wanted(seen // size):
                where = f"line {number} of {path.name}"
                rows.append((where, _row(parsed(line, where), where)))
            seen += 1
            if seen % size == 0:
                yield Rows(_names(rows), rows, typed=True) if rows else None
                rows = []
    if seen % size:
        yield Rows(_names(rows), rows, typed=True) if rows else None


def _parquet(path: Path, known: Collection[str], n: int | None) -> Rows:
    n = _parquet_file(path).metadata.num_rows if n is None else n
    return next(_parquet_blocks(path, max(1, n), n, lambda number: True), None) or Rows((), [], typed=True)


def _parquet_blocks(path: Path, size: int, n: int, wanted: Callable[[int], bool]) -> Iterator[Rows | None]:
    left = n
    for number, batch in enumerate(_batches(path, size)):
        if left <= 0:
            return
        first, count = n - left, min(left, batch.num_rows)
        left -= count
        if not wanted(number):
            yield None
            continue
        with _parquet_errors(path):
            entries = batch.slice(0, count).to_pylist()
        rows = [(f"row {first + i} of {path.name}", row) for i, row in enumerate(entries)]
        yield Rows(_names(rows), rows, typed=True)


def _batches(path: Path, size: int) -> Iterator[Any]:
    file = _parquet_file(path)
    with _parquet_errors(path):
        yield from file.iter_batches(batch_size=size)


def _parquet_file(path: Path) -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        needs = f"{path.name} is Parquet, which pyarrow reads"
        raise ValueError(f"{needs}: pip install 'eapcore[parquet]' ({error})") from error
    with _parquet_errors(path):
        return pyarrow.parquet.ParquetFile(path)


@contextmanager
def _parquet_errors(path: Path) -> Iterator[None]:
    """What pyarrow says of a damaged file, which it does not name."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} must be a Parquet file, but it cannot be read: {error}") from error


def _json(path: Path, known: Collection[str], n: int | None) -> Rows:
    content = parsed(path.read_text(encoding="utf-8-sig"), path.name)
    aside: tuple[str, ...] = ()
    if isinstance(content, dict) and isinstance(content.get("prompts"), list):  # auto-circuit's
        beside = [name for name in content if name != "prompts"]
        if unknown := [name for name in beside if name not in ("seq_labels", "word_idxs")]:
            raise ValueError(f"{path.name} has {listed(unknown)} beside its prompts, which nothing reads")
        aside, content = tuple(beside), content["prompts"]
    if not isinstance(content, list):
        raise ValueError(f"{path.name} must hold a list of entries, or an object with the list 'prompts'")
    places = [(f"entry {number} of {path.name}", entry) for number, entry in enumerate(content[:n])]
    rows = [(where, _row(entry, where)) for where, entry in places]
    return Rows(_names(rows), rows, typed=True, aside=aside)


def parsed(text: str, where: str) -> Any:
    """What JSON says; ValueError for what is none, and for a key twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) != len(pairs):
            twice = next(name for name, times in Counter(name for name, _ in pairs).items() if times > 1)
            raise ValueError(f"{shown(twice)} occurs twice")
        return found

    try:
        return json.loads(text, object_pairs_hook=unique)
    except RecursionError:
        raise ValueError(f"{where} is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{where} is not JSON ({error}): {FORM}") from error


def _row(entry: object, where: str) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise ValueError(f"{where} is not a JSON object, but {shown(entry)}: {FORM}")
    return entry


def _names(rows: list[tuple[str, dict[str, Any]]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for _, row in rows for name in row))


def _table(path: Path, known: Collection[str], n: int | None) -> Rows:
    with path.open(encoding="utf-8-sig", newline="") as file:
        text = file.read()
    separators = "\t" if path.suffix.lower() == ".tsv" else ",;\t"
    headers = {separator: _header(text, separator) for separator in separators}
    separator = max(separators, key=lambda each: len(set(headers[each]) & set(known)))
    header, rows = headers[separator], []
    if twice := [name for name, times in Counter(header).items() if times > 1]:
        raise ValueError(f"{path.name} has the column {listed(twice)} twice: which one counts?")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        filled = (cells for cells in reader if cells)
        next(filled, None)
        for cells in islice(filled, n):
            where = f"line {reader.line_num} of {path.name}"
            if len(cells) != len(header):
                raise ValueError(
                    f"{where} has {len(cells)} cells, but the header names {len(header)} ({listed(header)}): quote a "
                    f"text in which {separator!r} occurs"
                )
            rows.append((where, dict(zip(header, cells, strict=True))))
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num} of {path.name} is not CSV ({error})") from error
    # pandas writes its row numbers into a first column without a name, and reads that as "Unnamed: 0".
    numbers = header[:1] if header[:1] in (("",), ("Unnamed: 0",)) else ()
    if numbers and not all(row[header[0]].isdecimal() for _, row in rows):
        raise ValueError(f"{path.name} has a first column without a name that holds no row numbers: name it")
    for _, row in rows if numbers else ():
        del row[header[0]]
    return Rows(header[len(numbers) :], rows, typed=False, aside=("row numbers",) if numbers else ())


def _header(text: str, separator: str) -> tuple[str, ...]:
    try:
        return tuple(next((cells for cells in csv.reader(io.StringIO(text), delimiter=separator) if cells), ()))
    except csv.Error:
        return ()
