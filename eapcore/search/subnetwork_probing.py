"""Subnetwork probing: a mask on every edge, or on every node, trained to keep the behaviour with as few as possible.

    u ~ uniform(0, 1), cut off at 0.0001 and 0.9999            one draw for each mask and step
    s = σ((log u − log(1 − u) + log α)/β)
    m = min(1, max(0, s (ζ − γ) + γ))                          β = 2/3, γ = −0.1, ζ = 1.1
    loss = −mean over pairs of the metric + λ · mean over masks of P(m > 0),   P(m > 0) = σ(log α − β log(−γ/ζ))

Of edges, v[r] = v_ablated[r] + Σ_s m[s, r] (e[s] − e_ablated[s]), e[s] being what sender s makes of its own such input.
A layer's receivers read Σ_s m[s, r] · change[s] in one product over the senders, and its way back is made layer by
layer: ∂loss/∂m[s, r] is the sender buffer contracted with the receivers' gradients, as in attribution, and no tensor
has an axis of edges beside d_model.

Of nodes, each head's q, k and v and what each MLP sends become m x + (1 − m) x_ablated.

Source: Cao, Sanh, Rush 2021, *Low-Complexity Probing via Finding Subnetworks*, section 3; with nodes q, k, v and MLPs
and the ablated activations in place of zeros: Conmy et al. 2023, appendix, and its code.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch
from torch import Tensor

import eapcore.kernels as kernels
from eapcore.attribution.pruning import deciding_end
from eapcore.execution.ablation import FROM_REFERENCE, Ablation
from eapcore.execution.adam import Adam
from eapcore.execution.distributed import reported
from eapcore.execution.experiment import Experiment, Task, result_dtype
from eapcore.execution.progress import Count, Progress
from eapcore.graph.graph import Graph
from eapcore.graph.scores import NO_SIGN, EdgeScores
from eapcore.kernels.checks import one_of
from eapcore.models.model import Model, Place
from eapcore.models.tensors import accumulate_dtype, at_positions, on
from eapcore.models.torch_modes import own_modes
from eapcore.patching.masked import sent_by_heads
from eapcore.patching.record import Recording, Recordings
from eapcore.tasks.metrics import Metric
from eapcore.tasks.pairs import PromptPairs

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
START = 0.9  # σ(log α) (ζ − γ) + γ in the beginning, as published; the median draw is then 1
STEPS, RATE = 300, 0.05
PENALTY = {"edge": 10.0, "node": 1.0}
_EDGE = "score = the probability that the trained mask of the edge is above 0; " + NO_SIGN
_NODE = "score = the probability that the trained masks of both ends of the edge are above 0, the smaller; " + NO_SIGN


@reported
@own_modes
@torch.no_grad()
def subnetwork_probing(
    model: Model,
    task: Task,
    metric: str | Metric = "kl",
    *,
    level: str = "edge",
    penalty: float | None = None,
    steps: int = STEPS,
    rate: float = RATE,
    seed: int = 0,
    ablation: str | Ablation = "corrupt",
    reference: PromptPairs | None = None,
    batch_size: int | str = "auto",
    progress: Progress | None = None,
    distributed: bool = False,
) -> EdgeScores:
    """Train a mask on every edge, or node, and score edges by the probability that it lets something through.

    Every step runs all pairs with one draw of the masks, goes back once, and takes one step of Adam. The same seed
    gives the same scores. What senders send is kept, 2·S·B·T·D numbers for the batch at hand.

    Args:
        model: the model.
        task: prompt pairs, or (clean, corrupt) tokens int64 [N, T] read at their last position.
        metric: a name out of `metrics.METRICS`, or a callable, whose mean is to stay high; "kl" is −KL(P_clean ‖ P).
        level: "edge": a mask on each edge. "node": on each head's q, k and v and on what each MLP sends; an edge's
            score is then that of the end that goes first, see `attribution.pruning`, and the penalty is the mean over
            layers' q, k and v, and MLPs, of the mean over heads, as published.
        penalty: λ, in the metric's unit for all masks together; None is 10 for edges and 1 for nodes.
        steps, rate: of Adam, and its learning rate; Conmy et al. took 3000 of 0.001.
        seed: of the draws.
        ablation: what is sent where a mask is 0, and reference the prompts of a mean, as `run_circuit`; with nodes
            "corrupt" or "zero".
        batch_size: pairs at a time; the scores do not depend on it but for rounding.
        progress: called with (steps × pairs done, steps × pairs in all).
        distributed: share the pairs among the processes of this run, as `attribute`; every step adds up what they made.

    Returns:
        EdgeScores in [0, 1] without a sign; `meta["metric"]` has the metric on the clean and corrupt runs and with the
        last step's masks, `meta["method"]` all parameters, the expected share of masks above 0, and of nodes each one's
        probability.

    Raises:
        ValueError: a penalty, number of steps, rate or level that is none; prompts or a metric that do not fit.
    """
    check_options(
        level=level, penalty=penalty, steps=steps, rate=rate, seed=seed,
        ablation=ablation.name if isinstance(ablation, Ablation) else ablation,
    )  # fmt: skip
    penalty = PENALTY[level] if penalty is None else penalty
    experiment = Experiment.of(model, task, metric, ablation, reference, distributed)
    model, graph, ranks = experiment.model, model.graph, experiment.ranks
    ranks.agree(training={"level": level, "penalty": penalty, "steps": steps, "rate": rate, "seed": seed})
    masks = _Masks.of(graph, level, seed)
    adam = Adam(masks.log_alpha, rate)
    recordings = Recordings(experiment, batch_size)
    count = Count(ranks.watched(progress), steps * len(experiment))
    ends = torch.zeros(2, dtype=torch.float64, device="cpu")
    value = math.nan
    for step in range(steps):
        with torch.enable_grad():
            mask = masks.draw()
        total = torch.zeros(1, dtype=torch.float64, device="cpu")
        slope = torch.zeros_like(mask)
        for recording in recordings:
            if step == 0:
                ends += experiment.ends(recording.reference).sum(1).cpu()
            values, grad = _RUNS[level](experiment, recording, mask.detach())
            total += values.sum().cpu()
            slope -= grad.cpu() / len(experiment)
            count.add(len(recording.batch.pairs))
        total, slope = ranks.sum([torch.cat([total, slope])]).split([1, len(slope)])
        (value,) = experiment.mean(total).tolist()
        if not bool(slope.isfinite().all()):
            raise ValueError(f"the gradients overflow in {model.dtype}: use a wider dtype, e.g. float32")
        with torch.enable_grad():
            loss = (mask * slope).sum() + penalty * masks.size()  # to first order at this draw
            adam.step(torch.autograd.grad(loss, masks.log_alpha)[0])
    clean, corrupt = experiment.mean(ranks.sum([ends])).tolist()
    chance = masks.chance().detach()
    method = {
        "name": "subnetwork-probing", "level": level, "penalty": penalty, "steps": steps, "rate": rate, "seed": seed,
        "ablation": dict(experiment.ablation.meta), "kept": float(chance.mean()),
    }  # fmt: skip
    if level == "edge":
        scores = torch.zeros(graph.n_senders, graph.n_receivers, dtype=torch.float64, device="cpu")
        scores[graph.edge_mask()] = chance
    else:
        method["nodes"] = dict(zip(graph.receiver_names, chance.tolist(), strict=False))  # all but the logits
        scores = (
            torch.cat([chance, chance[:1]])[deciding_end(graph, torch.cat([chance, chance[:1]]))] * graph.edge_mask()
        )
    meta = {
        **experiment.describe(),
        "sign": _EDGE if level == "edge" else _NODE,
        "method": method,
        "metric": {"name": experiment.metric_name, "clean": clean, "corrupt": corrupt, "masked": value},
    }
    return EdgeScores(scores.to(result_dtype(model.dtype)), graph, meta)


def check_options(
    *,
    level: str = "edge",
    penalty: float | None = None,
    steps: int = STEPS,
    rate: float = RATE,
    seed: int = 0,
    ablation: str = "corrupt",
) -> None:
    """ValueError for options that `subnetwork_probing` does not take; ablation: its name."""
    one_of("level", level, ("edge", "node"))
    for name, value in (("penalty", 0 if penalty is None else penalty), ("rate", rate)):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 <= value < math.inf or (name == "rate" and value == 0):
            raise ValueError(f"{name} must be a number {'above' if name == 'rate' else 'of at least'} 0, got {value!r}")
    for name, value, least in (("steps", steps, 1), ("seed", seed, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    if level == "node" and ablation in FROM_REFERENCE:
        raise ValueError(
            "masks of nodes are on q, k and v too, of which no mean is taken: ablation must be 'corrupt' or 'zero', "
            f"got {ablation!r}"
        )


@dataclass(frozen=True, slots=True)
class _Masks:
    """The masks under training. log_alpha: float64 [n], of the edges in the order of [S, R], or of the receivers but
    the logits, what lies behind which is masked. groups: which means make the penalty, int64 [n]."""

    log_alpha: Tensor
    groups: Tensor
    generator: torch.Generator

    @staticmethod
    def of(graph: Graph, level: str, seed: int) -> _Masks:
        groups = torch.zeros(graph.n_edges, dtype=torch.int64, device="cpu")
        if level == "node":
            kinds = [name.split(".")[0] + name[-2:-1] * (name[-1] == ">") for name in graph.receiver_names[:-1]]
            places = {kind: place for place, kind in enumerate(dict.fromkeys(kinds))}
            groups = torch.tensor([places[kind] for kind in kinds], device="cpu")
        share = (START - GAMMA) / (ZETA - GAMMA)
        start = torch.full((len(groups),), math.log(share / (1 - share)), dtype=torch.float64, device="cpu")
        return _Masks(start.requires_grad_(), groups, torch.Generator().manual_seed(seed))

    def draw(self) -> Tensor:
        u = torch.rand(len(self.log_alpha), generator=self.generator, dtype=torch.float64, device="cpu")
        u = u.clamp(0.0001, 0.9999)
        s = ((u.log() - (1 - u).log() + self.log_alpha) / BETA).sigmoid()
        return (s * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    def chance(self) -> Tensor:
        """P(m > 0)."""
        return (self.log_alpha - BETA * math.log(-GAMMA / ZETA)).sigmoid()

    def size(self) -> Tensor:
        """The mean over groups of the mean of P(m > 0)."""
        counts = self.groups.bincount()
        return (self.chance() / counts[self.groups]).sum() / len(counts)


def _by_edges(experiment: Experiment, recording: Recording, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The metric of a batch's pairs [B], and the derivative of its sum by each edge's mask [E]."""
    graph = experiment.model.graph
    edges = graph.edge_mask()
    full = torch.zeros(edges.shape, dtype=torch.float64, device="cpu")
    full[edges] = mask
    run = _Edges(recording, full)
    run.forward()
    values, slope = run.backward(lambda logits: experiment.values(logits, recording.reference))
    return values, slope.cpu()[edges]


