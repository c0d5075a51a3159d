"""Checkpoint files: a folder or the Hub → the tensors that it stores, by name, none of them read yet."""

from __future__ import annotations

import json
import logging
import pickle
import re
import socket
import threading
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, NoReturn
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_log = logging.getLogger(__name__)
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "model_final.pth",
)
# The Hub's own ids of GPT-2, each at a revision whose content cannot change under a published result.
PINNED = {
    "gpt2": "607a30d783dfa663caf39e06633721c8d4cfcd7e",
    "gpt2-medium": "6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
    "gpt2-large": "32b71b12589c2f8d625668d2335a01cac3249519",
    "gpt2-xl": "15ea56dee5df4983c59b2538573817e1667135e2",
}
_PINNED_OWNER = "openai-community/"
_SAFETENSORS_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_HEADS = ("lm_head.weight", "embed_out.weight")
_ANSWER = 0.8  # seconds in which the Hub's machine must answer
_LFS_POINTER = b"version https://git-lfs"
_ZIP = b"PK\x03\x04"  # torch files from before 1.6 are no zip archives and cannot be mapped


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor that a checkpoint stores. dtype: torch's name of it, or the file's own where no model has it here. read:
    gives it, out of a GGUF file in the dtype that it is called with where it is quantised."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[..., Tensor]


def stored(name: str, tensor: object, where: str) -> Stored:
    """A tensor that is in memory already."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{where} must hold tensors by name, got a {type(tensor).__name__} for {name!r}")
    if tensor.is_meta:
        raise ValueError(
            f"{name} of {where} is on the meta device, without values: load the model whole, not offloaded"
        )
    detached = tensor.detach()
    return Stored(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), lambda: detached)


# A folder


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder, as a mapping."""
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no config.json: a model's folder holds config.json and its weights file")
    config = _read_json(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(config).__name__}")
    return config


def refuse_adapter(folder: Path) -> None:
    """ValueError for a folder with an adapter, which transformers would add to the weights."""
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder} holds an adapter (adapter_config.json), such as LoRA's, which is not applied: merge it into its "
            "model (merge_and_unload), or remove that file if this is done"
        )


def stored_config(path: Path) -> dict[str, Any] | None:
    """The configuration that a torch file holds beside its weights, nanoGPT's model_args; None if it has none."""
    if path.suffix == ".safetensors" or path.name.endswith(".json"):
        return None
    config = _unpickled(path).get("model_args")
    return dict(config) if isinstance(config, Mapping) else None


def find_weights(folder: Path) -> Path:
    """The weights file of a folder: the first of WEIGHT_FILES that it has, else the only one of another name."""
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    others = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".pth", ".pt"))
    if len(others) == 1:
        return others[0]
    found = f"several others ({', '.join(path.name for path in others)})" if others else "none"
    raise FileNotFoundError(f"{folder} must hold one weights file, {', '.join(WEIGHT_FILES)}: found {found}")


def read_weights(path: Path) -> list[Stored]:
    """The tensors of a weights file, or of all the shards that an index lists."""
    return _read_shards(path) if path.name.endswith(".index.json") else _read_file(path)


def _read_shards(index: Path) -> list[Stored]:
    weight_map, found = _weight_map(index), dict[str, str]()
    tensors = []
    for shard in dict.fromkeys(weight_map.values()):
        if not (index.parent / shard).is_file():
            raise FileNotFoundError(f"{index.parent / shard} is missing, which {index.name} lists: fetch it again")
        for tensor in _read_file(index.parent / shard):
            if tensor.name in found:
                raise ValueError(f"{tensor.name} is in two shards of {index}: {found[tensor.name]} and {shard}")
            found[tensor.name] = shard
            tensors.append(tensor)
    for name, shard in weight_map.items():
        if name not in found and name.endswith(_HEADS):  # tied to the embedding; who needs it misses it
            continue
        if found.get(name) != shard:
            raise ValueError(f"{index} says that {name} is in {shard}, found it in {found.get(name, 'no shard')}")
    return tensors


