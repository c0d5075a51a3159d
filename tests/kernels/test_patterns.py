"""What senders change in attention patterns: torch's operations against loops in float64, C++ against torch's."""

from __future__ import annotations

import math

import eapcore.kernels as kernels
import pytest
import torch
from eapcore.kernels import cpp
from eapcore.kernels.patterns import moved_rstd, pattern_changes

B, H = 2, 3
needs_cpp = pytest.mark.skipif(bool(kernels.available()["cpp"]), reason=kernels.available()["cpp"])


def case(positions, others, senders, dtype, *, before=0, normed=True, window=None):
    """The arguments, of positions t and others n of which a key n meets a query t or the other way round, where the
    later ones begin `before` positions behind the first."""
    generator = torch.Generator().manual_seed(positions * 100 + others)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    t, n = torch.arange(positions)[:, None], torch.arange(others)
    hidden = n > t + before
    if window is not None:
        hidden |= n <= t + before - window
    known = draw(B, positions, others, H) * 3
    known.masked_fill_(hidden[:, :, None], -math.inf)
    raw = draw(B, positions, senders, others * H + 2)[..., 1:-1].unflatten(-1, (others, H))
    raw[:, :, 0] = 0
    statistics = (draw(B, positions, senders).abs() + 0.5, draw(B, positions, senders)) if normed else (None, None)
    if normed:
        statistics[1][..., 0] = 0
    return raw, *statistics, known, draw(*known.shape), draw(*known.shape)


def turned(raw, rstd, moved, known, normed, values):
    """The same where the queries are the others: t ↔ n reversed, so that every query sees the key of its own place."""
    known = torch.where(known.isinf().flip(1), -math.inf, known.nan_to_num(neginf=0.5))
    return raw, rstd, moved, known, normed, values


def literal(raw, rstd, moved, known, normed, values, past=None, *, of_keys=False):
    raw, known, normed, values = (x.double() for x in (raw, known, normed, values))
    n_b, positions, senders, others, _ = raw.shape
    out = torch.zeros(n_b, positions, senders, H, dtype=torch.float64)
    for b in range(n_b):
        for s in range(senders):
            scale, shift = (x if x is None else x[b, :, s, None, None].double() for x in (rstd, moved))
            new = known[b] + (raw[b, :, s] if scale is None else scale * raw[b, :, s] + shift * normed[b])
            if not of_keys:
                change = new.softmax(1) - known[b].softmax(1)
                out[b, :, s] = (change * values[b]).sum(1)
                continue
            earlier = torch.full((1, others, H), -math.inf) if past is None else past[0][b, None].double()
            mean = torch.zeros(1, others, H) if past is None else past[1][b, None].double()
            old, now = (torch.cat([earlier, x]) for x in (known[b], new))
            every = torch.cat([mean, values[b]])
            out[b, 0, s] = ((now.softmax(0) - old.softmax(0)) * every).sum((0, 1))
    return out[:, :1] if of_keys else out


def cases(dtype):
    yield case(5, 7, 4, dtype, before=2), None, {}
    yield case(3, 1, 1, dtype, normed=False), None, {}
    yield case(6, 6, 17, dtype, window=2), None, {}
    keys = turned(*case(5, 5, 17, dtype))
    yield keys, None, {"of_keys": True}
    yield keys, (keys[4][:, 1] * 2, keys[5][:, 1]), {"of_keys": True}
    yield turned(*case(4, 4, 2, dtype, normed=False)), None, {"of_keys": True}


def test_the_reference_is_the_change_of_patterns_written_as_loops():
    for given, past, how in cases(torch.float64):
        found = pattern_changes(*given, past, **how, impl="reference")
        torch.testing.assert_close(found, literal(*given, past, **how), rtol=0, atol=1e-13)


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cpp_is_as_exact_as_torch_in_every_instruction_set(dtype, monkeypatch):
    name = {torch.float32: "float32", torch.float64: "float64"}[dtype]
    for isa in cpp.isas():
        monkeypatch.setenv("EAPCORE_ISA", isa)
        for given, past, how in cases(dtype):
            exact = literal(*given, past, **how)
            with cpp.record() as ran:
                found = pattern_changes(*given, past, **how)
            assert ran == [f"pattern_changes {isa} {name}"] and found.dtype == dtype
            error, torchs = (
                (x - exact).abs().max() for x in (found, pattern_changes(*given, past, **how, impl="reference"))
            )
            assert error <= 2 * torchs + 8 * torch.finfo(dtype).eps * (1 + exact.abs().max())
            assert (found[:, :, 0] == 0).all()
        for width, centred in ((70, True), (5, False), (64, True)):
            x, delta = torch.randn(2, 3, width, dtype=dtype), torch.randn(4, 3, 3, width, dtype=dtype)[:, 1:]
            with cpp.record() as ran:
                found = moved_rstd(x, delta, 1e-3, centred=centred)
            assert ran == [f"moved_rstd {isa} {name}"]
            y = (x + delta).double()
            exact = 1 / (y.var(-1, correction=0) + (0 if centred else y.mean(-1) ** 2) + 1e-3).sqrt()
            torch.testing.assert_close(found.double(), exact.permute(1, 2, 0), rtol=8 * torch.finfo(dtype).eps, atol=0)
            near = moved_rstd(x, delta, 1e-3, centred=centred, impl="reference")
            torch.testing.assert_close(near.double(), exact.permute(1, 2, 0), rtol=8 * torch.finfo(dtype).eps, atol=0)


@needs_cpp
def test_any_number_of_threads_gives_the_same_bits():
    before = torch.get_num_threads()
    for given, past, how in cases(torch.float32):
        try:
            found = []
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                found.append(pattern_changes(*given, past, **how))
        finally:
            torch.set_num_threads(before)
        assert all(torch.equal(x, found[0]) for x in found)


@needs_cpp
def test_far_scores_and_what_is_not_finite():
    raw, rstd, moved, known, normed, values = case(4, 4, 3, torch.float32)
    far = raw * 1e4  # patterns of one key each, whose other weights underflow
    for how in ({}, {"of_keys": True}):
        given = (
            far,
            rstd,
            moved,
            known if not how else turned(raw, rstd, moved, known, normed, values)[3],
            normed,
            values,
        )
        torch.testing.assert_close(
            pattern_changes(*given, **how).double(), literal(*given, **how), rtol=1e-5, atol=1e-5
        )
    raw[0, 1, 1, 0, 0] = math.nan
    found = pattern_changes(raw, rstd, moved, known, normed, values)
    assert found.isnan().nonzero().tolist() == [[0, 1, 1, 0]]
