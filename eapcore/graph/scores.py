"""What a method returns: scores of edges, nodes and neurons, and how edges are selected from them."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from torch import Tensor

from eapcore.graph.circuit import Circuit
from eapcore.graph.export import frame, network
from eapcore.graph.files import (
    DAMAGED,
    FORMAT_VERSION,
    _check_version,
    _graph,
    _NewerFormat,
    _reason,
    load_tensors,
    save_tensors,
)
from eapcore.graph.given import ByValue, take_tensors
from eapcore.graph.graph import Graph
from eapcore.graph.show import card, made_of, report_room
from eapcore.kernels.checks import short_repr

Scores = TypeVar("Scores")
KEY = "eapcore"  # of the header in a file's metadata
_PARTS = ("per_pair", "per_position")
# Jaccard index of the circuits of two bootstrap draws from which on the prompts are enough: this project's choice. Work
# on how stable circuits are (Méloux, Portet, Peyrard 2025, arXiv 2510.00845) asks to report it; no bar was found there.
# Of bootstrapped clusters 0.75 counts as stable and 0.85 as highly stable (Hennig 2007, R's fpc::clusterboot).
ENOUGH = 0.8
FEWEST = 4  # pairs of which that can be said: draws of fewer are the same one too often
_BESIDE = ("exact", "spread", "standard_error", "sign_consistency", "jaccard")


def sign_text(name: str, kind: str, when: str) -> str:
    """How a result's convention is written into its file."""
    return f"{name} = {kind} change of the metric (higher = better) when {when}; negative = needed"


NO_SIGN = "it has no sign"  # what the text of scores that are sizes says
UNKNOWN_SIGN = "score = change of a metric (higher = better) or of a loss (lower = better): which, was not said"
EDGE_WHEN = "the edge is ablated"
EDGE_SIGN = sign_text("score", "predicted", EDGE_WHEN)  # where the scores do not say otherwise


