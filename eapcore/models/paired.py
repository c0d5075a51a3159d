"""Clean and corrupt prompts through the stages together, with the tokens that they share run once.

All their tokens are rows of one matrix, [prefix | clean | corrupt]: everything but attention is then one product of all
rows with a weight, which is faster than three of fewer rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated, Protocol

import torch
from torch import Tensor

from eapcore.kernels.steps import moved_sum, moved_units, takes_triton
from eapcore.models.attention import Attention, AttentionRun, AttentionSaved
from eapcore.models.forward import StageRun
from eapcore.models.matmul import product
from eapcore.models.mlp import Mlp, MlpRun
from eapcore.models.model import Model
from eapcore.models.norm import NO_NORM, NormInput
from eapcore.models.tensors import on


class Differences(Protocol):
    """Who takes the differences that a run makes by itself."""

    def heads(self, index: int, dz: Tensor) -> None:
        """Δ of a layer's mixtures of v, [B, Q, H, K] in the weights' dtype."""

    def mlp(self, index: int) -> Tensor | None:
        """Where Δ of what a layer's MLP sends goes as well, [B, Q, D], its rows equally far apart; None for nowhere."""


def makes_differences(model: Model) -> bool:
    """Whether a run makes its differences by itself: on a GPU, where nothing lies between mixtures and what is sent."""
    places = (place for stage in model.stages for place in (stage.attention, stage.mlp) if place is not None)
    return takes_triton("auto", model.weights.w_e) and all(place.at_rest.post.kind == "none" for place in places)


class Rooms:
    """Memory for what stages make of all N rows, of which the first are kept until the gradients are made.

    What a stage makes begins where that of the one before is kept no longer, and overwrites the rest of it: so nothing
    has to be copied out of what is not kept, and nothing more is held. Sums of the residual stream, each made of the
    one before, take turns in two such places.

    rows: N. kept: of these, how many outlive a stage. layers: how many there are, of which the last is made apart.
    like: a residual stream. dtype: of all else.
    """

    def __init__(self, rows: int, kept: int, layers: int, like: Tensor, dtype: torch.dtype) -> None:
        self.rows, self.kept, self.layers, self.like, self.dtype = rows, kept, layers, like, dtype
        self.blocks: dict[str, Tensor] = {}
        self.used: dict[str, int] = {}
        self.sums = 0

    def take(self, name: str, width: int, dtype: torch.dtype | None = None) -> Tensor:
        """The next [1, N, width] of what is called so."""
        if name not in self.blocks:
            rows = (self.layers - 1) * self.kept + self.rows
            self.blocks[name] = self.like.new_empty(rows, width, dtype=self.dtype if dtype is None else dtype)
        place = self.used[name] = self.used.get(name, -1) + 1
        return self.blocks[name][None, place * self.kept : place * self.kept + self.rows]

    def stream(self, width: int) -> Tensor:
        """The next residual stream [1, N, width]."""
        self.sums += 1
        return self.take(f"stream {self.sums % 2}", width, self.like.dtype)


