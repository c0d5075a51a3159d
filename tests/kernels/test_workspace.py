"""What an op says of its working memory is what it allocates, and what is planned of a process is what it takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import eapcore.kernels as kernels
import pytest
import torch
from eapcore.kernels import Norm, Sizes, cpp
from models import random_model, random_pairs
from test_planner import CPU, GPT2, SMALL, many_pairs, peak_bytes
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import eapcore.attribution.plan as planner
from eapcore.attribution.attribute import attribute

needs_cpp = pytest.mark.skipif(bool(cpp.why_not()), reason="needs the C++ ops")
REDUCES = ("all", "pair", "position")


@pytest.fixture(params=[1, 2, 5, 8])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def dense_case(senders, receivers, batch, tokens, d_model, dtype):
    sizes = Sizes(batch, tokens, d_model, senders=senders, receivers=receivers)
    return sizes, [torch.randn(n, batch, tokens, d_model).to(dtype) for n in (senders, receivers)]


def factored_case(layers, heads, batch, tokens, d_head, d_model, dtype, mlps=True):
    """The sizes, random factors of them, and a mask like a transformer's."""
    channels = 3 * heads
    sizes = Sizes(
        batch, tokens, d_model, channels=channels, d_head=d_head, layers=layers, heads=heads, mlps=mlps
    )  # fmt: skip

    def draw(*shape):
        return torch.randn(*shape).to(dtype)

    senders = kernels.FactoredSenders(
        draw(batch, tokens, d_model), draw(layers, batch, tokens, heads, d_head),
        [draw(heads, d_head, d_model) for _ in range(layers)], draw(layers, batch, tokens, d_model) if mlps else None,
    )  # fmt: skip
    receivers = kernels.FactoredReceivers(
        g=[draw(channels, batch, tokens, d_head) for _ in range(layers)],
        act=[draw(channels, batch, tokens, d_head) for _ in range(layers)],
        weight=[[draw(channels, d_model, d_head)] for _ in range(layers)],
        norms=[
            Norm("layernorm", draw(batch, tokens, d_model), torch.rand(batch, tokens), draw(d_model))
            for _ in range(layers)
        ],
        w_gamma=draw(layers, channels, d_head), offset=draw(layers, channels, d_head),
        logits=draw(batch, tokens, d_model), mlp=draw(layers, batch, tokens, d_model) if mlps else None,
    )  # fmt: skip
    mask = torch.ones(sizes.all_senders, sizes.all_receivers, dtype=torch.bool).triu(-2)
    return sizes, senders, receivers, mask


def beside_the_result(call):
    """Peak bytes of a call less those of what it returns."""
    call()
    peak, made = peak_bytes(call), call()
    return peak - made.numel() * made.element_size()


@needs_cpp
@pytest.mark.parametrize("reduce", REDUCES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (9, 37, 3, 5, 64), (40, 90, 4, 16, 40), (157, 37, 4, 20, 96)])
def test_cpp_edge_scores_allocates_what_it_says(shape, dtype, reduce, threads):
    sizes, operands = dense_case(*shape, dtype)
    for mask in (None, torch.rand(shape[0], shape[1]) < 0.3):
        said = kernels.workspace_bytes("edge_scores", sizes, dtype=dtype, mask=mask, reduce=reduce, impl="cpp")
        took = beside_the_result(lambda: kernels.edge_scores(*operands, mask=mask, reduce=reduce, impl="cpp"))  # noqa: B023
        assert took == said > 0


@needs_cpp
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (6, 2, 5, 8, 40), (36, 4, 20, 64, 768)])
def test_cpp_receiver_grads_allocates_what_it_says(shape, threads):
    channels, batch, tokens, d_head, d_model = shape
    sizes = Sizes(batch, tokens, d_model, channels=channels, d_head=d_head)
    g, act = torch.randn(2, channels, batch, tokens, d_head)
    weight, constants = torch.randn(channels, d_model, d_head), torch.randn(2, channels, d_head)
    norm = Norm("layernorm", torch.randn(batch, tokens, d_model), torch.rand(batch, tokens), torch.randn(d_model))
    said = kernels.workspace_bytes("receiver_grads", sizes, dtype=g.dtype, impl="cpp")
    took = beside_the_result(
        lambda: kernels.receiver_grads(g, act, weight, norm=norm, w_gamma=constants[0], offset=constants[1], impl="cpp")
    )
    assert took == said > 0


