"""A report shows what a run folder holds, says what it lacks, and writes nothing of a file's text as markup."""

from __future__ import annotations

import base64
import html.parser
import json
import re
import struct
import sys
from dataclasses import replace

import pytest
import torch
from runs import EVIL, random_scores, reproduction

import eapcore.report.figures as figures
from eapcore.cli import main
from eapcore.evaluation.agreement import agreement
from eapcore.graph.graph import Graph
from eapcore.graph.scores import EdgeScores
from eapcore.report.compare import jaccard, sizes
from eapcore.report.figures import plot
from eapcore.report.layout import layout
from eapcore.report.page import histogram, parts, render
from eapcore.report.run_folder import Run


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


def unpacked(text, kind):
    return [x for (x,) in struct.iter_unpack(f"<{kind}", base64.b64decode(text))]


class Tags(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.text = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_holds_the_uncertainty_of_every_edge(folder):
    scores = Run.read(folder).scores
    assert data_of(render([Run(scores, "plain")]))["runs"][0]["beside"] == {}
    error, share = scores.scores.abs() / 3, scores.scores.sigmoid()
    known = replace(scores, standard_error=error, sign_consistency=share, jaccard=torch.linspace(0.1, 1, 262))
    page = render([Run(known, "known", known.top_n(131))])
    (found,) = data_of(page)["runs"]
    for name, values in (("standard error", error), ("same sign", share)):
        there = unpacked(found["beside"][name], "f")
        flat = unpacked(found["edges"], "i")
        assert there == pytest.approx(values.flatten()[flat].tolist(), rel=1e-6)
    assert "Jaccard index 0.5483 of the top 131 edges" in page
    assert known.meta["task"]["n_pairs"] == 2 and "of two draws of the pairs; too few to judge by" in page
    selected = {"curve": {"sizes": [13, 140], "faithfulness": [0.1, 0.9], "intervals": None}}  # of which 131 connect
    assert "of the top 140 edges" in render([Run(known, "known", known.top_n(131), run=selected)])
    more = replace(known, meta={**known.meta, "task": {**known.meta["task"], "n_pairs": 4}})
    assert "of two draws of the pairs; 0.8 is enough" in render([Run(more, "more", more.top_n(131))])


def test_the_page_holds_every_edge_in_order_and_every_part(folder):
    run = Run.read(folder)
    (found,) = data_of(render([run]))["runs"]
    flat, scores = unpacked(found["edges"], "i"), unpacked(found["scores"], "f")
    assert len(flat) == run.scores.graph.n_edges
    names = run.scores.graph.sender_names, run.scores.graph.receiver_names
    shown = [f"{names[0][f // len(names[1])]}->{names[1][f % len(names[1])]}" for f in flat]
    assert shown == [edge for edge, _ in run.scores.top(len(flat))]
    assert scores == pytest.approx([score for _, score in run.scores.top(len(flat))], rel=1e-6)
    assert {shown[i] for i in unpacked(found["circuit"], "i")} == set(run.circuit.edges)
    assert [curve["kept"] for curve in found["curves"]] == [[0.25, 0.75, 1.0]] * 3
    assert found["rocs"][0]["tpr"] == [0, 0.8, 1] and "0.85" in found["rocs"][0]["name"]
    s, r, estimate, effect = found["exact"][0]
    assert run.scores.graph.edge_name(s, r) == run.scores.top(1)[0][0] and effect == 1.25 * estimate
    assert run.missing == {}


def test_sums_by_position_and_the_histogram_lose_nothing(folder):
    run = Run.read(folder)
    positions = parts(run)["positions"]
    assert positions["names"] == ["a0", "m0", "a1", "m1", "a2", "m2", "logits"]
    assert torch.tensor(positions["values"], dtype=torch.float64).sum(0).tolist() == pytest.approx(
        run.scores.per_position.sum((1, 2)).tolist(), rel=1e-9
    )
    a1 = run.scores.per_position[:, :, run.scores.graph.qkv(1)].sum((1, 2))
    assert positions["values"][2] == pytest.approx(a1.tolist(), rel=1e-9)
    found = histogram(run)
    values = run.scores.scores[run.scores.mask]
    assert sum(found["inside"]) == 30 and sum(found["inside"]) + sum(found["outside"]) == len(values)
    for i, (low, high) in enumerate(zip(found["ends"][:-1], found["ends"][1:], strict=True)):
        last = i == len(found["inside"]) - 1
        inside = (values >= low) & ((values <= high) if last else (values < high))
        assert found["inside"][i] + found["outside"][i] == int(inside.sum())


def test_how_to_make_it_again_names_each_command_once_with_its_place(write_run):
    folder = write_run(seed=5)
    for part in ("evaluation", "verification"):
        content = json.loads((folder / f"{part}.json").read_text())
        content |= {"command": f"eapcore {part[:-5]} --scores run5/scores.safetensors"}
        if part == "verification":
            found = {"r2": 0.5, "slope": 1.25, "intercept": -0.5, "spearman": 0.75, "signs": None}
            content |= {"agreement": found}
        (folder / f"{part}.json").write_text(json.dumps(content))
    run = Run.read(folder)
    expected = [
        "eapcore run --model small --out run5",
        "eapcore evalu --scores run5/scores.safetensors --out run5/evaluation.json",
        "eapcore verific --scores run5/scores.safetensors --out run5/verification.json",
    ]
    for own, more in (("eapcore run --model small", []), ("eapcore report run5", ["eapcore report run5"])):
        assert re.findall("<code>(.*?)</code>", render([run], command=own)) == expected + more
    assert parts(run)["agreement"] == ["exact = 1.25 · score − 0.5", "R² 0.5, Spearman 0.75, same sign – %"]


def test_text_of_files_stays_text(folder):
    page = render([Run.read(folder)], command=EVIL)
    tags = Tags()
    tags.feed(page)
    scripts = [attributes for tag, attributes in tags.tags if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "data"}, {}]
    assert "alert(1)" in "".join(tags.text) and "<script>alert" not in page
    words = [text.strip() for text in tags.text]
    assert "queen" in words and "subject" in words
    for tag, attributes in tags.tags:
        assert not {"src", "onload", "onerror", "onclick"} & set(attributes), (tag, attributes)
        assert attributes.get("href", "#")[0] == "#" or attributes["href"] == "data:,"


