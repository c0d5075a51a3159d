"""Everything that is judged of one set of scores, in one go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eapcore.evaluation.completeness import Completeness, measure_completeness, measure_minimality
from eapcore.evaluation.faithfulness import MIB_FRACTIONS, Mib, measure_mib
from eapcore.evaluation.inside import WITH_INSIDE, inside_scores
from eapcore.evaluation.roc import Roc, roc
from eapcore.evaluation.stability import Stability, stability
from eapcore.execution.ablation import Ablation
from eapcore.execution.distributed import reported
from eapcore.execution.experiment import Experiment, Task
from eapcore.execution.origin import check_scored, say_unknown
from eapcore.execution.progress import Count, Progress
from eapcore.graph.circuit import Circuit
from eapcore.graph.files import write_json
from eapcore.graph.scores import EdgeScores
from eapcore.graph.show import short
from eapcore.models.model import Model
from eapcore.models.torch_modes import own_modes
from eapcore.patching.edges import measure_edges
from eapcore.patching.record import Recordings
from eapcore.tasks.metrics import Metric
from eapcore.tasks.pairs import PromptPairs
from eapcore.tasks.truth import Truth


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Everything that was judged of one set of scores; None or empty where it was not asked for.

    command: that asked for it.
    """

    __repr__ = short

    mib: Mib
    rocs: Sequence[Roc] = ()
    completeness: Completeness | None = None
    minimality: EdgeScores | None = None
    stability: Stability | None = None
    command: str | None = None

    def save(self, path: str | Path) -> None:
        write_json(path, "evaluation", self)


@reported
@own_modes
def evaluate(
    model: Model,
    task: Task,
    metric: str | Metric,
    scores: EdgeScores,
    *,
    selection: str = "top_n",
    circuit: Circuit | None = None,
    truths: Sequence[Circuit | Truth] = (),
    true_top: int | None = None,
    rule: str = "trapezoid",
    resamples: Mapping[str, Any] | None = None,
    ablation: str | Ablation = "corrupt",
    reference: PromptPairs | None = None,
    batch_size: int | str = "auto",
    progress: Progress | None = None,
    resume: str | Path | None = None,
    distributed: bool = False,
) -> Evaluation:
    """Faithfulness at MIB's sizes, and what else is asked for, with the prompts run once.

    Args:
        model, task, metric: what is judged. Higher is better.
        scores: of the model's edges; with the scores of each pair where resamples are asked for.
        selection: of the circuits, "top_n" or "greedy".
        circuit: also judge its completeness and minimality.
        truths: circuits whose edges count as true: the ROC against each of them, and against a published one also with
            the edges inside components, scored to first order at the clean run, where the ablation is corrupt.
        true_top: also the ROC against so many edges that exact patching ranks highest.
        rule: how the area under a ROC is taken, see `roc.area`.
        resamples: `top_n`, `n_resamples` and `seed` of `stability.stability`.
        ablation: what edges outside a circuit carry, and reference the prompts of a mean, as `run_circuit`.
        batch_size: pairs at a time.
        progress: called with (runs done, runs in all), one for each circuit or edge and pair.
        resume: a folder for the circuits of all sizes once they have run, and for the exact patching, as `patch_edges`.
        distributed: share the work among the processes of this run, as `attribute`.

    Raises:
        ValueError: scores of another model; as `faithfulness.mib`, `roc.roc`, `completeness.completeness` and
            `stability.stability`.
    """
    experiment = Experiment.of(model, task, metric, ablation, reference, distributed)
    check_scored(scores, model)
    say_unknown(scores, ["model"])
    recordings = Recordings(experiment, batch_size)
    pairs, graph = len(experiment), model.graph
    shares = {"mib": 2 + 2 * len(MIB_FRACTIONS), "patching": graph.n_edges if true_top is not None else 0}
    shares |= dict.fromkeys(("completeness", "minimality"), 0 if circuit is None else 2 * graph.n_senders)
    count = Count(progress, pairs * sum(shares.values()))
    stages = {part: pairs * share for part, share in shares.items()}
    judged = measure_mib(
        experiment, recordings, scores, selection=selection, progress=count.stage(stages["mib"]), resume=resume
    )
    rocs: list[Roc] = []
    for truth in truths:
        rocs.append(roc(scores, truth.circuit if isinstance(truth, Truth) else truth, rule=rule))
        if isinstance(truth, Truth) and experiment.shared:
            others = inside_scores(experiment, batch_size=batch_size).tied(scores).against(truth)
            rocs.append(roc(scores, truth.circuit, rule=rule, edge_set=WITH_INSIDE, others=others))
    if true_top is not None:
        stage = count.stage(stages["patching"])
        exact = measure_edges(experiment, batch_size=batch_size, progress=stage, resume=resume)
        rocs.append(roc(scores, exact.top_n(true_top), rule=rule))
    complete: Completeness | None = None
    minimal: EdgeScores | None = None
    if circuit is not None:
        stage = count.stage(stages["completeness"])
        complete = measure_completeness(experiment, recordings, circuit, progress=stage)
        minimal = measure_minimality(experiment, recordings, circuit, progress=count.stage(stages["minimality"]))
    stable: Stability | None = None
    if resamples is not None:
        if scores.per_pair is None:
            raise ValueError("resamples need the scores of each pair: score with reduce='pair'")
        stable = stability(scores.per_pair, graph, meta=scores.meta, **resamples)
    return Evaluation(judged, rocs, complete, minimal, stable)
