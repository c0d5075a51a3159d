"""Each first-order method equals its literal definition, in both families of models, whatever the prompts' lengths."""

from __future__ import annotations

import dataclasses
import json
import logging
import math

import numpy as np
import oracle
import pytest
import torch
from everything import PRUNING
from memory import peak_bytes
from models import random_case, random_model, random_pairs, with_weights
from oracle import mean_of
from refusal import refused
from safetensors import safe_open

import eapcore.attribution.dense as dense
import eapcore.attribution.exact_patterns as exact_patterns
import eapcore.attribution.score_batch as scoring
import eapcore.evaluation.precision as precision
from eapcore.attribution.attribute import attribute
from eapcore.attribution.methods import METHODS as NAMES
from eapcore.attribution.methods import Options, gradient_points, recipe
from eapcore.evaluation.precision import rounding_error
from eapcore.graph.scores import EdgeScores, NodeScores
from eapcore.models.backward_rules import Rules
from eapcore.models.load import load
from eapcore.patching.edges import patch_edges
from eapcore.tasks import TASKS
from eapcore.tasks.metrics import METRICS

MODELS = {
    "gpt2": {},
    "attention-only, q k v apart": {"d_mlp": None, "split_qkv": True, "n_layers": 3},
    "gelu": {"act_fn": "gelu", "n_heads": 2},
    "relu, no LayerNorm": {"act_fn": "relu", "normalization": None, "scale": 0.2},
}
models = pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
families = pytest.mark.parametrize("options", list(MODELS.values())[:2], ids=list(MODELS)[:2])
STORAGES = ("dense", "factored")
storages = pytest.mark.parametrize("storage", STORAGES)
RELP = {"norms": "frozen", "activation": "identity", "attention": "frozen"}
LENGTHS = [6, 3, 8]


def case(options, *, first=1, lengths=LENGTHS):
    model = random_model(**options)
    return model, random_pairs(model, lengths, first_difference=first)


def assert_equal(scores, expected, *, largest=1e-3):
    assert expected.abs().max() > largest
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-12)


# Methods


@families
@pytest.mark.parametrize("method", [
    {"method": "eap", "gradient_at": "corrupt"},
    {"method": "clean-corrupt"},
    {"method": "eap-ig", "steps": 3, "points": "left"},
    *({"method": "eap-ig", "steps": 2, "points": points} for points in ("right", "midpoint", "gauss")),
    {"method": "eap-ig", "points": [(0.75, 1.0)]},
], ids=lambda m: " ".join(str(v) for v in m.values()))  # fmt: skip
def test_gradients_at_interpolated_inputs_equal_a_literal_oracle(method, options):
    model, pairs = case(options, first=2)
    passes = recipe(method["method"], model.graph, Options(**{k: v for k, v in method.items() if k != "method"})).passes
    expected = oracle.eap(model, pairs, points=[(step.alpha, step.weight) for step in passes])
    for storage in STORAGES:
        scores = attribute(model, pairs, **method, storage=storage, batch_size=2)
        assert_equal(scores.scores, expected)
        assert scores.meta["method"]["name"] == method["method"]


def test_kl_has_scores_away_from_the_clean_run():
    model, pairs = case({}, first=2)
    expected = oracle.eap(model, pairs, METRICS["kl"], gradient_points(2, "midpoint"))
    scores = attribute(model, pairs, "kl", method="eap-ig", steps=2, points="midpoint").scores
    assert_equal(scores, expected, largest=1e-4)


def test_the_points_of_each_rule_are_as_stated():
    assert gradient_points(4, "left") == [(k / 4, 0.25) for k in range(4)]
    assert gradient_points(4, "right") == [(k / 4, 0.25) for k in range(1, 5)]
    assert gradient_points(2, "midpoint") == [(0.25, 0.5), (0.75, 0.5)]
    nodes, weights = zip(*gradient_points(3, "gauss"), strict=True)
    for power in range(6):  # three Gauss nodes integrate every polynomial of degree 5 exactly
        assert np.dot(weights, np.power(nodes, power)) == pytest.approx(1 / (power + 1), abs=1e-14)


@models
@pytest.mark.parametrize("points", [{"points": "left", "steps": 2}, {"points": [(0.3, 0.4), (0.9, 0.6)]}, {"steps": 1}])
def test_eap_ig_activations_interpolates_one_component_at_a_time(options, points):
    model, pairs = case(options)
    at = {"left": [(0.0, 0.5), (0.5, 0.5)], None: [(1.0, 1.0)]}
    rule = points.get("points")
    at = rule if isinstance(rule, list) else at[rule]

    def score(pair):
        deltas = pair.deltas()
        steps = oracle.interpolated(pair, deltas, at)
        return sum(weight * oracle.one_pass(pair, deltas, **how) for _, weight, how in steps)

    expected = mean_of(model, pairs, score)
    for storage in STORAGES:
        scores = attribute(model, pairs, method="eap-ig-activations", **points, storage=storage, batch_size=2)
        assert_equal(scores.scores, expected)


