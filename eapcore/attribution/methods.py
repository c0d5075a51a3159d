"""The first-order methods as data: at which points gradients are taken, by which rules, which parts are exact."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eapcore.graph.graph import Graph
from eapcore.graph.scores import EDGE_WHEN, NO_SIGN, NODE_WHEN, sign_text
from eapcore.kernels.checks import one_of, short_repr
from eapcore.models.backward_rules import GIM, GRADIENT, RELP, Rules
from eapcore.tasks.metrics import Metric

ENDS = {"clean": 1.0, "corrupt": 0.0}
POINTS = ("left", "right", "midpoint", "gauss")
Points = Sequence[tuple[float, float]]
QK = ("gradient", "exact")
EXACT = ("logits", "mlp", "q", "k", "v")


@dataclass(frozen=True, slots=True)
class Pass:
    """One backward pass: where its gradients are taken, and the weight with which they are added.

    alpha: the component's output is corrupt + α (clean − corrupt) and everything behind it follows: for "embed" α = 1
    is the clean run. component: "embed", "a{l}" all heads of a layer, or "m{l}". rules: how the gradient goes back.
    exact_softmax: q and k edges by the attention pattern that they would make, see `exact_patterns`. spread: with which
    sign it counts in how far apart the points' scores lie.
    """

    alpha: float
    weight: float
    component: str = "embed"
    rules: Rules = GRADIENT
    exact_softmax: bool = False
    spread: int = 0

    @property
    def end(self) -> float | None:
        """The run, clean 1 or corrupt 0, from whose activations this pass starts; None if it makes all of its own."""
        if self.component != "embed":
            return 1.0
        return self.alpha if self.alpha in ENDS.values() else None


@dataclass(frozen=True, slots=True)
class Passes:
    """The backward passes of a method, and what else decides how a batch of it runs.

    passes: one after the other. corrupt: senders are ablated to what they send on the corrupt run, which passes may
    start from. reduce: "pair" and "position" keep sums for each. absolute: sums for each pair, and those of passes that
    drop the same gradients apart. exact: the receivers whose edges are patched instead, see `exact_edges`. by_sender:
    of each sender the sum over its edges. metric: what a dry run makes of the logits, None for as little as any metric.
    statistics: those over pairs are kept, from each pair's scores.
    """

    passes: tuple[Pass, ...] = (Pass(1.0, 1.0),)
    corrupt: bool = True
    reduce: str = "all"
    absolute: bool = False
    exact: tuple[int, ...] = ()
    by_sender: bool = False
    metric: Metric | None = None
    statistics: bool = False

    @property
    def origins(self) -> tuple[float | None, ...]:
        """For each pass the run that it starts from, clean 1 or corrupt 0; None if it makes all of its own."""
        return tuple(None if step.end == 0.0 and not self.corrupt else step.end for step in self.passes)

    def alike(self, done: int) -> int:
        """How many of the passes behind the first `done` go back alike from activations all of their own, up to one
        that does not; none where patterns are made exactly, or passes told apart, of one run at a time."""
        first, behind = self.passes[done], zip(self.passes[done:], self.origins[done:], strict=True)
        if first.exact_softmax or self.spread:
            return 0
        others = (n for n, (step, origin) in enumerate(behind) if origin is not None or step.rules != first.rules)
        return next(others, len(self.passes) - done)

    @property
    def spread(self) -> bool:
        """Whether the scores' difference between the first and the last point is kept."""
        return any(step.spread for step in self.passes)

    def grouped(self, together: Callable[[int], int]) -> list[int]:
        """How many passes, in order, run as one batch; together: how many of so many that are alike."""
        groups: list[int] = []
        while (done := sum(groups)) < len(self.passes):
            groups.append(together(self.alike(done)))
        return groups

    def apart(self, done: int) -> bool:
        """Whether what the first `done` passes made is no sum with what the next one makes."""
        return done == len(self.passes) or self.passes[done].rules.cut != self.passes[done - 1].rules.cut


