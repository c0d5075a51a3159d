"""Every op on small odd shapes, in every variant of its kernels, against float64: what bench_kernels.py does first."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import eapcore.kernels as kernels
import torch
from eapcore.kernels import checks, cpp, reference, steps
from eapcore.kernels.attention import attend, attend_grad, attend_moved
from eapcore.kernels.causal import Causal, ReceiverSums
from torch import Tensor

from ops import work
from ops.work import Case, Model, doubled, relative

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Where a result is stored in half precision, its own rounding.
STORED = {torch.float32: 1e-5, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# Norm, K, and whether all rows start at multiples of 16 bytes: every tiling and every epilogue of the kernel.
CHANNELS = (
    ("layernorm", 64, True), ("rmsnorm", 64, True), ("none", 64, True), ("layernorm", 128, True),
    ("rmsnorm", 256, True), ("layernorm", 60, False), ("none", 128, False),
)  # fmt: skip
# Layers of unlike norms, whose receivers no single launch makes.
FACTORED = Model("K = 128", 3, 1, 128)


def variant(kernel: str, meta: dict[str, Any], args: tuple[Any, ...]) -> str:
    """What tells apart the code that one kernel is compiled to, as far as the checks must have run it."""
    if "KIND" not in meta or kernel == "channel_sums":
        return kernel
    dtype = str(getattr(args[0], "base", args[0]).dtype).removeprefix("torch.")
    return f"{kernel} {dtype} {meta['KIND']}{', sums given' if meta.get('HAS_SUMS') else ''}"


STEPS = {
    "attend_rows", "query_grads", "key_grads",
    "normalise_rows", "standardise_rows", "normalise_grad_rows", "unit_rows", "sum_rows",
    "gated_grads", "turn_rows",
}  # fmt: skip
VARIANTS = {"partial_scores", "sum_splits", "zero_non_edges", *STEPS} | {
    f"channel_grads {str(dtype).removeprefix('torch.')} {kind}"
    for dtype in DTYPES
    for kind in (*checks.NORMS, *(f"{kind}, sums given" for kind in checks.NORMS if kind != "none"))
}
# Where there are tensor descriptors.
WALKED = {"channel_sums"} | {f"tile_grads {dtype} {kind}" for dtype in ("bfloat16", "float16") for kind in checks.NORMS}


def check_every_kernel(kind: str, device: str, only: str = "") -> None:
    """Each dtype, or those whose name contains `only`, reduce and precision, masks, token rows, norms, long heads, rows
    that do not start at multiples of 16 bytes. With Triton each variant of the package's kernels must have run. Raises
    for a wrong result."""
    fast = work.fast_implementation(kind)
    seen: set[str] = set()
    if fast == "triton":
        from eapcore.kernels import triton_common

        launch = triton_common.launch

        def recorded(kernel: Any, programs: int, *args: Any, **meta: Any) -> None:
            seen.add(variant(kernel.fn.__name__, meta, args))
            launch(kernel, programs, *args, **meta)

        triton_common.launch = recorded
    try:
        for dtype in (dtype for dtype in DTYPES if only in str(dtype)):
            for width in (40, 37):
                check_edge_scores(fast, device, dtype, width)
            if fast == "cpp" and not cpp.supports("receiver_grads", dtype):
                continue
            for norm, d_head, aligned in CHANNELS:
                check_receiver_grads(fast, device, dtype, norm, d_head, aligned)
            for reduce in checks.REDUCE:
                check_factored(fast, device, dtype, reduce)
            if fast == "triton":
                check_steps(device, dtype)
                check_attention(device, dtype)
    finally:
        if fast == "triton":
            triton_common.launch = launch
    expected = VARIANTS if fast == "triton" else set()
    if fast == "triton" and triton_common.target(torch.device(device)).descriptors:
        expected = expected | WALKED
    left_out = [f" {str(dtype).removeprefix('torch.')} " for dtype in DTYPES if only not in str(dtype)]
    expected = {name for name in expected if not any(dtype in f"{name} " for dtype in left_out)}
    if missing := expected - seen:
        raise RuntimeError(f"not every kernel ran: {', '.join(sorted(missing))} did not")


def judge(what: str, got: Tensor, exact: Tensor, limit: float, mask: Tensor | None = None) -> None:
    error = relative(got, exact)
    if not error <= limit or (mask is not None and bool((got[..., ~mask] != 0).any())):
        raise RuntimeError(f"{what}: error {error:.2e}")


def precisions(fast: str, dtype: torch.dtype) -> tuple[str, ...]:
    return checks.PRECISIONS[1:] if fast == "triton" and dtype == torch.float32 else ("ieee",)


def check_edge_scores(fast: str, device: str, dtype: torch.dtype, width: int) -> None:
    delta = torch.randn(67, 2, 5, width, device=device).to(dtype)
    grads = torch.randn(70, 2, 5, width, device=device).to(dtype)
    mask = torch.rand(67, 70, device=device) < 0.3
    some = torch.tensor([9, 2, 3], device=device)
    whole, short = slice(None), slice(1)  # short: one program adds up all of it, on any device, and writes the result
    calls = [
        (whole, reduce, edges, rows)
        for reduce in checks.REDUCE
        for edges, rows in ((None, None), (mask, None), (mask, some))
    ]
    for part, reduce, edges, rows in [*calls, (short, "all", mask, None)]:
        d, g = (x[:, part, part, : 32 if part is short else width] for x in (delta, grads))
        exact = reference.edge_scores(d.double(), g.double(), edges, reduce, rows)
        for precision in precisions(fast, dtype):
            got = kernels.edge_scores(d, g, mask=edges, reduce=reduce, rows=rows, precision=precision, impl=fast)
            judge(f"edge_scores {fast} {dtype} D={d.shape[3]} reduce={reduce} {precision}", got, exact, 1e-5, edges)


def check_receiver_grads(fast: str, device: str, dtype: torch.dtype, kind: str, d_head: int, aligned: bool) -> None:
    d_model = 96 if aligned else 75
    layer = work.layer_tensors(2, 2, 37, d_head, d_model, dtype, device, kind)
    g, act, weight, norm, w_gamma, offset = layer
    exact = reference.receiver_grads(*doubled([g, weight, norm]))
    got = kernels.receiver_grads(g, act, weight, norm=norm, w_gamma=w_gamma, offset=offset, impl=fast)
    judge(f"receiver_grads {fast} {dtype} {kind} K={d_head} D={d_model}", got, exact, STORED[dtype])
    if fast == "triton" and kind != "none":  # of the stream itself, with sums that are there already
        assert norm.x_hat is not None and norm.rstd is not None
        sums = given_sums(layer)
        mean = torch.randn(2, 37, device=device) if kind == "layernorm" else None
        x = norm.x_hat.float() / norm.rstd[..., None] + (0 if mean is None else mean[..., None])
        raw = kernels.Norm(kind, None, norm.rstd, norm.gamma, x, mean)
        got = kernels.receiver_grads(g, act, weight, norm=raw, w_gamma=w_gamma, offset=offset, sums=sums, impl=fast)
        judge(f"receiver_grads {dtype} {kind} K={d_head} D={d_model}, sums given", got, exact, STORED[dtype])


def given_sums(layer: work.Layer) -> Tensor:
    """What `receiver_grads` takes as sums, [C, 2, B, T]."""
    g, act, weight, _, w_gamma, offset = layer
    wide, w, a, b = doubled([g, w_gamma[:, None, None], act, offset[:, None, None]])
    return torch.stack([(wide * w).sum(-1), (wide * (a - b)).sum(-1)], 1).float() / weight.shape[1]


def check_factored(fast: str, device: str, dtype: torch.dtype, reduce: str) -> None:
    case = Case("edge_scores_factored", FACTORED, 0, 2, 5, dtype)
    layers = [
        work.layer_tensors(3 * FACTORED.H, 2, 5, FACTORED.K, FACTORED.D, dtype, device, kind) for kind in checks.NORMS
    ]
    senders, receivers = work.factored_tensors(case, layers, device)
    mask = FACTORED.mask().to(device)
    exact = reference.edge_scores_factored(*doubled([senders, receivers]), mask, reduce)
    for precision in precisions(fast, dtype):
        for chunk in (None, 4):
            got = kernels.edge_scores_factored(
                senders, receivers, mask=mask, reduce=reduce, chunk=chunk, precision=precision, impl=fast
            )
            what = f"edge_scores_factored {fast} {dtype} reduce={reduce} chunk={chunk} {precision}"
            judge(what, got, exact, 2 * STORED[dtype], mask)  # a rounding of both factors
    if fast == "triton":
        sums = [None if layer[3].kind == "none" else given_sums(layer) for layer in layers]
        acts = zip(receivers.act, sums, strict=True)
        known = replace(receivers, sums=sums, act=[act if given is None else None for act, given in acts])
        got = kernels.edge_scores_factored(senders, known, mask=mask, reduce=reduce, chunk=4, impl=fast)
        judge(f"edge_scores_factored {dtype} reduce={reduce}, sums given", got, exact, 2 * STORED[dtype], mask)


def check_steps(device: str, dtype: torch.dtype) -> None:
    def draw(*shape: int) -> tuple[Tensor, Tensor]:
        """A tensor, and the same in float64."""
        x = torch.randn(*shape, device=device).to(dtype)
        return x, x.double()

    for width, centred in ((40, True), (37, False)):
        (x, wide), (grad, wide_grad), (gamma, wide_gamma) = draw(1, 3, width), draw(1, 3, width), draw(width)
        beta, wide_beta = draw(width) if centred else (None, None)
        exact, mean, rstd = steps.normalise(wide, wide_gamma, wide_beta, 1e-5, centred=centred)
        got, *statistics = steps.normalise(x, gamma, beta, 1e-5, centred=centred, impl="triton")
        judge(f"normalise {dtype} D={width}", got, exact, STORED[dtype])
        got = steps.standardise(x, *statistics, impl="triton")
        judge(f"standardise {dtype} D={width}", got, steps.standardise(wide, mean, rstd), STORED[dtype])
        got = steps.normalise_grad(grad, x, *statistics, gamma, beta, frozen=not centred, impl="triton")
        exact = steps.normalise_grad(wide_grad, wide, mean, rstd, wide_gamma, wide_beta, frozen=not centred)
        judge(f"normalise_grad {dtype} D={width}", got, exact, STORED[dtype])
        added = steps.normalise_grad_added(
            grad, x, *statistics, gamma, beta, wide.float(), frozen=not centred, out=got, impl="triton"
        )
        for made in added:
            judge(f"normalise_grad_added {dtype} D={width}", made, wide + exact, STORED[dtype])
    for act_fn, gated in zip(steps.ACTIVATIONS, (False, True, False, True), strict=True):
        (hidden, wide), (up, wide_up) = draw(1, 6, 37), draw(1, 6, 37) if gated else (None, None)
        got = steps.moved_units(hidden, up, act_fn, 2, impl="triton")
        judge(f"moved_units {dtype} {act_fn}", got, steps.moved_units(wide, wide_up, act_fn, 2), STORED[dtype])
        (grad, wide_grad), (up, wide_up) = draw(1, 6, 37), draw(1, 6, 37)
        made = steps.gated_grad(grad, hidden, up, act_fn, impl="triton")
        for got, exact in zip(made, steps.gated_grad(wide_grad, wide, wide_up, act_fn), strict=True):
            judge(f"gated_grad {dtype} {act_fn}", got, exact, STORED[dtype])
    x, wide = draw(2, 3, 5, 12)
    frequencies = torch.tensor([1.0, 0.1, 1e-4, 1e-5], dtype=torch.float64, device=device)
    for adjacent in (False, True):
        got = steps.turn(x, frequencies, 50_000, adjacent=adjacent, impl="triton")
        judge(f"turn {dtype}", got, steps.turn(wide, frequencies, 50_000, adjacent=adjacent), STORED[dtype])
    drawn = [draw(*shape) for shape in ((1, 6, 37), (1, 4, 37), (1, 2, 37), (37,))]
    got = steps.moved_sum(*(x for x, _ in drawn), impl="triton")
    exact = steps.moved_sum(*(wide.clone() for _, wide in drawn))
    judge(f"moved_sum {dtype}", got, exact, STORED[dtype])
    norm = (drawn[-1][0], drawn[-1][0], 1e-5)
    got, (n, *_) = steps.moved_sum_normalised(*(x for x, _ in drawn), *norm, centred=True, impl="triton")
    judge(f"moved_sum_normalised {dtype}", got, exact, STORED[dtype])
    there = steps.normalise(got.double(), drawn[-1][1], drawn[-1][1], 1e-5, centred=True)[0]
    judge(f"moved_sum_normalised {dtype}, n", n, there, STORED[dtype])


def check_attention(device: str, dtype: torch.dtype) -> None:
    read = torch.tensor([[0, 4], [0, 4]], device=device)  # two prompts
    windowed, capped = Causal(0.4, window=4), Causal(0.4, softcap=2.0)
    for tokens, past, where, how in ((5, 3, None, windowed), (5, 2, read, capped), (70, 3, None, windowed)):
        q, dz = (torch.randn(2, 2, tokens if where is None else 2, 20, device=device).to(dtype) for _ in range(2))
        k, v = (torch.randn(2, 1, past + tokens, 20, device=device).to(dtype) for _ in range(2))
        wide = [x.double() for x in (q, k, v, dz)]
        got = attend(q, k, v, how, tokens, where, impl="triton")
        judge(f"attend {dtype} {how}", got, attend(*wide[:3], how, tokens, where), 1e-5)
        paired, there = (torch.empty_like(got.transpose(1, 2), dtype=kind) for kind in (dtype, torch.float64))
        attend_moved(q, k, v, how, tokens, where, paired, impl="triton")
        attend_moved(*wide[:3], how, tokens, where, there)
        judge(f"attend_moved {dtype} {how}", paired, there, STORED[dtype])
        made = attend_grad(q, k, v, dz, how, tokens, where, impl="triton")
        for got, exact in zip(made, attend_grad(*wide, how, tokens, where), strict=True):
            judge(f"attend_grad {dtype} {how}", got, exact, 2 * STORED[dtype])
        if where is None:
            constants = torch.randn(2, 6, 20, device=device).to(dtype)
            rooms = [torch.empty(6, 2, 2, tokens, dtype=x, device=device) for x in (torch.float32, torch.float64)]
            sums, there = (ReceiverSums(x, *constants, 7) for x in rooms)
            made = attend_grad(q, k, v, dz, how, tokens, sums=sums, impl="triton")
            there.fill(doubled(made), doubled((q, k[:, :, past:], v[:, :, past:])))
            judge(f"attend_grad {dtype} {how}, sums", sums.out, there.out, 1e-5)
