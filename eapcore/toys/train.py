"""Train a toy model and write it as a checkpoint: python -m eapcore.toys.train ioi|induction

The parameters have the names and shapes of the published layout that the model is stored in, so that what is trained is
what `eapcore.weights` builds from such a checkpoint and `eapcore.model.forward` runs: there is no second model here.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from eapcore.graph.files import replacing_all
from eapcore.models.attention import Attention
from eapcore.models.checkpoint import Stored
from eapcore.models.families import layout_of
from eapcore.models.families.names import Layout, build_weights
from eapcore.models.forward import forward
from eapcore.models.load import load
from eapcore.models.model import Model
from eapcore.models.weights import Weights
from eapcore.tasks import PromptPairs, toy_induction, toy_ioi
from eapcore.toys import NAMES

HELD_OUT_PROMPTS = 2000
HELD_OUT_SEED = 1
WARM_UP = 100
CLIP = 1.0
_SCALE = re.compile(r"ln\w*\.(w|weight)")  # γ of a LayerNorm: starts at 1
_SHIFT = re.compile(r"(^|\.)(b|bias|b_\w+)$")  # starts at 0
_SENDS = re.compile(r"W_O|c_proj")  # adds to the residual stream


@dataclass(frozen=True)
class Recipe:
    """What is trained, and how.

    raw: config.json's fields. smoothing: of the answer's labels; without it the logits grow for as long as training
    lasts, and all softmaxes saturate. sparsity: weight of the group lasso at
    the end of training. sentence: weight of predicting the words
    before the answer.
    """

    raw: dict[str, Any]
    vocab: tuple[str, ...]
    generate: Callable[..., PromptPairs]
    steps: int
    sparsity: float
    batch: int = 96
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    smoothing: float = 0.05
    sentence: float = 0.0


RECIPES = {
    "ioi": Recipe(
        raw={
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "n_layer": 3,
            "n_head": 4,
            "n_embd": 128,
            "n_inner": 64,
            "n_positions": 32,
            "vocab_size": len(toy_ioi.VOCAB),
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": None,
        },
        vocab=toy_ioi.VOCAB,
        generate=toy_ioi.generate,
        steps=1600,
        sparsity=6e-3,
        sentence=0.1,
    ),
    "induction": Recipe(
        raw={
            "model_name": "toy-induction",
            "n_layers": 2,
            "n_heads": 8,
            "d_model": 64,
            "d_head": 32,
            "d_mlp": None,
            "d_vocab": len(toy_induction.VOCAB),
            "n_ctx": 32,
            "act_fn": None,
            "attn_only": True,
            "normalization_type": "LN",
            "eps": 1e-5,
            "attention_dir": "causal",
            "use_attn_scale": True,
            "attn_scale": math.sqrt(32),
            "positional_embedding_type": "standard",
        },
        vocab=toy_induction.VOCAB,
        generate=toy_induction.generate,
        steps=2000,
        sparsity=4e-3,
    ),
}


@dataclass(frozen=True)
class Trained:
    """A trained model: its parameters by their names in the checkpoint, and the loss at every step."""

    layout: Layout
    params: dict[str, Tensor]
    losses: list[float]

    @property
    def model(self) -> Model:
        return Model(self.layout.config, _weights(self.layout, {k: p.detach() for k, p in self.params.items()}), "toy")


def initial(layout: Layout, seed: int) -> dict[str, Tensor]:
    """Random parameters: matrices with standard deviation 1/√D, smaller by √(2L) where they add to the stream."""
    generator = torch.Generator().manual_seed(seed)
    config, params = layout.config, {}
    for name, shape in layout.shapes().items():
        if _SHIFT.search(name):
            value = torch.zeros(shape)
        elif _SCALE.search(name):
            value = torch.ones(shape)
        else:
            value = torch.randn(shape, generator=generator) / math.sqrt(config.d_model)
            if _SENDS.search(name):
                value /= math.sqrt(2 * config.n_layers)
        params[name] = value.requires_grad_()
    return params


def _weights(layout: Layout, params: dict[str, Tensor]) -> Weights:
    """The parameters as Weights; gradients flow back into them."""

    def stored(name: str, tensor: Tensor) -> Stored:
        return Stored(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), lambda: tensor)

    return build_weights(layout, [stored(*item) for item in params.items()], dtype=None, device=None)


def answer_logits(model: Model, pairs: PromptPairs) -> Tensor:
    """The logits [N, V] behind the clean prompts."""
    return forward(model, pairs.clean)[torch.arange(len(pairs)), pairs.positions]


@torch.no_grad()
def accuracy(model: Model, pairs: PromptPairs) -> float:
    """The share of clean prompts whose answer has the largest logit of the whole vocabulary."""
    return (answer_logits(model, pairs).argmax(-1) == pairs.answers[:, 0]).double().mean().item()


def _lasso(weights: Weights) -> Tensor:
    """Σ over heads and MLPs of the norms of their matrices.

    What is not needed shrinks as a whole, so that the behaviour gathers in few components.
    """
    norms = []
    for component in (component for layer in weights.layers for stage in layer for component in stage):
        if isinstance(component, Attention):
            norms += [w.flatten(1).norm(dim=1).sum() for w in (*component.w_qkv, component.w_o)]
        else:
            norms += [component.w_in.norm(), component.w_out.norm()]
    return torch.stack(norms).sum()


def _losses(model: Model, pairs: PromptPairs, recipe: Recipe, sparsity: float) -> tuple[Tensor, Tensor]:
    """(the answer's cross-entropy, what is minimised)."""
    logits = forward(model, pairs.clean)
    behind = logits[torch.arange(len(pairs)), pairs.positions]
    answer = F.cross_entropy(behind, pairs.answers[:, 0], label_smoothing=recipe.smoothing)
    total = answer + sparsity * _lasso(model.weights)
    if recipe.sentence:
        words = F.cross_entropy(logits[:, :-1].transpose(1, 2), pairs.clean[:, 1:], ignore_index=0)
        total = total + recipe.sentence * words
    return answer, total


@contextmanager
def _one_thread() -> Iterator[None]:
    """The order of sums, and with it the last bits, hangs on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def train(name: str, *, seed: int = 0, steps: int | None = None, progress: bool = False) -> Trained:
    """Train a toy model on its task's "train" split; the same seed and steps give the same bits on the same machine.

    AdamW, its rate warmed up over at most WARM_UP steps, then a cosine down to nothing; every step draws new prompts.

    Args:
        name: "ioi" or "induction".
        seed: of the parameters and of the prompts.
        steps: None takes the recipe's.
        progress: whether to show a progress bar.

    Raises:
        ValueError: an unknown name, or steps < 1.
    """
    if name not in RECIPES:
        raise ValueError(f"a toy model is one of {', '.join(RECIPES)}, got {name!r}")
    recipe = RECIPES[name]
    steps = recipe.steps if steps is None else steps
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    layout = layout_of(recipe.raw)
    params = initial(layout, seed)
    decayed = [p for name, p in params.items() if not (_SHIFT.search(name) or _SCALE.search(name))]
    others = [p for name, p in params.items() if _SHIFT.search(name) or _SCALE.search(name)]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98))
    losses = []
    warm_up = min(WARM_UP, 1 + steps // 10)
    with _one_thread(), tqdm(range(steps), desc=f"toy {name}", disable=not progress) as bar:
        for step in bar:
            for group in optimizer.param_groups:
                cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
                group["lr"] = recipe.learning_rate * min((step + 1) / warm_up, cosine)
            pairs = recipe.generate(recipe.batch, seed * steps + step, split="train")
            # The lasso sets in slowly: the behaviour is found with all components first, and gathered into few then.
            model = Model(layout.config, _weights(layout, params))
            answer, total = _losses(model, pairs, recipe, recipe.sparsity * step / steps)
            optimizer.zero_grad()
            total.backward()
            torch.nn.utils.clip_grad_norm_(params.values(), CLIP)
            optimizer.step()
            losses.append(answer.item())
            if step % 20 == 0:
                bar.set_postfix(loss=f"{losses[-1]:.3f}")
    return Trained(layout, params, losses)


def save(out: Path, name: str, trained: Trained, *, seed: int) -> dict[str, Any]:
    """Write config.json, vocab.json and model.safetensors, all or none; returns the config."""
    recipe, steps = RECIPES[name], len(trained.losses)
    held_out = recipe.generate(HELD_OUT_PROMPTS, HELD_OUT_SEED, split="test")
    about = {
        "task": f"toy-{name}",
        "command": f"python -m eapcore.toys.train {name} --seed {seed} --steps {steps}",
        "seed": seed,
        "steps": steps,
        "held_out_accuracy": accuracy(trained.model, held_out),
        "held_out_prompts": HELD_OUT_PROMPTS,
        "held_out_seed": HELD_OUT_SEED,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    config = {**recipe.raw, "eapcore": about}
    out.mkdir(parents=True, exist_ok=True)
    tensors = {key: p.detach().contiguous() for key, p in trained.params.items()}
    files = [out / name for name in ("model.safetensors", "vocab.json", "config.json")]
    with replacing_all(files) as (weights, vocab, written):
        save_file(tensors, weights, metadata={"format": "pt"})
        vocab.write_text(json.dumps({word: i for i, word in enumerate(recipe.vocab)}, indent=0) + "\n")
        written.write_text(json.dumps(config, indent=2) + "\n")
    return config


def main(argv: Sequence[str] | None = None) -> int:
    """Train, write, and measure what was written."""
    parser = argparse.ArgumentParser(prog="python -m eapcore.toys.train", description=(__doc__ or "").split(":")[0])
    parser.add_argument("name", choices=NAMES, help="which toy model")
    parser.add_argument("--out", type=Path, help="folder to write to (default: toy-ioi or toy-induction, here)")
    parser.add_argument("--seed", type=int, default=0, help="of the parameters and the prompts (default: 0)")
    parser.add_argument("--steps", type=int, help="training steps (default: as many as the stored model had)")
    args = parser.parse_args(argv)
    out = args.out or Path(f"toy-{args.name}")
    try:
        out.mkdir(parents=True, exist_ok=True)  # before the training, not after it
        trained = train(args.name, seed=args.seed, steps=args.steps, progress=sys.stderr.isatty())
        save(out, args.name, trained, seed=args.seed)
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted, no file was left half-written", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    held_out = RECIPES[args.name].generate(HELD_OUT_PROMPTS, HELD_OUT_SEED, split="test")
    print(f"held-out accuracy {accuracy(load(out), held_out):.4f} on {len(held_out)} prompts; wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
