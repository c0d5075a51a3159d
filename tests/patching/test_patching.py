"""Exact patching is exact: edges, nodes, paths and circuits against one prompt, one edge at a time."""

from __future__ import annotations

import dataclasses
import json
import sys

import oracle
import pytest
import torch
from everything import EXACT
from models import joined, random_case, random_circuit, random_model, random_pairs
from refusal import refused

from eapcore.attribution.attribute import attribute
from eapcore.execution.experiment import Experiment
from eapcore.graph.circuit import Circuit
from eapcore.graph.scores import EdgeScores
from eapcore.models.forward import forward
from eapcore.patching.circuits import metric_on, run_circuit
from eapcore.patching.edges import patch_edges
from eapcore.patching.interpolate import interpolate
from eapcore.patching.nodes import patch_nodes
from eapcore.patching.paths import path_patch, routes
from eapcore.tasks import PromptPairs
from eapcore.tasks.metrics import METRICS

MODELS = {
    "gpt2": {"n_layers": 2, "n_heads": 2, "d_model": 12},
    "one layer": {"n_layers": 1, "n_heads": 2},
    "attention-only": {"n_layers": 3, "n_heads": 2, "d_mlp": None, "split_qkv": True},
    "no LayerNorm": {"n_heads": 2, "normalization": None, "scale": 0.2},
}
LENGTHS = [6, 3]
SMALL = MODELS["gpt2"]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def literal(model, pairs, metric, change):
    """Mean over pairs of metric(changed run) − metric(clean run), one prompt at a time.

    change(clean senders, corrupt senders) gives read(r, senders, bias) for `oracle.run`.
    """

    def score(pair):
        read = change(pair.clean.senders, pair.corrupt.senders)
        return float(pair.value(oracle.run(model, pair.tokens, read)) - pair.value(pair.clean))

    return oracle.mean_of(model, pairs, score, METRICS[metric])


def one_edge(edge, scale=1.0, other=None):
    """The change that patches one edge (s, r) alone."""
    s0, r0 = edge

    def change(clean, corrupt):
        sent = corrupt[s0] if other is None else other(clean[s0])

        def read(r, senders, bias):
            stream = bias + sum(senders)
            return stream + scale * (sent - senders[s0]) if r == r0 else stream

        return read

    return change


def one_by_one(model, pairs, metric, other=None):
    """The effect of every edge, each patched alone."""

    def score(pair):
        effects = torch.zeros(model.graph.n_senders, model.graph.n_receivers, dtype=torch.float64)
        for s, r in model.graph.edge_mask().nonzero().tolist():
            read = one_edge((s, r), other=other)(pair.clean.senders, pair.corrupt.senders)
            effects[s, r] = pair.value(oracle.run(model, pair.tokens, read)) - pair.value(pair.clean)
        return effects

    return oracle.mean_of(model, pairs, score, METRICS[metric])


def close(found, expected, atol=1e-10):
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


# Edges


@pytest.mark.parametrize("first", [0, 2], ids=["first token", "shared prefix"])
@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_the_effect_of_every_edge_equals_one_edge_at_a_time(options, first):
    model, pairs = random_case(LENGTHS, first_difference=first, **options)
    expected = one_by_one(model, pairs, "logit_diff")
    effects = patch_edges(model, pairs, "logit_diff", batch_size=2)
    assert expected.abs().max() > 1e-2
    close(effects.scores, expected)
    assert bool((effects.scores[~effects.mask] == 0).all())


@pytest.mark.parametrize("metric", ["kl", "prob_diff"])
def test_the_effect_of_every_edge_is_that_of_the_metric(metric):
    model, pairs = random_case([5, 4], **SMALL)
    close(patch_edges(model, pairs, metric).scores, one_by_one(model, pairs, metric))


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_effects_depend_neither_on_the_batch_size_nor_on_the_copies_in_a_forward(batch_size, limited):
    model, pairs = random_case([6, 3, 7, 4, 7], first_difference=1)
    whole = patch_edges(model, pairs).scores
    limited(copy_tokens=7 * batch_size * 3)
    close(patch_edges(model, pairs, batch_size=batch_size).scores, whole, 1e-13)


