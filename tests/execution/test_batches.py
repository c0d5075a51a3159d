"""What a GPU is given ahead of time, and what it repeats: the wiring, with a copy and a recorder for the CPU."""

from __future__ import annotations

import contextlib
import logging

import pytest
import torch
from models import joined, random_case, random_model, random_pairs
from refusal import refused
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import eapcore.attribution.scoring as scoring
import eapcore.execution.cuda_graphs as cuda_graphs
import eapcore.execution.limits as limits
import eapcore.execution.prefetch as prefetch
from eapcore import attribute
from eapcore.execution.batch import Batch, cut, in_order
from eapcore.execution.prefetch import Feed, tensors, with_tensors

CPU = torch.device("cpu")
LENGTHS = [9] * 7 + [12] * 5 + [9] * 4


OPTIONS = [
    {},
    {"reduce": "pair"},
    {"reduce": "position"},
    {"method": "eap-ig", "steps": 3},
    {"method": "eap-ig-activations", "steps": 2, "metric": "kl"},
    {"method": "clean-corrupt", "metric": "nll"},
    {"method": "relp"},
    {"method": "qk-fix"},
    {"method": "grad-drop"},
    {"method": "atp-star", "reduce": "pair"},
    {"ablation": "mean"},
    {"level": "node"},
    {"level": "neuron", "reduce": "pair"},
    {"level": "neuron", "method": "eap-ig"},
]


class Recorder:
    """Does on the CPU what a CUDA graph does: works on tensors that it holds, and overwrites its results."""

    def __init__(self):
        self.captured, self.replayed = 0, 0
        self.recorded = self.inside = False

    def capture(self, work, given):
        self.captured += 1
        self.recorded = True
        held = [x.clone() for x in given]
        results = [torch.full_like(x, torch.nan) for x in self.again(work, held)]

        def replay(given):
            self.replayed += 1
            for to, x in zip(held, given, strict=True):
                to.copy_(x)
            for to, x in zip(results, self.again(work, held), strict=True):
                to.copy_(x)
            return results

        return replay

    def again(self, work, held):
        self.inside = True
        try:
            return work(held)
        finally:
            self.inside = False


class Late:
    """A copy that is not there before it is finished."""

    def __init__(self):
        self.started, self.finished = 0, 0
        self.under_way: list[tuple[list, list]] = []

    def start(self, given):
        self.started += 1
        self.under_way.append(([torch.full_like(x, -(10**6)) for x in given], [x.clone() for x in given]))
        return self.under_way[-1][0]

    def finish(self, copied):
        self.finished += 1
        for held, source in self.under_way:
            if held[0].data_ptr() == copied[0].data_ptr():
                for to, x in zip(held, source, strict=True):
                    to.copy_(x)


def mixed_pairs(model, lengths=LENGTHS):
    """Pairs of two lengths and two prefixes, so that batches of several shapes come several times."""
    return joined(random_pairs(model, lengths, seed=3), random_pairs(model, lengths, seed=4, first_difference=4))


@pytest.fixture
def seen(monkeypatch):
    """(start, stop, pairs) of every batch that is scored."""
    shapes, real = [], scoring.score_batch

    def watch(model, batch, *args, **named):
        shapes.append((batch.start, batch.stop, len(batch.pairs)))
        return real(model, batch, *args, **named)

    monkeypatch.setattr(scoring, "score_batch", watch)
    return shapes


@pytest.fixture
def recorder(monkeypatch):
    found = Recorder()
    monkeypatch.setattr(limits, "GRAPH_WORTH", 1)
    monkeypatch.setattr(scoring, "recorder", lambda device: found)
    return found


@pytest.mark.parametrize("options", [*OPTIONS, {"storage": "factored"}], ids=str)
def test_replayed_batches_give_the_scores_of_plain_ones(recorder, options):
    model = random_model(n_layers=3)
    pairs = mixed_pairs(model)
    options = {"batch_size": 3, "storage": "auto" if "level" in options else "dense", **options}
    plain = attribute(model, pairs, graphs=False, **options)
    assert recorder.captured == 0
    replayed = attribute(model, pairs, graphs=True, **options)
    assert recorder.captured >= 2 and recorder.replayed > recorder.captured
    for name in ("scores", "per_position", "per_pair", "units", "dimensions"):
        expected, found = getattr(plain, name, None), getattr(replayed, name, None)
        if isinstance(expected, torch.Tensor):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        elif expected:
            assert all(torch.allclose(found[k], expected[k], rtol=1e-12, atol=1e-12) for k in expected)
    clean, corrupt = plain.meta["metric"]["clean"], plain.meta["metric"]["corrupt"]
    assert replayed.meta["metric"]["clean"] == pytest.approx(clean, rel=1e-12, abs=1e-12)
    assert replayed.meta["metric"]["corrupt"] == pytest.approx(corrupt, rel=1e-12, abs=1e-12)


