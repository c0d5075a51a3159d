"""Senders, receivers and edges as integers: index ↔ name, and which pairs are edges."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from eapcore.graph.show import card
from eapcore.kernels.checks import short_repr

_MOST = 1 << 32  # places of [S, R]; a model of 126 layers of 128 heads has 2^30
_SENDER = re.compile(r"a(\d{1,9})\.h(\d{1,9})|m(\d{1,9})")
_RECEIVER = re.compile(r"a(\d{1,9})\.(h|kv)(\d{1,9})<([qkv])>|m(\d{1,9})")


@dataclass(frozen=True, slots=True)
class Graph:
    """The edges of a transformer.

    Senders: `embed`, then for each layer its heads `a{l}.h{h}` and its MLP `m{l}`: S = 1 + L(H+1), without MLPs 1 + LH.
    Receivers: for each layer `a{l}.h{h}<q>` for all heads, then all <k>, all <v>, then `m{l}`; last `logits`:
    R = L(3H+1) + 1, or 3LH + 1. The senders of a receiver are always a prefix of all senders: those of the stages
    before its own. parallel: a layer's heads and MLP are one stage, so that no edge leads from the heads to the MLP.
    n_kv: with grouped queries, how many key and value heads are receivers of their own, `a{l}.kv{g}<k>`, each with the
    query heads of its group behind it; None is one for each query head.

    >>> graph = Graph(n_layers=12, n_heads=12, has_mlp=True)
    >>> graph.n_senders, graph.n_receivers, graph.n_edges
    (157, 445, 32491)
    >>> graph.receiver_names[graph.receiver("a5.h2<q>")]
    'a5.h2<q>'
    """

    n_layers: int
    n_heads: int
    has_mlp: bool
    parallel: bool = False
    n_kv: int | None = None

    def __post_init__(self) -> None:
        sizes = {"n_layers": self.n_layers, "n_heads": self.n_heads}
        sizes |= {} if self.n_kv is None else {"n_kv": self.n_kv}
        for name, size in sizes.items():
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(f"a graph's {name} must be a positive integer, got {short_repr(size)}")
        for name in ("has_mlp", "parallel"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"a graph's {name} must be True or False, got {short_repr(getattr(self, name))}")
        if self.n_heads % (self.n_kv or 1):
            raise ValueError(f"a graph's {self.n_heads} heads must be a multiple of its n_kv, got {self.n_kv}")
        if self.n_senders * self.n_receivers > _MOST:
            raise ValueError(
                f"a graph of {self.n_layers} layers × {self.n_heads} heads has {self.n_senders} senders × "
                f"{self.n_receivers} receivers, more than any machine holds scores of ({_MOST})"
            )

    def _repr_html_(self) -> str:
        heads = f"{self.n_layers} × {self.n_heads}" + (
            "" if self.n_kv is None else f", {self.n_kv} for keys and values"
        )
        facts = [("layers × heads", heads), ("MLPs", "yes" if self.has_mlp else "no"), ("senders", self.n_senders)]
        return card(f"Graph of {self.n_edges:,} edges", [*facts, ("receivers", self.n_receivers)])

    def as_dict(self) -> dict[str, int | bool]:
        """Its fields as files hold them."""
        fields: dict[str, int | bool] = {"n_layers": self.n_layers, "n_heads": self.n_heads, "has_mlp": self.has_mlp}
        fields |= {"parallel": True} if self.parallel else {}
        return fields if self.n_kv is None else fields | {"n_kv": self.n_kv}

    @property
    def senders_per_layer(self) -> int:
        """A layer's heads, and its MLP where it has one."""
        return self.n_heads + self.has_mlp

    @property
    def channels_per_layer(self) -> int:
        """A layer's q, k and v receivers."""
        return self.n_heads + 2 * (self.n_heads if self.n_kv is None else self.n_kv)

    @property
    def receivers_per_layer(self) -> int:
        """A layer's q, k and v inputs, and its MLP's where it has one."""
        return self.channels_per_layer + self.has_mlp

    @property
    def n_senders(self) -> int:
        """S: the embedding, and each layer's."""
        return 1 + self.n_layers * self.senders_per_layer

    @property
    def n_receivers(self) -> int:
        """R: each layer's, and the logits' input."""
        return self.n_layers * self.receivers_per_layer + 1

    @property
    def n_edges(self) -> int:
        """E: a sender and a receiver that comes behind it."""
        return sum(self.senders_before(r) for r in range(self.n_receivers))

    def heads(self, layer: int) -> slice:
        """The senders that are a layer's heads."""
        start = 1 + layer * self.senders_per_layer
        return slice(start, start + self.n_heads)

    def mlp(self, layer: int) -> int:
        """The sender that is a layer's MLP."""
        return self.heads(layer).stop

    def qkv(self, layer: int) -> slice:
        """The receivers that are a layer's q, k and v inputs."""
        start = layer * self.receivers_per_layer
        return slice(start, start + self.channels_per_layer)

    def mlp_receiver(self, layer: int) -> int:
        """The receiver that is a layer's MLP input."""
        return self.qkv(layer).stop

    @property
    def logits(self) -> int:
        """The receiver that is the logits' input."""
        return self.n_receivers - 1

    def is_last(self, layer: int) -> bool:
        """Whether a layer is the last, behind whose attention only the positions that a metric reads matter."""
        return layer == self.n_layers - 1

    @property
    def senders_everywhere(self) -> slice:
        """The senders whose output something reads at other positions than the metric: those before the last layer."""
        return slice(0, self.heads(max(self.n_layers - 1, 0)).start)

    @property
    def read_receivers(self) -> list[int]:
        """The receivers whose gradient is zero but where the metric reads: the last layer's q and MLP, the logits."""
        if self.n_layers == 0:
            return [self.logits]
        first, mlp = self.qkv(self.n_layers - 1).start, self.mlp_receiver(self.n_layers - 1)
        return [*range(first, first + self.n_heads), *([mlp] if self.has_mlp else []), self.logits]

    def senders_before(self, receiver: int) -> int:
        """How many senders, from the first on, a receiver has edges from."""
        layer, place = divmod(receiver, self.receivers_per_layer)
        if layer == self.n_layers:
            return self.n_senders
        behind_heads = place == self.channels_per_layer and not self.parallel
        return self.heads(layer).start + (self.n_heads if behind_heads else 0)

    def senders_behind(self, receiver: int) -> range:
        """The senders that are made of what a receiver reads: its head, its group's heads or its MLP; none for the
        logits."""
        layer, place = divmod(receiver, self.receivers_per_layer)
        if layer == self.n_layers:
            return range(0)
        if place == self.channels_per_layer:
            return range(self.mlp(layer), self.mlp(layer) + 1)
        first = self.heads(layer).start
        if place < self.n_heads or self.n_kv is None:
            return range(first + place % self.n_heads, first + place % self.n_heads + 1)
        size, group = self.n_heads // self.n_kv, (place - self.n_heads) % self.n_kv
        return range(first + group * size, first + (group + 1) * size)

    def members(self, senders: Iterable[int]) -> Annotated[Tensor, "bool S"]:
        """bool [S], True for these senders."""
        found = torch.zeros(self.n_senders, dtype=torch.bool, device="cpu")
        found[list(senders)] = True
        return found

    def edge_mask(self) -> Annotated[Tensor, "bool S R"]:
        """bool [S, R], True where there is an edge."""
        before = torch.tensor([self.senders_before(r) for r in range(self.n_receivers)], device="cpu")
        return torch.arange(self.n_senders, device="cpu")[:, None] < before

    def edge_masks(self) -> tuple[Annotated[Tensor, "bool S R"], Annotated[Tensor, "bool S R"]]:
        """The edges in two: to all receivers but `read_receivers`, and to these."""
        at_read, edges = torch.zeros(self.n_receivers, dtype=torch.bool, device="cpu"), self.edge_mask()
        at_read[self.read_receivers] = True
        return edges & ~at_read, edges & at_read

    @property
    def sender_names(self) -> list[str]:
        """Of all S in order: embed, then each layer's heads a0.h0, a0.h1, … and its MLP m0."""
        names = ["embed"]
        for layer in range(self.n_layers):
            names += [f"a{layer}.h{head}" for head in range(self.n_heads)]
            names += [f"m{layer}"] if self.has_mlp else []
        return names

    @property
    def receiver_names(self) -> list[str]:
        """Of all R in order: each layer's a0.h0<q>, …, a0.h0<k>, …, a0.h0<v>, … and m0, at the end logits."""
        names = []
        for layer in range(self.n_layers):
            names += [f"a{layer}.h{head}<q>" for head in range(self.n_heads)]
            each, count = ("h", self.n_heads) if self.n_kv is None else ("kv", self.n_kv)
            names += [f"a{layer}.{each}{number}<{part}>" for part in "kv" for number in range(count)]
            names += [f"m{layer}"] if self.has_mlp else []
        return [*names, "logits"]

    def sender(self, name: str) -> int:
        """The index of a sender's name; ValueError for a name that this graph does not have."""
        match = _SENDER.fullmatch(name) if isinstance(name, str) else None
        if name == "embed":
            return 0
        if match and match[3] is None and int(match[1]) < self.n_layers and int(match[2]) < self.n_heads:
            return self.heads(int(match[1])).start + int(match[2])
        if match and match[3] is not None and self.has_mlp and int(match[3]) < self.n_layers:
            return self.mlp(int(match[3]))
        raise ValueError(f"a sender is {self._forms('')}, got {short_repr(name)}")

    def receiver(self, name: str) -> int:
        """The index of a receiver's name; ValueError for a name that this graph does not have."""
        match = _RECEIVER.fullmatch(name) if isinstance(name, str) else None
        if name == "logits":
            return self.logits
        if match and match[5] is not None and self.has_mlp and int(match[5]) < self.n_layers:
            return self.mlp_receiver(int(match[5]))
        if match and match[5] is None and int(match[1]) < self.n_layers:
            layer, part, number = int(match[1]), "qkv".index(match[4]), int(match[3])
            each, count = ("h", self.n_heads) if part == 0 or self.n_kv is None else ("kv", self.n_kv)
            if match[2] == each and number < count:
                return self.qkv(layer).start + (part and self.n_heads + (part - 1) * count) + number
        raise ValueError(f"a receiver is {self._forms('<q|k|v>')}, got {short_repr(name)}")

    def edge(self, name: str) -> tuple[int, int]:
        """(sender, receiver) of an edge's name, e.g. `a3.h7->a5.h2<q>`; ValueError if it is not an edge."""
        parts = name.split("->") if isinstance(name, str) else []
        if len(parts) != 2:
            raise ValueError(f"an edge is written sender->receiver, e.g. 'a0.h1->a1.h0<q>', got {short_repr(name)}")
        sender, receiver = self.sender(parts[0]), self.receiver(parts[1])
        if sender >= self.senders_before(receiver):
            raise ValueError(f"{name!r} is no edge: {parts[0]} does not come before {parts[1]}")
        return sender, receiver

    def edge_name(self, sender: int, receiver: int) -> str:
        """The name of the edge between these places, e.g. `a3.h7->a5.h2<q>`."""
        return f"{self.sender_names[sender]}->{self.receiver_names[receiver]}"

    def _forms(self, suffix: str) -> str:
        layers = f"{{0..{self.n_layers - 1}}}"
        head = f"a{layers}.h{{0..{self.n_heads - 1}}}"
        if suffix and self.n_kv is not None:
            heads = [f"{head}<q>", f"a{layers}.kv{{0..{self.n_kv - 1}}}<k|v>"]
        else:
            heads = [head + suffix]
        return " or ".join(["logits" if suffix else "embed", *heads, *([f"m{layers}"] if self.has_mlp else [])])
