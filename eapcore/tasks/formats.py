"""What the fields of a task file mean: our own, and those of the task files that other people publish."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from eapcore.tasks.rows import FORM, Rows, listed, shown

Prompt = str | list[int]
Tokens = list[str | int]
Row = Mapping[str, Any]
_NEVER = r"(?!)"
_LIST = re.compile(r"\s*\[[\s,]*\d+(?:[\s,]+\d+)*[\s,]*\]\s*", re.ASCII)  # token ids as JSON, Python, numpy print them
# The same as tuples, tensors and arrays print themselves, and without brackets; and one number as tables keep it.
_PRINTED = re.compile(r"\s*(?:[\w.]+\()?[\[(]*[\s,]*\d+(?:[\s,;]+\d+)*[\s,]*[\])]*(?:,\s*\w+=[\w.]+)*\)?\s*", re.ASCII)
_ID = re.compile(r"\s*\d+\s*", re.ASCII)
_NUMBER = re.compile(r"\s*[+-]?\d+(?:\.0*)?\s*", re.ASCII)


@dataclass(frozen=True, slots=True)
class Entry:
    """A row as it is meant: each prompt a text or token ids, each answer one text or id, the position if one is
    given."""

    clean: Prompt
    corrupt: Prompt | None
    answer: Tokens
    wrong: Tokens
    position: int | None = None


@dataclass(frozen=True, slots=True)
class Format:
    """A kind of task file.

    name: whose it is. needs: the fields by which it is recognised. reads: other fields that it may have and that are
    read, aside: and that are not, each as an expression. corrupt: as an expression, the fields that are corrupt
    prompts; first: those that are taken before others where there are several. entry: what a row means, of the row, the
    field of its corrupt prompt, and where it is. says: what each field is taken for.
    """

    name: str
    needs: tuple[str, ...]
    entry: Callable[[Row, str | None, str], Entry]
    says: str
    reads: str = _NEVER
    aside: str = _NEVER
    corrupt: str = _NEVER
    first: tuple[str, ...] = ()

    def corruptions(self, fields: Iterable[str]) -> list[str]:
        """Which of some fields are corrupt prompts."""
        found = [field for field in fields if re.fullmatch(self.corrupt, field) and field not in self.needs]
        return [field for field in found if not self._is_aside(field)]

    def unknown(self, fields: Iterable[str]) -> list[str]:
        """Which of some fields this kind of file does not have."""
        named = f"{self.reads}|{self.corrupt}"
        return [f for f in fields if f not in self.needs and not re.fullmatch(named, f) and not self._is_aside(f)]

    def left_aside(self, fields: Iterable[str]) -> list[str]:
        """Which of some fields are not read."""
        return [field for field in fields if field not in self.needs and self._is_aside(field)]

    def _is_aside(self, field: str) -> bool:
        return re.fullmatch(self.aside, field) is not None


# Values by their field


def text(value: object, what: str) -> str:
    """The value of a field of text."""
    if not isinstance(value, str):
        raise ValueError(f"{what} must be text, got {shown(value)}")
    return value


def texts(value: object, what: str) -> Tokens:
    """The value of a field of one text or a list of them."""
    return [text(item, what) for item in value] if isinstance(value, list) else [text(value, what)]


def ids(value: object, what: str) -> list[int]:
    """The value of a field of token ids: an integer, a list of them, or either one printed."""
    if isinstance(value, str):
        if not _LIST.fullmatch(value) and not _ID.fullmatch(value):
            raise ValueError(f"{what} must be token ids, got {shown(value)}")
        found = re.findall(r"\d+", value)
        value = [int(digits) if len(digits) < 20 else -1 for digits in found]
    items: list[Any] = value if isinstance(value, list) else [value]
    bad = [item for item in items if not _is_id(item)]
    if bad or not items:
        raise ValueError(f"{what} must be token ids, integers from 0 on, got {shown(bad[0] if bad else value)}")
    return items


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def position(value: object, where: str) -> int | None:
    """The value of the field that says where the metric reads."""
    if value in (None, ""):
        return None
    if isinstance(value, str) and re.fullmatch(r"\s*-?[0-9]{1,9}\s*", value):
        return int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"the position of {where} must be an integer, got {shown(value)}")
    return value


# Our own


def _own(row: Row, corrupt: str | None, where: str) -> Entry:
    clean, wrong = _own_prompt(row, "clean", where), _own_tokens(row, "wrong", where)
    return Entry(
        clean if clean is not None else "",
        _own_prompt(row, "corrupt", where),
        _own_tokens(row, "answer", where),
        wrong,
        position(row.get("position"), where),
    )


def _own_field(row: Row, field: str) -> tuple[str, Any]:
    """The one of a field's names that is given, and its value."""
    for name in (field + "_ids", field + "_text", field):
        if row.get(name) not in (None, ""):
            return name, row[name]
    return field, None


