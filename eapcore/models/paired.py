"""Clean and corrupt prompts through the layers together, with the tokens that they share run once.

All their tokens are rows of one matrix, [prefix | clean | corrupt]: everything but attention is then one product of all
rows with a weight, which is faster than three of fewer rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from eapcore.models.activations import LayerRun, LayerSaved, accumulate_dtype
from eapcore.models.attention import attend, attention_output, layer_qkv
from eapcore.models.forward import behind_attention
from eapcore.models.matmul import product
from eapcore.models.mlp import activation
from eapcore.models.model import Model
from eapcore.models.norm import normalise


def run_paired(
    model: Model,
    prefix: Tensor,
    clean: Tensor,
    corrupt: Tensor,
    read: Tensor,
    moved: Callable[[int, Tensor], Tensor | None],
) -> Iterator[tuple[LayerRun, Tensor | None]]:
    """Run all layers on a prefix and on what follows it in the clean and in the corrupt prompts, one at a time.

    Args:
        model: the model.
        prefix: [B, P, D], what `embed` made of the tokens before the first difference.
        clean, corrupt: [B, T, D], the same of the clean and the corrupt prompts from there on.
        read: int64 [B, 1], the positions of the T that the metric reads.
        moved: called with a layer's index and its mixtures of v, [2·B, Q, H, K] as in `LayerRun`. It returns the
            difference corrupt − clean of what all heads send together, [B, Q, D]; or None where it has no use for it.

    Yields:
        for each layer what it made of the clean and then the corrupt prompts, [2·B, T, ..] as `run_layers` with the
        prefix as past, and the prefix's k and v heads [B, P, 2H, K]; None for P = 0. All of it views of what the layer
        made of all rows. Where `moved` gave a difference, `mlp` has that of what the MLP sends in the corrupt half: of
        the hidden units before their projection, as two nearly equal outputs would cancel after rounding.
    """
    pairs, before = prefix.shape[:2]
    runs, tokens, cut = 2 * pairs, clean.shape[1], pairs * before
    x = torch.cat([part.flatten(0, 1) for part in (prefix, clean, corrupt)])[None]  # [1, N, D]
    del prefix, clean, corrupt
    last = model.config.n_layers - 1
    answers = cut + torch.arange(runs, device=read.device)[None] * tokens + read.repeat(2, 1).T  # [1, 2·B] rows
    for index in range(model.config.n_layers):
        here = answers if index == last else None
        saved = layer_qkv(model, index, x, here)
        past = None if cut == 0 else saved.kv[0, :cut].unflatten(0, (pairs, before))
        kv, q = _behind(saved.kv, cut, runs), _behind(saved.q, 0 if here is not None else cut, runs)
        z = attend(model, index, q, kv, past, read.repeat(2, 1) if here is not None else None)  # [2·B, Q, H, K]
        difference = moved(index, z)
        rows = z.flatten(0, 1)[None]  # [1, N, H, K]
        if past is not None and here is None:
            shared = attend(model, index, saved.q[0, :cut].unflatten(0, (pairs, before)), past)
            rows = torch.cat([shared.flatten(0, 1)[None], rows], 1)
        x = _add_attention(model, index, x if here is None else x[:, answers[0]], rows, difference)
        if difference is None:
            run = behind_attention(model, index, saved, rows, x)
        else:
            run = _behind_moved(model, index, saved, rows, x, difference.shape[0] * difference.shape[1])
        x = run.out
        yield _of_both(run, z, cut, runs, here is not None), past
        del run, saved, kv, q, z, rows, difference, past  # whoever iterates decides what is kept


def _behind(rows: Tensor, cut: int, runs: int) -> Tensor:
    """What lies behind the prefix in [1, N, ...], as [runs, T, ...]."""
    return rows[0, cut:].unflatten(0, (runs, -1))


def _add_attention(model: Model, index: int, x: Tensor, z: Tensor, difference: Tensor | None) -> Tensor:
    """The residual stream [1, N, D] behind a layer's attention, from that before it and the mixtures [1, N, H, K].

    With the difference [B, Q, D] that the last B·Q rows, the corrupt ones, have to the B·Q before them, the output of
    these rows is not computed a second time.
    """
    layer = model.weights.layers[index]
    if difference is None:
        return x + attention_output(layer, z)
    count = difference.shape[0] * difference.shape[1]
    return _with_moved(x, attention_output(layer, z[:, :-count]), difference.flatten(0, 1)[None])


def _with_moved(x: Tensor, sent: Tensor, difference: Tensor) -> Tensor:
    """x [1, N, D] with what was sent to all rows but the last, and to these what was sent to as many before, moved."""
    out, count = torch.empty_like(x), difference.shape[1]
    torch.add(x[:, :-count], sent, out=out[:, :-count])
    # Rounded once to half precision, as in any other row.
    out[:, -count:] = x[:, -count:].to(accumulate_dtype(x.dtype)) + sent[:, -count:] + difference
    return out


def _behind_moved(model: Model, index: int, saved: LayerSaved, z: Tensor, x: Tensor, count: int) -> LayerRun:
    """`behind_attention`, where the last `count` rows' MLP is that of the `count` rows before them and a difference.

    The product that makes the difference takes the place of the one that would make the corrupt rows' output.
    """
    layer, act_fn = model.weights.layers[index], model.config.act_fn
    if layer.w_in is None:
        return LayerRun(saved, z, None, x)
    assert layer.w_out is not None and layer.b_out is not None and act_fn is not None
    n, mlp_in = normalise(x, layer.ln2, model.config.eps)
    hidden = product(n, layer.w_in, layer.b_in)
    units = activation(act_fn, hidden.to(accumulate_dtype(hidden.dtype)))
    units[:, -count:] -= units[:, -2 * count : -count]
    mlp = product(units.to(hidden.dtype), layer.w_out)
    del n, units
    mlp[:, :-count] += layer.b_out
    out = _with_moved(x, mlp[:, :-count], mlp[:, -count:])
    return LayerRun(replace(saved, mlp_in=mlp_in, hidden=hidden), z, mlp, out)


def _of_both(run: LayerRun, z: Tensor, cut: int, runs: int, at_read: bool) -> LayerRun:
    """A layer's run without the prefix's rows; with at_read all but the keys, values and their input have none."""
    behind = 0 if at_read else cut

    def rest(x: Tensor) -> Tensor:
        return _behind(x, behind, runs)

    saved = run.saved
    qkv = (rest(saved.qkv[0]), *(_behind(t, cut, runs) for t in saved.qkv[1:]))
    return LayerRun(
        LayerSaved(
            saved.attn_in.of(lambda x: _behind(x, cut, runs)),
            qkv,
            None if saved.mlp_in is None else saved.mlp_in.of(rest),
            None if saved.hidden is None else rest(saved.hidden),
        ),
        z,
        None if run.mlp is None else rest(run.mlp),
        rest(run.out),
    )