@models
@pytest.mark.parametrize("rules", ["relp", "frozen norm", "identity", "gradient through attention", "gim", "flat"])
def test_relp_goes_back_by_the_rules(options, rules):
    model, pairs = case(options)
    how, ours = {
        "relp": (RELP, None),
        "frozen norm": ({"norms": "frozen"}, Rules(norm="frozen")),
        "identity": ({"activation": "identity"}, Rules(activation="identity")),
        "gradient through attention": (RELP | {"attention": ""}, Rules("frozen", "identity")),
        "gim": ({"norms": "frozen", "temperature": 2.0, "products": True}, NAMES["gim"].rules),
        "flat": ({"activation": "identity", "temperature": 0.7}, Rules(activation="identity", temperature=0.7)),
    }[rules]
    expected = mean_of(model, pairs, lambda pair: oracle.one_pass(pair, pair.deltas(), **how))
    for storage in STORAGES:
        scores = attribute(model, pairs, method="relp", rules=ours, storage=storage, batch_size=2)
        assert_equal(scores.scores, expected)
        queries_keys = [r for r, name in enumerate(model.graph.receiver_names) if name[-3:] in ("<q>", "<k>")]
        assert bool((scores.scores[:, queries_keys] == 0).all()) == (rules == "relp")


@models
@pytest.mark.parametrize("first", [0, 2])
def test_qk_fix_recomputes_the_softmax_for_every_edge_into_q_and_k(options, first, monkeypatch):
    model, pairs = case(options, first=first)
    expected = mean_of(model, pairs, lambda pair: oracle.exact_softmax(pair, pair.deltas()))
    pays, asked, by_position = exact_patterns.pays, [], []
    for wanted in (True, False):  # by windows of positions, and by the q and k that edges make

        def answer(*args, wanted=wanted):
            asked.append(pays(*args))
            return wanted and asked[-1]

        monkeypatch.setattr(exact_patterns, "pays", answer)
        scores = attribute(model, pairs, method="qk-fix", batch_size=2)
        assert_equal(scores.scores, expected)
        by_position.append(attribute(model, pairs, method="qk-fix", reduce="position").per_position)
    assert all(asked)
    assert_equal(*by_position)
    linear = attribute(model, pairs).scores
    different = (scores.scores - linear).abs() > 1e-6
    receivers = {name[-3:] for r, name in enumerate(model.graph.receiver_names) if different[:, r].any()}
    assert receivers == {"<q>", "<k>"}


@pytest.mark.parametrize("grouped", [True, False])
def test_windows_take_grouped_queries_and_short_sights(grouped, limited, monkeypatch):
    model = random_model(n_heads=4)
    config = dataclasses.replace(model.config, n_key_value_heads=2, kv_grouped=grouped, windows=(3, None))
    few = {name: x[:8] for name, x in model.weights.named() if name.endswith(("w_qkv.0", "b_qkv"))}
    model, found = with_weights(model, few, config), []
    pairs = random_pairs(model, [7, 4, 6], first_difference=2)
    for pays in (exact_patterns.pays, lambda part, kinds: False):
        monkeypatch.setattr(exact_patterns, "pays", pays)
        found.append(attribute(model, pairs, method="qk-fix", reduce="pair").per_pair)
    monkeypatch.undo()
    limited(exact_numbers=300)  # few senders of a pair at a time
    found.append(attribute(model, pairs, method="qk-fix", reduce="pair").per_pair)
    for other in found[1:]:
        assert_equal(found[0], other)


def test_half_precision_rounds_no_change_of_a_score():
    task, how = TASKS["toy-ioi"].generate(16, 0), {"method": "qk-fix", "ablation": "zero", "level": "node"}
    exact = attribute(load("toy-ioi", dtype="float64"), task, "logit_diff", **how).scores
    half = attribute(load("toy-ioi", dtype="bfloat16"), task, "logit_diff", **how).scores
    assert (half - exact).norm() < 8e-3 * exact.norm()  # 2e-2 with what is added to a score in bfloat16


