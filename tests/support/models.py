"""Random models and prompt pairs for tests, and where the reference data lies that a clone may not have."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from eapcore.graph.circuit import Circuit
from eapcore.graph.graph import Graph
from eapcore.graph.scores import EdgeScores
from eapcore.models.attention import Attention
from eapcore.models.config import ModelConfig
from eapcore.models.families.names import assemble
from eapcore.models.mlp import Mlp
from eapcore.models.model import Model
from eapcore.models.weights import Weights
from eapcore.tasks import PromptPairs

ROOT = Path(__file__).parents[2]
# Other people's models and scores, which lie beside a checkout where they are: a test that needs one skips without it.
SHARED = Path(os.environ.get("EAPCORE_SHARED", ROOT.parent / "shared")) / "data"


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
    generator, tensors = torch.Generator().manual_seed(seed), {}

    def draw(name: str, *shape: int, around: float = 0.0) -> None:
        drawn = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale
        tensors[name] = drawn.to(device, dtype) + around

    def ln(name: str) -> None:
        if normalization is not None:
            draw(f"{name}.0", d_model, around=1.0)
            draw(f"{name}.1", d_model)

    for at in (f"layers.{index}." for index in range(n_layers)):
        if split_qkv:
            for part in range(3):
                draw(f"{at}w_qkv.{part}", n_heads, d_model, d_head)
        else:
            draw(f"{at}w_qkv.0", d_model, 3 * n_heads, d_head)
            tensors[f"{at}w_qkv.0"] = tensors[f"{at}w_qkv.0"].permute(1, 0, 2)
        draw(f"{at}b_qkv", 3 * n_heads, d_head)
        draw(f"{at}w_o", n_heads, d_head, d_model)
        draw(f"{at}b_o", d_model)
        ln(f"{at}ln1")
        if d_mlp is not None:
            draw(f"{at}w_in", d_model, d_mlp)
            draw(f"{at}b_in", d_mlp)
            draw(f"{at}w_out", d_mlp, d_model)
            draw(f"{at}b_out", d_model)
            ln(f"{at}ln2")
    draw("w_e", d_vocab, d_model)
    draw("w_pos", n_ctx, d_model)
    draw("w_u", d_model, d_vocab)
    draw("b_u", d_vocab)
    ln("ln_final")
    config = ModelConfig(
        n_layers, n_heads, d_model, d_head, d_mlp, d_vocab, n_ctx, None if d_mlp is None else act_fn, d_head**0.5,
        normalization,
    )  # fmt: skip
    return Model(config, assemble(config, tensors), "random")


def layers_of(weights: Weights) -> list[tuple[Attention, Mlp | None]]:
    """Each layer's attention, and its MLP where it has one."""
    found = [[component for stage in layer for component in stage] for layer in weights.layers]
    return [(parts[0], parts[1] if len(parts) > 1 else None) for parts in found]


def with_weights(
    model: Model,
    change: Mapping[str, torch.Tensor] | Callable[[torch.Tensor], torch.Tensor],
    config: ModelConfig | None = None,
) -> Model:
    """The model with other tensors, some by their names in `Weights.named` or all as a function of what they were."""
    tensors, config = dict(model.weights.named()), config or model.config
    tensors |= {name: change(x) for name, x in tensors.items()} if callable(change) else change
    return dataclasses.replace(model, config=config, weights=assemble(config, tensors))


