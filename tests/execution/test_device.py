"""Everything runs on the model's device, and no batch waits for it: shown on "accel", a stand-in for a GPU."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import eapcore.kernels as kernels
import pytest
import torch
from accel import DEVICE, AccelTensor, on_accel
from everything import EVERYTHING, EXACT, FIRST_ORDER, FURTHER, PRUNING
from models import gpt2, lens, random_case, random_model, random_pairs, tensors_of, with_weights
from refusal import refused
from torch.nn.attention import SDPBackend, sdpa_kernel

import eapcore
import eapcore.execution.cuda_graphs as cuda_graphs
from eapcore.attribution.methods import METHODS
from eapcore.evaluation.inside import inside_effects, inside_scores
from eapcore.execution.ablation import Ablation
from eapcore.execution.experiment import Experiment
from eapcore.interop import eap_ig
from eapcore.interop.transformers import from_gpt2
from eapcore.models.families.names import assemble
from eapcore.models.forward import forward

ATTENTION_ONLY = {"d_mlp": None, "split_qkv": True}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def on_device(model):
    return with_weights(model, lambda x: x.to(DEVICE))


def assert_same(there, here, tolerance=0.0):
    """A result from the device against that from the CPU, numbers and all else."""
    there, here = dict(tensors_of(there)), dict(tensors_of(here))
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
            refused(r"tensors on accel:0 and .* on cpu", mix, error=RuntimeError)
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


def test_a_device_without_float64_is_refused_before_it_is_used():
    class Narrow(on_accel):
        def made(self, raw, device):
            if raw.dtype == torch.float64:
                raise TypeError("Cannot convert a MPS Tensor to float64 dtype as it has none. Please use float32")
            return super().made(raw, device)

    model, pairs = random_case([5], dtype=torch.float32)
    with Narrow():
        there, message = (
            on_device(model),
            "device 'accel:0' cannot be used here: Cannot convert a MPS Tensor to float64",
        )
        refused(message, eapcore.attribute, there, pairs, error=RuntimeError)
        refused(
            message, eapcore.run_circuit, there, pairs, eapcore.Circuit.from_edges(model.graph, []), error=RuntimeError
        )
        refused(message, eapcore.load, "toy-ioi", device=DEVICE, error=RuntimeError)


# Scores


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_the_cpus_scores_and_waits_for_no_batch(method):
    steps = {"steps": 2} if method.startswith("eap-ig") else {}
    storages = ("factored",) if method in PRUNING else ("dense", "factored")
    for storage in ("dense",) if method in ("qk-fix", "atp-star") else storages:
        compare_scores(method=method, storage=storage, **steps)


@pytest.mark.parametrize("level", ["node", "neuron"])
@pytest.mark.parametrize("reduce", ["all", "pair", "position"])
def test_nodes_and_neurons_too(level, reduce):
    compare_scores(level=level, reduce=reduce)


@pytest.mark.parametrize("reduce", ["all", "position"])
def test_scores_with_their_uncertainty_too(reduce):
    compare_scores(reduce=reduce, uncertainty=True)


@pytest.mark.parametrize("ablation", ["zero", "mean", "mean-positional"])
def test_every_ablation_too(ablation):
    # A mean goes through the reference's prompts in batches of its own, before.
    compare_scores(ablation=ablation)


@pytest.mark.parametrize("options", [{}, ATTENTION_ONLY], ids=["gpt2", "attention-only"])
@pytest.mark.parametrize("storage", ["dense", "factored"])
def test_every_storage_and_family_too(storage, options):
    for reduce in ("pair", "position"):
        compare_scores(options, reduce=reduce, storage=storage)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_dtype_too(dtype):
    compare_scores({}, dtype, reduce="pair", storage="dense")
    compare_scores(ATTENTION_ONLY, dtype, reduce="position", storage="factored")


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
    looked_at = sum(1 for _ in here.weights.named())  # whether somebody wrote into the weights
    assert waits[0] == waits[1] and sum(waits[0].values()) < 20 + looked_at  # as many for two batches as for one


def test_a_metric_that_leaves_the_device_is_found_out():
    here = random_model()
    pairs = random_pairs(here, [7, 6, 7, 5])
    with on_accel() as device:
        there = on_device(here)
        with pytest.raises(RuntimeError, match="on cpu"):
            eapcore.attribute(there, pairs, lambda logits: (logits * torch.ones(29)).sum(1))
        counts = []
        assert there.content_hash  # which is made once
        for size in (4, 2):
            device.waits.clear()
            waits = lambda logits: logits[:, 0] * float(torch.ones_like(logits[0, 0]))  # noqa: E731
            eapcore.attribute(there, pairs, waits, batch_size=size)
            counts.append(device.waits.total())
    assert counts[1] == counts[0] + 3  # one more batch, of two runs and a gradient


# Everything else


def inside(measure):
    """What a model's edges inside components score, or do, as one row."""
    return lambda m, p: torch.cat([(found := measure(Experiment.of(m, p))).inputs, found.sent])


INSIDE = {"scores inside components": inside(inside_scores), "effects inside components": inside(inside_effects)}
RUNS = {
    **INSIDE,
    "run_with_senders": lambda m, p: eapcore.run_with_senders(m, p.clean.to(m.device)),
    "EAP-IG's attribute": lambda m, p: eap_ig_scores(m, p),
    "edges, mean": lambda m, p: EXACT["edges"](m, p, ablation="mean"),
    **{name: EVERYTHING[name] for name in (*EXACT, "acdc", "probing", "smallest", "faithfulness")},
    **FURTHER,
}


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
        there, expected = (RUNS[name](model, pairs) for model in (on_device(here), here))
        if not isinstance(expected, tuple | torch.Tensor):
            there, expected = torch.as_tensor(there), torch.as_tensor(expected)
        assert_same(there, expected, 1e-12)  # the CPU's own attention and kernels: the same to rounding


