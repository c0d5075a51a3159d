"""Everything runs on the model's device, and no batch waits for it: shown on "accel", a stand-in for a GPU."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import eapcore.kernels as kernels
import pytest
import torch
from accel import DEVICE, AccelTensor, on_accel
from models import random_model, random_pairs
from test_weights import lens
from torch.nn.attention import SDPBackend, sdpa_kernel

import eapcore
from eapcore.evaluation.completeness import completeness, minimality
from eapcore.evaluation.faithfulness import faithfulness, mib
from eapcore.evaluation.roc import roc
from eapcore.evaluation.stability import stability
from eapcore.evaluation.verify import verify
from eapcore.interop import eap_ig
from eapcore.interop.transformers import from_gpt2
from eapcore.models.forward import forward
from eapcore.patching.edges import patch_edges
from eapcore.patching.interpolate import interpolate
from eapcore.patching.nodes import patch_nodes
from eapcore.patching.paths import path_patch, routes
from eapcore.search.acdc import acdc

ATTENTION_ONLY = {"d_mlp": None, "split_qkv": True}
METHODS = ["eap", "eap-ig", "clean-corrupt", "eap-ig-activations", "relp", "qk-fix", "grad-drop", "atp-star"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def on_device(value):
    """A model with its weights on the device."""
    if isinstance(value, torch.Tensor):
        return value.to(DEVICE)
    if isinstance(value, tuple):
        return tuple(map(on_device, value))
    if dataclasses.is_dataclass(value):
        return dataclasses.replace(
            value, **{f.name: on_device(getattr(value, f.name)) for f in dataclasses.fields(value)}
        )
    return value


def tensors(value, name=""):
    """Every tensor of a result by name."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from tensors(getattr(value, field.name), f"{name}.{field.name}")
    elif isinstance(value, dict | list | tuple):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from tensors(item, f"{name}[{key!r}]")


def assert_same(there, here, tolerance=0.0):
    """A result from the device against that from the CPU, numbers and all else."""
    there, here = dict(tensors(there)), dict(tensors(here))
    assert list(there) == list(here) and there
    for name, value in there.items():
        value = value.raw if isinstance(value, AccelTensor) else value
        torch.testing.assert_close(
            value, here[name], rtol=tolerance, atol=tolerance, msg=lambda m, at=name: f"{at}: {m}"
        )


# The stand-in itself


def test_the_device_refuses_tensors_of_the_cpu_as_a_gpu_does():
    with on_accel():
        x = torch.ones(3, device=DEVICE)
        assert x.device == DEVICE and (x + torch.tensor(2.0)).raw.tolist() == [3.0] * 3
        assert x[[0, 2]].raw.tolist() == x[torch.tensor([0, 2])].raw.tolist() == [1.0] * 2
        for mix in (lambda: x + torch.ones(3), lambda: torch.ones(3).add_(x), lambda: torch.cat([x, torch.ones(1)])):
            with pytest.raises(RuntimeError, match=r"tensors on accel:0 and .* on cpu"):
                mix()
    with pytest.raises(AssertionError, match="outside on_accel"):
        x + 1


def test_the_device_counts_what_the_host_waits_for():
    with on_accel() as device:
        x = torch.ones(3, device=DEVICE)
        x.mul_(2).sum(), x[1:].copy_(torch.zeros(2)), torch.zeros(4).to(DEVICE)
        assert not device.waits
        for wait in (x.sum().item, lambda: bool(x.any()), x.tolist, x.cpu, x.nonzero, lambda: x[x > 0]):
            before = device.waits.total()
            wait()
            assert device.waits.total() == before + 1
        view = x[1:]
        view.fill_(7)
        assert x.tolist() == [2.0, 7.0, 7.0] and view.data_ptr() == x.data_ptr() + 4


# Scores


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_the_cpus_scores_and_waits_for_no_batch(method):
    for storage in ("dense",) if method in ("qk-fix", "atp-star") else ("dense", "factored"):
        compare_scores(method=method, storage=storage)


@pytest.mark.parametrize("level", ["node", "neuron"])
@pytest.mark.parametrize("reduce", ["all", "pair", "position"])
def test_nodes_and_neurons_too(level, reduce):
    compare_scores(level=level, reduce=reduce)


@pytest.mark.parametrize("ablation", ["zero", "mean", "mean-positional"])
def test_every_ablation_too(ablation):
    # A mean goes through the reference's prompts in batches of its own, before.
    compare_scores(ablation=ablation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, ATTENTION_ONLY], ids=["gpt2", "attention-only"])