class _Edges:
    """A batch with weighted edges: what senders send more than in the ablated run, everywhere [S', B, T, D] before the
    last layer and at_read [S, B, 1, D], and on the way back ∂ of both."""

    def __init__(self, recording: Recording, masks: Tensor) -> None:
        self.recording, self.model = recording, recording.model
        model, (rows, tokens) = self.model, recording.batch.shape
        self.masks, like = masks.to(model.device, model.dtype), recording.clean.senders
        before, width = model.graph.senders_everywhere.stop, model.config.d_model
        self.everywhere = like.new_zeros(before, rows, tokens, width)
        self.at_read = like.new_zeros(model.graph.n_senders, rows, 1, width)
        change = recording.clean.senders[0] - recording.ablated.senders[0]
        (self.everywhere if before else self.at_read)[0] = change if before else recording.at_read(change)
        self.slopes = {False: self.everywhere, True: self.at_read}
        self.slope = torch.zeros(masks.shape, dtype=torch.float64, device=model.device)

    def pool(self, short: bool) -> Tensor:
        return self.at_read if short else self.everywhere

    def stream(self, number: int, receivers: list[int], short: bool) -> Tensor:
        """What receivers read, [R', B, T, D], or at the answers alone [R', B, 1, D]."""
        stop, place = self.model.graph.senders_before(receivers[0]), slice(receivers[0], receivers[-1] + 1)
        base = self.recording.at_read(self.recording.ablated.streams[number], short)
        made = self.masks[:stop, place].T @ self.pool(short)[:stop].flatten(1)
        return base + made.unflatten(1, base.shape)

    def streams(self, place: Place[Any], number: int) -> Callable[[list[int], bool], Tensor]:
        """`stream` for a component's receivers, in one pass over the senders where all read the same positions."""
        if self.model.stages[number].last:
            return partial(self.stream, number)
        first = place.receivers.start
        every = self.stream(number, list(range(first, place.receivers.stop)), False)
        return lambda receivers, short: every[receivers[0] - first : receivers[-1] - first + 1]

    def sends(self, place: Place[Any], number: int, streams: Callable[[list[int], bool], Tensor]) -> Tensor:
        """What a component's senders send, [n, B, Q, D]."""
        stage = self.model.stages[number]
        if stage.mlp is place:
            v = on(streams([place.receivers.start], stage.last)[0], stage.device)
            return on(place.component.forward(v).sent, self.model.device)[None]
        heads = list(range(place.component.n_heads))
        sent = sent_by_heads(self.recording, stage, place, heads, 1, lambda rs, short: streams(rs, short)[None])
        return on(sent[:, 0], self.model.device)

    def forward(self) -> None:
        stages = self.model.stages
        for number, stage in enumerate(stages):
            if stage.last and (number == 0 or not stages[number - 1].last):
                self.at_read[: len(self.everywhere)] = self.recording.at_read(self.everywhere)
            for place in (stage.attention, stage.mlp):
                if place is not None:
                    sent = self.sends(place, number, self.streams(place, number))
                    base = self.recording.at_read(self.recording.ablated.senders[place.senders], stage.last)
                    self.pool(stage.last)[place.senders] = sent - base

    def backward(self, metric: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """The metric [B] and its sum's derivative by the masks [S, R]."""
        model, stages = self.model, self.model.stages
        wide = accumulate_dtype(model.dtype)
        self.slopes = {short: torch.zeros_like(self.pool(short), dtype=wide) for short in (False, True)}
        x = self.stream(len(stages), [model.graph.logits], True)
        with torch.enable_grad():
            leaf = x.requires_grad_()
            values = metric(self.recording.logits(leaf[:, :, 0]))[0]
            (grad,) = torch.autograd.grad(values.sum(), leaf)
        self.take(grad, [model.graph.logits], True)
        for number in reversed(range(len(stages))):
            stage = stages[number]
            for place in (stage.mlp, stage.attention):
                if place is not None:
                    self.through(place, number)
            if stage.last and (number == 0 or not stages[number - 1].last):
                rows = self.recording.read[None, ..., None].expand(len(self.everywhere), -1, -1, x.shape[-1])
                self.slopes[False].scatter_add_(2, rows, self.slopes[True][: len(self.everywhere)])
        return values.detach(), self.slope

    def through(self, place: Place[Any], number: int) -> None:
        """Go back through a component."""
        found = self.gradients(place, number)
        if not self.model.stages[number].last:
            found = [(torch.cat([grad for grad, _, _ in found]), [r for _, some, _ in found for r in some], False)]
        for grad, receivers, short in found:
            self.take(grad, receivers, short)

    def gradients(self, place: Place[Any], number: int) -> list[tuple[Tensor, list[int], bool]]:
        """Of a component, which is run once more, the gradients of what some of its receivers read, which, and whether
        at the answers alone, see `stream`."""
        leaves: list[tuple[Tensor, list[int], bool]] = []
        made = self.streams(place, number)

        def streams(receivers: list[int], short: bool) -> Tensor:
            leaf = made(receivers, short).detach().requires_grad_()
            leaves.append((leaf, receivers, short))
            return leaf

        behind = self.slopes[self.model.stages[number].last][place.senders]
        with torch.enable_grad():
            sent = self.sends(place, number, streams)
            grads = torch.autograd.grad(sent, [leaf for leaf, _, _ in leaves], behind.to(sent.dtype))
        return [(grad, receivers, short) for grad, (_, receivers, short) in zip(grads, leaves, strict=True)]

    def take(self, grad: Tensor, receivers: list[int], short: bool) -> None:
        """Some receivers' gradients [R', B, T, D]: the masks' part, and the senders'."""
        stop, place = self.model.graph.senders_before(receivers[0]), slice(receivers[0], receivers[-1] + 1)
        self.slope[:stop, place] += kernels.edge_scores(self.pool(short)[:stop], grad)
        slopes = self.slopes[short][:stop].flatten(1)
        if slopes.dtype == grad.dtype:  # in place: what is added is as large as all of the senders
            slopes.addmm_(self.masks[:stop, place], grad.flatten(1))
        else:
            slopes += self.masks[:stop, place] @ grad.flatten(1)


def _by_nodes(experiment: Experiment, recording: Recording, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The metric of a batch's pairs [B], and the derivative of its sum by each node's mask [R − 1]."""
    model, ablated = experiment.model, recording.ablated
    with torch.enable_grad():
        leaf = mask.to(model.device, model.dtype).requires_grad_()

        def mixed(x: Tensor, other: Tensor | None, m: Tensor) -> Tensor:
            return x * m if other is None else other + m * (x - other)

        x = recording.clean.streams[0]
        for number, stage in enumerate(model.stages):
            read = recording.read if stage.last else None
            run = ablated.stages[number] if ablated.stages else None
            out = stream = x
            if stage.attention is not None:
                attention, first = stage.attention.component, stage.attention.receivers.start
                of_q, _, of_v = attention.channels
                saved, past = attention.read(x, read), recording.before(stage.index)
                other = None if run is None or run.attention is None else run.attention.saved
                q = at_positions(other.q, read) if other is not None else None
                q = mixed(saved.q, q, leaf[first : first + of_q.stop, None])
                kv = None if other is None else attention.of_each(other.kv)
                kv = mixed(attention.of_each(saved.kv), kv, leaf[first + of_q.stop : first + of_v.stop, None])
                past = None if past is None else attention.of_each(past)
                made = attention.behind_post(saved, attention.mix(q, kv, past, read))
                stream = at_positions(x, read)
                out = stream + attention.added(made)
            if stage.mlp is not None:
                sent = stage.mlp.component.forward(stream).sent
                base = recording.at_read(ablated.senders[stage.mlp.senders.start], stage.last)
                out = out + mixed(sent, base, leaf[stage.mlp.receivers.start])
            x = out
        values = experiment.values(recording.logits(x[None, :, 0]), recording.reference)[0]
        (grad,) = torch.autograd.grad(values.sum(), leaf)
    return values.detach(), grad.double()


_RUNS: dict[str, Callable[[Experiment, Recording, Annotated[Tensor, "n"]], tuple[Tensor, Tensor]]] = {
    "edge": _by_edges,
    "node": _by_nodes,
}
