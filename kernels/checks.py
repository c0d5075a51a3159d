"""Shapes, dtypes and devices of every op's arguments, checked once for all implementations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Annotated

import torch
from torch import Tensor

REDUCE = ("all", "pair", "position")
NORMS = ("layernorm", "rmsnorm", "none")
PRECISIONS = ("auto", "ieee", "tf32x3")
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Norm:
    """The statistics of the normalisation in front of a set of receivers, x̂ = (x − μ)·rstd and n = γ∘x̂ + β.

    kind: "layernorm", "rmsnorm" (μ = 0) or "none" (n = x; the three tensors are None then).
    x_hat: [B, T, D] normalised residual stream. rstd: [B, T] float, 1/σ with eps. gamma: [D], or None for ones.

    For `receiver_grads` x [B, T, D], the stream itself in any float dtype, and mean [B, T], μ (None for "rmsnorm"), may
    stand in x_hat's place.
    """

    kind: str
    x_hat: Annotated[Tensor, "B T D"] | None = None
    rstd: Annotated[Tensor, "B T"] | None = None
    gamma: Annotated[Tensor, "D"] | None = None
    x: Annotated[Tensor, "B T D"] | None = None
    mean: Annotated[Tensor, "B T"] | None = None


@dataclass(frozen=True, slots=True)
class Sizes:
    """The shapes of an op's arguments, before there are any.

    batch, tokens, d_model: B, T, D. senders, receivers: S, R of `edge_scores`. channels, d_head: C, K of the others; of
    `edge_scores_factored` C for each layer. layers, heads, mlps: L, H, and whether MLPs send and receive, of
    `edge_scores_factored`. normed: whether receivers read through a normalisation; centred: one that subtracts the
    mean; summed: whether `receiver_grads` is given `sums`.
    """

    batch: int
    tokens: int
    d_model: int
    senders: int = 0
    receivers: int = 0
    channels: int = 0
    d_head: int = 0
    layers: int = 0
    heads: int = 0
    mlps: bool = True
    normed: bool = True
    centred: bool = True
    summed: bool = False

    @property
    def all_senders(self) -> int:
        """S of `edge_scores_factored`."""
        return 1 + self.layers * (self.heads + self.mlps)

    @property
    def all_receivers(self) -> int:
        """R of `edge_scores_factored`."""
        return self.layers * (self.channels + self.mlps) + 1


def shape_text(tensor: Tensor) -> str:
    """A tensor's shape as the messages print it."""
    return str(list(tensor.shape))


def short_repr(value: object) -> str:
    """A value as a message shows it, however long it is."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:100]} … {text[-50:]}"


def one_of(what: str, value: str, valid: tuple[str, ...], words: Mapping[str, str] = MappingProxyType({})) -> None:
    """Raise ValueError naming the valid values if `value` is none of them.

    words: other tools' names, in lower case with hyphens, and what is said of them.
    """
    if value not in valid:
        plain = short_repr(value).strip("'").lower().replace("_", "-")
        said = f"{plain!r}" if plain in valid else words.get(plain)
        hint = "" if said is None else f"; here that is {said}"
        raise ValueError(f"{what} must be one of {', '.join(valid)}, got {short_repr(value)}{hint}")


def output_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which an op accumulates and returns scores: float64 for float64 inputs, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def on_device(what: str, device: torch.device, tensors: dict[str, Tensor | None]) -> None:
    """Raise ValueError if one of some tensors by name is not on the device, which is `what`'s."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} must be on {device} as {what} is, got {tensor.device}")


def _span(x: Tensor) -> tuple[int, int]:
    """The address of a tensor's first element, and that behind its last; equal ones of a tensor without memory."""
    if x.is_meta or not x.numel():
        return 0, 0
    first, last = x.data_ptr(), 0
    for size, stride in zip(x.shape, x.stride(), strict=True):
        last += (size - 1) * stride
    return first, first + x.itemsize * (1 + last)


def token_stride(out: Tensor) -> int:
    """Elements from a token b·T + t of an [C, B, T, D] to the next."""
    _, batch, tokens, d_model = out.shape
    return out.stride(2) if tokens > 1 else out.stride(1) if batch > 1 else d_model


