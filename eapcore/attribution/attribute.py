"""First-order attribution: scores of every edge, node or neuron from a few forward and backward passes."""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor

import eapcore.attribution.statistics as over_pairs
import eapcore.kernels as kernels
from eapcore.attribution.methods import OPTIONS as OTHER_OPTIONS
from eapcore.attribution.methods import Options, Passes, Points, Recipe, recipe
from eapcore.attribution.plan import Plan
from eapcore.attribution.pruning import pruned
from eapcore.attribution.score_batch import Runs
from eapcore.attribution.scoring import Scoring, shapes_of
from eapcore.attribution.spread import SpreadPlan, spread_over
from eapcore.attribution.tally import Tally
from eapcore.execution.ablation import FROM_REFERENCE, Ablation
from eapcore.execution.batch import cut, in_order, spans
from eapcore.execution.distributed import Ranks, deal, reported
from eapcore.execution.experiment import (
    Experiment,
    Task,
    check_batch_size,
    check_model,
    describe,
    result_dtype,
)
from eapcore.execution.limits import PREFIX_SHARE, limits
from eapcore.execution.memory import free_bytes
from eapcore.execution.prefetch import received
from eapcore.execution.progress import Count, Progress
from eapcore.execution.resume import Resume
from eapcore.graph.graph import Graph
from eapcore.graph.pair_scores import PairWriter, begin_index, write_index
from eapcore.graph.scores import EdgeScores, NodeScores
from eapcore.kernels.checks import REDUCE, one_of
from eapcore.models.backward_rules import Rules
from eapcore.models.config import ModelConfig
from eapcore.models.model import Model
from eapcore.models.tensors import moved
from eapcore.models.torch_modes import own_modes
from eapcore.tasks.metrics import Metric, tokens_read, without_values
from eapcore.tasks.pairs import PromptPairs
from eapcore.tasks.stream import PairStream

STORAGES = ("auto", "dense", "factored")
# A metric whose gradient is zero by cancellation leaves the rounding of its float64 arithmetic on logits of order 10.
_ZERO_GRADIENT = 1e-13
_log = logging.getLogger("eapcore")


