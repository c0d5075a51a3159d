"""What is not computed does not matter: shared prefixes, the last layer but at the answer, all behind the answer."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import eapcore.kernels as kernels
import oracle
import pytest
import torch
from models import KINDS, joined, random_case, random_model, random_pairs, with_weights
from torch.utils._python_dispatch import TorchDispatchMode

from eapcore.attribution.attribute import attribute
from eapcore.attribution.dense import _layers_at_once, pairs_at_once
from eapcore.tasks.metrics import METRICS


def assert_exact(model, pairs, **options):
    expected = oracle.eap(model, pairs)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(attribute(model, pairs, **options).scores, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("first", [0, 4, 7], ids=["first token", "middle", "last token"])
@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_a_shared_prefix_leaves_the_scores_as_they_were(options, first):
    model = random_model(**options)
    assert_exact(model, random_pairs(model, [8, 8, 8], first_difference=first))


@pytest.mark.parametrize("batch_size", [1, 2, 3, 6])
def test_different_prefixes_and_lengths_in_a_batch_leave_the_scores_as_they_were(batch_size):
    model = random_model()
    shapes = ((8, 6), (5, 0), (7, 3), (9, 8), (4, 3), (6, 2))
    pairs = joined(*(random_pairs(model, [length], first_difference=first, seed=first) for length, first in shapes))
    assert pairs.first_difference().tolist() == [6, 0, 3, 8, 3, 2]
    assert_exact(model, pairs, batch_size=batch_size)


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_answers_before_the_last_token_leave_the_scores_as_they_were(options):
    model, pairs = random_case([9, 9, 6], first_difference=2, **options)
    assert_exact(model, replace(pairs, positions=torch.tensor([4, 8, 2])))


class Products(TorchDispatchMode):
    """Multiply-adds of all matrix products, as they are launched."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm):
            self.count += out.numel() * args[0].shape[-1]
        if func.overloadpacket is torch.ops.aten.addmm:
            self.count += out.numel() * args[1].shape[-1]
        return out


def products(model, pairs, metric="logit_diff"):
    with Products() as products:
        attribute(model, pairs, metric, impl="reference")
    return products.count


@pytest.mark.parametrize(
    ("method", "reduce"),
    [*((method, reduce) for method in ("eap", "relp") for reduce in ("all", "pair", "position")), ("qk-fix", "pair")],
)
def test_making_the_receivers_of_some_pairs_at_a_time_leaves_the_scores_as_they_were(method, reduce, limited):
    model, pairs = random_case([9, 9, 6, 7, 9], first_difference=2, n_layers=3)
    whole = attribute(model, pairs, method=method, reduce=reduce, storage="dense")
    one = 7 * model.graph.receivers_per_layer * model.config.d_model * 8
    limited(workspace=2 * one)  # two pairs of seven tokens: 2 + 2 + 1
    assert pairs_at_once(5, one, model.device) == 2
    some = attribute(model, pairs, method=method, reduce=reduce, storage="dense", batch_size=5)
    for name in ("scores", "per_pair", "per_position"):
        expected, found = getattr(whole, name, None), getattr(some, name, None)
        if expected is not None:
            assert expected.abs().max() > 1e-3
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


LAYERED = [
    *((options, "eap", "all", 2) for options in KINDS.values()),
    *(({"n_layers": 5}, method, reduce, 3) for method in ("eap-ig", "relp") for reduce in ("pair", "position")),
    ({"n_layers": 3}, "qk-fix", "all", 2),
]


@pytest.mark.parametrize(("options", "method", "reduce", "layers"), LAYERED)
def test_several_layers_receivers_contracted_at_once_leave_the_scores_as_they_were(
    options, method, reduce, layers, limited, monkeypatch
):
    model, pairs = random_case([8, 8, 6], first_difference=2, **options)
    how = {"method": method, "reduce": reduce, "storage": "dense", "batch_size": 3}
    expected = attribute(model, pairs, **how)
    masks, contract = [], kernels.edge_scores

    def edge_scores(*args, mask=None, **options):
        masks.append(mask)
        return contract(*args, mask=mask, **options)

    monkeypatch.setattr(kernels, "edge_scores", edge_scores)
    limited(receivers=layers * model.graph.receivers_per_layer, workspace=1 << 30)
    found = attribute(model, pairs, **how)
    limited(positions_first=True)
    elsewhere = attribute(model, pairs, **how)
    assert method == "qk-fix" or None not in masks  # those at the positions that are read together, too
    at_once = [mask.shape[1] for mask in masks if mask is not None]
    if method == "qk-fix" or model.config.n_layers == 1:
        assert max([0, *at_once]) <= 2 * model.config.n_heads  # one layer's
    else:
        assert max(at_once) > model.graph.receivers_per_layer
    for name in ("scores", "per_pair", "per_position"):
        if (part := getattr(expected, name)) is not None:
            assert part.abs().max() > 1e-3
            torch.testing.assert_close(getattr(found, name), part, rtol=0, atol=1e-12)
            torch.testing.assert_close(getattr(elsewhere, name), part, rtol=0, atol=1e-12)


