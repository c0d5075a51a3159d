"""Time and memory of scoring every edge over the batch, the prompts' length, the layers and the width, one at a time.

CPU seconds of one batch, all implementations taking turns, the median after a warm-up; peak memory as in
bench_pipeline.py. The last column of a table is the exponent e of cost ~ size^e between the two largest sizes: 1 is
linear. The number of edges grows as L², and at fixed heads only their width as D.
"""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import replace
from pathlib import Path

from pipeline.work import MIB, Work, disagreement, memories, seconds

NAMES = ("floor", "dense", "factored", "hooked")
BASE = Work(L=4, H=12, D=768, V=5000, B=8, T=20)
AXES = {"B": (2, 4, 8, 16, 32), "T": (10, 20, 40, 80), "L": (2, 4, 8, 12), "D": (192, 384, 768, 1536)}
QUICK_BASE = Work(L=2, H=2, D=16, V=50, B=2, T=6)
QUICK_AXES = {"B": (2, 4), "T": (6, 12), "L": (2, 3), "D": (16, 32)}


def measure(base: Work, axes: dict[str, tuple[int, ...]], repeats: int) -> list[dict]:
    """A row for every axis, size and implementation: its CPU seconds and peak bytes."""
    works = {(axis, size): replace(base, **{axis: size}) for axis, sizes in axes.items() for size in sizes}
    distinct = list(dict.fromkeys(works.values()))
    for work in distinct:
        disagreement(work, ["dense", "factored", "hooked"])
    medians = {work: map(statistics.median, seconds(work, NAMES, 1, repeats)) for work in distinct}
    times = {work: dict(zip(NAMES, found, strict=True)) for work, found in medians.items()}
    jobs = [(work, name) for work in distinct for name in NAMES]
    peaks = dict(zip(jobs, memories(jobs), strict=True))
    return [
        {"axis": axis, "size": size, "name": name, "seconds": times[work][name], "bytes": peaks[work, name]}
        for (axis, size), work in works.items()
        for name in NAMES
    ]


def exponent(sizes: list[int], values: list[float]) -> float:
    """e of value ~ size^e between the two largest sizes; NaN where a value is too small to be seen."""
    if min(values[-2:]) <= 0:
        return math.nan
    return math.log(values[-1] / values[-2]) / math.log(sizes[-1] / sizes[-2])


def table(rows: list[dict], axis: str, what: str) -> str:
    """One axis: a line for each implementation, a column for each size, the exponent behind them."""
    sizes = list(dict.fromkeys(row["size"] for row in rows if row["axis"] == axis))
    unit, scale = ("CPU ms", 1e3) if what == "seconds" else ("MiB", 1 / MIB)
    lines = [f"{axis + ', ' + unit:14}" + "".join(f"{size:>9}" for size in sizes) + "  exponent"]
    for name in NAMES:
        values = [row[what] * scale for row in rows if row["axis"] == axis and row["name"] == name]
        cells = "".join(f"{value:9.1f}" for value in values)
        lines.append(f"{name:14}{cells}{exponent(sizes, values):10.2f}")
    return "\n".join(lines)


# What is drawn, its least value on a logarithmic axis (nothing above the model is drawn as a page), scale, label.
PANELS = (("seconds", 1e-6, 1, "CPU seconds"), ("bytes", 4096, 1 / MIB, "peak MiB"))


def draw(rows: list[dict], base: Work, file: Path) -> None:
    """Time above, memory below, a column for each axis, both axes logarithmic: a PNG."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError("a plot needs matplotlib: pip install 'eapcore[report]'") from error
    axes = list(dict.fromkeys(row["axis"] for row in rows))
    figure = Figure(figsize=(3 * len(axes), 5.5), layout="constrained")
    panels = figure.subplots(2, len(axes), sharey="row")
    for column, axis in enumerate(axes):
        for line, (what, least, scale, label) in enumerate(PANELS):
            panel = panels[line, column]
            for name in NAMES:
                points = [
                    (row["size"], max(row[what], least) * scale)
                    for row in rows
                    if (row["axis"], row["name"]) == (axis, name)
                ]
                panel.loglog(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1, label=name)
            sizes = [size for size, _ in points]
            panel.set_xticks(sizes, [str(size) for size in sizes], minor=False)
            panel.set_xticks([], minor=True)
            panel.grid(alpha=0.3)
            if column == 0:
                panel.set_ylabel(label)
        panels[1, column].set_xlabel(axis)
    panels[0, 0].legend(fontsize=8)
    figure.suptitle(
        f"one batch, L={base.L}, H={base.H}, D={base.D}, B={base.B}, T={base.T} but for the axis", fontsize=9
    )
    figure.savefig(file, format="png", dpi=80, pil_kwargs={"optimize": True})


def main(*, quick: bool, repeats: int, json_file: Path | None, plot: Path | None) -> list[dict]:
    base, axes = (QUICK_BASE, QUICK_AXES) if quick else (BASE, AXES)
    print(f"one batch of {base}, one dimension changed at a time; CPU time: median of {repeats} after a warm-up")
    rows = measure(base, axes, repeats)
    for axis in axes:
        for what in ("seconds", "bytes"):
            print("\n" + table(rows, axis, what))
    print()
    for row in rows:
        print(json.dumps(row))
    if json_file:
        json_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if plot:
        draw(rows, base, plot)
    return rows
