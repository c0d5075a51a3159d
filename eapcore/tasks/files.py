"""Prompt pairs from a JSONL or CSV file."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from eapcore.tasks.pairs import PromptPairs
from eapcore.text.tokenizer import Tokenizer, one_token

Encode = Callable[[str], list[int]]
_FIELDS = ("clean", "answer")
_FORM = 'an entry is {"clean": …, "corrupt": …, "answer": …, "wrong": …}, prompts as text or lists of token ids'


def read_pairs(path: str | Path, encode: Encode | None = None, *, n: int | None = None) -> PromptPairs:
    """Read prompt pairs from a file, one a line.

    JSONL: objects with `clean`, `answer` and optionally `corrupt` (the clean prompt by default: for ablations with zero
    or a mean), `wrong` and `position` (where the metric reads; the last token by default). Prompts are text or a list
    of token ids; `answer` and `wrong` are one text or id, or a list of them for a token set. CSV: the same names as
    columns; a cell is text unless it is a JSON list such as [4, 8, 15].

    Args:
        path: the file; its ending says which format, .jsonl or .csv.
        encode: text → token ids, needed where the file has text; a `Tokenizer` says what prompts begin with.
        n: only the first n pairs; None reads all.

    Raises:
        ValueError: another ending, a line that is not such an entry, text without a tokenizer, an answer of several
            tokens, or pairs that `PromptPairs.from_lists` refuses. The line is named.
        OSError: the file cannot be read.
    """
    path = Path(path)
    readers = {".jsonl": _jsonl, ".csv": _csv}
    if path.suffix not in readers:
        raise ValueError(f"a task file must end in {' or '.join(readers)}, got {path.name!r}")
    clean, corrupt, answers, wrong, positions = [], [], [], [], []
    text = False
    try:
        entries = readers[path.suffix](path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8 text: {error}") from error
    for where, entry in entries[:n]:
        missing = [field for field in _FIELDS if entry.get(field) in (None, "")]
        if missing:
            raise ValueError(f"{where} has no {' and no '.join(missing)}: {_FORM}")
        clean.append(_prompt(entry["clean"], encode, f"clean of {where}"))
        text = text or isinstance(entry["clean"], str)
        given = entry.get("corrupt") not in (None, "")
        corrupt.append(_prompt(entry["corrupt"], encode, f"corrupt of {where}") if given else clean[-1])
        answers.append(_tokens(entry["answer"], encode, f"the answer of {where}"))
        wrong.append(_tokens(entry.get("wrong"), encode, f"the wrong answer of {where}"))
        position = entry.get("position")
        if position in (None, ""):
            position = len(clean[-1]) - 1
        elif isinstance(position, str) and re.fullmatch(r"\s*-?[0-9]+\s*", position):
            position = int(position)
        if not isinstance(position, int) or isinstance(position, bool):
            raise ValueError(f"the position of {where} must be an integer, got {entry['position']!r}")
        positions.append(position)
    details = {"bos": encode.begins_with} if text and isinstance(encode, Tokenizer) else {}
    return PromptPairs.from_lists(clean, corrupt, answers, wrong, positions=positions, name=path.name, details=details)


def _jsonl(path: Path) -> list[tuple[str, dict[str, Any]]]:
    entries = []
    # Not splitlines, which also breaks at U+2028 and the like, and JSON allows those inside a string.
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        where = f"line {number} of {path.name}"
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is not JSON ({error}): {_FORM}") from error
        if not isinstance(entry, dict):
            raise ValueError(f"{where} is not a JSON object: {_FORM}")
        entries.append((where, entry))
    return entries


def _csv(path: Path) -> list[tuple[str, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            rows = [(f"line {reader.line_num} of {path.name}", row) for row in reader]
        except csv.Error as error:
            raise ValueError(f"line {reader.reader.line_num} of {path.name} is not CSV ({error})") from error
    for _, row in rows:
        for name, cell in row.items():
            if isinstance(cell, str) and cell.strip().startswith("["):
                try:
                    row[name] = json.loads(cell)
                except json.JSONDecodeError:
                    continue  # text that happens to begin with a bracket
    return rows


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _prompt(value: Any, encode: Encode | None, what: str) -> list[int]:
    if isinstance(value, str):
        known = _known(encode, what)
        return (known.prompt if isinstance(known, Tokenizer) else known)(value)
    if isinstance(value, list) and all(_is_id(v) for v in value):
        return value
    raise ValueError(f"{what} must be text or a list of token ids, got {value!r}")


def _tokens(value: Any, encode: Encode | None, what: str) -> list[int]:
    if value is None or value == "":
        return []
    ids = []
    for item in value if isinstance(value, list) else [value]:
        if _is_id(item):
            ids.append(item)
            continue
        if not isinstance(item, str):
            raise ValueError(f"{what} must be text, a token id, or a list of them, got {item!r}")
        ids.append(one_token(_known(encode, what), item, what))
    return ids


def _known(encode: Encode | None, what: str) -> Encode:
    if encode is None:
        raise ValueError(f"{what} is text, but this model has no tokenizer here: give token ids, or --tokenizer FOLDER")
    return encode
