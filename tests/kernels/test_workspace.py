"""What an op says of its working memory is what it allocates."""

from __future__ import annotations

import gc
from dataclasses import replace

import eapcore.kernels as kernels
import pytest
import torch
from eapcore.kernels import Norm, Sizes, cpp
from kernel_cases import factors
from memory import Storages

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
    sizes = Sizes(batch, tokens, d_model, channels=channels, d_head=d_head, layers=layers, heads=heads, mlps=mlps)

    def draw(*shape):
        return torch.randn(*shape).to(dtype)

    def layer():
        g, act = draw(2, channels, batch, tokens, d_head)
        norm = Norm("layernorm", draw(batch, tokens, d_model), torch.rand(batch, tokens), draw(d_model))
        return g, act, draw(channels, d_model, d_head), norm, *draw(2, channels, d_head)

    senders, receivers, _ = factors([layer() for _ in range(layers)], heads, channels, draw, mlps)
    receivers = replace(receivers, g=list(receivers.g), act=list(receivers.act))  # apart, as a backward pass makes them
    mask = torch.ones(sizes.all_senders, sizes.all_receivers, dtype=torch.bool).triu(-2)
    return sizes, senders, receivers, mask


def beside_the_result(call):
    """Peak bytes of a call less those of what it returns; by torch's operators, as torch's profiler takes what happens
    on a loaded machine for another order."""
    with Storages() as held:
        made = call()
    return held.peak - made.numel() * made.element_size()


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


@pytest.fixture
def interpreter(monkeypatch):
    triton_common = pytest.importorskip("eapcore.kernels.triton_common")
    if not triton_common.interpreted():
        pytest.skip("needs Triton's interpreter")
    if reason := kernels.available()["triton"]:
        pytest.skip(reason)
    launch = triton_common.launch

    def launch_and_forget(*args, **meta):
        launch(*args, **meta)
        gc.collect()  # Triton 3.9's interpreter leaves a kernel's arguments in circles

    monkeypatch.setattr(triton_common, "launch", launch_and_forget)
    gc.freeze()  # what was there before need not be looked through each time
    yield triton_common
    gc.unfreeze()


@pytest.mark.parametrize("reduce", REDUCES)
@pytest.mark.parametrize("shape", [(5, 3, 4, 8, 64), (70, 3, 2, 2, 48)])
def test_triton_edge_scores_allocates_what_it_says(interpreter, shape, reduce):
    sizes, operands = dense_case(*shape, torch.float32)
    said = kernels.workspace_bytes("edge_scores", sizes, dtype=torch.float32, reduce=reduce, impl="triton")
    took = beside_the_result(lambda: kernels.edge_scores(*operands, reduce=reduce, impl="triton"))
    assert took == said
    mask, before = torch.ones(sizes.senders, sizes.receivers, dtype=torch.bool), [sizes.senders // 2] * sizes.receivers
    mask[sizes.senders // 2 :] = False
    how = {"mask": mask, "before": before, "reduce": reduce, "impl": "triton"}
    said = kernels.workspace_bytes("edge_scores", sizes, dtype=torch.float32, **how)
    assert beside_the_result(lambda: kernels.edge_scores(*operands, **how)) == said


@pytest.mark.parametrize(("reduce", "chunk"), [("all", None), ("all", 4), ("pair", 4), ("position", 3)])
def test_triton_edge_scores_factored_allocates_what_it_says(interpreter, reduce, chunk):
    sizes, senders, receivers, mask = factored_case(2, 1, 3, 2, 16, 32, torch.float32)
    options = {"mask": mask, "reduce": reduce, "chunk": chunk, "impl": "triton"}
    said = kernels.workspace_bytes("edge_scores_factored", sizes, dtype=torch.float32, **options)
    took = beside_the_result(lambda: kernels.edge_scores_factored(senders, receivers, **options))
    assert took == said


@pytest.fixture
def gpu(monkeypatch):
    """A GPU as far as plans go: tensors are on the meta device, and nothing is launched."""
    common = pytest.importorskip("eapcore.kernels.triton_common")
    target = common.Target("cuda", 90, 132, 141 << 30)
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
    took = beside_the_result(lambda: kernels.edge_scores(*operands, mask=mask, impl="triton"))
    assert took == said
    assert said > 1 << 20 or shape[1] == 3649  # a layer's few tiles are split


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm", "none"])
def test_receiver_grads_on_a_gpu_allocates_what_it_says(gpu, kind, dtype):
    for d_model, d_head in ((768, 64), (771, 64), (768, 60), (768, 256)):
        with torch.device("meta"):
            g, weight = torch.empty(36, 4, 20, d_head, dtype=dtype), torch.empty(36, d_model, d_head, dtype=dtype)
            norm = Norm(kind, torch.empty(4, 20, d_model, dtype=dtype), torch.empty(4, 20))
            constants = {"w_gamma": torch.empty(36, d_head), "offset": torch.empty(36, d_head)}
        read_through = {"normed": kind != "none", "centred": kind == "layernorm"}
        sizes = Sizes(4, 20, d_model, channels=36, d_head=d_head, **read_through)
        said = kernels.workspace_bytes("receiver_grads", sizes, dtype=dtype, impl="triton")
        took = beside_the_result(lambda: kernels.receiver_grads(g, g, weight, norm=norm, **constants, impl="triton"))  # noqa: B023
        two_sums = kind == "layernorm" and dtype == torch.bfloat16 and (d_model, d_head) == (768, 64)
        assert took == said == (2 * 36 * 80 * 4 if two_sums else 0)


@pytest.mark.parametrize("reduce", REDUCES)
@pytest.mark.parametrize("chunk", [None, 40])
@pytest.mark.parametrize("shape", [(12, 12, 16, 20, 64, 768), (48, 25, 16, 32, 64, 1600)])
def test_edge_scores_factored_on_a_gpu_allocates_what_it_says(gpu, shape, chunk, reduce):
    sizes, senders, receivers, mask = on_meta(factored_case, *shape, torch.bfloat16)
    options = {"mask": mask, "reduce": reduce, "chunk": chunk, "impl": "triton"}
    said = kernels.workspace_bytes("edge_scores_factored", sizes, dtype=torch.bfloat16, **options)
    took = beside_the_result(lambda: kernels.edge_scores_factored(senders, receivers, **options))
    # The table of a shorter last chunk is made when the partial sums of the others are gone.
    assert 0.999 * said <= took <= said
