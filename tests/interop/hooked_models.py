"""Random HookedTransformers for the tests against the real packages and for the fixtures made with them."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

WORDS = "the a cat dog bird fish sees likes hears and then old new red big home road tree , .".split()
BOS = "<|endoftext|>"
PAIRS = [  # prompts of different lengths, in two batches of different widths; clean and corrupt differ in one word
    ("the cat sees the dog and the cat likes", "the bird sees the dog and the cat likes", "dog", "cat"),
    ("a dog hears a bird", "a dog hears a fish", "bird", "fish"),
    ("the old cat likes", "the new cat likes", "home", "road"),
    ("a red bird sees a big", "a red bird hears a big", "tree", "dog"),
    ("then the fish", "then the bird", "sees", "likes"),
]
BATCHES = ((0, 1, 2), (3, 4))


def config_fields(attn_only: bool, **changes: object) -> dict:
    fields = {
        "n_layers": 2, "n_heads": 2, "d_model": 16, "d_head": 8, "d_mlp": None if attn_only else 24,
        "d_vocab": len(WORDS) + 2, "n_ctx": 16, "act_fn": None if attn_only else "gelu_new", "attn_only": attn_only,
        "normalization_type": "LN", "device": "cpu", "dtype": torch.float64, "seed": 0, "init_weights": False,
        "use_attn_result": True, "use_split_qkv_input": True, "use_hook_mlp_in": True,
    }  # fmt: skip
    return fields | changes


ROTARY = {"positional_embedding_type": "rotary", "rotary_dim": 4}
LLAMA = ROTARY | {
    "rotary_dim": None, "normalization_type": "RMS", "gated_mlp": True, "act_fn": "silu", "eps": 1e-6,
    "n_heads": 4, "n_key_value_heads": 2, "d_head": 6, "ungroup_grouped_query_attention": True,
}  # fmt: skip
GEMMA_2 = LLAMA | {
    "act_fn": "gelu_pytorch_tanh", "use_normalization_before_and_after": True, "attn_scale": 2.0,
    "attn_scores_soft_cap": 3.0, "output_logits_soft_cap": 5.0,
    "use_local_attn": True, "window_size": 3, "attn_types": ["global", "local"],
}  # fmt: skip
# Changes of `config_fields` that make a model of each family; those of FROM_3 are unknown to TransformerLens 2.
FAMILIES = {
    "llama": LLAMA,
    "llama 3.1": LLAMA | {"use_NTK_by_parts_rope": True, "NTK_original_ctx_len": 16, "rotary_base": 500},
    "mistral": LLAMA | {"use_local_attn": True, "window_size": 3, "attn_types": ["local"] * 2},
    "qwen3": LLAMA | {"use_qk_norm": True},
    "gemma": LLAMA | {"act_fn": "gelu_new", "n_key_value_heads": 1},
    "gemma 2": GEMMA_2,
    "gemma 3": GEMMA_2 | {"use_qk_norm": True, "rotary_base_local": 30.0, "rotary_scaling_factor": 4.0},
    "olmo 2": LLAMA | {"original_architecture": "Olmo2ForCausalLM", "d_model": 24, "n_key_value_heads": None},
    "neox": ROTARY | {"parallel_attn_mlp": True},
    "neox, one after the other": ROTARY,
    "gpt-j": ROTARY | {"parallel_attn_mlp": True, "rotary_adjacent_pairs": True},
    "one k and v head each, grouped": LLAMA | {"n_key_value_heads": 4},
}
FROM_3 = ("gemma 3", "olmo 2")


def hooked_transformer(attn_only: bool, *, seed: int = 0, tokenizer: bool = False, **changes: object):
    """A HookedTransformer with every weight random, biases and LayerNorm gains too."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    config = HookedTransformerConfig(**config_fields(attn_only, **changes))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 3.9 announces that 4 will not have it
        model = HookedTransformer(config, tokenizer=word_tokenizer() if tokenizer else None)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.4
            gain = name.endswith((".ln1.w", ".ln2.w", "ln_final.w", "_post.w", "_norm.w"))
            parameter.copy_(values + 1 if gain else values)
            behind = model.cfg.use_normalization_before_and_after or model.cfg.original_architecture
            if name.endswith(("attn.b_O", "attn._b_V", "attn.b_V")) and behind:
                parameter.zero_()  # a bias in front of a norm is refused
    return model


def word_tokenizer():
    """One token a word; BOS, EOS and padding are one token, as in GPT-2."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    vocabulary = {BOS: 0, "<unk>": 1} | {word: i + 2 for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    names = {"bos_token": BOS, "eos_token": BOS, "pad_token": BOS, "unk_token": "<unk>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="right", **names)
    fast.init_kwargs |= {
        "name_or_path": "words",
        "add_bos_token": True,
    }  # or TransformerLens would look for it on the Hub
    return fast


def answers(index: tuple[int, ...]) -> Tensor:
    """(right, wrong) of some of PAIRS, [B, 2]."""
    return torch.tensor([[WORDS.index(PAIRS[i][2]) + 2, WORDS.index(PAIRS[i][3]) + 2] for i in index])


def text_batches() -> list[tuple[list[str], list[str], Tensor]]:
    return [([PAIRS[i][0] for i in index], [PAIRS[i][1] for i in index], answers(index)) for index in BATCHES]


def logit_diff(logits: Tensor, clean_logits: Tensor, input_lengths: Tensor, label: Tensor) -> Tensor:
    """Mean logit difference at the last token of each prompt, in EAP-IG's form."""
    last = logits[torch.arange(len(logits)), input_lengths - 1]
    right, wrong = (last.gather(1, label[:, [i]]) for i in (0, 1))
    return (right - wrong).mean()
