"""What the processes of tests/execution/test_distributed.py do; each function is run by every one of them."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from dataclasses import replace

import kills
import torch
from everything import EVERYTHING
from models import random_circuit, random_model, random_pairs
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import eapcore.evaluation.reproduce as reproduction
import eapcore.execution.distributed as distributed
from eapcore.attribution.attribute import attribute
from eapcore.evaluation.evaluate import evaluate
from eapcore.evaluation.reproduce import Plan, known, reproduce
from eapcore.evaluation.screened import screened
from eapcore.patching.edges import patch_edges
from eapcore.tasks.truth import Truth

LENGTHS = [7, 5, 6, 7, 3, 6, 4, 7]


def case(**options):
    model = random_model(n_heads=2, d_model=8, **options)
    return model, random_pairs(model, LENGTHS, first_difference=1)


def number(x):
    x = x if isinstance(x, torch.Tensor) else torch.tensor(x)
    return x.double().cpu()


def everything(rank, size, folder):
    """Every public function, alone and shared: how far they differ, and the bits of what was shared, twice."""
    model, pairs = case()
    found = {}
    for name, call in {**EVERYTHING, "screened": lambda m, p, **o: screened(m, p, budget=5.0, **o).scores}.items():
        if name == "circuits":  # one batch
            continue
        shared = number(call(model, pairs, distributed=True))
        alone = number(call(model, pairs)) if rank == 0 else shared  # one process compares
        twice = name in ("eap-ig", "by pair, factored", "edges", "faithfulness")
        again = number(call(model, pairs, distributed=True)) if twice else shared
        scale = float(alone.abs().max())
        gap = float((alone - shared).abs().max()) / (scale or 1.0)
        found[name] = [gap, scale, torch.equal(shared, again), shared.numpy().tobytes().hex()[:4096]]
    ways = [{"ablation": "mean"}, {"ablation": "zero", "level": "node"}, {"level": "neuron", "reduce": "pair"}]
    for options in (*ways, {"uncertainty": True, "reduce": "position"}):
        alone = attribute(model, pairs, **options)
        shared = attribute(model, pairs, distributed=True, **options)
        found[str(options)] = [float((alone.scores - shared.scores).abs().max()), 1.0, True, ""]
        for name in ("standard_error", "sign_consistency", "jaccard") if "uncertainty" in options else ():
            gap = float((getattr(alone, name) - getattr(shared, name)).abs().max())
            found[name] = [gap, float(getattr(alone, name).max()), True, ""]
        if options.get("reduce") == "pair":
            gap = max(float((alone.per_pair[k] - shared.per_pair[k]).abs().max()) for k in alone.per_pair)
            found["per pair"] = [gap, 1.0, len(shared.per_pair) == 3, ""]
    scores, kept = attribute(model, pairs), {"resume": folder / "judged", "distributed": True}
    alone, *shared = (evaluate(model, pairs, "logit_diff", scores, **how).mib for how in ({}, kept, kept))
    found["kept"] = [abs(alone.cpr - shared[0].cpr), 1.0, shared[0] == shared[1], repr(shared[1].signed.values)]
    operations = []
    for shared in (True, False):
        with FlopCounterMode(display=False) as counter:
            spent = screened(model, pairs, budget=3, distributed=shared).meta["method"]["spent"]
        operations.append(counter.get_total_flops())
    return {"found": found, "sent": distributed.connect().sent, "operations": operations, "spent": spent}


def numbers(content):
    """All numbers of a JSON file's content, in order, and its words."""
    if isinstance(content, dict | list):
        parts = [numbers(x) for x in (content.values() if isinstance(content, dict) else content)]
        return [x for part in parts for x in part]
    return [content]


def furthest(one, other):
    """How far the numbers of two files are apart, a number of at least 1 relative to itself; the words are the same."""
    pairs = list(zip(*(numbers(json.loads(path.read_text())) for path in (one, other)), strict=True))
    assert all(type(a) is type(b) and (isinstance(a, float) or a == b) for a, b in pairs)
    return max(abs(a - b) / max(1.0, abs(a)) for a, b in pairs if isinstance(a, float))


