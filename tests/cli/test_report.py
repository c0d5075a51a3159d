"""What commands write for a report: prompts as tokens, what the circuits keep, and the page itself."""

from __future__ import annotations

import html
import json

import pytest
import torch

import eapcore.report.figures as figures
from eapcore.cli import main
from eapcore.graph.circuit import Circuit
from eapcore.patching.circuits import metric_on
from eapcore.report.run_folder import Run
from eapcore.search.smallest import smallest


@pytest.fixture
def without_pictures(monkeypatch):
    monkeypatch.setattr(figures, "write_figures", lambda runs, folder: ["none"])


def test_run_writes_its_prompts_and_what_its_circuits_keep(eapcore, model, pairs, scores, tmp_path):
    assert eapcore("run", "--faithfulness", 0.5, out="run")[0] == 0
    run = Run.read(tmp_path / "run")
    assert run.missing.keys() == {"evaluation", "verification"}
    assert run.prompts["n_pairs"] == 4 and run.prompts["task"]["name"] == pairs.name
    expected = json.loads(json.dumps(pairs.as_tokens(24)))
    assert run.prompts["pairs"] == expected and len(expected[0]["clean"]) == int(pairs.lengths[0])
    assert run.run["command"].startswith("eapcore run --model ") and "--out" not in run.run["command"]
    tried = smallest(model, pairs, "logit_diff", scores, 0.5)
    curve = run.run["curve"]
    assert curve["sizes"] == [each.selected.n_edges for each in tried]
    assert [*curve["connected"], run.circuit.n_edges] == [each.circuit.n_edges for each in [*tried, tried[-1]]]
    assert curve["faithfulness"] == pytest.approx([each.faithfulness for each in tried], rel=1e-6)
    for found, each in zip(curve["intervals"], tried, strict=True):
        assert found == pytest.approx(list(each.interval), rel=1e-6)
    graph = model.graph
    ends = [Circuit(graph.edge_mask(), graph), Circuit(graph.edge_mask() & False, graph)]
    found = [run.run["metric"][end] for end in ("clean", "ablated")]
    assert found == pytest.approx(metric_on(model, pairs, "logit_diff", ends), rel=1e-6)


def test_run_writes_a_report_with_sums_by_position(eapcore, scores, tmp_path, without_pictures):
    status, printed, _ = eapcore("run", "--top-n", 9, "--report", out="run")
    assert status == 0 and "report.html" in printed
    assert 'id="positions"' in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "figures/none (svg, png)" in printed
    run = Run.read(tmp_path / "run")
    assert run.scores.per_position is not None and "--report" not in run.run["command"]
    assert torch.allclose(run.scores.scores, scores.scores, atol=1e-6)


@pytest.mark.parametrize("method", ["grad-drop", "flow-routes"])
def test_a_method_that_is_no_sum_over_positions_has_a_report_without(eapcore, tmp_path, without_pictures, method):
    assert eapcore("run", "--method", method, "--top-n", 9, "--report", out="run")[0] == 0
    assert Run.read(tmp_path / "run").scores.per_position is None
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.parametrize(("command", "part"), [("evaluate", "evaluation"), ("verify", "verification")])
def test_evaluate_and_verify_write_a_report_beside_their_result(
    eapcore, score_file, tmp_path, without_pictures, command, part
):
    assert eapcore("run", "--top-n", 9, out="run")[0] == 0
    status, printed, _ = eapcore(command, "--scores", score_file, "--report", out=f"run/{part}.json")
    assert status == 0 and f"without  {part}" not in printed
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert f'<th scope="row">file: {part}</th><td>{part}.json</td>' in page and "eapcore run " in page
    written = json.loads((tmp_path / "run" / f"{part}.json").read_text())["command"]
    assert written.startswith(f"eapcore {command} --model ") and written.endswith(f"--scores {score_file}")
    assert html.escape(written, quote=False) in page


def test_a_report_that_cannot_be_written_is_told_before_the_model_is_loaded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("eapcore.models.load.load", lambda *arguments, **options: pytest.fail("the model was loaded"))
    (tmp_path / "report.html").mkdir()
    for command, out in (("run", tmp_path), ("evaluate", tmp_path / "a.json"), ("verify", tmp_path / "a.json")):
        assert main([command, "--report", "--out", str(out)]) == 2
        assert "report.html cannot be written" in capsys.readouterr().err
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "scores.safetensors")]) == 2
    assert "must be a page to write, and end in .html" in capsys.readouterr().err
