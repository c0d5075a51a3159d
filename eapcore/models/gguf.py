"""GGUF files: their metadata, and their tensors by the file's names, mapped and dequantised one at a time.

The package gguf dequantises. The header is read here, since the package's reader makes several arrays of every token of
a vocabulary.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from eapcore.models.checkpoint import Stored

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY, _FLOAT32 = 8, 9, 6
_STRAIGHT = {
    0: ("float32", torch.float32),
    1: ("float16", torch.float16),
    28: ("float64", torch.float64),
    30: ("bfloat16", torch.bfloat16),
}
_AT_ONCE = 1 << 20  # numbers that are dequantised at a time: what that takes beside the result stays small


@dataclass(frozen=True, slots=True)
class Gguf:
    """An open file. metadata: numbers, texts, and lists of them. tensors: shapes in torch's order, slowest first."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: tuple[Stored, ...]


class _Kind(NamedTuple):
    """How numbers are stored: `block` of them in `size` bytes. decode: float32 of [1, bytes], None for torch's own."""

    dtype: str
    block: int
    size: int
    decode: Callable[[Any], Any] | None


def read_gguf(path: Path) -> Gguf:
    """Open a GGUF file. Tensors that are not quantised are views of the mapped file.

    Raises:
        ValueError: a file that is damaged, cut short, or stores numbers in a way that is not known; it is named.
        RuntimeError: it has quantised tensors and the package gguf is not installed.
    """
    with path.open("rb") as file:
        start = file.read(8)
        if start[:4] != _MAGIC or len(start) < 8:
            raise ValueError(f"{path} is not a GGUF file: it begins with {start[:4]!r}, not {_MAGIC!r}")
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # torch warns of arrays that cannot be written
    version = int.from_bytes(start[4:], "little")
    if version not in _VERSIONS:
        order = " (a big-endian one)" if version & 0xFFFF == 0 else ""
        raise ValueError(f"{path} is a GGUF file of version {version}{order}: expected 2 or 3")
    header = _Header(data, 8)
    try:
        n_tensors, n_entries = header.number("Q"), header.number("Q")
        metadata = _unique((header.text(), header.value(header.number("I"))) for _ in range(n_entries))
        infos = _unique((header.text(), header.tensor()) for _ in range(n_tensors))
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"general.alignment is {alignment!r}")
    except (struct.error, ValueError) as error:
        raise ValueError(
            f"{path} ({len(data)} bytes) is not a whole GGUF file ({error}): its download may have been cut short, "
            "fetch it again"
        ) from error
    base = -(-header.at // alignment) * alignment
    tensors = tuple(_stored(path, data, base, name, *info) for name, info in infos.items())
    return Gguf(path, metadata, tensors)


class _Header:
    """Steps through the little-endian values of a header; struct.error or ValueError where it ends too early."""

    def __init__(self, data: mmap.mmap, at: int) -> None:
        self.data, self.at = data, at

    def number(self, form: str) -> Any:
        (value,) = struct.unpack_from("<" + form, self.data, self.at)
        self.at += struct.calcsize("<" + form)
        return value

    def raw(self, size: int) -> bytes:
        found = self.data[self.at : self.at + size]
        if len(found) < size:
            raise ValueError(f"{size} bytes are to follow byte {self.at}")
        self.at += size
        return found

    def text(self) -> str:
        return self.raw(self.number("Q")).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _TEXT:
            return self.text()
        if kind == _ARRAY:
            kind, count = self.number("I"), self.number("Q")
            if kind == _TEXT:
                return [self.text() for _ in range(count)]
            if kind in _NUMBERS:
                form = np.dtype(_NUMBERS[kind])
                return np.frombuffer(self.raw(count * form.itemsize), form).tolist()
        if kind not in _NUMBERS:
            raise ValueError(f"the metadata's type {kind} at byte {self.at} is not known")
        value = self.number(_NUMBERS[kind])
        # 1e-5 as it was meant, not 9.999999747378752e-06
        return float(str(np.float32(value))) if kind == _FLOAT32 else value

    def tensor(self) -> tuple[tuple[int, ...], int, int]:
        """(shape, number of its kind, offset)."""
        shape = tuple(self.number("Q") for _ in range(self.number("I")))
        return shape[::-1], self.number("I"), self.number("Q")


def _unique(entries: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in entries:
        if name in found:
            raise ValueError(f"{name!r} occurs twice")
        found[name] = value
    return found


def _stored(
    path: Path, data: mmap.mmap, base: int, name: str, shape: tuple[int, ...], number: int, offset: int
) -> Stored:
    try:
        kind = _kind(number)
    except ValueError as error:
        raise ValueError(f"{name} of {path} {error}") from error
    if not shape or shape[-1] % kind.block:
        raise ValueError(f"{name} {list(shape)} of {path} must have rows of whole blocks of {kind.block} numbers")
    start, size = base + offset, math.prod(shape) // kind.block * kind.size
    if start + size > len(data):
        raise ValueError(f"{path} is cut short: {name} ends at byte {start + size} of its {len(data)}, fetch it again")
    return Stored(name, shape, kind.dtype, partial(_read, data, start, size, shape, kind))


def _read(
    data: mmap.mmap, start: int, size: int, shape: tuple[int, ...], kind: _Kind, dtype: torch.dtype | None = None
) -> Tensor:
    """A tensor; one that is quantised in a dtype, float32 for None, without a whole one in another."""
    if not size:
        return torch.empty(shape, dtype=getattr(torch, kind.dtype), device="cpu")
    raw = np.frombuffer(data, np.uint8, size, start)
    if kind.decode is None:
        return torch.from_numpy(raw).view(getattr(torch, kind.dtype)).view(shape)
    out = torch.empty(shape, dtype=dtype or torch.float32, device="cpu")
    blocks, step = out.view(-1, kind.block), max(1, _AT_ONCE // kind.block)
    for at in range(0, len(blocks), step):
        part = kind.decode(raw[None, at * kind.size : (at + step) * kind.size])
        blocks[at : at + step] = torch.from_numpy(np.ascontiguousarray(part, np.float32)).view(-1, kind.block)
    return out


@cache
def _kind(number: int) -> _Kind:
    """A kind of tensor by its number in a file; ValueError for one that cannot be read."""
    if number in _STRAIGHT:
        dtype, own = _STRAIGHT[number]
        return _Kind(dtype, 1, own.itemsize, None)
    try:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
    except ImportError as error:
        raise RuntimeError(
            f"quantised GGUF files need the package gguf: pip install 'eapcore[gguf]' ({error})"
        ) from error
    try:
        kind = GGMLQuantizationType(number)
    except ValueError as error:
        raise ValueError(f"is quantised as type {number}, which the package gguf does not know") from error
    block, size = GGML_QUANT_SIZES[kind]
    decode = partial(quants.dequantize, qtype=kind)
    try:
        decode(np.zeros((1, size), np.uint8))
    except NotImplementedError as error:
        raise ValueError(f"is quantised as {kind.name}, which the package gguf cannot dequantise") from error
    return _Kind("float32", block, size, decode)
