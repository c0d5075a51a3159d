"""Judging scores and circuits: faithfulness, completeness, minimality, ROC, agreement with exact effects, stability."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from eapcore.attribution import Progress, Task, as_pairs, attribute
from eapcore.circuit import Circuit, EdgeScores, sign_text
from eapcore.graph import Graph
from eapcore.metrics import Metric
from eapcore.model import Model
from eapcore.patch import CURVE_POINTS, Interpolation, interpolate, metric_on, patch_edges, write_json
from eapcore.runs import Count, Question
from eapcore.tasks import PromptPairs

MIB_FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
RANKINGS = ("absolute", "signed")
SELECTIONS = ("top_n", "greedy")
RULES = ("trapezoid", "lower", "upper", "pareto")
_FAITHFUL = (
    "faithfulness = (value − ablated) / (clean − ablated), 1 = as the model, 0 = as the model with every edge ablated; "
    "cpr: higher = better; cmd: lower = better"
)


# Faithfulness


@dataclass(frozen=True, slots=True)
class Curve:
    """Faithfulness over circuit sizes.

    fractions: [P] of all edges, as asked for. sizes: [P] edges chosen. values: [P] the metric's mean. faithfulness: [P]
    (value − ablated) / (clean − ablated). cpr, cmd: the areas under f and under |1 − f| over the fractions, by the
    trapezoid, from the first fraction to the last; NaN (null in a file) with fewer than two distinct fractions, between
    which there is no area.
    """

    fractions: list[float]
    sizes: list[int]
    values: list[float]
    faithfulness: list[float]
    clean: float
    ablated: float
    cpr: float
    cmd: float
    meta: Mapping[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        write_json(path, "faithfulness", self)


def faithfulness(
    model: Model,
    task: PromptPairs,
    metric: str | Metric,
    scores: EdgeScores,
    *,
    sizes: Sequence[float | int] = MIB_FRACTIONS,
    ranking: str = "absolute",
    selection: str = "top_n",
    ablation: str = "corrupt",
    reference: PromptPairs | None = None,
    batch_size: int | str = "auto",
    progress: Progress | None = None,
) -> Curve:
    """How much of the metric the circuits of several sizes keep, all sizes in one forward.

        f(circuit) = (m(circuit) − m(ablated)) / (m(model) − m(ablated)),  m = mean of the metric over the pairs
        CPR = ∫ f dx,  CMD = ∫ |1 − f| dx,  x = fraction of the edges

    Args:
        model, task, metric: what is judged. Higher is better.
        scores: of the model's edges.
        sizes: fractions of all edges (floats, rounded down to whole edges) or numbers of edges (integers), ascending.
        ranking: "absolute" by |score|, "signed" by usefulness −score.
        selection: "top_n", or "greedy" from the logits back.
        ablation: what edges outside the circuit carry, and reference the prompts of a mean, as `patch.run_circuit`. It
            may be another than that of the scores, which only rank; the result's `meta["method"]` names both.
        batch_size: pairs at a time.
        progress: called with (runs done, runs in all), one for each circuit and pair.

    Returns:
        Curve. By the MIB benchmark's convention CPR is read from the signed and CMD from the absolute ranking, see
        `mib`; the axis is linear and nothing is added between 0 and the first fraction.

    Raises:
        ValueError: scores of another graph; sizes outside the graph or not ascending; an unknown ranking or selection;
            a metric that the ablation does not change.

    Source: Mueller et al. 2025 (MIB), section 4.
    """
    options: dict[str, Any] = {"ablation": ablation, "reference": reference, "batch_size": batch_size}
    return _curves(model, task, metric, scores, sizes, [ranking], selection, progress=progress, **options)[0]


@dataclass(frozen=True, slots=True)
class Mib:
    """The MIB benchmark's two numbers, CPR from the edges by usefulness and CMD from the edges by |score|, and their
    curves."""

    cpr: float
    cmd: float
    signed: Curve
    absolute: Curve

    def save(self, path: str | Path) -> None:
        write_json(path, "mib", self)


def mib(
    model: Model,
    task: PromptPairs,
    metric: str | Metric,
    scores: EdgeScores,
    *,
    sizes: Sequence[float | int] = MIB_FRACTIONS,
    selection: str = "top_n",
    ablation: str = "corrupt",
    reference: PromptPairs | None = None,
    batch_size: int | str = "auto",
    progress: Progress | None = None,
) -> Mib:
    """CPR (higher is better) and CMD (lower is better) at MIB's ten sizes; arguments as `faithfulness`."""
    options: dict[str, Any] = {"ablation": ablation, "reference": reference, "batch_size": batch_size}
    rankings = ["signed", "absolute"]
    curves = _curves(model, task, metric, scores, sizes, rankings, selection, progress=progress, **options)
    return Mib(curves[0].cpr, curves[1].cmd, *curves)


