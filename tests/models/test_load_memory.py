"""Loading a model takes the memory of its weights and of one tensor, never of two copies."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from memory import clear_peak, in_forks, needs_peak, resident
from safetensors.torch import save_file

from eapcore.models.families import layout_of
from eapcore.models.load import load

MIB = 1 << 20
LLAMA = {"model_type": "llama", "vocab_size": 10240, "hidden_size": 768, "intermediate_size": 2304}
LLAMA |= {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 64}
METADATA = {"block_count": 4, "context_length": 64, "embedding_length": 768, "feed_forward_length": 2304}
METADATA |= {"attention.head_count": 8, "attention.head_count_kv": 2, "attention.layer_norm_rms_epsilon": 1e-6}
NAMES = {
    "embed_tokens": "token_embd", "lm_head": "output", "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q",
    "post_attention_layernorm": "ffn_norm", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "layers": "blk",
}  # fmt: skip


def peak(path, dtype):
    """(most memory resident while a model is loaded and all of it is read, its weights, its largest tensor), bytes."""
    import gguf  # noqa: F401  what it takes itself is not counted

    def read(tensor):
        """Every page, without a copy."""
        storage = torch.empty(0, dtype=torch.uint8, device="cpu").set_(tensor.untyped_storage())
        start = tensor.storage_offset() * tensor.itemsize
        return int(storage[start : start + tensor.nbytes : 1024].sum())

    read(torch.ones(MIB).bfloat16().float())
    clear_peak()
    before = resident("VmRSS")
    model = load(path, dtype=dtype)
    sizes = [tensor.nbytes for _, tensor in model.weights.named()]
    for _, tensor in model.weights.named():
        read(tensor)
    return resident("VmHWM") - before, sum(sizes), max(sizes)


def shards(folder, dtype):
    """A Llama's folder of shards of one or two layers; what it takes on the disk."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA | {"torch_dtype": str(dtype).removeprefix("torch.")}))
    weight_map, by_shard = {}, {}
    for name, shape in layout_of(LLAMA).shapes().items():
        shard = f"model-{name.split('.')[1] if name.startswith('layers') else name.split('.')[0]}.safetensors"
        by_shard.setdefault(shard, {})[f"model.{name}"] = torch.full(shape, 0.5, dtype=dtype)
        weight_map[f"model.{name}"] = shard
    for shard, tensors in by_shard.items():
        save_file(tensors, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return sum(path.stat().st_size for path in folder.iterdir())


def file(path, stored):
    """A Llama's GGUF file; what it takes on the disk."""
    gguf = pytest.importorskip("gguf")
    kind, writer = gguf.GGMLQuantizationType[stored], gguf.GGUFWriter(path, "llama")
    for name, value in METADATA.items():
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(f"llama.{name}", value)
    for name, shape in layout_of(LLAMA).shapes().items():
        theirs = "output_norm.weight" if name == "norm.weight" else name
        for old, new in NAMES.items():
            theirs = theirs.replace(old, new)
        as_stored = kind if len(shape) > 1 else gguf.GGMLQuantizationType.F32
        raw = gguf.quants.quantize(np.full(shape, 0.5, np.float32), as_stored)
        writer.add_tensor(theirs, raw, raw_dtype=as_stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.stat().st_size


@needs_peak
def test_no_second_copy_is_made_of_what_is_loaded(tmp_path):
    made = {
        (str(tmp_path / "shards"), None): shards(tmp_path / "shards", torch.bfloat16),
        (str(tmp_path / "wide"), "bfloat16"): shards(tmp_path / "wide", torch.float32),
        (str(tmp_path / "a.gguf"), None): file(tmp_path / "a.gguf", "BF16"),
        (str(tmp_path / "b.gguf"), "bfloat16"): file(tmp_path / "b.gguf", "Q8_0"),
    }
    for (path, dtype), found in in_forks(peak, list(made)).items():
        taken, weights, largest = found
        # Pages of a mapped file are the model itself, or what was read of a tensor before it was converted: the system
        # drops them when it needs the memory.
        mapped = 0 if dtype is None else made[path, dtype]
        assert 0.8 * weights < taken < weights + mapped + largest + 12 * MIB, (path, [x / MIB for x in found])
