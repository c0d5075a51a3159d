"""The files that keep scores, circuits and results: written beside and renamed, with a format version."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
import signal
import stat
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from eapcore.graph.graph import Graph

FORMAT_VERSION = 1


def write_text(path: Path, content: Any) -> None:
    """Write JSON; what is no text, such as parts of a file's name, as escapes."""
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8", errors="backslashreplace")


def finite(value: Any) -> Any:
    """The value of a JSON file: NaN and infinities, which JSON does not have, as None, numbers and arrays of numpy or
    torch as Python's, and what else JSON does not have as its text, so that no result is lost for what is said of it.
    """
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    return finite(value.tolist()) if hasattr(value, "tolist") else str(value)


def target(path: str | Path) -> Path:
    """The file that `path` names or links to, if it could be written: it is not there yet, or may be replaced.

    The folder may be missing still, except behind a link.

    Raises:
        OSError: there is something else than a file, it is write-protected, its name is none that a file may have, or
            its folder cannot be written to; the message names it.
    """
    path = Path(path)
    try:
        real = path.resolve()
        if real.is_symlink():  # from Python 3.13 on `resolve` does not say so
            raise OSError("it is a link in a circle")
        folder = next(folder for folder in real.parents if folder.exists())
        if real.is_dir():
            raise IsADirectoryError("it is a folder")
        if not folder.is_dir():
            raise NotADirectoryError(f"{folder} is a file")
        _check_name(real, folder)
        if real.exists():
            _check_replaceable(real)
        elif path.is_symlink() and folder != real.parent:
            raise FileNotFoundError(f"it is a link to {real}, whose folder does not exist")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(f"nothing can be written in the folder {folder}")
    except (OSError, ValueError, RuntimeError) as error:  # ValueError: a null byte; RuntimeError: links in a circle
        kind = type(error) if isinstance(error, OSError) else OSError
        reason = getattr(error, "strerror", None) or error
        raise kind(f"{path} cannot be written: {reason}; choose another place") from error
    return real


def _check_name(path: Path, folder: Path) -> None:
    longest = os.pathconf(folder, "PC_NAME_MAX") if hasattr(os, "pathconf") else 255
    for part in path.parts:
        if len(os.fsencode(part)) > longest:
            raise OSError(f"a name in it is longer than {longest} bytes")


