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

    frequencies: float64 [n/2], radians a position. Source: Su et al. 2021, in the order of GPT-NeoX and Llama.
    """

    frequencies: Annotated[Tensor, "float64 F"]

    def turn(
        self, x: Annotated[Tensor, "... T K"], positions: Annotated[Tensor, "int64 ... T"], sign: int = 1
    ) -> Annotated[Tensor, "... T K"]:
        """x at these positions, turned; with sign −1 turned back, which is the transpose. Same dtype."""
        wide, half = accumulate_dtype(x.dtype), len(self.frequencies)
        angles = positions[..., None] * (sign * self.frequencies.to(positions.device))
        cos, sin = angles.cos().to(wide), angles.sin().to(wide)  # [.., T, n/2]
        first, second, rest = x.to(wide).split([half, half, x.shape[-1] - 2 * half], -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1).to(x.dtype)

    def back(
        self, grad: Annotated[Tensor, "... T K"], positions: Annotated[Tensor, "int64 ... T"]
    ) -> Annotated[Tensor, "... T K"]:
        """The gradient of what was turned, from that of the result."""
        return self.turn(grad, positions, -1)
