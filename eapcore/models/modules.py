"""What a forward over a torch module's weights would miss: hooks, replaced parts, other constants than the
configuration's. Every entrance for modules asks `check_module`."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

from eapcore.models.config import ModelConfig
from eapcore.models.mlp import activation

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_RECORDERS = "transformers"  # which leaves hooks of its own behind that only record hidden states
_PASSING = "nnsight"  # whose forwards run what was there, outside a trace
_LAYER = re.compile(r"(?:^|\.)(\d+)\.")
_NORMS = {"layernorm": "LayerNorm", "rmsnorm": "RMSNorm", None: "Identity"}
_CHECKED = 64  # positions of a table of sines


def check_module(module: nn.Module, config: ModelConfig, *, among_others: bool = False) -> None:
    """ValueError for a module that computes something else than its weights and its configuration say.

    Hooks, of the module or of all modules; weights on several devices; a forward, an activation function, a norm or a
    whole part that was put in another's place; and in a part another eps, scale, mask, window, soft cap or rotation.
    among_others: config is of its part `language_model` alone.
    """
    if any("_original_component" in name for name, _ in module.named_modules()):
        raise ValueError(f"{type(module).__name__} has become part of a TransformerBridge: give the bridge itself")
    _check_devices(module)
    _check_hooks(module)
    _check_forwards(module)
    for name, part in module.named_modules():
        number = _LAYER.search(name)
        layer = None if number is None else int(number[1])
        if layer is not None and layer >= config.n_layers:
            continue
        if among_others and "language_model" not in name.split("."):
            continue
        for what, found, expected in _constants(name, part, config, layer):
            raise ValueError(
                f"{_at(module, name)} {what} {found}, but its configuration says {expected}: set one of them"
            )


def _at(module: nn.Module, name: str) -> str:
    return f"{type(module).__name__} has at {name or 'its root'}"


def _check_devices(module: nn.Module) -> None:
    devices = sorted({str(p.device) for p in module.parameters()})
    if len(devices) > 1:
        raise ValueError(
            f"{type(module).__name__} has its weights on {' and '.join(devices)}: move it to one device first"
        )


def _check_hooks(module: nn.Module) -> None:
    """A hook may change activations or gradients, which an explicit forward over the same weights would not see."""
    reset = hasattr(module, "reset_hooks")
    remove = "model.reset_hooks(including_permanent=True)" if reset else "the handle that registered it"
    for kind in _HOOKS:
        if getattr(torch_modules, f"_global{kind}", None):
            raise ValueError(
                f"torch has a global {_words(kind)}, which could change activations unseen here: remove it through the "
                "handle that registered it"
            )
    for name, part in module.named_modules():
        for kind in _HOOKS:
            for hook in getattr(part, kind, {}).values():
                if _package(hook) != _RECORDERS:
                    raise ValueError(
                        f"{type(module).__name__} has a {_words(kind)} at {name or 'its root'}, which could change "
                        f"activations unseen here: remove it with {remove}"
                    )


def _words(kind: str) -> str:
    return kind.strip("_").removesuffix("s").replace("_", " ")


def _package(thing: object) -> str:
    return (getattr(thing, "__module__", None) or "").split(".")[0]


def _check_forwards(module: nn.Module) -> None:
    """Every part's forward is that of its class, and of the package of the whole or torch's."""
    home = _package(_forward_of(type(module)))
    for name, part in module.named_modules():
        if "forward" in vars(part) and _package(type(vars(part)["forward"])) != _PASSING:
            raise ValueError(
                f"{_at(module, name)} a replaced forward, which would not be seen here: take the original module"
            )
        kind = _forward_of(type(part))
        own = _package(vars(kind)["forward"])
        above = [_package(base) for base in type(part).__mro__ if "forward" in vars(base) and base is not nn.Module]
        if own != _package(kind) or not {own, *above} <= {home, "torch"}:
            others = sorted({own, *above} - {"torch"} - ({home} if name else set()))
            raise ValueError(
                f"{_at(module, name)} a {type(part).__name__} whose forward comes from {' and '.join(others) or own}, "
                "which would not be seen here: take the original module"
            )


def _forward_of(kind: type) -> type:
    """The class that a class has its forward from."""
    return next(base for base in kind.__mro__ if "forward" in vars(base))


def _constants(
    name: str, part: nn.Module, config: ModelConfig, layer: int | None
) -> Iterator[tuple[str, object, object]]:
    """(what, as it is, as the configuration says) for everything in a part that is otherwise."""
    for field in ("eps", "variance_epsilon"):
        eps = getattr(part, field, None)
        if isinstance(eps, float) and _differ(eps, config.eps):
            yield field, f"{eps:g}", f"{config.eps:g}"
    for field in ("act", "act_fn", "activation_fn"):
        function = getattr(part, field, None)
        if callable(function) and config.act_fn is not None and not _acts(function, config.act_fn):
            own = type(function).__name__ if isinstance(function, nn.Module) else getattr(function, "__name__", "")
            yield "the activation", own or repr(function), config.act_fn
    leaf = name.rpartition(".")[2]
    if leaf in ("ln1", "ln2", "ln_final") and type(part) is not nn.Module:  # folded norms have no weights to see
        kind, expected = type(part).__name__, _NORMS[config.normalization]
        if expected not in kind:
            yield "the norm", kind, expected
    if layer is None:
        for field, tensor in part.named_buffers(recurse=False):
            if field.endswith("inv_freq") and "original" not in field and not _turns_so(tensor, config):
                kind = str(tensor.dtype).removeprefix("torch.")
                if tensor.itemsize < 4:
                    yield field, f"rounded to {kind} (load it with dtype={kind}, which .to() is not)", "other numbers"
                else:
                    yield field, "with other frequencies", "others"
        return
    scale, window, cap = config.score_scale(layer), config.window(layer), config.attn_softcap
    for field, inverse in (("scaling", False), ("attn_scale", True)):
        value = getattr(part, field, None)
        if isinstance(value, int | float) and _differ(1 / value if inverse and value else value, scale):
            yield field, f"{value:g}", f"{1 / scale if inverse else scale:g}"
    for field, expected_value in (("sliding_window", window), ("attn_logit_softcapping", cap), ("is_causal", True)):
        if hasattr(part, field) and getattr(part, field) != expected_value:
            yield field, getattr(part, field), expected_value
    for field, tensor in part.named_buffers(recurse=False):
        if tensor.is_meta:
            continue
        if tensor.dtype == torch.bool and tensor.ndim >= 2 and tensor.shape[-1] == tensor.shape[-2]:
            if not _is_causal(tensor, window):
                seen = "all positions before it" if window is None else f"the last {window} positions"
                yield field, "that hides other keys", f"that a query sees {seen}"
        elif field == "IGNORE" and float(tensor) > -1e4:
            yield field, f"{float(tensor):g}", "-inf"
        elif field in ("rotary_sin", "rotary_cos") and not _tabled(tensor, field, config, layer):
            yield field, "with other angles", "others"


def _differ(value: float, expected: float) -> bool:
    return abs(value - expected) > 1e-3 * abs(expected)


def _acts(function: object, name: str) -> bool:
    """Whether a function is the activation function of a name."""
    sample = torch.linspace(-3, 3, 13, dtype=torch.float64, device="cpu")
    with torch.no_grad():
        found = function(sample)  # type: ignore[operator]
    return found.shape == sample.shape and not (found - activation(name, sample)).abs().max() > 1e-3


def _is_causal(mask: Tensor, window: int | None) -> bool:
    """Whether a mask, true where a query sees a key, shows each query the keys up to its own, or the last of them."""
    expected = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).tril_()
    if window is not None:
        expected.triu_(1 - window)
    return bool((mask == expected).all())


def _turns_so(found: Tensor, config: ModelConfig) -> bool:
    """Whether frequencies [F] are one of the configuration's two sets."""
    known = [config.rotary_frequencies, config.local_frequencies or config.rotary_frequencies]
    sets = [torch.tensor(each, dtype=torch.float64, device="cpu") for each in known]
    own = found.detach().double().cpu()
    return found.is_meta or any(
        own.shape == each.shape and torch.allclose(own, each, rtol=1e-4, atol=0) for each in sets
    )


def _tabled(found: Tensor, field: str, config: ModelConfig, layer: int) -> bool:
    """Whether a table [n_ctx, n] holds the sines or cosines of a layer's angles, each for both of its dimensions."""
    rotary = config.rotary(layer)
    if rotary is None:
        return False
    own = found[:_CHECKED].detach().double().cpu()
    angles = torch.arange(len(own), device="cpu")[:, None] * rotary.frequencies
    angles = angles.repeat_interleave(2, 1) if rotary.adjacent else torch.cat([angles, angles], 1)
    expected = angles.cos() if field.endswith("cos") else angles.sin()
    return own.shape == expected.shape and bool((own - expected).abs().max() <= 1e-2)
