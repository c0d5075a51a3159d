"""EAP-IG's graph files, and the circuit files of the MIB benchmark."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from eapcore.graph.circuit import Circuit
from eapcore.graph.files import finite, replacing
from eapcore.graph.graph import Graph
from eapcore.graph.scores import EdgeScores
from eapcore.interop.eap_ig.names import (
    _places,
    as_theirs,
    in_our_order,
    in_their_order,
    of_each_head,
    our_name,
    their_name,
    their_shape,
)
from eapcore.interop.sign import check_sign, sign_to_write, signed, turned

MIB_PERCENTAGES = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)


@dataclass(frozen=True, slots=True)
class GraphFile:
    """What the package's graph files and MIB's circuit files hold.

    circuit: the edges that are in the graph. scores: by our sign, None where a file gives none. d_model: of the model.
    nodes: the senders that are in the graph, bool [S]. node_scores: [S], NaN where a node has none. neurons,
    neuron_scores: [S, D], for circuits of neurons; these scores have the sign of the others.
    """

    circuit: Circuit
    d_model: int
    scores: EdgeScores | None = None
    nodes: Annotated[Tensor, "bool S"] | None = None
    node_scores: Annotated[Tensor, "S"] | None = None
    neurons: Annotated[Tensor, "bool S D"] | None = None
    neuron_scores: Annotated[Tensor, "S D"] | None = None

    @staticmethod
    def of(scores: EdgeScores, d_model: int, circuit: Circuit | None = None) -> GraphFile:
        """The file of scores, with a circuit chosen from them or none."""
        if circuit is None:
            circuit = Circuit(torch.zeros_like(scores.mask), scores.graph)
        return GraphFile(circuit, d_model, scores)

    def save(self, path: str | Path, *, sign: str | None = None) -> None:
        """Write the package's JSON or, for a path that ends in .pt, its torch file; both are what it reads itself.

        What is known of the scores is written beside, under the key "eapcore", which the package passes over.

        Args:
            path: ends in .json or .pt.
            sign: of the scores in the file: "metric", our own; "loss", as MIB's circuit track reads them, which takes
                the largest first; or "none". None only for scores that were read from another tool, which keep theirs.

        Raises:
            ValueError: another path; scores and no sign; or scores of key and value heads, which are sums over groups
                and cannot be told apart again.
        """
        path = Path(path)
        if path.suffix not in (".json", ".pt"):
            raise ValueError(f"a graph file must end in .json or .pt, got {path.name!r}")
        check_sign(sign)
        if self.scores is not None:
            if self.scores.graph.n_kv is not None:
                raise ValueError(
                    "these scores are of key and value heads, the package's of each query head's: score the model with "
                    "kv='each'"
                )
            sign = sign_to_write(self.scores, sign, f"{path.name}, a graph file of EAP-IG,")
        with replacing(path) as temporary:
            if path.suffix == ".json":
                temporary.write_text(json.dumps(self._as_json(sign)), encoding="utf-8")
            else:
                torch.save(self._as_dict(sign), temporary)

    @staticmethod
    def load(path: str | Path, *, attn_only: bool = False, sign: str | None = None) -> GraphFile:
        """Read a file that the package, MIB or `save` wrote.

        Args:
            path: ends in .json or .pt. A .pt file is read without running anything that it holds.
            attn_only: the model has no MLPs; the files have rows for them all the same.
            sign: of the scores in the file: "metric" if they were made with a metric of which more is better, "loss" if
                with a loss, as MIB's are, "none" for sizes. None where the file says it, as `save`'s do; else these
                scores refuse whatever needs their sign, such as a signed ranking.

        Raises:
            ValueError: a damaged file, one with edges that its graph does not have, or one that says another sign.
        """
        path = Path(path)
        check_sign(sign)
        readers = {".json": _from_json, ".pt": _from_pt}
        if path.suffix not in readers:
            raise ValueError(f"a graph file must end in .json or .pt, got {path.name!r}")
        if not path.is_file():
            raise FileNotFoundError(f"a graph file was expected at {path}, but there is none")
        try:
            return readers[path.suffix](path, attn_only, sign)
        except (KeyError, TypeError, AttributeError, IndexError, RuntimeError, EOFError, ValueError) as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
            raise ValueError(f"{path} must be a graph file of EAP-IG, but it cannot be read: {reason}") from error
        except Exception as error:  # the unpickler meets damage with whatever its next step raises
            raise ValueError(f"{path} must be a graph file of EAP-IG, but it is no torch file of tensors") from error

    @property
    def _cfg(self) -> dict[str, Any]:
        graph = self.circuit.graph
        sizes = {"n_layers": graph.n_layers, "n_heads": graph.n_heads}
        return {**sizes, "parallel_attn_mlp": graph.parallel, "d_model": self.d_model}

    def _known(self, sign: str | None) -> dict[str, Any]:
        """What is known of the scores, for a file; empty without any."""
        if self.scores is None:
            return {}
        plain = json.dumps(finite({**self.scores.meta, "sign_of_source": sign}))  # a .pt file may hold no classes
        return {"eapcore": json.loads(plain)}

    def _nodes(self) -> Tensor:
        """bool [S], as given, or the senders that edges of the circuit both enter and leave."""
        if self.nodes is not None:
            return self.nodes
        graph, mask = self.circuit.graph, self.circuit.mask
        entered = torch.zeros(graph.n_senders, dtype=torch.bool, device="cpu")
        entered[0] = True
        for r in mask.any(0).nonzero().flatten().tolist():
            entered[list(graph.senders_behind(r))] = True
        return entered & mask.any(1)

    def _tensors(self, sign: str | None) -> dict[str, Tensor]:
        """All tensors in the package's order."""
        graph, mask = replace(self.circuit.graph, n_kv=None), of_each_head(self.circuit.graph, self.circuit.mask)
        scores = torch.zeros(mask.shape, device="cpu") if self.scores is None else turned(self.scores.scores, sign)
        tensors = {"edges_scores": in_their_order(graph, scores), "edges_in_graph": in_their_order(graph, mask)}
        rows = _places(graph, torch.device("cpu"))[0].squeeze(1)
        sides = {"nodes_in_graph": self._nodes(), "nodes_scores": turned(self.node_scores, sign)}
        sides |= {"neurons_in_graph": self.neurons, "neurons_scores": turned(self.neuron_scores, sign)}
        for name, side in sides.items():
            if side is not None:
                whole = side.new_zeros(their_shape(graph)[0], *side.shape[1:])
                whole[rows] = side
                tensors[name] = whole
        return tensors

    def _as_dict(self, sign: str | None) -> dict[str, Any]:
        full = as_theirs(self.circuit.graph)
        names = {"src_nodes": [their_name(n) for n in full.sender_names], "dst_nodes": full.receiver_names}
        return {"cfg": self._cfg, **names, **self._tensors(sign), **self._known(sign)}

    def _as_json(self, sign: str | None) -> dict[str, Any]:
        full, tensors = as_theirs(self.circuit.graph), self._tensors(sign)
        nodes: dict[str, dict[str, Any]] = {}
        for row, name in enumerate(full.sender_names):
            node: dict[str, Any] = {"in_graph": bool(tensors["nodes_in_graph"][row])}
            for key, field in _NODE_FIELDS.items():
                if field in tensors:
                    node[key] = tensors[field][row].tolist()
            nodes[their_name(name)] = node
        nodes["logits"] = {"in_graph": True}
        scores, chosen = tensors["edges_scores"].tolist(), tensors["edges_in_graph"].tolist()
        edges = {}
        for s, r in _their_edges(full):
            edge = (
                {"in_graph": chosen[s][r]} if self.scores is None else {"score": scores[s][r], "in_graph": chosen[s][r]}
            )
            edges[their_name(f"{full.sender_names[s]}->{full.receiver_names[r]}")] = edge
        return {"cfg": self._cfg, "nodes": nodes, "edges": edges, **self._known(sign)}


