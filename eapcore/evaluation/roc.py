"""How well scores, or circuits, tell the edges of a reference circuit from the others; no model is run."""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from eapcore.evaluation.agreement import RANKINGS
from eapcore.execution.origin import check_scores
from eapcore.graph.circuit import Circuit
from eapcore.graph.files import write_json
from eapcore.graph.graph import Graph
from eapcore.graph.scores import EdgeScores
from eapcore.graph.show import short

RULES = ("trapezoid", "lower", "upper", "pareto")


# ROC


@dataclass(frozen=True, slots=True)
class Roc:
    """True against false positive rates, from (0, 0) to (1, 1), and the area under them.

    thresholds: of |score| or usefulness, one a point but for the first and the last; empty for points from circuits.
    edge_set: which edges were counted, with how many there are and how many of them are true.
    """

    __repr__ = short

    fpr: list[float]
    tpr: list[float]
    thresholds: list[float]
    auc: float
    rule: str
    edge_set: Mapping[str, Any]
    meta: Mapping[str, Any] = field(default_factory=dict)

    def at(self, thresholds: Sequence[float]) -> Roc:
        """The curve of these thresholds alone, with (0, 0) and (1, 1): a coarser one, its area by the same rule.

        An edge counts from its own threshold on; of no edge (0, 0).
        """
        points = {(0.0, 0.0), (1.0, 1.0)}
        for threshold in thresholds:
            count = bisect.bisect_right(self.thresholds, -threshold, key=lambda x: -x)
            points.add((self.fpr[count], self.tpr[count]))
        fpr, tpr = (list(side) for side in zip(*sorted(points), strict=True))
        return replace(self, fpr=fpr, tpr=tpr, thresholds=[], auc=area(fpr, tpr, self.rule))

    def by(self, rule: str) -> Roc:
        """The same curve with its area by another rule."""
        return replace(self, rule=rule, auc=area(self.fpr, self.tpr, rule))

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
    others: tuple[Annotated[Tensor, "E'"], Annotated[Tensor, "bool E'"]] | None = None,
) -> Roc:
    """How well scores tell a reference circuit's edges from the others.

    Args:
        scores: ranked from the most important down; tied edges enter together.
        reference: the true edges: a published circuit, or exact patching's `top_n`.
        rule: how the area is taken, see `area`.
        ranking: "absolute" by |score|, "signed" by −score.
        edges: bool [S, R], the edges that count; None is all edges of the graph.
        edge_set: what they are called in the result.
        others: scores of what counts besides, and which of it is true; see `inside`.

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
    if others is not None:
        signed = ranking == "signed" and not scores.unsigned
        more = -others[0] if signed else others[0].abs()
        usefulness, order = torch.cat([usefulness.double(), more.double()]).sort(descending=True, stable=True)
        true = torch.cat([true, others[1]])[order]
        counts = (("n_edges", len(others[1])), ("n_true", int(others[1].sum())))
        described |= {name: described[name] + more for name, more in counts}
    fpr, tpr, thresholds = curve(usefulness, true)
    meta = {"ranking": ranking, "scores": dict(scores.meta), "reference": dict(reference.meta)}
    return Roc(fpr, tpr, thresholds, area(fpr, tpr, rule), rule, described, meta)


def curve(
    usefulness: Annotated[Tensor, "E"], true: Annotated[Tensor, "bool E"]
) -> tuple[list[float], list[float], list[float]]:
    """(false positive rates, true positive rates, thresholds) of what is ranked by usefulness, descending."""
    ends = torch.cat([usefulness[1:] != usefulness[:-1], torch.ones(1, dtype=torch.bool, device="cpu")])
    positives, negatives = true.cumsum(0)[ends].double(), (~true).cumsum(0)[ends].double()
    fpr = [0.0, *(negatives / negatives[-1]).tolist()]
    tpr = [0.0, *(positives / positives[-1]).tolist()]
    return fpr, tpr, usefulness[ends].tolist()


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
