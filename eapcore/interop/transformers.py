"""transformers: a GPT2LMHeadModel's weights as a Model."""

from __future__ import annotations

from torch import nn

from eapcore.models.load import load
from eapcore.models.model import Model


def from_gpt2(model: nn.Module) -> Model:
    """A Model that computes with a GPT2LMHeadModel's own weights, on its device and in its dtype.

    What `eapcore.load(model)` does, for this class alone. No tensor is copied. Dropout is never applied, as in
    `model.eval()`.

    Args:
        model: a transformers GPT2LMHeadModel on one device, with no hook attached.

    Raises:
        ValueError: another module, a hook, several devices, or a configuration that is not supported; it is named.
    """
    if not isinstance(model, nn.Module) or "GPT2LMHeadModel" not in {base.__name__ for base in type(model).__mro__}:
        raise ValueError(f"expected a transformers GPT2LMHeadModel, got a {type(model).__name__}")
    return load(model)