@needs_cpp
@pytest.mark.parametrize("reduce", REDUCES)
@pytest.mark.parametrize("chunk", [None, 1, 7, 1000])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 4, 8), (3, 4, 4, 9, 8, 40)])
def test_cpp_edge_scores_factored_allocates_what_it_says(shape, chunk, reduce, threads):
    sizes, senders, receivers, mask = factored_case(*shape, torch.float32)
    options = {"mask": mask, "reduce": reduce, "chunk": chunk, "impl": "cpp"}
    said = kernels.workspace_bytes("edge_scores_factored", sizes, dtype=torch.float32, **options)
    assert beside_the_result(lambda: kernels.edge_scores_factored(senders, receivers, **options)) == said > 0


@needs_cpp
def test_more_threads_and_longer_chunks_take_more_memory():
    sizes = Sizes(16, 20, 768, channels=36, d_head=64, layers=12, heads=12)
    before, found = torch.get_num_threads(), {}
    for threads in (1, 4):
        torch.set_num_threads(threads)
        for chunk in (12, 96):
            found[threads, chunk] = kernels.workspace_bytes(
                "edge_scores_factored", sizes, dtype=torch.float32, chunk=chunk, impl="cpp"
            )
    torch.set_num_threads(before)
    assert found[1, 12] < found[1, 96] < found[4, 96] < 4.1 * found[1, 96]
    assert kernels.fast_chunk(sizes, dtype=torch.float32, impl="cpp") == cpp.default_chunk()


def test_sizes_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="op must be one of edge_scores, receiver_grads"):
        kernels.workspace_bytes("scores", Sizes(1, 1, 1), dtype=torch.float32)
    with pytest.raises(ValueError, match="chunk must be at least 1 token row, got 0"):
        kernels.workspace_bytes("edge_scores_factored", Sizes(1, 1, 1), dtype=torch.float32, chunk=0)
    with pytest.raises(ValueError, match=r"mask must be bool \[S, R\] = \[2, 3\]"):
        sizes = Sizes(1, 1, 1, senders=2, receivers=3)
        kernels.workspace_bytes("edge_scores", sizes, dtype=torch.float32, mask=torch.ones(2, 2) > 0)


# Triton, in its interpreter and for GPUs that are not there


