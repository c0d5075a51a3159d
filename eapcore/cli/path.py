"""eapcore path"""

from __future__ import annotations

import argparse

from eapcore.cli.inputs import find_ablation, prepare
from eapcore.cli.output import Progress, _runs, _write, check_out, heading


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _path(args: argparse.Namespace) -> None:
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
    options = {**find_ablation(args, model), "batch_size": args.batch_size}
    with Progress("patching", len(pairs)) as progress:
        result = path_patch(model, pairs, metric, senders, edges, progress=progress, **options)
    print(heading(model, pairs, metric))
    print(f"patched  {', '.join(result.senders)} along {result.edges.n_edges} edges: effect {result.effect:.6g}")
    print(_runs(args, metric, {"clean": result.clean, "patched": result.patched, "corrupt": result.corrupt}))
    _write(result, args.out)
