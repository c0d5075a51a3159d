"""Which way another tool's scores point, and what else is known of them: kept, turned, refused where it contradicts,
said where it is missing."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from models import random_case, random_model, random_scores
from refusal import refused

from eapcore import attribute
from eapcore.evaluation.evaluate import evaluate
from eapcore.evaluation.faithfulness import faithfulness, mib
from eapcore.evaluation.verify import verify
from eapcore.graph.circuit import Circuit
from eapcore.graph.graph import Graph
from eapcore.graph.scores import EdgeScores
from eapcore.interop import acdc_files, auto_circuit, eap_ig
from eapcore.interop.eap_ig.names import of_each_head
from eapcore.tasks import PromptPairs

MODEL, _DRAWN = random_case([7, 7, 7], d_vocab=29)
PAIRS = PromptPairs.from_lists(_DRAWN.clean.tolist(), _DRAWN.corrupt.tolist(), [1, 2, 3], [4, 5, 6])
LABEL = torch.stack([PAIRS.answers[:, 0], PAIRS.wrong[:, 0]], 1)
OURS = attribute(MODEL, PAIRS)


def logit_diff(logits, clean_logits, input_lengths, labels, mean=True, loss=False):
    """As EAP-IG's notebooks and MIB have it."""
    last = logits[torch.arange(len(logits)), input_lengths - 1]
    found = (last.gather(1, labels[:, :1]) - last.gather(1, labels[:, 1:])).squeeze(1)
    found = -found if loss else found
    return found.mean() if mean else found


def divergence(logits, clean_logits, input_lengths, labels, mean=True, loss=True):
    """MIB's, which passes `loss` over."""
    return (logits[:, -1].log_softmax(-1) - 1).square().sum(-1).mean()


def bare(logits, clean_logits, input_lengths, labels):
    return logit_diff(logits, clean_logits, input_lengths, labels)


def scored(metric, method="EAP", **options):
    """(what is returned, what the package's graph holds)."""
    graph = SimpleNamespace(cfg={}, scores=torch.zeros(eap_ig.their_shape(MODEL.graph), dtype=torch.float64))
    batches = [(PAIRS.clean, PAIRS.corrupt, LABEL)]
    found = eap_ig.attribute(MODEL, graph, batches, metric, method, quiet=True, **options)
    return found, eap_ig.in_our_order(MODEL.graph, graph.scores)


@pytest.mark.parametrize(("metric", "options", "turned"), [
    (logit_diff, {}, 1),
    (partial(logit_diff, loss=True), {}, -1),
    (partial(partial(logit_diff, loss=True), mean=True), {}, -1),
    (partial(logit_diff, loss=False), {}, 1),
    (partial(logit_diff, loss=True), {"sign": "loss"}, -1),
    (bare, {"sign": "metric"}, 1),
    (lambda *args: -bare(*args), {"sign": "loss"}, -1),
])  # fmt: skip
def test_a_loss_is_known_by_its_keyword_or_by_what_is_said(metric, options, turned):
    found, package = scored(metric, **options)
    assert float((found.scores - OURS.scores).abs().max()) <= 1e-12  # by our sign, whatever was differentiated
    assert torch.equal(package, turned * found.scores)  # the package's numbers stay the package's
    assert found.meta["sign_of_source"] == ("loss" if turned == -1 else "metric")
    assert torch.equal(found.top_n(5, signed=True).mask, OURS.top_n(5, signed=True).mask)
    assert mib(MODEL, PAIRS, "logit_diff", found).cpr == pytest.approx(mib(MODEL, PAIRS, "logit_diff", OURS).cpr)


@pytest.mark.parametrize("metric", [bare, lambda *args: bare(*args), partial(divergence, loss=False)])
def test_where_nothing_says_the_sign_nothing_needs_it(metric):
    found, package = scored(metric)
    assert torch.equal(package, found.scores) and found.meta["sign_of_source"] is None
    assert found.top_n(10).n_edges == found.greedy(10).n_edges == 10
    for call in (
        lambda: found.top(3, signed=True),
        lambda: found.top_n(3, signed=True),
        lambda: found.threshold(0.1, signed=True),
        lambda: found.greedy(3, signed=True),
        lambda: mib(MODEL, PAIRS, "logit_diff", found),
        lambda: verify(MODEL, PAIRS, "logit_diff", found, 3),
        lambda: auto_circuit.to_prune_scores(found),
    ):
        refused("of a metric, of which more is better, or of a loss: give sign='metric' or sign='loss'", call)


