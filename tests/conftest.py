"""Before anything imports triton or huggingface_hub: interpret kernels where there is no GPU, and use no network."""

import dataclasses
import os

import accel  # noqa: F401 - before torch takes its first derivative, which counts the devices that there are
import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# The tests' models are small: a second thread would only wait, in other processes too. Tests of threads set their own
# number.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


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
