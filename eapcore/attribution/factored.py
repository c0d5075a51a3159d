"""Differences as factors that have no axis H beside D, contracted in chunks of tokens at the end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import eapcore.kernels as kernels
from eapcore.attribution.exact_patterns import add_exact
from eapcore.attribution.methods import Pass
from eapcore.attribution.sums import Products, Sums, rows_at
from eapcore.execution.batch import Batch
from eapcore.graph.graph import Graph
from eapcore.models.attention import Channels
from eapcore.models.backward import Sink, backward
from eapcore.models.config import ModelConfig
from eapcore.models.forward import StageSaved
from eapcore.models.matmul import product
from eapcore.models.model import Model
from eapcore.models.tensors import at_positions, on


class FactoredStore:
    """Δz and Δ of the MLPs, about 2·L·B·T·D, from which senders are made on the fly, so many token rows at a time."""

    steps = False
    channels = False
    products: Products | None = None
    embedded: Tensor | None = None

    def __init__(self, model: Model, batch: Batch, chunk: int | None = None) -> None:
        self.model, self.read, self.chunk = model, batch.read, chunk
        config = model.config
        # Zero in the last layer but at the answer, where alone it is needed.
        self.dz = self._zeros(batch, config.n_heads, config.d_head)
        self.mlp = None if config.attn_only else self._zeros(batch, config.d_model)
        self.embed = model.weights.w_e.new_zeros(0)

    def _zeros(self, batch: Batch, *shape: int) -> Tensor | list[Tensor]:
        """[L, B, T, ..] where the layers lie on one device, else each layer's where it lies."""
        like = self.model.weights.w_e
        if len(self.model.devices) == 1:
            return like.new_zeros(self.model.config.n_layers, *batch.shape, *shape)
        return [like.new_zeros(*batch.shape, *shape, device=each.device) for each in self.model.attentions]

    def set_embed(self, sent: Tensor, clean: Tensor) -> None:
        self.embed = (sent - clean).to(self.model.dtype)

    def set_heads(self, index: int, dz: Tensor) -> None:
        self.dz[index][self._place(index)] = dz

    def mlp_room(self, index: int) -> Tensor | None:
        return None if self.mlp is None or self.model.graph.is_last(index) else self.mlp[index]

    def set_mlp(self, index: int, delta: Tensor, units: Tensor | None) -> None:
        assert self.mlp is not None
        self.mlp[index][self._place(index)] = delta

    def _place(self, index: int) -> Any:
        """Where in [B, T] a layer's Δ belongs."""
        if not self.model.graph.is_last(index):
            return ...
        read = self._read(index)
        return torch.arange(len(read), device=read.device)[:, None], read

    def _read(self, index: int) -> Tensor:
        """The positions that are read, on a layer's device."""
        return on(self.read, self.model.attentions[index].device)

    def set_channels(self, index: int, q: Tensor, kv: Tensor) -> None:
        pass

    def deltas(
        self, at_read: bool, count: int, at_once: int | None = None, device: torch.device | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        for senders, delta in self._each(at_read, count):
            delta = delta if device is None else on(delta, device)
            for first, some in enumerate(delta.split(at_once or len(delta))):
                start = senders.start + first * (at_once or 0)
                yield slice(start, start + len(some)), some

    def of_pairs(self, at_read: bool, count: int, pairs: slice) -> Iterator[tuple[slice, Tensor]]:
        yield slice(0, count), torch.cat([delta for _, delta in self._each(at_read, count, pairs)])

    def _each(self, at_read: bool, count: int, pairs: slice = slice(None)) -> Iterator[tuple[slice, Tensor]]:
        """What each component sends by itself, of some pairs."""
        graph = self.model.graph
        yield slice(0, 1), at_positions(self.embed[pairs], self.read[pairs] if at_read else None)[None]
        for index, attention in enumerate(self.model.attentions):
            heads, mlp, read = graph.heads(index), graph.mlp(index), self._read(index)[pairs] if at_read else None
            if heads.start >= count:
                return
            yield heads, attention.send(at_positions(self.dz[index][pairs], read))
            if self.mlp is not None and mlp < count:
                yield slice(mlp, mlp + 1), at_positions(self.mlp[index][pairs], read)[None]

    def factors(self, senders: slice, at_read: bool) -> tuple[Tensor, Tensor] | None:
        for index, attention in enumerate(self.model.attentions):
            if senders == self.model.graph.heads(index):
                read = self._read(index) if at_read else None
                return at_positions(self.dz[index], read), attention.w_send
        return None

    def moved(self, name: str) -> Tensor:
        index = int(name[1:])
        read = self._read(index) if self.model.graph.is_last(index) else None
        if name[0] == "a":
            dz = at_positions(self.dz[index], read)
            return product(dz.flatten(2), self.model.attentions[index].w_send.flatten(0, 1))
        assert self.mlp is not None
        return at_positions(self.mlp[index], read)

    def contract(
        self, sums: Sums, saved: list[StageSaved], grad: Tensor, past: list[Tensor] | None, step: Pass
    ) -> None:
        like = next(run.attention for run in reversed(saved) if run.attention is not None)
        factors = _Factors(self, sums, step, like.kv)
        del like
        backward(self.model, saved, grad * step.weight, factors, rules=step.rules, past=past, read=self.read)
        w_o = [attention.w_send for attention in self.model.attentions]
        chunk = self.chunk
        if chunk is None:  # as many rows where fewer positions are read
            assert isinstance(self.dz, Tensor)
            sizes = factored_sizes(self.model.config, *self.dz.shape[1:3])
            chunk = kernels.fast_chunk(sizes, dtype=self.dz.dtype, device=self.dz.device, impl=sums.impl)
        for at_read, mask in zip((False, True), self.model.edge_masks, strict=True):
            mask = mask & ~factors.exact if step.exact_softmax else mask
            embed, mlp, dz = self.embed, self.mlp, self.dz
            assert isinstance(dz, Tensor) and not isinstance(mlp, list)
            if at_read:
                embed = at_positions(embed, self.read)
                dz, mlp = rows_at(dz, self.read), None if mlp is None else rows_at(mlp, self.read)
            senders, receivers = kernels.FactoredSenders(embed, dz, w_o, mlp), factors.receivers(at_read)
            before = senders_before(self.model.graph, at_read)
            for name, reduce in sums.targets(at_read):
                block = kernels.edge_scores_factored(
                    senders, receivers, mask=mask, reduce=reduce, chunk=chunk, before=before, impl=sums.impl
                )
                sums.add(name, block, (), 1.0, at_read)
            del receivers


def factored_sizes(config: ModelConfig, batch: int, tokens: int) -> kernels.Sizes:
    """The shapes of a model's factors."""
    return kernels.Sizes(
        batch,
        tokens,
        config.d_model,
        channels=config.graph.channels_per_layer,
        d_head=config.d_head,
        layers=config.n_layers,
        heads=config.n_heads,
        mlps=not config.attn_only,
    )


@lru_cache(maxsize=256)
def senders_before(graph: Graph, at_read: bool) -> tuple[int, ...]:
    """How many senders come before each receiver whose gradient is at the positions read alone, or of all others; 0
    before the rest."""
    read = set(graph.read_receivers)
    return tuple(graph.senders_before(r) if (r in read) == at_read else 0 for r in range(graph.n_receivers))


@dataclass(frozen=True, slots=True)
class _Layer:
    """What a layer's receivers are made of, as `kernels.FactoredReceivers` has it."""

    g: Tensor
    act: Tensor | None
    sums: Tensor | None
    norm: kernels.Norm
    weight: list[Tensor]

    def between(self, before: int, behind: int, weight: list[Tensor]) -> _Layer:
        """The same among so many channels without a gradient; weight: of all of them."""

        def among(x: Tensor) -> Tensor:
            return functional.pad(x, (0, 0, 0, 0, 0, 0, before, behind))

        act, sums = (None if x is None else among(x) for x in (self.act, self.sums))
        return _Layer(among(self.g), act, sums, self.norm, weight)


class _Factors(Sink):
    """Keeps what the receivers' gradients are made of instead of making them; kv says how large they are.

    What has a gradient only at the positions that are read, see `Graph.read_receivers`, is kept at these alone.
    """

    def __init__(self, store: FactoredStore, sums: Sums, step: Pass, kv: Tensor) -> None:
        model, read = store.model, store.read
        config, graph = model.config, model.graph
        self.store, self.sums, self.step, self.model, self.like = store, sums, step, model, kv
        self.exact = torch.zeros(graph.n_receivers, dtype=torch.bool, device=kv.device)  # q and k
        for index, attention in enumerate(model.attentions):
            start = graph.qkv(index).start
            self.exact[start : start + attention.channels[1].stop].fill_(True)  # `= True` would wait for the device
        self.tokens = {False: kv.shape[1], True: read.shape[1]}
        # Of all layers but the last, and of the last at the positions read: [L, B, T, D] of which the rest stays zero.
        self.mlp = {
            at_read: None if config.attn_only else kv.new_zeros(config.n_layers, len(kv), tokens, config.d_model)
            for at_read, tokens in self.tokens.items()
        }
        self.logits = kv.new_zeros(0)
        self.layers: dict[bool, dict[int, _Layer]] = {False: {}, True: {}}

    def receiver(self, name: str, receiver: int, grad: Tensor, at_read: bool) -> None:
        mlp = self.mlp[at_read]
        if name == "logits":
            self.logits = grad
        elif mlp is not None:
            mlp[int(name[1:])] = grad

    def channels(self, part: Channels) -> Tensor | None:
        if self.step.exact_softmax and part.channels.stop == part.attention.channels[2].stop:  # the last piece
            add_exact(self.store, self.sums, part, 1.0)  # its gradient has the pass's weight
        g, norm, groups = part.factors(part.attention.groups(part.channels))
        layer = _Layer(g.permute(2, 0, 1, 3), None, part.needed_sums(), norm, groups)  # [C', B, T, K]
        if layer.sums is None:
            layer = replace(layer, act=part.each_act.permute(2, 0, 1, 3))
        before, behind = part.channels.start, part.attention.channels[2].stop - part.channels.stop
        if before or behind:  # channels that have no gradient here
            first = part.attention.groups(slice(0, before))
            last = part.attention.groups(slice(part.channels.stop, part.channels.stop + behind))
            layer = layer.between(before, behind, [*first, *groups, *last])
        self.layers[part.at_read][part.index] = layer
        return None

    def receivers(self, at_read: bool) -> kernels.FactoredReceivers:
        """Those at all positions, or at those read alone, all others and layers without a gradient as zeros; once."""
        config, attentions, layers = self.model.config, self.model.attentions, self.layers[at_read]
        shape = (len(self.like), self.tokens[at_read])
        nothing = self.like.new_zeros(1).expand(self.model.graph.channels_per_layer, *shape, config.d_head)
        for index, attention in enumerate(attentions):
            groups = attention.groups(slice(0, attention.channels[2].stop))
            layers.setdefault(index, _Layer(nothing, nothing, None, kernels.Norm("none"), groups))
        ordered = [layers.pop(index) for index in range(config.n_layers)]
        constants = self.model.closed_forms
        return kernels.FactoredReceivers(
            g=[layer.g for layer in ordered],
            act=[layer.act for layer in ordered],
            sums=[layer.sums for layer in ordered],
            weight=[layer.weight for layer in ordered],
            norms=[layer.norm for layer in ordered],
            w_gamma=torch.stack([w for w, _ in constants]),
            offset=torch.stack([o for _, o in constants]),
            logits=self.logits if at_read else self.like.new_zeros(config.d_model).expand(*shape, config.d_model),
            mlp=self.mlp[at_read],
        )
