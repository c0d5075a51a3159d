"""Runs in which every receiver reads its own choice of senders."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from eapcore.models.attention import attend, channel_groups, head_outputs
from eapcore.models.mlp import run_mlp
from eapcore.models.model import Model
from eapcore.models.norm import normalise
from eapcore.patching.record import Batch, Run, _logits


@dataclass(frozen=True, slots=True)
class Changes:
    """How senders differ from a run: everywhere [..., S', B, T, D] for those before the last layer, at_read
    [..., S, B, 1, D] for all of them at the answer positions, which alone matter in the last layer."""

    everywhere: Tensor
    at_read: Tensor

    @staticmethod
    def between(model: Model, batch: Batch, new: Tensor, old: Tensor) -> Changes:
        """From old to new, [S, B, T, D]."""
        change = new - old
        before = model.graph.heads(model.config.n_layers - 1).start
        return Changes(change[:before].clone(), at_read(change, batch.read))


def at_read(x: Tensor, read: Tensor) -> Tensor:
    """x [..., B, T, D] at read [B, 1]: [..., B, 1, D]."""
    return x.gather(-2, read[..., None].expand(*x.shape[:-2], 1, x.shape[-1]))


def run_masked(
    model: Model, batch: Batch, base: Run, masks: Tensor, fixed: Changes, recompute: Tensor
) -> tuple[Tensor, Changes]:
    """Run copies of a batch in which every receiver reads its own choice of senders.

        v[c, r] = base stream[r] + Σ_s masks[c, s, r] · change[c, s]

    change[c, s] is e[c, s] − base[s], e being what the sender makes of its own such input, for senders in `recompute`;
    for all others it is given.

    Args:
        model, batch: the model and the batch.
        base: the run or ablation that an absent edge carries.
        masks: [C, S, R], bool or weights.
        fixed: the change of the senders that are not computed again, the same in all copies; others are ignored.
        recompute: bool [S].

    Returns:
        (the batch's logits float64 [C, B, V] or [C, B, n], changes of the recomputed senders in order [C, n, B, ., D]).
    """
    graph, config = model.graph, model.config
    copies, (rows, tokens), last = len(masks), batch.shape, config.n_layers - 1
    alike = ((masks == masks[:1]) | recompute[:, None]).all(0)  # [S, R], what all copies read alike of fixed senders
    masks = masks.to(model.device, model.dtype)
    held = masks * ~recompute.to(model.device)[:, None]  # what the fixed senders send
    again: list[int] = recompute.nonzero().squeeze(1).tolist()
    before = sum(s < graph.heads(last).start for s in again)
    own = Changes(
        base.out.new_empty(copies, before, rows, tokens, config.d_model),
        base.out.new_empty(copies, len(again), rows, 1, config.d_model),
    )
    made = 0

    def read(receivers: list[int], stream: Tensor, short: bool) -> Tensor:
        """What receivers read: [C, R_i, B, Q, D]; short is at the answers alone."""
        stop = graph.senders_before(receivers[0])
        pool, mine = (fixed.at_read, own.at_read) if short else (fixed.everywhere, own.everywhere)
        stream = at_read(stream, batch.read) if short else stream
        weights = held[:, :stop, receivers].transpose(1, 2)  # [C, R_i, S_i]
        if bool(alike[:stop, receivers].all()):
            weights = weights[:1]
        v = stream + (weights @ pool[:stop].flatten(1)).unflatten(2, stream.shape)
        if made:
            weights = masks[:, again[:made]][:, :, receivers].transpose(1, 2)
            v = v + torch.bmm(weights, mine[:, :made].flatten(2)).unflatten(2, stream.shape)
        return v.expand(copies, *v.shape[1:])

    def project(index: int, receivers: list[int], v: Tensor) -> Tensor:
        """[C·B, Q, R_i, K]."""
        layer = model.weights.layers[index]
        channels = [r % graph.receivers_per_layer for r in receivers]
        weight = torch.stack([channel_groups(layer, slice(c, c + 1))[0][0] for c in channels])  # [R_i, D, K]
        n = normalise(v, layer.ln1, config.eps)[0].transpose(0, 1).flatten(1, 3)  # [R_i, C·B·Q, D]
        act = torch.bmm(n, weight).unflatten(1, (copies * rows, v.shape[3])).permute(1, 2, 0, 3)
        return act + layer.b_qkv[channels]

    for index, layer in enumerate(model.weights.layers):
        short = index == last
        if short:
            own.at_read[:, :made] = at_read(own.everywhere[:, :made], batch.read)
        place = own.at_read if short else own.everywhere
        heads = [h for h in range(config.n_heads) if bool(recompute[graph.heads(index).start + h])]
        if heads:
            q_at, kv_at = ([graph.qkv(index).start + p * config.n_heads + h for p in parts for h in heads]
                           for parts in ((0,), (1, 2)))  # fmt: skip
            q = project(index, q_at, read(q_at, base.attn_in[index], short))
            kv = project(index, kv_at, read(kv_at, base.attn_in[index], False))
            past = None
            if batch.past is not None:
                both = [*heads, *(config.n_heads + h for h in heads)]
                past = batch.past[index][:, :, both].repeat(copies, 1, 1, 1)
            z = attend(model, index, q, kv, past, batch.read.repeat(copies, 1) if short else None)
            sent = head_outputs(z, layer.w_o[heads]).unflatten(1, (copies, rows))  # [h, C, B, Q, D]
            senders = [graph.heads(index).start + h for h in heads]
            sent = sent - _window(base.senders[senders], batch, short)[:, None]
            place[:, made : made + len(heads)] = sent.transpose(0, 1)
            made += len(heads)
        if graph.has_mlp and bool(recompute[graph.mlp(index)]):
            v = read([graph.mlp_receiver(index)], base.mlp_in[index], short)[:, 0]
            n = normalise(v, layer.ln2, config.eps)[0]
            place[:, made] = run_mlp(config, layer, n)[0] - _window(base.senders[graph.mlp(index)], batch, short)
            made += 1
    end = read([graph.logits], base.out, True)[:, 0, :, 0]
    return _logits(model, end, batch.tokens), own


def _window(x: Tensor, batch: Batch, short: bool) -> Tensor:
    return at_read(x, batch.read) if short else x
