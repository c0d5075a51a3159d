"""What a sender sends when it is ablated: zero, its mean over a reference task, or a constant that is optimal there."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from eapcore.execution.optimal import RATE, STEPS, optimal_constants
from eapcore.execution.progress import Progress
from eapcore.graph.show import short
from eapcore.kernels.checks import one_of, short_repr
from eapcore.models.forward import check_tokens, embed, run_stages
from eapcore.models.model import Model
from eapcore.models.tensors import on
from eapcore.models.torch_modes import own_modes
from eapcore.tasks.pairs import PromptPairs

ABLATIONS = ("corrupt", "zero", "mean", "mean-positional", "optimal")
FROM_REFERENCE = ABLATIONS[2:]  # which are made of the prompts of a reference task
# Other tools' names, and ours.
_WORDS = dict.fromkeys(("patching", "resample", "noising", "counterfactual", "interchange"), "'corrupt'") | {
    "denoising": "'corrupt', with gradient_at='corrupt' where something is scored",
    "zero-ablation": "'zero'",
    "mean-ablation": "'mean'",
    "optimal-ablation": "'optimal'",
}


@dataclass(frozen=True, slots=True)
class Values:
    """What every sender sends instead, for each position or [1, ..] for all of them.

    embed: [T, D]. z: [L, T, H, K], so that head h of layer l sends z[l, :, h] @ w_o[l][h]. mlp: [L, T, D], units:
    [L, T, M] the hidden units that it is made of, None where they are not known; both None without MLPs. of_tokens:
    embed takes the place of the tokens' embedding alone and leaves that of the positions.
    """

    __repr__ = short

    embed: Annotated[Tensor, "T D"]
    z: Annotated[Tensor, "L T H K"]
    mlp: Annotated[Tensor, "L T D"] | None
    units: Annotated[Tensor, "L T M"] | None
    of_tokens: bool = False

    @staticmethod
    def at(
        x: Annotated[Tensor, "T ..."], stop: int, read: Annotated[Tensor, "int64 B Q"] | None
    ) -> Annotated[Tensor, "T ... | B Q ..."]:
        """One of them at the positions before `stop`, [T, ..], or at those read [B, Q], [B, Q, ..]."""
        if len(x) == 1:
            return x
        return x[:stop] if read is None else x[read]

    def senders(self, model: Model) -> Annotated[Tensor, "S T D"]:
        """The same as rows of the sender buffer."""
        senders = model.weights.w_e.new_empty(model.graph.n_senders, *self.embed.shape)
        senders[0] = self.embed
        for stage in model.stages:
            if stage.attention is not None:
                w_send = stage.attention.component.w_send
                z = on(self.z[stage.index], stage.device)
                senders[stage.attention.senders] = on(torch.einsum("thk,hkd->htd", z, w_send), senders.device)
            if stage.mlp is not None and self.mlp is not None:
                senders[stage.mlp.senders] = self.mlp[stage.index]
        return senders


@dataclass(frozen=True, slots=True)
class Ablation:
    """An ablation, made once: every function that takes the name of one takes this too.

    meta: what a file says of it. values: None where a sender sends what it sends on the corrupt prompts. reference: the
    prompts of a mean or of optimal constants, None for any other. model: whose senders these are; None for any model.
    weights: what they were when it was made, `Weights.state`.
    """

    __repr__ = short

    meta: Mapping[str, Any]
    values: Values | None = None
    reference: PromptPairs | None = None
    model: Model | None = None
    weights: object = None

    @property
    def name(self) -> str:
        """Out of ABLATIONS."""
        return str(self.meta["name"])

    @staticmethod
    @own_modes
    def of(
        model: Model,
        pairs: PromptPairs,
        ablation: str | Ablation = "corrupt",
        reference: PromptPairs | None = None,
        progress: Progress | None = None,
    ) -> Ablation:
        """The ablation of a name, or one that is there; reference: the prompts of a mean or of optimal constants, None
        for the task's own; progress: of finding the latter.

        Raises:
            ValueError: an unknown ablation, or one of another model; a reference that is not used; prompts that are too
                short for a mean for each position.
        """
        if isinstance(ablation, Ablation):
            if reference is not None and reference is not ablation.reference:
                raise ValueError("a reference task belongs to an ablation by name, but this one is already made")
            if ablation.model is not None and ablation.model.weights is not model.weights:
                raise ValueError(f"the ablation was made for {ablation.model.name!r}, not for the weights here")
            if ablation.weights not in (None, model.weights.state()):
                raise ValueError(f"the weights of {model.name!r} were changed since the ablation's mean: make it anew")
            reference, name = ablation.reference, ablation.name
        else:
            one_of("ablation", ablation, ABLATIONS, _WORDS)
            if ablation not in FROM_REFERENCE:
                if reference is not None:
                    raise ValueError(
                        f"a reference task belongs to the ablations {', '.join(FROM_REFERENCE)}, got {ablation!r}"
                    )
                zero = ablation == "zero"
                return Ablation({"name": ablation}, zeros(model) if zero else None, None, model if zero else None)
            reference, name = pairs if reference is None else reference, ablation
            if not isinstance(reference, PromptPairs):
                raise ValueError(f"reference must be PromptPairs, got {type(reference).__name__}")
            reference.check_shapes()
            reference.check_positions()
            reference.check_words(model.tokenizer, model.name)
        longest, needed = 0 if reference is None else int(reference.lengths.max()), int(pairs.positions.max()) + 1
        if name == "mean-positional" and longest < needed:
            raise ValueError(
                f"a mean for each position needs reference prompts as long as the task's, {needed} tokens, but the "
                f"longest has {longest}"
            )
        if isinstance(ablation, Ablation):
            return ablation
        assert reference is not None
        if name == "optimal":
            return Ablation.optimal(model, reference, progress=progress)
        meta = {"name": name, "reference": reference.name, "n_prompts": len(reference), "prompts": "clean"}
        made = means(model, reference, per_position=name == "mean-positional")
        return Ablation(meta, made, reference, model, model.weights.state())

    @staticmethod
    @own_modes
    def optimal(
        model: Model,
        reference: PromptPairs,
        *,
        steps: int = STEPS,
        rate: float = RATE,
        batch_size: int = 16,
        progress: Progress | None = None,
    ) -> Ablation:
        """Each sender's constant that the predictions on a reference's clean prompts miss least, see `optimal`.

        Args:
            model, reference: where the constants are found, from the means on.
            steps, rate: of Adam, in units of each sender's deviation from its mean.
            batch_size: prompts at a time.
            progress: called with (steps × senders × prompts done, in all).

        Raises:
            ValueError: no number of steps, or rate; prompts that do not fit the model.
        """
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise ValueError(f"steps must be an integer of at least 1, got {short_repr(steps)}")
        if not isinstance(rate, int | float) or isinstance(rate, bool) or not 0 < rate < math.inf:
            raise ValueError(f"rate must be a number above 0, got {short_repr(rate)}")
        reference.check_shapes()
        reference.check_positions()
        start = _means(model, reference, per_position=False)
        how: dict[str, Any] = {"steps": steps, "rate": rate, "batch_size": batch_size, "progress": progress}
        found = optimal_constants(model, reference, start, **how)
        meta = {"name": "optimal", "reference": reference.name, "n_prompts": len(reference), "prompts": "clean"}
        meta |= {"loss": "kl", "steps": steps, "rate": rate}
        return Ablation(meta, _as_values(model, found), reference, model, model.weights.state())


def zeros(model: Model) -> Values:
    """Nothing is sent; an MLP's output bias is part of what it sends."""
    config, like = model.config, model.weights.w_e
    layers = config.n_layers
    mlp = None if config.d_mlp is None else like.new_zeros(layers, 1, config.d_model)
    units = None if config.d_mlp is None else like.new_zeros(layers, 1, config.d_mlp)
    z = like.new_zeros(layers, 1, config.n_heads, config.d_head)
    return Values(like.new_zeros(1, config.d_model), z, mlp, units)


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
    return _as_values(model, _means(model, reference, per_position=per_position, batch_size=batch_size))