def _check_replaceable(path: Path) -> None:
    if not path.is_file():
        raise OSError("it is no regular file")
    found, folder = path.stat(), path.parent.stat()
    if not found.st_mode & 0o222 or not os.access(path, os.W_OK):
        raise PermissionError("it is write-protected")
    if folder.st_mode & stat.S_ISVTX and os.getuid() not in (0, found.st_uid, folder.st_uid):
        raise PermissionError("it belongs to someone else, in a folder where only they may replace it")


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A path to write to, renamed to `path`, or the file that it links to, if the block ends well, and removed if it
    does not.

    Raises:
        OSError: the file cannot be written (`target`), or its folder does not exist.
    """
    with replacing_all([path]) as (written,):
        yield written


@contextmanager
def replacing_all(paths: Sequence[str | Path]) -> Iterator[list[Path]]:
    """A path to write to for each of several files, which become a set: all are renamed if the block ends well, none if
    it does not.

    What is written lies in a folder beside the file until it is whole and on the disk. A folder that a killed process
    has left is removed by the next that writes there; one whose process still runs is locked, and stays.
    """
    targets = [target(path) for path in paths]
    with ExitStack() as stack:
        written = []
        for path in targets:
            try:
                written.append(stack.enter_context(_beside(path.parent)) / path.name)
            except OSError as error:
                raise type(error)(
                    f"{path} cannot be written: {error.strerror or error}; choose another place"
                ) from error
        try:
            yield written
            for path in written:
                path.chmod(0o666 & ~_umask())  # some writers' files are for their owner alone
                _sync(path)
        except OSError as error:
            if error.errno not in _FULL or error.filename is not None:
                raise
            raise OSError(f"{targets[0]} cannot be written: {error.strerror}") from error
        with _uninterrupted():
            for path, place in zip(written, targets, strict=True):
                path.replace(target(place))
            for folder in {place.parent for place in targets}:
                _sync(folder)


# What the system says, without a name, of a disk that is full or broken, a quota and a limit.
_FULL = tuple(getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EFBIG", "EIO") if hasattr(errno, name))
_SUFFIX, _LOCK = ".eapcore-tmp", ".eapcore-lock"


@contextmanager
def _beside(folder: Path) -> Iterator[Path]:
    """A folder of our own in a folder, removed at the end; before it those that killed processes have left."""
    for entry in list(os.scandir(folder)):
        if entry.name.startswith(".eapcore-") and entry.name.endswith(_SUFFIX) and entry.is_dir(follow_symlinks=False):
            _remove_if_left(Path(entry.path))
    while True:
        own = Path(tempfile.mkdtemp(prefix=".eapcore-", suffix=_SUFFIX, dir=folder))
        try:
            with (own / _LOCK).open("xb") as lock:
                if not _locked(lock, wait=True) or os.fstat(lock.fileno()).st_nlink:
                    yield own
                    return
        except FileNotFoundError:
            if own.exists():
                raise
        finally:
            shutil.rmtree(own, ignore_errors=True)  # another took it for left over before it was locked: once more


def _remove_if_left(folder: Path) -> None:
    try:
        with (folder / _LOCK).open("r+b") as lock:
            if _locked(lock, wait=False):
                shutil.rmtree(folder, ignore_errors=True)
    except FileNotFoundError:
        with suppress(OSError):
            folder.rmdir()  # killed before it had its lock, if it is empty
    except OSError:  # someone else's
        return


def _locked(file: IO[bytes], *, wait: bool) -> bool:
    """Whether this process now holds the lock of a file, which the system takes back when the process ends."""
    try:
        import fcntl
    except ImportError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the disk; a file system that cannot say is not asked."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EROFS):
            raise
    finally:
        os.close(handle)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C and SIGTERM, where a handler waits for it, wait until the block has ended."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: handler for number in numbers if callable(handler := signal.getsignal(number))}
    if not before or threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[tuple[int, Any]] = []
    for number in before:
        signal.signal(number, lambda number, frame: came.append((number, frame)))
    try:
        yield
    finally:
        for known, handler in before.items():
            signal.signal(known, handler)
        if came:
            before[signal.Signals(came[0][0])](*came[0])


def save_tensors(path: str | Path, key: str, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write a safetensors file of tensors with one JSON object under a key of its metadata, which has a checksum of
    both."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    plain = finite(header)
    with replacing(path) as written:
        try:
            save_file(tensors, written, metadata={key: json.dumps({**plain, _CHECKSUM: _checksum(plain, tensors)})})
        except SafetensorError as error:  # a full disk, for one
            raise OSError(f"{path} cannot be written: {error}") from error


def load_tensors(path: Path, key: str) -> tuple[dict[str, Tensor], dict[str, Any], bool]:
    """What `save_tensors` wrote: the tensors, the JSON object, and whether both are what their checksum was made of; a
    file of an older eapcore, which has none, is taken as it is.

    Raises:
        SafetensorError, KeyError, ValueError: another file.
    """
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        header = dict(json.loads((file.metadata() or {})[key]))
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    checksum = header.pop(_CHECKSUM, None)
    return tensors, header, checksum in (None, _checksum(header, tensors))


def is_ours(path: Path) -> bool:
    """Whether a file begins as one that eapcore wrote: scores, a partial result, a circuit or another result, edges."""
    with path.open("rb") as file:
        return _OURS.match(file.read(200)) is not None


_OURS = re.compile(rb'.{8}\{"__metadata__":\{"eapcore|\{\s*"format": "eapcore-|edge,score\s', re.DOTALL)
_CHECKSUM = "sha256"
_LARGEST = 1 << 16  # layers, or heads of one
DAMAGED = "its checksum is not that of its content: it is damaged, or was edited"


def _checksum(header: Any, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(header).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class _NewerFormat(ValueError):
    """A file of a newer format, whose content is not looked at."""


def _check_version(path: Path, version: object) -> None:
    if not isinstance(version, int) or isinstance(version, bool):
        raise ValueError(f"its format version is {version!r}")
    if version > FORMAT_VERSION:
        raise _NewerFormat(
            f"{path} has the format version {version}, but this eapcore reads up to {FORMAT_VERSION}: update eapcore"
        )


def _graph(fields: Mapping[str, Any]) -> Graph:
    """The graph of a file's header; ValueError for what is none."""
    graph = Graph(**fields)
    sizes = (graph.n_layers, graph.n_heads, *([] if graph.n_kv is None else [graph.n_kv]))
    known = all(type(size) is int and 0 < size <= _LARGEST for size in sizes)
    if not known or {type(graph.has_mlp), type(graph.parallel)} != {bool} or graph.n_heads % sizes[-1]:
        raise ValueError(f"its graph is {fields}")
    return graph


def _reason(error: Exception) -> str:
    return f"it has no {error}" if isinstance(error, KeyError) else str(error)


def write_json(path: str | Path, kind: str, result: Any) -> None:
    """Write a result, a dataclass, as JSON beside its kind.

    Tensors become lists, circuits the names of their edges, scores what is known of them and those of the edges that
    `meta["method"]["edges"]` names; NaN and infinities null.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            return plain(value.tolist())
        if hasattr(value, "as_json"):
            return plain(value.as_json())
        if is_dataclass(value):
            return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
        if isinstance(value, Mapping):
            return {str(key): plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return finite(value)

    content = {"format": f"eapcore-{kind}", "format_version": FORMAT_VERSION, **plain(result)}
    with replacing(path) as temporary:
        write_text(temporary, content)
