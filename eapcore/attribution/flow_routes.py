"""Information flow routes: which edges a prediction is made through, by how near each part of a sum is to the sum.

    c[s, r, t] = max(0, ‖y‖₁ − ‖y − e[s, t]‖₁) / Σ over all senders before r of the same,   y = v[r, t]
    c[h, t, u] = max(0, ‖z‖₁ − ‖z − x[t]‖₁) / Σ over sources of the same,   z = Σ_t x[t], x[t] = P[u, t] v[t] W_O[h]

c[s, r, t] is how much sender s makes of what receiver r reads at position t, and c[h, t, u] how much the value at
source t makes of what head h sends from target u; where parts cancel, so that none is near their sum, all are 0. From
the logits at the position that the metric reads, routes go back through these: into an MLP at its own position, into a
head's value at every source. Queries and keys, which choose the sources, have no part in a sum, and their edges score
0. One forward, no gradient, no corrupt prompt, no metric.

    "threshold"   a route is as strong as its weakest part, and an edge scores the strongest route through it: what is
                  above τ is the graph that is extracted with the threshold τ
    "flow"        a route's strength is the product of its parts, and an edge scores the sum of its routes

Source: Ferrando, Voita 2024, *Information Flow Routes*, sections 2.1 and 2.2, with every sender a part of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from eapcore.execution.batch import Batch
from eapcore.execution.distributed import reported
from eapcore.execution.experiment import Experiment, Task, result_dtype, values_of
from eapcore.execution.limits import limits
from eapcore.execution.memory import budget
from eapcore.execution.progress import Count, Progress
from eapcore.graph.scores import NO_SIGN, EdgeScores
from eapcore.kernels.checks import one_of
from eapcore.models.attention import Attention
from eapcore.models.forward import StageRun, run_stages, sender_buffer, unembed
from eapcore.models.model import Model
from eapcore.models.tensors import accumulate_dtype, at_positions
from eapcore.models.torch_modes import own_modes
from eapcore.tasks.metrics import Metric, MetricBatch

ROUTES = ("threshold", "flow")
REDUCE = ("all", "pair")
_SIGN = {
    "threshold": "score = the largest threshold at which the edge is on a route from the logits, mean over pairs; ",
    "flow": "score = the share of what the logits read that comes along the edge, mean over pairs; ",
}


@reported
@own_modes
@torch.no_grad()
def flow_routes(
    model: Model,
    task: Task,
    metric: str | Metric | None = None,
    *,
    routes: str = "threshold",
    reduce: str = "all",
    batch_size: int | str = "auto",
    progress: Progress | None = None,
) -> EdgeScores:
    """Score every edge by the routes to the logits that go along it, on the clean prompts alone.

    Args:
        model, task, reduce ("all" or "pair"), batch_size, progress: as `attribute`.
        metric: which the result names and has the mean of on the clean prompts; the routes do not depend on it.
        routes: how the parts of a route add up, "threshold" or "flow"; see the module.

    Returns:
        EdgeScores in [0, 1] without a sign.

    Raises:
        ValueError: an unknown kind of routes; prompts that do not fit the model.
    """
    one_of("routes", routes, ROUTES)
    one_of("reduce", reduce, REDUCE)
    experiment = Experiment.of(model, task, _nothing if metric is None else metric, "zero")
    model, pairs, graph = experiment.model, experiment.pairs, experiment.model.graph
    each = torch.zeros(len(pairs), graph.n_senders, graph.n_receivers, dtype=torch.float64, device="cpu")
    tokens = int(pairs.positions.max()) + 1
    size = batch_size if isinstance(batch_size, int) else _useful(model, tokens, len(pairs))
    count, values = Count(progress, len(pairs)), torch.zeros(1, len(pairs), dtype=torch.float64, device="cpu")
    for group in experiment.groups(size, 1):
        batch = experiment.batch(group)
        made = _Routes(model, batch, routes)
        each[batch.index.cpu()] = made.scores().cpu()
        if metric is not None:
            values[:, batch.index.cpu()] = made.measure(experiment.metric).cpu()
        count.add(len(group))
    if not bool(each.isfinite().all()):
        raise ValueError(f"the activations overflow in {model.dtype}: use a wider dtype, e.g. float32")
    keep, named = result_dtype(model.dtype), dict[str, Any](name="none")
    if metric is not None:
        experiment.check_finite(values)
        named = {"name": experiment.metric_name, "clean": float(values.mean())}
    meta = {
        **experiment.describe(),
        "sign": _SIGN[routes] + NO_SIGN,
        "method": {"name": "flow-routes", "routes": routes, "level": "edge"},
        "metric": named,
        "impl": "reference",
        "storage": "dense",
    }
    return EdgeScores(each.mean(0).to(keep), graph, meta, per_pair=each.to(keep) if reduce == "pair" else None)


def _nothing(logits: Tensor) -> Tensor:
    """The metric of what has none."""
    return logits.sum(-1)


def _useful(model: Model, tokens: int, pairs: int) -> int:
    """Pairs a batch, of which the sender buffer and the streams fit."""
    kept = 2 * model.graph.n_senders + 4 * len(model.stages)
    one = kept * tokens * model.config.d_model * max(4, model.dtype.itemsize)
    return max(1, min(limits(model.device).batch_tokens // tokens, pairs, budget(model.device) // one))


class _Routes:
    """A batch's routes: what reaches each sender at each position, [S, B, T]."""

    def __init__(self, model: Model, batch: Batch, routes: str) -> None:
        self.model, self.batch, self.flow = model, batch, routes == "flow"
        prompts = batch.pairs.clean
        self.senders = sender_buffer(model, *batch.shape)
        self.runs: list[StageRun] = []
        x = self.senders[0] = batch.embed(model, prompts)
        self.streams = [x]
        for run in run_stages(model, x):
            run.write(self.senders)
            self.streams.append(run.out)
            self.runs.append(run)

    def measure(self, metric: Metric) -> Tensor:
        """A metric on the clean run, [1, B]."""
        reads = self.batch.logits_read(metric, self.model.config.n_logits)
        x = at_positions(self.streams[-1], self.batch.read)[:, 0]
        logits = unembed(self.model, x, reads.tokens)[0].double()
        return values_of(
            metric, logits[None], MetricBatch(reads.answers, reads.wrong, logits, logits, self.batch.index)
        )

    def along(self, reached: Tensor, share: Tensor) -> Tensor:
        """What reaches further through a part."""
        return reached * share if self.flow else torch.minimum(reached, share)

    def over(self, x: Tensor, dim: int) -> Tensor:
        """Several routes together."""
        return x.sum(dim) if self.flow else x.amax(dim)

    def scores(self) -> Tensor:
        """float64 [B, S, R]."""
        model, graph, (rows, tokens) = self.model, self.model.graph, self.batch.shape
        wide = accumulate_dtype(model.dtype)
        found = torch.zeros(rows, graph.n_senders, graph.n_receivers, dtype=torch.float64, device=model.device)
        reached = torch.zeros(graph.n_senders, rows, tokens, dtype=wide, device=model.device)
        reads = torch.zeros(rows, tokens, dtype=wide, device=model.device).scatter_(1, self.batch.read, 1.0)

        def enter(receiver: int, here: Tensor, shares: Tensor) -> None:
            """A receiver is reached, here [B, T], and with it the senders before it."""
            stop = graph.senders_before(receiver)
            edges = self.along(here, shares[:stop])
            found[:, :stop, receiver] = self.over(edges, 2).T.double()
            reached[:stop] = reached[:stop] + edges if self.flow else torch.maximum(reached[:stop], edges)

        enter(graph.logits, reads, self.shares(self.streams[-1], graph.n_senders))
        for number in reversed(range(len(model.stages))):
            stage, run = model.stages[number], self.runs[number]
            place = stage.mlp or stage.attention
            assert place is not None
            shares = self.shares(self.streams[number], graph.senders_before(place.receivers.start))
            before = reached.clone()  # what reads the same stream does not come behind each other
            if stage.mlp is not None:
                enter(stage.mlp.receivers.start, before[stage.mlp.senders.start], shares)
            if stage.attention is not None and run.attention is not None:
                attention, first = stage.attention.component, stage.attention.receivers.start
                into = before[stage.attention.senders]
                sources = torch.stack(
                    [self.over(self.along(into[h, :, None], part), 2) for h, part in self.sources(attention, run)]
                )  # [H, B, T]
                values = attention.channels[2]
                sources = self.over(sources.unflatten(0, (len(range(values.start, values.stop)), -1)), 1)
                for channel in range(values.start, values.stop):
                    enter(first + channel, sources[channel - values.start], shares)
        return found

    def shares(self, stream: Tensor, count: int) -> Tensor:
        """c of the first senders in a stream [B, T, D]: [S', B, T]."""
        wide = accumulate_dtype(stream.dtype)
        y = stream.to(wide)
        near = torch.stack([(y - sent.to(wide)).abs().sum(-1) for sent in self.senders[:count]])
        return _shares(y.abs().sum(-1) - near, 0)

    def sources(self, attention: Attention, run: StageRun) -> Iterator[tuple[int, Tensor]]:
        """c of each head's sources: its number, and [B, T, T] of the sources for each target, sources first."""
        assert run.attention is not None
        saved = run.attention.saved
        q, k, v = attention.heads(saved.q, saved.kv, None, None)
        pattern = attention.causal.pattern(q, k, 0, None)  # [B, H, U, T]
        w_send, wide = attention.w_send, pattern.dtype
        for h in range(attention.n_heads):
            sent = v[:, h // attention.group].to(wide) @ w_send[h].to(wide)  # [B, T, D]
            share = pattern[:, h]
            z = share @ sent  # [B, U, D]
            size, near = z.abs().sum(-1), []
            for t in range(sent.shape[1]):
                near.append((z - share[:, :, t, None] * sent[:, t, None]).abs().sum(-1))
            yield h, _shares(size[:, None] - torch.stack(near, 1), 1)  # [B, T, U]


def _shares(near: Tensor, dim: int) -> Tensor:
    """Parts by their nearness, as shares of the whole; 0 where no part is near."""
    near = near.clamp_min(0)
    total = near.sum(dim, keepdim=True)
    return near / total.where(total > 0, 1.0)
