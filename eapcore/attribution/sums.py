"""A batch of prompt pairs, where its senders' differences are kept, and how gradients meet them.

A window is a batch cut to the positions where anything can differ and still be read. Its differences are kept either
as the dense sender buffer, contracted with one layer's receivers at a time while the backward pass runs, or as factors
that have no axis H beside D, contracted in chunks of tokens at the end, or with the residual stream's gradient behind
each sender.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from eapcore.attribution.methods import Pass
from eapcore.execution.batch import Batch
from eapcore.models.forward import StageSaved
from eapcore.models.model import Model
from eapcore.models.tensors import at_positions, on


class Sums:
    """A batch's scores by name, float64: as they are, for each pair [B, ..], or for each position from the first on
    [T, ..].

    spread: what a pass's scores without their weight count in "spread" beside "scores", where that is among the shapes.
    absolute: a pair's scores are added to `total` as |score| at the end of every pass. by_sender: of edges' scores, the
    result is the sum over the edges of each sender. pairs: beside the "scores" of each position those of each pair, in
    "pairs".
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        batch: Batch,
        reduce: str,
        impl: str,
        *,
        absolute: bool = False,
        by_sender: bool = False,
        pairs: bool = False,
    ) -> None:
        self.reduce, self.impl, self.read, self.start = reduce, impl, batch.pairs.positions, batch.start
        self.absolute, self.inner = absolute, "pair" if absolute else reduce
        self.by_sender, self.spread = by_sender, 0.0
        size = {"all": (), "pair": (len(batch.pairs),), "position": (batch.stop,)}[self.inner]
        self.scores = {
            name: torch.zeros((*size, *shape), dtype=torch.float64, device=self.read.device)
            for name, shape in shapes.items()
        }
        if pairs:
            made = (len(batch.pairs), *shapes["scores"])
            self.scores["pairs"] = torch.zeros(made, dtype=torch.float64, device=self.read.device)
        self.total = {name: torch.zeros_like(self._summed(x)) for name, x in self.scores.items()} if absolute else {}

    def reduction(self, at_read: bool) -> str:
        """What a block is to be summed over; see `add`."""
        return "pair" if self.inner == "position" and at_read else self.inner

    def targets(self, at_read: bool) -> list[tuple[str, str]]:
        """What a block of scores is added to, and what it is to be summed over for that; see `add`."""
        own = [("scores", self.reduction(at_read))]
        return [*own, ("pairs", "pair")] if "pairs" in self.scores else own

    def add(
        self,
        name: str,
        block: Tensor,
        place: tuple[Any, ...],
        weight: float,
        at_read: bool = False,
        pairs: slice = slice(None),
    ) -> None:
        """Add a block that was summed over some of the pairs as `reduction` says, [.., *place], from any device to the
        scores there."""
        if self.spread and name == "scores":
            self.add("spread", block, place, weight * self.spread, at_read, pairs)
        scores = self.scores[name][(..., *place)]
        block = on(block, scores.device)
        if name == "pairs":
            scores[pairs].add_(block, alpha=weight)
        elif self.inner == "position" and at_read:
            scores.index_add_(0, self.read[pairs], block.double() * weight)
        else:
            here = {"all": slice(None), "pair": pairs, "position": slice(self.start, None)}[self.inner]
            scores[here].add_(block, alpha=weight)

    def replace(self, name: str, block: Tensor, place: tuple[Any, ...]) -> None:
        """Put a block for each pair, [B, *place], in the place of what all passes make there."""
        if name == "scores" and "pairs" in self.scores:
            self.scores["pairs"][(..., *place)] = block.double()
        scores = self.scores[name][(..., *place)]
        if self.inner == "pair":
            scores.copy_(block)
        elif self.inner == "all":
            scores.copy_(block.double().sum(0))
        else:
            scores.zero_()
            scores.index_add_(0, self.read, block.double())

    def end_pass(self, keep: Tensor | None = None) -> None:
        """What was added so far is one pass's; keep: bool [S], the senders whose sums it counts in."""
        for name in self.total:
            self.total[name] += self._summed(self.scores[name], keep).abs()
            self.scores[name].zero_()

    def _summed(self, scores: Tensor, keep: Tensor | None = None) -> Tensor:
        if not self.by_sender:
            return scores
        return scores.sum(-1) if keep is None else scores.sum(-1) * keep

    def result(self) -> dict[str, Tensor]:
        if not self.absolute:
            return {name: self._summed(x) for name, x in self.scores.items()}
        return {name: x.sum(0) if self.reduce == "all" else x for name, x in self.total.items()}


