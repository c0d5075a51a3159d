"""A model's layers on several devices: one device's bits, on stand-ins that refuse each other's tensors."""

from __future__ import annotations

import gc
from collections import Counter
from dataclasses import replace

import torch
from accel import AccelTensor, on_accel
from everything import EXACT, SEARCHES
from models import random_case, random_model, random_pairs, tensors_of
from refusal import refused
from torch.nn.attention import SDPBackend, sdpa_kernel

import eapcore
import eapcore.execution.limits as limits
from eapcore.attribution.plan import ONE_GRADIENT
from eapcore.attribution.positions import attention_edges
from eapcore.attribution.spread import SpreadPlan, Travel, spread_over
from eapcore.cli import main
from eapcore.execution.ablation import Ablation
from eapcore.execution.devices import find_devices, lay, share_of_process, spread
from eapcore.models.forward import run_with_senders
from eapcore.models.placed import placed

A, B, C = (torch.device("accel", number) for number in range(3))
SIZES = {"n_layers": 2, "n_heads": 2, "d_model": 8, "d_head": 4, "d_mlp": 12}


def on_one_and_two(model):
    """All layers on one stand-in, and the first on it and the others on a second one."""
    return placed(model, [A] * model.config.n_layers, A), placed(model, [A, *[B] * (model.config.n_layers - 1)], A)


def assert_same_bits(there, here):
    there, here = dict(tensors_of(there)), dict(tensors_of(here))
    assert list(there) == list(here) and there
    for name, x in there.items():
        assert torch.equal(*(y.raw if isinstance(y, AccelTensor) else y for y in (x, here[name]))), name


def test_a_device_refuses_the_tensors_of_another_and_what_travels_is_counted():
    with on_accel() as devices:
        x, y = torch.ones(3, device=A), torch.ones(3, device=B)
        assert (y * 2).device == B and y[[0, 2]].device == B
        for mix in (lambda: x + y, lambda: y[x.long()], lambda: y + torch.ones((), device=A), lambda: y.add_(x)):
            refused(r"got tensors on accel:\d and .* on accel:\d", mix, error=RuntimeError)
        assert not devices.travelled
        assert (x.to(B) + y).device == B and y.copy_(x) is y
        assert devices.travelled == {(0, 1): 24}


CASES = [(method, {}) for method in ("eap", "hybrid", "relp", "qk-fix", "grad-drop", "hisp")]
CASES += [("eap-ig", {"steps": 2, "spread": True}), ("eap-ig-activations", {"steps": 1})]
CASES += [("eap", {"level": "node", "reduce": "pair"}), ("eap", {"exact": "last", "reduce": "pair"})]
CASES += [("eap", {"level": "neuron", "reduce": "position", "ablation": "mean-positional"})]


def test_every_method_gives_one_devices_bits():
    model, pairs = random_case([6, 5], first_difference=1, **SIZES)
    with on_accel() as devices, sdpa_kernel(SDPBackend.MATH):
        one, two = on_one_and_two(model)
        for method, options in CASES:
            devices.travelled.clear()
            expected = eapcore.attribute(one, pairs, method=method, **options)
            assert not devices.travelled and float(expected.scores.abs().max()) > 0
            assert_same_bits(eapcore.attribute(two, pairs, method=method, **options), expected)
            assert devices.travelled[0, 1] > 0 < devices.travelled[1, 0]


def test_what_is_done_on_a_gpu_alone_too(monkeypatch):
    gpu = replace(limits.TABLE["cuda"], receivers=14, workspace=1 << 20)  # two layers of 7 receivers
    monkeypatch.setitem(limits.TABLE, "accel", gpu)
    model, pairs = random_case([6, 5], first_difference=1, **SIZES | {"n_layers": 4})
    with on_accel(), sdpa_kernel(SDPBackend.MATH):
        one, two = placed(model, [A] * 4, A), placed(model, [A, B, B, C], A)
        for by_itself in (False, True):
            monkeypatch.setattr("eapcore.attribution.score_batch.makes_differences", lambda model, x=by_itself: x)
            for options in ({}, {"method": "eap-ig", "steps": 2, "reduce": "position"}):
                assert_same_bits(eapcore.attribute(two, pairs, **options), eapcore.attribute(one, pairs, **options))


def test_dtypes_and_attention_without_mlps_too():
    for options, dtype in (({"d_mlp": None, "split_qkv": True}, torch.float32), ({}, torch.bfloat16)):
        model, pairs = random_case([6, 5], dtype=dtype, **SIZES | options)
        with on_accel(), sdpa_kernel(SDPBackend.MATH):
            there, here = (eapcore.attribute(m, pairs, method="hybrid") for m in on_one_and_two(model))
            assert_same_bits(there, here)


def test_exact_patching_and_searches_give_one_devices_bits():
    model, pairs = random_case([5, 5], first_difference=1, **SIZES)
    calls = {name: EXACT[name] for name in ("edges", "nodes", "routes", "circuits")}
    calls |= {"acdc": SEARCHES["acdc"], "mean": lambda m, p: EXACT["circuits"](m, p, ablation="mean")}
    with on_accel(), sdpa_kernel(SDPBackend.MATH):
        one, two = on_one_and_two(model)
        for name, call in calls.items():
            found, expected = (torch.as_tensor(call(m, pairs)).cpu() for m in (two, one))
            assert torch.equal(found, expected), name
        assert_same_bits(*(attention_edges(m, pairs) for m in (two, one)))
        for x, y in zip(*(run_with_senders(m, pairs.clean.to(A)) for m in (two, one)), strict=True):
            assert torch.equal(x.raw, y.raw)


