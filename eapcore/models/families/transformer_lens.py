"""TransformerLens: its state dicts, and the models that its authors publish in that form."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from eapcore.models.config import ModelConfig
from eapcore.models.families.names import Layout, Source, activation, flag, integer, positive, refuse

_ONLY = {
    "positional_embedding_type": ("standard",),
    "shortformer_pos": (False,),
    "attention_dir": ("causal",),
    "normalization_type": ("LN", "LNPre"),
    "normalization": ("LN", "LNPre"),
    "final_rms": (False,),
    "gated_mlp": (False,),
    "parallel_attn_mlp": (False,),
    "post_embedding_ln": (False,),
    "use_normalization_before_and_after": (False,),
    "use_qk_norm": (False,),
    "use_local_attn": (False,),
    "num_experts": (1,),
    "attn_scores_soft_cap": (),
    "output_logits_soft_cap": (),
}


def transformer_lens(raw: Mapping[str, Any]) -> Layout:
    """The layout that a configuration describes; ValueError for what is not supported, by name."""
    raw = {name: None if value == -1 else value for name, value in raw.items()}  # -1 stands for "not given" there
    refuse(raw, _ONLY)
    d_model = integer(raw, "d_model")
    if raw.get("n_heads") is None and raw.get("d_head") is None:
        raise ValueError("the configuration lacks n_heads and d_head")
    n_heads = integer(raw, "n_heads") if raw.get("n_heads") is not None else d_model // integer(raw, "d_head")
    d_head = integer(raw, "d_head") if raw.get("d_head") is not None else d_model // n_heads
    attn_only = flag(raw, "attn_only", False)
    d_vocab = integer(raw, "d_vocab")
    refuse(raw, {"d_vocab_out": (d_vocab,), "n_key_value_heads": (n_heads,)})
    if not attn_only:
        refuse(raw, {"neuron_scale": (1,), "neuron_temp": (1,)})
    norm = next((raw[name] for name in ("normalization_type", "normalization") if name in raw), "LN")
    config = ModelConfig(
        n_layers=integer(raw, "n_layers"),
        n_heads=n_heads,
        d_model=d_model,
        d_head=d_head,
        # An attention-only model may still carry the width and the activation of the MLPs that it does not have.
        d_mlp=None if attn_only else 4 * d_model if raw.get("d_mlp") is None else integer(raw, "d_mlp"),
        d_vocab=d_vocab,
        n_ctx=integer(raw, "n_ctx"),
        act_fn=None if attn_only else activation(raw, "act_fn", None),
        attn_scale=(
            positive(raw, "attn_scale", default=math.sqrt(d_head)) if flag(raw, "use_attn_scale", True) else 1.0
        ),
        normalization=None if norm is None else "layernorm",
        eps=positive(raw, "eps", "ln_eps", default=1e-5),
        scale_attn_by_inverse_layer_idx=flag(raw, "scale_attn_by_inverse_layer_idx", False),
    )
    D, H, K, M, V = d_model, n_heads, d_head, config.d_mlp or 0, d_vocab
    ends = {
        "w_e": Source(("embed.W_E",), (V, D)),
        "w_pos": Source(("pos_embed.W_pos",), (config.n_ctx, D)),
        "w_u": Source(("unembed.W_U",), (D, V)),
        "b_u": Source(("unembed.b_U",), (V,), required=False),
    }
    layer = {f"w_qkv.{i}": Source((f"blocks.{{}}.attn.W_{part}",), (H, D, K)) for i, part in enumerate("QKV")}
    layer |= {
        "b_qkv": Source(tuple(f"blocks.{{}}.attn.b_{part}" for part in "QKV"), (H, K), lambda *b: torch.cat(b)),
        "w_o": Source(("blocks.{}.attn.W_O",), (H, K, D)),
        "b_o": Source(("blocks.{}.attn.b_O",), (D,)),
    }
    if norm == "LN":
        for place, part in enumerate("wb"):
            ends[f"ln_final.{place}"] = Source((f"ln_final.{part}",), (D,))
            for ln in ["ln1"] if attn_only else ["ln1", "ln2"]:
                layer[f"{ln}.{place}"] = Source((f"blocks.{{}}.{ln}.{part}",), (D,))
    if not attn_only:
        layer |= {
            "w_in": Source(("blocks.{}.mlp.W_in",), (D, M)),
            "b_in": Source(("blocks.{}.mlp.b_in",), (M,)),
            "w_out": Source(("blocks.{}.mlp.W_out",), (M, D)),
            "b_out": Source(("blocks.{}.mlp.b_out",), (D,)),
        }
    kind = f"TransformerLens model of {config.n_layers} layers with normalization {norm}"
    return Layout(kind, config, ends, layer, folded=norm == "LNPre")
