"""The metric on the way from clean to corrupt at one edge."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from eapcore.execution.experiment import Task
from eapcore.execution.progress import Count, Progress
from eapcore.graph.files import write_json
from eapcore.graph.scores import sign_text
from eapcore.models.model import Model
from eapcore.models.torch_modes import own_modes
from eapcore.patching.one_receiver import Readers
from eapcore.patching.record import Question
from eapcore.tasks import PromptPairs
from eapcore.tasks.metrics import Metric

CURVE_POINTS = 11  # of an interpolation, where nobody says how many


@dataclass(frozen=True, slots=True)
class Interpolation:
    """The metric along the way from clean to corrupt at one edge.

    points: [P], 0 clean, 1 corrupt. effects: [P], the mean change of the metric there. estimate: the linear one, `score
    · points`, where a score was given.
    """

    edge: str
    points: list[float]
    effects: list[float]
    estimate: list[float] | None
    meta: Mapping[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        write_json(path, "interpolation", self)


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
    ablation: str = "corrupt",
    reference: PromptPairs | None = None,
    batch_size: int | str = "auto",
    progress: Progress | None = None,
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

    Raises:
        ValueError: as `patch_edges`; no points, fewer than 2 as a number, or some that are not finite.

    Source: Syed, Rager, Conmy 2023, figure 4b.
    """
    question = Question.of(model, task, metric, ablation, reference)
    sender, receiver = model.graph.edge(edge)
    layer = receiver // model.graph.receivers_per_layer
    places = _places(points)
    sums = torch.zeros(len(places), dtype=torch.float64, device="cpu")
    count = Count(progress, len(places) * len(question.pairs))
    for batch in question.batches(question.batch_size(batch_size)):
        clean = question.ends(batch)[0]
        delta = batch.other.senders[sender] - batch.clean.senders[sender]
        for part in torch.arange(len(places), device="cpu").split(batch.copies(model)):
            weights = torch.tensor(places, dtype=model.dtype, device=model.device)[part]
            reads = [(row, receiver) for row in range(len(part))]
            readers = Readers.of(model, batch, layer, weights[:, None, None, None] * delta, reads)
            sums[part] += (question.values(readers.logits(reads), batch) - clean).sum(1).cpu()
            count.add(len(part) * len(batch.pairs))
    effects = question.mean(sums).tolist()
    estimate = None if score is None else [score * p for p in places]
    sign = sign_text("effect", "measured", "the edge alone goes so far from clean, point 0, to ablated, point 1")
    method = {"name": "interpolate", "ablation": question.ablation}
    meta = {**question.describe(), "sign": sign, "method": method}
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