class NoLook(TorchDispatchMode):
    """Refuses what would wait for a GPU, or what a recording could not repeat: values of tensors that the host looks
    at, shapes that depend on them, and tensors made of the host's values."""

    REFUSED = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique", "lift_fresh")

    @classmethod
    def _should_skip_dynamo(cls):
        return False  # nothing is compiled

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        indices = [x for x in tree_leaves(args[1:]) if isinstance(x, torch.Tensor)]
        by_mask = "index" in name and any(x.dtype == torch.bool for x in indices)
        if by_mask or any(name.startswith(refused) for refused in self.REFUSED):
            raise AssertionError(f"{name} waits for a GPU")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [*OPTIONS, {"storage": "factored"}], ids=str)
def test_nothing_in_a_batch_waits_for_the_device(monkeypatch, options):
    model = random_model(n_layers=3)
    pairs = mixed_pairs(model)
    options = {"batch_size": 3, "storage": "auto" if "level" in options else "dense", **options}
    attribute(model, pairs.select(torch.arange(3)), **options)  # what is made once, for a model, is there
    watched = []

    def run(self, batch, work, alike):
        with NoLook():
            watched.append(work(batch))
        return watched[-1]

    monkeypatch.setattr(cuda_graphs.Replays, "run", run)
    attribute(model, pairs, **options)
    assert len(watched) > 5


def test_a_look_at_a_value_is_seen():
    with pytest.raises(AssertionError, match="_local_scalar_dense waits"), NoLook():
        float(torch.ones(()))
    with pytest.raises(AssertionError, match="index waits"), NoLook():
        torch.ones(2)[torch.ones(2) > 0]
    with pytest.raises(AssertionError, match="lift_fresh waits"), NoLook():
        torch.tensor([1, 2])


def test_a_shape_is_recorded_when_it_comes_again_and_no_more_than_so_many_are(recorder, monkeypatch):
    model, pairs = random_case([8] * 14)
    attribute(model, pairs, batch_size=4, graphs=True, storage="dense")  # 4, 4, 4 and the last 2
    assert (recorder.captured, recorder.replayed) == (1, 2)
    attribute(model, pairs, batch_size=14, graphs=True, storage="dense")
    assert (recorder.captured, recorder.replayed) == (1, 2)
    monkeypatch.setattr(limits, "GRAPH_SHAPES", 1)
    recorder.captured = 0
    attribute(model, mixed_pairs(model), batch_size=2, graphs=True, storage="dense")
    # The dense buffer grew once on the way, and took what was recorded in the smaller one with it.
    assert recorder.captured == 2


def test_auto_records_shapes_that_come_often_alone(recorder, monkeypatch):
    model = random_model()
    pairs = mixed_pairs(model, [12] * 9)
    monkeypatch.setattr(limits, "GRAPH_WORTH", 3)
    attribute(model, pairs, batch_size=2, storage="dense")
    # From 0 on: 5 windows, the last with a pair of the other prefix; the second is recorded with 4 to come, itself too.
    # From 4 on: 4 windows, the second with 3 to come.
    assert (recorder.captured, recorder.replayed) == (2, 7)
    monkeypatch.setattr(limits, "GRAPH_WORTH", 4)
    attribute(model, pairs, batch_size=2, storage="dense")
    assert (recorder.captured, recorder.replayed) == (3, 11)
    # Where a batch's products take the device longer than launching takes the host, there is nothing to gain.
    monkeypatch.setattr(limits, "GRAPH_WORK", 2 * 12 * model.config.d_model**2 - 1)
    attribute(model, pairs, batch_size=2, storage="dense")
    assert (recorder.captured, recorder.replayed) == (3, 11)


@pytest.mark.parametrize("shared", [True, False])
def test_batches_alike_are_counted(shared):
    pairs = mixed_pairs(random_model())
    order = in_order(pairs)
    feed = Feed(pairs, order, CPU, shared=shared, copy=None)
    while feed.left:
        batch, behind = feed.batch(3), 0
        for at in range(feed.done, len(order), 3):
            other = Batch.of(pairs, order[at : at + 3], CPU, shared=shared)
            same = (other.start, other.stop, len(other.pairs)) == (batch.start, batch.stop, len(batch.pairs))
            behind += same
        assert feed.alike(batch) == behind >= 1
        feed.advance(batch)


