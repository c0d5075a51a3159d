"""Adam, for the few numbers that are trained beside a model: torch's own takes seconds to be imported."""

from __future__ import annotations

import torch
from torch import Tensor


class Adam:
    """Steps against a gradient, each coordinate by its own scale.

        a ← β₁ a + (1 − β₁) g        b ← β₂ b + (1 − β₂) g²
        x ← x − rate · (a / (1 − β₁ᵗ)) / (√(b / (1 − β₂ᵗ)) + ε)

    with β₁ = 0.9, β₂ = 0.999 and ε = 1e-8. Source: Kingma, Ba 2015, algorithm 1.
    """

    def __init__(self, x: Tensor, rate: float) -> None:
        """x: what is moved in place, of any shape."""
        self.x, self.rate, self.steps = x, rate, 0
        self.mean, self.square = torch.zeros_like(x), torch.zeros_like(x)

    @torch.no_grad()
    def step(self, grad: Tensor) -> None:
        self.steps += 1
        self.mean.lerp_(grad, 0.1)
        self.square.mul_(0.999).addcmul_(grad, grad, value=0.001)
        scale = (self.square / (1 - 0.999**self.steps)).sqrt() + 1e-8
        self.x.addcdiv_(self.mean, scale, value=-self.rate / (1 - 0.9**self.steps))
