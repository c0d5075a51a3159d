"""What the Triton ops share: the device that they run on, one place that launches, and layout questions.

Nothing is computed here. This module and the triton_*.py files are the only ones that import triton; the package
imports them when an op runs.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

_log = logging.getLogger("eapcore")


@dataclass(frozen=True, slots=True)
class Target:
    """The device as far as tiles and splits depend on it.

    backend: "cuda", "hip" or "interpreter". arch: compute capability times ten (90), 0 elsewhere. processors: streaming
    multiprocessors or compute units. memory_bytes: the size of its memory.
    """

    backend: str
    arch: int
    processors: int
    memory_bytes: int

    @property
    def descriptors(self) -> bool:
        """Whether tiles are loaded through tensor descriptors (TMA), given operands that they can describe.

        sm_90 to sm_119 feed their tensor cores from shared memory, which TMA fills. sm_120 has TMA but the older
        tensor-core instructions and 99 KB of shared memory, so it takes the same path as sm_80 and sm_89.
        """
        return self.backend == "interpreter" or (self.backend == "cuda" and 90 <= self.arch < 120)


# What is planned for a GPU where there is none is planned for an H100 (SXM).
ELSEWHERE = Target("cuda", 90, processors=132, memory_bytes=80 << 30)


# Triton decides this where a kernel is defined; asking the environment in every step would take longer than some do.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return _INTERPRETED


@functools.cache
def _device_target(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    backend = "hip" if torch.version.hip else "cuda"
    return Target(
        backend=backend,
        arch=properties.major * 10 + properties.minor if backend == "cuda" else 0,
        processors=properties.multi_processor_count,
        memory_bytes=properties.total_memory,
    )


def target(device: torch.device) -> Target:
    """The target that kernels on tensors of this device are made for."""
    if interpreted():
        # Few processors keep the interpreter's grids small; still more than one split for most shapes.
        return Target("interpreter", 0, processors=4, memory_bytes=1 << 30)
    if device.type != "cuda":
        raise RuntimeError(f"Triton kernels need tensors on a GPU, got {device}: use impl='cpp' or impl='reference'")
    if not torch.cuda.is_available():
        return ELSEWHERE
    return _device_target(torch.cuda.current_device() if device.index is None else device.index)


# Products and sums are fused, as Triton did of itself up to 3.8; 3.9 warns where it is not said, and 3.10 will not.
FUSED = {"enable_fp_fusion": True}


def launch(kernel: Any, programs: int, *args: Any, device: torch.device, **meta: Any) -> None:
    """Run `programs` instances of a kernel on a device; every launch of this package goes through here.

    Triton compiles a kernel for arguments of a kind when it is first launched with them, and keeps it on the disk.
    """
    if interpreted():
        kernel[(programs,)](*args, **meta)
        return
    tell_when_compiling()
    meta |= FUSED
    current = triton.runtime.driver.active.get_current_device()
    if device.index in (None, current):
        _launch_here(kernel, programs, current, args, meta)
        return
    with torch.cuda.device(device):  # Triton launches on the current device, whichever tensors it is given
        _launch_here(kernel, programs, device.index, args, meta)


@dataclass(frozen=True, slots=True)
class _Call:
    """Calls of a kernel with arguments of the same types, and what Triton made for them.

    kernel: whose id stands in the key. tensors: which arguments are tensors. others: what gives the rest of them, a
    tuple. made: by all that it depends on what Triton made, and the arguments behind those of the caller.
    """

    kernel: Any
    tensors: tuple[int, ...]
    others: Callable[[tuple[Any, ...]], Any]
    made: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]]


# Triton binds and specialises every argument anew at each launch, which takes the host several times as long as the
# launch itself. Of these versions it is known how kernels that were made before are launched, and what NVIDIA's backend
# asks of a tensor: no more than whether its address is divisible by 16.
_DIRECT = triton.__version__.startswith(("3.6.", "3.7.")) and not torch.version.hip
_MOST_MADE = 4096  # of one call: each shape has its own
_calls: dict[tuple[Any, ...], _Call] = {}


def _launch_here(kernel: Any, programs: int, device: int, args: tuple[Any, ...], meta: dict[str, Any]) -> None:
    """Launch on the current device: what was made for such arguments as it is, anything else by Triton."""
    knobs, values = triton.knobs, tuple(meta.values())
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    watched = getattr(enter, "calls", enter) or getattr(leave, "calls", leave)  # by a profiler, whom Triton tells
    if watched or kernel.pre_run_hooks or knobs.runtime.add_stages_inspection_hook is not None or not _DIRECT:
        kernel[(programs,)](*args, **meta)
        return
    # Equal numbers of different types are told apart: 1, 1.0 and True are not made alike.
    same_types = (id(kernel), *map(type, args), *map(type, values), *meta)
    call = _calls.get(same_types)
    if call is None:
        call = _calls[same_types] = _call(kernel, args)
    given, aligned = list(args), 0
    kinds: list[Any] = []
    for place in call.tensors:
        x = args[place]
        address = given[place] = x.data_ptr()
        kinds += x.dtype, x.get_device()
        aligned = 2 * aligned + (address % 16 == 0)
    # Everything else by its value, of which Triton asks less: whether it is 1, divisible by 16, or beyond 32 bits.
    modes = knobs.runtime.debug, knobs.compilation.instrumentation_mode
    key = (device, aligned, *kinds, call.others(args), values, modes)
    found = call.made.get(key)
    if found is not None:
        made, constants = found
        stream = triton.runtime.driver.active.get_current_stream(device)
        made.run(programs, 1, 1, stream, made.function, made.packed_metadata, None, None, None, *given, *constants)
        return
    made, names = kernel[(programs,)](*args, **meta), kernel.arg_names[len(args) :]
    if isinstance(made, CompiledKernel) and all(name in meta for name in names):
        if len(call.made) >= _MOST_MADE:
            call.made.clear()
        call.made[key] = made, tuple(meta[name] for name in names)


def _call(kernel: Any, args: tuple[Any, ...]) -> _Call:
    tensors = tuple(i for i, x in enumerate(args) if isinstance(x, Tensor))
    rest = [i for i in range(len(args)) if i not in tensors]

    def others(args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(_kind(args[i]) for i in rest)

    described = any(isinstance(args[i], TensorDescriptor) for i in rest)
    return _Call(kernel, tensors, others if described or not rest else itemgetter(*rest), {})


def _kind(x: Any) -> Any:
    """What Triton asks of a tensor descriptor; anything else as it is."""
    if not isinstance(x, TensorDescriptor):
        return x
    return x.base.dtype, *x.block_shape, x.padding, getattr(x, "round_f32_to_tf32", False)


@functools.cache
def tell_when_compiling() -> None:
    """From here on the first of this package's kernels that Triton compiles, and does not find compiled, is logged."""
    told, others = False, triton.knobs.compilation.listener

    def listen(*, src: Any, cache_hit: bool, **more: Any) -> None:
        nonlocal told
        if others is not None:
            others(src=src, cache_hit=cache_hit, **more)
        own = str(getattr(src.fn, "module", "")).startswith(f"{__package__}.")
        if own and not cache_hit and not told:
            told = True
            _log.info("compiling the GPU's kernels, once for this machine: about ten seconds")

    triton.knobs.compilation.listener = listen


