"""What Syed, Rager, Conmy 2023 publish of a task: with which model and prompts, and the numbers that came out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Moments = tuple[float, float]  # mean, standard deviation


@dataclass(frozen=True)
class Published:
    """A task as the paper ran it, and its numbers; scores have the sign of ours, negative = needed.

    model: a Hub id. n_pairs: prompt pairs. auc: the area under the ROC by method ("eap", "patch", "acdc" by the task's
    metric, "acdc kl"), edges inside components counted too. threshold: of |score|, of the subnetwork that is shown.
    normalised: scores are in units of metric(clean) − metric(corrupt). fit: (slope, intercept, R²) between exact
    patching and scores. moments: of the scores "inside" and "outside" the circuit. beyond: (bound, how many edges
    outside the circuit have a larger |score|). roles: of the scores of the circuit's edges by what their sender does.
    bent: edges whose way from clean to corrupt is shown. curve, areas: the thresholds at which the ROC of "eap" was
    drawn, and its area by rule; empty where they are not known.
    """

    model: str
    n_pairs: int
    auc: Mapping[str, float]
    threshold: float
    normalised: bool = False
    fit: tuple[float, float, float] | None = None
    moments: Mapping[str, Moments] = field(default_factory=dict)
    beyond: tuple[float, int] | None = None
    roles: Mapping[str, Moments] = field(default_factory=dict)
    bent: tuple[str, ...] = ()
    curve: tuple[float, ...] = ()
    areas: Mapping[str, float] = field(default_factory=dict)