class Held(TorchDispatchMode):
    """Follows the bytes of all storages that torch's operators make. The interpreter runs too long for the profiler."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak = {}, 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        made = op(*args, **(kwargs or {}))
        self.alive = {at: held for at, held in self.alive.items() if not held[0].expired()}
        new = op is torch.ops.aten.lift_fresh.default or not (op.is_view or op._schema.is_mutable)
        if op.namespace == "aten" and new:
            for x in tree_flatten(made)[0]:
                if isinstance(x, torch.Tensor):
                    storage = x.untyped_storage()
                    self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(count for _, count in self.alive.values()))
        return made


def held_beside_the_result(call):
    with Held() as held:
        made = call()
    return held.peak - made.numel() * made.element_size()


@pytest.fixture
def interpreter(monkeypatch):
    triton_common = pytest.importorskip("eapcore.kernels.triton_common")
    if not triton_common.interpreted():
        pytest.skip("needs Triton's interpreter")
    return triton_common


@pytest.mark.parametrize("reduce", REDUCES)
@pytest.mark.parametrize("shape", [(5, 3, 4, 8, 64), (70, 3, 2, 2, 48)])
def test_triton_edge_scores_allocates_what_it_says(interpreter, shape, reduce):
    sizes, operands = dense_case(*shape, torch.float32)
    said = kernels.workspace_bytes("edge_scores", sizes, dtype=torch.float32, reduce=reduce, impl="triton")
    took = held_beside_the_result(lambda: kernels.edge_scores(*operands, reduce=reduce, impl="triton"))
    assert took == said


@pytest.mark.parametrize(("reduce", "chunk"), [("all", None), ("all", 4), ("pair", 4), ("position", 3)])
def test_triton_edge_scores_factored_allocates_what_it_says(interpreter, reduce, chunk):
    sizes, senders, receivers, mask = factored_case(2, 1, 3, 2, 16, 32, torch.float32)
    options = {"mask": mask, "reduce": reduce, "chunk": chunk, "impl": "triton"}
    said = kernels.workspace_bytes("edge_scores_factored", sizes, dtype=torch.float32, **options)
    took = held_beside_the_result(lambda: kernels.edge_scores_factored(senders, receivers, **options))
    assert took == said


@pytest.fixture
def gpu(monkeypatch):
    """A GPU as far as plans go: tensors are on the meta device, and nothing is launched."""
    common = pytest.importorskip("eapcore.kernels.triton_common")
    target = common.Target("cuda", 90, 132, 50 << 20, 141 << 30)
    monkeypatch.setattr(common, "target", lambda device: target)
    monkeypatch.setattr(common, "interpreted", lambda: False)
    monkeypatch.setattr(common, "launch", lambda *args, **options: None)
    monkeypatch.setattr(kernels, "available", lambda: {"triton": ""})


def on_meta(case, *sizes):
    with torch.device("meta"):
        return case(*sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(157, 37, 16, 20, 768), (1249, 76, 64, 16, 1600), (1249, 3649, 8, 4, 1600)])
def test_edge_scores_on_a_gpu_allocates_what_it_says(gpu, shape, dtype):
    sizes, operands = on_meta(dense_case, *shape, dtype)
    mask = torch.ones(shape[:2], dtype=torch.bool, device="meta")
    said = kernels.workspace_bytes("edge_scores", sizes, dtype=dtype, mask=mask, impl="triton")
    took = held_beside_the_result(lambda: kernels.edge_scores(*operands, mask=mask, impl="triton"))
    assert took == said
    assert said > 1 << 20 or shape[1] == 3649  # a layer's few tiles are split


@pytest.mark.parametrize("reduce", REDUCES)
@pytest.mark.parametrize("chunk", [None, 40])
@pytest.mark.parametrize("shape", [(12, 12, 16, 20, 64, 768), (48, 25, 16, 32, 64, 1600)])
def test_edge_scores_factored_on_a_gpu_allocates_what_it_says(gpu, shape, chunk, reduce):
    sizes, senders, receivers, mask = on_meta(factored_case, *shape, torch.bfloat16)
    options = {"mask": mask, "reduce": reduce, "chunk": chunk, "impl": "triton"}
    said = kernels.workspace_bytes("edge_scores_factored", sizes, dtype=torch.bfloat16, **options)
    took = held_beside_the_result(lambda: kernels.edge_scores_factored(senders, receivers, **options))
    # The table of a shorter last chunk is made when the partial sums of the others are gone.
    assert 0.999 * said <= took <= said


# The planner


def factored_plan(budget, batch=16, **how):
    rows = planner.fitting_chunk(GPT2, batch, 20, torch.float32, CPU, budget, **how)
    return rows, planner.factored_bytes(GPT2, batch, 20, torch.float32, chunk=rows, **how)


def test_a_chunk_is_made_smaller_only_where_the_workspace_is_what_does_not_fit(monkeypatch):
    each = 1 << 22  # bytes for a token row of a chunk
    monkeypatch.setattr(kernels, "fast_chunk", lambda *args, **where: 96)
    monkeypatch.setattr(kernels, "workspace_bytes", lambda op, sizes, *, chunk, **where: chunk * each)
    before = planner.factored_bytes(GPT2, 16, 20, torch.float32, chunk=96) - 96 * each
    assert 24 * each < before < 48 * each
    whole, half, quarter = (before + rows * each for rows in (96, 48, 24))
    assert factored_plan(whole) == (96, whole)
    assert factored_plan(whole - 1) == factored_plan(half) == (48, half)
    # With 24 rows the workspace is smaller than the rest: a smaller batch saves more.
    assert factored_plan(half - 1)[0] == factored_plan(quarter - 1)[0] == factored_plan(1)[0] == 24
    # A batch that fits with a smaller chunk is not made smaller.
    monkeypatch.setattr(planner, "budget", lambda device: whole - 1)
    assert planner.fitting_batch_size(GPT2, many_pairs(16, 20), torch.float32, CPU, "factored") == 16
    monkeypatch.setattr(planner, "_LEAST_CHUNK", 96)
    assert planner.fitting_batch_size(GPT2, many_pairs(16, 20), torch.float32, CPU, "factored") < 16
    # What no chunk makes smaller is left alone.
    monkeypatch.setattr(planner, "_LEAST_CHUNK", 16)
    monkeypatch.setattr(kernels, "workspace_bytes", lambda op, sizes, *, chunk, **where: (400 + chunk) * each)
    assert factored_plan(1)[0] == 96


def test_no_chunk_is_longer_than_the_batch():
    assert factored_plan(1 << 60, batch=1)[0] == 20
    assert factored_plan(1 << 60, batch=2, impl="reference")[0] == 40


@needs_cpp
def test_the_chunk_that_is_planned_is_the_one_that_is_taken_and_changes_no_score(monkeypatch):
    model = random_model(n_layers=3, n_ctx=16, dtype=torch.float32)
    pairs = random_pairs(model, [9] * 12)
    whole = attribute(model, pairs, storage="factored", batch_size=12).scores
    taken, contract = [], kernels.edge_scores_factored
    monkeypatch.setattr(
        kernels, "edge_scores_factored", lambda *a, **how: taken.append(how["chunk"]) or contract(*a, **how)
    )
    monkeypatch.setattr(planner, "fitting_chunk", lambda *args, **options: 5)
    cut = attribute(model, pairs, storage="factored", batch_size=12).scores
    assert taken == [5, 5]
    assert not torch.equal(cut, whole)
    torch.testing.assert_close(cut, whole, rtol=0, atol=1e-6 * float(whole.abs().max()))


# What a process takes

MODELS = {
    "small": (SMALL | {"n_layers": 4}, 64),
    "the size of GPT-2 small": (
        SMALL | {"n_layers": 12, "n_heads": 12, "d_model": 768, "d_head": 64, "d_mlp": 3072},
        16,
    ),
}
# Of resident memory that no plan has: pages that are begun, allocations of less than a page, what Python makes.
NOISE = 1 << 20


def resident(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def print_planned_and_resident(name, storage, threads):
    """In a process of its own: the plan of a batch, and how far resident memory rises when it comes again."""
    torch.set_num_threads(threads)
    options, batch = MODELS[name]
    model = random_model(**options, dtype=torch.float32)
    pairs = random_pairs(model, [20] * batch)
    # Program code, the threads' stacks and what matrix products keep for the next ones are not a batch's.
    attribute(model, pairs, storage=storage, batch_size=batch)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    attribute(model, pairs, storage=storage, batch_size=batch)
    needed = {"dense": planner.dense_bytes, "factored": planner.factored_bytes}[storage]
    measured = resident("VmHWM") - before
    planned = needed(replace(model.config, d_vocab=3), batch, 20, model.dtype)  # of which the metric reads three
    torch.set_num_threads(1)
    alone = needed(replace(model.config, d_vocab=3), batch, 20, model.dtype)
    print(json.dumps([planned, alone, measured]))


@needs_cpp
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="this system keeps no high-water mark")
@pytest.mark.parametrize(("name", "count"), [("small", 1), ("small", 2), ("small", 8), ("the size of GPT-2 small", 2)])
@pytest.mark.parametrize("storage", ["dense", "factored"])
def test_the_resident_memory_of_a_batch_is_within_a_tenth_of_the_plan(name, storage, count):
    # A fixed threshold has the C library give memory back that is freed: it would keep it, and count it before.
    path = os.pathsep.join(part for part in sys.path if part)
    env = os.environ | {"PYTHONPATH": path, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_WAIT_POLICY": "passive"}
    code = f"import test_workspace as t; t.print_planned_and_resident({name!r}, {storage!r}, {count})"
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
    )
    planned, alone, measured = json.loads(done.stdout)
    print(f"planned {planned / 2**20:.1f} MiB, resident {measured / 2**20:.1f} MiB: {planned / measured:.3f}")
    assert measured - planned <= 0.1 * measured + NOISE
    # A thread that comes too late for any of the work touches nothing of its own part.
    assert alone - measured <= 0.1 * measured + NOISE
