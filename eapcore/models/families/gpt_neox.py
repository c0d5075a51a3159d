"""GPT-NeoX and Pythia: heads and MLP in parallel or one after the other, rotary positions on a part of each head."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

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


def gpt_neox(raw: Mapping[str, Any]) -> Layout:
    """The layout that a configuration describes; ValueError for what is not supported, by name."""
    refuse(raw, {"attention_bias": (True,)})
    D, H, layers = integer(raw, "hidden_size"), integer(raw, "num_attention_heads"), integer(raw, "num_hidden_layers")
    K, M, V = D // H, integer(raw, "intermediate_size"), integer(raw, "vocab_size")
    base, scaling = rope(raw, "rotary_emb_base")
    agreed("rope_theta", raw.get("rope_theta"), base)
    share = positive(scaling, "partial_rotary_factor", default=positive(raw, "rotary_pct", default=0.25))
    for name in ("rotary_pct", "partial_rotary_factor"):
        agreed(name, raw.get(name), share)
    if D % H or share > 1:
        raise ValueError(
            f"hidden_size {D} must be a multiple of num_attention_heads {H}, and rotary_pct at most 1, got {share:g}"
        )
    config = ModelConfig(
        n_layers=layers,
        n_heads=H,
        d_model=D,
        d_head=K,
        d_mlp=M,
        d_vocab=V,
        n_ctx=integer(raw, "max_position_embeddings"),
        act_fn=activation(raw, "hidden_act", "gelu"),
        attn_scale=math.sqrt(K),
        eps=positive(raw, "layer_norm_eps", default=1e-5),
        parallel=flag(raw, "use_parallel_residual", True),
        rotary_frequencies=frequencies(base, int(K * share), scaling),
    )
    tied = flag(raw, "tie_word_embeddings", False)
    at = "layers.{}."
    qkv = at + "attention.query_key_value."

    def weight(w: Tensor) -> Tensor:  # a head's q, k and v follow each other
        return w.view(H, 3, K, D).transpose(0, 1).flatten(0, 1).transpose(1, 2)

    ends = {"w_e": Source(("embed_in.weight",), (V, D))}
    ends |= {f"ln_final.{i}": Source((f"final_layer_norm.{x}",), (D,)) for i, x in enumerate(("weight", "bias"))}
    ends["w_u"] = Source(("embed_out.weight",), (V, D), lambda w: w.T, required=not tied)
    layer = {
        "w_qkv.0": Source((qkv + "weight",), (3 * D, D), weight),
        "b_qkv": Source((qkv + "bias",), (3 * D,), lambda b: b.view(H, 3, K).transpose(0, 1).reshape(3 * H, K)),
        "w_o": Source((at + "attention.dense.weight",), (D, D), lambda w: w.T.unflatten(0, (H, K))),
        "b_o": Source((at + "attention.dense.bias",), (D,)),
        "w_in": linear(at + "mlp.dense_h_to_4h.weight", M, D),
        "b_in": Source((at + "mlp.dense_h_to_4h.bias",), (M,)),
        "w_out": linear(at + "mlp.dense_4h_to_h.weight", D, M),
        "b_out": Source((at + "mlp.dense_4h_to_h.bias",), (D,)),
    }
    for ours, theirs in (("ln1", "input_layernorm"), ("ln2", "post_attention_layernorm")):
        for i, part in enumerate(("weight", "bias")):
            layer[f"{ours}.{i}"] = Source((f"{at}{theirs}.{part}",), (D,))
    what = f"GPT-NeoX of {layers} layers, heads and MLP {'in parallel' if config.parallel else 'one after the other'}"
    aliases = {"lm_head.weight": "embed_out.weight"}  # in memory, and in files
    return Layout(what, config, ends, layer, tied, aliases=aliases, family="GPT-NeoX")
