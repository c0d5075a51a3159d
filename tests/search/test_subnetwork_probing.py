"""Subnetwork probing is the published training, step by step, and its edges' masks take no tensor for each edge."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from memory import peak_bytes
from models import KINDS, random_model, random_pairs, with_weights
from refusal import refused

from eapcore.execution.adam import Adam
from eapcore.graph.scores import NO_SIGN, EdgeScores
from eapcore.search.subnetwork_probing import subnetwork_probing
from eapcore.tasks.metrics import METRICS
from eapcore.tasks.pairs import PromptPairs

LENGTHS = [5, 3]


class Literal:
    """Masks trained by autograd on one prompt, one receiver and one edge at a time."""

    def __init__(self, model, pairs, metric, zero=False):
        self.model, self.zero = model, zero
        self.each = [oracle.Pair(model, pairs, i, METRICS[metric]) for i in range(len(pairs))]

    def edges(self, mask):
        total, graph = 0, self.model.graph
        places = {edge: i for i, edge in enumerate(map(tuple, graph.edge_mask().nonzero().tolist()))}
        for pair in self.each:
            other = [torch.zeros_like(x) if self.zero else x.detach() for x in pair.corrupt.senders]

            def read(r, senders, bias, other=other):
                return bias + sum(o + mask[places[s, r]] * (e - o) for s, (e, o) in enumerate(zip(senders, other)))  # noqa: B905

            total = total + pair.value(oracle.run(self.model, pair.tokens, read))
        return total / len(self.each)

    def nodes(self, mask):
        total = 0
        for pair in self.each:

            def mixed(r, x, pair=pair):
                if r in pair.corrupt.inner:
                    other = pair.corrupt.inner[r]
                else:
                    other = pair.corrupt.senders[self.model.graph.senders_behind(r)[0]]
                return x * mask[r] + (0 if self.zero else other.detach()) * (1 - mask[r])

            total = total + pair.value(oracle.run(self.model, pair.tokens, change=mixed))
        return total / len(self.each)


def trained(value, groups, penalty, steps, rate, seed):
    """log α after some steps, and the metric of the last."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.full((len(groups),), math.log(5.0), dtype=torch.float64, requires_grad=True)  # (0.9 + 0.1)/1.2 = 5/6
    a, b = torch.zeros_like(x), torch.zeros_like(x)
    for step in range(1, steps + 1):
        u = torch.rand(len(x), generator=generator, dtype=torch.float64).clamp(0.0001, 0.9999)
        mask = torch.clamp(1.2 * torch.sigmoid((torch.log(u / (1 - u)) + x) * 1.5) - 0.1, 0, 1)
        above = torch.sigmoid(x - 2 / 3 * math.log(0.1 / 1.1))
        size = sum(above[[i for i, g in enumerate(groups) if g == group]].mean() for group in set(groups))
        made = value(mask)
        (grad,) = torch.autograd.grad(-made + penalty * size / len(set(groups)), x)
        a, b = 0.9 * a + 0.1 * grad, 0.999 * b + 0.001 * grad**2
        with torch.no_grad():
            x -= rate * (a / (1 - 0.9**step)) / ((b / (1 - 0.999**step)).sqrt() + 1e-8)
    return torch.sigmoid(x.detach() - 2 / 3 * math.log(0.1 / 1.1)), made.item()


@pytest.mark.parametrize("kind", ["gpt2", "attention-only", "no LayerNorm"])
def test_every_step_is_the_literal_one(kind):
    options = {"n_heads": 2, "d_model": 12, "d_mlp": 20} | KINDS[kind] | {"n_layers": 2}
    model = random_model(**options | ({"scale": 0.35} if kind == "no LayerNorm" else {}))
    pairs, graph = random_pairs(model, LENGTHS, first_difference=1), model.graph
    groups = [name.split(".")[0] + name[-2:-1] * ("<" in name) for name in graph.receiver_names[:-1]]
    for metric, zero, penalty in (("kl", False, 2.0), ("logit_diff", True, 0.5)):
        how = {"penalty": penalty, "steps": 2, "rate": 0.3, "seed": 4}
        literal = Literal(model, pairs, metric, zero)
        found = [
            subnetwork_probing(model, pairs, metric, level=level, batch_size=size, **how,
                ablation="zero" if zero else "corrupt") for level, size in (("edge", 2), ("node", 1), ("edge", 1))
        ]  # fmt: skip
        chance, value = trained(literal.edges, [0] * graph.n_edges, **how)
        assert chance.max() - chance.min() > 1e-3
        for each in (found[0], found[2]):
            torch.testing.assert_close(each.scores[graph.edge_mask()], chance, rtol=0, atol=1e-10)
            assert each.meta["metric"]["masked"] == pytest.approx(value, abs=1e-10)
        chance, value = trained(literal.nodes, groups, **how)
        named = found[1].meta["method"]["nodes"]
        assert named == {name: pytest.approx(x, abs=1e-10) for name, x in zip(graph.receiver_names, chance.tolist())}  # noqa: B905
        assert found[1].meta["metric"]["masked"] == pytest.approx(value, abs=1e-10)
        assert found[1]["embed->a0.h0<q>"] == pytest.approx(named["a0.h0<q>"])
        head = max(named[f"a0.h1<{part}>"] for part in "qkv")
        assert found[1]["a0.h1->logits"] == pytest.approx(head)
        assert float(found[1]["embed->logits"]) == max(named.values())


