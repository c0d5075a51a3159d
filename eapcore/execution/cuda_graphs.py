"""Batches of one shape recorded as a CUDA graph and replayed: small kernels take less time than their launches."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

import torch

import eapcore.execution.limits as limits
from eapcore.execution.batch import Batch
from eapcore.execution.prefetch import Tensors, tensors, with_tensors

_log = logging.getLogger("eapcore")
Work = Callable[[Tensors], Tensors]


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
        held = [x.clone() for x in given]  # where the graph reads
        with torch.cuda.device(self.device):
            main = torch.cuda.current_stream()
            self.side.wait_stream(main)
            try:
                # Libraries make their workspaces for a stream at its first use.
                try:
                    with torch.cuda.stream(self.side):
                        work(held)
                finally:
                    main.wait_stream(self.side)  # where it fails too: what began there writes to memory of others
                graph = torch.cuda.CUDAGraph()
                # Other threads of the process may go on with theirs: what they allocate or wait for is not recorded.
                with torch.cuda.graph(graph, pool=self.pool, stream=self.side, capture_error_mode="thread_local"):
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
    """Runs work on batches: as it is the first time that a shape comes, recorded and replayed from the second on.

    Args:
        by: None to run everything as it is.
        strict: record every shape that comes again, and raise what goes wrong. Else only shapes that come often enough
            to gain, of so few tokens that the device waits for the host. There, and where the memory does not suffice,
            work goes on without, and a warning is logged.
        width: of the model's residual stream.
    """

    def __init__(self, by: Recorder | None, *, strict: bool, width: int = 1) -> None:
        self.by, self.strict, self.width = by, strict, width
        self.seen: set[object] = set()
        self.recorded: dict[object, Work] = {}

    def run(self, batch: Batch, work: Callable[[Batch], Tensors], alike: Callable[[Batch], int]) -> Tensors:
        """What `work` returns for a batch; it may be overwritten by the next call.

        work: depends on the batch's shape and tensors alone, and never looks at a tensor's values on the host.
        alike: how many batches of this one's shape are to come, itself included.
        """
        if self.by is None:
            return work(batch)
        given = tensors(batch)
        key = (batch.start, batch.stop, *(x.shape for x in given))
        if key in self.recorded:
            return self.recorded[key](given)
        if (
            key not in self.seen
            or len(self.recorded) == limits.GRAPH_SHAPES
            or not (self.strict or self._worth(batch, alike(batch)))
        ):
            self.seen.add(key)
            return work(batch)
        try:
            replay = self.by.capture(lambda held: work(with_tensors(batch, held)), given)
        except RuntimeError as error:
            if self.strict and not isinstance(error, torch.OutOfMemoryError):
                raise
            self.drop()
            _log.warning("batches cannot be recorded as CUDA graphs, going on without: %s", error)
            return work(batch)
        self.recorded[key] = replay
        return replay(given)

    def _worth(self, batch: Batch, to_come: int) -> bool:
        pairs, tokens = batch.shape
        return to_come >= limits.GRAPH_WORTH and pairs * tokens * self.width**2 <= limits.GRAPH_WORK

    def clear(self) -> None:
        """Forget what is recorded, as the memory that it works in goes."""
        self.recorded.clear()

    def drop(self) -> bool:
        """Record nothing more and free what is recorded; whether that was anything."""
        held = bool(self.recorded)
        self.by = None
        self.clear()
        return held
