"""Edges inside components, which published circuits count too: their scores, to first order or exact.

Of a head three lead from what its q, k and v read to their projections, and three on to what it sends; of an MLP one
leads from what it reads to what it sends. None of them is an edge of the graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from eapcore.attribution.score_batch import metric_grad
from eapcore.execution.experiment import Experiment
from eapcore.execution.progress import Count, Progress
from eapcore.graph.circuit import Circuit
from eapcore.graph.graph import Graph
from eapcore.graph.scores import EdgeScores
from eapcore.models.attention import Channels
from eapcore.models.backward import Sink, backward
from eapcore.models.backward_rules import GRADIENT
from eapcore.models.forward import unembed
from eapcore.models.torch_modes import own_modes
from eapcore.patching.circuits import each_pair
from eapcore.patching.nodes import patch_nodes
from eapcore.patching.record import Recording, record
from eapcore.tasks.truth import Truth

WITH_INSIDE = "with those inside components"


@dataclass(frozen=True, slots=True)
class Inside:
    """Scores of the edges inside a graph's components, by our sign.

    inputs: of the edge from what a q, k or v receiver reads to its projection, 0 for other receivers. sent: of all that
    a sender sends; those on from a head's q, k and v, and through an MLP, have this score.
    """

    graph: Graph
    inputs: Annotated[Tensor, "R"]
    sent: Annotated[Tensor, "S"]

    def tied(self, scores: EdgeScores, *, exact: bool = False) -> Inside:
        """The same, where it is an edge's score by definition with that very number, so that rounding breaks no tie.

        So is what a sender with one receiver sends, and if scores are exact effects, the input of a projection with one
        sender; to first order that differs by the norm in between.
        """
        values, edges = scores.scores.double(), self.graph.edge_mask()
        sent = torch.where(edges.sum(1) == 1, values.sum(1), self.sent)
        inputs = self.inputs.clone()
        for r in _channels(self.graph) if exact else ():
            if int(edges[:, r].sum()) == 1:
                inputs[r] = values[:, r].sum()
        return Inside(self.graph, inputs, sent)

    def against(self, truth: Truth) -> tuple[Annotated[Tensor, "E'"], Annotated[Tensor, "bool E'"]]:
        """The scores of all of them, and which are true: 6 for each head and one for each MLP.

        Raises:
            ValueError: a truth of another graph.
        """
        graph = self.graph
        if truth.circuit.graph != graph:
            raise ValueError(f"the published circuit is one of {truth.circuit.graph}, but the scores are of {graph}")
        inputs, results, names = set(truth.inputs), set(truth.results), graph.receiver_names
        rows = [(float(self.inputs[r]), names[r] in inputs) for r in _channels(graph)]
        for r in range(graph.logits):
            rows += [(float(self.sent[s]), names[r] in results) for s in graph.senders_behind(r)]
        values, true = zip(*rows, strict=True)
        return torch.tensor(values, dtype=torch.float64, device="cpu"), torch.tensor(true, device="cpu")


def _channels(graph: Graph) -> list[int]:
    """All q, k and v receivers."""
    layers = [graph.qkv(layer) for layer in range(graph.n_layers)]
    return [r for layer in layers for r in range(layer.start, layer.stop)]


@own_modes
@torch.no_grad()
def inside_scores(
    experiment: Experiment, *, batch_size: int | str = "auto", progress: Progress | None = None
) -> Inside:
    """First-order scores of the edges inside components, with the gradient at the clean run.

        inputs[r] = mean over pairs of Σ_t ⟨a_corrupt[r, t] − a_clean[r, t], ∂metric/∂a[r, t]⟩
        sent[s]   = mean over pairs of Σ_t ⟨e_corrupt[s, t] − e_clean[s, t], ∂metric/∂e[s, t]⟩

    a[r] is the projection of what r reads, before any norm or rotation of it.

    Raises:
        ValueError: an ablation that is no run of corrupt prompts, whose projections are not known.

    Source: the code of Syed, Rager, Conmy 2023, where an edge into a q, k or v, or into what a head sends, has the
    difference of its receiver.
    """
    if not experiment.shared:
        raise ValueError(
            f"edges inside components need the corrupt prompts' run, but the ablation is {experiment.ablation.name}"
        )
    graph = experiment.model.graph
    inputs = torch.zeros(graph.n_receivers, dtype=torch.float64, device="cpu")
    sent = torch.zeros(graph.n_senders, dtype=torch.float64, device="cpu")
    count = Count(experiment.ranks.watched(progress), len(experiment))
    for recording in record(experiment, batch_size):
        sink = _Inside(recording, inputs, sent)
        clean, read = recording.clean, recording.read
        last = recording.at_read(clean.streams[-1])[:, 0]
        logits, norm_in = unembed(experiment.model, last, recording.tokens)
        grad = metric_grad(
            experiment.model, logits, norm_in, experiment.metric, recording.reference, GRADIENT, tokens=recording.tokens
        )[1]
        everywhere = torch.zeros_like(clean.streams[-1]).scatter_(
            1, read[..., None].expand(-1, -1, grad.shape[-1]), grad[:, None]
        )
        saved = [run.saved for run in clean.stages]
        backward(experiment.model, saved, everywhere, sink, past=recording.past)
        count.add(len(recording.batch.pairs))
    both = experiment.ranks.sum([torch.cat([inputs, sent])]) / len(experiment)
    return Inside(graph, both[: len(inputs)], both[len(inputs) :])


class _Inside(Sink):
    """Meets the gradients of projections, and behind senders, with what the corrupt prompts change there."""

    def __init__(self, recording: Recording, inputs: Tensor, sent: Tensor) -> None:
        self.recording, self.inputs, self.sent = recording, inputs, sent
        self.other = {run.stage.index: run.saved.attention for run in recording.ablated.stages if run.attention}

    def behind(self, name: str, senders: slice, grad: Tensor, at_read: bool) -> None:
        clean, corrupt = (run.senders[senders] for run in (self.recording.clean, self.recording.ablated))
        self.sent[senders] += ((corrupt - clean).double() * grad.double()).sum((1, 2, 3)).cpu()

    def channels(self, part: Channels) -> Tensor:
        other, own = self.other[part.index], part.saved
        assert other is not None
        moved = torch.cat([other.q - own.q, part.attention.of_each(other.kv - own.kv)], 2)[:, :, part.channels]
        self.inputs[part.receivers] += (moved.double() * part.g.double()).sum((0, 1, 3)).cpu()
        return part.total()


def summed_inside(scores: EdgeScores) -> Inside:
    """What edges' scores alone say of the edges inside components: the sum of those into a receiver and, exactly so to
    first order, of those from a sender.

    The sum into q, k or v is the projection's score with its norm linear: where no model is there to ask.
    """
    graph, values = scores.graph, scores.scores.double()
    inputs = torch.zeros(graph.n_receivers, dtype=torch.float64, device="cpu")
    inputs[_channels(graph)] = values.sum(0)[_channels(graph)]
    return Inside(graph, inputs, values.sum(1))


def inside_effects(
    experiment: Experiment, *, batch_size: int | str = "auto", progress: Progress | None = None
) -> Inside:
    """Exact effects in place of the scores: one projection at a time corrupt, and all that one sender sends.

    A projection is corrupt where all edges into its receiver are, so that every one is a circuit that is run.
    """
    graph = experiment.model.graph
    channels, full = _channels(graph), graph.edge_mask()
    circuits = [Circuit(full, graph)]
    for r in channels:
        mask = full.clone()
        mask[:, r] = False
        circuits.append(Circuit(mask, graph))
    total = (len(circuits) + graph.n_senders) * len(experiment)
    count = Count(progress, total)
    values = each_pair(
        experiment, circuits, record(experiment, batch_size), progress=count.stage(len(circuits) * len(experiment))
    )
    means = experiment.mean(values.sum(1))
    inputs = torch.zeros(graph.n_receivers, dtype=torch.float64, device="cpu")
    inputs[channels] = means[1:] - means[0]
    options: dict[str, Any] = {"ablation": experiment.ablation, "batch_size": batch_size}
    options["distributed"] = experiment.ranks.distributed
    stage = count.stage(graph.n_senders * len(experiment))
    found = patch_nodes(experiment.model, experiment.pairs, experiment.metric, progress=stage, **options)
    return Inside(graph, inputs, found.effects.double())