@dataclass(frozen=True, slots=True, eq=False)
class EdgeScores(ByValue):
    """One score for every edge, [S, R] on the CPU, exactly 0 where there is none; `meta` says how they were made.

    score[s, r] is the predicted change of the metric, higher = better, when the edge is corrupted: a negative score is
    an edge that the behaviour needs; where it is another number, `meta["sign"]` says which. float64 for a float64
    model, float32 for all others. per_pair [N, S, R] is there where it was asked for, with scores its mean;
    per_position [T, S, R] likewise, with scores its sum. exact: the edges that were patched rather than estimated;
    spread: how far apart the estimates of several points lie. standard_error: of the scores, which are means over
    pairs. sign_consistency: the share of the pairs whose score has the sign of the mean. jaccard: [n − 1] the mean
    Jaccard index |A ∩ B| / |A ∪ B| of the n edges with the largest |score| of two bootstrap draws of the pairs. None
    where they are not known.
    """

    scores: Annotated[Tensor, "S R"]
    graph: Graph
    meta: Mapping[str, Any] = field(default_factory=dict)
    per_pair: Annotated[Tensor, "N S R"] | None = None
    per_position: Annotated[Tensor, "T S R"] | None = None
    exact: Annotated[Tensor, "bool S R"] | None = None
    spread: Annotated[Tensor, "S R"] | None = None
    standard_error: Annotated[Tensor, "S R"] | None = None
    sign_consistency: Annotated[Tensor, "S R"] | None = None
    jaccard: Annotated[Tensor, "E"] | None = None

    def __post_init__(self) -> None:
        take_tensors(
            self,
            ("scores", "per_pair", "per_position", "spread", "standard_error", "sign_consistency", "jaccard"),
            ("exact",),
        )
        expected = (self.graph.n_senders, self.graph.n_receivers)
        if self.scores.shape != expected:
            raise ValueError(f"scores must be [S, R] = {list(expected)}, got {list(self.scores.shape)}")
        shapes = dict.fromkeys(("spread", "standard_error", "sign_consistency"), expected)
        for name, shape in {**shapes, "jaccard": (self.graph.n_edges,)}.items():
            part, axes = getattr(self, name), "E" if len(shape) == 1 else "S, R"
            if part is not None and part.shape != shape:
                raise ValueError(f"{name} must be [{axes}] = {list(shape)}, got {list(part.shape)}")
        if self.exact is not None and self.exact.shape != expected:
            found = f"{self.exact.dtype} {list(self.exact.shape)}"
            raise ValueError(f"exact must be bool [S, R] = {list(expected)}, got {found}")
        for name in _PARTS:
            part = getattr(self, name)
            if part is not None and (part.ndim != 3 or part.shape[1:] != expected):
                raise ValueError(
                    f"{name} must be [., S, R] = [., {expected[0]}, {expected[1]}], got {list(part.shape)}"
                )

    @property
    def mask(self) -> Annotated[Tensor, "bool S R"]:
        """bool [S, R], True where there is an edge."""
        return self.graph.edge_mask()

    def __repr__(self) -> str:
        parts = "".join(f", {name} {list(part.shape)}" for name in _PARTS if (part := getattr(self, name)) is not None)
        dtype, made = str(self.scores.dtype).removeprefix("torch."), made_of(self.meta)
        sizes = f"[S, R] = {list(self.scores.shape)} {dtype}{parts}"
        return f"EdgeScores({made}{': ' * bool(made)}{self.graph.n_edges} edges, {sizes})"

    def _repr_html_(self) -> str:
        facts = [(key, made_of({key: self.meta.get(key)})) for key in ("model", "task", "method")]
        facts = [(key, name) for key, name in facts if name] + [("sign", str(self.meta.get("sign", EDGE_SIGN)))]
        rankable = not bool(self.scores[self.mask].isnan().any())
        rows = [(edge, f"{score:.6g}") for edge, score in self.top(10)] if rankable else []
        return card(f"Scores of {self.graph.n_edges:,} edges", facts, ("edge", "score"), rows)

    def __getitem__(self, edge: str) -> float:
        """The score of an edge by name, e.g. scores["a3.h7->a5.h2<q>"]."""
        return float(self.scores[self.graph.edge(edge)])

    def as_json(self) -> dict[str, Any]:
        """What a result's file holds of them: meta, and scores of the edges that `meta["method"]["edges"]` names."""
        edges = (self.meta.get("method") or {}).get("edges")
        return {"meta": self.meta} | ({"scores": {e: self[e] for e in edges}} if isinstance(edges, list) else {})

    def ranking(self, *, signed: bool = False) -> tuple[Annotated[Tensor, "int64 E"], Annotated[Tensor, "E"]]:
        """All edges from the most to the least important: (flat indices s·R + r, usefulness).

        Usefulness is |score|, or with signed=True −score: what the behaviour needs comes first, what hinders it last.
        Of scores without a sign it is |score| in both cases. Ties keep the order of the flat index.

        Raises:
            ValueError: NaN among the scores, or a signed ranking of scores whose sign is not known.
        """
        edges = self.mask.flatten().nonzero().squeeze(1)
        values = self.scores.flatten()[edges]
        check_ranked("edges", values)
        usefulness, order = self._usefulness(values, signed).sort(descending=True, stable=True)
        return edges[order], usefulness

    def _usefulness(self, values: Tensor, signed: bool) -> Tensor:
        if not signed:
            return values.abs()
        self.check_sign("a signed ranking")
        return values.abs() if self.unsigned else -values

    @property
    def unsigned(self) -> bool:
        """Whether these scores are sizes."""
        return NO_SIGN in self.meta.get("sign", "")

    def check_sign(self, what: str) -> None:
        """ValueError where `what` needs the sign of scores that do not say whether they are of a metric or a loss."""
        if self.meta.get("sign") == UNKNOWN_SIGN:
            raise ValueError(
                f"{what} needs to know whether these scores are of a metric, of which more is better, or of a loss: "
                "give sign='metric' or sign='loss' where they are made or read"
            )

    def top(self, n: int, *, signed: bool = False) -> list[tuple[str, float]]:
        """Names and scores of the n most important edges."""
        check_count(n)
        flat = self.ranking(signed=signed)[0][:n].tolist()
        names = (self.graph.sender_names, self.graph.receiver_names)
        pairs = [divmod(i, self.graph.n_receivers) for i in flat]
        return [(f"{names[0][s]}->{names[1][r]}", float(self.scores[s, r])) for s, r in pairs]

    def top_n(self, n: int, *, signed: bool = False) -> Circuit:
        """The circuit of the n most important edges."""
        self._check_n(n)
        return self._circuit(self.ranking(signed=signed)[0][:n], {"selection": "top_n", "n": n, "signed": signed})

    def threshold(self, threshold: float, *, signed: bool = False) -> Circuit:
        """The circuit of the edges whose |score| (with signed=True: −score) is at least `threshold`."""
        if not isinstance(threshold, Real) or threshold != threshold:
            got = "NaN" if isinstance(threshold, Real) else short_repr(threshold)
            raise ValueError(f"threshold must be a number, got {got}")
        flat, usefulness = self.ranking(signed=signed)
        meta = {"selection": "threshold", "threshold": threshold, "signed": signed}
        return self._circuit(flat[usefulness >= threshold], meta)

    def greedy(self, n: int, *, signed: bool = False) -> Circuit:
        """n edges grown from the logits back: always the most important edge into a component that is already in.

        Every edge of the result reaches the logits; fewer than n come back only where no more are reachable.
        """
        self._check_n(n)
        graph = self.graph
        check_ranked("edges", self.scores[self.mask])
        usefulness = self._usefulness(self.scores, signed).tolist()
        into: dict[int, list[int]] = {s: [] for s in range(graph.n_senders)}
        for r in range(graph.n_receivers):
            for s in graph.senders_behind(r):
                into[s].append(r)
        heap: list[tuple[float, int, int]] = []
        opened: set[int] = set()

        def open_receivers(receivers: list[int]) -> None:
            for r in receivers:
                if r not in opened:
                    opened.add(r)
                    for s in range(graph.senders_before(r)):
                        heapq.heappush(heap, (-usefulness[s][r], s, r))

        open_receivers([graph.logits])
        chosen: list[int] = []
        while heap and len(chosen) < n:
            _, s, r = heapq.heappop(heap)
            chosen.append(s * graph.n_receivers + r)
            open_receivers(into[s])
        meta = {"selection": "greedy", "n": n, "signed": signed}
        return self._circuit(torch.tensor(chosen, dtype=torch.int64, device="cpu"), meta)

    def stable(self, share: float = 0.9, n: int | None = None) -> Circuit:
        """The circuit of the stable edges: those that the behaviour needs (score < 0) and whose score has that sign on
        at least such a share of the pairs; n: of them the ones with the largest |score|, None for all.

        Raises:
            ValueError: a share outside 0…1, n below 0; scores without `sign_consistency`, or without a known sign.
        """
        if not isinstance(share, Real) or not 0 <= share <= 1:
            raise ValueError(f"share must be a number from 0 to 1, got {short_repr(share)}")
        if self.sign_consistency is None:
            raise ValueError("stable edges need the sign consistency of scores: give attribute uncertainty=True")
        self.check_sign("a circuit of stable edges")
        if NO_SIGN in self.meta.get("sign", ""):
            raise ValueError("stable edges are those of one sign, but these scores are sizes without one")
        flat = self.ranking()[0]
        fit = (self.scores < 0) & (self.sign_consistency.double() >= share - 1e-6)  # a share may have been rounded
        chosen = flat[fit.flatten()[flat]]
        if n is not None:
            check_count(n)
            chosen = chosen[:n]
        return self._circuit(chosen, {"selection": "stable", "share": float(share), "n": len(chosen)})

    def save(self, path: str | Path) -> None:
        """Write a safetensors file: `scores` [S, R], `mask` [S, R], what is there of the other tensors, and one JSON
        header (README, "Files")."""
        header = {"format_version": FORMAT_VERSION, "graph": self.graph.as_dict(), "sign": EDGE_SIGN, **self.meta}
        tensors = {"scores": self.scores.clone(), "mask": self.mask}  # a part's memory may not be in a file twice
        tensors |= {name: part for name in (*_PARTS, *_BESIDE) if (part := getattr(self, name)) is not None}
        save_tensors(path, KEY, tensors, header)

    @staticmethod
    def load(path: str | Path, *, content_hash: str | None = None) -> EdgeScores:
        """Read a file that `save` wrote.

        Args:
            path: the file.
            content_hash: `model.content_hash` of the model that the scores shall belong to; None does not check.

        Raises:
            ValueError: another file, a newer format, or scores of another model.
            OSError: the file cannot be opened.
        """

        def build(tensors: Mapping[str, Tensor], graph: Graph, header: Mapping[str, Any]) -> EdgeScores:
            sizes = (graph.n_senders, graph.n_receivers)  # first: the mask of another graph may be huge
            if tensors["mask"].shape != sizes or not torch.equal(tensors["mask"], graph.edge_mask()):
                raise ValueError("its mask is not the edge mask of its graph")
            parts = {name: tensors[name] for name in (*_PARTS, *_BESIDE) if name in tensors}
            return EdgeScores(tensors["scores"], graph, header, **parts)

        return read_scores(path, build, content_hash)

    def to_pandas(self) -> Any:
        """A pandas DataFrame with a row for each edge, the most important first: edge, sender, receiver, score, and
        where they are known standard_error, sign_consistency and exact.

        Raises:
            RuntimeError: the package pandas is not installed.
            ValueError: scores that are NaN.
        """
        beside = {name: getattr(self, name) for name in ("standard_error", "sign_consistency", "exact")}
        found = {name: x for name, x in beside.items() if x is not None}
        return frame(self.graph, self.ranking()[0], {"score": self.scores, **found})

    def to_networkx(self, n: int | None = None) -> Any:
        """A networkx MultiDiGraph of the n edges with the largest |score|, None all: nodes by name with their `layer`,
        edges keyed by q, k and v with their `receiver` and `score`.

        Raises:
            RuntimeError: the package networkx is not installed.
            ValueError: n outside the graph.
        """
        return network(self.graph, self.mask if n is None else self.top_n(n).mask, self.scores)

    def plot(self, n: int = 60, *, circuit: Circuit | None = None, axes: Any = None) -> Any:
        """Draw the n edges with the largest |score|, or those of a circuit, on matplotlib's axes, which are returned.

        Layers up, heads across; an edge's width is its |score|, blue negative, red positive.

        Raises:
            RuntimeError: the package matplotlib is not installed.
            ValueError: a circuit of another graph, or scores that are NaN.
        """
        return report_room("figures").plot(self, n, circuit=circuit, axes=axes)

    def report(self, path: str | Path, *, other: EdgeScores | None = None, circuit: Circuit | None = None) -> None:
        """Write one self-contained HTML page: the circuit, the edges, heat maps, how they were made.

        Args:
            path: the file to write.
            other: scores of the same graph, side by side with these.
            circuit: to be drawn and marked, of these scores.

        Raises:
            RuntimeError: the package jinja2 is not installed.
            ValueError: two graphs, or scores that are NaN.
        """
        runs = [report_room("run_folder").Run(self, made_of(self.meta) or "scores", circuit)]
        runs += [] if other is None else [report_room("run_folder").Run(other, made_of(other.meta) or "other scores")]
        report_room("page").write_page(runs, path)

    def _check_n(self, n: int) -> None:
        check_count(max(n, 0) if isinstance(n, int) else n)
        if not 0 <= n <= self.graph.n_edges:
            raise ValueError(f"n must be between 0 and the {self.graph.n_edges} edges of this graph, got {n}")

    def _circuit(self, flat: Tensor, meta: dict[str, Any]) -> Circuit:
        mask = torch.zeros(self.scores.shape, dtype=torch.bool, device="cpu")
        mask.view(-1)[flat] = True
        return Circuit(mask, self.graph, {**self.meta, **meta})


