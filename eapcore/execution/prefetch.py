"""A task batch by batch, as a GPU wants it: prompts that are there before they are needed, and batches of one shape
recorded as a CUDA graph and replayed, since a small model's kernels take less time than their launches.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from eapcore.execution.batch import _BATCH_TOKENS, _PREFIX_SHARE, Window
from eapcore.tasks import PromptPairs

_log = logging.getLogger("eapcore")
Tensors = list[Tensor]


def tensors(window: Window) -> Tensors:
    """What is different in windows of one shape."""
    pairs = window.pairs
    prompts = [pairs.clean[:, : window.stop], pairs.corrupt[:, : window.stop]]
    return [*prompts, pairs.lengths, pairs.positions, pairs.answers, pairs.wrong, window.index]


def with_tensors(window: Window, given: Tensors) -> Window:
    """A window of the same shape with other tensors."""
    *parts, index = given
    names = ("clean", "corrupt", "lengths", "positions", "answers", "wrong")
    fields: dict[str, Any] = dict(zip(names, parts, strict=True))
    return replace(window, pairs=replace(window.pairs, **fields), index=index)


class Copy(Protocol):
    """Copies to a device that go on while something else runs there."""

    def start(self, given: Tensors) -> Tensors: ...

    def finish(self, copied: Tensors) -> None:
        """From here on what is launched finds the copies whole."""


class PinnedCopy:
    """From pinned memory, on a stream of its own: the host waits for nothing."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)

    def start(self, given: Tensors) -> Tensors:
        with torch.cuda.stream(self.stream):
            return [x.pin_memory().to(self.device, non_blocking=True) for x in given]

    def finish(self, copied: Tensors) -> None:
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self.stream)
        for x in copied:
            x.record_stream(current)


def pinned_copy(device: torch.device) -> Copy | None:
    """What copies to a device while something else runs there; None where there is nothing to gain."""
    return PinnedCopy(device) if device.type == "cuda" else None


class Feed:
    """A task's windows in a given order; with a copy, each is on its way while the one before it is scored.

    A window is cut short where the pairs behind the cut, or those before it, have so much more in common among
    themselves, a longer prefix or an earlier end, that it outweighs one batch more.

    Args:
        pairs: the task, on the CPU.
        order: which pairs, in the order of their windows.
        device: where the windows are wanted.
        shared: as `Window.of`.
        copy: None to have each window copied as it is asked for.
    """

    def __init__(
        self, pairs: PromptPairs, order: Sequence[int], device: torch.device, *, shared: bool, copy: Copy | None
    ) -> None:
        self.pairs, self.order, self.device, self.shared, self.copy = pairs, list(order), device, shared, copy
        first = pairs.first_difference()[self.order]
        first = first if shared else torch.zeros_like(first)
        self.first, self.stop = first, pairs.positions[self.order] + 1
        self.done = 0
        self.ahead: tuple[list[int], Window] | None = None
        self.size, self.cuts = 0, [0]
        self.shapes: list[tuple[int, int, int]] = []

    @property
    def left(self) -> int:
        """How many pairs are still to be scored."""
        return len(self.order) - self.done

    def window(self, size: int) -> Window:
        """The window of the next pairs, at most `size` of them; asked again before `advance`, it is of the same."""
        if size != self.size:
            self._cut(size)
        chosen, following = self._pairs(0), self._pairs(1)
        if self.copy is None:
            return Window.of(self.pairs, torch.tensor(chosen, device="cpu"), self.device, shared=self.shared)
        here = self.ahead[1] if self.ahead is not None and self.ahead[0] == chosen else self._start(chosen)
        self.copy.finish(tensors(here))
        self.ahead = (following, self._start(following)) if following else None
        return here

    def alike(self, window: Window) -> int:
        """How many windows of this one's shape are to come, itself included."""
        at = self.cuts.index(self.done)
        return self.shapes[at:].count((window.start, window.stop, len(window.pairs)))

    def _cut(self, size: int) -> None:
        """Where the windows of the pairs that are left begin, at most `size` pairs apart, and what shapes they have."""
        self.size, self.cuts, self.shapes = size, [self.done], []
        while (begin := self.cuts[-1]) < len(self.order):
            first, stop = (x[begin : begin + size] for x in (self.first, self.stop))
            count = self._together(first, stop)
            self.shapes.append((int(first[:count].min()), int(stop[:count].max()), count))
            self.cuts.append(begin + count)

    def _together(self, first: Tensor, stop: Tensor) -> int:
        """How many of some pairs make one window, where those that are left make the next."""
        pairs = len(first)
        count = torch.arange(1, pairs + 1, device="cpu")

        def tokens(first: Tensor, stop: Tensor) -> Tensor:
            """For each number of pairs from the beginning on, what they cost as one batch."""
            longest, shortest = stop.cummax(0).values, first.cummin(0).values
            return count * (longest - (1 - _PREFIX_SHARE) * shortest)

        cost = tokens(first, stop)
        behind = tokens(first.flip(0), stop.flip(0)).flip(0)  # [i]: of the pairs from i on
        cost[:-1] += behind[1:] + _BATCH_TOKENS.get(self.device.type, 32)
        return pairs - int(cost.flip(0).argmin())

    def _pairs(self, further: int) -> list[int]:
        """The pairs of the window that is next, or so many windows behind it."""
        begin, end = (self.cuts.index(self.done) + further + i for i in (0, 1))
        return self.order[self.cuts[begin] : self.cuts[end]] if end < len(self.cuts) else []

    def advance(self, window: Window) -> None:
        """A window is scored."""
        self.done += len(window.pairs)

    def _start(self, chosen: list[int]) -> Window:
        assert self.copy is not None
        window = Window.of(self.pairs, torch.tensor(chosen, device="cpu"), torch.device("cpu"), shared=self.shared)
        return with_tensors(window, self.copy.start(tensors(window)))
