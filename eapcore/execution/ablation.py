"""What a sender sends when it is ablated: zero, or what it sends on average over a reference task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from eapcore.kernels.checks import one_of
from eapcore.models.forward import check_tokens, embed, run_layers
from eapcore.models.mlp import activation
from eapcore.models.model import Model
from eapcore.tasks import PromptPairs

ABLATIONS = ("corrupt", "zero", "mean", "mean-positional")


@dataclass(frozen=True, slots=True)
class Values:
    """What every sender sends instead, for each position or [1, ..] for all of them.

    embed: [T, D]. z: [L, T, H, K], so that head h of layer l sends z[l, :, h] @ w_o[l][h]. mlp: [L, T, D], units:
    [L, T, M] the hidden units that it is made of; None without MLPs.
    """

    embed: Annotated[Tensor, "T D"]
    z: Annotated[Tensor, "L T H K"]
    mlp: Annotated[Tensor, "L T D"] | None
    units: Annotated[Tensor, "L T M"] | None
    meta: Mapping[str, Any]

    @staticmethod
    def at(
        x: Annotated[Tensor, "T ..."], stop: int, read: Annotated[Tensor, "int64 B Q"] | None
    ) -> Annotated[Tensor, "T ... | B Q ..."]:
        """One of them at the positions before `stop`, [T, ..], or at those read [B, Q], [B, Q, ..]."""
        if len(x) == 1:
            return x
        return x[:stop] if read is None else x[read]


def zeros(model: Model) -> Values:
    """Nothing is sent; an MLP's output bias is part of what it sends."""
    config, like = model.config, model.weights.w_e
    layers = config.n_layers
    mlp = None if config.d_mlp is None else like.new_zeros(layers, 1, config.d_model)
    units = None if config.d_mlp is None else like.new_zeros(layers, 1, config.d_mlp)
    z = like.new_zeros(layers, 1, config.n_heads, config.d_head)
    return Values(like.new_zeros(1, config.d_model), z, mlp, units, {"name": "zero"})


@torch.no_grad()
def means(model: Model, reference: PromptPairs, *, per_position: bool, batch_size: int = 16) -> Values:
    """Average what every sender sends over the clean prompts of a reference task.

        mean[s] = mean over prompts of (1/length) Σ_t e[s, t]        for each position: mean[s, t] = mean of e[s, t]
                                                                     over the prompts that are longer than t

    Every prompt counts once, by its own length. The clean prompts, as the EAP-IG code does: the mean then holds what
    the behaviour's prompts have in common, and ablating takes away what is particular to one of them.

    Raises:
        ValueError: the prompts do not fit the model.
    """
    check_tokens(model, reference.clean, "reference prompts")
    sums: dict[str, Tensor] = {}
    longest = int(reference.lengths.max())
    for batch in reference.batches(batch_size):
        tokens, lengths = batch.clean.to(model.device), batch.lengths.to(model.device)
        inside = torch.arange(tokens.shape[1], device=model.device) < lengths[:, None]  # [B, T]
        weights = inside.double() if per_position else inside / lengths[:, None].double()
        for name, x in _sent(model, tokens):
            if per_position:
                part = torch.einsum("bt...,bt->t...", x.double(), weights)
                total = sums.setdefault(name, part.new_zeros(longest, *part.shape[1:]))
                total[: len(part)] += part
            else:
                part = torch.einsum("bt...,bt->...", x.double(), weights)[None]
                sums[name] = sums[name] + part if name in sums else part
    if per_position:
        lengths = reference.lengths[:, None].to(model.device)
        counts = (lengths > torch.arange(longest, device=model.device)).sum(0)
    else:
        counts = torch.tensor([len(reference)], device=model.device)
    mean = {name: (x / counts.view(-1, *[1] * (x.ndim - 1))).to(model.dtype) for name, x in sums.items()}
    layers = range(model.config.n_layers)
    z, mlp, units = (
        torch.stack([mean[f"{name}{index}"] for index in layers]) if f"{name}0" in mean else None
        for name in ("z", "mlp", "units")
    )
    assert z is not None
    name = "mean-positional" if per_position else "mean"
    meta = {"name": name, "reference": reference.name, "n_prompts": len(reference), "prompts": "clean"}
    return Values(mean["embed"], z, mlp, units, meta)


def _sent(model: Model, tokens: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What the senders are made of, [B, T, ..] by name, a layer at a time."""
    x = embed(model, tokens)
    yield "embed", x
    for index, run in enumerate(run_layers(model, x)):
        yield f"z{index}", run.z
        if run.mlp is not None and run.saved.hidden is not None and model.config.act_fn is not None:
            yield f"mlp{index}", run.mlp
            yield f"units{index}", activation(model.config.act_fn, run.saved.hidden)


def find_values(model: Model, pairs: PromptPairs, ablation: str, reference: PromptPairs | None) -> Values | None:
    """The values of an ablation by name, None for the corrupt prompts.

    Raises:
        ValueError: an unknown ablation; a reference that is not used, or is too short for a mean for each position.
    """
    one_of("ablation", ablation, ABLATIONS)
    if not ablation.startswith("mean"):
        if reference is not None:
            raise ValueError(f"a reference task belongs to the ablations mean and mean-positional, got {ablation!r}")
        return zeros(model) if ablation == "zero" else None
    reference = pairs if reference is None else reference
    if not isinstance(reference, PromptPairs):
        raise ValueError(f"reference must be PromptPairs, got {type(reference).__name__}")
    longest, needed = int(reference.lengths.max()), int(pairs.positions.max()) + 1
    if ablation == "mean-positional" and longest < needed:
        raise ValueError(
            f"a mean for each position needs reference prompts as long as the task's, {needed} tokens, but the longest "
            f"has {longest}"
        )
    return means(model, reference, per_position=ablation == "mean-positional")


def ablated_senders(
    model: Model, pairs: PromptPairs, ablation: str, reference: PromptPairs | None
) -> tuple[Tensor | None, dict[str, Any]]:
    """What senders send under an ablation, see `Question`, and what a file says of it."""
    values = find_values(model, pairs, ablation, reference)
    if values is None:
        return None, {"name": ablation}
    senders = [values.embed[None]]
    for index, layer in enumerate(model.weights.layers):
        senders.append(torch.einsum("thk,hkd->htd", values.z[index], layer.w_o))
        if values.mlp is not None:
            senders.append(values.mlp[index][None])
    return torch.cat(senders), dict(values.meta)
