"""The memory that is planned against the most that a batch holds, on a model of a billion parameters."""

from __future__ import annotations

import time
from dataclasses import replace

import torch

from eapcore.attribution.plan import Plan
from pipeline.work import LLAMA, MIB, Work, memories

SIZES = ((4, 20), (16, 20))  # pairs, tokens
QUICK = Work(3, 4, 64, 211, B=24, T=20, G=2, M=170, dtype="float32")


def planned(work: Work, storage: str) -> int:
    """Bytes of a batch, of the model's configuration alone."""
    config = replace(work, V=2).config  # the logits that the metric reads, of the right and of the wrong answer
    plan = Plan(config, getattr(torch, work.dtype), torch.device("cpu"), groups=3 if work.G else 1)
    if storage == "dense":
        return plan.dense(work.B, work.T)
    return plan.factored(work.B, work.T, plan.chunk(work.B, work.T, 1 << 60))


def main(*, quick: bool) -> None:
    """Print a line for each size and storage: what was planned, what was resident, and whether a tenth is between."""
    works = [QUICK] if quick else [replace(LLAMA, B=pairs, T=tokens) for pairs, tokens in SIZES]
    jobs = [(work, storage) for work in works for storage in ("dense", "factored")]
    for (work, storage), peak in zip(jobs, memories(jobs), strict=True):
        start = time.process_time()
        expected = planned(work, storage)
        ratio, took = expected / peak, time.process_time() - start
        sizes = f"L={work.L} H={work.H} G={work.G} D={work.D} M={work.M}, {work.dtype}, B={work.B}, T={work.T}"
        holds = "holds" if 0.9 <= ratio <= 1.1 else "FALLS SHORT"
        print(
            f"{sizes}, {storage}: planned {expected / MIB:.0f} MiB in {took:.1f} s, resident {peak / MIB:.0f}: "
            f"{ratio:.3f} x, bound 0.9 to 1.1: {holds}",
            flush=True,
        )
