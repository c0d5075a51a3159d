"""What the methods cost, and how far they agree with exact patching.

    python bench/bench_methods.py            speed, then the table of methods on both toy models
    python bench/bench_methods.py --speed    exact patching against one edge at a time, EAP-IG, ACDC's forwards
    python bench/bench_methods.py --patterns exact patterns (qk-fix) against EAP, 48 pairs of 20 tokens in batches of 16
    python bench/bench_methods.py --table    method × (time, agreement with exact patching, CPR, CMD) on both toys
    python bench/bench_methods.py --table --seed 1    the table for other prompt pairs
    python bench/bench_methods.py --quick    few pairs and edges, to see that everything runs

One edge at a time means: the clean and the corrupt run are made once, then for every edge one forward of the clean
prompts with that edge patched, all layers at all positions. "hooks" is how tools do it that can patch every edge (ACDC,
auto-circuit, EAP-IG: TransformerLens with use_split_qkv_input, use_attn_result and use_hook_mlp_in): every head's q, k
and v input is its own copy of the residual stream through its own LayerNorm and projection, every head's output is made
[B, T, H, D] and then added up, and all positions are unembedded; tuned, in that each is one batched product. "plain" is
the least that such a forward can do: one LayerNorm and one projection a layer, heads never apart, the patched head's
input computed again, only the answer position unembedded. "TransformerLens" is HookedTransformer itself with these
flags and one forward hook, where the package is installed (tests/interop/run.sh makes environments).

The GPT-2-small-sized model has random weights, its prompts the shape of IOI's: 15 tokens, as in "Then, Mary and John
went to the store. John gave a drink to". Once the second "John" is replaced, position 10, the counterfactual of EAP-IG
and of the MIB benchmark; once all names are, from position 2 on, that of ACDC and of EAP. What is shared before the
first difference runs once here and for every edge there, so that is the larger part of the ratio.

Effects are compared before anything is timed, on edges drawn evenly: in float64, where all ways must agree to 1e-10 as
the tests ask, on at least 50 of them; in float32, on all that are timed, where no way may be farther from float64 than
4 times "hooks": twice for another order of sums, as in the tests, and twice for oneDNN, whose sums are that much less
exact (bench/RESULTS.md). Times are CPU seconds of the process (user + system) on one thread, warm. One edge at a time
is timed on a sample, and scaled to all of them.

The table's R² is 1 − Σ(effect − score)² / Σ(effect − mean effect)² over all edges, which sees a wrong scale and offset
as a squared correlation does not. Scores without a sign are compared with |effect|, by Spearman's rank correlation too.
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

try:
    import eapcore  # noqa: F401
except ImportError:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from peers.one_at_a_time import Edge, Explicit, OneAtATime, TransformerLens
from pipeline.work import SMALL

from eapcore.attribution import METHODS
from eapcore.attribution.attribute import attribute
from eapcore.evaluation.agreement import agreement, overlap
from eapcore.evaluation.faithfulness import mib
from eapcore.evaluation.roc import roc
from eapcore.graph.circuit import Circuit
from eapcore.graph.scores import EdgeScores
from eapcore.models.load import load
from eapcore.models.model import Model
from eapcore.patching.circuits import metric_on
from eapcore.patching.edges import patch_edges
from eapcore.search.acdc import acdc
from eapcore.tasks import TASKS, PromptPairs

TOYS = ("toy-ioi", "toy-induction")
TOP = 50
TARGET = 10.0
STEPS, STEPS_TARGET, PATTERNS_TARGET = 5, 5.5, 2.0
EXACT, ROUNDING = 1e-10, 4.0  # the file's head derives them
GPT2_SMALL = replace(SMALL, B=8, T=15)
PROMPTS = {"the second subject replaced": 10, "all names replaced": 2}  # the first difference


def seconds(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def check_effects(
    name: str, models: tuple[Model, Model], pairs: PromptPairs, compared: list[Edge], ways: dict[str, OneAtATime],
    timed: dict[str, list[Edge]], few: int,
) -> None:  # fmt: skip
    """SystemExit where ways disagree: see the file's head; models in float32 and float64, `few` pairs in the latter."""
    model, wide = models
    graph = model.graph
    part = pairs.select(torch.arange(min(few, len(pairs))))
    exact = patch_edges(wide, part, "logit_diff", [graph.edge_name(*edge) for edge in compared]).scores
    for way in ("hooks", "plain"):
        one = Explicit(wide, part, way == "hooks")
        error = max(abs(one.effect(edge) - float(exact[edge])) for edge in compared)
        if not error <= EXACT:
            raise SystemExit(f"{name}: {way} and patch_edges differ by {error:.1e} in float64 on {len(compared)} edges")
    names = [graph.edge_name(*edge) for edge in timed["hooks"]]
    exact, ours = (patch_edges(m, pairs, "logit_diff", names).scores.double() for m in (wide, model))
    errors = {way: max(abs(one.effect(e) - float(exact[e])) for e in timed[way]) for way, one in ways.items()}
    errors["patch_edges"] = float((ours - exact).abs().max())
    for way, error in errors.items():
        if not error <= ROUNDING * errors["hooks"]:
            raise SystemExit(f"{name}: {way} is {error:.1e} from float64, hooks {errors['hooks']:.1e}")
    print(f"  {len(compared)} edges agree in float64, {len(names)} in float32: "
          + ", ".join(f"{way} {error:.1e}" for way, error in errors.items()))  # fmt: skip


