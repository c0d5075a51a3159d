"""A batch of prompt pairs: which pairs go together, at which positions they run, and which logits are made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from eapcore.execution.limits import PREFIX_SHARE
from eapcore.graph.show import short
from eapcore.models.forward import embed
from eapcore.models.model import Model
from eapcore.tasks.metrics import Metric, tokens_read
from eapcore.tasks.pairs import PromptPairs


@dataclass(frozen=True, slots=True)
class LogitsRead:
    """Whose logits a metric reads: tokens int64 [B, n], None for all, and the answers and wrong answers as places
    there."""

    tokens: Annotated[Tensor, "int64 B n"] | None
    answers: Annotated[Tensor, "int64 B A"]
    wrong: Annotated[Tensor, "int64 B W"]


@dataclass(frozen=True, slots=True)
class Batch:
    """Prompt pairs at the positions start … stop − 1, where anything can differ and still be read.

    Clean and corrupt share the tokens before `start`: every Δ is zero there, and the two runs have one past (an
    ablation
    without prompts has a Δ everywhere: its batches start at 0). Behind the last position that the metric reads every
    gradient is zero. pairs, index: on the model's device; index is int64 [B], which of the task's pairs these are.
    positions: int64 [B, Q], where the metric reads a pair's logits, for another tool's metric that reads several; None
    is at the pairs' own position.
    """

    __repr__ = short

    pairs: PromptPairs
    index: Annotated[Tensor, "int64 B"]
    start: int
    stop: int
    positions: Annotated[Tensor, "int64 B Q"] | None = None

    @staticmethod
    def of(pairs: PromptPairs, index: Sequence[int], device: torch.device, *, shared: bool = True) -> Batch:
        """Some of the task's pairs; shared: whether what clean and corrupt have in common runs once."""
        chosen = torch.tensor(index, device="cpu")
        batch = pairs.select(chosen)
        start, stop = int(batch.first_difference().min()) if shared else 0, int(batch.positions.max()) + 1
        return Batch(batch.to(device), chosen.to(device), start, stop)

    @property
    def read(self) -> Annotated[Tensor, "int64 B Q"]:
        """The positions that the metric reads, from `start` on."""
        return (self.pairs.positions[:, None] if self.positions is None else self.positions) - self.start

    @property
    def shape(self) -> tuple[int, int]:
        """(B, T)."""
        return len(self.pairs), self.stop - self.start

    def embed(
        self, model: Model, prompts: Annotated[Tensor, "int64 B T'"], dtype: torch.dtype | None = None
    ) -> Annotated[Tensor, "B T D"]:
        """What the sender `embed` writes for the clean or the corrupt prompts; see `forward.embed`."""
        return embed(model, prompts[:, self.start : self.stop], self.start, dtype)

    def logits_read(self, metric: Metric, d_vocab: int) -> LogitsRead:
        """Whose logits are made for a metric."""
        found = tokens_read(metric, self.pairs.answers, self.pairs.wrong, d_vocab)
        return LogitsRead(None, self.pairs.answers, self.pairs.wrong) if found is None else LogitsRead(*found)


def spans(pairs: PromptPairs, *, shared: bool) -> tuple[Annotated[Tensor, "int64 N"], Annotated[Tensor, "int64 N"]]:
    """The first position of each pair at which it must run, and the one behind its last; shared: as in `Batch.of`."""
    first = pairs.first_difference()
    return first if shared else torch.zeros_like(first), pairs.positions + 1


def in_order(pairs: PromptPairs) -> list[int]:
    """The pairs in the order of their batches: those that share a long prefix go together."""
    first, stop = (x.tolist() for x in spans(pairs, shared=True))
    return sorted(range(len(pairs)), key=lambda i: (first[i], stop[i]))


def cut(
    first: Annotated[Tensor, "int64 N"],
    stop: Annotated[Tensor, "int64 N"],
    size: int,
    one_more: float,
    prefix_share: float = PREFIX_SHARE,
) -> list[int]:
    """How many pairs each batch has, of pairs in order with the spans first … stop − 1.

    At most `size`; fewer where those behind the cut, or those before it, have so much more in common among themselves,
    a longer prefix or an earlier end, that it outweighs one batch more.

    Args:
        first, stop: the pairs' spans.
        size: the most pairs of a batch.
        one_more: what one batch more costs, in tokens.
        prefix_share: what a token of a shared prefix costs, in tokens of what is behind it.
    """
    counts: list[int] = []
    begin = 0
    while begin < len(first):
        part = slice(begin, begin + size)
        counts.append(_together(first[part], stop[part], one_more, prefix_share))
        begin += counts[-1]
    return counts


def _together(first: Tensor, stop: Tensor, one_more: float, prefix_share: float) -> int:
    """How many of some pairs make one batch, where those that are left make the next."""
    pairs = len(first)
    count = torch.arange(1, pairs + 1, device="cpu")

    def tokens(first: Tensor, stop: Tensor) -> Tensor:
        """For each number of pairs from the beginning on, what they cost as one batch."""
        longest, shortest = stop.cummax(0).values, first.cummin(0).values
        return count * (longest - (1 - prefix_share) * shortest)

    cost = tokens(first, stop)
    behind = tokens(first.flip(0), stop.flip(0)).flip(0)  # [i]: of the pairs from i on
    cost[:-1] += behind[1:] + one_more
    return pairs - int(cost.flip(0).argmin())
