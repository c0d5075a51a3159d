"""The pipeline on a GPU: checked, then timed, within 8 minutes; a part that fails is printed, and the rest goes on.

    check       scores of a small model in float32 and bfloat16 against float64 on the CPU; nothing else is timed first
    GPT-2 small B=32, T=20: pairs a second, the floor's time / this time, kernels and launches a batch
    XL, 13B     random weights, bfloat16, factored: time, peak memory above the model, the contraction's part of it
    hooks       our tuned hooks at the largest batch that fits, beside ours at the same batch

Times are CUDA events around whole calls of several batches, the median after a warm-up call, which also compiles.
Kernels and launches are torch.profiler's: what ran on the device, and the host's calls that started it.
"""

from __future__ import annotations

import gc
import json
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

from eapcore.attribution.attribute import attribute
from pipeline.work import MIB, SMALL, Run, Work, implementation

SECONDS = 400.0  # no part begins later, and none takes longer than a minute
TINY = Work(3, 4, 64, 211, B=3, T=9)
XL = Work(48, 25, 1600, 50257, B=32, T=20)
B13 = Work(40, 40, 5120, 50257, B=8, T=20)
LLAMA8 = Work(32, 32, 4096, 128256, B=32, T=20, G=8, M=14336)  # Llama-3.1-8B
CONTRACTION = ("partial_scores", "sum_splits", "zero_non_edges")
MAKING = ("channel_grads",)
LAUNCHES = ("LaunchKernel", "GraphLaunch", "Memcpy", "Memset")


@dataclass(frozen=True)
class Profile:
    """Of one call: µs on the device by kernel, how many kernels ran, and how many calls of the host started them."""

    kernels: dict[str, float]
    count: int
    launches: int

    def part(self, names: tuple[str, ...]) -> float:
        """The part of the device's time that kernels with one of these names took."""
        chosen = sum(us for kernel, us in self.kernels.items() if any(name in kernel for name in names))
        return chosen / max(sum(self.kernels.values()), 1e-9)


class Instruments(Protocol):
    """What is measured, and where."""

    device: str

    def ms(self, run: Run) -> float:
        """Milliseconds of one call."""

    def peak(self, run: Run) -> int:
        """Bytes of the device that a call allocates at most, above what is allocated before it."""

    def profile(self, run: Run) -> Profile: ...

    def release(self) -> None:
        """Give unused memory back."""


