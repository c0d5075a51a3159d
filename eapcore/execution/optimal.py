"""Optimal constants: for each sender that which the model misses least when it is sent everywhere instead.

    a[s] = argmin over a of  mean over prompts of KL(P_clean ‖ P_a),   P_a: the predictions where the metric reads, of
           the run in which s sends a at every position and all behind it follows

A head's constant is one of its mixtures of v, [K]. Each sender is ablated alone. From the means on, Adam steps against
the gradient in units of how far from its mean a sender's output is, in root mean square; of the constants that were
tried the best is taken, so that none is worse than the mean. No random numbers are drawn. Source: Li, Janson 2024,
*Optimal ablation for interpretability*, section 2, and its code.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

import eapcore.execution.limits as limits
from eapcore.execution.adam import Adam
from eapcore.execution.progress import Count, Progress
from eapcore.models.forward import StageRun, embed, run_stages, unembed
from eapcore.models.model import Model
from eapcore.models.tensors import at_positions, on
from eapcore.tasks.pairs import PromptPairs

STEPS, RATE = 30, 0.1


@torch.no_grad()
def optimal_constants(
    model: Model,
    reference: PromptPairs,
    means: Mapping[str, Tensor],
    *,
    steps: int = STEPS,
    rate: float = RATE,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """The constants by name, in float64: "embed" [1, D], of each layer's heads "z{l}" [1, H, K], MLP "mlp{l}" [1, D].

    Args:
        model: the model.
        reference: whose clean prompts are run, and where they are read.
        means: where the constants start.
        steps, rate: of Adam.
        batch_size: prompts at a time.
        progress: called with (steps × senders × prompts done, in all).
    """
    names = [name for name in means if not name.startswith("units")]
    start = {name: means[name].double() for name in names}
    width, found = _deviations(model, reference, start, batch_size), {}
    # One vector for each sender, [C, ...]: a layer's heads, or one.
    x = {name: _rows(name, start[name]).clone() for name in names}
    adam = {name: Adam(torch.zeros_like(rows), rate) for name, rows in x.items()}
    best = {name: (torch.full((len(rows),), torch.inf, dtype=torch.float64, device=rows.device), rows.clone())
        for name, rows in x.items()}  # fmt: skip
    count = Count(progress, steps * sum(len(rows) for rows in x.values()) * len(reference))
    for _ in range(steps):
        losses = {name: torch.zeros(len(rows), dtype=torch.float64, device=rows.device) for name, rows in x.items()}
        slopes = {name: torch.zeros_like(rows) for name, rows in x.items()}
        for batch in reference.batches(batch_size):
            run = _Clean.of(model, batch)
            for name, some, loss, slope in run.through(x):
                losses[name][some] += loss / len(reference)
                slopes[name][some] += slope / len(reference)
                count.add(len(loss) * len(batch))
        for name, rows in x.items():
            least, kept = best[name]
            better = losses[name] < least
            least[better], kept[better] = losses[name][better], rows[better]
            scale = width[name].view(-1, *[1] * (rows.ndim - 1))
            adam[name].step(slopes[name] * scale)
            x[name] = _rows(name, start[name]) + scale * adam[name].x
    for name in names:
        found[name] = best[name][1].view_as(start[name])
    return found


def _rows(name: str, x: Tensor) -> Tensor:
    """A constant [1, ...] by senders: of a layer's heads [H, K]."""
    return x[0] if name[0] == "z" else x


def _deviations(
    model: Model, reference: PromptPairs, means: Mapping[str, Tensor], batch_size: int
) -> dict[str, Tensor]:
    """How far each sender's numbers are from their mean over prompts and positions, in root mean square: [C]."""
    sums: dict[str, Tensor] = {}
    for batch in reference.batches(batch_size):
        tokens, lengths = batch.clean.to(model.device), batch.lengths.to(model.device)
        inside = (torch.arange(tokens.shape[1], device=model.device) < lengths[:, None]) / lengths[:, None].double()
        x = embed(model, tokens)
        sent = {"embed": x}
        for run in run_stages(model, x):
            sent |= _sent(run, model.device)
        for name, values in sent.items():
            moved = (values.double() - means[name]).square().mean(-1)  # [B, T, H] or [B, T]
            part = torch.einsum("bt...,bt->...", moved, inside) / len(reference)
            sums[name] = sums[name] + part if name in sums else part
    return {name: x.view(-1).sqrt() for name, x in sums.items()}


