"""Graphs, scores, circuits and their files: names, selection, pruning, and what a reader refuses."""

from __future__ import annotations

import dataclasses
import json
import os
import random

import networkx
import pytest
import torch
from models import random_model, random_pairs, random_scores
from refusal import refused
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import eapcore.graph.files as files
from eapcore.attribution.attribute import attribute
from eapcore.graph.circuit import Circuit
from eapcore.graph.files import FORMAT_VERSION, replacing
from eapcore.graph.graph import Graph
from eapcore.graph.scores import EDGE_SIGN as SIGN
from eapcore.graph.scores import EdgeScores, NodeScores

SIZES = {
    "GPT-2 small": ((12, 12, True), 157, 445, 32_491),
    "GPT-2 medium": ((24, 16, True), 409, 1177, 231_877),
    "GPT-2 large": ((36, 20, True), 757, 2197, 810_703),
    "GPT-2 XL": ((48, 25, True), 1249, 3649, 2_235_025),
    "attn-only-4l": ((4, 8, False), 33, 97, 1_281),
}
NEWER = rf"has the format version {FORMAT_VERSION + 1}, but this eapcore reads up to {FORMAT_VERSION}: update eapcore"
GRAPHS = [Graph(2, 3, True), Graph(3, 2, False), Graph(1, 1, True), Graph(1, 1, False), Graph(3, 2, True)]


def order(name):
    """When a component runs, from its name alone: its layer, then heads before the MLP."""
    component = name.split("<")[0]
    if component in ("embed", "logits"):
        return (-1, 0) if component == "embed" else (10**6, 0)
    return (int(component[1:].split(".")[0]), "am".index(component[0]))


def listed(scores):
    """All edges as (score, s, r), found by names alone."""
    graph = scores.graph
    return [
        (float(scores.scores[s, r]), s, r)
        for s, sender in enumerate(graph.sender_names)
        for r, receiver in enumerate(graph.receiver_names)
        if order(sender) < order(receiver)
    ]


def chosen(circuit):
    return {(s, r) for s, r in circuit.mask.nonzero().tolist()}


# Names


@pytest.mark.parametrize(("sizes", "n_senders", "n_receivers", "n_edges"), SIZES.values(), ids=SIZES)
def test_published_sizes_have_their_senders_receivers_and_edges(sizes, n_senders, n_receivers, n_edges):
    graph = Graph(*sizes)
    assert (graph.n_senders, graph.n_receivers, graph.n_edges) == (n_senders, n_receivers, n_edges)
    assert graph.edge_mask().shape == (n_senders, n_receivers)
    assert int(graph.edge_mask().sum()) == n_edges


@pytest.mark.parametrize("sizes", [s[0] for s in SIZES.values()], ids=SIZES)
def test_every_name_leads_back_to_its_index(sizes):
    graph = Graph(*sizes)
    senders, receivers = graph.sender_names, graph.receiver_names
    assert len(set(senders)) == graph.n_senders and len(set(receivers)) == graph.n_receivers
    assert [graph.sender(name) for name in senders] == list(range(graph.n_senders))
    assert [graph.receiver(name) for name in receivers] == list(range(graph.n_receivers))
    for r in random.Random(0).sample(range(graph.n_receivers), 30):
        s = random.Random(r).randrange(graph.senders_before(r))
        assert graph.edge(f"{senders[s]}->{receivers[r]}") == (s, r)


@pytest.mark.parametrize("graph", GRAPHS, ids=str)
def test_an_edge_joins_a_sender_to_what_runs_later(graph):
    expected = [[order(s) < order(r) for r in graph.receiver_names] for s in graph.sender_names]
    assert graph.edge_mask().tolist() == expected


def test_heads_come_before_the_mlp_of_their_layer():
    graph = Graph(6, 2, True)
    assert graph.edge("a5.h0->m5") == (graph.sender("a5.h0"), graph.receiver("m5"))
    refused(r"'m5->a5.h0<q>' is no edge: m5 does not come before a5.h0<q>", graph.edge, "m5->a5.h0<q>")


@pytest.mark.parametrize("name", ["a0.h3", "a2.h0", "m2", "m0<q>", "a0.h0<q>", "logits", "A0.h0", "", "embed "])
def test_an_unknown_sender_lists_the_forms(name):
    forms = r"a sender is embed or a\{0\.\.1\}\.h\{0\.\.2\} or m\{0\.\.1\}, got"
    assert repr(name) in refused(forms, Graph(2, 3, True).sender, name)


