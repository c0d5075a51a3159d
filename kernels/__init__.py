"""The contraction at the heart of edge attribution patching, for CPU (C++) and GPU (Triton), with its specification.

Every op takes `impl`: "reference" (plain PyTorch, the specification), "cpp" (CPU), "triton" (GPU, or its interpreter
under TRITON_INTERPRET=1) or "auto". A named implementation runs or raises; `choose` says what "auto" takes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor

from . import checks, here, reference
from . import dry_run as dry
from .checks import FactoredReceivers, FactoredSenders, Norm, Sizes

__all__ = [
    "FactoredReceivers",
    "FactoredSenders",
    "Norm",
    "Sizes",
    "available",
    "choose",
    "edge_scores",
    "edge_scores_factored",
    "fast_chunk",
    "receiver_constants",
    "receiver_grads",
    "workspace_bytes",
]

OPS = ("edge_scores", "receiver_grads", "edge_scores_factored")
IMPLS = ("auto", "reference", "triton", "cpp")


def available() -> dict[str, str]:
    """For each implementation, "" if it can run here, or one sentence that says why it cannot."""
    from . import cpp

    interprets = os.environ.get("TRITON_INTERPRET") == "1"
    if interprets or torch.cuda.is_available():
        triton_reason = here.no_triton(interprets)
    else:
        triton_reason = "no GPU is visible to torch (TRITON_INTERPRET=1 would run its interpreter)"
    return {"reference": "", "cpp": cpp.why_not(), "triton": triton_reason}


def choose(op: str, *, device: torch.device | str, dtype: torch.dtype) -> str:
    """The implementation that impl="auto" takes for an op on tensors of this device and dtype."""
    checks.one_of("op", op, OPS)
    from . import cpp

    where = torch.device(device)
    if where.type == "cpu" and cpp.supports(op, dtype):
        why_not = cpp.why_not()
        if not why_not:
            return "cpp"
        here.say_once(f"the C++ kernels are not here, and torch's own operations take about twice the time: {why_not}")
    return "triton" if here.gpu_takes_triton(where, dtype) else "reference"


class _Forks:
    """After a fork OpenMP waits forever for threads that only the parent has, unless there is to be one: so a child of
    a process that may have used several has one."""

    several = False

    def before(self) -> None:
        tasks = Path("/proc/self/task")
        alone = tasks.is_dir() and len(list(tasks.iterdir())) == 1
        self.several = torch.get_num_threads() > 1 and not alone

    def in_child(self) -> None:
        if self.several:
            torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    _forks = _Forks()
    os.register_at_fork(before=_forks.before, after_in_child=_forks.in_child)


def _resolve(op: str, impl: str, device: torch.device, dtype: torch.dtype) -> str:
    checks.one_of("impl", impl, IMPLS)
    if impl == "auto":
        return choose(op, device=device, dtype=dtype)
    reason = available()[impl]
    if reason:
        raise RuntimeError(f"impl={impl!r} cannot run here: {reason}")
    return impl


def edge_scores(
    delta: Annotated[Tensor, "S B T D"],
    grads: Annotated[Tensor, "R B T D"],
    *,
    mask: Annotated[Tensor, "bool S R"] | None = None,
    reduce: str = "all",
    rows: Annotated[Tensor, "int64 N"] | None = None,
    part: tuple[int, int] | None = None,
    before: Sequence[int] | None = None,
    precision: str = "auto",
    impl: str = "auto",
) -> Annotated[Tensor, "S R | B S R | T S R"]:
    """Contract every sender's difference with every receiver's gradient, all pairs at once.

        scores[s, r] = Σ_{b,t} Σ_d delta[s, b, t, d] · grads[r, b, t, d]        where mask[s, r], else exactly 0

    No tensor larger than the result is made for edges, but for partial sums where the inner dimension is split: at most
    512 MiB on a GPU; on a CPU at most 256 MiB or, unsplit, as many float64 as the result has elements (all counted in
    whole tiles). Accumulates in float32, in float64 for float64 inputs, in a fixed order: the same inputs give the same
    bits twice. A CPU with bf16 dot products (instruction set avx512bf16) takes subnormals of bfloat16, below 2^-126 in
    size, for 0, and products and sums of that size become 0; every other way on a CPU keeps them.

    Args:
        delta: [S, B, T, D] e_corrupt − e_clean of the senders; float64, float32, bfloat16 or float16, any strides.
        grads: [R, B, T, D] ∂metric/∂v of the receivers, same dtype and device.
        mask: bool [S, R], True where there is an edge; None for all pairs. Tiles without an edge are not computed.
        reduce: "all" sums over b and t; "pair" over t only; "position" over b only.
        rows: int64 [N], distinct indices b·T + t of the token rows to sum over; None for all. Whether they are is
            looked at on the CPU alone.
        part: (first, n) where the senders are those from `first` on of n, whose others are contracted elsewhere: every
            score has the bits that it has among all n of them. "triton" cuts its sums for n; the others contract zeros
            in their places. None where these are all.
        before: for each receiver how many senders come before it, of all of them, where edges are from these alone.
            "triton" then knows how many tiles hold an edge, without waiting for the device, and cuts its sums to fit.
        precision: how float32 is multiplied on a GPU: "ieee" in full, or "tf32x3" as three products of its two tf32
            halves on tensor cores, whose sums are at least as exact. "auto" takes "tf32x3" where there are such tensor
            cores (NVIDIA, from compute capability 8.0 on). Everything else multiplies in full under any name.
        impl: "auto", "reference", "triton" or "cpp".

    Returns:
        [S, R] for "all", [B, S, R] for "pair", [T, S, R] for "position"; float32, or float64 for float64 inputs.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or an option is unknown.
        RuntimeError: the named implementation cannot run here.

    Source: Syed, Rager, Conmy 2023, eq. 2.
    """
    checks.edge_scores(delta, grads, mask, reduce, rows, part, before)
    checks.rows_in_range(rows, delta.shape[1] * delta.shape[2])
    checks.one_of("precision", precision, checks.PRECISIONS)
    if (run := dry.active.get()) is not None:
        return dry.edge_scores(run, delta, grads, mask, before, reduce, partial(workspace_bytes, impl=impl))
    chosen = _resolve("edge_scores", impl, delta.device, delta.dtype)
    if part is not None and chosen != "triton" and part[1] > len(delta):
        mine = slice(part[0], part[0] + len(delta))
        among = delta.new_zeros(part[1], *delta.shape[1:])
        among[mine] = delta
        if mask is not None:
            edges, mask = mask, mask.new_zeros(part[1], len(grads))
            mask[mine] = edges
        made = edge_scores(among, grads, mask=mask, reduce=reduce, rows=rows, impl=chosen)
        return made[..., mine, :]
    if chosen == "cpp":
        from . import cpp

        return cpp.edge_scores(delta, grads, mask, reduce, rows)
    if chosen == "triton":
        from . import triton_edge_scores

        count = None if part is None else part[1]
        return triton_edge_scores.edge_scores(delta, grads, mask, reduce, rows, precision, among=count, before=before)
    return reference.edge_scores(delta, grads, mask, reduce, rows)


def receiver_constants(
    weight: Annotated[Tensor, "C D K"],
    bias: Annotated[Tensor, "C K"] | None,
    gamma: Annotated[Tensor, "D"] | None,
    beta: Annotated[Tensor, "D"] | None,
) -> tuple[Annotated[Tensor, "C K"], Annotated[Tensor, "C K"]]:
    """The two constants of the weights in the closed form of `receiver_grads`.

        w_gamma = Wᵀγ        offset = b + Wᵀβ        both [C, K]

    weight: [C, D, K]. bias: [C, K] or None for 0. gamma, beta: [D], None for ones and zeros.
    """
    channels, _, d_head = weight.shape
    w_gamma = weight.sum(1) if gamma is None else torch.einsum("cdk,d->ck", weight, gamma.to(weight.dtype))
    offset = weight.new_zeros(channels, d_head) if beta is None else torch.einsum("cdk,d->ck", weight, beta)
    return w_gamma, offset if bias is None else offset + bias


def receiver_grads(
    g: Annotated[Tensor, "C B T K"],
    act: Annotated[Tensor, "C' B T K"],
    weight: Annotated[Tensor, "C' D K"],
    *,
    norm: Norm,
    w_gamma: Annotated[Tensor, "C K"] | None = None,
    offset: Annotated[Tensor, "C K"] | None = None,
    sums: Annotated[Tensor, "C 2 B T"] | None = None,
    out: Annotated[Tensor, "C B T D"] | None = None,
    impl: str = "auto",
) -> Annotated[Tensor, "C B T D"]:
    """Gradients with respect to the residual stream that each head's q, k or v input reads, without splitting it.

    For one channel with x̂ the normalised stream, n = γ∘x̂ + β and a = n·W + b, given g = ∂metric/∂a:

        ∂metric/∂v = rstd · ( γ∘(W g) − c1·1 − c2·x̂ )      c1 = ⟨g, Wᵀγ⟩/D      c2 = ⟨g, a − b − Wᵀβ⟩/D

    RMSNorm has no c1; without a norm it is W g.

    Args:
        g: [C, B, T, K] ∂metric/∂a, any strides.
        act: [C', B, T, K] a, the activations that the forward pass made.
        weight: [C', D, K]. C' is C, or a divisor of it: C / C' channels that follow one another share their a and W, as
            the query heads of a group do those of its keys and values.
        norm: the normalisation that all C channels read through.
        w_gamma, offset: [C, K] from `receiver_constants`; not needed without a norm (w_gamma not for RMSNorm).
        sums: c1 (not read for RMSNorm) and c2 of every channel and token, float32, where they are known already; only
            "triton" has use for them.
        out: [C, B, T, D] in g's dtype to write to, d innermost and the stride of b T times that of t: contiguous, or
            channels that lie side by side for each token; "cpp" copies to all but the former. None makes one. Memory
            that is used again costs no page faults, which on a CPU take as long as the arithmetic.
        impl: "auto", "reference", "triton" or "cpp".

    Returns:
        [C, B, T, D] in g's dtype, `out` where it is given.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or an option is unknown.
        RuntimeError: the named implementation cannot run here.

    Source: the LayerNorm derivative with both reductions moved to d_head; README, "The closed form".
    """
    checks.receiver_grads(g, act, weight, norm, w_gamma, offset, out, sums)
    run = dry.active.get()
    chosen = _resolve("receiver_grads", impl, g.device if run is None else run.device, g.dtype)
    if norm.x is not None and norm.rstd is not None:
        from . import steps

        if chosen != "triton" or not _walks(g, weight, norm, sums, out, g.device if run is None else run.device):
            mean = None if norm.mean is None else norm.mean[..., None]
            made = steps.standardise(norm.x, mean, norm.rstd[..., None], dtype=g.dtype)
            norm = Norm(norm.kind, made, norm.rstd, norm.gamma)
    if run is not None:
        return dry.receiver_grads(run, g, act, weight, norm, sums, out, partial(workspace_bytes, impl=impl))
    share = checks.shared_by(len(g), len(weight))
    if share > 1 and chosen != "triton":
        act, weight = (x.repeat_interleave(share, 0) for x in (act, weight))
    if chosen == "cpp":
        from . import cpp

        direct = None if out is None or not out.is_contiguous() else out
        made = cpp.receiver_grads(g, act, weight, norm, w_gamma, offset, direct)
        return made if out is None or direct is not None else out.copy_(made)
    if chosen == "triton":
        from . import triton_receiver_grads

        return triton_receiver_grads.receiver_grads(g, act, weight, norm, w_gamma, offset, out, sums)
    made = reference.receiver_grads(g, weight, norm)
    return made if out is None else out.copy_(made)


def _walks(
    g: Tensor, weight: Tensor, norm: Norm, sums: Tensor | None, out: Tensor | None, device: torch.device
) -> bool:
    from . import triton_common, triton_receiver_grads

    return triton_receiver_grads.walks(g, weight, norm, sums, out, triton_common.target(device))


def edge_scores_factored(
    senders: FactoredSenders,
    receivers: FactoredReceivers,
    *,
    mask: Annotated[Tensor, "bool S R"] | None = None,
    reduce: str = "all",
    chunk: int | None = None,
    before: Sequence[int] | None = None,
    precision: str = "auto",
    impl: str = "auto",
) -> Annotated[Tensor, "S R | B S R | T S R"]:
    """`edge_scores` of all senders and receivers of a model, both sides made on the fly from their factors.

    Goes through the B·T token rows in chunks: makes the senders [S, chunk, D] and the receivers [R, chunk, D] of one
    chunk, contracts every pair, accumulates. Nothing else has both a factor H and a factor D, so the memory is linear.

    Args:
        senders, receivers: the factors; the dataclasses state their shapes.
        mask: bool [S, R]; None for all pairs. "cpp" makes nothing of what has no edge in it.
        reduce: as in `edge_scores`.
        chunk: token rows a chunk; None for what the implementation takes as fast.
        before: as in `edge_scores`; "triton" makes nothing of layers none of whose receivers has senders before it.
        precision: of the contraction, as in `edge_scores`.
        impl: "auto", "reference" (which makes everything at once), "triton" or "cpp".

    Returns, raises: as `edge_scores`.
    """
    checks.edge_scores_factored(senders, receivers, mask, reduce, before)
    checks.chunk(chunk)
    checks.one_of("precision", precision, checks.PRECISIONS)
    if (run := dry.active.get()) is not None:
        return dry.edge_scores_factored(run, senders, receivers, chunk, before, reduce)
    chosen = _resolve("edge_scores_factored", impl, senders.dz.device, senders.dz.dtype)
    if chosen != "triton" and any(act is None for act in receivers.act):
        raise ValueError(f"receivers.act must be given for impl={chosen!r}, which does not read sums in its place")
    if chosen == "cpp":
        from . import cpp

        return cpp.edge_scores_factored(senders, receivers, mask, reduce, chunk)
    if chosen == "triton":
        from . import triton_factored

        return triton_factored.edge_scores_factored(senders, receivers, mask, reduce, chunk, precision, before=before)
    return reference.edge_scores_factored(senders, receivers, mask, reduce)


def workspace_bytes(
    op: str,
    sizes: Sizes,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    mask: Annotated[Tensor, "bool S R"] | None = None,
    before: Sequence[int] | None = None,
    reduce: str = "all",
    chunk: int | None = None,
    precision: str = "auto",
    impl: str = "auto",
) -> int:
    """The bytes that an op allocates beside its arguments and its result while it runs, before any is allocated.

    It is counted by the code that allocates: "cpp" runs the op up to where it asks for its memory, "triton" up to the
    launch. For arguments whose innermost axes lie packed; others an implementation may copy.

    Args:
        op: "edge_scores", "receiver_grads" or "edge_scores_factored".
        sizes: the shapes of its arguments.
        dtype, device: of its arguments. The C++ ops take memory for `torch.get_num_threads()` threads.
        mask, before, reduce, chunk, precision, impl: as in the op; mask on the CPU.

    Raises:
        ValueError: an option is unknown, or a mask is not bool [S, R].
        RuntimeError: the named implementation cannot run here.
    """
    checks.one_of("op", op, OPS)
    factored = op == "edge_scores_factored"
    checks.edge_mask(
        mask, *((sizes.all_senders, sizes.all_receivers) if factored else (sizes.senders, sizes.receivers))
    )
    checks.chunk(chunk)
    checks.one_of("reduce", reduce, checks.REDUCE)
    checks.one_of("precision", precision, checks.PRECISIONS)
    chosen = _resolve(op, impl, torch.device(device), dtype)
    if chosen == "cpp":
        from . import cpp

        return cpp.workspace_bytes(op, sizes, dtype, mask, reduce, chunk)
    if chosen == "triton":
        from . import triton_edge_scores, triton_factored, triton_receiver_grads

        if op == "receiver_grads":
            return triton_receiver_grads.workspace_bytes(sizes, dtype, torch.device(device))
        where = (sizes, dtype, torch.device(device), mask is not None, reduce)
        if op == "edge_scores":
            return triton_edge_scores.workspace_bytes(*where, precision, before)
        return triton_factored.workspace_bytes(*where, chunk, precision, before)
    return reference.workspace_bytes(op, sizes, dtype)


def fast_chunk(sizes: Sizes, *, dtype: torch.dtype, device: torch.device | str = "cpu", impl: str = "auto") -> int:
    """The token rows a chunk that `edge_scores_factored` takes as fast, which is chunk=None.

    Arguments and what is raised: as in `workspace_bytes`. "reference" has no chunks and takes all B·T at once.
    """
    where = torch.device(device) if (run := dry.active.get()) is None else run.device
    chosen = _resolve("edge_scores_factored", impl, where, dtype)
    if chosen == "cpp":
        from . import cpp

        return cpp.default_chunk()
    if chosen == "triton":
        from . import triton_factored

        return triton_factored.fast_chunk(sizes, dtype, where)
    return max(1, sizes.batch * sizes.tokens)
