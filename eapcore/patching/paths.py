"""Patching along chosen paths, and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

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
from eapcore.graph.paths import moved_by, needed, reached
from eapcore.graph.scores import sign_text
from eapcore.graph.show import short
from eapcore.models.model import Model
from eapcore.models.torch_modes import own_modes
from eapcore.patching.masked import Changes, run_masked
from eapcore.patching.record import Recording
from eapcore.patching.summed import summed
from eapcore.tasks.metrics import Metric
from eapcore.tasks.pairs import PromptPairs


@dataclass(frozen=True, slots=True)
class Routes:
    """Path patching from some senders to some receivers.

    edges: by which what the senders send arrives there. receivers: their indices; what they then read is patched, and
    everything behind them follows.
    """

    edges: Circuit
    receivers: tuple[int, ...]

    def onward(self, coupled: bool = False) -> tuple[Annotated[Tensor, "bool S"], Annotated[Tensor, "bool S R"]]:
        """The senders that follow, and the edges by which: all from them but those into the receivers, whose inputs are
        patched; coupled: see `graph.paths.moved_by`."""
        graph, every = self.edges.graph, self.edges.graph.edge_mask()
        behind = graph.members({s for r in self.receivers for s in moved_by(graph, r, coupled)})
        follow = reached(graph, every, behind, coupled=coupled)
        every[~follow] = False
        every[:, list(self.receivers)] = False
        return follow, every


def routes(graph: Graph, senders: Sequence[str], receivers: Sequence[str], *, through: Sequence[str] = ()) -> Routes:
    """The edges of path patching from some senders to some receivers.

    What a receiver reads is what it would read if the senders sent e_corrupt to it, and to the components that a path
    may pass, which alone are run again; every other component sends what it sends on the clean prompts. With all
    receivers' inputs so patched, the clean prompts run once more, and everything behind the receivers follows, the
    senders and what a path may pass among it.

    Args:
        graph: the model's.
        senders: where the paths start.
        receivers: where they lead, e.g. `a9.h9<q>`: q, k and v apart.
        through: components that a path may pass on its way to a receiver, e.g. all MLPs; none are direct paths only.

    Raises:
        ValueError: an unknown name.

    Source: Wang et al. 2022, section 3.1 and appendix B.
    """
    chosen, passed = [graph.sender(name) for name in senders], {graph.sender(name) for name in through}
    ends = [graph.receiver(name) for name in receivers]
    edges, mask = graph.edge_mask(), torch.zeros_like(graph.edge_mask())
    inner = [r for r in range(graph.n_receivers) if passed.intersection(graph.senders_behind(r))]
    sources = sorted({*chosen, *passed})
    for r in {*inner, *ends}:
        mask[sources, r] = edges[sources, r]
    meta = {"senders": list(senders), "receivers": list(receivers), "through": list(through)}
    return Routes(Circuit(mask, graph, meta), tuple(dict.fromkeys(ends)))


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
    paths: Circuit | Routes | Sequence[str],
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
        paths: written as `a0.h1->a1.h0<q>->logits`, or a circuit of edges. Several paths are the union of their edges,
            so what arrives at a component by any of them leaves it by all of them. Or what `routes` says.
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
    onward = paths if isinstance(paths, Routes) else None
    if isinstance(paths, Routes):
        edges = paths.edges
    else:
        edges = paths if isinstance(paths, Circuit) else _path_edges(graph, paths)
    if edges.graph != graph:
        raise ValueError(f"the paths must belong to {graph}, got some of {edges.graph}")
    origins = graph.members(graph.sender(name) for name in senders)
    coupled = model.config.heads_coupled
    again = reached(graph, edges.mask, origins, coupled=coupled) & ~origins
    follow, behind = (
        (torch.zeros_like(origins), torch.zeros_like(edges.mask)) if onward is None else onward.onward(coupled)
    )
    if onward is None:
        useful = needed(graph, edges.mask, coupled=coupled)
        again &= useful
        leads, where = bool((useful & origins).any()), "the logits: end the paths there"
    else:
        again &= edges.mask.any(1)
        at_ends = edges.mask[:, list(onward.receivers)] & (origins | again)[:, None]
        leads, where = bool(at_ends.any()), f"{', '.join(edges.meta['receivers'])}"
    if not leads:
        raise ValueError(f"no path leads from {', '.join(senders) or 'no sender'} to {where}")
    weights = edges.mask & (origins | again)[:, None]
    what = {"paths": digest(edges.mask, origins, follow, behind)}
    kept = Resume(resume, "path", lambda: what | experiment.identity(), experiment.ranks, experiment.ranks.size)

    def measure(recording: Recording, ends: Tensor) -> Tensor:
        changes = Changes.between(recording, recording.ablated.senders, recording.clean.senders)
        logits, own = run_masked(recording, recording.clean, weights[None], changes, again)
        if onward is not None:
            changes.take(own, again)
            patched = torch.zeros_like(weights)
            patched[:, list(onward.receivers)] = weights[:, list(onward.receivers)]
            logits, _ = run_masked(recording, recording.clean, behind[None], changes, follow, patched)
        return torch.cat([ends, experiment.values(logits, recording.reference)]).sum(1)

    total = summed(experiment, (3,), measure, kept, batch_size, progress)
    clean, corrupt, patched = experiment.mean(total).tolist()
    method = {"name": "path-patch", "ablation": dict(experiment.ablation.meta), **edges.meta}
    sign = sign_text("effect", "measured", "what the senders send along the paths alone is ablated")
    meta = {**experiment.describe(), "sign": sign, "method": method}
    edges = replace(edges, mask=edges.mask | behind)
    return PathEffect(list(senders), edges, patched - clean, clean, corrupt, patched, meta)
