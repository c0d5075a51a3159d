"""The steps between products: torch's operations against autograd, Triton's kernels in the interpreter against them."""

import numpy as np
import pytest
import torch
from interpreter import not_interpreted

if reason := not_interpreted("bench/bench_kernels.py checks the steps on a GPU"):
    pytest.skip(reason, allow_module_level=True)

from accuracy import STORED
from eapcore.kernels import steps
from eapcore.kernels import triton_common as common
from models import random_model, random_pairs
from refusal import refused

from eapcore import attribute

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def fenced(*shape, dtype):
    """A random tensor whose rows lie in a larger buffer of NaN: whatever is read outside of them shows."""
    buffer = torch.full([*shape[:-1], shape[-1] + 16], float("nan"), dtype=dtype)
    view = buffer[..., 8:-8]
    view.copy_(torch.randn(*shape) + 0.5)
    return view


def good(got, exact, dtype, stored=0):
    assert got.dtype == dtype and got.shape == exact.shape
    assert not got.isnan().any()
    # One rounding, after float32 throughout, or what torch's operations store between.
    assert (got.double() - exact).norm() <= (STORED[dtype] + 1e-6 + stored) * exact.norm()


def doubled(*tensors):
    return [None if t is None else t.double() for t in tensors]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("centred", [True, False])
