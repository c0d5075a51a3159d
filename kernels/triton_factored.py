"""edge_scores_factored on the GPU: both sides made for a chunk of tokens, contracted, and the next chunk added.

    for each chunk:  senders [S, n, D]    = embed, dz · W_O of every head, mlp            n tokens
                     receivers [R, n, D]  = receiver_grads of every channel, mlp, logits
                     scores              += senders · receiversᵀ

Each chunk takes two launches to make all layers' senders and receivers (a table says where each layer's weights lie),
three copies, and one `contract`. The two workspaces are used again by every chunk.

Bytes for N tokens in chunks of n, with u = (S + R)·D·element for one token and w the weights of all layers:

    w · N/n   the weights, once a chunk        2·u · N   the workspaces, written and read, as long as they pass L2 by

n is taken so large that the weights cost little beside the workspaces: at n = 5·w/u they add a tenth, with K = 64
some 300 tokens whatever the model. A chunk whose workspaces stay in L2 would save most of the second term where the
weights are smaller than L2, and takes ten times as many launches of a tenth the size: GPT-2 small's 5,120 tokens took
one H200 27 ms in chunks of 32. The workspaces are held to half of what the explicit buffer of all N tokens would
take, as factors are for where that is too large, and to a sixteenth of the device's memory. They have the positions
in front, as the contraction likes them.

Of the channels that have no edge in the mask nothing is made.

Making and contracting in one kernel would make every sender again for each tile of receivers, and every receiver again
for each tile of senders: with K = 64 and tiles of 128 × 256 that adds 64/256 + 64/128, three quarters, to the
contraction's operations. It would save writing u, which at XL takes a quarter of the contraction's time by an H200's
data sheet (15.7 MB at 4.8 TB/s against 85 tiles' 8.9 GFLOP at 700 TFLOP/s, for each token).

The order of sums follows from shapes and device, so the same inputs give the same bits on the same model of GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import triton_common as common
from . import triton_edge_scores, triton_receiver_grads
from .checks import FactoredReceivers, FactoredSenders, Norm, Sizes
from .constants import to_device
from .triton_receiver_grads import Channels

NO_NORM = Norm("none")


@dataclass(frozen=True, slots=True)
class Part:
    """Channels of several layers that one launch makes: their norms differ in nothing but addresses.

    layers: indices. weight: the first layer's first channel group; `table` leads from it to all others.
    """

    layers: tuple[int, ...]
    weight: Tensor
    norm: Norm
    table: Tensor
    align: int


def _distance(tensor: Tensor, base: Tensor) -> int:
    """From the first element of base to the first of tensor, in elements."""
    return (tensor.data_ptr() - base.data_ptr()) // base.element_size()


def _alignment(offsets: NDArray[np.int64], element_size: int) -> int:
    """The largest power of two up to 16 bytes that divides all offsets, in elements."""
    align = 16 // element_size
    while (offsets % align).any():
        align //= 2
    return align


def _part(
    layers: list[int], groups: list[list[Tensor]], norms: list[Norm], inputs: Tensor, acts: Tensor | None, heights: int,
    first_row: int, stride_row: int,
) -> Part:  # fmt: skip
    """The table of `layers` (positions in the lists): channel c of layer l is made into row first_row + l·heights + c.

    groups: each layer's weights [C_i, D, K], of equal inner strides. inputs, acts: [L, C, B, T, K] of which only the
    strides count. stride_row: elements between rows of the output.
    """
    weight, norm = groups[layers[0]][0], norms[layers[0]]
    shared, matrices = [], []
    for layer in layers:
        own = norms[layer]
        shared.append([0, 0, 0])
        if own.kind != "none":
            assert own.x_hat is not None and own.rstd is not None
            assert norm.x_hat is not None and norm.rstd is not None
            gamma = 0 if own.gamma is None or norm.gamma is None else _distance(own.gamma, norm.gamma)
            shared[-1] = [_distance(own.x_hat, norm.x_hat), _distance(own.rstd, norm.rstd), gamma]
        matrices.append(
            [_distance(group, weight) + c * group.stride(0) for group in groups[layer] for c in range(len(group))]
        )
    at, weights = np.array(layers)[:, None], np.array(matrices)  # [l, 1], [l, C]
    c = np.arange(weights.shape[1])
    rows = first_row + at * heights + c
    columns = [
        at * inputs.stride(0) + c * inputs.stride(1),
        np.zeros_like(weights) if acts is None else at * acts.stride(0) + c * acts.stride(1),
        weights,
        *(np.broadcast_to(x, weights.shape) for x in np.array(shared).T[..., None]),
        (at * len(c) + c) * inputs.shape[-1],
        rows * stride_row,
        rows,
    ]
    offsets = np.stack(columns, -1).reshape(-1, len(columns))
    table = torch.empty(offsets.shape, dtype=torch.int64, device="cpu")  # whatever the default device is
    table.numpy()[:] = offsets
    # The offsets that wide loads and stores depend on: g, act, weight, x̂ and out.
    align = _alignment(offsets[:, [0, 1, 2, 3, 7]], max(2, inputs.element_size()))
    return Part(tuple(layers), weight, norm, to_device(table, inputs.device), align)


def _like(norm: Norm, groups: list[Tensor]) -> tuple[object, ...]:
    """What the layers of one launch have to share."""
    described = [None if t is None else (t.dtype, t.stride()) for t in (norm.x_hat, norm.rstd, norm.gamma)]
    return (norm.kind, groups[0].stride()[1:], *described)


def _parts(
    groups: list[list[Tensor]], norms: list[Norm], inputs: Tensor, acts: Tensor | None, heights: int, first_row: int,
    stride_row: int,
) -> list[Part]:  # fmt: skip
    """One `Part` for each set of layers that a launch can make together; usually there is one."""
    alike: dict[tuple[object, ...], list[int]] = {}
    for layer, (norm, group) in enumerate(zip(norms, groups, strict=True)):
        alike.setdefault(_like(norm, group), []).append(layer)
    return [_part(layers, groups, norms, inputs, acts, heights, first_row, stride_row) for layers in alike.values()]


def _stacked(layers: Sequence[Tensor], nothing: Tensor) -> Tensor:
    """[L, C, B, T, K], which one launch addresses by its strides."""
    if isinstance(layers, Tensor):
        return common.unit_inner_stride(layers.detach())
    return torch.stack([x.detach() for x in layers]) if layers else nothing


def _same_inner_strides(groups: Sequence[Tensor]) -> list[Tensor]:
    """A layer's channel groups, copied if their d and k strides differ."""
    detached = [w.detach() for w in groups if w.shape[0]]
    if len({w.stride()[1:] for w in detached}) > 1:
        return [w.contiguous() for w in detached]
    return detached


