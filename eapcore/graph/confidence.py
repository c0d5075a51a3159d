"""Confidence intervals of what is measured on some pairs, for the population that these were drawn from."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Annotated

from torch import Tensor

LEVEL = 0.95


@lru_cache(maxsize=64)
def student_t(n: int, level: float = LEVEL) -> float:
    """How many standard errors of a mean of n values lie to either side of it in a confidence interval: t with
    P(|T| < t) = level for Student's distribution with n − 1 degrees of freedom, n ≥ 2.

    Source: Abramowitz, Stegun 1964, 26.7.3 and 26.7.4.
    """
    freedom = min(n - 1, 1000)  # from there on it is within 0.2 % of the normal distribution's
    odd = freedom % 2

    def inside(angle: float) -> float:
        """P(|T| < √freedom · tan angle)."""
        cosine = math.cos(angle)
        term = total = (cosine if freedom > 1 else 0.0) if odd else 1.0
        for k in range(2 + odd, freedom - 1, 2):
            term *= cosine**2 * (k - 1) / k
            total += term
        total *= math.sin(angle)
        return 2 / math.pi * (angle + total) if odd else total

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < level else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def interval(value: float, without: Annotated[Tensor, "float64 N"]) -> tuple[float, float]:
    """The confidence interval of a value of N pairs, from what it is without each of them.

        value ∓ t · √((N − 1)/N · Σ (without_i − their mean)²)

    Source: Tukey 1958, "Bias and confidence in not quite large samples" (the jackknife).
    """
    n = len(without)
    error = math.sqrt((n - 1) / n * float((without - without.mean()).square().sum()))
    reach = student_t(n) * error
    return value - reach, value + reach
