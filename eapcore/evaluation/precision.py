"""How far scores in half precision are from those of the same weights in float32."""

from __future__ import annotations

from dataclasses import replace

import torch

from eapcore.attribution.attribute import attribute
from eapcore.execution.memory import budget
from eapcore.models.families.names import assemble
from eapcore.models.model import Model
from eapcore.models.tensors import accumulate_dtype
from eapcore.tasks.metrics import Metric
from eapcore.tasks.pairs import PromptPairs

PAIRS = 2  # that are scored twice


def rounding_error(model: Model, pairs: PromptPairs, metric: str | Metric = "logit_diff") -> float | None:
    """‖scores − scores in float32‖ / ‖scores in float32‖ of all edges of the first pairs, by one gradient.

    The weights are the model's own, taken to float32, for which there has to be memory. Where the corrupt prompts are
    missing, everything is ablated to zero.

    Returns:
        The error of all scores together; None where the memory does not suffice, 0 for a model in float32 or float64.

    Raises:
        ValueError: the metric has no such gradient, as a divergence from the clean run has none there.
    """
    wide = accumulate_dtype(model.dtype)
    if wide == model.dtype:
        return 0.0
    weights = dict(model.weights.named())
    if model.stream is not None or sum(x.numel() for x in weights.values()) * wide.itemsize > budget(model.device):
        return None
    other = replace(model, weights=assemble(model.config, {name: x.to(wide) for name, x in weights.items()}))
    some = pairs.select(torch.arange(min(PAIRS, len(pairs)), device="cpu"))
    ablation = "zero" if torch.equal(some.clean, some.corrupt) else "corrupt"
    found, exact = (attribute(m, some, metric, ablation=ablation, reduce="pair").per_pair for m in (model, other))
    assert found is not None and exact is not None
    off, size = (found - exact).double().norm(), exact.double().norm()
    return float(off / size) if off else 0.0
