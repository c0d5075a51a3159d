"""A batch of prompt pairs, where its senders' differences are kept, and how gradients meet them.

A window is a batch cut to the positions where anything can differ and still be read. Its differences are kept either
as the dense sender buffer, contracted with one layer's receivers at a time while the backward pass runs, or as factors
that have no axis H beside D, contracted in chunks of tokens at the end, or with the residual stream's gradient behind
each sender.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from eapcore import kernels, planner
from eapcore.gradient import Channels, Sink, backward
from eapcore.methods import Pass
from eapcore.model import LayerSaved, Model, accumulate_dtype, at_positions, channel_groups, embed, head_outputs
from eapcore.products import product
from eapcore.softmax import exact_scores
from eapcore.tasks import PromptPairs


@dataclass(frozen=True, slots=True)
class Window:
    """A batch of pairs from the position `start` on.

    Clean and corrupt share the tokens before it: every Δ is zero there, and the two runs have one past (an ablation
    without prompts has a Δ everywhere: its windows start at 0). Behind the last position that the metric reads every
    gradient is zero. pairs, index: on the model's device; index is int64 [B], which of the task's pairs these are.
    """

    pairs: PromptPairs
    index: Tensor
    start: int
    stop: int

    @staticmethod
    def of(pairs: PromptPairs, index: Tensor, device: torch.device, *, shared: bool = True) -> Window:
        batch = pairs.select(index)
        start, stop = int(batch.first_difference().min()) if shared else 0, int(batch.positions.max()) + 1
        return Window(batch.to(device), index.to(device), start, stop)

    @property
    def read(self) -> Tensor:
        """int64 [B, 1], the answer positions inside the window."""
        return self.pairs.positions[:, None] - self.start

    @property
    def shape(self) -> tuple[int, int]:
        """(B, T)."""
        return len(self.pairs), self.stop - self.start

    def embed(self, model: Model, prompts: Tensor) -> Tensor:
        """What the sender `embed` writes for clean or corrupt prompts in the window: [B, T, D]."""
        return embed(model, prompts[:, self.start : self.stop], self.start)


class Sums:
    """A batch's scores by name, float64: as they are, for each pair [B, ..], or for each position from the first on
    [T, ..].

    absolute: a pair's scores are added to `total` as |score| at the end of every pass.
    """

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], window: Window, reduce: str, impl: str, *, absolute: bool = False
    ) -> None:
        self.reduce, self.impl, self.read, self.start = reduce, impl, window.pairs.positions, window.start
        self.absolute, self.inner = absolute, "pair" if absolute else reduce
        size = {"all": (), "pair": (len(window.pairs),), "position": (window.stop,)}[self.inner]
        self.scores = {
            name: torch.zeros((*size, *shape), dtype=torch.float64, device=self.read.device)
            for name, shape in shapes.items()
        }
        self.total = {name: torch.zeros_like(x) for name, x in self.scores.items()} if absolute else {}

    def reduction(self, at_read: bool) -> str:
        """What a block is to be summed over; see `add`."""
        return "pair" if self.inner == "position" and at_read else self.inner

    def add(
        self,
        name: str,
        block: Tensor,
        place: tuple[Any, ...],
        weight: float,
        at_read: bool = False,
        pairs: slice = slice(None),
    ) -> None:
        """Add a block that was summed over some of the pairs as `reduction` says, [.., *place], to the scores there."""
        scores = self.scores[name][(..., *place)]
        if self.inner == "position" and at_read:
            scores.index_add_(0, self.read[pairs], block.double() * weight)
        else:
            here = {"all": slice(None), "pair": pairs, "position": slice(self.start, None)}[self.inner]
            scores[here].add_(block, alpha=weight)

    def end_pass(self) -> None:
        for name in self.total:
            self.total[name] += self.scores[name].abs()
            self.scores[name].zero_()

    def result(self) -> dict[str, Tensor]:
        if not self.absolute:
            return self.scores
        return {name: x.sum(0) if self.reduce == "all" else x for name, x in self.total.items()}


class Store(Protocol):
    """Where a window's differences e_corrupt − e_clean are kept until gradients meet them.

    steps: `contract` takes the gradients of several runs of the same pairs, [n·B, Q, D], and adds them up.
    """

    steps: bool

    def set_embed(self, delta: Tensor) -> None:
        """Δ of the embedding, [B, T, D]."""

    def set_heads(self, index: int, dz: Tensor) -> None:
        """Δ of a layer's mixtures of v, [B, Q, H, K]."""

    def set_mlp(self, index: int, delta: Tensor, units: Tensor | None) -> None:
        """Δ of what a layer's MLP sends, [B, Q, D], and of its hidden units [B, Q, M] where they are wanted."""

    def moved(self, component: str) -> Tensor:
        """Δ of what all heads of a layer "a{l}" or its MLP "m{l}" send together, [B, T, D], of the last [B, Q, D]."""

    def contract(
        self, sums: Sums, saved: list[LayerSaved], grad: Tensor, past: list[Tensor] | None, step: Pass
    ) -> None:
        """Go back from grad [n·B, Q, D], the gradient of the logits' receiver, and add weight · scores to sums."""


