"""EAP-IG's order and names of senders and receivers, and ours."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import torch
from torch import Tensor

from eapcore.graph.graph import Graph

# Names and order


def as_theirs(graph: Graph) -> Graph:
    """The package's graph of a model: with MLPs, and with one k and one v input for each query head."""
    return replace(graph, has_mlp=True, n_kv=None)


def their_shape(graph: Graph) -> tuple[int, int]:
    """(n_forward, n_backward) of the package's tensors."""
    full = as_theirs(graph)
    return full.n_senders, full.n_receivers


def in_their_order(graph: Graph, ours: Annotated[Tensor, "S R"]) -> Annotated[Tensor, "S' R'"]:
    """A tensor [S, R] in the package's rows and columns; MLPs that the model has not are zero."""
    rows, columns = _places(graph, ours.device)
    theirs = ours.new_zeros(their_shape(graph))
    theirs[rows, columns] = ours
    return theirs


def in_our_order(graph: Graph, theirs: Annotated[Tensor, "S' R'"]) -> Annotated[Tensor, "S R"]:
    """The inverse of `in_their_order`; ValueError for another shape, or an edge of an MLP that is not there."""
    if theirs.shape != their_shape(graph):
        raise ValueError(f"expected [senders, receivers] = {list(their_shape(graph))}, got {list(theirs.shape)}")
    rows, columns = _places(graph, theirs.device)
    ours = theirs[rows, columns]
    if int(theirs.ne(0).sum()) != int(ours.ne(0).sum()):
        raise ValueError("there are edges of MLPs, but the graph is attention-only: read it with attn_only=False")
    return ours


def of_each_head(graph: Graph, mask: Annotated[Tensor, "bool S R"]) -> Annotated[Tensor, "bool S R'"]:
    """The edges of a graph whose k and v heads are receivers of their own, as those of the query heads of each group.

    Which is the same circuit: the heads of a group read one stream in both.
    """
    if graph.n_kv is None:
        return mask
    each, size = replace(graph, n_kv=None), graph.n_heads // graph.n_kv
    columns = []
    for layer in range(graph.n_layers):
        q, kv = graph.qkv(layer).start, graph.qkv(layer).start + graph.n_heads
        columns += list(range(q, kv))
        columns += [kv + part * graph.n_kv + head // size for part in range(2) for head in range(graph.n_heads)]
        columns += [graph.mlp_receiver(layer)] * graph.has_mlp
    found = mask[:, [*columns, graph.logits]]
    assert found.shape[1] == each.n_receivers
    return found


def _places(graph: Graph, device: torch.device) -> tuple[Tensor, Tensor]:
    """Indices of our rows, [S, 1], and of our columns, [R], in the package's tensors."""
    full = as_theirs(graph)
    rows = [full.sender(name) for name in graph.sender_names]
    columns = [full.receiver(name) for name in graph.receiver_names]
    return torch.tensor(rows, device=device)[:, None], torch.tensor(columns, device=device)


def their_name(name: str) -> str:
    """A sender, a receiver or an edge in the package's spelling: `embed->a0.h1<q>` is `input->a0.h1<q>`."""
    return "input" + name[5:] if name.startswith("embed") else name


def our_name(name: str) -> str:
    """The inverse of `their_name`."""
    return "embed" + name[5:] if name.startswith("input") else name
