"""The steps between products on the GPU: each reads its arguments once and writes its results once.

`normalise_rows`: one program instance has one row in registers, takes both statistics from it and writes it normalised;
so has `sum_rows`, which makes the row first. `unit_rows` is element-wise over rows that lie packed. In both of these
the last `count` rows read as many rows before them a second time, which is L2's.

Bytes: twice the rows each (and once more what the differences of the last rows read): nothing else binds them.
Offsets are 64-bit.
"""

# Triton reads the annotations of its kernels' parameters, which leaves no room for types there.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import triton_common as common

BLOCK = 1024
WARPS = 4


@triton.jit
def rounded(x, ROUND: tl.constexpr):
    # The interpreter cuts bits off where a GPU rounds to the nearest.
    if ROUND:
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    return x


@triton.jit
def normalised_row(
    values, row, d, inside, gamma, beta, n, mean, rstd, D, eps,
    CENTRED: tl.constexpr, HAS_GAMMA: tl.constexpr, HAS_BETA: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    if CENTRED:
        centre = tl.sum(values, 0) / D
        tl.store(mean + row, centre)
        values = tl.where(inside, values - centre, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(values * values, 0) / D + eps)
    tl.store(rstd + row, scale)
    values *= scale
    if HAS_GAMMA:
        values *= tl.load(gamma + d, mask=inside, other=0.0).to(tl.float32)
    if HAS_BETA:
        values += tl.load(beta + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(n + row * D + d, rounded(values, ROUND).to(n.dtype.element_ty), mask=inside)


@triton.jit
def normalise_rows(
    x, gamma, beta, n, mean, rstd,
    D, stride_x, eps,
    CENTRED: tl.constexpr, HAS_GAMMA: tl.constexpr, HAS_BETA: tl.constexpr, ROUND: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    values = tl.load(x + row * stride_x + d, mask=inside, other=0.0).to(tl.float32)
    normalised_row(
        values, row, d, inside, gamma, beta, n, mean, rstd, D, eps, CENTRED, HAS_GAMMA, HAS_BETA, ROUND
    )  # fmt: skip


@triton.jit
def standardise_rows(
    x, mean, rstd, out, D, stride_x, CENTRED: tl.constexpr, ROUND: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    values = tl.load(x + row * stride_x + d, mask=inside, other=0.0).to(tl.float32)
    if CENTRED:
        values -= tl.load(mean + row)
    values *= tl.load(rstd + row)
    tl.store(out + row * D + d, rounded(values, ROUND).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T", "Q"])
def normalise_grad_rows(
    grad, x, mean, rstd, gamma, out, total, read, summed, narrow,
    D, T, Q, stride_g, stride_x, stride_o,
    HAS_READ: tl.constexpr, CENTRED: tl.constexpr, FROZEN: tl.constexpr, HAS_GAMMA: tl.constexpr, HAS_OUT: tl.constexpr,
    ADDED: tl.constexpr, ROUND: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    scale = tl.load(rstd + row)
    scaled = tl.load(grad + row * stride_g + d, mask=inside, other=0.0).to(tl.float32)
    if HAS_GAMMA:
        scaled *= tl.load(gamma + d, mask=inside, other=0.0).to(tl.float32)
    whole = scaled
    if CENTRED:
        scaled -= tl.sum(whole, 0) / D
    if not FROZEN:
        x_hat = tl.load(x + row * stride_x + d, mask=inside, other=0.0).to(tl.float32)
        if CENTRED:
            x_hat -= tl.load(mean + row)
        x_hat = tl.where(inside, x_hat * scale, 0.0)
        scaled -= x_hat * (tl.sum(whole * x_hat, 0) / D)
    scaled *= scale
    if HAS_OUT:
        tl.store(out + row * stride_o + d, rounded(scaled, ROUND).to(out.dtype.element_ty), mask=inside)
    if ADDED:
        if HAS_READ:  # the total is there at some of the tokens
            prompt, token = row // T, row % T
            for q in range(Q):
                there = tl.where(tl.load(read + prompt * Q + q) == token, D, 0)  # numbers that are read
                scaled += tl.load(total + (prompt * Q + q) * D + d, mask=d < there, other=0.0)
        else:
            scaled += tl.load(total + row * D + d, mask=inside, other=0.0)
        tl.store(summed + row * D + d, scaled, mask=inside)
        if narrow.dtype.element_ty != tl.float32:
            tl.store(narrow + row * D + d, rounded(scaled, ROUND).to(narrow.dtype.element_ty), mask=inside)


@triton.jit
def activated(hidden, up, at, inside, ACT: tl.constexpr, GATED: tl.constexpr):
    h = tl.load(hidden + at, mask=inside, other=0.0).to(tl.float32)
    if ACT == "relu":
        made = tl.where(h <= 0.0, 0.0, h)  # a GPU's maximum of NaN and 0 is 0
    elif ACT == "silu":
        made = h * tl.sigmoid(h)
    elif ACT == "gelu":
        made = 0.5 * h * (1.0 + tl.erf(h * 0.7071067811865476))
    else:
        # (1 + tanh(u)) / 2 = sigmoid(2u)
        made = h * tl.sigmoid(1.5957691216057308 * (h + 0.044715 * h * h * h))
    if GATED:
        made *= tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    return made


@triton.jit
def unit_rows(
    hidden, up, units,
    total, first_moved, back,
    ACT: tl.constexpr, GATED: tl.constexpr, ROUND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < total
    made = activated(hidden, up, at, inside, ACT, GATED)
    if tl.program_id(0).to(tl.int64) * BLOCK + BLOCK > first_moved:
        moved = inside & (at >= first_moved)
        before = activated(hidden, up, at - back, moved, ACT, GATED)
        made = tl.where(moved, made - before, made)
    tl.store(units + at, rounded(made, ROUND).to(units.dtype.element_ty), mask=inside)


@triton.jit
def gated_grads(
    grad, hidden, up, of_hidden, of_up, total,
    ACT: tl.constexpr, ROUND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < total
    g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    h = tl.load(hidden + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    if ACT == "relu":
        made = tl.where(h <= 0.0, 0.0, h)  # a GPU's maximum of NaN and 0 is 0
        slope = tl.where(h > 0.0, 1.0, 0.0)
    elif ACT == "silu":
        share = tl.sigmoid(h)
        made = h * share
        slope = share + made * (1.0 - share)
    elif ACT == "gelu":
        share = 0.5 * (1.0 + tl.erf(h * 0.7071067811865476))
        made = h * share
        slope = share + h * 0.3989422804014327 * tl.exp(-0.5 * h * h)
    else:
        share = tl.sigmoid(1.5957691216057308 * (h + 0.044715 * h * h * h))
        made = h * share
        slope = share + made * (1.0 - share) * 1.5957691216057308 * (1.0 + 0.134145 * h * h)
    tl.store(of_hidden + at, rounded(g * u * slope, ROUND).to(of_hidden.dtype.element_ty), mask=inside)
    tl.store(of_up + at, rounded(g * made, ROUND).to(of_up.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T", "before", "sign"])
def turn_rows(
    x, frequencies, read, out,
    T, C, K, half, before, sign,
    stride_xb, stride_xc, stride_xt, stride_ob, stride_oc, stride_ot,
    ADJACENT: tl.constexpr, HAS_READ: tl.constexpr, ROUND: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    prompt, token = row // T, row % T
    position = token
    if HAS_READ:
        position = tl.load(read + row)
    f = tl.arange(0, BLOCK_F)
    turned = f < half
    # In float64 down to an eighth of a turn to either side, which float32 holds to its last place. The library's own
    # functions, made for any angle, would take memory beside the registers.
    turns = (position + before).to(tl.float64) * tl.load(frequencies + f, mask=turned, other=0.0) * 0.15915494309189535
    quarter = tl.floor(turns * 4.0 + 0.5)
    r = ((turns - quarter * 0.25) * 6.283185307179586).to(tl.float32)
    r2 = r * r
    sine = r * (1.0 + r2 * (-1.0 / 6 + r2 * (1.0 / 120 + r2 * (-1.0 / 5040 + r2 / 362880))))
    cosine = 1.0 + r2 * (-0.5 + r2 * (1.0 / 24 + r2 * (-1.0 / 720 + r2 * (1.0 / 40320 - r2 / 3628800))))
    place = (quarter - 4.0 * tl.floor(quarter * 0.25)).to(tl.int32)
    cos = tl.where(place % 2 == 0, cosine, sine) * tl.where((place == 1) | (place == 2), -1.0, 1.0)
    sin = tl.where(place % 2 == 0, sine, cosine) * tl.where(place >= 2, -1.0, 1.0)
    cos, sin = cos[None, :], sin[None, :] * sign
    first = 2 * f if ADJACENT else f
    second = first + 1 if ADJACENT else f + half
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        source = x + prompt * stride_xb + token * stride_xt + c.to(tl.int64)[:, None] * stride_xc
        to = out + prompt * stride_ob + token * stride_ot + c.to(tl.int64)[:, None] * stride_oc
        inside = (c < C)[:, None] & turned[None, :]
        a = tl.load(source + first[None, :], mask=inside, other=0.0).to(tl.float32)
        b = tl.load(source + second[None, :], mask=inside, other=0.0).to(tl.float32)
        if BLOCK_K > 0:  # some dimensions stay as they are
            d = tl.arange(0, BLOCK_K)
            others = (c < C)[:, None] & (d >= 2 * half)[None, :] & (d < K)[None, :]
            tl.store(to + d[None, :], tl.load(source + d[None, :], mask=others, other=0.0), mask=others)
        tl.store(to + first[None, :], rounded(a * cos - b * sin, ROUND).to(out.dtype.element_ty), mask=inside)
        tl.store(to + second[None, :], rounded(b * cos + a * sin, ROUND).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["first_moved", "count"])
def sum_rows(
    x, sent, difference, bias, out, kept, gamma, beta, n, mean, rstd,
    D, first_moved, count, stride_k, eps,
    HAS_BIAS: tl.constexpr, HAS_KEPT: tl.constexpr, NORMED: tl.constexpr, CENTRED: tl.constexpr,
    HAS_GAMMA: tl.constexpr, HAS_BETA: tl.constexpr, ROUND: tl.constexpr, ROUND_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    made = tl.load(x + row * D + d, mask=inside, other=0.0).to(tl.float32)
    moved = row >= first_moved
    from_row = tl.where(moved, row - count, row)
    made += tl.load(sent + from_row * D + d, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        made += tl.load(bias + d, mask=inside, other=0.0).to(tl.float32)
    there = d < tl.where(moved, D, 0)
    change = tl.load(difference + (row - first_moved) * D + d, mask=there, other=0.0)
    if HAS_KEPT:
        tl.store(kept + (row - first_moved) * stride_k + d, change, mask=there)
    values = rounded(made + change.to(tl.float32), ROUND).to(out.dtype.element_ty)
    tl.store(out + row * D + d, values, mask=inside)
    if NORMED:
        normalised_row(
            values.to(tl.float32), row, d, inside, gamma, beta, n, mean, rstd, D, eps,
            CENTRED, HAS_GAMMA, HAS_BETA, ROUND_N,
        )  # fmt: skip


def _rounds(x: Tensor) -> bool:
    return common.interpreted() and x.dtype == torch.bfloat16


def normalise(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, centred: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor]:
    """`eapcore.kernels.steps.normalise` on the GPU."""
    common.check_precision("auto", x.dtype, common.target(x.device))
    width, lead = x.shape[-1], x.shape[:-1]
    rows, n = _rows(x), x.new_empty(x.shape, dtype=dtype)
    mean, rstd = (x.new_empty((*lead, 1), dtype=torch.float32) for _ in range(2))
    if rows.numel():
        block = common.next_power_of_2(width)
        common.launch(
            normalise_rows, len(rows),
            rows, None if gamma is None else gamma.contiguous(), None if beta is None else beta.contiguous(),
            n, mean, rstd, width, rows.stride(0), eps,
            CENTRED=centred, HAS_GAMMA=gamma is not None, HAS_BETA=beta is not None, ROUND=_rounds(n), BLOCK_D=block,
            num_warps=_warps(block), device=x.device,
        )  # fmt: skip
    return n, mean if centred else None, rstd


def standardise(x: Tensor, mean: Tensor | None, rstd: Tensor, dtype: torch.dtype) -> Tensor:
    """`eapcore.kernels.steps.standardise` on the GPU."""
    common.check_precision("auto", x.dtype, common.target(x.device))
    width, rows, out = x.shape[-1], _rows(x), x.new_empty(x.shape, dtype=dtype)
    if rows.numel():
        block = common.next_power_of_2(width)
        common.launch(
            standardise_rows, len(rows),
            rows, None if mean is None else mean.contiguous(), rstd.contiguous(), out, width, rows.stride(0),
            CENTRED=mean is not None, ROUND=_rounds(out), BLOCK_D=block, num_warps=_warps(block), device=x.device,
        )  # fmt: skip
    return out


def normalise_grad(
    grad: Tensor,
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    gamma: Tensor | None,
    frozen: bool,
    out: Tensor | None,
    total: Tensor | None = None,
    read: Tensor | None = None,
) -> tuple[Tensor, Tensor] | None:
    """`eapcore.kernels.steps.normalise_grad` on the GPU, into out; with a total `normalise_grad_added`'s result."""
    common.check_precision("auto", grad.dtype, common.target(grad.device))
    width, grads, rows = grad.shape[-1], _rows(grad), _rows(x)
    made = None
    if total is not None:
        total, summed = total.contiguous(), total.new_empty(grad.shape)
        made = summed, summed if grad.dtype == torch.float32 else grad.new_empty(grad.shape)
    if rows.numel():
        block = common.next_power_of_2(width)
        common.launch(
            normalise_grad_rows, len(rows),
            grads, rows, None if mean is None else mean.contiguous(), rstd.contiguous(),
            None if gamma is None else gamma.contiguous(), out, total,
            None if read is None else read.contiguous(), *(made or (None, None)),
            width, *((0, 0) if read is None else (grad.shape[1], read.shape[1])),
            grads.stride(0), rows.stride(0), 0 if out is None else row_stride(out),
            HAS_READ=read is not None, CENTRED=mean is not None, FROZEN=frozen, HAS_GAMMA=gamma is not None,
            HAS_OUT=out is not None, ADDED=total is not None, ROUND=_rounds(grad), BLOCK_D=block,
            num_warps=_warps(block), device=grad.device,
        )  # fmt: skip
    return made


def _rows(x: Tensor) -> Tensor:
    """[N, D] of [..., D], with unit stride along D."""
    return common.unit_inner_stride(x.detach()).reshape(math.prod(x.shape[:-1]), x.shape[-1])


def row_stride(out: Tensor) -> int:
    """How far apart the rows of [.., D] lie, which has unit stride along D."""
    return out.view(-1, out.shape[-1]).stride(0) if out.numel() else 0


def _warps(block: int) -> int:
    return min(16, max(1, block // 512))


def moved_units(hidden: Tensor, up: Tensor | None, act_fn: str, count: int) -> Tensor:
    """`eapcore.kernels.steps.moved_units` on the GPU."""
    common.check_precision("auto", hidden.dtype, common.target(hidden.device))
    hidden, up = hidden.contiguous(), None if up is None else up.contiguous()
    units, back = torch.empty_like(hidden), count * hidden.shape[-1]
    if total := hidden.numel():
        common.launch(
            unit_rows, common.cdiv(total, BLOCK),
            hidden, up, units, total, total - back, back,
            ACT=act_fn, GATED=up is not None, ROUND=_rounds(hidden), BLOCK=BLOCK, num_warps=WARPS, device=hidden.device,
        )  # fmt: skip
    return units


def gated_grad(grad: Tensor, hidden: Tensor, up: Tensor, act_fn: str) -> tuple[Tensor, Tensor]:
    """`eapcore.kernels.steps.gated_grad` on the GPU."""
    common.check_precision("auto", grad.dtype, common.target(grad.device))
    grad, hidden, up = (x.contiguous() for x in (grad, hidden, up))
    made = torch.empty_like(grad), torch.empty_like(grad)
    if total := grad.numel():
        common.launch(
            gated_grads, common.cdiv(total, BLOCK),
            grad, hidden, up, *made, total,
            ACT=act_fn, ROUND=_rounds(grad), BLOCK=BLOCK, num_warps=WARPS, device=grad.device,
        )  # fmt: skip
    return made


def turn(
    x: Tensor, frequencies: Tensor, before: int, read: Tensor | None, sign: int, adjacent: bool, out: Tensor
) -> None:
    """`eapcore.kernels.steps.turn` on the GPU."""
    common.check_precision("auto", x.dtype, common.target(x.device))
    batch, channels, tokens, size = x.shape
    x, half = common.unit_inner_stride(x.detach()), len(frequencies)
    if x.numel():
        pairs = common.next_power_of_2(max(1, half))
        common.launch(
            turn_rows, batch * tokens,
            x, frequencies,
            None if read is None else read.contiguous(), out,
            tokens, channels, size, half, before, sign, *x.stride()[:3], *out.stride()[:3],
            ADJACENT=adjacent, HAS_READ=read is not None, ROUND=_rounds(x),
            BLOCK_C=max(1, min(common.next_power_of_2(channels), 2048 // pairs)), BLOCK_F=pairs,
            BLOCK_K=0 if 2 * half == size else common.next_power_of_2(size), num_warps=WARPS, device=x.device,
        )  # fmt: skip


def moved_sum(
    x: Tensor,
    sent: Tensor,
    difference: Tensor,
    bias: Tensor | None,
    out: Tensor,
    kept: Tensor | None,
    norm: tuple[Tensor | None, Tensor | None, float, bool] | None = None,
    made: tuple[Tensor, Tensor, Tensor] | None = None,
) -> None:
    """`eapcore.kernels.steps.moved_sum` on the GPU, into out and kept; with a norm (γ, β, eps, centred) of the result
    also (n, μ, 1/σ) into made."""
    common.check_precision("auto", x.dtype, common.target(x.device))
    x, sent, difference = (t.contiguous() for t in (x, sent, difference))
    width, rows, count = x.shape[-1], math.prod(x.shape[:-1]), math.prod(difference.shape[:-1])
    gamma, beta, eps, centred = norm or (None, None, 0.0, False)
    if x.numel():
        block = common.next_power_of_2(width)
        common.launch(
            sum_rows, rows,
            x, sent, difference, bias, out, kept, None if gamma is None else gamma.contiguous(),
            None if beta is None else beta.contiguous(), *(made or (None, None, None)),
            width, rows - count, count, 0 if kept is None else row_stride(kept), eps,
            HAS_BIAS=bias is not None, HAS_KEPT=kept is not None, NORMED=norm is not None, CENTRED=centred,
            HAS_GAMMA=gamma is not None, HAS_BETA=beta is not None, ROUND=_rounds(out), ROUND_N=_rounds(sent),
            BLOCK_D=block, num_warps=_warps(block), device=x.device,
        )  # fmt: skip
