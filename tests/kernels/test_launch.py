"""Launching what was made before does what Triton's own launch would do: the same kernel, with the same arguments."""

import itertools
import random
import sys

import pytest

pytest.importorskip("triton")

import torch
import triton
from eapcore.kernels import triton_common as common
from models import ROOT
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

sys.path.insert(0, str(ROOT / "bench"))
from ops.triton_compile import MACHINES, driver

CPU = torch.device("cpu")
DIRECT = pytest.mark.skipif(not common._DIRECT, reason="this version's kernels are launched by Triton alone")


def kernel_of_a_kind(x, y, n, m, scale, WIDE: triton.language.constexpr, BLOCK: triton.language.constexpr):
    pass


class Made(CompiledKernel):
    """What Triton makes, of which nothing is compiled: its launches are kept."""

    run = function = packed_metadata = None

    def __init__(self, launches):
        self.function, self.packed_metadata = object(), object()
        self.run = lambda *given: launches.append((self, given))

    def launch_metadata(self, grid, stream, *args):
        return None

    def __del__(self):
        """Nothing is loaded that could be given back."""


@pytest.fixture
def launched(monkeypatch):
    """A kernel, and the launches so far: what was made, and what it was given."""
    monkeypatch.setattr(triton.runtime.driver, "_active", driver(MACHINES["sm_90"]))
    monkeypatch.setattr(common, "interpreted", lambda: False)
    monkeypatch.setattr(common, "_calls", {})
    kernel = JITFunction(kernel_of_a_kind, do_not_specialize=["m"])
    launches = []

    def make(key, signature, device, *args, **named):
        return kernel.device_caches[device][0].setdefault(key, Made(launches))

    kernel._do_compile = make
    return kernel, launches


def arguments():
    """Tensors of several dtypes, at addresses divisible by 16 and others, none; numbers of every kind that Triton tells
    apart, and a descriptor of each block."""
    memory = torch.zeros(64)
    tensors = [memory, memory[1:], memory[4:], memory.half(), memory.int(), memory[:0], torch.nn.Parameter(memory)]
    described = [TensorDescriptor(memory.view(8, 8), [8, 8], [8, 1], [1, n]) for n in (4, 8)]
    numbers = [0, 1, 2, 16, 17, 2**31 - 1, 2**31, 2**31 + 1, 2**40, -1, True, False, 1.0, 0.5, None]
    found = [(x, y, 3, 4, 0.5) for x, y in itertools.product([*tensors, *described], [memory, memory[1:], None])]
    found += [(memory, None, n, m, 0.5) for n, m in itertools.product(numbers, [1, 16, 5, 2**31, 1.0, True])]
    return found + [(memory, memory, 1, 1, scale) for scale in (0.5, 1, 1.0, 16, True)]


def plain(given):
    """What reaches the launcher, tensors by their addresses."""
    _, *rest = given
    values = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in rest]
    return [(type(x), x) for x in values]


@DIRECT
def test_what_was_made_before_is_launched_as_triton_would(launched):
    kernel, launches = launched
    choices = ((True, 16, 4), (1, 16, 4), (False, 16, 4), (True, 32, 4), (True, 16, 8))
    metas = [{"WIDE": wide, "BLOCK": block, "num_warps": warps} for wide, block, warps in choices]
    metas += [{"num_warps": 4, "BLOCK": 32, "WIDE": True}, {"BLOCK": True, "WIDE": 16}]
    calls = [*itertools.product(arguments(), metas[:1]), *itertools.product(arguments()[::7], metas)] * 2
    random.Random(0).shuffle(calls)
    passed = 0
    for args, meta in calls:
        binds = kernel.run
        kernel[(3,)](*args, **meta, **common.FUSED)
        kernel.run = None  # whoever binds now would fail
        try:
            common.launch(kernel, 3, *args, device=CPU, **meta)
            passed += 1
        except TypeError:
            kernel.run = binds
            common.launch(kernel, 3, *args, device=CPU, **meta)
        kernel.run = binds
        (expected, by_triton), (found, direct) = launches[-2:]
        assert found is expected, (args, meta)
        assert plain(direct[:6]) == plain(by_triton[:6]) and plain(direct[9:]) == plain(by_triton[9:])
    assert passed >= len(calls) // 2


@DIRECT
def test_profilers_are_told_of_every_launch(launched, monkeypatch):
    kernel, launches = launched
    args, meta = (torch.zeros(4), None, 1, 1, 0.5), {"WIDE": True, "BLOCK": 4}

    def given():
        common.launch(kernel, 1, *args, device=CPU, **meta)
        return launches[-1][1]

    given()
    assert given()[6:9] == (None, None, None)
    told = []
    kernel.add_pre_run_hook(lambda *args, **meta: told.append(1))
    given()
    assert told == [1]
    kernel.pre_run_hooks.clear()
    for name in ("launch_enter_hook", "launch_exit_hook"):
        with monkeypatch.context() as here:
            here.setattr(triton.knobs.runtime, name, told.append)
            assert told.append in given()[6:9]
    triton.knobs.runtime.launch_enter_hook.add(told.append)
    try:
        assert given()[7] is triton.knobs.runtime.launch_enter_hook
    finally:
        triton.knobs.runtime.launch_enter_hook.remove(told.append)
    assert given()[7] is None


def test_products_and_sums_are_fused_whatever_triton_does_of_itself(launched, monkeypatch):
    kernel, _ = launched
    monkeypatch.setattr(triton.knobs.language, "default_fp_fusion", False)
    kernel._do_compile = lambda key, signature, device, constants, options, *rest: asked.append(options)
    asked = []
    common.launch(kernel, 1, torch.zeros(4), None, 1, 1, 0.5, device=CPU, WIDE=True, BLOCK=4)
    assert [options.enable_fp_fusion for options in asked] == [True]


def test_another_version_of_triton_launches_by_itself(launched, monkeypatch):
    kernel, launches = launched
    monkeypatch.setattr(common, "_DIRECT", False)
    for _ in range(2):
        common.launch(kernel, 1, torch.zeros(4), None, 1, 1, 0.5, device=CPU, WIDE=True, BLOCK=4)
        assert isinstance(launches[-1][1][9], torch.Tensor)


def test_tensors_on_another_device_are_launched_there(launched, monkeypatch):
    kernel, launches = launched
    entered = []

    class There:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            entered.append(self.device)

        def __exit__(self, *error):
            entered.append(None)

    monkeypatch.setattr(torch.cuda, "device", There)
    for device in (torch.device("cuda", 0), torch.device("cuda", 1)):
        common.launch(kernel, 1, torch.zeros(4), None, 1, 1, 0.5, device=device, WIDE=True, BLOCK=4)
    assert entered == [torch.device("cuda", 1), None] and len(launches) == 2


@DIRECT
def test_no_more_is_kept_than_so_many_shapes(launched, monkeypatch):
    kernel, _ = launched
    monkeypatch.setattr(common, "_MOST_MADE", 5)
    for n in range(17):
        common.launch(kernel, 1, torch.zeros(4), None, n, 1, 0.5, device=CPU, WIDE=True, BLOCK=4)
    assert sum(len(call.made) for call in common._calls.values()) <= 5
