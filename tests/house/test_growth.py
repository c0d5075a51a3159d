"""The growth table's own arithmetic, and that it runs."""

from __future__ import annotations

import sys

import pytest
from models import ROOT

sys.path.insert(0, str(ROOT / "bench"))
import bench_growth


def test_the_growth_table_measures_predicts_and_counts(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench_growth, "exchanged", lambda size, n: int(bench_growth.rule(size, 642)))
    assert bench_growth.main(["--quick", "--json", str(tmp_path / "rows")]) == 0
    printed = capsys.readouterr().out
    assert printed.count("in memory") == printed.count("as it goes") == 2 and "8 devices" in printed
    assert len((tmp_path / "rows").read_text().splitlines()) == 4 + 1 + 2
    assert bench_growth.rule(4, 100) == 2 * 3 * 8 * 25 and bench_growth.rule(1, 100) == 0
    assert bench_growth.predicted(1, 5_700, 10, 1.0) == pytest.approx(1.0)
    times = [bench_growth.predicted(size, 10**6, 70_000, 1.0) for size in (1, 8, 64)]
    assert times[0] > 7 * times[1] > 49 * times[2]