@overload
def attribute(
    model: Model, task: Task | PairStream, metric: str | Metric = ..., *, level: Literal["edge"] = ..., **options: Any
) -> EdgeScores: ...
@overload
def attribute(
    model: Model,
    task: Task | PairStream,
    metric: str | Metric = ...,
    *,
    level: Literal["node", "neuron"],
    **options: Any,
) -> NodeScores: ...
@overload
def attribute(
    model: Model, task: Task | PairStream, metric: str | Metric = ..., *, level: str, **options: Any
) -> EdgeScores | NodeScores: ...
@reported  # the options stand here alone
@own_modes
def attribute(
    model: Model,
    task: Task | PairStream,
    metric: str | Metric = "logit_diff",
    *,
    method: str = "eap",
    level: str = "edge",
    gradient_at: str | float | None = None,
    steps: int | None = None,
    points: str | Points | None = None,
    rules: Rules | None = None,
    qk: str | None = None,
    exact: str | Sequence[str] | None = None,
    spread: bool = False,
    uncertainty: bool | str = False,
    ablation: str | Ablation = "corrupt",
    reference: PromptPairs | None = None,
    reduce: str = "all",
    storage: str = "auto",
    batch_size: int | str = "auto",
    impl: str = "auto",
    graphs: bool | str = "auto",
    progress: Progress | None = None,
    pairs_to: str | Path | None = None,
    resume: str | Path | None = None,
    distributed: bool = False,
    devices: str | Sequence[str | torch.device] | None = None,
    runs: Runs | None = None,
    **others: Any,
) -> EdgeScores | NodeScores:
    """Score every edge, node or neuron of a model for one behaviour.

        edge[s, r] = mean over pairs of Σ_t ⟨e_ablated[s, t] − e_clean[s, t], Σ_k w_k ∂metric/∂v[r, t] at point k⟩
        node[s]    = mean over pairs of Σ_t ⟨e_ablated[s, t] − e_clean[s, t], Σ_k w_k ∂metric/∂e[s, t] at point k⟩

    e[s, t] is what sender s adds to the residual stream at position t, v[r, t] the residual stream that receiver r
    reads, before LayerNorm. The score is the first-order estimate of how the metric changes when that edge alone, or
    everything that the node sends, carries the corrupt prompt's activation: negative means that the behaviour needs it.

    Args:
        model: the model.
        task: prompt pairs, or (clean, corrupt) tokens int64 [N, T] read at their last position, for a metric that needs
            no answers; or a `PairStream`, a file that is read a window at a time, in memory that does not grow with it.
        metric: a name out of `metrics.METRICS`, or a callable, see `metrics`. Higher is better.
        method: which gradients, and how they add up.
            "eap": one gradient, at the clean run.
            "hybrid": one gradient, where the embedding is 0.75 of the way from corrupt to clean, and the edges into the
            logits and the last layer's MLP patched exactly. Of what costs little more than "eap" it is nearest to exact
            patching, see bench/RESULTS.md.
            "eap-ig": integrated gradients over the inputs: the mean over points where the embedding is
            corrupt + α (clean − corrupt).
            "clean-corrupt": the mean of the gradients at both ends.
            "eap-ig-activations": for each component in turn (the embedding, all heads of a layer, an MLP) and each
            point α, the clean run with that component's output at corrupt + α (clean − corrupt) and everything behind
            it as it follows; no gradient goes through what was replaced. The mean over components and points of the
            gradients at all receivers.
            "relp": one backward pass at the clean run by relevance rules, see `rules`: norms' σ frozen, the identity
            rule for the activation function, the half rule for gated units, the attention pattern frozen, so that q and
            k edges score 0.
            "gim": the same with others: σ frozen, the softmax's derivative at temperature 2, and the gradients of two
            activations that are multiplied halved.
            "qk-fix": "eap", but the pattern that an edge into q or k makes is computed exactly, see `exact_patterns`.
            "grad-drop": the mean of |score of a pair| over pairs and over backward passes that each drop one layer
            (its heads and its MLP), of the passes that keep the receiver's own layer. These scores have no sign.
            "atp-star": "grad-drop" with the exact patterns of "qk-fix".
            "hisp": head importance scores for pruning, the mean of |score of a pair| of each node over its layer's
            norm, and an edge's the smaller of its ends', see `pruning`; "hisp-raw" without the norm. They have no sign.
            All of them are choices of points, `qk`, `rules` and `exact`, each of which can be made otherwise; the file
            says which.
        level: "edge"; "node" scores senders, with exact patterns or edges by the sum over their edges; "neuron" also
            scores each sender's D output dimensions and the MLPs' hidden units, where there are MLPs.
        gradient_at: one point at which gradients are taken: "clean" (of all methods that integrate nothing), "corrupt"
            (denoising), or a number from corrupt 0 to clean 1.
        steps, points: several, or of "eap-ig-activations" those of each component: by a rule with m = steps, "left" k/m
            for k = 0…m−1, "right" for k = 1…m ("eap-ig-activations", with m = 5 as published), "midpoint" (k + ½)/m,
            "gauss" the Gauss–Legendre nodes and weights ("eap-ig", with m = 4); or [(α, weight), …] with weights that
            sum to 1. Between an ablation without prompts and the clean run they move the embedding alike. Which points
            are nearest to exact patching: bench/RESULTS.md.
        qk: how edges into q and k are scored: by their "gradient", or by the "exact" pattern that they make.
        rules: how gradients go back, e.g. `Rules("frozen", "identity")`; of "relp" and "gim" their own.
        exact: which edges are patched exactly, since that is cheap: "none", or some of "logits", all edges into the
            logits, and "mlp", "q", "k", "v", those into the last layer's, as a list or with commas in between; "last"
            is all of these. See `exact_edges`; `EdgeScores.exact` says which they were.
        spread: of edges and several points, keep also how far apart the estimates lie, `EdgeScores.spread`: the score
            by the first point's gradient alone − that by the last one's. Where it is large first order is in doubt.
        uncertainty: of edges, keep also the standard error over pairs and the sign consistency of every score, and how
            far the top edges of bootstrap draws of the pairs are the same; "auto" where there are two pairs and the
            memory for it. See `EdgeScores` and `statistics`. A score is then the sum of its pairs' own scores, and may
            differ in the last bits.
        ablation: what a sender sends when it is ablated: "corrupt", what it sends on the corrupt prompt; "zero";
            "mean" over reference prompts and their positions; "mean-positional" over them for each position;
            "optimal", the constant that predictions on reference prompts miss least, see `execution.optimal`. Or an
            `Ablation` that was made before.
        reference: whose clean prompts a mean is taken over, or constants are optimal for; None for those of the task.
        reduce: "all"; "pair" or "position" also keep the scores of each pair or position in the result. On a GPU a
            position's pairs that are read there are added, in float64, in any order: the last bits may differ between
            runs.
        storage: of edges: "dense" keeps the sender buffer [S, B, T, D], "factored" about 10·L·B·T·D numbers instead and
            makes senders and receivers a chunk of tokens at a time; "auto" is dense where a useful batch fits. Nodes
            and neurons need no buffer, and are always factored.
        batch_size: pairs at a time; "auto" from the planner's memory estimate. The scores do not depend on it. A batch
            for which the memory does not suffice is halved, and a warning is logged.
        impl: the kernels' implementation, see `kernels`.
        graphs: on a GPU, whether batches of a shape that comes again are recorded as CUDA graphs and replayed, which
            saves a small model's launches. "auto" where it suits: shapes that come often, of so few tokens that the
            device would wait for the host, and a metric by name; where recording fails it goes on without, and a
            warning is logged. True also for a callable metric, which must not look at values on the host, and raises
            where it fails. The scores do not depend on it.
        progress: called with (pairs done, pairs in all) after every batch.
        pairs_to: with reduce "pair", a folder to which each pair's scores are written as they come, instead of into the
            result; see `graph.pair_scores`.
        resume: a folder for what is done so far, written every half minute and on an interruption; where it exists, the
            work goes on from there, on as many processes or others, to the same bits.
        distributed: share the pairs among the processes that torchrun or the like started for this run; every one of
            them gets the result. The pairs are cut by a fixed rule into a share for each, and the shares' float64 sums
            added in order: the same bits for the same number of processes, and those of one but for rounding.
        devices: several of this process's, on which the model's layers are laid by the memory that they have, in order,
            all else on the first; "auto" takes as many of its GPUs as a useful batch needs. What a sender adds stays
            where it is made, and receivers' gradients travel there, or what they are made of, whichever is fewer bytes.
            To a single one that has no room for the weights the layers are streamed from the host's memory. The scores
            have the bits of one such device. None leaves the model where it lies.
        runs: called with each batch, gives its clean and corrupt forward, see `score_batch.Runs`, for what goes on from
            them; of edges ablated by "corrupt" of a model in float32 or float64 on one device, then without graphs.
            None makes them here.

    Returns:
        EdgeScores, or NodeScores for the other levels; `meta` holds the model, task, metric with its mean on the clean
        and corrupt runs, the method with its points and all other parameters, and versions.

    Raises:
        ValueError: an unknown option, or one that does not go with the others; prompts or answers that do not fit the
            model; a metric that returns a wrong shape or NaN, or whose gradient is zero everywhere; NaN or infinite
            activations.
        RuntimeError: a named impl cannot run here; the processes do not meet, or one of them is lost.

    Source: Syed, Rager, Conmy 2023, eq. 2 and appendix F; integrated gradients over inputs and activations: Hanna,
    Pezzelle, Belinkov 2024 and its code EAP-IG; relp: Jafari, Eberle, Khakzar, Nanda 2025; gim: Edin
    et al. 2025 (arXiv 2505.17630) and its code; exact patterns and dropped gradients: Kramár, Lieberum, Shah, Nanda
    2024; hisp: Michel, Levy, Neubig 2019, Conmy et al. 2023.
    """
    check_model(model)
    _check_options(others)
    if uncertainty not in (True, False, "auto"):
        raise ValueError(f"uncertainty must be True, False or 'auto', got {uncertainty!r}")
    one_of("reduce", reduce, REDUCE)
    one_of("storage", storage, STORAGES)
    one_of("impl", impl, kernels.IMPLS)
    check_batch_size(batch_size)
    ablation_name = ablation.name if isinstance(ablation, Ablation) else ablation
    options = Options(gradient_at, steps, points, rules, qk, exact, spread)
    how = recipe(method, model.graph, options, ablation=ablation_name, level=level, reduce=reduce)
    if devices is not None:
        model, ablation = _spread(model, devices, ablation)
    stream = task if isinstance(task, PairStream) else None
    if stream is not None:
        _check_stream(ablation, reference, reduce, pairs_to)
    if pairs_to is not None and how.pruning:
        raise ValueError(f"the scores of {method} belong to all pairs together, so there can be no pairs_to")
    if pairs_to is not None and reduce != "pair":
        raise ValueError(f"pairs_to is where each pair's scores go: reduce must be 'pair', got {reduce!r}")
    first = task if not isinstance(task, PairStream) else task.first
    experiment = Experiment.of(model, first, metric, ablation, reference, distributed)
    model, pairs, ranks = experiment.model, experiment.pairs, experiment.ranks
    by_node = how.by_ends or (level != "edge" and not how.by_edge)
    n_pairs = len(pairs) if stream is None else len(stream)
    vary = level == "edge" and not how.pruning and n_pairs > 1
    if uncertainty is True and not vary:
        got = f"{method}, level {level!r} and {n_pairs} pairs"
        raise ValueError(f"uncertainty is of edges' own scores over at least 2 pairs, got {got}")
    what = {"method": how.described, "level": level, "reduce": reduce, "each pair in a folder": pairs_to is not None}
    what |= {} if stream is None else {"stream": stream.content_hash}
    ranks.agree(**what)
    kept = Resume(resume, "scores", lambda: what | experiment.identity(), ranks, ranks.size)

    def by_memory() -> int:  # none for what was begun by a version without
        return ranks.first(int(vary and not kept.notes and over_pairs.affordable(model.graph, model.device)))

    varied = bool(kept.settle("uncertainty", None if uncertainty == "auto" else int(uncertainty), by_memory))
    values = without_values(experiment.metric)
    passes = how.planned(ablation_name, reduce, values, statistics=varied)

    def passes_of(graph: Graph) -> Passes:
        same = recipe(method, graph, options, ablation=ablation_name, level=level, reduce=reduce)
        return same.planned(ablation_name, reduce, values, statistics=varied)

    plan = _plan(experiment, impl, passes, passes_of)
    found = _storage(model, plan, pairs, level, storage, by_node)
    storage = kept.settle("storage", None if storage == "auto" else found, lambda: ranks.first(found))
    asked = batch_size if isinstance(batch_size, int) else None

    wants_runs = runs is not None and bool(
        kept.settle("runs kept", None, lambda: ranks.least(int(runs is not None and runs.wanted())))
    )
    graphs = False if wants_runs else graphs
    scoring = Scoring(experiment, how, passes, plan, level, reduce, storage, impl, graphs, n_pairs, runs)
    shapes = shapes_of(model, how, passes)
    lead: tuple[int, ...] = (int(pairs.positions.max()) + 1,) if reduce == "position" else ()
    rows = _rows(experiment, kept) if stream is None else {lane: [] for lane in kept.mine}
    # Rows of each pair lie where they belong at once.
    whole = kept.lanes == ranks.size == 1 and reduce == "pair" and pairs_to is None
    lanes: dict[int, Tally] = {}
    for lane, mine in rows.items():
        if reduce == "pair" and pairs_to is None:
            lead = (n_pairs if whole else len(mine),)
        places = torch.tensor(mine if whole else range(len(mine)), dtype=torch.int64, device="cpu").to(model.device)
        made = {name: (*lead, *shape) for name, shape in shapes.items()}
        writer = None if pairs_to is None else PairWriter(pairs_to, lane, result_dtype(model.dtype))
        choices = {"storage": storage, "uncertainty": int(varied)} | ({} if runs is None else {"runs kept": wants_runs})
        lanes[lane] = Tally(kept, lane, made, places, reduce, choices, writer, scoring.statistics)
    if pairs_to is not None and ranks.leads:
        begin_index(pairs_to)
    if stream is None:
        size = kept.settle("batch size", asked, lambda: ranks.least(plan.batch_size(pairs, storage)))
        for tally in lanes.values():
            tally.begin(0, n_pairs, size)
        if runs is not None:
            runs.begin(wants_runs, kept.lanes, {lane: _batches(experiment, mine, size) for lane, mine in rows.items()})
    for lane, tally in lanes.items():
        tally.restore()
        if stream is None:
            scoring.check_metric(rows[lane], tally)
    count = Count(ranks.watched(progress), n_pairs, sum(tally.done for tally in lanes.values()))
    if count.done:
        count.add(0)
    if stream is None:
        for lane, tally in lanes.items():
            scoring.lane(rows[lane], tally, count)
    else:
        for number, window in stream.windows(lambda n: (t := lanes.get(n % kept.lanes)) is not None and n >= t.window):
            tally = lanes[number % kept.lanes]
            scoring.window(window, tally, count, number, number * stream.window, asked)

    scores = _combined(
        lanes, rows, ranks, kept.lanes, shapes, reduce, n_pairs, whole, pairs_to is not None, model.device
    )
    nothing = torch.zeros((), dtype=torch.float64, device=model.device)
    statistics = {
        name: ranks.sum([tally.statistics[name] for tally in lanes.values()] or [nothing.expand(shape)], kept.lanes)
        for name, shape in scoring.statistics.items()
    }
    largest = ranks.largest(torch.stack([nothing, *(tally.largest for tally in lanes.values())]).max())
    _check_gradients(experiment, largest, scores)
    if how.dropped:
        for name, x in scores.items():
            x /= scoring.reached(name)
    ends = [tally.ends + tally.values.sum(1) for tally in lanes.values()] or [nothing.expand(2)]
    clean, corrupt = (ranks.sum(ends, kept.lanes) / n_pairs).tolist()
    described = describe(model, pairs)
    meta = {
        **described,
        "task": {**described["task"], "n_pairs": n_pairs},
        "sign": how.sign,
        "method": how.described | {"ablation": dict(experiment.ablation.meta)},
        "metric": {"name": experiment.metric_name, "clean": clean, "corrupt": corrupt},
        "impl": kernels.choose("edge_scores", device=model.device, dtype=model.dtype) if impl == "auto" else impl,
        "storage": storage,
    }
    if pairs_to is not None:
        meta["per_pair"] = {"folder": Path(pairs_to).name}
        files = ranks.gather({lane: tally.finish() for lane, tally in lanes.items()})
        if ranks.leads:
            counts = {int(lane): number for each in files for lane, number in each.items()}
            write_index(pairs_to, [counts[lane] for lane in range(kept.lanes)], n_pairs, meta)
        reduce = "all"
    result = _result(model, scores, meta, level, reduce, n_pairs, how)
    if not varied or not isinstance(result, EdgeScores):
        return result
    total = scores["scores"] if reduce == "all" else scores["scores"].sum(0)
    error, share, jaccard = (
        x.to(result.scores.dtype).cpu() for x in over_pairs.described(total, statistics, n_pairs, result.mask)
    )
    return replace(result, standard_error=error, sign_consistency=share, jaccard=jaccard)


