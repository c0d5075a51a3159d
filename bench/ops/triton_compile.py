"""Compile every Triton kernel in every tiling for GPUs that need not be there, and print what came out.

    python bench/ops/triton_compile.py                      the table, all targets
    python bench/ops/triton_compile.py --target sm_90       one target
    python bench/ops/triton_compile.py --json               one JSON object a line

The launchers of eapcore.kernels run on meta tensors of real sizes, with the device's description replaced and every
launch turned into a compilation: what is compiled is what would be launched, specialisation included. Each target has a
process of its own, in which Triton sees a driver that names that target, and a compilation cache of its own.

spills: bytes of local memory (NVIDIA: stack and local; AMD: private segment), 0 if everything fits in registers.
tensor: tensor-core instructions (mma.sync, wgmma, tcgen05.mma in the PTX; v_mfma in AMD's code). fma: float32
multiply-adds. seconds: of CPU time, this process's and those of the programs that it calls.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class Machine:
    """A device to compile for: Triton's name for it, its shared memory a program may use, and its sizes."""

    backend: str
    arch: int | str
    warp: int
    shared_limit: int
    processors: int
    memory_bytes: int
    tensor: str


MACHINES = {
    "sm_80": Machine("cuda", 80, 32, 166_912, 108, 80 << 30, r"\bmma\.sync"),
    "sm_90": Machine("cuda", 90, 32, 232_448, 132, 141 << 30, r"\bwgmma\.mma_async"),
    "sm_100": Machine("cuda", 100, 32, 232_448, 148, 180 << 30, r"\btcgen05\.mma"),
    "gfx942": Machine("hip", "gfx942", 64, 65_536, 304, 192 << 30, r"\bv_mfma"),
}


@dataclass(frozen=True, slots=True)
class Row:
    """One compiled kernel.

    case: the call that launches it. expects: "tensor" (must use tensor cores), "fma" (must not) or "" (no products).
    Sizes in bytes, spills as the module's docstring says.
    """

    target: str
    case: str
    kernel: str
    config: str
    expects: str
    registers: int
    shared: int
    shared_limit: int
    spills: int
    tensor: int
    fma: int
    seconds: float


