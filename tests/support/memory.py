"""What a call allocates: by torch's own account, by following every storage, and as the process's resident memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_bytes(call):
    """The most that torch's CPU allocator held of what was allocated inside the call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    changes = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = largest = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        largest = max(largest, held)
    return largest


class Storages(TorchDispatchMode):
    """Follows all storages that torch's operators make: their bytes in the order in which they are made, and the most
    that were alive at once. Triton's interpreter runs too long for the profiler."""

    def __init__(self):
        super().__init__()
        self.made, self.alive, self.peak = [], {}, 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        self.alive = {at: held for at, held in self.alive.items() if not held[0].expired()}
        new = op is torch.ops.aten.lift_fresh.default or not (op.is_view or op._schema.is_mutable)
        for x in tree_leaves(result) if op.namespace == "aten" and new else ():
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                if storage._cdata not in self.alive:
                    self.made.append(storage.nbytes())
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(count for _, count in self.alive.values()))
        return result


def resident(field):
    """A line of the system's account of this process's memory, in bytes, e.g. VmRSS, or VmHWM since `clear_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def clear_peak():
    """Set the high-water mark VmHWM back to what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


needs_peak = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="this system keeps no high-water mark that can be set back"
)


def in_a_process(code, **environment):
    """What code prints in a process of its own that imports what this one does.

    From the root, -c would find the source tree before the installed one: it runs beside this file.
    """
    env = os.environ | {"PYTHONPATH": os.pathsep.join(part for part in sys.path if part)} | environment
    command, here = [sys.executable, "-c", code], Path(__file__).parent
    done = subprocess.run(command, env=env, cwd=here, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def in_forks(function, cases, **environment):
    """{case: what a function of a module returns for it, as JSON}, each in a fork of a process that has run nothing."""
    code = f"""
import json, os, {function.__module__} as module
for case in json.loads({json.dumps(cases)!r}):
    if (child := os.fork()) == 0:
        print(json.dumps(module.{function.__name__}(*case)), flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, case
"""
    return dict(zip(cases, map(json.loads, in_a_process(code, **environment).splitlines()), strict=True))
