"""What scoring every edge costs, against two forwards and a backward, and against hook-based implementations.

    python bench/bench_pipeline.py                 all of it: 20 minutes on two cores
    python bench/bench_pipeline.py --only cases    the table of cases, each with a verdict
    python bench/bench_pipeline.py --only scaling  tables over B, T, L and D, and a plot (pipeline/scaling.py)
    python bench/bench_pipeline.py --only memory   as planned and as resident, a billion parameters (pipeline/memory.py)
    python bench/bench_pipeline.py --device cuda   on a GPU instead (pipeline/gpu.py; gpu.sh asks a GPU everything)
    python bench/bench_pipeline.py --plan          what batches ask of a GPU, counted without one (pipeline/launches.py)
    python bench/bench_pipeline.py --first         what a first batch compiles for a GPU (pipeline/first_batch.py)
    python bench/bench_pipeline.py --quick         small models, to see that everything runs

Runs from the source tree, installed or not. The floor: two forwards and one activation-only backward of the same frozen
weights, plain PyTorch with scaled_dot_product_attention, logits at the last position only, no instrumentation. The
hook-based implementations: ours, tuned (peers/hooked.py), and the published ones where they are installed
(peers/published.py).

Scores of all implementations are compared before anything is timed. Times are CPU seconds of the process (user and
system) for some batches, interleaved with the floor in one process for each case, warm, the median of the ratios. Peak
memory is measured in a child process of its own for each, for one batch: the high-water mark of the resident set above
what is resident once the model is loaded, with an allocator that gives freed memory back at once.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # a thread that spins while it waits would count as CPU time

import torch

try:
    import eapcore  # noqa: F401
except ImportError:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipeline.work import MIB, PUBLISHED, QWEN, SMALL, Work, disagreement, memories, seconds

TINY = {"L": 3, "H": 4, "D": 64, "V": 211}
LARGE = Work(36, 20, 1280, 50257, B=4, T=20)


@dataclass(frozen=True)
class Case:
    """A line of the table.

    time: the bound on (CPU seconds ours / CPU seconds of what it is compared with), None for none. memory: which bound
    holds for peak memory, see `memory_bound`. batches: timed in one call, as any task of more than a batch is. repeats:
    at most.
    """

    name: str
    work: Work
    ours: str
    against: str
    time: float | None
    memory: str
    batches: int = 3
    repeats: int = 7


EIGHT = replace(SMALL, B=8)
CASES = [
    Case("dense", SMALL, "dense", "floor", 1.10, "floor + 1.25 x buffer"),
    Case("factored", SMALL, "factored", "floor", 1.30, "2 x floor"),
    Case("first difference at 10", replace(SMALL, P=10), "dense", "floor", 0.75, "unshared"),
    Case("GPT-2 large", LARGE, "dense", "floor", 1.40, "stated"),
    Case("Qwen2.5-0.5B", QWEN, "dense", "floor", 1.15, "stated", 1, 5),
    Case("Qwen2.5-0.5B, factored", QWEN, "factored", "floor", None, "stated", 1, 3),
    Case("against tuned hooks", EIGHT, "dense", "hooked", 1 / 2.5, "1/4"),
    Case("against tuned hooks, in halves of four pairs", EIGHT, "dense, in halves", "hooked", 1 / 2.5, "1/4"),
    Case("against tuned hooks, factored", EIGHT, "factored", "hooked", 1 / 2.5, "1/4"),
    Case("against TransformerLens as published", EIGHT, "dense", "transformer-lens", 1 / 8, "1/6", 1, 3),
    Case("against auto-circuit as published", EIGHT, "dense", "auto-circuit", 1 / 8, "1/6", 1, 3),
    Case(
        "against TransformerLens with frozen weights", EIGHT, "dense", "transformer-lens, frozen", None, "stated", 1, 3
    ),
]


def memory_bound(case: Case, other: int, unshared: int) -> float | None:
    """The bound on our peak memory, from that of what we are compared with, or of ours without a shared prefix."""
    bounds = {
        "floor + 1.25 x buffer": other + 1.25 * case.work.sender_buffer(),
        "2 x floor": 2 * other,
        "unshared": unshared,
        "1/4": other / 4,
        "1/6": other / 6,
        "stated": None,
    }
    return bounds[case.memory]


def verdict(value: float, bound: float | None) -> str:
    if bound is None:
        return "(stated)"
    return "holds" if value <= bound else "FALLS SHORT"


def time_line(case: Case, pairwise: list[float], ours: float, against: float) -> str:
    ratio = statistics.median(pairwise)
    spread = f"{min(pairwise):.2f} – {max(pairwise):.2f}; {ours:.2f} s and {against:.2f} s"
    if case.against != "floor":
        spread += f"; {1 / ratio:.1f} x less"
    bound = "" if case.time is None else f", bound {case.time:.3g}:"
    return f"{ratio:.3g} x {case.against} ({spread}){bound} {verdict(ratio, case.time)}"


def memory_line(case: Case, mine: int, other: int, unshared: int) -> str:
    bound = memory_bound(case, other, unshared)
    text = f"{mine / MIB:.0f} MiB, {case.against} {other / MIB:.0f}"
    if case.against != "floor":
        text += f" ({other / mine:.1f} x less)"
    return f"{text}{'' if bound is None else f', bound {bound / MIB:.0f}:'} {verdict(mine, bound)}"


def ratios(case: Case, repeats: int) -> tuple[list[float], float, float]:
    """CPU time ours / against, pair by pair after a warm-up, and both medians in seconds."""
    ours, against = seconds(case.work, [case.ours, case.against], case.batches, repeats)
    pairwise = [a / b for a, b in zip(ours, against, strict=True)]
    return pairwise, statistics.median(ours), statistics.median(against)


def why_not(case: Case) -> str:
    if case.against not in PUBLISHED:
        return ""
    from peers import published

    return published.why_not(case.against)


def table(cases: list[Case], repeats: int) -> None:
    for case in cases:
        work = case.work
        if reason := why_not(case):
            print(f"{case.name}: not measured, {reason}")
            continue
        compared = {case.ours, "dense", "factored", *({case.against} - {"floor"})}
        worst = disagreement(work, sorted(compared | ({"hooked"} if work.L <= 12 and not work.G else set())))
        times = ratios(case, min(repeats, case.repeats))
        jobs = [(work, case.ours), (work, case.against), (replace(work, P=0), case.ours)]
        mine, other, *rest = memories(jobs if work.P else jobs[:2])
        print(f"{case.name}: L={work.L} D={work.D}, B={work.B}, T={work.T}; scores agree to {worst:.0e}")
        print(f"    time    {time_line(case, *times)}")
        print(f"    memory  {memory_line(case, mine, other, *(rest or [mine]))}", flush=True)


def versions() -> str:
    from importlib.metadata import PackageNotFoundError, version

    found = []
    for name in ("transformer-lens", "auto-circuit"):
        try:
            found.append(f", {name} {version(name)}")
        except PackageNotFoundError:
            continue
    return f"torch {torch.__version__}{''.join(found)}, Python {platform.python_version()}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--part", default="", help="with --device cuda, only the parts whose name contains this")
    parser.add_argument("--plan", action="store_true", help="count a batch's kernels, bytes and operations on a GPU")
    parser.add_argument("--first", action="store_true", help="compile what a first batch on a GPU takes")
    parser.add_argument("--only", choices=["cases", "scaling", "memory"], help="one part (default: all)")
    parser.add_argument("--repeats", type=int, default=7, help="timed pairs of runs, at most (default: 7)")
    parser.add_argument("--case", default="", help="only the cases whose name contains this, and no scaling")
    parser.add_argument("--threads", type=int, help="torch's threads (default: torch's own)")
    parser.add_argument("--products", choices=["auto", "torch"], default="auto", help="who multiplies large matrices")
    parser.add_argument("--quick", action="store_true", help="small models")
    parser.add_argument("--json", type=Path, help="write the scaling's or the GPU's rows here, one object a line")
    parser.add_argument("--plot", type=Path, help="draw the scaling into this PNG (default: scaling.png beside this)")
    args = parser.parse_args(arguments)
    if args.plot is None and not args.quick:
        args.plot = Path(__file__).resolve().parent / "scaling.png"
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.products == "torch":
        torch.backends.mkldnn.set_flags(False)
    if args.plan:
        from pipeline import launches

        print(launches.table())
        return 0
    if args.first:
        from pipeline import first_batch

        print(first_batch.table())
        return 0
    if args.device == "cuda":
        from pipeline import gpu

        return gpu.main(quick=args.quick, json_file=args.json, part=args.part)
    import eapcore.kernels as kernels

    from eapcore.models.matmul import large_by

    chosen = kernels.choose("edge_scores", device="cpu", dtype=torch.float32)
    machine = f"{torch.get_num_threads()} threads, {platform.machine()}"
    print(f"{versions()}, {machine}, kernels {chosen}, large products {large_by()}, float32")
    if args.only in (None, "cases"):
        print(f"CPU time: median of up to {args.repeats} interleaved pairs after a warm-up (least – most)\n")
        cases = [case for case in CASES if args.case in case.name]
        if args.quick:
            cases = [replace(case, work=replace(case.work, **TINY)) for case in cases]
        table(cases, args.repeats)
    if args.only in (None, "scaling") and not args.case:
        from pipeline import scaling

        print()
        scaling.main(quick=args.quick, repeats=min(args.repeats, 3), json_file=args.json, plot=args.plot)
    if args.only in (None, "memory") and not args.case:
        from pipeline import memory

        print()
        memory.main(quick=args.quick)
    return 0


if __name__ == "__main__":
    sys.exit(main())
