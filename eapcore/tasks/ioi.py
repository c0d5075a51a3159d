"""Indirect objects for any tokenizer: "When Mary and John came back from the park, John handed a ring to" → Mary.

Wang et al. 2022; the sentences and names are our own.
"""

from __future__ import annotations

import random
from dataclasses import replace

from eapcore.graph.graph import Graph
from eapcore.tasks.pairs import PromptPairs
from eapcore.tasks.published import Published
from eapcore.tasks.templates import Row, pairs_of, single
from eapcore.tasks.toy_ioi import OBJECTS, PLACES
from eapcore.tasks.truth import Edge, Truth, connect, heads, mlps, reads, truth
from eapcore.text.tokenizer import Tokenizer

NAMES = tuple(
    "Aaron Adam Alan Alex Alice Amy Andrew Anna Anthony Arthur Barbara Ben Betty Bill Brian Bruce Carl Carol Caroline "
    "Catherine Charles Charlotte Chris Christine Claire Clara Daniel David Deborah Dennis Diana Donald Dorothy Douglas "
    "Edward Elizabeth Ellen Emily Emma Eric Eva Frank Fred Gary George Grace Greg Hannah Harold Harry Heather Helen "
    "Henry Howard Ian Isaac Jack Jacob James Jane Janet Jason Jean Jeff Jennifer Jeremy Jessica Jim Joan Joe John "
    "Jonathan Joseph Joshua Julia Julie Justin Karen Kate Katherine Keith Kelly Kevin Larry Laura Lauren Leon Linda "
    "Lisa Louis Lucas Lucy Luke Margaret Maria Marie Martha Martin Mary Matthew Melissa Michael Michelle Monica Nancy "
    "Nathan Neil Nicholas Nicole Oliver Oscar Patricia Patrick Paul Peter Philip Rachel Ralph Raymond Rebecca Richard "
    "Robert Roger Ronald Ruth Ryan Sam Samuel Sandra Sara Sarah Sean Sharon Simon Sophie Stephanie Steven Stuart Susan "
    "Thomas Tim Timothy Tom Tony Victor Victoria Vincent Walter Wayne William".split()
)
# FIRST and SECOND are the two names in the order in which they come, S2 is one of them again: the other is the answer.
SENTENCES = (
    "Then {FIRST} and {SECOND} sat down at the {PLACE}, and {S2} gave a {OBJECT} to",
    "When {FIRST} and {SECOND} came back from the {PLACE}, {S2} handed a {OBJECT} to",
    "After {FIRST} and {SECOND} spent an hour at the {PLACE}, {S2} passed the {OBJECT} to",
    "While {FIRST} and {SECOND} were waiting outside the {PLACE}, {S2} offered a {OBJECT} to",
    "Because {FIRST} and {SECOND} liked the {PLACE}, {S2} decided to give a {OBJECT} to",
    "Yesterday {FIRST} and {SECOND} met at the {PLACE}, where {S2} showed a {OBJECT} to",
    "Last week {FIRST} and {SECOND} had an argument in the {PLACE}. Afterwards {S2} gave the {OBJECT} to",
    "As soon as {FIRST} and {SECOND} reached the {PLACE}, {S2} wanted to give the {OBJECT} to",
    "On Monday {FIRST} and {SECOND} worked late at the {PLACE}, and {S2} sold a {OBJECT} to",
    "One morning {FIRST} and {SECOND} walked to the {PLACE}. Before noon {S2} had given a {OBJECT} to",
)
CORRUPTIONS = ("other-names", "s2-io", "s2-other")
SPLITS = ("all", "train", "test")


