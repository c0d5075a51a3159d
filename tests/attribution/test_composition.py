"""Points, rules, how q and k are treated and which edges are exact are chosen apart, and each combination is what its
parts say."""

from __future__ import annotations

from dataclasses import replace

import oracle
import pytest
import torch
from models import layers_of, random_model, random_pairs, with_weights
from oracle import mean_of
from refusal import refused

import eapcore
from eapcore.attribution.attribute import attribute
from eapcore.graph.scores import EdgeScores
from eapcore.models.backward_rules import Rules
from eapcore.patching.edges import patch_edges
from eapcore.tasks.metrics import METRICS

MODELS = {
    "gpt2": {},
    "attention-only, q k v apart": {"d_mlp": None, "split_qkv": True, "n_layers": 3},
    "relu, no LayerNorm": {"act_fn": "relu", "normalization": None, "scale": 0.2},
    "one layer": {"n_layers": 1},
}
models = pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
POINTS = [(0.75, 0.7), (0.0, 0.3)]
CHOICES = [
    {"qk": "exact"},
    {"qk": "exact", "rules": Rules(norm="frozen", attention="frozen")},
    {"rules": Rules(activation="identity")},
]


def case(options, **others):
    model = random_model(**options)
    return model, random_pairs(model, [6, 3, 8], first_difference=2, **others)


def near(found, expected, largest=1e-3):
    assert expected.abs().max() > largest
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def literal(pair, points=POINTS, qk="gradient", rules=None, ablated=None, **how):
    """Σ weight · scores with gradients where the embedding is between the ablated and the clean one."""
    rules = rules or Rules()
    how |= {"norms": rules.norm, "activation": rules.activation, "attention": rules.attention}
    deltas = pair.deltas(ablated)
    one, clean = oracle.exact_softmax if qk == "exact" else oracle.one_pass, pair.clean.senders[0].detach()
    starts = [(clean + (1 - alpha) * deltas[0], weight) for alpha, weight in points]
    return sum(weight * one(pair, deltas, replaced={"embed": [x]}, **how) for x, weight in starts)


@models
def test_points_rules_and_exact_patterns_go_together(options):
    model, pairs = case(options)
    for chosen in CHOICES:
        expected = mean_of(model, pairs, lambda pair, chosen=chosen: literal(pair, **chosen))
        for storage in ("dense", "factored"):
            how = {"points": POINTS, "storage": storage, "batch_size": 2} | chosen
            near(attribute(model, pairs, **how).scores, expected)
            parts = [attribute(model, pairs, reduce=reduce, **how) for reduce in ("pair", "position")]
            near(parts[0].per_pair.mean(0), expected)
            near(parts[1].per_position.sum(0), expected)
            if storage == "factored" or "qk" in chosen:  # nodes without exact edges keep no sender buffer
                near(attribute(model, pairs, level="node", **how).scores, expected.sum(1))


def test_one_point_is_a_number_and_every_preset_takes_it():
    model, pairs = case({})
    near(attribute(model, pairs, gradient_at=0.75).scores, oracle.eap(model, pairs, points=[(0.75, 1.0)]))
    fixed = attribute(model, pairs, method="qk-fix", gradient_at=0.75)
    near(fixed.scores, mean_of(model, pairs, lambda pair: literal(pair, [(0.75, 1.0)], "exact")))
    assert fixed.meta["method"]["gradient_at"] == 0.75 and fixed.meta["method"]["points"] == [[0.75, 1.0]]
    same = attribute(model, pairs, qk="exact", points="midpoint", steps=1, gradient_at=None).scores
    assert torch.equal(same, attribute(model, pairs, method="qk-fix", points=[(0.5, 1.0)]).scores)
    dropped = attribute(model, pairs, method="grad-drop", points=POINTS, batch_size=2)
    near(dropped.scores, mean_of(model, pairs, lambda pair: oracle.dropped(pair, None, lambda p, _, **how: literal(p, **how))))  # fmt: skip # noqa: E501
    activations = attribute(model, pairs, method="eap-ig-activations", gradient_at=0.3).scores
    near(activations, attribute(model, pairs, method="eap-ig-activations", points=[(0.3, 1.0)]).scores)


