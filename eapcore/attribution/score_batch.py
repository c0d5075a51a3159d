"""One batch, scored: the clean and the corrupt forward, and one backward pass after another."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Protocol

import torch
from torch import Tensor

from eapcore.attribution.exact_edges import Block, LastLayer
from eapcore.attribution.methods import Pass, Passes
from eapcore.attribution.sums import Store, Sums
from eapcore.execution.ablation import Values
from eapcore.execution.batch import Batch
from eapcore.models.attention import AttentionSaved
from eapcore.models.backward import logits_grad
from eapcore.models.backward_rules import Rules
from eapcore.models.forward import StageRun, StageSaved, embed, embed_tokens, run_stages, unembed, with_positions
from eapcore.models.mlp import Mlp
from eapcore.models.model import Model
from eapcore.models.norm import NormInput
from eapcore.models.paired import makes_differences, run_paired
from eapcore.models.tensors import accumulate_dtype, at_positions, on
from eapcore.tasks.metrics import Metric, MetricBatch, check_apart, evaluate


@dataclass(frozen=True, slots=True)
class Both:
    """What each stage made of a batch's clean and of its corrupt prompts, at all positions that run, and each layer's k
    and v heads of the tokens before."""

    clean: Sequence[StageRun]
    corrupt: Sequence[StageRun]
    past: list[Annotated[Tensor, "B P 2G K"]] | None


class Runs(Protocol):
    """Makes a task's clean and corrupt runs in the place of `score_batch`, for what goes on from them."""

    def wanted(self) -> bool:
        """Whether it makes them, where the work begins; another process that goes on with it does the same."""

    def begin(self, wanted: bool, lanes: int, groups: Mapping[int, list[list[int]]]) -> None:
        """What was settled: whether runs are wanted, how many lanes share the pairs, and of this process's which of
        them go together."""

    def __call__(self, batch: Batch) -> Both | None:
        """A batch's runs, in a wide dtype; None where they are not wanted."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What a batch gives besides scores: the metric on the clean and corrupt runs [2, B], max |∂metric/∂logits|."""

    values: Tensor
    largest: Tensor


@dataclass(frozen=True, slots=True)
class _Run:
    """A forward run: what its stages saved, the last residual stream [B, Q, D], and its logits where they were made."""

    saved: list[StageSaved]
    out: Tensor
    unembedded: tuple[Tensor, NormInput] | None = None


