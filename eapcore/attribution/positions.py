"""Attention's edges between positions: what each head's query, key and value at one position does at another.

With P the pattern, z = Σ_t P[u, t] v[t] what a head mixes at its target u, d[u, t] = ⟨v[t], ∂metric/∂z[u]⟩ and s the
scores before the softmax, the edge from source t to target u has by method "peap"

    v[t, u] = P[u, t] ⟨Δv[t], ∂metric/∂z[u]⟩
    k[t, u] = Σ_t′ (P′[u, t′] − P[u, t′]) d[u, t′],  P′ with the key of t alone as it is ablated
    q[t, u] = (P″[u, t] − P[u, t]) d[u, t],          P″ with the query of u as it is ablated

where Δv, keys and queries are what the head makes of the ablated prompts. By method "eap" all are first order, and Δ is
what the norm's derivative makes of the stream's difference:

    v[t, u] as above        k[t, u] = S[u, t] ⟨q[u], Δk[t]⟩        q[t, u] = S[u, t] ⟨Δq[u], k[t]⟩
    S[u, t] = P[u, t] (d[u, t] − Σ_t′ P[u, t′] d[u, t′]) · scale

Then the ordinary scores at each position are split: over all senders s and targets u, or for q sources,

    Σ_s per_position[t, s, a.h<v>] = Σ_u v[t, u]      <k> alike      Σ_s per_position[u, s, a.h<q>] = Σ_t q[t, u].

Where all heads' q and k are normed together a head's part is what its own pattern makes, and the sums hold over heads.
Source: Haklay, Orgad, Bau, Mueller, Belinkov 2025, *Position-aware Automatic Circuit Discovery*, and its code (PEAP).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from eapcore.attribution.exact_edges import widened
from eapcore.attribution.methods import Pass, Passes
from eapcore.attribution.plan import Plan
from eapcore.attribution.pruning import EndStore
from eapcore.attribution.score_batch import score_batch
from eapcore.attribution.sums import Sums
from eapcore.execution.ablation import FROM_REFERENCE, Ablation, Values
from eapcore.execution.batch import Batch
from eapcore.execution.distributed import reported
from eapcore.execution.experiment import Experiment, Task, result_dtype
from eapcore.execution.progress import Count, Progress
from eapcore.graph.attention_scores import PARTS, AttentionScores
from eapcore.graph.scores import sign_text
from eapcore.kernels.causal import by_group
from eapcore.kernels.checks import one_of
from eapcore.models.attention import Channels
from eapcore.models.backward import Sink, backward
from eapcore.models.forward import StageSaved
from eapcore.models.matmul import product
from eapcore.models.model import Model
from eapcore.models.norm import NO_NORM, NormInput
from eapcore.models.tensors import accumulate_dtype, at_positions, on
from eapcore.models.torch_modes import own_modes
from eapcore.tasks.metrics import Metric
from eapcore.tasks.pairs import PromptPairs

METHODS = ("eap", "peap")


@reported
@own_modes
@torch.no_grad()
def attention_edges(
    model: Model,
    task: Task,
    metric: str | Metric = "logit_diff",
    *,
    method: str = "eap",
    ablation: str | Ablation = "corrupt",
    reference: PromptPairs | None = None,
    batch_size: int | str = "auto",
    progress: Progress | None = None,
) -> AttentionScores:
    """Score each head's attention from every source position to every target, for its query, its key and its value.

    The result takes 3·L·H·T² numbers.

    Args:
        model, task, metric, ablation, reference, batch_size: as `attribute`; with "peap" the ablation is "corrupt" or
            "zero".
        method: "eap", which splits the ordinary scores of edges into q, k and v, or "peap" as published; see the
            module.
        progress: called with (pairs done, pairs in all).

    Returns:
        AttentionScores, with positions of the longest prompt; a pair counts with 0 where it is shorter.

    Raises:
        ValueError: an unknown method; as `attribute`.
    """
    one_of("method", method, METHODS)
    kind = ablation.name if isinstance(ablation, Ablation) else ablation
    if method == "peap" and kind in FROM_REFERENCE:
        raise ValueError(
            "of queries, keys and values no mean is taken: with peap ablation must be 'corrupt' or 'zero', got "
            f"{kind!r}"
        )
    experiment = Experiment.of(model, task, metric, ablation, reference)
    model, pairs = experiment.model, experiment.pairs
    tokens, config = int(pairs.positions.max()) + 1, model.config
    shape = (config.n_layers, config.n_heads, tokens, tokens)
    totals = {part: torch.zeros(shape, dtype=torch.float64, device=model.device) for part in PARTS}
    values = torch.zeros(2, len(pairs), dtype=torch.float64, device="cpu")
    passes = Passes((Pass(1.0, 1.0),), kind == "corrupt")
    plan = Plan(config, model.dtype, model.device, "auto", model.groups, passes)
    size = batch_size if isinstance(batch_size, int) else plan.batch_size(pairs, "factored")
    count, name = Count(progress, len(pairs)), experiment.metric_name
    for group in experiment.groups(size, 1):
        batch = experiment.batch(group)
        ablated = experiment.ablation.values
        store, sums = _Store(model, batch, totals, method, ablated), Sums({}, batch, "all", "auto")
        found = score_batch(model, batch, experiment.metric, store, sums, passes, [1], values=ablated, check=name)
        values[:, batch.index.cpu()] = found.values.cpu()
        experiment.check_finite(values)
        count.add(len(group))
    keep = result_dtype(model.dtype)
    q, k, v = ((totals[part] / len(pairs)).to(keep).cpu() for part in PARTS)
    if not all(bool(x.isfinite().all()) for x in (q, k, v)):
        raise ValueError(f"the gradients overflow in {model.dtype}: use a wider dtype, e.g. float32")
    clean, corrupt = values.mean(1).tolist()
    meta = {
        **experiment.describe(),
        "sign": sign_text("score", "predicted", "the edge from the source to the target position is ablated"),
        "method": {"name": method, "level": "attention", "ablation": dict(experiment.ablation.meta)},
        "metric": {"name": name, "clean": clean, "corrupt": corrupt},
    }
    return AttentionScores(q, k, v, model.graph, meta)


class _Store(EndStore):
    """Differences of the stream and of q, k and v, which meet the gradient layer by layer in `totals`."""

    def __init__(
        self, model: Model, batch: Batch, totals: dict[str, Tensor], method: str, ablated: Values | None
    ) -> None:
        super().__init__(model, batch)
        self.batch, self.totals, self.method = batch, totals, method
        self.sent = None if ablated is None else ablated.senders(model)

    def contract(
        self, sums: Sums, saved: list[StageSaved], grad: Tensor, past: list[Tensor] | None, step: Pass
    ) -> None:
        backward(self.model, saved, grad, _Positions(self), rules=step.rules, past=past, read=self.read)

    def along(self, index: int, norm_in: NormInput) -> Tensor:
        """How the norm of what a layer's heads read moves to first order, [B, T, D], in float32 at least.

        Where senders are set to values the stream moves against itself, and what a norm leaves of that is its eps: from
        the stream as it is, in float64, so that the rest is no rounding.
        """
        norm = self.model.attentions[index].norm
        if self.sent is None or norm.kind == "none":
            return norm.along(self.stream(index), norm_in)
        norm, x = widened(norm, torch.float64), norm_in.x.double()
        count = self.model.graph.senders_before(self.model.graph.qkv(index).start)
        there = on(self.sent[:count].sum(0, dtype=torch.float64), x.device)  # [1 or T, D]
        biases = [on(other.b_o, x.device) for other in self.model.attentions[:index] if other.b_o is not None]
        return norm.along(there[: x.shape[1]] + sum(b.double() for b in biases) - x, norm.forward(x)[1])

    def stream(self, index: int) -> Tensor:
        """Δ of what a layer's heads read, [B, T, D], in float32 at least."""
        device = self.model.attentions[index].device
        total = on(self.embed.to(accumulate_dtype(self.embed.dtype)), device)
        for layer, attention in enumerate(self.model.attentions[:index]):
            total = total + on(product(self.dz[layer].flatten(2), attention.w_send.flatten(0, 1)), device)
            total = total if self.mlp is None else total + on(self.mlp[layer], device)
        return total


