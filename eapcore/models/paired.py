"""Clean and corrupt prompts through the stages together, with the tokens that they share run once.

All their tokens are rows of one matrix, [prefix | clean | corrupt]: everything but attention is then one product of all
rows with a weight, which is faster than three of fewer rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from eapcore.kernels.steps import moved_sum, moved_units
from eapcore.models.attention import AttentionRun, AttentionSaved
from eapcore.models.forward import StageRun
from eapcore.models.matmul import product
from eapcore.models.mlp import Mlp, MlpRun
from eapcore.models.model import Model


def run_paired(
    model: Model,
    prefix: Tensor,
    clean: Tensor,
    corrupt: Tensor,
    read: Tensor,
    moved: Callable[[int, Tensor], Tensor | None],
) -> Iterator[tuple[StageRun, Tensor | None]]:
    """Run all stages on a prefix and on what follows it in the clean and in the corrupt prompts, one at a time.

    Args:
        model: the model.
        prefix: [B, P, D], what `embed` made of the tokens before the first difference.
        clean, corrupt: [B, T, D], the same of the clean and the corrupt prompts from there on.
        read: int64 [B, Q], the positions of the T that the metric reads.
        moved: called with a layer's index and its mixtures of v, [2·B, Q, H, K] as in `AttentionRun`. It returns the
            difference corrupt − clean of what all heads send together, [B, Q, D]; or None where it has no use for it.

    Yields:
        for each stage what it made of the clean and then the corrupt prompts, [2·B, T, ..] as `run_stages` with the
        prefix as past, and its prefix's k and v heads [B, P, 2H, K], None without heads or for P = 0. All of it views
        of what the stage made of all rows. Where `moved` gave a difference, `mlp.sent` has that of what the MLP sends
        in
        the corrupt half: of the hidden units before their projection, as two nearly equal outputs would cancel after
        rounding.
    """
    pairs, before = prefix.shape[:2]
    runs, tokens, cut = 2 * pairs, clean.shape[1], pairs * before
    x = torch.cat([part.flatten(0, 1) for part in (prefix, clean, corrupt)])[None]  # [1, N, D]
    del prefix, clean, corrupt
    both = read.repeat(2, 1)
    answers = (cut + torch.arange(runs, device=read.device)[:, None] * tokens + both).view(1, -1)  # [1, 2·B·Q] rows
    count: int | None = None  # rows whose outputs are moved instead of computed a second time
    for stage in model.stages:
        here = answers if stage.last else None
        behind = 0 if stage.last else cut  # where the clean rows begin in all that is made at the answers alone

        def rest(t: Tensor, behind: int = behind) -> Tensor:
            """What lies behind the prefix in [1, N, ...], as [runs, T, ...]."""
            return t[0, behind:].unflatten(0, (runs, -1))

        def whole(t: Tensor) -> Tensor:
            return rest(t, cut)

        heads, past, out = None, None, x
        if stage.attention is not None:
            attention = stage.attention.component
            saved = attention.read(x, here)
            past = None if cut == 0 else saved.kv[0, :cut].unflatten(0, (pairs, before))
            z = attention.mix(rest(saved.q), whole(saved.kv), past, both if stage.last else None)  # [2·B, Q, H, K]
            made = attention.behind_post(saved, z)
            z, post_in = made.z, made.saved.post_in
            difference = moved(stage.index, z)
            rows = z.flatten(0, 1)[None]  # [1, N, H, K]
            if past is not None and here is None:
                shared = attention.mix(saved.q[0, :cut].unflatten(0, (pairs, before)), past)
                shared = attention.behind_post(saved, shared).z
                rows = torch.cat([shared.flatten(0, 1)[None], rows], 1)
                del shared
            x = x if here is None else x[:, answers[0]]
            if difference is None:
                count, out = None, x + attention.added_by(rows)
            else:
                difference = difference.flatten(0, 1)[None]
                count = difference.shape[1]
                out = moved_sum(x, attention.added_by(rows[:, :-count]), difference)
            qkv = (rest(saved.qkv[0]), *(whole(t) for t in saved.qkv[1:]))
            heads = AttentionRun(AttentionSaved(saved.norm_in.of(whole), qkv, saved.n_heads, post_in), z)
            del saved, made, z, rows, difference, post_in
        mlp: MlpRun | None = None
        if stage.mlp is not None:
            mlp, out = _mlp(stage.mlp.component, x, out, count)
            mlp = MlpRun(mlp.saved.of(rest), rest(mlp.sent))
        x = out
        yield StageRun(stage, heads, mlp, rest(out)), past
        del heads, mlp, past, out  # whoever iterates decides what is kept


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
