"""Causal attention of queries that may stand anywhere: mixtures of values, and the gradients of q, k and v.

Letters: H query heads, G key and value heads, each shared by H / G query heads that follow one another; P positions
before the T tokens, Q queries, K d_head. Queries are all T tokens, or those at the positions `read`, int64 [B, Q].

On a GPU each direction is one or two kernels that keep no pattern, in half precision and for d_head up to 128: what is
larger has more numbers on its way than registers, and takes torch's operations, the specification, as all else does.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dry_run as dry
from .causal import Causal, ReceiverSums, by_group, empty_mixtures, grads_in, one_block, wide_dtype
from .steps import takes_triton


def attend(
    q: Annotated[Tensor, "B H Q K"],
    k: Annotated[Tensor, "B G P+T K"],
    v: Annotated[Tensor, "B G P+T K"],
    how: Causal,
    tokens: int,
    read: Annotated[Tensor, "int64 B Q"] | None = None,
    out: Annotated[Tensor, "B Q H K"] | None = None,
    *,
    impl: str = "auto",
) -> Annotated[Tensor, "B H Q K"]:
    """z = softmax(..) v, in float32 at least: not rounded to half precision, so that mixtures can be subtracted before
    they are. tokens is T. out: where it goes, rounded to out's dtype."""
    if takes_triton(impl, q) and (impl == "triton" or fits(q)):
        if (run := dry.active.get()) is not None:
            z = empty_mixtures(q) if out is None else out.transpose(1, 2)
            run.ran("attend", q, k, v, z)
            return z
        from . import triton_attention

        z = empty_mixtures(q) if out is None else out.transpose(1, 2)
        triton_attention.attend(q, k, v, how, tokens, read, z.transpose(1, 2), False)
        return z
    if out is not None:
        out.copy_(attend(q, k, v, how, tokens, read, impl=impl).transpose(1, 2))
        return out.transpose(1, 2)
    q, k, v = (x.to(wide_dtype(x)) for x in (q, k, v))
    if q.shape[2] == 0:
        return q
    before = k.shape[2] - tokens
    if how.softcap is not None:
        return by_group(how.pattern(q, k, before, read), v)
    mix = partial(F.scaled_dot_product_attention, q, k, v, scale=how.scale, enable_gqa=q.shape[1] != k.shape[1])
    if before == 0 and read is None and (how.window is None or tokens <= how.window):
        return mix(is_causal=True)
    return mix(attn_mask=~how.hidden(tokens, before, read, q.device))


def attend_moved(
    q: Annotated[Tensor, "2B H Q K"],
    k: Annotated[Tensor, "2B G P+T K"],
    v: Annotated[Tensor, "2B G P+T K"],
    how: Causal,
    tokens: int,
    read: Annotated[Tensor, "int64 2B Q"] | None,
    out: Annotated[Tensor, "2B Q H K"],
    *,
    impl: str = "auto",
) -> None:
    """`attend` of B prompts, and of as many behind them what they have more, written to out: rounded once to its dtype.

    The prompts of a pair are read at the same positions.
    """
    if takes_triton(impl, q) and (impl == "triton" or fits(q)):
        if (run := dry.active.get()) is not None:
            run.ran("attend", q, k, v, out)
            return
        from . import triton_attention

        triton_attention.attend(q, k, v, how, tokens, read, out, True)
        return
    first, second = attend(q, k, v, how, tokens, read, impl=impl).transpose(1, 2).tensor_split(2)
    out[: len(first)] = first
    out[len(first) :] = second - first


