"""How objects show themselves: a line in a terminal, a card in a notebook, pictures and pages by the room above."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from html import escape
from typing import Any

from torch import Tensor

_LONGEST = 60  # characters of a field's value


def short(self: Any) -> str:
    """A dataclass in a line: every field, of tensors the sizes and the dtype, of long values the beginning."""
    shown = [f"{field.name}={_value(getattr(self, field.name))}" for field in fields(self) if field.repr]
    return f"{type(self).__name__}({', '.join(shown)})"


def _value(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, Mapping):
        return _cut("{" + ", ".join(str(key) for key in value) + "}")
    if isinstance(value, Sequence) and not isinstance(value, str):
        few = ", ".join(_value(item) for item in value[:3])
        return f"[{_cut(few)}{f', … {len(value)} in all' if len(value) > 3 else ''}]"
    return _cut(repr(value))


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def made_of(meta: Mapping[str, Any]) -> str:
    """Which model, task and method a result's header names, e.g. "gpt2, ioi, eap"; "" where it names none."""
    names = [(meta.get(key) or {}).get("name") for key in ("model", "task", "method")]
    return ", ".join(str(name) for name in names if name)


def card(
    title: str, facts: Sequence[tuple[str, object]], header: Sequence[str] = (), rows: Sequence[Sequence[object]] = ()
) -> str:
    """A notebook's view: a title, facts, and a table; everything is escaped."""

    def line(cells: Sequence[object], tag: str) -> str:
        style = "text-align:left;padding:1px 12px 1px 0"
        return "<tr>" + "".join(f'<{tag} style="{style}">{escape(str(cell))}</{tag}>' for cell in cells) + "</tr>"

    known = "".join(line(fact, "td") for fact in facts)
    table = f"<table>{line(header, 'th')}{''.join(line(row, 'td') for row in rows)}</table>" if rows else ""
    return f"<div><strong>{escape(title)}</strong><table>{known}</table>{table}</div>"


def need(package: str, what: str) -> Any:
    """A package out of the extra `report`; RuntimeError, in a sentence, where it is not installed."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise RuntimeError(f"{what} needs the package {package}: pip install 'eapcore[report]' ({error})") from error


def report_room(module: str) -> Any:
    """A module of `eapcore.report`, which stands above this room and reads from it: found by name when it is asked for,
    as a plug-in would be."""
    return importlib.import_module(f"eapcore.report.{module}")
