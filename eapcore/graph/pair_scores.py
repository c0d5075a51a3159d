"""The scores of each pair in a folder of files, for tasks whose scores are larger than memory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from eapcore.graph.files import DAMAGED, FORMAT_VERSION, finite, load_tensors, replacing, save_tensors, write_text

SHARD = 64 << 20  # bytes of a file
_KEY, _KIND, _INDEX = "eapcore-pairs", "eapcore-pair-scores", "index.json"


class PairWriter:
    """Writes pairs' scores as they come, files of about 64 MiB: `{lane}-{number}.safetensors`.

    A file holds `index` int64 [n], which pairs of the task these are, and by name rows [n, ..].
    """

    def __init__(self, folder: str | Path, lane: int, dtype: torch.dtype, done: int = 0) -> None:
        """done: how many files of the lane are there that count."""
        self.folder, self.lane, self.dtype, self.done = Path(folder), lane, dtype, done
        self.folder.mkdir(parents=True, exist_ok=True)
        self.index: list[Tensor] = []
        self.rows: dict[str, list[Tensor]] = {}
        self.held = 0

    def add(self, index: Annotated[Tensor, "int64 n"], rows: Mapping[str, Annotated[Tensor, "n ..."]]) -> None:
        """Take some pairs' scores."""
        self.index.append(index.cpu())
        for name, x in rows.items():
            self.rows.setdefault(name, []).append(x.to(self.dtype).cpu())
            self.held += self.rows[name][-1].nbytes
        if self.held >= SHARD:
            self.flush()

    def flush(self) -> None:
        """Write what is held."""
        if not self.index:
            return
        tensors = {"index": torch.cat(self.index)} | {name: torch.cat(parts) for name, parts in self.rows.items()}
        save_tensors(self.folder / _file(self.lane, self.done), _KEY, tensors, {"format_version": FORMAT_VERSION})
        self.index, self.rows, self.held, self.done = [], {}, 0, self.done + 1


def begin_index(folder: str | Path) -> None:
    """Mark a folder as not whole."""
    (Path(folder) / _INDEX).unlink(missing_ok=True)


def write_index(folder: str | Path, files: Sequence[int], n_pairs: int, meta: Mapping[str, Any]) -> None:
    """Say which files belong together: files[lane] of each lane. Without it a folder is not whole."""
    named = [_file(lane, number) for lane, count in enumerate(files) for number in range(count)]
    content = {"format": _KIND, "format_version": FORMAT_VERSION, "n_pairs": n_pairs, "files": named}
    with replacing(Path(folder) / _INDEX) as temporary:
        write_text(temporary, finite(content | {"meta": meta}))


def read_index(folder: str | Path) -> dict[str, Any]:
    """What `write_index` wrote.

    Raises:
        ValueError: there is no such file, or one of a newer format.
    """
    path = Path(folder) / _INDEX
    try:
        found = dict(json.loads(path.read_text(encoding="utf-8")))
        version, kind = found["format_version"], found["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} must be a folder of pairs' scores that eapcore finished: {error}") from error
    if kind != _KIND or version > FORMAT_VERSION:
        raise ValueError(f"{path} has the format {kind!r} {version}, but {_KIND!r} up to {FORMAT_VERSION} is read here")
    return found


def read_pairs(folder: str | Path) -> Iterator[dict[str, Tensor]]:
    """File by file the pairs' scores, `index` int64 [n] and by name rows [n, ..]; ValueError for a damaged one."""
    for name in read_index(folder)["files"]:
        tensors, _, intact = load_tensors(Path(folder) / name, _KEY)
        if not intact:
            raise ValueError(f"{Path(folder) / name}: {DAMAGED}")
        yield tensors


def _file(lane: int, number: int) -> str:
    return f"{lane:04}-{number:06}.safetensors"
