"""A task batch by batch, as a GPU wants it: prompts that are there before they are needed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from eapcore.execution.batch import Batch, cut, spans
from eapcore.execution.limits import PINNED, limits
from eapcore.tasks.pairs import PromptPairs

Tensors = list[Tensor]


def tensors(batch: Batch) -> Tensors:
    """What is different in batches of one shape."""
    pairs = batch.pairs
    prompts = [pairs.clean[:, : batch.stop], pairs.corrupt[:, : batch.stop]]
    return [*prompts, pairs.lengths, pairs.positions, pairs.answers, pairs.wrong, batch.index]


def with_tensors(batch: Batch, given: Tensors) -> Batch:
    """A batch of the same shape with other tensors."""
    *parts, index = given
    names = ("clean", "corrupt", "lengths", "positions", "answers", "wrong")
    fields: dict[str, Any] = dict(zip(names, parts, strict=True))
    return replace(batch, pairs=replace(batch.pairs, **fields), index=index)


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


def sent(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on a device, for which the host does not wait."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def received(given: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Tensors of a device on the CPU, all of them with one wait.

    What is small is copied into pinned memory, which takes a tenth of the time and stays pinned as long as the result
    is there; larger ones are not worth that it lacks elsewhere.
    """
    if device.type != "cuda":
        return {name: x.cpu() for name, x in given.items()}
    # torch takes pinned memory for a copy that it does not wait for.
    found = {name: x.to("cpu", non_blocking=x.nbytes <= PINNED) for name, x in given.items()}
    torch.cuda.current_stream(device).synchronize()
    return found


class Feed:
    """A task's batches in a given order; with a copy, each is on its way while the one before it is scored.

    Args:
        pairs: the task, on the CPU.
        order: which pairs, in the order of their batches.
        device: where the batches are wanted.
        shared: as `Batch.of`.
        copy: None to have each batch copied as it is asked for.
    """

    def __init__(
        self, pairs: PromptPairs, order: Sequence[int], device: torch.device, *, shared: bool, copy: Copy | None
    ) -> None:
        self.pairs, self.order, self.device, self.shared, self.copy = pairs, list(order), device, shared, copy
        self.first, self.stop = (x[self.order] for x in spans(pairs, shared=shared))
        self.done = self.at = 0  # pairs, and batches since the last cut
        self.ahead: tuple[list[int], Batch] | None = None
        self.size, self.cuts = 0, [0]
        self.to_come: Counter[tuple[int, int, int]] = Counter()  # batches by their shape

    @property
    def left(self) -> int:
        """How many pairs are still to be scored."""
        return len(self.order) - self.done

    def batch(self, size: int) -> Batch:
        """The batch of the next pairs, at most `size` of them; asked again before `advance`, it is of the same."""
        if size != self.size:
            self._cut(size)
        chosen, following = self._pairs(0), self._pairs(1)
        if self.copy is None:
            return Batch.of(self.pairs, chosen, self.device, shared=self.shared)
        here = self.ahead[1] if self.ahead is not None and self.ahead[0] == chosen else self._start(chosen)
        self.copy.finish(tensors(here))
        self.ahead = (following, self._start(following)) if following else None
        return here

    def alike(self, batch: Batch) -> int:
        """How many batches of this one's shape are to come, itself included."""
        return self.to_come[batch.start, batch.stop, len(batch.pairs)]

    def _cut(self, size: int) -> None:
        """Where the batches of the pairs that are left begin, at most `size` pairs apart, and what shapes they have."""
        self.size, self.cuts, self.at = size, [self.done], 0
        self.to_come = Counter()
        for count in cut(self.first[self.done :], self.stop[self.done :], size, limits(self.device).one_more_batch):
            part = slice(self.cuts[-1], self.cuts[-1] + count)
            self.to_come[int(self.first[part].min()), int(self.stop[part].max()), count] += 1
            self.cuts.append(part.stop)

    def _pairs(self, further: int) -> list[int]:
        """The pairs of the batch that is next, or so many batches behind it."""
        begin, end = (self.at + further + i for i in (0, 1))
        return self.order[self.cuts[begin] : self.cuts[end]] if end < len(self.cuts) else []

    def advance(self, batch: Batch) -> None:
        """A batch is scored."""
        self.done, self.at = self.done + len(batch.pairs), self.at + 1
        self.to_come[batch.start, batch.stop, len(batch.pairs)] -= 1

    def _start(self, chosen: list[int]) -> Batch:
        assert self.copy is not None
        batch = Batch.of(self.pairs, chosen, torch.device("cpu"), shared=self.shared)
        return with_tensors(batch, self.copy.start(tensors(batch)))
