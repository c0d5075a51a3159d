"""What differences of streams and of scores change in attention patterns, summed with given values."""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

from . import dry_run as dry
from .steps import normalise


def moved_rstd(
    x: Annotated[Tensor, "B T D"],
    delta: Annotated[Tensor, "S B T D"],
    eps: float,
    *,
    centred: bool,
    impl: str = "auto",
) -> Annotated[Tensor, "B T S"]:
    """1/σ of x + delta_s, σ² = mean((x + delta_s − μ)²) + eps, without a tensor of them; centred: else μ is 0.

    impl: as in `pattern_changes`. In x's dtype.
    """
    if _in_cpp("moved_rstd", x, impl):
        delta = delta.to(x.dtype)
        if (run := dry.active.get()) is not None:
            made = x.new_empty(*delta.shape[1:3], len(delta))
            run.ran("moved_rstd", x, delta, made)
            return made
        from . import cpp

        return cpp.moved_rstd(x, delta, eps, centred=centred)
    return normalise(x + delta, None, None, eps, centred=centred)[2][..., 0].permute(1, 2, 0)


def _in_cpp(op: str, x: Tensor, impl: str) -> bool:
    """Whether an op runs in C++ on tensors like this one, or would where this is a dry run."""
    from . import cpp

    run = dry.active.get()
    device = x.device if run is None else run.device
    return impl != "reference" and device.type == "cpu" and cpp.supports(op, x.dtype) and not cpp.why_not()


def pattern_changes(
    raw: Annotated[Tensor, "B T S N H"],
    rstd: Annotated[Tensor, "B T S"] | None,
    moved: Annotated[Tensor, "B T S"] | None,
    known: Annotated[Tensor, "B T N H"],
    normed: Annotated[Tensor, "B T N H"],
    values: Annotated[Tensor, "B T N H"],
    past: tuple[Annotated[Tensor, "B N H"], Annotated[Tensor, "B N H"]] | None = None,
    *,
    of_keys: bool = False,
    impl: str = "auto",
) -> Annotated[Tensor, "B T S H | B 1 S H"]:
    """Σ (pattern′ − pattern) values where the scores of positions t with others n become those of a sender s,

        score′ = known + rstd_s · raw_s + moved_s · normed

    Args:
        raw: what the sender adds to them without σ; where known is −∞ anything finite. H innermost, the others beside
            each other.
        rstd, moved: 1/σ_s and σ/σ_s − 1; both None without a norm, where they are 1 and 0.
        known: the scores; −∞, of all heads alike, where a query does not see a key. normed: the part that the norm
            divides. values: what patterns are summed with; in their dtype all is done. Contiguous.
        past: where keys change, of each query the log of Σ exp(score) over keys before that do not, and the mean of
            their values; None where there are none.
        of_keys: t are keys and n their queries, whose keys all change together; else t are queries and n their keys.
        impl: "reference" is torch's operations; "auto" and "cpp" take C++ on the CPU for float32 and float64.

    Returns:
        [B, T, S, H] for each position; of keys [B, 1, S, H], the sum over all. In C++ exactly 0 for senders that change
        nothing.
    """
    raw = raw.to(known.dtype)
    if _in_cpp("pattern_changes", known, impl):
        if (run := dry.active.get()) is not None:
            batch, tokens, senders, _, heads = raw.shape
            made = known.new_empty(batch, 1 if of_keys else tokens, senders, heads)
            run.ran("pattern_changes", raw, known, normed, values, made)
            return made
        from . import cpp

        return cpp.pattern_changes(raw, rstd, moved, known, normed, values, past, of_keys=of_keys)
    known, normed, values = (x[:, :, None] for x in (known, normed, values))
    scores = raw
    if rstd is not None and moved is not None:
        scores = (raw * rstd[..., None, None]).addcmul_(moved[..., None, None], normed)
    scores = scores + known
    if not of_keys:
        return ((scores.softmax(3) - known.softmax(3)) * values).sum(3)
    before, after = known.logsumexp(1, keepdim=True), scores.logsumexp(1, keepdim=True)  # [B, 1, S or 1, N, H]
    if past is not None:
        earlier, mean = (x[:, None, None] for x in past)
        before, after = before.logaddexp(earlier), after.logaddexp(earlier)
    pattern = (known - before).exp()
    change = (((scores - after).exp() - pattern) * values).sum((1, 3))
    if past is not None:
        change += (((earlier - after).exp() - (earlier - before).exp()) * mean).sum((1, 3))
    return change[:, None]
