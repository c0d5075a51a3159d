"""eapcore reproduce: a published comparison redone, beside the paper's numbers."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eapcore.cli.inputs import find_tokenizer, load_model
from eapcore.cli.options import (
    Command,
    add_pairs,
    add_placement,
    add_sign,
    add_starts,
    count,
    number,
    place,
    positive,
    several,
)
from eapcore.cli.output import Stages, check_out, described_prompts, figure, heading, table, write
from eapcore.cli.report import PAGE, check_report, report_folder

if TYPE_CHECKING:
    from eapcore.evaluation.reproduce import Reproduction
    from eapcore.graph.graph import Graph
    from eapcore.graph.scores import EdgeScores

TEXT, PROMPTS = "reproduction.txt", "prompts.json"
_PAPER = "Syed, Rager, Conmy 2023 (arXiv 2310.10348)"
# Options of what needs a model: without a default, so that --scores can refuse them.
_OF_MODEL = {
    "model": "--model", "revision": "--revision", "tokenizer": "--tokenizer", "n": "--n-pairs", "sample": "--sample",
    "curves": "--curves", "top_n": "--top-n", "score_threshold": "--score-threshold", "threshold": "--threshold",
    "probe_steps": "--probe-steps",
}  # fmt: skip


def add(command: Command) -> None:
    """Add the command and its options."""
    parser = command("reproduce", run, f"Redo {_PAPER} with a task on a model, step by step, beside its numbers.")
    parser.add_argument("task", metavar="TASK", help="ioi, greater-than or docstring")
    parser.add_argument(
        "--model", metavar="MODEL", help="a folder, a GGUF file or a Hub id (default: the paper's, from the Hub)"
    )
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a Hub id (default: a pinned one)")
    parser.add_argument(
        "--scores",
        type=place,
        metavar="FILE",
        help="instead: only what needs no model, of a score file, or EAP-IG's, MIB's, ACDC's or acdcpp's (default: "
        "none)",
    )
    add_sign(parser)
    parser.add_argument(
        "--tokenizer", type=place, metavar="FOLDER", help="with tokenizer.json, or a GGUF file (default: the model's)"
    )
    parser.add_argument(
        "--bos", choices=("auto", "yes", "no"), default="auto", help="what prompts begin with, see eapcore run"
    )
    add_pairs(parser, "as many as the paper")
    add_placement(parser)
    parser.add_argument(
        "--sample",
        type=positive,
        metavar="N",
        help="edges that are patched exactly (default: all of a graph of at most 5,000, else 100 in strata by |score|)",
    )
    parser.add_argument(
        "--curves", type=count, metavar="N", help="of them, how many of the outlying are followed (default: 4)"
    )
    add_starts(
        parser,
        "ACDC starts from so many edges (default: as many as the circuit has; all of a graph of at most 5,000)",
        "and from those with |score| at least X, in the paper's unit (default: 0.25, 1 and 4 times its threshold)",
    )
    parser.add_argument(
        "--threshold",
        type=several(number),
        metavar="X,…",
        help="of ACDC: each start with each (default: 0.003,0.03,0.3, of a graph of at most 5,000 edges more)",
    )
    parser.add_argument(
        "--search-metric", default="kl", metavar="METRIC", help="what ACDC keeps: kl, or the task's metric"
    )
    parser.add_argument(
        "--probe-steps", type=count, metavar="N", help="of subnetwork probing; 0 leaves it out (default: 300)"
    )
    parser.add_argument("--no-report", action="store_true", help="without the page and the pictures")
    parser.add_argument(
        "--out",
        type=place,
        metavar="FOLDER",
        help="where everything goes; steps that are done are read there (default: reproduce-TASK)",
    )


def run(args: argparse.Namespace) -> None:
    """Redo everything, or with --scores what needs no model."""
    from eapcore.evaluation.kept_steps import KEPT_IN
    from eapcore.evaluation.reproduce import FILES, known

    truth, published = known(args.task)
    args.out = args.out or Path(f"reproduce-{args.task}")
    check_out(args, (*FILES, TEXT, PROMPTS))
    if not args.no_report:
        _check_report(args.out / PAGE)
    if args.scores is not None:
        if options := [option for name, option in _OF_MODEL.items() if getattr(args, name) is not None]:
            raise ValueError(
                f"--scores names scores that are there, and {', '.join(options)} how to run a model: give one of "
                "the two"
            )
        if not args.leads:  # there is little to do, for which the others wait
            return
        scores = _scores(args, truth.circuit.graph)
        _finish(args, _reproduced(args, scores), f"scores   {args.scores.name}: {args.task}, {scores.graph}")
        return
    if args.sign is not None:
        raise ValueError("--sign is for --scores: scores that are made here have ours")
    args.resume = args.out / KEPT_IN  # where what is done lies, if this is stopped
    _on_model(args, args.model or published.model, args.n or published.n_pairs)


def _check_report(page: Path) -> None:
    try:
        check_report(page)
    except RuntimeError as error:
        raise RuntimeError(f"{error}, or leave the page out by --no-report") from error


def _reproduced(args: argparse.Namespace, scores: EdgeScores) -> Reproduction:
    from eapcore.evaluation.reproduce import reproduce_scores

    return reproduce_scores(args.task, scores, args.out, command=args.written)


def _scores(args: argparse.Namespace, graph: Graph) -> EdgeScores:
    """The scores of a file, ours or another tool's, of a graph."""
    from eapcore.graph.scores import EdgeScores
    from eapcore.interop.files import is_foreign, scores_of_graph

    if is_foreign(args.scores):
        return scores_of_graph(args.scores, graph, args.sign)
    if args.sign is not None:
        raise ValueError(f"--sign is for other tools' files: {args.scores} says its own")
    return EdgeScores.load(args.scores)