def tensors_of(value: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a result by the path of fields and keys to it."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from tensors_of(getattr(value, field.name), f"{name}.{field.name}")
    elif isinstance(value, dict | list | tuple):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from tensors_of(item, f"{name}[{key!r}]")


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


def random_case(lengths: list[int], *, first_difference: int = 0, **options: Any) -> tuple[Model, PromptPairs]:
    """A random model and pairs for it."""
    model = random_model(**options)
    return model, random_pairs(model, lengths, first_difference=first_difference)


def lists(pairs: PromptPairs) -> dict[str, list]:
    """The fields of some pairs as plain lists, padding removed."""
    lengths, prompts, ids = pairs.lengths.tolist(), ("clean", "corrupt"), ("answers", "wrong")
    found = {name: zip(getattr(pairs, name).tolist(), lengths, strict=True) for name in prompts}
    return {
        **{name: [row[:n] for row, n in rows] for name, rows in found.items()},
        **{name: [[i for i in row if i >= 0] for row in getattr(pairs, name).tolist()] for name in ids},
        "positions": pairs.positions.tolist(),
    }


def joined(*parts: PromptPairs) -> PromptPairs:
    """The pairs of several tasks one after the other."""
    each = [lists(part) for part in parts]
    return PromptPairs.from_lists(**{name: [row for one in each for row in one[name]] for name in each[0]})


def random_scores(graph: Graph, seed: int = 0, *, ties: bool = False) -> EdgeScores:
    """Scores on every edge; with ties, each of few values many times."""
    generator, shape = torch.Generator().manual_seed(seed), (graph.n_senders, graph.n_receivers)
    values = torch.randint(-3, 4, shape, generator=generator) if ties else torch.randn(shape, generator=generator)
    meta = {"model": {"name": "random"}}
    return EdgeScores(values.double() * graph.edge_mask(), graph, meta)


def random_circuit(graph: Graph, share: float = 0.5, seed: int = 5) -> Circuit:
    """About such a share of all edges."""
    mask, generator = graph.edge_mask(), torch.Generator().manual_seed(seed)
    return Circuit(mask & (torch.rand(mask.shape, generator=generator, device="cpu") < share), graph)


def saved(result: Any, folder: Path) -> dict[str, Any]:
    """What the file of a result holds."""
    result.save(folder / "result.json")
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def save_checkpoint(model: Model, folder: Path) -> Path:
    """Write a model as transformers writes a GPT-2 with an untied head without bias: config.json, model.safetensors."""
    config, weights = model.config, model.weights
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"transformer.wte.weight": weights.w_e, "transformer.wpe.weight": weights.w_pos}
    tensors |= {"lm_head.weight": weights.w_u.T}
    norms = {"transformer.ln_f": weights.ln_final}
    for index, (heads, mlp) in enumerate(layers_of(weights)):
        at = f"transformer.h.{index}."
        tensors[at + "attn.c_attn.weight"] = torch.cat(heads.w_qkv).permute(1, 0, 2).flatten(1)
        tensors[at + "attn.c_attn.bias"] = heads.b_qkv.flatten()
        tensors[at + "attn.c_proj.weight"] = heads.w_o.flatten(0, 1)
        tensors[at + "attn.c_proj.bias"] = heads.b_o
        tensors |= {at + "mlp.c_fc.weight": mlp.w_in, at + "mlp.c_fc.bias": mlp.b_in}
        tensors |= {at + "mlp.c_proj.weight": mlp.w_out, at + "mlp.c_proj.bias": mlp.b_out}
        norms |= {at + "ln_1": heads.norm, at + "ln_2": mlp.norm}
    for name, norm in norms.items():
        tensors |= {f"{name}.weight": norm.gamma, f"{name}.bias": norm.beta}
    fields = {
        "model_type": "gpt2", "n_embd": config.d_model, "n_head": config.n_heads, "n_layer": config.n_layers,
        "n_positions": config.n_ctx, "vocab_size": config.d_vocab, "n_inner": config.d_mlp,
        "activation_function": config.act_fn, "tie_word_embeddings": False, "dtype": str(model.dtype)[6:],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(fields))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def lens(model: Model, **fields: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """A random model as a TransformerLens state dict and cfg."""
    config, weights = model.config, model.weights
    cfg = {name: getattr(config, name) for name in ("n_layers", "n_heads", "d_model", "d_head", "d_vocab", "n_ctx")}
    cfg |= {"d_mlp": config.d_mlp, "act_fn": config.act_fn, "attn_only": config.attn_only, "eps": config.eps}
    cfg |= {"normalization_type": "LN" if config.normalization else None}
    state = {"embed.W_E": weights.w_e, "pos_embed.W_pos": weights.w_pos, "unembed.W_U": weights.w_u}
    state |= {"unembed.b_U": weights.b_u}
    norms = {"ln_final": weights.ln_final}
    for index, (heads, mlp) in enumerate(layers_of(weights)):
        at = f"blocks.{index}."
        for part, w, b in zip("QKV", torch.cat(heads.w_qkv).chunk(3), heads.b_qkv.chunk(3), strict=True):
            state |= {f"{at}attn.W_{part}": w, f"{at}attn.b_{part}": b}
        state |= {at + "attn.W_O": heads.w_o, at + "attn.b_O": heads.b_o}
        norms[at + "ln1"] = heads.norm
        if mlp is not None:
            state |= {at + "mlp.W_in": mlp.w_in, at + "mlp.b_in": mlp.b_in}
            state |= {at + "mlp.W_out": mlp.w_out, at + "mlp.b_out": mlp.b_out}
            norms[at + "ln2"] = mlp.norm
    for name, norm in norms.items():
        if norm.kind != "none":
            state |= {f"{name}.w": norm.gamma, f"{name}.b": norm.beta}
    return state, cfg | fields


def gpt2(*, head_bias: bool = False, **fields: Any) -> Any:
    """A random GPT2LMHeadModel of transformers in which no bias is zero and no LayerNorm the identity."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"n_embd": 24, "n_head": 3, "n_layer": 2, "n_positions": 16, "vocab_size": 29}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes | fields)).eval()
    if head_bias:
        weight = model.lm_head.weight
        model.lm_head = torch.nn.Linear(24, 29)
        model.lm_head.weight = weight
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model
