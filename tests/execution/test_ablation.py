"""Tasks without corrupt prompts: every method that ablates with zero or a mean runs on them, the others say why not."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from everything import EVERYTHING
from models import lists, random_circuit, random_model, random_pairs
from refusal import refused

from eapcore.attribution.attribute import attribute
from eapcore.attribution.methods import METHODS
from eapcore.patching.circuits import run_circuit
from eapcore.patching.edges import patch_edges
from eapcore.tasks import PromptPairs

LENGTHS = [6, 3, 5]


@pytest.fixture
def model():
    return random_model(n_heads=2, d_model=12)


@pytest.fixture
def pairs(model):
    return random_pairs(model, LENGTHS)


def without_corrupt(pairs):
    given = lists(pairs) | {"corrupt": None}
    return PromptPairs.from_lists(**given, name=pairs.name, seed=pairs.seed)


RUNS = {name: run for name, run in EVERYTHING.items() if name not in METHODS or METHODS[name].ablations}


@pytest.mark.parametrize("ablation", ["zero", "mean", "mean-positional"])
@pytest.mark.parametrize("name", RUNS)
def test_an_ablation_needs_no_corrupt_prompt(model, pairs, name, ablation):
    given = torch.as_tensor(RUNS[name](model, pairs, ablation=ablation), dtype=torch.float64)
    alone = torch.as_tensor(RUNS[name](model, without_corrupt(pairs), ablation=ablation), dtype=torch.float64)
    assert float(given.abs().max()) > 1e-3
    torch.testing.assert_close(alone, given, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", RUNS)
def test_the_corrupt_prompt_is_asked_for_where_it_is_the_ablation(model, pairs, name):
    message = r"clean and corrupt of pair 0 are identical: every score would be zero; without corrupt prompts choose"
    refused(message, RUNS[name], model, without_corrupt(pairs))


def test_prompts_that_differ_behind_the_answer_alone_are_no_corrupt_prompts(model):
    late = random_pairs(model, LENGTHS, first_difference=2)
    late = dataclasses.replace(late, positions=torch.tensor([3, 2, 1]))
    refused("of pair 2 are identical up to position 1, where the metric reads", attribute, model, late)
    assert bool(attribute(model, late, ablation="zero").scores.isfinite().all())


def test_tokens_alone_need_no_corrupt_ones(model, pairs):
    tokens = pairs.clean[:, :3]
    same = attribute(model, (tokens, tokens), lambda logits: logits[:, 3], ablation="mean")
    assert float(same.scores.abs().max()) > 1e-3


@pytest.mark.parametrize("positions", [torch.tensor([1, 3, 2]), torch.tensor([1, -1, 2])])
def test_a_position_outside_its_prompt_is_named(model, pairs, positions):
    outside = dataclasses.replace(pairs, positions=positions)
    message = rf"the position {int(positions[1])} of pair 1 is outside its prompt of 3 tokens"
    for call in (attribute, patch_edges, lambda m, p: run_circuit(m, p, random_circuit(m.graph))):
        refused(message, call, model, outside)


def test_fields_that_do_not_belong_together_are_named(model, pairs):
    whole = {"clean": "N, T", "corrupt": "N, T", "lengths": "N", "positions": "N", "answers": "N, A", "wrong": "N, W"}
    for name, axes in whole.items():
        x = getattr(pairs, name)
        for other in (x[:2], x[None], x.double(), x.bool(), x.tolist(), x.numpy(), x.to("meta"), None):
            if name == "clean" and torch.is_tensor(other) and other.shape == x[:2].shape:
                continue  # then the others are too many
            wrong = dataclasses.replace(pairs, **{name: other})
            for call, *given in ((attribute, wrong), (run_circuit, wrong, random_circuit(model.graph))):
                refused(
                    rf"{name} must be an int64 tensor \[{axes}\].*, got .*: from_lists makes it", call, model, *given
                )
    longer = dataclasses.replace(pairs, lengths=pairs.lengths + 5)
    for how in ({"task": longer}, {"task": pairs, "ablation": "mean", "reference": longer}):
        refused("lengths must be from 1 to the .* tokens of a row, but pair 0 has", attribute, model, **how)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("ablation", ["zero", "mean", "mean-positional"])
def test_half_precision_takes_every_ablation_with_every_method_and_storage(dtype, ablation):
    exact, narrow = (random_model(n_heads=2, scale=0.2, dtype=of) for of in (torch.float64, dtype))
    pairs, points = random_pairs(exact, [5, 7, 6, 7]), {"points": [(0.5, 0.5), (1.0, 0.5)]}
    chosen = [(method, {}) for method in ("eap", "eap-ig-activations", "relp", "qk-fix", "atp-star")]
    for method, more in [*chosen, ("eap-ig", points)]:
        near_zero = ablation == "zero" and method in ("qk-fix", "atp-star")  # norms of streams that are nearly zero
        expected = attribute(exact, pairs, method=method, ablation=ablation, **more).scores
        for storage in ("dense", "factored"):
            got = attribute(narrow, pairs, method=method, ablation=ablation, storage=storage, **more).scores
            assert (got - expected).norm() < (0.3 if near_zero else 0.1) * expected.norm(), (method, storage)
