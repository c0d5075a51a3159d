"""The sender buffer: every sender's output, in the caller's own memory, adding up to the residual stream."""

from __future__ import annotations

import oracle
import pytest
import torch
from models import KINDS, random_model
from refusal import refused

from eapcore.models.forward import embed, forward, prefix, run_stages, run_with_senders, sender_buffer, unembed
from eapcore.models.norm import Norm, NormInput

kinds = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)


def tokens_for(model, batch=3, length=7):
    return torch.randint(0, model.config.d_vocab, (batch, length), generator=torch.Generator().manual_seed(0))


@kinds
def test_the_senders_and_the_output_biases_add_up_to_the_last_residual_stream(options):
    model = random_model(**options)
    tokens = tokens_for(model)
    *_, last = run_stages(model, embed(model, tokens))
    senders = run_with_senders(model, tokens)[1]
    assert senders.shape == (model.graph.n_senders, 3, 7, model.config.d_model)
    biases = sum(attention.b_o for attention in model.attentions)
    assert last.out.abs().max() > 1 and biases.abs().max() > 0.01
    torch.testing.assert_close(senders.sum(0) + biases, last.out, rtol=0, atol=1e-12)


@kinds
def test_each_sender_and_the_logits_equal_the_oracles(options):
    model = random_model(**options)
    tokens = tokens_for(model)
    logits, senders = run_with_senders(model, tokens)
    for b in range(len(tokens)):
        expected = oracle.run(model, tokens[b])
        torch.testing.assert_close(senders[:, b], torch.stack(expected.senders).detach(), rtol=0, atol=1e-12)
        torch.testing.assert_close(logits[b], expected.logits.detach(), rtol=0, atol=1e-11)


def test_a_prefix_gives_what_the_whole_run_gives():
    model = random_model(n_layers=3)
    tokens = tokens_for(model, 2, 9)
    expected = forward(model, tokens)[:, 5:]
    x = embed(model, tokens[:, 5:], 5)
    for run in run_stages(model, x, past=prefix(model, tokens[:, :5])):
        x = run.out
    torch.testing.assert_close(unembed(model, x)[0], expected, rtol=0, atol=1e-12)


def test_reading_some_positions_gives_what_the_whole_run_gives_there():
    model = random_model(n_layers=3)
    tokens = tokens_for(model, 2, 9)
    read = torch.tensor([[8, 2], [0, 5]])
    expected = torch.stack([forward(model, tokens)[b, read[b]] for b in range(2)])
    x = embed(model, tokens)
    for run in run_stages(model, x, read=read):
        x = run.out
    assert x.shape == (2, 2, model.config.d_model)
    torch.testing.assert_close(unembed(model, x)[0], expected, rtol=0, atol=1e-12)


def test_the_callers_buffer_is_the_one_that_is_written():
    model = random_model()
    tokens = tokens_for(model)
    own = torch.full((model.graph.n_senders, 3, 7, model.config.d_model), torch.nan, dtype=torch.float64)
    logits, senders = run_with_senders(model, tokens, own)
    assert senders is own
    again, fresh = run_with_senders(model, tokens)
    assert torch.equal(own, fresh) and torch.equal(logits, again)
    assert fresh.data_ptr() != own.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_buffer_is_made_in_the_models_dtype(dtype):
    model = random_model(dtype=dtype)
    buffer = sender_buffer(model, 3, 7)
    assert (buffer.shape, buffer.dtype) == ((model.graph.n_senders, 3, 7, model.config.d_model), dtype)
    run_with_senders(model, tokens_for(model), buffer)
    assert bool(buffer.isfinite().all())


@pytest.mark.parametrize(("buffer", "message"), [
    (torch.zeros(9, 3, 7, 23, dtype=torch.float64), r"\[9, 3, 7, 24\] torch.float64 on cpu, got \[9, 3, 7, 23\]"),
    (torch.zeros(8, 3, 7, 24, dtype=torch.float64), r"\[9, 3, 7, 24\] torch.float64 on cpu, got \[8, 3, 7, 24\]"),
    (torch.zeros(9, 21, 24, dtype=torch.float64), r"\[9, 3, 7, 24\] torch.float64 on cpu, got \[9, 21, 24\]"),
    (torch.zeros(9, 3, 7, 24), r"torch.float64 on cpu, got \[9, 3, 7, 24\] torch.float32 on cpu"),
    (torch.zeros(9, 3, 7, 24, dtype=torch.float64, device="meta"), "torch.float64 on cpu, got .* on meta"),
    (torch.zeros(9, 3, 24, 7, dtype=torch.float64).transpose(2, 3), r"senders must be contiguous, got strides \("),
])  # fmt: skip
def test_a_buffer_that_does_not_fit_is_refused(buffer, message):
    model = random_model()
    assert model.graph.n_senders == 9
    refused(message, run_with_senders, model, tokens_for(model), buffer)


@pytest.mark.parametrize(("tokens", "message"), [
    (torch.zeros(7, dtype=torch.int64), r"tokens must be int64 \[B, T\] with at least one token, got .* \[7\]"),
    (torch.zeros(2, 7), r"tokens must be int64 \[B, T\] with at least one token, got torch.float32 \[2, 7\]"),
    (torch.zeros(2, 0, dtype=torch.int64), r"at least one token, got torch.int64 \[2, 0\]"),
    (torch.zeros(1, 17, dtype=torch.int64), "tokens have 17 positions, but the context of random is 16"),
    (torch.full((1, 3), 29), r"tokens have the token id 29, but the vocabulary of random is 0\.\.28"),
    (torch.full((1, 3), -1), r"tokens have the token id -1, but the vocabulary of random is 0\.\.28"),
])  # fmt: skip
def test_tokens_that_do_not_fit_are_refused(tokens, message):
    refused(message, run_with_senders, random_model(), tokens)


def test_a_normalisations_gradient_is_right_for_statistics_that_are_a_slice():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 8, generator=generator, dtype=torch.float64)
    norm = Norm("layernorm", torch.randn(8, generator=generator, dtype=torch.float64), torch.zeros(8).double(), 1e-5)
    grad = torch.randn(3, 2, 8, generator=generator, dtype=torch.float64)
    whole = norm.forward(x)[1]
    sliced = NormInput(whole.x[:, 1:3], whole.mean[:, 1:3], whole.rstd[:, 1:3])
    leaf = x[:, 1:3].clone().requires_grad_()
    (expected,) = torch.autograd.grad((oracle.norm(leaf, norm, 1e-5) * grad).sum(), leaf)
    torch.testing.assert_close(norm.backward(grad, sliced), expected, rtol=0, atol=1e-12)
