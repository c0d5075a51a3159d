"""Scores made by other people's code, and a model trained by others, where their files lie beside the checkout."""

from __future__ import annotations

import json

import pytest
import torch
from models import SHARED
from safetensors.torch import load_file

from eapcore.attribution.attribute import attribute
from eapcore.graph.scores import EdgeScores
from eapcore.models.forward import forward
from eapcore.models.load import load
from eapcore.models.model import Model
from eapcore.tasks import PromptPairs, find_pairs

REFERENCE = SHARED / "eap-reference"
pytestmark = pytest.mark.skipif(not REFERENCE.is_dir(), reason="the reference data is not beside this checkout")


def reference(kind: str, dtype: torch.dtype) -> tuple[Model, PromptPairs, dict[str, torch.Tensor], dict]:
    folder = REFERENCE / kind
    names = json.loads((folder / "names.json").read_text())
    model = load(load_file(folder / "weights.safetensors"), config=names["cfg"], dtype=dtype)
    case = load_file(folder / "case.safetensors")
    answer = case["answer"].tolist()
    pairs = PromptPairs.from_lists(
        case["clean"].tolist(), case["corrupt"].tolist(), [a for a, _ in answer], [b for _, b in answer]
    )
    return model, pairs, case, names


def in_our_order(scores: torch.Tensor, names: dict, model: Model) -> torch.Tensor:
    """Another package's [senders, receivers] as ours; it keeps rows and columns for MLPs that a model has not."""
    ours = torch.zeros(model.graph.n_senders, model.graph.n_receivers, dtype=scores.dtype)
    for i, sender in enumerate(names["senders"]):
        for j, receiver in enumerate(names["receivers"]):
            if model.config.attn_only and (sender[0] == "m" or receiver[0] == "m"):
                continue
            ours[model.graph.sender(sender.replace("input", "embed")), model.graph.receiver(receiver)] = scores[i, j]
    return ours


@pytest.mark.parametrize("kind", ["gpt2-like", "attn-only"])
def test_logits_equal_the_published_ones(kind):
    model, pairs, case, _ = reference(kind, torch.float64)
    for prompts, key in ((pairs.clean, "clean_logits"), (pairs.corrupt, "corrupt_logits")):
        error = float((forward(model, prompts) - case[key]).abs().max())
        print(f"{kind} {key}: largest difference {error:.1e}")
        assert error <= 1e-10


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("kind", ["gpt2-like", "attn-only"])
def test_eap_scores_equal_other_peoples_in_float64(kind, batch_size):
    model, pairs, case, names = reference(kind, torch.float64)
    expected = in_our_order(case["eap"], names, model)
    scores: EdgeScores = attribute(model, pairs, "logit_diff", batch_size=batch_size)
    error = float((scores.scores - expected).abs().max())
    print(f"{kind}: largest difference {error:.1e} of scores up to {float(expected.abs().max()):.2f}")
    assert error <= 1e-10
    assert float(expected.abs().sum()) == pytest.approx(float(case["eap"].abs().sum()), rel=1e-12)
    assert torch.equal(scores.mask, in_our_order(case["edge_mask"].double(), names, model) > 0)


@pytest.mark.parametrize(("key", "options"), [
    ("eap_ig_inputs_5", {"method": "eap-ig", "steps": 5, "points": "left"}),
    ("clean_corrupt", {"method": "clean-corrupt"}),
])  # fmt: skip
@pytest.mark.parametrize("storage", ["dense", "factored"])
@pytest.mark.parametrize("kind", ["gpt2-like", "attn-only"])
def test_other_methods_equal_other_peoples_in_float64(kind, key, options, storage):
    model, pairs, case, names = reference(kind, torch.float64)
    expected = in_our_order(case[key], names, model)
    error = float((attribute(model, pairs, **options, storage=storage).scores - expected).abs().max())
    print(f"{kind} {key} {storage}: largest difference {error:.1e}")
    assert error <= 1e-10


@pytest.mark.parametrize("kind", ["gpt2-like", "attn-only"])
def test_eap_scores_equal_other_peoples_in_float32(kind):
    model, pairs, case, names = reference(kind, torch.float32)
    expected = in_our_order(case["eap"], names, model)
    error = float((attribute(model, pairs, "logit_diff").scores - expected).norm() / expected.norm())
    print(f"{kind} in float32: relative difference {error:.1e}")
    assert error <= 1e-4


def test_gpt_nano_sort_is_scored_on_its_task():
    model = load(SHARED / "gpt-nano-sort")
    pairs = find_pairs("sort", n=200, seed=0)
    scores = attribute(model, pairs)
    assert scores.meta["metric"]["clean"] > 5 > -5 > scores.meta["metric"]["corrupt"]
    assert float(scores.scores.abs().max()) > 1
