"""eapcore attribute: score every edge, node or neuron."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from eapcore.cli.inputs import check_number, find_ablation, prepare_large, score, uncertainty
from eapcore.cli.options import Command, add_method, add_out, add_resume, add_task, add_uncertainty, count, number
from eapcore.cli.output import check_out, enough_prompts, score_table, scored_heading, write


def add(command: Command) -> None:
    """Add the command and its options."""
    parser = command("attribute", run, "Score every edge and write the scores.")
    add_task(parser)
    add_method(parser)
    add_uncertainty(parser)
    parser.add_argument(
        "--level", default="edge", metavar="WHAT", help="edge, node, or neuron: also MLP units and output dimensions"
    )
    parser.add_argument(
        "--reduce", default="all", metavar="HOW", help="all, or pair or position: the file has each one's scores too"
    )
    parser.add_argument(
        "--pairs-out",
        type=Path,
        metavar="FOLDER",
        help="with --reduce pair: write each pair's scores here as they come (default: into the score file, or for a "
        "task file above 32 MiB beside it)",
    )
    printed = parser.add_mutually_exclusive_group()
    printed.add_argument(
        "--top-n", type=count, metavar="N", help="also print the N most important edges or nodes (default: none)"
    )
    printed.add_argument(
        "--threshold", type=number, metavar="X", help="also print those with |score| at least X (default: none)"
    )
    add_resume(parser)
    add_out(parser, "scores.safetensors", "the score file to write")


def run(args: argparse.Namespace) -> None:
    """Score, write, and print what was asked for."""
    from eapcore.graph.scores import EdgeScores
    from eapcore.tasks import PromptPairs

    check_out(args)
    model, pairs, metric = prepare_large(args)
    check_number("--top-n", args.top_n, model, "edges" if args.level == "edge" else "senders")
    ablation = find_ablation(args, model, pairs)
    start = time.perf_counter()
    folder = args.pairs_out
    if folder is None and args.reduce == "pair" and not isinstance(pairs, PromptPairs):
        folder = args.out.with_suffix(".pairs")
    options = {"level": args.level, "reduce": args.reduce, "pairs_to": folder, "uncertainty": uncertainty(args)}
    scores = score(args, model, pairs, metric, ablation=ablation, **options)
    seconds = time.perf_counter() - start
    write(args, scores)
    print(scored_heading(model, pairs if isinstance(pairs, PromptPairs) else pairs.first, scores, seconds))
    shown = args.top_n
    if args.threshold is not None:
        among = scores.scores[scores.mask] if isinstance(scores, EdgeScores) else scores.scores
        shown = int((among.abs() >= args.threshold).sum())
    if shown:
        print(score_table("edge" if args.level == "edge" else "node", scores.top(shown)))
    if shown and not isinstance(scores, EdgeScores) and scores.units is not None:
        largest = scores.units.flatten().abs().sort(descending=True, stable=True).indices[:shown].tolist()
        places = [divmod(i, scores.units.shape[1]) for i in largest]
        print(score_table("unit", [(f"m{layer}[{unit}]", float(scores.units[layer, unit])) for layer, unit in places]))
    print(enough_prompts(scores, shown or min(50, model.graph.n_edges)), end="")
    print(f"wrote    {args.out}" + (f" and {folder}/" if folder is not None else ""))