@dataclass(frozen=True, slots=True)
class Recipe:
    """A method with all its parameters.

    passes: the backward passes. absolute: add |score of a pair|, not the score. dropped: a score is divided by the
    number of dropped layers whose gradients leave its receiver one. exact: the receivers whose edges are patched
    instead of estimated. described: what a score file says of it. sign: the scores' convention in words. pruning: what
    is scored are nodes, "raw" or "normalised" by layer, and edges by their ends, see `pruning`; "" for all others.
    """

    passes: tuple[Pass, ...]
    described: dict[str, Any]
    absolute: bool = False
    sign: str = ""
    exact: tuple[int, ...] = ()
    pruning: str = ""
    dropped: bool = False

    @property
    def exact_softmax(self) -> bool:
        return any(step.exact_softmax for step in self.passes)

    @property
    def by_ends(self) -> bool:
        """Whether edges are scored by their ends, which are what is scored of a batch."""
        return bool(self.pruning) and self.described["level"] == "edge"

    @property
    def by_edge(self) -> bool:
        """Whether a node's score can only be the sum of its edges' scores."""
        return self.exact_softmax or bool(self.exact)

    def planned(self, ablation: str, reduce: str, metric: Metric | None = None, *, statistics: bool = False) -> Passes:
        """What the run and the memory of a batch depend on."""
        by_sender = self.by_edge and self.described["level"] == "node"
        reduce = "pair" if statistics and reduce == "all" else reduce
        return Passes(
            self.passes, ablation == "corrupt", reduce, self.absolute, self.exact, by_sender, metric, statistics
        )

    def reached(self, graph: Graph) -> Tensor:
        """int64 [S + 1], how many cuts leave a gradient at what a component reads; the last entry is the logits'."""
        components = ["embed"]
        for layer in range(graph.n_layers):
            components += [f"a{layer}"] * graph.n_heads + [f"m{layer}"] * graph.has_mlp
        cut = {step.rules.cut for step in self.passes}
        return torch.tensor([sum(name not in c for c in cut) for name in [*components, "logits"]], device="cpu")


@dataclass(frozen=True, slots=True)
class Options:
    """What a caller chose of the methods' parameters; None is the method's own default. See `attribute`."""

    gradient_at: str | float | None = None
    steps: int | None = None
    points: str | Points | None = None
    rules: Rules | None = None
    qk: str | None = None
    exact: str | Sequence[str] | None = None
    spread: bool = False


_MOST_STEPS, _MOST_GAUSS = 10_000, 1_000  # the nodes of the latter are eigenvalues of a [steps, steps] matrix


def gradient_points(steps: int, points: str | Points) -> list[tuple[float, float]]:
    """(α, weight) of a rule, from corrupt α = 0 to clean α = 1, or the given ones, checked; see `attribute`."""
    if not isinstance(points, str):
        try:
            given = [(float(alpha), float(weight)) for alpha, weight in points]
        except (TypeError, ValueError):
            given = []
        sound = all(map(math.isfinite, chain(*given))) and all(0 <= alpha <= 1 for alpha, _ in given)
        if not sound or len(given) > _MOST_STEPS or not abs(sum(weight for _, weight in given) - 1) <= 1e-6:
            got = repr(points)
            raise ValueError(
                f"points must be {', '.join(POINTS)} or a list of (α, weight), at most {_MOST_STEPS}, α from corrupt 0 "
                f"to clean 1, and finite weights that sum to 1, got {got if len(got) < 200 else f'{got[:200]}…'}"
            )
        return given
    one_of("points", points, POINTS)
    if not isinstance(steps, int | np.integer) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"steps must be a positive integer, got {steps!r}")
    most = _MOST_GAUSS if points == "gauss" else _MOST_STEPS
    if steps > most:
        raise ValueError(f"steps must be at most {most} by the rule {points}, got {steps}: each is a run of the model")
    if points == "gauss":
        nodes, weights = np.polynomial.legendre.leggauss(steps)
        return [((1 + float(x)) / 2, float(w) / 2) for x, w in zip(nodes, weights, strict=True)]
    shift = {"left": 0.0, "right": 1.0, "midpoint": 0.5}[points]
    return [((k + shift) / steps, 1 / steps) for k in range(steps)]


def components(graph: Graph) -> list[str]:
    """The embedding, and each layer's heads together and MLP, in the order in which they run."""
    layers = [[f"a{layer}"] + [f"m{layer}"] * graph.has_mlp for layer in range(graph.n_layers)]
    return ["embed", *(name for layer in layers for name in layer)]


