"""A configuration with its weights, and its stages: what every loop over a model goes through."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Generic, Protocol, TypeVar, overload

import torch
from torch import Tensor

from eapcore.graph.graph import Graph
from eapcore.graph.show import card, short
from eapcore.models.attention import Attention
from eapcore.models.config import ModelConfig
from eapcore.models.links import Links
from eapcore.models.mlp import Mlp
from eapcore.models.norm import NO_NORM, Norm
from eapcore.models.tensors import as_matrix, moved
from eapcore.models.weights import Layer, Weights
from eapcore.text.tokenizer import Tokenizer

# Fields from here on belong to a model's identity where they are not what they are by default.
_HASHED = [known.name for known in fields(ModelConfig)].index("parallel")
C = TypeVar("C", Attention, Mlp, Attention | Mlp)
T = TypeVar("T")
Form = tuple[Annotated[Tensor, "C K"], Annotated[Tensor, "C K"]]


@dataclass(frozen=True, slots=True)
class Place(Generic[C]):
    """A component where it stands: its name, "a{l}" all heads of a layer or "m{l}" its MLP, and its place in the
    graph.

    at_rest: the component itself; of a model whose layers are streamed on the host, good for what it is and for its
    norm. fetch: brings the layer to the device where it is to compute, None where it lies there.
    """

    __repr__ = short

    at_rest: C
    name: str
    senders: slice
    receivers: slice
    fetch: Callable[[], Any] | None = None

    @property
    def component(self) -> C:
        """The component, ready to compute with; whoever holds it holds its weights on the device."""
        found: C = self.at_rest if self.fetch is None else self.fetch()
        return found


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


class Stream(Protocol):
    """Who brings layers from the host to a device, each when it is asked for."""

    @property
    def device(self) -> torch.device: ...

    @property
    def layers(self) -> tuple[Layer, ...]:
        """All layers on the host."""

    @property
    def held(self) -> int:
        """Bytes of the layers that are on the device at a time, at most."""

    def layer(self, index: int) -> Layer:
        """A layer on the device."""

    def forget(self) -> None:
        """Leave the device: somebody may have changed the weights since."""


class _Lazy(Sequence[T]):
    """What `make` makes of each of some places when it is asked for; kept where it says."""

    def __init__(
        self, places: Sequence[Place[Attention]], make: Callable[[Attention], T], keep: dict[int, T] | None = None
    ) -> None:
        self.places, self.make, self.keep = places, make, keep

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...

    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        if isinstance(index, slice):
            return _Lazy(self.places[index], self.make)
        if self.keep is None:
            return self.make(self.places[index].component)
        if index not in self.keep:
            self.keep[index] = self.make(self.places[index].component)
        return self.keep[index]


@dataclass(frozen=True, eq=False)
class Model:
    """A configuration with its weights, in one dtype, on one device or with its layers on several.

    name says where they came from, folder where their files lie (None for weights from memory), family for people what
    it is. tokenizer: its own, read when it is first asked for; None for weights from memory, and where none lies beside
    them. links: to the module in memory that it was loaded from; None where there is none. stream: what brings its
    layers, which lie on the host, to its device; None where they lie where they compute.
    """

    config: ModelConfig
    weights: Weights
    name: str = "unnamed"
    folder: Path | None = None
    family: str = "decoder"
    tokenizer: Tokenizer | None = None
    links: Links | None = None
    stream: Stream | None = None
    _hashed: dict[tuple[Any, ...], str] = field(default_factory=dict, init=False)

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
        if self.stream is not None:
            self.stream.forget()
        same = replace(self)
        object.__setattr__(same, "_hashed", self._hashed)  # which follows the weights by itself
        vars(same)["edge_masks"] = self.edge_masks  # which depend on no weight
        return same

    @cached_property
    def graph(self) -> Graph:
        """Its senders, receivers and edges."""
        return self.config.graph

    @property
    def dtype(self) -> torch.dtype:
        """Of all weights; scores of a float64 model are float64, of all others float32."""
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
        streamed = "" if self.stream is None else ", its layers streamed from the host"
        return ", ".join(map(str, self.devices)) + streamed

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """All stages in order."""
        return tuple(self._stages())

    def _stages(self) -> Iterator[Stage]:
        graph, stream = self.graph, self.stream
        for index, layer in enumerate(self.weights.layers):
            mlp_at = graph.mlp_receiver(index)
            for number, components in enumerate(layer):
                attention: Place[Attention] | None = None
                mlp: Place[Mlp] | None = None
                for place, component in enumerate(components):
                    fetch = None if stream is None else partial(_fetch, stream, index, number, place)
                    if isinstance(component, Attention):
                        attention = Place(component, f"a{index}", graph.heads(index), graph.qkv(index), fetch)
                    else:
                        senders = slice(graph.mlp(index), graph.mlp(index) + 1)
                        mlp = Place(component, f"m{index}", senders, slice(mlp_at, mlp_at + 1), fetch)
                device = components[0].device if stream is None else stream.device
                yield Stage(index, index == graph.n_layers - 1, attention, mlp, device)

    @cached_property
    def attentions(self) -> Sequence[Attention]:
        """Each layer's attention."""
        places = self._heads()
        return tuple(x.at_rest for x in places) if self.stream is None else _Lazy(places, lambda x: x)

    def _heads(self) -> list[Place[Attention]]:
        return [stage.attention for stage in self.stages if stage.attention is not None]

    @property
    def groups(self) -> int:
        """Channel groups of a layer: 3 where q, k and v are stored apart, 0 where each head is as well."""
        weights = self._heads()[0].at_rest.w_qkv
        return len(weights) if all(as_matrix(w) is not None for w in weights) else 0

    @cached_property
    def next_norms(self) -> tuple[Norm, ...]:
        """For each stage the norm of the one behind it, on its own device."""
        places = [(stage.attention or stage.mlp, before.device) for before, stage in pairwise(self.stages)]
        return *(moved(place.at_rest.norm, device) for place, device in places if place is not None), NO_NORM

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
        found = self._hashed.get(state)
        if found is None:
            found = self._hash()
            self._hashed.clear()
            self._hashed[state] = found
        return found  # as another thread may have cleared it

    def _hash(self) -> str:
        c = self.config
        beside = f"{c.act_fn} {c.attn_scale:.9g} {c.scale_attn_by_inverse_layer_idx} {c.eps:.9g}"
        for known in fields(c)[_HASHED:]:  # kv_grouped says which edges there are, not what the model computes
            if known.name != "kv_grouped" and (value := getattr(c, known.name)) != known.default:
                beside += f" {known.name}={value}"
        beside += " rmsnorm" * (c.normalization == "rmsnorm")
        return hashlib.sha256(f"{self.weights.content_hash()} {beside}".encode()).hexdigest()[:16]

    @cached_property
    def closed_forms(self) -> Sequence[Form]:
        """(Wᵀγ, b + Wᵀβ) of each layer's channels: constants of the weights in the receivers' gradients, which `now`
        computes anew."""
        if self.stream is not None:  # of each layer while it is there
            return _Lazy(self._heads(), lambda attention: attention.closed_form(), {})
        return tuple(attention.closed_form() for attention in self.attentions)


def _fetch(stream: Stream, index: int, number: int, place: int) -> Attention | Mlp:
    return stream.layer(index)[number][place]
