"""Whether a file's tests can run in Triton's interpreter."""

from __future__ import annotations

import os

import eapcore.kernels as kernels


def not_interpreted(elsewhere: str) -> str:
    """ "" where kernels run in the interpreter, or why they do not; `elsewhere` says what tests compiled ones."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return f"these tests interpret; {elsewhere}"
    return kernels.available()["triton"]
