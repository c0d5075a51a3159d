"""The tokenizer that a GGUF file carries."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eapcore.models.gguf import read_gguf
from eapcore.text.tokenizer import Made, Tokenizer, made_of

if TYPE_CHECKING:
    import tokenizers

# Expressions that split a text one after the other; "digits" makes each digit a piece of its own. All of them are
# followed by the bytes' characters.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CASES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE = {
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "qwen2": (_CASES % "",),
    "llama-bpe": (_CASES % "{1,3}",),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
}
_SAME = {"llama3": "llama-bpe", "llama-v3": "llama-bpe"}
_UNKNOWN, _CONTROL, _USER = 2, 3, 4  # kinds of tokens that are found in a text before it is split
_AT = "tokenizer.ggml."


def gguf_tokenizer(path: str | Path) -> Tokenizer:
    """A GGUF file's own tokenizer, read when it is first asked for.

    Raises, then:
        RuntimeError: the package tokenizers is not installed.
        ValueError: the file has no tokenizer, or one of a kind that is not known; it is named.
    """
    return Tokenizer(str(path), partial(_read, Path(path)))


def has_tokenizer(own: Mapping[str, Any]) -> bool:
    """Whether a file's metadata describe a tokenizer, of a kind that is known or not."""
    return own.get(_AT + "model") not in (None, "none", "no_vocab")


def _read(path: Path) -> Made:
    own = read_gguf(path).metadata
    whole = rebuilt(path, own)
    begins = own.get(_AT + "add_bos_token")
    if begins is None:  # llama.cpp's own rule
        begins = _pre(path, own) == "llama-bpe"
    bos = own.get(_AT + "bos_token_id")
    if begins and not isinstance(bos, int):
        raise ValueError(f"{path} wants prompts to begin with a token and does not say which (bos_token_id)")
    return made_of(whole, bool(begins), bos if isinstance(bos, int) else None)


def rebuilt(path: Path, own: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """The tokenizer that a file's metadata describe; it adds no beginning-of-sequence token by itself."""
    try:
        import tokenizers
    except ImportError as error:
        raise RuntimeError(
            "prompts as text need the package tokenizers: pip install 'eapcore[gguf]', or give token ids"
        ) from error
    pre = _pre(path, own)
    tokens, merges, kinds = (own.get(_AT + name) for name in ("tokens", "merges", "token_type"))
    if not isinstance(tokens, list) or not isinstance(merges, list) or not isinstance(kinds, list):
        raise ValueError(f"{path} must have tokenizer.ggml.tokens, merges and token_type, each a list")
    try:
        model = tokenizers.models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=[_pair(merge) for merge in merges],
            ignore_merges=pre == "llama-bpe",
        )
        tokenizer = tokenizers.Tokenizer(model)
    except Exception as error:  # the package raises plain Exception for merges that do not fit
        raise ValueError(f"the tokenizer of {path} cannot be read: {error}") from error
    splits = [tokenizers.pre_tokenizers.Split(tokenizers.Regex(split), behavior="isolated") for split in PRE[pre]]
    as_bytes = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([*splits, as_bytes])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    if pre == "qwen2":
        tokenizer.normalizer = tokenizers.normalizers.NFC()
    found = {kind: [t for t, k in zip(tokens, kinds, strict=False) if k == kind] for kind in set(kinds)}
    special = found.get(_UNKNOWN, []) + found.get(_CONTROL, [])
    tokenizer.add_special_tokens([tokenizers.AddedToken(text, normalized=False) for text in special])
    tokenizer.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in found.get(_USER, [])])
    return tokenizer


def _pre(path: Path, own: Mapping[str, Any]) -> str:
    """How a text is split, a key of PRE; ValueError for another kind of tokenizer."""
    instead = "give token ids, or --tokenizer FOLDER"
    model, pre = own.get(_AT + "model"), own.get(_AT + "pre")
    if model != "gpt2":
        found = "no tokenizer" if model is None else f"a tokenizer of the kind {model!r}"
        raise ValueError(f"{path} has {found}, only 'gpt2' (byte-level BPE) is supported: {instead}")
    pre = _SAME.get(str(pre), pre)
    if pre not in PRE:
        found = "does not say how it splits a text" if pre is None else f"splits a text by the rule {pre!r}"
        raise ValueError(
            f"the tokenizer of {path} {found} (tokenizer.ggml.pre), only {', '.join(PRE)} are supported: {instead}"
        )
    return str(pre)


def _pair(merge: str) -> tuple[str, str]:
    """The two tokens of a merge, apart at the first space behind the first character."""
    at = merge.find(" ", 1)
    if at < 0:
        raise ValueError(f"{merge!r} is not a merge of two tokens")
    return merge[:at], merge[at + 1 :]