def test_an_integral_may_begin_at_zero_or_at_a_mean():
    model, pairs = case({})
    means = oracle.ablated_means(model, pairs)
    values = {"zero": lambda s, t: torch.zeros_like(means[0]), "mean": lambda s, t: means[s]}
    for name, value in values.items():
        expected = mean_of(model, pairs, lambda pair, value=value: literal(pair, ablated=value))
        for storage in ("dense", "factored"):
            near(attribute(model, pairs, points=POINTS, ablation=name, storage=storage).scores, expected)
    expected = mean_of(model, pairs, lambda p: literal(p, [(0.5, 1.0)], ablated=values["mean"]))
    near(attribute(model, pairs, method="eap-ig", steps=1, ablation="mean").scores, expected)


def test_by_position_an_exact_pattern_changes_where_the_edge_does():
    model, pairs = case({})
    corrupt = pairs.clean.clone()
    corrupt[:, 2] = (corrupt[:, 2] + 1) % model.config.d_vocab
    found = attribute(model, (pairs.clean[[0, 2]], corrupt[[0, 2]]), lambda x: x[:, 3], qk="exact", reduce="position")
    by_position, names = found.per_position[:, 0], model.graph.receiver_names  # of the embedding, which differs at 2
    for part in ("<q>", "<k>"):
        columns = [r for r, name in enumerate(names) if name.startswith("a0") and name.endswith(part)]
        moved = by_position[:, columns].abs().sum(1)
        assert moved[2] > 1e-3 and moved.sum() - moved[2] < 1e-12


@pytest.mark.parametrize("scale", [0.4, 1.0])
def test_by_position_keys_change_one_after_another(scale):
    """The mean of both directions, which is bounded where whole patterns move far, as with zeros."""
    model = random_model(n_layers=1, n_heads=2, scale=scale)
    pairs = random_pairs(model, [5])
    pair = oracle.Pair(model, pairs, 0)
    made, (heads, _) = pair.clean, layers_of(model.weights)[0]
    deltas = pair.deltas(lambda s, t: 0 * made.senders[s][t])
    found, narrow = (
        attribute(m, pairs, method="qk-fix", ablation="zero", reduce="position")
        for m in (model, with_weights(model, torch.Tensor.float))
    )
    for h in range(2):
        r = model.graph.receiver(f"a0.h{h}<k>")
        pattern, (q, k) = made.patterns[0, h], made.queries_keys[0, h]
        (d,) = pair.grads(made, [pattern])
        changed = oracle.norm(made.receivers[r] + deltas[0], heads.norm, model.config.eps)
        changed = changed @ torch.cat(list(heads.w_qkv))[2 + h] + heads.b_qkv[2 + h]

        def value(keys, q=q, d=d):
            return (oracle.causal(q, keys, model.config.score_scale(0)) * d).sum().item()

        forward = [value(torch.cat([changed[:t], k[t:]])) for t in range(6)]
        back = [value(torch.cat([k[:t], changed[t:]])) for t in range(6)]
        expected = [(forward[t + 1] - forward[t] + back[t] - back[t + 1]) / 2 for t in range(5)]
        torch.testing.assert_close(found.per_position[:, 0, r].tolist(), expected, rtol=0, atol=1e-10)
    error = (narrow.per_position.double() - found.per_position).abs().max()
    assert float(error) < 1e-3 * float(found.per_position.abs().max())


