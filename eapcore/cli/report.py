"""eapcore report: a run folder, or two side by side, as a page and as pictures."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from eapcore.cli.options import Command, place

if TYPE_CHECKING:
    from eapcore.graph.scores import EdgeScores
    from eapcore.report.run_folder import Run

PAGE, FIGURES = "report.html", "figures"


def add(command: Command) -> None:
    """Add the command and its options."""
    parser = command("report", run, "Show a run folder, or two side by side, as one HTML page and as pictures.")
    parser.add_argument("run", type=place, metavar="RUN", help="a folder that eapcore run wrote, or a score file")
    parser.add_argument(
        "other", type=place, nargs="?", metavar="OTHER", help="another of the same graph (default: none)"
    )
    parser.add_argument("--out", type=place, metavar="FILE", help=f"the page to write (default: {PAGE} in RUN)")
    parser.add_argument(
        "--figures", type=place, metavar="FOLDER", help=f"where SVG and PNG files go (default: {FIGURES} in RUN)"
    )


def run(args: argparse.Namespace) -> None:
    """Read the runs and write the page and the pictures."""
    from eapcore.report.run_folder import Run

    folder = args.run if args.run.is_dir() else args.run.parent
    page = args.out or folder / PAGE
    if page.suffix not in (".html", ".htm"):
        raise ValueError(f"--out must be a page to write, and end in .html, got {page}")
    runs = [Run.read(path) for path in (args.run, args.other) if path is not None]
    check_report(page)
    write_report(runs, page, args.figures or folder / FIGURES, args.written)


def check_report(page: Path) -> None:
    """Fail before any work where what draws is not installed, or a page cannot be written."""
    from eapcore.graph.files import target
    from eapcore.report.draw import check_matplotlib
    from eapcore.report.page import check_jinja

    check_jinja()
    check_matplotlib()
    target(page)


def report_folder(args: argparse.Namespace, folder: Path, scores: EdgeScores | None = None) -> None:
    """Write the page and the pictures of a run folder into it, in the process that writes what a command finds; scores:
    in place of those that it holds."""
    from eapcore.report.run_folder import Run

    if args.leads:
        write_report([Run.read(folder, scores)], folder / PAGE, folder / FIGURES, args.written)


def write_report(runs: list[Run], page: Path, figures: Path, command: str) -> None:
    """Write the page and the pictures of one run or two, and say where they are."""
    from eapcore.report.figures import write_figures
    from eapcore.report.page import write_page

    page.parent.mkdir(parents=True, exist_ok=True)
    write_page(runs, page, command=command)
    written = write_figures(runs, figures)
    print(f"wrote    {page}")
    print(f"wrote    {figures}/{', '.join(written)} (svg, png)")
    for each in runs:
        for part, how in each.missing.items():
            print(f"without  {part} of {each.name}: {how}")
