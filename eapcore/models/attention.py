"""Attention: projections, pattern, mixtures and outputs, and the gradients of its q, k and v."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from eapcore.models.activations import LayerSaved, accumulate_dtype, at_positions
from eapcore.models.matmul import product
from eapcore.models.model import Model
from eapcore.models.norm import normalise
from eapcore.models.weights import LayerWeights


def channel_groups(layer: LayerWeights, channels: slice) -> list[Tensor]:
    """The weights [C_i, D, K] of some of a layer's 3H channels, as views."""
    groups, start = [], 0
    for w in layer.w_qkv:
        first, last = max(channels.start - start, 0), min(channels.stop - start, w.shape[0])
        if first < last:
            groups.append(w[first:last])
        start += w.shape[0]
    return groups


def project(layer: LayerWeights, n: Tensor, channels: slice) -> Tensor:
    """Some of the q, k and v channels, [B, T, C, K] from the normalised stream n [B, T, D]."""
    parts, first = [], channels.start
    for w in channel_groups(layer, channels):
        bias, matrix = layer.b_qkv[first : first + len(w)], as_matrix(w)
        first += len(w)
        if matrix is not None:
            part = product(n, matrix, bias.flatten()).unflatten(-1, (w.shape[0], w.shape[2]))
        else:
            part = (n.flatten(0, 1) @ w).transpose(0, 1).unflatten(0, n.shape[:2]) + bias
        parts.append(part)  # [B, T, C_i, K]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def as_matrix(w: Tensor) -> Tensor | None:
    """A channel group [C, D, K] as a matrix [D, C·K] without a copy, or None where its strides do not allow it."""
    channels, d_model, d_head = w.shape
    if w.stride(2) != 1 or w.stride(0) != d_head:
        return None
    return w.as_strided((d_model, channels * d_head), (w.stride(1), 1))


def future(tokens: int, past: int, read: Tensor | None, device: torch.device) -> Tensor:
    """True where a query must not see a key: [T, P + T], or [B, 1, Q, P + T] for queries at positions read [B, Q]."""
    keys = torch.arange(-past, tokens, device=device)
    queries = torch.arange(tokens, device=device)[:, None] if read is None else read[:, None, :, None]
    return keys > queries


