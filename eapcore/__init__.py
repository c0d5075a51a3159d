"""eapcore: edge attribution patching for transformers, every edge scored by fused kernels."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

if not (Path(__file__).parent / "kernels").exists():  # an uninstalled checkout: the folder lies beside this package
    _root = Path(__file__).parent.parent
    if (_root / "kernels" / "__init__.py").exists():
        __path__.append(str(_root))

if TYPE_CHECKING:
    from eapcore.attribution.plan import dense_bytes
    from eapcore.evaluation.screened import attribute
    from eapcore.graph.circuit import Circuit
    from eapcore.graph.graph import Graph
    from eapcore.graph.scores import EdgeScores
    from eapcore.kernels.torch_ops import edge_scores, receiver_grads
    from eapcore.models.forward import run_with_senders
    from eapcore.models.load import load
    from eapcore.models.model import Model
    from eapcore.patching.circuits import run_circuit
    from eapcore.tasks import PromptPairs

__version__ = "0.1.0"

_WHERE = {
    "Circuit": "eapcore.graph.circuit",
    "EdgeScores": "eapcore.graph.scores",
    "Graph": "eapcore.graph",
    "Model": "eapcore.models.model",
    "PromptPairs": "eapcore.tasks",
    "attribute": "eapcore.evaluation.screened",
    "dense_bytes": "eapcore.attribution.plan",
    "edge_scores": "eapcore.kernels.torch_ops",
    "load": "eapcore.models.load",
    "receiver_grads": "eapcore.kernels.torch_ops",
    "run_circuit": "eapcore.patching.circuits",
    "run_with_senders": "eapcore.models.forward",
}
__all__ = [
    "Circuit",
    "EdgeScores",
    "Graph",
    "Model",
    "PromptPairs",
    "attribute",
    "dense_bytes",
    "edge_scores",
    "load",
    "receiver_grads",
    "run_circuit",
    "run_with_senders",
]


def __getattr__(name: str) -> object:
    """Import a public name when it is first used, so that `import eapcore` does no work."""
    if name not in _WHERE:
        raise AttributeError(f"module 'eapcore' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
