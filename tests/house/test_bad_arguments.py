"""What Python calls are given by mistake: taken where it can only mean one thing, else refused in a short sentence."""

from __future__ import annotations

import eapcore.kernels as kernels
import numpy as np
import pytest
import torch
from models import random_model
from refusal import refused

import eapcore
from eapcore import Circuit, Graph, PromptPairs
from eapcore.graph.scores import NodeScores

MODEL = random_model(n_heads=2, d_model=16, dtype=torch.float32)
GRAPH = MODEL.graph
PAIRS = PromptPairs.from_lists([[1, 2, 3]], [[1, 4, 3]], [5], [6])
SCORES = eapcore.attribute(MODEL, PAIRS)


@pytest.mark.parametrize("kind", [
    np.array, torch.tensor, tuple, lambda x: [np.array(row) for row in x], lambda x: [torch.tensor(row) for row in x],
    lambda x: np.array(x, dtype=np.uint8), lambda x: torch.tensor(x, dtype=torch.int32),
])  # fmt: skip
def test_token_ids_may_be_lists_arrays_or_tensors(kind):
    expected = PromptPairs.from_lists([[1, 2], [3, 4]], [[1, 5], [3, 6]], [7, 8], [[9], [10]], positions=[1, 0])
    clean, corrupt, answers, wrong, positions = map(
        kind, ([[1, 2], [3, 4]], [[1, 5], [3, 6]], [7, 8], [[9], [10]], [1, 0])
    )
    found = PromptPairs.from_lists(clean, corrupt, answers, wrong, positions=positions)
    for name in ("clean", "corrupt", "lengths", "positions", "answers", "wrong"):
        assert torch.equal(getattr(found, name), getattr(expected, name))


@pytest.mark.parametrize(("lists", "match"), [
    (([[1.5, 2]], [[1, 3]], [4]), "clean of pair 0 must be integers, got 1.5"),
    (([[1, 2]], np.array([[1.0, 3.0]]), [4]), "corrupt of pair 0 must be integers, got 1.0"),
    (([[True, 2]], [[1, 3]], [4]), "clean of pair 0 must be integers, got True"),
    (([[1, 2]], [[1, 3]], [4.0]), "answers of pair 0 must be integers, got 4.0"),
    (([[1, 2]], [[1, 3]], [" Mary"]), "answers of pair 0 is text, ' Mary', .* from_text takes text"),
    ((["a b"], ["a c"], [4]), "clean of pair 0 is text, 'a b', .* from_text takes text"),
    (([["a", "b"]], [["a", "c"]], [4]), "clean of pair 0 must be integers, got 'a': from_text takes text"),
    (([1, 2], [1, 3], [4, 4]), "clean of pair 0 must be a list of token ids, got 1"),
    (("ab", "ac", [4, 4]), "clean must be a list with one entry a pair, got 'ab'"),
    ((None,), "clean must be a list with one entry a pair, got None"),
    (([[2**70]], [[1]], [4]), "clean of pair 0 has 1180591620717411303424, which is no token id"),
    ((np.array([]),), "is empty: at least one prompt pair is needed"),
], ids=str)  # fmt: skip
def test_what_are_no_token_ids_is_refused(lists, match):
    refused(match, PromptPairs.from_lists, *lists)


def test_a_task_and_tokens_may_be_arrays():
    expected = eapcore.attribute(MODEL, (torch.tensor([[1, 2]]), torch.tensor([[1, 3]])), lambda x: x[:, 4]).scores
    for kind in (np.array, list):
        task = (kind([[1, 2]]), kind([[1, 3]]))
        assert torch.equal(eapcore.attribute(MODEL, task, lambda x: x[:, 4]).scores, expected)
        assert eapcore.run_with_senders(MODEL, kind([[1, 2]]))[0].shape == (1, 2, 29)
    for wrong in ([[1.5, 2]], "a b", None, [[1], [2, 3]]):
        refused("must be", eapcore.run_with_senders, MODEL, wrong)


def test_results_take_arrays_and_lists_and_keep_no_gradients():
    expected, leaf = SCORES.scores.double(), SCORES.scores.double().requires_grad_()
    for given in (expected.numpy(), expected.tolist(), leaf):
        made = eapcore.EdgeScores(given, GRAPH, standard_error=given, exact=(expected > 0).tolist())
        assert torch.equal(made.scores, expected) and torch.equal(made.standard_error, expected)
        assert not made.scores.requires_grad and made.exact.dtype == torch.bool and made.top(2) == SCORES.top(2)
        assert Circuit((expected > 0).numpy(), GRAPH).n_edges == int((expected > 0).sum())
        assert torch.equal(NodeScores(given[0][:7], Graph(2, 2, True)).scores, expected[0][:7])


