"""What is summed over batches of pairs, kept batch by batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from eapcore.execution.distributed import Ranks
from eapcore.execution.experiment import Experiment, check_batch_size
from eapcore.execution.progress import Count, Progress
from eapcore.execution.resume import Resume, check_metric
from eapcore.patching.record import Recording, useful_size


@dataclass(frozen=True, slots=True)
class _State:
    """What a lane has done: the sum over its batches, the metric on the clean and corrupt runs of the pairs that are
    done, float64 [2, N], and which these are, bool [N]."""

    total: Tensor
    values: Tensor
    done: Tensor

    def and_of(self, group: list[int], part: Tensor, ends: Tensor) -> _State:
        values, done = self.values.clone(), self.done.clone()
        values[:, group], done[group] = ends.cpu(), True
        return _State(self.total + part.cpu(), values, done)


def summed(
    experiment: Experiment,
    shape: tuple[int, ...],
    measure: Callable[[Recording, Tensor], Tensor],
    kept: Resume,
    batch_size: int | str,
    progress: Progress | None,
    each: int = 1,
) -> Tensor:
    """The sum over all batches of what `measure` makes of a batch and of its metric on the clean and corrupt runs
    [2, B]: float64 of a shape, the same in every process.

    kept: the folder of this work; its lanes share the pairs. each: how much `progress` counts for a pair.
    """
    check_batch_size(batch_size)
    asked = batch_size if isinstance(batch_size, int) else None
    ranks, count = experiment.ranks, len(experiment)
    size = kept.settle("batch size", asked, lambda: ranks.least(useful_size(experiment, batch_size)))
    states: dict[int, _State] = {}
    for lane in kept.mine:
        nothing = torch.zeros(shape, dtype=torch.float64, device="cpu")
        ends = torch.zeros(2, count, dtype=torch.float64, device="cpu")
        states[lane] = _State(nothing, ends, torch.zeros(count, dtype=torch.bool, device="cpu"))
        if lane in kept.found:
            found = kept.found.pop(lane)
            states[lane] = _State(found["total"], found["values"], found["done"])
    seen = sum(int(state.done.sum()) for state in states.values())
    counted = Count(ranks.watched(progress), each * count, each * seen)
    if seen:
        counted.add(0)
    for lane in states:
        _lane(experiment, measure, kept, size, lane, states, counted, each)
    nothing = torch.zeros(shape, dtype=torch.float64, device="cpu")
    return ranks.sum([state.total for state in states.values()] or [nothing], kept.lanes)


def _lane(
    experiment: Experiment,
    measure: Callable[[Recording, Tensor], Tensor],
    kept: Resume,
    size: int,
    lane: int,
    states: dict[int, _State],
    counted: Count,
    each: int,
) -> None:
    """What is left of a lane's batches."""
    groups = replace(experiment, ranks=Ranks(lane, kept.lanes)).groups(size, 1)

    def save() -> None:
        state = states[lane]
        kept.write(lane, {"batch size": size}, {"total": state.total, "values": state.values, "done": state.done})

    before = [group for group in groups if bool(states[lane].done[group].all())]
    if before:  # a metric of one's own is known by its values alone
        now = experiment.ends(Recording.of(experiment, before[0]).reference).cpu()
        was = states[lane].values[:, before[0]]
        check_metric(kept, experiment.metric_name, was, now, experiment.model.dtype)
    else:
        save()  # a folder that cannot be written to is refused before the work
    try:
        for group in groups[len(before) :]:
            recording = Recording.of(experiment, group)
            ends = experiment.ends(recording.reference)
            states[lane] = states[lane].and_of(group, measure(recording, ends), ends)
            counted.add(each * len(group))
            if kept.due:
                save()
    finally:
        save()
