"""The metric on the way from clean to corrupt at one edge."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from eapcore.execution.ablation import Ablation
from eapcore.execution.distributed import reported
from eapcore.execution.experiment import Experiment, Task
from eapcore.execution.progress import Count, Progress
from eapcore.graph.files import write_json
from eapcore.graph.scores import sign_text
from eapcore.graph.show import short
from eapcore.models.model import Model
from eapcore.models.torch_modes import own_modes
from eapcore.patching.one_receiver import Readers, reader_of
from eapcore.patching.record import record
from eapcore.tasks.metrics import Metric
from eapcore.tasks.pairs import PromptPairs

CURVE_POINTS = 11  # of an interpolation, where nobody says how many


@dataclass(frozen=True, slots=True)
class Interpolation:
    """The metric along the way from clean to corrupt at one edge.

    points: [P], 0 clean, 1 corrupt. effects: [P], the mean change of the metric there. estimate: the linear one, `score
    · points`, where a score was given.
    """

    __repr__ = short

    edge: str
    points: list[float]
    effects: list[float]
    estimate: list[float] | None
    meta: Mapping[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        write_json(path, "interpolation", self)


@reported
@own_modes
@torch.no_grad()
def interpolate(
    model: Model,
    task: Task,
    metric: str | Metric,
    edge: str,
    *,
    points: int | Sequence[float] = CURVE_POINTS,
    score: float | None = None,
    ablation: str | Ablation = "corrupt",
    reference: PromptPairs | None = None,
    batch_size: int | str = "auto",
    progress: Progress | None = None,
    distributed: bool = False,
) -> Interpolation:
    """Move one edge from clean to corrupt and measure the metric on the way.

        effect(λ) = mean over pairs of metric(run with v[r] + λ (e_corrupt[s] − e_clean[s])) − metric(clean)

    Its slope at 0 is the EAP score, its value at 1 the exact effect.

    Args:
        model, task, metric, ablation, reference, batch_size: as `patch_edges`.
        edge: its name.
        points: how many from 0 to 1, at least 2, or the λ themselves.
        score: an estimate of the edge's effect, drawn as a line beside it.
        progress: called with (runs done, runs in all), one for each point and pair.
        distributed: share the pairs among the processes of this run, as `attribute`.

    Raises:
        ValueError: as `patch_edges`; no points, fewer than 2 as a number, or some that are not finite.

    Source: Syed, Rager, Conmy 2023, figure 4b.
    """
    experiment = Experiment.of(model, task, metric, ablation, reference, distributed)
    return follow_edge(experiment, edge, points=points, score=score, batch_size=batch_size, progress=progress)


@own_modes
@torch.no_grad()
def follow_edge(
    experiment: Experiment,
    edge: str,
    *,
    points: int | Sequence[float] = CURVE_POINTS,
    score: float | None = None,
    batch_size: int | str = "auto",
    progress: Progress | None = None,
) -> Interpolation:
    """`interpolate` for an experiment."""
    model = experiment.model
    sender, receiver = model.graph.edge(edge)
    number = reader_of(model, receiver)
    places = _places(points)
    sums = torch.zeros(len(places), dtype=torch.float64, device="cpu")
    count = Count(experiment.ranks.watched(progress), len(places) * len(experiment))
    for recording in record(experiment, batch_size):
        clean = experiment.ends(recording.reference)[0]
        delta = recording.ablated.senders[sender] - recording.clean.senders[sender]
        for part in torch.arange(len(places), device="cpu").split(recording.copies()):
            weights = torch.tensor(places, dtype=model.dtype, device=model.device)[part]
            reads = [(row, receiver) for row in range(len(part))]
            readers = Readers.of(recording, number, weights[:, None, None, None] * delta, reads)
            sums[part] += (experiment.values(readers.logits(reads), recording.reference) - clean).sum(1).cpu()
            count.add(len(part) * len(recording.batch.pairs))
    effects = experiment.mean(experiment.ranks.sum([sums])).tolist()
    estimate = None if score is None else [score * p for p in places]
    sign = sign_text("effect", "measured", "the edge alone goes so far from clean, point 0, to ablated, point 1")
    method = {"name": "interpolate", "ablation": dict(experiment.ablation.meta)}
    meta = {**experiment.describe(), "sign": sign, "method": method}
    return Interpolation(edge, places, effects, estimate, meta)


def _places(points: int | Sequence[float]) -> list[float]:
    """The λ of an interpolation, checked."""
    if isinstance(points, int):
        if points < 2 or isinstance(points, bool):
            raise ValueError(f"points must be at least 2, got {points}")
        return [i / (points - 1) for i in range(points)]
    try:
        places = [float(p) for p in points]
    except (TypeError, ValueError):
        places = []
    if not places or not all(map(math.isfinite, places)):
        raise ValueError(
            f"points must be how many, at least 2, or a list of finite λ, 0 clean and 1 corrupt, got {points!r}"
        )
    return places
