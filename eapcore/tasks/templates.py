"""Sentences with blanks → prompt pairs that differ in chosen words alone, for any tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Formatter

from eapcore.tasks.pairs import PromptPairs
from eapcore.text.tokenizer import Tokenizer

END = "END"


@dataclass(frozen=True)
class Row:
    """One pair: a sentence with blanks, {NAME}, the words of each prompt, and token ids that are right and wrong."""

    sentence: str
    clean: Mapping[str, str]
    corrupt: Mapping[str, str]
    answers: Sequence[int]
    wrong: Sequence[int]


def pairs_of(rows: Sequence[Row], tokenizer: Tokenizer, *, name: str, seed: int, corruption: str) -> PromptPairs:
    """The pairs of rows. Every blank gives a place its name, that of its word's last token; END is the last token.

    Raises:
        ValueError: words that do not stand at the same places in both prompts, or that a tokenizer joins to others.
    """
    clean, corrupt, places = [], [], list[dict[str, int]]()
    for pair, row in enumerate(rows):
        (ours, at), (theirs, there) = (_filled(tokenizer, row.sentence, words) for words in (row.clean, row.corrupt))
        if len(ours) != len(theirs) or at != there:
            changed = [f"{a!r} by {row.corrupt[blank]!r}" for blank, a in row.clean.items() if a != row.corrupt[blank]]
            raise ValueError(f"pair {pair} of {name} must keep its tokens' places, but replaces {', '.join(changed)}")
        clean.append(ours)
        corrupt.append(theirs)
        places.append(at)
    return PromptPairs.from_lists(
        clean,
        corrupt,
        [row.answers for row in rows],
        [row.wrong for row in rows],
        name=name,
        seed=seed,
        details={"corruption": corruption, "bos": tokenizer.begins_with},
        places={place: [at.get(place, -1) for at in places] for place in dict.fromkeys(p for at in places for p in at)},
    )


def _filled(tokenizer: Tokenizer, sentence: str, words: Mapping[str, str]) -> tuple[list[int], dict[str, int]]:
    """A sentence's tokens, and where the last token of each blank's word is."""
    text, ends = "", {}
    for part, blank, _, _ in Formatter().parse(sentence):
        text += part
        if blank is not None:
            text += words[blank]
            ends[blank] = tokenizer.prompt(text)
    ids = tokenizer.prompt(text)
    for blank, start in ends.items():
        if ids[: len(start)] != start:
            raise ValueError(
                f"the tokenizer of {tokenizer.name} joins {words[blank]!r} to what stands behind it: {text!r}"
            )
    return ids, {blank: len(start) - 1 for blank, start in ends.items()} | {END: len(ids) - 1}


def single(tokenizer: Tokenizer, words: Sequence[str], what: str, least: int, *, space: str = " ") -> dict[str, int]:
    """Those of some words that are one token behind a space, or without one, each with its token, which no other has.

    Raises:
        ValueError: fewer than `least` are; those that are several tokens are named.
    """
    ids = {word: tokenizer(space + word) for word in words}
    found: dict[int, str] = {}
    for word, tokens in ids.items():
        if len(tokens) == 1:
            found.setdefault(tokens[0], word)
    if len(found) < least:
        several = [f"{word!r} is {_shown(tokenizer, tokens)}" for word, tokens in ids.items() if len(tokens) != 1]
        named = several or [f"{w!r} is the token of {found[t[0]]!r}" for w, t in ids.items() if found[t[0]] != w]
        more = f", and {len(named) - 5} more" if len(named) > 5 else ""
        raise ValueError(
            f"at least {least} {what} must be one token each, but {len(found)} of {len(words)} are with the tokenizer "
            f"of {tokenizer.name}: {', '.join(named[:5])}{more}"
        )
    return {word: token for token, word in found.items()}


def each(tokenizer: Tokenizer, words: Sequence[str], what: str, *, space: str = " ") -> list[int]:
    """The tokens of words, every one of which must be one token; ValueError that names those that are several."""
    found = single(tokenizer, words, what, len(words), space=space)
    return [found[word] for word in words]


def _shown(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    return " + ".join(map(repr, tokenizer.pieces(ids))) or "none"