def speed_of_patching(
    name: str, models: tuple[Model, Model], pairs: PromptPairs, edges: list[str] | None, samples: tuple[int, int], *,
    few: int = 64, published: bool = False,
) -> bool:  # fmt: skip
    """Print a line for each way; True where ours costs at most a tenth of the hook-based one. samples: how many edges
    are compared, and timed."""
    model = models[0]
    mask = model.graph.edge_mask() if edges is None else Circuit.from_edges(model.graph, edges).mask
    every = [(s, r) for s, r in mask.nonzero().tolist()]
    compared, some = (every[:: max(1, len(every) // sample)] for sample in samples)
    ways: dict[str, OneAtATime] = {way: Explicit(model, pairs, way == "hooks") for way in ("hooks", "plain")}
    if published:
        ways["TransformerLens"] = TransformerLens(model, pairs)
    timed = {way: some[:4] if way == "TransformerLens" else some for way in ways}
    first = round(float(pairs.first_difference().double().mean()), 1)
    tokens = round(float(pairs.lengths.double().mean()), 1)
    print(
        f"\n{name}: {len(every)} edges × {len(pairs)} pairs of {tokens} tokens, first difference at {first}, on average"
    )
    check_effects(name, models, pairs, compared, ways, timed, few)
    repeats = 1 if len(every) > 500 else 2  # the sample has warmed it up
    ours = min(seconds(lambda: patch_edges(model, pairs, "logit_diff", edges)) for _ in range(repeats))
    print(f"  {'patch_edges':<32}{ours:>10.2f} CPU s")
    ratios = {}
    for way, one in ways.items():
        each = seconds(partial(list, map(one.effect, timed[way]))) / len(timed[way])
        ratios[way] = each * len(every) / ours
        print(f"  {'one at a time, ' + way:<32}{each * len(every):>10.2f} CPU s{ratios[way]:>8.1f} ×   "
              f"({len(timed[way])} edges timed)")  # fmt: skip
    return verdict(
        f"{ratios['hooks']:.1f} × fewer CPU seconds than hooks, target {TARGET:g}", ratios["hooks"] >= TARGET
    )


def verdict(text: str, holds: bool) -> bool:
    print(f"  {'PASS' if holds else 'FAIL'}: {text}")
    return holds


def ratio_to_eap(model: Model, pairs: PromptPairs, turns: int, **how: str | int) -> tuple[float, str]:
    """A method's CPU time over EAP's, in turns after a warm-up, and both."""
    ways: dict[str, dict[str, str | int]] = {"eap": {}, "other": how}
    times: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(turns + 1):
        for way, options in ways.items():
            took = seconds(lambda options=options: attribute(model, pairs, "logit_diff", **options))
            if turn:
                times[way].append(took)
    eap, found = (statistics.median(times[way]) for way in ways)
    return found / eap, f"{found / eap:.2f} × EAP ({found:.3f} and {eap:.3f} CPU s)"


def speed_of_gradients(model: Model, pairs: PromptPairs, turns: int) -> bool:
    """True where five steps of integrated gradients cost at most 5.5 × EAP."""
    ratio, text = ratio_to_eap(model, pairs, turns, method="eap-ig", steps=STEPS)
    return verdict(f"EAP-IG with {STEPS} steps {text}, target {STEPS_TARGET:g}", ratio <= STEPS_TARGET)


def speed_of_patterns(turns: int, batches: int) -> bool:
    """True where q and k edges by their exact patterns cost at most twice EAP at GPT-2 small's size."""
    work = replace(SMALL, B=16, T=20)
    ratio, text = ratio_to_eap(work.model(), work.pairs(batches), turns, method="qk-fix")
    return verdict(f"qk-fix of {16 * batches} pairs {text}, target {PATTERNS_TARGET:g}", ratio <= PATTERNS_TARGET)


def speed(quick: bool) -> bool:
    passed, turns = True, 1 if quick else 5
    for name in TOYS:
        models, pairs = (load(name), load(name, dtype="float64")), TASKS[name].generate(8 if quick else 64, 0)
        passed &= speed_of_patching(name, models, pairs, None, (8, 8) if quick else (64, 40))
        passed &= speed_of_gradients(models[0], pairs, turns)
    if not quick:
        models = GPT2_SMALL.model(), GPT2_SMALL.model(dtype=torch.float64)
        published = importlib.util.find_spec("transformer_lens") is not None
        for what, first in PROMPTS.items():
            pairs = replace(GPT2_SMALL, P=first).pairs()
            top = [edge for edge, _ in attribute(models[0], pairs).top(1000)]
            title = f"GPT-2 small's shape, EAP's top 1,000, {what}"
            passed &= speed_of_patching(title, models, pairs, top, (50, 20), few=2, published=published)
            passed &= speed_of_gradients(models[0], pairs, 3)
    print(
        '\nACDC on KL, from all edges; forwards that one at a time needs ("single"), that are run, and their launches'
    )
    print(f"  {'model':<15}{'threshold':>10}{'edges':>7}{'kept':>7}{'single':>9}{'run':>7}{'launches':>10}{'CPU s':>8}")
    for name in TOYS:
        model, pairs = load(name), TASKS[name].generate(8 if quick else 32, 0)
        for threshold in (0.1, 0.01, 0.001):
            start = time.process_time()
            found = acdc(model, pairs, threshold=threshold)
            took, counts = time.process_time() - start, found.meta["forwards"]
            print(f"  {name:<15}{threshold:>10g}{model.graph.n_edges:>7}{found.n_edges:>7}{counts['decided']:>9}"
                  f"{counts['evaluated']:>7}{counts['launches']:>10}{took:>8.2f}")  # fmt: skip
    return passed


def signed(scores: EdgeScores) -> bool:
    return "sign" not in scores.meta["method"]


def closeness(scores: EdgeScores, exact: EdgeScores) -> tuple[float, float]:
    """(R², Spearman) of scores against exact effects over all edges, as the file's head defines them."""
    if not signed(scores):
        exact = replace(exact, scores=exact.scores.abs())
    found, effect = (x.scores[x.mask].double() for x in (scores, exact))
    lost = float((effect - found).pow(2).sum() / (effect - effect.mean()).pow(2).sum())
    return 1 - lost, agreement(scores, exact).spearman


def judge(name: str, n: int, seed: int = 0) -> bool:
    """Print the table of one toy model, and what the paper found on its models; True where all of that holds."""
    model, pairs, metric = load(name), TASKS[name].generate(n, seed), TASKS[name].metric
    found: dict[str, tuple[float, EdgeScores]] = {}

    def measure(label: str, make: Callable[[], EdgeScores]) -> None:
        make()
        start = time.process_time()
        scores = make()
        found[label] = (time.process_time() - start, scores)

    measure("exact patching", lambda: patch_edges(model, pairs, metric))
    for method in METHODS:
        measure(method, lambda method=method: attribute(model, pairs, metric, method=method))
    exact, n_true = found["exact patching"][1], max(1, model.graph.n_edges // 10)
    reference = exact.top_n(n_true)
    print(
        f"\n{name}: {len(pairs)} pairs, {metric}, {model.graph.n_edges} edges; AUC against exact patching's top "
        f"{n_true} by |effect|, all edges, trapezoid; CPR by −score, CMD by |score|, MIB's ten sizes"
    )
    print(f"  {'method':<20}{'CPU s':>8}{'Spearman':>10}{'R²':>8}{f'top {TOP}':>8}{'AUC':>8}{'CPR':>8}{'CMD':>8}")
    close = {}
    for label, (took, scores) in found.items():
        (r2, spearman), judged = closeness(scores, exact), mib(model, pairs, metric, scores)
        close[label] = r2
        values = (spearman, r2, overlap(scores, exact, TOP), roc(scores, reference).auc)
        row = "".join(f"{value:>{width}.3f}" for value, width in zip(values, (10, 8, 8, 8), strict=True))
        cpr = f"{judged.cpr:.3f}" if signed(scores) else "–"  # without a sign there is no usefulness
        print(f"  {label:<20}{took:>8.2f}{row}{cpr:>8}{judged.cmd:>8.3f}")
    better = acdc_after_eap(model, pairs, metric, found["eap"][1])
    best = max(r2 for label, r2 in close.items() if label == "relp" or label.startswith("eap-ig"))
    checks = {
        "EAP's first-order error is seen (R² < 0.99)": close["eap"] < 0.99,
        f"EAP followed by ACDC is at least as good as EAP alone, by KL and by {metric}": better,
        "relp or integrated gradients are closer to exact patching than EAP (R²)": close["eap"] < best,
    }
    for text, holds in checks.items():
        verdict(text, holds)
    return all(checks.values())


def acdc_after_eap(model: Model, pairs: PromptPairs, metric: str, scores: EdgeScores) -> bool:
    """Compare EAP's own top with what ACDC keeps of more of it, at the same number of edges: by the KL to the clean
    run, which ACDC holds down itself, and by the faithfulness in the task's metric, which it does not see."""
    print(
        "  EAP followed by ACDC on KL, against EAP's top of as many edges: KL, and faithfulness (1 is the whole model)"
    )
    better = []
    whole = Circuit(model.graph.edge_mask(), model.graph)
    for n in (model.graph.n_edges // 4, model.graph.n_edges // 2):
        for threshold in (0.003, 0.03):
            pruned = acdc(model, pairs, threshold=threshold, start=scores.top_n(n))
            circuits = [scores.top_n(pruned.n_edges), pruned]
            kl = [-value for value in metric_on(model, pairs, "kl", circuits)]
            clean, corrupt, *values = metric_on(model, pairs, metric, [whole, scores.top_n(0), *circuits])
            faithful = [(value - corrupt) / (clean - corrupt) for value in values]
            better.append(kl[1] <= kl[0] and abs(1 - faithful[1]) <= abs(1 - faithful[0]))
            print(
                f"    top {n:>4}, threshold {threshold:<6g}{pruned.n_edges:>5} edges: KL {kl[0]:>8.4f} → {kl[1]:<8.4f} "
                f"faithfulness {faithful[0]:.3f} → {faithful[1]:.3f}"
            )
    return all(better)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--patterns", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seed", type=int, default=0, help="of the table's prompt pairs")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, Python {platform.python_version()}, one thread of {platform.machine()}")
    passed = True
    alone = args.speed or args.patterns or args.table
    if args.speed or not alone:
        passed = speed(args.quick)
    if args.patterns or (not alone and not args.quick):
        passed &= speed_of_patterns(3, 3)
    if args.table or not alone:
        for name in TOYS:
            passed &= judge(name, 16 if args.quick else 64, args.seed)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
