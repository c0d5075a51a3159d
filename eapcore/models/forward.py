"""The explicit transformer, a stage at a time: no modules, no hooks, no autograd graph.

`run_stages` yields what each stage made, and whoever iterates decides what to keep. `backward.backward` goes back
through it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from eapcore.kernels.checks import short_repr
from eapcore.models.attention import AttentionRun, AttentionSaved
from eapcore.models.matmul import product
from eapcore.models.mlp import MlpRun, MlpSaved
from eapcore.models.model import Model, Stage
from eapcore.models.norm import NormInput
from eapcore.models.tensors import at_positions, on
from eapcore.models.torch_modes import own_modes


@dataclass(frozen=True, slots=True)
class StageSaved:
    """What the way back needs of a stage; None for a component that it does not have."""

    attention: AttentionSaved | None
    mlp: MlpSaved | None

    @property
    def stream(self) -> Tensor:
        """The residual stream that the stage read: [B, T, D], or [B, Q, D] where nothing else is needed any more."""
        part = self.attention or self.mlp
        assert part is not None
        return part.norm_in.x

    def of(self, take: Callable[[Tensor], Tensor]) -> StageSaved:
        """The same of what `take` takes of each tensor."""
        attention, mlp = self.attention, self.mlp
        return StageSaved(None if attention is None else attention.of(take), None if mlp is None else mlp.of(take))


@dataclass(frozen=True, slots=True)
class StageRun:
    """What a stage's components made, and the residual stream behind it, out [B, Q, D]."""

    stage: Stage
    attention: AttentionRun | None
    mlp: MlpRun | None
    out: Tensor

    @property
    def saved(self) -> StageSaved:
        attention, mlp = self.attention, self.mlp
        return StageSaved(None if attention is None else attention.saved, None if mlp is None else mlp.saved)

    def write(self, senders: Annotated[Tensor, "S B Q D"]) -> None:
        """Write what its senders add to the residual stream into their rows of the sender buffer."""
        stage = self.stage
        if stage.attention is not None and self.attention is not None:
            heads, rows = stage.attention.component, senders[stage.attention.senders]
            if rows.device == stage.device:
                heads.send(self.attention.z, out=rows)
            else:
                rows.copy_(heads.send(self.attention.z))
        if stage.mlp is not None and self.mlp is not None:
            senders[stage.mlp.senders] = on(self.mlp.sent, senders.device)


def embed(model: Model, tokens: Tensor, start: int = 0, dtype: torch.dtype | None = None) -> Tensor:
    """What the sender `embed` writes: [B, T, D] from tokens [B, T] at the positions from start on, in a dtype, None
    for the weights'."""
    return with_positions(model, embed_tokens(model, tokens), start, dtype)


def with_positions(
    model: Model, of_tokens: Annotated[Tensor, "B T D"], start: int = 0, dtype: torch.dtype | None = None
) -> Annotated[Tensor, "B T D"]:
    """What `embed` makes of `embed_tokens`' part."""
    w_pos, dtype = model.weights.w_pos, of_tokens.dtype if dtype is None else dtype
    if w_pos is None:
        return of_tokens.to(dtype)
    return of_tokens + w_pos[start : start + of_tokens.shape[1]].to(dtype)  # in the wider of both dtypes


def embed_tokens(model: Model, tokens: Tensor) -> Tensor:
    """The part of it that depends on the tokens."""
    rows, scale = model.weights.w_e[tokens], model.config.embed_scale
    return rows if scale == 1 else rows * torch.tensor(scale, dtype=rows.dtype, device="cpu").item()


def run_stages(
    model: Model, x: Tensor, *, first: int = 0, past: Sequence[Tensor] | None = None, read: Tensor | None = None
) -> Iterator[StageRun]:
    """Run the stages on the residual stream x [B, T, D], one at a time, and yield what each made.

    Args:
        model: the model.
        x: [B, T, D] the residual stream that enters the stage `first`: for 0 what `embed` made.
        first: the stage to begin with.
        past: for each layer the k and v heads [B, P, 2H, K] of P positions that come before x; None for none. x may
            hold several runs of the same prompts, [n·B, T, D], which share it. On the layers' devices.
        read: int64 [B, Q], the positions of x whose last residual stream is needed; None for all. The last layer makes
            its keys and values everywhere and everything else at these positions alone.
    """
    for stage in model.stages[first:]:
        before, x = None if past is None else past[stage.index], on(x, stage.device)
        run = run_stage(stage, x, before, on(read, stage.device) if stage.last and read is not None else None)
        x = run.out
        yield run
        del run  # whoever iterates decides what is kept while the next stage runs


