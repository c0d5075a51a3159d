"""What every part of a model does with its tensors: the dtype of sums, and the positions that are read."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype for sums and statistics: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def at_positions(x: Tensor, read: Tensor | None) -> Tensor:
    """x [B, T, ...] at the positions read [B, Q]: [B, Q, ...]; x itself for None."""
    return x if read is None else x[torch.arange(len(x), device=x.device)[:, None], read]


def spread(x: Tensor, read: Tensor | None, tokens: int) -> Tensor:
    """x [B, Q, ...] at the positions read [B, Q] of zeros [B, T, ...]; x itself for None."""
    if read is None:
        return x
    out = x.new_zeros(len(x), tokens, *x.shape[2:])
    out[torch.arange(len(x), device=x.device)[:, None], read] = x
    return out


def as_matrix(w: Tensor) -> Tensor | None:
    """A channel group [C, D, K] as a matrix [D, C·K] without a copy, or None where its strides do not allow it."""
    channels, d_model, d_head = w.shape
    if w.stride(2) == 1 and w.stride(0) == d_head:
        return w.as_strided((d_model, channels * d_head), (w.stride(1), 1))
    if w.stride(1) == 1 and w.stride(0) == d_head * w.stride(2):  # stored as its transpose
        return w.as_strided((d_model, channels * d_head), (1, w.stride(2)))
    return None
