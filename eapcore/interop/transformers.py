"""transformers: a GPT2LMHeadModel's weights as a Model."""

from __future__ import annotations

from torch import nn

from eapcore.interop.modules import refuse_hooks, refuse_several_devices
from eapcore.models.load import load
from eapcore.models.model import Model


def from_gpt2(model: nn.Module) -> Model:
    """A Model that computes with a GPT2LMHeadModel's own weights, on its device and in its dtype.

    What `eapcore.load(model)` does, after looking for what an explicit forward over the same weights would miss. No
    tensor is copied. Dropout is never applied, as in `model.eval()`.

    Args:
        model: a transformers GPT2LMHeadModel on one device, with no hook attached.

    Raises:
        ValueError: another module, a hook, several devices, or a configuration that is not supported; it is named.
    """
    if not isinstance(model, nn.Module) or "GPT2LMHeadModel" not in {base.__name__ for base in type(model).__mro__}:
        raise ValueError(f"expected a transformers GPT2LMHeadModel, got a {type(model).__name__}")
    refuse_several_devices(model)
    # transformers leaves hooks of its own behind that only record hidden states.
    refuse_hooks(model, "remove it through the handle that registered it", harmless="transformers")
    return load(model)
