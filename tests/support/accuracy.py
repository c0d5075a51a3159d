"""How far an implementation may be from float64: twice torch's error or, where torch is luckier, what rounding makes.

The model (Higham and Mary, A new approach to probabilistic rounding error analysis, 2019) takes every rounding as
independent and of mean 0, so that errors add up as squares. Rounding m·2^e, 1 ≤ m < 2, to the nearest with a unit
roundoff u errs by anything up to u/m of it: a variance of u²/(3m²), and with log m uniform, as significands are, of
u²/3 · (1 − 1/4)/(2·ln 2) = 0.18·u². For one result Σ p_i of n products with ‖p‖² = Σ p_i²:

* factors rounded before, to a unit roundoff v, k of them in a product: k·0.18·v²·‖p‖², without any factor n;
* the products' own rounding: 0.18·u²·‖p‖²;
* sums. The j-th partial sum of m terms, of any sign, has the size of √j terms, so that one after another they lose
  Σ_j j·(‖p‖²/m)·0.18·u² = (m/2)·0.18·u²·‖p‖². An op adds up in vectors of at least 16 bytes, 4 lanes of n/4 terms
  each: (n/8)·0.18·u²·‖p‖², float64 in 2 lanes (n/4);
* sums over d_head, one after another. Where one walk stands alone, one in seven loses more than twice the mean, and
  the largest errors are theirs: n·0.18·u²·‖p‖². What is made is rounded four times more (γ, rstd, the three terms);
* the result's rounding to the dtype w that it is stored in: 0.18·w²·result².

A normal error of that deviation σ passes λσ in any of N results with λ = √(2·ln(2N/α)) in a share α of all runs, at
most; α is 1/1000.
"""

from __future__ import annotations

import math

import torch
from eapcore.kernels import checks, reference

# The unit roundoff of a stored number.
STORED = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
ALPHA = 1e-3
VARIANCE = (1 - 1 / 4) / (6 * math.log(2))  # of a rounding, in u²


def rounded(count, dtype):
    """The relative deviation of a product whose `count` factors were rounded to a dtype."""
    return math.sqrt(VARIANCE * count) * STORED[dtype]


def summed(n, dtype):
    """The deviation of a sum of n products relative to ‖p‖, accumulated as the ops do for inputs of a dtype.

    Float64 is compared with itself, summed in another order: both err.
    """
    wide = checks.output_dtype(dtype)
    roundings = 2 * (1 + n / 4) if wide == torch.float64 else 1 + n / 8
    return math.sqrt(VARIANCE * roundings) * STORED[wide]


def made(d_head, dtype):
    """The deviation of what is made by the closed form, or as z·W_O, relative to the ‖p‖ of all that it adds up."""
    return math.sqrt(VARIANCE * (1 + d_head + 4)) * STORED[checks.output_dtype(dtype)]


def together(*deviations):
    """The deviation of a sum of independent errors."""
    return sum(deviation**2 for deviation in deviations) ** 0.5


def error_of(got, exact):
    """The largest error."""
    return (got.double() - exact).abs().max().item()


def assert_as_good_as_torch(got, exact, torch_error, deviation):
    """Every error ≤ 2 × the largest of torch in the same dtype, or λ × its own deviation where that is more."""
    assert got.shape == exact.shape
    assert exact.abs().max() > 0, "zeros prove nothing"
    error = (got.double() - exact).abs()
    allowed = (math.sqrt(2 * math.log(2 * exact.numel() / ALPHA)) * deviation).clamp(min=2 * torch_error)
    worst = (error - allowed).argmax()
    text = f"error {error.flatten()[worst]:.3g}, allowed {allowed.flatten()[worst]:.3g}"
    assert bool((error <= allowed).all()), text


def deviation_of_scores(delta, grads, mask, reduce, rows, dtype):
    """Of `edge_scores` of float64 tensors that hold what an op was given in `dtype`: [S, R], [B, S, R] or [T, S, R]."""
    size = reference.edge_scores(delta.square(), grads.square(), mask, reduce, rows).sqrt()  # ‖p‖
    batch, tokens = delta.shape[1:3]
    token_rows = batch * tokens if rows is None else len(rows)
    most = {"all": token_rows, "pair": min(tokens, token_rows), "position": min(batch, token_rows)}[reduce]
    return size * summed(most * delta.shape[3], dtype)


def closed_form(g, act, weight, norm, w_gamma, offset):
    """The closed form of `receiver_grads` in float64, and for each result the ‖p‖ of all that it adds up."""

    def double(x):
        return None if x is None else x.double()

    g, act, weight, w_gamma, offset = (double(x) for x in (g, act, weight, w_gamma, offset))
    made = torch.einsum("cbtk,cdk->cbtd", g, weight)
    size = torch.einsum("cbtk,cdk->cbtd", g.square(), weight.square())
    if norm.kind == "none":
        return made, size.sqrt()
    d_model = weight.shape[1]
    x_hat, rstd = norm.x_hat.double(), norm.rstd.double()[..., None]
    gamma = x_hat.new_ones(d_model) if norm.gamma is None else norm.gamma.double()
    offset = offset[:, None, None]
    c2 = (g * (act - offset)).sum(-1, keepdim=True) / d_model
    made = gamma * made - c2 * x_hat
    size_c2 = (g.square() * (act.square() + offset.square())).sum(-1, keepdim=True) / d_model**2
    size = gamma.square() * size + size_c2 * x_hat.square()
    if norm.kind == "layernorm":
        made = made - (g * w_gamma[:, None, None]).sum(-1, keepdim=True) / d_model
        size = size + (g * w_gamma[:, None, None]).square().sum(-1, keepdim=True) / d_model**2
    return rstd * made, rstd * size.sqrt()


def closed_form_factored(senders, receivers, mask, reduce, made_in):
    """`edge_scores_factored` by the closed form with everything but the factors in float64, and its deviation.

    made_in: the dtype that an implementation rounds what it makes to.
    """
    left, left_size = [senders.embed.double()[None]], [torch.zeros_like(senders.embed).double()[None]]
    right, right_size = [], []
    for layer, (w_o, groups, norm) in enumerate(zip(senders.w_o, receivers.weight, receivers.norms, strict=True)):
        dz = senders.dz[layer].double()
        left.append(torch.einsum("bthk,hkd->hbtd", dz, w_o.double()))
        left_size.append(torch.einsum("bthk,hkd->hbtd", dz.square(), w_o.double().square()).sqrt())
        channels = (receivers.g[layer], receivers.act[layer], torch.cat(list(groups)))
        grads, size = closed_form(*channels, norm, receivers.w_gamma[layer], receivers.offset[layer])
        right.append(grads)
        right_size.append(size)
        if senders.mlp is not None:
            for rows, sizes, mlp in ((left, left_size, senders.mlp), (right, right_size, receivers.mlp)):
                rows.append(mlp[layer].double()[None])
                sizes.append(torch.zeros_like(rows[-1]))
    right.append(receivers.logits.double()[None])
    right_size.append(torch.zeros_like(right[-1]))
    left, left_size, right, right_size = (torch.cat(rows) for rows in (left, left_size, right, right_size))

    def scores(a, b):
        return reference.edge_scores(a, b, mask, reduce, None)

    making = made(senders.dz.shape[-1], torch.float32)
    both = scores(left_size.square(), right.square()) + scores(left.square(), right_size.square())
    size = scores(left.square(), right.square())
    summing = deviation_of_scores(left, right, mask, reduce, None, torch.float32)
    return scores(left, right), together(both.sqrt() * making, size.sqrt() * rounded(2, made_in), summing)
