"""How the batches of an experiment are scored, one after the other."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch
from torch import Tensor

import eapcore.attribution.statistics as over_pairs
from eapcore.attribution.dense import DenseStore
from eapcore.attribution.exact_patterns import place_for_products
from eapcore.attribution.factored import FactoredStore
from eapcore.attribution.methods import Passes, Recipe
from eapcore.attribution.nodes import NodeStore
from eapcore.attribution.plan import Plan
from eapcore.attribution.pruning import EndStore
from eapcore.attribution.score_batch import Runs, score_batch
from eapcore.attribution.spread import SpreadPlan
from eapcore.attribution.sums import Products, Store, Sums
from eapcore.attribution.tally import Tally
from eapcore.execution.ablation import Ablation
from eapcore.execution.batch import Batch, in_order
from eapcore.execution.cuda_graphs import Replays, recorder
from eapcore.execution.experiment import Experiment, check_pairs
from eapcore.execution.memory import budget, out_of_memory
from eapcore.execution.prefetch import Feed, Tensors, pinned_copy
from eapcore.execution.progress import Count
from eapcore.execution.resume import check_metric
from eapcore.models.model import Model
from eapcore.tasks.metrics import METRICS as OWN_METRICS
from eapcore.tasks.metrics import Metric, find_metric
from eapcore.tasks.pairs import PromptPairs

_log = logging.getLogger("eapcore")


class Scoring:
    """How batches of an experiment are scored, and what is used again for the next one."""

    def __init__(
        self,
        experiment: Experiment,
        how: Recipe,
        passes: Passes,
        plan: Plan | SpreadPlan,
        level: str,
        reduce: str,
        storage: str,
        impl: str,
        graphs: bool | str,
        n_pairs: int,
        runs: Runs | None = None,
    ) -> None:
        model = experiment.model
        self.experiment, self.how, self.passes, self.plan = experiment, how, passes, plan
        self.level, self.reduce, self.storage, self.impl, self.runs = level, reduce, storage, impl, runs
        self.shapes, self.within = shapes_of(model, how, passes), budget(model.device)
        self.by_node = how.by_ends or (level != "edge" and not how.by_edge)
        recordable = len(model.devices) == 1 and model.stream is None
        self.replays = _replays(model, experiment.metric, graphs, recordable=recordable)
        self.memory: list[torch.Tensor] = []
        self.products: Products | None = None
        self.passes_reached: dict[str, Tensor] = {}
        self.check = experiment.metric_name if graphs is not True else None  # of the first batch
        self.n_pairs, self.statistics = n_pairs, over_pairs.shapes(model.graph) if passes.statistics else {}

    def lane(self, order: list[int], tally: Tally, count: Count, first: int = 0) -> None:
        """Score what is left of some of a lane's pairs, in order, and keep what is done; first: the task's pair 0."""
        experiment, device = self.experiment, self.experiment.model.device
        left = order[tally.here :]
        if self.how.exact_softmax and self.products is None and len(left) > tally.size:
            self.products = place_for_products(experiment.model)
        feed = Feed(experiment.pairs, left, device, shared=experiment.shared, copy=pinned_copy(device))
        try:
            while feed.left:
                batch = feed.batch(tally.size)
                try:
                    values, largest, *parts = self._run(batch, feed)
                except (RuntimeError, MemoryError) as error:
                    if not out_of_memory(error):
                        raise
                    if self.replays.drop():
                        _log.warning("out of memory: going on without CUDA graphs")
                        continue
                    if len(batch.pairs) == 1:
                        raise
                    tally.size = len(batch.pairs) // 2
                    pairs = len(batch.pairs)
                    _log.warning("out of memory with %d pairs in a batch: going on with %d", pairs, tally.size)
                    continue
                feed.advance(batch)
                self.check = None
                divisors = [self.reached(name) for name in self.shapes] if self.how.dropped else None
                here = order[tally.here : tally.here + len(batch.pairs)]
                parts, statistics = self._summed(parts, [first + pair for pair in here])
                tally.add(batch, values, largest, parts, first, divisors, statistics)
                if device.type == "cpu":  # on a GPU every look would wait for it
                    if not bool(values.isfinite().all()):
                        experiment.check_finite(tally.values)
                elif not feed.left:
                    experiment.check_finite(tally.values)
                count.add(len(batch.pairs))
                if tally.resume.due:
                    tally.save()
        finally:
            tally.save()

    def _summed(self, parts: list[Tensor], index: list[int]) -> tuple[list[Tensor], dict[str, Tensor]]:
        """A batch's scores by name as they are kept, and the statistics of its pairs; index: which of the task's."""
        if not self.statistics:
            return parts, {}
        each, parts = parts[-1 if self.reduce == "position" else 0], parts[: len(self.shapes)]
        each = each / self.reached("scores") if self.how.dropped else each
        return [x.sum(0) for x in parts] if self.reduce == "all" else parts, over_pairs.sums_of(
            each, index, self.n_pairs
        )

    def window(self, pairs: PromptPairs, tally: Tally, count: Count, number: int, first: int, size: int | None) -> None:
        """Score a window of a stream: its number, which of the task's pairs is its first, pairs a batch or None."""
        before = self.experiment
        try:
            check_pairs(before.model, pairs, before.ablation.name)
            Ablation.of(before.model, pairs, before.ablation)
            find_metric(before.metric, pairs.answers, pairs.wrong)
            self.experiment = replace(before, pairs=pairs)
            tally.begin(number, len(pairs), self.plan.batch_size(pairs, self.storage) if size is None else size)
            self.lane(in_order(pairs), tally, count, first)
        except ValueError as error:
            raise ValueError(f"{error} (counted from pair {first} of the task)" if first else str(error)) from error

    def reached(self, name: str) -> Tensor:
        """`_reached` on the model's device, brought there once: a copy would wait for what is under way."""
        if name not in self.passes_reached:
            model = self.experiment.model
            self.passes_reached[name] = _reached(model, self.how, name).to(model.device)
        return self.passes_reached[name]

    def check_metric(self, order: list[int], tally: Tally) -> None:
        """ValueError where a callable gives other values on the first batch than it gave when that was scored."""
        experiment = self.experiment
        if not tally.here or experiment.metric in OWN_METRICS.values():
            return
        batch = experiment.batch(order[: min(tally.size, tally.here)])
        before, now = tally.values[:, batch.index], self._score(batch)[0]
        check_metric(tally.resume, experiment.metric_name, before, now, experiment.model.dtype)

    def _run(self, batch: Batch, feed: Feed) -> Tensors:
        """`_score`, where it suits recorded and replayed."""
        self._make_room(batch)
        return self.replays.run(batch, self._score, feed.alike)

    def _score(self, batch: Batch) -> Tensors:
        """The metric's values [2, B], the largest |∂metric/∂logits|, and the scores by name, of a batch."""
        experiment, how = self.experiment, self.how
        by_sender, graph = self.passes.by_sender, experiment.model.graph
        made = {"scores": (graph.n_senders, graph.n_receivers)} if by_sender else self.shapes
        beside = self.passes.statistics and self.reduce == "position"
        reduce = self.passes.reduce
        sums = Sums(made, batch, reduce, self.impl, absolute=how.absolute, by_sender=by_sender, pairs=beside)
        store = self._store(batch)
        store.products = self.products
        together = self.plan.steps_together
        groups = self.passes.grouped(lambda n: together(*batch.shape, n, self.within) if store.steps else 1)
        what = (experiment.model, batch, experiment.metric, store, sums, self.passes, groups)
        units, values = self.level == "neuron", experiment.ablation.values
        found = score_batch(*what, values=values, units=units, check=self.check, runs=self.runs)
        return [found.values, found.largest, *sums.result().values()]

    def _store(self, batch: Batch) -> Store:
        model = self.experiment.model
        if self.how.by_ends:
            return EndStore(model, batch)
        if self.by_node:
            return NodeStore(model, batch, units=self.level == "neuron")
        if self.storage == "dense":
            self._make_room(batch)
            return DenseStore(model, batch, self.memory, apart=self.how.exact_softmax)
        return FactoredStore(model, batch, self.plan.chunk(*batch.shape, self.within))

    def _make_room(self, batch: Batch) -> None:
        """Make the buffer large enough; recordings that work in it go."""
        model = self.experiment.model
        if self.storage != "dense":
            return
        there = [room.numel() for room in self.memory]
        if not there or any(size > n for size, n in zip(DenseStore.sizes(model, batch), there, strict=True)):
            self.replays.clear()
            self.memory = []  # freed before the larger one is made
            self.memory = DenseStore.room(model, batch)