def run_paired(
    model: Model,
    prefix: Tensor,
    start: Tensor,
    read: Tensor,
    moved: Callable[[int, Tensor], Tensor | None],
    differences: Differences | None = None,
    keep: tuple[bool, bool] = (True, True),
) -> Iterator[tuple[StageRun, Tensor | None]]:
    """Run all stages on a prefix and on what follows it in the clean and in the corrupt prompts, one at a time.

    Args:
        model: the model.
        prefix: [B, P, D], what `embed` made of the tokens before the first difference.
        start: [2·B, T, D], the same of the clean and then the corrupt prompts from there on. Both may be wider than the
            weights: the residual stream is in their dtype.
        read: int64 [B, Q], the positions of the T that the metric reads.
        moved: called with a layer's index and its mixtures of v, [2·B, Q, H, K] as in `AttentionRun`. It returns the
            difference corrupt − clean of what all heads send together, [B, Q, D]; or None where it has no use for it.
        differences: who takes them instead, where the run is to make them by itself, see `makes_differences`.
        keep: with `differences`, whether what is made of the clean prompts, and of the corrupt ones, is to be there
            after the next stage; what is made of the prefix is in any case.

    Yields:
        for each stage what it made of the clean and then the corrupt prompts, [2·B, T, ..] as `run_stages` with the
        prefix as past, and its prefix's k and v heads [B, P, 2H, K], None without heads or for P = 0. All of it views
        of what the stage made of all rows. Where there is a difference, `mlp.sent` has that of what the MLP sends in
        the corrupt half: of the hidden units before their projection, as two nearly equal outputs would cancel after
        rounding. With `differences`, `attention.z` has theirs there too, in the weights' dtype.
    """
    pairs, before = prefix.shape[:2]
    runs, tokens, cut, width = 2 * pairs, start.shape[1], pairs * before, prefix.shape[2]
    rooms: Rooms | None = None
    if differences is not None:
        kept = cut + (2 if keep[1] else int(keep[0])) * pairs * tokens
        rooms = Rooms(cut + runs * tokens, kept, _layers_on(model, prefix.device), prefix, model.dtype)
    x = start.flatten(0, 1)[None]  # [1, N, D]
    if cut:
        parts = [prefix.flatten(0, 1), x[0]]
        x = torch.cat(parts)[None] if rooms is None else torch.cat(parts, out=rooms.stream(width)[0])[None]
        del parts
    del prefix, start
    both = read.repeat(2, 1)
    answers = (cut + torch.arange(runs, device=read.device)[:, None] * tokens + both).view(1, -1)  # [1, 2·B·Q] rows
    count: int | None = None  # rows whose outputs are moved instead of computed a second time
    ready: tuple[Tensor, NormInput] | None = None  # what the next norm makes of x, where it is there
    attention: Attention | None = None
    component: Mlp | None = None
    for stage, next_norm in zip(model.stages, model.next_norms, strict=True):
        if x.device != stage.device:
            device, before_it = stage.device, x
            x, answers, both = (on(t, device) for t in (x, answers, both))
            ready = None if ready is None else _normed_on(ready, before_it, x)
            rooms = None if rooms is None else Rooms(rooms.rows, rooms.kept, _layers_on(model, device), x, model.dtype)
            del before_it
        here = answers if stage.last else None
        behind = 0 if stage.last else cut  # where the clean rows begin in all that is made at the answers alone
        room = (lambda name, width: None) if rooms is None or stage.last else rooms.take

        def rest(t: Tensor, behind: int = behind) -> Tensor:
            """What lies behind the prefix in [1, N, ...], as [runs, T, ...]."""
            return t[0, behind:].unflatten(0, (runs, -1))

        def whole(t: Tensor) -> Tensor:
            return rest(t, cut)

        heads, past, out, read_by_mlp = None, None, x, ready
        if stage.attention is not None:
            attention = stage.attention.component
            saved = attention.read(x, here, ready, room)
            past = None if cut == 0 else saved.kv[0, :cut].unflatten(0, (pairs, before))
            x = x if here is None else x[:, answers[0]]
            ready = None
            if rooms is not None and differences is not None:
                shared = None if past is None or stage.last else saved.q[0, :cut].unflatten(0, (pairs, before))
                rows = _mixtures(attention, rest(saved.q), whole(saved.kv), past, both if stage.last else None, shared)
                count = (rows.shape[1] - behind) // 2
                differences.heads(stage.index, rows[0, -count:].unflatten(0, (pairs, -1)))
                sent = product(rows.flatten(2), attention.w_o.flatten(0, 1))
                norm = next_norm if stage.mlp is None else NO_NORM
                to = None if stage.last else rooms.stream(width)
                out, ready = norm.behind_sum(x, sent[:, :-count], sent[:, -count:], attention.b_o, to)
                z, post_in = rest(rows), None
                del sent
            else:
                z = attention.mix(rest(saved.q), whole(saved.kv), past, both if stage.last else None)  # [2·B, Q, H, K]
                made = attention.behind_post(saved, z)
                z, post_in = made.z, made.saved.post_in
                difference = moved(stage.index, z)
                rows = z.flatten(0, 1)[None]  # [1, N, H, K]
                if past is not None and here is None:
                    shared = attention.mix(saved.q[0, :cut].unflatten(0, (pairs, before)), past)
                    shared = attention.behind_post(saved, shared).z
                    rows = torch.cat([shared.flatten(0, 1)[None], rows], 1)
                if difference is None:
                    count, out = None, x + attention.added_by(rows)
                else:
                    difference = difference.flatten(0, 1)[None]
                    count = difference.shape[1]
                    out = moved_sum(x, attention.added_by(rows[:, :-count]), difference)
                del made, difference
            qkv = (rest(saved.qkv[0]), *(whole(t) for t in saved.qkv[1:]))
            heads = AttentionRun(AttentionSaved(saved.norm_in.of(whole), qkv, saved.n_heads, post_in), z)
            del saved, z, rows, post_in, qkv
            shared = None
        mlp: MlpRun | None = None
        if stage.mlp is not None:
            component = stage.mlp.component
            if rooms is not None and differences is not None and count is not None:
                saved_units = component.read(x, read_by_mlp if stage.attention is None else None, room)
                units = moved_units(saved_units.hidden, saved_units.up, component.act_fn, count)
                sent, to = product(units, component.w_out), None if stage.last else rooms.stream(width)
                del units
                place = differences.mlp(stage.index)
                kept_too = None if place is None else place.flatten(0, 1)
                out, ready = next_norm.behind_sum(
                    out, sent[:, :-count], sent[:, -count:], component.b_out, to, kept_too
                )
                mlp = MlpRun(saved_units, sent)
                del saved_units
            else:
                mlp, out = _mlp(component, x, out, count)
            mlp = MlpRun(mlp.saved.of(rest), rest(mlp.sent))
        x, attention, component = out, None, None  # whose weights need not be there with the next layers'
        yield StageRun(stage, heads, mlp, rest(out)), past
        del heads, mlp, past, out  # whoever iterates decides what is kept


