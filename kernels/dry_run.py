"""The ops on meta tensors, which have shapes and no memory: what they allocate on a device, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import checks


@dataclass(frozen=True, slots=True)
class DryRun:
    """device: where the ops would run. contracting: called where `edge_scores_factored` would make its workspace. ran:
    called with an op's name and the tensors that it would read and write, of `receiver_grads` its working memory too,
    of `edge_scores` also `before`, of which some may be None; of factors with what holds them, `chunk` and `before`.
    """

    device: torch.device
    contracting: Callable[[], None]
    ran: Callable[..., None]


active: ContextVar[DryRun | None] = ContextVar("eapcore_dry_run", default=None)


@contextmanager
def dry_run(
    device: torch.device, contracting: Callable[[], None], ran: Callable[..., None] = lambda op, *tensors: None
) -> Iterator[None]:
    """Inside, ops on meta tensors allocate, on meta, what they would on `device`."""
    token = active.set(DryRun(device, contracting, ran))
    try:
        yield
    finally:
        active.reset(token)


def edge_scores(
    run: DryRun, delta: Tensor, grads: Tensor, mask: Tensor | None, before: Sequence[int] | None, reduce: str,
    workspace: Callable[..., int],
) -> Tensor:  # fmt: skip
    sizes = checks.Sizes(delta.shape[1], delta.shape[2], delta.shape[3], senders=len(delta), receivers=len(grads))
    how = {"dtype": delta.dtype, "device": run.device, "mask": mask, "before": before, "reduce": reduce}
    _hold(workspace("edge_scores", sizes, **how))
    lead = {"all": (), "pair": (sizes.batch,), "position": (sizes.tokens,)}[reduce]
    scores = delta.new_empty((*lead, len(delta), len(grads)), dtype=checks.output_dtype(delta.dtype))
    run.ran("edge_scores", delta, grads, scores, before)
    return scores


def receiver_grads(
    run: DryRun, g: Tensor, act: Tensor, weight: Tensor, norm: checks.Norm, sums: Tensor | None, out: Tensor | None,
    workspace: Callable[..., int],
) -> Tensor:  # fmt: skip
    channels, batch, tokens, d_head = g.shape
    read_through = {
        "normed": norm.kind != "none",
        "centred": norm.kind == "layernorm",
        "summed": sums is not None,
    }
    sizes = checks.Sizes(batch, tokens, weight.shape[1], channels=channels, d_head=d_head, **read_through)
    held = _hold(workspace("receiver_grads", sizes, dtype=g.dtype, device=run.device))
    made = g.new_empty((channels, batch, tokens, weight.shape[1])) if out is None else out
    stream = norm.x if norm.x_hat is None else norm.x_hat
    run.ran("receiver_grads", g, act, weight, stream, made, sums, held)
    return made


def edge_scores_factored(
    run: DryRun, senders: Any, receivers: Any, chunk: int | None, before: Sequence[int] | None, reduce: str
) -> Tensor:
    run.contracting()
    embed, dz = senders.embed, senders.dz
    channels = sum(len(w) for w in receivers.weight[0])
    mlps = senders.mlp is not None
    batch, tokens, d_model = embed.shape
    sizes = checks.Sizes(batch, tokens, d_model, channels=channels, layers=len(dz), heads=dz.shape[3], mlps=mlps)
    lead = {"all": (), "pair": (sizes.batch,), "position": (sizes.tokens,)}[reduce]
    scores = embed.new_empty((*lead, sizes.all_senders, sizes.all_receivers), dtype=checks.output_dtype(embed.dtype))
    run.ran("edge_scores_factored", senders, receivers, scores, chunk, before)
    return scores


def _hold(count: int) -> Tensor:
    """Memory that is there while the op runs."""
    return torch.empty(count, dtype=torch.uint8, device="meta")
