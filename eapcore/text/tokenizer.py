"""A tokenizer: text → token ids and back, made when it is first asked for, and what a prompt begins with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

BOS = ("auto", "yes", "no")
_ANCHOR = "\n"  # no tokenizer joins a line's end to the word behind it


@dataclass(frozen=True)
class Made:
    """What a tokenizer is once its files are read.

    encode: a text's tokens; special tokens that the text spells out are found, none is added. decode: the text of ids.
    own: what its own rule puts before a prompt. bos: the beginning-of-sequence token, None where there is none.
    """

    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    own: tuple[int, ...] = ()
    bos: int | None = None


class Tokenizer:
    """Text → token ids and back, as a model reads text.

    `prompt` gives the tokens of a prompt, `tokenizer(text)` those by which a text goes on behind another, as an answer
    does behind its prompt: nothing is added to them, and a word that is to follow a space begins with it, " Mary".
    Chat templates are not applied: a prompt that is to have one is written out.

    name says where it comes from. bos, what a prompt begins with: "auto" what the tokenizer's own rule puts there (its
    post-processor, add_bos_token, or a GGUF file's flag), "yes" its beginning-of-sequence token, "no" nothing. A text
    that spells the token out gets no second one. local: its files need not be fetched.

    Raises, when it is first asked for:
        RuntimeError: a package that it needs is not installed.
        ValueError: files that cannot be read, a text that it cannot split, or "yes" where there is no such token.
        OSError: files that can neither be found nor fetched.
    """

    def __init__(self, name: str, make: Callable[[], Made], bos: str = "auto", *, local: bool = True) -> None:
        if bos not in BOS:
            raise ValueError(f"bos must be one of {', '.join(BOS)}, got {bos!r}")
        self.name, self.bos, self._make, self._local = name, bos, make, local

    def __repr__(self) -> str:
        return f"Tokenizer({self.name!r}, bos={self.bos!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "bos": self.bos, "_make": self._make, "_local": self._local}

    @cached_property
    def made(self) -> Made:
        """The tokenizer itself, read now if it was not before."""
        return self._make()

    @property
    def at_hand(self) -> bool:
        """Whether nothing has to be fetched for it."""
        return self._local or "made" in vars(self)

    def with_bos(self, bos: str) -> Tokenizer:
        """The same tokenizer with another rule for what a prompt begins with."""
        other = Tokenizer(self.name, self._make, bos, local=self._local)
        if "made" in vars(self):
            vars(other)["made"] = self.made
        return other

    @cached_property
    def begins(self) -> tuple[int, ...]:
        """The tokens that are put before a prompt."""
        if self.bos == "no":
            return ()
        if self.bos == "auto" or self.made.own:
            return self.made.own
        if self.made.bos is None:
            raise ValueError(
                f"the tokenizer of {self.name} names no beginning-of-sequence token: leave bos at auto, or write the "
                "token into the prompts"
            )
        return (self.made.bos,)

    @property
    def begins_with(self) -> str:
        """What is put before a prompt, for people."""
        return "".join(self.pieces(self.begins)) or "none"

    def prompt(self, text: str) -> list[int]:
        """A prompt's tokens, with what prompts begin with."""
        ids, begins = self.made.encode(text), self.begins
        return ids if tuple(ids[: len(begins)]) == begins else [*begins, *ids]

    def __call__(self, text: str) -> list[int]:
        """The tokens by which a text goes on behind another."""
        if not self._marks_the_start:
            return self.made.encode(text)
        before, both = self.made.encode(_ANCHOR), self.made.encode(_ANCHOR + text)
        if both[: len(before)] != before:
            raise ValueError(f"the tokenizer of {self.name} cannot tell how {text!r} goes on behind another text")
        return both[len(before) :]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids."""
        return self.made.decode(ids)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text that each token stands for, for people."""
        return [self.made.decode([i]) for i in ids]

    @cached_property
    def _marks_the_start(self) -> bool:
        """Whether a text's first word is split in another way than one behind it, as with a space put before it."""
        try:
            first, behind = self.made.encode("a"), self.made.encode(f"{_ANCHOR}a")
        except ValueError:  # words alone: each is itself wherever it stands
            return False
        return behind != [*self.made.encode(_ANCHOR), *first]


def tokenizer_of(source: Any, what: str = "the first argument") -> Tokenizer:
    """The tokenizer that is meant: one of ours, that of a model, or an object of the packages tokenizers or
    transformers.

    Raises:
        ValueError: a model without a tokenizer, or none of these.
    """
    if isinstance(source, Tokenizer):
        return source
    if hasattr(source, "tokenizer"):
        if source.tokenizer is None:
            name = getattr(source, "name", type(source).__name__)
            raise ValueError(f"{name} carries no tokenizer: give a tokenizer in its place, or token ids by from_lists")
        return tokenizer_of(source.tokenizer, what)
    name = str(getattr(source, "name_or_path", "") or type(source).__name__)
    if hasattr(source, "encode") and hasattr(source, "token_to_id"):  # the package tokenizers
        return Tokenizer(name, lambda: made_of(source))
    if hasattr(source, "encode") and hasattr(source, "bos_token_id"):  # the package transformers
        return Tokenizer(name, lambda: _made_of_transformers(source))
    raise ValueError(f"{what} must be a model that carries a tokenizer, or a tokenizer, got a {type(source).__name__}")


def one_token(encode: Callable[[str], list[int]], text: str, what: str) -> int:
    """The one token that a text is behind another; ValueError where it is several, with what they stand for."""
    ids = encode(text)
    if len(ids) == 1:
        return ids[0]
    few, more = ids[:8], ", …" * (len(ids) > 8)
    pieces = f", {' + '.join(map(repr, encode.pieces(few)))}" if isinstance(encode, Tokenizer) and ids else ""
    hint = "begin it with a space, or choose another word" if text[:1] != " " else "choose another word"
    listed = f"[{', '.join(map(str, few))}{more}]"
    shown = repr(text if len(text) < 60 else text[:59] + "…")
    raise ValueError(f"{what} must be one token, but {shown} is {len(ids)} tokens {listed}{pieces}: {hint}")


def made_of(tokenizer: Any, own: bool | None = None, bos: int | None = None) -> Made:
    """One of the package tokenizers.

    own: whether its own rule begins prompts with bos; None asks its post-processor. bos: None takes the one token that
    this puts first.
    """

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    begins = _before(encode, lambda text: list(tokenizer.encode(text).ids))
    bos = begins[0] if bos is None and len(begins) == 1 else bos
    if own is not None:
        begins = () if not own else begins or (() if bos is None else (bos,))

    def decode(ids: Sequence[int]) -> str:
        text = str(tokenizer.decode(list(ids), skip_special_tokens=False))
        first = str(tokenizer.id_to_token(ids[0]) or "") if len(ids) else ""
        return f" {text}" if first.startswith("▁") and not text.startswith(" ") else text

    return Made(encode, decode, begins, bos)


def _made_of_transformers(tokenizer: Any) -> Made:
    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    return Made(encode, decode, _before(encode, tokenizer.encode), tokenizer.bos_token_id)


def _before(encode: Callable[[str], list[int]], whole: Callable[[str], list[int]]) -> tuple[int, ...]:
    """What a tokenizer puts before a text by itself. What it puts behind one is left out: it would be the last token,
    where a metric reads."""
    alone, all_of_it = encode("a"), list(whole("a"))
    at = next((i for i in range(len(all_of_it)) if all_of_it[i : i + len(alone)] == alone), 0)
    return tuple(all_of_it[:at])
