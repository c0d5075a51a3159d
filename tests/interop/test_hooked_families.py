"""HookedTransformers of other families, as what the adapter sees of them: transformers' weights under TransformerLens's
names give the scores that the transformers model gives. tests/interop/run.sh holds the same against the package."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import eapcore
from eapcore.interop import eap_ig
from eapcore.interop import transformer_lens as tl
from eapcore.interop.eap_ig.names import in_our_order, their_shape
from eapcore.tasks import PromptPairs

transformers = pytest.importorskip("transformers")
V, HEADS = 29, {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8}
SIZES = {"vocab_size": V, "hidden_size": 18, "intermediate_size": 33, "num_hidden_layers": 2}
ROTARY = {"positional_embedding_type": "rotary"}
ROPE = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
BY_PARTS = {"use_NTK_by_parts_rope": True, "NTK_by_parts_factor": 4.0, "NTK_original_ctx_len": 16, "rotary_base": 500}
# name: (transformers' configuration class, what it is given, TransformerLens's fields beside the sizes)
CASES = {
    "llama": ("LlamaConfig", HEADS | {"rope_parameters": ROPE | {"original_max_position_embeddings": 16}}, BY_PARTS),
    "qwen3": ("Qwen3Config", HEADS | {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
        {"use_qk_norm": True, "use_local_attn": True, "window_size": 3, "attn_types": ["global", "local"]}),
    "gemma2": ("Gemma2Config", HEADS | {"sliding_window": 4, "query_pre_attn_scalar": 5, "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 5.0}, {"use_local_attn": True, "window_size": 4, "attn_types": ["local", "global"],
        "use_normalization_before_and_after": True, "attn_scale": math.sqrt(5), "attn_scores_soft_cap": 3.0,
        "output_logits_soft_cap": 5.0, "act_fn": "gelu_new"}),
    "neox": ("GPTNeoXConfig", {"hidden_size": 24, "num_attention_heads": 3}, {"normalization_type": "LN",
        "gated_mlp": False, "act_fn": "gelu", "parallel_attn_mlp": True, "rotary_dim": 2, "n_heads": 3, "d_model": 24,
        "eps": 1e-5}),
}  # fmt: skip


class HookedTransformer(nn.Module):
    def __init__(self, cfg: dict, weights: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.cfg = SimpleNamespace(**cfg)
        for name, tensor in weights.items():
            *parents, leaf = name.split(".")
            module: nn.Module = self
            for parent in parents:
                if not hasattr(module, parent):
                    module.add_module(parent, nn.Module())
                module = getattr(module, parent)
            module.register_parameter(leaf, nn.Parameter(tensor))


def hooked(module, name) -> HookedTransformer:
    """A transformers model's weights in TransformerLens's form."""
    fields = {"n_layers": 2, "n_heads": 6, "d_model": 18, "d_head": 8, "d_mlp": 33, "d_vocab": V, "n_ctx": 64}
    fields |= {"act_fn": "silu", "normalization_type": "RMS", "gated_mlp": True, "n_key_value_heads": 2, "eps": 1e-6}
    fields |= ROTARY | CASES[name][2]
    heads, gemma = fields["n_heads"], name.startswith("gemma")
    if name == "neox":
        fields["n_key_value_heads"] = None
    state, weights = module.state_dict(), {}

    def linear(ours, theirs, count=None):
        w = state[f"{theirs}.weight"].T
        out = w.shape[0 if ours.endswith("W_O") else 1]
        if ours.endswith("W_O"):
            w = w.unflatten(0, (count, -1))
        elif count is not None:
            w = w.unflatten(1, (count, -1)).transpose(0, 1)
        weights[ours] = w.contiguous()
        return out

    def norm(ours, theirs):
        weights[f"{ours}.w"] = state[f"{theirs}.weight"] + gemma
        if f"{theirs}.bias" in state:
            weights[f"{ours}.b"] = state[f"{theirs}.bias"]

    neox = name == "neox"
    body = "gpt_neox." if neox else "model."
    w_e = state[body + ("embed_in" if neox else "embed_tokens") + ".weight"]
    weights["embed.W_E"] = w_e * math.sqrt(18) if gemma else w_e
    weights["unembed.W_U"] = state[("embed_out" if "embed_out.weight" in state else "lm_head") + ".weight"].T
    weights["unembed.b_U"] = torch.zeros(V, dtype=torch.float64)
    norm("ln_final", body + ("final_layer_norm" if neox else "norm"))
    for layer in range(2):
        ours, theirs = f"blocks.{layer}.", f"{body}layers.{layer}."
        norm(ours + "ln1", theirs + "input_layernorm")
        if neox:
            for i, part in enumerate("QKV"):
                at = theirs + "attention.query_key_value."
                w, b = state[at + "weight"].view(heads, 3, 8, 24)[:, i], state[at + "bias"].view(heads, 3, 8)[:, i]
                weights[f"{ours}attn.W_{part}"] = w.transpose(1, 2).contiguous()
                weights[f"{ours}attn.b_{part}"] = b.contiguous()
            linear(ours + "attn.W_O", theirs + "attention.dense", heads)
            weights[ours + "attn.b_O"] = state[theirs + "attention.dense.bias"]
            norm(ours + "ln2", theirs + "post_attention_layernorm")
            for w, b, mlp in (("W_in", "b_in", "dense_h_to_4h"), ("W_out", "b_out", "dense_4h_to_h")):
                linear(f"{ours}mlp.{w}", f"{theirs}mlp.{mlp}")
                weights[f"{ours}mlp.{b}"] = state[f"{theirs}mlp.{mlp}.bias"]
            continue
        for part, under, count in (("Q", "", heads), ("K", "_", 2), ("V", "_", 2)):
            linear(f"{ours}attn.{under}W_{part}", f"{theirs}self_attn.{part.lower()}_proj", count)
            weights[f"{ours}attn.{under}b_{part}"] = torch.zeros(count, 8, dtype=torch.float64)
        linear(ours + "attn.W_O", theirs + "self_attn.o_proj", heads)
        weights[ours + "attn.b_O"] = torch.zeros(18, dtype=torch.float64)
        if "qwen3" in name:
            for part in "qk":
                norm(f"{ours}attn.{part}_norm", f"{theirs}self_attn.{part}_norm")
        for ours_, theirs_ in (("W_gate", "gate"), ("W_in", "up"), ("W_out", "down")):
            linear(f"{ours}mlp.{ours_}", f"{theirs}mlp.{theirs_}_proj")
        weights[ours + "mlp.b_in"] = torch.zeros(33, dtype=torch.float64)
        weights[ours + "mlp.b_out"] = torch.zeros(18, dtype=torch.float64)
        if gemma:
            norm(ours + "ln1_post", theirs + "post_attention_layernorm")
            norm(ours + "ln2_post", theirs + "post_feedforward_layernorm")
        norm(ours + "ln2", theirs + ("pre_feedforward" if gemma else "post_attention") + "_layernorm")
    return HookedTransformer(fields, weights)


def theirs(name):
    kind, given, _ = CASES[name]
    sizes = SIZES | {"max_position_embeddings": 64} | given
    if name == "neox":
        sizes["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
    config = getattr(transformers, kind)(**sizes)
    module = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").double().eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3
        parameter.data = drawn + (parameter.ndim == 1) * 0.5
    return module


def pairs():
    generator = torch.Generator().manual_seed(2)
    clean, corrupt = (torch.randint(0, V, (3, 9), generator=generator).tolist() for _ in range(2))
    return PromptPairs.from_lists(clean, corrupt, [1, 2, 3], [4, 5, 6])


@pytest.mark.parametrize("kv", ["each", "grouped"])
@pytest.mark.parametrize("name", CASES)
def test_a_family_scores_as_its_transformers_model_does(name, kv):
    module = theirs(name)
    expected, found = eapcore.load(module, kv=kv), tl.from_hooked_transformer(hooked(module, name), kv=kv)
    assert found.graph == expected.graph and found.config.n_kv == expected.config.n_kv
    for options in ({}, {"method": "eap-ig", "ablation": "corrupt"}):
        a, b = (eapcore.attribute(model, pairs(), **options).scores for model in (found, expected))
        assert float((a - b).abs().max()) <= 1e-12 * float(b.abs().max())


@pytest.mark.parametrize("name", ["llama", "neox"])
def test_verbatim_leaves_out_the_gradients_that_eap_ig_loses_without_position_embeddings(name):
    model, task = eapcore.load(theirs(name)), pairs()
    graph = SimpleNamespace(cfg={"n_layers": 2}, scores=torch.zeros(their_shape(model.graph)).double())
    label = torch.cat((task.answers, task.wrong), 1)

    def metric(logits, clean_logits, lengths, label):
        return logits[:, -1].gather(1, label).diff().neg().mean()

    batches = [(task.clean, task.corrupt, label)]
    for verbatim in (False, True):
        eap_ig.attribute(
            model,
            graph,
            batches,
            metric,
            "EAP-IG-activations",
            ig_steps=3,
            quiet=True,
            sign="metric",
            verbatim=verbatim,
        )
        expected = eapcore.attribute(model, task, method="eap-ig-activations", steps=3, points="right").scores
        if verbatim:  # one component of five is the embedding: its share, where nothing else is read
            inputs = eapcore.attribute(model, task, method="eap-ig", steps=3, points="right").scores / 5
            first = ("a0.", "m0") if model.config.parallel else ("a0.",)
            alone = torch.tensor([receiver.startswith(first) for receiver in model.graph.receiver_names])
            expected = (expected - inputs * alone) / len(task)
            assert float((inputs * alone).abs().max()) > 1e-3
        assert float((in_our_order(model.graph, graph.scores) - expected).abs().max()) <= 1e-12


def test_weights_are_shared_and_biases_that_have_no_place_are_refused_or_made():
    model = hooked(theirs("gemma2"), "gemma2")
    with torch.no_grad():
        model.get_submodule("blocks.1.mlp").b_in += 0.5  # which it adds behind the product
    found = tl.from_hooked_transformer(model)
    shared = {parameter.data_ptr() for parameter in model.parameters()}
    own = {name for name, tensor in found.weights.named() if tensor.data_ptr() not in shared}
    assert own == {"layers.0.b_qkv", "layers.1.b_qkv", "layers.1.b_out"}
    mlp = found.stages[-1].mlp.component
    units = torch.randn(4, 33, dtype=torch.float64)
    raw = model.get_submodule("blocks.1.mlp")
    torch.testing.assert_close(units @ mlp.w_out + mlp.b_out, (units + raw.b_in) @ raw.W_out + raw.b_out)
    before = eapcore.attribute(found, pairs()).scores
    with torch.no_grad():
        for name in ("attn.b_Q", "mlp.b_in"):  # what was gathered or made follows what it is made of
            model.get_parameter(f"blocks.1.{name}").add_(0.5)
    again = eapcore.attribute(tl.from_hooked_transformer(model), pairs()).scores
    assert torch.equal(eapcore.attribute(found, pairs()).scores, again) and not torch.equal(again, before)
    with torch.no_grad():
        model.get_submodule("blocks.0.attn").b_O += 1
    with pytest.raises(ValueError, match=r"attn\.b_O in front of the norm .* fold_value_biases=False"):
        tl.from_hooked_transformer(model)
