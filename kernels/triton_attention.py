"""Causal attention on the GPU without a pattern in memory, float32 between what is read and what is written.

    attend_rows        z of a block of queries: keys go by in blocks, with a running maximum and sum (Milakov 2018);
                       where pairs of prompts are wanted, then that of the other prompt, of which the difference
                       remains; where keys are one block, both prompts' are read before anything is made of them
    query_grads        the same again for the row's largest score, its sum and rowsum(dP∘P) = ⟨dz, z⟩, then dq; writes
                       them for the next. Where all queries and keys are one block each, it makes dk and dv from the
                       same pattern
    key_grads          dk and dv of a block of keys: the queries that see them go by

The pattern is exp(s − largest)/sum everywhere: exp(s − log Σ exp s) would be off by the rounding of s, with scores of
1,000 by 3e-5, and where a query sees one key alone its gradient, P∘(dP − rowsum(dP∘P)), would not be 0.

One program instance has one block of one query head of one prompt. Queries at given positions and those of all tokens
differ in where their position comes from alone; a block walks through the keys between the first and the last that any
of its queries sees. Sums have a fixed order: nothing is added atomically.

Bytes: q, k, v read once by each block that needs them (from L2 after the first), z written in float32. Patterns of half
precision are rounded to it before products in the backward pass, as torch's operations round them; in the forward pass
they are not, so that the mixtures of two nearly equal prompts can be subtracted.
"""

# Triton reads the annotations of its kernels' parameters, which leaves no room for types there.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import triton_common as common
from .causal import Causal, ReceiverSums, grads_in, one_block
from .triton_steps import rounded

# Sizes that change from batch to batch and no address's alignment follows from: a kernel for each would be compiled.
SIZES = ["H", "group", "Q", "N", "before", "apart", "D", "tokens_in_all"]


