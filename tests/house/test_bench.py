"""The benchmark checks before it times, runs from the source tree, and loses nothing to one failure."""

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import eapcore.kernels as kernels
import pytest
import torch
from eapcore.kernels import cpp
from models import ROOT
from refusal import refused

from eapcore import EdgeScores, attribute
from eapcore.models.forward import forward
from eapcore.models.load import load
from eapcore.patching.edges import patch_edges
from eapcore.tasks import TASKS

sys.path.insert(0, str(ROOT / "bench"))
import bench_ig
import bench_kernels
import bench_language
import bench_methods
import bench_pipeline
import bench_truth
from ops import checks as op_checks
from ops import work as op_work
from peers import hooked, published
from peers.plain import plain_forward
from pipeline import first_batch, gpu, launches, memory, scaling
from pipeline import work as pipeline_work

# What pytest-benchmark times, Triton where it does not interpret.
LAYER = op_work.Model("one layer of GPT-2 small", 1, 12, 768)
TIMED = [
    name
    for name, reason in kernels.available().items()
    if not reason and (name != "triton" or os.environ.get("TRITON_INTERPRET") != "1")
]

needs_peaks = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="this system keeps no high-water mark that can be set back"
)
needs_cpp = pytest.mark.skipif(bool(cpp.why_not()), reason=cpp.why_not())
no_triton = kernels.available()["triton"]
needs_triton = pytest.mark.skipif(bool(no_triton), reason=no_triton)