def test_auto_records_metrics_by_name_alone(recorder):
    model, pairs = random_case([8] * 12)

    def callable_metric(logits):
        return logits[:, 1] - logits[:, 2]

    options = {"batch_size": 3, "storage": "dense"}
    expected = attribute(model, pairs, callable_metric, **options)
    assert recorder.captured == 0
    found = attribute(model, pairs, callable_metric, graphs=True, **options)
    assert recorder.captured == 1 and torch.equal(found.scores, expected.scores)
    attribute(model, pairs, **options)
    assert recorder.captured == 2
    attribute(model, pairs, graphs=False, **options)
    assert recorder.captured == 2
    attribute(model, pairs, batch_size=3, level="node")
    attribute(model, pairs, batch_size=3, storage="factored")
    assert recorder.captured == 4


def test_a_recorded_metric_knows_which_pairs_it_is_of(recorder):
    model, pairs = random_case([8] * 12)

    def weighted(logits, batch):
        return (logits[:, 1] - logits[:, 2]) * (1 + batch.index)

    options = {"batch_size": 3, "storage": "dense", "reduce": "pair"}
    plain, replayed = (attribute(model, pairs, weighted, graphs=graphs, **options) for graphs in (False, True))
    assert recorder.replayed == 3 and torch.equal(replayed.per_pair, plain.per_pair)


def test_what_cannot_be_recorded_is_said_and_computed_or_raised(monkeypatch, caplog):
    class Broken(Recorder):
        def capture(self, work, given):
            raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(limits, "GRAPH_WORTH", 1)
    monkeypatch.setattr(scoring, "recorder", lambda device: Broken())
    model, pairs = random_case([8] * 12)
    options = {"batch_size": 3, "storage": "dense"}
    with caplog.at_level(logging.WARNING, "eapcore"):
        found = attribute(model, pairs, **options)
    assert [r.message for r in caplog.records] == [
        "batches cannot be recorded as CUDA graphs, going on without: operation not permitted when stream is capturing"
    ]
    assert torch.equal(found.scores, attribute(model, pairs, graphs=False, **options).scores)
    refused("operation not permitted", attribute, model, pairs, error=RuntimeError, graphs=True, **options)


def test_where_memory_does_not_suffice_recordings_go_before_batches_are_halved(recorder, monkeypatch, caplog):
    model = random_model()
    pairs = mixed_pairs(model, [12] * 9)  # the longer batches come first: no larger buffer is needed on the way
    options = {"batch_size": 3, "storage": "dense"}
    expected = attribute(model, pairs, graphs=False, **options)
    real, calls = scoring.score_batch, []

    def full(model, batch, *args, **named):
        calls.append(len(batch.pairs))
        if recorder.recorded and not recorder.inside:
            recorder.recorded = False
            raise torch.OutOfMemoryError("no more")
        return real(model, batch, *args, **named)

    monkeypatch.setattr(scoring, "score_batch", full)
    with caplog.at_level(logging.WARNING, "eapcore"):
        found = attribute(model, pairs, graphs=True, **options)
    assert [r.message for r in caplog.records] == ["out of memory: going on without CUDA graphs"]
    assert recorder.captured == 1 and min(calls[:-1]) == 3
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-12, atol=1e-12)


def test_a_recording_for_which_memory_does_not_suffice_is_left_out(monkeypatch, caplog):
    class Full(Recorder):
        def capture(self, work, given):
            raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr(scoring, "recorder", lambda device: Full())
    model, pairs = random_case([8] * 12)
    expected = attribute(model, pairs, graphs=False, batch_size=3, storage="dense")
    with caplog.at_level(logging.WARNING, "eapcore"):
        found = attribute(model, pairs, graphs=True, batch_size=3, storage="dense")
    assert [r.message for r in caplog.records] == [
        "batches cannot be recorded as CUDA graphs, going on without: no more"
    ]
    assert torch.equal(found.scores, expected.scores)


@pytest.mark.parametrize(("options", "message"), [
    ({"graphs": "yes"}, "graphs must be True, False or 'auto', got 'yes'"),
    ({"graphs": 1}, "graphs must be True, False or 'auto', got 1"),
    ({"graphs": True}, "graphs=True needs the whole model on one GPU, but the model is on cpu"),
])  # fmt: skip
def test_options_that_cannot_be_followed_are_refused(options, message):
    model = random_model()
    refused(message, attribute, model, random_pairs(model, [6, 6]), **options)


