"""How far scores are right over all edges, from a sample of them patched exactly."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from eapcore.evaluation.screened import cost_of
from eapcore.evaluation.verify import check_origin
from eapcore.execution.ablation import Ablation
from eapcore.execution.distributed import reported
from eapcore.execution.experiment import Experiment, Task
from eapcore.execution.progress import Progress
from eapcore.graph.circuit import Circuit
from eapcore.graph.files import write_json
from eapcore.graph.scores import EdgeScores
from eapcore.models.model import Model
from eapcore.patching.edges import measure_edges
from eapcore.tasks.metrics import Metric

STRATA = 6
ERRORS = 3.0  # standard errors to either side: few draws from skewed strata leave a normal distribution's 2 too few


@dataclass(frozen=True, slots=True)
class Sampled:
    """What a stratified sample says of all edges.

    edges, estimates, effects, weights: [n], the edges that were patched and how many edges each stands for, Σ weights =
    n_edges. r2: the squared correlation of score and exact effect over all edges, and slope that of the least-squares
    line exact = slope · score + intercept, estimated with these weights. r2_interval, slope_interval: three
    standard errors to either side, by the jackknife within the strata (of the correlation's atanh). They know what was
    drawn alone: an edge of small score and large effect that was not drawn is missed. cost: of patching the
    sample, in units of what `attribute(method="eap")` costs, by a count of multiply-adds. command: that
    asked for it.
    """

    n_edges: int
    edges: list[str]
    estimates: list[float]
    effects: list[float]
    weights: list[float]
    r2: float
    slope: float
    r2_interval: tuple[float, float]
    slope_interval: tuple[float, float]
    cost: float
    meta: Mapping[str, Any] = field(default_factory=dict)
    command: str | None = None

    def save(self, path: str | Path) -> None:
        write_json(path, "sampled verification", self)


def draw_sample(scores: EdgeScores, n: int, seed: int = 0) -> tuple[Annotated[Tensor, "int64 n"], Tensor, Tensor]:
    """n edges as flat indices s·R + r, the stratum of each and how many edges it stands for, float64.

    A quarter, of fewer than 16 all but two a stratum, are the largest by |score|, certain to be drawn; the others are
    drawn evenly from STRATA parts of the rest by rank, each twice as large as the one before it, with as many draws.

    Raises:
        ValueError: n outside 2 · (STRATA + 1) … n_edges, and not all edges.
    """
    total, least = scores.graph.n_edges, 2 * (STRATA + 1)
    if not isinstance(n, int) or isinstance(n, bool) or not min(least, total) <= n <= total:
        raise ValueError(
            f"a sample must have between {min(least, total)} and the {total} edges of this graph, got {n!r}"
        )
    order = scores.ranking()[0]
    if n == total:
        return order, torch.zeros(n, dtype=torch.int64, device="cpu"), torch.ones(n, dtype=torch.float64, device="cpu")
    certain = min(n // 4, n - 2 * STRATA)  # two draws a stratum say how they vary
    ends = [certain + round((total - certain) * (2**k - 1) / (2**STRATA - 1)) for k in range(STRATA + 1)]
    generator, left = torch.Generator().manual_seed(seed), n - certain
    like: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
    chosen, strata, weights = [order[:certain]], [torch.zeros(certain, **like)], [torch.ones(certain, **like)]
    for k in range(STRATA):
        size = ends[k + 1] - ends[k]
        count = min(size, left // (STRATA - k))  # what a small stratum has no room for goes to the larger ones behind
        left -= count
        chosen.append(order[ends[k] : ends[k + 1]][torch.randperm(size, generator=generator, device="cpu")[:count]])
        strata.append(torch.full((count,), k + 1.0, **like))
        weights.append(torch.full((count,), size / max(1, count), **like))
    return torch.cat(chosen), torch.cat(strata).long(), torch.cat(weights)


def sample_cost(model: Model, task: Task, metric: str | Metric, scores: EdgeScores, n: int, seed: int = 0) -> float:
    """What patching a sample costs, in units of what `attribute(method="eap")` does, by a count of multiply-adds."""
    cost = cost_of(Experiment.of(model, task, metric))
    chosen = draw_sample(scores, n, seed)[0] % scores.graph.n_receivers
    return (cost.record + float(cost.edge[chosen].sum())) / cost.eap


@reported
def verify_sample(
    model: Model,
    task: Task,
    metric: str | Metric,
    scores: EdgeScores,
    n: int = 100,
    *,
    seed: int = 0,
    ablation: str | Ablation = "corrupt",
    batch_size: int | str = "auto",
    progress: Progress | None = None,
    resume: str | Path | None = None,
    distributed: bool = False,
) -> Sampled:
    """Patch a stratified sample of edges exactly, see `draw_sample`, and say how far the scores of all are right.

    Args:
        model, task, metric, ablation, batch_size, progress, resume, distributed: as `patch_edges`.
        scores: of all edges, by any method and from any file.
        n: how many edges are patched.
        seed: of the draw.

    Raises:
        ValueError: a number of edges that does not fit; scores of another model, metric, ablation or graph;
            as `patch_edges`.
    """
    experiment = Experiment.of(model, task, metric, ablation, distributed=distributed)
    check_origin(experiment, scores)
    graph = model.graph
    flat, strata, weights = draw_sample(scores, n, seed)
    mask = torch.zeros_like(scores.mask)
    mask.view(-1)[flat] = True
    exact = measure_edges(experiment, Circuit(mask, graph), batch_size=batch_size, progress=progress, resume=resume)
    x, y = scores.scores.flatten()[flat].double(), exact.scores.flatten()[flat].double()
    r2, slope, r2_error, slope_error = _with_errors(x, y, weights, strata)
    reach, z = ERRORS * r2_error, math.atanh(min(math.sqrt(r2), 1 - 1e-12))
    r2_interval = (math.tanh(max(0.0, z - reach)) ** 2, math.tanh(z + reach) ** 2)
    slope_interval = (slope - ERRORS * slope_error, slope + ERRORS * slope_error)
    names, cost = [graph.edge_name(*divmod(i, graph.n_receivers)) for i in flat.tolist()], cost_of(experiment)
    method = {"name": "stratified sample", "n": n, "seed": seed, "standard_errors": ERRORS}
    return Sampled(
        graph.n_edges, names, x.tolist(), y.tolist(), weights.tolist(), r2, slope, r2_interval, slope_interval,
        (cost.record + float(cost.edge[flat % graph.n_receivers].sum())) / cost.eap,
        {"sign": exact.meta["sign"], "scores": dict(scores.meta), "method": method},
    )  # fmt: skip


def _with_errors(x: Tensor, y: Tensor, weights: Tensor, strata: Tensor) -> tuple[float, float, float, float]:
    """(squared correlation, slope, and the standard errors of atanh |correlation| and of the slope), by leaving out one
    edge of a stratum after another, those that are certain excepted."""
    r2, slope = (float(found) for found in _line(x[None], y[None], weights[None]))
    squares = [0.0, 0.0]
    for stratum in strata.unique().tolist():
        part = (strata == stratum).nonzero()[:, 0]
        n = len(part)
        if n < 2 or float(weights[part[0]]) == 1:
            continue
        others = weights.repeat(n, 1)
        others[:, part] *= n / (n - 1)
        others[torch.arange(n, device="cpu"), part] = 0
        found, slopes = _line(x.expand(n, -1), y.expand(n, -1), others)
        for i, values in enumerate((found.sqrt().clamp(max=1 - 1e-12).atanh(), slopes)):
            squares[i] += (n - 1) / n * float((values - values.mean()).square().sum())
    return r2, slope, math.sqrt(squares[0]), math.sqrt(squares[1])


def _line(x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """(squared correlation, slope of y on x) of weighted rows [N, n], each [N]."""
    weights = weights / weights.sum(1, keepdim=True)
    x, y = (v - (weights * v).sum(1, keepdim=True) for v in (x, y))
    xy, xx, yy = ((weights * a * b).sum(1) for a, b in ((x, y), (x, x), (y, y)))
    return xy.square() / (xx * yy), xy / xx
