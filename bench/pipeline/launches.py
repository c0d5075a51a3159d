"""What a batch asks of a GPU, counted without one: kernels, bytes, operations, and the time that they should take.

    python bench/bench_pipeline.py --plan

The batch is scored by the code that runs, on tensors without memory, as if they lay on a GPU. Every operation of torch
that is no view counts as one kernel that reads its arguments and writes its results; what the ops of `eapcore.kernels`
launch is theirs to say. A kernel takes

    max(bytes / rate, operations / rate, 2 µs)  in a graph; without one at least the 25 µs that launching it takes

with the rates that one H200 gave on 2026-11-27 (torch 2.11.0, triton 3.6.0): copies 4,270 GB/s, torch's matrix products
784 TFLOP/s in half precision and 51 in float32. Parts that stayed below both have their own rate, as measured there on
commit 2b62621 for what ran then, and on 3adbcf5 for what runs since: MEASURED. Of a contraction that has a mask the
operations are those of the tiles that hold an edge; its partial sums, and the processors that have nothing to do in a
round of programs, take time, but are not among its bytes and operations. Caches are not modelled: what stays in L2 is
faster. Behind the batches stands what the host takes on this machine, with the package's launches up to the driver, and
where nothing is launched.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from unittest import mock

import eapcore.kernels as kernels
import torch
import torch.nn.functional as F
from eapcore.kernels import attention, steps
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from eapcore.attribution import dense
from eapcore.attribution.plan import ONE_GRADIENT, Plan, run_dry
from eapcore.attribution.score_batch import score_batch
from eapcore.execution.batch import Batch
from eapcore.execution.limits import limits
from eapcore.models import attention as of_attention
from eapcore.models import matmul, paired
from eapcore.tasks.metrics import METRICS
from pipeline.work import B13, LLAMA8, SMALL, XL, Work, in_turns

COPY = 4.27e12  # bytes a second
HALF, SINGLE = 784e12, 51e12  # operations a second
LEAST_IN_GRAPH, LEAST_LAUNCHED = 2e-6, 25e-6
# What share of those two rates a part reached, over GPT-2 small, XL and 13B, on commits 2b62621, where attention was in
# float32, and 3adbcf5.
MEASURED_FIRST = {
    "contraction": (0.7, 0.5),
    "receivers": (0.4, 0.5),
    "attention": (0.14, 0.5),
    "products": (0.75, 0.75),
    "copies": (0.7, 1.0),
    "norms": (0.65, 1.0),
}
MEASURED = {
    "contraction": (0.78, 0.92),
    "receivers": (0.65, 0.75),
    "attention, fused": (0.4, 0.5),
    "products": (0.75, 0.75),
    "steps": (0.7, 1.0),
    "copies": (0.7, 1.0),
    "element-wise, sums, gathers": (0.7, 1.0),
}
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}
COPIES = {"copy_", "_to_copy", "clone", "cat", "stack"}
GATHERS = {"index", "gather", "index_select", "embedding"}
NORMS = {"native_layer_norm", "native_layer_norm_backward"}


@dataclass
class Part:
    """Kernels of one kind: how many, what they read and write in bytes, operations, seconds in and out of a graph."""

    kernels: int = 0
    bytes: int = 0
    operations: int = 0
    device: float = 0.0
    launched: float = 0.0

    def add(self, kernels: int, moved: int, operations: int, copy: float, rate: float) -> None:
        """Kernels that move and compute so much, at so many bytes and operations a second."""
        self.kernels += kernels
        self.bytes += moved
        self.operations += operations
        seconds = max(moved / copy, operations / rate)
        self.device += max(seconds, kernels * LEAST_IN_GRAPH)
        self.launched += max(seconds, kernels * LEAST_LAUNCHED)


@dataclass
class Count:
    """The parts of a batch; measured: what share of both rates a part reaches."""

    parts: dict[str, Part] = field(default_factory=dict)
    measured: dict[str, tuple[float, float]] = field(default_factory=lambda: MEASURED)

    def add(
        self, name: str, kernels: int, moved: int, operations: int = 0, dtype: torch.dtype = torch.float32,
        beside: int = 0, idle: int = 0,
    ) -> None:  # fmt: skip
        """beside, idle: bytes and operations that take time, and are not counted."""
        rate = SINGLE if dtype in (torch.float32, torch.float64) else HALF
        of_copy, of_products = self.measured.get(name, (1.0, 1.0))
        part = self.parts.setdefault(name, Part())
        part.add(kernels, moved + beside, operations + idle, of_copy * COPY, of_products * rate)
        part.bytes, part.operations = part.bytes - beside, part.operations - idle

    @property
    def total(self) -> Part:
        whole = Part()
        for part in self.parts.values():
            for name in ("kernels", "bytes", "operations", "device", "launched"):
                setattr(whole, name, getattr(whole, name) + getattr(part, name))
        return whole


def size_of(*tensors: Any) -> int:
    """Bytes of memory behind tensors: what is repeated along an axis of stride 0 is there once."""
    total = 0
    for x in tensors:
        if isinstance(x, Tensor):
            total += math.prod(n for n, stride in zip(x.shape, x.stride(), strict=True) if stride) * x.itemsize
    return total


class Operations(TorchDispatchMode):
    """Counts torch's operations."""

    def __init__(self, count: Count) -> None:
        super().__init__()
        self.count = count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if func.is_view or name.startswith(("empty", "new_empty", "_unsafe_view", "detach")):
            return out
        tensors = [x for x in tree_leaves(args) if isinstance(x, Tensor)]  # `out=` stands among the keywords
        written = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if not written or not any(x.numel() for x in written):
            return out
        if name in GATHERS:  # reads what it writes
            tensors = [*tensors[1:], *written]
        elif name == "copy_":  # does not read what it overwrites
            tensors = tensors[1:]
        elif func._schema.is_mutable and name.endswith("_"):
            written = written[:1]
        operations = 0
        if name in PRODUCTS:
            a, b = tensors[-2:]
            operations = 2 * a.numel() * b.shape[-1]
        kinds = ((PRODUCTS, "products"), (COPIES, "copies"), (NORMS, "norms"))
        kind = next((kind for names, kind in kinds if name in names), "element-wise, sums, gathers")
        self.count.add(kind, 1, size_of(*tensors, *written), operations, written[0].dtype)
        return out


