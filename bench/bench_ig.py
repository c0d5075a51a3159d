"""How close each rule of integrated gradients comes to exact patching of every edge, on both toy models.

    python bench/bench_ig.py                 rules × steps, one gradient at 0.75, relp and the exact patterns
    python bench/bench_ig.py --pairs 16 --seed 1 --only eap-ig    fewer and other prompt pairs; some of the lines

For every line: R² = 1 − Σ(exact − score)² / Σ(exact − mean)² over all edges, Spearman's rank correlation of the scores,
and CPU seconds of the process (one thread, warm, median of three) over those of "eap". Exact effects are measured
first, with the same pairs and metric, in float32; methods whose scores have no sign are compared with their size.
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

from eapcore.attribution import attribute
from eapcore.circuit import EdgeScores
from eapcore.model import load
from eapcore.patch import patch_edges
from eapcore.rules import Rules
from eapcore.tasks import TASKS

TOYS = ("toy-ioi", "toy-induction")
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


def r_squared(scores: Tensor, exact: Tensor) -> float:
    return float(1 - (exact - scores).pow(2).sum() / (exact - exact.mean()).pow(2).sum())


def spearman(a: Tensor, b: Tensor) -> float:
    ranks = torch.stack([a.argsort().argsort(), b.argsort().argsort()]).double()
    return float(torch.corrcoef(ranks)[0, 1])


def timed(*arguments: Any, **how: Any) -> tuple[EdgeScores, float]:
    scores = attribute(*arguments, **how)
    seconds = []
    for _ in range(REPEATS):
        start = time.process_time()
        attribute(*arguments, **how)
        seconds.append(time.process_time() - start)
    return scores, statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=32, help="prompt pairs of each task")
    parser.add_argument("--seed", type=int, default=0, help="of the prompt pairs")
    parser.add_argument("--only", default="", help="only the lines that begin so, and eap")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"python {platform.python_version()}, torch {torch.__version__}, {platform.machine()}, 1 thread, float32")
    for name in TOYS:
        model = load(name, dtype=torch.float32)
        pairs, metric = TASKS[name].generate(options.pairs, options.seed), TASKS[name].metric
        exact = patch_edges(model, pairs, metric).scores[model.graph.edge_mask()].double()
        print(f"\n{name}: {model.graph.n_edges} edges, {len(pairs)} pairs, {metric}")
        print(f"{'':<34}{'R²':>8}{'Spearman':>10}{'× eap':>8}")
        floor = 0.0
        for title, how in lines():
            if title != "eap" and not title.startswith(options.only):
                continue
            scores, seconds = timed(model, pairs, metric, **how)
            floor = floor or seconds
            found = scores.scores[model.graph.edge_mask()].double()
            target = exact.abs() if "sign" in scores.meta["method"] else exact
            print(f"{title:<34}{r_squared(found, target):>8.3f}{spearman(found, target):>10.3f}{seconds / floor:>8.2f}")


if __name__ == "__main__":
    main()
