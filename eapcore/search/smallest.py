"""The smallest circuit, of a row of sizes, that keeps a share of the behaviour."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from eapcore.execution.ablation import Ablation
from eapcore.execution.distributed import reported
from eapcore.execution.experiment import Experiment, Task
from eapcore.execution.origin import check_scored
from eapcore.execution.progress import Progress
from eapcore.graph.circuit import Circuit
from eapcore.graph.confidence import interval
from eapcore.graph.scores import EdgeScores
from eapcore.graph.show import short
from eapcore.models.model import Model
from eapcore.models.torch_modes import own_modes
from eapcore.patching.circuits import each_pair, kept_without
from eapcore.patching.record import Recording, Recordings
from eapcore.tasks.metrics import Metric
from eapcore.tasks.pairs import PromptPairs

SELECT = ("top", "greedy", "stable")
SIZES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0)  # of all edges


@dataclass(frozen=True, slots=True)
class Tried:
    """A circuit that was run.

    selected: as it was chosen. circuit: what of it connects `embed` to the logits, which was run. value: the metric's
    mean. faithfulness: (value − ablated) / (clean − ablated), NaN where both are the same. interval: of the
    faithfulness, 95 %, see `confidence.interval`; None with one pair.
    """

    __repr__ = short

    selected: Circuit
    circuit: Circuit
    value: float
    faithfulness: float
    interval: tuple[float, float] | None = None


@reported
@own_modes
def smallest(
    model: Model,
    task: Task,
    metric: str | Metric,
    scores: EdgeScores,
    faithfulness: float = 0.8,
    *,
    sizes: Sequence[float] = SIZES,
    ablation: str | Ablation = "corrupt",
    reference: PromptPairs | None = None,
    batch_size: int | str = "auto",
    progress: Progress | None = None,
    distributed: bool = False,
) -> list[Tried]:
    """Run the circuits of the edges with the largest |score|, from small to large, until one keeps the behaviour.

    The clean and the corrupt prompts run once, where memory suffices to keep what they made.

    Args:
        model, task, metric: what is measured. Higher is better.
        scores: of the model's edges.
        faithfulness: the share (value − ablated) / (clean − ablated) that is to be kept.
        sizes: shares of all edges, ascending; at least one edge each.
        ablation: what edges outside a circuit carry, and reference the prompts of a mean, as `run_circuit`.
        batch_size: pairs at a time.
        progress: called with (circuits run, circuits in all).
        distributed: share the pairs among the processes of this run, as `attribute`.

    Returns:
        The circuits that were run; the last is the smallest that keeps so much, or the largest of all.

    Raises:
        ValueError: as `run_circuit`; scores of another model; a metric that does not fit.
    """
    experiment = Experiment.of(model, task, metric, ablation, reference, distributed)
    check_scored(scores, model)
    recordings, circuits = Recordings(experiment, batch_size), selections(scores, sizes)
    return run_until(experiment, recordings, circuits, faithfulness, progress=progress)[0]


def selected(scores: EdgeScores, n: int, select: str = "top") -> Circuit:
    """The circuit of n edges by a rule out of SELECT: `EdgeScores.top_n`, `greedy` or `stable`, of which fewer may be
    there."""
    if select == "stable":
        return scores.stable(n=n)
    return scores.greedy(n) if select == "greedy" else scores.top_n(n)


def selections(scores: EdgeScores, sizes: Sequence[float] = SIZES, select: str = "top") -> list[Circuit]:
    """The circuits by a rule out of SELECT at shares of all edges, at least one edge each, up to all that it has."""
    counts = sorted({max(1, round(share * scores.graph.n_edges)) for share in sizes})
    circuits: list[Circuit] = []
    for n in counts:
        circuits.append(selected(scores, n, select))
        if circuits[-1].n_edges < n:
            break
    return circuits


def run_until(
    experiment: Experiment,
    recordings: Iterable[Recording],
    circuits: Sequence[Circuit],
    faithfulness: float = math.inf,
    *,
    progress: Progress | None = None,
) -> tuple[list[Tried], float, float]:
    """Run circuits one after the other until one keeps so much of the behaviour.

    Returns:
        The circuits that were run, and the metric on the whole model and with every edge ablated.
    """
    graph = experiment.model.graph
    ends = [Circuit(graph.edge_mask(), graph), Circuit(graph.edge_mask() & False, graph)]
    both = each_pair(experiment, ends, recordings)
    clean, ablated = experiment.mean(both.sum(1)).tolist()
    scale = math.nan if experiment.no_scale(clean, ablated) else clean - ablated
    tried: list[Tried] = []
    for selected in circuits:
        circuit = selected.prune()
        values = each_pair(experiment, [circuit], recordings)
        (value,) = experiment.mean(values.sum(1)).tolist()
        kept = (value - ablated) / scale + 0.0
        without = None if math.isnan(scale) else kept_without(values, *both)
        tried.append(Tried(selected, circuit, value, kept, None if without is None else interval(kept, without[0])))
        if progress is not None:
            progress(len(tried), len(circuits))
        if kept >= faithfulness:
            break
    return tried, clean, ablated
