"""Numbers of the host that a kernel reads on the device, copied there also where the work is being recorded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(slots=True)
class Constants:
    """What `to_device` makes in work that is done once to warm up and once to be recorded.

    rooms: memory on the device, in the order of the calls, made while the work warms up. A recording's own memory will
    not do: what it uses earlier, and other recordings of the same pool use, may lie in the same place. numbers: of the
    recording, on the host, one for each room, for whoever records to copy there before the first replay.
    """

    rooms: list[Tensor] = field(default_factory=list)
    numbers: list[Tensor] = field(default_factory=list)
    records: bool = False

    def fill(self) -> None:
        """Copy the recording's numbers into the rooms."""
        for to, x in zip(self.rooms, self.numbers, strict=True):
            to.copy_(x)


_current: ContextVar[Constants | None] = ContextVar("eapcore_constants", default=None)


@contextmanager
def held_in(constants: Constants, *, records: bool) -> Iterator[None]:
    """Inside, `to_device` keeps what it makes in `constants`; records: it copies nothing, which a recording could not
    repeat, but returns what it made at the same call while the work warmed up."""
    constants.records = records
    token = _current.set(constants)
    try:
        yield
    finally:
        _current.reset(token)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on a device, for which the host does not wait."""
    constants = _current.get()
    if constants is not None and constants.records:
        constants.numbers.append(x)
        place = len(constants.numbers) - 1
        room = constants.rooms[place] if place < len(constants.rooms) else None
        if room is None or room.shape != x.shape or room.dtype != x.dtype:
            raise RuntimeError("the work that is recorded must ask for the numbers for which it did while it warmed up")
        return room
    made = x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)
    if constants is not None:
        constants.rooms.append(made)
    return made