@pytest.mark.parametrize("storage", ["dense", "factored"])
@pytest.mark.parametrize("ablation", ["zero", "corrupt"])
@pytest.mark.parametrize(
    ("layers", "options"), [(2, {"method": "qk-fix"}), (1, {"exact": "last"}), (1, {"method": "qk-fix"})]
)
def test_what_is_left_of_an_embedding_that_is_taken_away_is_not_its_rounding(layers, options, ablation, storage):
    model = random_model(layers, 3, 48, 16, 64, dtype=torch.bfloat16, scale=0.25, seed=3)
    pairs = random_pairs(model, [9, 7, 9], seed=3)
    of_float32 = with_weights(model, lambda x: x.float())
    half, exact = (
        attribute(m, pairs, ablation=ablation, storage=storage, **options).scores for m in (model, of_float32)
    )
    first = slice(0, 9)  # the first layer's q, k and v
    assert (half - exact)[0, first].norm() < 0.05 * exact[0, first].norm() > 0  # rounded with zeros 0.4 to 1


@models
def test_grad_drop_is_the_mean_of_absolute_scores_with_a_layer_dropped(options):
    model, pairs = case(options)
    expected = mean_of(model, pairs, lambda pair: oracle.dropped(pair, pair.deltas()))
    for storage in STORAGES:
        scores = attribute(model, pairs, method="grad-drop", storage=storage, batch_size=2)
        assert_equal(scores.scores, expected)
        assert bool((scores.scores >= 0).all())
        assert scores.meta["method"]["sign"].startswith("absolute")


@pytest.mark.parametrize("storage", ["dense", "factored"])
def test_products_of_weights_are_made_once_for_all_batches(monkeypatch, storage):
    model, made = random_model(n_layers=3, d_model=96), []
    pairs = random_pairs(model, [12] * 6)
    product, w_sends = exact_patterns.product, [a.w_send.flatten(0, 1).data_ptr() for a in model.attentions]

    def counted(a, b):
        made.append(a.data_ptr() in w_sends)
        return product(a, b)

    monkeypatch.setattr(exact_patterns, "product", counted)
    kept = attribute(model, pairs, method="qk-fix", batch_size=2, storage=storage)
    assert sum(made) == 2  # q and k of layer 1; those of the last are of few positions, or meet few
    model.attentions[0].w_o.mul_(2)  # a call begins with the weights as they are
    changed = attribute(model, pairs, method="qk-fix", batch_size=2, storage=storage)
    model.attentions[0].w_o.div_(2)
    made.clear()
    monkeypatch.setattr(exact_patterns, "_SHARE", 10**15)
    assert torch.equal(attribute(model, pairs, method="qk-fix", batch_size=2, storage=storage).scores, kept.scores)
    assert sum(made) == 6 and not torch.equal(changed.scores, kept.scores)


def test_atp_star_drops_layers_from_exact_patterns():
    model, pairs = case({})
    expected = mean_of(model, pairs, lambda pair: oracle.dropped(pair, pair.deltas(), oracle.exact_softmax))
    assert_equal(attribute(model, pairs, method="atp-star", batch_size=2).scores, expected)


# Ablations


def ablated_values(model, reference, kind):
    """(s, t) → what sender s sends at position t: zero, or a mean over prompts, each counted with its own length."""
    if kind == "zero":
        return lambda s, t: torch.zeros(model.config.d_model, dtype=torch.float64)
    means = oracle.ablated_means(model, reference, per_position=kind == "mean-positional")
    return lambda s, t: means[s] if kind == "mean" else means[s, t]


@pytest.mark.parametrize("own", [True, False], ids=["own prompts", "a reference"])
@pytest.mark.parametrize("kind", ["zero", "mean", "mean-positional"])
@families
def test_ablations_send_zero_or_a_mean_over_prompts(options, kind, own):
    model, pairs = case(options, first=2)
    other = random_pairs(model, [9, 5, 4, 8], seed=7)
    used = {} if own or kind == "zero" else {"reference": other}
    value = ablated_values(model, pairs if own else other, kind)
    expected = mean_of(model, pairs, lambda pair: oracle.one_pass(pair, pair.deltas(value)))
    for storage in STORAGES:
        scores = attribute(model, pairs, ablation=kind, **used, storage=storage, batch_size=2)
        assert_equal(scores.scores, expected)
        assert scores.meta["method"]["ablation"]["name"] == kind


