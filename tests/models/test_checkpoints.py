"""Checkpoints as people make them: nanoGPT's, with heads for other tasks, without a tied tensor, damaged ones.

Kinds here: how matrices are stored, what lies beside a decoder (BESIDE), what a tied model leaves out, damaged torch
files (DAMAGE), and logits of fewer tokens than are read.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import zipfile

import pytest
import torch
import torch.nn.functional as F
from models import random_model, random_pairs, save_checkpoint
from refusal import refused
from safetensors.torch import load_file, save_file

import eapcore
from eapcore.attribution.attribute import attribute
from eapcore.models.forward import forward
from eapcore.models.load import load

L, H, D, V, T = 2, 2, 8, 11, 6
TOKENS = torch.tensor([[1, 5, 9, 2], [3, 3, 10, 0]])


def nanogpt(bias=True):
    """A state dict as nanoGPT saves it: Linear matrices [out, in], a tied head."""
    draw = torch.Generator().manual_seed(0)

    def rand(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64) / math.sqrt(shape[-1])

    state = {"transformer.wte.weight": rand(V, D), "transformer.wpe.weight": rand(T, D)}
    for i in range(L):
        at = f"transformer.h.{i}."
        shapes = {"attn.c_attn": (3 * D, D), "attn.c_proj": (D, D), "mlp.c_fc": (4 * D, D), "mlp.c_proj": (D, 4 * D)}
        for name in ("ln_1", "ln_2"):
            state[f"{at}{name}.weight"] = 1 + rand(D)
            state[f"{at}{name}.bias"] = rand(D)
        for name, shape in shapes.items():
            state[f"{at}{name}.weight"] = rand(*shape)
            state[f"{at}{name}.bias"] = rand(shape[0])
    state |= {"transformer.ln_f.weight": 1 + rand(D), "transformer.ln_f.bias": rand(D)}
    state["lm_head.weight"] = state["transformer.wte.weight"]
    return {name: x for name, x in state.items() if bias or not name.endswith(".bias")}


def nanogpt_logits(state, tokens):
    """nanoGPT's forward, written out."""

    def linear(x, name):
        return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    def norm(x, name):
        return F.layer_norm(x, (D,), state[f"{name}.weight"], state.get(f"{name}.bias"), 1e-5)

    x = state["transformer.wte.weight"][tokens] + state["transformer.wpe.weight"][: tokens.shape[1]]
    for i in range(L):
        at = f"transformer.h.{i}."
        q, k, v = (
            part.unflatten(-1, (H, D // H)).transpose(1, 2)
            for part in linear(norm(x, at + "ln_1"), at + "attn.c_attn").split(D, -1)
        )
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + linear(z, at + "attn.c_proj")
        x = x + linear(F.gelu(linear(norm(x, at + "ln_2"), at + "mlp.c_fc")), at + "mlp.c_proj")
    return F.linear(norm(x, "transformer.ln_f"), state["lm_head.weight"])


ARGS = {"n_layer": L, "n_head": H, "n_embd": D, "block_size": T, "vocab_size": V, "dropout": 0.0, "bias": True}


def checkpoint(state, **args):
    optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]}
    others = {"optimizer": optimizer, "iter_num": 7, "best_val_loss": torch.tensor(1.5), "config": {"dataset": "x"}}
    return {"model": state, "model_args": ARGS | args, **others}


def test_nanogpt_checkpoints_are_loaded_whole(tmp_path):
    for bias in (True, False):
        state = nanogpt(bias)
        expected = nanogpt_logits(state, TOKENS)
        compiled = {f"_orig_mod.{name}": x for name, x in state.items()}
        compiled |= {f"_orig_mod.transformer.h.{i}.attn.bias": torch.ones(1, 1, T, T) for i in range(L)}
        folder = tmp_path / str(bias)
        folder.mkdir()
        torch.save(checkpoint(compiled, bias=bias), folder / "ckpt.pt")
        sources = [load(folder), load(folder / "ckpt.pt"), load(str(folder / "ckpt.pt"))]
        sources.append(load(state, config=ARGS | {"bias": bias}))
        for model in sources:
            assert (model.family, model.config.n_ctx, model.config.act_fn) == ("nanoGPT", T, "gelu")
            torch.testing.assert_close(forward(model, TOKENS), expected, rtol=0, atol=1e-13)
        scores = attribute(sources[0], random_pairs(sources[0], [3, 4]))
        assert scores.scores.abs().max() > 0
    (tmp_path / "other").mkdir()
    torch.save({"model": state}, tmp_path / "other" / "ckpt.pt")
    refused("other has no config.json", load, tmp_path / "other", error=FileNotFoundError)


