"""Every Triton kernel in every tiling compiles for GPUs that are not here, and fits them.

bench/ops/triton_compile.py does the compiling, each target in a child process; this file judges its rows.
"""

import json
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")
TARGETS = {"sm_80", "sm_90", "sm_100", "gfx942"}


@pytest.fixture(scope="module")
def rows(compiled):
    return [SimpleNamespace(**row) for row in json.loads(compiled)]


def names(rows) -> list[str]:
    return [f"{row.target}: {row.case}: {row.kernel} {row.config}" for row in rows]


def test_every_target_and_kernel_is_there(rows):
    kernels = {"partial_scores", "sum_splits", "zero_non_edges", "channel_grads", "attend_rows", "query_grads"}
    kernels |= {"key_grads", "unit_rows", "gated_grads", "sum_rows", "turn_rows", "normalise_rows", "standardise_rows"}
    kernels |= {"normalise_grad_rows"}
    for target in TARGETS:
        walked = {"tile_grads", "channel_sums"} if target in ("sm_90", "sm_100") else set()
        assert {row.kernel for row in rows if row.target == target} == kernels | walked, target


def test_no_register_spills(rows):
    assert not names([row for row in rows if row.spills])


def test_shared_memory_fits_the_device(rows):
    assert not names([row for row in rows if row.shared > row.shared_limit])


def test_products_in_low_precision_use_tensor_cores(rows):
    products = [row for row in rows if row.expects == "tensor"]
    assert {row.target for row in products} == TARGETS
    assert not names([row for row in products if row.tensor == 0])


def test_exact_float32_products_do_not_use_tf32(rows):
    exact = [row for row in rows if row.expects == "fma"]
    assert {row.target for row in exact} == {"sm_80", "sm_90", "sm_100"}
    assert not names([row for row in exact if row.tensor or not row.fma])


def test_hopper_and_blackwell_load_through_descriptors(rows):
    large = [row for row in rows if row.case == "edge_scores bf16, XL" and row.kernel == "partial_scores"]
    with_descriptors = {row.target for row in large if "descriptors" in row.config.split()}
    assert with_descriptors == {"sm_90", "sm_100"}
    assert all("descriptors" in row.config.split() for row in large if row.target in with_descriptors)


def test_compiling_takes_seconds(rows):
    # What a first call waits for: one tiling of each kernel, 0.3 to 2 s each; the bound leaves room for a busy machine.
    assert max(row.seconds for row in rows) < 60
