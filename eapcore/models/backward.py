"""The backward pass, written by hand: from the logits down, every receiver's gradient on the way."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import eapcore.kernels as kernels
from eapcore.models.activations import LayerSaved, NormInput, accumulate_dtype
from eapcore.models.attention import attention_grad, attention_pattern, channel_groups, unproject, value_grad, with_past
from eapcore.models.backward_rules import GRADIENT, Rules
from eapcore.models.forward import by_prompt
from eapcore.models.matmul import product
from eapcore.models.mlp import mlp_receiver_grad, units_grad
from eapcore.models.model import Model
from eapcore.models.norm import frozen_weight, norm_grad


@dataclass(frozen=True, slots=True)
class Channels:
    """Some of a layer's q, k and v receivers, and what their gradients are made of.

    channels: which of the layer's 3H. norm_in: what their LayerNorm read. act, g: [B, T, C, K] their activations and
    ∂metric/∂ of them. With at_read T is Q: the gradient is zero but at the positions that are read. run: what the
    forward pass saved of the layer. dz: [B, Q, H, K] ∂metric/∂(the heads' mixtures of v). past, read: as the layer's
    attention was given.
    """

    model: Model
    index: int
    channels: slice
    norm_in: NormInput
    act: Tensor
    g: Tensor
    at_read: bool
    rules: Rules
    run: LayerSaved
    dz: Tensor
    past: Tensor | None
    read: Tensor | None

    @property
    def receivers(self) -> slice:
        """Which of the graph's receivers these are."""
        start = self.model.graph.qkv(self.index).start
        return slice(start + self.channels.start, start + self.channels.stop)

    def of(self, pairs: slice | Tensor) -> Channels:
        """The same of some of the batch's pairs, of a slice as views; without what the layer's attention was given."""
        norm_in = self.norm_in.of(lambda x: x[pairs])
        return replace(self, norm_in=norm_in, act=self.act[pairs], g=self.g[pairs])

    def grads(self, impl: str, workspace: Tensor | None = None) -> Tensor:
        """∂metric/∂v of each of them, [C, B, T, D], in the first elements of a workspace where there is one."""
        g, norm, groups = self.factors()
        shape = (g.shape[2], *g.shape[:2], self.norm_in.x.shape[-1])
        grads = g.new_empty(shape) if workspace is None else workspace[: math.prod(shape)].view(shape)
        start = 0
        for w in groups:
            part = slice(start, start + w.shape[0])
            inside = slice(self.channels.start + part.start, self.channels.start + part.stop)
            w_gamma, offset = self.model.closed_form(self.index, inside)
            # [B, T, C, K] → [C, B, T, K]
            views = (g[:, :, part].permute(2, 0, 1, 3), self.act[:, :, part].permute(2, 0, 1, 3))
            kernels.receiver_grads(*views, w, norm=norm, w_gamma=w_gamma, offset=offset, out=grads[part], impl=impl)
            start = part.stop
        return grads

    def total(self) -> Tensor:
        """Σ over them of ∂metric/∂v, [B, T, D] in float32 at least, without making them one by one."""
        layer = self.model.weights.layers[self.index]
        dn = unproject(channel_groups(layer, self.channels), self.g)
        return norm_grad(dn, layer.ln1, self.norm_in, self.rules.norm).to(accumulate_dtype(dn.dtype))

    def factors(self) -> tuple[Tensor, kernels.Norm, list[Tensor]]:
        """(g [B, T, C, K], norm, channel groups [C_i, D, K]) from which the kernels make the gradients."""
        layer = self.model.weights.layers[self.index]
        groups = channel_groups(layer, self.channels)
        if layer.ln1 is None:
            return self.g, kernels.Norm("none"), groups
        assert self.norm_in.rstd is not None
        if self.rules.norm == "frozen":
            ln1 = layer.ln1
            scaled = (self.g * self.norm_in.rstd[..., None]).to(self.g.dtype)
            return scaled, kernels.Norm("none"), [frozen_weight(w, ln1) for w in groups]
        norm = kernels.Norm("layernorm", self.norm_in.x_hat(), self.norm_in.rstd.squeeze(-1), layer.ln1[0])
        return self.g, norm, groups


class Sink:
    """Who takes the gradients as the backward pass makes them; every method may be left as it is.

    at_read: the gradient is [.., Q, ..] at the positions that are read, and zero elsewhere.
    """

    def behind(self, senders: slice, grad: Tensor, at_read: bool) -> None:
        """The residual stream's gradient behind some senders, [B, T, D]: what each of them adds has this gradient."""

    def units(self, index: int, grad: Tensor, at_read: bool) -> None:
        """The gradient of a layer's MLP hidden units behind the activation function, [B, T, M]."""

    def receiver(self, receiver: int, grad: Tensor, at_read: bool) -> None:
        """The gradient of an MLP's or the logits' receiver, [B, T, D]."""

    def channels(self, part: Channels) -> Tensor:
        """Take some of a layer's q, k and v receivers; returns the sum of their gradients, as `Channels.total`."""
        return part.total()


def backward(
    model: Model,
    saved: list[LayerSaved],
    grad: Tensor,
    sink: Sink,
    *,
    rules: Rules = GRADIENT,
    past: list[Tensor] | None = None,
    read: Tensor | None = None,
) -> None:
    """Go back from the logits' receiver to the embedding and hand the gradients to a sink on the way.

    Args:
        model: the model.
        saved: what `run_layers` saved at the point where the gradient is taken; emptied on the way.
        grad: [B, Q, D] ∂metric/∂(last residual stream), the gradient of the logits' receiver.
        sink: what takes the gradients.
        rules: how the gradient goes through what is not linear, and where it does not go.
        past, read: as `run_layers` was given. Positions in the past get no gradient: nothing that scores differs there.
    """
    graph, config, last = model.graph, model.config, model.config.n_layers - 1
    wide = accumulate_dtype(grad.dtype)
    sink.receiver(graph.logits, grad, read is not None)
    total = grad.to(wide)  # ∂metric/∂(residual stream) behind the layer: [B, Q, D] behind the last, then [B, T, D]
    for index in reversed(range(config.n_layers)):
        layer, run = model.weights.layers[index], saved.pop()
        here = read if index == last else None
        if run.mlp_in is not None:
            place = graph.mlp(index)
            sink.behind(slice(place, place + 1), total, here is not None)
            if f"m{index}" not in rules.cut:
                units = units_grad(layer, total.to(model.dtype))
                sink.units(index, units, here is not None)
                grads = mlp_receiver_grad(model, index, run, units, rules)
                del units
                sink.receiver(graph.mlp_receiver(index), grads, here is not None)
                total = total + grads
        sink.behind(graph.heads(index), total, here is not None)
        if f"a{index}" in rules.cut:
            total = spread(total, here, run.kv.shape[1])
            continue
        dz = product(total.to(model.dtype), layer.w_o.flatten(0, 1).T).unflatten(-1, layer.w_o.shape[:2])
        before = None if past is None else past[index]
        for part in _channels(model, index, run, dz, before, here, rules):
            summed = sink.channels(part)
            if here is not None and not part.at_read:
                rows = here[:, :, None].expand(-1, -1, summed.shape[-1])
                total = summed.scatter_add_(1, rows, total)
            else:
                total = total + summed
            del part, summed  # before the next ones are made
    sink.behind(slice(0, 1), total, False)


def _channels(
    model: Model,
    index: int,
    run: LayerSaved,
    dz: Tensor,
    past: Tensor | None,
    read: Tensor | None,
    rules: Rules,
) -> Iterator[Channels]:
    """A layer's q, k and v receivers with a gradient, in one piece if they have it at the same positions.

    The last piece is always one at all positions.
    """
    heads = model.config.n_heads
    if rules.attention == "frozen":
        k, v = with_past(run.kv, past)
        before = k.shape[2] - run.kv.shape[1]
        pattern = attention_pattern(model, index, run.q.transpose(1, 2), k, before, read)
        dv = value_grad(pattern, dz.transpose(1, 2), before).transpose(1, 2)
        del pattern, k, v
        values = slice(2 * heads, 3 * heads)
        act = run.kv[:, :, heads:]
        yield Channels(model, index, values, run.attn_in, act, dv, False, rules, run, dz, past, read)
        return
    dq, dk, dv = attention_grad(model, index, run.q, run.kv, dz, past, read)
    if read is None:
        g = torch.cat([dq, dk, dv], 1).transpose(1, 2)
        del dq, dk, dv
        yield Channels(model, index, slice(0, 3 * heads), run.attn_in, run.qkv[0], g, False, rules, run, dz, past, read)
        return
    queries, others = slice(0, heads), slice(heads, 3 * heads)
    yield Channels(
        model, index, queries, run.attn_in.at(read), run.q, dq.transpose(1, 2), True, rules, run, dz, past, read
    )
    g = torch.cat([dk, dv], 1).transpose(1, 2)
    del dq, dk, dv
    yield Channels(model, index, others, run.attn_in, run.kv, g, False, rules, run, dz, past, read)


def logits_grad(
    model: Model, d_logits: Tensor, norm_in: NormInput, rules: Rules = GRADIENT, tokens: Tensor | None = None
) -> Tensor:
    """∂metric/∂(last residual stream), [..., D], from ∂metric/∂logits [..., V] and what the final LayerNorm read.

    tokens: as `unembed` was given, with the gradients of these tokens' logits.
    """
    d_logits, rows = d_logits.to(model.dtype), model.weights.w_u.T
    if tokens is None:
        dn = product(d_logits, rows)
    else:
        dn = (by_prompt(d_logits, tokens) @ rows[tokens]).transpose(0, 1).flatten(0, 1)
    return norm_grad(dn, model.weights.ln_final, norm_in, rules.norm)


def spread(x: Tensor, read: Tensor | None, tokens: int) -> Tensor:
    """x [B, Q, ...] at the positions read [B, Q] of zeros [B, T, ...]; x itself for None."""
    if read is None:
        return x
    out = x.new_zeros(len(x), tokens, *x.shape[2:])
    out[torch.arange(len(x), device=x.device)[:, None], read] = x
    return out
