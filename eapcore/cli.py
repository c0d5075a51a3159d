"""The command line: eapcore run | attribute | info, and what `cli_verify` adds."""

from __future__ import annotations

import argparse
import csv
import logging
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from eapcore.cli_options import (
    Help,
    Progress,
    add_ablation,
    add_method,
    add_placement,
    add_task,
    check_number,
    check_out,
    check_writable,
    count,
    find_ablation,
    heading,
    load_model,
    number,
    positive,
    prepare,
    score,
)
from eapcore.cli_verify import add_commands

if TYPE_CHECKING:
    from eapcore.circuit import Circuit, EdgeScores
    from eapcore.model import Model
    from eapcore.nodes import NodeScores
    from eapcore.tasks import PromptPairs


class _Parser(argparse.ArgumentParser):
    """One sentence for a bad argument, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help explains)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0, 2 for bad input, 1 for an error of our own, 130 for Ctrl-C."""
    args = _parser().parse_args(argv)
    level = logging.INFO if sys.stderr.isatty() else logging.WARNING  # a pipe gets no chatter
    logging.basicConfig(level=logging.WARNING, format="eapcore: %(message)s")
    logging.getLogger("eapcore").setLevel(level)
    try:
        args.command(args)
        return 0
    except KeyboardInterrupt:
        print("eapcore: interrupted; no file was left half-written", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError) as error:
        if args.debug:
            raise
        print(f"eapcore: {_one_line(error)}", file=sys.stderr)
        return 2
    except Exception as error:
        if args.debug:
            raise
        print(
            f"eapcore: internal error, {type(error).__name__}: {_one_line(error)} (--debug shows where)",
            file=sys.stderr,
        )
        return 1


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="eapcore", description="Edge attribution patching: score every edge of a transformer.")
    names = "run | attribute | info | patch | acdc | path | evaluate | verify"
    commands = parser.add_subparsers(required=True, metavar=names)

    def command(name: str, function: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, formatter_class=Help)
        sub.set_defaults(command=function)
        sub.add_argument("--debug", action="store_true", help="show a traceback on errors")
        return sub

    run = command("run", _run, "Score every edge, pick a circuit, run it, and write scores, edges and circuit.")
    attribute = command("attribute", _attribute, "Score every edge and write the scores.")
    info = command("info", _info, "Print what runs here, and a model's dimensions and the memory that it needs.")
    for sub in (run, attribute):
        add_task(sub)
        add_method(sub)
        add_ablation(sub)
    selection = run.add_mutually_exclusive_group()
    selection.add_argument(
        "--faithfulness",
        type=number,
        default=0.8,
        metavar="F",
        help="the circuit is the smallest of a row of sizes that keeps this share of the behaviour",
    )
    selection.add_argument("--top-n", type=count, metavar="N", help="instead: the top N edges (default: none)")
    selection.add_argument(
        "--threshold", type=number, metavar="X", help="instead: all edges with |score| at least X (default: none)"
    )
    run.add_argument("--show", type=count, default=15, metavar="N", help="how many of the top edges to print")
    run.add_argument("--out", type=Path, default=Path("eapcore-out"), metavar="FOLDER", help="where the files go")
    attribute.add_argument(
        "--level", default="edge", metavar="WHAT", help="edge, node, or neuron: also MLP units and output dimensions"
    )
    attribute.add_argument(
        "--reduce", default="all", metavar="HOW", help="all, or pair or position: the file has each one's scores too"
    )
    printed = attribute.add_mutually_exclusive_group()
    printed.add_argument(
        "--top-n", type=count, metavar="N", help="also print the N most important edges or nodes (default: none)"
    )
    printed.add_argument(
        "--threshold", type=number, metavar="X", help="also print those with |score| at least X (default: none)"
    )
    attribute.add_argument(
        "--out", type=Path, default=Path("scores.safetensors"), metavar="FILE", help="the score file to write"
    )
    info.add_argument("model", nargs="?", metavar="MODEL", help="a model, as for --model of run (default: none)")
    info.add_argument("--batch-size", type=positive, default=16, metavar="B", help="pairs a batch, for the memory")
    info.add_argument("--tokens", type=positive, default=20, metavar="T", help="tokens a prompt, for the memory")
    add_placement(info)
    add_commands(command)
    return parser