def _weight_map(index: Path) -> dict[str, str]:
    content = _read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} must hold a 'weight_map' from tensor names to shards")
    for name, shard in weight_map.items():
        # A checkpoint may come from anyone: it must not name files outside its own folder.
        if not isinstance(shard, str) or not re.fullmatch(r"[\w-][\w.-]*\.(safetensors|bin)", shard):
            raise ValueError(f"{index} must list plain names of .safetensors or .bin files, got {shard!r} for {name}")
    return weight_map


def _read_json(path: Path) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        mapping = dict(pairs)
        if len(mapping) != len(pairs):
            names = [name for name, _ in pairs]
            double = next(name for name in mapping if names.count(name) > 1)
            raise ValueError(f"{double!r} occurs twice")
        return mapping

    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except RecursionError:
        raise ValueError(f"{path} must be valid JSON: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{path} must be valid JSON: {str(error).split(': value has')[0]}") from error


def _read_file(path: Path) -> list[Stored]:
    if path.suffix == ".safetensors":
        return _read_safetensors(path, _size(path)[0])
    loaded: Any = _unpickled(path)
    for key in ("state_dict", "model_state_dict", "model"):  # training loops save the weights beside other things
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    return [stored(str(name), tensor, str(path)) for name, tensor in loaded.items()]


def _size(path: Path) -> tuple[int, bytes]:
    """The size and the first bytes of a weights file; ValueError for one that holds none."""
    if not path.is_file():
        raise ValueError(f"{path} must be a file of weights, and is none: a device, a pipe or a folder")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(len(_LFS_POINTER))
    if size == 0:
        raise ValueError(f"{path} is empty: fetch it again")
    if start == _LFS_POINTER:
        raise ValueError(f"{path} is a git-lfs pointer of {size} bytes, not the weights: run `git lfs pull` there")
    return size, start


def _read_safetensors(path: Path, size: int) -> list[Stored]:
    try:
        handle = safe_open(path, framework="pt")
        slices = {name: handle.get_slice(name) for name in list(handle.keys())}
    except SafetensorError as error:
        _refuse_file(path, size, "safetensors", error)
    return [
        Stored(
            name,
            tuple(part.get_shape()),
            _SAFETENSORS_DTYPES.get(part.get_dtype(), part.get_dtype()),
            partial(handle.get_tensor, name),
        )
        for name, part in slices.items()
    ]


