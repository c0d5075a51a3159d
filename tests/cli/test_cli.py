"""The command line: what it prints and writes, and that it leaves nothing behind when it is stopped."""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import signal
import struct
import subprocess
import sys
import threading

import pytest
import torch
from models import ROOT, SHARED, random_model, save_checkpoint

import eapcore.evaluation.precision as precision
import eapcore.models.matmul as products
from eapcore.attribution.attribute import attribute
from eapcore.cli import _parser, main
from eapcore.cli.output import Progress
from eapcore.cli.process import STOP
from eapcore.evaluation.screened import little_more
from eapcore.graph.circuit import Circuit
from eapcore.graph.scores import EdgeScores
from eapcore.models.load import load
from eapcore.patching.circuits import metric_on
from eapcore.tasks import PromptPairs, find_pairs

FILES = {"scores.safetensors", "edges.csv", "circuit.json", "prompts.json", "run.json"}


@pytest.fixture
def task_file(tmp_path):
    path = tmp_path / "task.jsonl"
    entries = [
        {"clean": [1, 2, 3, 4], "corrupt": [1, 2, 5, 4], "answer": 6, "wrong": [7, 8]},
        {"clean": [9, 2, 3], "corrupt": [8, 2, 3], "answer": [6, 11], "wrong": 7},
        {"clean": [20, 21], "corrupt": [20, 22], "answer": 1, "wrong": 2},
    ]
    path.write_text("\n".join(map(json.dumps, entries)))
    return path


def rows_of(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


# run


def test_run_writes_scores_edges_and_circuit_and_prints_them(eapcore, model, task_file, tmp_path):
    out = tmp_path / "some" / "folder"
    status, printed, _ = eapcore("run", "--task", task_file, "--n-pairs", 3, "--top-n", 30, out=out)
    assert status == 0 and {p.name for p in out.iterdir()} == FILES
    pairs = find_pairs(task_file, n=None, seed=0)
    expected = attribute(model, pairs, **little_more(model, pairs, "logit_diff", "corrupt"), uncertainty=True)
    scores = EdgeScores.load(out / "scores.safetensors", content_hash=model.content_hash)
    assert torch.equal(scores.scores, expected.scores) and scores.meta == expected.meta

    rows = rows_of(out / "edges.csv")
    assert rows[0] == ["edge", "score"] and len(rows) == 1 + model.graph.n_edges
    assert [(name, float(score)) for name, score in rows[1:]] == scores.top(model.graph.n_edges)

    circuit = Circuit.load(out / "circuit.json")
    chosen = scores.top_n(30)
    assert 0 < circuit.n_edges <= 30
    assert circuit.edges == chosen.prune().edges
    assert circuit.meta["edges_before_pruning"] == chosen.n_edges
    metric = circuit.meta["metric"]
    assert metric["circuit"] == pytest.approx(metric_on(model, pairs, "logit_diff", [circuit])[0], abs=1e-5)

    values = {line.split()[0]: line.split()[1:] for line in printed.splitlines() if line}
    assert values["model"][0] == "small:"
    assert values["scored"][:2] == [str(model.graph.n_edges), "edges"]
    table = [line for line in values.items() if line[0].isdigit()]
    assert table == [(str(i), [name, f"{score:.6g}"]) for i, (name, score) in enumerate(scores.top(15), 1)]
    for run in ("clean", "corrupt"):
        assert values[run][0] == f"{metric[run]:.4f}"
    assert values["circuit,"][:3] == [str(circuit.n_edges), "edges", f"{metric['circuit']:.4f}"]
    assert (values["clean"][1], values["corrupt"][1]) == ("1.000", "0.000")
    assert abs(metric["clean"] - metric["corrupt"]) > 1e-3
    assert str(out) in printed


def test_run_with_the_same_seed_writes_the_same_bytes_and_with_another_does_not(eapcore, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("b", 0), ("c", 1), ("c", 0), ("c", 1)):  # a second run replaces the first
        assert eapcore("run", "--seed", seed, out=name)[0] == 0
        assert {p.name for p in (tmp_path / name).iterdir()} == FILES
    for name in FILES:
        a, b, c = ((tmp_path / folder / name).read_bytes() for folder in "abc")
        assert a == b != c


@pytest.mark.parametrize("n", [0, 1, 7, 46])
def test_run_takes_the_number_of_edges_that_it_is_told(eapcore, tmp_path, n):
    assert eapcore("run", "--top-n", n, "--show", 0, out=".")[0] == 0
    meta = Circuit.load(tmp_path / "circuit.json").meta
    assert (meta["selection"], meta["n"], meta["edges_before_pruning"]) == ("top_n", n, n)


def test_run_takes_a_threshold(eapcore, tmp_path):
    status, printed, _ = eapcore("run", "--threshold", 0.01, out=".")
    scores = EdgeScores.load(tmp_path / "scores.safetensors")
    count = int((scores.scores.abs() >= 0.01).sum())
    meta = Circuit.load(tmp_path / "circuit.json").meta
    assert (meta["selection"], meta["threshold"], meta["edges_before_pruning"]) == ("threshold", 0.01, count)
    assert status == 0 and 0 < count < scores.graph.n_edges and "edges with |score| ≥ 0.01" in printed


def test_every_option_reaches_the_scores(eapcore, checkpoint, tmp_path):
    options = ("--metric", "prob_diff", "--dtype", "float32", "--impl", "reference", "--seed", 3, "--method", "eap")
    assert eapcore("run", *options, "--batch-size", 2, out=".")[0] == 0
    scores = EdgeScores.load(tmp_path / "scores.safetensors")
    assert scores.meta["metric"]["name"] == "prob_diff"
    assert tuple(scores.meta[name] for name in ("dtype", "impl")) == ("float32", "reference")
    assert scores.meta["task"] == {"name": "sort", "n_pairs": 4, "seed": 3} and scores.meta["method"]["name"] == "eap"
    expected = attribute(load(checkpoint, dtype="float32"), find_pairs("sort", n=4, seed=3), "prob_diff")
    torch.testing.assert_close(scores.scores, expected.scores, rtol=0, atol=1e-6)


@pytest.mark.skipif(not (SHARED / "gpt-nano-sort").is_dir(), reason="the checkpoint gpt-nano-sort is not here")
def test_run_scores_the_sorting_model(tmp_path, capsys):
    argv = ["run", "--model", str(SHARED / "gpt-nano-sort"), "--task", "sort", "--n", "40", "--out", str(tmp_path)]
    assert main(argv) == 0
    metric = Circuit.load(tmp_path / "circuit.json").meta["metric"]
    assert metric["clean"] > 2 and metric["corrupt"] < -2  # it sorts both prompts, and the answers change sides
    assert "gpt-nano-sort: GPT-2, 3 layers × 3 heads" in capsys.readouterr().out


def test_run_without_arguments_scores_the_toy_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["run"]) == 0
    printed = capsys.readouterr().out
    assert "toy-ioi" in printed and "64 prompt pairs" in printed
    assert {p.name for p in (tmp_path / "eapcore-out").iterdir()} == FILES


