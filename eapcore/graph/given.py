"""What results are made of, as callers have it: arrays and lists become tensors; and when two are equal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eapcore.graph.graph import Graph
from eapcore.kernels.torch_ops import as_tensor


class ByValue:
    """A dataclass with eq=False that is equal to another of its kind where all the fields that compare are, of tensors
    dtype, device, shape and every value."""

    __slots__ = ()

    def _compared(self) -> list[Any]:
        return [getattr(self, field.name) for field in fields(self) if field.compare]  # type: ignore[arg-type]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ByValue) or type(other) is not type(self):
            return NotImplemented
        return _equal(self._compared(), other._compared())

    def __hash__(self) -> int:
        tensors = [value for value in self._compared() if isinstance(value, Tensor)]
        return hash((type(self).__name__, *((x.shape, float(x.contiguous().double().sum())) for x in tensors)))


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        alike = isinstance(other, Tensor) and (one.dtype, one.device) == (other.dtype, other.device)
        return alike and torch.equal(one, other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return bool(one == other)


def take_tensors(result: object, numbers: Sequence[str], marks: Sequence[str] = ()) -> None:
    """Put tensors without gradients in the place of what a result's fields hold, None excepted.

    numbers: fields of real numbers. marks: of bool.

    Raises:
        ValueError: a graph that is none; what is no array of numbers, or a tensor without values.
    """
    graph = getattr(result, "graph", None)
    if not isinstance(graph, Graph):
        raise ValueError(f"graph must be a Graph, got a {type(graph).__name__}")
    for name in (*numbers, *marks):
        given = getattr(result, name)
        if given is None:
            continue
        try:
            made = as_tensor(np.asarray(given) if isinstance(given, list | tuple) else given, name)
        except ValueError as error:  # of numpy, for rows of several lengths
            raise ValueError(f"{name} must be a tensor or an array of numbers: {error}") from error
        if made.is_meta or made.is_complex() or (made.dtype == torch.bool) != (name in marks):
            kind = "bool" if name in marks else "real numbers"
            raise ValueError(f"{name} must be {kind} with values, got {made.dtype} {list(made.shape)} on {made.device}")
        if made is not given or made.requires_grad:
            object.__setattr__(result, name, made.detach())
