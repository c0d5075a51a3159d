"""Metrics: one number a prompt pair from the logits at its answer position. Higher is better, always.

A metric is any callable that takes the logits, float64 [B, V] at the answer positions, and if it has a second required
parameter also a `MetricBatch`, changes neither of them, and returns one value a pair, [B]. The named ones are in
METRICS; they also take the logits of several runs of the batch, [C, B, V], and return [C, B].
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Annotated, Any

import torch
from torch import Tensor

Metric = Callable[..., Annotated[Tensor, "B"]]


@dataclass(frozen=True, slots=True)
class MetricBatch:
    """What a metric may look at besides the logits.

    answers, wrong: int64 [B, A], [B, W], padded with −1. clean_logits, corrupt_logits: [B, V] of the unpatched runs;
    for a named metric that reads no other tokens, those of the answers alone. index: int64 [B], which pairs of the task
    these are.
    """

    answers: Annotated[Tensor, "int64 B A"]
    wrong: Annotated[Tensor, "int64 B W"]
    clean_logits: Annotated[Tensor, "float64 B V | B V'"]
    corrupt_logits: Annotated[Tensor, "float64 B V | B V'"]
    index: Annotated[Tensor, "int64 B"]


def _set_sum(values: Tensor, ids: Tensor) -> Tensor:
    """Σ of values [..., B, V] over the token sets ids [B, A], padding left out: [..., B]."""
    return (_chosen(values, ids) * (ids >= 0)).sum(-1)


def _set_mean(values: Tensor, ids: Tensor) -> Tensor:
    return _set_sum(values, ids) / (ids >= 0).sum(-1)


def _chosen(values: Tensor, ids: Tensor) -> Tensor:
    """values [..., B, V] at the tokens ids [B, A], anything where there is none: [..., B, A]."""
    return values.gather(-1, ids.clamp_min(0).expand(*values.shape[:-2], -1, -1))


def logit_diff(logits: Annotated[Tensor, "float64 B V | B V'"], batch: MetricBatch) -> Annotated[Tensor, "B"]:
    """mean logit of the answers − mean logit of the wrong answers (one token each in IOI)."""
    return _set_mean(logits, batch.answers) - _set_mean(logits, batch.wrong)


def prob_diff(logits: Annotated[Tensor, "float64 B V"], batch: MetricBatch) -> Annotated[Tensor, "B"]:
    """Σ P(answers) − Σ P(wrong answers), as in Greater-Than."""
    ids = torch.cat([batch.answers, batch.wrong], 1)
    each = _chosen(logits.softmax(-1), ids).masked_fill(ids < 0, 0)
    right = batch.answers.shape[1]
    return each[..., :right].sum(-1) - each[..., right:].sum(-1)


def logit_margin(logits: Annotated[Tensor, "float64 B V | B V'"], batch: MetricBatch) -> Annotated[Tensor, "B"]:
    """mean logit of the answers − the largest logit of the wrong answers, as in Docstring."""
    wrong = _chosen(logits, batch.wrong).masked_fill(batch.wrong < 0, -torch.inf)
    return _set_mean(logits, batch.answers) - wrong.amax(-1)


def nll(logits: Annotated[Tensor, "float64 B V"], batch: MetricBatch) -> Annotated[Tensor, "B"]:
    """−(negative log-probability) = log Σ P(answers): with its sign turned, so that higher is better here too."""
    chosen = _chosen(logits.log_softmax(-1), batch.answers)
    return chosen.masked_fill(batch.answers < 0, -torch.inf).logsumexp(-1)


def kl(logits: Annotated[Tensor, "float64 B V"], batch: MetricBatch) -> Annotated[Tensor, "B"]:
    """−KL(P_clean ‖ P): with its sign turned, so that higher is better here too. Its gradient at the clean run is 0."""
    reference = batch.clean_logits.log_softmax(-1)
    return (reference.exp() * (logits.log_softmax(-1) - reference)).sum(-1)


METRICS: dict[str, Metric] = {
    "logit_diff": logit_diff,
    "prob_diff": prob_diff,
    "logit_margin": logit_margin,
    "nll": nll,
    "kl": kl,
}
_NEEDS_WRONG = ("logit_diff", "prob_diff", "logit_margin")
_NEEDS_ANSWERS = (*_NEEDS_WRONG, "nll")
_READS_ANSWERS = (logit_diff, logit_margin)  # and wrong answers, and no other token's logit


def find_metric(
    metric: str | Metric, answers: Annotated[Tensor, "int64 N A"], wrong: Annotated[Tensor, "int64 N W"]
) -> tuple[str, Metric]:
    """The name and the callable of a metric, checked against a task's answers [N, A] and wrong answers [N, W].

    Raises:
        ValueError: an unknown name, or a metric that needs answers or wrong answers where a pair has none.
    """
    if not callable(metric):
        if not isinstance(metric, str) or metric not in METRICS:
            raise ValueError(f"metric must be one of {', '.join(METRICS)} or a callable, got {metric!r}")
        metric = METRICS[metric]
    name = next((n for n, m in METRICS.items() if m is metric), getattr(metric, "__qualname__", type(metric).__name__))
    if METRICS.get(name) is not metric:
        _check_arguments(name, metric)
        return name, metric
    if name in _NEEDS_WRONG and (pair := _first_without(wrong)) is not None:
        raise ValueError(f"the metric {name} needs wrong answers, but pair {pair} has none: nll needs none")
    if name in _NEEDS_ANSWERS and (pair := _first_without(answers)) is not None:
        raise ValueError(f"the metric {name} needs answers, but pair {pair} has none: give PromptPairs, or a callable")
    return name, metric


def check_apart(name: str, metric: Metric, logits: Annotated[Tensor, "float64 B V"], batch: MetricBatch) -> None:
    """Raise ValueError for a caller's metric whose value of a pair hangs on the other pairs of the batch.

    The first and the last pair alone must have the values that they have in the batch, and weighted values must have
    weighted gradients. Of a large batch three pairs are tried, which takes no memory to speak of. What cannot be tried
    so, such as a metric for batches of one size, is let through.
    """
    n = len(logits)
    if metric in METRICS.values() or getattr(metric, "several_positions", False) or n < 2:
        return
    if n > 3 and logits.numel() > 1 << 16:
        some = [0, 1, n - 1]
        logits, batch, n = (
            logits[some],
            MetricBatch(*(getattr(batch, part.name)[some] for part in fields(MetricBatch))),
            3,
        )
    weight = 1.0 + torch.arange(n, device=logits.device)
    moved = 0.0
    try:
        with torch.enable_grad(), warnings.catch_warnings(action="ignore"):
            leaf = logits.detach().clone().requires_grad_()
            values = evaluate(metric, leaf, batch)
            plain, weighted = (
                torch.autograd.grad(sums, leaf, retain_graph=True)[0]
                for sums in (values.sum(), (values * weight).sum())
            )
            values = values.detach()
            moved = float((weighted - weight[:, None] * plain).abs().max()) / n
            scale = float(plain.abs().max()) + float(values.abs().max())
            for row in (slice(0, 1), slice(n - 1, n)):
                alone = MetricBatch(*(getattr(batch, part.name)[row] for part in fields(MetricBatch)))
                off = float((evaluate(metric, logits[row], alone).detach() - values[row]).abs().max())
                moved = max(moved, off if math.isfinite(off) else math.inf)
    except Exception:  # whatever a caller's function raises; what is wrong with it is said where it is used
        scale = 0.0 if moved == 0 else float(logits.abs().max())
    if math.isfinite(scale) and moved > 1e-9 * scale > 0:
        raise ValueError(
            f"the metric {name} gives a pair a value that hangs on the other pairs of its batch, so scores would hang "
            "on the batch size: return each pair's own value, without a mean or a scale over the batch"
        )


def _first_without(ids: Tensor) -> int | None:
    """The first pair that has no token in its set of ids [N, A], None if every pair has one."""
    without = (ids >= 0).any(1).logical_not().nonzero()
    return int(without[0]) if len(without) else None


def tokens_read(
    metric: Metric, answers: Annotated[Tensor, "int64 B A"], wrong: Annotated[Tensor, "int64 B W"], d_vocab: int
) -> tuple[Annotated[Tensor, "int64 B V'"], Annotated[Tensor, "int64 B A"], Annotated[Tensor, "int64 B W"]] | None:
    """Where a metric reads the logits of the answers and wrong answers alone, which tokens these are.

    Returns:
        (tokens int64 [B, A + W], and answers [B, A] and wrong [B, W] as places among them); None for any other metric,
        and for so many tokens that their columns of the unembedding would be more than all of it.
    """
    if metric not in _READS_ANSWERS or len(answers) * (answers.shape[1] + wrong.shape[1]) > d_vocab:
        return None
    tokens = torch.cat([answers, wrong], 1)
    places = torch.arange(tokens.shape[1], device=tokens.device).where(tokens >= 0, -1)
    return tokens.clamp_min(0), places[:, : answers.shape[1]], places[:, answers.shape[1] :]


def without_values(metric: Metric) -> Metric | None:
    """The metric, where it is one that runs on tensors without values: ours do, and of a caller's nobody knows."""
    return metric if metric in METRICS.values() and metric not in _READS_ANSWERS else None


