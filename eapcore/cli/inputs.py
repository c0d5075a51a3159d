"""What the commands' options name: models, prompts, circuits, scores."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eapcore.cli.options import METHOD
from eapcore.cli.output import Progress, check_apart

_LARGE = 32 << 20  # bytes of a task file that is read as it goes

if TYPE_CHECKING:
    from eapcore.execution.ablation import Ablation
    from eapcore.graph.circuit import Circuit
    from eapcore.graph.scores import EdgeScores, NodeScores
    from eapcore.models.model import Model
    from eapcore.tasks.pairs import PromptPairs
    from eapcore.tasks.stream import PairStream
    from eapcore.tasks.truth import Truth
    from eapcore.text.tokenizer import Tokenizer


def load_model(args: argparse.Namespace, source: str, device: str | None = None) -> Model:
    """A model as the options say, on the device that they name if not on another."""
    from eapcore.execution.memory import default_device
    from eapcore.models.load import load, usable

    if device is None and str(args.device).partition(":")[0] == "meta":
        raise ValueError("--device meta has no values to compute with: eapcore info plans for a device without it")
    options = {"revision": getattr(args, "revision", None), "dtype": args.dtype, "kv": args.kv}
    if device is None and args.devices is not None:
        from eapcore.attribution.spread import spread_over
        from eapcore.execution.devices import find_devices, share_of_process

        if args.device is not None:
            raise ValueError("--device names one and --devices several: give one of the two")
        names = "auto" if args.devices == "auto" else share_of_process(find_devices(args.devices))
        return spread_over(load(source, device="cpu", **options), names)
    where = device or args.device or default_device()
    if device is None and where != "cpu" and (there := usable(where)) is not None:
        from eapcore.attribution.spread import spread_over, streams

        if streams(load(source, device="meta", **options), there):
            return spread_over(load(source, device="cpu", **options), [there])
    return load(source, device=where, **options)


def prepare(args: argparse.Namespace) -> tuple[Model, PromptPairs, str]:
    """The model, the prompt pairs and the metric that the shared options name."""
    from eapcore.tasks import find_pairs

    model, task, metric = _begin(args)
    return model, find_pairs(task, seed=args.seed, **_reading(args, model)), metric


def _reading(args: argparse.Namespace, model: Model) -> dict[str, Any]:
    return {"n": args.n, "encode": model.tokenizer, "corruption": args.corruption}


def prepare_large(args: argparse.Namespace) -> tuple[Model, PromptPairs | PairStream, str]:
    """The same for what can read a file as it goes: one that is large is not read at once."""
    from eapcore.evaluation.screened import WHOLE
    from eapcore.tasks import TASKS, find_pairs
    from eapcore.tasks.stream import STREAMED, PairStream

    model, task, metric = _begin(args)
    what, path = _reading(args, model), Path(task)
    streamed = task not in TASKS and path.suffix.lower() in STREAMED and args.method not in WHOLE
    if streamed and path.is_file() and path.stat().st_size > _LARGE:
        return model, PairStream(path, **what), metric
    return model, find_pairs(task, seed=args.seed, **what), metric


def task_of(args: argparse.Namespace) -> str:
    """The task that was named, or a toy's own."""
    from eapcore.tasks import TASKS

    if args.task is None and args.model not in TASKS:
        raise ValueError(
            f"--task is needed with --model {args.model}: one of {', '.join(TASKS)}, or a .jsonl, .json, .csv, .tsv or "
            ".parquet file"
        )
    return str(args.task or args.model)


def _begin(args: argparse.Namespace) -> tuple[Model, str, str]:
    """The model with its tokenizer, the task by its name or path, and the metric."""
    from eapcore.tasks import TASKS

    task = task_of(args)
    model = load_model(args, args.model)
    if model.folder is not None and args.out.is_file():  # a folder that was found on the Hub
        check_apart([args.out], model.folder, "--model")
    metric = args.metric or (TASKS[task].metric if task in TASKS else "logit_diff")
    return replace(model, tokenizer=find_tokenizer(args, model)), task, metric


