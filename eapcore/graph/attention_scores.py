"""Scores of attention's edges between positions: from a source position to a target, through one head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from eapcore.graph.files import FORMAT_VERSION, save_tensors
from eapcore.graph.given import ByValue, take_tensors
from eapcore.graph.graph import Graph
from eapcore.graph.scores import KEY, check_count, check_ranked, read_scores
from eapcore.graph.show import made_of

PARTS = ("q", "k", "v")


@dataclass(frozen=True, slots=True, eq=False)
class AttentionScores(ByValue):
    """What a head's query, key or value does along one edge of its attention, [L, H, T, T]: [layer, head, source,
    target], a mean over pairs; 0 where the source lies behind the target. meta: model, task, metric, method."""

    q: Annotated[Tensor, "L H T T"]
    k: Annotated[Tensor, "L H T T"]
    v: Annotated[Tensor, "L H T T"]
    graph: Graph
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        take_tensors(self, PARTS)
        expected = (self.graph.n_layers, self.graph.n_heads)
        for part in PARTS:
            x = getattr(self, part)
            if x.ndim != 4 or x.shape[:2] != expected or x.shape[2] != x.shape[3] or x.shape != self.q.shape:
                sizes = f"[{expected[0]}, {expected[1]}, T, T]"
                raise ValueError(f"{part} must be [L, H, T, T] = {sizes}, got {list(x.shape)}")

    def __repr__(self) -> str:
        dtype, made = str(self.q.dtype).removeprefix("torch."), made_of(self.meta)
        return f"AttentionScores({made}{': ' * bool(made)}q, k, v [L, H, T, T] = {list(self.q.shape)} {dtype})"

    def __getitem__(self, edge: str) -> float:
        """The score of an edge by name, e.g. scores["a3.h5<v> 4->9"]."""
        receiver, _, places = edge.partition(" ")
        source, _, target = places.partition("->")
        name, _, part = receiver.partition("<")
        sender = self.graph.sender(name)
        layer, head = divmod(sender - 1, self.graph.senders_per_layer)
        if part[:-1] not in PARTS or part[1:] != ">" or not (source.isdigit() and target.isdigit()):
            raise ValueError(f"an edge of attention is written like 'a3.h5<v> 4->9', got {edge!r}")
        return float(getattr(self, part[:-1])[layer, head, int(source), int(target)])

    def top(self, n: int) -> list[tuple[str, float]]:
        """Names and scores of the n edges with the largest |score|."""
        check_count(n)
        every = torch.stack([self.q, self.k, self.v])
        check_ranked("attention's edges", every)
        order = every.abs().flatten().sort(descending=True, stable=True).indices[:n].tolist()
        found = []
        for flat in order:
            part, layer, head, source, target = (
                int(i) for i in torch.unravel_index(torch.tensor(flat, device="cpu"), every.shape)
            )
            name = f"a{layer}.h{head}<{PARTS[part]}> {source}->{target}"
            found.append((name, float(every[part, layer, head, source, target])))
        return found

    def save(self, path: str | Path) -> None:
        """Write a safetensors file: `q`, `k` and `v` [L, H, T, T], and one JSON header (README, "Files")."""
        header = {"format_version": FORMAT_VERSION, "graph": self.graph.as_dict(), **self.meta}
        save_tensors(path, KEY, {part: getattr(self, part).clone() for part in PARTS}, header)

    @staticmethod
    def load(path: str | Path, *, content_hash: str | None = None) -> AttentionScores:
        """Read a file that `save` wrote; arguments and errors as `EdgeScores.load`."""

        def build(tensors: Mapping[str, Tensor], graph: Graph, header: Mapping[str, Any]) -> AttentionScores:
            return AttentionScores(tensors["q"], tensors["k"], tensors["v"], graph, header)

        return read_scores(path, build, content_hash)
