"""The literal, slow definition of everything that eapcore computes fast: one prompt, one head, one edge at a time.

It shares no code with the package beyond the weights themselves. Every receiver reads its own copy of the residual
stream, through its own LayerNorm and projection, so that autograd gives each copy its gradient.
"""

from __future__ import annotations

import math

import torch

from eapcore.tasks.metrics import MetricBatch


def layer_norm(x, ln, eps):
    if ln is None:
        return x
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt() * ln[0] + ln[1]


def act(name, x):
    if name == "relu":
        return x.clamp_min(0)
    if name == "gelu":
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def run(model, tokens, read=None, start=None):
    """One prompt, tokens [T]. Returns (senders list of [T, D], receivers list of [T, D], logits [T, V]).

    start: [T, D] instead of the tokens' embedding. read(receiver index, senders so far, biases so far) gives what a
    receiver reads; None reads the sum of all.
    """
    weights, config = model.weights, model.config
    senders = [weights.w_e[tokens] + weights.w_pos[: len(tokens)] if start is None else start]
    bias = torch.zeros_like(senders[0])
    receivers = []

    def receive():
        stream = sum(senders) + bias if read is None else read(len(receivers), senders, bias)
        stream = stream.clone() if stream.requires_grad else stream.clone().requires_grad_()
        receivers.append(stream)
        return stream

    for index, layer in enumerate(weights.layers):
        w = torch.cat(list(layer.w_qkv))
        channels = []
        for c in range(3 * config.n_heads):
            channels.append(layer_norm(receive(), layer.ln1, config.eps) @ w[c] + layer.b_qkv[c])
        outputs = []
        for h in range(config.n_heads):
            q, k, v = (channels[part * config.n_heads + h] for part in range(3))
            scores = q @ k.T * config.score_scale(index)
            future = torch.ones_like(scores, dtype=torch.bool).triu(1)
            outputs.append(scores.masked_fill(future, -math.inf).softmax(-1) @ v @ layer.w_o[h])
        senders += outputs
        bias = bias + layer.b_o
        if config.d_mlp is not None:
            n = layer_norm(receive(), layer.ln2, config.eps)
            senders.append(act(config.act_fn, n @ layer.w_in + layer.b_in) @ layer.w_out + layer.b_out)
    n = layer_norm(receive(), weights.ln_final, config.eps)
    logits = n @ weights.w_u
    return senders, receivers, logits if weights.b_u is None else logits + weights.b_u


def pair_at(pairs, i):
    """(clean [T], corrupt [T], position, answers [1, A], wrong [1, W]) of one pair, padding removed."""
    length = int(pairs.lengths[i])
    return (
        pairs.clean[i, :length], pairs.corrupt[i, :length], int(pairs.positions[i]), pairs.answers[i : i + 1],
        pairs.wrong[i : i + 1],
    )  # fmt: skip


def eap(model, pairs, metric):
    """EAP scores, float64 [S, R], an edge at a time."""
    graph = model.graph
    scores = torch.zeros(graph.n_senders, graph.n_receivers, dtype=torch.float64)
    for i in range(len(pairs)):
        clean, corrupt, position, answers, wrong = pair_at(pairs, i)
        senders, receivers, logits = run(model, clean)
        corrupt_senders, _, corrupt_logits = run(model, corrupt)
        batch = MetricBatch(
            answers, wrong, logits[position][None].detach(), corrupt_logits[position][None].detach(), torch.tensor([i])
        )
        value = metric(logits[position][None], batch).sum()
        grads = torch.autograd.grad(value, receivers, allow_unused=True)
        for r in range(graph.n_receivers):
            for s in range(graph.senders_before(r)):
                if grads[r] is not None:
                    scores[s, r] += ((corrupt_senders[s] - senders[s]) * grads[r]).sum().double().detach() / len(pairs)
    return scores


def circuit_logits(model, pairs, mask):
    """Logits [N, V] at the answer positions with every edge outside the mask reading the corrupt activation."""
    rows = []
    for i in range(len(pairs)):
        clean, corrupt, position, _, _ = pair_at(pairs, i)
        corrupt_senders, _, _ = run(model, corrupt)

        def read(r, senders, bias, corrupt_senders=corrupt_senders):
            return bias + sum(a if mask[s, r] else corrupt_senders[s] for s, a in enumerate(senders))

        rows.append(run(model, clean, read)[2][position].detach())
    return torch.stack(rows)
