"""Prompt pairs from a task file: our own kind, and those that other people publish."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from eapcore.tasks.formats import KNOWN, OWN, PEAP, Format, Prompt, Tokens, check_row, columns_named, recognise
from eapcore.tasks.pairs import PromptPairs
from eapcore.tasks.rows import Rows, listed, read_rows, shown
from eapcore.text.tokenizer import Tokenizer, one_token

Encode = Callable[[str], list[int]]


def read_pairs(
    path: str | Path, encode: Encode | None = None, *, n: int | None = None, corruption: str | None = None
) -> PromptPairs:
    """Read prompt pairs from a file, a row each.

    Our own kind has the fields `clean`, `answer` and optionally `corrupt` (the clean prompt by default: for ablations
    with zero or a mean), `wrong` and `position` (where the metric reads; the last token by default). Prompts are text
    or a list of token ids; `answer` and `wrong` are one text or id, or a list of them for a token set. In JSON a value
    is what its type says. A table's cells have no types: a list such as [4, 8, 15] is ids; a name such as `answer_ids`
    or `answer_text`, which JSON may use too, says it where a cell could be either.

    Other people's kinds are recognised by their fields: EAP-IG's and eap-ig-faithfulness's, auto-circuit's, MIB's and
    PEAP's. `PromptPairs.details["fields"]` says
    what each field was taken for.

    Args:
        path: the file; its ending says which of `rows.ENDINGS` it is. Tables have commas, semicolons or tabs.
        encode: text → token ids, needed where the file has text; a `Tokenizer` says what prompts begin with.
        n: only the first n pairs; None reads all.
        corruption: the field of the corrupt prompts, of files that have several; PEAP keeps them in a second file,
            whose path it is there.

    Raises:
        ValueError: another ending; a field that nothing reads, that is there twice or is missing; a value that could be
            text or ids; text without a tokenizer; an answer of several tokens; pairs that `PromptPairs.from_lists`
            refuses. The line is named.
        OSError: the file cannot be read.
    """
    path = Path(path)
    rows = read_rows(path, KNOWN, n)
    if not rows.rows:
        raise ValueError(f"the task {shown(path.name)} is empty: at least one prompt pair is needed")
    return pairs_of(rows, path, encode, corruption)


def pairs_of(rows: Rows, path: Path, encode: Encode | None, corruption: str | None) -> PromptPairs:
    """`read_pairs` for rows that are read."""
    kind = recognise(rows.fields, path.name)
    if kind is OWN and not rows.typed:
        rows = columns_named(rows)
    field: str | None
    if kind is PEAP and corruption is not None:
        rows, field = _with_second_file(rows, Path(corruption)), "corrupt"
    else:
        field = _corruption(kind, rows, corruption, path.name)
    encoder = _Encoder(encode)
    clean, corrupt, answers, wrong, positions = [], [], [], [], []
    for where, row in rows.rows:
        check_row(kind, row, field, where)
        entry = kind.entry(row, field, where)
        clean.append(encoder.prompt(entry.clean, f"clean of {where}"))
        given = entry.corrupt is not None and entry.corrupt != ""
        corrupt.append(encoder.prompt(entry.corrupt, f"corrupt of {where}") if given else clean[-1])
        answers.append(encoder.tokens(entry.answer, f"the answer of {where}"))
        wrong.append(encoder.tokens(entry.wrong, f"the wrong answer of {where}"))
        positions.append(len(clean[-1]) - 1 if entry.position is None else entry.position)
    details = {"fields": _reading(kind, rows, field, corruption)}
    if encoder.prompts_are_text and isinstance(encode, Tokenizer):
        details["bos"] = encode.begins_with
    names = [where for where, _ in rows.rows]
    return PromptPairs.from_lists(
        clean, corrupt, answers, wrong, positions=positions, name=path.name, details=details, names=names
    )


class _Encoder:
    """Text and ids → ids, each answer's text encoded once; it remembers what it met."""

    def __init__(self, encode: Encode | None) -> None:
        self.encode = encode
        self.known: dict[str, int] = {}
        self.prompts_are_text = False

    def prompt(self, value: Prompt | None, what: str) -> list[int]:
        if not isinstance(value, str):
            return value or []
        self.prompts_are_text, known = True, self._tokenizer(what)
        try:
            return (known.prompt if isinstance(known, Tokenizer) else known)(value)
        except ValueError as error:
            raise ValueError(f"{what}: {error}") from error

    def tokens(self, items: Tokens, what: str) -> list[int]:
        return [self._token(item, what) if isinstance(item, str) else item for item in items]

    def _token(self, item: str, what: str) -> int:
        if item not in self.known:
            self.known[item] = one_token(self._tokenizer(what), item, what)
        return self.known[item]

    def _tokenizer(self, what: str) -> Encode:
        if self.encode is None:
            raise ValueError(
                f"{what} is text, but this model has no tokenizer here: give token ids, or --tokenizer FOLDER"
            )
        return self.encode


