"""Activation patching: what each sender sends, replaced for all that reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from eapcore.execution.ablation import Ablation
from eapcore.execution.distributed import reported
from eapcore.execution.experiment import Experiment, Task
from eapcore.execution.progress import Progress
from eapcore.execution.resume import Resume
from eapcore.graph.files import write_json
from eapcore.graph.scores import sign_text
from eapcore.graph.show import short
from eapcore.models.model import Model
from eapcore.models.torch_modes import own_modes
from eapcore.patching.one_receiver import finish
from eapcore.patching.record import Recording
from eapcore.patching.summed import summed
from eapcore.tasks.metrics import Metric
from eapcore.tasks.pairs import PromptPairs


@dataclass(frozen=True, slots=True)
class NodeEffects:
    """What patching each sender does to the metric, for all that reads it: effects [S'] or, by position, [S', T]."""

    __repr__ = short

    nodes: list[str]
    effects: Annotated[Tensor, "S' | S' T"]
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, node: str) -> Annotated[Tensor, "() | T"]:
        return self.effects[self.nodes.index(node)]

    def save(self, path: str | Path) -> None:
        write_json(path, "node-effects", self)


@reported
@own_modes
@torch.no_grad()
def patch_nodes(
    model: Model,
    task: Task,
    metric: str | Metric = "logit_diff",
    nodes: Sequence[str] | None = None,
    *,
    per_position: bool = False,
    ablation: str | Ablation = "corrupt",
    reference: PromptPairs | None = None,
    batch_size: int | str = "auto",
    progress: Progress | None = None,
    resume: str | Path | None = None,
    distributed: bool = False,
) -> NodeEffects:
    """Activation patching: replace what a node sends, to everything that reads it, and measure the metric.

        effect[s] = mean over pairs of metric(run where s sends e_corrupt[s]) − metric(clean)
        effect[s, t]: where it does so at position t alone; a pair without this position counts with 0

    Args:
        model, task, metric, ablation, reference, batch_size: as `patch_edges`.
        nodes: names of senders; None is all.
        per_position: patch each position on its own.
        progress: called with (effects measured, effects in all), one for each node and pair.
        resume: a folder for what is done so far, batch by batch, as `patch_edges`.
        distributed: share the pairs among the processes of this run, as `attribute`.

    Raises:
        ValueError: an unknown node, or as `patch_edges`.
    """
    experiment = Experiment.of(model, task, metric, ablation, reference, distributed)
    graph, pairs = model.graph, experiment.pairs
    names = graph.sender_names if nodes is None else list(nodes)
    senders = [graph.sender(name) for name in names]
    shape = (len(names), int(pairs.positions.max()) + 1 if per_position else 1)
    what = {"nodes": names, "per position": per_position}
    kept = Resume(resume, "nodes", lambda: what | experiment.identity(), experiment.ranks, experiment.ranks.size)

    def measure(recording: Recording, ends: Tensor) -> Tensor:
        clean, batch = ends[0], recording.batch
        sums = torch.zeros(shape, dtype=torch.float64, device="cpu")
        for row, sender in enumerate(senders):
            delta = (recording.ablated.senders[sender] - recording.clean.senders[sender])[None]
            if per_position:
                each = torch.eye(batch.shape[1], dtype=delta.dtype, device=delta.device)
                delta = delta * each[:, None, :, None]
            for part in torch.arange(len(delta), device="cpu").split(recording.copies()):
                values = experiment.values(_send_more(recording, sender, delta[part]), recording.reference)
                sums[row, part + (batch.start if per_position else 0)] += (values - clean).sum(1).cpu()
        return sums

    total = summed(experiment, shape, measure, kept, batch_size, progress, len(senders))
    effects = experiment.mean(total)
    method = {"name": "patch-nodes", "per_position": per_position, "ablation": dict(experiment.ablation.meta)}
    where = " at the position alone" if per_position else ""
    sign = sign_text("effect", "measured", f"all that the node sends{where} is ablated")
    meta = {**experiment.describe(), "sign": sign, "method": method}
    return NodeEffects(names, effects if per_position else effects[:, 0], meta)


def _send_more(recording: Recording, sender: int, added: Tensor) -> Tensor:
    """Logits [C, B, V] where a sender sends `added` [C, B, T, D] more to all that reads it."""
    stages = recording.model.stages
    places = [
        (n, stage.last, place) for n, stage in enumerate(stages) for place in (stage.attention, stage.mlp) if place
    ]
    at = [(n + 1, last) for n, last, place in places if place.senders.start <= sender < place.senders.stop]
    number, last = at[0] if at else (0, False)  # `embed` enters the first stage
    return finish(recording, number, recording.at_read(recording.clean.streams[number] + added, last).flatten(0, 1))