def attend_grad(
    q: Annotated[Tensor, "B H Q K"],
    k: Annotated[Tensor, "B G P+T K"],
    v: Annotated[Tensor, "B G P+T K"],
    dz: Annotated[Tensor, "B H Q K"],
    how: Causal,
    tokens: int,
    read: Annotated[Tensor, "int64 B Q"] | None = None,
    out: Annotated[Tensor, "B T 3H K"] | None = None,
    *,
    sums: ReceiverSums | None = None,
    temperature: float = 1.0,
    impl: str = "auto",
) -> tuple[Annotated[Tensor, "B H Q K"], Annotated[Tensor, "B H T K"], Annotated[Tensor, "B H T K"]]:
    """∂metric/∂q, ∂metric/∂k and ∂metric/∂v of `attend` from dz = ∂metric/∂z, in dz's dtype; k and v of the T tokens,
    for each query head. out: where they go beside each other, where queries are those of all tokens; see `empty_grads`.
    sums: there what is made of them beside.

    With P the pattern: dv = Pᵀ dz, dP = dz vᵀ, dS = P∘(dP − rowsum(dP∘P)) · scale, dq = dS k, dk = dSᵀ q. The pattern
    is computed again, so that no [B, H, Q, T] outlives its layer. With another temperature, which torch's operations
    alone know, the P of dS is softmax(s / temperature).
    """
    before = k.shape[2] - tokens
    if temperature == 1 and takes_triton(impl, q) and (impl == "triton" or fits(q)):
        if (run := dry.active.get()) is not None:
            dq, dk, dv = grads_in(out, q, dz, tokens)
            beside = [] if sums is None else [sums.out]
            if one_block(q.shape[2], k.shape[2]):
                run.ran("attend_grad", q, k, v, dz, dq, dk, dv, *beside)
                return dq, dk, dv
            rows = q.new_empty(*q.shape[:3], 3, dtype=torch.float32)
            run.ran("attend_grad, queries", q, k, v, dz, dq, rows, *(x[: q.shape[1]] for x in beside))
            run.ran("attend_grad, keys", q, k, v, dz, dk, dv, rows, *(x[q.shape[1] :] for x in beside))
            return dq, dk, dv
        from . import triton_attention

        return triton_attention.attend_grad(q, k, v, dz, how, tokens, read, out, sums)
    wide = wide_dtype(q)
    scores = how.scores(q, k, before, read)
    pattern = scores.softmax(-1)
    dv = value_grad(pattern, dz, before)
    if temperature != 1:
        pattern = (scores / temperature).softmax(-1)
    del scores
    dp = by_group(dz.to(wide), v.to(wide).transpose(-1, -2))
    ds = torch.ops.aten._softmax_backward_data(dp, pattern, -1, wide) * how.scale
    if how.softcap is not None:
        tanh = (by_group(q.to(wide), k.to(wide).transpose(-1, -2)) * (how.scale / how.softcap)).tanh()
        ds = ds * (1 - tanh**2)
    ds = ds.to(dz.dtype)
    made = by_group(ds, k), ds[..., before:].transpose(-1, -2) @ q, dv
    if sums is not None:
        sums.fill(made, (q, k[:, :, before:], v[:, :, before:]))
    if out is None:
        return made
    for to, x in zip(grads_in(out, q, dz, tokens), made, strict=True):
        to.copy_(x)
    return grads_in(out, q, dz, tokens)


def empty_grads(q: Annotated[Tensor, "B T H K"], dz: Annotated[Tensor, "B T H K"]) -> Tensor | None:
    """Room [B, T, 3H, K] for all that `attend_grad` makes; None where it is made apart, by torch's operations."""
    if not (takes_triton("auto", q) and fits(q)):
        return None
    batch, tokens, heads, d_head = dz.shape
    return dz.new_empty(batch, tokens, 3 * heads, d_head)


def empty_sums(g: Annotated[Tensor, "B T 3H K"], d_model: int) -> Tensor | None:
    """Room for `ReceiverSums.out` of gradients like these; None where no kernel of `receiver_grads` would read them."""
    from . import triton_common

    run = dry.active.get()
    on = triton_common.target(g.device if run is None else run.device)
    if not on.descriptors or not fits(g) or g.shape[3] % 8 or d_model % 8 or not g.numel():
        return None
    return g.new_empty(g.shape[2], 2, *g.shape[:2], dtype=torch.float32)


def receiver_sums(
    g: Annotated[Tensor, "B T C K"],
    act: Annotated[Tensor, "B T C' K"],
    w_gamma: Annotated[Tensor, "C K"] | None,
    offset: Annotated[Tensor, "C K"],
    d_model: int,
    alone: int,
    group: int,
) -> Annotated[Tensor, "C 2 B T"] | None:
    """What `ReceiverSums` is of gradients that are there already; None where no kernel would read it.

    The first `alone` channels have an activation each, `group` each of the others one together.
    """
    sums = empty_sums(g, d_model) if takes_triton("auto", g) else None
    if sums is None:
        return None
    if (run := dry.active.get()) is not None:
        run.ran("receiver_sums", g, act, sums)
        return sums
    from . import triton_receiver_grads

    of_channels, acts = g.permute(2, 0, 1, 3), act.permute(2, 0, 1, 3)
    w_gamma = None if w_gamma is None else w_gamma.contiguous()
    triton_receiver_grads.fill_sums(of_channels, acts, w_gamma, offset.contiguous(), sums, d_model, alone, group)
    return sums


def fits(q: Tensor) -> bool:
    """Whether the GPU's kernels keep what they need of queries like these in registers."""
    return q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] <= 128


def value_grad(pattern: Tensor, dz: Tensor, before: int) -> Tensor:
    """∂metric/∂v [B, H, T, K] = Pᵀ dz from the pattern [B, H, Q, P + T] and dz [B, H, Q, K]."""
    return pattern[..., before:].to(dz.dtype).transpose(-1, -2) @ dz
