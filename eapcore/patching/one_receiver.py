"""Runs in which one receiver alone reads something else; everything behind it follows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from eapcore.models.activations import accumulate_dtype, at_positions
from eapcore.models.attention import attention_output, channel_groups, future, mixtures, project
from eapcore.models.forward import run_layer
from eapcore.models.matmul import product
from eapcore.models.mlp import run_mlp
from eapcore.models.model import Model
from eapcore.models.norm import normalise
from eapcore.patching.masked import at_read
from eapcore.patching.record import Batch, _logits


@dataclass(frozen=True, slots=True)
class Readers:
    """Copies of a batch's clean run in which one receiver of a layer, or the logits, reads a change out of a pool.

    index: the layer, n_layers for the logits. pool: the changes [N, B, T, D]. normed: for the layer's q, and for its k
    and v, which changes some head reads, and what its channel projects then, [n, B, Q, D]. Q is T, but 1 for q in the
    last layer: the answer position.
    """

    model: Model
    batch: Batch
    index: int
    pool: Tensor
    normed: Sequence[tuple[list[int], Tensor]]

    @staticmethod
    def of(model: Model, batch: Batch, index: int, pool: Tensor, reads: Sequence[tuple[int, int]]) -> Readers:
        """For these reads, (change, receiver); a stream that several heads read is normalised once."""
        graph, last = model.graph, model.config.n_layers - 1
        if index > last:
            return Readers(model, batch, index, pool, ())

        def normalised(receivers: range, short: bool) -> tuple[list[int], Tensor]:
            rows = sorted({row for row, receiver in reads if receiver in receivers})
            stream, added = batch.clean.attn_in[index], _take(pool, rows)
            if short:
                stream, added = at_read(stream, batch.read), at_read(added, batch.read)
            return rows, normalise(stream + added, model.weights.layers[index].ln1, model.config.eps)[0]

        start, stop = graph.qkv(index).start, graph.qkv(index).stop
        if index < last:
            return Readers(model, batch, index, pool, (normalised(range(start, stop), False),) * 2)
        split = start + graph.n_heads
        ends = normalised(range(start, split), True), normalised(range(split, stop), False)
        return Readers(model, batch, index, pool, ends)

    def logits(self, reads: Sequence[tuple[int, int]]) -> Tensor:
        """The batch's logits, float64 [C, B, V] or [C, B, n], in a copy for each of some reads, (change, receiver);
        those of one receiver stand together."""
        model, batch, index, n_layers = self.model, self.batch, self.index, self.model.config.n_layers
        stream = batch.clean.out if index == n_layers else batch.clean.mlp_in[index]
        stream = at_read(stream, batch.read) if index >= n_layers - 1 else stream
        past = read = stream.expand(len(reads), *stream.shape).clone()  # what goes past the MLP, and what it reads
        start = 0
        for receiver, group in groupby(reads, key=lambda pair: pair[1]):
            rows = [row for row, _ in group]
            copies = slice(start, start + len(rows))
            start += len(rows)
            if index < n_layers and receiver - model.graph.qkv(index).start < 3 * model.graph.n_heads:
                self._through_head(receiver, rows, past[copies])
                continue
            if index < n_layers and read is past:
                read = past.clone()
            added = _take(self.pool, rows)
            read[copies] += at_read(added, batch.read) if index >= n_layers - 1 else added
        past, read = past.flatten(0, 1), read.flatten(0, 1)
        if index == n_layers:
            return finish(model, batch, index, past)
        return finish(model, batch, index + 1, through_mlp(model, index, read, past))

    def _through_head(self, receiver: int, rows: list[int], stream: Tensor) -> None:
        """Add to the streams behind the layer's attention, [C, B, Q, D], what a head sends otherwise than in the clean
        run where its q, k or v reads the changes `rows`. Only this head's output changes."""
        model, batch, index = self.model, self.batch, self.index
        config, layer, run = model.config, model.weights.layers[index], batch.clean.layers[index]
        channel = receiver - model.graph.qkv(index).start
        part, head = divmod(channel, config.n_heads)
        read = batch.read if index == config.n_layers - 1 else None
        known, normed = self.normed[part > 0]
        (w,) = channel_groups(layer, slice(channel, channel + 1))
        n = _take(normed, [known.index(row) for row in rows])
        changed = product(n, w[0], layer.b_qkv[channel]).transpose(0, 1)  # [B, C, Q, K], the copies in the heads' place
        qkv = []
        for p in range(3):
            x = run.saved.qkv[0][:, :, p * config.n_heads + head, None].transpose(1, 2)  # [B, 1, T, K]
            if p == 0 and read is not None:
                x = x.gather(2, read[:, None, :, None].expand(-1, 1, -1, config.d_head))
            x = changed if p == part else x
            if p > 0 and batch.past is not None:
                before = batch.past[index][:, :, (p - 1) * config.n_heads + head, None].transpose(1, 2)
                x = torch.cat([before.expand(-1, x.shape[1], -1, -1), x], 2)
            qkv.append(x.expand(-1, len(rows), -1, -1))
        z = mixtures(model, index, qkv, run.out.shape[1], read).transpose(0, 1)  # [C, B, Q, K]
        difference = (z - at_positions(run.z[:, :, head], read)).to(stream.dtype)
        stream.view(-1, config.d_model).addmm_(difference.flatten(0, 2), layer.w_o[head])


