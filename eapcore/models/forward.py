"""The explicit transformer, a layer at a time: no modules, no hooks, no autograd graph."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Annotated

import torch
from torch import Tensor

from eapcore.models.activations import LayerRun, LayerSaved, NormInput, at_positions
from eapcore.models.attention import attend, attention_output, head_outputs, layer_qkv
from eapcore.models.matmul import product
from eapcore.models.mlp import run_mlp
from eapcore.models.model import Model
from eapcore.models.norm import normalise
from eapcore.models.torch_modes import own_modes


def embed(model: Model, tokens: Tensor, start: int = 0) -> Tensor:
    """What the sender `embed` writes, token + position: [B, T, D] from tokens [B, T] at the positions from start on."""
    return model.weights.w_e[tokens] + model.weights.w_pos[start : start + tokens.shape[1]]


def run_layers(
    model: Model, x: Tensor, *, first: int = 0, past: Sequence[Tensor] | None = None, read: Tensor | None = None
) -> Iterator[LayerRun]:
    """Run the layers on the residual stream x [B, T, D], one at a time, and yield what each made.

    Args:
        model: the model.
        x: [B, T, D] the residual stream that enters the layer `first`: for 0 what `embed` made.
        first: the layer to begin with.
        past: for each layer the k and v heads [B, P, 2H, K] of P positions that come before x; None for none. x may
            hold several runs of the same prompts, [n·B, T, D], which share it.
        read: int64 [B, Q], the positions of x whose last residual stream is needed; None for all. The last layer makes
            its keys and values everywhere and everything else at these positions alone.
    """
    last = model.config.n_layers - 1
    for index in range(first, model.config.n_layers):
        before = None if past is None else past[index]
        run = run_layer(model, index, x, before, read if index == last else None)
        x = run.out
        yield run
        del run  # whoever iterates decides what is kept while the next layer runs


def run_layer(model: Model, index: int, x: Tensor, past: Tensor | None, read: Tensor | None) -> LayerRun:
    """Run one layer; past is its own, and with `read` it makes only keys and values at all positions."""
    saved = layer_qkv(model, index, x, read)
    z = attend(model, index, saved.q, saved.kv, past, read)
    sent = attention_output(model.weights.layers[index], z)
    return behind_attention(model, index, saved, z, at_positions(x, read) + sent)


def behind_attention(model: Model, index: int, saved: LayerSaved, z: Tensor, x: Tensor) -> LayerRun:
    """The rest of a layer, from the residual stream x [B, Q, D] behind its attention on."""
    layer = model.weights.layers[index]
    if layer.w_in is None:
        return LayerRun(saved, z, None, x)
    n, mlp_in = normalise(x, layer.ln2, model.config.eps)
    mlp, hidden = run_mlp(model.config, layer, n)
    return LayerRun(replace(saved, mlp_in=mlp_in, hidden=hidden), z, mlp, x + mlp)


def prefix(model: Model, tokens: Tensor) -> list[Tensor] | None:
    """For each layer the k and v heads [B, P, 2H, K] of tokens [B, P], as `past` for what follows; None for P = 0."""
    if tokens.shape[1] == 0:
        return None
    nothing = torch.empty(len(tokens), 0, dtype=torch.int64, device=tokens.device)
    return [run.saved.kv for run in run_layers(model, embed(model, tokens), read=nothing)]


def unembed(model: Model, x: Tensor, tokens: Tensor | None = None) -> tuple[Tensor, NormInput]:
    """Logits [..., V] from the last residual stream x [..., D] through the final LayerNorm.

    With tokens int64 [B, n] those alone, [C·B, n], where x [C·B, D] is of C runs of B prompts.
    """
    n, norm_in = normalise(x, model.weights.ln_final, model.config.eps)
    b_u = model.weights.b_u
    if tokens is None:
        return product(n, model.weights.w_u, b_u), norm_in
    columns = model.weights.w_u.T[tokens]  # [B, n, D]
    logits = (by_prompt(n, tokens) @ columns.transpose(1, 2)).transpose(0, 1)  # [C, B, n]
    return (logits if b_u is None else logits + b_u[tokens]).flatten(0, 1), norm_in


def by_prompt(x: Tensor, tokens: Tensor) -> Tensor:
    """x [C·B, ...] of C runs of the prompts of tokens [B, n], as [B, C, ...]."""
    return x.unflatten(0, (-1, len(tokens))).transpose(0, 1)


def sender_buffer(model: Model, batch: int, tokens: int) -> Annotated[Tensor, "S B T D"]:
    """An empty buffer [S, B, T, D] for `run_with_senders`."""
    shape = (model.graph.n_senders, batch, tokens, model.config.d_model)
    return torch.empty(shape, dtype=model.dtype, device=model.device)


def check_tokens(model: Model, tokens: Tensor, what: str = "tokens") -> None:
    """Raise ValueError unless tokens are int64 [B, T] in the vocabulary and no longer than the context."""
    if tokens.ndim != 2 or tokens.dtype != torch.int64 or tokens.numel() == 0:
        raise ValueError(
            f"{what} must be int64 [B, T] with at least one token, got {tokens.dtype} {list(tokens.shape)}"
        )
    if tokens.shape[1] > model.config.n_ctx:
        raise ValueError(
            f"{what} have {tokens.shape[1]} positions, but the context of {model.name} is {model.config.n_ctx}"
        )
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= model.config.d_vocab:
        wrong = low if low < 0 else high
        raise ValueError(
            f"{what} have the token id {wrong}, but the vocabulary of {model.name} is 0..{model.config.d_vocab - 1}: "
            "was another model's tokenizer used?"
        )


@own_modes
@torch.no_grad()
def run_with_senders(
    model: Model, tokens: Annotated[Tensor, "int64 B T"], senders: Annotated[Tensor, "S B T D"] | None = None
) -> tuple[Annotated[Tensor, "B T V"], Annotated[Tensor, "S B T D"]]:
    """Run the model; every sender writes its output into the sender buffer.

        Σ_s senders[s] + Σ_l b_O[l] = the last residual stream

    Args:
        model: the model.
        tokens: int64 [B, T], padded on the right if they differ in length.
        senders: [S, B, T, D] in the model's dtype to write into, e.g. from `sender_buffer`; None makes one. Row s is
            sender s of `model.graph`: `embed` token + position, a head without b_O, an MLP with its bias.

    Returns:
        (logits [B, T, V], senders [S, B, T, D]).

    Raises:
        ValueError: tokens or buffer do not fit the model.
    """
    check_tokens(model, tokens)
    expected = (model.graph.n_senders, *tokens.shape, model.config.d_model)
    if senders is None:
        senders = sender_buffer(model, *tokens.shape)
    elif senders.shape != expected or senders.dtype != model.dtype or senders.device != model.device:
        raise ValueError(
            f"senders must be [S, B, T, D] = {list(expected)} {model.dtype} on {model.device}, got "
            f"{list(senders.shape)} {senders.dtype} on {senders.device}"
        )
    elif not senders.is_contiguous():
        raise ValueError(f"senders must be contiguous, got strides {senders.stride()}")
    x = embed(model, tokens)
    senders[0] = x
    for index, run in enumerate(run_layers(model, x)):
        head_outputs(run.z, model.weights.layers[index].w_o, out=senders[model.graph.heads(index)])
        if run.mlp is not None:
            senders[model.graph.mlp(index)] = run.mlp
        x = run.out
    return unembed(model, x)[0], senders


def forward(model: Model, tokens: Annotated[Tensor, "int64 B T"]) -> Annotated[Tensor, "B T V"]:
    """Logits [B, T, V] of tokens int64 [B, T]; differentiable in the weights, keeps nothing else."""
    check_tokens(model, tokens)
    x = embed(model, tokens)
    for run in run_layers(model, x):
        x = run.out
    return unembed(model, x)[0]


def first_non_finite(model: Model, tokens: Tensor) -> str | None:
    """Where a run on tokens first has a NaN or an infinity, for a message; None if nowhere."""
    with torch.no_grad():
        x = embed(model, tokens)
        if not bool(x.isfinite().all()):
            return "the embedding"
        for index, run in enumerate(run_layers(model, x)):
            between = run.out if run.saved.mlp_in is None else run.saved.mlp_in.x
            for part, value in (("attention", run.z), ("attention", between), ("MLP", run.mlp), ("output", run.out)):
                if value is not None and not bool(value.isfinite().all()):
                    return f"the {part} of layer {index}"
            x = run.out
        return None if bool(unembed(model, x)[0].isfinite().all()) else "the logits"
