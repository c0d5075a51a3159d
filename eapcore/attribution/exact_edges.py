"""Edges into the last layer and into the logits, patched where the metric reads instead of estimated.

    effect[s, r] = metric(clean run with v[r] + Δ_s at r alone) − metric(clean run)

Behind these receivers lie at most the last layer's MLP, the final norm and the unembedding, at the positions that are
read: an edge into the logits costs a norm and the rows of the unembedding, one into the MLP also the MLP, one into q, k
or v also a head's mixture. No forward of the model is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

import eapcore.execution.limits as limits
from eapcore.attribution.sums import Store, unrounded
from eapcore.execution.batch import Batch, LogitsRead
from eapcore.execution.experiment import values_of
from eapcore.models.attention import Attention, AttentionRun, AttentionSaved
from eapcore.models.forward import StageSaved, unembed
from eapcore.models.matmul import product
from eapcore.models.mlp import Mlp, MlpSaved
from eapcore.models.model import Model, Place, Stage
from eapcore.models.norm import Norm, NormInput
from eapcore.models.patched_attention import patched, sent_otherwise
from eapcore.models.tensors import accumulate_dtype, on, spread
from eapcore.tasks.metrics import Metric, MetricBatch

Block = tuple[int, Tensor]
"""(receiver, effects [B, S'] of the edges from the first S' senders)."""


@dataclass(frozen=True, slots=True)
class LastLayer:
    """A batch's clean run in the last layer, in float32 at least.

    saved: what its stages kept. out: the last residual stream [B, Q, D]. past: the layer's k and v heads of the tokens
    before, or None. clean: the metric on the clean run, [B].
    """

    model: Model
    batch: Batch
    metric: Metric
    reads: LogitsRead
    reference: MetricBatch
    saved: Sequence[StageSaved]
    out: Tensor
    past: Tensor | None
    clean: Tensor

    @staticmethod
    def of(
        model: Model,
        batch: Batch,
        metric: Metric,
        reads: LogitsRead,
        reference: MetricBatch,
        saved: Sequence[StageSaved],
        out: Tensor,
        past: Tensor | None,
        clean: Tensor,
    ) -> LastLayer:
        """The same of a model in any dtype: in half precision an effect would be lost in the rounding of the logits, so
        the last layer and the unembedding go on from the rounded streams in float32."""
        wide = accumulate_dtype(model.dtype)
        if wide == model.dtype:
            return LastLayer(model, batch, metric, reads, reference, saved, out, past, clean)
        weights, tokens = model.weights, reads.tokens
        last = model.stream.layer(len(weights.layers) - 1) if model.stream is not None else weights.layers[-1]
        layers = (*weights.layers[:-1], widened(last, wide))
        w_u, b_u = weights.w_u, weights.b_u
        if tokens is not None:  # of these columns alone
            w_u, b_u = w_u[:, tokens.flatten()], None if b_u is None else b_u[tokens.flatten()]
            columns = torch.arange(tokens.numel(), device=tokens.device).view_as(tokens)
            reads = LogitsRead(columns, reads.answers, reads.wrong)
        final = {"w_u": w_u.to(wide), "b_u": widened(b_u, wide), "ln_final": widened(weights.ln_final, wide)}
        model = replace(model, weights=replace(weights, layers=layers, **final), stream=None)
        saved = [stage.of(lambda x: x.to(wide)) for stage in saved]
        layer = LastLayer(model, batch, metric, reads, reference, saved, out.to(wide), widened(past, wide), clean)
        return replace(layer, clean=layer.values(layer.out[None])[0])

    @property
    def read(self) -> Tensor:
        """The positions that are read, on the layer's device."""
        return on(self.batch.read, self.out.device)

    def effects(self, store: Store, receivers: Sequence[int]) -> Iterator[Block]:
        """The effects of all edges into some receivers of the layer or the logits."""
        graph, stages, wanted = self.model.graph, self._stages(), set(receivers)
        if graph.logits in wanted:
            yield graph.logits, self._through(store, graph.logits, len(stages))
        for number, stage in enumerate(stages):
            mlp = stage.mlp
            if mlp is not None and mlp.receivers.start in wanted:
                yield mlp.receivers.start, self._through(store, mlp.receivers.start, number)
            if stage.attention is not None:
                yield from self._heads(store, stage.attention, number, wanted)

    def _through(self, store: Store, receiver: int, number: int) -> Tensor:
        """[B, S'] where the MLP of the layer's stage `number` alone reads other streams, or behind it the logits."""
        count, stages = self.model.graph.senders_before(receiver), self._stages()
        effects = []
        for senders, part in store.deltas(True, count, self._copies(self.out.shape[1]), self.out.device):
            some = unrounded(store, senders, part, True).to(self.out.dtype)
            change = some
            if number < len(stages):
                place, saved = stages[number].mlp, self.saved[number].mlp
                assert place is not None and saved is not None
                stream, mlp = saved.norm_in.x, place.component
                change = mlp.forward((stream + some).flatten(0, 1)).sent.view_as(some) - mlp.forward(stream).sent
            effects.append(self._effect(number, some, change))
        return torch.cat(effects).T

    def _heads(self, store: Store, place: Place[Attention], number: int, wanted: set[int]) -> Iterator[Block]:
        """The same of a stage's heads, whose q, k or v alone reads other streams."""
        attention, first, saved = place.component, place.receivers.start, self.saved[number].attention
        assert saved is not None
        run = attention.behind_post(saved, attention.mix(saved.q, saved.kv, self.past, self.read))
        count = self.model.graph.senders_before(first)
        behind = _Behind.of(attention, self._stages()[number + 1 :], self.saved[number + 1 :])
        for kind, channels in enumerate(attention.channels):
            mine = [channel for channel in range(channels.start, channels.stop) if first + channel in wanted]
            found: dict[int, list[Tensor]] = {channel: [] for channel in mine}
            short = kind == 0 and not attention.joint
            at_once = self._copies(self.out.shape[1] if short else saved.kv.shape[1])
            for senders, part in store.deltas(kind == 0, count, at_once, self.out.device) if mine else ():
                some = unrounded(store, senders, part, kind == 0).to(self.out.dtype)
                for channel, z in self._mixtures(attention, run, kind, mine, some):
                    heads = attention.moved_by(channel)
                    change = sent_otherwise(attention, run, slice(heads.start, heads.stop), z, None)
                    sent = None
                    if behind is not None and len(heads) * z.shape[-1] < self.out.shape[-1]:
                        sent = behind.sent(heads, z - run.z[:, :, heads.start : heads.stop], change)
                    found[channel].append(self._effect(number, some, change, sent))
            yield from ((first + channel, torch.cat(effects).T) for channel, effects in found.items())

    def _mixtures(
        self, attention: Attention, run: AttentionRun, kind: int, channels: list[int], delta: Tensor
    ) -> Iterator[tuple[int, Tensor]]:
        """For each of some q (kind 0), k (1) or v (2) channels the mixtures [C, B, Q, h, K] of the heads that it moves
        where it reads C other streams."""
        read, saved = self.read, run.saved
        heads, kv, copies = attention.n_heads, attention.n_kv, len(delta)
        stream = saved.norm_in.at(read).x if kind == 0 else saved.norm_in.x
        n, _ = attention.norm.forward((stream + delta).flatten(0, 1))
        if attention.joint:  # each channel moves the others' norm
            q = spread(saved.q, read, saved.kv.shape[1])
            full = AttentionSaved(saved.norm_in, (q, saved.kv), saved.n_heads)
            for channel in channels:
                yield channel, patched(attention, channel, n.unflatten(0, delta.shape[:2]), full, self.past, read)
            return
        first, size = (0, heads) if kind == 0 else (heads + (kind - 1) * kv, kv)
        changed = attention.project(n, slice(first, first + size)).unflatten(0, delta.shape[:2])  # [C, B, ., ., K]
        if kind == 0:  # the copies are more queries of the same keys
            q = changed.transpose(0, 1).flatten(1, 2)  # [B, C·Q, H, K]
            z = attention.mix(q, saved.kv, self.past, read.repeat(1, copies))
            z = z.unflatten(1, (copies, -1)).transpose(0, 1)  # [C, B, Q, H, K]
        else:
            k, v = saved.kv.expand(copies, *saved.kv.shape).split(kv, 3)
            both = torch.cat([changed, v] if kind == 1 else [k, changed], 3).flatten(0, 1)
            q = saved.q.expand(copies, *saved.q.shape).flatten(0, 1)
            z = attention.mix(q, both, self.past, read.repeat(copies, 1)).unflatten(0, delta.shape[:2])
        for channel in channels:
            behind = attention.behind(channel)
            yield channel, z[..., behind.start : behind.stop, :]

    def _effect(self, number: int, delta: Tensor, change: Tensor, sent: Tensor | None = None) -> Tensor:
        """[C, B] the metric's change where other C·[B, Q, D] are added behind the layer's stage `number`, exactly 0
        where nothing in delta, C·[B, ., D], moves what is read; sent: what the MLP of the next one makes of it, where
        that is known."""
        behind = self._stages()[number + 1 :]
        x = change + (self.saved[number + 1].stream if behind else self.out)
        for stage in behind:
            assert stage.mlp is not None
            x = x + (stage.mlp.component.forward(x.flatten(0, 1)).sent.view_as(x) if sent is None else sent)
        effect = self.values(x) - self.clean
        return effect.where(on(delta.flatten(2).any(-1), effect.device), 0.0)

    def values(self, x: Tensor) -> Tensor:
        """[C, B] the metric of last residual streams [C, B, Q, D]."""
        rows = x.flatten(0, 1)
        stream = rows[:, 0] if self.batch.positions is None else rows
        logits = unembed(self.model, stream, self.reads.tokens)[0].double().unflatten(0, x.shape[:2])
        return values_of(self.metric, logits, self.reference)

    def _stages(self) -> list[Stage]:
        return [stage for stage in self.model.stages if stage.last]

    def _copies(self, tokens: int) -> int:
        """How many copies of the batch run together, of so many tokens each."""
        rows = len(self.batch.pairs)
        useful = limits.limits(self.model.device).copy_tokens // (rows * tokens)
        tokens_read = self.reads.tokens
        logits = rows * self.model.config.n_logits * self.out.shape[1] if tokens_read is None else tokens_read.numel()
        return max(1, min(useful, limits.LOGITS // logits))


class _Behind:
    """The MLP that alone reads what heads of its layer add, from what a few heads mix otherwise.

    With W′ = (1 − 11ᵀ/D) diag(γ) W_in, a the hidden units before the activation function and σ that of the norm's input
    x, and σ_s that of x + Δz W_O,

        a_s = offset + (a − offset) σ/σ_s + Δz (W_O W′)/σ_s        offset = b_in + W_inᵀβ

    (RMSNorm without the mean), so that K·M products take the place of D·M.
    """

    def __init__(self, attention: Attention, mlp: Mlp, stream: Tensor) -> None:
        """stream: what the MLP reads in the clean run, [B, Q, D]."""
        self.mlp, self.stream, norm = mlp, stream, mlp.norm
        clean, w_o = mlp.read(stream), attention.w_o.flatten(0, 1)
        self.rstd = clean.norm_in.rstd
        self.through, self.offsets, self.moved = [], [], []  # of the hidden units, and of what gates them
        for w, bias, made in ((mlp.w_in, mlp.b_in, clean.hidden), (mlp.w_up, mlp.b_up, clean.up)):
            if w is None or made is None:
                continue
            read = w if norm.kind == "none" else norm.frozen_weight(w[None])[0]
            self.through.append(product(w_o, read).unflatten(0, attention.w_o.shape[:2]))  # [H, K, M]
            offset = w.new_zeros(w.shape[1]) if norm.beta is None else norm.beta @ w
            self.offsets.append(offset if bias is None else offset + bias)
            moved = made - self.offsets[-1]
            self.moved.append(moved if self.rstd is None else moved / self.rstd)

    @staticmethod
    def of(attention: Attention, stages: Sequence[Stage], saved: Sequence[StageSaved]) -> _Behind | None:
        """None where what heads add goes elsewhere, or not as it is."""
        if len(stages) != 1 or (mlp := stages[0].mlp) is None or attention.post.kind != "none":
            return None
        return None if mlp.component.post.kind != "none" else _Behind(attention, mlp.component, saved[0].stream)

    def sent(self, heads: range, dz: Tensor, change: Tensor) -> Tensor:
        """What the MLP sends, [C, B, Q, D], where heads mix dz [C, B, Q, h, K] more, which adds `change`."""
        size = max(
            1, limits.limits(change.device).exact_numbers // (dz[0].shape[0] * dz[0].shape[1] * self.mlp.w_out.shape[0])
        )
        return torch.cat([self._sent(heads, *part) for part in zip(dz.split(size), change.split(size), strict=True)])

    def _sent(self, heads: range, dz: Tensor, change: Tensor) -> Tensor:
        scale = None if self.rstd is None else self.mlp.norm.rstd(self.stream + change)
        dz, made = dz.flatten(3).to(change.dtype), []
        for w, offset, moved in zip(self.through, self.offsets, self.moved, strict=True):
            hidden = product(dz, w[heads.start : heads.stop].flatten(0, 1)).add_(moved)
            made.append((hidden if scale is None else hidden.mul_(scale)).add_(offset))
        units = self.mlp.units(MlpSaved(NormInput(self.stream), made[0], made[1] if len(made) > 1 else None))
        return product(units, self.mlp.w_out, self.mlp.b_out)


def widened(value: Any, dtype: torch.dtype) -> Any:
    """A component, or a tuple of them, with all its tensors in another dtype."""
    if isinstance(value, Tensor):
        return value.to(dtype)
    if isinstance(value, tuple):
        return tuple(widened(part, dtype) for part in value)
    if isinstance(value, Attention | Mlp | Norm):
        return replace(value, **{f.name: widened(getattr(value, f.name), dtype) for f in fields(value)})
    return value
