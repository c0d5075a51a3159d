"""The promises of the ops, kept by every implementation: the specification, C++ on each instruction set, Triton.

The specification itself is held against loops and autograd in float64; everything else against the specification in
float64 with one bound: error ≤ 2 × the error of plain PyTorch in the same dtype (support/accuracy.py derives its
floor).
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
import sys
import threading
import time
import types
from dataclasses import replace

import eapcore.kernels as kernels
import pytest
import torch
from accuracy import STORED, assert_as_good_as_torch, closed_form_factored, error_of
from eapcore.kernels import Norm, checks, cpp, reference
from kernel_cases import assert_factored_good, assert_layer_good, assert_scores_good, doubled, factors, layer_error
from refusal import refused

CPP = [] if cpp.why_not() else cpp.isas()
CPU = ["reference", *(f"cpp {isa}" for isa in CPP)]
EVERY = [*CPU, *([] if kernels.available()["triton"] else ["triton"])]
TAKES = {
    "reference": {op: list(STORED) for op in kernels.OPS},
    "cpp": {op: [dtype for dtype in STORED if cpp.supports(op, dtype)] for op in kernels.OPS},
    "triton": {op: [torch.float32, torch.bfloat16] for op in kernels.OPS},
}


@pytest.fixture(autouse=True)
def same_numbers_every_time():
    torch.manual_seed(0)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def impl(request, monkeypatch):
    """The name for `impl=`; the parameter "cpp avx2" also forces that instruction set.

    Where Triton does not interpret, a test of it makes its tensors on the GPU.
    """
    name, _, isa = request.param.partition(" ")
    if isa:
        monkeypatch.setenv("EAPCORE_ISA", isa)
    on_gpu = name == "triton" and os.environ.get("TRITON_INTERPRET") != "1"
    with torch.device("cuda") if on_gpu else contextlib.nullcontext():
        yield name


every_impl = pytest.mark.parametrize("impl", EVERY, indirect=True)
cpu_impl = pytest.mark.parametrize("impl", CPU, indirect=True)
triton_impl = pytest.mark.parametrize("impl", [name for name in EVERY if name == "triton"], indirect=True)
cpp_impl = pytest.mark.parametrize("impl", [name for name in CPU if name.startswith("cpp")], indirect=True)
every_dtype = pytest.mark.parametrize("dtype", list(STORED), ids=lambda dtype: str(dtype)[6:])


def takes(impl, op, dtype):
    if dtype not in TAKES[impl][op]:
        pytest.skip(f"{impl} has no {op} for {dtype}")


def pair(senders, receivers, batch, tokens, d_model, dtype=torch.float32):
    shape = (batch, tokens, d_model)
    return torch.randn(senders, *shape).to(dtype), torch.randn(receivers, *shape).to(dtype)


def exact_scores(delta, grads, mask=None, reduce="all", rows=None):
    return reference.edge_scores(delta.double(), grads.double(), mask, reduce, rows)


# --- The specification against its definition -------------------------------------------------------------------------


@pytest.mark.parametrize("reduce", checks.REDUCE)
def test_reference_is_the_sum_over_positions_written_as_loops(reduce):
    delta, grads = pair(3, 4, 2, 3, 5, torch.float64)
    mask = torch.rand(3, 4) < 0.6
    rows = torch.tensor([0, 2, 5])
    lead = {"all": 1, "pair": 2, "position": 3}[reduce]
    expected = torch.zeros(lead, 3, 4, dtype=torch.float64)
    for s, r, b, t, d in itertools.product(range(3), range(4), range(2), range(3), range(5)):
        if mask[s, r] and b * 3 + t in rows:
            group = {"all": 0, "pair": b, "position": t}[reduce]
            expected[group, s, r] += delta[s, b, t, d] * grads[r, b, t, d]
    got = kernels.edge_scores(delta, grads, mask=mask, reduce=reduce, rows=rows, impl="reference")
    assert expected.abs().max() > 0
    torch.testing.assert_close(got, expected[0] if reduce == "all" else expected, rtol=1e-13, atol=1e-13)


def layer_case(channels, batch, tokens, d_head, d_model, kind="layernorm", dtype=torch.float64, turned=False):
    """Arguments of receiver_grads, made in float64 from a residual stream x and rounded once; and x and bias."""
    weight = torch.randn(channels, d_model, d_head, dtype=torch.float64) / d_model**0.5
    if turned:  # as models keep it that store [out, in]: the same values, d_model innermost
        weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
    g = torch.randn(channels, batch, tokens, d_head, dtype=torch.float64)
    x = torch.randn(batch, tokens, d_model, dtype=torch.float64)
    bias = torch.randn(channels, d_head, dtype=torch.float64)
    if kind == "none":
        act = torch.einsum("btd,cdk->cbtk", x, weight) + bias[:, None, None]
        return (g.to(dtype), act.to(dtype), weight.to(dtype), Norm("none"), None, None), x, bias, None
    gamma = torch.rand(d_model, dtype=torch.float64) + 0.5
    beta = torch.randn(d_model, dtype=torch.float64) if kind == "layernorm" else None
    centred = x - x.mean(-1, keepdim=True) if kind == "layernorm" else x
    rstd = (centred.pow(2).mean(-1) + 1e-5).rsqrt()
    x_hat = centred * rstd[..., None]
    normed = x_hat * gamma + (0 if beta is None else beta)
    act = torch.einsum("btd,cdk->cbtk", normed, weight) + bias[:, None, None]
    w_gamma, offset = kernels.receiver_constants(weight, bias, gamma, beta)
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    norm = Norm(kind, x_hat.to(dtype), rstd.to(statistics), gamma.to(dtype))
    return (g.to(dtype), act.to(dtype), weight.to(dtype), norm, w_gamma.to(dtype), offset.to(dtype)), x, bias, beta


def call_receiver_grads(case, impl):
    g, act, weight, norm, w_gamma, offset = case
    return kernels.receiver_grads(g, act, weight, norm=norm, w_gamma=w_gamma, offset=offset, impl=impl)


@pytest.mark.parametrize("kind", checks.NORMS)
def test_receiver_grads_are_those_of_literally_split_streams(kind):
    case, x, bias, beta = layer_case(4, 2, 3, 5, 12, kind)
    g, act, weight, norm, *_ = case
    copies = x.expand(4, -1, -1, -1).clone().requires_grad_()  # one residual stream for each channel
    normed = copies
    if kind != "none":
        centred = copies - copies.mean(-1, keepdim=True) if kind == "layernorm" else copies
        normed = centred * (centred.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * norm.gamma
        normed = normed if beta is None else normed + beta
    outputs = torch.einsum("cbtd,cdk->cbtk", normed, weight) + bias[:, None, None]
    torch.testing.assert_close(outputs.detach(), act, rtol=1e-12, atol=1e-12)
    (expected,) = torch.autograd.grad(outputs, copies, g)
    assert expected.abs().max() > 0
    got = call_receiver_grads(case, "reference")
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


# --- edge_scores ------------------------------------------------------------------------------------------------------

# Odd on purpose: one of everything; T = 1 and 17; not a multiple of any tile; several receivers' groups; long and short
# inner dimensions around a block's length.
SHAPES = [(1, 1, 1, 1, 1), (5, 1, 2, 17, 3), (13, 29, 3, 1, 33), (7, 90, 2, 2, 150), (6, 5, 1, 17, 131)]


@every_impl
@every_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scores_are_as_exact_as_torch(impl, dtype, shape):
    takes(impl, "edge_scores", dtype)
    delta, grads = pair(*shape, dtype)
    assert_scores_good(kernels.edge_scores(delta, grads, impl=impl), delta, grads)


@cpp_impl
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(157, 445, 1, 3, 131), (310, 290, 2, 1, 500)], ids=str)
def test_many_senders_and_receivers_are_as_exact_as_torch(impl, dtype, shape):
    takes(impl, "edge_scores", dtype)
    delta, grads = pair(*shape, dtype)
    mask = torch.ones(shape[:2], dtype=torch.bool).tril(-30)  # tiles without an edge; senders and receivers without one
    mask |= torch.rand(shape[:2]) < 0.001
    mask[5:40] = False
    for edges in (None, mask):
        assert_scores_good(kernels.edge_scores(delta, grads, mask=edges, impl=impl), delta, grads, edges)
    rows = torch.randperm(shape[2] * shape[3])[:2]
    for reduce in checks.REDUCE:
        got = kernels.edge_scores(delta, grads, reduce=reduce, rows=rows, impl=impl)
        assert_scores_good(got, delta, grads, reduce=reduce, rows=rows)


@every_impl
@pytest.mark.parametrize("reduce", checks.REDUCE)
@pytest.mark.parametrize("some", ["all rows", "some rows"])
@every_dtype
def test_every_reduce_keeps_to_mask_and_rows(impl, dtype, reduce, some):
    takes(impl, "edge_scores", dtype)
    delta, grads = pair(9, 21, *((2, 3, 16) if impl == "triton" else (3, 17, 23)), dtype)
    mask = torch.rand(9, 21) < 0.4
    mask[4:8] = False  # a whole tile of senders, and one receiver, without an edge
    mask[:, 20] = False
    rows = torch.randperm(delta[0, ..., 0].numel())[:20] if some == "some rows" else None
    got = kernels.edge_scores(delta, grads, mask=mask, reduce=reduce, rows=rows, impl=impl)
    assert got.device == delta.device
    assert_scores_good(got, delta, grads, mask, reduce, rows)


@every_impl
@pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy's, under Triton's interpreter
def test_non_edges_are_exactly_zero_even_where_inputs_are_not_finite(impl):
    delta, grads = pair(6, 8, 1, 3, 16)
    mask = torch.ones(6, 8, dtype=torch.bool)
    delta[2], grads[1] = float("nan"), float("inf")
    mask[2], mask[:, 1] = False, False
    got = kernels.edge_scores(delta, grads, mask=mask, impl=impl)
    assert (got[~mask] == 0).all()
    senders, receivers = ([i for i in range(n) if i != out] for n, out in ((6, 2), (8, 1)))
    assert_scores_good(got[senders][:, receivers], delta[senders], grads[receivers])


@every_impl
def test_rows_that_are_left_out_are_not_read_even_where_they_are_not_finite(impl):
    delta, grads = pair(6, 8, 2, 3, 16)
    rows = torch.tensor([0, 1, 3, 4])
    expected = kernels.edge_scores(delta, grads, rows=rows, impl=impl)
    delta[:, :, 2] = float("nan")
    grads[:, :, 2] = float("inf")
    assert torch.equal(kernels.edge_scores(delta, grads, rows=rows, impl=impl), expected)


@pytest.mark.parametrize("impl", CPU, indirect=True)  # of Triton: tests/kernels/test_triton.py
def test_some_senders_have_the_bits_that_they_have_among_all(impl):
    for dtype in TAKES[impl.split()[0]]["edge_scores"]:
        delta, grads = torch.randn(70, 3, 4, 40).to(dtype), torch.randn(5, 3, 4, 40).to(dtype)
        for reduce, receivers in (("all", 5), ("pair", 1)):
            how = {"reduce": reduce, "impl": impl}
            expected = kernels.edge_scores(delta, grads[:receivers], **how)
            for first, stop in ((0, 2), (2, 70)):
                part = {"part": (first, 70), **how}
                found = kernels.edge_scores(delta[first:stop], grads[:receivers], **part)
                assert torch.equal(found, expected[..., first:stop, :])
        mask = torch.rand(70, 5) < 0.3
        expected = kernels.edge_scores(delta, grads, mask=mask, impl=impl)
        found = kernels.edge_scores(delta[3:9], grads, mask=mask[3:9], part=(3, 70), impl=impl)
        assert torch.equal(found, expected[3:9])
    refused(r"part must be \(first, n\)", kernels.edge_scores, delta, grads, part=(1, 70), impl=impl)


@every_impl
@pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy's, under Triton's interpreter
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_what_is_not_finite_shows_on_its_edges_and_on_no_others(impl, value):
    delta, grads = pair(9, 40, 1, 3, 16)
    expected = kernels.edge_scores(delta, grads, impl=impl)
    delta[2, 0, 1, 5] = float(value)
    got = kernels.edge_scores(delta, grads, impl=impl)
    assert not got[2].isfinite().any()
    others = [i for i in range(9) if i != 2]
    torch.testing.assert_close(got[others], expected[others])


@every_impl
def test_scores_are_linear_in_delta(impl):
    delta, grads = pair(5, 7, 2, 3, 16)
    other = torch.randn_like(delta)
    parts = [kernels.edge_scores(d, grads, impl=impl).double() for d in (delta, other, 2 * delta - 0.5 * other)]
    assert parts[2].abs().min() > 0
    torch.testing.assert_close(parts[2], 2 * parts[0] - 0.5 * parts[1], rtol=0, atol=1e-4)


@every_impl
def test_a_sender_without_a_difference_scores_zero(impl):
    delta, grads = pair(5, 7, 2, 3, 16)
    delta[3] = 0
    got = kernels.edge_scores(delta, grads, impl=impl)
    assert (got[3] == 0).all()
    assert (got[[0, 1, 2, 4]] != 0).all()


@every_impl
def test_permuted_senders_are_permuted_rows(impl):
    delta, grads = pair(9, 7, 2, 3, 16)
    order = torch.randperm(9)
    assert not torch.equal(order, torch.arange(9))
    got = kernels.edge_scores(delta[order], grads, impl=impl)
    torch.testing.assert_close(got, kernels.edge_scores(delta, grads, impl=impl)[order], rtol=1e-5, atol=1e-5)


@every_impl
def test_split_batches_add_up(impl):
    delta, grads = pair(5, 7, 5, 3, 16)
    parts = [kernels.edge_scores(delta[:, b], grads[:, b], impl=impl) for b in (slice(0, 2), slice(2, 5))]
    torch.testing.assert_close(parts[0] + parts[1], kernels.edge_scores(delta, grads, impl=impl), rtol=1e-5, atol=1e-5)


@every_impl
@every_dtype
def test_the_same_inputs_give_the_same_bits_twice(impl, dtype):
    takes(impl, "edge_scores", dtype)
    delta, grads = pair(*((5, 7, 2, 3, 16) if impl == "triton" else (50, 70, 2, 17, 333)), dtype)
    mask = torch.rand(len(delta), len(grads)) < 0.5
    for reduce, edges in itertools.product(checks.REDUCE, (None, mask)):
        first = kernels.edge_scores(delta, grads, mask=edges, reduce=reduce, impl=impl)
        assert first[..., mask].abs().min() > 0
        assert torch.equal(
            first, kernels.edge_scores(delta.clone(), grads.clone(), mask=edges, reduce=reduce, impl=impl)
        )


@cpp_impl
@pytest.mark.parametrize("threads", range(1, 9))
def test_any_number_of_threads_is_right_and_repeats_its_bits(impl, threads):
    torch.set_num_threads(threads)
    delta, grads = pair(70, 60, 2, 9, 333)
    for reduce in checks.REDUCE:
        got = kernels.edge_scores(delta, grads, reduce=reduce, impl=impl)
        assert_scores_good(got, delta, grads, reduce=reduce)
        assert torch.equal(got, kernels.edge_scores(delta, grads, reduce=reduce, impl=impl))


@cpp_impl
def test_python_threads_can_call_at_once(impl):
    delta, grads = pair(40, 30, 2, 9, 333)
    expected = kernels.edge_scores(delta, grads, impl=impl)
    got = [None] * 4

    def call(i):
        got[i] = kernels.edge_scores(delta, grads, impl=impl)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(each, expected) for each in got)


@cpp_impl
def test_another_python_thread_runs_meanwhile(impl):
    delta, grads = pair(40 if cpp.isa() == "portable" else 400, 400, 2, 40, 768)
    torch.set_num_threads(1)
    kernels.edge_scores(delta, grads, impl=impl)
    ticks, over, inside = [], threading.Event(), []

    def tick():
        while not over.wait(0.002):
            ticks.append(time.perf_counter())

    ticker = threading.Thread(target=tick)
    ticker.start()
    try:
        while len(inside) < 20 and max(inside, default=0) < 3:  # on a busy machine it may come to nothing at first
            begin = time.perf_counter()
            kernels.edge_scores(delta, grads, impl=impl)
            end = time.perf_counter()
            assert end - begin > 0.03
            # The interpreter would change threads behind the call, not inside it: only then were there none.
            inside.append(sum(begin + 0.005 < at < end - 0.005 for at in ticks))
    finally:
        over.set()
        ticker.join()
    assert max(inside) >= 3


STRIDED = {
    "sliced batch and positions": lambda x: x[:, 1:, 2:],
    "reversed dimensions": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "d_model not innermost": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "every other column": lambda x: x[..., ::2],
    "one batch for all": lambda x: x[:, :1].expand(-1, 3, -1, -1),
    "misaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "lazily negated": lambda x: torch._neg_view(x),
    "lazily conjugated": lambda x: torch._neg_view(torch.complex(x, x).conj().imag) if x.dtype == torch.float32 else x,
    "with a graph": lambda x: x.clone().requires_grad_(),
}


@cpu_impl
@pytest.mark.parametrize("how", STRIDED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
def test_any_strides_give_the_values_that_the_tensor_shows(impl, dtype, how):
    delta, grads = (STRIDED[how](x) for x in pair(9, 21, 4, 6, 70, dtype))
    got = kernels.edge_scores(delta, grads, impl=impl).detach()
    assert_scores_good(got, delta.detach(), grads.detach())
    got = kernels.edge_scores(delta, torch.randn(21, *delta.shape[1:]).to(dtype), impl=impl)  # only one side strided
    assert got.isfinite().all()


@every_impl
@pytest.mark.parametrize("reduce", checks.REDUCE)
@pytest.mark.parametrize("empty", range(5), ids=["S", "R", "B", "T", "D"])
def test_size_zero_gives_zeros_of_the_right_shape(impl, reduce, empty):
    sizes = [3, 4, 2, 5, 6]
    sizes[empty] = 0
    senders, receivers, batch, tokens, d_model = sizes
    lead = {"all": [], "pair": [batch], "position": [tokens]}[reduce]
    got = kernels.edge_scores(*pair(senders, receivers, batch, tokens, d_model), reduce=reduce, impl=impl)
    assert list(got.shape) == [*lead, senders, receivers]
    assert (got == 0).all()


@every_impl
def test_no_rows_is_not_all_rows(impl):
    delta, grads = pair(3, 4, 2, 5, 6)
    assert (kernels.edge_scores(delta, grads, rows=torch.tensor([], dtype=torch.int64), impl=impl) == 0).all()
    assert (kernels.edge_scores(delta, grads, impl=impl) != 0).all()


@cpp_impl
def test_bfloat16_scores_are_within_1e_5_of_float64(impl):
    delta, grads = pair(20, 37, 4, 20, 768, torch.bfloat16)
    got, exact = kernels.edge_scores(delta, grads, impl=impl), exact_scores(delta, grads)
    assert (got.double() - exact).norm() <= 1e-5 * exact.norm()
    in_torch = delta.flatten(1) @ grads.flatten(1).T
    assert (in_torch.double() - exact).norm() > 1e-4 * exact.norm(), "torch rounds its result to bfloat16"


@cpp_impl
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("powers", [(-130, 100), (-70, -60)], ids=["read", "made"])
def test_only_bfloat16_dot_products_take_subnormals_for_zero(impl, dtype, powers):
    delta, grads = (torch.full((3, 1, 2, 40), 2.0**power).to(dtype) for power in powers)
    assert (delta != 0).all()
    got = kernels.edge_scores(delta, grads, impl=impl)
    flushed = dtype == torch.bfloat16 and cpp.isa() == "avx512bf16"
    assert (got == (0 if flushed else 80 * 2.0 ** sum(powers))).all()


@cpp_impl
def test_the_error_does_not_grow_with_the_inner_dimension(impl):
    delta, grads = (x.abs() for x in pair(2, 8, 20, 50, 768))  # all of one sign: rounding errors cannot hide
    error = (kernels.edge_scores(delta, grads, impl=impl).double() / exact_scores(delta, grads) - 1).abs().max()
    assert error < 1e-6


# --- receiver_grads ---------------------------------------------------------------------------------------------------

CHANNELS = [(3, 2, 5, 8, 32), (1, 1, 1, 1, 3), (4, 2, 17, 7, 33), (2, 1, 13, 64, 96), (1, 2, 120, 16, 70)]


def assert_receiver_grads_good(impl, *how):
    """Of the arguments that `layer_case` makes of `how`: shape, kind, dtype, turned."""
    *shape, kind, dtype, turned = how
    case, *_ = layer_case(*how)
    g, _, weight, norm, *_ = case
    # The closed form reads a rounded `act` where the definition reads rounded x̂ and W: both are compared with the
    # unrounded case, so that each carries its own roundings of the inputs.
    torch.manual_seed(0)
    whole, *_ = layer_case(*shape, kind, torch.float64, turned)
    exact = call_receiver_grads(whole, "reference")
    in_torch = reference.receiver_grads(g, weight, norm)
    got = call_receiver_grads(case, impl)
    assert got.dtype == dtype
    assert_as_good_as_torch(got, exact, error_of(in_torch, exact), layer_error(whole, exact, dtype))
    if impl != "reference":
        assert_layer_good(got, case)


@cpu_impl
@pytest.mark.parametrize("kind", checks.NORMS)
@pytest.mark.parametrize("shape", CHANNELS, ids=str)
@pytest.mark.parametrize("turned", [False, True], ids=["[C, D, K]", "[C, K, D] turned"])
@every_dtype
def test_receiver_grads_are_as_exact_as_torch(impl, dtype, turned, shape, kind):
    takes(impl, "receiver_grads", dtype)
    assert_receiver_grads_good(impl, *shape, kind, dtype, turned)


@triton_impl
@pytest.mark.parametrize("kind", checks.NORMS)
def test_triton_receiver_grads_are_as_exact_as_torch(impl, kind):
    assert_receiver_grads_good(impl, 2, 1, 5, 8, 33, kind, torch.float32, False)


@cpp_impl
def test_receiver_grads_repeat_their_bits_and_do_not_depend_on_threads(impl):
    case, *_ = layer_case(3, 4, 60, 16, 70, dtype=torch.float32)
    torch.set_num_threads(1)
    first = call_receiver_grads(case, impl)
    assert first.abs().max() > 0
    for threads in range(1, 9):
        torch.set_num_threads(threads)
        torch.testing.assert_close(call_receiver_grads(case, impl), first, rtol=0, atol=1e-5)
        assert torch.equal(call_receiver_grads(case, impl), call_receiver_grads(case, impl))


@cpp_impl
@pytest.mark.parametrize("how", ["d_head not innermost", "sliced batch", "columns of a wider weight"])
def test_receiver_grads_take_any_strides(impl, how):
    case, *_ = layer_case(3, 2, 5, 8, 40, dtype=torch.float32)
    g, act, weight, norm, w_gamma, offset = case
    expected = call_receiver_grads(case, impl)
    if how == "d_head not innermost":
        g, act = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in (g, act))
    elif how == "sliced batch":
        wide = torch.stack([norm.x_hat, torch.full_like(norm.x_hat, float("nan"))], 1)  # [B, 2, T, D]
        norm = replace(norm, x_hat=wide[:, 0], rstd=torch.stack([norm.rstd] * 2, -1)[..., 0])
        g = torch.stack([g, torch.full_like(g, float("nan"))], 2)[:, :, 0]
    else:  # as GPT-2 stores q, k and v: [D, 3·H·K], the heads' columns side by side
        weight = weight.permute(1, 0, 2).reshape(40, 24).unflatten(1, (3, 8)).permute(1, 0, 2)
    got = call_receiver_grads((g, act, weight, norm, w_gamma, offset), impl)
    assert torch.equal(got, expected)
    assert expected.abs().max() > 0


# --- edge_scores_factored ---------------------------------------------------------------------------------------------


def model_case(
    layers, heads, kv_heads, batch, tokens, d_head, d_model, mlps=True, kind="layernorm", dtype=torch.float32
):
    """Factors of a whole model, grouped-query attention if kv_heads < heads, and a mask of half of all pairs."""
    groups = [heads, kv_heads, kv_heads]
    cases = [layer_case(sum(groups), batch, tokens, d_head, d_model, kind, dtype)[0] for _ in range(layers)]
    *made, size = factors(cases, heads, groups, lambda *shape: torch.randn(*shape).to(dtype), mlps)
    return *made, torch.rand(size) < 0.5


MODELS = {
    "two layers": (2, 3, 3, 2, 5, 8, 32),
    "one of everything": (1, 1, 1, 1, 1, 1, 3),
    "odd, grouped queries": (2, 4, 2, 2, 17, 7, 33),
    "attention only": (3, 2, 2, 2, 3, 8, 40, False),
}


# Sizes of 0: no heads, no MLPs, no layers, no pairs, no positions, no columns; (layers, heads, .., MLPs).
EMPTY = {
    "MLPs alone": (2, 0, 0, 2, 3, 4, 16, True),
    "MLPs alone, one layer": (1, 0, 0, 2, 3, 4, 16, True),
    "nothing in the layers": (2, 0, 0, 2, 3, 4, 16, False),
    "no pairs": (2, 2, 2, 0, 3, 4, 16, True),
    "no positions": (2, 2, 2, 2, 0, 4, 16, True),
    "no columns of heads": (2, 2, 2, 2, 3, 0, 16, True),
}


@every_impl
@pytest.mark.parametrize("reduce", checks.REDUCE)
@pytest.mark.parametrize("shape", EMPTY.values(), ids=EMPTY)
def test_factored_takes_sizes_of_zero(impl, shape, reduce):
    senders, receivers, mask = model_case(*shape)
    mask |= True
    exact = reference.edge_scores_factored(doubled(senders), doubled(receivers), mask, reduce)
    for chunk in (None, 4):  # of six tokens: the last chunk is shorter
        got = kernels.edge_scores_factored(senders, receivers, mask=mask, reduce=reduce, chunk=chunk, impl=impl)
        assert got.shape == exact.shape
        torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-4)


@every_impl
def test_receiver_grads_of_rmsnorm_need_no_w_gamma(impl):
    g, act, weight, norm, w_gamma, offset = layer_case(3, 2, 5, 8, 24, "rmsnorm", torch.float32)[0]
    expected = call_receiver_grads((g, act, weight, norm, w_gamma, offset), impl)
    assert torch.equal(call_receiver_grads((g, act, weight, norm, None, offset), impl), expected)
    assert expected.abs().max() > 0


def test_the_reference_takes_layers_without_channels():
    senders, receivers, _ = model_case(2, 0, 0, 2, 3, 4, 16, True)
    receivers = replace(receivers, weight=[[] for _ in receivers.weight])
    expected = torch.einsum(
        "sbtd,rbtd->sr", reference.sender_deltas(senders), torch.cat([receivers.mlp, receivers.logits[None]])
    )
    found = reference.edge_scores_factored(senders, receivers, None, "all")
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=1e-4, atol=1e-4)


@cpu_impl
@pytest.mark.parametrize("reduce", checks.REDUCE)
@pytest.mark.parametrize("shape", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
def test_factored_scores_are_those_of_the_made_tensors(impl, dtype, shape, reduce):
    senders, receivers, mask = model_case(*MODELS[shape], dtype=dtype)
    mask[0, -1] = True
    for chunk in (None, 1, 5):
        got = kernels.edge_scores_factored(senders, receivers, mask=mask, reduce=reduce, chunk=chunk, impl=impl)
        assert_factored_good(impl, got, senders, receivers, mask, reduce)


@cpp_impl
@pytest.mark.parametrize("kind", checks.NORMS)
def test_factored_bfloat16_scores_are_within_1e_5_of_the_closed_form_in_float64(impl, kind):
    senders, receivers, mask = model_case(2, 4, 4, 2, 20, 16, 96, kind=kind, dtype=torch.bfloat16)
    got = kernels.edge_scores_factored(senders, receivers, mask=mask, impl=impl).double()
    exact, _ = closed_form_factored(senders, receivers, mask, "all", torch.float32)
    assert (got - exact).norm() <= 1e-5 * exact.norm()
    in_torch = reference.edge_scores_factored(senders, receivers, mask, "all").double()
    assert (in_torch - exact).norm() > 1e-4 * exact.norm(), "torch rounds what it makes to bfloat16"


@pytest.mark.parametrize("kind", checks.NORMS)
def test_the_closed_form_is_the_definition(kind):
    senders, receivers, mask = model_case(2, 3, 3, 2, 5, 8, 32, kind=kind, dtype=torch.float64)
    exact, _ = closed_form_factored(senders, receivers, mask, "pair", torch.float64)
    definition = reference.edge_scores_factored(senders, receivers, mask, "pair")
    assert definition.abs().max() > 1
    torch.testing.assert_close(exact, definition, rtol=1e-11, atol=1e-11)


@cpu_impl
@pytest.mark.parametrize("kind", checks.NORMS)
def test_factored_scores_pass_through_every_norm(impl, kind):
    senders, receivers, mask = model_case(2, 3, 3, 2, 5, 8, 40, kind=kind)
    got = kernels.edge_scores_factored(senders, receivers, mask=mask, impl=impl)
    assert_factored_good(impl, got, senders, receivers, mask, "all")


@cpp_impl
def test_factored_scores_repeat_their_bits_with_any_number_of_threads(impl):
    senders, receivers, mask = model_case(2, 4, 4, 4, 17, 8, 70)
    for threads in (1, 2, 5, 8):
        torch.set_num_threads(threads)
        got = kernels.edge_scores_factored(senders, receivers, mask=mask, chunk=9, impl=impl)
        assert_factored_good(impl, got, senders, receivers, mask, "all")
        again = kernels.edge_scores_factored(senders, receivers, mask=mask, chunk=9, impl=impl)
        assert torch.equal(got, again)


@triton_impl
def test_triton_factored_scores_are_those_of_the_made_tensors(impl):
    senders, receivers, mask = model_case(1, 2, 2, 1, 3, 8, 16)
    got = kernels.edge_scores_factored(senders, receivers, mask=mask, impl=impl)
    assert_factored_good(impl, got, senders, receivers, mask, "all")


# --- Which implementation runs, and what bad input says ---------------------------------------------------------------


@cpp_impl
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
def test_the_named_instruction_set_is_what_ran(impl, dtype, monkeypatch):
    isa, name = cpp.isa(), str(dtype)[6:]
    senders, receivers, mask = model_case(1, 2, 2, 1, 3, 8, 16, dtype=dtype)
    with cpp.record() as ran:
        kernels.edge_scores(*pair(3, 4, 1, 2, 8, dtype), impl=impl)
        call_receiver_grads(layer_case(2, 1, 3, 4, 8, dtype=dtype)[0], impl)
        kernels.edge_scores_factored(senders, receivers, mask=mask, impl=impl)
    assert ran == [f"{op} {isa} {name}" for op in kernels.OPS]
    monkeypatch.setenv("EAPCORE_ISA", "abacus")
    with pytest.raises(RuntimeError, match=r"EAPCORE_ISA must be one of .*portable on this machine, got 'abacus'"):
        kernels.edge_scores(*pair(3, 4, 1, 2, 8), impl=impl)


@pytest.mark.skipif(not CPP, reason=cpp.why_not())
def test_auto_takes_cpp_on_the_cpu_where_it_can():
    assert kernels.choose("edge_scores", device="cpu", dtype=torch.float64) == "cpp"
    assert kernels.choose("receiver_grads", device="cpu", dtype=torch.float64) == "reference"
    assert kernels.choose("edge_scores_factored", device="cpu", dtype=torch.bfloat16) == "cpp"
    with cpp.record() as ran:
        kernels.edge_scores(*pair(3, 4, 1, 2, 8))
        kernels.edge_scores(*pair(3, 4, 1, 2, 8), impl="reference")
    assert ran == [f"edge_scores {cpp.isa()} float32"]


def test_without_the_extension_cpp_raises_and_auto_takes_the_reference(monkeypatch):
    monkeypatch.setattr(cpp, "_csrc", None)
    monkeypatch.setattr(cpp, "_why_not", "it was not built")
    delta, grads = pair(3, 4, 1, 2, 8)
    with pytest.raises(RuntimeError, match="impl='cpp' cannot run here: it was not built"):
        kernels.edge_scores(delta, grads, impl="cpp")
    assert kernels.choose("edge_scores", device="cpu", dtype=torch.float32) == "reference"
    assert_scores_good(kernels.edge_scores(delta, grads), delta, grads)


def test_bad_input_says_what_was_expected_and_what_came():
    delta, grads = pair(3, 4, 2, 5, 6)
    with pytest.raises(ValueError, match=r"delta must be \[S, B, T, D\] .* got \[3, 2, 5, 6\] and \[4, 2, 5, 5\]"):
        kernels.edge_scores(delta, grads[..., :5])
    refused(r"share one dtype .* got torch.float32 and torch.bfloat16", kernels.edge_scores, delta, grads.bfloat16())
    refused("reduce must be one of all, pair, position, got 'sum'", kernels.edge_scores, delta, grads, reduce="sum")
    with pytest.raises(ValueError, match=r"mask must be bool \[S, R\] = \[3, 4\]"):
        kernels.edge_scores(delta, grads, mask=torch.ones(4, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="impl must be one of auto, reference, triton, cpp, got 'cuda'"):
        kernels.edge_scores(delta, grads, impl="cuda")
    refused("rows must be int64", kernels.edge_scores, delta, grads, rows=torch.tensor([0.5]))


def test_tensors_of_another_device_are_named():
    delta, grads = pair(3, 4, 2, 5, 6)
    with pytest.raises(ValueError, match=r"^mask must be on cpu as delta is, got meta"):
        kernels.edge_scores(delta, grads, mask=torch.ones(3, 4, dtype=torch.bool, device="meta"))
    case, *_ = layer_case(2, 1, 3, 4, 8, dtype=torch.float32)
    norm = case[3]
    for index, name in {1: "act", 2: "weight", 4: "w_gamma", 5: "offset"}.items():
        with pytest.raises(ValueError, match=rf"^{name} must be on cpu as g is, got meta"):
            call_receiver_grads([x.to("meta") if i == index else x for i, x in enumerate(case)], "auto")
    senders, receivers, mask = model_case(1, 2, 2, 1, 3, 8, 16)
    for name in ("x_hat", "rstd", "gamma"):
        away = replace(norm, **{name: getattr(norm, name).to("meta")})
        with pytest.raises(ValueError, match=rf"^norm\.{name} must be on cpu as g is, got meta"):
            call_receiver_grads([*case[:3], away, *case[4:]], "auto")
        away = replace(receivers.norms[0], **{name: getattr(receivers.norms[0], name).to("meta")})
        with pytest.raises(ValueError, match=rf"^norms\[0\].{name} must be on cpu as senders\.dz is, got meta"):
            kernels.edge_scores_factored(senders, replace(receivers, norms=[away]))
    with pytest.raises(ValueError, match=r"^mask must be on cpu as senders\.dz is, got meta"):
        kernels.edge_scores_factored(senders, receivers, mask=mask.to("meta"))


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_a_mask_of_another_size_or_dtype_is_refused_by_every_implementation(impl):
    senders, receivers, mask = model_case(1, 2, 2, 1, 3, 8, 16)
    for bad in (mask[:1], mask.float()):
        with pytest.raises(ValueError, match=r"mask must be bool \[S, R\] = \[4, 8\], got"):
            kernels.edge_scores_factored(senders, receivers, mask=bad, impl=impl)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_rows_out_of_range_or_twice_are_refused_by_every_implementation(impl):
    delta, grads = pair(3, 4, 2, 5, 6)
    for rows in ([0, 10], [-1, 3]):
        refused(r"rows must lie in 0\.\.9", kernels.edge_scores, delta, grads, rows=torch.tensor(rows), impl=impl)
    with pytest.raises(ValueError, match="rows must be distinct, got 1 of 3 twice"):
        kernels.edge_scores(delta, grads, rows=torch.tensor([2, 5, 2]), impl=impl)


@cpp_impl
def test_bad_input_to_cpp_says_what_to_do(impl):
    delta, grads = pair(3, 4, 2, 5, 6)
    with pytest.raises(ValueError, match=r"impl='cpp' needs strided CPU tensors, got delta as .* on meta"):
        kernels.edge_scores(delta.to("meta"), grads.to("meta"), impl=impl)
    with pytest.raises(ValueError, match=r"impl='cpp' of receiver_grads takes float32, bfloat16, got torch.float64"):
        call_receiver_grads(layer_case(2, 1, 3, 4, 8)[0], impl)
    senders, receivers, mask = model_case(1, 2, 2, 1, 3, 8, 16)
    with pytest.raises(ValueError, match="chunk must be at least 1 token row, got 0"):
        kernels.edge_scores_factored(senders, receivers, chunk=0, impl=impl)
    refused(r"mask must be bool \[S, R\]", kernels.edge_scores_factored, senders, receivers, mask=mask[:-1], impl=impl)


def test_an_extension_built_from_other_sources_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "eapcore._csrc", types.ModuleType("eapcore._csrc"))
    spec = importlib.util.find_spec("eapcore.kernels.cpp")
    stale = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stale)
    assert "built from other sources" in stale.why_not()
    refused("install eapcore again", stale.isas, error=RuntimeError)


@every_impl
def test_receiver_grads_writes_where_it_is_told_to(impl):
    g, act = torch.randn(2, 3, 2, 5, 16)
    weight = torch.randn(3, 32, 16)
    norm = Norm("layernorm", torch.randn(2, 5, 32), torch.rand(2, 5) + 1)
    constants = dict(zip(("w_gamma", "offset"), kernels.receiver_constants(weight, None, None, None), strict=True))
    memory = torch.full((7, 2, 5, 32), torch.nan)
    made = kernels.receiver_grads(g, act, weight, norm=norm, **constants, out=memory[2:5], impl=impl)
    assert made.data_ptr() == memory[2:5].data_ptr()
    expected = kernels.receiver_grads(g, act, weight, norm=norm, **constants, impl=impl)
    assert torch.equal(memory[2:5], expected) and expected.abs().max() > 0.1
    assert bool(memory[:2].isnan().all()) and bool(memory[5:].isnan().all())
    with pytest.raises(ValueError, match=r"out must be \[C, B, T, D\] = \[3, 2, 5, 32\]"):
        kernels.receiver_grads(g, act, weight, norm=norm, **constants, out=memory[:2], impl=impl)
    beside = torch.full((2, 5, 7, 32), torch.nan)  # the channels of a token beside one another
    out = beside.permute(2, 0, 1, 3)[2:5]
    assert kernels.receiver_grads(g, act, weight, norm=norm, **constants, out=out, impl=impl) is out
    assert torch.equal(beside[:, :, 2:5].permute(2, 0, 1, 3), expected)
    assert bool(beside[:, :, :2].isnan().all()) and bool(beside[:, :, 5:].isnan().all())
    for strided in (
        torch.empty(3, 5, 2, 32).transpose(1, 2), torch.empty(3, 2, 32, 5).transpose(2, 3),
        torch.empty(1, 2, 5, 32).expand(3, -1, -1, -1), torch.empty(3, 1, 1, 32).expand(-1, 2, 5, -1),
        torch.empty(340).as_strided((3, 2, 5, 32), (10, 160, 32, 1)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"out must have d innermost.*got strides"):
            kernels.receiver_grads(g, act, weight, norm=norm, **constants, out=strided, impl=impl)
    # What is read may end where `out` begins, and begin where it ends, but not lie in it.
    memory = torch.zeros(480 + 960 + 480)
    before, out, behind = memory[:480].view(3, 2, 5, 16), memory[480:1440].view(3, 2, 5, 32), memory[1440:]
    before.copy_(act)
    found = kernels.receiver_grads(g, before, weight, norm=norm, **constants, out=out, impl=impl)
    behind.view(3, 2, 5, 16).copy_(g)
    again = kernels.receiver_grads(behind.view(g.shape), act, weight, norm=norm, **constants, out=out, impl=impl)
    assert torch.equal(found, expected) and torch.equal(again, expected)
    for first in (1, 480, 1439):
        inside = memory[first : first + 480].view(g.shape)
        for given, name in (((inside, act), "g"), ((g, inside), "act")):
            with pytest.raises(ValueError, match=f"overlaps {name}, which is read meanwhile"):
                kernels.receiver_grads(*given, weight, norm=norm, **constants, out=out, impl=impl)
