"""Random models and prompt pairs for tests, and where the reference data lies that a clone may not have."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors.torch import save_file

from eapcore.models.config import ModelConfig
from eapcore.models.model import Model
from eapcore.models.weights import LayerWeights, Weights
from eapcore.tasks import PromptPairs

# Other people's models and scores, which lie beside a checkout where they are: a test that needs one skips without it.
SHARED = Path(os.environ.get("EAPCORE_SHARED", Path(__file__).parents[2] / "shared")) / "data"


# Options of `random_model`: one of each kind whose forward and backward differ.
KINDS = {
    "gpt2": {},
    "one layer": {"n_layers": 1},
    "attention-only": {"d_mlp": None, "n_layers": 3},
    "q k v apart": {"split_qkv": True},
    "no LayerNorm": {"normalization": None, "scale": 0.2},
}


def random_model(
    n_layers=2, n_heads=3, d_model=24, d_head=8, d_mlp=40, d_vocab=29, n_ctx=16, *, act_fn="gelu_new",
    normalization="layernorm", split_qkv=False, dtype=torch.float64, seed=0, scale=0.4, device="cpu",
) -> Model:  # fmt: skip
    """A model with every weight random, biases and LayerNorm gains too; head untied. d_mlp=None: attention-only."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(device, dtype)

    def ln():
        return None if normalization is None else (1 + draw(d_model), draw(d_model))

    layers = []
    for _ in range(n_layers):
        if split_qkv:
            w_qkv = tuple(draw(n_heads, d_model, d_head) for _ in "qkv")
        else:
            w_qkv = (draw(d_model, 3 * n_heads, d_head).permute(1, 0, 2),)
        attention = (w_qkv, draw(3 * n_heads, d_head), draw(n_heads, d_head, d_model), draw(d_model), ln())
        if d_mlp is None:
            layers.append(LayerWeights(*attention))
            continue
        mlp = (draw(d_model, d_mlp), draw(d_mlp), draw(d_mlp, d_model), draw(d_model))
        layers.append(LayerWeights(*attention, ln(), *mlp))
    weights = Weights(
        draw(d_vocab, d_model), draw(n_ctx, d_model), tuple(layers), draw(d_model, d_vocab), draw(d_vocab), ln()
    )
    config = ModelConfig(
        n_layers, n_heads, d_model, d_head, d_mlp, d_vocab, n_ctx, None if d_mlp is None else act_fn, d_head**0.5,
        normalization,
    )  # fmt: skip
    return Model(config, weights, "random")


def random_pairs(model: Model, lengths: list[int], *, seed: int = 1, first_difference: int = 0) -> PromptPairs:
    """Pairs of these lengths; clean and corrupt agree before `first_difference` and differ there."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.d_vocab
    clean, corrupt, answers, wrong = [], [], [], []
    for length in lengths:
        a, b = torch.randint(0, vocabulary, (2, length), generator=generator)
        at = min(first_difference, length - 1)
        b[:at] = a[:at]
        b[at] = (a[at] + 1) % vocabulary
        clean.append(a.tolist())
        corrupt.append(b.tolist())
        right = torch.randperm(vocabulary, generator=generator)[:3].tolist()
        answers.append(right[:1])
        wrong.append(right[1:])
    return PromptPairs.from_lists(clean, corrupt, answers, wrong, name="random", seed=seed)


def save_checkpoint(model: Model, folder: Path) -> Path:
    """Write a model as transformers writes a GPT-2 with an untied head without bias: config.json, model.safetensors."""
    config, weights = model.config, model.weights
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"transformer.wte.weight": weights.w_e, "transformer.wpe.weight": weights.w_pos}
    tensors |= {"lm_head.weight": weights.w_u.T}
    norms = {"transformer.ln_f": weights.ln_final}
    for index, layer in enumerate(weights.layers):
        at = f"transformer.h.{index}."
        tensors[at + "attn.c_attn.weight"] = torch.cat(layer.w_qkv).permute(1, 0, 2).flatten(1)
        tensors[at + "attn.c_attn.bias"] = layer.b_qkv.flatten()
        tensors[at + "attn.c_proj.weight"] = layer.w_o.flatten(0, 1)
        tensors[at + "attn.c_proj.bias"] = layer.b_o
        tensors |= {at + "mlp.c_fc.weight": layer.w_in, at + "mlp.c_fc.bias": layer.b_in}
        tensors |= {at + "mlp.c_proj.weight": layer.w_out, at + "mlp.c_proj.bias": layer.b_out}
        norms |= {at + "ln_1": layer.ln1, at + "ln_2": layer.ln2}
    for name, (gamma, beta) in norms.items():
        tensors |= {f"{name}.weight": gamma, f"{name}.bias": beta}
    fields = {
        "model_type": "gpt2", "n_embd": config.d_model, "n_head": config.n_heads, "n_layer": config.n_layers,
        "n_positions": config.n_ctx, "vocab_size": config.d_vocab, "n_inner": config.d_mlp,
        "activation_function": config.act_fn, "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(fields))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder
