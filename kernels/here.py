"""What of Triton can run with the packages that are here, and what is logged where something cannot."""

from __future__ import annotations

import logging
from functools import cache

import numpy as np
import torch

_log = logging.getLogger("eapcore")


@cache
def no_triton(interprets: bool) -> str:
    """ "" if Triton, or its interpreter, can be used with the packages that are here, else why not, in a sentence."""
    try:
        import triton
    except ImportError as error:
        absent = error.name == "triton"
        return "the package triton is not installed" if absent else f"the package triton cannot be imported ({error})"
    # Its interpreter makes integers of arrays of one element, which is an error from numpy 2.4 on.
    if interprets and _release(triton.__version__) < (3, 7) and _release(np.__version__) >= (2, 4):
        both = f"{triton.__version__}'s interpreter needs numpy below 2.4, and numpy is {np.__version__}"
        return f"triton {both}: pip install 'numpy<2.4', or use triton 3.7 or newer"
    return ""


def _release(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def gpu_takes_triton(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether "auto" takes Triton's kernels for tensors of this device and dtype. Where there are none for the GPU, it
    is logged once, and torch's operations do their work."""
    if device.type != "cuda" or dtype == torch.float64:
        return False
    why_not = no_triton(False)
    if why_not:
        say_once(f"the GPU's kernels are not here, and torch's own operations, which are slower, run: {why_not}")
    return not why_not


@cache
def say_once(what: str) -> None:
    _log.warning(what)
