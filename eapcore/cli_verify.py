"""The commands that check and judge: eapcore patch | acdc | path | evaluate | verify."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from eapcore.cli_options import (
    METHOD,
    Progress,
    add_ablation,
    add_method,
    add_task,
    at_least_two,
    check_number,
    check_out,
    count,
    find_ablation,
    given,
    heading,
    number,
    positive,
    prepare,
    score,
    several,
)

if TYPE_CHECKING:
    from eapcore.circuit import Circuit, EdgeScores
    from eapcore.compare import Roc, Stability
    from eapcore.evaluate import Completeness
    from eapcore.model import Model
    from eapcore.tasks import PromptPairs

_EACH, _RUN = "edge × pair", "circuit × pair"  # what patching, and running circuits, counts
_RULE = "trapezoid, lower (steps), upper (steps) or pareto"
_TOP = "(default: 50, or all edges of a smaller graph)"


class _Command(Protocol):
    def __call__(
        self, name: str, function: Callable[[argparse.Namespace], None], text: str
    ) -> argparse.ArgumentParser: ...


class _Saved(Protocol):
    def save(self, path: Path) -> None: ...


def add_commands(command: _Command) -> None:
    """Add the commands, each made by `command(name, function, text)`."""
    patch = command("patch", _patch, "Measure what corrupting each edge, or node, really does to the metric.")
    acdc = command("acdc", _acdc, "Search for a circuit by exact patching from the logits back.")
    path = command("path", _path, "Patch along chosen paths and measure the metric.")
    evaluate = command(
        "evaluate", _evaluate, "Judge edge scores: faithfulness over sizes, CPR and CMD, ROC, a circuit."
    )
    verify = command("verify", _verify, "Patch the edges that a method ranks highest, and say how far it was right.")
    for sub in (patch, acdc, path, evaluate, verify):
        add_task(sub, metric="kl" if sub is acdc else "the task's own, logit_diff for a file")
        add_ablation(sub)
    for sub, what in ((patch, "the edges"), (acdc, "where the search starts")):
        group = sub.add_mutually_exclusive_group()
        group.add_argument("--circuit", type=Path, metavar="FILE", help=f"{what}: a circuit file (default: all edges)")
        group.add_argument(
            "--scores", type=Path, metavar="FILE", help=f"{what}: the top edges of a score file (default: none)"
        )
    for sub in (evaluate, verify):
        sub.add_argument(
            "--scores", type=Path, metavar="FILE", help="a score file (default: computed here by --method)"
        )
        add_method(sub)

    patch.add_argument("--top-n", type=positive, metavar="N", help="with --scores: how many edges (default: none)")
    patch.add_argument("--nodes", action="store_true", help="patch senders instead of edges")
    patch.add_argument("--per-position", action="store_true", help="with --nodes: each position on its own")
    patch.add_argument("--show", type=count, default=15, metavar="N", help="how many of the largest effects to print")
    patch.add_argument(
        "--resume", type=Path, metavar="FILE", help="keep what is done in this file, and go on from it (default: off)"
    )
    patch.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="the file to write (default: effects.safetensors, with --nodes effects.json)",
    )

    acdc.set_defaults(metric="kl")
    sizes = acdc.add_mutually_exclusive_group()
    sizes.add_argument(
        "--top-n", type=several(positive), metavar="N,…", help="with --scores: how many edges (default: none)"
    )
    sizes.add_argument(
        "--score-threshold",
        type=several(number),
        metavar="X,…",
        help="with --scores, instead: all edges with |score| at least X (default: none)",
    )
    acdc.add_argument(
        "--threshold",
        type=several(number),
        required=True,
        metavar="X,…",
        help="an edge goes where its loss is less than X; of several starts or thresholds each with each is searched",
    )
    acdc.add_argument("--order", default="latest", metavar="HOW", help="of a receiver's senders: latest or earliest")
    acdc.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="the circuit file to write, of several searches a .json of them all (default: circuit.json, of several "
        "sweep.json)",
    )

    path.add_argument(
        "--path",
        action="append",
        metavar="PATH",
        help="e.g. 'a0.h1->a1.h0<q>->logits'; may be given again (default: by --senders and --receivers)",
    )
    path.add_argument("--senders", type=_names, metavar="A,B", help="instead: from these senders … (default: none)")
    path.add_argument(
        "--receivers", type=_names, metavar="A,B", help="… to these receivers, and on from there (default: none)"
    )
    path.add_argument(
        "--through", type=_names, metavar="A,B", help="components that may lie in between (default: none)"
    )
    _add_out(path, "path.json", "the file to write")

    evaluate.add_argument(
        "--circuit", type=Path, metavar="FILE", help="also judge this circuit: completeness, minimality (default: none)"
    )
    evaluate.add_argument(
        "--true-circuit", type=Path, metavar="FILE", help="also the ROC against this circuit's edges (default: none)"
    )
    evaluate.add_argument(
        "--true-top",
        type=positive,
        metavar="N",
        help="also the ROC against exact patching's top N edges (default: off)",
    )
    evaluate.add_argument("--rule", metavar="RULE", help=f"of the ROC's area: {_RULE} (default: trapezoid)")
    evaluate.add_argument("--selection", default="top_n", metavar="HOW", help="top_n, or greedy from the logits back")
    evaluate.add_argument(
        "--bootstrap",
        type=at_least_two,
        metavar="N",
        help="also draw the prompts again N times, for the scores' stability (default: off)",
    )
    evaluate.add_argument("--top-n", type=positive, metavar="N", help=f"with --bootstrap: what is the top {_TOP}")
    _add_out(evaluate, "evaluation.json", "the file to write")

    verify.add_argument("--top-n", type=positive, metavar="N", help=f"how many edges to patch {_TOP}")
    verify.add_argument(
        "--curve",
        action="append",
        metavar="EDGE",
        help="also the metric on the way from clean to corrupt at this edge; may be given again (default: none)",
    )
    verify.add_argument("--show", type=count, default=10, metavar="N", help="how many disagreements to print")
    verify.add_argument("--resume", type=Path, metavar="FILE", help="as for patch (default: off)")
    _add_out(verify, "verification.json", "the file to write")


def _add_out(parser: argparse.ArgumentParser, default: str, text: str) -> None:
    parser.add_argument("--out", type=Path, default=Path(default), metavar="FILE", help=text)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _selection(args: argparse.Namespace, model: Model) -> Circuit | None:
    """The circuit that --circuit, or --scores and --top-n name; None is all edges."""
    if (args.scores is None) != (args.top_n is None):
        raise ValueError("--scores and --top-n go together: which edges of which file")
    check_number("--top-n", args.top_n, model)
    if args.circuit is not None:
        return _load_circuit(args, "circuit", model)
    return None if args.scores is None else _load_scores(args.scores, model).top_n(args.top_n)


def _load_circuit(args: argparse.Namespace, option: str, model: Model) -> Circuit | None:
    """The circuit whose file an option names, if it is one of the model's graph, and not empty."""
    from eapcore.circuit import Circuit

    path = getattr(args, option)
    if path is None:
        return None
    circuit = Circuit.load(path)
    if circuit.graph != model.graph:
        raise ValueError(
            f"--{option.replace('_', '-')} must be a circuit of {model.name}, {model.graph}, but {path} is one of "
            f"{circuit.graph}"
        )
    if not circuit.n_edges:
        raise ValueError(f"--{option.replace('_', '-')} must have edges, but the circuit in {path} has none")
    return circuit


