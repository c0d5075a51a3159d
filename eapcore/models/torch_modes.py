"""torch's modes that a caller may be in, and under which nothing here shall run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def own_modes(function: Callable[P, R]) -> Callable[P, R]:
    """Run a function outside the caller's autocast and inference mode.

    Autocast would make products in another dtype than the model's, which the result names; in inference mode no metric
    has a gradient.
    """

    @functools.wraps(function)
    def call(*args: P.args, **options: P.kwargs) -> R:
        with ExitStack() as modes:
            if torch.is_inference_mode_enabled():
                modes.enter_context(torch.inference_mode(False))
                modes.enter_context(torch.no_grad())
            for kind in ("cpu", "cuda"):
                if torch.is_autocast_enabled(kind):
                    modes.enter_context(torch.autocast(kind, enabled=False))
            return function(*args, **options)

    return call
