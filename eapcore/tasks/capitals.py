"""Countries and their capitals for any tokenizer: "The capital of France is the city of" → Paris."""

from __future__ import annotations

import random

from eapcore.tasks.pairs import PromptPairs
from eapcore.tasks.templates import Row, pairs_of, single
from eapcore.text.tokenizer import Tokenizer

CAPITALS = dict(
    pair.split("/")
    for pair in (
        "France/Paris Germany/Berlin Italy/Rome Spain/Madrid Japan/Tokyo Russia/Moscow China/Beijing Egypt/Cairo "
        "Greece/Athens Turkey/Ankara Iran/Tehran Iraq/Baghdad Syria/Damascus Cuba/Havana Canada/Ottawa Poland/Warsaw "
        "Austria/Vienna Hungary/Budapest Ireland/Dublin Norway/Oslo Sweden/Stockholm Finland/Helsinki "
        "Denmark/Copenhagen Portugal/Lisbon Belgium/Brussels Ukraine/Kiev Kenya/Nairobi Lebanon/Beirut "
        "Afghanistan/Kabul Thailand/Bangkok Indonesia/Jakarta Philippines/Manila Peru/Lima Chile/Santiago "
        "England/London Scotland/Edinburgh Wales/Cardiff Australia/Canberra Bulgaria/Sofia Netherlands/Amsterdam "
        "Switzerland/Bern Vietnam/Hanoi Serbia/Belgrade Croatia/Zagreb Libya/Tripoli"
    ).split()
)
SENTENCES = (
    "The capital of {COUNTRY} is the city of",
    "Everyone knows that the capital of {COUNTRY} is",
    "The government of {COUNTRY} has its seat in the capital,",
    "In {COUNTRY}, the capital city is called",
)
CORRUPTIONS = ("other-country",)


def generate(n: int, seed: int, tokenizer: Tokenizer, corruption: str = "other-country") -> PromptPairs:
    """Draw n pairs that differ in the country alone.

    Places: COUNTRY, END.

    Args:
        n: how many pairs.
        seed: of the draw; the same seed gives the same pairs with the same tokenizer.
        tokenizer: countries are those of CAPITALS that are one token with it, with their capitals.
        corruption: "other-country".

    Returns:
        PromptPairs with the country's capital as the answer, that of the corrupt prompt's as the wrong one.

    Raises:
        ValueError: too few countries or capitals of one token, by their pieces.
    """
    countries = single(tokenizer, list(CAPITALS), "countries", 15)
    capitals = single(tokenizer, [CAPITALS[country] for country in countries], "capitals", 10)
    known = [country for country in countries if CAPITALS[country] in capitals]
    rng, rows = random.Random(seed), []
    for _ in range(n):
        country, other = rng.sample(known, 2)
        right, wrong = ([capitals[CAPITALS[c]]] for c in (country, other))
        rows.append(Row(rng.choice(SENTENCES), {"COUNTRY": country}, {"COUNTRY": other}, right, wrong))
    return pairs_of(rows, tokenizer, name="capitals", seed=seed, corruption=corruption)
