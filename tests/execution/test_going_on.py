"""Searches and patching that were interrupted go on to the same bits, or are refused with the reason."""

from __future__ import annotations

import json
from contextlib import suppress

import pytest
import torch
from models import random_case
from refusal import refused
from safetensors import safe_open
from safetensors.torch import save_file

import eapcore.execution.resume as resume
from eapcore.evaluation.faithfulness import measure_mib
from eapcore.execution.experiment import Experiment
from eapcore.graph.scores import EdgeScores
from eapcore.patching.nodes import patch_nodes
from eapcore.patching.paths import path_patch
from eapcore.patching.record import Recordings
from eapcore.search.acdc import acdc, prune_sweep

MODEL, PAIRS = random_case([7, 5, 6, 7], n_layers=2, n_heads=2, d_model=8, first_difference=1)
SCORES = EdgeScores(torch.linspace(-1, 1, MODEL.graph.n_senders * MODEL.graph.n_receivers).view(
    MODEL.graph.n_senders, -1) * MODEL.graph.edge_mask(), MODEL.graph, {})  # fmt: skip


def found(circuits):
    """Everything that searches found, as numbers."""
    parts = [[*c.mask.flatten().tolist(), *c.meta["metric"].values(), *c.meta["forwards"].values()] for c in circuits]
    return [x for part in parts for x in part if not isinstance(x, str)]


def mib(metric="nll", size=1, **options):
    experiment = Experiment.of(MODEL, PAIRS, metric)
    result = measure_mib(experiment, Recordings(experiment, size), SCORES, sizes=[0.2, 0.5], **options)
    return [*result.signed.values, result.cmd]


def both(metric="nll", size=1, **options):
    options |= {"batch_size": size, "order": "earliest"}
    return found(prune_sweep(MODEL, PAIRS, SCORES, [20], [0.01, 0.1], metric, **options))


CALLS = {
    "acdc": lambda metric="nll", size=1, **o: found([acdc(MODEL, PAIRS, metric, threshold=0.02, batch_size=size, **o)]),
    "searches": both,
    "nodes": lambda metric="nll", size=1, **o: patch_nodes(
        MODEL, PAIRS, metric, per_position=True, batch_size=size, **o
    ).effects.tolist(),
    "path": lambda metric="nll", size=1, **o: (
        path_patch(MODEL, PAIRS, metric, ["embed"], ["embed->a0.h1<v>->logits"], batch_size=size, **o).effect
    ),
    "circuits": mib,
}


class Stop(Exception):
    pass


@pytest.mark.parametrize("name", CALLS)
def test_what_was_stopped_goes_on_to_the_same_bits(name, tmp_path, monkeypatch):
    monkeypatch.setattr(resume, "SAVE_SECONDS", 0.0)
    call, told = CALLS[name], []
    expected = call(progress=lambda done, total: told.append(done))
    kept = tmp_path / "kept"
    for number, after in enumerate((3, len(told) - 1)):

        def progress(done, total, left=[after]):  # noqa: B006
            left[0] -= 1
            if not left[0]:
                raise Stop

        with suppress(Stop) if number else pytest.raises(Stop):
            call(resume=kept, progress=progress)
    more = []
    assert call(resume=kept, progress=lambda done, total: more.append(done)) == expected
    assert more[0] > told[0] and more[-1] == told[-1]
    assert call(resume=kept) == expected  # of what is done
    refused(
        "was begun with|begun with the batch size 1, got 2", call, size=2, resume=kept
    ) if name != "circuits" else None

    def nll(logits):
        return logits[:, 3]

    refused("belongs to another metric", call, nll, resume=kept)
    file = next(kept.rglob("*.safetensors"))
    with safe_open(file, "pt") as opened:
        tensors, header = {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata()  # noqa: SIM118
    content = json.loads(header["eapcore-partial"])
    content["identity"]["format of partial results"] += 1
    save_file(tensors, file, header | {"eapcore-partial": json.dumps(content)})
    refused("belongs to another format of partial results", call, resume=kept)


def test_a_full_disk_costs_nothing_but_the_last_half_minute(tmp_path, monkeypatch):
    monkeypatch.setattr(resume, "SAVE_SECONDS", 0.0)
    expected, save, left = CALLS["nodes"](), resume.save_tensors, [3]

    def full(path, *content):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        save(path, *content)

    monkeypatch.setattr(resume, "save_tensors", full)
    with pytest.raises(OSError, match="No space left"):
        CALLS["nodes"](resume=tmp_path)
    left[0] = 100
    counts = []
    assert CALLS["nodes"](resume=tmp_path, progress=lambda done, total: counts.append(done)) == expected
    assert counts[0] >= 2 * MODEL.graph.n_senders