def _own_prompt(row: Row, field: str, where: str) -> Prompt | None:
    name, value = _own_field(row, field)
    what = f"{name} of {where}"
    if value is None:
        return None
    if name != field:
        return ids(value, what) if name.endswith("_ids") else text(value, what)
    if isinstance(value, str):
        _refuse_printed(value, name, where)
        return value
    if isinstance(value, list) and value and all(_is_id(item) for item in value):
        return value
    raise ValueError(f"{what} must be text or a list of token ids, got {shown(value)}")


def _own_tokens(row: Row, field: str, where: str) -> Tokens:
    name, value = _own_field(row, field)
    what = f"the {'wrong answer' if field == 'wrong' else field} of {where}"
    if value is None:
        return []
    if name != field:
        return [*ids(value, what)] if name.endswith("_ids") else texts(value, what)
    items = value if isinstance(value, list) else [value]
    for item in items:
        if isinstance(item, str):
            _refuse_printed(item, name, where)
        elif not _is_id(item):
            raise ValueError(f"{what} must be text, a token id, or a list of them, got {shown(item)}")
    return list(items)


def _refuse_printed(value: str, name: str, where: str) -> None:
    if _LIST.fullmatch(value):
        _refuse_both(name, value, where, "token ids")


def _refuse_both(name: str, value: str, where: str, other: str) -> None:
    raise ValueError(
        f"{name} {shown(value)} of {where} may be text or {other}: call the field {name}_text or {name}_ids"
    )


OWN = Format(
    "our own",
    ("clean", "answer"),
    _own,
    "",
    reads=r"wrong|position|(?:clean|corrupt|answer|wrong)_(?:ids|text)",
    corrupt="corrupt",
    first=("corrupt",),
)


def columns_named(rows: Rows) -> Rows:
    """A table of our own with each column under the name that says what it is: `answer_ids` or `answer_text`.

    A column of lists such as [4, 8, 15] is one of ids, and one without is text. What could be either is refused: a
    number alone where the prompts are text, ids without commas, and a column with both.
    """
    renamed: dict[str, str] = {}
    prompts_are_ids = _is_column_of_ids(rows, "clean_ids" if "clean_ids" in rows.fields else "clean")
    for field in ("clean", "corrupt", "answer", "wrong"):
        if field not in rows.fields:
            continue
        filled = [(where, row[field]) for where, row in rows.rows if row[field] != ""]
        some_ids = any(_is_json_ids(cell) for _, cell in filled)
        for where, cell in filled:
            if _is_json_ids(cell) or (field in ("answer", "wrong") and prompts_are_ids and _ID.fullmatch(cell)):
                some_ids = True
            elif _PRINTED.fullmatch(cell) or _NUMBER.fullmatch(cell):
                _refuse_both(field, cell, where, "token ids")
            elif some_ids:
                _refuse_both(field, cell, where, "token ids, as another line has them")
        renamed[field] = f"{field}_{'ids' if some_ids else 'text'}"
    named = []
    for where, row in rows.rows:
        named.append((where, {renamed.get(name, name): _cell(name, cell, where) for name, cell in row.items()}))
    return Rows(tuple(renamed.get(name, name) for name in rows.fields), named, rows.typed, rows.aside)


def _is_column_of_ids(rows: Rows, field: str) -> bool:
    return bool(rows.rows) and all(_is_json_ids(row.get(field, "")) for _, row in rows.rows)


