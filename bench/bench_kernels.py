"""Check every op, then time it: each implementation and plain PyTorch on the shapes of real models.

    python bench/bench_kernels.py                     CPU table: 8 minutes on two cores
    python bench/bench_kernels.py --device cuda       GPU table (what is asked for comes first; ends after --minutes)
    python bench/bench_kernels.py --quick             tiny shapes, seconds; what the tests run
    compute-sanitizer python bench/bench_kernels.py --device cuda --check-only
                                                      every kernel on small odd shapes, nothing timed: a few minutes
    python bench/bench_kernels.py --compile [sm_90]   the table of compiled Triton kernels (ops/triton_compile.py)
    python bench/bench_kernels.py --json out.jsonl    one JSON object a line beside the table, as they come

Runs from the source tree, installed or not; ops/work.py has the shapes, ops/checks.py what comes first: every
variant of every kernel. Nothing is timed before its result is right: eapcore's implementations must be within 1e-5 of
float64 (2^-8 where the result itself is stored in bfloat16; on a GPU more where tensor cores add up long chains, see
`allowed_error`), in the norm, on a sample of senders and receivers, and exactly 0 where there is no edge. The error of
PyTorch's ways is printed, not judged: with bfloat16 they round the result. A case that fails is printed with its reason
and costs only itself; the exit status is then 1, as it is when the minutes are over before the list is.

All ways to compute one thing take turns, round after round. CPU: `ms` is processor time of all threads divided by
their number, which other processes disturb less than the clock. GPU: CUDA events, the L2 cache overwritten each time,
and the device kept busy for a millisecond before, so that a short call is not timed by its launches.

    ms, +-          median and half the distance of the quartiles
    x torch         the fastest right PyTorch way's median / this median
    clock, x torch  CPU: the same by the clock. What waits for memory takes as long on one thread as two threads take
                    processor time: torch.matmul multiplies with one vector on one thread, and does so in half the `ms`
    Gop/s           2 · edges · B·T·D multiply-adds a second: what is not an edge does not count, for anyone
    % matmul        of this device's rate on a large square matrix product of the same dtype; on a GPU, edge_scores
                    is credited with every real pair of the tiles that hold an edge: those have to be computed
    GB/s, % copy    the arguments and the result, each moved once; of this device's rate when copying
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import json
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

if importlib.util.find_spec("eapcore") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ops.checks
import ops.work
from eapcore.kernels import cpp
from ops.work import WORK, Case, Run, cases, size_of

Attempt = Callable[[str, Callable[[], None]], None]


class Clock:
    """Milliseconds of one call. kind: "cpu" or "cuda"; device: where tensors lie."""

    def __init__(self, kind: str) -> None:
        self.kind = self.device = kind
        self.flush = torch.empty(256 << 20, dtype=torch.uint8, device=kind) if kind == "cuda" else None

    def __call__(self, run: Run) -> float:
        return self.both(run)[0]

    def both(self, run: Run) -> tuple[float, float]:
        """(`ms`, ms by the clock); on a GPU the events' for both."""
        if self.flush is None:
            begin, start = time.perf_counter(), time.process_time()
            run()
            used, elapsed = time.process_time() - start, time.perf_counter() - begin
            return used * 1e3 / torch.get_num_threads(), elapsed * 1e3
        self.flush.zero_()
        torch.cuda._sleep(2_000_000)  # a millisecond in which the host launches what is timed
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return (begin.elapsed_time(end),) * 2

    def describe(self) -> str:
        if self.kind == "cuda":
            name = torch.cuda.get_device_name()
        else:
            isa = "" if cpp.why_not() else f", {cpp.isa()}"
            name = f"{platform.machine()}, {torch.get_num_threads()} threads{isa}"
        return f"{self.kind}: {name}; torch {torch.__version__}, Python {platform.python_version()}"


def machine_rates(clock: Clock, quick: bool, attempt: Attempt) -> dict[str, float]:
    """Bytes a second when copying, operations a second of a large square product of each dtype; NaN if not known."""
    cuda = clock.kind == "cuda"
    rates = {"copy": float("nan"), "torch.float32": float("nan"), "torch.bfloat16": float("nan")}

    def copying() -> None:
        source = torch.randn((1 << 20) if quick else (256 << 20 if cuda else 64 << 20), device=clock.device)
        target = torch.empty_like(source)
        rates["copy"] = 2 * size_of(source) / min(clock(lambda: target.copy_(source)) for _ in range(7)) * 1e3

    def multiplying(dtype: torch.dtype) -> None:
        side = 256 if quick else 8192 if cuda else 2048
        a = torch.randn(side, side, device=clock.device).to(dtype)
        rates[str(dtype)] = 2 * side**3 / min(clock(lambda: a @ a) for _ in range(5)) * 1e3

    attempt("copy rate", copying)
    for dtype in (torch.float32, torch.bfloat16):
        attempt(f"matmul rate {dtype}", lambda dtype=dtype: multiplying(dtype))
    return rates


