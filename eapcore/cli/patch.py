"""eapcore patch"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from eapcore.cli.inputs import _selection, find_ablation, given, prepare
from eapcore.cli.output import Progress, _table, _write, check_out, heading

_EACH, _RUN = "edge × pair", "circuit × pair"  # what patching, and running circuits, counts


def _patch(args: argparse.Namespace) -> None:
    from eapcore.patching.edges import patch_edges
    from eapcore.patching.nodes import patch_nodes

    if args.per_position and not args.nodes:
        raise ValueError("--per-position goes with --nodes")
    if args.nodes and (left := given(args, "circuit", "scores", "top_n", "resume")):
        raise ValueError(f"--nodes patches every sender in one go: leave out {left}, for edges alone")
    if args.out is None:
        args.out = Path("effects.json" if args.nodes else "effects.safetensors")
    check_out(args)
    model, pairs, metric = prepare(args)
    options = {**find_ablation(args, model), "batch_size": args.batch_size}
    edges = _selection(args, model)
    start = time.perf_counter()
    if args.nodes:
        with Progress("patching", model.graph.n_senders * len(pairs), "node × pair") as progress:
            nodes = patch_nodes(model, pairs, metric, per_position=args.per_position, progress=progress, **options)
        print(heading(model, pairs, metric))
        print(f"patched  {len(nodes.nodes)} nodes in {time.perf_counter() - start:.2f} s")
        if args.per_position:
            named = zip(nodes.nodes, nodes.effects.tolist(), strict=True)
            places = [(name, t, effect) for name, row in named for t, effect in enumerate(row)]
            print(_table(("node", "position", "effect"), sorted(places, key=lambda row: -abs(row[2]))[: args.show]))
        else:
            rows = sorted(zip(nodes.nodes, nodes.effects.tolist(), strict=True), key=lambda row: -abs(row[1]))
            print(_table(("node", "effect"), rows[: args.show]))
        _write(nodes, args.out)
        return
    n_edges = model.graph.n_edges if edges is None else edges.n_edges
    with Progress("patching", n_edges * len(pairs), _EACH) as progress:
        effects = patch_edges(model, pairs, metric, edges, progress=progress, resume=args.resume, **options)
    print(heading(model, pairs, metric))
    print(f"patched  {n_edges} edges in {time.perf_counter() - start:.2f} s")
    if args.show:
        print(_table(("edge", "effect"), effects.top(min(args.show, n_edges))))
    _write(effects, args.out)
