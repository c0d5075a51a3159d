"""Which senders and receivers lie on paths: what reaches the logits, and what is reached from some senders.

Senders and receivers are in topological order, so that one sweep finds everything.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from eapcore.graph.graph import Graph


def moved_by(graph: Graph, receiver: int, coupled: bool = False) -> range:
    """The senders that send something else where a receiver reads something else: those that are made of it, and where
    the heads of a layer are coupled by a norm that they share, all heads of its layer."""
    behind = graph.senders_behind(receiver)
    layer, place = divmod(receiver, graph.receivers_per_layer)
    if not coupled or not behind or place >= graph.channels_per_layer:
        return behind
    heads = graph.heads(layer)
    return range(heads.start, heads.stop)


def reached(
    graph: Graph, mask: Annotated[Tensor, "bool S R"], origins: Annotated[Tensor, "bool S"], *, coupled: bool = False
) -> Annotated[Tensor, "bool S"]:
    """The senders with a path from one of the origins along the edges of a mask; the origins among them.

    A head is passed through from any of its q, k and v inputs; coupled: see `moved_by`.
    """
    found = origins.clone()
    for r in range(graph.n_receivers):
        behind = moved_by(graph, r, coupled)
        if behind and bool((mask[:, r] & found).any()):
            found[behind.start : behind.stop] = True
    return found


def needed(graph: Graph, mask: Annotated[Tensor, "bool S R"], *, coupled: bool = False) -> Annotated[Tensor, "bool S"]:
    """The senders with a path to the logits along the edges of a mask; coupled: see `moved_by`."""
    return _to_logits(graph, mask, coupled)[0]


def connected(graph: Graph, mask: Annotated[Tensor, "bool S R"]) -> Annotated[Tensor, "bool S R"]:
    """The edges of a mask that lie on a path from `embed` to the logits."""
    return mask & reached(graph, mask, graph.members([0]))[:, None] & _to_logits(graph, mask)[1]


def _to_logits(graph: Graph, mask: Tensor, coupled: bool = False) -> tuple[Tensor, Tensor]:
    """The senders, bool [S], and the receivers, bool [R], with a path to the logits."""
    senders = torch.zeros(graph.n_senders, dtype=torch.bool, device="cpu")
    receivers = torch.zeros(graph.n_receivers, dtype=torch.bool, device="cpu")
    for r in reversed(range(graph.n_receivers)):
        behind = moved_by(graph, r, coupled)
        receivers[r] = not behind or bool(senders[behind.start : behind.stop].any())
        if receivers[r]:
            senders |= mask[:, r]
    return senders, receivers
