"""Induction prompts for the toy model: "… river stone … river" → stone, in random words."""

from __future__ import annotations

import random
from functools import cache
from itertools import permutations

from eapcore.tasks.pairs import PromptPairs
from eapcore.text.words import vocabulary

_WORDS = (
    "river stone cloud apple tiger paper glass wheel bread chair horse knife lemon mouse night ocean piano queen robot "
    "sugar table uncle violin water yellow zebra anchor bridge candle desert engine forest guitar hammer island jacket "
    "kettle ladder mirror needle orange pencil rabbit saddle temple valley window basket"
)
WORDS = vocabulary("toy-induction", _WORDS.split())
VOCAB = WORDS.words
LENGTHS = range(12, 25)
SPLITS = ("train", "test")


def encode(text: str) -> list[int]:
    """The ids of a text's words; ValueError for a word that the vocabulary does not have."""
    return WORDS.encode(text)


def decode(ids: list[int]) -> str:
    """The text of token ids; ValueError for an id outside the vocabulary."""
    return WORDS.decode(ids)


@cache
def word_pairs(split: str) -> tuple[tuple[int, int], ...]:
    """The ordered pairs (A, B) of a split, one in eight of all for "test"; ValueError for another split."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    pairs = list(permutations(range(1, len(VOCAB)), 2))
    random.Random(0).shuffle(pairs)
    cut = len(pairs) // 8
    return tuple(pairs[:cut] if split == "test" else pairs[cut:])


def generate(n: int, seed: int, *, split: str = "test") -> PromptPairs:
    """Draw n prompt pairs: clean "… A B … C D … A" → B, corrupt "… C B … A D … A" → D, A B and C D in either order.

    All words but A are different, and all places and distances are random, so that the answer hangs on one thing: which
    word stood behind the earlier A. The corrupt prompt has the first A and C change places. So both prompts have the
    same words, B and D stay where they are, and the logit difference of B and D is turned round: what is scored is how
    the model finds its place, not which words it has seen. (Changing B instead would leave all of the search
    untouched, and the heads that look for the earlier A would score nothing.)

    Args:
        n: how many pairs.
        seed: of the draw; the same seed gives the same pairs, whatever else was drawn before.
        split: "test" draws A B from ordered pairs that training never asked for, "train" from the others.

    Returns:
        PromptPairs with B as the answer and D as the wrong one.

    Raises:
        ValueError: n is less than 1, or an unknown split.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    rng = random.Random(seed)
    pairs = word_pairs(split)
    clean, corrupt, answers, wrong = [], [], [], []
    for _ in range(n):
        a, b = rng.choice(pairs)
        length = rng.choice(LENGTHS)
        c, d, *fillers = rng.sample([word for word in range(1, len(VOCAB)) if word not in (a, b)], length - 3)
        pieces = [[a, b], [c, d], *([word] for word in fillers)]
        rng.shuffle(pieces)
        body = [word for piece in pieces for word in piece]
        clean.append([*body, a])
        corrupt.append([*({a: c, c: a}.get(word, word) for word in body), a])
        answers.append(b)
        wrong.append(d)
    return PromptPairs.from_lists(clean, corrupt, answers, wrong, name="toy-induction", seed=seed, vocab=VOCAB)
