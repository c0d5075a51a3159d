"""A normalisation of the residual stream: forward, backward, and what the kernels' closed form needs of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

import eapcore.kernels as kernels
from eapcore.graph.show import short
from eapcore.kernels.steps import (
    moved_sum,
    moved_sum_normalised,
    normalise,
    normalise_grad,
    normalise_grad_added,
    standardise,
)
from eapcore.models.tensors import accumulate_dtype, at_positions


@dataclass(frozen=True, slots=True)
class NormInput:
    """What a normalisation read: x [B, T, D], its mean and 1/σ [B, T, 1] (None where there is none of them)."""

    x: Annotated[Tensor, "B T D"]
    mean: Annotated[Tensor, "B T 1"] | None = None
    rstd: Annotated[Tensor, "B T 1"] | None = None

    def x_hat(self, dtype: torch.dtype | None = None) -> Annotated[Tensor, "B T D"]:
        """The normalised stream (x − μ)/σ, without a mean x/σ, in a dtype, None for x's."""
        if self.rstd is None:
            raise ValueError("x_hat needs a normalisation, this stream has none")
        return standardise(self.x, self.mean, self.rstd, dtype=dtype)

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

    def forward(
        self, x: Annotated[Tensor, "... D"], dtype: torch.dtype | None = None
    ) -> tuple[Annotated[Tensor, "... D"], NormInput]:
        """n in a dtype, None for x's, with its statistics in float32 at least."""
        dtype = x.dtype if dtype is None else dtype
        if self.kind == "none":
            return x.to(dtype), NormInput(x)
        n, mean, rstd = normalise(x, self.gamma, self.beta, self.eps, centred=self.kind == "layernorm", dtype=dtype)
        return n, NormInput(x, mean, rstd)

    def behind_sum(
        self,
        x: Annotated[Tensor, "1 N D"],
        sent: Annotated[Tensor, "1 N-C D"],
        difference: Annotated[Tensor, "1 C D"],
        bias: Annotated[Tensor, "D"] | None,
        out: Annotated[Tensor, "1 N D"] | None,
        kept: Annotated[Tensor, "C D"] | None = None,
    ) -> tuple[Annotated[Tensor, "1 N D"], tuple[Annotated[Tensor, "1 N D"], NormInput]]:
        """`moved_sum` and what `forward` makes of it, in the dtype of what was sent."""
        if self.kind == "none":
            dtype, summed = sent.dtype, moved_sum(x, sent, difference, bias, out=out, kept=kept)
            return summed, (summed.to(dtype), NormInput(summed))
        how = (self.gamma, self.beta, self.eps)
        centred = self.kind == "layernorm"
        summed, (n, *statistics) = moved_sum_normalised(
            x, sent, difference, bias, *how, centred=centred, out=out, kept=kept
        )
        return summed, (n, NormInput(summed, *statistics))

    def rstd(self, x: Annotated[Tensor, "... D"]) -> Annotated[Tensor, "... 1"]:
        """1/σ of x, in float32 at least, where there is one."""
        return normalise(x, None, None, self.eps, centred=self.kind == "layernorm")[2]

    def backward(self, grad: Annotated[Tensor, "... D"], norm_in: NormInput, rule: str = "gradient") -> Tensor:
        """∂metric/∂x from grad = ∂metric/∂n, same shape; rule "frozen" takes σ as a constant."""
        if self.kind == "none":
            return grad
        assert norm_in.rstd is not None
        statistics = (norm_in.mean, norm_in.rstd)
        return normalise_grad(grad, norm_in.x, *statistics, self.gamma, self.beta, frozen=rule == "frozen")

    def backward_added(
        self,
        grad: Annotated[Tensor, "... D"],
        norm_in: NormInput,
        total: Annotated[Tensor, "... D"],
        rule: str = "gradient",
        out: Annotated[Tensor, "... D"] | None = None,
        read: Annotated[Tensor, "int64 B Q"] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """total and the gradient that `backward` makes, in total's dtype and in grad's; out: where it goes alone; read:
        the positions at which total [B, Q, D] is not 0."""
        if self.kind == "none":
            if out is not None:
                out.copy_(grad)
            if read is None:
                summed = total + grad
            else:
                summed = grad.to(total.dtype, copy=True).scatter_add_(1, read[..., None].expand_as(total), total)
            return summed, summed.to(grad.dtype)
        assert norm_in.rstd is not None
        how = (norm_in.x, norm_in.mean, norm_in.rstd, self.gamma, self.beta, total)
        return normalise_grad_added(grad, *how, read=read, frozen=rule == "frozen", out=out)

    def along(self, moved: Annotated[Tensor, "... D"], norm_in: NormInput) -> Annotated[Tensor, "... D"]:
        """How n moves to first order where x moves by so much, in float32 at least: the transpose of `backward`."""
        if self.kind == "none":
            return moved
        assert norm_in.rstd is not None
        wide = accumulate_dtype(moved.dtype)
        x_hat, made = norm_in.x_hat().to(wide), moved.to(wide) * norm_in.rstd
        if self.kind == "layernorm":
            made = made - made.mean(-1, keepdim=True)
        made = made - x_hat * (x_hat * made).mean(-1, keepdim=True)
        return made if self.gamma is None else made * self.gamma.to(wide)

    def frozen_weight(self, w: Annotated[Tensor, "C D K"]) -> Annotated[Tensor, "C D K"]:
        """(1 − 11ᵀ/D) diag(γ) W, for RMSNorm diag(γ) W.

        With σ frozen, ∂metric/∂v = (1/σ)(γ∘(W g) − mean(γ∘(W g))·1) is this matrix times g/σ: a projection without a
        norm.
        """
        scaled = w.to(accumulate_dtype(w.dtype))
        if self.gamma is not None:
            scaled = scaled * self.gamma.to(scaled.dtype)[:, None]
        return (scaled - scaled.mean(1, keepdim=True) if self.kind == "layernorm" else scaled).to(w.dtype)

    def for_kernels(self, norm_in: NormInput, dtype: torch.dtype, *, standardised: bool = True) -> kernels.Norm:
        """What `kernels.receiver_grads` reads of it, in the gradients' dtype; else of the stream itself."""
        if self.kind == "none":
            return kernels.Norm("none")
        assert norm_in.rstd is not None
        if not standardised:
            mean = None if norm_in.mean is None else norm_in.mean.squeeze(-1)
            return kernels.Norm(self.kind, None, norm_in.rstd.squeeze(-1), self.gamma, norm_in.x, mean)
        return kernels.Norm(self.kind, norm_in.x_hat(dtype), norm_in.rstd.squeeze(-1), self.gamma)


NO_NORM = Norm()
