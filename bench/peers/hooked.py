"""Hook-based edge attribution patching, as published tools are built, but tuned: what eapcore is compared with.

An nn.Module with hook points. Forward hooks fill a difference buffer [batch, pos, senders, d_model], every head's q, k
and v input is its own copy of the residual stream, and backward hooks contract each receiver's gradient with the buffer
by an einsum. Tuned: weights are frozen, so that no gradient of a weight is computed, heads are projected by one batched
product, and only the answer position is unembedded.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eapcore.models.attention import Attention
from eapcore.models.mlp import Mlp
from eapcore.models.model import Model, Place
from eapcore.models.tensors import accumulate_dtype
from peers.plain import embedded, normed, sent, unembedded


class HookPoint(nn.Identity):
    """An identity that forward hooks and backward hooks can be put on."""


Points = list[tuple[HookPoint, slice]]  # with their places in the graph


class Heads(nn.Module):
    """All heads of a layer, and behind them the residual stream."""

    def __init__(self, place: Place[Attention]) -> None:
        super().__init__()
        self.attention, heads = place.component, place.component.n_heads
        self.hook_qkv, self.hook_result = nn.ModuleList(HookPoint() for _ in "qkv"), HookPoint()
        self.w = torch.cat(self.attention.w_qkv).contiguous().chunk(3)  # of q, k and v [H, D, K]
        self.b = self.attention.b_qkv.chunk(3)
        starts = range(place.receivers.start, place.receivers.stop, heads)
        self.senders: Points = [(self.hook_result, place.senders)]
        self.receivers: Points = [(hook, slice(i, i + heads)) for hook, i in zip(self.hook_qkv, starts, strict=True)]

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        attention, heads = self.attention, self.attention.n_heads
        parts = []
        for hook, w, b in zip(self.hook_qkv, self.w, self.b, strict=True):
            copies = hook(x[:, :, None].expand(batch, tokens, heads, width).clone())  # [B, T, H, D]
            n = normed(copies, attention.norm).permute(2, 0, 1, 3).reshape(heads, batch * tokens, width)
            parts.append(torch.bmm(n, w).view(heads, batch, tokens, -1).transpose(0, 1) + b[:, None])  # [B, H, T, K]
        z = F.scaled_dot_product_attention(*parts, is_causal=True, scale=attention.scale)
        z = z.transpose(0, 1).reshape(heads, batch * tokens, -1)
        result = torch.bmm(z, attention.w_o).view(heads, batch, tokens, width).permute(1, 2, 0, 3)  # [B, T, H, D]
        return x + self.hook_result(result).sum(2) + attention.b_o


class Units(nn.Module):
    """The MLP of a layer, and behind it the residual stream."""

    def __init__(self, place: Place[Mlp]) -> None:
        super().__init__()
        self.mlp, self.hook_in, self.hook_out = place.component, HookPoint(), HookPoint()
        self.senders: Points = [(self.hook_out, place.senders)]
        self.receivers: Points = [(self.hook_in, place.receivers)]

    def forward(self, x: Tensor) -> Tensor:
        return x + self.hook_out(sent(self.mlp, self.hook_in(x.clone())))


class Hooked(nn.Module):
    """A model with a hook point at every sender and receiver."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model, graph = model, model.graph
        self.blocks, self.hook_embed, self.hook_final = nn.ModuleList(), HookPoint(), HookPoint()
        for stage in model.stages:
            parts = ((Heads, stage.attention), (Units, stage.mlp))
            self.blocks.extend(kind(place) for kind, place in parts if place is not None)
        self.senders: Points = [(self.hook_embed, slice(0, 1))]
        self.senders += [point for block in self.blocks for point in block.senders]
        self.receivers: Points = [point for block in self.blocks for point in block.receivers]
        self.receivers += [(self.hook_final, slice(graph.logits, graph.logits + 1))]

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, V] at the last position."""
        x = self.hook_embed(embedded(self.model, tokens))
        x = x.requires_grad_() if torch.is_grad_enabled() else x
        for block in self.blocks:
            x = block(x)
        return unembedded(self.model, self.hook_final(x.clone())[:, -1])


def eap(hooked: Hooked, clean: Tensor, corrupt: Tensor, right: int, wrong: int) -> Tensor:
    """EAP scores [S, R] of the logit difference at the last position, mean over pairs."""
    graph, config = hooked.model.graph, hooked.model.config
    batch, tokens = clean.shape
    like = hooked.model.weights.w_e
    buffer = like.new_zeros(batch, tokens, graph.n_senders, config.d_model)
    scores = like.new_zeros(graph.n_senders, graph.n_receivers, dtype=accumulate_dtype(like.dtype))

    def collect(place: slice, sign: float):
        def hook(module: nn.Module, inputs: object, out: Tensor) -> None:
            buffer[:, :, place] += sign * out.detach().view(batch, tokens, -1, config.d_model)

        return hook

    def contract(place: slice):
        def hook(module: nn.Module, grad_input: object, grad_output: tuple[Tensor]) -> None:
            grads = grad_output[0].view(batch, tokens, -1, config.d_model)
            before = graph.senders_before(place.start)
            scores[:before, place] += torch.einsum("bpsd,bprd->sr", buffer[:, :, :before], grads)

        return hook

    handles = [hook.register_forward_hook(collect(place, 1.0)) for hook, place in hooked.senders]
    with torch.no_grad():
        hooked(corrupt)
    for handle in handles:
        handle.remove()
    handles = [hook.register_forward_hook(collect(place, -1.0)) for hook, place in hooked.senders]
    handles += [hook.register_full_backward_hook(contract(place)) for hook, place in hooked.receivers]
    logits = hooked(clean)
    (logits[:, right] - logits[:, wrong]).sum().backward()
    for handle in handles:
        handle.remove()
    return scores / batch
