"""Models inside other tools' wrappers: the module or weights in them, and whether these are what it computes with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eapcore.models.families import layout_of
from eapcore.models.forward import forward
from eapcore.models.model import Model
from eapcore.models.tensors import accumulate_dtype

_PLAIN = {"OptimizedModule": "_orig_mod", "DataParallel": "module", "DistributedDataParallel": "module"}
_TOKENS = 8  # of the prompt on which a wrapper and what was inside are compared


@dataclass(frozen=True, slots=True)
class Unwrapped:
    """What is inside a wrapper.

    source: a module, or a state dict with its config. run: logits [B, T, V] of tokens as the wrapper computes them.
    tool: whose wrapper it is.
    """

    source: nn.Module | Mapping[str, Tensor]
    config: Mapping[str, Any] | None
    run: Callable[[Tensor], Any]
    device: torch.device
    tool: str

    @torch.no_grad()
    def check(self, model: Model) -> None:
        """ValueError if the wrapper gives other logits than the weights inside it."""
        if model.device.type == "meta":
            return
        tokens = torch.arange(min(_TOKENS, model.config.n_ctx), device=model.device)[None] % model.config.d_vocab
        found = self.run(tokens.to(self.device))
        found = getattr(found, "logits", found).to(model.device).double()
        expected = forward(model, tokens).double()
        half = model.dtype != accumulate_dtype(model.dtype)
        most = (0.05 if half else 1e-4) * float(expected.abs().max())
        if found.shape != expected.shape or not float((found - expected).abs().max()) <= most:
            raise ValueError(
                f"the {self.tool} computes something else than the weights inside it: it was edited, or its weights "
                "were processed; give the model that it was made of, loaded anew"
            )


def unwrapped(source: object) -> Unwrapped | None:
    """What is inside a TransformerBridge, an nnsight model, a PatchableModel, a compiled or a parallel module; None for
    anything else.

    Raises:
        ValueError: hooks, edits or processed weights, which would not be seen.
    """
    kinds = {base.__name__ for base in type(source).__mro__}
    if "TransformerBridge" in kinds and isinstance(source, nn.Module):
        return _bridge(source)
    if "PatchableModel" in kinds and isinstance(source, nn.Module):
        inside: Any = source.wrapped_model
        _check_hooks(inside, "PatchableModel", "remove it with wrapped_model.reset_hooks(including_permanent=True)")
        state = {name: tensor for name, tensor in inside.state_dict().items() if not _of_patching(name)}
        return Unwrapped(state, vars(inside.cfg), inside, _device_of(inside), "PatchableModel")
    if kinds & {"Envoy", "NNsight"} and isinstance(inside := getattr(source, "_module", None), nn.Module):
        if any(tensor.is_meta for tensor in inside.parameters()):
            raise ValueError("the nnsight model has no weights yet: call model.dispatch() first")
        among = getattr(source, "modules", None)
        parts = [source, *(among() if callable(among) else ())]
        if any(getattr(part, field, None) for part in parts for field in ("_edits", "_default_mediators")):
            raise ValueError(
                "the nnsight model has edits, which would not be seen here: take them back with model.clear_edits()"
            )
        return Unwrapped(inside, None, inside, _device_of(inside), "nnsight model")
    if isinstance(source, nn.Module) and (type(vars(source).get("forward")).__module__ or "").startswith("nnsight."):
        return Unwrapped(
            source, None, source, _device_of(source), "nnsight model"
        )  # which may hide a forward of others
    for kind, field in _PLAIN.items():
        if kind in kinds and isinstance(source, nn.Module):
            inside = getattr(source, field)
            return Unwrapped(inside, None, inside, _device_of(inside), kind)
    return None


def _bridge(source: Any) -> Unwrapped:
    """A TransformerBridge: its parts stand in the places of the original model's, and hold these."""
    if getattr(source, "compatibility_mode", False) or getattr(source, "_weights_processed", False):
        raise ValueError(
            "the TransformerBridge has processed weights: boot it without enable_compatibility_mode() and "
            "process_weights(), or give eapcore.load the transformers model, loaded anew"
        )
    _check_hooks(source, "TransformerBridge", "remove it with bridge.reset_hooks()")
    inside = source.original_model
    own: dict[str, Any] = inside.config.to_dict()
    config = {**own, "model_name": own.get("_name_or_path") or type(inside).__name__}
    state: dict[str, Tensor] = {}
    layout = layout_of(config)
    for name, tensor in inside.state_dict().items():
        if layout.knows(name := name.replace("_original_component.", "")):
            state.setdefault(name, tensor)
    return Unwrapped(state, config, source, _device_of(inside), "TransformerBridge")


def _check_hooks(module: nn.Module, tool: str, remove: str) -> None:
    """ValueError for hooks of a user: those at hook points, and all that see gradients."""
    for name, part in module.named_modules():
        kinds = ("fwd_hooks", "bwd_hooks", "_backward_hooks", "_backward_pre_hooks")
        if any(len(getattr(part, kind, None) or ()) for kind in kinds):
            raise ValueError(f"the {tool} has a hook at {name}, which could change activations unseen here: {remove}")


def _of_patching(name: str) -> bool:
    """Whether a tensor is a mask or what else patching keeps at hook points, or a weight of a module that it wraps."""
    return ".hook_" in name or name.startswith("hook_") or name.endswith("patch_mask")


def _device_of(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
