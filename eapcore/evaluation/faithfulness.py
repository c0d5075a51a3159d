"""How much of the behaviour circuits of several sizes keep: faithfulness, and the MIB benchmark's CPR and CMD."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from eapcore.evaluation.agreement import RANKINGS
from eapcore.evaluation.roc import area
from eapcore.execution.ablation import Ablation
from eapcore.execution.distributed import reported
from eapcore.execution.experiment import Experiment
from eapcore.execution.origin import ablation_of, check_scored, say_unknown
from eapcore.execution.progress import Progress
from eapcore.graph.circuit import Circuit
from eapcore.graph.confidence import interval
from eapcore.graph.files import write_json
from eapcore.graph.scores import EdgeScores
from eapcore.graph.show import short
from eapcore.models.model import Model
from eapcore.patching.circuits import each_pair, kept_without
from eapcore.patching.record import Recording, record
from eapcore.tasks.metrics import Metric
from eapcore.tasks.pairs import PromptPairs

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
    which there is no area. intervals, cpr_interval, cmd_interval: (low, high) of the faithfulness, [P], and of the
    areas (that of |1 − f| from 0 up), for the prompts that the pairs were drawn from, 95 %, see `confidence.interval`;
    None with one pair.
    """

    __repr__ = short

    fractions: list[float]
    sizes: list[int]
    values: list[float]
    faithfulness: list[float]
    clean: float
    ablated: float
    cpr: float
    cmd: float
    meta: Mapping[str, Any] = field(default_factory=dict)
    intervals: list[tuple[float, float]] | None = None
    cpr_interval: tuple[float, float] | None = None
    cmd_interval: tuple[float, float] | None = None

    def save(self, path: str | Path) -> None:
        write_json(path, "faithfulness", self)


