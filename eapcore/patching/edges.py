"""Exact patching of edges: what the metric does where one of them alone carries the ablated activation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from eapcore.execution.ablation import Ablation
from eapcore.execution.distributed import ALONE, Ranks, reported
from eapcore.execution.experiment import Experiment, Task, check_batch_size, digest, result_dtype
from eapcore.execution.progress import Count, Progress
from eapcore.execution.resume import Partial, Resume
from eapcore.graph.circuit import Circuit
from eapcore.graph.graph import Graph
from eapcore.graph.scores import EdgeScores, sign_text
from eapcore.models.model import Model
from eapcore.models.tensors import on
from eapcore.models.torch_modes import own_modes
from eapcore.patching.one_receiver import Readers, reader_of
from eapcore.patching.record import Recording, useful_size
from eapcore.tasks.metrics import Metric
from eapcore.tasks.pairs import PromptPairs

Edges = Circuit | Sequence[str] | None


@reported
@own_modes
@torch.no_grad()
def patch_edges(
    model: Model,
    task: Task,
    metric: str | Metric = "logit_diff",
    edges: Edges = None,
    *,
    ablation: str | Ablation = "corrupt",
    reference: PromptPairs | None = None,
    batch_size: int | str = "auto",
    progress: Progress | None = None,
    resume: str | Path | None = None,
    distributed: bool = False,
) -> EdgeScores:
    """Measure what corrupting each edge does to the metric, one edge at a time, many in one forward.

        effect[s, r] = mean over pairs of metric(run with v[r] + e_corrupt[s] − e_clean[s] at r alone) − metric(clean)

    The run is clean up to r, which alone reads the change; everything behind r follows. So only r's own head or MLP is
    computed again in its layer, then the later layers, from the first position where clean and corrupt differ, and the
    last layer at the answer alone.

    Args:
        model: the model.
        task: prompt pairs, or (clean, corrupt) tokens int64 [N, T] read at their last position.
        metric: a name out of `metrics.METRICS`, or a callable. Higher is better.
        edges: a circuit or names of edges; None is all edges of the graph.
        ablation: what the edge carries: "corrupt", "zero", "mean" or "mean-positional", as `run_circuit`.
        reference: the prompts of a mean; None is the task's own.
        batch_size: pairs at a time; the effects do not depend on it.
        progress: called with (effects measured, effects in all), one for each edge and pair.
        resume: a folder for what is done so far, written every half minute and on an interruption; where it exists, the
            work goes on from there, on this device or another, on as many processes or others. A callable metric is
            known by its name and by its values on the clean and corrupt runs, which are measured again.
        distributed: share the edges among the processes of this run, as `attribute` shares pairs.

    Returns:
        EdgeScores with the sign of `attribute`: negative means that the behaviour needs the edge. Edges that were not
        asked for are 0; `meta["method"]["edges"]` names those that were, or is "all".

    Raises:
        ValueError: prompts, metric or edges that do not fit; a resume file of another model, task, metric, ablation or
            set of edges; NaN or infinite activations, or such a metric.

    Source: Syed, Rager, Conmy 2023, eq. 1.
    """
    experiment = Experiment.of(model, task, metric, ablation, reference, distributed)
    return measure_edges(experiment, edges, batch_size=batch_size, progress=progress, resume=resume)


@own_modes
@torch.no_grad()
def measure_edges(
    experiment: Experiment,
    edges: Edges = None,
    *,
    batch_size: int | str = "auto",
    progress: Progress | None = None,
    resume: str | Path | None = None,
    recordings: Sequence[Recording] = (),
    share: Pairs | None = None,
) -> EdgeScores:
    """`patch_edges` for an experiment.

    recordings: of some of its pairs, which are not recorded again. share: how processes share the pairs; None shares
    the edges, for which every process runs all pairs.
    """
    model, pairs, ranks = experiment.model, experiment.pairs, experiment.ranks
    graph, mask = model.graph, _edge_set(model.graph, edges)
    n_edges, alone = int(mask.sum()), replace(experiment, ranks=ALONE)
    what, lanes = ("edges", min(ranks.size, n_edges)) if share is None else ("patched", share.lanes)
    kept = Resume(resume, what, lambda: {"edges": digest(mask), **experiment.identity()}, ranks, lanes)
    check_batch_size(batch_size)
    asked = batch_size if isinstance(batch_size, int) else None
    size = kept.settle("batch size", asked, lambda: ranks.least(useful_size(alone, batch_size)))
    mine = {lane: mask if share else _dealt(model, mask, lane, kept.lanes) for lane in kept.mine}
    partials = [Partial(kept, lane, alone, edges_of, size) for lane, edges_of in mine.items()]
    for lane in partials:
        lane.check_metric(lambda begun: _ends(alone, size, begun), model.dtype)
    seen = sum(int(p.done.pairs.sum()) * p.n_edges + len(p.done.batch) * int(p.done.edges.sum()) for p in partials)
    count = Count(ranks.watched(progress), n_edges * len(pairs), seen)
    if seen:
        count.add(0)
    for lane in partials:
        together = None if share is None else share.groups
        order = None if share is None else share.of(alone, lane.lane, kept.lanes)
        _measure(alone, lane, size, count, recordings, order, together[lane.lane] if together else None)
    nothing = (
        torch.zeros(mask.shape, dtype=torch.float64, device="cpu"),
        torch.zeros(2, len(pairs), dtype=torch.float64, device="cpu"),
    )
    own = [lane.done.values for lane in partials]  # where edges are shared all have the same
    values = ranks.sum((own if share else own[:1]) or [nothing[1]], kept.lanes if share else 1)
    effects = experiment.mean(ranks.sum([lane.done.sums for lane in partials] or [nothing[0]], kept.lanes))
    clean, corrupt = values.mean(1).tolist()
    names = "all" if edges is None else Circuit(mask, graph).edges
    meta = {
        **experiment.describe(),
        "sign": sign_text("score", "measured", "the edge alone is ablated"),
        "metric": {"name": experiment.metric_name, "clean": clean, "corrupt": corrupt},
        "method": {"name": "patch", "exact": True, "ablation": dict(experiment.ablation.meta), "edges": names},
    }
    return EdgeScores(effects.to(result_dtype(model.dtype)), graph, meta)


@dataclass(frozen=True, slots=True)
class Pairs:
    """How processes share the pairs of exact patching.

    lanes: into how many parts. groups: which of each of this process's go together, in order; None for those that suit
    the device.
    """

    lanes: int
    groups: Mapping[int, list[list[int]]] | None = None

    def of(self, alone: Experiment, lane: int, lanes: int) -> list[int]:
        """A lane's pairs, in order."""
        groups = replace(alone, ranks=Ranks(lane, lanes)).groups(len(alone), 1) if self.groups is None else None
        return [pair for group in groups or (self.groups or {})[lane] for pair in group]


