"""What a forward over a torch module's weights would miss: hooks, replaced parts, weights on several devices."""

from __future__ import annotations

import torch
from torch import nn

from eapcore.models.config import ModelConfig
from eapcore.models.mlp import activation

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def refuse_hooks(module: nn.Module, remove: str, *, harmless: str = "") -> None:
    """ValueError if a hook is attached anywhere in a module.

    A hook may change activations or gradients, which an explicit forward over the same weights would not see.

    Args:
        module: the model.
        remove: how its user gets rid of them, for the message.
        harmless: hooks whose functions come from this package only look on.
    """
    for name, part in module.named_modules():
        for kind in _HOOKS:
            for hook in getattr(part, kind, {}).values():
                if harmless and (getattr(hook, "__module__", None) or "").split(".")[0] == harmless:
                    continue
                raise ValueError(
                    f"{type(module).__name__} has a {kind.strip('_').removesuffix('s').replace('_', ' ')} at "
                    f"{name or 'its root'}, which could change activations unseen here: {remove}"
                )


def refuse_several_devices(module: nn.Module) -> None:
    """ValueError if a module's weights are on more than one device."""
    devices = sorted({str(p.device) for p in module.parameters()})
    if len(devices) > 1:
        raise ValueError(
            f"{type(module).__name__} has its weights on {' and '.join(devices)}: move it to one device first"
        )


def refuse_replaced(module: nn.Module, config: ModelConfig) -> None:
    """ValueError for a module that computes otherwise than its configuration says: another forward, activation function
    or eps somewhere in it."""
    sample = torch.linspace(-3, 3, 13, dtype=torch.float64, device="cpu")
    for name, part in module.named_modules():
        at = f"{type(module).__name__} has at {name or 'its root'}"
        if "forward" in vars(part):
            raise ValueError(f"{at} a replaced forward, which would not be seen here: take the original module")
        for field in ("eps", "variance_epsilon"):
            eps = getattr(part, field, None)
            if isinstance(eps, float) and abs(eps - config.eps) > 1e-3 * config.eps:
                raise ValueError(f"{at} {field} {eps:g}, but its configuration says {config.eps:g}: set one of them")
        for field in ("act", "act_fn", "activation_fn"):
            function = getattr(part, field, None)
            if not callable(function) or config.act_fn is None:
                continue
            with torch.no_grad():
                found = function(sample)
            if found.shape != sample.shape or (found - activation(config.act_fn, sample)).abs().max() > 1e-3:
                kind = type(function).__name__ if isinstance(function, nn.Module) else repr(function)
                raise ValueError(f"{at} the activation {kind}, but its configuration says {config.act_fn}")
