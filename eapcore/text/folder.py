"""The tokenizer files that lie beside a model's weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from eapcore.text.tokenizer import Made, Tokenizer, made_of
from eapcore.text.words import vocabulary

NAMED = "tokenizer.json or vocab.json and merges.txt"
_CLASSES = {  # of kinds of models, where the files name none
    "gpt2": "GPT2Tokenizer",
    "gpt_neox": "GPTNeoXTokenizer",
    "qwen2": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
}
_SPECIAL = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_OF_A_TOKEN = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
_END = "<|endoftext|>"
_DEFAULTS = {  # special tokens of the classes whose rules are known, where the files name none
    "GPT2Tokenizer": {"bos": _END, "eos": _END, "unk": _END},
    "GPTNeoXTokenizer": {"bos": _END, "eos": _END, "unk": _END, "pad": "<|padding|>"},
    "Qwen2Tokenizer": {"eos": _END, "unk": _END, "pad": _END},
    "LlamaTokenizer": {"bos": "<s>", "eos": "</s>", "unk": "<unk>"},
    "CodeLlamaTokenizer": {"bos": "<s>", "eos": "</s>", "unk": "<unk>"},
    "GemmaTokenizer": {"bos": "<bos>", "eos": "<eos>", "unk": "<unk>", "pad": "<pad>", "mask": "<mask>"},
}
_BYTES = ("GPT2Tokenizer", "GPTNeoXTokenizer", "Qwen2Tokenizer")  # whose rule, with two files, is all there is to know
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


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
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise RuntimeError(
            "prompts as text need the package tokenizers: pip install 'eapcore[tokenizers]', or give token ids "
            f"({error})"
        ) from error
    beside = {name: _object(folder / f"{name}.json") for name in ("tokenizer_config", "config")}
    kind, whole = _class(beside), folder / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(whole)) if whole.is_file() else _of_two(folder, kind, beside)
        by_file = beside["config"].get("model_type") == "mistral" or '"ByteLevel"' in tokenizer.to_str()
        if kind == "LlamaTokenizer" and by_file:
            kind = "TokenizersBackend"  # transformers takes its file alone
        tokenizer.no_truncation()  # stored by whoever trained with it; a prompt is whole
        tokenizer.no_padding()
        config = beside["tokenizer_config"]
        other = _by_class(tokenizer, kind, config) if whole.is_file() else None
        both = [tokenizer] if other is None else [tokenizer, other]
        for each in both:
            bos = _add_tokens(folder, kind, beside, each)
            each.encode_special_tokens = config.get("split_special_tokens") is True
    except RuntimeError:
        raise
    except ValueError as error:
        raise error if str(folder) in str(error) else ValueError(f"the tokenizer files in {folder}: {error}") from error
    except Exception as error:  # the package raises plain Exception for a file that it cannot parse
        first = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise ValueError(f"the tokenizer files in {folder} cannot be read: {first}") from error
    # A whole tokenizer.json says by its post-processor what prompts begin with, as transformers 5 has it.
    begins = None if whole.is_file() else bool(config.get("add_bos_token"))
    if begins and bos is None:
        raise ValueError(f"{folder}/tokenizer_config.json asks for a bos_token that the vocabulary lacks")
    made = made_of(tokenizer, begins, bos)
    return made if other is None else replace(made, encode=partial(_agreed, folder, kind, tokenizer, other))


def _class(beside: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The class of transformers by whose rules the files are read, or the kind of model if that is all that is said."""
    about = beside["config"]
    named = beside["tokenizer_config"].get("tokenizer_class") or about.get("tokenizer_class")
    named = named or _CLASSES.get(str(about.get("model_type")), about.get("model_type"))
    return str(named).removesuffix("Fast") if named else None


def _of_two(folder: Path, kind: str | None, beside: Mapping[str, Mapping[str, Any]]) -> Any:
    """A tokenizer of vocab.json and merges.txt, which do not say how a text is split: its class does, GPT-2's if none
    is named.

    Raises:
        ValueError: another class, whose rule is not known here.
    """
    from tokenizers import Tokenizer, decoders, models

    if kind not in (None, *_BYTES):
        raise ValueError(
            f"{folder} has vocab.json and merges.txt for {kind!r}, whose rule for splitting a text is not known here, "
            f"only that of {', '.join(_BYTES)}: write a tokenizer.json by transformers' save_pretrained, or give ids"
        )
    tokenizer = Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    tokenizer.pre_tokenizer, normalizer = _rule(kind, beside["tokenizer_config"])
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _rule(kind: str | None, config: Mapping[str, Any]) -> tuple[Any, Any]:
    """How a class splits and how it normalises a text by itself."""
    from tokenizers import Regex, normalizers, pre_tokenizers

    space = config.get("add_prefix_space")
    if kind in ("LlamaTokenizer", "CodeLlamaTokenizer"):
        always = kind == "LlamaTokenizer" and config.get("legacy") is True
        scheme = "never" if space is False else "always" if always else "first"
        return pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False), None
    if kind == "GemmaTokenizer":
        return pre_tokenizers.Split(" ", behavior="merged_with_previous"), normalizers.Replace(" ", "▁")
    if kind == "Qwen2Tokenizer":
        split = pre_tokenizers.Split(Regex(_QWEN2), behavior="isolated")
        as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=space is True, use_regex=False)
        return pre_tokenizers.Sequence([split, as_bytes]), normalizers.NFC()
    return pre_tokenizers.ByteLevel(add_prefix_space=space is True), (
        normalizers.NFC() if kind == "GPTNeoXTokenizer" else None
    )


