"""eapcore evaluate: judge edge scores by faithfulness over sizes, CPR and CMD, ROC, and a circuit."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING

from eapcore.cli.inputs import check_number, find_scores, load_circuit, load_truth, prepare, top
from eapcore.cli.options import (
    RUN,
    TOP,
    Command,
    add_out,
    add_report,
    add_resume,
    add_scores,
    add_task,
    at_least_two,
    place,
    positive,
)
from eapcore.cli.output import Progress, check_out, heading, method, table, write
from eapcore.cli.report import PAGE, check_report, report_folder

if TYPE_CHECKING:
    from eapcore.evaluation.evaluate import Evaluation
    from eapcore.graph.circuit import Circuit
    from eapcore.graph.scores import EdgeScores

_RULE = "trapezoid, lower (steps), upper (steps) or pareto"


def add(command: Command) -> None:
    """Add the command and its options."""
    parser = command("evaluate", run, "Judge edge scores: faithfulness over sizes, CPR and CMD, ROC, a circuit.")
    add_task(parser)
    add_scores(parser)
    parser.add_argument(
        "--circuit",
        type=place,
        metavar="FILE",
        help="also judge this circuit: completeness, minimality (default: none)",
    )
    parser.add_argument(
        "--true-circuit",
        type=place,
        metavar="FILE",
        help="also the ROC against this circuit's edges: a file, or ioi, greater-than or docstring, for the published "
        "one, with and without its edges inside components (default: none)",
    )
    parser.add_argument(
        "--true-top",
        type=positive,
        metavar="N",
        help="also the ROC against exact patching's top N edges (default: off)",
    )
    parser.add_argument("--rule", metavar="RULE", help=f"of the ROC's area: {_RULE} (default: trapezoid)")
    parser.add_argument("--selection", default="top_n", metavar="HOW", help="top_n, or greedy from the logits back")
    parser.add_argument(
        "--bootstrap",
        type=at_least_two,
        metavar="N",
        help="also draw the prompts again N times, for the scores' stability (default: off)",
    )
    parser.add_argument("--top-n", type=positive, metavar="N", help=f"with --bootstrap: what is the top {TOP}")
    add_resume(parser)
    add_report(parser, "beside --out")
    add_out(parser, "evaluation.json")


def run(args: argparse.Namespace) -> None:
    """Judge the scores of a file, or those that the method's options make."""
    from eapcore.evaluation.evaluate import evaluate
    from eapcore.evaluation.faithfulness import SELECTIONS
    from eapcore.evaluation.roc import RULES
    from eapcore.kernels.checks import one_of
    from eapcore.tasks.truth import Truth

    check_out(args)
    if args.report:
        check_report(args.out.parent / PAGE)
    if args.top_n is not None and args.bootstrap is None:
        raise ValueError("--top-n goes with --bootstrap: how many edges are the top")
    if args.rule is not None and args.true_circuit is None and args.true_top is None:
        raise ValueError("--rule goes with --true-circuit or --true-top: how the area under the ROC is taken")
    rule = args.rule or "trapezoid"
    one_of("rule", rule, RULES)
    one_of("selection", args.selection, SELECTIONS)
    model, pairs, metric = prepare(args)
    n, n_edges = top(args, model), model.graph.n_edges
    check_number("--true-top", args.true_top, model)
    circuit, truth = load_circuit(args, "circuit", model), load_truth(args, model)
    true_edges = truth.circuit if isinstance(truth, Truth) else truth
    if n_edges in (args.true_top, 0 if true_edges is None else true_edges.n_edges):
        raise ValueError(f"a ROC needs true and false edges, but all {n_edges} edges of {model.name} would be true")
    if args.bootstrap is not None and args.scores is None and len(pairs) < 2:
        raise ValueError("--bootstrap needs at least 2 prompt pairs to draw from, got 1")
    scores, ablation = find_scores(args, model, pairs, metric, "all" if args.bootstrap is None else "pair")
    if args.bootstrap is not None and (scores.per_pair is None or len(scores.per_pair) < 2):
        raise ValueError(
            f"--bootstrap needs the scores of each pair, at least 2, which {args.scores} does not hold: write it by "
            "eapcore attribute --reduce pair"
        )
    drawn = {"top_n": n, "n_resamples": args.bootstrap, "seed": args.seed}
    with Progress("evaluating", None, RUN) as progress:
        judged = evaluate(
            model,
            pairs,
            metric,
            scores,
            selection=args.selection,
            circuit=circuit,
            truths=[] if truth is None else [truth],
            true_top=args.true_top,
            rule=rule,
            resamples=None if args.bootstrap is None else drawn,
            batch_size=args.batch_size,
            progress=progress,
            ablation=ablation,
            resume=args.resume,
            distributed=args.distributed,
        )
    write(args, replace(judged, command=args.written))
    print(heading(model, pairs, metric))
    _print_faithfulness(judged, scores)
    names = [str(args.true_circuit)] * (len(judged.rocs) - (args.true_top is not None))
    names += [f"exact patching's top {args.true_top}"] if args.true_top is not None else []
    for found, name in zip(judged.rocs, names, strict=True):
        edges = found.edge_set
        print(
            f"AUC {found.auc:.4f} ({rule}) against {name}: {edges['n_true']} true of {edges['n_edges']} edges "
            f"({edges['name']})"
        )
    if isinstance(truth, Truth) and args.ablation != "corrupt":
        print(
            "without  the edges inside components: they have scores where edges carry the corrupt prompt's activation"
        )
    if circuit is not None:
        _print_circuit(judged, circuit)
    if judged.stability is not None:
        _print_stability(judged, scores.top_n(n), args.bootstrap)
    print(f"\nwrote    {args.out}")
    if args.report:
        report_folder(args, args.out.parent, scores)


