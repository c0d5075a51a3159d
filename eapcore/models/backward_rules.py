"""How the backward pass goes through what is not linear: by its derivative, or by a relevance rule."""

from __future__ import annotations

from dataclasses import dataclass

from eapcore.kernels.checks import one_of


@dataclass(frozen=True, slots=True)
class Rules:
    """The rule for each kind of nonlinearity; the default is the derivative of them all.

    norm: "frozen" takes LayerNorm's σ as a constant, x ↦ γ∘(x − μ)/σ + β, the mean staying part of x.
    activation: "identity" multiplies the gradient by act(h)/h instead of act′(h).
    attention: "frozen" takes the attention pattern as a constant: only v gets a gradient, and q and k none.
    cut: components that no gradient goes through, "a{l}" all heads of a layer and "m{l}" its MLP.
    """

    norm: str = "gradient"
    activation: str = "gradient"
    attention: str = "gradient"
    cut: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        one_of("rules.norm", self.norm, ("gradient", "frozen"))
        one_of("rules.activation", self.activation, ("gradient", "identity"))
        one_of("rules.attention", self.attention, ("gradient", "frozen"))


GRADIENT = Rules()
RELP = Rules(norm="frozen", activation="identity", attention="frozen")
