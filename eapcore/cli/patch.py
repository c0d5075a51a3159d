"""eapcore patch: what corrupting each edge, or node, really does to the metric."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from eapcore.cli.inputs import find_ablation, given, prepare, selection
from eapcore.cli.options import EACH, Command, add_edges, add_resume, add_task, count, place, positive
from eapcore.cli.output import Progress, check_out, heading, table, write


def add(command: Command) -> None:
    """Add the command and its options."""
    parser = command("patch", run, "Measure what corrupting each edge, or node, really does to the metric.")
    add_task(parser)
    add_edges(parser, "the edges")
    parser.add_argument("--top-n", type=positive, metavar="N", help="with --scores: how many edges (default: none)")
    parser.add_argument("--nodes", action="store_true", help="patch senders instead of edges")
    parser.add_argument("--per-position", action="store_true", help="with --nodes: each position on its own")
    parser.add_argument("--show", type=count, default=15, metavar="N", help="how many of the largest effects to print")
    add_resume(parser)
    parser.add_argument(
        "--out",
        type=place,
        metavar="FILE",
        help="the file to write (default: effects.safetensors, with --nodes effects.json)",
    )


def run(args: argparse.Namespace) -> None:
    """Patch edges, or nodes, and print the largest effects."""
    from eapcore.patching.edges import patch_edges
    from eapcore.patching.nodes import patch_nodes

    if args.per_position and not args.nodes:
        raise ValueError("--per-position goes with --nodes")
    if args.nodes and (left := given(args, "circuit", "scores", "top_n")):
        raise ValueError(f"--nodes patches every sender in one go: leave out {left}, for edges alone")
    if args.out is None:
        args.out = Path("effects.json" if args.nodes else "effects.safetensors")
    check_out(args)
    model, pairs, metric = prepare(args)
    edges = selection(args, model)
    options = {"ablation": find_ablation(args, model, pairs), "batch_size": args.batch_size}
    options |= {"distributed": args.distributed}
    start = time.perf_counter()
    if args.nodes:
        with Progress("patching", model.graph.n_senders * len(pairs), "node × pair") as progress:
            options |= {"per_position": args.per_position, "progress": progress, "resume": args.resume}
            nodes = patch_nodes(model, pairs, metric, **options)
        write(args, nodes)
        print(heading(model, pairs, metric))
        print(f"patched  {len(nodes.nodes)} nodes in {time.perf_counter() - start:.2f} s")
        if args.per_position:
            named = zip(nodes.nodes, nodes.effects.tolist(), strict=True)
            places = [(name, t, effect) for name, row in named for t, effect in enumerate(row)]
            print(table(("node", "position", "effect"), sorted(places, key=lambda row: -abs(row[2]))[: args.show]))
        else:
            rows = sorted(zip(nodes.nodes, nodes.effects.tolist(), strict=True), key=lambda row: -abs(row[1]))
            print(table(("node", "effect"), rows[: args.show]))
        print(f"\nwrote    {args.out}")
        return
    n_edges = model.graph.n_edges if edges is None else edges.n_edges
    with Progress("patching", n_edges * len(pairs), EACH) as progress:
        effects = patch_edges(model, pairs, metric, edges, progress=progress, resume=args.resume, **options)
    write(args, effects)
    print(heading(model, pairs, metric))
    print(f"patched  {n_edges} edges in {time.perf_counter() - start:.2f} s")
    if args.show:
        print(table(("edge", "effect"), effects.top(min(args.show, n_edges))))
    print(f"\nwrote    {args.out}")
