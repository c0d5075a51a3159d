"""Scores beside a published circuit and its published numbers; no model is run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from torch import Tensor

from eapcore.evaluation.agreement import RANKINGS
from eapcore.evaluation.inside import WITH_INSIDE, Inside
from eapcore.evaluation.roc import RULES, Roc, area, curve, roc
from eapcore.graph.circuit import Circuit
from eapcore.graph.scores import UNKNOWN_SIGN, EdgeScores
from eapcore.tasks.published import Published
from eapcore.tasks.truth import Truth

BINS = 80
_POINTS = 500  # of a curve that is kept
ALL = "edges between components"
EVERY, COARSE = "every threshold", "the published thresholds"


@dataclass(frozen=True, slots=True)
class Row:
    """A published number, ours, and ours − theirs; None where there is none."""

    what: str
    published: float | None
    here: float | None
    difference: float | None

    @staticmethod
    def of(what: str, published: float | None, here: float | None) -> Row:
        here = None if here is None or math.isnan(here) else here
        both = published is not None and here is not None
        return Row(what, published, here, here - published if both else None)  # type: ignore[operator]


@dataclass(frozen=True, slots=True)
class Judged:
    """What scores are worth against a published circuit.

    areas: under the ROC, a row for each edge set, ranking, set of thresholds and rule. heads: the same of whole heads.
    curves: of |score|, in both edge sets. histogram: counts inside and outside the circuit, by score. moments: mean and
    standard deviation of these. beyond: how many edges outside the circuit have a |score| above a published bound.
    roles: of edges by what their sender does. Scores are in the published unit.
    """

    areas: list[dict[str, Any]]
    heads: list[dict[str, Any]]
    curves: list[Roc]
    histogram: dict[str, Any]
    moments: list[dict[str, Any]]
    beyond: dict[str, Any] | None
    roles: list[dict[str, Any]]

    def auc(self, edge_set: str, ranking: str = "absolute", thresholds: str = EVERY, rule: str = "trapezoid") -> float:
        asked = {"edge_set": edge_set, "ranking": ranking, "thresholds": thresholds, "rule": rule}
        return next(float(row["auc"]) for row in self.areas if asked.items() <= row.items())


def judge(scores: EdgeScores, truth: Truth, inside: Inside, published: Published, unit: float = 1.0) -> Judged:
    """Judge scores by a published circuit, in both edge sets.

    Args:
        scores: of the circuit's graph, without NaN; ranked by |score|, and by −score where their sign is known.
        truth: the circuit.
        inside: scores of the edges inside components.
        published: what is known of it, for its bounds and thresholds.
        unit: the published scores' in units of ours.

    Raises:
        ValueError: a truth of another graph, or scores that are NaN.
    """
    others = inside.against(truth)
    sets = {ALL: None, WITH_INSIDE: others}
    signed = scores.meta.get("sign") != UNKNOWN_SIGN
    areas, curves = [], []
    for name, more in sets.items():
        for ranking in RANKINGS if signed else RANKINGS[:1]:
            whole = roc(scores, truth.circuit, ranking=ranking, edge_set=name, others=more)
            found = {EVERY: whole}
            if ranking == "absolute":
                found |= {COARSE: whole.at([t * abs(unit) for t in published.curve])} if published.curve else {}
                curves.append(_thinned(whole))
            for thresholds, each in found.items():
                described = {"edge_set": name, **_counts(each), "ranking": ranking, "thresholds": thresholds}
                areas += [{**described, "rule": rule, "auc": each.by(rule).auc} for rule in RULES]
    values, true = scores.scores[scores.mask].double() / unit, truth.circuit.mask[scores.mask]
    both, true_of_both = torch.cat([values, others[0] / unit]), torch.cat([true, others[1]])
    moments = [
        {"edge_set": name, "where": where, **_moments(v[side])}
        for name, v, t in ((ALL, values, true), (WITH_INSIDE, both, true_of_both))
        for where, side in (("inside", t), ("outside", ~t))
    ]
    beyond = None
    if published.beyond is not None:
        bound = published.beyond[0]
        counts = {
            name: int((~t & (v.abs() > bound)).sum())
            for name, v, t in ((ALL, values, true), (WITH_INSIDE, both, true_of_both))
        }
        beyond = {"bound": bound, "count": counts}
    heads, histogram = list(_heads(scores, truth, inside)), _histogram(both, true_of_both)
    return Judged(areas, heads, curves, histogram, moments, beyond, list(_roles(scores, truth, unit)))


def rates(circuit: Circuit, truth: Truth) -> dict[str, float]:
    """True and false positive rate of a circuit's edges between components, and Youden's J, their difference."""
    true, false = truth.circuit.mask, truth.circuit.graph.edge_mask() & ~truth.circuit.mask
    tpr, fpr = (float((circuit.mask & side).sum()) / float(side.sum()) for side in (true, false))
    return {"tpr": tpr, "fpr": fpr, "j": tpr - fpr}


def table(published: Published, judged: Judged) -> list[Row]:
    """The published numbers that scores alone have a counterpart to."""
    rows = [Row.of(f"AUC, EAP: |score|, {WITH_INSIDE}", published.auc["eap"], judged.auc(WITH_INSIDE))]
    rows.append(Row.of(f"AUC, EAP: |score|, {ALL} alone", None, judged.auc(ALL)))
    for rule, value in published.areas.items():
        here = judged.auc(WITH_INSIDE, thresholds=COARSE, rule=rule)
        rows.append(Row.of(f"AUC, EAP: |score|, {WITH_INSIDE}, {COARSE}, {rule}", value, here))
    found = {row["where"]: row for row in judged.moments if row["edge_set"] == WITH_INSIDE}
    for where, moments in published.moments.items():
        for what, value in zip(("mean", "std"), moments, strict=True):
            rows.append(Row.of(f"{what} score {where} the circuit", value, found[where][what]))
    if published.beyond is not None and judged.beyond is not None:
        bound, count = published.beyond
        rows.append(
            Row.of(f"edges outside the circuit with |score| > {bound:g}", count, judged.beyond["count"][WITH_INSIDE])
        )
    by_role = {row["role"]: row for row in judged.roles if row["edges"] == "of the circuit"}
    for role, moments in published.roles.items():
        for what, value in zip(("mean", "std"), moments, strict=True):
            rows.append(Row.of(f"{what} score of the circuit's edges from {role} heads", value, by_role[role][what]))
    return rows


def _counts(found: Roc) -> dict[str, int]:
    return {key: int(found.edge_set[key]) for key in ("n_edges", "n_true")}


def _thinned(found: Roc) -> Roc:
    """A curve with a few of its points, for a picture; the area stays that of all."""
    step = max(1, len(found.fpr) // _POINTS)
    kept = sorted({*range(0, len(found.fpr), step), len(found.fpr) - 1})
    meta = {"ranking": found.meta["ranking"]}
    return replace(found, fpr=[found.fpr[i] for i in kept], tpr=[found.tpr[i] for i in kept], thresholds=[], meta=meta)


def _moments(values: Annotated[Tensor, "float64 E"]) -> dict[str, Any]:
    """How many there are, and of the finite ones mean, standard deviation (of all, not of a sample) and quantiles."""
    n, values, nan = len(values), values[values.isfinite()], math.nan
    if not len(values):
        return {"n": n, "mean": nan, "std": nan, "quantiles": [nan] * 5}
    ends = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=values.dtype, device="cpu")
    return {
        "n": n,
        "mean": float(values.mean()),
        "std": float(values.std(unbiased=False)),
        "quantiles": values.quantile(ends).tolist(),
    }


def _histogram(values: Tensor, true: Tensor) -> dict[str, Any]:
    """Counts by score in equal bins, of what is inside and outside a circuit; [bins + 1] ends. Infinite scores, which
    other people's files may have, are in the outermost bins."""
    finite = values[values.isfinite()]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 0.0)
    high = high if high > low else low + 1
    ends = torch.linspace(low, high, BINS + 1, dtype=torch.float64, device="cpu")
    places = torch.bucketize(values, ends[1:-1], right=True)
    inside, outside = (places[side].bincount(minlength=BINS).tolist() for side in (true, ~true))
    return {"edge_set": WITH_INSIDE, "ends": ends.tolist(), "inside": inside, "outside": outside}


