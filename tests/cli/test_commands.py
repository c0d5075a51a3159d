"""patch, acdc, path, evaluate and verify from the command line: they print and write what the functions return."""

from __future__ import annotations

import importlib
import io
import json
import math
from itertools import product
from pathlib import Path

import pytest
import torch
import tqdm

import eapcore.execution.ablation as ablations
from eapcore.attribution.attribute import attribute
from eapcore.attribution.positions import attention_edges
from eapcore.cli import main
from eapcore.cli.output import figure
from eapcore.evaluation.faithfulness import mib
from eapcore.evaluation.roc import roc
from eapcore.evaluation.stability import stability
from eapcore.evaluation.verify import verify
from eapcore.graph.attention_scores import AttentionScores
from eapcore.graph.circuit import Circuit
from eapcore.graph.graph import Graph
from eapcore.graph.scores import EdgeScores, NodeScores
from eapcore.models.backward_rules import Rules
from eapcore.patching.circuits import metric_on
from eapcore.patching.edges import patch_edges
from eapcore.patching.nodes import patch_nodes
from eapcore.patching.paths import path_patch, routes
from eapcore.patching.record import Recording
from eapcore.search.acdc import acdc, prune_sweep
from eapcore.search.smallest import smallest
from eapcore.search.subnetwork_probing import subnetwork_probing
from eapcore.tasks import find_pairs

SCORED = ("--scores", "scores.safetensors")


# attribute's methods


