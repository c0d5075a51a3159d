"""What a long patching run has done so far, in a file from which it can go on, on this device or another."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eapcore.execution.experiment import Experiment
from eapcore.graph.files import DAMAGED, load_tensors, save_tensors

_FORMAT, _KEY = 3, "eapcore-partial"


@dataclass(frozen=True, slots=True)
class Done:
    """What is done: of some pairs all edges, and of the batch under way some of them.

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
    """A patching run's `done` and the file that keeps it.

    `done` is replaced in one assignment, and an effect joins it in one append: an interruption between any two steps
    leaves it whole.
    """

    def __init__(self, path: str | Path | None, experiment: Experiment, mask: Tensor) -> None:
        """Open the file, or begin with nothing done where there is none, or no path.

        Raises:
            ValueError: the file is no partial result, or one of something else.
            OSError: the file cannot be read, or its folder not be written to.
        """
        self.path = None if path is None else Path(path)
        self.identity = _identity(experiment, mask)
        nothing = torch.zeros_like(mask)
        count = len(experiment)
        self.done = Done(
            sums=nothing.double(),
            values=torch.zeros(2, count, dtype=torch.float64, device="cpu"),
            pairs=torch.zeros(count, dtype=torch.bool, device="cpu"),
            edges=nothing,
        )
        if self.path is None:
            return
        if self.path.is_dir():
            raise IsADirectoryError(f"resume must be a file for what is done so far, but {path} is a folder")
        if not self.path.exists():
            self.save()  # a folder that cannot be written to is refused before the work
            return
        self.done = self._read(self.path)

    def _read(self, path: Path) -> Done:
        from safetensors import SafetensorError

        try:
            tensors, header, intact = load_tensors(path, _KEY)
            found = dict(header["identity"])
            changed = [name for name, value in self.identity.items() if found.get(name) != value]
            if not changed:
                if not intact:
                    raise ValueError(DAMAGED)
                sums, values, pairs, edges = (tensors[name] for name in ("sums", "values", "pairs", "edges"))
                batch = tensors["batch"].tolist()
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            raise ValueError(f"{path} must be a partial result of patching, but it cannot be read: {error}") from error
        if changed:
            raise ValueError(
                f"{path} belongs to another {' and another '.join(changed)}: delete it, or choose another resume file"
            )
        return Done(sums, values, pairs, edges, batch)

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
        if not bool(begun.any()):
            return
        before, now = self.done.values[:, begun], measure(begun)[:, begun]
        # Other batches or another device round otherwise.
        allowed = torch.finfo(dtype).eps ** 0.5 * float(before.abs().max())
        if (gap := float((now - before).abs().max())) > allowed:
            raise ValueError(
                f"{self.path} belongs to another metric {self.identity['metric']}: on the clean and corrupt runs it "
                f"differs by up to {gap:.3g} from what was measured: delete it, or choose another resume file"
            )

    def save(self) -> None:
        """Write the file anew, if there is to be one."""
        if self.path is None:
            return
        done = self.done.folded()
        tensors = {name: getattr(done, name) for name in ("sums", "values", "pairs", "edges")}
        tensors["batch"] = torch.tensor(list(done.batch), dtype=torch.int64, device="cpu")
        save_tensors(self.path, _KEY, tensors, {"identity": self.identity})


def _digest(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(bytes(tensor.detach().cpu().contiguous().view(torch.uint8).numpy()))
    return digest.hexdigest()[:16]


def _identity(experiment: Experiment, mask: Tensor) -> dict[str, Any]:
    """What a partial result must agree in before it is gone on with."""
    pairs, mean = experiment.pairs, experiment.ablation.reference
    return {
        "format of partial results": _FORMAT,
        "model": experiment.model.content_hash,
        "dtype": str(experiment.model.dtype),
        "task": _digest(pairs.clean, pairs.corrupt, pairs.positions, pairs.answers, pairs.wrong),
        "metric": experiment.metric_name,
        "edges": _digest(mask),
        # The prompts of a mean rather than the mean, which rounds otherwise on another device.
        "ablation": [dict(experiment.ablation.meta), "" if mean is None else _digest(mean.clean, mean.lengths)],
    }
