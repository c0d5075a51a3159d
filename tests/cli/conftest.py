"""A checkpoint and the sort task that commands run on, and what runs them."""

import json

import pytest
from models import random_model, save_checkpoint

from eapcore.attribution.attribute import attribute
from eapcore.cli import main
from eapcore.models.load import load
from eapcore.tasks import find_pairs


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A random model in a folder, with enough vocabulary and context for the sort task."""
    return save_checkpoint(random_model(n_heads=2, d_model=16), tmp_path_factory.mktemp("checkpoints") / "small")


@pytest.fixture(scope="session")
def model(checkpoint):
    return load(checkpoint)


@pytest.fixture(scope="session")
def pairs():
    return find_pairs("sort", n=4, seed=0)


@pytest.fixture(scope="session")
def scores(model, pairs):
    return attribute(model, pairs, "logit_diff", gradient_at=0.75)


@pytest.fixture
def eapcore(checkpoint, tmp_path, monkeypatch, capsys):
    """Run a command on the checkpoint and the sort task: (status, what it printed, its file as JSON if it is one)."""
    monkeypatch.chdir(tmp_path)

    def call(command, *more, out="result.json"):
        shared = ["--model", str(checkpoint), "--task", "sort", "--n", "4", "--device", "cpu", "--out", str(out)]
        status = main([command, *shared, *map(str, more)])
        printed = capsys.readouterr()
        assert not (printed.out and printed.err)
        path = tmp_path / out
        content = json.loads(path.read_text()) if status == 0 and path.suffix == ".json" else None
        return status, printed.out or printed.err, content

    return call


@pytest.fixture
def score_file(scores, tmp_path):
    scores.save(tmp_path / "scores.safetensors")
    return tmp_path / "scores.safetensors"
