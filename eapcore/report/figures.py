"""A run as pictures, SVG and PNG, drawn by matplotlib."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from eapcore.graph.circuit import Circuit
from eapcore.graph.files import replacing
from eapcore.graph.scores import EdgeScores
from eapcore.report.compare import jaccard, sizes
from eapcore.report.draw import (
    COLOURS,
    FAINT,
    INK,
    NEGATIVE,
    POSITIVE,
    QUIET,
    Picture,
    Size,
    check_matplotlib,
    drawn,
    figure,
    grid,
)
from eapcore.report.layout import layout
from eapcore.report.page import histogram, of_reproduction, parts, unit
from eapcore.report.reproduction import TITLES
from eapcore.report.run_folder import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TITLES = {
    "circuit": "The circuit, layers up, heads across",
    "heat-map": "Scores of all edges",
    "histogram": "How many edges have which score",
    "faithfulness": "Faithfulness over the size of the circuit",
    "roc": "ROC: true against false positive rate",
    "exact": "Exact effect against first-order score",
    "positions": "Sums of scores by layer and position",
    "subnetwork": "The subnetwork in circuit.json, at most its 300 largest edges",
    **TITLES,
}
DRAWN = 60  # edges of a circuit's picture where nobody says how many
SUBNETWORK = 300  # at most, of a reproduction's subnetwork


def write_figures(runs: Sequence[Run], folder: str | Path) -> list[str]:
    """Write each picture that one run, or two, have something for, as NAME.svg and NAME.png; returns the names.

    Raises:
        RuntimeError: the package matplotlib is not installed.
        ValueError: a part's file that is not as its command writes it; two graphs.
        OSError: the folder cannot be written to.
    """
    check_matplotlib()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pictures: dict[str, Picture] = {}
    for run, suffix in zip(runs, ("", "-other"), strict=False):
        pictures |= {f"{name}{suffix}": picture for name, picture in _pictures(run).items()}
    if len(runs) == 2:
        pictures["jaccard"] = ((5.6, 3.6), lambda axes: _jaccard(axes, runs[0], runs[1]))
    for name, (size, draw) in pictures.items():
        _save(folder / name, size, draw)
    return list(pictures)


def plot(scores: EdgeScores, n: int = DRAWN, *, circuit: Circuit | None = None, axes: Axes | None = None) -> Axes:
    """Draw the circuit of the n edges with the largest |score|, or the edges of a circuit, on matplotlib's axes.

    Layers up, heads across; an edge's width is its |score|, blue negative, red positive.

    Raises:
        RuntimeError: the package matplotlib is not installed.
        ValueError: n outside the graph, or a circuit of another one.
    """
    check_matplotlib()
    if circuit is not None and circuit.graph != scores.graph:
        raise ValueError(f"the circuit must be of {scores.graph}, got one of {circuit.graph}")
    if axes is None:
        axes = figure(circuit_size(scores)).add_subplot()
    drawn = scores.top_n(min(n, scores.graph.n_edges)) if circuit is None else circuit
    _circuit(axes, scores, drawn)
    return axes


def circuit_size(scores: EdgeScores) -> Size:
    """Inches of a circuit's picture."""
    places = layout(scores.graph)
    return max(5.0, 0.62 * places.columns + 1.2), max(3.2, 0.62 * places.rows)


def _save(path: Path, size: Size, draw: Callable[[Axes], object]) -> None:
    """One picture in both formats, the same bytes for the same run."""
    for ending, content in drawn(size, draw):
        with replacing(path.with_name(f"{path.name}.{ending}")) as temporary:
            temporary.write_bytes(content)


def _pictures(run: Run) -> dict[str, Picture]:
    """The pictures of a run: each one's size in inches and what draws it."""
    scores, found = run.scores, parts(run)
    pictures: dict[str, Picture] = {
        "circuit": (circuit_size(scores), lambda axes: plot(scores, axes=axes)),
        "heat-map": ((8.0, 4.0), lambda axes: _heat_map(axes, scores)),
        "histogram": ((5.6, 3.4), lambda axes: _histogram(axes, run)),
    }
    if any(n > 0 and kept is not None for c in found["curves"] for n, kept in zip(c["sizes"], c["kept"], strict=True)):
        pictures["faithfulness"] = ((5.6, 3.6), lambda axes: _faithfulness(axes, found["curves"]))
    if found["rocs"]:
        pictures["roc"] = ((4.4, 4.2), lambda axes: _roc(axes, found["rocs"]))
    if found["exact"]:
        pictures["exact"] = ((4.6, 4.2), lambda axes: _exact(axes, found["exact"], found["agreement"], scores))
    if found["positions"]:
        pictures["positions"] = ((6.4, 4.0), lambda axes: _positions(axes, found["positions"], scores))
    if run.reproduction is not None and run.circuit is not None:
        held = scores.top_n(min(run.circuit.n_edges, SUBNETWORK))  # its edges are those above a threshold
        pictures["subnetwork"] = (circuit_size(scores), lambda axes: plot(scores, circuit=held, axes=axes))
    pictures |= of_reproduction(run)
    return {name: ((w, h + 0.3), _titled(draw, _TITLES[name], run)) for name, ((w, h), draw) in pictures.items()}


