"""The explicit transformer, a layer at a time: no modules, no hooks, no autograd graph.

`run_layers` yields what each layer made, and whoever iterates decides what to keep. `gradient.backward` goes back
through it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from eapcore import kernels
from eapcore.config import LayerWeights, ModelConfig, Weights
from eapcore.graph import Graph
from eapcore.modes import own_modes
from eapcore.products import product
from eapcore.weights import load_weights

__all__ = ["Model", "forward", "load", "run_with_senders", "sender_buffer"]

TOYS = {f"toy-{name}": Path(__file__).parent / "toy" / name for name in ("ioi", "induction")}
APPROXIMATE = {"gelu_new": "tanh", "gelu": "none"}


@dataclass(frozen=True)
class Model:
    """A configuration with its weights, on one device, in one dtype.

    name says where they came from, folder where their files lie (None for weights from memory).
    """

    config: ModelConfig
    weights: Weights
    name: str = "unnamed"
    folder: Path | None = None

    @cached_property
    def graph(self) -> Graph:
        return Graph(self.config.n_layers, self.config.n_heads, not self.config.attn_only)

    @property
    def dtype(self) -> torch.dtype:
        return self.weights.w_e.dtype

    @property
    def device(self) -> torch.device:
        return self.weights.w_e.device

    @cached_property
    def edge_masks(self) -> tuple[Annotated[Tensor, "bool S R"], Annotated[Tensor, "bool S R"]]:
        """`Graph.edge_masks` on the model's device, copied there once."""
        everywhere, at_read = self.graph.edge_masks()
        return everywhere.to(self.device), at_read.to(self.device)

    @cached_property
    def content_hash(self) -> str:
        """The weights' hash together with what changes the numbers beside them, as 16 hex digits."""
        c = self.config
        beside = f"{c.act_fn} {c.attn_scale:.9g} {c.scale_attn_by_inverse_layer_idx} {c.eps:.9g}"
        return hashlib.sha256(f"{self.weights.content_hash()} {beside}".encode()).hexdigest()[:16]

    @cached_property
    def _constants(self) -> list[tuple[Tensor, Tensor]]:
        """(Wᵀγ, b + Wᵀβ), each [3H, K], of each layer: constants of the weights in the receivers' gradients."""
        constants = []
        for layer in self.weights.layers:
            gamma, beta = layer.ln1 or (None, None)
            biases = layer.b_qkv.split([w.shape[0] for w in layer.w_qkv])
            groups = [kernels.receiver_constants(w, b, gamma, beta) for w, b in zip(layer.w_qkv, biases, strict=True)]
            constants.append((torch.cat([g for g, _ in groups]), torch.cat([o for _, o in groups])))
        return constants

    def closed_form(self, index: int, channels: slice) -> tuple[Annotated[Tensor, "C K"], Annotated[Tensor, "C K"]]:
        """(Wᵀγ, b + Wᵀβ), each [C, K], for some of a layer's q, k and v channels."""
        w_gamma, offset = self._constants[index]
        return w_gamma[channels], offset[channels]


def load(
    source: str | Path | torch.nn.Module | Mapping[str, Tensor],
    *,
    config: Mapping[str, Any] | None = None,
    revision: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
) -> Model:
    """Load a model: a built-in toy by name, or whatever `weights.load_weights` takes.

    Args:
        source: "toy-ioi" or "toy-induction"; a folder; a Hub id such as "gpt2"; a transformers GPT2LMHeadModel; or a
            TransformerLens-named state dict with its `config`.
        config: the configuration of a state dict, or instead of a folder's config.json.
        revision: of a Hub id.
        dtype: float64, float32, bfloat16 or float16; None keeps the checkpoint's.
        device: e.g. "cuda"; None keeps a model's own, and is the CPU for files.

    Raises:
        ValueError: a damaged checkpoint or an unsupported architecture, by name.
        OSError: files that are missing, or neither cached nor reachable.
    """
    toy = TOYS.get(source) if isinstance(source, str) else None
    loaded = load_weights(toy or source, config=config, revision=revision, dtype=dtype, device=device)
    name = source if toy is not None and isinstance(source, str) else loaded.model_id
    return Model(loaded.config, loaded.weights, name, loaded.folder)


@dataclass(frozen=True, slots=True)
class NormInput:
    """What a normalisation read: x [B, T, D], its mean and 1/σ [B, T, 1] (None where there is no normalisation)."""

    x: Tensor
    mean: Tensor | None = None
    rstd: Tensor | None = None

    def x_hat(self) -> Tensor:
        """The normalised stream (x − μ)/σ, [B, T, D] in x's dtype."""
        if self.mean is None or self.rstd is None:
            raise ValueError("x_hat needs a normalisation, this stream has none")
        return ((self.x - self.mean) * self.rstd).to(self.x.dtype)

    def of(self, take: Callable[[Tensor], Tensor]) -> NormInput:
        """The same of what `take` takes of each tensor."""
        return NormInput(take(self.x), *(None if s is None else take(s) for s in (self.mean, self.rstd)))

    def at(self, read: Tensor) -> NormInput:
        """The same at the positions read [B, Q] alone."""
        return self.of(lambda x: at_positions(x, read))


