"""receiver_grads on the GPU: from ∂metric/∂(q, k, v) to the residual stream, one product and a rank-one correction.

    out[c, n, d] = rstd[n] · ( γ[d] · Σ_k g[c, n, k] · weight[c, d, k]  −  c1[c, n]  −  c2[c, n] · x̂[n, d] )
    c1[c, n] = ⟨g[c, n], w_gamma[c]⟩ / D            c2[c, n] = ⟨g[c, n], act[c, n] − offset[c]⟩ / D

Bytes: C·N·D·element written, which is nearly all; g and act are D / 2K times smaller, x̂ C times; weight is C·D·K. N is
B·T. Operations: 2·C·N·D·K. With K = 64 that is 64 operations a byte in bfloat16: the writes bound it.

Why these tilings. Two kernels make the product; which one follows from shapes, strides, dtype, kind and device alone.

`tile_grads` (half precision, K up to 128, tensor descriptors): a program owns BLOCK_N tokens × BLOCK_D of d, reads x̂,
γ and rstd of its tile once, and walks along the channels with them in registers. A step of its loop is one product of
two tiles that TMA brings stages ahead, four operations an element, and a store that TMA finishes during the next step.
From L2 it reads (BLOCK_N + BLOCK_D) · K elements for BLOCK_N · BLOCK_D written: with 64 × 128 and K = 64, 1.5 bytes for
each. The channels are cut into groups where there are fewer tiles than the device holds programs. Consecutive programs
share their weight, which so comes from memory once.

x̂ of a tile may be made of the stream itself and its statistics. c1 and c2 are given, where what made g has made them
too; else `channel_sums` makes them first: that reads g and act once, 2K/D of the bytes that are written (a sixth at
K = 64, D = 768). Made in the loop they would cost BLOCK_N · K elements more of each tile, one more byte for each
written; a third more instructions; and a load that feeds no product, which the pipeline leaves out.

`channel_grads` (everything else): a program computes BLOCK_N tokens of one channel over a run of d. It reads its rows
of g and act once, takes both dot products of length K from them while they are in registers, and then walks along d
with g kept; where K is too long for that, it reads g again, from L2, for every step of d. weight and x̂ are read by all
token tiles and by all channels: they come from L2.

Neither reduction of the normalisation runs over D, so nothing is computed twice and the result is written once.
"""

# Triton reads the annotations of its kernels' parameters, which leaves no room for types there.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import triton_common as common
from .checks import Norm, Sizes, token_stride, tokens_in_step
from .triton_steps import rounded


@dataclass(frozen=True, slots=True)
class Config:
    """One tiling of `channel_grads`; block_k bounds the part of K that one product takes.

    unroll: so many parts of K are written out one after the other, with buffers and registers of their own; a K of more
    parts is walked in a loop, which needs those of one part, whatever K is.
    """

    block_n: int
    block_d: int
    block_k: int
    num_warps: int
    num_stages: int
    unroll: int = 1


# 64 columns are 128 bytes of bfloat16, a full line of every row; more would only add to the registers.
TENSOR = (Config(128, 64, 128, 8, 3), Config(64, 64, 128, 4, 3))
TENSOR_HIP = (Config(64, 64, 64, 4, 2, unroll=2),)
# Half precision beyond K = 128.
WIDE = Config(64, 64, 64, 4, 2)
WIDE_HIP = Config(64, 32, 64, 4, 2)
# float32 up to K = 64.
EXACT = Config(64, 64, 32, 4, 2, unroll=2)
# Beyond it a loop takes registers, without alignment every element's address: twice the threads, half the columns.
NARROW = Config(64, 32, 32, 8, 2)
# Both halves of float32 in registers, as Ampere's tf32x3 has them.
HALVES = Config(64, 32, 16, 8, 2)