@families
def test_every_method_that_takes_ablations_uses_them(options):
    model, pairs = case(options)
    value = ablated_values(model, pairs, "mean")

    def activations(pair, alpha):
        deltas = pair.deltas(value)
        steps = oracle.interpolated(pair, deltas, [(alpha, 1.0)])
        return sum(weight * oracle.one_pass(pair, deltas, **how) for _, weight, how in steps)

    definitions = {
        "relp": lambda pair: oracle.one_pass(pair, pair.deltas(value), **RELP),
        "qk-fix": lambda pair: oracle.exact_softmax(pair, pair.deltas(value)),
        "grad-drop": lambda pair: oracle.dropped(pair, pair.deltas(value)),
    }
    for method, definition in definitions.items():
        scores = attribute(model, pairs, method=method, ablation="mean").scores
        assert_equal(scores, mean_of(model, pairs, definition))
    for alpha in (0.0, 0.5, 1.0):
        scores = attribute(model, pairs, method="eap-ig-activations", ablation="mean", points=[(alpha, 1.0)]).scores
        assert_equal(scores, mean_of(model, pairs, lambda pair, alpha=alpha: activations(pair, alpha)))


# Levels


def node_definition(model, how):
    def score(pair):
        made = oracle.run(model, pair.tokens, **how)
        grads = pair.grads(made, made.senders)
        return torch.stack([(d * g).sum(0) for d, g in zip(pair.deltas(), grads, strict=True)])  # [S, D]

    return score


def unit_definition(model, how):
    def score(pair):
        made = oracle.run(model, pair.tokens, **how)
        grads = pair.grads(made, made.units)
        deltas = [(b - a).detach() for a, b in zip(pair.clean.units, pair.corrupt.units, strict=True)]
        return torch.stack([(d * g).sum(0) for d, g in zip(deltas, grads, strict=True)])  # [L, M]

    return score


@models
@pytest.mark.parametrize("method", ["eap", "relp"])
def test_node_scores_meet_the_gradient_behind_each_sender(options, method):
    model, pairs = case(options)
    expected = mean_of(model, pairs, node_definition(model, RELP if method == "relp" else {})).sum(1)
    scores = attribute(model, pairs, method=method, level="node", batch_size=2)
    assert isinstance(scores, NodeScores) and scores.units is None
    assert_equal(scores.scores, expected)
    # Everything a sender sends goes along its edges.
    edges = attribute(model, pairs, method=method).scores.sum(1)
    torch.testing.assert_close(scores.scores, edges, rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [
    {}, {"act_fn": "relu"}, {"n_layers": 1}, {"d_mlp": None},
], ids=["gpt2", "relu", "one layer", "attention-only"])  # fmt: skip
@pytest.mark.parametrize("method", ["eap", "relp"])
def test_neuron_scores_are_those_of_hidden_units_and_output_dimensions(options, method):
    model, pairs = case(options)
    how = RELP if method == "relp" else {}
    scores = attribute(model, pairs, method=method, level="neuron", batch_size=2)
    assert_equal(scores.dimensions, mean_of(model, pairs, node_definition(model, how)))
    if model.config.attn_only:
        assert scores.units is None
    else:
        assert_equal(scores.units, mean_of(model, pairs, unit_definition(model, how)))
    torch.testing.assert_close(scores.dimensions.sum(1), scores.scores, rtol=0, atol=1e-12)


def test_node_scores_of_eap_ig_activations_and_grad_drop_are_their_definitions():
    model, pairs = case({})
    layers = model.config.n_layers

    def activations(pair):
        steps = oracle.interpolated(pair, pair.deltas(), [(0.25, 0.5), (0.75, 0.5)])
        return sum(weight * node_definition(model, how)(pair) for _, weight, how in steps).sum(1)

    def dropped(pair):
        total = torch.zeros(model.graph.n_senders, dtype=torch.float64)
        for index in range(layers):
            scores = node_definition(model, {"cut": (f"a{index}", f"m{index}")})(pair).sum(1).abs()
            kept = [f"a{index}." not in name and f"m{index}" != name for name in model.graph.sender_names]
            total += scores * torch.tensor(kept)
        return total / torch.tensor([layers, *[layers - 1] * (len(total) - 1)])

    scores = attribute(model, pairs, method="eap-ig-activations", points="midpoint", steps=2, level="node")
    assert_equal(scores.scores, mean_of(model, pairs, activations))
    assert_equal(attribute(model, pairs, method="grad-drop", level="node").scores, mean_of(model, pairs, dropped))


