"""Check every op, then time it: each implementation and plain PyTorch on the shapes of real models.

    python bench/bench_kernels.py                     CPU table
    python bench/bench_kernels.py --device cuda       GPU table (what is asked for comes first; ends after --minutes)
    python bench/bench_kernels.py --quick             tiny shapes, seconds; what the tests run
    compute-sanitizer python bench/bench_kernels.py --device cuda --check-only
                                                      every kernel on small odd shapes, nothing timed: a minute or two
    python bench/bench_kernels.py --compile           the table of compiled Triton kernels (bench/triton_compile.py)
    python bench/bench_kernels.py --json out.jsonl    one JSON object a line beside the table, as they come

Runs from the source tree, installed or not. Nothing is timed before its result is right: eapcore's implementations
must be within 1e-5 of float64 (2^-8 where the result itself is stored in bfloat16; on a GPU more where tensor cores add
up long chains, see `allowed_error`), in the norm, on a sample of senders and receivers, and exactly 0 where there is no
edge. The error of PyTorch's ways is printed, not judged: with bfloat16
they round the result. A case that fails is printed with its reason and costs only itself; the exit status is then 1, as
it is when the minutes are over before the list is.

All ways to compute one thing take turns, round after round. CPU: `ms` is processor time of all threads divided by
their number, which other processes disturb less than the clock. GPU: CUDA events, the L2 cache overwritten each time,
and the device kept busy for a millisecond before, so that a short call is not timed by its launches.

    ms, +-          median and half the distance of the quartiles
    x torch         the fastest right PyTorch way's median / this median
    Gop/s           2 · edges · B·T·D multiply-adds a second: what is not an edge does not count, for anyone
    % matmul        of this device's rate on a large square matrix product of the same dtype; on a GPU, edge_scores
                    is credited with every real pair of the tiles that hold an edge: those have to be computed
    GB/s, % copy    the arguments and the result, each moved once; of this device's rate when copying
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import json
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if importlib.util.find_spec("eapcore") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eapcore.kernels import FactoredReceivers, FactoredSenders, Norm, cpp, reference

from eapcore import kernels

Run = Callable[[], Tensor]
Attempt = Callable[[str, Callable[[], None]], None]


@dataclass(frozen=True, slots=True)
class Model:
    """Sizes of a model, by DESIGN's letters."""

    name: str
    L: int
    H: int
    D: int

    @property
    def K(self) -> int:
        return self.D // self.H

    @property
    def S(self) -> int:
        return 1 + self.L * (self.H + 1)

    @property
    def R(self) -> int:
        return self.L * (3 * self.H + 1) + 1

    def mask(self) -> Tensor:
        """bool [S, R]: a sender in front of a receiver."""
        mask = torch.zeros(self.S, self.R, dtype=torch.bool)
        for layer in range(self.L):
            before, first = 1 + layer * (self.H + 1), layer * (3 * self.H + 1)
            mask[:before, first : first + 3 * self.H] = True
            mask[: before + self.H, first + 3 * self.H] = True
        mask[:, -1] = True
        return mask


TINY = Model("tiny", 2, 2, 32)
SMALL = Model("GPT-2 small", 12, 12, 768)
MEDIUM = Model("GPT-2 medium", 24, 16, 1024)
XL = Model("GPT-2 XL", 48, 25, 1600)
B13 = Model("13B", 40, 40, 5120)


@dataclass(frozen=True, slots=True)
class Case:
    """One op on one shape.

    receivers: how many of the model's are in one call; 0 stands for all of them at once. asked: a figure that this
    case is there for, ("of_matmul" or "of_copy", the least share).
    """

    op: str
    model: Model
    receivers: int
    batch: int
    tokens: int
    dtype: torch.dtype
    asked: tuple[str, float] | None = None

    @property
    def name(self) -> str:
        m = self.model
        if self.op == "receiver_grads":
            return f"{m.name} C={3 * m.H} K={m.K} D={m.D} B·T={self.batch * self.tokens}"
        return f"{m.name} S={m.S} R={self.receivers or m.R} D={m.D} B·T={self.batch * self.tokens}"


