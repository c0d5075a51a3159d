"""A task file that is read a window at a time gives what the whole gives, and each pair's scores go to a folder."""

from __future__ import annotations

import json

import pytest
import torch
from models import lists, random_case
from refusal import refused

import eapcore.cli.inputs as inputs
import eapcore.graph.pair_scores as pair_scores
from eapcore.attribution.attribute import attribute
from eapcore.cli import main
from eapcore.graph.scores import EdgeScores
from eapcore.tasks.stream import PairStream


def entries(pairs):
    each = lists(pairs)
    fields = zip(each["clean"], each["corrupt"], each["answers"], each["wrong"], strict=True)
    return [dict(zip(("clean", "corrupt", "answer", "wrong"), row, strict=True)) for row in fields]


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A model, its pairs, and the file that holds them."""
    model, pairs = random_case([5, 6, 3, 7, 4] * 5, n_heads=2, d_model=16, first_difference=1)
    path = tmp_path_factory.mktemp("tasks") / "pairs.jsonl"
    path.write_text("\n\n".join(map(json.dumps, entries(pairs))) + "\n\n", encoding="utf-8")
    return model, pairs, path


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


@pytest.mark.parametrize("options", [
    {}, {"reduce": "position"}, {"level": "neuron"}, {"method": "grad-drop"}, {"ablation": "zero", "batch_size": 2},
], ids=str)  # fmt: skip
def test_windows_give_the_scores_of_the_whole(case, options):
    model, pairs, path = case
    stream = PairStream(path, window=7)
    expected, found = attribute(model, pairs, **options), attribute(model, stream, **options)
    assert float(expected.scores.abs().max()) > 1e-3 and len(stream) == len(pairs) == found.meta["task"]["n_pairs"]
    close(found.scores, expected.scores)
    assert found.meta["metric"] == pytest.approx(expected.meta["metric"], abs=1e-12)
    if "reduce" in options:
        close(found.per_position, expected.per_position)


@pytest.mark.parametrize("options", [{}, {"method": "grad-drop"}, {"level": "neuron"}], ids=str)
def test_each_pair_s_scores_are_written_as_they_come(case, options, tmp_path, monkeypatch):
    model, pairs, path = case
    monkeypatch.setattr(pair_scores, "SHARD", 3_000)
    expected = attribute(model, pairs, reduce="pair", **options)
    for task in (PairStream(path, window=7, n=20), pairs):
        folder = tmp_path / str(len(task))
        found = attribute(model, task, reduce="pair", pairs_to=folder, batch_size=3, **options)
        parts = expected.per_pair if isinstance(expected.per_pair, dict) else {"scores": expected.per_pair}
        read = list(pair_scores.read_pairs(folder))
        index = torch.cat([part["index"] for part in read])
        assert sorted(index.tolist()) == list(range(len(task))) and len(read) > 1
        for name, rows in parts.items():
            close(torch.cat([part[name] for part in read]), rows[index])
        close(found.scores, parts["scores"][: len(task)].mean(0))
        assert not found.per_pair and found.meta["per_pair"] == {"folder": folder.name}


def test_a_stream_that_was_interrupted_goes_on_to_the_same_bits(case, tmp_path):
    model, _, path = case
    stream = PairStream(path, window=7)
    expected = attribute(model, stream, batch_size=2)

    def stop(done, total):
        if done >= 11:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        attribute(model, stream, batch_size=2, resume=tmp_path / "kept", progress=stop)
    seen = []
    found = attribute(model, stream, batch_size=2, resume=tmp_path / "kept", progress=lambda done, _: seen.append(done))
    assert 11 <= seen[0] <= 13 and seen[-1] == 25 and torch.equal(found.scores, expected.scores)
    assert found.meta == expected.meta
    options = {"reduce": "pair", "pairs_to": tmp_path / "pairs", "resume": tmp_path / "each"}
    with pytest.raises(InterruptedError):
        attribute(model, stream, batch_size=2, progress=stop, **options)
    refused("must be a folder of pairs' scores that eapcore finished", pair_scores.read_index, tmp_path / "pairs")
    attribute(model, stream, batch_size=2, **options)
    read = list(pair_scores.read_pairs(tmp_path / "pairs"))
    index = torch.cat([part["index"] for part in read])
    assert sorted(index.tolist()) == list(range(25))
    whole = attribute(model, stream.first, reduce="pair").per_pair
    rows = torch.cat([part["scores"] for part in read])[index.argsort()][:7]
    close(rows, whole)


def test_parquet_holds_the_same(case, tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    model, pairs, _ = case
    path = tmp_path / "pairs.parquet"
    parquet.write_table(arrow.Table.from_pylist(entries(pairs)), path, row_group_size=4)
    for n in (25, 9):
        stream = PairStream(path, window=7, n=n)
        assert [len(window) for _, window in stream.windows(lambda number: number != 1)] == (
            [7, 7, 4] if n > 9 else [7]
        )
        expected = attribute(model, pairs.select(torch.arange(n)))
        close(attribute(model, stream).scores, expected.scores)
    path.write_bytes(b"nothing")
    refused("must be a Parquet file, but it cannot be read", PairStream, path)


def test_what_a_stream_cannot_do_is_said(case, tmp_path):
    model, _, path = case
    stream = PairStream(path, window=7)
    refused("of a task that is read as a stream needs a reference task", attribute, model, stream, ablation="mean")
    refused("each pair of a stream need a folder: give pairs_to", attribute, model, stream, reduce="pair")
    refused("reduce must be 'pair', got 'all'", attribute, model, stream, pairs_to=tmp_path)
    refused("must end in .jsonl or .parquet", PairStream, tmp_path / "pairs.csv")
    refused("window must be at least 1", PairStream, path, window=0)
    (tmp_path / "empty.jsonl").write_text("\n")
    refused("is empty", PairStream, tmp_path / "empty.jsonl")
    broken = path.read_text().split("\n\n")
    broken[17] = broken[17].replace('"answer": [', '"answer": [999, ')
    (tmp_path / "broken.jsonl").write_text("\n".join(broken))
    there = PairStream(tmp_path / "broken.jsonl", window=7)
    refused(r"pair 3 has the answer 999, .* \(counted from pair 14 of the task\)", attribute, model, there)


def test_the_command_reads_a_large_file_as_it_goes(case, tmp_path, monkeypatch, capsys):
    from models import save_checkpoint

    model, pairs, path = case
    monkeypatch.setattr(inputs, "_LARGE", 10)
    folder = save_checkpoint(model, tmp_path / "model")
    out = tmp_path / "scores.safetensors"
    command = ["attribute", "--model", folder, "--task", path, "--method", "eap", "--reduce", "pair"]
    command += ["--device", "cpu", "--out", out]
    assert main([str(x) for x in command]) == 0
    printed = capsys.readouterr().out
    assert "25 prompt pairs" in printed and printed.endswith(f"wrote    {out} and {out.with_suffix('.pairs')}/\n")
    close(EdgeScores.load(out).scores, attribute(model, pairs).scores)
    assert pair_scores.read_index(out.with_suffix(".pairs"))["n_pairs"] == 25
    assert main([*map(str, command), "--ablation", "mean"]) == 2
    assert "--ablation mean of a file as large as pairs.jsonl needs --reference-task" in capsys.readouterr().err
