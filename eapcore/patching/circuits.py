"""Circuits, each run with every edge outside it ablated."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor

from eapcore.execution.ablation import Ablation
from eapcore.execution.distributed import reported
from eapcore.execution.experiment import Experiment, digest
from eapcore.execution.progress import Count, Progress
from eapcore.execution.resume import Resume, check_metric
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
        circuit.check(graph)
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


@reported
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
    distributed: bool = False,
) -> list[float]:
    """Mean of a metric over the pairs for each circuit: the full one is the clean run, the empty one the ablated run.

    progress: called with (runs done, runs in all), one for each circuit and pair. distributed: share the pairs among
    the processes of this run, as `attribute`.

    Raises:
        ValueError: as `run_circuit`; a metric that does not fit the task, or is NaN or infinite on a run.
    """
    experiment = Experiment.of(model, task, metric, ablation, reference, distributed)
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
    return experiment.mean(each_pair(experiment, circuits, recordings, progress=progress).sum(1)).tolist()


@own_modes
def each_pair(
    experiment: Experiment,
    circuits: Sequence[Circuit],
    recordings: Iterable[Recording],
    *,
    progress: Progress | None = None,
    resume: str | Path | None = None,
) -> Annotated[Tensor, "float64 C N"]:
    """The metric of each pair for each circuit, float64 [C, N] on the CPU; see `metric_on`.

    resume: a folder that keeps what is measured, batch by batch; where it exists for the same circuits, pairs, metric
    and batches, the work goes on from there, in as many processes, or in any number once all is measured.
    """
    ranks, total, count = experiment.ranks, len(circuits) * len(experiment), len(experiment)
    shown = ranks.watched(progress)
    masks = digest(*(circuit.mask for circuit in circuits))
    kept = Resume(resume, "circuits", lambda: {"set of circuits": masks, **experiment.identity()}, ranks, ranks.size)
    cut = "" if resume is None else str(ranks.gather([len(group) for group in getattr(recordings, "groups", ())]))
    rows: dict[int, Tensor] = {}  # of each lane the metric on the clean and corrupt runs, and on the circuits
    done: dict[int, Tensor] = {}  # which of its pairs have them
    for lane in kept.mine:
        found = kept.found.pop(lane, {})
        rows[lane] = found.get("values", torch.zeros(2 + len(circuits), count, dtype=torch.float64, device="cpu"))
        done[lane] = found.get("done", torch.zeros(count, dtype=torch.bool, device="cpu"))
    measured = sum(ranks.gather(sum(int(each.sum()) for each in done.values())))
    if kept.lanes != ranks.size and measured < count:
        raise ValueError(
            f"{kept.path} was begun by {kept.lanes} processes, and circuits go on in as many, not in {ranks.size}: "
            "start as many, or choose another resume folder"
        )
    if measured < count and kept.settle("pairs in each batch", None, lambda: cut) != cut:
        raise ValueError(f"{kept.path} was begun with other batches: give their size, or choose another resume folder")
    counted = Count(shown, total, len(circuits) * sum(int(each.sum()) for each in done.values()))
    if counted.done:
        counted.add(0)
    if kept.lanes == ranks.size:
        note = {"pairs in each batch": cut}
        _measure(experiment, circuits, recordings, kept, note, rows[ranks.rank], done[ranks.rank], counted)
    nothing = torch.zeros(2 + len(circuits), count, dtype=torch.float64, device="cpu")
    values = ranks.sum(list(rows.values()) or [nothing], kept.lanes)
    for recording in islice(recordings, int(kept.lanes != ranks.size)):
        _check_metric(kept, experiment, recording, values)
    return values[2:]


def _check_metric(kept: Resume, experiment: Experiment, recording: Recording, values: Tensor) -> None:
    """A metric of one's own is known by its values alone: those of a batch are to be what they were."""
    index, now = recording.reference.index.cpu(), experiment.ends(recording.reference).cpu()
    check_metric(kept, experiment.metric_name, values[:2, index], now, experiment.model.dtype)


def _measure(
    experiment: Experiment,
    circuits: Sequence[Circuit],
    recordings: Iterable[Recording],
    kept: Resume,
    note: Mapping[str, str],
    values: Tensor,
    done: Tensor,
    count: Count,
) -> None:
    """Fill in this process's pairs that are not done."""

    def save() -> None:
        kept.write(experiment.ranks.rank, note, {"values": values, "done": done})

    known = bool(done.any())
    if not known:
        save()  # a folder that cannot be written to is refused before the work
    whole = True
    try:
        for recording in recordings:
            index = recording.reference.index.cpu()
            if bool(done[index].all()):
                if known:
                    _check_metric(kept, experiment, recording, values)
                known = False
                if int(done.sum()) == sum(map(len, getattr(recordings, "groups", ()))):  # there are no others
                    return
                continue
            ends = experiment.ends(recording.reference).cpu()
            logits = circuit_logits(recording, circuits, count)
            of_circuits = experiment.values(logits, recording.reference).cpu()
            whole = False
            values[:2, index], values[2:, index], done[index] = ends, of_circuits, True
            whole = True
            if kept.due:
                save()
    finally:
        if whole:
            save()


def kept_without(
    values: Annotated[Tensor, "float64 C N"],
    clean: Annotated[Tensor, "float64 N"],
    ablated: Annotated[Tensor, "float64 N"],
) -> Annotated[Tensor, "float64 C N"] | None:
    """Each circuit's faithfulness without each of the pairs, [C, N], of which `confidence.interval` makes its interval.

        f_i = (mean(values) − mean(ablated)) / (mean(clean) − mean(ablated)),  means over the N − 1 pairs but i

    Args:
        values: the metric of each pair for each circuit; clean, ablated: on the whole model and with all ablated.

    Returns:
        None with fewer than 2 pairs, or where clean and ablated are the same without one of them.
    """
    n = len(clean)
    if n < 2:
        return None
    rows = torch.cat([clean[None], ablated[None], values])
    means = (rows.sum(1, keepdim=True) - rows) / (n - 1)
    scale = means[0] - means[1]
    return (means[2:] - means[1]) / scale if bool(scale.all()) else None
