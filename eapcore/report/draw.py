"""Pictures drawn by matplotlib: their colours, and how they become files."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NEGATIVE, POSITIVE, QUIET, FAINT, INK = "#1f66b0", "#b54418", "#5b6675", "#e9ecf0", "#1b2330"
COLOURS = (NEGATIVE, POSITIVE, "#137a65", "#7b3fa0")
Size = tuple[float, float]
Picture = tuple[Size, "Callable[[Axes], object]"]
"""Inches, and what draws it."""

_METADATA: dict[str, dict[str, None]] = {"svg": {"Date": None, "Creator": None}, "png": {"Software": None}}


def check_matplotlib() -> None:
    """RuntimeError where the package that draws is not installed."""
    if find_spec("matplotlib") is None:
        raise RuntimeError("pictures need the package matplotlib: pip install 'eapcore[report]'")


def figure(size: Size) -> Any:
    """An empty figure of so many inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained", facecolor="white")


def drawn(
    size: Size, draw: Callable[[Axes], object], endings: Sequence[str] = ("svg", "png")
) -> Iterator[tuple[str, bytes]]:
    """One picture in several formats, the same bytes for the same content."""
    check_matplotlib()
    from matplotlib import rc_context
    from matplotlib.text import Text

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "eapcore", "font.size": 9}):
        made = figure(size)
        draw(made.add_subplot())
        for text in made.findobj(Text):  # parts of a file's name may be no text, which no font can draw
            text.set_text(text.get_text().encode("utf-8", "backslashreplace").decode().replace("\0", "\\0"))
        for ending in endings:
            file = io.BytesIO()
            made.savefig(file, format=ending, dpi=150, metadata=_METADATA[ending])
            made.set_layout_engine("none")  # it is laid out
            yield ending, file.getvalue()


def grid(axes: Axes, values: Any, x: str, y: str, what: str, *, uneven: bool = False) -> None:
    """Values [rows, columns], a numpy array, as a heat map, the first row at the bottom, 0 white.

    uneven: few are far above the others, so that colour grows with the square root, of many up to the thousandth
    largest.
    """
    import numpy as np
    from matplotlib.colors import FuncNorm, LinearSegmentedColormap, Normalize

    known = -np.sort(-np.abs(values[np.isfinite(values)]), axis=None)
    largest = float(known[0]) if known.size else 0.0
    most = (float(known[known.size // 1000]) if uneven and known.size > 5000 else 0.0) or largest or 1.0
    ends: dict[str, Any] = {"vmin": -most, "vmax": most, "clip": True}
    there_and_back = (lambda v: np.sign(v) * np.sqrt(np.abs(v)), lambda v: np.sign(v) * np.square(v))
    norm = FuncNorm(there_and_back, **ends) if uneven else Normalize(**ends)
    colours = LinearSegmentedColormap.from_list("scores", [NEGATIVE, "white", POSITIVE]).with_extremes(bad=FAINT)
    image = axes.imshow(values, cmap=colours, norm=norm, origin="lower", aspect="auto")
    image.set_interpolation("nearest")
    axes.set(xlabel=x, ylabel=y)
    assert axes.figure is not None
    bar = axes.figure.colorbar(image, ax=axes, label=what, extend="both" if largest > most else "neither")
    if uneven:
        ticks = [most * share for share in (-1, -0.25, 0, 0.25, 1)]
        bar.set_ticks(ticks, labels=[f"{tick:.2g}" for tick in ticks])
