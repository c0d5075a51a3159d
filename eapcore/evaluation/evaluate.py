"""Everything that is judged of one set of scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from eapcore.evaluation.completeness import Completeness
from eapcore.evaluation.faithfulness import Mib
from eapcore.evaluation.roc import Roc
from eapcore.evaluation.stability import Stability
from eapcore.graph.files import write_json
from eapcore.graph.scores import EdgeScores


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Everything that was judged of one set of scores."""

    mib: Mib
    rocs: Sequence[Roc] = ()
    completeness: Completeness | None = None
    minimality: EdgeScores | None = None
    stability: Stability | None = None

    def save(self, path: str | Path) -> None:
        write_json(path, "evaluation", self)
