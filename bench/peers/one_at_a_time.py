"""Exact patching of one edge at a time: the clean and the corrupt run once, then a whole forward for every edge."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from eapcore.interop.transformer_lens import receiver_hook
from eapcore.models.forward import run_with_senders
from eapcore.models.model import Model
from eapcore.tasks import PromptPairs
from peers.plain import embedded, normed, sent, unembedded

Edge = tuple[int, int]


class OneAtATime:
    """What patching one edge (sender, receiver) does to the logit difference, mean over pairs."""

    def __init__(self, model: Model, pairs: PromptPairs) -> None:
        self.model, self.pairs = model, pairs
        self.rows = torch.arange(len(pairs)), pairs.positions
        with torch.no_grad():
            clean, corrupt = (run_with_senders(model, tokens)[1] for tokens in (pairs.clean, pairs.corrupt))
        self.delta = corrupt - clean
        self.clean = self.value(None)

    def logits(self, edge: Edge | None) -> Tensor:
        """[B, V] at the answer positions, of the clean run where no edge is given."""
        raise NotImplementedError

    @torch.no_grad()
    def value(self, edge: Edge | None) -> float:
        logits = self.logits(edge)
        answers, wrong = (logits.gather(1, ids) for ids in (self.pairs.answers, self.pairs.wrong))
        return float((answers.double().mean(1) - wrong.double().mean(1)).mean())

    def effect(self, edge: Edge) -> float:
        return self.value(edge) - self.clean


class Explicit(OneAtATime):
    """Without modules: split as hook-based tools do it, tuned, or the least that such a forward can do."""

    def __init__(self, model: Model, pairs: PromptPairs, split: bool) -> None:
        self.split = split
        self.qkv = [torch.cat(attention.w_qkv).contiguous() for attention in model.attentions]  # [3H, D, K]
        self.matrices = [w.permute(1, 0, 2).flatten(1) for w in self.qkv]  # [D, 3HK]
        super().__init__(model, pairs)

    def logits(self, edge: Edge | None) -> Tensor:
        model = self.model
        s, r = edge or (0, -1)
        x = embedded(model, self.pairs.clean)
        for stage in model.stages:
            if stage.attention is not None:
                x = self.behind_heads(x, stage.index, s, r - stage.attention.receivers.start)
            if stage.mlp is not None:
                read = x + self.delta[s] if r == stage.mlp.receivers.start else x
                x = x + sent(stage.mlp.component, read)
        if r == model.graph.logits:
            x = x + self.delta[s]
        return unembedded(model, x)[self.rows] if self.split else unembedded(model, x[self.rows])

    def behind_heads(self, x: Tensor, index: int, s: int, channel: int) -> Tensor:
        """The stream behind a layer's heads; the channel, if it is one of the layer, reads what sender s changes."""
        attention, w = self.model.attentions[index], self.qkv[index]
        norm, b, shape = attention.norm, attention.b_qkv, x.shape[:2]
        if self.split:
            copies = x.expand(len(w), *x.shape).clone()
            if 0 <= channel < len(w):
                copies[channel] += self.delta[s]
            qkv = torch.bmm(normed(copies, norm).flatten(1, 2), w).unflatten(1, shape) + b[:, None, None]
        else:
            qkv = (normed(x, norm) @ self.matrices[index]).unflatten(-1, (len(w), -1)) + b
            if 0 <= channel < len(w):
                qkv[:, :, channel] = normed(x + self.delta[s], norm) @ w[channel] + b[channel]
            qkv = qkv.permute(2, 0, 1, 3)
        q, k, v = (part.transpose(0, 1) for part in qkv.chunk(3))  # [B, H, T, K]
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=attention.scale)
        if self.split:
            result = torch.bmm(z.transpose(0, 1).flatten(1, 2), attention.w_o)  # [H, B·T, D]
            return x + result.unflatten(1, shape).permute(1, 2, 0, 3).sum(2) + attention.b_o
        return x + z.transpose(1, 2).flatten(2) @ attention.w_o.flatten(0, 1) + attention.b_o


class TransformerLens(OneAtATime):
    """A HookedTransformer with the same weights, and one forward hook."""

    def __init__(self, model: Model, pairs: PromptPairs) -> None:
        from peers.published import hooked_transformer

        self.hooked = hooked_transformer(model)
        super().__init__(model, pairs)

    def logits(self, edge: Edge | None) -> Tensor:
        hooks = []
        if edge is not None:
            graph = self.model.graph
            name, _, head = receiver_hook(graph, graph.receiver_names[edge[1]]).partition("[")

            def add(stream: Tensor, hook: object) -> Tensor:
                read = stream.clone()  # [B, T, H, D] in front of heads
                target = read[:, :, int(head.rstrip("]"))] if head else read
                target += self.delta[edge[0]]
                return read

            hooks = [(name, add)]
        return self.hooked.run_with_hooks(self.pairs.clean, fwd_hooks=hooks)[self.rows]
