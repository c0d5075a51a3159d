"""Prompt pairs: what every task is once its text has become tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PromptPairs:
    """N clean prompts, each with a corrupt one of the same length, and what counts as right and wrong behind them.

    clean, corrupt: int64 [N, T], padded on the right with 0; the same where nothing but an ablation with zero or a mean
    is to be run. lengths: int64 [N]. positions: int64 [N], where the metric
    reads the logits (the last token by default). answers, wrong: int64 [N, A], [N, W] token ids, padded with −1; W may
    be 0. name says which task this is, seed how it was drawn (None where nothing was), vocab names the ids.
    """

    clean: Annotated[Tensor, "int64 N T"]
    corrupt: Annotated[Tensor, "int64 N T"]
    lengths: Annotated[Tensor, "int64 N"]
    positions: Annotated[Tensor, "int64 N"]
    answers: Annotated[Tensor, "int64 N A"]
    wrong: Annotated[Tensor, "int64 N W"]
    name: str = "unnamed"
    seed: int | None = None
    vocab: tuple[str, ...] | None = None

    @staticmethod
    def from_lists(
        clean: Sequence[Sequence[int]],
        corrupt: Sequence[Sequence[int]] | None = None,
        answers: Sequence[Sequence[int] | int] = (),
        wrong: Sequence[Sequence[int] | int] | None = None,
        *,
        positions: Sequence[int] | None = None,
        name: str = "unnamed",
        seed: int | None = None,
        vocab: Sequence[str] | None = None,
    ) -> PromptPairs:
        """Build the pairs from lists of token ids, one entry a pair; corrupt=None where there are no corrupt prompts.

        Raises:
            ValueError: nothing given; lists of different numbers of entries; a pair whose prompts differ in length or
                are empty; a pair without an answer; a position outside its prompt. The pair is named.
        """
        corrupt = clean if corrupt is None else corrupt
        if not clean:
            raise ValueError(f"the task {name!r} is empty: at least one prompt pair is needed")
        wrong = [[] for _ in clean] if wrong is None else wrong
        counts = {"clean": len(clean), "corrupt": len(corrupt), "answers": len(answers), "wrong": len(wrong)}
        if positions is not None:
            counts["positions"] = len(positions)
        if len(set(counts.values())) > 1:
            raise ValueError(f"every pair needs one entry in each list, got {counts}")
        right = [[ids] if isinstance(ids, int) else list(ids) for ids in answers]
        others = [[ids] if isinstance(ids, int) else list(ids) for ids in wrong]
        for i, (a, b) in enumerate(zip(clean, corrupt, strict=True)):
            if len(a) != len(b):
                raise ValueError(
                    f"clean and corrupt must have the same number of tokens, but pair {i} has {len(a)} and {len(b)}: "
                    "positions are compared one by one"
                )
            if not a:
                raise ValueError(f"a prompt needs at least one token, but pair {i} has none")
            if not right[i]:
                raise ValueError(f"pair {i} has no answer: at least one token id is needed")
            if min(*right[i], *others[i], 0) < 0:
                raise ValueError(
                    f"an answer is a token id of at least 0, but pair {i} has {min(*right[i], *others[i])}"
                )
            if positions is not None and not 0 <= positions[i] < len(a):
                raise ValueError(f"the position {positions[i]} of pair {i} is outside its prompt of {len(a)} tokens")
        lengths = torch.tensor([len(a) for a in clean], device="cpu")
        return PromptPairs(
            clean=_padded(clean, 0),
            corrupt=_padded(corrupt, 0),
            lengths=lengths,
            positions=lengths - 1 if positions is None else torch.tensor(list(positions), device="cpu"),
            answers=_padded(right, -1),
            wrong=_padded(others, -1),
            name=name,
            seed=seed,
            vocab=None if vocab is None else tuple(vocab),
        )

    def __len__(self) -> int:
        return self.clean.shape[0]

    def select(self, index: Annotated[Tensor, "int64 B"]) -> PromptPairs:
        """The pairs at these indices, cut to the longest prompt among them."""
        longest = int(self.lengths[index].max())
        return replace(
            self,
            clean=self.clean[index, :longest],
            corrupt=self.corrupt[index, :longest],
            lengths=self.lengths[index],
            positions=self.positions[index],
            answers=self.answers[index],
            wrong=self.wrong[index],
        )

    def first_difference(self) -> Annotated[Tensor, "int64 N"]:
        """int64 [N], the first position at which clean and corrupt differ."""
        return (self.clean != self.corrupt).int().argmax(1)

    def batches(self, size: int) -> Iterator[PromptPairs]:
        """All pairs in order, `size` at a time, the last batch as short as it must be."""
        for indices in torch.arange(len(self), device="cpu").split(size):
            yield self.select(indices)

    def to(self, device: torch.device | str) -> PromptPairs:
        """The same pairs on another device."""
        names = ("clean", "corrupt", "lengths", "positions", "answers", "wrong")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    def check_positions(self) -> None:
        """Raise ValueError if the metric reads a position outside a prompt."""
        if self.positions.shape != self.lengths.shape:
            expected, got = list(self.lengths.shape), list(self.positions.shape)
            raise ValueError(f"positions must be int64 [N] = {expected}, one for each pair, got {got}")
        outside = ((self.positions < 0) | (self.positions >= self.lengths)).nonzero()
        if len(outside):
            pair = int(outside[0])
            raise ValueError(
                f"the position {int(self.positions[pair])} of pair {pair} is outside its prompt of "
                f"{int(self.lengths[pair])} tokens"
            )

    def check_corrupt(self) -> None:
        """Raise ValueError if a corrupt prompt is the clean one as far as the metric reads."""
        read = torch.arange(self.clean.shape[1], device=self.clean.device) <= self.positions[:, None]
        same = ((self.clean != self.corrupt) & read).any(1).logical_not().nonzero()
        if len(same):
            pair = int(same[0])
            whole = bool((self.clean[pair] == self.corrupt[pair]).all())
            where = "" if whole else f" up to position {int(self.positions[pair])}, where the metric reads"
            raise ValueError(
                f"clean and corrupt of pair {pair} are identical{where}: every score would be zero; without corrupt "
                "prompts choose the ablation zero, mean or mean-positional"
            )

    def check_vocabulary(self, d_vocab: int, model: str) -> None:
        """Raise ValueError if an answer or a wrong token id is not in the vocabulary of a model."""
        for what, ids in (("answer", self.answers), ("wrong answer", self.wrong)):
            bad = ((ids < -1) | (ids >= d_vocab)).nonzero()
            if len(bad):
                pair = int(bad[0, 0])
                value = int(ids[tuple(bad[0])])
                raise ValueError(
                    f"pair {pair} has the {what} {value}, but the vocabulary of {model} is 0..{d_vocab - 1}"
                )


def _padded(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor(
        [list(row) + [fill] * (width - len(row)) for row in rows], dtype=torch.int64, device="cpu"
    ).view(len(rows), width)
