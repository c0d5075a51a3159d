"""Which family a configuration describes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from eapcore.models.families.gpt2 import gpt2
from eapcore.models.families.gpt_neox import gpt_neox
from eapcore.models.families.llama import llama
from eapcore.models.families.names import Layout, refuse
from eapcore.models.families.transformer_lens import transformer_lens

# Of several models in one, those whose language model reads text as it would alone, and of which family it is if it
# does not say so.
_TEXT_ALONE = {"gemma3": "gemma3_text", "llava": "llama", "llava_next": "llama", "mistral3": "mistral"}
# What transformers reads of every family: layers of other sizes, attention to later tokens, another file of weights.
_ONLY = {"per_layer_config": ({},), "is_causal": (True,), "transformers_weights": ("model.safetensors",)}
FAMILIES: dict[str, Callable[[Mapping[str, Any]], Layout]] = {
    "gpt2": gpt2,
    "llama": llama,
    "mistral": llama,
    "ministral": llama,
    "qwen2": llama,
    "qwen3": llama,
    "gemma": llama,
    "gemma2": llama,
    "gemma3_text": llama,
    "olmo2": llama,
    "gpt_neox": gpt_neox,
}


def layout_of(raw: Mapping[str, Any]) -> Layout:
    """The layout that a configuration, transformers' or TransformerLens's, describes; ValueError for any other."""
    try:
        return _layout_of(raw)
    except (TypeError, AttributeError, KeyError, IndexError, ArithmeticError, RecursionError) as error:
        first = (str(error) or type(error).__name__).splitlines()[0][:120]
        raise ValueError(f"the configuration has a field of another kind than is expected there: {first}") from error


def _layout_of(raw: Mapping[str, Any]) -> Layout:
    kind = raw.get("model_type")
    if quantized := raw.get("quantization_config") or raw.get("quantization"):  # MLX's name of it
        by = str((isinstance(quantized, Mapping) and quantized.get("quant_method")) or quantized)[:60]
        raise ValueError(
            f"quantization_config of the configuration says that the weights are quantised ({by}), which "
            "is not supported: take the checkpoint that was quantised, or a GGUF file"
        )
    refuse(raw, _ONLY)
    if isinstance(kind, str) and kind in _TEXT_ALONE and isinstance(text := raw.get("text_config"), Mapping):
        layout = _layout_of(_text_of(kind, raw, text))
        if layout.config.logits_softcap is not None:  # which some releases of transformers apply there, and some do not
            raise ValueError(
                f"final_logit_softcapping inside a {kind} is not supported: expected null in its text_config"
            )
        return replace(layout, among_others=True)
    if kind is None and "d_model" in raw:
        return transformer_lens(raw)
    if kind is None and "n_embd" in raw:
        return gpt2(raw)
    if not isinstance(kind, str) or kind not in FAMILIES:
        whole = ", a model of more than text," if "text_config" in raw or "vision_config" in raw else ""
        raise ValueError(
            f"model_type {repr(kind)[:60]}{whole} is not supported: expected one of {', '.join(FAMILIES)}, or a "
            "TransformerLens configuration with d_model"
        )
    return FAMILIES[kind](raw)


def _text_of(kind: str, raw: Mapping[str, Any], text: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of the language model in a model of more than text; what stands above it counts there too."""
    tied, inside = raw.get("tie_word_embeddings"), text.get("tie_word_embeddings")
    if tied is None or (kind == "llava" and tied is False and inside is not None):
        tied = inside
    given = {} if tied is None else {"tie_word_embeddings": tied}
    return {"model_type": _TEXT_ALONE[kind], **text, **given}
