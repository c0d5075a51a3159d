"""Correlations of two rows of numbers."""

from __future__ import annotations

from typing import Annotated

from torch import Tensor


def line(x: Annotated[Tensor, "E"], y: Annotated[Tensor, "E"]) -> tuple[float, float]:
    """(correlation, slope of y on x); NaN where one of them is constant."""
    # A constant less its mean leaves the mean's rounding; beside the largest numbers no square over- or underflows.
    dx, dy = ((v - v.mean()) * (v.amax() > v.amin()) for v in (x, y))
    most_x, most_y = (float(v.abs().max()) or 1.0 for v in (dx, dy))
    dx, dy = dx / most_x, dy / most_y
    xy, xx, yy = float(dx @ dy), float(dx @ dx), float(dy @ dy)
    nan = float("nan")
    return (xy / (xx * yy) ** 0.5 if xx * yy > 0 else nan), (xy / xx * (most_y / most_x) if xx > 0 else nan)


def ranks(x: Annotated[Tensor, "E"]) -> Annotated[Tensor, "float64 E"]:
    """Ranks from 0, equal values at their mean rank, float64."""
    _, inverse, counts = x.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double() - 1
    return (last - (counts.double() - 1) / 2)[inverse]
