"""Scores as a command writes them, with names that are hard on a page."""

from __future__ import annotations

import torch

from eapcore.graph.scores import EdgeScores

EVIL = '</script><script>alert(1)</script>&"\u2028'  # a name that must stay text wherever it is shown


def random_scores(graph, seed=0, *, positions=None, name="small"):
    generator = torch.Generator().manual_seed(seed)
    shape = (graph.n_senders, graph.n_receivers)
    parts = torch.randn((positions or 1, *shape), generator=generator, dtype=torch.float64).pow(3) * graph.edge_mask()
    meta = {
        "model": {"name": name, "content_hash": "0" * 16},
        "task": {"name": "words", "n_pairs": 2, "seed": 7},
        "metric": {"name": "logit_diff", "clean": 2.5, "corrupt": -0.25},
        "method": {"name": "eap"},
    }
    return EdgeScores(parts.sum(0), graph, meta, per_position=parts if positions else None)


def reproduction():
    """What eapcore reproduce writes, as small as it can be, with text that must stay text."""
    moments = {"n": 4, "mean": 0.25, "std": 0.5, "quantiles": [-1, -0.5, 0, 0.5, 1]}
    areas = [
        {"edge_set": "all", "n_edges": 262, "n_true": 30, "ranking": "absolute", "thresholds": "every", "rule": rule,
         "auc": 0.75} for rule in ("trapezoid", "lower")
    ]  # fmt: skip
    roc = {"fpr": [0, 0.5, 1], "tpr": [0, 1, 1], "auc": 0.7654, "rule": "trapezoid"}
    judged = {
        "areas": areas,
        "heads": [{"by": EVIL, "n_heads": 12, "n_true": 3, "rule": row["rule"], "auc": 0.5} for row in areas],
        "curves": [{**roc, "edge_set": {"n_true": 30, "n_edges": 262}}],
        "histogram": {"edge_set": "all", "ends": [-1, 0, 1], "inside": [1, 3], "outside": [200, 58]},
        "moments": [{"edge_set": "all", "where": where, **moments} for where in ("inside", "outside")],
        "roles": [{"role": role, "edges": "of the circuit", **moments} for role in (EVIL, "name mover")],
    }
    search = {"start": EVIL, "start_edges": 9, "threshold": 0.1, "edges": 5, "connected": 4, "value": -0.5, "tpr": 0.2,
              "fpr": 0.1, "j": 0.1, "start_j": 0.3}  # fmt: skip
    curve = {"edge": EVIL, "points": [0, 0.5, 1], "effects": [0, -0.1, -0.4], "estimate": -0.2, "published": True}
    return {
        "format": "eapcore-reproduction", "format_version": 1, "task": "ioi", "unit": 2.5,
        "rows": [{"what": "AUC", "published": 0.904, "here": 0.9, "difference": -0.004}], "judged": judged,
        "exact": {"which": "all edges", "slope": 0.5, "intercept": 0, "r2": None}, "curves": [curve],
        "searches": [search, {**search, "threshold": 1}],
        "methods": [{"method": "HISP", "edge_set": EVIL, "rule": row["rule"], "auc": 0.625} for row in areas],
        "subnetworks": [{"selection": EVIL, "edges": 9, "connected": 8, "faithfulness": None}],
        "heads": [{"sender": EVIL, "score": 1, "role": None}], "left_out": [EVIL],
        "published": {"roles": {"name mover": [0.1, 0.2]}}, "command": "eapcore reproduce ioi",
        "meta": {"unit": EVIL, "model": {}},
    }  # fmt: skip
