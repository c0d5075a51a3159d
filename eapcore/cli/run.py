"""eapcore run: score every edge, pick a circuit, run it, and write all of it."""

from __future__ import annotations

import argparse
import csv
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eapcore.cli.inputs import check_number, check_scoring, find_ablation, prepare, score, uncertainty
from eapcore.cli.options import (
    Command,
    add_method,
    add_out,
    add_report,
    add_resume,
    add_task,
    add_uncertainty,
    count,
    number,
    share,
)
from eapcore.cli.output import (
    Progress,
    check_out,
    described_prompts,
    enough_prompts,
    figure,
    rounding,
    score_table,
    scored_heading,
    write,
)
from eapcore.cli.report import PAGE, check_report, report_folder

if TYPE_CHECKING:
    from eapcore.execution.experiment import Experiment
    from eapcore.graph.circuit import Circuit
    from eapcore.graph.scores import EdgeScores
    from eapcore.models.model import Model
    from eapcore.search.smallest import Tried
    from eapcore.tasks.pairs import PromptPairs


def add(command: Command) -> None:
    """Add the command and its options."""
    parser = command("run", run, "Score every edge, pick a circuit, run it, and write scores, edges and circuit.")
    add_task(parser)
    add_method(parser)
    add_uncertainty(parser)
    parser.add_argument(
        "--select",
        default="top",
        metavar="HOW",
        help="which edges a circuit of a size has: top, by |score|; greedy, grown from the logits back; or stable, the "
        "top ones of those that are needed on at least nine of ten pairs",
    )
    selection = parser.add_mutually_exclusive_group()
    selection.add_argument(
        "--faithfulness",
        type=share,
        default=0.8,
        metavar="F",
        help="the circuit is the smallest of a row of sizes that keeps this share of the behaviour",
    )
    selection.add_argument("--top-n", type=count, metavar="N", help="instead: the top N edges (default: none)")
    selection.add_argument(
        "--threshold", type=number, metavar="X", help="instead: all edges with |score| at least X (default: none)"
    )
    parser.add_argument("--show", type=count, default=15, metavar="N", help="how many of the top edges to print")
    add_resume(parser)
    add_report(parser, "in --out, with scores of each position where the method has them")
    add_out(parser, "eapcore-out", "where the files go", "FOLDER")


_FILES = ("scores.safetensors", "edges.csv", "circuit.json", "prompts.json", "run.json")
_EARLY = "scores.unfinished.safetensors"  # where the files of another run lie, which stay a set
_RULES = {
    "top": "top {} edges by |score|",
    "greedy": "{} edges grown from the logits back",
    "stable": "top {} of the stable edges",
}
_MOST_PARTS = 25_000_000  # scores of single positions that a report is worth: 100 MB in float32


