"""GPT-2, as transformers saves it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from eapcore.models.config import ModelConfig
from eapcore.models.families.names import Layout, Shapes, Tensors, _activation, _flag, _integer, _positive, _refuse
from eapcore.models.weights import LayerWeights, Weights

# GPT-2, as transformers saves it


def _gpt2(raw: Mapping[str, Any]) -> Layout:
    _refuse(raw, {"add_cross_attention": (False,), "quantization_config": (), "pruned_heads": ({},)})
    d_model = _integer(raw, "n_embd", "hidden_size")
    n_heads = _integer(raw, "n_head", "num_attention_heads")
    if d_model % n_heads:
        raise ValueError(f"n_embd {d_model} of the configuration must be a multiple of n_head {n_heads}")
    config = ModelConfig(
        n_layers=_integer(raw, "n_layer", "num_hidden_layers"),
        n_heads=n_heads,
        d_model=d_model,
        d_head=d_model // n_heads,
        d_mlp=4 * d_model if raw.get("n_inner") is None else _integer(raw, "n_inner"),
        d_vocab=_integer(raw, "vocab_size"),
        n_ctx=_integer(raw, "n_positions", "n_ctx", "max_position_embeddings"),
        act_fn=_activation(raw, "activation_function", "gelu_new"),
        attn_scale=math.sqrt(d_model // n_heads) if _flag(raw, "scale_attn_weights", True) else 1.0,
        eps=_positive(raw, "layer_norm_epsilon", default=1e-5),
        scale_attn_by_inverse_layer_idx=_flag(raw, "scale_attn_by_inverse_layer_idx", False),
    )
    D, M, V = config.d_model, config.d_mlp or 0, config.d_vocab
    required: Shapes = {"wte.weight": (V, D), "wpe.weight": (config.n_ctx, D)}
    for layer in range(config.n_layers):
        at = f"h.{layer}."
        required |= {at + "ln_1.weight": (D,), at + "ln_1.bias": (D,)}
        required |= {at + "attn.c_attn.weight": (D, 3 * D), at + "attn.c_attn.bias": (3 * D,)}
        required |= {at + "attn.c_proj.weight": (D, D), at + "attn.c_proj.bias": (D,)}
        required |= {at + "ln_2.weight": (D,), at + "ln_2.bias": (D,)}
        required |= {at + "mlp.c_fc.weight": (D, M), at + "mlp.c_fc.bias": (M,)}
        required |= {at + "mlp.c_proj.weight": (M, D), at + "mlp.c_proj.bias": (D,)}
    required |= {"ln_f.weight": (D,), "ln_f.bias": (D,)}
    optional: Shapes = {"lm_head.bias": (V,)}
    tied = _flag(raw, "tie_word_embeddings", True)
    (optional if tied else required)["lm_head.weight"] = (V, D)
    kind = f"GPT-2 of {config.n_layers} layers with {'a tied' if tied else 'an untied'} head"
    return Layout(kind, config, required, optional, lambda tensors: _gpt2_weights(config, tied, tensors))


def _gpt2_weights(config: ModelConfig, tied: bool, tensors: Tensors) -> Weights:
    H, K, D = config.n_heads, config.d_head, config.d_model

    def pair(name: str) -> tuple[Tensor, Tensor]:
        return tensors.pair(name, ".weight", ".bias")

    layers = []
    for layer in range(config.n_layers):
        at = f"h.{layer}."
        w_qkv, b_qkv = pair(at + "attn.c_attn")
        w_o, b_o = pair(at + "attn.c_proj")
        w_in, b_in = pair(at + "mlp.c_fc")
        w_out, b_out = pair(at + "mlp.c_proj")
        layers.append(
            LayerWeights(
                w_qkv=(w_qkv.view(D, 3 * H, K).permute(1, 0, 2),),  # [3H, D, K]
                b_qkv=b_qkv.view(3 * H, K),
                w_o=w_o.view(H, K, D),
                b_o=b_o,
                ln1=pair(at + "ln_1"),
                ln2=pair(at + "ln_2"),
                w_in=w_in,
                b_in=b_in,
                w_out=w_out,
                b_out=b_out,
            )
        )
    w_e, head = tensors("wte.weight"), tensors.get("lm_head.weight")
    if tied and head is not None and head.data_ptr() != w_e.data_ptr() and not torch.equal(head, w_e):
        # Some releases of transformers compute with the embedding here, others with the head.
        raise ValueError(
            "lm_head.weight differs from wte.weight though the configuration ties them: set tie_word_embeddings to "
            "false to use it, or remove it from the checkpoint"
        )
    return Weights(
        w_e=w_e,
        w_pos=tensors("wpe.weight"),
        layers=tuple(layers),
        w_u=w_e.T if tied or head is None else head.T,
        b_u=tensors.get("lm_head.bias"),
        ln_final=pair("ln_f"),
    )
