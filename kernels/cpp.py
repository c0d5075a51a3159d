"""The C++ ops on the CPU: `eapcore._csrc` behind the signatures that `eapcore.kernels` calls.

The extension takes addresses, strides and sizes, so it shares no symbol with torch. Everything that it relies on is
made sure of here: real values behind every pointer (no lazy negation or conjugation), the innermost dimension
contiguous, indices in range.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from .checks import FactoredReceivers, FactoredSenders, Norm, Sizes

_INTERFACE = 5  # what csrc/module.cpp calls kInterface


def _built() -> ModuleType:
    """The extension beside this package or, where this is a source tree, in which none is built, an installed one."""
    try:
        return import_module("eapcore._csrc")
    except ModuleNotFoundError:
        for folder in sys.path:
            for suffix in EXTENSION_SUFFIXES:
                path = Path(folder or ".", "eapcore", f"_csrc{suffix}")
                if path.is_file():
                    spec = spec_from_file_location("eapcore._csrc", path)
                    assert spec is not None and spec.loader is not None
                    module = module_from_spec(spec)
                    spec.loader.exec_module(module)
                    return module
        raise


_csrc: ModuleType | None = None
_why_not = ""
try:
    _csrc = _built()
except ImportError as error:
    _why_not = f"eapcore._csrc cannot be imported ({error}): install eapcore again where a C++17 compiler is present"
if _csrc is not None and getattr(_csrc, "interface", None) != _INTERFACE:
    _why_not = "eapcore._csrc was built from other sources than this eapcore: install eapcore again"
    _csrc = None

_DTYPES = {
    "edge_scores": (torch.float64, torch.float32, torch.bfloat16, torch.float16),
    "receiver_grads": (torch.float32, torch.bfloat16),
    "edge_scores_factored": (torch.float32, torch.bfloat16),
    "pattern_changes": (torch.float64, torch.float32),
    "moved_rstd": (torch.float64, torch.float32),
}
_NAMES = {torch.float64: "float64", torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}

_LINE = 64  # bytes of a cache line, at which an op's working memory begins

_ran: ContextVar[list[str] | None] = ContextVar("_ran", default=None)


def why_not() -> str:
    """ "" if the extension can be imported, else one sentence that says why it cannot."""
    return _why_not


def supports(op: str, dtype: torch.dtype) -> bool:
    """Whether the C++ implementation of an op takes tensors of this dtype."""
    return dtype in _DTYPES.get(op, ())


def isas() -> list[str]:
    """The instruction sets that this machine has out of avx512bf16, avx512, avx2 and portable, best first."""
    return list(_extension().isas())


def isa() -> str:
    """The instruction set that the ops use: the best, or what the environment variable EAPCORE_ISA names."""
    here = isas()
    wanted = os.environ.get("EAPCORE_ISA", here[0])
    if wanted not in here:
        raise RuntimeError(f"EAPCORE_ISA must be one of {', '.join(here)} on this machine, got {wanted!r}")
    return wanted


@contextmanager
def record() -> Iterator[list[str]]:
    """Collect "op isa dtype" of every C++ op that runs inside the block: the proof of which code ran."""
    ran: list[str] = []
    token = _ran.set(ran)
    try:
        yield ran
    finally:
        _ran.reset(token)


def _extension() -> ModuleType:
    if _csrc is None:
        raise RuntimeError(_why_not)
    return _csrc


def _note(op: str, isa_name: str, dtype: torch.dtype) -> None:
    ran = _ran.get()
    if ran is not None:
        ran.append(f"{op} {isa_name} {_NAMES[dtype]}")


def _check(op: str, tensors: dict[str, Tensor | None]) -> None:
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.device.type != "cpu" or tensor.layout != torch.strided:
            raise ValueError(
                f"impl='cpp' needs strided CPU tensors, got {name} as {tensor.layout} on {tensor.device}: move it with "
                f".cpu(), or choose impl='triton' for a GPU"
            )
    first = next(tensor for tensor in tensors.values() if tensor is not None)
    if not supports(op, first.dtype):
        takes = ", ".join(_NAMES[dtype] for dtype in _DTYPES[op])
        raise ValueError(f"impl='cpp' of {op} takes {takes}, got {first.dtype}: choose impl='reference' for it")


def _real(tensor: Tensor) -> Tensor:
    """The same values, none of them lazy, with the innermost dimension contiguous."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    return tensor if tensor.shape[-1] <= 1 or tensor.stride(-1) == 1 else tensor.contiguous()