@pytest.fixture
def stand_in(monkeypatch):
    """The GPU's list and control flow on the CPU: the specification in Triton's place, a clock that counts calls."""

    class StandIn(bench_kernels.Clock):
        def __init__(self, kind):
            self.kind, self.device, self.calls = kind, "cpu", 0

        def both(self, run):
            run()
            self.calls += 1
            return (1.0 + self.calls % 3,) * 2

        def describe(self):
            return f"{self.kind}: stand-in"

    def fail(*args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(bench_kernels, "Clock", StandIn)
    monkeypatch.setattr(op_work, "fast_implementation", lambda kind: "reference")
    return monkeypatch, fail


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@needs_cpp
def test_quick_benchmark_prints_and_writes_every_case(tmp_path, capsys):
    assert bench_kernels.main(["--quick", "--json", str(tmp_path / "rows.jsonl")]) == 0
    header, *rows = lines(tmp_path / "rows.jsonl")
    assert {(row["op"], row["dtype"]) for row in rows} == {
        (op, dtype) for op in kernels.OPS for dtype in ("float32", "bfloat16")
    }
    assert {"cpp", "torch.matmul", "torch.einsum, hooks"} <= {row["provider"] for row in rows}
    assert all(row["ms"] > 0 and row["operations"] > 0 and row["bytes"] > 0 for row in rows)
    assert header["rates"]["copy"] > 0
    out = capsys.readouterr().out
    assert "every op is right on small odd shapes" in out
    assert "edge_scores_factored  tiny S=7 R=15 D=32 B·T=10  bfloat16" in out


@needs_cpp
def test_a_wrong_result_is_never_timed(monkeypatch, tmp_path, capsys):
    right = cpp.edge_scores
    monkeypatch.setattr(cpp, "edge_scores", lambda *args: right(*args) * 1.001)
    assert bench_kernels.main(["--quick", "--json", str(tmp_path / "rows.jsonl")]) == 1
    out = capsys.readouterr().out
    assert "FAILED checks: RuntimeError: edge_scores cpp torch.float32 D=40 reduce=all ieee: error 1" in out
    assert "FAILED edge_scores tiny S=7 R=7 D=32 B·T=10 torch.float32: RuntimeError: " in out
    rows = lines(tmp_path / "rows.jsonl")
    assert "receiver_grads" in {row.get("op") for row in rows}
    assert "edge_scores" not in {row.get("op") for row in rows}
    assert any("error 1." in row.get("failed", "") for row in rows)


@needs_cpp
def test_check_only_times_nothing(tmp_path, capsys):
    assert bench_kernels.main(["--check-only", "--json", str(tmp_path / "rows.jsonl")]) == 0
    assert "GB/s" not in capsys.readouterr().out
    assert lines(tmp_path / "rows.jsonl") == []


def test_the_gpu_list_begins_with_what_is_asked_for_and_is_summed_up(stand_in, capsys):
    assert bench_kernels.main(["--device", "cuda", "--quick"]) == 0
    summary = capsys.readouterr().out.split("\nSummary\n")[1]
    assert summary.count("x torch") == 10  # the factored op is also timed with both sides made in memory
    assert summary.count("of matmul's rate, asked 75: ") == 2
    assert summary.count("of the copy rate, asked 80: ") == 2
    asked = [case.asked for case in op_work.cases("cuda", quick=False)]
    assert None not in asked[:4]
    assert set(asked[4:]) == {None}


def test_one_failure_on_the_gpu_costs_only_itself(stand_in, tmp_path, capsys):
    monkeypatch, fail = stand_in
    monkeypatch.setitem(bench_kernels.WORK, "receiver_grads", fail)
    assert bench_kernels.main(["--device", "cuda", "--quick", "--json", str(tmp_path / "rows.jsonl")]) == 1
    rows = lines(tmp_path / "rows.jsonl")
    assert {row["op"] for row in rows if "op" in row} == {"edge_scores", "edge_scores_factored"}
    assert sum("failed" in row for row in rows) == 2
    assert capsys.readouterr().out.count("FAILED receiver_grads tiny") == 2


def test_a_torch_way_that_cannot_run_is_left_out(stand_in, capsys):
    monkeypatch, fail = stand_in
    whole = op_work.edge_scores_work

    def without_einsum(*args):
        work = whole(*args)
        work.providers["torch.einsum, hooks"] = fail
        return work

    monkeypatch.setitem(bench_kernels.WORK, "edge_scores", without_einsum)
    assert bench_kernels.main(["--device", "cuda", "--quick", "--only", "edge_scores tiny"]) == 0
    assert "torch.einsum, hooks left out of edge_scores tiny S=7 R=7" in capsys.readouterr().out


def test_no_case_begins_after_the_minutes_are_over(stand_in, capsys):
    assert bench_kernels.main(["--device", "cuda", "--quick", "--minutes", "0"]) == 1
    out = capsys.readouterr().out
    assert out.count("not begun, the 0 minutes were over") == 8
    assert "x torch" not in out


def test_a_missing_kernel_is_noticed(stand_in, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(op_work, "fast_implementation", lambda kind: "triton")
    monkeypatch.setattr(op_checks, "VARIANTS", op_checks.VARIANTS - op_checks.STEPS)
    for check in ("edge_scores", "receiver_grads", "factored", "steps", "attention"):
        monkeypatch.setattr(op_checks, f"check_{check}", lambda *args: None)
    message = (
        r"not every kernel ran: channel_grads bfloat16 layernorm, channel_grads bfloat16 layernorm, sums given, .*"
    )
    with pytest.raises(RuntimeError, match=message + "partial_scores, sum_splits, .*zero_non_edges did not"):
        op_checks.check_every_kernel("cuda", "cpu")
    with pytest.raises(RuntimeError, match=message) as some:
        op_checks.check_every_kernel("cuda", "cpu", "bfloat16")
    assert not re.search(r"\bfloat", str(some.value))


@needs_triton
def test_every_triton_kernel_runs_in_the_checks(stand_in, monkeypatch):
    from eapcore.kernels import triton_common, triton_factored

    device = "cuda"
    if triton_common.interpreted():  # which is slow
        device = "cpu"
        on = replace(triton_common.target(torch.device("cpu")), processors=132)  # an H200's: few tiles are split
        monkeypatch.setattr(triton_common, "target", lambda device: on)
        monkeypatch.setattr(op_checks, "FACTORED", op_work.Model("K = 64", 3, 1, 64))
        monkeypatch.setattr(op_checks.checks, "REDUCE", ("all",))
        monkeypatch.setattr(triton_factored, "choose_chunk", lambda *args: 10)  # all of them, beside the chunks of 4
        monkeypatch.setattr(op_checks, "CHANNELS", (*op_checks.CHANNELS[:3], *op_checks.CHANNELS[4:]))
        # What is not told apart by dtype, in one.
        for name, also in (("edge_scores", (37,)), ("factored", ("all",)), ("steps", ()), ("attention", ())):
            check, chosen = getattr(op_checks, f"check_{name}"), (torch.bfloat16, *also)
            only = lambda *args, check=check, chosen=chosen: args[-len(chosen) :] == chosen and check(*args)  # noqa: E731
            monkeypatch.setattr(op_checks, f"check_{name}", only)
    monkeypatch.setattr(op_work, "fast_implementation", lambda kind: "triton")
    op_checks.check_every_kernel("cuda", device)


@needs_cpp
@pytest.mark.parametrize("op", ["receiver_grads", "edge_scores_factored"])
def test_the_checks_see_a_wrong_norm(monkeypatch, op):
    right = getattr(cpp, op)
    monkeypatch.setattr(cpp, op, lambda *args: right(*args) * (1 + 1e-4))
    with pytest.raises(RuntimeError, match=f"{op} cpp torch.float32 .*: error 1.0.e-04"):
        op_checks.check_every_kernel("cpu", "cpu")


def test_the_error_allowed_to_tensor_cores_is_twice_what_cut_sums_lose():
    torch.manual_seed(0)
    exact, cut, size = torch.zeros(500).double(), torch.zeros(500).double(), torch.tensor(0.0).float()
    for blocks in range(1, 1025):
        products = (torch.randn(2, 500, 16).bfloat16().double().prod(0)).sum(1)
        exact += products
        size = (cut + products).float()
        over = size.double().abs() > (cut + products).abs()
        cut = torch.where(over, size.nextafter(torch.zeros(())), size).double()
        if blocks in (256, 1024):
            lost, allowed = op_work.relative(cut, exact), 5e-8 * blocks
            assert 0.3 * allowed < lost < 0.6 * allowed
    assert op_work.allowed_error(torch.bfloat16, 1024 * 16, 90) == pytest.approx(5.12e-5)
    assert op_work.allowed_error(torch.bfloat16, 1024 * 8, 80) == pytest.approx(5.12e-5)
    assert op_work.allowed_error(torch.bfloat16, 2048, 90) == 1e-5
    assert op_work.allowed_error(torch.float32, 1 << 20, 90) == 1e-5


def test_a_triton_case_is_allowed_the_error_of_its_plan(monkeypatch):
    pytest.importorskip("triton")
    from eapcore.kernels import triton_common

    one_processor = triton_common.Target("cuda", 90, 1, 141 << 30)
    monkeypatch.setattr(triton_common, "target", lambda device: one_processor)
    case = op_work.Case("edge_scores", op_work.TINY, 0, 2, 5, torch.bfloat16)
    for batch, limit in ((2, 1e-5), (1024, 5e-8 * 1024)):  # the longest chain that there is
        work = op_work.edge_scores_work(replace(case, batch=batch), "cpu", "triton", False)
        assert work.limit == pytest.approx(limit)


def test_the_device_is_busy_while_a_timed_call_is_launched(monkeypatch):
    events = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            events.append("record")

        def elapsed_time(self, end):
            return 1.5

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: events.append("sleep"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: events.append("synchronize"))
    clock = bench_kernels.Clock("cpu")
    clock.flush = torch.ones(1)
    assert clock(lambda: events.append("run")) == 1.5
    assert events == ["sleep", "record", "run", "record", "synchronize"] and clock.flush.item() == 0


def test_a_counted_batch_is_the_one_that_was_profiled():
    for name, (whole, parts) in launches.PROFILES.items():
        count = launches.count_batch(launches.works()[name], fused=False)
        assert 0.75 < 1e3 * count.total.device / whole < 1.25
        for part, measured in parts.items():
            assert 0.75 < 1e3 * count.parts[part].device / measured < 1.25, (name, part)


def test_a_batch_asks_no_more_of_a_gpu_than_it_did():
    counted = launches.count_batch(launches.works()["GPT-2 small, B=256"]).total
    assert counted.kernels <= 296
    assert counted.bytes <= 22e9
    factored = launches.count_batch(launches.works()["GPT-2 small, B=256"], storage="factored").total
    assert factored.kernels <= 745 and factored.bytes <= 25e9 and factored.device < 1.15 * counted.device
    llama = launches.works()["Llama-3.1-8B, B=32"]
    short, long = (launches.count_batch(replace(llama, L=layers)).total.kernels for layers in (2, 8))
    assert (long - short) / 6 <= 31  # a layer's own; what a batch asks for once comes to 3 of each of its 32
    assert all(launches.host_ms(1, fused=fused, repeats=1) > 0 for fused in (True, False))
    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"):
        launches.host_ms(1, launching=True)
    code = "from pipeline.launches import host_ms; print(all(host_ms(1, launching=x, repeats=1) > 0 for x in (1, 0)))"
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "bench")])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=ROOT / "bench")
    assert done.stdout == "True\n", done.stderr


