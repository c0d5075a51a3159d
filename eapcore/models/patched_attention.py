"""Attention in runs in which some of its heads read or send something else than in a run that is there.

The letters are those of `attention`; N copies of a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from eapcore.models.attention import Attention, AttentionRun, AttentionSaved
from eapcore.models.matmul import product
from eapcore.models.tensors import accumulate_dtype, at_positions


def sent_otherwise(
    attention: Attention, run: AttentionRun, heads: slice, z: Annotated[Tensor, "N B Q h K"], read: Tensor | None
) -> Annotated[Tensor, "N B Q D"]:
    """What the heads together add more than in a run where some of them have other mixtures; at the positions read.

    Behind a norm that changes what every head sends, since σ is another.
    """
    w_o, known, post_in = attention.w_o[heads].flatten(0, 1), at_positions(run.z[:, :, heads], read), run.saved.post_in
    if post_in is None:
        return (z - known).to(w_o.dtype).flatten(3) @ w_o
    assert post_in.rstd is not None
    made, rstd = at_positions(post_in.x, read), at_positions(post_in.rstd, read)
    otherwise = made + (z - known / rstd[..., None]).to(w_o.dtype).flatten(3) @ w_o
    return attention.post.forward(otherwise)[0] - attention.post.forward(made)[0]


def patched(
    attention: Attention,
    channel: int,
    n: Annotated[Tensor, "N B Q' D"],
    saved: AttentionSaved,
    past: Tensor | None,
    read: Tensor | None,
) -> Annotated[Tensor, "N B Q h K"]:
    """The mixtures of the heads that a channel moves in N copies of a run, where it alone reads other normalised
    streams.

    n: at the positions read for q, at all others. saved: of the run, at all positions.
    """
    place, heads, copies = attention.projection(channel), attention.behind(channel), len(n)
    (w,) = attention.weights(slice(place, place + 1))
    bias = None if attention.b_qkv is None else attention.b_qkv[place]
    changed = product(n, w[0], bias)  # [N, B, Q', K]
    if attention.joint:
        return _patched_jointly(attention, channel, changed, saved, past, read)
    changed = changed.transpose(0, 1)  # the copies in the heads' place
    shared = attention.n_heads + heads.start // attention.group
    qkv, tokens = [], saved.qkv[0].shape[1]
    for first, count in ((heads.start, len(heads)), (shared, 1), (shared + attention.n_kv, 1)):
        x = saved.qkv[0][:, :, first : first + count].transpose(1, 2)  # [B, h or 1, T, K]
        is_q = first < attention.n_heads
        if is_q and read is not None:
            x = x.gather(2, read[:, None, :, None].expand(-1, count, -1, x.shape[-1]))
        x = changed if first == place else x
        if not is_q and past is not None:
            before = past[:, :, first - attention.n_heads, None].transpose(1, 2)
            x = torch.cat([before.expand(-1, x.shape[1], -1, -1), x], 2)
        if count > 1:
            x = x[:, None].expand(-1, copies, -1, -1, -1).flatten(1, 2)
        qkv.append(x if count > 1 else x.expand(-1, copies, -1, -1))
    q, k, v = qkv
    q, k = attention.ready_queries(q, k.shape[2] - tokens, read), attention.ready_keys(k, 0)
    z = attention.mixtures(q, k, v, tokens, read)  # [B, N·h, Q, K]
    return z.unflatten(1, (copies, -1)).permute(1, 0, 3, 2, 4)


def _patched_jointly(
    attention: Attention,
    channel: int,
    changed: Annotated[Tensor, "N B Q' K"],
    saved: AttentionSaved,
    past: Tensor | None,
    read: Tensor | None,
) -> Annotated[Tensor, "N B Q h K"]:
    """`patched` from a channel's activations, where q and k are normed with those of all heads."""
    of_q, of_k, of_v = attention.channels
    q, kv = at_positions(saved.q, read), saved.kv
    if past is not None:
        kv = torch.cat([past.expand(len(kv), *past.shape[1:]), kv], 1)
    before, copies = kv.shape[1] - saved.kv.shape[1], len(changed)
    k, v = kv.chunk(2, 2)

    def with_changed(x: Tensor, head: int) -> Tensor:  # [N, B, T, C, K], the past as it is
        x = x.expand(copies, *x.shape).clone()
        x[:, :, x.shape[2] - changed.shape[2] :, head] = changed
        return x

    if channel < of_q.stop:
        q = with_changed(q, channel)
    elif channel < of_k.stop:
        k, v = (x if attention.grouped else x.repeat_interleave(attention.group, 2) for x in (k, v))
        k = with_changed(k, channel - of_k.start)
    q = attention.ready_queries(q.transpose(-3, -2), before, read)  # [.., B, H, Q, K]
    k = attention.ready_keys(k.transpose(-3, -2), 0)
    if channel >= of_v.start:
        heads = attention.behind(channel)
        shared = slice(heads.start // attention.group, heads.start // attention.group + 1)
        q, k, v = q[:, heads.start : heads.stop], k[:, shared], with_changed(v[:, :, shared], 0)
    q, k, v = (x.expand(copies, *x.shape[-4:]).flatten(0, 1) for x in (q, k, v.transpose(-3, -2)))
    z = attention.mixtures(q, k, v, saved.kv.shape[1], None if read is None else read.repeat(copies, 1))
    return z.unflatten(0, (copies, -1)).transpose(2, 3)


def each_channel(
    attention: Attention, channels: Sequence[int], v: Annotated[Tensor, "N C' B Q D"]
) -> Annotated[Tensor, "N·B Q C' K"]:
    """The activations of some channels in N copies, each from a residual stream of its own."""
    places = [attention.projection(channel) for channel in channels]
    weight = torch.stack([attention.weights(slice(place, place + 1))[0][0] for place in places])  # [C', D, K]
    n = attention.norm.forward(v)[0].transpose(0, 1).flatten(1, 3)  # [C', N·B·Q, D]
    act = torch.bmm(n, weight).unflatten(1, (v.shape[0] * v.shape[2], v.shape[3])).permute(1, 2, 0, 3)
    return act if attention.b_qkv is None else act + attention.b_qkv[places]


def mix_at_read(
    attention: Attention, x: Annotated[Tensor, "N T D"], past: Tensor | None, read: Annotated[Tensor, "int64 N 1"]
) -> Annotated[Tensor, "N 1 H K"]:
    """The heads' mixtures at one position that is read, without the keys and values of all positions.

        scores = q·(W_kᵀ n + b_k) = (W_k q)·n + q·b_k
        mixtures = Σ_t p_t (W_vᵀ n_t + b_v) = W_vᵀ Σ_t p_t n_t + b_v Σ_t p_t

    In half precision, and where anything else lies between projections and mixtures, they are made, and rounded as
    the model does.
    """
    plain = (
        attention.rotary is None and attention.q_norm.kind == attention.k_norm.kind == "none" and attention.group == 1
    )
    plain = plain and attention.softcap is None and attention.window is None
    if accumulate_dtype(x.dtype) != x.dtype or not plain:
        return attention.forward(x, past, read).z
    heads, tokens = attention.n_heads, x.shape[1]
    n = attention.norm.forward(x)[0]
    q = attention.project(at_positions(n, read), slice(0, heads))[:, 0].transpose(0, 1)  # [H, N, K]
    w_k, w_v = torch.cat(attention.weights(slice(heads, 3 * heads))).chunk(2)  # [H, D, K]
    scores = torch.bmm(torch.bmm(q, w_k.transpose(1, 2)).transpose(0, 1), n.transpose(1, 2))  # [N, H, T]
    b_v = None
    if attention.b_qkv is not None:
        b_k, b_v = attention.b_qkv[heads:, None].chunk(2)  # [H, 1, K]
        scores += (q * b_k).sum(-1).T[..., None]
    if past is not None:
        before = past.permute(0, 2, 3, 1)  # [B, 2H, K, P]
        by_prompt = q.unflatten(1, (-1, len(past))).permute(2, 0, 1, 3)  # [B, H, N/B, K]
        earlier = (by_prompt @ before[:, :heads]).permute(2, 0, 1, 3).flatten(0, 1)  # [N, H, P]
        scores = torch.cat([earlier, scores], 2)
    hidden = attention.causal.hidden(tokens, scores.shape[2] - tokens, read, x.device)[:, 0]
    pattern = (scores * attention.scale).masked_fill_(hidden, -torch.inf).softmax(-1)
    here = pattern[:, :, -tokens:]
    z = torch.bmm(torch.bmm(here, n).transpose(0, 1), w_v)  # [H, N, K]
    if b_v is not None:
        z = z + here.sum(-1).T[..., None] * b_v
    if past is not None:
        by_prompt = pattern[:, :, :-tokens].unflatten(0, (-1, len(past))).permute(1, 2, 0, 3)  # [B, H, N/B, P]
        z += (by_prompt @ before[:, heads:].transpose(2, 3)).permute(1, 2, 0, 3).flatten(1, 2)
    return z.transpose(0, 1)[:, None]
