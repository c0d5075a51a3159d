"""The contraction and the receivers' gradients for people with hooks of their own: torch, numpy, DLPack, torch.compile.

Importing this module registers `torch.ops.eapcore.edge_scores` and `torch.ops.eapcore.receiver_grads`. The functions
below take what they are given without a copy, call those ops, and return numpy for numpy and torch for everything else.
"""

from __future__ import annotations

from typing import Annotated, Any, Protocol, overload

import eapcore.kernels as kernels
import eapcore.kernels.checks as checks
import numpy as np
import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

_KINDS = "torch tensors, numpy arrays or objects with __dlpack__"


class _DLPack(Protocol):
    """What `torch.from_dlpack` takes."""

    def __dlpack__(self, *, stream: Any = ...) -> Any: ...

    def __dlpack_device__(self) -> tuple[int, int]: ...


_Array = Tensor | np.ndarray | _DLPack


@torch.library.custom_op("eapcore::edge_scores", mutates_args=())
def _edge_scores(
    delta: Tensor, grads: Tensor, mask: Tensor | None, reduce: str, rows: Tensor | None, precision: str, impl: str
) -> Tensor:
    return kernels.edge_scores(
        delta, grads, mask=mask, reduce=reduce, rows=rows, precision=precision, impl=impl
    ).contiguous()


@_edge_scores.register_fake
def _(
    delta: Tensor, grads: Tensor, mask: Tensor | None, reduce: str, rows: Tensor | None, precision: str, impl: str
) -> Tensor:
    checks.edge_scores(delta, grads, mask, reduce, rows)
    lead = {"all": (), "pair": (delta.shape[1],), "position": (delta.shape[2],)}[reduce]
    return delta.new_empty((*lead, delta.shape[0], grads.shape[0]), dtype=checks.output_dtype(delta.dtype))


@torch.library.custom_op("eapcore::receiver_grads", mutates_args=())
def _receiver_grads(
    g: Tensor,
    act: Tensor,
    weight: Tensor,
    kind: str,
    x_hat: Tensor | None,
    rstd: Tensor | None,
    gamma: Tensor | None,
    w_gamma: Tensor | None,
    offset: Tensor | None,
    impl: str,
    x: Tensor | None = None,
    mean: Tensor | None = None,
) -> Tensor:
    norm = kernels.Norm(kind, x_hat, rstd, gamma, x, mean)
    return kernels.receiver_grads(g, act, weight, norm=norm, w_gamma=w_gamma, offset=offset, impl=impl).contiguous()


@_receiver_grads.register_fake
def _(
    g: Tensor,
    act: Tensor,
    weight: Tensor,
    kind: str,
    x_hat: Tensor | None,
    rstd: Tensor | None,
    gamma: Tensor | None,
    w_gamma: Tensor | None,
    offset: Tensor | None,
    impl: str,
    x: Tensor | None = None,
    mean: Tensor | None = None,
) -> Tensor:
    checks.receiver_grads(g, act, weight, kernels.Norm(kind, x_hat, rstd, gamma, x, mean), w_gamma, offset)
    return g.new_empty((g.shape[0], g.shape[1], g.shape[2], weight.shape[1]))


_NO_DERIVATIVES = "eapcore.edge_scores and receiver_grads have no derivatives: detach what they are given"


def _no_derivative(context: Any, *grads: Tensor) -> None:
    raise RuntimeError(_NO_DERIVATIVES)


for _op in (_edge_scores, _receiver_grads):
    _op.register_autograd(_no_derivative)


@overload
def edge_scores(
    delta: np.ndarray,
    grads: _Array,
    *,
    mask: _Array | None = None,
    reduce: str = "all",
    rows: _Array | None = None,
    precision: str = "auto",
    impl: str = "auto",
) -> np.ndarray: ...
@overload
def edge_scores(
    delta: Tensor | _DLPack,
    grads: _Array,
    *,
    mask: _Array | None = None,
    reduce: str = "all",
    rows: _Array | None = None,
    precision: str = "auto",
    impl: str = "auto",
) -> Tensor: ...
def edge_scores(
    delta: Annotated[_Array, "S B T D"],
    grads: Annotated[_Array, "R B T D"],
    *,
    mask: Annotated[_Array, "bool S R"] | None = None,
    reduce: str = "all",
    rows: Annotated[_Array, "int64 N"] | None = None,
    precision: str = "auto",
    impl: str = "auto",
) -> Annotated[Tensor | np.ndarray, "S R | B S R | T S R"]:
    """Contract every sender's difference with every receiver's gradient, all pairs at once.

        scores[s, r] = Σ_{b,t} Σ_d delta[s, b, t, d] · grads[r, b, t, d]        where mask[s, r], else exactly 0

    Accumulates in float32, in float64 for float64, in a fixed order: the same inputs give the same bits twice. Torch
    tensors, numpy arrays and objects with `__dlpack__` are read in place, with any strides, also under torch.compile;
    only what torch cannot view, read-only or reversed arrays, is copied.

    Args:
        delta: [S, B, T, D] e_corrupt − e_clean of the senders; float64, float32, bfloat16 or float16.
        grads: [R, B, T, D] ∂metric/∂v of the receivers, same dtype and device.
        mask: bool [S, R], True where there is an edge; None for all pairs.
        reduce: "all" sums over b and t; "pair" over t only; "position" over b only.
        rows: int64 [N], distinct indices b·T + t of the token rows to sum over; None for all.
        precision: of float32 on a GPU: "ieee", "tf32x3" (three products on tensor cores, as exact), or "auto".
        impl: "auto" by device and dtype, "reference", "triton" or "cpp"; a named one runs or raises.

    Returns:
        [S, R] for "all", [B, S, R] for "pair", [T, S, R] for "position"; float32, or float64 for float64. A numpy array
        if delta is one, else a tensor.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or an option is unknown.
        RuntimeError: the named implementation cannot run here, or a derivative is asked for: there is none.

    Source: Syed, Rager, Conmy 2023, eq. 2.
    """
    tensors = [as_tensor(value, name) for name, value in (("delta", delta), ("grads", grads))]
    optional = [None if value is None else as_tensor(value, name) for name, value in (("mask", mask), ("rows", rows))]
    scores = torch.ops.eapcore.edge_scores(*tensors, optional[0], reduce, optional[1], precision, impl)
    return scores.detach().numpy() if isinstance(delta, np.ndarray) else scores


