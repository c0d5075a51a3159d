"""What a forward pass made and what the backward pass needs of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class NormInput:
    """What a normalisation read: x [B, T, D], its mean and 1/σ [B, T, 1] (None where there is no normalisation)."""

    x: Tensor
    mean: Tensor | None = None
    rstd: Tensor | None = None

    def x_hat(self) -> Tensor:
        """The normalised stream (x − μ)/σ, [B, T, D] in x's dtype."""
        if self.mean is None or self.rstd is None:
            raise ValueError("x_hat needs a normalisation, this stream has none")
        return ((self.x - self.mean) * self.rstd).to(self.x.dtype)

    def of(self, take: Callable[[Tensor], Tensor]) -> NormInput:
        """The same of what `take` takes of each tensor."""
        return NormInput(take(self.x), *(None if s is None else take(s) for s in (self.mean, self.rstd)))

    def at(self, read: Tensor) -> NormInput:
        """The same at the positions read [B, Q] alone."""
        return self.of(lambda x: at_positions(x, read))


@dataclass(frozen=True, slots=True)
class LayerSaved:
    """What the backward pass needs of one layer.

    attn_in, mlp_in: what its two normalisations read. qkv: [B, T, 3H, K], the q, then k, then v heads; in a last layer
    where only Q positions are read (see `run_layers`), q [B, Q, H, K] and the others [B, T, 2H, K] apart. hidden:
    [B, Q, M] before the activation function; None, as mlp_in, without an MLP.
    """

    attn_in: NormInput
    qkv: tuple[Tensor, ...]
    mlp_in: NormInput | None = None
    hidden: Tensor | None = None

    def copy(self, rows: slice) -> LayerSaved:
        """The same of some of the batch's prompts, in memory of its own: a view would keep all prompts' alive."""
        return LayerSaved(
            self.attn_in.of(lambda x: x[rows].clone()),
            tuple(t[rows].clone() for t in self.qkv),
            None if self.mlp_in is None else self.mlp_in.of(lambda x: x[rows].clone()),
            None if self.hidden is None else self.hidden[rows].clone(),
        )

    @property
    def q(self) -> Tensor:
        """[B, Q, H, K]."""
        return self.qkv[0] if len(self.qkv) == 2 else self.qkv[0][:, :, : self.qkv[0].shape[2] // 3]

    @property
    def kv(self) -> Tensor:
        """[B, T, 2H, K], the k and then the v heads."""
        return self.qkv[1] if len(self.qkv) == 2 else self.qkv[0][:, :, self.qkv[0].shape[2] // 3 :]


@dataclass(frozen=True, slots=True)
class LayerRun:
    """What one layer made of the residual stream.

    saved: what the backward pass needs. z: [B, Q, H, K] mixtures of v, in float32 at least, so that head h sends
    z[:, :, h] @ w_o[h]. mlp: [B, Q, D] what the MLP sends, its bias included, None without. out: [B, Q, D] the residual
    stream behind the layer.
    """

    saved: LayerSaved
    z: Tensor
    mlp: Tensor | None
    out: Tensor


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype for sums and statistics: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def at_positions(x: Tensor, read: Tensor | None) -> Tensor:
    """x [B, T, ...] at the positions read [B, Q]: [B, Q, ...]; x itself for None."""
    return x if read is None else x[torch.arange(len(x), device=x.device)[:, None], read]
