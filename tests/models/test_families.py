"""Families of models on random weights: their logits are transformers', and what is scored and patched is what the
literal definition of a decoder gives."""

from __future__ import annotations

import gc
import json
import os
import pickle
from copy import deepcopy
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import decoder
import eapcore.kernels as kernels
import pytest
import torch
from accel import on_accel
from memory import peak_bytes
from models import random_model
from safetensors.torch import save_file
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
from eapcore.models.families import layout_of
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
transformers.logging.set_verbosity_error()

V = 29
SIZES = {"vocab_size": V, "hidden_size": 18, "intermediate_size": 33, "num_hidden_layers": 2}
SIZES |= {"max_position_embeddings": 64}
HEADS = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8}
QWEN2 = {"hidden_size": 18, "num_attention_heads": 3, "num_key_value_heads": 1}
ROPE = {"rope_theta": 500.0, "factor": 4.0}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
NEOX = {"hidden_size": 24, "num_attention_heads": 3, "rope_parameters": {"rope_theta": 100.0, "rope_type": "default"}}
OLMO = {"hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
CAPS = {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0}
KINDS = {
    "query_pre_attn_scalar": 5,
    "rope_parameters": {
        "sliding_attention": {"rope_theta": 30.0, "rope_type": "default"},
        "full_attention": {"rope_theta": 500.0, "rope_type": "linear", "factor": 4.0},
    },
}
# (configuration class, what it is given); odd sizes, one, two and three key and value heads.
CASES = {
    "llama": ("LlamaConfig", HEADS),
    "llama, one head each": ("LlamaConfig", HEADS | {"num_key_value_heads": 6, "num_hidden_layers": 3}),
    "llama3 rope": ("LlamaConfig", HEADS | {"rope_parameters": ROPE | LLAMA3 | {"rope_type": "llama3"}}),
    "llama, linear rope, biases, tied": (
        "LlamaConfig",
        HEADS
        | {"attention_bias": True, "tie_word_embeddings": True}
        | {"rope_parameters": ROPE | {"rope_type": "linear"}},
    ),
    "mistral": ("MistralConfig", HEADS | {"num_key_value_heads": 3, "sliding_window": 4}),
    "qwen2": ("Qwen2Config", QWEN2),
    "qwen2, later layers windowed": (
        "Qwen2Config",
        QWEN2 | {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", HEADS),
    "gemma": ("GemmaConfig", HEADS | {"num_key_value_heads": 1}),
    "gemma2": ("Gemma2Config", HEADS | {"sliding_window": 4, "query_pre_attn_scalar": 5} | CAPS),
    "gemma3": (
        "Gemma3TextConfig",
        HEADS | {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]} | KINDS,
    ),
    "olmo2": ("Olmo2Config", OLMO),
    "olmo2, one key head": ("Olmo2Config", OLMO | {"num_key_value_heads": 1, "num_hidden_layers": 3}),
    "olmo2, one head each": ("Olmo2Config", OLMO | {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "neox": ("GPTNeoXConfig", NEOX),
    "neox, one after the other, half turned": (
        "GPTNeoXConfig",
        NEOX
        | {"use_parallel_residual": False}
        | {"rope_parameters": NEOX["rope_parameters"] | {"partial_rotary_factor": 0.5}},
    ),
}  # fmt: skip
GROUPED = [name for name in CASES if "neox" not in name and "each" not in name]


@cache
def theirs(name):
    kind, given = CASES[name]
    return random_module(kind, SIZES | given)


def random_module(kind, given):
    """A model of transformers with every weight random, in float64."""
    config = getattr(transformers, kind)(**given)
    return randomised(transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager"))


def randomised(module):
    module = module.double().eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3
        parameter.data = drawn + (parameter.ndim == 1) * 0.5
    return module


@cache
def ours(name, kv="each", dtype=None):
    return load(theirs(name), dtype=dtype, kv=kv)


def pairs_for(model, lengths=(9, 9, 6)):
    """Pairs that first differ at three positions, so that prefixes are shared and batches cut."""
    generator = torch.Generator().manual_seed(2)
    clean = [torch.randint(0, V, (length,), generator=generator).tolist() for length in lengths]
    corrupt = [list(prompt) for prompt in clean]
    for at, prompt in enumerate(corrupt, 1):
        prompt[at] = (prompt[at] + 1) % V
        prompt[-2] = (prompt[-2] + 3) % V
    count = len(lengths)
    return PromptPairs.from_lists(clean, corrupt, [[1], [2], [3]][:count], [[4, 5], [6], [7]][:count])


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


@pytest.mark.parametrize("name", ["llama, linear rope, biases, tied", "qwen3", "gemma3", "olmo2", "neox"])
def test_a_saved_folder_is_the_model_in_memory(name, tmp_path):
    theirs(name).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    tokens = torch.randint(0, V, (2, 7), generator=torch.Generator().manual_seed(0))
    saved = load(tmp_path)
    torch.testing.assert_close(forward(saved, tokens), forward(ours(name), tokens), rtol=0, atol=1e-12)
    assert saved.content_hash == ours(name).content_hash
    planned = load(tmp_path, device="meta")  # of its configuration alone
    assert planned.config == saved.config and planned.dtype == saved.dtype
    shapes = [[(key, t.shape, t.stride()) for key, t in one.weights.named()] for one in (planned, saved)]
    assert shapes[0] == shapes[1] and all(t.is_meta for _, t in planned.weights.named())


def test_files_name_the_graph_that_they_are_of(tmp_path):
    for name, kv in (("llama", "grouped"), ("neox", "each")):
        model = ours(name, kv)
        scores = eapcore.attribute(model, pairs_for(model))
        scores.save(tmp_path / "scores.safetensors")
        again = eapcore.EdgeScores.load(tmp_path / "scores.safetensors", content_hash=model.content_hash)
        assert again.graph == model.graph and torch.equal(again.scores, scores.scores)
        circuit = scores.top_n(40).prune()
        circuit.save(tmp_path / "circuit.json")
        assert eapcore.Circuit.load(tmp_path / "circuit.json").edges == circuit.edges
        for receiver in range(model.graph.n_receivers):
            assert model.graph.receiver(model.graph.receiver_names[receiver]) == receiver


# As they lie on the Hub, older forms among them, with fewer layers: what they leave out is what transformers takes.
PUBLISHED = {
    "Llama-3.2-1B": ("LlamaConfig", {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "rope_theta": 5e5,
        "rope_scaling": LLAMA3 | {"factor": 32.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"}}),
    "Mistral-7B-v0.1": ("MistralConfig", {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 32768, "sliding_window": 4096,
        "rms_norm_eps": 1e-5, "rope_theta": 1e4}),
    "Mistral-7B-v0.3": ("MistralConfig", {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 32768, "max_position_embeddings": 32768, "sliding_window": None,
        "rms_norm_eps": 1e-5, "rope_theta": 1e6}),
    "Qwen2.5-0.5B": ("Qwen2Config", {"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14,
        "num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 32768, "sliding_window": 32768,
        "use_sliding_window": False, "max_window_layers": 24, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "tie_word_embeddings": True}),
    "Qwen2 with windows": ("Qwen2Config", {"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14,
        "num_key_value_heads": 2, "vocab_size": 99, "max_position_embeddings": 99, "sliding_window": 9,
        "use_sliding_window": True, "max_window_layers": 5}),
    "Qwen3, silent": ("Qwen3Config", {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 32,
        "vocab_size": 99, "max_position_embeddings": 99, "rope_theta": 1e6}),
    "gemma-2b": ("GemmaConfig", {"hidden_size": 2048, "intermediate_size": 16384, "num_attention_heads": 8,
        "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 256000, "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6, "rope_theta": 1e4, "hidden_act": "gelu"}),
    "gemma-2-2b": ("Gemma2Config", {"hidden_size": 2304, "intermediate_size": 9216, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 256000, "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6, "rope_theta": 1e4, "hidden_activation": "gelu_pytorch_tanh", "sliding_window": 4096,
        "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 256}),
    "Gemma 2, silent": ("Gemma2Config", {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8,
        "vocab_size": 99, "max_position_embeddings": 99}),
    "gemma-3-1b-it": ("Gemma3TextConfig", {"hidden_size": 1152, "intermediate_size": 6912, "num_attention_heads": 4,
        "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 262144, "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6, "rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": None,
        "sliding_window": 512, "sliding_window_pattern": 6, "query_pre_attn_scalar": 256}),
    "gemma-3-4b-it's text": ("Gemma3TextConfig", {"hidden_size": 2560, "intermediate_size": 10240,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}),
    "OLMo-2-0425-1B": ("Olmo2Config", {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 16,
        "num_key_value_heads": 16, "vocab_size": 100352, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6,
        "rope_theta": 5e5, "rope_scaling": None}),
    "llava-1.5-7b": ("LlavaConfig", {"text_config": {"model_type": "llama", "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5, "vocab_size": 32064, "num_hidden_layers": 7}}),
    "llava of a tied model": ("LlavaConfig", {"tie_word_embeddings": False, "text_config": {"model_type": "qwen2",
        "tie_word_embeddings": True, "num_hidden_layers": 7}}),
    "Mistral-Small-3.1's text, silent of its family": ("Mistral3Config", {"tie_word_embeddings": False,
        "text_config": {"head_dim": 128, "hidden_size": 5120, "intermediate_size": 32768, "num_hidden_layers": 7,
        "sliding_window": None, "vocab_size": 131072, "rope_theta": 1e9}}),
    "pythia-160m": ("GPTNeoXConfig", {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12,
        "vocab_size": 50304, "max_position_embeddings": 2048, "rotary_pct": 0.25, "rotary_emb_base": 10000,
        "use_parallel_residual": True, "layer_norm_eps": 1e-5, "hidden_act": "gelu"}),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_configuration_means_what_transformers_takes_it_to_mean(name):
    kind, given = PUBLISHED[name]
    config = getattr(transformers, kind)
    given = {"num_hidden_layers": 7, "model_type": config.model_type} | given
    found, expected = layout_of(given), layout_of(config(**deepcopy(given)).to_dict())
    assert found.config == expected.config and found.tied == expected.tied
    assert list(found.shapes().items()) == list(expected.shapes().items())


# Fields of a configuration file, and what means the same in another form, or is taken where nothing is said.
LINEAR = {"rope_type": "linear", "factor": 4.0}
WRITTEN = {
    "a base inside the older scaling": ("llama", {"rope_scaling": LINEAR | {"rope_theta": 30.0}}),
    "both forms, one meaning": ("qwen3", {"rope_scaling": dict(LINEAR), "rope_parameters": dict(LINEAR)}),
    "another activation of the first Gemma": ("gemma", {"hidden_act": "relu"}),
    "the older field of Gemma's activation": ("gemma", {"hidden_act": "gelu", "hidden_activation": "gelu_new"}),
    "kinds of layers without bases": (
        "gemma3_text",
        {"rope_parameters": {"sliding_attention": {"rope_type": "default"}, "full_attention": dict(LINEAR)}},
    ),
    "one kind of layers": ("gemma3_text", {"rope_parameters": {"full_attention": LINEAR | {"rope_theta": 30.0}}}),
    "Gemma 3, silent": ("gemma3_text", {}),
    "ministral": ("ministral", {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 3}),
    "mistral whose layers all have windows": ("mistral", {"sliding_window": 3}),
    "neox in Pythia's form": ("gpt_neox", {"rotary_pct": 0.5, "rotary_emb_base": 30, "head_dim": None}),
    "neox, silent": ("gpt_neox", {"head_dim": None}),
    "neox whose heads are too small to be turned": ("gpt_neox", {"head_dim": None, "num_attention_heads": 9}),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_a_file_s_fields_mean_what_they_mean_to_transformers(name, tmp_path):
    kind, fields = WRITTEN[name]
    fields = SIZES | HEADS | {"model_type": kind, "sliding_window": None if kind == "mistral" else 4} | fields
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in fields.items() if (k, v) != ("head_dim", None)}))
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    module = randomised(transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager"))
    save_file({key: tensor.clone() for key, tensor in module.state_dict().items()}, tmp_path / "model.safetensors")
    tokens = torch.randint(0, V, (2, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = module(tokens).logits
    for source in (tmp_path, module):
        assert (forward(load(source), tokens) - expected).abs().max() <= 5e-6 * expected.abs().max()


TEXT = {"vocab_size": V, "hidden_size": 24, "intermediate_size": 33, "num_hidden_layers": 2, "head_dim": 6}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
PICTURES = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
PICTURES |= {"image_size": 8, "patch_size": 4}
SEVERAL = {
    "gemma3": ("Gemma3", "gemma3_text", {"mm_tokens_per_image": 4, "image_token_index": 28}),
    "llava": ("Llava", "llama", {"image_token_index": 28}),
    "mistral3": ("Mistral3", "mistral", {"image_token_index": 28}),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_the_language_model_of_a_model_of_several_is_loaded_where_it_reads_text_as_alone(name, tmp_path):
    kind, text, options = SEVERAL[name]
    seen = PICTURES | {
        "model_type": {"gemma3": "siglip_vision_model", "llava": "clip_vision_model"}.get(name, "pixtral")
    }
    config = getattr(transformers, f"{kind}Config")(
        text_config=TEXT | {"model_type": text}, vision_config=seen, **options
    )
    module = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    tokens = torch.randint(0, 28, (2, 9), generator=generator)
    with torch.no_grad():
        expected = module(tokens).logits
    module.save_pretrained(tmp_path)
    for model in (load(module), load(tmp_path)):
        assert model.family == text
        assert (forward(model, tokens) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("sizes", "counts"),
    [
        ((24, 14, None), (361, 1033, 179_749)),  # Qwen2.5-0.5B
        ((26, 8, None), (235, 651, 74_218)),  # Gemma-2-2B
        ((32, 32, None), (1057, 3105, 1_592_881)),  # Llama-3.1-8B
        ((24, 14, 2), (361, 457, None)),
    ],
)
def test_graphs_have_the_published_sizes(sizes, counts):
    layers, heads, n_kv = sizes
    graph = eapcore.Graph(layers, heads, True, False, n_kv)
    assert (graph.n_senders, graph.n_receivers) == counts[:2]
    assert counts[2] in (None, graph.n_edges)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "rope_type 'yarn'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_parameters": None}, "rope_type 'dynamic'"),
        ({"model_type": "mixtral"}, "model_type 'mixtral' is not supported: expected one of gpt2, llama"),
        ({"model_type": "llava"}, "model_type 'llava' is not supported"),
        ({"model_type": "paligemma", "text_config": {}}, "model_type 'paligemma', a model of more than text, is not"),
        ({"model_type": "llava", "text_config": {"model_type": "phi"}}, "model_type 'phi' is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "use_bidirectional_attention True"),
        ({"model_type": ["llama"]}, "is not supported"),
        ({"num_local_experts": 8}, "num_local_experts 8"),
        ({"mlp_bias": True}, "mlp_bias True"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantised \(gptq\), which is not supported"),
        ({"quantization": {"group_size": 64, "bits": 4}}, r"quantised \(\{'group_size': 64, 'bits': 4\}\), which"),
        ({"quantization_config": {"quant_method": "fp8"}, "model_type": "gpt_neox"}, r"quantised \(fp8\), which"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}, "model_type": "x"}, r"quantised \(bitsandbytes\)"),
        ({"num_key_value_heads": 4}, "n_key_value_heads must divide n_heads 6, got 4"),
        ({"hidden_act": "relu2"}, "hidden_act 'relu2'"),
        ({"num_hidden_layers": 3}, "lacks layers.2."),
        ({"model_type": "gemma2", "attention_bias": True}, "attention_bias True"),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 3.0}, "attn_logit_softcapping 3.0"),
        ({"model_type": "gemma", "hidden_activation": "gelu"}, "hidden_activation 'gelu', and elsewhere 'silu'"),
        ({"rope_scaling": LINEAR}, "rope_parameters and rope_scaling: remove one of them"),
        ({"rope_theta": 30.0}, "says rope_theta 30.0, and elsewhere 10000.0: remove one of them"),
        ({"rope_parameters": {"full_attention": LINEAR}}, "must not be by layers, got those of full_attention"),
        ({"rope_parameters": LINEAR, "model_type": "gemma3_text"}, "must be by layers, full_attention and sliding_att"),
        ({"rope_parameters": {"rope_type": "linear"}}, "lacks the factor of rope_type linear"),
        (
            {"rope_parameters": LINEAR | {"rope_type": "llama3", "low_freq_factor": 4, "high_freq_factor": 4}},
            "low_freq_factor of the configuration must be below high_freq_factor, got 4 and 4",
        ),
        (
            {"rope_parameters": ROPE | LLAMA3 | {"rope_type": "llama3"}, "original_max_position_embeddings": 8},
            "says original_max_position_embeddings 8, and elsewhere 16",
        ),
        ({"rope_scaling": {"type": "linear"}, "rope_parameters": None, "model_type": "gemma3_text"}, "as rope_type"),
        (
            {"model_type": "gpt_neox", "attention_bias": True, "rotary_pct": 0.5, "partial_rotary_factor": 0.25},
            "partial_rotary_factor 0.25, and",
        ),
        ({"model_type": "gpt_neox", "attention_bias": True, "rotary_pct": 2}, "rotary_pct at most 1, got 2"),
        ({"model_type": "gpt_neox", "attention_bias": True, "rope_theta": 30}, "rope_theta 30, and elsewhere 10000.0"),
        ({"model_type": "mistral", "layer_types": ["full_attention"] * 2}, "read of a 'ministral' alone"),
        ({"model_type": "qwen3", "layer_types": ["sliding_attention"] * 2}, "sliding_window is not in use"),
        ({"is_causal": False}, "is_causal False of the configuration is not supported: expected True"),
        ({"transformers_weights": "other.safetensors", "model_type": "gpt_neox"}, "transformers_weights 'other"),
        ({"per_layer_config": {"1": {"num_key_value_heads": 1}}}, "per_layer_config"),
        ({"model_type": "llava", "text_config": {"model_type": "gemma2"}}, "final_logit_softcapping inside a llava"),
    ],
)
def test_what_a_description_lacks_is_refused_by_name(changes, message):
    config = theirs("llama").config.to_dict() | changes
    with pytest.raises(ValueError, match=message):
        load(theirs("llama").state_dict(), config=config)


@pytest.mark.parametrize(
    "end", ["qweight", "qzeros", "weight_scale_inv", "weight.absmax", "weight.quant_state.nf4", "SCB"]
)
def test_parts_of_quantised_weights_are_named_where_no_configuration_tells(end):
    state = theirs("llama").state_dict() | {f"model.layers.0.mlp.up_proj.{end}": torch.ones(3)}
    with pytest.raises(ValueError, match=rf"up_proj.{end} is a part of a quantised weight, which is not supported"):
        load(state, config=theirs("llama").config.to_dict())


def test_a_way_to_take_key_and_value_heads_that_is_unknown_is_refused():
    with pytest.raises(ValueError, match="kv must be one of each, grouped"):
        load(theirs("llama"), kv="both")


def _hooked(module):
    module.model.layers[0].register_forward_hook(lambda *args: None)


def _another_activation(module):
    module.model.layers[1].mlp.act_fn = torch.nn.GELU()


def _another_eps(module):
    module.model.layers[0].input_layernorm.variance_epsilon = 1e-3


def _another_forward(module):
    module.model.layers[0].mlp.forward = lambda x: x


def _global_hook(module):
    return torch.nn.modules.module.register_module_forward_pre_hook(lambda *args: None)


def _another_part(module):
    class Mlp(type(module.model.layers[0].mlp)):
        def forward(self, x):
            return 2 * super().forward(x)

    module.model.layers[0].mlp.__class__ = Mlp


def _another_class_forward(module):
    kind = type(module.model.layers[0].mlp)
    own, kind.forward = kind.forward, lambda self, x: x
    return SimpleNamespace(remove=lambda: setattr(kind, "forward", own))


def _field(name, value):
    return lambda module: setattr(module.model.layers[1].self_attn, name, value)


def _another_rotation(module):
    module.model.rotary_emb.inv_freq *= 2


def _rounded(module):
    module.half()


def _packed(module):
    module.lm_head = torch.nn.Module()
    module.lm_head.weight = lambda: torch.zeros(V, 18)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_hooked, "forward hook at model.layers.0"),
        (_global_hook, "torch has a global forward pre hook"),
        (_another_part, "model.layers.0.mlp a Mlp whose forward comes from test_families"),
        (_another_class_forward, "model.layers.0.mlp a LlamaMLP whose forward comes from test_families"),
        (_field("scaling", 0.1), "model.layers.1.self_attn scaling 0.1, but its configuration says 0.353553"),
        (_field("is_causal", False), "model.layers.1.self_attn is_causal False"),
        (_field("sliding_window", 2), "model.layers.1.self_attn sliding_window 2, but its configuration says None"),
        (_field("attn_logit_softcapping", 5.0), "attn_logit_softcapping 5.0, but its configuration says None"),
        (_another_rotation, "model.rotary_emb inv_freq with other frequencies"),
        (_packed, r"lacks lm_head.weight \[29, 18\]"),
        (_rounded, r"model.rotary_emb inv_freq rounded to float16 \(load it with dtype=float16"),
        (_another_activation, "model.layers.1.mlp the activation GELU, but its configuration says silu"),
        (_another_eps, "model.layers.0.input_layernorm variance_epsilon 0.001, but its configuration says 1e-06"),
        (_another_forward, "model.layers.0.mlp a replaced forward"),
    ],
)
def test_a_module_that_computes_something_else_is_refused(change, message):
    config = transformers.LlamaConfig(**SIZES | HEADS)
    module = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    load(module)
    undone = change(module)
    try:
        with pytest.raises(ValueError, match=message):
            load(module)
    finally:
        if undone is not None:
            undone.remove()


def _by_numpy(module):
    for tensor in module.state_dict().values():
        array = tensor.numpy()
        array[..., 0] *= 1.25


def _one_number(module):
    next(layer for layer in module.model.layers).mlp.down_proj.weight.data.numpy()[5, 7] += 3


def _by_training(module):
    module(torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter -= 0.05 * parameter.grad


def _another_checkpoint(module):
    torch.manual_seed(7)
    module.load_state_dict({name: torch.randn_like(tensor) * 0.2 for name, tensor in module.state_dict().items()})


WRITES = {
    "another checkpoint": _another_checkpoint,
    "through .data": lambda module: [parameter.data.mul_(1.1) for parameter in module.parameters()],
    "by numpy": _by_numpy,
    "one number by numpy": _one_number,
    "by training": _by_training,
    "norms alone": lambda m: [p.data.add_(0.3) for name, p in m.named_parameters() if "norm" in name],
}


@pytest.mark.parametrize("dtype", [None, "float64"], ids=["shared", "converted"])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_scores_follow_weights_that_are_changed_in_place(name, dtype):
    torch.manual_seed(0)
    module = transformers.AutoModelForCausalLM.from_config(theirs(name).config, attn_implementation="eager").float()
    model = load(module, dtype=dtype)
    pairs, last = pairs_for(model), model.content_hash
    ablation = Ablation.of(model, pairs, "mean")
    first = eapcore.attribute(model, pairs)
    for what, write in WRITES.items():
        write(module)
        fresh = load(module, dtype=dtype)
        found = eapcore.attribute(model, pairs)
        assert torch.equal(found.scores, eapcore.attribute(fresh, pairs).scores), what
        assert not torch.equal(found.scores, first.scores), what
        assert model.content_hash == fresh.content_hash == found.meta["model"]["content_hash"] != last, what
        assert torch.equal(*(eapcore.run_with_senders(m, pairs.clean)[0] for m in (model, fresh))), what
        with pytest.raises(ValueError, match="were changed since the ablation's mean: make it anew"):
            eapcore.attribute(model, pairs, ablation=ablation)
        first, last = found, model.content_hash
        ablation = Ablation.of(model, pairs, "mean")
    assert eapcore.attribute(pickle.loads(pickle.dumps(model)), pairs).scores.equal(first.scores)


@pytest.mark.parametrize("change", ["p.data", "to", "assign", "module"])
def test_a_module_that_has_other_tensors_now_is_said_and_what_was_converted_follows_it(change):
    module = transformers.AutoModelForCausalLM.from_config(theirs("gemma2").config, attn_implementation="eager").float()
    shared, converted = load(module), load(module, dtype="float64")
    pairs = pairs_for(shared)
    torch.manual_seed(3)
    if change == "p.data":
        for parameter in module.parameters():
            parameter.data = torch.randn_like(parameter) * 0.2
    elif change == "to":
        turns = module.model.rotary_emb.inv_freq
        module.to(torch.bfloat16).model.rotary_emb.inv_freq = turns
    elif change == "assign":
        state = {name: torch.randn_like(tensor) * 0.2 for name, tensor in module.state_dict().items()}
        module.load_state_dict(state, assign=True)
        module.tie_weights()
    else:
        module.model.layers[0].mlp.up_proj = torch.nn.Identity()
    for call in (eapcore.attribute, lambda model, pairs: eapcore.run_with_senders(model, pairs.clean)):
        with pytest.raises(ValueError, match="is another tensor now than when the model was loaded"):
            call(shared, pairs)
    if change == "module":
        return
    fresh = load(module, dtype="float64")
    assert converted.content_hash == fresh.content_hash
    assert torch.equal(eapcore.attribute(converted, pairs).scores, eapcore.attribute(fresh, pairs).scores)
    expected = eapcore.attribute(converted, pairs).scores
    del module, fresh
    gc.collect()
    assert torch.equal(eapcore.attribute(converted, pairs).scores, expected)  # nobody changes it any more
