"""Several processes that share one piece of work: who does what, sums in a fixed order, and a lost one noticed.

The work is cut into lanes, by rule, one for each process of the run that began it. What a lane has summed depends on
the lane alone, and lanes are added in their order, so that the result does too: not on who was faster. This is why a
process that is done does not take over from a slower one.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import itertools
import json
import os
import platform
import socket
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from eapcore.execution.progress import Progress

P = ParamSpec("P")
R = TypeVar("R")
RENDEZVOUS = 30.0  # seconds until all processes have to be there; torch tries twice to reach the first
BEAT = 1.0  # seconds between two signs of life
SILENT = 30.0  # seconds without one, of a process on another machine, until it counts as lost
_NO_STORE = "or the store is gone: it ended or was killed"
_PIECE = 1 << 23  # float64 numbers that are exchanged at a time
_ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def started() -> int:
    """How many processes a launcher such as torchrun started for this run, as the environment says; 1 for none."""
    found = os.environ.get("WORLD_SIZE", "1")
    return int(found) if found.isdigit() and all(name in os.environ for name in _ENVIRONMENT) else 1


def deal(costs: Sequence[float], lanes: int) -> list[range]:
    """Cut pieces of work in their order into lanes of about the same cost, each of at least one piece.

    Raises:
        ValueError: more lanes than pieces.
    """
    count = len(costs)
    if lanes > count:
        raise ValueError(f"{lanes} processes cannot share {count} prompt pairs: start at most {count}")
    summed = list(itertools.accumulate(costs))
    bounds = [0]
    for lane in range(1, lanes):
        fair = 1 + bisect_left(summed, summed[-1] * lane / lanes)
        bounds.append(min(max(fair, bounds[-1] + 1), count - (lanes - lane)))
    return [range(*pair) for pair in itertools.pairwise([*bounds, count])]


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among all that share a piece of work.

    rank: which one it is, of `size`. link: the way to the others; None where there are none.
    """

    rank: int = 0
    size: int = 1
    link: Link | None = None

    @staticmethod
    def of(distributed: bool) -> Ranks:
        """All processes of this run, or this one alone.

        Raises:
            ValueError: distributed is no bool.
            RuntimeError: the processes were not started by torchrun or the like, or do not meet.
        """
        if not isinstance(distributed, bool):
            raise ValueError(f"distributed must be True or False, got {distributed!r}")
        if not distributed:
            return ALONE
        link = connect()
        link.begin()
        return Ranks(link.rank, link.size, link)

    @property
    def leads(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    @property
    def distributed(self) -> bool:
        """The option of this name, for functions that are called with what these processes share."""
        return self.link is not None

    def lanes(self, count: int) -> list[int]:
        """Which of so many lanes this process works on."""
        return list(range(self.rank, count, self.size))

    def agree(self, **what: Any) -> None:
        """ValueError where another process has something else of a name than the first; values are compared as JSON."""
        if self.link is not None:
            self.link.agree(what | {"eapcore": _sources(), "torch": torch.__version__})

    def gather(self, value: Any) -> list[Any]:
        """What every process gives, something that JSON can hold, by rank."""
        return [json.loads(json.dumps(value))] if self.link is None else self.link.gather(value)

    def least(self, value: int) -> int:
        """The least of all processes' values."""
        return value if self.link is None else min(self.link.gather(value))

    def largest(self, value: Tensor) -> Tensor:
        """The largest of all processes' numbers, NaN where one is."""
        return value if self.link is None else value.new_tensor(self.link.gather(float(value))).max()

    def first(self, value: Any) -> Any:
        """The first process's value, something that JSON can hold."""
        return value if self.link is None else self.link.gather(value)[0]

    def sum(self, parts: Sequence[Tensor], lanes: int | None = None) -> Tensor:
        """Add up what lanes have summed, float64 and of one shape, in the lanes' order.

        parts: those of this process's lanes, of `lanes` in all; None is one for each process.
        """
        if self.link is None:
            return functools.reduce(torch.add, parts)
        return self.link.sum(parts, self.size if lanes is None else lanes)

    def rows(self, total: Tensor, parts: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Put every lane's rows, (which int64 [n], rows [n, ..]), where they belong in `total`, in every process."""
        for index, rows in parts:
            total[index] = rows
        if self.link is not None:
            self.link.rows(total, parts)

    def watched(self, progress: Progress | None, *, alike: bool = False) -> Progress | None:
        """`progress` that counts what all processes did, and raises Lost once one of them is.

        alike: all do the same steps, and each counts them all.
        """
        return progress if self.link is None else self.link.watched(progress, alike)


ALONE = Ranks()


def reported(function: Callable[P, R]) -> Callable[P, R]:
    """Tell the other processes when this one fails in a function with the option distributed=True."""

    @functools.wraps(function)
    def call(*args: P.args, **options: P.kwargs) -> R:
        if options.get("distributed") is not True:
            return function(*args, **options)
        try:
            return function(*args, **options)
        except Exception as error:
            link = connect()
            link.failed.add(link.call)
            if not isinstance(error, Lost):
                link.fail(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)
            raise

    return call


class Lost(RuntimeError):
    """Another process failed, or is gone without a word. rank: which."""

    def __init__(self, rank: int, text: str, *, gone: bool) -> None:
        super().__init__(text)
        self.rank, self.gone = rank, gone


class NotMet(RuntimeError):
    """The processes did not all come. first: whether the one came in whose store they meet."""

    def __init__(self, first: bool, text: str) -> None:
        super().__init__(text)
        self.first = first


def _answers(host: str, port: str) -> bool:
    """Whether somebody listens there, or this process is the one who would."""
    if os.environ["RANK"] == "0":
        return True
    try:
        socket.create_connection((host, int(port)), timeout=BEAT).close()
    except (OSError, ValueError):
        return False
    return True


def link_now() -> Link | None:
    """The way to the other processes, if there was need of one so far."""
    return connect() if connect.cache_info().currsize else None


@functools.lru_cache(maxsize=1)
def connect() -> Link:
    """The way to the other processes of this run, made once; a process group that is there is used.

    Raises:
        RuntimeError: this process was not started by torchrun or the like, or the others did not come.
    """
    import torch.distributed as dist

    if not dist.is_available():
        raise RuntimeError("this torch has no torch.distributed: install one that has, or run one process")
    if not dist.is_initialized():
        missing = [name for name in _ENVIRONMENT if name not in os.environ]
        if missing:
            raise RuntimeError(
                f"distributed needs processes that torchrun or the like started, but {', '.join(missing)} "
                f"{'is' if len(missing) == 1 else 'are'} not set: torchrun --nproc-per-node 4 …"
            )
        try:
            dist.init_process_group("gloo", timeout=timedelta(seconds=RENDEZVOUS))
        except (RuntimeError, ValueError) as error:
            host, port = (os.environ[name] for name in _ENVIRONMENT[2:])
            where = f"{host}:{port}"
            raise NotMet(
                _answers(host, port),
                f"no rendezvous of the {os.environ['WORLD_SIZE']} processes at {where} within {RENDEZVOUS:g} s, rank "
                f"{os.environ['RANK']} was there: {' '.join(str(error).split())[:200]}",
            ) from error
    group = None
    if "gloo" not in str(dist.get_backend()):
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=RENDEZVOUS))
    store = dist.PrefixStore("eapcore", dist.distributed_c10d._get_default_store())
    return Link(dist.get_rank(), dist.get_world_size(), store, group)


