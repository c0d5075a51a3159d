"""Metrics equal hand-written oracles; callables are taken as documented, and bad ones refused by a clear sentence."""

from __future__ import annotations

import dataclasses
import functools
import math

import oracle
import pytest
import torch
from models import random_case, random_model, random_pairs, with_weights
from refusal import refused
from torch.utils._python_dispatch import TorchDispatchMode

from eapcore.attribution.attribute import attribute
from eapcore.attribution.flow_routes import flow_routes
from eapcore.models.load import load
from eapcore.patching.circuits import metric_on
from eapcore.patching.nodes import patch_nodes
from eapcore.tasks import PromptPairs, find_pairs
from eapcore.tasks.metrics import (
    METRICS,
    MetricBatch,
    check_apart,
    evaluate,
    find_metric,
    logit_diff,
    logit_margin,
    tokens_read,
)

V = 11
ANSWERS = [[3], [0, 7], [10, 2, 5], [1, 4]]
WRONG = [[4, 9], [1], [0, 1, 3], [10]]


def padded(rows):
    width = max(len(row) for row in rows)
    return torch.tensor([row + [-1] * (width - len(row)) for row in rows])


@pytest.fixture
def case():
    """(logits [B, V], MetricBatch) with token sets of different sizes."""
    clean, corrupt, logits = torch.randn(3, 4, V, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    return logits, MetricBatch(padded(ANSWERS), padded(WRONG), clean, corrupt, torch.arange(4))


def probabilities(row):
    largest = max(row)
    exponentials = [math.exp(x - largest) for x in row]
    return [x / sum(exponentials) for x in exponentials]


def mean(values):
    return sum(values) / len(values)


def expected(name, row, clean, right, wrong):
    """One pair's value, in Python's own floats."""
    p, reference = probabilities(row), probabilities(clean)
    return {
        "logit_diff": lambda: mean([row[i] for i in right]) - mean([row[i] for i in wrong]),
        "prob_diff": lambda: sum(p[i] for i in right) - sum(p[i] for i in wrong),
        "logit_margin": lambda: mean([row[i] for i in right]) - max(row[i] for i in wrong),
        "nll": lambda: math.log(sum(p[i] for i in right)),
        "kl": lambda: -sum(a * math.log(a / b) for a, b in zip(reference, p, strict=True)),
    }[name]()


@pytest.mark.parametrize("name", METRICS)
def test_each_metric_equals_its_formula_on_token_sets_of_different_sizes(name, case):
    logits, batch = case
    rows, clean = logits.tolist(), batch.clean_logits.tolist()
    oracle_values = [expected(name, *parts) for parts in zip(rows, clean, ANSWERS, WRONG, strict=True)]
    values = evaluate(METRICS[name], logits, batch)
    assert values.dtype == torch.float64 and len({round(v, 6) for v in oracle_values}) == 4
    torch.testing.assert_close(values, torch.tensor(oracle_values, dtype=torch.float64), rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", METRICS)
def test_several_runs_of_a_batch_have_the_values_of_each(name, case):
    logits, batch = case
    runs = torch.stack([logits, batch.corrupt_logits, 2 * logits])
    each = torch.stack([evaluate(METRICS[name], run, batch) for run in runs])
    assert each.unique().numel() == 12
    torch.testing.assert_close(evaluate(METRICS[name], runs, batch), each, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", METRICS)
def test_higher_is_better(name, case):
    """More weight on the answers, or less distance to the clean run, raises every metric."""
    logits, batch = case
    if name == "kl":
        better = (logits + batch.clean_logits) / 2
    else:
        better = logits.scatter_add(1, batch.answers[:, :1], torch.ones(4, 1, dtype=torch.float64))
    assert bool((METRICS[name](better, batch) > METRICS[name](logits, batch)).all())


@pytest.mark.parametrize("name", METRICS)
def test_no_metric_overflows_on_large_logits(name, case):
    logits, batch = case
    assert bool(METRICS[name](logits * 1e4, batch).isfinite().all())


def test_names_and_callables_find_the_same_metric():
    wrong = padded(WRONG)
    for name, metric in METRICS.items():
        assert (
            find_metric(name, padded(ANSWERS), wrong) == find_metric(metric, padded(ANSWERS), wrong) == (name, metric)
        )


def own_metric(logits):
    return logits[:, 0]


def test_a_callable_goes_by_its_name():
    assert find_metric(own_metric, padded(ANSWERS), padded(WRONG)) == ("own_metric", own_metric)
    partial = functools.partial(own_metric)
    assert find_metric(partial, padded(ANSWERS), padded(WRONG)) == ("partial", partial)


@pytest.mark.parametrize("metric", ["accuracy", "", "Logit_Diff"])
def test_an_unknown_metric_lists_the_valid_ones(metric):
    names = "metric must be one of logit_diff, prob_diff, logit_margin, nll, kl"
    assert repr(metric) in refused(names, find_metric, metric, padded(ANSWERS), padded(WRONG))


@pytest.mark.parametrize("metric", [None, 3, torch.zeros(2)])
def test_a_metric_that_cannot_be_called_is_refused(metric):
    refused(r"metric must be one of .* or a callable, got", find_metric, metric, padded(ANSWERS), padded(WRONG))


@pytest.mark.parametrize("name", ["logit_diff", "prob_diff", "logit_margin"])
def test_a_metric_that_needs_wrong_answers_names_the_pair_without(name):
    with pytest.raises(ValueError, match=f"the metric {name} needs wrong answers, but pair 2 has none: nll needs none"):
        find_metric(name, padded(ANSWERS), padded([[1], [2], [], [3]]))
    with pytest.raises(ValueError, match=f"the metric {name} needs wrong answers, but pair 0 has none"):
        find_metric(name, padded(ANSWERS), torch.zeros(4, 0, dtype=torch.int64))
    assert find_metric("nll", padded(ANSWERS), torch.zeros(4, 0, dtype=torch.int64))[0] == "nll"


def test_a_metric_that_needs_answers_names_the_pair_without():
    with pytest.raises(ValueError, match="the metric nll needs answers, but pair 1 has none: give PromptPairs"):
        find_metric("nll", padded([[1], [], [2], [3]]), padded(WRONG))
    assert find_metric("kl", padded([[], [], [], [3]]), padded(WRONG))[0] == "kl"


def test_a_callable_with_one_parameter_takes_the_logits_and_with_two_the_batch_as_well(case):
    logits, batch = case

    class Callable:
        def __call__(self, logits, batch):
            return logits[:, 1] * batch.answers[:, 0]

    class Module(torch.nn.Module):
        def forward(self, logits, batch):
            return logits[:, 1] * batch.answers[:, 0]

    second = logits[:, 1] * batch.answers[:, 0]
    assert torch.equal(evaluate(Module(), logits, batch), second)
    assert torch.equal(evaluate(torch.nn.Flatten(0, 1), logits[:, :1], batch), logits[:, 0])
    assert torch.equal(evaluate(lambda logits: logits[:, 1], logits, batch), logits[:, 1])
    assert torch.equal(evaluate(lambda logits, scale=2: logits[:, 1] * scale, logits, batch), logits[:, 1] * 2)
    assert torch.equal(evaluate(lambda logits, *, scale=2: logits[:, 1] * scale, logits, batch), logits[:, 1] * 2)
    assert torch.equal(evaluate(lambda logits, batch: logits[:, 1] * batch.answers[:, 0], logits, batch), second)
    assert torch.equal(evaluate(lambda *both: both[0][:, 1] * both[1].answers[:, 0], logits, batch), second)
    assert torch.equal(evaluate(Callable(), logits, batch), second)
    assert torch.equal(evaluate(functools.partial(own_metric), logits, batch), logits[:, 0])


def test_callables_score_as_the_named_metric_does():
    model, pairs = random_case([4, 6])
    named = attribute(model, pairs, "logit_margin")
    two = attribute(model, pairs, lambda logits, batch: METRICS["logit_margin"](logits, batch))
    assert torch.equal(two.scores, named.scores)
    assert "lambda" in two.meta["metric"]["name"]

    @dataclasses.dataclass
    class Margin:
        """A callable that compares by value, and so has no hash."""

        name: str

        def __call__(self, logits, batch):
            return METRICS[self.name](logits, batch)

    assert torch.equal(attribute(model, pairs, Margin("logit_margin")).scores, named.scores)

    first = pairs.answers[:, 0]
    one = attribute(model, pairs.select(torch.tensor([0])), lambda logits: logits[:, first[0]])
    expected_scores = oracle.eap(model, pairs.select(torch.tensor([0])), lambda logits, batch: logits[:, first[0]])
    torch.testing.assert_close(one.scores, expected_scores, rtol=0, atol=1e-12)


def test_a_metric_sees_both_runs_and_which_pairs_they_are():
    model, pairs = random_case([4, 6, 3])
    seen = []

    def metric(logits, batch):
        for row, i in enumerate(batch.index.tolist()):
            runs = (logits[row].detach(), batch.clean_logits[row], batch.corrupt_logits[row])
            seen.append((i, runs, batch.answers[row], batch.wrong[row]))
        return METRICS["logit_diff"](logits, batch)

    attribute(model, pairs, metric, batch_size=2)
    values = {0: set(), 1: set(), 2: set()}
    for i, (logits, clean, corrupt), answers, wrong in seen:
        for run, prompts in ((clean, pairs.clean), (corrupt, pairs.corrupt)):
            expected_row = oracle.run(model, prompts[i, : pairs.lengths[i]]).logits[-1].detach()
            torch.testing.assert_close(run, expected_row, rtol=0, atol=1e-12)
        assert torch.equal(answers, pairs.answers[i]) and torch.equal(wrong, pairs.wrong[i])
        values[i].add("clean" if torch.equal(logits, clean) else "corrupt" if torch.equal(logits, corrupt) else "")
    assert list(values.values()) == [{"clean", "corrupt"}] * 3


def test_the_meta_holds_the_metric_on_both_runs():
    model, pairs = random_case([4, 6, 3])
    meta = attribute(model, pairs, "prob_diff", batch_size=2).meta["metric"]
    values = {"clean": 0.0, "corrupt": 0.0}
    for i, length in enumerate(pairs.lengths.tolist()):
        for name in values:
            row = oracle.run(model, getattr(pairs, name)[i, :length]).logits[-1].tolist()
            right, wrong = (ids[i].tolist() for ids in (pairs.answers, pairs.wrong))
            values[name] += expected("prob_diff", row, row, right, wrong) / 3
    assert meta["name"] == "prob_diff"
    assert meta["clean"] == pytest.approx(values["clean"], abs=1e-12)
    assert meta["corrupt"] == pytest.approx(values["corrupt"], abs=1e-12)
    assert abs(values["clean"] - values["corrupt"]) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_metric_without_a_gradient_at_the_clean_run_is_refused_rather_than_scored_zero(dtype):
    model, pairs = random_case([4, 6, 3], dtype=dtype)
    zero = "the gradient of the metric {} is zero on every pair"
    assert "use another metric" in refused(zero.format("kl"), attribute, model, pairs, "kl")
    refused(zero.format("constant"), attribute, model, pairs, constant)


def constant(logits):
    return logits.sum(-1) * 0.0


def nan_if(condition):
    return torch.where(condition, math.nan, 1.0)


NO_GRADIENT = "the metric has no gradient: it must be computed from the logits with torch operations"
BAD = {
    "a scalar": (lambda logits: logits.mean(), r"one value a pair, \[B\] = \[3\], got shape \[\]"),
    "a column": (lambda logits: logits[:, :1], r"one value a pair, \[B\] = \[3\], got shape \[3, 1\]"),
    "one too many": (lambda logits: logits[0, :4], r"one value a pair, \[B\] = \[3\], got shape \[4\]"),
    "a float": (lambda logits: 1.5, r"one value a pair, \[B\] = \[3\], got float"),
    "nothing": (lambda logits: None, r"one value a pair, \[B\] = \[3\], got NoneType"),
    "numpy": (lambda logits: logits.detach().numpy()[:, 0], r"one value a pair, \[B\] = \[3\], got ndarray"),
    "NaN": (lambda logits, batch: logits[:, 0] * nan_if(batch.index == 1), "NaN or infinite on pair 1"),
    "infinity": (lambda logits, batch: logits[:, 0] / (batch.index != 2), "NaN or infinite on pair 2"),
    "detached": (lambda logits: logits.detach()[:, 0], NO_GRADIENT),
    "integers": (lambda logits: logits.argmax(-1), NO_GRADIENT),
    "a leaf of its own": (lambda logits: 2 * logits[:, 0].detach().requires_grad_(), NO_GRADIENT),
    "complex numbers": (lambda logits: logits[:, 0] * 1j, "a metric must return real numbers, got torch.complex128"),
}  # fmt: skip


@pytest.mark.parametrize(("metric", "message"), BAD.values(), ids=BAD)
def test_a_metric_that_returns_something_else_is_refused(metric, message):
    model = random_model()
    refused(message, attribute, model, random_pairs(model, [4, 6, 3]), metric)


IN_PLACE = {
    "the logits": lambda logits: logits.sub_(logits[:, :1])[:, 1],
    "the clean run's": lambda logits, batch: logits[:, 0] - batch.clean_logits.mul_(2)[:, 0],
    "the answers": lambda logits, batch: logits.gather(1, batch.wrong.clamp_(min=0))[:, 0],
    "the index": lambda logits, batch: logits[:, 0] * batch.index.add_(1),
}


def test_a_metric_that_changes_what_it_is_given_is_refused():
    model = random_model()
    pairs = random_pairs(model, [4, 6, 3])
    for metric in IN_PLACE.values():
        for call in (attribute, patch_nodes, flow_routes):
            refused("the metric changes the logits or the batch's tensors in place", call, model, pairs, metric)


def test_a_bad_pair_is_named_by_its_place_in_the_task_not_in_the_batch():
    model, pairs = random_case([4, 6, 3, 5])

    def metric(logits, batch):
        return logits[:, 0] / (batch.index != 3)

    refused("NaN or infinite on pair 3", attribute, model, pairs, metric, batch_size=2)


def test_a_metric_with_a_gradient_that_is_not_finite_is_refused():
    model = random_model()

    def metric(logits):
        return (logits[:, 0] - logits[:, 0].detach()).abs().sqrt() + logits[:, 1]

    refused("gradient", attribute, model, random_pairs(model, [4, 6, 3]), metric)


class Vocabulary(TorchDispatchMode):
    """Counts the rows of everything that is computed over the vocabulary, by operation."""

    def __init__(self, d_vocab, weights):
        super().__init__()
        self.d_vocab = d_vocab
        self.weights = {tensor.untyped_storage().data_ptr() for _, tensor in weights.named()}
        self.largest = 0
        self.products = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if not isinstance(tensor, torch.Tensor) or tensor.ndim == 0 or tensor.shape[-1] != self.d_vocab:
                continue
            if tensor.untyped_storage().data_ptr() in self.weights:
                continue
            self.largest = max(self.largest, tensor.numel() // self.d_vocab)
            if func.__name__.split(".")[0] in ("mm", "addmm", "bmm", "baddbmm"):
                self.products.append(tensor.numel() // self.d_vocab)
        return result


@pytest.mark.parametrize("metric", ["logit_diff", "prob_diff", "nll"])
def test_logits_are_computed_only_where_the_metric_reads(metric):
    model, pairs = random_case([9, 4, 7, 8, 9], d_vocab=97)
    with Vocabulary(97, model.weights) as seen:
        attribute(model, pairs, metric, batch_size=3)
    if metric in ("logit_diff", "logit_margin"):
        assert seen.products == []  # two logits a pair
    else:  # the clean and the corrupt run of three pairs and then of two; the gradient starts from what they made
        assert seen.products == [6, 4] and seen.largest == 6


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_a_metric_is_the_same_on_the_logits_that_it_reads(metric):
    logits = torch.randn(3, 20, dtype=torch.float64)
    answers, wrong = torch.tensor([[4, -1], [7, 2], [0, -1]]), torch.tensor([[1, 2, 3], [19, -1, -1], [5, 5, -1]])
    assert tokens_read(metric, answers, wrong, 14) is None  # 15 columns would be more than all of them
    found = tokens_read(metric, answers, wrong, 20)
    assert (found is None) == (metric not in (logit_diff, logit_margin))
    if found is not None:
        tokens, *sets = found
        read = logits.gather(1, tokens)
        index = torch.arange(3)
        there = evaluate(metric, read, MetricBatch(*sets, read, read, index))
        assert torch.equal(there, evaluate(metric, logits, MetricBatch(answers, wrong, logits, logits, index)))


def test_patching_computes_logits_only_where_the_metric_reads():
    model, pairs = random_case([9, 4, 7], d_vocab=97)
    circuit = attribute(model, pairs).top_n(10)
    with Vocabulary(97, model.weights) as seen:
        metric_on(model, pairs, "nll", [circuit])
    assert seen.products == [6, 3] and seen.largest == 6  # clean and corrupt, then the circuit: one row a pair
    with Vocabulary(97, model.weights) as seen:
        metric_on(model, pairs, "logit_diff", [circuit])
    assert seen.products == []  # no more than four tokens a pair


COUPLED = {
    "less the batch's mean": lambda logits: logits[:, 0] - logits[:, 0].mean(),
    "by the batch's spread": lambda logits: logits[:, 0] / logits[:, 0].std().detach(),
    "normed over the batch": lambda logits: logits[:, 0].softmax(0),
    "the batch's mean for each": lambda logits: logits[:, 0].mean().expand(len(logits)),
    "a neighbour's": lambda logits: logits[:, 0].roll(1),
    "against the next": lambda logits: logits[:, 0] - logits.roll(-1, 0)[:, 1].detach(),
    "the largest of all": lambda logits: logits[:, 0] / logits.amax(),
    "with the batch": lambda logits, batch: logits[:, 0] - batch.clean_logits[:, 0] - logits[:, 1].mean(),
}
APART = {
    "a difference": lambda logits: logits[:, 0] - logits[:, 1],
    "normed over the vocabulary": lambda logits: logits.log_softmax(-1)[:, 3],
    "against the clean run": lambda logits, batch: (logits - batch.clean_logits).square().sum(-1),
    "labels by the index": lambda logits, batch: logits[torch.arange(len(logits)), batch.index % 3],
    "for a batch of its own size": lambda logits: logits[torch.arange(1000), 0],
    "without a gradient": lambda logits: logits.argmax(-1).double(),
}


def test_a_metric_whose_pairs_hang_on_each_other_is_refused():
    logits = torch.randn(3, 7, dtype=torch.float64)
    batch = MetricBatch(torch.tensor([[1], [2], [3]]), torch.zeros(3, 0), logits, logits + 1, torch.arange(3))
    alone = MetricBatch(*(getattr(batch, part.name)[:1] for part in dataclasses.fields(batch)))
    for name, metric in COUPLED.items():
        refused(f"the metric {name} gives a pair a value that hangs on", check_apart, name, metric, logits, batch)
        check_apart(name, metric, logits[:1], alone)  # a pair alone hangs on nothing
    for name, metric in APART.items():
        check_apart(name, metric, logits, batch)
    model, pairs, coupled = load("toy-ioi"), find_pairs("toy-ioi", n=3, seed=0), COUPLED["less the batch's mean"]
    refused("hangs on the other pairs of its batch", attribute, model, pairs, coupled)
    refused("hangs on the other pairs", metric_on, model, pairs, coupled, [attribute(model, pairs).top_n(5)])


def test_pairs_from_tensors_that_have_nothing_to_tell_apart_are_refused_too():
    one = torch.tensor([[1, 2]])
    model = random_model()
    for answers, wrong, message in (
        ([[3]], [[3]], "pair 0 has the answer 3 among its wrong answers"),
        ([[3, 3]], [[4]], "pair 0 has the answer 3 twice"),
        ([[3, -1]], [[4, 4]], "pair 0 has the wrong answer 4 twice"),
    ):
        pairs = PromptPairs(one, one + 1, one[:, 0] + 1, one[:, 0], torch.tensor(answers), torch.tensor(wrong))
        refused(message, attribute, model, pairs)


def test_scores_that_are_all_zero_are_said(caplog):
    attribute(random_model(), random_pairs(random_model(), [4, 5]), lambda logits: logits[:, 0])
    assert not caplog.records
    still = random_model()
    still = with_weights(still, {name: 0 * x for name, x in still.weights.named() if ".w_" in name or name == "w_e"})
    pairs = PromptPairs.from_lists([[1, 2]], [[3, 2]], [1], [2])
    attribute(still, pairs, lambda logits: logits[:, 0] + logits[:, 1] ** 2)
    assert "every score is exactly 0" in caplog.text
