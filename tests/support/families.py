"""Models of transformers on random weights, of every family, and ours made of them."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from eapcore.models.load import load
from eapcore.tasks import PromptPairs

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()


V = 29
SIZES = {"vocab_size": V, "hidden_size": 18, "intermediate_size": 33, "num_hidden_layers": 2}
SIZES |= {"max_position_embeddings": 64}
HEADS = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8}
QWEN2 = {"hidden_size": 18, "num_attention_heads": 3, "num_key_value_heads": 1}
ROPE = {"rope_theta": 500.0, "factor": 4.0}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
NEOX = {"hidden_size": 24, "num_attention_heads": 3, "rope_parameters": {"rope_theta": 100.0, "rope_type": "default"}}
OLMO = {"hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
CAPS = {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0}
KINDS = {
    "query_pre_attn_scalar": 5,
    "rope_parameters": {
        "sliding_attention": {"rope_theta": 30.0, "rope_type": "default"},
        "full_attention": {"rope_theta": 500.0, "rope_type": "linear", "factor": 4.0},
    },
}
# (configuration class, what it is given); odd sizes, one, two and three key and value heads.
CASES = {
    "llama": ("LlamaConfig", HEADS),
    "llama, one head each": ("LlamaConfig", HEADS | {"num_key_value_heads": 6, "num_hidden_layers": 3}),
    "llama3 rope": ("LlamaConfig", HEADS | {"rope_parameters": ROPE | LLAMA3 | {"rope_type": "llama3"}}),
    "llama, linear rope, biases, tied": (
        "LlamaConfig",
        HEADS
        | {"attention_bias": True, "tie_word_embeddings": True}
        | {"rope_parameters": ROPE | {"rope_type": "linear"}},
    ),
    "mistral": ("MistralConfig", HEADS | {"num_key_value_heads": 3, "sliding_window": 4}),
    "qwen2": ("Qwen2Config", QWEN2),
    "qwen2, later layers windowed": (
        "Qwen2Config",
        QWEN2 | {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", HEADS),
    "gemma": ("GemmaConfig", HEADS | {"num_key_value_heads": 1}),
    "gemma2": ("Gemma2Config", HEADS | {"sliding_window": 4, "query_pre_attn_scalar": 5} | CAPS),
    "gemma3": (
        "Gemma3TextConfig",
        HEADS | {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]} | KINDS,
    ),
    "olmo2": ("Olmo2Config", OLMO),
    "olmo2, one key head": ("Olmo2Config", OLMO | {"num_key_value_heads": 1, "num_hidden_layers": 3}),
    "olmo2, one head each": ("Olmo2Config", OLMO | {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "neox": ("GPTNeoXConfig", NEOX),
    "neox, one after the other, half turned": (
        "GPTNeoXConfig",
        NEOX
        | {"use_parallel_residual": False}
        | {"rope_parameters": NEOX["rope_parameters"] | {"partial_rotary_factor": 0.5}},
    ),
}  # fmt: skip
GROUPED = [name for name in CASES if "neox" not in name and "each" not in name]


@cache
def theirs(name):
    kind, given = CASES[name]
    return random_module(kind, SIZES | given)


def random_module(kind, given):
    """A model of transformers with every weight random, in float64."""
    config = getattr(transformers, kind)(**given)
    return randomised(transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager"))


def randomised(module):
    module = module.double().eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3
        parameter.data = drawn + (parameter.ndim == 1) * 0.5
    return module


@cache
def ours(name, kv="each", dtype=None):
    return load(theirs(name), dtype=dtype, kv=kv)


def pairs_for(model, lengths=(9, 9, 6)):
    """Pairs that first differ at three positions, so that prefixes are shared and batches cut."""
    generator = torch.Generator().manual_seed(2)
    clean = [torch.randint(0, V, (length,), generator=generator).tolist() for length in lengths]
    corrupt = [list(prompt) for prompt in clean]
    for at, prompt in enumerate(corrupt, 1):
        prompt[at] = (prompt[at] + 1) % V
        prompt[-2] = (prompt[-2] + 3) % V
    count = len(lengths)
    return PromptPairs.from_lists(clean, corrupt, [[1], [2], [3]][:count], [[4, 5], [6], [7]][:count])
