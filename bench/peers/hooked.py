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

from eapcore.models.activations import accumulate_dtype
from eapcore.models.mlp import APPROXIMATE
from eapcore.models.model import Model


class HookPoint(nn.Identity):
    """An identity that forward hooks and backward hooks can be put on."""


class Block(nn.Module):
    def __init__(self, model: Model, index: int) -> None:
        super().__init__()
        self.config, self.index, self.layer = model.config, index, model.weights.layers[index]
        self.hook_qkv = nn.ModuleList(HookPoint() for _ in "qkv")
        self.hook_result, self.hook_mlp_in, self.hook_mlp_out = HookPoint(), HookPoint(), HookPoint()
        qkv = torch.cat(list(self.layer.w_qkv)).contiguous()  # [3H, D, K]
        self.qkv = qkv.chunk(3)
        self.b_qkv = self.layer.b_qkv.chunk(3)

    def norm(self, x: Tensor, ln: tuple[Tensor, Tensor] | None) -> Tensor:
        return x if ln is None else F.layer_norm(x, x.shape[-1:], *ln, self.config.eps)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        heads, layer = self.config.n_heads, self.layer
        parts = []
        for hook, w, b in zip(self.hook_qkv, self.qkv, self.b_qkv, strict=True):
            copies = hook(x[:, :, None].expand(batch, tokens, heads, width).clone())  # [B, T, H, D]
            n = self.norm(copies, layer.ln1).permute(2, 0, 1, 3).reshape(heads, batch * tokens, width)
            parts.append(torch.bmm(n, w).view(heads, batch, tokens, -1).transpose(0, 1) + b[:, None])  # [B, H, T, K]
        z = F.scaled_dot_product_attention(*parts, is_causal=True, scale=self.config.score_scale(self.index))
        z = z.transpose(0, 1).reshape(heads, batch * tokens, -1)
        result = torch.bmm(z, layer.w_o).view(heads, batch, tokens, width).permute(1, 2, 0, 3)  # [B, T, H, D]
        x = x + self.hook_result(result).sum(2) + layer.b_o
        if layer.w_in is None:
            return x
        n = self.norm(self.hook_mlp_in(x.clone()), layer.ln2)
        hidden = F.gelu(n @ layer.w_in + layer.b_in, approximate=APPROXIMATE[self.config.act_fn])
        return x + self.hook_mlp_out(hidden @ layer.w_out + layer.b_out)


class Hooked(nn.Module):
    """A model with a hook point at every sender and receiver."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model
        self.blocks = nn.ModuleList(Block(model, index) for index in range(model.config.n_layers))
        self.hook_embed, self.hook_final = HookPoint(), HookPoint()

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, V] at the last position."""
        weights = self.model.weights
        x = self.hook_embed(weights.w_e[tokens] + weights.w_pos[: tokens.shape[1]])
        x = x.requires_grad_() if torch.is_grad_enabled() else x
        for block in self.blocks:
            x = block(x)
        n = self.blocks[0].norm(self.hook_final(x.clone()), weights.ln_final)
        logits = n[:, -1] @ weights.w_u
        return logits if weights.b_u is None else logits + weights.b_u

    def points(self) -> tuple[list[tuple[HookPoint, slice]], list[tuple[HookPoint, slice]]]:
        """Hook points of the senders and of the receivers, with their places in the graph."""
        graph = self.model.graph
        senders = [(self.hook_embed, slice(0, 1))]
        receivers = []
        for index, block in enumerate(self.blocks):
            senders.append((block.hook_result, graph.heads(index)))
            start, heads = graph.qkv(index).start, graph.n_heads
            for part, hook in enumerate(block.hook_qkv):
                receivers.append((hook, slice(start + part * heads, start + (part + 1) * heads)))
            if graph.has_mlp:
                senders.append((block.hook_mlp_out, slice(graph.mlp(index), graph.mlp(index) + 1)))
                place = graph.mlp_receiver(index)
                receivers.append((block.hook_mlp_in, slice(place, place + 1)))
        return senders, [*receivers, (self.hook_final, slice(graph.logits, graph.logits + 1))]


def eap(hooked: Hooked, clean: Tensor, corrupt: Tensor, right: int, wrong: int) -> Tensor:
    """EAP scores [S, R] of the logit difference at the last position, mean over pairs."""
    graph, config = hooked.model.graph, hooked.model.config
    batch, tokens = clean.shape
    like = hooked.model.weights.w_e
    buffer = like.new_zeros(batch, tokens, graph.n_senders, config.d_model)
    scores = like.new_zeros(graph.n_senders, graph.n_receivers, dtype=accumulate_dtype(like.dtype))
    senders, receivers = hooked.points()

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

    handles = [hook.register_forward_hook(collect(place, 1.0)) for hook, place in senders]
    with torch.no_grad():
        hooked(corrupt)
    for handle in handles:
        handle.remove()
    handles = [hook.register_forward_hook(collect(place, -1.0)) for hook, place in senders]
    handles += [hook.register_full_backward_hook(contract(place)) for hook, place in receivers]
    logits = hooked(clean)
    (logits[:, right] - logits[:, wrong]).sum().backward()
    for handle in handles:
        handle.remove()
    return scores / batch
