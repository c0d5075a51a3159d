"""Two runs of one graph side by side."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from eapcore.graph.correlation import line, ranks
from eapcore.graph.scores import EdgeScores


def sizes(n_edges: int) -> list[int]:
    """Numbers of edges, about ten to a power of ten, up to all."""
    found, size = [], 1.0
    while size < n_edges:
        found.append(round(size))
        size *= 10**0.1
    return sorted({*found, n_edges})


def jaccard(a: EdgeScores, b: EdgeScores, counts: list[int]) -> list[float]:
    """|A ∩ B| / |A ∪ B| of the n edges with the largest |score| of two sets of scores, for several n.

    Raises:
        ValueError: two graphs.
    """
    if a.graph != b.graph:
        raise ValueError(f"two runs are compared edge by edge, but one is of {a.graph} and the other of {b.graph}")
    later = torch.maximum(places(a), places(b)).sort().values
    common = torch.searchsorted(later, torch.tensor(counts, device="cpu")).tolist()
    return [both / (2 * n - both) for both, n in zip(common, counts, strict=True)]


def correlations(a: EdgeScores, b: EdgeScores) -> dict[str, float]:
    """How two sets of scores of one graph agree over all edges: `pearson`, `spearman`, `spearman_absolute` of |score|,
    and `signs`, the share of edges with the same sign."""
    x, y = a.scores[a.mask].double(), b.scores[b.mask].double()
    return {
        "pearson": line(x, y)[0],
        "spearman": line(ranks(x), ranks(y))[0],
        "spearman_absolute": line(ranks(x.abs()), ranks(y.abs()))[0],
        "signs": float((x.sign() == y.sign()).double().mean()),
    }


def places(scores: EdgeScores) -> Annotated[Tensor, "int64 E"]:
    """Each edge's place in the ranking by |score|, from 0, in the order of the flat index."""
    return scores.ranking()[0].argsort()
