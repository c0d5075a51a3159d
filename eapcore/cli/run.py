"""eapcore run"""

from __future__ import annotations

import argparse
import csv
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from eapcore.cli.inputs import check_number, find_ablation, prepare, score
from eapcore.cli.output import Progress, _heading, _score_table, check_writable

if TYPE_CHECKING:
    from eapcore.graph.circuit import Circuit
    from eapcore.graph.scores import EdgeScores


def _run(args: argparse.Namespace) -> None:
    from eapcore.graph.scores import EdgeScores
    from eapcore.patching.circuits import metric_on

    check_writable(args.out)
    model, pairs, name = prepare(args)
    check_number("--top-n", args.top_n, model)
    how = find_ablation(args, model)
    start = time.perf_counter()
    scores = score(args, model, pairs, name, how)
    assert isinstance(scores, EdgeScores)
    seconds = time.perf_counter() - start
    metric = scores.meta["metric"]

    def measure(circuit: Circuit) -> float:
        return metric_on(model, pairs, name, [circuit], batch_size=args.batch_size, **how)[0]

    if args.ablation != "corrupt":
        metric = {**metric, args.ablation: measure(scores.top_n(0))}
    clean, ablated = metric["clean"], metric[args.ablation]

    def kept(value: float) -> float:
        return (value - ablated) / (clean - ablated) + 0.0 if clean != ablated else math.nan

    tried = _circuits(args, scores, measure, kept)
    rule, circuit, pruned, value = tried[-1]
    pruned = _with_meta(pruned, {"metric": {**metric, "circuit": value}})
    args.out.mkdir(parents=True, exist_ok=True)
    scores.save(args.out / "scores.safetensors")
    _write_edges(scores, args.out / "edges.csv")
    pruned.save(args.out / "circuit.json")

    print(_heading(model, pairs, scores, seconds))
    if args.show:
        print(_score_table("edge", scores.top(args.show)))
    print(f"\ncircuit  {rule}; {pruned.n_edges} of {circuit.n_edges} connect embed to the logits")
    print(f"\n{'run':<24}{metric['name']:>12}{'faithfulness':>15}")
    results = [("clean", clean)]
    results += [(f"top {part.n_edges} edges", result) for _, part, _, result in tried[:-1]]
    results += [(f"circuit, {pruned.n_edges} edges", value), (args.ablation, ablated)]
    for run, result in results:
        print(f"{run:<24}{result:>12.4f}{'–' if math.isnan(kept(result)) else format(kept(result), '.3f'):>15}")
    print(f"\nwrote    {args.out}/scores.safetensors, edges.csv, circuit.json")


_SIZES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0)  # of all edges


def _circuits(
    args: argparse.Namespace,
    scores: EdgeScores,
    measure: Callable[[Circuit], float],
    kept: Callable[[float], float],
) -> list[tuple[str, Circuit, Circuit, float]]:
    """The circuits that were tried, the chosen one last: how it was selected, it, what is connected, its metric."""

    def run(rule: str, circuit: Circuit) -> tuple[str, Circuit, Circuit, float]:
        pruned = circuit.prune()
        return rule, circuit, pruned, measure(pruned)

    if args.threshold is not None:
        return [run(f"edges with |score| ≥ {args.threshold:g}", scores.threshold(args.threshold))]
    if args.top_n is not None:
        return [run(f"top {args.top_n} edges by |score|", scores.top_n(args.top_n))]
    tried: list[tuple[str, Circuit, Circuit, float]] = []
    sizes = sorted({max(1, round(share * scores.graph.n_edges)) for share in _SIZES})
    with Progress("running circuits", len(sizes), "circuit") as progress:
        for n in sizes:
            rule = f"top {n} edges by |score|, the first size that keeps {args.faithfulness:g}"
            tried.append(run(rule, scores.top_n(n)))
            progress(len(tried), len(sizes))
            if kept(tried[-1][3]) >= args.faithfulness:
                break
    return tried


def _with_meta(circuit: Circuit, more: dict[str, object]) -> Circuit:
    from dataclasses import replace

    return replace(circuit, meta={**circuit.meta, **more})


def _write_edges(scores: EdgeScores, path: Path) -> None:
    from eapcore.graph.files import replacing

    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["edge", "score"])
        writer.writerows((name, repr(score)) for name, score in scores.top(scores.graph.n_edges))
