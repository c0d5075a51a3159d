"""A model's layers on several devices: the same weights, laid where they are to compute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from eapcore.models.model import Model
from eapcore.models.tensors import moved


def placed(model: Model, layers: Sequence[torch.device], home: torch.device) -> Model:
    """The model with each layer's weights on a device of its own, and all others at `home`.

    What lies where it should already is shared with the model that is given.
    """
    weights = model.weights
    ends = moved((weights.w_e, weights.w_pos, weights.w_u, weights.b_u, weights.ln_final), home)
    w_e, w_pos, w_u, b_u, ln_final = ends
    laid = tuple(moved(layer, device) for layer, device in zip(weights.layers, layers, strict=True))
    there = replace(weights, w_e=w_e, w_pos=w_pos, layers=laid, w_u=w_u, b_u=b_u, ln_final=ln_final)
    return replace(model, weights=there, links=None, stream=None)