def _attribute(args: argparse.Namespace) -> None:
    from eapcore.circuit import EdgeScores

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


def _run(args: argparse.Namespace) -> None:
    from eapcore.circuit import EdgeScores
    from eapcore.patch import metric_on

    check_writable(args.out)
    model, pairs, name = prepare(args)
    check_number("--top-n", args.top_n, model)
    how = find_ablation(args, model)
    start = time.perf_counter()
    scores = score(args, model, pairs, name, how)
    assert isinstance(scores, EdgeScores)
    seconds = time.perf_counter() - start
    metric = scores.meta["metric"]

    def measure(circuit: Circuit) -> float:
        return metric_on(model, pairs, name, [circuit], batch_size=args.batch_size, **how)[0]

    if args.ablation != "corrupt":
        metric = {**metric, args.ablation: measure(scores.top_n(0))}
    clean, ablated = metric["clean"], metric[args.ablation]

    def kept(value: float) -> float:
        return (value - ablated) / (clean - ablated) + 0.0 if clean != ablated else math.nan

    tried = _circuits(args, scores, measure, kept)
    rule, circuit, pruned, value = tried[-1]
    pruned = _with_meta(pruned, {"metric": {**metric, "circuit": value}})
    args.out.mkdir(parents=True, exist_ok=True)
    scores.save(args.out / "scores.safetensors")
    _write_edges(scores, args.out / "edges.csv")
    pruned.save(args.out / "circuit.json")

    print(_heading(model, pairs, scores, seconds))
    if args.show:
        print(_score_table("edge", scores.top(args.show)))
    print(f"\ncircuit  {rule}; {pruned.n_edges} of {circuit.n_edges} connect embed to the logits")
    print(f"\n{'run':<24}{metric['name']:>12}{'faithfulness':>15}")
    results = [("clean", clean)]
    results += [(f"top {part.n_edges} edges", result) for _, part, _, result in tried[:-1]]
    results += [(f"circuit, {pruned.n_edges} edges", value), (args.ablation, ablated)]
    for run, result in results:
        print(f"{run:<24}{result:>12.4f}{'–' if math.isnan(kept(result)) else format(kept(result), '.3f'):>15}")
    print(f"\nwrote    {args.out}/scores.safetensors, edges.csv, circuit.json")


_SIZES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0)  # of all edges


def _circuits(
    args: argparse.Namespace,
    scores: EdgeScores,
    measure: Callable[[Circuit], float],
    kept: Callable[[float], float],
) -> list[tuple[str, Circuit, Circuit, float]]:
    """The circuits that were tried, the chosen one last: how it was selected, it, what is connected, its metric."""

    def run(rule: str, circuit: Circuit) -> tuple[str, Circuit, Circuit, float]:
        pruned = circuit.prune()
        return rule, circuit, pruned, measure(pruned)

    if args.threshold is not None:
        return [run(f"edges with |score| ≥ {args.threshold:g}", scores.threshold(args.threshold))]
    if args.top_n is not None:
        return [run(f"top {args.top_n} edges by |score|", scores.top_n(args.top_n))]
    tried: list[tuple[str, Circuit, Circuit, float]] = []
    sizes = sorted({max(1, round(share * scores.graph.n_edges)) for share in _SIZES})
    with Progress("running circuits", len(sizes), "circuit") as progress:
        for n in sizes:
            rule = f"top {n} edges by |score|, the first size that keeps {args.faithfulness:g}"
            tried.append(run(rule, scores.top_n(n)))
            progress(len(tried), len(sizes))
            if kept(tried[-1][3]) >= args.faithfulness:
                break
    return tried


