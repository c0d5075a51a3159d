"""What a command prints never costs its result, and what it writes never costs what it reads."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from models import ROOT, save_checkpoint

import eapcore.cli as cli
from eapcore.cli import main
from eapcore.graph.scores import EdgeScores

COMMANDS = {
    "run": ["--top-n", "9"],
    "attribute": ["--top-n", "9"],
    "patch": ["--nodes"],
    "acdc": ["--threshold", "0.1"],
    "probe": ["--steps", "2"],
    "path": ["--path", "a0.h1->a1.h0<q>->logits"],
    "evaluate": [],
    "verify": ["--top-n", "9", "--curve", "embed->logits"],
}


def test_every_command_that_writes_a_result_is_here():
    assert {name.__name__.split(".")[-1] for name in cli.COMMANDS} == {
        *COMMANDS,
        "info",
        "report",
        "mib",
        "sweep",
        "reproduce",
    }


class Failing(io.TextIOBase):
    """A stream that takes nothing: a full disk, a reader that has gone, a terminal that was closed."""

    def __init__(self, error):
        self.error = error

    def write(self, text):
        raise self.error

    flush = isatty = lambda self: self.write("")

    def close(self):
        """Nothing: from Python 3.13 on it is reported if a stream that is no longer used cannot be flushed."""


def argv(command, checkpoint, out):
    shared = ["--model", str(checkpoint), "--task", "sort", "--n", "4", "--device", "cpu", "--out", str(out)]
    return [command, *COMMANDS[command], *shared]


def test_a_table_of_methods_is_written_whatever_stdout_does(checkpoint, tmp_path, monkeypatch):
    shared = argv("evaluate", checkpoint, tmp_path / "circuits")[1:]
    monkeypatch.setattr(sys, "stdout", Failing(OSError(28, "No space left on device")))
    assert main(["mib", "--methods", "eap", *shared]) == 0
    assert len([path for path in (tmp_path / "circuits").rglob("*.json") if path.stat().st_size]) == 2


def content(out):
    return {path.name: path.read_bytes() for path in (out.iterdir() if out.is_dir() else [out])}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_result_is_written_whatever_stdout_does(checkpoint, tmp_path, monkeypatch, capsys, command):
    assert main(argv(command, checkpoint, tmp_path / "expected")) == 0
    lines = capsys.readouterr().out.splitlines()
    streams = {
        "full": Failing(OSError(28, "No space left on device")),
        "head": Failing(BrokenPipeError(32, "Broken pipe")),
        "ascii": io.TextIOWrapper(io.BytesIO(), "ascii"),
    }
    for name, stream in streams.items():
        with monkeypatch.context() as patched:
            patched.setattr(sys, "stdout", stream)
            assert main(argv(command, checkpoint, tmp_path / name)) == 0
        err = capsys.readouterr().err
        assert err == ("eapcore: not all could be printed: [Errno 28] No space left on device\n" * (name == "full"))
        found, expected = content(tmp_path / name), content(tmp_path / "expected")
        assert len(found) == len(expected) == (5 if command == "run" else 1)
        if command != "run":
            assert [*found.values()] == [*expected.values()]
        else:
            assert found == expected
    ascii_lines = streams["ascii"].buffer.getvalue().decode("ascii").splitlines()
    assert len(ascii_lines) == len(lines) and r"\xd7" in ascii_lines[0]  # ×


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_stream_that_is_not_there_costs_nothing(checkpoint, tmp_path, monkeypatch, capsys, stream):
    monkeypatch.setattr(sys, stream, None)
    assert main(argv("patch", checkpoint, tmp_path / "file")) == 0
    with pytest.raises(SystemExit):
        main(["patch", "--n", "0"])  # of which nobody is told
    assert (tmp_path / "file").stat().st_size
    assert getattr(sys, stream) is None


def test_a_terminal_that_goes_away_costs_nothing(checkpoint, tmp_path, monkeypatch):
    class Gone(Failing):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Gone(OSError(5, "Input/output error")))
    assert main(argv("patch", checkpoint, tmp_path / "file")) == 0
    assert (tmp_path / "file").stat().st_size


def test_a_process_with_a_full_disk_under_its_log_and_stderr_closed_writes_its_result(checkpoint, tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("the system has no /dev/full")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "eapcore", *argv("attribute", checkpoint, tmp_path / "scores")]
    script = 'exec "$@" >/dev/full 2>&- <&-'
    done = subprocess.run(["sh", "-c", script, "sh", *command], cwd=tmp_path, env=environment, timeout=120)
    assert done.returncode == 0
    assert EdgeScores.load(tmp_path / "scores").graph.n_edges == 46
    assert [path.name for path in tmp_path.iterdir()] == ["scores"]


def test_what_a_terminal_would_obey_is_shown_as_escapes(checkpoint, tmp_path, capsys):
    name = "a\x1b]0;title\x07\x9b31m\u202eb"
    status = main(["run", "--model", str(checkpoint), "--task", name, "--out", str(tmp_path / "out")])
    printed = capsys.readouterr()
    assert status == 2 and not printed.out
    assert r"a\x1b]0;title\x07\x9b31m\u202eb" in printed.err.replace("\\\\", "\\")
    with pytest.raises(SystemExit):
        main(["run", "--n", "\x1b[31m" + "9" * 10**6 + "x"])
    shown = capsys.readouterr().err
    assert "\x1b" not in shown and len(shown) < 2000
    status = main(["run", "--model", str(checkpoint), "--task", "x" * 10**6, "--out", str(tmp_path / "out")])
    assert status == 2 and len(capsys.readouterr().err) < 2000


def test_a_result_whose_place_fails_at_the_end_is_kept_elsewhere(checkpoint, tmp_path, monkeypatch, capsys):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "elsewhere"))
    for command in ("attribute", "run"):
        out = tmp_path / "out" / command
        out.parent.mkdir()
        before = cli.run.write

        def no_place(args, result, path=None, out=out, before=before):
            shutil.rmtree(out.parent, ignore_errors=True)  # somebody has put a file there meanwhile
            out.parent.write_text("in the way")
            before(args, result, path)

        monkeypatch.setattr(f"eapcore.cli.{command}.write", no_place)
        assert main(argv(command, checkpoint, out)) == 2
        (kept,) = (tmp_path / "elsewhere").rglob("*.safetensors" if command == "run" else "attribute")
        assert EdgeScores.load(kept).graph.n_edges == 46
        assert f"the result is kept in {kept}" in capsys.readouterr().err
        shutil.rmtree(kept.parent)
        out.parent.unlink()


def test_run_keeps_its_scores_when_what_follows_fails_and_its_files_stay_a_set(eapcore, tmp_path, monkeypatch):
    def fails(*arguments, **options):
        raise RuntimeError("out of luck")

    early = "scores.unfinished.safetensors"
    with monkeypatch.context() as patched:
        patched.setattr("eapcore.search.smallest.run_until", fails)
        assert eapcore("run", out="first")[0] == 2
        assert set(content(tmp_path / "first")) == {"scores.safetensors"}
    assert eapcore("run", out="out")[0] == 0
    before = content(tmp_path / "out")
    assert set(before) == {"scores.safetensors", "edges.csv", "circuit.json", "prompts.json", "run.json"}
    with monkeypatch.context() as patched:
        patched.setattr("eapcore.search.smallest.run_until", fails)
        assert eapcore("run", "--seed", 1, out="out")[0] == 2
    after = content(tmp_path / "out")
    assert after.pop(early) != before["scores.safetensors"] and after == before
    with monkeypatch.context() as patched:
        patched.setattr("eapcore.graph.circuit.Circuit.save", fails)
        assert eapcore("run", "--seed", 1, out="out")[0] == 2
    after = content(tmp_path / "out")
    assert after.pop(early) and after == before
    assert eapcore("run", "--seed", 1, out="out")[0] == 0
    after = content(tmp_path / "out")
    assert set(after) == set(before) and all(after[name] != before[name] for name in before)


def test_nothing_that_is_read_is_written_over(eapcore, model, score_file, tmp_path):
    folder = save_checkpoint(model, tmp_path / "model")
    (folder / "tokenizer.json").write_text("{}")  # read by nobody: the tasks are token ids
    (folder / "linked").symlink_to(folder / "config.json")
    task = tmp_path / "task.jsonl"
    task.write_text('{"clean": [1, 2], "corrupt": [1, 3], "answer": 4, "wrong": 5}')
    (tmp_path / "table").mkdir()
    shutil.copy(task, tmp_path / "table" / "edges.csv")
    weights = next(path.name for path in folder.iterdir() if path.suffix == ".safetensors")
    outs = {
        **dict.fromkeys([f"model/{weights}", "model/config.json", "model/tokenizer.json", "model/linked"], "--model"),
        "task.jsonl": "--task",
        "scores.safetensors": "--scores",
    }
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    shared = ["--model", folder, "--task", task]
    for out, option in outs.items():
        scored = ["--scores", score_file] if option == "--scores" else []
        status, printed, _ = eapcore("verify", *shared, *scored, out=out)
        assert status == 2 and f"--out would write over {out}, which {option} reads" in printed
    status, printed, _ = eapcore("attribute", "--tokenizer", folder, out="model/tokenizer.json")
    assert status == 2 and "which --tokenizer reads" in printed
    status, printed, _ = eapcore("run", *shared[:2], "--task", "table/edges.csv", out="table")
    assert status == 2 and "table/edges.csv, which --task reads" in printed
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    (folder / "tokenizer.json").unlink()
    for _ in range(2):  # what eapcore wrote there itself, it may write again
        assert eapcore("attribute", *shared, "--n", 1, out="model/of_it.safetensors")[0] == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_a_place_that_cannot_be_written_is_told_before_the_model_is_loaded(tmp_path, capsys, monkeypatch, command):
    monkeypatch.setattr("eapcore.models.load.load", lambda *arguments, **options: pytest.fail("the model was loaded"))
    files = (
        ["scores.safetensors", "edges.csv", "circuit.json", "prompts.json", "run.json"] if command == "run" else [""]
    )
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "file")
    for name in files:
        folder = tmp_path / f"out{name}"
        folder.mkdir()
        protected = folder / (name or "file")
        protected.write_text("old")
        protected.chmod(0o444)
        places = [folder if name else protected, tmp_path / "new" / ("x" * 256)]
        for out in [*places, *([] if name else [tmp_path / "dangling"])]:
            assert main(argv(command, "toy-ioi", out)) == 2
            assert "cannot be written" in capsys.readouterr().err
        assert protected.read_text() == "old"
    assert not (tmp_path / "new").exists()
    if command in ("patch", "verify") and (extra := [n for n in COMMANDS[command] if n != "--nodes"]) is not None:
        line = ["--model", "toy-ioi", "--task", "sort", "--out", str(tmp_path / "good")]
        assert main([command, *extra, *line, "--resume", str(tmp_path / "dangling")]) == 2
        assert "--resume: " in capsys.readouterr().err
