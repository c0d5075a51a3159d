"""Tasks: prompt pairs with their answers, built in or from a file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eapcore.tasks import agreement, capitals, docstring, greater_than, ioi, sort, toy_induction, toy_ioi
from eapcore.tasks.files import read_pairs
from eapcore.tasks.pairs import PromptPairs
from eapcore.tasks.published import Published
from eapcore.tasks.rows import ENDINGS, shown
from eapcore.tasks.truth import Truth
from eapcore.text.tokenizer import Tokenizer, tokenizer_of

__all__ = ["TASKS", "PromptPairs", "Task", "find_pairs"]


_MOST = 1_000_000


@dataclass(frozen=True, slots=True)
class Task:
    """A built-in task, and the metric that it is judged by.

    generate: draws pairs by their number and a seed; where there are corruptions to choose from, the prompts are text
    for any tokenizer, and it takes a tokenizer and a corruption too. The first corruption is the default. truth: the
    published circuit, and published: the numbers that came of it, where there are some.
    """

    description: str
    generate: Callable[..., PromptPairs]
    metric: str = "logit_diff"
    corruptions: tuple[str, ...] = ()
    truth: Callable[[], Truth] | None = None
    published: Published | None = None


TASKS: dict[str, Task] = {
    "toy-ioi": Task("indirect objects, for the model toy-ioi", toy_ioi.generate),
    "toy-induction": Task("induction, for the model toy-induction", toy_induction.generate),
    "sort": Task("sorting six digits, for gpt-nano-sort", sort.generate),
    "ioi": Task(
        "indirect objects, as text", ioi.generate, "logit_diff", ioi.CORRUPTIONS, ioi.true_circuit, ioi.PUBLISHED
    ),
    "greater-than": Task(
        "years, as text",
        greater_than.generate,
        "prob_diff",
        greater_than.CORRUPTIONS,
        greater_than.true_circuit,
        greater_than.PUBLISHED,
    ),
    "docstring": Task(
        "a docstring's arguments, as text",
        docstring.generate,
        "logit_margin",
        docstring.CORRUPTIONS,
        docstring.true_circuit,
        docstring.PUBLISHED,
    ),
    "agreement": Task("subject and verb, as text", agreement.generate, corruptions=agreement.CORRUPTIONS),
    "capitals": Task("countries and capitals, as text", capitals.generate, corruptions=capitals.CORRUPTIONS),
}


def check_task(task: str | Path, n: int | None = None, corruption: str | None = None) -> None:
    """ValueError for what is neither a name out of TASKS nor a file, and for what `find_pairs` would not draw of it."""
    if n is not None and n < 1:
        raise ValueError(f"n must be at least 1 pair, got {n}")
    known = TASKS.get(str(task))
    if known is not None and n is not None and n > _MOST:
        raise ValueError(f"n must be at most {_MOST} pairs of a built-in task, got {n}")
    if known is not None and corruption is not None and corruption not in known.corruptions:
        which = f"must be one of {', '.join(known.corruptions)}" if known.corruptions else "cannot be chosen"
        raise ValueError(f"the corruption of {task} {which}, got {shown(corruption, 100)}")
    if known is not None or Path(task).is_file():
        return
    what = "a folder" if Path(task).is_dir() else "a file that is not there"
    named = f", {what}" if Path(task).suffix.lower() in ENDINGS else ""
    raise ValueError(
        f"task must be one of {', '.join(TASKS)} or a {', '.join(ENDINGS[:-1])} or {ENDINGS[-1]} file, got "
        f"{shown(str(task), 300)}{named}"
    )


def find_pairs(
    task: str | Path, *, n: int | None, seed: int, encode: Any = None, corruption: str | None = None
) -> PromptPairs:
    """The pairs of a built-in task by name, or of a file.

    Args:
        task: a name out of TASKS, or a path.
        n: how many pairs; None is 64 for a built-in task and all of a file.
        seed: of the draw; a file is read in order.
        encode: for text, what `PromptPairs.from_text` takes; for a file, also any function of text → token ids.
        corruption: of a task or a file that has several; None is a task's first, for a file see `files.read_pairs`.

    Raises:
        ValueError: an unknown name or corruption, n < 1, a file that `files.read_pairs` refuses, words of several
            tokens that a task needs as one, or a tokenizer whose `bos` was set where no prompt is text.
    """
    check_task(task, n, corruption)
    known = TASKS.get(str(task))
    if known is not None and known.corruptions:
        if encode is None:
            raise ValueError(f"the task {task} is text, but this model has no tokenizer here: give --tokenizer FOLDER")
        encode = tokenizer_of(encode, "encode")
        pairs = known.generate(64 if n is None else n, seed, encode, corruption or known.corruptions[0])
    elif known is not None:
        pairs = known.generate(64 if n is None else n, seed)
    else:
        pairs = read_pairs(task, encode, n=n, corruption=corruption)
    if isinstance(encode, Tokenizer) and encode.bos != "auto" and "bos" not in pairs.details:
        raise ValueError(f"bos is for prompts as text, but those of {pairs.name} are token ids: leave it at auto")
    return pairs
