"""How close each rule of integrated gradients comes to exact patching of every edge, on both toy models.

    python bench/bench_ig.py                 rules × steps, one gradient at 0.75, relp and the exact patterns
    python bench/bench_ig.py --pairs 16 --seed 1 --only eap-ig    fewer and other prompt pairs; some of the lines
    python bench/bench_ig.py --together      five steps run together in one batch, against one after another

For every line: R² = 1 − Σ(exact − score)² / Σ(exact − mean)² over all edges, Spearman's rank correlation of the scores,
as in bench_methods.py, and CPU seconds of the process (one thread, warm, median of three) over those of "eap". Exact
effects are measured first, with the same pairs and metric, in float32.

--together: CPU seconds of eap-ig with five steps for each number of pairs, in turns, one thread, the median of five:
one after another, and all five as one batch whatever its size, from which `step_tokens` of eapcore.execution.limits
follows. Scores are compared first. "rule" is how many of them run together by it, and what that costs. GPT-2 small's
size has random weights and prompts of 15 tokens that differ from their third on.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

try:
    import eapcore  # noqa: F401
except ImportError:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench_methods import GPT2_SMALL, TOYS, closeness, seconds
from pipeline.work import in_turns

from eapcore.attribution.attribute import attribute
from eapcore.attribution.plan import Plan
from eapcore.execution.memory import budget
from eapcore.graph.scores import EdgeScores
from eapcore.models.backward_rules import Rules
from eapcore.models.load import load
from eapcore.models.model import Model
from eapcore.patching.edges import patch_edges
from eapcore.tasks import TASKS, PromptPairs

REPEATS = 3
TOGETHER: dict[str, Callable[[Plan, int, int, int, int], int]] = {  # how many of some steps run as one batch
    "apart": lambda plan, batch, tokens, steps, budget: 1,
    "together": lambda plan, batch, tokens, steps, budget: steps,
    "rule": Plan.steps_together,
    "eap": Plan.steps_together,
}


def lines() -> list[tuple[str, dict[str, Any]]]:
    found: list[tuple[str, dict[str, Any]]] = [("eap", {}), ("clean-corrupt", {"method": "clean-corrupt"})]
    found.append(("one gradient at 0.75", {"method": "eap-ig", "points": [(0.75, 1.0)]}))
    for rule in ("left", "right", "midpoint", "gauss"):
        for steps in range(1, 6):
            found.append((f"eap-ig {rule} {steps}", {"method": "eap-ig", "points": rule, "steps": steps}))
    for rule in ("right", "midpoint", "gauss"):
        for steps in (1, 2, 5):
            options = {"method": "eap-ig-activations", "points": rule, "steps": steps}
            found.append((f"eap-ig-activations {rule} {steps}", options))
    found.append(("relp", {"method": "relp"}))
    found.append(("relp, gradient through attention", {"method": "relp", "rules": Rules("frozen", "identity")}))
    found += [(name, {"method": name}) for name in ("qk-fix", "grad-drop", "atp-star")]
    return found


def timed(*arguments: Any, **how: Any) -> tuple[EdgeScores, float]:
    run = partial(attribute, *arguments, **how)
    return run(), statistics.median(seconds(run) for _ in range(REPEATS))


def five_steps(way: str, model: Model, pairs: PromptPairs) -> Tensor:
    """Scores of one batch; way: out of TOGETHER."""
    Plan.steps_together = TOGETHER[way]
    how = {"method": "eap"} if way == "eap" else {"method": "eap-ig", "steps": 5}
    return attribute(model, pairs, batch_size=len(pairs), **how).scores


def together() -> None:
    """Five steps as one batch against one after another, and against one gradient, for each number of pairs."""
    print(f"\n{'':<28}{'tokens':>8}{'apart, ms':>11}{'together':>10}{'ratio':>8}{'rule':>6}{'ratio':>8}{'× eap':>8}")
    cases = [(name, load(name, dtype=torch.float32), (1, 2, 4, 8, 16, 32)) for name in TOYS]
    for name, model, sizes in [*cases, ("gpt2-small-random", GPT2_SMALL.model(), (1, 2, 4, 8))]:
        for size in sizes:
            pairs = TASKS[name].generate(size, 0) if name in TOYS else replace(GPT2_SMALL, B=size, P=2).pairs()
            tokens = int(pairs.positions.max()) + 1 - int(pairs.first_difference().min())
            plan = Plan(model.config, model.dtype, model.device)
            chosen = TOGETHER["rule"](plan, size, tokens, 5, budget(model.device))
            joint = five_steps("together", model, pairs)
            if (five_steps("apart", model, pairs) - joint).norm() > 1e-4 * joint.norm():
                raise SystemExit(f"{name}: steps together give other scores than one after another")
            times = in_turns([partial(five_steps, way, model, pairs) for way in TOGETHER], 5)
            apart, as_one, ruled, eap = map(statistics.median, times)
            print(f"{name + f', {size} pairs':<28}{size * tokens:>8}{apart * 1e3:>11.1f}{as_one * 1e3:>10.1f}"
                  f"{as_one / apart:>8.2f}{chosen:>6}{ruled / apart:>8.2f}{ruled / eap:>8.2f}")  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=32, help="prompt pairs of each task")
    parser.add_argument("--seed", type=int, default=0, help="of the prompt pairs")
    parser.add_argument("--only", default="", help="only the lines that begin so, and eap")
    parser.add_argument("--together", action="store_true", help="steps as one batch against one after another")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    print(f"python {platform.python_version()}, torch {torch.__version__}, {platform.machine()}, 1 thread, float32")
    if options.together:
        return together()
    for name in TOYS:
        model = load(name, dtype=torch.float32)
        pairs, metric = TASKS[name].generate(options.pairs, options.seed), TASKS[name].metric
        exact = patch_edges(model, pairs, metric)
        print(f"\n{name}: {model.graph.n_edges} edges, {len(pairs)} pairs, {metric}")
        print(f"{'':<34}{'R²':>8}{'Spearman':>10}{'× eap':>8}")
        floor = 0.0
        for title, how in lines():
            if title != "eap" and not title.startswith(options.only):
                continue
            scores, seconds = timed(model, pairs, metric, **how)
            floor = floor or seconds
            r2, spearman = closeness(scores, exact)
            print(f"{title:<34}{r2:>8.3f}{spearman:>10.3f}{seconds / floor:>8.2f}")


if __name__ == "__main__":
    main()
