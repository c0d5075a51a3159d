"""Which family a configuration describes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from eapcore.models.families.gpt2 import gpt2
from eapcore.models.families.gpt_neox import gpt_neox
from eapcore.models.families.llama import llama
from eapcore.models.families.names import Layout
from eapcore.models.families.transformer_lens import transformer_lens

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
    kind = raw.get("model_type")
    if kind is None and "d_model" in raw:
        return transformer_lens(raw)
    if kind is None and "n_embd" in raw:
        return gpt2(raw)
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(
            f"model_type {kind!r} is not supported: expected one of {', '.join(FAMILIES)}, or a TransformerLens "
            "configuration with d_model"
        )
    return FAMILIES[kind](raw)