def tokens_in_step(x: Tensor) -> bool:
    """Whether all tokens b·T + t of an [C, B, T, D] lie equally far apart."""
    _, batch, tokens, _ = x.shape
    return min(batch, tokens) <= 1 or x.stride(1) == tokens * x.stride(2)


def _writable(out: Tensor) -> bool:
    """Whether the tokens of an [C, B, T, D] are one axis, d lies innermost, and no two elements share memory."""
    channels, batch, tokens, extent = out.shape
    if not out.numel():
        return True
    if (out.stride(3) != 1 and extent > 1) or not tokens_in_step(out):
        return False
    for stride, size in sorted([(out.stride(0), channels), (token_stride(out), batch * tokens)]):
        if size > 1:
            if stride < extent:
                return False
            extent += (size - 1) * stride
    return True


def edge_mask(mask: Tensor | None, senders: int, receivers: int) -> None:
    """Raise ValueError if a mask is not bool [S, R]."""
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (senders, receivers)):
        raise ValueError(f"mask must be bool [S, R] = [{senders}, {receivers}], got {mask.dtype} {shape_text(mask)}")


def chunk(rows: int | None) -> None:
    """Raise ValueError if a chunk is not None and has no token row."""
    if rows is not None and rows < 1:
        raise ValueError(f"chunk must be at least 1 token row, got {rows}")


def senders_before(before: Sequence[int] | None, senders: int, receivers: int) -> None:
    """Raise ValueError if there is not for each receiver how many of all senders come before it."""
    if before is None:
        return
    if len(before) != receivers:
        raise ValueError(f"before must have a number for each of the {receivers} receivers, got {len(before)}")
    if receivers and not 0 <= min(before) <= max(before) <= senders:
        raise ValueError(f"before must be numbers from 0 to S = {senders}, got {min(before)} to {max(before)}")


def edge_scores(
    delta: Tensor,
    grads: Tensor,
    mask: Tensor | None,
    reduce: str,
    rows: Tensor | None,
    part: tuple[int, int] | None = None,
    before: Sequence[int] | None = None,
) -> None:
    """Check the arguments of `edge_scores`; its docstring states what they are."""
    one_of("reduce", reduce, REDUCE)
    if delta.ndim != 4 or grads.ndim != 4 or delta.shape[1:] != grads.shape[1:]:
        raise ValueError(
            f"delta must be [S, B, T, D] and grads [R, B, T, D] with the same B, T, D, got {shape_text(delta)} and "
            f"{shape_text(grads)}: were clean and corrupt run with the same weights and prompts?"
        )
    if delta.dtype != grads.dtype or delta.dtype not in FLOATS:
        raise ValueError(
            f"delta and grads must share one dtype out of float64, float32, bfloat16, float16, got {delta.dtype} and "
            f"{grads.dtype}"
        )
    on_device("delta", delta.device, {"grads": grads, "mask": mask, "rows": rows})
    edge_mask(mask, delta.shape[0], grads.shape[0])
    if part is not None and not 0 <= part[0] <= part[0] + len(delta) <= part[1]:
        raise ValueError(f"part must be (first, n) with first + S = {part[0]} + {len(delta)} at most n, got {part}")
    senders_before(before, part[1] if part is not None else len(delta), len(grads))
    if rows is not None and (rows.dtype != torch.int64 or rows.ndim != 1):
        raise ValueError(f"rows must be int64 [N] indices into B·T, got {rows.dtype} {shape_text(rows)}")


def rows_in_range(rows: Tensor | None, count: int) -> None:
    """Raise ValueError if rows on the CPU are not distinct indices below count; a GPU's are not looked at."""
    if rows is None or rows.device.type != "cpu" or rows.numel() == 0:
        return
    low, high = int(rows.min()), int(rows.max())
    if not 0 <= low <= high < count:
        raise ValueError(f"rows must lie in 0..{count - 1} = B·T − 1, got {low}..{high}")
    if (twice := rows.numel() - rows.unique().numel()) > 0:
        raise ValueError(f"rows must be distinct, got {twice} of {rows.numel()} twice")


