"""What `eapcore reproduce` wrote, as tables and pictures."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from eapcore.report.draw import COLOURS, INK, NEGATIVE, POSITIVE, QUIET, Picture, drawn, grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLES = {
    "scores-by-circuit": "How many edges have which score, in and out of the published circuit",
    "roles": "Scores of the circuit's edges by what their sender does",
    "interpolation": "Edges on their way from clean to corrupt: exact (line) and first order (dashes)",
    "youden": "EAP, then ACDC: Youden's J against the published circuit",
}
Content = Mapping[str, Any]


def reproduced(content: Content) -> dict[str, Picture]:
    """The pictures of a reproduction's content, by name."""
    found: dict[str, Picture] = {}
    judged = content["judged"]
    if judged is not None:
        found["scores-by-circuit"] = (5.6, 3.6), partial(_scores, judged=judged)
        found["roles"] = (6.4, 3.8), partial(_roles, judged=judged, published=content["published"]["roles"])
    if content["curves"]:
        found["interpolation"] = (5.6, 3.8), partial(_curves, curves=content["curves"])
    searches = [row for row in content["searches"] if row.get("j") is not None]
    if searches:
        found["youden"] = (5.6, 1.6 + 0.42 * len({row["start"] for row in searches})), partial(_youden, rows=searches)
    return found


def shown(content: Content) -> dict[str, Any]:
    """What a page shows of a reproduction: tables of text, pictures as SVG in base64, and what was left out."""
    pictures = [
        {"title": TITLES[name], "svg": base64.b64encode(svg).decode("ascii")}
        for name, (size, draw) in reproduced(content).items()
        for _, svg in drawn(size, draw, ("svg",))
    ]
    tables = [{"title": title, "header": header, "rows": rows} for title, header, rows in _tables(content) if rows]
    unit = content["meta"].get("unit")
    told = f"scores are in units of {unit}, {_number(content['unit'])} here" if unit else "scores as the file has them"
    left_out = [str(sentence) for sentence in content["left_out"]]
    return {"task": content["task"], "unit": told, "left_out": left_out, "tables": tables, "pictures": pictures}


def _tables(content: Content) -> list[tuple[str, Sequence[str], list[list[str]]]]:
    """(title, header, rows) of each."""

    def cells(rows: Sequence[Content], first: str, keys: Sequence[str]) -> list[list[str]]:
        return [[str(row[first]), *(_number(row.get(key)) for key in keys)] for row in rows]

    keys: tuple[str, ...] = ("published", "here", "difference")
    found: list[tuple[str, Sequence[str], list[list[str]]]] = [
        ("Published numbers", ("", *keys), cells(content["rows"], "what", keys))
    ]
    judged = content["judged"]
    if judged is not None:
        rules = list(dict.fromkeys(row["rule"] for row in judged["areas"]))
        by: dict[str, dict[str, float]] = {}
        for row in judged["areas"]:
            name = f"{row['edge_set']}, {row['n_true']:,} of {row['n_edges']:,}, {row['ranking']}, {row['thresholds']}"
            by.setdefault(name, {})[row["rule"]] = row["auc"]
        for row in judged["heads"]:
            name = f"heads by {row['by']}, {row['n_true']} of {row['n_heads']}"
            by.setdefault(name, {})[row["rule"]] = row["auc"]
        for row in content["methods"]:
            by.setdefault(f"{row['method']}: {row['edge_set']}", {})[row["rule"]] = row["auc"]
        named = [[name, *(_number(areas[rule]) for rule in rules)] for name, areas in by.items()]
        found.append(("Area under the ROC by rule", ("edges", *rules), named))
    exact = content["exact"]
    if exact is not None:
        fit = [["exact on EAP", *(_number(exact[key]) for key in ("slope", "intercept", "r2"))]]
        found.append((f"Exact patching: {exact['which']}", ("", "slope", "intercept", "R²"), fit))
    keys = ("start_edges", "threshold", "edges", "connected", "value", "tpr", "fpr", "j", "start_j")
    header: tuple[str, ...] = (
        "start",
        "edges",
        "threshold",
        "left",
        "connected",
        "metric",
        "TPR",
        "FPR",
        "J",
        "J of start",
    )
    found.append(("EAP, then ACDC", header, cells(content["searches"], "start", keys)))
    keys = ("edges", "connected", "faithfulness", "tpr", "fpr", "j")
    header = ("", "edges", "connected", "kept", "TPR", "FPR", "J")
    found.append(("Subnetworks", header, cells(content["subnetworks"], "selection", keys)))
    rows = [[r["sender"], _number(r["score"]), r["role"] or "–"] for r in content["heads"]]
    found.append(("Largest senders", ("", "score", "role"), rows))
    return found