def test_batches_arrive_in_order_whole_and_one_ahead():
    model = random_model()
    pairs, copy = mixed_pairs(model), Late()
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)).tolist()
    feed = Feed(pairs, order, CPU, shared=True, copy=copy)
    sizes = [5, 5, 2, 2, 7]  # a size that changes on the way throws away what was ahead
    taken = []
    while feed.left:
        size = sizes[min(len(taken), 4)]
        batch = feed.batch(size)
        again = feed.batch(size)  # as after a batch that did not fit
        expected = Batch.of(pairs, order[feed.done : feed.done + size], CPU)
        for found in (batch, again):
            assert (found.start, found.stop) == (expected.start, expected.stop)
            assert all(torch.equal(a, b) for a, b in zip(tensors(found), tensors(expected), strict=True))
        taken.append(len(batch.pairs))
        feed.advance(batch)
        assert copy.started > copy.finished or not feed.left
    assert taken[:4] == [5, 5, 2, 2] and sum(taken) == len(pairs)


def test_scores_do_not_depend_on_copies_ahead(monkeypatch):
    model, copy = random_model(), Late()
    pairs = mixed_pairs(model)
    expected = attribute(model, pairs, batch_size=3, reduce="pair")
    monkeypatch.setattr(scoring, "pinned_copy", lambda device: copy)
    found = attribute(model, pairs, batch_size=3, reduce="pair")
    assert copy.started == copy.finished == -(-len(pairs) // 3)
    assert torch.equal(found.scores, expected.scores) and torch.equal(found.per_pair, expected.per_pair)


def test_a_batch_s_tensors_make_it_again():
    pairs = mixed_pairs(random_model())
    batch = Batch.of(pairs, [1, 9, 4], CPU)
    again = with_tensors(batch, [x.clone() for x in tensors(batch)])
    assert again.shape == batch.shape and torch.equal(again.read, batch.read)
    assert torch.equal(again.index, torch.tensor([1, 9, 4]))
    assert all(torch.equal(a, b) for a, b in zip(tensors(again), tensors(batch), strict=True))


@pytest.fixture
def events(monkeypatch):
    """What is asked of torch.cuda, in order, where there is none: streams and graphs that say what they are for."""
    found, streams, made = [], ["main"], []

    class Stream:
        def __init__(self, device=None):
            made.append(self)
            self.name = "side" if len(made) <= 2 else f"side {len(made) - 1}"  # the first is "main"

        def wait_stream(self, other):
            found.append(f"{self.name} waits for {other.name}")

        def synchronize(self):
            found.append(f"the host waits for {self.name}")

    main = Stream()
    main.name = "main"

    @contextlib.contextmanager
    def on(name):
        streams.append(name)
        try:
            yield
        finally:
            streams.pop()

    @contextlib.contextmanager
    def graph(graph, pool, stream, capture_error_mode):
        found.append(f"capture into {pool} on {stream.name}, {capture_error_mode}")
        streams.append("captured")
        yield  # an error leaves the stream as it is, as torch does where ending the capture fails
        streams.pop()

    class CUDAGraph:
        def replay(self):
            found.append("replay")

    for name, fake in {
        "Stream": Stream, "stream": lambda stream: on(stream.name), "current_stream": lambda device=None: main,
        "graph": graph, "CUDAGraph": CUDAGraph, "graph_pool_handle": lambda: "pool",
        "device": lambda device: contextlib.nullcontext(),
        "set_stream": lambda stream: streams.__setitem__(slice(None), [stream.name]),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: found.append(f"pin on {streams[-1]}") or self.clone())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: found.append(f"kept for {stream.name}"))
    return {"streams": streams, "events": found}


def test_a_cuda_graph_is_warmed_up_aside_captured_and_fed(events):
    used = []

    def work(held):
        events["events"].append(f"work on {events['streams'][-1]}")
        used.append(held[0])
        return [held[0] * 2]

    replay = cuda_graphs.CudaRecorder(CPU).capture(work, [torch.tensor([1.0, 2.0])])
    expected = ["side waits for main", "work on side", "main waits for side", "capture into pool on side, thread_local"]
    expected.append("work on captured")
    assert events["events"] == expected and used[0] is used[1]
    (results,) = replay([torch.tensor([5.0, 6.0])])
    assert events["events"][len(expected) :] == ["replay"]
    assert used[1].tolist() == [5.0, 6.0] and results.tolist() == [2.0, 4.0]  # what the graph would overwrite


def test_recordings_share_a_stream_and_with_it_their_memory(events):
    recorder = cuda_graphs.CudaRecorder(CPU)
    for size in (2, 3):
        recorder.capture(lambda held: [held[0] * 2], [torch.ones(size)])
    assert [event for event in events["events"] if "capture" in event] == [
        "capture into pool on side, thread_local"
    ] * 2


