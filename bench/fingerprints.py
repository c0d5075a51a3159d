"""Whether this tree computes what an older commit computed, bit by bit, on this machine's CPU.

    python bench/fingerprints.py                     against 2b62621, which is built in a temporary folder
    python bench/fingerprints.py --against COMMIT    against another commit
    python bench/fingerprints.py --built DIR         against what `pip install --target DIR` has put there
    python bench/fingerprints.py --quick             all pairs of options instead of all triples
    python bench/fingerprints.py --only "eap-ig"     only cases with this text in "group: name"

Two processes run the same cases, one with the older package, one with the package that the interpreter imports. Every
result is saved by its own `save`; what counts is the file's tensors, the numbers in its JSON, and the rest of the JSON
as text, without versions. Where a case is refused, the message counts.

First-order attribution: combinations of method, model, dtype, storage, level, reduce, ablation, impl, batch size and
metric, drawn until every pair of options and every triple that is accepted is among them. All bits must be equal. So
must what exact methods say and choose; their numbers may differ by 1e-10 in float64 and 1e-4 in float32, relative to
the largest number beside them (in a tensor, or in a list or an object of a file). If not, the exit status is 1.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache, partial
from importlib.machinery import PathFinder
from itertools import combinations, product
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

if any((Path(p) / "eapcore").is_dir() for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p):
    sys.meta_path.insert(0, PathFinder)  # the finder of an editable install would go before PYTHONPATH
import eapcore

ROOT = Path(__file__).resolve().parents[1]
Parts = dict[str, Any]  # tensors, and texts
Case = tuple[str, str, Callable[[], Any]]  # group, name, what makes the result

# The modules that hold or have held what `eapcore` itself does not offer.
HOMES = """attribution.methods methods models.backward_rules rules tasks patching.edges patching.nodes patching.paths
    patching.interpolate patch search.acdc acdc evaluation.faithfulness evaluate""".split()
EXACT = ("run_circuit", "patch_edges", "patch_nodes", "path_patch", "interpolate", "faithfulness", "acdc")
LIMITS = {"float64": 1e-10, "float32": 1e-4}

# Random models: the configuration, how many layers and what they are called, and their tensors with their shapes.
SIZES = {"H": 3, "D": 24, "K": 8, "M": 40, "V": 29, "T": 16, "Q": 3 * 24}
GPT2 = {"n_layer": 2, "n_head": 3, "n_embd": 24, "n_inner": 40, "vocab_size": 29, "n_positions": 16}
GPT2 |= {"activation_function": "gelu", "tie_word_embeddings": False}
LENS = {"n_heads": 3, "d_model": 24, "d_head": 8, "d_mlp": 40, "d_vocab": 29, "n_ctx": 16}
ATTENTION = {**LENS, "n_layers": 3, "attn_only": True}
NO_NORM = {**LENS, "n_layers": 1, "act_fn": "relu", "normalization_type": None}
GPT2_LAYER = """attn.c_attn.weight DQ attn.c_attn.bias Q attn.c_proj.weight DD attn.c_proj.bias D ln_1.weight D
    ln_1.bias D mlp.c_fc.weight DM mlp.c_fc.bias M mlp.c_proj.weight MD mlp.c_proj.bias D ln_2.weight D ln_2.bias D"""
LENS_ENDS = "embed.W_E VD pos_embed.W_pos TD unembed.W_U DV unembed.b_U V "
LENS_LAYER = "attn.W_Q HDK attn.W_K HDK attn.W_V HDK attn.b_Q HK attn.b_K HK attn.b_V HK attn.W_O HKD attn.b_O D "
RANDOM = {
    "gpt2-like": (GPT2, 2, "h", GPT2_LAYER, "wte.weight VD wpe.weight TD lm_head.weight VD ln_f.weight D ln_f.bias D"),
    "attention-only": (ATTENTION, 3, "blocks", LENS_LAYER + "ln1.w D ln1.b D", LENS_ENDS + "ln_final.w D ln_final.b D"),
    "no-norm": (NO_NORM, 1, "blocks", LENS_LAYER + "mlp.W_in DM mlp.b_in M mlp.W_out MD mlp.b_out D", LENS_ENDS),
}


def own_metric(logits: Tensor, batch: Any) -> Tensor:
    """A caller's own metric, which reads all logits of two runs."""
    return (logits * batch.corrupt_logits.softmax(-1)).sum(-1)


