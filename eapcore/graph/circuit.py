"""A set of edges."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from eapcore.graph.export import dot, network
from eapcore.graph.files import (
    FORMAT_VERSION,
    _check_version,
    _graph,
    _NewerFormat,
    _reason,
    finite,
    replacing,
    write_text,
)
from eapcore.graph.given import ByValue, take_tensors
from eapcore.graph.graph import Graph
from eapcore.graph.paths import connected
from eapcore.graph.show import card, made_of
from eapcore.kernels.checks import short_repr


@dataclass(frozen=True, slots=True, eq=False)
class Circuit(ByValue):
    """A set of edges: bool mask [S, R] over a graph, with what is known of where it comes from, which does not count in
    whether two are equal."""

    mask: Annotated[Tensor, "bool S R"]
    graph: Graph
    meta: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        take_tensors(self, (), ("mask",))
        expected = [self.graph.n_senders, self.graph.n_receivers]
        if list(self.mask.shape) != expected:
            raise ValueError(
                f"a circuit's mask must be bool [S, R] = {expected}, got {self.mask.dtype} {list(self.mask.shape)}"
            )

    def check(self, graph: Graph) -> None:
        """ValueError for a circuit of another graph, or one with places that are no edges."""
        if self.graph != graph:
            raise ValueError(f"the circuit must belong to {graph}, got one of {self.graph}")
        if n_others := int((self.mask & ~graph.edge_mask()).sum()):
            raise ValueError(f"a circuit has edges of {graph}, but {n_others} places of its mask are none")

    def __repr__(self) -> str:
        made = made_of(self.meta)
        return f"Circuit({made}{': ' * bool(made)}{self.n_edges} of {self.graph.n_edges} edges, {self.graph})"

    def _repr_html_(self) -> str:
        names = self.edges
        facts = [("graph", self.graph), *([("of", made)] if (made := made_of(self.meta)) else [])]
        receivers = list(dict.fromkeys(name.split("->")[1] for name in names))[-12:]  # those nearest to the logits
        rows = [(r, ", ".join(e.split("->")[0] for e in names if e.endswith(f"->{r}"))) for r in reversed(receivers)]
        title = f"Circuit of {self.n_edges:,} of {self.graph.n_edges:,} edges"
        return card(title, facts, ("receiver", "from"), rows)

    @property
    def n_edges(self) -> int:
        """How many edges it has."""
        return int(self.mask.sum())

    @property
    def edges(self) -> list[str]:
        """Names of the edges, by receiver, then by sender."""
        senders, receivers = self.graph.sender_names, self.graph.receiver_names
        return [f"{senders[s]}->{receivers[r]}" for r, s in self.mask.T.nonzero().tolist()]

    @staticmethod
    def from_edges(graph: Graph, edges: list[str], meta: Mapping[str, Any] | None = None) -> Circuit:
        """The circuit of these edge names; ValueError for a name that is no edge of the graph."""
        if isinstance(edges, str):
            raise ValueError(f"edges must be a list of names, got the text {short_repr(edges)}: put it in brackets")
        mask = torch.zeros(graph.n_senders, graph.n_receivers, dtype=torch.bool, device="cpu")
        for name in edges:
            mask[graph.edge(name)] = True
        return Circuit(mask, graph, dict(meta or {}))

    def as_json(self) -> dict[str, Any]:
        """What a result's file holds of it: the names of its edges, and meta."""
        return {"edges": self.edges, "meta": self.meta}

    def prune(self) -> Circuit:
        """Only the edges that lie on a path from `embed` to `logits`; `meta` says how many there were and are."""
        kept = connected(self.graph, self.mask)
        counts = {"edges_before_pruning": self.n_edges, "edges_after_pruning": int(kept.sum())}
        return replace(self, mask=kept, meta={**self.meta, **counts})

    def to_dot(self, scores: Annotated[Tensor, "S R"] | None = None) -> str:
        """The circuit in Graphviz's language, layers up the page: `dot -Tsvg` draws it.

        scores: [S, R], e.g. `EdgeScores.scores`, for widths (|score|) and colours (sign); None draws all alike.
        """
        return dot(self.graph, self.mask, scores)

    def to_networkx(self) -> Any:
        """A networkx MultiDiGraph: nodes by name with their `layer`, edges keyed by q, k and v with their `receiver`.

        Raises:
            RuntimeError: the package networkx is not installed.
        """
        return network(self.graph, self.mask, None)

    def save(self, path: str | Path) -> None:
        """Write the circuit as JSON: format, graph, meta, and the names of the edges; ValueError if some are none."""
        self.check(self.graph)
        content = {
            "format": "eapcore-circuit",
            "format_version": FORMAT_VERSION,
            "graph": self.graph.as_dict(),
            "meta": finite(self.meta),
            "n_edges": self.n_edges,
            "edges": self.edges,
        }
        with replacing(path) as temporary:
            write_text(temporary, content)

    @staticmethod
    def load(path: str | Path) -> Circuit:
        """Read a circuit that `save` wrote; ValueError if the file is another or of a newer format."""
        path = Path(path)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(content, dict) or content.get("format") != "eapcore-circuit":
                raise ValueError("it is no circuit")
            _check_version(path, content.get("format_version"))
            circuit = Circuit.from_edges(_graph(content["graph"]), content["edges"], content["meta"])
            if circuit.n_edges != content["n_edges"]:
                raise ValueError(f"it names {circuit.n_edges} edges, but says {content['n_edges']}")
        except _NewerFormat:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} must be a circuit file that eapcore wrote, but it cannot be read: {_reason(error)}"
            ) from error
        return circuit
