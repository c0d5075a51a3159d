"""The memory that is planned is the memory that is used, and a batch keeps within what is free."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import eapcore.kernels as kernels
import pytest
import torch
from eapcore.kernels.tiling import RECEIVER_TILE
from memory import clear_peak, in_forks, needs_peak, peak_bytes, resident
from models import random_case, random_model, random_pairs
from torch.utils._pytree import tree_leaves

import eapcore.attribution.plan as planning
import eapcore.execution.memory as memory
from eapcore.attribution.attribute import attribute
from eapcore.attribution.dense import pairs_at_once
from eapcore.attribution.methods import Options, Pass, Passes, recipe
from eapcore.attribution.plan import ONE_GRADIENT, Plan
from eapcore.models.config import ModelConfig
from eapcore.tasks import PromptPairs
from eapcore.tasks.metrics import METRICS

MAKES_ALL = kernels.choose("edge_scores_factored", device="cpu", dtype=torch.float32) == "reference"
needs_cpp = pytest.mark.skipif(MAKES_ALL, reason="needs the C++ ops")
GPT2 = ModelConfig(12, 12, 768, 64, 3072, 50257, 1024, "gelu_new", 8.0)
CPU = torch.device("cpu")
GPT2_PLAN = Plan(GPT2, torch.float32, CPU)
SMALL = {"n_heads": 4, "d_model": 64, "d_head": 16, "d_mlp": 256, "d_vocab": 101, "n_ctx": 64, "scale": 0.1}
# (model, pairs, tokens): large enough that one batch's tensors outweigh everything else.
SHAPES = {
    "short prompts": (SMALL | {"n_layers": 4}, 32, 12),
    "long prompts": (SMALL | {"n_layers": 2, "d_model": 32, "d_head": 8, "n_ctx": 512}, 2, 512),
    "attention-only": (SMALL | {"n_layers": 3, "d_mlp": None}, 32, 20),
    "a large vocabulary": (SMALL | {"n_layers": 2, "d_model": 32, "d_head": 8, "d_vocab": 20_000}, 24, 6),
    "one layer": (SMALL | {"n_layers": 1}, 32, 24),
    "one head": (SMALL | {"n_layers": 6, "n_heads": 1, "d_head": 64}, 64, 20),
    "many heads": (SMALL | {"n_layers": 3, "n_heads": 12, "d_model": 48, "d_head": 4, "d_mlp": 192}, 32, 16),
    "no LayerNorm": (SMALL | {"n_layers": 3, "normalization": None}, 32, 20),
    "q k v apart": (SMALL | {"n_layers": 3, "split_qkv": True}, 32, 20),
    "attention-only, q k v apart": (SMALL | {"n_layers": 3, "d_mlp": None, "split_qkv": True}, 32, 20),
    **{str(dtype)[6:]: (SMALL | {"n_layers": 3, "dtype": dtype}, 32, 20)
        for dtype in (torch.float64, torch.bfloat16, torch.float16)},
}  # fmt: skip


# What a process takes: the same.
PROCESSES = {
    "small": (SMALL | {"n_layers": 4}, 64, 20),
    "the width of GPT-2 small": (
        SMALL | {"n_layers": 3, "n_heads": 12, "d_model": 768, "d_head": 64, "d_mlp": 3072}, 8, 20,
    ),
}  # fmt: skip


shapes = pytest.mark.parametrize("shape", SHAPES)


def every_logit(logits, batch):
    """The logit difference, but not the package's own: it may read any logit, so all of them are made."""
    return METRICS["logit_diff"](logits, batch)


@cache
def named_case(shape):
    return case({**SHAPES, **PROCESSES}[shape])


def case(shape):
    """A model, its pairs, and how many pairs and tokens they are."""
    if isinstance(shape, str):
        return named_case(shape)
    options, batch, tokens = shape
    model = random_model(**{"dtype": torch.float32} | options)
    return model, random_pairs(model, [tokens] * batch), batch, tokens


def plan_of(model, impl="auto", passes=ONE_GRADIENT, **sizes):
    groups = model.groups
    return Plan(replace(model.config, **sizes), model.dtype, model.device, impl, groups, passes)


def measured(model, pairs, metric=every_logit, storage="dense", **how):
    """Peak bytes of a task scored as one batch; what is computed once for a model belongs to the model."""
    attribute(model, pairs.select(torch.arange(1)), storage=storage)
    return peak_bytes(lambda: attribute(model, pairs, metric, storage=storage, batch_size=len(pairs), **how))


