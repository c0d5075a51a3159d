"""A stratified sample of edges, patched exactly, says how far the scores of all are right."""

from __future__ import annotations

import json
import statistics

import pytest
import torch
from models import random_model, random_pairs, random_scores
from refusal import refused

import eapcore
from eapcore.attribution.attribute import attribute
from eapcore.evaluation.agreement import agreement
from eapcore.evaluation.sampled import draw_sample, sample_cost, verify_sample
from eapcore.patching.edges import patch_edges


def test_a_sample_stands_for_all_edges_once():
    graph = eapcore.Graph(4, 5, has_mlp=True)
    scores = random_scores(graph)
    for n in (14, 37, 100, graph.n_edges // 2, graph.n_edges):
        flat, strata, weights = draw_sample(scores, n, seed=3)
        assert len(flat.unique()) == n and bool(graph.edge_mask().flatten()[flat].all())
        assert float(weights.sum()) == pytest.approx(graph.n_edges, rel=1e-14) and bool((weights >= 1).all())
        # of a stratum that is not patched as a whole two draws say how its edges vary
        assert all(len(part) > 1 or float(part) == 1 for part in (weights[strata == k] for k in range(7)) if len(part))
        top = {graph.edge_name(*divmod(i, graph.n_receivers)) for i in flat[strata == 0].tolist()}
        assert top == {edge for edge, _ in scores.top(len(top))} and len(top) >= min(n // 4, n - 12)
    assert not torch.equal(draw_sample(scores, 50, 0)[0], draw_sample(scores, 50, 1)[0])
    refused("a sample must have between 14 and the .* edges of this graph, got 3", draw_sample, scores, 3)


def test_its_estimates_lie_around_those_of_all_edges_and_its_intervals_hold_them(tmp_path):
    model = eapcore.load("toy-ioi")
    pairs = eapcore.tasks.find_pairs("toy-ioi", n=4, seed=0)
    scores = attribute(model, pairs, gradient_at=0.75)
    whole = agreement(scores, patch_edges(model, pairs))
    found = [verify_sample(model, pairs, "logit_diff", scores, 60, seed=seed) for seed in range(8)]
    assert statistics.fmean(x.r2 for x in found) == pytest.approx(whole.r2, abs=0.03)
    assert statistics.fmean(x.slope for x in found) == pytest.approx(whole.slope, abs=0.05)
    assert sum(x.r2_interval[0] - 1e-9 <= whole.r2 <= x.r2_interval[1] + 1e-9 for x in found) >= 7
    assert all(x.slope_interval[0] <= x.slope <= x.slope_interval[1] for x in found)
    everything = verify_sample(model, pairs, "logit_diff", scores, model.graph.n_edges)
    assert everything.r2 == pytest.approx(whole.r2) and everything.slope == pytest.approx(whole.slope)
    assert everything.r2_interval == pytest.approx((whole.r2, whole.r2))
    assert sample_cost(model, pairs, "logit_diff", scores, 60, 3) == pytest.approx(found[3].cost)
    found[0].save(tmp_path / "sample.json")
    assert json.loads((tmp_path / "sample.json").read_text())["r2"] == found[0].r2


def test_scores_of_something_else_are_refused():
    model = random_model()
    pairs = random_pairs(model, [5, 6])
    scores = attribute(model, pairs)
    refused("estimate the metric logit_diff, but nll", verify_sample, model, pairs, "nll", scores, 20)
