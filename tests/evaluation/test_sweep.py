"""A sweep scores each entry as `attribute` does, makes nothing twice, and compares what it made."""

from __future__ import annotations

import json
import math
import threading
from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch
from models import random_case, random_model, random_pairs
from refusal import refused

from eapcore.attribution.attribute import attribute
from eapcore.cli import main
from eapcore.evaluation.agreement import agreement
from eapcore.evaluation.sweep import Entry, sweep
from eapcore.graph.scores import EdgeScores
from eapcore.patching.circuits import metric_on

SHARES = (0.1, 0.5, 1.0)


@pytest.fixture
def entries():
    """Two methods on one model, and another model; with what was loaded."""
    model, pairs = random_case([5, 4, 6], n_heads=2, d_model=8)
    other = random_model(n_layers=1, n_heads=2, d_model=8)
    loaded = []

    def entry(name, model, options, pairs):
        def load():
            loaded.append(name)
            return model, pairs

        return Entry(name, load, "nll", options, {"method": options.get("method", "eap")})

    made = [entry("a", model, {}, pairs), entry("b", model, {"method": "eap-ig", "steps": 2}, pairs)]
    return [*made, entry("c", other, {}, random_pairs(other, [4, 5]))], loaded


def test_each_entry_is_scored_once_and_compared_with_the_first(entries, tmp_path):
    entries, loaded = entries
    found = sweep(entries, tmp_path, shares=SHARES)
    scores = [EdgeScores.load(tmp_path / name / "scores.safetensors") for name in "abc"]
    for entry, kept in zip(entries, scores, strict=True):
        model, pairs = entry.load()
        assert torch.equal(kept.scores, attribute(model, pairs, "nll", **entry.options).scores)
    a, b, c = found.entries
    assert (a.spearman, list(a.jaccard)) == (1.0, [1.0] * 3) and c.jaccard[0] != c.jaccard[0]
    assert b.spearman == pytest.approx(agreement(scores[0], scores[1]).spearman) and 0 < b.jaccard[1] < 1
    tops = [score.top_n(b.sizes[1]).mask for score in scores[:2]]
    assert b.jaccard[1] == int((tops[0] & tops[1]).sum()) / int((tops[0] | tops[1]).sum())
    model, pairs = entries[1].load()
    graph = model.graph
    circuits = [scores[1].top_n(b.sizes[1]), scores[1].top_n(graph.n_edges), scores[1].top_n(0)]
    value, clean, ablated = metric_on(model, pairs, "nll", circuits)
    assert b.faithfulness[1] == pytest.approx((value - ablated) / (clean - ablated))
    loaded.clear()
    again = sweep(entries, tmp_path, shares=SHARES)
    assert not loaded and again.done == 3 and found.done == 0
    assert str(again.entries) == str(found.entries)
    found.save(tmp_path / "table.json")
    assert json.loads((tmp_path / "table.json").read_text())["entries"][2]["spearman"] is None


def test_an_interrupted_sweep_goes_on_and_other_settings_are_refused(entries, tmp_path):
    entries, loaded = entries

    def stop(name):
        def progress(done, total):
            if name == "b":
                raise InterruptedError

        return progress

    with pytest.raises(InterruptedError):
        sweep(entries, tmp_path, progress=stop)
    assert (tmp_path / "a" / "entry.json").exists() and not (tmp_path / "b" / "entry.json").exists()
    loaded.clear()
    assert sweep(entries, tmp_path).done == 1 and loaded == ["b", "c"]
    assert not list(tmp_path.rglob("unfinished"))
    changed = [Entry("a", entries[1].load, "nll", {}, {"method": "eap-ig"})]
    refused("holds results of another method: delete it, or give the entry another name", sweep, changed, tmp_path)
    refused("holds results of another sizes", sweep, entries[:1], tmp_path, shares=SHARES)
    refused("name must be that of a folder of its own, got '../x'", sweep, [Entry("../x", entries[0].load)], tmp_path)
    refused("got 'a'", sweep, [entries[0], entries[0]], tmp_path)
    refused("at least one entry", sweep, [], tmp_path)
    wrong = Entry("d", entries[0].load, "nll", {"method": "guess"})
    refused("d: method must be one of", sweep, [wrong], tmp_path)


def test_the_next_model_is_loaded_while_this_one_runs_if_there_is_memory(entries, tmp_path):
    (first, second, third), _ = entries
    scoring, loads = threading.Event(), Counter()

    def beside():
        loads["second"] += 1
        assert scoring.wait(60)  # the first is under way meanwhile
        return second.load()

    def no_room():
        loads["third"] += 1
        if loads["third"] == 1:
            raise MemoryError
        return third.load()

    made = [first, replace(second, load=beside), replace(third, load=no_room)]
    found = sweep(made, tmp_path, shares=SHARES, progress=lambda name: lambda done, total: scoring.set())
    assert [entry.name for entry in found.entries] == ["a", "b", "c"] and loads == {"second": 1, "third": 2}

    def damaged(error):
        raise error

    for error in (ValueError("no weights"), FileNotFoundError("no weights"), RuntimeError("no weights")):
        made = [replace(first, name="d"), replace(second, name="e", load=partial(damaged, error))]
        with pytest.raises(type(error), match=r"^e: no weights"):
            sweep(made, tmp_path)
    assert (tmp_path / "d" / "entry.json").exists()


def test_the_command_reads_entries_from_a_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = (
        '[defaults]\nn-pairs = 4\ndevice = "cpu"\n\n[[entry]]\nname = "x"\n\n[[entry]]\nname = "y"\nmethod = "relp"\n'
    )
    (tmp_path / "s.toml").write_text(text)
    assert main(["sweep", "s.toml", "--out", "all"]) == 0
    printed = capsys.readouterr().out
    assert "2 entries, 0 of them done before; compared with x" in printed and "\ny " in printed
    meta = EdgeScores.load(tmp_path / "all" / "y" / "scores.safetensors").meta
    assert (meta["method"]["name"], meta["task"]["n_pairs"], meta["metric"]["name"]) == ("relp", 4, "logit_diff")
    assert all(math.isfinite(x) for e in json.loads((tmp_path / "all" / "table.json").read_text())["entries"]
               for x in e["faithfulness"])  # fmt: skip
    first = '[[entry]]\nname = "first"\n[[entry]]\nname = "z"\n'
    for broken, said in {
        first + 'model = "./none"\n': "s.toml: z: expected a folder with config.json and a weights file at ./none,",
        first + 'task = "none.jsonl"\n': "s.toml: z: task must be one of",
        first + 'task = "ioi"\ncorruption = "none"\n': "s.toml: z: the corruption of ioi must be one of other-names,",
        first + 'model = "gpt2"\n': "s.toml: z: --task is needed with --model gpt2",
        first + 'reference-task = "none.csv"\n': "got 'none.csv', a file that is not there",
        "[[entry]]\nname = 3\n": "entry 1 of s.toml must have a name of its own, got 3",
        '[[entry]]\nname = "z"\ncolour = "red"\n': "entry 'z' of s.toml: unrecognized arguments: --colour red",
        "entry = 3\n": "s.toml must have [[entry]] tables and at most [defaults], got no [[entry]]",
        "[[entry\n": "s.toml is not TOML",
    }.items():
        (tmp_path / "s.toml").write_text(broken)
        assert main(["sweep", "s.toml", "--out", "all"]) == 2 and said in capsys.readouterr().err
    assert not (tmp_path / "all" / "first").exists()