def _is_json_ids(cell: str) -> bool:
    try:
        return _LIST.fullmatch(cell) is not None and bool(json.loads(cell))
    except ValueError:  # without commas, or a number beyond what Python reads
        return False


def _cell(name: str, cell: str, where: str) -> Any:
    """A list of texts, where a cell of answers holds one as JSON."""
    stripped = cell.strip()
    if (
        name in ("answer", "wrong", "answers", "wrong_answers")
        and stripped[:1] == "["
        and stripped[-1:] == "]"
        and not _LIST.fullmatch(cell)
    ):
        try:
            items = json.loads(stripped)
        except (ValueError, RecursionError):
            items = None
        if not items or not all(isinstance(item, str) for item in items):
            raise ValueError(
                f"{name} {shown(cell)} of {where} may be a text or a list: a list of texts is written "
                '[" one", " two"], and a text that begins with a bracket stands in the column '
                f"{name}_text"
            )
        return items
    return cell


# Other people's

_CORRUPTED = r"corrupted(?:_(?!\w*id[xs]$)\w+)?"  # corrupted_hard and the like


def _id_pairs(answer: str, wrong: str, aside: str) -> Format:
    def entry(row: Row, field: str | None, where: str) -> Entry:
        return Entry(
            text(row["clean"], f"clean of {where}"),
            text(row[field or "corrupted"], f"{field} of {where}"),
            [*ids(row[answer], f"{answer} of {where}")],
            [*ids(row[wrong], f"{wrong} of {where}")],
        )

    return Format(
        "EAP-IG's",
        ("clean", answer, wrong),
        entry,
        f"answer from {answer}, wrong from {wrong}, token ids",
        aside=aside,
        corrupt=_CORRUPTED,
        first=("corrupted",),
    )


def _years(field: str) -> Format:
    """EAP-IG's greater-than: the field holds a year's last two digits, and which tokens are right follows from it."""

    def entry(row: Row, corrupt: str | None, where: str) -> Entry:
        clean, value = text(row["clean"], f"clean of {where}"), row[field]
        if isinstance(value, str) and re.fullmatch(r"[0-9]{1,2}", value):
            value = int(value)
        century = re.search(r"\d\d\Z", clean)
        is_year = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 100
        if century is None or not is_year or f"{century[0]}{value:02d}" not in clean:
            raise ValueError(
                f"{field} {shown(value)} of {where} may be a token id, or the last two digits of the year whose "
                f"beginning the prompt repeats at its end: for ids call it correct_idx and add incorrect_idx"
            )
        if value == 99:
            raise ValueError(f"{where} has the year {century[0]}99, behind which no two digits are right")
        return Entry(
            clean,
            text(row[corrupt or "corrupted"], f"{corrupt} of {where}"),
            [f"{year:02d}" for year in range(value + 1, 100)],
            [f"{year:02d}" for year in range(value + 1)],
        )

    return Format(
        "EAP-IG's greater-than",
        ("clean", field),
        entry,
        f"a year's last two digits from {field}: answer the two digits above them, wrong the others (its metric is "
        "prob_diff)",
        corrupt=_CORRUPTED,
        first=("corrupted",),
    )


def _agreement(row: Row, corrupt: str | None, where: str) -> Entry:
    raise ValueError(
        f"{where} says by 'plural' whether the subject is singular or plural, but not which tokens are right (its "
        "publisher keeps the list of verbs elsewhere): add the answers as correct_idx and incorrect_idx"
    )


def _auto_circuit(row: Row, corrupt: str | None, where: str) -> Entry:
    return Entry(
        text(row["clean"], f"clean of {where}"),
        text(row["corrupt"], f"corrupt of {where}"),
        texts(row["answers"], f"answers of {where}"),
        texts(row["wrong_answers"], f"wrong_answers of {where}"),
    )


