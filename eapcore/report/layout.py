"""Where a circuit's nodes stand on a drawing: layers up the page, heads across."""

from __future__ import annotations

from dataclasses import dataclass

from eapcore.graph.graph import Graph

_PORT = 0.26  # of a column, between the q, k and v inputs of one head
_MLP = 0.45  # of a row, how far an MLP that reads its layer's heads stands above them


@dataclass(frozen=True, slots=True)
class Layout:
    """Places in columns from the left, the middle of the first head at 0, and rows from the bottom, embed at 0.

    senders: (column, row) of each sender. receivers: of each receiver's input, that of a head's q, k, v left of, under
    and right of its middle, in the sender's row. columns: heads, and the MLP behind them. rows: layers, embed, logits.
    """

    senders: list[tuple[float, float]]
    receivers: list[tuple[float, float]]
    columns: float
    rows: float


def layout(graph: Graph) -> Layout:
    """The places of a graph's nodes."""
    columns = graph.n_heads + (1 if graph.has_mlp else 0)
    middle = (columns - 1) / 2
    senders, receivers = [(middle, 0.0)], []
    for layer in range(graph.n_layers):
        row = layer + 1.0
        senders += [(float(head), row) for head in range(graph.n_heads)]
        if graph.has_mlp:
            senders.append((float(graph.n_heads), row + (0.0 if graph.parallel else _MLP)))
        n_kv = graph.n_heads if graph.n_kv is None else graph.n_kv
        parts = [(0, graph.n_heads), (1, n_kv), (2, n_kv)]
        for r, shift in zip(
            range(graph.qkv(layer).start, graph.qkv(layer).stop),
            [(part - 1) * _PORT for part, count in parts for _ in range(count)],
            strict=True,
        ):
            behind = graph.senders_behind(r)
            receivers.append(((behind.start + behind.stop - 1) / 2 - graph.heads(layer).start + shift, row))
        if graph.has_mlp:
            receivers.append(senders[-1])
    top = (middle, graph.n_layers + 1.0)
    return Layout(senders, [*receivers, top], float(columns), graph.n_layers + 2.0)
