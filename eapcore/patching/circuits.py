"""Circuits, each run with every edge outside it ablated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from eapcore.execution.ablation import ablated_senders
from eapcore.execution.experiment import check_pairs
from eapcore.execution.progress import Count, Progress
from eapcore.graph.circuit import Circuit
from eapcore.graph.paths import needed, reached
from eapcore.models.model import Model
from eapcore.models.torch_modes import own_modes
from eapcore.patching.masked import Changes, run_masked
from eapcore.patching.record import Batch, Question, make_batch
from eapcore.tasks import PromptPairs
from eapcore.tasks.metrics import Metric


@own_modes
def run_circuit(
    model: Model,
    batch: PromptPairs,
    circuit: Circuit | Sequence[Circuit],
    *,
    ablation: str = "corrupt",
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
            their positions, or "mean-positional" over its prompts for each position.
        reference: the prompts of a mean; None is the task's own.

    Returns:
        float64 [B, V], for several circuits [C, B, V].

    Raises:
        ValueError: a circuit belongs to another graph; the prompts do not fit the model; an unknown ablation.
    """
    circuits = list(circuit) if isinstance(circuit, Sequence) else [circuit]
    check_pairs(model, batch, ablation)
    other, _ = ablated_senders(model, batch, ablation, reference)
    logits = circuit_logits(model, make_batch(model, batch, torch.arange(len(batch), device="cpu"), other), circuits)
    return logits[0] if isinstance(circuit, Circuit) else logits


@torch.no_grad()
def circuit_logits(
    model: Model, batch: Batch, circuits: Sequence[Circuit], count: Count | None = None
) -> Annotated[Tensor, "float64 C B V | C B V'"]:
    """The batch's logits, float64 [C, B, V] or [C, B, n], for several circuits; see `run_circuit`.

    count: of circuits × pairs.
    """
    graph = model.graph
    if not circuits:
        raise ValueError("at least one circuit is needed")
    for circuit in circuits:
        if not isinstance(circuit, Circuit):
            raise ValueError(f"a circuit must be a Circuit, e.g. scores.top_n(100), got {type(circuit).__name__}")
        if circuit.graph != graph:
            raise ValueError(f"the circuit must belong to {graph}, got one of {circuit.graph}")
    masks = torch.stack([circuit.mask for circuit in circuits])
    embedding = torch.zeros(graph.n_senders, dtype=torch.bool, device="cpu")
    embedding[0] = True
    union = masks.any(0)
    again = needed(graph, union) & ~embedding
    if batch.other.layers:  # a run: what nothing new reaches sends what it sends there, which is no change
        again &= reached(graph, union, embedding)
    masks = masks & (embedding | again)[:, None]
    fixed = Changes.between(model, batch, batch.clean.senders, batch.other.senders)
    logits = []
    for part in masks.split(batch.copies(model, senders=1 + int(again.sum()))):
        logits.append(run_masked(model, batch, batch.other, part, fixed, again)[0])
        if count is not None:
            count.add(len(part) * len(batch.pairs))
    return torch.cat(logits)


@own_modes
def metric_on(
    model: Model,
    task: PromptPairs,
    metric: str | Metric,
    circuits: Sequence[Circuit],
    *,
    ablation: str = "corrupt",
    reference: PromptPairs | None = None,
    batch_size: int | str = "auto",
    progress: Progress | None = None,
) -> list[float]:
    """Mean of a metric over the pairs for each circuit: the full one is the clean run, the empty one the ablated run.

    progress: called with (runs done, runs in all), one for each circuit and pair.

    Raises:
        ValueError: as `run_circuit`; a metric that does not fit the task, or is NaN or infinite on a run.
    """
    question = Question.of(model, task, metric, ablation, reference)
    sums = torch.zeros(len(circuits), dtype=torch.float64, device="cpu")
    count = Count(progress, len(circuits) * len(question.pairs))
    for batch in question.batches(question.batch_size(batch_size)):
        question.ends(batch)
        sums += question.values(circuit_logits(model, batch, circuits, count), batch).sum(1).cpu()
    return question.mean(sums).tolist()