# attribute


def test_attribute_writes_the_scores_alone(eapcore, model, scores, tmp_path):
    status, printed, _ = eapcore("attribute", "--uncertainty", "no", out="scores.safetensors")
    assert (
        status == 0
        and "rank" not in printed
        and "prompts  not judged" in printed
        and printed.endswith("wrote    scores.safetensors\n")
    )
    assert [p.name for p in tmp_path.iterdir()] == ["scores.safetensors"]
    found = EdgeScores.load(tmp_path / "scores.safetensors", content_hash=model.content_hash)
    assert torch.equal(found.scores, scores.scores) and found.meta == scores.meta and found.jaccard is None


def test_half_precision_says_how_far_it_is_off(eapcore, model, pairs, monkeypatch):
    for dtype in ("bfloat16", "float16"):
        status, printed, _ = eapcore("attribute", "--dtype", dtype, "--metric", "logit_diff", out="half.safetensors")
        error = re.search(rf"dtype    {dtype}: on 2 pairs all scores together are (.*)% off those in float32", printed)
        assert status == 0 and 0 < float(error[1]) < 5
    status, printed, _ = eapcore("attribute", "--dtype", "float16", "--metric", "kl", out="half.safetensors")
    assert status == 0 and "dtype    float16: not compared with float32 by the gradient at the clean run" in printed
    monkeypatch.setattr(precision, "budget", lambda device: 1000)
    _, printed, _ = eapcore("run", "--dtype", "bfloat16", "--method", "eap", "--top-n", 3, out="half")
    assert "no memory to compare with float32" in printed
    assert "dtype" not in eapcore("attribute", "--dtype", "float32", out="half.safetensors")[1]