def _mib(row: Row, field: str | None, where: str) -> Entry:
    """Names to choose from: the answer's token follows a space. Labels: the counterfactual's own is the wrong one."""
    other = _counterfactual(row, field, where)
    answer, rest = _choice(row, where)
    if isinstance(row["choices"], list):
        return Entry(
            text(row["prompt"], f"prompt of {where}"), other["prompt"], [f" {answer}"], [f" {x}" for x in rest]
        )
    wrong, _ = _choice(other, f"{field} of {where}")
    return Entry(text(row["prompt"], f"prompt of {where}"), other["prompt"], [answer], [wrong])


def _choice(row: Row, where: str) -> tuple[str, list[str]]:
    """(the choice that answerKey names, the others)."""
    choices, key = row.get("choices"), row.get("answerKey")
    labels = choices.get("label") if isinstance(choices, Mapping) else choices
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise ValueError(f"choices of {where} must be a list of texts, or an object with the list 'label'")
    if not isinstance(key, int) or isinstance(key, bool) or not 0 <= key < len(labels):
        raise ValueError(
            f"answerKey of {where} must be the place of one of its {len(labels)} choices, got {shown(key)}"
        )
    return labels[key], [label for place, label in enumerate(labels) if place != key]


def _arithmetic(row: Row, field: str | None, where: str) -> Entry:
    other = _counterfactual(row, field, where)
    answers = [row["label"], other.get("label")]
    if not all(isinstance(x, int | str) and not isinstance(x, bool) and x != "" for x in answers):
        raise ValueError(f"label of {where} and of its {field} must be text or numbers")
    return Entry(text(row["prompt"], f"prompt of {where}"), other["prompt"], [str(answers[0])], [str(answers[1])])


def _counterfactual(row: Row, field: str | None, where: str) -> Mapping[str, Any]:
    other = row.get(field or "")
    if not isinstance(other, Mapping) or not isinstance(other.get("prompt"), str):
        raise ValueError(f"{field} of {where} must be an object with the text 'prompt', got {shown(other)}")
    return other


def _peap(row: Row, field: str | None, where: str) -> Entry:
    corrupt = None if row.get("corrupt") is None else text(row["corrupt"], f"prompt of {where} in its second file")
    answer, wrong = (text(row[name], f"{name} of {where}") for name in ("correct_token", "wrong_token"))
    return Entry(text(row["prompt"], f"prompt of {where}"), corrupt, [answer], [wrong])


PEAP = Format(
    "PEAP's",
    ("prompt", "correct_token", "wrong_token"),
    _peap,
    "clean from prompt, answer from correct_token, wrong from wrong_token, text",
    # Spans of positions have the task's own names there.
    aside=r"(?!prompt$|correct_token$|wrong_token$|clean|corrupt|answer|wrong|position).*",
)
_MIB_FIRST = ("s2_io_flip_counterfactual", "symbol_counterfactual", "random_counterfactual")  # as MIB itself takes them
FORMATS = (
    Format(
        "MIB's",
        ("prompt", "choices", "answerKey"),
        _mib,
        "answer from choices by answerKey, wrong the other choices, or the counterfactual's answer where choices have "
        "labels; text",
        aside=r"metadata|template|answerPosition|id|question|context|source|enumeration|difficulty|name",
        corrupt=r"\w+_counterfactual",
        first=_MIB_FIRST,
    ),
    Format(
        "MIB's arithmetic",
        ("prompt", "label", "operator"),
        _arithmetic,
        "answer from label, wrong from the counterfactual's label, text",
        aside=r"metadata|template|operands?|operand\d|id|question",
        corrupt=r"\w+_counterfactual",
        first=_MIB_FIRST,
    ),
    PEAP,
    _id_pairs("correct_idx", "incorrect_idx", r"label|group|split"),
    _id_pairs("clean_answer_idx", "corrupted_answer_idx", r"label|group|split"),
    _id_pairs("answer_idx", "corrupted_idx", r"label|group|split"),
    _id_pairs("clean_idx", "corrupted_idx", r"label|group|split"),
    _id_pairs(
        "answers_idx",
        "corrupted_answers_idx",
        r"h1|h2|c1|c2|(?:corrupted_)?(?:hypernym|answers)|clean2|corrupted2|prob_diff",
    ),
    _id_pairs("country_idx", "corrupted_country_idx", r"(?:corrupted_)?(?:capital|country)|prob_diff"),
    _id_pairs("capital_idx", "corrupted_capital_idx", r"(?:corrupted_)?(?:capital|country)|prob_diff"),
    Format(
        "auto-circuit's",
        ("clean", "answers", "wrong_answers"),
        _auto_circuit,
        "answers and wrong_answers, text",
        corrupt="corrupt",
        first=("corrupt",),
    ),
    Format("EAP-IG's agreement", ("clean", "plural"), _agreement, "", aside="group", corrupt=_CORRUPTED),
    _years("label"),
    _years("correct_idx"),
    OWN,
)
KNOWN = frozenset(
    {name for kind in FORMATS for name in (*kind.needs, *kind.first)}
    | {"corrupted", "position", "wrong"}
    | {f"{name}_{what}" for name in ("clean", "corrupt", "answer", "wrong") for what in ("ids", "text")}
)


