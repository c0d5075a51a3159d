"""Arguments in a docstring, for any tokenizer: the third one that the def line has is to follow the first two.

Heimersheim, Janiak 2023; the words are our own.
"""

from __future__ import annotations

import random

from eapcore.graph.graph import Graph
from eapcore.tasks.pairs import PromptPairs
from eapcore.tasks.published import Published
from eapcore.tasks.templates import Row, pairs_of, single
from eapcore.tasks.truth import Edge, Truth, heads, truth
from eapcore.text.tokenizer import Tokenizer

ARGUMENTS = tuple(
    "file files size path name names value values index count data key keys list text line lines node page field user "
    "date time code table group image model event state token query label score layer input output target source "
    "result option options config client server host port mode level order title filter buffer object string number "
    "message folder color width height length limit offset start stop first last current old new parent child request "
    "response project settings parameters fields content context session".split()
)
WORDS = tuple(
    "river garden winter summer paper bridge castle window forest island market kitchen doctor farmer singer horse "
    "tiger bread butter sugar silver copper music picture letter story morning evening night ocean desert mountain "
    "valley village church school station street tower wall roof door chair lamp mirror clock ship train wheel engine "
    "flower tree leaf grass stone sand snow rain wind cloud".split()
)
SENTENCE = (
    "\ndef {FUNCTION}(self, {X1}, {X2}, {A_def}, {B_def}, {C_def}, {X3}):\n"
    '    """{W1} {W2} {W3}\n\n'
    "    :param {A_doc}: {W4} {W5}\n"
    "    :param {B_doc}: {W6} {W7}\n"
    "    :param"
)
CORRUPTIONS = ("random-random", "random-def", "random-doc")


def generate(n: int, seed: int, tokenizer: Tokenizer, corruption: str = "random-random") -> PromptPairs:
    """Draw n pairs: functions with three documented arguments A, B, C, the third of which is yet to be named.

    Places: A_def, B_def, C_def, A_doc, B_doc, END; FUNCTION, X1 to X3 (arguments that are not documented) and W1 to W7
    (words of the descriptions), which are never replaced.

    Args:
        n: how many pairs.
        seed: of the draw; the same seed gives the same pairs with the same tokenizer.
        tokenizer: arguments are those of ARGUMENTS that are one token with it.
        corruption: "random-def" has three other names in the def line, "random-doc" two others in the docstring,
            "random-random" both, all of them different, so that nothing says which argument follows.

    Returns:
        PromptPairs with C as the answer, all other arguments of both prompts as the wrong ones.

    Raises:
        ValueError: too few arguments of one token, by their pieces.
    """
    ids = single(tokenizer, ARGUMENTS, "names of arguments", 20)
    rng, rows = random.Random(seed), []
    for _ in range(n):
        function, x1, x2, x3, a, b, c, *others = rng.sample(list(ids), 12)
        beside = {"FUNCTION": function, "X1": x1, "X2": x2, "X3": x3}
        beside |= {f"W{i}": word for i, word in enumerate(rng.sample(WORDS, 7), 1)}
        clean = {"A_def": a, "B_def": b, "C_def": c, "A_doc": a, "B_doc": b}
        corrupt = dict(clean)
        if corruption != "random-doc":
            corrupt |= dict(zip(("A_def", "B_def", "C_def"), others, strict=False))
        if corruption != "random-def":
            corrupt |= {"A_doc": others[3], "B_doc": others[4]}
        wrong = dict.fromkeys([a, b, x1, x2, x3, *corrupt.values()])
        rows.append(Row(SENTENCE, clean | beside, corrupt | beside, [ids[c]], [ids[w] for w in wrong if w != c]))
    return pairs_of(rows, tokenizer, name="docstring", seed=seed, corruption=corruption)


# The circuit of the attention-only model of four layers, attn-only-4l

ROLES = {
    "duplicate token": heads("0.5 1.2"),
    "induction and fuzzy previous token": heads("1.4"),
    "fuzzy previous token": heads("2.0"),
    "argument mover": heads("3.0 3.6"),
}
# What each receiver reads: {receiver: senders}.
_READS = {
    "a0.h5<v>": "embed", "a1.h4<v>": "embed a0.h5", "a1.h2<q>": "embed a0.h5", "a1.h2<k>": "embed a0.h5",
    "a2.h0<q>": "embed a0.h5", "a2.h0<k>": "embed a0.h5", "a2.h0<v>": "a1.h4",
    **{f"{head}<q>": "a1.h4" for head in ROLES["argument mover"]},
    **{f"{head}<k>": "a1.h2 a2.h0" for head in ROLES["argument mover"]},
    **{f"{head}<v>": "embed a0.h5" for head in ROLES["argument mover"]},
}  # fmt: skip


PUBLISHED = Published(
    model="NeelNanda/Attn_Only_4L512W_C4_Code",
    n_pairs=40,
    auc={"eap": 0.976, "patch": 0.978, "acdc": 0.972, "acdc kl": 0.982},
    threshold=0.244,
    fit=(0.531, -0.049, 0.27),
    moments={"inside": (-0.6777, 0.8054), "outside": (0.0170, 0.2127)},
    bent=tuple(f"embed->{receiver}<k>" for receiver in ("a1.h4", "a3.h0", "a3.h6")),
)


def true_circuit() -> Truth:
    """The circuit of Heimersheim, Janiak 2023, as Conmy et al. 2023 make edges of it: 24 between components, and the 13
    from what is read to its projection: 37."""
    edges: list[Edge] = [(sender, receiver) for receiver, senders in _READS.items() for sender in senders.split()]
    edges += [(head, "logits") for head in ROLES["argument mover"]]
    graph = Graph(n_layers=4, n_heads=8, has_mlp=False)
    return truth("attn-only-4l", graph, "docstring", ROLES, edges, tuple(_READS), ())
