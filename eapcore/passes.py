"""One window, scored: the clean and the corrupt forward, and one backward pass after another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from eapcore import planner
from eapcore.ablation import Values
from eapcore.gradient import logits_grad
from eapcore.methods import Pass
from eapcore.metrics import Metric, MetricBatch, evaluate
from eapcore.model import (
    LayerRun,
    LayerSaved,
    Model,
    NormInput,
    activation,
    normalise,
    prefix,
    run_layers,
    run_mlp,
    unembed,
)
from eapcore.rules import Rules
from eapcore.window import Store, Sums, Window


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
    *,
    budget: int,
    values: Values | None = None,
    units: bool = False,
) -> Step:
    """Add a window's scores to sums.

    Args:
        model, window, metric: what is scored.
        store: empty, for the differences.
        sums: what the scores are added to.
        passes: the backward passes of a method.
        budget: bytes that passes which run together may take.
        values: what senders send when they are ablated; None for what the corrupt prompts make them send.
        units: give the store the differences of the MLPs' hidden units as well.
    """
    read, pairs = window.read, window.pairs
    past = prefix(model, pairs.clean[:, : window.start])
    start = {1.0: window.embed(model, pairs.clean), 0.0: window.embed(model, pairs.corrupt)}
    ablated = start[0.0] if values is None else Values.at(values.embed, window.stop, None).expand_as(start[1.0])
    store.set_embed(ablated - start[1.0])
    ends: dict[float, _Run] = {}
    # The corrupt run is where a pass starts only where it is what the senders are ablated to.
    origins = [None if step.end == 0.0 and values is not None else step.end for step in passes]
    kept: dict[float, list[LayerSaved]] = {origin: [] for origin in origins if origin is not None}
    # Clean and corrupt run as one batch: matrix products of twice the rows are faster.
    halves = {1.0: slice(0, len(pairs)), 0.0: slice(len(pairs), None)}
    both = torch.cat([start[alpha] for alpha in halves])
    runs = run_layers(model, both, past=past, read=read.repeat(2, 1))
    for index in range(model.config.n_layers):  # enumerate would hold each layer's run while the next is made
        run = next(runs)
        store.set_layer(index, *_differences(model, index, window, run, values, units))
        for alpha, rows in halves.items():
            if alpha in kept:
                kept[alpha].append(run.saved.copy(rows))
            ends[alpha] = _Run(kept.get(alpha, []), run.out[rows])
        del run  # before the next layer runs, and before the gradients are made
    del both, runs

    ends = {alpha: replace(run, unembedded=unembed(model, run.out[:, 0])) for alpha, run in ends.items()}
    logits = {alpha: run.unembedded[0].double() for alpha, run in ends.items() if run.unembedded is not None}
    reference = MetricBatch(pairs.answers, pairs.wrong, logits[1.0], logits[0.0], window.index)
    measured = torch.stack([evaluate(metric, logits[alpha], reference).double() for alpha in (1.0, 0.0)])
    largest = torch.zeros((), dtype=torch.float64, device=model.device)
    done, sizes = 0, _together(model, window, store, passes, origins, budget)
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
        unembedded = at.unembedded or unembed(model, at.out[:, 0])
        weights = [each.weight for each in steps] if count > 1 else [1.0]  # one alone is weighted with its scores
        size, grad = metric_grad(model, *unembedded, metric, reference, step.rules, weights)
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


def _together(
    model: Model, window: Window, store: Store, passes: Sequence[Pass], origins: Sequence[float | None], budget: int
) -> Iterator[int]:
    """How many of the passes, in order, run as one batch: those that share a Δ and their rules, if they make all of
    their activations."""
    done = 0
    while done < len(passes):
        alike, first = 1, passes[done]
        while store.steps and origins[done] is None and done + alike < len(passes):
            other = passes[done + alike]
            if origins[done + alike] is not None or replace(other, alpha=first.alpha, weight=first.weight) != first:
                break
            alike += 1
        count = planner.steps_together(model.config, *window.shape, alike, model.dtype, model.device, budget)
        yield count
        done += count


def _differences(
    model: Model, index: int, window: Window, run: LayerRun, values: Values | None, units: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Δ of a layer: of its heads' mixtures of v, of what its MLP sends, and of its hidden units if they are wanted.

    run: of the clean and then the corrupt prompts. Subtracted before any projection: the difference of two nearly equal
    outputs would cancel after rounding.
    """
    read = window.read if index == model.config.n_layers - 1 else None
    sent = _sent(model, run, units)
    here = [None if x is None else x[: len(window.pairs)] for x in sent]
    there = [None if x is None else x[len(window.pairs) :] for x in sent]
    if values is not None:
        ablated = (values.z, values.mlp, values.units if units else None)
        there = [None if x is None else Values.at(x[index], window.stop, read) for x in ablated]
    dz, mlp, hidden = (None if a is None or b is None else b - a for a, b in zip(here, there, strict=True))
    assert dz is not None
    return dz, mlp, hidden


def _sent(model: Model, run: LayerRun, units: bool) -> list[Tensor | None]:
    hidden, act_fn = run.saved.hidden, model.config.act_fn
    return [run.z, run.mlp, activation(act_fn, hidden) if units and hidden is not None and act_fn is not None else None]


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
) -> tuple[Tensor, Tensor]:
    """max |∂(Σ metric)/∂logits|, and ∂(Σ weight · metric)/∂x [n·B, D], from the logits [n·B, V] of the last stream x.

    weights: one for each of the n runs of the batch that follow each other.
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
    return largest, logits_grad(model, d_logits, norm_in, rules)