def test_what_is_not_there_is_said(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(figures, "_save", lambda path, size, draw: path.with_suffix(".svg").touch())
    (tmp_path / "scores.safetensors").write_bytes((folder / "scores.safetensors").read_bytes())
    assert main(["report", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for part in ("circuit", "prompts", "run", "evaluation", "verification"):
        assert f"without  {part} of {tmp_path.name}: eapcore" in printed
        assert f"not here: {part}" in page
    assert (tmp_path / "figures" / "circuit.svg").exists() and not (tmp_path / "figures" / "roc.svg").exists()


def test_a_part_is_found_by_what_it_says_it_is(folder, tmp_path):
    for path in folder.glob("*.*"):
        name = "judged.json" if path.name == "evaluation.json" else path.name
        (tmp_path / name).write_bytes(path.read_bytes())
    run = Run.read(tmp_path)
    assert run.files["evaluation"] == "judged.json" and run.evaluation == Run.read(folder).evaluation


@pytest.mark.parametrize(
    ("part", "content"),
    [
        ("run", {"model": {"content_hash": "f"}}),
        ("evaluation", {"mib": {"signed": {"meta": {"model": {"content_hash": "f"}}}}}),
        ("verification", {"meta": {"scores": {"model": {"content_hash": "f"}}}}),
    ],
)
def test_a_part_of_another_model_is_refused(folder, tmp_path, part, content):
    (tmp_path / "scores.safetensors").write_bytes((folder / "scores.safetensors").read_bytes())
    content = {"format": f"eapcore-{part}", "format_version": 1, **content}
    (tmp_path / f"{part}.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"{part}\.json is of another model than the scores"):
        Run.read(tmp_path)


@pytest.mark.parametrize("grouped", [None, 2])
def test_nodes_stand_by_layer_and_head(grouped):
    graph = Graph(2, 4, True, n_kv=grouped)
    places = layout(graph)
    assert len(places.senders) == graph.n_senders and len(places.receivers) == graph.n_receivers
    for r in range(graph.n_receivers):
        behind = graph.senders_behind(r)
        for s in range(graph.senders_before(r)):
            assert places.senders[s][1] < places.receivers[r][1]  # every edge goes up
        if behind and graph.receiver_names[r].endswith(">"):
            middle = sum(places.senders[s][0] for s in behind) / len(behind)
            shift = round(places.receivers[r][0] - middle, 6)
            assert (shift > 0) - (shift < 0) == "qkv".index(graph.receiver_names[r][-2]) - 1
    assert len(set(places.receivers)) == graph.n_receivers


def test_jaccard_is_that_of_the_top_edges():
    graph = Graph(2, 3, True)
    a, b = random_scores(graph, 0), random_scores(graph, 1)
    counts = sizes(graph.n_edges)
    assert counts[0] == 1 and counts[-1] == graph.n_edges and len(counts) > 10
    for n, found in zip(counts, jaccard(a, b, counts), strict=True):
        x, y = a.top_n(n).mask, b.top_n(n).mask
        assert found == pytest.approx(int((x & y).sum()) / int((x | y).sum()), abs=1e-12)


def ranked(x):
    """Ranks of values of which no two are the same."""
    return x.argsort().argsort().double()


def test_two_runs_are_compared_and_two_graphs_refused(folder, other, tmp_path, capsys):
    page, other = tmp_path / "both.html", other / "scores.safetensors"
    assert main(["report", str(folder), str(other), "--out", str(page), "--figures", str(tmp_path)]) == 0
    pictures = {"circuit", "heat-map", "histogram", "faithfulness", "roc", "exact", "positions", "jaccard"}
    pictures |= {f"{name}-other" for name in ("circuit", "heat-map", "histogram", "positions")}
    assert {path.stem for path in tmp_path.glob("*.svg")} == {path.stem for path in tmp_path.glob("*.png")} == pictures
    drawn = (tmp_path / "heat-map-other.svg").read_text(encoding="utf-8")
    for said in (
        "Scores of all edges",
        "scores.safetensors: small, words, eap",
        "score (logit_diff)",
        "senders, by layer",
    ):
        assert said in drawn
    found = data_of(page.read_text(encoding="utf-8"))["compare"]
    a, b = Run.read(folder).scores, Run.read(other).scores
    agreed = agreement(a, b)
    assert [found["agreement"][k] for k in ("spearman", "signs")] == [agreed.spearman, agreed.signs]
    assert found["agreement"]["pearson"] ** 2 == pytest.approx(agreed.r2, rel=1e-12)
    x, y = (ranked(scores.scores[scores.mask].abs()) for scores in (a, b))
    assert found["agreement"]["spearman_absolute"] == pytest.approx(
        float(torch.corrcoef(torch.stack([x, y]))[0, 1]), rel=1e-9
    )
    random_scores(Graph(2, 3, True)).save(tmp_path / "scores.safetensors")
    capsys.readouterr()
    assert main(["report", str(folder), str(tmp_path / "scores.safetensors")]) == 2
    assert "Graph(n_layers=2" in capsys.readouterr().err


def test_the_same_run_makes_the_same_bytes(folder, tmp_path):
    run = Run.read(folder)
    assert render([run]) == render([run])
    for name in ("a", "b"):
        figures._save(tmp_path / name, (4, 3), lambda axes: plot(run.scores, 5, axes=axes))
    for ending in ("svg", "png"):
        a, b = ((tmp_path / f"{name}.{ending}").read_bytes() for name in ("a", "b"))
        assert a == b and len(a) > 1000


def test_a_circuit_without_edges_and_names_that_are_no_text_are_drawn(write_run, tmp_path):
    folder = write_run(seed=7)
    curve = {"sizes": [0], "faithfulness": [0.0], "intervals": [[0, 0]]}
    content = {"format": "eapcore-run", "format_version": 1, "command": "eapcore run", "curve": curve}
    (folder / "run.json").write_text(json.dumps(content))
    (folder / "evaluation.json").unlink()
    run = Run.read(folder)
    run = replace(
        run, scores=replace(run.scores, meta={**run.scores.meta, "task": {"name": "caf\udce9\0", "n_pairs": 2}})
    )
    pictures = figures._pictures(run)
    assert "faithfulness" not in pictures and "caf" in render([run])
    size, draw = pictures["heat-map"]
    figures._save(tmp_path / "a", size, draw)
    assert "caf\\udce9\\0" in (tmp_path / "a.svg").read_text()


def test_a_plot_has_a_curve_for_each_edge(folder):
    from matplotlib.patches import PathPatch

    scores = Run.read(folder).scores
    curves = [p for p in plot(scores, 7).patches if type(p) is PathPatch]
    assert len(curves) == 7
    widths = sorted((curve.get_linewidth() for curve in curves), reverse=True)
    top = [abs(score) for _, score in scores.top(7)]
    assert widths == pytest.approx([max(0.6, 5 * score / top[0]) for score in top])
    with pytest.raises(ValueError, match="the circuit must be of"):
        plot(scores, circuit=random_scores(Graph(1, 1, False)).top_n(1))


def test_thirty_thousand_edges_stay_under_three_megabytes_and_more_are_cut():
    graph = Graph(12, 12, True)
    scores = random_scores(graph)
    assert len(render([Run(scores), Run(random_scores(graph, 1))]).encode()) < 1.5e6
    large = Graph(18, 18, True)
    (found,) = data_of(render([Run(random_scores(large))]))["runs"]
    assert large.n_edges > 60_000 == len(unpacked(found["edges"], "i"))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("evaluation.json", "{", "must be JSON that eapcore wrote, but it cannot be read"),
        ("evaluation.json", "[1]", "it says no format of it"),
        ("evaluation.json", '{"format": "eapcore-evaluation"}', "its format version is None"),
        ("evaluation.json", '{"format": "eapcore-evaluation", "format_version": 9}', "update eapcore"),
        ("evaluation.json", '{"format": "eapcore-evaluation", "format_version": 1}', "not as eapcore writes it"),
        ("prompts.json", '{"format": "eapcore-prompts", "format_version": 1, "pairs": [3]}', "prompts.json of"),
        (
            "verification.json",
            '{"format": "eapcore-verification", "format_version": 1, "edges": ["x"], "estimates": [1], "effects": [1]}',
            "as eapcore writes it: an edge is written",
        ),
    ],
)
def test_a_file_that_is_no_part_is_named(folder, tmp_path, capsys, name, text, message):
    (tmp_path / "scores.safetensors").write_bytes((folder / "scores.safetensors").read_bytes())
    (tmp_path / name).write_text(text)
    assert main(["report", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error and name in error and error.count("\n") == 1
    assert not (tmp_path / "report.html").exists()


def test_no_scores_is_one_sentence(tmp_path, capsys):
    for path, message in ((tmp_path, "no other score file"), (tmp_path / "none", "a run folder or a score file")):
        assert main(["report", str(path)]) == 2
        assert message in capsys.readouterr().err


def test_a_score_that_is_nan_is_refused(folder, tmp_path, capsys):
    scores = Run.read(folder).scores
    broken = EdgeScores(scores.scores.clone(), scores.graph)
    broken.scores[0, -1] = float("nan")
    broken.save(tmp_path / "scores.safetensors")
    assert main(["report", str(tmp_path)]) == 2
    assert "1 of 262 scores are NaN" in capsys.readouterr().err


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_without_its_packages_a_report_says_what_to_install(folder, monkeypatch, capsys, package):
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["report", str(folder)]) == 2
    assert f"the package {package}: pip install 'eapcore[report]'" in capsys.readouterr().err


def test_a_reproduction_is_shown_beside_the_paper_with_its_pictures(folder, tmp_path):
    for path in folder.glob("*.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    content = reproduction()
    (tmp_path / "reproduction.json").write_text(json.dumps(content))
    run = Run.read(tmp_path)
    page = render([run, Run.read(folder)])
    tags = Tags()
    tags.feed(page)
    words = [text.strip() for text in tags.text]
    assert {"0.904", "-0.004", "0.75", "0.625"} <= {*words} and "This run is no reproduction." in words
    pictures = [dict(attributes) for tag, attributes in tags.tags if tag == "img"]
    assert len(pictures) == 4
    for picture in pictures:
        head, _, code = picture["src"].partition(",")
        svg = base64.b64decode(code).decode()
        assert head == "data:image/svg+xml;base64" and svg.count("<svg") == 1 and "alert(1)</" not in svg
    assert "<script>alert" not in page and "eapcore reproduce ioi" in page
    assert "AUC 0.7654 (trapezoid), 30 true of 262 edges" in [roc["name"] for roc in parts(run)["rocs"]]
    assert set(run.missing) == set() and "run" not in Run(run.scores, reproduction=content).missing
    names = set(figures._pictures(run))
    assert {"scores-by-circuit", "roles", "interpolation", "youden", "subnetwork"} <= names
    for part in ("judged", "curves", "searches"):
        (tmp_path / "reproduction.json").write_text(json.dumps({**content, part: 5}))
        with pytest.raises(ValueError, match=r"reproduction\.json of .* is not as eapcore writes it"):
            render([Run.read(tmp_path)])
