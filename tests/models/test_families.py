"""Families of models on random weights: their logits are transformers', and what is scored and patched is what the
literal definition of a decoder gives."""

from __future__ import annotations

import os
from dataclasses import replace

import decoder
import eapcore.kernels as kernels
import pytest
import torch
from accel import on_accel
from families import CAPS, CASES, GROUPED, KINDS, NEOX, SIZES, V, ours, pairs_for, random_module, theirs
from memory import peak_bytes
from models import random_model
from torch.nn.attention import SDPBackend, sdpa_kernel

import eapcore
import eapcore.search.subnetwork_probing as subnetwork_probing
from eapcore.attribution.flow_routes import flow_routes
from eapcore.attribution.methods import METHODS
from eapcore.attribution.plan import Plan
from eapcore.attribution.positions import attention_edges
from eapcore.evaluation.completeness import completeness
from eapcore.evaluation.inside import inside_scores
from eapcore.evaluation.screened import Runs
from eapcore.execution.ablation import Ablation
from eapcore.execution.experiment import Experiment
from eapcore.models.families.names import assemble
from eapcore.models.forward import embed, forward, run_stages, run_with_senders, unembed
from eapcore.models.load import load
from eapcore.models.placed import placed
from eapcore.patching.circuits import metric_on, run_circuit
from eapcore.patching.edges import measure_edges, patch_edges
from eapcore.patching.interpolate import interpolate
from eapcore.patching.masked import Changes, run_masked
from eapcore.patching.nodes import patch_nodes
from eapcore.patching.paths import path_patch
from eapcore.patching.record import Recording
from eapcore.search.acdc import acdc
from eapcore.tasks import PromptPairs
from eapcore.tasks.metrics import METRICS, MetricBatch

transformers = pytest.importorskip("transformers")


def test_layers_on_several_devices_have_one_devices_bits():
    first, second = (torch.device("accel", number) for number in range(2))
    for name in ("llama", "neox", "gemma2", "olmo2"):
        with on_accel() as devices, sdpa_kernel(SDPBackend.MATH):
            one, two = (placed(ours(name), [first, last], first) for last in (first, second))
            pairs = pairs_for(ours(name))
            found, expected = (eapcore.attribute(m, pairs, method="hybrid") for m in (two, one))
            assert torch.equal(found.scores, expected.scores) and devices.travelled
            circuit = expected.top_n(60)
            found, expected = (run_circuit(m, pairs, circuit).cpu() for m in (two, one))
            assert torch.equal(found, expected), name


