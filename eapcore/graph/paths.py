"""What reaches the logits, and what is reached from some senders."""

from __future__ import annotations

import torch
from torch import Tensor

from eapcore.graph.graph import Graph


def needed(graph: Graph, mask: Tensor) -> Tensor:
    """bool [S], the senders with a path to the logits in mask [S, R]."""
    to_logits = torch.zeros(graph.n_senders, dtype=torch.bool, device="cpu")
    for r in reversed(range(graph.n_receivers)):
        component = graph.component(r)
        if component is None or bool(to_logits[component]):
            to_logits |= mask[:, r]
    return to_logits


def reached(graph: Graph, mask: Tensor, origins: Tensor) -> Tensor:
    """bool [S], the senders with a path from one of the origins, bool [S], in mask [S, R]; the origins among them."""
    found = origins.clone()
    for r in range(graph.n_receivers - 1):
        component = graph.component(r)
        if component is not None and bool((mask[:, r] & found).any()):
            found[component] = True
    return found


def _members(graph: Graph, senders: set[int]) -> Tensor:
    found = torch.zeros(graph.n_senders, dtype=torch.bool, device="cpu")
    found[list(senders)] = True
    return found
