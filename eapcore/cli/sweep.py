"""eapcore sweep: many models and tasks, each into a folder of its own, and one table of them all."""

from __future__ import annotations

import argparse
import math
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eapcore.cli.inputs import check_scoring, find_ablation, method_options, prepare, task_of
from eapcore.cli.options import Command, add_method, add_task, place
from eapcore.cli.output import Stages, table, write

if TYPE_CHECKING:
    from eapcore.evaluation.sweep import Entry
    from eapcore.execution.experiment import Task
    from eapcore.models.model import Model

_SHOWN = (0.01, 0.05, 0.2)  # shares of all edges in the table


def add(command: Command) -> None:
    """Add the command and its options."""
    parser = command("sweep", run, "Score many models and tasks, each into a folder of its own, and compare them.")
    parser.add_argument(
        "file",
        type=place,
        metavar="SWEEP.toml",
        help="options of all as under [defaults], and an [[entry]] each with its name and its own; an option is "
        "written as for attribute, without dashes in front",
    )
    parser.add_argument(
        "--out",
        type=place,
        default=Path("sweep"),
        metavar="FOLDER",
        help="where the entries' folders go, and table.json",
    )


def run(args: argparse.Namespace) -> None:
    """Score what is not done yet, and print one line for each entry."""
    from eapcore.evaluation.sweep import sweep

    entries = list(_entries(args))  # all are read before the first runs
    with Stages() as begin:
        found = sweep(
            entries, args.out, progress=lambda name: begin(name, "pair"), distributed=args.distributed, leads=args.leads
        )
    path = args.out / "table.json"
    write(args, found, path)
    shown = [f"{100 * share:g} %" for share in _SHOWN]
    header = ["entry", "metric", "Spearman", *(f"Jaccard {s}" for s in shown), *(f"kept {s}" for s in shown)]
    rows: list[tuple[str | float, ...]] = []
    for entry in found.entries:
        largest = entry.sizes[-1]
        at = [min(range(len(entry.sizes)), key=lambda i: abs(entry.sizes[i] - s * largest)) for s in _SHOWN]
        numbers: list[float] = [
            entry.metric,
            entry.spearman,
            *(entry.jaccard[i] for i in at),
            *(entry.faithfulness[i] for i in at),
        ]
        rows.append((entry.name, *("–" if math.isnan(x) else round(x, 4) + 0.0 for x in numbers)))
    print(f"{len(found.entries)} entries, {found.done} of them done before; compared with {found.entries[0].name}")
    print(table(header, rows))
    print(f"\nwrote    {path} and a folder for each entry beside it")


def _entries(args: argparse.Namespace) -> Iterator[Entry]:
    """The entries of the file, their options read as a command line's."""
    try:
        content = tomllib.loads(args.file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{args.file} is not TOML: {error}") from error
    defaults, entries = content.pop("defaults", {}), content.pop("entry", [])
    if content or not isinstance(defaults, dict) or not isinstance(entries, list) or not entries:
        others = ", ".join(content) or "no [[entry]]"
        raise ValueError(f"{args.file} must have [[entry]] tables and at most [defaults], got {others}")
    names: set[str] = set()
    for number, own in enumerate(entries, 1):
        settings = {**defaults, **own}
        name = settings.pop("name", None)
        if not isinstance(name, str) or name in names:
            raise ValueError(f"entry {number} of {args.file} must have a name of its own, got {name!r}")
        names.add(name)
        yield _entry(args, name, settings, f"entry {name!r} of {args.file}")


def _entry(args: argparse.Namespace, name: str, settings: dict[str, Any], where: str) -> Entry:
    from eapcore.evaluation.sweep import Entry
    from eapcore.models.load import check_source
    from eapcore.tasks import check_task

    parser = _Options(where)
    add_task(parser)
    add_method(parser)
    words = [word for key, value in settings.items() for word in (f"--{key}", _text(value))]
    own = parser.parse_args(words)
    own.out, own.distributed, own.leads, own.resume = args.out / name / "entry", args.distributed, args.leads, None
    options: dict[str, Any] = {**method_options(own), "batch_size": own.batch_size}

    def load() -> tuple[Model, Task]:
        model, pairs, _ = prepare(own)
        check_scoring(own, model)
        options["ablation"] = find_ablation(own, model, pairs)
        return model, pairs

    def check() -> None:
        check_source(own.model)
        check_task(task_of(own), own.n, own.corruption)
        if own.reference_task is not None:
            check_task(own.reference_task, own.n)

    return Entry(name, load, _metric(own), options, settings, check)


def _metric(own: argparse.Namespace) -> str:
    from eapcore.tasks import TASKS

    task = own.task or own.model
    return own.metric or (TASKS[task].metric if task in TASKS else "logit_diff")


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


class _Options(argparse.ArgumentParser):
    """Reads an entry's options; what is wrong is said of it."""

    def __init__(self, where: str) -> None:
        super().__init__(prog=where, add_help=False, allow_abbrev=False)
        self.where = where

    def error(self, message: str) -> Any:
        raise ValueError(f"{self.where}: {message}")
