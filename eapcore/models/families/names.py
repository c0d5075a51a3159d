"""Foreign names → Weights: a family is its configuration, and a table of where each of our tensors comes from."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from eapcore.models.attention import Attention
from eapcore.models.checkpoint import Stored
from eapcore.models.config import DTYPES, ModelConfig
from eapcore.models.links import Links
from eapcore.models.mlp import Mlp
from eapcore.models.norm import NO_NORM, Norm
from eapcore.models.tensors import accumulate_dtype
from eapcore.models.weights import Layer, Weights

_log = logging.getLogger(__name__)
# Other names of the same functions: the three tanh forms differ only in how they are computed.
_ACTIVATIONS = {
    "gelu_new": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",
    "gelu_fast": "gelu_new",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
_PREFIX = re.compile(
    r"\A(?:transformer\.|model\.|module\.|gpt_neox\.|language_model\.)+"
)  # of wrappers; `_orig_mod.` may stand anywhere
_BUFFER = re.compile(
    r"h\.\d+\.attn\.(?:bias|masked_bias)|blocks\.\d+\.attn\.(?:mask|IGNORE|rotary_sin|rotary_cos)"
    r"|(?:layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"
    r"|layers\.\d+\.attention\.(?:bias|masked_bias|rotary_emb\.inv_freq)"
    r"|(?:\w+\.)*(?:position_ids|rotary_emb\.(?:original_inv_freq|(?:cos|sin)_cached))"
)
# Of models for other tasks, beside the decoder: a value of each token, classes of a text or of its tokens, and so on.
_HEAD = re.compile(
    r"(?:v_head|value_head|reward_head|score|classifier|classification_head|qa_outputs|multiple_choice_head|summary)\."
)
_OTHER_PARTS = re.compile(r"(?:vision_tower|vision_model|multi_modal_projector|image_newline)(?:\..*)?")
_QUANTISED = re.compile(
    r".*\.(?:qweight|qzeros|scales|g_idx|weight_scale|weight_scale_inv|weight_packed|SCB|absmax|quant_map)"
    r"|.*\.weight\.(?:absmax|quant_map|quant_state.*|nested_.*)"
)
_ONLY_FLOATS = f"only {', '.join(DTYPES)}"
_SHOWN = 4  # tensors that an error names before it only counts


@dataclass(frozen=True, slots=True)
class Source:
    """Which tensors of a checkpoint one of ours is made of.

    names: theirs, with {} for the number of the layer. shape: of each, or one for each of them. view: what makes ours
    of them, without a copy where that is possible. required: whether a checkpoint must have them. wide: in half
    precision ours is float32, which holds γ = 1 + w where w alone is stored.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...] | tuple[tuple[int, ...], ...]
    view: Callable[..., Tensor] = lambda x: x
    required: bool = True
    wide: bool = False


@dataclass(frozen=True, slots=True)
class Layout:
    """How a checkpoint stores a model: for each tensor by its name in `Weights.named` where it comes from.

    kind: what it is, for messages. layer: of one layer, by the names without `layers.{l}.`; ends: of the rest. tied:
    the head is the embedding; a `w_u` that is stored all the same must be equal to it. folded: its normalisations were
    folded into the weights behind them, and have γ = 1 and β = 0. aliases:
    other names of some of its tensors. among_others: the checkpoint holds more than the language model. family: for
    people. turned: matrices that may be stored the other way round, [out, in] as torch's Linear has them, all of them
    or none.
    """

    kind: str
    config: ModelConfig
    ends: Mapping[str, Source]
    layer: Mapping[str, Source]
    tied: bool = False
    folded: bool = False
    aliases: Mapping[str, str] = field(default_factory=dict)
    family: str = "GPT-2"
    among_others: bool = False
    turned: tuple[str, ...] = ()

    def sources(self) -> Iterator[tuple[str, Source, str]]:
        """(our name, where it comes from, the layer's number as text) of every tensor, in a fixed order."""
        front = list(takewhile(lambda name: not name.startswith("ln_final"), self.ends))
        yield from ((name, self.ends[name], "") for name in front)
        for index in range(self.config.n_layers):
            yield from ((f"layers.{index}.{name}", source, str(index)) for name, source in self.layer.items())
        yield from ((name, source, "") for name, source in self.ends.items() if name not in front)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The names and shapes of what a checkpoint must hold."""
        must = [(source, index) for _, source, index in self.sources() if source.required]
        return {name.format(index): shape for source, index in must for name, shape in shapes_of(source)}

    def knows(self, name: str) -> bool:
        """Whether a tensor of a checkpoint by this name is one of its own."""
        name = bare(name)
        known = {their.format(index) for _, source, index in self.sources() for their in source.names}
        return self.aliases.get(name, name) in known


def bare(name: str) -> str:
    """A tensor's name without what wrappers put in front of it."""
    return _PREFIX.sub("", name.replace("_orig_mod.", ""), count=1)


