"""Published circuits, built from the rules that their authors give: what scores are judged against."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from eapcore.graph.circuit import Circuit
from eapcore.graph.graph import Graph

Edge = tuple[str, str]  # sender, receiver
HEAD = ("q", "k", "v")


@dataclass(frozen=True)
class Truth:
    """A published circuit of one model.

    circuit: its edges between components. roles: its heads by what they do. Published counts and curves take two kinds
    of edges besides, which lie inside a component and have no score of their own here: inputs, from what a head's q, k
    or v reads to its projection, named by the receiver, and results, from there to what the component sends.
    """

    model: str
    circuit: Circuit
    roles: Mapping[str, tuple[str, ...]]
    inputs: tuple[str, ...]
    results: tuple[str, ...]

    @property
    def n_published(self) -> int:
        """How many edges it has with those inside components."""
        return self.circuit.n_edges + len(self.inputs) + len(self.results)

    def role(self, sender: str) -> str | None:
        """What a sender does, "MLP" and "embed" for these, None for a head that is not in the circuit."""
        if sender == "embed" or sender.startswith("m"):
            return "embed" if sender == "embed" else "MLP"
        return next((role for role, heads in self.roles.items() if sender in heads), None)


def truth(
    model: str,
    graph: Graph,
    name: str,
    roles: Mapping[str, tuple[str, ...]],
    edges: Iterable[Edge],
    inputs: Sequence[str],
    results: Sequence[str],
) -> Truth:
    """A circuit of named edges, each of which may come several times."""
    meta = {"task": {"name": name}, "model": {"name": model}, "sources": "published"}
    circuit = Circuit.from_edges(graph, [f"{s}->{r}" for s, r in dict.fromkeys(edges)], meta)
    return Truth(model, circuit, dict(roles), tuple(inputs), tuple(results))


def heads(text: str) -> tuple[str, ...]:
    """Heads from layer.head, "9.9 10.0" → ("a9.h9", "a10.h0")."""
    return tuple("a{}.h{}".format(*name.split(".")) for name in text.split())


def mlps(layers: Iterable[int]) -> tuple[str, ...]:
    return tuple(f"m{layer}" for layer in layers)


def layer(component: str) -> int:
    """A component's layer, −1 of the embedding."""
    return -1 if component == "embed" else int(component[1:].split(".")[0])


def reads(component: str, parts: Sequence[str] = HEAD) -> tuple[str, ...]:
    """The receivers of a component: the given ones of a head."""
    return tuple(f"{component}<{part}>" for part in parts) if component.startswith("a") else (component,)


def connect(
    senders: Iterable[str], receivers: Iterable[str], parts: Sequence[str] = HEAD, *, same_layer: bool = False
) -> Iterable[Edge]:
    """The edges from each sender to each receiver behind it: of a later layer, or with same_layer from a head to the
    MLP of its own."""
    receivers = tuple(receivers)
    for sender in senders:
        for receiver in receivers:
            behind_heads = same_layer and sender.startswith("a") and receiver.startswith("m")
            if layer(sender) < layer(receiver) + behind_heads:
                yield from ((sender, read) for read in reads(receiver, parts))
