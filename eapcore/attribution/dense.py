"""The explicit sender buffer, contracted with one layer's receivers at a time while the backward pass runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise

import torch
from torch import Tensor

import eapcore.kernels as kernels
from eapcore.attribution.exact_patterns import add_exact
from eapcore.attribution.methods import Pass
from eapcore.attribution.sums import Products, Sums, over_steps, rows_at
from eapcore.execution.batch import Batch
from eapcore.execution.limits import limits
from eapcore.graph.graph import Graph
from eapcore.kernels.tiling import layers_together
from eapcore.models.attention import Attention, Channels
from eapcore.models.backward import Sink, backward
from eapcore.models.forward import StageSaved
from eapcore.models.model import Model
from eapcore.models.tensors import accumulate_dtype, at_positions, on


@dataclass(frozen=True, slots=True)
class _Rows:
    """The rows of some senders that are made on one device.

    senders: which they are. everywhere: [S', B, T, D] of those before the last layer. at_read: [S', B, Q, D] of all of
    them at the positions that are read.
    """

    senders: slice
    everywhere: Tensor
    at_read: Tensor
    read: Tensor

    def of(self, at_read: bool) -> Tensor:
        return self.at_read if at_read else self.everywhere


class DenseStore:
    """The explicit sender buffer, each sender's rows on the device where they are made.

    Everywhere [S', B, T, D] of all senders before the last layer, and [S, B, Q, D] of all senders at the positions that
    are read: all that the last layer's heads and MLP need, since what reads them has a gradient there alone. Where the
    device's limits say so, memory has the positions in front of the senders.
    """

    steps = True
    channels = False
    products: Products | None = None
    embedded: Tensor | None = None

    def __init__(
        self,
        model: Model,
        batch: Batch,
        memory: Sequence[Tensor],
        device: torch.device | None = None,
        *,
        apart: bool = False,
    ) -> None:
        """memory: on each of `shares`' devices. device: whose limits count, None for the model's. apart: `deltas` gives
        what each component sends by itself, with `factors`, which are kept."""
        self.dz: dict[int, Tensor] | None = {} if apart else None
        self.model, self.read, self.device = model, batch.read, model.device if device is None else device
        self.shape, self.parts = batch.shape, []
        (rows, tokens), width, reads = batch.shape, model.config.d_model, self.read.shape[1]
        self.positions_first = limits(self.device).positions_first
        for (_, senders), room in zip(shares(model), memory, strict=True):
            before, count = _before_the_last(model, senders), senders.stop - senders.start
            cut = before * rows * tokens * width
            end = cut + count * rows * reads * width
            everywhere = self.laid_out(room[:cut], before, rows, tokens, width)
            at_read = self.laid_out(room[cut:end], count, rows, reads, width)
            self.parts.append(_Rows(senders, everywhere, at_read, on(self.read, room.device)))

    def laid_out(self, room: Tensor, count: int, rows: int, tokens: int, width: int) -> Tensor:
        """Memory as [count, rows, tokens, width] of senders or receivers."""
        if self.positions_first:
            return room.view(rows, tokens, count, width).permute(2, 0, 1, 3)
        return room.view(count, rows, tokens, width)

    @staticmethod
    def sizes(model: Model, batch: Batch) -> list[int]:
        """Elements of memory that a batch's buffer takes, on each of `shares`' devices."""
        (rows, tokens), reads, width = batch.shape, batch.read.shape[1], model.config.d_model
        shared = [senders for _, senders in shares(model)]
        return [(_before_the_last(model, s) * tokens + (s.stop - s.start) * reads) * rows * width for s in shared]

    @staticmethod
    def room(model: Model, batch: Batch) -> list[Tensor]:
        """Memory for a batch's buffer."""
        where = zip(DenseStore.sizes(model, batch), shares(model), strict=True)
        return [torch.empty(size, dtype=model.dtype, device=device) for size, (device, _) in where]

    def rows(self, at_read: bool, senders: slice) -> Iterator[tuple[slice, Tensor]]:
        """The rows of some senders, those of one device at a time, and which they are."""
        for part in self.parts:
            start, stop = max(senders.start, part.senders.start), min(senders.stop, part.senders.stop)
            if start < stop:
                first = part.senders.start
                yield slice(start, stop), part.of(at_read)[start - first : stop - first]

    def _own(self, senders: slice, last: bool) -> Tensor:
        """The rows of a component's senders."""
        ((_, rows),) = self.rows(last, senders)
        return rows

    def set_embed(self, sent: Tensor, clean: Tensor) -> None:
        torch.sub(sent, clean, out=self.parts[0].everywhere[0])

    def set_heads(self, index: int, dz: Tensor) -> None:
        graph, last = self.model.graph, self.model.graph.is_last(index)
        if last:
            for part in self.parts:
                rows_at(part.everywhere, part.read, part.at_read[: len(part.everywhere)])
        if self.dz is not None:
            self.dz[index] = dz
        self.model.attentions[index].send(dz, out=self._own(graph.heads(index), last))

    def mlp_room(self, index: int) -> Tensor | None:
        graph = self.model.graph
        return self._own(slice(graph.mlp(index), graph.mlp(index) + 1), graph.is_last(index))[0]

    def set_mlp(self, index: int, delta: Tensor, units: Tensor | None) -> None:
        graph = self.model.graph
        self._own(slice(graph.mlp(index), graph.mlp(index) + 1), graph.is_last(index))[0] = delta

    def set_channels(self, index: int, q: Tensor, kv: Tensor) -> None:
        pass

    def deltas(
        self, at_read: bool, count: int, at_once: int | None = None, device: torch.device | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        graph = self.model.graph
        places = [0, count]
        if self.dz is not None:
            begins = {0, *(x for index in self.dz for x in (graph.heads(index).start, graph.heads(index).stop))}
            places = sorted({start for start in begins if start < count} | {count})
        for start, stop in pairwise(places):
            size = at_once or stop - start
            for first in range(start, stop, size):
                some = slice(first, min(first + size, stop))
                rows = [x if device is None else on(x, device) for _, x in self.rows(at_read, some)]
                yield some, rows[0] if len(rows) == 1 else torch.cat(rows)

    def of_pairs(self, at_read: bool, count: int, pairs: slice) -> Iterator[tuple[slice, Tensor]]:
        yield from ((some, rows[:, pairs]) for some, rows in self.rows(at_read, slice(0, count)))

    def factors(self, senders: slice, at_read: bool) -> tuple[Tensor, Tensor] | None:
        for index, dz in (self.dz or {}).items():
            if senders == self.model.graph.heads(index):
                read = on(self.read, dz.device) if at_read else None
                return at_positions(dz, read), self.model.attentions[index].w_send
        return None

    def moved(self, name: str) -> Tensor:
        index, graph = int(name[1:]), self.model.graph
        last = graph.is_last(index)
        if name[0] == "a":
            return self._own(graph.heads(index), last).sum(0)
        return self._own(slice(graph.mlp(index), graph.mlp(index) + 1), last)[0]

    def contract(
        self, sums: Sums, saved: list[StageSaved], grad: Tensor, past: list[Tensor] | None, step: Pass
    ) -> None:
        runs = len(grad) // len(self.read)
        layers = 0 if step.exact_softmax else _layers_at_once(self, runs)
        edges = _Layers(self, sums, step, runs, layers) if layers else _Edges(self, sums, step, runs)
        backward(self.model, saved, grad, edges, rules=step.rules, past=past, read=self.read.repeat(runs, 1))
        edges.end()


def shares(model: Model) -> list[tuple[torch.device, slice]]:
    """The model's devices, and which senders are made on each, in order."""
    found: list[tuple[torch.device, slice]] = [(model.device, slice(0, 1))]
    for stage in model.stages:
        for place in (stage.attention, stage.mlp):
            if place is not None and found[-1][0] == stage.device:
                found[-1] = stage.device, slice(found[-1][1].start, place.senders.stop)
            elif place is not None:
                found.append((stage.device, place.senders))
    return found


def _before_the_last(model: Model, senders: slice) -> int:
    """How many of some senders lie before the last layer."""
    return max(0, min(senders.stop, model.graph.senders_everywhere.stop) - senders.start)


Elsewhere = Callable[[torch.device], Tensor]


class _Edges(Sink):
    """Contracts the dense buffer with the receivers' gradients as they come, those of several runs of it added up.

    Where senders lie on other devices than a layer, its receivers' gradients travel there, or what they are made of,
    whichever is fewer bytes.
    """

    def __init__(self, store: DenseStore, sums: Sums, step: Pass, runs: int) -> None:
        self.store, self.sums, self.step, self.graph = store, sums, step, store.model.graph
        # One layer's receivers, of some pairs at a time, in the same memory: what is made stays in a cache until it is
        # contracted and added up, and fresh pages would cost as much time as the arithmetic.
        (rows, tokens), config = store.shape, store.model.config
        one = self.graph.receivers_per_layer * tokens * config.d_model
        size = one * store.parts[0].everywhere.itemsize
        self.at_once = -(-pairs_at_once(runs * rows, size, store.device) // runs)
        self.size, self.runs = runs * self.at_once * one, runs
        self.workspaces: dict[torch.device, tuple[Tensor, Tensor]] = {}
        # A layer's MLP receiver [B, T, D] waits for its q, k and v: alone it would read all of the buffer once more.
        self.mlp: Tensor | None = None
        self.readers: tuple[int, dict[torch.device, Attention]] = -1, {}

    def workspace(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Memory on a device, and there the numbers of the pairs of all runs, [runs, B]."""
        if device not in self.workspaces:
            rows = self.runs * self.store.shape[0]
            numbers = torch.arange(rows, device=device).view(self.runs, -1)
            like = self.store.parts[0].everywhere
            self.workspaces[device] = like.new_empty(self.size, device=device), numbers
        return self.workspaces[device]

    def receiver(self, name: str, receiver: int, grad: Tensor, at_read: bool) -> None:
        if at_read or name == "logits" or f"a{name[1:]}" in self.step.rules.cut:
            self.add(grad[None], slice(receiver, receiver + 1), at_read)
            return
        self.mlp = grad
        # The heads of a stage before the MLP's own, which the layer's q, k and v do not read.
        between = slice(self.graph.heads(int(name[1:])).start, self.graph.senders_before(receiver))
        if between.start < between.stop:
            self.add(grad[None], slice(receiver, receiver + 1), at_read, senders=between)

    def channels(self, part: Channels) -> Tensor | None:
        by_gradient, of_v = part.channels, part.attention.channels[2]
        if self.step.exact_softmax:  # v alone
            by_gradient = slice(max(part.channels.start, of_v.start), part.channels.stop)
            if part.channels.stop == of_v.stop:  # the last piece
                add_exact(self.store, self.sums, part, self.step.weight, partial(self.reader, part))
        first, count = part.receivers.start - part.channels.start, part.channels.stop - part.channels.start
        mlp, self.mlp, total = self.mlp, None, []
        receivers = slice(first + by_gradient.start, first + by_gradient.stop + (mlp is not None))
        copies: dict[torch.device, Channels] = {part.act.device: part}

        def made(pairs: slice, skipped: int, device: torch.device) -> Tensor:
            """The gradients of some pairs' receivers [C' + 1, b, T, D] but for the first, and behind the layer's q, k
            and v the MLP's, where that comes along, made on a device."""
            memory, rows = self.workspace(device)
            some = pairs if self.runs == 1 else rows[:, pairs].flatten()
            if device not in copies:
                copies[device] = part.on(device, self.reader(part, device))
            part_here = copies[device].of(some)
            shape = (count + (mlp is not None), *part_here.norm_in.x.shape)
            grads = memory[: math.prod(shape)].view(shape)
            part_here.grads(self.sums.impl, grads[:count])
            if mlp is None:
                return grads[skipped:]
            grads[count] = on(mlp[some if isinstance(some, slice) else on(some, mlp.device)], device)
            return grads[skipped:]

        rows, skipped = self.store.shape[0], by_gradient.start - part.channels.start
        for pairs in (slice(start, start + self.at_once) for start in range(0, rows, self.at_once)):
            grads = made(pairs, 0, part.act.device)
            of_channels = grads[:count]
            wide = accumulate_dtype(grads.dtype)
            total.append(of_channels.sum(0, dtype=wide).unflatten(0, (self.runs, -1)))
            if receivers.start < receivers.stop:
                before = slice(0, self.graph.senders_before(part.receivers.start))
                travels = len(self.store.parts) > 1 and not part.fewer_as_gradients
                elsewhere = partial(made, pairs, skipped) if travels else None
                self.add(grads[skipped:], receivers, part.at_read, pairs, before, elsewhere)
        return (total[0] if len(total) == 1 else torch.cat(total, 1)).flatten(0, 1)

    def reader(self, part: Channels, device: torch.device) -> Attention:
        """The layer's attention, what it reads by on a device."""
        if self.readers[0] != part.index:
            self.readers = part.index, {}
        found = self.readers[1]
        if device not in found:
            found[device] = part.attention.reading_on(device)
        return found[device]

    def end(self) -> None:
        """The backward pass is over."""

    def add(
        self,
        grads: Tensor,
        receivers: slice,
        at_read: bool,
        pairs: slice = slice(None),
        senders: slice | None = None,
        elsewhere: Elsewhere | None = None,
    ) -> None:
        """Contract some receivers' gradients with some senders, None for all that come before them; elsewhere: makes
        the gradients on another device, None where they travel there."""
        senders, sums = senders or slice(0, self.graph.senders_before(receivers.start)), self.sums
        for some, rows in self.store.rows(at_read, senders):
            here = grads
            if rows.device != grads.device:
                here = on(grads, rows.device) if elsewhere is None else elsewhere(rows.device)
            delta, part = rows[:, pairs], _part(some, senders)
            here = over_steps(here, 1, delta.shape[1])
            for name, reduce in sums.targets(at_read):
                block = kernels.edge_scores(delta, here, reduce=reduce, part=part, impl=sums.impl)
                sums.add(name, block, (some, receivers), self.step.weight, at_read, pairs)


class _Layers(_Edges):
    """Contracts the receivers of several layers at once, so that the buffer is read less often, and takes their sum
    from ∂metric/∂(q, k, v), so that no receiver is read a second time.

    Receivers wait on their own device and on all before it, where they have senders; what has its gradient at the
    positions that are read waits apart, few as it is, and is contracted at the end.
    """

    def __init__(self, store: DenseStore, sums: Sums, step: Pass, runs: int, layers: int) -> None:
        self.store, self.sums, self.step, self.graph = store, sums, step, store.model.graph
        (rows, tokens), width = store.shape, store.model.config.d_model
        self.filled = self.size = layers * self.graph.receivers_per_layer
        self.shape, self.memory = (self.size, runs * rows, tokens, width), dict[torch.device, Tensor]()
        self.waiting: list[slice] = []  # from `filled` on, by receivers in the graph's order
        self.at_read: list[tuple[slice, Tensor]] = []
        self.readers = -1, {}

    def there(self, device: torch.device, count: int) -> Tensor:
        """Where the gradients of the receivers that were taken last wait on a device, [R', n·B, T, D]."""
        if device not in self.memory:
            room = self.store.parts[0].everywhere.new_empty(math.prod(self.shape), device=device)
            self.memory[device] = self.store.laid_out(room, *self.shape)
        return self.memory[device][self.filled : self.filled + count]

    def before(self, receivers: slice, own: torch.device) -> list[torch.device]:
        """The other devices on which some receivers have senders."""
        senders = slice(0, self.graph.senders_before(receivers.start))
        return [rows.device for _, rows in self.store.rows(False, senders) if rows.device != own]

    def room(self, receiver: int, at_read: bool) -> Tensor | None:
        if at_read:
            return None
        self.take(slice(receiver, receiver + 1))
        layer = receiver // self.graph.receivers_per_layer
        return self.there(self.store.model.attentions[layer].device, 1)[0]

    def receiver(self, name: str, receiver: int, grad: Tensor, at_read: bool) -> None:
        here = slice(receiver, receiver + 1)
        if at_read:
            self.at_read.append((here, grad[None]))
            return
        if name == "logits":
            self.add(grad[None], here, False)
            return
        for device in self.before(here, grad.device):  # on its own it lies where it waits
            self.there(device, 1)[0].copy_(grad)

    def channels(self, part: Channels) -> Tensor | None:
        if part.at_read:
            self.at_read.append((part.receivers, part.grads(self.sums.impl)))
            return None
        self.take(part.receivers)
        count, own = part.receivers.stop - part.receivers.start, part.act.device
        made = part.grads(self.sums.impl, self.there(own, count))
        for device in self.before(part.receivers, own):
            if part.fewer_as_gradients:
                self.there(device, count).copy_(made)
            else:
                there = part.on(device, self.reader(part, device))
                there.grads(self.sums.impl, self.there(device, count))
        return None

    def take(self, receivers: slice) -> None:
        """Some receivers come to wait; backward, the later ones come first."""
        count = receivers.stop - receivers.start
        if count > self.filled:
            self.contract()
        self.filled -= count
        if self.waiting and self.waiting[0].start == receivers.stop:
            receivers = slice(receivers.start, self.waiting.pop(0).stop)
        self.waiting.insert(0, receivers)

    def end(self) -> None:
        self.contract()
        if self.at_read:
            self.at_read.sort(key=lambda one: one[0].start)
            receivers, grads = [one for one, _ in self.at_read], [one for _, one in self.at_read]
            self.at_read = []
            self.together(receivers, True, lambda device: torch.cat([on(one, device) for one in grads]))

    def contract(self) -> None:
        """Contract the receivers that wait, other than those at the positions that are read."""
        if self.waiting:
            self.together(self.waiting, False, lambda device: self.memory[device][self.filled :])
        self.waiting, self.filled = [], self.size

    def together(self, waiting: list[slice], at_read: bool, grads_on: Elsewhere) -> None:
        """Contract receivers in the graph's order with the senders that any of them has; grads_on: their gradients on a
        device, [R', n·B, T, D]."""
        before = _senders_before(self.graph, tuple((one.start, one.stop) for one in waiting))
        senders, sums = slice(0, before[-1]), self.sums
        for some, delta in self.store.rows(at_read, senders):
            edges = [self.store.model.edge_masks[at_read][some, receivers] for receivers in waiting]
            mask = on(edges[0] if len(edges) == 1 else torch.cat(edges, 1), delta.device)
            grads = over_steps(grads_on(delta.device), 1, delta.shape[1])
            for name, reduce in sums.targets(at_read):
                where, impl = _part(some, senders), sums.impl
                block = kernels.edge_scores(
                    delta, grads, mask=mask, reduce=reduce, part=where, before=before, impl=impl
                )
                for receivers in waiting:
                    part, block = block.tensor_split([receivers.stop - receivers.start], -1)
                    sums.add(name, part, (some, receivers), self.step.weight, at_read)


@lru_cache(maxsize=256)
def _senders_before(graph: Graph, receivers: tuple[tuple[int, int], ...]) -> tuple[int, ...]:
    """How many senders come before each of some receivers, (start, stop) of them."""
    return tuple(graph.senders_before(r) for start, stop in receivers for r in range(start, stop))


def _part(some: slice, senders: slice) -> tuple[int, int] | None:
    """Which senders these are of some, as `kernels.edge_scores` has it."""
    whole = some.stop - some.start == senders.stop - senders.start
    return None if whole else (some.start - senders.start, senders.stop - senders.start)


def _layers_at_once(store: DenseStore, runs: int) -> int:
    """How many layers' receivers are contracted at once; 0 where one layer's are more than is held at a time."""
    most, each = limits(store.device), store.model.graph.receivers_per_layer
    (rows, tokens), width = store.shape, store.model.config.d_model
    one = each * runs * rows * tokens * width * store.model.dtype.itemsize
    at_once = min(max(1, most.receivers // each), most.workspace // one, store.model.graph.n_layers)
    return layers_together(each, at_once) if most.receivers and at_once else 0


def pairs_at_once(pairs: int, size: int, device: torch.device) -> int:
    """How many of a batch's pairs have one layer's receivers, `size` bytes a pair, in memory at a time, evenly."""
    at_once = max(1, limits(device).workspace // size)
    return -(-pairs // -(-pairs // at_once))
