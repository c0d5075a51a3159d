"""How two sets of scores agree: correlation, slope, ranks, signs, overlap."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from eapcore.graph.correlation import line, ranks
from eapcore.graph.scores import EdgeScores

RANKINGS = ("absolute", "signed")


@dataclass(frozen=True, slots=True)
class Agreement:
    """How an estimate agrees with the exact effect over some edges.

    r2: squared correlation. slope, intercept: of the least-squares line exact = slope · estimate + intercept. spearman:
    rank correlation, ties at their mean rank. signs: share of edges with the same sign. All NaN where they have no
    meaning.
    """

    n_edges: int
    r2: float
    slope: float
    intercept: float
    spearman: float
    signs: float


def agreement(
    estimate: EdgeScores,
    exact: EdgeScores,
    edges: Annotated[Tensor, "bool S R"] | None = None,
) -> Agreement:
    """Compare two sets of scores over edges, bool [S, R]; None is all edges.

    Raises:
        ValueError: two graphs, or no edges.
    """
    if estimate.graph != exact.graph:
        raise ValueError(f"both scores must be of one graph, got {estimate.graph} and {exact.graph}")
    chosen = estimate.mask if edges is None else edges & estimate.mask
    x, y = estimate.scores[chosen].double(), exact.scores[chosen].double()
    if not len(x):
        raise ValueError("at least one edge is needed to compare scores")
    r, slope = line(x, y)
    same = float((x.sign() == y.sign()).double().mean())
    return Agreement(len(x), r * r, slope, float(y.mean() - slope * x.mean()), line(ranks(x), ranks(y))[0], same)


def overlap(a: EdgeScores, b: EdgeScores, n: int, *, signed: bool = False) -> float:
    """The share of the n most important edges that two sets of scores have in common."""
    if n < 1:
        raise ValueError(f"n must be at least 1 edge, got {n}")
    return int((a.top_n(n, signed=signed).mask & b.top_n(n, signed=signed).mask).sum()) / n