def with_past(kv: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
    """k and v as [B, H, P + T, K], from kv [B, T, 2H, K] and what came before it, [B, P, 2H, K].

    Several runs of the same prompts one after the other along B share one past.
    """
    both = kv
    if past is not None:
        before = past.shape[1]
        both = kv.new_empty(len(kv), before + kv.shape[1], *kv.shape[2:])
        both[:, :before].unflatten(0, (-1, len(past))).copy_(past)
        both[:, before:] = kv
    k, v = both.transpose(1, 2).chunk(2, 1)
    return k, v


def attend(
    model: Model, index: int, q: Tensor, kv: Tensor, past: Tensor | None = None, read: Tensor | None = None
) -> Tensor:
    """The heads' mixtures of v, [B, Q, H, K] in float32 at least, from q [B, Q, H, K] and kv [B, T, 2H, K].

    Otherwise as in `run_layers`.
    """
    qkv = (q.transpose(1, 2), *with_past(kv, past))
    return mixtures(model, index, qkv, kv.shape[1], read).transpose(1, 2)


def mixtures(model: Model, index: int, qkv: Sequence[Tensor], tokens: int, read: Tensor | None) -> Tensor:
    """The same as [B, H, Q, K] from q [B, H, Q, K], k and v [B, H, P + T, K], the past among them; tokens is T.

    Not rounded to half precision, so that mixtures can be subtracted before they are.
    """
    q, k, v = (x.to(accumulate_dtype(x.dtype)) for x in qkv)
    if q.shape[2] == 0:
        return q
    scale, before = model.config.score_scale(index), k.shape[2] - tokens
    if before == 0 and read is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    visible = ~future(tokens, before, read, q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale)


def head_outputs(z: Tensor, w_o: Tensor, out: Tensor | None = None) -> Tensor:
    """What each head sends, [H, B, T, D] = z[:, :, h] @ w_o[h], written into `out` where it is given."""
    n_heads, _, d_model = w_o.shape
    rows = z.to(w_o.dtype).flatten(0, 1).transpose(0, 1)  # [H, B·T, K]
    if out is None:
        return (rows @ w_o).unflatten(1, z.shape[:2])
    torch.bmm(rows, w_o, out=out.view(n_heads, -1, d_model))
    return out


def attention_output(layer: LayerWeights, z: Tensor) -> Tensor:
    """What all heads of a layer add to the residual stream together, bias included: [B, T, D]."""
    return product(z.flatten(2).to(layer.w_o.dtype), layer.w_o.flatten(0, 1), layer.b_o)


def layer_qkv(model: Model, index: int, x: Tensor, read: Tensor | None) -> LayerSaved:
    """What a layer's attention reads and the q, k and v of it; with `read`, q at these positions alone."""
    layer, n_heads = model.weights.layers[index], model.config.n_heads
    n, attn_in = normalise(x, layer.ln1, model.config.eps)
    if read is None:
        return LayerSaved(attn_in, (project(layer, n, slice(0, 3 * n_heads)),))
    q = project(layer, at_positions(n, read), slice(0, n_heads))
    return LayerSaved(attn_in, (q, project(layer, n, slice(n_heads, 3 * n_heads))))


def attention_pattern(model: Model, index: int, q: Tensor, k: Tensor, before: int, read: Tensor | None) -> Tensor:
    """softmax of the masked scores, [.., H, Q, P + T] in float32 at least, from q [.., H, Q, K], k [.., H, P + T, K].

    before: P, how many of the keys lie in front of the first query. read: [B, Q], the queries' positions among the T;
    None for all.
    """
    hidden = future(k.shape[-2] - before, before, read, q.device)
    scores = (q @ k.transpose(-1, -2)).to(accumulate_dtype(q.dtype)) * model.config.score_scale(index)
    return scores.masked_fill_(hidden, -torch.inf).softmax(-1)


def value_grad(pattern: Tensor, dz: Tensor, before: int) -> Tensor:
    """∂metric/∂v [B, H, T, K] = Pᵀ dz from the pattern [B, H, Q, P + T] and dz [B, H, Q, K]."""
    return pattern[..., before:].to(dz.dtype).transpose(-1, -2) @ dz


def attention_grad(
    model: Model, index: int, q: Tensor, kv: Tensor, dz: Tensor, past: Tensor | None, read: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """∂metric/∂q [B, H, Q, K] and ∂metric/∂k, ∂metric/∂v [B, H, T, K], from dz = ∂metric/∂z [B, Q, H, K].

    With P the pattern: dv = Pᵀ dz, dP = dz vᵀ, dS = P∘(dP − rowsum(dP∘P)) · scale, dq = dS k, dk = dSᵀ q. The pattern
    is computed again, so that no [B, H, Q, T] outlives its layer.
    """
    k, v = with_past(kv, past)
    q, dz = q.transpose(1, 2), dz.transpose(1, 2)  # [B, H, Q, K]
    before, wide = k.shape[2] - kv.shape[1], accumulate_dtype(q.dtype)
    pattern = attention_pattern(model, index, q, k, before, read)  # [B, H, Q, P + T]
    dv = value_grad(pattern, dz, before)
    dp = (dz @ v.transpose(-1, -2)).to(wide)
    scale = model.config.score_scale(index)
    ds = (torch.ops.aten._softmax_backward_data(dp, pattern, -1, wide) * scale).to(dz.dtype)
    return ds @ k, ds[..., before:].transpose(-1, -2) @ q, dv


def unproject(groups: list[Tensor], g: Tensor) -> Tensor:
    """Σ_c W_c g_c, the gradient [B, T, D] of the normalised stream that channels read, from their g [B, T, C, K]."""
    total, start = None, 0
    for w in groups:
        part = g[:, :, start : start + w.shape[0]]
        matrix = as_matrix(w)
        if matrix is not None:
            dn = product(part.flatten(2), matrix.T)
        else:
            dn = (part.flatten(0, 1).transpose(0, 1) @ w.transpose(1, 2)).sum(0).unflatten(0, g.shape[:2])
        total = dn if total is None else total + dn
        start += w.shape[0]
    assert total is not None
    return total
