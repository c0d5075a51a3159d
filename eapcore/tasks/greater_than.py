"""Years for any tokenizer that reads their last two digits as one token: "The war lasted from the year 1732 to the year
17" → 33, 34, …

Hanna, Liu, Variengien 2023; the nouns are our own.
"""

from __future__ import annotations

import random

from eapcore.graph.graph import Graph
from eapcore.tasks.pairs import PromptPairs
from eapcore.tasks.published import Published
from eapcore.tasks.templates import Row, each, pairs_of
from eapcore.tasks.truth import Edge, Truth, connect, heads, mlps, reads, truth
from eapcore.text.tokenizer import Tokenizer

NOUNS = tuple(
    "war siege strike trial drought famine voyage journey expedition marriage alliance friendship partnership reign "
    "revolt rebellion uprising conflict dispute campaign occupation construction project experiment study tour "
    "festival exhibition epidemic plague truce tradition dynasty empire republic union league treaty contract".split()
)
SENTENCE = "The {NOUN} lasted from the year {XX}{YY} to the year {XX again}"
CENTURIES = range(11, 18)
CORRUPTIONS = ("01",)


def generate(n: int, seed: int, tokenizer: Tokenizer, corruption: str = "01") -> PromptPairs:
    """Draw n pairs; the corrupt prompt has 01 in the place of YY, behind which every year is greater.

    Places: NOUN, XX, YY, XX again, END (the same token as XX again).

    Args:
        n: how many pairs.
        seed: of the draw; the same seed gives the same pairs with the same tokenizer.
        tokenizer: years are those that it splits into XX and YY.
        corruption: "01".

    Returns:
        PromptPairs with the two-digit tokens above YY as the answers, 00 to YY as the wrong ones.

    Raises:
        ValueError: two digits are several tokens, by their pieces.
    """
    ends = [f"{year:02d}" for year in range(100)]
    ids = each(tokenizer, ends, "two-digit ends of years", space="")
    years = [
        (f"{century}", year)
        for century in CENTURIES
        for year in range(2, 99)
        if all(tokenizer(f" {century}{ends[y]}")[1:] == [ids[y]] for y in (year, 1))
    ]
    if not years:
        raise ValueError(f"the tokenizer of {tokenizer.name} splits no year from 1102 to 1798 into XX and YY")
    rng, rows = random.Random(seed), []
    for _ in range(n):
        century, year = rng.choice(years)
        clean = {"NOUN": rng.choice(NOUNS), "XX": century, "YY": ends[year], "XX again": century}
        rows.append(Row(SENTENCE, clean, clean | {"YY": ends[1]}, ids[year + 1 :], ids[: year + 1]))
    return pairs_of(rows, tokenizer, name="greater-than", seed=seed, corruption=corruption)


# The circuit of GPT-2 small

ROLES = {"input 0.3, 0.5": heads("0.3 0.5"), "input 0.1": heads("0.1"), "middle": heads("5.5 6.1 6.9 7.10 8.11 9.1")}


PUBLISHED = Published(
    model="gpt2",
    n_pairs=25,
    auc={"eap": 0.896, "acdc": 0.458, "acdc kl": 0.849},
    threshold=0.009,
    moments={"inside": (-0.0061, 0.0237), "outside": (-0.0000, 0.0005)},
)


def true_circuit() -> Truth:
    """The circuit of Hanna et al. 2023, as Conmy et al. 2023 make edges of it: 235 between components."""
    graph = Graph(n_layers=12, n_heads=12, has_mlp=True)
    first, one, middle = ROLES.values()
    early, late = mlps(range(4)), mlps(range(8, 12))
    edges: list[Edge] = list(connect(["embed"], [*first, *one, *early]))
    edges += [(sender, "logits") for sender in (*middle, *late)]
    for senders, receivers in ((early, early), (late, late), (mlps(range(9)), mlps(range(9)))):
        edges += connect(senders, receivers)
    for senders, receivers in ((one, early), (one, middle), (first, middle), (early, middle), (middle, late)):
        edges += connect(senders, receivers, same_layer=True)
    edges += connect(mlps(range(12)), middle, "q")
    inputs = [read for head in (*first, *one, *middle) for read in reads(head)]
    return truth("gpt2", graph, "greater-than", ROLES, edges, inputs, inputs)
