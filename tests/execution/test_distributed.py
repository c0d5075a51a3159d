"""Several processes share the work: as one does it but for rounding, the same bits each time, no fault unsaid."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import ranks
import torch
from models import ROOT
from refusal import refused

from eapcore.attribution.attribute import attribute
from eapcore.cli.output import Progress
from eapcore.execution.distributed import Link, Lost
from eapcore.graph.scores import EdgeScores
from eapcore.models.load import load
from eapcore.tasks import find_pairs


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What the processes of every group return; one process imports everything and forks them."""
    groups = [("sharing:everything", 2), ("sharing:faults", 3), ("sharing:killed", 3), ("sharing:lonely", 1)]
    groups += [
        ("sharing:devices", 2),
        ("sharing:reproduced", 2),
        ("sharing:killed_command", 1),
        ("sharing:undisturbed", 4),
        ("sharing:begun", 4),
        ("sharing:gone_on", 2),
        ("sharing:survivor", 1),
    ]
    beside = ("sharing:faults", "sharing:killed", "sharing:lonely", "sharing:killed_command"), (
        "sharing:undisturbed", "sharing:begun", "sharing:gone_on", "sharing:survivor",
    )  # fmt: skip
    found = ranks.start(*groups, folder=tmp_path_factory.mktemp("ranks"), beside=beside)
    return {name.split(":")[1]: results for (name, _), results in zip(groups, found, strict=True)}


def test_every_function_gives_what_one_process_gives_and_the_same_bits_each_time(told):
    first, *others = told["everything"]
    for name, (gap, scale, same, bits) in first["found"].items():
        assert gap < 1e-12 and (scale > 1e-6 or "acdc" in name) and same, (name, gap, scale)
        assert all(other["found"][name][3] == bits for other in others), name
    assert first["sent"] > 0
    shared, alone = (sum(each["operations"][i] for each in (first, *others)) for i in (0, 1))
    # No process does another's work; alone some run at more positions, for others of their batch.
    assert 2 < first["spent"] <= 3 and 0.8 < shared * (1 + len(others)) / alone < 1.02


def test_a_reproduction_is_shared_and_its_steps_are_the_first_process_s(told):
    first, other = told["reproduced"]
    assert first["gap"] < 1e-12 and first["differ"] == [] and "circuit.json" in first["files"]
    assert {"exact-inside.json", "subnetwork-probing.safetensors"} <= set(first["steps"])
    for said in (first, other):
        assert said["found"] == said["again"] == said["left"] == first["found"] and not said["read"]
        assert "must have the same plan, but rank 1 (process " in said["plan"]
    assert "curves.json must be what a reproduction wrote" in first["edited"]
    assert other["edited"].startswith("Lost: rank 0 (process ") and "curves.json" in other["edited"]
    assert first["speaks"] and not other["speaks"]


def test_each_process_may_have_several_devices(told):
    for same, gap, ways in told["devices"]:
        assert same and gap < 1e-12 and ways == 2


def test_what_is_different_in_one_process_is_named_in_all_and_they_can_go_on(told):
    for said in told["faults"]:
        for name in ("model", "task", "method", "eapcore"):
            assert f"must have the same {name}, but rank 2 (process " in said[name], said[name]
        assert "3 processes cannot share 2 prompt pairs: start at most 2" in said["few"]
        assert "no such token" in said["failed"]
    assert all(said["failed"].startswith("Lost: rank 2 (process ") for said in told["faults"][:2])


def test_the_others_end_soon_and_name_the_one_that_is_gone(told):
    *others, last = told["killed"]
    assert last == "died"
    for other in others:
        assert other["said"].startswith("Lost: rank 2 (process ") and "is gone" in other["said"]
        assert other["seconds"] < 30


def test_nobody_waits_for_ever_for_processes_that_do_not_come(told):
    (said,) = told["lonely"]
    assert said.startswith("NotMet: no rendezvous of the 2 processes at 127.0.0.1:") and "rank 0 was there" in said


def test_fewer_processes_go_on_to_the_same_bits(told):
    first, *others = told["undisturbed"]
    assert all(other == first for other in others) and all(len(text) > 1000 for text in first)
    assert all(text == "stopped" for found in told["begun"] for text in found[:1])
    assert all(found == first for found in told["gone_on"])


def test_work_that_is_killed_at_any_moment_goes_on_to_the_same_bits(told):
    (found,) = told["survivor"]
    for name, (same, killed, left) in found.items():
        assert same and killed > 1 and left == 0, (name, same, killed, left)


def test_a_command_whose_processes_are_killed_goes_on_to_the_same_bits(told):
    (found,) = told["killed_command"]
    assert found["killed"] == 2 and found["finished"] > 0 and "refused" not in found


def test_progress_shows_each_process_where_they_differ_much(monkeypatch, capsys):
    link = SimpleNamespace(size=3, began=-1e9)
    link.apart = lambda: Link.apart(link)
    monkeypatch.setattr("eapcore.execution.distributed.link_now", lambda: link)
    monkeypatch.setattr("eapcore.cli.output.logged_as_json", lambda: True)
    said = []
    for done in ({0: 9, 1: 3}, {0: 9, 1: 8, 2: 9}):
        link.done = done
        with Progress("scoring", 30) as show:
            show(sum(done.values()), 30)
        said.append(json.loads(capsys.readouterr().err))
    assert said[0]["ranks"] == [9, 3, 0] and said[0]["done"] == 12 and "ranks" not in said[1]


def test_torchrun_runs_a_command_and_one_process_prints_and_writes(tmp_path):
    command = ["--nproc-per-node=2", "-m", "eapcore", "attribute", "--n-pairs", "6"]
    command += ["--method", "eap", "--out", "shared.safetensors"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    program = [sys.executable, "-m", "torch.distributed.run", *command]
    done = subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("scored   262 edges") == 1 and [p.name for p in tmp_path.iterdir()] == [
        "shared.safetensors"
    ]
    found = EdgeScores.load(tmp_path / "shared.safetensors")
    expected = attribute(load("toy-ioi"), find_pairs("toy-ioi", n=6, seed=0))
    torch.testing.assert_close(found.scores, expected.scores)


def test_a_store_that_goes_away_between_two_messages_names_its_process():
    class Gone:
        def set(self, *_):
            raise torch.distributed.DistNetworkError("Connection reset by peer")

    link = object.__new__(Link)
    link.rank, link.size, link.people, link.store = 1, 2, [], Gone()
    refused("rank 0 or the store is gone: it ended or was killed", link.gather, 1, error=Lost)
    link.people = [{"pid": 5, "host": "a"}, {"pid": 6, "host": "a"}]
    refused(r"rank 0 \(process 5 on a\) or the store is gone", link.gather, 1, error=Lost)
