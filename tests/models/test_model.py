"""A model's content hash tells apart what computes differently, and nothing else."""

from __future__ import annotations

import dataclasses

import torch
from models import random_model, random_pairs, with_weights

import eapcore
import eapcore.models.weights as weights


def test_the_hash_does_not_depend_on_how_q_k_and_v_are_stored():
    model = random_model()
    w = model.attentions[0].w_qkv[0]
    parts = {f"layers.0.w_qkv.{i}": part.contiguous() for i, part in enumerate(w.split(model.config.n_heads))}
    assert len(parts) == 3
    assert with_weights(model, parts).content_hash == model.content_hash
    assert with_weights(model, {"layers.0.w_qkv.0": w.contiguous()}).content_hash == model.content_hash


def test_the_hash_does_not_depend_on_how_much_is_hashed_at_a_time(monkeypatch):
    expected = random_model().content_hash
    monkeypatch.setattr(weights, "_HASH_BYTES", 1000)
    assert random_model().content_hash == expected


def test_every_single_weight_changes_the_hash():
    model = random_model(n_layers=1)
    hashes = {model.weights.content_hash()}
    names = [name for name, _ in model.weights.named()]
    for _name, tensor in model.weights.named():
        index = (0,) * tensor.ndim
        old = tensor[index].clone()
        tensor[index] += 1e-9
        hashes.add(model.weights.content_hash())
        tensor[index] = old
    assert model.weights.content_hash() in hashes
    assert len(hashes) == len(names) + 1 == 19


def test_the_hash_tells_apart_what_the_same_weights_compute():
    model = random_model()
    changes = [{"act_fn": "relu"}, {"attn_scale": 1.0}, {"eps": 1e-6}, {"scale_attn_by_inverse_layer_idx": True}]
    changes += [{"parallel": True}, {"rotary_frequencies": (1.0,)}]
    others = [with_weights(model, {}, dataclasses.replace(model.config, **change)) for change in changes]
    assert len({m.content_hash for m in (model, *others)}) == 1 + len(changes)


def test_the_hash_tells_dtypes_a_tied_head_and_transposed_weights_apart():
    model = random_model(d_model=24, d_vocab=24)
    tied = with_weights(model, {"w_u": model.weights.w_e.T})
    turned = with_weights(model, {"w_u": model.weights.w_u.T})
    single = random_model(d_model=24, d_vocab=24, dtype=torch.float32)
    assert len({m.content_hash for m in (model, tied, turned, single)}) == 4


def test_weights_that_stay_are_hashed_once_however_often_they_are_scored(monkeypatch):
    model, hashed = random_model(), []
    real = weights.Weights.content_hash
    monkeypatch.setattr(weights.Weights, "content_hash", lambda self: hashed.append(1) or real(self))
    pairs = random_pairs(model, [5, 5])
    metas = [eapcore.attribute(model, pairs).meta for _ in range(3)]
    assert len(hashed) == 1
    model.weights.w_u.mul_(1.5)
    metas.append(eapcore.attribute(model, pairs).meta)
    assert len(hashed) == 2
    hashes = [meta["model"]["content_hash"] for meta in metas]
    assert hashes[0] == hashes[1] == hashes[2] != hashes[3] == model.content_hash
