"""Prefix, clean and corrupt prompts run as rows of one matrix make what they make when they run one after the other."""

from __future__ import annotations

import pytest
import torch
from models import KINDS, random_model, random_pairs

from eapcore.model import at_positions, attention_output, embed, prefix, run_layers
from eapcore.paired import run_paired


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
        for path, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[path], rtol=0, atol=1e-12, msg=lambda m, p=path: f"{p}: {m}")
        if past is None:
            assert before is None
        else:
            torch.testing.assert_close(before, past[index], rtol=0, atol=1e-12)
    assert len(asked) == len(expected) == model.config.n_layers
    assert at_positions(both, read.repeat(2, 1)).shape == run.out.shape