def read_scores(
    path: str | Path,
    build: Callable[[Mapping[str, Tensor], Graph, Mapping[str, Any]], Scores],
    content_hash: str | None = None,
) -> Scores:
    """Read a score file: its tensors, its graph and its header as `build` makes an object of them; see `load`."""
    from safetensors import SafetensorError

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"a score file was expected at {path}, but there is none")
    try:
        tensors, header, intact = load_tensors(path, KEY)
        _check_version(path, header.pop("format_version"))
        graph = _graph(header.pop("graph"))
        if not isinstance(header["sign"], str):
            raise ValueError(f"its sign is {header['sign']!r}")
        scores = build(tensors, graph, header)
        if not intact:
            raise ValueError(DAMAGED)
        model = {} if header.get("model") is None else dict(header["model"])
    except _NewerFormat:
        raise
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} must be a score file that eapcore wrote, but it cannot be read: {_reason(error)}"
        ) from error
    if content_hash is not None and model.get("content_hash") != content_hash:
        raise ValueError(
            f"{path} holds scores of {model.get('name')!r} (content hash {model.get('content_hash')}), but the "
            f"model here has the content hash {content_hash}: score this model, or load that one, in its dtype"
        )
    return scores


def check_count(n: int) -> None:
    """ValueError for what is no number of edges or nodes."""
    if not isinstance(n, Integral) or isinstance(n, bool) or n < 0:
        raise ValueError(f"n must be an integer of at least 0, got {short_repr(n)}")


