"""Rotary positions: queries and keys turned by angles that grow with their position, and gradients turned back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from eapcore.models.tensors import accumulate_dtype


@dataclass(frozen=True, slots=True)
class Rotary:
    """Dimensions i and i + n/2 of the first n of a head's K are turned together by position · frequencies[i].

    frequencies: float64 [n/2], radians a position. adjacent: dimensions 2i and 2i + 1 are turned together instead.
    Source: Su et al. 2021, in the order of GPT-NeoX and Llama; adjacent pairs in that of GPT-J.
    """

    frequencies: Annotated[Tensor, "float64 F"]
    adjacent: bool = False

    def turn(
        self, x: Annotated[Tensor, "... T K"], positions: Annotated[Tensor, "int64 ... T"], sign: int = 1
    ) -> Annotated[Tensor, "... T K"]:
        """x at these positions, turned; with sign −1 turned back, which is the transpose. Same dtype."""
        wide, half = accumulate_dtype(x.dtype), len(self.frequencies)
        angles = positions[..., None] * (sign * self.frequencies.to(positions.device))
        cos, sin = angles.cos().to(wide), angles.sin().to(wide)  # [.., T, n/2]
        if self.adjacent:
            turned, rest = x.to(wide).split([2 * half, x.shape[-1] - 2 * half], -1)
            first, second = turned[..., ::2], turned[..., 1::2]
            both = torch.stack([first * cos - second * sin, second * cos + first * sin], -1).flatten(-2)
            return torch.cat([both, rest], -1).to(x.dtype)
        first, second, rest = x.to(wide).split([half, half, x.shape[-1] - 2 * half], -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1).to(x.dtype)

    def back(
        self, grad: Annotated[Tensor, "... T K"], positions: Annotated[Tensor, "int64 ... T"]
    ) -> Annotated[Tensor, "... T K"]:
        """The gradient of what was turned, from that of the result."""
        return self.turn(grad, positions, -1)
