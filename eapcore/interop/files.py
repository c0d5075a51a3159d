"""Other tools' files of scores and circuits, recognised by what they hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from eapcore.graph.circuit import Circuit
from eapcore.graph.graph import Graph
from eapcore.graph.scores import EdgeScores
from eapcore.interop.acdc_files import load_edges
from eapcore.interop.eap_ig.files import GraphFile
from eapcore.interop.sign import ASK
from eapcore.models.model import Model


def is_foreign(path: Path) -> bool:
    """Whether a file is a .pt, or JSON that is none of our own: a graph file of EAP-IG or MIB, edges of ACDC or
    acdcpp."""
    if path.suffix == ".pt":
        return True
    if path.suffix != ".json" or not path.is_file():
        return False
    content = _content(path)
    return not (isinstance(content, dict) and str(content.get("format", "")).startswith("eapcore"))


def scores_of_graph(path: Path, graph: Graph, sign: str | None) -> EdgeScores:
    """The scores of another tool's file that is of a graph, whatever model; their sign may stay open.

    Raises:
        ValueError: a damaged file, one without scores or of another graph.
    """
    content = None if path.suffix == ".pt" else _content(path)
    if not _is_graph_file(path, content):
        return load_edges(path, graph, sign=sign)[1]
    scores = GraphFile.load(path, attn_only=not graph.has_mlp, sign=sign).scores
    if scores is None:
        raise ValueError(f"{path} is a circuit without scores")
    if scores.graph != graph:
        raise ValueError(f"{path} is of {scores.graph}, but scores of {graph} were expected")
    return scores


def _is_graph_file(path: Path, content: Any) -> bool:
    return path.suffix == ".pt" or (isinstance(content, dict) and {"cfg", "edges"} <= set(content))


def read_foreign(path: Path, model: Model, sign: str | None = None) -> tuple[Circuit, EdgeScores | None]:
    """The circuit of another tool's file, and its scores by our sign where it has some.

    Args:
        path: of which `is_foreign` is true.
        model: what the file is of.
        sign: of its scores, see `sign.SIGNS`; None where the file says it, or leaves it open.

    Raises:
        ValueError: a damaged file, one of another model, or of key and value heads apart.
    """
    content = None if path.suffix == ".pt" else _content(path)
    if _is_graph_file(path, content):
        file = GraphFile.load(path, attn_only=model.config.attn_only, sign=sign)
        if file.d_model != model.config.d_model or file.circuit.graph != model.graph:
            raise ValueError(
                f"{path} is of {file.circuit.graph} with d_model {file.d_model}, but {model.name} is {model.graph} "
                f"with d_model {model.config.d_model}"
            )
        return file.circuit, file.scores
    return load_edges(path, model.graph, sign=sign)


def scores_of(path: Path, model: Model, sign: str | None) -> EdgeScores:
    """The scores of another tool's file; ValueError where it has none, or its sign is not known."""
    scores = read_foreign(path, model, sign)[1]
    if scores is None:
        raise ValueError(f"{path} is a circuit without scores")
    if scores.meta.get("sign_of_source") is None:
        raise ValueError(f"{path} does not say which way its scores point: give {ASK.replace('sign=', '--sign ')}")
    return scores


def _content(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be JSON, but it cannot be read: {error}") from error
