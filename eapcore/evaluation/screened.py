"""A budget of exact patching: exact where it is cheap and where first order is in doubt, first order for the rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

import torch
from torch import Tensor

from eapcore.attribution.attribute import attribute as first_order
from eapcore.attribution.flow_routes import flow_routes
from eapcore.attribution.methods import METHODS, exact_receivers
from eapcore.execution.ablation import Ablation
from eapcore.execution.batch import spans
from eapcore.execution.distributed import reported
from eapcore.execution.experiment import Experiment, Task
from eapcore.execution.progress import Count, Progress
from eapcore.graph.circuit import Circuit
from eapcore.graph.scores import EdgeScores
from eapcore.kernels.checks import short_repr
from eapcore.models.config import ModelConfig
from eapcore.models.model import Model
from eapcore.models.torch_modes import own_modes
from eapcore.patching.edges import measure_edges
from eapcore.tasks.metrics import Metric, find_metric, tokens_read
from eapcore.tasks.pairs import PromptPairs

BUDGET = 3.0
FLOW = {"flow-routes": "threshold", "flow-sum": "flow"}  # methods, and how their routes add up
TWO = ((0.75, 0.9), (1.0, 0.1))  # nearly the same scores, and how far they are from those at the clean run
CHEAP = METHODS["hybrid"].exact
LITTLE = 0.15  # of eap's operations, which those edges may take in a method that costs little more than eap
Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Operations:
    """Multiply-adds for a prompt pair: of one gradient at the clean run, eap; of one at another point, point; of the
    runs that patching starts from, record; of patching an edge into each receiver, edge [R]."""

    eap: float
    point: float
    record: float
    edge: Annotated[Tensor, "float64 R"]

    @staticmethod
    def of(config: ModelConfig, tokens: float, logits: int) -> Operations:
        """For prompts that run at so many positions, and whose metric reads so many tokens' logits."""
        graph, c = config.graph, config
        width, heads, size = c.d_model, c.n_heads, c.d_head
        attention = 2 * width * size * (heads + c.n_kv) + tokens * heads * size
        mlp = 0 if c.attn_only or c.d_mlp is None else (2 + c.gated) * width * c.d_mlp
        forward = graph.n_layers * (attention + mlp) * tokens
        head = width * logits
        contraction = width * tokens * graph.n_edges
        edge = torch.zeros(graph.n_receivers, dtype=torch.float64, device="cpu")
        last = 2 * tokens * heads * width + 2 * width * size * heads + mlp  # at the position that is read alone
        for layer in range(graph.n_layers):
            behind = (graph.n_layers - 2 - layer) * (attention + mlp) * tokens + last
            own = 4 * width * size * tokens + tokens**2 * size
            if graph.is_last(layer):
                behind, own = mlp * (not graph.parallel), own / 2
            elif mlp and not graph.parallel:
                own += mlp * tokens
            edge[graph.qkv(layer)] = behind + own + head
            if graph.has_mlp:
                here = mlp * (1 if graph.is_last(layer) else tokens)
                edge[graph.mlp_receiver(layer)] = here + (0 if graph.is_last(layer) else behind) + head
        edge[graph.logits] = width + head
        return Operations(3 * forward + contraction, 2 * forward + contraction, 2 * forward, edge)

    def first_order(self, points: int, others: int, graph_edges: Tensor) -> float:
        """Of so many gradients, all but `others` of them at the clean run, and of the edges that are patched besides,
        int64 [R] for each receiver."""
        clean = points - others
        return self.eap + (clean - 1) * (self.eap - self.record) + others * self.point + float(graph_edges @ self.edge)


def little_more(
    model: Model, pairs: PromptPairs, metric: str, ablation: str = "corrupt", level: str = "edge"
) -> dict[str, Any]:
    """What of `attribute`'s methods to take that costs little more than eap: "hybrid" where its exact edges are few
    operations, as they are but for a metric of a large vocabulary's logits, and the gradient at 0.75 elsewhere.

    An ablation without prompts has "eap": for these no other point was measured.
    """
    if ablation != "corrupt":
        return {"method": "eap"}
    _, found = find_metric(metric, pairs.answers, pairs.wrong)
    graph, cost = model.graph, _cost(model, pairs, found, shared=True)
    into = graph.edge_mask().sum(0).double()
    exact = sum(float(into[r] * cost.edge[r]) for r in exact_receivers(graph, CHEAP))
    return {"method": "hybrid"} if level == "edge" and exact <= LITTLE * cost.eap else {"gradient_at": 0.75}