def _curves(
    model: Model,
    task: PromptPairs,
    metric: str | Metric,
    scores: EdgeScores,
    sizes: Sequence[float | int],
    rankings: list[str],
    selection: str,
    *,
    ablation: str,
    reference: PromptPairs | None,
    batch_size: int | str,
    progress: Progress | None,
) -> list[Curve]:
    graph = model.graph
    _check_scores(scores, model.graph)
    for what, value, known in [("selection", selection, SELECTIONS), *(("ranking", r, RANKINGS) for r in rankings)]:
        if value not in known:
            raise ValueError(f"{what} must be {' or '.join(known)}, got {value!r}")
    counts = _sizes(sizes, graph.n_edges)
    pick = EdgeScores.top_n if selection == "top_n" else EdgeScores.greedy
    circuits = [pick(scores, n, signed=ranking == "signed") for ranking in rankings for n in counts]
    ends = [Circuit(graph.edge_mask(), graph), Circuit(torch.zeros_like(graph.edge_mask()), graph)]
    options: dict[str, Any] = {"ablation": ablation, "reference": reference, "batch_size": batch_size}
    clean, ablated, *values = metric_on(model, task, metric, [*ends, *circuits], progress=progress, **options)
    if clean == ablated:
        raise ValueError(f"the metric is {clean:g} on the clean and on the ablated run: faithfulness has no scale")
    fractions = [s if isinstance(s, float) else s / graph.n_edges for s in sizes]
    question = Question.of(model, task, metric, ablation, reference)
    described = question.describe()
    curves = []
    for i, ranking in enumerate(rankings):
        mine = slice(i * len(counts), (i + 1) * len(counts))
        f = [(value - ablated) / (clean - ablated) for value in values[mine]]
        gap = [abs(1 - x) for x in f]
        method = {"name": "faithfulness", "ranking": ranking, "selection": selection, "area": "trapezoid, linear axis"}
        carried = {"ablation": question.ablation, "ablation_of_scores": _ablation_of(scores)}
        meta = {**described, "sign": _FAITHFUL, "method": {**method, **carried}, "scores": dict(scores.meta)}
        sizes_found = [c.n_edges for c in circuits[mine]]
        cpr, cmd = (area(fractions, y) if len(set(fractions)) > 1 else math.nan for y in (f, gap))
        curves.append(Curve(fractions, sizes_found, values[mine], f, clean, ablated, cpr, cmd, meta))
    return curves


def _sizes(sizes: Sequence[float | int], n_edges: int) -> list[int]:
    """Numbers of edges from fractions and numbers, checked."""
    given = sizes if isinstance(sizes, Sequence) else ()
    known = all(isinstance(x, float | int) and not isinstance(x, bool) and math.isfinite(x) for x in given)
    counts = [int(x * n_edges) if isinstance(x, float) else x for x in given] if known else []
    if not counts or counts[0] < 0 or counts[-1] > n_edges or sorted(counts) != counts:
        raise ValueError(
            f"sizes must ascend from 0 to at most the {n_edges} edges, as fractions (floats) or numbers of edges "
            f"(integers), got {sizes!r}"
        )
    return counts


