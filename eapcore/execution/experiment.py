"""What is asked of a model: prompt pairs, a metric and an ablation, checked once to fit each other."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import torch
from torch import Tensor

import eapcore.execution.limits as limits
from eapcore.execution.ablation import ABLATIONS, Ablation
from eapcore.execution.batch import Batch, cut, in_order, spans
from eapcore.execution.distributed import ALONE, Ranks, deal
from eapcore.graph.show import short
from eapcore.models.forward import as_tokens, check_tokens, first_non_finite
from eapcore.models.load import usable
from eapcore.models.model import Model
from eapcore.models.tensors import accumulate_dtype
from eapcore.tasks.metrics import METRICS, Metric, MetricBatch, check_apart, evaluate, find_metric
from eapcore.tasks.pairs import PromptPairs

Task = PromptPairs | tuple[Annotated[Tensor, "int64 N T"], Annotated[Tensor, "int64 N T"]]


@dataclass(frozen=True, slots=True)
class Experiment:
    """A model, prompt pairs, a metric by name and as a callable, and an ablation; ranks: who shares the work."""

    __repr__ = short

    model: Model
    pairs: PromptPairs
    metric_name: str
    metric: Metric
    ablation: Ablation
    ranks: Ranks = ALONE

    @staticmethod
    def of(
        model: Model,
        task: Task,
        metric: str | Metric = "logit_diff",
        ablation: str | Ablation = "corrupt",
        reference: PromptPairs | None = None,
        distributed: bool = False,
    ) -> Experiment:
        """The experiment of a function's arguments; a mean ablation is made here, once.

        Raises:
            ValueError: prompts, positions or answers that do not fit the model, a metric that does not fit the task, or
                nothing to ablate with; another process has another model, task, metric or ablation.
            RuntimeError: distributed without processes to share the work with.
        """
        ranks = Ranks.of(distributed)
        check_model(model)
        if not isinstance(ablation, str | Ablation):
            raise ValueError(f"ablation must be one of {', '.join(ABLATIONS)}, or an Ablation, got {ablation!r}")
        model, pairs = model.now(), as_pairs(task)
        check_pairs(model, pairs, ablation if isinstance(ablation, str) else ablation.name)
        metric_name, metric = find_metric(metric, pairs.answers, pairs.wrong)
        made = Ablation.of(model, pairs, ablation, reference)
        experiment = Experiment(model, pairs, metric_name, metric, made, ranks)
        if ranks.link is not None:
            ranks.agree(**experiment.identity())
        return experiment

    def __len__(self) -> int:
        """How many prompt pairs it has."""
        return len(self.pairs)

    @property
    def shared(self) -> bool:
        """Whether clean and ablated are the same before the first difference of the prompts."""
        return self.ablation.values is None

    def groups(self, size: int, copies: int, pairs: Annotated[Tensor, "bool N"] | None = None) -> list[list[int]]:
        """Which pairs of this process go together in exact patching, of some or of all; copies: how many of a batch go
        through a layer."""
        left = None if pairs is None else set(pairs.nonzero().squeeze(1).tolist())
        order = [i for i in in_order(self.pairs) if left is None or i in left]
        first, stop = (x[order] for x in spans(self.pairs, shared=self.shared))
        if self.ranks.size > 1:
            mine = deal((stop - first).tolist(), self.ranks.size)[self.ranks.rank]
            part = slice(mine.start, mine.stop)
            order, first, stop = order[part], first[part], stop[part]
        # A batch is worth its own launches with so many tokens; a tenth of them may be run for nothing.
        one_more = limits.limits(self.model.device).copy_work / (10 * copies * self.model.config.d_model**2)
        groups = []
        for count in cut(first, stop, size, one_more, prefix_share=0.0):
            groups.append(order[:count])
            order = order[count:]
        return groups

    def batch(self, index: Sequence[int]) -> Batch:
        """These pairs as one batch."""
        return Batch.of(self.pairs, index, self.model.device, shared=self.shared)

    def values(self, logits: Annotated[Tensor, "C B V"], reference: MetricBatch) -> Annotated[Tensor, "float64 C B"]:
        """The metric on each copy of a batch."""
        return values_of(self.metric, logits, reference)

    def ends(self, reference: MetricBatch) -> Annotated[Tensor, "float64 2 B"]:
        """The metric on the clean and the corrupt run of a batch; ValueError where it is not finite, or where a pair's
        value hangs on the others."""
        check_apart(self.metric_name, self.metric, reference.clean_logits, reference)
        values = self.values(torch.stack([reference.clean_logits, reference.corrupt_logits]), reference)
        found = torch.zeros(2, len(self.pairs), dtype=torch.float64, device="cpu")
        found[:, reference.index.cpu()] = values.cpu()
        self.check_finite(found)
        return values

    def mean(self, sums: Tensor) -> Tensor:
        """Sums of the metric over all pairs as means; ValueError where they are not finite."""
        if not bool(sums.isfinite().all()):
            raise ValueError(
                f"the metric {self.metric_name} is NaN or infinite on a patched run in {self.model.dtype}: use a wider "
                "dtype, or a metric that is finite there"
            )
        return sums / len(self.pairs)

    def no_scale(self, clean: float, ablated: float) -> bool:
        """Whether the metric's means on the clean and the ablated run are the same but for rounding: then no share of
        their difference is known."""
        of_metric, rounding = (64 * torch.finfo(x).eps for x in (torch.float64, accumulate_dtype(self.model.dtype)))
        least = max(of_metric, rounding**2)  # of a KL of nearly the same, which is 0 on the clean run
        return abs(clean - ablated) <= rounding * max(abs(clean), abs(ablated)) + least

    def check_finite(self, values: Annotated[Tensor, "2 N"]) -> None:
        """ValueError where the metric is not finite, naming the layer if it is the activations' fault."""
        bad = values.isfinite().all(0).logical_not().nonzero()
        if not len(bad):
            return
        model, pairs = self.model, self.pairs
        for pair in bad[:, 0].tolist():
            length = int(pairs.lengths[pair])
            prompts = torch.stack([pairs.clean[pair, :length], pairs.corrupt[pair, :length]])
            where = first_non_finite(model, prompts.to(model.device))
            if where is not None:
                raise ValueError(
                    f"{where} has NaN or infinite activations on pair {pair}: are the weights of {model.name} "
                    f"damaged, or is {model.dtype} too narrow for it?"
                )
        raise ValueError(f"the metric is NaN or infinite on pair {int(bad[0])}: it must be finite on every pair")

    def identity(self) -> dict[str, Any]:
        """What all processes must have alike, and what partial results must agree in before they are gone on with."""
        pairs, mean = self.pairs, self.ablation.reference
        return {
            "model": self.model.content_hash,
            "dtype": str(self.model.dtype),
            "task": digest(pairs.clean, pairs.corrupt, pairs.positions, pairs.answers, pairs.wrong),
            "metric": self.metric_name,
            # The prompts of a mean rather than the mean, which rounds otherwise on another device.
            "ablation": [dict(self.ablation.meta), "" if mean is None else digest(*self._reference(mean))],
        }

    def _reference(self, prompts: PromptPairs) -> tuple[Tensor, ...]:
        """What an ablation is made of: constants are optimal for where prompts are read."""
        read = (prompts.positions,) if self.ablation.name == "optimal" else ()
        return (prompts.clean, prompts.lengths, *read)

    def describe(self) -> dict[str, Any]:
        """What a file says of the model, the task, the metric, and what ran."""
        return {**describe(self.model, self.pairs), "metric": {"name": self.metric_name}}