def test_signs_that_contradict_each_other_or_are_none_are_refused(tmp_path):
    refused("called with loss=True, but sign='metric'", scored, partial(logit_diff, loss=True), sign="metric")
    refused(
        "sign must be one of metric, loss, none, got 'negative': sign='metric' if more", scored, bare, sign="negative"
    )
    refused("sign must be one of", auto_circuit.from_prune_scores, {}, MODEL.graph, sign=1)
    path = tmp_path / "graph.json"
    eap_ig.GraphFile.of(OURS, 24).save(path, sign="loss")
    refused("it says that its sign is 'loss', but sign='metric' was given", eap_ig.GraphFile.load, path, sign="metric")
    refused("graph.json, a graph file .* does not say which way", eap_ig.GraphFile.of(OURS, 24).save, path)
    refused("have one, so that sign='none' does not suit", eap_ig.GraphFile.of(OURS, 24).save, path, sign="none")
    sizes = attribute(MODEL, PAIRS, method="grad-drop")
    refused("have no sign, so that sign='loss' does not suit", eap_ig.GraphFile.of(sizes, 24).save, path, sign="loss")


def test_scores_without_a_sign_rank_by_their_size():
    sizes = attribute(MODEL, PAIRS, method="grad-drop")
    assert sizes.top(9, signed=True) == sizes.top(9)
    assert torch.equal(sizes.greedy(20, signed=True).mask, sizes.greedy(20).mask)


@pytest.mark.parametrize("suffix", [".json", ".pt"])
def test_graph_files_keep_what_is_known_and_are_turned_both_ways(tmp_path, suffix):
    path, plain = tmp_path / f"graph{suffix}", tmp_path / f"plain{suffix}"
    sides = {"node_scores": torch.randn(MODEL.graph.n_senders, dtype=torch.float64)}
    file = eap_ig.GraphFile(OURS.top_n(9), 24, OURS, **sides)
    for sign, factor in (("metric", 1), ("loss", -1)):
        file.save(path, sign=sign)
        again = eap_ig.GraphFile.load(path)
        assert torch.equal(again.scores.scores, OURS.scores) and torch.equal(again.node_scores, file.node_scores)
        for key in ("model", "metric", "task"):
            assert again.scores.meta[key] == dict(OURS.meta)[key]
        assert again.scores.meta["method"]["ablation"] == {"name": "corrupt"}
        assert again.scores.top_n(9, signed=True).n_edges == 9
        # As another tool wrote it, without a word of ours.
        if suffix == ".json":
            content = json.loads(path.read_text())
            del content["eapcore"]
            plain.write_text(json.dumps(content))
        else:
            content = torch.load(path, weights_only=True)
            del content["eapcore"]
            torch.save(content, plain)
        unknown, told = eap_ig.GraphFile.load(plain), eap_ig.GraphFile.load(plain, sign=sign)
        assert torch.equal(told.scores.scores, OURS.scores) and torch.equal(told.node_scores, file.node_scores)
        assert torch.equal(unknown.scores.scores, factor * OURS.scores)
        refused("a signed ranking needs to know", unknown.scores.top, 3, signed=True)
        unknown.save(path)  # as it was, and still unknown
        assert torch.equal(eap_ig.GraphFile.load(path, sign=sign).scores.scores, OURS.scores)
        told.save(path)  # in the sign that it came with
        assert torch.equal(eap_ig.GraphFile.load(path).scores.scores, OURS.scores)
    eap_ig.GraphFile(OURS.top_n(9), 24).save(path)  # a circuit has no sign
    assert eap_ig.GraphFile.load(path, sign="loss").scores is None


def test_auto_circuit_s_and_acdc_s_scores_are_turned_both_ways(tmp_path):
    for sign, factor in (("loss", -1), ("metric", 1)):
        prune = auto_circuit.to_prune_scores(OURS, sign=sign)
        assert torch.equal(prune["blocks.0.hook_q_input"][0, 0], factor * OURS.scores[0, 0])
        again = auto_circuit.from_prune_scores(prune, MODEL.graph, sign=sign)
        assert torch.equal(again.scores, OURS.scores) and again.top(3, signed=True) == OURS.top(3, signed=True)
        for form in acdc_files.FORMS:
            acdc_files.save_edges(tmp_path / "edges.json", OURS, form=form, sign=sign)
            again = acdc_files.load_edges(tmp_path / "edges.json", MODEL.graph, sign=sign)[1]
            assert torch.equal(again.scores, OURS.scores) and again.top(3, signed=True) == OURS.top(3, signed=True)
    unknown = [acdc_files.load_edges(tmp_path / "edges.json", MODEL.graph)[1]]
    unknown.append(auto_circuit.from_prune_scores(auto_circuit.to_prune_scores(OURS), MODEL.graph))
    for scores in unknown:
        refused("a signed ranking needs to know", scores.top, 3, signed=True)


