"""Published circuits have their authors' counts, edge for edge, and judge published scores as was published."""

from __future__ import annotations

from collections import Counter

import pytest
from models import SHARED, random_model
from refusal import refused

from eapcore.cli import _parser
from eapcore.cli.inputs import load_truth
from eapcore.evaluation.roc import roc
from eapcore.graph.graph import Graph
from eapcore.interop.eap_ig import GraphFile
from eapcore.tasks import TASKS

TRUTHS = {name: task.truth() for name, task in TASKS.items() if task.truth is not None}


def kind(component):
    return {"e": "embed", "l": "logits", "m": "MLP", "a": "head"}[component[0]]


def kinds(circuit):
    return Counter("->".join(map(kind, edge.split("->"))) for edge in circuit.edges)


def test_the_circuits_have_the_published_numbers_of_edges():
    counts = {name: (t.circuit.n_edges, len(t.inputs), len(t.results), t.n_published) for name, t in TRUTHS.items()}
    assert counts == {"ioi": (963, 78, 90, 1131), "greater-than": (235, 27, 27, 289), "docstring": (24, 13, 0, 37)}
    assert kinds(TRUTHS["ioi"].circuit) == {
        "MLP->head": 567, "head->head": 124, "head->MLP": 123, "MLP->MLP": 66, "embed->head": 45, "head->logits": 13,
        "MLP->logits": 12, "embed->MLP": 12, "embed->logits": 1,
    }  # fmt: skip
    assert {name: t.circuit.graph.n_edges for name, t in TRUTHS.items()} == {
        "ioi": 32491, "greater-than": 32491, "docstring": Graph(4, 8, False).n_edges,
    }  # fmt: skip
    # With every q, k and v input → projection, projection → result, and MLP in → out: the paper's 33,367 edges.
    graph = TRUTHS["ioi"].circuit.graph
    assert graph.n_edges + 2 * 3 * graph.n_layers * graph.n_heads + graph.n_layers == 33367


def test_every_edge_follows_from_the_rules_of_the_roles():
    """The IOI circuit again, edge by edge, from what each role reads and writes."""
    truth = TRUTHS["ioi"]
    late = ("name mover", "backup name mover", "negative name mover")
    wires = {
        "previous token": {"q": "i", "k": "i", "v": "i"}, "duplicate token": {"q": "i", "k": "i", "v": "i"},
        "induction": {"q": "", "k": "previous token", "v": "previous token"},
        "S-inhibition": {"q": "i", "k": "induction, duplicate token", "v": "induction, duplicate token"},
        **{role: {"q": "S-inhibition", "k": "i", "v": "i"} for role in late},
    }  # fmt: skip
    graph, mask = truth.circuit.graph, truth.circuit.mask.tolist()
    roles = {name: truth.role(name) for name in graph.sender_names}
    for s, sender in enumerate(graph.sender_names):
        for r, receiver in enumerate(graph.receiver_names):
            is_edge, role = s < graph.senders_before(r), roles[sender]
            own = roles.get(receiver.split("<")[0])
            if receiver == "logits":
                expected = role in ("embed", "MLP", *late)
            elif own == "MLP":
                expected = is_edge and role is not None
            else:
                from_role = own is not None and role in wires[own][receiver[-2]].split(", ")
                expected = own is not None and (
                    role == "MLP" or from_role or (role == "embed" and wires[own][receiver[-2]] == "i")
                )
                expected = expected and is_edge
            assert mask[s][r] == expected, (sender, receiver)


def test_roles_are_those_of_the_heads():
    sizes = {name: {role: len(heads) for role, heads in t.roles.items()} for name, t in TRUTHS.items()}
    assert sum(sizes["ioi"].values()) == 26 and sizes["ioi"]["backup name mover"] == 8
    assert (sum(sizes["greater-than"].values()), sum(sizes["docstring"].values())) == (9, 6)
    ioi, graph = TRUTHS["ioi"], TRUTHS["ioi"].circuit.graph
    found = Counter(ioi.role(sender) for sender in graph.sender_names)
    assert found == {**sizes["ioi"], "MLP": 12, "embed": 1, None: 144 - 26}
    assert (ioi.role("a9.h9"), ioi.role("a10.h7"), ioi.role("a0.h0")) == ("name mover", "negative name mover", None)
    docstring = TRUTHS["docstring"]
    for edge in ("a3.h6->logits", "a3.h0->logits", "embed->a3.h6<v>"):  # which have the largest published scores
        assert docstring.circuit.mask[docstring.circuit.graph.edge(edge)]
    for truth in TRUTHS.values():  # nothing hangs in the air, but what the circuit's authors left so
        assert {edge.split("->")[0] for edge in truth.circuit.edges} >= {h for hs in truth.roles.values() for h in hs}


@pytest.mark.skipif(not (SHARED / "published-scores").is_dir(), reason="the published scores are not here")
def test_published_scores_of_the_real_model_have_the_published_area():
    file = GraphFile.load(SHARED / "published-scores" / "ioi-gpt2-eap-ig.json")
    assert file.scores is not None and file.scores.graph == TRUTHS["ioi"].circuit.graph
    assert roc(file.scores, TRUTHS["ioi"].circuit).auc == pytest.approx(0.868, abs=5e-4)


def test_a_task_s_name_stands_for_its_published_circuit():
    args = _parser().parse_args(["evaluate", "--true-circuit", "docstring"])
    found = load_truth(args, random_model(4, 8, 16, 2, None))
    assert found.circuit.edges == TRUTHS["docstring"].circuit.edges
    refused("--true-circuit must be a circuit of random, .*, but docstring is one of", load_truth, args, random_model())