_KEPT = ("model", "task", "metric", "method", "dtype", "versions")  # of what a file of our own says of its scores
_NODE_FIELDS = {"score": "nodes_scores", "neurons": "neurons_in_graph", "neurons_scores": "neurons_scores"}


def _their_edges(graph: Graph) -> Iterator[tuple[int, int]]:
    """All edges in the order in which the package makes them: by component, by sender, then q, k and v."""
    for layer in range(graph.n_layers):
        first = graph.qkv(layer).start
        for s in range(graph.heads(layer).start):
            for head in range(graph.n_heads):
                yield from ((s, first + part * graph.n_heads + head) for part in range(3))
            if graph.parallel:
                yield s, graph.mlp_receiver(layer)
        if graph.parallel:
            continue
        yield from ((s, graph.mlp_receiver(layer)) for s in range(graph.heads(layer).stop))
    yield from ((s, graph.logits) for s in range(graph.n_senders))


def _graph_of(cfg: Any, attn_only: bool) -> tuple[Graph, int]:
    sizes = [cfg[name] for name in ("n_layers", "n_heads", "d_model")]
    if not all(type(size) is int and size > 0 for size in sizes):
        raise ValueError(f"its cfg is {cfg}")
    return Graph(sizes[0], sizes[1], not attn_only, bool(cfg.get("parallel_attn_mlp"))), sizes[2]