def _check_scores(scores: EdgeScores, graph: Graph) -> None:
    if not isinstance(scores, EdgeScores):
        raise ValueError(f"the scores must be EdgeScores of {graph}, got {type(scores).__name__}")
    if scores.graph != graph:
        raise ValueError(f"the scores must be of {graph}, got some of {scores.graph}")


def _ablation_of(scores: EdgeScores) -> dict[str, Any] | None:
    """What an edge carried when scores were made; None where they do not say."""
    found = (scores.meta.get("method") or {}).get("ablation")
    return None if found is None else dict(found)


# Completeness and minimality


@dataclass(frozen=True, slots=True)
class Completeness:
    """The metric's mean without some edges K: [n] of the circuit, [n] of the whole model, and their gap in absolute
    value. A complete circuit has small gaps for every K."""

    removed: list[str]
    circuit: list[float]
    model: list[float]
    gap: list[float]
    meta: Mapping[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        write_json(path, "completeness", self)


def completeness(
    model: Model,
    task: PromptPairs,
    metric: str | Metric,
    circuit: Circuit,
    *,
    n_random: int = 10,
    seed: int = 0,
    ablation: str = "corrupt",
    reference: PromptPairs | None = None,
    batch_size: int | str = "auto",
    progress: Progress | None = None,
) -> Completeness:
    """Take the same edges K out of the circuit and out of the whole model, and compare what is left.

        gap(K) = |m(circuit ∖ K) − m(model ∖ K)|

    K is nothing; for each component of the circuit all that it reads and sends; and random halves of the circuit's
    edges.

    Args:
        model, task, metric, ablation, reference, batch_size, progress: as `faithfulness`.
        circuit: of the model's graph, with at least one edge.
        n_random: how many random halves.
        seed: of their draw.

    Raises:
        ValueError: an empty circuit, or one of another graph.

    Source: Wang et al. 2022, section 4.1.
    """
    _check_circuit(model, circuit)
    graph = model.graph
    full, mask = graph.edge_mask(), circuit.mask
    removed = {"nothing": torch.zeros_like(mask)}
    for r in range(graph.n_receivers):
        component = graph.component(r)
        if component is not None and bool(mask[:, r].any() | mask[component].any()):
            name = graph.sender_names[component]
            removed.setdefault(name, torch.zeros_like(mask))[:, r] = True
            removed[name][component] = True
    generator = torch.Generator().manual_seed(seed)
    edges = mask.flatten().nonzero().squeeze(1)
    for i in range(n_random):
        chosen = torch.zeros(mask.numel(), dtype=torch.bool)
        chosen[edges[torch.randperm(len(edges), generator=generator)[: len(edges) // 2]]] = True
        removed[f"random half {i}"] = chosen.view_as(mask)
    circuits = [Circuit(base & ~k, graph) for k in removed.values() for base in (mask, full)]
    options: dict[str, Any] = {"ablation": ablation, "reference": reference, "batch_size": batch_size}
    values = metric_on(model, task, metric, circuits, progress=progress, **options)
    inside, whole = values[::2], values[1::2]
    question = Question.of(model, task, metric, ablation, reference)
    method = {"name": "completeness", "n_random": n_random, "seed": seed, "ablation": question.ablation}
    sign = "gap = |circuit − model|, both without the same edges; 0 = the circuit lacks nothing that they do"
    meta = {**question.describe(), "sign": sign, "method": method, "circuit": dict(circuit.meta)}
    return Completeness(list(removed), inside, whole, [abs(a - b) for a, b in zip(inside, whole, strict=True)], meta)


def minimality(
    model: Model,
    task: PromptPairs,
    metric: str | Metric,
    circuit: Circuit,
    *,
    ablation: str = "corrupt",
    reference: PromptPairs | None = None,
    batch_size: int | str = "auto",
    progress: Progress | None = None,
) -> EdgeScores:
    """What each edge of a circuit does for it: the change of the metric when it alone is taken out.

        score[s, r] = m(circuit ∖ (s, r)) − m(circuit)

    A circuit is minimal where every one is clearly negative; edges near 0 could go. Arguments as `completeness`.

    Returns:
        EdgeScores, 0 outside the circuit.

    Raises:
        ValueError: an empty circuit, or one of another graph.

    Source: Wang et al. 2022, section 4.2, at the level of edges.
    """
    _check_circuit(model, circuit)
    graph, edges = model.graph, circuit.mask.nonzero()
    without = []
    for s, r in edges.tolist():
        mask = circuit.mask.clone()
        mask[s, r] = False
        without.append(Circuit(mask, graph))
    options: dict[str, Any] = {"ablation": ablation, "reference": reference, "batch_size": batch_size}
    whole, *values = metric_on(model, task, metric, [circuit, *without], progress=progress, **options)
    scores = torch.zeros(graph.n_senders, graph.n_receivers, dtype=torch.float64)
    scores[edges[:, 0], edges[:, 1]] = torch.tensor(values, dtype=torch.float64) - whole
    question = Question.of(model, task, metric, ablation, reference)
    meta = {
        **question.describe(),
        "sign": sign_text("score", "measured", "the edge alone is taken out of the circuit"),
        "metric": {"name": question.metric_name, "circuit": whole},
        "method": {"name": "minimality", "exact": True, "ablation": question.ablation, "edges": circuit.edges},
        "circuit": dict(circuit.meta),
    }
    return EdgeScores(scores, graph, meta)


def _check_circuit(model: Model, circuit: Circuit) -> None:
    if circuit.graph != model.graph:
        raise ValueError(f"the circuit must belong to {model.graph}, got one of {circuit.graph}")
    if not circuit.n_edges:
        raise ValueError("the circuit has no edges: there is nothing to judge")


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
    _check_scores(scores, scores.graph)
    counted, described = _counted(scores.graph, reference, edges, edge_set)
    flat, usefulness = scores.ranking(signed=ranking == "signed")
    inside = counted.flatten()[flat]
    true, usefulness = reference.mask.flatten()[flat[inside]], usefulness[inside]
    ends = torch.cat([usefulness[1:] != usefulness[:-1], torch.ones(1, dtype=torch.bool)])
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
        x, y = (float((circuit.mask & side).sum() / side.sum()) for side in (false, true))
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


# Agreement with exact patching


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


@dataclass(frozen=True, slots=True)
class Verification:
    """Exact effects of the edges that a method ranks highest.

    edges, estimates, effects: [n], from the most important down. agreement: over these edges. worst: the edges where
    the two differ most, (edge, estimate, effect). exact: the effects as EdgeScores. curves: where they were asked for,
    the way of single edges from clean to corrupt.
    """

    edges: list[str]
    estimates: list[float]
    effects: list[float]
    agreement: Agreement
    worst: list[tuple[str, float, float]]
    exact: EdgeScores
    meta: Mapping[str, Any] = field(default_factory=dict)
    curves: Sequence[Interpolation] = ()

    def save(self, path: str | Path) -> None:
        write_json(path, "verification", self)


def verify(
    model: Model,
    task: Task,
    metric: str | Metric = "logit_diff",
    scores: EdgeScores | None = None,
    n: int | None = None,
    *,
    ranking: str = "absolute",
    n_worst: int = 10,
    curves: Sequence[str] = (),
    ablation: str = "corrupt",
    reference: PromptPairs | None = None,
    batch_size: int | str = "auto",
    progress: Progress | None = None,
    resume: str | Path | None = None,
    **screening: Any,
) -> Verification:
    """Screen, then measure: patch the n edges that the scores rank highest exactly, and say how far they were right.

    Args:
        model, task, metric, ablation, reference, batch_size, resume: as `patch_edges`.
        scores: of all edges, from any method; None makes them by `attribute`.
        n: how many edges to patch; None is 50, or all of a smaller graph.
        ranking: "absolute" by |score|, "signed" by −score.
        n_worst: how many of the largest disagreements to name.
        curves: edges to follow from clean to corrupt, beside the line of their score, see `interpolate`.
        progress: called with (runs done, runs in all), one for each pair and each edge that is patched, each of a
            curve's points, and the scores where they are made here.
        screening: where no scores are given, `method` and all other options of `attribute`.

    Raises:
        ValueError: scores of another model, metric, ablation or graph; n outside 1..n_edges; as `patch_edges`.
    """
    if ranking not in RANKINGS:
        raise ValueError(f"ranking must be {' or '.join(RANKINGS)}, got {ranking!r}")
    n = min(50, model.graph.n_edges) if n is None else n
    if not isinstance(n, int) or not 1 <= n <= model.graph.n_edges:
        raise ValueError(f"n must be between 1 and the {model.graph.n_edges} edges of this graph, got {n!r}")
    for edge in curves:
        model.graph.edge(edge)  # an unknown name is refused before the work
    n_pairs, made_here = len(as_pairs(task)), scores is None
    count = Count(progress, n_pairs * (n + CURVE_POINTS * len(curves) + made_here))
    options: dict[str, Any] = {"ablation": ablation, "reference": reference, "batch_size": batch_size}
    if scores is None:
        scores = attribute(model, task, metric, progress=count.stage(n_pairs), **options, **screening)
    elif screening:
        raise ValueError(f"the scores are given, so there is no use for {', '.join(screening)}: leave one of them out")
    _check_scores(scores, model.graph)
    made = scores.meta.get("model") or {}
    if made.get("content_hash", model.content_hash) != model.content_hash:
        raise ValueError(f"the scores are of {made.get('name')!r}, whose weights are not those of {model.name!r}")
    question = Question.of(model, task, metric, ablation, reference)
    scored = (scores.meta.get("metric") or {}).get("name", question.metric_name)
    if scored != question.metric_name:
        raise ValueError(
            f"the scores estimate the metric {scored}, but {question.metric_name} was to be measured: use the same"
        )
    if _ablation_of(scores) not in (None, question.ablation):
        raise ValueError(
            f"the scores estimate the ablation {_ablation_of(scores)}, but {question.ablation} was to be measured: use "
            "the same"
        )
    chosen = scores.top_n(n, signed=ranking == "signed")
    exact = patch_edges(model, task, metric, chosen, progress=count.stage(n * n_pairs), resume=resume, **options)
    followed = []
    for edge in curves:
        stage = count.stage(CURVE_POINTS * n_pairs)
        followed.append(interpolate(model, task, metric, edge, score=scores[edge], progress=stage, **options))
    names = [edge for edge, _ in scores.top(n, signed=ranking == "signed")]
    rows = [(edge, scores[edge], exact[edge]) for edge in names]
    worst = sorted(rows, key=lambda row: -abs(row[1] - row[2]))[:n_worst]
    meta = {"sign": exact.meta["sign"], "scores": dict(scores.meta), "n": n, "ranking": ranking}
    compared = agreement(scores, exact, chosen.mask)
    return Verification(
        names, [row[1] for row in rows], [row[2] for row in rows], compared, worst, exact, meta, followed
    )


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
    draws = torch.randint(count, (n_resamples, count), generator=torch.Generator().manual_seed(seed))
    weights = torch.zeros(n_resamples, count, dtype=torch.float64)
    weights.scatter_add_(1, draws, torch.full(draws.shape, 1 / count, dtype=torch.float64))
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
        full = torch.zeros(expected, dtype=torch.float64)
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


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Everything that was judged of one set of scores."""

    mib: Mib
    rocs: Sequence[Roc] = ()
    completeness: Completeness | None = None
    minimality: EdgeScores | None = None
    stability: Stability | None = None

    def save(self, path: str | Path) -> None:
        write_json(path, "evaluation", self)
