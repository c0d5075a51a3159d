"""A word-level tokenizer: one id for each word of a small fixed vocabulary."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

_WORD = re.compile(r"\w+|[^\w\s]")
_NO_SPACE_BEFORE = frozenset(",.")
PAD = "_"  # id 0 of every vocabulary here: what prompt pairs are padded with, and no word of any prompt


@dataclass(frozen=True)
class WordVocabulary:
    """The words of a toy task; a word's id is its place in `words`."""

    name: str
    words: tuple[str, ...]

    @cached_property
    def ids(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.words)}

    def encode(self, text: str) -> list[int]:
        """The ids of a text's words and punctuation marks; ValueError for a word that the vocabulary does not have."""
        found = _WORD.findall(text)
        for place, word in enumerate(found):
            if word not in self.ids or word == PAD:
                few = ", ".join(self.words[1:6])
                raise ValueError(
                    f"word {place} of the text, {word[:60]!r}, is not among the {len(self.words) - 1} words of "
                    f"{self.name} ({few}, …; capitals count)"
                )
        return [self.ids[word] for word in found]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; ValueError for an id outside the vocabulary."""
        pieces: list[str] = []
        for i in ids:
            if not 0 <= i < len(self.words):
                raise ValueError(f"token id {i} is outside the vocabulary of {self.name}, 0..{len(self.words) - 1}")
            word = self.words[i]
            pieces += [word] if not pieces or word in _NO_SPACE_BEFORE else [" ", word]
        return "".join(pieces)


def vocabulary(name: str, *groups: Sequence[str]) -> WordVocabulary:
    """The vocabulary of groups of words, each word once, behind the padding."""
    return WordVocabulary(name, tuple(dict.fromkeys([PAD, *(word for group in groups for word in group)])))