@overload
def receiver_grads(
    g: np.ndarray,
    act: _Array,
    weight: _Array,
    *,
    norm: kernels.Norm,
    w_gamma: _Array | None = None,
    offset: _Array | None = None,
    impl: str = "auto",
) -> np.ndarray: ...
@overload
def receiver_grads(
    g: Tensor | _DLPack,
    act: _Array,
    weight: _Array,
    *,
    norm: kernels.Norm,
    w_gamma: _Array | None = None,
    offset: _Array | None = None,
    impl: str = "auto",
) -> Tensor: ...
def receiver_grads(
    g: Annotated[_Array, "C B T K"],
    act: Annotated[_Array, "C' B T K"],
    weight: Annotated[_Array, "C' D K"],
    *,
    norm: kernels.Norm,
    w_gamma: Annotated[_Array, "C K"] | None = None,
    offset: Annotated[_Array, "C K"] | None = None,
    impl: str = "auto",
) -> Annotated[Tensor | np.ndarray, "C B T D"]:
    """Gradients with respect to the residual stream that each head's q, k or v input reads, without splitting it.

    For one channel with x̂ the normalised stream, n = γ∘x̂ + β and a = n·W + b, given g = ∂metric/∂a:

        ∂metric/∂v = rstd · ( γ∘(W g) − c1·1 − c2·x̂ )      c1 = ⟨g, Wᵀγ⟩/D      c2 = ⟨g, a − b − Wᵀβ⟩/D

    RMSNorm has no c1; without a norm it is W g. Torch tensors, numpy arrays and objects with `__dlpack__`, also under
    torch.compile.

    Args:
        g: [C, B, T, K] ∂metric/∂a; float64, float32, bfloat16 or float16.
        act: [C', B, T, K] a, the activations that the forward pass made.
        weight: [C', D, K]. C' is C, or a divisor of it: C / C' channels that follow one another share their a and W.
        norm: an `eapcore.kernels.Norm`, the normalisation that all C channels read through.
        w_gamma, offset: [C, K], Wᵀγ and b + Wᵀβ, from `eapcore.kernels.receiver_constants`; not needed without a norm
            (w_gamma not for RMSNorm).
        impl: "auto" by device and dtype, "reference", "triton" or "cpp"; a named one runs or raises.

    Returns:
        [C, B, T, D] in g's dtype: a numpy array if g is one, else a tensor.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or an option is unknown.
        RuntimeError: the named implementation cannot run here, or a derivative is asked for: there is none.

    Source: the LayerNorm derivative with both reductions moved to d_head; README, "The closed form".
    """
    if not isinstance(norm, kernels.Norm):
        raise ValueError(f"norm must be an eapcore.kernels.Norm, got {checks.short_repr(norm)}")
    given: dict[str, Any] = {"g": g, "act": act, "weight": weight}
    given |= {f"norm.{name}": getattr(norm, name) for name in ("x_hat", "rstd", "gamma", "x", "mean")}
    given |= {"w_gamma": w_gamma, "offset": offset}
    t = {name: None if value is None else as_tensor(value, name) for name, value in given.items()}
    statistics = (norm.kind, t["norm.x_hat"], t["norm.rstd"], t["norm.gamma"], t["w_gamma"], t["offset"])
    grads = torch.ops.eapcore.receiver_grads(
        t["g"], t["act"], t["weight"], *statistics, impl, t["norm.x"], t["norm.mean"]
    )
    return grads.detach().numpy() if isinstance(g, np.ndarray) else grads


def as_tensor(value: Any, name: str) -> Annotated[Tensor, "..."]:
    """A tensor over a torch tensor's, a numpy array's or a DLPack object's own memory.

    Raises:
        ValueError: another object, or an array of a dtype that torch does not have.
        RuntimeError: a tensor of which torch makes derivatives forward, or by `torch.func`.
    """
    if isinstance(value, Tensor):
        if not torch.compiler.is_compiling() and (
            unpack_dual(value).tangent is not None or torch._C._functorch.is_gradtrackingtensor(value)
        ):
            raise RuntimeError(_NO_DERIVATIVES)  # those made forward would be 0
        return value
    try:
        if isinstance(value, np.ndarray):
            viewable = value.flags.writeable and all(stride >= 0 for stride in value.strides)
            return torch.from_numpy(value if viewable else value.copy())
        if hasattr(value, "__dlpack__"):
            return torch.from_dlpack(value)
    except (TypeError, ValueError, RuntimeError, BufferError) as error:
        raise ValueError(f"{name} cannot be read as a tensor: {str(error).splitlines()[0]}") from error
    raise ValueError(f"{name} must be one of {_KINDS}, got a {type(value).__name__}")