@torch.no_grad()
def score_batch(
    model: Model,
    batch: Batch,
    metric: Metric,
    store: Store,
    sums: Sums,
    plan: Passes,
    groups: Sequence[int],
    *,
    values: Values | None = None,
    units: bool = False,
    check: str | None = None,
    runs: Runs | None = None,
) -> Measured:
    """Add a batch's scores to sums.

    Args:
        model, batch, metric: what is scored.
        store: empty, for the differences.
        sums: what the scores are added to.
        plan: the backward passes of a method.
        groups: how many of them, in order, run as one batch.
        values: what senders send when they are ablated; None for what the corrupt prompts make them send.
        units: give the store the differences of the MLPs' hidden units as well.
        check: the metric's name, where its pairs are to be checked not to hang on each other.
        runs: gives the clean and the corrupt forward; where there are none, or none are wanted, they are made here.
    """
    read, pairs = batch.read, batch.pairs
    # Of half precision the rounding of the residual stream is the largest part of the scores' error, so it is float32.
    wide = accumulate_dtype(model.dtype)
    window = slice(batch.start, batch.stop)
    of_tokens = embed_tokens(model, torch.cat([pairs.clean[:, window], pairs.corrupt[:, window]]))
    both = with_positions(model, of_tokens, batch.start, wide)  # [2·B, T, D]
    start = dict(zip((1.0, 0.0), both.tensor_split(2), strict=True))
    patched = plan.exact != () or any(step.exact_softmax for step in plan.passes)
    ablated = _set_embed(batch, of_tokens, start, values, store, unrounded=patched and wide != model.dtype)
    del of_tokens
    passes, origins = plan.passes, plan.origins
    kept: dict[float, list[StageSaved]] = {origin: [] for origin in origins if origin is not None}

    def moved(index: int, z: Tensor) -> Tensor | None:
        at_read = model.graph.is_last(index)
        dz = _difference(batch, z, None if values is None else values.z[index], at_read)
        store.set_heads(index, dz.to(model.dtype))
        return store.moved(f"a{index}") if values is None else None

    halves = {1.0: slice(0, len(pairs)), 0.0: slice(len(pairs), None)}
    # Where the run makes the differences, it keeps what is wanted apart from the rest.
    differences = _Differences(store) if values is None and makes_differences(model) else None
    keep = 1.0 in kept or plan.exact != (), 0.0 in kept

    def held(x: Tensor) -> Tensor:
        return x.clone() if differences is None else x  # a view would keep all that the stage made alive

    pasts: list[Tensor] = []
    last: list[StageSaved] = []  # of the clean run
    out = read.new_empty(0)
    made = None if runs is None else runs(batch)
    if made is not None:
        pasts = made.past or []
        out = torch.cat([at_positions(side[-1].out, read) for side in (made.clean, made.corrupt)])
        _set_differences(made, read, store)
        for alpha, side in ((1.0, made.clean), (0.0, made.corrupt)):
            if alpha in kept:
                kept[alpha] = [_saved(run, read) for run in side]
        last = [_saved(run, read) for run in made.clean if run.stage.last] if plan.exact else []
    shared = embed(model, pairs.clean[:, : batch.start], dtype=wide)
    paired = run_paired(model, shared, both, read, moved, differences, keep)
    for _ in model.stages if made is None else ():  # enumerate would hold each stage's run while the next is made
        run, before = next(paired)
        if before is not None:
            pasts.append(held(before))
        if differences is None or run.stage.index not in differences.placed:
            _set_mlp(batch, run, values, units, store)
        if store.channels and run.attention is not None:
            _set_channels(run, values, store)
        for alpha, rows in halves.items():
            if alpha in kept:
                kept[alpha].append(run.saved.of(lambda x, rows=rows: held(x[rows])))  # type: ignore[misc]
        if plan.exact and run.stage.last:
            clean = slice(0, len(pairs))
            last.append(kept[1.0][-1] if 1.0 in kept else run.saved.of(lambda x, rows=clean: held(x[rows])))  # type: ignore[misc]
        out = run.out
        del run, before  # before the next stage runs, and before the gradients are made
    del shared, paired, made, both
    past = pasts or None

    reads = batch.logits_read(metric, model.config.n_logits)  # the metric reads no other logits
    # Of both runs at once: reading w_u is what takes time.
    all_logits, norm_in = unembed(model, out[:, 0] if batch.positions is None else out, reads.tokens)
    ends = {
        alpha: _Run(kept.get(alpha, []), out[rows], (all_logits[rows], norm_in.of(operator.itemgetter(rows))))
        for alpha, rows in halves.items()
    }
    logits = {alpha: all_logits[rows].double() for alpha, rows in halves.items()}
    clean_out = out[halves[1.0]]  # where the last layer lies
    del out, all_logits, norm_in
    reference = MetricBatch(reads.answers, reads.wrong, logits[1.0], logits[0.0], batch.index)
    if check is not None:
        check_apart(check, metric, logits[1.0], reference)
    measured = torch.stack([evaluate(metric, logits[alpha], reference).double() for alpha in (1.0, 0.0)])
    largest = torch.zeros((), dtype=torch.float64, device=model.device)
    exact: list[Block] = []
    if plan.exact:
        here = None if past is None else past[-1]
        layer = LastLayer.of(model, batch, metric, reads, reference, last, clean_out, here, measured[0])
        exact = list(layer.effects(store, plan.exact))
        del layer
    del last, clean_out
    done = 0
    for count in groups:
        steps, origin = passes[done : done + count], origins[done]
        done += count
        step = steps[0]
        if origin is None:
            x = torch.cat([torch.lerp(ablated, start[1.0], each.alpha) for each in steps])
            at = _run(model, x, 0, past, read.repeat(count, 1))
            del x
        else:
            # The backward pass frees what it has passed, unless a later pass starts from the same run.
            again = origin in origins[done:]
            at = replace(ends[origin], saved=list(ends[origin].saved)) if again else ends.pop(origin)
        if step.component != "embed":
            at = _interpolated(model, at, step, store.moved(step.component), past, read)
        stream = at.out[:, 0] if batch.positions is None else at.out
        unembedded = at.unembedded or unembed(model, stream, reads.tokens)
        weights = [each.weight for each in steps] if count > 1 else [1.0]  # one alone is weighted with its scores
        size, grad = metric_grad(model, *unembedded, metric, reference, step.rules, weights, reads.tokens)
        largest = torch.maximum(largest, size)
        at = replace(at, unembedded=None)
        del unembedded, stream
        if done == len(passes):  # the logits are large where the vocabulary is
            ends.clear()
            del reference, logits
        grad = grad[:, None] if batch.positions is None else grad
        sums.spread = step.spread / step.weight if step.spread else 0.0
        store.contract(sums, at.saved, grad, past, step if count == 1 else replace(step, weight=1.0))
        if plan.apart(done):
            _end_pass(model, sums, exact, step.rules.cut)
        del at, grad  # which would still be there while the next pass makes its own
    return Measured(measured, largest)


