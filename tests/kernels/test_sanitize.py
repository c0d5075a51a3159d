"""No kernel touches what it was not given, meets another program, or counts further than its numbers go.

The sanitizer of tests/support/sanitize.py finds each kind of fault in a kernel that is wrong on purpose. All tests of
this folder run under it (conftest.py); here are the order of programs, and sizes that no memory here would hold:
a few of them, with EAPCORE_SANITIZE=all every one for each kind of GPU.
"""

import os
import sys

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("the sanitizer watches the interpreter; bench/gpu.sh runs compute-sanitizer", allow_module_level=True)

import eapcore.kernels as kernels
import sanitize
import triton
import triton.language as tl
from eapcore.kernels import steps
from eapcore.kernels import triton_common as common
from eapcore.kernels import triton_edge_scores as scores
from eapcore.kernels import triton_receiver_grads as receiver_grads
from eapcore.kernels.attention import attend, attend_grad, attend_moved
from eapcore.kernels.causal import Causal, ReceiverSums
from models import ROOT
from sanitize import Fault, Sanitizer, Virtual
from triton.tools.tensor_descriptor import TensorDescriptor

sys.path.insert(0, str(ROOT / "bench"))
from ops import checks
from ops.triton_compile import smallest_calls

# --- Kernels that are wrong on purpose --------------------------------------------------------------------------------


@triton.jit
def moves(x, out, n, step, read_at, stored, BLOCK: tl.constexpr):
    at = tl.program_id(0) * step + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at + read_at, mask=at < n), mask=at < stored)


@triton.jit
def reads_back(x, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at))
    tl.store(x + at, tl.load(out + (BLOCK - 1 - at)))


