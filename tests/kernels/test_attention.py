"""Attention's kernels in Triton's interpreter, against torch's operations in float64, and those against autograd."""

import pytest
import torch
from interpreter import not_interpreted

if reason := not_interpreted("bench/bench_kernels.py checks the kernels on a GPU"):
    pytest.skip(reason, allow_module_level=True)

from accuracy import STORED
from eapcore.kernels import steps
from eapcore.kernels import triton_common as common
from eapcore.kernels.attention import attend, attend_grad, attend_moved, fits, receiver_sums
from eapcore.kernels.causal import Causal, ReceiverSums, by_group
from models import random_model, random_pairs
from refusal import refused

from eapcore import attribute

# Heads, key and value heads, positions before, tokens, d_head, positions read; how.
CASES = {
    "one block": (2, 2, 0, 5, 8, None, Causal(0.5)),
    "one of everything": (1, 1, 0, 1, 1, None, Causal(1.0)),
    "a past, grouped": (4, 2, 3, 6, 5, None, Causal(0.4)),
    "read, a past": (2, 1, 4, 7, 16, 3, Causal(0.4)),
    "blocks": (1, 1, 5, 70, 20, None, Causal(0.3)),
    "blocks, a window": (2, 1, 9, 75, 4, None, Causal(0.3, window=11)),
    "read, blocks, a window, a cap": (2, 1, 20, 50, 4, 2, Causal(0.7, window=9, softcap=2.0)),
    "a cap": (2, 2, 0, 40, 6, None, Causal(0.9, softcap=1.5)),
    "a window of one": (1, 1, 2, 6, 3, None, Causal(0.9, window=1)),
}

HALF = ("one of everything", "a past, grouped", "read, a past", "a cap", "read, blocks, a window, a cap")


def case(name, dtype):
    torch.manual_seed(0)
    heads, groups, past, tokens, d_head, count, how = CASES[name]
    read = None if count is None else torch.randint(0, tokens, (2, count))
    queries = tokens if read is None else count

    def draw(n, rows):
        """[2, n, rows, K] that lies as a projection makes it, between NaN."""
        buffer = torch.full((2, rows, n, d_head + 4), float("nan"), dtype=dtype)
        buffer[..., 2:-2] = torch.randn(2, rows, n, d_head).to(dtype)
        return buffer[..., 2:-2].transpose(1, 2)

    q, k, v, dz = draw(heads, queries), draw(groups, past + tokens), draw(groups, past + tokens), draw(heads, queries)
    return q, k, v, dz, how, tokens, read


def doubled(*tensors):
    return [x.double() for x in tensors]


