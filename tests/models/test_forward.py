"""The sender buffer: every sender's output, in the caller's own memory, adding up to the residual stream."""

from __future__ import annotations

import oracle
import pytest
import torch
from models import random_model

from eapcore.models.forward import embed, run_layers, run_with_senders, sender_buffer

MODELS = {
    "gpt2": {},
    "attention-only": {"d_mlp": None, "n_layers": 3},
    "no LayerNorm": {"normalization": None, "scale": 0.2},
    "q k v apart": {"split_qkv": True, "n_heads": 1, "n_layers": 1},
}


def tokens_for(model, batch=3, length=7):
    return torch.randint(0, model.config.d_vocab, (batch, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_the_senders_and_the_output_biases_add_up_to_the_last_residual_stream(options):
    model = random_model(**options)
    tokens = tokens_for(model)
    *_, last = run_layers(model, embed(model, tokens))
    senders = run_with_senders(model, tokens)[1]
    assert senders.shape == (model.graph.n_senders, 3, 7, model.config.d_model)
    biases = sum(layer.b_o for layer in model.weights.layers)
    assert last.out.abs().max() > 1 and biases.abs().max() > 0.01
    torch.testing.assert_close(senders.sum(0) + biases, last.out, rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_each_sender_and_the_logits_equal_the_oracles(options):
    model = random_model(**options)
    tokens = tokens_for(model)
    logits, senders = run_with_senders(model, tokens)
    for b in range(len(tokens)):
        expected, _, expected_logits = oracle.run(model, tokens[b])
        torch.testing.assert_close(senders[:, b], torch.stack(expected).detach(), rtol=0, atol=1e-12)
        torch.testing.assert_close(logits[b], expected_logits.detach(), rtol=0, atol=1e-11)


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


@pytest.mark.parametrize(
    ("buffer", "message"),
    [
        (torch.zeros(9, 3, 7, 23, dtype=torch.float64), r"\[9, 3, 7, 24\] torch.float64 on cpu, got \[9, 3, 7, 23\]"),
        (torch.zeros(8, 3, 7, 24, dtype=torch.float64), r"\[9, 3, 7, 24\] torch.float64 on cpu, got \[8, 3, 7, 24\]"),
        (torch.zeros(9, 21, 24, dtype=torch.float64), r"\[9, 3, 7, 24\] torch.float64 on cpu, got \[9, 21, 24\]"),
        (torch.zeros(9, 3, 7, 24), r"torch.float64 on cpu, got \[9, 3, 7, 24\] torch.float32 on cpu"),
        (torch.zeros(9, 3, 7, 24, dtype=torch.float64, device="meta"), "torch.float64 on cpu, got .* on meta"),
        (torch.zeros(9, 3, 24, 7, dtype=torch.float64).transpose(2, 3), r"senders must be contiguous, got strides \("),
    ],
)
def test_a_buffer_that_does_not_fit_is_refused(buffer, message):
    model = random_model()
    assert model.graph.n_senders == 9
    with pytest.raises(ValueError, match=message):
        run_with_senders(model, tokens_for(model), buffer)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(7, dtype=torch.int64), r"tokens must be int64 \[B, T\] with at least one token, got .* \[7\]"),
        (torch.zeros(2, 7), r"tokens must be int64 \[B, T\] with at least one token, got torch.float32 \[2, 7\]"),
        (torch.zeros(2, 0, dtype=torch.int64), r"at least one token, got torch.int64 \[2, 0\]"),
        (torch.zeros(1, 17, dtype=torch.int64), "tokens have 17 positions, but the context of random is 16"),
        (torch.full((1, 3), 29), r"tokens have the token id 29, but the vocabulary of random is 0\.\.28"),
        (torch.full((1, 3), -1), r"tokens have the token id -1, but the vocabulary of random is 0\.\.28"),
    ],
)
def test_tokens_that_do_not_fit_are_refused(tokens, message):
    with pytest.raises(ValueError, match=message):
        run_with_senders(random_model(), tokens)