def _on_model(args: argparse.Namespace, source: str, n: int) -> None:
    from eapcore.evaluation.reproduce import Plan, reproduce
    from eapcore.tasks import TASKS, find_pairs

    model = load_model(args, source)
    model = replace(model, tokenizer=find_tokenizer(args, model))
    pairs, metric = find_pairs(args.task, n=n, seed=args.seed, encode=model.tokenizer), TASKS[args.task].metric
    asked = {"sample": args.sample, "curves": args.curves, "top_n": args.top_n, "thresholds": args.threshold}
    asked |= {"score_thresholds": args.score_threshold, "probe_steps": args.probe_steps}
    plan = Plan(search_metric=args.search_metric, seed=args.seed, **{k: v for k, v in asked.items() if v is not None})
    with Stages() as begin:
        found = reproduce(
            model,
            args.task,
            pairs,
            args.out,
            plan=plan,
            batch_size=args.batch_size,
            progress=begin,
            command=args.written,
            distributed=args.distributed,
        )
    write(args, _Json("prompts", described_prompts(args, model, pairs, metric)), args.out / PROMPTS)
    _finish(args, found, heading(model, pairs, metric))


@dataclass(frozen=True, slots=True)
class _Json:
    kind: str
    content: Any

    def save(self, path: Path) -> None:
        from eapcore.graph.files import write_json

        write_json(path, self.kind, self.content)


@dataclass(frozen=True, slots=True)
class _Text:
    text: str

    def save(self, path: Path) -> None:
        from eapcore.graph.files import replacing

        with replacing(path) as temporary:
            temporary.write_text(self.text, encoding="utf-8", errors="backslashreplace")


def _finish(args: argparse.Namespace, found: Reproduction, head: str) -> None:
    """Write what is printed, print it, and write the page."""
    text = "\n".join([head, *_lines(found)])
    write(args, _Text(text + "\n"), args.out / TEXT)
    print(text)
    print(f"\nwrote    {args.out}/ with {TEXT} and reproduction.json")
    if not args.no_report:
        report_folder(args, args.out)