class DenseStore:
    """The explicit sender buffer.

    everywhere: [S', B, T, D] of all senders before the last layer. at_read: [S, B, Q, D] of all senders at the
    positions that are read: all that the last layer's heads and MLP need, since what reads them has a gradient there
    alone.
    """

    steps = True

    def __init__(self, model: Model, window: Window, memory: Tensor) -> None:
        self.model, self.read = model, window.read
        (rows, tokens), width, graph = window.shape, model.config.d_model, model.graph
        before = graph.heads(model.config.n_layers - 1).start
        cut = before * rows * tokens * width
        end = cut + graph.n_senders * rows * width
        self.everywhere = memory[:cut].view(before, rows, tokens, width)
        self.at_read = memory[cut:end].view(graph.n_senders, rows, 1, width)

    @staticmethod
    def size(model: Model, window: Window) -> int:
        """Elements of memory that a window's buffer takes."""
        rows, tokens = window.shape
        before = model.graph.heads(model.config.n_layers - 1).start
        return (before * tokens + model.graph.n_senders) * rows * model.config.d_model

    def rows(self, at_read: bool) -> Tensor:
        return self.at_read if at_read else self.everywhere

    def set_embed(self, delta: Tensor) -> None:
        self.everywhere[0] = delta

    def set_heads(self, index: int, dz: Tensor) -> None:
        last = index == self.model.config.n_layers - 1
        if last:
            self.at_read[: len(self.everywhere)] = _at(self.everywhere, self.read)
        rows = self.rows(last)
        head_outputs(dz, self.model.weights.layers[index].w_o, out=rows[self.model.graph.heads(index)])

    def set_mlp(self, index: int, delta: Tensor, units: Tensor | None) -> None:
        self.rows(index == self.model.config.n_layers - 1)[self.model.graph.mlp(index)] = delta

    def moved(self, component: str) -> Tensor:
        index, graph = int(component[1:]), self.model.graph
        rows = self.rows(index == self.model.config.n_layers - 1)
        return rows[graph.heads(index)].sum(0) if component[0] == "a" else rows[graph.mlp(index)]

    def contract(
        self, sums: Sums, saved: list[LayerSaved], grad: Tensor, past: list[Tensor] | None, step: Pass
    ) -> None:
        runs = len(grad) // len(self.read)
        edges, read = _Edges(self, sums, step, runs), self.read.repeat(runs, 1)
        backward(self.model, saved, grad, edges, rules=step.rules, past=past, read=read)