def shapes_of(source: Source) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The name and the shape of each tensor of a source."""
    for place, name in enumerate(source.names):
        shape = source.shape[place] if source.shape and isinstance(source.shape[0], tuple) else source.shape
        yield name, shape  # type: ignore[misc]


def build_weights(
    layout: Layout,
    tensors: Iterable[Stored],
    *,
    dtype: torch.dtype | None,
    device: torch.device | None,
    links: Links | None = None,
) -> Weights:
    """Read a checkpoint's tensors into Weights, one at a time, converted only where dtype or device ask for it; links:
    of the module that they are of, which learn where each comes from."""
    by_name = _match(layout, tensors)
    if dtype is None and len(kinds := sorted({tensor.dtype for tensor in by_name.values()})) > 1:
        raise ValueError(f"the checkpoint mixes {' and '.join(kinds)}: give a dtype to convert it to")
    ours: dict[str, Tensor] = {}
    for name, source, index in layout.sources():
        found = [by_name.get(their.format(index)) for their in source.names]
        stored = [one for one in found if one is not None]
        if stored:
            make = partial(_made, source, device, dtype)
            ours[name] = make(*(one.read() for one in stored))
            if links is not None:
                links.add(ours[name], [one.name for one in stored], [one.read() for one in stored], make)
    if layout.tied:
        head = ours.get("w_u")
        w_u = ours["w_e"].T
        if head is not None and head.data_ptr() != w_u.data_ptr() and not torch.equal(head, w_u):
            # Some releases of transformers compute with the embedding here, others with the head.
            names = [layout.ends[name].names[0] for name in ("w_u", "w_e")]
            raise ValueError(
                f"{names[0]} differs from {names[1]} though the configuration ties them: set tie_word_embeddings to "
                "false to use it, or remove it from the checkpoint"
            )
        ours["w_u"] = w_u
    return assemble(layout.config, ours, folded=layout.folded)


def _made(source: Source, device: torch.device | None, dtype: torch.dtype | None, *parts: Tensor) -> Tensor:
    if source.wide:
        dtype = accumulate_dtype(parts[0].dtype if dtype is None else dtype)
    return source.view(*(part.to(device=device, dtype=dtype) for part in parts))


def _turned(layout: Layout, by_name: dict[str, Stored]) -> None:
    """Turn the matrices of a layout that are stored the other way round.

    That is judged over all of them at once, since of a square one it cannot be seen.

    Raises:
        ValueError: some are stored one way, and some the other.
    """
    ways: dict[bool, str] = {}
    found = []
    for _, source, index in layout.sources():
        for their, shape in shapes_of(source):
            tensor = by_name.get(their.format(index))
            if their in layout.turned and tensor is not None:
                found.append(their.format(index))
                if shape[0] != shape[1] and tensor.shape in (shape, shape[::-1]):
                    ways.setdefault(tensor.shape == shape, tensor.name)
    if len(ways) > 1:
        raise ValueError(
            f"{ways[True]} is stored as [in, out] and {ways[False]} as [out, in], as torch's Linear has it: store all "
            "matrices one way, for of a square one nobody can tell"
        )
    for name in found if False in ways else ():
        tensor = by_name[name]
        by_name[name] = replace(tensor, shape=tensor.shape[::-1], read=lambda read=tensor.read: read().T)


def assemble(config: ModelConfig, tensors: Mapping[str, Tensor], *, folded: bool = False) -> Weights:
    """Weights of tensors by their names in `Weights.named`; folded: normalisations have γ = 1 and β = 0."""
    kind = config.normalization or "none"

    def norm(name: str) -> Norm:
        gamma, beta = tensors.get(f"{name}.0"), tensors.get(f"{name}.1")
        if folded:
            gamma = tensors["w_e"].new_ones(config.d_model)
            beta = tensors["w_e"].new_zeros(config.d_model) if kind == "layernorm" else None
        return Norm(kind, gamma, beta, config.eps)

    layers: list[Layer] = []
    for index in range(config.n_layers):
        at = f"layers.{index}."
        own = {name.removeprefix(at): tensor for name, tensor in tensors.items() if name.startswith(at)}
        w_qkv = tuple(own[name] for name in ("w_qkv.0", "w_qkv.1", "w_qkv.2") if name in own)
        scale = config.score_scale(index)
        attention = Attention(
            norm(at + "ln1") if config.pre_norms else NO_NORM,
            w_qkv,
            own.get("b_qkv"),
            own["w_o"],
            own.get("b_o"),
            scale,
            config.rotary(index),
            q_norm=Norm("rmsnorm", own["q_norm.0"], None, config.eps) if config.qk_norm else NO_NORM,
            k_norm=Norm("rmsnorm", own["k_norm.0"], None, config.eps) if config.qk_norm else NO_NORM,
            joint=config.qk_norm_joint,
            softcap=config.attn_softcap,
            window=config.window(index),
            grouped=config.kv_grouped,
            post=Norm(kind, own["post_a.0"], None, config.eps) if "post_a.0" in own else NO_NORM,
        )
        if config.act_fn is None:
            layers.append(((attention,),))
            continue
        mlp = Mlp(
            norm(at + "ln2") if config.pre_norms else NO_NORM,
            own["w_in"],
            own.get("b_in"),
            own["w_out"],
            own.get("b_out"),
            config.act_fn,
            own.get("w_up"),
            own.get("b_up"),
            Norm(kind, own["post_m.0"], None, config.eps) if "post_m.0" in own else NO_NORM,
        )
        layers.append(((attention, mlp),) if config.parallel else ((attention,), (mlp,)))
    return Weights(
        w_e=tensors["w_e"],
        w_pos=tensors.get("w_pos"),
        layers=tuple(layers),
        w_u=tensors["w_u"],
        b_u=tensors.get("b_u"),
        ln_final=norm("ln_final"),
    )


def _match(layout: Layout, tensors: Iterable[Stored]) -> dict[str, Stored]:
    by_name: dict[str, Stored] = {}
    for tensor in tensors:
        name = bare(tensor.name)
        if _BUFFER.fullmatch(name) or (layout.among_others and _OTHER_PARTS.fullmatch(name)):
            continue
        if _QUANTISED.fullmatch(name):
            raise ValueError(f"{tensor.name} is a part of a quantised weight, which is not supported: {_ONLY_FLOATS}")
        name = layout.aliases.get(name, name)
        if name in by_name:
            raise ValueError(f"the checkpoint holds {name} twice, as {by_name[name].name} and as {tensor.name}")
        by_name[name] = tensor
    if (heads := [tensor.name for name, tensor in by_name.items() if _HEAD.match(name)]) and len(heads) < len(by_name):
        _log.warning("left aside, a head for another task: %s", _some(heads))
        by_name = {name: tensor for name, tensor in by_name.items() if not _HEAD.match(name)}
    _turned(layout, by_name)
    if layout.tied and (ends := _tied_alone(layout, by_name)) is not None:
        by_name[ends[0]] = by_name[ends[1]]
    known, missing = {}, []
    for _, source, index in layout.sources():
        for their, shape in shapes_of(source):
            name = their.format(index)
            known[name] = shape
            if source.required and name not in by_name:
                missing.append(f"{name} {list(shape)}")
    extra = [tensor.name for name, tensor in by_name.items() if name not in known]
    if missing or extra:
        faults = [f"lacks {_some(missing)}"] if missing else []
        faults += [f"has {_some(extra)} besides"] if extra else []
        raise ValueError(
            f"the checkpoint is not the {layout.kind} that its configuration describes: {' and '.join(faults)}"
        )
    for name, tensor in by_name.items():
        if tensor.shape != known[name]:
            raise ValueError(
                f"{tensor.name} must be {list(known[name])} by the configuration, got {list(tensor.shape)}"
            )
        if tensor.dtype not in DTYPES:
            raise ValueError(
                f"{tensor.name} has dtype {tensor.dtype}: quantised weights are not supported, {_ONLY_FLOATS}"
            )
    return by_name


def _tied_alone(layout: Layout, by_name: Mapping[str, Stored]) -> tuple[str, str] | None:
    """The embedding's name and the head's, where the head alone is stored though they are tied."""
    if "w_u" not in layout.ends:
        return None
    embedding, head = (layout.ends[name].names[0] for name in ("w_e", "w_u"))
    return (embedding, head) if embedding not in by_name and head in by_name else None


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


# Configurations


# The largest sizes, by parts of the names of fields: what is beyond is a mistake, or would fill the memory.
_MOST = {"layer": 4096, "kv": 1 << 16, "_head": 1 << 16, "head_dim": 1 << 16, "ctx": 1 << 40, "position": 1 << 40,
    "window": 1 << 40, "block_size": 1 << 40, "": 1 << 28}  # fmt: skip


def _shown(value: object) -> str:
    """A value of a configuration, short."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"


