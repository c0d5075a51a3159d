"""TransformerLens: its state dicts, and the models that its authors publish in that form."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from eapcore.models.config import ModelConfig
from eapcore.models.families.names import Layout, Shapes, Tensors, _activation, _flag, _integer, _positive, _refuse
from eapcore.models.weights import LayerWeights, Weights

# TransformerLens: its state dicts, and the models that its authors publish in that form

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


def _transformer_lens(raw: Mapping[str, Any]) -> Layout:
    raw = {name: None if value == -1 else value for name, value in raw.items()}  # -1 stands for "not given" there
    _refuse(raw, _ONLY)
    d_model = _integer(raw, "d_model")
    if raw.get("n_heads") is None and raw.get("d_head") is None:
        raise ValueError("the configuration lacks n_heads and d_head")
    n_heads = _integer(raw, "n_heads") if raw.get("n_heads") is not None else d_model // _integer(raw, "d_head")
    d_head = _integer(raw, "d_head") if raw.get("d_head") is not None else d_model // n_heads
    attn_only = _flag(raw, "attn_only", False)
    d_vocab = _integer(raw, "d_vocab")
    _refuse(raw, {"d_vocab_out": (d_vocab,), "n_key_value_heads": (n_heads,)})
    if not attn_only:
        _refuse(raw, {"neuron_scale": (1,), "neuron_temp": (1,)})
    norm = next((raw[name] for name in ("normalization_type", "normalization") if name in raw), "LN")
    config = ModelConfig(
        n_layers=_integer(raw, "n_layers"),
        n_heads=n_heads,
        d_model=d_model,
        d_head=d_head,
        # An attention-only model may still carry the width and the activation of the MLPs that it does not have.
        d_mlp=None if attn_only else 4 * d_model if raw.get("d_mlp") is None else _integer(raw, "d_mlp"),
        d_vocab=d_vocab,
        n_ctx=_integer(raw, "n_ctx"),
        act_fn=None if attn_only else _activation(raw, "act_fn", None),
        attn_scale=(
            _positive(raw, "attn_scale", default=math.sqrt(d_head)) if _flag(raw, "use_attn_scale", True) else 1.0
        ),
        normalization=None if norm is None else "layernorm",
        eps=_positive(raw, "eps", "ln_eps", default=1e-5),
        scale_attn_by_inverse_layer_idx=_flag(raw, "scale_attn_by_inverse_layer_idx", False),
    )
    H, K, D, M, V = n_heads, d_head, d_model, config.d_mlp or 0, d_vocab
    norms = ["ln1"] if attn_only else ["ln1", "ln2"]
    required: Shapes = {"embed.W_E": (V, D), "pos_embed.W_pos": (config.n_ctx, D), "unembed.W_U": (D, V)}
    for layer in range(config.n_layers):
        at = f"blocks.{layer}."
        required |= {f"{at}attn.W_{part}": (H, D, K) for part in "QKV"}
        required |= {f"{at}attn.b_{part}": (H, K) for part in "QKV"}
        required |= {at + "attn.W_O": (H, K, D), at + "attn.b_O": (D,)}
        if norm == "LN":
            required |= {f"{at}{ln}.{part}": (D,) for ln in norms for part in "wb"}
        if not attn_only:
            required |= {at + "mlp.W_in": (D, M), at + "mlp.b_in": (M,)}
            required |= {at + "mlp.W_out": (M, D), at + "mlp.b_out": (D,)}
    if norm == "LN":
        required |= {"ln_final.w": (D,), "ln_final.b": (D,)}
    kind = f"TransformerLens model of {config.n_layers} layers with normalization {norm}"
    optional: Shapes = {"unembed.b_U": (V,)}
    return Layout(kind, config, required, optional, lambda tensors: _transformer_lens_weights(config, norm, tensors))


def _transformer_lens_weights(config: ModelConfig, norm: str | None, tensors: Tensors) -> Weights:
    def layer_norm(name: str) -> tuple[Tensor, Tensor] | None:
        if norm == "LNPre":  # folded into the weights that follow: only the normalisation itself is left
            like = tensors("embed.W_E")
            return like.new_ones(config.d_model), like.new_zeros(config.d_model)
        return tensors.pair(name, ".w", ".b") if norm else None

    layers = []
    for layer in range(config.n_layers):
        at = f"blocks.{layer}."
        attention = LayerWeights(
            w_qkv=tuple(tensors(f"{at}attn.W_{part}") for part in "QKV"),
            b_qkv=torch.cat([tensors(f"{at}attn.b_{part}") for part in "QKV"]),  # [3H, K]
            w_o=tensors(at + "attn.W_O"),
            b_o=tensors(at + "attn.b_O"),
            ln1=layer_norm(at + "ln1"),
        )
        if config.attn_only:
            layers.append(attention)
            continue
        w_in, b_in = tensors.pair(at + "mlp.", "W_in", "b_in")
        w_out, b_out = tensors.pair(at + "mlp.", "W_out", "b_out")
        layers.append(replace(attention, ln2=layer_norm(at + "ln2"), w_in=w_in, b_in=b_in, w_out=w_out, b_out=b_out))
    return Weights(
        w_e=tensors("embed.W_E"),
        w_pos=tensors("pos_embed.W_pos"),
        layers=tuple(layers),
        w_u=tensors("unembed.W_U"),
        b_u=tensors.get("unembed.b_U"),
        ln_final=layer_norm("ln_final"),
    )
