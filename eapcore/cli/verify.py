"""eapcore verify"""

from __future__ import annotations

import argparse

from eapcore.cli.inputs import _find_scores, _top, find_ablation, prepare
from eapcore.cli.output import Progress, _table, _write, check_out, heading


def _verify(args: argparse.Namespace) -> None:
    from eapcore.evaluation.verify import verify

    check_out(args)
    model, pairs, metric = prepare(args)
    n, curves = _top(args, model), args.curve or []
    for edge in curves:
        model.graph.edge(edge)  # an unknown name is refused before the work
    how = find_ablation(args, model)
    options = {**how, "batch_size": args.batch_size}
    scores = _find_scores(args, model, pairs, metric, how)
    with Progress("verifying", None, "run × pair") as progress:
        options |= {"n_worst": args.show, "curves": curves, "progress": progress, "resume": args.resume}
        found = verify(model, pairs, metric, scores, n, **options)
    agreement = found.agreement
    print(heading(model, pairs, metric))
    print(f"patched  the top {n} edges by |score| of {(scores.meta.get('method') or {}).get('name', 'unnamed')}")
    print(
        f"agree    exact = {agreement.slope:.4g} · score {agreement.intercept:+.4g}, R² {agreement.r2:.4f}, Spearman "
        f"{agreement.spearman:.4f}, same sign {100 * agreement.signs:.1f} %"
    )
    if args.show:
        print(_table(("edges that differ most", "score", "exact"), found.worst))
    for curve in found.curves:
        rows = zip(curve.points, curve.effects, curve.estimate or [], strict=True)
        print(f"\n{curve.edge}: from clean (0) to corrupt (1)")
        print(_table(("λ", "exact", "linear"), list(rows)))
    _write(found, args.out)
