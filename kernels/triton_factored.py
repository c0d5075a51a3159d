"""edge_scores_factored on the GPU: both sides made for a chunk of tokens, contracted, and the next chunk added.

    for each chunk of n tokens:      senders [S, n, D]     = embed, dz · W_O of every head, mlp
        for each group of layers:    receivers [R', n, D]  = receiver_grads of every channel, mlp, last the logits
                                     scores[:, R']        += senders · receiversᵀ

It is the two other ops, called for some of the tokens: for each layer a product for its senders and `receiver_grads`
for its channels, and `edge_scores` for as many layers' receivers as fill its tiles. Every chunk and every group use the
same two workspaces, which have the positions in front, as the contraction likes them.

Bytes for N tokens in chunks of n, with u = (S + R)·D·element for one token and w the weights of all layers:

    w · N/n   the weights, once a chunk        2·u · N   both sides, written and read, as long as they pass L2 by

n is taken so large that the weights cost little beside that: at n = 10·w/u they add a twentieth, with K = 64 some 600
tokens whatever the model, and each layer's kernels have enough to do. The workspaces, (S + R')·D·n, are held to a third
of what the explicit buffer of all N tokens would take, as factors are for where that is too large, though not below
SMALL, and to a sixteenth of the device's memory.

Making and contracting in one kernel would make every sender again for each tile of receivers, and every receiver again
for each tile of senders: with K = 64 and tiles of 128 × 256 that adds 64/256 + 64/128, three quarters, to the
contraction's operations. It would save writing u, which at XL takes a quarter of the contraction's time by an H200's
data sheet (15.7 MB at 4.8 TB/s against 85 tiles' 8.9 GFLOP at 700 TFLOP/s, for each token).

The order of sums follows from shapes and device, so the same inputs give the same bits on the same model of GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import triton_common as common
from . import triton_edge_scores, triton_receiver_grads
from .checks import FactoredReceivers, FactoredSenders, Norm, Sizes
from .tiling import RECEIVER_TILE, layers_together

# Receivers that are contracted together, at most: with a third tile a 13B's chunks would have two thirds of the tokens.
TOGETHER = 2 * RECEIVER_TILE
SMALL = 8 << 20  # bytes of workspace
Block = tuple[slice, slice]  # pairs, positions


@dataclass(frozen=True, slots=True)
class Group:
    """Layers whose receivers are contracted together, with the logits' behind the last layer's where these have edges.

    receivers: which of all. before: how many senders come before each, None for all; senders: before any of them.
    """

    layers: range
    receivers: slice
    before: tuple[int, ...] | None
    senders: int


def grouped(sizes: Sizes, before: Sequence[int] | None) -> list[Group]:
    """The groups of layers, without layers none of whose receivers has a sender before it."""
    height, logits = sizes.channels + sizes.mlps, sizes.all_receivers - 1
    at_once = layers_together(height, min(TOGETHER // max(1, height), sizes.layers))

    def needed(start: int, stop: int) -> bool:
        return before is None or any(before[start:stop])

    found: list[range] = []
    for layer in range(sizes.layers):
        if not needed(layer * height, (layer + 1) * height):
            continue
        if found and found[-1].stop == layer and len(found[-1]) < at_once:
            found[-1] = range(found[-1].start, layer + 1)
        else:
            found.append(range(layer, layer + 1))
    of_logits = needed(logits, logits + 1)
    if of_logits and not (found and found[-1].stop == sizes.layers):
        found.append(range(sizes.layers, sizes.layers))
    groups = []
    for layers in found:
        receivers = slice(layers.start * height, layers.stop * height + (of_logits and layers.stop == sizes.layers))
        own = None if before is None else tuple(before[receivers])
        groups.append(Group(layers, receivers, own, sizes.all_senders if own is None else max(own)))
    return groups


def choose_chunk(
    senders: int, receivers: int, together: int, d_model: int, weight_bytes: int, element_size: int, rows: int,
    on: common.Target,
) -> int:  # fmt: skip
    """Token rows a chunk of so many, from the bytes that the module's header counts; together: receivers of a group."""
    token = (senders + together) * d_model * element_size
    cheap = common.cdiv(10 * weight_bytes, (senders + receivers) * d_model * element_size)
    third = rows * senders // (3 * (senders + together))
    return max(1, min(max(min(max(cheap, 16), third), SMALL // token), on.memory_bytes // 16 // token))


def fast_chunk(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> int:
    """`choose_chunk` for a model on a device."""
    weight_bytes = sizes.layers * (sizes.channels + sizes.heads) * sizes.d_model * sizes.d_head * dtype.itemsize
    return choose_chunk(
        sizes.all_senders, sizes.all_receivers, max(_rows(group) for group in grouped(sizes, None)), sizes.d_model,
        weight_bytes, dtype.itemsize, sizes.batch * sizes.tokens, common.target(device),
    )  # fmt: skip


def _rows(group: Group) -> int:
    return group.receivers.stop - group.receivers.start


def blocks(batch: int, tokens: int, chunk: int, reduce: str) -> list[Block]:
    """The chunks as blocks of (pairs, positions), whole along the axis that `reduce` sums first."""
    if reduce == "position":
        across = min(batch, chunk)
        along = max(1, min(tokens, chunk // batch))
    else:
        along = min(tokens, chunk)
        across = max(1, min(batch, chunk // tokens))
    return [
        (slice(b, min(b + across, batch)), slice(t, min(t + along, tokens)))
        for b in range(0, batch, across)
        for t in range(0, tokens, along)
    ]


def _shape(piece: Block) -> tuple[int, int]:
    """Pairs and positions of a block."""
    pairs, positions = piece
    return pairs.stop - pairs.start, positions.stop - positions.start


def space_elements(sizes: Sizes, groups: list[Group], pieces: list[Block]) -> tuple[int, int]:
    """Elements of the two workspaces: the senders, and the largest group's receivers, of the largest block."""
    most = max(math.prod(_shape(piece)) for piece in pieces) * sizes.d_model
    return max(group.senders for group in groups) * most, max(map(_rows, groups)) * most


def workspace_bytes(
    sizes: Sizes, dtype: torch.dtype, device: torch.device, masked: bool, reduce: str, chunk: int | None,
    precision: str, before: Sequence[int] | None = None,
) -> int:  # fmt: skip
    """`eapcore.kernels.workspace_bytes` of `edge_scores_factored`: the two workspaces, and the most of what making a
    layer's receivers takes and what contracting a group does, with the scores that it adds."""
    groups = grouped(sizes, before)
    if sizes.batch * sizes.tokens * sizes.d_model == 0 or not groups:
        return 0
    on, most = common.target(device), 0
    pieces = blocks(sizes.batch, sizes.tokens, chunk or fast_chunk(sizes, dtype, device), reduce)
    for pairs, positions in {_shape(piece) for piece in pieces}:
        layer = Sizes(pairs, positions, sizes.d_model, channels=sizes.channels, d_head=sizes.d_head,
                      normed=sizes.normed, centred=sizes.centred, summed=sizes.summed)  # fmt: skip
        most = max(most, triton_receiver_grads.workspace_bytes(layer, dtype, device) if sizes.layers else 0)
        lead = {"all": 1, "pair": pairs, "position": positions}[reduce]
        for group in groups:
            partial = triton_edge_scores.partial_bytes(
                group.senders, _rows(group), pairs, positions, sizes.d_model, dtype, on, masked, reduce, precision,
                group.before, positions_first=True,
            )  # fmt: skip
            most = max(most, partial + 4 * lead * group.senders * _rows(group))
    return sum(space_elements(sizes, groups, pieces)) * dtype.itemsize + most


def shared(weights: Sequence[Tensor]) -> Iterator[tuple[Tensor, int]]:
    """A layer's channel groups as matrices [C', D, K], each of so many channels that follow one another: what is
    repeated along an axis of stride 0 once, and those that lie equally far apart together."""
    held: tuple[Tensor, int] | None = None
    for w in weights:
        w = w.detach()
        share = len(w) if len(w) > 1 and w.stride(0) == 0 else 1
        one = w[:1] if share > 1 else w
        if held is not None and share == held[1] > 1 and (joined := _joined(held[0], one)) is not None:
            held = joined, share
            continue
        if held is not None:
            yield held
        held = (one, share) if len(one) else None
    if held is not None:
        yield held


def _joined(first: Tensor, one: Tensor) -> Tensor | None:
    """Matrices [C', D, K] and one more behind them as one view; None where they do not lie like one."""
    if first.untyped_storage()._cdata != one.untyped_storage()._cdata or first.stride()[1:] != one.stride()[1:]:
        return None
    step = (one.storage_offset() - first.storage_offset()) // len(first)
    if step <= 0 or one.storage_offset() != first.storage_offset() + len(first) * step:
        return None
    if len(first) > 1 and first.stride(0) != step:
        return None
    return first.as_strided((len(first) + 1, *first.shape[1:]), (step, *first.stride()[1:]), first.storage_offset())


def _cut(norm: Norm, block: Block) -> Norm:
    if norm.kind == "none":
        return norm
    assert norm.x_hat is not None and norm.rstd is not None
    return Norm(norm.kind, norm.x_hat[block], norm.rstd[block], norm.gamma)


def _fill_senders(room: Tensor, senders: FactoredSenders, block: Block) -> None:
    """The first senders of a block into [S', b, t, D]."""
    heads, mlps, count = senders.dz.shape[3], senders.mlp is not None, len(room)
    room[:1] = senders.embed.detach()[block]
    for layer, w_o in enumerate(senders.w_o):
        first = 1 + layer * (heads + mlps)
        own = room[first : first + heads]
        if len(own):
            own = own.view(len(own), -1, own.shape[3])  # [H', b·t, D]
            dz = senders.dz[layer].detach()[block].flatten(0, 1).transpose(0, 1)  # [H, b·t, K]
            torch.bmm(dz[: len(own)], w_o.detach()[: len(own)], out=own)
    if senders.mlp is not None:
        behind = room[1 + heads : count : heads + 1]
        behind.copy_(senders.mlp.detach()[: len(behind), *block])


class _Receivers:
    """Makes the receivers' gradients of some layers and tokens."""

    def __init__(self, factors: FactoredReceivers) -> None:
        self.factors, self.mlp = factors, None if factors.mlp is None else factors.mlp.detach()
        self.weights = [list(shared(weights)) for weights in factors.weight]
        self.w_gamma, self.offset = factors.w_gamma.detach().contiguous(), factors.offset.detach().contiguous()

    def fill(self, room: Tensor, group: Group, block: Block) -> None:
        """Those of a group and a block into [R', b, t, D]."""
        channels = self.factors.w_gamma.shape[1]
        height = channels + (self.mlp is not None)
        for place, layer in enumerate(group.layers):
            self._fill_layer(room[place * height : place * height + channels], layer, block)
        if self.mlp is not None and len(group.layers):
            own = self.mlp[group.layers.start : group.layers.stop, *block]
            room[channels : len(group.layers) * height : height] = own
        if len(room) > len(group.layers) * height:
            room[-1] = self.factors.logits.detach()[block]

    def _fill_layer(self, out: Tensor, layer: int, block: Block) -> None:
        g, act = self.factors.g[layer], self.factors.act[layer]
        sums = None if self.factors.sums is None else self.factors.sums[layer]
        if sums is not None:
            act, sums = None, sums[:, :, *block]
            if block[1].stop - block[1].start < g.shape[2]:  # not all tokens of a pair: they do not follow one another
                sums = sums.contiguous()
        norm, start = _cut(self.factors.norms[layer], block), 0
        for weight, share in self.weights[layer]:
            some = slice(start, start + share * len(weight))
            start = some.stop
            triton_receiver_grads.receiver_grads(
                g[some, *block],
                None if act is None else act[some, *block][::share],
                weight,
                norm,
                self.w_gamma[layer, some],
                self.offset[layer, some],
                out[some],
                None if sums is None else sums[some],
            )


def edge_scores_factored(
    senders: FactoredSenders,
    receivers: FactoredReceivers,
    mask: Tensor | None,
    reduce: str,
    chunk: int | None,
    precision: str = "auto",
    *,
    config: triton_edge_scores.Config | None = None,
    before: Sequence[int] | None = None,
) -> Tensor:
    """`eapcore.kernels.edge_scores_factored` on the GPU; `config` is the contraction's tiling."""
    embed = senders.embed.detach()
    precision = common.check_precision(precision, embed.dtype, common.target(embed.device))
    layers, batch, tokens, heads, d_head = senders.dz.shape
    channels, d_model = receivers.w_gamma.shape[1], embed.shape[-1]
    sizes = Sizes(
        batch, tokens, d_model, channels=channels, d_head=d_head, layers=layers, heads=heads,
        mlps=senders.mlp is not None,
    )  # fmt: skip
    shape = {"all": (), "pair": (batch,), "position": (tokens,)}[reduce] + (sizes.all_senders, sizes.all_receivers)
    out, groups = embed.new_zeros(shape, dtype=torch.float32), grouped(sizes, before)
    if batch * tokens * d_model == 0 or not groups:
        return out
    pieces = blocks(batch, tokens, chunk or fast_chunk(sizes, embed.dtype, embed.device), reduce)
    spaces = [embed.new_empty(count) for count in space_elements(sizes, groups, pieces)]

    def room(space: Tensor, count: int, block: Block) -> Tensor:
        """[count, b, t, D] of a workspace."""
        b, t = _shape(block)
        return space[: count * b * t * d_model].view(b, t, count, d_model).permute(2, 0, 1, 3)

    made = _Receivers(receivers)
    for block in pieces:
        delta = room(spaces[0], max(group.senders for group in groups), block)
        _fill_senders(delta, senders, block)
        scores = out if reduce == "all" else out[block[0] if reduce == "pair" else block[1]]
        for group in groups:
            grads = room(spaces[1], _rows(group), block)
            made.fill(grads, group, block)
            edges = None if mask is None else mask[: group.senders, group.receivers]
            scores[..., : group.senders, group.receivers] += triton_edge_scores.edge_scores(
                delta[: group.senders], grads, edges, reduce, None, precision, config=config, before=group.before
            )
    return out
