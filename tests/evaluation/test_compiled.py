"""Models that are compiled from programs compute them, through the edges that are known, and methods find these."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
from models import ROOT, lists

import eapcore
from eapcore.evaluation.screened import attribute, little_more
from eapcore.patching.edges import patch_edges
from eapcore.tasks import PromptPairs
from eapcore.tasks.files import read_pairs

sys.path.insert(0, str(ROOT / "bench"))
import bench_truth
from truth.areas import THRESHOLDS, WAYS, area, suits
from truth.compiled import LONGEST, PROGRAMS, Compiled

COMPILED = {name: Compiled(name) for name in PROGRAMS}
COUNTS = {"same-as-before": (7, 4, 1), "frac-prevs": (5, 3, 0), "parity": (11, 5, 2), "count": (6, 4, 0)}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_model_computes_its_program_on_every_prompt(name):
    of = COMPILED[name]
    prompts = list(itertools.product(of.program.values, repeat=LONGEST))
    logits, _ = eapcore.run_with_senders(of.model, torch.tensor([of.ids(prompt) for prompt in prompts]))
    expected = [[of.program.logits(prompt[: n + 1]) for n in range(LONGEST)] for prompt in prompts]
    assert torch.allclose(logits[:, 1:], torch.tensor(expected), atol=1e-5)


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_true_edges_are_those_without_which_a_program_says_something_else(name):
    of = COMPILED[name]
    assert (of.circuit.n_edges, of.reached.n_edges, len(of.idle)) == COUNTS[name]
    weights = torch.linspace(1, 2, of.model.config.n_logits, dtype=torch.float64)

    def said(logits):  # of which the changes of several logits, or prompts, do not cancel
        return (logits.double() * weights).square().sum(-1)

    lengths = range(of.program.least, 5)
    prompts = [of.ids(prompt) for n in lengths for prompt in itertools.product(of.program.values, repeat=n)]
    every = PromptPairs.from_lists(prompts, answers=[0] * len(prompts))
    without = patch_edges(of.model, every, said, ablation="zero").scores.abs()
    assert torch.equal(without > 1e-4, of.circuit.mask) and float(without[~of.circuit.mask].max()) == 0


@pytest.mark.parametrize("name", PROGRAMS)
def test_other_tokens_reach_the_edges_whose_directions_depend_on_tokens(name):
    of = COMPILED[name]
    pairs = of.draw(48, 1)
    effects = patch_edges(of.model, pairs).scores.abs()
    assert torch.equal(effects > 1e-3, of.reached.mask) and float(effects[~of.reached.mask].max()) == 0
    assert {kind for kinds in of.carries.values() for kind in kinds} <= {"tokens", "positions", "constants"}
    assert set(of.carries) == {*of.circuit.edges, *of.idle}
    assert all("constants" in of.carries[edge] and len(of.carries[edge]) == 1 for edge in of.idle)
    read = read_pairs(of.folder / "pairs.jsonl")
    assert lists(read) == lists(of.draw(32, 0)) and bool((pairs.clean != pairs.corrupt).sum(1).eq(1).all())


def test_the_defaults_find_the_edges():
    """The command's choice and the package's; the edges of a saturated softmax and of steps have no gradient."""
    for name, of in COMPILED.items():
        pairs = of.draw(24, 2)
        exact = WAYS["exact patching"](of, pairs, "corrupt")
        assert area(exact, of, of.reached) == 1 and 0.5 < area(exact, of, of.circuit) < 1
        for how in ({}, little_more(of.model, pairs, "logit_diff")):
            assert area(attribute(of.model, pairs, **how), of, of.reached) >= (0.6 if name == "count" else 1)
        assert area(attribute(of.model, pairs, method="screened"), of, of.reached) == 1


def test_every_method_has_its_row_and_what_no_token_reaches_is_said(monkeypatch, capsys):
    assert THRESHOLDS and set(eapcore.attribution.METHODS) < set(WAYS)
    for slow in ("subnetwork probing", "the same, of nodes"):  # hundreds of steps each
        monkeypatch.delitem(WAYS, slow)
    assert bench_truth.main(["--compiled", "--only", "count", "--draws", "1", "--pairs", "16"]) == 0
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if line.startswith("  ") and "reached" not in line]
    assert "  not reached  embed->a0.h0<v>: constants (tokens:BOS); exact effect 0\n" in out
    assert "6 true of 8 edges, 4 reached by tokens" in out and len(rows) == 2 * (1 + len(WAYS))
    assert out.count("\n  exact patching ") == 2 and "0.833 / 1.000" in out
    assert not suits("grad-drop", COMPILED["count"], "corrupt")
    assert not suits("clean-corrupt", COMPILED["parity"], "zero")
