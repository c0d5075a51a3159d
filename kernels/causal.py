"""What attention's implementations share: which keys a query sees, and how much."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Causal:
    """How queries see keys: s = q·k · scale, with a soft cap c as c·tanh(s/c), and softmax over the keys that are seen.

    window: how many positions a query sees, itself the last; None for all. softcap: None for none.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None

    def hidden(self, tokens: int, past: int, read: Tensor | None, device: torch.device) -> Tensor:
        """True where a query must not see a key: [T, P + T], or [B, 1, Q, P + T] for queries at positions read."""
        keys = torch.arange(-past, tokens, device=device)
        queries = torch.arange(tokens, device=device)[:, None] if read is None else read[:, None, :, None]
        future = keys > queries
        return future if self.window is None else future | (keys <= queries - self.window)

    def scores(self, q: Tensor, k: Tensor, before: int, read: Tensor | None) -> Annotated[Tensor, "... H Q P+T"]:
        """s in float32 at least, −∞ where a query must not see a key, from q [.., H, Q, K] and k [.., G, P + T, K];
        before is P."""
        hidden = self.hidden(k.shape[-2] - before, before, read, q.device)
        wide = wide_dtype(q)  # products of half precision would be rounded to it, scores of 50 by 0.2
        scores = by_group(q.to(wide), k.to(wide).transpose(-1, -2)) * self.scale
        if self.softcap is not None:
            scores = self.softcap * (scores / self.softcap).tanh()
        return scores.masked_fill_(hidden, -torch.inf)

    def pattern(self, q: Tensor, k: Tensor, before: int, read: Tensor | None) -> Annotated[Tensor, "... H Q P+T"]:
        """softmax of `scores`."""
        return self.scores(q, k, before, read).softmax(-1)


@dataclass(frozen=True, slots=True)
class ReceiverSums:
    """What `receiver_grads` reads beside the gradients of q, k and v, made together with them.

        out[c, 0, b, t] = ⟨g[c, b, t], w_gamma[c]⟩ / D
        out[c, 1, b, t] = ⟨g[c, b, t], act[c, b, t] − offset[c]⟩ / D

    Channels c are all q, then all k, then all v, one each for every query head; act are q, k and v as attention reads
    them, g their gradients as they are stored.

    out: float32 [3H, 2, B, T], packed. w_gamma, offset: [3H, K] in the gradients' dtype; without the former out[:, 0]
    is left as it is. d_model: D.
    """

    out: Annotated[Tensor, "3H 2 B T"]
    w_gamma: Annotated[Tensor, "3H K"] | None
    offset: Annotated[Tensor, "3H K"]
    d_model: int

    def fill(
        self,
        grads: tuple[Annotated[Tensor, "B H T K"], ...],
        acts: tuple[Annotated[Tensor, "B G T K"], ...],
    ) -> None:
        """By torch's operations."""
        g = torch.cat([x.to(wide_dtype(x)) for x in grads], 1)
        heads = len(self.out) // 3
        act = torch.cat([x.to(g.dtype).repeat_interleave(heads // x.shape[1], 1) for x in acts], 1)  # [B, 3H, T, K]
        pairs = [(1, act - self.offset[:, None].to(g.dtype))]
        if self.w_gamma is not None:
            pairs.append((0, self.w_gamma[:, None].to(g.dtype).expand_as(g)))
        for place, x in pairs:
            self.out[:, place] = ((g * x).sum(-1) / self.d_model).transpose(0, 1)


def empty_mixtures(q: Annotated[Tensor, "B H Q K"]) -> Annotated[Tensor, "B H Q K"]:
    """Room for z, a token's heads beside each other, as their projection reads them."""
    batch, heads, queries, d_head = q.shape
    return q.new_empty(batch, queries, heads, d_head, dtype=torch.float32).transpose(1, 2)


def grads_in(
    out: Annotated[Tensor, "B T 3H K"] | None, q: Annotated[Tensor, "B H Q K"], dz: Tensor, tokens: int
) -> tuple[Annotated[Tensor, "B H Q K"], Annotated[Tensor, "B H T K"], Annotated[Tensor, "B H T K"]]:
    """Room for the gradients of q, k and v, in dz's dtype: views of `out` where it is given."""
    if out is not None:
        dq, dk, dv = out.transpose(1, 2).chunk(3, 1)
        return dq, dk, dv
    batch, heads, _, d_head = q.shape
    dk, dv = dz.new_empty(batch, tokens, 2 * heads, d_head).transpose(1, 2).chunk(2, 1)  # beside each other
    return dz.new_empty(q.shape), dk, dv


def by_group(x: Tensor, y: Tensor) -> Annotated[Tensor, "... H Q N"]:
    """x y from x [..., H, Q, M] and y [..., G, M, N], which the H / G heads of a group share.

    Where x or y alone has an axis more in front, its copies are rows of the same products: [S, B, H, Q, N].
    """
    group = x.shape[-3] // y.shape[-3]
    if x.ndim == y.ndim + 1:
        rows = x.movedim(0, -3).reshape(*y.shape[:-2], -1, y.shape[-2])  # [B, G, H/G·S·Q, M]
        return (rows @ y).view(*x.shape[1:-2], len(x), x.shape[-2], y.shape[-1]).movedim(-3, 0)
    if y.ndim == x.ndim + 1:
        rows = y.transpose(-1, -2).movedim(0, -3).flatten(-3, -2)  # [B, G, S·N, M]
        shared = x.unflatten(-3, (-1, group)).flatten(-3, -2).transpose(-1, -2)  # [B, G, M, H/G·Q]
        made = (rows @ shared).unflatten(-1, (group, -1)).unflatten(-3, (len(y), -1))  # [B, G, S, N, H/G, Q]
        return made.movedim(-4, 0).movedim(-3, -1).flatten(-4, -3)
    if group == 1:
        return x @ y
    rows = x.unflatten(-3, (-1, group)).flatten(-3, -2)  # [..., G, H/G·Q, M]
    return (rows @ y).unflatten(-2, (group, -1)).flatten(-4, -3)


def one_block(queries: int, keys: int) -> bool:
    """Whether a head's queries and keys, those of a past among them, are one block each on a GPU."""
    return max(queries, keys) <= 32


def wide_dtype(x: Tensor) -> torch.dtype:
    """Of statistics and sums: float64 for float64, float32 for all others."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
