"""Runs in which edges carry what another run made: the arithmetic of exact patching and of circuits.

Two ways through the model. `finish` goes on from one changed residual stream as the model does: every later component
reads everything. `run_masked` lets every receiver read its own choice of senders. Both start from what a batch's runs
share and make many copies of it in one forward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eapcore.attribution.plan import dense_bytes, fitting_batch_size
from eapcore.execution.ablation import ablated_senders
from eapcore.execution.batch import _WORK, _groups
from eapcore.execution.experiment import Task, as_pairs, check_finite, check_pairs, describe
from eapcore.execution.memory import free_bytes
from eapcore.models.activations import LayerRun, at_positions
from eapcore.models.attention import head_outputs
from eapcore.models.forward import embed, prefix, run_layers, unembed
from eapcore.models.model import Model
from eapcore.tasks import PromptPairs
from eapcore.tasks.metrics import METRICS, Metric, MetricBatch, evaluate, find_metric, tokens_read

# Tokens of all copies of a batch that go through a layer together: more leave the cache of a CPU and gain nothing.
_TOKENS = {"cpu": 4096, "cuda": 131072}
_LOGITS = 1 << 24  # logits, in float64, that are held at once
_EVALUATED = 1 << 18  # of which a metric is made at once
_SHARE = 0.25  # of the free memory that the copies' senders may take


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
            useful = fitting_batch_size(model.config, pairs, model.dtype, model.device)
            # The clean run's senders, the other run's, their difference, and what heads read of it: four buffers where
            # scoring has one.
            one = 4 * dense_bytes(model.config, 1, int(pairs.lengths.max()), model.dtype)
            return max(1, min(useful, int(2 * _SHARE * free_bytes(model.device) // one)))
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
            useful = min(useful, int(_SHARE * free_bytes(model.device) // size))
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