def test_what_is_known_guards_against_another_model_metric_and_ablation(caplog):
    found, _ = scored(logit_diff)
    assert found.meta["model"]["content_hash"] == MODEL.content_hash
    assert found.meta["metric"] == {"name": "logit_diff", "source": "EAP-IG"}
    verify(MODEL, PAIRS, "logit_diff", found, 3)
    evaluate(MODEL, PAIRS, "logit_diff", found)
    assert not caplog.records
    other = random_model(seed=5, d_vocab=29, n_layers=MODEL.config.n_layers, n_heads=MODEL.config.n_heads)
    if other.graph == MODEL.graph:
        refused("whose weights are not those of", verify, other, PAIRS, "logit_diff", found, 3)
        for judge in (evaluate, faithfulness, mib):
            refused("whose weights are not those of", judge, other, PAIRS, "logit_diff", found)
    refused("estimate the metric logit_diff, but nll was to be measured", verify, MODEL, PAIRS, "nll", found, 3)
    zero, _ = scored(logit_diff, intervention="zero")
    refused(
        "estimate the ablation {'name': 'zero'.*, but {'name': 'corrupt'} was", verify, MODEL, PAIRS, "logit_diff", zero
    )
    refused("estimate the ablation", partial(verify, ablation="zero"), MODEL, PAIRS, "logit_diff", found, 3)
    for strange in (lambda *args: bare(*args), bare):
        verify(MODEL, PAIRS, "logit_diff", scored(strange, sign="metric")[0], 3)
        assert f"estimate {strange.__name__} of EAP-IG: taken for logit_diff" in caplog.records.pop().getMessage()
    verify(MODEL, PAIRS, "logit_diff", zero, 3, ablation="zero")  # but for the embedding's positions, which is said
    assert "'embedding': 'of the tokens alone'" in caplog.records.pop().getMessage()
    read = auto_circuit.from_prune_scores(auto_circuit.to_prune_scores(OURS), MODEL.graph, sign="loss")
    verify(MODEL, PAIRS, "logit_diff", read, 3)
    message = caplog.records.pop().getMessage()
    assert message.startswith(
        "the scores, from auto-circuit, do not say with which model, metric and ablation they were"
    )
    for judge in (evaluate, faithfulness, mib):
        judge(MODEL, PAIRS, "logit_diff", read)
        assert "do not say with which model they were made" in caplog.records.pop().getMessage()


@pytest.mark.parametrize("suffix", [".json", ".pt"])
@pytest.mark.parametrize("parallel", [False, True])
def test_files_of_grouped_and_parallel_models(tmp_path, suffix, parallel):
    each, shared = Graph(2, 6, True, parallel), Graph(2, 6, True, parallel, n_kv=2)
    path, scores = tmp_path / f"graph{suffix}", random_scores(each)
    eap_ig.GraphFile.of(scores, 8, scores.top_n(40)).save(path, sign="loss")
    again = eap_ig.GraphFile.load(path)
    assert again.circuit.graph == each and torch.equal(again.scores.scores, scores.scores)
    assert torch.equal(again.circuit.mask, scores.top_n(40).mask)
    circuit = Circuit.from_edges(shared, ["embed->a1.kv1<k>", "a0.h5->a1.kv0<v>", "a0.h2->a1.h4<q>", "m0->logits"])
    eap_ig.GraphFile(circuit, 8).save(path)
    edges = [f"embed->a1.h{h}<k>" for h in (3, 4, 5)] + [f"a0.h5->a1.h{h}<v>" for h in (0, 1, 2)]
    assert set(eap_ig.GraphFile.load(path).circuit.edges) == {*edges, "a0.h2->a1.h4<q>", "m0->logits"}
    assert torch.equal(of_each_head(each, scores.mask), scores.mask)
    grouped = EdgeScores(shared.edge_mask().double(), shared)
    refused("of key and value heads", eap_ig.GraphFile.of(grouped, 8).save, path, sign="metric")
    refused("MIB counts the k and v inputs of each query head", eap_ig.save_mib_circuits, tmp_path, grouped, d_model=8)
    refused("each query head: load the model with kv='each'", scored_grouped)


def scored_grouped():
    model = replace(MODEL, config=replace(MODEL.config, n_heads=2, n_key_value_heads=1, kv_grouped=True))
    graph = SimpleNamespace(cfg={}, scores=torch.zeros(1))
    eap_ig.attribute(model, graph, [], bare, "EAP", quiet=True)
