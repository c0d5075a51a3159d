"""What the commands print and write."""

from __future__ import annotations

import argparse
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from eapcore.cli.process import STOP, log_event, logged_as_json

if TYPE_CHECKING:
    from eapcore.graph.scores import EdgeScores, NodeScores
    from eapcore.models.model import Model
    from eapcore.tasks.pairs import PromptPairs
    from eapcore.text.tokenizer import Tokenizer

_REPORT = 5.0  # seconds between two lines of progress in a log
_PROMPTS = 24  # pairs that prompts.json has
_FEW, _TOKENS = 6, 48  # answers and changes, and tokens, of the first pair that are shown


def scored_heading(model: Model, pairs: PromptPairs, scores: EdgeScores | NodeScores, seconds: float) -> str:
    from eapcore.graph.scores import EdgeScores

    graph = model.graph
    if isinstance(scores, EdgeScores):
        what = f"{graph.n_edges} edges ({graph.n_senders} senders × {graph.n_receivers} receivers)"
    else:
        units = f" and {scores.units.numel()} hidden units" if scores.units is not None else ""
        what = f"{graph.n_senders} nodes{units}"
    impl = scores.meta.get("impl")  # none where every edge was patched
    return (
        f"{heading(model, pairs, scores.meta['metric']['name'], scores.meta['task']['n_pairs'])}\n"
        f"scored   {what} by {method(scores)}{f', kernels {impl}' if impl else ''}, in {seconds:.2f} s"
    )


def method(scores: EdgeScores | NodeScores) -> str:
    """The method's name with what was chosen of it otherwise than it is by itself."""
    from eapcore.graph.scores import EdgeScores

    found = scores.meta.get("method") or {}
    where = found.get("gradient_at", "clean")
    parts = [found.get("name", "unnamed")] + ([f"gradient at {where}"] if where != "clean" else [])
    if isinstance(scores, EdgeScores) and scores.exact is not None:
        parts.append(f"{int(scores.exact.sum())} edges exact")
    return ", ".join(parts)


def score_table(what: str, rows: Sequence[tuple[str, float]]) -> str:
    width = max(len(what), *(len(name) for name, _ in rows))
    lines = [f"\n{'rank':>6}  {what:<{width}}  {'score':>12}"]
    lines += [f"{rank:>6}  {name:<{width}}  {score:>12.6g}" for rank, (name, score) in enumerate(rows, 1)]
    return "\n".join(lines)


def enough_prompts(scores: EdgeScores | NodeScores, n: int) -> str:
    """Whether the pairs were enough for the circuit of the top n edges, in one line; "" where nothing is known."""
    from eapcore.graph.scores import ENOUGH, FEWEST, EdgeScores

    pairs = scores.meta["task"]["n_pairs"]
    if not isinstance(scores, EdgeScores) or n < 1:
        return ""
    if pairs < FEWEST:
        given = "one pair does" if pairs == 1 else f"{pairs} pairs do"
        return f"prompts  not judged: {given} not say how circuits vary: give at least {FEWEST}\n"
    if scores.jaccard is None:
        return "prompts  not judged: no standard errors were kept\n"
    found = float(scores.jaccard[n - 1])
    verdict, word = ("enough", "at least") if found >= ENOUGH else ("too few", "less than")
    return (
        f"prompts  {verdict}: drawn again, {pairs} pairs give top {n} edges with a Jaccard index of {found:.2f} on "
        f"average, {word} {ENOUGH:g}\n"
    )


