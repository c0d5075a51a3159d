"""Files are whole, or what they were before: through kills, full disks, Ctrl-C and places that cannot be written."""

from __future__ import annotations

import copy
import importlib
import json
import os
import pickle
import signal
import stat
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from models import random_model
from refusal import refused

import eapcore.graph.files as files
from eapcore.attribution.attribute import attribute
from eapcore.graph.circuit import Circuit
from eapcore.graph.files import load_tensors, replacing, replacing_all, target
from eapcore.graph.graph import Graph
from eapcore.graph.scores import EdgeScores, NodeScores
from eapcore.patching.edges import patch_edges
from eapcore.patching.nodes import patch_nodes
from eapcore.tasks import PromptPairs


def test_what_is_said_of_a_result_never_loses_it(tmp_path):
    """Numbers of numpy and torch become Python's, and what JSON does not have its text."""
    model = random_model(n_heads=2, dtype=torch.float32)
    details = {
        "a": np.arange(2),
        "b": np.float32("inf"),
        "c": torch.ones(1),
        "d": tmp_path,
        "e": {3},
        "f": np.bool_(True),
    }
    pairs = PromptPairs.from_lists([[1, 2]], [[1, 3]], [4], [5], seed=np.int64(7), details=details)
    scores = attribute(model, pairs, method="eap-ig", steps=np.int64(2))
    scores.save(tmp_path / "s.safetensors")
    task = EdgeScores.load(tmp_path / "s.safetensors").meta["task"]
    assert [task[name] for name in ("seed", *"abcdef")] == [7, [0, 1], None, [1.0], str(tmp_path), "{3}", True]
    for result, name in ((scores.top_n(3), "c.json"), (patch_nodes(model, pairs, nodes=["m0"]), "n.json")):
        result.save(tmp_path / name)
        assert json.loads((tmp_path / name).read_text())["meta"]["task"]["seed"] == 7


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def child(work, wait=True):
    """A process of its own that does some work; what it ended with."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) if wait else pid


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def write_all(folder, text, then=lambda: None):
    with replacing_all([folder / name for name in "abc"]) as written:
        for path in written:
            path.write_text(text)
            then()


# Kills


@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_kill_leaves_all_old_files_and_the_next_run_takes_away_what_it_left(tmp_path, after):
    write_all(tmp_path, "old")
    count = iter(range(1, 4))
    assert child(lambda: write_all(tmp_path, "new", lambda: next(count) == after and kill())) == -signal.SIGKILL
    assert [(tmp_path / name).read_text() for name in "abc"] == ["old"] * 3
    assert len(names(tmp_path)) > 3
    with replacing(tmp_path / "another") as path:
        path.write_text("new")
    assert names(tmp_path) == ["a", "another", "b", "c"]


@pytest.mark.parametrize("where", ["tempfile.mkdtemp", "fcntl.flock", "os.fsync"])
def test_a_kill_at_any_step_leaves_nothing_that_stays(tmp_path, where, monkeypatch):
    module, name = where.split(".")
    module = importlib.import_module(module)
    before = getattr(module, name)

    def killed(*arguments, **options):
        before(*arguments, **options)
        kill()

    def work():
        setattr(module, name, killed)
        write_all(tmp_path, "new")

    assert child(work) == -signal.SIGKILL
    write_all(tmp_path, "newer")
    assert names(tmp_path) == ["a", "b", "c"]


def test_only_what_a_dead_process_of_ours_left_is_removed(tmp_path):
    others = [".eapcore-notes", ".eapcore-mine.eapcore-tmp", ".file.abcdefgh", "work.eapcore-tmp"]
    for name in others:
        (tmp_path / name).write_text("a user's")
    (tmp_path / ".eapcore-folder.eapcore-tmp").mkdir()
    (tmp_path / ".eapcore-folder.eapcore-tmp" / "a user's").touch()
    read, write = os.pipe()

    def slow():
        with replacing(tmp_path / "slow") as path:
            path.write_text("slow")
            os.write(write, b"x")
            time.sleep(60)

    pid = child(slow, wait=False)
    os.read(read, 1)  # it has begun
    with replacing(tmp_path / "quick") as path:
        path.write_text("quick")
    assert {*others, ".eapcore-folder.eapcore-tmp", "quick"} < set(names(tmp_path))
    (at_work,) = set(names(tmp_path)) - {*others, ".eapcore-folder.eapcore-tmp", "quick"}
    assert (tmp_path / at_work / "slow").read_text() == "slow"
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with replacing(tmp_path / "quick") as path:
        path.write_text("quick")
    assert set(names(tmp_path)) == {*others, ".eapcore-folder.eapcore-tmp", "quick"}


def test_files_are_a_set_when_the_last_cannot_be_put_in_place_or_ctrl_c_comes_between(tmp_path, monkeypatch):
    write_all(tmp_path, "old")
    with pytest.raises(OSError, match="disk full"), monkeypatch.context() as patched:
        full = iter([None, None, OSError(28, "disk full")])
        patched.setattr(files, "_sync", lambda path: (_ for _ in ()).throw(e) if (e := next(full)) else None)
        write_all(tmp_path, "new")
    assert [(tmp_path / name).read_text() for name in "abc"] == ["old"] * 3

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    replace = files.Path.replace
    try:
        with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patched:

            def interrupted(path, place):
                signal.raise_signal(signal.SIGINT)
                return replace(path, place)

            patched.setattr(files.Path, "replace", interrupted)
            write_all(tmp_path, "new")
    finally:
        signal.signal(signal.SIGINT, before)
    assert [(tmp_path / name).read_text() for name in "abc"] == ["new"] * 3
    assert names(tmp_path) == ["a", "b", "c"]


def test_a_file_and_its_folder_are_on_the_disk_before_and_after_the_rename(tmp_path, monkeypatch):
    done, fsync, replace = [], os.fsync, files.Path.replace

    def synced(handle):
        done.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(files.Path, "replace", lambda path, place: (done.append("rename"), replace(path, place))[1])
    write_all(tmp_path, "new")
    assert done == ["file"] * 3 + ["rename"] * 3 + ["folder"]


# Places


def test_a_place_that_cannot_be_written_is_told_before_anything_is_written(tmp_path):
    (tmp_path / "protected").write_text("old")
    (tmp_path / "protected").chmod(0o444)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "file")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "fifo")
    expected = {
        "protected": "it is write-protected",
        "dangling": "whose folder does not exist",
        "circle": "",
        "fifo": "it is no regular file",
        "x" * 256: "",
        f"new/{'ä' * 128}": "a name in it is longer than 255 bytes",
        "new/" + "y" * 300 + "/file": "longer",
        "a\0b": "null (byte|character)",
        "file/below": "is a file",
        ".": "it is a folder",
    }
    for name, reason in expected.items():
        for function in (target, lambda path: replacing(path).__enter__()):
            with pytest.raises(OSError, match=f"cannot be written: .*{reason}.*; choose another place"):
                function(tmp_path / name)
    assert (tmp_path / "protected").read_text() == "old"
    (tmp_path / "link").symlink_to(tmp_path / "not there yet")
    assert target(tmp_path / "link") == tmp_path / "not there yet"
    assert target(tmp_path / "new" / "folder" / "file") == tmp_path / "new" / "folder" / "file"


# Checksums


def written(tmp_path):
    """A file of each kind with a checksum, and what reads it."""
    graph = Graph(2, 2, True)
    EdgeScores(torch.randn(graph.n_senders, graph.n_receivers) * graph.edge_mask(), graph).save(tmp_path / "edges")
    NodeScores(torch.randn(graph.n_senders), graph).save(tmp_path / "nodes")
    model = random_model()
    pairs = PromptPairs.from_lists([[1, 2]], [[1, 3]], [4], [5])
    patch_edges(model, pairs, resume=tmp_path / "partial")
    (lane,) = (path for path in (tmp_path / "partial").iterdir() if path.suffix == ".safetensors")
    yield tmp_path / "edges", EdgeScores.load
    yield tmp_path / "nodes", NodeScores.load
    yield lane, lambda path: patch_edges(model, pairs, resume=path.parent)


def test_results_are_equal_where_all_that_they_hold_is(tmp_path):
    model = random_model(dtype=torch.float64)
    pairs = PromptPairs.from_lists([[4, 8, 15], [1, 2]], [[4, 8, 16], [1, 3]], [2, 3], [4, 5], places={"S": [1, 1]})
    scores = attribute(model, pairs, reduce="pair")
    scores.save(tmp_path / "scores.safetensors")
    circuit = scores.top_n(3)
    nodes = attribute(model, pairs, level="neuron", reduce="pair")
    for one in (scores, circuit, pairs, nodes):
        for again in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
            assert one == again and hash(one) == hash(again) and again in {one} and again in [0, one]
    assert EdgeScores.load(tmp_path / "scores.safetensors") == scores
    assert circuit == Circuit.from_edges(model.graph, circuit.edges) != scores.top_n(4)  # wherever they come from
    assert scores != replace(scores, per_pair=scores.per_pair + 1) and scores != replace(scores, per_pair=None)
    assert nodes != replace(nodes, per_pair={}) and scores != nodes and scores != 1
    assert pairs != replace(pairs, places={"S": torch.tensor([1, 0])}) and pairs != pairs.select(torch.tensor([0]))
    assert scores != replace(scores, scores=scores.scores.float()) and pairs != replace(pairs, name="another")
    assert model == model != copy.deepcopy(model) and len({model, copy.copy(model)}) == 2  # weights may change in place
    assert {again.content_hash for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)))} == {
        model.content_hash
    }

    class Cleared(dict):  # by another thread, at once
        def __setitem__(self, key, value):
            pass

    object.__setattr__(model, "_hashed", Cleared())
    assert model.content_hash == copy.deepcopy(model).content_hash
    tied = replace(model, weights=replace(model.weights, w_u=model.weights.w_e.T))
    assert pickle.loads(pickle.dumps(tied)).content_hash == tied.content_hash != model.content_hash


def test_a_file_of_which_a_bit_is_another_is_refused(tmp_path):
    for path, read in written(tmp_path):
        read(path)
        whole = path.read_bytes()
        start = 8 + int.from_bytes(whole[:8], "little")
        for place in (start, start + 9, (start + len(whole)) // 2, len(whole) - 1):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
            refused("must be a .* but it cannot be read", read, path)
        header = (
            whole[:start]
            .replace(b'\\"n_pairs\\": 1', b'\\"n_pairs\\": 2')
            .replace(b'"sign\\": \\"score', b'"sign\\": \\"SCORE')
        )
        if header != whole[:start]:
            path.write_bytes(header + whole[start:])
            refused("its checksum is not that of its content", read, path)


def test_a_file_of_an_older_eapcore_has_no_checksum_and_is_read(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    for path, read in written(tmp_path):
        with safe_open(path, "pt") as file:
            (key,), (text,) = file.metadata().keys(), file.metadata().values()
        header = json.loads(text)
        assert len(header.pop("sha256")) == 64
        save_file(load_file(path), path, metadata={key: json.dumps(header)})
        assert load_tensors(path, key)[1] == header
        read(path)
