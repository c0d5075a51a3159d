"""Numbers of the host that a kernel reads on the device, copied there also where the work is being recorded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_held: ContextVar[list[tuple[Tensor, Tensor]] | None] = ContextVar("eapcore_constants", default=None)


@contextmanager
def recording() -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Inside, `to_device` copies nothing, which a recording could not repeat.

    Yields what it made instead: (memory on the device, its numbers on the host), for whoever records to copy them
    before the first replay, and to keep the memory as long as it is replayed.
    """
    made: list[tuple[Tensor, Tensor]] = []
    token = _held.set(made)
    try:
        yield made
    finally:
        _held.reset(token)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on a device, for which the host does not wait."""
    if (made := _held.get()) is not None:
        made.append((torch.empty_like(x, device=device), x))
        return made[-1][0]
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)
