"""eapcore mib: the MIB benchmark's protocol for several methods, and the folders that its leaderboard takes."""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eapcore.cli.inputs import find_ablation, prepare
from eapcore.cli.options import RUN, Command, add_out, add_resume, add_task, names
from eapcore.cli.output import Progress, check_out, heading, table, write

if TYPE_CHECKING:
    from eapcore.evaluation.faithfulness import Mib
    from eapcore.execution.experiment import Experiment
    from eapcore.graph.scores import EdgeScores

_FILE = "mib.json"
_ABLATIONS = {"corrupt": "patching"}  # the benchmark's names where they are others
_METHODS = {"eap": "EAP", "eap-ig": "EAP-IG-inputs", "eap-ig-activations": "EAP-IG-activations"}


def add(command: Command) -> None:
    """Add the command and its options."""
    parser = command("mib", run, "Judge methods by the MIB benchmark's protocol, and write what its leaderboard takes.")
    add_task(parser)
    parser.add_argument(
        "--methods",
        type=names,
        metavar="METHODS",
        help=f"with commas in between, each with its own defaults (default: {','.join(_METHODS)})",
    )
    parser.add_argument(
        "--as-task", metavar="NAME", help="the benchmark's name of the task, e.g. arc_easy (default: the task's own)"
    )
    parser.add_argument(
        "--as-model", metavar="NAME", help="the benchmark's name of the model, e.g. qwen2.5 (default: the model's own)"
    )
    add_resume(parser)
    add_out(parser, "mib", "where the files go", "FOLDER")


@dataclass(frozen=True, slots=True)
class _Row:
    """A method: its scores, what they are worth, and how long they took, None where an interrupted run began them."""

    method: str
    judged: Mib
    seconds: float | None
    folder: str


@dataclass(frozen=True, slots=True)
class _Table:
    command: str
    rows: list[_Row]
    meta: dict[str, Any]

    def save(self, path: Path) -> None:
        from eapcore.graph.files import write_json

        write_json(path, "mib-table", self)


@dataclass(frozen=True, slots=True)
class _Importances:
    scores: EdgeScores
    d_model: int

    def save(self, path: Path) -> None:
        """In the benchmark's sign, which takes the largest first; sizes stay sizes."""
        from eapcore.interop.eap_ig.files import GraphFile

        sign = "none" if self.scores.unsigned else "loss"
        GraphFile.of(self.scores, self.d_model).save(path, sign=sign)


def run(args: argparse.Namespace) -> None:
    """Score by each method, judge at MIB's sizes, write scores as a submission, and print one table."""
    from eapcore.attribution.methods import METHODS
    from eapcore.evaluation.faithfulness import measure_mib
    from eapcore.evaluation.screened import FLOW, attribute, check_method
    from eapcore.execution.experiment import Experiment
    from eapcore.graph.scores import EdgeScores
    from eapcore.interop.eap_ig.files import mib_path
    from eapcore.kernels.checks import one_of
    from eapcore.patching.record import Recordings

    check_out(args, [_FILE])
    methods = list(_METHODS) if args.methods is None else args.methods
    if not methods or len(set(methods)) < len(methods):
        raise ValueError(f"--methods must be one or several, each once, got {','.join(methods) or 'none'}")
    for method in methods:
        one_of("method", method, (*METHODS, *FLOW, "screened"))
    if args.kv == "grouped":
        raise ValueError("MIB counts the k and v inputs of each query head, so --kv must be each, got grouped")
    model, pairs, metric = prepare(args)
    task = _name(args.as_task or Path(pairs.name).stem)
    model_name = _name(args.as_model or model.name.rstrip("/").split("/")[-1])
    for method in methods:
        check_method(model.graph, method=method, ablation=args.ablation)
    ablation = find_ablation(args, model, pairs)
    experiment = Experiment.of(model, pairs, metric, ablation, distributed=args.distributed)
    recordings, rows = Recordings(experiment, args.batch_size), []
    shared = {"ablation": experiment.ablation, "batch_size": args.batch_size, "distributed": args.distributed}
    for method in methods:
        kept = None if args.resume is None else args.resume / method
        begun, start = kept is not None and kept.exists(), time.perf_counter()
        with Progress(f"scoring by {method}", len(pairs)) as progress:
            scores = attribute(model, pairs, metric, method=method, progress=progress, resume=kept, **shared)
        assert isinstance(scores, EdgeScores)
        seconds = _seconds(kept, None if begun else time.perf_counter() - start, args.leads)
        folder = (_METHODS.get(method, method), _ABLATIONS.get(args.ablation, args.ablation), "edge")
        place = mib_path(args.out, *folder, task, model_name)
        write(args, _Importances(scores, model.config.d_model), place)
        with Progress(f"judging {method}", None, RUN) as progress:
            judged = measure_mib(experiment, recordings, scores, progress=progress, resume=kept)
        rows.append(_Row(method, judged, seconds, str(place.relative_to(args.out))))
    write(args, _Table(args.written, rows, _meta(experiment)), args.out / _FILE)
    print(heading(model, pairs, metric))
    print(table(("method", "CPR", "95 %", "CMD", "95 %", "seconds"), [_shown(row) for row in rows]))
    print("\nCPR: larger is better, of the edges by usefulness; CMD: smaller is better, of the edges by |score|")
    if args.ablation != "corrupt":
        print(
            f"edges outside a circuit carried {args.ablation} here; the leaderboard's evaluation patches them (corrupt)"
        )
    if model.config.post_norms:
        print(
            "a norm stands behind this model's heads: here each sends its share of what the norm makes of one run's, "
            "there the evaluation norms anew what an edge's end reads of them, so that CPR and CMD are others"
        )
    print(f"\nwrote    {args.out / _FILE}, and for the leaderboard")
    for row in rows:
        print(f"         {args.out / row.folder}")


def _seconds(kept: Path | None, seconds: float | None, leads: bool) -> float | None:
    """How long a method's scores took, or had taken where they were there before, if that is known."""
    if kept is None:
        return seconds
    file = kept / "seconds.txt"
    if seconds is None:
        return float(file.read_text(encoding="utf-8")) if file.exists() else None
    if leads:
        file.write_text(f"{seconds}\n", encoding="utf-8")
    return seconds


def _name(text: str) -> str:
    """A name as part of a folder's, in which an underscore stands between task and model."""
    return re.sub(r"[^\w.-]+", "-", text).replace("_", "-").strip("-.") or "unnamed"


def _meta(experiment: Experiment) -> dict[str, Any]:
    return {**experiment.describe(), "ablation": dict(experiment.ablation.meta)}


def _shown(row: _Row) -> Sequence[str | float]:
    signed, absolute = row.judged.signed, row.judged.absolute
    ends = ["–" if at is None else f"{at[0]:.3f} to {at[1]:.3f}" for at in (signed.cpr_interval, absolute.cmd_interval)]
    seconds = "–" if row.seconds is None else row.seconds
    return row.method, row.judged.cpr, ends[0], row.judged.cmd, ends[1], seconds