def _layers_on(model: Model, device: torch.device) -> int:
    """For how many layers there is room on a device: its own, and one more where the last, which needs none, lies
    elsewhere."""
    own = sum(stage.attention is not None and stage.device == device for stage in model.stages)
    return own + (model.stages[-1].device != device)


def _normed_on(ready: tuple[Tensor, NormInput], x: Tensor, there: Tensor) -> tuple[Tensor, NormInput]:
    """What a norm made of x, on the device of its copy `there`."""

    def moved(t: Tensor) -> Tensor:
        return there if t is x else on(t, there.device)

    n, norm_in = ready
    return moved(n), norm_in.of(moved)


def _mixtures(
    attention: Attention, q: Tensor, kv: Tensor, past: Tensor | None, read: Tensor | None, shared: Tensor | None
) -> Annotated[Tensor, "1 N H K"]:
    """The mixtures of the prefix, from its queries `shared`, of the clean prompts, and what the corrupt ones have more,
    each rounded once to the weights' dtype, as the product with W_O reads them."""
    cut = 0 if shared is None else shared.shape[0] * shared.shape[1]
    rows = q.new_empty(1, cut + q.shape[0] * q.shape[1], *q.shape[2:])
    attention.mix_moved(rows[0, cut:].unflatten(0, (len(q), -1)), q, kv, past, read)
    if shared is not None and past is not None:
        attention.mix_into(rows[0, :cut].unflatten(0, (len(shared), -1)), shared, past, None, None)
    return rows


def _mlp(mlp: Mlp, x: Tensor, base: Tensor, count: int | None) -> tuple[MlpRun, Tensor]:
    """An MLP that reads x [1, N, D], and the residual stream behind it, base and what it sends.

    With a count it sends to so many last rows, the corrupt ones, what it sends to as many before them and a difference,
    whose product takes the place of the one that would make their output.
    """
    if count is None:
        run = mlp.forward(x)
        return run, base + run.sent
    if mlp.post.kind != "none":  # which a difference of the hidden units does not go through
        run = mlp.forward(x)
        sent = run.sent.clone()
        sent[:, -count:] -= run.sent[:, -2 * count : -count]
        return MlpRun(run.saved, sent), base + run.sent
    saved = mlp.read(x)
    units = moved_units(saved.hidden, saved.up, mlp.act_fn, count)
    sent = product(units, mlp.w_out)
    del units
    return MlpRun(saved, sent), moved_sum(base, sent[:, :-count], sent[:, -count:], mlp.b_out)
