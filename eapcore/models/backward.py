"""The backward pass, written by hand: from the logits down, a stage at a time, every receiver's gradient on the way.

The gradient that a stage's senders see is the sum of all later receivers' gradients, so the receivers that are made for
scoring are the backward pass: nothing is computed twice, and there is no autograd graph.
"""

from __future__ import annotations

from torch import Tensor

from eapcore.models.attention import Channels
from eapcore.models.backward_rules import GRADIENT, Rules
from eapcore.models.forward import StageSaved, by_prompt
from eapcore.models.matmul import product
from eapcore.models.model import Model
from eapcore.models.norm import NormInput
from eapcore.models.tensors import accumulate_dtype, on, spread


class Sink:
    """Who takes the gradients as the backward pass makes them; every method may be left as it is.

    at_read: the gradient is [.., Q, ..] at the positions that are read, and zero elsewhere.
    """

    def behind(self, name: str, senders: slice, grad: Tensor, at_read: bool) -> None:
        """The residual stream's gradient behind "embed", "a{l}" or "m{l}", [B, T, D]: what its senders add has it."""

    def units(self, index: int, grad: Tensor, at_read: bool) -> None:
        """The gradient of a layer's MLP hidden units behind the activation function, [B, T, M]."""

    def receiver(self, name: str, receiver: int, grad: Tensor, at_read: bool) -> None:
        """The gradient of the receiver of an MLP "m{l}" or of the "logits", [B, T, D]."""

    def room(self, receiver: int, at_read: bool) -> Tensor | None:
        """Where an MLP receiver's gradient [B, T, D] is to be written before `receiver` is given it; None: anywhere."""
        return None

    def channels(self, part: Channels) -> Tensor | None:
        """Take some of a layer's q, k and v receivers; returns the sum of their gradients, [B, T, D], or None where it
        has not made them one by one: then it is made without, see `Channels.added`."""
        return None


def backward(
    model: Model,
    saved: list[StageSaved],
    grad: Tensor,
    sink: Sink,
    *,
    rules: Rules = GRADIENT,
    past: list[Tensor] | None = None,
    read: Tensor | None = None,
) -> None:
    """Go back from the logits' receiver to the embedding and hand the gradients to a sink on the way.

    Args:
        model: the model.
        saved: what `run_stages` saved at the point where the gradient is taken; emptied on the way.
        grad: [B, Q, D] ∂metric/∂(last residual stream), the gradient of the logits' receiver.
        sink: what takes the gradients.
        rules: how the gradient goes through what is not linear, and where it does not go.
        past: for each layer the k and v heads of the positions before, which get no gradient: nothing differs there.
            Like `saved` on the layers' devices, where the sink gets their gradients.
        read: int64 [B, Q], the positions whose last residual stream has a gradient; None for all.
    """
    sink.receiver("logits", model.graph.logits, grad, read is not None)
    # ∂metric/∂(residual stream) behind the stage: [B, Q, D] behind the last layer's attention, else [B, T, D]
    total, narrow = grad.to(accumulate_dtype(grad.dtype)), grad  # the same in the weights' dtype
    for stage in reversed(model.stages):
        if total.device != stage.device:
            alike, total = narrow is total, on(total, stage.device)
            narrow = total if alike else on(narrow, stage.device)
        run, here = saved.pop(), on(read, stage.device) if stage.last and read is not None else None
        behind, behind_narrow = total, narrow
        if stage.mlp is not None and run.mlp is not None:
            mlp, place = stage.mlp.component, stage.mlp
            sink.behind(place.name, place.senders, behind, here is not None)
            if place.name not in rules.cut:
                units = mlp.units_grad(run.mlp, behind_narrow, rules)
                sink.units(stage.index, units, here is not None)
                grads = sink.room(place.receivers.start, here is not None)
                if grads is None:
                    grads = mlp.backward(run.mlp, units, rules)
                    total = narrow = total + grads
                else:
                    total, narrow = mlp.backward_added(run.mlp, units, total, grads, rules)
                del units
                sink.receiver(place.name, place.receivers.start, grads, here is not None)
                del grads
            del mlp  # whose weights need not be there with the next layers'
        if stage.attention is None or run.attention is None:
            continue
        heads = stage.attention
        sink.behind(heads.name, heads.senders, behind, here is not None)
        if heads.name in rules.cut:
            total = narrow = spread(total, here, run.attention.kv.shape[1])
            continue
        attention = heads.component
        pieces = attention.backward(
            run.attention,
            behind_narrow,
            model.closed_forms[stage.index],
            index=stage.index,
            receivers=heads.receivers,
            past=None if past is None else past[stage.index],
            read=here,
            rules=rules,
        )
        del behind, behind_narrow
        for part in pieces:
            summed = sink.channels(part)
            apart = here is not None and not part.at_read  # what is behind it is at the positions that are read alone
            if summed is None:
                total, narrow = part.added(total, here if apart else None)
            elif here is not None and apart:
                rows = here[:, :, None].expand(-1, -1, summed.shape[-1])
                total = narrow = summed.scatter_add_(1, rows, total)
            else:
                total = narrow = total + summed
            del part, summed  # before the next ones are made
        del attention, pieces
    sink.behind("embed", slice(0, 1), on(total, model.device), False)


def logits_grad(
    model: Model, d_logits: Tensor, norm_in: NormInput, rules: Rules = GRADIENT, tokens: Tensor | None = None
) -> Tensor:
    """∂metric/∂(last residual stream), [..., D], from ∂metric/∂logits [..., V] and what the final norm read.

    tokens: int64 [B, n], where the logits are of these tokens alone, [C·B, n] of C runs of B prompts.
    """
    d_logits, rows = d_logits.to(model.dtype), model.weights.w_u.T
    if tokens is None:
        dn = product(d_logits, rows)
    else:
        dn = (by_prompt(d_logits, tokens) @ rows[tokens]).transpose(0, 1).flatten(0, 1)
    return model.weights.ln_final.backward(dn, norm_in, rules.norm)
