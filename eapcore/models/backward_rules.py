"""How the backward pass goes through what is not linear: by its derivative, or by a relevance rule."""

from __future__ import annotations

import math
from dataclasses import dataclass

from eapcore.kernels.checks import one_of, short_repr


@dataclass(frozen=True, slots=True)
class Rules:
    """The rule for each kind of nonlinearity; the default is the derivative of them all.

    norm: "frozen" takes the σ of every norm as a constant, x ↦ γ∘(x − μ)/σ + β, the mean staying part of x; those of
    queries and keys, and those behind heads and MLPs, too.
    activation: "identity" multiplies the gradient by act(h)/h instead of act′(h).
    attention: "frozen" takes the attention pattern as a constant: only v gets a gradient, and q and k none.
    temperature: the softmax's derivative is that of softmax(s / temperature) by s / temperature; above 1 it is flatter.
    products: "halved" gives each of two activations that are multiplied half of its gradient: q and k, the pattern and
    v, so that v gets a half and q and k a quarter, and both branches of gated units. Beside a frozen pattern, which is
    a constant, v gets all of it.
    cut: components that no gradient goes through, "a{l}" all heads of a layer and "m{l}" its MLP.
    """

    norm: str = "gradient"
    activation: str = "gradient"
    attention: str = "gradient"
    temperature: float = 1.0
    products: str = "gradient"
    cut: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        one_of("rules.norm", self.norm, ("gradient", "frozen"))
        one_of("rules.activation", self.activation, ("gradient", "identity"))
        one_of("rules.attention", self.attention, ("gradient", "frozen"))
        one_of("rules.products", self.products, ("gradient", "halved"))
        t = self.temperature
        if not isinstance(t, int | float) or isinstance(t, bool) or not 0 < t < math.inf:
            raise ValueError(f"rules.temperature must be a number above 0, got {short_repr(t)}")
        if self.attention == "frozen" and t != 1:
            raise ValueError(
                f"with rules.attention='frozen' the pattern has no gradient: rules.temperature must be 1, got {t!r}"
            )


GRADIENT = Rules()
RELP = Rules(norm="frozen", activation="identity", attention="frozen", products="halved")
GIM = Rules(norm="frozen", temperature=2.0, products="halved")