def _spread(
    model: Model, devices: str | Sequence[str | torch.device], ablation: str | Ablation
) -> tuple[Model, str | Ablation]:
    """The model with its layers on several devices, and an ablation of it."""
    now = model.now()
    there = spread_over(now, devices)
    of_it = isinstance(ablation, Ablation) and ablation.model is not None and ablation.model.weights is now.weights
    if isinstance(ablation, Ablation) and of_it and ablation.weights in (None, now.weights.state()):
        state = None if ablation.weights is None else there.weights.state()
        values = moved(ablation.values, there.device)
        ablation = replace(ablation, values=values, model=there, weights=state)  # one of others is refused as it is
    return there, ablation


def _plan(experiment: Experiment, impl: str, passes: Passes, passes_of: Callable[[Graph], Passes]) -> Plan | SpreadPlan:
    """The memory plan of the device, or of the devices, that the model lies on."""
    model, config = experiment.model, _as_read(experiment)
    groups = model.groups
    if model.stream is not None:
        within = int(limits(model.device).share * (free_bytes(model.device) - model.stream.held))
        where = [(model.device, config.n_layers)]
        return SpreadPlan(config, model.dtype, where, impl, groups, passes_of, [within])
    if len(model.devices) == 1:
        return Plan(config, model.dtype, model.device, impl, groups, passes)
    counts = Counter(attention.device for attention in model.attentions)
    layers = [(device, counts[device]) for device in model.devices]
    return SpreadPlan(config, model.dtype, layers, impl, groups, passes_of)