@models
def test_edges_of_the_last_layer_are_patched_for_any_metric_and_ablation(options):
    model, pairs = case(options)
    cases = [
        ("logit_diff", {}), ("nll", {"ablation": "zero"}), ("kl", {"ablation": "mean", "gradient_at": 0.6}),
        (lambda x: x[:, 1] ** 2, {"method": "qk-fix"}), ("prob_diff", {"method": "eap-ig", "reduce": "pair"}),
    ]  # fmt: skip
    if model.config.n_layers > 1:
        cases.append(("logit_margin", {"method": "eap-ig-activations"}))
    for metric, how in cases:
        for exact, storage in (("last", "dense"), (["logits", "q"], "factored")):
            found = attribute(model, pairs, metric, exact=exact, batch_size=2, storage=storage, **how)
            apart = attribute(model, pairs, metric, storage=storage, **how)
            ablation = how.get("ablation", "corrupt")
            expected = patch_edges(model, pairs, metric, ablation=ablation).scores.where(found.exact, apart.scores)
            near(found.scores, expected, 1e-4)
            assert "exact" not in apart.meta["method"] and apart.exact is None
            if found.per_pair is not None:
                near(found.per_pair.mean(0), expected, 1e-4)
                alone = attribute(model, pairs.select(torch.tensor([1])), metric, exact=exact, **how)
                near(found.per_pair[1], alone.scores, 1e-4)


def test_an_edge_that_carries_no_change_to_what_is_read_has_an_effect_of_exactly_zero():
    """Where both prompts end alike, so does the embedding there: what is measured of its edges would be rounding."""
    model = random_model(dtype=torch.float32)
    pairs = random_pairs(model, [5, 7, 6, 4])
    clean, corrupt = (x.scatter(1, pairs.positions[:, None], 3) for x in (pairs.clean, pairs.corrupt))
    pairs = replace(pairs, clean=clean, corrupt=corrupt)
    still = ["logits", "m1", *(f"a1.h{h}<q>" for h in range(3))]
    for scores in (attribute(model, pairs, exact="last", batch_size=2), patch_edges(model, pairs, batch_size=2)):
        assert all(scores[f"embed->{name}"] == 0 for name in still)
        assert int((scores.scores[scores.mask] == 0).sum()) == len(still)


def test_exact_edges_by_position_by_node_and_without_sign(tmp_path):
    model, pairs = case({})
    exact = ["logits", "mlp", "q"]
    whole = attribute(model, pairs, exact=exact)
    parts = attribute(model, pairs, exact=exact, reduce="position", batch_size=2)
    near(parts.per_position.sum(0), whole.scores)
    at_logits = parts.per_position[:, :, model.graph.logits].abs().sum(1)
    assert [t for t, x in enumerate(at_logits) if x > 0] == [2, 5, 7]
    near(attribute(model, pairs, exact=exact, level="node").scores, whole.scores.sum(1))
    unsigned = attribute(model, pairs, method="atp-star", exact=exact, reduce="pair")
    by_pair = attribute(model, pairs, exact=exact, reduce="pair").per_pair
    near(unsigned.per_pair[:, whole.exact], by_pair[:, whole.exact].abs())
    signed = attribute(model, pairs, method="atp-star").scores
    near(unsigned.scores[~whole.exact], signed[~whole.exact])
    whole.save(tmp_path / "scores.safetensors")
    again = EdgeScores.load(tmp_path / "scores.safetensors")
    assert torch.equal(again.exact, whole.exact) and again.meta["method"]["exact"] == exact
    names = {whole.graph.receiver_names[r] for r in whole.exact.any(0).nonzero().flatten().tolist()}
    assert names == {"logits", "m1", "a1.h0<q>", "a1.h1<q>", "a1.h2<q>"}


def test_dropped_gradients_by_node_leave_out_the_nodes_of_the_dropped_layer():
    model, pairs = case({})

    def score(pair):
        names, total = model.graph.sender_names, torch.zeros(model.graph.n_senders, dtype=torch.float64)
        for index in range(model.config.n_layers):
            made = oracle.exact_softmax(pair, pair.deltas(), cut=(f"a{index}", f"m{index}")).sum(1).abs()
            total += made * torch.tensor([name[1:2] != str(index) for name in names])
        return total / torch.tensor([model.config.n_layers - (name != "embed") for name in names])

    near(attribute(model, pairs, method="atp-star", level="node").scores, mean_of(model, pairs, score))


