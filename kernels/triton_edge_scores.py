"""edge_scores on the GPU: every sender contracted with every receiver, one matrix product with a huge inner dimension.

    scores[s, r] = Σ_{b,t,d} delta[s, b, t, d] · grads[r, b, t, d]        where mask[s, r]

Bytes: (S + R)·B·T·D·element read once from memory, S·R·4 written. Operations: 2·B·T·D for each pair, counted in
tiles of BLOCK_S × BLOCK_R pairs that hold an edge; the others are skipped.

Why this tiling. Both operands are stored along the contracted axis, so this is the "NT" product that tensor cores
like; S × R gives few tiles (2 for one layer of GPT-2 small, 150 for XL), far fewer than would fill a GPU evenly, while
the inner dimension runs to millions. So the inner dimension is split. Consecutive programs take all the tiles of one
split, and therefore read the same slab of both operands at about the same time: the slab comes from memory once and
from L2 afterwards. Each split writes its partial sums to its own place in a workspace and `sum_splits` adds them
in a fixed order, so that the same inputs give the same bits on the same model of GPU. Which splits and tiles are taken
follows from shapes, edges and device alone: nothing is timed, because a choice by timing could differ between two runs.

How exact it is. A tensor core adds some products of half precision (Hopper 16 at a time, Ampere 8) to its float32
accumulator and cuts the sum off towards zero, where an adder rounds to the nearest (Fasi et al. 2021; Khattak, Mikaitis
2025). Each time takes 4e-8 of the sum so far, half a last place on average, and so 2.3e-8 of what it becomes:
4.6e-5 after 2048 times. So half precision is split until no program adds more than CHAIN elements, as far as
WORKSPACE_BYTES suffice (on 132 processors they leave 9e-5 for all edges of GPT-2 XL and 1,024 tokens, 2.4e-4 for those
of a 13B model and 512); the partial sums are added by adders. Chains of float32 need no bound: "ieee" rounds to the
nearest, which errs by 4e-6 after 69,000 elements and grows with their square root, and "tf32x3" begins every iteration
at zero and leaves the sum of iterations to adders.

`partial_scores`: one program instance computes one tile of pairs, of one group (everything, one pair of prompts or one
position), over one split of the inner dimension. It reads the tile's part of the mask first and runs an empty loop if
there is no edge: no list of live tiles has to be built, nothing waits for the host, and a mask that was changed in
place cannot be stale. `sum_splits`: one program instance adds the splits of BLOCK pairs.

The contracted axes (b, t, d) are merged as far as the strides allow; what remains is addressed as [p, q, row, k] with
unit stride along k, and a program walks through q and k. An operand whose d has another stride is copied first. Tensor
descriptors (TMA) load the tiles where the device has them and all rows start at multiples of 16 bytes; otherwise
pointers do. The two differ only in `load_tile`. Offsets are 64-bit.
"""

# Triton reads the annotations of its kernels' parameters, which leaves no room for types there.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import checks
from . import triton_common as common


@dataclass(frozen=True, slots=True)
class Config:
    """One tiling of `partial_scores`.

    block_s: senders, a power of two or three times one, which a program then multiplies in two parts: Triton takes
    powers of two alone. rate: the rate to expect on full tiles relative to the largest tiling, by which `choose_config`
    weighs padding.
    per_sm: programs that are resident on one processor at a time, bound by their shared memory.
    """

    block_s: int
    block_r: int
    block_k: int
    num_warps: int
    num_stages: int
    rate: float
    per_sm: int = 1


