"""What the Triton ops share: the device that they run on, one place that launches, and layout questions.

Nothing is computed here. This module and the triton_*.py files are the only ones that import triton; the package
imports them when an op runs.
"""

from __future__ import annotations

import functools
import logging
import os
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

_log = logging.getLogger("eapcore")


@dataclass(frozen=True, slots=True)
class Target:
    """The device as far as tiles and splits depend on it.

    backend: "cuda", "hip" or "interpreter". arch: compute capability times ten (90), 0 elsewhere. processors: streaming
    multiprocessors or compute units. l2_bytes, memory_bytes: the sizes of its L2 cache and of its memory.
    """

    backend: str
    arch: int
    processors: int
    l2_bytes: int
    memory_bytes: int

    @property
    def descriptors(self) -> bool:
        """Whether tiles are loaded through tensor descriptors (TMA), given operands that they can describe.

        sm_90 to sm_119 feed their tensor cores from shared memory, which TMA fills. sm_120 has TMA but the older
        tensor-core instructions and 99 KB of shared memory, so it takes the same path as sm_80 and sm_89.
        """
        return self.backend == "interpreter" or (self.backend == "cuda" and 90 <= self.arch < 120)


# What is planned for a GPU where there is none is planned for an H100 (SXM).
ELSEWHERE = Target("cuda", 90, processors=132, l2_bytes=50 << 20, memory_bytes=80 << 30)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _device_target(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    backend = "hip" if torch.version.hip else "cuda"
    return Target(
        backend=backend,
        arch=properties.major * 10 + properties.minor if backend == "cuda" else 0,
        processors=properties.multi_processor_count,
        l2_bytes=properties.L2_cache_size,
        memory_bytes=properties.total_memory,
    )


def target(device: torch.device) -> Target:
    """The target that kernels on tensors of this device are made for."""
    if interpreted():
        # Few processors keep the interpreter's grids small; still more than one split for most shapes.
        return Target("interpreter", 0, processors=4, l2_bytes=1 << 20, memory_bytes=1 << 30)
    if device.type != "cuda":
        raise RuntimeError(f"Triton kernels need tensors on a GPU, got {device}: use impl='cpp' or impl='reference'")
    if not torch.cuda.is_available():
        return ELSEWHERE
    return _device_target(torch.cuda.current_device() if device.index is None else device.index)


def launch(kernel: Any, programs: int, *args: Any, device: torch.device, **meta: Any) -> None:
    """Run `programs` instances of a kernel on a device; every launch of this package goes through here.

    Triton compiles a kernel for arguments of a kind when it is first launched with them, and keeps it on the disk.
    """
    if interpreted():
        kernel[(programs,)](*args, **meta)
        return
    tell_when_compiling()
    with torch.cuda.device(device):  # Triton launches on the current device, whichever tensors it is given
        kernel[(programs,)](*args, **meta)


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


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)
