"""The options that the commands share, and how their values are read."""

from __future__ import annotations

import argparse
import math
import textwrap
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

_DEFAULT_MODEL = "toy-ioi"
EACH, RUN = "edge × pair", "circuit × pair"  # what patching, and running circuits, counts
TOP = "(default: 50, or all edges of a smaller graph)"
METHOD = ("method", "gradient_at", "steps", "points", "rules", "qk", "exact", "budget", "storage", "impl")


class Command(Protocol):
    """Adds a command: its name, what runs it, and what it does."""

    def __call__(
        self, name: str, function: Callable[[argparse.Namespace], None], text: str
    ) -> argparse.ArgumentParser: ...


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Every option with its default, except where the help text states it or it is off."""

    def _set_color(self, color: bool, **how: Any) -> None:
        """No colours: Python 3.14, which alone calls this, asks a stream that may be broken whether it shows them."""
        super()._set_color(False, **how)  # type: ignore[misc]

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)  # which names have

    def _get_help_string(self, action: argparse.Action) -> str | None:
        off = action.default is None or action.default is False or action.default == argparse.SUPPRESS
        if off or "(default: " in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


def add_task(parser: argparse.ArgumentParser, *, metric: str = "the task's own, logit_diff for a file") -> None:
    """The options for model, task, metric and ablation, and where and how they run; metric: which is the default."""
    parser.add_argument(
        "--model",
        default=_DEFAULT_MODEL,
        metavar="MODEL",
        help="toy-ioi, toy-induction, a folder with config.json and weights, a GGUF file, or a Hub id such as gpt2",
    )
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a Hub id (default: a pinned one)")
    parser.add_argument(
        "--task",
        metavar="TASK",
        help="ioi, greater-than, docstring, agreement or capitals, for a model with a tokenizer; toy-ioi, "
        "toy-induction, sort; or a .jsonl, .json, .csv, .tsv or .parquet file of clean, corrupt, answer, wrong, as "
        "text or as token ids, or of another tool's fields (default: the toy model's own task)",
    )
    parser.add_argument(
        "--corruption",
        metavar="HOW",
        help="of ioi: other-names, s2-io or s2-other; of docstring: random-random, random-def or random-doc; of "
        "agreement: number or noun; of a file that has several, which field, of PEAP's the second file (default: the "
        "first, or the publisher's)",
    )
    parser.add_argument(
        "--tokenizer",
        type=place,
        metavar="FOLDER",
        help="folder with tokenizer.json, or a GGUF file (default: the model's own)",
    )
    parser.add_argument(
        "--bos",
        choices=("auto", "yes", "no"),
        default="auto",
        help="what prompts as text begin with: auto what the tokenizer itself puts there, yes its BOS token",
    )
    parser.add_argument(
        "--metric",
        metavar="METRIC",
        help=f"logit_diff, prob_diff, logit_margin, nll or kl (default: {metric})",
    )
    add_pairs(parser, "64, or all of a file")
    add_placement(parser)
    add_ablation(parser)


def add_pairs(parser: argparse.ArgumentParser, default: str) -> None:
    """How many pairs are drawn, from where, and run at a time."""
    # torchrun takes --n for the beginning of several options of its own.
    parser.add_argument(
        "--n-pairs", "--n", dest="n", type=positive, metavar="N", help=f"prompt pairs (default: {default})"
    )
    parser.add_argument("--seed", type=integer, default=0, help="of the prompt pairs, and whatever else is drawn")
    parser.add_argument(
        "--batch-size", type=batch_size, default="auto", metavar="B", help="pairs at a time, or auto by memory"
    )


def add_starts(parser: argparse._ActionsContainer, top_n: str, score_threshold: str) -> None:
    """From which of the edges with the largest |score| a search starts."""
    parser.add_argument("--top-n", type=several(positive), metavar="N,…", help=top_n)
    parser.add_argument("--score-threshold", type=several(number), metavar="X,…", help=score_threshold)


def add_placement(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype", metavar="DTYPE", help="float64, float32, bfloat16 or float16 (default: the checkpoint's)"
    )
    parser.add_argument(
        "--kv",
        default="each",
        metavar="HOW",
        help="k and v receivers with grouped queries: each query head's, or grouped",
    )
    parser.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:1 … (default: cuda where there is one)")
    parser.add_argument(
        "--devices",
        metavar="DEVICES",
        help="several that share the model's layers by their memory, as cuda:0,cuda:1; or auto, as many GPUs as a "
        "useful batch needs; processes of one machine share them (default: off). Layers for which a single GPU has no "
        "room are streamed to it from the host's memory",
    )


def add_method(parser: argparse.ArgumentParser) -> None:
    """The options that say how edges are scored; `score` reads them."""
    parser.add_argument(
        "--method",
        metavar="METHOD",
        help="eap, hybrid, eap-ig, clean-corrupt, eap-ig-activations, relp, gim, qk-fix, grad-drop, atp-star, hisp, "
        "hisp-raw, flow-routes, flow-sum, or screened: exact patching too, as much as --budget allows (default: "
        "the gradient at 0.75 from corrupt to clean, and where that costs nearly nothing hybrid, the edges into the "
        "logits and the last MLP exact too; eap for other ablations)",
    )
    parser.add_argument(
        "--gradient-at",
        type=point,
        metavar="POINT",
        help="where the gradient is taken: clean, corrupt, or a number from corrupt 0 to clean 1 (default: "
        "the method's)",
    )
    parser.add_argument(
        "--steps",
        type=positive,
        metavar="M",
        help="of an integral: points from corrupt to clean (default: 4 for eap-ig, 5 for eap-ig-activations)",
    )
    parser.add_argument(
        "--points",
        type=points,
        metavar="POINTS",
        help="of the same: left, right, midpoint, gauss, or your own as POINT:WEIGHT, corrupt 0 to clean 1, e.g. "
        "0.5:0.5,1:0.5 (default: gauss for eap-ig, right for eap-ig-activations)",
    )
    parser.add_argument(
        "--rules",
        type=rules,
        metavar="RULES",
        help="how gradients go back: norm=frozen, activation=identity, attention=frozen, temperature=T of the softmax, "
        "products=halved, some of them with commas in between, the others by their gradient (default: relp's are all "
        "but the temperature, gim's norm=frozen,temperature=2,products=halved, others have none)",
    )
    parser.add_argument(
        "--qk",
        metavar="HOW",
        help="edges into q and k: by their gradient, or by the exact pattern they make (default: the method's)",
    )
    parser.add_argument(
        "--exact",
        metavar="WHICH",
        help="edges that are patched, which is cheap: none, last, or some of logits, mlp, q, k, v with commas in "
        "between, the last layer's (default: the method's)",
    )
    parser.add_argument(
        "--budget",
        type=number,
        metavar="X",
        help="of screened: what it may cost, in units of what eap does (default: 3)",
    )
    parser.add_argument(
        "--storage", metavar="HOW", help="dense, or factored: less memory for large models (default: auto)"
    )
    parser.add_argument("--impl", metavar="IMPL", help="kernels: reference, cpp or triton (default: auto)")


def add_uncertainty(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--uncertainty",
        default="auto",
        metavar="HOW",
        help="yes, no, or auto where memory allows: keep each score's standard error and sign consistency over the "
        "pairs, and say whether they are enough for the circuit",
    )


def add_ablation(parser: argparse.ArgumentParser) -> None:
    """The options that say what an ablated edge carries; `find_ablation` reads them."""
    parser.add_argument(
        "--ablation", default="corrupt", metavar="WHAT", help="corrupt, zero, mean, mean-positional or optimal"
    )
    parser.add_argument(
        "--reference-task",
        metavar="TASK",
        help="whose prompts a mean is taken over, or constants are optimal for (default: the task itself)",
    )


def at_least(text: str, least: int, form: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"must be {form}, got {text!r}")
    return value


def integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be an integer, got {text!r}") from None


def place(text: str) -> Path:
    """A file or a folder; a variable that is empty in a script is neither."""
    if not text:
        raise argparse.ArgumentTypeError("must name a file or a folder, got ''")
    return Path(text)


def positive(text: str) -> int:
    return at_least(text, 1, "an integer of at least 1")


def at_least_two(text: str) -> int:
    return at_least(text, 2, "an integer of at least 2")


def count(text: str) -> int:
    return at_least(text, 0, "an integer of at least 0")


def batch_size(text: str) -> int | str:
    return text if text == "auto" else at_least(text, 1, "auto or an integer of at least 1")


def number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number, got {text!r}")
    return value


def point(text: str) -> str | float:
    """clean, corrupt, or a number; other texts go on to be refused by name."""
    try:
        return float(text)
    except ValueError:
        return text


def share(text: str) -> float:
    value = number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be a share above 0, at most 1, got {text!r}")
    return value


def points(text: str) -> str | list[tuple[float, float]]:
    """A rule's name, or (α, weight) of each point."""
    if ":" not in text:
        return text
    try:
        found = [(float(at), float(weight)) for at, weight in (part.split(":") for part in text.split(","))]
    except ValueError:
        found = []
    if not found or not all(math.isfinite(x) for pair in found for x in pair):
        raise argparse.ArgumentTypeError(f"must be a rule, or points as POINT:WEIGHT,POINT:WEIGHT, got {text!r}")
    return found


