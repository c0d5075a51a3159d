"""Edges for other libraries and programs: pandas, networkx, Graphviz."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any

from torch import Tensor

from eapcore.graph.graph import Graph
from eapcore.graph.show import need


def frame(graph: Graph, flat: Annotated[Tensor, "int64 E"], columns: Mapping[str, Annotated[Tensor, "S R"]]) -> Any:
    """A pandas DataFrame of edges by their flat indices s·R + r: edge, sender, receiver, and other columns."""
    pandas = need("pandas", "a table of scores")
    names = graph.sender_names, graph.receiver_names
    places = [divmod(i, graph.n_receivers) for i in flat.tolist()]
    names_of = {
        "edge": [f"{names[0][s]}->{names[1][r]}" for s, r in places],
        "sender": [names[0][s] for s, _ in places],
        "receiver": [names[1][r] for _, r in places],
    }
    return pandas.DataFrame(names_of | {name: x.flatten()[flat].numpy() for name, x in columns.items()})


def network(graph: Graph, mask: Annotated[Tensor, "bool S R"], scores: Annotated[Tensor, "S R"] | None) -> Any:
    """A networkx MultiDiGraph of the edges of a mask, keyed by q, k and v, with `receiver` and `score`.

    Nodes are senders, and `logits`, with their `layer`; with grouped queries a key and value head is a node of its own,
    joined to the heads of its group.
    """
    networkx = need("networkx", "a graph")
    found = networkx.MultiDiGraph()
    senders, receivers = graph.sender_names, graph.receiver_names
    for s, r in mask.nonzero().tolist():
        node, part = _node(receivers[r])
        for name in (senders[s], node):
            found.add_node(name, layer=_layer(graph, name))
        known = {} if scores is None else {"score": float(scores[s, r])}
        found.add_edge(senders[s], node, key=part, receiver=receivers[r], **known)
        for behind in graph.senders_behind(r) if ".kv" in node else ():
            found.add_node(senders[behind], layer=_layer(graph, senders[behind]))
            found.add_edge(node, senders[behind], key="group")
    return found


def dot(graph: Graph, mask: Annotated[Tensor, "bool S R"], scores: Annotated[Tensor, "S R"] | None) -> str:
    """The edges of a mask in Graphviz's language, layers up the page; widths and colours where there are scores."""
    senders, receivers = graph.sender_names, graph.receiver_names
    edges = [(senders[s], receivers[r], None if scores is None else float(scores[s, r])) for s, r in _ordered(mask)]
    nodes = {name: None for sender, receiver, _ in edges for name in (sender, _node(receiver)[0])}
    most = max((abs(score) for _, _, score in edges if score is not None), default=0.0) or 1.0
    lines = ["digraph circuit {", "  rankdir=BT;", "  node [shape=box, style=rounded, fontname=Helvetica];"]
    layers: dict[tuple[int, bool], list[str]] = {}
    for name in nodes:
        layers.setdefault((_layer(graph, name), name.startswith("m")), []).append(name)
    for _, names in sorted(layers.items()):
        lines.append("  {rank=same; " + " ".join(f"{json.dumps(name)};" for name in names) + "}")
    for sender, receiver, score in edges:
        node, part = _node(receiver)
        known = [f"label={json.dumps(part)}"] if part else []
        if score is not None:
            colour = "#1f66b0" if score < 0 else "#b54418"
            known += [f'color="{colour}"', f"penwidth={max(0.5, 5 * abs(score) / most):.3g}", f'tooltip="{score:.6g}"']
        lines.append(f"  {json.dumps(sender)} -> {json.dumps(node)} [{', '.join(known)}];")
    return "\n".join([*lines, "}", ""])


def _ordered(mask: Tensor) -> list[tuple[int, int]]:
    """(sender, receiver) of each edge, by receiver, then by sender."""
    return [(s, r) for r, s in mask.T.nonzero().tolist()]


def _node(receiver: str) -> tuple[str, str]:
    """The node and the part, q, k, v or "", of a receiver's name."""
    name, _, part = receiver.partition("<")
    return name, part.rstrip(">")


def _layer(graph: Graph, node: str) -> int:
    """−1 for the embedding, the number of layers for the logits."""
    found = re.match(r"[am](\d+)", node)
    return int(found[1]) if found else -1 if node == "embed" else graph.n_layers
