"""How much memory a device has left."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from eapcore.execution.limits import limits


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on a device."""
    if device.type == "cuda":  # to the driver, what torch holds for its next tensors is in use
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 4 << 30  # where the system does not say: what a small laptop has left


def budget(device: torch.device) -> int:
    """Bytes that a batch may take."""
    return int(limits(device).share * free_bytes(device)) // sharers(device)


def out_of_memory(error: RuntimeError | MemoryError) -> bool:
    """Whether memory did not suffice: for torch on either device, for the C++ ops, or for oneDNN inside torch."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(words in str(error) for words in ("can't allocate memory", "could not create a", "could not execute a"))


def default_device() -> str:
    """Where a model runs if nobody says: a GPU where there is one, another for each process of this machine."""
    if not torch.cuda.is_available():
        return "cpu"
    rank = os.environ.get("LOCAL_RANK")
    return "cuda" if rank is None else f"cuda:{int(rank) % torch.cuda.device_count()}"


def sharers(device: torch.device) -> int:
    """How many processes of one run a launcher started on a device of this machine."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return here if device.type == "cpu" else -(-here // max(1, torch.cuda.device_count()))


def device_names() -> list[str]:
    """What there is to run on, for people."""
    gpus = [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    return [f"cpu ({torch.get_num_threads()} threads)", *gpus]