def _sign_of(known: Any, sign: str | None) -> str | None:
    """The sign that was given, or the one that a file says."""
    said = known.get("sign_of_source")
    if said is not None and sign not in (None, said):
        raise ValueError(f"it says that its sign is {said!r}, but sign={sign!r} was given: leave it out")
    check_sign(said)
    return said if sign is None else sign


def _file_of(
    graph: Graph, d_model: int, theirs: Mapping[str, Tensor | None], known: Mapping[str, Any], sign: str | None
) -> GraphFile:
    """A GraphFile from tensors in the package's order, by the names in its .pt files."""
    sign = _sign_of(known, sign)
    rows = _places(graph, torch.device("cpu"))[0].squeeze(1)
    size = their_shape(graph)[0]
    sides: dict[str, Tensor | None] = {}
    for name in ("nodes_in_graph", *_NODE_FIELDS.values()):
        side = theirs.get(name)
        if side is not None and side.shape != ((size,) if name.startswith("nodes") else (size, d_model)):
            raise ValueError(f"its {name} are {list(side.shape)}")
        sides[name] = None if side is None else side[rows]
    chosen, scores = theirs["edges_in_graph"], theirs["edges_scores"]
    assert chosen is not None
    mask = in_our_order(graph, chosen.bool())
    if bool((mask & ~graph.edge_mask()).any()):
        raise ValueError("it has edges that go back in the model")
    edge_scores = None
    if scores is not None and bool(scores.any()):  # a .pt file of a circuit has zeros
        meta = {name: value for name, value in known.items() if name in _KEPT}
        meta["method"] = {"source": "EAP-IG file", **(meta.get("method") or {})}
        edge_scores = EdgeScores(turned(in_our_order(graph, scores), sign), graph, signed(sign, meta))
    neurons = sides["neurons_in_graph"]
    return GraphFile(
        Circuit(mask, graph),
        d_model,
        edge_scores,
        nodes=sides["nodes_in_graph"],
        node_scores=turned(sides["nodes_scores"], sign),
        neurons=None if neurons is None else neurons.bool(),
        neuron_scores=turned(sides["neurons_scores"], sign),
    )


