"""eapcore attribute: score every edge, node or neuron."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any

from eapcore.cli.inputs import check_number, check_scoring, find_ablation, given, prepare_large, score, uncertainty
from eapcore.cli.options import (
    METHOD,
    Command,
    add_method,
    add_out,
    add_resume,
    add_task,
    add_uncertainty,
    count,
    number,
    place,
)
from eapcore.cli.output import (
    Progress,
    check_out,
    enough_prompts,
    heading,
    rounding,
    score_table,
    scored_heading,
    write,
)

if TYPE_CHECKING:
    from eapcore.execution.ablation import Ablation
    from eapcore.models.model import Model
    from eapcore.tasks.pairs import PromptPairs
    from eapcore.tasks.stream import PairStream


def add(command: Command) -> None:
    """Add the command and its options."""
    parser = command("attribute", run, "Score every edge and write the scores.")
    add_task(parser)
    add_method(parser)
    add_uncertainty(parser)
    parser.add_argument(
        "--level",
        default="edge",
        metavar="WHAT",
        help="edge, node, or neuron: also MLP units and output dimensions; or attention: each head's edges from "
        "position to position, by --method eap or peap",
    )
    parser.add_argument(
        "--reduce", default="all", metavar="HOW", help="all, or pair or position: the file has each one's scores too"
    )
    parser.add_argument(
        "--pairs-out",
        type=place,
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
    from eapcore.attribution.methods import check_ablation
    from eapcore.graph.scores import EdgeScores
    from eapcore.tasks import PromptPairs

    check_out(args)
    if args.level == "attention":
        _only_attention(args)
    model, pairs, metric = prepare_large(args)
    if args.level != "attention":
        check_number("--top-n", args.top_n, model, "edges" if args.level == "edge" else "senders")
    check_ablation(args.level, args.ablation)
    options: dict[str, Any] = {"level": args.level, "reduce": args.reduce, "uncertainty": uncertainty(args)}
    if args.level != "attention":
        check_scoring(args, model, **options)
    ablation = find_ablation(args, model, pairs)
    start = time.perf_counter()
    if args.level == "attention":
        _attention(args, model, pairs, metric, ablation)
        return
    folder = args.pairs_out
    if folder is None and args.reduce == "pair" and not isinstance(pairs, PromptPairs):
        folder = args.out.with_suffix(".pairs")
    scores = score(args, model, pairs, metric, ablation=ablation, pairs_to=folder, **options)
    seconds = time.perf_counter() - start
    write(args, scores)
    some = pairs if isinstance(pairs, PromptPairs) else pairs.first
    print(scored_heading(model, some, scores, seconds))
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
    print(rounding(model, some, metric) if args.leads else "", end="")
    print(f"wrote    {args.out}" + (f" and {folder}/" if folder is not None else ""))


def _only_attention(args: argparse.Namespace) -> None:
    """Refuse what scores of attention's edges do not take."""
    others = [name for name in METHOD if name != "method"]
    if left := given(args, *others, "pairs_out", "threshold", "resume"):
        raise ValueError(f"--level attention takes --method eap or peap alone: leave out {left}")
    if args.reduce != "all" or args.distributed:
        raise ValueError("--level attention has the mean over all pairs, in one process: leave --reduce at all")


def _attention(
    args: argparse.Namespace, model: Model, pairs: PromptPairs | PairStream, metric: str, ablation: Ablation
) -> None:
    """Score attention's edges between positions, write them, and print the largest."""
    from eapcore.attribution.positions import attention_edges
    from eapcore.tasks import PromptPairs

    if not isinstance(pairs, PromptPairs):
        raise ValueError(
            f"--level attention reads all of a file at once, and {pairs.name} is too large: give --n-pairs"
        )
    start = time.perf_counter()
    with Progress("scoring", len(pairs)) as progress:
        options = {"ablation": ablation, "batch_size": args.batch_size, "progress": progress}
        scores = attention_edges(model, pairs, metric, method=args.method or "eap", **options)
    write(args, scores)
    config, seconds = model.config, time.perf_counter() - start
    print(heading(model, pairs, metric))
    print(
        f"scored   attention of {config.n_layers} × {config.n_heads} heads between {scores.q.shape[-1]} positions by "
        f"{scores.meta['method']['name']}, in {seconds:.2f} s"
    )
    if args.top_n:
        print(score_table("edge", scores.top(args.top_n)))
    print(f"wrote    {args.out}")
