"""How much memory a device has left."""

from __future__ import annotations

from pathlib import Path

import torch

_SHARE = 0.5  # of the free memory that a batch may take


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
    """Bytes that a batch may take: half of those that are free."""
    return int(_SHARE * free_bytes(device))