def _with_meta(circuit: Circuit, more: dict[str, object]) -> Circuit:
    from dataclasses import replace

    return replace(circuit, meta={**circuit.meta, **more})


def _write_edges(scores: EdgeScores, path: Path) -> None:
    from eapcore.circuit import replacing

    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["edge", "score"])
        writer.writerows((name, repr(score)) for name, score in scores.top(scores.graph.n_edges))


def _heading(model: Model, pairs: PromptPairs, scores: EdgeScores | NodeScores, seconds: float) -> str:
    from eapcore.circuit import EdgeScores

    graph = model.graph
    if isinstance(scores, EdgeScores):
        what = f"{graph.n_edges} edges ({graph.n_senders} senders × {graph.n_receivers} receivers)"
    else:
        units = f" and {scores.units.numel()} hidden units" if scores.units is not None else ""
        what = f"{graph.n_senders} nodes{units}"
    return (
        f"{heading(model, pairs, scores.meta['metric']['name'])}\n"
        f"scored   {what} by {scores.meta['method']['name']}, kernels {scores.meta['impl']}, in {seconds:.2f} s"
    )


def _score_table(what: str, rows: Sequence[tuple[str, float]]) -> str:
    width = max(len(what), *(len(name) for name, _ in rows))
    lines = [f"\n{'rank':>6}  {what:<{width}}  {'score':>12}"]
    lines += [f"{rank:>6}  {name:<{width}}  {score:>12.6g}" for rank, (name, score) in enumerate(rows, 1)]
    return "\n".join(lines)


def _info(args: argparse.Namespace) -> None:
    import torch

    from eapcore import __version__, kernels, planner, products

    model = None if args.model is None else load_model(args, args.model)
    print(f"eapcore  {__version__}, torch {torch.__version__}, Python {sys.version.split()[0]}")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    devices = [f"cpu ({torch.get_num_threads()} threads)", *(f"cuda:{i} {name}" for i, name in enumerate(names))]
    print(f"devices  {', '.join(devices)}")
    for impl, reason in kernels.available().items():
        print(f"kernels  {impl:<10}{'available' if not reason else f'absent: {reason}'}")
    print(f"products large float32 ones on the CPU by {products.large_by()}")
    if model is None:
        return
    config, graph = model.config, model.graph
    mlp = "no MLPs" if config.attn_only else f"d_mlp {config.d_mlp} ({config.act_fn})"
    print(f"\nmodel    {model.name}, {str(model.dtype).removeprefix('torch.')} on {model.device}")
    print(
        f"         {config.n_layers} layers × {config.n_heads} heads, d_model {config.d_model}, d_head {config.d_head}"
        f", {mlp}, vocabulary {config.d_vocab}, context {config.n_ctx}"
    )
    parameters = {t.data_ptr(): t.numel() for _, t in model.weights.named()}
    size = sum(parameters.values())
    print(f"         {size:,} parameters, {_mib(size * model.dtype.itemsize)}")
    print(f"graph    {graph.n_senders} senders × {graph.n_receivers} receivers, {graph.n_edges:,} edges")
    chosen = kernels.choose("edge_scores", device=model.device, dtype=model.dtype)
    print(f"kernels  auto takes {chosen}")
    tokens = min(args.tokens, config.n_ctx)
    groups = len(model.weights.layers[0].w_qkv)
    needed = planner.dense_bytes(config, args.batch_size, tokens, model.dtype, device=model.device, groups=groups)
    free = planner.free_bytes(model.device)
    print(f"memory   a batch of {args.batch_size} pairs × {tokens} tokens needs {_mib(needed)}; {_mib(free)} are free")


def _mib(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB" if count < 2**30 else f"{count / 2**30:,.2f} GiB"


if __name__ == "__main__":
    sys.exit(main())