@pytest.mark.parametrize("method", ["eap", "eap-ig", "clean-corrupt", "eap-ig-activations", "relp"])
def test_nodes_by_pair_and_position_add_up(method):
    model, pairs = case({}, first=2)
    whole = attribute(model, pairs, method=method, level="neuron")
    by_pair = attribute(model, pairs, method=method, level="neuron", reduce="pair", batch_size=2)
    by_position = attribute(model, pairs, method=method, level="neuron", reduce="position", batch_size=2)
    for kind in ("scores", "units", "dimensions"):
        expected = getattr(whole, kind)
        assert expected.abs().max() > 1e-4
        torch.testing.assert_close(by_pair.per_pair[kind].mean(0), expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(by_position.per_position[kind].sum(0), expected, rtol=0, atol=1e-12)
        assert bool((by_position.per_position[kind][:2] == 0).all())
    alone = attribute(model, pairs.select(torch.tensor([1])), method=method, level="node").scores
    torch.testing.assert_close(by_pair.per_pair["scores"][1], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"d_mlp": None}], ids=["gpt2", "attention-only"])
@pytest.mark.parametrize("level", ["edge", "node", "neuron"])
@pytest.mark.parametrize("method", ["eap", "grad-drop", "atp-star"])
def test_a_file_states_the_convention_of_its_scores(method, level, options, tmp_path):
    if method == "atp-star" and level == "neuron":
        return
    model, pairs = case(options)
    scores = attribute(model, pairs, method=method, level=level, ablation="zero")
    scores.save(tmp_path / "scores.safetensors")
    kind = EdgeScores if level == "edge" else NodeScores
    for _ in range(2):  # a file that is read and written again says the same
        with safe_open(tmp_path / "scores.safetensors", "pt") as file:
            sign = json.loads(file.metadata()["eapcore"])["sign"]
        assert sign == scores.meta["sign"] and "predicted change" in sign and "corrupt" not in sign
        assert ("|predicted change of the metric|" in sign) == (method != "eap")
        assert ("it has no sign" in sign) == (method != "eap") != ("negative = needed" in sign)
        assert ("the edge is ablated" in sign) == (level == "edge") != ("the node" in sign)
        kind.load(tmp_path / "scores.safetensors").save(tmp_path / "scores.safetensors")


def test_node_scores_survive_a_file_and_a_score_file_of_edges_is_refused(tmp_path):
    model, pairs = case({})
    path = tmp_path / "nodes.safetensors"
    for options in ({"level": "node"}, {"level": "neuron", "reduce": "position"}):
        scores = attribute(model, pairs, **options)
        scores.save(path)
        loaded = NodeScores.load(path, content_hash=model.content_hash)
        assert loaded.meta == json.loads(json.dumps(scores.meta)) and loaded.graph == scores.graph
        for kind in ("scores", "units", "dimensions"):
            kept, read = getattr(scores, kind), getattr(loaded, kind)
            assert (kept is None and read is None) or torch.equal(kept, read)
        assert loaded.per_position.keys() == scores.per_position.keys()
    assert loaded["a1.h2"] == float(loaded.scores[model.graph.sender("a1.h2")])
    assert loaded.top(1)[0][1] == float(loaded.scores[loaded.scores.abs().argmax()])
    refused("load that one", NodeScores.load, path, content_hash="another")
    attribute(model, pairs).save(path)
    refused("score file that eapcore wrote", NodeScores.load, path)


# Storages, batches, pairs and positions


@pytest.mark.parametrize("options", [*MODELS.values(), {"n_layers": 1}], ids=[*MODELS, "one layer"])
@pytest.mark.parametrize("first", [0, 3])
def test_the_factored_way_gives_the_scores_of_the_dense_one(options, first):
    model, pairs = case(options, first=first)
    whole = attribute(model, pairs, storage="dense")
    factored = attribute(model, pairs, storage="factored", batch_size=2)
    assert (whole.meta["storage"], factored.meta["storage"]) == ("dense", "factored")
    assert_equal(factored.scores, whole.scores)
    assert bool((factored.scores[~factored.mask] == 0).all())


@storages
@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_scores_by_pair_are_those_of_each_pair_alone(storage, batch_size):
    model, pairs = case({}, first=2)
    scores = attribute(model, pairs, reduce="pair", storage=storage, batch_size=batch_size)
    for i in range(len(pairs)):
        alone = attribute(model, pairs.select(torch.tensor([i]))).scores
        torch.testing.assert_close(scores.per_pair[i], alone, rtol=0, atol=1e-12)
    torch.testing.assert_close(scores.scores, attribute(model, pairs).scores, rtol=0, atol=1e-12)