class _Positions(Sink):
    """Adds a layer's edges when the last of its channels have their gradient."""

    def __init__(self, store: _Store) -> None:
        self.store = store

    def channels(self, part: Channels) -> Tensor:
        if part.channels.stop == part.attention.channels[2].stop:
            for name, scores in _edges(part, *self._moved(part), exact=self.store.method == "peap").items():
                self.add(self.store.totals[name][part.index], scores, part.read is not None)
        return part.total()

    def _moved(self, part: Channels) -> tuple[Tensor, Tensor, Tensor]:
        """Δ of q [B, H, Q, K] and of k [B, G, T, K] as the pattern takes them, and of v [B, G, T, K]."""
        attention, saved, read = part.attention, part.saved, part.read
        before = 0 if part.past is None else part.past.shape[1]
        kv = attention.n_kv
        wide = accumulate_dtype(saved.kv.dtype)
        q, k = saved.q.transpose(1, 2).to(wide), saved.kv[:, :, :kv].transpose(1, 2).to(wide)
        if self.store.method == "peap":
            moved_q, moved_kv = self.store.moved_qkv[part.index]
            dq, (dk, dv) = moved_q.transpose(1, 2).to(wide), moved_kv.transpose(1, 2).to(wide).split(kv, 1)
            other_q = attention.ready_queries(q + dq, before, read) - attention.ready_queries(q, before, read)
            return other_q, attention.ready_keys(k + dk, before) - attention.ready_keys(k, before), dv
        n = self.store.along(part.index, saved.norm_in)
        heads, plain = attention.n_heads, replace(attention, b_qkv=None)
        n = n.to(saved.kv.dtype)
        dq = plain.project(at_positions(n, read), slice(0, heads)).transpose(1, 2).to(wide)
        dk, dv = plain.project(n, slice(heads, heads + 2 * kv)).transpose(1, 2).to(wide).split(kv, 1)
        dq, dk = attention.along(attention.q_norm, dq, q), attention.along(attention.k_norm, dk, k)
        turn = replace(attention, q_norm=NO_NORM, k_norm=NO_NORM)
        return turn.ready_queries(dq, before, read), turn.ready_keys(dk, before), dv

    def add(self, total: Tensor, scores: Tensor, at_read: bool) -> None:
        """Add scores [B, H, Q, S] of the first S source positions, or of the last, to [H, T, T]."""
        batch, targets = self.store.batch, slice(self.store.batch.start, self.store.batch.stop)
        scores = on(scores, total.device)
        sources = slice(batch.stop - scores.shape[-1], batch.stop)
        if at_read:
            places = batch.pairs.positions
            total[:, sources].index_add_(2, places, scores[:, :, 0].permute(1, 2, 0).double())
        else:
            inside = torch.arange(batch.start, batch.stop, device=scores.device) <= batch.pairs.positions[:, None]
            scores = scores * inside[:, None, :, None]
            total[:, sources, targets] += scores.sum(0, dtype=torch.float64).transpose(1, 2)