def literal(q, k, v, how, tokens, read):
    """One query after the other."""
    group, past, out = q.shape[1] // k.shape[1], k.shape[2] - tokens, []
    for b in range(len(q)):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                at = past + (i if read is None else int(read[b, i]))
                first = 0 if how.window is None else max(0, at - how.window + 1)
                s = k[b, h // group, first : at + 1] @ q[b, h, i] * how.scale
                s = s if how.softcap is None else how.softcap * torch.tanh(s / how.softcap)
                out.append(s.softmax(0) @ v[b, h // group, first : at + 1])
    return torch.stack(out).view(q.shape)


@pytest.mark.parametrize("name", CASES)
def test_torchs_operations_are_the_literal_ones(name):
    q, k, v, dz, how, tokens, read = case(name, torch.float64)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    z = literal(*leaves, how, tokens, read)
    torch.testing.assert_close(attend(q, k, v, how, tokens, read), z.detach(), rtol=1e-11, atol=1e-12)
    expected = torch.autograd.grad((z * dz).sum(), leaves)
    got, group, past = attend_grad(q, k, v, dz, how, tokens, read), q.shape[1] // k.shape[1], k.shape[2] - tokens
    torch.testing.assert_close(got[0], expected[0], rtol=1e-10, atol=1e-12)
    for mine, whole in zip(got[1:], expected[1:], strict=True):
        summed = mine.unflatten(1, (-1, group)).sum(2)
        torch.testing.assert_close(summed, whole[:, :, past:], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name in CASES),
        # A dtype changes what is loaded, stored and multiplied, and no branch of the others.
        *((name, dtype) for name in HALF for dtype in (torch.bfloat16, torch.float16)),
    ],
)
def test_kernels_give_torchs_mixtures_and_gradients(name, dtype):
    q, k, v, dz, how, tokens, read = case(name, dtype)
    z = attend(q, k, v, how, tokens, read, impl="triton")
    exact = attend(*doubled(q, k, v), how, tokens, read)
    assert z.dtype == torch.float32
    torch.testing.assert_close(z.double(), exact, rtol=1e-5, atol=1e-5)  # in half precision too
    for impl in ("triton", "reference"):
        out = torch.full((2, q.shape[2], q.shape[1], q.shape[3]), float("nan"), dtype=dtype)
        attend(q, k, v, how, tokens, read, out, impl=impl)
        torch.testing.assert_close(out.transpose(1, 2), z.to(dtype), rtol=STORED[dtype] * 2, atol=1e-5)
        where = None if read is None else read[:1].expand(2, -1)  # a pair's prompts are read at the same positions
        clean, corrupt = attend(*doubled(q, k, v), how, tokens, where).transpose(1, 2)
        attend_moved(q, k, v, how, tokens, where, out, impl=impl)
        for got, there in zip(out, (clean, corrupt - clean), strict=True):
            torch.testing.assert_close(got.double(), there, rtol=STORED[dtype], atol=1e-5)
    made = attend_grad(q, k, v, dz, how, tokens, read, impl="triton")
    for got, there in zip(made, attend_grad(*doubled(q, k, v, dz), how, tokens, read), strict=True):
        assert got.dtype == dtype and got.shape == there.shape and not got.isnan().any()
        assert (got.double() - there).norm() <= (2 * STORED[dtype] + 1e-6) * there.norm() + 1e-6
    if read is None:  # beside each other, with what their receivers' sums are
        heads, d_head = q.shape[1], q.shape[3]
        constants = torch.randn(2, 3 * heads, d_head).to(dtype)
        acts = (q, k[:, :, -tokens:], v[:, :, -tokens:])
        for w_gamma in (constants[0], None):
            rooms = [
                torch.full((3 * heads, 2, 2, tokens), float("nan"), dtype=x) for x in (torch.float32, torch.float64)
            ]
            exact, room = (ReceiverSums(x, w_gamma, constants[1], 7) for x in (rooms[1], rooms[0]))
            assert all(map(torch.equal, attend_grad(q, k, v, dz, how, tokens, sums=room, impl="triton"), made))
            exact.fill(doubled(*made), doubled(*acts))  # of the gradients as they are stored
            first = 0 if w_gamma is not None else 1
            assert bool(room.out[:, :first].isnan().all()) and exact.out[:, first:].abs().max() > 0
            torch.testing.assert_close(room.out[:, first:].double(), exact.out[:, first:], rtol=1e-5, atol=1e-5)
            attend_grad(*doubled(q, k, v, dz), how, tokens, sums=exact, impl="reference")
            torch.testing.assert_close(
                room.out[:, first:].double(), exact.out[:, first:], rtol=0, atol=16 * STORED[dtype] + 1e-5
            )
        out = torch.full((2, tokens, 3 * q.shape[1], q.shape[3]), float("nan"), dtype=dtype)
        assert all(map(torch.equal, attend_grad(q, k, v, dz, how, tokens, None, out, impl="triton"), made))
        assert torch.equal(out.transpose(1, 2), torch.cat(made, 1))
        apart = attend_grad(q, k, v, dz, how, tokens, impl="reference")
        attend_grad(q, k, v, dz, how, tokens, None, out, impl="reference")
        assert torch.equal(out.transpose(1, 2), torch.cat(apart, 1))


@pytest.mark.parametrize("name", ["one block", "blocks", "read, a past"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_patterns_near_one_key_keep_their_small_gradients(name, dtype):
    """Scores of some hundreds, as trained models have them: neither they nor what is subtracted is rounded to half
    precision, nor is a logarithm of their size."""
    q, k, v, dz, how, tokens, read = case(name, dtype)
    q, k = q * 10, k * 10
    exact = attend_grad(*doubled(q, k, v, dz), how, tokens, read)
    error = {}
    for impl in ("triton", "reference"):
        made = attend_grad(q, k, v, dz, how, tokens, read, impl=impl)
        error[impl] = [float((x.double() - y).norm() / y.norm()) for x, y in zip(made, exact, strict=True)]
    if dtype == torch.float32:
        assert all(mine <= 8 * theirs for mine, theirs in zip(error["triton"], error["reference"], strict=True))
    else:
        assert max(*error["triton"], *error["reference"]) <= 0.01


def test_what_receivers_read_beside_gradients_that_are_there(monkeypatch):
    monkeypatch.setattr("eapcore.kernels.attention.takes_triton", lambda impl, x: True)
    g, act = torch.randn(2, 35, 6, 24).bfloat16(), torch.randn(2, 35, 4, 24).bfloat16()
    constants = torch.randn(2, 6, 24).bfloat16()
    for alone, group, of_channel in (
        (2, 2, [0, 1, 2, 2, 3, 3]),
        (6, 1, [0, 1, 2, 3, 1, 0]),
        (0, 3, [0, 0, 0, 1, 1, 1]),
    ):
        shared = act if alone < 6 else act[:, :, of_channel]
        each = act[:, :, of_channel]
        for w_gamma in (constants[0], None):
            got = receiver_sums(g, shared, w_gamma, constants[1], 40, alone, group)
            exact = (g.double() * (each.double() - constants[1].double())).sum(-1) / 40
            torch.testing.assert_close(got[:, 1].double(), exact.permute(2, 0, 1), rtol=1e-5, atol=1e-5)
            if w_gamma is not None:
                exact = (g.double() * w_gamma.double()).sum(-1) / 40
                torch.testing.assert_close(got[:, 0].double(), exact.permute(2, 0, 1), rtol=1e-5, atol=1e-5)
    for d_head, d_model in ((20, 40), (24, 41), (136, 40)):
        g = torch.randn(1, 2, 3, d_head).bfloat16()
        assert receiver_sums(g, g, None, g[0, 0], d_model, 3, 1) is None  # which no kernel of theirs would read


def test_scores_by_the_kernels(monkeypatch, limited):
    model = random_model(dtype=torch.float32, n_layers=2)
    pairs = random_pairs(model, [6, 5, 6], first_difference=2)
    expected = attribute(model, pairs, storage="dense").scores
    seen, launch = set(), common.launch

    def watched(kernel, *args, **meta):
        seen.add(kernel.fn.__name__)
        launch(kernel, *args, **meta)

    monkeypatch.setattr(common, "launch", watched)
    for decides in ("takes_triton", "fits"):
        monkeypatch.setattr(f"eapcore.kernels.attention.{decides}", lambda *like: True)
    monkeypatch.setattr("eapcore.attribution.score_batch.makes_differences", lambda model: True)
    got = attribute(model, pairs, storage="dense").scores
    assert seen == {"attend_rows", "query_grads", "channel_sums"}
    assert (got - expected).abs().max() <= 2e-5 * expected.abs().max()
    # All that a GPU does, in its layout and at a time.
    monkeypatch.setattr("eapcore.kernels.steps.takes_triton", lambda impl, x: x.dtype == torch.float32)
    limited(positions_first=True, receivers=2 * model.graph.receivers_per_layer, workspace=1 << 30)
    got = attribute(model, pairs, storage="dense", impl="triton").scores
    assert seen >= {"sum_rows", "normalise_grad_rows", "unit_rows", "channel_grads", "partial_scores"}
    assert (got - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_no_queries_and_what_cannot_be_done():
    q, k, v, _, how, tokens, _ = case("one block", torch.float32)
    none, read = q[:, :, :0], torch.zeros(2, 0, dtype=torch.int64)
    assert attend(none, k, v, how, tokens, read, impl="triton").shape == none.shape
    dq, dk, dv = attend_grad(none, k, v, none, how, tokens, read, impl="triton")
    assert dq.shape == none.shape and not dk.any() and not dv.any()
    refused("no float64 kernels", attend, *doubled(q, k, v), how, tokens, impl="triton")
    assert not steps.takes_triton("auto", q)
    sizes = ((128, torch.bfloat16), (129, torch.bfloat16), (8, torch.float32))
    assert [fits(torch.empty(1, d_head, dtype=dtype)) for d_head, dtype in sizes] == [True, False, False]


@pytest.mark.parametrize("groups", [6, 2])
def test_copies_of_one_side_are_rows_of_the_same_products(groups):
    q, k = torch.randn(3, 6, 4, 8).double(), torch.randn(3, groups, 8, 7).double()
    copies = torch.randn(5, 3, 6, 4, 8).double(), torch.randn(5, 3, groups, 8, 7).double()
    for x, y in ((copies[0], k), (q, copies[1]), (q, k)):
        expected = x @ y.repeat_interleave(6 // groups, -3)
        torch.testing.assert_close(by_group(x, y), expected, rtol=0, atol=1e-12)
