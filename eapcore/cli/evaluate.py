"""The commands that check and judge: eapcore patch | acdc | path | evaluate | verify."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from eapcore.cli.inputs import _find_scores, _load_circuit, _top, check_number, find_ablation, prepare
from eapcore.cli.output import Progress, _table, _write, check_out, heading
from eapcore.cli.patch import _EACH, _RUN

if TYPE_CHECKING:
    from eapcore.evaluation.completeness import Completeness
    from eapcore.evaluation.roc import Roc
    from eapcore.evaluation.stability import Stability
    from eapcore.graph.scores import EdgeScores


def _evaluate(args: argparse.Namespace) -> None:
    from eapcore.evaluation.completeness import completeness, minimality
    from eapcore.evaluation.evaluate import Evaluation
    from eapcore.evaluation.faithfulness import SELECTIONS, mib
    from eapcore.evaluation.roc import RULES, roc
    from eapcore.evaluation.stability import stability
    from eapcore.kernels.checks import one_of
    from eapcore.patching.edges import patch_edges

    check_out(args)
    if args.top_n is not None and args.bootstrap is None:
        raise ValueError("--top-n goes with --bootstrap: how many edges are the top")
    if args.rule is not None and args.true_circuit is None and args.true_top is None:
        raise ValueError("--rule goes with --true-circuit or --true-top: how the area under the ROC is taken")
    rule = args.rule or "trapezoid"
    one_of("rule", rule, RULES)
    one_of("selection", args.selection, SELECTIONS)
    model, pairs, metric = prepare(args)
    top, n_edges = _top(args, model), model.graph.n_edges
    check_number("--true-top", args.true_top, model)
    circuit, truth = (_load_circuit(args, option, model) for option in ("circuit", "true_circuit"))
    if n_edges in (args.true_top, 0 if truth is None else truth.n_edges):
        raise ValueError(f"a ROC needs true and false edges, but all {n_edges} edges of {model.name} would be true")
    if args.bootstrap is not None and args.scores is None and len(pairs) < 2:
        raise ValueError("--bootstrap needs at least 2 prompt pairs to draw from, got 1")
    how = find_ablation(args, model)
    options = {**how, "batch_size": args.batch_size}
    scores = _find_scores(args, model, pairs, metric, how, "all" if args.bootstrap is None else "pair")
    if args.bootstrap is not None and (scores.per_pair is None or len(scores.per_pair) < 2):
        raise ValueError(
            f"--bootstrap needs the scores of each pair, at least 2, which {args.scores} does not hold: write it by "
            "eapcore attribute --reduce pair"
        )
    references = [] if truth is None else [(str(args.true_circuit), truth)]
    with Progress("running circuits", None, _RUN) as progress:
        judged = mib(model, pairs, metric, scores, selection=args.selection, progress=progress, **options)
    print(heading(model, pairs, metric))
    signed, absolute = judged.signed, judged.absolute
    made, judging = (signed.meta["method"][name] for name in ("ablation_of_scores", "ablation"))
    by = f", of the ablation {made['name']}" if made not in (None, judging) else ""
    print(f"scores   {(scores.meta.get('method') or {}).get('name', 'unnamed')}{by}")
    points = zip(signed.fractions, signed.sizes, signed.faithfulness, absolute.faithfulness, strict=True)
    rows = [(f"{100 * x:g} %", n, f, g) for x, n, f, g in points]
    print(_table(("size", "edges", "f, by −score", "f, by |score|"), rows))
    print(f"\nCPR {judged.cpr:.4f} (by −score)   CMD {judged.cmd:.4f} (by |score|)")
    rocs: list[Roc] = []
    complete: Completeness | None = None
    minimal: EdgeScores | None = None
    if args.true_top is not None:
        with Progress("patching", model.graph.n_edges * len(pairs), _EACH) as progress:
            exact = patch_edges(model, pairs, metric, progress=progress, **options)
        references.append((f"exact patching's top {args.true_top}", exact.top_n(args.true_top)))
    for name, reference in references:
        rocs.append(roc(scores, reference, rule=rule))
        found = rocs[-1].edge_set
        print(
            f"AUC {rocs[-1].auc:.4f} ({rule}) against {name}: {found['n_true']} true of {found['n_edges']} edges "
            f"({found['name']})"
        )
    if circuit is not None:
        with Progress("completeness", None, _RUN) as progress:
            complete = completeness(model, pairs, metric, circuit, progress=progress, **options)
        with Progress("minimality", None, _RUN) as progress:
            minimal = minimality(model, pairs, metric, circuit, progress=progress, **options)
        widest = complete.gap.index(max(complete.gap))
        least = max(circuit.edges, key=minimal.__getitem__)
        print(
            f"circuit  {circuit.n_edges} edges: largest completeness gap {complete.gap[widest]:.6g} (without "
            f"{complete.removed[widest]}); least needed edge {least} ({minimal[least]:+.6g})"
        )
    stable: Stability | None = None
    if scores.per_pair is not None and args.bootstrap is not None:
        drawn = {"n_resamples": args.bootstrap, "seed": args.seed, "meta": scores.meta}
        stable = stability(scores.per_pair, model.graph, top_n=top, **drawn)
        chosen = scores.top_n(top).mask
        sure = (stable.low[chosen] > 0) | (stable.high[chosen] < 0)
        print(
            f"stable   two resamples share {100 * stable.overlap:.1f} % of their top {top} edges; the top {top} keep "
            f"their sign in {100 * float(stable.sign_consistency[chosen].mean()):.1f} % of {args.bootstrap} resamples, "
            f"and {int(sure.sum())} of them have a 95 % confidence interval without 0"
        )
    _write(Evaluation(judged, rocs, complete, minimal, stable), args.out)
