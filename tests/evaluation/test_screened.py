"""A budget of exact patching: what it may cost, what it patches, and that more of it is no worse."""

from __future__ import annotations

import statistics
from itertools import pairwise

import pytest
import torch
from models import random_model, random_pairs
from refusal import refused
from torch.utils.flop_counter import FlopCounterMode

import eapcore
from eapcore.attribution.attribute import attribute as first_order
from eapcore.evaluation.agreement import agreement
from eapcore.evaluation.screened import Operations, attribute, screened
from eapcore.patching.edges import patch_edges

MODELS = {"gpt2": {}, "attention-only": {"d_mlp": None, "n_layers": 3}, "one layer": {"n_layers": 1}}


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_a_budget_is_spent_on_exact_effects_and_never_passed(options):
    model = random_model(**options)
    pairs = random_pairs(model, [6, 3, 8], first_difference=2)
    patched = patch_edges(model, pairs)
    near = {"rtol": 0, "atol": 1e-12}
    for budget in (1, 1.2):
        torch.testing.assert_close(
            screened(model, pairs, budget=budget).scores, first_order(model, pairs).scores, **near
        )
    counts = [0]
    for budget in (1.6, 2.5, 4.0, 1e6):
        found = screened(model, pairs, budget=budget)
        method, exact = found.meta["method"], found.exact
        assert method["name"] == "screened" and method["budget"] == budget and method["spent"] <= budget
        torch.testing.assert_close(found.scores[exact], patched.scores[exact], **near)
        points = [tuple(point) for point in method.get("points", [(1.0, 1.0)])]
        estimated = first_order(model, pairs, points=points).scores
        torch.testing.assert_close(found.scores[~exact], estimated[~exact], **near)
        counts.append(int(exact.sum()))
        if options == {} and method.get("n_patched"):
            assert bool(exact[model.graph.edge("embed->m0")])
    assert counts == sorted(counts) and counts[-1] == model.graph.n_edges
    assert counts[1] > 0 and torch.equal(found.scores, patched.scores)


@pytest.mark.parametrize("name", ["toy-ioi", "toy-induction"])
def test_more_of_a_budget_is_no_worse_in_the_mean_and_three_are_nearly_exact(name):
    model, worst = eapcore.load(name), 1.0
    curves = []
    for seed in range(2):
        pairs = eapcore.tasks.find_pairs(name, n=8, seed=seed)
        exact = patch_edges(model, pairs)
        curves.append([agreement(screened(model, pairs, budget=b), exact).r2 for b in (1, 1.5, 2.5, 3, 5)])
        worst = min(worst, curves[-1][3])
    means = [statistics.fmean(column) for column in zip(*curves, strict=True)]
    assert all(more >= less - 0.003 for less, more in pairwise(means))
    assert means[0] < 0.9 and worst > 0.985


def test_operations_are_those_that_are_done():
    sizes = {"n_layers": 4, "n_heads": 4, "d_model": 64, "d_head": 16, "d_mlp": 256, "dtype": torch.float32}
    model = random_model(**sizes, scale=0.1)
    pairs = random_pairs(model, [16] * 4)
    cost = Operations.of(model.config, 16, 3)

    def counted(run):
        with FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops() / (2 * len(pairs))

    eap = counted(lambda: first_order(model, pairs, impl="reference"))
    assert 0.95 < cost.eap / eap < 1.05
    for edge in ("embed->a0.h1<q>", "embed->m1", "a0.h1->a2.h0<v>", "m2->m3", "m0->a3.h1<k>", "m0->a3.h2<q>"):
        one, none = (counted(lambda e=e: patch_edges(model, pairs, edges=e)) for e in ([edge], ["embed->logits"]))
        assert 0.9 < float(cost.edge[model.graph.edge(edge)[1]]) / (one - none) < 1.1, edge
    assert 0.9 < cost.record / none < 1.1
    spent = counted(lambda: screened(model, pairs, budget=3, impl="reference"))
    assert 0.9 < spent / (3 * eap) < 1.05  # with one forward of clean and corrupt for both


def test_the_public_function_takes_the_method_and_its_budget():
    model = random_model()
    pairs = random_pairs(model, [6, 5])
    seen = []
    found = eapcore.attribute(model, pairs, method="screened", budget=2.5, progress=lambda *x: seen.append(x))
    assert torch.equal(found.scores, screened(model, pairs, budget=2.5).scores)
    assert seen[-1][0] == seen[-1][1] == 2 * (1 + found.meta["method"]["n_patched"])
    assert eapcore.attribute is attribute and attribute.__doc__ == first_order.__doc__
    for how, message in [
        ({"method": "screened", "budget": 0.5}, "a number of at least 1, the cost of one gradient, got 0.5"),
        ({"method": "screened", "budget": "much"}, "got 'much'"),
        ({"method": "screened", "reduce": "pair"}, "takes a budget, but no reduce, got 'pair'"),
        ({"method": "screened", "level": "node"}, "no level, got 'node'"),
        ({"method": "screened", "gradient_at": 0.5}, "no gradient_at, got 0.5"),
        ({"budget": 3.0}, "a budget belongs to the method 'screened', got 3.0 with 'eap'"),
    ]:
        refused(message, eapcore.attribute, model, pairs, **how)
