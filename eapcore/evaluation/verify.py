"""Screen, then measure: the edges that scores rank highest, patched exactly."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eapcore.attribution.attribute import attribute
from eapcore.evaluation.agreement import RANKINGS, Agreement, agreement
from eapcore.execution.ablation import Ablation
from eapcore.execution.distributed import reported
from eapcore.execution.experiment import Experiment, Task
from eapcore.execution.origin import ablation_of, check_scored, check_scores, say_unknown
from eapcore.execution.progress import Count, Progress
from eapcore.graph.files import write_json
from eapcore.graph.scores import EdgeScores
from eapcore.graph.show import short
from eapcore.models.model import Model
from eapcore.patching.edges import measure_edges
from eapcore.patching.interpolate import CURVE_POINTS, Interpolation, follow_edge
from eapcore.tasks.metrics import METRICS, Metric
from eapcore.tasks.pairs import PromptPairs

_log = logging.getLogger("eapcore")


@dataclass(frozen=True, slots=True)
class Verification:
    """Exact effects of the edges that a method ranks highest.

    edges, estimates, effects: [n], from the most important down. agreement: over these edges. worst: the edges where
    the two differ most, (edge, estimate, effect). exact: the effects as EdgeScores. curves: where they were asked for,
    the way of single edges from clean to corrupt. command: that asked for it.
    """

    __repr__ = short

    edges: list[str]
    estimates: list[float]
    effects: list[float]
    agreement: Agreement
    worst: list[tuple[str, float, float]]
    exact: EdgeScores
    meta: Mapping[str, Any] = field(default_factory=dict)
    curves: Sequence[Interpolation] = ()
    command: str | None = None

    def save(self, path: str | Path) -> None:
        write_json(path, "verification", self)


@reported
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
    ablation: str | Ablation = "corrupt",
    reference: PromptPairs | None = None,
    batch_size: int | str = "auto",
    progress: Progress | None = None,
    resume: str | Path | None = None,
    distributed: bool = False,
    **screening: Any,
) -> Verification:
    """Screen, then measure: patch the n edges that the scores rank highest exactly, and say how far they were right.

    Args:
        model, task, metric, ablation, reference, batch_size, resume, distributed: as `patch_edges`.
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
    if scores is not None and screening:
        raise ValueError(f"the scores are given, so there is no use for {', '.join(screening)}: leave one of them out")
    experiment = Experiment.of(model, task, metric, ablation, reference, distributed)
    n_pairs = len(experiment)
    count = Count(progress, n_pairs * (n + CURVE_POINTS * len(curves) + (scores is None)))
    if scores is None:
        screening |= {"batch_size": batch_size, "progress": count.stage(n_pairs), "distributed": distributed}
        found = attribute(model, experiment.pairs, metric, ablation=experiment.ablation, **screening)
        check_scores(found, model.graph)
        scores = found
    check_origin(experiment, scores)
    chosen = scores.top_n(n, signed=ranking == "signed")
    exact = measure_edges(experiment, chosen, batch_size=batch_size, progress=count.stage(n * n_pairs), resume=resume)
    followed = []
    for edge in curves:
        stage = count.stage(CURVE_POINTS * n_pairs)
        followed.append(follow_edge(experiment, edge, score=scores[edge], batch_size=batch_size, progress=stage))
    names = [edge for edge, _ in scores.top(n, signed=ranking == "signed")]
    rows = [(edge, scores[edge], exact[edge]) for edge in names]
    worst = sorted(rows, key=lambda row: -abs(row[1] - row[2]))[:n_worst]
    meta = {"sign": exact.meta["sign"], "scores": dict(scores.meta), "n": n, "ranking": ranking}
    compared = agreement(scores, exact, chosen.mask)
    return Verification(
        names, [row[1] for row in rows], [row[2] for row in rows], compared, worst, exact, meta, followed
    )


def check_origin(experiment: Experiment, scores: EdgeScores) -> None:
    """ValueError for scores of another graph, model, metric or ablation than an experiment's, or of unknown sign.

    What scores from elsewhere do not say is logged; the name of another tool's metric is compared where it is one of
    ours.
    """
    check_scored(scores, experiment.model)
    scores.check_sign("a comparison with exact effects")
    made = scores.meta.get("metric") or {}
    scored, elsewhere = made.get("name", experiment.metric_name), made.get("source")
    if scored != experiment.metric_name:
        if elsewhere is None or scored in METRICS:
            raise ValueError(
                f"the scores estimate the metric {scored}, but {experiment.metric_name} was to be measured: use the "
                "same"
            )
        _log.warning("the scores estimate %s of %s: taken for %s", scored, elsewhere, experiment.metric_name)
    ablation, other = dict(experiment.ablation.meta), ablation_of(scores) or {}
    if other.get("name", ablation["name"]) != ablation["name"] or (elsewhere is None and other not in ({}, ablation)):
        raise ValueError(f"the scores estimate the ablation {other}, but {ablation} was to be measured: use the same")
    if other not in ({}, ablation):
        _log.warning("the scores estimate the ablation %s of %s: taken for %s", other, elsewhere, ablation)
    say_unknown(scores, ["model", "metric", "ablation"])
