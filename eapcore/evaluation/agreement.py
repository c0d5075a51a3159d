"""How two sets of scores agree: correlation, slope, ranks, signs, overlap."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from torch import Tensor

from eapcore.graph.correlation import line, ranks
from eapcore.graph.graph import Graph
from eapcore.graph.scores import EdgeScores
from eapcore.models.model import Model

_log = logging.getLogger("eapcore")

RANKINGS = ("absolute", "signed")


def check_scores(scores: EdgeScores, graph: Graph) -> None:
    """ValueError for what is not EdgeScores of the graph."""
    if not isinstance(scores, EdgeScores):
        raise ValueError(f"the scores must be EdgeScores of {graph}, got {type(scores).__name__}")
    if scores.graph != graph:
        raise ValueError(f"the scores must be of {graph}, got some of {scores.graph}")


def check_model(scores: EdgeScores, model: Model) -> None:
    """ValueError for scores that are not of a model's edges, or of other weights than its own."""
    check_scores(scores, model.graph)
    made = scores.meta.get("model") or {}
    if made.get("content_hash", model.content_hash) != model.content_hash:
        raise ValueError(f"the scores are of {made.get('name')!r}, whose weights are not those of {model.name!r}")


def say_unknown(scores: EdgeScores, facts: Sequence[str]) -> None:
    """Log which of these facts, keys of `meta`, scores do not say: what they were made with is taken on trust."""
    known = {"model": (scores.meta.get("model") or {}).get("content_hash")}
    known |= {"metric": (scores.meta.get("metric") or {}).get("name"), "ablation": ablation_of(scores)}
    unknown = [fact for fact in facts if known[fact] is None]
    if unknown:
        source = (scores.meta.get("method") or {}).get("source")
        of = f", from {source}," if source else ""
        _log.warning("the scores%s do not say with which %s they were made: taken for those here", of, _listed(unknown))


def ablation_of(scores: EdgeScores) -> dict[str, Any] | None:
    """What an edge carried when scores were made; None where they do not say."""
    found = (scores.meta.get("method") or {}).get("ablation")
    return None if found is None else dict(found)


def _listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


# Agreement


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
