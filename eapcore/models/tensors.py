"""What every part of a model does with its tensors: the dtype of sums, where they lie, and the positions that are
read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

V = TypeVar("V")


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype for sums and statistics: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def on(x: Tensor, device: torch.device) -> Tensor:
    """x on a device: itself where it lies there, else a copy that travels. Nothing else brings a tensor from one of a
    model's devices to another."""
    return x if x.device == device else x.to(device)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor of a component, a norm, or a tuple of them."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from tensors_in(part)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from tensors_in(getattr(value, field.name))


def moved(value: V, device: torch.device) -> V:
    """A component, a norm, or a tuple of them, on a device.

    What lies there is shared. All else is copied, see `copied`.
    """
    return copied(value, lambda x: x.to(device), lambda x: x.device == device)


def copied(value: V, copy: Callable[[Tensor], Tensor], stays: Callable[[Tensor], bool] = lambda x: False) -> V:
    """A component, a norm, or a tuple of them, of which `copy` copied what does not stay, some numbers in a row.

    Tensors keep their strides, and those of one storage are copied together, so that whoever multiplies with them does
    so as before, to the same bits.
    """
    spans: dict[int, tuple[int, int]] = {}
    for tensor in tensors_in(value):
        key, first = tensor.untyped_storage()._cdata, int(tensor.storage_offset())
        last = first + 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
        low, high = spans.get(key, (first, last))
        spans[key] = min(low, first), max(high, last)
    made: dict[int, Tensor] = {}

    def there(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(there(part) for part in value)
        if is_dataclass(value) and not isinstance(value, type):
            return replace(value, **{f.name: there(getattr(value, f.name)) for f in fields(value)})
        if not isinstance(value, Tensor) or stays(value):
            return value
        key = value.untyped_storage()._cdata
        first, last = spans[key]
        if key not in made:
            made[key] = copy(value.detach().as_strided((last - first,), (1,), first))
        return made[key].as_strided(value.shape, value.stride(), int(value.storage_offset()) - first)

    found: V = there(value)
    return found


def at_positions(x: Tensor, read: Tensor | None) -> Tensor:
    """x [B, T, ...] at the positions read [B, Q]: [B, Q, ...]; x itself for None."""
    return x if read is None else x[torch.arange(len(x), device=x.device)[:, None], read]


def spread(x: Tensor, read: Tensor | None, tokens: int) -> Tensor:
    """x [B, Q, ...] at the positions read [B, Q] of zeros [B, T, ...]; x itself for None."""
    if read is None:
        return x
    out = x.new_zeros(len(x), tokens, *x.shape[2:])
    out[torch.arange(len(x), device=x.device)[:, None], read] = x
    return out


def as_matrix(w: Tensor) -> Tensor | None:
    """A channel group [C, D, K] as a matrix [D, C·K] without a copy, or None where its strides do not allow it."""
    channels, d_model, d_head = w.shape
    if w.stride(2) == 1 and w.stride(0) == d_head:
        return w.as_strided((d_model, channels * d_head), (w.stride(1), 1))
    if w.stride(1) == 1 and w.stride(0) == d_head * w.stride(2):  # stored as its transpose
        return w.as_strided((d_model, channels * d_head), (1, w.stride(2)))
    return None
