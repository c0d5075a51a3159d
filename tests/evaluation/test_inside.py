"""Edges inside components: scores and effects against literal computations, and how a published circuit counts them."""

from __future__ import annotations

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch
from models import gpt2, random_case, random_model, random_pairs, random_scores
from refusal import refused

from eapcore.attribution.attribute import attribute
from eapcore.evaluation.evaluate import evaluate
from eapcore.evaluation.inside import inside_effects, inside_scores, summed_inside
from eapcore.evaluation.roc import area, roc
from eapcore.execution.experiment import Experiment
from eapcore.graph.correlation import ranks
from eapcore.graph.scores import EdgeScores
from eapcore.models.load import load
from eapcore.patching.edges import patch_edges
from eapcore.tasks import TASKS
from eapcore.tasks.truth import truth

TRUTHS = {name: task.truth() for name, task in TASKS.items() if task.truth is not None}


def logit_diff(logits, pairs, i):
    return logits[pairs.answers[i]].mean() - logits[pairs.wrong[i]].mean()


def test_projections_score_as_autograd_says_of_another_library_s_model():
    """transformers keeps q, k and v as one tensor: its gradient and what the corrupt prompt makes of it."""
    theirs = gpt2(n_layer=2).double()
    model = load(theirs)
    pairs = random_pairs(model, [6, 4, 6], first_difference=1)
    expected = torch.zeros(model.graph.n_receivers, dtype=torch.float64)
    with torch.enable_grad():
        for i, length in enumerate(pairs.lengths.tolist()):
            kept: list[torch.Tensor] = []
            keep = partial(lambda kept, _module, _inputs, out: kept.append(out), kept)
            hooks = [block.attn.c_attn.register_forward_hook(keep) for block in theirs.transformer.h]
            logits = theirs(pairs.clean[i : i + 1, :length]).logits[0, pairs.positions[i]]
            grads = torch.autograd.grad(logit_diff(logits, pairs, i), kept)
            theirs(pairs.corrupt[i : i + 1, :length])
            for hook in hooks:
                hook.remove()
            for layer, grad in enumerate(grads):
                moved = (kept[len(grads) + layer] - kept[layer]) * grad  # [1, T, 3·H·K]
                expected[model.graph.qkv(layer)] += moved[0].unflatten(-1, (9, 8)).sum((0, 2)).detach() / len(pairs)
    for size in ("auto", 1):
        found = inside_scores(Experiment.of(model, pairs), batch_size=size)
        torch.testing.assert_close(found.inputs, expected, rtol=0, atol=1e-12)
    nodes = attribute(model, pairs, level="node").scores
    torch.testing.assert_close(found.sent, nodes, rtol=0, atol=1e-12)
    # What edges alone say: of senders all, of projections all but the norm's bend.
    summed = summed_inside(attribute(model, pairs))
    torch.testing.assert_close(summed.sent, nodes, rtol=0, atol=1e-12)
    assert not torch.allclose(summed.inputs, expected, atol=1e-3)


@pytest.mark.parametrize("options", [{"normalization": None, "scale": 0.2}, {"d_mlp": None, "n_layers": 3}])
def test_effects_inside_are_those_of_all_edges_together_and_scores_their_slope(options):
    model, pairs = random_case([5, 3], **options)
    experiment = Experiment.of(model, pairs)
    exact, first = inside_effects(experiment), inside_scores(experiment)
    if model.config.normalization is None:  # nothing bends before the projections
        torch.testing.assert_close(summed_inside(attribute(model, pairs)).inputs, first.inputs, rtol=0, atol=1e-12)
    # What is one edge's score by definition has its bits.
    patched, graph = patch_edges(model, pairs), model.graph
    tied = exact.tied(patched, exact=True)
    torch.testing.assert_close((tied.inputs, tied.sent), (exact.inputs, exact.sent), rtol=0, atol=1e-12)
    last, lone = graph.n_senders - 1, graph.receiver("a0.h1<v>")
    assert tied.sent[last] == patched.scores[last].sum() and tied.inputs[lone] == patched.scores[0, lone]
    assert first.tied(patched).inputs[lone] == first.inputs[lone] and tied.sent[0] == exact.sent[0]
    # Towards the clean prompts' embedding effects and first order agree: 1 % of the way of a random corruption.
    near = dataclasses.replace(model, weights=dataclasses.replace(model.weights, w_e=model.weights.w_e.clone()))
    tokens = pairs.clean.unique()
    middle = model.weights.w_e[tokens].mean(0)
    near.weights.w_e[:] = middle + 1e-4 * (near.weights.w_e - middle)
    experiment = Experiment.of(near, pairs)
    exact, first = inside_effects(experiment), inside_scores(experiment)
    for name in ("inputs", "sent"):
        a, b = getattr(exact, name), getattr(first, name)
        assert float(b.abs().max()) > 1e-7 and torch.allclose(a, b, rtol=0, atol=0.02 * float(b.abs().max())), name


