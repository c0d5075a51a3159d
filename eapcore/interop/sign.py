"""Which way other tools' scores point, and ours: negative = needed, of a metric of which more is better."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from eapcore.graph.scores import EDGE_SIGN, NO_SIGN, UNKNOWN_SIGN, EdgeScores

SIGNS = ("metric", "loss", "none")
"""What a score is: "metric", the change of something of which more is better, which is our own sign; "loss", of
something of which less is better; "none", a size without a sign."""
ASK = (
    "sign='metric' if more of what was differentiated is better, sign='loss' if less is, as with partial(metric, "
    "loss=True), sign='none' for sizes"
)
_TEXTS = {"metric": EDGE_SIGN, "loss": EDGE_SIGN, "none": f"score = a size; {NO_SIGN}", None: UNKNOWN_SIGN}
_SOURCE = "sign_of_source"
Values = TypeVar("Values", bound=Tensor | None)


def check_sign(sign: str | None) -> None:
    """ValueError for another word than those of SIGNS, or None for what is not known."""
    if sign is not None and sign not in SIGNS:
        raise ValueError(f"sign must be one of {', '.join(SIGNS)}, got {sign!r}: {ASK}")


def sign_of_metric(
    metric: Callable[..., Any], sign: str | None, call: Callable[[Callable[..., Any]], Tensor]
) -> str | None:
    """The sign that was given, or what a metric's keyword `loss`, as those of EAP-IG and MIB have it, says.

    call: the metric's value, to see whether the keyword turns it: some metrics have it, and pass it over.

    Raises:
        ValueError: the two contradict each other.
    """
    try:
        loss = inspect.signature(metric).parameters.get("loss")
    except (TypeError, ValueError):
        loss = None
    if loss is None or not isinstance(loss.default, bool):
        return sign
    one, other = (call(partial(metric, loss=flag)) for flag in (True, False))
    if not torch.allclose(one, -other):
        return sign
    said = "loss" if loss.default else "metric"
    if sign not in (None, said):
        raise ValueError(f"the metric is called with loss={loss.default}, but sign={sign!r}: leave one of them out")
    return said


def turned(values: Values, sign: str | None) -> Values:
    """Another tool's numbers as ours, or ours as another tool's."""
    return -values if sign == "loss" and values is not None else values  # type: ignore[return-value]


def signed(sign: str | None, meta: dict[str, Any]) -> dict[str, Any]:
    """meta of scores that were read, with the sign that they have now and the one that they had."""
    return {**meta, "sign": _TEXTS[sign], _SOURCE: sign}


def sign_to_write(scores: EdgeScores, sign: str | None, what: str) -> str | None:
    """The sign that a file gets: the one that was asked for, or the one that the scores came with.

    None for scores whose sign is not known and that are written as they are.

    Raises:
        ValueError: scores of our own without an answer, or unknown ones that would have to be turned.
    """
    check_sign(sign)
    if sign is None and _SOURCE in scores.meta:
        return scores.meta[_SOURCE]
    if sign is None:
        raise ValueError(
            f"{what} does not say which way its scores point: give {ASK}; MIB's circuit track reads a loss"
        )
    scores.check_sign("another sign")
    sizes = scores.unsigned
    if sizes != (sign == "none"):
        has = "have no sign" if sizes else "have one"
        raise ValueError(f"these scores {has}, so that sign={sign!r} does not suit them: give {ASK}")
    return sign