def test_matrices_stored_the_other_way_round_are_turned_all_together():
    state = nanogpt()
    config = {"model_type": "gpt2", "activation_function": "gelu", "n_positions": T, **ARGS}
    expected = nanogpt_logits(state, TOKENS)
    matrices = [name for name in state if ".c_" in name and name.endswith("weight")]
    as_conv = {name: x.T if name in matrices else x for name, x in state.items()}
    for stored in (state, as_conv):
        torch.testing.assert_close(forward(load(stored, config=config), TOKENS), expected, rtol=0, atol=1e-13)
    for name in (name for name in matrices if state[name].shape != (D, D)):
        refused(r"stored as \[in, out\] and .* as \[out, in\]", load, state | {name: state[name].T}, config=config)
    two_of_three = {name: x.T if "attn.c_proj" not in name and name in matrices else x for name, x in state.items()}
    wrong = forward(load(two_of_three, config=config), TOKENS)  # a square matrix alone: nobody can tell
    assert not torch.allclose(wrong, expected)


def saved(folder, change, index=None):
    """A tied model in GPT-2's names whose tensors are changed before they are saved."""
    save_checkpoint(random_model(), folder)
    file = folder / "model.safetensors"
    tensors = change(load_file(file))
    save_file({name: x.contiguous() for name, x in tensors.items()}, file)
    if index is not None:
        names = dict.fromkeys([*tensors, *index], "model.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return folder


BESIDE = {
    "a value head": {"v_head.summary.weight": torch.ones(1, 24), "v_head.summary.bias": torch.ones(1)},
    "a classification head": {"score.weight": torch.ones(3, 24)},
    "a classifier": {"classifier.weight": torch.ones(3, 24), "classifier.bias": torch.ones(3)},
    "another classifier": {"classification_head.dense.weight": torch.ones(3, 24)},
    "questions": {"qa_outputs.weight": torch.ones(2, 24)},
    "position ids": {"transformer.position_ids": torch.arange(9)},
    "masks": {"transformer.h.0.attn.bias": torch.ones(1, 1, 9, 9), "transformer.h.1.attn.masked_bias": torch.ones(())},
}  # fmt: skip


@pytest.mark.parametrize("beside", BESIDE.values(), ids=BESIDE)
def test_what_lies_beside_a_decoder_is_left_aside(beside, tmp_path, caplog):
    folder = saved(tmp_path / "m", lambda tensors: tensors | beside)
    plain = load(saved(tmp_path / "plain", dict))
    assert torch.equal(forward(load(folder), TOKENS), forward(plain, TOKENS))
    assert ("left aside, a head for another task" in caplog.text) is not any("transformer" in name for name in beside)


def test_a_tied_model_may_leave_out_either_end(tmp_path):
    full = load_file(save_checkpoint(random_model(), tmp_path / "0") / "model.safetensors")
    config = json.loads((tmp_path / "0" / "config.json").read_text())
    embedding = next(name for name in full if name.endswith("wte.weight"))
    others = {name: x for name, x in full.items() if name not in (embedding, "lm_head.weight")}

    def tied(name, tensors, index=None):
        folder = saved(tmp_path / name, lambda _: tensors, index)
        (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
        return load(folder)

    expected = forward(
        tied("both", others | {name: full[embedding].clone() for name in (embedding, "lm_head.weight")}), TOKENS
    )
    head = {"lm_head.weight": full[embedding]}
    body = {embedding: full[embedding]}
    for at, (end, index) in enumerate([(head, None), (body, None), (body, ["lm_head.weight"]), (head, [])]):
        assert torch.equal(forward(tied(f"t{at}", others | end, index), TOKENS), expected)
    untied = saved(tmp_path / "9", lambda _: others | head)
    refused(r"lacks wte\.weight", load, untied)


def test_an_adapter_is_refused_and_code_of_a_model_s_own_is_said_not_to_run(tmp_path, caplog):
    folder = save_checkpoint(random_model(), tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "mine.Mine"}}))
    load(folder)
    assert "code that comes with the model is not run, it is taken for a GPT-2" in caplog.text
    (folder / "adapter_config.json").write_text("{}")
    refused("holds an adapter .* merge it into its model", load, folder)
    (folder / "config.json").unlink()
    refused("holds an adapter", load, folder)


