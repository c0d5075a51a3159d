"""The first-order methods as data: at which points gradients are taken, by which rules, and how they add up."""

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
from eapcore.graph.scores import EDGE_WHEN, NODE_WHEN, sign_text
from eapcore.kernels.checks import one_of
from eapcore.models.backward_rules import GRADIENT, RELP, Rules
from eapcore.tasks.metrics import Metric

ENDS = {"clean": 1.0, "corrupt": 0.0}
POINTS = ("left", "right", "midpoint", "gauss")
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Pass:
    """One backward pass: where its gradients are taken, and the weight with which they are added.

    alpha: the component's output is corrupt + α (clean − corrupt) and everything behind it follows: for "embed" α = 1
    is the clean run. component: "embed", "a{l}" all heads of a layer, or "m{l}". rules: how the gradient goes back.
    exact_softmax: q and k edges by the attention pattern that they would make, see `exact_patterns`.
    """

    alpha: float
    weight: float
    component: str = "embed"
    rules: Rules = GRADIENT
    exact_softmax: bool = False

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
    start from. reduce: "pair" and "position" keep sums for each. absolute: sums for each pair, and those of a pass
    apart. metric: what a dry run makes of the logits, None for as little as any metric.
    """

    passes: tuple[Pass, ...] = (Pass(1.0, 1.0),)
    corrupt: bool = True
    reduce: str = "all"
    absolute: bool = False
    metric: Metric | None = None

    @property
    def origins(self) -> tuple[float | None, ...]:
        """For each pass the run that it starts from, clean 1 or corrupt 0; None if it makes all of its own."""
        return tuple(None if step.end == 0.0 and not self.corrupt else step.end for step in self.passes)

    def alike(self, done: int) -> int:
        """How many of the passes behind the first `done` make all of their own activations, up to one that does not."""
        behind = self.origins[done:]
        return next((n for n, origin in enumerate(behind) if origin is not None), len(behind))

    def grouped(self, together: Callable[[int], int]) -> list[int]:
        """How many passes, in order, run as one batch; together: how many of so many that are alike."""
        groups: list[int] = []
        while (done := sum(groups)) < len(self.passes):
            groups.append(together(self.alike(done)))
        return groups


@dataclass(frozen=True, slots=True)
class Recipe:
    """A method with all its parameters.

    passes: the backward passes. absolute: add |score of a pair|, not the score; a score is then divided by the number
    of passes that reach its receiver instead of being weighted. described: what a score file says of it. sign: the
    scores' convention in words.
    """

    passes: tuple[Pass, ...]
    described: dict[str, Any]
    absolute: bool = False
    sign: str = ""

    @property
    def exact_softmax(self) -> bool:
        return any(step.exact_softmax for step in self.passes)

    def planned(self, ablation: str, reduce: str, metric: Metric | None = None) -> Passes:
        """What the run and the memory of a batch depend on."""
        return Passes(self.passes, ablation == "corrupt", reduce, self.absolute, metric)

    def reached(self, graph: Graph) -> Tensor:
        """int64 [S + 1], how many passes have a gradient at what a component reads; the last entry is the logits'."""
        components = ["embed"]
        for layer in range(graph.n_layers):
            components += [f"a{layer}"] * graph.n_heads + [f"m{layer}"] * graph.has_mlp
        cut = [step.rules.cut for step in self.passes]
        return torch.tensor([sum(name not in c for c in cut) for name in [*components, "logits"]], device="cpu")


@dataclass(frozen=True, slots=True)
class Options:
    """What a caller chose of the methods' parameters; None is the method's own default."""

    gradient_at: str | None = None
    steps: int | None = None
    points: str | Points | None = None
    rules: Rules | None = None


def gradient_points(steps: int, points: str | Points) -> list[tuple[float, float]]:
    """(α, weight) of a rule, from corrupt α = 0 to clean α = 1, or the given ones, checked; see `attribute`."""
    if not isinstance(points, str):
        try:
            given = [(float(alpha), float(weight)) for alpha, weight in points]
        except (TypeError, ValueError):
            given = []
        if not all(map(math.isfinite, chain(*given))) or not abs(sum(weight for _, weight in given) - 1) <= 1e-6:
            raise ValueError(
                f"points must be {', '.join(POINTS)} or a list of (α, weight), finite and with weights that sum to 1, "
                f"got {points!r}"
            )
        return given
    one_of("points", points, POINTS)
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"steps must be a positive integer, got {steps!r}")
    if points == "gauss":
        nodes, weights = np.polynomial.legendre.leggauss(steps)
        return [((1 + float(x)) / 2, float(w) / 2) for x, w in zip(nodes, weights, strict=True)]
    shift = {"left": 0.0, "right": 1.0, "midpoint": 0.5}[points]
    return [((k + shift) / steps, 1 / steps) for k in range(steps)]


def components(graph: Graph) -> list[str]:
    """The embedding, and each layer's heads together and MLP, in the order in which they run."""
    layers = [[f"a{layer}"] + [f"m{layer}"] * graph.has_mlp for layer in range(graph.n_layers)]
    return ["embed", *(name for layer in layers for name in layer)]


def _one_gradient(options: Options, graph: Graph) -> Recipe:
    where = "clean" if options.gradient_at is None else options.gradient_at
    one_of("gradient_at", where, tuple(ENDS))
    return Recipe((Pass(ENDS[where], 1.0),), {"gradient_at": where})


def _both_ends(options: Options, graph: Graph) -> Recipe:
    return Recipe((Pass(1.0, 0.5), Pass(0.0, 0.5)), {})