def statistics(what: str, norm: Norm, batch: int, tokens: int, d_model: int, beside: str, there: torch.device) -> None:
    """Raise ValueError if the tensors of a norm that is not "none" do not fit B, T, D, or are not where `beside` is."""
    on_device(beside, there, {f"{what}.{name}": getattr(norm, name) for name in ("x_hat", "rstd", "gamma")})
    if norm.x_hat is None or norm.x_hat.shape != (batch, tokens, d_model):
        got = None if norm.x_hat is None else shape_text(norm.x_hat)
        raise ValueError(f"{what}.x_hat must be [B, T, D] = [{batch}, {tokens}, {d_model}], got {got}")
    if norm.rstd is None or norm.rstd.shape != (batch, tokens):
        got = None if norm.rstd is None else shape_text(norm.rstd)
        raise ValueError(f"{what}.rstd must be [B, T] = [{batch}, {tokens}], got {got}")
    if norm.gamma is not None and norm.gamma.shape != (d_model,):
        raise ValueError(f"{what}.gamma must be [D] = [{d_model}], got {shape_text(norm.gamma)}")


def sums_fit(what: str, sums: Tensor, channels: int, batch: int, tokens: int) -> None:
    """Raise ValueError if the sums of `receiver_grads` are no float32 [C, 2, B, T], or their tokens b·T + t do not lie
    beside each other, or their rows not equally far apart."""
    shape = (channels, 2, batch, tokens)
    fit = sums.shape == shape and sums.dtype == torch.float32
    if fit and sums.numel():
        expected = (2 * sums.stride(1), sums.stride(1), tokens, 1)
        fit = all(n == 1 or s == e for n, s, e in zip(shape, sums.stride(), expected, strict=True))
    if not fit:
        raise ValueError(
            f"{what} must be float32 [C, 2, B, T] = {list(shape)}, packed, got {sums.dtype} {shape_text(sums)}"
        )


def shared_by(channels: int, weights: int) -> int:
    """How many channels that follow one another share one of so many weights; 1 where the numbers do not divide."""
    return channels // weights if weights and channels % weights == 0 and channels else 1


