"""What a family's model is made of: configurations and files as they lie on the Hub, modules in memory that compute
something else, weights that are changed."""

from __future__ import annotations

import gc
import json
import pickle
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from families import HEADS, LLAMA3, ROPE, SIZES, V, ours, pairs_for, randomised, theirs
from safetensors.torch import save_file

import eapcore
from eapcore.execution.ablation import Ablation
from eapcore.models.families import layout_of
from eapcore.models.forward import forward
from eapcore.models.load import load

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("name", ["llama, linear rope, biases, tied", "qwen3", "gemma3", "olmo2", "neox"])
def test_a_saved_folder_is_the_model_in_memory(name, tmp_path):
    theirs(name).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    tokens = torch.randint(0, V, (2, 7), generator=torch.Generator().manual_seed(0))
    saved = load(tmp_path)
    torch.testing.assert_close(forward(saved, tokens), forward(ours(name), tokens), rtol=0, atol=1e-12)
    assert saved.content_hash == ours(name).content_hash
    planned = load(tmp_path, device="meta")  # of its configuration alone
    assert planned.config == saved.config and planned.dtype == saved.dtype
    shapes = [[(key, t.shape, t.stride()) for key, t in one.weights.named()] for one in (planned, saved)]
    assert shapes[0] == shapes[1] and all(t.is_meta for _, t in planned.weights.named())


def test_files_name_the_graph_that_they_are_of(tmp_path):
    for name, kv in (("llama", "grouped"), ("neox", "each")):
        model = ours(name, kv)
        scores = eapcore.attribute(model, pairs_for(model))
        scores.save(tmp_path / "scores.safetensors")
        again = eapcore.EdgeScores.load(tmp_path / "scores.safetensors", content_hash=model.content_hash)
        assert again.graph == model.graph and torch.equal(again.scores, scores.scores)
        circuit = scores.top_n(40).prune()
        circuit.save(tmp_path / "circuit.json")
        assert eapcore.Circuit.load(tmp_path / "circuit.json").edges == circuit.edges
        for receiver in range(model.graph.n_receivers):
            assert model.graph.receiver(model.graph.receiver_names[receiver]) == receiver


