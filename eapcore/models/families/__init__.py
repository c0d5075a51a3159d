"""Which family a configuration describes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from eapcore.models.families.gpt2 import gpt2
from eapcore.models.families.gpt_neox import gpt_neox
from eapcore.models.families.llama import llama
from eapcore.models.families.names import Layout
from eapcore.models.families.transformer_lens import transformer_lens

# Of several models in one, those whose language model reads text as it would alone.
_TEXT_ALONE = ("gemma3", "llava", "llava_next", "mistral3")
FAMILIES: dict[str, Callable[[Mapping[str, Any]], Layout]] = {
    "gpt2": gpt2,
    "llama": llama,
    "mistral": llama,
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
    if quantized := raw.get("quantization_config"):
        by = str((isinstance(quantized, Mapping) and quantized.get("quant_method")) or quantized)[:60]
        raise ValueError(
            f"quantization_config of the configuration says that the weights are quantised ({by}), which "
            "is not supported: take the checkpoint that was quantised, or a GGUF file"
        )
    if kind in _TEXT_ALONE and isinstance(text := raw.get("text_config"), Mapping):
        given = {} if raw.get("tie_word_embeddings") is None else {"tie_word_embeddings": raw["tie_word_embeddings"]}
        return replace(layout_of({**text, **given}), among_others=True)
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
