"""GPT-2, as transformers saves it, and as nanoGPT does: with torch's Linear, and perhaps without biases."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from eapcore.models.config import ModelConfig
from eapcore.models.families.names import Layout, Source, activation, flag, integer, positive, refuse


def gpt2(raw: Mapping[str, Any]) -> Layout:
    """The layout that a configuration, or nanoGPT's model_args, describes; ValueError for what is not supported, by
    name."""
    refuse(raw, {"add_cross_attention": (False,), "pruned_heads": ({},)})
    d_model = integer(raw, "n_embd", "hidden_size")
    nano = "block_size" in raw and "model_type" not in raw
    n_heads = integer(raw, "n_head", "num_attention_heads")
    if d_model % n_heads:
        raise ValueError(f"n_embd {d_model} of the configuration must be a multiple of n_head {n_heads}")
    config = ModelConfig(
        n_layers=integer(raw, "n_layer", "num_hidden_layers"),
        n_heads=n_heads,
        d_model=d_model,
        d_head=d_model // n_heads,
        d_mlp=4 * d_model if raw.get("n_inner") is None else integer(raw, "n_inner"),
        d_vocab=integer(raw, "vocab_size"),
        n_ctx=integer(raw, "n_positions", "n_ctx", "max_position_embeddings", "block_size"),
        act_fn=activation(raw, "activation_function", "gelu" if nano else "gelu_new"),
        attn_scale=math.sqrt(d_model // n_heads) if flag(raw, "scale_attn_weights", True) else 1.0,
        eps=positive(raw, "layer_norm_epsilon", default=1e-5),
        scale_attn_by_inverse_layer_idx=flag(raw, "scale_attn_by_inverse_layer_idx", False),
    )
    D, H, K, M, V = config.d_model, n_heads, config.d_head, config.d_mlp or 0, config.d_vocab
    tied = flag(raw, "tie_word_embeddings", True)
    ends = {
        "w_e": Source(("wte.weight",), (V, D)),
        "w_pos": Source(("wpe.weight",), (config.n_ctx, D)),
        "ln_final.0": Source(("ln_f.weight",), (D,)),
        "ln_final.1": Source(("ln_f.bias",), (D,)),
        "w_u": Source(("lm_head.weight",), (V, D), lambda w: w.T, required=not tied),
        "b_u": Source(("lm_head.bias",), (V,), required=False),
    }
    layer = {
        "ln1.0": Source(("h.{}.ln_1.weight",), (D,)),
        "ln1.1": Source(("h.{}.ln_1.bias",), (D,)),
        "w_qkv.0": Source(("h.{}.attn.c_attn.weight",), (D, 3 * D), lambda w: w.view(D, 3 * H, K).permute(1, 0, 2)),
        "b_qkv": Source(("h.{}.attn.c_attn.bias",), (3 * D,), lambda b: b.view(3 * H, K)),
        "w_o": Source(("h.{}.attn.c_proj.weight",), (D, D), lambda w: w.view(H, K, D)),
        "b_o": Source(("h.{}.attn.c_proj.bias",), (D,)),
        "ln2.0": Source(("h.{}.ln_2.weight",), (D,)),
        "ln2.1": Source(("h.{}.ln_2.bias",), (D,)),
        "w_in": Source(("h.{}.mlp.c_fc.weight",), (D, M)),
        "b_in": Source(("h.{}.mlp.c_fc.bias",), (M,)),
        "w_out": Source(("h.{}.mlp.c_proj.weight",), (M, D)),
        "b_out": Source(("h.{}.mlp.c_proj.bias",), (D,)),
    }
    if not flag(raw, "bias", True):
        ends = {name: source for name, source in ends.items() if name != "ln_final.1"}
        layer = {name: source for name, source in layer.items() if not name.startswith("b_") and name[-2:] != ".1"}
    matrices = tuple(layer[name].names[0] for name in ("w_qkv.0", "w_o", "w_in", "w_out"))
    kind = f"{'nanoGPT' if nano else 'GPT-2'} of {config.n_layers} layers with {'a tied' if tied else 'an untied'} head"
    return Layout(kind, config, ends, layer, tied=tied, turned=matrices, family="nanoGPT" if nano else "GPT-2")