# Hopper and data-centre Blackwell: 227 KB of shared memory a processor. What binds large tiles on Hopper is L2, which
# all processors read at 6 to 7 TB/s: 192 × 256 pairs need a fifth fewer bytes for a product than 128 × 256, and their
# sums still fit in the registers of two warp groups. On one H200 (bfloat16, positions in front) they took 0.94 × the
# time at XL's shape, 0.80 × at a 13B's, and 1.05 × at GPT-2 medium's, where they are padded by an eighth more.
TENSOR_SM90 = (
    Config(192, 256, 64, 8, 3, rate=1.1),
    Config(128, 256, 64, 8, 4, rate=1.0),
    Config(128, 128, 64, 4, 3, rate=0.85, per_sm=2),
    Config(128, 64, 64, 4, 4, rate=0.6, per_sm=2),
    Config(64, 128, 64, 4, 4, rate=0.6, per_sm=2),
    Config(64, 64, 128, 4, 3, rate=0.4, per_sm=2),
)
# There the sums of two products at once do not stay in tensor memory.
TENSOR_SM100 = TENSOR_SM90[1:]
# Ampere, Ada and consumer Blackwell: 99 KB is the least of them.
TENSOR_SM80 = (
    Config(128, 256, 32, 8, 3, rate=1.0),
    Config(128, 128, 32, 4, 4, rate=0.9),
    Config(128, 64, 64, 4, 3, rate=0.6),
    Config(64, 128, 64, 4, 3, rate=0.6),
    Config(64, 64, 64, 4, 4, rate=0.4),
)
# CDNA: 64 KB of shared memory; two stages there mean one buffer and prefetch into registers.
TENSOR_HIP = (
    Config(256, 128, 64, 8, 2, rate=1.0),
    Config(128, 128, 64, 4, 2, rate=0.9),
    Config(128, 64, 64, 4, 2, rate=0.6),
    Config(64, 128, 64, 4, 2, rate=0.6),
    Config(64, 64, 128, 4, 2, rate=0.4),
)
# Rows that do not start at multiples of 16 bytes are read element by element, with an address in registers for each.
UNALIGNED = (Config(128, 128, 32, 8, 3, rate=1.0), Config(64, 64, 32, 4, 3, rate=0.7, per_sm=2))
# float32 as three tf32 products: four bytes an element, and both halves of the operands at a time. Ampere holds them in
# registers, where larger tiles spill.
TF32X3_SM90 = (
    Config(128, 128, 32, 8, 3, rate=1.0),
    Config(128, 64, 32, 4, 3, rate=0.7, per_sm=2),
    Config(64, 128, 32, 4, 3, rate=0.7, per_sm=2),
    Config(64, 64, 32, 4, 3, rate=0.5, per_sm=2),
)
TF32X3_SM80 = (Config(64, 64, 32, 4, 3, rate=1.0, per_sm=2),)
# An address in registers for each element as well leaves room for 16 columns.
TF32X3_UNALIGNED = (Config(64, 64, 16, 4, 3, rate=1.0, per_sm=2),)
# float32 in full: NVIDIA has no tensor-core instruction for it, and tiles of multiply-adds above 64 × 64 spill.
EXACT_CUDA = (Config(64, 64, 32, 4, 3, rate=1.0, per_sm=3),)
EXACT_HIP = (Config(128, 128, 32, 4, 2, rate=1.0), Config(64, 64, 32, 4, 2, rate=0.6, per_sm=2))

# Partial sums of at most this size: beyond it, fewer splits.
WORKSPACE_BYTES = 512 << 20
# Elements of half precision that one program adds up: 2048 times 16, an error of 4.6e-5, where an element of bfloat16
# is rounded by up to 2e-3. Their products of 128 × 256 pairs take 404 µs at 700 TFLOP/s on 132 processors, and 7 µs
# more at 4.8 TB/s to write the sums and read them again.
CHAIN = 32 * 1024
# What starting a program, filling its pipeline and writing its tile cost, in iterations of its loop.
OVERHEAD = 12
# 512-byte rows of 32 splits at a time keep enough loads under way for the few pairs of one layer.
SUM_PAIRS = 128
SUM_SPLITS = 32
ZERO_PAIRS = 1024

# Sizes that change from batch to batch and from layer to layer, and where a mask lies, which is read a byte at a time:
# alignment gains nothing there, and a kernel for each would be compiled.
SIZES = ["S", "R", "G", "N", "T", "splits", "mask", "stride_ms", "pairs"]


