"""A budget of exact patching: exact where it is cheap and where first order is in doubt, first order for the rest."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

import torch
from torch import Tensor

from eapcore.attribution.attribute import attribute as first_order
from eapcore.attribution.flow_routes import REDUCE, flow_routes
from eapcore.attribution.methods import METHODS, Options, exact_receivers, recipe
from eapcore.attribution.score_batch import Both
from eapcore.execution.ablation import Ablation
from eapcore.execution.batch import Batch, spans
from eapcore.execution.distributed import reported
from eapcore.execution.experiment import Experiment, Task
from eapcore.execution.limits import limits
from eapcore.execution.memory import free_bytes
from eapcore.execution.progress import Count, Progress
from eapcore.graph.circuit import Circuit
from eapcore.graph.graph import Graph
from eapcore.graph.scores import EdgeScores
from eapcore.kernels.checks import one_of, short_repr
from eapcore.models.config import ModelConfig
from eapcore.models.model import Model
from eapcore.models.tensors import accumulate_dtype
from eapcore.models.torch_modes import own_modes
from eapcore.patching.edges import Pairs, measure_edges
from eapcore.patching.record import Recording
from eapcore.tasks.metrics import Metric, find_metric, tokens_read
from eapcore.tasks.pairs import PromptPairs
from eapcore.tasks.stream import PairStream

BUDGET = 3.0
FLOW = {"flow-routes": "threshold", "flow-sum": "flow"}  # methods, and how their routes add up
WHOLE = ("screened", *FLOW)  # methods that take no stream of pairs
CHEAP = METHODS["hybrid"].exact
LITTLE = 0.15  # of eap's operations, which those edges may take at the start of screened
NEARLY_NOTHING = 0.03  # the same, beside a third forward, 0.27 to 0.32, in what costs at most about 1.3 times eap
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
        at_read = 2 * width * size * heads + tokens * heads * size + mlp  # of the last layer, but its k and v
        forward = (graph.n_layers - 1) * (attention + mlp) * tokens + 2 * width * size * c.n_kv * tokens + at_read
        head = width * logits
        into = graph.edge_mask().sum(0).double()
        few = [graph.logits, *exact_receivers(graph, ("mlp", "q")[not graph.has_mlp :])]  # receivers at what is read
        contraction = width * (tokens * graph.n_edges - (tokens - 1) * float(into[few].sum()))
        edge = torch.zeros(graph.n_receivers, dtype=torch.float64, device="cpu")
        last = 2 * tokens * heads * width + 2 * width * size * heads + mlp  # at the position that is read alone
        for layer in range(graph.n_layers):
            behind = (graph.n_layers - 2 - layer) * (attention + mlp) * tokens + last
            own = 4 * width * size * tokens + tokens**2 * size
            if graph.is_last(layer):
                behind, own = mlp * (not graph.parallel), width * size * (tokens + 1) + 2 * tokens * size
            elif mlp and not graph.parallel:
                own += mlp * tokens
            edge[graph.qkv(layer)] = behind + own + head
            if graph.has_mlp:
                here = mlp * (1 if graph.is_last(layer) else tokens)
                edge[graph.mlp_receiver(layer)] = here + (0 if graph.is_last(layer) else behind) + head
        edge[list(exact_receivers(graph, ["q"]))] -= width * size * (tokens - 1)  # a query alone, at what is read
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
    operations, as they are in small models, and the gradient at 0.75 elsewhere: at most about 1.3 times eap's time.

    An ablation without prompts has "eap": for these no other point was measured.
    """
    if ablation != "corrupt":
        return {"method": "eap"}
    _, found = find_metric(metric, pairs.answers, pairs.wrong)
    graph, cost = model.graph, _cost(model, pairs, found, shared=True)
    into = graph.edge_mask().sum(0).double()
    exact = sum(float(into[r] * cost.edge[r]) for r in exact_receivers(graph, CHEAP))
    return {"method": "hybrid"} if level == "edge" and exact <= NEARLY_NOTHING * cost.eap else {"gradient_at": 0.75}


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

    The edges into the logits and into the last layer's MLP are patched with the first order where that takes little,
    see `attribution.exact_edges`. Of the others those are patched, in forwards of the model, for which

        mean over pairs of (the pair's own score)² / √(operations of patching the edge)

    is largest: scores that differ from pair to pair add up to little where first order is as much in doubt as where
    they agree, and the more operations lie behind an edge, the more bends its way. The edge from the embedding into the
    first MLP is where first order is farthest off on trained language models: what it carries is most of what that MLP
    reads. So it is patched on every sixteenth pair first, and its effect there takes the score's place where it is
    larger; of fewer pairs it goes before all others.

    Patching starts from the clean and corrupt runs that first order was made of, of which each process keeps those of
    its own pairs. They are made again, which takes 0.6 of `eap`'s operations, of a model in half precision, on several
    devices, with another ablation or CUDA graphs, and where all of them do not fit in the memory: what is left of the
    budget is that much less. Which it is, a resumed run takes from the one that began. What an interruption lost is
    made again and counts nowhere.

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
    options = _of_screened(budget, **options)
    experiment = Experiment.of(model, task, metric, ablation, reference, distributed)
    graph, mask = model.graph, model.graph.edge_mask()
    cost = cost_of(experiment)
    into = mask.sum(0).double()
    everything = cost.record + float(into @ cost.edge)
    allowed, n_pairs = budget * cost.eap, len(experiment)
    name = {"name": "screened", "budget": float(budget)}
    if allowed >= everything:
        share = Pairs(min(experiment.ranks.size, n_pairs))
        patched = measure_edges(experiment, batch_size=batch_size, progress=progress, resume=resume, share=share)
        n = graph.n_edges
        method = {**patched.meta["method"], **name, "spent": everything / cost.eap, "n_exact": n, "n_patched": n}
        return replace(patched, exact=mask, meta={**patched.meta, "method": method})
    cheap = torch.zeros_like(into)
    receivers = list(exact_receivers(graph, CHEAP))
    cheap[receivers] = into[receivers]
    how: dict[str, Any] = {"gradient_at": 0.75}
    spent, with_cheap = (cost.first_order(1, 1, edges) for edges in (0 * cheap, cheap))
    if with_cheap - spent <= min(LITTLE * cost.eap, allowed - spent):
        how["exact"], spent = [kind for kind in CHEAP if exact_receivers(graph, [kind])], with_cheap
    elif allowed < spent:
        how, spent, allowed = {}, cost.eap, cost.eap
    enough = allowed - spent >= float(cost.edge.min())
    runs = Runs(experiment, go_together=enough and _go_together(experiment) and options.get("graphs") is not True)
    count = Count(progress, n_pairs)
    scores = first_order(
        model, experiment.pairs, experiment.metric, ablation=experiment.ablation, batch_size=batch_size, runs=runs,
        progress=count.stage(n_pairs), resume=resume, distributed=distributed, uncertainty="auto", **how, **options,
    )  # fmt: skip
    left = allowed - spent - (0 if runs.kept else cost.record)
    assert isinstance(scores, EdgeScores)
    values, exact = scores.scores, torch.zeros_like(mask) if scores.exact is None else scores.exact
    doubt = scores.scores.double().square()
    if scores.standard_error is not None:  # the mean of the pairs' squares
        doubt = doubt + (n_pairs - 1) * scores.standard_error.double().square()
    chosen, used = _chosen(scores, doubt, exact, cost.edge, left)
    n, first = int(chosen.sum()), (0, graph.mlp_receiver(0) if graph.has_mlp and graph.n_layers else graph.logits)
    if n and not bool((chosen | exact)[first]):
        doubt[first], tried = _tried(experiment, first, float(doubt[first]), cost)
        spent += tried
        chosen, used = _chosen(scores, doubt, exact, cost.edge, left - tried)
        n = int(chosen.sum())
    if n:
        spent += used + (0 if runs.kept else cost.record)
        count.total += n_pairs * n
        stage = count.stage(n_pairs * n)
        patched = measure_edges(
            experiment, Circuit(chosen, graph), batch_size=batch_size, progress=stage, resume=resume,
            recordings=runs.recordings, share=Pairs(runs.lanes, runs.groups if runs.kept else None),
        )  # fmt: skip
        values, exact = patched.scores.where(chosen, values), exact | chosen
    method = {**scores.meta["method"], **name, "spent": spent / cost.eap, "n_exact": int(exact.sum()), "n_patched": n}
    meta = {**scores.meta, "method": method, "metric": {**scores.meta["metric"], "name": experiment.metric_name}}
    scores = replace(scores, standard_error=None, sign_consistency=None, jaccard=None)  # of scores that are none now
    return replace(scores, scores=values, exact=exact if bool(exact.any()) else None, meta=meta)


def _tried(experiment: Experiment, edge: tuple[int, int], doubt: float, cost: Operations) -> tuple[float, float]:
    """An edge's square effect on every sixteenth pair where that is more than its doubt, infinite for fewer pairs, and
    the operations for a pair of all."""
    n, mask = len(experiment), experiment.model.graph.edge_mask().zero_()
    if not (tries := n // 16):
        return math.inf, 0.0
    mask[edge] = True
    some = replace(experiment, pairs=experiment.pairs.select(torch.arange(tries, device="cpu") * 16))
    effect = float(measure_edges(some, Circuit(mask, experiment.model.graph)).scores[edge])
    return max(doubt, effect**2), tries / n * (cost.record + float(cost.edge[edge[1]]))


def _chosen(scores: EdgeScores, doubt: Tensor, exact: Tensor, cost: Tensor, left: float) -> tuple[Tensor, float]:
    """The edges bool [S, R] that are patched for so many operations, and what they take; one that is too much is left
    out, and a cheaper one behind it taken."""
    worth = (doubt / cost.sqrt()).where(scores.mask & ~exact, -1.0).flatten()
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


class Runs:
    """The clean and corrupt runs of first order's batches, recorded, and kept for patching where there is memory.

    go_together: whether first order and patching may start from the same runs. kept: whether they are kept; where they
    were and there is no more room, they are made again as they were. lanes, groups: of `score_batch.Runs.begin`.
    """

    def __init__(self, experiment: Experiment, *, go_together: bool = True) -> None:
        self.experiment, self.recordings, self.go_together = experiment, list[Recording](), go_together
        self.kept, self.room, self.lanes, self.groups = False, False, 1, dict[int, list[list[int]]]()

    def wanted(self) -> bool:
        return self.go_together and _fit(self.experiment)

    def begin(self, wanted: bool, lanes: int, groups: Mapping[int, list[list[int]]]) -> None:
        self.kept, self.lanes, self.groups = wanted, lanes, dict(groups)
        self.room = wanted and _fit(self.experiment)

    def __call__(self, batch: Batch) -> Both | None:
        if not self.kept:
            return None
        index = batch.index.tolist()
        # A batch that was too much comes again in halves.
        self.recordings = [made for made in self.recordings if not set(made.batch.index.tolist()) & set(index)]
        made = Recording.of(self.experiment, index, short=True)
        if self.room:
            self.recordings.append(replace(made, ablated=replace(made.ablated, stages=[])))
        return Both(made.clean.stages, made.ablated.stages, made.past)


def _go_together(experiment: Experiment) -> bool:
    """Whether first order and patching may start from the same runs."""
    model = experiment.model
    wide = model.dtype == accumulate_dtype(model.dtype)  # first order's residual stream is
    return wide and len(model.devices) == 1 and model.stream is None and experiment.shared


def _fit(experiment: Experiment) -> bool:
    """Whether there is memory for the recordings of all pairs."""
    model, (first, stop) = experiment.model, spans(experiment.pairs, shared=True)
    numbers = 4 * model.graph.n_senders * model.config.d_model * int((stop - first).sum())  # as `Recordings` counts
    return numbers * model.dtype.itemsize <= limits(model.device).record_share * free_bytes(model.device)


def _cost(model: Model, pairs: PromptPairs, metric: Metric, *, shared: bool) -> Operations:
    first, stop = spans(pairs, shared=shared)
    read = tokens_read(metric, pairs.answers, pairs.wrong, model.config.d_vocab)
    logits = model.config.d_vocab if read is None else read[0].shape[1]
    return Operations.of(model.config, float((stop - first).double().mean()), logits)


def cost_of(experiment: Experiment) -> Operations:
    """What scoring and patching cost in an experiment."""
    return _cost(experiment.model, experiment.pairs, experiment.metric, shared=experiment.shared)


def _of_screened(budget: float, **options: Any) -> dict[str, Any]:
    """The options of `attribute` that `screened` takes; ValueError for others, and for a budget that is none."""
    plain = {"level": "edge", "reduce": "all", "uncertainty": False}  # patching measures no single pairs
    if options.get("uncertainty") == "auto":
        options["uncertainty"] = False
    for option, value in options.items():
        if option not in ("storage", "impl", "graphs") and value is not None and value != plain.get(option):
            raise ValueError(f"screened chooses for itself and takes a budget, but no {option}, got {value!r}")
    if not isinstance(budget, int | float) or isinstance(budget, bool) or not budget >= 1:
        raise ValueError(f"budget must be a number of at least 1, the cost of one gradient, got {budget!r}")
    return {option: value for option, value in options.items() if option not in plain and value is not None}


def check_method(
    graph: Graph, *, method: str = "eap", budget: float | None = None, ablation: str = "corrupt", **options: Any
) -> None:
    """ValueError for what `attribute` refuses of a method and its options, before an ablation is made for it.

    options: `level` and `reduce`, `uncertainty` and the method's own.
    """
    if method == "screened":
        _of_screened(BUDGET if budget is None else budget, **options)
    elif method in FLOW:
        _of_flow(method, budget=budget, ablation=ablation, **options)
    else:
        _check_no_budget(method, budget)
        how = {"level": options.get("level", "edge"), "reduce": options.get("reduce", "all")}
        own = {field.name: options[field.name] for field in fields(Options) if field.name in options}
        made = recipe(method, graph, Options(**own), ablation=ablation, **how)
        if options.get("uncertainty") is True and (made.pruning or how["level"] != "edge"):
            raise ValueError(f"uncertainty is of edges' own scores, got {method} and level {how['level']!r}")


def _check_no_budget(method: str, budget: float | None) -> None:
    if budget is not None:
        raise ValueError(f"a budget belongs to the method 'screened', got {budget!r} with {method!r}")


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
    one_of("reduce", options.get("reduce", "all"), REDUCE)
    return {option: value for option, value in options.items() if option in taken}


def _any_method(function: Function) -> Function:
    """The function, and the methods "screened", "flow-routes" and "flow-sum"."""

    @wraps(function)
    def attribute(*args: Any, method: str = "eap", budget: float | None = None, **options: Any) -> Any:
        task = options.get("task", args[1] if len(args) > 1 else None)
        if isinstance(task, PairStream) and method in WHOLE:
            raise ValueError(f"{method} needs all pairs at once, but {task.name} is read as a stream: read it as pairs")
        if method == "screened":
            return screened(*args, budget=BUDGET if budget is None else budget, **options)
        if method in FLOW:
            return flow_routes(*args, routes=FLOW[method], **_of_flow(method, budget=budget, **options))
        _check_no_budget(method, budget)
        return function(*args, method=method, **options)

    return cast(Function, attribute)


attribute = _any_method(first_order)
"""`attribution.attribute`, and the methods "screened" with its budget, "flow-routes" and "flow-sum"."""
