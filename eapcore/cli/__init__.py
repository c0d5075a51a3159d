"""The command line: one file a command, and what they share."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import eapcore.cli.acdc as acdc
import eapcore.cli.attribute as attribute
import eapcore.cli.evaluate as evaluate
import eapcore.cli.info as info
import eapcore.cli.mib as mib
import eapcore.cli.patch as patch
import eapcore.cli.path as path
import eapcore.cli.probe as probe
import eapcore.cli.report as report
import eapcore.cli.reproduce as reproduce
import eapcore.cli.run as run
import eapcore.cli.sweep as sweep
import eapcore.cli.verify as verify
from eapcore.cli.options import Help
from eapcore.cli.output import shown_safely
from eapcore.cli.process import Stopped, join, left, link_of, log_to, say, silent, stopping, told

_LONGEST = 1000  # characters of an error's message
COMMANDS = (run, attribute, info, patch, acdc, probe, path, evaluate, verify, report, mib, sweep, reproduce)


class _Parser(argparse.ArgumentParser):
    """One sentence for a bad argument, without the usage."""

    def error(self, message: str) -> NoReturn:
        first = os.environ.get("RANK", "0") == "0"  # of several processes one speaks
        self.exit(2, f"{self.prog}: {_one_line(message)} (--help explains)\n" if first else "")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0, 2 for bad input, 1 for an error of our own, 130 for Ctrl-C, 143 for
    SIGTERM."""
    _before_torch()
    with shown_safely():
        words = sys.argv[1:] if argv is None else argv
        args = _parse(words)
        args.written = _written(words)
        args.distributed, args.leads = False, True
        log_to(as_json=args.log_json)
        status, text = _run(args)
        if text:
            say(text)
        return status


def _parse(words: Sequence[str]) -> argparse.Namespace:
    parser = _parser()
    try:
        Path.cwd()
    except FileNotFoundError:  # torch's libraries end the process there
        parser.error("the current folder does not exist any more: change to one that does")
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError:  # files are not opened by such a name, nor can one stand in a file
            locale = sys.getfilesystemencoding()
            change = "rename what it names" if locale == "utf-8" else f"set PYTHONUTF8=1, this locale is {locale}"
            parser.error(f"arguments must be UTF-8, got {word!a}: {change}")
    return parser.parse_args(words)


def _before_torch() -> None:
    """What torch reads when it is loaded, unless the user chose. OpenMP's threads sleep while they wait: they spin by
    default, which takes many times as long where another process holds a core. Processes that wait for each other
    leave no warning of it, and say what is wrong themselves."""
    if "torch" in sys.modules:
        return
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & set(os.environ):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")


def _written(argv: Sequence[str]) -> str:
    """A command as it is written, without where its results go, which makes no difference to them."""
    kept = [word for i, word in enumerate(argv) if word != "--out" and not (i and argv[i - 1] == "--out")]
    return shlex.join(["eapcore", *(word for word in kept if not word.startswith("--out=") and word != "--report")])


def _run(args: argparse.Namespace) -> tuple[int, str]:
    """The exit status, and what is to be said of an error or an interruption."""
    try:
        with stopping():
            join(args)
            with silent(args):
                args.command(args)
            if (link := link_of(args)) is not None:
                link.close()
            return 0, ""
    except KeyboardInterrupt:
        return 130, left(args, "interrupted; no file was left half-written")
    except Stopped:
        kept = getattr(args, "resume", None)
        done = "no file was left half-written" if kept is None else f"what is done lies in {kept}"
        return 143, left(args, f"stopped by SIGTERM; {done}")
    except (ValueError, OSError, RuntimeError) as error:
        if args.debug:
            raise
        return 2, told(args, error, _one_line(_of_file(args, _said(error))))
    except Exception as error:
        if args.debug:
            raise
        text = f"internal error, {type(error).__name__}: {_one_line(error)} (--debug shows where)"
        return 1, told(args, error, text)


def _said(error: Exception) -> str:
    """An error's message, of the system's own with the file first."""
    if not isinstance(error, OSError) or error.filename is None or error.strerror is None:
        return str(error)
    return f"{os.fsdecode(error.filename)}: {error.strerror[:1].lower()}{error.strerror[1:]}"


def _of_file(args: argparse.Namespace, message: str) -> str:
    """A message that names the file with the pair that it speaks of, or of the sweep."""
    sweep, task = getattr(args, "file", None), str(getattr(args, "task", None))
    if sweep is not None and sweep.name not in message:
        return f"{sweep}: {message}"
    pair = re.search(r"\bpair \d+\b", message)
    if pair is None or not Path(task).is_file() or Path(task).name in message:
        return message
    return f"{message[: pair.end()]} of {Path(task).name}{message[pair.end() :]}"


def _one_line(message: object) -> str:
    """A message in one line that a terminal can show."""
    text = " ".join(str(message).split())
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} … {text[-_LONGEST // 2 :]}"


def _parser() -> argparse.ArgumentParser:
    about = "Edge attribution patching: score every edge of a transformer."
    parser = _Parser(prog="eapcore", description=about, formatter_class=Help)
    commands = parser.add_subparsers(
        required=True, metavar=" | ".join(name.__name__.split(".")[-1] for name in COMMANDS)
    )

    def command(name: str, function: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, formatter_class=Help)
        sub.set_defaults(command=function)
        sub.add_argument("--debug", action="store_true", help="show a traceback on errors")
        sub.add_argument(
            "--log-json", action="store_true", help="progress and warnings on stderr as JSON, one object a line"
        )
        return sub

    for module in COMMANDS:
        module.add(command)
    return parser
