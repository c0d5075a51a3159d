"""Subject-verb agreement for any tokenizer: "The keys near the cabinet" → are, were, have."""

from __future__ import annotations

import random

from eapcore.tasks.pairs import PromptPairs
from eapcore.tasks.templates import Row, each, pairs_of, single
from eapcore.text.tokenizer import Tokenizer

# Each in the singular and in the plural.
NOUNS = tuple(
    (singular, plural)
    for singular, plural in (
        word.split("/")
        for word in (
            "key/keys cabinet/cabinets doctor/doctors teacher/teachers student/students book/books picture/pictures "
            "window/windows door/doors farmer/farmers lawyer/lawyers child/children dog/dogs cat/cats bird/birds "
            "car/cars tree/trees house/houses river/rivers flower/flowers soldier/soldiers singer/singers actor/actors "
            "officer/officers writer/writers manager/managers friend/friends neighbor/neighbors guard/guards "
            "pilot/pilots nurse/nurses worker/workers player/players artist/artists author/authors engineer/engineers "
            "judge/judges boy/boys girl/girls king/kings horse/horses ship/ships boat/boats wall/walls bridge/bridges "
            "table/tables machine/machines letter/letters stone/stones tower/towers church/churches village/villages"
        ).split()
    )
)
VERBS = (("is", "was", "has"), ("are", "were", "have"))
SENTENCES = (
    "The {SUBJECT} near the {OTHER}",
    "The {SUBJECT} behind the {OTHER}",
    "The {SUBJECT} next to the {OTHER}",
    "I think that the {SUBJECT} beside the {OTHER}",
    "They say the {SUBJECT} in front of the {OTHER}",
    "Last year the {SUBJECT} close to the {OTHER}",
    "Nobody knew that the {SUBJECT} opposite the {OTHER}",
)
CORRUPTIONS = ("number", "noun")


def generate(n: int, seed: int, tokenizer: Tokenizer, corruption: str = "number") -> PromptPairs:
    """Draw n pairs, half of them in the plural; the number of the noun between subject and verb is drawn by itself.

    Places: SUBJECT, OTHER, END (the same token as OTHER).

    Args:
        n: how many pairs.
        seed: of the draw; the same seed gives the same pairs with the same tokenizer.
        tokenizer: nouns are those of NOUNS that are one token with it in both numbers.
        corruption: "number" puts the subject into its other number, "noun" another noun in that number in its place.

    Returns:
        PromptPairs with is, was, has or are, were, have as the answers, the others as the wrong ones.

    Raises:
        ValueError: too few nouns, or a verb, of one token, by their pieces.
    """
    ids = single(tokenizer, [word for noun in NOUNS for word in noun], "nouns", 40)
    nouns = [noun for noun in NOUNS if all(word in ids for word in noun)]
    verbs = [each(tokenizer, of, "verbs") for of in VERBS]
    rng, rows = random.Random(seed), []
    for pair in range(n):
        subject, other, instead = rng.sample(nouns, 3)
        number = pair % 2
        clean = {"SUBJECT": subject[number], "OTHER": rng.choice(other)}
        corrupt = clean | {"SUBJECT": (subject if corruption == "number" else instead)[1 - number]}
        rows.append(Row(rng.choice(SENTENCES), clean, corrupt, verbs[number], verbs[1 - number]))
    return pairs_of(rows, tokenizer, name="agreement", seed=seed, corruption=corruption)
