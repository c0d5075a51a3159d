"""How well every method tells the edges of compiled programs from the others: the area under the ROC."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from eapcore.attribution import METHODS
from eapcore.evaluation.roc import roc, roc_of_circuits
from eapcore.evaluation.screened import attribute
from eapcore.graph.circuit import Circuit
from eapcore.graph.scores import EdgeScores
from eapcore.patching.edges import patch_edges
from eapcore.search.acdc import acdc
from eapcore.search.subnetwork_probing import subnetwork_probing
from eapcore.tasks import PromptPairs
from truth.compiled import Compiled

THRESHOLDS = (0.001, 0.01, 0.1, 0.3, 1.0)
Made = EdgeScores | list[Circuit]
Make = Callable[[Compiled, PromptPairs, str], Made]


def _scores(**how: Any) -> Make:
    return lambda of, pairs, ablation: attribute(of.model, pairs, ablation=ablation, **how)


def _exact(of: Compiled, pairs: PromptPairs, ablation: str) -> EdgeScores:
    return patch_edges(of.model, pairs, ablation=ablation)


def _acdc(of: Compiled, pairs: PromptPairs, ablation: str) -> list[Circuit]:
    return [acdc(of.model, pairs, "logit_diff", threshold=x, ablation=ablation) for x in THRESHOLDS]


def _probing(level: str) -> Make:
    how = {"level": level, "penalty": 1.0}
    return lambda of, pairs, ablation: subnetwork_probing(of.model, pairs, "logit_diff", ablation=ablation, **how)


WAYS: dict[str, Make] = {
    **{name: _scores(method=name) for name in METHODS},
    "at 0.75": _scores(gradient_at=0.75),
    "at 0.75, last layer exact": _scores(gradient_at=0.75, exact="last"),
    "screened 3": _scores(method="screened", budget=3.0),
    "acdc": _acdc,
    "subnetwork probing": _probing("edge"),
    "the same, of nodes": _probing("node"),
    "exact patching": _exact,
}


def area(made: Made, of: Compiled, among: Circuit) -> float:
    """The area that the edges of `among`, which are true, and those that carry nothing make."""
    counted = of.circuit.graph.edge_mask() & ~Circuit.from_edges(of.circuit.graph, list(of.carries)).mask | among.mask
    found = (
        roc(made, among, edges=counted)
        if isinstance(made, EdgeScores)
        else roc_of_circuits(made, among, rule="trapezoid", edges=counted)
    )
    return found.auc


def suits(way: str, of: Compiled, ablation: str) -> bool:
    """Whether a method has scores: there are runs between zeros only by some, and none drops the only layer."""
    method = METHODS.get(way)
    return method is None or (
        (ablation == "corrupt" or method.ablations) and (of.circuit.graph.n_layers > 1 or not method.dropped)
    )


def areas(
    models: Iterable[Compiled], pairs: int, seeds: Iterable[int], ablation: str, ways: Mapping[str, Make] = WAYS
) -> dict[str, dict[str, tuple[float, float]]]:
    """{way: {model: area}} over all edges, and without the true edges that no token reaches; means over draws."""
    found: dict[str, dict[str, tuple[float, float]]] = {way: {} for way in ways}
    for of in models:
        draws = [of.draw(pairs, seed) for seed in seeds]
        for way, make in ways.items():
            if suits(way, of, ablation):
                made = [make(of, draw, ablation) for draw in draws]
                whole, reached = ([area(each, of, among) for each in made] for among in (of.circuit, of.reached))
                found[way][of.name] = statistics.fmean(whole), statistics.fmean(reached)
    return found


def show(found: Mapping[str, Mapping[str, tuple[float, float]]], models: Iterable[Compiled], reached: bool) -> None:
    """One table; reached: the second number too."""
    names, width = [of.name for of in models], max(map(len, found))
    print(f"  {'':<{width}}" + "".join(f"{name:>18}" for name in names))
    for way, row in found.items():
        cells = [" / ".join(f"{x:.3f}" for x in row[name][: 1 + reached]) if name in row else "–" for name in names]
        print(f"  {way:<{width}}" + "".join(f"{cell:>18}" for cell in cells))


def unreached(of: Compiled) -> dict[str, str]:
    """The true edges that other tokens do not change, each with what it carries."""
    kinds = {edge: of.carries[edge] for edge in of.circuit.edges if "tokens" not in of.carries[edge]}
    return {edge: " and ".join(f"{k} ({_few(d)})" for k, d in found.items()) for edge, found in kinds.items()}


def _few(directions: list[str]) -> str:
    return ", ".join(directions if len(directions) < 4 else [directions[0], "…", directions[-1]])
