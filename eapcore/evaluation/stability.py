"""How scores vary when the prompts are drawn again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from eapcore.evaluation.agreement import RANKINGS
from eapcore.graph.confidence import LEVEL, student_t
from eapcore.graph.files import write_json
from eapcore.graph.graph import Graph
from eapcore.graph.show import short

# Stability


@dataclass(frozen=True, slots=True)
class Stability:
    """How scores vary when the prompts are drawn again.

    std: [S, R] of the mean score over resamples. low, high: [S, R] the mean score's confidence interval, Student's t
    times its standard error to either side (`level` stands in meta); it does not hang on the resamples, whose quantiles
    lie too close together where there are few pairs. sign_consistency: [S, R] share of the resamples in which the mean
    score has the sign that it has over all pairs. top_frequency: [S, R] share in which the edge is among the top n.
    overlap: mean share of the top n that two resamples have in common; overlap_with_all: with that of all pairs.
    """

    __repr__ = short

    std: Annotated[Tensor, "S R"]
    low: Annotated[Tensor, "S R"]
    high: Annotated[Tensor, "S R"]
    sign_consistency: Annotated[Tensor, "S R"]
    top_frequency: Annotated[Tensor, "S R"]
    overlap: float
    overlap_with_all: float
    meta: Mapping[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        write_json(path, "stability", self)


def stability(
    per_pair: Annotated[Tensor, "N S R"],
    graph: Graph,
    *,
    top_n: int,
    n_resamples: int = 100,
    seed: int = 0,
    ranking: str = "absolute",
    level: float = LEVEL,
    meta: Mapping[str, Any] | None = None,
) -> Stability:
    """Bootstrap over prompt pairs: draw N of N pairs with replacement, average, rank, compare.

    Args:
        per_pair: [N, S, R], each pair's scores, e.g. `attribute(reduce="pair").per_pair`.
        graph: of the scores.
        top_n: how many edges count as the top.
        n_resamples: at least 2.
        seed: of the draws.
        ranking: "absolute" or "signed".
        level: of the confidence intervals.
        meta: what the scores' file says of them, `meta["scores"]` of the result.

    Raises:
        ValueError: a wrong shape, fewer than 2 pairs or resamples, top_n outside the graph, a level outside 0..1.

    Source of the resamples: Efron 1979, "Bootstrap methods: another look at the jackknife".
    """
    expected = (graph.n_senders, graph.n_receivers)
    if not isinstance(per_pair, Tensor):
        raise ValueError(f"per_pair must be each pair's scores, by attribute(reduce='pair'), got {per_pair!r:.60}")
    if per_pair.ndim != 3 or per_pair.shape[1:] != expected or len(per_pair) < 2:
        raise ValueError(f"per_pair must be [N ≥ 2, S, R] = [., {expected[0]}, {expected[1]}], got {per_pair.shape}")
    if not 1 <= top_n <= graph.n_edges:
        raise ValueError(f"top_n must be between 1 and the {graph.n_edges} edges of this graph, got {top_n}")
    if n_resamples < 2:
        raise ValueError(f"n_resamples must be at least 2, got {n_resamples}")
    if ranking not in RANKINGS:
        raise ValueError(f"ranking must be {' or '.join(RANKINGS)}, got {ranking!r}")
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    edges, count = graph.edge_mask(), len(per_pair)
    values = per_pair.cpu()[:, edges].double()  # [N, E]
    draws = torch.randint(count, (n_resamples, count), generator=torch.Generator().manual_seed(seed), device="cpu")
    weights = torch.zeros(n_resamples, count, dtype=torch.float64, device="cpu")
    weights.scatter_add_(1, draws, torch.full(draws.shape, 1 / count, dtype=torch.float64, device="cpu"))
    means, whole = weights @ values, values.mean(0)

    def top(scores: Tensor) -> Tensor:
        """1 where an edge is among the top n, [..., E]."""
        useful = scores.abs() if ranking == "absolute" else -scores
        chosen = useful.sort(stable=True, dim=-1, descending=True).indices[..., :top_n]
        return torch.zeros_like(useful).scatter_(-1, chosen, 1.0)

    reach = student_t(count, level) * (values.var(0) / count).sqrt()
    tops = top(means)
    common = tops @ tops.T / top_n
    pairs = n_resamples * (n_resamples - 1)

    def placed(row: Tensor) -> Tensor:
        full = torch.zeros(expected, dtype=torch.float64, device="cpu")
        full[edges] = row
        return full

    method = {"name": "bootstrap", "n_pairs": count, "n_resamples": n_resamples, "seed": seed, "top_n": top_n}
    method["level"] = level
    return Stability(
        std=placed(means.std(0)),
        low=placed(whole - reach),
        high=placed(whole + reach),
        sign_consistency=placed((means.sign() == whole.sign()).double().mean(0)),
        top_frequency=placed(tops.mean(0)),
        overlap=float((common.sum() - common.trace()) / pairs),
        overlap_with_all=float((tops @ top(whole)).mean() / top_n),
        meta={"scores": dict(meta or {}), "method": {**method, "ranking": ranking}},
    )
