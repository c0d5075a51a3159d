"""Products of a residual stream's rows with a weight: what most of a forward or backward pass's time goes into.

torch hands a product of float32 matrices on a CPU to the BLAS that it was built with. MKL, which torch's own builds for
x86 have, uses the widest vectors, AVX-512, on Intel's processors alone; torch carries oneDNN as well, which uses them
on all: there, on others, large products go. Which of the two a machine takes depends on nothing that is measured, so
that scores have the same bits in every process. EAPCORE_PRODUCTS=oneDNN or torch chooses for it.

oneDNN's sums over the inner dimension are not cut into blocks, so that scores in float32 are somewhat further from
float64's than with torch's own products (bench/RESULTS.md). `torch.backends.mkldnn.set_flags(False)` turns it off, as
everywhere in torch.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from eapcore.kernels.steps import takes_triton

# Multiplications in the smallest product that goes to oneDNN. In smaller ones the call itself, about 15 µs, and the
# millisecond that a shape takes when it comes for the first time cost more than there is to save.
LARGE = 1 << 24
CHOICE = "EAPCORE_PRODUCTS"


@cache
def onednn() -> Callable[..., Tensor] | None:
    """The op with which torch.compile multiplies, x Wᵀ + b by oneDNN on plain tensors; None where there is none.

    It is private to torch: where another torch has it no more, or it does not multiply as it did, there is none.
    """
    packet = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if packet is None or not torch.backends.mkldnn.is_available():
        return None
    x, w, bias = (torch.arange(n, dtype=torch.float32, device="cpu") for n in (6, 12, 4))
    x, w = x.view(2, 3), w.view(3, 4)
    try:
        op: Callable[..., Tensor] = packet.default
        expected = (x @ w + bias, x @ w)
        found = (op(x, w.T, bias, "none", [], ""), op(x, w.T, None, "none", [], ""))
    except Exception:  # whatever another torch raises
        return None
    same = all(a.shape == b.shape and torch.allclose(a, b) for a, b in zip(found, expected, strict=True))
    return op if same else None


@cache
def blas_is_narrow() -> bool:
    """Whether torch's own products leave this processor's widest vectors unused."""
    wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return wide and torch.backends.mkl.is_available() and "GenuineIntel" not in _processor()


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text(errors="replace")[:1000] if path.exists() else platform.processor()


def large_by() -> str:
    """Who multiplies large float32 matrices on the CPU: "oneDNN" or "torch".

    Raises:
        ValueError: EAPCORE_PRODUCTS is neither.
        RuntimeError: it asks for oneDNN, which this torch does not have.
    """
    asked = os.environ.get(CHOICE, "")
    if asked.lower() not in ("", "onednn", "torch"):
        raise ValueError(f"{CHOICE} must be oneDNN or torch, got {asked!r}")
    if not asked:
        taken = blas_is_narrow() and torch.backends.mkldnn.enabled and onednn() is not None
        return "oneDNN" if taken else "torch"
    if asked.lower() == "onednn" and onednn() is None:
        raise RuntimeError(f"{CHOICE}={asked}, but this torch, {torch.__version__}, has no product by oneDNN")
    return "oneDNN" if asked.lower() == "onednn" else "torch"


def chosen(x: Tensor, w: Tensor) -> str:
    """Who multiplies x [..., K] with w [K, N]: "oneDNN" or "torch"."""
    if x.device.type != "cpu" or not x.dtype == w.dtype == torch.float32 or x.numel() * w.shape[1] < LARGE:
        return "torch"
    # Some columns of a matrix would go to oneDNN's reference implementation, which takes a thousand times as long.
    if not (x.is_contiguous() and (w.is_contiguous() or w.T.is_contiguous())):
        return "torch"
    if torch.is_grad_enabled() and (x.requires_grad or w.requires_grad):  # oneDNN's has no derivative
        return "torch"
    return large_by()


def product(x: Tensor, w: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """x w + bias: [..., N] from x [..., K], w [K, N] in either order of memory, bias [N] or None.

    out: where torch is to write it, [..., N] whose leading axes are one with rows at one distance.
    """
    if out is not None:
        rows, to = x.flatten(0, -2), out.flatten(0, -2)
        if bias is None:
            torch.mm(rows, w, out=to)
        else:
            torch.addmm(bias, rows, w, out=to)
        return out
    if chosen(x, w) == "oneDNN" and (op := onednn()) is not None:
        return op(x, w.T, bias, "none", [], "")
    return x @ w if bias is None else torch.addmm(bias, x.flatten(0, -2), w).unflatten(0, x.shape[:-1])


def product_added(total: Tensor, x: Tensor, w: Tensor) -> Tensor:
    """total + x w, [..., N]; on a GPU in one kernel, which rounds once."""
    if takes_triton("auto", x):
        return torch.addmm(total.flatten(0, -2), x.flatten(0, -2), w).unflatten(0, x.shape[:-1])
    return total + product(x, w)