def _sent(run: StageRun, device: torch.device) -> dict[str, Tensor]:
    """What a stage's components send, or what it is made of, on a device."""
    index, found = run.stage.index, {}
    if run.attention is not None:
        found[f"z{index}"] = on(run.attention.z, device)
    if run.mlp is not None:
        found[f"mlp{index}"] = on(run.mlp.sent, device)
    return found


@dataclass(frozen=True, slots=True)
class _Clean:
    """A batch's clean run: what each sender sent, the streams in front of each stage and behind the last, the number
    of the stage behind which a sender's output is added, and the log probabilities [B, V] where it is read."""

    model: Model
    read: Tensor
    sent: dict[str, Tensor]
    streams: list[Tensor]
    behind: dict[str, int]
    logs: Tensor

    @staticmethod
    def of(model: Model, batch: PromptPairs) -> _Clean:
        tokens, read = batch.clean.to(model.device), batch.positions.to(model.device)[:, None]
        tokens = tokens[:, : int(read.max()) + 1]
        x = embed(model, tokens)
        sent, streams, behind = {"embed": x}, [x], {"embed": 0}
        for number, run in enumerate(run_stages(model, x, read=read)):
            own = _sent(run, model.device)
            sent |= own
            behind |= dict.fromkeys(own, number + 1)
            streams.append(on(run.out, model.device))
        return _Clean(model, read, sent, streams, behind, _logs(model, streams[-1][:, 0]))

    def through(self, x: Mapping[str, Tensor]) -> Iterator[tuple[str, slice, Tensor, Tensor]]:
        """Of each sender the KL, summed over the batch's prompts, and its derivative by the constant: the name of what
        it belongs to, which of these it is, [C] and [C, ...]."""
        model = self.model
        for name, rows in x.items():
            stream = self.streams[self.behind[name]]
            at_once = max(1, limits.limits(model.device).copy_tokens // stream[..., 0].numel())
            at_once = max(1, min(at_once, limits.LOGITS // self.logs.numel()))
            for first in range(0, len(rows), at_once):
                some = slice(first, min(first + at_once, len(rows)))
                with torch.enable_grad():
                    leaf = rows[some].to(model.dtype).requires_grad_()
                    logs = self.ablated(name, some, leaf)  # [C, B, V]
                    loss = (self.logs.exp() * (self.logs - logs)).sum((1, 2))
                    (slope,) = torch.autograd.grad(loss.sum(), leaf)
                yield name, some, loss.detach(), slope.double()

    def ablated(self, name: str, some: slice, constants: Tensor) -> Tensor:
        """Log probabilities [C, B, V] where each of some senders alone sends a constant."""
        model, number = self.model, self.behind[name]
        stream, sent = self.streams[number], self.sent[name]
        if name[0] == "z":
            attention = model.attentions[int(name[1:])]
            moved = constants[:, None, None] - sent.to(model.dtype).movedim(2, 0)[some]  # [C, B, Q, K]
            w_send = on(attention.w_send[some], moved.device)
            moved = (moved.flatten(1, 2) @ w_send).unflatten(1, sent.shape[:2])
        else:
            moved = constants[:, None, None] - sent
        x = (stream + moved).flatten(0, 1)
        for run in run_stages(model, x, first=number, read=self.read.repeat(len(constants), 1)):
            x = run.out
        x = on(x, model.device)
        x = x if x.shape[1] == 1 else at_positions(x, self.read.repeat(len(constants), 1))
        return _logs(model, x[:, 0]).unflatten(0, (len(constants), -1))


def _logs(model: Model, x: Tensor) -> Tensor:
    return unembed(model, x)[0].double().log_softmax(-1)
