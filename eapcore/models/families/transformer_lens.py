"""TransformerLens: its state dicts, and the models that its authors publish in that form."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from eapcore.models.config import ModelConfig
from eapcore.models.families.names import (
    Layout,
    Source,
    activation,
    flag,
    frequencies,
    integer,
    positive,
    refuse,
)

_NORMS = {"LN": "layernorm", "LNPre": "layernorm", "RMS": "rmsnorm", "RMSPre": "rmsnorm", None: None}
_ONLY = {
    "positional_embedding_type": ("standard", "rotary"),
    "shortformer_pos": (False,),
    "attention_dir": ("causal",),
    "normalization_type": tuple(name for name in _NORMS if name),
    "normalization": ("LN", "LNPre"),
    "post_embedding_ln": (False,),
    "num_experts": (1,),
    "experts_per_token": (1,),
    "load_in_4bit": (False,),
    "quantization_method": (),
    "n_devices": (1,),
    "clip_qkv": (),
    "use_logn_attn": (False,),
    "use_dynamic_ntk_rope": (False,),
    "use_yarn_rope": (False,),
    "use_attention_sinks": (False,),
}
# Whose ln1 and ln2 stand behind heads and MLP, none in front, and whose q and k are normed over all heads together.
_BEHIND = ("Olmo2ForCausalLM", "Olmo3ForCausalLM")


def transformer_lens(raw: Mapping[str, Any]) -> Layout:
    """The layout that a configuration describes; ValueError for what is not supported, by name."""
    raw = {name: None if value == -1 else value for name, value in raw.items()}  # -1 stands for "not given" there
    refuse(raw, _ONLY)
    behind = raw.get("original_architecture") in _BEHIND
    if behind:
        refuse(raw, {"normalization_type": ("RMS",), "use_qk_norm": (False,), "parallel_attn_mlp": (False,)})
        refuse(raw, {"use_normalization_before_and_after": (False,)})
    d_model, layers = integer(raw, "d_model"), integer(raw, "n_layers")
    if raw.get("n_heads") is None and raw.get("d_head") is None:
        raise ValueError("the configuration lacks n_heads and d_head")
    n_heads = integer(raw, "n_heads") if raw.get("n_heads") is not None else d_model // integer(raw, "d_head")
    d_head = integer(raw, "d_head") if raw.get("d_head") is not None else d_model // n_heads
    groups = None if raw.get("n_key_value_heads") is None else integer(raw, "n_key_value_heads")
    attn_only = flag(raw, "attn_only", False)
    gated = flag(raw, "gated_mlp", False) and not attn_only
    d_vocab = integer(raw, "d_vocab")
    d_out = d_vocab if raw.get("d_vocab_out") is None else integer(raw, "d_vocab_out")
    if not attn_only:
        refuse(raw, {"neuron_scale": (1,), "neuron_temp": (1,)})
    norm = next((raw[name] for name in ("normalization_type", "normalization") if name in raw), "LN")
    if _NORMS[norm] == "layernorm":
        refuse(raw, {"final_rms": (False,), "use_normalization_before_and_after": (False,)})
    post = behind or (flag(raw, "use_normalization_before_and_after", False) and norm is not None)
    rotary = raw.get("positional_embedding_type") == "rotary"
    config = ModelConfig(
        n_layers=layers,
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
        normalization=_NORMS[norm],
        eps=positive(raw, "eps", "ln_eps", default=1e-5),
        scale_attn_by_inverse_layer_idx=flag(raw, "scale_attn_by_inverse_layer_idx", False),
        parallel=flag(raw, "parallel_attn_mlp", False) and not attn_only,
        rotary_frequencies=_frequencies(raw, d_head) if rotary else (),
        gated=gated,
        local_frequencies=_local_frequencies(raw, d_head) if rotary else (),
        n_key_value_heads=None if groups == n_heads else groups,
        qk_norm=behind or flag(raw, "use_qk_norm", False),
        windows=_windows(raw, layers),
        attn_softcap=_cap(raw, "attn_scores_soft_cap"),
        logits_softcap=_cap(raw, "output_logits_soft_cap"),
        post_norms=post,
        qk_norm_joint=behind,
        pre_norms=not behind,
        rotary_adjacent=rotary and flag(raw, "rotary_adjacent_pairs", False),
        d_vocab_out=None if d_out == d_vocab else d_out,
    )
    D, H, G, K, M, V = d_model, n_heads, config.n_kv, d_head, config.d_mlp or 0, d_vocab
    ends = {"w_e": Source(("embed.W_E",), (V, D))}
    if not rotary:
        ends["w_pos"] = Source(("pos_embed.W_pos",), (config.n_ctx, D))
    ends |= {"w_u": Source(("unembed.W_U",), (D, d_out)), "b_u": Source(("unembed.b_U",), (d_out,), required=False)}
    at, under = "blocks.{}.", "" if groups is None else "_"
    attention = at + "attn."
    layer = {
        "w_qkv.0": Source((attention + "W_Q",), (H, D, K)),
        "w_qkv.1": Source((f"{attention}{under}W_K",), (G, D, K)),
        "w_qkv.2": Source((f"{attention}{under}W_V",), (G, D, K)),
        "b_qkv": Source(
            (attention + "b_Q", f"{attention}{under}b_K", f"{attention}{under}b_V"),
            ((H, K), (G, K), (G, K)),
            lambda *b: torch.cat(b),
        ),
        "w_o": Source((attention + "W_O",), (H, K, D)),
    }
    if config.qk_norm:
        sizes = (("q", H * K), ("k", G * K)) if behind else (("q", K), ("k", K))
        layer |= {f"{x}_norm.0": Source((f"{attention}{x}_norm.w",), (size,)) for x, size in sizes}
    suffix = "" if behind else "_post"
    if post:  # which a bias of the heads would have to go through, different from prompt to prompt
        layer["post_a.0"] = Source((f"{at}ln1{suffix}.w", attention + "b_O"), ((D,), (D,)), _without_bias)
    else:
        layer["b_o"] = Source((attention + "b_O",), (D,))
    if norm in ("LN", "RMS"):
        for place, part in enumerate("wb" if norm == "LN" else "w"):
            ends[f"ln_final.{place}"] = Source((f"ln_final.{part}",), (D,))
            for ln in [] if behind else ["ln1"] if attn_only else ["ln1", "ln2"]:
                layer[f"{ln}.{place}"] = Source((f"{at}{ln}.{part}",), (D,))
    if not attn_only:
        mlp, b_in = at + "mlp.", Source((at + "mlp.b_in",), (M,))
        layer |= {"w_in": Source((mlp + ("W_gate" if gated else "W_in"),), (D, M))}
        layer |= {"w_up": Source((mlp + "W_in",), (D, M))} if gated else {"b_in": b_in}
        layer["w_out"] = Source((mlp + "W_out",), (M, D))
        if gated:  # whose b_in is added behind the product
            layer["b_out"] = Source((mlp + "b_out", mlp + "b_in", mlp + "W_out"), ((D,), (M,), (M, D)), _with_units)
        else:
            layer["b_out"] = Source((mlp + "b_out",), (D,))
        if post:
            layer["post_m.0"] = Source((f"{at}ln2{suffix}.w",), (D,))
    kind = f"TransformerLens model of {layers} layers with normalization {norm}"
    return Layout(kind, config, ends, layer, folded=norm in ("LNPre", "RMSPre"), family="TransformerLens")


def _without_bias(gamma: Tensor, bias: Tensor) -> Tensor:
    """γ of the norm behind the heads, where they have no bias."""
    if not bias.is_meta and bool(bias.any()):
        raise ValueError(
            "attn.b_O in front of the norm behind the heads is not supported unless it is zero: load the model with "
            "fold_value_biases=False"
        )
    return gamma


def _with_units(b_out: Tensor, b_in: Tensor, w_out: Tensor) -> Tensor:
    """What (u + b_in) W_out + b_out adds to u W_out."""
    return b_out if b_in.is_meta or not bool(b_in.any()) else b_out + b_in @ w_out


def _cap(raw: Mapping[str, Any], name: str) -> float | None:
    return positive(raw, name, default=0) if raw.get(name) else None


def _frequencies(raw: Mapping[str, Any], d_head: int) -> tuple[float, ...]:
    """The rotary frequencies, of layers without a window where the others have their own."""
    scaling = _by_parts(raw)
    if raw.get("rotary_scaling_factor") not in (None, 1.0) and not scaling:
        scaling = {"rope_type": "linear", "factor": raw["rotary_scaling_factor"]}
    return frequencies(positive(raw, "rotary_base", default=10000.0), _turned(raw, d_head), scaling)


def _local_frequencies(raw: Mapping[str, Any], d_head: int) -> tuple[float, ...]:
    """Those of layers with a window, which no linear factor scales; empty where they are the others."""
    if raw.get("rotary_base_local") is None and raw.get("rotary_scaling_factor") in (None, 1.0):
        return ()
    base = positive(raw, "rotary_base_local", "rotary_base", default=10000.0)
    return frequencies(base, _turned(raw, d_head), _by_parts(raw))


def _by_parts(raw: Mapping[str, Any]) -> dict[str, Any]:
    if not flag(raw, "use_NTK_by_parts_rope", False):
        return {}
    known = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}  # by default
    scaling: dict[str, Any] = {name: raw.get(f"NTK_by_parts_{name}", value) for name, value in known.items()}
    context = raw.get("NTK_original_ctx_len", 8192)
    return {"rope_type": "llama3", **scaling, "original_max_position_embeddings": context}


def _turned(raw: Mapping[str, Any], d_head: int) -> int:
    """How many dimensions of a head are turned."""
    turned = d_head if raw.get("rotary_dim") is None else integer(raw, "rotary_dim")
    if turned > d_head or turned % 2:
        raise ValueError(f"rotary_dim of the configuration must be even and at most d_head {d_head}, got {turned}")
    return turned


def _windows(raw: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    """For each layer how many positions a query sees; empty where all see all."""
    if not flag(raw, "use_local_attn", False):
        return ()
    kinds = raw.get("attn_types")
    if not isinstance(kinds, list | tuple) or len(kinds) < layers or not set(kinds) <= {"global", "local"}:
        raise ValueError(f"attn_types of the configuration must be global or local for {layers} layers, got {kinds!r}")
    window = integer(raw, "window_size")
    return tuple(window if kind == "local" else None for kind in kinds[:layers])
