"""The process that a command runs in: how it ends when it is told to, which of several speaks, and what its log is."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eapcore.execution.distributed import Link


class Stopped(BaseException):
    """SIGTERM came, and what was under way is finished."""


class Stop:
    """Whether SIGTERM came. While some work is under way that has steps it is looked at between two of them.

    quiet: another process speaks.
    """

    def __init__(self) -> None:
        self.asked, self.at_work, self.quiet = False, 0, False

    def check(self) -> None:
        if self.asked:
            raise Stopped

    def signalled(self, number: int, frame: FrameType | None) -> None:
        again, self.asked = self.asked, True
        if again or not self.at_work:
            raise Stopped


STOP = Stop()


@contextlib.contextmanager
def stopping() -> Iterator[None]:
    """SIGTERM ends the block by `Stopped`, between two steps of work if there is some."""
    STOP.asked, STOP.at_work, STOP.quiet = False, 0, False
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, STOP.signalled)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def join(args: argparse.Namespace) -> None:
    """Meet the other processes, where torchrun started several; the first alone prints and writes.

    Sets args.distributed and args.leads.
    """
    import os

    args.distributed, args.leads = False, True
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return
    from eapcore.execution.distributed import connect, started

    if started() > 1:
        args.leads = os.environ["RANK"] == "0"
        STOP.quiet = not args.leads
        link = connect()
        link.stop = STOP.check
        args.distributed, args.leads = True, link.rank == 0


def link_of(args: argparse.Namespace) -> Link | None:
    """The way to the other processes, where there are some and they met."""
    if not getattr(args, "distributed", False):
        return None
    from eapcore.execution.distributed import connect

    return connect()


def silent(args: argparse.Namespace) -> contextlib.AbstractContextManager[Any]:
    """Nothing is printed but by the first of several processes."""
    return contextlib.nullcontext() if args.leads else contextlib.redirect_stdout(io.StringIO())


def told(args: argparse.Namespace, error: Exception, text: str) -> str:
    """What this process says of its error, where others may say the same: nothing, unless it is the first that can."""
    from eapcore.execution.distributed import Lost, NotMet

    link = link_of(args)
    if link is None:
        alone = isinstance(error, NotMet) and not error.first  # the one who would say it did not come
        return text if args.leads or alone else ""
    if not isinstance(error, Lost):
        link.fail(text, always=True)
    return text if link.speaks() else ""


def left(args: argparse.Namespace, text: str) -> str:
    """The same for an interruption: it may have come because another process is gone, which is what is said then."""
    link = link_of(args)
    if link is None:
        return text if args.leads else ""
    link.leave("SIGTERM")
    lost = link.who_is_lost()
    return (f"{lost}; {text}" if lost else text) if link.speaks() else ""


def say(text: str) -> None:
    """One sentence on stderr."""
    if logged_as_json():
        log_event("error", message=text)
    else:
        print(f"eapcore: {text}", file=sys.stderr)


def log_to(*, as_json: bool) -> None:
    """Where warnings and notes go: stderr, for people or one JSON object a line."""
    level = logging.INFO if as_json or sys.stderr.isatty() else logging.WARNING  # a pipe gets no chatter
    logger = logging.getLogger("eapcore")
    if as_json:
        logger.handlers, logger.propagate = [_JsonHandler()], False
    else:
        logger.handlers, logger.propagate = [], True
        logging.basicConfig(level=logging.WARNING, format="eapcore: %(message)s")
    logger.setLevel(level)


def logged_as_json() -> bool:
    return any(isinstance(handler, _JsonHandler) for handler in logging.getLogger("eapcore").handlers)


def log_event(event: str, **fields: Any) -> None:
    """One JSON object a line on stderr: the time in seconds since 1970, the event, and what belongs to it."""
    print(json.dumps({"time": round(time.time(), 3), "event": event, **fields}), file=sys.stderr, flush=True)


class _JsonHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        log_event(record.levelname.lower(), message=record.getMessage())
