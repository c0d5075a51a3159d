"""Node and neuron scores: what a method returns for senders, MLP hidden units and output dimensions, and its file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from torch import Tensor

from eapcore.circuit import FORMAT_VERSION, check_ranked, finite, read_scores, replacing, sign_text
from eapcore.graph import Graph

KINDS = ("scores", "units", "dimensions")
WHEN = "all that the node (its output dimension, the hidden unit) sends is ablated"
SIGN = sign_text("score", "predicted", WHEN)
_PARTS = ("per_pair", "per_position")


@dataclass(frozen=True, slots=True)
class NodeScores:
    """First-order scores of what a model's senders send.

    scores: [S], one for each sender. units: [L, M], one for each MLP hidden unit, and dimensions: [S, D], one for each
    output dimension of each sender, which add up to scores; None but at level "neuron". A score is the predicted change
    of the metric (higher = better) when what is sent is ablated: negative = needed. meta: model, task, metric, method.
    per_pair, per_position: the same by name, "scores" and so on, with an axis of pairs (of which the scores are the
    mean) or of positions (the sum) in front; empty where they were not asked for.
    """

    scores: Annotated[Tensor, "S"]
    graph: Graph
    meta: Mapping[str, Any] = field(default_factory=dict)
    units: Annotated[Tensor, "L M"] | None = None
    dimensions: Annotated[Tensor, "S D"] | None = None
    per_pair: Mapping[str, Annotated[Tensor, "N S | N L M | N S D"]] = field(default_factory=dict)
    per_position: Mapping[str, Annotated[Tensor, "T S | T L M | T S D"]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n = self.graph.n_senders
        if self.scores.shape != (n,):
            raise ValueError(f"scores must be [S] = [{n}], got {list(self.scores.shape)}")
        if self.units is not None and (self.units.ndim != 2 or len(self.units) != self.graph.n_layers):
            raise ValueError(f"units must be [L, M] = [{self.graph.n_layers}, .], got {list(self.units.shape)}")
        if self.dimensions is not None and (self.dimensions.ndim != 2 or len(self.dimensions) != n):
            raise ValueError(f"dimensions must be [S, D] = [{n}, .], got {list(self.dimensions.shape)}")
        for part in _PARTS:
            for kind, tensor in getattr(self, part).items():
                whole = getattr(self, kind) if kind in KINDS else None
                if whole is None or tensor.shape[1:] != whole.shape:
                    expected = "one of the scores that are there" if whole is None else f"[., *{list(whole.shape)}]"
                    raise ValueError(f"{part}[{kind!r}] must be {expected}, got {list(tensor.shape)}")

    def __getitem__(self, node: str) -> float:
        """The score of a sender by name, e.g. scores["a3.h7"]."""
        return float(self.scores[self.graph.sender(node)])

    def top(self, n: int, *, signed: bool = False) -> list[tuple[str, float]]:
        """Names and scores of the n senders with the largest |score|, with signed=True the most negative ones."""
        check_ranked("nodes", self.scores)
        usefulness = -self.scores if signed else self.scores.abs()
        order = usefulness.sort(descending=True, stable=True).indices[:n].tolist()
        names = self.graph.sender_names
        return [(names[s], float(self.scores[s])) for s in order]

    def save(self, path: str | Path) -> None:
        """Write a safetensors file: what is there of `scores`, `units`, `dimensions` and their parts ("per_pair.scores"
        and so on), and one JSON header (README, "Files")."""
        from safetensors.torch import save_file

        header = {"format_version": FORMAT_VERSION, "graph": asdict(self.graph), "sign": SIGN, **self.meta}
        tensors = {kind: tensor.clone() for kind in KINDS if (tensor := getattr(self, kind)) is not None}
        tensors |= {f"{part}.{kind}": tensor for part in _PARTS for kind, tensor in getattr(self, part).items()}
        with replacing(path) as temporary:
            contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
            save_file(contiguous, temporary, metadata={"eapcore": json.dumps(finite(header))})

    @staticmethod
    def load(path: str | Path, *, content_hash: str | None = None) -> NodeScores:
        """Read a file that `save` wrote; arguments and errors as `EdgeScores.load`."""

        def build(tensors: Mapping[str, Tensor], graph: Graph, header: Mapping[str, Any]) -> NodeScores:
            parts = {
                part: {kind: tensors[f"{part}.{kind}"] for kind in KINDS if f"{part}.{kind}" in tensors}
                for part in _PARTS
            }
            return NodeScores(
                tensors["scores"], graph, header, tensors.get("units"), tensors.get("dimensions"), **parts
            )

        return read_scores(path, build, content_hash)