def test_a_published_circuit_counts_its_edges_inside_components():
    for name, n_edges, n_true in (("ioi", 33367, 1131), ("greater-than", 33367, 289), ("docstring", None, 37)):
        known = TRUTHS[name]
        graph = known.circuit.graph
        scores = random_scores(graph, seed=3)
        values, true = summed_inside(scores).against(known)
        assert len(values) == 6 * graph.n_layers * graph.n_heads + graph.n_layers * graph.has_mlp
        for ranking in ("absolute", "signed"):
            found = roc(scores, known.circuit, ranking=ranking, others=(values, true))
            assert found.edge_set["n_true"] == n_true == known.n_published
            assert n_edges in (None, found.edge_set["n_edges"])
            ours = scores.scores[scores.mask].double()
            both = torch.cat([ours, values])
            inside = torch.cat([known.circuit.mask[scores.mask], true])
            rank = ranks(both.abs() if ranking == "absolute" else -both) + 1  # a head's three edges on are tied
            n, m = int(inside.sum()), int((~inside).sum())
            assert found.auc == pytest.approx(float(rank[inside].sum() - n * (n + 1) / 2) / (n * m), abs=1e-9)
    refused("the published circuit is one of", summed_inside(random_scores(random_model().graph)).against, known)


def test_a_curve_at_some_thresholds_is_that_of_the_edges_above_each():
    known = TRUTHS["docstring"].circuit
    scores = random_scores(known.graph, ties=True)
    whole = roc(scores, known)
    found = whole.at([0.0, 1.0, 2.0, 2.5, 9.0])
    mask, size = scores.mask, scores.scores.abs()
    points = [(0.0, 0.0)]
    for threshold in (2.5, 2.0, 1.0, 0.0):
        kept = (size >= threshold) & mask
        points.append([float((kept & side).sum() / side.sum()) for side in (mask & ~known.mask, known.mask)])
    assert np.allclose(list(zip(found.fpr, found.tpr, strict=True)), points)
    assert found.auc == area(found.fpr, found.tpr) and whole.by("upper").auc == area(whole.fpr, whole.tpr, "upper")


def test_evaluate_judges_by_both_edge_sets_of_a_published_circuit():
    model, pairs = random_case([5, 3], n_heads=2)
    graph = model.graph
    known = truth("random", graph, "some", {}, [("embed", "a1.h0<q>"), ("m0", "logits")], ["a1.h0<q>"], ["m0"])
    scores = attribute(model, pairs)
    judged = evaluate(model, pairs, "logit_diff", scores, truths=[known])
    ours, theirs = judged.rocs
    assert ours.edge_set == {"name": "all edges", "n_edges": graph.n_edges, "n_true": 2}
    assert theirs.edge_set["n_edges"] == graph.n_edges + 6 * 4 + 2 and theirs.edge_set["n_true"] == 4
    inside = inside_scores(Experiment.of(model, pairs))
    assert theirs.auc == roc(scores, known.circuit, others=inside.tied(scores).against(known)).auc
    zero = evaluate(
        model, pairs, "logit_diff", attribute(model, pairs, ablation="zero"), truths=[known], ablation="zero"
    )
    assert len(zero.rocs) == 1
    refused("edges inside components need the corrupt prompts' run, but the ablation is zero", inside_scores,
        Experiment.of(model, pairs, ablation="zero"))  # fmt: skip
    sizes = EdgeScores(scores.scores.abs(), graph, {"sign": "size; it has no sign"})
    assert roc(sizes, known.circuit, ranking="signed", others=inside.tied(sizes).against(known)).auc == pytest.approx(
        theirs.auc
    )
