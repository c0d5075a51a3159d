"""Edges into q and k by the attention pattern that they would make, where first order would linearise the softmax.

    score[s, a_l.h<q>] = Σ_t ⟨pattern(q(v + Δ_s), k) − pattern(q, k), ∂metric/∂pattern⟩        and <k> alike

q(v + Δ_s) is the query that the head makes of its input with the edge's difference added, LayerNorm included. A query
changes its own row of the pattern; the keys of an edge change together at all positions. What the pattern then does to
the metric is first order. Short prompts go by `score_windows`, which makes no q nor k.

Source: Kramár, Lieberum, Shah, Nanda 2024 (AtP*), section 3.1.1, there for nodes q and k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from eapcore.attribution.exact_edges import widened
from eapcore.attribution.score_windows import Windows, pays
from eapcore.attribution.sums import Products, Store, Sums, unrounded
from eapcore.execution.limits import limits
from eapcore.execution.memory import budget
from eapcore.kernels.causal import by_group
from eapcore.models.attention import Attention, Channels
from eapcore.models.matmul import product
from eapcore.models.model import Model
from eapcore.models.tensors import accumulate_dtype

_SHARE = 8  # of the memory for a batch, the part that may go to products of weights


def place_for_products(model: Model) -> Products | None:
    """Where W_O W′ of all pairs of layers is kept from batch to batch, None where it would take too much memory, or of
    a model whose layers are not all on the CPU, where batches may be recorded."""
    if model.stream is not None or any(device.type != "cpu" for device in model.devices):
        return None
    size = model.config.d_head
    channels = [attention.channels[1].stop for attention in model.attentions]  # of q and k
    numbers = sum(model.config.n_heads * layer * size * count * size for layer, count in enumerate(channels))
    return {} if numbers * model.dtype.itemsize <= budget(model.device) // _SHARE else None


def add_exact(
    store: Store,
    sums: Sums,
    part: Channels,
    weight: float,
    reader: Callable[[torch.device], Attention] | None = None,
) -> None:
    """Add the scores of all edges into a layer's q and k receivers; part: one that has its v receivers. reader: the
    layer's attention on the device of senders that lie on another."""
    for which in range(len(sums.targets(True))):
        _add_exact(store, sums, part, weight, reader, which)


def _add_exact(
    store: Store,
    sums: Sums,
    part: Channels,
    weight: float,
    reader: Callable[[torch.device], Attention] | None,
    which: int,
) -> None:
    """`add_exact` to one of the targets of `sums`."""
    first = part.receivers.start - part.channels.start
    graph, kinds = store.model.graph, part.attention.channels[:2]
    short = part.read is not None  # where q is made at the positions read alone
    for at_read, mine in ((True, kinds[:1]), (False, kinds[1:])) if short else ((False, kinds),):
        name, reduce = sums.targets(at_read)[which]
        alone = store.embedded is not None and graph.senders_before(first) == 1
        by_key = reduce == "position" and mine[-1].start != 0
        if not by_key and pays(part, mine):
            _add_by_windows(store, sums, part, mine, weight, reader, at_read, (name, reduce))
            continue
        made: dict[torch.device, list[_Pattern]] = {}
        for senders, delta in store.deltas(at_read, graph.senders_before(first)):
            delta = unrounded(store, senders, delta, at_read) if alone else delta
            if delta.device not in made:
                away = reader is not None and delta.device != part.act.device
                there = part.on(delta.device, reader(delta.device), whole=True) if away and reader else part
                there = _unrounded_part(there) if alone else there
                made[delta.device] = [_Pattern(there, kind, reduce) for kind in mine]
            patterns = made[delta.device]
            factors = store.factors(senders, at_read)
            projected = [pattern.through_factors(delta, factors, store.products, senders.start) for pattern in patterns]
            for some in patterns[0].parts(delta):
                here = slice(senders.start + some.start, senders.start + some.stop)
                rstd = patterns[0].rstd(delta[some])
                for pattern, through in zip(patterns, projected, strict=True):
                    place = slice(first + pattern.channels.start, first + pattern.channels.stop)
                    block = pattern.scores(delta[some], None if through is None else [x[some] for x in through], rstd)
                    sums.add(name, block, (here, place), weight, at_read)


