"""A budget of exact patching: what it may cost, what it patches, and that more of it is no worse."""

from __future__ import annotations

import json
import statistics
from itertools import pairwise

import pytest
import torch
from models import random_model, random_pairs
from refusal import refused
from torch.utils.flop_counter import FlopCounterMode

import eapcore
import eapcore.evaluation.screened as screening
from eapcore.attribution.attribute import attribute as first_order
from eapcore.evaluation.agreement import agreement
from eapcore.evaluation.screened import Operations, attribute, screened
from eapcore.patching.edges import patch_edges
from eapcore.tasks.stream import PairStream

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


def test_operations_are_those_that_are_done_however_they_are_done(monkeypatch, tmp_path):
    sizes = {"n_layers": 4, "n_heads": 4, "d_model": 64, "d_head": 16, "d_mlp": 256, "dtype": torch.float32}
    model = random_model(**sizes, scale=0.1)
    pairs = random_pairs(model, [16] * 4)
    cost = Operations.of(model.config, 16, 3)

    def counted(run):
        with FlopCounterMode(display=False) as counter:
            run()
        found = counter.get_flop_counts()["Global"]
        # Fused attention is counted by newer releases of torch alone, and as if it were not causal.
        return sum(n for op, n in found.items() if "scaled_dot_product" not in str(op)) / (2 * len(pairs))

    eap = counted(lambda: first_order(model, pairs, impl="reference"))
    assert 0.95 < cost.eap / eap < 1.05
    for edge in ("embed->a0.h1<q>", "embed->m1", "a0.h1->a2.h0<v>", "m2->m3", "m0->a3.h1<k>", "m0->a3.h2<q>"):
        one, none = (counted(lambda e=e: patch_edges(model, pairs, edges=e)) for e in ([edge], ["embed->logits"]))
        assert 0.9 < float(cost.edge[model.graph.edge(edge)[1]]) / (one - none) < 1.1, edge
    assert 0.9 < cost.record / none < 1.1
    patched = {}
    cases = [
        ("alone", 1 << 40, {}),
        ("with a folder", 1 << 40, {"resume": tmp_path / "kept"}),
        ("little memory", 1, {}),
    ]
    for case, free, how in cases:
        monkeypatch.setattr(screening, "free_bytes", lambda device, free=free: free)
        found = []
        spent = counted(lambda: found.append(screened(model, pairs, budget=3, impl="reference", **how)))  # noqa: B023
        patched[case], method = found[0].exact, found[0].meta["method"]
        assert 2.5 < method["spent"] <= 3, case
        assert 0.9 < spent / (method["spent"] * eap) < 1.05, case  # with one forward of both prompts, or with two
    monkeypatch.undo()
    alone = screened(model, pairs, budget=3, impl="reference").exact
    assert torch.equal(alone, patched["with a folder"]) and not torch.equal(alone, patched["little memory"])


@pytest.mark.parametrize(("free", "later"), [(1 << 40, 1 << 40), (1 << 40, 1), (1, 1 << 40)])
def test_an_interrupted_run_goes_on_to_the_bits_of_an_undisturbed_one(free, later, limited, monkeypatch, tmp_path):
    limited(batch_tokens=20)  # batches of two or three, of patching of all
    monkeypatch.setattr(screening, "free_bytes", lambda device: free)
    model = random_model()
    pairs = random_pairs(model, [6, 3, 8, 5, 7, 4, 8, 3, 5, 6, 7, 5], first_difference=2)
    calls = []
    whole = screened(model, pairs, budget=3.5, progress=lambda *done: calls.append(done))
    assert whole.meta["method"]["n_patched"] > 4 and not whole.exact.equal(model.graph.edge_mask())
    for stop in (3, len(calls) - 9):  # in first order, and while edges are patched
        left = [stop]

        def interrupt(*done, left=left):
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt

        how = {"budget": 3.5, "resume": tmp_path / str(stop)}
        with pytest.raises(KeyboardInterrupt):
            screened(model, pairs, progress=interrupt, **how)
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr(screening, "free_bytes", lambda device: later)
            found = screened(model, pairs, **how)
        assert torch.equal(found.scores, whole.scores) and torch.equal(found.exact, whole.exact), stop
        assert found.meta["method"] == whole.meta["method"]


def test_the_public_function_takes_the_method_and_its_budget(tmp_path):
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
    stream = tmp_path / "pairs.jsonl"
    stream.write_text(json.dumps({"clean": [1, 2], "corrupt": [1, 3], "answer": [4], "wrong": [5]}))
    for method in ("screened", "flow-routes"):
        refused(f"{method} needs all pairs at once", eapcore.attribute, model, PairStream(stream), method=method)
