"""Several processes that meet as torchrun's do: forked from one that has imported everything and run nothing."""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

FORK = """
import sys
sys.path[:0] = {paths!r}
import torch
torch.set_num_threads(1)
import ranks
ranks.fork({groups!r}, {beside!r})
"""


def start(*groups: tuple[str, int], folder: Path, beside: tuple[tuple[str, ...], ...] = ()) -> list[list[Any]]:
    """Run each group's function, "module:name", in so many processes, one group after the other.

    beside: names of groups that run one after the other too, but beside the rest: most of them wait most of the time.

    Each gets (rank, size, folder) and returns something for JSON, which is returned by rank; "died" for one that was
    killed. A failure is raised here with its traceback.
    """
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "execution"), str(folder)]
    code = FORK.format(paths=paths, groups=[(*group, str(folder)) for group in groups], beside=beside)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-8000:]
    return json.loads(done.stdout.splitlines()[-1])


def fork(groups: list[tuple[str, int, str]], beside: tuple[tuple[str, ...], ...] = ()) -> None:
    lanes = [[n for n, group in enumerate(groups) if group[0] in names] for names in beside]
    others: list[tuple[int, Path]] = []
    for place, lane in enumerate(lanes):
        path = Path(groups[0][2]) / f"lane-{place}.json"
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                path.write_text(json.dumps([(n, _group(groups[n], n)) for n in lane]))
                status = 0
            finally:
                os._exit(status)
        others.append((pid, path))
    apart = {n for lane in lanes for n in lane}
    results = {n: _group(group, n) for n, group in enumerate(groups) if n not in apart}
    for pid, path in others:
        if os.waitpid(pid, 0)[1]:
            raise SystemExit(1)
        results |= dict(json.loads(path.read_text()))
    print(json.dumps([results[n] for n in range(len(groups))]))


def _group(group: tuple[str, int, str], number: int) -> list[Any]:
    where, size, folder = group
    module, name = where.split(":")
    function = getattr(importlib.import_module(module), name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = []
    for rank in range(size):
        environment = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        pids.append(os.fork())
        if pids[-1] == 0:
            _one(function, {name: str(x) for name, x in environment.items()}, rank, size, folder, number)
    return _results(pids, folder, number)


def _one(function: Any, environment: dict[str, str], rank: int, size: int, folder: str, number: int) -> None:
    os.environ.update(environment)
    try:
        text = json.dumps(function(rank, size, Path(folder)))
        status = 0
    except BaseException:
        text, status = traceback.format_exc(), 1
    (Path(folder) / f"{number}-{rank}.json").write_text(text)
    time.sleep(0.3 * (rank == 0))  # it keeps the store: the others read it until they are done
    os._exit(status)


def _results(pids: list[int], folder: str, number: int) -> list[Any]:
    statuses = [os.waitpid(pid, 0)[1] for pid in pids]
    assert all(os.WIFEXITED(s) or os.WTERMSIG(s) == signal.SIGKILL for s in statuses), statuses
    found = []
    for rank in range(len(pids)):
        path = Path(folder) / f"{number}-{rank}.json"
        text = path.read_text() if path.exists() else '"died"'
        if text.startswith("Traceback"):
            print(f"rank {rank} of group {number}:\n{text}", file=sys.stderr)
            raise SystemExit(1)
        found.append(json.loads(text))
    return found
