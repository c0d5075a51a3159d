"""Exact patching: circuits, edges, nodes and paths, each by running the model rather than by its gradient."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from eapcore.attribution import Progress, Task, check_pairs
from eapcore.circuit import FORMAT_VERSION, Circuit, EdgeScores, finite, replacing, sign_text, write_text
from eapcore.graph import Graph
from eapcore.metrics import Metric
from eapcore.model import Model
from eapcore.modes import own_modes
from eapcore.partial import Partial
from eapcore.runs import (
    Batch,
    Changes,
    Count,
    Question,
    Readers,
    ablated_senders,
    at_read,
    finish,
    make_batch,
    needed,
    reached,
    run_masked,
    through_mlp,
)
from eapcore.tasks import PromptPairs

__all__ = [
    "Interpolation", "NodeEffects", "PathEffect", "circuit_logits", "interpolate", "metric_on",
    "patch_edges", "patch_nodes", "path_patch", "routes", "run_circuit", "write_json",
]  # fmt: skip

Edges = Circuit | Sequence[str] | None

CURVE_POINTS = 11  # of an interpolation, where nobody says how many
_SAVE_SECONDS = 10.0  # between two writes of a partial result


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


@own_modes
@torch.no_grad()
def patch_edges(
    model: Model,
    task: Task,
    metric: str | Metric = "logit_diff",
    edges: Edges = None,
    *,
    ablation: str = "corrupt",
    reference: PromptPairs | None = None,
    batch_size: int | str = "auto",
    progress: Progress | None = None,
    resume: str | Path | None = None,
) -> EdgeScores:
    """Measure what corrupting each edge does to the metric, one edge at a time, many in one forward.

        effect[s, r] = mean over pairs of metric(run with v[r] + e_corrupt[s] − e_clean[s] at r alone) − metric(clean)

    The run is clean up to r, which alone reads the change; everything behind r follows. So only r's own head or MLP is
    computed again in its layer, then the later layers, from the first position where clean and corrupt differ, and the
    last layer at the answer alone.

    Args:
        model: the model.
        task: prompt pairs, or (clean, corrupt) tokens int64 [N, T] read at their last position.
        metric: a name out of `metrics.METRICS`, or a callable. Higher is better.
        edges: a circuit or names of edges; None is all edges of the graph.
        ablation: what the edge carries: "corrupt", "zero", "mean" or "mean-positional", as `run_circuit`.
        reference: the prompts of a mean; None is the task's own.
        batch_size: pairs at a time; the effects do not depend on it.
        progress: called with (effects measured, effects in all), one for each edge and pair.
        resume: a file for what is done so far, written every 10 seconds and on an interruption; where it exists, the
            work goes on from there, on this device or another. A callable metric is known by its name and by its
            values on the clean and corrupt runs, which are measured again.

    Returns:
        EdgeScores with the sign of `attribute`: negative means that the behaviour needs the edge. Edges that were not
        asked for are 0; `meta["method"]["edges"]` names those that were, or is "all".

    Raises:
        ValueError: prompts, metric or edges that do not fit; a resume file of another model, task, metric, ablation or
            set of edges; NaN or infinite activations, or such a metric.

    Source: Syed, Rager, Conmy 2023, eq. 1.
    """
    question = Question.of(model, task, metric, ablation, reference)
    graph, pairs = model.graph, question.pairs
    mask = _edge_set(graph, edges)
    size, n_edges = question.batch_size(batch_size), int(mask.sum())
    partial = Partial(resume, question, mask, size)
    done = partial.done
    left = done.pairs.logical_not()
    left[list(done.batch)] = False
    groups = question.groups(size, 1 + n_edges // model.config.n_layers, left)
    seen = int(done.pairs.sum()) * n_edges + len(done.batch) * int(done.edges.sum())
    count = Count(progress, n_edges * len(pairs), seen)
    if seen:
        count.add(0)
    saved = time.monotonic()
    try:
        for group in [done.batch, *groups] if done.batch else groups:
            batch = question.batch(group)
            ends = question.ends(batch)
            partial.done = partial.done.begin(group, ends)
            delta = batch.other.senders - batch.clean.senders
            for chunk, logits in _patched(model, batch, mask & ~partial.done.edges, delta):
                change = question.values(logits, batch) - ends[0]
                senders, receivers = (list(side) for side in zip(*chunk, strict=True))
                partial.done.found.append((senders, receivers, change.sum(1).cpu()))
                count.add(len(group) * len(chunk))
                if time.monotonic() - saved > _SAVE_SECONDS:
                    partial.save()
                    saved = time.monotonic()
            partial.done = partial.done.end()
    finally:
        partial.save()
    effects = question.mean(partial.done.sums)
    names = "all" if edges is None else Circuit(mask, graph).edges
    clean, corrupt = partial.done.values.mean(1).tolist()
    meta = {
        **question.describe(),
        "sign": sign_text("score", "measured", "the edge alone is ablated"),
        "metric": {"name": question.metric_name, "clean": clean, "corrupt": corrupt},
        "method": {"name": "patch", "exact": True, "ablation": question.ablation, "edges": names},
    }
    return EdgeScores(effects.to(torch.float64 if model.dtype == torch.float64 else torch.float32), graph, meta)


def _edge_set(graph: Graph, edges: Edges) -> Tensor:
    """bool [S, R] of the edges that are asked for."""
    if edges is None:
        return graph.edge_mask()
    if isinstance(edges, str):
        raise ValueError(f"edges must be a circuit or a list of names, got the text {edges!r}")
    circuit = edges if isinstance(edges, Circuit) else Circuit.from_edges(graph, list(edges))
    if circuit.graph != graph:
        raise ValueError(f"the edges must belong to {graph}, got some of {circuit.graph}")
    if not circuit.n_edges:
        raise ValueError("at least one edge is needed")
    if n_others := int((circuit.mask & ~graph.edge_mask()).sum()):
        raise ValueError(f"edges must be edges of {graph}, but {n_others} places of the circuit's mask are none")
    return circuit.mask


def _patched(model: Model, batch: Batch, mask: Tensor, delta: Tensor) -> Iterator[tuple[list[tuple[int, int]], Tensor]]:
    """Edges (sender, receiver) that go through the model together, into one layer or into the logits, and the batch's
    logits [C, B, .] with one of them patched in each copy; delta is [S, B, T, D]."""
    graph = model.graph
    for index in range(model.config.n_layers + 1):
        start = index * graph.receivers_per_layer
        found = [(s, start + r) for r, s in mask[:, start : start + graph.receivers_per_layer].T.nonzero().tolist()]
        if not found:
            continue
        readers = Readers.of(model, batch, index, delta, found)
        copies = batch.copies(model, at_read=index == model.config.n_layers)
        for i in range(0, len(found), copies):
            yield found[i : i + copies], readers.logits(found[i : i + copies])


def write_json(path: str | Path, kind: str, result: Any) -> None:
    """Write a result, a dataclass, as JSON beside its kind.

    Tensors become lists, circuits the names of their edges, scores what is known of them and those of the edges that
    `meta["method"]["edges"]` names; NaN and infinities null.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            return plain(value.tolist())
        if isinstance(value, EdgeScores):
            edges = (value.meta.get("method") or {}).get("edges")
            named = {"scores": plain({edge: value[edge] for edge in edges})} if isinstance(edges, list) else {}
            return {"meta": plain(value.meta), **named}
        if isinstance(value, Circuit):
            return {"edges": value.edges, "meta": plain(value.meta)}
        if is_dataclass(value):
            return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
        if isinstance(value, Mapping):
            return {str(key): plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return finite(value)

    content = {"format": f"eapcore-{kind}", "format_version": FORMAT_VERSION, **plain(result)}
    with replacing(path) as temporary:
        write_text(temporary, content)


@dataclass(frozen=True, slots=True)
class Interpolation:
    """The metric along the way from clean to corrupt at one edge.

    points: [P], 0 clean, 1 corrupt. effects: [P], the mean change of the metric there. estimate: the linear one, `score
    · points`, where a score was given.
    """

    edge: str
    points: list[float]
    effects: list[float]
    estimate: list[float] | None
    meta: Mapping[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        write_json(path, "interpolation", self)


@own_modes
@torch.no_grad()
def interpolate(
    model: Model,
    task: Task,
    metric: str | Metric,
    edge: str,
    *,
    points: int | Sequence[float] = CURVE_POINTS,
    score: float | None = None,
    ablation: str = "corrupt",
    reference: PromptPairs | None = None,
    batch_size: int | str = "auto",
    progress: Progress | None = None,
) -> Interpolation:
    """Move one edge from clean to corrupt and measure the metric on the way.

        effect(λ) = mean over pairs of metric(run with v[r] + λ (e_corrupt[s] − e_clean[s])) − metric(clean)

    Its slope at 0 is the EAP score, its value at 1 the exact effect.

    Args:
        model, task, metric, ablation, reference, batch_size: as `patch_edges`.
        edge: its name.
        points: how many from 0 to 1, at least 2, or the λ themselves.
        score: an estimate of the edge's effect, drawn as a line beside it.
        progress: called with (runs done, runs in all), one for each point and pair.

    Raises:
        ValueError: as `patch_edges`; no points, fewer than 2 as a number, or some that are not finite.

    Source: Syed, Rager, Conmy 2023, figure 4b.
    """
    question = Question.of(model, task, metric, ablation, reference)
    sender, receiver = model.graph.edge(edge)
    layer = receiver // model.graph.receivers_per_layer
    places = _places(points)
    sums = torch.zeros(len(places), dtype=torch.float64, device="cpu")
    count = Count(progress, len(places) * len(question.pairs))
    for batch in question.batches(question.batch_size(batch_size)):
        clean = question.ends(batch)[0]
        delta = batch.other.senders[sender] - batch.clean.senders[sender]
        for part in torch.arange(len(places), device="cpu").split(batch.copies(model)):
            weights = torch.tensor(places, dtype=model.dtype, device=model.device)[part]
            reads = [(row, receiver) for row in range(len(part))]
            readers = Readers.of(model, batch, layer, weights[:, None, None, None] * delta, reads)
            sums[part] += (question.values(readers.logits(reads), batch) - clean).sum(1).cpu()
            count.add(len(part) * len(batch.pairs))
    effects = question.mean(sums).tolist()
    estimate = None if score is None else [score * p for p in places]
    sign = sign_text("effect", "measured", "the edge alone goes so far from clean, point 0, to ablated, point 1")
    method = {"name": "interpolate", "ablation": question.ablation}
    meta = {**question.describe(), "sign": sign, "method": method}
    return Interpolation(edge, places, effects, estimate, meta)


def _places(points: int | Sequence[float]) -> list[float]:
    """The λ of an interpolation, checked."""
    if isinstance(points, int):
        if points < 2 or isinstance(points, bool):
            raise ValueError(f"points must be at least 2, got {points}")
        return [i / (points - 1) for i in range(points)]
    try:
        places = [float(p) for p in points]
    except (TypeError, ValueError):
        places = []
    if not places or not all(map(math.isfinite, places)):
        raise ValueError(
            f"points must be how many, at least 2, or a list of finite λ, 0 clean and 1 corrupt, got {points!r}"
        )
    return places


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
    components = [graph.component(r) for r in range(graph.n_receivers)]
    inner = [r for r, component in enumerate(components) if component in passed]
    sources = sorted({*chosen, *passed})
    for r in {*inner, *ends}:
        mask[sources, r] = edges[sources, r]
    if onward:
        behind = reached(graph, edges, _members(graph, {c for r in ends if (c := components[r]) is not None}))
        mask[behind] |= edges[behind]
    return Circuit(mask, graph, {"senders": list(senders), "receivers": list(receivers), "through": list(through)})


def _members(graph: Graph, senders: set[int]) -> Tensor:
    found = torch.zeros(graph.n_senders, dtype=torch.bool, device="cpu")
    found[list(senders)] = True
    return found


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

    senders: list[str]
    edges: Circuit
    effect: float
    clean: float
    corrupt: float
    patched: float
    meta: Mapping[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        write_json(path, "path-effect", self)


@own_modes
@torch.no_grad()
def path_patch(
    model: Model,
    task: Task,
    metric: str | Metric,
    senders: Sequence[str],
    paths: Circuit | Sequence[str],
    *,
    ablation: str = "corrupt",
    reference: PromptPairs | None = None,
    batch_size: int | str = "auto",
    progress: Progress | None = None,
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

    Returns:
        PathEffect. A direct effect on the logits is that of the path `a0.h1->logits`.

    Raises:
        ValueError: an unknown name; no path from a sender to the logits; as `patch_edges`.

    Source: Wang et al. 2022, section 3.1; Goldowsky-Dill et al. 2023.
    """
    question = Question.of(model, task, metric, ablation, reference)
    graph = model.graph
    if isinstance(paths, str):
        raise ValueError(f"paths must be a list of paths or a circuit, got the text {paths!r}")
    edges = paths if isinstance(paths, Circuit) else _path_edges(graph, paths)
    if edges.graph != graph:
        raise ValueError(f"the paths must belong to {graph}, got some of {edges.graph}")
    origins = _members(graph, {graph.sender(name) for name in senders})
    useful = needed(graph, edges.mask)
    if not bool((useful & origins).any()):
        raise ValueError(f"no path leads from {', '.join(senders) or 'no sender'} to the logits: end the paths there")
    again = reached(graph, edges.mask, origins) & useful & ~origins
    weights = edges.mask & (origins | again)[:, None]
    sums = torch.zeros(3, dtype=torch.float64, device="cpu")
    count = Count(progress, len(question.pairs))
    for batch in question.batches(question.batch_size(batch_size)):
        fixed = Changes.between(model, batch, batch.other.senders, batch.clean.senders)
        logits, _ = run_masked(model, batch, batch.clean, weights[None], fixed, again)
        sums += torch.cat([question.ends(batch), question.values(logits, batch)]).sum(1).cpu()
        count.add(len(batch.pairs))
    clean, corrupt, patched = question.mean(sums).tolist()
    method = {"name": "path-patch", "ablation": question.ablation, **edges.meta}
    sign = sign_text("effect", "measured", "what the senders send along the paths alone is ablated")
    meta = {**question.describe(), "sign": sign, "method": method}
    return PathEffect(list(senders), edges, patched - clean, clean, corrupt, patched, meta)
