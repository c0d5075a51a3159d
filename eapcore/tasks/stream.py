"""A task file that is larger than memory, read a window of pairs at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path

from eapcore.tasks.files import Encode, pairs_of
from eapcore.tasks.pairs import PromptPairs
from eapcore.tasks.rows import blocks, count_rows, shown

WINDOW = 4096  # pairs that are put in order together: enough for batches of one shape, few enough to keep in memory
STREAMED = (".jsonl", ".parquet")


class PairStream:
    """The pairs of a JSONL or Parquet file, a window at a time; `attribute` takes it as a task.

    name, n_pairs, content_hash: of the file, which is read once for them.
    """

    seed = None

    def __init__(
        self,
        path: str | Path,
        encode: Encode | None = None,
        *,
        n: int | None = None,
        corruption: str | None = None,
        window: int = WINDOW,
    ) -> None:
        """path, encode, n, corruption: as `files.read_pairs`. window: pairs that are put in order together.

        Raises:
            ValueError: another kind of file, an empty one, or no window.
            OSError: the file cannot be read.
        """
        self.path, self.encode, self.corruption, self.window = Path(path), encode, corruption, window
        if self.path.suffix.lower() not in STREAMED:
            raise ValueError(f"a stream of pairs must end in {' or '.join(STREAMED)}, got {shown(self.path.name)}")
        if window < 1:
            raise ValueError(f"window must be at least 1 pair, got {window}")
        rows, found = count_rows(self.path)
        self.n_pairs = rows if n is None else min(n, rows)
        self.content_hash = hashlib.sha256(f"{found} {self.n_pairs} {window} {corruption}".encode()).hexdigest()[:16]
        if not self.n_pairs:
            raise ValueError(f"the task {shown(self.path.name)} is empty: at least one prompt pair is needed")

    @property
    def name(self) -> str:
        return self.path.name

    def __len__(self) -> int:
        return self.n_pairs

    @cached_property
    def first(self) -> PromptPairs:
        """The first window."""
        return next(self.windows(lambda number: True))[1]

    def windows(self, wanted: Callable[[int], bool]) -> Iterator[tuple[int, PromptPairs]]:
        """The windows that are wanted, by number; the others are skipped without being looked at.

        Raises:
            ValueError: as `files.read_pairs`, when the window is reached.
        """
        for number, rows in enumerate(blocks(self.path, self.window, self.n_pairs, wanted)):
            if rows is not None:
                yield number, pairs_of(rows, self.path, self.encode, self.corruption)
