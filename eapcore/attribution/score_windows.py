"""Exact patterns of short prompts: what an edge adds to attention's scores, without the q or k that it would make.

With σ that of the norm's input x, σ_s that of x + Δ_s, and n the part of a score that the norm divides,

    q(x + Δ_s)_t · k_u = q_t · k_u + Δ_s,t · (W′_q k_u)/σ_s,t + (σ_t/σ_s,t − 1) n_tu,    n_tu = (q_t − b − Wᵀβ) · k_u

and an edge into k alike, W′ as in `exact_patterns`. A position t of q meets the keys up to t, one of k the queries from
there on: W′_k q_t, …, W′_k q_T, W′_q k_1, …, W′_q k_t lie beside each other where all queries lie in front of all keys.
So each position has a window of the same T + 1 rows for each head, and what all senders add to all scores that they can
change is one product for each position, of D · (T + 1) multiply-adds a head where q and k are 2 K · K and their scores
2 K · T, which are more of them for short prompts, and in worse shapes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from eapcore.kernels.causal import by_group
from eapcore.kernels.patterns import moved_rstd, pattern_changes
from eapcore.models.attention import Channels
from eapcore.models.tensors import accumulate_dtype

LONGEST = 64  # keys: with more, scores are so many that few senders go together, and the other way's products fill


def pays(part: Channels, kinds: tuple[slice, ...]) -> bool:
    """Whether windows are the faster way to edges into all q heads, all k heads or both of a layer.

    In half precision they are not taken: what is added to a score would be rounded, where a change of several units,
    as by ablation with zeros, is the exponent of a pattern.
    """
    attention, saved = part.attention, part.saved
    plain = attention.q_norm.kind == attention.k_norm.kind == "none"
    if not plain or attention.rotary is not None or attention.softcap is not None:
        return False
    if part.dz.dtype != accumulate_dtype(part.dz.dtype):
        return False
    _, size, width = attention.w_o.shape
    tokens, reads = saved.kv.shape[1], saved.q.shape[1]
    keys = tokens + (0 if part.past is None else part.past.shape[1])
    others = keys + 1 if len(kinds) == 2 else keys if kinds[0].start == 0 else reads
    # Scores of q or k that are made are thin products, and what is made is passed over several times.
    return keys <= LONGEST and width * others <= len(kinds) * size * (2 * size + 4 * keys)


@dataclass(frozen=True, slots=True)
class _Side:
    """What changes of q, or of k, do: all [B, T, N, H], T the positions that change and N those that they meet.

    known: the scores, −∞ where a query does not see a key. normed: the part of them that the norm divides. values:
    ∂metric/∂pattern less its mean over the pattern.
    """

    known: Tensor
    normed: Tensor
    values: Tensor


class Windows:
    """A layer's pattern, and what edges into its q heads, its k heads or both change in it.

    part: what the backward pass made of the layer. kinds: its q channels, its k channels, or both where all positions
    are read.
    """

    def __init__(self, part: Channels, kinds: tuple[slice, ...]) -> None:
        attention, saved, read = part.attention, part.saved, part.read
        self.attention, self.kinds, self.heads = attention, kinds, attention.n_heads
        wide = accumulate_dtype(part.dz.dtype)
        q, k, v = attention.heads(saved.q, saved.kv, part.past, read)  # [B, H, Q, K], [B, G, P + T, K]
        before = k.shape[2] - saved.kv.shape[1]
        of_q, of_k = kinds[0].start == 0, kinds[-1].start != 0
        self.norm_in = saved.norm_in if of_k else saved.norm_in.at(read)
        known = attention.causal.scores(q, k, before, read)  # [B, H, Q, P + T]
        pattern = known.softmax(-1)
        values = by_group(part.dz.transpose(1, 2).to(wide), v.to(wide).transpose(-1, -2))
        values = values - (pattern * values).sum(-1, keepdim=True)
        offset = part.constants[1].to(wide)[:, None]

        def normed(q: Tensor, k: Tensor) -> Tensor:
            return by_group(q, k.transpose(-1, -2)) * attention.scale

        self.of_q = self.of_k = self.past = None
        self.rooms: dict[str, Tensor] = {}
        self.made: tuple[slice, Tensor] | None = None
        self.rows: list[tuple[Tensor, Tensor]] = []  # [B, H, N, K] whose products with [H, K, D] they are
        if of_k:
            here, keys = k[:, :, before:].to(wide), offset[attention.channels[1]]
            keys = keys if attention.grouped else keys[:: attention.group]
            along = normed(q.to(wide), here - keys)
            self.of_k = _Side(
                *(x.permute(0, 3, 2, 1).contiguous() for x in (known[..., before:], along, values[..., before:]))
            )
            self.rows.append((q, self._weight(slice(self.heads, self.heads + attention.n_kv))))
            if before:
                earlier = known[..., :before].logsumexp(-1, keepdim=True).clamp_min(torch.finfo(wide).min)
                mean = ((known[..., :before] - earlier).exp() * values[..., :before]).sum(-1)
                self.past = earlier[..., 0].transpose(1, 2), mean.transpose(1, 2)  # [B, Q, H]
        if of_q:
            along = normed(q.to(wide) - offset[attention.channels[0]], k.to(wide))
            self.of_q = _Side(*(x.permute(0, 2, 3, 1).contiguous() for x in (known, along, values)))
            self.rows.append((k.repeat_interleave(attention.group, 1), self._weight(slice(0, self.heads))))

    def numbers(self, senders: int) -> int:
        """The most that is held at once of a pair."""
        tokens, width = self.norm_in.x.shape[1:]
        rows = sum(x.shape[2] for x, _ in self.rows) * self.heads
        return max(rows * width, senders * tokens * width, senders * self.scores)

    @property
    def scores(self) -> int:
        """How many scores a sender adds to in a pair."""
        counts, tokens = [x.shape[2] for x, _ in self.rows], self.norm_in.x.shape[1]
        return tokens * self.heads * (counts[0] if len(counts) == 1 else counts[1] + 1)

    def _weight(self, projections: slice) -> Tensor:
        """W′ᵀ · scale of some projections, one for each query head, [H, K, D]."""
        attention = self.attention
        weight = torch.cat([attention.norm.frozen_weight(w) for w in attention.weights(projections)]) * attention.scale
        return weight.repeat_interleave(self.heads // len(weight), 0).transpose(1, 2)

    def changes(self, delta: Tensor, pairs: slice, impl: str) -> Iterator[tuple[slice, Tensor]]:
        """Of each kind of channels, ⟨pattern′ − pattern, ∂metric/∂pattern⟩ of some pairs' queries [b, T, S, H], or of
        their keys, whose positions are summed up, [b, 1, S, H].

        delta: [S, b, T, D] of some senders, at the positions of the queries where there are no keys.
        """
        here = self.norm_in.of(lambda x: x[pairs])
        rstd = moved = None
        if here.rstd is not None:
            norm = self.attention.norm
            found = moved_rstd(here.x, delta, norm.eps, centred=norm.kind == "layernorm", impl=impl)
            rstd, moved = found.contiguous(), (found / here.rstd - 1).contiguous()
        windows, heads = self._windows(pairs), self.heads
        senders, n, tokens, _ = delta.shape
        width = windows.shape[2]
        raw = self._room("raw", delta, n, tokens, senders, width)
        # One product for each pair or each position, whichever are fewer: no stride goes through both.
        every = windows.expand(-1, tokens, -1, -1)
        along = int(n > tokens)
        for one, rows, to in zip(
            delta.permute(1, 2, 0, 3).unbind(along), every.unbind(along), raw.unbind(along), strict=True
        ):
            torch.bmm(one, rows.transpose(1, 2), out=to)
        q_raw = k_raw = raw
        if self.of_q is not None and self.of_k is not None:
            # Position t's queries are T − t, and its keys lie behind them. What lies in front of the former or behind
            # the latter is another position's, or another sender's, and hidden.
            strides = (raw.stride(0), senders * width - heads, width, 1)
            k_raw = raw.as_strided((n, tokens, senders, tokens * heads), strides)
            q_raw = raw.as_strided((n, tokens, senders, width - heads), strides, tokens * heads)
        for kind, side, made in ((0, self.of_q, q_raw), (1, self.of_k, k_raw)):
            if side is not None:
                known, normed, values = side.known[pairs], side.normed[pairs], side.values[pairs]
                past = None if self.past is None or kind == 0 else (self.past[0][pairs], self.past[1][pairs])
                changed = pattern_changes(
                    made.unflatten(-1, (-1, heads)), rstd, moved, known, normed, values, past,
                    of_keys=kind == 1, impl=impl,
                )  # fmt: skip
                yield self.attention.channels[kind], changed

    def _room(self, name: str, like: Tensor, *shape: int) -> Tensor:
        """Memory that is used again for other pairs: fresh pages would cost time."""
        size = math.prod(shape)
        if name not in self.rooms or self.rooms[name].numel() < size:
            self.rooms[name] = like.new_empty(size)
        return self.rooms[name][:size].view(shape)

    def _windows(self, pairs: slice) -> Tensor:
        """What the positions of some pairs meet, [b, T or 1, W, D]; those of the pairs before are gone."""
        if self.made is not None and self.made[0] == pairs:
            return self.made[1]
        counts = [x.shape[2] for x, _ in self.rows]
        first, weight = self.rows[0]
        n, width = len(first[pairs]), weight.shape[2]
        room = self._room("windows", first, n, sum(counts), self.heads, width)
        for (x, weight), part in zip(self.rows, room.split(counts, 1), strict=True):
            along = int(n > x.shape[2])
            for one, to in zip(x[pairs].unbind(2 * along), part.unbind(along), strict=True):
                torch.bmm(one.transpose(0, 1) if along else one, weight, out=to.transpose(0, 1))
        windows = room.flatten(1, 2)[:, None]
        if len(counts) == 2:
            shape = (n, counts[0], (counts[1] + 1) * self.heads, width)
            windows = room.as_strided(shape, (room.stride(0), self.heads * width, width, 1))
        self.made = pairs, windows
        return windows