def _unpickled(path: Path) -> Mapping[str, Any]:
    """What a torch file holds, by names."""
    size, start = _size(path)
    mapped = start.startswith(_ZIP)
    try:
        if mapped:
            _check_entries(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        named = re.search(r"(?:GLOBAL|[Cc]lass:?|global:?) ([\w.]+\.[\w.]+)", str(error))
        what = f" ({named[1]})" if named else ""
        raise ValueError(
            f"{path} ({size} bytes) holds more than tensors{what}, or is no torch file; nothing in it was run: get the "
            "weights as safetensors"
        ) from error
    except Exception as error:  # the unpickler meets damage with whatever its next step raises
        _refuse_file(path, size, "torch", error)
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{path} must hold tensors by name, got a {type(loaded).__name__}")
    return loaded


_ITEM_BYTES = {
    **dict.fromkeys(("DoubleStorage", "LongStorage", "ComplexFloatStorage"), 8),
    **dict.fromkeys(("FloatStorage", "IntStorage"), 4),
    **dict.fromkeys(("HalfStorage", "BFloat16Storage", "ShortStorage"), 2),
    "ComplexDoubleStorage": 16,
}


class _Storages(pickle.Unpickler):
    """Reads which storages a torch file's pickle names, each with its size, and makes nothing of all else."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        self.bytes: dict[str, int] = {}

    def find_class(self, module: str, name: str) -> Any:
        return type(name, (_Nothing,), {})

    def persistent_load(self, pid: Any) -> Any:
        _, kind, key, _, numel = pid
        self.bytes[str(key)] = int(numel) * _ITEM_BYTES.get(kind.__name__, 1)
        return _Nothing()


class _Nothing(dict[Any, Any]):
    """In place of whatever a pickle would make."""

    def __init__(self, *args: Any, **how: Any) -> None:
        super().__init__()

    def __call__(self, *args: Any, **how: Any) -> _Nothing:
        return self

    def __setstate__(self, state: Any) -> None: ...

    def append(self, item: Any) -> None: ...

    def extend(self, items: Any) -> None: ...


def _check_entries(path: Path) -> None:
    """ValueError for a zip archive of tensors whose entries are compressed, or shorter than the tensors in them: mapped
    into memory, what lies behind them would be read."""
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        packed = next((name for name, entry in entries.items() if entry.compress_type != zipfile.ZIP_STORED), None)
        if packed is not None:
            raise ValueError(f"its entry {packed} is compressed, which no torch file's is")
        pickled = next((name for name in entries if name.endswith("data.pkl")), None)
        if pickled is None:
            raise ValueError("it has no data.pkl")
        with archive.open(pickled) as file:
            storages = _Storages(file)
            storages.load()
    for key, needed in storages.bytes.items():
        entry = entries.get(pickled.removesuffix("data.pkl") + f"data/{key}")
        if entry is None or entry.file_size < needed:
            has = "is missing" if entry is None else f"has {entry.file_size} bytes of the {needed} that it must have"
            raise ValueError(f"its entry data/{key} {has}")


def _refuse_file(path: Path, size: int, kind: str, error: Exception) -> NoReturn:
    raise ValueError(
        f"{path} ({size} bytes) is not a whole {kind} file ({_first_line(error)}): its download may have been cut "
        "short, fetch it again"
    ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200].rstrip(". ")


# The Hub


def hub_id(source: str, others: Sequence[str] = ()) -> str:
    """A model's id on the Hub; ValueError for a text that is neither such an id nor a folder. others: names of models
    that are not there."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    name = _PINNED_OWNER + source if source in PINNED else source
    try:
        validate_repo_id(name)
    except HFValidationError:
        name = ""
    if "/" not in name:
        raise ValueError(
            f"unknown model {source!r}: expected a folder that exists, one of {', '.join([*others, *PINNED])}, "
            "or an owner/name on the Hub"
        )
    return name


def fetch_weights(repo: str, *, revision: str | None, cache_dir: str | Path | None) -> Path:
    """The weights file of a Hub model, beside its config.json: from the cache where it holds both, else from the Hub.

    revision: a branch, tag or commit; None is the pinned commit of a GPT-2 and `main` of others.
    """
    names, revision = _ids(repo, revision)
    for name in names:
        config = _cached(name, "config.json", revision, cache_dir)
        if config is not None:
            commit = config.parent.name
            for file in WEIGHT_FILES:
                path = _cached(name, file, commit, cache_dir)
                if path is not None and all(_cached(name, shard, commit, cache_dir) for shard in _shards(path)):
                    return path
    _log.info("%s is not cached as a whole: asking the Hub", repo)
    commit = _config(repo, revision, cache_dir).parent.name  # the same for all files, even if the branch moves
    for file in WEIGHT_FILES:
        path = _fetch(repo, file, commit, cache_dir)
        if path is not None:
            for shard in _shards(path):
                if _fetch(repo, shard, commit, cache_dir) is None:
                    raise FileNotFoundError(f"{repo} on the Hub has no {shard}, which its {file} lists")
            return path
    raise FileNotFoundError(f"{repo} on the Hub has no weights file; looked for {', '.join(WEIGHT_FILES)}")


def fetch_config(repo: str, *, revision: str | None, cache_dir: str | Path | None) -> Path:
    """The config.json of a Hub model, from the cache or the Hub; revision as for `fetch_weights`."""
    names, revision = _ids(repo, revision)
    for name in names:
        path = _cached(name, "config.json", revision, cache_dir)
        if path is not None:
            return path
    return _config(repo, revision, cache_dir)


def _config(repo: str, revision: str | None, cache_dir: str | Path | None) -> Path:
    path = _fetch(repo, "config.json", revision, cache_dir)
    if path is None:
        raise FileNotFoundError(f"{repo} on the Hub has no config.json: is it a model that transformers can load?")
    return path


def _ids(repo: str, revision: str | None) -> tuple[list[str], str | None]:
    """(the ids that a model may be cached under, the revision that is meant)."""
    pinned = PINNED.get(repo.removeprefix(_PINNED_OWNER)) if repo.startswith(_PINNED_OWNER) else None
    # Other tools cache the GPT-2s under their old ids, without an owner.
    return [repo, repo.removeprefix(_PINNED_OWNER)] if pinned else [repo], revision or pinned


def _shards(path: Path) -> list[str]:
    return list(dict.fromkeys(_weight_map(path).values())) if path.name.endswith(".index.json") else []


def fetch_tokenizer(repo: str, commit: str | None) -> Path | None:
    """The folder with the tokenizer files of a Hub model's commit, None for its main branch; None if it has none.

    What says which tokens are special, and whether prompts begin with one, is fetched too where the Hub can be reached.
    """
    repo = hub_id(repo)
    path = _fetch(repo, "tokenizer.json", commit, None)
    if path is None:
        path, merges = (_fetch(repo, file, commit, None) for file in ("vocab.json", "merges.txt"))
        if path is None or merges is None:
            return None
    for beside in ("tokenizer_config.json", "special_tokens_map.json"):
        try:
            _fetch(repo, beside, path.parent.name, None)
        except ConnectionError as error:
            _log.info("%s: the tokenizer is as its other files say", error)
            break
    return path.parent


def _cached(repo: str, file: str, revision: str | None, cache_dir: str | Path | None) -> Path | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repo, file, revision=revision, cache_dir=cache_dir, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def _reachable() -> bool:
    """Whether the Hub's machine answers at all, which takes a second to find out instead of half a minute; true where
    nobody may ask (offline), or only a proxy."""
    from huggingface_hub import constants

    where = urlsplit(constants.ENDPOINT)
    if constants.HF_HUB_OFFLINE or where.hostname is None or set(getproxies()) - {"no"}:
        return True
    address, found = (where.hostname, where.port or 443), list[bool]()

    def ask() -> None:
        with suppress(OSError), socket.create_connection(address, timeout=_ANSWER):
            found.append(True)

    asking = threading.Thread(target=ask, daemon=True)  # a name server that is silent knows no time-out
    asking.start()
    asking.join(2 * _ANSWER)
    return bool(found)


def _fetch(repo: str, file: str, revision: str | None, cache_dir: str | Path | None) -> Path | None:
    """A file from the cache or the Hub; None if the Hub says that the model has no such file."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    at = f"{repo} at revision {revision or 'main'}"
    path = _cached(repo, file, revision, cache_dir)
    if path is not None:
        return path
    if not _reachable():
        raise ConnectionError(
            f"{file} of {at} is not cached and the Hub cannot be reached: connect to a network, or give a folder that "
            "holds the model"
        )
    try:
        return Path(hf_hub_download(repo, file, revision=revision, cache_dir=cache_dir))
    except LocalEntryNotFoundError as error:
        raise ConnectionError(
            f"{file} of {at} is not cached and the Hub cannot be reached: connect to a network (and unset "
            "HF_HUB_OFFLINE), or give a folder that holds the model"
        ) from error
    except GatedRepoError as error:
        raise PermissionError(
            f"{repo} is gated: accept its terms on the Hub and log in with `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(f"{repo!r} is neither a folder here nor a public model on the Hub") from error
    except RevisionNotFoundError as error:
        raise ValueError(f"{repo} on the Hub has no revision {revision!r}") from error
    except EntryNotFoundError:
        return None
    except Exception as error:  # the transport's own classes differ between releases of huggingface_hub
        raise ConnectionError(f"{file} of {at} could not be fetched: {_first_line(error)}") from error