def test_a_first_batch_compiles_few_kernels_later_ones_hardly_any_and_says_so():
    pytest.importorskip("triton")
    found = first_batch.in_child("GPT-2 small, bfloat16, eap", "unit_rows")
    assert found.batches[0] <= 18 and found.batches[-1] <= 19, found
    assert found.logged.count("compiling the GPU's kernels") == 1


def test_what_an_operation_moves_is_counted():
    x, w, out = torch.zeros(4, 8), torch.empty(8, 6), torch.empty(4, 6)
    count = launches.Count()
    with launches.Operations(count):
        torch.mm(x, w, out=out)
        x[1:].t().expand(2, 8, 3)  # views
        x[:2].copy_(x[2:])
        _ = x + torch.empty(1).expand(4, 8)
        _ = x[torch.tensor([2])]  # reads the row that it takes, and where it lies
    products, copies, others = (count.parts[name] for name in ("products", "copies", "element-wise, sums, gathers"))
    assert (products.kernels, products.bytes, products.operations) == (1, 4 * (32 + 48 + 24), 2 * 4 * 8 * 6)
    assert (copies.kernels, copies.bytes) == (1, 4 * 2 * 16)
    assert (others.kernels, others.bytes) == (2, 4 * (2 * 32 + 1) + 2 * 4 * 8 + 8)


def test_edge_tiles_are_counted_by_their_real_pairs():
    mask = torch.zeros(5, 7, dtype=torch.bool)
    mask[0, 0] = mask[4, 6] = True
    assert op_work.edge_tile_pairs(mask, 4, 4) == 16 + 3
    assert op_work.edge_tile_pairs(torch.ones(5, 7, dtype=torch.bool), 4, 4) == 35


@pytest.mark.parametrize("impl", TIMED)
@pytest.mark.parametrize("op", kernels.OPS)
def test_bench(benchmark, op, impl):
    on_gpu = impl == "triton"
    layer = op_work.Case(op, LAYER, 0, 1, 4, torch.float32)
    work = op_work.WORK[op](layer, "cuda" if on_gpu else "cpu", impl, False)
    run = work.providers[impl]

    def whole():
        result = run()
        if on_gpu:
            torch.cuda.synchronize()
        return result

    assert work.check(benchmark(whole)) <= work.limit


def case(**changes):
    return replace(bench_pipeline.CASES[0], work=replace(bench_pipeline.SMALL, **bench_pipeline.TINY), **changes)


@pytest.fixture
def timed_here(monkeypatch):
    """Times and peaks taken in this process, as starting one for each case takes seconds; a peak of at least a MiB."""

    def seconds(work, names, batches, repeats):
        model, pairs = work.model(), work.pairs(batches)
        return pipeline_work.in_turns(
            [pipeline_work.implementation(name, model, pairs, work.B) for name in names], repeats
        )

    def memories(jobs):
        return [max(pipeline_work.MIB, pipeline_work.peak_memory(work, name)) for work, name in jobs]

    for module in (bench_pipeline, scaling):
        monkeypatch.setattr(module, "seconds", seconds)
    for module in (bench_pipeline, memory, scaling):
        monkeypatch.setattr(module, "memories", memories)


@needs_peaks
@pytest.mark.usefixtures("timed_here")
def test_the_pipeline_s_table_checks_times_and_measures_its_cases(capsys):
    for chosen in ("first", "halves", "published"):
        assert bench_pipeline.main(["--quick", "--repeats", "1", "--case", chosen]) == 0
        out, measured = capsys.readouterr().out, 0
        for one in [one for one in bench_pipeline.CASES if chosen in one.name]:
            reason = bench_pipeline.why_not(one)
            assert (f"\n{one.name}: not measured, {reason}" if reason else f"\n{one.name}: L=3 D=64") in out
            measured += not reason
        assert out.count("scores agree to") == out.count("    time ") == out.count("    memory ") == measured
        assert measured or chosen == "published"  # the other tools' environment may not be here