@dataclass(frozen=True, slots=True)
class Walk:
    """One tiling of `tile_grads`, which takes K at once."""

    block_n: int
    block_d: int
    num_warps: int
    num_stages: int

    def per_sm(self, block_k: int) -> int:
        """Programs that are resident on one processor, whose registers have room for 16K elements of tiles and whose
        shared memory, 227 KB, for the stages of g and weight and a tile to store."""
        tile = self.block_n * self.block_d
        shared = 2 * (self.num_stages * (self.block_n + self.block_d) * block_k + tile) + 2**10
        return max(1, min(2**14 // tile, 227 * 2**10 // shared))


# 32 elements a thread, of product and x̂ each, leave two programs of 8 warps a processor, and four stages what is read
# under way: of those of bench/ops/tilings.py the fastest on one H200 at GPT-2 small's, XL's and a 13B's shapes.
WALK = Walk(64, 128, 8, 4)
WIDEST = 128  # K
# What a program does before its first channel, in channels.
OVERHEAD = 2
# Elements of g of one program of `channel_sums`: where K is no multiple of 16, each has an address in registers.
SUMMED = 4096


@triton.jit(do_not_specialize=["N", "T", "steps", "stride_rb", "stride_s"])
def channel_grads(
    g, act, weight, x_hat, rstd, gamma, w_gamma, offset, sums, out,
    N, T, D, K, steps, share,
    stride_gc, stride_gb, stride_gt, stride_ac, stride_ab, stride_at, stride_wc, stride_wd, stride_wk,
    stride_xb, stride_xt, stride_rb, stride_rt, stride_s, stride_oc, stride_on,
    PRECISION: tl.constexpr,
    KIND: tl.constexpr, HAS_GAMMA: tl.constexpr, HAS_SUMS: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, K_CHUNKS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(N, BLOCK_N)
    parts_d = tl.cdiv(D, BLOCK_D * steps)
    program = tl.program_id(0)
    n = (program % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    first_d = (program // tiles_n) % parts_d * (BLOCK_D * steps)
    channel = (program // tiles_n // parts_d).to(tl.int64)
    g += channel * stride_gc
    weight += (channel // share) * stride_wc
    out += channel * stride_oc

    # Tokens past the end repeat the last one; they are never stored, and every load stays inside.
    n_in = tl.minimum(n, N - 1)
    batch = (n_in // T).to(tl.int64)
    token = (n_in % T).to(tl.int64)
    g_rows = g + (batch * stride_gb + token * stride_gt)[:, None]
    k = tl.arange(0, BLOCK_K)

    c1 = tl.zeros((BLOCK_N,), dtype=tl.float32)
    c2 = tl.zeros((BLOCK_N,), dtype=tl.float32)
    scale = tl.full((BLOCK_N,), 1.0, dtype=tl.float32)
    if KIND != "none" and HAS_SUMS:
        at_row = sums + channel * 2 * stride_s + n_in
        if KIND == "layernorm":
            c1 = tl.load(at_row)
        c2 = tl.load(at_row + stride_s)
    elif KIND != "none":
        offset += channel * K
        if KIND == "layernorm":
            w_gamma += channel * K
        act_rows = act + (channel // share) * stride_ac + (batch * stride_ab + token * stride_at)[:, None]
        for first_chunk in range(0, K_CHUNKS, UNROLL):
            for chunk in tl.static_range(UNROLL):
                kk = (first_chunk + chunk) * BLOCK_K + k
                inside = (kk < K)[None, :]
                part = tl.load(g_rows + kk[None, :], mask=inside, other=0.0).to(tl.float32)
                a = tl.load(act_rows + kk[None, :], mask=inside, other=0.0).to(tl.float32)
                b = tl.load(offset + kk, mask=kk < K, other=0.0).to(tl.float32)
                c2 += tl.sum(part * (a - b[None, :]), 1)
                if KIND == "layernorm":
                    w = tl.load(w_gamma + kk, mask=kk < K, other=0.0).to(tl.float32)
                    c1 += tl.sum(part * w[None, :], 1)
        c1 = c1 / D
        c2 = c2 / D
    if KIND != "none":
        scale = tl.load(rstd + batch * stride_rb + token * stride_rt).to(tl.float32)

    if K_CHUNKS == 1:
        g_tile = tl.load(g_rows + k[None, :], mask=(k < K)[None, :], other=0.0)
        if UPCAST:
            g_tile = g_tile.to(tl.float32)
    for step in range(steps):
        d = first_d + step * BLOCK_D + tl.arange(0, BLOCK_D)
        in_d = d < D
        w_rows = weight + d.to(tl.int64)[:, None] * stride_wd
        grad = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
        for first_chunk in range(0, K_CHUNKS, UNROLL):
            for chunk in tl.static_range(UNROLL):
                kk = (first_chunk + chunk) * BLOCK_K + k
                if K_CHUNKS > 1:
                    g_tile = tl.load(g_rows + kk[None, :], mask=(kk < K)[None, :], other=0.0)
                w_at = w_rows + kk.to(tl.int64)[None, :] * stride_wk
                w_tile = tl.load(w_at, mask=in_d[:, None] & (kk < K)[None, :], other=0.0)
                if UPCAST:
                    g_tile = g_tile.to(tl.float32)
                    w_tile = w_tile.to(tl.float32)
                grad = tl.dot(g_tile, w_tile.T, grad, input_precision=PRECISION)
        if KIND != "none":
            if HAS_GAMMA:
                grad *= tl.load(gamma + d, mask=in_d, other=0.0).to(tl.float32)[None, :]
            x_at = x_hat + (batch * stride_xb + token * stride_xt)[:, None] + d[None, :]
            x = tl.load(x_at, mask=in_d[None, :], other=0.0).to(tl.float32)
            grad = (grad - c1[:, None] - c2[:, None] * x) * scale[:, None]
        at = out + n.to(tl.int64)[:, None] * stride_on + d[None, :]
        kept = rounded(grad, UPCAST and out.dtype.element_ty == tl.bfloat16).to(out.dtype.element_ty)
        tl.store(at, kept, mask=(n < N)[:, None] & in_d[None, :])


@triton.jit(do_not_specialize=["C", "N", "T", "group", "stride_rb", "stride_s"])
def tile_grads(
    g, weight, x_hat, mean, rstd, gamma, sums, out,
    C, N, T, D, group, share, stride_xb, stride_xt, stride_rb, stride_rt, stride_s,
    KIND: tl.constexpr, RAW: tl.constexpr, HAS_GAMMA: tl.constexpr, TURNED: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles_d = tl.cdiv(D, BLOCK_D)
    program = tl.program_id(0)
    row = (program % tiles_n) * BLOCK_N
    column = (program // tiles_n) % tiles_d * BLOCK_D
    first = program // tiles_n // tiles_d * group
    last = tl.minimum(first + group, C)
    if KIND != "none":
        # Tokens past the end repeat the last one; they are never stored, and every load stays inside.
        n = tl.minimum(row + tl.arange(0, BLOCK_N), N - 1)
        d = column + tl.arange(0, BLOCK_D)
        batch = (n // T).to(tl.int64)
        token = (n % T).to(tl.int64)
        x_at = x_hat + (batch * stride_xb + token * stride_xt)[:, None] + d[None, :]
        x = tl.load(x_at, mask=(d < D)[None, :], other=0.0).to(tl.float32)
        at_row = batch * stride_rb + token * stride_rt
        scale = tl.load(rstd + at_row).to(tl.float32)
        if RAW:  # x_hat is the stream itself
            if KIND == "layernorm":
                x -= tl.load(mean + at_row).to(tl.float32)[:, None]
            x *= scale[:, None]
        if HAS_GAMMA:
            factor = tl.load(gamma + d, mask=d < D, other=0.0).to(tl.float32)
        at = sums + first.to(tl.int64) * 2 * stride_s + n
        if KIND == "layernorm":
            c1 = tl.load(at)
        c2 = tl.load(at + stride_s)
    for c in range(first, last):
        g_tile = g.load([c, row, 0]).reshape(BLOCK_N, BLOCK_K)
        if TURNED:
            w_tile = weight.load([c // share, 0, column]).reshape(BLOCK_K, BLOCK_D)
        else:
            w_tile = weight.load([c // share, column, 0]).reshape(BLOCK_D, BLOCK_K).T
        if UPCAST:
            g_tile = g_tile.to(tl.float32)
            w_tile = w_tile.to(tl.float32)
        grad = tl.dot(g_tile, w_tile)
        if KIND != "none":
            if HAS_GAMMA:
                grad *= factor[None, :]
            if KIND == "layernorm":
                grad -= c1[:, None]
            grad = tl.fma(-c2[:, None], x, grad) * scale[:, None]
            # The next channel's are on their way while this one is stored.
            at = sums + tl.minimum(c + 1, last - 1).to(tl.int64) * 2 * stride_s + n
            if KIND == "layernorm":
                c1 = tl.load(at)
            c2 = tl.load(at + stride_s)
        kept = rounded(grad, UPCAST and out.dtype == tl.bfloat16).to(out.dtype)
        out.store([c, row, column], kept.reshape(1, BLOCK_N, BLOCK_D))


@triton.jit(do_not_specialize=["N", "T", "alone"])
def channel_sums(
    g, act, w_gamma, offset, sums,
    N, T, D, K, alone, share, stride_gc, stride_gb, stride_gt, stride_ac, stride_ab, stride_at,
    KIND: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(N, BLOCK_N)
    channel = (tl.program_id(0) // tiles_n).to(tl.int64)
    n = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    n_in = tl.minimum(n, N - 1)
    batch = (n_in // T).to(tl.int64)
    token = (n_in % T).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    inside = k < K
    g_at = g + channel * stride_gc + (batch * stride_gb + token * stride_gt)[:, None] + k[None, :]
    of_act = tl.where(channel < alone, channel, alone + (channel - alone) // share)
    a_at = act + of_act * stride_ac + (batch * stride_ab + token * stride_at)[:, None] + k[None, :]
    part = tl.load(g_at, mask=inside[None, :], other=0.0).to(tl.float32)
    a = tl.load(a_at, mask=inside[None, :], other=0.0).to(tl.float32)
    b = tl.load(offset + channel * K + k, mask=inside, other=0.0).to(tl.float32)
    at = sums + channel * 2 * N + n
    if KIND == "layernorm":
        w = tl.load(w_gamma + channel * K + k, mask=inside, other=0.0).to(tl.float32)
        tl.store(at, tl.sum(part * w[None, :], 1) / D, mask=n < N)
    tl.store(at + N, tl.sum(part * (a - b[None, :]), 1) / D, mask=n < N)


@dataclass(frozen=True, slots=True)
class Channels:
    """A set of channels and what they read.

    g, act: [C, B, T, K]; act None where sums are given. weight: [C, D, K]; act and weight may have fewer channels, each
    for as many that follow one another. norm: its tensors of the same B, T as g. w_gamma, offset: contiguous, K for
    each channel. sums: c1 and c2, [C, 2, B, T] as `checks.sums_fit` has it, None where they are to be made.
    """

    g: Tensor
    act: Tensor | None
    weight: Tensor
    norm: Norm
    w_gamma: Tensor | None
    offset: Tensor | None
    sums: Tensor | None = None

    @property
    def count(self) -> int:
        return len(self.g)


def choose_config(tokens: int, d_head: int, dtype: torch.dtype, on: common.Target, aligned: bool = True) -> Config:
    """The tiling for a number of tokens: the token tile that pads them least, the largest of equals."""
    if not aligned:
        return NARROW
    if dtype == torch.float32:
        if common.check_precision("auto", dtype, on) == "tf32x3" and not on.descriptors:
            return HALVES
        return EXACT if d_head <= 64 else NARROW
    if d_head > 128:
        return WIDE_HIP if on.backend == "hip" else WIDE
    candidates = TENSOR_HIP if on.backend == "hip" else TENSOR
    return min(candidates, key=lambda c: (common.cdiv(tokens, c.block_n) * c.block_n, -c.block_n))


def aligned(work: Channels, out: Tensor) -> bool:
    """Whether every row that a tile reads or writes is known to start at 16 bytes and to be a multiple of 16 long.

    That is what Triton takes from the arguments: addresses divisible by 16, strides and sizes by 16 elements.
    """
    used = [work.g, work.weight, out]
    if work.norm.kind != "none":
        assert work.norm.x_hat is not None
        used += [work.norm.x_hat] if work.act is None else [work.act, work.norm.x_hat]
    sizes = [work.g.shape[-1], work.weight.shape[1], *(n for x in used for n in x.stride() if n != 1)]
    return not any(n % 16 for n in (*sizes, *(x.data_ptr() for x in used)))


def project(work: Channels, out: Tensor, config: Config | None = None) -> None:
    """Write every channel's gradients to `out` [C, B, T, D], whose tokens b·T + t lie equally far apart."""
    g, weight, norm, sums = work.g, work.weight, work.norm, work.sums
    on = common.target(g.device)
    precision = common.check_precision("auto", g.dtype, on)
    _, batch, tokens, d_head = g.shape
    d_model = weight.shape[1]
    rows = batch * tokens
    tile = config or choose_config(rows, d_head, g.dtype, on, aligned(work, out))
    block_k = min(tile.block_k, max(16, common.next_power_of_2(d_head)))
    chunks = common.cdiv(d_head, block_k)
    units = common.cdiv(rows, tile.block_n) * work.count
    # A program walks along all of d unless that leaves processors idle.
    parts = min(common.cdiv(d_model, tile.block_d), max(1, 4 * on.processors // units))
    steps = common.cdiv(common.cdiv(d_model, tile.block_d), parts)
    act = None if norm.kind == "none" or sums is not None else work.act
    stride_ac, stride_ab, stride_at, _ = (0, 0, 0, 0) if act is None else act.stride()
    stride_xb, stride_xt, _ = (0, 0, 0) if norm.x_hat is None else norm.x_hat.stride()
    stride_rb, stride_rt = (0, 0) if norm.rstd is None else norm.rstd.stride()
    common.launch(
        channel_grads, units * common.cdiv(d_model, tile.block_d * steps),
        g, act, weight, norm.x_hat, norm.rstd, norm.gamma, work.w_gamma, work.offset, sums, out,
        rows, tokens, d_model, d_head, steps, work.count // len(weight),
        *g.stride()[:3], stride_ac, stride_ab, stride_at, *weight.stride(),
        stride_xb, stride_xt, stride_rb, stride_rt, 0 if sums is None else sums.stride(1), out.stride(0),
        token_stride(out),
        PRECISION=precision, KIND=norm.kind, HAS_GAMMA=norm.gamma is not None, HAS_SUMS=sums is not None,
        # The interpreter multiplies the bit patterns of bfloat16.
        UPCAST=common.interpreted() and g.dtype != torch.float32,
        BLOCK_N=tile.block_n, BLOCK_D=tile.block_d, BLOCK_K=block_k, K_CHUNKS=chunks,
        UNROLL=chunks if 0 < chunks <= tile.unroll else 1,
        num_warps=tile.num_warps, num_stages=tile.num_stages, device=g.device,
    )  # fmt: skip


def as_tokens(x: Tensor) -> Tensor:
    """[C, B·T, K] of an [C, B, T, K] whose tokens lie equally far apart."""
    channels, batch, tokens, width = x.shape
    return x.as_strided((channels, batch * tokens, width), (x.stride(0), token_stride(x), x.stride(3)))


def walkable(g: Tensor, weight: Tensor, out: Tensor | None, on: common.Target) -> bool:
    """Whether `tile_grads` can make these: half precision, K up to 128, and tiles that TMA can address; out: None for
    a packed one."""
    if not on.descriptors or g.dtype == torch.float32 or not 0 < g.shape[3] <= WIDEST or not g.numel():
        return False
    if 1 not in weight.stride()[1:] or not tokens_in_step(g) or not (out is None or tokens_in_step(out)):
        return False
    turned = weight.transpose(1, 2) if weight.stride(2) != 1 else weight
    written = weight.shape[1] * g.itemsize % 16 == 0 if out is None else common.describable(as_tokens(out))
    return written and all(common.describable(x) for x in (as_tokens(g), turned))


def walks(g: Tensor, weight: Tensor, norm: Norm, sums: Tensor | None, out: Tensor | None, on: common.Target) -> bool:
    """Whether `tile_grads` is what makes these.

    RMSNorm's q, k and v come apart: where their c2 are not given, they would be three launches more a layer.
    """
    return (sums is not None or norm.kind != "rmsnorm") and walkable(g, weight, out, on)


def channels_together(channels: int, tiles: int, slots: int) -> int:
    """How many channels a program walks along, so that its processors, which hold `slots` programs, end together."""

    def rounds(groups: int) -> int:
        return common.cdiv(tiles * groups, slots) * (common.cdiv(channels, groups) + OVERHEAD)

    return common.cdiv(channels, min(range(1, channels + 1), key=rounds))


def workspace_bytes(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> int:
    """`eapcore.kernels.workspace_bytes` of `receiver_grads`: c1 and c2 of all channels and tokens."""
    walks = common.target(device).descriptors and dtype != torch.float32 and sizes.normed and sizes.centred
    walks = walks and not sizes.summed
    whole = sizes.d_head % 8 == 0 and sizes.d_model % 8 == 0 and 0 < sizes.d_head <= WIDEST
    return 8 * sizes.channels * sizes.batch * sizes.tokens if walks and whole and sizes.d_model else 0


def fill_sums(
    g: Tensor, act: Tensor, w_gamma: Tensor | None, offset: Tensor | None, sums: Tensor, d_model: int, alone: int,
    share: int,
) -> None:  # fmt: skip
    """c1 (with a w_gamma) and c2 of [C, B, T, K] into sums [C, 2, B, T]; the first `alone` channels have an activation
    each, `share` each of the others one together."""
    channels, batch, tokens, d_head = g.shape
    g, act = common.unit_inner_stride(g.detach()), common.unit_inner_stride(act.detach())
    block_k = max(16, common.next_power_of_2(d_head))
    block_n = min(64, SUMMED // block_k)
    common.launch(
        channel_sums, channels * common.cdiv(batch * tokens, block_n),
        g, act, w_gamma, offset, sums,
        batch * tokens, tokens, d_model, d_head, alone, share, *g.stride()[:3], *act.stride()[:3],
        KIND="rmsnorm" if w_gamma is None else "layernorm", BLOCK_N=block_n, BLOCK_K=block_k, num_warps=4,
        device=g.device,
    )  # fmt: skip


def walk(work: Channels, out: Tensor, tile: Walk) -> None:
    """`project` by `tile_grads`, for what is `walkable`."""
    g, weight, norm, act, sums = work.g, work.weight, work.norm, work.act, work.sums
    on = common.target(g.device)
    if not walkable(g, weight, out, on):
        raise ValueError(f"{tile} was asked for, but no tiles of it can be described here")
    _, batch, tokens, d_head = g.shape
    d_model, rows, share = weight.shape[1], batch * tokens, work.count // len(weight)
    block_k = max(16, common.next_power_of_2(d_head))
    upcast = common.interpreted()  # which multiplies the bit patterns of bfloat16
    if norm.kind != "none" and sums is None:
        assert act is not None
        sums = out.new_empty(work.count, 2, batch, tokens, dtype=torch.float32)
        fill_sums(g, act, work.w_gamma if norm.kind == "layernorm" else None, work.offset, sums, d_model, 0, share)
    turned, stream = weight.stride(2) != 1, norm.x_hat if norm.x is None else norm.x
    tiles = common.cdiv(rows, tile.block_n) * common.cdiv(d_model, tile.block_d)
    group = channels_together(work.count, tiles, on.processors * tile.per_sm(block_k))
    common.launch(
        tile_grads, tiles * common.cdiv(work.count, group),
        common.descriptor(as_tokens(g), [1, tile.block_n, block_k]),
        common.descriptor(weight.transpose(1, 2), [1, block_k, tile.block_d])
        if turned else common.descriptor(weight, [1, tile.block_d, block_k]),
        stream, norm.mean, norm.rstd, norm.gamma, sums,
        common.descriptor(as_tokens(out), [1, tile.block_n, tile.block_d]),
        work.count, rows, tokens, d_model, group, share,
        *((0, 0) if stream is None else stream.stride()[:2]),
        *((0, 0) if norm.rstd is None else norm.rstd.stride()), 0 if sums is None else sums.stride(1),
        KIND=norm.kind, RAW=norm.x is not None, HAS_GAMMA=norm.gamma is not None, TURNED=turned, UPCAST=upcast,
        BLOCK_N=tile.block_n, BLOCK_D=tile.block_d, BLOCK_K=block_k,
        num_warps=tile.num_warps, num_stages=tile.num_stages, device=g.device,
    )  # fmt: skip


def ready(norm: Norm) -> Norm:
    """The norm as the kernel reads it: unit stride along d, no gradients; without tensors for kind "none"."""
    if norm.kind == "none":
        return Norm("none")
    assert norm.rstd is not None
    gamma = None if norm.gamma is None else norm.gamma.detach().contiguous()
    x_hat, x = (None if x is None else common.unit_inner_stride(x.detach()) for x in (norm.x_hat, norm.x))
    rstd, mean = norm.rstd.detach(), None if norm.mean is None else norm.mean.detach()
    if mean is not None and mean.stride() != rstd.stride():
        rstd, mean = rstd.contiguous(), mean.contiguous()
    return Norm(norm.kind, x_hat, rstd, gamma, x, mean)


def receiver_grads(
    g: Tensor,
    act: Tensor | None,
    weight: Tensor,
    norm: Norm,
    w_gamma: Tensor | None,
    offset: Tensor | None,
    out: Tensor | None = None,
    sums: Tensor | None = None,
    *,
    config: Config | Walk | None = None,
) -> Tensor:
    """`eapcore.kernels.receiver_grads` on the GPU; `config` takes one kernel and tiling instead of those chosen."""
    on = common.target(g.device)
    common.check_precision("auto", g.dtype, on)
    channels, batch, tokens, d_head = g.shape
    if out is None:
        out = g.new_empty(channels, batch, tokens, weight.shape[1])
    if out.numel() == 0:
        return out
    if d_head == 0:
        return out.zero_()
    work = Channels(
        g=common.unit_inner_stride(g.detach()),
        act=None if act is None else common.unit_inner_stride(act.detach()),
        weight=weight.detach(),
        norm=ready(norm),
        w_gamma=None if w_gamma is None else w_gamma.detach().contiguous(),
        offset=None if offset is None else offset.detach().contiguous(),
        sums=sums,
    )
    if config is None and walks(work.g, work.weight, norm, sums, out, on):
        config = WALK
    if isinstance(config, Walk):
        walk(work, out, config)
    else:
        project(work, out, config)
    return out