def cases(device: str, quick: bool) -> Iterator[Case]:
    """The list; one layer's receivers are 3H + 1, and R = 1 is the logits alone."""
    f32, bf16 = torch.float32, torch.bfloat16
    if quick:
        for dtype in (f32, bf16):
            yield Case("edge_scores", TINY, 7, 2, 5, dtype, ("of_copy", 0.8))
            yield Case("edge_scores", TINY, 0, 2, 5, dtype, ("of_matmul", 0.75))
            yield Case("receiver_grads", TINY, 7, 2, 5, dtype)
            yield Case("edge_scores_factored", TINY, 0, 2, 5, dtype)
        return
    if device == "cpu":
        for dtype in (f32, bf16):
            for batch in (8, 32):
                for receivers in (1, 37):
                    yield Case("edge_scores", SMALL, receivers, batch, 20, dtype)
            yield Case("edge_scores", SMALL, 0, 8, 20, dtype)
            for batch in (8, 32):
                yield Case("edge_scores", SMALL, SMALL.R, batch, 20, dtype)  # every pair, as if all were edges
            yield Case("edge_scores", MEDIUM, 49, 8, 20, dtype)
            yield Case("edge_scores", XL, 76, 1, 16, dtype)
            yield Case("edge_scores", XL, 0, 1, 8, dtype)
            yield Case("edge_scores", B13, 121, 1, 8, dtype)
            for model, batch, tokens in ((SMALL, 8, 20), (MEDIUM, 8, 20), (XL, 1, 20), (B13, 1, 8)):
                yield Case("receiver_grads", model, 0, batch, tokens, dtype)
            yield Case("edge_scores_factored", SMALL, 0, 8, 20, dtype)
        return
    yield Case("edge_scores", SMALL, 37, 32, 64, bf16, ("of_copy", 0.8))
    yield Case("edge_scores", XL, 0, 16, 64, bf16, ("of_matmul", 0.75))
    yield Case("edge_scores", B13, 0, 8, 64, bf16, ("of_matmul", 0.75))
    yield Case("edge_scores", SMALL, 37, 32, 64, f32, ("of_copy", 0.8))
    for dtype in (bf16, f32):
        for model, tokens in ((SMALL, 2048), (MEDIUM, 2048), (XL, 1024), (B13, 512)):
            if model is not SMALL:
                yield Case("edge_scores", model, 3 * model.H + 1, tokens // 64, 64, dtype)
            if model in (SMALL, MEDIUM):
                yield Case("edge_scores", model, 0, tokens // 64, 64, dtype)
            yield Case("receiver_grads", model, 0, tokens // 64, 64, dtype)
        yield Case("edge_scores_factored", SMALL, 0, 32, 64, dtype)
        yield Case("edge_scores_factored", XL, 0, 2, 64, dtype)


@dataclass(frozen=True, slots=True)
class Work:
    """A case made real: the ways to compute it, what is right, and what it costs.

    providers: name -> call; names without "torch" are eapcore's and must be right. check(result) gives the relative
    error in the norm against float64. limit: the error allowed. operations, bytes: counted, see the module's docstring.
    tile_operations: those of all real pairs in tiles with an edge, where that is known.
    """

    providers: dict[str, Run]
    check: Callable[[Tensor], float]
    limit: float
    operations: int
    bytes: int
    tile_operations: int | None = None


def size_of(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def relative(got: Tensor, exact: Tensor) -> float:
    return ((got.double() - exact).norm() / exact.norm()).item()


def fast_implementation(kind: str) -> str:
    reasons = kernels.available()
    fast = "cpp" if kind == "cpu" else "triton"
    if reasons[fast]:
        raise RuntimeError(f"{fast} cannot run here: {reasons[fast]}")
    return fast


def edge_tile_pairs(mask: Tensor, block_s: int, block_r: int) -> int:
    """How many pairs lie in tiles of block_s × block_r that hold an edge; what pads the last tiles is no pair."""
    tiles = torch.nn.functional.max_pool2d(mask[None].float(), (block_s, block_r), ceil_mode=True)[0]
    padded = tiles.repeat_interleave(block_s, 0).repeat_interleave(block_r, 1)
    return int(padded[: mask.shape[0], : mask.shape[1]].sum(dtype=torch.float64))


def allowed_error(dtype: torch.dtype, chain: int, arch: int) -> float:
    """1e-5, or twice what tensor cores lose that add up a chain of so many elements of half precision.

    They cut every sum off, 16 products at a time from sm_90 on and 8 before: see kernels/triton_edge_scores.py.
    """
    return 1e-5 if dtype == torch.float32 else max(1e-5, 5e-8 * chain / (16 if arch >= 90 else 8))


def edge_scores_work(case: Case, device: str, fast: str, compiled: bool) -> Work:
    model, dtype = case.model, case.dtype
    receivers = case.receivers or model.R
    shape = (case.batch, case.tokens, model.D)
    delta = torch.randn(model.S, *shape, dtype=dtype, device=device)
    grads = torch.randn(receivers, *shape, dtype=dtype, device=device)
    mask = model.mask().to(device) if case.receivers == 0 else None
    # Hook-based tools keep [batch, position, component, d_model].
    delta_hooks = delta.permute(1, 2, 0, 3).contiguous()
    grads_hooks = grads.permute(1, 2, 0, 3).contiguous()

    def hooks(d: Tensor, g: Tensor) -> Tensor:
        return torch.einsum("bpsd,bprd->sr", d, g)

    def run(precision: str) -> Run:
        return lambda: kernels.edge_scores(delta, grads, mask=mask, precision=precision, impl=fast)

    providers = {fast: run("ieee")}
    if fast == "triton" and dtype == torch.float32:
        providers["triton, tf32x3"] = run("tf32x3")
    keep = 1 if mask is None else mask  # hook-based tools compute every pair, then drop those that are no edges
    providers["torch.matmul"] = lambda: (delta.flatten(1) @ grads.flatten(1).T) * keep
    providers["torch.einsum, hooks"] = lambda: hooks(delta_hooks, grads_hooks) * keep
    if compiled:
        fused = torch.compile(hooks, dynamic=False)
        providers["torch.compile, hooks"] = lambda: fused(delta_hooks, grads_hooks) * keep

    some_s = torch.randperm(model.S)[:32].to(device)
    some_r = torch.randperm(receivers)[:32].to(device)
    sample = torch.einsum("sbtd,rbtd->sr", delta[some_s].double(), grads[some_r].double())
    edges = torch.ones_like(sample, dtype=torch.bool) if mask is None else mask[some_s][:, some_r]

    def check(got: Tensor) -> float:
        if mask is not None and bool((got[~mask] != 0).any()):
            return float("inf")
        return relative(got[some_s][:, some_r] * edges, sample * edges)

    n_edges = model.S * receivers if mask is None else int(mask.sum())
    inner = case.batch * case.tokens * model.D
    moved = size_of(delta, grads) + model.S * receivers * 4
    limit, tile_operations = 1e-5, None
    if fast == "triton":
        from eapcore.kernels import triton_common, triton_edge_scores

        plan = triton_edge_scores.plan_of(triton_edge_scores.layout(delta, grads, "all", None), mask is not None)
        limit = allowed_error(dtype, plan.chain, triton_common.target(delta.device).arch)
        if mask is not None:
            tile_operations = 2 * edge_tile_pairs(mask, plan.config.block_s, plan.config.block_r) * inner
    return Work(providers, check, limit, 2 * n_edges * inner, moved, tile_operations)


def layer_tensors(case: Case, device: str) -> tuple[Tensor, Tensor, Tensor, Norm, Tensor, Tensor]:
    """Arguments of receiver_grads that belong together, made in float32 and rounded once."""
    model, channels = case.model, 3 * case.model.H
    x_hat = torch.randn(case.batch, case.tokens, model.D, device=device)
    x_hat = (x_hat - x_hat.mean(-1, keepdim=True)) / x_hat.std(-1, keepdim=True, correction=0)
    weight = torch.randn(channels, model.D, model.K, device=device) / model.D**0.5
    gamma, beta = torch.rand(model.D, device=device) + 0.5, torch.randn(model.D, device=device)
    bias = torch.randn(channels, model.K, device=device)
    g = torch.randn(channels, case.batch, case.tokens, model.K, device=device)
    act = torch.einsum("btd,cdk->cbtk", x_hat * gamma + beta, weight) + bias[:, None, None]
    w_gamma, offset = kernels.receiver_constants(weight, bias, gamma, beta)
    rstd = torch.rand(case.batch, case.tokens, device=device) + 0.5
    dtype = case.dtype
    norm = Norm("layernorm", x_hat.to(dtype), rstd, gamma.to(dtype))
    return g.to(dtype), act.to(dtype), weight.to(dtype), norm, w_gamma.to(dtype), offset.to(dtype)


def receiver_grads_work(case: Case, device: str, fast: str, compiled: bool) -> Work:
    g, act, weight, norm, w_gamma, offset = layer_tensors(case, device)
    assert norm.x_hat is not None and norm.rstd is not None and norm.gamma is not None
    model, channels = case.model, g.shape[0]

    def closed(
        g: Tensor,
        act: Tensor,
        weight: Tensor,
        x_hat: Tensor,
        rstd: Tensor,
        gamma: Tensor,
        w_gamma: Tensor,
        offset: Tensor,
    ) -> Tensor:
        c1 = (g * w_gamma[:, None, None]).sum(-1, keepdim=True) / model.D
        c2 = (g * (act - offset[:, None, None])).sum(-1, keepdim=True) / model.D
        product = (g.flatten(1, 2) @ weight.transpose(1, 2)).view(channels, *x_hat.shape)
        return (rstd[..., None] * (gamma * product - c1 - c2 * x_hat)).to(g.dtype)

    args = (g, act, weight, norm.x_hat, norm.rstd, norm.gamma, w_gamma, offset)

    def run(impl: str) -> Run:
        return lambda: kernels.receiver_grads(g, act, weight, norm=norm, w_gamma=w_gamma, offset=offset, impl=impl)

    providers = {fast: run(fast)}
    providers["torch, definition"] = run("reference")
    providers["torch, closed form"] = lambda: closed(*args)
    if compiled:
        fused = torch.compile(closed, dynamic=False)
        providers["torch.compile, closed form"] = lambda: fused(*args)

    some = torch.randperm(channels)[:4].to(device)
    wide = Norm(norm.kind, norm.x_hat.double(), norm.rstd.double(), norm.gamma.double())
    exact = reference.receiver_grads(g[some].double(), weight[some].double(), wide)
    limit = 1e-5 if case.dtype == torch.float32 else 2.0**-8
    rows = case.batch * case.tokens
    moved = size_of(g, act, weight, norm.x_hat) + channels * rows * model.D * g.element_size()
    return Work(
        providers, lambda got: relative(got[some], exact), limit, 2 * channels * rows * model.K * model.D, moved
    )


def factored_work(case: Case, device: str, fast: str, compiled: bool) -> Work:
    model, dtype = case.model, case.dtype
    layers = [layer_tensors(case, device) for _ in range(model.L)]
    stream = (case.batch, case.tokens, model.D)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    senders = FactoredSenders(
        embed=random(*stream),
        dz=random(model.L, case.batch, case.tokens, model.H, model.K),
        w_o=[(torch.randn(model.H, model.K, model.D, device=device) / model.K**0.5).to(dtype) for _ in layers],
        mlp=random(model.L, *stream),
    )
    receivers = FactoredReceivers(
        g=torch.stack([layer[0] for layer in layers]),
        act=torch.stack([layer[1] for layer in layers]),
        weight=[[layer[2]] for layer in layers],
        norms=[layer[3] for layer in layers],
        w_gamma=torch.stack([layer[4] for layer in layers]),
        offset=torch.stack([layer[5] for layer in layers]),
        logits=random(*stream),
        mlp=random(model.L, *stream),
    )
    mask = model.mask().to(device)

    def two_steps(impl: str) -> Tensor:
        parts = []
        for i, (g, act, weight, norm, w_gamma, offset) in enumerate(layers):
            parts.append(kernels.receiver_grads(g, act, weight, norm=norm, w_gamma=w_gamma, offset=offset, impl=impl))
            parts.append(receivers.mlp[i : i + 1])  # type: ignore[index]
        grads = torch.cat([*parts, receivers.logits[None]])
        return kernels.edge_scores(reference.sender_deltas(senders), grads, mask=mask, impl=impl)

    def run(impl: str) -> Run:
        return lambda: kernels.edge_scores_factored(senders, receivers, mask=mask, impl=impl)

    providers: dict[str, Run] = {fast: run(fast), f"{fast}, made in memory": lambda: two_steps(fast)}
    providers["torch, definition"] = run("reference")

    some_s = torch.randperm(model.S)[:32].to(device)
    some_r = torch.randperm(model.R)[:32].to(device)
    delta = reference.sender_deltas(senders)[some_s].double()
    grads = reference.all_receiver_grads(receivers)[some_r].double()
    exact = torch.einsum("sbtd,rbtd->sr", delta, grads) * mask[some_s][:, some_r]
    # What is made in bfloat16 carries one rounding of each factor; the sample above is made so itself.
    limit = 1e-4 if dtype == torch.float32 else 2.0**-7
    inner = case.batch * case.tokens * model.D
    make = 2 * model.L * 4 * model.H * model.K * inner
    moved = size_of(senders.embed, senders.dz, *senders.w_o, receivers.g, receivers.act, receivers.logits)
    moved += sum(size_of(w) for groups in receivers.weight for w in groups)
    moved += 3 * model.L * inner * senders.dz.element_size() + mask.numel() * 4  # both MLP sides and x̂
    return Work(
        providers,
        lambda got: relative(got[some_s][:, some_r], exact),
        limit,
        2 * int(mask.sum()) * inner + make,
        moved,
    )


WORK = {
    "edge_scores": edge_scores_work,
    "receiver_grads": receiver_grads_work,
    "edge_scores_factored": factored_work,
}


class Clock:
    """Milliseconds of one call. kind: "cpu" or "cuda"; device: where tensors lie."""

    def __init__(self, kind: str) -> None:
        self.kind = self.device = kind
        self.flush = torch.empty(256 << 20, dtype=torch.uint8, device=kind) if kind == "cuda" else None

    def __call__(self, run: Run) -> float:
        if self.flush is None:
            start = time.process_time()
            run()
            return (time.process_time() - start) * 1e3 / torch.get_num_threads()
        self.flush.zero_()
        torch.cuda._sleep(2_000_000)  # a millisecond in which the host launches what is timed
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end)

    def describe(self) -> str:
        if self.kind == "cuda":
            name = torch.cuda.get_device_name()
        else:
            isa = "" if cpp.why_not() else f", {cpp.isa()}"
            name = f"{platform.machine()}, {torch.get_num_threads()} threads{isa}"
        return f"{self.kind}: {name}; torch {torch.__version__}, Python {platform.python_version()}"


def machine_rates(clock: Clock, quick: bool, attempt: Attempt) -> dict[str, float]:
    """Bytes a second when copying, operations a second of a large square product of each dtype; NaN if not known."""
    cuda = clock.kind == "cuda"
    rates = {"copy": float("nan"), "torch.float32": float("nan"), "torch.bfloat16": float("nan")}

    def copying() -> None:
        source = torch.randn((1 << 20) if quick else (256 << 20 if cuda else 64 << 20), device=clock.device)
        target = torch.empty_like(source)
        rates["copy"] = 2 * size_of(source) / min(clock(lambda: target.copy_(source)) for _ in range(7)) * 1e3

    def multiplying(dtype: torch.dtype) -> None:
        side = 256 if quick else 8192 if cuda else 2048
        a = torch.randn(side, side, device=clock.device).to(dtype)
        rates[str(dtype)] = 2 * side**3 / min(clock(lambda: a @ a) for _ in range(5)) * 1e3

    attempt("copy rate", copying)
    for dtype in (torch.float32, torch.bfloat16):
        attempt(f"matmul rate {dtype}", lambda dtype=dtype: multiplying(dtype))
    return rates


def measure(
    case: Case, clock: Clock, rates: dict[str, float], rounds: int, seconds: float, compiled: bool
) -> list[dict]:
    """Check, then time: the rows of one case. One of PyTorch's ways that cannot run is left out, and said so."""
    work = WORK[case.op](case, clock.device, fast_implementation(clock.kind), compiled)
    errors: dict[str, float] = {}
    for name, run in work.providers.items():
        try:
            errors[name] = work.check(run())
        except Exception as error:
            if "torch" not in name:
                raise
            print(f"\n{name} left out of {case.op} {case.name} {case.dtype}: {first_line(error)}", flush=True)
    for name, error in errors.items():
        if "torch" not in name and not error <= work.limit:
            raise RuntimeError(f"{case.op} {name} on {case.name} {case.dtype}: error {error:.2e} > {work.limit:.2e}")
    times: dict[str, list[float]] = {name: [] for name in errors}
    begin = time.perf_counter()
    for turn in range(rounds + 1):
        for name in times:
            ms = clock(work.providers[name])
            if turn > 0:  # the first round warms up
                times[name].append(ms)
        if turn >= 3 and time.perf_counter() - begin > seconds:
            break
    medians = {name: statistics.median(values) for name, values in times.items()}
    best = min((ms for name, ms in medians.items() if "torch" in name), default=float("nan"))
    rows = []
    for name, values in times.items():
        quartiles = statistics.quantiles(values, n=4)
        ms = max(medians[name], 1e-6)
        matmul = work.operations if "torch" in name else work.tile_operations or work.operations
        rows.append(
            {
                "op": case.op,
                "shape": case.name,
                "dtype": str(case.dtype).removeprefix("torch."),
                "provider": name,
                "ms": ms,
                "spread_ms": (quartiles[2] - quartiles[0]) / 2,
                "rounds": len(values),
                "times_torch": best / ms,
                "error": errors[name],
                "operations": work.operations,
                "bytes": work.bytes,
                "gops": work.operations / ms / 1e6,
                "of_matmul": matmul / ms * 1e3 / rates[str(case.dtype)],
                "gbytes": work.bytes / ms / 1e6,
                "of_copy": work.bytes / ms * 1e3 / rates["copy"],
                "device": clock.kind,
            }
        )
    return rows


KERNELS = {"partial_scores", "sum_splits", "zero_non_edges", "channel_grads"}


def check_every_kernel(clock: Clock) -> None:
    """Every op on small odd shapes: each dtype, reduce and precision, masks, token rows, rows that do not start at
    multiples of 16 bytes. With Triton each of the package's kernels must have run. Raises for a wrong result."""
    fast, device = fast_implementation(clock.kind), clock.device
    seen: set[str] = set()
    if fast == "triton":
        from eapcore.kernels import triton_common

        launch = triton_common.launch

        def recorded(kernel: Any, *args: Any, **meta: Any) -> None:
            seen.add(kernel.fn.__name__)
            launch(kernel, *args, **meta)

        triton_common.launch = recorded
    try:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for width in (40, 37):
                check_edge_scores(fast, device, dtype, width)
        for dtype in (torch.float32, torch.bfloat16):
            for op in ("receiver_grads", "edge_scores_factored"):
                work = WORK[op](Case(op, TINY, 0, 2, 5, dtype), device, fast, False)
                for name, run in work.providers.items():
                    if "torch" not in name and not work.check(run()) <= work.limit:
                        raise RuntimeError(f"{op} {name} {dtype}: wrong")
    finally:
        if fast == "triton":
            triton_common.launch = launch
    missing = KERNELS - seen if fast == "triton" else set()
    if missing:
        raise RuntimeError(f"not every kernel ran: {', '.join(sorted(missing))} did not")


def check_edge_scores(fast: str, device: str, dtype: torch.dtype, width: int) -> None:
    delta = torch.randn(67, 2, 5, width, device=device).to(dtype)
    grads = torch.randn(70, 2, 5, width, device=device).to(dtype)
    mask = torch.rand(67, 70, device=device) < 0.3
    some = torch.tensor([9, 2, 3], device=device)
    whole, short = slice(None), slice(1)  # short: one program adds up all of it, on any device, and writes the result
    calls = [
        (whole, reduce, edges, rows)
        for reduce in ("all", "pair", "position")
        for edges, rows in ((None, None), (mask, None), (mask, some))
    ]
    for part, reduce, edges, rows in [*calls, (short, "all", mask, None)]:
        d, g = (x[:, part, part, : 32 if part is short else width] for x in (delta, grads))
        exact = reference.edge_scores(d.double(), g.double(), edges, reduce, rows)
        for precision in ("ieee", "tf32x3") if fast == "triton" and dtype == torch.float32 else ("ieee",):
            got = kernels.edge_scores(d, g, mask=edges, reduce=reduce, rows=rows, precision=precision, impl=fast)
            error = relative(got, exact)
            if not error <= 1e-5 or (edges is not None and bool((got[..., ~edges] != 0).any())):
                raise RuntimeError(
                    f"edge_scores {fast} {dtype} D={d.shape[3]} reduce={reduce} {precision}: error {error:.2e}"
                )


def print_rows(rows: list[dict]) -> None:
    first = rows[0]
    print(
        f"\n{first['op']}  {first['shape']}  {first['dtype']}  ({first['operations']:.3g} op, {first['bytes']:.3g} B)"
    )
    print(
        f"  {'':28}{'ms':>10}{'+-':>8}{'x torch':>9}{'error':>10}{'Gop/s':>10}{'% matmul':>10}{'GB/s':>8}{'% copy':>8}"
    )
    for row in rows:
        print(
            f"  {row['provider']:28}{row['ms']:10.3f}{row['spread_ms']:8.3f}{row['times_torch']:9.2f}"
            f"{row['error']:10.1e}{row['gops']:10.1f}{100 * row['of_matmul']:10.1f}"
            f"{row['gbytes']:8.1f}{100 * row['of_copy']:8.1f}",
            flush=True,
        )


def print_summary(rows: list[dict], asked: dict[tuple[str, str, str], tuple[str, float]]) -> None:
    """One line for each case: the ratio to PyTorch's fastest way, and the share that is asked for."""
    print("\nSummary")
    for row in rows:
        if "torch" in row["provider"]:
            continue
        line = f"  {row['op']}  {row['shape']}  {row['dtype']}  {row['provider']}: {row['times_torch']:.2f} x torch"
        figure = asked.get((row["op"], row["shape"], row["dtype"]))
        if figure is not None:
            name, least = figure
            holds = "holds" if row[name] >= least else "falls short"
            of = "matmul's rate" if name == "of_matmul" else "the copy rate"
            line += f"; {100 * row[name]:.1f} % of {of}, asked {100 * least:.0f}: {holds}"
        print(line)


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def main(arguments: list[str] | None = None) -> int:
    """Run what the arguments ask for; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="tiny shapes")
    parser.add_argument(
        "--check-only", action="store_true", help="run every kernel once on small odd shapes, time nothing"
    )
    parser.add_argument("--compile", action="store_true", help="print the table of compiled Triton kernels instead")
    parser.add_argument("--no-torch-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--only", default="", help="cases whose op, shape or dtype contains this")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--minutes", type=float, help="begin no case after this long; 8 on a GPU, else as long as it takes"
    )
    parser.add_argument("--json", type=Path, help="write the rows here, one JSON object a line")
    options = parser.parse_args(arguments)
    if options.compile:
        sys.path.insert(0, str(Path(__file__).parent))
        import triton_compile

        triton_compile.main([])
        return 0
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.minutes is None:
        options.minutes = 8.0 if options.device == "cuda" else float("inf")
    begin = time.perf_counter()
    torch.manual_seed(0)
    clock = Clock(options.device)
    failures: list[str] = []

    def attempt(what: str, run: Callable[[], None]) -> None:
        """A failure is reported at once and at the end, and costs nothing but itself."""
        try:
            run()
        except Exception as error:
            traceback.print_exc()
            failures.append(f"{what}: {first_line(error)}")
            write({"failed": failures[-1]})

    with contextlib.ExitStack() as stack:
        file = stack.enter_context(options.json.open("w")) if options.json else None

        def write(line: dict) -> None:
            if file is not None:
                file.write(json.dumps(line) + "\n")
                file.flush()

        print(clock.describe(), flush=True)
        attempt("checks", lambda: check_every_kernel(clock))
        if not failures:
            print("every op is right on small odd shapes", flush=True)
        if not options.check_only:
            time_cases(options, clock, begin, attempt, write, failures)
    for failure in failures:
        print(f"FAILED {failure}", flush=True)
    return 1 if failures else 0


def time_cases(
    options: argparse.Namespace,
    clock: Clock,
    begin: float,
    attempt: Attempt,
    write: Callable[[dict], None],
    failures: list[str],
) -> None:
    rates = machine_rates(clock, options.quick, attempt)
    print(
        f"copy {rates['copy'] / 1e9:.1f} GB/s; matmul float32 {rates['torch.float32'] / 1e9:.1f}, "
        f"bfloat16 {rates['torch.bfloat16'] / 1e9:.1f} Gop/s; warm-up 1 round, then up to {options.rounds} rounds"
    )
    write({"machine": clock.describe(), "rates": rates})
    rows: list[dict] = []
    asked: dict[tuple[str, str, str], tuple[str, float]] = {}
    rounds, seconds = (3 if options.quick else options.rounds), 6.0

    def one(case: Case) -> None:
        # Compiling takes up to a minute a shape: on a GPU, where minutes are counted, for the smallest model alone.
        compiled = not (options.quick or options.no_torch_compile or (clock.kind == "cuda" and case.model != SMALL))
        new = measure(case, clock, rates, rounds, seconds, compiled)
        rows.extend(new)
        if case.asked:
            asked[case.op, case.name, str(case.dtype).removeprefix("torch.")] = case.asked
        for row in new:
            write(row)
        print_rows(new)

    for case in cases(clock.kind, options.quick):
        what = f"{case.op} {case.name} {case.dtype}"
        if options.only not in what:
            continue
        if time.perf_counter() - begin > 60 * options.minutes:
            failures.append(f"{what}: not begun, the {options.minutes:g} minutes were over")
            continue
        attempt(what, lambda case=case: one(case))
        gc.collect()
        if clock.device == "cuda":
            torch.cuda.empty_cache()
    print_summary(rows, asked)


if __name__ == "__main__":
    sys.exit(main())
