"""First-order attribution: scores of every edge, node or neuron from a few forward and backward passes."""

from eapcore.attribution.attribute import attribute
from eapcore.attribution.methods import METHODS
from eapcore.execution.experiment import Task, describe

__all__ = ["METHODS", "Task", "attribute", "describe"]