def _means(
    model: Model, reference: PromptPairs, *, per_position: bool, batch_size: int = 16
) -> dict[str, Annotated[Tensor, "float64 T ..."]]:
    """`means` by name."""
    check_tokens(model, reference.clean, "reference prompts")
    sums: dict[str, Tensor] = {}
    longest = int(reference.lengths.max())
    for batch in reference.batches(batch_size):
        tokens, lengths = batch.clean.to(model.device), batch.lengths.to(model.device)
        inside = torch.arange(tokens.shape[1], device=model.device) < lengths[:, None]  # [B, T]
        weights = inside.double() if per_position else inside / lengths[:, None].double()
        for name, x in _sent(model, tokens):
            here = on(weights, x.device)
            if per_position:
                part = on(torch.einsum("bt...,bt->t...", x.double(), here), model.device)
                total = sums.setdefault(name, part.new_zeros(longest, *part.shape[1:]))
                total[: len(part)] += part
            else:
                part = on(torch.einsum("bt...,bt->...", x.double(), here), model.device)[None]
                sums[name] = sums[name] + part if name in sums else part
    if per_position:
        lengths = reference.lengths[:, None].to(model.device)
        counts = (lengths > torch.arange(longest, device=model.device)).sum(0)
    else:
        counts = torch.tensor([len(reference)], device=model.device)
    return {name: x / counts.view(-1, *[1] * (x.ndim - 1)) for name, x in sums.items()}


def _as_values(model: Model, found: Mapping[str, Tensor]) -> Values:
    """What is known by name, in the model's dtype."""
    mean = {name: x.to(model.dtype) for name, x in found.items()}
    layers = range(model.config.n_layers)
    z, mlp, units = (
        torch.stack([mean[f"{name}{index}"] for index in layers]) if f"{name}0" in mean else None
        for name in ("z", "mlp", "units")
    )
    assert z is not None
    return Values(mean["embed"], z, mlp, units)


def _sent(model: Model, tokens: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What the senders are made of, [B, T, ..] by name, a stage at a time."""
    x = embed(model, tokens)
    yield "embed", x
    for run in run_stages(model, x):
        if run.attention is not None:
            yield f"z{run.stage.index}", run.attention.z
        if run.stage.mlp is not None and run.mlp is not None:
            yield f"mlp{run.stage.index}", run.mlp.sent
            yield f"units{run.stage.index}", run.stage.mlp.component.units(run.mlp.saved)