@pytest.mark.parametrize(("copies", "expected"), [(1, 1), (10, 2), (100, 3)])
def test_pairs_of_different_spans_run_apart_once_each_has_enough_tokens(copies, expected, limited):
    model, spans = random_model(), zip([0, 4, 0, 7, 4, 4, 3], [5, 8, 5, 9, 8, 6, 9], strict=True)
    pairs = joined(*(random_pairs(model, [stop], first_difference=first) for first, stop in spans))
    limited(copy_work=1000 * model.config.d_model**2)  # one group more is worth 100 tokens divided by the copies
    experiment = Experiment.of(model, pairs)
    groups = experiment.groups(9, copies)
    assert sorted(i for group in groups for i in group) == list(range(7)) and len(groups) == expected
    some = experiment.groups(9, copies, torch.arange(7) % 2 == 0)
    assert sorted(i for group in some for i in group) == [0, 2, 4, 6]


@pytest.mark.parametrize("ablation", ["corrupt", "zero"])
def test_effects_do_not_depend_on_which_pairs_run_together(ablation, limited, monkeypatch):
    model = random_model()
    parts = ((6, 1), (7, 5), (9, 0))
    pairs = joined(*(random_pairs(model, [n] * 2, first_difference=first, seed=n) for n, first in parts))
    limited(copy_work=0)
    apart = patch_edges(model, pairs, ablation=ablation).scores
    monkeypatch.setattr(Experiment, "groups", lambda self, *how: [list(range(len(self)))])
    close(patch_edges(model, pairs, ablation=ablation).scores, apart, 1e-13)


def test_answers_before_the_last_token_are_read_there():
    model = random_model(**SMALL)
    pairs = dataclasses.replace(random_pairs(model, [7, 7, 5]), positions=torch.tensor([3, 6, 2]))
    close(patch_edges(model, pairs).scores, one_by_one(model, pairs, "logit_diff"))


def test_an_edge_can_carry_zero_or_a_mean_instead_of_the_corrupt_activation():
    model, pairs = random_case([5, 4], **SMALL)
    zero = one_by_one(model, pairs, "logit_diff", other=torch.zeros_like)
    close(patch_edges(model, pairs, ablation="zero").scores, zero)
    s, r = model.graph.edge("m0->a1.h1<v>")
    mean = oracle.ablated_means(model, pairs)
    expected = literal(model, pairs, "logit_diff", one_edge((s, r), other=lambda _: mean[s]))
    effects = patch_edges(model, pairs, edges=["m0->a1.h1<v>"], ablation="mean")
    assert abs(effects["m0->a1.h1<v>"] - expected) <= 1e-12
    assert effects.meta["method"]["ablation"]["name"] == "mean"


def test_only_the_edges_that_were_asked_for_are_measured_and_named():
    model, pairs = random_case(LENGTHS)
    names = ["embed->a0.h1<k>", "m0->a1.h2<q>", "a1.h0->logits", "a0.h0->m1"]
    effects = patch_edges(model, pairs, edges=names)
    whole = patch_edges(model, pairs)
    assert [name for name in names if abs(effects[name] - whole[name]) > 1e-13] == []
    assert int((effects.scores != 0).sum()) == 4
    assert sorted(effects.meta["method"]["edges"]) == sorted(names)
    assert whole.meta["method"]["edges"] == "all"
    assert whole.meta["metric"] == attribute(model, pairs).meta["metric"] | whole.meta["metric"]


def test_the_slope_of_a_small_step_is_the_eap_score():
    model, pairs = random_case(LENGTHS)
    scores = attribute(model, pairs)
    for name, score in scores.top(3):
        curve = interpolate(model, pairs, "logit_diff", name, points=[0.0, 1e-6, 1.0], score=score)
        assert abs(curve.effects[1] * 1e6 - score) <= 1e-4 * max(1, abs(score))
        assert abs(curve.effects[0]) <= 1e-14 and curve.estimate == [0, score * 1e-6, score]
        assert abs(curve.effects[2] - patch_edges(model, pairs, edges=[name])[name]) <= 1e-12


