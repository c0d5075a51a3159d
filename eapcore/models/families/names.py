"""Foreign configurations and tensor names → ModelConfig and Weights. Nothing else in eapcore knows a foreign name."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eapcore.models.checkpoint import Stored
from eapcore.models.config import DTYPES, ModelConfig
from eapcore.models.weights import Weights

Shapes = dict[str, tuple[int, ...]]
# Other names of the same functions: the three tanh forms differ only in how they are computed.
_ACTIVATIONS = {
    "gelu_new": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",
    "gelu_fast": "gelu_new",
    "gelu": "gelu",
    "relu": "relu",
}
_PREFIX = re.compile(r"\A(?:transformer\.|model\.|module\.)+")  # of wrappers; `_orig_mod.` may stand anywhere
_BUFFER = re.compile(r"h\.\d+\.attn\.(?:bias|masked_bias)|blocks\.\d+\.attn\.(?:mask|IGNORE)")
_SHOWN = 4  # tensors that an error names before it only counts


@dataclass(frozen=True, slots=True)
class Layout:
    """How a checkpoint stores a model: what it must hold, what it may, and how that becomes Weights."""

    kind: str
    config: ModelConfig
    required: Shapes
    optional: Shapes
    build: Callable[[Tensors], Weights]


@dataclass(frozen=True, slots=True)
class Tensors:
    """A checkpoint's tensors by their layout's names, converted when they are read."""

    stored: Mapping[str, Stored]
    dtype: torch.dtype | None
    device: torch.device | None

    def __call__(self, name: str) -> Tensor:
        return self.stored[name].read().to(device=self.device, dtype=self.dtype)

    def get(self, name: str) -> Tensor | None:
        return self(name) if name in self.stored else None

    def pair(self, name: str, weight: str, bias: str) -> tuple[Tensor, Tensor]:
        return self(name + weight), self(name + bias)


def build_weights(
    layout: Layout, tensors: Iterable[Stored], *, dtype: torch.dtype | None, device: torch.device | None
) -> Weights:
    """Read a checkpoint's tensors into Weights, one at a time, converted only where dtype or device ask for it."""
    by_name = _match(layout, tensors)
    if dtype is None and len(kinds := sorted({tensor.dtype for tensor in by_name.values()})) > 1:
        raise ValueError(f"the checkpoint mixes {' and '.join(kinds)}: give a dtype to convert it to")

    return layout.build(Tensors(by_name, dtype, device))


def _match(layout: Layout, tensors: Iterable[Stored]) -> dict[str, Stored]:
    by_name: dict[str, Stored] = {}
    for tensor in tensors:
        name = _PREFIX.sub("", tensor.name.replace("_orig_mod.", ""), count=1)
        if _BUFFER.fullmatch(name):
            continue
        if name in by_name:
            raise ValueError(f"the checkpoint holds {name} twice, as {by_name[name].name} and as {tensor.name}")
        by_name[name] = tensor
    known = layout.required | layout.optional
    missing = [f"{name} {list(shape)}" for name, shape in layout.required.items() if name not in by_name]
    extra = [tensor.name for name, tensor in by_name.items() if name not in known]
    if missing or extra:
        faults = [f"lacks {_some(missing)}"] if missing else []
        faults += [f"has {_some(extra)} besides"] if extra else []
        raise ValueError(
            f"the checkpoint is not the {layout.kind} that its configuration describes: {' and '.join(faults)}"
        )
    for name, tensor in by_name.items():
        if tensor.shape != known[name]:
            raise ValueError(
                f"{tensor.name} must be {list(known[name])} by the configuration, got {list(tensor.shape)}"
            )
        if tensor.dtype not in DTYPES:
            raise ValueError(
                f"{tensor.name} has dtype {tensor.dtype}: quantized weights are not supported, only {', '.join(DTYPES)}"
            )
    return by_name


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


# Configurations


def _integer(raw: Mapping[str, Any], *names: str) -> int:
    for name in names:
        value = raw.get(name)
        if value is not None:
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} of the configuration must be a positive integer, got {value!r}")
            return value
    raise ValueError(f"the configuration lacks {' or '.join(names)}")


def _positive(raw: Mapping[str, Any], *names: str, default: float) -> float:
    for name in names:
        value = raw.get(name)
        if value is not None:
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"{name} of the configuration must be a positive number, got {value!r}")
            return float(value)
    return default


def _flag(raw: Mapping[str, Any], name: str, default: bool) -> bool:
    value = raw.get(name)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{name} of the configuration must be true or false, got {value!r}")
    return default if value is None else value


def _activation(raw: Mapping[str, Any], name: str, default: str | None) -> str:
    value = raw.get(name, default)
    if value not in _ACTIVATIONS:
        raise ValueError(f"{name} {value!r} is not supported: expected one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[value]


def _refuse(raw: Mapping[str, Any], allowed: Mapping[str, tuple[object, ...]]) -> None:
    """ValueError for a field that changes the mathematics. None stands for an absent field too."""
    for name, values in allowed.items():
        value = raw.get(name)
        if value is not None and value not in values:
            expected = " or ".join(repr(each) for each in values) or "none"
            raise ValueError(f"{name} {value!r} of the configuration is not supported: expected {expected}")