def integer(raw: Mapping[str, Any], *names: str) -> int:
    for name in names:
        value = raw.get(name)
        if value is not None:
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} of the configuration must be a positive integer, got {_shown(value)}")
            most = next(most for part, most in _MOST.items() if part in name)
            if value > most:
                raise ValueError(f"{name} of the configuration must be at most {most}, got {_shown(value)}")
            return value
    raise ValueError(f"the configuration lacks {' or '.join(names)}")


def positive(raw: Mapping[str, Any], *names: str, default: float) -> float:
    for name in names:
        value = raw.get(name)
        if value is not None:
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e300:
                raise ValueError(f"{name} of the configuration must be a positive number, got {_shown(value)}")
            return float(value)
    return default


def flag(raw: Mapping[str, Any], name: str, default: bool) -> bool:
    value = raw.get(name)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{name} of the configuration must be true or false, got {_shown(value)}")
    return default if value is None else value


def activation(raw: Mapping[str, Any], name: str, default: str | None) -> str:
    value = raw.get(name, default)
    if not isinstance(value, str) or value not in _ACTIVATIONS:
        raise ValueError(f"{name} {_shown(value)} is not supported: expected one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[value]


def refuse(raw: Mapping[str, Any], allowed: Mapping[str, tuple[object, ...]]) -> None:
    """ValueError for a field that changes the mathematics. None stands for an absent field too."""
    for name, values in allowed.items():
        value = raw.get(name)
        if value is not None and value not in values:
            expected = " or ".join(repr(each) for each in values) or "none"
            raise ValueError(f"{name} {_shown(value)} of the configuration is not supported: expected {expected}")


def frequencies(base: float, dims: int, scaling: Mapping[str, Any] | None = None) -> tuple[float, ...]:
    """Radians a position of a rotary embedding of so many dimensions, base^(−2i/dims), slowed down as `scaling` says.

    scaling: "default"; "linear", by its factor; or "llama3": wavelengths beyond the original context by the factor,
    those far inside it not at all, those in between by a mixture.

    Raises:
        ValueError: another kind of scaling, or one without a number that it needs; it is named.
    """
    scaling = scaling or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    turns = [base ** (-i / dims) for i in range(0, dims, 2)]
    if kind == "default":
        return tuple(turns)
    if kind not in ("linear", "llama3"):
        raise ValueError(
            f"rope_type {_shown(kind)} of the configuration is not supported: expected default, linear or llama3"
        )
    needed = ("factor",) if kind == "linear" else ("factor", "low_freq_factor", "high_freq_factor")
    numbers = [positive(scaling, name, default=0) for name in needed]
    for name, number in zip(needed, numbers, strict=True):
        if not number:
            raise ValueError(f"the configuration lacks the {name} of rope_type {kind}")
    if kind == "linear":
        return tuple(turn / numbers[0] for turn in turns)
    factor, low, high = numbers
    if low >= high:
        raise ValueError(
            f"low_freq_factor of the configuration must be below high_freq_factor, got {low:g} and {high:g}"
        )
    context = integer(scaling, "original_max_position_embeddings")
    found = []
    for turn in turns:
        smooth = (context * turn / (2 * math.pi) - low) / (high - low)  # 0 at the long wavelengths, 1 at the short
        smooth = min(1.0, max(0.0, smooth))
        found.append((1 - smooth) * turn / factor + smooth * turn)
    return tuple(found)


def rope(
    raw: Mapping[str, Any], *names: str, default: float = 10000.0, layers: str | None = None
) -> tuple[float, Mapping[str, Any]]:
    """(base, scaling) of a configuration, in the older form or in transformers 5's.

    names: of the base in the older form; default: the base where nothing says it; layers: of which kind of layer, in a
    family whose kinds of layers are turned in their own ways.

    Raises:
        ValueError: a configuration that says two things of one, or says it of kinds of layers where there are none.
    """
    new, old = raw.get("rope_parameters") or {}, raw.get("rope_scaling") or {}
    if new and old and new != old:
        raise ValueError("the configuration has rope_parameters and rope_scaling: remove one of them")
    kinds = [name for name, value in new.items() if isinstance(value, Mapping)]
    if new and layers is None and kinds:
        raise ValueError(f"rope_parameters of the configuration must not be by layers, got those of {', '.join(kinds)}")
    if new and layers is not None and len(kinds) < sum(value is not None for value in new.values()):
        raise ValueError("rope_parameters of the configuration must be by layers, full_attention and sliding_attention")
    if layers is not None and "type" in old and "rope_type" not in old:  # which transformers 4 read, and 5 does not
        raise ValueError("rope_scaling of the configuration must say what it is as rope_type, not as type")
    scaling = (new.get(layers) or {}) if layers is not None and new else new or old
    base = positive(scaling, "rope_theta", default=positive(raw, *names, default=default))
    for name in names:
        agreed(name, raw.get(name), base)
    context = raw.get("original_max_position_embeddings")
    if context is not None and "original_max_position_embeddings" in scaling:
        agreed("original_max_position_embeddings", context, scaling["original_max_position_embeddings"])
    return base, scaling


def agreed(name: str, value: object, expected: object) -> None:
    """ValueError for a field of another value than what stands elsewhere in the configuration for the same."""
    if value is not None and value != expected:
        raise ValueError(
            f"the configuration says {name} {_shown(value)}, and elsewhere {_shown(expected)}: remove one of them"
        )


def linear(name: str, out: int, inside: int, heads: int | None = None) -> Source:
    """A torch Linear's weight [out, in] as the matrix [in, out], with heads as channels [C, in, K]."""
    if heads is None:
        return Source((name,), (out, inside), lambda w: w.T)
    return Source((name,), (out, inside), lambda w: w.view(heads, -1, inside).transpose(1, 2))