def _lines(found: Reproduction) -> Iterator[str]:
    """Everything that came out, for people."""
    from eapcore.evaluation.published import lines

    yield f"paper    {_PAPER}, {found.task}"
    if found.meta.get("unit"):
        yield f"unit     of scores below: {found.meta['unit']}, {found.unit:.6g} here"
    if found.rows:
        yield table(("published numbers", "published", "here", "difference"), lines(found.rows))
    judged = found.judged
    if judged is not None:
        rules = list(dict.fromkeys(row["rule"] for row in judged.areas))
        groups: dict[tuple[str, ...], dict[str, float]] = {}
        for row in judged.areas:
            key = (row["edge_set"], f"{row['n_true']} of {row['n_edges']}", row["ranking"], row["thresholds"])
            groups.setdefault(key, {})[row["rule"]] = row["auc"]
        for row in judged.heads:
            key = ("heads", f"{row['n_true']} of {row['n_heads']}", row["by"], "every threshold")
            groups.setdefault(key, {})[row["rule"]] = row["auc"]
        rows = [(*key, *(f"{areas[rule]:.4f}" for rule in rules)) for key, areas in groups.items()]
        yield table(("AUC by rule: edge set", "true", "ranking", "curve of", *rules), rows)
        rows = [(r["role"], r["edges"], str(r["n"]), figure(r["mean"]), figure(r["std"])) for r in judged.roles]
        yield table(("edges by the sender's role", "which", "n", "mean", "std"), rows)
    if found.exact is not None:
        e = found.exact
        fit = f"{figure(e['slope'])} · EAP {figure(e['intercept'], '+.3g')}"
        yield f"\nexact patching of {e['which']}: exact = {fit}, R² {figure(e['r2'])}"
    for curve in found.curves:
        way = ", ".join(f"{x:.3g}" for x in curve["effects"])
        yield f"curve    {curve['edge']}, 0 clean to 1 corrupt: {way}; EAP at 1: {curve['estimate']:.3g}"
    if found.searches:
        rows = [
            (r["start"], str(r["start_edges"]), f"{r['threshold']:g}", str(r["edges"]), str(r["connected"]),
             figure(r["value"]), figure(r.get("j")), figure(r.get("start_j")))
            for r in found.searches
        ]  # fmt: skip
        metric = found.searches[0]["metric"]
        header = ("EAP, then ACDC: start", "edges", "threshold", "left", "connected", metric, "J", "J of start")
        yield table(header, rows)
    if found.methods:
        others: dict[tuple[str, ...], dict[str, str]] = {}
        for r in found.methods:
            others.setdefault((r["method"], r["edge_set"]), {})[r["rule"]] = f"{r['auc']:.4f}"
        rows = [(*key, *areas.values()) for key, areas in others.items()]
        yield table(("AUC of", "edge set", *next(iter(others.values()))), rows)
    if found.subnetworks:
        rows = [
            (r["selection"], str(r["edges"]), str(r["connected"]), figure(r.get("faithfulness")), figure(r.get("tpr")),
             figure(r.get("fpr")), figure(r.get("j")))
            for r in found.subnetworks
        ]  # fmt: skip
        yield table(("subnetwork", "edges", "connected", "kept", "TPR", "FPR", "J"), rows)
    if found.circuits:
        rows = [(str(r["edges"]), str(r["connected"]), figure(r["faithfulness"])) for r in found.circuits]
        yield table(("largest edges", "connected", "kept of the behaviour"), rows)
    if found.areas:
        yield f"\nCPR {figure(found.areas['cpr'])} (by −score)   CMD {figure(found.areas['cmd'])} (by |score|)"
    if found.heads:
        rows = [(r["sender"], figure(r["score"]), r["role"] or "–") for r in found.heads]
        yield table(("largest senders", "score", "role"), rows)
    for sentence in found.left_out:
        yield f"\nwithout  {sentence}"
