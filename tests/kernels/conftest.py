"""Launches are watched (tests/support/sanitize.py). Compiling the Triton kernels for GPUs takes minutes: it goes on
beside all other tests, and is judged behind them."""

import os
import signal
import subprocess
import sys

import eapcore.kernels as kernels
import pytest
from models import ROOT

COMPILE = """
import dataclasses, json, sys
sys.path.insert(0, sys.argv[1])
import triton_compile as bench
print(json.dumps([dataclasses.asdict(row) for row in bench.compile_all(list(bench.MACHINES), int(sys.argv[2]))]))
"""
COMPILED = pytest.StashKey()


def of_compiling(item):
    return item.path.name == "test_triton_compile.py"


def pytest_collection_modifyitems(items):
    items.sort(key=of_compiling)


def pytest_collection_finish(session):
    chosen = [of_compiling(item) for item in session.items]
    if any(chosen) and not session.config.option.collectonly:
        command = [sys.executable, "-c", COMPILE, str(ROOT / "bench" / "ops"), "2"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started = subprocess.Popen(command, **pipes, start_new_session=True, preexec_fn=lambda: os.nice(10))
        session.config.stash[COMPILED] = started


def pytest_unconfigure(config):
    started = config.stash.get(COMPILED, None)
    if started is not None and not started.stdout.closed:  # nobody waited for it
        if started.poll() is None:
            os.killpg(started.pid, signal.SIGTERM)
        started.communicate()


@pytest.fixture(scope="session")
def compiled(request):
    """What was compiled, as JSON."""
    started = request.config.stash[COMPILED]
    out, err = started.communicate()
    assert started.returncode == 0, err
    return out


@pytest.fixture(autouse=True)
def sanitized(request):
    """Every launch in Triton's interpreter is watched, its programs in random order: but where allocations are counted,
    or more memory is addressed than there is."""
    counts = request.path.name in ("test_workspace.py", "test_sanitize.py") or "address_space" in request.fixturenames
    if counts or os.environ.get("TRITON_INTERPRET") != "1" or kernels.available()["triton"]:
        yield
        return
    import sanitize

    with sanitize.Sanitizer("random"):
        yield
