"""edge_scores and receiver_grads alone: on torch, numpy and DLPack, as torch.library ops, under torch.compile."""

from __future__ import annotations

import eapcore.kernels as kernels
import eapcore.kernels.torch_ops as torch_ops
import numpy as np
import pytest
import torch
from refusal import refused
from torch.autograd import forward_ad


def drawn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def contraction(dtype=torch.float32):
    """delta, grads, mask, rows."""
    mask = torch.arange(5)[:, None] < torch.tensor([1, 5, 0])
    return drawn(5, 2, 3, 8, dtype=dtype), drawn(3, 2, 3, 8, dtype=dtype, seed=1), mask, torch.tensor([0, 4, 5])


def receivers(kind, dtype=torch.float32):
    """g, act, weight and the options of receiver_grads, for 4 channels that read one stream."""
    g, act, weight = drawn(4, 2, 3, 5, dtype=dtype), drawn(4, 2, 3, 5, dtype=dtype, seed=1), drawn(4, 8, 5, dtype=dtype)
    if kind == "none":
        return g, act, weight, {"norm": kernels.Norm("none")}
    gamma, beta, bias = drawn(8, dtype=dtype, seed=2), drawn(8, dtype=dtype, seed=3), drawn(4, 5, dtype=dtype, seed=4)
    w_gamma, offset = kernels.receiver_constants(weight, bias, gamma, beta)
    norm = kernels.Norm("layernorm", drawn(2, 3, 8, dtype=dtype), drawn(2, 3, dtype=dtype).abs() + 1, gamma)
    return g, act, weight, {"norm": norm, "w_gamma": w_gamma, "offset": offset}


def flat(g, act, weight, options):
    """The arguments of the registered op."""
    norm = options["norm"]
    rest = (norm.kind, norm.x_hat, norm.rstd, norm.gamma, options.get("w_gamma"), options.get("offset"), "auto")
    return (g, act, weight, *rest)


