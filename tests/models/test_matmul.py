"""Who multiplies, and that it is the same product."""

from contextlib import contextmanager

import pytest
import torch
from models import random_model, random_pairs

import eapcore.models.matmul as products
from eapcore.attribution.attribute import attribute

ROWS, K, N = 96, 512, 768  # more than LARGE multiplications


def test_large_is_large():
    assert ROWS * K * N >= products.LARGE


@contextmanager
def without_onednn():
    torch.backends.mkldnn.set_flags(False)
    try:
        yield
    finally:
        torch.backends.mkldnn.set_flags(True)


def operands(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = (4, ROWS // 4, K), (K, N), (N,)
    x, w, bias = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return x.to(dtype), w.to(dtype), bias.to(dtype)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_product_is_torchs(dtype, with_bias, turned):
    x, w, bias = operands(dtype)
    if turned:
        w = w.T.contiguous().T
    found = products.product(x, w, bias if with_bias else None)
    exact = x.double() @ w.double() + (bias.double() if with_bias else 0)
    torchs = x @ w + (bias if with_bias else 0)
    assert found.shape == (4, ROWS // 4, N) and found.dtype == dtype
    assert (found - exact).abs().max() <= 3 * (torchs - exact).abs().max() + 1e-12


def test_one_row_and_no_row():
    x, w, bias = operands()
    for part in (x[:1, :1], x[:0], x[:, :0]):
        assert torch.allclose(products.product(part, w, bias), part @ w + bias, atol=1e-4)


needs_onednn = pytest.mark.skipif(
    products.large_by() != "oneDNN", reason="large products are torch's on this processor"
)


@needs_onednn
def test_large_whole_float32_products_go_to_onednn(monkeypatch):
    calls = []
    real = products._onednn
    monkeypatch.setattr(products, "_onednn", lambda *args: calls.append(args) or real(*args))
    x, w, bias = operands()
    for weight in (w, w.T.contiguous().T):
        products.product(x, weight, bias)
    assert len(calls) == 2
    not_whole = torch.cat([w, w], 1)[:, :N]
    others = [(x.double(), w.double()), (x[..., : K // 2], w[: K // 2]), (x, not_whole), (x[:, :1], w)]
    others.append((x.clone().requires_grad_(), w))
    for rows, weight in others:
        assert products.chosen(rows, weight) == "torch"
        products.product(rows, weight)
    with without_onednn():
        assert products.large_by() == products.chosen(x, w) == "torch"
        products.product(x, w)
    assert len(calls) == 2


@needs_onednn
def test_gradients_pass_through_a_large_product():
    x, w, bias = operands()
    w.requires_grad_()
    (grad,) = torch.autograd.grad(products.product(x, w, bias).sum(), w)
    assert torch.allclose(grad, x.flatten(0, 1).sum(0)[:, None].expand(K, N), atol=1e-3)


@needs_onednn
@pytest.mark.parametrize("storage", ["dense", "factored"])
def test_scores_are_float64s_with_either_product(storage, monkeypatch):
    used = []
    real = products._onednn
    monkeypatch.setattr(products, "_onednn", lambda *args: used.append(1) or real(*args))
    shape = {"n_heads": 4, "d_model": 256, "d_head": 64, "d_mlp": 1024, "scale": 0.05}
    model, wide = (random_model(**shape, dtype=dtype) for dtype in (torch.float32, torch.float64))
    pairs = random_pairs(model, [16] * 8)
    exact = attribute(wide, pairs, storage=storage).scores
    found = attribute(model, pairs, storage=storage).scores
    assert len(used) > 4
    with without_onednn():
        count = len(used)
        torchs = attribute(model, pairs, storage=storage).scores
    assert len(used) == count
    errors = [float((scores.double() - exact).abs().max() / exact.abs().max()) for scores in (found, torchs)]
    assert errors[0] <= 4 * errors[1] and errors[0] < 1e-5
