"""The steps of a reproduction, kept in a folder: what is done is read again, and what was interrupted goes on."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from eapcore.execution.experiment import Experiment
from eapcore.execution.progress import Progress
from eapcore.graph.files import FORMAT_VERSION, finite, replacing, write_text

KEPT_IN = "steps"

Starting = Callable[[str, str], Progress | None]


class KeptSteps:
    """Steps that are kept in a folder, each as JSON with what it was asked for, so that none is done twice.

    Of several processes the first reads and writes them, and says to all what is done and what came of it.
    """

    def __init__(self, folder: Path, experiment: Experiment, progress: Starting) -> None:
        self.folder, self.progress, self.ranks = folder / KEPT_IN, progress, experiment.ranks
        if self.ranks.leads:
            self._open(folder, experiment)

    def _open(self, folder: Path, experiment: Experiment) -> None:
        identity = {key: _plain(value) for key, value in experiment.identity().items()}
        began = self.folder / "of.json"
        if began.exists():
            other = _read(began).get("identity")
            before = other if isinstance(other, dict) else {}
            changed = [key for key, value in identity.items() if before.get(key) != value]
            if changed:
                raise ValueError(
                    f"{folder} holds a reproduction with another {' and another '.join(changed)}: give --out another "
                    "folder, or delete it"
                )
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write(began, {"identity": identity})

    def __call__(self, name: str, asked: Mapping[str, Any], make: Callable[[], Any]) -> Any:
        """What a step makes, as JSON has it, read where the same was made before."""
        path, asked, leads = self.folder / f"{name}.json", _plain(asked), self.ranks.leads
        done = self.ranks.first(self._done(path, asked) if leads else None)
        if done is None:
            done = {"made": make()}
            if leads:
                done = {"asked": asked, "made": _plain(done["made"])}
                self._write(path, {**done, "sha256": _checksum(done)})
            done = self.ranks.first(done if leads else None)
        return done["made"]

    @staticmethod
    def _done(path: Path, asked: Mapping[str, Any]) -> dict[str, Any] | None:
        """What the file of a step holds, if it was asked the same."""
        if not path.exists():
            return None
        kept = _read(path)
        if kept.get("sha256") != _checksum(kept):
            raise ValueError(f"{path} is not as a reproduction wrote it: delete it, and the step is done again")
        return kept if kept["asked"] == asked else None

    def forget(self, name: str) -> None:
        """Do a step again."""
        (self.folder / f"{name}.json").unlink(missing_ok=True)

    def begun(self, name: str) -> Path:
        """Where a step keeps what it has done of its work."""
        return self.folder / f"{name}.begun"

    def ended(self, name: str) -> None:
        if self.ranks.leads:
            shutil.rmtree(self.begun(name), ignore_errors=True)

    def _write(self, path: Path, content: Mapping[str, Any]) -> None:
        head = {"format": "eapcore-reproduction-step", "format_version": FORMAT_VERSION}
        with replacing(path) as temporary:
            write_text(temporary, finite({**head, **content}))


def _plain(value: Any) -> Any:
    """A value as it comes back from JSON."""
    return json.loads(json.dumps(finite(value)))


def _checksum(content: Mapping[str, Any]) -> str:
    text = json.dumps([content.get("asked"), content.get("made")], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} must be what a reproduction wrote, but it cannot be read: {error}") from error
