"""eapcore probe: train a mask on every edge or node."""

from __future__ import annotations

import argparse
import time

from eapcore.cli.inputs import find_ablation, prepare
from eapcore.cli.options import Command, add_out, add_task, count, number, positive
from eapcore.cli.output import Progress, check_out, heading, runs, score_table, write


def add(command: Command) -> None:
    """Add the command and its options."""
    parser = command("probe", run, "Train a mask on every edge or node (subnetwork probing) and score edges by it.")
    add_task(parser, metric="kl")
    parser.set_defaults(metric="kl")
    parser.add_argument(
        "--level", default="edge", metavar="WHAT", help="masks on edges: edge; or on q, k and v and on MLPs: node"
    )
    parser.add_argument(
        "--penalty",
        type=number,
        metavar="X",
        help="what all masks together cost, in the metric's unit (default: 10, with nodes 1)",
    )
    parser.add_argument("--steps", type=positive, metavar="N", help="of Adam, each with all pairs (default: 300)")
    parser.add_argument("--rate", type=number, metavar="X", help="Adam's learning rate (default: 0.05)")
    parser.add_argument("--show", type=count, default=15, metavar="N", help="how many of the top edges to print")
    add_out(parser, "scores.safetensors", "the score file to write")


def run(args: argparse.Namespace) -> None:
    """Train, write the scores, and print what was kept."""
    from eapcore.search.subnetwork_probing import check_options, subnetwork_probing

    check_out(args)
    options = {name: value for name in ("penalty", "steps", "rate") if (value := getattr(args, name)) is not None}
    check_options(level=args.level, seed=args.seed, ablation=args.ablation, **options)
    model, pairs, metric = prepare(args)
    options |= {"ablation": find_ablation(args, model, pairs), "batch_size": args.batch_size}
    options["distributed"] = args.distributed
    start = time.perf_counter()
    with Progress("training", None, "step × pair") as progress:
        scores = subnetwork_probing(
            model, pairs, metric, level=args.level, seed=args.seed, progress=progress, **options
        )
    seconds = time.perf_counter() - start
    write(args, scores)
    print(heading(model, pairs, metric))
    kept, steps, values = scores.threshold(0.5), scores.meta["method"]["steps"], scores.meta["metric"]
    print(
        f"trained  masks of {args.level}s for {steps} steps in {seconds:.2f} s: {kept.n_edges} of "
        f"{model.graph.n_edges} edges are more likely kept than not, {kept.prune().n_edges} of them connected"
    )
    print(runs(args, metric, {name: values[name] for name in ("clean", "masked", "corrupt")}))
    if args.show:
        print(score_table("edge", scores.top(min(args.show, model.graph.n_edges))))
    print(f"\nwrote    {args.out}")