@pytest.mark.parametrize(
    "options", [{}, {"method": "atp-star", "level": "node"}, {"method": "eap-ig", "level": "neuron"}], ids=str
)
def test_a_batch_takes_nothing_from_the_host_that_a_recording_would_have_to_copy_again(monkeypatch, options):
    model, pairs = random_case([6] * 6, first_difference=1)
    config = dataclasses.replace(model.config, rotary_frequencies=(1.0, 0.1))
    model = dataclasses.replace(model, config=config, weights=assemble(config, dict(model.weights.named())))
    given = []
    with on_accel() as devices, sdpa_kernel(SDPBackend.MATH):

        def run(self, batch, work, alike):
            before = devices.given.total()
            made = work(batch)
            given.append(devices.given.total() - before)
            return made

        monkeypatch.setattr(cuda_graphs.Replays, "run", run)
        there = eapcore.attribute(on_device(model), pairs, batch_size=2, **options)
    assert len(given) == 3 and not any(given[1:])  # what is made once for a model is there
    assert_same(there.scores, eapcore.attribute(model, pairs, batch_size=2, **options).scores, 1e-10)


# Other modes of torch


@pytest.mark.parametrize("storage", ["dense", "factored"])
@pytest.mark.parametrize("mode", [torch.inference_mode, lambda: torch.autocast("cpu", dtype=torch.bfloat16)],
                         ids=["inference mode", "autocast"])  # fmt: skip
def test_the_callers_modes_change_nothing(mode, storage):
    """Autocast would multiply in bfloat16, and in inference mode no metric has a gradient."""
    model, pairs = random_case([6, 5, 6], first_difference=1, dtype=torch.float32)
    ways = [method for method in METHODS if storage == "dense" or method == "eap" if method not in PRUNING]
    runs = {
        **{way: lambda m, p, way=way: eapcore.attribute(m, p, "nll", method=way, storage=storage).scores
            for way in ways},
        "run_with_senders": lambda m, p: eapcore.run_with_senders(m, p.clean)[1],
        **{name: EVERYTHING[name] for name in ("edges", "nodes", "a curve", "circuits", "acdc")},
        **{name: lambda m, p, name=name: Ablation.of(m, p, name).values.z[-1] for name in ("mean", "optimal")},
    }  # fmt: skip
    expected = {name: torch.as_tensor(run(model, pairs)) for name, run in runs.items()}
    with mode():
        found = {name: torch.as_tensor(run(model, pairs)) for name, run in runs.items()}
    for name, result in found.items():
        assert torch.equal(result, expected[name]), name


# Another default device


ANYWHERE = (
    EVERYTHING
    | INSIDE
    | FURTHER
    | {
        "tokens alone": lambda m, p: eapcore.attribute(m, (p.clean, p.corrupt), lambda logits: logits[:, 3]).scores,
        "by position, mean": lambda m, p: FIRST_ORDER["by position"](m, p, ablation="mean"),
        "nodes, mean by position": lambda m, p: EXACT["nodes by position"](m, p, ablation="mean-positional"),
    }
)


@pytest.mark.parametrize("name", ANYWHERE)
def test_torchs_default_device_is_not_where_anything_is_made(name):
    """Neither a mask nor a sum; on the device "meta" numbers would be lost, and pointers be none."""
    model, pairs = random_case([6, 5, 6], first_difference=1)
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
def module(request):
    return gpt2(tie_word_embeddings=request.param, attn_implementation="eager").double()


def moved(module):
    """A module with its parameters on the device; the ones that were one before are one there."""
    there = {}
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            if id(parameter) not in there:
                there[id(parameter)] = torch.nn.Parameter(parameter.detach().to(DEVICE), requires_grad=False)
            setattr(part, name, there[id(parameter)])
    return module


def test_a_gpt2lmheadmodel_on_the_device_shares_its_weights(module):
    tokens = torch.tensor([[4, 8, 15, 16], [23, 4, 2, 0]])
    expected = module(tokens).logits.detach()
    tied = module.config.tie_word_embeddings
    with on_accel() as device:
        for convert in (from_gpt2, eapcore.load):
            model = convert(moved(module))
            assert model.device == DEVICE and model.weights.w_e.device == DEVICE and not device.waits
            assert_same(forward(model, tokens.to(DEVICE)), expected, 1e-12)
            device.waits.clear()
            owned = {p.raw.untyped_storage().data_ptr() for p in module.parameters()}
            used = {x.raw.untyped_storage().data_ptr() for _, x in model.weights.named()}
            assert used == owned
            assert (model.weights.w_u.data_ptr() == model.weights.w_e.data_ptr()) == tied
        module.transformer.h[1].mlp.c_fc.weight.zero_()
        assert float(model.stages[3].mlp.component.w_in.abs().max()) == 0.0


def test_load_moves_a_model_to_the_device(module):
    expected = eapcore.load(module).content_hash
    with on_accel():
        for there in (eapcore.load(module, device=DEVICE), eapcore.load(moved(module), device="accel")):
            assert {x.device for _, x in there.weights.named()} == {DEVICE}
            assert there.content_hash == expected
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
