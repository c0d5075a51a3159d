"""Before anything imports triton or huggingface_hub: interpret kernels where there is no GPU, and use no network."""

import contextlib
import dataclasses
import os

import accel  # noqa: F401 - before torch takes its first derivative, which counts the devices that there are
import numpy as np
import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# The tests' models are small: a second thread would only wait, in other processes too. Tests of threads set their own
# number.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


def patch_once():
    """Triton's interpreter replaces its language's functions at every launch, and again at every call of a function
    inside a kernel, which takes longer than the small kernels here: do it once for each file of kernels."""
    from triton.runtime import interpreter

    patch, patched = interpreter._patch_lang, set()

    def patch_if_new(fn):
        if id(fn.__globals__) not in patched:
            patched.add(id(fn.__globals__))
            patch(fn)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch_if_new

    def fits(self, a, b, operation):
        """What Triton's own check computes, and without a debug option forgets, in fewer steps."""
        kind, exact = a.type.scalar, {"add": np.add, "sub": np.subtract, "mul": np.multiply}[operation.__name__]
        if kind.int_bitwidth < 64:
            made = exact(a.handle.data, b.handle.data, dtype=np.int64)
            if made.min() < kind.get_int_min_value() or made.max() > kind.get_int_max_value():
                raise OverflowError(f"{kind} does not hold {made.max() if made.max() > 0 else made.min()}")

    interpreter.TritonSemantic.binary_op_sanitize_overflow_impl = fits


with contextlib.suppress(ImportError, AttributeError):  # no triton, or one that is made otherwise
    if os.environ.get("TRITON_INTERPRET") == "1":
        patch_once()


@pytest.fixture
def limited(monkeypatch):
    """A function that sets some of the CPU's limits."""
    import eapcore.attribution.plan as plan
    import eapcore.execution.limits as limits

    def limit(**values):
        plan._run_dry.cache_clear()
        monkeypatch.setitem(limits.TABLE, "cpu", dataclasses.replace(limits.TABLE["cpu"], **values))

    yield limit
    plan._run_dry.cache_clear()