@storages
@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_scores_by_position_add_up_and_sit_where_they_belong(storage, batch_size):
    model, pairs = case({}, first=2)
    scores = attribute(model, pairs, reduce="position", storage=storage, batch_size=batch_size)
    torch.testing.assert_close(scores.per_position.sum(0), attribute(model, pairs).scores, rtol=0, atol=1e-12)
    assert scores.per_position.shape[0] == max(LENGTHS)
    assert bool((scores.per_position[:2] == 0).all())
    # What the logits read is read at the answers alone, the last tokens here.
    at_logits = scores.per_position[:, :, model.graph.logits].abs().sum(1)
    assert [t for t in range(max(LENGTHS)) if at_logits[t] > 0] == sorted(length - 1 for length in LENGTHS)


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
    model, pairs = random_case([6] * 7)
    expected = attribute(model, pairs).scores
    real = dense.backward
    sizes = []

    def fails_above_two(model, saved, grad, sink, **options):
        sizes.append(len(grad))
        real(model, saved, grad, sink, **options)
        if len(grad) > 2:
            raise error

    monkeypatch.setattr(dense, "backward", fails_above_two)
    with caplog.at_level(logging.WARNING, logger="eapcore"):
        scores = attribute(model, pairs, batch_size=7)
    assert sizes == [7, 3, 1, 1, 1, 1, 1, 1, 1]
    assert [record.message for record in caplog.records] == [
        "out of memory with 7 pairs in a batch: going on with 3",
        "out of memory with 3 pairs in a batch: going on with 1",
    ]
    torch.testing.assert_close(scores.scores, expected, rtol=0, atol=1e-14)


# What holds for all


@pytest.mark.parametrize("method", NAMES)
def test_no_method_depends_on_the_batch_size(method):
    model, pairs = case({}, first=2, lengths=[6, 3, 8, 5, 7])
    whole = attribute(model, pairs, method=method, batch_size=5)
    halves = attribute(model, pairs, method=method, batch_size=2)
    assert whole.scores.abs().max() > 1e-3
    torch.testing.assert_close(halves.scores, whole.scores, rtol=0, atol=1e-13)
    by_pair = attribute(model, pairs, method=method, reduce="pair", batch_size=2)
    torch.testing.assert_close(by_pair.per_pair.mean(0), whole.scores, rtol=0, atol=1e-13)
    assert bool((whole.scores[~whole.mask] == 0).all())


@pytest.mark.parametrize("name", ["toy-ioi", "toy-induction"])
def test_on_trained_models_integrated_gradients_and_relevance_come_closer_to_exact_patching_than_eap(name):
    """R² over all edges; the numbers of a run are bench/bench_ig.py's."""
    model = load(name, dtype="float64")
    pairs = TASKS[name].generate(8, 3)
    exact = patch_edges(model, pairs).scores[model.graph.edge_mask()]

    def r_squared(**how):
        scores = attribute(model, pairs, **how).scores[model.graph.edge_mask()]
        return float(1 - (exact - scores).pow(2).sum() / (exact - exact.mean()).pow(2).sum())

    eap, integrated = r_squared(), r_squared(method="eap-ig")
    assert eap < 0.8 < integrated
    assert r_squared(method="relp", rules=Rules("frozen", "identity")) > eap + 0.1
    assert r_squared(method="qk-fix") > eap


NARROW = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}  # relative, of all scores together


