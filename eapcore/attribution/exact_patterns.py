"""Edges into q and k by the attention pattern that they would make, where first order would linearise the softmax.

    score[s, a_l.h<q>] = Σ_t ⟨pattern(q(v + Δ_s), k) − pattern(q, k), ∂metric/∂pattern⟩        and <k> alike

q(v + Δ_s) is the query that the head makes of its input with the edge's difference added, LayerNorm included. A query
changes its own row of the pattern; the keys of an edge change together at all positions. What the pattern then does to
the metric is first order. Source: Kramár, Lieberum, Shah, Nanda 2024 (AtP*), section 3.1.1, there for nodes q and k.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eapcore.execution.limits import limits
from eapcore.models.attention import Channels, by_group
from eapcore.models.tensors import accumulate_dtype


def exact_scores(part: Channels, channels: slice, delta: Tensor, reduce: str) -> Tensor:
    """Scores of the edges from all senders in delta to a layer's q or k receivers.

    Args:
        part: what the backward pass made of the layer.
        channels: all of its q heads, or all of its k heads.
        delta: [S, B, T, D] the senders' differences, at the positions at which `part` is.
        reduce: "all" or "pair".

    Returns:
        [S, H] or [B, S, H], in float32 at least.
    """
    attention, queries = part.attention, channels.start == 0
    q, k, v = attention.heads(part.saved.q, part.saved.kv, part.past, part.read)
    before = k.shape[2] - part.saved.kv.shape[1]
    pattern = attention.pattern(q, k, before, part.read)  # [B, H, Q, P + T]
    d_pattern = by_group(part.dz.transpose(1, 2), v.transpose(-1, -2)).to(accumulate_dtype(q.dtype))
    if attention.joint:
        return _jointly_normed(part, channels, delta, (q, k, pattern, d_pattern), reduce)
    size = max(pattern.numel(), delta[0].numel())
    scores = []
    places = slice(attention.projection(channels.start), attention.projection(channels.stop - 1) + 1)
    for some in delta.split(max(1, limits(q.device).exact_numbers // size)):
        n, _ = attention.norm.forward((part.norm_in.x + some).flatten(0, 1))
        changed = attention.project(n, places).unflatten(0, some.shape[:2]).transpose(2, 3)  # [C, B, H or G, T, K]
        if queries:
            other = attention.pattern(attention.ready_queries(changed, before, part.read), k, before, part.read)
        else:
            front = k[:, :, :before].expand(len(some), -1, -1, -1, -1)
            keys = torch.cat([front, attention.ready_keys(changed, before)], 3)  # [C, B, G, P + T, K]
            other = attention.pattern(q.expand(len(some), *q.shape), keys, before, part.read)
        each = torch.einsum("cbhqt,bhqt->bch", other - pattern, d_pattern)
        grouped = not queries and attention.grouped
        scores.append(each.unflatten(2, (-1, attention.group)).sum(3) if grouped else each)
    joined = torch.cat(scores, 1)  # [B, S, H]
    return joined if reduce == "pair" else joined.sum(0)


def _jointly_normed(
    part: Channels, channels: slice, delta: Tensor, run: tuple[Tensor, Tensor, Tensor, Tensor], reduce: str
) -> Tensor:
    """`exact_scores` where q and k are normed with those of all heads: an edge into one changes every head's pattern.

    run: the heads' q, k and pattern, and ∂metric/∂pattern.
    """
    attention, read, queries = part.attention, part.read, channels.start == 0
    q, k, pattern, d_pattern = run
    before = k.shape[2] - part.saved.kv.shape[1]
    made = part.saved.q if queries else part.saved.kv[:, :, : attention.n_kv]
    made = made if queries or attention.grouped else made.repeat_interleave(attention.group, 2)  # [B, T, C, K]
    size, scores = max(pattern.numel(), delta[0].numel(), made.numel()), []
    for some in delta.split(max(1, limits(q.device).exact_numbers // size)):
        n, _ = attention.norm.forward((part.norm_in.x + some).flatten(0, 1))
        of_channels = []
        for channel in range(channels.start, channels.stop):
            place = attention.projection(channel)
            others = made.expand(len(some), *made.shape).clone()  # [S', B, T, C, K]
            others[:, :, :, channel - channels.start] = attention.project(n, slice(place, place + 1)).view(
                *some.shape[:3], -1
            )
            others = others.transpose(2, 3)
            if queries:
                other = attention.pattern(attention.ready_queries(others, before, read), k, before, read)
            else:
                front = k[:, :, :before].repeat_interleave(others.shape[2] // k.shape[1], 1)
                keys = [front.expand(len(some), -1, -1, -1, -1), attention.ready_keys(others, before)]
                other = attention.pattern(q.expand(len(some), *q.shape), torch.cat(keys, 3), before, read)
            of_channels.append(torch.einsum("cbhqt,bhqt->bc", other - pattern, d_pattern))
        scores.append(torch.stack(of_channels, -1))
    joined = torch.cat(scores, 1)  # [B, S, C]
    return joined if reduce == "pair" else joined.sum(0)
