"""Standard errors, sign consistency and the bootstrap's circuits are those of each pair's own scores."""

from __future__ import annotations

import json
from importlib.util import find_spec
from itertools import product

import oracle
import pytest
import torch
from models import lists, random_model, random_pairs
from oracle import mean_of
from refusal import refused

import eapcore.attribution.statistics as statistics
from eapcore.attribution.attribute import attribute
from eapcore.graph.graph import Graph
from eapcore.graph.scores import EdgeScores
from eapcore.tasks.stream import PairStream

N = 5


@pytest.fixture(scope="module")
def case():
    model = random_model()
    return model, random_pairs(model, [6, 3, 8, 5, 8], first_difference=2)


def near(found, expected, within=1e-12):
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=0, atol=within)


def check(found, rows):
    """The statistics of scores from those of each pair, [N, S, R]."""
    mean = rows.mean(0)
    near(found.scores, mean)
    near(found.standard_error, rows.std(0) / len(rows) ** 0.5)
    same = ((rows.sign() == mean.sign()) & (mean != 0)).double().mean(0)
    near(found.sign_consistency, same)


def drawn_again(rows, mask, n_pairs):
    """The mean Jaccard index of the top 1…E of the bootstrap's draws, each with the next, literally."""
    counts = statistics._counts(range(n_pairs), n_pairs)
    assert counts.sum(1).tolist() == [n_pairs] * statistics.DRAWS
    tops = [(c @ rows.flatten(1)).view_as(mask)[mask].abs().sort(descending=True, stable=True).indices for c in counts]
    found = []
    for n in range(1, int(mask.sum()) + 1):
        sets = [set(top[:n].tolist()) for top in tops]
        each = [len(a & b) / len(a | b) for a, b in zip(sets, sets[1:] + sets[:1], strict=True)]
        found.append(sum(each) / len(each))
    return torch.tensor(found, dtype=torch.float64)


def test_they_equal_those_of_a_literal_oracle_pair_by_pair(case):
    model, pairs = case
    rows = []
    mean_of(model, pairs, lambda pair: rows.append(oracle.one_pass(pair, pair.deltas())) or rows[-1])
    rows = torch.stack(rows)
    for storage, reduce in product(("dense", "factored"), ("all", "pair", "position")):
        size = 2 if storage == "dense" else 5
        how = {"storage": storage, "reduce": reduce, "batch_size": size}
        found = attribute(model, pairs, uncertainty=True, **how)
        check(found, rows)
        near(found.jaccard, drawn_again(rows, found.mask, N))
        plain = attribute(model, pairs, **how)
        assert plain.standard_error is None and plain.jaccard is None
        near(found.scores, plain.scores)
        if reduce == "position":
            near(found.per_position, plain.per_position)


def test_they_are_those_of_every_method(case):
    model, pairs = case
    ways = [{"method": "hybrid"}, {"method": "qk-fix"}, {"method": "grad-drop"}]
    ways += [{"ablation": "zero"}, {"points": [(0.5, 0.5), (1.0, 0.5)], "spread": True}]
    for how in ways:
        rows = attribute(model, pairs, reduce="pair", batch_size=2, **how).per_pair
        for reduce in ("all",) if how.get("method") == "grad-drop" else ("all", "position"):
            check(attribute(model, pairs, reduce=reduce, batch_size=3, uncertainty=True, **how), rows)


def test_streams_and_interrupted_work_give_the_same(case, tmp_path):
    model, pairs = case
    expected = attribute(model, pairs, uncertainty=True, batch_size=2)
    columns, names = lists(pairs), ("clean", "corrupt", "answer", "wrong")
    fields = zip(columns["clean"], columns["corrupt"], columns["answers"], columns["wrong"], strict=True)
    rows = [dict(zip(names, row, strict=True)) for row in fields]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = attribute(model, PairStream(tmp_path / "pairs.jsonl", window=2), uncertainty="auto")
    whole = attribute(model, pairs, "logit_diff", uncertainty=True)
    for name in ("scores", "standard_error", "sign_consistency", "jaccard"):
        near(getattr(found, name), getattr(whole, name))

    def stop(done, total):
        if done >= 3:
            raise KeyboardInterrupt

    how = {"uncertainty": "auto", "batch_size": 2, "resume": tmp_path / "kept"}
    with pytest.raises(KeyboardInterrupt):
        attribute(model, pairs, progress=stop, **how)
    refused("was begun with the uncertainty 1, got 0", attribute, model, pairs, **how | {"uncertainty": False})
    again = attribute(model, pairs, **how)
    for name in ("scores", "standard_error", "sign_consistency", "jaccard"):
        assert torch.equal(getattr(again, name), getattr(expected, name))


