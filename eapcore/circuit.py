"""`Circuit` and `EdgeScores` under the name that they had; they live in `eapcore.graph`."""

from eapcore.graph.circuit import Circuit as Circuit
from eapcore.graph.scores import EdgeScores as EdgeScores