def test_points_between_clean_and_corrupt_equal_the_oracle(tmp_path):
    model, pairs = random_case(LENGTHS, **SMALL)
    for name in ("embed->a0.h1<q>", "m0->a1.h0<k>", "a0.h1->m1", "m1->logits"):
        curve = interpolate(model, pairs, "logit_diff", name, points=3)
        expected = literal(model, pairs, "logit_diff", one_edge(model.graph.edge(name), scale=0.5))
        assert abs(curve.effects[1] - expected) <= 1e-12
    curve.save(tmp_path / "curve.json")
    content = json.loads((tmp_path / "curve.json").read_text())
    assert (content["format"], content["points"]) == ("eapcore-interpolation", [0.0, 0.5, 1.0])


@pytest.mark.parametrize("batch_size", [1, 4])
def test_progress_counts_what_is_run(batch_size, limited):
    limited(copy_tokens=40)
    model, pairs = random_case([6, 3, 5], **SMALL)
    for call, total in (
        (lambda **o: interpolate(model, pairs, "nll", "m0->m1", points=7, **o), 7 * 3),
        (lambda **o: path_patch(model, pairs, "nll", ["m0"], ["m0->logits"], **o), 3),
        (lambda **o: patch_nodes(model, pairs, nodes=["m0", "m1"], **o), 2 * 3),
        (lambda **o: patch_edges(model, pairs, edges=["m0->m1", "m0->logits"], **o), 2 * 3),
        (lambda **o: metric_on(model, pairs, "nll", random_circuits(model.graph, 9), **o), 9 * 3),
    ):
        calls = []
        call(batch_size=batch_size, progress=lambda *counts, calls=calls: calls.append(counts))
        done, totals = zip(*calls, strict=True)
        assert set(totals) == {total} and list(done) == sorted(set(done)) and done[-1] == total


NARROW = {name: run for name, run in EXACT.items() if name != "routes"}  # which is one small number
NARROW["edges, mean"] = lambda m, p: EXACT["edges"](m, p, ablation="mean")


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 0.02), (torch.bfloat16, 0.15)], ids=str
)
@pytest.mark.parametrize("options", [MODELS["gpt2"], MODELS["attention-only"]], ids=["gpt2", "attention-only"])
@pytest.mark.parametrize("what", NARROW)
def test_exact_effects_in_every_dtype_agree_with_float64(what, options, dtype, tolerance):
    wide, model = (random_model(**options, seed=2, dtype=d) for d in (torch.float64, dtype))
    pairs = random_pairs(wide, LENGTHS, first_difference=1)
    expected, found = (torch.as_tensor(NARROW[what](m, pairs)).double() for m in (wide, model))
    assert float((found - expected).norm() / expected.norm()) <= tolerance


def test_effects_are_float32_unless_the_model_is_float64():
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32)):
        model = random_model(dtype=dtype)
        assert patch_edges(model, random_pairs(model, LENGTHS)).scores.dtype == expected


# Resuming


class Stop(Exception):
    pass


def stop_after(count):
    def stop(done, total):
        if done >= count:
            raise Stop

    return stop


def interrupted(model, pairs, path, after, **options):
    with pytest.raises(Stop):
        patch_edges(model, pairs, batch_size=2, resume=path, progress=stop_after(after), **options)


@pytest.mark.parametrize("after", [1, 100, 300])
def test_an_interrupted_run_goes_on_where_it_stopped(after, tmp_path, limited):
    limited(copy_tokens=64)
    model, pairs = random_case([6, 3, 7, 4, 7])
    expected = patch_edges(model, pairs, batch_size=2)
    path = tmp_path / "partial"
    interrupted(model, pairs, path, after)
    calls = []
    resumed = patch_edges(
        model, pairs, batch_size=2, resume=path, progress=lambda done, total: calls.append((done, total))
    )
    assert calls[0][0] >= after and calls[-1] == (model.graph.n_edges * 5,) * 2
    assert torch.equal(resumed.scores, expected.scores) and resumed.meta == expected.meta
    assert [p.name for p in tmp_path.iterdir()] == ["partial"]


