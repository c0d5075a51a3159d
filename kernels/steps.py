"""Steps between a forward pass's products: one kernel each on a GPU, torch's operations elsewhere.

What torch does in several kernels, with every intermediate result written and read again and half precision cast to
float32 and back, a GPU does here in one that reads its arguments once and writes its results once. float32 stays where
it matters: in statistics, differences and sums, which are rounded once.

`impl` is "auto", "reference" (torch's operations, the specification) or "triton"; "auto" takes "triton" on a GPU.
"""

from __future__ import annotations

import functools
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks, here
from . import dry_run as dry

IMPLS = ("auto", "reference", "triton")
ACTIVATIONS = ("gelu_new", "gelu", "relu", "silu")
_APPROXIMATE = {"gelu_new": "tanh", "gelu": "none"}


def activation(name: str, hidden: Tensor) -> Tensor:
    """An activation function by name, out of `ACTIVATIONS`."""
    if name in _APPROXIMATE:
        return F.gelu(hidden, approximate=_APPROXIMATE[name])
    return F.relu(hidden) if name == "relu" else F.silu(hidden)


def normalise(
    x: Annotated[Tensor, "... D"],
    gamma: Annotated[Tensor, "D"] | None,
    beta: Annotated[Tensor, "D"] | None,
    eps: float,
    *,
    centred: bool,
    dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> tuple[Annotated[Tensor, "... D"], Annotated[Tensor, "... 1"] | None, Annotated[Tensor, "... 1"]]:
    """n = γ∘(x − μ)/σ + β, with μ and 1/σ in float32 at least; σ² = mean((x − μ)²) + eps.

    centred: LayerNorm; else RMSNorm, where μ is 0 (returned as None) and there is no β. dtype: of n, None for x's.
    """
    dtype = x.dtype if dtype is None else dtype
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if takes_triton(impl, x):
        if (run := dry.active.get()) is not None:
            statistics = [x.new_empty((*x.shape[:-1], 1), dtype=wide) for _ in range(1 + centred)]
            n = x.new_empty(x.shape, dtype=dtype)
            run.ran("normalise", x, n)
            return n, statistics[0] if centred else None, statistics[-1]
        from . import triton_steps

        return triton_steps.normalise(x, gamma, beta, eps, centred, dtype)
    gamma, beta = (None if p is None else p.to(wide) for p in (gamma, beta))
    if centred:
        n, mean, rstd = torch.native_layer_norm(x.to(wide), x.shape[-1:], gamma, beta, eps)
        return n.to(dtype), mean, rstd
    rstd = (x.to(wide).square().mean(-1, keepdim=True) + eps).rsqrt()
    n = x.to(wide) * rstd
    return (n if gamma is None else n * gamma).to(dtype), None, rstd


def standardise(
    x: Annotated[Tensor, "... D"],
    mean: Annotated[Tensor, "... 1"] | None,
    rstd: Annotated[Tensor, "... 1"],
    *,
    dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> Annotated[Tensor, "... D"]:
    """x̂ = (x − μ)/σ, without a mean x/σ, in a dtype, None for x's."""
    dtype = x.dtype if dtype is None else dtype
    if takes_triton(impl, x):
        if (run := dry.active.get()) is not None:
            made = x.new_empty(x.shape, dtype=dtype)
            run.ran("standardise", x, made)
            return made
        from . import triton_steps

        return triton_steps.standardise(x, mean, rstd, dtype)
    return ((x if mean is None else x - mean) * rstd).to(dtype)


def normalise_grad(
    grad: Annotated[Tensor, "... D"],
    x: Annotated[Tensor, "... D"],
    mean: Annotated[Tensor, "... 1"] | None,
    rstd: Annotated[Tensor, "... 1"],
    gamma: Annotated[Tensor, "D"] | None,
    beta: Annotated[Tensor, "D"] | None,
    *,
    frozen: bool = False,
    impl: str = "auto",
) -> Annotated[Tensor, "... D"]:
    """∂metric/∂x of what `normalise` read, from grad = ∂metric/∂n, in grad's dtype; a mean makes it LayerNorm.

        ∂metric/∂x = (u − mean(u) − x̂ · mean(u ∘ x̂))/σ        u = γ∘grad, the means over D

    RMSNorm has no mean(u). frozen: σ is taken as a constant, which leaves out the last term.
    """
    if takes_triton(impl, grad):
        made = grad.new_empty(grad.shape)
        if (run := dry.active.get()) is not None:
            run.ran("normalise_grad", grad, *(() if frozen else (x,)), made)
            return made
        from . import triton_steps

        triton_steps.normalise_grad(grad, x, mean, rstd, gamma, frozen, made)
        return made
    wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
    if mean is not None and not frozen:
        # The operator reads the statistics as if they were contiguous, whatever their strides.
        statistics = mean.contiguous(), rstd.contiguous()
        gamma, beta = (None if p is None else p.to(wide) for p in (gamma, beta))
        args = (grad.to(wide), x.to(wide), grad.shape[-1:], *statistics, gamma, beta, [True, False, False])
        return torch.ops.aten.native_layer_norm_backward(*args)[0].to(grad.dtype)
    scaled = grad.to(wide) if gamma is None else grad.to(wide) * gamma.to(wide)
    if mean is not None:
        scaled = scaled - scaled.mean(-1, keepdim=True)
    elif not frozen:
        x_hat = x.to(wide) * rstd
        scaled = scaled - x_hat * (scaled * x_hat).mean(-1, keepdim=True)
    return (scaled * rstd).to(grad.dtype)


def normalise_grad_added(
    grad: Annotated[Tensor, "... D"],
    x: Annotated[Tensor, "... D"],
    mean: Annotated[Tensor, "... 1"] | None,
    rstd: Annotated[Tensor, "... 1"],
    gamma: Annotated[Tensor, "D"] | None,
    beta: Annotated[Tensor, "D"] | None,
    total: Annotated[Tensor, "... D"],
    *,
    read: Annotated[Tensor, "int64 B Q"] | None = None,
    frozen: bool = False,
    out: Annotated[Tensor, "... D"] | None = None,
    impl: str = "auto",
) -> tuple[Annotated[Tensor, "... D"], Annotated[Tensor, "... D"]]:
    """total + `normalise_grad`, in float32 at least, and the same in grad's dtype.

    read: total is [B, Q, D] at these of the tokens of grad [B, T, D], and 0 elsewhere. out: where the gradient alone
    goes, in grad's dtype, its rows equally far apart; None where nobody wants it.
    """
    if takes_triton(impl, grad):
        if (run := dry.active.get()) is not None:
            summed = total.new_empty(grad.shape)
            narrow = summed if grad.dtype == summed.dtype else grad.new_empty(grad.shape)
            given = [grad, total, *([] if frozen else [x]), *([] if out is None else [out])]
            run.ran("normalise_grad", *given, *{id(t): t for t in (summed, narrow)}.values())
            return summed, narrow
        from . import triton_steps

        made = triton_steps.normalise_grad(grad, x, mean, rstd, gamma, frozen, out, total, read)
        assert made is not None
        return made
    added = normalise_grad(grad, x, mean, rstd, gamma, beta, frozen=frozen, impl=impl)
    if out is not None:
        out.copy_(added)
    if read is None:
        summed = total + added
    else:
        summed = added.to(total.dtype, copy=True).scatter_add_(1, read[..., None].expand_as(total), total)
    return summed, summed.to(grad.dtype)


def moved_units(
    hidden: Annotated[Tensor, "1 N M"],
    up: Annotated[Tensor, "1 N M"] | None,
    act_fn: str,
    count: int,
    *,
    impl: str = "auto",
) -> Annotated[Tensor, "1 N M"]:
    """act(hidden), gated act(hidden) ∘ up, and of the last `count` rows what they have more than as many before them.

        units[n] = act(hidden[n]) ∘ up[n]        for n ≥ N − count: minus act(hidden[n − count]) ∘ up[n − count]

    Rounded once to hidden's dtype.
    """
    checks.one_of("act_fn", act_fn, ACTIVATIONS)
    if takes_triton(impl, hidden):
        if (run := dry.active.get()) is not None:
            made = hidden.new_empty(hidden.shape)
            run.ran("moved_units", hidden, *(() if up is None else (up,)), made)
            return made
        from . import triton_steps

        return triton_steps.moved_units(hidden, up, act_fn, count)
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    units = activation(act_fn, hidden.to(wide))
    units = units if up is None else units * up.to(wide)
    units[:, -count:] -= units[:, -2 * count : -count]
    return units.to(hidden.dtype)


def gated_grad(
    grad: Annotated[Tensor, "... M"],
    hidden: Annotated[Tensor, "... M"],
    up: Annotated[Tensor, "... M"],
    act_fn: str,
    *,
    impl: str = "auto",
) -> tuple[Annotated[Tensor, "... M"], Annotated[Tensor, "... M"]]:
    """∂metric/∂hidden and ∂metric/∂up from grad = ∂metric/∂units of units = act(hidden) ∘ up, in grad's dtype.

    ∂metric/∂hidden = grad ∘ up ∘ act'(hidden)        ∂metric/∂up = grad ∘ act(hidden)
    """
    checks.one_of("act_fn", act_fn, ACTIVATIONS)
    if takes_triton(impl, grad):
        if (run := dry.active.get()) is not None:
            made = grad.new_empty(grad.shape), grad.new_empty(grad.shape)
            run.ran("gated_grad", grad, hidden, up, *made)
            return made
        from . import triton_steps

        return triton_steps.gated_grad(grad, hidden, up, act_fn)
    return activation_grad(act_fn, grad * up, hidden), grad * activation(act_fn, hidden)


def activation_grad(name: str, grad: Tensor, hidden: Tensor) -> Tensor:
    """grad = ∂metric/∂act(hidden) taken through the activation function to ∂metric/∂hidden."""
    if name == "relu":
        return grad * (hidden > 0)
    if name == "silu":
        return torch.ops.aten.silu_backward(grad, hidden)
    return torch.ops.aten.gelu_backward(grad, hidden, approximate=_APPROXIMATE[name])


@functools.cache  # few and small; recorded batches read them where they lie, so that none may go
def _kept(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    """Numbers in float64 on a device, copied there once: a copy in every call would wait, and could not be recorded."""
    return torch.tensor(numbers, dtype=torch.float64, device=device)


def turn(
    x: Annotated[Tensor, "B C T K"],
    frequencies: Annotated[Tensor, "float64 F"],
    before: int,
    read: Annotated[Tensor, "int64 B T"] | None = None,
    *,
    sign: int = 1,
    adjacent: bool = False,
    out: Annotated[Tensor, "B C T K"] | None = None,
    impl: str = "auto",
) -> Annotated[Tensor, "B C T K"]:
    """x with dimensions i and i + F turned together by sign · position · frequencies[i], the others as they are.

    x: any strides but along K. before: positions before the first of T; read: which of those behind them, None for all
    in order. adjacent: dimensions 2i and 2i + 1 are turned together instead. out: where it goes, unit stride along K;
    x itself will do.
    """
    if frequencies.device != x.device:
        frequencies = _kept(tuple(frequencies.tolist()), x.device)
    if takes_triton(impl, x):
        if out is None:  # a token's channels beside each other
            batch, channels, tokens, size = x.shape
            out = x.new_empty(batch, tokens, channels, size).transpose(1, 2)
        if (run := dry.active.get()) is not None:
            run.ran("turn", x, out)
            return out
        from . import triton_steps

        triton_steps.turn(x, frequencies, before, read, sign, adjacent, out)
        return out
    wide, half = torch.float64 if x.dtype == torch.float64 else torch.float32, len(frequencies)
    positions = torch.arange(before, before + x.shape[-2], device=x.device) if read is None else before + read[:, None]
    angles = positions[..., None] * (sign * frequencies)
    cos, sin = angles.cos().to(wide), angles.sin().to(wide)  # [.., T, F]
    if adjacent:
        both, rest = x.to(wide).split([2 * half, x.shape[-1] - 2 * half], -1)
        first, second = both[..., ::2], both[..., 1::2]
        both = torch.stack([first * cos - second * sin, second * cos + first * sin], -1).flatten(-2)
        made = torch.cat([both, rest], -1).to(x.dtype)
    else:
        first, second, rest = x.to(wide).split([half, half, x.shape[-1] - 2 * half], -1)
        made = torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1).to(x.dtype)
    return made if out is None else out.copy_(made)


def moved_sum(
    x: Annotated[Tensor, "1 N D"],
    sent: Annotated[Tensor, "1 N-C D"],
    difference: Annotated[Tensor, "1 C D"],
    bias: Annotated[Tensor, "D"] | None = None,
    *,
    out: Annotated[Tensor, "1 N D"] | None = None,
    kept: Annotated[Tensor, "C D"] | None = None,
    impl: str = "auto",
) -> Annotated[Tensor, "1 N D"]:
    """x with what was sent to all rows but the last C, and to these what was sent to as many before, moved.

        out[n] = x[n] + sent[n] + bias        for n ≥ N − C: x[n] + sent[n − C] + bias + difference[n − (N − C)]

    Rounded once in the moved rows. `sent` may be overwritten. out: where it goes, contiguous, None for anywhere. kept:
    where the difference goes as well, its rows equally far apart.
    """
    count = difference.shape[1]
    if takes_triton(impl, x):
        out = x.new_empty(x.shape) if out is None else out
        if (run := dry.active.get()) is not None:
            run.ran("moved_sum", x, sent, difference, out, *(() if kept is None else (kept,)))
            return out
        from . import triton_steps

        triton_steps.moved_sum(x, sent, difference, bias, out, kept)
        return out
    if bias is not None:
        sent += bias
    out = torch.empty_like(x) if out is None else out
    torch.add(x[:, :-count], sent, out=out[:, :-count])
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    out[:, -count:] = x[:, -count:].to(wide) + sent[:, -count:] + difference
    if kept is not None:
        kept.copy_(difference[0])
    return out


def moved_sum_normalised(
    x: Annotated[Tensor, "1 N D"],
    sent: Annotated[Tensor, "1 N-C D"],
    difference: Annotated[Tensor, "1 C D"],
    bias: Annotated[Tensor, "D"] | None,
    gamma: Annotated[Tensor, "D"] | None,
    beta: Annotated[Tensor, "D"] | None,
    eps: float,
    *,
    centred: bool,
    out: Annotated[Tensor, "1 N D"] | None = None,
    kept: Annotated[Tensor, "C D"] | None = None,
    impl: str = "auto",
) -> tuple[Tensor, tuple[Tensor, Tensor | None, Tensor]]:
    """`moved_sum`, and `normalise` of it in the dtype of what was sent."""
    if not takes_triton(impl, x):
        out = moved_sum(x, sent, difference, bias, out=out, kept=kept, impl=impl)
        return out, normalise(out, gamma, beta, eps, centred=centred, dtype=sent.dtype, impl=impl)
    out = x.new_empty(x.shape) if out is None else out
    n = x.new_empty(x.shape, dtype=sent.dtype)
    mean, rstd = (x.new_empty((*x.shape[:-1], 1), dtype=torch.float32) for _ in range(2))
    if (run := dry.active.get()) is not None:
        run.ran("moved_sum", x, sent, difference, out, n, *(() if kept is None else (kept,)))
    else:
        from . import triton_steps

        norm = (gamma, beta, eps, centred)
        triton_steps.moved_sum(x, sent, difference, bias, out, kept, norm, (n, mean, rstd))
    return out, (n, mean if centred else None, rstd)


def takes_triton(impl: str, x: Tensor) -> bool:
    """Whether a step on this tensor, or on one like it in a dry run, is the GPU's kernel."""
    checks.one_of("impl", impl, IMPLS)
    if impl != "auto":
        return impl == "triton"
    run = dry.active.get()
    device = x.device if run is None else run.device
    differentiated = x.requires_grad and torch.is_grad_enabled()  # which only torch's operations can be
    return not differentiated and here.gpu_takes_triton(device, x.dtype)