def _from_json(path: Path, attn_only: bool, sign: str | None) -> GraphFile:
    content = json.loads(path.read_text(encoding="utf-8"))
    graph, d_model = _graph_of(content["cfg"], attn_only)
    full = replace(graph, has_mlp=True)
    chosen = torch.zeros(their_shape(graph), dtype=torch.bool, device="cpu")
    scores = torch.zeros(their_shape(graph), dtype=torch.float64, device="cpu")
    scored = False
    for name, edge in content["edges"].items():
        place = full.edge(our_name(name))
        chosen[place] = bool(edge["in_graph"])
        if edge.get("score") is not None:
            scores[place], scored = float(edge["score"]), True
    nodes = content["nodes"]
    theirs: dict[str, Tensor | None] = {"edges_in_graph": chosen, "edges_scores": scores if scored else None}
    theirs["nodes_in_graph"] = torch.tensor(
        [bool(nodes.get(their_name(name), {}).get("in_graph", False)) for name in full.sender_names], device="cpu"
    )
    unknown = set(nodes) - {their_name(name) for name in full.sender_names} - {"logits"}
    if unknown:
        raise ValueError(f"it has the node {min(unknown)!r}, which its cfg does not have")
    for key, field in _NODE_FIELDS.items():
        found = {name: node[key] for name, node in nodes.items() if key in node and name != "logits"}
        if found:
            empty: Any = float("nan") if key == "score" else [float("nan")] * d_model
            # The package keeps a neuron that a file does not mention: absent means "not judged", NaN, or "in".
            if key == "neurons":
                empty = [True] * d_model
            values = [found.get(their_name(name), empty) for name in full.sender_names]
            theirs[field] = torch.tensor(values, dtype=torch.bool if key == "neurons" else torch.float64, device="cpu")
    return _file_of(graph, d_model, theirs, content.get("eapcore", {}), sign)


def _from_pt(path: Path, attn_only: bool, sign: str | None) -> GraphFile:
    content = torch.load(path, map_location="cpu", weights_only=True)
    graph, d_model = _graph_of(content["cfg"], attn_only)
    full = replace(graph, has_mlp=True)
    names = [their_name(name) for name in full.sender_names]
    if list(content["src_nodes"]) != names or list(content["dst_nodes"]) != full.receiver_names:
        raise ValueError("its nodes are not those of its cfg, in the package's order")
    required = ("edges_in_graph", "nodes_in_graph")
    missing = [name for name in required if name not in content]
    if missing:
        raise ValueError(f"it has no {missing[0]}")
    fields = ("edges_scores", *required, *_NODE_FIELDS.values())
    return _file_of(graph, d_model, {name: content.get(name) for name in fields}, content.get("eapcore", {}), sign)


def mib_path(
    root: str | Path, method: str, ablation: str, level: str, task: str, model: str, *, suffix: str = ".json"
) -> Path:
    """Where MIB's circuit track keeps the scores of a method on a task: its scripts read and write this path.

    >>> mib_path("circuits", "EAP", "patching", "edge", "arc_easy", "gpt2").as_posix()
    'circuits/EAP_patching_edge/arc-easy_gpt2/importances.json'
    """
    return Path(root) / f"{method}_{ablation}_{level}" / f"{task.replace('_', '-')}_{model}" / f"importances{suffix}"


def save_mib_circuits(
    folder: str | Path, scores: EdgeScores, *, d_model: int, signed: bool = False, suffix: str = ".json"
) -> list[Path]:
    """Write the nine circuits of a MIB submission: at most 0.1, 0.2, 0.5, 1, 2, 5, 10, 20 and 50 % of the edges.

    Each is the edges with the largest |score| (with signed=True: −score), less those that lie on no path from the input
    to the logits.

    Returns:
        The paths, `<percentage>.json` in the folder, which is made.

    Raises:
        ValueError: scores of key and value heads, whose edges are several of the benchmark's.
    """
    if scores.graph.n_kv is not None:
        raise ValueError("MIB counts the k and v inputs of each query head: score the model with kv='each'")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for percentage in MIB_PERCENTAGES:
        circuit = scores.top_n(int(scores.graph.n_edges * percentage / 100), signed=signed).prune()
        paths.append(folder / f"{percentage}{suffix}")
        GraphFile(circuit, d_model).save(paths[-1])
    return paths
