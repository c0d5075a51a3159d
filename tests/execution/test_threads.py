"""Threads: no more than pay, none that spin in a command, and none after a fork that would wait forever."""

from __future__ import annotations

import dataclasses
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import eapcore.kernels as kernels
import pytest
import torch
from models import ROOT, random_model

from eapcore.attribution.attribute import attribute
from eapcore.models.torch_modes import own_modes
from eapcore.patching.edges import patch_edges
from eapcore.search.acdc import acdc
from eapcore.tasks import PromptPairs


@pytest.fixture
def threads(monkeypatch):
    """Three threads that nobody chose."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield 3
    torch.set_num_threads(before)


def test_small_work_takes_one_thread_and_leaves_the_number_as_it_was(threads, monkeypatch):
    model = random_model()
    pairs = PromptPairs.from_lists([[1, 2, 3]], [[1, 4, 3]], [5], [6])
    seen = []

    def metric(logits):
        seen.append(torch.get_num_threads())
        return logits[:, 5] - logits[:, 6]

    for call in (
        lambda: attribute(model, pairs, metric),
        lambda: attribute(metric=metric, task=pairs, model=model),
        lambda: patch_edges(model, pairs, metric),
        lambda: acdc(model, pairs, metric, threshold=0.1),
    ):
        call()
        assert set(seen) == {1} and torch.get_num_threads() == threads
        seen.clear()
    with pytest.raises(ZeroDivisionError):
        attribute(model, pairs, lambda logits: 1 / 0)
    assert torch.get_num_threads() == threads
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    attribute(model, pairs, metric)
    assert set(seen) == {3}


def test_larger_work_takes_as_many_as_it_is_worth(threads):
    used = own_modes(lambda model: torch.get_num_threads())
    config = random_model().config
    for d_model, expected in ((64, 1), (128, 2), (768, threads)):
        large = dataclasses.replace(config, d_model=d_model, n_heads=d_model // config.d_head, d_mlp=4 * d_model)
        assert used(SimpleNamespace(config=large, device=torch.device("cpu"))) == expected
        assert used(SimpleNamespace(model=SimpleNamespace(config=large, device=torch.device("cpu")))) == expected
    assert used(SimpleNamespace(config=config, device=torch.device("cuda"))) == threads
    assert used("no model") == threads and torch.get_num_threads() == threads


def test_kernels_that_are_not_built_are_said_once(monkeypatch, caplog):
    import eapcore.kernels.cpp as cpp

    monkeypatch.setattr(cpp, "_why_not", "nothing was built, in a test")
    with caplog.at_level(logging.WARNING, "eapcore"):
        for _ in range(3):
            assert kernels.choose("edge_scores", device="cpu", dtype=torch.float32) == "reference"
    (record,) = caplog.records
    assert "torch's own operations take about twice the time: nothing was built" in record.getMessage()


PROGRAM = """
import os, sys, time
import eapcore.cli
assert "torch" not in sys.modules
assert eapcore.cli.main(["info"]) == 0
assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"

import torch
import eapcore.kernels as kernels
from eapcore.kernels import cpp
built = "{built}"
assert kernels.available()["cpp"] == "" and (not built or cpp._csrc.__file__ == built), kernels.available()

torch.set_num_threads(2)
x = torch.randn(600, 600)
delta, grads = torch.randn(20, 2, 9, 64), torch.randn(30, 2, 9, 64)
def work():
    return (x @ x).sum() + torch.randn(10**6).exp().sum() + kernels.edge_scores(delta, grads).sum()
work()
child = os.fork()
if child == 0:
    work()
    os._exit(7 + (torch.get_num_threads() != 1))
for _ in range(300):
    done, status = os.waitpid(child, os.WNOHANG)
    if done:
        assert os.waitstatus_to_exitcode(status) == 7, status
        break
    time.sleep(0.1)
else:
    os.kill(child, 9)
    sys.exit("the child of a fork waits forever")
assert torch.get_num_threads() == 2
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_command_waits_asleep_a_fork_goes_on_and_a_source_tree_finds_what_is_installed(tmp_path):
    """In one process, which loads torch anew: the policy is read then, and OpenMP's threads are its own."""
    import eapcore.kernels.cpp as cpp

    if cpp.why_not():
        pytest.skip("the C++ ops are not built here")
    source = tmp_path / "source" / "eapcore"
    source.mkdir(parents=True)
    for path in (ROOT / "eapcore").iterdir():
        if not path.name.startswith(("_csrc", "__pycache__")):
            (source / path.name).symlink_to(path)
    (source / "kernels").symlink_to(ROOT / "kernels")
    installed = tmp_path / "installed" / "eapcore"
    installed.mkdir(parents=True)
    built = Path(cpp._csrc.__file__)
    (installed / built.name).symlink_to(built)
    skipped = {"OMP_WAIT_POLICY", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "GOMP_SPINCOUNT"}
    environment = {name: value for name, value in os.environ.items() if name not in skipped}
    environment["PYTHONPATH"] = os.pathsep.join([str(source.parent), str(installed.parent)])
    program = PROGRAM.format(built=installed / built.name)
    # Python 3.12 and newer warn of what is tried here.
    command = [sys.executable, "-W", "ignore:This process:DeprecationWarning", "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
