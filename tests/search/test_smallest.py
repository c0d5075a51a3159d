"""The smallest circuit is the first of a row of sizes that keeps enough of the behaviour, with the prompts run once."""

from __future__ import annotations

import math
from itertools import chain

import pytest
import torch
from models import random_case

from eapcore.attribution.attribute import attribute
from eapcore.evaluation.faithfulness import faithfulness
from eapcore.execution.experiment import Experiment
from eapcore.graph.circuit import Circuit
from eapcore.graph.confidence import interval, student_t
from eapcore.patching.circuits import kept_without, metric_on
from eapcore.patching.record import Recording, Recordings
from eapcore.search.smallest import SIZES, run_until, selections, smallest


@pytest.fixture
def case():
    model, pairs = random_case([6, 3, 5], n_heads=2, d_model=12)
    return model, pairs, attribute(model, pairs)


@pytest.fixture
def recorded(monkeypatch):
    """The pairs of every batch that is recorded."""
    batches, of = [], Recording.of
    monkeypatch.setattr(
        Recording, "of", staticmethod(lambda experiment, index: (batches.append(list(index)), of(experiment, index))[1])
    )
    return batches


def ends_of(model, pairs, **options):
    full = Circuit(model.graph.edge_mask(), model.graph)
    return metric_on(model, pairs, "logit_diff", [full, Circuit(full.mask & False, full.graph)], **options)


@pytest.mark.parametrize("options", [{}, {"ablation": "mean"}, {"batch_size": 1}], ids=str)
def test_circuits_are_run_from_small_to_large_until_one_keeps_enough(case, options):
    model, pairs, scores = case
    calls = []
    tried = smallest(model, pairs, "logit_diff", scores, 0.9, progress=lambda *call: calls.append(call), **options)
    clean, ablated = ends_of(model, pairs, **options)
    counts = sorted({max(1, round(share * model.graph.n_edges)) for share in SIZES})
    assert [each.selected.n_edges for each in tried] == counts[: len(tried)]
    for each in tried:
        assert each.selected.edges == scores.top_n(each.selected.n_edges).edges
        assert each.circuit.edges == each.selected.prune().edges
        (value,) = metric_on(model, pairs, "logit_diff", [each.circuit], **options)
        assert each.value == pytest.approx(value, abs=1e-12)
        assert each.faithfulness == pytest.approx((value - ablated) / (clean - ablated), abs=1e-12)
    kept = [each.faithfulness >= 0.9 for each in tried]
    assert kept[-1] and not any(kept[:-1]) and len(tried) > 1
    assert calls == [(n, len(counts)) for n in range(1, len(tried) + 1)]


def test_where_no_circuit_keeps_enough_the_largest_is_the_last(case):
    model, pairs, scores = case
    tried = smallest(model, pairs, "logit_diff", scores, 2.0, sizes=[0.1, 0.2])
    assert [each.selected.n_edges for each in tried] == [round(x * model.graph.n_edges) for x in (0.1, 0.2)]


def test_sizes_of_less_than_an_edge_are_one_edge(case):
    model, _, scores = case
    assert [c.n_edges for c in selections(scores, [1e-6, 1e-5, 0.5])] == [1, model.graph.n_edges // 2]


def test_a_metric_that_is_the_same_at_both_ends_has_no_share(case):
    model, pairs, scores = case
    experiment = Experiment.of(model, pairs, lambda logits: logits[:, 0] * 0)
    tried, clean, ablated = run_until(experiment, Recordings(experiment), selections(scores, [0.5, 1.0]))
    assert len(tried) == 2 and clean == ablated == 0
    assert all(math.isnan(each.faithfulness) for each in tried)
    one = pairs.select([0])  # its own mean is all that a prompt sends: what is left between the ends is rounding
    experiment = Experiment.of(model, one, "logit_diff", "mean-positional")
    tried, clean, ablated = run_until(experiment, Recordings(experiment), selections(scores, [0.5, 1.0]))
    assert clean == pytest.approx(ablated, rel=1e-13) and math.isnan(tried[0].faithfulness) and len(tried) == 2
    for metric in ("logit_diff", "kl"):
        with pytest.raises(ValueError, match="on the clean and on the ablated run: faithfulness has no scale"):
            faithfulness(model, one, metric, scores, ablation="mean-positional")


def test_every_batch_is_recorded_once_however_many_circuits_are_run(case, recorded):
    tried = smallest(*case[:2], "logit_diff", case[2], 0.97, batch_size=2)
    assert len(tried) > 2 and sorted(chain(*recorded)) == [0, 1, 2]


def test_batches_that_do_not_fit_are_recorded_again(case, recorded, limited):
    limited(record_share=0.0)
    tried = smallest(*case[:2], "logit_diff", case[2], 0.97, batch_size=2)
    rounds = 1 + len(tried)  # the two ends together, then each circuit
    assert sorted(chain(*recorded)) == sorted([0, 1, 2] * rounds)


def test_the_interval_of_what_is_kept_holds_that_of_all_prompts_as_often_as_it_says():
    generator = torch.Generator().manual_seed(3)
    assert [round(student_t(n), 4) for n in (2, 3, 4, 8, 11, 31)] == [12.7062, 4.3027, 3.1824, 2.3646, 2.2281, 2.0423]
    assert student_t(10**6) == pytest.approx(1.95996, rel=2e-3) and student_t(9, 0.5) == pytest.approx(
        0.70639, rel=1e-4
    )
    for n in (2, 3, 4, 8, 24):
        held = []
        for _ in range(200):
            clean, ablated, noise = torch.randn(3, n, generator=generator, dtype=torch.float64)
            clean, ablated = 5 + clean, ablated
            values = torch.stack([clean, ablated, 0.6 * clean + 0.4 * ablated + noise / 2])
            without = kept_without(values, clean, ablated)
            kept = float((values[2] - ablated).mean() / (clean - ablated).mean())
            whole, none, (low, high) = (interval(*row) for row in zip((1.0, 0.0, kept), without, strict=True))
            assert whole == pytest.approx((1, 1)) and none == (0, 0)
            held.append(low <= 0.6 <= high)
        assert 0.9 < sum(held) / 200 < 0.99, n
    assert kept_without(values[:, :1], clean[:1], ablated[:1]) is None  # nothing to leave out
    assert kept_without(values, clean, clean) is None  # no scale


def test_circuits_that_are_run_have_their_interval(case):
    model, pairs, scores = case
    for each in smallest(model, pairs, "logit_diff", scores, 0.9):
        assert each.interval is not None and each.interval[0] <= each.faithfulness <= each.interval[1]
    curve = faithfulness(model, pairs, "logit_diff", scores, sizes=[0.1, 0.5, 1.0])
    assert len(curve.intervals) == 3 and curve.intervals[-1] == pytest.approx((1, 1))
    assert curve.cpr_interval[0] <= curve.cpr <= curve.cpr_interval[1]
    assert curve.cmd_interval[0] <= curve.cmd <= curve.cmd_interval[1]
    same = faithfulness(model, pairs, "logit_diff", scores, sizes=[0.5, 0.50001])  # a narrow area has its height's ends
    for found, height in zip(same.cpr_interval, same.intervals[0], strict=True):
        assert found == pytest.approx(height * 0.00001, rel=1e-6, abs=1e-15)
