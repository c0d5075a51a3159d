"""Every public function on a model and pairs, as numbers that can be compared; each takes an ablation's options."""

from __future__ import annotations

from models import random_circuit

from eapcore.attribution.attribute import attribute
from eapcore.attribution.flow_routes import flow_routes
from eapcore.attribution.methods import METHODS
from eapcore.attribution.positions import attention_edges
from eapcore.evaluation.completeness import completeness, minimality
from eapcore.evaluation.evaluate import evaluate
from eapcore.evaluation.faithfulness import faithfulness, mib
from eapcore.evaluation.roc import roc
from eapcore.evaluation.stability import stability
from eapcore.evaluation.verify import verify
from eapcore.execution.ablation import Ablation
from eapcore.patching.circuits import run_circuit
from eapcore.patching.edges import patch_edges
from eapcore.patching.interpolate import interpolate
from eapcore.patching.nodes import patch_nodes
from eapcore.patching.paths import path_patch, routes
from eapcore.search.acdc import acdc
from eapcore.search.smallest import smallest
from eapcore.search.subnetwork_probing import subnetwork_probing

PRUNING = tuple(name for name, method in METHODS.items() if method.pruning)  # which keep no buffer, and no mean of q
FIRST_ORDER = {
    **{
        method: lambda m, p, how=method, **o: attribute(m, p, "nll", method=how, level=level_of(how), **o).scores
        for method in METHODS
    },
    "neurons": lambda m, p, **o: attribute(m, p, level="neuron", batch_size=2, **o).dimensions,
    "by pair, factored": lambda m, p, **o: attribute(m, p, storage="factored", reduce="pair", **o).per_pair,
    "by position": lambda m, p, **o: attribute(m, p, storage="dense", reduce="position", **o).per_position,
}
EXACT = {
    "edges": lambda m, p, **o: patch_edges(m, p, batch_size=2, **o).scores,
    "nodes": lambda m, p, **o: patch_nodes(m, p, **o).effects,
    "nodes by position": lambda m, p, **o: patch_nodes(m, p, per_position=True, **o).effects,
    "paths": lambda m, p, **o: [path_patch(m, p, "logit_diff", ["embed"], [f"embed->a0.h{head}<{part}>->logits"],
        **o).effect for head in range(2) for part in "qkv"],
    "routes": lambda m, p, **o: path_patch(m, p, "nll", ["embed"], between(m.graph), **o).effect,
    "a curve": lambda m, p, **o: interpolate(m, p, "logit_diff", "embed->a0.h1<v>", points=4, **o).effects,
    "circuits": lambda m, p, **o: run_circuit(m, p, [random_circuit(m.graph, share) for share in (0.3, 0.8)], **o),
}  # fmt: skip
SEARCHES = {
    "acdc": lambda m, p, **o: acdc(m, p, threshold=0.02, **o).mask.double(),
    "acdc from a start": lambda m, p, **o: acdc(m, p, threshold=0.02, start=chosen(m, p, **o), **o).mask.double(),
    "probing": lambda m, p, **o: subnetwork_probing(m, p, steps=2, batch_size=2, **o).scores,
    "smallest": lambda m, p, **o: [tried.value for tried in smallest(m, p, "nll", attribute(m, p, **o), **o)],
}
JUDGING = {
    "faithfulness": lambda m, p, **o: faithfulness(m, p, "nll", attribute(m, p, **o), sizes=[9, 30], **o).faithfulness,
    "mib": lambda m, p, **o: mib(m, p, "nll", attribute(m, p, **o), **o).cpr,
    "completeness": lambda m, p, **o: completeness(m, p, "nll", random_circuit(m.graph), **o).gap,
    "minimality": lambda m, p, **o: minimality(m, p, "nll", random_circuit(m.graph), **o).scores,
    "verify": lambda m, p, **o: verify(m, p, n=7, curves=["embed->logits"], **o).effects,
    "roc": lambda m, p, **o: roc(attribute(m, p, **o), patch_edges(m, p, **o).top_n(9)).tpr,
    "evaluate": lambda m, p, **o: evaluate(m, p, "nll", attribute(m, p, **o), circuit=chosen(m, p, **o), **o).mib.cmd,
    "stability": lambda m, p, **o: (
        stability(attribute(m, p, reduce="pair", **o).per_pair, m.graph, top_n=9, n_resamples=5).std
    ),
}
EVERYTHING = FIRST_ORDER | EXACT | SEARCHES | JUDGING


FURTHER = {
    "importance of ends": lambda m, p, **o: attribute(m, p, method="hisp", batch_size=2, **o).scores,
    "information flow": lambda m, p, **o: flow_routes(m, p, routes="flow", batch_size=2).scores,
    "attention by position": lambda m, p, **o: attention_edges(m, p, batch_size=2, **o).k,
    "attention by position, published": lambda m, p, **o: attention_edges(m, p, method="peap", **o).q,
    "probing nodes": lambda m, p, **o: subnetwork_probing(m, p, level="node", steps=2, **o).scores,
    "optimal constants": lambda m, p, **o: attribute(m, p, ablation=Ablation.optimal(m, p, steps=2)).scores,
}


def level_of(method):
    return "node" if method in PRUNING else "edge"


def between(graph):
    return routes(graph, ["embed"], ["a1.h0<q>"], through=["a0.h1"])


def chosen(model, pairs, **options):
    """Half of all edges, grown from the logits back."""
    return attribute(model, pairs, **options).greedy(model.graph.n_edges // 2).prune()
