"""Every Triton kernel in every tiling compiles for GPUs that are not here, and fits them.

bench/triton_compile.py does the compiling, each target in a child process; this file judges its rows.
"""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("triton")

PATH = Path(__file__).resolve().parents[1] / "bench" / "triton_compile.py"


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    """bench/triton_compile.py as a module; bench/ is no package."""
    spec = importlib.util.spec_from_file_location("triton_compile", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def rows(bench):
    return bench.compile_all(list(bench.MACHINES))


def names(rows) -> list[str]:
    return [f"{row.target}: {row.case}: {row.kernel} {row.config}" for row in rows]


def test_every_target_and_kernel_is_there(bench, rows):
    kernels = {"partial_scores", "sum_splits", "zero_non_edges", "channel_grads"}
    for target in bench.MACHINES:
        assert {row.kernel for row in rows if row.target == target} == kernels, target


def test_no_register_spills(rows):
    assert not names([row for row in rows if row.spills])


def test_shared_memory_fits_the_device(rows):
    assert not names([row for row in rows if row.shared > row.shared_limit])


def test_products_in_low_precision_use_tensor_cores(rows):
    products = [row for row in rows if row.expects == "tensor"]
    assert {row.target for row in products} == {row.target for row in rows}
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