class OnlyDlpack:
    """An array of a library that torch does not know."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __dlpack__(self, **options):
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()


@pytest.mark.parametrize("reduce", ["all", "pair", "position"])
def test_numpy_and_dlpack_give_the_kernel_s_scores(reduce):
    delta, grads, mask, rows = contraction()
    expected = kernels.edge_scores(delta, grads, mask=mask, reduce=reduce, rows=rows)
    options = {"mask": mask.numpy(), "rows": rows.numpy(), "reduce": reduce}
    found = torch_ops.edge_scores(delta.numpy(), grads.numpy(), **options)
    assert isinstance(found, np.ndarray) and np.array_equal(found, expected.numpy())
    found = torch_ops.edge_scores(OnlyDlpack(delta), OnlyDlpack(grads), mask=OnlyDlpack(mask), reduce=reduce, rows=rows)
    assert isinstance(found, torch.Tensor) and torch.equal(found, expected)
    assert torch.equal(torch_ops.edge_scores(delta, grads, mask=mask, reduce=reduce, rows=rows), expected)


@pytest.mark.parametrize("kind", ["layernorm", "none"])
def test_numpy_gives_the_kernel_s_gradients(kind):
    g, act, weight, options = receivers(kind, torch.float64)
    expected = kernels.receiver_grads(g, act, weight, **options)
    norm = options["norm"]
    arrays = [None if t is None else t.numpy() for t in (norm.x_hat, norm.rstd, norm.gamma)]
    rest = {name: options[name].numpy() for name in ("w_gamma", "offset") if name in options}
    found = torch_ops.receiver_grads(g.numpy(), act.numpy(), weight.numpy(), norm=kernels.Norm(kind, *arrays), **rest)
    assert isinstance(found, np.ndarray) and np.array_equal(found, expected.numpy())
    refused("norm must be an eapcore.kernels.Norm, got", torch_ops.receiver_grads, g, act, weight, norm=kind)


def test_the_stream_itself_may_stand_in_the_place_of_the_normalised_one():
    g, act, weight, options = receivers("layernorm", torch.float64)
    norm = options["norm"]
    x, mean = torch.randn_like(norm.x_hat), torch.randn_like(norm.rstd)
    options["norm"] = kernels.Norm("layernorm", None, norm.rstd, norm.gamma, x, mean)
    expected = kernels.receiver_grads(g, act, weight, **options)
    assert torch.equal(torch_ops.receiver_grads(g, act, weight, **options), expected)
    options["norm"] = kernels.Norm("layernorm", None, norm.rstd.numpy(), norm.gamma, x.numpy(), mean.numpy())
    assert np.array_equal(torch_ops.receiver_grads(g.numpy(), act, weight, **options), expected.numpy())


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch uses it for them
def test_derivatives_are_refused_however_they_are_asked_for():
    delta, grads, *_ = contraction(torch.float64)
    g, act, weight, options = receivers("layernorm", torch.float64)
    for x, f in (
        (delta, lambda x: torch_ops.edge_scores(x, grads).sum()),
        (grads, lambda x: torch_ops.edge_scores(delta, x).sum()),
        (g, lambda x: torch_ops.receiver_grads(x, act, weight, **options).sum()),
    ):

        def dual(x=x, f=f):
            with forward_ad.dual_level():
                f(forward_ad.make_dual(x, x))

        asked = (
            dual, lambda x=x, f=f: torch.func.grad(f)(x), lambda x=x, f=f: f(x.clone().requires_grad_()).backward(),
        )  # fmt: skip
        for one in asked:
            refused("have no derivatives: detach what they are given", one, error=RuntimeError)


def test_memory_is_shared_where_torch_can_view_it():
    array = np.ones((2, 3))
    assert torch_ops.as_tensor(array, "delta").data_ptr() == array.ctypes.data
    tensor = torch.ones(2, 3)
    assert torch_ops.as_tensor(OnlyDlpack(tensor), "delta").data_ptr() == tensor.data_ptr()
    array.flags.writeable = False
    assert torch.equal(torch_ops.as_tensor(array, "delta"), torch.ones(2, 3, dtype=torch.float64))
    assert torch_ops.as_tensor(np.arange(3.0)[::-1], "delta").tolist() == [2, 1, 0]


def test_what_is_no_array_is_refused_by_name():
    delta, grads, *_ = contraction()
    with pytest.raises(
        ValueError, match="delta must be one of torch tensors, numpy arrays or objects with __dlpack__, got"
    ):
        torch_ops.edge_scores([1.0], grads)
    refused("grads cannot be read as a tensor: can't convert", torch_ops.edge_scores, delta, np.array(["a"]))
    refused("delta and grads must share one dtype", torch_ops.edge_scores, delta.numpy(), grads.double().numpy())


def test_the_ops_pass_opcheck():
    for dtype in (torch.float32, torch.float64):
        delta, grads, mask, rows = contraction(dtype)
        for reduce in ("all", "pair", "position"):
            for options in ((None, reduce, None), (mask, reduce, rows)):
                torch.library.opcheck(torch.ops.eapcore.edge_scores, (delta, grads, *options, "ieee", "auto"))
        for kind in ("layernorm", "none"):
            torch.library.opcheck(torch.ops.eapcore.receiver_grads, flat(*receivers(kind, dtype)))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_the_ops_compile_into_one_graph(backend):
    delta, grads, mask, _ = contraction()
    g, act, weight, options = receivers("layernorm")

    def both(delta, grads, g, act, weight):
        scores = torch_ops.edge_scores(delta * 2, grads, mask=mask, reduce="pair")
        return scores.sum(0), torch_ops.receiver_grads(g, act, weight, **options) + 1

    torch._dynamo.reset()
    compiled = torch.compile(both, fullgraph=True, backend=backend)
    for found, expected in zip(compiled(delta, grads, g, act, weight), both(delta, grads, g, act, weight), strict=True):
        assert torch.equal(found, expected)


def test_the_fake_kernels_check_as_the_real_ones():
    delta, grads, *_ = contraction()
    with pytest.raises(ValueError, match="were clean and corrupt run with the same weights and prompts"):
        torch.ops.eapcore.edge_scores(delta.to("meta"), grads[:, :1].to("meta"), None, "all", None, "ieee", "auto")
    shape = torch.ops.eapcore.edge_scores(
        delta.to("meta"), grads.to("meta"), None, "position", None, "ieee", "auto"
    ).shape
    assert shape == (3, 5, 3)
