"""ACDC: search for a circuit from the logits back, removing every edge whose corruption costs less than a threshold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eapcore.execution.ablation import Ablation
from eapcore.execution.distributed import reported
from eapcore.execution.experiment import Experiment, Task, check_batch_size, digest
from eapcore.execution.origin import check_scored
from eapcore.execution.progress import Progress
from eapcore.execution.resume import Resume, check_metric
from eapcore.graph.circuit import Circuit
from eapcore.graph.paths import moved_by, needed, reached
from eapcore.graph.scores import EdgeScores
from eapcore.models.model import Model
from eapcore.models.torch_modes import own_modes
from eapcore.patching.masked import Changes, run_masked
from eapcore.patching.record import Recording, record, useful_size
from eapcore.tasks.metrics import Metric
from eapcore.tasks.pairs import PromptPairs

ORDERS = ("latest", "earliest")


@reported
@own_modes
@torch.no_grad()
def acdc(
    model: Model,
    task: Task,
    metric: str | Metric = "kl",
    *,
    threshold: float,
    start: Circuit | None = None,
    order: str | EdgeScores = "latest",
    ablation: str | Ablation = "corrupt",
    reference: PromptPairs | None = None,
    batch_size: int | str = "auto",
    progress: Progress | None = None,
    resume: str | Path | None = None,
    distributed: bool = False,
) -> Circuit:
    """Remove every edge whose corruption, on top of those removed before it, costs less than a threshold.

        remove (s, r) if  m(circuit) − m(circuit without (s, r)) < threshold,  m = mean over pairs of the metric

    With the metric kl, m is −KL(P_clean ‖ P), so that an edge goes where the KL rises by less than the threshold. The
    receivers come from the logits back: the logits, then for each layer from the last its MLP, v, k and q inputs, in
    each the highest head first. An edge into a component that has lost its way to the logits goes without a forward.

    The candidates of one receiver are evaluated together as if each of them were to be removed; what was evaluated
    behind the first that stays is evaluated again. So the decisions are those of a search that takes one at a time.
    What every sender sends is kept for all pairs, 3·S·N·T·D numbers: tens of pairs rather than thousands. It is made
    anew in front of each layer's receivers, from where an interrupted search goes on.

    Args:
        model: the model.
        task: prompt pairs, or (clean, corrupt) tokens int64 [N, T] read at their last position.
        metric: a name out of `metrics.METRICS`, or a callable. Higher is better.
        threshold: positive, in the metric's unit.
        start: the circuit to prune, e.g. `scores.top_n(n)`; None is all edges.
        order: of the senders of a receiver: "latest" first, "earliest" first, or edge scores, least |score| first.
        ablation: what a removed edge carries, and reference the prompts of a mean, as `run_circuit`.
        batch_size: pairs at a time.
        progress: called with (edges decided, edges in all).
        resume: a folder for what is decided so far, written behind each layer; where it exists, the search goes on from
            there, in as many processes.
        distributed: share the pairs among the processes of this run, as `attribute`.

    Returns:
        Circuit; `meta["metric"]` has the metric on the clean, corrupt and circuit runs, `meta["forwards"]` how many
        edges were decided by a forward ("decided", what a search that takes one at a time would run), how many copies
        of the model were run ("evaluated"), and in how many launches.

    Raises:
        ValueError: a threshold that is not positive and finite; a start, scores, prompts or a metric that do not fit.

    Source: Conmy et al. 2023, algorithm 1; with start, Syed, Rager, Conmy 2023, section 5.2.
    """
    experiment = Experiment.of(model, task, metric, ablation, reference, distributed)
    graph, coupled = model.graph, model.config.heads_coupled
    if isinstance(threshold, bool) or not isinstance(threshold, float | int) or not 0 < threshold < math.inf:
        raise ValueError(f"threshold must be positive and finite, got {threshold!r}")
    if start is not None and start.graph != graph:
        raise ValueError(f"start must be a circuit of {graph}, got one of {start.graph}")
    if start is not None and bool((start.mask & ~graph.edge_mask()).any()):
        raise ValueError(f"start must be edges of {graph}, but some places of its mask are none")
    keys = _keys(model, order)
    mask = (graph.edge_mask() if start is None else start.mask).clone()
    ranks, total = experiment.ranks, int(mask.sum())
    what = {
        "start": digest(mask),
        "threshold": float(threshold),
        "order": order if isinstance(order, str) else digest(order.scores),
        "number of processes": ranks.size,
    }
    kept = Resume(resume, "acdc", lambda: what | experiment.identity(), ranks, 1)
    check_batch_size(batch_size)
    asked = batch_size if isinstance(batch_size, int) else None
    size = kept.settle("batch size", asked, lambda: ranks.least(useful_size(experiment, batch_size)))
    begun = ranks.first(kept.notes.get(0))
    if begun is not None:
        parts = [kept.found[0]["mask"].double()] if kept.found else [torch.zeros_like(mask).double()]
        mask = ranks.sum(parts, 1).bool()
    search = _Search(experiment, mask, size)
    if begun is not None:
        if kept.found:  # a metric of one's own is known by its values alone
            check_metric(kept, experiment.metric_name, kept.found[0]["values"], search.each, model.dtype)
        search.decided, search.evaluated, search.launches, search.guess = begun["counts"]
    progress = ranks.watched(progress, alike=True)
    seen, next_one = (0, graph.n_receivers) if begun is None else begun["at"]
    if seen and progress is not None:
        progress(seen, total)

    def save() -> None:
        counts = [search.decided, search.evaluated, search.launches, search.guess]
        note = {"batch size": size, "at": [seen, next_one], "counts": counts}
        if kept.mine:
            kept.write(0, note, {"mask": mask, "values": search.each})

    save()  # a folder that cannot be written to is refused before the work
    for r in reversed(range(next_one)):
        if r + 1 < next_one and (r + 1) % graph.receivers_per_layer == 0:  # a layer begins
            search.run(mask)
            next_one = r + 1
            save()
        present: list[int] = mask[:, r].nonzero().squeeze(1).tolist()
        if not present:
            continue
        senders = [s for _, s in sorted((keys[s][r], s) for s in present)]
        behind = moved_by(graph, r, coupled)
        if behind and not bool(needed(graph, mask, coupled=coupled)[behind.start : behind.stop].any()):
            mask[:, r] = False
        else:
            search.decide(r, senders, threshold)
        seen += len(senders)
        if progress is not None:
            progress(seen, total)
    if next_one:
        search.run(mask)
        next_one = 0
        save()
    meta = {
        **experiment.describe(),
        "method": {
            "name": "acdc",
            "threshold": threshold,
            "order": order if isinstance(order, str) else "scores",
            "ablation": dict(experiment.ablation.meta),
            "start": "all edges" if start is None else {"n_edges": start.n_edges, **start.meta},
        },
        "metric": {"name": experiment.metric_name, **search.ends, "circuit": search.value},
        "forwards": {"decided": search.decided, "evaluated": search.evaluated, "launches": search.launches},
    }
    return Circuit(mask, graph, meta)


def prune_sweep(
    model: Model,
    task: Task,
    scores: EdgeScores,
    sizes: Sequence[int] | None,
    thresholds: Sequence[float],
    metric: str | Metric = "kl",
    *,
    score_thresholds: Sequence[float] | None = None,
    progress: Progress | None = None,
    resume: str | Path | None = None,
    **options: Any,
) -> list[Circuit]:
    """EAP followed by ACDC: prune each start with each threshold, the starts outermost.

    Args:
        model, task, metric: as `acdc`; so are options.
        scores: their most important edges by |score| are the starts.
        sizes: numbers of edges to start from; None with score_thresholds.
        thresholds: of ACDC.
        score_thresholds: instead of sizes, the edges with |score| of at least each of these.
        progress: called with (edges decided, edges in all), over all searches.
        resume: a folder, in which each search has one of its own.

    Returns:
        The circuits. `meta["method"]["start"]` says how each start was selected: "selection" is "top_n" with its "n",
        or "threshold" with its "threshold".

    Raises:
        ValueError: both sizes and score_thresholds, or neither; as `acdc`.

    Source: Syed, Rager, Conmy 2023, section 5.2.
    """
    if (sizes is None) == (score_thresholds is None):
        raise ValueError("the starts are given by sizes or by score_thresholds: one of the two, got both or neither")
    check_scored(scores, model)
    starts = [scores.top_n(n) for n in sizes or ()] + [scores.threshold(t) for t in score_thresholds or ()]
    total, before = len(thresholds) * sum(start.n_edges for start in starts), 0
    found: list[Circuit] = []

    def of_all(seen: int, _: int) -> None:
        if progress is not None:
            progress(before + seen, total)

    for start in starts:
        for threshold in thresholds:
            own = None if resume is None else Path(resume) / f"search-{len(found)}"
            how = {"threshold": threshold, "start": start, "progress": of_all, "resume": own, **options}
            found.append(acdc(model, task, metric, **how))
            before += start.n_edges
    return found


def _keys(model: Model, order: str | EdgeScores) -> list[list[float]]:
    """[S][R], by which the senders of a receiver are tried, the smallest first."""
    graph = model.graph
    if isinstance(order, EdgeScores):
        check_scored(order, model)
        return order.scores.abs().tolist()
    if order not in ORDERS:
        raise ValueError(f"order must be {', '.join(ORDERS)} or edge scores, got {order!r}")
    sign = -1.0 if order == "latest" else 1.0
    return [[sign * s] * graph.n_receivers for s in range(graph.n_senders)]


@dataclass(frozen=True, slots=True)
class _State:
    """A batch, and how every sender's output in the current circuit differs from the ablated one."""

    recording: Recording
    now: Changes