class Attention(TorchFunctionMode):
    """Counts scaled dot-product attention as one kernel."""

    def __init__(self, count: Count) -> None:
        super().__init__()
        self.count = count

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, k, v = args[:3]
        out = torch.empty_like(q)
        products = 4 * q.numel() * k.shape[-2]
        self.count.add("attention", 1, size_of(q, k, v, out), products, q.dtype)
        return out


def count_factored(
    count: Count, senders: kernels.FactoredSenders, receivers: kernels.FactoredReceivers, chunk: int,
    before: Sequence[int],
) -> None:  # fmt: skip
    """What contracting factors launches, block by block: the senders of each layer, and by groups of layers the
    receivers' gradients and the contraction."""
    from eapcore.kernels import triton_factored

    dz, (batch, tokens, width) = senders.dz, senders.embed.shape
    layers, heads, d_head, channels = len(dz), dz.shape[3], dz.shape[4], len(receivers.g[0])
    mlps = senders.mlp is not None
    sizes = kernels.Sizes(batch, tokens, width, channels=channels, d_head=d_head, layers=layers, heads=heads, mlps=mlps)
    dtype, item, groups = dz.dtype, dz.itemsize, triton_factored.grouped(sizes, before)
    for pairs, positions in triton_factored.blocks(batch, tokens, chunk, "all"):
        b, t = pairs.stop - pairs.start, positions.stop - positions.start
        n = b * t
        room, most = n * width * item, max(group.senders for group in groups)
        copies = 1 + sum(mlps and layer * (heads + mlps) + 1 + heads < most for layer in range(layers))
        count.add("copies", 1 + mlps, 2 * copies * room)
        for layer, w in enumerate(senders.w_o):
            if 1 + layer * (heads + mlps) < most:
                moved = heads * room + n * heads * d_head * item + size_of(w)
                count.add("products", 1, moved, 2 * n * heads * d_head * width, dtype)
        for group in groups:
            for layer in group.layers:
                for w, share in triton_factored.shared(receivers.weight[layer]):
                    own = len(w) * share
                    moved = own * (room + n * (d_head * item + 8)) + size_of(w) + room
                    if receivers.act[layer] is not None:
                        moved += n * len(w) * d_head * item
                    count.add("receivers", 1, moved, 2 * n * own * d_head * width, dtype)
            rows = group.receivers.stop - group.receivers.start
            count.add("copies", 2, 2 * (len(group.layers) * mlps + 1) * room)
            with torch.device("meta"):
                delta, grads = (torch.empty(size, b, t, width, dtype=dtype) for size in (group.senders, rows))
                scores = torch.empty(group.senders, rows)
            count_contraction(count, delta, grads, scores, group.before)
            count.add("element-wise, sums, gathers", 1, 3 * size_of(scores))