def values_of(
    metric: Metric, logits: Annotated[Tensor, "C B V"], reference: MetricBatch
) -> Annotated[Tensor, "float64 C B"]:
    """A metric on copies of a batch, float64 [C, B]."""
    if metric not in METRICS.values():  # a caller's own knows no copies
        return torch.stack([evaluate(metric, row, reference).double() for row in logits])
    some = logits.split(max(1, limits.EVALUATED // logits[0].numel()))
    return torch.cat([evaluate(metric, part, reference).double() for part in some])


def digest(*tensors: Tensor) -> str:
    """16 hex digits that differ where tensors do."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        found.update(bytes(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()))
    return found.hexdigest()[:16]


@cache
def _own_version() -> str:
    try:
        return version("eapcore")
    except PackageNotFoundError:
        return "source tree"


def describe(model: Model, pairs: PromptPairs) -> dict[str, Any]:
    """What a file says of the model, the task, and what ran: the part of `meta` that all methods share."""
    return {
        "model": {"name": model.name, "content_hash": model.content_hash},
        "task": {"name": pairs.name, "n_pairs": len(pairs), "seed": pairs.seed, **pairs.details},
        "dtype": str(model.dtype).removeprefix("torch."),
        "versions": {"eapcore": _own_version(), "torch": torch.__version__, "python": platform.python_version()},
    }


def as_pairs(task: Task) -> PromptPairs:
    """(clean, corrupt) tokens [N, T] as pairs that are read at their last position and have no answers."""
    if isinstance(task, PromptPairs):
        return task
    if not isinstance(task, tuple | list) or len(task) != 2:
        raise ValueError(f"task must be PromptPairs or (clean, corrupt) tokens, got {type(task).__name__}")
    clean, corrupt = (as_tokens(tokens, what) for tokens, what in zip(task, ("clean", "corrupt"), strict=True))
    if clean.ndim != 2 or clean.shape != corrupt.shape:
        raise ValueError(
            f"clean and corrupt must both be tokens [N, T], got {list(clean.shape)} and {list(corrupt.shape)}"
        )
    if clean.is_meta or corrupt.is_meta:
        raise ValueError("clean and corrupt must be tokens with values, got tensors on the meta device")
    lengths = torch.full((len(clean),), clean.shape[1], device="cpu")
    answers = torch.full((len(clean), 1), -1, device="cpu")
    wrong = answers[:, :0]
    return PromptPairs(clean.cpu(), corrupt.cpu(), lengths, lengths - 1, answers, wrong)


def check_model(model: Model) -> None:
    """ValueError for what is no model, or one without values; RuntimeError for one on a device without float64."""
    if not isinstance(model, Model):
        raise ValueError(f"model must be a Model, as eapcore.load returns, got a {type(model).__name__}")
    if model.device.type == "meta":
        raise ValueError("a model on the meta device has no weights: it is for planning alone, load it on another")
    usable(model.device)


def check_pairs(model: Model, pairs: PromptPairs, ablation: str) -> None:
    """Raise ValueError where prompts, positions or answers do not fit the model, or there is nothing to ablate with."""
    pairs.check_shapes()
    pairs.check_words(model.tokenizer, model.name)
    for what, tokens in (("clean prompts", pairs.clean), ("corrupt prompts", pairs.corrupt)):
        try:
            check_tokens(model, tokens, what)
        except ValueError as error:
            outside = ((tokens < 0) | (tokens >= model.config.d_vocab)).any(-1) if tokens.ndim == 2 else tokens[:0]
            pair = int((outside if bool(outside.any()) else pairs.lengths).int().argmax()) if len(tokens) else 0
            raise ValueError(f"{error} (pair {pair})") from error
    pairs.check_positions()
    pairs.check_answers()
    pairs.check_vocabulary(model.config.n_logits, model.name)
    if ablation == "corrupt":
        pairs.check_corrupt()


def check_batch_size(size: int | str) -> None:
    """ValueError for what is neither "auto" nor a number of pairs."""
    if size != "auto" and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
        raise ValueError(f"batch_size must be 'auto' or a positive integer, got {size!r}")


def result_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which scores and effects are kept: float64 for a float64 model, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32
