"""What a circuit lacks, and which of its edges it could do without."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from eapcore.execution.ablation import Ablation
from eapcore.execution.distributed import reported
from eapcore.execution.experiment import Experiment
from eapcore.execution.progress import Progress
from eapcore.graph.circuit import Circuit
from eapcore.graph.files import write_json
from eapcore.graph.graph import Graph
from eapcore.graph.scores import EdgeScores, sign_text
from eapcore.graph.show import short
from eapcore.models.model import Model
from eapcore.patching.circuits import measure_circuits
from eapcore.patching.record import Recording, record
from eapcore.tasks.metrics import Metric
from eapcore.tasks.pairs import PromptPairs

# Completeness and minimality


@dataclass(frozen=True, slots=True)
class Completeness:
    """The metric's mean without some edges K: [n] of the circuit, [n] of the whole model, and their gap in absolute
    value. A complete circuit has small gaps for every K."""

    __repr__ = short

    removed: list[str]
    circuit: list[float]
    model: list[float]
    gap: list[float]
    meta: Mapping[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        write_json(path, "completeness", self)


@reported
def completeness(
    model: Model,
    task: PromptPairs,
    metric: str | Metric,
    circuit: Circuit,
    *,
    n_random: int = 10,
    seed: int = 0,
    ablation: str | Ablation = "corrupt",
    reference: PromptPairs | None = None,
    batch_size: int | str = "auto",
    progress: Progress | None = None,
    distributed: bool = False,
) -> Completeness:
    """Take the same edges K out of the circuit and out of the whole model, and compare what is left.

        gap(K) = |m(circuit ∖ K) − m(model ∖ K)|

    K is nothing; for each component of the circuit all that it reads and sends; and random halves of the circuit's
    edges.

    Args:
        model, task, metric, ablation, reference, batch_size, progress, distributed: as `faithfulness`.
        circuit: of the model's graph, with at least one edge.
        n_random: how many random halves.
        seed: of their draw.

    Raises:
        ValueError: an empty circuit, or one of another graph.

    Source: Wang et al. 2022, section 4.1.
    """
    experiment = Experiment.of(model, task, metric, ablation, reference, distributed)
    recordings = record(experiment, batch_size)
    return measure_completeness(experiment, recordings, circuit, n_random=n_random, seed=seed, progress=progress)


def measure_completeness(
    experiment: Experiment,
    recordings: Iterable[Recording],
    circuit: Circuit,
    *,
    n_random: int = 10,
    seed: int = 0,
    progress: Progress | None = None,
) -> Completeness:
    """`completeness` for an experiment whose batches are recorded."""
    graph = experiment.model.graph
    _check_circuit(graph, circuit)
    full, mask = graph.edge_mask(), circuit.mask
    removed = {"nothing": torch.zeros_like(mask)}
    reads: dict[int, list[int]] = {}
    for r in range(graph.n_receivers):
        for component in graph.senders_behind(r):
            reads.setdefault(component, []).append(r)
    for component, receivers in reads.items():
        if bool(mask[:, receivers].any() | mask[component].any()):
            out = torch.zeros_like(mask)
            out[:, receivers] = out[component] = True
            removed[graph.sender_names[component]] = out
    generator = torch.Generator().manual_seed(seed)
    edges = mask.flatten().nonzero().squeeze(1)
    for i in range(n_random):
        chosen = torch.zeros(mask.numel(), dtype=torch.bool, device="cpu")
        chosen[edges[torch.randperm(len(edges), generator=generator, device="cpu")[: len(edges) // 2]]] = True
        removed[f"random half {i}"] = chosen.view_as(mask)
    circuits = [Circuit(base & ~k, graph) for k in removed.values() for base in (mask, full)]
    values = measure_circuits(experiment, circuits, recordings, progress=progress)
    inside, whole = values[::2], values[1::2]
    ablation = dict(experiment.ablation.meta)
    method = {"name": "completeness", "n_random": n_random, "seed": seed, "ablation": ablation}
    sign = "gap = |circuit − model|, both without the same edges; 0 = the circuit lacks nothing that they do"
    meta = {**experiment.describe(), "sign": sign, "method": method, "circuit": dict(circuit.meta)}
    return Completeness(list(removed), inside, whole, [abs(a - b) for a, b in zip(inside, whole, strict=True)], meta)


@reported
def minimality(
    model: Model,
    task: PromptPairs,
    metric: str | Metric,
    circuit: Circuit,
    *,
    ablation: str | Ablation = "corrupt",
    reference: PromptPairs | None = None,
    batch_size: int | str = "auto",
    progress: Progress | None = None,
    distributed: bool = False,
) -> EdgeScores:
    """What each edge of a circuit does for it: the change of the metric when it alone is taken out.

        score[s, r] = m(circuit ∖ (s, r)) − m(circuit)

    A circuit is minimal where every one is clearly negative; edges near 0 could go. Arguments as `completeness`.

    Returns:
        EdgeScores, 0 outside the circuit.

    Raises:
        ValueError: an empty circuit, or one of another graph.

    Source: Wang et al. 2022, section 4.2, at the level of edges.
    """
    experiment = Experiment.of(model, task, metric, ablation, reference, distributed)
    return measure_minimality(experiment, record(experiment, batch_size), circuit, progress=progress)


def measure_minimality(
    experiment: Experiment, recordings: Iterable[Recording], circuit: Circuit, *, progress: Progress | None = None
) -> EdgeScores:
    """`minimality` for an experiment whose batches are recorded."""
    graph, edges = experiment.model.graph, circuit.mask.nonzero()
    _check_circuit(graph, circuit)
    without = []
    for s, r in edges.tolist():
        mask = circuit.mask.clone()
        mask[s, r] = False
        without.append(Circuit(mask, graph))
    whole, *values = measure_circuits(experiment, [circuit, *without], recordings, progress=progress)
    scores = torch.zeros(graph.n_senders, graph.n_receivers, dtype=torch.float64, device="cpu")
    scores[edges[:, 0], edges[:, 1]] = torch.tensor(values, dtype=torch.float64, device="cpu") - whole
    ablation = dict(experiment.ablation.meta)
    meta = {
        **experiment.describe(),
        "sign": sign_text("score", "measured", "the edge alone is taken out of the circuit"),
        "metric": {"name": experiment.metric_name, "circuit": whole},
        "method": {"name": "minimality", "exact": True, "ablation": ablation, "edges": circuit.edges},
        "circuit": dict(circuit.meta),
    }
    return EdgeScores(scores, graph, meta)


def _check_circuit(graph: Graph, circuit: Circuit) -> None:
    circuit.check(graph)
    if not circuit.n_edges:
        raise ValueError("the circuit has no edges: there is nothing to judge")
