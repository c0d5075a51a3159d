"""eapcore attribute"""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

from eapcore.cli.inputs import check_number, find_ablation, prepare, score
from eapcore.cli.output import _heading, _score_table, check_out

if TYPE_CHECKING:
    pass


def _attribute(args: argparse.Namespace) -> None:
    from eapcore.graph.scores import EdgeScores

    check_out(args)
    model, pairs, metric = prepare(args)
    check_number("--top-n", args.top_n, model, "edges" if args.level == "edge" else "senders")
    how = {**find_ablation(args, model), "level": args.level, "reduce": args.reduce}
    start = time.perf_counter()
    scores = score(args, model, pairs, metric, how)
    seconds = time.perf_counter() - start
    args.out.parent.mkdir(parents=True, exist_ok=True)
    scores.save(args.out)
    print(_heading(model, pairs, scores, seconds))
    shown = args.top_n
    if args.threshold is not None:
        among = scores.scores[scores.mask] if isinstance(scores, EdgeScores) else scores.scores
        shown = int((among.abs() >= args.threshold).sum())
    if shown:
        print(_score_table("edge" if args.level == "edge" else "node", scores.top(shown)))
    if shown and not isinstance(scores, EdgeScores) and scores.units is not None:
        largest = scores.units.flatten().abs().sort(descending=True, stable=True).indices[:shown].tolist()
        places = [divmod(i, scores.units.shape[1]) for i in largest]
        print(_score_table("unit", [(f"m{layer}[{unit}]", float(scores.units[layer, unit])) for layer, unit in places]))
    print(f"wrote    {args.out}")
