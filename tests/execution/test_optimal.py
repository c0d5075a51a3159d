"""Optimal constants are those of the literal training, miss less than means, and go wherever an ablation does."""

from __future__ import annotations

import oracle
import pytest
import torch
from everything import EVERYTHING
from models import KINDS, layers_of, lists, random_model, random_pairs
from refusal import refused

from eapcore.attribution.attribute import attribute
from eapcore.execution.ablation import Ablation
from eapcore.execution.experiment import Experiment
from eapcore.patching.nodes import patch_nodes
from eapcore.tasks import PromptPairs

LENGTHS = [5, 3, 4]


def literal(model, pairs, steps, rate):
    """Each sender's constant, one sender and one prompt at a time: [D], of heads [K]."""
    names, layers = model.graph.sender_names, layers_of(model.weights)
    prompts = [oracle.pair_at(pairs, i)[:3:2] for i in range(len(pairs))]
    clean, found = [oracle.run(model, tokens) for tokens, _ in prompts], []
    for s, name in enumerate(names):
        component, _, head = name.partition(".")
        first = oracle.components(model)[component][0]
        out = torch.eye(model.config.d_model, dtype=torch.float64)
        sent = [made.senders[s].detach() for made in clean]
        if head:
            layer, h = int(component[1:]), int(head[1:])
            out = layers[layer][0].w_o[h]
            v = model.graph.receiver(f"{name}<v>")
            sent = [(made.patterns[layer, h] @ made.inner[v]).detach() for made in clean]
        mean = sum(x.mean(0) for x in sent) / len(sent)
        width = (sum((x - mean).square().mean() for x in sent) / len(sent)).sqrt()
        theta = a = b = torch.zeros_like(mean)
        best, kept = torch.inf, mean
        for step in range(1, steps + 1):
            x, loss, slope = mean + width * theta, 0.0, torch.zeros_like(mean)
            for (tokens, position), made in zip(prompts, clean, strict=True):
                others = [e.detach() for e in made.senders[first : first + len(oracle.components(model)[component])]]
                others[s - first] = (x @ out).expand(len(tokens), -1)
                run = oracle.run(model, tokens, replaced={component: others})
                p, q = made.logits[position].detach().log_softmax(-1), run.logits[position].log_softmax(-1)
                kl = (p.exp() * (p - q)).sum() / len(prompts)
                (grad,) = torch.autograd.grad(kl, run.senders[s])
                loss, slope = loss + float(kl.detach()), slope + grad.sum(0) @ out.T
            if loss < best:
                best, kept = loss, x
            slope = slope * width
            a, b = 0.9 * a + 0.1 * slope, 0.999 * b + 0.001 * slope**2
            theta = theta - rate * (a / (1 - 0.9**step)) / ((b / (1 - 0.999**step)).sqrt() + 1e-8)
        found.append((kept @ out, best))
    return torch.stack([x for x, _ in found]), [loss for _, loss in found]


@pytest.mark.parametrize("kind", ["gpt2", "attention-only", "no LayerNorm"])
def test_they_are_those_of_the_literal_training(kind):
    model = random_model(**KINDS[kind] | {"n_heads": 2, "d_model": 12, "n_layers": 2})
    pairs, seen = random_pairs(model, LENGTHS), []
    made = Ablation.optimal(model, pairs, steps=3, rate=0.2, batch_size=2, progress=lambda *x: seen.append(x))
    expected, losses = literal(model, pairs, 3, 0.2)
    torch.testing.assert_close(made.values.senders(model)[:, 0], expected, rtol=0, atol=1e-10)
    assert seen[-1] == (3 * 3 * model.graph.n_senders,) * 2
    effects = patch_nodes(model, pairs, "kl", ablation=made).effects  # −KL of each sender alone
    torch.testing.assert_close(-effects, torch.tensor(losses, dtype=torch.float64), rtol=0, atol=1e-10)
    means = patch_nodes(model, pairs, "kl", ablation="mean").effects
    assert bool((effects >= means - 1e-12).all()) and float((effects - means).max()) > 1e-3


def test_whatever_takes_an_ablation_takes_them_and_needs_no_corrupt_prompt():
    model = random_model(n_heads=2, d_model=12)
    pairs = random_pairs(model, LENGTHS)
    alone = PromptPairs.from_lists(**lists(pairs) | {"corrupt": None}, name=pairs.name, seed=pairs.seed)
    made = Ablation.optimal(model, pairs, steps=2)
    for name in ("eap", "eap-ig", "gim", "edges", "nodes", "circuits", "acdc", "probing", "mib", "verify"):
        found = [torch.as_tensor(EVERYTHING[name](model, task, ablation=made)) for task in (pairs, alone)]
        assert float(found[0].abs().max()) > 1e-3
        torch.testing.assert_close(*found, rtol=0, atol=1e-12)
    scores = attribute(model, pairs, ablation=made)
    assert scores.meta["method"]["ablation"] == dict(made.meta)
    assert made.meta | {"loss": "kl", "steps": 2, "rate": 0.1, "n_prompts": 3} == made.meta


def test_a_name_finds_the_same_ones_again_and_their_prompts_and_positions_are_an_experiments_identity():
    model = random_model(n_heads=2, d_model=8, n_layers=1, dtype=torch.float32)
    pairs, other = random_pairs(model, LENGTHS), random_pairs(model, LENGTHS, seed=3)
    first, again = (attribute(model, pairs, ablation="optimal") for _ in range(2))
    assert torch.equal(first.scores, again.scores)
    assert first.meta["method"]["ablation"] == {
        "name": "optimal", "reference": "random", "n_prompts": 3, "prompts": "clean", "loss": "kl", "steps": 30,
        "rate": 0.1,
    }  # fmt: skip
    assert not torch.equal(attribute(model, pairs, ablation="optimal", reference=other).scores, first.scores)
    moved = PromptPairs.from_lists(**lists(pairs) | {"positions": [1, 1, 1]})
    ones = [Ablation.optimal(model, task, steps=1) for task in (pairs, moved)]
    ids = [Experiment.of(model, pairs, "nll", one).identity()["ablation"] for one in ones]
    assert ids[0] != ids[1]


def test_what_is_refused():
    model = random_model(n_heads=2, d_model=8, n_layers=1)
    pairs = random_pairs(model, LENGTHS)
    refused("steps must be an integer of at least 1, got 0", Ablation.optimal, model, pairs, steps=0)
    refused("rate must be a number above 0, got -1", Ablation.optimal, model, pairs, rate=-1)
    made = Ablation.optimal(model, pairs, steps=1)
    refused("level must not be 'neuron'", attribute, model, pairs, level="neuron", ablation=made)
    refused("belongs to the ablations mean, mean-positional, optimal", attribute, model, pairs, ablation="zero", reference=pairs)  # fmt: skip # noqa: E501