def _check_stream(
    ablation: str | Ablation, reference: PromptPairs | None, reduce: str, pairs_to: str | Path | None
) -> None:
    """ValueError for what needs all pairs of a task at once."""
    if isinstance(ablation, str) and ablation in FROM_REFERENCE and reference is None:
        raise ValueError(f"the ablation {ablation} of a task that is read as a stream needs a reference task")
    if reduce == "pair" and pairs_to is None:
        raise ValueError("the scores of each pair of a stream need a folder: give pairs_to")


def _rows(experiment: Experiment, kept: Resume) -> dict[int, list[int]]:
    """Which pairs, in order, are those of each of this process's lanes."""
    order = in_order(experiment.pairs)
    first, stop = (x[order] for x in spans(experiment.pairs, shared=experiment.shared))
    parts = deal((stop - (1 - PREFIX_SHARE) * first).tolist(), kept.lanes)
    return {lane: order[parts[lane].start : parts[lane].stop] for lane in kept.mine}


def _batches(experiment: Experiment, order: list[int], size: int) -> list[list[int]]:
    """Which of some pairs, in order, go together in batches of at most so many, as a `Feed` has them."""
    first, stop = (x[order] for x in spans(experiment.pairs, shared=experiment.shared))
    bounds = [0, *itertools.accumulate(cut(first, stop, size, limits(experiment.model.device).one_more_batch))]
    return [order[begin:end] for begin, end in itertools.pairwise(bounds)]


