"""Tasks: prompt pairs with their answers, built in or from a file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from eapcore.tasks import sort, toy_induction, toy_ioi
from eapcore.tasks.files import Encode, read_pairs
from eapcore.tasks.pairs import PromptPairs
from eapcore.tasks.rows import ENDINGS, shown
from eapcore.text.tokenizer import Tokenizer

__all__ = ["TASKS", "PromptPairs", "Task", "find_pairs"]


@dataclass(frozen=True, slots=True)
class Task:
    """A built-in task. generate(n, seed) draws its pairs; metric is the one it is judged by."""

    description: str
    generate: Callable[[int, int], PromptPairs]
    metric: str = "logit_diff"


TASKS: dict[str, Task] = {
    "toy-ioi": Task("indirect objects, for the model toy-ioi", toy_ioi.generate),
    "toy-induction": Task("induction, for the model toy-induction", toy_induction.generate),
    "sort": Task("sorting six digits, for gpt-nano-sort", sort.generate),
}


def find_pairs(
    task: str | Path, *, n: int | None, seed: int, encode: Encode | None = None, corruption: str | None = None
) -> PromptPairs:
    """The pairs of a built-in task by name, or of a file.

    Args:
        task: a name out of TASKS, or a path.
        n: how many pairs; None is 64 for a built-in task and all of a file.
        seed: of the draw; a file is read in order.
        encode: text → token ids for a file with text, best a `Tokenizer`.
        corruption: which corrupt prompts of a file that has several, see `files.read_pairs`.

    Raises:
        ValueError: an unknown name, n < 1, a file that `files.read_pairs` refuses, or a tokenizer whose `bos` was set
            where no prompt is text.
    """
    if n is not None and n < 1:
        raise ValueError(f"n must be at least 1 pair, got {n}")
    if str(task) in TASKS:
        if corruption is not None:
            raise ValueError(f"a corruption is chosen of a file, but {task} is a built-in task")
        pairs = TASKS[str(task)].generate(64 if n is None else n, seed)
    elif not Path(task).is_file():
        raise ValueError(
            f"task must be one of {', '.join(TASKS)} or a {', '.join(ENDINGS[:-1])} or {ENDINGS[-1]} file, got "
            f"{shown(str(task), 300)}"
        )
    else:
        pairs = read_pairs(task, encode, n=n, corruption=corruption)
    if isinstance(encode, Tokenizer) and encode.bos != "auto" and "bos" not in pairs.details:
        raise ValueError(f"bos is for prompts as text, but those of {pairs.name} are token ids: leave it at auto")
    return pairs
