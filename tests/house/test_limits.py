"""Sizes, numbers, names and files that are out of all proportion get one short sentence, quickly.

Kinds: configurations (CONFIGS), options (OPTIONS), task files (TASKS), score files of huge graphs, pipes in place of
files, the Hub out of reach; nothing of a file reaches the terminal raw.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import time

import pytest
import torch
from safetensors.torch import save_file

from eapcore.cli import main

GPT2 = {"model_type": "gpt2", "n_embd": 8, "n_head": 2, "n_layer": 1, "n_positions": 16, "vocab_size": 11}
LLAMA = {"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1,
    "intermediate_size": 8, "vocab_size": 11, "max_position_embeddings": 16}  # fmt: skip


@pytest.fixture
def refused(tmp_path, capsys):
    """What a command prints that must refuse something: one short line without control characters, within two seconds
    of work."""

    def run(*argv):
        signal.alarm(20)  # a hang fails here, not the whole run
        start = time.process_time()
        try:
            status = main([str(part) for part in (*argv, "--out", tmp_path / "out")])
        except SystemExit as error:
            status = error.code
        finally:
            signal.alarm(0)
        printed = capsys.readouterr()
        assert status == 2 and not printed.out and time.process_time() - start < 2
        assert printed.err.count("\n") == 1 and len(printed.err) < 700
        assert printed.err.removesuffix("\n").isprintable()
        return printed.err

    return run


CONFIGS = {
    **{f"{name} of 1e9": (GPT2 | {name: 10**9}, "at most|not the GPT-2") for name in
        ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size", "n_inner")},
    **{f"{name} of 1e9, Llama": (LLAMA | {name: 10**9}, "at most|not the llama") for name in
        ("num_hidden_layers", "num_attention_heads", "head_dim", "num_key_value_heads", "vocab_size",
        "sliding_window")},
    "5,000 digits": ('{"model_type": "gpt2", "n_embd": ' + "9" * 5000 + "}", "valid JSON"),
    "4,000 digits": (GPT2 | {"layer_norm_epsilon": int("9" * 4000)}, "layer_norm_epsilon"),
    "deep nesting": ("[" * 100_000, "nested too deeply"),
    "a name as a list": (GPT2 | {"model_type": ["gpt2"]}, "model_type"),
    "an activation as a list": (GPT2 | {"activation_function": ["gelu"]}, "activation_function"),
    "an activation as an object": (GPT2 | {"activation_function": {"name": "gelu"}}, "activation_function"),
    "scaling as a list": (LLAMA | {"rope_scaling": [1, 2]}, "of another kind"),
    "scaling's kind as a list": (LLAMA | {"rope_scaling": {"rope_type": ["x"]}}, "rope_type"),
    "kinds of layers as a number": (LLAMA | {"model_type": "gemma2", "sliding_window": 4, "layer_types": 7}, "kind"),
    "kinds of layers as lists": (LLAMA | {"model_type": "gemma2", "sliding_window": 4, "layer_types": [["a"]]}, "kind"),
    "a name of 1 MB": (GPT2 | {"model_type": "x" * 10**6}, "is not supported"),
    "a name with escapes": (GPT2 | {"model_type": "\x1b[31mred\x07"}, "is not supported"),
}  # fmt: skip


@pytest.mark.parametrize(("config", "message"), CONFIGS.values(), ids=CONFIGS)
def test_configurations_out_of_proportion(config, message, refused, tmp_path):
    text = config if isinstance(config, str) else json.dumps(config)
    (tmp_path / "config.json").write_text(text)
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    said = refused("attribute", "--model", tmp_path, "--task", "sort")
    assert any(part in said for part in message.split("|"))


OPTIONS = {
    **{f"--device {name}": (["--device", name], "device") for name in
        ("meta", "meta:0", "mps", "privateuseone", "xla", "nonsense", "x" * 10**5, "cpu\x1b[31m")},
    "--steps 100000": (["--method", "eap-ig", "--steps", "100000"], "steps must be at most 1000"),
    "--steps 1e9": (["--method", "eap-ig", "--points", "left", "--steps", "1000000000"], "at most 10000"),
    "--steps of components": (["--method", "eap-ig-activations", "--steps", "100000"], "at most 10000"),
    "--points outside": (["--method", "eap-ig", "--points", "2:0.5,-1:0.5"], "from corrupt 0 to clean 1"),
    "--points below": (["--method", "eap-ig", "--points", "-0.1:1"], "points"),
    "--points by the thousand": (["--method", "eap-ig", "--points", ",".join(["1:0.00005"] * 20000)], "at most 10000"),
    "pairs": (["--n-pairs", str(10**12)], "at most 1000000 pairs"),
    "another toy's task": (["--task", "toy-induction"], "is another model's: its token"),
    "another task": (["--task", "sort"], "is another model's: its token"),
    "another task's mean": (["--ablation", "mean", "--reference-task", "sort"], "is another model's: its token"),
    "a task that is not there": (["--task", "nowhere.jsonl"], "got 'nowhere.jsonl', a file that is not there"),
    "a tokenizer that is none": (["--tokenizer", "/dev/null"], "must be a folder"),
}  # fmt: skip


@pytest.mark.parametrize(("options", "message"), OPTIONS.values(), ids=OPTIONS)
def test_options_out_of_proportion(options, message, refused):
    assert message in refused("attribute", *(["--n-pairs", "2"] if "--n-pairs" not in options else []), *options)


@pytest.mark.parametrize("share", ["2", "-1", "0", "nan", "1.01"])
def test_a_share_of_the_behaviour_is_one(share, refused):
    assert "--faithfulness: must be a" in refused("run", "--faithfulness", share)


TASKS = {
    "a word of 1 MB": {"clean": "x" * 10**6, "corrupt": "y", "answer": "z"},
    "a word with escapes": {"clean": "\x1b[31mred\x07", "corrupt": "y", "answer": "z"},
    "a field with escapes": {"cle\x1b[31man": "x", "answer": "z"},
    "a field of 1 MB": {"c" * 10**6: "x", "answer": "z"},
    "many fields": {f"f{i}": "x" for i in range(30_000)},
    "a long prompt": {"clean": [1] * 30_000, "corrupt": [2] * 30_000, "answer": 1, "wrong": 2},
    "a large id": {"clean": [2**31 - 1], "corrupt": [2], "answer": 1, "wrong": 2},
    "many answers": {"clean": [1], "corrupt": [2], "answer": list(range(3, 30_000)), "wrong": 2},
    "an answer of many tokens": {"clean": [1], "corrupt": [2], "answer": "Mary " * 10_000, "wrong": 2},
    "a bracket of lists": {"clean": [[]] * 10_000, "answer": "z"},
}  # fmt: skip


@pytest.mark.parametrize("entry", TASKS.values(), ids=TASKS)
def test_task_files_out_of_proportion(entry, refused, tmp_path):
    (tmp_path / "t.jsonl").write_text(json.dumps(entry))
    refused("attribute", "--task", tmp_path / "t.jsonl")


@pytest.mark.parametrize("graph", [
    {"n_layers": 10**9, "n_heads": 4, "has_mlp": True}, {"n_layers": 3, "n_heads": 10**9, "has_mlp": True},
    {"n_layers": 60_000, "n_heads": 60_000, "has_mlp": True}, {"n_layers": [3], "n_heads": 4, "has_mlp": True},
])  # fmt: skip
def test_score_files_of_huge_graphs(graph, refused, tmp_path):
    header = {"format_version": 1, "graph": graph, "model": {"name": "m", "content_hash": "0" * 16}}
    tensors = {"scores": torch.zeros(2, 2), "mask": torch.ones(2, 2, dtype=torch.bool)}
    save_file(tensors, tmp_path / "s.safetensors", {"eapcore": json.dumps(header)})
    assert "must be a score file" in refused("evaluate", "--scores", tmp_path / "s.safetensors")


def test_pipes_in_place_of_files(refused, tmp_path):
    for name in ("t.jsonl", "s.safetensors", "model.safetensors", "ckpt.pt"):
        os.mkfifo(tmp_path / name)
    refused("attribute", "--task", tmp_path / "t.jsonl")
    refused("evaluate", "--scores", tmp_path / "s.safetensors")
    refused("attribute", "--model", tmp_path / "ckpt.pt", "--task", "sort")
    (tmp_path / "config.json").write_text(json.dumps(GPT2))
    refused("attribute", "--model", tmp_path, "--task", "sort")
    (tmp_path / "config.json").unlink()
    os.mkfifo(tmp_path / "config.json")
    refused("attribute", "--model", tmp_path, "--task", "sort")


def test_the_hub_out_of_reach_is_said_at_once(refused, monkeypatch):
    import huggingface_hub.constants as constants

    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for endpoint in (f"http://127.0.0.1:{port}", "http://no-such-host.invalid"):
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        start = time.monotonic()
        said = refused("attribute", "--model", "nobody/nothing-that-is-cached", "--task", "sort")
        assert "the Hub cannot be reached" in said and time.monotonic() - start < 20  # with its own retries 23