@triton.jit
def pattern_scores(
    q, k, positions, keys, N, scale, window, softcap,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    s = tl.dot(q, k.T, input_precision=PRECISION) * scale
    slope = tl.full(s.shape, 1.0, dtype=tl.float32)
    if SOFTCAP:
        tanh = 2.0 * tl.sigmoid(2.0 * s / softcap) - 1.0
        s = softcap * tanh
        slope = 1.0 - tanh * tanh
    seen = (keys[None, :] <= positions[:, None]) & (keys < N)[None, :]
    if WINDOW:
        seen = seen & (keys[None, :] > positions[:, None] - window)
    return tl.where(seen, s, float("-inf")), slope


@triton.jit
def key_range(positions, window, N, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr):
    first = 0
    if WINDOW:
        first = tl.maximum(tl.min(positions, 0) - window + 1, 0) // BLOCK_N * BLOCK_N
    return first, tl.minimum(tl.max(positions, 0) + 1, N)


@triton.jit
def load_rows(source, rows, stride, d, K, UPCAST: tl.constexpr):
    tile = tl.load(source + rows.to(tl.int64)[:, None] * stride + d[None, :], mask=(d < K)[None, :], other=0.0)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def query_positions(read, prompt, rows, Q, before, HAS_READ: tl.constexpr):
    positions = rows
    if HAS_READ:
        positions = tl.load(read + prompt.to(tl.int64) * Q + rows).to(tl.int32)
    return positions + before


@triton.jit
def times_values(p, values, mixed, PRECISION: tl.constexpr):
    # Three numbers of half precision hold what p has of float32, and their products with values of it are exact.
    if values.dtype == tl.float32:
        return tl.dot(p, values, mixed, input_precision=PRECISION)
    else:
        first = p.to(values.dtype)
        rest = p - first.to(tl.float32)
        second = rest.to(values.dtype)
        third = (rest - second.to(tl.float32)).to(values.dtype)
        mixed = tl.dot(third, values, mixed)
        mixed = tl.dot(second, values, mixed)
        return tl.dot(first, values, mixed)


@triton.jit
def mixtures(
    q, k, v, positions, rows, head, group, N, K, scale, window, softcap, stride_qt, stride_kt, stride_vt,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, BLOCK_K)
    queries = load_rows(q, rows, stride_qt, d, K, UPCAST)
    largest = tl.full((BLOCK_Q,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_Q,), dtype=tl.float32)
    mixed = tl.zeros((BLOCK_Q, BLOCK_K), dtype=tl.float32)
    first, last = key_range(positions, window, N, WINDOW, BLOCK_N)
    for start in range(first, last, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        inside = tl.minimum(n, N - 1)
        keys = load_rows(k, inside, stride_kt, d, K, UPCAST)
        s, _ = pattern_scores(queries, keys, positions, n, N, scale, window, softcap, WINDOW, SOFTCAP, PRECISION)
        top = tl.maximum(largest, tl.max(s, 1))
        base = tl.where(top == float("-inf"), 0.0, top)  # a block of which a query sees nothing
        p = tl.exp(s - base[:, None])
        shrink = tl.exp(largest - base)
        total = total * shrink + tl.sum(p, 1)
        values = load_rows(v, inside, stride_vt, d, K, UPCAST)
        mixed = times_values(p, values, mixed * shrink[:, None], PRECISION)
        largest = top
    return mixed / total[:, None]


@triton.jit
def block_mixtures(
    queries, keys, values, positions, N, scale, window, softcap,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Of one block of keys: nothing runs along.
    n = tl.arange(0, BLOCK_N)
    s, _ = pattern_scores(queries, keys, positions, n, N, scale, window, softcap, WINDOW, SOFTCAP, PRECISION)
    p = tl.exp(s - tl.max(s, 1)[:, None])
    mixed = times_values(p, values, tl.zeros((BLOCK_Q, BLOCK_K), dtype=tl.float32), PRECISION)
    return mixed / tl.sum(p, 1)[:, None]


@triton.jit
def store_sums(
    grad, act, receiver_sums, w_gamma, offset, channel, at, inside, d, K, D, tokens_in_all,
    CENTRED: tl.constexpr,
):  # fmt: skip
    # c1 and c2 of the rows of a channel's gradient, see `causal.ReceiverSums`.
    g = grad.to(tl.float32)
    to = receiver_sums + channel.to(tl.int64) * 2 * tokens_in_all + at
    if CENTRED:
        w = tl.load(w_gamma + channel * K + d, mask=d < K, other=0.0).to(tl.float32)
        tl.store(to, tl.sum(g * w[None, :], 1) / D, mask=inside)
    b = tl.load(offset + channel * K + d, mask=d < K, other=0.0).to(tl.float32)
    tl.store(to + tokens_in_all, tl.sum(g * (act.to(tl.float32) - b[None, :]), 1) / D, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def attend_rows(
    q, k, v, z, read,
    H, group, Q, N, K, before, scale, window, softcap, apart,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    PAIRED: tl.constexpr,
    HAS_READ: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, UPCAST: tl.constexpr, ROUND: tl.constexpr,
    PRECISION: tl.constexpr, ONE_BLOCK: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(Q, BLOCK_Q)
    row = (tl.program_id(0) % blocks) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    head = (tl.program_id(0) // blocks) % H
    prompt = (tl.program_id(0) // blocks // H).to(tl.int64)
    rows = tl.minimum(row, Q - 1)  # rows past the end repeat the last one
    d = tl.arange(0, BLOCK_K)
    positions = query_positions(read, prompt, rows, Q, before, HAS_READ)
    queries_at = q + prompt * stride_qb + head * stride_qh
    keys_at = k + prompt * stride_kb + (head // group) * stride_kh
    values_at = v + prompt * stride_vb + (head // group) * stride_vh
    further = apart.to(tl.int64)
    if ONE_BLOCK:  # all that is read, of both prompts, is asked for at once
        inside = tl.minimum(tl.arange(0, BLOCK_N), N - 1)
        queries = load_rows(queries_at, rows, stride_qt, d, K, UPCAST)
        keys = load_rows(keys_at, inside, stride_kt, d, K, UPCAST)
        values = load_rows(values_at, inside, stride_vt, d, K, UPCAST)
        if PAIRED:
            other_queries = load_rows(queries_at + further * stride_qb, rows, stride_qt, d, K, UPCAST)
            other_keys = load_rows(keys_at + further * stride_kb, inside, stride_kt, d, K, UPCAST)
            other_values = load_rows(values_at + further * stride_vb, inside, stride_vt, d, K, UPCAST)
        made = block_mixtures(
            queries, keys, values, positions, N, scale, window, softcap, WINDOW, SOFTCAP, PRECISION,
            BLOCK_Q, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    else:
        made = mixtures(
            queries_at, keys_at, values_at, positions, rows, head, group, N, K, scale, window, softcap,
            stride_qt, stride_kt, stride_vt, WINDOW, SOFTCAP, UPCAST, PRECISION, BLOCK_Q, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    at = z + ((prompt * Q + row.to(tl.int64)) * H + head)[:, None] * K + d[None, :]
    inside_out = (row < Q)[:, None] & (d < K)[None, :]
    tl.store(at, rounded(made, ROUND).to(z.dtype.element_ty), mask=inside_out)
    if PAIRED:
        if ONE_BLOCK:
            moved = block_mixtures(
                other_queries, other_keys, other_values, positions, N, scale, window, softcap,
                WINDOW, SOFTCAP, PRECISION, BLOCK_Q, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        else:
            moved = mixtures(
                queries_at + further * stride_qb, keys_at + further * stride_kb, values_at + further * stride_vb,
                positions, rows, head, group, N, K, scale, window, softcap,
                stride_qt, stride_kt, stride_vt, WINDOW, SOFTCAP, UPCAST, PRECISION, BLOCK_Q, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        at += further * Q * H * K
        tl.store(at, rounded(moved - made, ROUND).to(z.dtype.element_ty), mask=inside_out)


@triton.jit(do_not_specialize=SIZES)
def query_grads(
    q, k, v, dz, dq, dk, dv, rows_made, read, receiver_sums, w_gamma, offset,
    H, group, Q, N, K, before, scale, window, softcap, D, tokens_in_all,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_zb, stride_zh, stride_zt, stride_gb, stride_gh, stride_gt, stride_nb, stride_nh, stride_nt,
    WITH_KEYS: tl.constexpr, HAS_SUMS: tl.constexpr, CENTRED: tl.constexpr,
    HAS_READ: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    UPCAST: tl.constexpr, ROUND: tl.constexpr,
    PRECISION: tl.constexpr, ONE_BLOCK: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(Q, BLOCK_Q)
    row = (tl.program_id(0) % blocks) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    head = (tl.program_id(0) // blocks) % H
    prompt = (tl.program_id(0) // blocks // H).to(tl.int64)
    rows = tl.minimum(row, Q - 1)
    d = tl.arange(0, BLOCK_K)
    positions = query_positions(read, prompt, rows, Q, before, HAS_READ)
    queries = load_rows(q + prompt * stride_qb + head * stride_qh, rows, stride_qt, d, K, UPCAST)
    behind = load_rows(dz + prompt * stride_zb + head * stride_zh, rows, stride_zt, d, K, UPCAST)
    keys_at = k + prompt * stride_kb + (head // group) * stride_kh
    values_at = v + prompt * stride_vb + (head // group) * stride_vh
    if ONE_BLOCK:
        n = tl.arange(0, BLOCK_N)
        inside = tl.minimum(n, N - 1)
        keys = load_rows(keys_at, inside, stride_kt, d, K, UPCAST)
        values = load_rows(values_at, inside, stride_vt, d, K, UPCAST)
        s, slope = pattern_scores(queries, keys, positions, n, N, scale, window, softcap, WINDOW, SOFTCAP, PRECISION)
        dp = tl.dot(behind, values.T, input_precision=PRECISION)
        p = tl.exp(s - tl.max(s, 1)[:, None])
        p = p / tl.sum(p, 1)[:, None]
        product = tl.sum(p * dp, 1)
        ds = p * (dp - product[:, None]) * slope * scale
        grad = tl.dot(rounded(ds, ROUND).to(keys.dtype), keys, input_precision=PRECISION)
    else:
        largest = tl.full((BLOCK_Q,), float("-inf"), dtype=tl.float32)
        total = tl.zeros((BLOCK_Q,), dtype=tl.float32)
        product = tl.zeros((BLOCK_Q,), dtype=tl.float32)
        first, last = key_range(positions, window, N, WINDOW, BLOCK_N)
        for start in range(first, last, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            inside = tl.minimum(n, N - 1)
            keys = load_rows(keys_at, inside, stride_kt, d, K, UPCAST)
            s, _ = pattern_scores(queries, keys, positions, n, N, scale, window, softcap, WINDOW, SOFTCAP, PRECISION)
            values = load_rows(values_at, inside, stride_vt, d, K, UPCAST)
            dp = tl.dot(behind, values.T, input_precision=PRECISION)
            top = tl.maximum(largest, tl.max(s, 1))
            base = tl.where(top == float("-inf"), 0.0, top)
            p = tl.exp(s - base[:, None])
            shrink = tl.exp(largest - base)
            total = total * shrink + tl.sum(p, 1)
            product = product * shrink + tl.sum(p * dp, 1)
            largest = top
        product = product / total
        grad = tl.zeros((BLOCK_Q, BLOCK_K), dtype=tl.float32)
        for start in range(first, last, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            inside = tl.minimum(n, N - 1)
            keys = load_rows(keys_at, inside, stride_kt, d, K, UPCAST)
            s, slope = pattern_scores(
                queries, keys, positions, n, N, scale, window, softcap, WINDOW, SOFTCAP, PRECISION
            )
            values = load_rows(values_at, inside, stride_vt, d, K, UPCAST)
            dp = tl.dot(behind, values.T, input_precision=PRECISION)
            ds = tl.exp(s - largest[:, None]) / total[:, None] * (dp - product[:, None]) * slope * scale
            grad = tl.dot(rounded(ds, ROUND).to(keys.dtype), keys, grad, input_precision=PRECISION)
    if WITH_KEYS:  # there is one block of queries and one of keys, and their products are at hand
        token = n - before
        seen_by = (row < Q)[:, None]
        of_values = tl.dot(
            rounded(tl.where(seen_by, p, 0.0), ROUND).to(behind.dtype).T, behind, input_precision=PRECISION
        )
        of_keys = tl.dot(
            rounded(tl.where(seen_by, ds, 0.0), ROUND).to(queries.dtype).T, queries, input_precision=PRECISION
        )
        at_keys = (prompt * stride_nb + head * stride_nh + token.to(tl.int64) * stride_nt)[:, None] + d[None, :]
        wanted = ((token >= 0) & (n < N))[:, None] & (d < K)[None, :]
        of_keys = rounded(of_keys, ROUND).to(dk.dtype.element_ty)
        of_values = rounded(of_values, ROUND).to(dv.dtype.element_ty)
        tl.store(dk + at_keys, of_keys, mask=wanted)
        tl.store(dv + at_keys, of_values, mask=wanted)
        if HAS_SUMS:
            at_token, here = prompt * (N - before) + token, (token >= 0) & (n < N)
            store_sums(
                of_keys, keys, receiver_sums, w_gamma, offset, H + head, at_token, here, d, K, D, tokens_in_all, CENTRED
            )
            store_sums(
                of_values, values, receiver_sums, w_gamma, offset, 2 * H + head, at_token, here, d, K, D,
                tokens_in_all, CENTRED,
            )  # fmt: skip
    else:
        at_row = rows_made + ((prompt * H + head) * Q + row.to(tl.int64)) * 3
        tl.store(at_row, largest, mask=row < Q)
        tl.store(at_row + 1, total, mask=row < Q)
        tl.store(at_row + 2, product, mask=row < Q)
    inside_out = (row < Q)[:, None] & (d < K)[None, :]
    at = dq + (prompt * stride_gb + head * stride_gh + row.to(tl.int64) * stride_gt)[:, None] + d[None, :]
    grad = rounded(grad, ROUND).to(dq.dtype.element_ty)
    tl.store(at, grad, mask=inside_out)
    if HAS_SUMS:  # queries are those of all tokens
        store_sums(
            grad, queries, receiver_sums, w_gamma, offset, head, prompt * Q + row, row < Q, d, K, D, tokens_in_all,
            CENTRED,
        )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def key_grads(
    q, k, v, dz, dk, dv, rows_made, read, receiver_sums, w_gamma, offset,
    H, group, Q, N, K, before, scale, window, softcap, D, tokens_in_all,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_zb, stride_zh, stride_zt, stride_gb, stride_gh, stride_gt,
    HAS_SUMS: tl.constexpr, CENTRED: tl.constexpr,
    HAS_READ: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, UPCAST: tl.constexpr, ROUND: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tokens = N - before
    blocks = tl.cdiv(tokens, BLOCK_N)
    token = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    head = (tl.program_id(0) // blocks) % H
    prompt = (tl.program_id(0) // blocks // H).to(tl.int64)
    n = before + token
    inside = tl.minimum(n, N - 1)
    d = tl.arange(0, BLOCK_K)
    keys = load_rows(k + prompt * stride_kb + (head // group) * stride_kh, inside, stride_kt, d, K, UPCAST)
    values = load_rows(v + prompt * stride_vb + (head // group) * stride_vh, inside, stride_vt, d, K, UPCAST)
    queries_at = q + prompt * stride_qb + head * stride_qh
    behind_at = dz + prompt * stride_zb + head * stride_zh
    of_keys = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    of_values = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    first, last = 0, Q
    if not HAS_READ:  # the first query that sees one of these keys is the first key's own
        first = (tl.program_id(0) % blocks) * BLOCK_N // BLOCK_Q * BLOCK_Q
        if WINDOW:
            last = tl.minimum(Q, (tl.program_id(0) % blocks) * BLOCK_N + BLOCK_N - 1 + window)
    for start in range(first, last, BLOCK_Q):
        row = start + tl.arange(0, BLOCK_Q)
        rows = tl.minimum(row, Q - 1)
        positions = query_positions(read, prompt, rows, Q, before, HAS_READ)
        positions = tl.where(row < Q, positions, -1)  # which sees nothing
        queries = load_rows(queries_at, rows, stride_qt, d, K, UPCAST)
        behind = load_rows(behind_at, rows, stride_zt, d, K, UPCAST)
        at_row = rows_made + ((prompt * H + head) * Q + rows) * 3
        largest, total, product = tl.load(at_row), tl.load(at_row + 1), tl.load(at_row + 2)
        s, slope = pattern_scores(queries, keys, positions, n, N, scale, window, softcap, WINDOW, SOFTCAP, PRECISION)
        p = tl.exp(s - largest[:, None]) / total[:, None]
        of_values = tl.dot(rounded(p, ROUND).to(behind.dtype).T, behind, of_values, input_precision=PRECISION)
        dp = tl.dot(behind, values.T, input_precision=PRECISION)
        ds = p * (dp - product[:, None]) * slope * scale
        of_keys = tl.dot(rounded(ds, ROUND).to(queries.dtype).T, queries, of_keys, input_precision=PRECISION)
    at = (prompt * stride_gb + head * stride_gh + token.to(tl.int64) * stride_gt)[:, None] + d[None, :]
    inside_out = (token < tokens)[:, None] & (d < K)[None, :]
    of_keys = rounded(of_keys, ROUND).to(dk.dtype.element_ty)
    of_values = rounded(of_values, ROUND).to(dv.dtype.element_ty)
    tl.store(dk + at, of_keys, mask=inside_out)
    tl.store(dv + at, of_values, mask=inside_out)
    if HAS_SUMS:
        at_token, here = prompt * tokens + token, token < tokens
        store_sums(
            of_keys, keys, receiver_sums, w_gamma, offset, H + head, at_token, here, d, K, D, tokens_in_all, CENTRED
        )
        store_sums(
            of_values, values, receiver_sums, w_gamma, offset, 2 * H + head, at_token, here, d, K, D, tokens_in_all,
            CENTRED,
        )  # fmt: skip


def attend(
    q: Tensor, k: Tensor, v: Tensor, how: Causal, tokens: int, read: Tensor | None, z: Tensor, paired: bool
) -> Tensor:
    """`eapcore.kernels.attention.attend` on the GPU, or with `paired` its `attend_moved`, into z [B, Q, H, K]."""
    common.check_precision("auto", q.dtype, common.target(q.device))
    if not z.is_contiguous():
        raise ValueError(f"z [B, Q, H, K] must be contiguous, got strides {z.stride()} of {list(z.shape)}")
    if z.numel() == 0:
        return z
    q, k, v = (common.unit_inner_stride(x.detach()) for x in (q, k, v))
    numbers, meta = _how(q, k, how, tokens, exact=True)
    precision = "tf32x3" if common.target(q.device).backend == "cuda" else "ieee"  # of float32 products alone
    prompts = q.shape[0] // (1 + paired)
    if paired and meta["BLOCK_K"] > 64:  # one prompt's mixtures wait for the other's
        meta["num_warps"] = 8
    common.launch(
        attend_rows, common.cdiv(q.shape[2], meta["BLOCK_Q"]) * prompts * q.shape[1],
        q, k, v, z, None if read is None else read.contiguous(), *numbers, prompts,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        PAIRED=paired, HAS_READ=read is not None, PRECISION=precision,
        ROUND=common.interpreted() and z.dtype == torch.bfloat16, **meta, device=q.device,
    )  # fmt: skip
    return z


def attend_grad(
    q: Tensor, k: Tensor, v: Tensor, dz: Tensor, how: Causal, tokens: int, read: Tensor | None, out: Tensor | None,
    made: ReceiverSums | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`eapcore.kernels.attention.attend_grad` on the GPU."""
    batch, heads, queries, d_head = q.shape
    dq, dk, dv = grads_in(out, q, dz, tokens)
    if queries == 0 or batch * heads * d_head == 0:
        return dq, dk.zero_(), dv.zero_()
    q, k, v, dz = (common.unit_inner_stride(x.detach()) for x in (q, k, v, dz))
    alone = one_block(queries, k.shape[2])
    rows = None if alone else q.new_empty(*q.shape[:3], 3, dtype=torch.float32)
    numbers, meta = _how(q, k, how, tokens, exact=q.dtype == torch.float32)
    precision = common.check_precision("auto", q.dtype, common.target(q.device))
    strides = [n for x in (q, k, v, dz) for n in x.stride()[:3]]
    where = None if read is None else read.contiguous()
    rounds = common.interpreted() and dz.dtype == torch.bfloat16
    meta |= {"HAS_READ": read is not None, "PRECISION": precision, "ROUND": rounds}
    meta |= {"HAS_SUMS": made is not None, "CENTRED": made is not None and made.w_gamma is not None}
    beside: tuple[Tensor | None, ...] = (None, None, None)
    if made is not None:
        beside = made.out, None if made.w_gamma is None else made.w_gamma.contiguous(), made.offset.contiguous()
    numbers += [0, 0] if made is None else [made.d_model, made.out[0, 0].numel()]
    common.launch(
        query_grads, common.cdiv(queries, meta["BLOCK_Q"]) * batch * heads,
        q, k, v, dz, dq, dk, dv, rows, where, *beside, *numbers, *strides, *dq.stride()[:3], *dk.stride()[:3],
        WITH_KEYS=alone, **meta, device=q.device,
    )  # fmt: skip
    if tokens and not alone:
        del meta["ONE_BLOCK"]
        common.launch(
            key_grads, common.cdiv(tokens, meta["BLOCK_N"]) * batch * heads,
            q, k, v, dz, dk, dv, rows, where, *beside, *numbers, *strides, *dk.stride()[:3], **meta,
            device=q.device,
        )  # fmt: skip
    return dq, dk, dv


def _how(q: Tensor, k: Tensor, how: Causal, tokens: int, *, exact: bool) -> tuple[list[float], dict[str, Any]]:
    """The numbers and the compile-time arguments that all three kernels take; exact: patterns stay in float32."""
    common.check_precision("auto", q.dtype, common.target(q.device))
    _, heads, queries, d_head = q.shape
    keys = k.shape[2]
    block_k = max(16, common.next_power_of_2(d_head))
    block = 64 if block_k <= 64 and not exact else 32  # as far as registers go
    numbers = [
        heads, heads // k.shape[1], queries, keys, d_head, keys - tokens, how.scale, how.window or 0, how.softcap or 1.0
    ]  # fmt: skip
    meta = {
        "WINDOW": how.window is not None, "SOFTCAP": how.softcap is not None,
        "UPCAST": common.interpreted() and q.dtype != torch.float32,
        "BLOCK_Q": 16 if queries <= 16 else 32 if queries <= 32 else block,
        "BLOCK_N": 16 if keys <= 16 else 32 if keys <= 32 else block,
        "BLOCK_K": block_k, "num_warps": 4, "num_stages": 2 if block_k <= 64 else 1,
        "ONE_BLOCK": one_block(queries, keys),
    }  # fmt: skip
    return numbers, meta
