"""What the commands share: the options that say what runs on what, how they are read, and what is printed of it."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eapcore.circuit import EdgeScores
    from eapcore.model import Model
    from eapcore.nodes import NodeScores
    from eapcore.tasks import PromptPairs

_DEFAULT_MODEL = "toy-ioi"


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Every option with its default, except where the help text states it or it is off."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        off = action.default is None or action.default is False or action.default == argparse.SUPPRESS
        if off or "(default: " in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


def add_task(parser: argparse.ArgumentParser, *, metric: str = "the task's own, logit_diff for a file") -> None:
    """The options for model, task and metric, and where and how they run; metric says which is the default."""
    parser.add_argument(
        "--model",
        default=_DEFAULT_MODEL,
        metavar="MODEL",
        help="toy-ioi, toy-induction, a folder with config.json and weights, or a Hub id such as gpt2",
    )
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a Hub id (default: a pinned one)")
    parser.add_argument(
        "--task",
        metavar="TASK",
        help="toy-ioi, toy-induction, sort, or a .jsonl or .csv file of clean, corrupt, answer, wrong, as text or as "
        "token ids (default: the toy model's own task)",
    )
    parser.add_argument(
        "--tokenizer", type=Path, metavar="FOLDER", help="folder with tokenizer.json (default: the model's own folder)"
    )
    parser.add_argument(
        "--metric",
        metavar="METRIC",
        help=f"logit_diff, prob_diff, logit_margin, nll or kl (default: {metric})",
    )
    parser.add_argument("--n", type=positive, metavar="N", help="prompt pairs (default: 64, or all of a file)")
    parser.add_argument("--seed", type=integer, default=0, help="of the prompt pairs that are drawn")
    parser.add_argument(
        "--batch-size", type=batch_size, default="auto", metavar="B", help="pairs at a time, or auto by memory"
    )
    add_placement(parser)


def add_placement(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype", metavar="DTYPE", help="float64, float32, bfloat16 or float16 (default: the checkpoint's)"
    )
    parser.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:1 … (default: cuda where there is one)")


METHOD = ("method", "gradient_at", "steps", "points", "rules", "storage", "impl")


def add_method(parser: argparse.ArgumentParser) -> None:
    """The options that say how edges are scored; `score` reads them."""
    parser.add_argument(
        "--method",
        metavar="METHOD",
        help="eap, eap-ig, clean-corrupt, eap-ig-activations, relp, qk-fix, grad-drop or atp-star (default: eap)",
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
        type=points,
        metavar="POINTS",
        help="of the same: left, right, midpoint, gauss, or your own as POINT:WEIGHT, corrupt 0 to clean 1, e.g. "
        "0.5:0.5,1:0.5 (default: gauss for eap-ig, right for eap-ig-activations)",
    )
    parser.add_argument(
        "--rules",
        type=rules,
        metavar="RULES",
        help="of relp: norm=frozen, activation=identity, attention=frozen, some of them with commas in between, the "
        "others by their gradient (default: all three)",
    )
    parser.add_argument(
        "--storage", metavar="HOW", help="dense, or factored: less memory for large models (default: auto)"
    )
    parser.add_argument("--impl", metavar="IMPL", help="kernels: reference, cpp or triton (default: auto)")


def add_ablation(parser: argparse.ArgumentParser) -> None:
    """The options that say what an ablated edge carries; `find_ablation` reads them."""
    parser.add_argument("--ablation", default="corrupt", metavar="WHAT", help="corrupt, zero, mean or mean-positional")
    parser.add_argument(
        "--reference-task", metavar="TASK", help="whose prompts a mean is taken over (default: the task itself)"
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


def rules(text: str) -> dict[str, str]:
    """The fields of `rules.Rules`, from norm=frozen,activation=identity,…"""
    found = dict.fromkeys(("norm", "activation", "attention"), "")
    for part in text.split(","):
        name, _, rule = (word.strip() for word in part.partition("="))
        if found.get(name) != "" or rule not in ("gradient", "identity" if name == "activation" else "frozen"):
            raise argparse.ArgumentTypeError(
                f"must be some of norm=frozen, activation=identity and attention=frozen, with commas in between (or "
                f"gradient in their place), got {text!r}"
            )
        found[name] = rule
    return {name: rule for name, rule in found.items() if rule}


def several(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """The type of an option that takes one or more, with commas in between."""
    return lambda text: [kind(part) for part in text.split(",")]


def load_model(args: argparse.Namespace, source: str) -> Model:
    import torch

    from eapcore.model import load

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return load(source, revision=getattr(args, "revision", None), dtype=args.dtype, device=device)


def prepare(args: argparse.Namespace) -> tuple[Model, PromptPairs, str]:
    """The model, the prompt pairs and the metric that the shared options name."""
    from eapcore.tasks import TASKS, find_pairs

    task = args.task
    if task is None:
        if args.model not in TASKS:
            raise ValueError(
                f"--task is needed with --model {args.model}: one of {', '.join(TASKS)}, or a .jsonl or .csv file"
            )
        task = args.model
    model = load_model(args, args.model)
    encode = None if task in TASKS else find_encoder(args, model)
    pairs = find_pairs(task, n=args.n, seed=args.seed, encode=encode)
    return model, pairs, args.metric or (TASKS[task].metric if task in TASKS else "logit_diff")


def find_encoder(args: argparse.Namespace, model: Model) -> Callable[[str], list[int]] | None:
    """The tokenizer that was named, the toy's own, that of the model's folder, or that of its repository on the Hub."""
    from eapcore.tasks import TASKS
    from eapcore.tasks.text import encoder
    from eapcore.weights import fetch_tokenizer

    if args.tokenizer is not None:
        named = encoder(args.tokenizer)
        if named is None:
            raise ValueError(
                f"--tokenizer must be a folder with tokenizer.json or vocab.json and merges.txt, got {args.tokenizer}"
            )
        return named
    if model.name in TASKS:
        return TASKS[model.name].encode
    own = model.folder
    if own is None:
        return None
    found = encoder(own)
    if found is not None or Path(args.model).expanduser().is_dir():
        return found
    later: list[Callable[[str], list[int]]] = []

    def encode(text: str) -> list[int]:  # a file of token ids needs no tokenizer, and no network
        if not later:
            folder = fetch_tokenizer(model.name, own)
            fetched = None if folder is None else encoder(folder)
            if fetched is None:
                raise ValueError(
                    f"{model.name} on the Hub has no tokenizer.json: give token ids, or --tokenizer FOLDER"
                )
            later.append(fetched)
        return later[0](text)

    return encode


def find_ablation(args: argparse.Namespace, model: Model) -> dict[str, Any]:
    """The keywords `ablation` and `reference` that the options name."""
    from eapcore.tasks import TASKS, find_pairs

    task = args.reference_task
    if task is None:
        return {"ablation": args.ablation}
    encode = None if task in TASKS else find_encoder(args, model)
    return {"ablation": args.ablation, "reference": find_pairs(task, n=args.n, seed=args.seed, encode=encode)}


def method_options(args: argparse.Namespace) -> dict[str, Any]:
    """Those of the method's options that were given, as keywords of `attribute`."""
    from eapcore.rules import Rules

    found = {name: value for name in METHOD if (value := getattr(args, name)) is not None}
    return {**found, "rules": Rules(**found["rules"])} if "rules" in found else found


