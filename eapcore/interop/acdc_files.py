"""The edge JSON of ACDC and of acdcpp, read and written.

ACDC logs every edge that it tried: {"data": [{"text": ["<sender>[:, :, 1] to <receiver>[:, :, 0]", …], "y": [effect,
…]}]}, where the effect is how much its metric, a loss, grew without the edge. acdcpp keeps rows [hook, index, hook,
index, score] of attribution scores or of the edges that are left, the latter below its two thresholds; or, as the
scores of Syed, Rager, Conmy 2023 are published, below one threshold {"<receiver>[:, :, 0]<sender>[:, :, 1]": score}.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from eapcore.graph.circuit import Circuit
from eapcore.graph.files import replacing
from eapcore.graph.graph import Graph
from eapcore.graph.scores import EdgeScores
from eapcore.interop.sign import check_sign, sign_to_write, signed, turned
from eapcore.interop.transformer_lens import receiver_hook, receiver_of_hook, sender_hook, sender_of_hook

FORMS = ("acdc", "acdcpp")
_SEPARATOR = " to "


def load_edges(
    path: str | Path, graph: Graph, *, thresholds: tuple[str, str] | None = None, sign: str | None = None
) -> tuple[Circuit, EdgeScores]:
    """Read an edge JSON of ACDC or acdcpp; the content says which.

    The edges inside a head, from its input to its q, k or v and on, and inside an MLP are none of ours and passed over.

    Args:
        path: the file.
        graph: of the model that it is about.
        thresholds: acdcpp's and ACDC's, as the file writes them, for a file that holds several lists of edges.
        sign: of the numbers in the file, see `sign.SIGNS`. ACDC's are effects on what it makes small: "loss". acdcpp's
            are (clean − corrupt) · gradient: "loss" if it differentiated a metric, "metric" if a loss. With None they
            are taken for "loss", and the scores refuse whatever needs the sign.

    Returns:
        The circuit of the edges that the file lists, and their scores by our sign, negative = needed. Edges that it
        does not list score 0.

    Raises:
        ValueError: another file, thresholds that it does not have, or an edge that is none of the graph.
    """
    path = Path(path)
    check_sign(sign)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        rows = list(_rows(content, thresholds))
        scores = torch.zeros(graph.n_senders, graph.n_receivers, dtype=torch.float64, device="cpu")
        mask = torch.zeros_like(scores, dtype=torch.bool)
        for one, other, value in rows:
            edge = _edge(graph, one, other)
            if edge is not None:
                mask[edge] = True
                scores[edge] = 0.0 if value is None else float(value)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise ValueError(f"{path} must be an edge JSON of ACDC or acdcpp, but it cannot be read: {error}") from error
    meta = {"method": {"source": path.name}}
    return Circuit(mask, graph, meta), EdgeScores(turned(scores, sign or "loss"), graph, signed(sign, meta))


def save_edges(
    path: str | Path, scores: EdgeScores, circuit: Circuit | None = None, *, form: str = "acdcpp", sign: str = "loss"
) -> None:
    """Write the edge JSON that acdcpp or ACDC writes.

    Args:
        path: the file.
        scores: of all edges.
        circuit: only the edges of this circuit; None for all.
        form: "acdcpp" for rows [sender's hook, index, receiver's hook, index, number], "acdc" for its plot's data. With
            a circuit, acdcpp's rows also say which heads' inputs feed their q, k and v, which it needs.
        sign: of the numbers in the file, as for `load_edges`.

    Raises:
        ValueError: another form, or scores whose sign is not known.
    """
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    graph, values = scores.graph, turned(scores.scores, sign_to_write(scores, sign, Path(path).name))
    mask = graph.edge_mask() if circuit is None else circuit.mask
    rows: list[tuple[str, str, float]] = []
    fed = set()
    for r, s in mask.T.nonzero().tolist():
        sender, receiver = graph.sender_names[s], graph.receiver_names[r]
        hook = receiver_hook(graph, receiver)
        start = "blocks.0.hook_resid_pre" if sender == "embed" else sender_hook(graph, sender)
        rows.append((start, hook, float(values[s, r])))
        if receiver.endswith(">"):
            fed.add(hook)
    if form == "acdc":
        text = [f"{_long(a)}{_SEPARATOR}{_long(b)}" for a, b, _ in rows]
        content: Any = {"data": [{"text": text, "y": [value for _, _, value in rows]}]}
    else:
        content = [[*_indexed(a), *_indexed(b), value] for a, b, value in rows]
        if circuit is not None:
            inside = [(hook, hook.replace("hook_", "attn.hook_").replace("_input", "")) for hook in sorted(fed)]
            content += [[*_indexed(a), *_indexed(b), None] for a, b in inside]
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content), encoding="utf-8")


def _rows(content: Any, thresholds: tuple[str, str] | None) -> Iterator[tuple[str, str, float | None]]:
    """(hook, other hook, value) in either order."""
    if isinstance(content, dict) and "data" in content:
        plot = content["data"][0]
        for text, value in zip(plot["text"], plot["y"], strict=True):
            one, other = text.split(_SEPARATOR)
            yield one, other, value
        return
    if isinstance(content, dict):
        lists = list(content.values())
        if lists and all(isinstance(each, dict) and _scored(each) for each in lists):
            if len(lists) > 1 and (thresholds is None or thresholds[0] not in content):
                raise ValueError(f"it holds scores for the thresholds {sorted(content)}: choose one by thresholds=")
            for text, value in (content[thresholds[0]] if thresholds else lists[0]).items():
                one, close, other = text.partition("]")
                yield one + close, other, value
            return
        found = {(a, b) for a, inner in content.items() for b in inner}
        if thresholds is None or thresholds not in found:
            raise ValueError(f"it holds lists for the thresholds {sorted(found)}: choose one by thresholds=")
        content = content[thresholds[0]][thresholds[1]]
    for one, index, other, other_index, value in content:
        yield f"{one}{index}", f"{other}{other_index}", value


def _scored(content: dict[str, Any]) -> bool:
    """Whether these are scores by the names of two hooks that follow each other."""
    numbers = all(isinstance(value, int | float) for value in content.values())
    return bool(content) and numbers and all(name.count("]") == 2 for name in content)


def _edge(graph: Graph, one: str, other: str) -> tuple[int, int] | None:
    """The edge between two hooks, whichever comes first; None for one inside a head or an MLP."""
    hooks = [hook.replace("COLON", ":").replace("None", ":") for hook in (one, other)]
    inside = [".attn.hook_q[" in hook or ".attn.hook_k[" in hook or ".attn.hook_v[" in hook for hook in hooks]
    if any(inside):
        return None
    try:
        sender, receiver = sender_of_hook(graph, hooks[0]), receiver_of_hook(graph, hooks[1])
    except ValueError:
        receiver, sender = receiver_of_hook(graph, hooks[0]), sender_of_hook(graph, hooks[1])
    return None if sender == receiver else graph.edge(f"{sender}->{receiver}")


def _long(hook: str) -> str:
    """`hook[7]` as ACDC prints it, `hook[:, :, 7]`, and `hook` as `hook[:]`."""
    name, _, head = hook.partition("[")
    return f"{name}[:, :, {head}" if head else f"{name}[:]"


def _indexed(hook: str) -> tuple[str, str]:
    """(hook, index) as acdcpp writes them: "[None, None, 7]" or "[None]"."""
    name, _, head = hook.partition("[")
    return name, f"[None, None, {head}" if head else "[None]"