@dataclass(frozen=True, slots=True)
class Method:
    """A choice of points, of rules, of how q and k are treated and of exact edges; each can be chosen anew.

    points: a rule with its number of steps, or (α, weight) of each. replaced: what is at the point: "inputs", the
    embedding; "components", each component in turn. dropped: one layer's gradient at a time, and absolute scores.
    exact: out of EXACT, those that a model has. pruning: of `Recipe`, with absolute scores too.
    """

    points: str | Points = ((1.0, 1.0),)
    steps: int | None = None
    replaced: str = "inputs"
    rules: Rules = GRADIENT
    qk: str = "gradient"
    dropped: bool = False
    exact: tuple[str, ...] = ()
    pruning: str = ""

    @property
    def ablations(self) -> bool:
        """Whether ablations without prompts suit its own points."""
        return isinstance(self.points, str) or all(alpha != ENDS["corrupt"] for alpha, _ in self.points)


METHODS: dict[str, Method] = {
    "eap": Method(),
    "hybrid": Method(((0.75, 1.0),), exact=("logits", "mlp")),
    "eap-ig": Method("gauss", 4),
    "clean-corrupt": Method(((1.0, 0.5), (0.0, 0.5))),
    "eap-ig-activations": Method("right", 5, replaced="components"),
    "relp": Method(rules=RELP),
    "gim": Method(rules=GIM),
    "qk-fix": Method(qk="exact"),
    "grad-drop": Method(dropped=True),
    "atp-star": Method(dropped=True, qk="exact"),
    "hisp": Method(pruning="normalised"),
    "hisp-raw": Method(pruning="raw"),
}
LEVELS = ("edge", "node", "neuron")
# Other tools' names of methods, and ours.
_WORDS = {
    "eap-ig-inputs": "'eap-ig', with steps= for ig_steps and points='left' for the same points",
    "ig": "'eap-ig'",
    "integrated-gradients": "'eap-ig'",
    "clean-corrupted": "'clean-corrupt'",
    "attribution-patching": "'eap'",
    "atp": "'eap'",
    "atp*": "'atp-star'",
    "denoising": "'eap' with gradient_at='corrupt'",
    "noising": "'eap' with gradient_at='clean'",
    "head-importance": "'hisp'",
    "16h": "'hisp'",
    "exact": "eapcore.patching.edges.patch_edges, the command patch",
    "activation-patching": "eapcore.patching.edges.patch_edges, the command patch",
    "patching": "eapcore.patching.edges.patch_edges, the command patch",
    "acdc": "eapcore.search.acdc.acdc, the command acdc",
    "subnetwork-probing": "eapcore.search.subnetwork_probing.subnetwork_probing, the command probe",
    "peap": "eapcore.attribution.positions.attention_edges, level 'attention' of the command attribute",
    "flow-routes": "eapcore.attribute, or eapcore.attribution.flow_routes.flow_routes",
    "information-flow-routes": "eapcore.attribute with 'flow-routes'",
}
# Other tools' names of options of `attribute`, and ours.
OPTIONS = {
    "ig_steps": "steps",
    "n_steps": "steps",
    "num_steps": "steps",
    "intervention": "ablation",
    "intervention_dataloader": "reference",
    "reference_pairs": "reference",
    "dataloader": "task",
    "quiet": "progress",
}
_UNSIGNED = "score = mean over pairs and backward passes of |predicted change of the metric| when {}; " + NO_SIGN
_PRUNED = "score = mean over pairs of |predicted change of the metric| when {} is ablated{}; " + NO_SIGN
_NORMALISED = ", over the norm of those of its layer"
_ENDS = "the less important end of the edge, a q, k or v activation or what an MLP sends,"