def choose_chunk(
    senders: int, receivers: int, d_model: int, weight_bytes: int, element_size: int, rows: int, on: common.Target
) -> int:
    """Token rows a chunk of so many, from the bytes that the module's header counts."""
    unit = (senders + receivers) * d_model * element_size
    wanted = max(min(max(common.cdiv(5 * weight_bytes, unit), 16), rows * senders // (2 * (senders + receivers))), 2)
    return max(1, min(wanted, on.memory_bytes // 16 // unit))


def fast_chunk(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> int:
    """`choose_chunk` for a model on a device."""
    weight_bytes = sizes.layers * (sizes.channels + sizes.heads) * sizes.d_model * sizes.d_head * dtype.itemsize
    return choose_chunk(
        sizes.all_senders, sizes.all_receivers, sizes.d_model, weight_bytes, dtype.itemsize,
        sizes.batch * sizes.tokens, common.target(device),
    )  # fmt: skip


def blocks(batch: int, tokens: int, chunk: int, reduce: str) -> list[tuple[slice, slice]]:
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


def rows_of(piece: tuple[slice, slice]) -> int:
    """Token rows of a block."""
    pairs, positions = piece
    return (pairs.stop - pairs.start) * (positions.stop - positions.start)


def space_elements(sizes: Sizes, pieces: list[tuple[slice, slice]]) -> tuple[int, int]:
    """Elements of the two workspaces: the senders and the receivers of the largest block."""
    most = max(rows_of(piece) for piece in pieces) * sizes.d_model
    return sizes.all_senders * most, sizes.all_receivers * most


def workspace_bytes(
    sizes: Sizes, dtype: torch.dtype, device: torch.device, masked: bool, reduce: str, chunk: int | None, precision: str
) -> int:
    """`eapcore.kernels.workspace_bytes` of `edge_scores_factored`.

    The two workspaces, g and act of all layers stacked, the tables, which rows are wanted, and the partial sums of the
    largest block.
    """
    if sizes.batch * sizes.tokens * sizes.d_model == 0:
        return 0
    on, channels = common.target(device), sizes.layers * sizes.channels
    pieces = blocks(sizes.batch, sizes.tokens, chunk or fast_chunk(sizes, dtype, device), reduce)
    stacked = 2 * channels * sizes.batch * sizes.tokens * sizes.d_head
    grids = {(p.stop - p.start, t.stop - t.start) for p, t in pieces}
    tables = len({pairs * positions for pairs, positions in grids})
    table = 8 * triton_receiver_grads.COLUMNS.value * (channels + sizes.layers * sizes.heads)
    flags = sizes.all_senders + sizes.all_receivers if masked else 0
    partial = max(
        triton_edge_scores.partial_bytes(
            sizes.all_senders, sizes.all_receivers, pairs, positions, sizes.d_model, dtype, on, masked, reduce,
            precision, True,
        )
        for pairs, positions in grids
    )  # fmt: skip
    return (sum(space_elements(sizes, pieces)) + stacked) * dtype.itemsize + tables * table + flags + partial


def _cut(norm: Norm, pairs: slice, positions: slice) -> Norm:
    if norm.kind == "none":
        return norm
    assert norm.x_hat is not None and norm.rstd is not None
    return Norm(norm.kind, norm.x_hat[pairs, positions], norm.rstd[pairs, positions], norm.gamma)


def edge_scores_factored(
    senders: FactoredSenders,
    receivers: FactoredReceivers,
    mask: Tensor | None,
    reduce: str,
    chunk: int | None,
    precision: str = "auto",
    *,
    config: triton_edge_scores.Config | None = None,
) -> Tensor:
    """`eapcore.kernels.edge_scores_factored` on the GPU; `config` is the contraction's tiling."""
    embed = senders.embed.detach()
    on = common.target(embed.device)
    common.check_precision(precision, embed.dtype, on)
    n_layers, batch, tokens, heads, d_head = senders.dz.shape
    channels, d_model = receivers.w_gamma.shape[1], embed.shape[-1]
    mlps = 0 if senders.mlp is None else 1
    sizes = Sizes(
        batch, tokens, d_model, channels=channels, d_head=d_head, layers=n_layers, heads=heads, mlps=bool(mlps)
    )
    n_senders, n_receivers = sizes.all_senders, sizes.all_receivers
    shape = {"all": (), "pair": (batch,), "position": (tokens,)}[reduce] + (n_senders, n_receivers)
    out = embed.new_zeros(shape, dtype=torch.float32)
    if batch * tokens * d_model == 0:
        return out

    dz = common.unit_inner_stride(senders.dz.detach()).permute(0, 3, 1, 2, 4)  # [L, H, B, T, K]
    g, act = (_stacked(x, dz.new_zeros(0, channels, batch, tokens, d_head)) for x in (receivers.g, receivers.act))
    w_gamma, offset = receivers.w_gamma.detach().contiguous(), receivers.offset.detach().contiguous()
    w_o = [[w.detach().transpose(1, 2)] for w in senders.w_o]  # [H, D, K]
    w_qkv = [_same_inner_strides(groups) for groups in receivers.weight]
    norms = [triton_receiver_grads.ready(norm) for norm in receivers.norms]

    pieces = blocks(batch, tokens, chunk or fast_chunk(sizes, embed.dtype, embed.device), reduce)
    # Rows without an edge are never written: a GPU does not mind what lies there, but the interpreter warns of NaN.
    new = embed.new_zeros if common.interpreted() else embed.new_empty
    sender_space, receiver_space = (new(count) for count in space_elements(sizes, pieces))

    # Which senders and which receivers have an edge; the device alone knows it.
    wanted = (None, None) if mask is None else (mask.any(1).view(torch.uint8), mask.any(0).view(torch.uint8))
    tables: dict[int, tuple[list[Part], list[Part]]] = {}  # by rows of a chunk: the last ones may be shorter
    for pairs, positions in pieces:
        rows = rows_of((pairs, positions))
        grid = (pairs.stop - pairs.start, positions.stop - positions.start)
        made_senders, made_receivers = (
            space[: count * rows * d_model].view(*grid, count, d_model).permute(2, 0, 1, 3)
            for space, count in ((sender_space, n_senders), (receiver_space, n_receivers))
        )
        if n_layers and d_head and rows not in tables:
            tables[rows] = (
                _parts(w_o, [NO_NORM] * n_layers, dz, None, heads + mlps, 1, d_model) if heads else [],
                _parts(w_qkv, norms, g, act, channels + mlps, 0, d_model) if channels else [],
            )
        if d_head == 0:  # heads send and receive zeros, which no product writes
            made_senders.zero_()
            made_receivers.zero_()
        made_senders[0] = embed[pairs, positions]
        made_receivers[-1] = receivers.logits.detach()[pairs, positions]
        if senders.mlp is not None and receivers.mlp is not None:
            made_senders[1 + heads :: heads + 1] = senders.mlp.detach()[:, pairs, positions]
            made_receivers[channels : -1 : channels + 1] = receivers.mlp.detach()[:, pairs, positions]
        for part in tables[rows][0] if rows in tables else []:
            work = Channels(
                g=dz[0, :, pairs, positions], act=None, weight=part.weight, norm=NO_NORM, w_gamma=None, offset=None,
                count=len(part.layers) * heads, table=part.table, align=part.align, wanted=wanted[0],
            )  # fmt: skip
            triton_receiver_grads.project(work, made_senders)
        for part in tables[rows][1] if rows in tables else []:
            work = Channels(
                g=g[0, :, pairs, positions], act=act[0, :, pairs, positions], weight=part.weight,
                norm=_cut(part.norm, pairs, positions), w_gamma=w_gamma, offset=offset,
                count=len(part.layers) * channels, table=part.table, align=part.align, wanted=wanted[1],
            )  # fmt: skip
            triton_receiver_grads.project(work, made_receivers)
        where = {"all": slice(None), "pair": pairs, "position": positions}[reduce]
        triton_edge_scores.contract(
            triton_edge_scores.layout(made_senders, made_receivers, reduce, None),
            mask, out[where], precision=precision, accumulate=True, config=config,
        )  # fmt: skip
    return out
