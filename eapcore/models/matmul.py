"""Products of a residual stream's rows with a weight: what most of a forward or backward pass's time goes into.

torch hands a product of float32 matrices on a CPU to the BLAS that it was built with, which does not use every
processor's widest vectors. torch carries oneDNN as well, which does: large products go there. Its sums over the inner
dimension are not cut into blocks, so that scores in float32 are somewhat further from float64's than with torch's own
products (bench/RESULTS.md). `torch.backends.mkldnn.set_flags(False)` turns it off, as everywhere in torch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Multiplications in the smallest product that goes to oneDNN. In smaller ones the call itself, about 15 µs, and the
# millisecond that a shape takes when it comes for the first time cost more than there is to save.
LARGE = 1 << 24


def _find_onednn() -> Callable[..., Tensor] | None:
    """The op with which torch.compile multiplies, x Wᵀ + b by oneDNN on plain tensors; None where it would not pay."""
    if not torch.backends.mkldnn.is_available() or not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return None  # on narrower vectors torch's own product is as fast
    packet = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    return None if packet is None else packet.default


_onednn = _find_onednn()


def large_by() -> str:
    """Who multiplies large float32 matrices on the CPU: "oneDNN" or "torch"."""
    return "torch" if _onednn is None or not torch.backends.mkldnn.enabled else "oneDNN"


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


def product(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """x w + bias: [..., N] from x [..., K], w [K, N] in either order of memory, bias [N] or None."""
    if _onednn is not None and chosen(x, w) == "oneDNN":
        return _onednn(x, w.T, bias, "none", [], "")
    return x @ w if bias is None else torch.addmm(bias, x.flatten(0, -2), w).unflatten(0, x.shape[:-1])
