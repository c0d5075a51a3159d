"""A batch's clean run and what ablated edges carry, recorded once: what many patched copies of it start from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

import eapcore.execution.limits as limits
from eapcore.execution.batch import Batch
from eapcore.execution.experiment import Experiment, check_batch_size
from eapcore.execution.memory import free_bytes
from eapcore.graph.show import short
from eapcore.models.attention import AttentionRun, AttentionSaved
from eapcore.models.forward import StageRun, prefix, run_stages, unembed
from eapcore.models.mlp import MlpRun
from eapcore.models.model import Model
from eapcore.models.tensors import at_positions, on, spread
from eapcore.tasks.metrics import MetricBatch


@dataclass(frozen=True, slots=True)
class Run:
    """A run's residual streams, as its receivers read them, and what its senders send.

    streams: [B, T, D] in front of each stage, and behind the last. senders: [S, B, T, D]. Both on the model's own
    device. stages: what `run_stages` made, where it did; empty for an ablation that is no run.
    """

    __repr__ = short

    streams: list[Annotated[Tensor, "B T D"]]
    senders: Annotated[Tensor, "S B T D"]
    stages: list[StageRun]

    @staticmethod
    def of(
        model: Model,
        x: Annotated[Tensor, "B T D"],
        past: Sequence[Tensor] | None,
        read: Annotated[Tensor, "int64 B Q"] | None = None,
    ) -> Run:
        """Run the model from what `embed` made, and keep everything; read: where alone the last layer's queries and
        what comes behind them is wanted, and is not zero."""
        senders = x.new_empty(model.graph.n_senders, *x.shape)
        senders[0] = x
        stages = [_everywhere(run, read, x.shape[1]) for run in run_stages(model, x, past=past, read=read)]
        for run in stages:
            run.write(senders)
        return Run([x, *(on(run.out, model.device) for run in stages)], senders, stages)

    @staticmethod
    def summed(model: Model, senders: Annotated[Tensor, "S B T D"]) -> Run:
        """The residual streams that senders add up to, with the attention biases."""
        x = senders[0]
        streams = [x]
        for stage in model.stages:
            if stage.attention is not None:
                x = x + senders[stage.attention.senders].sum(0)
                b_o = stage.attention.component.b_o
                x = x if b_o is None else x + on(b_o, x.device)
            if stage.mlp is not None:
                x = x + senders[stage.mlp.senders.start]
            streams.append(x)
        return Run(streams, senders, [])


def _everywhere(run: StageRun, read: Tensor | None, tokens: int) -> StageRun:
    """What a stage made at the positions read, among zeros at the others; the run itself where it made everything."""
    if read is None or not run.stage.last:
        return run
    where = on(read, run.out.device)

    def among(x: Tensor) -> Tensor:
        return spread(x, where, tokens)

    attention, mlp = run.attention, run.mlp
    if attention is not None:
        saved = attention.saved
        post_in = None if saved.post_in is None else saved.post_in.of(among)
        qkv = torch.cat([among(saved.q), saved.kv], 2)
        attention = AttentionRun(AttentionSaved(saved.norm_in, (qkv,), saved.n_heads, post_in), among(attention.z))
    if mlp is not None:
        mlp = MlpRun(mlp.saved.of(among), among(mlp.sent))
    return StageRun(run.stage, attention, mlp, among(run.out))


@dataclass(frozen=True, slots=True)
class Recording:
    """A batch, its clean run, and what ablated edges carry.

    past: for each layer the k and v heads of the tokens before the batch's first position. ablated: a run only where it
    is the corrupt one. reference: what a metric may look at. tokens: int64 [B, n], those whose logits are made, and
    places among which the reference's answers are; None for all V.
    """

    __repr__ = short

    model: Model
    batch: Batch
    past: list[Tensor] | None
    clean: Run
    ablated: Run
    reference: MetricBatch
    tokens: Annotated[Tensor, "int64 B n"] | None

    @staticmethod
    @torch.no_grad()
    def of(experiment: Experiment, index: Sequence[int], *, short: bool = False) -> Recording:
        """Run the clean and the corrupt prompts of some pairs; short: the last layer where the metric reads, see
        `Run.of`."""
        model, batch = experiment.model, experiment.batch(index)
        pairs, read = batch.pairs, batch.read
        past = prefix(model, pairs.clean[:, : batch.start])
        prompts, where = (pairs.clean, pairs.corrupt), read if short else None
        runs = [Run.of(model, batch.embed(model, tokens), past, where) for tokens in prompts]
        reads = batch.logits_read(experiment.metric, model.config.n_logits)
        ends = torch.stack([at_positions(run.streams[-1], read)[:, 0] for run in runs])
        clean, corrupt = _logits(model, ends, reads.tokens)
        reference = MetricBatch(reads.answers, reads.wrong, clean, corrupt, batch.index)
        values = experiment.ablation.values
        if values is not None:
            senders = values.senders(model)[:, None, : batch.stop].expand_as(runs[0].senders)
            runs[1] = Run.summed(model, senders)
        return Recording(model, batch, past, runs[0], runs[1], reference, reads.tokens)

    @property
    def read(self) -> Annotated[Tensor, "int64 B 1"]:
        """The answer positions."""
        return self.batch.read

    def at_read(self, x: Annotated[Tensor, "... B T D"], short: bool = True) -> Annotated[Tensor, "... B 1 D"]:
        """x at the answer positions; with short=False x itself."""
        return at_read(x, self.read) if short else x

    def before(self, layer: int) -> Tensor | None:
        """The k and v heads of a layer's past."""
        return None if self.past is None else self.past[layer]

    def logits(self, x: Annotated[Tensor, "C B D"]) -> Annotated[Tensor, "float64 C B V | C B n"]:
        """The logits of last residual streams at the answers, those of `tokens` alone where there are some."""
        return _logits(self.model, x, self.tokens)

    def copies(self, *, at_read: bool = False, senders: int = 0) -> int:
        """How many copies of this batch go through the model together.

        at_read: they need only the answer positions. senders: how many each keeps of what it sends, [B, T, D].
        """
        model, (rows, tokens) = self.model, self.batch.shape
        # The past is copied too, a layer at a time.
        tokens = 1 if at_read else max(tokens, self.batch.stop // 4)
        useful = limits.limits(model.device).copy_tokens // (rows * tokens)
        if senders:
            size = senders * rows * tokens * model.config.d_model * model.dtype.itemsize
            useful = min(useful, int(limits.limits(model.device).record_share * free_bytes(model.device) // size))
        logits = rows * model.config.n_logits if self.tokens is None else self.tokens.numel()
        return max(1, min(useful, limits.LOGITS // logits))


def record(experiment: Experiment, batch_size: int | str = "auto") -> Iterator[Recording]:
    """All pairs in batches of at most `batch_size`."""
    for group in experiment.groups(useful_size(experiment, batch_size), 1):
        yield Recording.of(experiment, group)


class Recordings:
    """All pairs in batches, for several rounds: what fits is kept, and what does not is recorded again."""

    def __init__(self, experiment: Experiment, batch_size: int | str = "auto") -> None:
        self.experiment = experiment
        self.groups = experiment.groups(useful_size(experiment, batch_size), 1)
        device = experiment.model.device
        self.left = int(limits.limits(device).record_share * free_bytes(device))
        self.kept: dict[int, Recording] = {}

    def __iter__(self) -> Iterator[Recording]:
        for number, group in enumerate(self.groups):
            if number in self.kept:
                yield self.kept[number]
                continue
            recording = Recording.of(self.experiment, group)
            size = 4 * recording.clean.senders.nbytes  # two runs' senders, and at most as much of what they kept
            if size <= self.left:
                self.left -= size
                self.kept[number] = recording
            yield recording


def useful_size(experiment: Experiment, batch_size: int | str) -> int:
    """Pairs a batch, for "auto" as many as are useful and fit; ValueError for what is neither."""
    check_batch_size(batch_size)
    if isinstance(batch_size, int):
        return batch_size
    model, tokens = experiment.model, int(experiment.pairs.lengths.max())
    here = limits.limits(model.device)
    # The clean run's senders, the other run's, their difference, and what heads read of it, with what the runs keep.
    kept = 4 * model.graph.n_senders + 2 * len(model.stages) * 8
    one = kept * tokens * model.config.d_model * model.dtype.itemsize
    fitting = int(2 * here.record_share * free_bytes(model.device) // one)
    return max(1, min(here.batch_tokens // tokens, len(experiment), fitting))


def at_read(x: Annotated[Tensor, "... B T D"], read: Annotated[Tensor, "int64 B 1"]) -> Annotated[Tensor, "... B 1 D"]:
    """x at one position of each prompt."""
    return x.gather(-2, read[..., None].expand(*x.shape[:-2], 1, x.shape[-1]))


def _logits(model: Model, x: Tensor, tokens: Tensor | None) -> Tensor:
    """Logits float64 [C, B, V] from the last residual streams x [C, B, D], or of the tokens [B, n] alone [C, B, n]."""
    return unembed(model, x.flatten(0, 1), tokens)[0].double().unflatten(0, x.shape[:2])
