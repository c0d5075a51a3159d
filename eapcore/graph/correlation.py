"""Correlations of two rows of numbers."""

from __future__ import annotations

from typing import Annotated

from torch import Tensor


def line(x: Annotated[Tensor, "E"], y: Annotated[Tensor, "E"]) -> tuple[float, float]:
    """(correlation, slope of y on x); NaN where one of them is constant."""
    x, y = x - x.mean(), y - y.mean()
    xy, xx, yy = float(x @ y), float(x @ x), float(y @ y)
    nan = float("nan")
    return (xy / (xx * yy) ** 0.5 if xx * yy > 0 else nan), (xy / xx if xx > 0 else nan)


def ranks(x: Annotated[Tensor, "E"]) -> Annotated[Tensor, "float64 E"]:
    """Ranks from 0, equal values at their mean rank, float64."""
    _, inverse, counts = x.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double() - 1
    return (last - (counts.double() - 1) / 2)[inverse]