def score(
    args: argparse.Namespace, model: Model, pairs: PromptPairs, metric: str, how: dict[str, Any]
) -> EdgeScores | NodeScores:
    """First-order scores by the method's options, and by other keywords of `attribute`."""
    from eapcore.attribution import attribute

    with Progress("scoring", len(pairs)) as progress:
        options = {**method_options(args), **how, "batch_size": args.batch_size, "progress": progress}
        return attribute(model, pairs, metric, **options)


class Progress:
    """A progress bar on a terminal, nothing in a pipe. total: None until the first report of what is done says it."""

    def __init__(self, text: str, total: int | None, unit: str = "pair") -> None:
        from tqdm import tqdm

        self.bar = tqdm(total=total, desc=text, unit=unit, leave=False, disable=not sys.stderr.isatty())

    def __enter__(self) -> Callable[[int, int], None]:
        return self.show

    def show(self, done: int, total: int) -> None:
        self.bar.total = total
        self.bar.update(done - self.bar.n)

    def __exit__(self, *args: object) -> None:
        self.bar.close()


def given(args: argparse.Namespace, *names: str) -> str:
    """Those of some options without a default that were given, as they are written: "--top-n, --resume"."""
    found = [name for name in names if getattr(args, name)]
    return ", ".join(f"--{name.replace('_', '-')}" for name in found)


def check_number(option: str, number: int | None, model: Model, what: str = "edges") -> None:
    """Refuse more edges, or senders, than the model has."""
    most = model.graph.n_edges if what == "edges" else model.graph.n_senders
    if number is not None and number > most:
        raise ValueError(f"{option} must be at most the {most} {what} of {model.name}, got {number}")


_READ = ("task", "reference_task", "scores", "circuit", "true_circuit", "resume")


def check_out(args: argparse.Namespace) -> None:
    """Fail before the work where --out cannot be written, or is a file that another option reads."""
    path: Path = args.out
    if path.is_dir():
        raise IsADirectoryError(f"--out must be a file to write, but {path} is a folder")
    if path.exists() and not path.is_file():
        raise OSError(f"--out must be a file to write, but {path} is no regular file")
    check_writable(path.parent)
    for option in _READ:
        read = getattr(args, option, None)
        if read is not None and (option == "resume" or Path(read).is_file()) and Path(read).resolve() == path.resolve():
            named = f"--{option.replace('_', '-')}"
            raise ValueError(f"--out would write over {path}, which {named} reads: give it another name by --out")


def check_writable(folder: Path) -> None:
    """Fail before the work rather than after it; a folder that is not there yet is made when the work is done."""
    import os

    folder = folder.absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        fault = "cannot be written to" if existing.is_dir() else "is a file"
        raise OSError(f"--out must lie in a folder that can be written to, but {existing} {fault}: choose another")


def heading(model: Model, pairs: PromptPairs, metric: str) -> str:
    """Two lines that name the model, the task and the metric."""
    config = model.config
    kind = "attention-only" if config.attn_only else "GPT-2"
    seed = "" if pairs.seed is None else f", seed {pairs.seed}"
    return (
        f"model    {model.name}: {kind}, {config.n_layers} layers × {config.n_heads} heads, d_model {config.d_model}, "
        f"{str(model.dtype).removeprefix('torch.')} on {model.device}\n"
        f"task     {pairs.name}: {len(pairs)} prompt pairs{seed}; metric {metric}"
    )
