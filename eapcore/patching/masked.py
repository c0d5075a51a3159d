"""Runs in which every receiver reads its own choice of senders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eapcore.models.attention import Attention
from eapcore.models.model import Model, Place, Stage
from eapcore.models.patched_attention import each_channel
from eapcore.models.tensors import on
from eapcore.patching.record import Recording, Run


@dataclass(frozen=True, slots=True)
class Changes:
    """How senders differ from a run: everywhere [..., S', B, T, D] for those before the last layer, at_read
    [..., S, B, 1, D] for all of them at the answer positions, which alone matter in the last layer."""

    everywhere: Tensor
    at_read: Tensor

    @staticmethod
    def between(recording: Recording, new: Tensor, old: Tensor) -> Changes:
        """From old to new, [S, B, T, D]."""
        change = new - old
        before = recording.model.graph.senders_everywhere
        return Changes(change[before].clone(), recording.at_read(change))

    def take(self, own: Changes, senders: Tensor, copy: int = 0) -> None:
        """Take over one copy's changes of some senders, bool [S], that were computed again."""
        index = senders.nonzero().squeeze(1).to(self.at_read.device)
        self.at_read[index] = own.at_read[copy]
        self.everywhere[index[: own.everywhere.shape[1]]] = own.everywhere[copy]


def run_masked(
    recording: Recording,
    base: Run,
    masks: Tensor,
    fixed: Changes,
    recompute: Tensor,
    given: Tensor | None = None,
) -> tuple[Tensor, Changes]:
    """Run copies of a batch in which every receiver reads its own choice of senders.

        v[c, r] = base stream[r] + Σ_s masks[c, s, r] · change[c, s]

    change[c, s] is e[c, s] − base[s], e being what the sender makes of its own such input, for senders in `recompute`;
    for all others it is given.

    Args:
        recording: the batch.
        base: the run or ablation that an absent edge carries.
        masks: [C, S, R], bool or weights.
        fixed: the change of the senders that are not computed again, the same in all copies; others are ignored.
        recompute: bool [S].
        given: bool [S, R], where the given changes go, those of senders that are computed again too; None: where the
            masks let those of all others go.

    Returns:
        (the batch's logits float64 [C, B, V] or [C, B, n], changes of the recomputed senders in order [C, n, B, ., D]).
    """
    run = _Masked(recording, base, masks, fixed, recompute)
    if given is not None:
        run.held = given[None].to(run.held)
    for number, stage in enumerate(recording.model.stages):
        run.enter(number)
        if stage.attention is not None:
            run.through_heads(stage.attention, number)
        if stage.mlp is not None and bool(recompute[stage.mlp.senders].any()):
            v = run.read([stage.mlp.receivers.start], base.streams[number], stage.last)[:, 0]
            sent = stage.mlp.component.forward(on(v, stage.device).flatten(0, 1)).sent.view(v.shape)
            run.keep(sent[:, None], [stage.mlp.senders.start], stage.last)
    end = run.read([recording.model.graph.logits], base.streams[-1], True)[:, 0, :, 0]
    return recording.logits(end), run.own


class _Masked:
    """The copies under way: what the senders have sent so far that are computed again."""

    def __init__(self, recording: Recording, base: Run, masks: Tensor, fixed: Changes, recompute: Tensor) -> None:
        model: Model = recording.model
        self.recording, self.base, self.fixed, self.recompute = recording, base, fixed, recompute
        self.model, self.copies = model, len(masks)
        # [S, R], what all copies read alike of fixed senders
        self.alike = ((masks == masks[:1]) | recompute[:, None]).all(0)
        self.masks = masks.to(model.device, model.dtype)
        self.held = self.masks * ~recompute.to(model.device)[:, None]  # what the fixed senders send
        self.again: list[int] = recompute.nonzero().squeeze(1).tolist()
        before = sum(s < model.graph.senders_everywhere.stop for s in self.again)
        (rows, tokens), width = recording.batch.shape, model.config.d_model
        like = base.senders
        self.own = Changes(
            like.new_empty(self.copies, before, rows, tokens, width),
            like.new_empty(self.copies, len(self.again), rows, 1, width),
        )
        self.made = 0

    def enter(self, number: int) -> None:
        """A stage begins: the last layer needs what was sent at the answer positions alone."""
        stages = self.model.stages
        if stages[number].last and (number == 0 or not stages[number - 1].last):
            self.own.at_read[:, : self.made] = self.recording.at_read(self.own.everywhere[:, : self.made])

    def read(self, receivers: list[int], stream: Tensor, short: bool) -> Tensor:
        """What receivers read: [C, R_i, B, Q, D]; short is at the answers alone."""
        stop = self.model.graph.senders_before(receivers[0])
        pool, mine = (part.at_read if short else part.everywhere for part in (self.fixed, self.own))
        stream = self.recording.at_read(stream, short)
        weights = self.held[:, :stop, receivers].transpose(1, 2)  # [C, R_i, S_i]
        if bool(self.alike[:stop, receivers].all()):
            weights = weights[:1]
        v = stream + (weights @ pool[:stop].flatten(1)).unflatten(2, stream.shape)
        made = sum(s < stop for s in self.again[: self.made])
        if made:
            weights = self.masks[:, self.again[:made]][:, :, receivers].transpose(1, 2)
            v = v + torch.bmm(weights, mine[:, :made].flatten(2)).unflatten(2, stream.shape)
        return v.expand(self.copies, *v.shape[1:])

    def keep(self, sent: Tensor, senders: list[int], short: bool) -> None:
        """What some senders made, [C, n, B, Q, D]."""
        place = self.own.at_read if short else self.own.everywhere
        base = self.recording.at_read(self.base.senders[senders], short)
        place[:, self.made : self.made + len(senders)] = on(sent, base.device) - base
        self.made += len(senders)

    def through_heads(self, place: Place[Attention], number: int) -> None:
        """The heads of a stage that are computed again."""
        stage, heads = self.model.stages[number], range(place.component.n_heads)
        sending = [h for h in heads if bool(self.recompute[place.senders.start + h])]
        if not sending:
            return
        stream = self.base.streams[number]
        sent = sent_by_heads(
            self.recording, stage, place, sending, self.copies, lambda rs, short: self.read(rs, stream, short)
        )
        self.keep(sent.transpose(0, 1), [place.senders.start + h for h in sending], stage.last)


def sent_by_heads(
    recording: Recording,
    stage: Stage,
    place: Place[Attention],
    sending: Sequence[int],
    copies: int,
    streams: Callable[[list[int], bool], Tensor],
) -> Tensor:
    """What some of a stage's heads send, [h, C, B, Q, D], where every receiver reads a stream of its own; where heads
    share a norm, what it reads is made of all of them.

    streams: of some receivers, [C, R', B, T, D], or at the answer positions alone.
    """
    attention, (rows, _) = place.component, recording.batch.shape
    heads = list(range(attention.n_heads)) if recording.model.config.heads_coupled else list(sending)
    _, of_k, of_v = attention.channels
    behind = {channel: attention.behind(channel) for channel in range(of_k.start, of_v.stop)}
    # Each head's key and then each head's value channel; heads of a group may share one.
    shared = [c for kind in (of_k, of_v) for h in heads for c in range(kind.start, kind.stop) if h in behind[c]]
    channels = sorted(set(shared))
    q, kv = (
        each_channel(attention, mine, on(streams([place.receivers.start + c for c in mine], short), stage.device))
        for mine, short in ((heads, stage.last), (channels, False))
    )
    kv = kv if channels == shared else kv[:, :, [channels.index(c) for c in shared]]
    past = recording.before(stage.index)
    if past is not None:
        both = [attention.projection(c) - attention.n_heads for c in shared]
        past = past[:, :, both].repeat(copies, 1, 1, 1)
    read = on(recording.read, stage.device).repeat(copies, 1) if stage.last else None
    z = attention.mix(q, kv, past, read).unflatten(0, (copies, rows))  # [C, B, Q, h, K]
    if attention.post.kind != "none":
        rstd = attention.post.forward(attention.made_by(z.flatten(0, 1)))[1].rstd
        assert rstd is not None
        z = z * rstd[..., None].unflatten(0, z.shape[:2])
    z = z if list(sending) == heads else z[..., list(sending), :]
    each = z.to(attention.w_o.dtype).flatten(0, 2).transpose(0, 1)  # [h, C·B·Q, K]
    return (each @ attention.w_send[list(sending)]).unflatten(1, z.shape[:3])
