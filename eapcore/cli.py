"""The command line: eapcore run | attribute | info, and what `cli_verify` adds."""

from __future__ import annotations

import argparse
import csv
import logging
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from eapcore.cli_options import (
    Help,
    Progress,
    add_placement,
    add_task,
    check_writable,
    count,
    heading,
    load_model,
    number,
    positive,
    prepare,
)
from eapcore.cli_verify import add_commands

if TYPE_CHECKING:
    from eapcore.circuit import Circuit, EdgeScores
    from eapcore.model import Model
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
        _add_scoring(sub)
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
    printed = attribute.add_mutually_exclusive_group()
    printed.add_argument(
        "--top-n", type=count, metavar="N", help="also print the N most important edges (default: none)"
    )
    printed.add_argument(
        "--threshold", type=number, metavar="X", help="also print the edges with |score| at least X (default: none)"
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


def _add_scoring(parser: argparse.ArgumentParser) -> None:
    add_task(parser)
    parser.add_argument(
        "--method",
        default="eap",
        metavar="METHOD",
        help="eap, eap-ig, clean-corrupt, eap-ig-activations, relp, qk-fix, grad-drop or atp-star",
    )
    parser.add_argument("--gradient-at", metavar="RUN", help="of eap: clean or corrupt (default: clean)")
    parser.add_argument(
        "--steps",
        type=positive,
        metavar="M",
        help="of integrated gradients: points from corrupt to clean (default: 4 for eap-ig, 5 for eap-ig-activations)",
    )
    parser.add_argument(
        "--points",
        metavar="RULE",
        help="of the same: left, right, midpoint or gauss (default: gauss for eap-ig, right for eap-ig-activations)",
    )
    parser.add_argument(
        "--storage", default="auto", metavar="HOW", help="dense, factored (less memory for large models) or auto"
    )
    parser.add_argument("--impl", default="auto", metavar="IMPL", help="kernels: auto, reference, cpp or triton")


def _score(args: argparse.Namespace) -> tuple[Model, PromptPairs, EdgeScores, float]:
    """What run and attribute share: the model, the pairs, the scores, and the seconds that scoring took."""
    from eapcore.attribution import attribute

    model, pairs, metric = prepare(args)
    if args.top_n is not None and args.top_n > model.graph.n_edges:
        raise ValueError(f"--top-n must be at most the {model.graph.n_edges} edges of {model.name}, got {args.top_n}")
    start = time.perf_counter()
    with Progress("scoring", len(pairs)) as progress:
        scores = attribute(
            model,
            pairs,
            metric,
            method=args.method,
            gradient_at=args.gradient_at,
            steps=args.steps,
            points=args.points,
            storage=args.storage,
            batch_size=args.batch_size,
            impl=args.impl,
            progress=progress,
        )
    return model, pairs, scores, time.perf_counter() - start


def _attribute(args: argparse.Namespace) -> None:
    if args.out.is_dir():
        raise IsADirectoryError(f"--out must be a file to write, but {args.out} is a folder")
    check_writable(args.out.parent)
    model, pairs, scores, seconds = _score(args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    scores.save(args.out)
    print(_heading(model, pairs, scores, seconds))
    shown = args.top_n if args.threshold is None else scores.threshold(args.threshold).n_edges
    if shown:
        print(_edge_table(scores, shown))
    print(f"wrote    {args.out}")


def _run(args: argparse.Namespace) -> None:
    check_writable(args.out)
    model, pairs, scores, seconds = _score(args)
    graph, metric = scores.graph, scores.meta["metric"]
    span = metric["clean"] - metric["corrupt"]
    tried = _circuits(args, model, pairs, scores, span)
    rule, circuit, pruned, value = tried[-1]
    pruned = _with_meta(pruned, {"metric": {**metric, "circuit": value}})
    args.out.mkdir(parents=True, exist_ok=True)
    scores.save(args.out / "scores.safetensors")
    _write_edges(scores, args.out / "edges.csv")
    pruned.save(args.out / "circuit.json")

    print(_heading(model, pairs, scores, seconds))
    if args.show:
        print(_edge_table(scores, min(args.show, graph.n_edges)))
    print(f"\ncircuit  {rule}; {pruned.n_edges} of {circuit.n_edges} connect embed to the logits")
    print(f"\n{'run':<24}{metric['name']:>12}{'faithfulness':>15}")
    results = [("clean", metric["clean"])]
    results += [(f"top {part.n_edges} edges", result) for _, part, _, result in tried[:-1]]
    results += [(f"circuit, {pruned.n_edges} edges", value), ("corrupt", metric["corrupt"])]
    for name, result in results:
        faithfulness = f"{(result - metric['corrupt']) / span + 0.0:>15.3f}" if span else f"{'–':>15}"
        print(f"{name:<24}{result:>12.4f}{faithfulness}")
    print(f"\nwrote    {args.out}/scores.safetensors, edges.csv, circuit.json")


_SIZES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0)  # of all edges


def _circuits(
    args: argparse.Namespace, model: Model, pairs: PromptPairs, scores: EdgeScores, span: float
) -> list[tuple[str, Circuit, Circuit, float]]:
    """The circuits that were tried, the chosen one last: how it was selected, it, what is connected, its metric."""
    from eapcore.patch import metric_on

    metric, n_edges = scores.meta["metric"], scores.graph.n_edges

    def run(rule: str, circuit: Circuit) -> tuple[str, Circuit, Circuit, float]:
        pruned = circuit.prune()
        (value,) = metric_on(model, pairs, metric["name"], [pruned], batch_size=args.batch_size)
        return rule, circuit, pruned, value

    if args.threshold is not None:
        return [run(f"edges with |score| ≥ {args.threshold:g}", scores.threshold(args.threshold))]
    if args.top_n is not None:
        return [run(f"top {args.top_n} edges by |score|", scores.top_n(args.top_n))]
    tried: list[tuple[str, Circuit, Circuit, float]] = []
    sizes = sorted({max(1, round(share * n_edges)) for share in _SIZES})
    with Progress("running circuits", len(sizes)) as progress:
        for n in sizes:
            rule = f"top {n} edges by |score|, the first size that keeps {args.faithfulness:g}"
            tried.append(run(rule, scores.top_n(n)))
            progress(len(tried), len(sizes))
            if span and (tried[-1][3] - metric["corrupt"]) / span >= args.faithfulness:
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


def _heading(model: Model, pairs: PromptPairs, scores: EdgeScores, seconds: float) -> str:
    graph = model.graph
    return (
        f"{heading(model, pairs, scores.meta['metric']['name'])}\n"
        f"scored   {graph.n_edges} edges ({graph.n_senders} senders × {graph.n_receivers} receivers) by "
        f"{scores.meta['method']['name']}, kernels {scores.meta['impl']}, in {seconds:.2f} s"
    )


def _edge_table(scores: EdgeScores, n: int) -> str:
    rows = scores.top(n)
    width = max(len("edge"), *(len(name) for name, _ in rows))
    lines = [f"\n{'rank':>6}  {'edge':<{width}}  {'score':>12}"]
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