CALLS = {
    "scores of no graph": (lambda: eapcore.EdgeScores(SCORES.scores, None), "graph must be a Graph, got a NoneType"),
    "scores as text": (lambda: eapcore.EdgeScores("abc", GRAPH), "scores must be"),
    "ragged scores": (lambda: eapcore.EdgeScores([[1.0], [1.0, 2.0]], GRAPH), "scores must be a tensor or an array"),
    "scores of truths": (lambda: eapcore.EdgeScores(SCORES.mask, GRAPH), "scores must be real numbers with values"),
    "scores without values": (
        lambda: eapcore.EdgeScores(SCORES.scores.to("meta"), GRAPH), "scores must be real numbers with values"
    ),
    "complex scores": (lambda: eapcore.EdgeScores(SCORES.scores + 0j, GRAPH), "scores must be real numbers"),
    "a graph of no layers": (lambda: Graph(0, 2, True), "n_layers must be a positive integer, got 0"),
    "a graph of half a layer": (lambda: Graph(2.5, 2, True), "n_layers must be a positive integer, got 2.5"),
    "heads as text": (lambda: Graph(2, "2", True), "n_heads must be a positive integer, got '2'"),
    "negative heads": (lambda: Graph(2, -2, True), "n_heads must be a positive integer, got -2"),
    "MLPs as a number": (lambda: Graph(2, 2, 1), "has_mlp must be True or False, got 1"),
    "groups that do not divide": (lambda: Graph(2, 4, True, n_kv=3), "must be a multiple of its n_kv, got 3"),
    "a graph of 10⁹ layers": (lambda: Graph(10**9, 12, True), "more than any machine holds scores of"),
    "an edge as a number": (lambda: SCORES[3], "an edge is written sender->receiver, .* got 3"),
    "an edge of a million letters": (lambda: GRAPH.edge("x" * 10**6), "an edge is written"),
    "a layer of 5,000 digits": (lambda: GRAPH.edge(f"a{'9' * 5000}.h0->logits"), "a sender is embed or"),
    "edges as one text": (lambda: Circuit.from_edges(GRAPH, "embed->logits"), "edges must be a list of names"),
    "a mask of another shape": (lambda: Circuit(torch.ones(2, 2, dtype=torch.bool), GRAPH), r"must be bool \[S, R\]"),
    "a mask of numbers": (lambda: Circuit(torch.ones(SCORES.scores.shape), GRAPH), "mask must be bool"),
    "a circuit of what are no edges": (
        lambda: eapcore.run_circuit(MODEL, PAIRS, Circuit(torch.ones_like(SCORES.mask), GRAPH)),
        r"a circuit has edges of .*, but \d+ places of its mask are none",
    ),
    "less than none": (lambda: SCORES.top(-1), "n must be an integer of at least 0, got -1"),
    "half an edge": (lambda: SCORES.top_n(2.5), "n must be an integer of at least 0, got 2.5"),
    "a threshold as text": (lambda: SCORES.threshold("x"), "threshold must be a number, got 'x'"),
    "100,000 steps": (
        lambda: eapcore.attribute(MODEL, PAIRS, method="eap-ig", steps=10**5), "at most 1000 by the rule gauss"
    ),
    "10⁶ midpoints": (
        lambda: eapcore.attribute(MODEL, PAIRS, method="eap-ig", steps=10**6, points="midpoint"),
        "steps must be at most 10000 by the rule midpoint",
    ),
    "an ablation as a number": (lambda: eapcore.attribute(MODEL, PAIRS, ablation=3), "ablation must be .* got 3"),
    "a list of runs": (lambda: eapcore.attribute(MODEL, PAIRS, gradient_at=[1]), r"gradient_at must be .* got \[1\]"),
    "no model": (lambda: eapcore.attribute("gpt2", PAIRS), "model must be a Model, as eapcore.load returns, got a str"),
    "a model without memory": (
        lambda: eapcore.attribute(eapcore.load("toy-ioi", device="meta"), PAIRS), "it is for planning alone"
    ),
    "a method of a million letters": (lambda: eapcore.attribute(MODEL, PAIRS, method="x" * 10**6), "method must be"),
    "a negative batch": (
        lambda: eapcore.dense_bytes(MODEL.config, batch=-1, tokens=3, dtype=torch.float32), "batch must be an integer"
    ),
    "a model for its sizes": (
        lambda: eapcore.dense_bytes(MODEL, batch=1, tokens=3, dtype=torch.float32), "a ModelConfig, as model.config is"
    ),
    "tokens without values": (
        lambda: eapcore.attribute(MODEL, (PAIRS.clean.to("meta"), PAIRS.corrupt)), "tokens with values, .* meta device"
    ),
    "a dtype as text": (
        lambda: eapcore.dense_bytes(MODEL.config, batch=1, tokens=3, dtype="x"), "dtype must be one of torch.float64"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CALLS)
def test_a_wrong_argument_is_one_short_sentence(case):
    call, match = CALLS[case]
    assert len(refused(match, call)) < 600


@pytest.mark.parametrize("device", ["mps", "privateuseone", "cuda:99", "nothing", [], 3])
def test_a_device_that_is_not_here_is_one_short_sentence(device):
    if torch.cuda.is_available() and device == 3:
        pytest.skip("3 is a GPU's number")
    assert (
        len(refused("device .* cannot be used here", eapcore.load, "toy-ioi", device=device, error=RuntimeError)) < 200
    )


def test_out_has_memory_of_its_own():
    g, weight, memory = torch.randn(2, 1, 3, 8), torch.randn(2, 16, 8), torch.randn(200)
    act, out = torch.randn_like(g), memory[:96].view(2, 1, 3, 16)
    norm, x_hat = kernels.Norm("none"), memory[90:138].view(1, 3, 16)
    overlapping = {
        "g": {"g": memory[40:88].view(2, 1, 3, 8), "act": act, "norm": norm},
        "act": {"g": g, "act": memory[95:143].view(2, 1, 3, 8), "norm": norm},
        "norm.x_hat": {
            "g": g,
            "act": act,
            "norm": kernels.Norm("rmsnorm", x_hat, torch.ones(1, 3)),
            "offset": g[0, 0, :2],
        },
    }
    for impl in ("reference", "auto"):
        for name, given in overlapping.items():
            refused(f"overlaps {name},", kernels.receiver_grads, weight=weight, out=out, impl=impl, **given)
        beside = memory[96:144].view(2, 1, 3, 8)
        kernels.receiver_grads(beside, act, weight, norm=norm, out=out, impl=impl)
        leaf = torch.empty(2, 1, 3, 16, requires_grad=True)
        refused(
            "out must not require gradients", kernels.receiver_grads, g, act, weight, norm=norm, out=leaf, impl=impl
        )
