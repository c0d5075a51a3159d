"""Circuits, each run with every edge outside it ablated."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated

import torch
from torch import Tensor

from eapcore.execution.ablation import Ablation
from eapcore.execution.experiment import Experiment
from eapcore.execution.progress import Count, Progress
from eapcore.graph.circuit import Circuit
from eapcore.graph.paths import needed, reached
from eapcore.models.model import Model
from eapcore.models.torch_modes import own_modes
from eapcore.patching.masked import Changes, run_masked
from eapcore.patching.record import Recording, record
from eapcore.tasks.metrics import Metric
from eapcore.tasks.pairs import PromptPairs


@own_modes
def run_circuit(
    model: Model,
    batch: PromptPairs,
    circuit: Circuit | Sequence[Circuit],
    *,
    ablation: str | Ablation = "corrupt",
    reference: PromptPairs | None = None,
) -> Annotated[Tensor, "float64 B V | C B V"]:
    """Logits at the answer positions with every edge outside the circuit carrying the corrupt prompt's activation.

        v[r] = v_other[r] + Σ_{s in circuit} (e[s] − e_other[s])

    e[s] is what sender s makes of its own such input, and `other` the ablation: the corrupt run, zero, or a mean; then
    v_other[r] is the sum of what the senders before r send, plus the attention biases. The full circuit is the clean
    run, the empty one the ablated run. All receivers of a layer and all circuits run at once.

    Args:
        model: the model.
        batch: prompt pairs, all run in one batch.
        circuit: one, or several, of the same graph as the model.
        ablation: what edges outside the circuit carry: "corrupt", "zero", "mean" over the reference's clean prompts and
            their positions, or "mean-positional" over its prompts for each position; or an `Ablation` that was made
            before.
        reference: the prompts of a mean; None is the task's own.

    Returns:
        float64 [B, V], for several circuits [C, B, V].

    Raises:
        ValueError: a circuit belongs to another graph; the prompts do not fit the model; an unknown ablation.
    """
    circuits = list(circuit) if isinstance(circuit, Sequence) else [circuit]
    experiment = Experiment.of(model, batch, _all_logits, ablation, reference)
    logits = circuit_logits(Recording.of(experiment, range(len(batch))), circuits)
    return logits[0] if isinstance(circuit, Circuit) else logits


def _all_logits(logits: Tensor) -> Tensor:
    """A metric that reads all logits, for those who want them."""
    return logits.sum(-1)


@torch.no_grad()
def circuit_logits(
    recording: Recording, circuits: Sequence[Circuit], count: Count | None = None
) -> Annotated[Tensor, "float64 C B V | C B V'"]:
    """A batch's logits, float64 [C, B, V] or [C, B, n], for several circuits, see `run_circuit`; count: of circuits ×
    pairs."""
    graph = recording.model.graph
    if not circuits:
        raise ValueError("at least one circuit is needed")
    for circuit in circuits:
        if not isinstance(circuit, Circuit):
            raise ValueError(f"a circuit must be a Circuit, e.g. scores.top_n(100), got {type(circuit).__name__}")
        if circuit.graph != graph:
            raise ValueError(f"the circuit must belong to {graph}, got one of {circuit.graph}")
    masks = torch.stack([circuit.mask for circuit in circuits])
    embedding = graph.members([0])
    union = masks.any(0)
    coupled = recording.model.config.heads_coupled
    again = needed(graph, union, coupled=coupled) & ~embedding
    if recording.ablated.stages:  # a run: what nothing new reaches sends what it sends there, which is no change
        again &= reached(graph, union, embedding, coupled=coupled)
    masks = masks & (embedding | again)[:, None]
    fixed = Changes.between(recording, recording.clean.senders, recording.ablated.senders)
    logits = []
    for part in masks.split(recording.copies(senders=1 + int(again.sum()))):
        logits.append(run_masked(recording, recording.ablated, part, fixed, again)[0])
        if count is not None:
            count.add(len(part) * len(recording.batch.pairs))
    return torch.cat(logits)


@own_modes
def metric_on(
    model: Model,
    task: PromptPairs,
    metric: str | Metric,
    circuits: Sequence[Circuit],
    *,
    ablation: str | Ablation = "corrupt",
    reference: PromptPairs | None = None,
    batch_size: int | str = "auto",
    progress: Progress | None = None,
) -> list[float]:
    """Mean of a metric over the pairs for each circuit: the full one is the clean run, the empty one the ablated run.

    progress: called with (runs done, runs in all), one for each circuit and pair.

    Raises:
        ValueError: as `run_circuit`; a metric that does not fit the task, or is NaN or infinite on a run.
    """
    experiment = Experiment.of(model, task, metric, ablation, reference)
    return measure_circuits(experiment, circuits, record(experiment, batch_size), progress=progress)


@own_modes
def measure_circuits(
    experiment: Experiment,
    circuits: Sequence[Circuit],
    recordings: Iterable[Recording],
    *,
    progress: Progress | None = None,
) -> list[float]:
    """`metric_on` for an experiment whose batches are recorded."""
    sums = torch.zeros(len(circuits), dtype=torch.float64, device="cpu")
    count = Count(progress, len(circuits) * len(experiment))
    for recording in recordings:
        experiment.ends(recording.reference)
        logits = circuit_logits(recording, circuits, count)
        sums += experiment.values(logits, recording.reference).sum(1).cpu()
    return experiment.mean(sums).tolist()
