"""The literal, slow definition of everything that eapcore computes fast: one prompt, one head, one edge, one pass at a
time.

It shares no code with the package beyond the weights themselves. Every receiver reads its own copy of the residual
stream, through its own LayerNorm and projection, so that autograd gives each copy its gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from models import layers_of

from eapcore.tasks.metrics import METRICS, MetricBatch


@dataclass
class Run:
    senders: list = field(default_factory=list)  # [T, D] each, by the graph's order
    receivers: list = field(default_factory=list)  # [T, D] each
    patterns: dict = field(default_factory=dict)  # (layer, head): [T, T]
    queries_keys: dict = field(default_factory=dict)  # (layer, head): (q, k)
    inner: dict = field(default_factory=dict)  # receiver index: [T, K] the activation of its q, k or v
    units: list = field(default_factory=list)  # [T, M] each
    logits: torch.Tensor | None = None


def norm(x, weights, eps, frozen=False):
    if weights.kind == "none":
        return x
    centred = x - x.mean(-1, keepdim=True)
    sigma = (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    return centred / (sigma.detach() if frozen else sigma) * weights.gamma + weights.beta


def act(name, x, identity=False):
    if name == "relu":
        value = x.clamp_min(0)
    elif name == "gelu":
        value = x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    else:
        value = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return x * (value / x).detach() if identity else value


def causal(q, k, scale, temperature=1.0):
    """softmax, with the derivative that it has at a temperature, by the scores over it."""
    scores = q @ k.T * scale
    scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
    flat = temperature * (scores / temperature).softmax(-1)
    return scores.softmax(-1).detach() + flat - flat.detach()


def halved(x, rule):
    """x, with half of its gradient."""
    return (x + x.detach()) / 2 if rule else x


def run(
    model,
    tokens,
    read=None,
    *,
    replaced=None,
    cut=(),
    norms="",
    activation="",
    attention="",
    change=None,
    temperature=1.0,
    products=False,
):
    """One prompt, tokens [T].

    read(receiver index, senders so far, biases so far) gives what a receiver reads; None reads the sum of all.
    replaced: {"embed" | "a{l}" | "m{l}": what the component sends instead, as one tensor for each of its senders},
    constants. cut: components that no gradient goes through. The three rules: "frozen", "identity", "frozen".
    temperature: of the softmax's derivative. products: each factor of two gets half of its gradient.
    change(receiver index, x): what a q, k or v activation, or what an MLP sends, is instead of x.
    """
    weights, config, made = model.weights, model.config, Run()
    replaced = replaced or {}

    def send(component, outputs):
        outputs = replaced.get(component, outputs)
        if component in cut or component in replaced or component == "embed":
            outputs = [x.detach().requires_grad_() for x in outputs]
        made.senders.extend(outputs)

    send("embed", [weights.w_e[tokens] + weights.w_pos[: len(tokens)]])
    bias = torch.zeros_like(made.senders[0])

    def receive(through):
        stream = sum(made.senders) + bias if read is None else read(len(made.receivers), made.senders, bias)
        made.receivers.append(stream.clone())
        return norm(made.receivers[-1], through, config.eps, norms == "frozen")

    for index, (heads, mlp) in enumerate(layers_of(weights)):
        w = torch.cat(list(heads.w_qkv))
        first = len(made.receivers)
        channels = [receive(heads.norm) @ w[c] + heads.b_qkv[c] for c in range(3 * config.n_heads)]
        channels = channels if change is None else [change(first + c, x) for c, x in enumerate(channels)]
        made.inner |= {first + c: x for c, x in enumerate(channels)}
        outputs = []
        for h in range(config.n_heads):
            q, k, v = (channels[part * config.n_heads + h] for part in range(3))
            pattern = causal(halved(q, products), halved(k, products), config.score_scale(index), temperature)
            pattern = pattern.detach().requires_grad_() if attention == "frozen" else pattern
            made.patterns[index, h], made.queries_keys[index, h] = pattern, (q, k)
            outputs.append(halved(pattern, products) @ halved(v, products) @ heads.w_o[h])
        send(f"a{index}", outputs)
        bias = bias + heads.b_o
        if mlp is not None:
            made.units.append(act(config.act_fn, receive(mlp.norm) @ mlp.w_in + mlp.b_in, activation == "identity"))
            sent = made.units[-1] @ mlp.w_out + mlp.b_out
            send(f"m{index}", [sent if change is None else change(len(made.receivers) - 1, sent)])
    made.logits = receive(weights.ln_final) @ weights.w_u
    made.logits = made.logits if weights.b_u is None else made.logits + weights.b_u
    return made


def pair_at(pairs, i):
    """(clean [T], corrupt [T], position, answers [1, A], wrong [1, W]) of one pair, padding removed."""
    length = int(pairs.lengths[i])
    return (
        pairs.clean[i, :length], pairs.corrupt[i, :length], int(pairs.positions[i]), pairs.answers[i : i + 1],
        pairs.wrong[i : i + 1],
    )  # fmt: skip


@dataclass
class Pair:
    """A pair's clean and corrupt runs, without a graph, and a metric on the logits."""

    model: object
    pairs: object
    i: int
    metric: object = METRICS["logit_diff"]

    def __post_init__(self):
        self.tokens, corrupt, self.position, answers, wrong = pair_at(self.pairs, self.i)
        self.clean, self.corrupt = run(self.model, self.tokens), run(self.model, corrupt)
        ends = [r.logits[self.position][None].detach() for r in (self.clean, self.corrupt)]
        self.batch = MetricBatch(answers, wrong, *ends, torch.tensor([self.i]))

    def value(self, made):
        return self.metric(made.logits[self.position][None], self.batch).sum()

    def grads(self, made, wanted):
        grads = torch.autograd.grad(self.value(made), wanted, allow_unused=True, retain_graph=True)
        return [torch.zeros_like(x) if g is None else g for g, x in zip(grads, wanted, strict=True)]

    def deltas(self, ablated=None):
        """Δ of every sender; ablated(s, t) is what sender s sends at position t instead of what the corrupt prompt
        makes it send."""
        if ablated is None:
            return [(b - a).detach() for a, b in zip(self.clean.senders, self.corrupt.senders, strict=True)]
        rows = [torch.stack([ablated(s, t) for t in range(len(self.tokens))]) for s in range(len(self.clean.senders))]
        return [(b - a).detach() for a, b in zip(self.clean.senders, rows, strict=True)]