def assert_within(planned, measured, low=0.95, high=1.05):
    print(f"planned {planned / 2**20:.2f} MiB, measured {measured / 2**20:.2f} MiB: {planned / measured:.3f}")
    assert low <= planned / measured <= high


def test_the_measurement_sees_what_is_allocated_inside_and_freed():
    def call():
        a = torch.zeros(1000, 1000)
        b = a + 1
        del a
        return (b * 2).sum()

    assert peak_bytes(call) == pytest.approx(8e6, rel=0.001)


@pytest.mark.parametrize("impl", ["auto", "reference"])
@shapes
def test_the_planned_memory_is_the_measured_peak(shape, impl):
    model, pairs, *size = case(shape)
    used = measured(model, pairs, impl=impl)
    assert used > 2**21
    assert_within(plan_of(model, impl).dense(*size), used)


def planned_and_measured(shape, method, reduce="all", **how):
    """Bytes of a method's batch as planned, with the steps that run together, and as measured."""
    model, pairs, *size = case(shape)
    passes = recipe(method, model.graph, Options(**how), reduce=reduce).planned("corrupt", reduce)
    plan = plan_of(model, passes=passes)
    together = max(plan.steps_together(*size, passes.alike(done), 1 << 60) for done in range(len(passes.origins)))
    return plan.dense(*size, together), measured(model, pairs, method=method, reduce=reduce, **how)


METHODS = {
    "gauss": {"method": "eap-ig"},
    "right": {"method": "eap-ig", "points": "right", "steps": 5},
    "clean-corrupt": {"method": "clean-corrupt"},
    "activations": {"method": "eap-ig-activations", "steps": 2},
    "exact edges": {"method": "eap", "exact": "last"},
    **{method: {"method": method} for method in ("qk-fix", "grad-drop", "atp-star", "relp")},
}
SOME = ("attention-only", "a large vocabulary", "many heads", "bfloat16")
MORE = (*SOME, "long prompts", "no LayerNorm")


@pytest.mark.parametrize(
    ("shape", "method"),
    [(shape, method) for method in METHODS for shape in (MORE if method == "gauss" else SOME)],
)
def test_the_planned_memory_of_every_method_is_the_measured_peak(shape, method):
    assert_within(*planned_and_measured(shape, **METHODS[method]))


def test_what_a_dry_run_says_that_operations_make_is_what_torch_says(monkeypatch):
    seen, short_cut = set(), planning._made

    def described(tensor):
        strides = [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]
        return tensor.shape, tensor.dtype, strides

    def compared(func, args):
        made = short_cut(func, args)
        if made is not None:
            seen.add(func)
            for ours, theirs in zip(*map(tree_leaves, (made, func(*args))), strict=True):
                assert (ours is None) == (theirs is None)
                assert ours is None or described(ours) == described(theirs), func
        return made

    monkeypatch.setattr(planning, "_made", compared)
    gated = replace(
        GPT2, n_layers=2, normalization="rmsnorm", gated=True, act_fn="silu", rotary_frequencies=(1.0,) * 32
    )
    for config in (replace(GPT2, n_layers=2, act_fn="gelu"), gated):
        for storage in ("dense", "factored"):
            planning._run_dry.__wrapped__(Plan(config, torch.float32, CPU), 3, 7, storage, 1, 1)
    assert seen == set(planning._MADE)


@shapes
def test_what_surely_fits_is_planned_to_fit(shape):
    model, _, *size = case(shape)
    plan, needed = plan_of(model), 1 << 40
    while plan._surely_fits(*size, needed):
        needed //= 2
    assert max(plan.dense(*size), plan.factored(*size)) <= needed


@pytest.mark.parametrize("method", ["eap", "grad-drop"])
def test_sums_for_each_pair_are_planned(method):
    wide = SMALL | {"n_layers": 5, "n_heads": 8, "d_model": 16, "d_head": 2, "d_mlp": 16}
    planned, used = planned_and_measured((wide, 64, 2), method, "pair")
    result = 64 * 46 * 126 * 8  # [N, S, R] of all pairs, which is not a batch's
    assert planned > result
    assert_within(planned + result, used, 0.9, 1.3)


def test_a_metric_that_reads_two_logits_a_pair_takes_no_vocabulary():
    model, pairs, *size = case("a large vocabulary")
    assert_within(plan_of(model, d_vocab=2).dense(*size), measured(model, pairs, "logit_diff"))


