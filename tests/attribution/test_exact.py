"""The scores are exact: against a literal oracle, other people's code, and exact patching where that is linear."""

from __future__ import annotations

import dataclasses

import oracle
import pytest
import torch
from models import random_case, random_model, random_pairs, with_weights

from eapcore.attribution.attribute import attribute
from eapcore.graph.circuit import Circuit
from eapcore.patching.circuits import metric_on
from eapcore.tasks.metrics import METRICS

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
def test_scores_equal_a_literal_per_edge_autograd_oracle(options):
    model, pairs = random_case(LENGTHS, **options)
    expected = oracle.eap(model, pairs)
    scores = attribute(model, pairs, "logit_diff").scores
    error = float((scores - expected).abs().max())
    print(f"largest difference to per-edge autograd: {error:.1e}")
    assert expected.abs().max() > 1e-2
    assert error <= 1e-12


@pytest.mark.parametrize("metric", ["logit_diff", "prob_diff", "logit_margin", "nll"])
def test_every_metric_scores_as_the_oracle_does(metric):
    model, pairs = random_case(LENGTHS, seed=3)
    expected = oracle.eap(model, pairs, METRICS[metric])
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(attribute(model, pairs, metric).scores, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scaled", [False, True])
def test_attention_scales_of_the_config_are_used(scaled):
    model = random_model(n_layers=3)
    config = dataclasses.replace(model.config, scale_attn_by_inverse_layer_idx=scaled, attn_scale=1.7)
    model = with_weights(model, {}, config)
    pairs = random_pairs(model, LENGTHS)
    expected = oracle.eap(model, pairs)
    torch.testing.assert_close(attribute(model, pairs).scores, expected, rtol=0, atol=1e-12)


def test_non_edges_are_exactly_zero_and_edges_are_not():
    model = random_model()
    scores = attribute(model, random_pairs(model, LENGTHS))
    assert bool((scores.scores[~scores.mask] == 0).all())
    assert bool((scores.scores[scores.mask] != 0).all())


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, "auto"])
def test_scores_do_not_depend_on_the_batch_size(batch_size):
    model, pairs = random_case([7, 4, 9, 1, 6, 5, 8])
    whole = attribute(model, pairs, batch_size=7).scores
    torch.testing.assert_close(attribute(model, pairs, batch_size=batch_size).scores, whole, rtol=0, atol=1e-14)


def test_a_pair_scores_the_same_alone_and_beside_longer_ones():
    model, pairs = random_case(LENGTHS)
    alone = sum(attribute(model, pairs.select(torch.tensor([i]))).scores for i in range(len(pairs))) / len(pairs)
    torch.testing.assert_close(attribute(model, pairs).scores, alone, rtol=0, atol=1e-14)


def test_an_answer_position_before_the_last_token_is_read_there():
    model, pairs = random_case([8, 8])
    earlier = dataclasses.replace(pairs, positions=torch.tensor([3, 5]))
    expected = oracle.eap(model, earlier, METRICS["logit_diff"])
    torch.testing.assert_close(attribute(model, earlier).scores, expected, rtol=0, atol=1e-12)


def test_scores_equal_exact_patching_where_the_model_is_linear():
    model = random_model(n_layers=3, n_heads=2, d_mlp=None, normalization=None)
    values = torch.tensor([0.0, 1.0], dtype=torch.float64).repeat_interleave(torch.tensor([4, 2]))[:, None, None]
    # A pattern without q and k: logits are linear in every edge.
    model = with_weights(model, {name: w * values for name, w in model.weights.named() if ".w_qkv" in name})
    pairs = random_pairs(model, [5, 7, 6])
    scores = attribute(model, pairs)
    edges = model.graph.edge_mask().nonzero()
    masks = model.graph.edge_mask().repeat(1 + len(edges), 1, 1)
    masks[range(1, 1 + len(edges)), edges[:, 0], edges[:, 1]] = False
    before, *after = metric_on(model, pairs, "logit_diff", [Circuit(mask, model.graph) for mask in masks])
    effects = torch.tensor(after, dtype=torch.float64) - before
    torch.testing.assert_close(effects, scores.scores[edges[:, 0], edges[:, 1]], rtol=0, atol=1e-12)
    assert int((effects.abs() > 1e-6).sum()) > 20


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05), (torch.float16, 0.01)], ids=str
)
def test_scores_are_as_close_to_float64s_as_the_dtype_allows(dtype, bound):
    pairs = random_pairs(random_model(seed=2), LENGTHS)
    expected = attribute(random_model(seed=2), pairs).scores
    scores = attribute(random_model(seed=2, dtype=dtype), pairs).scores
    assert scores.dtype == torch.float32
    assert float((scores - expected).norm() / expected.norm()) <= bound
