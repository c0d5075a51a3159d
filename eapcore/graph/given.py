"""What results are made of, as callers have it: arrays and lists become tensors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from eapcore.graph.graph import Graph
from eapcore.kernels.torch_ops import as_tensor


def take_tensors(result: object, numbers: Sequence[str], marks: Sequence[str] = ()) -> None:
    """Put tensors without gradients in the place of what a result's fields hold, None excepted.

    numbers: fields of real numbers. marks: of bool.

    Raises:
        ValueError: a graph that is none; what is no array of numbers, or a tensor without values.
    """
    graph = getattr(result, "graph", None)
    if not isinstance(graph, Graph):
        raise ValueError(f"graph must be a Graph, got a {type(graph).__name__}")
    for name in (*numbers, *marks):
        given = getattr(result, name)
        if given is None:
            continue
        try:
            made = as_tensor(np.asarray(given) if isinstance(given, list | tuple) else given, name)
        except ValueError as error:  # of numpy, for rows of several lengths
            raise ValueError(f"{name} must be a tensor or an array of numbers: {error}") from error
        if made.is_meta or made.is_complex() or (made.dtype == torch.bool) != (name in marks):
            kind = "bool" if name in marks else "real numbers"
            raise ValueError(f"{name} must be {kind} with values, got {made.dtype} {list(made.shape)} on {made.device}")
        if made is not given or made.requires_grad:
            object.__setattr__(result, name, made.detach())