class Cuda:
    device = "cuda"

    def ms(self, run: Run) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end)

    def peak(self, run: Run) -> int:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def profile(self, run: Run) -> Profile:
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
            run()
            torch.cuda.synchronize()
        kernels: dict[str, float] = {}
        count = launches = 0
        for event in found.events():
            if event.device_type == DeviceType.CUDA:
                count += 1
                kernels[event.name] = kernels.get(event.name, 0.0) + event.time_range.elapsed_us()
            elif event.name.startswith("cu"):  # of the driver or the runtime
                launches += any(name in event.name for name in LAUNCHES)
        return Profile(kernels, count, launches)

    def release(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()


class Bench:
    """The parts, one after the other, within a time; rows are what was measured, failures what was not."""

    def __init__(self, on: Instruments, seconds: float) -> None:
        self.on, self.deadline = on, time.monotonic() + seconds
        self.rows: list[dict] = []
        self.failures: list[str] = []

    def run(self, name: str, part: Callable[[], None]) -> bool:
        """Run one part; whether it went well."""
        print(f"\n== {name}", flush=True)
        if time.monotonic() > self.deadline:
            print("not measured: the time is up")
            self.failures.append(name)
            return False
        try:
            part()
        except Exception:
            traceback.print_exc()
            print(f"{name}: FAILED", flush=True)
            self.failures.append(name)
            return False
        finally:
            self.on.release()
        return True

    def median(self, run: Run, seconds: float = 6.0) -> float:
        """The median ms of some calls after a warm-up one, fewer of them where a call is long."""
        run()
        begin, found = time.monotonic(), []
        while len(found) < 9 and (len(found) < 2 or time.monotonic() < min(begin + seconds, self.deadline)):
            found.append(self.on.ms(run))
        return statistics.median(found)

    def add(self, **row: object) -> None:
        self.rows.append(row)
        cells = [f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()]
        print("  " + ", ".join(cells), flush=True)

    def check(self, work: Work) -> None:
        """Compare every implementation on the device with float64 on the CPU, in each dtype."""
        pairs = work.pairs(20)  # so that batches are recorded and replayed too
        exact = attribute(work.model(dtype=torch.float64), pairs, impl="reference", storage="dense").scores
        for dtype, limit in ((torch.float32, 1e-4), (torch.bfloat16, 0.03)):
            model = work.model(dtype=dtype, device=self.on.device, drawn_on="cpu")
            for name in ("dense", "factored", "hooked"):
                found = implementation(name, model, pairs, work.B)()
                assert found is not None
                error = float((found.double().cpu() - exact).abs().max() / exact.abs().max())
                self.add(check=name, dtype=str(dtype), error=error, limit=limit)
                if not error <= limit:
                    raise RuntimeError(f"{name} in {dtype} is off by {error:.1e} of the largest score")

    def against_floor(self, work: Work, dtype: torch.dtype, batches: int) -> None:
        """Rates, fraction of the floor and launches of every implementation on batches of one size."""
        model, pairs = work.model(dtype=dtype, device=self.on.device), work.pairs(batches)
        floor = self.median(implementation("floor", model, pairs, work.B))
        self.add(name="floor", dtype=str(dtype), B=work.B, ms_a_batch=floor / batches)
        for name in ("dense", "dense, no graphs", "factored", "hooked"):
            run = implementation(name, model, pairs, work.B)
            ms = self.median(run)
            some = batches if name == "dense" else 2  # a profile takes long; replays are a part of all batches alone
            found = self.on.profile(implementation(name, model, work.pairs(some), work.B))
            self.add(
                name=name, dtype=str(dtype), B=work.B, ms_a_batch=ms / batches, pairs_a_second=len(pairs) / ms * 1e3,
                of_floor=floor / ms, kernels_a_batch=found.count / some, launches_a_batch=found.launches / some,
                contraction=found.part(CONTRACTION), making=found.part(MAKING),
            )  # fmt: skip

    def large(self, name: str, work: Work) -> None:
        """A large model, factored, in bfloat16."""
        model, pairs = work.model(dtype=torch.bfloat16, device=self.on.device), work.pairs()
        floor = self.median(implementation("floor", model, pairs, work.B))
        run = implementation("factored", model, pairs, work.B)
        ms, peak, found = self.median(run), self.on.peak(run), self.on.profile(run)
        self.add(
            model=name, name="factored", B=work.B, T=work.T, ms=ms, pairs_a_second=work.B / ms * 1e3,
            of_floor=floor / ms, peak_mib=peak / MIB, buffer_mib=work.sender_buffer() / 2 / MIB,
            contraction=found.part(CONTRACTION), making=found.part(MAKING), kernels=found.count,
            launches=found.launches,
        )  # fmt: skip

    def largest(self, name: str, work: Work, most: int) -> None:
        """Tuned hooks at batches twice as large each time until one does not fit, and ours at the largest that did."""
        model = work.model(dtype=torch.bfloat16, device=self.on.device)
        fits = None
        for here in doubled(work, most):
            if time.monotonic() > self.deadline:
                break
            run = implementation("hooked", model, here.pairs(), here.B)
            try:
                peak = self.on.peak(run)
            except torch.OutOfMemoryError:
                break
            finally:
                self.on.release()
            fits = here, run, peak
        if fits is None:
            raise RuntimeError(f"the hook-based implementation does not fit with B={work.B}")
        here, run, peak = fits
        for which, again in (("hooked", run), ("factored", implementation("factored", model, here.pairs(), here.B))):
            self.on.release()
            ms = self.median(again)
            used = peak if which == "hooked" else self.on.peak(again)
            self.add(model=name, name=which, B=here.B, ms=ms, pairs_a_second=here.B / ms * 1e3, peak_mib=used / MIB)


def doubled(work: Work, most: int) -> list[Work]:
    """The same work with batches twice as large each time, up to `most` pairs."""
    return [replace(work, B=work.B << n) for n in range((most // work.B).bit_length())]


def main(*, quick: bool, json_file: Path | None, on: Instruments | None = None, seconds: float = SECONDS) -> int:
    """Run all parts; 0 if every one went well."""
    if on is None:
        if not torch.cuda.is_available():
            print("not measured: no GPU is visible to torch")
            return 1
        on = Cuda()
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    bench = Bench(on, seconds)
    small, xl, b13 = (TINY, TINY, TINY) if quick else (replace(SMALL, B=32), XL, B13)
    batches, most = (2, 2 * TINY.B) if quick else (40, 4096)
    if bench.run("check", lambda: bench.check(TINY)):
        for dtype in (torch.bfloat16, torch.float32):
            bench.run(f"GPT-2 small, {dtype}", lambda dtype=dtype: bench.against_floor(small, dtype, batches))
        for name, work in (("GPT-2 XL", xl), ("13B", b13)):
            bench.run(name, lambda name=name, work=work: bench.large(name, work))
        for name, work in (("GPT-2 small", small), ("GPT-2 XL", replace(xl, B=min(xl.B, 4)))):
            bench.run(f"hooks at their largest batch, {name}", lambda n=name, w=work: bench.largest(n, w, most))
    if json_file:
        json_file.write_text("".join(json.dumps(row) + "\n" for row in bench.rows))
    print(f"\n{'all parts measured' if not bench.failures else 'FAILED: ' + ', '.join(bench.failures)}")
    return int(bool(bench.failures))
