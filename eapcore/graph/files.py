"""The files that keep scores, circuits and results: written beside and renamed, with a format version."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from eapcore.graph.graph import Graph

FORMAT_VERSION = 1


def write_text(path: Path, content: Any) -> None:
    """Write JSON; what is no text, such as parts of a file's name, as escapes."""
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8", errors="backslashreplace")


def finite(value: Any) -> Any:
    """The value of a JSON file: NaN and infinities, which JSON does not have, as None."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`, or the file that it links to, renamed to it if the block ends well, removed if it
    does not.

    Raises:
        OSError: the folder cannot be written to, or there is something else than a file; the message names it.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path = path.resolve()
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        if path.exists() and not path.is_file():
            raise OSError("it is no regular file")
        handle, name = tempfile.mkstemp(prefix=f".{path.name[:50]}.", dir=path.parent)
        temporary = Path(name)
        os.close(handle)
    except OSError as error:
        raise type(error)(f"{path} cannot be written: {error.strerror or error}; choose another place") from error
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())  # mkstemp's files are for their owner alone
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


class _NewerFormat(ValueError):
    """A file of a newer format, whose content is not looked at."""


def _check_version(path: Path, version: object) -> None:
    if not isinstance(version, int) or isinstance(version, bool):
        raise ValueError(f"its format version is {version!r}")
    if version > FORMAT_VERSION:
        raise _NewerFormat(
            f"{path} has the format version {version}, but this eapcore reads up to {FORMAT_VERSION}: update eapcore"
        )


def _graph(fields: Mapping[str, Any]) -> Graph:
    """The graph of a file's header; ValueError for what is none."""
    graph = Graph(**fields)
    sizes = (graph.n_layers, graph.n_heads, *([] if graph.n_kv is None else [graph.n_kv]))
    known = all(type(size) is int and size > 0 for size in sizes)
    if not known or {type(graph.has_mlp), type(graph.parallel)} != {bool} or graph.n_heads % sizes[-1]:
        raise ValueError(f"its graph is {fields}")
    return graph


def _reason(error: Exception) -> str:
    return f"it has no {error}" if isinstance(error, KeyError) else str(error)


def write_json(path: str | Path, kind: str, result: Any) -> None:
    """Write a result, a dataclass, as JSON beside its kind.

    Tensors become lists, circuits the names of their edges, scores what is known of them and those of the edges that
    `meta["method"]["edges"]` names; NaN and infinities null.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            return plain(value.tolist())
        if hasattr(value, "as_json"):
            return plain(value.as_json())
        if is_dataclass(value):
            return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
        if isinstance(value, Mapping):
            return {str(key): plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return finite(value)

    content = {"format": f"eapcore-{kind}", "format_version": FORMAT_VERSION, **plain(result)}
    with replacing(path) as temporary:
        write_text(temporary, content)