@dataclass(frozen=True, slots=True)
class _Results:
    scores: EdgeScores
    circuit: Circuit
    prompts: Mapping[str, Any]
    run: Mapping[str, Any]

    def save(self, folder: Path) -> None:
        """Write all files into a folder, or none."""
        from eapcore.graph.files import replacing_all, write_json

        folder.mkdir(parents=True, exist_ok=True)
        with replacing_all([folder / name for name in _FILES]) as (scores, edges, circuit, prompts, run):
            self.scores.save(scores)
            with edges.open("w", encoding="utf-8", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(["edge", "score"])
                names = self.scores.top(self.scores.graph.n_edges)
                writer.writerows((name, repr(score)) for name, score in names)
            self.circuit.save(circuit)
            write_json(prompts, "prompts", self.prompts)
            write_json(run, "run", self.run)


def run(args: argparse.Namespace) -> None:
    """The main job: scores, a circuit from them, and what it keeps of the behaviour."""
    from eapcore.execution.experiment import Experiment
    from eapcore.graph.scores import EdgeScores

    early = _EARLY if any((args.out / name).exists() for name in _FILES) else _FILES[0]
    check_out(args, (*_FILES, early))
    if args.report:
        check_report(args.out / PAGE)
    model, pairs, name = prepare(args)
    check_number("--top-n", args.top_n, model)
    varied = _uncertainty(args)
    check_scoring(args, model, uncertainty=varied)
    experiment = Experiment.of(model, pairs, name, find_ablation(args, model, pairs), distributed=args.distributed)
    start = time.perf_counter()
    reduce = _reduce(args, model, pairs)
    scores = score(args, model, pairs, name, ablation=experiment.ablation, reduce=reduce, uncertainty=varied)
    assert isinstance(scores, EdgeScores)
    seconds = time.perf_counter() - start
    write(args, scores, args.out / early)  # what follows may take long, or be interrupted
    tried, rule, ablated = _circuits(args, experiment, scores)
    chosen, metric = tried[-1], dict(scores.meta["metric"])
    if args.ablation != "corrupt":
        metric[args.ablation] = ablated
    meta = {**chosen.circuit.meta, "metric": {**metric, "circuit": chosen.value}}
    circuit = replace(chosen.circuit, meta=meta)
    prompts = described_prompts(args, model, pairs, name)
    write(args, _Results(scores, circuit, prompts, _described(args, experiment, tried, metric, ablated)))
    if args.leads:
        (args.out / _EARLY).unlink(missing_ok=True)

    print(scored_heading(model, pairs, scores, seconds))
    if args.show:
        print(score_table("edge", scores.top(args.show)))
    print(f"\ncircuit  {rule}; {circuit.n_edges} of {chosen.selected.n_edges} connect embed to the logits")
    print(f"\n{'run':<24}{metric['name']:>12}{'faithfulness':>15}")
    same = math.isnan(chosen.faithfulness)
    rows = [("clean", metric["clean"], math.nan if same else 1.0)]
    rows += [(f"top {each.selected.n_edges} edges", each.value, each.faithfulness) for each in tried[:-1]]
    rows += [(f"circuit, {circuit.n_edges} edges", chosen.value, chosen.faithfulness)]
    rows += [(args.ablation, ablated, math.nan if same else 0.0)]
    for what, value, kept in rows:
        print(f"{what:<24}{value:>12.4f}{figure(kept, '.3f'):>15}")
    print("\n" + enough_prompts(scores, chosen.selected.n_edges), end="")
    print(rounding(model, pairs, name) if args.leads else "", end="")
    print(f"wrote    {args.out}/{', '.join(_FILES)}")
    if args.report:
        report_folder(args, args.out)


def _uncertainty(args: argparse.Namespace) -> bool | str:
    """--uncertainty, which stable edges need; ValueError for a selection that is not known or does not suit."""
    from eapcore.search.smallest import SELECT

    if args.select not in SELECT:
        raise ValueError(f"--select must be {', '.join(SELECT[:-1])} or {SELECT[-1]}, got {args.select!r}")
    if args.select != "top" and args.threshold is not None:
        raise ValueError(f"--threshold takes all edges with such a score: leave out --select {args.select}")
    varied = uncertainty(args)
    if args.select == "stable" and varied is False:
        raise ValueError("--select stable needs the scores' sign consistency: leave out --uncertainty no")
    return args.select == "stable" or varied


def _reduce(args: argparse.Namespace, model: Model, pairs: PromptPairs) -> str:
    """What a report wants of the scores: those of each position, where they are some and not too many."""
    graph = model.graph
    if not args.report or int(pairs.positions.max() + 1) * graph.n_senders * graph.n_receivers > _MOST_PARTS:
        return "all"
    try:
        check_scoring(args, model, reduce="position")
    except ValueError:  # no sum over positions
        return "all"
    return "position"


def _described(
    args: argparse.Namespace, experiment: Experiment, tried: list[Tried], metric: Mapping[str, Any], ablated: float
) -> dict[str, Any]:
    """run.json: the command, the ends of the scale, and what each circuit that was run keeps."""
    curve = {
        "sizes": [each.selected.n_edges for each in tried],
        "connected": [each.circuit.n_edges for each in tried],
        "values": [each.value for each in tried],
        "faithfulness": [each.faithfulness for each in tried],
        "intervals": None if any(each.interval is None for each in tried) else [each.interval for each in tried],
    }
    ablation = dict(experiment.ablation.meta)
    ends = {"clean": metric["clean"], "ablated": ablated}
    described = experiment.describe() | {"metric": {"name": metric["name"], **ends}, "ablation": ablation}
    return {"command": args.written, **described, "curve": curve}


def _circuits(args: argparse.Namespace, experiment: Experiment, scores: EdgeScores) -> tuple[list[Tried], str, float]:
    """The circuits that were run, the chosen one last; how it was selected; the metric with every edge ablated."""
    from eapcore.patching.record import Recordings
    from eapcore.search.smallest import run_until, selected, selections

    recordings, least = Recordings(experiment, args.batch_size), math.inf
    if args.threshold is not None:
        rule, circuits = f"edges with |score| ≥ {args.threshold:g}", [scores.threshold(args.threshold)]
    elif args.top_n is not None:
        rule, circuits = _RULES[args.select], [selected(scores, args.top_n, args.select)]
    else:
        circuits, least = selections(scores, select=args.select), args.faithfulness
        rule = f"{_RULES[args.select]}, the first size that keeps {args.faithfulness:g}"
    with Progress("running circuits", len(circuits), "circuit") as progress:
        tried, _, ablated = run_until(experiment, recordings, circuits, least, progress=progress)
    return tried, rule.format(tried[-1].selected.n_edges), ablated
