"""How much of a long piece of work is done."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int], None]


class Count:
    """Calls progress, where there is one, with how much of all is done."""

    def __init__(self, progress: Progress | None, total: int, done: int = 0) -> None:
        self.progress, self.total, self.done = progress, total, done

    def add(self, more: int) -> None:
        self.done += more
        if self.progress is not None:
            self.progress(self.done, self.total)

    def stage(self, share: int) -> Progress | None:
        """The progress of a part of the work that counts by itself, `share` of what is counted here."""
        if self.progress is None:
            return None
        before = self.done

        def report(done: int, total: int) -> None:
            self.add(before + share * done // total - self.done)

        return report
