"""Every command prints its first pair as it understood it."""

from __future__ import annotations

import json

from eapcore.cli import main

COMMANDS = {
    "attribute": (), "patch": ("--show", "0"), "acdc": ("--threshold", "10"), "path": ("--path", "embed->logits"),
    "verify": ("--top-n", "2"), "evaluate": (), "run": ("--top-n", "3"),
}  # fmt: skip


def test_every_command_prints_the_first_pair(eapcore):
    for command, more in COMMANDS.items():
        out = {"attribute": "s.safetensors", "patch": "e.safetensors", "run": "folder"}.get(command, "r.json")
        status, printed, _ = eapcore(command, *more, out=out)
        assert status == 0, printed
        assert "first    7 tokens: '1' '1' '0' '1' '2' '1' '0'\n" in printed, command
        assert "corrupt '1' → '0' at 3; read at 6, behind '0': right '1' (1), wrong '0' (0)\n" in printed, command


def test_the_first_pair_shows_what_was_read(tmp_path, capsys):
    def shown(**entry):
        (tmp_path / "t.jsonl").write_text(json.dumps(entry))
        assert main(["attribute", "--task", str(tmp_path / "t.jsonl"), "--out", str(tmp_path / "s.safetensors")]) == 0
        return capsys.readouterr().out

    text = {
        "clean": "Mary and John went to",
        "corrupt": "Alice and Ben went to",
        "answer": "Mary",
        "wrong": ["John", "Ben"],
    }
    said = shown(**text)
    assert (
        ", bos none; metric logit_diff\n" in said
        and "fields   clean text, corrupt text, answer text, wrong text\n" in said
    )
    assert "first    5 tokens: 'Mary' 'and' 'John' 'went' 'to'\n" in said
    assert "corrupt 'Mary' → 'Alice' at 0, 'John' → 'Ben' at 2; read at 4, behind 'to': right 'Mary' (1)" in said
    assert "wrong 'John' (2), 'Ben' (4)" in said
    ids = shown(clean=[1, 5, 9], corrupt=[1, 6, 9], answer=[2], wrong=[3], position=1)
    assert "clean token ids" in ids and "3 tokens: 'Mary'" in ids and "read at 1, behind" in ids