def rules(text: str) -> dict[str, Any]:
    """The fields of `rules.Rules`, from norm=frozen,activation=identity,…"""
    other = {"norm": "frozen", "activation": "identity", "attention": "frozen", "products": "halved"}
    found: dict[str, Any] = {}
    for part in text.split(","):
        name, _, rule = (word.strip() for word in part.partition("="))
        value: str | float | None = rule if name in other and rule in ("gradient", other[name]) else None
        if name == "temperature":
            with suppress(ValueError):
                value = float(rule) if 0 < float(rule) < math.inf else None
        if name in found or value is None:
            raise argparse.ArgumentTypeError(
                f"must be some of norm=frozen, activation=identity, attention=frozen, products=halved (or gradient in "
                f"their place) and temperature=T, with commas in between, got {text!r}"
            )
        found[name] = value
    return found


def several(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """The type of an option that takes one or more, with commas in between."""
    return lambda text: [kind(part) for part in text.split(",")]


def names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def add_out(parser: argparse.ArgumentParser, default: str, text: str = "the file to write", what: str = "FILE") -> None:
    parser.add_argument("--out", type=place, default=Path(default), metavar=what, help=text)


def add_report(parser: argparse.ArgumentParser, where: str) -> None:
    parser.add_argument("--report", action="store_true", help=f"also write report.html and pictures, {where}")


def add_resume(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--resume",
        type=place,
        metavar="FOLDER",
        help="keep what is done in this folder, and go on from it after an interruption (default: off)",
    )


def add_scores(parser: argparse.ArgumentParser) -> None:
    """A score file, or the method's options that make one."""
    parser.add_argument(
        "--scores",
        type=place,
        metavar="FILE",
        help="a score file, or EAP-IG's, MIB's, ACDC's or acdcpp's (default: computed here by --method)",
    )
    add_sign(parser)
    add_method(parser)


def add_sign(parser: argparse.ArgumentParser) -> None:
    """What another tool's score file does not say."""
    parser.add_argument(
        "--scores-sign",
        "--sign",
        dest="sign",
        metavar="SIGN",
        help="of another tool's score file: metric if more of what it differentiated is better, loss if less is, none "
        "for sizes (default: what the file says)",
    )


def add_edges(parser: argparse.ArgumentParser, what: str) -> None:
    """A circuit file, or a score file whose top edges are taken."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--circuit", type=place, metavar="FILE", help=f"{what}: a circuit file (default: all edges)")
    group.add_argument(
        "--scores", type=place, metavar="FILE", help=f"{what}: the top edges of a score file (default: none)"
    )
    add_sign(parser)
