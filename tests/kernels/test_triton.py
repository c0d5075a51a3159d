"""Every Triton kernel in the interpreter, against the specification in float64.

Tiles are large and loops short, because the interpreter takes a millisecond an operation whatever its size.
"""

import mmap
import sys
from dataclasses import replace

import pytest
import torch
from interpreter import not_interpreted
from refusal import refused

if reason := not_interpreted("on a GPU tests/kernels/test_kernels.py and bench/bench_kernels.py run Triton"):
    pytest.skip(reason, allow_module_level=True)

import eapcore.kernels as kernels
from accuracy import STORED, error_of
from eapcore.kernels import Norm, Sizes, reference
from eapcore.kernels import triton_common as common
from eapcore.kernels import triton_edge_scores as scores
from eapcore.kernels import triton_factored as factored
from eapcore.kernels import triton_receiver_grads as grads
from kernel_cases import assert_factored_good, assert_layer_good, assert_scores_good, doubled, factors

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HOPPER = common.Target("cuda", 90, 132, 141 << 30)
AMPERE = common.Target("cuda", 80, 108, 80 << 30)
CDNA = common.Target("hip", 0, 304, 192 << 30)
SMALL = scores.Config(64, 64, 64, 4, 2, rate=1.0)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def launches(monkeypatch):
    """What ran: (kernel's name, its compile-time arguments), in order."""
    seen = []
    original = common.launch

    def launch(kernel, programs, *args, device, **meta):
        seen.append((kernel.fn.__name__, meta | {"programs": programs}))
        original(kernel, programs, *args, device=device, **meta)

    monkeypatch.setattr(common, "launch", launch)
    return seen


def fenced(*shape, dtype, inner=8):
    """A random tensor inside a larger buffer of NaN: whatever is read outside of it shows."""
    buffer = torch.full([n + 2 for n in shape[:-1]] + [shape[-1] + 2 * inner], float("nan"), dtype=dtype)
    view = buffer[(*(slice(1, -1) for _ in shape[:-1]), slice(inner, -inner))]
    view.copy_(torch.randn(*shape))
    return view


def check_scores(delta, gradients, mask=None, reduce="all", rows=None, **options):
    got = scores.edge_scores(delta, gradients, mask, reduce, rows, **options)
    assert_scores_good(got, delta, gradients, mask, reduce, rows)
    return got


# edge_scores


@pytest.mark.parametrize("with_rows", [False, True])
@pytest.mark.parametrize("reduce", ["all", "pair", "position"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_edge_scores_is_the_specification(dtype, reduce, with_rows):
    delta, gradients = fenced(70, 3, 5, 40, dtype=dtype), fenced(33, 3, 5, 40, dtype=dtype)
    rows = torch.tensor([7, 0, 14, 3]) if with_rows else None
    check_scores(delta, gradients, torch.rand(70, 33) < 0.4, reduce, rows)


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1), (65, 129, 1, 17, 3), (3, 2, 5, 1, 100), (130, 1, 2, 2, 64)])
def test_any_size(sizes):
    s, r, b, t, d = sizes
    check_scores(fenced(s, b, t, d, dtype=torch.float32, inner=1), fenced(r, b, t, d, dtype=torch.float32, inner=1))


