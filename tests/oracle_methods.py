"""The literal definitions of the first-order methods beyond EAP: one prompt, one edge, one pass at a time.

As in `oracle`, every receiver reads its own copy of the residual stream and autograd gives each copy its gradient; it
shares no code with the package beyond the weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import oracle
import torch

from eapcore.tasks.metrics import MetricBatch


@dataclass
class Run:
    senders: list = field(default_factory=list)  # [T, D] each, by the graph's order
    receivers: list = field(default_factory=list)  # [T, D] each
    patterns: dict = field(default_factory=dict)  # (layer, head): [T, T]
    queries_keys: dict = field(default_factory=dict)  # (layer, head): (q, k)
    units: list = field(default_factory=list)  # [T, M] each
    logits: torch.Tensor | None = None


def norm(x, ln, eps, frozen):
    if ln is None:
        return x
    centred = x - x.mean(-1, keepdim=True)
    sigma = (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    return centred / (sigma.detach() if frozen else sigma) * ln[0] + ln[1]


def act(name, h, identity):
    value = oracle.act(name, h)
    return h * (value / h).detach() if identity else value


def causal(q, k, scale):
    scores = q @ k.T * scale
    return scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf).softmax(-1)


def run(model, tokens, *, replaced=None, cut=(), norms="", activation="", attention=""):
    """One prompt. replaced: {"embed" | "a{l}" | "m{l}": what the component sends instead, as one tensor for each of its
    senders}, constants. cut: components that no gradient goes through. The three rules: "frozen", "identity", "frozen".
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

    def receive():
        made.receivers.append((sum(made.senders) + bias).clone())
        return made.receivers[-1]

    for index, layer in enumerate(weights.layers):
        w = torch.cat(list(layer.w_qkv))
        channels = [
            norm(receive(), layer.ln1, config.eps, norms == "frozen") @ w[c] + layer.b_qkv[c]
            for c in range(3 * config.n_heads)
        ]
        outputs = []
        for h in range(config.n_heads):
            q, k, v = (channels[part * config.n_heads + h] for part in range(3))
            pattern = causal(q, k, config.score_scale(index))
            pattern = pattern.detach() if attention == "frozen" else pattern
            made.patterns[index, h], made.queries_keys[index, h] = pattern, (q, k)
            outputs.append(pattern @ v @ layer.w_o[h])
        send(f"a{index}", outputs)
        bias = bias + layer.b_o
        if config.d_mlp is not None:
            hidden = norm(receive(), layer.ln2, config.eps, norms == "frozen") @ layer.w_in + layer.b_in
            made.units.append(act(config.act_fn, hidden, activation == "identity"))
            send(f"m{index}", [made.units[-1] @ layer.w_out + layer.b_out])
    final = norm(receive(), weights.ln_final, config.eps, norms == "frozen")
    made.logits = final @ weights.w_u if weights.b_u is None else final @ weights.w_u + weights.b_u
    return made


def components(model):
    """{component: which senders}, in order."""
    found, at = {"embed": [0]}, 1
    for index in range(model.config.n_layers):
        found[f"a{index}"] = list(range(at, at + model.config.n_heads))
        at += model.config.n_heads
        if model.config.d_mlp is not None:
            found[f"m{index}"] = [at]
            at += 1
    return found


@dataclass
class Pair:
    """A pair's clean and corrupt runs, without a graph, and a metric on the logits."""

    model: object
    pairs: object
    i: int
    metric: object

    def __post_init__(self):
        self.tokens, corrupt, self.position, answers, wrong = oracle.pair_at(self.pairs, self.i)
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


def interpolated(pair, deltas, points):
    """Every component's output in turn at clean + (1 − α) Δ, the rest as it follows: (name, weight, how) for `run`."""
    found = components(pair.model)
    for name, senders in found.items():
        for alpha, weight in points:
            outputs = [pair.clean.senders[s].detach() + (1 - alpha) * deltas[s] for s in senders]
            yield name, weight / len(found), {"replaced": {name: outputs}}


def exact_softmax(pair, deltas, **how):
    """Edge scores of one pair where those into q and k are Σ ⟨pattern with Δ − pattern, ∂metric/∂pattern⟩."""
    model, weights, config = pair.model, pair.model.weights, pair.model.config
    made = run(model, pair.tokens, **how)
    scores = edges(model, deltas, pair.grads(made, made.receivers))
    for (index, h), pattern in made.patterns.items():
        (d_pattern,) = pair.grads(made, [pattern])
        layer, (q, k) = weights.layers[index], made.queries_keys[index, h]
        w = torch.cat(list(layer.w_qkv))
        for part, name in enumerate("qk"):
            r = model.graph.receiver(f"a{index}.h{h}<{name}>")
            channel = part * config.n_heads + h
            for s in range(model.graph.senders_before(r)):
                stream = made.receivers[r] + deltas[s]
                changed = norm(stream, layer.ln1, config.eps, False) @ w[channel] + layer.b_qkv[channel]
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
