"""The MLP: what it reads and sends, and the gradients of its hidden units and of its input."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch import Tensor

from eapcore.graph.show import short
from eapcore.kernels import steps
from eapcore.kernels.steps import activation, gated_grad
from eapcore.models.backward_rules import GRADIENT, Rules
from eapcore.models.matmul import product, product_added
from eapcore.models.norm import NO_NORM, Norm, NormInput
from eapcore.models.tensors import accumulate_dtype


def activation_grad(name: str, grad: Tensor, hidden: Tensor, rule: str = "gradient") -> Tensor:
    """grad = ∂metric/∂act(hidden) taken through the activation function to ∂metric/∂hidden; rule as in `Rules`."""
    if rule == "gradient" or name == "relu":  # relu(h)/h and its derivative are the same
        return steps.activation_grad(name, grad, hidden)
    wide = hidden.to(accumulate_dtype(hidden.dtype))
    # act(h)/h without the division, which has no value at h = 0.
    if name == "silu":
        share = wide.sigmoid()
    elif name == "gelu":
        share = torch.special.ndtr(wide)
    else:
        share = 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (wide + 0.044715 * wide**3)))
    return grad * share.to(grad.dtype)


@dataclass(frozen=True, slots=True)
class MlpSaved:
    """What the way back needs: what the normalisation read, n W_in + b_in, n W_up + b_up where there is a W_up, and
    what the norm behind the MLP read where there is one."""

    norm_in: NormInput
    hidden: Annotated[Tensor, "B T M"]
    up: Annotated[Tensor, "B T M"] | None = None
    post_in: NormInput | None = None

    def of(self, take: Callable[[Tensor], Tensor]) -> MlpSaved:
        """The same of what `take` takes of each tensor."""
        post_in = None if self.post_in is None else self.post_in.of(take)
        return MlpSaved(self.norm_in.of(take), take(self.hidden), None if self.up is None else take(self.up), post_in)


@dataclass(frozen=True, slots=True)
class MlpRun:
    """saved, and what the MLP sends, its bias included."""

    saved: MlpSaved
    sent: Annotated[Tensor, "B T D"]


@dataclass(frozen=True, slots=True)
class Mlp:
    """units = act(n W_in + b_in), gated act(n W_in + b_in) ∘ (n W_up + b_up); it sends units W_out + b_out, behind
    a norm `post` where there is one.

    norm: what it reads through. w_in, w_up: [D, M]. w_out: [M, D]. act_fn: out of `config.ACTIVATIONS`. None is what a
    model does not have.
    """

    __repr__ = short

    norm: Norm
    w_in: Annotated[Tensor, "D M"]
    b_in: Annotated[Tensor, "M"] | None
    w_out: Annotated[Tensor, "M D"]
    b_out: Annotated[Tensor, "D"] | None
    act_fn: str
    w_up: Annotated[Tensor, "D M"] | None = None
    b_up: Annotated[Tensor, "M"] | None = None
    post: Norm = NO_NORM

    @property
    def device(self) -> torch.device:
        return self.w_out.device

    def named(self) -> Iterator[tuple[str, Tensor | None]]:
        """Its own weights, without those of its normalisation."""
        for name in ("w_in", "b_in", "w_out", "b_out", "w_up", "b_up"):
            yield name, getattr(self, name)
        yield "post_m.0", self.post.gamma

    # Forward

    def read(
        self,
        x: Annotated[Tensor, "B T D"],
        ready: tuple[Tensor, NormInput] | None = None,
        room: Callable[[str, int], Tensor | None] = lambda name, width: None,
    ) -> MlpSaved:
        """What the hidden units are made of, from the residual stream; ready: what the norm makes of it, where it is
        there. room: called with a name and M, where what it makes [B, T, M] goes, None for anywhere."""
        n, norm_in = self.norm.forward(x, self.w_in.dtype) if ready is None else ready
        hidden = product(n, self.w_in, self.b_in, room("hidden", self.w_in.shape[1]))
        if self.w_up is None:
            return MlpSaved(norm_in, hidden, None)
        return MlpSaved(norm_in, hidden, product(n, self.w_up, self.b_up, room("up", self.w_up.shape[1])))

    def units(self, saved: MlpSaved, dtype: torch.dtype | None = None) -> Annotated[Tensor, "B T M"]:
        """The hidden units, in another dtype where one is given."""
        dtype = saved.hidden.dtype if dtype is None else dtype
        units = activation(self.act_fn, saved.hidden.to(dtype))
        return units if saved.up is None else units * saved.up.to(dtype)

    def forward(self, x: Annotated[Tensor, "B T D"]) -> MlpRun:
        """What the MLP makes of the residual stream; `patched` is the same with another stream."""
        saved = self.read(x)
        made = product(self.units(saved), self.w_out, self.b_out)
        if self.post.kind == "none":
            return MlpRun(saved, made)
        sent, post_in = self.post.forward(made)
        return MlpRun(replace(saved, post_in=post_in), sent)

    def added(self, run: MlpRun) -> Annotated[Tensor, "B T D"]:
        """What it adds to the residual stream."""
        return run.sent

    # Backward

    def units_grad(
        self, saved: MlpSaved, grad: Annotated[Tensor, "B T D"], rules: Rules = GRADIENT
    ) -> Annotated[Tensor, "B T M"]:
        """∂metric/∂units from the gradient of the residual stream behind the MLP, in the weights' dtype."""
        grad = grad.to(self.w_out.dtype)
        if saved.post_in is not None:
            grad = self.post.backward(grad, saved.post_in, rules.norm)
        return product(grad, self.w_out.T)

    def backward(
        self, saved: MlpSaved, units: Annotated[Tensor, "B T M"], rules: Rules = GRADIENT
    ) -> Annotated[Tensor, "B T D"]:
        """∂metric/∂v of the MLP's receiver, from ∂metric/∂units."""
        return self.norm.backward(self._input_grad(saved, units, rules), saved.norm_in, rules.norm)

    def backward_added(
        self,
        saved: MlpSaved,
        units: Annotated[Tensor, "B T M"],
        total: Annotated[Tensor, "B T D"],
        out: Annotated[Tensor, "B T D"],
        rules: Rules = GRADIENT,
    ) -> tuple[Annotated[Tensor, "B T D"], Annotated[Tensor, "B T D"]]:
        """total and what `backward` returns, in total's and in the weights' dtype; out: where the latter goes alone."""
        return self.norm.backward_added(self._input_grad(saved, units, rules), saved.norm_in, total, rules.norm, out)

    def _input_grad(self, saved: MlpSaved, units: Tensor, rules: Rules) -> Annotated[Tensor, "B T D"]:
        """∂metric/∂n of what the MLP reads."""
        if saved.up is None or self.w_up is None:
            return product(activation_grad(self.act_fn, units, saved.hidden, rules.activation), self.w_in.T)
        units = units / 2 if rules.products == "halved" else units
        if rules.activation == "gradient":
            of_hidden, of_up = gated_grad(units, saved.hidden, saved.up, self.act_fn)
        else:
            of_hidden = activation_grad(self.act_fn, units * saved.up, saved.hidden, rules.activation)
            of_up = units * activation(self.act_fn, saved.hidden)
        return product_added(product(of_hidden, self.w_in.T), of_up, self.w_up.T)
