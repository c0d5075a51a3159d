"""First-order methods beyond EAP, scores by pair and position, and the factored way: each as its definition says."""

from __future__ import annotations

import logging
import math

import numpy as np
import oracle
import pytest
import torch
from models import random_model, random_pairs

import eapcore.attribution.dense as window
from eapcore.attribution.attribute import attribute
from eapcore.attribution.methods import Options, gradient_points, recipe
from eapcore.graph.scores import EdgeScores
from eapcore.tasks.metrics import METRICS, MetricBatch

LENGTHS = [7, 4, 9, 6]
MODELS = {"gpt2": {}, "attention-only": {"d_mlp": None, "split_qkv": True}}


def oracle_at(model, pairs, metric, points):
    """EAP scores with gradients at interpolated embeddings, an edge at a time."""
    graph = model.graph
    scores = torch.zeros(graph.n_senders, graph.n_receivers, dtype=torch.float64)
    for i in range(len(pairs)):
        clean, corrupt, position, answers, wrong = oracle.pair_at(pairs, i)
        ends = {a: oracle.run(model, t) for a, t in ((1.0, clean), (0.0, corrupt))}
        logits = {a: run[2][position][None].detach() for a, run in ends.items()}
        batch = MetricBatch(answers, wrong, logits[1.0], logits[0.0], torch.tensor([i]))
        for alpha, weight in points:
            mixed = alpha * ends[1.0][0][0] + (1 - alpha) * ends[0.0][0][0]
            _, receivers, out = oracle.run(model, clean, start=mixed)
            grads = torch.autograd.grad(metric(out[position][None], batch).sum(), receivers, allow_unused=True)
            for r in range(graph.n_receivers):
                for s in range(graph.senders_before(r)):
                    if grads[r] is not None:
                        delta = ends[0.0][0][s] - ends[1.0][0][s]
                        scores[s, r] += weight * (delta * grads[r]).sum().detach() / len(pairs)
    return scores


def points_of(model, method, **options):
    return [(step.alpha, step.weight) for step in recipe(method, model.graph, Options(**options)).passes]


@pytest.mark.parametrize("storage", ["dense", "factored"])
@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize(
    "method",
    [
        {"method": "eap", "gradient_at": "corrupt"},
        {"method": "clean-corrupt"},
        {"method": "eap-ig", "steps": 3, "points": "left"},
        {"method": "eap-ig", "steps": 2, "points": "right"},
        {"method": "eap-ig", "steps": 2, "points": "midpoint"},
        {"method": "eap-ig", "steps": 2, "points": "gauss"},
        {"method": "eap-ig", "points": [(0.75, 1.0)]},
    ],
    ids=lambda m: " ".join(str(v) for v in m.values()),
)
def test_each_method_equals_a_literal_oracle(method, options, storage):
    model = random_model(**options)
    pairs = random_pairs(model, LENGTHS, first_difference=2)
    expected = oracle_at(model, pairs, METRICS["logit_diff"], points_of(model, **method))
    assert expected.abs().max() > 1e-3
    scores = attribute(model, pairs, **method, storage=storage, batch_size=3)
    torch.testing.assert_close(scores.scores, expected, rtol=0, atol=1e-12)
    assert scores.meta["method"]["name"] == method["method"]


def test_kl_has_scores_away_from_the_clean_run():
    model = random_model()
    pairs = random_pairs(model, LENGTHS)
    points = gradient_points(2, "midpoint")
    expected = oracle_at(model, pairs, METRICS["kl"], points)
    scores = attribute(model, pairs, "kl", method="eap-ig", steps=2, points="midpoint").scores
    assert expected.abs().max() > 1e-4
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-12)


def test_the_points_of_each_rule_are_as_stated():
    assert gradient_points(4, "left") == [(k / 4, 0.25) for k in range(4)]
    assert gradient_points(4, "right") == [(k / 4, 0.25) for k in range(1, 5)]
    assert gradient_points(2, "midpoint") == [(0.25, 0.5), (0.75, 0.5)]
    nodes, weights = zip(*gradient_points(3, "gauss"), strict=True)
    for power in range(6):  # three Gauss nodes integrate every polynomial of degree 5 exactly
        assert np.dot(weights, np.power(nodes, power)) == pytest.approx(1 / (power + 1), abs=1e-14)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"method": "ig"}, "eap, eap-ig, clean-corrupt, .* got 'ig'"),
        ({"gradient_at": "middle"}, "clean, corrupt, got 'middle'"),
        ({"method": "eap-ig", "steps": 0}, "positive integer, got 0"),
        ({"method": "eap-ig", "points": "simpson"}, "left, right, midpoint, gauss, got 'simpson'"),
        ({"method": "eap-ig", "points": [(0.5, 0.7)]}, "weights that sum to 1"),
        *(
            ({"method": "eap-ig", "points": points}, "left, right, midpoint, gauss or a list of .* that sum to 1, got")
            for points in ([], (), [0.5], 5, [("a", 1)], [(math.nan, 1.0)], [(0.5, math.nan)], [(math.inf, 1.0)])
        ),
        ({"method": "eap-ig", "points": ""}, "left, right, midpoint, gauss, got ''"),
        ({"method": "eap-ig", "points": 5, "steps": 3}, "a list of .* that sum to 1, got 5"),
        ({"gradient_at": ""}, "clean, corrupt, got ''"),
        ({"method": "relp", "rules": "relp"}, "rules must be a Rules, .* got 'relp'"),
        ({"method": "relp", "rules": {"norm": "frozen"}}, "rules must be a Rules, .* got {'norm': 'frozen'}"),
        ({"storage": "sparse"}, "auto, dense, factored, got 'sparse'"),
        ({"reduce": "head"}, "all, pair, position, got 'head'"),
    ],
)
def test_an_unknown_option_lists_the_valid_ones(bad, message):
    model = random_model()
    with pytest.raises(ValueError, match=message):
        attribute(model, random_pairs(model, [4]), **bad)