# As they lie on the Hub, older forms among them, with fewer layers: what they leave out is what transformers takes.
PUBLISHED = {
    "Llama-3.2-1B": ("LlamaConfig", {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "rope_theta": 5e5,
        "rope_scaling": LLAMA3 | {"factor": 32.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"}}),
    "Mistral-7B-v0.1": ("MistralConfig", {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 32768, "sliding_window": 4096,
        "rms_norm_eps": 1e-5, "rope_theta": 1e4}),
    "Mistral-7B-v0.3": ("MistralConfig", {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 32768, "max_position_embeddings": 32768, "sliding_window": None,
        "rms_norm_eps": 1e-5, "rope_theta": 1e6}),
    "Qwen2.5-0.5B": ("Qwen2Config", {"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14,
        "num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 32768, "sliding_window": 32768,
        "use_sliding_window": False, "max_window_layers": 24, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "tie_word_embeddings": True}),
    "Qwen2 with windows": ("Qwen2Config", {"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14,
        "num_key_value_heads": 2, "vocab_size": 99, "max_position_embeddings": 99, "sliding_window": 9,
        "use_sliding_window": True, "max_window_layers": 5}),
    "Qwen3, silent": ("Qwen3Config", {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 32,
        "vocab_size": 99, "max_position_embeddings": 99, "rope_theta": 1e6}),
    "gemma-2b": ("GemmaConfig", {"hidden_size": 2048, "intermediate_size": 16384, "num_attention_heads": 8,
        "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 256000, "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6, "rope_theta": 1e4, "hidden_act": "gelu"}),
    "gemma-2-2b": ("Gemma2Config", {"hidden_size": 2304, "intermediate_size": 9216, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 256000, "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6, "rope_theta": 1e4, "hidden_activation": "gelu_pytorch_tanh", "sliding_window": 4096,
        "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 256}),
    "Gemma 2, silent": ("Gemma2Config", {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8,
        "vocab_size": 99, "max_position_embeddings": 99}),
    "gemma-3-1b-it": ("Gemma3TextConfig", {"hidden_size": 1152, "intermediate_size": 6912, "num_attention_heads": 4,
        "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 262144, "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6, "rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": None,
        "sliding_window": 512, "sliding_window_pattern": 6, "query_pre_attn_scalar": 256}),
    "gemma-3-4b-it's text": ("Gemma3TextConfig", {"hidden_size": 2560, "intermediate_size": 10240,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}),
    "OLMo-2-0425-1B": ("Olmo2Config", {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 16,
        "num_key_value_heads": 16, "vocab_size": 100352, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6,
        "rope_theta": 5e5, "rope_scaling": None}),
    "llava-1.5-7b": ("LlavaConfig", {"text_config": {"model_type": "llama", "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5, "vocab_size": 32064, "num_hidden_layers": 7}}),
    "llava of a tied model": ("LlavaConfig", {"tie_word_embeddings": False, "text_config": {"model_type": "qwen2",
        "tie_word_embeddings": True, "num_hidden_layers": 7}}),
    "Mistral-Small-3.1's text, silent of its family": ("Mistral3Config", {"tie_word_embeddings": False,
        "text_config": {"head_dim": 128, "hidden_size": 5120, "intermediate_size": 32768, "num_hidden_layers": 7,
        "sliding_window": None, "vocab_size": 131072, "rope_theta": 1e9}}),
    "pythia-160m": ("GPTNeoXConfig", {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12,
        "vocab_size": 50304, "max_position_embeddings": 2048, "rotary_pct": 0.25, "rotary_emb_base": 10000,
        "use_parallel_residual": True, "layer_norm_eps": 1e-5, "hidden_act": "gelu"}),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_configuration_means_what_transformers_takes_it_to_mean(name):
    kind, given = PUBLISHED[name]
    config = getattr(transformers, kind)
    given = {"num_hidden_layers": 7, "model_type": config.model_type} | given
    found, expected = layout_of(given), layout_of(config(**deepcopy(given)).to_dict())
    assert found.config == expected.config and found.tied == expected.tied
    assert list(found.shapes().items()) == list(expected.shapes().items())


# Fields of a configuration file, and what means the same in another form, or is taken where nothing is said.
LINEAR = {"rope_type": "linear", "factor": 4.0}
WRITTEN = {
    "a base inside the older scaling": ("llama", {"rope_scaling": LINEAR | {"rope_theta": 30.0}}),
    "both forms, one meaning": ("qwen3", {"rope_scaling": dict(LINEAR), "rope_parameters": dict(LINEAR)}),
    "another activation of the first Gemma": ("gemma", {"hidden_act": "relu"}),
    "the older field of Gemma's activation": ("gemma", {"hidden_act": "gelu", "hidden_activation": "gelu_new"}),
    "kinds of layers without bases": (
        "gemma3_text",
        {"rope_parameters": {"sliding_attention": {"rope_type": "default"}, "full_attention": dict(LINEAR)}},
    ),
    "one kind of layers": ("gemma3_text", {"rope_parameters": {"full_attention": LINEAR | {"rope_theta": 30.0}}}),
    "Gemma 3, silent": ("gemma3_text", {}),
    "ministral": ("ministral", {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 3}),
    "mistral whose layers all have windows": ("mistral", {"sliding_window": 3}),
    "neox in Pythia's form": ("gpt_neox", {"rotary_pct": 0.5, "rotary_emb_base": 30, "head_dim": None}),
    "neox, silent": ("gpt_neox", {"head_dim": None}),
    "neox whose heads are too small to be turned": ("gpt_neox", {"head_dim": None, "num_attention_heads": 9}),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_a_file_s_fields_mean_what_they_mean_to_transformers(name, tmp_path):
    kind, fields = WRITTEN[name]
    fields = SIZES | HEADS | {"model_type": kind, "sliding_window": None if kind == "mistral" else 4} | fields
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in fields.items() if (k, v) != ("head_dim", None)}))
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    module = randomised(transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager"))
    save_file({key: tensor.clone() for key, tensor in module.state_dict().items()}, tmp_path / "model.safetensors")
    tokens = torch.randint(0, V, (2, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = module(tokens).logits
    for source in (tmp_path, module):
        assert (forward(load(source), tokens) - expected).abs().max() <= 5e-6 * expected.abs().max()


TEXT = {"vocab_size": V, "hidden_size": 24, "intermediate_size": 33, "num_hidden_layers": 2, "head_dim": 6}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
PICTURES = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
PICTURES |= {"image_size": 8, "patch_size": 4}
SEVERAL = {
    "gemma3": ("Gemma3", "gemma3_text", {"mm_tokens_per_image": 4, "image_token_index": 28}),
    "llava": ("Llava", "llama", {"image_token_index": 28}),
    "mistral3": ("Mistral3", "mistral", {"image_token_index": 28}),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_the_language_model_of_a_model_of_several_is_loaded_where_it_reads_text_as_alone(name, tmp_path):
    kind, text, options = SEVERAL[name]
    seen = PICTURES | {
        "model_type": {"gemma3": "siglip_vision_model", "llava": "clip_vision_model"}.get(name, "pixtral")
    }
    config = getattr(transformers, f"{kind}Config")(
        text_config=TEXT | {"model_type": text}, vision_config=seen, **options
    )
    module = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    tokens = torch.randint(0, 28, (2, 9), generator=generator)
    with torch.no_grad():
        expected = module(tokens).logits
    module.save_pretrained(tmp_path)
    for model in (load(module), load(tmp_path)):
        assert model.family == text
        assert (forward(model, tokens) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("sizes", "counts"),
    [
        ((24, 14, None), (361, 1033, 179_749)),  # Qwen2.5-0.5B
        ((26, 8, None), (235, 651, 74_218)),  # Gemma-2-2B
        ((32, 32, None), (1057, 3105, 1_592_881)),  # Llama-3.1-8B
        ((24, 14, 2), (361, 457, None)),
    ],
)
def test_graphs_have_the_published_sizes(sizes, counts):
    layers, heads, n_kv = sizes
    graph = eapcore.Graph(layers, heads, True, False, n_kv)
    assert (graph.n_senders, graph.n_receivers) == counts[:2]
    assert counts[2] in (None, graph.n_edges)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "rope_type 'yarn'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_parameters": None}, "rope_type 'dynamic'"),
        ({"model_type": "mixtral"}, "model_type 'mixtral' is not supported: expected one of gpt2, llama"),
        ({"model_type": "llava"}, "model_type 'llava' is not supported"),
        ({"model_type": "paligemma", "text_config": {}}, "model_type 'paligemma', a model of more than text, is not"),
        ({"model_type": "llava", "text_config": {"model_type": "phi"}}, "model_type 'phi' is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "use_bidirectional_attention True"),
        ({"model_type": ["llama"]}, "is not supported"),
        ({"num_local_experts": 8}, "num_local_experts 8"),
        ({"mlp_bias": True}, "mlp_bias True"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantised \(gptq\), which is not supported"),
        ({"quantization": {"group_size": 64, "bits": 4}}, r"quantised \(\{'group_size': 64, 'bits': 4\}\), which"),
        ({"quantization_config": {"quant_method": "fp8"}, "model_type": "gpt_neox"}, r"quantised \(fp8\), which"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}, "model_type": "x"}, r"quantised \(bitsandbytes\)"),
        ({"num_key_value_heads": 4}, "n_key_value_heads must divide n_heads 6, got 4"),
        ({"hidden_act": "relu2"}, "hidden_act 'relu2'"),
        ({"num_hidden_layers": 3}, "lacks layers.2."),
        ({"model_type": "gemma2", "attention_bias": True}, "attention_bias True"),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 3.0}, "attn_logit_softcapping 3.0"),
        ({"model_type": "gemma", "hidden_activation": "gelu"}, "hidden_activation 'gelu', and elsewhere 'silu'"),
        ({"rope_scaling": LINEAR}, "rope_parameters and rope_scaling: remove one of them"),
        ({"rope_theta": 30.0}, "says rope_theta 30.0, and elsewhere 10000.0: remove one of them"),
        ({"rope_parameters": {"full_attention": LINEAR}}, "must not be by layers, got those of full_attention"),
        ({"rope_parameters": LINEAR, "model_type": "gemma3_text"}, "must be by layers, full_attention and sliding_att"),
        ({"rope_parameters": {"rope_type": "linear"}}, "lacks the factor of rope_type linear"),
        (
            {"rope_parameters": LINEAR | {"rope_type": "llama3", "low_freq_factor": 4, "high_freq_factor": 4}},
            "low_freq_factor of the configuration must be below high_freq_factor, got 4 and 4",
        ),
        (
            {"rope_parameters": ROPE | LLAMA3 | {"rope_type": "llama3"}, "original_max_position_embeddings": 8},
            "says original_max_position_embeddings 8, and elsewhere 16",
        ),
        ({"rope_scaling": {"type": "linear"}, "rope_parameters": None, "model_type": "gemma3_text"}, "as rope_type"),
        (
            {"model_type": "gpt_neox", "attention_bias": True, "rotary_pct": 0.5, "partial_rotary_factor": 0.25},
            "partial_rotary_factor 0.25, and",
        ),
        ({"model_type": "gpt_neox", "attention_bias": True, "rotary_pct": 2}, "rotary_pct at most 1, got 2"),
        ({"model_type": "gpt_neox", "attention_bias": True, "rope_theta": 30}, "rope_theta 30, and elsewhere 10000.0"),
        ({"model_type": "mistral", "layer_types": ["full_attention"] * 2}, "read of a 'ministral' alone"),
        ({"model_type": "qwen3", "layer_types": ["sliding_attention"] * 2}, "sliding_window is not in use"),
        ({"is_causal": False}, "is_causal False of the configuration is not supported: expected True"),
        ({"transformers_weights": "other.safetensors", "model_type": "gpt_neox"}, "transformers_weights 'other"),
        ({"per_layer_config": {"1": {"num_key_value_heads": 1}}}, "per_layer_config"),
        ({"model_type": "llava", "text_config": {"model_type": "gemma2"}}, "final_logit_softcapping inside a llava"),
    ],
)
def test_what_a_description_lacks_is_refused_by_name(changes, message):
    config = theirs("llama").config.to_dict() | changes
    with pytest.raises(ValueError, match=message):
        load(theirs("llama").state_dict(), config=config)


@pytest.mark.parametrize(
    "end", ["qweight", "qzeros", "weight_scale_inv", "weight.absmax", "weight.quant_state.nf4", "SCB"]
)
def test_parts_of_quantised_weights_are_named_where_no_configuration_tells(end):
    state = theirs("llama").state_dict() | {f"model.layers.0.mlp.up_proj.{end}": torch.ones(3)}
    with pytest.raises(ValueError, match=rf"up_proj.{end} is a part of a quantised weight, which is not supported"):
        load(state, config=theirs("llama").config.to_dict())


def test_a_way_to_take_key_and_value_heads_that_is_unknown_is_refused():
    with pytest.raises(ValueError, match="kv must be one of each, grouped"):
        load(theirs("llama"), kv="both")


def _hooked(module):
    module.model.layers[0].register_forward_hook(lambda *args: None)


def _another_activation(module):
    module.model.layers[1].mlp.act_fn = torch.nn.GELU()


def _another_eps(module):
    module.model.layers[0].input_layernorm.variance_epsilon = 1e-3


def _another_forward(module):
    module.model.layers[0].mlp.forward = lambda x: x


def _global_hook(module):
    return torch.nn.modules.module.register_module_forward_pre_hook(lambda *args: None)


def _another_part(module):
    class Mlp(type(module.model.layers[0].mlp)):
        def forward(self, x):
            return 2 * super().forward(x)

    module.model.layers[0].mlp.__class__ = Mlp


def _another_class_forward(module):
    kind = type(module.model.layers[0].mlp)
    own, kind.forward = kind.forward, lambda self, x: x
    return SimpleNamespace(remove=lambda: setattr(kind, "forward", own))


def _field(name, value):
    return lambda module: setattr(module.model.layers[1].self_attn, name, value)


def _another_rotation(module):
    module.model.rotary_emb.inv_freq *= 2


def _rounded(module):
    module.half()


def _packed(module):
    module.lm_head = torch.nn.Module()
    module.lm_head.weight = lambda: torch.zeros(V, 18)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_hooked, "forward hook at model.layers.0"),
        (_global_hook, "torch has a global forward pre hook"),
        (_another_part, "model.layers.0.mlp a Mlp whose forward comes from test_family_sources"),
        (_another_class_forward, "model.layers.0.mlp a LlamaMLP whose forward comes from test_family_sources"),
        (_field("scaling", 0.1), "model.layers.1.self_attn scaling 0.1, but its configuration says 0.353553"),
        (_field("is_causal", False), "model.layers.1.self_attn is_causal False"),
        (_field("sliding_window", 2), "model.layers.1.self_attn sliding_window 2, but its configuration says None"),
        (_field("attn_logit_softcapping", 5.0), "attn_logit_softcapping 5.0, but its configuration says None"),
        (_another_rotation, "model.rotary_emb inv_freq with other frequencies"),
        (_packed, r"lacks lm_head.weight \[29, 18\]"),
        (_rounded, r"model.rotary_emb inv_freq rounded to float16 \(load it with dtype=float16"),
        (_another_activation, "model.layers.1.mlp the activation GELU, but its configuration says silu"),
        (_another_eps, "model.layers.0.input_layernorm variance_epsilon 0.001, but its configuration says 1e-06"),
        (_another_forward, "model.layers.0.mlp a replaced forward"),
    ],
)
def test_a_module_that_computes_something_else_is_refused(change, message):
    config = transformers.LlamaConfig(**SIZES | HEADS)
    module = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    load(module)
    undone = change(module)
    try:
        with pytest.raises(ValueError, match=message):
            load(module)
    finally:
        if undone is not None:
            undone.remove()


def _by_numpy(module):
    for tensor in module.state_dict().values():
        array = tensor.numpy()
        array[..., 0] *= 1.25


def _one_number(module):
    next(layer for layer in module.model.layers).mlp.down_proj.weight.data.numpy()[5, 7] += 3


def _by_training(module):
    module(torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter -= 0.05 * parameter.grad


def _another_checkpoint(module):
    torch.manual_seed(7)
    module.load_state_dict({name: torch.randn_like(tensor) * 0.2 for name, tensor in module.state_dict().items()})


WRITES = {
    "another checkpoint": _another_checkpoint,
    "through .data": lambda module: [parameter.data.mul_(1.1) for parameter in module.parameters()],
    "by numpy": _by_numpy,
    "one number by numpy": _one_number,
    "by training": _by_training,
    "norms alone": lambda m: [p.data.add_(0.3) for name, p in m.named_parameters() if "norm" in name],
}


@pytest.mark.parametrize("dtype", [None, "float64"], ids=["shared", "converted"])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_scores_follow_weights_that_are_changed_in_place(name, dtype):
    torch.manual_seed(0)
    module = transformers.AutoModelForCausalLM.from_config(theirs(name).config, attn_implementation="eager").float()
    model = load(module, dtype=dtype)
    pairs, last = pairs_for(model), model.content_hash
    ablation = Ablation.of(model, pairs, "mean")
    first = eapcore.attribute(model, pairs)
    for what, write in WRITES.items():
        write(module)
        fresh = load(module, dtype=dtype)
        found = eapcore.attribute(model, pairs)
        assert torch.equal(found.scores, eapcore.attribute(fresh, pairs).scores), what
        assert not torch.equal(found.scores, first.scores), what
        assert model.content_hash == fresh.content_hash == found.meta["model"]["content_hash"] != last, what
        assert torch.equal(*(eapcore.run_with_senders(m, pairs.clean)[0] for m in (model, fresh))), what
        with pytest.raises(ValueError, match="were changed since the ablation's mean: make it anew"):
            eapcore.attribute(model, pairs, ablation=ablation)
        first, last = found, model.content_hash
        ablation = Ablation.of(model, pairs, "mean")
    assert eapcore.attribute(pickle.loads(pickle.dumps(model)), pairs).scores.equal(first.scores)


@pytest.mark.parametrize("change", ["p.data", "to", "assign", "module"])
def test_a_module_that_has_other_tensors_now_is_said_and_what_was_converted_follows_it(change):
    module = transformers.AutoModelForCausalLM.from_config(theirs("gemma2").config, attn_implementation="eager").float()
    shared, converted = load(module), load(module, dtype="float64")
    pairs = pairs_for(shared)
    torch.manual_seed(3)
    if change == "p.data":
        for parameter in module.parameters():
            parameter.data = torch.randn_like(parameter) * 0.2
    elif change == "to":
        turns = module.model.rotary_emb.inv_freq
        module.to(torch.bfloat16).model.rotary_emb.inv_freq = turns
    elif change == "assign":
        state = {name: torch.randn_like(tensor) * 0.2 for name, tensor in module.state_dict().items()}
        module.load_state_dict(state, assign=True)
        module.tie_weights()
    else:
        module.model.layers[0].mlp.up_proj = torch.nn.Identity()
    for call in (eapcore.attribute, lambda model, pairs: eapcore.run_with_senders(model, pairs.clean)):
        with pytest.raises(ValueError, match="is another tensor now than when the model was loaded"):
            call(shared, pairs)
    if change == "module":
        return
    fresh = load(module, dtype="float64")
    assert converted.content_hash == fresh.content_hash
    assert torch.equal(eapcore.attribute(converted, pairs).scores, eapcore.attribute(fresh, pairs).scores)
    expected = eapcore.attribute(converted, pairs).scores
    del module, fresh
    gc.collect()
    assert torch.equal(eapcore.attribute(converted, pairs).scores, expected)  # nobody changes it any more