@pytest.mark.parametrize("storage", ["dense", "factored"])
@pytest.mark.parametrize("metric", ["prob_diff", "nll", "kl"])
def test_what_a_metric_makes_of_a_large_vocabulary_is_planned(metric, storage):
    model, pairs, *size = case("a large vocabulary")
    plan = plan_of(model, passes=Passes((Pass(0.0, 1.0),), metric=METRICS[metric]))
    planned = {"dense": plan.dense, "factored": plan.factored}[storage](*size)
    assert_within(planned, measured(model, pairs, metric, storage, gradient_at="corrupt"))


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("at_once", [1, 5])
def test_receivers_that_are_made_for_some_pairs_at_a_time_are_planned_so(impl, at_once, limited):
    model, pairs, *size = case((SMALL | {"n_layers": 3, "n_heads": 12, "d_head": 16}, 16, 20))
    one = 37 * 20 * 64 * 4
    limited(workspace=at_once * one)
    assert pairs_at_once(16, one, CPU) == {1: 1, 5: 4}[at_once]
    assert_within(plan_of(model, impl).dense(*size), measured(model, pairs, impl=impl))


@shapes
def test_the_planned_memory_of_factored_storage_is_about_the_measured_peak(shape):
    model, pairs, *size = case(shape)
    makes_all = kernels.choose("edge_scores_factored", device="cpu", dtype=model.dtype) == "reference"
    low, high = (0.8, 1.5) if makes_all else (0.95, 1.05)  # the former is a rough plan: it is never chosen by itself
    used = measured(model, pairs, storage="factored")
    assert_within(plan_of(model).factored(*size), used, low, high)


@pytest.mark.parametrize(("makes", "expected"), [("reference", "dense"), ("triton", "factored")])
def test_factored_storage_is_chosen_only_where_it_saves_memory(monkeypatch, makes, expected):
    monkeypatch.setattr(kernels, "choose", lambda op, **where: makes)
    pairs = many_pairs(100, 20)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1 << 27)
    assert GPT2_PLAN.storage(pairs) == expected
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1 << 40)
    assert GPT2_PLAN.storage(pairs) == "dense"


@needs_cpp
def test_attribute_takes_the_storage_that_is_planned(monkeypatch):
    model, pairs = random_case([5] * 9, dtype=torch.float32)
    # What a quarter of the batch takes; the metric reads three logits a pair.
    quarter = plan_of(model, d_vocab=3).dense(9 // 4, 5)
    for free, expected in ((2 * quarter, "dense"), (2 * quarter - 2, "factored"), (1, "factored"), (1 << 40, "dense")):
        monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: free)
        assert attribute(model, pairs, batch_size=9).meta["storage"] == expected
    # A method that needs more of a batch leaves less room.
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2 * quarter)
    assert attribute(model, pairs, batch_size=9, method="clean-corrupt").meta["storage"] == "factored"


def test_the_plan_counts_the_sender_buffer_in_full():
    buffer = 157 * 16 * 20 * 768 * 4
    one, two = (planning.dense_bytes(GPT2, n, 20, torch.float32, impl="cpp") for n in (16, 32))
    assert 1.2 * buffer < one < 6 * buffer
    assert two / one == pytest.approx(2, rel=0.02)


def many_pairs(count, length):
    return PromptPairs.from_lists([[1] * length] * count, [[2] * length] * count, [3] * count)