def _replays(model: Model, metric: Metric, graphs: bool | str, *, recordable: bool) -> Replays:
    """What runs the batches, with a recorder where one is wanted; ValueError where it is and cannot be."""
    if graphs != "auto" and not isinstance(graphs, bool):
        raise ValueError(f"graphs must be True, False or 'auto', got {graphs!r}")
    by = recorder(model.device) if graphs else None
    if graphs is True and (by is None or not recordable):
        why = f"the model is on {model.where}" if recordable else f"the layers lie on {model.where}"
        raise ValueError(f"graphs=True needs the whole model on one GPU, but {why}: leave graphs at 'auto'")
    if graphs == "auto" and not (recordable and metric in OWN_METRICS.values()):
        by = None
    return Replays(by, strict=graphs is True, width=model.config.d_model)


def shapes_of(model: Model, how: Recipe, passes: Passes) -> dict[str, tuple[int, ...]]:
    """What is scored at a level, without the axis of pairs or positions."""
    graph, config, level = model.graph, model.config, how.described["level"]
    if how.by_ends:
        return {"scores": (graph.n_receivers,)}
    if level == "edge":
        names = ("scores", "spread") if passes.spread else ("scores",)
        return dict.fromkeys(names, (graph.n_senders, graph.n_receivers))
    if level == "node":
        return {"scores": (graph.n_senders,)}
    units = {} if config.d_mlp is None else {"units": (config.n_layers, config.d_mlp)}
    return {"scores": (graph.n_senders,), **units, "dimensions": (graph.n_senders, config.d_model)}


def _reached(model: Model, how: Recipe, name: str) -> Tensor:
    """How many passes have a gradient at each score, of a shape that divides the scores."""
    graph = model.graph
    passes = how.reached(graph)
    if name == "units":
        return passes[[graph.mlp(layer) for layer in range(graph.n_layers)]][:, None]
    if name == "dimensions":
        return passes[:-1, None]
    if how.described["level"] == "edge":
        return passes[[next(iter(graph.senders_behind(r)), -1) for r in range(graph.n_receivers)]]
    return passes[:-1]