def _number(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{float(value):.4g}"


def _scores(axes: Axes, judged: Content) -> None:
    found = judged["histogram"]
    ends = found["ends"]
    middles, width = [(a + b) / 2 for a, b in pairwise(ends)], ends[1] - ends[0]
    moments = {row["where"]: row for row in judged["moments"] if row["edge_set"] == found["edge_set"]}
    for where, colour in (("outside", "#8a94a3"), ("inside", NEGATIVE)):
        m = moments[where]
        label = f"{where}: {m['n']:,}, mean {_number(m['mean'])}, std {_number(m['std'])}"
        axes.bar(middles, found[where], width=width, color=colour, alpha=0.7, label=label)
    axes.set(yscale="log", xlabel="score", ylabel="edges")
    axes.legend(frameon=False, fontsize=7)


def _roles(axes: Axes, judged: Content, published: Mapping[str, Sequence[float]]) -> None:
    rows = [row for row in judged["roles"] if row["edges"] == "of the circuit" and row["mean"] is not None]
    for at, row in enumerate(rows):
        low, q1, median, q3, high = row["quantiles"]
        axes.plot([at, at], [low, high], color=QUIET, linewidth=0.9)
        axes.add_patch(_box(at, q1, q3))
        axes.plot([at - 0.28, at + 0.28], [median, median], color=INK, linewidth=1.2)
        axes.errorbar([at + 0.36], [row["mean"]], [row["std"]], color=NEGATIVE, fmt="o", markersize=3, linewidth=0.9,
            label="mean and standard deviation here" if at == 0 else None)  # fmt: skip
        if row["role"] in published:
            mean, std = published[row["role"]]
            axes.errorbar([at + 0.46], [mean], [std], color=POSITIVE, fmt="o", markersize=3, linewidth=0.9,
                label="published" if row["role"] == next(iter(published)) else None)  # fmt: skip
    axes.axhline(0, color=QUIET, linewidth=0.6, zorder=0)
    labels = [f"{row['role']} ({row['n']})" for row in rows]
    axes.set_xticks(range(len(rows)), labels, rotation=30, ha="right", fontsize=7)
    axes.set(ylabel="score", xlim=(-0.6, len(rows) - 0.2))
    axes.legend(frameon=False, fontsize=7)


def _box(at: float, low: float, high: float) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((at - 0.28, low), 0.56, high - low, facecolor="#d5dae1", edgecolor=QUIET, linewidth=0.8)


def _curves(axes: Axes, curves: Sequence[Content]) -> None:
    for at, each in enumerate(curves):
        colour, points = COLOURS[at % len(COLOURS)], each["points"]
        style = "-" if at < len(COLOURS) else ":"
        name = f"{each['edge']}{' (published)' if each['published'] else ''}"
        axes.plot(points, each["effects"], style, color=colour, linewidth=1.4, label=name)
        axes.plot([0, points[-1]], [0, each["estimate"] * points[-1]], "--", color=colour, linewidth=0.8)
    axes.axhline(0, color=QUIET, linewidth=0.6, zorder=0)
    axes.set(xlabel="from clean (0) to corrupt (1)", ylabel="change of the metric")
    axes.legend(frameon=False, fontsize=6)


def _youden(axes: Axes, rows: Sequence[Content]) -> None:
    import numpy as np

    starts = list(dict.fromkeys(row["start"] for row in rows))
    thresholds = sorted({row["threshold"] for row in rows})
    values = np.full((len(starts), 1 + len(thresholds)), math.nan)
    for row in rows:
        at = starts.index(row["start"])
        values[at, 0] = row["start_j"]
        values[at, 1 + thresholds.index(row["threshold"])] = row["j"]
    grid(axes, values, "threshold of ACDC", "start", "Youden's J")
    axes.set_xticks(range(1 + len(thresholds)), ["EAP\nalone", *(f"{t:g}" for t in thresholds)], fontsize=7)
    axes.set_yticks(range(len(starts)), starts, fontsize=7)
    for y, line in enumerate(values):
        for x, value in enumerate(line):
            if math.isfinite(value):
                axes.text(x, y, f"{value:.3f}", ha="center", va="center", fontsize=7, color=INK)
