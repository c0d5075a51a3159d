"""ACDC decides as a literal search does that takes one edge at a time."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from models import random_case, random_model, random_pairs
from refusal import refused

from eapcore.attribution.attribute import attribute
from eapcore.graph.circuit import Circuit
from eapcore.patching.circuits import metric_on
from eapcore.search.acdc import acdc, prune_sweep
from eapcore.tasks.metrics import METRICS

MODELS = {
    "gpt2": {"n_heads": 2, "d_model": 12},
    "attention-only": {"n_layers": 2, "n_heads": 2, "d_mlp": None},
    "one layer": {"n_layers": 1, "n_heads": 2},
}
LENGTHS = [4, 3]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


class Literal:
    """The value of a mask, one prompt at a time, one forward for each."""

    def __init__(self, model, pairs, metric):
        self.pairs = [oracle.Pair(model, pairs, i, METRICS[metric]) for i in range(len(pairs))]
        self.forwards = 0

    def value(self, mask):
        self.forwards += 1
        total = 0.0
        for pair in self.pairs:

            def read(r, senders, bias, corrupt=pair.corrupt.senders):
                return bias + sum(a if mask[s, r] else corrupt[s] for s, a in enumerate(senders))

            total += float(pair.value(oracle.run(pair.model, pair.tokens, read))) / len(self.pairs)
        return total


def literal_acdc(model, pairs, metric, threshold, start=None, order=lambda senders, r: senders[::-1]):
    """Algorithm 1, one edge at a time: the mask, and how many forwards it took."""
    literal = Literal(model, pairs, metric)
    mask = (model.graph.edge_mask() if start is None else start.mask).clone()
    now = literal.value(mask)
    for r in reversed(range(model.graph.n_receivers)):
        for s in order(mask[:, r].nonzero().squeeze(1).tolist(), r):
            mask[s, r] = False
            after = literal.value(mask)
            if now - after < threshold:
                now = after
            else:
                mask[s, r] = True
    return mask, literal.forwards


@pytest.mark.parametrize(("options", "threshold", "metric"), [
    *((name, threshold, "kl") for name in MODELS for threshold in (0.003, 0.1)),
    ("gpt2", 0.1, "logit_diff"),
    ("attention-only", 0.5, "logit_diff"),
])  # fmt: skip
def test_decisions_are_those_of_a_search_that_takes_one_edge_at_a_time(options, threshold, metric):
    model, pairs = random_case(LENGTHS, first_difference=1, **MODELS[options])
    expected, forwards = literal_acdc(model, pairs, metric, threshold)
    found = acdc(model, pairs, metric, threshold=threshold, batch_size=1)
    assert torch.equal(found.mask, expected)
    counts = found.meta["forwards"]
    assert counts["launches"] <= counts["evaluated"] and counts["decided"] <= forwards - 1
    assert metric_on(model, pairs, metric, [found])[0] == pytest.approx(found.meta["metric"]["circuit"], abs=1e-10)


def test_the_searches_above_remove_some_edges_and_keep_some():
    model, pairs = random_case(LENGTHS, first_difference=1, **MODELS["gpt2"])
    sizes = [acdc(model, pairs, threshold=t).n_edges for t in (0.003, 0.1)]
    assert model.graph.n_edges > sizes[0] > sizes[1] > 0


@pytest.mark.parametrize("order", ["earliest", "scores"])
def test_the_stated_order_of_senders_is_kept(order):
    model, pairs = random_case(LENGTHS, **MODELS["gpt2"])
    scores = attribute(model, pairs)

    def literal_order(senders, r):
        return senders if order == "earliest" else sorted(senders, key=lambda s: float(scores.scores[s, r].abs()))

    expected, _ = literal_acdc(model, pairs, "kl", 0.1, order=literal_order)
    found = acdc(model, pairs, threshold=0.1, order=scores if order == "scores" else order)
    assert torch.equal(found.mask, expected)
    assert found.meta["method"]["order"] == order


def test_a_start_is_pruned_as_the_search_would_from_there():
    model, pairs = random_case(LENGTHS, **MODELS["gpt2"])
    scores = attribute(model, pairs)
    start = scores.top_n(model.graph.n_edges // 2)
    expected, _ = literal_acdc(model, pairs, "kl", 0.05, start)
    found = acdc(model, pairs, threshold=0.05, start=start)
    assert torch.equal(found.mask, expected)
    assert not bool((found.mask & ~start.mask).any())
    assert found.meta["method"]["start"]["n_edges"] == start.n_edges
    assert found.meta["method"]["start"]["selection"] == "top_n"


def test_a_sweep_prunes_every_size_with_every_threshold():
    model, pairs = random_case(LENGTHS, **MODELS["one layer"])
    scores = attribute(model, pairs)
    found = prune_sweep(model, pairs, scores, [5, 9], [0.01, 1.0])
    each = [acdc(model, pairs, threshold=t, start=scores.top_n(n)) for n in (5, 9) for t in (0.01, 1.0)]
    assert [c.edges for c in found] == [c.edges for c in each]
    assert [c.meta["method"]["threshold"] for c in found] == [0.01, 1.0, 0.01, 1.0]


def test_a_sweep_prunes_the_edges_above_each_score_threshold():
    model, pairs = random_case(LENGTHS, **MODELS["one layer"])
    scores, calls = attribute(model, pairs), []
    cuts = [abs(scores.top(n)[-1][1]) for n in (4, 9)]
    found = prune_sweep(
        model, pairs, scores, None, [0.01, 1.0], score_thresholds=cuts, progress=lambda *call: calls.append(call)
    )
    each = [acdc(model, pairs, threshold=t, start=scores.threshold(cut)) for cut in cuts for t in (0.01, 1.0)]
    assert [c.edges for c in found] == [c.edges for c in each]
    starts = [c.meta["method"]["start"] for c in found]
    assert [(s["selection"], s["threshold"], s["n_edges"]) for s in starts[::2]] == [
        ("threshold", cuts[0], 4), ("threshold", cuts[1], 9)
    ]  # fmt: skip
    done, total = zip(*calls, strict=True)
    assert set(total) == {2 * (4 + 9)} and list(done) == sorted(set(done)) and done[-1] == total[0]
    for sizes, thresholds in ((None, None), ([5], [0.1])):
        with pytest.raises(ValueError, match="given by sizes or by score_thresholds: one of the two"):
            prune_sweep(model, pairs, scores, sizes, [0.01], score_thresholds=thresholds)


@pytest.mark.parametrize("ablation", ["zero"])
def test_removed_edges_carry_the_ablation_that_was_asked_for(ablation):
    model, pairs = random_case(LENGTHS, **MODELS["gpt2"])
    found = acdc(model, pairs, threshold=0.3, ablation=ablation)
    (value,) = metric_on(model, pairs, "kl", [found], ablation=ablation)
    assert 0 < found.n_edges < model.graph.n_edges
    assert value == pytest.approx(found.meta["metric"]["circuit"], abs=1e-10)


def test_batched_candidates_need_fewer_launches_than_edges_decided():
    model = random_model(n_layers=2, n_heads=3)
    found = acdc(model, random_pairs(model, LENGTHS), threshold=1.0)
    counts = found.meta["forwards"]
    assert counts["launches"] < counts["decided"] / 2


def test_a_circuit_remembers_how_it_was_found(tmp_path):
    model = random_model(**MODELS["one layer"])
    found = acdc(model, random_pairs(model, LENGTHS), threshold=0.1)
    found.save(tmp_path / "circuit.json")
    loaded = Circuit.load(tmp_path / "circuit.json")
    assert torch.equal(loaded.mask, found.mask)
    assert loaded.meta["method"]["name"] == "acdc" and loaded.meta["metric"]["name"] == "kl"


@pytest.mark.parametrize(("options", "message"), [
    ({"threshold": 0}, "threshold must be positive and finite, got 0"),
    ({"threshold": "0.1"}, "threshold must be positive and finite, got '0.1'"),
    ({"threshold": float("nan")}, "threshold must be positive and finite, got nan"),
    ({"threshold": math.inf}, "threshold must be positive and finite, got inf"),
    ({"threshold": 0.1, "order": "random"}, "order must be latest, earliest or edge scores, got 'random'"),
    ({"threshold": 0.1, "metric": "accuracy"}, "metric must be one of"),
])  # fmt: skip
def test_bad_input_is_refused_in_one_sentence(options, message):
    model = random_model()
    refused(message, acdc, model, random_pairs(model, LENGTHS), **options)


def test_a_start_of_another_graph_is_refused():
    model, other = random_model(), random_model(n_layers=1)
    start = Circuit(other.graph.edge_mask(), other.graph)
    refused("start must be a circuit of", acdc, model, random_pairs(model, LENGTHS), threshold=0.1, start=start)
    everywhere = Circuit(torch.ones_like(model.graph.edge_mask()), model.graph)
    with pytest.raises(ValueError, match=r"start must be edges of .*, but some places of its mask are none"):
        acdc(model, random_pairs(model, LENGTHS), threshold=0.1, start=everywhere)