@pytest.mark.parametrize("storage", ["dense", "factored"])
def test_every_dtype_and_family_too(storage, options, dtype):
    for reduce in ("pair", "position"):
        compare_scores(options, dtype, reduce=reduce, storage=storage)


def compare_scores(model=(), dtype=torch.float64, **options):
    """Equal bits: the stand-in runs the same ops on the same numbers."""
    here = random_model(**dict(model), dtype=dtype)
    pairs = random_pairs(here, [7, 6, 7, 5], first_difference=2)
    waits, sizes = [], (4, 2)
    with on_accel() as device, sdpa_kernel(SDPBackend.MATH):
        there = on_device(here)
        assert there.content_hash == here.content_hash
        for size in sizes:
            device.waits.clear()
            found = eapcore.attribute(there, pairs, batch_size=size, **options)
            waits.append(dict(device.waits))
            expected = eapcore.attribute(here, pairs, batch_size=size, impl="reference", **options)
            assert float(expected.scores.abs().max()) > 0
            assert_same(found, expected)
            assert (found.meta["impl"], found.scores.device.type) == ("reference", "cpu")
    assert waits[0] == waits[1] and sum(waits[0].values()) < 20  # as many for two batches as for one


def test_a_metric_that_leaves_the_device_is_found_out():
    here = random_model()
    pairs = random_pairs(here, [7, 6, 7, 5])
    with on_accel() as device:
        there = on_device(here)
        with pytest.raises(RuntimeError, match="on cpu"):
            eapcore.attribute(there, pairs, lambda logits: (logits * torch.ones(29)).sum(1))
        counts = []
        assert there.content_hash  # which is made once
        for size in (4, 1):
            device.waits.clear()
            eapcore.attribute(there, pairs, lambda logits: logits[:, 0] * float(logits.detach().max()), batch_size=size)
            counts.append(device.waits.total())
    assert counts[1] == counts[0] + 9  # three more batches, two runs and a gradient each


# Everything else


RUNS = {
    "run_with_senders": lambda m, p: eapcore.run_with_senders(m, p.clean.to(m.device)),
    "patch_edges": lambda m, p: patch_edges(m, p, batch_size=2),
    "patch_edges, mean": lambda m, p: patch_edges(m, p, "nll", ["embed->m0", "a0.h1->logits"], ablation="mean"),
    "patch_nodes": lambda m, p: patch_nodes(m, p, per_position=True),
    "path_patch": lambda m, p: vars_of(path_patch(m, p, "kl", ["a0.h1"], ["a0.h1->a1.h0<q>->logits"])),
    "interpolate": lambda m, p: torch.tensor(interpolate(m, p, "logit_diff", "m0->a1.h2<k>", points=4).effects),
    "run_circuit": lambda m, p: eapcore.run_circuit(m, p, patch_edges(m, p).top_n(30)),
    "acdc": lambda m, p: acdc(m, p, threshold=0.02),
    "faithfulness": lambda m, p: vars_of(faithfulness(m, p, "nll", eapcore.attribute(m, p), sizes=[9, 60])),
    "EAP-IG's attribute": lambda m, p: eap_ig_scores(m, p),
}  # fmt: skip


def vars_of(result):
    """The numbers among a result's fields, as tensors."""
    kept = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    lists = {name: value if isinstance(value, list) else [value] for name, value in kept.items()}
    return {name: torch.tensor(value) for name, value in lists.items() if value and isinstance(value[0], float)}


def eap_ig_scores(model, pairs):
    config = {"n_layers": model.config.n_layers, "n_heads": model.config.n_heads, "d_model": model.config.d_model}
    graph = SimpleNamespace(cfg=config, scores=torch.zeros(eap_ig.their_shape(model.graph), dtype=torch.float64))
    batch = [(pairs.clean.to(model.device), pairs.corrupt.to(model.device), None)]
    eap_ig.attribute(
        model, graph, batch, lambda logits, clean, lengths, label: logits[:, -1, 3] - logits[:, -1, 5], "EAP-IG-inputs",
        ig_steps=3, quiet=True,
    )  # fmt: skip
    return graph.scores