def _measure(
    experiment: Experiment,
    lane: Partial,
    size: int,
    count: Count,
    recordings: Sequence[Recording],
    order: list[int] | None,
    together: list[list[int]] | None,
) -> None:
    """What is left of a lane's edges; order: of which pairs, None for all. together: how these go together."""
    done, mask = lane.done, lane.mask
    left = done.pairs.logical_not()
    left[list(done.batch)] = False
    if order is not None:
        mine = torch.zeros_like(left)
        mine[order] = True
        left &= mine
    ready: dict[tuple[int, ...], Recording] = {}
    for made in recordings:
        index = made.batch.index.tolist()
        if bool(left[index].all()):
            ready[tuple(index)], left[index] = made, False
    if together is None:
        groups = [
            *map(list, ready),
            *experiment.groups(size, 1 + lane.n_edges // experiment.model.graph.n_layers, left),
        ]
    else:  # in order, whichever of them were recorded before
        rest = [[pair for pair in group if left[pair]] for group in together]
        place = {pair: i for i, pair in enumerate(order or ())}
        groups = sorted((group for group in [*map(list, ready), *rest] if group), key=lambda group: place[group[0]])
    try:
        for group in [*([list(done.batch)] if done.batch else []), *groups]:
            recording = ready.get(tuple(group)) or Recording.of(experiment, group, short=True)
            ends = experiment.ends(recording.reference)
            lane.done = lane.done.begin(group, ends)
            delta = recording.ablated.senders - recording.clean.senders
            moves = _moving(recording, delta)
            for chunk, logits in _patched(recording, mask & ~lane.done.edges, delta):
                senders, receivers = (list(side) for side in zip(*chunk, strict=True))
                change = experiment.values(logits, recording.reference) - ends[0]
                change = change.where(on(moves(senders, receivers), change.device), 0.0)
                lane.done.found.append((senders, receivers, change.sum(1).cpu()))
                count.add(len(group) * len(chunk))
                if lane.resume.due:
                    lane.save()
            lane.done = lane.done.end()
    finally:
        lane.save()


def _moving(recording: Recording, delta: Tensor) -> Callable[[list[int], list[int]], Tensor]:
    """Of edges by their senders and receivers whether anything moves where the receiver reads it for the answer, bool
    [C, B]: where nothing does the effect is exactly 0, and what is measured rounding. delta: [S, B, T, D]."""
    model, read = recording.model, recording.read
    before = torch.arange(delta.shape[-2], device=delta.device) <= on(read, delta.device).amax(-1, keepdim=True)
    there = delta.any(-1)
    anywhere, at_answer = (there & before).any(-1), recording.at_read(there[..., None])[..., 0, 0]  # [S, B]
    alone = {model.graph.logits}  # which read at the answer alone: the last layer's MLP and q too
    for stage in (stage for stage in model.stages if stage.last):
        for place, count in ((stage.attention, model.config.n_heads), (stage.mlp, 1)):
            alone |= set() if place is None else set(range(place.receivers.start, place.receivers.start + count))

    def moves(senders: list[int], receivers: list[int]) -> Tensor:
        short = torch.tensor([r in alone for r in receivers], device="cpu").to(delta.device)
        return torch.where(short[:, None], at_answer[senders], anywhere[senders])

    return moves


def _dealt(model: Model, mask: Tensor, lane: int, lanes: int) -> Tensor:
    """A lane's edges of a mask, bool [S, R]: of those into each stage an equal part, receiver by receiver."""
    if lanes == 1:
        return mask
    into: dict[int, list[tuple[int, int]]] = {}
    for r, s in mask.T.nonzero().tolist():
        into.setdefault(reader_of(model, r), []).append((s, r))
    mine = torch.zeros_like(mask)
    before = 0
    for edges in into.values():  # the last of one stage and the first of the next go to lanes that follow each other
        for i, place in enumerate(edges):
            number = (before + i * lanes // len(edges)) % lanes if len(edges) >= lanes else (before + i) % lanes
            if number == lane:
                mine[place] = True
        before += min(len(edges), lanes)
    return mine


def _ends(experiment: Experiment, size: int, pairs: Tensor) -> Tensor:
    """The metric on the clean and corrupt runs of some pairs, bool [N]: float64 [2, N], 0 for the others."""
    values = torch.zeros(2, len(experiment), dtype=torch.float64, device="cpu")
    for group in experiment.groups(size, 1, pairs):
        values[:, group] = experiment.ends(Recording.of(experiment, group, short=True).reference).cpu()
    return values


def _edge_set(graph: Graph, edges: Edges) -> Tensor:
    """bool [S, R] of the edges that are asked for."""
    if edges is None:
        return graph.edge_mask()
    if isinstance(edges, str):
        raise ValueError(f"edges must be a circuit or a list of names, got the text {edges!r}")
    circuit = edges if isinstance(edges, Circuit) else Circuit.from_edges(graph, list(edges))
    if circuit.graph != graph:
        raise ValueError(f"the edges must belong to {graph}, got some of {circuit.graph}")
    if not circuit.n_edges:
        raise ValueError("at least one edge is needed")
    if n_others := int((circuit.mask & ~graph.edge_mask()).sum()):
        raise ValueError(f"edges must be edges of {graph}, but {n_others} places of the circuit's mask are none")
    return circuit.mask


def _patched(recording: Recording, mask: Tensor, delta: Tensor) -> Iterator[tuple[list[tuple[int, int]], Tensor]]:
    """Edges (sender, receiver) that go through the model together, into one stage or into the logits, and the batch's
    logits with one of them patched in each copy; delta is [S, B, T, D]."""
    found: dict[int, list[tuple[int, int]]] = {}
    for r, s in mask.T.nonzero().tolist():
        found.setdefault(reader_of(recording.model, r), []).append((s, r))
    for number, edges in found.items():
        readers = Readers.of(recording, number, delta, edges)
        copies = recording.copies(at_read=number == len(recording.model.stages))
        for i in range(0, len(edges), copies):
            yield edges[i : i + copies], readers.logits(edges[i : i + copies])