def test_the_verdicts_of_made_up_numbers():
    floor, hooks = case(time=1.1), case(against="hooked", time=1 / 8, memory="1/6")
    buffer = floor.work.sender_buffer()
    assert buffer == 16 * 16 * 20 * 64 * 4
    holds = bench_pipeline.time_line(floor, [1.0, 1.1, 1.3], 2.0, 1.9)
    assert holds == "1.1 x floor (1.00 – 1.30; 2.00 s and 1.90 s), bound 1.1: holds"
    short = bench_pipeline.time_line(hooks, [0.2, 0.1, 0.2], 1.0, 5.0)
    assert short == "0.2 x hooked (0.10 – 0.20; 1.00 s and 5.00 s; 5.0 x less), bound 0.125: FALLS SHORT"
    assert bench_pipeline.time_line(case(time=None), [3.0], 3.0, 1.0).endswith("(stated)")
    bounds = {
        "floor + 1.25 x buffer": 1000 + 1.25 * buffer,
        "2 x floor": 2000,
        "unshared": 70,
        "1/4": 250,
        "1/6": 1000 / 6,
    }
    for kind, bound in bounds.items():
        one = case(memory=kind)
        assert bench_pipeline.memory_bound(one, 1000, 70) == bound
        assert bench_pipeline.memory_line(one, int(bound), 1000, 70).endswith(": holds")
        assert bench_pipeline.memory_line(one, int(bound) + 1, 1000, 70).endswith(": FALLS SHORT")
    stated = bench_pipeline.memory_line(case(memory="stated"), 3 << 20, 1 << 20, 0)
    assert stated == "3 MiB, floor 1 (stated)"
    mib = bench_pipeline.memory_line(hooks, 10 << 20, 80 << 20, 0)
    assert mib == "10 MiB, hooked 80 (8.0 x less), bound 13: holds"