def _unrounded_part(part: Channels) -> Channels:
    """The same of half precision with q, k and v in float32, made from the stream anew."""
    wide, past = accumulate_dtype(part.dz.dtype), part.past
    attention = widened(part.attention, wide)
    return replace(
        part,
        attention=attention,
        saved=attention.read(part.saved.norm_in.x, part.read),
        constants=attention.closed_form(),
        dz=part.dz.to(wide),
        past=None if past is None else past.to(wide),
    )


def _add_by_windows(
    store: Store,
    sums: Sums,
    part: Channels,
    kinds: tuple[slice, ...],
    weight: float,
    reader: Callable[[torch.device], Attention] | None,
    at_read: bool,
    target: tuple[str, str],
) -> None:
    """Add the scores of all edges into some kinds of a layer's channels as `score_windows` has them."""
    first, (name, reduce) = part.receivers.start - part.channels.start, target
    over = {"all": [0, 1], "pair": [1], "position": [0]}[reduce]
    count, n = store.model.graph.senders_before(first), len(part.dz)
    made: dict[torch.device, Windows] = {}
    own = made[part.act.device] = Windows(part, kinds)
    most = limits(part.act.device).exact_numbers
    at_once = max(1, most // own.numbers(count))
    for pairs in (slice(start, min(start + at_once, n)) for start in range(0, n, at_once)):
        each = max(1, most // (own.scores * (pairs.stop - pairs.start)))
        for senders, delta in store.of_pairs(at_read, count, pairs):
            if delta.device not in made and reader is not None:
                made[delta.device] = Windows(part.on(delta.device, reader(delta.device), whole=True), kinds)
            for start in range(0, len(delta), each):
                some = delta[start : start + each]
                here = slice(senders.start + start, senders.start + start + len(some))
                for channels, found in made[delta.device].changes(some, pairs, sums.impl):
                    block = found.sum(over)  # [S, H], [b, S, H] or [T, S, H]
                    if channels.stop - channels.start < block.shape[-1]:
                        block = block.unflatten(-1, (-1, part.attention.group)).sum(-1)
                    place = slice(first + channels.start, first + channels.stop)
                    sums.add(name, block, (here, place), weight, at_read, pairs)


class _Pattern:
    """A layer's pattern, and what edges into all of its q heads, or all of its k heads, change in it.

    With σ that of the norm's input x, and σ_s that of x + Δ_s, the activations a become

        a_s = offset + (a − offset) σ/σ_s + Δ_s W′/σ_s,    W′ = (1 − 11ᵀ/D) diag(γ) W,  offset = b + Wᵀβ

    (RMSNorm without the mean). For a head's Δ = Δz W_O a product of Δz [B·T, K] with W_O W′ [K, C·K] takes the place of
    one of Δ [B·T, D] with W′ where that is less work.

    With reduce="position" a query's scores are those of its own position, and keys' those of the positions of the keys,
    see `_key_by_key`.

    part: what the backward pass made of the layer. channels: all of its q heads, or all of its k heads. reduce: "all",
    "pair" or "position".
    """

    def __init__(self, part: Channels, channels: slice, reduce: str) -> None:
        self.part, self.channels, self.queries = part, channels, channels.start == 0
        attention, self.read = part.attention, part.read
        self.attention, self.joint, self.reduce = attention, attention.joint, reduce
        self.norm_in = part.saved.norm_in.at(self.read) if self.queries else part.saved.norm_in
        self.wide = accumulate_dtype(part.dz.dtype)
        self.q, self.k, v = attention.heads(part.saved.q, part.saved.kv, part.past, self.read)
        self.before = self.k.shape[2] - part.saved.kv.shape[1]
        self.d = by_group(part.dz.transpose(1, 2).to(self.wide), v.to(self.wide).transpose(-1, -2))
        self.by_key = reduce == "position" and not self.queries
        # The projections behind the channels: their activations [B, T, C, K], offsets [C, K] and W′ [D, C·K].
        n_kv = attention.n_kv
        act = part.saved.q if self.queries else part.saved.kv[:, :, :n_kv]
        each = 1 if self.queries or attention.grouped else attention.group
        self.offset = part.constants[1][channels][::each].to(self.wide)
        at_rest = act.to(self.wide)
        # Of what is not rounded between activations and scores, as those of the edges.
        self.known = self._scores(at_rest.transpose(1, 2)[None])[0]
        self.pattern = self.known.softmax(-1)  # [B, H, Q, P + T]
        self.moved = at_rest - self.offset  # (x − μ) W′ without σ
        if self.norm_in.rstd is not None:
            self.moved = self.moved / self.norm_in.rstd[..., None]
        places = slice(attention.projection(channels.start), attention.projection(channels.stop - 1) + 1)
        self.places, norm = places, attention.norm
        weights = [norm.frozen_weight(w) if norm.kind != "none" else w for w in attention.weights(places)]
        self.weight = torch.cat([w.transpose(0, 1).flatten(1) for w in weights], 1)

    def parts(self, delta: Tensor) -> Iterator[slice]:
        """Senders of delta [S', B, T, D] that go together."""
        size = max(self.pattern.numel(), self.moved.numel(), delta[0].numel())
        at_once = max(1, limits(delta.device).exact_numbers // size)
        yield from (slice(start, min(start + at_once, len(delta))) for start in range(0, len(delta), at_once))

    def through_factors(
        self, delta: Tensor, factors: tuple[Tensor, Tensor] | None, kept: Products | None, first: int
    ) -> tuple[Tensor, Tensor] | None:
        """Δz [S', B·T, K] and W_O W′ [S', K, C·K], where products through them are fewer operations; factors: of heads
        their Δz [B, T, S', K] and what makes Δ of it, [S', K, D]. kept: where W_O W′ is kept. first: the first of these
        senders."""
        if factors is None:
            return None
        dz, w_send = factors
        rows, (size, width) = delta[0].numel() // delta.shape[-1], w_send.shape[1:]
        if size * (width + rows) >= rows * width:
            return None
        place = first, self.part.receivers.start + self.channels.start
        through = None if kept is None else kept.get(place)
        if through is None:
            through = product(w_send.flatten(0, 1), self.weight).unflatten(0, w_send.shape[:2])
            if kept is not None:
                kept[place] = through
        return dz.flatten(0, 1).transpose(0, 1), through

    def rstd(self, delta: Tensor) -> Tensor | None:
        """1/σ_s [S', B, T, 1] of the norm's input with some senders' differences; None without a norm."""
        norm = self.attention.norm
        return None if norm.kind == "none" else norm.rstd(self.norm_in.x + delta)

    def scores(self, delta: Tensor, factors: list[Tensor] | None, rstd: Tensor | None) -> Tensor:
        """[S', H], [B, S', H] or [T, S', H] of some senders, from their delta [S', B, T, D], at the positions that are
        read for q of the last layer, or from factors."""
        made = self._activations(delta, factors, rstd)
        if self.joint:
            found = self._jointly_normed(made)
        else:
            found = self._changed(made)
            if not self.queries and self.attention.grouped:
                found = found.unflatten(2, (-1, self.attention.group)).sum(3)
        if self.by_key:
            found = found[self.before :]
        return found.sum(0) if self.reduce == "all" else found

    def _activations(self, delta: Tensor, factors: list[Tensor] | None, rstd: Tensor | None) -> Tensor:
        """a_s of some senders, [S', B, C, T, K]."""
        if factors is None:
            made = product(delta, self.weight)
        else:
            dz, through = factors
            dz = dz if rstd is None else (dz * rstd.flatten(1, 2)).to(dz.dtype)
            made = torch.bmm(dz, through).view(*delta.shape[:3], -1)
        made = made.to(self.wide).unflatten(-1, self.offset.shape)  # [S', B, T, C, K]
        if rstd is None:
            made += self.moved + self.offset
        elif factors is None:
            made += self.moved
            made *= rstd[..., None]
            made += self.offset
        else:  # of which Δz is divided already
            made.addcmul_(self.moved, rstd[..., None])
            made += self.offset
        return made.transpose(2, 3)

    def _scores(self, made: Tensor) -> Tensor:
        """Attention scores [S', B, H, Q, P + T] of the channels' activations [S', B, H or G, T, K]."""
        attention, before, read = self.attention, self.before, self.read
        if self.queries:
            queries = attention.ready_queries(made, before, read)
            return attention.causal.scores(queries, self.k.to(made.dtype), before, read)
        front = self.k[:, :, :before].to(made.dtype)
        front = front.repeat_interleave(made.shape[2] // self.k.shape[1], 1).expand(len(made), -1, -1, -1, -1)
        ready = attention.ready_keys(made, before)
        keys = torch.cat([front, ready], 3) if before else ready  # [S', B, G, P + T, K]
        return attention.causal.scores(self.q.to(made.dtype), keys, before, read)

    def _changed(self, made: Tensor, summed: bool = False) -> Tensor:
        """[B or T, S', H] from the channels' activations [S', B, H or G, T, K], or summed over the heads."""
        change = self._change(self._scores(made))  # [S', B, H, Q, P + T]
        change = change.sum(2) if summed else change
        if self.reduce != "position":
            return change.sum((-2, -1)).transpose(0, 1)
        return change.sum((1, -1 if self.queries else -2)).movedim(-1, 0)

    def _change(self, other: Tensor) -> Tensor:
        """What the pattern of other scores changes, by key."""
        if self.by_key:
            return _key_by_key(self.known, other, self.d)
        return (other.softmax(-1) - self.pattern) * self.d

    def _jointly_normed(self, made: Tensor) -> Tensor:
        """Scores [B or T, S', C'] where q and k are normed with those of all heads: an edge into one changes every
        head's pattern. made: the activations of all heads' own streams, [S', B, C, T, K]."""
        part, count = self.part, self.channels.stop - self.channels.start
        act = part.saved.q if self.queries else part.saved.kv[:, :, : self.attention.n_kv]
        shared = count // act.shape[2]  # query heads of a key that each have a receiver
        at_rest = act.to(self.wide).transpose(1, 2).repeat_interleave(shared, 1)  # [B, C', T, K]
        found = []
        for channel in range(count):
            others = at_rest.expand(len(made), *at_rest.shape).clone()
            others[:, :, channel] = made[:, :, channel // shared]
            found.append(self._changed(others, summed=True))
        return torch.stack(found, -1)


def _key_by_key(
    known: Annotated[Tensor, "B H Q N"], other: Annotated[Tensor, "S B H Q N"], d: Annotated[Tensor, "B H Q N"]
) -> Annotated[Tensor, "S B H Q N"]:
    """What each key t does to Σ_n pattern_n d_n where the scores `known` become `other` one key after another: the mean
    of what it does from the first key on and of what it does from the last one on.

    They add up to Σ_n (pattern′_n − pattern_n) d_n, none is larger than d's span, and a key whose score stays has
    0; to first order they are the gradient's. In float64, whose exponents hold all weights beside each other.
    """
    highest = torch.maximum(known, other).amax(-1, keepdim=True)
    old, new = ((x - highest).double().exp() for x in (known.expand_as(other), other))
    weighted = [torch.stack([x * d, x]) for x in (old, new)]

    # A sum over all keys up to each; what torch has for it is refused on a GPU that shall be deterministic.
    up_to = old.new_ones(old.shape[-1], old.shape[-1]).triu()

    def means(first: Tensor, last: Tensor) -> Tensor:
        """[.., N + 1], Σ weight d / Σ weight with the first 0 … N keys' weights of one, the others' of the other."""
        front, back = first @ up_to, last @ up_to.T
        total, weight = F.pad(front, (1, 0)) + F.pad(back, (0, 1))
        return total / weight.clamp_min(torch.finfo(torch.float64).tiny)

    return (means(weighted[1], weighted[0]).diff(dim=-1) - means(*weighted).diff(dim=-1)) / 2
