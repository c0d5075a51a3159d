"""Contraction, receivers' gradients and attention in every tiling on shapes of real models: what `Config`s to have.

    python bench/ops/tilings.py                       on a GPU: a minute, most of it compiling
    python bench/ops/tilings.py --quick --device cpu  small shapes in Triton's interpreter, to see that it runs
    python bench/ops/tilings.py --once                everything once, nothing timed: what is compiled is kept by Triton
    python bench/ops/tilings.py --profile             each layout once in the first tiling: for ncu to look at

Layouts of the contraction's operands: "senders" [S, B, T, D] as the op's definition has it; "tokens" the same tensors,
whose memory has B, T, S, D in this order, so that a program's rows of one position lie beside one another; "cached"
[S, 1, N, D] whose positions overlap but for eight elements, so that all of it stays in L2: what products alone allow.
Of the receivers' gradients: "tokens" has the channels of a token beside one another, and those of a row of W.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import astuple, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[n]) for n in (1, 2)]

from eapcore.kernels import attention, reference, triton_attention, triton_edge_scores, triton_receiver_grads
from eapcore.kernels.causal import Causal
from eapcore.kernels.triton_receiver_grads import Config, Walk

from ops.work import B13, MEDIUM, SMALL, TINY, XL, Model, doubled, layer_tensors

# Name, model, layers of receivers (0 for all), B·T.
SHAPES = (("XL", XL, 0, 1024), ("13B", B13, 0, 512), ("medium", MEDIUM, 0, 2048), ("small, 6 layers", SMALL, 6, 5120))
LAYOUTS = ("senders", "tokens", "cached")
TILINGS = (
    (128, 256, 64, 8, 4), (192, 256, 64, 8, 4), (192, 256, 64, 8, 3), (384, 128, 64, 8, 3), (192, 128, 64, 8, 4),
    (96, 256, 64, 8, 4), (128, 256, 64, 8, 3), (256, 128, 64, 8, 4), (128, 128, 64, 8, 4), (128, 128, 64, 4, 3),
)  # fmt: skip
# One of `channel_grads`, eight of `tile_grads`.
RECEIVERS = (
    Config(64, 64, 128, 4, 3), Walk(64, 128, 8, 3), Walk(64, 128, 8, 4), Walk(128, 64, 8, 4), Walk(64, 64, 4, 3),
    Walk(64, 64, 4, 4), Walk(64, 64, 4, 5), Walk(128, 128, 8, 3), Walk(128, 128, 16, 3),
)  # fmt: skip
BFLOAT16 = torch.bfloat16


def operands(model: Model, receivers: int, rows: int, layout: str, device: str) -> tuple[Tensor, Tensor]:
    """Δ and gradients in bfloat16, drawn at random, [S, 1, rows, D] and [R, 1, rows, D]."""
    made = []
    for count in (model.S, receivers):
        if layout == "cached":
            rows = min(rows, 128)
            base = torch.randn(count, model.D + 8 * rows, device=device).to(BFLOAT16)
            made.append(base.as_strided((count, 1, rows, model.D), (base.stride(0), base.stride(0), 8, 1)))
        else:
            shape = (rows, count, model.D) if layout == "tokens" else (count, rows, model.D)
            x = torch.empty(shape, device=device, dtype=BFLOAT16).normal_()
            made.append((x.transpose(0, 1) if layout == "tokens" else x)[:, None])
    return made[0], made[1]


def live_operations(mask: Tensor, tiling: tuple[int, ...], rows: int, width: int) -> int:
    """2 · pairs · rows · width of the real pairs of tiles that hold an edge."""
    pairs = 0
    for s in mask.cpu().split(tiling[0]):
        for tile in s.split(tiling[1], 1):
            pairs += tile.numel() * bool(tile.any())
    return 2 * pairs * rows * width


class Bench:
    """One line for each tiling; a tiling that fails costs its own."""

    def __init__(self, options: argparse.Namespace) -> None:
        from bench_kernels import Clock

        self.options, self.clock, self.failed = options, Clock(options.device), 0

    def line(self, run: Callable[[], Tensor], judge: Callable[[Tensor], float], work: float, **row: Any) -> None:
        """work: operations or bytes of a call."""
        try:
            row["error"] = judge(run())
            if not (self.options.profile or self.options.once):
                row["ms"] = ms = statistics.median(self.clock(run) for _ in range(5))
                row["per_second"] = work / ms * 1e3
        except Exception as error:
            self.failed += 1
            row["failed"] = f"{type(error).__name__}: {error}"[:120]
        print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
        if self.options.json:
            with self.options.json.open("a") as lines:
                lines.write(json.dumps(row) + "\n")

    def receivers(self, name: str, model: Model, rows: int) -> None:
        channels, device = 3 * model.H, self.options.device
        layer = layer_tensors(channels, 1, rows, model.K, model.D, BFLOAT16, device, "layernorm")
        g, act, weight, norm, _, _ = layer
        exact = reference.receiver_grads(*doubled([g[:2], weight[:2], norm]))
        out = torch.empty(channels, 1, rows, model.D, dtype=BFLOAT16, device=device)

        def by_token(x: Tensor) -> Tensor:
            return x.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3)

        for layout in LAYOUTS[:2]:
            if layout == "tokens":
                g, act, out = by_token(g), by_token(act), by_token(out)
                weight = weight.transpose(0, 1).contiguous().transpose(0, 1)
            for config in RECEIVERS:
                given = (g, act, weight, norm, *layer[4:], out)
                self.line(
                    partial(triton_receiver_grads.receiver_grads, *given, config=config),
                    lambda got: float((got[:2] - exact).norm() / exact.norm()), out.numel() * 2,
                    op="receiver_grads", shape=name, layout=layout, kernel=type(config).__name__,
                    tiling=astuple(config),
                )  # fmt: skip

    def attention(self, name: str, model: Model, prompts: int) -> None:
        """Clean and corrupt prompts of 20 tokens, and their gradients, with other numbers of warps than are chosen."""
        how, device, sizes = Causal(model.K**-0.5), self.options.device, (20, model.H, model.K)
        q, k, v = torch.randn(3, 2 * prompts, *sizes, device=device).to(BFLOAT16).transpose(2, 3)
        exact = attention.attend(*(x.double() for x in (q, k, v)), how, 20).transpose(1, 2)
        exact[prompts:] -= exact[:prompts]
        out, chosen = torch.empty(exact.shape, dtype=BFLOAT16, device=device), triton_attention._how

        def moved() -> Tensor:
            attention.attend_moved(q, k, v, how, 20, None, out, impl="triton")
            return out

        def back() -> Tensor:
            return attention.attend_grad(q[:prompts], k[:prompts], v[:prompts], v[:prompts], how, 20, impl="triton")[0]

        for warps in (4, 2, 8):

            def with_warps(*args: Any, warps: int = warps, **options: Any) -> Any:
                numbers, meta = chosen(*args, **options)
                return numbers, meta | {"num_warps": warps}

            row = {"shape": name, "warps": warps}
            with mock.patch.object(triton_attention, "_how", with_warps):
                read = 4 * q.numel() * 2
                self.line(moved, lambda got: float((got - exact).norm() / exact.norm()), read, op="attend_moved", **row)
                self.line(back, lambda got: float(got.norm()), 7 * read / 8, op="attend_grad", **row)

    def contraction(self, name: str, model: Model, mask: Tensor, rows: int, layout: str) -> None:
        delta, grads = operands(model, mask.shape[1], rows, layout, self.options.device)
        first: list[Tensor] = []

        def judge(got: Tensor) -> float:
            first.append(got)
            return float((got - first[0]).norm() / first[0].norm())

        for tiling in TILINGS[:1] if self.options.profile or layout != "tokens" else TILINGS:
            small = (64, 64, 32, *tiling[3:]) if self.options.quick else tiling
            config = replace(triton_edge_scores.Config(*small, rate=1.0), per_sm=2 if small[3] == 4 else 1)
            run = partial(triton_edge_scores.edge_scores, delta, grads, mask, "all", None, config=config)
            work = live_operations(mask, small, delta.shape[2], model.D)
            self.line(run, judge, work, op="edge_scores", shape=name, layout=layout, tiling=small)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny shapes")
    parser.add_argument("--once", action="store_true", help="time nothing")
    parser.add_argument("--profile", action="store_true", help="the contraction once in each layout, nothing timed")
    parser.add_argument("--only", default="", help="shapes whose name contains this")
    parser.add_argument("--json", type=Path, help="write the rows here, one JSON object a line")
    options = parser.parse_args(arguments)
    bench, quick = Bench(options), options.quick
    for name, model, rows in (("small", SMALL, 5120), ("XL", XL, 640), ("13B", B13, 160)):
        if options.only in name and not options.profile:
            bench.receivers(name, TINY if quick else model, 10 if quick else rows)
            bench.attention(name, TINY if quick else model, 2 if quick else rows // 20)
    for name, model, layers, rows in SHAPES:
        model, rows, layers = (TINY, 10, min(layers, 1)) if quick else (model, rows, layers)
        mask = model.graph.edge_mask().to(options.device)
        if layers:  # the last but one layers: the last one's gradients lie at the positions that are read
            each = 3 * model.H + 1
            mask = mask[:, -1 - each * (layers + 1) : -1 - each]
        for layout in LAYOUTS:
            if options.only in name:
                bench.contraction(name, model, mask, rows, layout)
            if options.device == "cuda":
                torch.cuda.empty_cache()
    return int(bench.failed > 0)


if __name__ == "__main__":
    sys.exit(main())
