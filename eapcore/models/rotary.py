"""Rotary positions: queries and keys turned by angles that grow with their position, and gradients turned back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from eapcore.kernels.steps import turn


@dataclass(frozen=True, slots=True)
class Rotary:
    """Dimensions i and i + n/2 of the first n of a head's K are turned together by position · frequencies[i].

    frequencies: float64 [n/2], radians a position. adjacent: dimensions 2i and 2i + 1 are turned together instead.
    Source: Su et al. 2021, in the order of GPT-NeoX and Llama; adjacent pairs in that of GPT-J.
    """

    frequencies: Annotated[Tensor, "float64 F"]
    adjacent: bool = False

    def turn(
        self,
        x: Annotated[Tensor, "... T K"],
        before: int,
        read: Annotated[Tensor, "int64 B T"] | None = None,
        sign: int = 1,
        out: Tensor | None = None,
    ) -> Annotated[Tensor, "... T K"]:
        """x at the positions behind `before`, or at those of them that are read, turned; with sign −1 turned back,
        which is the transpose. Same dtype; into out where it is given."""
        impl = "auto" if x.ndim == 4 else "reference"
        return turn(x, self.frequencies, before, read, sign=sign, adjacent=self.adjacent, out=out, impl=impl)

    def back(
        self,
        grad: Annotated[Tensor, "... T K"],
        before: int,
        read: Annotated[Tensor, "int64 B T"] | None = None,
        out: Tensor | None = None,
    ) -> Annotated[Tensor, "... T K"]:
        """The gradient of what was turned, from that of the result."""
        return self.turn(grad, before, read, -1, out)