@pytest.mark.parametrize("name", RUNS)
def test_exact_methods_and_adapters_give_the_cpus_numbers(name):
    here = random_model()
    pairs = random_pairs(here, [6, 6, 6], first_difference=1)
    with on_accel():
        # The CPU's own attention and kernels: the same to rounding.
        assert_same(RUNS[name](on_device(here), pairs), RUNS[name](here, pairs), 1e-12)


# Other modes of torch


@pytest.mark.parametrize("storage", ["dense", "factored"])
@pytest.mark.parametrize("mode", [torch.inference_mode, lambda: torch.autocast("cpu", dtype=torch.bfloat16)],
                         ids=["inference mode", "autocast"])  # fmt: skip
def test_the_callers_modes_change_nothing(mode, storage):
    """Autocast would multiply in bfloat16, and in inference mode no metric has a gradient."""
    model = random_model(dtype=torch.float32)
    pairs = random_pairs(model, [6, 5, 6], first_difference=1)
    runs = {
        **{f"attribute, {method}": lambda m, p, how=method: eapcore.attribute(m, p, "nll", method=how, storage=storage)
           for method in METHODS if storage == "dense" or method == "eap"},
        "run_with_senders": lambda m, p: eapcore.run_with_senders(m, p.clean)[1],
        "patch_edges": patch_edges,
        "patch_nodes": patch_nodes,
        "interpolate": lambda m, p: torch.tensor(interpolate(m, p, "nll", "embed->a0.h1<v>").effects),
        "run_circuit": lambda m, p: eapcore.run_circuit(m, p, eapcore.Circuit(m.graph.edge_mask(), m.graph)),
        "acdc": lambda m, p: acdc(m, p, threshold=0.02).mask,
    }  # fmt: skip
    expected = {name: run(model, pairs) for name, run in runs.items()}
    with mode():
        found = {name: run(model, pairs) for name, run in runs.items()}
    for name, result in found.items():
        both = (getattr(x, "scores", getattr(x, "effects", x)) for x in (result, expected[name]))
        assert torch.equal(*both), name


# Another default device


ANYWHERE = {
    **{
        f"attribute, {method}": lambda m, p, method=method: eapcore.attribute(m, p, "nll", method=method).scores
        for method in METHODS
    },
    "factored": lambda m, p: (
        eapcore.attribute(m, p, storage="factored", reduce="position", ablation="mean").per_position
    ),
    "neurons": lambda m, p: eapcore.attribute(m, p, level="neuron", batch_size=2).units,
    "tokens alone": lambda m, p: eapcore.attribute(m, (p.clean, p.corrupt), lambda logits: logits[:, 3]).scores,
    "patch_edges": lambda m, p: patch_edges(m, p, batch_size=2).scores,
    "patch_nodes": lambda m, p: patch_nodes(m, p, per_position=True, ablation="mean-positional").effects,
    "path_patch": lambda m, p: path_patch(m, p, "kl", ["a0.h1"], ["a0.h1->a1.h0<q>->logits"]).effect,
    "interpolate": lambda m, p: interpolate(m, p, "logit_diff", "m0->a1.h2<k>", points=4).effects,
    "run_circuit": lambda m, p: eapcore.run_circuit(m, p, eapcore.attribute(m, p).top_n(30).prune()),
    "acdc": lambda m, p: acdc(m, p, threshold=0.02, start=eapcore.attribute(m, p).greedy(50)).mask,
    "mib": lambda m, p: mib(m, p, "nll", eapcore.attribute(m, p)).signed.faithfulness,
    "completeness": lambda m, p: completeness(m, p, "nll", eapcore.attribute(m, p).top_n(30)).gap,
    "minimality": lambda m, p: minimality(m, p, "nll", eapcore.attribute(m, p).top_n(30)).scores,
    "verify": lambda m, p: verify(m, p, n=7, curves=["embed->logits"]).effects,
    "roc": lambda m, p: roc(eapcore.attribute(m, p), patch_edges(m, p).top_n(9)).tpr,
    "stability": lambda m, p: (
        stability(eapcore.attribute(m, p, reduce="pair").per_pair, m.graph, top_n=9, n_resamples=5).std
    ),
    "routes": lambda m, p: routes(m.graph, ["embed"], ["a1.h0<q>"], through=["m0"]).mask,
}