@dataclass(frozen=True, slots=True)
class LayerSaved:
    """What the backward pass needs of one layer.

    attn_in, mlp_in: what its two normalisations read. qkv: [B, T, 3H, K], the q, then k, then v heads; in a last layer
    where only Q positions are read (see `run_layers`), q [B, Q, H, K] and the others [B, T, 2H, K] apart. hidden:
    [B, Q, M] before the activation function; None, as mlp_in, without an MLP.
    """

    attn_in: NormInput
    qkv: tuple[Tensor, ...]
    mlp_in: NormInput | None = None
    hidden: Tensor | None = None

    def copy(self, rows: slice) -> LayerSaved:
        """The same of some of the batch's prompts, in memory of its own: a view would keep all prompts' alive."""
        return LayerSaved(
            self.attn_in.of(lambda x: x[rows].clone()),
            tuple(t[rows].clone() for t in self.qkv),
            None if self.mlp_in is None else self.mlp_in.of(lambda x: x[rows].clone()),
            None if self.hidden is None else self.hidden[rows].clone(),
        )

    @property
    def q(self) -> Tensor:
        """[B, Q, H, K]."""
        return self.qkv[0] if len(self.qkv) == 2 else self.qkv[0][:, :, : self.qkv[0].shape[2] // 3]

    @property
    def kv(self) -> Tensor:
        """[B, T, 2H, K], the k and then the v heads."""
        return self.qkv[1] if len(self.qkv) == 2 else self.qkv[0][:, :, self.qkv[0].shape[2] // 3 :]


@dataclass(frozen=True, slots=True)
class LayerRun:
    """What one layer made of the residual stream.

    saved: what the backward pass needs. z: [B, Q, H, K] mixtures of v, in float32 at least, so that head h sends
    z[:, :, h] @ w_o[h]. mlp: [B, Q, D] what the MLP sends, its bias included, None without. out: [B, Q, D] the residual
    stream behind the layer.
    """

    saved: LayerSaved
    z: Tensor
    mlp: Tensor | None
    out: Tensor


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype for sums and statistics: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def normalise(x: Tensor, ln: tuple[Tensor, Tensor] | None, eps: float) -> tuple[Tensor, NormInput]:
    """γ∘(x − μ)/σ + β with its statistics, in float32 at least; x itself where there is no LayerNorm."""
    if ln is None:
        return x, NormInput(x)
    wide = accumulate_dtype(x.dtype)
    gamma, beta = (p.to(wide) for p in ln)
    n, mean, rstd = torch.native_layer_norm(x.to(wide), x.shape[-1:], gamma, beta, eps)
    return n.to(x.dtype), NormInput(x, mean, rstd)


def embed(model: Model, tokens: Tensor, start: int = 0) -> Tensor:
    """What the sender `embed` writes, token + position: [B, T, D] from tokens [B, T] at the positions from start on."""
    return model.weights.w_e[tokens] + model.weights.w_pos[start : start + tokens.shape[1]]


def channel_groups(layer: LayerWeights, channels: slice) -> list[Tensor]:
    """The weights [C_i, D, K] of some of a layer's 3H channels, as views."""
    groups, start = [], 0
    for w in layer.w_qkv:
        first, last = max(channels.start - start, 0), min(channels.stop - start, w.shape[0])
        if first < last:
            groups.append(w[first:last])
        start += w.shape[0]
    return groups


def project(layer: LayerWeights, n: Tensor, channels: slice) -> Tensor:
    """Some of the q, k and v channels, [B, T, C, K] from the normalised stream n [B, T, D]."""
    parts, first = [], channels.start
    for w in channel_groups(layer, channels):
        bias, matrix = layer.b_qkv[first : first + len(w)], as_matrix(w)
        first += len(w)
        if matrix is not None:
            part = product(n, matrix, bias.flatten()).unflatten(-1, (w.shape[0], w.shape[2]))
        else:
            part = (n.flatten(0, 1) @ w).transpose(0, 1).unflatten(0, n.shape[:2]) + bias
        parts.append(part)  # [B, T, C_i, K]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def as_matrix(w: Tensor) -> Tensor | None:
    """A channel group [C, D, K] as a matrix [D, C·K] without a copy, or None where its strides do not allow it."""
    channels, d_model, d_head = w.shape
    if w.stride(2) != 1 or w.stride(0) != d_head:
        return None
    return w.as_strided((d_model, channels * d_head), (w.stride(1), 1))


def future(tokens: int, past: int, read: Tensor | None, device: torch.device) -> Tensor:
    """True where a query must not see a key: [T, P + T], or [B, 1, Q, P + T] for queries at positions read [B, Q]."""
    keys = torch.arange(-past, tokens, device=device)
    queries = torch.arange(tokens, device=device)[:, None] if read is None else read[:, None, :, None]
    return keys > queries


def with_past(kv: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
    """k and v as [B, H, P + T, K], from kv [B, T, 2H, K] and what came before it, [B, P, 2H, K].

    Several runs of the same prompts one after the other along B share one past.
    """
    both = kv
    if past is not None:
        before = past.shape[1]
        both = kv.new_empty(len(kv), before + kv.shape[1], *kv.shape[2:])
        both[:, :before].unflatten(0, (-1, len(past))).copy_(past)
        both[:, before:] = kv
    k, v = both.transpose(1, 2).chunk(2, 1)
    return k, v


def attend(
    model: Model, index: int, q: Tensor, kv: Tensor, past: Tensor | None = None, read: Tensor | None = None
) -> Tensor:
    """The heads' mixtures of v, [B, Q, H, K] in float32 at least, from q [B, Q, H, K] and kv [B, T, 2H, K].

    Otherwise as in `run_layers`.
    """
    qkv = (q.transpose(1, 2), *with_past(kv, past))
    return mixtures(model, index, qkv, kv.shape[1], read).transpose(1, 2)


def mixtures(model: Model, index: int, qkv: Sequence[Tensor], tokens: int, read: Tensor | None) -> Tensor:
    """The same as [B, H, Q, K] from q [B, H, Q, K], k and v [B, H, P + T, K], the past among them; tokens is T.

    Not rounded to half precision, so that mixtures can be subtracted before they are.
    """
    q, k, v = (x.to(accumulate_dtype(x.dtype)) for x in qkv)
    if q.shape[2] == 0:
        return q
    scale, before = model.config.score_scale(index), k.shape[2] - tokens
    if before == 0 and read is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    visible = ~future(tokens, before, read, q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale)


def head_outputs(z: Tensor, w_o: Tensor, out: Tensor | None = None) -> Tensor:
    """What each head sends, [H, B, T, D] = z[:, :, h] @ w_o[h], written into `out` where it is given."""
    n_heads, _, d_model = w_o.shape
    rows = z.to(w_o.dtype).flatten(0, 1).transpose(0, 1)  # [H, B·T, K]
    if out is None:
        return (rows @ w_o).unflatten(1, z.shape[:2])
    torch.bmm(rows, w_o, out=out.view(n_heads, -1, d_model))
    return out


def attention_output(layer: LayerWeights, z: Tensor) -> Tensor:
    """What all heads of a layer add to the residual stream together, bias included: [B, T, D]."""
    return product(z.flatten(2).to(layer.w_o.dtype), layer.w_o.flatten(0, 1), layer.b_o)


def activation(name: str, hidden: Tensor) -> Tensor:
    return F.relu(hidden) if name == "relu" else F.gelu(hidden, approximate=APPROXIMATE[name])


def at_positions(x: Tensor, read: Tensor | None) -> Tensor:
    """x [B, T, ...] at the positions read [B, Q]: [B, Q, ...]; x itself for None."""
    return x if read is None else x[torch.arange(len(x), device=x.device)[:, None], read]


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


def layer_qkv(model: Model, index: int, x: Tensor, read: Tensor | None) -> LayerSaved:
    """What a layer's attention reads and the q, k and v of it; with `read`, q at these positions alone."""
    layer, n_heads = model.weights.layers[index], model.config.n_heads
    n, attn_in = normalise(x, layer.ln1, model.config.eps)
    if read is None:
        return LayerSaved(attn_in, (project(layer, n, slice(0, 3 * n_heads)),))
    q = project(layer, at_positions(n, read), slice(0, n_heads))
    return LayerSaved(attn_in, (q, project(layer, n, slice(n_heads, 3 * n_heads))))


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


def run_mlp(config: ModelConfig, layer: LayerWeights, n: Tensor) -> tuple[Tensor, Tensor]:
    """What the MLP sends [B, T, D] and its hidden units before the activation function [B, T, M]."""
    assert layer.w_in is not None and layer.b_in is not None and config.act_fn is not None
    assert layer.w_out is not None and layer.b_out is not None
    hidden = product(n, layer.w_in, layer.b_in)
    return product(activation(config.act_fn, hidden), layer.w_out, layer.b_out), hidden


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