@triton.jit
def turns_around(x, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(x + (BLOCK - 1 - at), tl.load(x + at))


@triton.jit
def stores_to_x(x):
    tl.store(x, 0.0)


@triton.jit
def halves(out, BLOCK: tl.constexpr):
    tl.store(out + tl.arange(0, BLOCK) // 2, tl.zeros((BLOCK,), tl.float32))


@triton.jit
def adds(out, BLOCK: tl.constexpr):
    tl.atomic_add(out + tl.arange(0, BLOCK), tl.zeros((BLOCK,), tl.float32))


@triton.jit
def claims(x, out, first, ALIGN: tl.constexpr):
    tl.store(out, tl.load(x + tl.multiple_of(first + first, ALIGN) // 2))


@triton.jit
def tiles(x, out, BLOCK: tl.constexpr):
    tile = x.load([tl.program_id(0) * BLOCK, 0])
    at = tl.arange(0, BLOCK)
    tl.store(out + tl.program_id(0) * BLOCK + at, tl.sum(tile.to(tl.float32), 1))


@triton.jit
def far(x, out, n, stride, NARROW: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    if not NARROW:
        row = row.to(tl.int64)
    total = 0.0
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.sum(tl.load(x + row * stride + at, mask=at < n, other=0.0), 0)
    tl.store(out + row, total)


@triton.jit
def narrows(index, out):
    tl.store(out, tl.load(index).to(tl.int32))


OUT = {
    "moves": {"out"}, "reads_back": {"x", "out"}, "turns_around": {"x"}, "halves": {"out"}, "adds": {"out"},
    "claims": {"out"}, "tiles": {"out"}, "far": {"out"}, "narrows": {"out"},
}  # fmt: skip


def ones(*shape):
    return torch.ones(shape)


FAULTS = {
    "moves, program 1 of 2: loads 8 elements behind the first of x .8. float32, beyond its memory":
        lambda: moves[(2,)](ones(8), ones(8), 8, 4, 1, 8, 4),
    "program 0 of 2: loads -1 elements behind the first of x": lambda: moves[(2,)](ones(8), ones(8), 8, 4, -1, 8, 4),
    "loads 4 elements behind the first of x .2, 4. .*, in its memory, but no element of what it was given":
        lambda: moves[(2,)](ones(2, 8)[:, :4], ones(8), 8, 4, 0, 8, 4),
    "moves, program 1 of 2: stores 6 elements behind the first of out .6. float32, beyond its memory":
        lambda: moves[(2,)](ones(8), ones(6), 8, 4, 0, 8, 4),
    "stores 6 elements behind the first of out .6. float32, in its memory, but no element":
        lambda: moves[(2,)](ones(8), ones(8)[:6], 8, 4, 0, 8, 4),
    "program 1 of 3: stores to out .8. float32 where program 0 stores too":
        lambda: moves[(3,)](ones(8), ones(8), 8, 2, 0, 8, 4),
    "moves, program 0 of 2: loads of x .8. float32 what nobody has written":
        lambda: moves[(2,)](torch.empty(8), ones(8), 8, 4, 0, 8, 4),
    "stores to x .8. float32, which is no output of its": lambda: stores_to_x[(1,)](ones(8)),
    "program 0 of 0: is launched with a number of programs that no grid has":
        lambda: moves[(0,)](ones(8), ones(8), 8, 4, 0, 8, 4),
    "loads of out .8. float32 what it has stored itself, which its threads do not wait for":
        lambda: reads_back[(1,)](ones(8), ones(8), 8),
    "stores to x .8. float32 over what another of its threads has loaded": lambda: turns_around[(1,)](ones(8), 8),
    "stores twice to one place of out": lambda: halves[(1,)](ones(8), 8),
    "adds atomically, in an order that no two runs share": lambda: adds[(1,)](ones(8), 8),
    "claims that 4 is a multiple of 8": lambda: claims[(1,)](ones(8), ones(1), 2, 8),
    "casts to int32 what it does not hold": lambda: narrows[(1,)](torch.tensor([2**31]), torch.zeros(1).int()),
    "^claims, program 0 of 1: int32 does not hold 4294967294$": lambda: claims[(1,)](ones(8), ones(1), 2**31 - 1, 2),
}  # fmt: skip


@pytest.mark.parametrize("said", FAULTS)
def test_a_fault_is_found_and_named(said):
    with Sanitizer(writes=OUT), pytest.raises(Fault, match=said):
        FAULTS[said]()


@pytest.mark.parametrize(("order", "said"), [
    ("natural", "program 1 of 2: stores to out .12. float32 what another program loads in the same launch"),
    ("reversed", "program 0 of 2: loads of x .12. float32 what program 1 stores in the same launch"),
])  # fmt: skip
def test_programs_that_meet_are_named_in_any_order(order, said):
    x = ones(12)
    with Sanitizer(order, writes=OUT), pytest.raises(Fault, match=said):
        moves[(2,)](x, x, 8, 4, 4, 8, 4)


def bad(**changed):
    """A descriptor whose own checks were passed before something was changed."""
    made = TensorDescriptor(ones(8, 8), [8, 8], [8, 1], [4, 8])
    for name, value in changed.items():
        setattr(made, name, value)
    return made


DESCRIBED = {
    "starts at no multiple of 16 bytes": {"base": ones(9, 8).view(-1)[1:65].view(8, 8)},
    "must be multiples of 16 bytes, 1 the last": {"strides": [9, 1]},
    "none may be 0 or need more than 31 bits": {"shape": [8, 0]},
    "in blocks .512, 8., of which none may pass 256": {"block_shape": [512, 8]},
    "as .9, 8. with strides .8, 1., which end beyond its memory": {"shape": [9, 8]},
    "as .4, 8. with strides .16, 1., which are not its elements": {"shape": [4, 8], "strides": [16, 1]},
}


@pytest.mark.parametrize("said", DESCRIBED)
def test_what_the_hardware_does_not_describe_is_named(said):
    with Sanitizer(writes=OUT), pytest.raises(Fault, match=f"describes x .8, 8. float32 to TMA.*{said}"):
        tiles[(2,)](bad(**DESCRIBED[said]), ones(8), 4)


def test_results_that_nobody_wrote_are_named():
    with Sanitizer(writes=OUT):
        out = torch.empty(8)
        moves[(1,)](ones(8), out, 8, 4, 0, 8, 4)
        with pytest.raises(Fault, match="4 of 8 elements of a result were never written"):
            sanitize.written(out)
        moves[(1,)](ones(8), out, 6, 8, 0, 8, 8)  # of which two are hidden from the load
        with pytest.raises(Fault, match="2 of 8 elements of a result were never written"):
            sanitize.written(out)


def test_what_is_right_has_no_fault():
    x, out = ones(8), torch.empty(8)
    with Sanitizer("reversed", writes=OUT) as watched:
        moves[(2,)](x, out, 8, 4, 0, 8, 4)
        moves[(2,)](x, x, 8, 4, 0, 8, 4)
        tiles[(2,)](TensorDescriptor(ones(6, 8), [6, 8], [8, 1], [4, 8]), out, 4)
    assert watched.launches == [("moves", 2), ("moves", 2), ("tiles", 2)]
    assert out.tolist() == [8.0] * 6 + [0.0] * 2


# --- The kernels of kernels/ ------------------------------------------------------------------------------------------


TARGETS = {
    "H100": common.Target("cuda", 90, 132, 80 << 30),
    "A100": common.Target("cuda", 80, 108, 80 << 30),
    "MI300": common.Target("hip", 0, 304, 192 << 30),
}
ALL = os.environ.get("EAPCORE_SANITIZE") == "all"


def draw(*shape):
    return torch.randn(shape).half()


def every_kernel():
    """Each kernel at least once, with more than one program where it can have more, and all of its results written."""
    delta, grads, mask = draw(70, 2, 3, 40), draw(30, 2, 3, 40), torch.rand(70, 30) < 0.3
    made = [kernels.edge_scores(delta, grads, mask=mask, impl="triton")]  # in parts, and in one
    made.append(kernels.edge_scores(delta[:, :1, :1, :8], grads[:, :1, :1, :8], mask=mask, impl="triton"))
    for d_head, width in ((16, 80), (20, 75)):  # `tile_grads`, `channel_grads`
        g, weight, c = draw(3, 2, 37, d_head), draw(3, width, d_head), draw(3, d_head)
        norm = kernels.Norm("layernorm", draw(2, 37, width), torch.rand(2, 37), draw(width))
        made.append(kernels.receiver_grads(g, g, weight, norm=norm, w_gamma=c, offset=c, impl="triton"))
    checks.check_steps("cpu", torch.float16)
    q, k, how = draw(2, 2, 40, 8), draw(2, 1, 43, 8), Causal(0.4, window=9)
    made.append(attend(q, k, k, how, 40, impl="triton"))
    for queries in (40, 5):  # `key_grads`, and without
        some = q[:, :, :queries]
        keys = k[:, :, : queries + 3]
        made += attend_grad(some, keys, keys, some, how, queries, impl="triton")
    steps.turn(some, torch.rand(3).double(), 5, out=some, impl="triton")
    sanitize.written(*made)


def ran(watched):
    return {kernel for kernel, _ in watched.launches}


def expected(on):
    """The kernels that a GPU launches."""
    return set(sanitize.kernels()) - (set() if on.descriptors else {"tile_grads", "channel_sums"})


def test_every_kernel_says_what_it_writes():
    found = sanitize.kernels()
    assert set(sanitize.WRITES) == set(found)
    assert all(sanitize.WRITES[name] <= set(kernel.arg_names) for name, kernel in found.items())


@pytest.mark.parametrize("on", TARGETS if ALL else ["H100"])
def test_every_kernel_gives_the_same_bits_in_any_order_of_its_programs(on):
    made = {}
    for order in ("natural", "random"):
        torch.manual_seed(0)
        made[order] = []
        with Sanitizer(order, on=TARGETS[on], digests=made[order]) as watched:
            every_kernel()
        assert ran(watched) == expected(watched.on)
        assert max(programs for _, programs in watched.launches) > 4
    assert made["natural"] == made["random"] and len(made["natural"]) > 40


# --- Sizes that no memory here would hold -----------------------------------------------------------------------------


def meta(*shape, dtype=torch.bfloat16, order=None):
    """A tensor without memory; order: of its axes in memory."""
    made = torch.empty([shape[i] for i in order or range(len(shape))], dtype=dtype, device="meta")
    return made if order is None else made.permute([order.index(i) for i in range(len(shape))])


def test_offsets_that_pass_32_bits_are_named():
    with Virtual(writes=OUT) as watched:
        far[(2**20,)](meta(2**20, 4096), meta(2**20, dtype=torch.float32), 4096, 4096, False, 64)
        with pytest.raises(Fault, match=r"^far, program \d+ of 1048576: int32 does not hold \d{10}$"):
            far[(2**20,)](meta(2**20, 4096), meta(2**20, dtype=torch.float32), 4096, 4096, True, 64)
        with pytest.raises(
            Fault, match=r"program 1048575 of .* loads 4294967296 elements behind the first of x .*beyond"
        ):
            far[(2**20,)](meta(2**20, 4096), meta(2**20, dtype=torch.float32), 4097, 4096, False, 64)
        with pytest.raises(Fault, match=r"loads 4096 elements behind the first of x .*, but no element of what"):
            far[(2**20,)](meta(2**20, 4099)[:, :4096], meta(2**20, dtype=torch.float32), 4097, 4099, False, 64)
        with pytest.raises(Fault, match="of 2147483648: is launched with a number of programs that no grid has"):
            far[(2**31,)](meta(2**20, 4096), meta(2**20, dtype=torch.float32), 4096, 4096, False, 64)
    assert watched.launches[0] == ("far", 2**20)


def test_sizes_of_one_and_zero_launch_no_empty_grid_and_touch_nothing_else():
    calls = smallest_calls()
    with Virtual({"mask": 1}, on=TARGETS["H100"]) as watched:
        for case, _, call in calls if ALL else calls[::7]:
            try:
                call()
            except Fault as fault:
                raise Fault(f"{case}: {fault}") from fault
    assert len(ran(watched)) > 6


def test_what_is_not_specialised_is_an_argument():
    """Triton takes any name there, and does not say where none is meant."""
    lists = {}
    for kernel in sanitize.kernels().values():
        names = kernel.kwargs["do_not_specialize"] or ()
        constant = {name for name, kind in kernel.fn.__annotations__.items() if "constexpr" in str(kind)}
        assert not constant & set(names), kernel.fn.__name__
        lists.setdefault((kernel.fn.__module__, *names), set()).update(kernel.arg_names)
    for (module, *names), arguments in lists.items():
        assert set(names) <= arguments, module


LONGEST = "Llama 3.1 8B, prompts of 131,072"
# S, R, B, T, D, heads, key and value heads, d_head, d_mlp.
SIZES = {
    "GPT-2 small, 1,024 pairs": (157, 445, 1024, 20, 768, 12, 12, 64, 3072),
    "GPT-2 XL, 512 pairs": (1249, 3649, 512, 20, 1600, 25, 25, 64, 6400),
    "13B, 128 pairs": (1641, 4841, 128, 20, 5120, 40, 40, 128, 20480),
    "Llama 3.1 8B, 256 pairs": (1057, 3105, 256, 20, 4096, 32, 8, 128, 14336),
    "Llama 3.1 8B, prompts of 8,192": (1057, 97, 2, 8192, 4096, 32, 8, 128, 14336),
    LONGEST: (25, 49, 8, 131_072, 4096, 32, 8, 128, 14336),
}


def contractions(watched, s, r, b, t, d, *_):
    mask, rows = meta(s, r, dtype=torch.bool), meta(b * t, dtype=torch.int64)
    for order in (None, (1, 2, 0, 3)):  # as torch lays it out, and with positions in front
        delta, grads = (meta(n, b, t, d, order=order) for n in (s, r))
        for reduce in ("all", "pair", "position"):
            if (b if reduce == "pair" else t if reduce == "position" else 1) * s * r < 2**36:
                scores.edge_scores(delta, grads, mask, reduce, None)
    watched.values |= {"rows": b * t - 1, "counts": b * t}
    scores.edge_scores(delta, grads, mask, "all", rows)
    odd = [meta(n, b, t, d + 1)[..., 1:] for n in (s, r)]
    scores.edge_scores(*odd, mask, "all", None)
    single = [meta(n, b, t, d, dtype=torch.float32) for n in (s, r)]
    scores.edge_scores(*single, None, "all", None)


def receivers(watched, s, r, b, t, d, heads, shared, k, _):
    statistics = meta(b, t, d, dtype=torch.float32), meta(b, t, dtype=torch.float32)
    for kind in ("layernorm", "rmsnorm", "none"):
        norm = kernels.Norm("none") if kind == "none" else kernels.Norm(kind, *statistics, meta(d))
        g, c, weight = meta(3 * heads, b, t, k, order=(1, 2, 0, 3)), meta(3 * heads, k), meta(3 * heads, d, k)
        out = meta(3 * heads, b, t, d, order=(1, 2, 0, 3))
        receiver_grads.receiver_grads(g, g, weight, norm, c, c, out)
        if kind != "none":
            sums = meta(3 * heads, 2, b, t, dtype=torch.float32)
            mean = statistics[1] if kind == "layernorm" else None
            raw = kernels.Norm(kind, None, statistics[1], meta(d), statistics[0], mean)
            if watched.on.descriptors:
                receiver_grads.receiver_grads(g, None, weight, raw, c, c, None, sums)
            receiver_grads.receiver_grads(g, None, weight, norm, c, c, out, sums)
    norm = kernels.Norm("layernorm", *statistics, meta(d))
    for g in (meta(3 * heads, b, t, k), meta(3 * heads, b, t, k + 1)[..., 1:]):  # channels far apart; by pointers
        receiver_grads.receiver_grads(g, g, weight, norm, c, c)


def others(watched, s, r, b, t, d, heads, shared, k, m):
    x, hidden, single = meta(1, 2 * b * t, d), meta(1, 2 * b * t, m), torch.float32
    gamma, column = meta(d), meta(1, 2 * b * t, 1, dtype=single)
    run = {"impl": "triton"}
    steps.normalise(x, gamma, gamma, 1e-5, centred=True, **run)
    steps.standardise(x, column, column, **run)
    steps.normalise_grad_added(x, x, column, column, gamma, gamma, x.float(), out=x, **run)
    watched.values |= {"read": t - 1}
    read, total = meta(b, 2, dtype=torch.int64), meta(b, 2, d, dtype=single)
    steps.normalise_grad_added(
        meta(b, t, d), meta(b, t, d), None, meta(b, t, 1, dtype=single), gamma, None, total, read=read, **run
    )
    steps.moved_units(hidden, hidden, "silu", b * t, **run)
    steps.gated_grad(hidden, hidden, hidden, "silu", **run)
    steps.moved_sum_normalised(
        x, x[:, : b * t], x[:, b * t :], gamma, gamma, None, 1e-5, centred=False, kept=meta(b * t, d), **run
    )
    t *= 4 if t > 1000 else 1  # of a head's rows alone
    watched.values |= {"read": t - 1}
    fused = meta(2 * b, t, heads + 2 * shared, k)
    q, key, value = (part.transpose(1, 2) for part in fused.split([heads, shared, shared], 2))
    steps.turn(q, meta(k // 2, dtype=torch.float64), 0, out=q, **run)
    z, sums = meta(2 * b, t, heads, k), meta(3 * heads, 2, 2 * b, t, dtype=single)
    made = ReceiverSums(sums, meta(3 * heads, k), meta(3 * heads, k), d)
    for how in (Causal(0.1), Causal(0.1, 64, 50.0)):
        attend_moved(q, key, value, how, t, None, z, **run)
        attend_grad(q, key, value, z.transpose(1, 2), how, t, None, meta(2 * b, t, 3 * heads, k), sums=made, **run)
    where = meta(2 * b, 2, dtype=torch.int64)
    attend(q[:, :, :2], key, value, how, t, where, **run)
    attend_grad(q[:, :, :2], key, value, q[:, :, :2], how, t, where, **run)


FEW = {(LONGEST, "A100"), (LONGEST, "H100"), ("GPT-2 small, 1,024 pairs", "A100")}


@pytest.mark.parametrize(
    ("sizes", "on"), [(name, on) for name in SIZES for on in TARGETS if ALL or (name, on) in FEW], ids=str
)
def test_no_offset_passes_its_number_or_its_tensor(sizes, on):
    whole = ALL or sizes == LONGEST  # of the others senders alone are so many that 32 bits do not hold their offsets
    with Virtual({"mask": 1}, on=TARGETS[on]) as watched:
        for calls in (contractions, receivers, others) if whole else (contractions,):
            calls(watched, *SIZES[sizes])
    seldom = {"zero_non_edges", "channel_sums"} | ({"key_grads"} if SIZES[sizes][3] <= 32 else set())
    assert ran(watched) >= (expected(watched.on) - seldom if whole else {"partial_scores", "sum_splits"})