@pytest.mark.parametrize("where", ["side", "captured"])
def test_a_recording_that_fails_leaves_the_stream_as_it_was_behind_what_began_aside(events, where):
    def work(held):
        if events["streams"][-1] == where:
            raise RuntimeError("operation not permitted when stream is capturing")
        return held

    refused("operation not permitted", cuda_graphs.CudaRecorder(CPU).capture, work, [torch.ones(2)], error=RuntimeError)
    assert events["streams"] == ["main"] and "main waits for side" in events["events"]


def test_pinned_copies_start_on_their_own_stream_and_the_other_waits(events):
    copy = prefetch.PinnedCopy(CPU)
    copied = copy.start([torch.tensor([1, 2]), torch.tensor([3])])
    assert events["events"] == ["pin on side", "pin on side"]
    copy.finish(copied)
    assert events["events"][2:] == ["main waits for side", "kept for main", "kept for main"]
    assert [x.tolist() for x in copied] == [[1, 2], [3]]


def test_results_are_received_with_one_wait_and_pinned_where_they_are_small(events, monkeypatch):
    to, given = torch.Tensor.to, {"a": torch.ones(3), "b": torch.ones(4), "c": torch.ones(5)}

    def copy(self, *args, non_blocking=False):
        events["events"].append(f"copy of {len(self)}{' that is not waited for' if non_blocking else ''}")
        return to(self, *args)

    monkeypatch.setattr(torch.Tensor, "to", copy)
    monkeypatch.setattr(prefetch, "PINNED", 16)
    found = prefetch.received(given, torch.device("cuda"))
    small = ["copy of 3 that is not waited for", "copy of 4 that is not waited for"]
    assert events["events"] == [*small, "copy of 5", "the host waits for main"] and found.keys() == given.keys()
    assert prefetch.received(given, CPU).keys() == given.keys() and len(events["events"]) == 4


def test_only_a_gpu_gets_either(events):
    assert cuda_graphs.recorder(CPU) is None and prefetch.pinned_copy(CPU) is None
    cuda = torch.device("cuda")
    assert isinstance(cuda_graphs.recorder(cuda), cuda_graphs.CudaRecorder)
    assert isinstance(prefetch.pinned_copy(cuda), prefetch.PinnedCopy)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "options", [{}, {"method": "eap-ig"}, {"level": "node"}, {"reduce": "pair"}, {"storage": "factored"}], ids=str
)
def test_cuda_graphs_give_the_scores_of_plain_batches(options):
    model = random_model(n_layers=3, dtype=torch.float32, device="cuda")
    pairs = mixed_pairs(model)
    options = {"batch_size": 3, "storage": "auto" if "level" in options else "dense", **options}
    plain, replayed = (attribute(model, pairs, graphs=graphs, **options) for graphs in (False, True))
    torch.testing.assert_close(replayed.scores, plain.scores, rtol=1e-6, atol=1e-6)


def test_pairs_are_sorted_so_that_prefixes_and_lengths_help(seen):
    model = random_model()
    pairs = mixed_pairs(model, [12, 9] * 4)
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))
    attribute(model, pairs.select(order), batch_size=4)
    assert sorted(seen) == [(0, 9, 4), (0, 12, 4), (4, 9, 4), (4, 12, 4)]


def test_a_batch_is_cut_where_that_saves_more_than_another_costs(seen, limited):
    model = random_model(n_ctx=64)
    pairs = joined(random_pairs(model, [40] * 3, seed=5), random_pairs(model, [40] * 9, seed=6, first_difference=36))
    found = attribute(model, pairs, batch_size=12)
    assert seen == [(0, 40, 3), (36, 40, 9)]  # 9 × 36 tokens of prefix, three times, are more than a batch costs
    seen.clear()
    limited(one_more_batch=9 * 27 + 1)
    expected = attribute(model, pairs, batch_size=12)
    assert seen == [(0, 40, 12)]
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [1, 4, 7])
@pytest.mark.parametrize("share", [0.0, 0.25])
def test_batches_are_cut_as_well_as_one_cut_can(size, share):
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        first = torch.randint(0, 90, (size,), generator=generator).sort().values
        stop = 91 + torch.randint(0, 60, (size,), generator=generator)

        def cost(part, first=first, stop=stop):
            longest, shortest = float(stop[part].max()), (1 - share) * float(first[part].min())
            return len(stop[part]) * (longest - shortest)

        costs = {k: cost(slice(k)) + cost(slice(k, None)) + 32 for k in range(1, size)} | {size: cost(slice(size))}
        counts = cut(first, stop, size, 32, share)
        assert sum(counts) == size and costs[counts[0]] == min(costs.values())
