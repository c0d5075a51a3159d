"""What the methods cost, and how far they agree with exact patching.

    python bench/bench_methods.py            speed, then the table of methods on both toy models
    python bench/bench_methods.py --speed    exact patching against one edge at a time; ACDC's forwards
    python bench/bench_methods.py --table    method × (time, agreement with exact patching, CPR, CMD) on both toys
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

Effects are compared before anything is timed. Times are CPU seconds of the process (user + system) on one thread, warm.
One edge at a time is timed on a sample of the edges, drawn evenly, and scaled to all of them.
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
try:
    import eapcore  # noqa: F401
except ImportError:
    sys.path.insert(0, str(ROOT))

from eapcore.acdc import acdc
from eapcore.attribution import METHODS, attribute
from eapcore.circuit import EdgeScores
from eapcore.config import LayerWeights, ModelConfig, Weights
from eapcore.evaluate import agreement, mib, overlap, roc
from eapcore.interop.transformer_lens import receiver_hook
from eapcore.model import APPROXIMATE, Model, load, run_with_senders
from eapcore.patch import metric_on, patch_edges
from eapcore.tasks import TASKS, PromptPairs

TOYS = ("toy-ioi", "toy-induction")
TOP = 50
TARGET = 10.0
TOKENS = 15
PROMPTS = {"the second subject replaced": 10, "all names replaced": 2}  # the first difference


def seconds(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def random_gpt2(seed: int = 0) -> Model:
    """GPT-2 small's shape with random weights, head tied."""
    layers, heads, width, vocabulary, context = 12, 12, 768, 50257, 1024
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.02

    def ln() -> tuple[Tensor, Tensor]:
        return torch.ones(width), torch.zeros(width)

    def layer() -> LayerWeights:
        qkv = (draw(width, 3 * heads, width // heads).permute(1, 0, 2),)
        attention = (qkv, draw(3 * heads, width // heads), draw(heads, width // heads, width), draw(width), ln())
        mlp = (draw(width, 4 * width), draw(4 * width), draw(4 * width, width), draw(width))
        return LayerWeights(*attention, ln(), *mlp)

    embedding = draw(vocabulary, width)
    stack = tuple(layer() for _ in range(layers))
    weights = Weights(embedding, draw(context, width), stack, embedding.T, None, ln())
    sizes = (layers, heads, width, width // heads, 4 * width, vocabulary, context, "gelu_new", (width // heads) ** 0.5)
    return Model(ModelConfig(*sizes), weights, "gpt2-small-random")


def random_pairs(n: int, tokens: int, first: int, vocabulary: int, seed: int = 0) -> PromptPairs:
    """Pairs that agree before the position `first`."""
    generator = torch.Generator().manual_seed(seed)
    clean, corrupt = torch.randint(0, vocabulary, (2, n, tokens), generator=generator)
    corrupt[:, :first] = clean[:, :first]
    corrupt[:, first] = (clean[:, first] + 1) % vocabulary
    answers = [[5]] * n, [[7]] * n
    return PromptPairs.from_lists(clean.tolist(), corrupt.tolist(), *answers, name="random", seed=seed)


class OneAtATime:
    """Patch one edge in one forward; see the file's head."""

    def __init__(self, model: Model, pairs: PromptPairs, split: bool) -> None:
        self.model, self.pairs, self.split = model, pairs, split
        clean, corrupt = (run_with_senders(model, tokens)[1] for tokens in (pairs.clean, pairs.corrupt))
        self.delta = corrupt - clean
        self.qkv = [torch.cat(layer.w_qkv).contiguous() for layer in model.weights.layers]  # [3H, D, K]
        self.matrices = [w.permute(1, 0, 2).flatten(1) for w in self.qkv]  # [D, 3HK]
        self.clean = self.value(self.logits(None))

    def value(self, logits: Tensor) -> float:
        answers, wrong = (logits.gather(1, ids) for ids in (self.pairs.answers, self.pairs.wrong))
        return float((answers.double().mean(1) - wrong.double().mean(1)).mean())

    def effect(self, edge: tuple[int, int]) -> float:
        return self.value(self.logits(edge)) - self.clean

    def norm(self, x: Tensor, ln: tuple[Tensor, Tensor] | None) -> Tensor:
        return x if ln is None else F.layer_norm(x, x.shape[-1:], *ln, self.model.config.eps)

    @torch.no_grad()
    def logits(self, edge: tuple[int, int] | None) -> Tensor:
        model, config, graph = self.model, self.model.config, self.model.graph
        s, r = edge or (0, -1)
        tokens, heads = self.pairs.clean, config.n_heads
        x = model.weights.w_e[tokens] + model.weights.w_pos[: tokens.shape[1]]
        shape = x.shape[:2]
        for index, layer in enumerate(model.weights.layers):
            w, place = self.qkv[index], r - graph.qkv(index).start
            if self.split:
                copies = x.expand(3 * heads, *x.shape).clone()
                if 0 <= place < 3 * heads:
                    copies[place] += self.delta[s]
                qkv = torch.bmm(self.norm(copies, layer.ln1).flatten(1, 2), w)  # [3H, B·T, K]
                qkv = qkv.unflatten(1, shape) + layer.b_qkv[:, None, None]
            else:
                qkv = (self.norm(x, layer.ln1) @ self.matrices[index]).unflatten(-1, (3 * heads, -1)) + layer.b_qkv
                if 0 <= place < 3 * heads:
                    qkv[:, :, place] = self.norm(x + self.delta[s], layer.ln1) @ w[place] + layer.b_qkv[place]
                qkv = qkv.permute(2, 0, 1, 3)
            q, k, v = (part.transpose(0, 1) for part in qkv.chunk(3))  # [B, H, T, K]
            z = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=config.score_scale(index))
            if self.split:
                result = torch.bmm(z.transpose(0, 1).flatten(1, 2), layer.w_o)  # [H, B·T, D]
                x = x + result.unflatten(1, shape).permute(1, 2, 0, 3).sum(2) + layer.b_o
            else:
                x = x + z.transpose(1, 2).flatten(2) @ layer.w_o.flatten(0, 1) + layer.b_o
            if layer.w_in is not None:
                read = x + self.delta[s] if r == graph.mlp_receiver(index) else x
                hidden = F.gelu(self.norm(read, layer.ln2) @ layer.w_in + layer.b_in, approximate=self.approximate)
                x = x + hidden @ layer.w_out + layer.b_out
        if r == graph.logits:
            x = x + self.delta[s]
        rows = torch.arange(len(x)), self.pairs.positions
        last = x if self.split else x[rows]
        logits = self.norm(last, model.weights.ln_final) @ model.weights.w_u
        logits = logits[rows] if self.split else logits
        return logits if model.weights.b_u is None else logits + model.weights.b_u

    @property
    def approximate(self) -> str:
        return APPROXIMATE[self.model.config.act_fn or "gelu"]


class Published:
    """Patch one edge in one forward of a HookedTransformer with the same weights."""

    def __init__(self, model: Model, pairs: PromptPairs) -> None:
        from transformer_lens import HookedTransformer, HookedTransformerConfig

        self.model, self.pairs, config, weights = model, pairs, model.config, model.weights
        sizes = {
            name: getattr(config, name)
            for name in ("n_layers", "n_heads", "d_model", "d_head", "d_mlp", "d_vocab", "n_ctx", "act_fn")
        }
        flags = dict.fromkeys(("use_split_qkv_input", "use_attn_result", "use_hook_mlp_in"), True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # 3.9 announces that 4 will not have it
            self.hooked = HookedTransformer(HookedTransformerConfig(**sizes, **flags, normalization_type="LN"))
        state = self.hooked.state_dict()
        state |= {"embed.W_E": weights.w_e, "pos_embed.W_pos": weights.w_pos, "unembed.W_U": weights.w_u}
        norms = {"ln_final": weights.ln_final}
        for index, layer in enumerate(weights.layers):
            at = f"blocks.{index}."
            for part, w, b in zip("QKV", torch.cat(layer.w_qkv).chunk(3), layer.b_qkv.chunk(3), strict=True):
                state |= {f"{at}attn.W_{part}": w, f"{at}attn.b_{part}": b}
            state |= {f"{at}attn.W_O": layer.w_o, f"{at}attn.b_O": layer.b_o}
            state |= {f"{at}mlp.W_in": layer.w_in, f"{at}mlp.b_in": layer.b_in}
            state |= {f"{at}mlp.W_out": layer.w_out, f"{at}mlp.b_out": layer.b_out}
            norms |= {f"{at}ln1": layer.ln1, f"{at}ln2": layer.ln2}
        for place, (gamma, beta) in norms.items():
            state |= {f"{place}.w": gamma, f"{place}.b": beta}
        self.hooked.load_state_dict(state)
        with torch.no_grad():
            clean, corrupt = (run_with_senders(model, tokens)[1] for tokens in (pairs.clean, pairs.corrupt))
            self.delta = corrupt - clean
            self.clean = self.value([])

    @torch.no_grad()
    def value(self, hooks: list[tuple[str, Callable[..., Tensor]]]) -> float:
        rows = torch.arange(len(self.pairs)), self.pairs.positions
        logits = self.hooked.run_with_hooks(self.pairs.clean, fwd_hooks=hooks)[rows]
        answers, wrong = (logits.gather(1, ids) for ids in (self.pairs.answers, self.pairs.wrong))
        return float((answers.double().mean(1) - wrong.double().mean(1)).mean())

    def effect(self, edge: tuple[int, int]) -> float:
        s, r = edge
        name, _, head = receiver_hook(self.model.graph, self.model.graph.receiver_names[r]).partition("[")

        def add(stream: Tensor, hook: object) -> Tensor:
            read = stream.clone()  # [B, T, H, D] in front of heads
            target = read[:, :, int(head.rstrip("]"))] if head else read
            target += self.delta[s]
            return read

        return self.value([(name, add)]) - self.clean


def speed_of_patching(
    name: str, model: Model, pairs: PromptPairs, edges: list[str] | None, sample: int, published: bool = False
) -> bool:
    """Print a line for each way; True where ours costs at most a tenth of the hook-based one."""
    graph = model.graph
    mask = graph.edge_mask() if edges is None else patch_mask(model, edges)
    every = [(s, r) for s, r in mask.nonzero().tolist()]
    some = every[:: max(1, len(every) // sample)]
    names = [graph.edge_name(s, r) for s, r in some]
    effects = patch_edges(model, pairs, "logit_diff", names)
    ways: dict[str, OneAtATime | Published] = {
        "hooks": OneAtATime(model, pairs, True),
        "plain": OneAtATime(model, pairs, False),
    }
    if published:
        ways["TransformerLens"] = Published(model, pairs)
    largest = max(abs(effects[n]) for n in names)
    for way, one in ways.items():
        error = max(abs(one.effect(e) - effects[n]) for e, n in zip(some[:8], names, strict=False))
        if error > 1e-4 * largest:
            raise SystemExit(
                f"{name}: {way} and patch_edges differ by {error:.1e}, the largest effect is {largest:.1e}"
            )
    repeats = 1 if len(every) > 500 else 2  # the sample has warmed it up
    ours = min(seconds(lambda: patch_edges(model, pairs, "logit_diff", edges)) for _ in range(repeats))
    first = round(float(pairs.first_difference().double().mean()), 1)
    tokens = round(float(pairs.lengths.double().mean()), 1)
    print(
        f"\n{name}: {len(every)} edges × {len(pairs)} pairs of {tokens} tokens, first difference at {first}, on average"
    )
    print(f"  {'patch_edges':<32}{ours:>10.2f} CPU s")
    ratios = {}
    for way, one in ways.items():
        timed = some[:4] if way == "TransformerLens" else some
        each = seconds(partial(list, map(one.effect, timed))) / len(timed)
        ratios[way] = each * len(every) / ours
        print(f"  {'one at a time, ' + way:<32}{each * len(every):>10.2f} CPU s{ratios[way]:>8.1f} ×   "
              f"({len(timed)} edges timed)")  # fmt: skip
    passed = ratios["hooks"] >= TARGET
    print(f"  {'PASS' if passed else 'FAIL'}: {ratios['hooks']:.1f} × fewer CPU seconds than hooks, target {TARGET:g}")
    return passed


def patch_mask(model: Model, edges: list[str]) -> Tensor:
    mask = torch.zeros_like(model.graph.edge_mask())
    for edge in edges:
        mask[model.graph.edge(edge)] = True
    return mask


def speed(quick: bool) -> bool:
    passed = True
    for name in TOYS:
        model, pairs = load(name), TASKS[name].generate(8 if quick else 64, 0)
        passed &= speed_of_patching(name, model, pairs, None, 40)
    if not quick:
        model = random_gpt2()
        published = importlib.util.find_spec("transformer_lens") is not None
        for what, first in PROMPTS.items():
            pairs = random_pairs(8, TOKENS, first, model.config.d_vocab)
            top = [edge for edge, _ in attribute(model, pairs).top(1000)]
            title = f"GPT-2 small's shape, EAP's top 1,000, {what}"
            passed &= speed_of_patching(title, model, pairs, top, 20, published)
    print("\nACDC on KL, from all edges")
    print(f"  {'model':<15}{'threshold':>10}{'kept':>7}{'decided':>9}{'run':>7}{'launches':>10}{'CPU s':>8}")
    for name in TOYS:
        model, pairs = load(name), TASKS[name].generate(8 if quick else 32, 0)
        for threshold in (0.1, 0.01, 0.001):
            start = time.process_time()
            found = acdc(model, pairs, threshold=threshold)
            took, counts = time.process_time() - start, found.meta["forwards"]
            print(f"  {name:<15}{threshold:>10g}{found.n_edges:>7}{counts['decided']:>9}{counts['evaluated']:>7}"
                  f"{counts['launches']:>10}{took:>8.2f}")  # fmt: skip
    return passed


def judge(name: str, quick: bool) -> bool:
    """Print the table of one toy model, and what the paper found on its models; True where all of that holds."""
    model, pairs, metric = load(name), TASKS[name].generate(16 if quick else 64, 0), TASKS[name].metric
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
        agree, judged = agreement(scores, exact), mib(model, pairs, metric, scores)
        close[label] = agree.r2
        values = (agree.spearman, agree.r2, overlap(scores, exact, TOP), roc(scores, reference).auc)
        row = "".join(f"{value:>{width}.3f}" for value, width in zip(values, (10, 8, 8, 8), strict=True))
        print(f"  {label:<20}{took:>8.2f}{row}{judged.cpr:>8.3f}{judged.cmd:>8.3f}")
    print("  EAP followed by ACDC: KL to the clean run with as many edges, EAP's own top and what ACDC keeps of more")
    scores, better = found["eap"][1], []
    for n in (model.graph.n_edges // 4, model.graph.n_edges // 2):
        for threshold in (0.003, 0.03):
            pruned = acdc(model, pairs, threshold=threshold, start=scores.top_n(n))
            alone, both = metric_on(model, pairs, "kl", [scores.top_n(pruned.n_edges), pruned])
            better.append(both >= alone)
            print(
                f"    top {n:>4}, threshold {threshold:<6g}{pruned.n_edges:>5} edges: EAP {-alone:>8.4f}, then ACDC "
                f"{-both:>8.4f}"
            )
    checks = {
        "EAP's first-order error is seen (R² < 0.99)": close["eap"] < 0.99,
        "EAP followed by ACDC is at least as good as EAP alone": all(better),
        "relp or integrated gradients are closer to exact patching than EAP (R²)": close["eap"]
        < max(r2 for label, r2 in close.items() if label == "relp" or label.startswith("eap-ig")),
    }
    for text, holds in checks.items():
        print(f"  {'PASS' if holds else 'FAIL'}: {text}")
    return all(checks.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, Python {platform.python_version()}, one thread of {platform.machine()}")
    passed = True
    if args.speed or not args.table:
        passed = speed(args.quick)
    if args.table or not args.speed:
        for name in TOYS:
            passed &= judge(name, args.quick)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
