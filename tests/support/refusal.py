"""Bad input is refused with one sentence that says what was expected and what came."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


def refused(match: str, call: Callable[..., Any], *args: Any, error: type[Exception] = ValueError, **how: Any) -> str:
    """What a call says that raises such an error; the message must match."""
    with pytest.raises(error, match=match) as caught:
        call(*args, **how)
    assert "\n" not in str(caught.value)
    return str(caught.value)