def test_run_says_whether_there_were_enough_prompts_and_takes_stable_or_grown_edges(eapcore, tmp_path):
    for select in ("top", "greedy", "stable"):
        status, printed, _ = eapcore("run", "--select", select, "--top-n", 6, "--method", "eap", out=tmp_path / select)
        found = EdgeScores.load(tmp_path / select / "scores.safetensors")
        chosen = {"top": found.top_n(6), "greedy": found.greedy(6), "stable": found.stable(n=6)}[select]
        assert status == 0 and chosen.n_edges > 0
        assert Circuit.load(tmp_path / select / "circuit.json").meta["edges_before_pruning"] == chosen.n_edges
        share = float(found.jaccard[chosen.n_edges - 1])
        verdict = "enough" if share >= 0.8 else "too few"
        assert f"prompts  {verdict}: " in printed and f"top {chosen.n_edges} edges" in printed
        assert f"Jaccard index of {share:.2f} on average" in printed
    _, printed, _ = eapcore("attribute", "--n-pairs", 3, out=tmp_path / "few.safetensors")
    assert "prompts  not judged: 3 pairs do not say how circuits vary: give at least 4" in printed
    status, printed, _ = eapcore("run", "--select", "stable", out=tmp_path / "smallest")
    assert status == 0 and "of the stable edges, the first size that keeps 0.8" in printed
    for options, message in (
        (("--select", "best"), "--select must be top, greedy or stable, got 'best'"),
        (("--select", "greedy", "--threshold", 0.1), "leave out --select greedy"),
        (("--select", "stable", "--uncertainty", "no"), "leave out --uncertainty no"),
        (("--uncertainty", "perhaps"), "--uncertainty must be auto, yes or no, got 'perhaps'"),
    ):
        status, printed, _ = eapcore("run", *options)
        assert status == 2 and message in printed


@pytest.mark.parametrize("option", [("--top-n", 3), ("--threshold", 0.05)])
def test_attribute_prints_the_edges_that_it_is_asked_for(eapcore, scores, option):
    status, printed, _ = eapcore("attribute", *option, out="scores.safetensors")
    count = 3 if option[0] == "--top-n" else scores.threshold(0.05).n_edges
    assert status == 0 and 0 < count < scores.graph.n_edges
    table = [line.split() for line in printed.splitlines() if line.strip()[:1].isdigit()]
    assert table == [[str(i), name, f"{score:.6g}"] for i, (name, score) in enumerate(scores.top(count), 1)]


# info


def test_info_prints_what_runs_here(capsys):
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert f"torch {torch.__version__}" in printed and "devices  cpu" in printed
    for impl in ("reference", "cpp", "triton"):
        (line,) = [line for line in printed.splitlines() if line.startswith(f"kernels  {impl}")]
        assert line.endswith("available") or "absent: " in line
    assert f"products large float32 ones on the CPU by {products.large_by()}" in printed
    assert "model" not in printed


