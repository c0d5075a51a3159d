"""Runs in which one receiver alone reads something else; everything behind it follows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from torch import Tensor

from eapcore.models.attention import Attention
from eapcore.models.forward import run_stage
from eapcore.models.model import Model, Place
from eapcore.models.patched_attention import mix_at_read, patched, sent_otherwise
from eapcore.models.tensors import at_positions, on
from eapcore.patching.record import Recording

Read = tuple[int, int]
"""(change, receiver): which change of a pool a receiver reads."""


@dataclass(frozen=True, slots=True)
class Readers:
    """Copies of a batch's clean run in which one receiver of a stage, or the logits, reads a change out of a pool.

    number: the stage's, the number of stages for the logits. pool: the changes [N, B, T, D]. normed: for the stage's q,
    and for its k and v, which changes some head reads, and what its channel projects then, [n, B, Q, D]. Q is T, but 1
    for q in the last layer: the answer position.
    """

    recording: Recording
    number: int
    pool: Tensor
    normed: Sequence[tuple[list[int], Tensor]]

    @staticmethod
    def of(recording: Recording, number: int, pool: Tensor, reads: Sequence[Read]) -> Readers:
        """For these reads; a stream that several heads read is normalised once."""
        stages = recording.model.stages
        stage = stages[number] if number < len(stages) else None
        if stage is None or stage.attention is None:
            return Readers(recording, number, pool, ())
        attention, place = stage.attention.component, stage.attention.receivers

        def normalised(receivers: range, short: bool) -> tuple[list[int], Tensor]:
            rows = sorted({row for row, receiver in reads if receiver in receivers})
            stream = recording.at_read(recording.clean.streams[number], short)
            added = recording.at_read(_take(pool, rows), short)
            return rows, attention.norm.forward(on(stream + added, stage.device))[0]

        if not stage.last:
            return Readers(recording, number, pool, (normalised(range(place.start, place.stop), False),) * 2)
        split = place.start + attention.n_heads
        ends = normalised(range(place.start, split), True), normalised(range(split, place.stop), False)
        return Readers(recording, number, pool, ends)

    def logits(self, reads: Sequence[Read]) -> Tensor:
        """The batch's logits, float64 [C, B, V] or [C, B, n], in a copy for each of some reads; those of one receiver
        stand together."""
        recording, number, stages = self.recording, self.number, self.recording.model.stages
        streams = recording.clean.streams
        if number == len(stages):
            stream = recording.at_read(streams[-1]) + recording.at_read(_take(self.pool, [row for row, _ in reads]))
            return finish(recording, number, stream.flatten(0, 1))
        stage = stages[number]
        behind = recording.at_read(streams[number + 1], stage.last)
        out = behind.expand(len(reads), *behind.shape).clone()
        start = 0
        for receiver, group in groupby(reads, key=lambda pair: pair[1]):
            rows = [row for row, _ in group]
            copies = slice(start, start + len(rows))
            start += len(rows)
            heads = stage.attention
            if heads is not None and heads.receivers.start <= receiver < heads.receivers.stop:
                self._through_head(heads, receiver, rows, out[copies])
            else:
                out[copies] = self._through_mlp(rows)
        return finish(recording, number + 1, out.flatten(0, 1))

    def _through_mlp(self, rows: list[int]) -> Tensor:
        """The streams behind the stage, [C, B, Q, D], where its MLP alone reads the changes `rows`."""
        recording, stage = self.recording, self.recording.model.stages[self.number]
        run = recording.clean.stages[self.number]
        base = stream = recording.at_read(recording.clean.streams[self.number], stage.last)
        if stage.attention is not None and run.attention is not None:
            added = on(stage.attention.component.added(run.attention), base.device)
            base = base + recording.at_read(added, stage.last)
        assert stage.mlp is not None
        changed = stream + recording.at_read(_take(self.pool, rows), stage.last)
        sent = stage.mlp.component.forward(on(changed, stage.device).flatten(0, 1)).sent
        return base + on(sent, base.device).view_as(changed)

    def _through_head(self, place: Place[Attention], receiver: int, rows: list[int], stream: Tensor) -> None:
        """Add to the streams behind the stage, [C, B, Q, D], what a head sends otherwise than in the clean run where
        its q, k or v reads the changes `rows`. Only the heads that it moves mix otherwise."""
        recording, attention = self.recording, place.component
        stage, run = recording.model.stages[self.number], recording.clean.stages[self.number].attention
        assert run is not None
        channel = receiver - place.receivers.start
        heads = attention.moved_by(channel)
        read, some = on(recording.read, stage.device) if stage.last else None, slice(heads.start, heads.stop)
        known, normed = self.normed[channel >= attention.n_heads]
        n = _take(normed, [known.index(row) for row in rows])
        z = patched(attention, channel, n, run.saved, recording.before(stage.index), read)  # [C, B, Q, h, K]
        stream += on(sent_otherwise(attention, run, some, z, read), stream.device)


def reader_of(model: Model, receiver: int) -> int:
    """The number of the stage that a receiver belongs to; the number of stages for the logits."""
    for number, stage in enumerate(model.stages):
        for place in (stage.attention, stage.mlp):
            if place is not None and place.receivers.start <= receiver < place.receivers.stop:
                return number
    return len(model.stages)


def _take(pool: Tensor, rows: list[int]) -> Tensor:
    """Some of a pool's rows: a view where they follow each other."""
    if rows == list(range(rows[0], rows[-1] + 1) if rows else ()):
        return pool[rows[0] : rows[-1] + 1] if rows else pool[:0]
    return pool[rows]


def finish(recording: Recording, number: int, x: Tensor) -> Tensor:
    """The batch's logits at the answers, float64 [C, B, V] or [C, B, n], from the stream that enters a stage.

    x: [C·B, T, D], or behind the last layer's attention [C·B, 1, D] at the answers.
    """
    for stage in recording.model.stages[number:]:
        past, x = recording.before(stage.index), on(x, stage.device)
        if stage.last and stage.attention is not None:
            attention, read = stage.attention.component, on(recording.read, stage.device)
            read = read.repeat(len(x) // len(read), 1)
            z = mix_at_read(attention, x, past, read)
            stream = at_positions(x, read)
            x = stream + attention.added_by(z)
            if stage.mlp is not None:
                x = x + stage.mlp.component.forward(stream).sent
        else:
            x = run_stage(stage, x, past).out
    return recording.logits(x[:, 0].unflatten(0, (-1, len(recording.read))))
