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