def _take(pool: Tensor, rows: list[int]) -> Tensor:
    """Some of a pool's rows: a view where they follow each other."""
    if rows == list(range(rows[0], rows[-1] + 1) if rows else ()):
        return pool[rows[0] : rows[-1] + 1] if rows else pool[:0]
    return pool[rows]


def through_mlp(model: Model, index: int, mid: Tensor, base: Tensor | None = None) -> Tensor:
    """The residual stream behind a layer from `mid` [N, Q, D] behind its attention.

    base: [N, Q, D] what goes past the MLP, where that is another stream than the one that it reads.
    """
    layer = model.weights.layers[index]
    if layer.w_in is None:
        return mid
    n = normalise(mid, layer.ln2, model.config.eps)[0]
    return (mid if base is None else base) + run_mlp(model.config, layer, n)[0]


def finish(model: Model, batch: Batch, index: int, x: Tensor) -> Tensor:
    """The batch's logits at the answers, float64 [C, B, V] or [C, B, n], from the stream that enters the layer `index`.

    x: [C·B, T, D], or behind the last layer [C·B, 1, D] at the answers.
    """
    last = model.config.n_layers - 1
    for layer in range(index, last):
        x = run_layer(model, layer, x, None if batch.past is None else batch.past[layer], None).out
    if index <= last:
        x = _last_layer(model, batch, x)
    return _logits(model, x[:, 0].unflatten(0, (-1, len(batch.pairs))), batch.tokens)


def _last_layer(model: Model, batch: Batch, x: Tensor) -> Tensor:
    """The stream behind the last layer at the answers, [C·B, 1, D], from what enters it, [C·B, T, D].

        scores = q·(W_kᵀ n + b_k) = (W_k q)·n + q·b_k
        mixtures = Σ_t p_t (W_vᵀ n_t + b_v) = W_vᵀ Σ_t p_t n_t + b_v Σ_t p_t

    so that no position's keys and values are made, which are all that this layer would do for most of them. In half
    precision they are, and rounded as the model does.
    """
    config, last = model.config, model.config.n_layers - 1
    layer, read = model.weights.layers[last], batch.read.repeat(len(x) // len(batch.pairs), 1)
    past = None if batch.past is None else batch.past[last]
    if accumulate_dtype(x.dtype) != x.dtype:
        return run_layer(model, last, x, past, read).out
    heads, tokens, rows = config.n_heads, x.shape[1], len(batch.pairs)
    n = normalise(x, layer.ln1, config.eps)[0]
    q = project(layer, at_positions(n, read), slice(0, heads))[:, 0].transpose(0, 1)  # [H, C·B, K]
    w_k, w_v = torch.cat(channel_groups(layer, slice(heads, 3 * heads))).chunk(2)  # [H, D, K]
    b_k, b_v = layer.b_qkv[heads:, None].chunk(2)  # [H, 1, K]
    scores = torch.bmm(torch.bmm(q, w_k.transpose(1, 2)).transpose(0, 1), n.transpose(1, 2))  # [C·B, H, T]
    scores += (q * b_k).sum(-1).T[..., None]
    if past is not None:
        before = past.permute(0, 2, 3, 1)  # [B, 2H, K, P]
        by_prompt = q.unflatten(1, (-1, rows)).permute(2, 0, 1, 3)  # [B, H, C, K]
        earlier = (by_prompt @ before[:, :heads]).permute(2, 0, 1, 3).flatten(0, 1)  # [C·B, H, P]
        scores = torch.cat([earlier, scores], 2)
    hidden = future(tokens, scores.shape[2] - tokens, read, x.device)[:, 0]
    pattern = (scores * config.score_scale(last)).masked_fill_(hidden, -torch.inf).softmax(-1)
    here = pattern[:, :, -tokens:]
    z = torch.bmm(torch.bmm(here, n).transpose(0, 1), w_v) + here.sum(-1).T[..., None] * b_v  # [H, C·B, K]
    if past is not None:
        by_prompt = pattern[:, :, :-tokens].unflatten(0, (-1, rows)).permute(1, 2, 0, 3)  # [B, H, C, P]
        z += (by_prompt @ before[:, heads:].transpose(2, 3)).permute(1, 2, 0, 3).flatten(1, 2)
    sent = attention_output(layer, z.transpose(0, 1)[:, None])
    return through_mlp(model, last, at_positions(x, read) + sent)