def receiver_grads(
    g: Tensor,
    act: Tensor,
    weight: Tensor,
    norm: Norm,
    w_gamma: Tensor | None,
    offset: Tensor | None,
    out: Tensor | None = None,
    sums: Tensor | None = None,
) -> None:
    """Check the arguments of `receiver_grads`; its docstring states what they are."""
    one_of("norm.kind", norm.kind, NORMS)
    share = 1 if g.ndim != 4 or weight.ndim != 3 else shared_by(len(g), len(weight))
    if g.ndim != 4 or act.shape != (len(g) // share, *g.shape[1:]):
        raise ValueError(f"g and act must both be [C, B, T, K], got {shape_text(g)} and {shape_text(act)}")
    channels, batch, tokens, d_head = g.shape
    if weight.ndim != 3 or weight.shape[0] * share != channels or weight.shape[2] != d_head:
        raise ValueError(f"weight must be [C, D, K] = [{channels}, D, {d_head}], got {shape_text(weight)}")
    if g.dtype not in FLOATS or act.dtype != g.dtype or weight.dtype != g.dtype:
        raise ValueError(f"g, act and weight must share one float dtype, got {g.dtype}, {act.dtype}, {weight.dtype}")
    on_device("g", g.device, {"act": act, "weight": weight, "w_gamma": w_gamma, "offset": offset})
    expected = (channels, batch, tokens, weight.shape[1])
    if out is not None and (out.shape != expected or out.dtype != g.dtype or out.device != g.device):
        raise ValueError(
            f"out must be [C, B, T, D] = {list(expected)} {g.dtype} on {g.device}, got {shape_text(out)} {out.dtype} "
            f"on {out.device}"
        )
    if out is not None and not _writable(out):
        raise ValueError(
            "out must have d innermost, its tokens b·T + t equally far apart and no element twice, got strides "
            f"{out.stride()} of {shape_text(out)}"
        )
    if out is not None and out.requires_grad and torch.is_grad_enabled():
        raise ValueError("out must not require gradients: it is written over")
    if out is not None:
        read = {"g": g, "act": act, "weight": weight, "w_gamma": w_gamma, "offset": offset}
        read |= {"norm.x_hat": norm.x_hat, "norm.rstd": norm.rstd, "norm.gamma": norm.gamma}
        read |= {"norm.x": norm.x, "norm.mean": norm.mean, "sums": sums}
        first, end = _span(out)
        for name, tensor in read.items():
            here, behind = (0, 0) if tensor is None or tensor.device != out.device else _span(tensor)
            if first < behind and here < end:
                raise ValueError(f"out must have memory of its own, but overlaps {name}, which is read meanwhile")
    if norm.kind == "none":
        return
    if norm.x is not None:
        given = norm.x.shape == (batch, tokens, weight.shape[1]) and norm.x.dtype in FLOATS and norm.x_hat is None
        if not given or (None if norm.mean is None else norm.mean.shape) != (
            (batch, tokens) if norm.kind == "layernorm" else None
        ):
            raise ValueError(
                f"norm.x must be [B, T, D] = [{batch}, {tokens}, {weight.shape[1]}] in x_hat's place, with a mean "
                f"[B, T] for layernorm alone, got {shape_text(norm.x)}"
            )
        on_device("g", g.device, {"norm.x": norm.x, "norm.mean": norm.mean})
        norm = replace(norm, x_hat=norm.x)
    statistics("norm", norm, batch, tokens, weight.shape[1], "g", g.device)
    if sums is not None:
        sums_fit("sums", sums, channels, batch, tokens)
    on_device("g", g.device, {"sums": sums})
    needed = {"offset": offset} | ({"w_gamma": w_gamma} if norm.kind == "layernorm" else {})
    for name, value in needed.items():
        if value is None or value.shape != (channels, d_head):
            got = None if value is None else shape_text(value)
            raise ValueError(f"{name} must be [C, K] = [{channels}, {d_head}] (see receiver_constants), got {got}")


@dataclass(frozen=True, slots=True)
class FactoredSenders:
    """What the senders' differences Δ are made of, without a tensor that has both H and D.

    embed: [B, T, D] Δ of the embedding. dz: [L, B, T, H, K] Δ of the heads' value mixtures, so that the head h of layer
    l sends dz[l, :, :, h] @ w_o[l][h]. w_o: L tensors [H, K, D]. mlp: [L, B, T, D] Δ of the MLPs, None without MLPs.
    """

    embed: Annotated[Tensor, "B T D"]
    dz: Annotated[Tensor, "L B T H K"]
    w_o: Sequence[Annotated[Tensor, "H K D"]]
    mlp: Annotated[Tensor, "L B T D"] | None = None


@dataclass(frozen=True, slots=True)
class FactoredReceivers:
    """What the receivers' gradients are made of; a layer has C channels: its heads' q, then k, then v inputs.

    g: L tensors [C, B, T, K], ∂metric/∂(q, k, v). act: the same of the q, k, v of the clean run. weight: for each layer
    its channel groups [C_i, D, K] in order, ΣC_i = C; one that repeats a matrix (stride 0) is of channels with the same
    act. norms: L of `Norm`. w_gamma, offset: [L, C, K], see `receiver_constants`. mlp: [L, B, T, D] gradients of the
    MLPs' receivers, None without MLPs. logits: [B, T, D].
    sums: for each layer c1 and c2 of `receiver_grads` where they are known, else None; "triton" then does not read the
    layer's act, which may be None.
    """

    g: Sequence[Annotated[Tensor, "C B T K"]]
    act: Sequence[Annotated[Tensor, "C B T K"] | None]
    weight: Sequence[Sequence[Annotated[Tensor, "C' D K"]]]
    norms: Sequence[Norm]
    w_gamma: Annotated[Tensor, "L C K"]
    offset: Annotated[Tensor, "L C K"]
    logits: Annotated[Tensor, "B T D"]
    mlp: Annotated[Tensor, "L B T D"] | None = None
    sums: Sequence[Annotated[Tensor, "C 2 B T"] | None] | None = None


def edge_scores_factored(
    senders: FactoredSenders,
    receivers: FactoredReceivers,
    mask: Tensor | None,
    reduce: str,
    before: Sequence[int] | None = None,
) -> None:
    """Check the arguments of `edge_scores_factored`; the two dataclasses state what they are."""
    one_of("reduce", reduce, REDUCE)
    if senders.dz.ndim != 5 or receivers.w_gamma.ndim != 3:
        raise ValueError(
            f"dz must be [L, B, T, H, K] and w_gamma [L, C, K], got {shape_text(senders.dz)} and "
            f"{shape_text(receivers.w_gamma)}"
        )
    layers, batch, tokens, heads, d_head = senders.dz.shape
    channels, d_model = receivers.w_gamma.shape[1], senders.embed.shape[-1]
    expected: list[tuple[str, Tensor | None, tuple[int, ...]]] = [
        ("senders.embed", senders.embed, (batch, tokens, d_model)),
        ("receivers.logits", receivers.logits, (batch, tokens, d_model)),
        ("receivers.w_gamma", receivers.w_gamma, (layers, channels, d_head)),
        ("receivers.offset", receivers.offset, (layers, channels, d_head)),
    ]
    if senders.mlp is not None or receivers.mlp is not None:
        expected += [
            ("senders.mlp", senders.mlp, (layers, batch, tokens, d_model)),
            ("receivers.mlp", receivers.mlp, (layers, batch, tokens, d_model)),
        ]
    expected += [(f"senders.w_o[{i}]", w, (heads, d_head, d_model)) for i, w in enumerate(senders.w_o)]
    expected += [(f"receivers.g[{i}]", x, (channels, batch, tokens, d_head)) for i, x in enumerate(receivers.g)]
    known = [False] * layers if receivers.sums is None else [sums is not None for sums in receivers.sums]
    for i, (act, without) in enumerate(zip(receivers.act, known, strict=False)):
        if act is not None or not without:
            expected.append((f"receivers.act[{i}]", act, (channels, batch, tokens, d_head)))
    for name, tensor, shape in expected:
        if tensor is None or tensor.shape != shape:
            got = None if tensor is None else shape_text(tensor)
            raise ValueError(f"{name} must be {list(shape)}, got {got}")
        if tensor.dtype != senders.dz.dtype or tensor.device != senders.dz.device:
            raise ValueError(
                f"{name} must be {senders.dz.dtype} on {senders.dz.device} as senders.dz is, got {tensor.dtype} on "
                f"{tensor.device}"
            )
    by_layer = {"w_o": senders.w_o} | {name: getattr(receivers, name) for name in ("g", "act", "weight", "norms")}
    by_layer |= {} if receivers.sums is None else {"sums": receivers.sums}
    if any(len(entries) != layers for entries in by_layer.values()):
        raise ValueError(
            f"{', '.join(by_layer)} must have one entry for each of the {layers} layers, got "
            f"{', '.join(str(len(entries)) for entries in by_layer.values())}"
        )
    for layer, (groups, norm) in enumerate(zip(receivers.weight, receivers.norms, strict=True)):
        one_of(f"norms[{layer}].kind", norm.kind, NORMS)
        if norm.kind != "none":
            statistics(f"norms[{layer}]", norm, batch, tokens, d_model, "senders.dz", senders.dz.device)
        if sum(w.shape[0] for w in groups) != channels or any(w.shape[1:] != (d_model, d_head) for w in groups):
            raise ValueError(
                f"weight[{layer}] must be channel groups [C_i, {d_model}, {d_head}] with ΣC_i = {channels}, got "
                f"{[shape_text(w) for w in groups]}"
            )
        if any(w.dtype != senders.dz.dtype or w.device != senders.dz.device for w in groups):
            raise ValueError(
                f"weight[{layer}] must be {senders.dz.dtype} on {senders.dz.device} as senders.dz is, got "
                f"{[f'{w.dtype} on {w.device}' for w in groups]}"
            )
    for layer, sums in enumerate(receivers.sums or ()):
        if sums is not None:
            sums_fit(f"receivers.sums[{layer}]", sums, channels, batch, tokens)
        on_device("senders.dz", senders.dz.device, {f"receivers.sums[{layer}]": sums})
    mlps = senders.mlp is not None
    on_device("senders.dz", senders.dz.device, {"mask": mask})
    n_senders, n_receivers = 1 + layers * (heads + mlps), layers * (channels + mlps) + 1
    edge_mask(mask, n_senders, n_receivers)
    senders_before(before, n_senders, n_receivers)