def generate(
    n: int, seed: int, tokenizer: Tokenizer, corruption: str = "other-names", *, split: str = "all"
) -> PromptPairs:
    """Draw n pairs, half of them with the indirect object first (ABBA), half with the subject first (BABA).

    Places: IO, S1, S1+1, S2, END; PLACE and OBJECT, which are never replaced.

    Args:
        n: how many pairs.
        seed: of the draw; the same seed gives the same pairs with the same tokenizer.
        tokenizer: names are those of NAMES that are one token with it.
        corruption: "other-names" replaces all three names by three others (ABC → XYZ); "s2-io" has the indirect object
            in the place of S2, so that the answer is turned round; "s2-other" a third name there.
        split: "train" and "test" have no name in common, "test" one in four of them.

    Returns:
        PromptPairs with the indirect object as the answer and the subject as the wrong one.

    Raises:
        ValueError: too few names of one token, by their pieces; an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    ids = single(tokenizer, NAMES, "names", 20)
    names = [name for i, name in enumerate(ids) if split == "all" or (i % 4 == 0) == (split == "test")]
    rng, rows = random.Random(seed), []
    for pair in range(n):
        sentence = rng.choice(SENTENCES)
        io, s, *others = rng.sample(names, 5)
        first, second = ("{IO}", "{S1}") if pair % 2 == 0 else ("{S1}", "{IO}")
        beside = {"PLACE": rng.choice(PLACES), "OBJECT": rng.choice(OBJECTS)}
        clean = {"IO": io, "S1": s, "S2": s}
        corrupt = {
            "other-names": dict(zip(clean, others, strict=True)),
            "s2-io": clean | {"S2": io},
            "s2-other": clean | {"S2": others[2]},
        }[corruption]
        sentence = sentence.replace("{FIRST}", first).replace("{SECOND}", second)
        rows.append(Row(sentence, clean | beside, corrupt | beside, [ids[io]], [ids[s]]))
    pairs = pairs_of(rows, tokenizer, name="ioi", seed=seed, corruption=corruption)
    return replace(pairs, places={**pairs.places, "S1+1": pairs.places["S1"] + 1})


# The circuit of GPT-2 small

ROLES = {
    "name mover": heads("9.9 10.0 9.6"),
    "backup name mover": heads("10.10 10.6 10.2 10.1 11.2 9.7 9.0 11.9"),
    "negative name mover": heads("10.7 11.10"),
    "S-inhibition": heads("7.3 7.9 8.6 8.10"),
    "induction": heads("5.5 5.8 5.9 6.9"),
    "duplicate token": heads("0.1 0.10 3.0"),
    "previous token": heads("2.2 4.11"),
}
_WRITERS = ("negative name mover", "name mover", "backup name mover")  # which write to the logits
# (senders, receivers, which of their inputs), "input" being the embedding and all MLPs.
_WIRES = (
    ("input", "previous token", "qkv"),
    ("input", "duplicate token", "qkv"),
    ("input", "S-inhibition", "q"),
    ("previous token", "induction", "kv"),
    ("induction", "S-inhibition", "kv"),
    ("duplicate token", "S-inhibition", "kv"),
    *(("input", role, "kv") for role in _WRITERS),
    *(("S-inhibition", role, "q") for role in _WRITERS),
)


PUBLISHED = Published(
    model="gpt2",
    n_pairs=25,
    auc={"eap": 0.904, "acdc": 0.588, "acdc kl": 0.868},
    threshold=0.077,
    normalised=True,
    beyond=(0.25, 6),
    roles={
        "previous token": (0.0015, 0.0566),
        "duplicate token": (0.0011, 0.0441),
        "induction": (-0.0094, 0.0739),
        "S-inhibition": (-0.0167, 0.0364),
        "negative name mover": (0.2372, 0.2807),
        "name mover": (-0.0713, 0.2194),
    },
    curve=tuple(5 ** (-6 + 6 * i / 49) for i in range(50)),
    areas={"trapezoid": 0.895, "lower": 0.888, "upper": 0.902},
)


def true_circuit() -> Truth:
    """The circuit of Wang et al. 2022 with its 26 heads, as Conmy et al. 2023 make edges of it: 963 between components.

    All MLPs are in it, with every edge among them, from the embedding, to the logits, to all inputs of the 26 heads,
    and from these heads to the MLPs behind them; the heads' other edges are those of their roles.
    """
    graph = Graph(n_layers=12, n_heads=12, has_mlp=True)
    layers = mlps(range(12))
    of, inside = {**ROLES, "input": ("embed", *layers)}, [head for role in ROLES.values() for head in role]
    edges: list[Edge] = [("embed", "logits"), *((mlp, "logits") for mlp in layers)]
    edges += connect(("embed", *layers), layers)
    edges += connect(layers, inside)
    edges += connect(inside, layers, same_layer=True)
    for senders, receivers, parts in _WIRES:
        edges += connect(of[senders], of[receivers], parts)
    edges += [(head, "logits") for role in _WRITERS for head in ROLES[role]]
    inputs = [read for head in inside for read in reads(head)]
    return truth("gpt2", graph, "ioi", ROLES, edges, inputs, [*inputs, *layers])
