"""The tokenizer files that lie beside a model's weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from eapcore.text.tokenizer import Made, Tokenizer, made_of
from eapcore.text.words import vocabulary

NAMED = "tokenizer.json or vocab.json and merges.txt"


def find_tokenizer(folder: str | Path, name: str | None = None) -> Tokenizer | None:
    """The tokenizer of a folder, read when it is first asked for: tokenizer.json, vocab.json with merges.txt, or the
    words of a toy; None if it has none of these."""
    folder = Path(folder)
    read = _kind(folder)
    return None if read is None else Tokenizer(name or str(folder), partial(read, folder))


def fetched_tokenizer(name: str, fetch: Callable[[], Path | None]) -> Tokenizer:
    """A tokenizer whose folder is fetched when it is first asked for; fetch gives None where there is none."""
    return Tokenizer(name, partial(_fetched, name, fetch), local=False)


def _fetched(name: str, fetch: Callable[[], Path | None]) -> Made:
    folder = fetch()
    read = None if folder is None else _kind(folder)
    if folder is None or read is None:
        raise ValueError(f"{name} on the Hub has no {NAMED}: give token ids, or --tokenizer FOLDER")
    return read(folder)


def _kind(folder: Path) -> Callable[[Path], Made] | None:
    def has(name: str) -> bool:
        return (folder / name).is_file()

    if has("tokenizer.json") or (has("vocab.json") and has("merges.txt")):
        return _read
    return _words if has("vocab.json") and "eapcore" in _object(folder / "config.json") else None


def _read(folder: Path) -> Made:
    whole, vocab, merges = (folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    except ImportError as error:
        raise RuntimeError(
            "prompts as text need the package tokenizers: pip install 'eapcore[tokenizers]', or give token ids"
        ) from error
    try:
        if whole.is_file():
            tokenizer = Tokenizer.from_file(str(whole))
        else:
            tokenizer = Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            tokenizer.decoder = decoders.ByteLevel()
    except Exception as error:  # the package raises plain Exception for a file that it cannot parse
        raise ValueError(f"the tokenizer files in {folder} cannot be read: {error}") from error
    # A whole tokenizer.json says by its post-processor what prompts begin with, as transformers 5 has it.
    beside = _object(folder / "tokenizer_config.json")
    begins, bos = None if whole.is_file() else bool(beside.get("add_bos_token")), _bos(folder, beside, tokenizer)
    if begins and bos is None:
        raise ValueError(f"{folder}/tokenizer_config.json asks for a bos_token that the vocabulary lacks")
    return made_of(tokenizer, begins, bos)


def _bos(folder: Path, beside: Mapping[str, Any], tokenizer: Any) -> int | None:
    """The beginning-of-sequence token that the files beside a tokenizer name; None where they name none of its own."""
    named = beside.get("bos_token") or _object(folder / "special_tokens_map.json").get("bos_token")
    named = named.get("content") if isinstance(named, Mapping) else named
    bos = (
        tokenizer.token_to_id(named) if isinstance(named, str) else _object(folder / "config.json").get("bos_token_id")
    )
    return bos if isinstance(bos, int) and tokenizer.id_to_token(bos) is not None else None


def _words(folder: Path) -> Made:
    about = _object(folder / "config.json")["eapcore"]
    words = vocabulary(str(about.get("task", folder.name)), list(_object(folder / "vocab.json")))
    return Made(words.encode, words.decode)


def _object(path: Path) -> dict[str, Any]:
    """The JSON object of a file; empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(found).__name__}")
    return found
