"""Indirect-object prompts for the toy model: "When Mary and John went to the store, John gave a drink to" → Mary."""

from __future__ import annotations

import random
from functools import cache
from itertools import combinations

from eapcore.tasks.pairs import PromptPairs
from eapcore.text.words import vocabulary

NAMES = tuple(
    "Mary John Alice Ben Clara David Emma Frank Grace Henry Irene Jack Kate Liam Nina Oscar Paula Quinn Rosa Sam "
    "Tina Victor Wendy Adam Bella Carl Diana Eric Fiona George Hannah Ivan Julia Kevin Laura Martin Nora Oliver "
    "Peter Rachel Simon Tom Ursula Vera Walter Zoe Anna Lucas Amy Brian Carol Daniel Edith Felix Gloria Harry Ida "
    "James Karen Leo Maria Nathan Olga Paul Ruth Steven Teresa Ulrich Violet William Yvonne Arthur Bertha Colin "
    "Donna Ernest Flora Gavin Helen Isaac Janet Keith Linda Michael Nancy Owen Pamela Robert Sarah Thomas Vivian "
    "Wayne Agnes Bruce Cecil Doris Edgar".split()
)
PLACES = tuple("store park school office garden station library market beach museum kitchen harbor".split())
OBJECTS = tuple("drink book ring ball letter map gift key ticket flower basket lamp".split())
GAVE = tuple("gave handed passed offered showed sold".split())
GIVE = tuple("give hand pass offer show sell".split())
OPENINGS = ("", "Yesterday", "One day ,", "Last summer ,", "As I remember ,", "On a cold morning ,")
ADJECTIVES = ("", "big", "small", "plain", "new red", "nice little")
# FIRST and SECOND are the two names in the order in which they appear together, S repeats one of them, behind them or
# before them: the answer is the other one. Openings, adjectives and the two places of S move every word about, so that
# no position tells which name is repeated, and a model has to compare the names.
TEMPLATES = (
    "OPENING when FIRST and SECOND went to the ADJ PLACE , S GAVE a ADJ OBJECT to",
    "OPENING after FIRST and SECOND came to the PLACE , S GAVE the ADJ OBJECT to",
    "OPENING FIRST met SECOND near the ADJ PLACE , and S GAVE a ADJ OBJECT to",
    "OPENING FIRST and SECOND had a long talk at the PLACE . Then S GAVE the ADJ OBJECT to",
    "OPENING because FIRST saw SECOND at the ADJ PLACE , S wanted to GIVE a ADJ OBJECT to",
    "OPENING S had a ADJ OBJECT . When FIRST and SECOND went to the ADJ PLACE , the OBJECT went to",
    "OPENING S came with a OBJECT . After FIRST and SECOND had a long talk , it was a gift to",
    "OPENING S found the ADJ OBJECT . Then FIRST met SECOND at the PLACE , and the OBJECT went to",
    "OPENING a ADJ OBJECT was with S . Because FIRST saw SECOND at the ADJ PLACE , it was a gift to",
    "OPENING the ADJ PLACE was new to S . When FIRST and SECOND came , the ADJ OBJECT went to",
)
_BLANKS = {"OPENING", "FIRST", "SECOND", "S", "ADJ", "PLACE", "OBJECT", "GAVE", "GIVE"}
_FIXED = " ".join([*OPENINGS, *ADJECTIVES, *TEMPLATES, *(t[8].upper() + t[9:] for t in TEMPLATES)]).split()
_OTHERS = [word for word in _FIXED if word not in _BLANKS]
WORDS = vocabulary("toy-ioi", NAMES, PLACES, OBJECTS, GAVE, GIVE, _OTHERS)
VOCAB = WORDS.words
SPLITS = ("train", "test")


def encode(text: str) -> list[int]:
    """The ids of a text's words; ValueError for a word that the vocabulary does not have."""
    return WORDS.encode(text)


def decode(ids: list[int]) -> str:
    """The text of token ids; ValueError for an id outside the vocabulary."""
    return WORDS.decode(ids)


def _filled(template: str, rng: random.Random) -> list[str]:
    """A template's words with every blank filled but the names: each adjective drawn anew, all others once."""
    choices = {"OPENING": OPENINGS, "PLACE": PLACES, "OBJECT": OBJECTS, "GAVE": GAVE, "GIVE": GIVE}
    drawn = {blank: rng.choice(words) for blank, words in choices.items()}
    pieces = [rng.choice(ADJECTIVES) if word == "ADJ" else drawn.get(word, word) for word in template.split()]
    words = " ".join(pieces).split()
    return [words[0][0].upper() + words[0][1:], *words[1:]]


@cache
def name_pairs(split: str) -> tuple[tuple[str, str], ...]:
    """The unordered pairs of names of a split, one in eight of all for "test"; ValueError for another split."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    pairs = list(combinations(NAMES, 2))
    random.Random(0).shuffle(pairs)
    cut = len(pairs) // 8
    return tuple(pairs[:cut] if split == "test" else pairs[cut:])


def generate(n: int, seed: int, *, split: str = "test") -> PromptPairs:
    """Draw n prompt pairs: clean with two names and one of them repeated, corrupt with three other names (ABC → XYZ).

    The corrupt prompt keeps the template, the place, the object and the verb, so that what differs is the names alone,
    and neither the answer nor the wrong name is in it: its logit difference is near 0.

    Args:
        n: how many pairs.
        seed: of the draw; the same seed gives the same pairs, whatever else was drawn before.
        split: "test" draws the names of the clean prompt from pairs that training never saw in either order, "train"
            from the others.

    Returns:
        PromptPairs with the indirect object as the answer and the repeated name as the wrong one.

    Raises:
        ValueError: n is less than 1, or an unknown split.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    rng = random.Random(seed)
    pairs = name_pairs(split)
    clean: list[list[int]] = []
    corrupt: list[list[int]] = []
    answers, wrong = [], []
    for _ in range(n):
        template = _filled(rng.choice(TEMPLATES), rng)
        first, second = rng.sample(rng.choice(pairs), 2)
        repeated, other = rng.sample((first, second), 2)
        others = rng.sample([name for name in NAMES if name not in (first, second)], 3)
        for prompts, names in ((clean, (first, second, repeated)), (corrupt, others)):
            blanks = dict(zip(("FIRST", "SECOND", "S"), names, strict=True))
            prompts.append([WORDS.ids[blanks.get(word, word)] for word in template])
        answers.append(WORDS.ids[other])
        wrong.append(WORDS.ids[repeated])
    return PromptPairs.from_lists(clean, corrupt, answers, wrong, name="toy-ioi", seed=seed, vocab=VOCAB)