def reproduced(rank, size, folder):
    """A reproduction by one process and by all, twice; then where one step is left, in a folder that the first process
    alone has, and where a step was edited."""
    model, pairs = case()
    graph, published = model.graph, replace(known("ioi")[1], roles={}, bent=(), curve=(0.01, 0.1))
    truth = Truth("random", random_circuit(graph, 0.3), {"name mover": ("a1.h0",)}, ("a1.h0<q>",), ("a1.h0<q>", "m1"))
    reproduction.known = lambda task: (truth, published)
    plan = Plan(curves=1, thresholds=[0.02], top_n=[20], probe_steps=2)

    def redo(place, shared=True):
        found = reproduce(model, "ioi", pairs, folder / place, plan=plan, distributed=shared)
        found.save(folder / f"found-{rank}.json")
        return (folder / f"found-{rank}.json").read_text()

    first, again = redo("shared"), redo("twice")
    steps = sorted((folder / "shared" / "steps").iterdir()) if rank == 0 else []
    told = {"found": first, "again": again, "steps": [path.name for path in steps]}
    if rank == 0:
        redo("alone", shared=False)
        files = [path.relative_to(folder / "shared") for path in (folder / "shared").rglob("*") if path.is_file()]
        told["files"] = sorted(map(str, files))
        told["differ"] = [
            str(f) for f in files if (folder / "shared" / f).read_bytes() != (folder / "twice" / f).read_bytes()
        ]
        judged = ("reproduction.json", "evaluation.json", "verification.json")
        told["gap"] = max(furthest(folder / "alone" / name, folder / "shared" / name) for name in judged)
        next(path for path in steps if path.name.startswith("search-")).unlink()
    own = ("shared", "elsewhere")[rank > 0]
    reproduction.attribute = reproduction.inside_scores = reproduction.measure_mib = None  # not asked again
    told["left"], told["read"] = redo(own), (folder / "elsewhere").exists()
    if rank == 0:
        (folder / "shared" / "steps" / "curves.json").write_text("[")
    told["edited"] = refused(reproduce, model, "ioi", pairs, folder / own, plan=plan)
    told["speaks"] = distributed.connect().speaks()
    told["plan"] = refused(reproduce, model, "ioi", pairs, folder / own, plan=replace(plan, curves=rank))
    return told


def devices(rank, size, folder):
    """Each process's model over two devices of its own: whether the bits are those of one device each, and how far off
    one process is."""
    from accel import on_accel  # here, since where another device is torch takes no derivative in a fork's fork

    model, pairs = case()
    with on_accel() as there, sdpa_kernel(SDPBackend.MATH):
        one = attribute(model, pairs, distributed=True, devices=["accel:0"]).scores
        two = attribute(model, pairs, distributed=True, devices=["accel:0", "accel:1"]).scores
        return [torch.equal(one, two), float((one - attribute(model, pairs).scores).abs().max()), len(there.travelled)]


def refused(function, *arguments, **options):
    try:
        function(*arguments, distributed=True, **options)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def faults(rank, size, folder):
    """What differs in the last process, or fails there: what every process raises; and that they go on afterwards."""
    last = rank == size - 1
    model, pairs = case()
    said = {"model": refused(attribute, random_model(n_heads=2, d_model=8, seed=int(last)), pairs)}
    said["task"] = refused(patch_edges, model, random_pairs(model, LENGTHS, seed=int(last)))
    said["method"] = refused(attribute, model, pairs, method="eap-ig", steps=2 + last)
    real = distributed._sources
    distributed._sources = lambda: "0.0.0 (other)" if last else real()
    said["eapcore"] = refused(attribute, model, pairs)
    distributed._sources = real
    said["few"] = refused(attribute, model, random_pairs(model, [5, 4]))
    expected = attribute(model, pairs)
    assert torch.allclose(attribute(model, pairs, distributed=True).scores, expected.scores, rtol=0, atol=1e-12)

    def fails(logits):
        if last:
            raise ValueError("no such token")
        return logits[:, 3]

    said["failed"] = refused(attribute, model, pairs, fails)
    return said


