"""One window, scored: the clean and the corrupt forward, and one backward pass after another."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from eapcore.attribution.methods import Pass
from eapcore.attribution.plan import Passes, steps_together
from eapcore.attribution.sums import Store, Sums
from eapcore.execution.ablation import Values
from eapcore.execution.batch import Window
from eapcore.models.activations import LayerRun, LayerSaved, NormInput, accumulate_dtype
from eapcore.models.backward import logits_grad
from eapcore.models.backward_rules import Rules
from eapcore.models.forward import embed, run_layers, unembed
from eapcore.models.mlp import activation, run_mlp
from eapcore.models.model import Model
from eapcore.models.norm import normalise
from eapcore.models.paired import run_paired
from eapcore.tasks.metrics import Metric, MetricBatch, evaluate, tokens_read


@dataclass(frozen=True, slots=True)
class Step:
    """What a batch gives besides scores: the metric on the clean and corrupt runs [2, B], max |∂metric/∂logits|."""

    values: Tensor
    largest: Tensor


@dataclass(frozen=True, slots=True)
class _Run:
    """A forward run: what its layers saved, the last residual stream [B, Q, D], and its logits where they were made."""

    saved: list[LayerSaved]
    out: Tensor
    unembedded: tuple[Tensor, NormInput] | None = None


@torch.no_grad()
def score_window(
    model: Model,
    window: Window,
    metric: Metric,
    store: Store,
    sums: Sums,
    passes: Sequence[Pass],
    planned: Passes,
    budget: int,
    *,
    values: Values | None = None,
    units: bool = False,
) -> Step:
    """Add a window's scores to sums.

    Args:
        model, window, metric: what is scored.
        store: empty, for the differences.
        sums: what the scores are added to.
        passes: the backward passes of a method.
        planned, budget: what the planner knows of them, and the bytes that those which run together may take.
        values: what senders send when they are ablated; None for what the corrupt prompts make them send.
        units: give the store the differences of the MLPs' hidden units as well.
    """
    read, pairs = window.read, window.pairs
    start = {1.0: window.embed(model, pairs.clean), 0.0: window.embed(model, pairs.corrupt)}
    if values is None:
        ablated, w_e = start[0.0], model.weights.w_e
        corrupt, clean = (w_e[prompts[:, window.start : window.stop]] for prompts in (pairs.corrupt, pairs.clean))
        store.set_embed(corrupt - clean)  # of the tokens alone: their positions are the same
        del corrupt, clean
    else:
        ablated = Values.at(values.embed, window.stop, None).expand_as(start[1.0])
        store.set_embed(ablated - start[1.0])
    origins = planned.origins
    kept: dict[float, list[LayerSaved]] = {origin: [] for origin in origins if origin is not None}

    def moved(index: int, z: Tensor) -> Tensor | None:
        dz = _difference(window, z, None if values is None else values.z[index], index == last)
        store.set_heads(index, dz.to(model.dtype))
        return store.moved(f"a{index}") if values is None else None

    halves = {1.0: slice(0, len(pairs)), 0.0: slice(len(pairs), None)}
    last = model.config.n_layers - 1
    pasts: list[Tensor] = []
    out = read.new_empty(0)
    shared = embed(model, pairs.clean[:, : window.start])
    runs = run_paired(model, shared, start[1.0], start[0.0], read, moved)
    for index in range(model.config.n_layers):  # enumerate would hold each layer's run while the next is made
        run, before = next(runs)
        if before is not None:
            pasts.append(before.clone())  # a view would keep all that the layer made alive
        _set_mlp(model, index, window, run, values, units, store)
        for alpha, rows in halves.items():
            if alpha in kept:
                kept[alpha].append(run.saved.copy(rows))
        out = run.out
        del run, before  # before the next layer runs, and before the gradients are made
    del shared, runs
    past = pasts or None

    tokens, answers, wrong = None, pairs.answers, pairs.wrong
    if (found := tokens_read(metric, answers, wrong, model.config.d_vocab)) is not None:
        tokens, answers, wrong = found  # the metric reads no other logits
    all_logits, norm_in = unembed(model, out[:, 0], tokens)  # of both runs at once: reading w_u is what takes time
    ends = {
        alpha: _Run(kept.get(alpha, []), out[rows], (all_logits[rows], norm_in.of(operator.itemgetter(rows))))
        for alpha, rows in halves.items()
    }
    logits = {alpha: all_logits[rows].double() for alpha, rows in halves.items()}
    del out, all_logits, norm_in, found
    reference = MetricBatch(answers, wrong, logits[1.0], logits[0.0], window.index)
    measured = torch.stack([evaluate(metric, logits[alpha], reference).double() for alpha in (1.0, 0.0)])
    largest = torch.zeros((), dtype=torch.float64, device=model.device)
    done, sizes = 0, _together(model, window, store, planned, budget)
    for count in sizes:
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
        unembedded = at.unembedded or unembed(model, at.out[:, 0], tokens)
        weights = [each.weight for each in steps] if count > 1 else [1.0]  # one alone is weighted with its scores
        size, grad = metric_grad(model, *unembedded, metric, reference, step.rules, weights, tokens)
        largest = torch.maximum(largest, size)
        at = replace(at, unembedded=None)
        del unembedded
        if done == len(passes):  # the logits are large where the vocabulary is
            ends.clear()
            del reference, logits
        store.contract(sums, at.saved, grad[:, None], past, step if count == 1 else replace(step, weight=1.0))
        sums.end_pass()
        del at, grad  # which would still be there while the next pass makes its own
    return Step(measured, largest)


def _together(model: Model, window: Window, store: Store, planned: Passes, budget: int) -> Iterator[int]:
    """How many of the passes, in order, run as one batch: of those that make all of their activations."""
    done, where = 0, (model.dtype, model.device)
    while done < len(planned.origins):
        alike = planned.alike(done) if store.steps else 1
        count = steps_together(model.config, *window.shape, alike, *where, budget, planned)
        yield count
        done += count


def _difference(window: Window, both: Tensor, ablated: Tensor | None, at_read: bool) -> Tensor:
    """Δ [B, Q, ..] of what clean and then corrupt prompts made, [2·B, Q, ..], or of what is put in its place."""
    clean, corrupt = both.tensor_split(2)
    if ablated is not None:
        corrupt = Values.at(ablated, window.stop, window.read if at_read else None)
    return corrupt - clean


def _set_mlp(
    model: Model, index: int, window: Window, run: LayerRun, values: Values | None, units: bool, store: Store
) -> None:
    """Give the store Δ of what a layer's MLP sends, and of its hidden units if they are wanted."""
    hidden, act_fn = run.saved.hidden, model.config.act_fn
    if run.mlp is None or hidden is None or act_fn is None:
        return
    at_read = index == model.config.n_layers - 1
    if values is None:
        delta = run.mlp.tensor_split(2)[1]
    else:
        delta = _difference(window, run.mlp, values.mlp[index] if values.mlp is not None else None, at_read)
    delta_units = None
    if units:
        made = activation(act_fn, hidden.to(accumulate_dtype(hidden.dtype)))
        ablated = None if values is None or values.units is None else values.units[index]
        delta_units = _difference(window, made, ablated, at_read).to(hidden.dtype)
    store.set_mlp(index, delta, delta_units)


