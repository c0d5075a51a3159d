"""A normalisation: forward, backward, and what is constant with its statistics frozen."""

from __future__ import annotations

import torch
from torch import Tensor

from eapcore.models.activations import NormInput, accumulate_dtype


def normalise(x: Tensor, ln: tuple[Tensor, Tensor] | None, eps: float) -> tuple[Tensor, NormInput]:
    """γ∘(x − μ)/σ + β with its statistics, in float32 at least; x itself where there is no LayerNorm."""
    if ln is None:
        return x, NormInput(x)
    wide = accumulate_dtype(x.dtype)
    gamma, beta = (p.to(wide) for p in ln)
    n, mean, rstd = torch.native_layer_norm(x.to(wide), x.shape[-1:], gamma, beta, eps)
    return n.to(x.dtype), NormInput(x, mean, rstd)


def norm_grad(grad: Tensor, ln: tuple[Tensor, Tensor] | None, norm_in: NormInput, rule: str = "gradient") -> Tensor:
    """∂metric/∂x of a normalisation's input from grad = ∂metric/∂n, same shape."""
    if ln is None:
        return grad
    wide, mask = accumulate_dtype(grad.dtype), [True, False, False]
    assert norm_in.mean is not None and norm_in.rstd is not None
    if rule == "frozen":
        scaled = grad.to(wide) * ln[0].to(wide)
        return ((scaled - scaled.mean(-1, keepdim=True)) * norm_in.rstd).to(grad.dtype)
    # The operator reads the statistics as if they were contiguous, whatever their strides.
    mean, rstd = norm_in.mean.contiguous(), norm_in.rstd.contiguous()
    args = (grad.to(wide), norm_in.x.to(wide), grad.shape[-1:], mean, rstd)
    return torch.ops.aten.native_layer_norm_backward(*args, ln[0].to(wide), ln[1].to(wide), mask)[0].to(grad.dtype)


def frozen_weight(w: Tensor, ln: tuple[Tensor, Tensor]) -> Tensor:
    """(1 − 11ᵀ/D) diag(γ) W for channels w [C, D, K].

    With σ frozen, ∂metric/∂v = (1/σ)(γ∘(W g) − mean(γ∘(W g))·1) is this matrix times g/σ: a projection without a norm.
    """
    scaled = w.to(accumulate_dtype(w.dtype)) * ln[0].to(accumulate_dtype(w.dtype))[:, None]
    return (scaled - scaled.mean(1, keepdim=True)).to(w.dtype)