BY_GRADIENT = [method for method in NAMES if method not in ("hybrid", "qk-fix", "atp-star", *PRUNING)]
WAYS = [
    *((method, "edge", "dense") for method in NAMES if method not in PRUNING),
    *((method, "edge", "factored") for method in NAMES),
    *((method, "neuron", "factored") for method in BY_GRADIENT),
]


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize(("method", "level", "storage"), WAYS)
def test_narrow_dtypes_come_near_the_scores_in_float64(method, level, storage, dtype):
    _, pairs = case({"scale": 0.2}, first=2)
    narrow = random_model(scale=0.2, dtype=dtype)
    how = {"method": method, "level": level, "storage": storage}
    expected, scores = (
        attribute(with_weights(narrow, torch.Tensor.double), pairs, **how),
        attribute(narrow, pairs, **how),
    )
    for kind in ("scores",) if level == "edge" else ("scores", "units", "dimensions"):
        exact, found = getattr(expected, kind), getattr(scores, kind)
        assert found.dtype == torch.float32 and exact.norm() > 0.1
        assert float((found.double() - exact).norm() / exact.norm()) <= NARROW[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_half_precision_the_residual_stream_is_not_rounded(dtype, monkeypatch):
    """What all streams have in common is large, as on trained models: rounded with it, the rest would be lost."""
    wide = random_model(scale=0.2)
    weights = {name: x.clone() for name, x in wide.weights.named()}
    weights["w_e"] += 64.0 if dtype == torch.bfloat16 else 512.0
    narrow = with_weights(with_weights(wide, weights), lambda x: x.to(dtype))
    pairs = random_pairs(wide, [6, 8], first_difference=2)
    expected = attribute(with_weights(narrow, torch.Tensor.double), pairs, method="clean-corrupt").scores

    def error():
        return float((attribute(narrow, pairs, method="clean-corrupt").scores - expected).norm() / expected.norm())

    here = error()
    monkeypatch.setattr(scoring, "accumulate_dtype", lambda dtype: dtype)
    assert here < 0.05 and error() > 4 * here


def test_the_error_of_half_precision_is_measured_on_a_few_pairs(monkeypatch):
    pairs = random_pairs(random_model(), [6, 8, 5], first_difference=2)
    assert rounding_error(random_model(dtype=torch.float32), pairs) == 0
    errors = {dtype: rounding_error(random_model(dtype=dtype), pairs) for dtype in (torch.bfloat16, torch.float16)}
    assert 0 < 3 * errors[torch.float16] < errors[torch.bfloat16] < 0.05
    same = dataclasses.replace(pairs, corrupt=pairs.clean)
    assert 0 < rounding_error(random_model(dtype=torch.bfloat16), same) < 0.05
    monkeypatch.setattr(precision, "budget", lambda device: 1000)
    assert rounding_error(random_model(dtype=torch.bfloat16), pairs) is None


# What a file says of each method besides its name, level and ablation.
DESCRIBED = {
    "eap": {"gradient_at": "clean", "points": [[1.0, 1.0]]},
    "hybrid": {"exact": ["logits", "mlp"], "points": [[0.75, 1.0]]},
    "eap-ig": {"rule": "gauss", "steps": 4},
    "clean-corrupt": {"points": [[1.0, 0.5], [0.0, 0.5]]},
    "eap-ig-activations": {"rule": "right", "steps": 5, "components": ["embed", "a0", "m0", "a1", "m1"],
        "points": [[k / 5, pytest.approx(0.2)] for k in range(1, 6)]},
    "relp": {"points": [[1.0, 1.0]], "rules": {"norm": "frozen", "activation": "identity", "attention": "frozen",
        "products": "halved"}},
    "qk-fix": {"exact_softmax": True, "points": [[1.0, 1.0]]},
    "grad-drop": {"dropped": [["a0", "m0"], ["a1", "m1"]], "points": [[1.0, 1.0]]},
    "atp-star": {"dropped": [["a0", "m0"], ["a1", "m1"]], "exact_softmax": True, "points": [[1.0, 1.0]]},
    "gim": {"points": [[1.0, 1.0]], "rules": {"norm": "frozen", "activation": "gradient", "attention": "gradient",
        "temperature": 2.0, "products": "halved"}},
    "hisp": {"normalised": True, "points": [[1.0, 1.0]]},
    "hisp-raw": {"normalised": False, "points": [[1.0, 1.0]]},
}  # fmt: skip


@pytest.mark.parametrize("method", NAMES)
def test_the_file_says_everything_of_the_method(method):
    model, pairs = case({})
    described = json.loads(json.dumps(attribute(model, pairs, method=method).meta["method"]))
    assert (
        described == described | {"name": method, "level": "edge", "ablation": {"name": "corrupt"}} | DESCRIBED[method]
    )
    assert sum(weight for _, weight in described["points"]) == pytest.approx(1)


@models
@pytest.mark.parametrize("how", [{"reduce": "pair"}, {"reduce": "position"}, {"level": "node"}, {"level": "neuron"}])
@pytest.mark.parametrize("points", ["left", "gauss", [(0.3, 2.0), (0.9, -1.5), (0.5, 0.5)]])
def test_steps_that_run_together_give_the_scores_of_one_after_another(options, how, points, limited, monkeypatch):
    model, pairs = case(options)
    how = how | {"method": "eap-ig", "points": points} | ({"steps": 5} if isinstance(points, str) else {})
    sizes, found, run_stages = [], [], scoring.run_stages

    def watch(model, x, **others):
        sizes.append(len(x))
        return run_stages(model, x, **others)

    monkeypatch.setattr(scoring, "run_stages", watch)
    for tokens, most in ((0, len(pairs)), (1000, 3 * len(pairs))):
        limited(step_tokens=tokens)
        sizes.clear()
        found.append(attribute(model, pairs, batch_size=len(pairs), **how))
        assert max(sizes) >= most if tokens else set(sizes) == {most}
    apart, together = found
    assert_equal(together.scores, apart.scores)
    for part in ("per_pair", "per_position"):
        a, b = (getattr(scores, part) for scores in found)
        for name in a if isinstance(a, dict) else ():
            torch.testing.assert_close(b[name], a[name], rtol=0, atol=1e-12)
        if isinstance(a, torch.Tensor):
            torch.testing.assert_close(b, a, rtol=0, atol=1e-12)
    if how.get("level") == "neuron":
        if not model.config.attn_only:
            torch.testing.assert_close(together.units, apart.units, rtol=0, atol=1e-12)
        torch.testing.assert_close(together.dimensions, apart.dimensions, rtol=0, atol=1e-12)


@storages
def test_eap_ig_activations_holds_no_more_with_more_steps(storage, limited):
    model, pairs = random_case([16] * 8, n_heads=4, d_model=64, d_head=16, d_mlp=256, scale=0.1)
    limited(step_tokens=0)  # steps run one after another, as they do in larger batches

    def peak(steps):
        return peak_bytes(
            lambda: attribute(model, pairs, method="eap-ig-activations", steps=steps, storage=storage, batch_size=8)
        )

    peak(1)  # what is computed once for a model belongs to the model
    two, five = peak(2), peak(5)
    assert two > 2**20
    assert five <= 1.01 * two


@pytest.mark.parametrize(("bad", "message"), [
    ({"method": "ig"}, "eap, hybrid, eap-ig, clean-corrupt, .* got 'ig'"),
    ({"gradient_at": "middle"}, "clean, corrupt, or a number .* got 'middle'"),
    ({"method": "eap-ig", "steps": 0}, "positive integer, got 0"),
    ({"method": "eap-ig", "points": "simpson"}, "left, right, midpoint, gauss, got 'simpson'"),
    ({"method": "eap-ig", "points": [(0.5, 0.7)]}, "weights that sum to 1"),
    *(({"method": "eap-ig", "points": points}, "left, right, midpoint, gauss or a list of .* that sum to 1, got")
        for points in ([], (), [0.5], 5, [("a", 1)], [(math.nan, 1.0)], [(0.5, math.nan)], [(math.inf, 1.0)])),
    ({"method": "eap-ig", "points": ""}, "left, right, midpoint, gauss, got ''"),
    ({"method": "eap-ig", "points": 5, "steps": 3}, "a list of .* that sum to 1, got 5"),
    ({"gradient_at": ""}, "clean, corrupt, or a number .* got ''"),
    ({"method": "relp", "rules": "relp"}, "rules must be a Rules, .* got 'relp'"),
    ({"method": "gim", "qk": "exact"}, "rules for the gradients of q and k, which qk='exact' does not take"),
    ({"method": "relp", "rules": {"norm": "frozen"}}, "rules must be a Rules, .* got {'norm': 'frozen'}"),
    ({"storage": "sparse"}, "auto, dense, factored, got 'sparse'"),
    ({"reduce": "head"}, "all, pair, position, got 'head'"),
    ({"level": "layer"}, "edge, node, neuron, got 'layer'"),
    ({"ablation": "noise"}, "corrupt, zero, mean, mean-positional, optimal, got 'noise'"),
    ({"method": "clean-corrupt", "ablation": "mean"}, "no prompt to take gradients at, as clean-corrupt"),
    ({"gradient_at": "corrupt", "ablation": "zero"}, "no prompt to take gradients at, as eap with these options"),
    ({"method": "qk-fix", "level": "neuron"}, "level must be 'edge' or 'node' with qk-fix"),
    ({"level": "node", "storage": "dense"}, "storage must be 'auto' or 'factored', got 'dense'"),
    ({"method": "grad-drop", "reduce": "position"}, "reduce must be 'all' or 'pair', got 'position'"),
    ({"method": "eap-ig", "points": [(0.5, 1.0)], "steps": 3}, "points give their own 1: leave one of the two out"),
    ({"method": "eap-ig-activations", "steps": 0}, "positive integer, got 0"),
    ({"reference": "self"}, "a reference task belongs to the ablations mean, mean-positional, optimal, got 'corrupt'"),
])  # fmt: skip
def test_what_does_not_go_together_is_refused_in_one_sentence(bad, message):
    model, pairs = case({})
    bad = {name: pairs if value == "self" else value for name, value in bad.items()}
    with pytest.raises(ValueError, match=message) as refused:
        attribute(model, pairs, **bad)
    assert "\n" not in str(refused.value)


def test_what_a_model_does_not_have_is_refused():
    model, pairs = case({"d_mlp": None})
    one, its = case({"n_layers": 1})
    refused("needs at least two layers, this model has one", attribute, one, its, method="grad-drop")
    short = random_pairs(model, [4, 5])
    with pytest.raises(ValueError, match="as long as the task's, 8 tokens, but the longest has 5"):
        attribute(model, pairs, ablation="mean-positional", reference=short)
    refused(r"rules.norm must be one of gradient, frozen, got 'melted'", dataclasses.replace, Rules(), norm="melted")