class _Search:
    """The current circuit, run: what a candidate does not change is not computed again."""

    def __init__(self, experiment: Experiment, mask: Tensor, batch_size: int | str) -> None:
        self.experiment, self.graph, self.mask = experiment, experiment.model.graph, mask
        self.coupled = experiment.model.config.heads_coupled
        self.decided, self.evaluated, self.launches, self.guess = 0, 0, 0, 4
        self.states: list[_State] = []
        self.recordings = list(record(experiment, batch_size))
        each = torch.zeros(2, len(experiment), dtype=torch.float64, device="cpu")
        for recording in self.recordings:
            each[:, recording.reference.index.cpu()] = experiment.ends(recording.reference).cpu()
        self.each = experiment.ranks.sum([each])
        self.run(mask)

    def run(self, mask: Tensor) -> None:
        """Run a circuit from the beginning: from here on it is the current one."""
        experiment, self.mask = self.experiment, mask
        embedding = self.graph.members([0])
        again = needed(self.graph, mask, coupled=self.coupled) & ~embedding
        self.states = []
        values = torch.zeros(3, dtype=torch.float64, device="cpu")
        for recording in self.recordings:
            ablated = recording.ablated
            present = again
            if ablated.stages:
                present = again & reached(self.graph, mask, embedding, coupled=self.coupled)
            now = Changes.between(recording, recording.clean.senders, ablated.senders)
            for pool in (now.everywhere, now.at_read):
                pool[1:] = 0
            logits, own = run_masked(recording, ablated, mask[None], now, present)
            now.take(own, present)
            self.states.append(_State(recording, now))
            ends = experiment.ends(recording.reference)
            values += torch.cat([ends, experiment.values(logits, recording.reference)]).sum(1).cpu()
        clean, corrupt, self.value = experiment.mean(experiment.ranks.sum([values])).tolist()
        self.ends = {"clean": clean, "corrupt": corrupt}

    def decide(self, receiver: int, senders: list[int], threshold: float) -> None:
        """Take the edges into a receiver out of the mask, in the order of the senders, where that costs too little."""
        graph, mask = self.graph, self.mask
        behind = moved_by(graph, receiver, self.coupled)
        again = graph.members(behind)
        if behind:
            again = reached(graph, mask, again, coupled=self.coupled) & needed(graph, mask, coupled=self.coupled)
        limit = min(state.recording.copies(senders=1 + int(again.sum())) for state in self.states)
        limit = self.experiment.ranks.least(limit)
        while senders:
            part = senders[: min(self.guess, limit)]
            masks = mask[None].repeat(len(part), 1, 1)
            for j, s in enumerate(part):
                masks[j:, s, receiver] = False
            values = torch.zeros(len(part), dtype=torch.float64, device="cpu")
            made = []
            for state in self.states:
                recording = state.recording
                logits, own = run_masked(recording, recording.ablated, masks, state.now, again)
                values += self.experiment.values(logits, recording.reference).sum(1).cpu()
                made.append(own)
            self.launches += 1
            self.evaluated += len(part)
            removed = 0
            for value in self.experiment.mean(self.experiment.ranks.sum([values])).tolist():
                if not self.value - value < threshold:
                    break
                self.value = value
                removed += 1
            if removed:
                mask[part[:removed], receiver] = False
                for state, own in zip(self.states, made, strict=True):
                    state.now.take(own, again, removed - 1)
            stayed = removed < len(part)
            self.guess = max(1, removed) if stayed else 2 * self.guess
            self.decided += removed + stayed
            senders = senders[removed + stayed :]