def recognise(fields: tuple[str, ...], where: str) -> Format:
    """The kind of file that has these fields.

    Raises:
        ValueError: no kind has them, or the kind that it looks like has not all of them: with the file's fields, and
            for each that is unknown the nearest one that is known.
    """
    # A field that says what it is by its name counts as the one without.
    plain = {re.sub(r"\A(clean|answer)_(?:ids|text)\Z", r"\1", field) for field in fields}
    found = next((kind for kind in FORMATS if plain.issuperset(kind.needs)), OWN)
    if found is not OWN and plain != set(fields):
        found = OWN
    if unknown := found.unknown(fields):
        meant = {field: nearest(field, found) for field in unknown[:4]}
        near = [shown(field) + (f" (is {name} meant?)" if name else "") for field, name in meant.items()]
        more = f" and {len(unknown) - 4} more" if len(unknown) > 4 else ""
        kind = "" if found is OWN else f" in {found.name} task files"
        reads = f", where {listed(_own_names(found))} are read" if None in meant.values() else ""
        raise ValueError(
            f"{where} has fields that nothing{kind} reads: {', '.join(near)}{more}; its fields are "
            f"{listed(fields)}{reads}"
        )
    for name in ("clean", "corrupt", "answer", "wrong"):
        if len(both := [field for field in fields if re.fullmatch(f"{name}(_ids|_text)?", field)]) > 1:
            raise ValueError(f"{where} has {' and '.join(both)}: which one counts?")
    return found


def _own_names(kind: Format) -> list[str]:
    return sorted({*kind.needs, *kind.first, *(("position", "wrong") if kind is OWN else ())})


def nearest(field: str, kind: Format) -> str | None:
    """The field of a kind of file, or of any, that a name is most like; None if it is like none."""
    said = {"pos": "position", "positions": "position", "answers": "answer", "corrupted": "corrupt"}
    said |= {"wrong_answers": "wrong", "wrong_answer": "wrong", "prompt": "clean", "correct": "answer"}
    said |= {"counterfactual": "corrupt", "incorrect": "wrong", "label": "answer", "target": "answer"}
    lower = field.strip().lower()
    if kind is OWN and lower in said:
        return said[lower]
    like = [_own_names(kind), sorted(KNOWN)]
    close = [found for names in like for found in difflib.get_close_matches(lower[:80], names, 1, 0.5)]
    alike = {name: difflib.SequenceMatcher(None, name, lower[:80]).ratio() for name in close}
    return max(alike, key=alike.__getitem__) if alike else None


def check_row(kind: Format, row: Row, corrupt: str | None, where: str) -> None:
    """Raise ValueError for a row that lacks what its kind needs; corrupt: the field of its corrupt prompt."""
    if kind is OWN:
        missing = [name for name in kind.needs if _own_field(row, name)[1] is None]
        if missing:
            raise ValueError(f"{where} has no {' and no '.join(missing)}: {FORM}")
        return
    needs = kind.needs if corrupt is None else (*kind.needs, corrupt)
    if missing := [name for name in needs if row.get(name) in (None, "")]:
        raise ValueError(f"{where} has no {' and no '.join(missing)}, which {kind.name} task files need")