def rounding(model: Model, pairs: PromptPairs, metric: str) -> str:
    """How far half precision may move the scores, in one line; "" in float32 and float64."""
    from eapcore.evaluation.precision import PAIRS, rounding_error

    name = str(model.dtype).removeprefix("torch.")
    try:
        error = rounding_error(model, pairs, metric)
    except ValueError as reason:  # no fault of the scores, which are there
        return f"dtype    {name}: not compared with float32 by the gradient at the clean run: {reason}\n"
    if error == 0:
        return ""
    if error is None:
        known = "1 to 3 %" if name == "bfloat16" else "0.1 to 0.5 %"
        return f"dtype    {name}: no memory to compare with float32; on a language model they were {known} off\n"
    pairs_said = "one pair" if len(pairs) == 1 else f"{PAIRS} pairs"
    return f"dtype    {name}: on {pairs_said} all scores together are {error:.1%} off those in float32\n"


def figure(value: float | None, form: str = ".4g") -> str:
    """A number as people read it; a dash for none, or one that is not defined."""
    return "–" if value is None or math.isnan(value) else format(value, form)


class Shown:
    """stdout or stderr of a command: what cannot be shown is lost, never the result.

    Characters that the stream's encoding lacks, and control characters, which files can hold, become escapes; `fault`
    is the first error of a stream that takes no more.
    """

    def __init__(self, stream: TextIO, kept: str) -> None:
        self.stream = stream
        self.fault: Exception | None = None
        controls = (*range(32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A))
        self.escapes = {c: chr(c).encode("unicode_escape").decode() for c in controls if chr(c) not in kept}

    def write(self, text: str) -> int:
        shown = text.translate(self.escapes)
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        self._try(self.stream.write, shown.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, call: Callable[..., object], *arguments: str) -> None:
        if self.fault is None:
            try:
                call(*arguments)
            except (OSError, ValueError) as error:  # ValueError: it was closed
                self.fault = error

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def shown_safely() -> Iterator[tuple[Shown, Shown]]:
    """stdout and stderr as `Shown` for a command; descriptors that are closed lead nowhere, rather than into the next
    file that is opened."""
    before = sys.stdout, sys.stderr
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest that is free
    with ExitStack() as stack:
        nowhere = stack.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
        out, err = Shown(sys.stdout or nowhere, "\n\t"), Shown(sys.stderr or nowhere, "\n\t\r")
        sys.stdout, sys.stderr = out, err
        try:
            yield out, err
        finally:
            out.flush()
            if out.fault is not None and not isinstance(out.fault, BrokenPipeError):  # | head has seen enough
                print(f"eapcore: not all could be printed: {out.fault}", file=err)
            err.flush()
            sys.stdout, sys.stderr = before
            for shown in (out, err):
                if shown.fault is not None:  # what is still buffered fails once more when Python ends
                    with suppress(OSError, ValueError):
                        os.dup2(nowhere.fileno(), shown.stream.fileno())


class Progress:
    """A progress bar on a terminal, JSON with --log-json, else nothing; and the place where SIGTERM is looked for.

    total: None until the first report of what is done says it.
    """

    def __init__(self, text: str, total: int | None, unit: str = "pair") -> None:
        from tqdm import tqdm

        self.json = logged_as_json() and not STOP.quiet
        off = self.json or STOP.quiet or not sys.stderr.isatty()
        self.bar = tqdm(total=total, desc=text, unit=unit, leave=False, disable=off)
        self.text, self.unit, self.began = text, unit, time.monotonic()
        self.first: int | None = None
        self.reported = self.began

    def __enter__(self) -> Callable[[int, int], None]:
        STOP.at_work += 1
        return self.show

    def show(self, done: int, total: int) -> None:
        self.bar.total = total
        if not self.bar.disable and (ranks := _apart()) is not None:
            self.bar.set_postfix_str(f"by rank {', '.join(map(str, ranks))}", refresh=False)
        self.bar.update(done - self.bar.n)
        if self.json:
            self._log(done, total)
        STOP.check()

    def _log(self, done: int, total: int) -> None:
        """What is done of how much, how many a second since the first report, and the seconds that are left."""
        now = time.monotonic()
        if self.first is not None and done < total and now - self.reported < _REPORT:
            return
        if self.first is None:
            self.first, self.began = done, now
        self.reported = now
        seconds = now - self.began
        rate = (done - self.first) / seconds if seconds > 0 and done > self.first else None
        left = None if rate is None else round((total - done) / rate, 1)
        fields: dict[str, Any] = {"done": done, "total": total, "unit": self.unit, "left": left}
        fields["rate"] = rate and round(rate, 3)
        if (ranks := _apart()) is not None:
            fields["ranks"] = ranks
        log_event("progress", what=self.text, **fields)

    def __exit__(self, *args: object) -> None:
        STOP.at_work -= 1
        self.bar.close()


