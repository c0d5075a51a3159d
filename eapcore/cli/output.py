"""What the commands print and write."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from eapcore.graph.scores import EdgeScores, NodeScores
    from eapcore.models.model import Model
    from eapcore.tasks.pairs import PromptPairs
    from eapcore.text.tokenizer import Tokenizer

_FEW, _TOKENS = 6, 48  # answers and changes, and tokens, of the first pair that are shown


def scored_heading(model: Model, pairs: PromptPairs, scores: EdgeScores | NodeScores, seconds: float) -> str:
    from eapcore.graph.scores import EdgeScores

    graph = model.graph
    if isinstance(scores, EdgeScores):
        what = f"{graph.n_edges} edges ({graph.n_senders} senders × {graph.n_receivers} receivers)"
    else:
        units = f" and {scores.units.numel()} hidden units" if scores.units is not None else ""
        what = f"{graph.n_senders} nodes{units}"
    return (
        f"{heading(model, pairs, scores.meta['metric']['name'])}\n"
        f"scored   {what} by {scores.meta['method']['name']}, kernels {scores.meta['impl']}, in {seconds:.2f} s"
    )


def score_table(what: str, rows: Sequence[tuple[str, float]]) -> str:
    width = max(len(what), *(len(name) for name, _ in rows))
    lines = [f"\n{'rank':>6}  {what:<{width}}  {'score':>12}"]
    lines += [f"{rank:>6}  {name:<{width}}  {score:>12.6g}" for rank, (name, score) in enumerate(rows, 1)]
    return "\n".join(lines)


class Progress:
    """A progress bar on a terminal, nothing in a pipe. total: None until the first report of what is done says it."""

    def __init__(self, text: str, total: int | None, unit: str = "pair") -> None:
        from tqdm import tqdm

        self.bar = tqdm(total=total, desc=text, unit=unit, leave=False, disable=not sys.stderr.isatty())

    def __enter__(self) -> Callable[[int, int], None]:
        return self.show

    def show(self, done: int, total: int) -> None:
        self.bar.total = total
        self.bar.update(done - self.bar.n)

    def __exit__(self, *args: object) -> None:
        self.bar.close()


_READ = ("task", "reference_task", "scores", "circuit", "true_circuit", "resume")


def check_out(args: argparse.Namespace) -> None:
    """Fail before the work where --out cannot be written, or is a file that another option reads."""
    path: Path = args.out
    if path.is_dir():
        raise IsADirectoryError(f"--out must be a file to write, but {path} is a folder")
    if path.exists() and not path.is_file():
        raise OSError(f"--out must be a file to write, but {path} is no regular file")
    check_writable(path.parent)
    for option in _READ:
        read = getattr(args, option, None)
        if read is not None and (option == "resume" or Path(read).is_file()) and Path(read).resolve() == path.resolve():
            named = f"--{option.replace('_', '-')}"
            raise ValueError(f"--out would write over {path}, which {named} reads: give it another name by --out")


def check_writable(folder: Path) -> None:
    """Fail before the work rather than after it; a folder that is not there yet is made when the work is done."""
    import os

    folder = folder.absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        fault = "cannot be written to" if existing.is_dir() else "is a file"
        raise OSError(f"--out must lie in a folder that can be written to, but {existing} {fault}: choose another")


def heading(model: Model, pairs: PromptPairs, metric: str) -> str:
    """What is named: the model, the task and the metric; and what is read: the fields of a file, the first pair."""
    config = model.config
    kind = "attention-only" if config.attn_only else model.family
    said = {"seed": pairs.seed, **{what: text for what, text in pairs.details.items() if what != "fields"}}
    about = "".join(f", {what} {text}" for what, text in said.items() if text is not None)
    fields = pairs.details.get("fields")
    return (
        f"model    {model.name}: {kind}, {config.n_layers} layers × {config.n_heads} heads, d_model {config.d_model}, "
        f"{str(model.dtype).removeprefix('torch.')} on {model.device}\n"
        f"task     {pairs.name}: {len(pairs)} prompt pairs{about}; metric {metric}\n"
        + ("" if fields is None else f"fields   {fields}\n")
        + first_pair(pairs, model.tokenizer)
    )


def first_pair(pairs: PromptPairs, tokenizer: Tokenizer | None) -> str:
    """The first pair as it was understood: its tokens, where they differ, where the metric reads, and what is right."""
    length, reads = int(pairs.lengths[0]), int(pairs.positions[0])
    clean, corrupt = (prompts[0, :length].tolist() for prompts in (pairs.clean, pairs.corrupt))
    right, wrong = ([i for i in ids[0].tolist() if i >= 0] for ids in (pairs.answers, pairs.wrong))
    text = _pieces(pairs, tokenizer)

    def named(ids: Sequence[int]) -> str:
        few = [f"{text(i)} ({i})" if text(i) != str(i) else str(i) for i in ids[:_FEW]]
        return ", ".join(few) + (f" and {len(ids) - _FEW} more" if len(ids) > _FEW else "")

    changes = [place for place in range(length) if clean[place] != corrupt[place]]
    changed = [f"{text(clean[place])} → {text(corrupt[place])} at {place}" for place in changes[:_FEW]]
    more = f" and {len(changes) - _FEW} more" if len(changes) > _FEW else ""
    start = max(0, reads + 1 - _TOKENS)
    shown = ("… " if start else "") + " ".join(text(i) for i in clean[start : start + _TOKENS])
    shown += " …" if start + _TOKENS < length else ""
    return (
        f"first    {length} tokens: {shown}\n"
        f"         corrupt {', '.join(changed) + more if changes else 'the same'}; read at {reads}, behind "
        f"{text(clean[reads])}: right {named(right) or 'none'}, wrong {named(wrong) or 'none'}"
    )


def _pieces(pairs: PromptPairs, tokenizer: Tokenizer | None) -> Callable[[int], str]:
    """What shows a token: its text where that is known, without asking a network for it."""
    vocab = pairs.vocab
    if vocab is not None:
        return lambda i: repr(vocab[i]) if 0 <= i < len(vocab) else str(i)
    if tokenizer is None or not ("bos" in pairs.details or tokenizer.at_hand):
        return str

    def piece(i: int) -> str:
        try:
            return repr(tokenizer.pieces([i])[0])
        except (ValueError, RuntimeError, OSError, OverflowError):  # ids need no tokenizer that can be read
            return str(i)

    return piece


class Saved(Protocol):
    def save(self, path: Path) -> None: ...


def write(result: Saved, path: Path) -> None:
    """Write a result, before anything is printed of it: what prints may fail."""
    path.parent.mkdir(parents=True, exist_ok=True)
    result.save(path)


def table(header: Sequence[str], rows: Sequence[Sequence[str | float | int]]) -> str:
    """Rows under a header, text on the left, numbers on the right."""
    cells = [[f"{c:.6g}" if isinstance(c, float) else str(c) for c in row] for row in rows]
    widths = [max(len(text) for text in column) for column in zip(header, *cells, strict=True)]
    left = [bool(rows) and isinstance(c, str) for c in (rows[0] if rows else header)]

    def line(row: Sequence[str]) -> str:
        return "  ".join(
            f"{text:<{w}}" if is_left else f"{text:>{w}}" for text, w, is_left in zip(row, widths, left, strict=True)
        ).rstrip()

    return "\n".join(["", *(line(row) for row in [header, *cells])])


def runs(args: argparse.Namespace, metric: str, values: dict[str, float]) -> str:
    """The metric on each run; the corrupt one is no end of the scale where another ablation is."""
    shown = [(name, value) for name, value in values.items() if name != "corrupt" or args.ablation == "corrupt"]
    return table(("run", metric), shown)


def mib(count: int) -> str:
    """Bytes for people."""
    return f"{count / 2**20:,.1f} MiB" if count < 2**30 else f"{count / 2**30:,.2f} GiB"