@pytest.mark.parametrize("after", [1, 100, 300])
@pytest.mark.parametrize("ablation", ["corrupt", "mean"])
def test_a_run_goes_on_where_other_sizes_go_through_the_model_together(after, ablation, tmp_path, limited, monkeypatch):
    model, pairs = random_case([6, 3, 7, 4, 7])
    expected = patch_edges(model, pairs, ablation=ablation)
    limited(copy_tokens=64, copy_work=0)
    interrupted(model, pairs, tmp_path / "partial", after, ablation=ablation)
    monkeypatch.undo()  # what another kind of device would choose, with pairs that go together otherwise
    counts = []
    resumed = patch_edges(
        model, pairs, ablation=ablation, resume=tmp_path / "partial", progress=lambda done, _: counts.append(done)
    )
    close(resumed.scores, expected.scores, 1e-13)
    assert resumed.meta["metric"] == pytest.approx(expected.meta["metric"], abs=1e-13)
    assert counts[0] >= after and counts[-1] == model.graph.n_edges * 5
    assert counts == sorted(set(counts))


def test_an_interruption_between_any_two_steps_counts_no_edge_twice(tmp_path):
    model, pairs = random_case([3, 2], n_layers=1, n_heads=1, d_model=6, d_head=3, d_mlp=5)
    expected = patch_edges(model, pairs, batch_size=1)

    def run(path, at):
        """Patch with an interruption before the step `at` of patch_edges and what keeps its result; how many ran."""
        steps = 0

        def step(frame, event, _):
            nonlocal steps
            if event == "opcode":
                steps += 1
                if steps == at:
                    raise KeyboardInterrupt
            return step

        def watch(frame, event, _):
            watched = ("measure_edges", "_measure", "begin", "end")
            if frame.f_code.co_name not in watched or "eapcore" not in frame.f_code.co_filename:
                return None
            frame.f_trace, frame.f_trace_opcodes = step, True  # Python 3.13 takes the second of traced frames only
            return step

        before = sys.gettrace()
        sys._getframe().f_trace_opcodes = True  # Python 3.12's settrace asks whether any frame does
        sys.settrace(watch)
        try:
            patch_edges(model, pairs, batch_size=1, resume=path)
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
        return steps

    stops = range(1, run(tmp_path / "whole", -1), 9)
    assert len(stops) > 60
    for at in stops:
        path = tmp_path / str(at)
        assert run(path, at) >= at
        close(patch_edges(model, pairs, batch_size=1, resume=path).scores, expected.scores, 1e-14)


def test_another_callable_of_the_same_name_is_refused(tmp_path):
    model, pairs = random_case([6, 3, 7, 4, 7])

    def metrics(scale):
        return lambda logits: scale * logits[:, 3]

    one, same, other = metrics(1.0), metrics(1.0), metrics(1.001)
    assert one.__qualname__ == other.__qualname__
    with pytest.raises(Stop):
        patch_edges(model, pairs, one, batch_size=2, resume=tmp_path / "partial", progress=stop_after(100))
    with pytest.raises(ValueError, match=r"belongs to another metric .*<lambda>: on the clean and corrupt runs it"):
        patch_edges(model, pairs, other, resume=tmp_path / "partial")
    resumed = patch_edges(model, pairs, same, resume=tmp_path / "partial")
    close(resumed.scores, patch_edges(model, pairs, one).scores, 1e-13)


