"""Attention's edges from position to position are the literal ones, and add up to the ordinary scores."""

from __future__ import annotations

import oracle
import pytest
import torch
from models import KINDS, layers_of, random_model, random_pairs, with_weights
from refusal import refused

from eapcore.attribution.attribute import attribute
from eapcore.attribution.positions import attention_edges
from eapcore.graph.attention_scores import PARTS, AttentionScores

LENGTHS = [6, 3, 8]


def literal(pair, method, zero=False):
    """q, k and v [L, H, T, T] of a pair, one head, one source and one target at a time."""
    model, config, tokens = pair.model, pair.model.config, len(pair.tokens)
    made, layers = oracle.run(model, pair.tokens), layers_of(model.weights)
    found = {part: torch.zeros(config.n_layers, config.n_heads, tokens, tokens, dtype=torch.float64) for part in PARTS}
    grads, deltas = pair.grads(made, made.senders), pair.deltas((lambda s, t: 0 * made.senders[s][t]) if zero else None)
    for layer, (heads, _) in enumerate(layers):
        scale, w = config.score_scale(layer), torch.cat(list(heads.w_qkv))
        for h in range(config.n_heads):
            sender = model.graph.sender(f"a{layer}.h{h}")
            receivers = [model.graph.receiver(f"a{layer}.h{h}<{part}>") for part in "qkv"]
            q, k, v = (made.inner[r].detach() for r in receivers)
            pattern = oracle.causal(q, k, scale).detach()
            behind = grads[sender] @ heads.w_o[h].T  # of z
            d = behind @ v.T
            if method == "peap":
                moved = [(0 if zero else pair.corrupt.inner[r].detach()) - made.inner[r].detach() for r in receivers]
            else:
                stream = sum(deltas[: model.graph.senders_before(receivers[0])])
                moved = []
                for r, part in zip(receivers, range(3), strict=True):

                    def channel(x, place=part * config.n_heads + h, heads=heads, w=w):
                        return oracle.norm(x, heads.norm, config.eps) @ w[place]

                    x = made.receivers[r].detach().requires_grad_()
                    y = channel(x)
                    along = torch.zeros_like(y).requires_grad_()  # ⟨∂y/∂x ᵀ along, stream⟩ is linear in it
                    (back,) = torch.autograd.grad(y, x, along, create_graph=True)
                    moved.append(torch.autograd.grad(back, along, stream)[0])
            dq, dk, dv = moved
            for u in range(tokens):
                jacobian = torch.diag(pattern[u]) - torch.outer(pattern[u], pattern[u])
                slope = jacobian @ d[u] * scale
                for t in range(u + 1):
                    found["v"][layer, h, t, u] = pattern[u, t] * (dv[t] @ behind[u])
                    if method == "eap":
                        found["k"][layer, h, t, u] = slope[t] * (q[u] @ dk[t])
                        found["q"][layer, h, t, u] = slope[t] * (dq[u] @ k[t])
                        continue
                    keys = k.clone()
                    keys[t] += dk[t]
                    found["k"][layer, h, t, u] = (oracle.causal(q, keys, scale)[u] - pattern[u]) @ d[u]
                    found["q"][layer, h, t, u] = (oracle.causal(q + dq, k, scale)[u, t] - pattern[u, t]) * d[u, t]
    return found


@pytest.mark.parametrize("kind", ["gpt2", "attention-only", "no LayerNorm", "one layer"])
def test_they_are_the_literal_ones(kind):
    model = random_model(**KINDS[kind] | {"n_heads": 2, "d_model": 16})
    pairs = random_pairs(model, LENGTHS, first_difference=2)
    for method, zero in (("eap", False), ("peap", False), ("eap", True), ("peap", True)):
        found = attention_edges(model, pairs, method=method, ablation="zero" if zero else "corrupt", batch_size=2)
        expected = {part: torch.zeros_like(getattr(found, part)) for part in PARTS}
        for i in range(len(pairs)):
            for part, x in literal(oracle.Pair(model, pairs, i), method, zero).items():
                expected[part][..., : x.shape[2], : x.shape[3]] += x / len(pairs)
        for part in PARTS:
            assert expected[part].abs().max() > 1e-5
            torch.testing.assert_close(getattr(found, part), expected[part], rtol=0, atol=1e-10)


