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
    "dbrx": (_CASES % "{1,3}",),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
}
_PIECES = "llama"  # what llama.cpp calls SentencePiece's tokenizers, pieces with scores
_SAME = {"llama3": "llama-bpe", "llama-v3": "llama-bpe"}
_NORMAL, _UNKNOWN, _CONTROL, _USER = 1, 2, 3, 4  # kinds of tokens; all but the first are found before a text is split
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
    begins, pre = own.get(_AT + "add_bos_token"), _pre(path, own)
    if begins is None:  # llama.cpp's own rule
        begins = pre in ("llama-bpe", _PIECES)
    bos = own.get(_AT + "bos_token_id", 1 if pre == _PIECES else None)
    if begins and not isinstance(bos, int):
        raise ValueError(f"{path} wants prompts to begin with a token and does not say which (bos_token_id)")
    return made_of(whole, bool(begins), bos if isinstance(bos, int) else None)


def rebuilt(path: Path, own: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """The tokenizer that a file's metadata describe; it adds no beginning-of-sequence token by itself."""
    try:
        import tokenizers
    except ImportError as error:
        raise RuntimeError(
            f"prompts as text need the package tokenizers: pip install 'eapcore[gguf]', or give token ids ({error})"
        ) from error
    pre = _pre(path, own)
    joined = "scores" if pre == _PIECES else "merges"
    lists: list[Any] = [own.get(_AT + name) for name in ("tokens", joined, "token_type")]
    tokens, _, kinds = lists
    if not all(isinstance(each, list) for each in lists):
        raise ValueError(f"{path} must have tokenizer.ggml.tokens, {joined} and token_type, each a list")
    try:
        tokenizer = (_of_pieces if pre == _PIECES else _of_bytes)(own, pre, *lists)
    except Exception as error:  # the package raises plain Exception for merges that do not fit
        raise ValueError(f"the tokenizer of {path} cannot be read: {error}") from error
    found = {kind: [t for t, k in zip(tokens, kinds, strict=False) if k == kind] for kind in set(kinds)}
    special = found.get(_UNKNOWN, []) + found.get(_CONTROL, [])
    tokenizer.add_special_tokens([tokenizers.AddedToken(text, normalized=False) for text in special])
    tokenizer.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in found.get(_USER, [])])
    return tokenizer


def _of_bytes(
    own: Mapping[str, Any], pre: str, tokens: list[str], merges: list[str], kinds: list[int]
) -> tokenizers.Tokenizer:
    """Byte-level BPE."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    vocab = {token: index for index, token in enumerate(tokens)}
    pairs = [_pair(merge) for merge in merges]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs, ignore_merges=pre == "llama-bpe"))
    splits = [pre_tokenizers.Split(Regex(split), behavior="isolated") for split in PRE[pre]]
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _of_pieces(
    own: Mapping[str, Any], pre: str, tokens: list[str], scores: list[float], kinds: list[int]
) -> tokenizers.Tokenizer:
    """SentencePiece's BPE: of two neighbouring pieces that together are one, those with the highest score are joined
    first. Spaces are ▁; a character that is no piece becomes its bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocab, merges = {token: index for index, token in enumerate(tokens)}, []
    for index, (piece, score, kind) in enumerate(zip(tokens, scores, kinds, strict=True)):
        if kind in (_NORMAL, _USER):
            splits = ((piece[:at], piece[at:]) for at in range(1, len(piece)))
            merges += [(-score, index, vocab[a], vocab[b]) for a, b in splits if a in vocab and b in vocab]
    merges.sort()
    pairs = [(tokens[a], tokens[b]) for _, _, a, b in merges]
    unknown = tokens[own.get(_AT + "unknown_token_id", 0)]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    spaces, back = normalizers.Replace(" ", "▁"), [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.normalizer = spaces
    if own.get(_AT + "add_space_prefix", True):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
        back.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(back)
    return tokenizer


def _pre(path: Path, own: Mapping[str, Any]) -> str:
    """How a text is split, a key of PRE, or _PIECES; ValueError for another kind of tokenizer."""
    instead = "give token ids, or --tokenizer FOLDER"
    model, pre = own.get(_AT + "model"), own.get(_AT + "pre")
    if model == _PIECES:
        return _PIECES
    if model != "gpt2":
        found = "no tokenizer" if model is None else f"a tokenizer of the kind {model!r}"
        known = f"'gpt2' (byte-level BPE) and {_PIECES!r} (SentencePiece) are"
        raise ValueError(f"{path} has {found}, only {known} supported: {instead}")
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