def test_a_partial_result_of_something_else_is_refused(tmp_path):
    model, pairs = random_case(LENGTHS)
    path = tmp_path / "partial"
    interrupted(model, pairs, path, 1)
    other = random_pairs(model, LENGTHS, seed=9)
    for changed, arguments in {
        "model": (random_model(seed=1), pairs, "logit_diff"),
        "task": (model, other, "logit_diff"),
        "metric": (model, pairs, "nll"),
        "edges": (model, pairs, "logit_diff", ["m0->m1"]),
    }.items():
        refused(f"belongs to another {changed}: delete it", patch_edges, *arguments, resume=path)
    refused("another ablation", patch_edges, model, pairs, resume=path, ablation="zero")
    (file,) = path.glob("*.safetensors")
    file.write_bytes(b"nothing")
    refused("must be a partial result of edges", patch_edges, model, pairs, resume=path)
    refused("must be a folder for what is done so far, but .* is a file", patch_edges, model, pairs, resume=file,
            error=NotADirectoryError)  # fmt: skip


# Circuits


def random_circuits(graph, count):
    return [
        random_circuit(graph, share, seed) for seed, share in enumerate(torch.linspace(0.4, 0.9, count).tolist(), 5)
    ]


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_several_circuits_in_one_forward_each_equal_the_oracle(options):
    model, pairs = random_case(LENGTHS, first_difference=1, **options)
    ends = [Circuit(model.graph.edge_mask() & keep, model.graph) for keep in (True, False)]
    circuits = [*random_circuits(model.graph, 3), *ends]
    logits = run_circuit(model, pairs, circuits)
    for circuit, found in zip(circuits, logits, strict=True):
        close(found, oracle.circuit_logits(model, pairs, circuit.mask))
        close(run_circuit(model, pairs, circuit), found, 1e-12)
    for prompts, found in zip((pairs.clean, pairs.corrupt), logits[-2:], strict=True):
        runs = [oracle.run(model, row[:n]).logits[n - 1] for row, n in zip(prompts, LENGTHS, strict=True)]
        close(found, torch.stack(runs))


@pytest.mark.parametrize("kind", ["zero", "mean", "mean-positional"])
def test_circuits_with_zero_and_mean_ablation_equal_the_oracle(kind):
    model = random_model()
    pairs, reference = random_pairs(model, LENGTHS), random_pairs(model, [8, 5], seed=4)
    mean = oracle.ablated_means(model, reference, per_position=kind == "mean-positional")

    def other(s, clean, corrupt):
        if kind == "zero":
            return torch.zeros_like(clean[s])
        return mean[s][: len(clean[s])] if mean.ndim == 3 else mean[s]

    options = {"ablation": kind} if kind == "zero" else {"ablation": kind, "reference": reference}
    empty = Circuit(torch.zeros_like(model.graph.edge_mask()), model.graph)
    circuits = [*random_circuits(model.graph, 2), empty, Circuit(model.graph.edge_mask(), model.graph)]
    for circuit, found in zip(circuits, run_circuit(model, pairs, circuits, **options), strict=True):
        close(found, oracle.circuit_logits(model, pairs, circuit.mask, other))


def test_the_mean_of_a_metric_over_circuits_does_not_depend_on_the_batch_size():
    model, pairs = random_case([6, 3, 7, 4, 7])
    circuits = [*random_circuits(model.graph, 3), Circuit(model.graph.edge_mask(), model.graph)]
    whole = metric_on(model, pairs, "logit_diff", circuits, batch_size=5)
    meta = attribute(model, pairs).meta["metric"]
    assert abs(whole[-1] - meta["clean"]) <= 1e-12
    for size in (1, 2):
        assert metric_on(model, pairs, "logit_diff", circuits, batch_size=size) == pytest.approx(whole, abs=1e-12)


# Nodes


def node_change(s0, position=None):
    def change(clean, corrupt):
        def read(r, senders, bias):
            stream = bias + sum(senders)
            if len(senders) > s0:
                delta = corrupt[s0] - clean[s0]
                if position is not None:
                    delta = delta * (torch.arange(len(delta)) == position)[:, None]
                stream = stream - senders[s0] + clean[s0] + delta
            return stream

        return read

    return change


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_patching_a_node_equals_replacing_what_it_sends_everywhere(options):
    model, pairs = random_case(LENGTHS, first_difference=1, **options)
    effects = patch_nodes(model, pairs)
    assert effects.nodes == model.graph.sender_names
    for s, name in enumerate(effects.nodes):
        assert abs(float(effects[name]) - literal(model, pairs, "logit_diff", node_change(s))) <= 1e-10


