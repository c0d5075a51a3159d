"""Edges into q and k by the attention pattern that they would make, where first order would linearise the softmax.

    score[s, a_l.h<q>] = Σ_t ⟨pattern(q(v + Δ_s), k) − pattern(q, k), ∂metric/∂pattern⟩        and <k> alike

q(v + Δ_s) is the query that the head makes of its input with the edge's difference added, LayerNorm included. A query
changes its own row of the pattern; the keys of an edge change together at all positions. What the pattern then does to
the metric is first order. Source: Kramár, Lieberum, Shah, Nanda 2024 (AtP*), section 3.1.1, there for nodes q and k.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from eapcore.attribution.sums import Store, Sums
from eapcore.execution.limits import limits
from eapcore.kernels.causal import by_group
from eapcore.models.attention import Channels
from eapcore.models.tensors import accumulate_dtype


def add_exact(store: Store, sums: Sums, part: Channels, weight: float) -> None:
    """Add the scores of all edges into a layer's q and k receivers; part: one that has its v receivers."""
    first = part.receivers.start - part.channels.start
    for kind in part.attention.channels[:2]:
        at_read = part.read is not None and kind.start == 0
        for senders, delta in store.deltas(at_read, store.model.graph.senders_before(first)):
            block = exact_scores(part, kind, delta, sums.reduction(at_read))
            sums.add("scores", block, (senders, slice(first + kind.start, first + kind.stop)), weight, at_read)


def exact_scores(part: Channels, channels: slice, delta: Tensor, reduce: str) -> Tensor:
    """Scores of the edges from all senders in delta to a layer's q or k receivers.

    With reduce="position" a query's are those of its own position, and keys' those of the positions t of the keys: with
    s the scores, s′ those with the edge's difference, d = ∂metric/∂pattern and Z = Σ_t pattern_t exp(s′_t − s_t),

        Σ_t (pattern′_t − pattern_t) d_t = Σ_t (pattern′_t − pattern_t / Z) (d_t − Σ_u pattern_u d_u),

    whose terms are 0 where a key is the same, and to first order the gradient's.

    Args:
        part: what the backward pass made of the layer.
        channels: all of its q heads, or all of its k heads.
        delta: [S, B, T, D] the senders' differences; for q at the positions that are read where the layer is at these.
        reduce: "all", "pair" or "position".

    Returns:
        [S, H], [B, S, H] or [T, S, H], in float32 at least.
    """
    attention, queries, read = part.attention, channels.start == 0, part.read
    norm_in = part.saved.norm_in.at(read) if queries else part.saved.norm_in
    q, k, v = attention.heads(part.saved.q, part.saved.kv, part.past, read)
    before = k.shape[2] - part.saved.kv.shape[1]
    known = attention.causal.scores(q, k, before, read)
    pattern = known.softmax(-1)  # [B, H, Q, P + T]
    d_pattern = by_group(part.dz.transpose(1, 2), v.transpose(-1, -2)).to(accumulate_dtype(q.dtype))
    by_key = reduce == "position" and not queries
    if by_key:
        d_pattern = d_pattern - (pattern * d_pattern).sum(-1, keepdim=True)
    kept = "b" if reduce != "position" else "q" if queries else "t"

    def changed(made: Tensor, summed: bool = False) -> Tensor:
        """[B or T, S', H] from the channels' activations [S', B, H or G, T, K], or summed over the heads."""
        if queries:
            other = attention.causal.scores(attention.ready_queries(made, before, read), k, before, read)
        else:
            front = k[:, :, :before]
            front = front.repeat_interleave(made.shape[2] // k.shape[1], 1).expand(len(made), -1, -1, -1, -1)
            keys = torch.cat([front, attention.ready_keys(made, before)], 3)  # [S', B, G, P + T, K]
            other = attention.causal.scores(q.expand(len(made), *q.shape), keys, before, read)
        base = pattern
        if by_key:
            base = pattern * (known.logsumexp(-1, keepdim=True) - other.logsumexp(-1, keepdim=True)).exp()
        return torch.einsum(f"cbhqt,bhqt->{kept}c{'' if summed else 'h'}", other.softmax(-1) - base, d_pattern)

    size = max(pattern.numel(), delta[0].numel())
    scores = []
    places = slice(attention.projection(channels.start), attention.projection(channels.stop - 1) + 1)
    for some in delta.split(max(1, limits(q.device).exact_numbers // size)):
        n, _ = attention.norm.forward((norm_in.x + some).flatten(0, 1))
        if attention.joint:
            scores.append(_jointly_normed(part, channels, n.unflatten(0, some.shape[:2]), changed))
            continue
        each = changed(attention.project(n, places).unflatten(0, some.shape[:2]).transpose(2, 3))
        grouped = not queries and attention.grouped
        scores.append(each.unflatten(2, (-1, attention.group)).sum(3) if grouped else each)
    joined = torch.cat(scores, 1)  # [B or T, S, H]
    if by_key:
        return joined[before:]
    return joined.sum(0) if reduce == "all" else joined


def _jointly_normed(part: Channels, channels: slice, n: Tensor, changed: Callable[..., Tensor]) -> Tensor:
    """Scores [B or T, S', C] where q and k are normed with those of all heads: an edge into one changes every head's
    pattern. n: [S', B, T, D]."""
    attention = part.attention
    made = part.saved.q if channels.start == 0 else part.saved.kv[:, :, : attention.n_kv]
    each = channels.start == 0 or attention.grouped
    made = made if each else made.repeat_interleave(attention.group, 2)  # [B, T, C, K]
    found = []
    for channel in range(channels.start, channels.stop):
        place = attention.projection(channel)
        others = made.expand(len(n), *made.shape).clone()  # [S', B, T, C, K]
        new = attention.project(n.flatten(0, 1), slice(place, place + 1))
        others[:, :, :, channel - channels.start] = new.view(*n.shape[:3], -1)
        found.append(changed(others.transpose(2, 3), summed=True))
    return torch.stack(found, -1)