def evaluate(
    metric: Metric, logits: Annotated[Tensor, "float64 B V | B V'"], batch: MetricBatch
) -> Annotated[Tensor, "B"]:
    """The metric's value for each pair, [B]; of a named metric also for several runs, [C, B] from [C, B, V].

    Whether it is finite is not looked at: that would wait for a GPU.

    Raises:
        ValueError: the metric returned no real tensor, or a wrong shape, or changed what it was given.
    """
    given = [logits, *(getattr(batch, part.name) for part in fields(batch))]
    before = [_version(x) for x in given]
    try:
        values: Any = metric(logits, batch) if _takes_batch(metric) else metric(logits)
    except RuntimeError as error:
        if "modified inplace" in str(error) or "in an in-place operation" in str(error):  # what needs a gradient
            raise ValueError(_IN_PLACE) from error
        raise
    except IndexError as error:
        raise ValueError(
            f"the metric cannot be computed from logits [B, V] = {list(logits.shape)}: {error}. They are those at the "
            "position that is read alone, not [B, T, V]: leave out the index of the position"
        ) from error
    if [_version(x) for x in given] != before:
        raise ValueError(_IN_PLACE)
    # Another tool's metric may read several positions of a pair, [B, Q, V].
    expected = logits.shape[:1] if getattr(metric, "several_positions", False) else logits.shape[:-1]
    if not isinstance(values, Tensor) or values.shape != expected:
        got = f"shape {list(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        hint = ": leave out the mean over the batch" if isinstance(values, Tensor) and values.ndim == 0 else ""
        raise ValueError(f"a metric must return one value a pair, [B] = {list(expected)}, got {got}{hint}")
    if values.is_complex():
        raise ValueError(f"a metric must return real numbers, got {values.dtype}")
    return values