def _path(options: Options, rule: str, steps: int) -> tuple[list[tuple[float, float]], dict[str, Any]]:
    """The points of an integral, with a method's own rule and steps where none were chosen, and their description."""
    points = rule if options.points is None else options.points
    at = gradient_points(steps if options.steps is None else options.steps, points)
    if options.steps is not None and not isinstance(points, str):
        raise ValueError(f"steps belong to a rule, but points give their own {len(at)}: leave one of the two out")
    return at, {"rule": points if isinstance(points, str) else "given", "steps": len(at)}


def _inputs(options: Options, graph: Graph) -> Recipe:
    at, described = _path(options, "gauss", 4)
    return Recipe(tuple(Pass(alpha, weight) for alpha, weight in at), described)


def _activations(options: Options, graph: Graph) -> Recipe:
    at, described = _path(options, "right", 5)
    names = components(graph)
    passes = [
        Pass(alpha, weight / len(names), name, Rules(cut=frozenset({name}) - {"embed"}))
        for name in names
        for alpha, weight in at
    ]
    return Recipe(tuple(passes), described | {"components": names})


def _relevance(options: Options, graph: Graph) -> Recipe:
    rules = RELP if options.rules is None else options.rules
    if not isinstance(rules, Rules):
        raise ValueError(f"rules must be a Rules, e.g. Rules(norm='frozen'), got {rules!r}")
    return Recipe((Pass(1.0, 1.0, rules=rules),), {"rules": _described(rules)})


def _exact_softmax(options: Options, graph: Graph) -> Recipe:
    return Recipe((Pass(1.0, 1.0, exact_softmax=True),), {"exact_softmax": True})


def _dropped(options: Options, graph: Graph) -> Recipe:
    if graph.n_layers < 2:
        raise ValueError("dropping one layer's gradient at a time needs at least two layers, this model has one")
    cuts = [frozenset({f"a{layer}"} | ({f"m{layer}"} if graph.has_mlp else set())) for layer in range(graph.n_layers)]
    passes = tuple(Pass(1.0, 1.0, rules=Rules(cut=cut)) for cut in cuts)
    described = {
        "sign": "absolute: the mean of |score| over pairs and passes",
        "dropped": [sorted(cut) for cut in cuts],
    }
    return Recipe(passes, described, absolute=True)


def _dropped_exact_softmax(options: Options, graph: Graph) -> Recipe:
    made = _dropped(options, graph)
    passes = tuple(replace(step, exact_softmax=True) for step in made.passes)
    return replace(made, passes=passes, described=made.described | {"exact_softmax": True})


@dataclass(frozen=True, slots=True)
class Method:
    """How a method's recipe is made, which options it takes, and whether ablations without prompts suit it."""

    make: Callable[[Options, Graph], Recipe]
    options: frozenset[str] = frozenset()
    ablations: bool = True


METHODS: dict[str, Method] = {
    "eap": Method(_one_gradient, frozenset({"gradient_at"})),
    "eap-ig": Method(_inputs, frozenset({"steps", "points"}), ablations=False),
    "clean-corrupt": Method(_both_ends, ablations=False),
    "eap-ig-activations": Method(_activations, frozenset({"steps", "points"})),
    "relp": Method(_relevance, frozenset({"rules"})),
    "qk-fix": Method(_exact_softmax),
    "grad-drop": Method(_dropped),
    "atp-star": Method(_dropped_exact_softmax),
}
LEVELS = ("edge", "node", "neuron")
_UNSIGNED = "score = mean over pairs and backward passes of |predicted change of the metric| when {}; it has no sign"


def recipe(
    method: str, graph: Graph, options: Options, *, ablation: str = "corrupt", level: str = "edge", reduce: str = "all"
) -> Recipe:
    """A method's recipe, with everything that was chosen in its description.

    Raises:
        ValueError: an unknown method or option, or one that does not go with the others.
    """
    one_of("method", method, tuple(METHODS))
    one_of("level", level, LEVELS)
    chosen = METHODS[method]
    for name in ("gradient_at", "steps", "points", "rules"):
        if name not in chosen.options and getattr(options, name) is not None:
            takes = ", ".join(sorted(chosen.options)) or "none of its own"
            raise ValueError(f"the method {method} has no option {name}: it takes {takes}")
    made = chosen.make(options, graph)
    if ablation != "corrupt" and (not chosen.ablations or options.gradient_at == "corrupt"):
        raise ValueError(
            f"ablation {ablation!r} has no prompt to take gradients at, as {method} with these options does: use "
            f"{', '.join(name for name, other in METHODS.items() if other.ablations)} with gradients at the clean run"
        )
    if made.exact_softmax and level != "edge":
        raise ValueError(f"the method {method} treats q and k edges apart, so level must be 'edge', got {level!r}")
    if (made.absolute or made.exact_softmax) and reduce == "position":
        raise ValueError(
            f"the method {method} is no sum over positions, so reduce must be 'all' or 'pair', got 'position'"
        )
    total: dict[float, float] = {}
    for step in made.passes:
        total[step.alpha] = total.get(step.alpha, 0.0) + step.weight
    everything = sum(total.values())  # 1, but where passes are not weighted
    points = [[alpha, weight / everything] for alpha, weight in total.items()]
    described = {"name": method, "level": level, "ablation": {"name": ablation}, "points": points} | made.described
    when = EDGE_WHEN if level == "edge" else NODE_WHEN
    sign = _UNSIGNED.format(when) if made.absolute else sign_text("score", "predicted", when)
    return replace(made, described=described, sign=sign)


def _described(rules: Rules) -> dict[str, Any]:
    return {"norm": rules.norm, "activation": rules.activation, "attention": rules.attention}
