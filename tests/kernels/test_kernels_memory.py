"""No implementation of edge_scores makes anything for edges that is larger than the result, but for bounded sums."""

import eapcore.kernels as kernels
import pytest
import torch
from eapcore.kernels import checks, cpp
from memory import Storages, clear_peak, in_forks, needs_peak, resident

# Many pairs of few numbers: every axis beside S and R would show. A tensor of all pairs and tokens has 30,000 elements.
S, R, B, T, D = 40, 50, 3, 5, 2
LEAD = {"all": 1, "pair": B, "position": T}
reduces = pytest.mark.parametrize("reduce", checks.REDUCE)


def allocations(impl, reduce, masked, rows, d_model=D):
    """What was allocated beside the arguments, and the sizes of the result and of the arguments, in bytes."""
    torch.manual_seed(0)
    delta, grads = torch.randn(S, B, T, d_model), torch.randn(R, B, T, d_model)
    mask = torch.rand(S, R) < 0.5 if masked else None
    index = torch.tensor([3, 0, 11, 7]) if rows else None
    with Storages() as allocated:
        scores = kernels.edge_scores(delta, grads, mask=mask, reduce=reduce, rows=index, impl=impl)
    assert scores.numel() == LEAD[reduce] * S * R
    arguments = [x.untyped_storage().nbytes() for x in (delta, grads, mask) if x is not None]
    return allocated.made, scores.untyped_storage().nbytes(), arguments


@reduces
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("rows", [False, True])
def test_the_reference_makes_nothing_larger_than_the_result_or_an_operand(reduce, masked, rows):
    made, result, arguments = allocations("reference", reduce, masked, rows)
    assert result in made and max(made) <= max(result, *arguments)


@pytest.mark.skipif(bool(kernels.available()["triton"]), reason=kernels.available()["triton"])
@reduces
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("tiles", [0, 1, 30])
def test_triton_makes_the_result_and_partial_sums_within_their_bound(reduce, masked, rows, tiles, monkeypatch):
    from eapcore.kernels import triton_common
    from eapcore.kernels import triton_edge_scores as scores

    if not triton_common.interpreted():
        pytest.skip("where Triton does not interpret, its tensors are on a GPU")
    tile = 4 * 64 * 64  # one holds all pairs; each group has its own
    monkeypatch.setattr(scores, "WORKSPACE_BYTES", tiles * tile)
    made, result, arguments = allocations("triton", reduce, masked, rows, d_model=70)
    assert result in made
    # The interpreter wraps what a kernel is given anew.
    partial = max((size for size in made if size not in (result, *arguments)), default=0)
    assert partial <= max(tiles * tile, 8 * B * T)  # a table of rows
    if reduce == "all":
        assert (partial >= 2 * tile) == (tiles == 30), "split where there is room for two parts, else written directly"


def taken_by_cpp(reduce, threads):
    """How far resident memory rises in a call, and the result's bytes."""
    torch.set_num_threads(threads)
    delta, grads = torch.randn(1500, 4, 8, 4), torch.randn(1500, 4, 8, 4)
    kernels.edge_scores(delta[:40], grads[:50], reduce=reduce, impl="cpp")
    clear_peak()
    before = resident("VmRSS")
    scores = kernels.edge_scores(delta, grads, reduce=reduce, impl="cpp")
    return resident("VmHWM") - before, scores.numel() * 4


@pytest.mark.skipif(bool(cpp.why_not()), reason=cpp.why_not())
@needs_peak
def test_cpp_takes_the_result_and_partial_sums_within_their_bound():
    cases = [(reduce, threads) for reduce in checks.REDUCE for threads in (1, 2)]
    for (reduce, threads), (taken, result) in in_forks(taken_by_cpp, cases).items():
        # 9 MB of pairs a result; [S, R, B, T] would be 288 MB. 16 MiB: packed operands, and whole tiles.
        sums = {"all": threads, "pair": 4, "position": 8}[reduce] * 1500 * 1500 * 8
        assert result <= taken <= result + min(sums, 256 << 20) + (16 << 20), (reduce, threads)