def find_tokenizer(args: argparse.Namespace, model: Model) -> Tokenizer | None:
    """The tokenizer that was named, or the model's own, with the beginning of prompts that was asked for."""
    import eapcore.text.folder as folder
    from eapcore.models.families.gguf_tokenizer import gguf_tokenizer

    found, path = model.tokenizer, args.tokenizer
    if path is not None:
        is_gguf = path.suffix == ".gguf" and path.is_file()
        found = gguf_tokenizer(path) if is_gguf else folder.find_tokenizer(path)
        if found is None:
            raise ValueError(f"--tokenizer must be a folder with {folder.NAMED}, or a GGUF file, got {path}")
    if args.bos == "auto":
        return found
    if found is None:
        raise ValueError(
            f"--bos is for prompts as text, but {model.name} has no tokenizer here: give --tokenizer FOLDER"
        )
    return found.with_bos(args.bos)


def find_ablation(args: argparse.Namespace, model: Model, pairs: PromptPairs | PairStream) -> Ablation:
    """The ablation that the options name; a mean is made here, once."""
    from eapcore.execution.ablation import FROM_REFERENCE, Ablation
    from eapcore.tasks import PromptPairs, find_pairs

    task, reference = args.reference_task, None
    if task is not None:
        reference = find_pairs(task, n=args.n, seed=args.seed, encode=model.tokenizer)
    if not isinstance(pairs, PromptPairs):
        if args.ablation in FROM_REFERENCE and reference is None:
            raise ValueError(f"--ablation {args.ablation} of a file as large as {pairs.name} needs --reference-task")
        pairs = pairs.first
    if args.ablation != "optimal":
        return Ablation.of(model, pairs, args.ablation, reference)
    with Progress("finding constants", None, "step × sender × prompt") as progress:
        return Ablation.of(model, pairs, args.ablation, reference, progress)


def check_scoring(args: argparse.Namespace, model: Model, **options: Any) -> None:
    """Refuse what `score` would with these options, before an ablation is made: constants take long to find."""
    from eapcore.evaluation.screened import check_method

    check_method(model.graph, ablation=args.ablation, **{**method_options(args), **options})


def method_options(args: argparse.Namespace) -> dict[str, Any]:
    """Those of the method's options that were given, as keywords of `attribute`."""
    from eapcore.models.backward_rules import Rules

    found = {name: value for name in METHOD if (value := getattr(args, name)) is not None}
    return {**found, "rules": Rules(**found["rules"])} if "rules" in found else found


def uncertainty(args: argparse.Namespace) -> bool | str:
    """--uncertainty as the keyword of `attribute`."""
    words: dict[str, bool | str] = {"auto": "auto", "yes": True, "no": False}
    if args.uncertainty not in words:
        raise ValueError(f"--uncertainty must be auto, yes or no, got {args.uncertainty!r}")
    return words[args.uncertainty]


def score(
    args: argparse.Namespace, model: Model, pairs: PromptPairs | PairStream, metric: str, **options: Any
) -> EdgeScores | NodeScores:
    """First-order scores by the method's options, and by other keywords of `attribute`."""
    from eapcore.evaluation.screened import attribute, little_more
    from eapcore.tasks import PromptPairs

    how = method_options(args)
    if not how.keys() & {"method", "gradient_at", "steps", "points", "budget"}:
        some = pairs if isinstance(pairs, PromptPairs) else pairs.first
        how = little_more(model, some, metric, args.ablation, options.get("level", "edge")) | how
    with Progress("scoring", len(pairs)) as progress:
        options = {**how, **options, "batch_size": args.batch_size, "progress": progress}
        options |= {"resume": args.resume, "distributed": args.distributed}
        return attribute(model, pairs, metric, **options)