@pytest.mark.parametrize("name", ["a0.h3<q>", "a0.h0", "a0.h0<z>", "m2", "embed", "a-1.h0<q>"])
def test_an_unknown_receiver_lists_the_forms(name):
    forms = r"a receiver is logits or a\{0\.\.1\}\.h\{0\.\.2\}<q\|k\|v> or m"
    assert repr(name) in refused(forms, Graph(2, 3, True).receiver, name)


def test_an_attention_only_graph_has_no_mlp_names():
    refused(r"a sender is embed or a\{0\.\.1\}\.h\{0\.\.2\}, got 'm0'", Graph(2, 3, False).sender, "m0")
    refused(r"a receiver is logits or a\{0\.\.1\}\.h\{0\.\.2\}<q\|k\|v>, got 'm0'", Graph(2, 3, False).receiver, "m0")


@pytest.mark.parametrize("name", ["embed", "embed->logits->m0", "embed-logits"])
def test_an_edge_name_without_one_arrow_is_explained(name):
    refused("an edge is written sender->receiver", Graph(2, 3, True).edge, name)


# Selection


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("graph", GRAPHS, ids=str)
def test_top_n_takes_the_largest_by_absolute_value_and_of_equals_the_first(graph, ties):
    scores = random_scores(graph, ties=ties)
    expected = sorted(listed(scores), key=lambda e: (-abs(e[0]), e[1], e[2]))
    for n in {0, 1, 2, graph.n_edges // 2, graph.n_edges}:
        assert chosen(scores.top_n(n)) == {(s, r) for _, s, r in expected[:n]}
    names = [(f"{graph.sender_names[s]}->{graph.receiver_names[r]}", value) for value, s, r in expected]
    assert scores.top(3) == names[:3]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("graph", GRAPHS, ids=str)
def test_signed_top_n_takes_the_most_negative_first(graph, ties):
    scores = random_scores(graph, ties=ties)
    expected = sorted(listed(scores))
    for n in {1, 2, graph.n_edges // 2, graph.n_edges}:
        assert chosen(scores.top_n(n, signed=True)) == {(s, r) for _, s, r in expected[:n]}
    assert [value for _, value in scores.top(3, signed=True)] == [value for value, _, _ in expected[:3]]


def test_absolute_and_signed_rankings_differ_where_an_edge_hinders():
    graph = Graph(1, 1, False)
    scores = EdgeScores(torch.zeros(graph.n_senders, graph.n_receivers), graph)
    scores.scores[graph.edge("embed->logits")] = 5.0
    scores.scores[graph.edge("a0.h0->logits")] = -1.0
    assert scores.top_n(1).edges == ["embed->logits"]
    assert scores.top_n(1, signed=True).edges == ["a0.h0->logits"]
    assert scores["embed->logits"] == 5.0


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("threshold", [-0.5, 0.0, 1.0, 2.0, 3.0, float("inf"), float("-inf")])
def test_threshold_takes_the_edges_that_reach_it(threshold, signed):
    scores = random_scores(Graph(2, 3, True), ties=True)
    expected = {(s, r) for v, s, r in listed(scores) if (-v if signed else abs(v)) >= threshold}
    assert chosen(scores.threshold(threshold, signed=signed)) == expected


def test_a_threshold_that_is_not_a_number_is_refused():
    refused("threshold must be a number, got NaN", random_scores(Graph(1, 1, True)).threshold, float("nan"))


@pytest.mark.parametrize("select", ["top_n", "greedy"])
@pytest.mark.parametrize("n", [-1, 13])
def test_more_edges_than_there_are_or_fewer_than_none_are_refused(select, n):
    scores = random_scores(Graph(2, 1, False))
    assert scores.graph.n_edges == 12
    refused(f"n must be between 0 and the 12 edges of this graph, got {n}", getattr(scores, select), n)


def test_a_selection_says_how_it_was_made():
    scores = random_scores(Graph(2, 3, True))
    assert scores.top_n(4, signed=True).meta == scores.meta | {"selection": "top_n", "n": 4, "signed": True}
    assert scores.threshold(1.5).meta == scores.meta | {"selection": "threshold", "threshold": 1.5, "signed": False}
    assert scores.greedy(4).meta == scores.meta | {"selection": "greedy", "n": 4, "signed": False}


def grown(scores, n, signed):
    """Greedy growth as it is defined: look through all edges again for each one that is added."""
    graph = scores.graph
    inside, edges = {"logits"}, []
    components = [name.split("<")[0] for name in graph.receiver_names]
    while len(edges) < n:
        free = [e for e in listed(scores) if components[e[2]] in inside and (e[1], e[2]) not in edges]
        if not free:
            break
        _, s, r = min(free, key=lambda e: (e[0] if signed else -abs(e[0]), e[1], e[2]))
        edges.append((s, r))
        inside.add(graph.sender_names[s])
    return set(edges)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("graph", GRAPHS, ids=str)
def test_greedy_grows_from_the_logits_as_a_search_through_all_edges_does(graph, ties, signed):
    scores = random_scores(graph, seed=1, ties=ties)
    for n in range(0, graph.n_edges + 1, max(1, graph.n_edges // 7)):
        assert chosen(scores.greedy(n, signed=signed)) == grown(scores, n, signed)


@pytest.mark.parametrize("graph", GRAPHS, ids=str)
def test_every_edge_of_a_greedy_circuit_reaches_the_logits(graph):
    for seed in range(5):
        circuit = random_scores(graph, seed=seed).greedy(graph.n_edges // 3 + 1)
        assert circuit.n_edges == graph.n_edges // 3 + 1
        nodes = component_graph(circuit)
        assert all(networkx.has_path(nodes, s, "logits") for s, _ in nodes.edges())


# Pruning


def component_graph(circuit):
    """Components joined by a circuit's edges, one networkx edge for each, under its name."""
    nodes = networkx.MultiDiGraph()
    nodes.add_nodes_from(["embed", "logits"])
    for name in circuit.edges:
        sender, receiver = name.split("->")
        nodes.add_edge(sender, receiver.split("<")[0], key=name)
    return nodes


@pytest.mark.parametrize("graph", GRAPHS, ids=str)
def test_pruning_keeps_exactly_the_edges_on_a_path_from_embed_to_the_logits(graph):
    generator = torch.Generator().manual_seed(2)
    removed = 0
    for share in (0.05, 0.15, 0.3) * 8:
        mask = graph.edge_mask() & (torch.rand(graph.edge_mask().shape, generator=generator) < share)
        circuit = Circuit(mask, graph, {"kept": "as it was"})
        paths = networkx.all_simple_edge_paths(component_graph(circuit), "embed", "logits")
        expected = {name for path in paths for _, _, name in path}
        pruned = circuit.prune()
        assert set(pruned.edges) == expected
        counts = {"edges_before_pruning": circuit.n_edges, "edges_after_pruning": len(expected)}
        assert pruned.meta == {"kept": "as it was"} | counts
        assert torch.equal(pruned.prune().mask, pruned.mask)
        removed += circuit.n_edges - pruned.n_edges
    assert removed > 0


def test_pruning_keeps_a_full_circuit_and_empties_one_without_a_path():
    graph = Graph(2, 3, True)
    full = Circuit(graph.edge_mask(), graph)
    assert torch.equal(full.prune().mask, full.mask)
    apart = Circuit.from_edges(graph, ["embed->a0.h0<q>", "a0.h1->logits", "m0->a1.h0<v>"])
    assert apart.prune().edges == []


def test_a_head_is_passed_through_from_any_of_its_inputs():
    graph = Graph(2, 2, True)
    for part in "qkv":
        path = [f"embed->a0.h1<{part}>", "a0.h1->m1", "m1->logits"]
        assert sorted(Circuit.from_edges(graph, path).prune().edges) == sorted(path)


# Names of edges, and the circuit's file


@pytest.mark.parametrize("graph", [*GRAPHS, Graph(12, 12, True)], ids=str)
def test_edges_and_from_edges_are_inverse(graph):
    circuit = random_scores(graph, seed=4).top_n(graph.n_edges // 2)
    assert circuit.n_edges == graph.n_edges // 2 == len(circuit.edges)
    again = Circuit.from_edges(graph, circuit.edges)
    assert torch.equal(again.mask, circuit.mask) and again.edges == circuit.edges


def test_from_edges_refuses_what_is_no_edge():
    with pytest.raises(ValueError, match="'m1->m0' is no edge: m1 does not come before m0"):
        Circuit.from_edges(Graph(2, 3, True), ["embed->m0", "m1->m0"])


def test_a_circuit_file_holds_the_graph_the_names_and_what_is_known(tmp_path):
    circuit = random_scores(Graph(2, 3, True)).top_n(20).prune()
    circuit.save(tmp_path / "circuit.json")
    content = json.loads((tmp_path / "circuit.json").read_text(encoding="utf-8"))
    assert content == {
        "format": "eapcore-circuit",
        "format_version": FORMAT_VERSION,
        "graph": {"n_layers": 2, "n_heads": 3, "has_mlp": True},
        "meta": dict(circuit.meta),
        "n_edges": circuit.n_edges,
        "edges": circuit.edges,
    }
    again = Circuit.load(tmp_path / "circuit.json")
    assert torch.equal(again.mask, circuit.mask)
    assert (again.graph, again.meta) == (circuit.graph, circuit.meta)


def test_a_circuit_file_of_a_newer_format_says_so(tmp_path):
    path = tmp_path / "circuit.json"
    path.write_text(json.dumps({"format": "eapcore-circuit", "format_version": FORMAT_VERSION + 1, "nodes": []}))
    assert str(path) in refused(NEWER, Circuit.load, path)


@pytest.mark.parametrize("damage", [
    lambda text: "",
    lambda text: text[: len(text) // 2],
    lambda text: "[]",
    lambda text: '"eapcore-circuit"',
    lambda text: '{"edges": []}',
    lambda text: text.replace("eapcore-circuit", "other-circuit"),
    lambda text: text.replace('"n_layers": 2', '"layers": 2'),
    lambda text: text.replace('"n_layers": 2', '"n_layers": "two"'),
    lambda text: text.replace('"n_edges": 20', '"n_edges": 21'),
    lambda text: text.replace('"edges": [', '"edges": [ 5,'),
    lambda text: text.replace('"edges": [', '"edges": ["m1->m0",'),
    lambda text: "\xff" + text,
])  # fmt: skip
def test_a_damaged_or_foreign_circuit_file_is_refused_by_name(tmp_path, damage):
    path = tmp_path / "circuit.json"
    random_scores(Graph(2, 3, True)).top_n(20).save(path)
    text = path.read_text(encoding="utf-8")
    assert damage(text) != text
    path.write_text(damage(text), encoding="latin-1")
    assert str(path) in refused("must be a circuit file that eapcore wrote, but", Circuit.load, path)


# The score file


@pytest.fixture(scope="module")
def scored():
    model = random_model(n_layers=1, n_heads=2, d_model=8, d_head=4, d_mlp=8)
    return model, attribute(model, random_pairs(model, [4, 6, 5], seed=7))


def test_scores_come_back_from_their_file_bit_by_bit(tmp_path, scored):
    for dtype in (torch.float64, torch.float32):
        scores = dataclasses.replace(scored[1], scores=scored[1].scores.to(dtype))
        scores.scores[0, 0], scores.scores[0, 1] = -0.0, 5e-324 if dtype == torch.float64 else 1e-45
        scores.save(tmp_path / "scores.safetensors")
        again = EdgeScores.load(tmp_path / "scores.safetensors")
        assert again.scores.dtype == dtype
        assert torch.equal(again.scores.view(torch.uint8), scores.scores.view(torch.uint8))
        assert (again.graph, again.meta) == (scores.graph, scores.meta)


def test_the_header_says_what_made_the_scores(tmp_path, scored):
    model, scores = scored
    scores.save(tmp_path / "scores.safetensors")
    with safe_open(tmp_path / "scores.safetensors", "pt") as file:
        assert sorted(file.keys()) == ["mask", "scores"]
        assert torch.equal(file.get_tensor("mask"), model.graph.edge_mask())
        header = json.loads(file.metadata()["eapcore"])
    assert header["format_version"] == FORMAT_VERSION == 1
    assert header["graph"] == {"n_layers": 1, "n_heads": 2, "has_mlp": True}
    assert header["sign"] == SIGN and "negative = needed" in SIGN and "higher = better" in SIGN
    assert header["model"] == {"name": "random", "content_hash": model.content_hash}
    assert header["task"] == {"name": "random", "n_pairs": 3, "seed": 7}
    assert header["metric"]["name"] == "logit_diff"
    assert header["method"]["name"] == "eap"
    assert header["dtype"] == "float64"
    assert header["versions"]["torch"] == torch.__version__
    assert set(header["versions"]) == {"eapcore", "torch", "python"}


def test_scores_of_another_model_are_refused(tmp_path, scored):
    model, scores = scored
    path = tmp_path / "scores.safetensors"
    scores.save(path)
    assert EdgeScores.load(path, content_hash=model.content_hash).meta == scores.meta
    other = random_model(n_layers=1, n_heads=2, d_model=8, d_head=4, d_mlp=8, seed=5).content_hash
    with pytest.raises(ValueError, match="holds scores of 'random'") as error:
        EdgeScores.load(path, content_hash=other)
    assert all(part in str(error.value) for part in (str(path), model.content_hash, other))


def rewrite(path, tensors=None, **changes):
    """The score file again with other tensors or header entries; None removes one."""
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["eapcore"])
    header = {k: v for k, v in {**header, **changes}.items() if v is not None}
    save_file(load_file(path) if tensors is None else tensors, path, metadata={"eapcore": json.dumps(header)})


@pytest.mark.parametrize("tensors", [None, {"something": torch.zeros(2)}], ids=["same tensors", "other tensors"])
def test_a_score_file_of_a_newer_format_says_so(tmp_path, scored, tensors):
    path = tmp_path / "scores.safetensors"
    scored[1].save(path)
    rewrite(path, tensors, format_version=FORMAT_VERSION + 1, graph={"nodes": 5})
    assert str(path) in refused(NEWER, EdgeScores.load, path)


DAMAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "cut in the header": lambda path: path.write_bytes(path.read_bytes()[:40]),
    "cut in the tensors": lambda path: path.write_bytes(path.read_bytes()[:-8]),
    "text": lambda path: path.write_text("edge,score\nembed->logits,1.0\n"),
    "pointer": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"),
    "other safetensors": lambda path: save_file({"scores": torch.zeros(2)}, path),
    "no version": lambda path: rewrite(path, format_version=None),
    "no graph": lambda path: rewrite(path, graph=None),
    "another graph's fields": lambda path: rewrite(path, graph={"layers": 1}),
    "a graph of words": lambda path: rewrite(path, graph={"n_layers": "a", "n_heads": "b", "has_mlp": "c"}),
    "another graph": lambda path: rewrite(path, graph={"n_layers": 2, "n_heads": 2, "has_mlp": True}),
    "no mask": lambda path: rewrite(path, {"scores": load_file(path)["scores"]}),
    "scores of another shape": lambda path: rewrite(path, {**load_file(path), "scores": torch.zeros(3, 3)}),
    "a header that is a list": lambda path: save_file(load_file(path), path, metadata={"eapcore": "[1]"}),
    "a model that is a word": lambda path: rewrite(path, model="gpt2"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_or_foreign_score_file_is_refused_by_name(tmp_path, scored, damage):
    path = tmp_path / "scores.safetensors"
    scored[1].save(path)
    damage(path)
    assert str(path) in refused(
        "must be a score file that eapcore wrote, but it cannot be read: ", EdgeScores.load, path, content_hash="0123"
    )


@pytest.mark.parametrize("load", [EdgeScores.load, Circuit.load])
def test_a_file_that_is_not_there_is_named(tmp_path, load):
    with pytest.raises(FileNotFoundError) as error:
        load(tmp_path / "nothing")
    assert str(tmp_path / "nothing") in str(error.value)


def test_scores_of_a_wrong_shape_are_refused():
    refused(r"scores must be \[S, R\] = \[4, 8\], got \[3, 10\]", EdgeScores, torch.zeros(3, 10), Graph(1, 2, True))


# Writing


def test_files_are_written_beside_and_renamed(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with replacing(path) as temporary:
        assert temporary.is_relative_to(tmp_path) and temporary != path
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("failure", [OSError("disk full"), KeyboardInterrupt(), ValueError("a bug")])
@pytest.mark.parametrize("kind", ["scores", "circuit"])
def test_a_failure_in_the_middle_of_writing_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, kind, failure):
    scores = random_scores(Graph(1, 1, True))
    written, path = (scores if kind == "scores" else scores.top_n(1)), tmp_path / "file"
    written.save(path)
    before = path.read_bytes()

    def broken(temporary, *args, **kwargs):
        temporary.write_bytes(b"half")
        raise failure

    monkeypatch.setattr("safetensors.torch.save_file", lambda tensors, temporary, **kwargs: broken(temporary))
    monkeypatch.setattr(files.Path, "write_text", broken)
    with pytest.raises(type(failure)):
        written.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_circuit_that_cannot_be_written_as_json_leaves_the_old_file(tmp_path):
    class Nameless:
        def __str__(self):
            raise TypeError

    circuit = random_scores(Graph(1, 1, True)).top_n(1)
    circuit.save(tmp_path / "circuit.json")
    before = (tmp_path / "circuit.json").read_bytes()
    with pytest.raises(TypeError):
        dataclasses.replace(circuit, meta={"a": Nameless()}).save(tmp_path / "circuit.json")
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [before]


@pytest.mark.parametrize("what", ["scores", "circuit"])
@pytest.mark.parametrize("place", ["no-such-folder/out", "a-file/out", "a-folder"])
def test_a_place_that_cannot_be_written_to_is_named(tmp_path, what, place):
    (tmp_path / "a-file").write_text("in the way")
    (tmp_path / "a-folder").mkdir()
    scores, path = random_scores(Graph(1, 1, True)), tmp_path / place
    save = (scores if what == "scores" else scores.top_n(1)).save
    assert str(path) in refused(r"cannot be written: .*; choose another place", save, path, error=OSError)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a-file", "a-folder"]


def test_a_link_is_written_through_and_what_is_no_file_is_left_alone(tmp_path):
    scores = random_scores(Graph(1, 1, True))
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    scores.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and torch.equal(EdgeScores.load(tmp_path / "target").scores, scores.scores)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError, match="fifo cannot be written: it is no regular file; choose another place"):
        scores.save(tmp_path / "fifo")
    assert (tmp_path / "fifo").is_fifo()


@pytest.mark.parametrize("name", ["x" * 255, "ä" * 127, "a b'c\".json"])
def test_every_legal_name_can_be_written(tmp_path, name):
    circuit = random_scores(Graph(1, 1, True)).top_n(1)
    circuit.save(tmp_path / name)
    assert torch.equal(Circuit.load(tmp_path / name).mask, circuit.mask)


def test_meta_that_is_no_text_survives_in_a_circuits_file(tmp_path):
    graph = Graph(1, 1, True)
    circuit = Circuit(graph.edge_mask(), graph, {"folder": "caf\udce9", "sign": "Σ λ"})
    circuit.save(tmp_path / "circuit.json")
    assert dict(Circuit.load(tmp_path / "circuit.json").meta) == circuit.meta
    assert "Σ λ" in (tmp_path / "circuit.json").read_text("utf-8")


def test_a_circuit_with_places_that_are_no_edges_is_not_written(tmp_path):
    graph = Graph(1, 1, True)
    with pytest.raises(ValueError, match=r"a circuit has edges of Graph\(.*\), but \d+ places of its mask are none"):
        Circuit(torch.ones_like(graph.edge_mask()), graph).save(tmp_path / "circuit.json")
    assert not list(tmp_path.iterdir())


def test_scores_that_are_a_view_of_their_parts_are_written(tmp_path):
    graph = Graph(1, 1, True)
    parts = torch.randn(3, graph.n_senders, graph.n_receivers) * graph.edge_mask()
    EdgeScores(parts[0], graph, {}, per_pair=parts).save(tmp_path / "scores")
    loaded = EdgeScores.load(tmp_path / "scores")
    assert torch.equal(loaded.scores, parts[0]) and torch.equal(loaded.per_pair, parts)


def test_scores_that_are_nan_are_not_ranked():
    scores = random_scores(Graph(1, 1, True))
    scores.scores[0, 0] = float("nan")
    for rank in (scores.top, scores.top_n, scores.greedy):
        refused(r"edges are ranked by their scores, but 1 of .* scores are NaN", rank, 2)
    nodes = NodeScores(torch.tensor([1.0, float("nan"), 2.0]), scores.graph)
    refused("nodes are ranked by their scores, but 1 of 3 scores are NaN", nodes.top, 1)


def test_a_written_file_can_be_read_by_those_who_may(tmp_path):
    random_scores(Graph(1, 1, True)).save(tmp_path / "scores")
    (tmp_path / "plain").touch()
    assert (tmp_path / "scores").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_what_json_cannot_say_is_null(tmp_path):
    graph = GRAPHS[0]
    meta = {"threshold": float("inf"), "values": [0.5, float("nan")], "nested": {"a": (float("-inf"), 1)}}
    Circuit(graph.edge_mask(), graph, meta).save(tmp_path / "circuit.json")
    text = (tmp_path / "circuit.json").read_text()
    read = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert read["meta"] == {"threshold": None, "values": [0.5, None], "nested": {"a": [None, 1]}}
    EdgeScores(torch.zeros(graph.n_senders, graph.n_receivers), graph, meta).save(tmp_path / "scores.safetensors")
    with safe_open(tmp_path / "scores.safetensors", "pt") as file:
        json.loads(file.metadata()["eapcore"], parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