def test_as_many_layers_at_once_as_fill_the_contractions_tiles():
    for layers, each, width, tokens, expected in (
        (12, 37, 768, 5120, 12),  # GPT-2 small: 444 receivers of two tiles, as full as 222 of one
        (12, 37, 768, 20480, 3),  # for more there is no room
        (12, 37, 768, 1 << 20, 0),
        (48, 76, 1600, 640, 10),
        (40, 121, 5120, 160, 6),
        (32, 97, 4096, 640, 5),  # Llama-3.1-8B: seven would leave 89 of 768 empty
        (2, 1000, 512, 64, 1),
    ):
        graph = SimpleNamespace(receivers_per_layer=each, n_layers=layers)
        model = SimpleNamespace(graph=graph, config=SimpleNamespace(d_model=width), dtype=torch.bfloat16)
        store = SimpleNamespace(device=torch.device("cuda"), model=model, shape=(tokens // 16, 16))
        assert _layers_at_once(store, 1) == expected
        assert _layers_at_once(SimpleNamespace(**vars(store) | {"device": torch.device("cpu")}), 1) == 0


@pytest.mark.parametrize("first", [0, 2])
@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_a_run_that_makes_its_differences_by_itself_leaves_the_scores_as_they_were(
    options, first, monkeypatch, limited
):
    model, pairs = random_case([8, 8, 6], first_difference=first, **options)
    cases = [
        ("eap", {"storage": "dense"}), ("eap-ig", {"storage": "dense"}), ("clean-corrupt", {"storage": "factored"}),
        ("qk-fix", {"storage": "dense"}), ("relp", {"reduce": "pair"}), ("eap", {"level": "node"}),
    ]  # fmt: skip
    if model.config.d_mlp is not None:
        cases.append(("eap", {"level": "neuron"}))
    expected = [attribute(model, pairs, method=method, **how).scores for method, how in cases]
    # As on a GPU, with the specification of its kernels.
    monkeypatch.setattr("eapcore.attribution.score_batch.makes_differences", lambda model: True)
    limited(positions_first=True)
    for (method, how), there in zip(cases, expected, strict=True):
        assert there.abs().max() > 1e-3
        found = attribute(model, pairs, method=method, **how).scores
        torch.testing.assert_close(found, there, rtol=0, atol=1e-12, msg=lambda m, name=method: f"{name}: {m}")
    narrow = with_weights(model, lambda x: x.bfloat16())  # of which the residual stream alone is wider
    there = attribute(with_weights(narrow, torch.Tensor.double), pairs).scores
    by_itself = float((attribute(narrow, pairs).scores - there).norm() / there.norm())
    monkeypatch.undo()
    assert by_itself < 0.02 + 1.5 * float((attribute(narrow, pairs).scores - there).norm() / there.norm()) < 0.3


def logit_diff_of_all(logits, batch):  # not the package's own: it may read any logit
    return METRICS["logit_diff"](logits, batch)


@pytest.mark.parametrize("method", ["eap", "eap-ig", "clean-corrupt", "relp"])
@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_making_only_the_logits_that_a_metric_reads_leaves_the_scores_as_they_were(options, method):
    model, pairs = random_case([8, 8, 6], first_difference=2, **options)
    pairs = replace(pairs, wrong=torch.tensor([[3, 5, 7], [2, 6, -1], [9, -1, -1]]))
    for name, metric in (("logit_diff", logit_diff_of_all), ("logit_margin", None)):
        read = attribute(model, pairs, name, method=method)
        whole = attribute(model, pairs, metric or (lambda x, b: METRICS["logit_margin"](x, b)), method=method)
        assert whole.scores.abs().max() > 1e-3
        torch.testing.assert_close(read.scores, whole.scores, rtol=0, atol=1e-12)
        assert read.meta["metric"]["clean"] == pytest.approx(whole.meta["metric"]["clean"], abs=1e-12)


def test_the_unembedding_is_read_only_where_the_metric_does():
    model, pairs = random_case([8, 8, 6], d_vocab=200)
    products(model, pairs)  # what is made once for a model is there
    wide = products(model, pairs, logit_diff_of_all) - products(model, pairs, METRICS["logit_diff"])
    read = pairs.answers.shape[1] + pairs.wrong.shape[1]
    assert wide == 3 * len(pairs) * (200 - read) * model.config.d_model  # clean, corrupt and the way back


def test_work_shrinks_with_the_prefix_and_stops_behind_the_answer():
    model = random_model(n_layers=3)
    whole = products(model, random_pairs(model, [16, 16]))
    halved = products(model, random_pairs(model, [16, 16], first_difference=8))
    assert halved < 0.65 * whole
    early = replace(random_pairs(model, [16, 16]), positions=torch.tensor([7, 7]))
    assert products(model, early) == products(model, random_pairs(model, [8, 8]))