def _combined(
    lanes: Mapping[int, Tally],
    rows: Mapping[int, list[int]],
    ranks: Ranks,
    n_lanes: int,
    shapes: Mapping[str, tuple[int, ...]],
    reduce: str,
    n_pairs: int,
    whole: bool,
    in_folder: bool,
    device: torch.device,
) -> dict[str, Tensor]:
    """All lanes' scores by name; whole: of the only lane, as they are to be."""
    if whole:
        return next(iter(lanes.values())).scores
    where: dict[str, Any] = {"dtype": torch.float64, "device": device}
    if reduce == "pair" and not in_folder:
        scores = {name: torch.zeros(n_pairs, *shape, **where) for name, shape in shapes.items()}
        for name, total in scores.items():
            ranks.rows(total, [(torch.tensor(rows[i], device="cpu"), t.scores[name]) for i, t in lanes.items()])
        return scores
    lead: tuple[int, ...] = ()
    if reduce == "position":
        lead = (max(ranks.gather(max([0, *(len(tally.scores["scores"]) for tally in lanes.values())]))),)
        for tally in lanes.values():
            tally.reach(lead[0])
    nothing = {name: torch.zeros(*lead, *shape, **where) for name, shape in shapes.items()}  # of one without a lane
    each = {name: [tally.scores[name] for tally in lanes.values()] or [nothing[name]] for name in shapes}
    return {name: ranks.sum(parts, n_lanes) for name, parts in each.items()}