def _set_differences(made: Both, read: Tensor, store: Store) -> None:
    """Give the store Δ of what the senders send."""
    for here, there in zip(made.clean, made.corrupt, strict=True):
        at = read if here.stage.last else None
        if here.attention is not None and there.attention is not None:
            store.set_heads(here.stage.index, at_positions(there.attention.z, at) - at_positions(here.attention.z, at))
        if here.mlp is not None and there.mlp is not None:
            delta = at_positions(there.mlp.sent, at) - at_positions(here.mlp.sent, at)
            store.set_mlp(here.stage.index, delta, None)


def _saved(run: StageRun, read: Tensor) -> StageSaved:
    """What a run at all positions saved, in the last layer as one that is wanted where the metric reads alone."""
    if not run.stage.last:
        return run.saved
    attention, mlp = run.saved.attention, run.saved.mlp
    if attention is not None:
        post_in = None if attention.post_in is None else attention.post_in.at(read)
        qkv = at_positions(attention.q, read), attention.kv
        attention = AttentionSaved(attention.norm_in, qkv, attention.n_heads, post_in)
    return StageSaved(attention, None if mlp is None else mlp.of(lambda x: at_positions(x, read)))


class _Differences:
    """Hands what a run makes of differences to a store; placed: the layers whose MLP's went there without `set_mlp`."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.placed: set[int] = set()

    def heads(self, index: int, dz: Tensor) -> None:
        self.store.set_heads(index, dz)

    def mlp(self, index: int) -> Tensor | None:
        room = self.store.mlp_room(index)
        if room is not None:
            self.placed.add(index)
        return room


def _end_pass(model: Model, sums: Sums, exact: list[Block], cut: frozenset[str]) -> None:
    """Put the exact effects in place of estimates, where no gradient is dropped, and end what belongs together."""
    graph = model.graph
    names = ["embed", *(name.split(".")[0] for name in graph.sender_names[1:])]
    dropped = {s for s, name in enumerate(names) if name in cut} if cut else set()
    for receiver, effects in exact:
        if dropped.isdisjoint(graph.senders_behind(receiver)):
            place = (slice(0, effects.shape[1]), receiver)
            sums.replace("scores", effects, place)
            if "spread" in sums.scores:
                sums.replace("spread", torch.zeros_like(effects), place)
    keep = None
    if dropped and sums.by_sender:  # made of nothing of the host's, which a recording could not copy again
        keep, at = torch.ones(graph.n_senders, dtype=torch.bool, device=sums.read.device), 0
        for name, senders in itertools.groupby(names):
            behind = at + sum(1 for _ in senders)
            if name in cut:
                keep[at:behind].fill_(False)
            at = behind
    sums.end_pass(keep)


def _set_embed(
    batch: Batch,
    of_tokens: Tensor,
    start: dict[float, Tensor],
    values: Values | None,
    store: Store,
    *,
    unrounded: bool,
) -> Tensor:
    """Give the store Δ of the embedding, and return what is embedded where it is ablated: [B, T, D].

    of_tokens: [2·B, T, D], the part of the clean and then the corrupt prompts that depends on their tokens. unrounded:
    also Δ as it is before it is rounded.
    """
    clean, corrupt = of_tokens.tensor_split(2)
    wide = start[1.0].dtype
    if values is None:
        store.set_embed(corrupt, clean)  # of the tokens alone: their positions are the same
        store.embedded = corrupt.to(wide) - clean.to(wide) if unrounded else None
        return start[0.0]
    ablated = Values.at(values.embed, batch.stop, None).to(wide).expand_as(start[1.0])
    replaced = clean if values.of_tokens else start[1.0]
    store.set_embed(ablated, replaced)
    store.embedded = ablated - replaced.to(wide) if unrounded else None
    return start[1.0] + (ablated - replaced) if values.of_tokens else ablated


def _difference(batch: Batch, both: Tensor, ablated: Tensor | None, at_read: bool) -> Tensor:
    """Δ [B, Q, ..] of what clean and then corrupt prompts made, [2·B, Q, ..], or of what is put in its place."""
    clean, corrupt = both.tensor_split(2)
    if ablated is not None:
        corrupt = on(Values.at(ablated, batch.stop, batch.read if at_read else None), both.device)
    return corrupt - clean


def _set_mlp(batch: Batch, run: StageRun, values: Values | None, units: bool, store: Store) -> None:
    """Give the store Δ of what a stage's MLP sends, and of its hidden units if they are wanted."""
    if run.stage.mlp is None or run.mlp is None:
        return
    index, at_read, mlp = run.stage.index, run.stage.last, run.stage.mlp.component
    if values is None:
        delta = run.mlp.sent.tensor_split(2)[1]
    else:
        delta = _difference(batch, run.mlp.sent, values.mlp[index] if values.mlp is not None else None, at_read)
    store.set_mlp(index, delta, _units(mlp, batch, run, values) if units else None)


