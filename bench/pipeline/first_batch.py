"""What a cold process compiles for its first batch, counted and timed without a GPU.

    python bench/bench_pipeline.py --first

A batch is scored by the code that runs, on tensors without memory, as if they lay on a GPU; what the ops' Triton
launchers would launch is compiled for sm_90 instead, in a process of its own with an empty cache. A kernel is compiled
once for every tiling and mode that a batch takes (ours) and every pattern of arguments that are 1 or divisible by 16
(Triton's). Seconds are of the processor, ptxas included.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

BENCH = Path(__file__).resolve().parents[1]
if __name__ == "__main__":  # the child process
    sys.path[:0] = [str(BENCH), str(BENCH.parent)]

from ops.triton_compile import MACHINES, driver

from eapcore.attribution import plan as planning
from eapcore.attribution.methods import Options, recipe
from pipeline.work import QWEN, SMALL, Work

SMALL256 = replace(SMALL, B=256)
CASES = {
    "GPT-2 small, bfloat16, eap": (SMALL256, "bfloat16", "eap", "dense"),
    "GPT-2 small, bfloat16, hybrid with uncertainty": (SMALL256, "bfloat16", "hybrid", "dense"),
    "GPT-2 small, float32, eap": (SMALL256, "float32", "eap", "dense"),
    "GPT-2 small, bfloat16, eap, factored": (SMALL256, "bfloat16", "eap", "factored"),
    "Qwen2.5-0.5B, bfloat16, eap": (replace(QWEN, B=64), "bfloat16", "eap", "dense"),
}
# B × T behind the first batch: the rest of the pairs, and prompts of other lengths.
BATCHES = ((37, 20), (256, 17), (1, 20), (100, 24))


@dataclass
class Found:
    """By kernel in how many variants, and the seconds that these take; variants in all after the first batch and after
    each that follows; and what was logged."""

    variants: Counter[str] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)
    batches: list[int] = field(default_factory=list)
    logged: str = ""


class Compiler:
    """In the place of launching: counts what is new, and compiles it where its kernel is `only`, or "all"."""

    def __init__(self, only: str) -> None:
        self.only, self.found, self.met, self.name = only, Found(), set[str](), ""

    def before(self, *, key: str, **_: Any) -> bool:
        """Triton asks whether somebody else has the kernel, before it compiles it."""
        if self.name + key not in self.met:
            self.met.add(self.name + key)
            self.found.variants[self.name] += 1
        return self.only not in ("all", self.name)

    def launch(self, kernel: Any, programs: int, *args: Any, device: torch.device, **meta: Any) -> None:
        self.name, began = kernel.__name__, sum(os.times()[:4])
        kernel.warmup(*args, grid=(1,), **meta)
        self.found.seconds[self.name] += sum(os.times()[:4]) - began


@contextlib.contextmanager
def on_a_gpu(compiler: Compiler, target: str = "sm_90") -> Iterator[None]:
    """Inside, ops on tensors without memory launch as on a GPU, into the compiler; once for a process."""
    import triton
    from eapcore.kernels import steps, triton_common

    from eapcore import kernels

    machine = MACHINES[target]
    triton.runtime.driver.set_active(driver(machine))
    on = triton_common.Target("cuda", int(machine.arch), machine.processors, machine.memory_bytes)
    original = steps.takes_triton

    def takes(impl: str, x: torch.Tensor) -> bool:
        return impl != "reference" and x.dtype != torch.float64 and not (x.requires_grad and torch.is_grad_enabled())

    with contextlib.ExitStack() as how:
        for module in list(sys.modules.values()):
            if getattr(module, "takes_triton", None) is original:
                how.enter_context(mock.patch.object(module, "takes_triton", takes))
        how.enter_context(mock.patch.object(kernels, "choose", lambda op, **_: "triton"))
        how.enter_context(mock.patch.object(planning, "dry_run", lambda *_: contextlib.nullcontext()))
        how.enter_context(mock.patch.object(triton_common, "target", lambda device: on))
        how.enter_context(mock.patch.object(triton_common, "launch", compiler.launch))
        how.enter_context(mock.patch.object(triton.knobs.runtime, "jit_cache_hook", compiler.before))
        yield


def run(work: Work, dtype: str, method: str, storage: str) -> None:
    """One batch of a method."""
    model = work.without_memory(getattr(torch, dtype))
    how = recipe(method, model.graph, Options())
    passes = how.planned("corrupt", "all", statistics=method == "hybrid")
    plan = planning.Plan(model.config, model.dtype, torch.device("cuda"), passes=passes)
    planning.run_dry(plan, model, work.B, work.T, storage, 1, contextlib.nullcontext())  # type: ignore[arg-type]


def compile_here(name: str, only: str) -> Found:
    """A case's first batch, compiled, and what the later ones ask for besides, in this process."""
    from eapcore.kernels import triton_common

    work, *how = CASES[name]
    compiler = Compiler(only)
    triton_common.tell_when_compiling()
    with on_a_gpu(compiler):
        run(work, *how)
        first, compiler.found, compiler.only = compiler.found, Found(), ""
        first.batches = [sum(first.variants.values())]
        for batch, tokens in BATCHES if work is SMALL256 else ():
            run(replace(work, B=batch, T=tokens), *how)
            first.batches.append(first.batches[0] + sum(compiler.found.variants.values()))
    return first


def in_child(name: str, only: str = "all") -> Found:
    """`compile_here` in a process of its own, with an empty cache and without Triton's interpreter."""
    with tempfile.TemporaryDirectory() as cache:
        env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": cache}
        command = [sys.executable, __file__, name, only]
        done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=BENCH.parent)
    if done.returncode:
        raise RuntimeError(f"compiling {name} failed:\n{done.stderr[-4000:]}")
    variants, seconds, batches = json.loads(done.stdout.splitlines()[-1])
    return Found(Counter(variants), Counter(seconds), batches, done.stderr)


def table() -> str:
    """Every case's kernels: variants and seconds."""
    lines = []
    for name in CASES:
        found = in_child(name)
        lines.append(f"{name}: {sum(found.variants.values())} kernels, {sum(found.seconds.values()):.1f} s")
        for kernel, count in sorted(found.variants.items()):
            lines.append(f"    {kernel:24}{count:4}{found.seconds[kernel]:8.2f} s")
        if len(found.batches) > 1:
            shapes = ", ".join(f"{b} × {t}" for b, t in BATCHES)
            lines.append(f"    kernels after batches of {shapes} too: {', '.join(str(n) for n in found.batches[1:])}")
    return "\n".join(lines)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    made = compile_here(*sys.argv[1:])
    print(json.dumps([made.variants, made.seconds, made.batches]))
