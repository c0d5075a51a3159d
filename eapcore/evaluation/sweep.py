"""Many models and tasks, scored one after the other into a folder each, and compared."""

from __future__ import annotations

import json
import math
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eapcore.attribution.attribute import attribute
from eapcore.evaluation.agreement import agreement
from eapcore.execution.experiment import Experiment, Task
from eapcore.execution.memory import out_of_memory
from eapcore.execution.origin import check_scores
from eapcore.execution.progress import Progress
from eapcore.graph.files import finite, replacing, write_json, write_text
from eapcore.graph.scores import EdgeScores
from eapcore.models.model import Model
from eapcore.patching.record import Recordings
from eapcore.search.smallest import SIZES, run_until, selections
from eapcore.tasks.metrics import Metric

_SENTENCES = (ValueError, FileNotFoundError, ConnectionError, PermissionError, OSError, RuntimeError)
_SCORES, _DONE, _KEPT = "scores.safetensors", "entry.json", "unfinished"


@dataclass(frozen=True, slots=True)
class Entry:
    """One of a sweep.

    name: of its folder. load: what makes its model and task, when its turn comes. metric, options: of `attribute`.
    asked: what it was made from, for JSON; results of the same are not made again. check: what refuses, before any
    entry of a sweep is scored, one that cannot be; it is not asked where the entry is done.
    """

    name: str
    load: Callable[[], tuple[Model, Task]]
    metric: str | Metric = "logit_diff"
    options: Mapping[str, Any] = field(default_factory=dict)
    asked: Mapping[str, Any] = field(default_factory=dict)
    check: Callable[[], None] = lambda: None


@dataclass(frozen=True, slots=True)
class Compared:
    """An entry beside the first.

    metric: its mean on the clean runs. spearman: rank correlation of all edges' scores with the first entry's. jaccard:
    of the edges with the largest |score|, common over all of both, at each size. faithfulness: of those circuits. NaN
    where the first has another graph.
    """

    name: str
    metric: float
    spearman: float
    sizes: Sequence[int]
    jaccard: Sequence[float]
    faithfulness: Sequence[float]


@dataclass(frozen=True, slots=True)
class Sweep:
    """All entries, in order. done: how many of them were there already."""

    entries: Sequence[Compared]
    done: int

    def save(self, path: str | Path) -> None:
        write_json(path, "sweep-table", self)


def sweep(
    entries: Iterable[Entry],
    folder: str | Path,
    *,
    shares: Sequence[float] = SIZES,
    progress: Callable[[str], Progress | None] = lambda name: None,
    distributed: bool = False,
    leads: bool = True,
) -> Sweep:
    """Score every entry into a folder of its own, run its circuits of several sizes, and compare all with the first.

    An entry that is done is read; one that was interrupted goes on where it was.

    Args:
        entries: an iterable; each one's model is loaded while the one before it is scored, if there is memory for both,
            and let go behind its turn.
        folder: where the entries' folders go.
        shares: sizes of the circuits, as shares of all edges.
        progress: what is called for an entry, by name, with (pairs done, pairs in all).
        distributed: share each entry's work among the processes of this run, as `attribute`. leads: whether this is the
            one that writes.

    Raises:
        ValueError: a name that is no folder's, or that comes twice; a folder whose results were made from something
            else; as `attribute` and `run_circuit`, naming the entry.
    """
    found: list[tuple[str, EdgeScores, list[float]]] = []
    done = 0
    turns = iter(list(_turns(entries, Path(folder), shares)))  # all are looked at before the first is scored
    here = next(turns, None)
    while here is not None:
        ahead = next(turns, None)
        entry, done = here.entry, done + (here.kept is not None)
        with _named(entry):
            made = here.kept or _score(here, ahead, shares, progress(entry.name), distributed, leads)
        found.append((entry.name, *made))
        here = ahead
    if not found:
        raise ValueError("a sweep needs at least one entry")
    return Sweep([_compared(found[0][1], each, shares) for each in found], done)


class _Turn:
    """An entry with its folder and what is there of it, and its model on its way."""

    def __init__(self, entry: Entry, place: Path, kept: tuple[EdgeScores, list[float]] | None) -> None:
        self.entry, self.place, self.kept = entry, place, kept
        self.loaded: list[tuple[Model, Task]] = []
        self.failed: list[BaseException] = []
        self.thread: threading.Thread | None = None

    def begin(self) -> None:
        """Load beside what is under way; a process that ends does not wait for it."""
        if self.kept is None:
            self.thread = threading.Thread(target=self._load, daemon=True)
            self.thread.start()

    def _load(self) -> None:
        try:
            self.loaded.append(self.entry.load())
        except BaseException as error:
            self.failed.append(error)

    def take(self) -> tuple[Model, Task]:
        """The model and the task; where memory did not suffice for two models, they are loaded now."""
        if self.thread is not None:
            self.thread.join()
        for error in self.failed:
            if not (isinstance(error, RuntimeError | MemoryError) and out_of_memory(error)):
                raise error
        return self.loaded.pop() if self.loaded else self.entry.load()


