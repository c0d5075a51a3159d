"""Prefix, clean and corrupt prompts run as rows of one matrix make what they make when they run one after the other."""

from __future__ import annotations

import pytest
import torch
from models import KINDS, random_case, random_model, random_pairs, tensors_of, with_weights

from eapcore.models.forward import embed, prefix, run_stages
from eapcore.models.paired import run_paired
from eapcore.models.tensors import at_positions


def parts_of(run):
    """All tensors of what a stage made, by the path of fields to them."""
    return dict(tensors_of({name: getattr(run, name) for name in ("attention", "mlp", "out")}))


@pytest.mark.parametrize("told", [True, False], ids=["difference given", "computed"])
@pytest.mark.parametrize("first", [0, 1, 5])
@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_every_stage_makes_what_it_makes_alone(options, first, told):
    model, pairs = random_case([7, 7, 6], first_difference=first, **options)
    read = pairs.positions[:, None] - first
    both = torch.cat([embed(model, prompts[:, first:], first) for prompts in (pairs.clean, pairs.corrupt)])
    past = prefix(model, pairs.clean[:, :first])
    expected = list(run_stages(model, both, past=past, read=read.repeat(2, 1)))
    asked = []

    def moved(index, z):
        asked.append((index, z.shape))
        clean, corrupt = (model.attentions[index].added_by(part) for part in z.tensor_split(2))
        return corrupt - clean if told else None

    start = embed(model, pairs.clean[:, :first])
    for run, before in run_paired(model, start, both, read, moved):
        alone = expected.pop(0)
        ours, theirs = parts_of(run), parts_of(alone)
        assert run.stage == alone.stage and ours.keys() == theirs.keys()
        if run.attention is not None:
            assert asked[-1] == (run.stage.index, alone.attention.z.shape)
            if past is None:
                assert before is None
            else:
                torch.testing.assert_close(before, past[run.stage.index], rtol=0, atol=1e-12)
        if told and run.mlp is not None:  # in place of what the corrupt ones send
            clean, corrupt = theirs["['mlp'].sent"].tensor_split(2)
            theirs["['mlp'].sent"] = torch.cat([clean, corrupt - clean])
        for path, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[path], rtol=0, atol=1e-12, msg=lambda m, p=path: f"{p}: {m}")
    assert not expected and [index for index, _ in asked] == list(range(model.config.n_layers))
    assert at_positions(both, read.repeat(2, 1)).shape == run.out.shape


def differences(model, pairs):
    """Δ of layer 0's mixtures of v as `moved` gets them, and of what its MLP sends."""
    found = []

    def moved(index, z):
        clean, corrupt = z.tensor_split(2)
        found.append(corrupt - clean)
        return model.attentions[index].added_by(corrupt - clean)

    read, none = pairs.positions[:, None], embed(model, pairs.clean[:, :0])
    start = torch.cat([embed(model, prompts) for prompts in (pairs.clean, pairs.corrupt)])
    runs = run_paired(model, none, start, read, moved)
    z, mlp = next(runs)[0].attention.z, next(runs)[0].mlp.sent
    return found[0], mlp.tensor_split(2)[1], z, mlp


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_differences_are_taken_before_anything_is_rounded_to_half_precision(dtype):
    """What both runs have in common is so large that half precision has steps of 4, as large as the differences."""
    common = {torch.bfloat16: 512.0, torch.float16: 4096.0}[dtype]
    model = random_model(normalization=None, scale=0.3)
    heads, half = model.config.n_heads, model.config.d_model // 2
    weights = {name: x.clone() for name, x in model.weights.named()}
    w_qkv, w_e, w_pos = (weights[name] for name in ("layers.0.w_qkv.0", "w_e", "w_pos"))
    w_qkv[: 2 * heads, half:] = 0
    w_qkv[2 * heads :, :half] = 0  # v is made of positions alone, and so the same in both runs; and exact
    w_qkv[2 * heads :, half:] = w_qkv[2 * heads :, half:].sign()
    w_e[:, half:], w_pos[:, :half], w_pos[:, half:] = 0, 0, 2 * w_pos[:, half:].sign() + 2
    weights["layers.0.b_qkv"][2 * heads :] = common
    weights["layers.0.b_out"] += common
    weights["layers.0.w_o"] *= 0  # the MLP does not read attention's output, which has the common part
    narrow = with_weights(with_weights(model, weights), lambda x: x.to(dtype))
    pairs = random_pairs(model, [7, 7, 7])
    expected = differences(with_weights(narrow, torch.Tensor.double), pairs)[:2]
    z, mlp, both, sent = differences(narrow, pairs)
    assert both.dtype == torch.float32 and sent.dtype == dtype

    def error(found, exact):
        return float((found.double() - exact).norm() / exact.norm())

    assert error(z, expected[0]) < 0.05
    assert error(mlp, expected[1]) < 0.05
    late = [part.to(dtype) for part in both.tensor_split(2)]
    assert error(late[1] - late[0], expected[0]) > 0.3  # as it would be if z were rounded first
    _, alone, *_ = run_stages(narrow, torch.cat([embed(narrow, x) for x in (pairs.clean, pairs.corrupt)]))
    clean, corrupt = alone.mlp.sent.tensor_split(2)
    assert error(corrupt - clean, expected[1]) > 0.2
