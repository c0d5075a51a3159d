"""eapcore verify: patch the edges that a method ranks highest, and say how far it was right."""

from __future__ import annotations

import argparse

from eapcore.cli.inputs import find_ablation, find_scores, prepare, top
from eapcore.cli.options import TOP, Command, add_out, add_report, add_resume, add_scores, add_task, count, positive
from eapcore.cli.output import Progress, check_out, heading, method, table, write
from eapcore.cli.report import PAGE, check_report, report_folder


def add(command: Command) -> None:
    """Add the command and its options."""
    parser = command("verify", run, "Patch the edges that a method ranks highest, and say how far it was right.")
    add_task(parser)
    add_scores(parser)
    parser.add_argument("--top-n", type=positive, metavar="N", help=f"how many edges to patch {TOP}")
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
    model, pairs, metric = prepare(args)
    n, curves = top(args, model), args.curve or []
    for edge in curves:
        model.graph.edge(edge)  # an unknown name is refused before the work
    ablation = find_ablation(args, model, pairs)
    scores = find_scores(args, model, pairs, metric, ablation)
    with Progress("verifying", None, "run × pair") as progress:
        options = {"n_worst": args.show, "curves": curves, "progress": progress, "resume": args.resume}
        options |= {"ablation": ablation, "batch_size": args.batch_size, "distributed": args.distributed}
        found = verify(model, pairs, metric, scores, n, **options)
    write(args, found)
    agreement = found.agreement
    print(heading(model, pairs, metric))
    print(f"patched  the top {n} edges by |score| of {method(scores)}")
    print(
        f"agree    exact = {agreement.slope:.4g} · score {agreement.intercept:+.4g}, R² {agreement.r2:.4f}, Spearman "
        f"{agreement.spearman:.4f}, same sign {100 * agreement.signs:.1f} %"
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
