"""The specification: every op in plain PyTorch, in any dtype up to float64.

It is written for reading, and shares nothing with the implementations that it judges. Low-precision inputs are
taken to float32 before any arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import FactoredReceivers, FactoredSenders, Norm, Sizes, output_dtype


def edge_scores(delta: Tensor, grads: Tensor, mask: Tensor | None, reduce: str, rows: Tensor | None) -> Tensor:
    """score[s, r] = Σ_bt ⟨delta[s, b, t], grads[r, b, t]⟩ on edges, 0 elsewhere."""
    dtype = output_dtype(delta.dtype)
    delta, grads = delta.to(dtype), grads.to(dtype)
    if rows is not None:
        left_out = torch.ones(delta.shape[1:3], dtype=torch.bool, device=delta.device)
        left_out.view(-1)[rows] = False
        delta, grads = (x.masked_fill(left_out[:, :, None], 0) for x in (delta, grads))
    result = {"all": "sr", "pair": "bsr", "position": "tsr"}[reduce]
    scores = torch.einsum(f"sbtd,rbtd->{result}", delta, grads)
    return scores if mask is None else scores.masked_fill(~mask, 0)


def receiver_grads(g: Tensor, weight: Tensor, norm: Norm) -> Tensor:
    """∂metric/∂v through the normalisation, with both of its reductions taken over D as they are defined."""
    dtype = output_dtype(g.dtype)
    dn = torch.einsum("cbtk,cdk->cbtd", g.to(dtype), weight.to(dtype))
    if norm.kind == "none":
        return dn.to(g.dtype)
    assert norm.x_hat is not None and norm.rstd is not None
    x_hat, rstd = norm.x_hat.to(dtype), norm.rstd.to(dtype)[..., None]
    dx_hat = dn if norm.gamma is None else dn * norm.gamma.to(dtype)
    centred = dx_hat - dx_hat.mean(-1, keepdim=True) if norm.kind == "layernorm" else dx_hat
    return (rstd * (centred - x_hat * (dx_hat * x_hat).mean(-1, keepdim=True))).to(g.dtype)


def sender_deltas(senders: FactoredSenders) -> Tensor:
    """Δ of every sender, [S, B, T, D], in the graph's order: embed, then each layer's heads and MLP."""
    rows = [senders.embed[None]]
    for layer, w_o in enumerate(senders.w_o):
        dtype = output_dtype(w_o.dtype)
        heads = torch.einsum("bthk,hkd->hbtd", senders.dz[layer].to(dtype), w_o.to(dtype))
        rows.append(heads.to(senders.embed.dtype))
        if senders.mlp is not None:
            rows.append(senders.mlp[layer][None])
    return torch.cat(rows)  # [S, B, T, D]


def all_receiver_grads(receivers: FactoredReceivers) -> Tensor:
    """Gradients of every receiver, [R, B, T, D], in the graph's order: a layer's q, k, v and MLP, last the logits."""
    rows = []
    for layer, groups in enumerate(receivers.weight):
        if groups:
            rows.append(receiver_grads(receivers.g[layer], torch.cat(list(groups)), receivers.norms[layer]))
        if receivers.mlp is not None:
            rows.append(receivers.mlp[layer][None])
    return torch.cat([*rows, receivers.logits[None]])  # [R, B, T, D]


def edge_scores_factored(
    senders: FactoredSenders, receivers: FactoredReceivers, mask: Tensor | None, reduce: str
) -> Tensor:
    """`edge_scores` of everything that the factors stand for, all of it made at once."""
    return edge_scores(sender_deltas(senders), all_receiver_grads(receivers), mask, reduce, None)


def workspace_bytes(op: str, sizes: Sizes, dtype: torch.dtype) -> int:
    """`eapcore.kernels.workspace_bytes` of the ops above."""
    width, wide = dtype.itemsize, output_dtype(dtype).itemsize
    stream = sizes.batch * sizes.tokens * sizes.d_model
    if op == "edge_scores":  # einsum orders both its operands anew, after the conversion to the wider dtype
        return (sizes.senders + sizes.receivers) * stream * wide * (2 if wide > width else 1)
    if op == "receiver_grads":
        copies = 0
        if not sizes.normed or wide > width:  # g ordered anew
            copies += sizes.batch * sizes.tokens * sizes.channels * sizes.d_head * wide
        if wide > width:
            copies += sizes.channels * sizes.d_head * sizes.d_model * wide
        return (5 if sizes.normed else 1) * sizes.channels * stream * wide + copies
    every = sizes.all_senders + sizes.all_receivers
    return (every + max(every, 5 * sizes.channels)) * stream * wide