def _apart() -> list[int] | None:
    """What each of several processes has done, where they differ much."""
    from eapcore.execution.distributed import link_now

    link = link_now()
    return None if link is None else link.apart()


class Stages:
    """One bar after the other, for work of several stages that begin by name."""

    def __init__(self) -> None:
        self.bar: Progress | None = None

    def __enter__(self) -> Callable[[str, str], Callable[[int, int], None]]:
        return self.begin

    def begin(self, text: str, unit: str) -> Callable[[int, int], None]:
        self.__exit__()
        self.bar = Progress(text, None, unit)
        return self.bar.__enter__()

    def __exit__(self, *args: object) -> None:
        if self.bar is not None:
            self.bar.__exit__()
        self.bar = None


_READ = ("model", "tokenizer", "task", "reference_task", "scores", "circuit", "true_circuit")


def check_out(args: argparse.Namespace, files: Sequence[str] = ()) -> None:
    """Fail before the work where what a command writes, --out or `files` in it, cannot be written or is read by it."""
    from eapcore.models.load import TOYS

    out: Path = args.out
    if files and out.exists() and not out.is_dir():
        raise NotADirectoryError(f"--out must be a folder, or a place for one, but {out} is a file: choose another")
    outputs = [out / name for name in files] or [out]
    places = [_place("--out", path) for path in outputs]
    kept = getattr(args, "resume", None)
    if kept is not None and kept.resolve() in places:
        raise ValueError(
            f"--out would write a file where --resume keeps a folder, {kept}: give one of them another name"
        )
    if kept is not None:
        if kept.is_symlink() and not kept.exists():
            raise FileNotFoundError(f"--resume: {kept} is a link to nothing; choose another place")
        _place("--resume", kept / "done")
    if (pairs := getattr(args, "pairs_out", None)) is not None:
        _place("--pairs-out", pairs / "index.json")
    for option in _READ:
        read = getattr(args, option, None)
        if read is not None:
            check_apart(outputs, TOYS.get(str(read), Path(read).expanduser()), f"--{option.replace('_', '-')}")


def _place(option: str, path: Path) -> Path:
    from eapcore.graph.files import target

    try:
        return target(path)
    except OSError as error:
        raise type(error)(f"{option}: {error}") from error


def check_apart(outputs: Sequence[Path], read: Path, option: str) -> None:
    """Refuse to write over a file that is read, or over one in a folder that is read, unless eapcore wrote it."""
    from eapcore.graph.files import is_ours

    for path in outputs:
        if not path.exists() or not read.exists():
            continue
        inside = read.is_dir() and any(path.samefile(file) for file in read.iterdir() if file.exists())
        if path.samefile(read) or (inside and (option == "--resume" or not is_ours(path))):
            raise ValueError(f"--out would write over {path}, which {option} reads: give it another name by --out")