@reported
@own_modes
@torch.no_grad()
def screened(
    model: Model,
    task: Task,
    metric: str | Metric = "logit_diff",
    *,
    budget: float = BUDGET,
    ablation: str | Ablation = "corrupt",
    reference: PromptPairs | None = None,
    batch_size: int | str = "auto",
    progress: Progress | None = None,
    resume: str | Path | None = None,
    distributed: bool = False,
    **options: Any,
) -> EdgeScores:
    """Score every edge by first order, and patch as many exactly as a budget allows.

    The edges into the logits and into the last layer's MLP are patched with the first order, see
    `attribution.exact_edges`. Of the others those are patched, in forwards of the model, for which

        (score² + spread²) / operations of patching the edge

    is largest: spread is how far the estimate at 0.75 is from the one at the clean run, and is known where the budget
    is large enough for both. An edge's operations fall from the bottom of the model to the top. The edge from the
    embedding into the first MLP goes before all others: what it carries is most of what that MLP reads, and on trained
    language models it is where first order is farthest off.

    Args:
        model, task, metric, ablation, reference, batch_size: as `attribute`.
        budget: in units of what `attribute(method="eap")` costs, by a count of multiply-adds; at least 1. For less than
            a gradient at 0.75 costs it is "eap", for more than patching every edge costs it is `patch_edges`.
        progress: called with (runs done, runs in all), one for each pair and each edge that is patched, and the scores.
        resume, distributed: as `attribute`.
        options: `storage`, `impl` and `graphs` of `attribute`.

    Returns:
        EdgeScores; `exact` says which edges were patched, `meta["method"]` the budget and what was spent of it.

    Raises:
        ValueError: a budget below 1; as `attribute` and `patch_edges`.
    """
    plain = {"level": "edge", "reduce": "all", "uncertainty": False}  # patching measures no single pairs
    if options.get("uncertainty") == "auto":
        options["uncertainty"] = False
    for option, value in options.items():
        if option not in ("storage", "impl", "graphs") and value is not None and value != plain.get(option):
            raise ValueError(f"screened chooses for itself and takes a budget, but no {option}, got {value!r}")
    options = {option: value for option, value in options.items() if option not in plain and value is not None}
    if not isinstance(budget, int | float) or isinstance(budget, bool) or not budget >= 1:
        raise ValueError(f"budget must be a number of at least 1, the cost of one gradient, got {budget!r}")
    experiment = Experiment.of(model, task, metric, ablation, reference, distributed)
    graph, mask = model.graph, model.graph.edge_mask()
    cost = cost_of(experiment)
    into = mask.sum(0).double()
    everything = cost.record + float(into @ cost.edge)
    allowed, n_pairs = budget * cost.eap, len(experiment)
    name = {"name": "screened", "budget": float(budget)}
    if allowed >= everything:
        patched = measure_edges(experiment, batch_size=batch_size, progress=progress, resume=resume)
        n = graph.n_edges
        method = {**patched.meta["method"], **name, "spent": everything / cost.eap, "n_exact": n, "n_patched": n}
        return replace(patched, exact=mask, meta={**patched.meta, "method": method})
    cheap = torch.zeros_like(into)
    receivers = list(exact_receivers(graph, CHEAP))
    cheap[receivers] = into[receivers]
    one, two = (cost.first_order(points, 1, cheap) for points in (1, 2))
    kinds = [kind for kind in CHEAP if exact_receivers(graph, [kind])]
    how: dict[str, Any] = {"gradient_at": 0.75, "exact": kinds}
    spent = one
    if allowed < one:
        how, spent = {}, cost.eap
    elif allowed - one - cost.record > 4 * (two - one):  # the second gradient takes at most a quarter of what is left
        how, spent = {"points": TWO, "spread": True, "exact": kinds}, two
    count = Count(progress, n_pairs)
    scores = first_order(
        model, experiment.pairs, experiment.metric, ablation=experiment.ablation, batch_size=batch_size,
        progress=count.stage(n_pairs), resume=resume, distributed=distributed, **how, **options,
    )  # fmt: skip
    assert isinstance(scores, EdgeScores)
    values, exact = scores.scores, torch.zeros_like(mask) if scores.exact is None else scores.exact
    chosen, used = _chosen(scores, exact, cost.edge, allowed - spent - cost.record)
    n = int(chosen.sum())
    if n:
        spent += cost.record + used
        count.total += n_pairs * n
        stage = count.stage(n_pairs * n)
        edges = Circuit(chosen, graph)
        patched = measure_edges(experiment, edges, batch_size=batch_size, progress=stage, resume=resume)
        values, exact = patched.scores.where(chosen, values), exact | chosen
    method = {**scores.meta["method"], **name, "spent": spent / cost.eap, "n_exact": int(exact.sum()), "n_patched": n}
    meta = {**scores.meta, "method": method, "metric": {**scores.meta["metric"], "name": experiment.metric_name}}
    return replace(scores, scores=values, exact=exact if bool(exact.any()) else None, meta=meta)