@dataclass
class Link:
    """Messages by the store that the processes met in, tensors by gloo, and who is still there.

    call: the number of functions that were begun together; met: how often in this one. failed: the calls that failed
    here. lost: who is missed, lost_in: the call in which it failed, None where it is gone. sent: bytes of tensors that
    this process sent.
    """

    rank: int
    size: int
    store: Any
    group: Any
    call: int = 0
    failed: set[int] = field(default_factory=set)
    sent: int = 0
    met: int = 0
    lost: Lost | None = None
    lost_in: int | None = None
    stop: Callable[[], None] = lambda: None  # raises where a caller wants this process to end
    stage: int = 0
    began: float = 0.0
    done: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        here = {"host": socket.gethostname(), "boot": _boot(), "pid": os.getpid()}
        self.people: list[dict[str, Any]] = []
        self.people = self.gather(here)
        self.local = {r: p["pid"] for r, p in enumerate(self.people) if p["boot"] == here["boot"] and r != self.rank}
        self.seen = dict.fromkeys(range(self.size), ("", time.monotonic()))
        self.read = 0
        self.over = threading.Event()
        self.looking = threading.Lock()
        self.side = self.store.clone()  # a wait holds its client
        threading.Thread(target=self._watch, daemon=True).start()
        atexit.register(self._leave)

    def name(self, rank: int) -> str:
        """Who a rank is, for people."""
        if not self.people:
            return f"rank {rank}"
        return f"rank {rank} (process {self.people[rank]['pid']} on {self.people[rank]['host']})"

    def begin(self) -> None:
        """A function begins in which the processes work together; that all failed in the one before is forgotten."""
        if self.lost_in in self.failed:
            self.lost, self.lost_in = None, None
        self.call, self.met = self.call + 1, 0

    # Messages

    def gather(self, value: Any) -> list[Any]:
        """What every process gives, by rank."""
        from torch.distributed import DistNetworkError

        try:
            return self._gather(value)
        except DistNetworkError as error:
            raise self.lost or Lost(0, f"{self.name(0)} {_NO_STORE}", gone=True) from error

    def _gather(self, value: Any) -> list[Any]:
        self.met += 1
        self.store.set(f"{self.call}.{self.met}/{self.rank}", json.dumps(value))
        keys = [f"{self.call}.{self.met}/{rank}" for rank in range(self.size)]
        until = time.monotonic() + RENDEZVOUS
        while True:
            try:
                self.store.wait(keys, timedelta(seconds=BEAT / 2))
                break
            except RuntimeError as error:
                if self.people:
                    self.check()
                    for rank, key in enumerate(keys):
                        if self._left(rank) and not self.store.check([key]):
                            raise Lost(rank, f"{self.name(rank)} ended before the work was done", gone=True) from None
                elif time.monotonic() > until:
                    raise RuntimeError(f"not all {self.size} processes came within {RENDEZVOUS:g} s") from error
        found = [json.loads(x) for x in self.store.multi_get(keys)]
        if self.met > 1:  # whoever is here has read what was there before
            self.store.delete_key(f"{self.call}.{self.met - 1}/{self.rank}")
        return found

    def agree(self, what: Mapping[str, Any]) -> None:
        first, *others = self.gather(dict(what))
        for rank, other in enumerate(others, 1):
            for name, value in first.items():
                if other.get(name) != value:
                    raise ValueError(
                        f"all processes must have the same {name}, but {self.name(rank)} has {other.get(name)!r:.200} "
                        f"and rank 0 has {value!r:.200}"
                    )

    # Tensors

    def sum(self, parts: Sequence[Tensor], lanes: int) -> Tensor:
        """Each process adds up its share of the numbers, of all lanes in their order, and the shares are exchanged."""
        shape, device = parts[0].shape, parts[0].device
        flat = [part.detach().cpu().double().flatten() for part in parts]
        total = torch.empty_like(flat[0])
        self.gather(None)  # so that nobody waits in gloo for one who is still at work
        for start in range(0, max(1, len(total)), _PIECE):
            total[start : start + _PIECE] = self._sum([x[start : start + _PIECE] for x in flat], lanes)
        return total.view(shape).to(device)

    def _sum(self, parts: Sequence[Tensor], lanes: int) -> Tensor:
        import torch.distributed as dist

        length = len(parts[0])
        share = -(-length // self.size)
        total: Tensor | None = None
        for number in range(-(-lanes // self.size)):
            mine = torch.zeros(self.size * share, dtype=torch.float64, device="cpu")
            if number < len(parts):
                mine[:length] = parts[number]
            theirs = torch.empty_like(mine)
            self._exchange(mine.nbytes - 8 * share, dist.all_to_all_single, theirs, mine)
            for rank, part in enumerate(theirs.view(self.size, share)):
                if number * self.size + rank < lanes:
                    total = part.clone() if total is None else total + part
        assert total is not None
        shares = [torch.empty_like(total) for _ in range(self.size)]
        self._exchange((self.size - 1) * total.nbytes, dist.all_gather, shares, total)
        return torch.cat(shares)[:length]

    def rows(self, total: Tensor, parts: Sequence[tuple[Tensor, Tensor]]) -> None:
        import torch.distributed as dist

        counts = self.gather([len(index) for index, _ in parts])
        for rank, lengths in enumerate(counts):
            for number, length in enumerate(lengths):
                index = torch.empty(length, dtype=torch.int64, device="cpu")
                rows = torch.empty(length, *total.shape[1:], dtype=total.dtype, device="cpu")
                if rank == self.rank:
                    index, rows = (x.cpu().contiguous() for x in parts[number])
                for tensor in (index, rows):
                    self._exchange(tensor.nbytes if rank == self.rank else 0, dist.broadcast, tensor, rank)
                if rank != self.rank:
                    total[index.to(total.device)] = rows.to(total.device)

    def _exchange(self, sent: int, operation: Callable[..., Any], *what: Any) -> None:
        """Run a collective operation; sent: how many bytes of it this process gives."""
        self.sent += sent
        try:
            operation(*what, group=self.group)
        except RuntimeError as error:  # the other end is gone: who it was is known a little later
            until = time.monotonic() + 2 * SILENT
            while time.monotonic() < until:
                self.look()
                self.check()
                time.sleep(BEAT / 4)
            raise RuntimeError(
                f"an exchange with the other processes failed: {' '.join(str(error).split())}"
            ) from error

    # Who is there

    def watched(self, progress: Progress | None, alike: bool) -> Progress:
        """As `Ranks.watched`."""

        def report(done: int, total: int) -> None:
            self.check()
            self.done[self.rank] = done
            if progress is not None:
                progress(done if alike else min(total, sum(self.done.values())), total)

        self.stage, self.began = self.stage + 1, time.monotonic()
        self.done = {self.rank: 0}
        return report

    def apart(self) -> list[int] | None:
        """By rank what is done of the work under way, where the least is under three quarters of the most, and it is no
        matter of who was heard of last."""
        done = [self.done.get(rank, 0) for rank in range(self.size)]
        much = 4 * min(done) < 3 * max(done) and time.monotonic() - self.began > 10 * BEAT
        return done if much else None

    def check(self) -> None:
        """Lost where another process failed, and this one did not in the same way."""
        self.stop()
        if self.lost is not None:
            raise self.lost

    def fail(self, reason: str, *, always: bool = False) -> None:
        """Tell the others why this process ends; always: even those that failed in the same call."""
        self._tell(self.rank, reason, None if always else self.call)

    def _tell(self, rank: int, reason: str, call: int | None) -> None:
        found = {"rank": rank, "reason": reason[:2000], "call": call, "gone": rank != self.rank}
        try:
            number = self.side.add("failures", 1)
            self.side.set(f"failure/{number}", json.dumps(found))
        except RuntimeError:
            pass  # the store is gone: nobody is left to be told

    def leave(self, why: str) -> None:
        """Say that this process ends, and is not lost."""
        with contextlib.suppress(RuntimeError):
            self.side.set(f"left/{self.rank}", why)

    def who_is_lost(self) -> str:
        """Which other process is lost without having been stopped, if one is; a moment is waited for."""
        for _ in range(3):
            self.look()
            if self.lost is not None:
                return str(self.lost)
            time.sleep(BEAT / 4)
        return ""

    def speaks(self) -> bool:
        """Whether this process says what is wrong: the first, or where that is gone the next.

        Another waits a moment for the first, whose launcher ends it once one process has ended.
        """
        if self.rank == 0:
            with contextlib.suppress(RuntimeError):
                self.side.set("said", "")
            return True
        until = time.monotonic() + 5 * BEAT
        while time.monotonic() < until:
            if self.lost is not None and self.lost.rank == 0 and self.lost.gone:
                return self.rank == 1
            with contextlib.suppress(RuntimeError):
                if self.side.check(["said"]):
                    return False
            time.sleep(BEAT / 10)
            self.look()
        return self.lost is not None and self.lost.rank == 0 and self.rank == 1

    def look(self) -> None:
        """See who failed or is gone."""
        with self.looking:
            try:
                while self.read < self.side.add("failures", 0):
                    self.read += 1
                    found = json.loads(self.side.get(f"failure/{self.read}"))
                    if found["rank"] != self.rank and found["call"] not in self.failed and self.lost is None:
                        text = f"{self.name(found['rank'])}: {found['reason']}"
                        self.lost = Lost(found["rank"], text, gone=found["gone"])
                        self.lost_in = found["call"]
                for rank in range(1, self.size) if self.rank == 0 else [0]:
                    self._listen(rank)
            except RuntimeError:
                self.lost = self.lost or Lost(0, f"{self.name(0)} {_NO_STORE}", gone=True)
            for rank, pid in self.local.items():
                if self.lost is None and not _alive(pid) and not self._left(rank):
                    self._gone(rank, "it was killed")

    def _listen(self, rank: int) -> None:
        beat, at = self.seen[rank]
        if not self.side.check([f"beat/{rank}"]):
            return
        found, now = self.side.get(f"beat/{rank}").decode(), time.monotonic()
        if found != beat:
            self.seen[rank] = found, now
            _, stage, done = map(int, found.split())
            if stage == self.stage:
                self.done[rank] = done
        elif now - at > SILENT and self.lost is None:
            self._gone(rank, f"it was not heard of for {SILENT:g} s")

    def _left(self, rank: int) -> bool:
        """Whether a process said that it ends."""
        with contextlib.suppress(RuntimeError):
            return bool(self.side.check([f"left/{rank}"]))
        return False

    def _gone(self, rank: int, how: str) -> None:
        self.lost = Lost(rank, f"{self.name(rank)} is gone: {how}", gone=True)
        self._tell(rank, f"it is gone: {how}", None)

    def _watch(self) -> None:
        for number in itertools.count():
            try:
                self.side.set(f"beat/{self.rank}", f"{number} {self.stage} {self.done.get(self.rank, 0)}")
            except RuntimeError:
                self.lost = self.lost or Lost(0, f"{self.name(0)} {_NO_STORE}", gone=True)
            if self.over.wait(BEAT):
                return
            self.look()

    def close(self) -> None:
        """Leave together: nobody takes the store away from one who still needs it."""
        if self.lost is None:
            self.gather(None)
        self._leave()

    def _leave(self) -> None:
        import torch.distributed as dist

        self.leave("")
        if not self.over.is_set() and self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            until = time.monotonic() + 5 * BEAT  # the store ends with this process: the others may be reading in it
            while self.lost is None and time.monotonic() < until and not all(map(self._left, range(self.size))):
                time.sleep(BEAT / 20)
        self.over.set()
        if dist.is_initialized():
            dist.destroy_process_group()


def _alive(pid: int) -> bool:
    """Whether a process of this machine runs; one that ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return not Path("/proc/self").exists()


def _boot() -> str:
    """What is the same for processes that see each other's numbers: the machine's boot and its name space."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return platform.node()


@functools.lru_cache(maxsize=1)
def _sources() -> str:
    """The version with a digest of the code, so that two checkouts of one version differ."""
    import eapcore
    import eapcore.kernels as kernels

    digest = hashlib.sha256()
    for file in (eapcore.__file__, kernels.__file__):
        for path in sorted(Path(str(file)).parent.rglob("*.py")):
            digest.update(path.read_bytes())
    return f"{eapcore.__version__} ({digest.hexdigest()[:8]})"