def check_precision(precision: str, dtype: torch.dtype, on: Target) -> str:
    """The `input_precision` of a product of this dtype; "ieee" for all but float32, whose products are exact anyway.

    "auto" takes the tensor cores: as the sum of a tf32x3 product begins anew at every step of the inner dimension, it
    rounds less than one long chain of multiply-adds.
    """
    if dtype == torch.float64:
        raise ValueError("impl='triton' has no float64 kernels: use impl='reference', or float32 inputs")
    if dtype != torch.float32 or precision == "ieee":
        return "ieee"
    if precision == "auto":
        return "tf32x3" if on.backend == "cuda" and on.arch >= 80 else "ieee"
    if on.backend == "hip":
        raise RuntimeError("precision='tf32x3' needs an NVIDIA GPU: use 'ieee', which AMD's matrix cores run exactly")
    return precision


def unit_inner_stride(tensor: Tensor) -> Tensor:
    """The tensor itself when its last axis has unit stride, a contiguous copy otherwise."""
    return tensor if tensor.shape[-1] == 1 or tensor.stride(-1) == 1 else tensor.contiguous()


def describable(tensor: Tensor) -> bool:
    """Whether TMA can address the tensor: 16-byte aligned start and strides, unit inner stride, sizes in 32 bits."""
    aligned = tensor.data_ptr() % 16 == 0
    for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True):
        aligned &= size == 1 or (stride > 0 and stride * tensor.element_size() % 16 == 0)
    return aligned and max(tensor.shape) < 2**31


def descriptor(view: Tensor, block: list[int]) -> TensorDescriptor:
    """A descriptor of a tensor; an axis of size 1, whose stride is arbitrary, gets that of a packed tensor."""
    unit = 16 // view.element_size()
    strides = [1]
    packed = cdiv(view.shape[-1], unit) * unit
    for size, stride in zip(view.shape[-2::-1], view.stride()[-2::-1], strict=True):
        strides.insert(0, packed if size == 1 else stride)
        packed = strides[0] * size
    return TensorDescriptor(view, list(view.shape), strides, block)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is not below n ≥ 1; Triton's own takes twenty times as long."""
    return 1 << (n - 1).bit_length()


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)
