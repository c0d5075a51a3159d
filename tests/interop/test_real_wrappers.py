"""Wrappers of the real packages around transformers models and HookedTransformers: tests/interop/run.sh runs this in
every environment; what one does not have is skipped."""

from __future__ import annotations

import warnings

import pytest
import torch
from refusal import refused

import eapcore
from eapcore.interop import auto_circuit
from eapcore.interop.transformer_lens import from_hooked_transformer
from eapcore.models.forward import forward

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("default")
TOKENS = torch.tensor([[1, 2, 3, 4, 5]])
ROTARY = {"vocab_size": 29, "hidden_size": 24, "intermediate_size": 33, "num_hidden_layers": 2}
ROTARY |= {"max_position_embeddings": 64, "num_attention_heads": 6}
GROUPED = ROTARY | {"num_key_value_heads": 2, "head_dim": 8}
MODELS = {
    "GPT2": {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 29, "n_positions": 16, "bos_token_id": 0,
        "eos_token_id": 0},
    "Llama": GROUPED, "Qwen3": GROUPED, "Gemma2": GROUPED, "GPTNeoX": ROTARY,
}  # fmt: skip


def module_of(name):
    config = getattr(transformers, f"{name}Config")(**MODELS[name])
    kind = "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
    config.architectures = [kind]
    torch.manual_seed(0)
    module = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return module


def error_of(model, expected):
    return float((forward(model, TOKENS) - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", MODELS)
def test_a_transformer_bridge_is_taken_with_its_weights(name):
    bridge_module = pytest.importorskip("transformer_lens.model_bridge")
    from hooked_models import word_tokenizer

    module = module_of(name)
    with torch.no_grad():
        expected = module(TOKENS).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bridge = bridge_module.TransformerBridge.boot_transformers(
            name.lower(), hf_model=module, tokenizer=word_tokenizer(), device="cpu"
        )
    for load in (eapcore.load, from_hooked_transformer):
        model = load(bridge)
        assert error_of(model, expected) <= 1e-5
    refused("part of a TransformerBridge: give the bridge", eapcore.load, bridge.original_model)
    bridge.add_hook("blocks.0.hook_out", lambda value, hook: 2 * value)
    refused(r"bridge\.reset_hooks\(\)", eapcore.load, bridge)
    bridge.reset_hooks()
    assert error_of(eapcore.load(bridge), expected) <= 1e-5
    if name == "GPT2":
        with torch.no_grad():
            bridge.blocks[0].attn.q.original_component.weight.mul_(3)  # a view of the joint matrix
            assert error_of(eapcore.load(bridge), bridge(TOKENS)) <= 1e-5 < error_of(eapcore.load(bridge), expected)
        bridge.enable_compatibility_mode()
        refused("processed weights", eapcore.load, bridge)


def test_an_nnsight_model_is_taken_unless_it_was_edited():
    nnsight = pytest.importorskip("nnsight")
    module = module_of("Llama")
    with torch.no_grad():
        expected = module(TOKENS).logits
    model = nnsight.NNsight(module)
    assert error_of(eapcore.load(model), expected) <= 1e-5
    assert error_of(eapcore.load(module), expected) <= 1e-5  # whose forwards it has wrapped
    with model.edit(inplace=True):
        model.model.layers[0].output[:] = 0
    refused(r"model\.clear_edits\(\)", eapcore.load, model)
    model.clear_edits()
    eapcore.load(model)
    other = module_of("Llama")
    other.model.layers[0].mlp.forward = torch.zeros_like
    refused("computes something else|a replaced forward", eapcore.load, nnsight.NNsight(other))


@pytest.mark.parametrize("attn_only", [False, True])
def test_auto_circuit_s_model_and_loader_are_taken(attn_only):
    pytest.importorskip("auto_circuit")
    from auto_circuit.data import PromptDataLoader, PromptDataset
    from auto_circuit.utils.graph_utils import patchable_model
    from hooked_models import hooked_transformer

    hooked = hooked_transformer(attn_only)
    with torch.no_grad():
        expected = hooked(TOKENS)
    patchable = patchable_model(
        hooked, factorized=True, slice_output="last_seq", seq_len=None, separate_qkv=True, device=torch.device("cpu")
    )
    assert error_of(eapcore.load(patchable), expected) <= 1e-12
    hooked.add_perma_hook("blocks.0.attn.hook_z", lambda value, hook: 2 * value)
    refused("wrapped_model.reset_hooks", eapcore.load, patchable)
    prompts = torch.randint(2, 20, (5, 6))
    data = PromptDataset(list(prompts), list(prompts + 1), list(prompts[:, :1]), list(prompts[:, 1:2]))
    pairs = auto_circuit.pairs_of_loader(PromptDataLoader(data, seq_len=6, diverge_idx=0, batch_size=2))
    assert pairs.clean.shape == (4, 6)  # it leaves out what does not fill a batch
    assert set(map(tuple, pairs.clean.tolist())) <= set(map(tuple, prompts.tolist()))