class _Edges(Sink):
    """Contracts the dense buffer with the receivers' gradients as they come, those of several runs of it added up."""

    def __init__(self, store: DenseStore, sums: Sums, step: Pass, runs: int) -> None:
        self.store, self.sums, self.step, self.graph = store, sums, step, store.model.graph
        # One layer's receivers, of some pairs at a time, in the same memory: what is made stays in a cache until it is
        # contracted and added up, and fresh pages would cost as much time as the arithmetic.
        config, dtype, buffer = store.model.config, store.model.dtype, store.everywhere
        rows, tokens = buffer.shape[1:3]
        self.at_once = -(-planner.workspace_pairs(config, runs * rows, tokens, dtype, buffer.device) // runs)
        size = runs * self.at_once * self.graph.receivers_per_layer * tokens * config.d_model
        self.workspace = buffer.new_empty(size)
        self.rows = torch.arange(runs * rows, device=buffer.device).view(runs, rows)
        # A layer's MLP receiver [B, T, D] waits for its q, k and v: alone it would read all of the buffer once more.
        self.mlp: Tensor | None = None

    def receiver(self, receiver: int, grad: Tensor, at_read: bool) -> None:
        index = receiver // self.graph.receivers_per_layer
        if at_read or receiver == self.graph.logits or f"a{index}" in self.step.rules.cut:
            self.add(grad[None], slice(receiver, receiver + 1), at_read)
            return
        self.mlp, heads = grad, self.graph.heads(index)  # those between the layer's q, k and v and its MLP
        self.add(grad[None], slice(receiver, receiver + 1), at_read, senders=heads)

    def channels(self, part: Channels) -> Tensor:
        heads, by_gradient = self.store.model.config.n_heads, part.channels
        if self.step.exact_softmax:  # v alone
            by_gradient = slice(max(part.channels.start, 2 * heads), part.channels.stop)
            for start in range(part.channels.start, min(part.channels.stop, 2 * heads), heads):
                self.add_exact(part, slice(start, start + heads))
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
        return torch.cat(total, 1).flatten(0, 1)

    def add_exact(self, part: Channels, channels: slice) -> None:
        delta = self.store.rows(part.at_read)[: self.graph.senders_before(part.receivers.start)]
        block = exact_scores(part, channels, delta, self.sums.inner)
        first = part.receivers.start - part.channels.start
        place = (slice(0, len(delta)), slice(first + channels.start, first + channels.stop))
        self.sums.add("scores", block, place, self.step.weight)

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
        block = kernels.edge_scores(delta, grads, reduce=sums.reduction(at_read), impl=sums.impl)
        sums.add("scores", block, (senders, receivers), self.step.weight, at_read, pairs)


class FactoredStore:
    """Δz and Δ of the MLPs, about 2·L·B·T·D, from which senders are made on the fly, so many token rows at a time."""

    steps = False

    def __init__(self, model: Model, window: Window, chunk: int | None = None) -> None:
        self.model, self.read, self.chunk = model, window.read, chunk
        config, (rows, tokens) = model.config, window.shape
        like = model.weights.w_e
        # Zero in the last layer but at the answer, where alone it is needed.
        self.dz = like.new_zeros(config.n_layers, rows, tokens, config.n_heads, config.d_head)
        self.mlp = None if config.attn_only else like.new_zeros(config.n_layers, rows, tokens, config.d_model)
        self.embed = like.new_zeros(0)

    def set_embed(self, delta: Tensor) -> None:
        self.embed = delta

    def set_heads(self, index: int, dz: Tensor) -> None:
        self.dz[index][self._place(index)] = dz

    def set_mlp(self, index: int, delta: Tensor, units: Tensor | None) -> None:
        assert self.mlp is not None
        self.mlp[index][self._place(index)] = delta

    def _place(self, index: int) -> Any:
        """Where in [B, T] a layer's Δ belongs."""
        if index < self.model.config.n_layers - 1:
            return ...
        return torch.arange(len(self.read), device=self.read.device)[:, None], self.read

    def moved(self, component: str) -> Tensor:
        index = int(component[1:])
        read = self.read if index == self.model.config.n_layers - 1 else None
        if component[0] == "a":
            dz = at_positions(self.dz[index], read)
            return product(dz.flatten(2), self.model.weights.layers[index].w_o.flatten(0, 1))
        assert self.mlp is not None
        return at_positions(self.mlp[index], read)

    def contract(
        self, sums: Sums, saved: list[LayerSaved], grad: Tensor, past: list[Tensor] | None, step: Pass
    ) -> None:
        factors = _Factors(self.model, self.read, saved[-1].kv)
        backward(self.model, saved, grad * step.weight, factors, rules=step.rules, past=past, read=self.read)
        w_o = [layer.w_o for layer in self.model.weights.layers]
        for at_read, mask in zip((False, True), self.model.edge_masks, strict=True):
            embed, mlp, dz = self.embed, self.mlp, self.dz
            if at_read:
                embed = at_positions(embed, self.read)
                dz, mlp = _at(dz, self.read), None if mlp is None else _at(mlp, self.read)
            senders, receivers = kernels.FactoredSenders(embed, dz, w_o, mlp), factors.receivers(at_read)
            reduce = sums.reduction(at_read)
            block = kernels.edge_scores_factored(
                senders, receivers, mask=mask, reduce=reduce, chunk=self.chunk, impl=sums.impl
            )
            sums.add("scores", block, (), 1.0, at_read)
            del receivers


class _Factors(Sink):
    """Keeps what the receivers' gradients are made of instead of making them; kv says how large they are.

    What has a gradient only at the positions that are read, see `Graph.read_receivers`, is kept at these alone.
    """

    def __init__(self, model: Model, read: Tensor, kv: Tensor) -> None:
        config = model.config
        self.model, self.like = model, kv
        self.tokens = {False: kv.shape[1], True: read.shape[1]}
        # Of all layers but the last, and of the last at the positions read: [L, B, T, D] of which the rest stays zero.
        self.mlp = {
            at_read: None if config.attn_only else kv.new_zeros(config.n_layers, len(kv), tokens, config.d_model)
            for at_read, tokens in self.tokens.items()
        }
        self.logits = kv.new_zeros(0)
        self.layers: dict[bool, dict[int, tuple[Tensor, Tensor, kernels.Norm, list[Tensor]]]] = {False: {}, True: {}}

    def receiver(self, receiver: int, grad: Tensor, at_read: bool) -> None:
        mlp = self.mlp[at_read]
        if receiver == self.model.graph.logits:
            self.logits = grad
        elif mlp is not None:
            mlp[receiver // self.model.graph.receivers_per_layer] = grad

    def channels(self, part: Channels) -> Tensor:
        g, norm, groups = part.factors()
        act, count = part.act, 3 * self.model.config.n_heads
        missing = [slice(0, part.channels.start), slice(part.channels.stop, count)]  # without a gradient here
        if any(channels.start < channels.stop for channels in missing):
            g, act = (functional.pad(x, (0, 0, part.channels.start, count - part.channels.stop)) for x in (g, act))
            before, behind = (channel_groups(self.model.weights.layers[part.index], channels) for channels in missing)
            groups = [*before, *groups, *behind]
        self.layers[part.at_read][part.index] = (g, act, norm, groups)
        return part.total()

    def receivers(self, at_read: bool) -> kernels.FactoredReceivers:
        """Those at all positions, or at those read alone, all others and layers without a gradient as zeros; once."""
        config, weights, layers = self.model.config, self.model.weights, self.layers[at_read]
        channels, shape = slice(0, 3 * config.n_heads), (len(self.like), self.tokens[at_read])
        nothing = self.like.new_zeros(1).expand(*shape, channels.stop, config.d_head)
        for index, layer in enumerate(weights.layers):
            layers.setdefault(index, (nothing, nothing, kernels.Norm("none"), list(layer.w_qkv)))
        ordered = [layers.pop(index) for index in range(config.n_layers)]
        constants = [self.model.closed_form(index, channels) for index in range(config.n_layers)]
        return kernels.FactoredReceivers(
            g=[g.permute(2, 0, 1, 3) for g, _, _, _ in ordered],
            act=[act.permute(2, 0, 1, 3) for _, act, _, _ in ordered],
            weight=[groups for _, _, _, groups in ordered],
            norms=[norm for _, _, norm, _ in ordered],
            w_gamma=torch.stack([w for w, _ in constants]),
            offset=torch.stack([o for _, o in constants]),
            logits=self.logits if at_read else self.like.new_zeros(config.d_model).expand(*shape, config.d_model),
            mlp=self.mlp[at_read],
        )


class NodeStore(FactoredStore):
    """The same differences, and with `units` those of the MLPs' hidden units, for scores of what senders send."""

    steps = True

    def __init__(self, model: Model, window: Window, *, units: bool) -> None:
        super().__init__(model, window)
        self.units: dict[int, Tensor] | None = {} if units else None

    def set_mlp(self, index: int, delta: Tensor, units: Tensor | None) -> None:
        super().set_mlp(index, delta, units)
        if self.units is not None and units is not None:
            self.units[index] = units

    def contract(
        self, sums: Sums, saved: list[LayerSaved], grad: Tensor, past: list[Tensor] | None, step: Pass
    ) -> None:
        read = self.read.repeat(len(grad) // len(self.read), 1)
        backward(self.model, saved, grad, _Nodes(self, sums, step), rules=step.rules, past=past, read=read)


class _Nodes(Sink):
    """Multiplies what a sender sends more with the residual stream's gradient behind it."""

    def __init__(self, store: NodeStore, sums: Sums, step: Pass) -> None:
        self.store, self.sums, self.step = store, sums, step

    def behind(self, senders: slice, grad: Tensor, at_read: bool) -> None:
        model, store = self.store.model, self.store
        read = store.read if at_read else None
        layer, place = divmod(senders.start - 1, model.graph.senders_per_layer)
        component = "embed" if senders.start == 0 else f"{'m' if place == model.config.n_heads else 'a'}{layer}"
        if self.sums.absolute and component in self.step.rules.cut:
            return
        grad = over_steps(grad, 0, len(store.read)).to(model.dtype)
        if component[0] == "a":
            w_o, dz = model.weights.layers[layer].w_o, at_positions(store.dz[layer], read)
            if store.units is None:  # ⟨Δz W_O, grad⟩ = ⟨Δz, grad W_Oᵀ⟩, without an axis D for each head
                d_z = product(grad, w_o.flatten(0, 1).T).unflatten(-1, w_o.shape[:2])
                self.add("scores", "bthk,bthk->{}h", dz, d_z, (senders,), at_read)
                return
            delta = head_outputs(dz, w_o)  # [H, B, T, D]
        elif component == "embed":
            delta = store.embed[None]
        else:
            assert store.mlp is not None
            delta = at_positions(store.mlp[layer], read)[None]
        self.add("scores", "sbtd,btd->{}s", delta, grad, (senders,), at_read)
        if store.units is not None:
            self.add("dimensions", "sbtd,btd->{}sd", delta, grad, (senders, slice(None)), at_read)

    def units(self, index: int, grad: Tensor, at_read: bool) -> None:
        if self.store.units is not None:
            grad = over_steps(grad, 0, len(self.store.read))
            self.add("units", "btm,btm->{}m", self.store.units[index], grad, (index, slice(None)), at_read)

    def add(self, name: str, formula: str, delta: Tensor, grad: Tensor, place: tuple[Any, ...], at_read: bool) -> None:
        wide = accumulate_dtype(delta.dtype)
        kept = {"all": "", "pair": "b", "position": "t"}[self.sums.reduction(at_read)]
        block = torch.einsum(formula.format(kept), delta.to(wide), grad.to(wide))
        self.sums.add(name, block, place, self.step.weight, at_read)


def over_steps(x: Tensor, dim: int, rows: int) -> Tensor:
    """x [.., n·B, ..] of n runs of the same B = rows pairs, added up over the runs: [.., B, ..]."""
    return x if x.shape[dim] == rows else x.unflatten(dim, (-1, rows)).sum(dim)


def _at(x: Tensor, read: Tensor) -> Tensor:
    """x [S, B, T, D] at the positions read [B, Q]: [S, B, Q, D]."""
    return x[:, torch.arange(x.shape[1], device=x.device)[:, None], read]