def driver(machine: Machine) -> Any:
    """A driver that is active and names the target; nothing is ever loaded or launched through it."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    class Driver(DriverBase):
        @classmethod
        def is_active(cls) -> bool:
            return True

        def get_current_target(self) -> GPUTarget:
            return GPUTarget(machine.backend, machine.arch, machine.warp)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("meta")

        def get_benchmarker(self) -> Any:
            raise RuntimeError("nothing can be timed on a device that is not there")

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int | None = None) -> int:
            return 0

        def map_python_to_cpp_type(self, ty: str) -> str:
            return ty

    return Driver()


def _measure(asm: dict[str, Any], machine: Machine) -> tuple[int, int, int, int]:
    """Registers, spilled bytes, tensor-core instructions and multiply-adds of a compiled kernel."""
    if machine.backend == "hip":
        text = asm["amdgcn"]
        field = {
            name: max(int(n) for n in re.findall(rf"\.{name}:\s+(\d+)", text))
            for name in ("vgpr_count", "private_segment_fixed_size", "vgpr_spill_count")
        }
        spills = field["private_segment_fixed_size"] + 4 * field["vgpr_spill_count"]
        return field["vgpr_count"], spills, len(re.findall(machine.tensor, text)), len(re.findall(r"\bv_\w*fma", text))
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(asm["cubin"])
        used = subprocess.run([tools / "cuobjdump", "-res-usage", binary], capture_output=True, text=True, check=True)
    size = {name: int(re.findall(rf"\b{name}:(\d+)", used.stdout)[-1]) for name in ("REG", "STACK", "LOCAL")}
    spills = size["STACK"] + size["LOCAL"]
    ptx = asm["ptx"]
    return size["REG"], spills, len(re.findall(machine.tensor, ptx)), len(re.findall(r"\bfma\.rn\S*\.f32", ptx))


def _calls(machine: Machine) -> list[tuple[str, str, Any]]:
    """(case, what products expect, call) that together launch every kernel in every tiling and mode."""
    import torch
    from eapcore.kernels import FactoredReceivers, FactoredSenders, Norm, steps, triton_common
    from eapcore.kernels import triton_edge_scores as scores
    from eapcore.kernels import triton_factored as factored
    from eapcore.kernels import triton_receiver_grads as grads
    from eapcore.kernels.attention import attend, attend_grad, attend_moved
    from eapcore.kernels.causal import Causal, ReceiverSums

    on = triton_common.target(torch.device("meta"))

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    calls: list[tuple[str, str, Any]] = []

    def contraction(
        case: str, dtype: torch.dtype, precision: str = "ieee", reduce: str = "all", rows: bool = False,
        masked: bool = True, config: Any = None, sizes: tuple[int, ...] = (1249, 3649, 8, 64, 1600), cut: int = 0,
    ) -> None:  # fmt: skip
        s, r, b, t, d = sizes
        delta, gradients = (empty(n, b, t + cut, d + cut, dtype=dtype)[:, :, cut:, cut:] for n in (s, r))
        mask = empty(s, r, dtype=torch.bool) if masked else None
        index = empty(b * t // 2, dtype=torch.int64) if rows else None
        exact = dtype == torch.float32 and precision == "ieee" and machine.backend == "cuda"
        calls.append(
            (
                case,
                "fma" if exact else "tensor",
                lambda: scores.edge_scores(delta, gradients, mask, reduce, index, precision, config=config),
            )
        )

    half, single = torch.bfloat16, torch.float32
    for config in scores.configs(half, "ieee", on):
        contraction("edge_scores bf16, XL", half, config=config)
    contraction("edge_scores bf16, GPT-2 small, a layer", half, sizes=(157, 37, 16, 64, 768), masked=False)
    contraction(
        "edge_scores f16, 13B, per pair, rows", torch.float16, reduce="pair", rows=True, sizes=(1641, 4841, 4, 64, 5120)
    )
    contraction("edge_scores bf16, per position", half, reduce="position")
    for config in scores.configs(half, "ieee", on, aligned=False):
        contraction("edge_scores bf16, unaligned slice", half, sizes=(157, 445, 16, 60, 765), cut=3, config=config)
    for config in scores.configs(single, "ieee", on):
        contraction("edge_scores f32 ieee, XL", single, config=config)
    if machine.backend == "cuda":
        for config in scores.configs(single, "tf32x3", on):
            contraction("edge_scores f32 tf32x3, XL", single, "tf32x3", config=config)
        small = (157, 445, 16, 60, 765)
        contraction("edge_scores f32 tf32x3, unaligned slice, rows", single, "tf32x3", rows=True, sizes=small, cut=3)

    def receivers(
        case: str, dtype: torch.dtype, kind: str, d_head: int, d_model: int, config: Any = None, cut: int = 0,
        share: int = 1, turned: bool = False, ready: bool = False,
    ) -> None:  # fmt: skip
        c, b, t = 36, 8, 64
        g = empty(c, b, t, d_head + cut, dtype=dtype)[..., cut:]
        weight = empty(d_model, c, d_head + cut, dtype=dtype)[..., cut:].transpose(0, 1)
        if turned:
            weight = empty(c, d_head, d_model, dtype=dtype).transpose(1, 2)
        gains = single if ready and kind == "rmsnorm" else dtype  # Gemma's are not rounded to half precision
        statistics = empty(b, t, d_model, dtype=single), empty(b, t, dtype=single), empty(d_model, dtype=gains)
        constants = empty(c, d_head, dtype=dtype)
        norm = Norm("none") if kind == "none" else Norm(kind, *statistics)
        sums = None
        if ready:  # the sums are there, and where tiles are walked the stream is read as it is
            sums = empty(c, 2, b, t, dtype=single)
            mean = statistics[1] if kind == "layernorm" else None
            if d_head <= grads.WIDEST:
                norm = Norm(kind, None, *statistics[1:], statistics[0], mean)
        act, weight = g[: c // share], weight[: c // share]
        given = (g, act, weight, norm, constants, constants, None, sums)
        calls.append((case, "tensor", lambda: grads.receiver_grads(*given, config=config)))

    for config in grads.TENSOR_HIP if machine.backend == "hip" else grads.TENSOR:
        receivers("receiver_grads bf16, layernorm", half, "layernorm", 64, 768, config)
    if on.descriptors:
        receivers("receiver_grads bf16, layernorm, sums given, K = 64", half, "layernorm", 64, 768, ready=True)
        receivers("receiver_grads bf16, layernorm, walked, K = 128", half, "layernorm", grads.WIDEST, 768)
        receivers("receiver_grads bf16, turned weights", half, "layernorm", 64, 768, turned=True, ready=True)
        receivers("receiver_grads bf16, rmsnorm, sums given", half, "rmsnorm", 128, 5120, share=4, ready=True)
        receivers("receiver_grads bf16, layernorm, K = 120", half, "layernorm", 120, 2560)
        receivers("receiver_grads f16, no norm", torch.float16, "none", 80, 2560)
    receivers("receiver_grads bf16, layernorm, K = 256, sums given", half, "layernorm", 256, 768, ready=True)
    receivers("receiver_grads bf16, rmsnorm, K = 128, shared weights", half, "rmsnorm", 128, 5120, share=4)
    receivers("receiver_grads f16, layernorm, K = 80", torch.float16, "layernorm", 80, 2560)
    # Beyond a tile's K a loop goes round more often, in the same code: 512 stands for 128 and 256 too.
    receivers("receiver_grads bf16, layernorm, K = 512", half, "layernorm", 512, 2304)
    for d_head in (64, 80, 512):
        receivers(f"receiver_grads f32, layernorm, K = {d_head}", single, "layernorm", d_head, 768)
    # Rows that start anywhere, and a D (once a K as well) that is odd: the most addresses.
    receivers("receiver_grads bf16, unaligned, K = 60", half, "layernorm", 60, 765, cut=1)
    receivers("receiver_grads f32, unaligned, K = 255", single, "layernorm", 255, 765, cut=1)

    def edges_factored(case: str, dtype: torch.dtype, heads: int, d_head: int, d_model: int) -> None:
        layers, batch, tokens = 12, 8, 64
        stream, mlp = empty(batch, tokens, d_model, dtype=dtype), empty(layers, batch, tokens, d_model, dtype=dtype)
        z = empty(layers, batch, tokens, heads, d_head, dtype=dtype)
        qkv = empty(layers, 3 * heads, batch, tokens, d_head, dtype=dtype)
        constants = empty(layers, 3 * heads, d_head, dtype=dtype)
        norm = Norm("layernorm", stream, empty(batch, tokens, dtype=single), empty(d_model, dtype=dtype))
        weights = empty(d_model, 3 * heads, d_head, dtype=dtype).transpose(0, 1)
        made = (
            FactoredSenders(stream, z, [empty(heads, d_head, d_model, dtype=dtype)] * layers, mlp),
            FactoredReceivers(qkv, qkv, [[weights]] * layers, [norm] * layers, constants, constants, stream, mlp),
        )
        edges = empty(1 + layers * (heads + 1), 1 + layers * (3 * heads + 1), dtype=torch.bool)
        # All tokens in one chunk: smaller ones are the same code for sizes that divide otherwise.
        calls.append((case, "tensor", lambda: factored.edge_scores_factored(*made, edges, "all", batch * tokens)))

    edges_factored("edge_scores_factored bf16, GPT-2 small", half, 12, 64, 768)
    edges_factored("edge_scores_factored f32, K = 128", single, 16, 128, 2048)
    edges_factored("edge_scores_factored bf16, K = 60, unaligned", half, 12, 60, 725)

    def steps_of(case: str, dtype: torch.dtype, width: int, act_fn: str, gated: bool) -> None:
        x, hidden = empty(1, 320, width, dtype=dtype), empty(1, 320, 4 * width, dtype=dtype)
        gamma, beta = empty(width, dtype=single if gated else dtype), empty(width, dtype=dtype)
        statistics = [empty(1, 320, 1, dtype=single) for _ in range(2)]
        mean, rstd = (None if gated else statistics[0]), statistics[1]
        total, read = x.float(), None
        if gated:
            total, read = total[:, :2], empty(1, 2, dtype=torch.int64)
        runs = (
            partial(steps.normalise, x, gamma, None if gated else beta, 1e-5, centred=not gated),
            partial(steps.standardise, x, mean, rstd),
            partial(steps.normalise_grad, x, x, mean, rstd, gamma, None),
            partial(steps.normalise_grad, x, x, mean, rstd, gamma, None, frozen=True),
            partial(steps.normalise_grad_added, x, x, mean, rstd, gamma, None, total, read=read, out=x),
            partial(steps.moved_units, hidden, hidden if gated else None, act_fn, 160),
            partial(steps.moved_sum, x, x[:, :160], x[:, 160:], gamma),
            partial(
                steps.moved_sum_normalised, x, x[:, :160], x[:, 160:], gamma, gamma, None if gated else beta, 1e-5,
                centred=not gated, out=x, kept=x[0, 160:],
            ),
        )  # fmt: skip
        if gated:
            heads, where = empty(8, 20, 32, 128, dtype=dtype).transpose(1, 2), empty(8, 20, dtype=torch.int64)
            angles = empty(64, dtype=torch.float64)
            runs += (
                partial(steps.gated_grad, hidden, hidden, hidden, act_fn), partial(steps.turn, heads, angles, 0),
                partial(steps.turn, heads, angles[:16], 3, where, sign=-1, adjacent=True, out=heads),
            )  # fmt: skip
        calls.extend((case, "", partial(run, impl="triton")) for run in runs)

    steps_of("steps bf16, GPT-2 small", half, 768, "gelu_new", False)
    steps_of("steps f32, GPT-2 XL", single, 1600, "gelu", False)
    steps_of("steps f16, gated, 16384 wide", torch.float16, 16384, "silu", True)

    def attention(case: str, dtype: torch.dtype, d_head: int, tokens: int, past: int, read: bool, how: Any) -> None:
        q, kv = empty(8, tokens, 12, d_head, dtype=dtype), empty(8, past + tokens, 4, d_head, dtype=dtype)
        k = v = kv.transpose(1, 2)
        where = empty(8, 2, dtype=torch.int64) if read else None
        every = q.transpose(1, 2)
        q = every[:, :, :2] if read else every
        if read:
            calls.append((case, "", lambda: attend(q, k, v, how, tokens, where, impl="triton")))
        z, sums = q.new_empty(8, q.shape[2], 12, d_head), None
        if on.descriptors:  # as where they are used
            constants = empty(36, d_head, dtype=dtype)
            room = empty(36, 2, 8, tokens, dtype=single)
            sums = ReceiverSums(room, None if how.window else constants, constants, 12 * d_head)
        calls.append((case, "", lambda: attend_moved(q, k, v, how, tokens, where, z, impl="triton")))
        calls.append((case, "", lambda: attend_grad(every, k, v, every, how, tokens, sums=sums, impl="triton")))

    attention("attention bf16, K = 64", half, 64, 512, 0, False, Causal(0.1))
    attention("attention bf16, K = 128, a past", half, 128, 512, 8, False, Causal(0.1))
    attention("attention f16, K = 80, read, window and cap", torch.float16, 80, 20, 8, True, Causal(0.1, 64, 50.0))

    return calls


def smallest_calls() -> list[tuple[str, str, Any]]:
    """Calls in which one size after another is 1 and 0, as (case, no expectation, call).

    Triton makes a constant of an argument that is 1 and takes other branches at 0, where the interpreter sees numbers
    and names bound on any way: what it accepts need not compile.
    """
    import torch
    from eapcore.kernels import FactoredReceivers, FactoredSenders, Norm, steps
    from eapcore.kernels import triton_edge_scores as scores
    from eapcore.kernels import triton_factored as factored
    from eapcore.kernels import triton_receiver_grads as grads
    from eapcore.kernels.attention import attend_grad, attend_moved
    from eapcore.kernels.causal import Causal

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    calls: list[tuple[str, str, Any]] = []
    usual = {"S": 3, "R": 5, "C": 3, "B": 2, "T": 3, "D": 48, "K": 5, "L": 2, "H": 2}

    def sizes(letters: str) -> list[tuple[str, list[int]]]:
        small = [(f"{name} = {n}", {name: n}) for name in letters for n in (1, 0)]
        small.append(("all 1", dict.fromkeys(letters, 1)))
        return [(named, [{**usual, **changed}[name] for name in letters]) for named, changed in small]

    for named, (s, r, b, t, d) in sizes("SRBTD"):
        delta, gradients, mask = empty(s, b, t, d), empty(r, b, t, d), empty(s, r, dtype=torch.bool)
        rows = empty(max(1, b * t - 1), dtype=torch.int64)
        for reduce in ("all", "pair", "position"):
            for index in (None, rows) if b * t else (None,):
                call = partial(scores.edge_scores, delta, gradients, mask, reduce, index)
                calls.append((f"edge_scores, {named}, {reduce}", "", call))
    for named, (c, b, t, d, k) in sizes("CBTDK"):
        for kind in ("layernorm", "none"):
            norm = Norm("none") if kind == "none" else Norm(kind, empty(b, t, d), empty(b, t), empty(d))
            g, constants = empty(c, b, t, k), empty(c, k)
            call = partial(grads.receiver_grads, g, g, empty(c, d, k), norm, constants, constants)
            calls.append((f"receiver_grads, {named}, {kind}", "", call))
    for named, (c, b, t) in sizes("CBT"):
        for kind in ("layernorm", "none"):
            half = partial(empty, dtype=torch.bfloat16)
            norm = Norm("none") if kind == "none" else Norm(kind, half(b, t, 48), empty(b, t), half(48))
            g, constants = half(c, b, t, 16), half(c, 16)
            call = partial(grads.receiver_grads, g, g, half(c, 48, 16), norm, constants, constants)
            calls.append((f"receiver_grads in half precision, {named}, {kind}", "", call))
    for named, (b, t, d) in sizes("BTD"):
        x, statistics = empty(1, 2 * b * t, d), empty(1, 2 * b * t, 1)
        for call in (
            partial(steps.normalise, x, x[0, 0], x[0, 0], 1e-5, centred=True) if b * t else None,
            partial(steps.standardise, x, statistics, statistics),
            partial(steps.normalise_grad, x, x, statistics, statistics, None, None),
            partial(steps.normalise_grad_added, x, x, statistics, statistics, None, None, x, out=x),
            partial(steps.moved_units, x, x, "silu", b * t),
            partial(steps.gated_grad, x, x, x, "silu"),
            partial(steps.turn, x[None], empty(d // 2, dtype=torch.float64), 0),
            partial(steps.moved_sum, x, x[:, b * t :], x[:, : b * t]),
        ):
            if call is not None:
                calls.append((f"steps, {named}", "", partial(call, impl="triton")))
    for named, (h, b, t, k) in sizes("HBTK"):
        q, z, read = empty(2 * b, h, t, k), empty(2 * b, t, h, k), empty(2 * b, t, dtype=torch.int64)
        for where in (None, read):
            for call in (
                partial(attend_moved, q, q, q, Causal(0.1, 2), t, where, z),
                partial(attend_grad, q, q, q, q, Causal(0.1, 2), t, where),
            ):
                calls.append((f"attention, {named}", "", partial(call, impl="triton")))
    for named, (layers, h, b, t, d, k) in sizes("LHBTDK"):
        norm, stream, mlp = (
            Norm("layernorm", empty(b, t, d), empty(b, t), empty(d)),
            empty(b, t, d),
            empty(layers, b, t, d),
        )
        qkv, constants = empty(layers, 3 * h, b, t, k), empty(layers, 3 * h, k)
        senders = FactoredSenders(stream, empty(layers, b, t, h, k), [empty(h, k, d)] * layers, mlp)
        weights = [[empty(3 * h, d, k)]] * layers
        receivers = FactoredReceivers(qkv, qkv, weights, [norm] * layers, constants, constants, stream, mlp)
        mask = empty(1 + layers * (h + 1), 1 + layers * (3 * h + 1), dtype=torch.bool)
        call = partial(factored.edge_scores_factored, senders, receivers, mask, "all", None)
        calls.append((f"edge_scores_factored, {named}", "", call))
    return calls


def farthest_calls() -> list[tuple[str, str, Any]]:
    """Calls whose strides and sizes need more than 32 bits, as (case, no expectation, call).

    Triton takes such an argument as a number of 64 bits, and refuses a name that has one type before a branch or a loop
    and another behind it, which the interpreter does not see.
    """
    import torch
    from eapcore.kernels import Norm, steps
    from eapcore.kernels import triton_edge_scores as scores
    from eapcore.kernels import triton_receiver_grads as grads
    from eapcore.kernels.attention import attend_grad, attend_moved
    from eapcore.kernels.causal import Causal, ReceiverSums

    half, single = torch.bfloat16, torch.float32

    def far(*shape: int, dtype: torch.dtype = half) -> torch.Tensor:
        """Along each axis but the last 2^32 elements lie between two, or a multiple of that."""
        strides = [2 ** (32 + i) for i in reversed(range(len(shape) - 1))]
        return torch.empty(1, dtype=dtype, device="meta").as_strided(shape, (*strides, 1))

    def near(*shape: int, dtype: torch.dtype = half) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    calls: list[tuple[str, Any]] = []
    mask, rows = far(3, 5, dtype=torch.bool), near(4, dtype=torch.int64)
    for cut in (0, 1):  # with descriptors, with pointers
        delta, gradients = (far(n, 2, 3, 64 + cut)[..., cut:] for n in (3, 5))
        for reduce, index in (("all", None), ("pair", rows)):
            calls.append(("edge_scores", partial(scores.edge_scores, delta, gradients, mask, reduce, index)))
    norm, constants = (
        Norm("layernorm", far(1, 2**20, 64), far(1, 2**20, 1, dtype=single)[..., 0], near(64)),
        near(3, 16),
    )
    g, out = (near(3, 1, 2**20, 8192)[..., :n] for n in (16, 64))
    for weight in (far(3, 64, 16), near(3, 64, 16)):
        calls.append(("receiver_grads", partial(grads.receiver_grads, g, g, weight, norm, constants, constants, out)))
    x, hidden, column = far(1, 4, 64), near(1, 2**20, 4096), near(1, 4, 1, dtype=single)
    queries, few = far(2, 4, 5, 16), {"impl": "triton"}
    calls += [
        ("normalise", partial(steps.normalise, x, x[0, 0], None, 1e-5, centred=True, **few)),
        ("standardise", partial(steps.standardise, x, column, column, **few)),
        (
            "normalise_grad",
            partial(steps.normalise_grad_added, x, x, column, column, None, None, x.float(), out=x, **few),
        ),
        ("moved_units", partial(steps.moved_units, hidden, hidden, "silu", 2**19, **few)),
        ("gated_grad", partial(steps.gated_grad, hidden, hidden, hidden, "silu", **few)),
        ("moved_sum", partial(steps.moved_sum, near(1, 4, 64), *near(2, 1, 2, 64), kept=far(2, 64), **few)),
        ("turn", partial(steps.turn, queries, near(8, dtype=torch.float64), 0, out=queries, **few)),
    ]
    for tokens in (5, 70):
        q, k, how = far(2, 4, tokens, 16), far(2, 2, tokens + 3, 16), Causal(0.1, 7, 3.0)
        z, out, constants = near(2, tokens, 4, 16), far(2, tokens, 12, 16), near(12, 16)
        sums = ReceiverSums(near(12, 2, 2, tokens, dtype=single), constants, constants, 64)
        calls.append(("attend_moved", partial(attend_moved, q, k, k, how, tokens, None, z, **few)))
        calls.append(("attend_grad", partial(attend_grad, q, k, k, q, how, tokens, None, out, sums=sums, **few)))
    return [(f"{name}, far apart", "", call) for name, call in calls]


class _Read(Exception):
    """The front end is done with a kernel."""


def _stop_behind_the_front_end() -> None:
    """Let no kernel be compiled further than to Triton's own form, the first of NVIDIA's stages."""
    from triton.backends.nvidia.compiler import CUDABackend

    add_all = CUDABackend.add_stages

    def stop(*_: Any) -> None:
        raise _Read

    def add_stages(self: Any, stages: dict[str, Any], *arguments: Any) -> None:
        add_all(self, stages, *arguments)
        stages["ttgir"] = stop

    CUDABackend.add_stages = add_stages


def _cpu_seconds() -> float:
    """Of this process and of those that it started."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def compile_target(name: str) -> list[Row]:
    """Compile everything for one target in this process, which can compile for no other afterwards."""
    import torch
    import triton
    from eapcore.kernels import triton_common

    machine = MACHINES[name]
    triton.runtime.driver.set_active(driver(machine))
    arch = machine.arch if isinstance(machine.arch, int) else 0
    on = triton_common.Target(machine.backend, arch, machine.processors, machine.memory_bytes)
    rows: list[Row] = []
    seen: set[str] = set()
    case = expects = ""

    def compile_instead(kernel: Any, programs: int, *args: Any, device: torch.device, **meta: Any) -> None:
        began = _cpu_seconds()
        compiled = kernel.warmup(*args, grid=(1,), **meta, **triton_common.FUSED)
        seconds = _cpu_seconds() - began
        if compiled.hash in seen:
            return
        seen.add(compiled.hash)
        blocks = "×".join(str(v) for k, v in meta.items() if k.startswith("BLOCK"))
        flags = [k.lower() for k, v in meta.items() if v is True] + [v for v in meta.values() if isinstance(v, str)]
        stages = f" s{meta['num_stages']}" if "num_stages" in meta else ""
        registers, spills, tensor, fma = _measure(compiled.asm, machine)
        config = f"{blocks} w{meta['num_warps']}{stages} {' '.join(flags)}"
        judged = expects if kernel.__name__ in ("partial_scores", "channel_grads", "tile_grads") else ""
        size = (compiled.metadata.shared, machine.shared_limit)
        measured = (registers, *size, spills, tensor, fma, round(seconds, 2))
        rows.append(Row(name, case, kernel.__name__, config, judged, *measured))

    def read_instead(kernel: Any, programs: int, *args: Any, device: torch.device, **meta: Any) -> None:
        with contextlib.suppress(_Read):
            kernel.warmup(*args, grid=(1,), **meta, **triton_common.FUSED)

    triton_common.target = lambda device: on
    triton_common.launch = compile_instead
    for case, expects, call in _calls(machine):  # noqa: B007 - both are read by compile_instead
        call()
    if name == "sm_90":  # one front end for all targets
        _stop_behind_the_front_end()
        triton_common.launch = read_instead
        for case, _, call in [*smallest_calls(), *farthest_calls()]:
            try:
                call()
            except Exception as error:
                error.add_note(case)
                raise
    return rows