def _check_options(others: dict[str, Any]) -> None:
    """TypeError for a keyword that is none of ours, with ours where it is another tool's."""
    for name in others:
        hint = f"; here that is {OTHER_OPTIONS[name]}" if name in OTHER_OPTIONS else ""
        raise TypeError(f"attribute has no option {name!r}{hint}")


def _check_gradients(experiment: Experiment, largest: Tensor, scores: dict[str, Tensor]) -> None:
    """ValueError for gradients that are not finite, or zero everywhere; largest: max |∂metric/∂logits|."""
    name, dtype = experiment.metric_name, experiment.model.dtype
    looks = [x.isfinite().all() for x in (largest, *scores.values())] + [x.any() for x in scores.values()]
    size, *seen = torch.stack([largest, *(x.to(largest.dtype) for x in looks)]).tolist()  # one wait for all
    if not seen[0]:
        raise ValueError(f"the gradient of the metric {name} is NaN or infinite where its value is finite")
    if not all(seen[: 1 + len(scores)]):
        raise ValueError(f"the gradients overflow in {dtype}: use a wider dtype, e.g. float32")
    if size <= _ZERO_GRADIENT:
        raise ValueError(
            f"the gradient of the metric {name} is zero on every pair, so every score would be: a divergence from the "
            "clean run has its minimum there; use another metric"
        )
    if not any(seen[1 + len(scores) :]):
        _log.warning("every score is exactly 0: nothing that changes between the runs reaches the metric %s", name)