@pytest.mark.parametrize(("length", "dtype"), [(1, torch.float32), (20, torch.bfloat16), (200, torch.float32)])
@pytest.mark.parametrize("free", [1 << 20, 1 << 28, 1 << 30, 1 << 33, 1 << 40])
def test_an_automatic_batch_keeps_within_half_of_the_free_memory_and_has_at_least_one_pair(
    monkeypatch, free, length, dtype
):
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    pairs = many_pairs(1000, length)
    plan = Plan(replace(GPT2, n_layers=3), dtype, CPU)
    size = plan.batch_size(pairs)
    assert 1 <= size <= 1000
    useful = max(1, 512 // length)
    if size > 1:
        assert plan.dense(size, length) <= free / 2
    if size < useful:  # one pair more would not keep within it
        assert plan.dense(size + 1, length) > free / 2
    assert size <= useful and (free > 1 << 20 or size == 1) and (free < 1 << 40 or size == useful)


def test_steps_run_together_up_to_a_number_of_tokens_and_of_bytes():
    plan = replace(GPT2_PLAN, config=replace(GPT2, n_layers=2))
    between = (Pass(0.5, 1.0),)  # a pass that makes all of its own activations

    def together(batch, tokens, steps, budget=1 << 40):
        return replace(plan, passes=Passes(between * steps)).steps_together(batch, tokens, steps, budget)

    assert [together(2, 16, n) for n in (1, 2, 5, 32, 40)] == [1, 2, 5, 32, 32]
    assert [together(n, 16, 5) for n in (8, 16, 32, 64, 1000)] == [5, 4, 1, 1, 1]
    five = replace(plan, passes=Passes(between * 5))
    needed = [five.dense(2, 16, n) for n in range(1, 6)]
    assert needed == sorted(set(needed))
    assert [together(2, 16, 5, size - 1) for size in needed] == [1, 1, 2, 3, 4]
    # A method that holds more of a batch takes fewer at a time.
    more = Passes((Pass(1.0, 1.0), *between * 5, Pass(1.0, 1.0), Pass(0.0, 1.0)))
    assert replace(plan, passes=more).steps_together(2, 16, 5, needed[4]) < 5


def test_an_automatic_batch_is_no_larger_than_the_task_and_grows_with_the_memory(monkeypatch):
    assert GPT2_PLAN.batch_size(many_pairs(3, 20)) <= 3
    sizes = []
    for free in (1 << 24, 1 << 29, 1 << 30, 1 << 31, 1 << 36):
        monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: free)
        sizes.append(GPT2_PLAN.batch_size(many_pairs(100, 20)))
    assert sizes == sorted(sizes) and sizes[0] == 1 and sizes[-1] > 10


def test_attribute_runs_in_the_batches_that_are_planned(monkeypatch):
    model, pairs = random_case([5] * 9)
    monkeypatch.setattr(Plan, "batch_size", lambda *args: 4)
    done = []
    attribute(model, pairs, progress=lambda now, total: done.append((now, total)))
    assert done == [(4, 9), (8, 9), (9, 9)]


def test_the_free_memory_is_looked_up():
    free = memory.free_bytes(CPU)
    assert isinstance(free, int) and 1 << 24 < free < 1 << 50


def test_memory_that_torch_holds_for_its_next_tensors_is_free(monkeypatch):
    for name, value in {"mem_get_info": (300, 1000), "memory_reserved": 500, "memory_allocated": 380}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert memory.free_bytes(torch.device("cuda", 0)) == 300 + 500 - 380


# Chunks


def factored_plan(budget, batch=16, impl="auto"):
    plan = replace(GPT2_PLAN, impl=impl)
    rows = plan.chunk(batch, 20, budget)
    return rows, plan.factored(batch, 20, rows)


def test_a_chunk_is_made_smaller_only_where_the_workspace_is_what_does_not_fit(monkeypatch):
    each = 1 << 22  # bytes for a token row of a chunk
    monkeypatch.setattr(kernels, "fast_chunk", lambda *args, **where: 96)
    monkeypatch.setattr(kernels, "workspace_bytes", lambda op, sizes, *, chunk, **where: chunk * each)
    before = GPT2_PLAN.factored(16, 20, 96) - 96 * each
    assert 24 * each < before < 48 * each
    whole, half, quarter = (before + rows * each for rows in (96, 48, 24))
    assert factored_plan(whole) == (96, whole)
    assert factored_plan(whole - 1) == factored_plan(half) == (48, half)
    # With 24 rows the workspace is smaller than the rest: a smaller batch saves more.
    assert factored_plan(half - 1)[0] == factored_plan(quarter - 1)[0] == factored_plan(1)[0] == 24
    # A batch that fits with a smaller chunk is not made smaller.
    monkeypatch.setattr(planning, "budget", lambda device: whole - 1)
    assert GPT2_PLAN.batch_size(many_pairs(16, 20), "factored") == 16
    monkeypatch.setattr(planning, "LEAST_CHUNK", 96)
    assert GPT2_PLAN.batch_size(many_pairs(16, 20), "factored") < 16
    # What no chunk makes smaller is left alone.
    monkeypatch.setattr(planning, "LEAST_CHUNK", 16)
    monkeypatch.setattr(kernels, "workspace_bytes", lambda op, sizes, *, chunk, **where: (400 + chunk) * each)
    assert factored_plan(1)[0] == 96


def test_no_chunk_is_longer_than_the_batch():
    assert factored_plan(1 << 60, batch=1)[0] == 20
    assert factored_plan(1 << 60, batch=2, impl="reference")[0] == 40


