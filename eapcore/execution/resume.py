"""What a long piece of work has done so far, lane by lane, in a folder from which it can go on, here or elsewhere."""

from __future__ import annotations

import json
import os
import re
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from eapcore.execution.distributed import Ranks
from eapcore.execution.experiment import Experiment
from eapcore.graph.files import DAMAGED, load_tensors, save_tensors

FORMAT = 4
SAVE_SECONDS = 30.0  # between two writes of a lane
T = TypeVar("T", int, str)
_KEY = "eapcore-partial"


class Resume:
    """The folder of a piece of work: `{what}.{lane}-of-{lanes}.safetensors` holds what a lane has done.

    A lane's file is written beside and renamed. Rows that only grow lie in files of their own, written before the file
    that counts them.

    lanes: how many the work was cut into when it began; their sums are added in their order, whoever continues them.
    mine: those of this process.
    """

    def __init__(
        self, path: str | Path | None, what: str, identity: Callable[[], Mapping[str, Any]], ranks: Ranks, lanes: int
    ) -> None:
        """Open the folder, or make it; path: None keeps nothing.

        identity: what the work is, asked where it matters, see `Experiment.identity`. lanes: how many there are where
        nothing is done yet.

        Raises:
            ValueError: what lies there belongs to something else, is of another format, or is in use.
            OSError: the folder cannot be read or written to.
        """
        self.path, self.what, self.ranks = None if path is None else Path(path), what, ranks
        self.saved = time.monotonic()
        self.parts: dict[int, int] = {}
        if self.path is not None:
            self.identity = json.loads(json.dumps({"format of partial results": FORMAT, **identity()}))
            lanes = self._open(self.path, lanes) if ranks.leads else lanes
        self.lanes = ranks.first(lanes)
        self.mine = ranks.lanes(self.lanes)
        self.notes: dict[int, dict[str, Any]] = {}
        self.found: dict[int, dict[str, Tensor]] = {}
        for lane in self.mine if self.path is not None else ():
            if self._file(lane).exists():
                self.notes[lane], self.found[lane] = self._read(lane)

    def _open(self, path: Path, lanes: int) -> int:
        """Make the folder, lock it, and say how many lanes the work in it has."""
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(f"resume must be a folder for what is done so far, but {path} is a file")
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = os.open(path / "lock", os.O_WRONLY | os.O_CREAT, 0o666)
        except OSError as error:
            raise type(error)(f"resume must be a folder that can be written to, but {path} cannot: {error}") from error
        weakref.finalize(self, os.close, lock)
        try:
            import fcntl

            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of this process: gone with it, however it ends
        except (BlockingIOError, PermissionError):
            raise ValueError(f"{path} is in use by another run: wait for it, or choose another resume folder") from None
        except (ImportError, OSError):  # a system without locks
            pass
        names = [re.fullmatch(rf"{self.what}\.\d+-of-(\d+)\.safetensors", file.name) for file in path.iterdir()]
        found = {int(name[1]) for name in names if name}
        if len(found) > 1:
            raise ValueError(
                f"{path} holds what runs of {' and of '.join(map(str, sorted(found)))} processes did: delete it, or "
                "choose another resume folder"
            )
        return found.pop() if found else lanes

    def _file(self, lane: int, part: int | None = None) -> Path:
        assert self.path is not None
        return self.path / f"{self.what}.{lane}-of-{self.lanes}{'' if part is None else f'.{part:05}'}.safetensors"

    def settle(self, name: str, asked: T | None, make: Callable[[], T]) -> T:
        """A choice on which the last bits depend: that of the run that began, what is asked for, or what `make` says.

        Raises:
            ValueError: something else is asked for than what the run began with.
        """
        known = next((note[name] for note in self.notes.values() if name in note), None)
        known = self.ranks.first(known) if self.path is not None else None
        if known is None:
            return make() if asked is None else asked
        if asked is not None and asked != known:
            raise ValueError(
                f"{self.path} was begun with the {name} {known}, got {asked}: leave it at auto, or choose another "
                "resume folder"
            )
        return known

    def _read(self, lane: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """A lane's note and tensors; "rows" of all its parts."""
        path = self._file(lane)
        note, tensors = self._load(path)
        self.parts[lane] = note.pop("parts")
        if self.parts[lane]:
            rows = [self._load(self._file(lane, part))[1]["rows"] for part in range(self.parts[lane])]
            tensors["rows"] = torch.cat(rows)
        return note, tensors

    def _load(self, path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
        from safetensors import SafetensorError

        try:
            tensors, header, intact = load_tensors(path, _KEY)
            found, note = dict(header["identity"]), dict(header["note"])
            changed = [name for name, value in self.identity.items() if found.get(name) != value]
            if not changed and not intact:
                raise ValueError(DAMAGED)
        except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
            raise ValueError(
                f"{path} must be a partial result of {self.what}, but it cannot be read: {error}; delete it, or choose "
                "another resume folder"
            ) from error
        if changed:
            raise ValueError(
                f"{path} belongs to another {' and another '.join(changed)}: delete it, or choose another resume folder"
            )
        return note, tensors

    @property
    def due(self) -> bool:
        """Whether it is time to write."""
        return self.path is not None and time.monotonic() - self.saved > SAVE_SECONDS

    def write(
        self, lane: int, note: Mapping[str, Any], tensors: Mapping[str, Tensor], rows: Tensor | None = None
    ) -> None:
        """Write a lane's file anew, if there is to be one; rows: those that came since it was written last."""
        if self.path is None:
            return
        parts = self.parts.setdefault(lane, 0)
        if rows is not None and len(rows):
            self._save(self._file(lane, parts), {}, {"rows": rows})
            parts += 1
        self._save(self._file(lane), {**note, "parts": parts}, tensors)
        self.parts[lane], self.saved = parts, time.monotonic()

    def _save(self, path: Path, note: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        here = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
        save_tensors(path, _KEY, here, {"identity": self.identity, "note": dict(note)})


@dataclass(frozen=True, slots=True)
class Done:
    """What exact patching of a lane has done: of some pairs all edges, and of the batch under way some of them.

    It depends neither on which pairs run together from here on nor on how many edges go through the model at once, so
    neither on the device.

    sums: float64 [S, R], the sum over pairs of each edge's effect, before `found`. values: float64 [2, N], the metric
    on the clean and the corrupt run of the pairs that were begun. pairs: bool [N], those of which all edges are done.
    batch: the pairs under way, by number. edges: bool [S, R], the edges of which these are done, before `found`. found:
    (senders, receivers, their effects' sum over the batch under way) of those that were measured since.
    """

    sums: Tensor
    values: Tensor
    pairs: Tensor
    edges: Tensor
    batch: Sequence[int] = ()
    found: list[tuple[list[int], list[int], Tensor]] = field(default_factory=list)

    def folded(self) -> Done:
        """The same with `found` in the sums and among the edges."""
        sums, edges = self.sums.clone(), self.edges.clone()
        for senders, receivers, effects in self.found[:]:
            sums[senders, receivers] += effects
            edges[senders, receivers] = True
        return replace(self, sums=sums, edges=edges, found=[])

    def begin(self, batch: Sequence[int], ends: Tensor) -> Done:
        """A batch is under way, whose metric is `ends` [2, B]; where it is the one that was, its edges stay done."""
        if list(batch) == list(self.batch):
            return self
        values = self.values.clone()
        values[:, list(batch)] = ends.cpu()
        return replace(self, values=values, batch=list(batch), edges=torch.zeros_like(self.edges))

    def end(self) -> Done:
        """All edges of the batch under way are done."""
        folded, pairs = self.folded(), self.pairs.clone()
        pairs[list(self.batch)] = True
        return replace(folded, pairs=pairs, batch=(), edges=torch.zeros_like(self.edges))


class Partial:
    """A patching lane's `done`, and the folder that keeps it.

    `done` is replaced in one assignment, and an effect joins it in one append: an interruption between any two steps
    leaves it whole.
    """

    def __init__(self, resume: Resume, lane: int, experiment: Experiment, mask: Tensor, size: int) -> None:
        """What the lane has done so far; mask: bool [S, R], its edges. size: pairs a batch."""
        self.resume, self.lane, self.metric, self.note = resume, lane, experiment.metric_name, {"batch size": size}
        self.mask, self.n_edges = mask, int(mask.sum())
        nothing, count = torch.zeros_like(mask), len(experiment)
        self.done = Done(
            sums=nothing.double(),
            values=torch.zeros(2, count, dtype=torch.float64, device="cpu"),
            pairs=torch.zeros(count, dtype=torch.bool, device="cpu"),
            edges=nothing,
        )
        if lane in resume.found:
            found = resume.found.pop(lane)
            sums, values, pairs, edges = (found[name] for name in ("sums", "values", "pairs", "edges"))
            self.done = Done(sums, values, pairs, edges, found["batch"].tolist())
        else:
            self.save()  # a folder that cannot be written to is refused before the work

    def check_metric(self, measure: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
        """A callable's name says little: what it makes of the runs that were begun must be what it made of them.

        Args:
            measure: the metric on the clean and corrupt runs of some pairs, bool [N], float64 [2, N].
            dtype: the model's.

        Raises:
            ValueError: the file belongs to another metric.
        """
        begun = self.done.pairs.clone()
        begun[list(self.done.batch)] = True
        if bool(begun.any()):
            check_metric(self.resume, self.metric, self.done.values[:, begun], measure(begun)[:, begun], dtype)

    def save(self) -> None:
        """Write the lane's file anew, if there is to be one."""
        done = self.done.folded()
        tensors = {name: getattr(done, name) for name in ("sums", "values", "pairs", "edges")}
        tensors["batch"] = torch.tensor(list(done.batch), dtype=torch.int64, device="cpu")
        self.resume.write(self.lane, self.note, tensors)


def check_metric(resume: Resume, name: str, before: Tensor, now: Tensor, dtype: torch.dtype) -> None:
    """ValueError where a metric's values on the same runs are not what they were, but for the rounding of a dtype."""
    # Other batches or another device round otherwise.
    allowed = torch.finfo(dtype).eps ** 0.5 * float(before.abs().max())
    if (gap := float((now - before).abs().max())) > allowed:
        raise ValueError(
            f"{resume.path} belongs to another metric {name}: on the clean and corrupt runs it differs by up to "
            f"{gap:.3g} from what was measured: delete it, or choose another resume folder"
        )