def count_contraction(count: Count, delta: Tensor, grads: Tensor, scores: Tensor, before: Sequence[int] | None) -> None:
    """The tiles that hold an edge, round by round of the programs that the device holds; then the sum over splits."""
    from eapcore.kernels import triton_common, triton_edge_scores

    (senders, batch, tokens, width), receivers = delta.shape, len(grads)
    groups = scores.numel() // (senders * receivers)
    how: dict[str, Any] = {"dtype": delta.dtype, "precision": "ieee", "masked": before is not None, "aligned": True}
    how |= {"on": triton_common.ELSEWHERE, "before": before}
    plan = triton_edge_scores.plan(senders, receivers, groups, batch * tokens // groups, width, **how)
    tile = plan.config
    pairs, slots = tile.block_s * tile.block_r, triton_common.ELSEWHERE.processors * tile.per_sm
    tiles = groups * triton_edge_scores.live_tiles(tile, senders, receivers, before)
    partial = 4 * plan.splits * tiles * pairs if plan.splits > 1 else 0
    operations = 2 * tiles * pairs * (batch * tokens // groups) * width
    each = 2 * pairs * (plan.chain + triton_edge_scores.OVERHEAD * tile.block_k)
    relative = triton_edge_scores.configs(delta.dtype, "ieee", triton_common.ELSEWHERE)[0].rate / tile.rate
    taken = int(-(-tiles * plan.splits // slots) * slots * each * relative)
    moved = size_of(delta, grads)
    count.add("contraction", 1, moved, operations, delta.dtype, beside=partial, idle=taken - operations)
    count.add("contraction", 1, size_of(scores), beside=partial)


def count_op(count: Count, op: str, *tensors: Any) -> None:
    """What one of the package's ops launches, from the tensors that it reads and writes."""
    if op == "edge_scores_factored":
        senders, receivers, _, chunk, before = tensors
        count_factored(count, senders, receivers, chunk, before)
        return
    if not all(x.numel() for x in tensors[:3]):
        return
    if op == "edge_scores":
        delta, grads, scores, before = tensors
        if count.measured is MEASURED:
            count_contraction(count, delta, grads, scores, before)
        else:  # when it was measured in all
            moved = size_of(delta, grads, scores)
            count.add("contraction", 2, moved, 2 * delta.numel() * len(grads), delta.dtype)
    elif op == "receiver_grads":
        g, act, weight, stream, made, given, held = tensors
        moved = size_of(g, weight, stream, made)
        if given is not None:
            moved += size_of(given)
        elif stream is not None:  # in one kernel, or sums first, for which g is read twice
            moved += size_of(act) + (size_of(g, held, held) if held.numel() else 0)
        kernels = 2 if held.numel() else 1
        count.add("receivers", kernels, moved, 2 * g.numel() * weight.shape[1], g.dtype)
    elif op.startswith("attend"):
        q, k = tensors[:2]
        products = {"attend": 2, "attend_grad": 5, "attend_grad, queries": 5, "attend_grad, keys": 4}[op]
        count.add("attention, fused", 1, size_of(*tensors), products * 2 * q.numel() * k.shape[2], q.dtype)
    else:
        count.add("steps", 1, size_of(*tensors))


def count_batch(
    work: Work, dtype: torch.dtype = torch.bfloat16, *, fused: bool = True, storage: str = "dense"
) -> Count:
    """A batch of a model, of which the metric reads two logits.

    fused: as it runs; else as it was profiled: torch's operations between products, each layer contracted alone.
    """
    model, count = work.without_memory(dtype), Count(measured=MEASURED if fused else MEASURED_FIRST)
    operations = Operations(count)
    plan = Plan(model.config, dtype, torch.device("cuda"))
    model.closed_forms  # noqa: B018 - constants of the weights, made once for a call
    with contextlib.ExitStack() as how:
        if not fused:
            from eapcore.kernels import triton_receiver_grads

            how.enter_context(mock.patch.object(dense, "_layers_at_once", lambda store, runs: 0))
            how.enter_context(mock.patch.object(triton_receiver_grads, "workspace_bytes", lambda *given: 0))
            for module in (steps, attention, paired):
                how.enter_context(mock.patch.object(module, "takes_triton", lambda impl, x: False))
        how.enter_context(Attention(count))
        if storage == "factored":
            from eapcore.kernels import triton_common

            how.enter_context(mock.patch.object(triton_common, "interpreted", lambda: False))  # chunks of a GPU
        run_dry(plan, model, work.B, work.T, storage, 1, operations, ran=partial(count_op, count))
    return count


def launched_nowhere(how: contextlib.ExitStack) -> None:
    """From here on the package's kernels are launched as on a GPU, up to where Triton hands them to the driver: nothing
    is compiled, and what the driver does with a launch takes no time."""
    import triton
    from ops.triton_compile import MACHINES, driver
    from triton.compiler import CompiledKernel
    from triton.runtime.jit import JITFunction

    class Nothing(CompiledKernel):
        function = packed_metadata = 0

        def __init__(self) -> None:
            pass

        def run(self, *given: Any) -> None:
            pass

        def launch_metadata(self, grid: Any, stream: Any, *args: Any) -> None:
            pass

    def make(kernel: Any, key: Any, signature: Any, device: Any, *how: Any) -> CompiledKernel:
        return kernel.device_caches[device][0].setdefault(key, Nothing())

    how.enter_context(mock.patch.object(triton.runtime.driver, "_active", driver(MACHINES["sm_90"])))
    how.enter_context(mock.patch.object(JITFunction, "_do_compile", make))


def host_ms(layers: int, *, fused: bool = True, launching: bool = False, repeats: int = 5) -> float:
    """CPU milliseconds that the host takes for a batch of a small model of GPT-2's architecture, where nothing is
    launched: torch's operations run on a few numbers, and the package's kernels not at all.

    fused: as in `count_batch`. launching: with the kernels' launches, see `launched_nowhere`; not in the interpreter.
    """
    from eapcore.kernels import triton_common

    from eapcore.attribution.sums import Sums

    work = Work(layers, 4, 32, 31, B=1, T=3)
    model, pairs = work.model(), work.pairs()
    batch = Batch.of(pairs, [0], torch.device("cpu"), shared=False)
    passes = ONE_GRADIENT
    with contextlib.ExitStack() as how:
        patch = lambda place, name, value: how.enter_context(mock.patch.object(place, name, value))  # noqa: E731
        for module in (steps, attention, paired, of_attention, matmul):
            patch(module, "takes_triton", lambda impl, x: fused and x.dtype == torch.float32)
        patch(attention, "fits", lambda q: True)
        patch(kernels, "_resolve", lambda *given: "triton")
        patch(triton_common, "target", lambda device: triton_common.ELSEWHERE)
        if launching:
            if triton_common.interpreted():
                raise RuntimeError("the interpreter's kernels are not launched: unset TRITON_INTERPRET")
            launched_nowhere(how)
        else:
            patch(triton_common, "launch", lambda *given, **meta: None)
        patch(triton_common, "interpreted", lambda: False)
        if fused:
            patch(dense, "limits", lambda device: limits("cuda"))
        memory = dense.DenseStore.room(model, batch)

        def run() -> None:
            sums = Sums({"scores": (model.graph.n_senders, model.graph.n_receivers)}, batch, "all", "auto")
            store = dense.DenseStore(model, batch, memory)
            score_batch(model, batch, METRICS["logit_diff"], store, sums, passes, [1])

        return statistics.median(in_turns([run], repeats)[0]) * 1e3


# Milliseconds of the device on one H200, 2026-11-27, commit 2b62621, by kernel and part; what took less than 1 % of a
# batch was not listed there.
PROFILES = {
    "GPT-2 small, B=256": (
        26.9,
        {"contraction": 4.57, "receivers": 2.29, "attention": 2.44, "products": 4.3, "copies": 6.5},
    ),
    "GPT-2 XL, B=32": (59.1, {"contraction": 19.2, "receivers": 6.03, "attention": 2.87}),
    "13B, B=8": (63.8, {"contraction": 17.0, "receivers": 6.89, "attention": 2.10, "products": 17.0}),
}


def works() -> dict[str, Work]:
    """The batches that were profiled, and one of Llama's architecture, in bfloat16."""
    small = {"GPT-2 small, B=256": replace(SMALL, B=256)}
    return small | {"GPT-2 XL, B=32": XL, "13B, B=8": B13, "Llama-3.1-8B, B=32": LLAMA8}


def table() -> str:
    """Every part of each batch: as it runs, and as it was profiled, beside what was measured then."""
    lines, title = [], f"{'kernels':>8}{'GB':>8}{'TFLOP':>8}{'ms in a graph':>15}{'ms without':>12}"
    for name, work in works().items():
        whole, parts = PROFILES.get(name, (None, {}))
        for fused, when in ((True, "as it runs"), (False, "step by step, as it was profiled")):
            if whole is None and not fused:
                continue
            count = count_batch(work, fused=fused)
            measured = {} if fused else {**parts, "all": whole}
            lines.append(f"{name}, T={work.T}, bfloat16, dense, {when}")
            lines.append(f"    {'part':32}{title}{'' if fused else '  measured'}")
            for part, found in [*sorted(count.parts.items()), ("all", count.total)]:
                cells = f"{found.kernels:8}{found.bytes / 1e9:8.2f}{found.operations / 1e12:8.3f}"
                cells += f"{found.device * 1e3:15.2f}{found.launched * 1e3:12.2f}"
                lines.append(f"    {part:32}{cells}{format(measured[part], '10.2f') if part in measured else ''}")
            lines.append(f"    kernels a layer: {count.total.kernels / work.L:.0f}")
        found = count_batch(work, storage="factored").total
        cells = f"{found.kernels:8}{found.bytes / 1e9:8.2f}{found.operations / 1e12:8.3f}"
        cells += f"{found.device * 1e3:15.2f}{found.launched * 1e3:12.2f}"
        lines.append(f"{name}, factored, as it runs\n    {'all':32}{cells}")
    for fused, launching, when in (
        (True, True, "all but the driver's calls, as it runs"),
        (True, False, "nothing launched, as it runs"),
        (False, False, "nothing launched, step by step"),
    ):
        found = [host_ms(layers, fused=fused, launching=launching) for layers in (12, 48)]
        lines.append(f"host, {when}: {found[0]:.1f} ms a batch of 12 layers, {found[1]:.1f} of 48")
    return "\n".join(lines)
