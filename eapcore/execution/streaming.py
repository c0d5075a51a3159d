"""A model that is larger than a device: its layers come from the host's memory, each before it is to compute."""

from __future__ import annotations

from dataclasses import replace

import torch

from eapcore.execution.devices import weight_bytes
from eapcore.models.model import Model
from eapcore.models.tensors import copied, moved, tensors_in
from eapcore.models.weights import Layer

AHEAD = 2


class Streamed:
    """Brings layers from the host to a device, two ahead of the one that computes, forwards or backwards.

    At most three layers lie on the device, but for those whose weights somebody still holds. A pass of L layers behind
    another one finds three of them there, and brings L − 3.

    layers: on the host; for a GPU they are copied into pinned memory.
    """

    def __init__(self, layers: tuple[Layer, ...], device: torch.device) -> None:
        gpu = device.type == "cuda"
        self.device, self.layers = device, tuple(copied(x, torch.Tensor.pin_memory) if gpu else x for x in layers)
        self.here: dict[int, Layer] = {}
        self.at, self.step = 0, 1
        self.copy = _CudaCopy(device) if gpu else None
        sizes = [sum(x.numel() * x.itemsize for x in tensors_in(layer)) for layer in layers]
        self.held = max(sum(sizes[first : first + AHEAD + 1]) for first in range(len(sizes)))

    def layer(self, index: int) -> Layer:
        """A layer on the device; those that come next are on their way."""
        if index != self.at:
            self.at, self.step = index, 1 if index > self.at else -1
        order = [index + n * self.step for n in (*range(AHEAD + 1), *range(-1, -AHEAD - 1, -1))]
        wanted = [n for n in order if 0 <= n < len(self.layers)][: AHEAD + 1]
        for n in [n for n in self.here if n not in wanted]:
            del self.here[n]
            if self.copy is not None:
                self.copy.left()
        for n in wanted:
            if n not in self.here:
                self.here[n] = self._start(n)
        if self.copy is not None:
            self.copy.finish(self.here[index])
        return self.here[index]

    def forget(self) -> None:
        self.here = {}

    def _start(self, index: int) -> Layer:
        layer = self.layers[index]
        return moved(layer, self.device) if self.copy is None else self.copy.start(layer)


class _CudaCopy:
    """Copies on a stream of their own. The host waits where memory is to be used again until the device has left it:
    else it would ask for all layers at once."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.ready: dict[int, torch.cuda.Event] = {}
        self.used: torch.cuda.Event | None = None

    def start(self, layer: Layer) -> Layer:
        if self.used is not None:
            self.used.synchronize()
        with torch.cuda.stream(self.stream):
            made = copied(layer, lambda x: x.to(self.device, non_blocking=True))
        self.ready[id(made)] = self.stream.record_event()
        return made

    def finish(self, layer: Layer) -> None:
        """From here on what is launched finds the layer whole."""
        event = self.ready.pop(id(layer), None)
        if event is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(event)
            for x in tensors_in(layer):
                x.record_stream(current)

    def left(self) -> None:
        """A layer has no more to do."""
        self.used = torch.cuda.current_stream(self.device).record_event()


def held_bytes(model: Model) -> int:
    """Bytes of a model's weights that lie on the device while its layers are streamed."""
    sizes, rest = weight_bytes(model)
    return rest + max(sum(sizes[first : first + AHEAD + 1]) for first in range(len(sizes)))


def streamed(model: Model, device: torch.device) -> Model:
    """The model with its layers on the host and all else on a device, where each layer comes when it is to compute."""
    weights = model.weights
    stream = Streamed(moved(weights.layers, torch.device("cpu")), device)
    w_e, w_pos, w_u, b_u, ln_final = moved(
        (weights.w_e, weights.w_pos, weights.w_u, weights.b_u, weights.ln_final), device
    )
    there = replace(weights, w_e=w_e, w_pos=w_pos, layers=stream.layers, w_u=w_u, b_u=b_u, ln_final=ln_final)
    return replace(model, weights=there, links=None, stream=stream)
