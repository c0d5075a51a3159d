"""Objects show themselves in a line and as a card, and go to pandas, networkx, Graphviz, matplotlib and a page."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from models import random_case
from runs import EVIL, random_scores

import eapcore
from eapcore.evaluation.faithfulness import mib
from eapcore.evaluation.verify import verify
from eapcore.execution.experiment import Experiment
from eapcore.graph.circuit import Circuit
from eapcore.graph.graph import Graph
from eapcore.graph.scores import EdgeScores
from eapcore.tasks.pairs import PromptPairs


@pytest.fixture(scope="module")
def case():
    model, pairs = random_case([6, 3, 5], n_heads=2, d_model=12)
    return model, pairs, eapcore.attribute(model, pairs)


def test_every_object_is_a_short_line(case):
    model, pairs, scores = case
    experiment = Experiment.of(model, pairs, "logit_diff", "corrupt")
    nodes = eapcore.attribute(model, pairs, level="neuron")
    judged = mib(model, pairs, "logit_diff", scores)
    objects = [model, model.weights, model.stages[0], model.attentions[0], pairs, scores, scores.top_n(9), model.graph]
    objects += [
        experiment,
        experiment.batch([0]),
        nodes,
        judged,
        judged.signed,
        verify(model, pairs, scores=scores, n=5),
    ]
    for shown in map(repr, objects):
        assert len(shown) < 600 and "tensor(" not in shown and "\n" not in shown, shown
    for shown, words in ((model, "layers × 2 heads, d_model 12"), (pairs, "3 pairs of 3 to 6 tokens")):
        assert words in repr(shown)
    assert f"{model.graph.n_edges} edges, [S, R] = {list(scores.scores.shape)} float64" in repr(scores)
    assert f"9 of {model.graph.n_edges} edges" in repr(scores.top_n(9))


def test_notebooks_get_a_card_in_which_text_stays_text(case):
    model, _, _ = case
    scores = random_scores(Graph(2, 3, True), name=EVIL)
    pairs = PromptPairs.from_lists([[0, 1]], [[1, 1]], [0], [1], vocab=[EVIL, "b"], name=EVIL)
    for value in (model, pairs, scores, scores.top_n(5), scores.graph):
        shown = value._repr_html_()
        assert shown.startswith("<div>") and "<script" not in shown and "</table>" in shown
    assert "&lt;/script&gt;" in scores._repr_html_() and "&lt;/script&gt;" in pairs._repr_html_()
    assert scores.top(1)[0][0].replace(">", "&gt;").replace("<", "&lt;") in scores._repr_html_()
    broken = EdgeScores(scores.scores * float("nan"), scores.graph)
    assert "NaN" not in broken._repr_html_()  # it shows what is known, and raises nothing


def test_prompts_are_shown_as_tokens():
    pairs = PromptPairs.from_lists(
        [[2, 0, 1], [1]], [[2, 1, 1], [0]], [[0, 1], [1]], [3, 0], vocab=["a", "b"], places={"subject": [1, -1]}
    )
    first, second = pairs.as_tokens(9)
    assert first == {
        "clean": ["2", "a", "b"],
        "corrupt": ["2", "b", "b"],
        "answers": ["a", "b"],
        "wrong": ["3"],
        "position": 2,
        "named": {"subject": 1},
    }
    assert second["clean"] == ["b"] and second["named"] == {} and len(pairs.as_tokens(1)) == 1
    assert pairs.as_tokens(1, text=lambda i: f"<{i}>")[0]["clean"] == ["<2>", "<0>", "<1>"]


def test_scores_as_a_table():
    pytest.importorskip("pandas")
    scores = random_scores(Graph(2, 3, True))
    table = scores.to_pandas()
    assert list(zip(table.edge, table.score, strict=True)) == scores.top(scores.graph.n_edges)
    assert (table.sender + "->" + table.receiver == table.edge).all()


@pytest.mark.parametrize("grouped", [None, 2])
def test_a_graph_for_networkx_has_every_edge(grouped):
    networkx = pytest.importorskip("networkx")
    graph = Graph(2, 4, True, n_kv=grouped)
    scores = random_scores(graph)
    found = scores.to_networkx()
    edges = {f"{s}->{data['receiver']}": data["score"] for s, _, data in found.edges(data=True) if "receiver" in data}
    assert edges == dict(scores.top(graph.n_edges))
    assert networkx.is_directed_acyclic_graph(found) and found.nodes["embed"]["layer"] == -1
    few = scores.to_networkx(5)
    assert sum("receiver" in data for _, _, data in few.edges(data=True)) == 5
    pruned = scores.top_n(30).prune()
    assert set(networkx.descendants(pruned.to_networkx(), "embed")) >= {"logits"}
    if grouped:
        assert set(found.successors("a1.kv1")) == {"a1.h2", "a1.h3"}


def test_a_circuit_for_graphviz_has_every_edge():
    scores = random_scores(Graph(2, 3, True))
    circuit = scores.top_n(20)
    for text in (circuit.to_dot(), circuit.to_dot(scores.scores)):
        found = re.findall(r'^  "(\S+)" -> "(\S+)" \[(?:label="([qkv])")?', text, re.M)
        edges = {f"{s}->{r}" + (f"<{part}>" if part else "") for s, r, part in found}
        assert edges == set(circuit.edges) and len(found) == 20
        assert json.loads(f'["{found[0][0]}"]')
        if shutil.which("dot"):
            subprocess.run(["dot", "-Tsvg"], input=text.encode(), check=True, capture_output=True)
    widths = [float(x) for x in re.findall(r"penwidth=([\d.]+)", circuit.to_dot(scores.scores))]
    assert max(widths) == 5


def test_a_page_and_a_plot_of_scores(tmp_path):
    pytest.importorskip("matplotlib")
    a, b = random_scores(Graph(2, 3, True)), random_scores(Graph(2, 3, True), 1)
    a.report(tmp_path / "one.html", circuit=a.top_n(5))
    a.report(tmp_path / "two.html", other=b)
    assert "small, words, eap" in (tmp_path / "one.html").read_text(encoding="utf-8")
    assert 'id="difference"' in (tmp_path / "two.html").read_text(encoding="utf-8")
    axes = a.plot(10)
    assert a.plot(circuit=a.top_n(3), axes=axes) is axes
    with pytest.raises(ValueError, match="compared edge by edge"):
        a.report(tmp_path / "no.html", other=random_scores(Graph(1, 3, True)))
    assert not (tmp_path / "no.html").exists()


@pytest.mark.parametrize(
    ("package", "call"),
    [
        ("pandas", lambda scores: scores.to_pandas()),
        ("networkx", lambda scores: scores.to_networkx()),
        ("networkx", lambda scores: scores.top_n(3).to_networkx()),
        ("matplotlib", lambda scores: scores.plot()),
        ("jinja2", lambda scores: scores.report("never.html")),
    ],
)
def test_without_its_package_each_says_what_to_install(monkeypatch, package, call):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(RuntimeError, match=rf"package {package}: pip install 'eapcore\[report\]'"):
        call(random_scores(Graph(2, 3, True)))


def test_an_empty_circuit_and_a_graph_without_mlps_are_shown():
    graph = Graph(1, 2, False)
    empty = Circuit(torch.zeros(3, 7, dtype=torch.bool), graph)
    assert "digraph" in empty.to_dot() and "0 of" in repr(empty) and "Circuit of 0 of" in empty._repr_html_()