def test_what_varies_little_is_enough_and_blocks_of_pairs_are_drawn_apart():
    graph = Graph(1, 2, True)
    mask = graph.edge_mask()
    base = torch.rand(mask.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * mask
    for noise, low, high in ((1e-6, 1.0, 1.0), (30.0, 0.0, 0.9)):
        drawn = torch.randn(1500, *mask.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        rows = base + noise * mask * drawn
        sums = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in statistics.shapes(graph).items()}
        for part in torch.arange(1500).split(700):
            for name, x in statistics.sums_of(rows[part], part.tolist(), 1500).items():
                sums[name] += x
        error, _, jaccard = statistics.described(rows.sum(0), sums, 1500, mask)
        near(jaccard, drawn_again(rows, mask, 1500))
        assert low <= float(jaccard[2]) <= high
        torch.testing.assert_close(error, rows.std(0) / 1500**0.5, rtol=1e-6, atol=1e-9)


def test_they_are_kept_in_files_and_select_stable_edges(case, tmp_path):
    model, pairs = case
    found = attribute(model, pairs, uncertainty=True)
    found.save(tmp_path / "scores.safetensors")
    again = EdgeScores.load(tmp_path / "scores.safetensors")
    for name in ("standard_error", "sign_consistency", "jaccard"):
        assert torch.equal(getattr(again, name), getattr(found, name))
    if find_spec("pandas"):
        table = found.to_pandas()
        assert table["standard_error"][0] == float(found.standard_error[model.graph.edge(table["edge"][0])])
    rows = attribute(model, pairs, reduce="pair").per_pair
    for share in (0.0, 0.8, 1.0):
        needed = (found.scores < 0) & ((rows < 0).double().mean(0) >= share) & found.mask
        assert torch.equal(found.stable(share).mask, needed) and 0 < needed.sum() < found.mask.sum()
    names = [edge for edge, _ in found.top(model.graph.n_edges) if found.stable().mask[model.graph.edge(edge)]]
    assert set(found.stable(n=3).edges) == set(names[:3])
    refused("need the sign consistency", attribute(model, pairs).stable)
    refused("share must be a number from 0 to 1, got 2", found.stable, 2)
    refused("sizes without one", attribute(model, pairs, method="grad-drop", uncertainty=True).stable)
    refused(r"jaccard must be \[E\] = \[75\], got \[3\]", EdgeScores, found.scores, found.graph, jaccard=torch.zeros(3))


def test_where_there_are_none_it_is_said(case):
    model, pairs = case
    one = pairs.select([0])
    refused("at least 2 pairs, got eap, level 'edge' and 1 pairs", attribute, model, one, uncertainty=True)
    refused("got eap, level 'node'", attribute, model, pairs, level="node", uncertainty=True)
    refused("got hisp, level 'edge'", attribute, model, pairs, method="hisp", uncertainty=True)
    assert attribute(model, pairs, method="hisp", uncertainty="auto").jaccard is None
    refused("uncertainty must be True, False or 'auto', got 'yes'", attribute, model, pairs, uncertainty="yes")
    assert attribute(model, one, uncertainty="auto").standard_error is None
    assert attribute(model, pairs, level="node", uncertainty="auto").scores.shape == (model.graph.n_senders,)


def test_they_are_kept_where_an_eighth_of_the_memory_suffices(case, monkeypatch):
    model, pairs = case
    for free, kept in ((1 << 30, True), (1 << 16, False)):
        monkeypatch.setattr(statistics, "budget", lambda device, free=free: free)
        assert (attribute(model, pairs, uncertainty="auto").jaccard is not None) == kept
