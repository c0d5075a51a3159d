"""eapcore info: the memory of a model that is not here."""

from __future__ import annotations

import json
import re

import pytest
import torch

from eapcore.attribution.plan import Plan
from eapcore.cli import main
from eapcore.models.load import load

# Llama 3.1 8B but for its layers, 4 instead of 32.
LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}


@pytest.fixture
def folder(tmp_path):
    """Of a model without its weights."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    return tmp_path


def printed(capsys, *options):
    status = main(["info", *map(str, options)])
    found = capsys.readouterr()
    return status, found.out + found.err


def test_a_model_without_its_weights_is_planned_for_a_device_that_is_not_here(folder, capsys):
    status, out = printed(capsys, folder, "--device", "cuda", "--memory", 20, "--batch-size", 8, "--tokens", 32)
    assert status == 0
    for part in (
        "bfloat16 on cuda",
        "32 heads (8 of keys and values)",
        "1,923,125,248 parameters, 3.58 GiB",
        "133 senders × 389 receivers, 19,855 edges",
        "auto takes triton",
        "20.00 GiB in all, 16.42 GiB without the weights",
    ):
        assert part in out
    storage, taken, within = re.search(r"takes (\w+), (\d+) pairs at a time, within ([\d.]+) GiB", out).groups()
    model = load(folder, device="meta")
    plan = Plan(model.config, torch.bfloat16, torch.device("cuda"), groups=3)
    assert storage == "dense"
    assert plan.dense(int(taken), 32) <= float(within) * 2**30 < plan.dense(int(taken) + 2, 32)


def test_weights_that_do_not_fit_alone(folder, capsys):
    assert "3.00 GiB in all: the weights alone do not fit" in printed(capsys, folder, "--memory", 3)[1]
    status, out = printed(capsys, folder, "--device", "cuda", "--memory", 3)
    assert status == 2 and "with three layers at a time takes 3.2" in out
    (folder / "config.json").write_text(json.dumps(LLAMA | {"num_hidden_layers": 8}))
    status, out = printed(capsys, folder, "--device", "cuda", "--memory", 4)
    assert status == 0 and "4.00 GiB in all, no room for the weights: the layers stay on the host" in out
    by_itself = r"3.18 GiB of weights at a time; by itself attribute takes dense, \d pairs × 20 tokens, 4\d\d"
    assert re.search(by_itself, out)


def test_a_small_card_takes_factors(folder, capsys):
    _, out = printed(capsys, folder, "--device", "cuda", "--memory", 6, "--tokens", 96, "--batch-size", 1)
    assert "by itself attribute takes factored" in out


def test_a_device_that_is_not_here_needs_its_memory(folder, capsys):
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    status, out = printed(capsys, folder, "--device", "cuda")
    assert status == 2 and "device 'cuda' cannot be used here" in out


def test_a_model_is_laid_on_several_devices_that_are_not_here(folder, capsys):
    status, out = printed(capsys, folder, "--devices", "1x5GiB,2x4GiB", "--tokens", 256)
    assert status == 0
    rows = [re.split(r"  +", line.strip()) for line in out.splitlines() if re.match(r" +\d  +\d–", line)]
    assert [row[1:3] + row[4:] for row in rows] == [
        ["0–0 and all else", "2.36 GiB", "5.00 GiB"],
        ["1–2", "832.0 MiB", "4.00 GiB"],
        ["3–3", "416.0 MiB", "4.00 GiB"],
    ]
    units = {"MiB": 1.0, "GiB": 1024.0}
    needs = [float(number) * units[unit] for number, unit in (row[3].replace(",", "").split() for row in rows)]
    assert 500 < needs[0] < needs[1] < (4096 - 832) / 2 and needs[2] < needs[1]
    assert "pairs × 256 tokens" in out and "as what they are made of" in out
    for options, said in {
        ("--devices", "2x1GiB"): "the weights, 3.6 GiB, do not fit: 2 devices have 2.0 GiB",
        ("--devices", "8x80GiB"): "8 devices cannot share 4 layers: name at most 4",
        ("--devices", "2x80GiB", "--memory", 3): "--devices says how much memory each has",
        ("--devices", "99999999x80GiB"): "--devices must be names, or 1 to 4096 as 8x80GiB",
    }.items():
        status, out = printed(capsys, folder, *options)
        assert status == 2 and said in out
