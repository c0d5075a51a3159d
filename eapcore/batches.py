"""A task batch by batch, as a GPU wants it: prompts that are there before they are needed, and batches of one shape
recorded as a CUDA graph and replayed, since a small model's kernels take less time than their launches.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from eapcore.tasks import PromptPairs
from eapcore.window import Window

_MOST = 16  # shapes that are recorded: each keeps its results
# Windows of one shape from which on recording is worth it. The host takes 12 ms to launch a batch of a 12-layer model,
# and to record it twice that: 2 replays pay for it where the device needs no time at all, and 4 where it needs half of
# the host's. The rest is room for what was not measured: recording waits for the device, gives its cached memory back
# to the driver, which later batches ask for it again, and makes a graph of what was launched.
_WORTH = 16
# What one batch more costs, in tokens of the batches: reading the weights once more, launches. On a CPU from
# bench_pipeline.py's times over B, of which 40 ms are left at B = 0, as much as 30 tokens take; for a GPU not measured.
_BATCH_TOKENS = {"cpu": 32, "cuda": 4096}
# A prefix goes through one forward; what lies behind it through two, a backward pass and the contraction.
_PREFIX_SHARE = 0.25
_log = logging.getLogger("eapcore")

Tensors = list[Tensor]
Work = Callable[[Tensors], Tensors]


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


class Recorder(Protocol):
    """Records work on tensors of one shape: the result does it again on others, and returns the same results anew.

    What it returns is overwritten by the next replay of any recording.
    """

    def capture(self, work: Work, given: Tensors) -> Work: ...


class CudaRecorder:
    """CUDA graphs whose memory is one pool: they run one after the other, and what they keep is read in between."""

    def __init__(self, device: torch.device) -> None:
        # Memory of a pool goes back to the stream that it was taken on: recordings share it on one stream alone.
        self.device, self.pool, self.side = device, torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)

    def capture(self, work: Work, given: Tensors) -> Work:
        held = [x.clone() for x in given]
        with torch.cuda.device(self.device):
            main = torch.cuda.current_stream()
            self.side.wait_stream(main)
            try:
                with torch.cuda.stream(self.side):  # libraries make their workspaces for a stream at its first use
                    work(held)
                main.wait_stream(self.side)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=self.pool, stream=self.side):
                    results = work(held)
            finally:
                torch.cuda.set_stream(main)  # `torch.cuda.graph` stays on the other where ending the capture fails

        def replay(given: Tensors) -> Tensors:
            for to, x in zip(held, given, strict=True):
                to.copy_(x, non_blocking=True)
            graph.replay()
            return results

        return replay


def recorder(device: torch.device) -> Recorder | None:
    """What records on a device; None where there is nothing to gain."""
    return CudaRecorder(device) if device.type == "cuda" else None


class Replays:
    """Runs work on windows: as it is the first time that a shape comes, recorded and replayed from the second on.

    Args:
        by: None to run everything as it is.
        strict: record every shape that comes again, and raise what goes wrong. Else only shapes that come often enough
            to gain. There, and where the memory does not suffice, work goes on without, and a warning is logged.
    """

    def __init__(self, by: Recorder | None, *, strict: bool) -> None:
        self.by, self.strict = by, strict
        self.seen: set[object] = set()
        self.recorded: dict[object, Work] = {}

    def run(self, window: Window, work: Callable[[Window], Tensors], alike: Callable[[Window], int]) -> Tensors:
        """What `work` returns for a window; it may be overwritten by the next call.

        work: depends on the window's shape and tensors alone, and never looks at a tensor's values on the host.
        alike: how many windows of this one's shape are to come, itself included.
        """
        if self.by is None:
            return work(window)
        given = tensors(window)
        key = (window.start, window.stop, *(x.shape for x in given))
        if key in self.recorded:
            return self.recorded[key](given)
        if key not in self.seen or len(self.recorded) == _MOST or not (self.strict or alike(window) >= _WORTH):
            self.seen.add(key)
            return work(window)
        try:
            replay = self.by.capture(lambda held: work(with_tensors(window, held)), given)
        except RuntimeError as error:
            if self.strict and not isinstance(error, torch.OutOfMemoryError):
                raise
            self.drop()
            _log.warning("batches cannot be recorded as CUDA graphs, going on without: %s", error)
            return work(window)
        self.recorded[key] = replay
        return replay(given)

    def clear(self) -> None:
        """Forget what is recorded, as the memory that it works in goes."""
        self.recorded.clear()

    def drop(self) -> bool:
        """Record nothing more and free what is recorded; whether that was anything."""
        held = bool(self.recorded)
        self.by = None
        self.clear()
        return held