def _top(args: argparse.Namespace, model: Model) -> int:
    """--top-n where it has a default."""
    check_number("--top-n", args.top_n, model)
    return args.top_n or min(50, model.graph.n_edges)


def _load_scores(path: Path, model: Model) -> EdgeScores:
    from eapcore.circuit import EdgeScores

    return EdgeScores.load(path, content_hash=model.content_hash)


def _find_scores(
    args: argparse.Namespace, model: Model, pairs: PromptPairs, metric: str, how: dict[str, Any], reduce: str = "all"
) -> EdgeScores:
    """The score file that --scores names, or scores by the method's options."""
    from eapcore.circuit import EdgeScores

    if args.scores is None:
        found = score(args, model, pairs, metric, {**how, "reduce": reduce})
        assert isinstance(found, EdgeScores)
        return found
    if options := given(args, *METHOD):
        raise ValueError(f"--scores names scores that are there, and {options} how to make some: give one of the two")
    return _load_scores(args.scores, model)


def _write(result: _Saved, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    result.save(path)
    print(f"\nwrote    {path}")


def _table(header: Sequence[str], rows: Sequence[Sequence[str | float | int]]) -> str:
    """Rows under a header, text on the left, numbers on the right."""
    cells = [[f"{c:.6g}" if isinstance(c, float) else str(c) for c in row] for row in rows]
    widths = [max(len(text) for text in column) for column in zip(header, *cells, strict=True)]
    left = [bool(rows) and isinstance(c, str) for c in (rows[0] if rows else header)]

    def line(row: Sequence[str]) -> str:
        return "  ".join(
            f"{text:<{w}}" if is_left else f"{text:>{w}}" for text, w, is_left in zip(row, widths, left, strict=True)
        ).rstrip()

    return "\n".join(["", *(line(row) for row in [header, *cells])])


def _runs(args: argparse.Namespace, metric: str, values: dict[str, float]) -> str:
    """The metric on each run; the corrupt one is no end of the scale where another ablation is."""
    shown = [(name, value) for name, value in values.items() if name != "corrupt" or args.ablation == "corrupt"]
    return _table(("run", metric), shown)


def _patch(args: argparse.Namespace) -> None:
    from eapcore.patch import patch_edges, patch_nodes

    if args.per_position and not args.nodes:
        raise ValueError("--per-position goes with --nodes")
    if args.nodes and (left := given(args, "circuit", "scores", "top_n", "resume")):
        raise ValueError(f"--nodes patches every sender in one go: leave out {left}, for edges alone")
    if args.out is None:
        args.out = Path("effects.json" if args.nodes else "effects.safetensors")
    check_out(args)
    model, pairs, metric = prepare(args)
    options = {**find_ablation(args, model), "batch_size": args.batch_size}
    edges = _selection(args, model)
    start = time.perf_counter()
    if args.nodes:
        with Progress("patching", model.graph.n_senders * len(pairs), "node × pair") as progress:
            nodes = patch_nodes(model, pairs, metric, per_position=args.per_position, progress=progress, **options)
        print(heading(model, pairs, metric))
        print(f"patched  {len(nodes.nodes)} nodes in {time.perf_counter() - start:.2f} s")
        if args.per_position:
            named = zip(nodes.nodes, nodes.effects.tolist(), strict=True)
            places = [(name, t, effect) for name, row in named for t, effect in enumerate(row)]
            print(_table(("node", "position", "effect"), sorted(places, key=lambda row: -abs(row[2]))[: args.show]))
        else:
            rows = sorted(zip(nodes.nodes, nodes.effects.tolist(), strict=True), key=lambda row: -abs(row[1]))
            print(_table(("node", "effect"), rows[: args.show]))
        _write(nodes, args.out)
        return
    n_edges = model.graph.n_edges if edges is None else edges.n_edges
    with Progress("patching", n_edges * len(pairs), _EACH) as progress:
        effects = patch_edges(model, pairs, metric, edges, progress=progress, resume=args.resume, **options)
    print(heading(model, pairs, metric))
    print(f"patched  {n_edges} edges in {time.perf_counter() - start:.2f} s")
    if args.show:
        print(_table(("edge", "effect"), effects.top(min(args.show, n_edges))))
    _write(effects, args.out)


@dataclass(frozen=True, slots=True)
class _Sweep:
    """What several searches found, the starts outermost."""

    circuits: list[Circuit]

    def save(self, path: Path) -> None:
        from eapcore.patch import write_json

        write_json(path, "sweep", self)


def _acdc(args: argparse.Namespace) -> None:
    from eapcore.acdc import acdc, prune_sweep

    chosen, thresholds = args.top_n or args.score_threshold, args.threshold
    if (args.scores is None) != (chosen is None):
        raise ValueError("--scores goes together with --top-n or --score-threshold: which edges of which file")
    for threshold in thresholds:
        if not threshold > 0:
            raise ValueError(f"threshold must be positive, got {threshold:g}")
    single = len(thresholds) == 1 and len(chosen or [1]) == 1
    args.out = args.out or Path("circuit.json" if single else "sweep.json")
    check_out(args)
    model, pairs, metric = prepare(args)
    start, scores = _load_circuit(args, "circuit", model), None
    sizes = [model.graph.n_edges if start is None else start.n_edges]
    if args.scores is not None:
        scores = _load_scores(args.scores, model)
        sizes = args.top_n or [scores.threshold(x).n_edges for x in chosen]
    for asked, size in zip(chosen or [], sizes, strict=False):
        check_number("--top-n", size, model)
        if not size:
            raise ValueError(f"--score-threshold {asked:g} leaves no edge to start from")
    options = {"order": args.order, **find_ablation(args, model), "batch_size": args.batch_size}
    began, total = time.perf_counter(), sum(sizes) * len(thresholds)
    found: list[Circuit] = []
    if scores is not None:
        options |= {"score_thresholds": args.score_threshold}
        with Progress("searching", total, "edge") as progress:
            found = prune_sweep(model, pairs, scores, args.top_n, thresholds, metric, progress=progress, **options)
    for threshold in thresholds if scores is None else ():
        with Progress(f"searching at {threshold:g}", sizes[0], "edge") as progress:
            found.append(acdc(model, pairs, metric, threshold=threshold, start=start, progress=progress, **options))
    seconds = time.perf_counter() - began
    print(heading(model, pairs, metric))
    counts = {key: sum(c.meta["forwards"][key] for c in found) for key in ("decided", "evaluated", "launches")}
    print(
        f"searched {total} edges in {seconds:.2f} s: {counts['decided']} decided by a forward, {counts['evaluated']} "
        f"run in {counts['launches']} launches"
    )
    if not single:
        rows = [
            (start, threshold, c.n_edges, c.prune().n_edges, c.meta["metric"]["circuit"])
            for c, (start, threshold) in zip(found, product(sizes, thresholds), strict=True)
        ]
        print(_table(("start", "threshold", "edges", "connected", metric), rows))
        _write(_Sweep(found), args.out)
        return
    (circuit,) = found
    values = circuit.meta["metric"]
    print(f"circuit  {circuit.n_edges} edges; {circuit.prune().n_edges} connect embed to the logits")
    print(_runs(args, metric, {name: values[name] for name in ("clean", "circuit", "corrupt")}))
    _write(circuit, args.out)


def _path(args: argparse.Namespace) -> None:
    from eapcore.patch import path_patch, routes

    check_out(args)
    if (args.path is None) == (args.senders is None) or (args.senders is None) != (args.receivers is None):
        raise ValueError("give --path, or --senders and --receivers")
    if args.path is not None and args.through is not None:
        raise ValueError("a --path names all that it passes: --through goes with --senders and --receivers")
    model, pairs, metric = prepare(args)
    if args.path is not None:
        senders, edges = list(dict.fromkeys(path.split("->")[0] for path in args.path)), args.path
    else:
        senders, edges = args.senders, routes(model.graph, args.senders, args.receivers, through=args.through or ())
    options = {**find_ablation(args, model), "batch_size": args.batch_size}
    with Progress("patching", len(pairs)) as progress:
        result = path_patch(model, pairs, metric, senders, edges, progress=progress, **options)
    print(heading(model, pairs, metric))
    print(f"patched  {', '.join(result.senders)} along {result.edges.n_edges} edges: effect {result.effect:.6g}")
    print(_runs(args, metric, {"clean": result.clean, "patched": result.patched, "corrupt": result.corrupt}))
    _write(result, args.out)


def _evaluate(args: argparse.Namespace) -> None:
    from eapcore.compare import RULES, roc, stability
    from eapcore.evaluate import SELECTIONS, Evaluation, completeness, mib, minimality
    from eapcore.kernels.checks import one_of
    from eapcore.patch import patch_edges

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


def _verify(args: argparse.Namespace) -> None:
    from eapcore.evaluate import verify

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