def test_patching_a_node_at_a_position_changes_that_position_alone():
    model, pairs = random_case([6, 4], first_difference=1, **SMALL)
    names = ["embed", "a0.h1", "m0", "a1.h0", "m1"]
    effects = patch_nodes(model, pairs, nodes=names, per_position=True, batch_size=1)
    assert effects.effects.shape == (5, 6)
    for name in names:
        for t in range(6):
            expected = literal(model, pairs, "logit_diff", node_change(model.graph.sender(name), t))
            assert abs(float(effects[name][t]) - expected) <= 1e-10


# Paths


def path_change(mask, origins):
    """Every receiver reads clean activations but along the mask's edges; origins send corrupt ones."""

    def change(clean, corrupt):
        def read(r, senders, bias):
            def sent(s):
                return clean[s] if not mask[s, r] else corrupt[s] if s in origins else senders[s]

            return bias + sum(sent(s) for s in range(len(senders)))

        return read

    return change


def test_path_patching_along_random_edges_equals_the_oracle():
    for options in MODELS.values():
        model, pairs = random_case(LENGTHS, first_difference=1, **options)
        for origins in (["embed"], ["a0.h0", "a0.h1"]):
            for edges in random_circuits(model.graph, 2):
                chosen = {model.graph.sender(name) for name in origins}
                expected = literal(model, pairs, "logit_diff", path_change(edges.mask, chosen))
                found = path_patch(model, pairs, "logit_diff", origins, edges)
                assert abs(found.effect - expected) <= 1e-10


def test_a_written_path_changes_what_lies_on_it_and_nothing_else():
    model, pairs = random_case(LENGTHS, n_layers=3, n_heads=2)
    path = "a0.h1->a1.h0<k>->m1->a2.h1<q>->logits"
    steps = ["a0.h1->a1.h0<k>", "a1.h0->m1", "m1->a2.h1<q>", "a2.h1->logits"]
    edges = Circuit.from_edges(model.graph, steps)
    expected = literal(model, pairs, "logit_diff", path_change(edges.mask, {model.graph.sender("a0.h1")}))
    found = path_patch(model, pairs, "logit_diff", ["a0.h1"], [path])
    assert abs(found.effect - expected) <= 1e-10 and found.edges.edges == edges.edges
    assert found.effect == pytest.approx(found.patched - found.clean)


def test_a_direct_effect_on_the_logits_is_that_of_the_edge():
    model, pairs = random_case(LENGTHS)
    effects = patch_edges(model, pairs)
    for name in ("a1.h2", "m0", "embed"):
        direct = path_patch(model, pairs, "logit_diff", [name], [f"{name}->logits"])
        assert abs(direct.effect - effects[f"{name}->logits"]) <= 1e-12


def test_routes_lead_through_the_named_components_and_onward_from_the_receivers():
    model = random_model(n_layers=3, n_heads=2)
    found = routes(model.graph, ["a0.h0"], ["a2.h1<q>"], through=["m0", "m1"])
    expected = {"a0.h0->m0", "a0.h0->m1", "m0->m1", "a0.h0->a2.h1<q>", "m0->a2.h1<q>", "m1->a2.h1<q>"}
    assert set(found.edges.edges) == expected
    pairs = random_pairs(model, LENGTHS)
    effect = path_patch(model, pairs, "logit_diff", ["a0.h0"], found)
    assert set(effect.edges.edges) == expected | {"a2.h1->m2", "a2.h1->logits", "m2->logits"}
    assert set(routes(model.graph, ["a0.h0"], ["logits"]).edges.edges) == {"a0.h0->logits"}
    # Everything behind one q input follows: the same as patching the edge into it.
    onward = path_patch(model, pairs, "logit_diff", ["a0.h0"], routes(model.graph, ["a0.h0"], ["a1.h1<q>"]))
    assert abs(onward.effect - patch_edges(model, pairs, edges=["a0.h0->a1.h1<q>"])["a0.h0->a1.h1<q>"]) <= 1e-12


