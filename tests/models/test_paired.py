"""Prefix, clean and corrupt prompts run as rows of one matrix make what they make when they run one after the other."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from models import KINDS, random_model, random_pairs

from eapcore.models.activations import at_positions
from eapcore.models.attention import attention_output
from eapcore.models.forward import embed, prefix, run_layers
from eapcore.models.paired import run_paired


def tensors(value):
    """All tensors of a run, by the path of fields to them."""
    if value is None or isinstance(value, torch.Tensor):
        return {"": value}
    parts = dict(enumerate(value)) if isinstance(value, tuple) else {n: getattr(value, n) for n in value.__slots__}
    return {f".{name}{path}": t for name, part in parts.items() for path, t in tensors(part).items()}


@pytest.mark.parametrize("told", [True, False], ids=["difference given", "computed"])
@pytest.mark.parametrize("first", [0, 1, 5])
@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_every_layer_makes_what_it_makes_alone(options, first, told):
    model = random_model(**options)
    pairs = random_pairs(model, [7, 7, 6], first_difference=first)
    read = pairs.positions[:, None] - first
    both = torch.cat([embed(model, prompts[:, first:], first) for prompts in (pairs.clean, pairs.corrupt)])
    past = prefix(model, pairs.clean[:, :first])
    expected = list(run_layers(model, both, past=past, read=read.repeat(2, 1)))
    asked = []

    def moved(index, z):
        asked.append((index, z.shape))
        layer = model.weights.layers[index]
        clean, corrupt = (attention_output(layer, part) for part in z.tensor_split(2))
        return corrupt - clean if told else None

    start = embed(model, pairs.clean[:, :first])
    for index, (run, before) in enumerate(run_paired(model, start, *both.tensor_split(2), read, moved)):
        assert asked[index] == (index, expected[index].z.shape)
        ours, theirs = tensors(run), tensors(expected[index])
        assert ours.keys() == theirs.keys()
        if told and run.mlp is not None:  # in place of what the corrupt ones send
            clean, corrupt = theirs[".mlp"].tensor_split(2)
            theirs[".mlp"] = torch.cat([clean, corrupt - clean])
        for path, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[path], rtol=0, atol=1e-12, msg=lambda m, p=path: f"{p}: {m}")
        if past is None:
            assert before is None
        else:
            torch.testing.assert_close(before, past[index], rtol=0, atol=1e-12)
    assert len(asked) == len(expected) == model.config.n_layers
    assert at_positions(both, read.repeat(2, 1)).shape == run.out.shape


def as_dtype(value, dtype):
    """A model or a part of one with all tensors in another dtype."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype)
    if isinstance(value, tuple):
        return tuple(as_dtype(part, dtype) for part in value)
    if dataclasses.is_dataclass(value):
        parts = {f.name: as_dtype(getattr(value, f.name), dtype) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **parts)
    return value


def differences(model, pairs):
    """Δ of layer 0's mixtures of v as `moved` gets them, and of what its MLP sends."""
    found = []

    def moved(index, z):
        clean, corrupt = z.tensor_split(2)
        found.append(corrupt - clean)
        return attention_output(model.weights.layers[index], corrupt - clean)

    read, none = pairs.positions[:, None], embed(model, pairs.clean[:, :0])
    run, _ = next(run_paired(model, none, embed(model, pairs.clean), embed(model, pairs.corrupt), read, moved))
    return found[0], run.mlp.tensor_split(2)[1], run


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_differences_are_taken_before_anything_is_rounded_to_half_precision(dtype):
    """What both runs have in common is so large that half precision has steps of 4, as large as the differences."""
    common = {torch.bfloat16: 512.0, torch.float16: 4096.0}[dtype]
    model = random_model(normalization=None, scale=0.3)
    heads, half = model.config.n_heads, model.config.d_model // 2
    first = model.weights.layers[0]
    w_qkv = first.w_qkv[0].clone()
    w_qkv[: 2 * heads, half:] = 0
    w_qkv[2 * heads :, :half] = 0  # v is made of positions alone, and so the same in both runs; and exact
    w_qkv[2 * heads :, half:] = w_qkv[2 * heads :, half:].sign()
    b_qkv, b_out = first.b_qkv.clone(), first.b_out + common
    w_e, w_pos = model.weights.w_e.clone(), model.weights.w_pos.clone()
    w_e[:, half:], w_pos[:, :half], w_pos[:, half:] = 0, 0, 2 * w_pos[:, half:].sign() + 2
    b_qkv[2 * heads :] = common
    # The MLP does not read attention's output, which has the common part.
    layers = (dataclasses.replace(first, w_qkv=(w_qkv,), b_qkv=b_qkv, b_out=b_out, w_o=first.w_o * 0),)
    weights = dataclasses.replace(model.weights, w_e=w_e, w_pos=w_pos, layers=layers + model.weights.layers[1:])
    narrow = as_dtype(dataclasses.replace(model, weights=weights), dtype)
    pairs = random_pairs(model, [7, 7, 7])
    expected = differences(as_dtype(narrow, torch.float64), pairs)[:2]
    z, mlp, run = differences(narrow, pairs)
    assert run.z.dtype == torch.float32 and run.mlp.dtype == run.out.dtype == dtype

    def error(found, exact):
        return float((found.double() - exact).norm() / exact.norm())

    assert error(z, expected[0]) < 0.05
    assert error(mlp, expected[1]) < 0.05
    late = [part.to(dtype) for part in run.z.tensor_split(2)]
    assert error(late[1] - late[0], expected[0]) > 0.3  # as it would be if z were rounded first
    alone = next(iter(run_layers(narrow, torch.cat([embed(narrow, x) for x in (pairs.clean, pairs.corrupt)]))))
    clean, corrupt = alone.mlp.tensor_split(2)
    assert error(corrupt - clean, expected[1]) > 0.2
