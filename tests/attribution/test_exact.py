"""The scores are exact: against a literal oracle, other people's code, and exact patching where that is linear."""

from __future__ import annotations

import dataclasses

import oracle
import pytest
import torch
from models import random_model, random_pairs

from eapcore.attribution.attribute import attribute
from eapcore.graph.circuit import Circuit
from eapcore.models.activations import NormInput
from eapcore.models.norm import norm_grad, normalise
from eapcore.patching.circuits import run_circuit
from eapcore.tasks.metrics import METRICS, MetricBatch

MODELS = {
    "gpt2": {},
    "one layer, one head": {"n_layers": 1, "n_heads": 1},
    "three layers, four heads, relu": {"n_layers": 3, "n_heads": 4, "d_model": 32, "act_fn": "relu"},
    "d_head not d_model / n_heads, gelu": {"n_heads": 5, "d_head": 3, "d_model": 16, "act_fn": "gelu"},
    "attention-only": {"d_mlp": None, "n_layers": 3},
    "attention-only, q k v apart": {"d_mlp": None, "split_qkv": True},
    "no LayerNorm": {"normalization": None, "scale": 0.2},
    "q k v apart": {"split_qkv": True},
}
LENGTHS = [7, 4, 9, 1, 6]


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_scores_equal_a_literal_per_edge_autograd_oracle(options, record_property):
    model = random_model(**options)
    pairs = random_pairs(model, LENGTHS)
    expected = oracle.eap(model, pairs, METRICS["logit_diff"])
    scores = attribute(model, pairs, "logit_diff").scores
    error = float((scores - expected).abs().max())
    record_property("largest difference", error)
    print(f"largest difference to per-edge autograd: {error:.1e}")
    assert expected.abs().max() > 1e-2
    assert error <= 1e-12


@pytest.mark.parametrize("metric", ["logit_diff", "prob_diff", "logit_margin", "nll"])
def test_every_metric_scores_as_the_oracle_does(metric):
    model = random_model(seed=3)
    pairs = random_pairs(model, LENGTHS)
    expected = oracle.eap(model, pairs, METRICS[metric])
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(attribute(model, pairs, metric).scores, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scaled", [False, True])
def test_attention_scales_of_the_config_are_used(scaled):
    model = random_model(n_layers=3)
    config = dataclasses.replace(model.config, scale_attn_by_inverse_layer_idx=scaled, attn_scale=1.7)
    model = dataclasses.replace(model, config=config)
    pairs = random_pairs(model, LENGTHS)
    expected = oracle.eap(model, pairs, METRICS["logit_diff"])
    torch.testing.assert_close(attribute(model, pairs).scores, expected, rtol=0, atol=1e-12)


def test_non_edges_are_exactly_zero_and_edges_are_not():
    model = random_model()
    scores = attribute(model, random_pairs(model, LENGTHS))
    assert bool((scores.scores[~scores.mask] == 0).all())
    assert bool((scores.scores[scores.mask] != 0).all())


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, "auto"])
def test_scores_do_not_depend_on_the_batch_size(batch_size):
    model = random_model()
    pairs = random_pairs(model, [7, 4, 9, 1, 6, 5, 8])
    whole = attribute(model, pairs, batch_size=7).scores
    torch.testing.assert_close(attribute(model, pairs, batch_size=batch_size).scores, whole, rtol=0, atol=1e-14)


def test_a_pair_scores_the_same_alone_and_beside_longer_ones():
    model = random_model()
    pairs = random_pairs(model, LENGTHS)
    alone = sum(attribute(model, pairs.select(torch.tensor([i]))).scores for i in range(len(pairs))) / len(pairs)
    torch.testing.assert_close(attribute(model, pairs).scores, alone, rtol=0, atol=1e-14)


def test_an_answer_position_before_the_last_token_is_read_there():
    model = random_model()
    pairs = random_pairs(model, [8, 8])
    earlier = dataclasses.replace(pairs, positions=torch.tensor([3, 5]))
    expected = oracle.eap(model, earlier, METRICS["logit_diff"])
    torch.testing.assert_close(attribute(model, earlier).scores, expected, rtol=0, atol=1e-12)