def given(args: argparse.Namespace, *names: str) -> str:
    """Those of some options without a default that were given, as they are written: "--top-n, --resume"."""
    found = [name for name in names if getattr(args, name)]
    return ", ".join(f"--{name.replace('_', '-')}" for name in found)


def check_number(option: str, number: int | None, model: Model, what: str = "edges") -> None:
    """Refuse more edges, or senders, than the model has."""
    most = model.graph.n_edges if what == "edges" else model.graph.n_senders
    if number is not None and number > most:
        raise ValueError(f"{option} must be at most the {most} {what} of {model.name}, got {number}")


def selection(args: argparse.Namespace, model: Model) -> Circuit | None:
    """The circuit that --circuit, or --scores and --top-n name; None is all edges."""
    if (args.scores is None) != (args.top_n is None):
        raise ValueError("--scores and --top-n go together: which edges of which file")
    check_number("--top-n", args.top_n, model)
    if args.circuit is not None:
        return load_circuit(args, "circuit", model)
    return None if args.scores is None else load_scores(args, model).top_n(args.top_n)


def load_circuit(args: argparse.Namespace, option: str, model: Model) -> Circuit | None:
    """The circuit whose file an option names, if it is one of the model's graph, and not empty."""
    from eapcore.graph.circuit import Circuit
    from eapcore.interop.files import is_foreign, read_foreign

    path = getattr(args, option)
    if path is None:
        return None
    circuit = read_foreign(path, model)[0] if is_foreign(path) else Circuit.load(path)
    return _of_model(circuit, option, path, model)


def load_truth(args: argparse.Namespace, model: Model) -> Circuit | Truth | None:
    """The circuit that --true-circuit names, a file's or as a task's name its published one, with the same checks."""
    from eapcore.tasks import TASKS

    known = TASKS.get(str(args.true_circuit))
    if known is None or known.truth is None:
        return load_circuit(args, "true_circuit", model)
    truth = known.truth()
    _of_model(truth.circuit, "true_circuit", args.true_circuit, model)
    return truth


def _of_model(circuit: Circuit, option: str, path: Path, model: Model) -> Circuit:
    if circuit.graph != model.graph:
        raise ValueError(
            f"--{option.replace('_', '-')} must be a circuit of {model.name}, {model.graph}, but {path} is one of "
            f"{circuit.graph}"
        )
    if not circuit.n_edges:
        raise ValueError(f"--{option.replace('_', '-')} must have edges, but the circuit in {path} has none")
    return circuit


def top(args: argparse.Namespace, model: Model) -> int:
    """--top-n where it has a default."""
    check_number("--top-n", args.top_n, model)
    return args.top_n or min(50, model.graph.n_edges)


def load_scores(args: argparse.Namespace, model: Model) -> EdgeScores:
    """The scores of the file that --scores names, ours or another tool's."""
    from eapcore.graph.scores import EdgeScores
    from eapcore.interop.files import is_foreign, scores_of

    if is_foreign(args.scores):
        return scores_of(args.scores, model, args.sign)
    if args.sign is not None:
        raise ValueError(f"--sign is for other tools' files: {args.scores} says its own")
    return EdgeScores.load(args.scores, content_hash=model.content_hash)


def find_scores(
    args: argparse.Namespace, model: Model, pairs: PromptPairs, metric: str, reduce: str = "all"
) -> tuple[EdgeScores, Ablation]:
    """The score file that --scores names, or scores by the method's options; and the ablation, made when everything
    else is known to be right."""
    from eapcore.graph.scores import EdgeScores

    if args.scores is None:
        check_scoring(args, model, reduce=reduce)
        ablation = find_ablation(args, model, pairs)
        found = score(args, model, pairs, metric, ablation=ablation, reduce=reduce)
        assert isinstance(found, EdgeScores)
        return found, ablation
    if options := given(args, *METHOD):
        raise ValueError(f"--scores names scores that are there, and {options} how to make some: give one of the two")
    scores = load_scores(args, model)
    return scores, find_ablation(args, model, pairs)