LAYOUTS = {
    "contiguous": lambda n: torch.randn(n, 3, 4, 64),
    "later tokens": lambda n: torch.randn(n, 3, 9, 64)[:, :, 5:],
    "part of d": lambda n: torch.randn(n, 3, 4, 72)[..., 8:],
    "tokens first": lambda n: torch.randn(3, 4, n, 64).permute(2, 0, 1, 3),
    "positions before pairs": lambda n: torch.randn(n, 4, 3, 64).transpose(1, 2),
    "d not last": lambda n: torch.randn(n, 3, 64, 4).transpose(2, 3),
    "unaligned": lambda n: torch.randn(n, 3, 4, 65)[..., 1:],
    "expanded": lambda n: torch.randn(n, 1, 4, 64).expand(n, 3, 4, 64),
    "every other sender": lambda n: torch.randn(2 * n, 3, 4, 64)[::2],
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_any_strides(name, launches):
    delta, gradients = LAYOUTS[name](20), LAYOUTS["contiguous"](7)
    for reduce in ("all", "pair", "position"):
        check_scores(delta, gradients, None, reduce, config=SMALL)
    used = {meta["DESCRIPTORS"] for kernel, meta in launches if kernel == "partial_scores"}
    assert used == {name not in ("unaligned", "expanded")}


def test_descriptors_and_pointers_give_the_same_scores(launches, monkeypatch):
    delta, gradients, mask = torch.randn(70, 2, 3, 72), torch.randn(50, 2, 3, 72), torch.rand(70, 50) < 0.5
    first = check_scores(delta, gradients, mask, config=SMALL)
    monkeypatch.setattr(common, "describable", lambda tensor: False)
    second = check_scores(delta, gradients, mask, config=SMALL)
    used = [meta["DESCRIPTORS"] for kernel, meta in launches if kernel == "partial_scores"]
    assert used == [True, False] and torch.equal(first, second)


def test_every_tiling_of_every_target_is_right(launches):
    delta, gradients, mask = torch.randn(70, 1, 2, 72), torch.randn(130, 1, 2, 72), torch.rand(70, 130) < 0.5
    tilings = {
        (config.block_s, config.block_r, config.block_k): config
        for on in (HOPPER, AMPERE, CDNA)
        for dtype, precision in ((torch.bfloat16, "ieee"), (torch.float32, "ieee"), (torch.float32, "tf32x3"))
        for aligned in (True, False)
        for config in scores.configs(dtype, precision, on, aligned)
    }
    for config in tilings.values():
        check_scores(delta, gradients, mask, config=config)
    ran = {
        (m["BLOCK_S"] + m["MORE_S"], m["BLOCK_R"], m["BLOCK_K"]) for kernel, m in launches if kernel == "partial_scores"
    }
    assert ran == set(tilings)


def test_senders_in_two_parts(launches):
    delta, gradients, mask = torch.randn(130, 2, 3, 72), torch.randn(70, 2, 3, 72), torch.rand(130, 70) < 0.5
    config = replace(SMALL, block_s=96)
    for d, g in ((delta, gradients), (delta[:90, :, :, 1:], gradients[:40, :, :, 1:]), (delta[:90], gradients[:40])):
        for reduce in ("all", "pair", "position"):
            check_scores(d, g, mask[: len(d), : len(g)], reduce, config=config)
    ran = [meta for kernel, meta in launches if kernel == "partial_scores"]
    assert {meta["DESCRIPTORS"] for meta in ran} == {meta["DIRECT"] for meta in ran} == {True, False}
    assert {(meta["BLOCK_S"], meta["MORE_S"]) for meta in ran} == {(64, 32)}


def test_positions_beside_each_other_are_one_axis():
    """Memory that has the positions in front of the senders is walked along them, whatever is left out of it."""
    delta, gradients = torch.randn(3, 4, 9, 32).permute(2, 0, 1, 3), torch.randn(3, 4, 7, 32).permute(2, 0, 1, 3)
    work = scores.layout(delta[1:6], gradients, "all", None)
    assert (work.index, work.tokens, work.inner) == ("group", 12, 32)
    check_scores(delta[1:6], gradients[2:], torch.rand(5, 5) < 0.5, config=SMALL)
    assert scores.layout(delta[:, 1:], gradients[:, 1:], "all", None).tokens == 8
    assert scores.layout(delta[:, :, :1], gradients[:, :, :1], "all", None).tokens == 3
    assert scores.layout(delta[:, :, 1:], gradients[:, :, 1:], "all", None).index == "flat"
    for cut in (slice(None), slice(1), slice(2)):
        check_scores(delta[:, cut, cut], gradients[:, cut, cut], config=SMALL)


def test_the_inner_dimension_is_split_and_the_parts_are_added(launches):
    delta, gradients = torch.randn(5, 4, 8, 64), torch.randn(3, 4, 8, 64)
    check_scores(delta, gradients, config=SMALL)
    partial, total = launches
    assert partial[0] == "partial_scores" and not partial[1]["DIRECT"] and partial[1]["programs"] > 1
    assert total[0] == "sum_splits"
    launches.clear()
    check_scores(delta[:, :1, :1], gradients[:, :1, :1], torch.rand(5, 3) < 0.5, config=SMALL)
    assert [kernel for kernel, _ in launches] == ["partial_scores", "zero_non_edges"] and launches[0][1]["DIRECT"]


def test_some_senders_have_the_bits_that_they_have_among_all(launches):
    delta, grads = torch.randn(130, 1, 2, 1024).bfloat16(), torch.randn(3, 1, 2, 1024).bfloat16()
    expected = kernels.edge_scores(delta, grads, impl="triton")
    found = kernels.edge_scores(delta[:3], grads, part=(0, 130), impl="triton")
    assert torch.equal(found, expected[:3])
    sizes = [[launch["BLOCK_S"], launch["DIRECT"]] for kernel, launch in launches if kernel == "partial_scores"]
    assert sizes[0] == sizes[1] and len(sizes) == 2


def test_tiles_without_an_edge_are_skipped(monkeypatch):
    delta, gradients, mask = torch.randn(128, 2, 4, 64), torch.randn(128, 2, 4, 64), torch.zeros(128, 128).bool()
    mask[70, 3] = True  # the third of four tiles
    written = []
    original = common.launch

    def launch(kernel, programs, *args, **options):
        if kernel is scores.partial_scores:
            args[3].fill_(7.0)
            written.append(args[3])
        original(kernel, programs, *args, **options)

    monkeypatch.setattr(common, "launch", launch)
    monkeypatch.setattr(scores, "choose_splits", lambda *args: 3)
    check_scores(delta, gradients, mask, config=SMALL)
    untouched = (written[0] == 7.0).all(2)  # [splits, tiles]
    assert untouched.shape[0] == 3
    assert torch.equal(untouched, torch.tensor([True, True, False, True]).expand_as(untouched))


def test_a_mask_changed_in_place_is_seen():
    delta, gradients, mask = torch.randn(80, 1, 2, 32), torch.randn(70, 1, 2, 32), torch.zeros(80, 70).bool()
    assert (scores.edge_scores(delta, gradients, mask, "all", None) == 0).all()
    mask.numpy()[3, 4] = True
    check_scores(delta, gradients, mask)


def test_rows_outside_the_batch_raise():
    delta = torch.randn(2, 2, 3, 8)
    for reduce in ("all", "pair"):
        with pytest.raises(IndexError):
            scores.edge_scores(delta, delta, None, reduce, torch.tensor([6]))


@pytest.fixture
def address_space(monkeypatch):
    """A function making a buffer of that many elements of which only touched pages take memory."""
    from triton.runtime import interpreter

    # It would copy every buffer onto itself, all pages included.
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *args: None)
    reserve_nothing = 0x4000  # MAP_NORESERVE, which Python names from 3.13 on

    def space(elements, dtype=torch.float16):
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | reserve_nothing
        return torch.frombuffer(mmap.mmap(-1, elements * dtype.itemsize, flags=flags), dtype=dtype)

    return space


