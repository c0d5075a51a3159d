"""A batch of prompt pairs, and which pairs go together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from eapcore.models.forward import embed
from eapcore.models.model import Model
from eapcore.tasks import PromptPairs


@dataclass(frozen=True, slots=True)
class Window:
    """A batch of pairs from the position `start` on.

    Clean and corrupt share the tokens before it: every Δ is zero there, and the two runs have one past (an ablation
    without prompts has a Δ everywhere: its windows start at 0). Behind the last position that the metric reads every
    gradient is zero. pairs, index: on the model's device; index is int64 [B], which of the task's pairs these are.
    """

    pairs: PromptPairs
    index: Tensor
    start: int
    stop: int

    @staticmethod
    def of(pairs: PromptPairs, index: Tensor, device: torch.device, *, shared: bool = True) -> Window:
        batch = pairs.select(index)
        start, stop = int(batch.first_difference().min()) if shared else 0, int(batch.positions.max()) + 1
        return Window(batch.to(device), index.to(device), start, stop)

    @property
    def read(self) -> Tensor:
        """int64 [B, 1], the answer positions inside the window."""
        return self.pairs.positions[:, None] - self.start

    @property
    def shape(self) -> tuple[int, int]:
        """(B, T)."""
        return len(self.pairs), self.stop - self.start

    def embed(self, model: Model, prompts: Tensor) -> Tensor:
        """What the sender `embed` writes for clean or corrupt prompts in the window: [B, T, D]."""
        return embed(model, prompts[:, self.start : self.stop], self.start)


# What one batch more costs, in tokens of the batches: reading the weights once more, launches. On a CPU from
# bench_pipeline.py's times over B, of which 40 ms are left at B = 0, as much as 30 tokens take; for a GPU not measured.
_BATCH_TOKENS = {"cpu": 32, "cuda": 4096}
# A prefix goes through one forward; what lies behind it through two, a backward pass and the contraction.
_PREFIX_SHARE = 0.25
# Multiply-adds of one [tokens, D] × [D, D] product of all copies, with which a batch is worth its own launches.
_WORK = {"cpu": 1 << 31, "cuda": 1 << 36}


def _groups(first: list[int], stop: list[int], size: int, enough: int) -> list[list[int]]:
    """Which pairs go together, at most `size`, by the windows first to stop of their tokens.

    A group with enough tokens ends before a pair with which more than a tenth of what it runs would be no pair's.
    """
    groups: list[list[int]] = []
    useful = begin = end = 0
    for i in sorted(range(len(first)), key=lambda i: (first[i], stop[i])):
        mine, last = stop[i] - first[i], max(end, stop[i])
        if groups and len(groups[-1]) < size:
            padded = (len(groups[-1]) + 1) * (last - begin)
            if useful < enough or 10 * (useful + mine) >= 9 * padded:
                groups[-1].append(i)
                useful, end = useful + mine, last
                continue
        groups.append([i])
        useful, begin, end = mine, first[i], stop[i]
    return groups
