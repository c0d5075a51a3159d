"""Edge scores and circuits: what a method returns, how edges are selected from it, and the files that keep both."""

from __future__ import annotations

import heapq
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from torch import Tensor

from eapcore.graph import Graph

Scores = TypeVar("Scores")
FORMAT_VERSION = 1
_PARTS = ("per_pair", "per_position")


def sign_text(name: str, kind: str, when: str) -> str:
    """How a result's convention is written into its file."""
    return f"{name} = {kind} change of the metric (higher = better) when {when}; negative = needed"


WHEN = "the edge is ablated"
SIGN = sign_text("score", "predicted", WHEN)  # where the scores do not say otherwise


@dataclass(frozen=True, slots=True)
class Circuit:
    """A set of edges: bool mask [S, R] over a graph, with what is known of where it comes from."""

    mask: Annotated[Tensor, "bool S R"]
    graph: Graph
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def n_edges(self) -> int:
        return int(self.mask.sum())

    @property
    def edges(self) -> list[str]:
        """Names of the edges, by receiver, then by sender."""
        senders, receivers = self.graph.sender_names, self.graph.receiver_names
        return [f"{senders[s]}->{receivers[r]}" for r, s in self.mask.T.nonzero().tolist()]

    @staticmethod
    def from_edges(graph: Graph, edges: list[str], meta: Mapping[str, Any] | None = None) -> Circuit:
        """The circuit of these edge names; ValueError for a name that is no edge of the graph."""
        mask = torch.zeros(graph.n_senders, graph.n_receivers, dtype=torch.bool, device="cpu")
        for name in edges:
            mask[graph.edge(name)] = True
        return Circuit(mask, graph, dict(meta or {}))

    def prune(self) -> Circuit:
        """Only the edges that lie on a path from `embed` to `logits`; `meta` says how many there were and are.

        A head is passed through from any of its q, k and v inputs. One sweep in each direction is the fixpoint, since
        senders and receivers are in topological order.
        """
        graph = self.graph
        from_embed = torch.zeros(graph.n_senders, dtype=torch.bool, device="cpu")
        from_embed[0] = True
        to_logits = torch.zeros(graph.n_senders, dtype=torch.bool, device="cpu")
        components = [graph.component(r) for r in range(graph.n_receivers)]
        for r, component in enumerate(components):
            if component is not None and bool((self.mask[:, r] & from_embed).any()):
                from_embed[component] = True
        live = torch.zeros(graph.n_receivers, dtype=torch.bool, device="cpu")
        for r in reversed(range(graph.n_receivers)):
            component = components[r]
            live[r] = component is None or bool(to_logits[component])
            if live[r]:
                to_logits |= self.mask[:, r]
        kept = self.mask & from_embed[:, None] & live
        counts = {"edges_before_pruning": self.n_edges, "edges_after_pruning": int(kept.sum())}
        return replace(self, mask=kept, meta={**self.meta, **counts})

    def save(self, path: str | Path) -> None:
        """Write the circuit as JSON: format, graph, meta, and the names of the edges; ValueError if some are none."""
        if n_others := int((self.mask & ~self.graph.edge_mask()).sum()):
            raise ValueError(f"a circuit has edges of {self.graph}, but {n_others} places of its mask are none")
        content = {
            "format": "eapcore-circuit",
            "format_version": FORMAT_VERSION,
            "graph": asdict(self.graph),
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


@dataclass(frozen=True, slots=True)
class EdgeScores:
    """One score for every edge, [S, R] on the CPU, exactly 0 where there is none; `meta` says how they were made.

    score[s, r] is the predicted change of the metric, higher = better, when the edge is corrupted: a negative score is
    an edge that the behaviour needs; where it is another number, `meta["sign"]` says which. float64 for a float64
    model, float32 for all others. per_pair [N, S, R] is there where it was asked for, with scores its mean;
    per_position [T, S, R] likewise, with scores its sum.
    """

    scores: Annotated[Tensor, "S R"]
    graph: Graph
    meta: Mapping[str, Any] = field(default_factory=dict)
    per_pair: Annotated[Tensor, "N S R"] | None = None
    per_position: Annotated[Tensor, "T S R"] | None = None

    def __post_init__(self) -> None:
        expected = (self.graph.n_senders, self.graph.n_receivers)
        if self.scores.shape != expected:
            raise ValueError(f"scores must be [S, R] = {list(expected)}, got {list(self.scores.shape)}")
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

    def __getitem__(self, edge: str) -> float:
        """The score of an edge by name, e.g. scores["a3.h7->a5.h2<q>"]."""
        return float(self.scores[self.graph.edge(edge)])

    def ranking(self, *, signed: bool = False) -> tuple[Annotated[Tensor, "int64 E"], Annotated[Tensor, "E"]]:
        """All edges from the most to the least important: (flat indices s·R + r, usefulness).

        Usefulness is |score|, or with signed=True −score: what the behaviour needs comes first, what hinders it last.
        Ties keep the order of the flat index.
        """
        edges = self.mask.flatten().nonzero().squeeze(1)
        values = self.scores.flatten()[edges]
        check_ranked("edges", values)
        usefulness, order = (-values if signed else values.abs()).sort(descending=True, stable=True)
        return edges[order], usefulness

    def top(self, n: int, *, signed: bool = False) -> list[tuple[str, float]]:
        """Names and scores of the n most important edges."""
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
        if not threshold == threshold:
            raise ValueError("threshold must be a number, got NaN")
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
        usefulness = (-self.scores if signed else self.scores.abs()).tolist()
        receivers: dict[int | None, list[int]] = {}
        for r in range(graph.n_receivers):
            receivers.setdefault(graph.component(r), []).append(r)
        heap: list[tuple[float, int, int]] = []
        opened: set[int | None] = set()

        def open_component(component: int | None) -> None:
            if component in opened:
                return
            opened.add(component)
            for r in receivers.get(component, []):
                for s in range(graph.senders_before(r)):
                    heapq.heappush(heap, (-usefulness[s][r], s, r))

        open_component(None)
        chosen: list[int] = []
        while heap and len(chosen) < n:
            _, s, r = heapq.heappop(heap)
            chosen.append(s * graph.n_receivers + r)
            open_component(s)
        meta = {"selection": "greedy", "n": n, "signed": signed}
        return self._circuit(torch.tensor(chosen, dtype=torch.int64, device="cpu"), meta)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file: `scores` [S, R], `mask` [S, R], what is there of `per_pair` and `per_position`, and
        one JSON header (README, "Files")."""
        from safetensors.torch import save_file

        header = {"format_version": FORMAT_VERSION, "graph": asdict(self.graph), "sign": SIGN, **self.meta}
        tensors = {"scores": self.scores.clone(), "mask": self.mask}  # a part's memory may not be in a file twice
        tensors |= {name: part for name in _PARTS if (part := getattr(self, name)) is not None}
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata={"eapcore": json.dumps(finite(header))})

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
            if not torch.equal(tensors["mask"], graph.edge_mask()):
                raise ValueError("its mask is not the edge mask of its graph")
            parts = {name: tensors[name] for name in _PARTS if name in tensors}
            return EdgeScores(tensors["scores"], graph, header, **parts)

        return read_scores(path, build, content_hash)

    def _check_n(self, n: int) -> None:
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
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"a score file was expected at {path}, but there is none")
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {})["eapcore"])
            _check_version(path, header.pop("format_version"))
            graph = _graph(header.pop("graph"))
            if not isinstance(header["sign"], str):
                raise ValueError(f"its sign is {header['sign']!r}")
            scores = build({name: file.get_tensor(name) for name in file.keys()}, graph, header)  # noqa: SIM118
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
            f"model here has the content hash {content_hash}: score this model, or load that one"
        )
    return scores


def check_ranked(what: str, scores: Annotated[Tensor, "..."]) -> None:
    """ValueError where edges or nodes shall be ranked by scores that are NaN."""
    if n_nan := int(scores.isnan().sum()):
        raise ValueError(f"{what} are ranked by their scores, but {n_nan} of {len(scores)} scores are NaN")


def write_text(path: Path, content: Any) -> None:
    """Write JSON; what is no text, such as parts of a file's name, as escapes."""
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8", errors="backslashreplace")


def finite(value: Any) -> Any:
    """The value of a JSON file: NaN and infinities, which JSON does not have, as None."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`, or the file that it links to, renamed to it if the block ends well, removed if it
    does not.

    Raises:
        OSError: the folder cannot be written to, or there is something else than a file; the message names it.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path = path.resolve()
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        if path.exists() and not path.is_file():
            raise OSError("it is no regular file")
        handle, name = tempfile.mkstemp(prefix=f".{path.name[:50]}.", dir=path.parent)
        temporary = Path(name)
        os.close(handle)
    except OSError as error:
        raise type(error)(f"{path} cannot be written: {error.strerror or error}; choose another place") from error
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())  # mkstemp's files are for their owner alone
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


class _NewerFormat(ValueError):
    """A file of a newer format, whose content is not looked at."""


def _check_version(path: Path, version: object) -> None:
    if not isinstance(version, int) or isinstance(version, bool):
        raise ValueError(f"its format version is {version!r}")
    if version > FORMAT_VERSION:
        raise _NewerFormat(
            f"{path} has the format version {version}, but this eapcore reads up to {FORMAT_VERSION}: update eapcore"
        )


def _graph(fields: Mapping[str, Any]) -> Graph:
    """The graph of a file's header; ValueError for what is none."""
    graph = Graph(**fields)
    sizes = (graph.n_layers, graph.n_heads)
    if not all(type(size) is int and size > 0 for size in sizes) or type(graph.has_mlp) is not bool:
        raise ValueError(f"its graph is {fields}")
    return graph


def _reason(error: Exception) -> str:
    return f"it has no {error}" if isinstance(error, KeyError) else str(error)
