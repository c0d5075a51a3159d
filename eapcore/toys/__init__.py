"""The toy models: small transformers that `python -m eapcore.toys.train` trained, stored beside this file."""

from __future__ import annotations

from pathlib import Path

NAMES = ("ioi", "induction")


def folder(name: str) -> Path:
    """Where a toy model lies: config.json, model.safetensors and vocab.json; ValueError for an unknown name."""
    if name not in NAMES:
        raise ValueError(f"a toy model is one of {', '.join(NAMES)}, got {name!r}")
    return Path(__file__).parent / name