def test_what_does_not_go_together():
    model, pairs = case({})
    for how, message in [
        ({"gradient_at": 1.5}, "clean, corrupt, or a number from corrupt 0 to clean 1, got 1.5"),
        ({"gradient_at": True}, "got True"),
        ({"gradient_at": "clean", "points": "left"}, "leave one of the two out"),
        ({"points": "left"}, "points by the rule left need steps"),
        ({"steps": 3}, "the method eap has points of its own: steps need a rule, left or right"),
        ({"qk": "exactly"}, "gradient, exact, got 'exactly'"),
        ({"exact": "m1"}, "some of logits, mlp, q, k, v, got 'm1'"),
        ({"exact": ["last", "q"]}, "got 'last'"),
        ({"exact": "last", "reduce": "position"}, "with reduce='position' exact must be some of logits, mlp and q"),
        ({"exact": "logits", "level": "neuron"}, "level must be 'edge' or 'node' with eap"),
        ({"method": "grad-drop", "rules": Rules(cut=frozenset({"a0"}))}, "rules.cut must be empty, got"),
    ]:
        refused(message, attribute, model, pairs, **how)
    without = random_model(d_mlp=None)
    refused("logits, q, k, v, got 'mlp'", attribute, without, pairs, exact="mlp")
    assert attribute(without, pairs, exact="last").exact is not None
    refused("exact must be bool", EdgeScores, torch.zeros(9, 21), model.graph, exact=torch.zeros(9, 21))
    assert eapcore.attribute(model, pairs, METRICS["nll"], exact="none").exact is None


def test_the_spread_is_the_difference_between_the_first_and_the_last_point(tmp_path):
    model, pairs = case({})
    points = [(0.75, 0.7), (0.3, 0.1), (1.0, 0.2)]
    first, last = (attribute(model, pairs, gradient_at=at, qk="exact").scores for at in (0.75, 1.0))
    for storage in ("dense", "factored"):
        how = {"points": points, "qk": "exact", "storage": storage, "batch_size": 2}
        for reduce in ("all", "pair", "position"):
            found = attribute(model, pairs, spread=True, exact="logits", reduce=reduce, **how)
            near(found.spread.where(~found.exact, 0), (first - last).where(~found.exact, 0))
            assert bool((found.spread[found.exact] == 0).all())
            near(found.scores, attribute(model, pairs, exact="logits", **how).scores)
    found.save(tmp_path / "scores.safetensors")
    assert torch.equal(EdgeScores.load(tmp_path / "scores.safetensors").spread, found.spread)
    for how in ({}, {"method": "grad-drop"}, {"method": "eap-ig-activations"}, {"method": "eap-ig", "level": "node"}):
        refused("spread is the difference of edges' scores", attribute, model, pairs, spread=True, **how)
    refused("no point may have the weight 0", attribute, model, pairs, spread=True, points=[(0.5, 1.0), (1.0, 0.0)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_exact_edges_of_a_model_in_half_precision_are_not_lost_in_its_logits_rounding(dtype):
    wide, pairs = case({})
    narrow = with_weights(wide, lambda x: x.to(dtype))
    wide = with_weights(narrow, torch.Tensor.double)
    errors = torch.zeros(2, dtype=torch.float64)
    for metric in ("logit_diff", "nll"):
        expected, found = (attribute(model, pairs, metric, exact="last", batch_size=2) for model in (wide, narrow))
        effects = expected.scores[expected.exact]
        forwards = patch_edges(narrow, pairs, metric, eapcore.Circuit(found.exact, narrow.graph))
        off, others = ((x.scores[found.exact].double() - effects).norm() / effects.norm() for x in (found, forwards))
        assert effects.norm() > 0.1 and off < {torch.bfloat16: 0.05, torch.float16: 0.004}[dtype]
        errors += torch.stack([off, others])
    assert errors[0] < 0.8 * errors[1]  # of forwards in half precision
