"""eapcore verify: patch the edges that a method ranks highest, and say how far it was right."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING

from eapcore.cli.inputs import check_number, find_scores, prepare, top
from eapcore.cli.options import TOP, Command, add_out, add_report, add_resume, add_scores, add_task, count, positive
from eapcore.cli.output import Progress, check_out, figure, heading, method, table, write
from eapcore.cli.report import PAGE, check_report, report_folder

if TYPE_CHECKING:
    from eapcore.execution.ablation import Ablation
    from eapcore.graph.scores import EdgeScores
    from eapcore.models.model import Model
    from eapcore.tasks.pairs import PromptPairs


def add(command: Command) -> None:
    """Add the command and its options."""
    parser = command("verify", run, "Patch the edges that a method ranks highest, and say how far it was right.")
    add_task(parser)
    add_scores(parser)
    parser.add_argument("--top-n", type=positive, metavar="N", help=f"how many edges to patch {TOP}")
    parser.add_argument(
        "--sample",
        type=positive,
        metavar="N",
        help="instead: N edges drawn in strata by |score|, and what they say of all edges (default: off)",
    )
    parser.add_argument(
        "--curve",
        action="append",
        metavar="EDGE",
        help="also the metric on the way from clean to corrupt at this edge; may be given again (default: none)",
    )
    parser.add_argument("--show", type=count, default=10, metavar="N", help="how many disagreements to print")
    add_resume(parser)
    add_report(parser, "beside --out")
    add_out(parser, "verification.json")


def run(args: argparse.Namespace) -> None:
    """Score or read scores, patch the top edges, and say how they agree."""
    from eapcore.evaluation.verify import verify

    check_out(args)
    if args.report:
        check_report(args.out.parent / PAGE)
    if args.sample is not None and (args.top_n is not None or args.curve or args.report):
        raise ValueError("--sample draws edges by itself: leave out --top-n, --curve and --report")
    model, pairs, metric = prepare(args)
    check_number("--sample", args.sample, model)
    n, curves = top(args, model), args.curve or []
    for edge in curves:
        model.graph.edge(edge)  # an unknown name is refused before the work
    scores, ablation = find_scores(args, model, pairs, metric)
    if args.sample is not None:
        _sample(args, model, pairs, metric, ablation, scores)
        return
    with Progress("verifying", None, "run × pair") as progress:
        options = {"n_worst": args.show, "curves": curves, "progress": progress, "resume": args.resume}
        options |= {"ablation": ablation, "batch_size": args.batch_size, "distributed": args.distributed}
        found = verify(model, pairs, metric, scores, n, **options)
    write(args, replace(found, command=args.written))
    agreement = found.agreement
    print(heading(model, pairs, metric))
    print(f"patched  the top {n} edges by |score| of {method(scores)}")
    print(
        f"agree    exact = {figure(agreement.slope)} · score {figure(agreement.intercept, '+.4g')}, R² "
        f"{figure(agreement.r2, '.4f')}, Spearman {figure(agreement.spearman, '.4f')}, same sign "
        f"{figure(100 * agreement.signs, '.1f')} %"
    )
    if args.show:
        print(table(("edges that differ most", "score", "exact"), found.worst))
    for curve in found.curves:
        rows = zip(curve.points, curve.effects, curve.estimate or [], strict=True)
        print(f"\n{curve.edge}: from clean (0) to corrupt (1)")
        print(table(("λ", "exact", "linear"), list(rows)))
    print(f"\nwrote    {args.out}")
    if args.report:
        report_folder(args, args.out.parent, scores)


def _sample(
    args: argparse.Namespace, model: Model, pairs: PromptPairs, metric: str, ablation: Ablation, scores: EdgeScores
) -> None:
    """Patch a sample of all edges, its cost told before."""
    from eapcore.evaluation.sampled import sample_cost, verify_sample

    print(heading(model, pairs, metric))
    cost = sample_cost(model, pairs, metric, scores, args.sample)
    print(f"patching {args.sample} of {model.graph.n_edges} edges: about {cost:.3g} times what eap costs", flush=True)
    with Progress("verifying", None, "run × pair") as progress:
        options = {"ablation": ablation, "batch_size": args.batch_size, "progress": progress, "resume": args.resume}
        options["distributed"] = args.distributed
        found = verify_sample(model, pairs, metric, scores, args.sample, **options)
    write(args, replace(found, command=args.written))
    r2, r2_low, r2_high = (figure(x, ".3f") for x in (found.r2, *found.r2_interval))
    slope, low, high = (figure(x, ".3g") for x in (found.slope, *found.slope_interval))
    print(
        f"agree    over all edges, by {method(scores)}: R² {r2} ({r2_low} to {r2_high}), exact = {slope} ({low} to "
        f"{high}) · score; in brackets three standard errors"
    )
    if args.show:
        rows = sorted(zip(found.edges, found.estimates, found.effects, strict=True), key=lambda r: -abs(r[1] - r[2]))
        print(table(("edges that differ most", "score", "exact"), rows[: args.show]))
    print(f"\nwrote    {args.out}")
