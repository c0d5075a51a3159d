"""How time and memory grow with the task, and what processes exchange: the growth table of bench/RESULTS.md.

    python bench/bench_growth.py            toy-ioi over 10³, 10⁴ and 10⁵ pairs, in memory and as a file read as it goes
    python bench/bench_growth.py --quick    few pairs, to see that everything runs

Time: CPU seconds of the process (user + system) of `attribute` on one thread, behind a call that has warmed everything
up; sizes take turns, the median of the rounds. Linear means that a pair costs the same at every size: the last column
is the seconds a pair over those at the first size, which is scored again at every tenth of a larger task, and by itself
counted, since a shared machine is faster in one minute than in the next. Memory: what is resident once half of a task
is scored, above what was before.

Exchange: bytes of tensors that each of two and four processes sends for one `attribute`, as counted, beside what the
rule says: of n float64 sums each process sends (K−1)/K·n to those who add them up, and as much of the result to all:
2·(K−1)/K·8n bytes, whatever the number of pairs. From it follows a prediction for more processes,

    seconds(K) = share(K)·N·seconds(pair) + 2·(K−1)/K·8n/bandwidth + meetings·K·seconds(message)

with share(K) the largest of the shares that the cut makes of the task, in tokens, and all messages of a meeting through
one store. The prediction's bandwidth and rate are stated, not measured.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

try:
    import eapcore
except ImportError:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from eapcore.attribution.attribute import attribute
from eapcore.execution.batch import in_order, spans
from eapcore.execution.distributed import deal
from eapcore.execution.limits import PREFIX_SHARE
from eapcore.graph.graph import Graph
from eapcore.models.load import load
from eapcore.tasks import PromptPairs, find_pairs
from eapcore.tasks.stream import PairStream

SIZES, QUICK = (1_000, 10_000, 100_000), (20, 40)
MEETINGS = 12  # of one `attribute`: what it is, the folder, the choices, before each sum
MESSAGE, BANDWIDTH = 50e-6, 1e9  # stated: seconds a message of the store, bytes/s of gloo between two hosts
RATE = 5_700  # pairs a second of GPT-2 small on one H200, bench/RESULTS.md "On a GPU"
RANK = """
import os, sys
import eapcore
from eapcore.execution.distributed import connect
from eapcore.tasks import find_pairs
eapcore.attribute(eapcore.load("toy-ioi"), find_pairs("toy-ioi", n={n}, seed=0), distributed=True)
link = connect()
if link.rank == 0:
    print(link.sent)
link.close()
"""


def resident() -> int:
    """Bytes of this process that lie in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def once(
    model: eapcore.Model, task: PromptPairs | PairStream, beside: PromptPairs | PairStream | None = None
) -> tuple[float, int, float]:
    """CPU seconds of scoring a task; bytes that are resident when half of it is done, above those before; and CPU
    seconds of scoring another at every tenth of it, their mean."""
    before, at_half, others = resident(), [0], list[float]()

    def progress(done: int, total: int) -> None:
        if not at_half[0] and 2 * done >= total:
            at_half[0] = resident() - before
        if beside is not None and 10 * done >= (len(others) + 1) * total:
            others.append(once(model, beside)[0])

    began = time.process_time()
    attribute(model, task, progress=progress)
    seconds = time.process_time() - began
    return seconds - sum(others), at_half[0], statistics.fmean(others) if others else seconds


def repeated(pairs: PromptPairs, n: int) -> PromptPairs:
    """n pairs, these again and again."""
    return pairs.select(torch.arange(n) % len(pairs))


def growth(sizes: tuple[int, ...], rounds: int, folder: Path) -> list[dict[str, object]]:
    """A row for each size and way of reading."""
    model, some = load("toy-ioi"), find_pairs("toy-ioi", n=min(1000, sizes[0]), seed=0)
    path = folder / "pairs.jsonl"
    fields = zip(some.clean.tolist(), some.corrupt.tolist(), some.lengths.tolist(), some.answers.tolist(),
                 some.wrong.tolist(), strict=True)  # fmt: skip
    lines = [
        json.dumps({"clean": clean[:length], "corrupt": corrupt[:length], "answer": right, "wrong": wrong}) + "\n"
        for clean, corrupt, length, right, wrong in fields
    ]
    with path.open("w", encoding="utf-8") as file:
        for i in range(sizes[-1]):
            file.write(lines[i % len(lines)])
    once(model, some)
    tasks: dict[str, Callable[[int], PromptPairs | PairStream]] = {
        "in memory": lambda n: repeated(some, n), "as it goes": lambda n: PairStream(path, n=n)
    }  # fmt: skip
    found: dict[tuple[str, int], list[tuple[float, int, float]]] = {}
    for _ in range(rounds):
        for n in sizes:
            for how, task in tasks.items():
                beside = task(sizes[0]) if n > sizes[0] else None
                found.setdefault((how, n), []).append(once(model, task(n), beside))
    rows = []
    for (how, n), measured in found.items():
        seconds, memory, _ = (statistics.median(x) for x in zip(*measured, strict=True))
        ratio = statistics.median(own / n / (other / sizes[0]) for own, _, other in measured)
        rows.append({"how": how, "n": n, "seconds": seconds, "bytes": memory, "a pair": seconds / n, "ratio": ratio})
    return rows