def test_the_same_seed_gives_the_same_file(tmp_path):
    model = random_model(n_heads=2, d_model=12, dtype=torch.float32)
    pairs = random_pairs(model, LENGTHS)
    seen = []
    found = [
        subnetwork_probing(model, pairs, steps=4, seed=seed, progress=lambda *x: seen.append(x)) for seed in (1, 1, 2)
    ]
    assert torch.equal(found[0].scores, found[1].scores) and not torch.equal(found[0].scores, found[2].scores)
    assert seen[-1] == (8, 8) and NO_SIGN in found[0].meta["sign"]
    found[0].save(tmp_path / "scores.safetensors")
    again = EdgeScores.load(tmp_path / "scores.safetensors", content_hash=model.content_hash)
    assert torch.equal(again.scores, found[0].scores) and again.meta["method"] == found[0].meta["method"]


def test_a_large_penalty_closes_masks_and_none_keeps_what_is_needed():
    model = random_model(n_heads=2, d_model=12, dtype=torch.float32)
    pairs = random_pairs(model, LENGTHS)
    for level in ("edge", "node"):
        how = {"level": level, "steps": 10, "rate": 1.0}
        kept = [subnetwork_probing(model, pairs, penalty=x, **how).meta for x in (0.0, 300.0)]
        shares, values = [m["method"]["kept"] for m in kept], [m["metric"]["masked"] for m in kept]
        assert shares[0] > 0.5 > 0.2 > shares[1] and values[0] > values[1]


def test_a_mean_may_take_the_place_of_what_is_masked():
    model = random_model(n_heads=2, d_model=12)
    pairs = random_pairs(model, LENGTHS)
    means = oracle.ablated_means(model, pairs)
    literal = Literal(model, pairs, "kl")
    for pair in literal.each:
        pair.corrupt.senders = [means[s].expand_as(x) for s, x in enumerate(pair.corrupt.senders)]
    how = {"penalty": 1.0, "steps": 2, "rate": 0.3, "seed": 0}
    found = subnetwork_probing(model, pairs, ablation="mean", **how)
    chance, _ = trained(literal.edges, [0] * model.graph.n_edges, **how)
    torch.testing.assert_close(found.scores[model.graph.edge_mask()], chance, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_comes_near(dtype):
    narrow = random_model(n_heads=2, d_model=12, scale=0.2, dtype=dtype)
    pairs = random_pairs(narrow, LENGTHS)
    for level in ("edge", "node"):
        how = {"level": level, "steps": 1, "rate": 1e-9}  # Adam's first step is the gradient's sign
        wide, found = (
            subnetwork_probing(m, pairs, **how).meta["metric"]["masked"]
            for m in (with_weights(narrow, torch.Tensor.double), narrow)
        )
        assert found == pytest.approx(wide, rel=0.2, abs=2e-3)


def test_no_tensor_has_an_axis_of_edges_beside_the_models_width():
    rows, tokens, width = 2, 8, 32
    model = random_model(5, 6, width, 8, 32, dtype=torch.float32, n_ctx=tokens, scale=0.1)
    pairs = random_pairs(model, [tokens] * rows)
    peak = peak_bytes(lambda: subnetwork_probing(model, pairs, steps=1))
    one = rows * tokens * width * 4
    assert peak < 12 * model.graph.n_senders * one < model.graph.n_edges * one / 2


def test_what_is_refused():
    model = random_model(n_heads=2, d_model=12)
    pairs = random_pairs(model, LENGTHS)
    for how, message in [
        ({"level": "neuron"}, "edge, node, got 'neuron'"),
        ({"penalty": -1}, "penalty must be a number of at least 0, got -1"),
        ({"rate": 0}, "rate must be a number above 0, got 0"),
        ({"rate": math.nan}, "got nan"),
        ({"steps": 0}, "steps must be an integer of at least 1, got 0"),
        ({"seed": True}, "seed must be an integer of at least 0, got True"),
        ({"level": "node", "ablation": "mean"}, "ablation must be 'corrupt' or 'zero', got 'mean'"),
    ]:
        refused(message, subnetwork_probing, model, pairs, **how)
    same = PromptPairs.from_lists([[1, 2]], [[1, 2]], [3], [4])
    refused("clean and corrupt of pair 0 are identical", subnetwork_probing, model, same)


def test_adam_takes_torchs_steps():
    x = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    ours = Adam(x, 0.1)
    a = b = torch.zeros(3, dtype=torch.float64)
    y = x.clone()
    for step in range(1, 4):
        grad = y.cos() * step
        ours.step(grad)
        a, b = 0.9 * a + 0.1 * grad, 0.999 * b + 0.001 * grad**2
        y = y - 0.1 * (a / (1 - 0.9**step)) / ((b / (1 - 0.999**step)).sqrt() + 1e-8)
        torch.testing.assert_close(x, y, rtol=0, atol=1e-14)
