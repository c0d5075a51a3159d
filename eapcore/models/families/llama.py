"""Llama, and those that are built like it: Mistral, Ministral, Qwen2, Qwen3, SmolLM, Gemma 1 to 3, OLMo 2."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from eapcore.models.config import ModelConfig
from eapcore.models.families.names import (
    Layout,
    Source,
    activation,
    agreed,
    flag,
    frequencies,
    integer,
    linear,
    positive,
    refuse,
    rope,
)

_ONLY = {
    "attention_multiplier": (),
    "num_local_experts": (),
    "num_experts": (),
    "mlp_bias": (False,),
    "use_bidirectional_attention": (False,),
    "partial_rotary_factor": (1, 1.0),
}
# What transformers takes where a configuration is silent, as those inside another often are of what is usual; null is
# not silence.
_SIZES = {
    "llama": (32000, 4096, 11008, 32, 32, 2048),
    "mistral": (32000, 4096, 14336, 32, 32, 131072),
    "ministral": (32000, 4096, 14336, 32, 32, 131072),
    "qwen2": (151936, 4096, 22016, 32, 32, 32768),
    "qwen3": (151936, 4096, 22016, 32, 32, 32768),
    "gemma": (256000, 3072, 24576, 28, 16, 8192),
    "gemma2": (256000, 2304, 9216, 26, 8, 8192),
    "gemma3_text": (262208, 2304, 9216, 26, 8, 131072),
    "olmo2": (50304, 4096, 11008, 32, 32, 2048),
}
_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
_MISTRAL = {"num_key_value_heads": 8, "sliding_window": 4096}
_GEMMA2 = {"head_dim": 256, "num_key_value_heads": 4, "query_pre_attn_scalar": 256, "sliding_window": 4096}
_SILENT: dict[str, dict[str, Any]] = {
    "mistral": _MISTRAL,
    "ministral": _MISTRAL,
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128, "sliding_window": 4096},
    "gemma": {"num_key_value_heads": 16, "head_dim": 256},
    "gemma2": _GEMMA2 | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3_text": _GEMMA2,
    "olmo2": {"rms_norm_eps": 1e-5},
}


def llama(raw: Mapping[str, Any], *, whole_gamma: bool = False) -> Layout:
    """The layout that a configuration describes; ValueError for what is not supported, by name.

    whole_gamma: its norms are stored as γ where the family stores γ − 1.
    """
    usual = dict(zip(_FIELDS, _SIZES[raw["model_type"]], strict=True))
    raw = {**usual, **_SILENT.get(raw["model_type"], {}), **raw}
    refuse(raw, _ONLY)
    kind, gemma, olmo = raw["model_type"], raw["model_type"].startswith("gemma"), raw["model_type"] == "olmo2"
    later = gemma and kind != "gemma"
    behind = later or olmo  # there are norms behind heads and MLPs
    if behind:
        refuse(raw, {"attention_bias": (False,)})  # which the norm behind the heads would scale from prompt to prompt
    if kind == "gemma3_text":
        refuse(raw, {"attn_logit_softcapping": ()})  # which transformers takes and does not compute with
    d_model, heads, layers = (
        integer(raw, "hidden_size"),
        integer(raw, "num_attention_heads"),
        integer(raw, "num_hidden_layers"),
    )
    d_head = d_model // heads if raw.get("head_dim") is None else integer(raw, "head_dim")
    n_kv = heads if raw.get("num_key_value_heads") is None else integer(raw, "num_key_value_heads")
    config = ModelConfig(
        n_layers=layers,
        n_heads=heads,
        d_model=d_model,
        d_head=d_head,
        d_mlp=integer(raw, "intermediate_size"),
        d_vocab=integer(raw, "vocab_size"),
        n_ctx=integer(raw, "max_position_embeddings"),
        act_fn=_activation(raw, kind),
        attn_scale=math.sqrt(positive(raw, "query_pre_attn_scalar", default=d_head) if later else d_head),
        normalization="rmsnorm",
        eps=positive(raw, "rms_norm_eps", default=1e-6),
        rotary_frequencies=_frequencies(raw, d_head, "full_attention"),
        gated=True,
        n_key_value_heads=None if n_kv == heads else n_kv,
        local_frequencies=_frequencies(raw, d_head, "sliding_attention") if kind == "gemma3_text" else (),
        qk_norm=kind in ("qwen3", "gemma3_text", "olmo2"),
        qk_norm_joint=olmo,
        pre_norms=not olmo,
        attn_softcap=_cap(raw, "attn_logit_softcapping") if later else None,
        logits_softcap=_cap(raw, "final_logit_softcapping") if later else None,
        post_norms=behind,
        windows=_windows(raw, layers),
        embed_scale=math.sqrt(d_model) if gemma else 1.0,
    )
    D, H, G, K, M, V = d_model, heads, n_kv, d_head, config.d_mlp or 0, config.d_vocab
    tied, shift = (
        flag(raw, "tie_word_embeddings", gemma),
        (lambda w: w + 1) if gemma and not whole_gamma else (lambda w: w),
    )
    bias = flag(raw, "attention_bias", kind == "qwen2")
    at = "layers.{}."
    attention = at + "self_attn."
    ends = {
        "w_e": Source(("embed_tokens.weight",), (V, D)),
        "ln_final.0": Source(("norm.weight",), (D,), shift, wide=gemma),
        "w_u": Source(("lm_head.weight",), (V, D), lambda w: w.T, required=not tied),
    }
    layer = {
        "w_qkv.0": linear(attention + "q_proj.weight", H * K, D, H),
        "w_qkv.1": linear(attention + "k_proj.weight", G * K, D, G),
        "w_qkv.2": linear(attention + "v_proj.weight", G * K, D, G),
        "w_o": Source((attention + "o_proj.weight",), (D, H * K), lambda w: w.T.unflatten(0, (H, K))),
        "w_in": linear(at + "mlp.gate_proj.weight", M, D),
        "w_up": linear(at + "mlp.up_proj.weight", M, D),
        "w_out": linear(at + "mlp.down_proj.weight", D, M),
    }
    if bias:  # q, k and v in one [H + 2G, K]
        names = tuple(f"{attention}{x}_proj.bias" for x in "qkv")
        layer["b_qkv"] = Source(names, ((H * K,), (G * K,), (G * K,)), lambda *b: torch.cat(b).view(-1, K))
        if kind != "qwen2":
            layer["b_o"] = Source((attention + "o_proj.bias",), (D,))
    norms = {} if olmo else {"ln1": "input", "ln2": "pre_feedforward" if later else "post_attention"}
    norms |= {"post_a": "post_attention", "post_m": "post_feedforward"} if behind else {}
    layer |= {f"{x}.0": Source((f"{at}{name}_layernorm.weight",), (D,), shift, wide=gemma) for x, name in norms.items()}
    if config.qk_norm:
        sizes = (("q", H * K), ("k", G * K)) if olmo else (("q", K), ("k", K))
        layer |= {
            f"{x}_norm.0": Source((f"{attention}{x}_norm.weight",), (size,), shift, wide=gemma) for x, size in sizes
        }
    what = f"{kind} of {layers} layers with {'a tied' if tied else 'an untied'} head"
    return Layout(what, config, ends, layer, tied, family=kind)


def _frequencies(raw: Mapping[str, Any], d_head: int, layers: str) -> tuple[float, ...]:
    """The rotary frequencies of a kind of layer."""
    if raw["model_type"] != "gemma3_text":
        base, scaling = rope(raw, "rope_theta")
    elif layers == "full_attention":
        base, scaling = rope(raw, "rope_theta", default=1e6, layers=layers)
    else:
        base, scaling = rope({**raw, "rope_scaling": None}, "rope_local_base_freq", layers=layers)
    refuse(scaling, {"partial_rotary_factor": (1, 1.0)})
    return frequencies(base, d_head, scaling)


def _cap(raw: Mapping[str, Any], name: str) -> float | None:
    return None if raw.get(name) is None else positive(raw, name, default=0)


def _activation(raw: Mapping[str, Any], kind: str) -> str:
    """Gemma's first configurations say gelu where the tanh form is meant; a later field, which was read for a while,
    said which."""
    if not kind.startswith("gemma"):
        return activation(raw, "hidden_act", "silu")
    later = activation(raw, "hidden_activation", None) if raw.get("hidden_activation") else None
    if kind != "gemma":
        return later or "gelu_new"
    found = "gelu_new" if raw.get("hidden_act") in (None, "gelu") else activation(raw, "hidden_act", None)
    agreed("hidden_activation", later, found)
    return found


def _windows(raw: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    """For each layer how many positions a query sees; empty where all see all."""
    kind, kinds = raw["model_type"], raw.get("layer_types")
    if kind in ("llama", "gemma", "olmo2"):
        return ()
    asked = flag(raw, "use_sliding_window", False) or not kind.startswith("qwen")
    window = integer(raw, "sliding_window") if asked and raw.get("sliding_window") is not None else None
    if kinds is None:  # as before there were kinds of layers
        first, every = 0, layers + 1
        if kind.startswith("qwen"):
            first = (
                0
                if raw.get("max_window_layers") == 0
                else integer({"max_window_layers": 28, **raw}, "max_window_layers")
            )
        elif kind.startswith("gemma"):
            every = 2 if kind == "gemma2" else integer({"sliding_window_pattern": 6, **raw}, "sliding_window_pattern")
        full = [window is None or index < first or (index + 1) % every == 0 for index in range(layers)]
        kinds = ["full_attention" if here else "sliding_attention" for here in full]
    if len(kinds) != layers or not set(kinds) <= {"full_attention", "sliding_attention"}:
        raise ValueError(f"layer_types of the configuration must be {layers} of full_attention and sliding_attention")
    if kind == "mistral" and set(kinds) != {"full_attention" if window is None else "sliding_attention"}:
        raise ValueError(
            "layer_types of the configuration is read of a 'ministral' alone, not of every model_type 'mistral': say "
            "which is meant, by that model_type or without layer_types"
        )
    if window is None and "sliding_attention" in kinds:
        raise ValueError("layer_types of the configuration has sliding_attention, but sliding_window is not in use")
    return () if window is None else tuple(window if each == "sliding_attention" else None for each in kinds)