def _titled(draw: Callable[[Axes], object], title: str, run: Run) -> Callable[[Axes], object]:
    """A picture with what it shows and of which run above it, and what it says there itself below that."""
    meta = run.scores.meta
    names = [str((meta.get(part) or {}).get("name") or "") for part in ("model", "task", "method")]
    of = ", ".join(name for name in names if name)

    def drawn(axes: Axes) -> None:
        draw(axes)
        lines = [title, f"{run.name}: {of}" if of else run.name, axes.get_title()]
        axes.set_title("\n".join(line for line in lines if line), fontsize=8, parse_math=False)

    return drawn


def _circuit(axes: Axes, scores: EdgeScores, drawn: Circuit) -> None:
    from matplotlib.patches import Circle, FancyBboxPatch, PathPatch
    from matplotlib.path import Path as Curve

    graph, places = scores.graph, layout(scores.graph)
    edges = [(s, r, float(scores.scores[s, r])) for s, r in drawn.mask.nonzero().tolist()]
    edges.sort(key=lambda edge: abs(edge[2]))
    most = max((abs(score) for _, _, score in edges if math.isfinite(score)), default=0.0) or 1.0
    used = {s for s, _, _ in edges} | {s for _, r, _ in edges for s in graph.senders_behind(r)}
    ends = {r for _, r, _ in edges}
    for layer in range(0, graph.n_layers, 2):
        axes.axhspan(layer + 0.64, layer + 1.64, color=FAINT, linewidth=0, zorder=0)
    for s, r, score in edges:
        (x0, y0), (x1, y1) = places.senders[s], places.receivers[r]
        y0, y1 = y0 + 0.16, y1 - 0.2
        bend = max(0.25, 0.45 * abs(y1 - y0))
        straight = abs(x0 - x1) < 0.4 and y1 - y0 > 1.2  # past other nodes: round them
        bow = (1.0 if x0 == graph.n_heads else 0.5) * min(1, 0.35 + (y1 - y0) / places.rows) if straight else 0.0
        curve = Curve([(x0, y0), (x0 + bow, y0 + bend), (x1 + bow, y1 - bend), (x1, y1)], [1, 4, 4, 4])
        colour = NEGATIVE if score < 0 else POSITIVE if score > 0 else QUIET
        width = max(0.6, 5 * min(1, abs(score) / most))
        axes.add_patch(PathPatch(curve, fill=False, edgecolor=colour, linewidth=width, alpha=0.75, zorder=1))
    names = [*graph.sender_names, "logits"]
    for node, (x, y) in enumerate([*places.senders, places.receivers[-1]]):
        on = node in used if node < graph.n_senders else graph.logits in ends
        colour, text = (INK, names[node]) if on else ("#c3cad3", names[node])
        if ".h" in text:
            axes.add_patch(Circle((x, y), 0.16, facecolor="white", edgecolor=colour, linewidth=0.9, zorder=2))
            text = text.split(".h")[1]
        else:
            half = 0.12 + 0.065 * len(text)
            box = FancyBboxPatch((x - half, y - 0.12), 2 * half, 0.24, boxstyle="round,pad=0.03")
            box.set(facecolor="white", edgecolor=colour, linewidth=0.9, zorder=2)
            axes.add_patch(box)
        axes.text(x, y, text, ha="center", va="center", fontsize=7, color=colour, zorder=3)
    for r in ends:
        if "<" in (name := graph.receiver_names[r]):
            (x, y), part = places.receivers[r], name[-2]
            paper = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "boxstyle": "round,pad=0.08"}
            axes.text(x, y - 0.27, part, ha="center", va="center", fontsize=5.5, color=INK, bbox=paper, zorder=3)
    for layer in range(graph.n_layers):
        axes.text(-1.5, layer + 1, f"layer {layer}", va="center", fontsize=7, color=QUIET)
    axes.set(xlim=(-1.6, places.columns), ylim=(-0.4, places.rows - 0.6), xticks=[], yticks=[], aspect="equal")
    axes.spines[:].set_visible(False)
    axes.set_title(
        f"{drawn.n_edges} of {graph.n_edges:,} edges: width |score|, blue negative, red positive", fontsize=8
    )