def _compile_in_a_fork(target: str) -> list[Row]:
    """`compile_target`, with an empty cache."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        return compile_target(target)


def compile_here(targets: list[str], processes: int) -> list[Row]:
    """Compile for each target in a fork of this process, which has imported what they all need."""
    sys.path.insert(0, str(ROOT))
    import eapcore.kernels  # noqa: F401
    import triton  # noqa: F401

    with multiprocessing.get_context("fork").Pool(processes, maxtasksperchild=1) as pool:
        return [row for rows in pool.map(_compile_in_a_fork, targets, chunksize=1) for row in rows]


def compile_all(targets: list[str], processes: int = 2) -> list[Row]:
    """Compile for each target in a process of its own, with an empty cache and without the interpreter."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).resolve()), "--forks", str(processes), "--json"]
    command += [f"--target={target}" for target in targets]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"compiling failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return [Row(**json.loads(line)) for line in done.stdout.splitlines() if line.startswith("{")]


def table(rows: list[Row]) -> str:
    """The rows as text, one a line."""
    titles = ("target", "case", "kernel", "config", "registers", "shared", "spills", "tensor", "fma", "seconds")
    lines = [titles, *(tuple(str(getattr(row, title)) for title in titles) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(titles))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def main(arguments: list[str] | None = None) -> None:
    """Print the table, or the rows as JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", action="append", choices=list(MACHINES), help="a target; all without it")
    parser.add_argument("--json", action="store_true", help="print JSON lines instead of a table")
    parser.add_argument("--forks", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    targets = options.target or list(MACHINES)
    rows = compile_here(targets, options.forks) if options.forks else compile_all(targets)
    if options.json:
        for row in rows:
            print(json.dumps(dataclasses.asdict(row)))
    else:
        print(table(rows))


if __name__ == "__main__":
    main()