@pytest.fixture
def only_the_last(monkeypatch, address_space):
    """A function that leaves every launch its last programs alone; large results come from `address_space`."""
    from triton.runtime import interpreter

    launch, new_empty, skipped, most = common.launch, torch.Tensor.new_empty, [0], [sys.maxsize]

    def last_programs(kernel, programs, *args, device, **meta):
        skipped[0] = max(0, programs - most[0])
        launch(kernel, programs - skipped[0], *args, device=device, **meta)

    def place(builder, x, y, z):
        builder.grid_idx = (x + skipped[0], y, z)

    def lazy(self, *size, dtype=None, **options):
        shape = torch.Size(size[0] if isinstance(size[0], tuple | list) else size)
        if shape.numel() < 2**29:
            return new_empty(self, *size, dtype=dtype, **options)
        return address_space(shape.numel(), dtype or self.dtype).view(shape)

    monkeypatch.setattr(common, "launch", last_programs)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "set_grid_idx", place)
    monkeypatch.setattr(torch.Tensor, "new_empty", lazy)
    return lambda programs: most.__setitem__(0, programs)


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("aligned", [True, False])
def test_edge_scores_past_two_to_the_31_elements(axis, aligned, address_space):
    shape, strides = [2, 2, 2, 24], [96, 48, 24, 1]
    strides[axis] = 2**31 + (8 if aligned else 9)
    far = address_space(sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + 1)
    far = far.as_strided(shape, strides)
    near = torch.randn(shape).half()
    far.copy_(near)
    gradients = torch.randn(3, 2, 2, 24).half()
    for reduce in ("all", "position"):
        near_scores = check_scores(near, gradients, None, reduce, config=SMALL)
        far_scores = scores.edge_scores(far, gradients, None, reduce, None, config=SMALL)
        torch.testing.assert_close(far_scores, near_scores, rtol=1e-5, atol=1e-5)


def test_receiver_grads_past_two_to_the_31_elements(address_space):
    far = address_space(2**31 + 8 + 3 * 5 * 8).as_strided((2, 3, 5, 8), (2**31 + 8, 40, 8, 1))
    near = torch.randn(2, 3, 5, 8).half()
    far.copy_(near)
    weight = torch.randn(2, 20, 8).half()
    first, second = (grads.receiver_grads(g, g, weight, Norm("none"), None, None) for g in (near, far))
    assert torch.equal(first, second)


@pytest.mark.parametrize("reduce", ["pair", "position"])
@pytest.mark.parametrize("masked", [False, True])
def test_scores_past_two_to_the_31_elements(reduce, masked, only_the_last):
    # 33,000 results of 256 × 256 pairs; all groups are alike.
    shape = (256, 33_000, 1, 16) if reduce == "pair" else (256, 1, 33_000, 16)
    delta, gradients = torch.randn(256, 1, 1, 16), torch.randn(256, 1, 1, 16)
    mask = torch.rand(256, 256) < 0.5 if masked else None
    expected = scores.edge_scores(delta, gradients, mask, "all", None, config=SMALL)  # before launches are cut short
    only_the_last(64 if masked else 16)  # 16 tiles; 64 × 1,024 pairs that may be no edges
    got = scores.edge_scores(delta.expand(shape), gradients.expand(shape), mask, reduce, None, config=SMALL)
    assert got.numel() > 2**31 and expected.abs().max() > 1
    torch.testing.assert_close(got[-1], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("channels", "tokens"), [(1, 2**22 + 64), (3, 2**21)])
def test_receiver_grads_written_past_two_to_the_31_elements(channels, tokens, only_the_last, address_space):
    g, weight = torch.randn(channels, 1, 1, 8).half(), torch.randn(channels, 512, 8).half()
    expected = grads.receiver_grads(g, g, weight, Norm("none"), None, None)
    only_the_last(2)
    g = g.expand(-1, -1, tokens, -1)
    out = address_space(channels * tokens * 512).view(channels, 1, tokens, 512)
    assert out.numel() > 2**31
    got = grads.receiver_grads(g, g, weight, Norm("none"), None, None, out)
    assert torch.equal(got[-1, 0, -64:], expected[-1, 0].expand(64, -1)) and expected[-1].abs().max() > 1


def test_plans_follow_from_shape_and_device():
    def plan(on, senders, receivers, inner, dtype=torch.bfloat16, **options):
        settings = {"precision": "ieee", "masked": True, "aligned": True} | options
        return scores.plan(senders, receivers, 1, 1, inner, dtype=dtype, on=on, **settings)

    large = plan(HOPPER, 1249, 3649, 512 * 1600)
    assert (large.config.block_s, large.config.block_r, large.descriptors) == (192, 256, True)
    assert large.splits > 4
    layer = plan(HOPPER, 157, 37, 160 * 768, masked=False)
    assert layer.config.block_r == 64
    # One round of programs fills the device.
    assert 0.9 * HOPPER.processors * layer.config.per_sm <= 2 * layer.splits <= HOPPER.processors * layer.config.per_sm
    assert not plan(AMPERE, 1249, 3649, 512 * 1600).descriptors
    assert not plan(CDNA, 1249, 3649, 512 * 1600).descriptors
    assert not plan(HOPPER, 1249, 3649, 512 * 1600, aligned=False).descriptors
    assert plan(HOPPER, 1249, 3649, 512 * 1600, torch.float32).config == scores.EXACT_CUDA[0]
    assert plan(HOPPER, 1249, 3649, 512 * 1600, torch.float32, precision="tf32x3").descriptors
    assert plan(HOPPER, 100, 100, 64).splits == 1