@pytest.mark.parametrize(("senders", "receivers", "through"), [
    ("a0.h0", "a1.h1<q>", "m0 m1 m2"),  # m1 and m2 lie behind the receiver
    ("a0.h0", "a1.h1<q> a2.h0<q> a2.h1<k>", ""),  # of which one lies behind another
    ("a0.h0 m0", "a1.h1<v> a2.h0<q> logits", "m1 a1.h0"),  # m1 between them
    ("m0 m1 m2", "a1.h1<q>", ""),  # of which one alone lies before the receiver
], ids=str)  # fmt: skip
def test_path_patching_is_its_published_algorithm(senders, receivers, through):
    model, pairs = random_case(LENGTHS, first_difference=1, n_layers=3, n_heads=2, d_model=12)
    graph, names = model.graph, [text.split() for text in (senders, receivers, through)]
    (chosen, passed), ends = ({graph.sender(s) for s in some} for some in names[::2]), [*map(graph.receiver, names[1])]

    def score(pair):
        clean, corrupt = pair.clean.senders, pair.corrupt.senders

        def arrives(r, made, bias):
            return bias + sum(corrupt[s] if s in chosen else x if s in passed else clean[s] for s, x in enumerate(made))

        patched = oracle.run(model, pair.tokens, arrives).receivers
        last = oracle.run(model, pair.tokens, lambda r, made, bias: patched[r] if r in ends else bias + sum(made))
        return float(pair.value(last) - pair.value(pair.clean))

    expected = oracle.mean_of(model, pairs, score)
    found = path_patch(model, pairs, "logit_diff", names[0], routes(graph, *names[:2], through=names[2]), batch_size=1)
    assert abs(expected) > 1e-3 and abs(found.effect - expected) <= 1e-10


# Bad input


@pytest.mark.parametrize(("call", "message"), [
    (lambda m, p: patch_edges(m, p, edges=["m1->m0"]), "'m1->m0' is no edge"),
    (lambda m, p: patch_edges(m, p, edges=[]), "at least one edge is needed"),
    (lambda m, p: patch_edges(m, p, edges=Circuit(torch.ones_like(m.graph.edge_mask()), m.graph)),
        "edges must be edges of .*, but 114 places of the circuit's mask are none"),
    (lambda m, p: run_circuit(m, p, attribute(m, p)), "must be a Circuit, .*, got EdgeScores"),
    (lambda m, p: run_circuit(m, p, ["m0->m1"]), "must be a Circuit, .*, got str"),
    (lambda m, p: interpolate(m, p, "nll", "m0->m1", points=True), "points must be at least 2, got True"),
    *((lambda m, p, points=points: interpolate(m, p, "nll", "m0->m1", points=points), "a list of finite λ")
        for points in ([], [float("nan")], ["half"], 0.5, None)),
    (lambda m, p: patch_edges(m, p, edges="m0->m1"), "a circuit or a list of names, got the text"),
    (lambda m, p: patch_edges(m, p, ablation="noise"), "ablation must be one of corrupt, zero"),
    (lambda m, p: patch_edges(m, p, batch_size=0), "batch_size must be 'auto' or a positive integer"),
    (lambda m, p: patch_edges(m, p, "accuracy"), "metric must be one of"),
    (lambda m, p: patch_nodes(m, p, nodes=["m7"]), "a sender is embed or"),
    (lambda m, p: interpolate(m, p, "nll", "m0->m1", points=1), "points must be at least 2, got 1"),
    (lambda m, p: path_patch(m, p, "nll", ["m0"], ["m0->m1"]), "no path leads from m0 to the logits"),
    (lambda m, p: path_patch(m, p, "nll", ["m1"], routes(m.graph, ["m1"], ["a1.h0<q>", "m0"])),
        "no path leads from m1 to a1.h0<q>, m0$"),
    (lambda m, p: path_patch(m, p, "nll", ["m0"], ["m0"]), "a path is written sender->receiver->"),
    (lambda m, p: path_patch(m, p, "nll", ["m0"], "m0->logits"), "paths must be a list of paths or a circuit"),
    (lambda m, p: run_circuit(m, p, []), "at least one circuit is needed"),
    (lambda m, p: metric_on(m, PromptPairs.from_lists([[1]], [[40]], [1]), "nll", random_circuits(m.graph, 1)),
        "corrupt prompts have the token id 40"),
    (lambda m, p: patch_edges(m, PromptPairs.from_lists([[1] * 17], [[2] * 17], [1])),
        "clean prompts have 17 positions"),
    (lambda m, p: run_circuit(m, p, random_circuits(random_model(n_layers=1).graph, 1)), "the circuit must belong"),
    (lambda m, p: patch_edges(m, p, ablation="mean-positional", reference=random_pairs(m, [3])),
        "needs reference prompts as long as the task's, 6 tokens, but the longest has 3"),
])  # fmt: skip
def test_bad_input_is_refused_in_one_sentence(call, message):
    model = random_model()
    refused(message, call, model, random_pairs(model, LENGTHS))