def test_info_prints_a_models_dimensions_and_memory(checkpoint, model, capsys):
    assert main(["info", str(checkpoint), "--batch-size", "4", "--tokens", "8", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    for part in (
        "small, float64 on cpu",
        "2 layers × 2 heads, d_model 16, d_head 8, d_mlp 40 (gelu_new), vocabulary 29, context 16",
        "7 senders × 15 receivers, 46 edges",
        "a batch of 4 pairs × 8 tokens needs",
    ):
        assert part in printed
    parameters = sum(t.numel() for _, t in model.weights.named())
    assert f"{parameters:,} parameters" in printed


# Help


def subparsers(parser):
    (action,) = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return action.choices


COMMANDS = [
    "run",
    "attribute",
    "info",
    "patch",
    "acdc",
    "probe",
    "path",
    "evaluate",
    "verify",
    "report",
    "mib",
    "sweep",
    "reproduce",
]


def test_every_command_s_help_is_looked_at():
    assert set(subparsers(_parser())) == set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_every_option_with_its_default(command, capsys):
    with pytest.raises(SystemExit) as status:
        main([command, "--help"])
    assert status.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    parser = subparsers(_parser())[command]
    assert len(parser._actions) >= 5
    for action in parser._actions:
        for name in action.option_strings:
            assert name in text
        assert action.help and len(action.help.split()) >= 2, f"{action.dest} has no help text"
        shown = " ".join(parser._get_formatter()._expand_help(action).split())
        stated = 0 if action.required or action.default is False or action.default == argparse.SUPPRESS else 1
        assert shown.count("(default: ") == stated, f"{action.dest} must state once what is done without it"
        assert shown in text and "(default: [])" not in shown
        if stated and action.default is not None:
            assert f"(default: {action.default})" in shown


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as status:
        main(["--help"])
    assert status.value.code == 0
    text = capsys.readouterr().out
    assert all(f"    {command}" in text for command in COMMANDS)


def test_torchrun_takes_no_option_for_an_abbreviation_of_its_own():
    from torch.distributed.run import get_args_parser

    theirs = set(get_args_parser()._option_string_actions)
    for command, parser in subparsers(_parser()).items():
        for names in (action.option_strings for action in parser._actions if action.option_strings):
            free = [n for n in names if n in theirs or sum(t.startswith(n) for t in theirs) < 2]
            assert free, f"{command}: torchrun finds {names} ambiguous"
    given = ["attribute", "--n-pairs", "48", "--method", "eap-ig"]
    assert get_args_parser().parse_args(["--nproc-per-node=4", "-m", "eapcore", *given]).training_script_args == given


def test_the_options_of_the_main_job_are_all_there():
    expected = "model task metric method n seed batch-size dtype device impl top-n threshold out".split()
    for command in ("run", "attribute"):
        names = {name for action in subparsers(_parser())[command]._actions for name in action.option_strings}
        assert {f"--{name}" for name in expected} <= names


# Progress


def test_a_terminal_gets_a_progress_bar_and_a_pipe_does_not(eapcore, monkeypatch):
    pty, fcntl, termios = (pytest.importorskip(name) for name in ("pty", "fcntl", "termios"))
    assert eapcore("run", "--batch-size", 1, out=".")[0] == 0  # which printed nothing to stderr

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    shown = []

    def listen():
        try:
            while data := os.read(ours, 1024):
                shown.append(data)
        except OSError:  # the other end was closed
            pass

    listener = threading.Thread(target=listen)
    listener.start()
    with os.fdopen(theirs, "w") as terminal, monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", terminal)
        assert eapcore("run", "--batch-size", 1, out=".")[0] == 0
    listener.join(10)
    os.close(ours)
    text = b"".join(shown).decode()
    assert "scoring" in text and "0/4" in text and "pair" in text
    assert text.endswith("\r")  # the bar is taken away at the end


def test_the_log_as_json_has_one_object_a_line_with_rate_and_time_left(checkpoint, tmp_path, capsys):
    shared = ["patch", "--model", str(checkpoint), "--task", "sort", "--n-pairs", "4", "--device", "cpu", "--log-json"]
    assert main([*shared, "--batch-size", "1", "--out", str(tmp_path / "effects")]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert lines[0].keys() == {"time", "event", "what", "done", "total", "unit", "rate", "left"}
    last = lines[-1]
    assert (last["event"], last["done"], last["total"], last["left"]) == ("progress", 46 * 4, 46 * 4, 0.0)
    assert last["rate"] > 0 and lines[0]["rate"] is None
    assert main([*shared, "--metric", "none", "--out", str(tmp_path / "effects")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert json.loads(line)["event"] == "error" and "metric must be one of" in json.loads(line)["message"]


# SIGTERM


@pytest.mark.parametrize("command", ["attribute", "patch"])
def test_sigterm_finishes_the_batch_saves_and_the_same_command_goes_on(eapcore, tmp_path, monkeypatch, command):
    expected = eapcore(command, "--batch-size", 1, out="whole")[1].replace("whole", "x")
    with monkeypatch.context() as patched:
        real, calls = Progress.show, []

        def show(self, done, total):
            calls.append(done)
            if len(calls) == 2:
                signal.raise_signal(signal.SIGTERM)  # the handler only makes a note
                assert STOP.asked
            real(self, done, total)

        patched.setattr(Progress, "show", show)
        status, printed, _ = eapcore(command, "--batch-size", 1, "--resume", "kept", out="x")
    assert (status, printed) == (143, "eapcore: stopped by SIGTERM; what is done lies in kept\n") and len(calls) == 2
    assert not (tmp_path / "x").exists()
    seen = []
    monkeypatch.setattr(Progress, "show", lambda self, done, total: seen.append(done))
    status, printed, _ = eapcore(command, "--resume", "kept", out="x")
    assert status == 0 and seen[0] == calls[-1] and (tmp_path / "x").read_bytes() == (tmp_path / "whole").read_bytes()
    assert re.sub(r"in [0-9.]+ s", "", printed) == re.sub(r"in [0-9.]+ s", "", expected)


# Ctrl-C


WRITTEN_BEFORE = {
    "while scoring": set(),
    "while writing scores": set(),
    "while running circuits": {"scores.safetensors"},
    "while writing edges": {"scores.safetensors"},
    "while writing circuit": {"scores.safetensors"},
}


@pytest.fixture
def ctrl_c():
    """As at a terminal: a shell starts what runs in the background with the signal ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("where", WRITTEN_BEFORE)
def test_ctrl_c_leaves_no_half_written_and_no_temporary_file(eapcore, tmp_path, monkeypatch, where):
    reached = []

    def interrupt(*args, **kwargs):
        reached.append(where)
        signal.raise_signal(signal.SIGINT)

    def half_written(tensors, path, **kwargs):
        path.write_bytes(b"half")
        interrupt()

    if where == "while scoring":
        monkeypatch.setattr("eapcore.models.attention.Attention.grads", interrupt)
    elif where == "while writing scores":
        monkeypatch.setattr("safetensors.torch.save_file", half_written)
    elif where == "while running circuits":
        monkeypatch.setattr("eapcore.search.smallest.run_until", interrupt)
    elif where == "while writing edges":
        monkeypatch.setattr("eapcore.graph.scores.EdgeScores.top", interrupt)
    else:
        dumps = json.dumps
        monkeypatch.setattr(
            "eapcore.graph.files.json.dumps", lambda *a, **k: interrupt() if "indent" in k else dumps(*a, **k)
        )
    assert eapcore("run", out="out")[:2] == (130, "eapcore: interrupted; no file was left half-written\n")
    assert reached == [where]
    out = tmp_path / "out"
    assert {p.name for p in out.glob("*")} | {p.name for p in out.glob(".*")} == WRITTEN_BEFORE[where]


# As a program


def child(*argv, cwd):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "error", "-m", "eapcore", *map(str, argv)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


def test_the_source_tree_runs_as_a_program_from_any_folder(checkpoint, tmp_path):
    done = child("attribute", "--model", checkpoint, "--task", "sort", "--n", "3", "--out", "scores", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "wrote    scores" in done.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["scores"]


def hub_run(tmp_path, *, tokenizer):
    """Score text with a model that only a fake Hub cache holds, with its tokenizer or without."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--someone--small"
    folder = save_checkpoint(random_model(dtype=torch.float32), repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    if tokenizer:
        tokenizers = pytest.importorskip("tokenizers")
        words = {w: i for i, w in enumerate(["<unk>", "red", "blue", "cat", "dog", "runs", "sleeps"])}
        made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
        made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        made.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    task, out = tmp_path / "pairs.jsonl", tmp_path / "scores.safetensors"
    task.write_text(json.dumps({"clean": "red cat", "corrupt": "blue cat", "answer": "runs", "wrong": "sleeps"}))
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    command = ["attribute", "--model", "someone/small", "--task", str(task), "--out", str(out), "--device", "cpu"]
    program = [sys.executable, "-m", "eapcore", *command]
    return out, subprocess.run(program, env=environment, capture_output=True, text=True, timeout=120)


def test_a_cached_hub_model_is_scored_on_text_with_its_own_tokenizer(tmp_path):
    out, done = hub_run(tmp_path, tokenizer=True)
    assert (done.returncode, done.stderr) == (0, "")
    model, pairs = random_model(dtype=torch.float32), PromptPairs.from_lists([[1, 3]], [[2, 3]], [5], [6])
    expected = attribute(model, pairs, **little_more(model, pairs, "logit_diff", "corrupt"))
    assert expected.scores.abs().max() > 1e-3
    loaded = EdgeScores.load(out)
    torch.testing.assert_close(loaded.scores, expected.scores)
    assert loaded.meta["model"]["name"] == "someone/small"


def test_text_for_a_hub_model_without_a_cached_tokenizer_says_so(tmp_path):
    out, done = hub_run(tmp_path, tokenizer=False)
    (line,) = done.stderr.splitlines()
    assert (done.returncode, done.stdout, out.exists()) == (2, "", False)
    assert "tokenizer.json of someone/small" in line and "not cached" in line


def test_run_picks_the_smallest_size_that_keeps_the_asked_share_of_the_behaviour(tmp_path, capsys):
    assert main(["run", "--n", "16", "--device", "cpu", "--out", str(tmp_path), "--faithfulness", "0.7"]) == 0
    table = capsys.readouterr().out.split("faithfulness\n")[1].splitlines()
    shares = [float(line.split()[-1]) for line in table[1:] if line.startswith(("top", "circuit"))]
    assert all(share < 0.7 for share in shares[:-1]) and shares[-1] >= 0.7
    circuit = Circuit.load(tmp_path / "circuit.json")
    model, pairs = load("toy-ioi"), find_pairs("toy-ioi", n=16, seed=0)
    value, clean, corrupt = (circuit.meta["metric"][key] for key in ("circuit", "clean", "corrupt"))
    assert (value - corrupt) / (clean - corrupt) == pytest.approx(shares[-1], abs=1e-3)
    assert metric_on(model, pairs, "logit_diff", [circuit])[0] == pytest.approx(value, rel=1e-5)
