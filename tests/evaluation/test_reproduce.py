"""The paper's experiments redone whole on random weights in its models' shapes: every number against what it is of, and
nothing done twice."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from models import SHARED, lens, random_model, random_scores, save_checkpoint
from refusal import refused
from safetensors.torch import save_file
from words import word_level

import eapcore.evaluation.reproduce as reproduction
import eapcore.report.figures as figures
from eapcore.attribution.attribute import attribute
from eapcore.cli import main
from eapcore.evaluation.inside import WITH_INSIDE, inside_effects, inside_scores, summed_inside
from eapcore.evaluation.published import ALL, COARSE, judge, rates
from eapcore.evaluation.reproduce import Plan, known, reproduce, reproduce_scores
from eapcore.evaluation.roc import roc
from eapcore.execution.experiment import Experiment
from eapcore.graph.circuit import Circuit
from eapcore.graph.graph import Graph
from eapcore.graph.scores import EdgeScores
from eapcore.models.load import load
from eapcore.patching.circuits import metric_on
from eapcore.patching.edges import patch_edges
from eapcore.patching.interpolate import interpolate
from eapcore.report.run_folder import Run
from eapcore.search.acdc import acdc
from eapcore.search.subnetwork_probing import subnetwork_probing
from eapcore.tasks import TASKS, find_pairs
from eapcore.text.tokenizer import tokenizer_of

WORDS = word_level()
SIZE = WORDS.get_vocab_size()


@pytest.fixture(scope="module")
def gpt2_shaped(tmp_path_factory):
    """12 layers of 12 heads, as narrow as can be, in a folder with a tokenizer."""
    model = random_model(12, 12, 24, 2, 24, SIZE, 32, dtype=torch.float32)
    folder = save_checkpoint(model, tmp_path_factory.mktemp("shapes") / "gpt2-shaped")
    WORDS.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return folder


@pytest.fixture(scope="module")
def attn_only(tmp_path_factory):
    """4 layers of 8 heads without MLPs, as the attention-only models are published."""
    state, cfg = lens(random_model(4, 8, 16, 2, None, SIZE, 64, dtype=torch.float32))
    folder = tmp_path_factory.mktemp("shapes") / "attn-only"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(cfg))
    save_file({name: x.contiguous() for name, x in state.items()}, folder / "model.safetensors")
    WORDS.save(str(folder / "tokenizer.json"))
    return folder


OPTIONS = ["--n", "2", "--sample", "16", "--curves", "1", "--top-n", "12", "--threshold", "0.01",
    "--probe-steps", "1"]  # fmt: skip


@pytest.fixture(scope="module")
def ioi(gpt2_shaped, tmp_path_factory):
    """eapcore reproduce ioi, once: the folder and what reproduction.json holds."""
    out = tmp_path_factory.mktemp("out") / "ioi"
    command = ["reproduce", "ioi", "--model", str(gpt2_shaped), *OPTIONS, "--device", "cpu", "--no-report"]
    assert main([*command, "--out", str(out)]) == 0
    return out, json.loads((out / "reproduction.json").read_text(encoding="utf-8")), command


def auc(values, true):
    """The rank statistic: how many false ones a true one is above, those that it ties with by half."""
    false = values[~true].sort().values
    above = [torch.searchsorted(false, values[true], side=side) for side in ("left", "right")]
    return float((above[0] + above[1]).double().mean() / (2 * len(false)))


def row_of(content, what):
    (row,) = [row for row in content["rows"] if row["what"] == what]
    return row


def test_reproduce_writes_what_each_step_makes_beside_the_published_numbers(ioi, gpt2_shaped):
    out, content, _ = ioi
    truth, published = known("ioi")
    model = load(gpt2_shaped)
    pairs = find_pairs("ioi", n=2, seed=0, encode=model.tokenizer)
    scores = EdgeScores.load(out / "scores.safetensors")
    assert torch.equal(scores.scores, attribute(model, pairs, "logit_diff").scores)
    unit = scores.meta["metric"]["clean"] - scores.meta["metric"]["corrupt"]
    assert content["unit"] == pytest.approx(unit) and content["published"]["auc"]["eap"] == 0.904

    others, true = inside_scores(Experiment.of(model, pairs)).against(truth)
    values = torch.cat([scores.scores[scores.mask].double(), others])
    inside = torch.cat([truth.circuit.mask[scores.mask], true])
    assert (len(values), int(inside.sum())) == (33367, 1131)
    found = {(r["edge_set"], r["ranking"], r["thresholds"], r["rule"]): r["auc"] for r in content["judged"]["areas"]}
    assert len(found) == 2 * 3 * 4
    area = auc(values.abs(), inside)
    assert found[WITH_INSIDE, "absolute", "every threshold", "trapezoid"] == pytest.approx(area, abs=1e-6)
    row = row_of(content, f"AUC, EAP: |score|, {WITH_INSIDE}")
    assert row["published"] == 0.904 and row["difference"] == pytest.approx(area - 0.904, abs=1e-6)
    size = (values / unit).abs()
    rates_at = [[float((size[side] >= t).double().mean()) for side in (~inside, inside)] for t in published.curve]
    x, y = np.array([[1, 1], *rates_at, [0, 0]])[::-1].T
    steps = np.diff(x)
    for rule, expected in (("lower", (steps * y[:-1]).sum()), ("upper", (steps * y[1:]).sum())):
        assert found[WITH_INSIDE, "absolute", COARSE, rule] == pytest.approx(expected, abs=1e-4)
    (moments,) = [r for r in content["judged"]["moments"] if (r["edge_set"], r["where"]) == (WITH_INSIDE, "inside")]
    mine = (values[inside] / unit).numpy()
    assert [moments["mean"], moments["std"]] == pytest.approx([mine.mean(), mine.std()], rel=1e-4)
    assert content["judged"]["beyond"]["count"][WITH_INSIDE] == int((size[~inside] > 0.25).sum())
    histogram = content["judged"]["histogram"]
    assert (sum(histogram["inside"]), sum(histogram["outside"])) == (1131, 33367 - 1131)
    role = row_of(content, "mean score of the circuit's edges from negative name mover heads")
    edges = [e for e in truth.circuit.edges if e.split("->")[0] in ("a10.h7", "a11.h10")]
    assert role["here"] == pytest.approx(np.mean([scores[e] for e in edges]) / unit, rel=1e-4)
    assert role["published"] == 0.2372

    exact = content["exact"]
    effects = patch_edges(model, pairs, "logit_diff", exact["edges"])
    assert len(exact["edges"]) == 16
    for edge, estimate, effect in zip(exact["edges"], exact["estimates"], exact["effects"], strict=True):
        assert [estimate * unit, effect * unit] == pytest.approx([scores[edge], effects[edge]], abs=1e-5)
    (curve,) = content["curves"]
    gaps = np.abs(np.subtract(exact["estimates"], exact["effects"]))
    assert curve["edge"] == exact["edges"][int(gaps.argmax())]
    expected = interpolate(model, pairs, "logit_diff", curve["edge"]).effects
    assert np.allclose(np.array(curve["effects"]) * unit, expected, atol=1e-5) and len(curve["points"]) == 11

    (search,) = content["searches"]
    circuit = acdc(model, pairs, "kl", threshold=0.01, start=scores.top_n(12))
    assert (search["start_edges"], search["edges"]) == (12, circuit.n_edges)
    assert {"tpr": search["tpr"], "fpr": search["fpr"], "j": search["j"]} == rates(circuit, truth)
    top = scores.top_n(12).mask
    n_false = 32491 - 963
    tpr, fpr = int((top & truth.circuit.mask).sum()) / 963, int((top & ~truth.circuit.mask).sum()) / n_false
    assert search["start_j"] == pytest.approx(tpr - fpr)

    hisp = roc(attribute(model, pairs, "logit_diff", method="hisp"), truth.circuit).auc
    probed = subnetwork_probing(model, pairs, "kl", level="node", steps=1)
    rows = [row for row in content["rows"] if row["what"].startswith(("AUC, HISP", "AUC, subnetwork probing"))]
    assert [row["here"] for row in rows] == pytest.approx([hisp, roc(probed, truth.circuit).auc])

    at, most, whole = content["subnetworks"]
    kept = Circuit.load(out / "circuit.json")
    assert torch.equal(kept.mask, (scores.scores.abs() >= 0.077 * abs(unit)) & scores.mask)
    assert (at["edges"], most["edges"], whole["edges"], whole["j"]) == (kept.n_edges, 963, 963, 1)
    (value,) = metric_on(model, pairs, "logit_diff", [truth.circuit.prune()])
    assert whole["faithfulness"] == pytest.approx((value - scores.meta["metric"]["corrupt"]) / unit, rel=1e-3)
    nodes = attribute(model, pairs, "logit_diff", level="node").scores[1:].double()
    assert abs(content["heads"][0]["score"] * unit) == pytest.approx(float(nodes.abs().max()), rel=1e-4)
    text = (out / "reproduction.txt").read_text(encoding="utf-8")
    assert f"{area:.4f}" in text and "0.904" in text and "negative name mover" in text
    assert content["command"].split()[:3] == ["eapcore", "reproduce", "ioi"] and content["left_out"] == []


def test_what_is_done_is_not_done_again_and_the_rest_goes_on(ioi, gpt2_shaped, tmp_path, monkeypatch):
    out, content, command = ioi
    shutil.copytree(out, tmp_path / "again")
    done = ("attribute", "inside_scores", "verify_sample", "follow_edge", "run_until", "measure_mib")
    for name in (*done, "subnetwork_probing"):
        monkeypatch.setattr(reproduction, name, lambda *_, name=name, **__: pytest.fail(f"{name} was done again"))
    (tmp_path / "again" / "reproduction.json").unlink()
    (search,) = (tmp_path / "again" / "steps").glob("search-*.json")
    search.unlink()  # as if it had been interrupted there
    assert main([*command, "--out", str(tmp_path / "again")]) == 0
    again = json.loads((tmp_path / "again" / "reproduction.json").read_text(encoding="utf-8"))
    assert again == content and search.exists()


def test_other_prompts_or_weights_are_refused_in_a_folder_that_holds_a_reproduction(ioi, gpt2_shaped, capsys):
    out, _, command = ioi
    before = {path: path.read_bytes() for path in out.glob("*.*")}
    assert main([*command, "--seed", "1", "--out", str(out)]) == 2
    assert "holds a reproduction with another task" in capsys.readouterr().err
    scores = str(out / "scores.safetensors")
    shutil.copy(scores, out.parent / "scores.safetensors")
    moved = str(out.parent / "scores.safetensors")
    assert main(["reproduce", "ioi", "--scores", moved, "--no-report", "--out", str(out)]) == 2
    assert "holds a reproduction on a model" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in out.glob("*.*")} == before


def test_a_step_that_was_edited_is_refused_by_name(ioi, tmp_path, capsys):
    out, _, command = ioi
    shutil.copytree(out, tmp_path / "again")
    path = tmp_path / "again" / "steps" / "curves.json"
    for content in (path.read_text().replace('"points"', '"point"'), "["):
        path.write_text(content)
        assert main([*command, "--out", str(tmp_path / "again")]) == 2
        assert "curves.json" in (said := capsys.readouterr().err) and said.count("\n") == 1


def test_evaluate_judges_by_the_published_circuit_s_two_edge_sets(attn_only, tmp_path, capsys):
    options = ["--model", str(attn_only), "--task", "docstring", "--n", "1", "--method", "eap", "--device", "cpu"]
    options += ["--out", str(tmp_path / "judged.json"), "--true-circuit", "docstring"]
    assert main(["evaluate", *options]) == 0
    said = [line for line in capsys.readouterr().out.split("\n") if line.startswith("AUC")]
    assert "24 true of" in said[0] and "37 true of" in said[1] and said[1].endswith(f"({WITH_INSIDE})")
    assert main(["evaluate", *options, "--ablation", "zero"]) == 0
    assert "without  the edges inside components" in capsys.readouterr().out


def test_docstring_patches_every_edge_and_searches_from_all(attn_only, tmp_path):
    model = load(attn_only)
    pairs = find_pairs("docstring", n=1, seed=0, encode=model.tokenizer)
    plan = Plan(curves=1, thresholds=[0.5], top_n=[model.graph.n_edges], probe_steps=0)
    found = reproduce(model, "docstring", pairs, tmp_path, plan=plan)
    truth, published = known("docstring")
    scores, effects = attribute(model, pairs, "logit_margin"), patch_edges(model, pairs, "logit_margin")
    x, y = (each.scores[scores.mask].double().numpy() for each in (scores, effects))
    rows = {row.what: row for row in found.rows}
    slope, intercept = np.polyfit(x, y, 1)
    fit = [rows[f"exact patching against EAP: {what}"] for what in ("slope of exact on EAP", "intercept", "R²")]
    assert [row.here for row in fit] == pytest.approx(
        [slope, intercept, np.corrcoef(x, y)[0, 1] ** 2], rel=1e-3, abs=1e-6
    )
    assert [row.published for row in fit] == [0.531, -0.049, 0.27]
    others = inside_effects(Experiment.of(model, pairs, "logit_margin")).against(truth)
    patched = rows[f"AUC, activation patching: |effect|, {WITH_INSIDE}"]
    assert patched.here == pytest.approx(roc(effects, truth.circuit, others=others).auc, abs=1e-3)
    assert patched.published == 0.978
    assert [curve["edge"] for curve in found.curves][:3] == list(published.bent) and len(found.curves) == 4
    (search,) = found.searches
    expected = acdc(model, pairs, "kl", threshold=0.5)
    assert search["start"] == "all edges" and search["edges"] == expected.n_edges
    assert not any("probing" in row.what for row in found.rows)
    assert any(row.what.startswith("AUC, ACDC by KL") and row.published == 0.982 for row in found.rows)
    assert Run.read(tmp_path).reproduction["task"] == "docstring"


def test_a_model_of_another_shape_has_its_own_findings_alone(tmp_path):
    model = dataclasses.replace(random_model(2, 2, 16, 8, 24, SIZE, 32), tokenizer=tokenizer_of(WORDS))
    pairs = find_pairs("ioi", n=3, seed=0, encode=model.tokenizer)
    plan = Plan(curves=1, thresholds=[0.5], score_thresholds=[1e-3, 1e9], sample=14)
    found = reproduce(model, "ioi", pairs, tmp_path, plan=plan)
    assert found.judged is None and "the published circuit is one of gpt2" in found.left_out[0]
    assert found.left_out[1] == "no edge has |score| ≥ 1e+09: no search starts there" and len(found.searches) == 1
    assert found.rows == [] and "j" not in found.searches[0] and found.heads[0]["role"] is None
    assert found.circuits[-1]["faithfulness"] >= 0.8 or found.circuits[-1]["edges"] == model.graph.n_edges


@pytest.mark.skipif(not (SHARED / "published-scores").is_dir(), reason="the published scores are not here")
def test_published_scores_of_the_real_model_reproduce_without_a_model(tmp_path, capsys):
    file = SHARED / "published-scores" / "ioi-gpt2-eap-ig.json"
    assert main(["reproduce", "ioi", "--scores", str(file), "--no-report", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    content = json.loads((tmp_path / "out" / "reproduction.json").read_text(encoding="utf-8"))
    assert row_of(content, f"AUC, EAP: |score|, {ALL} alone")["here"] == pytest.approx(0.868, abs=5e-4)
    assert "963 of 32491   absolute" in printed and "0.8677" in printed
    assert [text.split(":")[0] for text in content["left_out"]] == [
        "the scores do not say whether they are of a metric or of a loss",
        "the scores do not say the metric's clean and corrupt values, in whose difference published scores are",
        "what needs a model is left out",
    ]
    assert {row["ranking"] for row in content["judged"]["areas"]} == {"absolute"}


def test_scores_without_a_unit_or_mlps_are_judged_by_what_they_have(tmp_path):
    truth, _ = known("docstring")
    found = reproduce_scores("docstring", random_scores(truth.circuit.graph), tmp_path)
    assert found.judged.auc(ALL) == pytest.approx(roc(random_scores(truth.circuit.graph), truth.circuit).auc)
    assert {row["ranking"] for row in found.judged.areas} == {"absolute", "signed"}
    assert len(found.left_out) == 1 and len(found.subnetworks) == 1 and found.subnetworks[0]["edges"] == 24
    refused("scores are of Graph", reproduce_scores, "ioi", random_scores(Graph(2, 2, True)), tmp_path)
    other = dataclasses.replace(random_scores(truth.circuit.graph), meta={"task": {"name": "ioi"}})
    refused("the scores are of the task ioi, but docstring is to be", reproduce_scores, "docstring", other, tmp_path)
    refused("task must be one with published numbers, ioi, greater-than, docstring, got 'sort'", known, "sort")
    nan = random_scores(truth.circuit.graph)
    nan.scores[0, 0] = torch.nan
    refused("NaN", reproduce_scores, "docstring", nan, tmp_path)


def test_a_page_and_pictures_are_written_beside(tmp_path, capsys, monkeypatch):
    truth, _ = known("docstring")
    scores = random_scores(truth.circuit.graph)
    scores.scores[0, truth.circuit.graph.edge_mask()[0]] = torch.inf  # as ACDC's files have edges that nothing removed
    scores.save(tmp_path / "scores.safetensors")
    monkeypatch.setattr(figures, "_save", lambda path, size, draw: path.with_suffix(".svg").touch())
    command = ["reproduce", "docstring", "--scores", str(tmp_path / "scores.safetensors")]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    assert "report.html" in capsys.readouterr().out
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/svg+xml") == 2 and "24 true of 1281 edges" in page
    judged = json.loads((tmp_path / "out" / "reproduction.json").read_text(encoding="utf-8"))["judged"]
    histogram = judged["histogram"]
    assert sum(histogram["inside"] + histogram["outside"]) == 1281 + 32 * 6 and None not in histogram["ends"]
    assert [row["mean"] is None for row in judged["roles"] if row["role"] == "embed"] == [True, True]
    assert judged["moments"][0]["n"] == 24 and judged["moments"][0]["mean"] is not None
    drawn = {path.stem for path in (tmp_path / "out" / "figures").iterdir()}
    assert {"scores-by-circuit", "roles", "roc", "circuit"} <= drawn
    monkeypatch.setattr("eapcore.report.draw.find_spec", lambda name: None)
    assert main([*command, "--out", str(tmp_path / "other")]) == 2 and not (tmp_path / "other").exists()
    assert "--no-report" in capsys.readouterr().err


def test_bad_input_is_one_sentence_before_the_work(gpt2_shaped, tmp_path, capsys):
    random_scores(Graph(2, 2, True)).save(tmp_path / "small.safetensors")
    (tmp_path / "edges.json").write_text('{"cfg": {}, "edges": {}}')
    model = ["--model", str(gpt2_shaped), "--device", "cpu"]
    cases = [
        (["sort"], "must be one with published numbers"),
        (["ioi", "--scores", "x.json", "--model", "gpt2"], "--model how to run a model: give one of the two"),
        (["ioi", "--scores", "x.json", "--top-n", "5", "--probe-steps", "0"], "--top-n, --probe-steps how to run"),
        (["ioi", "--sign", "loss", *model], "--sign is for --scores"),
        (["ioi", "--scores", str(tmp_path / "none.safetensors")], "a score file was expected"),
        (["ioi", "--scores", str(tmp_path / "small.safetensors")], "the published circuit of ioi is one of"),
        (["ioi", "--scores", str(tmp_path / "edges.json")], "must be a graph file of EAP-IG"),
        (["ioi", *model, "--top-n", "99999"], "searches start from between 1 and the 32491 edges"),
        (["ioi", *model, "--threshold", "0"], "thresholds must be positive"),
        (["ioi", *model, "--sample", "5"], "a sample must have between 14 and"),
        (["ioi", *model, "--search-metric", "speed"], "metric must be one of"),
        (["ioi", "--model", str(tmp_path / "nowhere")], "nowhere"),
    ]
    for options, message in cases:
        command = ["reproduce", *options, "--no-report", "--out", str(tmp_path / "out")]
        status, printed = main(command), capsys.readouterr()
        assert (status, printed.out) == (2, "") and message in printed.err, (options, printed)
        assert printed.err.count("\n") == 1 and not (tmp_path / "out" / "steps").exists(), options


def test_judging_turns_with_the_published_unit():
    """A unit scales scores and turns their sign; areas by |score| stay."""
    truth, published = known("docstring")
    published = dataclasses.replace(published, curve=(0.1, 0.5, 2.0), beyond=(1.0, 3))
    scores = random_scores(truth.circuit.graph)
    one, other = (judge(scores, truth, summed_inside(scores), published, unit) for unit in (1.0, -2.0))
    assert one.auc(WITH_INSIDE) == other.auc(WITH_INSIDE)
    for a, b in zip(one.moments, other.moments, strict=True):
        assert b["mean"] == pytest.approx(-a["mean"] / 2) and b["std"] == pytest.approx(a["std"] / 2)
    thresholds = {name: judged.auc(ALL, thresholds=COARSE) for name, judged in (("one", one), ("other", other))}
    assert thresholds["one"] != thresholds["other"]
    assert all(task.truth().model for task in TASKS.values() if task.published)
