"""Importance of nodes for pruning, and edges by their ends.

    I[c] = mean over pairs of |Σ_t ⟨x_ablated[c, t] − x_clean[c, t], ∂metric/∂x[c, t]⟩|
    I′[c] = I[c] / ‖I of its layer‖₂

Of nodes x is what a sender sends: a head, an MLP, the embedding, a layer of its own. Of edges it is each head's q, k
and v, before norms and rotation, and what each MLP sends. Where nodes are taken away from the least important one on,
an edge goes with the first of its ends: its score is the smaller of the two. A head sends until its q, k and v are all
gone, so that as a sender it counts as the largest of them; the embedding and the logits are never taken away. Source:
Michel, Levy, Neubig 2019 (heads, with zeros); Conmy et al. 2023, section 4.2 and its code, for q, k, v and MLPs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
from torch import Tensor

from eapcore.attribution.methods import Pass
from eapcore.attribution.nodes import Nodes, NodeStore
from eapcore.attribution.sums import Sums, over_steps
from eapcore.execution.batch import Batch
from eapcore.graph.graph import Graph
from eapcore.models.attention import Channels
from eapcore.models.model import Model
from eapcore.models.tensors import at_positions, on


class EndStore(NodeStore):
    """The differences of the MLPs and of each head's q, k and v, for scores [R] of what lies behind each receiver."""

    channels = True

    def __init__(self, model: Model, batch: Batch) -> None:
        super().__init__(model, batch, units=False)
        self.moved_qkv: dict[int, tuple[Tensor, Tensor]] = {}

    def set_channels(self, index: int, q: Tensor, kv: Tensor) -> None:
        self.moved_qkv[index] = q, kv

    def sink(self, sums: Sums, step: Pass) -> Nodes:
        return _Ends(self, sums, step)


class _Ends(Nodes):
    """Multiplies what an MLP sends more, and what a head's q, k and v are more, with the gradient there."""

    store: EndStore

    def behind(self, name: str, senders: slice, grad: Tensor, at_read: bool) -> None:
        if name[0] != "m":
            return
        model, store, index = self.store.model, self.store, int(name[1:])
        assert store.mlp is not None
        delta = at_positions(store.mlp[index], on(store.read, grad.device) if at_read else None)
        grad = over_steps(grad, 0, len(store.read)).to(model.dtype)
        self.add("scores", "btd,btd->{}", delta, grad, (model.graph.mlp_receiver(index),), at_read)

    def channels(self, part: Channels) -> Tensor:
        q, kv = self.store.moved_qkv[part.index]
        first, kinds = part.attention.channels[1].start, [part.attention.of_each(kv)]
        if part.channels.start < first:
            first, kinds = 0, [q] if part.at_read else [q, *kinds]
        delta = (kinds[0] if len(kinds) == 1 else torch.cat(kinds, 2))[
            :, :, part.channels.start - first : part.channels.stop - first
        ]
        grad = over_steps(part.g, 0, len(self.store.read))
        self.add("scores", "btck,btck->{}c", delta, grad, (part.receivers,), part.at_read)
        return part.total()


def over_layers(graph: Graph, values: Annotated[Tensor, "S | R"]) -> Annotated[Tensor, "S | R"]:
    """The norm of a layer's importances, for each sender, or for each receiver by what lies behind it; 1 where it is 0,
    and for the logits."""
    norms = torch.ones_like(values)
    of_senders = len(values) == graph.n_senders
    parts = [slice(0, 1)] if of_senders else []
    for layer in range(graph.n_layers):
        part = graph.heads(layer) if of_senders else graph.qkv(layer)
        parts.append(slice(part.start, part.stop + graph.has_mlp))
    for part in parts:
        norm = values[part].double().norm()
        norms[part] = norm.where(norm > 0, 1.0).to(values.dtype)
    return norms


def deciding_end(graph: Graph, values: Annotated[Tensor, "R"]) -> Annotated[Tensor, "int64 S R"]:
    """Which receiver's importance is an edge's: of its own, or of what its sender is made of, that which goes first."""
    shown = values.double().clone()
    shown[graph.logits] = torch.inf
    largest = int(values[: graph.logits].argmax()) if graph.n_layers else graph.logits  # never to be taken away
    of_sender = torch.full((graph.n_senders,), graph.logits, device="cpu")
    for receiver in range(graph.logits):
        for sender in graph.senders_behind(receiver):
            known = int(of_sender[sender])
            if known == graph.logits or shown[receiver] > shown[known]:
                of_sender[sender] = receiver
    receivers = torch.arange(graph.n_receivers, device="cpu")
    ends = receivers.where(shown <= shown[of_sender][:, None], of_sender[:, None])
    return ends.where(ends != graph.logits, largest)


def pruned(
    graph: Graph, whole: Mapping[str, Tensor], parts: Mapping[str, Tensor], *, normalised: bool, by_ends: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Importances of nodes, their mean over pairs and that of each pair or their sum, as the scores that are wanted."""
    values, each = whole["scores"].cpu(), parts["scores"].cpu()
    if normalised:
        norms = over_layers(graph, values)
        values, each = values / norms, each / norms
    if by_ends:
        ends, mask = deciding_end(graph, values), graph.edge_mask()
        values, each = values[ends] * mask, each[..., ends] * mask
    return {"scores": values}, {"scores": each}
