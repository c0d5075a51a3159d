"""The pipeline on a GPU: checked, then timed, within 8 minutes; a part that fails is printed, and the rest goes on.

    check       scores of a small model in float32 and bfloat16 against float64 on the CPU; nothing else is timed first
    GPT-2 small B = 32, 256 and 1,024, XL, 13B, Llama-3.1-8B: the floor, dense and factored in graphs and without, and
                but for Llama our tuned hooks: ms a batch, pairs a second, the device's time, kernels and launches, peak
                memory; and whole calls of 4 and of 6 batches in graphs and without
    warm        nothing timed: kernels compiled that the parts below take, beside the checks
    kernels     the device's time of a batch by kernel, beside what `--plan` predicts
    hooks       our tuned hooks at the largest batch that fits, beside ours at the same batch

gpu.sh runs the parts one by one, each with a time limit of its own (`--part NAME`). Times are CUDA events around whole
calls of some and of more batches, whose difference is that of the batches alone. Kernels and launches are
torch.profiler's: what ran on the device, and the host's calls that started it.
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
from pipeline.launches import count_batch
from pipeline.work import B13, LLAMA8, MIB, SMALL, XL, Run, Work, implementation

SECONDS = 400.0  # no part begins later, and none takes longer than a minute
TINY = Work(3, 4, 64, 211, B=3, T=9)
TINY_LLAMA = Work(3, 4, 64, 211, B=3, T=9, G=2, M=96)
CONTRACTION = ("partial_scores", "sum_splits", "zero_non_edges")
MAKING = ("tile_grads", "channel_grads", "channel_sums")
LAUNCHES = ("LaunchKernel", "GraphLaunch", "Memcpy", "Memset")


@dataclass(frozen=True)
class Profile:
    """Of one call: µs on the device by kernel, how often each ran, and how many calls of the host started them."""

    kernels: dict[str, float]
    counts: dict[str, int]
    launches: int

    @property
    def count(self) -> int:
        """How many kernels ran."""
        return sum(self.counts.values())

    def part(self, names: tuple[str, ...]) -> float:
        """The part of the device's time that kernels with one of these names took."""
        chosen = sum(us for kernel, us in self.kernels.items() if any(name in kernel for name in names))
        return chosen / max(sum(self.kernels.values()), 1e-9)

    def longest(self, count: int) -> dict[str, tuple[float, int]]:
        """The kernels that took longest and how often they ran, by the first 90 letters of their names."""
        found = sorted(self.kernels.items(), key=lambda item: -item[1])[:count]
        return {f"{number} {name[:90]}": (us, self.counts[name]) for number, (name, us) in enumerate(found)}


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
        counts: dict[str, int] = {}
        launches = 0
        for event in found.events():
            if event.device_type == DeviceType.CUDA:
                counts[event.name] = counts.get(event.name, 0) + 1
                kernels[event.name] = kernels.get(event.name, 0.0) + event.time_range.elapsed_us()
            elif event.name.startswith("cu"):  # of the driver or the runtime
                launches += any(name in event.name for name in LAUNCHES)
        return Profile(kernels, counts, launches)

    def release(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()


class Bench:
    """The parts, one after the other, within a time; rows are what was measured, failures what was not."""

    def __init__(self, on: Instruments, seconds: float, json_file: Path | None = None) -> None:
        self.on, self.deadline, self.json_file = on, time.monotonic() + seconds, json_file
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

    def write(self, **row: object) -> None:
        """A row for the file alone."""
        if self.json_file:
            with self.json_file.open("a") as lines:
                lines.write(json.dumps(row) + "\n")

    def add(self, **row: object) -> None:
        self.rows.append(row)
        self.write(**row)
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

    def warm(self, works: list[Work]) -> None:
        """Compile what models of these shapes take in bfloat16, two layers and few pairs of each."""
        for work in works:
            here = replace(work, L=2, V=1000, B=8)
            model = here.model(dtype=torch.bfloat16, device=self.on.device)
            for name in ("dense", "factored"):
                implementation(name, model, here.pairs(), here.B)()
            self.add(warm=f"D={work.D}")

    def pace(self, made: Callable[[int], Run], few: int, many: int) -> float:
        """Milliseconds of a batch more, from calls of few and of many: compiling and recording are not among them."""
        runs = [made(few), made(many)]
        runs[self.on.device == "cuda"]()  # compiles, and takes memory from the driver
        begin, found = time.monotonic(), []
        rounds = 3 if self.on.device == "cuda" else 1
        while len(found) < rounds and (not found or time.monotonic() < min(begin + 4, self.deadline)):
            short, long = (self.on.ms(run) for run in runs)
            found.append((long - short) / (many - few))
        return statistics.median(found)

    def against(self, title: str, work: Work, dtype: torch.dtype) -> None:
        """Every implementation beside the floor: pairs a second, the device's time, kernels and launches a batch, peak
        memory above the model. One that fails costs its own row."""
        model = work.model(dtype=dtype, device=self.on.device)

        def made(name: str, batches: int) -> Run:
            return implementation(name, model, work.pairs(batches), work.B)

        names = ["floor", "dense, graphs", "dense, no graphs", "factored, graphs", "factored, no graphs", "hooked"]
        if work.G:
            names.remove("hooked")  # which know GPT-2's architecture alone
        if self.on.device != "cuda":
            names = [name for name in names if not name.endswith(", graphs")]
        floor = hooks = float("nan")
        failed = []
        for name in names:
            few, many = {"floor": (2, 6), "hooked": (1, 2)}.get(name, (4, 12) if name.endswith(", graphs") else (1, 4))
            try:
                ms = self.pace(lambda n, name=name: made(name, n), few, many)
                floor, hooks = (ms if name == "floor" else floor), (ms if name == "hooked" else hooks)
                row = {"ms_a_batch": ms, "pairs_a_second": work.B / ms * 1e3, "of_floor": floor / ms}
                if name != "floor":
                    row["peak_mib"] = self.on.peak(made(name, 2)) / MIB
                if name in ("floor", "dense, no graphs", "factored, no graphs"):
                    found = self.on.profile(made(name, 2))
                    row |= {"device_ms": sum(found.kernels.values()) / 2e3, "kernels_a_batch": found.count / 2}
                    row |= {"launches_a_batch": found.launches / 2}
                    row |= {"contraction": found.part(CONTRACTION), "making": found.part(MAKING)}
                    self.write(model=title, name=name, B=work.B, kernels=found.longest(120))
                self.add(model=title, name=name, dtype=str(dtype), B=work.B, T=work.T, **row)
                if name == "dense, no graphs":
                    self.calls(title, made)
            except Exception as error:
                failed.append(name)
                self.add(model=title, name=name, dtype=str(dtype), B=work.B, T=work.T, failed=repr(error)[:200])
            finally:
                self.on.release()
        if failed:
            raise RuntimeError(f"{title}: {', '.join(failed)} failed")

    def calls(self, title: str, made: Callable[[str, int], Run]) -> None:
        """Milliseconds of whole calls of some batches: recorded from the second on, and not at all."""
        names = ["dense, graphs", "dense, no graphs"] if self.on.device == "cuda" else ["dense"]
        for batches in (4, 6):
            found: dict[str, list[float]] = {name: [] for name in names}
            for _ in range(3):
                for name, times in found.items():
                    times.append(self.on.ms(made(name, batches)))
            self.add(
                model=title,
                name=f"a call of {batches}",
                **{name: statistics.median(times) for name, times in found.items()},
            )

    def kernels(self, title: str, work: Work, dtype: torch.dtype) -> None:
        """The device's time of a dense batch by kernel, the longest first, as it runs and as it is predicted."""
        model = work.model(dtype=dtype, device=self.on.device)
        run = implementation("dense, no graphs", model, work.pairs(2), work.B)
        run()
        found = self.on.profile(run)
        whole = sum(found.kernels.values())
        self.add(model=title, B=work.B, device_ms=whole / 2e3, predicted_ms=count_batch(work, dtype).total.device * 1e3)
        for kernel, us in sorted(found.kernels.items(), key=lambda item: -item[1])[:40]:
            self.add(model=title, kernel=kernel[:90], ms=us / 2e3, part=us / max(whole, 1e-9))

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


def main(
    *, quick: bool, json_file: Path | None, on: Instruments | None = None, seconds: float = SECONDS, part: str = ""
) -> int:
    """Run all parts, or those whose name contains `part`; 0 if every one went well."""
    if on is None:
        if not torch.cuda.is_available():
            print("not measured: no GPU is visible to torch")
            return 1
        on = Cuda()
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    bench = Bench(on, seconds, json_file)
    half = torch.bfloat16
    small, xl, b13, llama = (TINY, TINY, TINY, TINY_LLAMA) if quick else (SMALL, XL, B13, LLAMA8)
    parts: dict[str, Callable[[], None]] = {}
    for pairs in (TINY.B,) if quick else (32, 256, 1024):
        title = f"GPT-2 small, B={pairs}"
        parts[title] = lambda title=title, pairs=pairs: bench.against(title, replace(small, B=pairs), half)
    for title, work in (("GPT-2 XL", xl), ("13B", b13), ("Llama-3.1-8B", llama)):
        parts[title] = lambda title=title, work=work: bench.against(title, work, half)
    single = replace(small, B=TINY.B if quick else 32)
    parts["GPT-2 small, float32"] = lambda: bench.against("GPT-2 small, float32", single, torch.float32)
    parts["kernels, GPT-2 small"] = lambda: bench.kernels("GPT-2 small", replace(small, B=3 if quick else 256), half)
    most = 2 * TINY.B if quick else 4096
    for title, work in (("GPT-2 small", replace(small, B=single.B)), ("GPT-2 XL", replace(xl, B=min(xl.B, 4)))):
        parts[f"hooks at their largest batch, {title}"] = lambda t=title, w=work: bench.largest(t, w, most)
    if part and not any(part in name for name in ("check", "warm", *parts)):
        raise SystemExit(f"--part must be in one of: check, warm, {', '.join(parts)}; got {part!r}")
    if part == "warm":
        bench.run("warm", lambda: bench.warm([small, xl, b13, llama]))
        return int(bool(bench.failures))
    # Nothing is timed before it is right; a part that is asked for by name has been checked by a call of its own.
    if (part and part not in "check") or bench.run("check", lambda: bench.check(TINY)):
        for name, run in parts.items():
            if name == part or (part not in parts and part in name):
                bench.run(name, run)
    print(f"\n{'all parts measured' if not bench.failures else 'FAILED: ' + ', '.join(bench.failures)}")
    return int(bool(bench.failures))
