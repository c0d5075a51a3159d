"""Activation patching: what each sender sends, replaced for all that reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from eapcore.execution.experiment import Task
from eapcore.execution.progress import Count, Progress
from eapcore.graph.files import write_json
from eapcore.graph.scores import sign_text
from eapcore.models.model import Model
from eapcore.models.torch_modes import own_modes
from eapcore.patching.masked import at_read
from eapcore.patching.one_receiver import finish, through_mlp
from eapcore.patching.record import Batch, Question
from eapcore.tasks import PromptPairs
from eapcore.tasks.metrics import Metric


@dataclass(frozen=True, slots=True)
class NodeEffects:
    """What patching each sender does to the metric, for all that reads it: effects [S'] or, by position, [S', T]."""

    nodes: list[str]
    effects: Annotated[Tensor, "S' | S' T"]
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, node: str) -> Annotated[Tensor, "() | T"]:
        return self.effects[self.nodes.index(node)]

    def save(self, path: str | Path) -> None:
        write_json(path, "node-effects", self)


@own_modes
@torch.no_grad()
def patch_nodes(
    model: Model,
    task: Task,
    metric: str | Metric = "logit_diff",
    nodes: Sequence[str] | None = None,
    *,
    per_position: bool = False,
    ablation: str = "corrupt",
    reference: PromptPairs | None = None,
    batch_size: int | str = "auto",
    progress: Progress | None = None,
) -> NodeEffects:
    """Activation patching: replace what a node sends, to everything that reads it, and measure the metric.

        effect[s] = mean over pairs of metric(run where s sends e_corrupt[s]) − metric(clean)
        effect[s, t]: where it does so at position t alone; a pair without this position counts with 0

    Args:
        model, task, metric, ablation, reference, batch_size: as `patch_edges`.
        nodes: names of senders; None is all.
        per_position: patch each position on its own.
        progress: called with (effects measured, effects in all), one for each node and pair.

    Raises:
        ValueError: an unknown node, or as `patch_edges`.
    """
    question = Question.of(model, task, metric, ablation, reference)
    graph, pairs = model.graph, question.pairs
    names = graph.sender_names if nodes is None else list(nodes)
    senders = [graph.sender(name) for name in names]
    longest = int(pairs.positions.max()) + 1
    sums = torch.zeros(len(names), longest if per_position else 1, dtype=torch.float64, device="cpu")
    count = Count(progress, len(senders) * len(pairs))
    for batch in question.batches(question.batch_size(batch_size)):
        clean = question.ends(batch)[0]
        tokens = batch.shape[1]
        for row, sender in enumerate(senders):
            delta = (batch.other.senders[sender] - batch.clean.senders[sender])[None]
            if per_position:
                delta = delta * torch.eye(tokens, dtype=delta.dtype, device=delta.device)[:, None, :, None]
            for part in torch.arange(len(delta), device="cpu").split(batch.copies(model)):
                change = (question.values(_send_more(model, batch, sender, delta[part]), batch) - clean).sum(1).cpu()
                sums[row, part + (batch.start if per_position else 0)] += change
            count.add(len(batch.pairs))
    effects = question.mean(sums)
    method = {"name": "patch-nodes", "per_position": per_position, "ablation": question.ablation}
    where = " at the position alone" if per_position else ""
    sign = sign_text("effect", "measured", f"all that the node sends{where} is ablated")
    meta = {**question.describe(), "sign": sign, "method": method}
    return NodeEffects(names, effects if per_position else effects[:, 0], meta)


def _send_more(model: Model, batch: Batch, sender: int, added: Tensor) -> Tensor:
    """Logits [C, B, V] where a sender sends `added` [C, B, T, D] more to all that reads it."""
    graph, last = model.graph, model.config.n_layers - 1
    if sender == 0:
        return finish(model, batch, 0, (batch.clean.attn_in[0] + added).flatten(0, 1))
    index, place = divmod(sender - 1, graph.senders_per_layer)
    head = place < graph.n_heads
    behind = batch.clean.out if index == last else batch.clean.attn_in[index + 1]
    stream = batch.clean.mlp_in[index] if head else behind
    changed = (stream + added).flatten(0, 1)
    if index == last:
        changed = at_read(changed, batch.read.repeat(len(added), 1))
    return finish(model, batch, index + 1, through_mlp(model, index, changed) if head else changed)