def killed(rank, size, folder):
    """The last process is killed at work: what the others say, and after how long."""
    model, pairs = case()

    def metric(logits):
        if rank == size - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return logits[:, 3] ** 2

    began = time.monotonic()
    said = refused(attribute, model, pairs, metric, batch_size=1, resume=folder / "kept")
    return {"said": said, "seconds": time.monotonic() - began}


def lonely(rank, size, folder):
    """The others do not come."""
    os.environ["WORLD_SIZE"] = "2"
    distributed.RENDEZVOUS = 1.0
    model, pairs = case()
    return refused(attribute, model, pairs)


class Stop(Exception):
    pass


def work(folder, stop_at=None):
    """Scores and exact effects that are kept in a folder, stopped before each process has done so much: their bytes."""
    model, pairs = case()

    def progress(done, total):
        if stop_at is not None and done >= stop_at:
            raise Stop

    found = []
    for call in (
        lambda **o: attribute(model, pairs, method="eap-ig", steps=2, reduce="position", **o).per_position,
        lambda **o: attribute(model, pairs, uncertainty=True, **o).standard_error,
        lambda **o: attribute(model, pairs, reduce="pair", **o).per_pair,
        lambda **o: patch_edges(model, pairs, "nll", **o).scores,
    ):
        try:
            kept = folder / f"kept{len(found)}"
            result = call(distributed=True, batch_size=1, resume=kept, progress=progress)
            found.append(result.numpy().tobytes().hex())
        except Stop:
            found.append("stopped")
        except RuntimeError as error:
            found.append("stopped" if "Stop" in str(error) else str(error))
    return found


def undisturbed(rank, size, folder):
    return work(folder / "whole")


def begun(rank, size, folder):
    """Each stops in the middle of its share; the second piece of work needs processes that lost nobody."""
    return work(folder / "parts", stop_at=1 + rank % 2)


def gone_on(rank, size, folder):
    return work(folder / "parts")


def killed_command(rank, size, folder):
    """A small form of tests/execution/kills.py."""
    return kills.try_all(2, folder / "commands", ("attribute",), after=0.5)["attribute"]


def survivor(rank, size, folder):
    """Scores and exact effects by processes that are killed at random moments, until one ends: are they the same bits,
    and how many were killed."""
    import eapcore.execution.resume as resume

    resume.SAVE_SECONDS = 0.03
    model, pairs = case()
    calls = {
        "scores": lambda **o: attribute(model, pairs, method="eap-ig-activations", reduce="position", **o).per_position,
        "pairs": lambda **o: attribute(model, pairs, level="neuron", reduce="pair", **o).per_pair["units"],
        "edges": lambda **o: patch_edges(model, pairs, "nll", **o).scores,
    }
    draw, found = random.Random(0), {}
    for name, call in calls.items():
        kept, result = folder / name, folder / f"{name}.bytes"
        began = time.monotonic()
        expected = call(batch_size=1, resume=folder / f"{name}-whole").numpy().tobytes()
        seconds, killed = time.monotonic() - began, 0
        while not result.exists():
            child = os.fork()
            if child == 0:
                done = call(batch_size=1, resume=kept).numpy().tobytes()
                result.with_suffix(".part").write_bytes(done)
                result.with_suffix(".part").rename(result)
                os._exit(0)
            if killed < 5:
                time.sleep(draw.uniform(0, 0.5 * seconds))
                os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
            assert status in (0, signal.SIGKILL)
            killed += status == signal.SIGKILL
            if killed < 2 and result.exists():  # the undisturbed run took longer, by what happened meanwhile: anew
                result.unlink()
                shutil.rmtree(kept)
                killed, seconds = 0, seconds / 2
        found[name] = [result.read_bytes() == expected, killed, len([f for f in kept.iterdir() if "tmp" in f.name])]
    return found
