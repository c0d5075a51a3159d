"""What is asked of a model: prompt pairs, a metric and an ablation, checked to fit each other."""

from __future__ import annotations

import platform
from typing import Annotated, Any

import torch
from torch import Tensor

from eapcore.models.forward import check_tokens, first_non_finite
from eapcore.models.model import Model
from eapcore.tasks import PromptPairs

Task = PromptPairs | tuple[Annotated[Tensor, "int64 N T"], Annotated[Tensor, "int64 N T"]]


def describe(model: Model, pairs: PromptPairs) -> dict[str, Any]:
    """What a file says of the model, the task, and what ran: the part of `meta` that all methods share."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        own = version("eapcore")
    except PackageNotFoundError:
        own = "source tree"
    return {
        "model": {"name": model.name, "content_hash": model.content_hash},
        "task": {"name": pairs.name, "n_pairs": len(pairs), "seed": pairs.seed},
        "dtype": str(model.dtype).removeprefix("torch."),
        "versions": {"eapcore": own, "torch": torch.__version__, "python": platform.python_version()},
    }


def as_pairs(task: Task) -> PromptPairs:
    """(clean, corrupt) tokens [N, T] as pairs that are read at their last position and have no answers."""
    if isinstance(task, PromptPairs):
        return task
    if not isinstance(task, tuple | list) or len(task) != 2 or not all(isinstance(t, Tensor) for t in task):
        raise ValueError(f"task must be PromptPairs or (clean, corrupt) tokens, got {type(task).__name__}")
    clean, corrupt = task
    if clean.ndim != 2 or clean.shape != corrupt.shape:
        raise ValueError(
            f"clean and corrupt must both be tokens [N, T], got {list(clean.shape)} and {list(corrupt.shape)}"
        )
    lengths = torch.full((len(clean),), clean.shape[1], device="cpu")
    answers = torch.full((len(clean), 1), -1, device="cpu")
    wrong = answers[:, :0]
    return PromptPairs(clean.cpu(), corrupt.cpu(), lengths, lengths - 1, answers, wrong)


def check_pairs(model: Model, pairs: PromptPairs, ablation: str) -> None:
    """Raise ValueError where prompts, positions or answers do not fit the model, or there is nothing to ablate with."""
    check_tokens(model, pairs.clean, "clean prompts")
    check_tokens(model, pairs.corrupt, "corrupt prompts")
    pairs.check_positions()
    pairs.check_vocabulary(model.config.d_vocab, model.name)
    if ablation == "corrupt":
        pairs.check_corrupt()


def check_finite(model: Model, pairs: PromptPairs, values: Tensor) -> None:
    """Raise ValueError where a metric's value is not finite, naming the layer if it is the activations' fault."""
    bad = values.isfinite().all(0).logical_not().nonzero()
    if not len(bad):
        return
    for pair in bad[:, 0].tolist():
        length = int(pairs.lengths[pair])
        prompts = torch.stack([pairs.clean[pair, :length], pairs.corrupt[pair, :length]])
        where = first_non_finite(model, prompts.to(model.device))
        if where is not None:
            raise ValueError(
                f"{where} has NaN or infinite activations on pair {pair}: are the weights damaged, or is "
                f"{model.dtype} too narrow for this model?"
            )
    raise ValueError(f"the metric is NaN or infinite on pair {int(bad[0])}: it must be finite on every pair")