def sums(found):
    """By each query's, key's and value's position, [T, L, 3H]."""
    return torch.cat([found.q.sum(2), found.k.sum(3), found.v.sum(3)], 1).permute(2, 0, 1)


def test_they_add_up_to_the_ordinary_scores():
    model = random_model()
    pairs = random_pairs(model, LENGTHS, first_difference=1)
    for ablation in ("corrupt", "zero", "mean"):
        by_position = attribute(model, pairs, reduce="position", ablation=ablation).per_position.sum(1)
        columns = torch.stack([by_position[:, model.graph.qkv(layer)] for layer in range(2)], 1)
        torch.testing.assert_close(sums(attention_edges(model, pairs, ablation=ablation)), columns, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_narrow_dtypes_come_near(dtype):
    narrow = random_model(scale=0.2, dtype=dtype)
    pairs = random_pairs(narrow, LENGTHS, first_difference=2)
    for method in ("eap", "peap"):
        exact, found = (
            torch.stack([getattr(attention_edges(m, pairs, method=method), part) for part in PARTS]).double()
            for m in (with_weights(narrow, torch.Tensor.double), narrow)
        )
        limit = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]
        assert float((found - exact).norm() / exact.norm()) <= limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_a_norm_leaves_of_a_stream_that_is_taken_away_is_no_rounding(dtype):
    """Without biases the stream moves against itself, which a norm but for its eps does not see."""
    narrow = random_model(dtype=dtype)
    narrow = with_weights(narrow, {n: 0 * x for n, x in narrow.weights.named() if n.endswith("b_o")})
    pairs = random_pairs(narrow, LENGTHS)
    exact, found = (
        torch.stack([getattr(attention_edges(m, pairs, ablation="zero"), part) for part in PARTS]).double()
        for m in (with_weights(narrow, torch.Tensor.double), narrow)
    )
    assert 0 < float(exact.norm()) < 1e-3
    limit = {torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype]
    assert float((found - exact).norm() / exact.norm()) <= limit


@pytest.mark.parametrize("scale", [0.8, 3.0])
def test_a_key_that_has_nearly_all_of_the_pattern_or_moves_far_is_exact(scale):
    """What the other keys have is then less than a rounding of 1, or underflows."""
    model = random_model(n_heads=2, scale=scale)
    pairs = random_pairs(model, [5])
    rows = [oracle.run(model, pairs.clean[0]).patterns[0, h] for h in range(2)]
    assert any(bool((row.amax(-1)[1:] > 1 - 1e-8).any()) for row in rows)
    expected = literal(oracle.Pair(model, pairs, 0), "peap")
    for weights, limit in ((model, 1e-10), (with_weights(model, torch.Tensor.float), 1e-4)):
        found = attention_edges(weights, pairs, method="peap")
        for part in PARTS:
            error = (getattr(found, part).double() - expected[part]).norm()
            assert float(error / expected[part].norm()) <= limit


def test_names_files_and_what_is_refused(tmp_path):
    model = random_model()
    pairs, seen = random_pairs(model, LENGTHS), []
    found = attention_edges(model, pairs, batch_size=2, progress=lambda *x: seen.append(x))
    (name, score), *_ = found.top(3)
    assert (
        found[name]
        == score
        == max(float(getattr(found, part).abs().max()) for part in PARTS) * (1 if score > 0 else -1)
    )
    assert seen[-1] == (3, 3) and found["a1.h2<k> 1->4"] == float(found.k[1, 2, 1, 4])
    found.save(tmp_path / "a.safetensors")
    again = AttentionScores.load(tmp_path / "a.safetensors", content_hash=model.content_hash)
    assert torch.equal(again.v, found.v) and again.meta["method"]["level"] == "attention"
    refused("an edge of attention is written like", found.__getitem__, "a1.h2<k>")
    refused("eap, peap, got 'eap-ig'", attention_edges, model, pairs, method="eap-ig")
    refused("ablation must be 'corrupt' or 'zero', got 'mean'", attention_edges, model, pairs, method="peap", ablation="mean")  # fmt: skip # noqa: E501
    refused(r"q must be \[L, H, T, T\]", AttentionScores, found.q[:1], found.k, found.v, model.graph)