def mean_of(model, pairs, score, metric=METRICS["logit_diff"]):
    """The mean over pairs of score(pair)."""
    return sum(score(Pair(model, pairs, i, metric)) for i in range(len(pairs))) / len(pairs)


# First order


def edges(model, deltas, grads):
    graph = model.graph
    scores = torch.zeros(graph.n_senders, graph.n_receivers, dtype=torch.float64)
    for r in range(graph.n_receivers):
        for s in range(graph.senders_before(r)):
            scores[s, r] = (deltas[s] * grads[r]).sum()
    return scores


def one_pass(pair, deltas, **how):
    """Edge scores of one pair with gradients of one run."""
    made = run(pair.model, pair.tokens, **how)
    return edges(pair.model, deltas, pair.grads(made, made.receivers))


def eap(model, pairs, metric=METRICS["logit_diff"], points=((1.0, 1.0),)):
    """EAP scores, float64 [S, R], with gradients at interpolated embeddings: (α, weight) from corrupt 0 to clean 1."""

    def score(pair):
        clean, corrupt = (each.senders[0].detach() for each in (pair.clean, pair.corrupt))
        starts = [(alpha * clean + (1 - alpha) * corrupt, weight) for alpha, weight in points]
        return sum(weight * one_pass(pair, pair.deltas(), replaced={"embed": [x]}) for x, weight in starts)

    return mean_of(model, pairs, score, metric)


def components(model):
    """{component: which senders}, in order."""
    names = [name.split(".")[0] for name in model.graph.sender_names]
    return {name: [s for s, other in enumerate(names) if other == name] for name in dict.fromkeys(names)}


