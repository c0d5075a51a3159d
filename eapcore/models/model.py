"""A configuration with its weights, and its stages: what every loop over a model goes through."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import torch
from torch import Tensor

from eapcore.graph.graph import Graph
from eapcore.graph.show import card, short
from eapcore.models.attention import Attention
from eapcore.models.config import ModelConfig
from eapcore.models.links import Links
from eapcore.models.mlp import Mlp
from eapcore.models.weights import Weights
from eapcore.text.tokenizer import Tokenizer

# Fields from here on belong to a model's identity where they are not what they are by default.
_HASHED = [known.name for known in fields(ModelConfig)].index("parallel")
C = TypeVar("C", Attention, Mlp, Attention | Mlp)


@dataclass(frozen=True, slots=True)
class Place(Generic[C]):
    """A component where it stands: its name, "a{l}" all heads of a layer or "m{l}" its MLP, and its place in the
    graph."""

    __repr__ = short

    component: C
    name: str
    senders: slice
    receivers: slice


@dataclass(frozen=True, slots=True)
class Stage:
    """Components of a layer that read the same stream; what they send is added behind it.

    index: of the layer. last: in the last layer, behind whose attention only the positions that a metric reads matter.
    device: where the layer's weights lie.
    """

    __repr__ = short

    index: int
    last: bool
    attention: Place[Attention] | None
    mlp: Place[Mlp] | None
    device: torch.device


@dataclass(frozen=True)
class Model:
    """A configuration with its weights, in one dtype, on one device or with its layers on several.

    name says where they came from, folder where their files lie (None for weights from memory), family for people what
    it is. tokenizer: its own, read when it is first asked for; None for weights from memory, and where none lies beside
    them. links: to the module in memory that it was loaded from; None where there is none.
    """

    config: ModelConfig
    weights: Weights
    name: str = "unnamed"
    folder: Path | None = None
    family: str = "decoder"
    tokenizer: Tokenizer | None = field(default=None, compare=False)
    links: Links | None = field(default=None, repr=False, compare=False)
    _hashed: dict[tuple[Any, ...], str] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __repr__(self) -> str:
        c, dtype = self.config, str(self.dtype).removeprefix("torch.")
        return (
            f"Model({self.name!r}: {self.family}, {c.n_layers} layers × {c.n_heads} heads, d_model {c.d_model}, "
            f"vocabulary {c.d_vocab}, {self.graph.n_edges} edges, {dtype} on {self.where})"
        )

    def _repr_html_(self) -> str:
        c, dtype = self.config, str(self.dtype).removeprefix("torch.")
        facts = [
            ("family", self.family),
            ("layers × heads", f"{c.n_layers} × {c.n_heads}"),
            ("d_model", c.d_model),
            ("vocabulary", c.d_vocab),
            ("weights", f"{dtype} on {self.where}"),
            ("edges", f"{self.graph.n_edges:,} ({self.graph.n_senders} senders × {self.graph.n_receivers} receivers)"),
        ]
        return card(f"Model {self.name}", facts)

    def now(self) -> Model:
        """The same model without what was computed of its weights before, which somebody may have changed since.

        Raises:
            ValueError: the module that it was loaded from has other tensors by now.
        """
        if self.links is not None:
            self.links.follow()
        same = replace(self)
        object.__setattr__(same, "_hashed", self._hashed)  # which follows the weights by itself
        vars(same)["edge_masks"] = self.edge_masks  # which depend on no weight
        return same

    @cached_property
    def graph(self) -> Graph:
        return self.config.graph

    @property
    def dtype(self) -> torch.dtype:
        return self.weights.w_e.dtype

    @property
    def device(self) -> torch.device:
        """Where prompts are embedded, logits are made and scores are added up; its layers may lie elsewhere."""
        return self.weights.w_e.device

    @cached_property
    def devices(self) -> tuple[torch.device, ...]:
        """All that its weights lie on, in the order in which a run comes to them."""
        return tuple(dict.fromkeys([self.device, *(stage.device for stage in self.stages)]))

    @property
    def where(self) -> str:
        """Its devices, for people."""
        return ", ".join(map(str, self.devices))

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """All stages in order."""
        return tuple(self._stages())

    def _stages(self) -> Iterator[Stage]:
        graph = self.graph
        for index, layer in enumerate(self.weights.layers):
            mlp_at = graph.mlp_receiver(index)
            for components in layer:
                attention: Place[Attention] | None = None
                mlp: Place[Mlp] | None = None
                for component in components:
                    if isinstance(component, Attention):
                        attention = Place(component, f"a{index}", graph.heads(index), graph.qkv(index))
                    else:
                        senders = slice(graph.mlp(index), graph.mlp(index) + 1)
                        mlp = Place(component, f"m{index}", senders, slice(mlp_at, mlp_at + 1))
                yield Stage(index, index == graph.n_layers - 1, attention, mlp, components[0].device)

    @cached_property
    def attentions(self) -> tuple[Attention, ...]:
        """Each layer's attention."""
        return tuple(stage.attention.component for stage in self.stages if stage.attention is not None)

    def stages_from(self, layer: int) -> tuple[Stage, ...]:
        """The stages of a layer and of all behind it."""
        return tuple(stage for stage in self.stages if stage.index >= layer)

    @cached_property
    def edge_masks(self) -> tuple[Annotated[Tensor, "bool S R"], Annotated[Tensor, "bool S R"]]:
        """`Graph.edge_masks` on the model's device, copied there once."""
        everywhere, at_read = self.graph.edge_masks()
        return everywhere.to(self.device), at_read.to(self.device)

    @property
    def content_hash(self) -> str:
        """The weights' hash together with what changes the numbers beside them, as 16 hex digits.

        It follows weights that are changed in place, whoever writes: they are hashed again where a tensor's address,
        its version, or what its bits add up to is another than before.
        """
        if self.links is not None:
            self.links.follow()
        state = self.weights.state()
        if state not in self._hashed:
            self._hashed.clear()
            self._hashed[state] = self._hash()
        return self._hashed[state]

    def _hash(self) -> str:
        c = self.config
        beside = f"{c.act_fn} {c.attn_scale:.9g} {c.scale_attn_by_inverse_layer_idx} {c.eps:.9g}"
        for known in fields(c)[_HASHED:]:  # kv_grouped says which edges there are, not what the model computes
            if known.name != "kv_grouped" and (value := getattr(c, known.name)) != known.default:
                beside += f" {known.name}={value}"
        beside += " rmsnorm" * (c.normalization == "rmsnorm")
        return hashlib.sha256(f"{self.weights.content_hash()} {beside}".encode()).hexdigest()[:16]

    @cached_property
    def closed_forms(self) -> tuple[tuple[Annotated[Tensor, "C K"], Annotated[Tensor, "C K"]], ...]:
        """(Wᵀγ, b + Wᵀβ) of each layer's channels: constants of the weights in the receivers' gradients, which `now`
        computes anew."""
        return tuple(attention.closed_form() for attention in self.attentions)