def recipe(
    method: str, graph: Graph, options: Options, *, ablation: str = "corrupt", level: str = "edge", reduce: str = "all"
) -> Recipe:
    """A method's recipe, with everything that was chosen in its description.

    Raises:
        ValueError: an unknown method or option, or one that does not go with the others.
    """
    one_of("method", method, tuple(METHODS), _WORDS)
    one_of("level", level, LEVELS)
    preset = METHODS[method]
    at, described = _where(method, preset, options)
    rules = preset.rules if options.rules is None else options.rules
    if not isinstance(rules, Rules):
        raise ValueError(f"rules must be a Rules, e.g. Rules(norm='frozen'), got {rules!r}")
    if (preset.dropped or preset.pruning) and rules.cut:
        why = "drops gradients itself" if preset.dropped else "scores every node by its gradient"
        raise ValueError(f"{method} {why}, so rules.cut must be empty, got {sorted(rules.cut)}")
    qk = preset.qk if options.qk is None else options.qk
    one_of("qk", qk, QK)
    flattened = rules.temperature != 1 or (rules.products == "halved" and rules.attention == "gradient")
    if qk == "exact" and flattened:
        raise ValueError(
            "a temperature and halved products are rules for the gradients of q and k, which qk='exact' does not take: "
            "choose one of the two"
        )
    kinds = _exact_kinds(preset, options.exact, graph)
    if rules != GRADIENT or options.rules is not None:
        described["rules"] = _described(rules)
    if qk == "exact":
        described["exact_softmax"] = True
    if kinds:
        described["exact"] = list(kinds)
    own_points = options.points is None and options.gradient_at is None
    if ablation != "corrupt" and (options.gradient_at == "corrupt" or (own_points and not preset.ablations)):
        raise ValueError(
            f"ablation {ablation!r} has no prompt to take gradients at, as {method} with these options does: use "
            f"{', '.join(name for name, other in METHODS.items() if other.ablations)}, or other points"
        )
    if preset.pruning:
        _check_pruning(method, level, ablation, qk == "exact" or bool(kinds))
    if (preset.dropped or preset.pruning) and reduce == "position":
        raise ValueError(
            f"the method {method} is no sum over positions, so reduce must be 'all' or 'pair', got 'position'"
        )
    if reduce == "position" and {"k", "v"} & set(kinds):
        raise ValueError(
            "the keys and values of an exact edge change together at all positions, so with reduce='position' exact "
            f"must be some of logits, mlp and q, got {', '.join(kinds)}"
        )
    check_ablation(level, ablation)
    if level == "neuron" and (qk == "exact" or kinds):
        raise ValueError(
            f"exact patterns and exact edges are of all that a sender sends, so level must be 'edge' or 'node' with "
            f"{method} and these options, got 'neuron'"
        )
    if options.spread and (
        preset.dropped or preset.pruning or preset.replaced != "inputs" or len(at) < 2 or level != "edge"
    ):
        raise ValueError(
            "spread is the difference of edges' scores between the first and the last of several points, which "
            f"{method} with these options does not have: give points, e.g. [(0.5, 0.5), (1, 0.5)], and level 'edge'"
        )
    if options.spread and not all(weight for _, weight in at):
        raise ValueError(f"with spread no point may have the weight 0, got {at}")
    passes: list[Pass] = []
    if preset.replaced == "components":
        described["components"] = names = components(graph)
        for name in names:
            own = replace(rules, cut=rules.cut | (frozenset({name}) - {"embed"}))
            passes += [Pass(alpha, weight / len(names), name, own, qk == "exact") for alpha, weight in at]
    else:
        for cut in _cuts(graph) if preset.dropped else [rules.cut]:
            passes += [Pass(alpha, weight, "embed", replace(rules, cut=cut), qk == "exact") for alpha, weight in at]
    if options.spread:
        passes = [replace(passes[0], spread=1), *passes[1:-1], replace(passes[-1], spread=-1)]
    if preset.dropped:
        described["sign"] = "absolute: the mean of |score| over pairs and passes"
        described["dropped"] = [sorted(cut) for cut in _cuts(graph)]
    total: dict[float, float] = {}
    for step in passes:
        total[step.alpha] = total.get(step.alpha, 0.0) + step.weight
    everything = sum(total.values())  # 1, but where passes are not weighted
    points = [[alpha, weight / everything] for alpha, weight in total.items()]
    described = {"name": method, "level": level, "ablation": {"name": ablation}, "points": points} | described
    when = EDGE_WHEN if level == "edge" else NODE_WHEN
    sign = _UNSIGNED.format(when) if preset.dropped else sign_text("score", "predicted", when)
    if preset.pruning:
        by = _NORMALISED if preset.pruning == "normalised" else ""
        sign = _PRUNED.format(_ENDS if level == "edge" else "what the node sends", by)
        described["normalised"] = preset.pruning == "normalised"
    absolute, exact = preset.dropped or bool(preset.pruning), exact_receivers(graph, kinds)
    return Recipe(tuple(passes), described, absolute, sign, exact, preset.pruning, preset.dropped)


def check_ablation(level: str, ablation: str) -> None:
    """ValueError for an ablation that does not suit a level, before it is made."""
    if level == "neuron" and ablation == "optimal":
        raise ValueError("constants are optimal for what is sent, not for hidden units: level must not be 'neuron'")


