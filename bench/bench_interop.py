"""The same attribution on one HookedTransformer, through its hooks as EAP-IG does it and through the adapter.

    PYTHONPATH=. build/interop/tl-2.16/bin/python bench/bench_interop.py            GPT-2 small's size, random weights
    PYTHONPATH=. build/interop/tl-2.16/bin/python bench/bench_interop.py --quick    a small model, to see that it runs

Needs TransformerLens 2.16 or 3.9 (tests/interop/run.sh makes the environments). The hooks: use_split_qkv_input,
use_attn_result and use_hook_mlp_in, a buffer [B, T, S, D] of differences, one contraction in each backward hook. The
adapter: eapcore.interop.eap_ig.attribute on the same module, the conversion included in every run.

Scores are compared before anything is timed. Times are CPU seconds of the process (user + system), interleaved, warm,
the median. Peak memory is measured in a child process of its own for each: the high-water mark of the resident set
above what is resident once the model is loaded.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # a thread that spins while it waits would count as CPU time

import torch
from torch import Tensor

if importlib.util.find_spec("eapcore") is None:  # an uninstalled checkout
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from peers.published import hooked_model, hooked_scores, logit_diff
from pipeline.work import MIB, in_turns, peak_of

from eapcore.graph.graph import Graph
from eapcore.interop import eap_ig

SIZES = {"small": (12, 12, 768, 50257), "tiny": (3, 4, 64, 211)}  # layers, heads, d_model, vocabulary
WAYS = ("hooks", "adapter")


def implementation(way: str, model, args: argparse.Namespace) -> Callable[[], Tensor]:
    """A call that scores every edge in one way, [S, R]."""
    generator = torch.Generator().manual_seed(1)
    draw = partial(torch.randint, 0, model.cfg.d_vocab, generator=generator)
    clean, corrupt, label = draw((args.batch, args.tokens)), draw((args.batch, args.tokens)), draw((args.batch, 2))
    options = {"ig_steps": args.steps} if args.method == "EAP-IG-inputs" else {}
    if way == "hooks":
        # Frozen weights, as in the adapter: the gradient has to start at the embedding then.
        model.embed.requires_grad_(True)
        return partial(hooked_scores, model, clean, corrupt, partial(logit_diff, label=label), args.method, **options)
    full = Graph(model.cfg.n_layers, model.cfg.n_heads, True)
    graph = SimpleNamespace(cfg={}, scores=torch.zeros(full.n_senders, full.n_receivers, dtype=torch.float64))
    batches = [(clean, corrupt, label)]

    def run() -> Tensor:
        return eap_ig.attribute(model, graph, batches, logit_diff, args.method, quiet=True, **options).scores

    return run


def peak_memory(way: str, args: argparse.Namespace) -> int:
    """Bytes above loading at the high-water mark of one run, in this process: run it in one of its own."""
    run = implementation(way, hooked_model(SIZES[args.size], torch.float32), args)
    torch.ones(64, 64) @ torch.ones(64, 64)  # the threads' own buffers are not the implementation's
    return peak_of(run)


def child(way: str, args: argparse.Namespace) -> int:
    given = [f"--{name}={getattr(args, name)}" for name in ("size", "batch", "tokens", "method", "steps", "threads")]
    command = [sys.executable, __file__, *given, "--child", way]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def agreement(args: argparse.Namespace) -> tuple[float, float]:
    """The largest difference relative to the largest score: of a small model in float64, of this one in float32."""
    found = []
    for size, dtype in (("tiny", torch.float64), (args.size, torch.float32)):
        model = hooked_model(SIZES[size], dtype)
        hooks, adapter = (implementation(way, model, args)() for way in WAYS)
        found.append(float((hooks - adapter).abs().max() / hooks.abs().max()))
    if not (found[0] < 1e-10 and found[1] < 1e-3):
        raise RuntimeError(f"the two ways disagree by {found[0]:.1e} in float64, {found[1]:.1e} in float32")
    return found[0], found[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--method", choices=eap_ig.METHODS, default="EAP")
    parser.add_argument("--steps", type=int, default=5, help="of EAP-IG-inputs (default: 5)")
    parser.add_argument("--repeats", type=int, default=5, help="timed pairs of runs (default: 5)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="a small model, to see that everything runs")
    parser.add_argument("--child", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.quick:
        args.size = "tiny"
    if args.child:
        print(peak_memory(args.child, args))
        return
    from importlib.metadata import version

    print(f"{args.method}, {args.size} {SIZES[args.size]}, B={args.batch}, T={args.tokens}, {args.threads} threads")
    print(f"float32, torch {torch.__version__}, transformer-lens {version('transformer-lens')}")
    double, single = agreement(args)
    print(f"agreement: {double:.0e} of the largest score in float64 (small model), {single:.0e} in float32")
    model = hooked_model(SIZES[args.size], torch.float32)
    taken = in_turns([implementation(way, model, args) for way in WAYS], args.repeats)
    ratio = statistics.median(a / b for a, b in zip(*taken, strict=True))
    for way, values in zip(WAYS, taken, strict=True):
        print(f"{way:8} {statistics.median(values):7.2f} s CPU ({min(values):.2f} – {max(values):.2f})")
    print(f"hooks / adapter: {ratio:.1f} x the time")
    hooks, adapter = (child(way, args) for way in WAYS)
    print(f"peak above the model: hooks {hooks / MIB:.0f} MiB, adapter {adapter / MIB:.0f}: {hooks / adapter:.1f} x")


if __name__ == "__main__":
    main()