_IN_PLACE = (
    "the metric changes the logits or the batch's tensors in place, which are read behind it too: make new ones, "
    "logits - x instead of logits -= x"
)


def _version(x: Any) -> int:
    """How often a tensor has been changed in place, 0 where that is not counted."""
    return x._version if isinstance(x, Tensor) and not x.is_inference() else 0


def _parameters(metric: Metric) -> list[inspect.Parameter]:
    """What a metric takes, of a torch module what its forward does; nothing where nobody knows."""
    try:
        return [*inspect.signature(getattr(metric, "forward", metric)).parameters.values()]
    except (TypeError, ValueError):
        return []


def _check_arguments(name: str, metric: Metric) -> None:
    """ValueError for a callable that needs more arguments than a metric gets, as those of EAP-IG and MIB do."""
    parameters = _parameters(metric)
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = [p.name for p in parameters if p.kind in kinds and p.default is p.empty]
    if len(required) > 2:
        raise ValueError(
            f"the metric {name} takes {', '.join(required)}, as those of EAP-IG do: here a metric takes the logits "
            "[B, V] at the position that is read and, if it likes, a MetricBatch of the answers, and returns [B]; give "
            "yours to eapcore.interop.eap_ig.attribute, or use 'logit_diff' or 'prob_diff'"
        )


def _takes_batch(metric: Metric) -> bool:
    parameters = _parameters(metric)
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p for p in positional if p.default is p.empty]
    return len(required) >= 2 or any(p.kind is p.VAR_POSITIONAL for p in parameters)