def measure(
    case: Case, clock: Clock, rates: dict[str, float], rounds: int, seconds: float, compiled: bool
) -> list[dict]:
    """Check, then time: the rows of one case. One of PyTorch's ways that cannot run is left out, and said so."""
    work = WORK[case.op](case, clock.device, ops.work.fast_implementation(clock.kind), compiled)
    errors: dict[str, float] = {}
    for name, run in work.providers.items():
        try:
            errors[name] = work.check(run())
        except Exception as error:
            if "torch" not in name:
                raise
            print(f"\n{name} left out of {case.op} {case.name} {case.dtype}: {first_line(error)}", flush=True)
    for name, error in errors.items():
        if "torch" not in name and not error <= work.limit:
            raise RuntimeError(f"{case.op} {name} on {case.name} {case.dtype}: error {error:.2e} > {work.limit:.2e}")
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in errors}
    begin = time.perf_counter()
    for turn in range(rounds + 1):
        for name in times:
            taken = clock.both(work.providers[name])
            if turn > 0:  # the first round warms up
                times[name].append(taken)
        if turn >= 3 and time.perf_counter() - begin > seconds:
            break
    medians = {
        name: [max(statistics.median(part), 1e-6) for part in zip(*both, strict=True)] for name, both in times.items()
    }
    best = [min((both[i] for name, both in medians.items() if "torch" in name), default=float("nan")) for i in (0, 1)]
    rows = []
    for name, values in times.items():
        quartiles = statistics.quantiles((ms for ms, _ in values), n=4)
        ms, elapsed = medians[name]
        matmul = work.operations if "torch" in name else work.tile_operations or work.operations
        row = {"op": case.op, "shape": case.name, "dtype": dtype_name(case), "provider": name, "ms": ms}
        row |= {"spread_ms": (quartiles[2] - quartiles[0]) / 2, "rounds": len(values), "times_torch": best[0] / ms}
        row |= {"clock_ms": elapsed, "clock_times_torch": best[1] / elapsed, "error": errors[name]}
        row |= {"operations": work.operations, "bytes": work.bytes, "gops": work.operations / ms / 1e6}
        row |= {"of_matmul": matmul / ms * 1e3 / rates[str(case.dtype)], "gbytes": work.bytes / ms / 1e6}
        rows.append(row | {"of_copy": work.bytes / ms * 1e3 / rates["copy"], "device": clock.kind})
    return rows


def dtype_name(case: Case) -> str:
    return str(case.dtype).removeprefix("torch.")


COLUMNS = (  # title, width, digits, field, factor
    ("ms", 10, ".3f", "ms", 1), ("+-", 8, ".3f", "spread_ms", 1), ("x torch", 9, ".2f", "times_torch", 1),
    ("clock", 10, ".3f", "clock_ms", 1), ("x torch", 9, ".2f", "clock_times_torch", 1),
    ("error", 10, ".1e", "error", 1), ("Gop/s", 10, ".1f", "gops", 1), ("% matmul", 10, ".1f", "of_matmul", 100),
    ("GB/s", 8, ".1f", "gbytes", 1), ("% copy", 8, ".1f", "of_copy", 100),
)  # fmt: skip


def print_rows(rows: list[dict]) -> None:
    first = rows[0]
    size = f"({first['operations']:.3g} op, {first['bytes']:.3g} B)"
    print(f"\n{first['op']}  {first['shape']}  {first['dtype']}  {size}")
    print(f"  {'':28}" + "".join(f"{title:>{width}}" for title, width, *_ in COLUMNS))
    for row in rows:
        cells = (f"{factor * row[field]:{width}{digits}}" for _, width, digits, field, factor in COLUMNS)
        print(f"  {row['provider']:28}" + "".join(cells), flush=True)


