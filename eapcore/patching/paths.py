"""Patching along chosen paths, and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eapcore.execution.ablation import Ablation
from eapcore.execution.distributed import reported
from eapcore.execution.experiment import Experiment, Task, digest
from eapcore.execution.progress import Progress
from eapcore.execution.resume import Resume
from eapcore.graph.circuit import Circuit
from eapcore.graph.files import write_json
from eapcore.graph.graph import Graph
from eapcore.graph.paths import needed, reached
from eapcore.graph.scores import sign_text
from eapcore.graph.show import short
from eapcore.models.model import Model
from eapcore.models.torch_modes import own_modes
from eapcore.patching.masked import Changes, run_masked
from eapcore.patching.record import Recording
from eapcore.patching.summed import summed
from eapcore.tasks.metrics import Metric
from eapcore.tasks.pairs import PromptPairs


def routes(
    graph: Graph, senders: Sequence[str], receivers: Sequence[str], *, through: Sequence[str] = (), onward: bool = True
) -> Circuit:
    """The edges of path patching from some senders to some receivers.

    Args:
        graph: the model's.
        senders: where the paths start.
        receivers: where they lead, e.g. `a9.h9<q>`: q, k and v apart.
        through: components that a path may pass on its way to a receiver, e.g. all MLPs; none are direct paths only.
        onward: let everything behind the receivers follow, by all edges; False leaves the paths' last step to the
            caller.

    Raises:
        ValueError: an unknown name.

    Source: Wang et al. 2022, section 3.1.
    """
    chosen, passed = [graph.sender(name) for name in senders], {graph.sender(name) for name in through}
    ends = [graph.receiver(name) for name in receivers]
    edges, mask = graph.edge_mask(), torch.zeros_like(graph.edge_mask())
    behind = [set(graph.senders_behind(r)) for r in range(graph.n_receivers)]
    inner = [r for r, senders_behind in enumerate(behind) if senders_behind & passed]
    sources = sorted({*chosen, *passed})
    for r in {*inner, *ends}:
        mask[sources, r] = edges[sources, r]
    if onward:
        follow = reached(graph, edges, graph.members({s for r in ends for s in behind[r]}))
        mask[follow] |= edges[follow]
    return Circuit(mask, graph, {"senders": list(senders), "receivers": list(receivers), "through": list(through)})


def _path_edges(graph: Graph, paths: Sequence[str]) -> Circuit:
    """The edges of paths such as `a0.h1->a1.h0<q>->logits`."""
    mask = torch.zeros(graph.n_senders, graph.n_receivers, dtype=torch.bool, device="cpu")
    for path in paths:
        sender, *receivers = path.split("->")
        if not receivers:
            raise ValueError(f"a path is written sender->receiver->…, e.g. 'a0.h1->a1.h0<q>->logits', got {path!r}")
        for receiver in receivers:
            mask[graph.edge(f"{sender}->{receiver}")] = True
            sender = receiver.split("<")[0]
    return Circuit(mask, graph, {"paths": list(paths)})


@dataclass(frozen=True, slots=True)
class PathEffect:
    """What patching along paths does: the metric's mean on the clean, corrupt and patched runs; effect = patched −
    clean."""

    __repr__ = short

    senders: list[str]
    edges: Circuit
    effect: float
    clean: float
    corrupt: float
    patched: float
    meta: Mapping[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        write_json(path, "path-effect", self)


@reported
@own_modes
@torch.no_grad()
def path_patch(
    model: Model,
    task: Task,
    metric: str | Metric,
    senders: Sequence[str],
    paths: Circuit | Sequence[str],
    *,
    ablation: str | Ablation = "corrupt",
    reference: PromptPairs | None = None,
    batch_size: int | str = "auto",
    progress: Progress | None = None,
    resume: str | Path | None = None,
    distributed: bool = False,
) -> PathEffect:
    """Replace what some senders send along chosen paths, and nowhere else, and measure the metric.

    The senders send e_corrupt along the edges of the paths. A component that reads some of it is run again, and sends
    the result along the paths' edges alone; on every other edge everything is clean. q, k and v are apart.

    Args:
        model, task, metric, ablation, reference, batch_size: as `patch_edges`.
        senders: where the change starts; they send e_corrupt whatever reaches them.
        paths: written as `a0.h1->a1.h0<q>->logits`, or a circuit of edges, e.g. from `routes`. Several paths are the
            union of their edges, so what arrives at a component by any of them leaves it by all of them.
        progress: called with (pairs done, pairs in all) after every batch.
        resume: a folder for what is done so far, batch by batch, as `patch_edges`.
        distributed: share the pairs among the processes of this run, as `attribute`.

    Returns:
        PathEffect. A direct effect on the logits is that of the path `a0.h1->logits`.

    Raises:
        ValueError: an unknown name; no path from a sender to the logits; as `patch_edges`.

    Source: Wang et al. 2022, section 3.1; Goldowsky-Dill et al. 2023.
    """
    experiment = Experiment.of(model, task, metric, ablation, reference, distributed)
    graph = model.graph
    if isinstance(paths, str):
        raise ValueError(f"paths must be a list of paths or a circuit, got the text {paths!r}")
    edges = paths if isinstance(paths, Circuit) else _path_edges(graph, paths)
    if edges.graph != graph:
        raise ValueError(f"the paths must belong to {graph}, got some of {edges.graph}")
    origins = graph.members(graph.sender(name) for name in senders)
    coupled = model.config.heads_coupled
    useful = needed(graph, edges.mask, coupled=coupled)
    if not bool((useful & origins).any()):
        raise ValueError(f"no path leads from {', '.join(senders) or 'no sender'} to the logits: end the paths there")
    again = reached(graph, edges.mask, origins, coupled=coupled) & useful & ~origins
    weights = edges.mask & (origins | again)[:, None]
    what = {"paths": digest(edges.mask, origins)}
    kept = Resume(resume, "path", lambda: what | experiment.identity(), experiment.ranks, experiment.ranks.size)

    def measure(recording: Recording, ends: Tensor) -> Tensor:
        fixed = Changes.between(recording, recording.ablated.senders, recording.clean.senders)
        logits, _ = run_masked(recording, recording.clean, weights[None], fixed, again)
        return torch.cat([ends, experiment.values(logits, recording.reference)]).sum(1)

    total = summed(experiment, (3,), measure, kept, batch_size, progress)
    clean, corrupt, patched = experiment.mean(total).tolist()
    method = {"name": "path-patch", "ablation": dict(experiment.ablation.meta), **edges.meta}
    sign = sign_text("effect", "measured", "what the senders send along the paths alone is ablated")
    meta = {**experiment.describe(), "sign": sign, "method": method}
    return PathEffect(list(senders), edges, patched - clean, clean, corrupt, patched, meta)