def run_stage(stage: Stage, x: Tensor, past: Tensor | None = None, read: Tensor | None = None) -> StageRun:
    """Run one stage; past is its layer's, and with `read` its heads make only keys and values at all positions."""
    attention = mlp = None
    out = stream = x
    if stage.attention is not None:
        heads = stage.attention.component
        attention = heads.forward(x, past, read)
        stream = at_positions(x, read)
        out = stream + heads.added(attention)
    if stage.mlp is not None:
        mlp = stage.mlp.component.forward(stream)
        out = out + mlp.sent
    return StageRun(stage, attention, mlp, out)


def prefix(model: Model, tokens: Tensor) -> list[Tensor] | None:
    """For each layer the k and v heads [B, P, 2H, K] of tokens [B, P], as `past` for what follows; None for P = 0."""
    if tokens.shape[1] == 0:
        return None
    nothing = torch.empty(len(tokens), 0, dtype=torch.int64, device=tokens.device)
    runs = (run.attention for run in run_stages(model, embed(model, tokens), read=nothing))
    return [run.saved.kv for run in runs if run is not None]


def unembed(model: Model, x: Tensor, tokens: Tensor | None = None) -> tuple[Tensor, NormInput]:
    """Logits [..., V] from the last residual stream x [..., D], on any device, through the final normalisation.

    With tokens int64 [B, n] those alone, [C·B, n], where x [C·B, D] is of C runs of B prompts.
    """
    n, norm_in = model.weights.ln_final.forward(on(x, model.device), model.weights.w_u.dtype)
    b_u, cap = model.weights.b_u, model.config.logits_softcap
    if tokens is None:
        logits = product(n, model.weights.w_u, b_u)
    else:
        columns = model.weights.w_u.T[tokens]  # [B, n, D]
        logits = (by_prompt(n, tokens) @ columns.transpose(1, 2)).transpose(0, 1)  # [C, B, n]
        logits = (logits if b_u is None else logits + b_u[tokens]).flatten(0, 1)
    return logits if cap is None else cap * (logits / cap).tanh(), norm_in


def by_prompt(x: Tensor, tokens: Tensor) -> Tensor:
    """x [C·B, ...] of C runs of the prompts of tokens [B, n], as [B, C, ...]."""
    return x.unflatten(0, (-1, len(tokens))).transpose(0, 1)


def sender_buffer(model: Model, batch: int, tokens: int) -> Annotated[Tensor, "S B T D"]:
    """An empty buffer [S, B, T, D] for `run_with_senders`."""
    shape = (model.graph.n_senders, batch, tokens, model.config.d_model)
    return torch.empty(shape, dtype=model.dtype, device=model.device)


def as_tokens(tokens: Any, what: str = "tokens") -> Tensor:
    """Token ids as a tensor: a tensor as it is, a numpy array or nested lists; ValueError for anything else."""
    if isinstance(tokens, Tensor):
        return tokens
    try:
        made = torch.as_tensor(tokens, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        made = torch.empty(0, device="cpu")
    if made.is_floating_point() or made.dtype == torch.bool:
        raise ValueError(f"{what} must be token ids, int64 [B, T], got {short_repr(tokens)}")
    return made.long()


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
    model = model.now()
    tokens = tokens if isinstance(tokens, Tensor) else as_tokens(tokens).to(model.device)
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
    x = senders[0] = embed(model, tokens)
    for run in run_stages(model, x):
        run.write(senders)
        x = run.out
    return unembed(model, x)[0], senders


def forward(model: Model, tokens: Annotated[Tensor, "int64 B T"]) -> Annotated[Tensor, "B T V"]:
    """Logits [B, T, V] of tokens int64 [B, T]; differentiable in the weights, keeps nothing else."""
    check_tokens(model, tokens)
    x = embed(model, tokens)
    for run in run_stages(model, x):
        x = run.out
    return unembed(model, x)[0]


@torch.no_grad()
def first_non_finite(model: Model, tokens: Tensor) -> str | None:
    """Where a run on tokens first has a NaN or an infinity, for a message; None if nowhere."""
    x = embed(model, tokens)
    if not bool(x.isfinite().all()):
        return "the embedding"
    for run in run_stages(model, x):
        parts = [("output" if run.attention is None else "attention", run.out)]
        parts = parts if run.mlp is None else [("MLP", run.mlp.sent), *parts]
        parts = parts if run.attention is None else [("attention", run.attention.z), *parts]
        for part, value in parts:
            if not bool(value.isfinite().all()):
                return f"the {part} of layer {run.stage.index}"
        x = run.out
    return None if bool(unembed(model, x)[0].isfinite().all()) else "the logits"