@pytest.mark.parametrize("name", CASES)
def test_logits_and_streams_are_those_of_transformers(name):
    model, tokens = ours(name), torch.randint(0, V, (3, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = theirs(name)(tokens, output_hidden_states=True)
    logits, senders = run_with_senders(model, tokens)
    scale = found.logits.abs().max()
    assert (logits - found.logits).abs().max() <= 5e-6 * scale  # it turns by angles in float32
    graph = model.graph
    for layer in range(graph.n_layers):
        biases = [a.b_o for a in model.attentions[:layer] if a.b_o is not None]
        stream = senders[: graph.heads(layer).start].sum(0) + sum(biases)
        theirs_here = found.hidden_states[layer]
        assert (stream - theirs_here).abs().max() <= 5e-6 * theirs_here.abs().max()
    assert (logits - forward(model, tokens)).abs().max() <= 1e-12 * scale


@pytest.mark.parametrize("kv", ["each", "grouped"])
@pytest.mark.parametrize("name", CASES)
def test_scores_are_those_of_the_literal_definition(name, kv):
    model = ours(name, kv)
    pairs = pairs_for(model)
    expected = decoder.eap(model, pairs, METRICS["logit_diff"])
    assert expected.abs().max() > 1e-4
    for options in ({}, {"batch_size": 1}, {"storage": "factored"}, {"impl": "reference"}):
        scores = eapcore.attribute(model, pairs, **options).scores
        torch.testing.assert_close(scores, expected, rtol=0, atol=1e-12 * float(expected.abs().max()))


ODD = [
    {"num_hidden_layers": 1, "hidden_size": 10, "intermediate_size": 7, "num_attention_heads": 5, "head_dim": 2},
    {"num_hidden_layers": 3, "hidden_size": 21, "intermediate_size": 13, "num_attention_heads": 3, "head_dim": 14},
]


@pytest.mark.parametrize("sizes", ODD)
@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("LlamaConfig", {}),
        ("MistralConfig", {"sliding_window": 3}),
        ("Qwen2Config", {}),
        ("Qwen3Config", {}),
        ("GemmaConfig", {}),
        ("Gemma2Config", {"sliding_window": 2, "query_pre_attn_scalar": 7} | CAPS),
        ("Gemma3TextConfig", {"sliding_window": 3, "sliding_window_pattern": 2} | KINDS),
        ("Olmo2Config", {}),
        ("GPTNeoXConfig", {"rope_parameters": NEOX["rope_parameters"] | {"partial_rotary_factor": 1.0}}),
    ],
)
def test_odd_sizes_of_every_family_are_those_of_transformers_and_of_the_literal_definition(kind, given, sizes):
    sizes = SIZES | sizes | {"num_key_value_heads": 1}
    if kind in ("Qwen2Config", "GPTNeoXConfig", "Olmo2Config"):  # their heads divide the stream
        sizes |= {"hidden_size": sizes["num_attention_heads"] * sizes.pop("head_dim")}
    module = random_module(kind, sizes | given)
    model = load(module)
    tokens = torch.randint(0, V, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = module(tokens).logits
    assert (forward(model, tokens) - expected).abs().max() <= 5e-6 * expected.abs().max()
    pairs = pairs_for(model, (6, 5))
    for kv in ("each", "grouped"):
        model = load(module, kv=kv)
        scores = decoder.eap(model, pairs, METRICS["logit_diff"])
        found = eapcore.attribute(model, pairs).scores
        torch.testing.assert_close(found, scores, rtol=0, atol=1e-12 * float(scores.abs().max()))


@pytest.mark.parametrize("name", GROUPED)
def test_grouped_scores_are_the_sums_of_the_others(name):
    each, shared = ours(name), ours(name, "grouped")
    size = each.config.n_heads // each.config.n_kv
    assert shared.graph.n_kv == each.config.n_kv and each.graph.n_kv is None and size > 1
    pairs = pairs_for(each)
    methods = ["eap-ig", "relp"] + ["qk-fix"] * (not each.config.qk_norm_joint)  # which a norm of all keys joins
    inside = [inside_scores(Experiment.of(model, pairs)) for model in (each, shared)]
    torch.testing.assert_close(inside[0].sent, inside[1].sent, rtol=0, atol=1e-12)
    for options in ({"storage": "factored"}, *({"method": method} for method in methods)):
        many, few = (eapcore.attribute(model, pairs, **options) for model in (each, shared))
        for r, receiver in enumerate(few.graph.receiver_names):
            names = [receiver]
            if ".kv" in receiver:
                layer, rest = receiver.split(".kv")
                number, part = int(rest.split("<")[0]), rest[-2]
                names = [f"{layer}.h{h}<{part}>" for h in range(number * size, (number + 1) * size)]
            places = [many.graph.receiver(one) for one in names]
            torch.testing.assert_close(inside[1].inputs[r], inside[0].inputs[places].sum(), rtol=0, atol=1e-12)
            expected = many.scores[:, places].sum(1)
            torch.testing.assert_close(few.scores[:, r], expected, rtol=0, atol=1e-12 * float(many.scores.abs().max()))


@pytest.mark.parametrize("kv", ["each", "grouped"])
@pytest.mark.parametrize("name", CASES)
def test_a_patched_edge_s_slope_is_its_score(name, kv):
    model = ours(name, kv)
    pairs = pairs_for(model)
    scores = eapcore.attribute(model, pairs)
    graph = model.graph
    edges = [graph.edge_name(s, r) for s, r in scores.mask.nonzero().tolist()]
    for edge in [*edges[:: len(edges) // 9], edges[-1]]:
        low, high = interpolate(model, pairs, "logit_diff", edge, points=[-1e-5, 1e-5]).effects
        assert (high - low) / 2e-5 == pytest.approx(scores[edge], abs=1e-7 * float(scores.scores.abs().max()) + 1e-8)


@pytest.mark.skipif(bool(kernels.available()["triton"]), reason=kernels.available()["triton"])
@pytest.mark.parametrize("name", CASES if os.environ.get("EAPCORE_SANITIZE") == "all" else ["mistral"])
def test_the_kernels_of_a_gpu_give_the_same_scores(name, monkeypatch, limited):
    """All of them, in Triton's interpreter under the sanitizer."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("watches the interpreter")
    import sanitize

    model = ours(name, "grouped", "float32")
    pairs = pairs_for(model).select(torch.tensor([2]))
    expected = eapcore.attribute(model, pairs, storage="dense").scores
    for module in ("kernels.attention", "kernels.steps", "models.attention", "models.matmul", "models.paired"):
        monkeypatch.setattr(f"eapcore.{module}.takes_triton", lambda impl, x: x.dtype == torch.float32)
    monkeypatch.setattr("eapcore.kernels.attention.fits", lambda q: True)
    limited(positions_first=True, receivers=2 * model.graph.receivers_per_layer, workspace=1 << 30)
    with sanitize.Sanitizer("random") as watched:
        found = eapcore.attribute(model, pairs, storage="dense", impl="triton").scores
    ran = {kernel for kernel, _ in watched.launches}
    assert ran >= {"normalise_rows", "turn_rows", "attend_rows", "query_grads", "normalise_grad_rows", "partial_scores"}
    assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("name", "kv"), [("gpt2", "each"), ("llama", "each"), ("llama", "grouped"), ("qwen3", "each"), ("neox", "each")]
)
def test_the_way_that_a_gpu_takes_gives_the_same_scores(name, kv, monkeypatch, limited):
    """With the specification of its kernels: differences made by the run, query heads that share a weight, q and k
    turned together, gradients beside each other and what receivers read with them, and several layers contracted at
    once."""
    model = random_model() if name == "gpt2" else ours(name, kv)
    pairs, some = pairs_for(model), pairs_for(model).select(torch.tensor([2]))  # whose prefix is shared
    cases = [(pairs, "eap"), (some, "eap"), (pairs, "relp"), (pairs, "eap-ig")]
    expected = [eapcore.attribute(model, task, method=method, storage="dense").scores for task, method in cases]
    monkeypatch.setattr("eapcore.attribution.score_batch.makes_differences", lambda model: True)
    for module in ("attention", "matmul"):
        monkeypatch.setattr(f"eapcore.models.{module}.takes_triton", lambda impl, x: True)

    def beside(q, dz):
        return dz.new_empty(*dz.shape[:2], 3 * dz.shape[2], dz.shape[3])

    given, receiver_grads = [], kernels.receiver_grads

    def with_sums(g, act, weight, *, norm, w_gamma, offset, sums, **options):
        assert norm.kind == "none" or (norm.x_hat is None) == (sums is not None)
        if sums is not None:
            each = act.repeat_interleave(len(g) // len(act), 0)
            c1, c2 = (g * w_gamma[:, None, None]).sum(-1), (g * (each - offset[:, None, None])).sum(-1)
            made = torch.stack([c1, c2], 1).float() / weight.shape[1]
            first = 0 if norm.kind == "layernorm" else 1
            torch.testing.assert_close(sums[:, first:], made[:, first:], rtol=1e-4, atol=1e-6 * float(made.abs().max()))
            given.append(made)
        return receiver_grads(g, act, weight, norm=norm, w_gamma=w_gamma, offset=offset, sums=sums, **options)

    monkeypatch.setattr("eapcore.models.attention.empty_grads", beside)
    rooms = []

    def empty_sums(g, d_model):
        rooms.append(g.new_empty(g.shape[2], 2, *g.shape[:2], dtype=torch.float32))
        return rooms[-1]

    monkeypatch.setattr("eapcore.models.attention.empty_sums", empty_sums)
    monkeypatch.setattr(kernels, "receiver_grads", with_sums)
    apart = []

    def receiver_sums(g, act, w_gamma, offset, d_model, alone, group):
        apart.append(group)
        places = [c if c < alone else alone + (c - alone) // group for c in range(g.shape[2])]
        made = [g * (act[:, :, places] - offset)]
        made = [g * (made[0] * 0 if w_gamma is None else w_gamma), *made]
        return torch.stack([x.sum(-1).permute(2, 0, 1) for x in made], 1).float() / d_model

    monkeypatch.setattr("eapcore.models.attention.receiver_sums", receiver_sums)
    limited(receivers=1 << 10, workspace=1 << 30)
    for (task, method), scores in zip(cases, expected, strict=True):
        found = eapcore.attribute(model, task, method=method, storage="dense").scores
        torch.testing.assert_close(found, scores, rtol=0, atol=1e-11 * float(scores.abs().max()))
    # Of rotated q and k the sums are not known where a norm or a bias lies behind. They are made apart where heads
    # share a receiver too, and in the last layer, whose q has its gradient where the metric reads.
    assert given and len(rooms) == (0 if name in ("qwen3", "neox") or kv == "grouped" else len(apart) // 2)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_factors_on_a_gpu_are_contracted_without_activations(name, monkeypatch):
    """What the receivers' kernel reads beside their gradients is made with these; heads that share a weight are made by
    one launch."""
    common = pytest.importorskip("eapcore.kernels.triton_common")
    model = random_model(dtype=torch.float32) if name == "gpt2" else ours(name, dtype=torch.float32)
    pairs, found, launches = pairs_for(model, (5, 4)), [], []
    methods = ("eap", "relp") if name == "gpt2" else ("eap",)
    expected = [eapcore.attribute(model, pairs, method=method, storage="dense").scores for method in methods]
    for module, names in (("kernels", ("takes_triton", "fits")), ("models", ("takes_triton",))):
        for decides in names:
            monkeypatch.setattr(f"eapcore.{module}.attention.{decides}", lambda *like: True)
        made = lambda g, d_model: g.new_full((g.shape[2], 2, *g.shape[:2]), torch.nan, dtype=torch.float32)  # noqa: E731
        monkeypatch.setattr(f"eapcore.{module}.attention.empty_sums", made)  # of any width
    factored, launch = kernels.edge_scores_factored, common.launch

    def watched(senders, receivers, **options):
        found.append([act is None for act in receivers.act])
        return factored(senders, receivers, **options)

    def counted(kernel, *args, **meta):
        launches.append(kernel.fn.__name__)
        launch(kernel, *args, **meta)

    monkeypatch.setattr(kernels, "edge_scores_factored", watched)
    monkeypatch.setattr(common, "launch", counted)
    for method, scores in zip(methods, expected, strict=True):
        found.clear(), launches.clear()
        got = eapcore.attribute(model, pairs, method=method, storage="factored", impl="triton").scores
        torch.testing.assert_close(got, scores, rtol=0, atol=2e-5 * float(scores.abs().max()))
        # At all positions, then at those read, where the last layer alone has gradients. relp's σ is a constant.
        assert found == ([[True, True], [False, True]] if method == "eap" else [[False, False]] * 2)
        # Of the last layer q apart from k and v; of the other one weight, or three.
        assert method == "relp" or launches.count("channel_grads") == (1 + 2 + 2 if name == "gpt2" else 3 * 3)


@pytest.mark.parametrize("kv", ["each", "grouped"])
@pytest.mark.parametrize("name", CASES)
def test_the_full_circuit_is_the_clean_run_and_the_empty_one_the_corrupt(name, kv):
    model = ours(name, kv)
    pairs, mask = pairs_for(model), model.graph.edge_mask()
    full, empty, some = (eapcore.Circuit(m, model.graph) for m in (mask, mask & False, mask))
    logits = run_circuit(model, pairs, [full, empty, some])
    for run, prompts in zip(logits, (pairs.clean, pairs.corrupt), strict=False):
        expected = forward(model, prompts)[torch.arange(len(pairs)), pairs.positions]
        torch.testing.assert_close(run, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("kv", ["each", "grouped"])
@pytest.mark.parametrize("name", ["llama", "neox", "gemma2", "olmo2", "olmo2, one key head"])
def test_patched_edges_and_circuits_are_the_literal_run_with_a_stream_for_every_receiver(name, kv):
    model = ours(name, kv)
    pairs, graph = pairs_for(model, (6, 5)), model.graph
    whole, inputs = graph.edge_mask(), range(0, graph.channels_per_layer, 3 if graph.n_kv is None else 2)
    edges = [graph.edge("a0.h1->m1"), graph.edge("m0->logits")]
    edges += [(0, graph.qkv(at % 2).start + at) for at in inputs] + [(2, graph.qkv(1).stop - 1)]
    masks = []
    for edge in edges:
        masks.append(whole.clone())
        masks[-1][edge] = False
    draw = torch.Generator().manual_seed(3)
    masks += [whole & (torch.rand(whole.shape, generator=draw) < share) for share in (0.1, 0.2, 0.4, 0.9)]
    expected = torch.stack([decoder.patched_logits(model, pairs, mask) for mask in [whole, *masks]])
    circuits = [eapcore.Circuit(mask, graph) for mask in [whole, *masks]]
    torch.testing.assert_close(run_circuit(model, pairs, circuits), expected, rtol=0, atol=1e-11)
    for circuit, logits in zip(circuits[-4:-1], expected[-4:-1], strict=True):  # nothing is run for the others' sake
        torch.testing.assert_close(run_circuit(model, pairs, circuit), logits, rtol=0, atol=1e-11)

    def value(logits):
        return METRICS["logit_diff"](
            logits, MetricBatch(pairs.answers, pairs.wrong, logits, logits, torch.arange(len(pairs)))
        ).mean()

    names = [graph.edge_name(*edge) for edge in edges]
    effects = patch_edges(model, pairs, edges=names)
    for name, logits in zip(names, expected[1:], strict=False):
        assert float(value(logits) - value(expected[0])) == pytest.approx(effects[name], abs=1e-10)
        way = path_patch(model, pairs, "logit_diff", [name.split("->")[0]], [name]) if name.endswith("logits") else None
        assert way is None or way.effect == pytest.approx(effects[name], abs=1e-10)


@pytest.mark.parametrize("name", ["gemma2", "olmo2"])
def test_acdc_s_circuit_runs_as_it_was_measured_where_heads_share_a_norm(name):
    model = ours(name)
    pairs = pairs_for(model, (6, 5))
    start = eapcore.attribute(model, pairs).top_n(60)
    circuit = acdc(model, pairs, "logit_diff", threshold=0.1, start=start)
    assert 0 < circuit.n_edges < 60
    (value,) = metric_on(model, pairs, "logit_diff", [circuit])
    assert circuit.meta["metric"]["circuit"] == pytest.approx(value, abs=1e-10)


def test_completeness_takes_out_all_that_a_head_reads_where_heads_share_a_norm():
    model = ours("gemma2")
    pairs, graph, whole = pairs_for(model), model.graph, model.graph.edge_mask()
    circuit = eapcore.Circuit.from_edges(graph, ["embed->a1.h0<k>", "embed->logits"])
    found = completeness(model, pairs, "logit_diff", circuit, n_random=0)
    assert found.removed == ["nothing", "a1.h0"]
    reads = [graph.receiver(f"a1.h0<{part}>") for part in "qkv"]
    whole[:, reads] = whole[graph.sender("a1.h0")] = False
    values = METRICS["logit_diff"](decoder.patched_logits(model, pairs, whole), pairs)
    assert found.model[1] == pytest.approx(float(values.mean()), abs=1e-10)


@pytest.mark.parametrize("kv", ["each", "grouped"])
@pytest.mark.parametrize("name", ["qwen3", "olmo2"])
def test_qk_fix_is_what_the_edge_makes_of_all_patterns_of_its_layer(name, kv):
    model = ours(name, kv)
    pairs, graph = pairs_for(model, (6,)), model.graph
    found, whole = eapcore.attribute(model, pairs, method="qk-fix"), graph.edge_mask()
    patterns, others = [], decoder.run(model, pairs.corrupt[0])[0]
    logits = decoder.run(model, pairs.clean[0], patterns=patterns)[2][-1][None]
    answers = MetricBatch(pairs.answers, pairs.wrong, logits.detach(), logits.detach(), torch.arange(1))
    grads = torch.autograd.grad(METRICS["logit_diff"](logits, answers).sum(), patterns)
    heads = graph.n_heads
    for layer in range(2):
        queries_and_keys = (heads + graph.channels_per_layer) // 2
        for r in range(graph.qkv(layer).start, graph.qkv(layer).start + queries_and_keys):
            for s in {0, graph.senders_before(r) - 1}:
                mask, changed = whole.clone(), []
                mask[s, r] = False
                decoder.run(model, pairs.clean[0], mask, others, patterns=changed)
                here = slice(layer * heads, (layer + 1) * heads)
                terms = zip(changed[here], patterns[here], grads[here], strict=True)
                expected = sum(float(((one - two) * grad).sum().detach()) for one, two, grad in terms)
                assert float(found.scores[s, r]) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("kv", ["each", "grouped"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "neox", "mistral", "gemma2"])
def test_edges_into_the_logits_patched_are_circuits_without_them(name, kv):
    """Two ways through the model agree: one receiver at a time, and every receiver with its own stream."""
    model = ours(name, kv)
    pairs, graph = pairs_for(model), model.graph
    edges = ["embed->logits", "a0.h2->logits", "a1.h1->logits", "m0->logits", "m1->logits"]
    effects = patch_edges(model, pairs, edges=edges)
    masks = [graph.edge_mask() for _ in edges]
    for mask, edge in zip(masks, edges, strict=True):
        mask[graph.edge(edge)] = False
    values = metric_on(model, pairs, "logit_diff", [eapcore.Circuit(m, graph) for m in [graph.edge_mask(), *masks]])
    for edge, value in zip(edges, values[1:], strict=True):
        assert value - values[0] == pytest.approx(effects[edge], abs=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_exact_edges_of_the_last_layer_are_those_that_patching_measures(name):
    for kv, metric, storage in (("each", "logit_diff", "dense"), ("grouped", "nll", "factored")):
        model = ours(name, kv)
        pairs = pairs_for(model)
        found = eapcore.attribute(model, pairs, metric, exact="last", batch_size=2, storage=storage)
        edges = eapcore.Circuit(found.exact, model.graph)
        assert edges.n_edges > 40
        expected = patch_edges(model, pairs, metric, edges).scores
        torch.testing.assert_close(found.scores[found.exact], expected[found.exact], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["llama", "gemma2", "olmo2", "neox"])
def test_importances_of_queries_keys_and_values_are_their_gradients_times_what_they_move(name):
    """Of shared keys and values as they are; before norms and rotation, by autograd through the same forward."""
    model = ours(name, "grouped")
    pairs, graph = pairs_for(model), model.graph
    values = torch.zeros(graph.n_receivers, dtype=torch.float64)
    for i in range(len(pairs)):
        acts, t, position = [], int(pairs.lengths[i]), int(pairs.positions[i])
        for tokens in (pairs.clean, pairs.corrupt):
            x = embed(model, tokens[i : i + 1, :t]).requires_grad_()
            runs = list(run_stages(model, x))
            acts.append([run.attention.saved.qkv[0] for run in runs if run.attention is not None])
            if len(acts) == 1:
                logits = unembed(model, runs[-1].out)[0][0, position]
                value = logits[pairs.answers[i, 0]] - logits[pairs.wrong[i][pairs.wrong[i] >= 0]].mean()
        for layer, (a, b, g) in enumerate(zip(*acts, torch.autograd.grad(value, acts[0]), strict=True)):
            values[graph.qkv(layer)] += ((b - a) * g).sum((0, 1, 3)).abs().detach() / len(pairs)
    found = eapcore.attribute(model, pairs, method="hisp-raw", reduce="pair", batch_size=2)
    for layer in range(graph.n_layers):
        for r in range(graph.qkv(layer).start, graph.qkv(layer).stop):  # the embedding is never taken away
            torch.testing.assert_close(found.scores[0, r], values[r], rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", ["qwen2, later layers windowed", "gemma2", "olmo2", "neox"])
def test_first_order_and_patching_from_one_recording_are_those_from_their_own_runs(name):
    ways = [{"gradient_at": 0.75, "exact": "last"}]
    ways += [{"storage": "factored"}, {"method": "clean-corrupt", "exact": "mlp"}]
    for kv, how in zip(("each", "grouped", "each"), ways, strict=True):
        model = ours(name, kv)
        experiment = Experiment.of(model, pairs_for(model))
        kept = Runs(experiment)
        found = eapcore.attribute(model, experiment.pairs, batch_size=2, runs=kept, **how)
        expected = eapcore.attribute(model, experiment.pairs, batch_size=2, **how)
        assert len(kept.recordings) > 1 and expected.scores.abs().max() > 1e-3
        torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=1e-11)
    edges = found.top_n(12)
    again = [measure_edges(experiment, edges, recordings=made) for made in ((), kept.recordings, kept.recordings[1:])]
    for other in again[1:]:
        torch.testing.assert_close(other.scores, again[0].scores, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["qwen2, later layers windowed", "qwen3", "gemma2", "gemma3", "olmo2", "neox"])
def test_gim_and_relp_are_their_literal_rules(name):
    """Half of the gradient for each of two factors, gated units' too; σ frozen, that of q's, k's and the norms behind
    as well."""
    for method, kv, storage in (("gim", "each", "dense"), ("gim", "grouped", "factored"), ("relp", "each", "auto")):
        model = ours(name, kv)
        pairs = pairs_for(model)
        expected = decoder.eap(model, pairs, METRICS["logit_diff"], rules=method)
        found = eapcore.attribute(model, pairs, method=method, batch_size=2, storage=storage).scores
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", ["qwen2, later layers windowed", "gemma2", "gemma3", "olmo2", "neox"])
def test_attention_from_position_to_position_adds_up_and_one_key_alone_is_exact(name):
    model = ours(name, "grouped")
    if "qwen2" in name:
        layers = [[[replace(c, softcap=2.0) if hasattr(c, "w_o") else c for c in stage] for stage in layer]
            for layer in model.weights.layers]  # fmt: skip
        layers = tuple(tuple(tuple(stage) for stage in layer) for layer in layers)
        model = replace(model, weights=replace(model.weights, layers=layers))
    pairs, graph = pairs_for(model), model.graph
    found = attention_edges(model, pairs, "nll", batch_size=2)
    by_position = eapcore.attribute(model, pairs, "nll", reduce="position").per_position.sum(1)
    for layer, attention in enumerate(model.attentions):
        rows = [
            (found.q[layer].sum(1), 1),
            (found.k[layer].sum(2), attention.group),
            (found.v[layer].sum(2), attention.group),
        ]
        expected = by_position[:, graph.qkv(layer)].T.split([attention.n_heads, attention.n_kv, attention.n_kv])
        for kind, ((x, group), other) in enumerate(zip(rows, expected, strict=True)):
            x = x.unflatten(0, (-1, group)).sum(1)
            x, other = (x.sum(0), other.sum(0)) if attention.joint and kind < 2 else (x, other)
            torch.testing.assert_close(x, other, rtol=0, atol=1e-11)
    alone = pairs.select(torch.tensor([0]))
    stop = int(alone.positions[0]) + 1
    found, runs = attention_edges(model, alone, "nll", method="peap"), []
    for tokens in (alone.clean, alone.corrupt):
        runs.append(list(run_stages(model, embed(model, tokens[:, :stop]).requires_grad_())))
    logits = unembed(model, runs[0][-1].out)[0][0, -1]
    value = METRICS["nll"](logits[None], MetricBatch(alone.answers, alone.wrong, None, None, None)).sum()
    for layer, attention in enumerate(model.attentions):
        clean, corrupt = ([run.attention for run in each if run.attention is not None][layer] for each in runs)
        made = attention.mix(clean.saved.q, clean.saved.kv)
        (behind,) = torch.autograd.grad(value, clean.saved.qkv[0], retain_graph=True)
        _, _, dv = behind.split([attention.n_heads, attention.n_kv, attention.n_kv], 2)
        moved = corrupt.saved.kv - clean.saved.kv
        values = (moved[:, :, attention.n_kv :] * dv).sum(-1)[0].T.detach()
        torch.testing.assert_close(
            found.v[layer].sum(2).unflatten(0, (-1, attention.group)).sum(1), values, rtol=0, atol=1e-11
        )
        if attention.joint or attention.post.kind != "none":
            continue
        dz = torch.autograd.grad(value, clean.z, retain_graph=True)[0]
        for t in range(stop):
            kv = clean.saved.kv.detach().clone()
            kv[:, t, : attention.n_kv] += moved[:, t, : attention.n_kv]
            change = (attention.mix(clean.saved.q, kv) - made) * dz
            torch.testing.assert_close(found.k[layer, :, t], change.sum(-1)[0].T.detach(), rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", ["qwen2, later layers windowed", "gemma2", "olmo2", "neox"])
def test_what_the_logits_read_comes_from_the_tokens_along_information_flow_routes(name):
    each, grouped = (ours(name, kv) for kv in ("each", "grouped"))
    pairs = pairs_for(each)
    found = [flow_routes(model, pairs, routes="flow", batch_size=2).scores for model in (each, grouped)]
    for scores in found:
        # Of olmo2 some heads' parts cancel, so that none is near their sum: a route ends there.
        assert float(scores[0].sum()) == pytest.approx(1, abs=1e-2 if name == "olmo2" else 1e-12)
    for layer, attention in enumerate(each.attentions):
        heads, size = attention.n_heads, grouped.attentions[layer].n_kv
        apart = found[0][:, each.graph.qkv(layer)][:, 2 * heads :]
        shared = found[1][:, grouped.graph.qkv(layer)][:, heads + size :]
        torch.testing.assert_close(apart.unflatten(1, (size, -1)).sum(2), shared, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["qwen2, later layers windowed", "gemma2", "olmo2", "neox"])
def test_optimal_constants_miss_less_than_means(name):
    model = ours(name, "grouped")
    pairs = pairs_for(model)
    made = Ablation.optimal(model, pairs, steps=3, rate=0.3)
    optimal, mean = (patch_nodes(model, pairs, "kl", ablation=how).effects for how in (made, "mean"))
    assert bool((optimal >= mean - 1e-12).all()) and float(optimal.mean()) > 0.97 * float(mean.mean())


@pytest.mark.parametrize("name", ["qwen2, later layers windowed", "gemma2", "olmo2", "neox"])
def test_weighted_edges_and_nodes_have_the_gradients_of_their_masks(name):
    for kv in ("each", "grouped"):
        model = ours(name, kv)
        graph, pairs = model.graph, pairs_for(model)
        experiment = Experiment.of(model, pairs, "nll")
        recording = Recording.of(experiment, range(len(pairs)))
        mask = torch.rand(graph.n_edges, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        values, slope = subnetwork_probing._by_edges(experiment, recording, mask)
        full = torch.zeros(3, graph.n_senders, graph.n_receivers, dtype=torch.float64)
        full[:, graph.edge_mask()] = mask
        chosen = slope.abs().sort(descending=True).indices[:40:13]
        fixed = Changes.between(recording, recording.clean.senders, recording.ablated.senders)
        again = ~graph.members([0])
        for i in chosen.tolist():
            s, r = graph.edge_mask().nonzero()[i].tolist()
            masks = full.clone()
            masks[1, s, r] += 1e-5
            masks[2, s, r] -= 1e-5
            logits = run_masked(recording, recording.ablated, masks, fixed, again)[0]
            found = experiment.values(logits, recording.reference)
            torch.testing.assert_close(found[0], values, rtol=0, atol=1e-10)
            expected = (found[1] - found[2]).sum() / 2e-5
            torch.testing.assert_close(slope[i], expected, rtol=1e-6, atol=1e-8)
        ones = torch.ones(graph.n_receivers - 1, dtype=torch.float64)
        alone = Recording.of(experiment, [0])
        values, slope = subnetwork_probing._by_nodes(experiment, alone, ones)
        torch.testing.assert_close(values, experiment.ends(alone.reference)[0], rtol=0, atol=1e-10)
        hisp = eapcore.attribute(model, pairs.select(torch.tensor([0])), "nll", method="hisp-raw").scores[0, :-1]
        torch.testing.assert_close(slope.abs(), hisp, rtol=0, atol=1e-10)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama", "qwen2, later layers windowed", "neox", "gemma3", "olmo2"])
def test_every_method_is_the_same_in_batches_of_any_size(name, method):
    model = ours(name)
    pairs = pairs_for(model)
    whole, single = (eapcore.attribute(model, pairs, method=method, batch_size=size).scores for size in ("auto", 1))
    torch.testing.assert_close(whole, single, rtol=0, atol=1e-11 * float(whole.abs().max()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["llama3 rope", "qwen3", "gemma", "gemma2", "olmo2", "neox"])
def test_narrower_dtypes_are_near(name, dtype):
    narrow = ours(name, "each", dtype)
    # Of the same weights and the same factor of the embedding, so that their rounding is not counted.
    scale = torch.tensor(narrow.config.embed_scale, dtype=narrow.dtype).item()
    wide = replace(narrow, config=replace(narrow.config, embed_scale=scale), weights=_widened(narrow))
    pairs = pairs_for(narrow)
    for method in ("eap", "qk-fix"):
        exact, found = (eapcore.attribute(model, pairs, method=method).scores.double() for model in (wide, narrow))
        error = float((found - exact).norm() / exact.norm())
        assert error <= {"float32": 4e-6, "bfloat16": 8e-2, "float16": 1e-2}[dtype], method


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["qwen3", "olmo2"])
def test_exact_patterns_of_small_differences_round_as_gradients_do(name, dtype):
    """Where corrupt tokens are nearly the clean ones, what is rounded behind activations would be most of a score."""
    state = {key: tensor.to(dtype) for key, tensor in theirs(name).state_dict().items()}
    embedding = state["model.embed_tokens.weight"]
    embedding[22:] = embedding[: V - 22]
    embedding[22:, 0] *= 1 + 8 * torch.finfo(dtype).eps
    config = theirs(name).config.to_dict()
    half, exact = load(state, config=config), load(state, config=config, dtype="float64")
    clean, corrupt = [[3, 10, 5, 11, 6, 1], [12, 4, 9, 2, 20, 5]], [[3, 10, 27, 11, 6, 1], [12, 26, 9, 2, 20, 5]]
    pairs = PromptPairs.from_lists(clean, corrupt, [[1], [2]], [[4], [6]])
    errors = []
    for method in ("eap", "qk-fix"):
        found, expected = (eapcore.attribute(model, pairs, method=method).scores for model in (half, exact))
        errors.append(float((found - expected).norm() / expected.norm()))
    assert errors[1] <= 1.02 * errors[0] < 0.5


def test_gemma_s_gammas_are_not_rounded_to_half_precision():
    """γ = 1 + w, of which transformers rounds w alone, and llama.cpp stores it in float32."""
    for name in ("gemma", "gemma3"):
        state = {key: tensor.to(torch.bfloat16) for key, tensor in theirs(name).state_dict().items()}
        for dtype in (None, "bfloat16"):
            model = load(state, config=theirs(name).config.to_dict(), dtype=dtype)
            norms = [model.weights.ln_final, model.attentions[1].norm, model.attentions[0].q_norm]
            names = ["norm", "layers.1.input_layernorm", "layers.0.self_attn.q_norm"]
            for norm, key in zip(norms, names, strict=True):
                if norm.gamma is not None:
                    assert torch.equal(norm.gamma, 1 + state[f"model.{key}.weight"].float())
            assert model.dtype == torch.bfloat16


def _widened(model):
    return assemble(model.config, {name: tensor.double() for name, tensor in model.weights.named()})


@pytest.mark.parametrize(
    ("name", "storage", "kv"),
    [
        *((name, "dense", "each") for name in ("llama", "gemma2", "neox")),
        *((name, "dense", "grouped") for name in ("qwen2", "olmo2")),
        *((name, "factored", "grouped") for name in ("llama", "gemma2", "neox")),
        *((name, "factored", "each") for name in ("qwen2", "olmo2")),
    ],
)
def test_the_planned_memory_is_within_a_tenth_of_the_measured_peak(name, storage, kv):
    kind, given = CASES[name]
    width = 16 * given["num_attention_heads"]
    wide = {"hidden_size": width, "intermediate_size": 170, "num_hidden_layers": 3, "vocab_size": 101}
    wide |= {"head_dim": 16} if "head_dim" in given else {}
    module = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**SIZES | given | wide))
    model = load(module, kv=kv)
    prompts = torch.randint(0, 101, (2, 24, 20), generator=torch.Generator().manual_seed(0))
    prompts[1, :, 0] = (prompts[0, :, 0] + 1) % 101

    def call():
        return eapcore.attribute(model, tuple(prompts), lambda logits: logits[:, 0], storage=storage, batch_size=24)

    call()
    measured = peak_bytes(call)
    plan = Plan(model.config, model.dtype, model.device, groups=model.groups)
    planned = plan.dense(24, 20) if storage == "dense" else plan.factored(24, 20, plan.chunk(24, 20, 1 << 60))
    assert 0.9 <= planned / measured <= 1.1