VARIANTS: dict[str, dict[str, Any]] = {
    **{method: {} for method in ("eap", "eap-ig", "clean-corrupt", "eap-ig-activations", "relp")},
    **{method: {} for method in ("hybrid", "qk-fix", "grad-drop", "atp-star")},
    **{method: {} for method in ("gim", "hisp", "hisp-raw", "flow-routes", "flow-sum")},
    "eap corrupt": {"gradient_at": "corrupt"},
    **{f"eap-ig {points}": {"points": points, "steps": 2} for points in ("left", "right", "midpoint")},
    "eap-ig given": {"points": [(0.75, 0.5), (1.0, 0.25), (0.0, 0.25)]},
    "eap-ig-activations gauss": {"points": "gauss", "steps": 2},
    "relp rules": {"rules": {"norm": "frozen", "activation": "identity"}},
}
METRICS = {name: name for name in ("logit_diff", "prob_diff", "nll", "logit_margin")} | {"own": own_metric}
ABLATIONS = ("corrupt", "zero", "mean", "mean-positional")
FACTORS: dict[str, tuple[Any, ...]] = {
    "method": tuple(VARIANTS),
    "model": ("toy-ioi", "toy-induction", *RANDOM),
    "dtype": ("float64", "float32", "bfloat16", "float16"),
    "storage": ("auto", "dense", "factored"),
    "level": ("edge", "node", "neuron"),
    "reduce": ("all", "pair", "position"),
    "ablation": (*ABLATIONS, "mean of others"),
    "impl": ("auto", "reference"),
    "batch_size": ("auto", 3),
    "metric": tuple(METRICS),
}
REFUSED: list[dict[str, Any]] = [
    *({name: "no"} for name in ("method", "level", "reduce", "storage", "impl", "ablation", "metric", "gradient_at")),
    *({name: value} for name, value in (("steps", 3), ("batch_size", 0), ("graphs", True), ("metric", "kl"))),
    *({"method": "eap-ig", **wrong} for wrong in ({"steps": 0}, {"points": "no"}, {"points": [(0.5, 0.5)]})),
    *({"method": "relp", "rules": "no"}, {"ablation": "mean", "reference": "no"}),
]


def found(name: str) -> Any:
    """What has this name, in whichever module it lies."""
    if name in eapcore.__all__:
        return getattr(eapcore, name)
    for home in HOMES:
        with suppress(ModuleNotFoundError, AttributeError):
            return getattr(importlib.import_module(f"eapcore.{home}"), name)
    raise ImportError(f"{name} is in none of {', '.join(HOMES)}: HOMES must say where it is")


@cache
def model_of(name: str, dtype: str) -> Any:
    if name not in RANDOM:
        return eapcore.load(name, dtype=dtype)
    config, n_layers, prefix, layer, ends = RANDOM[name]
    generator, state = torch.Generator().manual_seed(0), {}
    for at, tensors in [("", ends), *((f"{prefix}.{i}.", layer) for i in range(n_layers))]:
        words = tensors.split()
        for part, shape in zip(words[::2], words[1::2], strict=True):
            state[at + part] = 0.3 * torch.randn([SIZES[letter] for letter in shape], generator=generator)
    return eapcore.load(state, config=config, dtype=dtype)


