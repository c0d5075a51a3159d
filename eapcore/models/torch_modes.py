"""torch's modes that a caller may be in, and under which nothing here shall run; and as many threads as pay."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ParamSpec, TypeVar

import torch

from eapcore.models.config import ModelConfig

P = ParamSpec("P")
R = TypeVar("R")

# Multiply-adds of one product with which a thread more is worth that the others wait for it, and a batch's rows. A wait
# takes 20 to 50 µs where threads sleep, and milliseconds where they spin and another process holds a core.
_WORTH, _ROWS = 1 << 24, 512


def own_modes(function: Callable[P, R]) -> Callable[P, R]:
    """Run a function of a model, or of what has one, outside the caller's autocast and inference mode, and with as many
    threads as its products are worth.

    Autocast would make products in another dtype than the model's, which the result names; in inference mode no metric
    has a gradient.
    """

    @functools.wraps(function)
    def call(*args: P.args, **options: P.kwargs) -> R:
        with ExitStack() as modes:
            modes.enter_context(_threads((*args, *options.values())))
            if torch.is_inference_mode_enabled():
                modes.enter_context(torch.inference_mode(False))
                modes.enter_context(torch.no_grad())
            for kind in ("cpu", "cuda"):
                if torch.is_autocast_enabled(kind):
                    modes.enter_context(torch.autocast(kind, enabled=False))
            return function(*args, **options)

    return call


@contextmanager
def _threads(given: Sequence[Any]) -> Iterator[None]:
    """As many of torch's threads as the products of a small model are worth, one that a function is given or that of
    an experiment; a number that the environment sets stays.

    torch gives the number to other threads that first use it meanwhile, and these keep it.
    """
    before = torch.get_num_threads()
    models = [getattr(x, "model", x) for x in given]
    config, device = next(
        ((x.config, x.device) for x in models if isinstance(getattr(x, "config", None), ModelConfig)), (None, None)
    )
    chosen = "OMP_NUM_THREADS" in os.environ or "MKL_NUM_THREADS" in os.environ
    if config is None or getattr(device, "type", None) != "cpu" or chosen:
        yield
        return
    widest = max(3 * config.n_heads * config.d_head, config.d_mlp or 0, config.d_vocab // 8)  # logits of few positions
    worth = max(1, _ROWS * config.d_model * widest // _WORTH)
    if worth >= before:
        yield
        return
    torch.set_num_threads(worth)
    try:
        yield
    finally:
        torch.set_num_threads(before)
