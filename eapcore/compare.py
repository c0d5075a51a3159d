"""Comparing scores without running a model: ROC against a circuit, agreement, overlap, stability under resampling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from eapcore.circuit import Circuit, EdgeScores
from eapcore.graph import Graph
from eapcore.patch import write_json

RANKINGS = ("absolute", "signed")
RULES = ("trapezoid", "lower", "upper", "pareto")


def check_scores(scores: EdgeScores, graph: Graph) -> None:
    """ValueError for what is not EdgeScores of the graph."""
    if not isinstance(scores, EdgeScores):
        raise ValueError(f"the scores must be EdgeScores of {graph}, got {type(scores).__name__}")
    if scores.graph != graph:
        raise ValueError(f"the scores must be of {graph}, got some of {scores.graph}")


# ROC


@dataclass(frozen=True, slots=True)
class Roc:
    """True against false positive rates, from (0, 0) to (1, 1), and the area under them.

    thresholds: of |score| or usefulness, one a point but for the first and the last; empty for points from circuits.
    edge_set: which edges were counted, with how many there are and how many of them are true.
    """

    fpr: list[float]
    tpr: list[float]
    thresholds: list[float]
    auc: float
    rule: str
    edge_set: Mapping[str, Any]
    meta: Mapping[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        write_json(path, "roc", self)


def area(x: Sequence[float], y: Sequence[float], rule: str = "trapezoid") -> float:
    """The area under points (x, y), x ascending.

    Args:
        x, y: the points.
        rule: "trapezoid"; "lower" and "upper", steps at the left and at the right point's height; "pareto", lower steps
            over the points that no other point is above and left of.

    Raises:
        ValueError: an unknown rule.
    """
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    points = sorted(zip(x, y, strict=True))
    if rule == "pareto":
        best = float("-inf")
        front = []
        for px, py in sorted(points, key=lambda p: (p[0], -p[1])):
            if py > best:
                best = py
                front.append((px, py))
        points = [*front, (points[-1][0], best)]
    total = 0.0
    for (x0, y0), (x1, y1) in pairwise(points):
        height = {"trapezoid": (y0 + y1) / 2, "upper": y1}.get(rule, y0)
        total += (x1 - x0) * height
    return total


def roc(
    scores: EdgeScores,
    reference: Circuit,
    *,
    rule: str = "trapezoid",
    ranking: str = "absolute",
    edges: Annotated[Tensor, "bool S R"] | None = None,
    edge_set: str = "all edges",
) -> Roc:
    """How well scores tell a reference circuit's edges from the others.

    Args:
        scores: ranked from the most important down; tied edges enter together.
        reference: the true edges: a published circuit, or exact patching's `top_n`.
        rule: how the area is taken, see `area`.
        ranking: "absolute" by |score|, "signed" by −score.
        edges: bool [S, R], the edges that count; None is all edges of the graph.
        edge_set: what they are called in the result.

    Raises:
        ValueError: another graph; an unknown rule or ranking; scores that are NaN; no true or no false edge among those
            that count.

    Source: Syed, Rager, Conmy 2023, figure 2.
    """
    if ranking not in RANKINGS:
        raise ValueError(f"ranking must be {' or '.join(RANKINGS)}, got {ranking!r}")
    check_scores(scores, scores.graph)
    counted, described = _counted(scores.graph, reference, edges, edge_set)
    flat, usefulness = scores.ranking(signed=ranking == "signed")
    inside = counted.flatten()[flat]
    true, usefulness = reference.mask.flatten()[flat[inside]], usefulness[inside]
    ends = torch.cat([usefulness[1:] != usefulness[:-1], torch.ones(1, dtype=torch.bool, device="cpu")])
    positives, negatives = true.cumsum(0)[ends].double(), (~true).cumsum(0)[ends].double()
    fpr = [0.0, *(negatives / negatives[-1]).tolist()]
    tpr = [0.0, *(positives / positives[-1]).tolist()]
    meta = {"ranking": ranking, "scores": dict(scores.meta), "reference": dict(reference.meta)}
    return Roc(fpr, tpr, usefulness[ends].tolist(), area(fpr, tpr, rule), rule, described, meta)


def roc_of_circuits(
    circuits: Sequence[Circuit],
    reference: Circuit,
    *,
    rule: str = "pareto",
    edges: Annotated[Tensor, "bool S R"] | None = None,
    edge_set: str = "all edges",
) -> Roc:
    """The same for circuits, one point each, e.g. of ACDC at several thresholds; (0, 0) and (1, 1) are added.

    Raises:
        ValueError: as `roc`; no circuit.

    Source: Conmy et al. 2023, figure 3: the Pareto front with lower steps.
    """
    if not circuits:
        raise ValueError("at least one circuit is needed")
    points = [(0.0, 0.0), (1.0, 1.0)]
    for circuit in circuits:
        counted, described = _counted(circuit.graph, reference, edges, edge_set)
        true, false = reference.mask & counted, ~reference.mask & counted
        x, y = (int((circuit.mask & side).sum()) / int(side.sum()) for side in (false, true))
        points.append((x, y))
    fpr, tpr = (list(side) for side in zip(*sorted(points), strict=True))
    meta = {"circuits": [dict(c.meta) for c in circuits], "reference": dict(reference.meta)}
    return Roc(fpr, tpr, [], area(fpr, tpr, rule), rule, described, meta)


def _counted(graph: Graph, reference: Circuit, edges: Tensor | None, name: str) -> tuple[Tensor, dict[str, Any]]:
    if reference.graph != graph:
        raise ValueError(f"the reference must be a circuit of {graph}, got one of {reference.graph}")
    counted = graph.edge_mask()
    if edges is not None:
        if edges.shape != counted.shape or edges.dtype != torch.bool:
            raise ValueError(f"edges must be bool [S, R] = {list(counted.shape)}, got {edges.dtype} {edges.shape}")
        counted &= edges
        name = "the given edges" if name == "all edges" else name
    n_edges, n_true = int(counted.sum()), int((reference.mask & counted).sum())
    if n_true in (0, n_edges):
        raise ValueError(f"a ROC needs true and false edges, but {n_true} of {n_edges} edges are in the reference")
    return counted, {"name": name, "n_edges": n_edges, "n_true": n_true}


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
    r, slope = _line(x, y)
    same = float((x.sign() == y.sign()).double().mean())
    return Agreement(len(x), r * r, slope, float(y.mean() - slope * x.mean()), _line(_ranks(x), _ranks(y))[0], same)


def overlap(a: EdgeScores, b: EdgeScores, n: int, *, signed: bool = False) -> float:
    """The share of the n most important edges that two sets of scores have in common."""
    if n < 1:
        raise ValueError(f"n must be at least 1 edge, got {n}")
    return int((a.top_n(n, signed=signed).mask & b.top_n(n, signed=signed).mask).sum()) / n


def _line(x: Tensor, y: Tensor) -> tuple[float, float]:
    """(correlation, slope of y on x)."""
    x, y = x - x.mean(), y - y.mean()
    xy, xx, yy = float(x @ y), float(x @ x), float(y @ y)
    nan = float("nan")
    return (xy / (xx * yy) ** 0.5 if xx * yy > 0 else nan), (xy / xx if xx > 0 else nan)


def _ranks(x: Tensor) -> Tensor:
    """Ranks from 0, equal values at their mean rank, float64."""
    _, inverse, counts = x.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double() - 1
    return (last - (counts.double() - 1) / 2)[inverse]


# Stability


@dataclass(frozen=True, slots=True)
class Stability:
    """How scores vary when the prompts are drawn again.

    std: [S, R] of the mean score over resamples. low, high: [S, R] the bootstrap confidence interval of the mean score,
    the (1 ∓ level)/2 quantiles over resamples (the percentile method; `level` stands in meta). sign_consistency: [S, R]
    share of the resamples in which the mean score has the sign that it has over all pairs. top_frequency: [S, R] share
    in which the edge is among the top n. overlap: mean share of the top n that two resamples have in common;
    overlap_with_all: with that of all pairs.
    """

    std: Annotated[Tensor, "S R"]
    low: Annotated[Tensor, "S R"]
    high: Annotated[Tensor, "S R"]
    sign_consistency: Annotated[Tensor, "S R"]
    top_frequency: Annotated[Tensor, "S R"]
    overlap: float
    overlap_with_all: float
    meta: Mapping[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        write_json(path, "stability", self)


def stability(
    per_pair: Annotated[Tensor, "N S R"],
    graph: Graph,
    *,
    top_n: int,
    n_resamples: int = 100,
    seed: int = 0,
    ranking: str = "absolute",
    level: float = 0.95,
    meta: Mapping[str, Any] | None = None,
) -> Stability:
    """Bootstrap over prompt pairs: draw N of N pairs with replacement, average, rank, compare.

    Args:
        per_pair: [N, S, R], each pair's scores, e.g. `attribute(reduce="pair").per_pair`.
        graph: of the scores.
        top_n: how many edges count as the top.
        n_resamples: at least 2.
        seed: of the draws.
        ranking: "absolute" or "signed".
        level: of the confidence intervals; a thousand resamples give their ends to some hundredths of their width.
        meta: what the scores' file says of them, `meta["scores"]` of the result.

    Raises:
        ValueError: a wrong shape, fewer than 2 pairs or resamples, top_n outside the graph, a level outside 0..1.

    Source of the interval: Efron 1979, "Bootstrap methods: another look at the jackknife".
    """
    expected = (graph.n_senders, graph.n_receivers)
    if not isinstance(per_pair, Tensor):
        raise ValueError(f"per_pair must be each pair's scores, by attribute(reduce='pair'), got {per_pair!r:.60}")
    if per_pair.ndim != 3 or per_pair.shape[1:] != expected or len(per_pair) < 2:
        raise ValueError(f"per_pair must be [N ≥ 2, S, R] = [., {expected[0]}, {expected[1]}], got {per_pair.shape}")
    if not 1 <= top_n <= graph.n_edges:
        raise ValueError(f"top_n must be between 1 and the {graph.n_edges} edges of this graph, got {top_n}")
    if n_resamples < 2:
        raise ValueError(f"n_resamples must be at least 2, got {n_resamples}")
    if ranking not in RANKINGS:
        raise ValueError(f"ranking must be {' or '.join(RANKINGS)}, got {ranking!r}")
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    edges, count = graph.edge_mask(), len(per_pair)
    values = per_pair.cpu()[:, edges].double()  # [N, E]
    draws = torch.randint(count, (n_resamples, count), generator=torch.Generator().manual_seed(seed), device="cpu")
    weights = torch.zeros(n_resamples, count, dtype=torch.float64, device="cpu")
    weights.scatter_add_(1, draws, torch.full(draws.shape, 1 / count, dtype=torch.float64, device="cpu"))
    means, whole = weights @ values, values.mean(0)

    def top(scores: Tensor) -> Tensor:
        """1 where an edge is among the top n, [..., E]."""
        useful = scores.abs() if ranking == "absolute" else -scores
        chosen = useful.sort(stable=True, dim=-1, descending=True).indices[..., :top_n]
        return torch.zeros_like(useful).scatter_(-1, chosen, 1.0)

    ordered = means.sort(0).values  # torch.quantile takes 16 million elements at most

    def quantile(share: float) -> Tensor:
        place = share * (n_resamples - 1)
        below = min(int(place), n_resamples - 2)
        return torch.lerp(ordered[below], ordered[below + 1], place - below)

    tops = top(means)
    common = tops @ tops.T / top_n
    pairs = n_resamples * (n_resamples - 1)

    def placed(row: Tensor) -> Tensor:
        full = torch.zeros(expected, dtype=torch.float64, device="cpu")
        full[edges] = row
        return full

    method = {"name": "bootstrap", "n_pairs": count, "n_resamples": n_resamples, "seed": seed, "top_n": top_n}
    method["level"] = level
    return Stability(
        std=placed(means.std(0)),
        low=placed(quantile((1 - level) / 2)),
        high=placed(quantile((1 + level) / 2)),
        sign_consistency=placed((means.sign() == whole.sign()).double().mean(0)),
        top_frequency=placed(tops.mean(0)),
        overlap=float((common.sum() - common.trace()) / pairs),
        overlap_with_all=float((tops @ top(whole)).mean() / top_n),
        meta={"scores": dict(meta or {}), "method": {**method, "ranking": ranking}},
    )
