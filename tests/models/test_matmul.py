"""Who multiplies, and that it is the same product."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from models import random_model, random_pairs
from refusal import refused

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


needs_onednn = pytest.mark.skipif(products.onednn() is None, reason="this torch has no product by oneDNN")


@pytest.fixture(autouse=True)
def nobody_chose(monkeypatch):
    monkeypatch.delenv(products.CHOICE, raising=False)


@pytest.fixture
def narrow(monkeypatch):
    """A BLAS that leaves the widest vectors unused, whatever this machine's does."""
    monkeypatch.setattr(products, "blas_is_narrow", lambda: True)


@pytest.mark.parametrize(("wide", "mkl", "processor", "expected"), [
    ("AVX512", True, "vendor_id : AuthenticAMD", True),
    ("AVX512_BF16", True, "AMD64 Family 25 Model 17 Stepping 1, AuthenticAMD", True),
    ("AVX512", True, "vendor_id : GenuineIntel", False),
    ("AVX512", False, "vendor_id : AuthenticAMD", False),
    ("AVX2", True, "vendor_id : AuthenticAMD", False),
])  # fmt: skip
def test_who_multiplies_follows_from_the_blas_and_the_processor(monkeypatch, wide, mkl, processor, expected):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: wide)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    monkeypatch.setattr(products, "_processor", lambda: processor)
    assert products.blas_is_narrow.__wrapped__() == expected


def test_the_environment_chooses_who_multiplies(monkeypatch):
    x, w, _ = operands()
    for asked, expected in (("torch", "torch"), ("oneDNN", "oneDNN"), ("onednn", "oneDNN")):
        monkeypatch.setenv(products.CHOICE, asked)
        monkeypatch.setattr(products, "onednn", lambda: torch.nn.functional.linear)
        assert products.large_by() == products.chosen(x, w) == expected
    monkeypatch.setattr(products, "onednn", lambda: None)
    refused(
        "EAPCORE_PRODUCTS=onednn, but this torch, .*, has no product by oneDNN", products.large_by, error=RuntimeError
    )
    monkeypatch.setenv(products.CHOICE, "mkl")
    refused("EAPCORE_PRODUCTS must be oneDNN or torch, got 'mkl'", products.large_by)


def of_another_torch(kind):
    """The private op as a torch to come may have it."""
    real = torch.nn.functional.linear
    return {
        "it is gone": None,
        "it has no overload of that name": SimpleNamespace(),
        "it takes other arguments": SimpleNamespace(default=lambda x, w, bias: real(x, w, bias)),
        "it multiplies otherwise": SimpleNamespace(
            default=lambda x, w, b, *more: x @ w[: x.shape[1]].T[: x.shape[1], :2]
        ),
        "it leaves out the bias": SimpleNamespace(default=lambda x, w, bias, *more: real(x, w)),
    }[kind]


@pytest.mark.parametrize("kind", ["it is gone", "it has no overload of that name", "it takes other arguments",
                                  "it multiplies otherwise", "it leaves out the bias"])  # fmt: skip
def test_with_another_torch_products_are_torchs_own(monkeypatch, narrow, kind):
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(_linear_pointwise=of_another_torch(kind)))
    monkeypatch.setattr(products, "onednn", products.onednn.__wrapped__)
    x, w, bias = operands()
    assert products.large_by() == products.chosen(x, w) == "torch"
    assert torch.equal(products.product(x, w, bias), torch.addmm(bias, x.flatten(0, -2), w).unflatten(0, x.shape[:-1]))


@needs_onednn
def test_large_whole_float32_products_go_to_onednn(monkeypatch, narrow):
    calls = []
    real = products.onednn()
    monkeypatch.setattr(products, "onednn", lambda: lambda *args: calls.append(args) or real(*args))
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
def test_gradients_pass_through_a_large_product(narrow):
    x, w, bias = operands()
    w.requires_grad_()
    (grad,) = torch.autograd.grad(products.product(x, w, bias).sum(), w)
    assert torch.allclose(grad, x.flatten(0, 1).sum(0)[:, None].expand(K, N), atol=1e-3)


@needs_onednn
@pytest.mark.parametrize("storage", ["dense", "factored"])
def test_scores_are_float64s_with_either_product(storage, monkeypatch, narrow):
    used = []
    real = products.onednn()
    monkeypatch.setattr(products, "onednn", lambda: lambda *args: used.append(1) or real(*args))
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