def _address(tensor: Tensor) -> tuple[int, ...]:
    """Where it lies, then its strides in elements of all dimensions but the innermost."""
    return (tensor.data_ptr(), *tensor.stride()[:-1])


def _allocate(keep: list[Tensor]) -> Callable[[int], int]:
    """What makes an op's working memory when it is called with so many bytes, and returns its address.

    It is torch's, so that whatever counts or bounds torch's memory counts it too.
    """

    def allocate(count: int) -> int:
        keep.append(torch.empty(count + _LINE, dtype=torch.uint8, device="cpu"))
        return -(-keep[-1].data_ptr() // _LINE) * _LINE

    return allocate


def _mask_bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.detach().contiguous().view(torch.uint8)


def _scores(shape: tuple[int, int, int, int], reduce: str, dtype: torch.dtype) -> Tensor:
    senders, receivers, batch, tokens = shape
    lead = {"all": (), "pair": (batch,), "position": (tokens,)}[reduce]
    return torch.empty(
        (*lead, senders, receivers), dtype=torch.float64 if dtype == torch.float64 else torch.float32, device="cpu"
    )


def edge_scores(delta: Tensor, grads: Tensor, mask: Tensor | None, reduce: str, rows: Tensor | None) -> Tensor:
    """`eapcore.kernels.edge_scores`; float32 sums inside blocks of the inner dimension, float64 sums over blocks.

    With avx512bf16, bfloat16 below 2^-126 in size is read as 0, and products and sums of that size become 0.
    """
    _check("edge_scores", {"delta": delta, "grads": grads, "mask": mask, "rows": rows})
    extension, isa_name, dtype = _extension(), isa(), delta.dtype
    delta, grads, mask = _real(delta), _real(grads), _mask_bytes(mask)
    n_senders, batch, tokens, d_model = delta.shape
    n_receivers = grads.shape[0]
    rows = None if rows is None else rows.detach().contiguous()
    scores = _scores((n_senders, n_receivers, batch, tokens), reduce, dtype)
    keep: list[Tensor] = []
    extension.edge_scores(
        isa_name,
        _NAMES[dtype],
        _address(delta),
        _address(grads),
        (n_senders, n_receivers, batch, tokens, d_model),
        0 if mask is None else mask.data_ptr(),
        reduce,
        0 if rows is None else rows.data_ptr(),
        -1 if rows is None else rows.numel(),
        torch.get_num_threads(),
        scores.data_ptr(),
        _allocate(keep),
    )
    _note("edge_scores", isa_name, dtype)
    return scores


def _typed(tensor: Tensor | None, keep: list[Tensor], *, any_inner: bool = False) -> tuple[int, ...]:
    """Address, 1 for bfloat16, strides without the innermost (all with `any_inner`), filled up to six numbers.

    `keep` takes hold of what lies at the address.
    """
    if tensor is None:
        return (0,) * 6
    tensor = tensor.detach().resolve_conj().resolve_neg()
    if tensor.dtype not in (torch.float32, torch.bfloat16):
        tensor = tensor.float()
    strides = list(tensor.stride())
    if any_inner:  # a weight [C, D, K] or [H, K, D]: either of the last two strides is 1
        if 1 not in strides[1:]:
            tensor = tensor.contiguous()
            strides = list(tensor.stride())
    else:
        tensor = _real(tensor)
        strides = list(tensor.stride())[:-1]
    keep.append(tensor)
    numbers = (tensor.data_ptr(), int(tensor.dtype == torch.bfloat16), *strides)
    return numbers + (0,) * (6 - len(numbers))


def _float32(tensor: Tensor | None, keep: list[Tensor]) -> int:
    """The address of the same values as contiguous float32, 0 for None."""
    if tensor is None:
        return 0
    keep.append(tensor.detach().resolve_conj().resolve_neg().float().contiguous())
    return keep[-1].data_ptr()


def _weight(weight: Tensor, keep: list[Tensor]) -> tuple[int, ...]:
    """A weight [C, D, K] as the extension wants it: strides of C, K, D."""
    return _typed(weight.transpose(1, 2), keep, any_inner=True)


def _norm(norm: Norm, keep: list[Tensor]) -> tuple[int, ...]:
    if norm.kind == "none":
        return (0,) * 6
    return (*_typed(norm.x_hat, keep)[:4], _float32(norm.rstd, keep), _float32(norm.gamma, keep))


def receiver_grads(
    g: Tensor,
    act: Tensor,
    weight: Tensor,
    norm: Norm,
    w_gamma: Tensor | None,
    offset: Tensor | None,
    out: Tensor | None = None,
) -> Tensor:
    """`eapcore.kernels.receiver_grads`; float32 inside, rounded once to g's dtype."""
    named = {"g": g, "act": act, "weight": weight, "w_gamma": w_gamma, "offset": offset}
    norms = {"norm.x_hat": norm.x_hat, "norm.rstd": norm.rstd, "norm.gamma": norm.gamma}
    _check("receiver_grads", named | norms)
    extension, isa_name = _extension(), isa()
    channels, batch, tokens, d_head = g.shape
    d_model = weight.shape[1]
    if out is None:
        out = torch.empty((channels, batch, tokens, d_model), dtype=g.dtype, device="cpu")
    if d_head == 0:
        return out.zero_()
    keep: list[Tensor] = []
    extension.receiver_grads(
        isa_name,
        _typed(g, keep),
        _typed(act, keep),
        _weight(weight, keep),
        _norm(norm, keep),
        norm.kind == "layernorm",
        _float32(w_gamma, keep),
        _float32(offset, keep),
        (channels, batch, tokens, d_head, d_model),
        torch.get_num_threads(),
        out.data_ptr(),
        g.dtype == torch.bfloat16,
        _allocate(keep),
    )
    _note("receiver_grads", isa_name, g.dtype)
    return out


def edge_scores_factored(
    senders: FactoredSenders, receivers: FactoredReceivers, mask: Tensor | None, reduce: str, chunk: int | None
) -> Tensor:
    """`eapcore.kernels.edge_scores_factored`; what is made is never rounded below float32.

    A block is a chunk of token rows (96 if `chunk` is None) times a slice of the residual stream's columns (32 with
    AVX-512): what is made of it goes straight into the packed form that the contraction reads, and is gone with the
    next block. Each thread holds one block: at most 128 bytes for each sender, receiver and token row of a chunk.
    """
    named = {
        "senders.dz": senders.dz,
        "senders.embed": senders.embed,
        "senders.mlp": senders.mlp,
        "receivers.w_gamma": receivers.w_gamma,
        "receivers.offset": receivers.offset,
        "receivers.mlp": receivers.mlp,
        "receivers.logits": receivers.logits,
        "mask": mask,
    }
    for layer, (w_o, groups, norm) in enumerate(zip(senders.w_o, receivers.weight, receivers.norms, strict=True)):
        named |= {f"senders.w_o[{layer}]": w_o}
        named |= {f"receivers.g[{layer}]": receivers.g[layer], f"receivers.act[{layer}]": receivers.act[layer]}
        named |= {f"receivers.weight[{layer}][{i}]": weight for i, weight in enumerate(groups)}
        named |= {f"receivers.norms[{layer}].{name}": getattr(norm, name) for name in ("x_hat", "rstd", "gamma")}
    _check("edge_scores_factored", named)
    extension, isa_name = _extension(), isa()
    layers, batch, tokens, heads, d_head = senders.dz.shape
    channels, d_model = receivers.w_gamma.shape[1], senders.embed.shape[-1]
    mlps = senders.mlp is not None
    n_senders, n_receivers = 1 + layers * (heads + mlps), layers * (channels + mlps) + 1
    scores = _scores((n_senders, n_receivers, batch, tokens), reduce, torch.float32)
    mask = _mask_bytes(mask)
    keep: list[Tensor] = []
    # [L, B, T, H, K] -> [L, B, T, K] of head 0, with the head's stride behind the others
    dz = _real(senders.dz)
    keep.append(dz)
    stride_l, stride_b, stride_t, stride_h, _ = dz.stride()
    extension.edge_scores_factored(
        isa_name,
        _typed(senders.embed, keep),
        (dz.data_ptr(), int(dz.dtype == torch.bfloat16), stride_l, stride_b, stride_t, stride_h),
        [_typed(w, keep, any_inner=True) for w in senders.w_o],
        _typed(senders.mlp, keep),
        [_typed(g, keep) for g in receivers.g],
        [_typed(act, keep) for act in receivers.act],
        [[_weight(w, keep) for w in groups] for groups in receivers.weight],
        [[w.shape[0] for w in groups] for groups in receivers.weight],
        [_norm(norm, keep) for norm in receivers.norms],
        [norm.kind == "layernorm" for norm in receivers.norms],
        _float32(receivers.w_gamma, keep),
        _float32(receivers.offset, keep),
        _typed(receivers.mlp, keep),
        _typed(receivers.logits, keep),
        (layers, batch, tokens, heads, channels, d_head, d_model),
        mlps,
        0 if mask is None else mask.data_ptr(),
        reduce,
        extension.default_chunk if chunk is None else chunk,
        torch.get_num_threads(),
        scores.data_ptr(),
        _allocate(keep),
    )
    _note("edge_scores_factored", isa_name, senders.dz.dtype)
    return scores


def pattern_changes(
    raw: Tensor,
    rstd: Tensor | None,
    moved: Tensor | None,
    known: Tensor,
    normed: Tensor,
    values: Tensor,
    past: tuple[Tensor, Tensor] | None,
    *,
    of_keys: bool,
) -> Tensor:
    """`eapcore.kernels.patterns.pattern_changes`; a block of 64 bytes of senders at a time."""
    named = {"raw": raw, "rstd": rstd, "moved": moved, "known": known, "normed": normed, "values": values}
    _check("pattern_changes", named)
    extension, isa_name, dtype = _extension(), isa(), known.dtype
    batch, tokens, senders, others, heads = raw.shape
    if raw.stride()[-2:] != (heads, 1):
        raw = raw.contiguous()
    sides = [None if x is None else _real(x).contiguous() for x in (*list(named.values())[1:], *(past or (None, None)))]
    out = torch.empty((batch, 1 if of_keys else tokens, senders, heads), dtype=dtype, device="cpu")
    keep: list[Tensor] = []
    extension.pattern_changes(
        isa_name,
        _NAMES[dtype],
        (raw.data_ptr(), *raw.stride()[:3]),
        [0 if x is None else x.data_ptr() for x in sides],
        (batch, tokens, senders, others, heads),
        of_keys,
        torch.get_num_threads(),
        out.data_ptr(),
        _allocate(keep),
    )
    _note("pattern_changes", isa_name, dtype)
    return out


def moved_rstd(x: Tensor, delta: Tensor, eps: float, *, centred: bool) -> Tensor:
    """`eapcore.kernels.patterns.moved_rstd`; two passes over a row, which is in a cache in the second."""
    _check("moved_rstd", {"x": x, "delta": delta})
    extension, isa_name = _extension(), isa()
    x, delta = _real(x), _real(delta)
    senders, batch, tokens, width = delta.shape
    out = torch.empty((batch, tokens, senders), dtype=x.dtype, device="cpu")
    sizes = (batch, tokens, senders, width)
    threads = torch.get_num_threads()
    extension.moved_rstd(
        isa_name, _NAMES[x.dtype], _address(x), _address(delta), sizes, eps, centred, threads, out.data_ptr()
    )
    _note("moved_rstd", isa_name, x.dtype)
    return out


def default_chunk() -> int:
    """Token rows a chunk that `edge_scores_factored` takes where nobody says."""
    return int(_extension().default_chunk)


def workspace_bytes(
    op: str, sizes: Sizes, dtype: torch.dtype, mask: Tensor | None, reduce: str, chunk: int | None
) -> int:
    """`eapcore.kernels.workspace_bytes`: the extension runs the op up to where it asks for its memory.

    Beside that block an op keeps lists of token rows, 40 bytes a row, which are not counted.
    """
    extension, isa_name, threads = _extension(), isa(), torch.get_num_threads()
    mask = _mask_bytes(mask)
    at = 0 if mask is None else mask.data_ptr()
    batch, tokens, d_model = sizes.batch, sizes.tokens, sizes.d_model
    if op == "edge_scores":
        shape = (sizes.senders, sizes.receivers, batch, tokens, d_model)
        found = extension.edge_scores_bytes(isa_name, _NAMES[dtype], shape, at, reduce, threads)
    elif op == "receiver_grads":
        shape = (sizes.channels, batch, tokens, sizes.d_head, d_model)
        found = extension.receiver_grads_bytes(isa_name, shape, threads)
    else:
        factored = (sizes.layers, batch, tokens, sizes.heads, sizes.channels, sizes.d_head, d_model)
        rows = extension.default_chunk if chunk is None else chunk
        found = extension.edge_scores_factored_bytes(isa_name, factored, sizes.mlps, at, reduce, rows, threads)
    return int(found) + _LINE