@reported
def faithfulness(
    model: Model,
    task: PromptPairs,
    metric: str | Metric,
    scores: EdgeScores,
    *,
    sizes: Sequence[float | int] = MIB_FRACTIONS,
    ranking: str = "absolute",
    selection: str = "top_n",
    ablation: str | Ablation = "corrupt",
    reference: PromptPairs | None = None,
    batch_size: int | str = "auto",
    progress: Progress | None = None,
    distributed: bool = False,
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
        ablation: what edges outside the circuit carry, and reference the prompts of a mean, as `run_circuit`. It
            may be another than that of the scores, which only rank; the result's `meta["method"]` names both.
        batch_size: pairs at a time.
        progress: called with (runs done, runs in all), one for each circuit and pair.
        distributed: share the pairs among the processes of this run, as `attribute`.

    Returns:
        Curve. What is run of a circuit is what of it connects `embed` to the logits, by the MIB benchmark's convention:
        it makes a difference where an edge that nothing reaches would carry something else than a mean or zero. CPR is
        read from the signed and CMD from the absolute ranking there, see `mib`; the axis is linear and nothing is added
        between 0 and the first fraction. Where a norm stands behind the heads (Gemma 2 and 3) each head sends its share
        of what the norm makes of them in one run; MIB's evaluation norms anew what each receiver reads of a layer's
        heads, so that its numbers are others there.

    Raises:
        ValueError: scores of another model; sizes outside the graph or not ascending; an unknown ranking or selection;
            a metric that the ablation does not change.

    Source: Mueller et al. 2025 (MIB), section 4.
    """
    experiment = Experiment.of(model, task, metric, ablation, reference, distributed)
    recordings = record(experiment, batch_size)
    say_unknown(scores, ["model"])
    return _curves(experiment, recordings, scores, sizes, [ranking], selection, progress)[0]


@dataclass(frozen=True, slots=True)
class Mib:
    """The MIB benchmark's two numbers, CPR from the edges by usefulness and CMD from the edges by |score|, and their
    curves."""

    __repr__ = short

    cpr: float
    cmd: float
    signed: Curve
    absolute: Curve

    def save(self, path: str | Path) -> None:
        write_json(path, "mib", self)


@reported
def mib(
    model: Model,
    task: PromptPairs,
    metric: str | Metric,
    scores: EdgeScores,
    *,
    sizes: Sequence[float | int] = MIB_FRACTIONS,
    selection: str = "top_n",
    ablation: str | Ablation = "corrupt",
    reference: PromptPairs | None = None,
    batch_size: int | str = "auto",
    progress: Progress | None = None,
    distributed: bool = False,
) -> Mib:
    """CPR (higher is better) and CMD (lower is better) at MIB's ten sizes; arguments as `faithfulness`."""
    experiment = Experiment.of(model, task, metric, ablation, reference, distributed)
    say_unknown(scores, ["model"])
    return measure_mib(
        experiment, record(experiment, batch_size), scores, sizes=sizes, selection=selection, progress=progress
    )


def measure_mib(
    experiment: Experiment,
    recordings: Iterable[Recording],
    scores: EdgeScores,
    *,
    sizes: Sequence[float | int] = MIB_FRACTIONS,
    selection: str = "top_n",
    progress: Progress | None = None,
    resume: str | Path | None = None,
) -> Mib:
    """`mib` for an experiment whose batches are recorded; resume: a folder that keeps what was measured."""
    curves = _curves(experiment, recordings, scores, sizes, ["signed", "absolute"], selection, progress, resume)
    return Mib(curves[0].cpr, curves[1].cmd, *curves)


def _curves(
    experiment: Experiment,
    recordings: Iterable[Recording],
    scores: EdgeScores,
    sizes: Sequence[float | int],
    rankings: list[str],
    selection: str,
    progress: Progress | None,
    resume: str | Path | None = None,
) -> list[Curve]:
    graph = experiment.model.graph
    check_scored(scores, experiment.model)
    for what, value, known in [("selection", selection, SELECTIONS), *(("ranking", r, RANKINGS) for r in rankings)]:
        if value not in known:
            raise ValueError(f"{what} must be {' or '.join(known)}, got {value!r}")
    fractions, counts = _sizes(sizes, graph.n_edges)
    pick = EdgeScores.top_n if selection == "top_n" else EdgeScores.greedy
    circuits = [pick(scores, n, signed=ranking == "signed") for ranking in rankings for n in counts]
    ends = [Circuit(graph.edge_mask(), graph), Circuit(torch.zeros_like(graph.edge_mask()), graph)]
    run = [circuit.prune() for circuit in circuits]
    rows = each_pair(experiment, [*ends, *run], recordings, progress=progress, resume=resume)
    clean, ablated, *values = experiment.mean(rows.sum(1)).tolist()
    if experiment.no_scale(clean, ablated):
        raise ValueError(f"the metric is {clean:g} on the clean and on the ablated run: faithfulness has no scale")
    described, without = experiment.describe(), kept_without(rows[2:], rows[0], rows[1])
    curves = []
    for i, ranking in enumerate(rankings):
        mine = slice(i * len(counts), (i + 1) * len(counts))
        f = [(value - ablated) / (clean - ablated) for value in values[mine]]
        gap = [abs(1 - x) for x in f]
        method = {"name": "faithfulness", "ranking": ranking, "selection": selection, "area": "trapezoid, linear axis"}
        carried = {"ablation": dict(experiment.ablation.meta), "ablation_of_scores": ablation_of(scores)}
        meta = {**described, "sign": _FAITHFUL, "method": {**method, **carried}, "scores": dict(scores.meta)}
        sizes_found = [c.n_edges for c in circuits[mine]]
        cpr, cmd = (area(fractions, y) if len(set(fractions)) > 1 else math.nan for y in (f, gap))
        curve = Curve(fractions, sizes_found, values[mine], f, clean, ablated, cpr, cmd, meta)
        if without is not None:
            own = without[mine]
            curve = replace(curve, intervals=[interval(*row) for row in zip(f, own, strict=True)])
            if not math.isnan(cpr):
                x = own.new_tensor(fractions)
                cpr_interval = interval(cpr, torch.trapezoid(own, x, dim=0))
                low, high = interval(cmd, torch.trapezoid((1 - own).abs(), x, dim=0))
                curve = replace(curve, cpr_interval=cpr_interval, cmd_interval=(max(low, 0.0), high))
        curves.append(curve)
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
    # A float n / n_edges may lie just below n edges.
    return fractions, [int(x * n_edges + 1e-9) if isinstance(x, float) else x for x in given]
