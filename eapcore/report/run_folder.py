"""What a run folder holds: scores, and what commands wrote beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eapcore.graph.circuit import Circuit
from eapcore.graph.files import _check_version, _NewerFormat
from eapcore.graph.scores import EdgeScores

# Each part of a report but the scores: the file that holds it, and how it is made.
PARTS = {
    "circuit": ("circuit.json", "eapcore run writes it"),
    "prompts": ("prompts.json", "eapcore run writes it"),
    "run": ("run.json", "eapcore run writes it"),
    "evaluation": ("evaluation.json", "eapcore evaluate --scores FOLDER/scores.safetensors --out FOLDER/{} writes it"),
    "verification": (
        "verification.json",
        "eapcore verify --scores FOLDER/scores.safetensors --out FOLDER/{} writes it",
    ),
    "reproduction": ("reproduction.json", "eapcore reproduce writes it"),
}
SCORES = "scores.safetensors"
_META = {
    "evaluation": ("mib", "signed", "meta"),
    "verification": ("meta", "scores"),
    "reproduction": ("meta",),
}  # where a part's header lies


@dataclass(frozen=True, slots=True)
class Run:
    """Scores, and what was written beside them; None for what is not there.

    name: of the folder or file. files: which file each part was read from. prompts, run, evaluation, verification,
    reproduction: the JSON of these files as it is (README, "Files").
    """

    scores: EdgeScores
    name: str = "scores"
    circuit: Circuit | None = None
    prompts: Mapping[str, Any] | None = None
    run: Mapping[str, Any] | None = None
    evaluation: Mapping[str, Any] | None = None
    verification: Mapping[str, Any] | None = None
    reproduction: Mapping[str, Any] | None = None
    files: Mapping[str, str] = field(default_factory=dict)

    @staticmethod
    def read(path: str | Path, scores: EdgeScores | None = None) -> Run:
        """Read a run folder, or a score file alone; scores: in place of those that the folder holds.

        A part's file is the one of its usual name, or else the newest JSON file in the folder that says it is one.

        Raises:
            ValueError: a file, which is named, that cannot be read, or a part that is of another graph than the scores.
            OSError: there is no folder or file, or no scores in it.
        """
        path = Path(path)
        if path.is_file():
            return Run(EdgeScores.load(path), path.name, files={"scores": path.name})
        if not path.is_dir():
            raise FileNotFoundError(f"a run folder or a score file was expected at {path}, but there is none")
        found = _scores(path) if scores is None else None
        loaded = EdgeScores.load(found) if found is not None else scores
        assert loaded is not None
        files, parts, circuit = {} if found is None else {"scores": found.name}, {}, None
        for part, file in _files(path).items():
            files[part] = file.name
            if part != "circuit":
                parts[part] = _json(file)
                continue
            circuit = Circuit.load(file)
            if circuit.graph != loaded.graph:
                raise ValueError(f"{file} is of {circuit.graph}, but the scores of {loaded.graph}: not of one run")
        own = _hash(loaded.meta, ())
        for part, content in {**parts, "circuit": None if circuit is None else circuit.meta}.items():
            found_hash = _hash(content, _META.get(part, ()))
            if None not in (own, found_hash) and own != found_hash:
                raise ValueError(f"{path / files[part]} is of another model than the scores: not of one run")
        return Run(loaded, path.resolve().name or str(path), circuit, files=files, **parts)

    @property
    def missing(self) -> dict[str, str]:
        """How each part that is not there is made; a run need be no reproduction, which needs no other."""
        spare = ("reproduction",) if self.reproduction is None else ("run",)
        absent = [part for part in PARTS if getattr(self, part) is None and part not in spare]
        return {part: PARTS[part][1].format(PARTS[part][0]) for part in absent}


def _hash(content: Any, keys: tuple[str, ...]) -> Any:
    """The content hash of the model that a file's header, under these keys, names; None where it names none."""
    for key in (*keys, "model", "content_hash"):
        content = content.get(key) if isinstance(content, Mapping) else None
    return content


def _scores(folder: Path) -> Path:
    """The score file of a folder."""
    scores = folder / SCORES
    if not scores.is_file():
        others = sorted(folder.glob("*.safetensors"))
        if len(others) != 1:
            found = ", ".join(other.name for other in others) or "no other score file"
            raise FileNotFoundError(f"a run folder holds {SCORES}, but {folder} has {found}: eapcore run writes one")
        (scores,) = others
    return scores


def _files(folder: Path) -> dict[str, Path]:
    """The file of each part that is there."""
    found = {part: folder / name for part, (name, _) in PARTS.items() if (folder / name).is_file()}
    others = [path for path in folder.glob("*.json") if path not in found.values()]
    for path in sorted(others, key=lambda path: (-path.stat().st_mtime_ns, path.name)):
        with path.open(encoding="utf-8", errors="replace") as file:
            start = file.read(200)
        for part in PARTS.keys() - found.keys():
            if f'"eapcore-{part}"' in start:
                found[part] = path
    return found


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or not str(content.get("format", "")).startswith("eapcore-"):
            raise ValueError("it says no format of it")
        _check_version(path, content.get("format_version"))
    except _NewerFormat:
        raise
    except ValueError as error:
        raise ValueError(f"{path} must be JSON that eapcore wrote, but it cannot be read: {error}") from error
    return content