def _heat_map(axes: Axes, scores: EdgeScores) -> None:
    shown = scores.scores.double().masked_fill(~scores.mask, float("nan")).numpy()
    names = scores.graph.receiver_names, scores.graph.sender_names
    grid(axes, shown, "receivers, by layer", "senders, by layer", _in_unit("score", scores), uneven=True)
    for axis, labels in zip((axes.xaxis, axes.yaxis), names, strict=True):
        starts: dict[str, int] = {}
        for i, name in enumerate(labels):
            starts.setdefault(name.split(".")[0].lstrip("am"), i)
        step = max(1, len(starts) // 14)
        kept = dict(list(starts.items())[::step])
        axis.set_ticks(list(kept.values()), [f"{name}" for name in kept], fontsize=7)


def _in_unit(text: str, scores: EdgeScores) -> str:
    return f"{text} ({unit(scores)})" if unit(scores) else text


def _positions(axes: Axes, positions: dict[str, Any], scores: EdgeScores) -> None:
    grid(
        axes,
        torch.tensor(positions["values"], device="cpu").numpy(),
        "position",
        "edges into",
        _in_unit("sum of scores", scores),
    )
    axes.set_yticks(range(len(positions["names"])), positions["names"], fontsize=6)


def _histogram(axes: Axes, run: Run) -> None:
    found = histogram(run)
    bins = len(found["inside"])
    total = [a + b for a, b in zip(found["inside"], found["outside"], strict=True)]
    axes.bar(range(bins), total, width=0.95, color="#8a94a3", label="all edges")
    if found["circuit"]:
        axes.bar(range(bins), found["inside"], width=0.55, color=NEGATIVE, label="in the circuit")
        axes.legend(frameon=False)
    per = (bins - 1) / 12  # bins of a power of ten
    most, ticks = found["ends"][-1], [bins - 0.5 - per * k for k in (4, 2, 0)]
    labels = [f"{most * 10**-k:.1g}" for k in (4, 2, 0)]
    axes.set_xticks([*[bins - 1 - x for x in reversed(ticks)], *ticks], [*["−" + x for x in reversed(labels)], *labels])
    axes.tick_params(axis="x", labelsize=7)
    axes.set(yscale="log", xlabel=_in_unit("score, logarithmic to both sides of 0", run.scores), ylabel="edges")


def _faithfulness(axes: Axes, curves: list[dict[str, Any]]) -> None:
    for curve, colour in zip(curves, COLOURS, strict=False):
        kept = [i for i, n in enumerate(curve["sizes"]) if n > 0 and curve["kept"][i] is not None]
        counts = [curve["sizes"][i] for i in kept]
        axes.plot(counts, [curve["kept"][i] for i in kept], "o-", markersize=3, color=colour, label=curve["name"])
        if curve["intervals"]:
            ends = [curve["intervals"][i] for i in kept]
            low, high = [a for a, _ in ends], [b for _, b in ends]
            axes.fill_between(counts, low, high, color=colour, alpha=0.16, linewidth=0)
            axes.vlines(counts, low, high, color=colour, linewidth=0.6, alpha=0.6)
    for level in (0, 1):
        axes.axhline(level, color=QUIET, linewidth=0.6, zorder=0)
    axes.set(xscale="log", xlabel="edges in the circuit", ylabel="faithfulness (95 % over prompts)")
    bottom, top = axes.get_ylim()
    axes.set_ylim(max(bottom, -1), min(top, 2.5))
    axes.legend(frameon=False, fontsize=7)


def _roc(axes: Axes, rocs: list[dict[str, Any]]) -> None:
    axes.plot([0, 1], [0, 1], "--", color=QUIET, linewidth=0.8)
    for found, colour in zip(rocs, COLOURS, strict=False):
        axes.plot(found["fpr"], found["tpr"], color=colour, label=found["name"])
    axes.set(xlabel="false positive rate", ylabel="true positive rate")
    axes.legend(frameon=False, fontsize=7)


def _exact(axes: Axes, rows: list[list[Any]], agreement: list[str], scores: EdgeScores) -> None:
    estimates, effects = [row[2] for row in rows], [row[3] for row in rows]
    axes.axline((0, 0), slope=1, color=QUIET, linewidth=0.8, linestyle="--")
    colours = [POSITIVE if estimate > 0 else NEGATIVE for estimate in estimates]
    axes.scatter(estimates, effects, s=12, c=colours, alpha=0.75)
    axes.set(xlabel=_in_unit("first-order score", scores), ylabel=_in_unit("exact effect", scores))
    axes.set_title("\n".join(agreement), fontsize=8)


def _jaccard(axes: Axes, a: Run, b: Run) -> None:
    counts = sizes(a.scores.graph.n_edges)
    axes.plot(counts, jaccard(a.scores, b.scores, counts), "o-", markersize=3, color=NEGATIVE)
    axes.set_title(f"Edges in common of {a.name} and {b.name}", fontsize=8, parse_math=False)
    axes.set(xscale="log", ylim=(-0.02, 1.02), xlabel="edges", ylabel="Jaccard index of the top edges by |score|")