@needs_peaks
@pytest.mark.usefixtures("timed_here")
def test_the_memory_s_table_sets_what_was_planned_beside_what_was_resident(capsys):
    assert bench_pipeline.main(["--quick", "--only", "memory"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()[-2:]
    for line, storage in zip(lines, ("dense", "factored"), strict=True):
        assert re.fullmatch(rf".*B=24, T=20, {storage}: planned \d+ MiB in .* s, resident \d+: .* x, bound .*", line)


def test_implementations_that_disagree_are_never_timed(monkeypatch):
    right = hooked.eap
    monkeypatch.setattr(hooked, "eap", lambda *args: right(*args) * 1.01)
    with pytest.raises(RuntimeError, match=r"dense, hooked disagree by .*e-0[23] .*: nothing is timed"):
        pipeline_work.disagreement(case().work, ["dense", "hooked"])


def test_times_are_taken_in_turn_in_a_process_apart():
    small = pipeline_work.Work(2, 2, 16, 50, B=2, T=8)
    times = pipeline_work.seconds(small, ["dense", "floor"], 2, 3)
    assert [len(found) for found in times] == [3, 3] and all(0 < t < 10 for found in times for t in found)


@needs_peaks
def test_memory_is_measured_apart_and_sees_what_a_batch_allocates():
    small = pipeline_work.Work(2, 2, 64, 50, B=2, T=8)
    large = replace(small, B=200)
    few, many = pipeline_work.memories([(small, "dense"), (large, "dense")])
    assert many - few > 0.9 * large.sender_buffer()


def test_a_memory_that_cannot_be_measured_is_said(monkeypatch, capfd):
    small = pipeline_work.Work(2, 2, 64, 50, B=2, T=8)
    with pytest.raises(SystemExit, match="fast did not run on"):
        pipeline_work.serve_memory([(asdict(small), "fast")], 1)
    assert "must be floor, dense" in capfd.readouterr().err
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(RuntimeError, match="serve_memory failed"):
        pipeline_work.memories([(small, "dense")])


@pytest.mark.parametrize("grouped", [{}, {"G": 2, "M": 27}, {"G": 2, "M": 27, "biased": True}])
def test_the_floor_is_two_forwards_of_the_model_and_a_backward(grouped):
    work = pipeline_work.Work(3, 4, 24, 50, B=3, T=7, **grouped)
    model, pairs = work.model(dtype=torch.float64), work.pairs()
    weights = model.weights
    x = weights.w_e[pairs.clean] + (0 if weights.w_pos is None else weights.w_pos[:7])
    x.requires_grad_()
    logits = plain_forward(model, x)
    torch.testing.assert_close(logits, forward(model, pairs.clean)[:, -1], rtol=0, atol=1e-12)
    # The backward of the embedding is the sum of all receivers' gradients: their scores with it are one product.
    (grad,) = torch.autograd.grad((logits[:, pipeline_work.RIGHT] - logits[:, pipeline_work.WRONG]).sum(), x)
    delta = weights.w_e[pairs.corrupt] - weights.w_e[pairs.clean]
    scores = attribute(model, pairs).scores[0].sum()
    torch.testing.assert_close((grad * delta).sum() / len(pairs), scores, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", pipeline_work.PUBLISHED)
def test_published_tools_agree_or_are_said_to_be_absent(name):
    if reason := published.why_not(name):
        assert reason.startswith(f"{name.partition(',')[0]} is not installed (tests/interop/environment-")
        return
    assert pipeline_work.disagreement(case().work, ["dense", name]) < 1e-4


@needs_peaks
@pytest.mark.usefixtures("timed_here")
def test_scaling_tables_and_their_plot(tmp_path, capsys):
    plot, lines = tmp_path / "scaling.png", tmp_path / "rows.jsonl"
    bench_pipeline.main(["--only", "scaling", "--quick", "--repeats", "1", "--plot", str(plot), "--json", str(lines)])
    assert plot.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") and plot.stat().st_size > 5000
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    axes = scaling.QUICK_AXES
    assert [(r["axis"], r["size"], r["name"]) for r in rows] == [
        (axis, size, name) for axis, sizes in axes.items() for size in sizes for name in scaling.NAMES
    ]
    assert all(row["seconds"] > 0 for row in rows)
    out = capsys.readouterr().out
    assert all(f"\n{axis}, CPU ms" in out and f"\n{axis}, MiB" in out for axis in axes)


def test_a_scaling_table_gives_the_exponent():
    rows = [
        {"axis": "B", "size": size, "name": name, "seconds": size**power, "bytes": size << 20}
        for size in (1, 2, 8)
        for name, power in zip(scaling.NAMES, (1, 2, 0, 0.5), strict=True)
    ]
    table = scaling.table(rows, "B", "seconds").splitlines()
    assert table[0].split() == ["B,", "CPU", "ms", "1", "2", "8", "exponent"]
    assert [line.split()[-1] for line in table[1:]] == ["1.00", "2.00", "0.00", "0.50"]
    assert table[2].split() == ["dense", "1000.0", "4000.0", "64000.0", "2.00"]
    assert scaling.table(rows, "B", "bytes").splitlines()[1].split() == ["floor", "1.0", "2.0", "8.0", "1.00"]


class Host:
    """The GPU's instruments on the CPU: everything is run, the figures are made up."""

    device = "cpu"

    def __init__(self):
        self.timed = 0

    def ms(self, run):
        run()
        self.timed += 1
        return 20.0 if self.timed % 2 else 50.0

    def peak(self, run):
        run()
        return 3 << 20

    def profile(self, run):
        run()
        counts = {"void partial_scores": 10, "channel_grads": 20, "gemm": 30}
        return gpu.Profile({"void partial_scores": 1.0, "channel_grads": 2.0, "gemm": 1.0}, counts, 80)

    def release(self):
        pass


def test_the_gpu_part_checks_then_measures_every_part(tmp_path, capsys, monkeypatch):
    lines = tmp_path / "rows.jsonl"
    monkeypatch.setattr(gpu, "TINY", replace(gpu.TINY, L=2, T=5))
    for part in ("check", "warm", "GPT-2 small, B=3", "kernels", "hooks", "Llama"):
        assert gpu.main(quick=True, json_file=lines, on=Host(), part=part) == 0
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    assert len([row for row in rows if "check" in row]) == 6
    of_llama = [row.get("name") for row in rows if row.get("model") == "Llama-3.1-8B" and "ms_a_batch" in row]
    assert of_llama == ["floor", "dense, no graphs", "factored, no graphs"]  # the hooks are GPT-2's
    rows = [row for row in rows if row.get("model") != "Llama-3.1-8B"]
    kernels, dense = (row for row in rows if row.get("name") == "dense, no graphs")
    assert [name.split()[1] for name in kernels["kernels"]] == ["channel_grads", "void", "gemm"]
    assert kernels["kernels"]["0 channel_grads"] == [2.0, 20]
    assert dense["ms_a_batch"] == 10 and dense["pairs_a_second"] == pytest.approx(300) and dense["of_floor"] == 0.75
    parts = (dense["contraction"], dense["making"], dense["kernels_a_batch"], dense["launches_a_batch"])
    assert parts == (0.25, 0.5, 30, 40) and dense["peak_mib"] == 3 and dense["device_ms"] == 2e-3
    models = {"GPT-2 small, B=3", "GPT-2 XL", "GPT-2 small"}
    assert {row["model"] for row in rows if "model" in row} == models
    by_kernel = [row for row in rows if "kernel" in row]
    assert [row["kernel"] for row in by_kernel] == ["channel_grads", "void partial_scores", "gemm"]
    largest = [(row["model"], row["B"]) for row in rows if row.get("name") == "hooked" and "ms" in row]
    assert largest == [("GPT-2 small", 6), ("GPT-2 XL", 6)]
    assert "all parts measured" in capsys.readouterr().out
    refused(
        "--part must be in one of: check, warm, GPT-2",
        gpu.main,
        quick=True,
        json_file=None,
        on=Host(),
        part="7B",
        error=SystemExit,
    )


def test_a_part_of_the_gpu_bench_that_fails_is_printed_and_the_rest_goes_on(monkeypatch, capsys):
    def broken(self, title, work, dtype):
        raise RuntimeError("this part cannot run")

    monkeypatch.setattr(gpu.Bench, "kernels", broken)
    host = Host()
    assert gpu.main(quick=True, json_file=None, on=host, part="GPT-2 small") == 1
    out, error = capsys.readouterr()
    assert "kernels, GPT-2 small: FAILED" in out and out.endswith("FAILED: kernels, GPT-2 small\n")
    assert "this part cannot run" in error and "hooked, B 6" in out and host.timed > 0
    bench = gpu.Bench(host, 60)
    monkeypatch.setattr(hooked, "eap", None)
    with pytest.raises(RuntimeError, match="tiny: hooked failed"):
        bench.against("tiny", gpu.TINY, torch.float32)
    calls = ["a call of 4", "a call of 6"]
    expected = ["floor", "dense, no graphs", *calls, "factored, no graphs"]
    assert [row["name"] for row in bench.rows if "failed" not in row] == expected


COMPILED = ("compile-tilings", "compile")


def test_the_script_for_a_gpu_goes_on_where_there_is_none(tmp_path):
    script = Path(bench_pipeline.__file__).parent / "gpu.sh"
    stub = tmp_path / "python"
    stub.write_text('#!/bin/sh\ncase "$*" in *B=256*) exit 3;; esac\necho "ran $*"\n')
    stub.chmod(0o755)
    environment = os.environ | {"EAPCORE_PYTHON": str(stub)}
    done = subprocess.run([script, tmp_path / "out", "--quick"], capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and "FAILED: " in done.stdout and "small-256 (3)" in done.stdout
    parts = [json.loads(line) for line in (tmp_path / "out/parts.jsonl").read_text().splitlines()]
    assert {part["part"] for part in parts[1:7]} == {"check-kernels", "check", "tests", "graphs", *COMPILED}
    assert [part["part"] for part in parts[7:9]] == ["small-256", "xl"]
    assert {part["part"] for part in parts[1:] if part["status"]} == {"small-256"}
    assert "--part GPT-2 XL" in (tmp_path / "out/xl.txt").read_text()
    some = environment | {"EAPCORE_PARTS": "check llama"}
    done = subprocess.run([script, tmp_path / "some", "--quick"], capture_output=True, text=True, env=some)
    parts = [json.loads(line)["part"] for line in (tmp_path / "some/parts.jsonl").read_text().splitlines()]
    assert done.returncode == 0 and parts == ["check", "llama"]


@needs_triton
def test_every_tiling_is_tried_and_one_that_fails_costs_its_own_line(monkeypatch, capsys):
    import ops.tilings as tilings

    monkeypatch.setattr(bench_kernels, "Clock", lambda device: lambda run: 1.0)
    monkeypatch.setattr(tilings, "RECEIVERS", tilings.RECEIVERS[:1])
    monkeypatch.setattr(tilings, "TILINGS", ((128, 128, 64, 4, 3),))
    assert tilings.main(["--quick", "--device", "cpu", "--only", "XL"]) == 0
    lines = capsys.readouterr().out.splitlines()
    of_attention = ["attend_moved", "attend_grad"] * 3
    assert [line.split()[1] for line in lines] == [
        "receiver_grads",
        "receiver_grads",
        *of_attention,
        *["edge_scores"] * 3,
    ]
    monkeypatch.setattr(tilings, "RECEIVERS", (tilings.Walk(128, 48, 8, 3),))  # no power of two
    assert tilings.main(["--quick", "--once", "--device", "cpu", "--only", "XL"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert ["failed" in line for line in lines] == [True, True] + [False] * (len(lines) - 2)


def test_the_gpu_bench_times_nothing_that_is_wrong_and_stops_when_its_time_is_up(monkeypatch, capsys):
    host = Host()
    assert gpu.main(quick=True, json_file=None, on=host, seconds=-1) == 1
    assert "not measured: the time is up" in capsys.readouterr().out and host.timed == 0
    right = hooked.eap
    monkeypatch.setattr(hooked, "eap", lambda *args: right(*args) * 1.01)
    assert gpu.main(quick=True, json_file=None, on=host) == 1
    assert "FAILED: check" in capsys.readouterr().out and host.timed == 0


def test_hooks_that_do_not_fit_end_the_search_for_the_largest_batch():
    class Small(Host):
        calls = 0

        def peak(self, run):
            self.calls += 1
            if self.calls == 3:
                raise torch.OutOfMemoryError("no more")
            return super().peak(run)

    bench = gpu.Bench(Small(), 60)
    bench.largest("tiny", gpu.TINY, 48)
    assert [(row["name"], row["B"]) for row in bench.rows] == [("hooked", 6), ("factored", 6)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is visible")
def test_without_a_gpu_it_says_so(capsys):
    assert bench_pipeline.main(["--device", "cuda"]) == 1
    assert "no GPU is visible to torch" in capsys.readouterr().out


# The methods


@pytest.fixture(scope="module")
def induction():
    """The smaller toy model in float32 and float64, and a few of its pairs."""
    models = load("toy-induction"), load("toy-induction", dtype="float64")
    return models, TASKS["toy-induction"].generate(4, 0)


def test_closeness_sees_scale_and_offset_and_compares_unsigned_scores_with_the_size_of_effects(induction):
    (model, _), pairs = induction
    exact = patch_edges(model, pairs)
    y = exact.scores[exact.mask].double()
    r2, spearman = bench_methods.closeness(replace(exact, scores=2 * exact.scores), exact)
    assert r2 == pytest.approx(1 - float(y.pow(2).sum() / (y - y.mean()).pow(2).sum())) and r2 < 0.2
    assert spearman == pytest.approx(1)  # which a squared correlation would be too
    assert bench_methods.closeness(exact, exact)[0] == 1
    unsigned = EdgeScores(exact.scores.abs(), exact.graph, attribute(model, pairs, method="grad-drop").meta)
    assert bench_methods.closeness(unsigned, exact) == (1, pytest.approx(1))
    assert bench_methods.closeness(replace(unsigned, meta=exact.meta), exact)[0] < 0.9


def test_the_table_of_methods_has_every_method_and_judges(capsys):
    assert bench_methods.judge("toy-induction", 4)
    out = capsys.readouterr().out
    table = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.startswith("  ")}
    assert set(bench_methods.METHODS) <= set(table)
    assert table["grad-drop"][5] == table["atp-star"][5] == "–" and float(table["grad-drop"][1]) > 0
    assert all(len(table[method]) == 7 for method in bench_methods.METHODS)
    assert out.count("PASS: ") == 3 and out.count(" → ") == 8


def test_the_table_of_truth_judges_each_combination_on_two_kinds_of_draws(monkeypatch, capsys):
    some = {name: bench_truth.COMBINATIONS[name] for name in ("eap", "at 0.75", "screened 3.0")}
    monkeypatch.setattr(bench_truth, "COMBINATIONS", some)
    assert bench_truth.main(["--only", "toy-induction", "--draws", "1", "--pairs", "3", "--all", "--oracle"]) == 0
    out = capsys.readouterr().out
    assert "chosen by draws 0 to 0" in out and "confirmed on draws 1 to 1" in out
    rows = [line.split() for line in out.splitlines() if line.startswith("  exact")]
    assert len(rows) == 2 and all(row[1:5] == ["1.000"] * 4 for row in rows)
    assert all(any(line.startswith(f"  {name}") for line in out.splitlines()) for name in some)
    first = {line[2:14].strip(): float(line.split()[-7]) for line in out.splitlines()[4:] if line.count(".") > 3}
    assert first["at 0.75"] < first["oracle 2.0"] <= first["oracle 4.0"] and first["oracle 6.0"] > 0.999


def test_draws_that_are_named_are_shown_each_with_its_own_r2(induction, monkeypatch, capsys):
    case = bench_truth.Case("a model", induction[0][0], None, 2)
    rows = {3: (0.5, 0.25), 7: (0.75, 0.5), 8: (1.0, 0.125)}  # R² and fit of a draw
    monkeypatch.setattr(bench_truth, "cases", lambda only, large, more: iter([case] * more))

    def draw(case, seed, *_):
        columns = dict(zip(bench_truth.COLUMNS, (*rows[seed], 0, 0, 0, 0), strict=True))
        return {"eap": columns | {"time": 1.0}}

    monkeypatch.setattr(bench_truth, "draw", draw)
    assert bench_truth.main(["--seeds", "3,7-8", "--more"]) == 0
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines() if line.startswith("  eap ")]
    assert [float(x) for x in lines[0][1:]] == pytest.approx([0.5, 0.75, 1, 0.75, 0.5, 0.292, 0.125], abs=5e-4)
    assert "draws 3, 7, 8, 1 models" in out and lines[1][1] == "0.750"
    for wrong in ("", "3-", "5-4", "a"):
        with pytest.raises(SystemExit):
            bench_truth.main(["--seeds", wrong])
        assert f"expected numbers such as 2,20-25, got {wrong!r}" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench_truth.main(["--rows", "eap; gym"])
    assert "--rows must be some of eap; " in (said := capsys.readouterr().err) and "got 'gym'" in said


def test_costs_of_methods_are_medians_over_turns_and_of_probing_those_of_one_step(monkeypatch, capsys):
    clock = iter(range(10**6))
    monkeypatch.setattr(bench_truth, "SMALL", pipeline_work.Work(1, 2, 8, 20, B=2, T=4))
    monkeypatch.setattr(bench_truth.time, "process_time", lambda: next(clock))  # a call takes one second
    some = ("eap", "screened 2.0", "a step of probing nodes")
    monkeypatch.setattr(bench_truth, "COSTS", {name: bench_truth.COSTS[name] for name in (*some, "qk-fix")})
    steps = []
    monkeypatch.setattr(bench_truth, "subnetwork_probing", lambda *args, steps, **how: said(steps))

    def said(n):
        steps.append(n)
        for _ in range(3 * n):
            next(clock)

    assert bench_truth.main(["--cost", "--pairs", "2", "--rows", ";".join(some)]) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert [row[0][2:] for row in rows] == list(some) and steps == [3, 1] * 4
    assert [[float(cell.strip(" |")) for cell in row[1:]] for row in rows] == [[1.0] * 4, [1.0] * 4, [3.0] * 4]


def test_further_trainings_and_tasks_are_left_out_unless_they_are_asked_for(monkeypatch):
    from truth import cases

    monkeypatch.setattr(cases, "addition", lambda seed: (None, 0.875 + seed / 100))
    monkeypatch.setattr(cases.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(cases, "load", lambda name: None)
    names = [[case.name for case in cases.cases(only, 9, more)] for only, more in (("addition", False), ("n 2", True))]
    assert names == [["addition, 88 % right"], ["addition 2, 90 % right"]]
    assert [[case.name for case in cases.cases("smollm", 9, more)][-1] for more in (False, True)] == [
        "smollm2-135m",
        "smollm2-135m on ioi",
    ]


def test_a_circuit_must_be_better_by_kl_and_by_the_metric(induction, monkeypatch, capsys):
    (model, _), pairs = induction
    scores = attribute(model, pairs)
    monkeypatch.setattr(bench_methods, "acdc", lambda *args, start, threshold: start)
    for kl, value, better in (((-2, -1), (0.5, 0.75), True), ((-2, -1), (0.75, 0.5), False), ((-1, -2), (0, 1), False)):
        made_up = {"kl": kl, "logit_diff": (1, 0, *value)}
        monkeypatch.setattr(bench_methods, "metric_on", lambda m, p, metric, c, made_up=made_up: made_up[metric])
        assert bench_methods.acdc_after_eap(model, pairs, "logit_diff", scores) is better
    assert "faithfulness 0.500 → 0.750" in capsys.readouterr().out


def test_patching_is_timed_against_one_edge_at_a_time(induction, capsys):
    models, pairs = induction
    edges = [name for name, _ in attribute(models[0], pairs).top(12)]
    bench_methods.speed_of_patching("tiny", models, pairs, edges, (12, 4), few=2)
    out = capsys.readouterr().out
    assert "12 edges agree in float64, 4 in float32: hooks" in out
    assert "one at a time, hooks" in out and "one at a time, plain" in out and "(4 edges timed)" in out
    assert "× fewer CPU seconds than hooks, target 10" in out


@pytest.mark.parametrize(("off", "message"), [(1e-9, "in float64 on 12 edges"), (1e-4, "from float64, hooks")])
def test_effects_that_disagree_are_never_timed(induction, monkeypatch, off, message):
    models, pairs = induction
    right = bench_methods.patch_edges
    dtype = torch.float64 if "in float64" in message else torch.float32

    def wrong(model, *args, **options):
        found = right(model, *args, **options)
        return replace(found, scores=found.scores + off) if model.dtype == dtype else found

    monkeypatch.setattr(bench_methods, "patch_edges", wrong)
    monkeypatch.setattr(bench_methods, "seconds", lambda run: pytest.fail("something was timed"))
    edges = [name for name, _ in attribute(models[0], pairs).top(12)]
    refused(message, bench_methods.speed_of_patching, "tiny", models, pairs, edges, (12, 4), error=SystemExit, few=2)


@pytest.mark.parametrize(
    ("times", "holds"), [([9, 9, 2, 11, 1, 4, 2, 10], "PASS"), ([9, 9, 2, 12, 2, 12, 2, 10], "FAIL")]
)
def test_integrated_gradients_are_held_to_their_share_of_eap(induction, monkeypatch, capsys, times, holds):
    (model, _), pairs = induction
    left = iter(times)  # of eap and eap-ig in turn, the warm-up first
    monkeypatch.setattr(bench_methods, "seconds", lambda run: run() and next(left))
    assert bench_methods.speed_of_gradients(model, pairs, 3) is (holds == "PASS")
    ratio = "5.00" if holds == "PASS" else "6.00"
    assert capsys.readouterr().out.startswith(f"  {holds}: EAP-IG with 5 steps {ratio} × EAP (")


def test_the_rules_of_integrated_gradients_are_compared_on_both_toys(capsys):
    bench_ig.main(["--pairs", "2", "--only", "one gradient"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("eap ", "one gradient at 0.75"))]
    assert len(lines) == 4 and all(float(line.split()[-3]) <= 1 for line in lines)
    titles = [title for title, _ in bench_ig.lines()]
    assert {"eap", "relp", "qk-fix", "eap-ig gauss 4", "eap-ig-activations right 5"} <= set(titles)


def test_a_model_s_edges_are_held_against_exact_ones_and_its_circuits_against_other_names(
    monkeypatch, tmp_path, capsys
):
    names = ("eap", "flow-sum", "subnetwork probing, nodes")
    monkeypatch.setattr(bench_language, "METHODS", {name: bench_language.METHODS[name] for name in names})
    monkeypatch.setattr(bench_language, "SIZES", (0.001, 0.5, 1.0))  # the first is no edge of so small a model
    argv = ["--model", "toy-induction", "--task", "toy-induction", "--pairs", "3", "--edges", "6", "--random", "9"]
    assert bench_language.main([*argv, "--dtypes"]) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if "float16" in line]
    assert len(rows) == 2 and all(0 < float(cell.strip(" |%")) < 5 for row in rows for cell in row[2:])
    argv += ["--steps", "2", "--keep", str(tmp_path / "kept")]
    assert bench_language.main([*argv, "--rows", "eap; flow-sum"]) == 0
    first = capsys.readouterr().out
    few = [line for line in first.splitlines() if line.startswith(("| eap", "| flow-sum"))]
    assert "15 edges patched" in first and "top 6" in first and "random 9" in first and "both" in first
    # What is there is not made again: only the third method's scores and circuits are.
    for name in ("attribute", "patch_edges"):
        monkeypatch.setattr(bench_language, name, lambda *args, **how: pytest.fail("made again"))
    assert bench_language.main(argv) == 0
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line.startswith(("| eap", "| flow-sum"))] == few
    found = {
        name: [line.split(" | ")[1:] for line in out.splitlines() if line.startswith(f"| {name} ")] for name in names
    }
    assert [found[name][0][3] for name in names[1:]] == ["–"] * 2 and float(found["flow-sum"][0][0]) > 0
    assert [found[name][1][1] for name in names] == ["1.00 / 1.00"] * 3  # every edge is the model, for all names
    with pytest.raises(SystemExit):
        bench_language.main([*argv, "--pairs", "4"])
    assert "kept was made with pairs 3: choose another folder" in capsys.readouterr().err


def test_the_edges_that_are_drawn_are_others_and_judged_by_their_effects(induction):
    (model, _), pairs = induction
    exact, mask = patch_edges(model, pairs), model.graph.edge_mask()
    first = exact.top_n(7).mask
    drawn = bench_language.others(mask, first, 11)
    assert int(drawn.sum()) == 11 and not bool((drawn & first).any()) and not bool((drawn & ~mask).any())
    assert bench_language.judged(exact, exact, drawn) == pytest.approx((1, 1, 1, 1))
    r2, fit, rank, sign = bench_language.judged(replace(exact, scores=-2 * exact.scores), exact, first)
    assert (r2, rank, sign) == pytest.approx((1, -1, 0)) and fit < 0
