"""Arguments of the ops, and the bound that every implementation of them is held to (see `accuracy`)."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace

import accuracy
import torch
from accuracy import assert_as_good_as_torch, closed_form, closed_form_factored, error_of, made, rounded, together
from eapcore.kernels import FactoredReceivers, FactoredSenders, checks, reference


def doubled(value):
    """The same arguments in float64."""
    if isinstance(value, torch.Tensor):
        return value.double()
    if is_dataclass(value):
        return replace(value, **{field.name: doubled(getattr(value, field.name)) for field in fields(value)})
    if isinstance(value, list | tuple):
        return type(value)(doubled(each) for each in value)
    return value


def factors(layers, heads, groups, draw, mlps=True):
    """Factors of a whole model's senders and receivers, and how many there are of either.

    layers: for each the arguments of `receiver_grads`, of its q, k and v heads. groups: how many of them each weight
    has. draw(*shape): what makes the rest.
    """
    g, act, weight, norms, w_gamma, offset = zip(*layers, strict=True)
    channels, batch, tokens, d_head = g[0].shape
    stream = (batch, tokens, weight[0].shape[1])
    none = g[0].new_zeros(channels, d_head)
    constants = [torch.stack([none if c is None else c.to(none) for c in each]) for each in (w_gamma, offset)]
    senders = FactoredSenders(
        embed=draw(*stream), dz=draw(len(layers), batch, tokens, heads, d_head),
        w_o=[draw(heads, d_head, stream[2]) for _ in layers], mlp=draw(len(layers), *stream) if mlps else None,
    )  # fmt: skip
    receivers = FactoredReceivers(
        torch.stack(g), torch.stack(act), [list(w.split(groups)) for w in weight], list(norms), *constants,
        logits=draw(*stream), mlp=draw(len(layers), *stream) if mlps else None,
    )  # fmt: skip
    return senders, receivers, tuple(1 + len(layers) * (n + mlps) for n in (heads, channels))


def assert_scores_good(got, delta, grads, mask=None, reduce="all", rows=None):
    """Scores are those of the specification in float64 as far as the dtype allows, and exactly 0 where no edge is."""
    assert got.dtype == checks.output_dtype(delta.dtype)
    exact = reference.edge_scores(delta.double(), grads.double(), mask, reduce, rows)
    in_torch = reference.edge_scores(delta, grads, mask, reduce, rows)
    deviation = accuracy.deviation_of_scores(delta.double(), grads.double(), mask, reduce, rows, delta.dtype)
    assert_as_good_as_torch(got, exact, error_of(in_torch, exact), deviation)
    if mask is not None:
        assert (got[..., ~mask] == 0).all()


def assert_factored_good(impl, got, senders, receivers, mask, reduce):
    definition = reference.edge_scores_factored(doubled(senders), doubled(receivers), mask, reduce)
    in_torch = reference.edge_scores_factored(senders, receivers, mask, reduce)
    # C++ rounds nothing that it makes below float32; the others round it to the model's dtype.
    made_in = torch.float32 if impl == "cpp" else senders.dz.dtype
    exact, deviation = closed_form_factored(senders, receivers, mask, reduce, made_in)
    # The specification reads x̂ where the closed form reads a rounded act: each is held against its own float64.
    exact = definition if impl == "reference" else exact
    assert_as_good_as_torch(got, exact, 0 if impl == "cpp" else error_of(in_torch, definition), deviation)
    assert (got[..., ~mask] == 0).all()


def layer_error(whole, exact, dtype):
    """Of the results made from an unrounded case of which each term's factors were rounded once, at most four of them:

    g, W, γ and rstd, or g, act, x̂ and rstd.
    """
    size = closed_form(*whole)[1]
    return together(size * rounded(4, dtype), size * made(whole[0].shape[-1], dtype), exact * rounded(1, dtype))


def assert_layer_good(got, case, torch_error=0):
    """Receivers' gradients in which sums and the result alone are rounded; the closed form in float64."""
    exact, size = closed_form(*case)
    deviation = together(size * made(case[0].shape[-1], got.dtype), exact * rounded(1, got.dtype))
    assert_as_good_as_torch(got, exact, torch_error, deviation)
    return exact