def _edges(part: Channels, dq: Tensor, dk: Tensor, dv: Tensor, *, exact: bool) -> dict[str, Tensor]:
    """The edges of a layer, v and k [B, H, Q, T] and q [B, H, Q, P + T]."""
    attention, read, wide = part.attention, part.read, dv.dtype
    q, k, v = (x.to(wide) for x in attention.heads(part.saved.q, part.saved.kv, part.past, read))
    before, causal = k.shape[2] - part.saved.kv.shape[1], attention.causal
    scores = causal.scores(q, k, before, read)
    pattern = scores.softmax(-1)
    dz = part.dz.transpose(1, 2).to(wide)
    d = by_group(dz, v.transpose(-1, -2))
    whole, own = (pattern * d).sum(-1, keepdim=True), slice(before, None)
    found = {"v": pattern[..., own] * by_group(dz, dv.transpose(-1, -2))}
    by_key = by_group(q, dk.transpose(-1, -2)) * causal.scale
    if exact:
        other = causal.scores(q + dq, k, before, read).softmax(-1)
        found["q"] = (other - pattern) * d
        if (cap := causal.softcap) is not None:
            raw = by_group(q, k[:, :, own].transpose(-1, -2)) * causal.scale
            by_key = cap * (((raw + by_key) / cap).tanh() - (raw / cap).tanh())
        by_key = by_key.where(scores[..., own] > -torch.inf, 0.0)
        found["k"] = _one_key(by_key, scores, pattern, d, whole, own)
        return found
    slope = pattern * (d - whole)
    if causal.softcap is not None:
        slope = slope * (1 - (scores / causal.softcap).where(pattern > 0, 0.0) ** 2)
    by_query = by_group(dq, k.transpose(-1, -2)) * causal.scale
    return found | {"k": slope[..., own] * by_key, "q": slope * by_query}


def _one_key(moved: Tensor, scores: Tensor, pattern: Tensor, d: Tensor, whole: Tensor, own: slice) -> Tensor:
    """Σ_t′ (P′[t′] − P[t′]) d[t′] where the score of one key t alone, out of `own`, moves by δ[t], `moved`:

        (P′[t] − P[t]) (d[t] − Σ_{t′≠t} P[t′] d[t′] / Σ_{t′≠t} P[t′])

    With x the score less the logarithm of the others' Σ e^score, P[t] = σ(x), and P′[t] − P[t] is
    (e^δ − 1) σ(x) σ(−x − δ) or, where δ > 0, (1 − e^−δ) σ(x + δ) σ(−x). The others of a row's first key are summed up
    without it, since where it has nearly all of the pattern they would be rounding in the whole.
    whole: Σ_t′ P[t′] d[t′].
    """
    first = scores.argmax(-1, keepdim=True)
    lone = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, first, True)
    rest, pattern = scores.masked_fill(lone, -torch.inf), pattern.masked_fill(lone, 0.0)  # at most ½ anywhere else
    others = rest.logsumexp(-1, keepdim=True)  # −inf where there are none
    mean = (rest.softmax(-1) * d).sum(-1, keepdim=True).where(others > -torch.inf, 0.0)
    others = torch.where(lone, others, scores.logsumexp(-1, keepdim=True) + (-pattern).log1p())
    x = (scores - others)[..., own]
    difference = torch.where(lone, d - mean, (d - whole) / (1 - pattern))[..., own]
    size = (-moved.abs()).expm1()  # e^−|δ| − 1
    up, down = -size * (x + moved).sigmoid() * (-x).sigmoid(), size * x.sigmoid() * (-x - moved).sigmoid()
    return torch.where(moved > 0, up, down) * difference
