"""Commands by two processes of which one is killed at random moments, again and again, until the work is done.

`python tests/execution/kills.py 20` kills twenty times a command, of which tests/execution/test_distributed.py runs a
small form. What may come out is the bits of an undisturbed run, or a refusal that says why; never another sum.
"""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from models import random_model, save_checkpoint
from words import word_level

import eapcore.execution.distributed as distributed
import eapcore.execution.resume as resume
from eapcore.cli import main

SIZE = 2
ALL = ["--dtype", "float64", "--batch-size", "1", "--resume", "kept"]
COMMANDS = {
    "attribute": ["--n-pairs", "12", "--method", "eap-ig", "--steps", "2", "--reduce", "pair", "--out", "scores.st"],
    "attribute --method screened": ["--n-pairs", "12", "--budget", "2.5", "--out", "scores.st"],
    "run": ["--n-pairs", "8", "--method", "hybrid", "--out", "out"],
    "verify": ["--n-pairs", "4", "--method", "eap", "--top-n", "40", "--out", "verification.json"],
    "evaluate": ["--n-pairs", "6", "--method", "eap", "--true-top", "20", "--out", "evaluation.json"],
    "patch": ["--n-pairs", "3", "--out", "effects.st"],
    "patch --nodes": ["--n-pairs", "12", "--out", "nodes.st"],
    "path": ["--n-pairs", "12", "--senders", "embed", "--receivers", "a2.h1<q>", "--out", "path.json"],
    "acdc": ["--n-pairs", "4", "--threshold", "0.05", "--out", "circuit.json"],
    "mib": ["--n-pairs", "6", "--methods", "eap,eap-ig", "--out", "mib"],
    "reproduce ioi": ["--n-pairs", "4", "--batch-size", "1", "--sample", "30", "--curves", "1", "--top-n", "20",
        "--threshold", "0.01", "--probe-steps", "3", "--no-report", "--out", "paper"],
}  # fmt: skip
WITHIN = 60.0  # seconds in which the others of a lost process have to end


def written(command: str, folder: Path) -> list[str]:
    """A command's line. A reproduction goes on in its own folder, and its model's words are those of the task."""
    if not command.startswith("reproduce"):
        return [*command.split(), *ALL, *COMMANDS[command]]
    place = folder.parents[1] / "model"
    if not place.exists():
        words = word_level()
        save_checkpoint(random_model(2, 3, 24, 8, 24, words.get_vocab_size(), 32, dtype=torch.float64), place)
        words.save(str(place / "tokenizer.json"))
        (place / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return [*command.split(), "--model", str(place), *COMMANDS[command]]


def start(command: str, folder: Path) -> list[int]:
    """The processes of a command in a folder, forked from this one."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line, found = written(command, folder), []
    for rank in range(SIZE):
        pid = os.fork()
        if pid == 0:
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(SIZE), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(SIZE))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            os.chdir(folder)
            for descriptor in (1, 2):
                os.dup2(os.open(f"../said.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
            status = 99
            try:
                status = main(line)
            finally:
                sys.stdout.flush()
                os._exit(status)
        found.append(pid)
    return found


def ended(pids: list[int], within: float) -> list[int | None]:
    """Their statuses as of `os.waitstatus_to_exitcode`; None for one that has not ended in so many seconds."""
    until, found = time.monotonic() + within, dict.fromkeys(pids)
    while None in found.values() and time.monotonic() < until:
        for pid in [pid for pid, status in found.items() if status is None]:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                found[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    for pid in [pid for pid, status in found.items() if status is None]:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return list(found.values())


def made(folder: Path) -> dict[str, bytes]:
    """What a command has written, but for what it keeps to go on from, and for how long a table's methods took."""
    files = [path for path in folder.rglob("*") if path.is_file() and "kept" not in path.relative_to(folder).parts]
    found = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(files)}
    return {name: re.sub(rb'"seconds": [^,}\n]+', b"", content) for name, content in found.items()}


def try_command(command: str, kills: int, folder: Path, draw: random.Random, after: float) -> Counter[str]:
    """Kill a command's processes so often, each time when at least such a share of the time is over that it takes: how
    often each thing happened."""
    began = time.monotonic()
    assert ended(start(command, folder / "whole" / "work"), 300) == [0] * SIZE, said(folder / "whole")
    seconds, expected = time.monotonic() - began, made(folder / "whole" / "work")
    assert expected
    found, number, slowest = Counter[str](), 0, 0.0
    while found["killed"] < kills or not found["finished"]:
        place = folder / str(number)
        pids = start(command, place / "work")
        rank, alive = draw.randrange(SIZE), False
        if found["killed"] < kills:
            time.sleep(draw.uniform(after * seconds, 1.1 * seconds))
            alive = os.waitpid(pids[rank], os.WNOHANG)[0] == 0
        if alive:
            os.kill(pids[rank], signal.SIGKILL)
            before = time.monotonic()
            statuses = ended(pids, WITHIN)
            assert None not in statuses, f"{command}: the others were still there after {WITHIN:g} s"
            slowest = max(slowest, time.monotonic() - before)
            found["killed"] += 1
            text = said(place)
            found["named" if re.search(rf"rank {rank}\b", text) else re.sub(r"\d+", "#", text)[-150:]] += 1
            continue
        if found["killed"] < kills:
            seconds *= 0.8  # it had ended: the undisturbed run took longer, by what happened on the machine meanwhile
        rest = [pid for pid in pids if found["killed"] >= kills or pid != pids[rank]]
        statuses = ended(rest, 300)
        number += 1  # the next one begins anew
        if set(statuses) == {0}:
            differ = [name for name, content in expected.items() if made(place / "work").get(name) != content]
            assert not differ, f"{command}: {differ} differ from those of the undisturbed run"
            found["finished"] += 1
        else:
            found["refused"] += 1
            print(f"{command} refused: {said(place)}", file=sys.stderr)
    found["seconds until the others ended, at most"] = round(slowest)
    return found


def said(place: Path) -> str:
    """What the processes of a run have said."""
    return " ".join(path.read_text(errors="replace") for path in sorted(place.glob("said.*")))


def try_all(
    kills: int, folder: Path, commands: tuple[str, ...] = tuple(COMMANDS), *, after: float = 0.0
) -> dict[str, dict[str, int]]:
    resume.SAVE_SECONDS, distributed.RENDEZVOUS = 0.02, 4.0
    draw = random.Random(0)
    return {command: dict(try_command(command, kills, folder / command, draw, after)) for command in commands}


if __name__ == "__main__":
    import tempfile

    torch.set_num_threads(1)
    for name in sys.argv[2:] or COMMANDS:
        with tempfile.TemporaryDirectory() as where:
            print(name, try_all(int(sys.argv[1]), Path(where), (name,)), flush=True)