def print_summary(rows: list[dict], asked: dict[tuple[str, str, str], tuple[str, float]]) -> None:
    """One line for each case: the ratio to PyTorch's fastest way, and the share that is asked for."""
    print("\nSummary")
    for row in rows:
        if "torch" in row["provider"]:
            continue
        line = f"  {row['op']}  {row['shape']}  {row['dtype']}  {row['provider']}: {row['times_torch']:.2f} x torch"
        if row["device"] == "cpu":
            line += f", {row['clock_times_torch']:.2f} by the clock"
        figure = asked.get((row["op"], row["shape"], row["dtype"]))
        if figure is not None:
            name, least = figure
            holds = "holds" if row[name] >= least else "falls short"
            of = "matmul's rate" if name == "of_matmul" else "the copy rate"
            line += f"; {100 * row[name]:.1f} % of {of}, asked {100 * least:.0f}: {holds}"
        print(line)


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def main(arguments: list[str] | None = None) -> int:
    """Run what the arguments ask for; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="tiny shapes")
    parser.add_argument("--check-only", action="store_true", help="every kernel once on small odd shapes, time nothing")
    parser.add_argument("--compile", nargs="*", metavar="TARGET", help="print the compiled Triton kernels instead")
    parser.add_argument("--no-torch-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument(
        "--only", default="", help="cases whose op, shape or dtype contains this; with --check-only, dtypes"
    )
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--minutes", type=float, help="begin no case after this long (default: 8 on a GPU, else none)")
    parser.add_argument("--json", type=Path, help="write the rows here, one JSON object a line")
    options = parser.parse_args(arguments)
    if options.compile is not None:
        from ops import triton_compile

        triton_compile.main([f"--target={target}" for target in options.compile])
        return 0
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.minutes is None:
        options.minutes = 8.0 if options.device == "cuda" else float("inf")
    begin = time.perf_counter()
    torch.manual_seed(0)
    clock = Clock(options.device)
    failures: list[str] = []

    def attempt(what: str, run: Callable[[], None]) -> None:
        """A failure is reported at once and at the end, and costs nothing but itself."""
        try:
            run()
        except Exception as error:
            traceback.print_exc()
            failures.append(f"{what}: {first_line(error)}")
            write({"failed": failures[-1]})

    with contextlib.ExitStack() as stack:
        file = stack.enter_context(options.json.open("w")) if options.json else None

        def write(line: dict) -> None:
            if file is not None:
                file.write(json.dumps(line) + "\n")
                file.flush()

        print(clock.describe(), flush=True)
        checked = options.only if options.check_only else ""
        attempt("checks", lambda: ops.checks.check_every_kernel(clock.kind, clock.device, checked))
        if not failures:
            print("every op is right on small odd shapes", flush=True)
        if not options.check_only:
            time_cases(options, clock, begin, attempt, write, failures)
    for failure in failures:
        print(f"FAILED {failure}", flush=True)
    return 1 if failures else 0


def time_cases(
    options: argparse.Namespace, clock: Clock, begin: float, attempt: Attempt, write: Callable[[dict], None],
    failures: list[str],
) -> None:  # fmt: skip
    rates = machine_rates(clock, options.quick, attempt)
    print(
        f"copy {rates['copy'] / 1e9:.1f} GB/s; matmul float32 {rates['torch.float32'] / 1e9:.1f}, "
        f"bfloat16 {rates['torch.bfloat16'] / 1e9:.1f} Gop/s; warm-up 1 round, then up to {options.rounds} rounds"
    )
    write({"machine": clock.describe(), "rates": rates})
    rows: list[dict] = []
    asked: dict[tuple[str, str, str], tuple[str, float]] = {}
    rounds, seconds = (3 if options.quick else options.rounds), 6.0

    def one(case: Case) -> None:
        compiled = not (options.quick or options.no_torch_compile)
        new = measure(case, clock, rates, rounds, seconds, compiled)
        rows.extend(new)
        if case.asked:
            asked[case.op, case.name, dtype_name(case)] = case.asked
        for row in new:
            write(row)
        print_rows(new)

    for case in cases(clock.kind, options.quick):
        what = f"{case.op} {case.name} {case.dtype}"
        if options.only not in what:
            continue
        if time.perf_counter() - begin > 60 * options.minutes:
            failures.append(f"{what}: not begun, the {options.minutes:g} minutes were over")
            continue
        attempt(what, lambda case=case: one(case))
        if not options.quick:
            gc.collect()
        if clock.device == "cuda":
            torch.cuda.empty_cache()
    print_summary(rows, asked)


if __name__ == "__main__":
    sys.exit(main())
