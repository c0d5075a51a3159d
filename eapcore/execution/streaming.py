"""A model that is larger than a device: its layers come from the host's memory, each before it is to compute."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

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
        self.here: dict[int, _Arrival] = {}
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
        # What is there is another dict each time: another thread that runs the model goes on with its own.
        here = {n: arrival for n, arrival in self.here.items() if n in wanted}
        gone, self.here = len(self.here) > len(here), here
        if gone and self.copy is not None:
            self.copy.left()
        for n in wanted:
            if n not in here:
                here[n] = self._start(n)
        if self.copy is not None:
            self.copy.finish(here[index])
        return here[index].layer

    def forget(self) -> None:
        self.here = {}

    def _start(self, index: int) -> _Arrival:
        layer = self.layers[index]
        return _Arrival(moved(layer, self.device)) if self.copy is None else self.copy.start(layer)


@dataclass(frozen=True, slots=True)
class _Arrival:
    """A layer on its way to the device, or there; ready: None where nobody needs to wait. awaited: by which streams."""

    layer: Layer
    ready: torch.cuda.Event | None = None
    awaited: set[torch.cuda.Stream] = field(default_factory=set)


class _CudaCopy:
    """Copies on a stream of their own. The host waits where memory is to be used again until the device has left it:
    else it would ask for all layers at once."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.used: torch.cuda.Event | None = None

    def start(self, layer: Layer) -> _Arrival:
        if self.used is not None:
            self.used.synchronize()
        with torch.cuda.stream(self.stream):
            made = copied(layer, lambda x: x.to(self.device, non_blocking=True))
        return _Arrival(made, self.stream.record_event())

    def finish(self, arrival: _Arrival) -> None:
        """From here on what is launched finds the layer whole."""
        current = torch.cuda.current_stream(self.device)
        if arrival.ready is not None and current not in arrival.awaited:
            current.wait_event(arrival.ready)
            arrival.awaited.add(current)
            for x in tensors_in(arrival.layer):
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
