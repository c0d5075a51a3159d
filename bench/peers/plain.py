"""A model in plain PyTorch, from which what eapcore is compared with is built; the floor is two forwards of it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from eapcore.models.mlp import Mlp, activation
from eapcore.models.model import Model
from eapcore.models.norm import Norm
from eapcore.tasks import PromptPairs


def normed(x: Tensor, norm: Norm) -> Tensor:
    """What a component makes of the stream that it reads first: a LayerNorm, an RMSNorm or nothing."""
    if norm.kind == "rmsnorm":
        return F.rms_norm(x, x.shape[-1:], norm.gamma, norm.eps)
    return x if norm.kind == "none" else F.layer_norm(x, x.shape[-1:], norm.gamma, norm.beta, norm.eps)


def sent(mlp: Mlp, x: Tensor) -> Tensor:
    """What an MLP sends, from the stream that it reads."""
    n = normed(x, mlp.norm)
    if mlp.w_up is not None:
        return (activation(mlp.act_fn, n @ mlp.w_in) * (n @ mlp.w_up)) @ mlp.w_out
    hidden = activation(mlp.act_fn, n @ mlp.w_in + mlp.b_in)
    return hidden @ mlp.w_out + mlp.b_out


def embedded(model: Model, tokens: Tensor) -> Tensor:
    rows, w_pos = model.weights.w_e[tokens], model.weights.w_pos
    return rows if w_pos is None else rows + w_pos[: tokens.shape[1]]


def unembedded(model: Model, x: Tensor) -> Tensor:
    """The logits of a last residual stream."""
    logits = normed(x, model.weights.ln_final) @ model.weights.w_u
    return logits if model.weights.b_u is None else logits + model.weights.b_u


def plain_forward(model: Model, x: Tensor) -> Tensor:
    """Logits [B, V] at the last position, from the embedding [B, T, D]."""
    batch, tokens, width = x.shape
    if model.config.rotary_frequencies:
        return plain_forward_grouped(model, x)
    for (heads,), (mlp,) in model.weights.layers:
        qkv = normed(x, heads.norm) @ heads.w_qkv[0].permute(1, 0, 2).reshape(width, -1) + heads.b_qkv.flatten()
        q, k, v = qkv.view(batch, tokens, 3, heads.n_heads, -1).permute(2, 0, 3, 1, 4)
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=heads.scale)
        x = x + z.transpose(1, 2).flatten(2) @ heads.w_o.flatten(0, 1) + heads.b_o
        x = x + sent(mlp, x)
    return unembedded(model, x[:, -1])


def plain_forward_grouped(model: Model, x: Tensor) -> Tensor:
    """`plain_forward` of a Llama: rotary positions, and query heads in groups that share a key and a value."""
    batch, tokens, width = x.shape
    angles = torch.arange(tokens)[:, None] * torch.tensor(model.config.rotary_frequencies, dtype=torch.float64)
    cos, sin = (part.repeat(1, 2).to(x.dtype) for part in (angles.cos(), angles.sin()))  # [T, K]

    def turned(q: Tensor) -> Tensor:
        first, second = q.chunk(2, -1)
        return q * cos + torch.cat([-second, first], -1) * sin

    for (heads,), (mlp,) in model.weights.layers:
        n, parts = normed(x, heads.norm), []
        biases = [None] * 3 if heads.b_qkv is None else heads.b_qkv.split([len(w) for w in heads.w_qkv])
        for w, b in zip(heads.w_qkv, biases, strict=True):
            weight = w.transpose(1, 2).reshape(-1, width)  # [C·K, D], as it is stored
            parts.append(
                F.linear(n, weight, None if b is None else b.flatten()).view(batch, tokens, len(w), -1).transpose(1, 2)
            )
        q, k, v = parts
        z = F.scaled_dot_product_attention(
            turned(q), turned(k), v, is_causal=True, scale=heads.scale, enable_gqa=heads.group > 1
        )
        x = x + z.transpose(1, 2).flatten(2) @ heads.w_o.flatten(0, 1)
        x = x + sent(mlp, x)
    return unembedded(model, x[:, -1])


def floor(model: Model, pairs: PromptPairs, right: int, wrong: int) -> None:
    """Two forwards and an activation-only backward of one batch, whose metric is right − wrong."""
    with torch.no_grad():
        plain_forward(model, embedded(model, pairs.corrupt))
    start = embedded(model, pairs.clean).requires_grad_()
    logits = plain_forward(model, start)
    torch.autograd.grad((logits[:, right] - logits[:, wrong]).sum(), start)
