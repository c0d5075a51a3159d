"""Where eapcore is installed and run: other versions, folders, locales, streams and interpreters than these tests'."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib

import eapcore.kernels as kernels
import numpy as np
import pytest
import torch
from eapcore.kernels import here
from models import ROOT

import eapcore.attribution.plan as planning
from eapcore.cli import main
from eapcore.graph.files import replacing


def test_the_extras_that_are_named_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    files = [ROOT / "README.md", *(ROOT / "eapcore").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    named = {name for file in files for name in re.findall(r"eapcore\[(\w+)]'", file.read_text(encoding="utf-8"))}
    assert {"gguf", "parquet", "report", "tokenizers"} <= named <= set(extras)


@pytest.mark.parametrize(("triton_version", "numpy_version", "interprets", "fits"), [
    ("3.6.0", "2.4.0", True, False), ("3.6.0+git1", "2.10.1", True, False), ("3.6.0", "3.0.0rc1", True, False),
    ("3.6.0", "2.3.5", True, True), ("3.6.0", "2.5.2", False, True), ("3.10.0", "2.5.2", True, True),
])  # fmt: skip
def test_an_interpreter_that_this_numpy_breaks_is_refused(monkeypatch, triton_version, numpy_version, interprets, fits):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton, "__version__", triton_version)
    monkeypatch.setattr(np, "__version__", numpy_version)
    reason = here.no_triton.__wrapped__(interprets)
    assert (not reason) == fits
    assert (
        fits or f"triton {triton_version}'s interpreter needs numpy below 2.4, and numpy is {numpy_version}" in reason
    )


def test_a_package_that_is_there_but_broken_is_not_called_absent(monkeypatch, tmp_path):
    (tmp_path / "triton.py").write_text("import no_such_module")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "triton"]:
        monkeypatch.delitem(sys.modules, name)
    reason = here.no_triton.__wrapped__(False)
    assert reason == "the package triton cannot be imported (No module named 'no_such_module')"
    monkeypatch.setitem(sys.modules, "triton", None)
    assert here.no_triton.__wrapped__(False) == "the package triton is not installed"


def test_a_gpu_without_triton_runs_torch_s_operations_and_says_so_once(monkeypatch, caplog, capsys, request):
    planning._run_dry.cache_clear()
    request.addfinalizer(planning._run_dry.cache_clear)
    for name in [name for name in sys.modules if name.startswith(("triton", "eapcore.kernels.triton_"))]:
        monkeypatch.delitem(sys.modules, name)
    for name in [name for name in vars(kernels) if name.startswith("triton_")]:
        monkeypatch.delattr(kernels, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(here, "no_triton", here.no_triton.__wrapped__)
    here.say_once.cache_clear()
    assert kernels.choose("edge_scores", device="cuda", dtype=torch.bfloat16) == "reference"
    # Such a model is planned by the code that would run.
    assert main(["info", "toy-ioi", "--device", "cuda", "--memory", "80", "--tokens", "20"]) == 0
    assert "auto takes reference" in capsys.readouterr().out
    said = [record.getMessage() for record in caplog.records if "GPU's kernels are not here" in record.getMessage()]
    assert len(said) == 1 and said[0].endswith("the package triton is not installed")


def test_an_argument_that_no_file_can_hold_and_a_folder_that_is_gone_are_refused(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["run", "--out", "o\udcff"])
    assert "arguments must be UTF-8, got 'o\\udcff': " in capsys.readouterr().err
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(SystemExit, match="2"):
        main(["info"])
    assert "the current folder does not exist any more" in capsys.readouterr().err


def test_a_full_disk_is_told_with_the_file_that_did_not_fit(tmp_path):
    resource = pytest.importorskip("resource")
    kept, (soft, hard) = tmp_path / "kept", resource.getrlimit(resource.RLIMIT_FSIZE)
    kept.write_text("old")
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))  # no file may grow beyond
    try:
        with pytest.raises(OSError, match="kept cannot be written: File too large"), replacing(kept) as written:
            written.write_bytes(bytes(200))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert kept.read_text() == "old" and [*tmp_path.iterdir()] == [kept]


def test_python_s_options_o_and_oo_leave_out_nothing_that_does_work():
    for file in [*(ROOT / "eapcore").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        text = file.read_text(encoding="utf-8")
        for line in re.findall(r"^ *assert (.*)", text, re.M):
            assert {*re.findall(r"(\w*)\(", line)} <= {"isinstance"} and ":=" not in line, (file, line)
        assert not re.search(r"__doc__(?! or )", text), file


@pytest.mark.skipif(os.name != "posix", reason="these are a shell's")
def test_a_bare_environment_is_enough(tmp_path):
    """Spaces and other letters in every path, no home, no temporary folder, no locale, warnings as errors, files for
    their owner alone, no standard input, and a reader that goes after a line."""
    source = tmp_path / "ä b's 日本"
    source.mkdir()
    for name in ("eapcore", "kernels"):
        (source / name).symlink_to(ROOT / name)
    command = f"umask 077; exec <&-; {sys.executable} -W error -m eapcore run --n-pairs 2 --out 'ö ut'"
    environment = {"PYTHONPATH": str(source), "TMPDIR": "/nonexistent", "LC_ALL": "C", "OMP_NUM_THREADS": "1"}
    shell = ["/bin/bash", "-c", f"{command} | head -1; exit ${{PIPESTATUS[0]}}"]
    environment["PATH"] = os.environ["PATH"]
    done = subprocess.run(shell, cwd=source, env=environment, capture_output=True, timeout=120)
    assert (done.returncode, done.stderr.decode()) == (0, "") and done.stdout.startswith(b"model ")
    found = {path.name: path.stat().st_mode & 0o777 for path in (source / "ö ut").iterdir()}
    assert "scores.safetensors" in found and set(found.values()) == {0o600}
