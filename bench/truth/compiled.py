"""Small models that are compiled from programs: what they compute, and through which edges, is known.

`make_compiled.py` wrote the folders of compiled/: config.json and model.safetensors, in TransformerLens's layout
without normalisation; circuit.json, the true edges, in `meta` what they carry; pairs.jsonl, a draw's pairs.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from eapcore.graph.circuit import Circuit
from eapcore.models.load import load
from eapcore.models.model import Model
from eapcore.tasks import PromptPairs

FOLDER = Path(__file__).parent / "compiled"
LONGEST = 6  # tokens behind the first, which begins every prompt
Values = Sequence[Any]


@dataclass(frozen=True)
class Program:
    """What a model was compiled from.

    values: of a token. logits: those behind a prompt of values, one for each answer. least: the fewest values behind
    which they say something.
    """

    about: str
    values: tuple[Any, ...]
    answers: tuple[Any, ...]
    logits: Callable[[Values], Sequence[float]]
    least: int


def _one(answers: tuple[Any, ...], answer: Callable[[Values], Any], least: int = 1) -> Callable[[Values], list[float]]:
    """The logits 1 for the answer and 0 for the others; all 0 behind fewer values than it takes."""
    return lambda x: [float(len(x) >= least and answer(x) == a) for a in answers]


_EITHER, _BIT, _COUNTS = (False, True), (0, 1), tuple(range(LONGEST + 1))
PROGRAMS = {
    "same-as-before": Program(
        "whether the token is the same as the one before", tuple("abc"), _EITHER,
        _one(_EITHER, lambda x: x[-1] == x[-2], 2), 2,
    ),
    "frac-prevs": Program(
        "the fraction of tokens so far that are x, against a half", tuple("xyz"), ("more", "less"),
        lambda x: [x.count("x") / len(x), 0.5], 1,
    ),
    "parity": Program(
        "the parity of two tokens, the ones one and two places back", _BIT, _BIT,
        _one(_BIT, lambda x: x[-2] ^ x[-3], 3), 3,
    ),
    "count": Program(
        "how many tokens so far are the same as the last", (0, 1, 2), _COUNTS,
        _one(_COUNTS, lambda x: x.count(x[-1])), 1,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Compiled:
    """A compiled model by its name out of PROGRAMS."""

    name: str

    @property
    def program(self) -> Program:
        return PROGRAMS[self.name]

    @property
    def folder(self) -> Path:
        return FOLDER / self.name

    @cached_property
    def model(self) -> Model:
        return load(self.folder)

    @cached_property
    def circuit(self) -> Circuit:
        """The true edges: a sender writes a direction that the receiver reads, and the answers need it."""
        return Circuit.load(self.folder / "circuit.json")

    @property
    def carries(self) -> dict[str, dict[str, list[str]]]:
        """Of each edge that carries something the directions, those that tokens move, that positions move, and
        constants."""
        return dict(self.circuit.meta["carries"])

    @property
    def idle(self) -> list[str]:
        """Edges that carry constants which no prompt with an answer needs: neither true nor false."""
        return list(self.circuit.meta["idle"])

    @property
    def reached(self) -> Circuit:
        """The true edges that other tokens change."""
        edges = [name for name, kinds in self.carries.items() if "tokens" in kinds]
        return Circuit.from_edges(self.circuit.graph, edges)

    def ids(self, prompt: Values) -> list[int]:
        """The tokens of a prompt of values, behind the one that begins it."""
        meta = self.circuit.meta
        return [meta["begin"], *(meta["tokens"][self.program.values.index(value)] for value in prompt)]

    def rows(self, n: int, seed: int) -> list[tuple[list[int], list[int], int, int]]:
        """Prompts that differ in one token, and in the answer: clean, corrupt, right, wrong."""
        rng, rows, of = random.Random(seed), list[tuple[list[int], list[int], int, int]](), self.program
        while len(rows) < n:
            clean = [rng.choice(of.values) for _ in range(rng.randint(of.least + 1, LONGEST))]
            corrupt, place = list(clean), rng.randrange(len(clean))
            corrupt[place] = rng.choice(of.values)
            right, wrong = (_best(of.logits(prompt)) for prompt in (clean, corrupt))
            if right is not None and wrong is not None and right != wrong:
                rows.append((self.ids(clean), self.ids(corrupt), right, wrong))
        return rows

    def draw(self, n: int, seed: int) -> PromptPairs:
        return PromptPairs.from_lists(*zip(*self.rows(n, seed), strict=True), name=self.name, seed=seed)


def _best(logits: Sequence[float]) -> int | None:
    """The place of the largest, None where two are."""
    order = torch.tensor(logits).sort(descending=True)
    return None if order.values[0] == order.values[1] else int(order.indices[0])
