"""How close each rule of integrated gradients comes to exact patching of every edge, on both toy models.

    python bench/bench_ig.py                 rules × steps, one gradient at 0.75, relp and the exact patterns
    python bench/bench_ig.py --pairs 16 --seed 1 --only eap-ig    fewer and other prompt pairs; some of the lines
    python bench/bench_ig.py --together      five steps run together in one batch, against one after another

For every line: R² = 1 − Σ(exact − score)² / Σ(exact − mean)² over all edges, Spearman's rank correlation of the scores,
as in bench_methods.py, and CPU seconds of the process (one thread, warm, median of three) over those of "eap". Exact
effects are measured first, with the same pairs and metric, in float32.

--together: CPU seconds of eap-ig with five steps for each number of pairs, in turns, one thread, the median of five:
one after another, and all five as one batch whatever its size, from which planner._STEP_TOKENS follows. Scores are
compared first. "rule" is how many of them the planner runs together, and what that costs. GPT-2 small's size has random
weights and prompts of 15 tokens that differ from their third on.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

try:
    import eapcore  # noqa: F401
except ImportError:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench_methods import TOYS, closeness, random_gpt2, random_pairs

import eapcore.attribution.plan as planner
from eapcore.attribution.attribute import attribute
from eapcore.graph.scores import EdgeScores
from eapcore.models.backward_rules import Rules
from eapcore.models.load import load
from eapcore.patching.edges import patch_edges
from eapcore.tasks import TASKS

REPEATS = 3


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
    scores = attribute(*arguments, **how)
    seconds = []
    for _ in range(REPEATS):
        start = time.process_time()
        attribute(*arguments, **how)
        seconds.append(time.process_time() - start)
    return scores, statistics.median(seconds)


def together() -> None:
    """Five steps as one batch against one after another, and against one gradient, for each number of pairs."""
    rule = planner.steps_together
    ways: dict[str, Any] = {
        "apart": lambda *_: 1,
        "together": lambda config, batch, tokens, steps, *_: steps,
        "rule": rule,
        "eap": rule,
    }
    print(f"\n{'':<28}{'tokens':>8}{'apart, ms':>11}{'together':>10}{'ratio':>8}{'rule':>6}{'ratio':>8}{'× eap':>8}")
    gpt2 = random_gpt2()
    cases = [(name, load(name, dtype=torch.float32), (1, 2, 4, 8, 16, 32)) for name in TOYS]
    for name, model, sizes in [*cases, (gpt2.name, gpt2, (1, 2, 4, 8))]:
        for size in sizes:
            toy = name in TOYS
            pairs = TASKS[name].generate(size, 0) if toy else random_pairs(size, 15, 2, model.config.d_vocab)
            tokens = int(pairs.positions.max()) + 1 - int(pairs.first_difference().min())
            passes = planner.Passes((None,) * 5)
            budget = planner.budget(model.device)
            chosen = rule(model.config, size, tokens, 5, model.dtype, model.device, budget, passes)
            scores: dict[str, Tensor] = {}
            seconds: dict[str, list[float]] = {way: [] for way in ways}
            for turn in range(6):
                for way, times in seconds.items():
                    planner.steps_together = ways[way]
                    how = {"method": "eap"} if way == "eap" else {"method": "eap-ig", "steps": 5}
                    start = time.process_time()
                    scores[way] = attribute(model, pairs, batch_size=size, **how).scores
                    if turn:  # the first is the warm-up
                        times.append(time.process_time() - start)
                if not turn and (scores["apart"] - scores["together"]).norm() > 1e-4 * scores["apart"].norm():
                    raise SystemExit(f"{name}: steps together give other scores than one after another")
            planner.steps_together = rule
            apart, joint, ruled, eap = (statistics.median(times) for times in seconds.values())
            print(f"{name + f', {size} pairs':<28}{size * tokens:>8}{apart * 1e3:>11.1f}{joint * 1e3:>10.1f}"
                  f"{joint / apart:>8.2f}{chosen:>6}{ruled / apart:>8.2f}{ruled / eap:>8.2f}")  # fmt: skip


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