def test_devices_are_an_option_of_attribute_and_of_the_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model, pairs = random_case([6, 5], **SIZES)
    with on_accel() as devices, sdpa_kernel(SDPBackend.MATH):
        one, _ = on_one_and_two(model)
        mean = Ablation.of(model, pairs, "mean")
        for ablation, there, names in (("corrupt", "corrupt", ["accel:0", B]), ("mean", mean, "accel:0,accel:1")):
            expected = eapcore.attribute(one, pairs, ablation=ablation)
            found = eapcore.attribute(model, pairs, ablation=there, devices=names)
            assert_same_bits(found.scores, expected.scores)
        devices.travelled.clear()
        assert main(["attribute", "--n-pairs", "3", "--devices", "accel:0,accel:1", "--dtype", "float64"]) == 0
        assert devices.travelled and "on accel:0, accel:1" in capsys.readouterr().out
        found = eapcore.EdgeScores.load("scores.safetensors")
        expected = eapcore.attribute(
            eapcore.load("toy-ioi", dtype="float64"), eapcore.tasks.find_pairs("toy-ioi", n=3, seed=0), method="hybrid"
        )
        torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=1e-12)
        for options, said in {
            ("--devices", "accel:0,accel:0"): "each device must be named once, got accel:0 several times",
            ("--devices", "accel:0,cpu", "--device", "cpu"): "--device names one and --devices several",
            ("--devices", "meta"): "devices must be auto or names such as cuda:0,cuda:1, got 'meta'",
            ("--devices", "accel:0,accel:1", "--storage", "factored"): "storage must be 'auto' or 'dense' where",
        }.items():
            assert main(["attribute", "--n-pairs", "3", *options]) == 2 and said in capsys.readouterr().err
        two = spread_over(model, ["accel:0", "accel:1"])
        refused("the layers lie on accel:0, accel:1: leave graphs", eapcore.attribute, two, pairs, graphs=True)
        refused("3 devices cannot share 2 layers: name at most 2", spread, model, [A, B, C])


def test_layers_are_laid_by_memory():
    assert lay([1] * 8, 0, [10, 10]) == [4, 4]
    assert lay([1] * 8, 5, [10, 10]) == [3, 5]  # 5 are left beside the embedding, and 10
    assert lay([1] * 9, 0, [10, 20]) == [3, 6]
    assert lay([1] * 3, 0, [10, 10, 10]) == [1, 1, 1]
    refused("the weights, 3.0 GiB, do not fit: 2 devices have 2.0 GiB", lay, [1 << 30] * 3, 0, [1 << 30] * 2)
    refused("2 devices cannot share 1 layers: name at most 1", lay, [1], 0, [10, 10])


def test_processes_of_a_machine_share_its_devices(monkeypatch):
    devices = [torch.device("accel", number) for number in range(5)]
    assert share_of_process(devices) == devices
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    shares = []
    for rank in "01":
        monkeypatch.setenv("LOCAL_RANK", rank)
        shares += share_of_process(devices)
    assert shares == devices
    refused("2 processes of this machine cannot share 1 devices: start at most 1", share_of_process, devices[:1])
    assert find_devices("auto")[0].type in ("cpu", "cuda")
    refused("device 'cuda:99' cannot be used here", find_devices, "cpu,cuda:99", error=RuntimeError)


def test_the_plan_bounds_what_each_device_holds_and_says_what_travels():
    model = random_model(n_layers=6, n_heads=4, d_model=32, d_head=8, d_mlp=96, d_vocab=40, n_ctx=24)
    pairs = random_pairs(model, [20] * 6)
    where = [A, B, B, B, C, C]
    with on_accel(watch=True) as devices, sdpa_kernel(SDPBackend.MATH):
        there = placed(model, where, A)
        before = Counter(devices.now)
        gc.collect()
        devices.travelled.clear(), devices.peaks.clear()
        eapcore.attribute(there, pairs, batch_size=6)
    layers = [(device, where.count(device)) for device in (A, B, C)]
    config = replace(model.config, d_vocab=3)  # the answers that are read
    plan = SpreadPlan(config, model.dtype, layers, passes=lambda graph: ONE_GRADIENT, within=[1 << 23] * 3)
    for device, need in enumerate(plan.needs(6, 20)):
        assert need / 4 < devices.peaks[device] - before[device] <= need
    assert plan.batch_size(pairs) == 6 and plan.fits(6, 20) and not plan.fits(60, 20)
    found, counted = Travel.of(model.config, [1, 3, 2], 6, 20, model.dtype), sum(devices.travelled.values())
    assert abs(found.total / counted - 1) < 0.03 and 0 < found.as_gradients < 5
    assert Travel.of(model.config, [6], 6, 20, model.dtype).total == 0