def interpolated(pair, deltas, points):
    """Every component's output in turn at clean + (1 − α) Δ, the rest as it follows: (name, weight, how) for `run`."""
    found = components(pair.model)
    for name, senders in found.items():
        for alpha, weight in points:
            outputs = [pair.clean.senders[s].detach() + (1 - alpha) * deltas[s] for s in senders]
            yield name, weight / len(found), {"replaced": {name: outputs}}


def exact_softmax(pair, deltas, **how):
    """Edge scores of one pair where those into q and k are Σ ⟨pattern with Δ − pattern, ∂metric/∂pattern⟩."""
    model, config = pair.model, pair.model.config
    made, layers = run(model, pair.tokens, **how), layers_of(model.weights)
    scores = edges(model, deltas, pair.grads(made, made.receivers))
    for (index, h), pattern in made.patterns.items():
        (d_pattern,) = pair.grads(made, [pattern])
        heads, (q, k) = layers[index][0], made.queries_keys[index, h]
        w = torch.cat(list(heads.w_qkv))
        for part, name in enumerate("qk"):
            r = model.graph.receiver(f"a{index}.h{h}<{name}>")
            channel = part * config.n_heads + h
            for s in range(model.graph.senders_before(r)):
                stream = made.receivers[r] + deltas[s]
                changed = norm(stream, heads.norm, config.eps) @ w[channel] + heads.b_qkv[channel]
                pair_of = (changed, k) if name == "q" else (q, changed)
                scores[s, r] = ((causal(*pair_of, config.score_scale(index)) - pattern) * d_pattern).sum()
    return scores.detach()


def dropped(pair, deltas, one=one_pass):
    """The mean of |score| over the passes that keep the receiver's layer, each with one layer's gradient dropped."""
    graph, config = pair.model.graph, pair.model.config
    total = torch.zeros(graph.n_senders, graph.n_receivers, dtype=torch.float64)
    for index in range(config.n_layers):
        total += one(pair, deltas, cut=(f"a{index}", f"m{index}")).abs()
    for r, name in enumerate(graph.receiver_names):
        total[:, r] /= config.n_layers - (name != "logits")
    return total


def importances(pair, zero=False):
    """|Σ_t ⟨Δ, gradient⟩| of one pair: by name, of every sender, and of every q, k and v activation."""
    made, names, receivers = (
        run(pair.model, pair.tokens),
        pair.model.graph.sender_names,
        pair.model.graph.receiver_names,
    )
    there = dict(zip(names, zip(made.senders, pair.corrupt.senders, strict=True), strict=True))
    there |= {receivers[r]: (x, pair.corrupt.inner[r]) for r, x in made.inner.items()}
    grads = pair.grads(made, [x for x, _ in there.values()])
    pairs = zip(there.items(), grads, strict=True)
    return {name: (((0 if zero else b) - a) * g).sum().abs().detach() for (name, (a, b)), g in pairs}


# Exact patching


def ablated_means(model, reference, per_position=False):
    """What every sender sends on average over the clean prompts, each prompt by its own length: [S, D] or [S, T, D]."""
    runs = [torch.stack(run(model, pair_at(reference, i)[0]).senders).detach() for i in range(len(reference))]
    if not per_position:
        return torch.stack([senders.mean(1) for senders in runs]).mean(0)
    longest = max(senders.shape[1] for senders in runs)
    places = [[senders[:, t] for senders in runs if senders.shape[1] > t] for t in range(longest)]
    return torch.stack([torch.stack(rows).mean(0) for rows in places], 1)


def circuit_logits(model, pairs, mask, other=lambda s, clean, corrupt: corrupt[s]):
    """Logits [N, V] at the answer positions with every edge outside the mask carrying other(s, clean senders, corrupt
    senders)."""
    rows = []
    for i in range(len(pairs)):
        clean, corrupt, position, _, _ = pair_at(pairs, i)
        ends = [run(model, tokens).senders for tokens in (clean, corrupt)]

        def read(r, senders, bias, ends=ends):
            return bias + sum(a if mask[s, r] else other(s, *ends) for s, a in enumerate(senders))

        rows.append(run(model, clean, read).logits[position].detach())
    return torch.stack(rows)