def check_ranked(what: str, scores: Annotated[Tensor, "..."]) -> None:
    """ValueError where edges or nodes shall be ranked by scores that are NaN."""
    if n_nan := int(scores.isnan().sum()):
        raise ValueError(f"{what} are ranked by their scores, but {n_nan} of {len(scores)} scores are NaN")


KINDS = ("scores", "units", "dimensions")
NODE_WHEN = "all that the node (its output dimension, the hidden unit) sends is ablated"
NODE_SIGN = sign_text("score", "predicted", NODE_WHEN)
_PARTS = ("per_pair", "per_position")


@dataclass(frozen=True, slots=True, eq=False)
class NodeScores(ByValue):
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
        take_tensors(self, KINDS)
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

    def __repr__(self) -> str:
        dtype, made = str(self.scores.dtype).removeprefix("torch."), made_of(self.meta)
        more = "".join(f", {kind} {list(x.shape)}" for kind in KINDS[1:] if (x := getattr(self, kind)) is not None)
        sizes = f"[S] = {list(self.scores.shape)} {dtype}{more}"
        return f"NodeScores({made}{': ' * bool(made)}{self.graph.n_senders} nodes, {sizes})"

    def __getitem__(self, node: str) -> float:
        """The score of a sender by name, e.g. scores["a3.h7"]."""
        return float(self.scores[self.graph.sender(node)])

    def top(self, n: int, *, signed: bool = False) -> list[tuple[str, float]]:
        """Names and scores of the n senders with the largest |score|, with signed=True the most negative ones."""
        check_count(n)
        check_ranked("nodes", self.scores)
        usefulness = -self.scores if signed else self.scores.abs()
        order = usefulness.sort(descending=True, stable=True).indices[:n].tolist()
        names = self.graph.sender_names
        return [(names[s], float(self.scores[s])) for s in order]

    def save(self, path: str | Path) -> None:
        """Write a safetensors file: what is there of `scores`, `units`, `dimensions` and their parts ("per_pair.scores"
        and so on), and one JSON header (README, "Files")."""
        header = {"format_version": FORMAT_VERSION, "graph": self.graph.as_dict(), "sign": NODE_SIGN, **self.meta}
        tensors = {kind: tensor.clone() for kind in KINDS if (tensor := getattr(self, kind)) is not None}
        tensors |= {f"{part}.{kind}": tensor for part in _PARTS for kind, tensor in getattr(self, part).items()}
        save_tensors(path, KEY, tensors, header)

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