def linear_model(**options):
    """A model whose logits are linear in every edge: no LayerNorm, no MLP, and an attention pattern without q and k."""
    model = random_model(n_layers=3, d_mlp=None, normalization=None, **options)
    layers = []
    for layer in model.weights.layers:
        (w,) = layer.w_qkv
        w = w.clone()
        w[: 2 * model.config.n_heads] = 0
        layers.append(dataclasses.replace(layer, w_qkv=(w,)))
    return dataclasses.replace(model, weights=dataclasses.replace(model.weights, layers=tuple(layers)))


def test_scores_equal_exact_patching_where_the_model_is_linear():
    model = linear_model(n_heads=2)
    pairs = random_pairs(model, [5, 7, 6])
    scores = attribute(model, pairs)
    full = Circuit(model.graph.edge_mask(), model.graph)
    clean = run_circuit(model, pairs, full)
    batch = MetricBatch(pairs.answers, pairs.wrong, clean, clean, torch.arange(3))
    before = METRICS["logit_diff"](clean, batch).mean()
    nonzero = 0
    for s, r in model.graph.edge_mask().nonzero().tolist():
        mask = model.graph.edge_mask()
        mask[s, r] = False
        after = METRICS["logit_diff"](run_circuit(model, pairs, Circuit(mask, model.graph)), batch).mean()
        assert abs(float(after - before - scores.scores[s, r])) <= 1e-12
        nonzero += abs(float(after - before)) > 1e-6
    assert nonzero > 20


@pytest.mark.parametrize("options", [{}, {"d_mlp": None, "split_qkv": True}, {"normalization": None, "scale": 0.2}])
def test_run_circuit_equals_a_literal_oracle(options):
    model = random_model(**options)
    pairs = random_pairs(model, LENGTHS)
    generator = torch.Generator().manual_seed(5)
    mask = model.graph.edge_mask() & (torch.rand(model.graph.edge_mask().shape, generator=generator) < 0.5)
    expected = oracle.circuit_logits(model, pairs, mask)
    torch.testing.assert_close(run_circuit(model, pairs, Circuit(mask, model.graph)), expected, rtol=0, atol=1e-10)


def test_the_full_circuit_is_the_clean_run_and_the_empty_one_the_corrupt_run():
    model = random_model()
    pairs = random_pairs(model, LENGTHS)
    full = Circuit(model.graph.edge_mask(), model.graph)
    empty = Circuit(torch.zeros_like(full.mask), model.graph)
    for circuit, prompts in ((full, pairs.clean), (empty, pairs.corrupt)):
        for i in range(len(pairs)):
            tokens = prompts[i, : int(pairs.lengths[i])]
            expected = oracle.run(model, tokens)[2][int(pairs.positions[i])].detach()
            torch.testing.assert_close(run_circuit(model, pairs, circuit)[i], expected, rtol=0, atol=1e-10)


def test_float32_scores_agree_with_float64():
    double = random_model(seed=2)
    single = random_model(seed=2, dtype=torch.float32)
    pairs = random_pairs(double, LENGTHS)
    expected = attribute(double, pairs).scores
    scores = attribute(single, pairs).scores
    assert scores.dtype == torch.float32
    assert float((scores - expected).norm() / expected.norm()) <= 1e-5


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_half_precision_scores_are_as_close_as_the_dtype_allows(dtype, bound):
    pairs = random_pairs(random_model(seed=2), LENGTHS)
    expected = attribute(random_model(seed=2), pairs).scores
    scores = attribute(random_model(seed=2, dtype=dtype), pairs).scores
    assert scores.dtype == torch.float32
    assert float((scores - expected).norm() / expected.norm()) <= bound


def test_a_normalisations_gradient_is_right_for_statistics_that_are_a_slice():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 8, generator=generator, dtype=torch.float64)
    ln = (torch.randn(8, generator=generator, dtype=torch.float64), torch.zeros(8, dtype=torch.float64))
    grad = torch.randn(3, 2, 8, generator=generator, dtype=torch.float64)
    whole = normalise(x, ln, 1e-5)[1]
    sliced = NormInput(whole.x[:, 1:3], whole.mean[:, 1:3], whole.rstd[:, 1:3])
    leaf = x[:, 1:3].clone().requires_grad_()
    (expected,) = torch.autograd.grad((oracle.layer_norm(leaf, ln, 1e-5) * grad).sum(), leaf)
    torch.testing.assert_close(norm_grad(grad, ln, sliced), expected, rtol=0, atol=1e-12)