Products = dict[tuple[int, int], Tensor]
"""W_O W′ of the exact patterns, by the first sender and the first receiver, which all batches have alike."""


class Store(Protocol):
    """Where a batch's differences e_corrupt − e_clean are kept until gradients meet them: where they are made.

    steps: `contract` takes the gradients of several runs of the same pairs, [n·B, Q, D], and adds them up. channels:
    whether it takes the differences of q, k and v. products: where exact patterns keep what is the same for the next
    batch, None for nowhere. embedded: Δ of the embedding before it is rounded to half precision, where that is wanted,
    see `unrounded`. read: the batch's positions that are read.
    """

    products: Products | None
    embedded: Tensor | None
    read: Tensor
    steps: bool
    channels: bool
    model: Model

    def set_embed(self, sent: Tensor, clean: Tensor) -> None:
        """Δ of the embedding, [B, T, D], as what it sends and what it sent, in any dtypes."""

    def set_heads(self, index: int, dz: Tensor) -> None:
        """Δ of a layer's mixtures of v, [B, Q, H, K]."""

    def mlp_room(self, index: int) -> Tensor | None:
        """Where Δ of what a layer's MLP sends [B, Q, D] may be written in place of `set_mlp`, its rows equally far
        apart; None: it may not."""

    def set_mlp(self, index: int, delta: Tensor, units: Tensor | None) -> None:
        """Δ of what a layer's MLP sends, [B, Q, D], and of its hidden units [B, Q, M] where they are wanted."""

    def set_channels(self, index: int, q: Tensor, kv: Tensor) -> None:
        """Δ of a layer's q [B, Q, H, K], and of its k and v [B, T, 2G, K], before norms and rotation."""

    def deltas(
        self, at_read: bool, count: int, at_once: int | None = None, device: torch.device | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        """The first so many senders' Δ, at most `at_once` at a time: which they are, and [S', B, T, D], or
        [S', B, Q, D] at the positions that are read. The last layer's are there at those alone. device: where they are
        wanted; None leaves those of each component where they are."""

    def of_pairs(self, at_read: bool, count: int, pairs: slice) -> Iterator[tuple[slice, Tensor]]:
        """Of some pairs the first so many senders' Δ, [S', b, T, D] or at the positions that are read, all those on one
        device together: which they are, and Δ."""

    def factors(self, senders: slice, at_read: bool) -> tuple[Tensor, Tensor] | None:
        """Of some heads their Δz [B, T, h, K] and what makes Δ of it, [h, K, D]; None for other senders, or unknown."""

    def moved(self, name: str) -> Tensor:
        """Δ of what all heads of a layer "a{l}" or its MLP "m{l}" send together, [B, T, D], of the last [B, Q, D]."""

    def contract(
        self, sums: Sums, saved: list[StageSaved], grad: Tensor, past: list[Tensor] | None, step: Pass
    ) -> None:
        """Go back from grad [n·B, Q, D], the gradient of the logits' receiver, and add weight · scores to sums."""


def unrounded(store: Store, senders: slice, delta: Tensor, at_read: bool) -> Tensor:
    """Some senders' Δ, in half precision in float32 with the embedding's as it was before it was rounded: the first
    layer reads nothing else, and of an embedding that is ablated with zeros its rounding would be all that is left."""
    if store.embedded is None:
        return delta
    made = delta.to(store.embedded.dtype)
    if senders.start == 0:
        made[0] = on(at_positions(store.embedded, store.read if at_read else None), made.device)
    return made


def over_steps(x: Tensor, dim: int, rows: int) -> Tensor:
    """x [.., n·B, ..] of n runs of the same B = rows pairs, added up over the runs: [.., B, ..]."""
    return x if x.shape[dim] == rows else x.unflatten(dim, (-1, rows)).sum(dim)


def rows_at(x: Tensor, read: Tensor, out: Tensor | None = None) -> Tensor:
    """x [S, B, T, D] at the positions read [B, Q]: [S, B, Q, D], in memory in the order of x; out: where it goes, laid
    out like x."""
    pairs = torch.arange(x.shape[1], device=x.device)[:, None]
    if x.stride(0) < x.stride(2):  # the senders of a position beside each other: one row of memory
        rows, places = x.permute(1, 2, 0, 3).flatten(0, 1), (pairs * x.shape[2] + read).flatten()
        if out is None:
            return rows[places].unflatten(0, read.shape).permute(2, 0, 1, 3)
        torch.index_select(rows.flatten(1), 0, places, out=out.permute(1, 2, 0, 3).flatten(0, 1).flatten(1))
        return out
    return x[:, pairs, read] if out is None else out.copy_(x[:, pairs, read])
