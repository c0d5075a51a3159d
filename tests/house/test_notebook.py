"""The notebook runs from its first cell to its last, and every cell has something to show."""

from __future__ import annotations

import ast
import json

import pytest
from models import ROOT


def test_the_notebook_runs_from_load_to_report(tmp_path, monkeypatch):
    for package in ("pandas", "matplotlib", "jinja2"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    notebook = json.loads((ROOT / "bench" / "tour.ipynb").read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    shown, names = [], {}
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code":
            continue
        assert cell["outputs"] == [] and cell["execution_count"] is None
        body = ast.parse(source).body
        exec(compile(ast.Module(body[:-1], []), "tour.ipynb", "exec"), names)
        last = body[-1]
        assert isinstance(last, ast.Expr), f"a cell ends in what it shows: {source}"
        shown.append(eval(compile(ast.Expression(last.value), "tour.ipynb", "eval"), names))
    cards = [value._repr_html_() for value in shown if hasattr(value, "_repr_html_")]
    assert len(cards) >= 5 and all(card.startswith("<div>") for card in cards)
    assert len(shown[4].patches) > 40  # the plot
    assert (tmp_path / "report.html").stat().st_size > 50_000
