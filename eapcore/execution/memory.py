"""How much memory a device has left."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from eapcore.execution.limits import limits


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on a device; of the CPU's memory without swap, by this machine and by every
    control group, such as a container's, that this process is in."""
    if device.type == "cuda":  # to the driver, what torch holds for its next tensors is in use
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    found = _group_bytes()
    machine = [line.split() for line in _lines(Path("/proc/meminfo"))]
    found += [int(words[1]) * 1024 for words in machine if words[0] == "MemAvailable:"]
    return max(0, min(found, default=4 << 30))  # where the system does not say: what a small laptop has left


@dataclass(frozen=True, slots=True)
class _GroupFiles:
    """Where a control group says what it may take, what it takes, and what of that can be taken back."""

    limits: tuple[str, ...]
    used: str
    unread: str


_VERSION_1 = _GroupFiles(("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file")
_VERSION_2 = _GroupFiles(("memory.max", "memory.high"), "memory.current", "inactive_file")


def _group_bytes(root: Path = Path("/")) -> list[int]:
    """What is left in each of this process's control groups with a limit, nested ones and those above them.

    root: where the system's files lie, for tests. Pages of files that are not in use count as free, as they do for the
    machine.
    """
    own = "\n".join(_lines(root / "proc/self/cgroup"))
    left = [_left(group, files) for group, files in _groups(root, own)]
    return [number for number in left if number is not None]


@lru_cache(maxsize=4)
def _groups(root: Path, own: str) -> list[tuple[Path, _GroupFiles]]:
    """The folders of the control groups that a process is in, from its lines "id:controllers:group"."""
    named = [line.split(":", 2)[1:] for line in own.splitlines()]
    found = []
    for line in _lines(root / "proc/self/mountinfo"):
        mounted, kind = line.split()[3:5], line.partition(" - ")[2].split()
        if kind[:1] == ["cgroup2"]:
            files, paths = _VERSION_2, [group for controllers, group in named if not controllers]
        elif kind[:1] == ["cgroup"] and "memory" in kind[-1].split(","):
            files, paths = _VERSION_1, [group for controllers, group in named if "memory" in controllers.split(",")]
        else:
            continue
        top = root / mounted[1].lstrip("/")
        for path in map(Path, paths):  # a container may see its own group as the top, but not the path to it
            folder = top / path.relative_to(mounted[0]) if path.is_relative_to(mounted[0]) else top
            found += [(group, files) for group in (folder, *folder.parents) if group.is_relative_to(top)]
    return found


def _left(group: Path, files: _GroupFiles) -> int | None:
    """Bytes below the limit of a control group; None where it has none."""
    limits = [int(text) for name in files.limits for text in _lines(group / name) if text.isdecimal()]
    used = [int(text) for text in _lines(group / files.used) if text.isdecimal()]
    if not limits or not used:
        return None
    unread = [int(line.split()[1]) for line in _lines(group / "memory.stat") if line.split()[0] == files.unread]
    return min(limits) - max(0, used[0] - sum(unread))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []


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
