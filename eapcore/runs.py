"""Runs in which edges carry what another run made: the arithmetic of exact patching and of circuits.

Two ways through the model. `finish` goes on from one changed residual stream as the model does: every later component
reads everything. `run_masked` lets every receiver read its own choice of senders. Both start from what a batch's runs
share and make many copies of it in one forward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from eapcore import planner
from eapcore.ablation import find_values
from eapcore.attribution import Progress, Task, as_pairs, check_finite, check_pairs, describe
from eapcore.graph import Graph
from eapcore.metrics import METRICS, Metric, MetricBatch, evaluate, find_metric, tokens_read
from eapcore.model import (
    LayerRun,
    Model,
    accumulate_dtype,
    at_positions,
    attend,
    attention_output,
    channel_groups,
    embed,
    future,
    head_outputs,
    mixtures,
    normalise,
    prefix,
    project,
    run_layer,
    run_layers,
    run_mlp,
    unembed,
)
from eapcore.products import product
from eapcore.tasks import PromptPairs

# Tokens of all copies of a batch that go through a layer together: more leave the cache of a CPU and gain nothing.
_TOKENS = {"cpu": 4096, "cuda": 131072}
# Multiply-adds of one [tokens, D] × [D, D] product of all copies, with which a batch is worth its own launches.
_WORK = {"cpu": 1 << 31, "cuda": 1 << 36}
_LOGITS = 1 << 24  # logits, in float64, that are held at once
_EVALUATED = 1 << 18  # of which a metric is made at once
_SHARE = 0.25  # of the free memory that the copies' senders may take


class Count:
    """Calls progress, where there is one, with how much of all is done."""

    def __init__(self, progress: Progress | None, total: int, done: int = 0) -> None:
        self.progress, self.total, self.done = progress, total, done

    def add(self, more: int) -> None:
        self.done += more
        if self.progress is not None:
            self.progress(self.done, self.total)

    def stage(self, share: int) -> Progress | None:
        """The progress of a part of the work that counts by itself, `share` of what is counted here."""
        if self.progress is None:
            return None
        before = self.done

        def report(done: int, total: int) -> None:
            self.add(before + share * done // total - self.done)

        return report


@dataclass(frozen=True, slots=True)
class Question:
    """A model, prompt pairs, a metric and an ablation that have been checked to fit each other.

    other: what senders send when they are ablated, [S, 1, D] or for each position [S, T, D]; None is what they send on
    the corrupt prompts. ablation: what a file says of it. reference: the prompts of a mean, None for any other.
    """

    model: Model
    pairs: PromptPairs
    metric_name: str
    metric: Metric
    other: Tensor | None
    ablation: dict[str, Any]
    reference: PromptPairs | None = None

    @staticmethod
    def of(
        model: Model,
        task: Task,
        metric: str | Metric,
        ablation: str = "corrupt",
        reference: PromptPairs | None = None,
    ) -> Question:
        """ValueError where prompts, answers, metric or ablation do not fit."""
        pairs = as_pairs(task)
        check_pairs(model, pairs, ablation)
        other, described = ablated_senders(model, pairs, ablation, reference)
        if ablation.startswith("mean") and reference is None:
            reference = pairs
        return Question(model, pairs, *find_metric(metric, pairs.answers, pairs.wrong), other, described, reference)

    def batch_size(self, size: int | str) -> int:
        """Pairs a batch, for "auto" as many as are useful and fit; ValueError for what is neither."""
        if size == "auto":
            model, pairs = self.model, self.pairs
            useful = planner.batch_size(model.config, pairs, model.dtype, model.device)
            # The clean run's senders, the other run's, their difference, and what heads read of it: four buffers where
            # scoring has one.
            one = 4 * planner.dense_bytes(model.config, 1, int(pairs.lengths.max()), model.dtype)
            return max(1, min(useful, int(2 * _SHARE * planner.free_bytes(model.device) // one)))
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"batch_size must be 'auto' or a positive integer, got {size!r}")
        return size

    def batches(self, size: int, copies: int = 1, pairs: Tensor | None = None) -> Iterator[Batch]:
        """Those pairs, bool [N], or all of them, `groups` at a time."""
        yield from map(self.batch, self.groups(size, copies, pairs))

    def batch(self, index: Sequence[int]) -> Batch:
        """These pairs as one batch."""
        return make_batch(self.model, self.pairs, torch.tensor(index, device="cpu"), self.other, self.metric)

    def groups(self, size: int, copies: int = 1, pairs: Tensor | None = None) -> list[list[int]]:
        """Which pairs go together, of those, bool [N], or of all: pairs that share a long prefix.

        copies: about how many of a batch go through a layer. Where they alone make large matrix products, a batch ends
        before a pair whose tokens would make it run many positions for nothing.
        """
        first, stop = self.pairs.first_difference(), self.pairs.positions + 1
        if self.other is not None:  # which differs from the clean run everywhere
            first = torch.zeros_like(first)
        index = torch.arange(len(self.pairs), device="cpu") if pairs is None else pairs.nonzero().squeeze(1)
        enough = _WORK.get(self.model.device.type, 1 << 31) // (copies * self.model.config.d_model**2)
        numbers = index.tolist()
        groups = _groups(first[index].tolist(), stop[index].tolist(), size, enough)
        return [[numbers[i] for i in group] for group in groups]

    def values(self, logits: Tensor, batch: Batch) -> Tensor:
        """The metric on each copy of a batch, float64 [C, B], from its logits [C, B, V] or [C, B, n]."""
        if self.metric not in METRICS.values():  # a caller's own knows no copies
            return torch.stack([evaluate(self.metric, row, batch.reference).double() for row in logits])
        some = logits.split(max(1, _EVALUATED // logits[0].numel()))
        return torch.cat([evaluate(self.metric, part, batch.reference).double() for part in some])

    def ends(self, batch: Batch) -> Tensor:
        """The metric on the clean and on the corrupt run, float64 [2, B]; ValueError where it is not finite."""
        values = self.values(torch.stack([batch.reference.clean_logits, batch.reference.corrupt_logits]), batch)
        found = torch.zeros(2, len(self.pairs), dtype=torch.float64, device="cpu")
        found[:, batch.index] = values.cpu()
        check_finite(self.model, self.pairs, found)
        return values

    def mean(self, sums: Tensor) -> Tensor:
        """Sums of the metric over all pairs as means; ValueError where they are not finite."""
        if not bool(sums.isfinite().all()):
            raise ValueError(
                f"the metric {self.metric_name} is NaN or infinite on a patched run in {self.model.dtype}: use a wider "
                "dtype, or a metric that is finite there"
            )
        return sums / len(self.pairs)

    def describe(self) -> dict[str, Any]:
        """What a file says of the model, the task, the metric, and what ran."""
        return {**describe(self.model, self.pairs), "metric": {"name": self.metric_name}}


def _groups(first: list[int], stop: list[int], size: int, enough: int) -> list[list[int]]:
    """Which pairs go together, at most `size`, by the windows first to stop of their tokens.

    A group with enough tokens ends before a pair with which more than a tenth of what it runs would be no pair's.
    """
    groups: list[list[int]] = []
    useful = begin = end = 0
    for i in sorted(range(len(first)), key=lambda i: (first[i], stop[i])):
        mine, last = stop[i] - first[i], max(end, stop[i])
        if groups and len(groups[-1]) < size:
            padded = (len(groups[-1]) + 1) * (last - begin)
            if useful < enough or 10 * (useful + mine) >= 9 * padded:
                groups[-1].append(i)
                useful, end = useful + mine, last
                continue
        groups.append([i])
        useful, begin, end = mine, first[i], stop[i]
    return groups


@dataclass(frozen=True, slots=True)
class Run:
    """A run's residual streams, as its receivers read them, and what its senders send.

    attn_in, mlp_in: [B, T, D] for each layer, in front of it and behind its attention. out: [B, T, D] behind the last.
    senders: [S, B, T, D]. layers: what `run_layers` made; empty for an ablation that is no run.
    """

    attn_in: list[Tensor]
    mlp_in: list[Tensor]
    out: Tensor
    senders: Tensor
    layers: list[LayerRun]


def record(model: Model, x: Tensor, past: Sequence[Tensor] | None) -> Run:
    """Run the model from what `embed` made, x [B, T, D], and keep everything."""
    graph = model.graph
    senders = torch.empty(graph.n_senders, *x.shape, dtype=model.dtype, device=model.device)
    senders[0] = x
    layers = list(run_layers(model, x, past=past))
    for index, run in enumerate(layers):
        head_outputs(run.z, model.weights.layers[index].w_o, out=senders[graph.heads(index)])
        if run.mlp is not None:
            senders[graph.mlp(index)] = run.mlp
    mlp_in = [run.out if run.saved.mlp_in is None else run.saved.mlp_in.x for run in layers]
    return Run([run.saved.attn_in.x for run in layers], mlp_in, layers[-1].out, senders, layers)


def _sum_up(model: Model, senders: Tensor) -> Run:
    """The residual streams that senders [S, B, T, D] add up to."""
    graph, x = model.graph, senders[0]
    attn_in, mlp_in = [], []
    for index, layer in enumerate(model.weights.layers):
        attn_in.append(x)
        x = x + senders[graph.heads(index)].sum(0) + layer.b_o
        mlp_in.append(x)
        if graph.has_mlp:
            x = x + senders[graph.mlp(index)]
    return Run(attn_in, mlp_in, x, senders, [])


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch of pairs, its clean run, and what edges carry instead, at the positions that can differ and matter.

    pairs: on the model's device. index: int64 [B], which of the task's pairs. start: the first position of the window;
    clean and corrupt share the tokens before it, and `past` are their keys and values. clean: the clean run. other:
    what an ablated edge carries, a run only where it is the corrupt one. reference: what a metric may look at. tokens:
    int64 [B, n], those whose logits are made, and places among which the reference's answers are; None for all V.
    """

    pairs: PromptPairs
    index: Tensor
    start: int
    past: list[Tensor] | None
    clean: Run
    other: Run
    reference: MetricBatch
    tokens: Tensor | None = None

    @property
    def read(self) -> Tensor:
        """int64 [B, 1], the answer positions inside the window."""
        return self.pairs.positions[:, None] - self.start

    @property
    def shape(self) -> tuple[int, int]:
        """(B, T)."""
        return self.clean.out.shape[0], self.clean.out.shape[1]

    def copies(self, model: Model, *, at_read: bool = False, senders: int = 0) -> int:
        """How many copies of this batch go through the model together.

        at_read: they need only the answer positions. senders: how many each keeps of what it sends, [B, T, D].
        """
        rows, tokens = self.shape
        tokens = 1 if at_read else max(tokens, (self.start + tokens) // 4)  # the past is copied too, a layer at a time
        useful = _TOKENS.get(model.device.type, 4096) // (rows * tokens)
        if senders:
            size = senders * rows * tokens * model.config.d_model * model.dtype.itemsize
            useful = min(useful, int(_SHARE * planner.free_bytes(model.device) // size))
        logits = rows * model.config.d_vocab if self.tokens is None else self.tokens.numel()
        return max(1, min(useful, _LOGITS // logits))


@torch.no_grad()
def make_batch(
    model: Model, pairs: PromptPairs, index: Tensor, other: Tensor | None = None, metric: Metric | None = None
) -> Batch:
    """Run the clean and the corrupt prompts of some pairs; other as in `Question`.

    metric: what will be measured, where no other logits than it reads are needed.
    """
    batch = pairs.select(index).to(model.device)
    start = int(batch.first_difference().min()) if other is None else 0
    stop = int(batch.positions.max()) + 1
    past = prefix(model, batch.clean[:, :start])
    prompts = (batch.clean, batch.corrupt)
    runs = [record(model, embed(model, tokens[:, start:stop], start), past) for tokens in prompts]
    read = batch.positions[:, None] - start
    tokens, answers, wrong = None, batch.answers, batch.wrong
    found = None if metric is None else tokens_read(metric, answers, wrong, model.config.d_vocab)
    if found is not None:
        tokens, answers, wrong = found
    clean, corrupt = _logits(model, torch.stack([at_positions(run.out, read)[:, 0] for run in runs]), tokens)
    reference = MetricBatch(answers, wrong, clean, corrupt, index.to(model.device))
    if other is not None:
        runs[1] = _sum_up(model, other[:, None, :stop].expand_as(runs[0].senders))
    return Batch(batch, index, start, past, runs[0], runs[1], reference, tokens)


def _logits(model: Model, x: Tensor, tokens: Tensor | None) -> Tensor:
    """Logits float64 [C, B, V] from the last residual streams x [C, B, D], or of the tokens [B, n] alone [C, B, n]."""
    return unembed(model, x.flatten(0, 1), tokens)[0].double().unflatten(0, x.shape[:2])


def ablated_senders(
    model: Model, pairs: PromptPairs, ablation: str, reference: PromptPairs | None
) -> tuple[Tensor | None, dict[str, Any]]:
    """What senders send under an ablation, see `Question`, and what a file says of it."""
    values = find_values(model, pairs, ablation, reference)
    if values is None:
        return None, {"name": ablation}
    senders = [values.embed[None]]
    for index, layer in enumerate(model.weights.layers):
        senders.append(torch.einsum("thk,hkd->htd", values.z[index], layer.w_o))
        if values.mlp is not None:
            senders.append(values.mlp[index][None])
    return torch.cat(senders), dict(values.meta)


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


def needed(graph: Graph, mask: Tensor) -> Tensor:
    """bool [S], the senders with a path to the logits in mask [S, R]."""
    to_logits = torch.zeros(graph.n_senders, dtype=torch.bool, device="cpu")
    for r in reversed(range(graph.n_receivers)):
        component = graph.component(r)
        if component is None or bool(to_logits[component]):
            to_logits |= mask[:, r]
    return to_logits


def reached(graph: Graph, mask: Tensor, origins: Tensor) -> Tensor:
    """bool [S], the senders with a path from one of the origins, bool [S], in mask [S, R]; the origins among them."""
    found = origins.clone()
    for r in range(graph.n_receivers - 1):
        component = graph.component(r)
        if component is not None and bool((mask[:, r] & found).any()):
            found[component] = True
    return found


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
