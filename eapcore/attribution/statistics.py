"""How scores vary over prompt pairs, from sums that are kept while the pairs are scored.

Of the scores x_i [S, R] of the pairs i = 1…N, beside Σ x_i:

    standard error     √(Σ (x_i − mean)² / (N (N − 1)))        by Σ x_i²
    sign consistency   share of the pairs whose score has the sign of the mean        by counts of x_i > 0, x_i < 0
    Jaccard index      |A ∩ B| / |A ∪ B| of the top n edges by |score| of two bootstrap draws of the pairs, the mean
                       over some, each with the next, for every n        by Σ w_ki x_i, w_ki how often draw k has pair i

All are sums over pairs, in float64: they add up over batches, over processes, and over what a resumed run has done.
Source of the bootstrap: Efron 1979, "Bootstrap methods: another look at the jackknife".
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from eapcore.execution.memory import budget
from eapcore.execution.prefetch import sent
from eapcore.graph.graph import Graph

DRAWS = 20  # of the bootstrap
ARRAYS = DRAWS + 3  # float64 [S, R] that are kept beside the scores
_BLOCK = 1024  # pairs that are drawn again among themselves, so that a draw needs no list of all pairs
_SHARE = 8  # of the memory for a batch, the part that may go to what is kept


def affordable(graph: Graph, device: torch.device) -> bool:
    """Whether there is memory for what is kept, and for a few pairs' scores."""
    return 8 * (ARRAYS + 4) * graph.n_senders * graph.n_receivers <= budget(device) // _SHARE


def shapes(graph: Graph) -> dict[str, tuple[int, ...]]:
    """What is summed up over pairs, by name."""
    one = (graph.n_senders, graph.n_receivers)
    return {"squares": one, "positive": one, "negative": one, "draws": (DRAWS, *one)}


def sums_of(scores: Tensor, index: Sequence[int], n_pairs: int) -> dict[str, Tensor]:
    """The sums over some pairs from their scores, float64 [B, S, R]; index: which of the task's pairs they are."""
    counts = sent(_counts(index, n_pairs), scores.device)
    return {
        "squares": scores.square().sum(0),
        "positive": (scores > 0).sum(0, dtype=torch.float64),
        "negative": (scores < 0).sum(0, dtype=torch.float64),
        "draws": (counts @ scores.flatten(1)).unflatten(1, scores.shape[1:]),
    }


def described(total: Tensor, sums: dict[str, Tensor], n_pairs: int, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Standard errors and sign consistencies [S, R], 0 where there is no edge, and the Jaccard index [E] of the top
    1…E edges.

    total: Σ scores over pairs, float64 [S, R]. sums: of all pairs. mask: the edges, bool [S, R].
    """
    squares = (sums["squares"] - total.square() / n_pairs).clamp(min=0)
    share = torch.where(total > 0, sums["positive"], sums["negative"]) / n_pairs
    jaccard = _jaccard(sums["draws"][:, mask.to(total.device)].abs().cpu())
    return (squares / (n_pairs * (n_pairs - 1))).sqrt(), share.where(total != 0, 0.0), jaccard


def _jaccard(values: Tensor) -> Tensor:
    """[E] the mean Jaccard index of the top 1…E of each of the rows [K, E] and the next."""
    draws, edges = values.shape
    order = values.sort(dim=1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(edges, device="cpu").expand(draws, -1))
    n, total = torch.arange(1, edges + 1, device="cpu"), torch.zeros(edges, dtype=torch.float64, device="cpu")
    for here, there in zip(rank, rank.roll(1, 0), strict=True):
        # An edge is in both tops from the larger of its two ranks on.
        common = torch.maximum(here, there).bincount(minlength=edges).cumsum(0).double()
        total += common / (2 * n - common)
    return total / draws


def _counts(index: Sequence[int], n_pairs: int) -> Tensor:
    """float64 [DRAWS, B], how often each draw has some pairs."""
    at = [divmod(pair, _BLOCK) for pair in index]
    return torch.stack([_drawn(block, min(_BLOCK, n_pairs - block * _BLOCK))[:, i] for block, i in at], 1)


@lru_cache(maxsize=64)
def _drawn(block: int, size: int) -> Tensor:
    """float64 [DRAWS, size], how often each draw has the pairs of a block: as many as it has, with replacement."""
    drawn = torch.randint(size, (DRAWS, size), generator=torch.Generator().manual_seed(block), device="cpu")
    counts = torch.zeros(DRAWS, size, dtype=torch.float64, device="cpu")
    return counts.scatter_add_(1, drawn, torch.ones_like(counts))
