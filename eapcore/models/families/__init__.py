"""Which family a configuration describes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from eapcore.models.families.gpt2 import gpt2
from eapcore.models.families.names import Layout
from eapcore.models.families.transformer_lens import transformer_lens


def layout_of(raw: Mapping[str, Any]) -> Layout:
    """The layout that a configuration, GPT-2's or TransformerLens's, describes; ValueError for any other."""
    kind = raw.get("model_type")
    if kind is None and "d_model" in raw:
        return transformer_lens(raw)
    if kind != "gpt2" and not (kind is None and "n_embd" in raw):
        raise ValueError(
            f"model_type {kind!r} is not supported: expected 'gpt2', or a TransformerLens configuration with d_model"
        )
    return gpt2(raw)