def _storage(model: Model, plan: Plan | SpreadPlan, pairs: PromptPairs, level: str, storage: str, by_node: bool) -> str:
    """The storage that is used; ValueError for one that does not suit what is scored."""
    if by_node:
        if storage == "dense":
            raise ValueError(
                f"level {level!r} by this method keeps no sender buffer: storage must be 'auto' or 'factored', got "
                "'dense'"
            )
        return "factored"
    if len(model.devices) > 1 or model.stream is not None:
        if storage == "factored":
            why = "are streamed, since factors need all of them at once"
            why = why if model.stream else f"lie on several devices ({model.where}), which share the sender buffer"
            raise ValueError(f"storage must be 'auto' or 'dense' where the layers {why}, got 'factored'")
        return "dense"
    return plan.storage(pairs) if storage == "auto" else storage


def _as_read(experiment: Experiment) -> ModelConfig:
    """The model's sizes for the plan, with a vocabulary of as many tokens as the metric reads for a pair."""
    config, pairs = experiment.model.config, experiment.pairs
    read = tokens_read(experiment.metric, pairs.answers, pairs.wrong, config.n_logits)
    return config if read is None else replace(config, d_vocab=read[0].shape[1], d_vocab_out=None)


def _result(
    model: Model,
    scores: dict[str, Tensor],
    meta: dict[str, Any],
    level: str,
    reduce: str,
    n_pairs: int,
    how: Recipe,
) -> EdgeScores | NodeScores:
    """The mean over pairs, with the parts that were asked for."""
    keep = result_dtype(model.dtype)
    whole = scores if reduce == "all" else {name: x.sum(0) for name, x in scores.items()}
    whole = {name: x / n_pairs for name, x in whole.items()}
    if how.pruning:
        whole, scores = pruned(model.graph, whole, scores, normalised=how.pruning == "normalised", by_ends=how.by_ends)
    whole = received({name: x.to(keep) for name, x in whole.items()}, model.device)
    parts: dict[str, Tensor] = {}
    if reduce != "all":
        made = {name: (x if reduce == "pair" else x / n_pairs).to(keep) for name, x in scores.items()}
        parts = received(made, model.device)
    if level == "edge":
        part, exact = parts.get("scores"), None
        if how.exact:
            exact = torch.zeros_like(model.graph.edge_mask())
            exact[:, list(how.exact)] = model.graph.edge_mask()[:, list(how.exact)]
        return EdgeScores(
            whole["scores"],
            model.graph,
            meta,
            per_pair=part if reduce == "pair" else None,
            per_position=part if reduce == "position" else None,
            exact=exact,
            spread=whole.get("spread"),
        )
    return NodeScores(
        graph=model.graph,
        meta=meta,
        per_pair=parts if reduce == "pair" else {},
        per_position=parts if reduce == "position" else {},
        **whole,
    )