def test_logits_may_be_of_fewer_tokens_than_are_read():
    """As compiled models and algorithmic tasks have it; in TransformerLens's names."""
    fields = {"n_layers": 1, "n_heads": 2, "d_model": 4, "d_head": 2, "d_mlp": 8, "n_ctx": 5, "d_vocab": 9,
        "d_vocab_out": 3, "act_fn": "relu", "normalization_type": None}  # fmt: skip
    draw = torch.Generator().manual_seed(1)
    shapes = {"embed.W_E": (9, 4), "pos_embed.W_pos": (5, 4), "unembed.W_U": (4, 3), "unembed.b_U": (3,)}
    shapes |= {f"blocks.0.attn.W_{x}": (2, 4, 2) for x in "QKV"} | {f"blocks.0.attn.b_{x}": (2, 2) for x in "QKV"}
    shapes |= {"blocks.0.attn.W_O": (2, 2, 4), "blocks.0.attn.b_O": (4,)}
    shapes |= {
        "blocks.0.mlp.W_in": (4, 8),
        "blocks.0.mlp.b_in": (8,),
        "blocks.0.mlp.W_out": (8, 4),
        "blocks.0.mlp.b_out": (4,),
    }
    state = {name: torch.randn(shape, generator=draw, dtype=torch.float64) for name, shape in shapes.items()}
    model = load(state, config=fields)
    assert forward(model, TOKENS[:, :3] % 9).shape == (2, 3, 3)
    pairs = eapcore.PromptPairs.from_lists([[8, 7, 1]], [[8, 2, 1]], [2], [0])
    for metric in ("logit_diff", "prob_diff", lambda logits: logits[:, 2]):
        first = attribute(model, pairs, metric, method="eap-ig", storage="dense").scores
        second = attribute(model, pairs, metric, method="eap-ig", storage="factored").scores
        torch.testing.assert_close(first, second, rtol=0, atol=1e-12)
        assert first.abs().max() > 0
    patched = eapcore.run_circuit(model, pairs, attribute(model, pairs).top_n(4))
    assert patched.shape == (1, 3)
    outside = eapcore.PromptPairs.from_lists([[8, 7, 1]], [[8, 2, 1]], [3], [0])
    refused(r"pair 0 has the answer 3, but the vocabulary of .* is 0\.\.2", attribute, model, outside)


def rewritten(path, change):
    """A torch file with its entries changed, by name."""
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content, how in change(entries):
            archive.writestr(name, content, how)


def first_data(entries):
    return max((name for name in entries if "/data/" in name), key=lambda name: len(entries[name]))


DAMAGE = {
    "an entry cut": (lambda e: [(n, c[:-8] if n == first_data(e) else c, 0) for n, c in e.items()],
        r"its entry data/\w+ has \d+ bytes of the \d+"),
    "an entry empty": (lambda e: [(n, b"" if n == first_data(e) else c, 0) for n, c in e.items()],
        "has 0 bytes of the"),
    "an entry missing": (lambda e: [(n, c, 0) for n, c in e.items() if n != first_data(e)], r"data/\w+ is missing"),
    "one compressed": (lambda e: [(n, c, 8 if n == first_data(e) else 0) for n, c in e.items()], "is compressed"),
    "all compressed": (lambda e: [(n, c, 8) for n, c in e.items()], "is compressed"),
    "no pickle": (lambda e: [(n, c, 0) for n, c in e.items() if not n.endswith("data.pkl")], "has no data.pkl"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_torch_files_are_refused_before_anything_is_read(change, message, tmp_path):
    folder = save_checkpoint(random_model(), tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    torch.save(tensors, path)
    load(folder)
    rewritten(path, change)
    assert "pytorch_model.bin" in refused(message, load, folder)


def test_what_a_pickle_would_run_is_named_and_not_run_and_no_advice_to_run_it_is_given(tmp_path):
    folder = save_checkpoint(random_model(), tmp_path / "m")
    (folder / "model.safetensors").unlink()

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "run"),)

    for protocol in (True, False):
        torch.save({"x": Evil()}, folder / "pytorch_model.bin", _use_new_zipfile_serialization=protocol)
        said = refused("holds more than tensors", load, folder)
        assert "weights_only" not in said and "torch.load" not in said and not (tmp_path / "run").exists()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps([1, 2]))
    assert "pytorch_model.bin" in refused("must hold tensors by name|no torch file|not a whole", load, folder)
    (folder / "pytorch_model.bin").unlink()
    os.mkfifo(folder / "pytorch_model.bin")
    with pytest.raises((ValueError, OSError), match=r"must hold one weights file|must be a file"):
        load(folder)
