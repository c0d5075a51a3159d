"""Judging does what its definitions say: every number against a literal computation."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from models import random_circuit, random_model, random_pairs, random_scores, saved
from refusal import refused

import eapcore.execution.ablation as ablations
import eapcore.patching.circuits as circuits
from eapcore.attribution.attribute import attribute
from eapcore.evaluation.agreement import agreement, overlap
from eapcore.evaluation.completeness import completeness, minimality
from eapcore.evaluation.evaluate import Evaluation, evaluate
from eapcore.evaluation.faithfulness import MIB_FRACTIONS, _sizes, faithfulness, mib
from eapcore.evaluation.roc import area, roc, roc_of_circuits
from eapcore.evaluation.sampled import verify_sample
from eapcore.evaluation.stability import stability
from eapcore.evaluation.verify import verify
from eapcore.graph.circuit import Circuit
from eapcore.graph.correlation import line
from eapcore.graph.graph import Graph
from eapcore.graph.scores import EdgeScores
from eapcore.patching.circuits import metric_on
from eapcore.patching.edges import patch_edges
from eapcore.patching.record import Recording
from eapcore.search.acdc import acdc, prune_sweep
from eapcore.search.smallest import smallest

GRAPH = Graph(2, 2, True)
LENGTHS = [5, 3]


@pytest.fixture
def model():
    return random_model(n_heads=2)


@pytest.fixture
def pairs(model):
    return random_pairs(model, LENGTHS)


# Faithfulness


@pytest.mark.parametrize("ranking", ["absolute", "signed"])
def test_the_curve_is_the_metric_of_each_circuit_on_the_scale_from_ablated_to_clean(model, pairs, ranking):
    scores = attribute(model, pairs)
    sizes = [0, 0.1, 20, 0.5, 1.0]
    curve = faithfulness(model, pairs, "logit_diff", scores, sizes=sizes, ranking=ranking)
    n = model.graph.n_edges
    assert curve.sizes == [0, int(0.1 * n), 20, int(0.5 * n), n]
    meta = scores.meta["metric"]
    for size, value, f in zip(curve.sizes, curve.values, curve.faithfulness, strict=True):
        (expected,) = metric_on(model, pairs, "logit_diff", [scores.top_n(size, signed=ranking == "signed")])
        assert value == pytest.approx(expected, abs=1e-12)
        assert f == pytest.approx((expected - meta["corrupt"]) / (meta["clean"] - meta["corrupt"]), abs=1e-10)
    assert curve.faithfulness[0] == pytest.approx(0, abs=1e-12) and curve.faithfulness[-1] == pytest.approx(1)
    x, f = (torch.tensor(values, dtype=torch.float64) for values in (curve.fractions, curve.faithfulness))
    areas = torch.trapezoid(f, x), torch.trapezoid((1 - f).abs(), x)
    assert (curve.cpr, curve.cmd) == pytest.approx([*map(float, areas)])


def test_the_fraction_of_a_number_of_edges_is_that_number(model, pairs):
    counts = list(range(model.graph.n_edges + 1))
    by_count = faithfulness(model, pairs, "logit_diff", attribute(model, pairs), sizes=counts)
    assert _sizes(by_count.fractions, model.graph.n_edges) == (by_count.fractions, counts)
    for n in (49, 103, 32491):  # where n · (k / n) is less than k for some k
        assert _sizes([k / n for k in range(min(n, 200) + 1)], n)[1] == list(range(min(n, 200) + 1))
        assert _sizes(list(MIB_FRACTIONS), n)[1] == [int(x * n) for x in MIB_FRACTIONS]


def test_cpr_is_read_from_the_signed_and_cmd_from_the_absolute_ranking(model, pairs, tmp_path):
    scores = attribute(model, pairs)
    both = mib(model, pairs, "logit_diff", scores)
    signed = faithfulness(model, pairs, "logit_diff", scores, ranking="signed")
    absolute = faithfulness(model, pairs, "logit_diff", scores)
    assert both.cpr == pytest.approx(signed.cpr) and both.cmd == pytest.approx(absolute.cmd)
    assert both.signed.fractions == list(MIB_FRACTIONS) and both.absolute.meta["method"]["ranking"] == "absolute"
    assert signed.values != absolute.values
    content = saved(both, tmp_path)
    assert content["cpr"] == both.cpr and content["absolute"]["sizes"] == absolute.sizes


@pytest.mark.parametrize("sizes", [[0.1], [7], [0.1, 0.1], [20, 20]])
def test_one_size_has_no_area(model, pairs, sizes, tmp_path):
    scores = attribute(model, pairs)
    curve, both = (judge(model, pairs, "logit_diff", scores, sizes=sizes) for judge in (faithfulness, mib))
    assert len(curve.faithfulness) == len(sizes) and math.isfinite(curve.faithfulness[0])
    assert all(math.isnan(x) for x in (curve.cpr, curve.cmd, both.cpr, both.cmd))
    content = saved(curve, tmp_path)
    assert content["cpr"] is None and content["cmd"] is None and content["values"] == curve.values


def test_every_result_states_its_convention(model, pairs, tmp_path):
    scores, circuit = attribute(model, pairs, reduce="pair"), random_circuit(model.graph, 0.3, 1)
    minimal = minimality(model, pairs, "logit_diff", circuit)
    stable = stability(scores.per_pair, model.graph, top_n=5, n_resamples=4, meta=scores.meta)
    complete = completeness(model, pairs, "logit_diff", circuit, n_random=1)
    found = Evaluation(mib(model, pairs, "logit_diff", scores), (), complete, minimal, stable)
    content = saved(found, tmp_path)
    assert content["mib"]["signed"]["meta"]["sign"].endswith("cpr: higher = better; cmd: lower = better")
    assert content["completeness"]["meta"]["sign"].startswith("gap = |circuit − model|")
    assert "measured change" in content["minimality"]["meta"]["sign"]
    assert content["minimality"]["meta"]["method"]["name"] == "minimality"
    assert content["minimality"]["scores"] == {edge: minimal[edge] for edge in circuit.edges}
    assert content["stability"]["meta"]["scores"]["sign"] == scores.meta["sign"]
    assert content["stability"]["meta"]["scores"]["method"]["name"] == "eap"
    checked = verify(model, pairs, scores=scores, n=5)
    assert "measured change" in checked.meta["sign"] and "predicted change" in checked.meta["scores"]["sign"]


def test_circuits_can_be_grown_from_the_logits_and_ablated_with_zero(model, pairs):
    scores = attribute(model, pairs)
    curve = faithfulness(model, pairs, "nll", scores, sizes=[8], selection="greedy", ablation="zero")
    (expected,) = metric_on(model, pairs, "nll", [scores.greedy(8).prune()], ablation="zero")
    assert curve.values == [pytest.approx(expected)]
    assert curve.meta["method"]["ablation"] == {"name": "zero"}
    for ablation in ("corrupt", "zero", "mean"):  # as in MIB, what connects nothing is not run
        circuit = scores.top_n(12)
        found = faithfulness(model, pairs, "nll", scores, sizes=[12], ablation=ablation)
        whole, connected = metric_on(model, pairs, "nll", [circuit, circuit.prune()], ablation=ablation)
        assert found.values == [pytest.approx(connected, abs=1e-12)] and found.sizes == [12]
        assert (abs(whole - connected) < 1e-12) == (ablation == "corrupt")


# Completeness, minimality


def test_completeness_takes_the_same_edges_from_the_circuit_and_from_the_model(model, pairs, tmp_path):
    circuit = random_circuit(model.graph, 0.3, 1)
    result = completeness(model, pairs, "logit_diff", circuit, n_random=2, seed=3)
    graph = model.graph
    places = {name: i for i, name in enumerate(result.removed)}
    touched = {e.split("->")[0] for e in circuit.edges} | {e.split("->")[1].split("<")[0] for e in circuit.edges}
    components = touched - {"embed", "logits"}
    assert set(result.removed) == {"nothing", "random half 0", "random half 1"} | components
    for name in components:
        for base, values in ((circuit.edges, result.circuit), (Circuit(graph.edge_mask(), graph).edges, result.model)):
            left = [e for e in base if name not in (e.split("->")[0], e.split("->")[1].split("<")[0])]
            (expected,) = metric_on(model, pairs, "logit_diff", [Circuit.from_edges(graph, left)])
            assert values[places[name]] == pytest.approx(expected, abs=1e-12)
    assert result.gap == [abs(a - b) for a, b in zip(result.circuit, result.model, strict=True)]
    whole = Circuit(graph.edge_mask(), graph)
    assert max(completeness(model, pairs, "logit_diff", whole, n_random=1).gap) <= 1e-12
    assert saved(result, tmp_path)["removed"] == result.removed


def test_minimality_is_what_each_edge_does_for_the_circuit(model, pairs):
    circuit = random_circuit(model.graph, 0.3, 1)
    scores = minimality(model, pairs, "logit_diff", circuit)
    (whole,) = metric_on(model, pairs, "logit_diff", [circuit])
    for edge in circuit.edges:
        left = Circuit.from_edges(model.graph, [e for e in circuit.edges if e != edge])
        (value,) = metric_on(model, pairs, "logit_diff", [left])
        assert scores[edge] == pytest.approx(value - whole, abs=1e-12)
    assert bool((scores.scores[~circuit.mask] == 0).all())


# ROC


def literal_points(scores, reference, signed, edges):
    """(fpr, tpr) at every threshold, from the highest down."""
    useful = -scores.scores if signed else scores.scores.abs()
    true, false = reference.mask & edges, ~reference.mask & edges
    points = [(0.0, 0.0)]
    for threshold in sorted({float(v) for v in useful[edges]}, reverse=True):
        chosen = (useful >= threshold) & edges
        points.append((int((chosen & false).sum()) / int(false.sum()), int((chosen & true).sum()) / int(true.sum())))
    return points


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("ranking", ["absolute", "signed"])
def test_the_roc_counts_true_and_false_edges_at_every_threshold(ties, ranking):
    scores, reference = random_scores(GRAPH, ties=ties), random_circuit(GRAPH, 0.3, 1)
    for edges in (None, random_circuit(GRAPH, 0.6, 7).mask):
        found = roc(scores, reference, ranking=ranking, edges=edges)
        counted = GRAPH.edge_mask() if edges is None else edges
        points = literal_points(scores, reference, ranking == "signed", counted)
        for side, values in zip((found.fpr, found.tpr), zip(*points, strict=True), strict=True):
            assert side == pytest.approx(list(values))
        expected = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in pairwise(points))
        assert found.auc == pytest.approx(expected)
        assert found.edge_set["n_edges"] == int(counted.sum())
        assert found.edge_set["n_true"] == int((reference.mask & counted).sum())


def test_the_auc_is_the_chance_that_a_true_edge_ranks_above_a_false_one():
    scores, reference = random_scores(GRAPH, ties=True), random_circuit(GRAPH, 0.3, 1)
    mask = GRAPH.edge_mask()
    true, false = (scores.scores[mask & side].abs() for side in (reference.mask, ~reference.mask))
    wins = (true[:, None] > false).double() + (true[:, None] == false).double() / 2
    assert roc(scores, reference).auc == pytest.approx(float(wins.mean()))


def test_the_rules_of_the_area_are_as_stated():
    x, y = [0.0, 0.2, 0.6, 1.0], [0.0, 0.5, 0.4, 1.0]
    assert area(x, y, "trapezoid") == pytest.approx(0.2 * 0.25 + 0.4 * 0.45 + 0.4 * 0.7)
    assert area(x, y, "lower") == pytest.approx(0.4 * 0.5 + 0.4 * 0.4)
    assert area(x, y, "upper") == pytest.approx(0.2 * 0.5 + 0.4 * 0.4 + 0.4 * 1.0)
    assert area(x, y, "pareto") == pytest.approx(0.8 * 0.5)  # (0.6, 0.4) is below (0.2, 0.5)
    assert area([0, 1], [0, 1], "pareto") == 0
    refused("rule must be one of trapezoid, lower, upper, pareto, got 'simpson'", area, x, y, "simpson")


def test_circuits_are_points_of_a_roc(tmp_path):
    reference = random_circuit(GRAPH, 0.3, 1)
    circuits = [random_circuit(GRAPH, p, s) for s, p in ((2, 0.2), (3, 0.7))]
    found = roc_of_circuits(circuits, reference)
    false = ~reference.mask & GRAPH.edge_mask()
    rates = [[int((c.mask & side).sum()) / int(side.sum()) for c in circuits] for side in (false, reference.mask)]
    assert found.fpr == [0, *rates[0], 1] and found.tpr == [0, *rates[1], 1]
    assert rates[0][0] < rates[0][1]
    assert found.rule == "pareto" and found.auc == area(found.fpr, found.tpr, "pareto")
    perfect = roc_of_circuits([reference], reference, rule="lower")
    assert perfect.auc == 1
    content = saved(found, tmp_path)
    assert content["rule"] == "pareto" and content["edge_set"]["name"] == "all edges"


# Agreement


def test_agreement_is_the_least_squares_line_and_the_correlation_of_ranks():
    a, b = random_scores(GRAPH, ties=True), random_scores(GRAPH, 5, ties=True)
    mask = GRAPH.edge_mask()
    x, y = a.scores[mask].numpy(), b.scores[mask].numpy()
    found = agreement(a, b)
    slope, intercept = np.polyfit(x, y, 1)
    assert (found.slope, found.intercept) == pytest.approx((slope, intercept))
    assert found.r2 == pytest.approx(np.corrcoef(x, y)[0, 1] ** 2)

    def ranks(v):
        return np.array([(np.sum(v < u) + np.sum(v <= u) - 1) / 2 for u in v])

    assert found.spearman == pytest.approx(np.corrcoef(ranks(x), ranks(y))[0, 1])
    assert found.signs == np.mean(np.sign(x) == np.sign(y)) and found.n_edges == len(x)
    itself = agreement(a, a)
    assert (itself.r2, itself.slope, itself.spearman, itself.signs) == pytest.approx((1, 1, 1, 1))


def test_agreement_without_spread_is_not_a_number():
    flat = EdgeScores(GRAPH.edge_mask().double(), GRAPH)
    found = agreement(flat, random_scores(GRAPH))
    assert math.isnan(found.r2) and math.isnan(found.slope) and math.isnan(found.spearman)


def test_a_line_through_equal_tiny_and_huge_numbers():
    """A tenth ten times has a mean that is no tenth; squares of the tiny underflow."""
    x, y = torch.randn(2, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    r, slope = line(x, y)
    assert r == pytest.approx(float(torch.corrcoef(torch.stack([x, y]))[0, 1]), abs=1e-12)
    for scale in (1e-170, 1e170):
        assert line(x * scale, y * scale) == pytest.approx((r, slope))
    same = torch.full_like(x, 0.1)
    assert [math.isnan(v) for v in (*line(same, y), line(y, same)[0])] == [True] * 3 and line(y, same)[1] == 0


def test_overlap_is_the_share_of_common_top_edges():
    a, b = random_scores(GRAPH), random_scores(GRAPH, 1)
    common = {name for name, _ in a.top(10)} & {name for name, _ in b.top(10)}
    assert overlap(a, b, 10) == len(common) / 10 and overlap(a, a, 10) == 1


def test_verify_measures_the_top_edges_and_names_the_largest_disagreements(model, pairs, tmp_path):
    scores = attribute(model, pairs)
    exact = patch_edges(model, pairs)
    found = verify(model, pairs, "logit_diff", scores, 12, n_worst=3)
    assert found.edges == [name for name, _ in scores.top(12)]
    assert found.effects == pytest.approx([exact[name] for name in found.edges], abs=1e-12)
    assert found.estimates == [scores[name] for name in found.edges]
    gaps = sorted((abs(exact[name] - scores[name]) for name in found.edges), reverse=True)
    assert [abs(e - x) for _, e, x in found.worst] == pytest.approx(gaps[:3], abs=1e-12)
    chosen = scores.top_n(12).mask
    assert found.agreement.r2 == pytest.approx(agreement(scores, exact, chosen).r2)
    content = saved(found, tmp_path)
    assert content["edges"] == found.edges and content["agreement"]["n_edges"] == 12
    assert content["exact"]["meta"]["method"]["name"] == "patch"


def test_verify_screens_by_itself_where_no_scores_are_given(model, pairs):
    scores = attribute(model, pairs, "nll", method="eap-ig-activations", steps=2, ablation="mean")
    expected = verify(model, pairs, "nll", scores, 12, ablation="mean")
    found = verify(model, pairs, "nll", n=12, method="eap-ig-activations", steps=2, ablation="mean")
    assert found.edges == expected.edges and found.effects == pytest.approx(expected.effects, abs=1e-14)
    assert found.meta["scores"] == scores.meta and found.agreement == expected.agreement
    assert verify(model, pairs, n=3).edges == [name for name, _ in attribute(model, pairs).top(3)]
    with pytest.raises(ValueError, match="the scores are given, so there is no use for method, steps: leave one"):
        verify(model, pairs, "nll", scores, 12, ablation="mean", method="eap-ig", steps=2)


def test_verify_refuses_scores_of_another_ablation(model, pairs):
    scores = attribute(model, pairs)
    with pytest.raises(ValueError, match=r"estimate the ablation {'name': 'corrupt'}, but {'name': 'zero'} was to be"):
        verify(model, pairs, "logit_diff", scores, 5, ablation="zero")
    by_mean = attribute(model, pairs, ablation="mean", reference=random_pairs(model, [4]))
    with pytest.raises(ValueError, match=r"estimate the ablation {'name': 'mean', .*'n_prompts': 1.*'n_prompts': 2"):
        verify(model, pairs, "logit_diff", by_mean, 5, ablation="mean")
    unnamed = EdgeScores(scores.scores, scores.graph)  # another tool's, say
    assert verify(model, pairs, "logit_diff", unnamed, 5, ablation="zero").exact.meta["method"]["ablation"] == {
        "name": "zero"
    }


def test_scores_of_another_ablation_may_rank_and_the_curve_says_so(model, pairs):
    scores = attribute(model, pairs)
    curve = faithfulness(model, pairs, "logit_diff", scores, sizes=[9, 40], ablation="zero")
    (expected,) = metric_on(model, pairs, "logit_diff", [scores.top_n(9).prune()], ablation="zero")
    assert curve.values[0] == pytest.approx(expected)
    method = curve.meta["method"]
    assert (method["ablation"], method["ablation_of_scores"]) == ({"name": "zero"}, {"name": "corrupt"})
    other = faithfulness(model, pairs, "logit_diff", random_scores(model.graph), sizes=[9, 40])
    assert other.meta["method"]["ablation_of_scores"] is None


def test_verify_refuses_scores_of_something_else(model, pairs):
    scores = attribute(model, pairs)
    refused("estimate the metric logit_diff, but nll was to be measured", verify, model, pairs, "nll", scores, 5)
    of_another = partial(refused, "whose weights are not those of")
    other = random_model(n_heads=2, seed=1)
    of_another(verify, other, pairs, "logit_diff", scores, 5)
    for judge in (
        faithfulness,
        mib,
        evaluate,
        smallest,
        partial(verify_sample, n=9),
    ):  # whatever runs a model by scores
        of_another(judge, other, pairs, "logit_diff", scores)
    of_another(acdc, other, pairs, threshold=0.1, order=scores)
    of_another(prune_sweep, other, pairs, scores, [3], [0.1])
    refused("n must be between 1 and the", verify, model, pairs, "logit_diff", scores, 0)
    with pytest.raises(ValueError, match=r"n must be between 1 and the \d+ edges of this graph, got 2.5"):
        verify(model, pairs, "logit_diff", scores, 2.5)
    for judge in (verify, faithfulness, mib):
        with pytest.raises(ValueError, match=r"the scores must be EdgeScores of Graph.*, got NodeScores"):
            judge(model, pairs, "logit_diff", attribute(model, pairs, level="node"))


@pytest.mark.parametrize("batch_size", [1, 5])
def test_judging_counts_every_circuit_of_every_pair(model, batch_size, limited):
    limited(copy_tokens=64)
    pairs = random_pairs(model, [5, 3, 6])
    scores, circuit = attribute(model, pairs), random_circuit(model.graph, 0.3, 1)
    complete = len(completeness(model, pairs, "nll", circuit).removed)
    for judge, of, n_circuits in (
        (faithfulness, scores, 2 + 10),
        (mib, scores, 2 + 2 * 10),
        (completeness, circuit, 2 * complete),
        (minimality, circuit, 1 + circuit.n_edges),
    ):
        calls = []
        judge(model, pairs, "nll", of, batch_size=batch_size, progress=lambda *call, calls=calls: calls.append(call))
        done, total = zip(*calls, strict=True)
        assert set(total) == {n_circuits * 3} and list(done) == sorted(set(done)) and done[-1] == total[0]
        assert len(done) > 1


@pytest.mark.parametrize("given", [True, False])
def test_verify_counts_scoring_patching_and_every_point_of_a_curve(model, given):
    pairs, calls = random_pairs(model, [5, 3, 6]), []
    curves = ["a0.h1->logits", "embed->a1.h0<v>"]
    scores = attribute(model, pairs) if given else None
    verify(model, pairs, "nll" if not given else "logit_diff", scores, 7, curves=curves, batch_size=2,
           progress=lambda *call: calls.append(call))  # fmt: skip
    done, total = zip(*calls, strict=True)
    assert set(total) == {3 * (7 + 2 * 11 + (not given))} and list(done) == sorted(done) and done[-1] == total[0]
    stages = [0 if given else 3, 3 * (7 + (not given)), 3 * (7 + 11 + (not given))]
    assert {*stages[given:], total[0]} <= set(done)


def test_verify_counts_to_its_end_where_all_edges_were_patched_before(model, tmp_path):
    pairs = random_pairs(model, [5, 3, 6])
    scores = attribute(model, pairs)
    for curves in ([], ["embed->logits"]):
        for _ in range(2):
            calls = []
            verify(model, pairs, "logit_diff", scores, 5, curves=curves, resume=tmp_path / "done.partial",
                   progress=lambda *call, calls=calls: calls.append(call))  # fmt: skip
            assert calls[-1] == (3 * (5 + 11 * len(curves)),) * 2


def test_what_was_judged_is_kept_for_the_same_metric_alone(model, pairs, tmp_path, monkeypatch):
    scores, kept = attribute(model, pairs), tmp_path / "kept"

    def named(times):
        def own(logits):
            return times * logits[:, 0] - logits[:, 1]

        return own

    whole = evaluate(model, pairs, named(2), scores, batch_size=2)
    assert evaluate(model, pairs, named(2), scores, batch_size=2, resume=kept).mib == whole.mib
    monkeypatch.setattr(circuits, "circuit_logits", lambda *given: pytest.fail("a circuit was run again"))
    calls = []
    again = evaluate(model, pairs, named(2), scores, resume=kept, progress=lambda *done: calls.append(done))
    assert again.mib == whole.mib and calls == [(len(pairs) * 22,) * 2]
    refused("belongs to another metric .*own: on the clean", evaluate, model, pairs, named(3), scores, resume=kept)
    others = replace(scores, scores=scores.scores.roll(1, 0))
    refused("belongs to another set of circuits", evaluate, model, pairs, named(2), others, resume=kept)


# All in one go


@pytest.fixture
def counted(monkeypatch):
    """How often batches are recorded, and means computed."""
    calls = {"recorded": 0, "means": 0}
    of, means = Recording.of, ablations.means

    def record(experiment, index, **options):
        calls["recorded"] += len(index)
        return of(experiment, index, **options)

    def average(*args, **options):
        calls["means"] += 1
        return means(*args, **options)

    monkeypatch.setattr(Recording, "of", staticmethod(record))
    monkeypatch.setattr(ablations, "means", average)
    return calls


@pytest.mark.parametrize("options", [{}, {"ablation": "mean"}, {"batch_size": 1, "ablation": "zero"}], ids=str)
def test_an_evaluation_is_its_parts(model, pairs, options, tmp_path):
    how = {name: value for name, value in options.items() if name == "ablation"}
    scores = attribute(model, pairs, reduce="pair", **how)
    circuit, truth = scores.top_n(12), random_circuit(model.graph, 0.4)
    found = evaluate(
        model, pairs, "logit_diff", scores, selection="greedy", circuit=circuit, truths=[truth], true_top=9,
        rule="lower", resamples={"top_n": 5, "n_resamples": 4, "seed": 3}, **options,
    )  # fmt: skip
    exact = patch_edges(model, pairs, **how)
    parts = Evaluation(
        mib(model, pairs, "logit_diff", scores, selection="greedy", **how),
        [roc(scores, reference, rule="lower") for reference in (truth, exact.top_n(9))],
        completeness(model, pairs, "logit_diff", circuit, **how),
        minimality(model, pairs, "logit_diff", circuit, **how),
        stability(scores.per_pair, model.graph, top_n=5, n_resamples=4, seed=3, meta=scores.meta),
    )
    ours, theirs = flat(saved(found, tmp_path)), flat(saved(parts, tmp_path))
    assert ours.keys() == theirs.keys() and len(ours) > 1000
    for name, value in ours.items():
        assert value == (theirs[name] if isinstance(value, str) else pytest.approx(theirs[name], abs=1e-12)), name
    alone = evaluate(model, pairs, "logit_diff", scores, **options)
    assert not alone.rocs and (alone.completeness, alone.minimality, alone.stability) == (None, None, None)


def flat(content, name=""):
    """The leaves of a JSON file by their paths."""
    if isinstance(content, dict | list):
        items = content.items() if isinstance(content, dict) else enumerate(content)
        return {path: leaf for key, item in items for path, leaf in flat(item, f"{name}.{key}").items()}
    return {name: content}


def test_an_evaluation_runs_the_prompts_once_and_a_mean_is_computed_once(model, pairs, counted):
    scores = attribute(model, pairs)
    evaluate(model, pairs, "logit_diff", scores, circuit=scores.top_n(9), ablation="mean")
    assert counted == {"recorded": len(pairs), "means": 1}
    verify(model, pairs, "nll", n=5, curves=["embed->logits"], ablation="mean")
    assert counted["means"] == 2


def test_an_evaluation_counts_to_its_end(model):
    pairs, calls = random_pairs(model, [5, 3, 6]), []
    scores = attribute(model, pairs)
    evaluate(model, pairs, "nll", scores, circuit=scores.top_n(9), true_top=5, batch_size=1,
             progress=lambda *call: calls.append(call))  # fmt: skip
    done, total = zip(*calls, strict=True)
    assert len(set(total)) == 1 and list(done) == sorted(done) and done[-1] == total[0]


def test_resamples_need_the_scores_of_each_pair(model, pairs):
    with pytest.raises(ValueError, match="resamples need the scores of each pair: score with reduce='pair'"):
        evaluate(model, pairs, "logit_diff", attribute(model, pairs), resamples={"top_n": 5})


# Stability


def test_stability_equals_a_literal_bootstrap(tmp_path):
    generator = torch.Generator().manual_seed(0)
    per_pair = torch.randn(6, GRAPH.n_senders, GRAPH.n_receivers, generator=generator, dtype=torch.float64)
    per_pair = (per_pair + 0.5) * GRAPH.edge_mask()
    found = stability(per_pair, GRAPH, top_n=7, n_resamples=9, seed=2)
    draws = torch.randint(6, (9, 6), generator=torch.Generator().manual_seed(2))
    means = [per_pair[draw].mean(0) for draw in draws]
    tops = [EdgeScores(mean, GRAPH).top_n(7).mask for mean in means]
    whole = EdgeScores(per_pair.mean(0), GRAPH)
    mask = GRAPH.edge_mask()
    same = torch.stack([(mean.sign() == whole.scores.sign()).double() for mean in means]).mean(0)
    torch.testing.assert_close(found.sign_consistency, same * mask)
    torch.testing.assert_close(found.std, torch.stack(means).std(0))
    error = per_pair.std(0) / 6**0.5
    for end, errors in ((found.low, -2.570582), (found.high, 2.570582)):  # Student's t of 5 degrees of freedom
        torch.testing.assert_close(end, whole.scores + errors * error, rtol=0, atol=1e-6)
    narrow = stability(per_pair, GRAPH, top_n=7, n_resamples=9, seed=2, level=0.5)
    torch.testing.assert_close(narrow.high, whole.scores + 0.726687 * error, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.top_frequency, torch.stack(tops).double().mean(0))
    shared = [int((a & b).sum()) / 7 for i, a in enumerate(tops) for b in tops[i + 1 :]]
    assert found.overlap == pytest.approx(sum(shared) / len(shared))
    with_all = [int((a & whole.top_n(7).mask).sum()) / 7 for a in tops]
    assert found.overlap_with_all == pytest.approx(sum(with_all) / 9)
    assert saved(found, tmp_path)["meta"]["method"]["n_resamples"] == 9


def test_a_confidence_interval_holds_the_true_mean_as_often_as_it_says():
    generator, edges = torch.Generator().manual_seed(0), GRAPH.edge_mask()
    for n, n_resamples in ((2, 2), (5, 20), (40, 100)):  # however few pairs and resamples there are
        held = []
        for _ in range(60):  # each edge's scores drawn around 1
            noise = torch.randn(n, *edges.shape, generator=generator, dtype=torch.float64)
            found = stability((1 + noise) * edges, GRAPH, top_n=5, n_resamples=n_resamples)
            held.append(((found.low < 1) & (found.high > 1))[edges].double().mean())
        assert 0.935 < float(torch.stack(held).mean()) < 0.965


def test_equal_pairs_are_perfectly_stable_and_the_same_seed_gives_the_same_result():
    same = random_scores(GRAPH).scores.expand(4, -1, -1)
    found = stability(same, GRAPH, top_n=5)
    assert (found.overlap, found.overlap_with_all) == (1, 1) and float(found.std.max()) <= 1e-15
    assert bool((found.sign_consistency[GRAPH.edge_mask()] == 1).all())
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(5, GRAPH.n_senders, GRAPH.n_receivers, generator=generator) * GRAPH.edge_mask()
    first, again, other = (stability(noise, GRAPH, top_n=5, seed=s) for s in (1, 1, 2))
    assert torch.equal(first.std, again.std) and not torch.equal(first.std, other.std)


# Bad input


@pytest.mark.parametrize(("call", "message"), [
    (lambda m, p, s: faithfulness(m, p, "nll", s, sizes=[0.5, 0.1]), "sizes must ascend from 0 to at most the"),
    (lambda m, p, s: faithfulness(m, p, "nll", s, sizes=[]), "sizes must ascend"),
    (lambda m, p, s: faithfulness(m, p, "nll", s, sizes=[10**6]), "sizes must ascend"),
    *((lambda m, p, s, x=x: mib(m, p, "nll", s, sizes=x), "sizes must ascend from 0 to at most the 46 edges")
        for x in ([-0.001, 1.0], [0.5, 1.0005], [0.0109, 0.0105, 1.0], [46, 0.5])),
    *((lambda m, p, s, x=x: faithfulness(m, p, "nll", s, sizes=x), r"sizes must ascend .* \(integers\), got .")
        for x in (0.1, "0.1", ["0.1"], [float("nan")], [True], None)),
    (lambda m, p, s: faithfulness(m, p, "nll", s, ranking="abs"), "ranking must be absolute or signed, got 'abs'"),
    (lambda m, p, s: faithfulness(m, p, "nll", s, selection="best"), "selection must be top_n or greedy"),
    (lambda m, p, s: faithfulness(m, p, "nll", random_scores(Graph(1, 1, True))), "the scores must be of"),
    (lambda m, p, s: faithfulness(m, p, lambda logits: logits[:, 0] * 0, s),
        "the metric is 0 on the clean and on the ablated run"),
    (lambda m, p, s: minimality(m, p, "nll", s.top_n(0)), "the circuit has no edges"),
    (lambda m, p, s: completeness(m, p, "nll", random_circuit(Graph(1, 1, True))), "the circuit must belong to"),
    (lambda m, p, s: roc(s, s.top_n(0)), "needs true and false edges, but 0 of"),
    (lambda m, p, s: roc(s, random_circuit(Graph(1, 1, True))), "the reference must be a circuit of"),
    (lambda m, p, s: roc(attribute(m, p, level="node"), s.top_n(3)), "must be EdgeScores of .*, got NodeScores"),
    (lambda m, p, s: roc(EdgeScores(s.scores * math.nan, s.graph), s.top_n(3)),
        "edges are ranked by their scores, but 46 of 46 scores are NaN"),
    (lambda m, p, s: roc(s, s.top_n(3), edges=torch.ones(2, 2)), r"edges must be bool \[S, R\]"),
    (lambda m, p, s: roc_of_circuits([], s.top_n(3)), "at least one circuit is needed"),
    (lambda m, p, s: overlap(s, s, 0), "n must be at least 1 edge"),
    (lambda m, p, s: stability(s.per_pair, m.graph, top_n=3), "per_pair must be each pair's scores, .*, got None"),
    (lambda m, p, s: stability(s.scores[None], m.graph, top_n=3), r"per_pair must be \[N ≥ 2, S, R\]"),
    (lambda m, p, s: stability(s.scores.expand(3, -1, -1), m.graph, top_n=0), "top_n must be between 1"),
    (lambda m, p, s: stability(s.scores.expand(3, -1, -1), m.graph, top_n=1, level=95), "level must lie between"),
])  # fmt: skip
def test_bad_input_is_refused_in_one_sentence(model, pairs, call, message):
    refused(message, call, model, pairs, random_scores(model.graph))