def _print_faithfulness(judged: Evaluation, scores: EdgeScores) -> None:
    signed, absolute = judged.mib.signed, judged.mib.absolute
    made, judging = (signed.meta["method"][name] for name in ("ablation_of_scores", "ablation"))
    by = f", of the ablation {made['name']}" if made not in (None, judging) else ""
    print(f"scores   {method(scores)}{by}")
    points = zip(signed.fractions, signed.sizes, signed.faithfulness, absolute.faithfulness, strict=True)
    rows = [(f"{100 * x:g} %", n, f, g) for x, n, f, g in points]
    print(table(("size", "edges", "f, by −score", "f, by |score|"), rows))
    print(f"\nCPR {judged.mib.cpr:.4f} (by −score)   CMD {judged.mib.cmd:.4f} (by |score|)")


def _print_circuit(judged: Evaluation, circuit: Circuit) -> None:
    complete, minimal = judged.completeness, judged.minimality
    assert complete is not None and minimal is not None
    widest = complete.gap.index(max(complete.gap))
    least = max(circuit.edges, key=minimal.__getitem__)
    print(
        f"circuit  {circuit.n_edges} edges: largest completeness gap {complete.gap[widest]:.6g} (without "
        f"{complete.removed[widest]}); least needed edge {least} ({minimal[least]:+.6g})"
    )


def _print_stability(judged: Evaluation, top_edges: Circuit, resamples: int) -> None:
    stable, chosen, n = judged.stability, top_edges.mask, top_edges.n_edges
    assert stable is not None
    sure = (stable.low[chosen] > 0) | (stable.high[chosen] < 0)
    print(
        f"stable   two resamples share {100 * stable.overlap:.1f} % of their top {n} edges; the top {n} keep "
        f"their sign in {100 * float(stable.sign_consistency[chosen].mean()):.1f} % of {resamples} resamples, "
        f"and {int(sure.sum())} of them have a 95 % confidence interval without 0"
    )
