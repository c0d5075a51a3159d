"""What scores were made with, held against what they are to be used with."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from eapcore.graph.graph import Graph
from eapcore.graph.scores import EdgeScores
from eapcore.models.model import Model

_log = logging.getLogger("eapcore")


def check_scores(scores: EdgeScores, graph: Graph) -> None:
    """ValueError for what is not EdgeScores of the graph."""
    if not isinstance(scores, EdgeScores):
        raise ValueError(f"the scores must be EdgeScores of {graph}, got {type(scores).__name__}")
    if scores.graph != graph:
        raise ValueError(f"the scores must be of {graph}, got some of {scores.graph}")


def check_scored(scores: EdgeScores, model: Model) -> None:
    """ValueError for scores that are not of a model's edges, or of other weights than its own."""
    check_scores(scores, model.graph)
    made = scores.meta.get("model") or {}
    if made.get("content_hash", model.content_hash) != model.content_hash:
        raise ValueError(f"the scores are of {made.get('name')!r}, whose weights are not those of {model.name!r}")


def say_unknown(scores: EdgeScores, facts: Sequence[str]) -> None:
    """Log which of these facts, keys of `meta`, scores do not say: what they were made with is taken on trust."""
    known = {"model": (scores.meta.get("model") or {}).get("content_hash")}
    known |= {"metric": (scores.meta.get("metric") or {}).get("name"), "ablation": ablation_of(scores)}
    unknown = [fact for fact in facts if known[fact] is None]
    if unknown:
        source = (scores.meta.get("method") or {}).get("source")
        of = f", from {source}," if source else ""
        _log.warning("the scores%s do not say with which %s they were made: taken for those here", of, _listed(unknown))


def ablation_of(scores: EdgeScores) -> dict[str, Any] | None:
    """What an edge carried when scores were made; None where they do not say."""
    found = (scores.meta.get("method") or {}).get("ablation")
    return None if found is None else dict(found)


def _listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