@pytest.mark.parametrize(("options", "how"), [
    (["--gradient-at", "corrupt"], {"gradient_at": "corrupt"}),
    (["--gradient-at", "0.75", "--qk", "exact", "--exact", "logits, mlp"],
        {"gradient_at": 0.75, "qk": "exact", "exact": ["logits", "mlp"]}),
    (["--method", "eap-ig", "--points", "0.75:1"], {"method": "eap-ig", "points": [(0.75, 1.0)]}),
    (["--method", "eap-ig-activations", "--points", "0.5:0.25,1:0.75"],
        {"method": "eap-ig-activations", "points": [(0.5, 0.25), (1.0, 0.75)]}),
    (["--method", "eap", "--rules", "norm=frozen,temperature=2,products=halved"],
        {"rules": Rules("frozen", temperature=2.0, products="halved")}),
    (["--method", "hisp", "--level", "node"], {"method": "hisp", "level": "node"}),
    (["--method", "relp", "--rules", "norm=frozen, activation=identity"],
        {"method": "relp", "rules": Rules("frozen", "identity")}),
    (["--method", "relp", "--rules", "attention=frozen"], {"method": "relp", "rules": Rules(attention="frozen")}),
    (["--ablation", "zero"], {"ablation": "zero"}),
    (["--ablation", "optimal"], {"ablation": "optimal"}),
    (["--method", "eap"], {}),
    (["--qk", "exact", "--impl", "reference"], {"qk": "exact", "gradient_at": 0.75, "impl": "reference"}),
    (["--method", "relp", "--ablation", "mean", "--reference-task", "sort"],
        {"method": "relp", "ablation": "mean", "reference": find_pairs("sort", n=4, seed=0)}),
    (["--reduce", "pair"], {"reduce": "pair", "gradient_at": 0.75}),
    (["--reduce", "position", "--storage", "factored"],
        {"reduce": "position", "storage": "factored", "gradient_at": 0.75}),
    (["--level", "node", "--reduce", "pair"], {"level": "node", "reduce": "pair", "gradient_at": 0.75}),
    (["--level", "neuron"], {"level": "neuron", "gradient_at": 0.75}),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")  # fmt: skip
def test_attribute_takes_every_first_order_option(eapcore, model, pairs, tmp_path, options, how):
    status, printed, _ = eapcore("attribute", "--metric", "logit_diff", *options, "--top-n", 3, out="s.safetensors")
    assert status == 0, printed
    expected = attribute(model, pairs, "logit_diff", **how)
    found = type(expected).load(tmp_path / "s.safetensors", content_hash=model.content_hash)
    torch.testing.assert_close(found.scores, expected.scores)
    assert found.meta["method"] == expected.meta["method"]
    assert f"     1  {expected.top(1)[0][0]} " in printed
    if isinstance(expected, NodeScores):
        assert "edges" not in printed
        units = [] if expected.units is None else expected.units.abs().flatten().tolist()
        assert ("hidden units" in printed) == bool(units)
        if units:
            layer, unit = divmod(units.index(max(units)), model.config.d_mlp)
            assert f"     1  m{layer}[{unit}] " in printed
        assert {name: x.shape for name, x in found.per_pair.items()} == {
            name: x.shape for name, x in expected.per_pair.items()
        }
    else:
        for part in ("per_pair", "per_position"):
            torch.testing.assert_close(getattr(found, part), getattr(expected, part))


def test_attribute_prints_the_nodes_above_a_threshold(eapcore, model, pairs):
    expected = attribute(model, pairs, "logit_diff", level="node", gradient_at=0.75)
    edge = sorted(expected.scores.abs().tolist())[2]
    options = ("--metric", "logit_diff", "--level", "node", "--threshold", edge)
    _, printed, _ = eapcore("attribute", *options, out="s.safetensors")
    assert sum(line.split()[0].isdigit() for line in printed.splitlines() if line) == model.graph.n_senders - 2


def test_run_ablates_what_it_scores_and_what_its_circuit_leaves_out(eapcore, model, pairs, tmp_path):
    status, printed, _ = eapcore("run", "--metric", "logit_diff", "--ablation", "mean", "--top-n", 20, out=".")
    expected = attribute(model, pairs, "logit_diff", ablation="mean")
    torch.testing.assert_close(EdgeScores.load(tmp_path / "scores.safetensors").scores, expected.scores)
    chosen = expected.top_n(20).prune()
    ends = [Circuit(model.graph.edge_mask(), model.graph), expected.top_n(0)]
    clean, ablated, value = metric_on(model, pairs, "logit_diff", [*ends, chosen], ablation="mean")
    metric = Circuit.load(tmp_path / "circuit.json").meta["metric"]
    assert status == 0 and (metric["mean"], metric["circuit"]) == (pytest.approx(ablated), pytest.approx(value))
    assert f"{(value - ablated) / (clean - ablated):.3f}" in printed.split("\ncircuit,")[1].splitlines()[0]
    assert printed.split("\nmean ")[1].split()[:2] == [f"{ablated:.4f}", "0.000"]


def test_run_takes_the_smallest_circuit_and_records_each_batch_once(
    eapcore, model, pairs, scores, tmp_path, monkeypatch
):
    tried = smallest(model, pairs, "logit_diff", scores, 0.97)
    assert len(tried) > 3
    recorded, of = [], Recording.of
    monkeypatch.setattr(
        Recording, "of", staticmethod(lambda experiment, index: (recorded.extend(index), of(experiment, index))[1])
    )
    options = ("--metric", "logit_diff", "--faithfulness", 0.97, "--batch-size", 3)
    status, printed, _ = eapcore("run", *options, out=".")
    assert status == 0 and sorted(recorded) == [0, 1, 2, 3]
    circuit = Circuit.load(tmp_path / "circuit.json")
    assert circuit.edges == tried[-1].circuit.edges
    assert circuit.meta["metric"]["circuit"] == pytest.approx(tried[-1].value)
    for each in tried[:-1]:
        assert f"\ntop {each.selected.n_edges} edges " in printed and f" {each.faithfulness:.3f}\n" in printed


@pytest.mark.parametrize("command", ["verify", "evaluate"])
def test_a_mean_is_computed_once_for_scoring_and_judging(eapcore, monkeypatch, command):
    calls, means = [], ablations.means
    monkeypatch.setattr(ablations, "means", lambda *args, **options: calls.append(1) or means(*args, **options))
    assert eapcore(command, "--metric", "logit_diff", "--ablation", "mean")[0] == 0
    assert calls == [1]


# The other commands


def test_patch_writes_the_effect_of_every_edge(eapcore, model, pairs, tmp_path):
    status, printed, _ = eapcore("patch", "--metric", "logit_diff", "--show", 3, out="effects.safetensors")
    found = EdgeScores.load(tmp_path / "effects.safetensors")
    torch.testing.assert_close(found.scores, patch_edges(model, pairs, "logit_diff").scores)
    assert status == 0 and found.top(1)[0][0] in printed and "effects.safetensors" in printed


def test_patch_takes_a_score_files_top_edges_and_goes_on_from_a_partial_result(eapcore, score_file, scores, tmp_path):
    options = ("--scores", score_file, "--top-n", 5, "--ablation", "zero", "--metric", "logit_diff")
    assert eapcore("patch", *options, "--resume", "partial", out="a.safetensors")[0] == 0
    assert (tmp_path / "partial").exists()
    assert eapcore("patch", *options, "--resume", "partial", out="b.safetensors")[0] == 0
    found = [EdgeScores.load(tmp_path / f"{name}.safetensors") for name in "ab"]
    assert torch.equal(found[0].scores, found[1].scores)
    assert sorted(found[0].meta["method"]["edges"]) == sorted(name for name, _ in scores.top(5))
    assert found[0].meta["method"]["ablation"]["name"] == "zero"


@pytest.mark.parametrize("per_position", [False, True])
def test_patch_measures_nodes_and_positions(eapcore, model, pairs, per_position):
    more = ["--per-position"] if per_position else []
    status, printed, content = eapcore("patch", "--nodes", "--metric", "logit_diff", *more)
    expected = patch_nodes(model, pairs, "logit_diff", per_position=per_position)
    assert status == 0 and "nodes in" in printed and content["nodes"] == expected.nodes
    torch.testing.assert_close(torch.tensor(content["effects"], dtype=torch.float64), expected.effects)


def test_acdc_writes_the_circuit_and_counts_its_forwards(eapcore, model, pairs, tmp_path):
    status, printed, _ = eapcore("acdc", "--threshold", 0.05)
    expected = acdc(model, pairs, "kl", threshold=0.05)
    found = Circuit.load(tmp_path / "result.json")
    assert status == 0 and torch.equal(found.mask, expected.mask)
    assert f"circuit  {expected.n_edges} edges" in printed
    assert f"{expected.meta['forwards']['decided']} decided by a forward" in printed


def test_attribute_writes_attention_from_position_to_position(eapcore, model, pairs, tmp_path):
    for method in ("eap", "peap"):
        options = ("--level", "attention", "--method", method, "--metric", "nll", "--top-n", 2)
        status, printed, _ = eapcore("attribute", *options, out="scores.safetensors")
        expected = attention_edges(model, pairs, "nll", method=method)
        found = AttentionScores.load(tmp_path / "scores.safetensors", content_hash=model.content_hash)
        assert status == 0 and torch.equal(found.k, expected.k) and found.meta["method"] == expected.meta["method"]
        assert f"     1  {expected.top(1)[0][0]} " in printed
    for refused, text in [(("--steps", 3), "leave out --steps"), (("--reduce", "pair"), "leave --reduce at all")]:
        status, printed, _ = eapcore("attribute", "--level", "attention", *refused)
        assert status == 2 and text in printed


def test_probe_writes_the_scores_of_trained_masks(eapcore, model, pairs, tmp_path):
    how = {"penalty": 2.0, "steps": 3, "rate": 0.1}
    for level in ("edge", "node"):
        options = [word for name, value in how.items() for word in (f"--{name}", value)]
        status, printed, _ = eapcore("probe", "--level", level, *options, out="scores.safetensors")
        expected = subnetwork_probing(model, pairs, "kl", level=level, **how)
        assert status == 0 and f"trained  masks of {level}s for 3 steps" in printed
        assert torch.equal(EdgeScores.load(tmp_path / "scores.safetensors").scores, expected.scores)


@pytest.mark.parametrize("by", ["--top-n", "--score-threshold"])
def test_acdc_prunes_the_best_edges_of_a_score_file(eapcore, score_file, model, pairs, scores, tmp_path, by):
    least = 15 if by == "--top-n" else sorted(scores.scores[scores.mask].abs().tolist())[-15]
    options = ("--threshold", 0.05, "--scores", score_file, by, least, "--metric", "nll")
    status, printed, _ = eapcore("acdc", *options)
    expected = acdc(model, pairs, "nll", threshold=0.05, start=scores.top_n(15))
    assert status == 0 and torch.equal(Circuit.load(tmp_path / "result.json").mask, expected.mask)
    assert "searched 15 edges" in printed


@pytest.mark.parametrize("by", ["--top-n", "--score-threshold"])
def test_acdc_sweeps_starts_and_thresholds_into_one_file(eapcore, score_file, model, pairs, scores, by):
    sizes, thresholds = [12, 30], [0.01, 0.1]
    ranked = sorted(scores.scores[scores.mask].abs().tolist(), reverse=True)
    starts = sizes if by == "--top-n" else [ranked[n - 1] for n in sizes]
    options = ("--scores", score_file, by, ",".join(map(str, starts)), "--threshold", "0.01,0.1", "--metric", "nll")
    status, printed, content = eapcore("acdc", *options)
    expected = prune_sweep(model, pairs, scores, sizes, thresholds, "nll")
    assert status == 0 and content["format"] == "eapcore-sweep"
    assert [c["edges"] for c in content["circuits"]] == [c.edges for c in expected]
    assert [
        (c["meta"]["method"]["start"]["n_edges"], c["meta"]["method"]["threshold"]) for c in content["circuits"]
    ] == [(12, 0.01), (12, 0.1), (30, 0.01), (30, 0.1)]
    table = [line.split() for line in printed.split("connected")[1].splitlines()[1:5]]
    assert [line[:3] for line in table] == [
        [str(n), str(threshold), str(circuit.n_edges)]
        for (n, threshold), circuit in zip(product(sizes, thresholds), expected, strict=True)
    ]


def test_acdc_sweeps_thresholds_over_all_edges(eapcore, model, pairs, tmp_path):
    status, _, content = eapcore("acdc", "--threshold", "0.01,0.1")
    expected = [acdc(model, pairs, "kl", threshold=threshold).edges for threshold in (0.01, 0.1)]
    assert status == 0 and [c["edges"] for c in content["circuits"]] == expected


def test_path_patches_a_written_path_or_the_routes_between_components(eapcore, model, pairs):
    written = "a0.h1->m0->a1.h0<v>->logits"
    status, printed, content = eapcore("path", "--metric", "logit_diff", "--path", written)
    assert status == 0 and "effect" in printed
    assert content["effect"] == pytest.approx(path_patch(model, pairs, "logit_diff", ["a0.h1"], [written]).effect)
    options = ("--senders", "a0.h0,a0.h1", "--receivers", "a1.h0<q>", "--through", "m0")
    status, printed, content = eapcore("path", "--metric", "logit_diff", *options)
    edges = routes(model.graph, ["a0.h0", "a0.h1"], ["a1.h0<q>"], through=["m0"])
    expected = path_patch(model, pairs, "logit_diff", ["a0.h0", "a0.h1"], edges)
    assert status == 0 and content["effect"] == pytest.approx(expected.effect)


def test_evaluate_prints_faithfulness_roc_and_a_circuits_worth(eapcore, score_file, scores, model, pairs, tmp_path):
    scores.top_n(15).save(tmp_path / "circuit.json")
    options = ("--scores", score_file, "--true-top", 10, "--rule", "lower", "--circuit", "circuit.json")
    status, printed, content = eapcore("evaluate", "--metric", "logit_diff", *options)
    expected = mib(model, pairs, "logit_diff", scores)
    exact = patch_edges(model, pairs, "logit_diff")
    auc = roc(scores, exact.top_n(10), rule="lower").auc
    assert status == 0 and f"CPR {expected.cpr:.4f}" in printed and f"CMD {expected.cmd:.4f}" in printed
    assert f"AUC {auc:.4f} (lower) against exact patching's top 10" in printed
    assert content["mib"]["cpr"] == pytest.approx(expected.cpr) and content["rocs"][0]["auc"] == pytest.approx(auc)
    assert sorted(content["minimality"]["scores"]) == sorted(scores.top_n(15).edges) and content["completeness"]["gap"]


def test_evaluate_takes_a_reference_circuit_and_a_mean_over_a_task(eapcore, scores, tmp_path):
    scores.top_n(12).save(tmp_path / "truth.json")
    options = ("--true-circuit", "truth.json", "--ablation", "mean", "--reference-task", "sort")
    status, printed, content = eapcore("evaluate", "--metric", "logit_diff", *options)
    assert status == 0 and "12 true of" in printed
    assert content["mib"]["signed"]["meta"]["method"]["ablation"]["reference"] == "sort"


def test_evaluate_says_where_scores_are_of_another_ablation(eapcore, score_file):
    assert (
        "\nscores   eap, gradient at 0.75\n" in eapcore("evaluate", "--metric", "logit_diff", "--scores", score_file)[1]
    )
    other = eapcore("evaluate", "--metric", "logit_diff", "--scores", score_file, "--ablation", "zero")
    assert other[0] == 0 and "\nscores   eap, gradient at 0.75, of the ablation corrupt\n" in other[1]


def test_evaluate_draws_the_prompts_again(eapcore, model, pairs, score_file):
    status, printed, content = eapcore("evaluate", "--metric", "logit_diff", "--bootstrap", 20, "--top-n", 10)
    per_pair = attribute(model, pairs, "logit_diff", reduce="pair", gradient_at=0.75).per_pair
    expected = stability(per_pair, model.graph, top_n=10, n_resamples=20, seed=0)
    assert status == 0 and f"share {100 * expected.overlap:.1f} % of their top 10" in printed
    assert content["stability"]["overlap"] == pytest.approx(expected.overlap)
    status, printed, _ = eapcore("evaluate", "--metric", "logit_diff", "--bootstrap", 20, "--scores", score_file)
    assert status == 2 and "--bootstrap needs the scores of each pair" in printed and "--reduce pair" in printed
    assert eapcore("attribute", "--metric", "logit_diff", "--reduce", "pair", out="pairs.safetensors")[0] == 0
    options = ("--bootstrap", 20, "--top-n", 10, "--scores", "pairs.safetensors")
    status, _, again = eapcore("evaluate", "--metric", "logit_diff", *options)
    assert status == 0 and again["stability"]["overlap"] == pytest.approx(expected.overlap)


def test_verify_a_sample_tells_its_cost_and_what_it_says_of_all_edges(eapcore, model, pairs, score_file):
    options = ("verify", "--metric", "logit_diff", "--scores", score_file)
    status, printed, content = eapcore(*options, "--sample", 20)
    assert status == 0 and "patching 20 of 46 edges: about " in printed
    assert "agree    over all edges, by eap, gradient at 0.75" in printed
    assert len(content["edges"]) == 20 and sum(content["weights"]) == pytest.approx(46)
    assert f"R² {content['r2']:.3f}" in printed
    status, printed, _ = eapcore(*options, "--sample", 20, "--top-n", 3)
    assert status == 2 and "leave out --top-n" in printed


def test_verify_scores_patches_and_follows_an_edge(eapcore, scores, model, pairs):
    edge = scores.top(1)[0][0]
    status, printed, content = eapcore("verify", "--metric", "logit_diff", "--top-n", 6, "--curve", edge)
    expected = verify(model, pairs, "logit_diff", scores, 6)
    assert status == 0 and f"R² {expected.agreement.r2:.4f}" in printed and f"{edge}: from clean" in printed
    assert content["effects"] == pytest.approx(expected.effects)
    assert content["curves"][0]["edge"] == edge and len(content["curves"][0]["effects"]) == 11


def test_another_ablation_is_not_shown_beside_the_corrupt_run(eapcore):
    for command in (["acdc", "--threshold", 0.05], ["path", "--path", "a0.h1->logits", "--metric", "logit_diff"]):
        assert "\ncorrupt " in eapcore(*command)[1]
        assert "\ncorrupt " not in eapcore(*command, "--ablation", "zero")[1]


@pytest.mark.parametrize(("command", "bars"), [
    (["attribute"], {"scoring": ("pair", 4)}),
    (["patch"], {"patching": ("edge × pair", 46 * 4)}),
    (["patch", "--nodes"], {"patching": ("node × pair", 7 * 4)}),
    (["acdc", "--threshold", "0.05,0.1"], {"searching at 0.05": ("edge", 46), "searching at 0.1": ("edge", 46)}),
    (["acdc", "--threshold", "0.05,0.1", *SCORED, "--top-n", "9,20"], {"searching": ("edge", 2 * 29)}),
    (["acdc", "--threshold", "0.1", *SCORED, "--score-threshold", 0], {"searching": ("edge", 46)}),
    (["path", "--path", "a0.h1->logits"], {"patching": ("pair", 4)}),
    (["evaluate", *SCORED, "--circuit", "scores.json", "--true-top", 5],
        {"evaluating": ("circuit × pair", 4 * (2 + 2 * 10 + 46 + 4 * 7))}),
    (["verify", "--top-n", 6], {"scoring": ("pair", 4), "verifying": ("run × pair", 6 * 4)}),
    (["verify", *SCORED, "--top-n", 6, "--curve", "a0.h1->m0"], {"verifying": ("run × pair", (6 + 11) * 4)}),
], ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "")  # fmt: skip
def test_progress_counts_to_its_end_in_its_own_unit(eapcore, score_file, scores, monkeypatch, command, bars):
    scores.top_n(15).save("scores.json")
    shown, bar = {}, tqdm.tqdm

    class Listening(bar):
        def __init__(self, **options):
            super().__init__(**{**options, "disable": False, "file": io.StringIO()})

        def close(self):
            assert self.n == self.total
            shown[self.desc.rstrip(": ")] = (self.unit, self.total)
            super().close()

    monkeypatch.setattr(tqdm, "tqdm", Listening)
    metric = [] if command[0] == "acdc" else ["--metric", "logit_diff"]
    status, printed, _ = eapcore(*command, *metric, out="file")
    assert status == 0, printed
    assert shown == bars


@pytest.mark.parametrize("ablation", ["zero", "mean"])
def test_scores_made_on_the_way_are_of_the_ablation_that_is_patched(eapcore, model, pairs, ablation):
    reference = ["--reference-task", "sort"] if ablation == "mean" else []
    expected = attribute(model, pairs, "logit_diff", ablation=ablation)
    options = ("--metric", "logit_diff", "--ablation", ablation, *reference)
    status, _, content = eapcore("verify", *options, "--top-n", 6)
    assert status == 0 and content["edges"] == [name for name, _ in expected.top(6)]
    assert content["estimates"] == pytest.approx([score for _, score in expected.top(6)])
    status, _, content = eapcore("evaluate", *options)
    curve = mib(model, pairs, "logit_diff", expected, ablation=ablation).absolute
    assert status == 0 and content["mib"]["absolute"]["values"] == pytest.approx(curve.values)
    assert content["mib"]["absolute"]["meta"]["scores"]["method"]["ablation"]["name"] == ablation


def test_verify_and_evaluate_score_by_the_method_that_they_are_told(eapcore, model, pairs):
    method = ("--method", "eap-ig", "--points", "left", "--steps", 2)
    expected = attribute(model, pairs, "logit_diff", method="eap-ig", points="left", steps=2)
    status, printed, content = eapcore("verify", "--metric", "logit_diff", "--top-n", 6, *method)
    assert status == 0 and "|score| of eap-ig" in printed
    assert content["estimates"] == pytest.approx([score for _, score in expected.top(6)])
    status, printed, content = eapcore("evaluate", "--metric", "logit_diff", *method)
    assert status == 0 and "scores   eap-ig" in printed
    assert content["mib"]["cpr"] == pytest.approx(mib(model, pairs, "logit_diff", expected).cpr)


def test_what_is_not_defined_of_one_edge_is_a_dash_and_null(eapcore):
    status, printed, content = eapcore("verify", "--top-n", 1)
    assert status == 0 and "exact = – · score –, R² –, Spearman –, same sign 100.0 %" in printed
    assert content["agreement"]["slope"] is None and "nan" not in json.dumps(content).lower()
    assert figure(math.nan) == figure(None) == "–" and figure(0.25, "+.3g") == "+0.25"


def test_options_that_do_not_suit_are_refused_before_constants_are_found(eapcore, monkeypatch, score_file):
    made = []
    monkeypatch.setattr(ablations.Ablation, "of", lambda *args, **options: made.append(args))
    for command, arguments, message in (
        ("attribute", ["--points", "left"], "need steps"),
        ("attribute", ["--budget", "2"], "a budget belongs to"),
        ("attribute", ["--method", "screened", "--reduce", "pair"], "no reduce"),
        ("attribute", ["--method", "flow-sum"], "ablates nothing"),
        ("attribute", ["--method", "hisp", "--uncertainty", "yes"], "with hisp of edges ablation must be"),
        ("attribute", ["--level", "node", "--uncertainty", "yes"], "uncertainty is of edges' own scores"),
        ("run", ["--rules", "temperature=2", "--qk", "exact"], "choose one of the two"),
        ("verify", ["--steps", "3"], "steps need a rule"),
        ("evaluate", ["--scores", score_file, "--qk", "exact"], "give one of the two"),
        ("evaluate", ["--scores", score_file.with_name("none.safetensors")], "none.safetensors"),
        ("mib", ["--methods", "eap,clean-corrupt"], "no prompt to take gradients at"),
    ):
        status, printed, _ = eapcore(command, "--ablation", "optimal", *arguments, out=f"of-{command}")
        assert (status, made) == (2, []) and message in printed, (command, arguments, printed)


@pytest.mark.parametrize(("arguments", "message"), [
    (["evaluate", "--true-top", "100000"], "--true-top must be at most the 46 edges of small, got 100000"),
    (["evaluate", "--true-top", "46"], "a ROC needs true and false edges, but all 46 edges of small would be true"),
    (["evaluate", "--true-circuit", "full.json"], "a ROC needs true and false edges, but all 46 edges"),
    (["evaluate", "--true-circuit", "other.json"], "--true-circuit must be a circuit of small, Graph(n_layers=2"),
    (["evaluate", "--true-circuit", "empty.json"], "--true-circuit must have edges, but the circuit in empty.json"),
    (["evaluate", "--circuit", "other.json"], "--circuit must be a circuit of small, Graph(n_layers=2"),
    (["evaluate", "--circuit", "empty.json"], "--circuit must have edges, but the circuit in empty.json has none"),
    (["evaluate", "--selection", "best"], "selection must be one of top_n, greedy, got 'best'"),
    (["evaluate", "--rule", "simpson", "--true-top", "5"], "rule must be one of trapezoid"),
    (["evaluate", "--bootstrap", "5", "--n", "1"], "--bootstrap needs at least 2 prompt pairs to draw from, got 1"),
    (["evaluate", "--bootstrap", "5", "--top-n", "47"], "--top-n must be at most the 46 edges of small, got 47"),
    (["verify", "--top-n", "47"], "--top-n must be at most the 46 edges of small, got 47"),
    (["verify", "--curve", "m1->m0"], "'m1->m0' is no edge"),
    (["acdc", "--threshold", "0.1,-2"], "threshold must be positive, got -2"),
    (["acdc", "--threshold", "1", *SCORED, "--top-n", "5,47"], "--top-n must be at most the 46 edges of small"),
    (["acdc", "--threshold", "1", *SCORED, "--score-threshold", "0,99"], "--score-threshold 99 leaves no edge to"),
    (["acdc", "--threshold", "1", "--circuit", "empty.json"], "--circuit must have edges"),
    (["patch", "--circuit", "other.json"], "--circuit must be a circuit of small, Graph(n_layers=2"),
    (["patch", *SCORED, "--top-n", "47"], "--top-n must be at most the 46 edges of small"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")  # fmt: skip
def test_bad_input_is_refused_before_any_work(eapcore, model, score_file, monkeypatch, arguments, message):
    other = Graph(3, 2, True)
    empty = torch.zeros_like(model.graph.edge_mask())
    for name, circuit in {
        "full": Circuit(model.graph.edge_mask(), model.graph),
        "empty": Circuit(empty, model.graph),
        "other": Circuit(other.edge_mask(), other),
    }.items():
        circuit.save(f"{name}.json")
    for folder, work in {
        "attribution.attribute": "attribute", "evaluation.evaluate": "evaluate", "evaluation.verify": "verify",
        "patching.edges": "patch_edges", "search.acdc": "acdc",
    }.items():  # fmt: skip
        module = importlib.import_module(f"eapcore.{folder}")
        monkeypatch.setattr(module, work, lambda *args, **options: pytest.fail("the work began"))
    status, printed, _ = eapcore(*arguments)
    assert status == 2 and message in printed and printed.count("\n") == 1


@pytest.mark.parametrize(("arguments", "out", "option"), [
    (["acdc", "--threshold", "1", "--circuit", "circuit.json"], "circuit.json", "--circuit"),
    (["patch", "--scores", "scores.safetensors", "--top-n", "3"], "./scores.safetensors", "--scores"),
    (["evaluate", "--true-circuit", "circuit.json"], "circuit.json", "--true-circuit"),
], ids=lambda value: value if isinstance(value, str) else value[0])  # fmt: skip
def test_a_result_is_not_written_over_what_is_read(eapcore, scores, arguments, out, option):
    scores.save("scores.safetensors")
    scores.top_n(9).save("circuit.json")
    before = {name: Path(name).read_bytes() for name in ("scores.safetensors", "circuit.json")}
    status, printed, _ = eapcore(*arguments, out=out)
    name = out.removeprefix("./")
    assert status == 2 and f"--out would write over {name}, which {option} reads: give it another name" in printed
    assert before == {name: Path(name).read_bytes() for name in before}


def test_a_bootstrap_of_one_resample_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", "--bootstrap", "1"])
    assert "argument --bootstrap: must be an integer of at least 2, got '1'" in capsys.readouterr().err


def test_nodes_are_written_where_they_are_told(eapcore, tmp_path):
    assert eapcore("patch", "--nodes", out="effects.safetensors")[0] == 0
    assert json.loads((tmp_path / "effects.safetensors").read_text())["nodes"]


@pytest.mark.parametrize("command", ["verify", "evaluate"])
def test_a_method_beside_a_score_file_is_refused(eapcore, score_file, command):
    status, printed, _ = eapcore(command, "--scores", score_file, "--method", "eap", "--steps", 3)
    assert status == 2 and "--scores names scores that are there, and --method, --steps how to make some" in printed


def test_a_budget_for_everything_patches_every_edge(eapcore, tmp_path):
    status, printed, _ = eapcore("attribute", "--method", "screened", "--budget", 1e9, out="s.safetensors")
    scores = EdgeScores.load(tmp_path / "s.safetensors")
    assert status == 0 and f"by screened, {scores.graph.n_edges} edges exact, in " in printed


@pytest.mark.parametrize(("option", "text", "message"), [
    ("--out", "", "must name a file or a folder, got ''"),
    ("--resume", "", "must name a file or a folder, got ''"),
    ("--points", "0.5:", "must be a rule, or points as POINT:WEIGHT,POINT:WEIGHT, got '0.5:'"),
    ("--points", "nan:1", "must be a rule, or points as"),
    ("--points", "0.5:0.5,1", "must be a rule, or points as"),
    ("--rules", "norm=identity", "must be some of norm=frozen, activation=identity, attention=frozen, products=halved"),
    ("--rules", "norm=frozen,norm=frozen", "must be some of norm=frozen"),
    ("--rules", "temperature=0", "must be some of norm=frozen"),
    ("--rules", "cut=a0", "must be some of norm=frozen"),
    ("--rules", "", "must be some of norm=frozen"),
])  # fmt: skip
def test_malformed_points_and_rules_say_how_they_are_written(capsys, option, text, message):
    with pytest.raises(SystemExit) as stop:
        main(["attribute", option, text])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and f"argument {option}: {message}" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(("arguments", "message"), [
    (["attribute", "--method", "eap-ig", "--points", "0.5:0.5"], "weights that sum to 1, got [(0.5, 0.5)]"),
    (["attribute", "--method", "clean-corrupt", "--ablation", "zero"], "ablation 'zero' has no prompt to take"),
    (["attribute", "--level", "layer"], "level must be one of edge, node, neuron, got 'layer'"),
    (["attribute", "--level", "node", "--top-n", "8"], "--top-n must be at most the 7 senders of small, got 8"),
    (["patch", "--per-position"], "--per-position goes with --nodes"),
    (["patch", "--resume", "result.json"], "--out would write a file where --resume keeps a folder, result.json"),
    (["patch", "--top-n", "5"], "--scores and --top-n go together"),
    (["patch", "--nodes", "--top-n", "3"], "--nodes patches every sender in one go: leave out --top-n"),
    (["patch", "--nodes", "--scores", "f", "--top-n", "5"], "leave out --scores, --top-n, for edges alone"),
    (["patch", "--nodes", "--circuit", "c.json"], "leave out --circuit"),
    (["patch", "--ablation", "noise"], "ablation must be one of corrupt, zero, mean"),
    (["patch", "--circuit", "nowhere.json"], "nowhere.json"),
    (["acdc", "--threshold", "-1"], "threshold must be positive, got -1"),
    (["acdc", "--threshold", "0.1", "--scores", "f"], "--scores goes together with --top-n or --score-threshold"),
    (["acdc", "--threshold", "0.1", "--top-n", "5"], "--scores goes together with --top-n or --score-threshold"),
    (["path"], "give --path, or --senders and --receivers"),
    (["path", "--path", "a0.h1->logits", "--through", "m0"], "--through goes with --senders and --receivers"),
    (["evaluate", "--top-n", "5"], "--top-n goes with --bootstrap"),
    (["evaluate", "--rule", "lower"], "--rule goes with --true-circuit or --true-top"),
    (["path", "--path", "a0.h1"], "a path is written sender->receiver"),
    (["verify", "--scores", "nowhere.safetensors"], "a score file was expected at nowhere.safetensors"),
    (["attribute", "--reduce", "pair", "--pairs-out", __file__], "--pairs-out: "),
])  # fmt: skip
def test_bad_input_is_refused_in_one_line(eapcore, arguments, message):
    status, printed, _ = eapcore(*arguments)
    assert status == 2 and message in printed and printed.count("\n") == 1


def test_the_systems_own_errors_name_the_file_first(tmp_path, capsys):
    assert main(["sweep", str(tmp_path / "no.toml")]) == 2
    assert capsys.readouterr().err == f"eapcore: {tmp_path}/no.toml: no such file or directory\n"


def test_acdc_needs_a_threshold(capsys):
    with pytest.raises(SystemExit):
        main(["acdc"])
    assert "--threshold" in capsys.readouterr().err
