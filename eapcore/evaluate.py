"""Judging scores and circuits by running the model: faithfulness, completeness, minimality, exact effects."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from eapcore.attribution import Progress, Task, as_pairs, attribute
from eapcore.circuit import Circuit, EdgeScores, sign_text
from eapcore.compare import RANKINGS, Agreement, Roc, Stability, agreement, area, check_scores
from eapcore.metrics import Metric
from eapcore.model import Model
from eapcore.patch import CURVE_POINTS, Interpolation, interpolate, metric_on, patch_edges, write_json
from eapcore.runs import Count, Question
from eapcore.tasks import PromptPairs

MIB_FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
SELECTIONS = ("top_n", "greedy")
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
    check_scores(scores, model.graph)
    for what, value, known in [("selection", selection, SELECTIONS), *(("ranking", r, RANKINGS) for r in rankings)]:
        if value not in known:
            raise ValueError(f"{what} must be {' or '.join(known)}, got {value!r}")
    fractions, counts = _sizes(sizes, graph.n_edges)
    pick = EdgeScores.top_n if selection == "top_n" else EdgeScores.greedy
    circuits = [pick(scores, n, signed=ranking == "signed") for ranking in rankings for n in counts]
    ends = [Circuit(graph.edge_mask(), graph), Circuit(torch.zeros_like(graph.edge_mask()), graph)]
    options: dict[str, Any] = {"ablation": ablation, "reference": reference, "batch_size": batch_size}
    clean, ablated, *values = metric_on(model, task, metric, [*ends, *circuits], progress=progress, **options)
    if clean == ablated:
        raise ValueError(f"the metric is {clean:g} on the clean and on the ablated run: faithfulness has no scale")
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


def _sizes(sizes: Sequence[float | int], n_edges: int) -> tuple[list[float], list[int]]:
    """Fractions and numbers of edges from a mixture of both, checked."""
    given = sizes if isinstance(sizes, Sequence) else ()
    known = all(isinstance(x, float | int) and not isinstance(x, bool) and math.isfinite(x) for x in given)
    fractions = [x if isinstance(x, float) else x / n_edges for x in given] if known else []
    if not fractions or fractions[0] < 0 or fractions[-1] > 1 or sorted(fractions) != fractions:
        raise ValueError(
            f"sizes must ascend from 0 to at most the {n_edges} edges, as fractions (floats) or numbers of edges "
            f"(integers), got {sizes!r}"
        )
    return fractions, [int(x * n_edges) if isinstance(x, float) else x for x in given]


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
        chosen = torch.zeros(mask.numel(), dtype=torch.bool, device="cpu")
        chosen[edges[torch.randperm(len(edges), generator=generator, device="cpu")[: len(edges) // 2]]] = True
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
    scores = torch.zeros(graph.n_senders, graph.n_receivers, dtype=torch.float64, device="cpu")
    scores[edges[:, 0], edges[:, 1]] = torch.tensor(values, dtype=torch.float64, device="cpu") - whole
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


# Agreement with exact patching


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
    if not isinstance(n, int) or isinstance(n, bool) or not 1 <= n <= model.graph.n_edges:
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
    check_scores(scores, model.graph)
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