@needs_cpp
def test_the_chunk_that_is_planned_is_the_one_that_is_taken_and_changes_no_score(monkeypatch):
    model, pairs = random_case([9] * 12, n_layers=3, n_ctx=16, dtype=torch.float32)
    whole = attribute(model, pairs, storage="factored", batch_size=12).scores
    taken, contract = [], kernels.edge_scores_factored
    monkeypatch.setattr(
        kernels, "edge_scores_factored", lambda *a, **how: taken.append(how["chunk"]) or contract(*a, **how)
    )
    monkeypatch.setattr(Plan, "chunk", lambda *args: 5)
    cut = attribute(model, pairs, storage="factored", batch_size=12).scores
    assert taken == [5, 5]
    assert not torch.equal(cut, whole)
    torch.testing.assert_close(cut, whole, rtol=0, atol=1e-6 * float(whole.abs().max()))


# What a process takes

# Of resident memory that no plan has: pages that are begun, allocations of less than a page, what Python makes.
NOISE = 1 << 20


def resident_for_a_batch(name, storage, threads):
    """How far resident memory rises when a batch comes again."""
    torch.set_num_threads(threads)
    model, pairs, *_ = case(name)
    # Program code, the threads' stacks and what matrix products keep for the next ones are not a batch's.
    attribute(model, pairs, storage=storage, batch_size=len(pairs))
    clear_peak()
    before = resident("VmRSS")
    attribute(model, pairs, storage=storage, batch_size=len(pairs))
    return resident("VmHWM") - before


def planned_with(threads, name, storage):
    model, _, *size = case(name)
    plan = plan_of(model, d_vocab=3)  # of which the metric reads three
    torch.set_num_threads(threads)
    planned = {"dense": plan.dense, "factored": plan.factored}[storage](*size)
    torch.set_num_threads(1)
    return planned


@needs_cpp
@needs_peak
def test_the_resident_memory_of_a_batch_is_within_a_tenth_of_the_plan():
    # A fixed threshold has the C library give memory back that is freed: it would keep it, and count it before.
    environment = {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_WAIT_POLICY": "passive"}
    sizes = [("small", 1), ("small", 8), ("the width of GPT-2 small", 2)]
    cases = [(name, storage, threads) for name, threads in sizes for storage in ("dense", "factored")]
    for (name, storage, threads), used in in_forks(resident_for_a_batch, cases, **environment).items():
        planned, alone = (planned_with(n, name, storage) for n in (threads, 1))
        print(f"{name}: planned {planned / 2**20:.1f} MiB, resident {used / 2**20:.1f} MiB: {planned / used:.3f}")
        assert used - planned <= 0.1 * used + NOISE
        # A thread that comes too late for any of the work touches nothing of its own part.
        assert alone - used <= 0.1 * used + NOISE


@pytest.mark.parametrize(
    "sizes", [(12, 12, 768, 64, 3072), (6, 25, 1600, 64, 6400), (4, 40, 5120, 128, 20480)], ids=["small", "XL", "13B"]
)
def test_on_a_gpu_factors_take_less_memory_than_the_explicit_buffer(sizes, monkeypatch):
    common = pytest.importorskip("eapcore.kernels.triton_common")
    monkeypatch.setattr(common, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # planned for an H100
    monkeypatch.setattr(kernels, "_resolve", lambda *given: "triton")
    config = ModelConfig(*sizes, 3, 1024, "gelu_new", sizes[3] ** 0.5)
    plan = Plan(config, torch.bfloat16, torch.device("cuda"))
    for batch, tokens in ((1, 20), (32, 20), (1, 256)):
        assert plan.factored(batch, tokens) <= plan.dense(batch, tokens)
    # The buffer, three tiles of receivers, what is kept of the clean run and the contraction's partial sums: no more.
    receivers, rows, width = min(3 * RECEIVER_TILE, config.graph.n_receivers), 32 * 20, sizes[2]
    held = (config.graph.n_senders + receivers) * rows * width * 2
    kept = sizes[0] * rows * (3 * sizes[1] * sizes[3] + sizes[4] + 8 * width) * 2
    assert plan.dense(32, 20) <= held + 1.5 * kept + (1 << 29)


def test_a_13b_in_factors_takes_two_and_a_half_times_a_forward_and_backward_at_most(monkeypatch):
    common = pytest.importorskip("eapcore.kernels.triton_common")
    monkeypatch.setattr(common, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(kernels, "_resolve", lambda *given: "triton")
    config = ModelConfig(40, 40, 5120, 128, 20480, 3, 1024, "gelu_new", 128**0.5)
    assert Plan(config, torch.bfloat16, torch.device("cuda")).factored(8, 20) <= 2.5 * (649 << 20)  # of one H200