@pytest.mark.parametrize("options", [*MODELS.values(), {"n_layers": 1}, {"normalization": None, "scale": 0.2}])
@pytest.mark.parametrize("first", [0, 3])
def test_the_factored_way_gives_the_scores_of_the_dense_one(options, first):
    model = random_model(**options)
    pairs = random_pairs(model, LENGTHS, first_difference=first)
    dense = attribute(model, pairs, storage="dense")
    factored = attribute(model, pairs, storage="factored", batch_size=3)
    assert (dense.meta["storage"], factored.meta["storage"]) == ("dense", "factored")
    assert dense.scores.abs().max() > 1e-3
    torch.testing.assert_close(factored.scores, dense.scores, rtol=0, atol=1e-12)
    assert bool((factored.scores[~factored.mask] == 0).all())


@pytest.mark.parametrize("storage", ["dense", "factored"])
@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_scores_by_pair_are_those_of_each_pair_alone(storage, batch_size):
    model = random_model()
    pairs = random_pairs(model, LENGTHS, first_difference=2)
    scores = attribute(model, pairs, reduce="pair", storage=storage, batch_size=batch_size)
    for i in range(len(pairs)):
        alone = attribute(model, pairs.select(torch.tensor([i]))).scores
        torch.testing.assert_close(scores.per_pair[i], alone, rtol=0, atol=1e-12)
    torch.testing.assert_close(scores.scores, attribute(model, pairs).scores, rtol=0, atol=1e-12)


@pytest.mark.parametrize("storage", ["dense", "factored"])
@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_scores_by_position_add_up_and_sit_where_they_belong(storage, batch_size):
    model = random_model()
    pairs = random_pairs(model, LENGTHS, first_difference=2)
    scores = attribute(model, pairs, reduce="position", storage=storage, batch_size=batch_size)
    torch.testing.assert_close(scores.per_position.sum(0), attribute(model, pairs).scores, rtol=0, atol=1e-12)
    assert scores.per_position.shape[0] == max(LENGTHS)
    assert bool((scores.per_position[:2] == 0).all())
    # What the logits read is read at the answers alone, the last tokens here.
    at_logits = scores.per_position[:, :, model.graph.logits].abs().sum(1)
    assert [t for t in range(max(LENGTHS)) if at_logits[t] > 0] == sorted(length - 1 for length in LENGTHS)


def test_parts_survive_a_file(tmp_path):
    model = random_model()
    scores = attribute(model, random_pairs(model, LENGTHS), reduce="pair")
    scores.save(tmp_path / "scores.safetensors")
    loaded = EdgeScores.load(tmp_path / "scores.safetensors")
    assert torch.equal(loaded.per_pair, scores.per_pair)
    assert loaded.per_position is None


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("a batch that is too large"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("could not create a primitive"),  # oneDNN's
        MemoryError("std::bad_alloc"),  # of the C++ ops
    ],
    ids=["torch", "torch on a CPU", "oneDNN", "C++"],
)
def test_out_of_memory_halves_the_batch_says_so_and_loses_nothing(monkeypatch, caplog, error):
    model = random_model()
    pairs = random_pairs(model, [6] * 7)
    expected = attribute(model, pairs).scores
    real = window.backward
    sizes = []

    def fails_above_two(model, saved, grad, sink, **options):
        sizes.append(len(grad))
        real(model, saved, grad, sink, **options)
        if len(grad) > 2:
            raise error

    monkeypatch.setattr(window, "backward", fails_above_two)
    with caplog.at_level(logging.WARNING, logger="eapcore"):
        scores = attribute(model, pairs, batch_size=7)
    assert sizes == [7, 3, 1, 1, 1, 1, 1, 1, 1]
    assert [record.message for record in caplog.records] == [
        "out of memory with 7 pairs in a batch: going on with 3",
        "out of memory with 3 pairs in a batch: going on with 1",
    ]
    torch.testing.assert_close(scores.scores, expected, rtol=0, atol=1e-14)