def _check_pruning(method: str, level: str, ablation: str, by_edge: bool) -> None:
    """ValueError for what importance scores of nodes do not have."""
    if by_edge:
        raise ValueError(f"{method} scores nodes: qk must be 'gradient' and exact 'none'")
    if level == "neuron":
        raise ValueError(f"{method} scores nodes, and edges by their ends, so level must be 'edge' or 'node'")
    if level == "edge" and ablation not in ("corrupt", "zero"):
        raise ValueError(
            f"the ends of an edge are activations of q, k and v too, of which no mean is taken: with {method} of edges "
            f"ablation must be 'corrupt' or 'zero', got {ablation!r}"
        )


def _where(method: str, preset: Method, options: Options) -> tuple[list[tuple[float, float]], dict[str, Any]]:
    """(α, weight) of the points at which gradients are taken, and what a file says of them."""
    where, rule = options.gradient_at, options.points
    if where is not None and (options.steps is not None or rule is not None):
        raise ValueError("gradient_at is one point, and points and steps are several: leave one of the two out")
    if where is not None:
        number = isinstance(where, int | float) and not isinstance(where, bool) and 0 <= where <= 1
        if not number and not (isinstance(where, str) and where in ENDS):
            raise ValueError(
                f"gradient_at must be {', '.join(ENDS)}, or a number from corrupt 0 to clean 1, got {short_repr(where)}"
            )
        return [(ENDS[where] if isinstance(where, str) else float(where), 1.0)], {"gradient_at": where}
    rule = preset.points if rule is None else rule
    steps = preset.steps if options.steps is None else options.steps
    if isinstance(rule, str):
        if steps is None and rule in POINTS:
            raise ValueError(f"points by the rule {rule} need steps, their number")
        return gradient_points(1 if steps is None else steps, rule), {"rule": rule, "steps": steps}
    at = gradient_points(1, rule)
    if options.steps is not None:
        if options.points is None:
            or_ = " or ".join(POINTS)
            raise ValueError(f"the method {method} has points of its own: steps need a rule, {or_}")
        raise ValueError(f"steps belong to a rule, but points give their own {len(at)}: leave one of the two out")
    if options.points is not None:
        return at, {"rule": "given", "steps": len(at)}
    return at, {"gradient_at": "clean"} if method == "eap" else {}


def _exact_kinds(preset: Method, chosen: str | Sequence[str] | None, graph: Graph) -> tuple[str, ...]:
    """Which kinds of edges are patched, out of EXACT in that order; ValueError for what a model does not have."""
    there = [kind for kind in EXACT if kind == "logits" or (graph.n_layers and (kind != "mlp" or graph.has_mlp))]
    if chosen is None:
        return tuple(kind for kind in there if kind in preset.exact)
    names = [name.strip() for name in chosen.split(",")] if isinstance(chosen, str) else list(chosen)
    if names in (["none"], ["last"]):
        return tuple(there) if names == ["last"] else ()
    for name in names:
        if name not in there:
            raise ValueError(
                f"exact must be none, last (all edges into the last layer and the logits) or some of {', '.join(there)}"
                f", got {name!r}"
            )
    return tuple(kind for kind in there if kind in names)


def exact_receivers(graph: Graph, kinds: Sequence[str]) -> tuple[int, ...]:
    """The receivers of the last layer and the logits that are of some kinds out of EXACT, in the graph's order."""
    names, last = graph.receiver_names, f"{graph.n_layers - 1}"
    found = []
    for receiver, name in enumerate(names):
        kind = "logits" if name == "logits" else "mlp" if name == f"m{last}" else ""
        if name.startswith(f"a{last}."):
            kind = name[-2]
        if kind in kinds:
            found.append(receiver)
    return tuple(found)


def _cuts(graph: Graph) -> list[frozenset[str]]:
    """The components of each layer, whose gradients are dropped together."""
    if graph.n_layers < 2:
        raise ValueError("dropping one layer's gradient at a time needs at least two layers, this model has one")
    return [frozenset({f"a{layer}"} | ({f"m{layer}"} if graph.has_mlp else set())) for layer in range(graph.n_layers)]


def _described(rules: Rules) -> dict[str, Any]:
    """The rules, of those that are seldom others only what is chosen."""
    found: dict[str, Any] = {"norm": rules.norm, "activation": rules.activation, "attention": rules.attention}
    found |= {name: x for name in ("temperature", "products") if (x := getattr(rules, name)) != getattr(GRADIENT, name)}
    return found | ({"cut": sorted(rules.cut)} if rules.cut else {})