def _set_channels(run: StageRun, values: Values | None, store: Store) -> None:
    """Give the store Δ of a stage's q, k and v: those of the corrupt prompts, or zeros, in place of the clean ones'."""
    assert run.attention is not None
    moved = []
    for both in (run.attention.saved.q, run.attention.saved.kv):
        clean, corrupt = both.tensor_split(2)
        moved.append(corrupt - clean if values is None else -clean)
    store.set_channels(run.stage.index, *moved)


def _units(mlp: Mlp, batch: Batch, run: StageRun, values: Values | None) -> Tensor:
    """Δ of a stage's hidden units, [B, Q, M]."""
    assert run.mlp is not None
    dtype = run.mlp.saved.hidden.dtype
    made = mlp.units(run.mlp.saved, accumulate_dtype(dtype))
    ablated = None if values is None or values.units is None else values.units[run.stage.index]
    return _difference(batch, made, ablated, run.stage.last).to(dtype)


def _run(model: Model, x: Tensor, first: int, past: list[Tensor] | None, read: Tensor) -> _Run:
    """Run the stages from `first` on; x itself where none is left."""
    saved = []
    for run in run_stages(model, x, first=first, past=past, read=read):
        saved.append(run.saved)
        x = run.out
    return _Run(saved, x)


def _interpolated(
    model: Model, clean: _Run, step: Pass, moved: Tensor, past: list[Tensor] | None, read: Tensor
) -> _Run:
    """The clean run with one component's output at clean + (1 − α) Δ, and everything behind it as it follows.

    moved: Δ of the component, [B, T, D], in the last layer [B, Q, D].
    """
    names = [{place.name for place in (stage.attention, stage.mlp) if place is not None} for stage in model.stages]
    behind = 1 + next(i for i, found in enumerate(names) if step.component in found)
    stream = (clean.out if behind == len(clean.saved) else clean.saved[behind].stream).to(clean.out.dtype)
    after = _run(model, stream + (1 - step.alpha) * on(moved, stream.device), behind, past, read)
    return _Run([*clean.saved[:behind], *after.saved], after.out)


def metric_grad(
    model: Model,
    logits: Tensor,
    norm_in: NormInput,
    metric: Metric,
    reference: MetricBatch,
    rules: Rules,
    weights: Sequence[float] = (1.0,),
    tokens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """max |∂(Σ metric)/∂logits|, and ∂(Σ weight · metric)/∂x [n·B, D], from the logits [n·B, V] of the last stream x.

    weights: one for each of the n runs of the batch that follow each other. tokens: [B, V'], whose logits these are.
    """
    with torch.enable_grad():
        leaf = logits.detach().to(torch.float64, copy=True).requires_grad_()
        values = torch.cat([evaluate(metric, part, reference) for part in leaf.chunk(len(weights))])
        found = torch.autograd.grad(values.sum(), leaf, allow_unused=True)[0] if values.requires_grad else None
        if found is None:
            raise ValueError("the metric has no gradient: it must be computed from the logits with torch operations")
        d_logits = found
    largest = d_logits.abs().max()
    if (cap := model.config.logits_softcap) is not None:
        d_logits = d_logits * (1 - (leaf.detach() / cap) ** 2)
    if len(weights) > 1:
        for part, weight in zip(d_logits.chunk(len(weights)), weights, strict=True):
            part *= weight
    return largest, logits_grad(model, d_logits, norm_in, rules, tokens)