def test_chains_of_half_precision_are_short_as_far_as_the_workspace_suffices():
    # One layer and all edges of XL and of a 13B model, a batch of 8192 tokens of GPT-2 small.
    shapes = [(1249, 76, 1024 * 1600), (1641, 121, 512 * 5120), (1249, 3649, 1024 * 1600), (157, 37, 8192 * 768)]
    for on in (HOPPER, AMPERE, CDNA):
        for aligned in (True, False):
            for senders, receivers, inner in shapes:
                settings = {"precision": "ieee", "masked": True, "aligned": aligned, "on": on}
                half, single = (
                    scores.plan(senders, receivers, 1, 1, inner, dtype=dtype, **settings)
                    for dtype in (torch.bfloat16, torch.float32)
                )
                tile = 4 * half.units * half.config.block_s * half.config.block_r
                full = half.partial_bytes + tile > scores.WORKSPACE_BYTES
                assert half.chain <= scores.CHAIN or (full and receivers == 3649)
                assert half.splits * half.chain >= inner and single.splits * single.chain >= inner


def test_known_edges_choose_tiles_and_rounds():
    before = [1 + 41 * (r // 121) for r in range(726)]  # six layers of a 13B model, behind 1,354 senders at most
    before = [n + 1148 for n in before]
    tile = scores.TENSOR_SM90[0]
    assert scores.live_tiles(tile, 1354, 726, None) == 8 * 3
    assert scores.live_tiles(tile, 1354, 726, before) == 7 + 7 + 8 and scores.live_tiles(tile, 100, 726, before) == 3
    how = {"dtype": torch.bfloat16, "precision": "ieee", "aligned": True, "on": HOPPER}
    guessed, known, whole = (
        scores.plan(1354, 726, 1, 160, 5120, masked=masked, before=given, **how)
        for masked, given in ((True, None), (True, before), (False, before))
    )
    assert known.config == guessed.config == tile and known.units == 24 and known.splits < guessed.splits
    assert -(-22 * known.splits // 132) * 132 - 22 * known.splits < 66  # the last round is half full at least
    assert whole.splits == scores.plan(1354, 726, 1, 160, 5120, masked=False, **how).splits
    delta, gradients = torch.randn(70, 2, 3, 40), torch.randn(33, 2, 3, 40)
    mask = torch.arange(70)[:, None] < torch.tensor([10] * 20 + [65] * 13)
    for counts in ([10] * 20 + [65] * 13, [70] * 33):  # which change the sums' order at most
        check_scores(delta, gradients, mask, config=SMALL, before=counts)
    refused("a number for each of the 33 receivers", kernels.edge_scores, delta, gradients, before=[1], impl="triton")


def test_partial_sums_stay_within_their_workspace():
    for groups in (1, 8, 64):
        chosen = scores.plan(
            4096, 8192, groups, 1, 10**6, dtype=torch.bfloat16, precision="ieee", masked=True, aligned=True, on=HOPPER
        )
        assert chosen.partial_bytes <= scores.WORKSPACE_BYTES
        assert (chosen.splits == 1) == (chosen.partial_bytes == 0)


# receiver_grads


def normed(kind, *shape, dtype):
    """A residual stream [B, T, D] normalised in float64, with statistics as the forward pass keeps them."""
    x = torch.randn(*shape, dtype=torch.float64)
    if kind == "layernorm":
        x = x - x.mean(-1, keepdim=True)
    rstd = x.square().mean(-1).rsqrt()
    x_hat = fenced(*shape, dtype=dtype)
    x_hat.copy_(x * rstd[..., None])
    return x_hat, rstd.float()


def receivers(kind, channels, batch, tokens, d_model, d_head, dtype, gamma=True):
    """Consistent arguments of receiver_grads, with weights laid out as GPT-2 stores them."""
    weight = fenced(d_model, channels, d_head, dtype=dtype).permute(1, 0, 2)
    weight.div_(d_head**0.5)
    g = fenced(channels, batch, tokens, d_head, dtype=dtype)
    scale = torch.rand(d_model).to(dtype) + 0.5 if gamma else None
    if kind == "none":
        return g, g, weight, Norm("none"), None, None
    x_hat, rstd = normed(kind, batch, tokens, d_model, dtype=dtype)
    bias, shift = torch.randn(channels, d_head), torch.randn(d_model)
    n = x_hat.double() * (1 if scale is None else scale.double()) + shift.double()
    act = fenced(*g.shape, dtype=dtype)
    act.copy_(torch.einsum("btd,cdk->cbtk", n, weight.double()) + bias.double()[:, None, None])
    constants = kernels.receiver_constants(weight.float(), bias, None if scale is None else scale.float(), shift)
    return g, act, weight, Norm(kind, x_hat, rstd, scale), *constants


def check_receivers(*case, **options):
    check_layer(grads.receiver_grads(*case, **options), case)


def check_layer(got, case):
    g, act, weight, norm, w_gamma, offset = case
    assert got.dtype == g.dtype
    definition = reference.receiver_grads(g.double(), weight.double(), doubled(norm))
    torch_error = error_of(reference.receiver_grads(g, weight, norm), definition)
    exact = assert_layer_good(got, (g, act, weight, norm, w_gamma, offset), torch_error)
    # The two float64 forms differ by the rounding of act alone.
    assert (exact - definition).norm() <= 4 * STORED[g.dtype] * exact.norm()


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_receiver_grads_is_the_specification(dtype, kind):
    check_receivers(*receivers(kind, 3, 2, 7, 150, 24, dtype))


def test_receiver_grads_without_gamma():
    check_receivers(*receivers("layernorm", 2, 1, 5, 30, 16, torch.float32, gamma=False))


@pytest.mark.parametrize("impl", ["triton", "reference", "auto"])
def test_channels_that_follow_one_another_may_share_a_weight(impl):
    g, act, weight, norm, w_gamma, offset = receivers("layernorm", 6, 2, 5, 48, 16, torch.float32)
    for share in (2, 3, 6):
        some = (x[: 6 // share] for x in (act, weight))
        each = (x[: 6 // share].repeat_interleave(share, 0) for x in (act, weight))
        how = {"norm": norm, "w_gamma": w_gamma, "offset": offset, "impl": impl}
        found, expected = kernels.receiver_grads(g, *some, **how), kernels.receiver_grads(g, *each, **how)
        assert torch.equal(found, expected) and expected.abs().max() > 0
    refused("weight must be", kernels.receiver_grads, g, act, weight[:4], **how)


@pytest.mark.parametrize("d_head", [1, 80, 256])
def test_receiver_grads_of_any_head_size(d_head, launches):
    check_receivers(*receivers("layernorm", 2, 1, 5, 48, d_head, torch.float16))
    if d_head == 80:
        assert [kernel for kernel, _ in launches] == ["channel_sums", "tile_grads"] and launches[1][1]["BLOCK_K"] == 128
    else:
        assert launches[0][1]["K_CHUNKS"] == (4 if d_head == 256 else 1)


@pytest.mark.parametrize("kind", ["layernorm", "none"])
@pytest.mark.parametrize(("d_head", "d_model"), [(64, 48), (96, 48), (128, 48), (60, 48), (96, 41), (128, 41)])
def test_receiver_grads_in_float32_of_large_heads(d_head, d_model, kind, launches):
    # Rows of 48 + 2 · 8 elements start at 16 bytes; with d_model 41 they do not.
    check_receivers(*receivers(kind, 2, 2, 35, d_model, d_head, torch.float32))
    meta = launches[0][1]
    chosen = grads.EXACT if (d_head, d_model) == (64, 48) else grads.NARROW
    assert (meta["BLOCK_N"], meta["BLOCK_D"], meta["num_warps"]) == (chosen.block_n, chosen.block_d, chosen.num_warps)
    assert meta["K_CHUNKS"] == -(-d_head // 32) and meta["UNROLL"] == chosen.unroll


def test_only_rows_at_16_bytes_are_aligned():
    def aligned(channels, d_model, d_head, start=0):
        g, out = torch.randn(channels, 1, 3, d_head), torch.empty(channels, 3, d_model)
        weight = torch.randn(channels * d_model * d_head + start)[start:].view(channels, d_model, d_head)
        work = grads.Channels(g, None, weight, Norm("none"), None, None)
        return grads.aligned(work, out)

    assert aligned(2, 32, 16) and aligned(2, 32, 16, start=4)
    assert not aligned(2, 32, 16, start=1)
    assert not aligned(2, 33, 16) and not aligned(2, 32, 20)


def test_receiver_grads_tiles_follow_the_tokens(launches):
    for tokens, block in ((50, 64), (100, 128), (300, 64), (500, 128)):
        assert grads.choose_config(tokens, 64, torch.bfloat16, HOPPER).block_n == block
    check_receivers(*receivers("rmsnorm", 1, 3, 43, 70, 8, torch.float16))
    assert launches[0][0] == "channel_grads" and launches[0][1]["BLOCK_N"] == 64


@pytest.mark.parametrize(
    "config",
    [*grads.TENSOR, *grads.TENSOR_HIP, grads.WIDE, grads.WIDE_HIP, grads.EXACT, grads.NARROW],
)
def test_receiver_grads_in_every_tiling(config):
    check_receivers(*receivers("layernorm", 2, 2, 9, 70, 96, torch.float32), config=config)


SMALL_WALK = grads.Walk(64, 64, 4, 2)


@pytest.mark.parametrize(
    ("kind", "d_head", "walk"),
    [("rmsnorm", 24, SMALL_WALK), ("none", 16, SMALL_WALK), ("layernorm", 128, grads.WALK)],
)
def test_receiver_grads_in_every_walk(kind, d_head, walk, launches):
    case = receivers(kind, 4, 1, 80, 104, d_head, torch.bfloat16 if d_head > 16 else torch.float16)
    check_receivers(*case, config=walk)
    sums = [] if kind == "none" else ["channel_sums"]
    assert [kernel for kernel, _ in launches] == [*sums, "tile_grads"] and launches[-1][1]["programs"] > 1
    if kind == "none":
        return
    g, act, weight, norm, w_gamma, offset = case  # again of the stream itself, with sums that are there already
    beside = torch.stack([(g * w_gamma[:, None, None]).sum(-1), (g * (act - offset[:, None, None])).sum(-1)], 1)
    mean = torch.randn(1, 80) if kind == "layernorm" else None
    x = norm.x_hat / norm.rstd[..., None].float() + (0 if mean is None else mean[..., None])
    raw = Norm(kind, None, norm.rstd, norm.gamma, x, mean)
    options = {"w_gamma": w_gamma, "offset": offset, "sums": beside.float() / 104}
    if kind == "rmsnorm":
        options["sums"][:, 0] = float("nan")
    got = kernels.receiver_grads(g, act, weight, norm=raw, **options, impl="triton")
    assert [kernel for kernel, _ in launches[2:]] == ["tile_grads"] and launches[-1][1]["RAW"]
    check_layer(got, case)
    by_torch = kernels.receiver_grads(g, act, weight, norm=raw, **options, impl="reference")
    torch.testing.assert_close(by_torch, got, rtol=0, atol=4 * STORED[g.dtype] * float(got.abs().max()))


def test_a_walk_takes_any_layout_that_can_be_described(launches):
    g, act, weight, *rest = receivers("layernorm", 4, 2, 5, 72, 16, torch.bfloat16)
    g = g.contiguous()
    expected = grads.receiver_grads(g, act, weight, *rest)
    assert_layer_good(expected, (g, act, weight, *rest))
    turned = weight.transpose(1, 2).contiguous().transpose(1, 2)
    beside = torch.full((2, 5, 7, 72), float("nan"), dtype=torch.bfloat16)
    by_token = g.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3)
    out = beside.permute(2, 0, 1, 3)[2:6]
    grads.receiver_grads(by_token, act, turned, *rest, out)
    assert torch.equal(out, expected) and expected.abs().max() > 0
    assert bool(beside[:, :, :2].isnan().all()) and bool(beside[:, :, 6:].isnan().all())
    some, each = act[:2], act[:2].repeat_interleave(2, 0)
    shared = grads.receiver_grads(g, some, weight[:2], *rest)
    assert torch.equal(shared, grads.receiver_grads(g, each, weight[:2].repeat_interleave(2, 0), *rest))
    assert [kernel for kernel, _ in launches] == ["channel_sums", "tile_grads"] * 4
    assert launches[3][1]["TURNED"] and not launches[1][1]["TURNED"]
    launches.clear()
    later = torch.cat([g, g], 2)[:, :, 5:]  # whose tokens are not one axis
    torch.testing.assert_close(grads.receiver_grads(later, act, weight, *rest), expected, rtol=1e-2, atol=1e-3)
    unaligned = torch.cat([g, g], 3)[..., 1:17]
    grads.receiver_grads(unaligned, act, weight, *rest)
    assert [kernel for kernel, _ in launches] == ["channel_grads"] * 2
    refused("no tiles of it can be described", grads.receiver_grads, later, act, weight, *rest, config=grads.WALK)


def test_the_last_channels_that_are_walked_may_be_fewer(launches):
    check_receivers(*receivers("layernorm", 5, 1, 74, 80, 16, torch.float16))
    assert launches[-1][0] == "tile_grads" and launches[-1][1]["programs"] == 2 * 3  # two tiles; 2, 2 and 1 channels


def test_channels_are_walked_in_groups_that_fill_the_device():
    assert grads.channels_together(36, 240, 264) == 36  # GPT-2 small, 5,120 tokens
    assert grads.channels_together(75, 65, 264) == 19  # XL, 640
    for channels, tiles in ((36, 140), (1, 1), (7, 1000), (120, 2), (3, 90)):
        group = grads.channels_together(channels, tiles, 264)
        assert 1 <= group <= channels
        assert tiles > 132 or -(-channels // group) * tiles <= 264 or group == channels


def test_weights_stored_the_other_way_round():
    g, act, weight, *rest = receivers("layernorm", 2, 1, 5, 40, 16, torch.float32)
    check_receivers(g, act, weight.transpose(1, 2).contiguous().transpose(1, 2), *rest)
    check_receivers(g.transpose(2, 3).contiguous().transpose(2, 3), act, weight, *rest)


def test_receiver_grads_of_empty_sizes():
    got = grads.receiver_grads(
        torch.randn(2, 0, 3, 4), torch.randn(2, 0, 3, 4), torch.randn(2, 5, 4), Norm("none"), None, None
    )
    assert got.shape == (2, 0, 3, 5)


# edge_scores_factored


def model_case(dtype, *, mlp=True, kinds=("layernorm", "layernorm"), heads=3, shared=1, batch=2, tokens=5, d_model=40):
    """The factors of a small model with `shared` heads for each key and value head; its sizes S and R."""
    groups = (heads, heads // shared, heads // shared)
    layers = [receivers(kind, sum(groups), batch, tokens, d_model, 16, dtype) for kind in kinds]
    return factors(layers, heads, groups, lambda *shape: fenced(*shape, dtype=dtype), mlp)


def check_factored(senders, gradients, mask, reduce="all", chunk=None):
    got = factored.edge_scores_factored(senders, gradients, mask, reduce, chunk, config=SMALL)
    assert_factored_good("triton", got, senders, gradients, mask, reduce)
    return got


@pytest.mark.parametrize(("dtype", "reduce", "chunk"), [
    (torch.float32, "all", None), (torch.float32, "pair", 4), (torch.bfloat16, "all", 3),
    (torch.float16, "position", 2),
], ids=str)  # fmt: skip
def test_factored_is_the_specification(dtype, reduce, chunk):
    senders, gradients, size = model_case(dtype)
    check_factored(senders, gradients, torch.rand(size) < 0.5, reduce, chunk)


def test_factored_without_mlps_with_shared_key_heads_and_unlike_layers(launches):
    senders, gradients, size = model_case(
        torch.float32, mlp=False, kinds=("layernorm", "none", "rmsnorm"), heads=4, shared=2
    )
    check_factored(senders, gradients, torch.rand(size) < 0.5, chunk=10)
    kinds = [meta["KIND"] for kernel, meta in launches if kernel == "channel_grads"]
    assert kinds == ["layernorm"] * 3 + ["none"] * 3 + ["rmsnorm"] * 3  # of each layer's q, k and v


def test_factored_contracts_the_receivers_of_as_many_layers_as_fill_the_tiles(monkeypatch, launches):
    senders, gradients, size = model_case(torch.bfloat16, kinds=("layernorm",) * 4)
    mask = torch.rand(size) < 0.5
    sizes = Sizes(2, 5, 40, channels=9, d_head=16, layers=4, heads=3)
    assert [group.layers for group in factored.grouped(sizes, None)] == [range(4)]
    monkeypatch.setattr(factored, "TOGETHER", 25)
    assert [group.layers for group in factored.grouped(sizes, None)] == [range(2), range(2, 4)]
    assert [group.receivers for group in factored.grouped(sizes, None)] == [slice(0, 20), slice(20, 41)]
    check_factored(senders, gradients, mask, "pair", 5)
    kernels_run = [kernel for kernel, _ in launches if kernel in ("tile_grads", "partial_scores")]
    # Two chunks, of two groups of two layers, whose q, k and v have a weight each.
    assert kernels_run == [*["tile_grads"] * 6, "partial_scores"] * 4


def test_factored_makes_no_layer_that_has_no_senders_before_it(launches):
    senders, gradients, size = model_case(torch.bfloat16, kinds=("layernorm",) * 3)
    height, before = size[1] // 3, [0] * size[1]
    before[height : 2 * height] = [5] * height  # the second layer's receivers from the first layer and the embedding
    mask = torch.zeros(size).bool()
    mask[:5, height : 2 * height] = True
    for reduce in ("all", "position"):
        launches.clear()
        got = factored.edge_scores_factored(senders, gradients, mask, reduce, 100, config=SMALL, before=before)
        assert_factored_good("triton", got, senders, gradients, mask, reduce)
        assert sum(kernel == "tile_grads" for kernel, _ in launches) == 3  # of its q, k and v
    # Of the logits alone, and of nothing.
    before = [0] * (size[1] - 1) + [size[0]]
    mask = torch.zeros(size).bool()
    mask[:, -1] = True
    got = factored.edge_scores_factored(senders, gradients, mask, "pair", 3, config=SMALL, before=before)
    assert_factored_good("triton", got, senders, gradients, mask, "pair")
    assert not factored.edge_scores_factored(senders, gradients, None, "all", None, before=[0] * size[1]).any()
    refused(
        "before must be numbers from 0 to S = 13", kernels.edge_scores_factored, senders, gradients, before=[14] * 31
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_factored_reads_sums_that_are_known_instead_of_activations(dtype, monkeypatch):
    senders, gradients, size = model_case(dtype, kinds=("layernorm", "rmsnorm", "layernorm"))
    mask, sums = torch.rand(size) < 0.5, []
    for g, act, norm, w_gamma, offset in zip(
        gradients.g, gradients.act, gradients.norms, gradients.w_gamma, gradients.offset, strict=True
    ):
        made = torch.full((len(g), 2, *g.shape[1:3]), torch.nan)
        grads.fill_sums(g, act, w_gamma if norm.kind == "layernorm" else None, offset, made, 40, len(g), 1)
        sums.append(made)
    without = replace(gradients, act=[None, None, gradients.act[2]], sums=[*sums[:2], None])
    for chunk, reduce in ((None, "all"), (3, "pair"), (2, "position")):
        found = factored.edge_scores_factored(senders, without, mask, reduce, chunk, config=SMALL)
        assert_factored_good("triton", found, senders, gradients, mask, reduce)
    for impl in ("reference", "cpp"):
        monkeypatch.setattr(kernels, "_resolve", lambda *args, impl=impl: impl)
        refused(f"receivers.act must be given for impl='{impl}'", kernels.edge_scores_factored, senders, without)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_factored_takes_what_heads_share_once(dtype, launches):
    senders, gradients, size = model_case(dtype, mlp=False, kinds=("rmsnorm",) * 2, heads=6)
    shared = lambda x: torch.cat([x[:6], x[6::3].repeat_interleave(3, 0)])  # noqa: E731
    weight = [torch.cat(list(groups)) for groups in gradients.weight]
    weight = [[w[:6], *(w[i : i + 1].expand(3, -1, -1) for i in range(6, 18, 3))] for w in weight]
    act, offset = [shared(x) for x in gradients.act], torch.stack([shared(x) for x in gradients.offset])
    gradients = replace(gradients, act=act, offset=offset, weight=weight)
    found = [list(factored.shared(groups)) for groups in weight]
    assert [[(len(w), share) for w, share in of_layer] for of_layer in found] == [[(6, 1), (4, 3)]] * 2
    for of_layer, groups in zip(found, weight, strict=True):
        assert torch.equal(torch.cat([w.repeat_interleave(share, 0) for w, share in of_layer]), torch.cat(groups))
    check_factored(senders, gradients, torch.rand(size) < 0.5, chunk=10)
    assert sum(kernel in ("tile_grads", "channel_grads") for kernel, _ in launches) == 2 * 2
    apart = [w.clone().expand(3, -1, -1) for w in torch.randn(2, 1, 5, 4)]  # of memory of their own
    assert [(len(w), share) for w, share in factored.shared(apart)] == [(1, 3), (1, 3)]
    assert [(len(w), share) for w, share in factored.shared([torch.randn(2, 5, 4), torch.randn(0, 5, 4)])] == [(2, 1)]


def test_factored_and_dense_agree():
    senders, gradients, size = model_case(torch.float32)
    mask = torch.rand(size) < 0.5
    split = check_factored(senders, gradients, mask, "pair", 2)
    delta, made = reference.sender_deltas(senders), reference.all_receiver_grads(gradients)
    dense = scores.edge_scores(delta, made, mask, "pair", None)
    torch.testing.assert_close(split, dense, rtol=1e-5, atol=1e-4)


def test_factored_gives_the_same_bits_twice():
    senders, gradients, size = model_case(torch.bfloat16, kinds=("layernorm",))
    mask = torch.rand(size) < 0.5
    first, second = (factored.edge_scores_factored(senders, gradients, mask, "all", 5) for _ in range(2))
    assert torch.equal(first, second)


def test_every_token_is_in_one_chunk():
    for batch, tokens in ((1, 1), (3, 7), (5, 2)):
        for chunk in (1, 2, 4, 100):
            for reduce in ("all", "pair", "position"):
                count = torch.zeros(batch, tokens)
                for pairs, positions in factored.blocks(batch, tokens, chunk, reduce):
                    count[pairs, positions] += 1
                    assert count[pairs, positions].numel() <= chunk
                assert (count == 1).all()


def test_chunks_are_so_large_that_the_weights_cost_little_and_fit_the_memory():
    many = 1 << 20
    # GPT-2 small's 57 MB of weights are read for as many tokens at a time as XL's gigabyte.
    small, xl = (157, 445, 445, 768, 4 * 12 * 768 * 768 * 2, 2), (1249, 3649, 456, 1600, 4 * 48 * 1600 * 1600 * 2, 2)
    assert factored.choose_chunk(*small, many, HOPPER) == 613 and factored.choose_chunk(*xl, many, HOPPER) == 628
    large = factored.choose_chunk(1641, 4841, 484, 5120, 4 * 40 * 5120 * 5120 * 2, 2, many, HOPPER)
    assert large * (1641 + 484) * 10240 < HOPPER.memory_bytes / 15.9
    # Of a batch that is not large, a third of what the explicit buffer would take.
    assert 0.3 * 640 * 1249 < factored.choose_chunk(*xl, 640, HOPPER) * (1249 + 456) <= 640 * 1249 / 3
    assert factored.choose_chunk(*xl, 1, HOPPER) == 1 and factored.choose_chunk(*small, 1, HOPPER) == 9


# The public ops


def test_the_public_ops_run_triton(launches):
    delta, gradients = torch.randn(5, 2, 3, 16), torch.randn(4, 2, 3, 16)
    got = kernels.edge_scores(delta, gradients, precision="tf32x3", impl="triton")
    assert launches[0][0] == "partial_scores" and launches[0][1]["PRECISION"] == "tf32x3"
    torch.testing.assert_close(got, kernels.edge_scores(delta, gradients, impl="reference"), rtol=1e-5, atol=1e-4)
    g, act, weight, norm, w_gamma, offset = receivers("layernorm", 2, 1, 5, 40, 16, torch.float32)
    launches.clear()
    kernels.receiver_grads(g, act, weight, norm=norm, w_gamma=w_gamma, offset=offset, impl="triton")
    assert [kernel for kernel, _ in launches] == ["channel_grads"]
    senders, made, _ = model_case(torch.float32)
    launches.clear()
    kernels.edge_scores_factored(senders, made, impl="triton")
    assert [kernel for kernel, _ in launches][:2] == ["channel_grads"] * 2  # a layer each


def test_float32_takes_tensor_cores_where_there_are_some():
    volta = common.Target("cuda", 70, 80, 16 << 30)
    taken = [common.check_precision("auto", torch.float32, on) for on in (HOPPER, CDNA, volta)]
    assert taken == ["tf32x3", "ieee", "ieee"]
    assert common.check_precision("ieee", torch.float32, HOPPER) == "ieee"
    assert common.check_precision("auto", torch.bfloat16, HOPPER) == "ieee"  # which multiplies exactly


def test_bfloat16_is_taken_to_float32_in_the_interpreter(launches):
    check_scores(torch.randn(3, 1, 2, 16).bfloat16(), torch.randn(3, 1, 2, 16).bfloat16())
    assert launches[0][1]["UPCAST"]


def test_what_triton_cannot_do_is_said():
    x = torch.randn(2, 1, 1, 4, dtype=torch.float64)
    refused("no float64 kernels", kernels.edge_scores, x, x, impl="triton")
    with pytest.raises(ValueError, match="no float64 kernels"):
        kernels.receiver_grads(x, x, torch.randn(2, 3, 4).double(), norm=Norm("none"), impl="triton")
    refused("needs an NVIDIA GPU", common.check_precision, "tf32x3", torch.float32, CDNA, error=RuntimeError)
    refused("precision must be one of auto, ieee, tf32x3", kernels.edge_scores, x.float(), x.float(), precision="tf32")
    senders, made, size = model_case(torch.float32)
    refused("chunk must be at least 1", kernels.edge_scores_factored, senders, made, chunk=0, impl="triton")
    with pytest.raises(ValueError, match="mask must be bool"):
        kernels.edge_scores_factored(senders, made, mask=torch.ones(3, 3).bool(), impl="triton")
    assert size == (9, 21)
    made.norms[1] = Norm("layernorm", made.norms[0].x_hat[:1], made.norms[0].rstd)
    refused(r"norms\[1\].x_hat must be", kernels.edge_scores_factored, senders, made, impl="triton")