def _roles(scores: EdgeScores, truth: Truth, unit: float) -> Iterator[dict[str, Any]]:
    """Moments of the edges of each kind of sender, those of the circuit and all."""
    names = scores.graph.sender_names
    mine: dict[str, list[int]] = {role: [] for role in (*truth.roles, "MLP", "embed", "no role")}
    for s, name in enumerate(names):
        mine[truth.role(name) or "no role"].append(s)
    values = scores.scores.double() / unit
    for role, senders in mine.items():
        for edges, mask in (("of the circuit", truth.circuit.mask), ("all", scores.mask)):
            if len(senders):
                yield {"role": role, "edges": edges, **_moments(values[senders][mask[senders]])}


def _heads(scores: EdgeScores, truth: Truth, inside: Inside) -> Iterator[dict[str, Any]]:
    """The area under the ROC of whole heads: by the score of all that one sends, and by its largest edge."""
    graph, size = scores.graph, scores.scores.double().abs()
    heads = [s for layer in range(graph.n_layers) for s in range(graph.heads(layer).start, graph.heads(layer).stop)]
    true = torch.tensor([truth.role(graph.sender_names[s]) is not None for s in heads], device="cpu")
    largest = size.amax(1)
    for r in range(graph.logits):
        for s in graph.senders_behind(r):
            largest[s] = torch.maximum(largest[s], size[: graph.senders_before(r), r].amax())
    for by, values in (("|score of all that it sends|", inside.sent.double().abs()), ("its largest |score|", largest)):
        usefulness, order = values[heads].sort(descending=True, stable=True)
        fpr, tpr, _ = curve(usefulness, true[order])
        for rule in RULES:
            counts = {"n_heads": len(heads), "n_true": int(true.sum())}
            yield {"by": by, **counts, "rule": rule, "auc": area(fpr, tpr, rule)}


def lines(rows: Sequence[Row]) -> list[tuple[str, str, str, str]]:
    """The table for people: what, published, here, difference."""

    def text(value: float | None) -> str:
        return "–" if value is None else f"{value:.4g}"

    return [(row.what, text(row.published), text(row.here), text(row.difference)) for row in rows]


def unit_of(published: Published, meta: Mapping[str, Any]) -> float | None:
    """The unit of published scores in ours, as a file's header has the metric; None where it is not known."""
    metric = meta.get("metric") or {}
    clean, corrupt = metric.get("clean"), metric.get("corrupt")
    if not published.normalised:
        return 1.0
    if clean is None or corrupt is None or clean == corrupt:
        return None
    return float(clean) - float(corrupt)