def _chosen(scores: EdgeScores, exact: Tensor, cost: Tensor, left: float) -> tuple[Tensor, float]:
    """The edges bool [S, R] that are patched for so many operations, and what they take; one that is too much is left
    out, and a cheaper one behind it taken."""
    doubt = scores.scores.double().square()
    doubt = doubt if scores.spread is None else doubt + scores.spread.double().square()
    if scores.graph.has_mlp and scores.graph.n_layers:
        doubt[0, scores.graph.mlp_receiver(0)] = torch.inf
    worth = (doubt / cost).where(scores.mask & ~exact, -1.0).flatten()
    order = worth.sort(descending=True, stable=True).indices
    order = order[worth[order] >= 0]
    costs = cost.expand_as(doubt).flatten()[order].tolist()
    chosen, used = [], 0.0
    for flat, one in zip(order.tolist(), costs, strict=True):
        if used + one <= left:
            chosen.append(flat)
            used += one
    mask = torch.zeros_like(scores.mask)
    mask.view(-1)[chosen] = True
    return mask, used


def _cost(model: Model, pairs: PromptPairs, metric: Metric, *, shared: bool) -> Operations:
    first, stop = spans(pairs, shared=shared)
    read = tokens_read(metric, pairs.answers, pairs.wrong, model.config.d_vocab)
    logits = model.config.d_vocab if read is None else read[0].shape[1]
    return Operations.of(model.config, float((stop - first).double().mean()), logits)


def cost_of(experiment: Experiment) -> Operations:
    """What scoring and patching cost in an experiment."""
    return _cost(experiment.model, experiment.pairs, experiment.metric, shared=experiment.shared)


def _of_flow(method: str, **options: Any) -> dict[str, Any]:
    """The options of `flow_routes`; ValueError for others of `attribute` that are not as they are by themselves."""
    plain = {"level": "edge", "reference": None, "storage": "auto", "impl": "auto", "graphs": "auto"}
    taken = ("task", "metric", "reduce", "batch_size", "progress")
    ablation = options.pop("ablation", "corrupt")
    kind = ablation.name if isinstance(ablation, Ablation) else ablation
    if kind != "corrupt":
        raise ValueError(f"{method} ablates nothing: leave the ablation at 'corrupt', got {short_repr(kind)}")
    for option, value in options.items():
        if option not in taken and value not in (None, False, "auto", plain.get(option)):
            raise ValueError(f"{method} looks at a forward of the clean prompts alone and takes no {option}: {value!r}")
    return {option: value for option, value in options.items() if option in taken}


def _any_method(function: Function) -> Function:
    """The function, and the methods "screened", "flow-routes" and "flow-sum"."""

    @wraps(function)
    def attribute(*args: Any, method: str = "eap", budget: float | None = None, **options: Any) -> Any:
        if method == "screened":
            return screened(*args, budget=BUDGET if budget is None else budget, **options)
        if method in FLOW:
            return flow_routes(*args, routes=FLOW[method], **_of_flow(method, budget=budget, **options))
        if budget is not None:
            raise ValueError(f"a budget belongs to the method 'screened', got {budget!r} with {method!r}")
        return function(*args, method=method, **options)

    return cast(Function, attribute)


attribute = _any_method(first_order)
"""`attribution.attribute`, and the methods "screened" with its budget, "flow-routes" and "flow-sum"."""
