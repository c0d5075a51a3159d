"""The explicit sender buffer, contracted with one layer's receivers at a time while the backward pass runs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

import eapcore.kernels as kernels
from eapcore.attribution.exact_patterns import add_exact
from eapcore.attribution.methods import Pass
from eapcore.attribution.sums import Sums, over_steps, rows_at
from eapcore.execution.batch import Batch
from eapcore.execution.limits import limits
from eapcore.models.attention import Channels
from eapcore.models.backward import Sink, backward
from eapcore.models.forward import StageSaved
from eapcore.models.model import Model
from eapcore.models.tensors import accumulate_dtype, at_positions


class DenseStore:
    """The explicit sender buffer.

    everywhere: [S', B, T, D] of all senders before the last layer. at_read: [S, B, Q, D] of all senders at the
    positions that are read: all that the last layer's heads and MLP need, since what reads them has a gradient there
    alone.
    """

    steps = True
    channels = False

    def __init__(
        self,
        model: Model,
        batch: Batch,
        memory: Tensor,
        device: torch.device | None = None,
        *,
        apart: bool = False,
    ) -> None:
        """device: whose limits count, None for the model's. apart: `deltas` gives what each component sends by itself,
        with `factors`, which are kept."""
        self.dz: dict[int, Tensor] | None = {} if apart else None
        self.model, self.read, self.device = model, batch.read, model.device if device is None else device
        (rows, tokens), width, graph = batch.shape, model.config.d_model, model.graph
        before, reads = graph.senders_everywhere.stop, self.read.shape[1]
        cut = before * rows * tokens * width
        end = cut + graph.n_senders * rows * reads * width
        self.everywhere = memory[:cut].view(before, rows, tokens, width)
        self.at_read = memory[cut:end].view(graph.n_senders, rows, reads, width)

    @staticmethod
    def size(model: Model, batch: Batch) -> int:
        """Elements of memory that a batch's buffer takes."""
        (rows, tokens), graph = batch.shape, model.graph
        return (
            (graph.senders_everywhere.stop * tokens + graph.n_senders * batch.read.shape[1])
            * rows
            * model.config.d_model
        )

    def rows(self, at_read: bool) -> Tensor:
        return self.at_read if at_read else self.everywhere

    def set_embed(self, delta: Tensor) -> None:
        self.everywhere[0] = delta

    def set_heads(self, index: int, dz: Tensor) -> None:
        graph, last = self.model.graph, self.model.graph.is_last(index)
        if last:
            self.at_read[: len(self.everywhere)] = rows_at(self.everywhere, self.read)
        if self.dz is not None:
            self.dz[index] = dz
        self.model.attentions[index].send(dz, out=self.rows(last)[graph.heads(index)])

    def mlp_room(self, index: int) -> Tensor | None:
        graph = self.model.graph
        return self.rows(graph.is_last(index))[graph.mlp(index)]

    def set_mlp(self, index: int, delta: Tensor, units: Tensor | None) -> None:
        graph = self.model.graph
        self.rows(graph.is_last(index))[graph.mlp(index)] = delta

    def set_channels(self, index: int, q: Tensor, kv: Tensor) -> None:
        pass

    def deltas(self, at_read: bool, count: int) -> Iterator[tuple[slice, Tensor]]:
        rows, graph = self.rows(at_read), self.model.graph
        if self.dz is None:
            yield slice(0, count), rows[:count]
            return
        begins = {0, *(graph.heads(index).start for index in self.dz), *(graph.heads(index).stop for index in self.dz)}
        places = sorted({start for start in begins if start < count} | {count})
        for start, stop in pairwise(places):
            yield slice(start, stop), rows[start:stop]

    def factors(self, senders: slice, at_read: bool) -> tuple[Tensor, Tensor] | None:
        for index, dz in (self.dz or {}).items():
            if senders == self.model.graph.heads(index):
                return at_positions(dz, self.read if at_read else None), self.model.attentions[index].w_send
        return None

    def moved(self, name: str) -> Tensor:
        index, graph = int(name[1:]), self.model.graph
        rows = self.rows(graph.is_last(index))
        return rows[graph.heads(index)].sum(0) if name[0] == "a" else rows[graph.mlp(index)]

    def contract(
        self, sums: Sums, saved: list[StageSaved], grad: Tensor, past: list[Tensor] | None, step: Pass
    ) -> None:
        runs = len(grad) // len(self.read)
        layers = 0 if step.exact_softmax else _layers_at_once(self, runs)
        edges = _Layers(self, sums, step, runs, layers) if layers else _Edges(self, sums, step, runs)
        backward(self.model, saved, grad, edges, rules=step.rules, past=past, read=self.read.repeat(runs, 1))
        edges.end()


class _Edges(Sink):
    """Contracts the dense buffer with the receivers' gradients as they come, those of several runs of it added up."""

    def __init__(self, store: DenseStore, sums: Sums, step: Pass, runs: int) -> None:
        self.store, self.sums, self.step, self.graph = store, sums, step, store.model.graph
        # One layer's receivers, of some pairs at a time, in the same memory: what is made stays in a cache until it is
        # contracted and added up, and fresh pages would cost as much time as the arithmetic.
        buffer = store.everywhere
        rows, tokens, width = buffer.shape[1:]
        one = self.graph.receivers_per_layer * tokens * width
        self.at_once = -(-pairs_at_once(runs * rows, one * buffer.itemsize, store.device) // runs)
        self.workspace = buffer.new_empty(runs * self.at_once * one)
        self.rows = torch.arange(runs * rows, device=buffer.device).view(runs, rows)
        # A layer's MLP receiver [B, T, D] waits for its q, k and v: alone it would read all of the buffer once more.
        self.mlp: Tensor | None = None

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
                add_exact(self.store, self.sums, part, self.step.weight)
        first, count = part.receivers.start - part.channels.start, part.channels.stop - part.channels.start
        mlp, self.mlp, total = self.mlp, None, []
        receivers = slice(first + by_gradient.start, first + by_gradient.stop + (mlp is not None))
        runs, rows = self.rows.shape
        for pairs in (slice(start, start + self.at_once) for start in range(0, rows, self.at_once)):
            some = pairs if runs == 1 else self.rows[:, pairs].flatten()
            grads = part.of(some).grads(self.sums.impl, self.workspace)
            total.append(grads.sum(0, dtype=accumulate_dtype(grads.dtype)).unflatten(0, (runs, -1)))
            if mlp is not None:  # behind the layer's q, k and v, as in the graph
                shape = (count + 1, *grads.shape[1:])
                grads = self.workspace[: math.prod(shape)].view(shape)
                grads[count] = mlp[some]
            if receivers.start < receivers.stop:
                before = slice(0, self.graph.senders_before(part.receivers.start))
                self.add(grads[by_gradient.start - part.channels.start :], receivers, part.at_read, pairs, before)
        return (total[0] if len(total) == 1 else torch.cat(total, 1)).flatten(0, 1)

    def end(self) -> None:
        """The backward pass is over."""

    def add(
        self,
        grads: Tensor,
        receivers: slice,
        at_read: bool,
        pairs: slice = slice(None),
        senders: slice | None = None,
    ) -> None:
        """Contract some receivers' gradients with some senders, None for all that come before them."""
        senders = senders or slice(0, self.graph.senders_before(receivers.start))
        delta, sums = self.store.rows(at_read)[senders, pairs], self.sums
        grads = over_steps(grads, 1, delta.shape[1])
        for name, reduce in sums.targets(at_read):
            block = kernels.edge_scores(delta, grads, reduce=reduce, impl=sums.impl)
            sums.add(name, block, (senders, receivers), self.step.weight, at_read, pairs)


class _Layers(_Edges):
    """Contracts the receivers of several layers at once, so that the buffer is read less often, and takes their sum
    from ∂metric/∂(q, k, v), so that no receiver is read a second time.

    What has its gradient at the positions that are read is contracted as it comes.
    """

    def __init__(self, store: DenseStore, sums: Sums, step: Pass, runs: int, layers: int) -> None:
        self.store, self.sums, self.step, self.graph = store, sums, step, store.model.graph
        buffer, size = store.everywhere, layers * self.graph.receivers_per_layer
        self.grads = buffer.new_empty(size, runs * buffer.shape[1], *buffer.shape[2:])
        self.filled = size  # from here on, by receivers in the graph's order: these
        self.waiting: list[slice] = []

    def room(self, receiver: int, at_read: bool) -> Tensor | None:
        return None if at_read else self.take(slice(receiver, receiver + 1))[0]

    def receiver(self, name: str, receiver: int, grad: Tensor, at_read: bool) -> None:
        if at_read or name == "logits":  # else it lies where it waits
            self.add(grad[None], slice(receiver, receiver + 1), at_read)

    def channels(self, part: Channels) -> Tensor | None:
        if part.at_read:
            self.add(part.grads(self.sums.impl), part.receivers, True)
        else:
            part.grads(self.sums.impl, self.take(part.receivers).flatten())
        return None

    def take(self, receivers: slice) -> Tensor:
        """Where the gradients of some receivers wait, [R', n·B, T, D]; backward, the later ones come first."""
        count = receivers.stop - receivers.start
        if count > self.filled:
            self.end()
        self.filled -= count
        if self.waiting and self.waiting[0].start == receivers.stop:
            receivers = slice(receivers.start, self.waiting.pop(0).stop)
        self.waiting.insert(0, receivers)
        return self.grads[self.filled : self.filled + count]

    def end(self) -> None:
        if not self.waiting:
            return
        senders, sums = slice(0, self.graph.senders_before(self.waiting[-1].stop - 1)), self.sums
        edges = [self.store.model.edge_masks[0][senders, receivers] for receivers in self.waiting]
        delta = self.store.everywhere[senders]
        if len(delta):
            block = kernels.edge_scores(
                delta,
                over_steps(self.grads[self.filled :], 1, delta.shape[1]),
                mask=edges[0] if len(edges) == 1 else torch.cat(edges, 1),
                reduce=sums.reduction(False),
                impl=sums.impl,
            )
            for receivers in self.waiting:
                part, block = block.tensor_split([receivers.stop - receivers.start], -1)
                sums.add("scores", part, (senders, receivers), self.step.weight)
        self.waiting, self.filled = [], len(self.grads)


def _layers_at_once(store: DenseStore, runs: int) -> int:
    """How many layers' receivers are contracted at once; 0 where one layer's are more than is held at a time."""
    most, each, buffer = limits(store.device), store.model.graph.receivers_per_layer, store.everywhere
    one = each * runs * math.prod(buffer.shape[1:]) * buffer.itemsize
    at_once = min(max(1, most.receivers // each), most.workspace // one, store.model.graph.n_layers)
    return at_once if most.receivers else 0


def pairs_at_once(pairs: int, size: int, device: torch.device) -> int:
    """How many of a batch's pairs have one layer's receivers, `size` bytes a pair, in memory at a time, evenly."""
    at_once = max(1, limits(device).workspace // size)
    return -(-pairs // -(-pairs // at_once))