def _run(model: Model, x: Tensor, first: int, past: list[Tensor] | None, read: Tensor) -> _Run:
    """Run the layers from `first` on; x itself where none is left."""
    saved = []
    for run in run_layers(model, x, first=first, past=past, read=read):
        saved.append(run.saved)
        x = run.out
    return _Run(saved, x)


def _interpolated(
    model: Model, clean: _Run, step: Pass, moved: Tensor, past: list[Tensor] | None, read: Tensor
) -> _Run:
    """The clean run with one component's output at clean + (1 − α) Δ, and everything behind it as it follows.

    moved: Δ of the component, [B, T, D], in the last layer [B, Q, D].
    """
    index = int(step.component[1:])
    before, layer = clean.saved[:index], clean.saved[index]
    behind = clean.out if index + 1 == len(clean.saved) else clean.saved[index + 1].attn_in.x
    if step.component[0] == "a" and layer.mlp_in is not None:
        weights = model.weights.layers[index]
        middle = layer.mlp_in.x + (1 - step.alpha) * moved
        n, mlp_in = normalise(middle, weights.ln2, model.config.eps)
        mlp, hidden = run_mlp(model.config, weights, n)
        layer, x = replace(layer, mlp_in=mlp_in, hidden=hidden), middle + mlp
    else:
        x = behind + (1 - step.alpha) * moved
    after = _run(model, x, index + 1, past, read)
    return _Run([*before, layer, *after.saved], after.out)


def metric_grad(
    model: Model,
    logits: Tensor,
    norm_in: NormInput,
    metric: Metric,
    batch: MetricBatch,
    rules: Rules,
    weights: Sequence[float] = (1.0,),
    tokens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """max |∂(Σ metric)/∂logits|, and ∂(Σ weight · metric)/∂x [n·B, D], from the logits [n·B, V] of the last stream x.

    weights: one for each of the n runs of the batch that follow each other. tokens: [B, V'], whose logits these are.
    """
    with torch.enable_grad():
        leaf = logits.detach().to(torch.float64, copy=True).requires_grad_()
        values = torch.cat([evaluate(metric, part, batch) for part in leaf.chunk(len(weights))])
        if not values.requires_grad:
            raise ValueError("the metric has no gradient: it must be computed from the logits with torch operations")
        (d_logits,) = torch.autograd.grad(values.sum(), leaf)
    largest = d_logits.abs().max()
    if len(weights) > 1:
        for part, weight in zip(d_logits.chunk(len(weights)), weights, strict=True):
            part *= weight
    return largest, logits_grad(model, d_logits, norm_in, rules, tokens)