def test_a_metric_that_is_not_finite_on_a_patched_run_is_refused():
    model = random_model(**SMALL)
    pairs = random_pairs(model, LENGTHS)
    last = torch.arange(len(pairs)), pairs.positions
    known = torch.cat([forward(model, tokens)[last] for tokens in (pairs.clean, pairs.corrupt)])

    def later(logits):
        """NaN but for the logits of the clean and of the corrupt run."""
        there = (logits[:, None] - known).abs().amax(-1).amin(-1) < 1e-9
        return logits[:, 0] * torch.where(there, 1.0, float("nan"))

    circuit = random_circuit(model.graph)
    for measure in (
        lambda: patch_edges(model, pairs, later),
        lambda: patch_nodes(model, pairs, later),
        lambda: interpolate(model, pairs, later, "embed->logits"),
        lambda: path_patch(model, pairs, later, ["embed"], ["embed->logits"]),
        lambda: metric_on(model, pairs, later, [circuit]),
    ):
        refused(r"later is NaN or infinite on a patched run in torch\.float64: use a wider", measure)
    with pytest.raises(ValueError, match="the metric is NaN or infinite on pair 0"):
        metric_on(model, pairs, lambda logits: logits[:, 0] * float("nan"), [circuit])


def test_damaged_weights_are_named_rather_than_measured():
    model = random_model()
    model.attentions[1].b_o[0] = torch.nan
    refused("of layer 1 has NaN or infinite activations on pair", patch_edges, model, random_pairs(model, LENGTHS))


def test_results_are_saved_as_json_with_what_made_them(tmp_path):
    model, pairs = random_case(LENGTHS)
    patch_nodes(model, pairs, per_position=True).save(tmp_path / "nodes.json")
    content = json.loads((tmp_path / "nodes.json").read_text())
    assert content["nodes"] == model.graph.sender_names and content["meta"]["method"]["name"] == "patch-nodes"
    path_patch(model, pairs, "logit_diff", ["m0"], ["m0->logits"]).save(tmp_path / "path.json")
    content = json.loads((tmp_path / "path.json").read_text())
    assert content["edges"]["edges"] == ["m0->logits"] and content["meta"]["method"]["paths"] == ["m0->logits"]
    interpolate(model, pairs, "nll", "m0->m1").save(tmp_path / "curve.json")
    for name in ("nodes", "path", "curve"):
        sign = json.loads((tmp_path / f"{name}.json").read_text())["meta"]["sign"]
        assert sign.startswith("effect = measured change of the metric (higher = better) when ")
        assert sign.endswith("negative = needed")
    patch_edges(model, pairs).save(tmp_path / "effects.safetensors")
    meta = EdgeScores.load(tmp_path / "effects.safetensors").meta
    assert meta["method"]["name"] == "patch"
    assert meta["sign"].startswith("score = measured change of the metric (higher = better) when the edge alone")
