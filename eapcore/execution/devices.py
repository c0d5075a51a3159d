"""Which devices a model's layers lie on: those of this process, and as many layers on each as its memory allows."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from eapcore.execution.memory import default_device, free_bytes
from eapcore.models.load import usable
from eapcore.models.model import Model
from eapcore.models.placed import placed
from eapcore.models.tensors import tensors_in


def find_devices(names: str | Sequence[str | torch.device]) -> list[torch.device]:
    """The devices of a list of names, or of one text with commas in between; "auto" is every GPU of this process, and
    the CPU where there is none.

    Raises:
        ValueError: none, or one twice.
        RuntimeError: one that cannot be used here.
    """
    if names == "auto":
        if not torch.cuda.is_available():
            return [torch.device(default_device())]
        return share_of_process([torch.device("cuda", i) for i in range(torch.cuda.device_count())])
    each = names.split(",") if isinstance(names, str) else list(names)
    found = [usable(str(name).strip()) for name in each if str(name).strip()]
    devices = [device for device in found if device is not None]
    if not devices or "meta" in {device.type for device in devices}:
        raise ValueError(f"devices must be auto or names such as cuda:0,cuda:1, got {names!r}")
    if twice := sorted({str(device) for device in devices if devices.count(device) > 1}):
        raise ValueError(f"each device must be named once, got {', '.join(twice)} several times")
    return devices


def share_of_process(devices: Sequence[torch.device]) -> list[torch.device]:
    """Those that are this process's own, where a launcher started several on this machine: an equal run of them.

    Raises:
        ValueError: more processes than devices.
    """
    here, rank = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    if here > len(devices):
        raise ValueError(
            f"{here} processes of this machine cannot share {len(devices)} devices: start at most {len(devices)}"
        )
    return list(devices[rank * len(devices) // here : (rank + 1) * len(devices) // here])


def weight_bytes(model: Model) -> tuple[list[int], int]:
    """Bytes of each layer's weights, and of all others."""
    weights = model.weights
    ends = (weights.w_e, weights.w_pos, weights.w_u, weights.b_u, weights.ln_final)
    return [_bytes(layer) for layer in weights.layers], _bytes(ends)


def _bytes(value: object, device: torch.device | None = None) -> int:
    """Bytes that the tensors in a component or a tuple of them take, on a device where one is given."""
    tensors = [x for x in tensors_in(value) if device is None or x.device == device]
    seen: dict[tuple[int, int, int], int] = {}
    for x in tensors:
        key = x.untyped_storage()._cdata, int(x.storage_offset()), x.numel()
        seen[key] = x.numel() * x.itemsize
    return sum(seen.values())


def lay(layers: Sequence[int], rest: int, free: Sequence[int]) -> list[int]:
    """How many layers, in order, lie on each of some devices.

    Each layer goes to where most memory is left for one: so that the batch is as large as possible for which every
    device has room, since what a device keeps of a batch grows with its layers.

    Args:
        layers: bytes of each layer's weights.
        rest: bytes of what lies on the first device besides.
        free: bytes that each device has.

    Raises:
        ValueError: fewer layers than devices; weights that do not fit.
    """
    if len(free) > len(layers):
        raise ValueError(f"{len(free)} devices cannot share {len(layers)} layers: name at most {len(layers)}")
    left = [free[0] - rest, *free[1:]]
    counts = [1] * len(free)
    for _ in range(len(layers) - len(free)):
        most = max(range(len(free)), key=lambda d: left[d] / (counts[d] + 1))
        counts[most] += 1
    at = 0
    for device, count in enumerate(counts):
        needed = sum(layers[at : at + count])
        if needed > left[device]:
            raise ValueError(
                f"the weights, {(sum(layers) + rest) / 2**30:.1f} GiB, do not fit: {len(free)} "
                f"device{'s have' if len(free) > 1 else ' has'} {sum(free) / 2**30:.1f} GiB; name more devices, or "
                "take a narrower dtype"
            )
        at += count
    return counts


def spread(model: Model, devices: Sequence[torch.device]) -> Model:
    """The model with its layers on some devices, laid by the memory that they have, and all else on the first.

    Raises:
        ValueError: fewer layers than devices; weights that do not fit.
    """
    if list(model.devices) == list(devices):
        return model
    free = [free_bytes(device) + bytes_on(model, device) for device in devices]
    counts = lay(*weight_bytes(model), free)
    each = [device for device, count in zip(devices, counts, strict=True) for _ in range(count)]
    return placed(model, each, devices[0])


def bytes_on(model: Model, device: torch.device) -> int:
    """Bytes of a model's weights that lie on a device."""
    weights = model.weights
    return _bytes((weights.w_e, weights.w_pos, weights.layers, weights.w_u, weights.b_u, weights.ln_final), device)