@cache
def pairs_of(name: str, n: int = 8, seed: int = 0) -> Any:
    """Prompt pairs; for a random model of several lengths, first differences, and numbers of answers."""
    if name not in RANDOM:
        return found("find_pairs")(name, n=n, seed=seed)
    rng, rows = random.Random(seed), []
    for i, (length, first) in enumerate([(16, 4), (3, 0), (9, 8), (5, 2), (12, 0), (1, 0), (7, 6), (12, 5)][:n]):
        clean, other = ([rng.randrange(SIZES["V"]) for _ in range(length)] for _ in range(2))
        corrupt = [*clean[:first], (clean[first] + 1) % SIZES["V"], *other[first + 1 :]]
        tokens = rng.sample(range(SIZES["V"]), 4)
        rows.append((clean, corrupt, tokens[: 1 + i % 2], tokens[2 : 3 + i // 2 % 2], length - 1 - (i == 4)))
    *lists, positions = zip(*rows, strict=True)
    return eapcore.PromptPairs.from_lists(*lists, positions=positions, name="random")


def accepted(case: dict[str, Any]) -> bool:
    """Whether the library scores this, as far as is known here: a case that it refuses is only one less."""
    method, level = case["method"], case["level"]
    apart, dropped = method in ("qk-fix", "atp-star"), method in ("grad-drop", "atp-star")
    prompts = method in ("clean-corrupt", "eap corrupt")
    return not (
        (case["storage"] == "dense" and level != "edge" and not (apart and level == "node"))
        or ((apart or method == "hybrid") and level == "neuron")
        or (case["reduce"] == "position" and dropped)
        or (prompts and case["ablation"] != "corrupt")
        or (dropped and case["model"] == "no-norm")  # its only layer
    )


def covering(strength: int) -> list[dict[str, Any]]:
    """Combinations of options in which are all pairs of them, and up to `strength` of them all that are accepted."""
    rng, cases = random.Random(0), []
    for size in range(2, strength + 1):
        done = {some for case in cases if accepted(case) for some in combinations(case.items(), size)}
        wanted = [
            tuple(zip(names, values, strict=True))
            for names in combinations(FACTORS, size)
            for values in product(*(FACTORS[name] for name in names))
        ]
        rng.shuffle(wanted)
        for some in wanted:
            if some in done:
                continue
            drawn = [{name: rng.choice(v) for name, v in FACTORS.items()} | dict(some) for _ in range(200)]
            good = [case for case in drawn if accepted(case)][:8]
            if good:
                cases.append(max(good, key=lambda case: len(set(combinations(case.items(), size)) - done)))
                done.update(combinations(cases[-1].items(), size))
            elif size == 2:
                cases.append(drawn[0])  # refused
    return cases


def first_order(model: str, method: str, dtype: str, metric: str, ablation: str, **options: Any) -> Any:
    options |= VARIANTS[method] | {"ablation": ablation.removesuffix(" of others")}
    if ablation == "mean of others":
        options["reference"] = pairs_of(model, seed=1)
    if "rules" in options:
        options["rules"] = found("Rules")(**options["rules"])
    chosen = {"method": method.split()[0], **options}
    return eapcore.attribute(model_of(model, dtype), pairs_of(model), METRICS[metric], **chosen)


def exact(function: str, name: str, dtype: str, ablation: str, metric: str) -> Any:
    model, pairs = model_of(name, dtype), pairs_of(name, 6)
    scores, last = eapcore.attribute(model, pairs), f"a{model.config.n_layers - 1}.h1"
    if function == "run_circuit":
        circuits = [scores.top_n(n) for n in (0, 9, scores.graph.n_edges // 2, scores.graph.n_edges)]
        return eapcore.run_circuit(model, pairs, circuits, ablation=ablation)
    arguments: tuple[Any, ...] = {
        "path_patch": (["embed"], ["embed->a0.h0<q>->logits", f"embed->{last}<v>->logits"]),
        "interpolate": (f"embed->{last}<v>",),
        "faithfulness": (scores,),
    }.get(function, ())
    options: dict[str, Any] = {"acdc": {"threshold": 0.01}, "patch_nodes": {"per_position": True}}.get(function, {})
    size = 4 if dtype == "float32" else "auto"
    return found(function)(model, pairs, metric, *arguments, ablation=ablation, batch_size=size, **options)


def others() -> Iterator[Case]:
    """First-order cases that are no combination of FACTORS."""
    for name, dtype in product(FACTORS["model"], FACTORS["dtype"]):
        model, pairs = model_of(name, dtype), pairs_of(name)
        score, tokens = partial(eapcore.attribute, model, pairs), (pairs.clean, pairs.corrupt)
        yield "others", f"senders {name} {dtype}", partial(eapcore.run_with_senders, model, pairs.clean)
        yield "others", f"kl {name} {dtype}", partial(score, "kl", method="eap-ig")
        yield "others", f"tokens {name} {dtype}", partial(eapcore.attribute, model, tokens, own_metric)
        yield "others", f"greedy {name} {dtype}", lambda score=score: score().greedy(9)
        yield "others", f"top_n {name} {dtype}", lambda score=score: score().top_n(12, signed=True).prune()
    for method, storage in product(("eap", "eap-ig", "relp"), ("dense", "factored")):  # batches with large products
        score = partial(eapcore.attribute, model_of("toy-ioi", "float32"), pairs_of("toy-ioi", 64))
        yield "others", f"64 pairs {method} {storage}", partial(score, method=method, storage=storage)
    for options in REFUSED:
        score = partial(eapcore.attribute, model_of("gpt2-like", "float64"), pairs_of("gpt2-like"))
        yield "others", f"refused {options}", partial(score, **options)


def all_cases(quick: bool) -> Iterator[Case]:
    if missing := set(found("METHODS")) - set(VARIANTS):
        raise ValueError(f"VARIANTS must have every method, but {', '.join(sorted(missing))} are missing")
    for case in covering(2 if quick else 3):
        yield case["method"].split()[0], " ".join(map(str, case.values())), partial(first_order, **case)
    yield from others()
    for function, (i, (name, dtype)) in product(EXACT, enumerate(product(FACTORS["model"], LIMITS))):
        for k in range((i + i // 2) % 2 if quick else 3):
            case = (name, dtype, ABLATIONS[(i + i // 4 + k) % 4], ("logit_diff", "nll", "kl")[(i + k) % 3])
            yield function, " ".join(case), partial(exact, function, *case)


def split(value: Any, path: str, numbers: dict[str, list[float]]) -> Any:
    """Sort the numbers of a JSON value by the list or object that they stand in; return the rest."""
    if isinstance(value, dict):
        inner = {key: f"{path}.{key}" if isinstance(x, dict | list) else path for key, x in value.items()}
        return {
            key: split(value[key], inner[key], numbers) for key in sorted(inner) if key not in ("versions", "sha256")
        }
    if isinstance(value, list):
        return [split(item, path, numbers) for item in value]
    if isinstance(value, float):
        numbers.setdefault(path, []).append(value)
        return "a number"
    return value


def parts(result: Any, path: Path) -> Parts:
    """What counts of a result."""
    if isinstance(result, Tensor | tuple):
        return {f"tensor {i}": x.clone() for i, x in enumerate(result if isinstance(result, tuple) else [result])}
    result.save(path)
    made: Parts = {}
    if isinstance(getattr(result, "scores", None), Tensor):
        with safe_open(path, "pt") as file:
            made = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            content = json.loads(file.metadata()["eapcore"])
    else:
        content = json.loads(path.read_text(encoding="utf-8"))
    numbers: dict[str, list[float]] = {}
    made["text"] = json.dumps(split(content, "numbers", numbers))
    return made | {name: torch.tensor(row, dtype=torch.float64) for name, row in numbers.items()}


def child(out: Path, only: str, quick: bool) -> None:
    """Run the cases with the package that is imported here; write where it lies, and their parts by group and name."""
    torch.set_num_threads(1)
    groups: dict[str, dict[str, Parts]] = {}
    for group, name, make in all_cases(quick):
        if only in f"{group}: {name}":
            try:
                made = parts(make(), out.with_suffix(".case"))
            except Exception as error:
                made = {"error": f"{type(error).__name__}: {error}"}
            groups.setdefault(group, {})[name] = made
    torch.save((str(Path(eapcore.__file__).resolve().parent), groups), out)


def difference(before: Tensor | str | None, after: Tensor | str | None) -> float | None:
    """None for the same bits, else the largest difference of numbers relative to the largest of them, or infinity."""
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return None if isinstance(before, str) and before == after else math.inf
    if before.dtype != after.dtype or before.shape != after.shape:
        return math.inf
    if torch.equal(*(x.contiguous().flatten().view(torch.uint8) for x in (before, after))):
        return None
    if not before.is_floating_point():
        return math.inf
    largest = float((before.double() - after.double()).abs().max() / before.double().abs().max())
    return largest if math.isfinite(largest) else math.inf


def excerpts(before: str, after: str) -> str:
    """Two texts where they begin to differ."""
    at = max(0, len(os.path.commonprefix([before, after])) - 40)  # noqa: RUF071
    return "".join(f"\n      {name} {x[at : at + 120]!r}" for name, x in (("before", before), ("after ", after)))


def compare(group: str, before: dict[str, Parts], after: dict[str, Parts]) -> int:
    """Print a line for a group and some of what is wrong; return how many cases are."""
    refused, equal, largest, wrong = 0, 0, 0.0, []
    names = sorted(before.keys() | after.keys())
    for name in names:
        old, new = before.get(name, {}), after.get(name, {})
        apart = {part: difference(old.get(part), new.get(part)) for part in sorted(old.keys() | new.keys())}
        apart = {part: by for part, by in apart.items() if by is not None}
        failed = any(not each.get("error", "ValueError: ").startswith("ValueError: ") for each in (old, new))
        refused, equal = refused + ("error" in new and not failed), equal + (not apart)
        worst = max(apart.values(), default=0.0)
        largest = max(largest, worst)
        limit = next(LIMITS[word] for word in name.split() if word in LIMITS) if group in EXACT else -1.0
        if failed or (apart and worst > limit):
            told = "error" if "error" in old | new else "text"
            shown = excerpts(old.get(told, ""), new.get(told, "")) if failed or told in apart else ""
            wrong.append(f"    {name}: {', '.join(f'{part} {by:.1e}' for part, by in apart.items())}{shown}")
    kind = "exact" if group in EXACT else "first order"
    rest = "" if equal == len(names) else f", largest relative difference {largest:.1e}, {len(wrong)} wrong"
    print(f"{kind:11}  {group:18}  {len(names):3} cases ({refused:2} refused), {equal:3} equal{rest}")
    print(*wrong[:3], sep="\n", end="\n" if wrong else "")
    return len(wrong)


def build(commit: str, folder: Path) -> Path:
    """Install an older commit into a folder of its own."""
    install = [sys.executable, "-m", "pip", "install", "-qq", "--no-deps", "--target", str(folder / "site")]
    subprocess.run([*install, f"git+{ROOT.as_uri()}@{commit}"], check=True)
    return folder / "site"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", default="2b62621", metavar="COMMIT")
    parser.add_argument("--built", type=Path, metavar="DIR", help="where the older commit is installed already")
    parser.add_argument("--only", default="", metavar="SUBSTRING")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--child", type=Path, metavar="FILE", help="run the cases here, and write this file")
    args = parser.parse_args()
    if args.child:
        child(args.child, args.only, args.quick)
        return 0
    with tempfile.TemporaryDirectory() as name:
        older = (args.built or build(args.against, Path(name))).resolve()
        outs = [Path(name) / "before", Path(name) / "after"]
        path = os.pathsep.join(filter(None, (str(older), os.environ.get("PYTHONPATH"))))
        options = ["--only", args.only, *(["--quick"] if args.quick else [])]
        running = [
            subprocess.Popen([sys.executable, __file__, "--child", str(out), *options], env=os.environ | more)
            for out, more in zip(outs, ({"PYTHONPATH": path}, {}), strict=True)
        ]
        if [process.wait() for process in running] != [0, 0]:
            raise SystemExit("a run of the cases failed")
        (where, before), (here, after) = map(torch.load, outs)
    if Path(where).parent != older:
        raise SystemExit(f"the older package should come from {older}, but {where} was imported")
    print(f"before: {where}\nafter:  {here}")
    groups = sorted(before.keys() | after.keys(), key=lambda group: (group in EXACT, group))
    wrong = {group: compare(group, before.get(group, {}), after.get(group, {})) for group in groups}
    n_exact = sum(n for group, n in wrong.items() if group in EXACT)
    n_cases = sum(len(before.get(group, {}).keys() | after.get(group, {}).keys()) for group in groups)
    print(f"{n_cases} cases: {sum(wrong.values()) - n_exact} wrong of first order, {n_exact} wrong of exact methods")
    return int(not n_cases or any(wrong.values()))


if __name__ == "__main__":
    sys.exit(main())
