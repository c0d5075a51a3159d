"""The command line: eapcore run | attribute | info, and what `cli_verify` adds."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from eapcore.cli.attribute import _attribute
from eapcore.cli.info import _info
from eapcore.cli.options import (
    Help,
    add_ablation,
    add_commands,
    add_method,
    add_placement,
    add_task,
    count,
    number,
    positive,
)
from eapcore.cli.run import _run


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


if __name__ == "__main__":
    sys.exit(main())
