"""Differences kept for scores of nodes and neurons, met by the residual stream's gradient behind each sender."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eapcore.attribution.factored import FactoredStore
from eapcore.attribution.methods import Pass
from eapcore.attribution.sums import Sums, over_steps
from eapcore.execution.batch import Batch
from eapcore.models.backward import Sink, backward
from eapcore.models.forward import StageSaved
from eapcore.models.matmul import product
from eapcore.models.model import Model
from eapcore.models.tensors import accumulate_dtype, at_positions, on


class NodeStore(FactoredStore):
    """The same differences, and with `units` those of the MLPs' hidden units, for scores of what senders send."""

    steps = True

    def __init__(self, model: Model, batch: Batch, *, units: bool) -> None:
        super().__init__(model, batch)
        self.units: dict[int, Tensor] | None = {} if units else None

    def mlp_room(self, index: int) -> Tensor | None:
        return super().mlp_room(index) if self.units is None else None

    def set_mlp(self, index: int, delta: Tensor, units: Tensor | None) -> None:
        super().set_mlp(index, delta, units)
        if self.units is not None and units is not None:
            self.units[index] = units

    def contract(
        self, sums: Sums, saved: list[StageSaved], grad: Tensor, past: list[Tensor] | None, step: Pass
    ) -> None:
        read = self.read.repeat(len(grad) // len(self.read), 1)
        backward(self.model, saved, grad, self.sink(sums, step), rules=step.rules, past=past, read=read)

    def sink(self, sums: Sums, step: Pass) -> Nodes:
        """What takes the gradients of a backward pass."""
        return Nodes(self, sums, step)


class Nodes(Sink):
    """Multiplies what a sender sends more with the residual stream's gradient behind it."""

    def __init__(self, store: NodeStore, sums: Sums, step: Pass) -> None:
        self.store, self.sums, self.step = store, sums, step

    def behind(self, name: str, senders: slice, grad: Tensor, at_read: bool) -> None:
        model, store = self.store.model, self.store
        read = on(store.read, grad.device) if at_read else None
        if self.sums.absolute and name in self.step.rules.cut:
            return
        grad = over_steps(grad, 0, len(store.read)).to(model.dtype)
        if name[0] == "a":
            attention, dz = model.attentions[int(name[1:])], at_positions(store.dz[int(name[1:])], read)
            if store.units is None:  # ⟨Δz W_O, grad⟩ = ⟨Δz, grad W_Oᵀ⟩, without an axis D for each head
                w_send = attention.w_send
                d_z = product(grad, w_send.flatten(0, 1).T).unflatten(-1, w_send.shape[:2])
                self.add("scores", "bthk,bthk->{}h", dz, d_z, (senders,), at_read)
                return
            delta = attention.send(dz)  # [H, B, T, D]
        elif name == "embed":
            delta = store.embed[None]
        else:
            assert store.mlp is not None
            delta = at_positions(store.mlp[int(name[1:])], read)[None]
        self.add("scores", "sbtd,btd->{}s", delta, grad, (senders,), at_read)
        if store.units is not None:
            self.add("dimensions", "sbtd,btd->{}sd", delta, grad, (senders, slice(None)), at_read)

    def units(self, index: int, grad: Tensor, at_read: bool) -> None:
        if self.store.units is not None:
            grad = over_steps(grad, 0, len(self.store.read))
            self.add("units", "btm,btm->{}m", self.store.units[index], grad, (index, slice(None)), at_read)

    def add(self, name: str, formula: str, delta: Tensor, grad: Tensor, place: tuple[Any, ...], at_read: bool) -> None:
        wide = accumulate_dtype(delta.dtype)
        kept = {"all": "", "pair": "b", "position": "t"}[self.sums.reduction(at_read)]
        block = torch.einsum(formula.format(kept), delta.to(wide), grad.to(wide))
        self.sums.add(name, block, place, self.step.weight, at_read)
