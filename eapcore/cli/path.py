"""eapcore path: patch along chosen paths and measure the metric."""

from __future__ import annotations

import argparse

from eapcore.cli.inputs import find_ablation, prepare
from eapcore.cli.options import Command, add_out, add_resume, add_task, names
from eapcore.cli.output import Progress, check_out, heading, runs, write


def add(command: Command) -> None:
    """Add the command and its options."""
    parser = command("path", run, "Patch along chosen paths and measure the metric.")
    add_task(parser)
    parser.add_argument(
        "--path",
        action="append",
        metavar="PATH",
        help="e.g. 'a0.h1->a1.h0<q>->logits'; may be given again (default: by --senders and --receivers)",
    )
    parser.add_argument("--senders", type=names, metavar="A,B", help="instead: from these senders … (default: none)")
    parser.add_argument(
        "--receivers",
        type=names,
        metavar="A,B",
        help="… to what these receivers read, with all behind them following (default: none)",
    )
    parser.add_argument(
        "--through",
        type=names,
        metavar="A,B",
        help="components in between that pass it on, e.g. all MLPs (default: none, what is sent directly)",
    )
    add_resume(parser)
    add_out(parser, "path.json")


def run(args: argparse.Namespace) -> None:
    """Patch along the paths."""
    from eapcore.patching.paths import path_patch, routes

    check_out(args)
    if (args.path is None) == (args.senders is None) or (args.senders is None) != (args.receivers is None):
        raise ValueError("give --path, or --senders and --receivers")
    if args.path is not None and args.through is not None:
        raise ValueError("a --path names all that it passes: --through goes with --senders and --receivers")
    model, pairs, metric = prepare(args)
    if args.path is not None:
        senders, edges = list(dict.fromkeys(path.split("->")[0] for path in args.path)), args.path
    else:
        senders, edges = args.senders, routes(model.graph, args.senders, args.receivers, through=args.through or ())
    options = {"ablation": find_ablation(args, model, pairs), "batch_size": args.batch_size}
    options |= {"distributed": args.distributed, "resume": args.resume}
    with Progress("patching", len(pairs)) as progress:
        result = path_patch(model, pairs, metric, senders, edges, progress=progress, **options)
    write(args, result)
    print(heading(model, pairs, metric))
    print(f"patched  {', '.join(result.senders)} along {result.edges.n_edges} edges: effect {result.effect:.6g}")
    print(runs(args, metric, {"clean": result.clean, "patched": result.patched, "corrupt": result.corrupt}))
    print(f"\nwrote    {args.out}")