@pytest.mark.parametrize("name", ANYWHERE)
def test_torchs_default_device_is_not_where_anything_is_made(name):
    """Neither a mask nor a sum; on the device "meta" numbers would be lost, and pointers be none."""
    model = random_model()
    pairs = random_pairs(model, [6, 5, 6], first_difference=1)
    expected = torch.as_tensor(ANYWHERE[name](model, pairs))
    with torch.device("meta"):
        model = dataclasses.replace(model)  # with nothing cached
        found = ANYWHERE[name](model, pairs)
    assert torch.equal(torch.as_tensor(found), expected)


@pytest.mark.parametrize("impl", ["reference", "cpp"])
def test_ops_make_their_results_where_their_inputs_are(impl):
    g = torch.randn(4, 2, 5, 3, dtype=torch.float32)
    delta, grads, weight = torch.randn(3, 2, 5, 7), torch.randn(4, 2, 5, 7), torch.randn(4, 7, 3)
    with torch.device("meta"):
        scores = kernels.edge_scores(delta, grads, impl=impl, reduce="pair")
        made = kernels.receiver_grads(g, g, weight, norm=kernels.Norm("none"), impl=impl)
    torch.testing.assert_close(scores, torch.einsum("sbtd,rbtd->bsr", delta, grads))
    torch.testing.assert_close(made, torch.einsum("cbtk,cdk->cbtd", g, weight))


# Models that were on the device before


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def gpt2(request):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=29, n_positions=16, n_embd=24, n_layer=2, n_head=3, tie_word_embeddings=request.param,
        attn_implementation="eager",
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).double().eval()


def moved(module):
    """A module with its parameters on the device; the ones that were one before are one there."""
    there = {}
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            if id(parameter) not in there:
                there[id(parameter)] = torch.nn.Parameter(parameter.detach().to(DEVICE), requires_grad=False)
            setattr(part, name, there[id(parameter)])
    return module


def test_a_gpt2lmheadmodel_on_the_device_shares_its_weights(gpt2):
    tokens = torch.tensor([[4, 8, 15, 16], [23, 4, 2, 0]])
    expected = gpt2(tokens).logits.detach()
    tied = gpt2.config.tie_word_embeddings
    with on_accel() as device:
        for convert in (from_gpt2, eapcore.load):
            model = convert(moved(gpt2))
            assert model.device == DEVICE and model.weights.w_e.device == DEVICE and not device.waits
            assert_same(forward(model, tokens.to(DEVICE)), expected, 1e-12)
            device.waits.clear()
            owned = {p.raw.untyped_storage().data_ptr() for p in gpt2.parameters()}
            used = {x.raw.untyped_storage().data_ptr() for _, x in model.weights.named()}
            assert used == owned
            assert (model.weights.w_u.data_ptr() == model.weights.w_e.data_ptr()) == tied
        gpt2.transformer.h[1].mlp.c_fc.weight.zero_()
        assert float(model.weights.layers[1].w_in.abs().max()) == 0.0


def test_load_moves_a_model_to_the_device(gpt2):
    here = eapcore.load(gpt2)
    with on_accel():
        for there in (eapcore.load(gpt2, device=DEVICE), eapcore.load(moved(gpt2), device="accel")):
            assert {x.device for _, x in there.weights.named()} == {DEVICE}
            assert there.content_hash == here.content_hash
        toy = eapcore.load("toy-ioi", device="accel:0", dtype="float64")
        assert toy.device == DEVICE and toy.content_hash == eapcore.load("toy-ioi", dtype="float64").content_hash


def test_a_transformer_lens_state_dict_on_the_device_shares_its_weights():
    here = random_model(split_qkv=True)
    state, config = lens(here)
    with on_accel() as device:
        state = {name: x.to(DEVICE) for name, x in state.items()}
        model = eapcore.load(state, config=config)
        assert model.device == DEVICE and not device.waits
        shared = {x.raw.untyped_storage().data_ptr() for x in state.values()}
        apart = {name for name, x in model.weights.named() if x.raw.untyped_storage().data_ptr() not in shared}
        assert apart == {"layers.0.b_qkv", "layers.1.b_qkv"}  # gathered from b_Q, b_K and b_V
        tokens = torch.tensor([[4, 8, 15, 16]])
        assert_same(forward(model, tokens.to(DEVICE)), forward(here, tokens), 1e-12)


@pytest.mark.parametrize("op", kernels.OPS)
def test_on_a_gpu_auto_takes_triton_but_for_float64(op):
    chosen = {dtype: kernels.choose(op, device="cuda:0", dtype=dtype) for dtype in DTYPES}
    assert chosen.pop(torch.float64) == "reference" and set(chosen.values()) == {"triton"}
