"""The literal definition of a decoder of any family: one prompt, a residual stream of its own for every receiver.

It shares no code with the package beyond the weights and the configuration. The rotation is a product of complex
numbers, positions are looped over by masks, and key and value heads are looked up for each query head.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from eapcore.tasks.metrics import MetricBatch

ACTIVATIONS = {
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_new": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + torch.exp(-x)),
}


def normed(x, norm, frozen=False):
    if norm.kind == "none":
        return x
    centred = x - x.mean(-1, keepdim=True) if norm.kind == "layernorm" else x
    sigma = (centred.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt()
    n = centred / (sigma.detach() if frozen else sigma) * norm.gamma
    return n if norm.beta is None else n + norm.beta


def turned(x, frequencies):
    """x [T, K], dimensions i and i + n/2 as one complex number, at positions 0 … T − 1."""
    half = len(frequencies)
    angles = torch.arange(len(x), dtype=torch.float64)[:, None] * torch.tensor(frequencies, dtype=torch.float64)
    pairs = torch.complex(x[:, :half], x[:, half : 2 * half]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([pairs.real, pairs.imag, x[:, 2 * half :]], 1)


def halved(x, rule):
    """x, with half of its gradient."""
    return (x + x.detach()) / 2 if rule else x


def run(model, tokens, mask=None, others=None, patterns=None, rules=""):
    """(senders, receivers, logits [T, V]) of a prompt, tokens [T]; every receiver reads a stream of its own.

    With a mask, bool [S, R], a receiver reads of the senders outside it what they send in `others`. patterns: a list
    that takes each head's, [T, T]. rules: by which gradients go back, "gim" or "relp".
    """
    weights, config = model.weights, model.config
    embedding = weights.w_e[tokens] * config.embed_scale
    senders = [embedding if weights.w_pos is None else embedding + weights.w_pos[: len(tokens)]]
    biases, receivers = [], []

    def stream(count):
        read = senders[:count]
        if mask is not None:
            inside = mask[:, len(receivers)].tolist()
            read = [e if inside[s] else others[s] for s, e in enumerate(read)]
        receivers.append(sum(read) + sum(biases) + torch.zeros_like(senders[0]).requires_grad_())
        return receivers[-1]

    for index, layer in enumerate(weights.layers):
        for stage in layer:
            before, sent, added = len(senders), [], []
            for part in stage:
                if hasattr(part, "w_o"):
                    heads, bias = attend(config, index, part, lambda before=before: stream(before), patterns, rules)
                    sent += heads
                    added += bias
                    continue
                n = normed(stream(before), part.norm, rules)
                hidden = n @ part.w_in + (0 if part.b_in is None else part.b_in)
                units = ACTIVATIONS[part.act_fn](hidden)
                units = hidden * (units / hidden).detach() if rules == "relp" else units
                units = units if part.w_up is None else halved(units, rules) * halved(n @ part.w_up, rules)
                sent.append(normed(units @ part.w_out + (0 if part.b_out is None else part.b_out), part.post, rules))
            senders += sent
            biases += added
    n = normed(stream(len(senders)), weights.ln_final, rules)
    logits = n @ weights.w_u + (0 if weights.b_u is None else weights.b_u)
    cap = config.logits_softcap
    return senders, receivers, logits if cap is None else cap * torch.tanh(logits / cap)


def attend(config, index, part, stream, patterns=None, rules=""):
    """What the heads send, each [T, D], and the bias that they add; the q, k and v streams in the graph's order."""
    w, b = torch.cat(list(part.w_qkv)), part.b_qkv
    heads, kv = config.n_heads, config.n_kv
    size = heads // kv
    count = kv if config.kv_grouped else heads

    def channel(place):
        act = normed(stream(), part.norm, rules) @ w[place]
        return act if b is None else act + b[place]

    q = [channel(h) for h in range(heads)]
    k, v = ([channel(heads + p * kv + c * kv // count) for c in range(count)] for p in (0, 1))
    window, frequencies = config.window(index), config.rotary_frequencies
    if window is not None and config.local_frequencies:
        frequencies = config.local_frequencies
    q, k = (normed_heads(xs, norm, part.joint, rules) for xs, norm in ((q, part.q_norm), (k, part.k_norm)))
    q, k = ([turned(x, frequencies) if frequencies else x for x in xs] for xs in (q, k))
    sent, gim = [], rules == "gim"
    for h in range(heads):
        own = h // size if config.kv_grouped else h
        scores = halved(q[h], gim) @ halved(k[own], gim).T * config.score_scale(index)
        if config.attn_softcap is not None:
            scores = config.attn_softcap * torch.tanh(scores / config.attn_softcap)
        hidden = [
            [j > i or (window is not None and j <= i - window) for j in range(len(scores))] for i in range(len(scores))
        ]
        scores = scores.masked_fill(torch.tensor(hidden), -math.inf)
        pattern = scores.softmax(-1)
        if gim:
            flat = 2 * (scores / 2).softmax(-1)
            pattern = pattern.detach() + flat - flat.detach()
        pattern = pattern.detach() if rules == "relp" else pattern
        if patterns is not None:
            patterns.append(pattern)
        sent.append(halved(pattern, gim) @ halved(v[own], gim) @ part.w_o[h])
    if part.post.kind != "none":  # of what they make together; a share of it is each head's
        sigma = (sum(sent).pow(2).mean(-1, keepdim=True) + part.post.eps).sqrt()
        sigma = sigma.detach() if rules else sigma
        sent = [made / sigma * part.post.gamma for made in sent]
    return sent, [] if part.b_o is None else [part.b_o]


def normed_heads(xs, norm, joint, frozen=False):
    """Heads' q or k, each [T, K], each through a norm of its own, or one behind the other through one.

    Where each query head of a group has its own key, they are as many key heads with the same weights, γ's among them.
    """
    if not joint:
        return [normed(x, norm, frozen) for x in xs]
    gamma = norm.gamma.view(-1, xs[0].shape[1])
    repeated = [gamma[i * len(gamma) // len(xs)] for i in range(len(xs))]
    return list(normed(torch.cat(xs, 1), replace(norm, gamma=torch.cat(repeated)), frozen).split(xs[0].shape[1], 1))


def patched_logits(model, pairs, mask):
    """Logits [N, V] where the metric reads, of clean prompts in which edges outside a mask carry the corrupt ones'."""
    found = []
    for i in range(len(pairs)):
        clean, corrupt = (prompts[i, : int(pairs.lengths[i])] for prompts in (pairs.clean, pairs.corrupt))
        found.append(run(model, clean, mask, run(model, corrupt)[0])[2][int(pairs.positions[i])].detach())
    return torch.stack(found)


def eap(model, pairs, metric, rules=""):
    """EAP scores, float64 [S, R], an edge at a time; prompts of one length, read at their last token."""
    graph = model.graph
    scores = torch.zeros(graph.n_senders, graph.n_receivers, dtype=torch.float64)
    for i in range(len(pairs)):
        length = int(pairs.lengths[i])
        runs = [run(model, prompts[i, :length], rules=rules) for prompts in (pairs.clean, pairs.corrupt)]
        (senders, receivers, logits), (others, _, other_logits) = runs
        at = int(pairs.positions[i])
        answers = (pairs.answers[i : i + 1], pairs.wrong[i : i + 1])
        ends = (logits[at][None].detach(), other_logits[at][None].detach())
        value = metric(logits[at][None], MetricBatch(*answers, *ends, torch.tensor([i]))).sum()
        grads = torch.autograd.grad(value, receivers, allow_unused=True)
        for r, grad in ((r, grad) for r, grad in enumerate(grads) if grad is not None):
            for s in range(graph.senders_before(r)):
                scores[s, r] += ((others[s] - senders[s]) * grad).sum().detach() / len(pairs)
    return scores
