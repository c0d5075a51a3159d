"""eapcore acdc: search for a circuit by exact patching from the logits back."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from eapcore.cli.inputs import check_number, find_ablation, load_circuit, load_scores, prepare
from eapcore.cli.options import Command, add_edges, add_resume, add_starts, add_task, number, place, several
from eapcore.cli.output import Progress, check_out, heading, runs, table, write

if TYPE_CHECKING:
    from eapcore.graph.circuit import Circuit


def add(command: Command) -> None:
    """Add the command and its options."""
    parser = command("acdc", run, "Search for a circuit by exact patching from the logits back.")
    add_task(parser, metric="kl")
    add_edges(parser, "where the search starts")
    parser.set_defaults(metric="kl")
    sizes = parser.add_mutually_exclusive_group()
    add_starts(
        sizes,
        "with --scores: how many edges (default: none)",
        "with --scores, instead: all edges with |score| at least X (default: none)",
    )
    parser.add_argument(
        "--threshold",
        type=several(number),
        required=True,
        metavar="X,…",
        help="an edge goes where its loss is less than X; of several starts or thresholds each with each is searched",
    )
    add_resume(parser)
    parser.add_argument("--order", default="latest", metavar="HOW", help="of a receiver's senders: latest or earliest")
    parser.add_argument(
        "--out",
        type=place,
        metavar="FILE",
        help="the circuit file to write, of several searches a .json of them all (default: circuit.json, of several "
        "sweep.json)",
    )


@dataclass(frozen=True, slots=True)
class _Sweep:
    """What several searches found, the starts outermost."""

    circuits: list[Circuit]

    def save(self, path: Path) -> None:
        from eapcore.graph.files import write_json

        write_json(path, "sweep", self)


def run(args: argparse.Namespace) -> None:
    """Search, from each start with each threshold."""
    from eapcore.search.acdc import acdc, prune_sweep

    chosen, thresholds = args.top_n or args.score_threshold, args.threshold
    if (args.scores is None) != (chosen is None):
        raise ValueError("--scores goes together with --top-n or --score-threshold: which edges of which file")
    for threshold in thresholds:
        if not threshold > 0:
            raise ValueError(f"threshold must be positive, got {threshold:g}")
    single = len(thresholds) == 1 and len(chosen or [1]) == 1
    args.out = args.out or Path("circuit.json" if single else "sweep.json")
    check_out(args)
    model, pairs, metric = prepare(args)
    start, scores = load_circuit(args, "circuit", model), None
    sizes = [model.graph.n_edges if start is None else start.n_edges]
    if args.scores is not None:
        scores = load_scores(args, model)
        sizes = args.top_n or [scores.threshold(x).n_edges for x in chosen]
    for asked, size in zip(chosen or [], sizes, strict=False):
        check_number("--top-n", size, model)
        if not size:
            raise ValueError(f"--score-threshold {asked:g} leaves no edge to start from")
    ablation = find_ablation(args, model, pairs)
    options = {"order": args.order, "ablation": ablation, "batch_size": args.batch_size}
    options |= {"distributed": args.distributed}
    began, total = time.perf_counter(), sum(sizes) * len(thresholds)
    found: list[Circuit] = []
    if scores is not None:
        options |= {"score_thresholds": args.score_threshold}
        with Progress("searching", total, "edge") as progress:
            options |= {"progress": progress, "resume": args.resume}
            found = prune_sweep(model, pairs, scores, args.top_n, thresholds, metric, **options)
    for threshold in thresholds if scores is None else ():
        with Progress(f"searching at {threshold:g}", sizes[0], "edge") as progress:
            folder = None if args.resume is None else args.resume / (f"search-{len(found)}" if not single else "")
            options |= {"progress": progress, "resume": folder}
            found.append(acdc(model, pairs, metric, threshold=threshold, start=start, **options))
    seconds = time.perf_counter() - began
    write(args, found[0] if single else _Sweep(found))
    print(heading(model, pairs, metric))
    counts = {key: sum(c.meta["forwards"][key] for c in found) for key in ("decided", "evaluated", "launches")}
    print(
        f"searched {total} edges in {seconds:.2f} s: {counts['decided']} decided by a forward, {counts['evaluated']} "
        f"run in {counts['launches']} launches"
    )
    if not single:
        rows = [
            (start, threshold, c.n_edges, c.prune().n_edges, c.meta["metric"]["circuit"])
            for c, (start, threshold) in zip(found, product(sizes, thresholds), strict=True)
        ]
        print(table(("start", "threshold", "edges", "connected", metric), rows))
        print(f"\nwrote    {args.out}")
        return
    (circuit,) = found
    values = circuit.meta["metric"]
    print(f"circuit  {circuit.n_edges} edges; {circuit.prune().n_edges} connect embed to the logits")
    print(runs(args, metric, {name: values[name] for name in ("clean", "circuit", "corrupt")}))
    print(f"\nwrote    {args.out}")