def _corruption(kind: Format, rows: Rows, wanted: str | None, name: str) -> str | None:
    """The field of the corrupt prompts: the one that is wanted, the kind's own first, or the only one."""
    found = kind.corruptions(rows.fields)
    if wanted is not None:
        if wanted not in found:
            has = f"has {listed(found)}" if found else "has no corrupt prompts"
            raise ValueError(f"{name} has no corrupt prompts called {shown(wanted)}: it {has}")
        return wanted
    first = [field for field in kind.first if field in found]
    if not found and kind not in (OWN, PEAP):
        raise ValueError(
            f"{name} has no corrupt prompts, which {kind.name} task files need; its fields are {listed(rows.fields)}"
        )
    if not first and len(found) > 1:
        raise ValueError(f"{name} has several corrupt prompts, {listed(found)}: choose one by --corruption")
    return next(iter(first or found), None)


def _with_second_file(rows: Rows, path: Path) -> Rows:
    """PEAP's rows with the prompts of its file of counterfactuals, which has the same rows."""
    if not path.is_file():
        raise ValueError(
            f"PEAP keeps its corrupt prompts in a second file, whose path is needed, got {shown(str(path))}"
        )
    second = read_rows(path, KNOWN, len(rows.rows))
    if recognise(second.fields, path.name) is not PEAP or len(second.rows) != len(rows.rows):
        raise ValueError(
            f"{path} must have prompt, correct_token and wrong_token in {len(rows.rows)} rows, as the task file has"
        )
    both = zip(rows.rows, second.rows, strict=True)
    joined = [(where, {**row, "corrupt": other["prompt"]}) for (where, row), (_, other) in both]
    return replace(rows, rows=joined)


def _reading(kind: Format, rows: Rows, field: str | None, corruption: str | None) -> str:
    """One line: what each field was taken for."""
    if kind is OWN:
        said = [f"{name} {_kind(rows, name)}" for name in rows.fields]
    else:
        source = "none" if field is None else str(corruption) if kind is PEAP else field
        others = [name for name in kind.corruptions(rows.fields) if name != field]
        said = [f"{kind.name}: corrupt from {source}" + (f" (not {listed(others)})" if others else ""), kind.says]
    aside = [*rows.aside, *kind.left_aside(rows.fields)]
    return ", ".join(said) + (f"; not read: {listed(aside)}" if aside else "")


def _kind(rows: Rows, name: str) -> str:
    """Which kind of values a field of ours has."""
    if name == "position" or name.endswith(("_ids", "_text")):
        return "(position)" if name == "position" else "token ids" if name.endswith("_ids") else "text"
    found = dict.fromkeys(_kinds(row.get(name) for _, row in rows.rows))
    return " and ".join(found) or "empty"


def _kinds(values: Iterable[object]) -> Iterable[str]:
    for value in values:
        for item in value if isinstance(value, list) else [value]:
            if item not in (None, ""):
                yield "text" if isinstance(item, str) else "token ids"