def _by_class(tokenizer: Any, kind: str | None, config: Mapping[str, Any]) -> Any:
    """The same tokenizer by its class's own rule, where its file has another one; transformers 4 reads the file, and
    transformers 5 takes the rule. A space before a text, which both take from beside it, is set."""
    from tokenizers import Tokenizer, pre_tokenizers

    if kind not in _DEFAULTS:
        return None
    if kind in _BYTES and isinstance(tokenizer.pre_tokenizer, pre_tokenizers.ByteLevel):
        tokenizer.pre_tokenizer.add_prefix_space = config.get("add_prefix_space") is True
    other = Tokenizer.from_str(tokenizer.to_str())
    other.pre_tokenizer, other.normalizer = _rule(kind, config)
    both = [json.loads(each.to_str()) for each in (tokenizer, other)]
    same = all(both[0][part] == both[1][part] for part in ("pre_tokenizer", "normalizer"))
    return None if same else other


def _agreed(folder: Path, kind: str | None, tokenizer: Any, other: Any, text: str) -> list[int]:
    """A text's tokens by the file; ValueError where they are others by the rule of its class."""
    ids, by_class = (list(each.encode(text, add_special_tokens=False).ids) for each in (tokenizer, other))
    if ids != by_class:
        raise ValueError(
            f"{folder}/tokenizer.json splits {text[:60]!r} into other tokens ({len(ids)}) than the rule of {kind} "
            f"({len(by_class)}), which tokenizer_config.json names: remove tokenizer_class there if the file is right"
        )
    return ids


def _add_tokens(folder: Path, kind: str | None, beside: Mapping[str, Mapping[str, Any]], tokenizer: Any) -> int | None:
    """Give a tokenizer the special and added tokens that the files beside it name, in transformers' order.

    Returns:
        The beginning-of-sequence token; None where none is named that the vocabulary has.

    Raises:
        ValueError: a token that is to have another id than it gets.
    """
    config = beside["tokenizer_config"]
    places: dict[int, Any] = {}
    if isinstance(config.get("added_tokens_decoder"), Mapping):
        named = dict(config)
        places = {int(place): _token(value) for place, value in config["added_tokens_decoder"].items()}
    else:
        named = {**config, **_object(folder / "special_tokens_map.json")}
    words = {name: named.get(f"{name}_token") for name in _SPECIAL}
    for name, word in _DEFAULTS.get(kind or "GPT2Tokenizer", {}).items():
        if words[name] is None and (kind is not None or tokenizer.token_to_id(word) is not None):
            words[name] = word
    extra = named.get("extra_special_tokens") or named.get("additional_special_tokens") or []
    extra = list(extra.values()) if isinstance(extra, Mapping) else list(extra)
    special = {
        name: _token(word, special=True, normalized=False)
        for name, word in [*words.items(), *enumerate(extra)]
        if word is not None
    }
    if not isinstance(config.get("added_tokens_decoder"), Mapping):
        contents = {each.content for each in special.values()}
        for text, place in _object(folder / "added_tokens.json").items():
            places[int(place)] = _token(text, special=text in contents, normalized=text not in contents)
    bos = tokenizer.token_to_id(special["bos"].content) if "bos" in special else beside["config"].get("bos_token_id")
    for place in sorted(places):
        tokenizer.add_tokens([places[place]])
    tokenizer.add_special_tokens(list(special.values()))
    for place, each in places.items():
        if tokenizer.token_to_id(each.content) != place:
            raise ValueError(
                f"{folder} gives the added token {each.content!r} the id {place}, but it would get "
                f"{tokenizer.token_to_id(each.content)}: write a tokenizer.json by transformers' save_pretrained"
            )
    return bos if isinstance(bos, int) and tokenizer.id_to_token(bos) is not None else None


def _token(value: Any, **defaults: bool) -> Any:
    from tokenizers import AddedToken

    if not isinstance(value, Mapping):
        return AddedToken(str(value), **defaults)
    given = {**defaults, **value}
    return AddedToken(**{name: given[name] for name in _OF_A_TOKEN if name in given})


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
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(found).__name__}")
    return found
