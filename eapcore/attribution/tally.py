"""What has been scored of a task so far: sums that a run can go on from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from eapcore.execution.batch import Batch
from eapcore.execution.resume import Resume
from eapcore.graph.pair_scores import PairWriter


class Tally:
    """A lane's sums over the pairs that are done, in order.

    scores: float64 by name: the sum over pairs, for reduce "position" [T, ..] of each, for "pair" a row of each of the
    lane's pairs, in their order at the rows `places` int64 [n]. statistics: float64 by name, those of `statistics`
    over the pairs that are done, where they are kept. largest: max |∂metric/∂logits|. done: pairs in all.
    size: pairs a batch from here on.

    Of the window under way, in which pairs were put in order: window, its number; here, how many of its pairs are done;
    values, float64 [2, N], the metric on the clean and corrupt runs, 0 for pairs that are not done. ends: float64 [2],
    its sums over the windows before.
    """

    def __init__(
        self,
        resume: Resume,
        lane: int,
        shapes: Mapping[str, tuple[int, ...]],
        places: Tensor,
        reduce: str,
        choices: Mapping[str, Any],
        writer: PairWriter | None = None,
        statistics: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        """shapes: of `scores`. choices: what else the run that goes on from here has to do alike. writer: where each
        pair's scores go; `scores` are their sums then. statistics: their shapes."""
        self.writer = writer
        self.resume, self.lane, self.reduce, self.places, self.choices = resume, lane, reduce, places, choices
        self.where: dict[str, Any] = {"dtype": torch.float64, "device": places.device}
        self.scores = {name: torch.zeros(shape, **self.where) for name, shape in shapes.items()}
        self.statistics = {name: torch.zeros(shape, **self.where) for name, shape in (statistics or {}).items()}
        self.largest = torch.zeros((), **self.where)
        self.ends, self.values = torch.zeros(2, **self.where), torch.zeros(2, 0, **self.where)
        self.done = self.here = self.window = self.size = self.written = 0
        self.whole = True

    def restore(self) -> None:
        """Take over what the lane's file holds, or write one where there is none."""
        if self.lane not in self.resume.found:
            self.save()  # a folder that cannot be written to is refused before the work
            return
        found, note = self.resume.found.pop(self.lane), self.resume.notes[self.lane]
        self.done, self.here, self.window, self.size = (note[x] for x in ("done", "here", "window", "batch size"))
        self.largest, self.ends, self.values = (found[x].to(self.largest.device) for x in ("largest", "ends", "values"))
        if self.writer is not None:
            self.writer.done = note["files"]
        self.statistics = {name: found[f"statistics.{name}"].to(self.largest.device) for name in self.statistics}
        if self.reduce != "pair" or self.writer is not None:
            self.scores = {name: found[f"scores.{name}"].to(self.largest.device) for name in self.scores}
        elif self.done:
            widths = [total[0].numel() for total in self.scores.values()]
            for total, rows in zip(self.scores.values(), found["rows"].split(widths, 1), strict=True):
                total[self.places[: self.done]] = rows.view(-1, *total.shape[1:]).to(total.device)
        self.written = self.done

    def begin(self, window: int, n_pairs: int, size: int) -> None:
        """The pairs of a window come next, unless they are under way already."""
        if self.window == window and self.size:
            return
        self.whole = False
        self.ends, self.values = self.ends + self.values.sum(1), torch.zeros(2, n_pairs, **self.where)
        self.window, self.here, self.size = window, 0, size
        self.whole = True

    def reach(self, positions: int) -> None:
        """Sums for each position have at least so many."""
        for name, total in self.scores.items():
            if len(total) < positions:
                self.scores[name] = torch.cat([total, total.new_zeros(positions - len(total), *total.shape[1:])])

    def add(
        self,
        batch: Batch,
        values: Tensor,
        largest: Tensor,
        parts: list[Tensor],
        first: int = 0,
        divisors: Sequence[Tensor] | None = None,
        statistics: Mapping[str, Tensor] | None = None,
    ) -> None:
        """A batch is scored. An interruption in between leaves it marked as not whole.

        first: which of the task's pairs is the window's first. divisors: of the pairs' own scores by name. statistics:
        of these pairs.
        """
        if self.reduce == "position":
            self.reach(batch.stop)
        self.whole = False
        self.values[:, batch.index] = values
        self.largest = torch.maximum(self.largest, largest)
        count = len(batch.pairs)
        if self.writer is not None:
            own = parts if divisors is None else [x / by for x, by in zip(parts, divisors, strict=True)]
            self.writer.add(batch.index + first, dict(zip(self.scores, own, strict=True)))
            parts = [part.sum(0) for part in parts]
        for total, part in zip(self.scores.values(), parts, strict=True):
            if self.reduce == "pair" and self.writer is None:
                total[self.places[self.done : self.done + count]] = part
            else:
                (total[: batch.stop] if self.reduce == "position" else total).add_(part)
        for name, total in self.statistics.items():
            total.add_((statistics or {})[name])
        self.done += count
        self.here += count
        self.whole = True

    def save(self) -> None:
        """Write what is done, unless an interruption left it between two steps: then the file stays as it was."""
        if self.resume.path is None or not self.whole:
            return
        tensors = {"values": self.values, "largest": self.largest, "ends": self.ends}
        rows: Tensor | None = None
        if self.writer is not None:
            self.writer.flush()
        if self.reduce == "pair" and self.writer is None:
            new = self.places[self.written : self.done]
            rows = torch.cat([x[new].flatten(1) for x in self.scores.values()], 1)
        else:
            tensors |= {f"scores.{name}": x for name, x in self.scores.items()}
        tensors |= {f"statistics.{name}": x for name, x in self.statistics.items()}
        note = {**self.choices, "done": self.done, "here": self.here, "window": self.window, "batch size": self.size}
        note |= {} if self.writer is None else {"files": self.writer.done}
        self.resume.write(self.lane, note, tensors, rows)
        self.written = self.done

    def finish(self) -> int:
        """All is done: how many files of pairs' scores there are."""
        assert self.writer is not None
        self.writer.flush()
        return self.writer.done