def heading(model: Model, pairs: PromptPairs, metric: str, count: int | None = None) -> str:
    """What is named: the model, the task and the metric; and what is read: the fields of a file, the first pair.

    count: of the task's pairs, where these are only its first.
    """
    config = model.config
    kind = "attention-only" if config.attn_only else model.family
    said = {"seed": pairs.seed, **{what: text for what, text in pairs.details.items() if what != "fields"}}
    about = "".join(f", {what} {text}" for what, text in said.items() if text is not None)
    fields = pairs.details.get("fields")
    return (
        f"model    {model.name}: {kind}, {config.n_layers} layers × {config.n_heads} heads, d_model {config.d_model}, "
        f"{str(model.dtype).removeprefix('torch.')} on {model.where}\n"
        f"task     {pairs.name}: {len(pairs) if count is None else count} prompt pairs{about}; metric {metric}\n"
        + ("" if fields is None else f"fields   {fields}\n")
        + first_pair(pairs, model.tokenizer)
    )


def first_pair(pairs: PromptPairs, tokenizer: Tokenizer | None) -> str:
    """The first pair as it was understood: its tokens, where they differ, where the metric reads, and what is right."""
    length, reads = int(pairs.lengths[0]), int(pairs.positions[0])
    clean, corrupt = (prompts[0, :length].tolist() for prompts in (pairs.clean, pairs.corrupt))
    right, wrong = ([i for i in ids[0].tolist() if i >= 0] for ids in (pairs.answers, pairs.wrong))
    own = token_text(pairs, tokenizer)

    def text(i: int) -> str:
        return str(i) if (piece := own(i)) is None else repr(piece)

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
        f"{text(clean[reads])}: right {named(right) or 'none'}, wrong {named(wrong) or 'none'}" + _places(pairs)
    )


def _places(pairs: PromptPairs) -> str:
    """A line with the places of the first pair that have a name."""
    at = [f"{name} {int(places[0])}" for name, places in pairs.places.items() if int(places[0]) >= 0]
    return f"\n         places {', '.join(at)}" if at else ""


def token_text(pairs: PromptPairs, tokenizer: Tokenizer | None) -> Callable[[int], str | None]:
    """A token's text where that is known, without asking a network for it; None where it is not."""
    vocab = pairs.vocab
    if vocab is not None:
        return lambda i: vocab[i] if 0 <= i < len(vocab) else None
    if tokenizer is None or not ("bos" in pairs.details or tokenizer.at_hand):
        return lambda i: None

    def piece(i: int) -> str | None:
        try:
            return tokenizer.pieces([i])[0]
        except (ValueError, RuntimeError, OSError, OverflowError):  # ids need no tokenizer that can be read
            return None

    return piece


def described_prompts(args: argparse.Namespace, model: Model, pairs: PromptPairs, metric: str) -> dict[str, Any]:
    """prompts.json: the first pairs as tokens, where they are read, what is right and wrong behind them."""
    own = token_text(pairs, model.tokenizer)

    def text(i: int) -> str:
        return str(i) if (piece := own(i)) is None else piece

    task = {"name": pairs.name, "seed": pairs.seed, "details": dict(pairs.details)}
    shown = pairs.as_tokens(_PROMPTS, text)
    return {"command": args.written, "task": task, "metric": metric, "n_pairs": len(pairs), "pairs": shown}


class Saved(Protocol):
    def save(self, path: Path) -> None: ...


def write(args: argparse.Namespace, result: Saved, path: Path | None = None) -> None:
    """Write a result to --out or elsewhere, before anything is printed of it; where it cannot be written, in another
    place, and say where. Of several processes that share the work the first alone writes."""
    path = path or args.out
    if not args.leads:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        result.save(path)
    except OSError as error:
        kept = None
        try:
            kept = Path(tempfile.mkdtemp(prefix="eapcore-")) / path.name
            result.save(kept)
        except OSError:
            if kept is not None:
                shutil.rmtree(kept.parent, ignore_errors=True)
            raise error from None
        raise OSError(
            f"{path} could not be written, {error.strerror or error}: the result is kept in {kept}"
        ) from error


def table(header: Sequence[str], rows: Sequence[Sequence[str | float | int]]) -> str:
    """Rows under a header, text on the left, numbers on the right."""
    cells = [[figure(c, ".6g") if isinstance(c, float) else str(c) for c in row] for row in rows]
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