def exchanged(size: int, n: int) -> int:
    """Bytes that the first of so many processes sends for one `attribute`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", RANK.format(n=n)]
    ranks = [
        subprocess.Popen(command, env=common | {"RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in range(size)
    ]
    printed = [rank.communicate(timeout=300)[0] for rank in ranks]
    return int(printed[0])


def rule(size: int, numbers: int) -> float:
    """Bytes that a process sends for a sum of so many numbers."""
    return 2 * (size - 1) * 8 * -(-numbers // size)


def largest_share(pairs: PromptPairs, size: int) -> float:
    """The largest share of a task's tokens that a process gets, over an equal one."""
    order = in_order(pairs)
    first, stop = (x[order] for x in spans(pairs, shared=True))
    costs = (stop - (1 - PREFIX_SHARE) * first).tolist()
    parts = [sum(costs[part.start : part.stop]) for part in deal(costs, size)]
    return max(parts) * size / sum(costs)


def predicted(size: int, n: int, numbers: int, share: float) -> float:
    """Seconds of n pairs on so many devices by the rule of the module."""
    return share * n / size / RATE + rule(size, numbers) / BANDWIDTH + MEETINGS * size * MESSAGE * (size > 1)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few pairs")
    parser.add_argument("--rounds", type=int, default=1, help="of all sizes")
    parser.add_argument("--json", type=Path, help="also write the rows to this file, one a line")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    print(
        f"torch {torch.__version__}, Python {platform.python_version()}, {platform.processor() or 'processor unnamed'}"
    )
    sizes = QUICK if args.quick else SIZES
    with tempfile.TemporaryDirectory() as folder:
        rows = growth(sizes, args.rounds, Path(folder))
    print(f"\n{'task':12}{'pairs':>9}{'CPU s':>9}{'ms a pair':>11}{'MiB':>7}{'against first':>15}")
    for row in rows:
        print(
            f"{row['how']:12}{row['n']:>9}{row['seconds']:>9.2f}{1e3 * row['a pair']:>11.3f}"
            f"{row['bytes'] / 2**20:>7.1f}{row['ratio']:>15.3f}"
        )
    toy = load("toy-ioi").graph
    numbers = toy.n_senders * toy.n_receivers
    print(f"\nexchange of toy-ioi, {numbers} sums and the metric's two:")
    for size in (2,) if args.quick else (2, 4):
        sent, expected = exchanged(size, 2 * size), rule(size, numbers) + rule(size, 2)
        rows.append({"how": "exchange", "n": size, "bytes": sent, "rule": expected})
        print(f"  {size} processes: {sent} bytes sent by the first, by the rule {expected:.0f}")
    small = Graph(n_layers=12, n_heads=12, has_mlp=True)
    numbers, n = small.n_senders * small.n_receivers, 1_000_000
    pairs = repeated(find_pairs("toy-ioi", n=min(1000, sizes[0]), seed=0), sizes[-1])
    print(f"\npredicted, GPT-2 small, {n:,} pairs at {RATE:,} pairs/s a device, {BANDWIDTH / 1e9:g} GB/s:")
    for size in (1, 8, 64, 512):
        if size > sizes[-1]:
            continue
        share = largest_share(pairs, size)
        seconds = predicted(size, n, numbers, share)
        alone = predicted(1, n, numbers, 1.0)
        rows.append({"how": "predicted", "n": size, "seconds": seconds})
        print(
            f"  {size:>3} devices: {rule(size, numbers) / 1e6:.2f} MB a process, largest share {share:.4f} × an equal "
            f"one, {seconds:.2f} s, {alone / seconds:.1f} × as fast as one"
        )
    if args.json:
        args.json.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
