"""Checkpoints of every layout load as they are, and everything else is refused with a sentence that says why."""

from __future__ import annotations

import http.server
import json
import logging
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import refusal
import torch
from models import SHARED, gpt2, layers_of, lens, random_model
from safetensors.torch import load_file, save_file

from eapcore.models.checkpoint import PINNED
from eapcore.models.forward import forward, run_with_senders
from eapcore.models.load import load_weights
from eapcore.models.model import Model

SIZES = {"n_embd": 24, "n_head": 3, "n_layer": 2, "n_positions": 16, "vocab_size": 29}
TOKENS = torch.randint(0, 29, (3, 16), generator=torch.Generator().manual_seed(0))


def logits_of(loaded, tokens=TOKENS):
    with torch.no_grad():
        return forward(Model(loaded.config, loaded.weights), tokens)


# GPT-2 against transformers


def assert_same_as(model, loaded):
    """Tensors equal the module's own, logits agree to 1e-5."""
    state, weights = model.state_dict(), loaded.weights
    D, H = loaded.config.d_model, loaded.config.n_heads
    assert torch.equal(weights.w_e, state["transformer.wte.weight"])
    assert torch.equal(weights.w_pos, state["transformer.wpe.weight"])
    assert torch.equal(weights.w_u, state["lm_head.weight"].T)
    for index, (heads, mlp) in enumerate(layers_of(weights)):
        at = f"transformer.h.{index}."
        joined = torch.cat(heads.w_qkv).permute(1, 0, 2).reshape(D, 3 * D)
        assert heads.w_o.shape == (H, D // H, D)
        for ours, name in (
            (joined, "attn.c_attn.weight"), (heads.b_qkv.flatten(), "attn.c_attn.bias"),
            (heads.w_o.reshape(D, D), "attn.c_proj.weight"), (heads.b_o, "attn.c_proj.bias"),
            (mlp.w_in, "mlp.c_fc.weight"), (mlp.b_in, "mlp.c_fc.bias"),
            (mlp.w_out, "mlp.c_proj.weight"), (mlp.b_out, "mlp.c_proj.bias"),
            (heads.norm.gamma, "ln_1.weight"), (heads.norm.beta, "ln_1.bias"),
            (mlp.norm.gamma, "ln_2.weight"), (mlp.norm.beta, "ln_2.bias"),
        ):  # fmt: skip
            assert torch.equal(ours, state[at + name]), name
    assert torch.equal(weights.ln_final.gamma, state["transformer.ln_f.weight"])
    assert torch.equal(weights.ln_final.beta, state["transformer.ln_f.bias"])
    with torch.no_grad():
        expected = model.float()(TOKENS).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(logits_of(loaded).float(), expected, rtol=0, atol=1e-5)


def save_config(model, folder):
    folder.mkdir(exist_ok=True)
    model.config.save_pretrained(folder)


def state_of(model):
    """The state dict as files hold it: the tied head is not stored, nothing shares memory."""
    tied = model.lm_head.weight is model.transformer.wte.weight
    return {name: t.clone() for name, t in model.state_dict().items() if not (tied and name == "lm_head.weight")}


def renamed(rename, more=lambda model: {}):
    def save(model, folder):
        save_config(model, folder)
        state = state_of(model) | more(model)
        save_file({rename(name): t for name, t in state.items()}, folder / "model.safetensors")

    return save


def masks(model):
    found = {f"transformer.h.{layer}.attn.bias": torch.ones(1, 1, 16, 16, dtype=torch.bool) for layer in range(2)}
    return found | {f"transformer.h.{layer}.attn.masked_bias": torch.tensor(-1e4) for layer in range(2)}


def save_bin(model, folder, *, name="pytorch_model.bin", wrap=None, **options):
    save_config(model, folder)
    state = model.state_dict()
    torch.save({wrap: state, "step": 3} if wrap else state, folder / name, **options)


def save_bin_shards(model, folder):
    save_config(model, folder)
    state = state_of(model)
    names = list(state)
    parts = {"pytorch_model-00001-of-00002.bin": names[:9], "pytorch_model-00002-of-00002.bin": names[9:]}
    for file, part in parts.items():
        torch.save({name: state[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


LAYOUTS = {
    "safetensors": lambda model, folder: model.save_pretrained(folder),
    "safetensors in shards": lambda model, folder: model.save_pretrained(folder, max_shard_size="20KB"),
    "bin": save_bin,
    "bin from before torch 1.6": lambda model, folder: save_bin(model, folder, _use_new_zipfile_serialization=False),
    "bin in shards": save_bin_shards,
    "a training loop's pth": lambda model, folder: save_bin(model, folder, name="last.pth", wrap="state_dict"),
    "no prefix": renamed(lambda name: name.removeprefix("transformer.")),
    "prefix model.": renamed(lambda name: "model." + name),
    "prefix module.": renamed(lambda name: "module." + name),
    "prefix _orig_mod.": renamed(lambda name: "_orig_mod." + name),
    "nested prefixes": renamed(lambda name: "module._orig_mod.model." + name),
    "blocks compiled one by one": renamed(lambda name: name.replace(".attn", "._orig_mod.attn")),
    "with mask buffers": renamed(str, masks),
    "with the tied head stored": renamed(
        str, lambda model: {"lm_head.weight": state_of(model)["transformer.wte.weight"].clone()}
    ),
}


@pytest.mark.parametrize("save", LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_has_the_tensors_and_the_logits_of_transformers(save, tmp_path):
    model = gpt2()
    save(model, tmp_path / "random-gpt2")
    loaded = load_weights(tmp_path / "random-gpt2")
    assert (loaded.model_id, loaded.folder) == ("random-gpt2", tmp_path / "random-gpt2")
    assert_same_as(model, loaded)


def test_the_sharded_layouts_really_have_several_shards(tmp_path):
    for kind in ("safetensors", "bin"):
        LAYOUTS[f"{kind} in shards"](gpt2(), tmp_path / kind)
        assert len(list((tmp_path / kind).glob(f"*.{kind}"))) > 1


OPTIONS = {
    **{name: {"activation_function": name}
        for name in ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu", "relu", "silu")},
    "inverse layer scale": {"scale_attn_by_inverse_layer_idx": True},
    "no attention scale": {"scale_attn_weights": False},
    "only the inverse layer scale": {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True},
    "reordered attention": {"reorder_and_upcast_attn": True, "attn_implementation": "eager"},
    "untied head": {"tie_word_embeddings": False},
    "head bias": {"head_bias": True},
    "untied head with bias": {"tie_word_embeddings": False, "head_bias": True},
    "n_inner": {"n_inner": 40},
    "large epsilon": {"layer_norm_epsilon": 0.3},
    "n_ctx beside n_positions": {"n_ctx": 16},
}  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_configuration_has_the_logits_of_transformers(options, tmp_path):
    model = gpt2(**options)
    model.save_pretrained(tmp_path)
    assert_same_as(model, load_weights(tmp_path))


def test_options_that_change_the_mathematics_change_the_logits():
    plain = load_weights(gpt2())
    for name in ("relu", "inverse layer scale", "no attention scale", "large epsilon", "head bias"):
        assert (logits_of(load_weights(gpt2(**OPTIONS[name]))) - logits_of(plain)).abs().max() > 1e-3, name


def test_an_old_config_with_n_ctx_alone_and_n_inner_null_loads(tmp_path):
    model = gpt2()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["n_positions"]
    (tmp_path / "config.json").write_text(json.dumps(config | {"n_ctx": 16, "n_inner": None}))
    assert_same_as(model, load_weights(tmp_path))


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_object_is_shared_not_copied(tied):
    model = gpt2(tie_word_embeddings=tied)
    loaded = load_weights(model)
    assert_same_as(model, loaded)
    owned = {t.untyped_storage().data_ptr() for t in model.parameters()}
    assert all(t.untyped_storage().data_ptr() in owned for _, t in loaded.weights.named())
    assert not any(t.requires_grad for _, t in loaded.weights.named())
    assert (loaded.weights.w_u.data_ptr() == loaded.weights.w_e.data_ptr()) == tied
    assert loaded.folder is None


def test_a_model_object_is_read_as_it_computes_whatever_its_config_says():
    model = gpt2()
    model.lm_head = torch.nn.Linear(24, 29, bias=False)
    assert_same_as(model, load_weights(model))


def test_a_state_dict_in_gpt2_names_loads_with_its_config():
    model = gpt2()
    assert_same_as(model, load_weights(model.state_dict(), config=model.config.to_dict()))


# dtypes, memory, devices


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_none_keeps_the_checkpoints_and_a_dtype_converts_every_tensor(stored, tmp_path):
    model = gpt2().to(stored)
    model.save_pretrained(tmp_path)
    kept = load_weights(tmp_path)
    assert {t.dtype for _, t in kept.weights.named()} == {stored}
    converted = load_weights(tmp_path, dtype="float32")
    assert {t.dtype for _, t in converted.weights.named()} == {torch.float32}
    for (_, a), (_, b) in zip(kept.weights.named(), converted.weights.named(), strict=True):
        assert torch.equal(a.float(), b)
    assert_same_as(model.float(), converted)
    assert {t.dtype for _, t in load_weights(model, dtype=torch.bfloat16).weights.named()} == {torch.bfloat16}


@pytest.mark.parametrize("field", ["dtype", "torch_dtype"])
def test_the_dtype_is_the_tensors_own_whatever_the_config_says(field, folder):
    set_config(folder, **{field: "float16"})
    assert {t.dtype for _, t in load_weights(folder).weights.named()} == {torch.float32}


def test_a_tied_head_is_the_embedding_itself_also_after_a_conversion(tmp_path):
    gpt2().save_pretrained(tmp_path)
    for dtype in (None, torch.float64):
        weights = load_weights(tmp_path, dtype=dtype).weights
        assert weights.w_u.data_ptr() == weights.w_e.data_ptr()


def test_all_layouts_of_one_model_have_one_content_hash(tmp_path):
    model = gpt2()
    hashes = {load_weights(model).weights.content_hash()}
    for number, save in enumerate(LAYOUTS.values()):
        save(model, tmp_path / str(number))
        hashes.add(load_weights(tmp_path / str(number)).weights.content_hash())
    assert len(hashes) == 1


MEMORY = """
import re, sys
from pathlib import Path
import torch
from eapcore.models.load import load_weights
def kilobytes(name):
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
torch.ones(1).to(torch.bfloat16).sum()
before, private = kilobytes("VmRSS"), kilobytes("RssAnon")
for dtype in (None, "bfloat16"):
    weights = load_weights(sys.argv[1], dtype=dtype).weights
    for _, tensor in weights.named():
        tensor.amax()
    held = sum(tensor.nbytes for _, tensor in weights.named()) // 1024
    print(kilobytes("VmHWM") - before, kilobytes("RssAnon") - private, held)
    del weights, tensor
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of a process's memory")
@pytest.mark.parametrize(("suffix", "n_layer"), [("safetensors", 8), ("bin", 4)])
def test_loading_never_holds_two_copies(suffix, n_layer, tmp_path):
    sizes = {"n_embd": 1024, "n_head": 16, "n_layer": n_layer, "n_positions": 8, "vocab_size": 8}
    state = plain_gpt2(tmp_path, sizes)
    if suffix == "bin":
        (tmp_path / "model.safetensors").unlink()
        torch.save(state, tmp_path / "pytorch_model.bin")
    size = sum(t.nbytes for t in state.values()) // 1024
    assert size > 49_000 * n_layer  # kB

    command = [sys.executable, "-c", MEMORY, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    kept, converted = ([int(number) for number in line.split()] for line in result.stdout.splitlines())
    peak, private, _ = kept
    print(f"{suffix}: {peak / size:.2f} of the file's size at the peak, {private / size:.2f} of it private")
    assert 0.8 * size < peak <= 1.3 * size  # every weight was read
    assert private <= 0.1 * size  # and lies in the mapped file, not in a copy
    # Converted: the copy that was asked for, and the mapped file, whose pages the system takes back when it needs them.
    peak, private, held = converted
    assert held == pytest.approx(size / 2, rel=0.01)
    assert private <= 1.3 * held
    assert peak <= size + 1.3 * held


# TransformerLens


LENS_MODELS = {
    "MLPs": {},
    "attention-only": {"d_mlp": None},
    "no LayerNorm": {"normalization": None, "scale": 0.2},
    "attention-only, no LayerNorm": {"d_mlp": None, "normalization": None, "scale": 0.2},
    "d_head not d_model / n_heads": {"n_heads": 5, "d_head": 3},
    "gelu": {"act_fn": "gelu"},
}


@pytest.mark.parametrize("options", LENS_MODELS.values(), ids=LENS_MODELS)
def test_a_transformer_lens_state_dict_is_the_model_that_it_was_made_from(options):
    model = random_model(**options)
    state, cfg = lens(model)
    loaded = load_weights(state, config=cfg)
    assert loaded.config == model.config
    torch.testing.assert_close(logits_of(loaded), forward(model, TOKENS), rtol=0, atol=1e-13)
    assert loaded.weights.content_hash() == model.weights.content_hash()
    owned = {t.untyped_storage().data_ptr() for t in state.values()}
    copied = [name for name, t in loaded.weights.named() if t.untyped_storage().data_ptr() not in owned]
    assert all("b_qkv" in name for name in copied)  # three small tensors joined into one


def test_a_folded_model_normalises_without_gain_and_bias():
    model = random_model()
    state, cfg = lens(model, normalization_type="LNPre")
    state = {name: t for name, t in state.items() if ".ln" not in name and not name.startswith("ln_final")}
    ones, zeros = torch.ones(24, dtype=torch.float64), torch.zeros(24, dtype=torch.float64)
    written_out = {f"blocks.{i}.ln{j}.{p}": t for i in (0, 1) for j in (1, 2) for p, t in (("w", ones), ("b", zeros))}
    written_out |= {"ln_final.w": ones, "ln_final.b": zeros}
    expected = load_weights(state | written_out, config=cfg | {"normalization_type": "LN"})
    assert torch.equal(logits_of(load_weights(state, config=cfg)), logits_of(expected))


BUFFERS = {f"blocks.{layer}.attn.mask": torch.ones(16, 16, dtype=torch.bool) for layer in (0, 1)}
BUFFERS |= {f"blocks.{layer}.attn.IGNORE": torch.tensor(-1e5) for layer in (0, 1)}


def test_buffers_and_a_missing_unembedding_bias_do_not_matter():
    state, cfg = lens(random_model(d_mlp=None))
    state["unembed.b_U"] = torch.zeros_like(state["unembed.b_U"])
    expected = logits_of(load_weights(state, config=cfg))
    del state["unembed.b_U"]
    state |= BUFFERS
    loaded = load_weights(state, config=cfg)
    assert loaded.weights.b_u is None
    assert torch.equal(logits_of(loaded), expected)


@pytest.mark.parametrize(("fields", "scales"), [
    ({}, [8**-0.5, 8**-0.5]),
    ({"attn_scale": -1.0}, [8**-0.5, 8**-0.5]),
    ({"attn_scale": 2.0}, [0.5, 0.5]),
    ({"attn_scale": 2.0, "use_attn_scale": False}, [1.0, 1.0]),
    ({"scale_attn_by_inverse_layer_idx": True}, [8**-0.5, 8**-0.5 / 2]),
])  # fmt: skip
def test_attention_scores_are_scaled_as_transformer_lens_does(fields, scales):
    state, cfg = lens(random_model(), **fields)
    config = load_weights(state, config=cfg).config
    assert [config.score_scale(layer) for layer in (0, 1)] == pytest.approx(scales, rel=1e-12)


@pytest.mark.parametrize(("fields", "eps"), [({}, 1e-5), ({"eps": 0.3}, 0.3), ({"ln_eps": 0.2}, 0.2)])
def test_epsilon_is_read_under_both_of_its_names(fields, eps):
    state, cfg = lens(random_model())
    del cfg["eps"]
    assert load_weights(state, config=cfg | fields).config.eps == eps


def published(folder, *, file="model_final.pth", **fields):
    """A folder as the attention-only models are published: other field names, fields of the training run, buffers."""
    model = random_model(d_mlp=None, dtype=torch.float32)
    state, _ = lens(model)
    del state["unembed.b_U"]
    state |= BUFFERS
    config = {
        "n_layers": 2, "d_model": 24, "d_mlp": 96, "d_head": 8, "n_heads": 3, "n_ctx": 16, "d_vocab": 29,
        "normalization": "LN", "ln_eps": 1e-5, "act_fn": "solu_ln", "attn_only": True, "shortformer_pos": False,
        "tokenizer_name": "NeelNanda/gpt-neox-tokenizer-digits", "neuron_scale": 0.5, "version": 24, "debug": False,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config | fields))
    state = {name: t.contiguous() for name, t in state.items()}
    save_file(state, folder / file) if file.endswith("safetensors") else torch.save(state, folder / file)
    return model


@pytest.mark.parametrize("file", ["model_final.pth", "weights.safetensors"])
def test_a_published_attention_only_folder_loads(file, tmp_path):
    model = published(tmp_path, file=file)
    loaded = load_weights(tmp_path)
    assert loaded.config == model.config
    expected = forward(model, TOKENS) - model.weights.b_u
    torch.testing.assert_close(logits_of(loaded), expected, rtol=0, atol=1e-5)


# A model made by others


@pytest.mark.skipif(not (SHARED / "gpt-nano-sort").is_dir(), reason="the checkpoint gpt-nano-sort is not here")
def test_gpt_nano_sort_agrees_with_its_own_activations():
    folder = SHARED / "gpt-nano-sort"
    loaded, given = load_weights(folder), load_file(folder / "activations.safetensors")
    model = Model(loaded.config, loaded.weights)
    assert (model.config.n_layers, model.config.n_heads, model.config.d_model) == (3, 3, 48)
    made = {}
    made["lm_head"], senders = run_with_senders(model, given["idx"])
    stream = made["x"] = senders[0]
    saved = model.attentions[0].read(stream)
    made |= dict(zip("qkv", saved.qkv[0].transpose(1, 2).chunk(3, 1), strict=True))
    for index, attention in enumerate(model.attentions):
        behind = stream + senders[model.graph.heads(index)].sum(0) + attention.b_o
        stream = made[f"block{index}"] = behind + senders[model.graph.mlp(index)]
        if index == 0:
            made |= {"attnResid": behind, "mlpResid": stream}
    made["ln_f"] = model.weights.ln_final.forward(stream)[0]
    assert made.keys() == given.keys() - {"idx"}
    errors = {name: float((made[name] - given[name]).abs().max()) for name in made}
    print("largest differences:", {name: f"{error:.1e}" for name, error in errors.items()})
    assert max(errors.values()) <= 1e-5


# Bad input: each refused with one sentence


def refused(match, source, error=ValueError, **options):
    assert len(refusal.refused(match, load_weights, source, error=error, **options)) < 500


def plain_gpt2(folder, sizes):
    """Write a GPT-2 without transformers; its tensors."""
    state, D = {}, sizes["n_embd"]
    shapes = {"ln_1": (D,), "ln_2": (D,), "attn.c_attn": (D, 3 * D), "attn.c_proj": (D, D)}
    shapes |= {"mlp.c_fc": (D, 4 * D), "mlp.c_proj": (4 * D, D)}
    for layer in range(sizes["n_layer"]):
        for name, shape in shapes.items():
            state[f"h.{layer}.{name}.weight"] = torch.full(shape, 0.1)
            state[f"h.{layer}.{name}.bias"] = torch.full(shape[-1:], 0.1)
    for name, count in (("wte", sizes["vocab_size"]), ("wpe", sizes["n_positions"])):
        state[f"{name}.weight"] = torch.full((count, D), 0.1)
    state |= {"ln_f.weight": torch.ones(D), "ln_f.bias": torch.zeros(D)}
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", **sizes}))
    save_file(state, folder / "model.safetensors")
    return state


@pytest.fixture
def folder(tmp_path):
    plain_gpt2(tmp_path, SIZES)
    return tmp_path


def rewrite(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


def set_config(folder, **fields):
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))


def test_the_folder_that_the_tests_below_damage_loads(folder):
    assert load_weights(folder).config.n_layers == 2
    assert load_weights(str(folder)).config == load_weights(folder).config


TENSORS = {
    "missing": (lambda s: s.pop("h.1.ln_2.bias"), r"lacks h\.1\.ln_2\.bias \[24\]"),
    "missing, many": (lambda s: [s.pop(k) for k in list(s) if k.startswith("h.1.")], r"lacks h\.1\..* and 8 more"),
    "extra": (lambda s: s.update({"h.2.ln_2.bias": torch.ones(24)}), r"has h\.2\.ln_2\.bias besides"),
    "never a mask": (lambda s: s.update({"h.0.attn.c_attn.masked_bias": torch.ones(1)}), "c_attn.masked_bias besides"),
    "no mask of ours": (lambda s: s.update({"vision.h.0.attn.bias": torch.ones(1)}),
        r"vision\.h\.0\.attn\.bias besides"),
    "transposed": (lambda s: s.update({"h.0.attn.c_attn.weight": torch.ones(72, 24)}),
        r"h\.0\.attn\.c_attn\.weight as \[out, in\], as torch"),
    "twice": (lambda s: s.update({"transformer.wpe.weight": torch.ones(16, 24)}), r"wpe\.weight twice"),
    "head differs from the tied embedding": (lambda s: s.update({"lm_head.weight": torch.ones(29, 24)}),
        "lm_head.weight differs from wte.weight.*tie_word_embeddings"),
    "fp8": (lambda s: s.update({"wte.weight": torch.ones(29, 24).to(torch.float8_e4m3fn)}),
        "wte.weight has dtype F8_E4M3: quantised weights are not supported, only float64"),
    "int8": (lambda s: s.update({"wte.weight": torch.ones(29, 24, dtype=torch.int8)}), "wte.weight has dtype I8"),
    "mixed dtypes": (lambda s: s.update({"ln_f.bias": torch.ones(24).half()}),
        "mixes float16 and float32: give a dtype"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "match"), TENSORS.values(), ids=TENSORS)
def test_wrong_tensors_are_named(change, match, folder):
    rewrite(folder, change)
    refused(match, folder)


def test_mixed_dtypes_load_when_a_dtype_is_given(folder):
    rewrite(folder, TENSORS["mixed dtypes"][0])
    assert {t.dtype for _, t in load_weights(folder, dtype="float32").weights.named()} == {torch.float32}


CONFIGS = {
    "another architecture": ({"model_type": "bloom"}, "model_type 'bloom' is not supported: expected one of gpt2, "),
    "no architecture at all": ({"model_type": "absent", "n_embd": "absent"}, "model_type None is not supported"),
    "activation": ({"activation_function": "mish"}, "activation_function 'mish' is not supported: .*gelu_new.*relu"),
    "cross-attention": ({"add_cross_attention": True}, "add_cross_attention True .*not supported: expected False"),
    "quantized": ({"quantization_config": {"bits": 4}}, "are quantised .*bits.*, which is not supported"),
    "pruned": ({"pruned_heads": {"0": [1]}}, "pruned_heads .*not supported"),
    "no heads": ({"n_head": "absent"}, "lacks n_head or num_attention_heads"),
    "no context": ({"n_positions": "absent"}, "lacks n_positions or n_ctx"),
    "heads do not divide": ({"n_head": 5}, "n_embd 24 .*multiple of n_head 5"),
    "text for a number": ({"n_layer": "2"}, "n_layer .*must be a positive integer, got '2'"),
    "negative": ({"n_layer": -2}, "n_layer .*must be a positive integer, got -2"),
    "true for a number": ({"n_layer": True}, "n_layer .*must be a positive integer, got True"),
    "epsilon": ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon .*must be a positive number, got nan"),
    "flag": ({"scale_attn_weights": "no"}, "scale_attn_weights .*must be true or false, got 'no'"),
    "untied without a head": ({"tie_word_embeddings": False},
        r"with an untied head.* lacks lm_head\.weight \[29, 24\]"),
    "more layers than there are": ({"n_layer": 3}, r"GPT-2 of 3 layers.* lacks h\.2\."),
    "fewer layers than there are": ({"n_layer": 1}, r"GPT-2 of 1 layers.* has h\.1\..* besides"),
    "another context": ({"n_positions": 32}, r"wpe\.weight must be \[32, 24\] .*got \[16, 24\]"),
    "another n_inner": ({"n_inner": 40}, r"c_fc\.\w+ must be"),
}  # fmt: skip


@pytest.mark.parametrize(("fields", "match"), CONFIGS.values(), ids=CONFIGS)
def test_wrong_or_unsupported_configurations_are_named(fields, match, folder):
    set_config(folder, **fields)
    refused(match, folder)


LENS_CONFIGS = {
    "shortformer": ({"positional_embedding_type": "shortformer"}, "positional_embedding_type 'shortformer'"),
    "rotary": ({"positional_embedding_type": "rotary"}, r"has pos_embed\.W_pos besides"),
    "alibi": ({"positional_embedding_type": "alibi"}, "positional_embedding_type 'alibi'"),
    "shortformer as published": ({"shortformer_pos": True}, "shortformer_pos True"),
    "RMS": ({"normalization_type": "RMS"}, r"normalization RMS .* has ln_final\.b, blocks\.0\.ln1\.b"),
    "batch norm": ({"normalization_type": "BN"}, "normalization_type 'BN' .*expected 'LN' or 'LNPre' or 'RMS'"),
    "RMS as published": ({"normalization": "RMS"}, "normalization 'RMS'"),
    "final RMS": ({"final_rms": True}, "final_rms True"),
    "bidirectional": ({"attention_dir": "bidirectional"}, "attention_dir 'bidirectional' .*expected 'causal'"),
    "gated": ({"gated_mlp": True}, r"lacks blocks\.0\.mlp\.W_gate"),
    "grouped queries": ({"n_key_value_heads": 1}, r"lacks blocks\.0\.attn\._W_K"),
    "local attention": ({"use_local_attn": True}, "attn_types of the configuration must be global or local"),
    "another output vocabulary": ({"d_vocab_out": 7}, r"unembed.W_U must be \[24, 7\] by the configuration"),
    "soft cap": ({"output_logits_soft_cap": -30.0}, "output_logits_soft_cap .* must be a positive number"),
    "SoLU": ({"act_fn": "solu_ln"}, "act_fn 'solu_ln' is not supported: expected one of gelu_new"),
    "scaled neurons": ({"neuron_scale": 0.5}, "neuron_scale 0.5"),
    "LayerNorm said to be absent": ({"normalization_type": None},
        r"normalization None .* has ln_final\.w, ln_final\.b, blocks\.0"),
    "LayerNorm said to be folded": ({"normalization_type": "LNPre"}, r"normalization LNPre .* has ln_final\.w"),
    "no sizes": ({"n_heads": None, "d_head": None}, "lacks n_heads and d_head"),
    "attention-only with MLPs": ({"attn_only": True}, r"has blocks\.0\.\S+.* besides"),
}  # fmt: skip


@pytest.mark.parametrize(("fields", "match"), LENS_CONFIGS.values(), ids=LENS_CONFIGS)
def test_unsupported_transformer_lens_configurations_are_named(fields, match):
    state, cfg = lens(random_model())
    assert load_weights(state, config=cfg).config.n_layers == 2
    refused(match, state, config=cfg | fields)


def test_damaged_files_are_told_apart(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    refused("model.safetensors .*is not a whole safetensors file.*fetch it again", folder)
    path.write_bytes(b"")
    refused("model.safetensors is empty", folder)
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 548105171\n"
    path.write_bytes(pointer)
    refused("is a git-lfs pointer.*git lfs pull", folder)
    path.write_bytes(whole)
    state = load_file(path)
    path.unlink()
    torch.save(state, folder / "pytorch_model.bin")
    assert load_weights(folder).config.n_layers == 2
    whole = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(whole[: len(whole) // 2])
    refused("pytorch_model.bin", folder)
    (folder / "pytorch_model.bin").write_bytes(pointer)
    refused("is a git-lfs pointer", folder)
    torch.save([1, 2], folder / "pytorch_model.bin")
    refused("must hold tensors by name, got a list", folder)
    torch.save({"wte.weight": 3}, folder / "pytorch_model.bin")
    refused("must hold tensors by name, got a int for 'wte.weight'", folder)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_in_a_malicious_pickle_runs(zipped, folder):
    bait, path = folder / "it-ran", folder / "pytorch_model.bin"
    (folder / "model.safetensors").unlink()
    torch.save({"wte.weight": Bomb(bait)}, path, _use_new_zipfile_serialization=zipped)
    refused("holds more than tensors.*nothing in it was run", folder)
    assert not bait.exists()
    path.write_bytes(pickle.dumps(Bomb(bait), protocol=2))
    refused("holds more than tensors.*nothing in it was run", folder)
    assert not bait.exists()
    pickle.loads(path.read_bytes())
    assert bait.exists()  # the bait works


def test_missing_files_are_named_with_what_was_looked_for(folder):
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    assert load_weights(folder).config.n_layers == 2  # the only one that there is
    (folder / "b.safetensors").write_bytes(b"")
    refused(
        "must hold one weights file, model.safetensors.*several others .a.safetensors, b", folder, FileNotFoundError
    )
    for name in "ab":
        (folder / f"{name}.safetensors").unlink()
    refused("must hold one weights file, model.safetensors, .*model_final.pth: found none", folder, FileNotFoundError)
    (folder / "config.json").unlink()
    refused("has no config.json", folder, FileNotFoundError)
    refused("found nothing there", folder / "nowhere", FileNotFoundError)
    refused("found nothing there", "./nowhere", FileNotFoundError)
    (folder / "config.json").write_text("{}")
    refused("found a file there", folder / "config.json", FileNotFoundError)


def test_a_bad_config_file_is_refused(folder):
    (folder / "config.json").write_text('{"model_type": "gpt2",')
    refused("config.json must be valid JSON", folder)
    (folder / "config.json").write_text("[]")
    refused("config.json must hold a JSON object, got a list", folder)
    (folder / "config.json").write_bytes(b"\xff\xfe")
    refused("config.json must be valid JSON", folder)
    (folder / "config.json").write_text('{"n_head": 3, "n_head": 4}')
    refused("'n_head' occurs twice", folder)


@pytest.fixture
def shards(folder):
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(state)
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    weight_map = {}
    for file, part in zip(files, (names[:10], names[10:]), strict=True):
        save_file({name: state[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert load_weights(folder).config.n_layers == 2
    return folder


def test_bad_shards_are_named(shards):
    index = shards / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    second = shards / "model-00002-of-00002.safetensors"
    whole = load_file(second)

    save_file({**whole, "h.0.ln_1.bias": torch.ones(24)}, second)
    refused(r"h\.0\.ln_1\.bias is in two shards", shards)
    save_file({name: t for name, t in whole.items() if name != "wte.weight"}, second)
    refused(r"says that wte\.weight is in model-00002-of-00002\.safetensors, found it in no shard", shards)
    second.unlink()
    refused("model-00002-of-00002.safetensors is missing", shards, FileNotFoundError)
    save_file(whole, second)

    for name in ("../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".hidden.bin", "model.txt", 3):
        index.write_text(json.dumps({"weight_map": weight_map | {"wte.weight": name}}))
        refused("must list plain names", shards)
    index.write_text(
        json.dumps({"weight_map": weight_map})[:-2] + ', "wte.weight": "model-00001-of-00002.safetensors"}}'
    )
    refused("'wte.weight' occurs twice", shards)
    for content in ("[]", "{}", '{"weight_map": {}}'):
        index.write_text(content)
        refused("must hold a 'weight_map'", shards)


def test_wrong_arguments_are_refused(folder):
    refused("dtype must be one of float64, float32, bfloat16, float16, got 'int8'", folder, dtype="int8")
    refused("dtype must be one of .* got 'float8_e4m3fn'", folder, dtype=torch.float8_e4m3fn)
    refused("revision 'main' is for models on the Hub", folder, revision="main")
    refused("revision 'main' is for models on the Hub", {}, config={"model_type": "gpt2", **SIZES}, revision="main")
    refused("give config=", {})
    refused("expected a folder, a Hub id, a transformers model or a state dict, got a int", 3)
    refused("got a Linear without config", torch.nn.Linear(2, 2))
    for name in ("gpt5", "a/b/c", "a--b/c", "-a/b", "two words/model"):
        refused(f"unknown model '{name}': .* one of toy-ioi, toy-induction, smollm2-135m, gpt2, gpt2-medium", name)
    refused("device 'no-such-device' cannot be used here", folder, RuntimeError, device="no-such-device")
    if not torch.cuda.is_available():
        refused("device 'cuda' cannot be used here", folder, RuntimeError, device="cuda")


def test_a_model_without_values_is_refused():
    with torch.device("meta"):
        model = gpt2()
    refused("is on the meta device", model)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_weights_go_to_the_device(folder):
    assert {t.device.type for _, t in load_weights(folder, device="cuda").weights.named()} == {"cuda"}


# The Hub


def cache(root, repo, commit, source, *, main=True):
    """Put a folder into a cache of huggingface_hub's layout."""
    at = root / f"models--{repo.replace('/', '--')}"
    snapshot = at / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for path in source.iterdir():
        if path.is_file():
            (snapshot / path.name).write_bytes(path.read_bytes())
    if main:
        (at / "refs").mkdir()
        (at / "refs" / "main").write_text(commit)
    return snapshot


@pytest.mark.parametrize("asked", ["gpt2", "openai-community/gpt2"])
@pytest.mark.parametrize("cached_as", ["openai-community/gpt2", "gpt2"])
def test_gpt2_is_found_in_the_cache_at_the_pinned_commit(asked, cached_as, folder, tmp_path):
    snapshot = cache(tmp_path / "cache", cached_as, PINNED["gpt2"], folder, main=False)
    loaded = load_weights(asked, cache_dir=tmp_path / "cache")
    assert (loaded.model_id, loaded.folder) == ("openai-community/gpt2", snapshot)


def test_another_commit_of_gpt2_is_not_taken_for_the_pinned_one(folder, tmp_path):
    cache(tmp_path / "cache", "openai-community/gpt2", "1" * 40, folder)
    refused(f"at revision {PINNED['gpt2']} is not cached", "gpt2", ConnectionError, cache_dir=tmp_path / "cache")
    assert load_weights("gpt2", revision="main", cache_dir=tmp_path / "cache").folder.name == "1" * 40


def test_other_models_are_found_in_the_cache_at_main_or_at_a_revision(shards, tmp_path):
    (tmp_path / "published").mkdir()
    published(tmp_path / "published")
    cache(tmp_path / "cache", "NeelNanda/Attn_Only_4L512W_C4_Code", "2" * 40, tmp_path / "published")
    cache(tmp_path / "cache", "cerebras/Cerebras-GPT-13B", "3" * 40, shards)
    loaded = load_weights("NeelNanda/Attn_Only_4L512W_C4_Code", cache_dir=tmp_path / "cache")
    assert (loaded.config.attn_only, loaded.model_id) == (True, "NeelNanda/Attn_Only_4L512W_C4_Code")
    for revision in (None, "main", "3" * 40):
        loaded = load_weights("cerebras/Cerebras-GPT-13B", revision=revision, cache_dir=tmp_path / "cache")
        assert loaded.folder.name == "3" * 40


def test_not_cached_and_no_network_is_one_sentence_announced_before(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "eapcore"):
        refused(
            "of openai-community/gpt2-xl .*is not cached and the Hub cannot be reached.*or give a folder",
            "gpt2-xl", ConnectionError, cache_dir=tmp_path,
        )  # fmt: skip
    assert "openai-community/gpt2-xl is not cached as a whole: asking the Hub" in caplog.text


def test_a_cache_that_lacks_a_shard_is_not_used(shards, tmp_path):
    snapshot = cache(tmp_path / "cache", "some/model", "4" * 40, shards)
    (snapshot / "model-00002-of-00002.safetensors").unlink()
    refused("of some/model at revision 4+ is not cached", "some/model", ConnectionError, cache_dir=tmp_path / "cache")


def test_of_a_cached_model_the_file_that_is_whole_is_read(shards, tmp_path):
    state = {name: t for path in sorted(shards.glob("*.safetensors")) for name, t in load_file(path).items()}
    snapshot = cache(tmp_path / "cache", "some/model", "4" * 40, shards)
    (snapshot / "model-00002-of-00002.safetensors").unlink()
    torch.save(state, snapshot / "pytorch_model.bin")
    assert load_weights("some/model", cache_dir=tmp_path / "cache").folder == snapshot


def test_a_local_folder_comes_before_the_hub(folder, tmp_path, monkeypatch):
    cache(tmp_path / "cache", "openai-community/gpt2", PINNED["gpt2"], folder)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "gpt2" / name).write_bytes((folder / name).read_bytes())
    assert load_weights("gpt2", cache_dir=tmp_path / "cache").folder == Path("gpt2")


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hub as a download needs: /<owner>/<name>/resolve/<revision>/<file> of the folders in `models`."""

    models: dict[str, Path]
    requests: list[str]

    def do_HEAD(self):
        parts = self.path.strip("/").split("/")
        folder, file = self.models.get("/".join(parts[:2])), parts[-1]
        body = (folder / file).read_bytes() if folder and (folder / file).is_file() else None
        if self.command == "HEAD":
            self.requests.append(file)
        self.send_response(404 if body is None else 200)
        if body is None:
            self.send_header("X-Error-Code", "EntryNotFound" if folder else "RepoNotFound")
            self.send_header("Content-Length", "0")
        else:
            self.send_header("ETag", f'"{file}-{len(body)}"')
            self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", "5" * 40)
        self.end_headers()
        if body is not None and self.command == "GET":
            self.wfile.write(body)

    do_GET = do_HEAD

    def log_message(self, *_):
        pass


DOWNLOAD = """
import json, sys
from eapcore.models.load import load_weights
found = []
for model in sys.argv[2:]:
    try:
        found.append(str(load_weights(model, cache_dir=sys.argv[1]).folder.name))
    except Exception as error:
        found.append(f"{type(error).__name__}: {error}")
print(json.dumps(found))
"""


def test_a_model_that_is_not_cached_comes_from_the_hub_file_by_file(folder, tmp_path):
    empty, sharded, attention = tmp_path / "empty", tmp_path / "sharded", tmp_path / "attention"
    for each in (empty, sharded):
        each.mkdir()
        (each / "config.json").write_text((folder / "config.json").read_text())
    published(attention)
    state = load_file(folder / "model.safetensors")
    torch.save(state, sharded / "pytorch_model-00001-of-00001.bin")
    weight_map = dict.fromkeys(state, "pytorch_model-00001-of-00001.bin")
    (sharded / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    models = {"a/plain": folder, "a/empty": empty, "a/sharded": sharded, "a/attention": attention}
    handler = type("Handler", (Hub,), {"models": models, "requests": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "NO_PROXY": "127.0.0.1"}
        environment |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_TOKEN": ""}
        command = [sys.executable, "-c", DOWNLOAD, str(tmp_path / "cache"), *models, "a/unknown"]
        result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
        server.shutdown()
    assert result.returncode == 0, result.stderr
    plain, nothing, shard, attn, unknown = json.loads(result.stdout)
    assert plain == shard == attn == "5" * 40
    assert nothing.startswith("FileNotFoundError: a/empty on the Hub has no weights file; looked for model.safetensors")
    assert unknown == "ValueError: 'a/unknown' is neither a folder here nor a public model on the Hub"
    assert handler.requests[:2] == ["config.json", "model.safetensors"]
    assert handler.requests.count("pytorch_model-00001-of-00001.bin") == 1
