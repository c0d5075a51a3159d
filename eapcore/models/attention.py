"""Attention: what its heads read and send, and the gradients of its q, k and v inputs.

Letters: H query heads, G key and value heads (H where queries are not grouped), C channels, which are receivers (the q,
then the k, then the v heads: H + 2H, or H + 2G where a group's heads share one), K d_head, P positions of a past, T
tokens behind it, Q of them that are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Annotated

import torch
from torch import Tensor

import eapcore.kernels as kernels
from eapcore.graph.show import short
from eapcore.kernels.attention import (
    attend,
    attend_grad,
    attend_moved,
    empty_grads,
    empty_sums,
    receiver_sums,
    value_grad,
)
from eapcore.kernels.causal import Causal, ReceiverSums
from eapcore.kernels.steps import takes_triton
from eapcore.models.backward_rules import GRADIENT, Rules
from eapcore.models.matmul import product, product_added
from eapcore.models.norm import NO_NORM, Norm, NormInput
from eapcore.models.rotary import Rotary
from eapcore.models.tensors import accumulate_dtype, as_matrix, at_positions, moved, on, tensors_in


@dataclass(frozen=True, slots=True)
class AttentionSaved:
    """What the way back needs: what the normalisation read, and the activations of the channels.

    qkv: [B, T, H + 2G, K]; where only Q positions are read, q [B, Q, H, K] and the others [B, T, 2G, K] apart. post_in:
    what the norm behind the heads read, [B, Q, D], where there is one.
    """

    norm_in: NormInput
    qkv: tuple[Tensor, ...]
    n_heads: int
    post_in: NormInput | None = None

    @property
    def q(self) -> Annotated[Tensor, "B Q H K"]:
        return self.qkv[0][:, :, : self.n_heads]

    @property
    def kv(self) -> Annotated[Tensor, "B T 2G K"]:
        """The k and then the v heads."""
        return self.qkv[1] if len(self.qkv) == 2 else self.qkv[0][:, :, self.n_heads :]

    def of(self, take: Callable[[Tensor], Tensor]) -> AttentionSaved:
        """The same of what `take` takes of each tensor."""
        post_in = None if self.post_in is None else self.post_in.of(take)
        return AttentionSaved(self.norm_in.of(take), tuple(take(t) for t in self.qkv), self.n_heads, post_in)


@dataclass(frozen=True, slots=True)
class AttentionRun:
    """saved, and z [B, Q, H, K], the heads' mixtures of v in float32 at least: head h sends z[:, :, h] @ w_send[h].

    Behind a norm σ is the run's own, of what all heads make together, and z is divided by it.
    """

    saved: AttentionSaved
    z: Annotated[Tensor, "B Q H K"]


@dataclass(frozen=True, slots=True)
class Attention:
    """All heads of a layer, which read one normalised stream n.

        q, k, v = n W + b        z = softmax(q kᵀ · scale, causal) v        head h sends z_h W_O[h]

    norm: what they read through. w_qkv: weights [·, D, K] that together are the q, the k and the v heads in that order:
    one where a checkpoint stores them as one matrix, three where it stores three; strided views will do. b_qkv:
    [H + 2G, K]. w_o: [H, K, D]. b_o: [D]. scale: of q·k. rotary, q_norm, k_norm: what q and k go through, the norms
    first, between their projection and the pattern; receivers' activations and gradients are those before. joint: these
    norms are of all heads' q, and of all their k, together, [H·K] and [G·K]; where each query head has a k receiver of
    its own, of the H keys, [H·K], with a group's γ once for each. softcap: scores s become softcap · tanh(s / softcap).
    window: how many positions a query sees, itself the last. grouped: the query heads of a group have one k and one v
    receiver, instead of one each. post: a norm γ∘Σ_h z_h W_O[h]/σ of what all heads make together; head h then sends
    γ∘(z_h W_O[h])/σ. None is what a model does not have.
    """

    __repr__ = short

    norm: Norm
    w_qkv: tuple[Annotated[Tensor, "C' D K"], ...]
    b_qkv: Annotated[Tensor, "C K"] | None
    w_o: Annotated[Tensor, "H K D"]
    b_o: Annotated[Tensor, "D"] | None
    scale: float
    rotary: Rotary | None = None
    q_norm: Norm = NO_NORM
    k_norm: Norm = NO_NORM
    joint: bool = False
    softcap: float | None = None
    window: int | None = None
    grouped: bool = False
    post: Norm = NO_NORM

    @property
    def n_heads(self) -> int:
        return self.w_o.shape[0]

    @property
    def n_kv(self) -> int:
        """Key and value heads."""
        return (sum(len(w) for w in self.w_qkv) - self.n_heads) // 2

    @property
    def group(self) -> int:
        """Query heads for each key and value head."""
        return self.n_heads // self.n_kv

    @property
    def channels(self) -> tuple[slice, slice, slice]:
        """Which channels are the q, the k and the v receivers."""
        heads, count = self.n_heads, self.n_kv if self.grouped else self.n_heads
        return slice(0, heads), slice(heads, heads + count), slice(heads + count, heads + 2 * count)

    @property
    def device(self) -> torch.device:
        return self.w_o.device

    def named(self) -> Iterator[tuple[str, Tensor | None]]:
        """Its own weights, without those of the normalisation of its input."""
        yield from ((f"w_qkv.{i}", w) for i, w in enumerate(self.w_qkv))
        yield from (("b_qkv", self.b_qkv), ("w_o", self.w_o), ("b_o", self.b_o))
        yield from (("q_norm.0", self.q_norm.gamma), ("k_norm.0", self.k_norm.gamma), ("post_a.0", self.post.gamma))

    @property
    def w_send(self) -> Annotated[Tensor, "H K D"]:
        """What makes of a run's z what the heads send."""
        return self.w_o if self.post.gamma is None else (self.w_o * self.post.gamma).to(self.w_o.dtype)

    def projection(self, channel: int) -> int:
        """Which of the H + 2G projections a channel reads through."""
        heads = self.n_heads
        if channel < heads or self.grouped or self.group == 1:
            return channel
        part, head = divmod(channel - heads, heads)
        return heads + part * self.n_kv + head // self.group

    def reading_on(self, device: torch.device) -> Attention:
        """The same with what it reads by on another device; what it sends by stays."""
        there = moved(replace(self, w_o=self.w_o[:0], b_o=None, post=NO_NORM), device)
        return replace(there, w_o=self.w_o, b_o=self.b_o, post=self.post)

    # Forward

    def weights(self, projections: slice) -> list[Annotated[Tensor, "C' D K"]]:
        """The weights of some of the projections, as views."""
        groups, start = [], 0
        for w in self.w_qkv:
            first, last = max(projections.start - start, 0), min(projections.stop - start, w.shape[0])
            if first < last:
                groups.append(w[first:last])
            start += w.shape[0]
        return groups

    def groups(self, channels: slice) -> list[Annotated[Tensor, "C' D K"]]:
        """The weights of some channels, as views: a key or value head's once for each query head of its group."""
        if self.grouped or self.group == 1:
            return self.weights(channels)
        found = self.weights(slice(channels.start, min(channels.stop, self.n_heads)))
        others = range(max(channels.start, self.n_heads), channels.stop)
        for place, same in groupby(others, key=self.projection):
            found.append(self.weights(slice(place, place + 1))[0].expand(len(list(same)), -1, -1))
        return found

    def shared_groups(self, channels: slice) -> list[Annotated[Tensor, "C' D K"]]:
        """The weights of some kinds of channels, all q, all k or all v, as views; a key or value head's once."""
        kinds = [kind for kind in self.channels if channels.start <= kind.start and kind.stop <= channels.stop]
        places = [slice(self.projection(kind.start), self.projection(kind.stop - 1) + 1) for kind in kinds]
        return [w for place in places for w in self.weights(place)]

    def project(
        self, n: Annotated[Tensor, "B T D"], projections: slice, out: Annotated[Tensor, "1 N C'K"] | None = None
    ) -> Annotated[Tensor, "B T C' K"]:
        """The activations of some of the projections; out: where they go, of rows that are one batch."""
        parts, first = [], projections.start
        d_head = self.w_o.shape[1]
        for w in self.weights(projections):
            bias = None if self.b_qkv is None else self.b_qkv[first : first + len(w)]
            first += len(w)
            matrix = as_matrix(w)
            if matrix is not None:
                done = (first - len(w) - projections.start) * d_head
                room = None if out is None else out[..., done : done + matrix.shape[1]]
                part = product(n, matrix, None if bias is None else bias.flatten(), room)
                part = part.unflatten(-1, (len(w), d_head))
            else:
                part = (n.flatten(0, 1) @ w).transpose(0, 1).unflatten(0, n.shape[:2])
                part = part if bias is None else part + bias
                if out is not None:
                    done = (first - len(w) - projections.start) * d_head
                    out[..., done : done + len(w) * d_head] = part.flatten(2)
            parts.append(part)
        if out is not None:
            return out.unflatten(-1, (-1, d_head))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def read(
        self,
        x: Annotated[Tensor, "B T D"],
        read: Annotated[Tensor, "int64 B Q"] | None = None,
        ready: tuple[Tensor, NormInput] | None = None,
        room: Callable[[str, int], Tensor | None] = lambda name, width: None,
    ) -> AttentionSaved:
        """The activations of all projections from the residual stream; of q at the positions read alone.

        ready: what the norm makes of the stream, where it is there. room: called with a name and (H + 2G)·K, where what
        is made of all tokens [1, N, (H + 2G)·K] goes, None for anywhere.
        """
        heads, end = self.n_heads, self.n_heads + 2 * self.n_kv
        n, norm_in = self.norm.forward(x, self.w_o.dtype) if ready is None else ready
        if read is None:
            return AttentionSaved(
                norm_in, (self.project(n, slice(0, end), room("qkv", end * self.w_o.shape[1])),), heads
            )
        q = self.project(at_positions(n, read), slice(0, heads))
        return AttentionSaved(norm_in, (q, self.project(n, slice(heads, end))), heads)

    def forward(
        self,
        x: Annotated[Tensor, "B T D"],
        past: Annotated[Tensor, "B P 2G K"] | None = None,
        read: Annotated[Tensor, "int64 B Q"] | None = None,
    ) -> AttentionRun:
        """What the heads make of the residual stream; keys and values alone at positions that are not read."""
        saved = self.read(x, read)
        return self.behind_post(saved, self.mix(saved.q, saved.kv, past, read))

    def behind_post(self, saved: AttentionSaved, z: Annotated[Tensor, "B Q H K"]) -> AttentionRun:
        """The run of mixtures, divided by σ where there is a norm behind the heads."""
        if self.post.kind == "none":
            return AttentionRun(saved, z)
        _, post_in = self.post.forward(self.made_by(z))
        assert post_in.rstd is not None
        return AttentionRun(replace(saved, post_in=post_in), z * post_in.rstd[..., None])

    def made_by(self, z: Annotated[Tensor, "B Q H K"]) -> Annotated[Tensor, "B Q D"]:
        """What all heads make together of their mixtures, in front of the norm behind them."""
        return product(z.flatten(2).to(self.w_o.dtype), self.w_o.flatten(0, 1), self.b_o)

    def mix(
        self, q: Tensor, kv: Tensor, past: Tensor | None = None, read: Tensor | None = None
    ) -> Annotated[Tensor, "B Q H K"]:
        """The heads' mixtures of v from q [B, Q, H, K] and kv [B, T, 2G, K]; also of some heads alone."""
        return self.mixtures(*self.heads(q, kv, past, read), kv.shape[1], read).transpose(1, 2)

    def mix_into(
        self, out: Annotated[Tensor, "B Q H K"], q: Tensor, kv: Tensor, past: Tensor | None, read: Tensor | None
    ) -> None:
        """`mix` rounded to out's dtype, where the heads' product with W_O reads it."""
        attend(*self.heads(q, kv, past, read), self.causal, kv.shape[1], read, out)

    def mix_moved(
        self, out: Annotated[Tensor, "2B Q H K"], q: Tensor, kv: Tensor, past: Tensor | None, read: Tensor | None
    ) -> None:
        """`mix` of B prompts, and of as many behind them what they have more, rounded once to out's dtype."""
        attend_moved(*self.heads(q, kv, past, read), self.causal, kv.shape[1], read, out)

    def heads(
        self, q: Tensor, kv: Tensor, past: Tensor | None, read: Tensor | None
    ) -> tuple[Annotated[Tensor, "B H Q K"], Annotated[Tensor, "B G P+T K"], Annotated[Tensor, "B G P+T K"]]:
        """q, k and v as the pattern takes them: heads first, k and v behind their past, q and k normed and turned.

        Several runs of the same prompts one after the other along B share one past.
        """
        both = kv
        if past is not None:
            before = past.shape[1]
            both = kv.new_empty(len(kv), before + kv.shape[1], *kv.shape[2:])
            both[:, :before].unflatten(0, (-1, len(past))).copy_(past)
            both[:, before:] = kv
        k, v = both.transpose(1, 2).chunk(2, 1)
        before = k.shape[2] - kv.shape[1]
        plain = self.q_norm.kind == self.k_norm.kind == "none"
        if self.rotary is not None and plain and past is None and read is None and takes_triton("auto", q):
            joined = _joined(q, kv[:, :, : self.n_kv])
            if joined is not None:  # one kernel turns both
                q, k = self.rotary.turn(joined.transpose(1, 2), 0).tensor_split([q.shape[2]], 1)
                return q, k, v
        return self.ready_queries(q.transpose(1, 2), before, read), self.ready_keys(k, 0), v

    def ready_queries(self, q: Tensor, before: int, read: Tensor | None) -> Tensor:
        """Queries [..., H, Q, K] behind `before` positions, normed and turned."""
        q = self.normed(self.q_norm, q)
        return q if self.rotary is None else self.rotary.turn(q, before, read)

    def ready_keys(self, k: Tensor, before: int) -> Tensor:
        """Keys [..., G, T, K] behind `before` positions, normed and turned."""
        k = self.normed(self.k_norm, k)
        return k if self.rotary is None else self.rotary.turn(k, before)

    def normed(self, norm: Norm, x: Annotated[Tensor, "... C T K"]) -> Annotated[Tensor, "... C T K"]:
        """Queries or keys of all heads through the norm of them; C may be H for keys, a group's once for each query."""
        norm, x = self._over(norm, x)
        return self._apart(norm.forward(x)[0])

    def along(self, norm: Norm, moved: Tensor, x: Annotated[Tensor, "... C T K"]) -> Annotated[Tensor, "... C T K"]:
        """How what `normed` makes of x moves to first order where x moves by so much."""
        if norm.kind == "none":
            return moved
        norm, x = self._over(norm, x)
        return self._apart(norm.along(self._over(norm, moved)[1], norm.forward(x)[1]))

    def _normed_back(self, norm: Norm, grad: Tensor, x: Tensor, rule: str) -> Annotated[Tensor, "... C T K"]:
        """∂metric/∂x from that of `normed`, of all heads, both [..., C, T, K]; rule: of `Rules.norm`."""
        if norm.kind == "none":
            return grad
        norm, x = self._over(norm, x)
        return self._apart(norm.backward(self._over(norm, grad)[1], norm.forward(x)[1], rule))

    def _over(self, norm: Norm, x: Annotated[Tensor, "... C T K"]) -> tuple[Norm, Tensor]:
        """A norm of q or k and what it takes of them: a joint one [..., T, C·K], with γ once for each of C heads."""
        if not self.joint:
            return norm, x
        x = x.transpose(-3, -2).flatten(-2)
        if norm.gamma is not None and len(norm.gamma) != x.shape[-1]:
            size = x.shape[-1] // len(norm.gamma)
            norm = replace(norm, gamma=norm.gamma.view(self.n_kv, -1).repeat_interleave(size, 0).flatten())
        return norm, x

    def _apart(self, x: Tensor) -> Annotated[Tensor, "... C T K"]:
        """What `_over` joined."""
        return x.unflatten(-1, (-1, self.w_o.shape[1])).transpose(-3, -2) if self.joint else x

    def mixtures(self, q: Tensor, k: Tensor, v: Tensor, tokens: int, read: Tensor | None) -> Tensor:
        """softmax(..) v [B, H, Q, K] from q [B, H, Q, K], k and v [B, G, P + T, K]; tokens is T.

        In float32 at least and not rounded to half precision, so that mixtures can be subtracted before they are.
        """
        return attend(q, k, v, self.causal, tokens, read)

    @property
    def causal(self) -> Causal:
        """How queries see keys."""
        return Causal(self.scale, self.window, self.softcap)

    def added(self, run: AttentionRun) -> Annotated[Tensor, "B Q D"]:
        """What all heads add to the residual stream together, the bias included."""
        return self.added_by(run.z)

    def added_by(self, z: Annotated[Tensor, "B Q H K"]) -> Annotated[Tensor, "B Q D"]:
        """The same from a run's z."""
        return product(z.flatten(2).to(self.w_o.dtype), self.w_send.flatten(0, 1), self.b_o)

    def send(
        self, z: Annotated[Tensor, "B Q H K"], out: Annotated[Tensor, "H B Q D"] | None = None
    ) -> Annotated[Tensor, "H B Q D"]:
        """What each head sends of a run's z, written into `out` where it is given."""
        rows = z.to(self.w_o.dtype).flatten(0, 1).transpose(0, 1)  # [H, B·Q, K]
        if out is None:
            return (rows @ self.w_send).unflatten(1, z.shape[:2])
        torch.bmm(rows, self.w_send, out=out.view(self.n_heads, -1, self.w_o.shape[2]))
        return out

    # Backward

    def closed_form(self) -> tuple[Annotated[Tensor, "C K"], Annotated[Tensor, "C K"]]:
        """(Wᵀγ, b + Wᵀβ) of all channels: constants of the weights in the receivers' gradients."""
        sizes = [len(w) for w in self.w_qkv]
        biases = [None] * len(sizes) if self.b_qkv is None else self.b_qkv.split(sizes)
        norm = self.norm
        groups = [
            kernels.receiver_constants(w, b, norm.gamma, norm.beta) for w, b in zip(self.w_qkv, biases, strict=True)
        ]
        constants = torch.cat([g for g, _ in groups]), torch.cat([o for _, o in groups])
        if self.grouped or self.group == 1:
            return constants
        places = [self.projection(channel) for channel in range(self.channels[2].stop)]
        return constants[0][places], constants[1][places]

    def backward(
        self,
        saved: AttentionSaved,
        grad: Annotated[Tensor, "B Q D"],
        constants: tuple[Tensor, Tensor],
        *,
        index: int,
        receivers: slice,
        past: Tensor | None,
        read: Tensor | None,
        rules: Rules,
    ) -> Iterator[Channels]:
        """The channels with a gradient, from that of the residual stream behind the layer's attention.

        In one piece if they have it at the same positions; the last piece is always one at all positions. constants: of
        `closed_form`. index, receivers: the layer's, and its q, k and v receivers'.
        """
        grad = grad.to(self.w_o.dtype)
        if saved.post_in is not None:
            grad = self.post.backward(grad, saved.post_in, rules.norm)
        dz = product(grad, self.w_o.flatten(0, 1).T).unflatten(-1, self.w_o.shape[:2])
        del grad  # which its caller has done with
        of_q, of_k, of_v = self.channels

        def piece(
            channels: slice, act: Tensor, g: Tensor, at_read: bool = False, sums: Tensor | None = None
        ) -> Channels:
            norm_in = saved.norm_in.at(read) if at_read else saved.norm_in
            place = slice(receivers.start + channels.start, receivers.start + channels.stop)
            return Channels(
                self, constants, index, channels, place, norm_in, act, g, at_read, rules, saved, dz, past, read, sums
            )

        if rules.attention == "frozen":
            q, k, v = self.heads(saved.q, saved.kv, past, read)
            before = k.shape[2] - saved.kv.shape[1]
            pattern = self.causal.pattern(q, k, before, read)
            dv = self._of_channels(value_grad(pattern, dz.transpose(1, 2), before)).transpose(1, 2)
            del pattern, q, k, v
            yield piece(of_v, saved.kv[:, :, self.n_kv :], dv)
            return
        out, sums = None, None
        if read is None and of_v.stop == 3 * self.n_heads:
            out = empty_grads(saved.q, dz)
        if out is not None and self._sums_with_grads(rules):
            room, (w_gamma, offset) = empty_sums(out, self.w_o.shape[2]), constants
            centred = self.norm.kind == "layernorm"
            if room is not None:
                sums = ReceiverSums(room, w_gamma if centred else None, offset, self.w_o.shape[2])
        dq, dk, dv = self.grads(saved, dz, past, read, rules, out, sums)
        dk, dv = self._of_channels(dk), self._of_channels(dv)
        if read is None:
            g = torch.cat([x.transpose(1, 2) for x in (dq, dk, dv)], 2) if out is None else out
            del dq, dk, dv
            yield piece(slice(0, of_v.stop), saved.qkv[0], g, sums=None if sums is None else sums.out)
            return
        yield piece(of_q, saved.q, dq.transpose(1, 2), at_read=True)
        beside = _joined(dk.transpose(1, 2), dv.transpose(1, 2))
        g = torch.cat([x.transpose(1, 2) for x in (dk, dv)], 2) if beside is None else beside
        del dq, dk, dv
        yield piece(slice(of_k.start, of_v.stop), saved.kv, g)

    def _sums_with_grads(self, rules: Rules) -> bool:
        """Whether c1 and c2 of the receivers follow from q and k as attention reads them.

        Turning q and k and their gradients together leaves ⟨g, act⟩ as it is, and neither ⟨g, w_gamma⟩ nor ⟨g, offset⟩.
        """
        if self.norm.kind == "none" or not self.q_norm.kind == self.k_norm.kind == "none":
            return False
        if rules.norm != "gradient" or rules.temperature != 1 or rules.products != "gradient":
            return False
        nothing_added = self.norm.kind == "rmsnorm" and self.norm.beta is None and self.b_qkv is None
        return self.rotary is None or nothing_added

    def _of_channels(self, grad: Annotated[Tensor, "B H T K"]) -> Annotated[Tensor, "B C' T K"]:
        """Gradients of k or v for each query head as those of the receivers."""
        return grad.unflatten(1, (self.n_kv, self.group)).sum(2) if self.grouped and self.group > 1 else grad

    def of_each(self, kv: Annotated[Tensor, "B T C' K"]) -> Annotated[Tensor, "B T C'' K"]:
        """Activations of key and value heads as those of the receivers."""
        return kv if self.grouped or self.group == 1 else kv.repeat_interleave(self.group, 2)

    def grads(
        self,
        saved: AttentionSaved,
        dz: Annotated[Tensor, "B Q H K"],
        past: Tensor | None,
        read: Tensor | None,
        rules: Rules = GRADIENT,
        out: Annotated[Tensor, "B T 3H K"] | None = None,
        sums: ReceiverSums | None = None,
    ) -> tuple[Annotated[Tensor, "B H Q K"], Annotated[Tensor, "B H T K"], Annotated[Tensor, "B H T K"]]:
        """∂metric/∂q, ∂metric/∂k and ∂metric/∂v before the norms and the turn, k and v for each query head; dz is
        ∂metric/∂z. out: where they go, beside each other; sums: what the receivers read beside them."""
        q, k, v = self.heads(saved.q, saved.kv, past, read)
        dz = dz.transpose(1, 2)  # [B, H, Q, K]
        tokens = saved.kv.shape[1]
        made = attend_grad(q, k, v, dz, self.causal, tokens, read, out, sums=sums, temperature=rules.temperature)
        if rules.products == "halved":  # of q and k twice: theirs, and the pattern's with v
            for x, share in zip(made, (0.25, 0.25, 0.5), strict=True):
                x.mul_(share)
        dq, dk, dv = made
        before = k.shape[2] - tokens
        plain = self.q_norm.kind == self.k_norm.kind == "none"
        if self.rotary is not None and out is not None and plain:  # q and k lie beside each other
            both = out[:, :, : 2 * self.n_heads].transpose(1, 2)
            self.rotary.back(both, before, out=both)
        elif self.rotary is not None:
            dq, dk = self.rotary.back(dq, before, read), self.rotary.back(dk, before)
        dq = self._normed_back(self.q_norm, dq, saved.q.transpose(1, 2), rules.norm)
        if self.k_norm.kind != "none":
            raw = saved.kv[:, :, : self.n_kv].transpose(1, 2).repeat_interleave(self.group, 1)  # [B, H, T, K]
            dk = self._normed_back(self.k_norm, dk, raw, rules.norm)
        if out is not None:
            for to, x in zip(made[:2], (dq, dk), strict=True):
                if x is not to:
                    to.copy_(x)
            return made
        return dq, dk, dv

    def behind(self, channel: int) -> range:
        """The heads that are made of what a channel reads."""
        if channel < self.n_heads or not self.grouped:
            return range(channel % self.n_heads, channel % self.n_heads + 1)
        first = (channel - self.n_heads) % self.n_kv * self.group
        return range(first, first + self.group)

    def moved_by(self, channel: int) -> range:
        """The heads that mix otherwise where a channel reads something else: all, where it is normed with theirs."""
        joint = self.joint and channel < self.channels[1].stop
        return range(self.n_heads) if joint else self.behind(channel)