def test_a_row_is_normalised_and_its_gradient_goes_back(dtype, centred):
    for width in (1, 33, 130):
        x, grad = fenced(2, 5, width, dtype=dtype), fenced(2, 5, width, dtype=dtype)
        gamma = None if width == 130 else torch.randn(width, dtype=dtype)
        beta = torch.randn(width, dtype=dtype) if centred and gamma is not None else None
        exact = steps.normalise(*doubled(x, gamma, beta), 1e-5, centred=centred)
        n, mean, rstd = steps.normalise(x, gamma, beta, 1e-5, centred=centred, impl="triton")
        if width > 1 or not centred:  # a centred row of one is all rounding
            good(n, exact[0], dtype)
        assert (mean is None) == (not centred) and rstd.dtype == torch.float32
        torch.testing.assert_close(rstd.double(), exact[2], rtol=1e-5, atol=1e-5)
        if width == 1:
            continue
        exact_hat = steps.standardise(*doubled(x), exact[1], exact[2])
        good(steps.standardise(x, mean, rstd, impl="triton"), exact_hat, dtype)
        for frozen in (False, True):
            there = steps.normalise_grad(*doubled(grad, x), exact[1], exact[2], *doubled(gamma, beta), frozen=frozen)
            got = steps.normalise_grad(grad, x, mean, rstd, gamma, beta, frozen=frozen, impl="triton")
            good(got, there, dtype)
            total, out = torch.randn(2, 5, width), torch.full((2, 5, width), float("nan"), dtype=dtype)
            how = (x, mean, rstd, gamma, beta, total)
            summed, narrow = steps.normalise_grad_added(grad, *how, frozen=frozen, out=out, impl="triton")
            good(out, there, dtype)
            good(narrow, total + there, dtype)
            good(summed, total + there, torch.float32)
            alone, _ = steps.normalise_grad_added(grad, *how, frozen=frozen, impl="triton")
            assert torch.equal(alone, summed)
            read = torch.tensor([[4, 1, 4], [0, 2, 2]])  # which also stands for what is read twice
            few, spread = torch.randn(2, 3, width), torch.zeros(2, 5, width).double()
            for (b, q), t in np.ndenumerate(read.numpy()):
                spread[b, t] += few[b, q].double()
            for impl in ("triton", "reference"):
                some = steps.normalise_grad_added(grad, *how[:-1], few, read=read, frozen=frozen, impl=impl)
                good(some[0], spread + there, torch.float32, stored=STORED[dtype] if impl == "reference" else 0)
                good(some[1], spread + there, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_wide_stream_is_normalised_to_a_narrow_one(dtype):
    x, gamma = fenced(3, 33, dtype=torch.float32), torch.randn(33, dtype=dtype)
    exact, _, scale = steps.normalise(*doubled(x, gamma), None, 1e-5, centred=False)
    for impl in ("reference", "triton"):
        n, _, rstd = steps.normalise(x, gamma, None, 1e-5, centred=False, dtype=dtype, impl=impl)
        good(n, exact, dtype)
        torch.testing.assert_close(rstd.double(), scale, rtol=1e-6, atol=1e-6)
        sent, difference = fenced(1, 5, 4, dtype=dtype), fenced(1, 2, 4, dtype=dtype)
        wide = fenced(1, 7, 4, dtype=torch.float32)
        moved = steps.moved_sum(*doubled(wide, sent, difference))
        good(steps.moved_sum(wide, sent.clone(), difference, impl=impl), moved, torch.float32)


@pytest.mark.parametrize("centred", [True, False])
def test_the_gradient_of_a_norm_is_autograds(centred):
    x, grad = torch.randn(2, 3, 7).double().requires_grad_(), torch.randn(2, 3, 7).double()
    gamma, beta = torch.randn(7).double(), torch.randn(7).double() if centred else None
    for frozen in (False, True):
        mu = x.mean(-1, keepdim=True) if centred else 0
        sigma = ((x - mu).square().mean(-1, keepdim=True) + 1e-5).sqrt()
        n = gamma * (x - mu) / (sigma.detach() if frozen else sigma) + (0 if beta is None else beta)
        (expected,) = torch.autograd.grad((n * grad).sum(), x)
        made, mean, rstd = steps.normalise(x.detach(), gamma, beta, 1e-5, centred=centred)
        torch.testing.assert_close(made, n.detach(), rtol=1e-12, atol=1e-12)
        got = steps.normalise_grad(grad, x.detach(), mean, rstd, gamma, beta, frozen=frozen)
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)
        total, out = torch.randn(2, 3, 7).double(), torch.empty_like(expected)
        how = (x.detach(), mean, rstd, gamma, beta, total)
        for summed in steps.normalise_grad_added(grad, *how, frozen=frozen, out=out):
            torch.testing.assert_close(summed, total + expected, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act_fn", steps.ACTIVATIONS)
def test_units_of_the_last_rows_are_differences(dtype, act_fn):
    for rows, count, width, gated in ((8, 3, 33, False), (6, 3, 400, True), (5, 1, 1, False)):
        hidden, up = fenced(1, rows, width, dtype=dtype), fenced(1, rows, width, dtype=dtype) if gated else None
        made = steps.activation(act_fn, hidden.double()) * (1 if up is None else up.double())
        exact = made.clone()
        exact[:, rows - count :] -= made[:, rows - 2 * count : rows - count]
        torch.testing.assert_close(steps.moved_units(*doubled(hidden, up), act_fn, count), exact)
        good(steps.moved_units(hidden, up, act_fn, count, impl="triton"), exact, dtype)


@pytest.mark.parametrize("act_fn", steps.ACTIVATIONS)
def test_units_that_are_no_number_stay_none(act_fn):
    hidden, up = torch.randn(1, 4, 5), torch.randn(1, 4, 5)
    hidden[0, 1, 2] = float("nan")
    for gate in (None, up):
        got = steps.moved_units(hidden, gate, act_fn, 2, impl="triton").isnan()
        assert torch.equal(got, steps.moved_units(hidden, gate, act_fn, 2).isnan()) and got.sum() == 2
    of_up = steps.gated_grad(torch.ones_like(up), hidden, up, act_fn, impl="triton")[1]
    assert torch.equal(of_up.isnan(), hidden.isnan())


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_last_rows_take_what_others_were_sent_and_a_difference(dtype):
    for rows, count, width, biased in ((8, 3, 33, True), (6, 3, 400, False), (2, 1, 1, True)):
        x, sent = fenced(1, rows, width, dtype=dtype), fenced(1, rows - count, width, dtype=dtype)
        difference = fenced(1, count, width, dtype=dtype)
        bias = torch.randn(width, dtype=dtype) if biased else None
        added = sent.double() + (0 if bias is None else bias.double())
        moved = added[:, rows - 2 * count :] + difference.double()
        exact = x.double() + torch.cat([added, moved], 1)
        good(steps.moved_sum(x, sent, difference, bias, impl="triton"), exact, dtype)
        torch.testing.assert_close(steps.moved_sum(*doubled(x, sent.clone(), difference, bias)), exact)
        for centred in (True, False):
            gamma, beta = torch.randn(width, dtype=dtype), torch.randn(width, dtype=dtype) if centred else None
            out, kept = torch.full((1, rows, width), float("nan"), dtype=dtype), torch.empty(count, width, dtype=dtype)
            how = {"centred": centred, "out": out, "kept": kept}
            args = (x, sent.clone(), difference, bias, gamma, beta, 1e-5)
            for impl in ("triton", "reference"):
                given, made = steps.moved_sum_normalised(*args, **how, impl=impl)
                assert given is out and torch.equal(kept, difference[0])
                if impl == "triton":
                    good(out, exact, dtype)
                expected = steps.normalise(*doubled(out, gamma, beta), 1e-5, centred=centred)  # of what was rounded
                assert (made[1] is None) == (not centred)
                if width > 1:
                    good(made[0], expected[0], dtype)
                torch.testing.assert_close(made[2].double(), expected[2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act_fn", steps.ACTIVATIONS)
def test_a_gated_units_gradient_goes_to_both_of_its_factors(dtype, act_fn):
    for width in (1, 33, 400):
        grad, hidden, up = (fenced(1, 3, width, dtype=dtype) for _ in range(3))
        wide = doubled(grad, hidden.clone(), up)
        leaves = [x.requires_grad_() for x in wide[1:]]
        exact = torch.autograd.grad((steps.activation(act_fn, leaves[0]) * leaves[1] * wide[0]).sum(), leaves)
        made = steps.gated_grad(*(x.detach() for x in wide), act_fn)
        for got, there, spec in zip(
            steps.gated_grad(grad, hidden, up, act_fn, impl="triton"), exact, made, strict=True
        ):
            torch.testing.assert_close(spec, there, rtol=1e-10, atol=1e-11)
            good(got, there, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("adjacent", [False, True])
def test_queries_and_keys_are_turned_and_turned_back(dtype, adjacent):
    for channels, tokens, size, half, before, read in ((3, 5, 8, 4, 0, False), (1, 2, 10, 3, 90_000, True)):
        x = fenced(2, tokens, channels, size, dtype=dtype).transpose(1, 2)
        frequencies = 10000.0 ** (-torch.arange(half).double() / half)
        where = torch.tensor([[4, 0], [7, 7]]) if read else None
        exact, at = x.double().clone(), torch.arange(tokens).expand(2, -1) if where is None else where
        for f in range(half):
            i, j = (2 * f, 2 * f + 1) if adjacent else (f, f + half)
            angle = ((before + at) * frequencies[f])[:, None]
            a, b = x[..., i].double(), x[..., j].double()
            exact[..., i], exact[..., j] = a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()
        how = {"adjacent": adjacent}
        torch.testing.assert_close(steps.turn(x.double(), frequencies, before, where, **how), exact)
        made = steps.turn(x, frequencies, before, where, **how, impl="triton")
        good(made, exact, dtype)
        steps.turn(made, frequencies, before, where, sign=-1, **how, out=made, impl="triton")
        assert (made.double() - x.double()).norm() <= (2 * STORED[dtype] + 1e-6) * x.double().norm()


def test_frequencies_go_to_a_device_once_and_are_never_given_up():
    """A recorded batch reads them where they lie."""
    x, numbers = (
        torch.empty(1, 1, 2, 4, device="meta"),
        [torch.tensor([n, 0.5], dtype=torch.float64) for n in range(99)],
    )
    for frequencies in numbers:
        steps.turn(x, frequencies, 0)
    copied = steps._kept.cache_info().misses
    for frequencies in numbers:
        steps.turn(x, frequencies.clone(), 0)
    assert steps._kept.cache_info().misses == copied


def test_results_take_the_places_of_what_they_are_made_of():
    x, sent, difference = (torch.randn(1, rows, 37) for rows in (6, 4, 2))
    norm = (None, None, 1e-5)
    expected = steps.moved_sum_normalised(x, sent, difference, None, *norm, centred=True, impl="triton")
    beside = torch.full((2, 3, 37), float("nan"))  # other senders' rows
    moved, (n, mean, rstd) = steps.moved_sum_normalised(
        x, sent, difference, None, *norm, centred=True, out=x, kept=beside[:, 1], impl="triton"
    )
    assert moved is x and torch.equal(x, expected[0]) and torch.equal(n, expected[1][0])
    assert torch.equal(beside[:, 1], difference[0]) and bool(beside[:, ::2].isnan().all())
    how, grad, total = (mean, rstd, None, None), torch.randn(1, 6, 37), torch.randn(1, 6, 37)
    expected = steps.normalise_grad_added(grad, x, *how, total, impl="triton")[0]
    for place in (0, 1):
        given = grad.clone(), x.clone()
        summed, _ = steps.normalise_grad_added(*given, *how, total, out=given[place], impl="triton")
        assert torch.equal(summed, expected)
        torch.testing.assert_close(given[place] + total, summed, rtol=1e-5, atol=1e-5)


def test_half_precision_is_rounded_once():
    x, sent, difference = (torch.tensor([[[value]]]).bfloat16() for value in (256.0, 1.0, 1.0))
    x = x.expand(1, 2, 1).contiguous()
    got = steps.moved_sum(x, sent, difference, impl="triton")
    assert got.flatten().tolist() == [
        256.0,
        258.0,
    ]  # 256 + 1 lies between two numbers of bfloat16, 256 + 1 + 1 does not


def test_scores_by_the_steps_kernels(monkeypatch):
    model = random_model(dtype=torch.float32, act_fn="silu")
    task = random_pairs(model, [5, 4])
    expected = attribute(model, task, storage="dense").scores
    seen = []
    launch = common.launch

    def watched(kernel, *args, **meta):
        seen.append(kernel.fn.__name__)
        launch(kernel, *args, **meta)

    monkeypatch.setattr(common, "launch", watched)
    for module in ("eapcore.kernels.steps", "eapcore.models.paired"):
        monkeypatch.setattr(f"{module}.takes_triton", lambda impl, x: True)
    got = attribute(model, task, storage="dense").scores
    assert {"normalise_rows", "standardise_rows", "normalise_grad_rows", "unit_rows", "sum_rows"} == set(seen)
    assert (got - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_what_a_step_cannot_do_is_said():
    x = torch.randn(2, 4)
    refused(
        "impl must be one of auto, reference, triton", steps.normalise, x, None, None, 1e-5, centred=True, impl="cpp"
    )
    refused("act_fn must be one of", steps.moved_units, x[None], None, "tanh", 1)
    refused("no float64 kernels", steps.normalise, x.double(), None, None, 1e-5, centred=True, impl="triton")
