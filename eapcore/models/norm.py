"""A normalisation of the residual stream: forward, backward, and what the kernels' closed form needs of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

import eapcore.kernels as kernels
from eapcore.graph.show import short
from eapcore.models.tensors import accumulate_dtype, at_positions


@dataclass(frozen=True, slots=True)
class NormInput:
    """What a normalisation read: x [B, T, D], its mean and 1/σ [B, T, 1] (None where there is none of them)."""

    x: Annotated[Tensor, "B T D"]
    mean: Annotated[Tensor, "B T 1"] | None = None
    rstd: Annotated[Tensor, "B T 1"] | None = None

    def x_hat(self) -> Annotated[Tensor, "B T D"]:
        """The normalised stream (x − μ)/σ, without a mean x/σ, in x's dtype."""
        if self.rstd is None:
            raise ValueError("x_hat needs a normalisation, this stream has none")
        return ((self.x if self.mean is None else self.x - self.mean) * self.rstd).to(self.x.dtype)

    def of(self, take: Callable[[Tensor], Tensor]) -> NormInput:
        """The same of what `take` takes of each tensor."""
        return NormInput(take(self.x), *(None if s is None else take(s) for s in (self.mean, self.rstd)))

    def at(self, read: Annotated[Tensor, "int64 B Q"] | None) -> NormInput:
        """The same at the positions read alone; None for all."""
        return self.of(lambda x: at_positions(x, read))


@dataclass(frozen=True, slots=True)
class Norm:
    """n = γ∘(x − μ)/σ + β, σ² = mean((x − μ)²) + eps.

    kind: "layernorm"; "rmsnorm", where μ is 0 and there is no β; "none", where n is x. gamma, beta: None where they are
    absent.
    """

    __repr__ = short

    kind: str = "none"
    gamma: Annotated[Tensor, "D"] | None = None
    beta: Annotated[Tensor, "D"] | None = None
    eps: float = 1e-5

    def forward(self, x: Annotated[Tensor, "... D"]) -> tuple[Annotated[Tensor, "... D"], NormInput]:
        """n in x's dtype, with its statistics in float32 at least."""
        if self.kind == "none":
            return x, NormInput(x)
        wide = accumulate_dtype(x.dtype)
        gamma, beta = (None if p is None else p.to(wide) for p in (self.gamma, self.beta))
        if self.kind == "layernorm":
            n, mean, rstd = torch.native_layer_norm(x.to(wide), x.shape[-1:], gamma, beta, self.eps)
            return n.to(x.dtype), NormInput(x, mean, rstd)
        rstd = (x.to(wide).square().mean(-1, keepdim=True) + self.eps).rsqrt()
        n = x.to(wide) * rstd
        return (n if gamma is None else n * gamma).to(x.dtype), NormInput(x, None, rstd)

    def backward(self, grad: Annotated[Tensor, "... D"], norm_in: NormInput, rule: str = "gradient") -> Tensor:
        """∂metric/∂x from grad = ∂metric/∂n, same shape; rule "frozen" takes σ as a constant."""
        if self.kind == "none":
            return grad
        assert norm_in.rstd is not None
        wide, centred = accumulate_dtype(grad.dtype), self.kind == "layernorm"
        if centred and rule != "frozen":
            assert norm_in.mean is not None
            # The operator reads the statistics as if they were contiguous, whatever their strides.
            statistics = norm_in.mean.contiguous(), norm_in.rstd.contiguous()
            gamma, beta = (None if p is None else p.to(wide) for p in (self.gamma, self.beta))
            args = (grad.to(wide), norm_in.x.to(wide), grad.shape[-1:], *statistics, gamma, beta, [True, False, False])
            return torch.ops.aten.native_layer_norm_backward(*args)[0].to(grad.dtype)
        scaled = grad.to(wide) if self.gamma is None else grad.to(wide) * self.gamma.to(wide)
        if centred:
            scaled = scaled - scaled.mean(-1, keepdim=True)
        elif rule != "frozen":
            x_hat = norm_in.x.to(wide) * norm_in.rstd
            scaled = scaled - x_hat * (scaled * x_hat).mean(-1, keepdim=True)
        return (scaled * norm_in.rstd).to(grad.dtype)

    def frozen_weight(self, w: Annotated[Tensor, "C D K"]) -> Annotated[Tensor, "C D K"]:
        """(1 − 11ᵀ/D) diag(γ) W, for RMSNorm diag(γ) W.

        With σ frozen, ∂metric/∂v = (1/σ)(γ∘(W g) − mean(γ∘(W g))·1) is this matrix times g/σ: a projection without a
        norm.
        """
        scaled = w.to(accumulate_dtype(w.dtype))
        if self.gamma is not None:
            scaled = scaled * self.gamma.to(scaled.dtype)[:, None]
        return (scaled - scaled.mean(1, keepdim=True) if self.kind == "layernorm" else scaled).to(w.dtype)

    def for_kernels(self, norm_in: NormInput) -> kernels.Norm:
        """What `kernels.receiver_grads` reads of it."""
        if self.kind == "none":
            return kernels.Norm("none")
        assert norm_in.rstd is not None
        return kernels.Norm(self.kind, norm_in.x_hat(), norm_in.rstd.squeeze(-1), self.gamma)


NO_NORM = Norm()