def _turns(entries: Iterable[Entry], folder: Path, shares: Sequence[float]) -> Iterator[_Turn]:
    """The entries one after the other, checked, with what is done of each."""
    names: set[str] = set()
    for entry in entries:
        named = re.fullmatch(r"[\w.+-]+", entry.name) and entry.name not in (".", "..")
        if not named or entry.name in names:
            raise ValueError(f"an entry's name must be that of a folder of its own, got {entry.name!r}")
        names.add(entry.name)
        kept = _read(folder / entry.name, _asked(entry, shares))
        if kept is None:
            with _named(entry):
                entry.check()
        yield _Turn(entry, folder / entry.name, kept)


@contextmanager
def _named(entry: Entry) -> Iterator[None]:
    """Errors that say of which entry they are."""
    try:
        yield
    except _SENTENCES as error:
        if type(error) not in _SENTENCES or len(error.args) != 1:
            raise  # an interruption, or what has more to say than a sentence
        raise type(error)(f"{entry.name}: {error}") from error


def _score(
    turn: _Turn,
    ahead: _Turn | None,
    shares: Sequence[float],
    progress: Progress | None,
    distributed: bool,
    leads: bool,
) -> tuple[EdgeScores, list[float]]:
    entry, place, (model, task) = turn.entry, turn.place, turn.take()
    if ahead is not None:
        ahead.begin()
    options: dict[str, Any] = {**entry.options, "progress": progress, "distributed": distributed}
    options["resume"] = place / _KEPT
    scores = attribute(model, task, entry.metric, **options)
    check_scores(scores, model.graph)
    experiment = Experiment.of(
        model, task, entry.metric, options.get("ablation", "corrupt"), options.get("reference"), distributed
    )
    recordings = Recordings(experiment, options.get("batch_size", "auto"))
    tried = run_until(experiment, recordings, selections(scores, shares), math.inf)[0]
    kept = [each.faithfulness for each in tried]
    if leads:
        scores.save(place / _SCORES)
        content = {"format": "eapcore-sweep-entry", "format_version": 1, "asked": _asked(entry, shares)}
        with replacing(place / _DONE) as temporary:
            write_text(temporary, finite(content | {"faithfulness": kept}))
        shutil.rmtree(place / _KEPT, ignore_errors=True)
    return scores, kept


def _asked(entry: Entry, shares: Sequence[float]) -> dict[str, Any]:
    """What an entry was made from, as JSON has it."""
    return dict(json.loads(json.dumps({**entry.asked, "sizes": list(shares)})))


def _read(place: Path, now: Mapping[str, Any]) -> tuple[EdgeScores, list[float]] | None:
    """What is done of an entry; None where it is not done."""
    if not (place / _DONE).exists():
        return None
    try:
        content = json.loads((place / _DONE).read_text(encoding="utf-8"))
        asked, kept = dict(content["asked"]), [math.nan if x is None else float(x) for x in content["faithfulness"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{place / _DONE} must be what a sweep wrote, but it cannot be read: {error}") from error
    changed = [name for name in sorted({*asked, *now}) if asked.get(name) != now.get(name)]
    if changed:
        raise ValueError(
            f"{place} holds results of another {' and another '.join(changed)}: delete it, or give the entry another "
            "name"
        )
    return EdgeScores.load(place / _SCORES), kept


def _compared(first: EdgeScores, each: tuple[str, EdgeScores, list[float]], shares: Sequence[float]) -> Compared:
    name, scores, kept = each
    sizes = sorted({max(1, round(share * scores.graph.n_edges)) for share in shares})
    metric = float((scores.meta.get("metric") or {}).get("clean", math.nan))
    if scores.graph != first.graph:
        return Compared(name, metric, math.nan, sizes, [math.nan] * len(sizes), kept)
    both = [(first.top_n(n).mask, scores.top_n(n).mask) for n in sizes]
    jaccard = [int((a & b).sum()) / int((a | b).sum()) for a, b in both]
    return Compared(name, metric, agreement(first, scores).spearman, sizes, jaccard, kept)
