"""A model whose layers are streamed from the host: the bits of one that lies on the device."""

from __future__ import annotations

import contextlib
import importlib
import weakref

import torch
from accel import on_accel
from everything import EXACT
from models import random_case
from refusal import refused
from test_devices import SIZES, A, B, assert_same_bits
from torch.nn.attention import SDPBackend, sdpa_kernel

import eapcore
from eapcore.attribution.spread import spread_over, streams
from eapcore.cli import main
from eapcore.execution.streaming import Streamed, _CudaCopy, held_bytes, streamed
from eapcore.models.forward import run_with_senders
from eapcore.models.placed import placed
from eapcore.models.tensors import tensors_in

LAYERS = 5
PLANNING = [importlib.import_module(f"eapcore.{name}") for name in ("attribution.spread", "execution.memory")]
PLANNING.append(importlib.import_module("eapcore.attribution.attribute"))
CASES = [("hybrid", {}), ("qk-fix", {}), ("eap", {"level": "neuron", "ablation": "mean-positional"})]


def test_every_pass_brings_all_but_three_layers_of_which_no_more_are_there_to_the_same_bits(monkeypatch):
    brought, alive, most = [], [], LAYERS

    def start(self, index, original=Streamed._start):
        alive[:] = [(n, x) for n, x in alive if x() is not None]
        assert len({n for n, _ in alive}) < most  # before one more comes
        brought.append(index)
        arrival = original(self, index)
        alive.extend((index, weakref.ref(x.raw)) for x in tensors_in(arrival.layer))
        return arrival

    monkeypatch.setattr(Streamed, "_start", start)
    model, pairs = random_case([6, 5, 6], first_difference=1, **SIZES | {"n_layers": LAYERS})
    with on_accel() as devices, sdpa_kernel(SDPBackend.MATH):
        there, here = streamed(model, A), placed(model, [A] * LAYERS, A)
        assert there.content_hash == here.content_hash == model.content_hash and "streamed" in there.where
        for method, options in CASES:
            most = LAYERS if method == "qk-fix" else 3  # which looks back at the heads of all layers
            found = eapcore.attribute(there, pairs, method=method, **options)
            assert_same_bits(found, eapcore.attribute(here, pairs, method=method, **options))
        layer = sum(x.nbytes for x in tensors_in(model.weights.layers[0]))
        norms = sum(
            x.nbytes for stage in model.stages[1:] for x in tensors_in((stage.attention or stage.mlp).at_rest.norm)
        )
        for batches in (1, 3):
            given = []
            for x in (here, there):
                brought.clear(), devices.given.clear()
                eapcore.attribute(x, pairs, method="eap", batch_size=3 // batches)
                given.append(devices.given[0])
            # The first pass brings all, then each, forward or backward, finds three layers there.
            assert len(brought) == LAYERS + (2 * batches - 1) * (LAYERS - 3)
            assert given[1] - given[0] == len(brought) * layer + norms
        model.weights.layers[2][0][0].w_o.mul_(2)  # the host's: nothing of before is used again
        assert_same_bits(eapcore.attribute(there, pairs), eapcore.attribute(placed(model, [A] * LAYERS, A), pairs))


def test_half_precision_exact_patching_and_senders_too():
    model, pairs = random_case([5, 5], first_difference=1, dtype=torch.bfloat16, **SIZES | {"n_layers": 4})
    with on_accel(), sdpa_kernel(SDPBackend.MATH):
        there, here = streamed(model, A), placed(model, [A] * 4, A)
        assert_same_bits(*(eapcore.attribute(m, pairs, method="hybrid") for m in (there, here)))
        found, expected = (torch.as_tensor(EXACT["circuits"](m, pairs)).cpu() for m in (there, here))
        assert torch.equal(found, expected)
        for x, y in zip(*(run_with_senders(m, pairs.clean.to(A)) for m in (there, here)), strict=True):
            assert torch.equal(x.raw, y.raw)


def test_it_is_chosen_where_the_weights_do_not_fit_and_told(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model, pairs = random_case([6, 5], **SIZES | {"n_layers": 12, "d_model": 64, "d_mlp": 1024})
    size = sum(x.nbytes for _, x in model.weights.named())
    room = held_bytes(model) + (size - held_bytes(model)) * 3 // 4
    assert streams(model, A, room) and not streams(model, A, 2 * size) and not streams(model, torch.device("cpu"), 1)
    refused("random does not fit: accel:0 has .* with three layers at a time takes", streams, model, A, size // 8)
    with on_accel(), sdpa_kernel(SDPBackend.MATH):
        here = placed(model, [A] * 12, A)
        expected = eapcore.attribute(here, pairs)
        with monkeypatch.context() as small:
            for module in PLANNING:
                small.setattr(module, "free_bytes", lambda device: room)
            there = spread_over(model, [A])
            assert there.where == "accel:0, its layers streamed from the host" and spread_over(there, [A]) is there
            assert_same_bits(eapcore.attribute(model, pairs, devices=[A]), expected)
            refused("'dense' where the layers are streamed", eapcore.attribute, there, pairs, storage="factored")
            refused("the layers lie on accel:0, its", eapcore.attribute, there, pairs, graphs=True)
        assert spread_over(there, [A, B]).stream is None
        monkeypatch.setattr("eapcore.attribution.spread.streams", lambda model, device, memory=None: True)
        assert main(["attribute", "--n-pairs", "2", "--device", "accel:0", "--dtype", "float64"]) == 0
        assert "on accel:0, its layers streamed from the host" in capsys.readouterr().out


def test_a_thread_that_runs_the_model_meanwhile_takes_no_layer_away(monkeypatch):
    model, _ = random_case([3], **SIZES | {"n_layers": LAYERS})
    stream, others = Streamed(model.weights.layers, torch.device("cpu")), []

    def start(self, index, original=Streamed._start):
        arrival = original(self, index)
        if index == 3 and not others:  # when the fourth layer is there and the third on its way
            others.append(self.layer(0))
        return arrival

    monkeypatch.setattr(Streamed, "_start", start)
    found = [stream.layer(n) for n in (4, 3, 0, 1)]
    for layer, n in zip([*found, *others], (4, 3, 0, 1, 0), strict=True):
        assert layer[0][0].w_o is model.weights.layers[n][0][0].w_o, n


def test_every_stream_that_reads_a_layer_waits_for_its_copy(monkeypatch):
    waits, kept = [], []

    class Stream:
        def __init__(self, name="copies"):
            self.name = name

        def record_event(self):
            return f"event of {self.name}"

        def wait_event(self, event):
            waits.append((self.name, event))

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: kept.append(stream.name))
    layer = random_case([3], **SIZES)[0].weights.layers[0]
    copy = _CudaCopy(torch.device("cpu"))
    arrival = copy.start(layer)
    for current in (one := Stream("one"), Stream("two"), one):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device, current=current: current)
        copy.finish(arrival)
    assert waits == [("one", "event of copies"), ("two", "event of copies")]
    n = len(list(tensors_in(layer)))
    assert kept == ["one"] * n + ["two"] * n
