"""Importance scores for pruning are the published definition, and an edge goes with the first of its ends."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from models import KINDS, random_model, random_pairs, with_weights
from refusal import refused

from eapcore.attribution.attribute import attribute
from eapcore.graph.scores import NO_SIGN, EdgeScores, NodeScores
from eapcore.models.backward_rules import Rules

LENGTHS = [6, 3, 8]


def published(model, each, normalised):
    """Importances by name: of heads and MLPs as Michel et al., of q, k, v and MLPs as Conmy et al.; each: of a pair."""
    found = {name: float(sum(one[name] for one in each)) / len(each) for name in each[0]}
    kinds = [
        {n: x for n, x in found.items() if "<" not in n},
        {n: x for n, x in found.items() if "." not in n or "<" in n},
    ]
    if normalised:
        for kind in kinds:
            layers = {}
            for name, value in kind.items():
                layers.setdefault(name.strip("am").split(".")[0], []).append(value)
            norms = {layer: math.sqrt(sum(x * x for x in values)) for layer, values in layers.items()}
            kind.update({name: value / norms[name.strip("am").split(".")[0]] for name, value in kind.items()})
    return kinds


def by_taking_away(model, nodes):
    """Each edge's score: the importance of the node with which it goes, nodes being taken away one after another."""
    graph, left = model.graph, {name: x for name, x in nodes.items() if name != "embed"}
    scores = torch.full((graph.n_senders, graph.n_receivers), max(left.values()), dtype=torch.float64)
    scores[~graph.edge_mask()] = 0
    gone, there = set(), graph.edge_mask().clone()
    for name in sorted(left, key=left.get):
        gone.add(name)
        heads = [s for s in graph.sender_names if s[0] == "a" and {f"{s}<{part}>" for part in "qkv"} <= gone]
        for s, sender in enumerate(graph.sender_names):
            for r, receiver in enumerate(graph.receiver_names):
                if there[s, r] and (receiver in gone or sender in gone or sender in heads):
                    scores[s, r], there[s, r] = left[name], False
    return scores


def near(found, expected):
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_importances_are_the_published_ones_and_edges_go_with_their_ends(options):
    model = random_model(**options)
    pairs = random_pairs(model, LENGTHS, first_difference=2)
    for zero in (False, True):
        each = [oracle.importances(oracle.Pair(model, pairs, i), zero) for i in range(len(pairs))]
        for method in ("hisp", "hisp-raw"):
            how = {"method": method, "ablation": "zero" if zero else "corrupt", "batch_size": 2}
            senders, ends = published(model, each, method == "hisp")
            nodes = attribute(model, pairs, level="node", **how)
            near(nodes.scores, torch.tensor([senders[name] for name in model.graph.sender_names], dtype=torch.float64))
            edges = attribute(model, pairs, **how)
            near(edges.scores, by_taking_away(model, ends))
            assert NO_SIGN in edges.meta["sign"] and NO_SIGN in nodes.meta["sign"]


def test_each_pairs_part_has_the_scores_as_its_mean(tmp_path):
    model = random_model()
    pairs = random_pairs(model, LENGTHS)
    for level, kind in (("edge", EdgeScores), ("node", NodeScores)):
        found = attribute(model, pairs, method="hisp", level=level, reduce="pair", batch_size=2)
        parts = found.per_pair if level == "edge" else found.per_pair["scores"]
        near(parts.mean(0), found.scores)
        near(found.scores, attribute(model, pairs, method="hisp", level=level).scores)
        found.save(tmp_path / "scores.safetensors")
        assert torch.equal(kind.load(tmp_path / "scores.safetensors").scores, found.scores)
    apart = attribute(model, pairs, method="hisp-raw", level="node", points=[(1.0, 0.5), (0.0, 0.5)], reduce="pair")
    plain = attribute(model, pairs, level="node", points=[(1.0, 0.5), (0.0, 0.5)], reduce="pair")
    near(apart.per_pair["scores"], plain.per_pair["scores"].abs())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_narrow_dtypes_come_near(dtype):
    narrow = random_model(scale=0.2, dtype=dtype)
    pairs = random_pairs(narrow, LENGTHS, first_difference=2)
    for level in ("edge", "node"):
        exact = attribute(with_weights(narrow, torch.Tensor.double), pairs, method="hisp", level=level).scores
        found = attribute(narrow, pairs, method="hisp", level=level).scores
        limit = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]
        assert float((found.double() - exact).norm() / exact.norm()) <= limit


def test_what_does_not_go_together():
    model = random_model()
    pairs = random_pairs(model, LENGTHS)
    for how, message in [
        ({"reduce": "position"}, "no sum over positions"),
        ({"level": "neuron"}, "level must be 'edge' or 'node'"),
        ({"qk": "exact"}, "qk must be 'gradient' and exact 'none'"),
        ({"exact": "logits"}, "qk must be 'gradient' and exact 'none'"),
        ({"ablation": "mean"}, "ablation must be 'corrupt' or 'zero', got 'mean'"),
        ({"rules": Rules(cut=frozenset({"a0"}))}, "rules.cut must be empty"),
        ({"storage": "dense"}, "storage must be 'auto' or 'factored'"),
        ({"reduce": "pair", "pairs_to": "x"}, "there can be no pairs_to"),
    ]:
        refused(message, attribute, model, pairs, method="hisp", **how)
    assert attribute(model, pairs, method="hisp", level="node", ablation="mean").scores.shape == (9,)