@dataclass(frozen=True, slots=True)
class Channels:
    """Some of a layer's q, k and v receivers, and what their gradients are made of.

    constants: (Wᵀγ, b + Wᵀβ) of all of the layer's. index: the layer. channels: which of its C; receivers: which of
    the graph's. norm_in: what their normalisation read. act: [B, T, ·, K] the activations of the projections that they
    read through, one for each group of query heads. g: [B, T, C', K] ∂metric/∂ of their activations. With
    at_read T is Q: the gradient is zero but at the positions that are read. saved: what the forward pass kept of the
    layer. dz: [B, Q, H, K] ∂metric/∂(the heads' mixtures of v). past: [B, P, 2G, K] or None; read: [B, Q] or
    None, see `Attention.forward`. sums: [C', 2, B, T] of `kernels.receiver_grads`, where they were made with g.
    """

    attention: Attention
    constants: tuple[Tensor, Tensor]
    index: int
    channels: slice
    receivers: slice
    norm_in: NormInput
    act: Tensor
    g: Tensor
    at_read: bool
    rules: Rules
    saved: AttentionSaved
    dz: Tensor
    past: Tensor | None
    read: Tensor | None
    sums: Tensor | None = None

    def of(self, pairs: slice | Tensor) -> Channels:
        """The same of some of the batch's pairs, of a slice as views, without sums; saved, dz, past and read stay those
        of all."""
        norm_in = self.norm_in.of(lambda x: x[pairs])
        return replace(self, norm_in=norm_in, act=self.act[pairs], g=self.g[pairs], sums=None)

    def on(self, device: torch.device, attention: Attention, *, whole: bool = False) -> Channels:
        """The same on another device, with the attention as `reading_on` it; whole: also what `grads` does not need."""

        def there(x: Tensor) -> Tensor:
            return on(x, device)

        part = replace(
            self,
            attention=attention,
            constants=(there(self.constants[0]), there(self.constants[1])),
            norm_in=self.norm_in.of(there),
            act=there(self.act),
            g=there(self.g),
            sums=None if self.sums is None else there(self.sums),
        )
        if not whole:
            return part
        past, read = (None if x is None else there(x) for x in (self.past, self.read))
        return replace(part, saved=self.saved.of(there), dz=there(self.dz), past=past, read=read)

    @property
    def fewer_as_gradients(self) -> bool:
        """Whether the gradients of the receivers are fewer bytes than what `on` copies to make them elsewhere."""
        gradients = self.g.numel() // self.g.shape[-1] * self.norm_in.x.shape[-1] * self.g.itemsize
        needed = (self.attention.w_qkv, self.norm_in, self.act, self.g)
        return gradients <= sum(x.numel() * x.itemsize for x in tensors_in(needed))

    def grads(self, impl: str, out: Annotated[Tensor, "C' B T D"] | None = None) -> Annotated[Tensor, "C' B T D"]:
        """∂metric/∂v of each of them, in `out` where it is given, see `kernels.receiver_grads`."""
        attention, channels = self.attention, self.channels
        shared = self._shared
        act = self.act if shared else self.each_act
        groups = attention.shared_groups(channels) if shared else attention.groups(channels)
        sums = self.needed_sums()
        # The kernel that takes the sums makes x̂ of a tile by itself.
        g, norm, groups = self.factors(groups, standardised=sums is None)
        shape = (g.shape[2], *g.shape[:2], self.norm_in.x.shape[-1])
        grads = g.new_empty(shape) if out is None else out
        start = place = 0
        for w in groups:
            each = attention.group if shared and channels.start + start >= attention.n_heads else 1
            part, read = slice(start, start + each * len(w)), slice(place, place + len(w))
            inside = slice(channels.start + part.start, channels.start + part.stop)
            w_gamma, offset = (constant[inside] for constant in self.constants)
            # [B, T, C, K] → [C, B, T, K]
            views = (g[:, :, part].permute(2, 0, 1, 3), act[:, :, read].permute(2, 0, 1, 3))
            beside = None if sums is None else sums[part]
            kernels.receiver_grads(
                *views, w, norm=norm, w_gamma=w_gamma, offset=offset, sums=beside, out=grads[part], impl=impl
            )
            start, place = part.stop, read.stop
        return grads

    def needed_sums(self) -> Annotated[Tensor, "C' 2 B T"] | None:
        """`sums`, made here where they are not there; None where no kernel reads them."""
        attention, channels = self.attention, self.channels
        if attention.norm.kind == "none" or self.rules.norm == "frozen":
            return None
        if self.sums is not None:
            return self.sums
        alone = max(0, attention.n_heads - channels.start) if self._shared else self.g.shape[2]
        w_gamma, offset = (constant[channels] for constant in self.constants)
        centred, width = attention.norm.kind == "layernorm", self.norm_in.x.shape[-1]
        act = self.act if self._shared else self.each_act
        return receiver_sums(self.g, act, w_gamma if centred else None, offset, width, alone, attention.group)

    @property
    def _shared(self) -> bool:
        """Whether a group's query heads share what they read of their keys and values."""
        return self.attention.group > 1 and not self.attention.grouped and takes_triton("auto", self.g)

    @property
    def each_act(self) -> Annotated[Tensor, "B T C' K"]:
        """The activations of each channel."""
        queries = max(0, self.attention.n_heads - self.channels.start)
        if self.attention.group == 1 or self.attention.grouped or queries >= self.act.shape[2]:
            return self.act
        others = self.attention.of_each(self.act[:, :, queries:])
        return torch.cat([self.act[:, :, :queries], others], 2) if queries else others

    def total(self) -> Annotated[Tensor, "B T D"]:
        """Σ over them of ∂metric/∂v, in float32 at least, without making them one by one."""
        dn = self._input_grad()
        return self.attention.norm.backward(dn, self.norm_in, self.rules.norm).to(accumulate_dtype(dn.dtype))

    def added(
        self, total: Annotated[Tensor, "B T D"], read: Annotated[Tensor, "int64 B Q"] | None = None
    ) -> tuple[Annotated[Tensor, "B T D"], Annotated[Tensor, "B T D"]]:
        """total and what `total` returns, in its dtype and in the weights'; read: the positions of total [B, Q, D],
        where it is not that of all."""
        return self.attention.norm.backward_added(self._input_grad(), self.norm_in, total, self.rules.norm, read=read)

    def _input_grad(self) -> Annotated[Tensor, "B T D"]:
        """∂metric/∂n of what they read together."""
        dn = None
        for g, projections in self._folded():
            start = 0
            for w in self.attention.weights(projections):  # Σ_c W_c g_c
                part = g[:, :, start : start + w.shape[0]]
                matrix = as_matrix(w)
                if matrix is None:
                    more = (part.flatten(0, 1).transpose(0, 1) @ w.transpose(1, 2)).sum(0).unflatten(0, g.shape[:2])
                    dn = more if dn is None else dn + more
                elif dn is None:
                    dn = product(part.flatten(2), matrix.T)
                else:
                    dn = product_added(dn, part.flatten(2), matrix.T)
                start += w.shape[0]
        assert dn is not None
        return dn

    def _folded(self) -> Iterator[tuple[Tensor, slice]]:
        """g summed over the query heads that share a projection, and which projections these are."""
        attention, channels = self.attention, self.channels
        if attention.grouped or attention.group == 1:
            yield self.g, channels
            return
        first, last = attention.projection(channels.start), attention.projection(channels.stop - 1) + 1
        queries = max(0, attention.n_heads - channels.start)
        if queries < self.g.shape[2]:
            shared = self.g[:, :, queries:].unflatten(2, (-1, attention.group)).sum(3)
            yield shared, slice(first + queries, last)
        if queries:
            yield self.g[:, :, :queries], slice(first, first + queries)

    def factors(
        self, groups: list[Annotated[Tensor, "C'' D K"]], *, standardised: bool = True
    ) -> tuple[Annotated[Tensor, "B T C' K"], kernels.Norm, list[Annotated[Tensor, "C'' D K"]]]:
        """(g, norm, channel groups) from which the kernels make the gradients; groups: their weights. standardised: see
        `Norm.for_kernels`."""
        norm = self.attention.norm
        if norm.kind == "none" or self.rules.norm != "frozen":
            return self.g, norm.for_kernels(self.norm_in, self.g.dtype, standardised=standardised), groups
        assert self.norm_in.rstd is not None
        scaled = (self.g * self.norm_in.rstd[..., None]).to(self.g.dtype)
        return scaled, kernels.Norm("none"), [norm.frozen_weight(w) for w in groups]


def _joined(first: Tensor, second: Tensor) -> Tensor | None:
    """Two tensors [B, T, ·, K] as one, where they are views that lie beside each other; else None."""
    same = first.untyped_storage()._cdata == second.untyped_storage()._cdata and first.stride() == second.stride()
    behind = first.storage_offset() + first.shape[2] * first.stride(2)
    if not same or second.storage_offset() != behind:
        return None
    shape = (*first.shape[:2], first.shape[2] + second.shape[2], first.shape[3])
    return first.as_strided(shape, first.stride(), first.storage_offset())