@triton.jit
def load_tile(
    source, row0, rows, stride_row, p, stride_p, q, stride_q, k0, K,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, DESCRIPTORS: tl.constexpr, EVEN_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    if DESCRIPTORS:
        # Rows and columns past the end are filled with zeros.
        tile = source.load([p.to(tl.int32), q.to(tl.int32), row0, k0]).reshape(BLOCK, BLOCK_K)
    else:
        k = k0 + tl.arange(0, BLOCK_K)
        start = source + (p.to(tl.int64) * stride_p + q.to(tl.int64) * stride_q)
        at = start + (rows[:, None] * stride_row + k[None, :])
        tile = tl.load(at) if EVEN_K else tl.load(at, mask=(k < K)[None, :], other=0.0)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def has_edge(
    mask, row_s, row_r, S, R, stride_ms, stride_mr,
    BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    # Some rows at a time: the addresses of a whole tile would not fit in registers.
    r = row_r + tl.arange(0, BLOCK_R)
    found = tl.zeros((STEP, BLOCK_R), dtype=tl.int8)
    for step in range(0, BLOCK_S, STEP):
        s = row_s + step + tl.arange(0, STEP)
        at = mask + s.to(tl.int64)[:, None] * stride_ms + r.to(tl.int64)[None, :] * stride_mr
        found |= tl.load(at, mask=(s < S)[:, None] & (r < R)[None, :], other=0).to(tl.int8)
    return tl.max(found.to(tl.int32)) != 0


@triton.jit
def store_tile(
    sums, out, program, group, row_s, row_r, S, R, first,
    ROWS: tl.constexpr, DIRECT: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    # The rows of a tile of ROWS × BLOCK_R pairs from `first` on.
    s = first + tl.arange(0, BLOCK_S)
    r = tl.arange(0, BLOCK_R)
    if DIRECT:
        # Offsets inside a tile fit in 32 bits. Pairs that are no edges are set to zero afterwards.
        at = out + ((group.to(tl.int64) * S + row_s) * R + row_r) + (s[:, None] * R + r[None, :])
        tl.store(at, sums, mask=(s < S - row_s)[:, None] & (r < R - row_r)[None, :])
    else:
        at = out + program.to(tl.int64) * (ROWS * BLOCK_R) + (s[:, None] * BLOCK_R + r[None, :])
        tl.store(at, sums)


@triton.jit(do_not_specialize=SIZES)
def partial_scores(
    delta, more_delta, grads, out, mask, rows, counts,
    S, R, G, N, K, T, splits,
    stride_ds, stride_dp, stride_dq, stride_gr, stride_gp, stride_gq, stride_ms, stride_mr,
    INDEX: tl.constexpr, ONE_ROW: tl.constexpr, HAS_MASK: tl.constexpr, HAS_COUNTS: tl.constexpr,
    DIRECT: tl.constexpr, DESCRIPTORS: tl.constexpr, EVEN_K: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_S: tl.constexpr, MORE_S: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles_r = tl.cdiv(R, BLOCK_R)
    tiles = tl.cdiv(S, BLOCK_S + MORE_S) * tiles_r
    program = tl.program_id(0)
    tile = program % tiles
    group = (program // tiles) % G
    split = program // tiles // G
    row_s = (tile // tiles_r) * (BLOCK_S + MORE_S)
    row_r = (tile % tiles_r) * BLOCK_R

    tokens = N
    if HAS_COUNTS:
        tokens = tl.load(counts + group).to(tl.int32)
    chunks = tl.cdiv(K, BLOCK_K)
    total = (tokens * chunks).to(tl.int64)
    first = (total * split // splits).to(tl.int32)
    last = (total * (split + 1) // splits).to(tl.int32)
    live = True
    if HAS_MASK:
        live = has_edge(mask, row_s, row_r, S, R, stride_ms, stride_mr, BLOCK_S + MORE_S, BLOCK_R, 64)
        last = tl.where(live, last, first)

    # Rows past the end repeat the last one: their products are never used, and every load stays inside.
    s_in = tl.minimum(row_s + tl.arange(0, BLOCK_S), S - 1).to(tl.int64)
    r_in = tl.minimum(row_r + tl.arange(0, BLOCK_R), R - 1).to(tl.int64)
    sums = tl.zeros((BLOCK_S, BLOCK_R), dtype=tl.float32)
    if MORE_S > 0:
        more_in = tl.minimum(row_s + BLOCK_S + tl.arange(0, MORE_S), S - 1).to(tl.int64)
        more = tl.zeros((MORE_S, BLOCK_R), dtype=tl.float32)
    for i in range(first, last):
        if ONE_ROW:
            n = i * 0
            k0 = i * BLOCK_K
        else:
            n = i // chunks
            k0 = (i - n * chunks) * BLOCK_K
        if INDEX == "group":
            p = group
            q = n
        else:
            token = n
            if INDEX == "table":
                token = tl.load(rows + group.to(tl.int64) * N + n).to(tl.int32)
            p = token // T
            q = token % T
        a = load_tile(
            delta, row_s, s_in, stride_ds, p, stride_dp, q, stride_dq, k0, K,
            BLOCK_S, BLOCK_K, DESCRIPTORS, EVEN_K, UPCAST,
        )  # fmt: skip
        b = load_tile(
            grads, row_r, r_in, stride_gr, p, stride_gp, q, stride_gq, k0, K,
            BLOCK_R, BLOCK_K, DESCRIPTORS, EVEN_K, UPCAST,
        )  # fmt: skip
        sums = tl.dot(a, b.T, sums, input_precision=PRECISION)
        if MORE_S > 0:
            c = load_tile(
                more_delta, row_s + BLOCK_S, more_in, stride_ds, p, stride_dp, q, stride_dq, k0, K,
                MORE_S, BLOCK_K, DESCRIPTORS, EVEN_K, UPCAST,
            )  # fmt: skip
            more = tl.dot(c, b.T, more, input_precision=PRECISION)

    if live:
        store_tile(sums, out, program, group, row_s, row_r, S, R, 0, BLOCK_S + MORE_S, DIRECT, BLOCK_S, BLOCK_R)
        if MORE_S > 0:
            store_tile(
                more, out, program, group, row_s, row_r, S, R, BLOCK_S, BLOCK_S + MORE_S, DIRECT, MORE_S, BLOCK_R
            )


@triton.jit(do_not_specialize=SIZES)
def sum_splits(
    partial, out, mask,
    S, R, G, splits, tile_s, tile_r, stride_ms, stride_mr,
    HAS_MASK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    parts = tile_s * tile_r // BLOCK
    tiles_r = tl.cdiv(R, tile_r)
    tiles = tl.cdiv(S, tile_s) * tiles_r
    unit = tl.program_id(0) // parts
    pair = (tl.program_id(0) % parts) * BLOCK + tl.arange(0, BLOCK)
    tile = unit % tiles
    s = (tile // tiles_r) * tile_s + pair // tile_r
    r = (tile % tiles_r) * tile_r + pair % tile_r
    inside = (s < S) & (r < R)
    edges = inside
    if HAS_MASK:
        edges = tl.load(mask + s.to(tl.int64) * stride_ms + r.to(tl.int64) * stride_mr, mask=inside, other=0) != 0
    sums = tl.zeros((BLOCK_SPLITS, BLOCK), dtype=tl.float32)
    stride_split = (tiles * G).to(tl.int64) * (tile_s * tile_r)
    start = partial + unit.to(tl.int64) * (tile_s * tile_r)
    for i in range(0, splits, BLOCK_SPLITS):
        split = i + tl.arange(0, BLOCK_SPLITS)
        # Tiles without an edge were never written.
        wanted = (split < splits)[:, None] & edges[None, :]
        sums += tl.load(start + split.to(tl.int64)[:, None] * stride_split + pair[None, :], mask=wanted, other=0.0)
    score = tl.sum(sums, 0)
    at = out + ((unit // tiles).to(tl.int64) * S + s) * R + r
    tl.store(at, tl.where(edges, score, 0.0), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def zero_non_edges(out, mask, S, R, pairs, stride_ms, stride_mr, BLOCK: tl.constexpr):
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = pair < pairs
    at = mask + (pair // R % S) * stride_ms + (pair % R) * stride_mr
    edge = tl.load(at, mask=inside, other=1) != 0
    tl.store(out + pair, tl.zeros((BLOCK,), dtype=tl.float32), mask=inside & ~edge)


@dataclass(frozen=True, slots=True)
class Layout:
    """How `partial_scores` walks through the contracted axes of both operands.

    operands: views [p, q, S or R, k] of delta and grads. groups: results of S × R. tokens, inner: steps along q and
    sizes of k. index: "group" takes p = the group and q = the token; "flat" divides a running number into p and q by
    `split_at`; "table" reads that number from `rows`, a [groups, tokens] table of which the first counts[group] entries
    are valid (all without counts).
    """

    operands: tuple[Tensor, Tensor]
    groups: int
    tokens: int
    inner: int
    index: str = "group"
    split_at: int = 1
    rows: Tensor | None = None
    counts: Tensor | None = None


def layout(delta: Tensor, grads: Tensor, reduce: str, rows: Tensor | None) -> Layout:
    """Merge the contracted axes as far as both operands' strides allow."""
    delta, grads = common.unit_inner_stride(delta), common.unit_inner_stride(grads)
    _, batch, tokens, d_model = delta.shape

    def views(order: tuple[int, int, int, int]) -> tuple[Tensor, Tensor]:
        return delta.permute(order), grads.permute(order)

    def merged(p: int, q: int, inner: int) -> tuple[Tensor, Tensor]:
        """Pairs of prompts along p or q (the other is 1), or along neither, and all else along k."""

        def one(x: Tensor) -> Tensor:
            strides = (x.stride(1), x.stride(1), x.stride(0), 1)
            return x.as_strided((p, q, x.shape[0], inner), strides, x.storage_offset())

        return one(delta), one(grads)

    if rows is not None:
        # Reading the indices through a range checks them on the device, and makes negative ones positive.
        everything = torch.arange(batch * tokens, device=delta.device)
        if reduce == "all":
            return Layout(views((1, 2, 0, 3)), 1, len(rows), d_model, "table", tokens, everything[rows])
        dropped = torch.ones_like(everything, dtype=torch.bool)
        dropped[rows] = False
        grid, dropped = everything.view(batch, tokens), dropped.view(batch, tokens)
        if reduce == "position":
            grid, dropped = grid.T, dropped.T
        order = torch.argsort(dropped.to(torch.uint8), dim=1, stable=True)  # the rows to keep come first
        table, counts = grid.gather(1, order), (~dropped).sum(1)
        return Layout(views((1, 2, 0, 3)), table.shape[0], table.shape[1], d_model, "table", tokens, table, counts)
    if reduce == "position":
        return Layout(views((2, 1, 0, 3)), tokens, batch, d_model)
    # An inner axis of 2^30 or more would overflow the kernel's 32-bit positions along it.
    inner = tokens * d_model
    if inner < 2**30 and all(tokens == 1 or x.stride(2) == d_model for x in (delta, grads)):
        if reduce == "pair":
            return Layout(merged(batch, 1, inner), batch, 1, inner)
        if batch * inner < 2**30 and all(batch == 1 or x.stride(1) == inner for x in (delta, grads)):
            return Layout(merged(1, 1, batch * inner), 1, 1, batch * inner)
        return Layout(merged(1, batch, inner), 1, batch, inner)
    if reduce == "pair":
        return Layout(views((1, 2, 0, 3)), batch, tokens, d_model)
    if 1 in (batch, tokens) or all(
        x.stride(1) == tokens * x.stride(2) for x in (delta, grads)
    ):  # one axis of positions

        def positions(x: Tensor) -> Tensor:
            step = x.stride(1 if tokens == 1 else 2)
            return x.as_strided(
                (1, batch * tokens, x.shape[0], d_model), (step, step, x.stride(0), 1), x.storage_offset()
            )

        return Layout((positions(delta), positions(grads)), 1, batch * tokens, d_model)
    return Layout(views((1, 2, 0, 3)), 1, batch * tokens, d_model, "flat", tokens)


def configs(dtype: torch.dtype, precision: str, on: common.Target, aligned: bool = True) -> tuple[Config, ...]:
    """The tilings for a dtype and precision on a target, for rows that do or do not start at multiples of 16 bytes."""
    if dtype != torch.float32:
        if not aligned:
            return UNALIGNED
        if on.backend == "hip":
            return TENSOR_HIP
        if not on.descriptors:
            return TENSOR_SM80
        return TENSOR_SM100 if on.arch >= 100 else TENSOR_SM90
    if precision == "tf32x3":
        if not aligned:
            return TF32X3_UNALIGNED
        return TF32X3_SM90 if on.descriptors else TF32X3_SM80
    return EXACT_HIP if on.backend == "hip" else EXACT_CUDA


def live_tiles(config: Config, senders: int, receivers: int, before: Sequence[int] | None) -> int:
    """Tiles that hold an edge, where each receiver has edges from the first `before` senders; all for None."""
    if before is None:
        return common.cdiv(senders, config.block_s) * common.cdiv(receivers, config.block_r)
    tiles = range(0, receivers, config.block_r)
    return sum(common.cdiv(min(senders, max(before[i : i + config.block_r])), config.block_s) for i in tiles)


def choose_config(
    senders: int, receivers: int, candidates: tuple[Config, ...], before: Sequence[int] | None = None
) -> Config:
    """The tiling that should take the least time, counting padding; the first of equals."""

    def cost(config: Config) -> float:
        return live_tiles(config, senders, receivers, before) * config.block_s * config.block_r / config.rate

    return min(candidates, key=cost)


@functools.lru_cache(maxsize=4096)
def choose_splits(
    units: int, iterations: int, slots: int, masked: bool, least: int, most: int, known: int | None = None
) -> int:
    """In how many parts to split `iterations` when `units` tiles run on `slots` places, `least` to `most` of them.

    Minimises rounds × (iterations of a part + OVERHEAD). known: how many tiles of a mask are live, None where it is
    known on the device only. The order of a transformer's layers then leaves a triangle of √units × √units tiles,
    diagonal included; a last round is half full on average.
    """
    if known is not None:
        units, masked = max(1, known), False
    live = 0.5 * (1 + units**-0.5) if masked else 1.0

    def cost(splits: int) -> float:
        programs = units * splits
        if masked and programs > slots:
            rounds = max(1.0, live * programs / slots + 0.5)
        else:
            rounds = common.cdiv(programs, slots)
        return rounds * (common.cdiv(iterations, splits) + OVERHEAD)

    most = min(most, iterations)
    least = min(least, most)
    # Beyond 32 rounds of programs a further split cannot even out anything.
    return min(range(least, max(least, min(most, common.cdiv(32 * slots, units))) + 1), key=cost)


@dataclass(frozen=True, slots=True)
class Plan:
    """What `edge_scores` launches: the tiling, tiles × groups, splits, and whether tiles come through descriptors.

    chain: elements of the inner dimension that one program adds up, at most.
    """

    config: Config
    units: int
    splits: int
    descriptors: bool
    chain: int

    @property
    def partial_shape(self) -> tuple[int, int, int]:
        """[splits, units, pairs of a tile] of the sums beside the result; no splits where it is written directly."""
        return 0 if self.splits == 1 else self.splits, self.units, self.config.block_s * self.config.block_r

    @property
    def partial_bytes(self) -> int:
        """The bytes of these sums."""
        return 4 * math.prod(self.partial_shape)


def plan(
    senders: int, receivers: int, groups: int, tokens: int, inner: int, *,
    dtype: torch.dtype, precision: str, masked: bool, aligned: bool, on: common.Target,
    config: Config | None = None, before: Sequence[int] | None = None,
) -> Plan:  # fmt: skip
    """The launch for a shape on a target; a pure function, so that the same shapes give the same order of sums."""
    before = before if masked else None
    config = config or choose_config(senders, receivers, configs(dtype, precision, on, aligned), before)
    units = groups * common.cdiv(senders, config.block_s) * common.cdiv(receivers, config.block_r)
    most = max(1, WORKSPACE_BYTES // (4 * units * config.block_s * config.block_r))
    iterations = tokens * common.cdiv(inner, config.block_k)
    least = 1 if dtype == torch.float32 else common.cdiv(iterations, CHAIN // config.block_k)
    known = None if before is None else groups * live_tiles(config, senders, receivers, before)
    splits = choose_splits(units, iterations, on.processors * config.per_sm, masked, least, most, known)
    # Multiply-adds read their operands through registers, where descriptors gain nothing.
    exact = dtype == torch.float32 and precision == "ieee" and on.backend != "interpreter"
    chain = common.cdiv(iterations, splits) * config.block_k
    return Plan(config, units, splits, aligned and on.descriptors and not exact, chain)


def plan_of(
    work: Layout,
    masked: bool,
    precision: str = "ieee",
    config: Config | None = None,
    on: common.Target | None = None,
    among: int | None = None,
    before: Sequence[int] | None = None,
) -> Plan:
    """The launch of `contract` for a layout, on its own device unless another is given; among, before: as in
    `edge_scores`."""
    delta, grads = work.operands
    senders, receivers = delta.shape[2], grads.shape[2]
    found = plan(
        among or senders, receivers, work.groups, work.tokens, work.inner,
        dtype=delta.dtype, precision=precision, masked=masked,
        aligned=common.describable(delta) and common.describable(grads), on=on or common.target(delta.device),
        config=config, before=before,
    )  # fmt: skip
    tile = found.config
    units = work.groups * common.cdiv(senders, tile.block_s) * common.cdiv(receivers, tile.block_r)
    return replace(found, units=units)


def contract(
    work: Layout,
    mask: Tensor | None,
    out: Tensor,
    *,
    precision: str = "auto",
    config: Config | None = None,
    among: int | None = None,
    before: Sequence[int] | None = None,
) -> None:
    """Write the scores [groups, S, R] of a layout to `out`, 0 where there is no edge."""
    delta, grads = work.operands
    senders, receivers = delta.shape[2], grads.shape[2]
    precision = common.check_precision(precision, delta.dtype, common.target(delta.device))
    chosen = plan_of(work, mask is not None, precision, config, among=among, before=before)
    tile, units = chosen.config, chosen.units
    shape = chosen.partial_shape
    direct = shape[0] == 0
    partial = out if direct else out.new_empty(shape)
    edges = None if mask is None else mask.view(torch.uint8)
    stride_ms, stride_mr = (0, 0) if mask is None else mask.stride()
    at_once = 1 << (tile.block_s.bit_length() - 1)  # the largest power of two of a tile's senders
    more = tile.block_s - at_once
    operands: tuple[Tensor | TensorDescriptor | None, ...] = (delta, delta if more else None, grads)
    if chosen.descriptors:
        operands = (
            common.descriptor(delta, [1, 1, at_once, tile.block_k]),
            common.descriptor(delta, [1, 1, more, tile.block_k]) if more else None,
            common.descriptor(grads, [1, 1, tile.block_r, tile.block_k]),
        )
    common.launch(
        partial_scores, units * chosen.splits,
        *operands, partial, edges, work.rows, work.counts,
        senders, receivers, work.groups, work.tokens, work.inner, work.split_at, chosen.splits,
        delta.stride(2), delta.stride(0), delta.stride(1), grads.stride(2), grads.stride(0), grads.stride(1),
        stride_ms, stride_mr,
        INDEX=work.index, ONE_ROW=work.tokens == 1, HAS_MASK=mask is not None, HAS_COUNTS=work.counts is not None,
        DIRECT=direct, DESCRIPTORS=chosen.descriptors,
        EVEN_K=work.inner % tile.block_k == 0,
        # The interpreter multiplies the bit patterns of bfloat16.
        UPCAST=common.interpreted() and delta.dtype != torch.float32, PRECISION=precision,
        BLOCK_S=at_once, MORE_S=more, BLOCK_R=tile.block_r, BLOCK_K=tile.block_k,
        num_warps=tile.num_warps, num_stages=tile.num_stages, device=delta.device,
    )  # fmt: skip
    if not direct:
        # The interpreter takes the same time for a program of any size.
        block = math.gcd(4096, tile.block_s * tile.block_r) if common.interpreted() else SUM_PAIRS
        common.launch(
            sum_splits, units * (tile.block_s * tile.block_r // block),
            partial, out, edges, senders, receivers, work.groups, chosen.splits, tile.block_s, tile.block_r,
            stride_ms, stride_mr,
            HAS_MASK=mask is not None, BLOCK=block, BLOCK_SPLITS=SUM_SPLITS,
            num_warps=4, device=delta.device,
        )  # fmt: skip
    elif mask is not None:
        common.launch(
            zero_non_edges, common.cdiv(out.numel(), ZERO_PAIRS),
            out, edges, senders, receivers, out.numel(), stride_ms, stride_mr,
            BLOCK=ZERO_PAIRS, num_warps=4, device=delta.device,
        )  # fmt: skip


def edge_scores(
    delta: Tensor,
    grads: Tensor,
    mask: Tensor | None,
    reduce: str,
    rows: Tensor | None,
    precision: str = "auto",
    *,
    config: Config | None = None,
    among: int | None = None,
    before: Sequence[int] | None = None,
) -> Tensor:
    """`eapcore.kernels.edge_scores` on the GPU; `config` takes one tiling instead of `choose_config`'s. among: of how
    many senders these are some, for which tiling and splits are chosen; before: of these, see there."""
    checks.one_of("precision", precision, checks.PRECISIONS)
    common.check_precision(precision, delta.dtype, common.target(delta.device))
    senders, batch, tokens, _ = delta.shape
    receivers = grads.shape[0]
    shape = {"all": (), "pair": (batch,), "position": (tokens,)}[reduce] + (senders, receivers)
    if 0 in shape or delta.numel() == 0 or (rows is not None and len(rows) == 0):
        return delta.new_zeros(shape, dtype=torch.float32)
    out = delta.new_empty(shape, dtype=torch.float32)
    work = layout(delta.detach(), grads.detach(), reduce, rows)
    contract(work, mask, out, precision=precision, config=config, among=among, before=before)
    return out


def partial_bytes(
    senders: int, receivers: int, batch: int, tokens: int, d_model: int, dtype: torch.dtype, on: common.Target,
    masked: bool, reduce: str, precision: str, before: Sequence[int] | None = None, positions_first: bool = False,
) -> int:  # fmt: skip
    """The bytes of partial sums that `contract` allocates for operands [S, B, T, D] and [R, B, T, D], packed in this
    order or with the positions in front."""
    if 0 in (senders, receivers, batch, tokens, d_model):
        return 0
    # Shapes and strides alone: whoever counts memory would else count theirs.
    one = torch.empty(1, dtype=dtype, device="meta")

    def operand(rows: int) -> Tensor:
        step, token = (d_model, rows * d_model) if positions_first else (batch * tokens * d_model, d_model)
        return one.as_strided((rows, batch, tokens, d_model), (step, tokens * token, token, 1))

    delta, grads = operand(senders), operand(receivers)
    work = layout(delta, grads, reduce, None)
    precision = common.check_precision(precision, dtype, on)
    return plan_of(work, masked, precision, on=on, before=before).partial_bytes


def workspace_bytes(
    sizes: checks.Sizes, dtype: torch.dtype, device: torch.device, masked: bool, reduce: str, precision: str,
    before: Sequence[int] | None = None,
) -> int:  # fmt: skip
    """`eapcore.kernels.workspace_bytes` of `edge_scores`."""
    return partial_bytes(
        sizes.senders, sizes.receivers, sizes.batch, sizes.tokens, sizes.d_model, dtype, common.target(device), masked,
        reduce, precision, before,
    )  # fmt: skip
