"""The adapters keep their promises to other tools, against what those tools made (tests/interop/make_fixtures.py)."""

from __future__ import annotations

import copy
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from models import ROOT, SHARED, gpt2, random_case, random_scores
from refusal import refused
from safetensors.torch import load_file
from torch import Tensor, nn

from eapcore import attribute
from eapcore.graph.circuit import Circuit
from eapcore.graph.graph import Graph
from eapcore.graph.scores import EdgeScores
from eapcore.interop import acdc_files, auto_circuit, eap_ig
from eapcore.interop import transformer_lens as tl
from eapcore.interop.eap_ig import names
from eapcore.interop.transformers import from_gpt2
from eapcore.models.forward import forward
from eapcore.models.model import Model
from eapcore.tasks import PromptPairs

ATTRIBUTE = importlib.import_module("eapcore.interop.eap_ig.attribute")  # the package hands on the function
FIXTURES = Path(__file__).parent / "fixtures"
KINDS = ("gpt2-like", "attn-only")
LIKE_THE_PACKAGE = {
    "eap": {"method": "EAP"},
    "eap_ig_inputs_3": {"method": "EAP-IG-inputs", "ig_steps": 3},
    "clean_corrupted": {"method": "clean-corrupted"},
    "zero": {"method": "EAP", "intervention": "zero"},
    "mean": {"method": "EAP", "intervention": "mean"},
    "eap_mean_over_d_model": {"method": "EAP", "aggregation": "mean"},
    "eap_ig_activations_2": {"method": "EAP-IG-activations", "ig_steps": 2},
    "eap_ig_activations_zero": {"method": "EAP-IG-activations", "ig_steps": 2, "intervention": "zero"},
}


class HookedTransformer(nn.Module):
    """What the adapter sees of a HookedTransformer: its cfg, its parameters by name, and its tokens of known texts."""

    def __init__(self, cfg: dict, weights: dict[str, Tensor], texts: dict[tuple[str, ...], Tensor]) -> None:
        super().__init__()
        self.cfg = SimpleNamespace(**cfg)
        self.tokenizer = SimpleNamespace(padding_side="right", pad_token_id=0)
        self.texts = texts
        for name, tensor in weights.items():
            *parents, leaf = name.split(".")
            module = self
            for parent in parents:
                if not hasattr(module, parent):
                    module.add_module(parent, nn.Module())
                module = getattr(module, parent)
            module.register_parameter(leaf, nn.Parameter(tensor.clone()))

    def to_tokens(self, texts: list[str], *, prepend_bos: bool, padding_side: str, truncate: bool) -> Tensor:
        assert (prepend_bos, padding_side, truncate) == (True, "right", False)
        return self.texts[tuple(texts)]


class Fixture:
    def __init__(self, kind: str) -> None:
        self.folder = FIXTURES / kind
        self.case = load_file(self.folder / "case.safetensors")
        self.names = json.loads((self.folder / "case.json").read_text())
        self.texts = {}
        for i, (clean, corrupt) in enumerate(self.names["texts"]):
            self.texts |= {tuple(clean): self.case[f"clean_{i}"], tuple(corrupt): self.case[f"corrupt_{i}"]}
        self.batches = [(*texts, self.case[f"label_{i}"]) for i, texts in enumerate(self.names["texts"])]

    def under(self, prefix: str) -> dict[str, Tensor]:
        return {name[len(prefix) :]: t for name, t in self.case.items() if name.startswith(prefix)}

    def hooked(self, dtype: torch.dtype = torch.float64, **changes: object) -> HookedTransformer:
        weights = {name: tensor.to(dtype) for name, tensor in self.under("weights.").items()}
        return HookedTransformer(self.names["cfg"] | changes, weights, self.texts)

    def folded(self) -> HookedTransformer:
        cfg = self.names["cfg"] | {"normalization_type": self.names["folded_normalization"]}
        return HookedTransformer(cfg, self.under("folded."), self.texts)

    def graph(self) -> SimpleNamespace:
        """What the adapter sees of EAP-IG's Graph."""
        cfg = {name: self.names["cfg"][name] for name in ("n_layers", "n_heads", "d_model", "parallel_attn_mlp")}
        return SimpleNamespace(cfg=cfg, scores=torch.zeros_like(self.case["eap_ig.eap"]))

    def pairs(self) -> PromptPairs:
        answer = self.case["answer"].tolist()
        prompts = (self.case["prompts"].tolist(), self.case["other"].tolist())
        return PromptPairs.from_lists(*prompts, [a for a, _ in answer], [b for _, b in answer])


@pytest.fixture(scope="module", params=KINDS)
def fixture(request):
    return Fixture(request.param)


def per_pair(logits, clean_logits, input_lengths, label):
    last = logits[torch.arange(len(logits)), input_lengths - 1]
    return (last.gather(1, label[:, :1]) - last.gather(1, label[:, 1:])).squeeze(1)


def logit_diff(*args):
    return per_pair(*args).mean()


# TransformerLens


def test_a_hooked_transformer_gives_the_same_logits(fixture):
    for hooked, key in ((fixture.hooked(), "logits"), (fixture.folded(), "folded_logits")):
        model = tl.from_hooked_transformer(hooked)
        assert float((forward(model, fixture.case["prompts"]) - fixture.case[key]).abs().max()) <= 1e-10
    assert fixture.names["folded_normalization"] == "LNPre"
    single = tl.from_hooked_transformer(fixture.hooked(torch.float32))
    assert float((forward(single, fixture.case["prompts"]) - fixture.case["logits"]).abs().max()) <= 1e-5


def test_a_hooked_transformer_shares_its_weights(fixture):
    hooked = fixture.hooked()
    model = tl.from_hooked_transformer(hooked)
    theirs = {parameter.data_ptr() for parameter in hooked.parameters()}
    own = {name for name, tensor in model.weights.named() if tensor.data_ptr() not in theirs}
    assert own == {f"layers.{layer}.b_qkv" for layer in range(model.config.n_layers)}
    before = forward(model, fixture.case["prompts"])
    with torch.no_grad():
        hooked.blocks.get_submodule("0").attn.W_V += 1
    assert not torch.allclose(forward(model, fixture.case["prompts"]), before)


@pytest.mark.parametrize(("changes", "named"), [
    ({"positional_embedding_type": "alibi"}, "positional_embedding_type 'alibi'"),
    ({"positional_embedding_type": "shortformer"}, "'shortformer'"),
    ({"normalization_type": "BN"}, "normalization_type 'BN'"),
    ({"final_rms": True}, "final_rms True"),
    ({"use_normalization_before_and_after": True}, "use_normalization_before_and_after True"),
    ({"post_embedding_ln": True}, "post_embedding_ln True"),
    ({"attention_dir": "bidirectional"}, "attention_dir 'bidirectional'"),
    ({"use_local_attn": True, "window_size": 3, "attn_types": ["global", "banded"]}, "attn_types of the configuration"),
    ({"use_local_attn": True, "window_size": 3}, "attn_types of the configuration"),
    ({"num_experts": 4}, "num_experts 4"),
    ({"load_in_4bit": True}, "load_in_4bit True"),
    ({"n_devices": 2}, "n_devices 2"),
    ({"clip_qkv": 8.0}, "clip_qkv 8.0"),
    ({"use_yarn_rope": True}, "use_yarn_rope True"),
    ({"use_attention_sinks": True}, "use_attention_sinks True"),
    ({"original_architecture": "Olmo2ForCausalLM"}, "normalization_type 'LN'"),
    ({"positional_embedding_type": "rotary", "rotary_dim": 3}, "rotary_dim of the configuration must be even"),
    ({"act_fn": "solu_ln"}, "act_fn 'solu_ln'"),
    ({"n_key_value_heads": 1}, r"lacks blocks\.0\.attn\._W_K"),
    ({"d_vocab_out": 7}, r"unembed\.W_U must be"),
])  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(changes, named):
    refused(named, tl.from_hooked_transformer, Fixture("gpt2-like").hooked(**changes))


def _buffer(name, make):
    def change(hooked):
        *parents, leaf = name.split(".")
        hooked.get_submodule(".".join(parents)).register_buffer(leaf, make())

    return change


def _field(module, field, value):
    return lambda hooked: setattr(hooked.get_submodule(module), field, value)


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


@pytest.mark.parametrize(("change", "named"), [
    (_field("blocks.1.ln1", "eps", 1e-3), r"at blocks\.1\.ln1 eps 0\.001, but its configuration says 1e-05"),
    (_field("blocks.0.mlp", "act_fn", torch.tanh), r"at blocks\.0\.mlp the activation tanh, .* says gelu_new"),
    (_field("blocks.0.attn", "attn_scale", 3.0), r"at blocks\.0\.attn attn_scale 3, .* says 2\.82843"),
    (_field("blocks.1.mlp", "forward", lambda x: x), r"at blocks\.1\.mlp a replaced forward"),
    (lambda hooked: hooked.get_submodule("blocks.0").add_module("hook_mlp_out", Doubled()),
        r"at blocks\.0\.hook_mlp_out a Doubled whose forward comes from test_interop"),
    (lambda hooked: hooked.get_submodule("blocks.1").add_module("ln1", nn.Identity()),
        r"at blocks\.1\.ln1 the norm Identity, .* says LayerNorm"),
    (_buffer("blocks.1.attn.mask", lambda: torch.ones(16, 16, dtype=torch.bool)), "mask that hides other keys"),
    (_buffer("blocks.1.attn.mask", lambda: torch.ones(16, 16).tril().triu(-3).bool()), "mask that hides other keys"),
    (_buffer("blocks.1.attn.IGNORE", lambda: torch.tensor(-10.0)), r"IGNORE -10, .* says -inf"),
    (_buffer("blocks.1.attn.rotary_cos", lambda: torch.ones(16, 4)), "rotary_cos with other angles"),
])  # fmt: skip
def test_a_hooked_transformer_that_computes_something_else_is_refused(change, named):
    hooked = Fixture("gpt2-like").hooked()
    for field, value in (("mlp.act_fn", nn.functional.gelu), ("attn.attn_scale", 8**0.5), ("ln1.eps", 1e-5)):
        part, _, leaf = field.partition(".")
        own = (lambda x: nn.functional.gelu(x, approximate="tanh")) if leaf == "act_fn" else value
        _field(f"blocks.0.{part}", leaf, own)(hooked)
    _buffer("blocks.0.attn.mask", lambda: torch.ones(16, 16).tril().bool())(hooked)
    tl.from_hooked_transformer(hooked)
    change(hooked)
    refused(named, tl.from_hooked_transformer, hooked)


def test_hooks_several_devices_and_other_modules_are_refused():
    fixture = Fixture("gpt2-like")
    hooked = fixture.hooked()
    handle = hooked.blocks.get_submodule("1").attn.register_forward_hook(lambda *_: None)
    refused(r"forward hook at blocks\.1\.attn, which could change .* the handle", tl.from_hooked_transformer, hooked)
    hooked.reset_hooks = lambda including_permanent: None
    refused(r"model\.reset_hooks\(including_permanent=True\)", tl.from_hooked_transformer, hooked)
    handle.remove()
    everywhere = nn.modules.module.register_module_forward_hook(lambda *_: None)
    refused("torch has a global forward hook", tl.from_hooked_transformer, hooked)
    everywhere.remove()
    hooked.blocks.get_submodule("0").register_full_backward_hook(lambda *_: None)
    refused(r"backward hook at blocks\.0,", tl.from_hooked_transformer, hooked)
    split = fixture.hooked()
    split.unembed.to("meta")
    refused("unembed.W_U of HookedTransformer is on the meta device", tl.from_hooked_transformer, split)
    refused(
        "expected a HookedTransformer or a TransformerBridge .*, got a Linear",
        tl.from_hooked_transformer,
        nn.Linear(2, 2),
    )


@pytest.mark.parametrize("has_mlp", [True, False])
def test_hook_names_go_both_ways(has_mlp):
    graph = Graph(12, 12, has_mlp)
    for name in graph.sender_names:
        hook = tl.sender_hook(graph, name)
        assert tl.sender_of_hook(graph, hook) == name
        assert tl.sender_of_hook(graph, hook.replace("[", "[:, :, ")) == name
    for name in graph.receiver_names:
        assert tl.receiver_of_hook(graph, tl.receiver_hook(graph, name)) == name
    assert tl.sender_hook(graph, "a3.h7") == "blocks.3.attn.hook_result[7]"
    assert tl.receiver_hook(graph, "a5.h2<q>") == "blocks.5.hook_q_input[2]"
    assert tl.sender_of_hook(graph, "blocks.0.hook_resid_pre[:]") == "embed"
    assert tl.receiver_hook(graph, "logits") == "blocks.11.hook_resid_post"
    if has_mlp:
        assert tl.receiver_of_hook(graph, "blocks.4.hook_mlp_in") == "m4"
    grouped = Graph(2, 6, has_mlp, n_kv=2)
    for name in grouped.receiver_names:
        assert tl.receiver_of_hook(grouped, tl.receiver_hook(grouped, name)) == name
    assert tl.receiver_hook(grouped, "a1.kv1<v>") == "blocks.1.hook_v_input[1]"
    for wrong in ("hook_pos_embed", "blocks.3.attn.hook_z[1]", "blocks.3.attn.hook_result", "blocks.12.hook_mlp_out"):
        refused("a sender", tl.sender_of_hook, graph, wrong)
    for wrong in ("blocks.3.hook_attn_in[1]", "blocks.3.hook_resid_post", "blocks.5.hook_q_input[12]"):
        refused("a receiver", tl.receiver_of_hook, graph, wrong)


# EAP-IG


def test_tokens_and_lengths_are_the_package_s(fixture):
    hooked = fixture.hooked()
    model = tl.from_hooked_transformer(hooked)
    for i, (clean, _, _) in enumerate(fixture.batches):
        tokens, lengths = ATTRIBUTE.tokenize(model, hooked, clean, "clean prompts")
        assert torch.equal(tokens, fixture.case[f"clean_{i}"])
        assert torch.equal(lengths, fixture.case[f"lengths_{i}"])
    assert int(fixture.case["lengths_0"].min()) < fixture.case["clean_0"].shape[1]  # there is padding


@pytest.mark.parametrize("name", LIKE_THE_PACKAGE)
def test_verbatim_scores_are_the_package_s_to_the_letter(fixture, name):
    graph, options = fixture.graph(), LIKE_THE_PACKAGE[name]
    mean = {"intervention_dataloader": fixture.batches} if name == "mean" else {}
    eap_ig.attribute(fixture.hooked(), graph, fixture.batches, logit_diff, quiet=True, verbatim=True, **options, **mean)
    expected = fixture.case[f"eap_ig.{name}"]
    if name == "mean":  # which it also adds to the rows of MLPs that an attention-only model has not
        real = Graph(2, 2, not fixture.names["cfg"]["attn_only"])
        expected = eap_ig.in_their_order(real, expected[names._places(real, expected.device)])
    error = float((graph.scores - expected).abs().max())
    print(f"{name}: largest difference {error:.1e} of {float(expected.abs().max()):.2f}")
    assert error <= 1e-10 and float(expected.abs().max()) > 1e-3


def test_the_mean_at_every_position_is_the_package_s(fixture):
    label, graph = fixture.case["label_0"], fixture.graph()
    hooked = fixture.hooked()
    pair = [hooked.texts[tuple(texts)][1:2, :6] for texts in fixture.names["texts"][0]]  # "a dog hears a bird | fish"
    batches = [(torch.cat(pair), torch.cat(pair[::-1]), label[1:2].repeat(2, 1))]
    eap_ig.attribute(
        hooked, graph, batches, logit_diff, "EAP", "mean-positional", quiet=True, verbatim=True,
        intervention_dataloader=batches,
    )  # fmt: skip
    assert float((graph.scores - fixture.case["eap_ig.mean_positional"]).abs().max()) <= 1e-10
    longer = [(["x"], ["y"], label[:1])]
    hooked.texts = {("x",): fixture.case["clean_0"][:1], ("y",): fixture.case["corrupt_0"][:1]}
    with pytest.raises(ValueError, match="as long as those that were averaged, 6 tokens, got"):
        eap_ig.attribute(
            hooked, graph, longer, logit_diff, "EAP", "mean-positional", quiet=True, intervention_dataloader=batches
        )


def test_without_verbatim_each_pair_counts_the_same(fixture):
    hooked = fixture.hooked()
    scores = []
    for batches, metric in (
        (fixture.batches, logit_diff),
        (fixture.batches, per_pair),
        ([(clean[i : i + 1], corrupt[i : i + 1], label[i : i + 1]) for clean, corrupt, label in fixture.batches
          for i in range(len(clean))], logit_diff),
    ):  # fmt: skip
        graph = fixture.graph()
        hooked.texts |= {(c,): row[None] for t, rows in fixture.texts.items() for c, row in zip(t, rows, strict=True)}
        eap_ig.attribute(hooked, graph, batches, metric, "EAP", quiet=True)
        scores.append(graph.scores)
    # In batches of 3 and 2 the package gives each pair 1/3 and 1/2 of its weight.
    assert float((scores[0] - scores[1]).abs().max()) <= 1e-12
    assert float((scores[0] - scores[2]).abs().max()) <= 1e-12
    assert float((scores[0] - fixture.case["eap_ig.eap"]).abs().max()) > 1e-3


@pytest.mark.parametrize(("method", "options"), [("EAP", {}), ("EAP-IG-inputs", {"ig_steps": 4})])
def test_the_drop_in_agrees_with_attribute(fixture, method, options):
    model, pairs, graph = tl.from_hooked_transformer(fixture.hooked()), fixture.pairs(), fixture.graph()
    own = {"EAP": {}, "EAP-IG-inputs": {"method": "eap-ig", "steps": 4, "points": "left"}}[method]
    expected = attribute(model, pairs, "logit_diff", **own)
    batches = [(fixture.case["prompts"], fixture.case["other"], fixture.case["answer"])]
    found = eap_ig.attribute(model, graph, batches, logit_diff, method, quiet=True, **options)
    assert float((found.scores - expected.scores).abs().max()) <= 1e-12
    assert torch.equal(eap_ig.in_our_order(found.graph, graph.scores), found.scores)
    # With a shared prefix, and with a metric that reads several positions.
    other = fixture.case["other"].clone()
    other[:, :3] = fixture.case["prompts"][:, :3]
    batches = [(fixture.case["prompts"], other, fixture.case["answer"])]
    shifted = attribute(model, (fixture.case["prompts"], other), lambda logits: logits[:, 5] - logits[:, 6], **own)
    last = eap_ig.attribute(
        model, graph, batches, lambda logits, *_: (logits[:, -1, 5] - logits[:, -1, 6]).mean(), method, quiet=True,
        **options,
    )  # fmt: skip
    assert float((last.scores - shifted.scores).abs().max()) <= 1e-12
    everywhere, total = fixture.graph(), 0
    eap_ig.attribute(
        model, everywhere, batches, lambda logits, *_: logits[:, :, 5].sum(1).mean(), method, quiet=True, **options
    )
    for t in range(other.shape[1]):
        one = fixture.graph()
        read = [(fixture.case["prompts"], other, t)]
        eap_ig.attribute(
            model, one, read, lambda logits, c, n, t: logits[:, t, 5].mean(), method, quiet=True, **options
        )
        total = total + one.scores
    assert float((everywhere.scores - total).abs().max()) <= 1e-11


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        (logit_diff, [[2], [4], [3]]),
        (lambda logits, *_: logits[:, :2, 3].sum(), [[0, 1]] * 3),
        (lambda logits, clean, n, _: (logits[:, 1, 3] - clean[:, 1, 3]).sum(), [[1]] * 3),
        (lambda logits, *_: logits[0, 1, 3] + logits[1, 0, 2], None),  # not of every pair
        (lambda logits, clean, n, _: (logits[:, 1, 3] - clean[:, 0, 3]).sum(), None),
        (lambda logits, *_: (logits[:, 1, 3] * logits[:, 0, 3].detach()).sum(), None),
        (lambda logits, *_: logits[:, 0, 3].sum() + 0 * logits[:, 1, 3].sum(), None),
        (lambda logits, *_: logits[:, 0, 3].sum() / 0, None),
    ],
    ids=["last", "two", "clean", "some pairs", "other clean", "detached", "zero", "infinite"],
)
def test_a_metric_is_asked_where_it_reads(metric, expected):
    pairs = PromptPairs.from_lists([[1, 2, 3], [1, 2, 3, 4, 5], [1, 2, 3, 4]], None, [1, 2, 3])
    like, label = torch.empty(3, 5, 7, dtype=torch.float64), torch.tensor([[1, 2], [3, 4], [5, 6]])
    found = ATTRIBUTE._reads(metric, pairs, label, like)
    assert found is None if expected is None else found.tolist() == expected


def test_float32_scores_keep_float32_s_accuracy(fixture):
    graph = fixture.graph()
    eap_ig.attribute(
        fixture.hooked(torch.float32), graph, fixture.batches, logit_diff, "EAP", quiet=True, verbatim=True
    )
    expected = fixture.case["eap_ig.eap"]
    assert float((graph.scores - expected).norm() / expected.norm()) <= 1e-4


def test_the_reference_data_is_met_through_the_adapter():
    folder = SHARED / "eap-reference"
    if not folder.is_dir():
        pytest.skip("the reference data is not beside this checkout")
    for kind in KINDS:
        names = json.loads((folder / kind / "names.json").read_text())
        case, weights = (load_file(folder / kind / f"{part}.safetensors") for part in ("case", "weights"))
        hooked = HookedTransformer(names["cfg"], weights, {})
        cfg = {name: names["cfg"][name] for name in ("n_layers", "n_heads", "d_model")}
        graph = SimpleNamespace(cfg=cfg, scores=torch.zeros_like(case["eap"]))
        batches = [(case["clean"][i : i + 3], case["corrupt"][i : i + 3], case["answer"][i : i + 3]) for i in (0, 3)]
        for key, options in (
            ("eap", {"method": "EAP"}),
            ("eap_ig_inputs_5", {"method": "EAP-IG-inputs", "ig_steps": 5}),
            ("clean_corrupt", {"method": "clean-corrupted"}),
        ):
            eap_ig.attribute(hooked, graph, batches, logit_diff, quiet=True, **options)
            assert float((graph.scores - case[key]).abs().max()) <= 1e-10


def declined(match, *, graph=None, batches=None, metric=logit_diff, model=None, **options):
    fixture, how = Fixture("gpt2-like"), {"method": "EAP", "quiet": True} | options
    given = fixture.batches if batches is None else batches
    target = fixture.graph() if graph is None else graph
    refused(match, eap_ig.attribute, fixture.hooked() if model is None else model, target, given, metric, **how)


def test_bad_input_to_the_drop_in_is_refused_in_one_sentence():
    fixture = Fixture("gpt2-like")
    label = fixture.case["label_0"]
    declined("method must be one of EAP, .*, EAP-IG-activations, got 'exact'", method="exact")
    declined("intervention must be one of", intervention="resample")
    declined("must be 'patching' for clean-corrupted", method="clean-corrupted", intervention="zero")
    declined("give intervention_dataloader", intervention="mean")
    declined("optimal ablations are not supported", optimal_ablation_path="oa.pt")
    declined("needs ig_steps, a positive integer, got None", method="EAP-IG-inputs")
    declined("aggregation must be one of sum, mean", aggregation="max")
    declined("the dataloader is empty", batches=[])
    declined("must be EAP-IG's Graph", graph=SimpleNamespace(scores=1))
    other = fixture.graph()
    other.cfg = other.cfg | {"n_heads": 4}
    declined("the graph is of another model: expected .*'n_heads': 2.*got .*'n_heads': 4", graph=other)
    other.cfg = fixture.graph().cfg | {"parallel_attn_mlp": True}
    declined("the graph is of another model: .*'parallel_attn_mlp': False.* got .*True", graph=other)
    short, long = torch.tensor([[3, 4, 5]]), torch.tensor([[3, 4, 5, 6]])
    declined("same number and length", batches=[(short, long, label)])
    declined("clean prompts must be a tensor of tokens .* got list", batches=[([1, 2], [3, 4], label)])
    declined("token id 99", batches=[(short + 94, short, label)])
    declined("NaN or infinite", metric=lambda logits, *_: logits.sum() * float("nan"))
    declined("no gradient", metric=lambda logits, *_: logits.detach().mean())
    declined("its mean over the batch, or one value a pair", metric=lambda logits, *_: logits[:, 0])
    declined("behind the end of a prompt", metric=lambda logits, *_: logits[:, -1].mean())
    left = fixture.hooked()
    left.tokenizer.padding_side = "left"
    declined("pads on the left", model=left)
    declined("no tokenizer: give tokens", model=tl.from_hooked_transformer(fixture.hooked()))
    empty = fixture.hooked()
    empty.texts = {("",): torch.zeros(1, 3, dtype=torch.int64), ("a",): torch.ones(1, 3, dtype=torch.int64)}
    declined("nothing but padding", model=empty, batches=[([""], ["a"], label)])
    declined(
        "would average padding", intervention="mean-positional", intervention_dataloader=Fixture("gpt2-like").batches
    )


# Its files, and MIB's


@pytest.mark.parametrize("suffix", [".json", ".pt"])
def test_the_package_s_graph_files_are_read(fixture, suffix):
    attn_only = fixture.names["cfg"]["attn_only"]
    found = eap_ig.GraphFile.load(fixture.folder / f"eap{suffix}", attn_only=attn_only)
    graph = Graph(2, 2, not attn_only)
    assert found.circuit.graph == graph and found.d_model == 16
    assert torch.equal(found.scores.scores, eap_ig.in_our_order(graph, fixture.case["eap_ig.eap"]))
    assert torch.equal(found.circuit.mask, eap_ig.in_our_order(graph, fixture.case["eap_ig.eap_top_20"]).bool())
    assert 0 < found.circuit.n_edges <= 20
    edges = eap_ig.in_our_order(
        graph, fixture.case["eap_ig.edge_mask"] * eap_ig.in_their_order(graph, graph.edge_mask())
    )
    assert torch.equal(edges.bool(), graph.edge_mask())


@pytest.mark.parametrize("suffix", [".json", ".pt"])
def test_graph_files_are_written_as_the_package_writes_them(fixture, tmp_path, suffix):
    attn_only = fixture.names["cfg"]["attn_only"]
    source = fixture.folder / f"eap{suffix}"
    eap_ig.GraphFile.load(source, attn_only=attn_only).save(tmp_path / f"again{suffix}")
    if suffix == ".json":
        ours, theirs = (json.loads(path.read_text()) for path in (tmp_path / "again.json", source))
        assert ours.pop("eapcore")["sign_of_source"] is None
        assert ours == theirs
        assert list(ours["edges"]) == list(theirs["edges"]) and list(ours["nodes"]) == list(theirs["nodes"])
        return
    ours, theirs = (torch.load(path, weights_only=True) for path in (tmp_path / "again.pt", source))
    assert ours.pop("eapcore")["sign_of_source"] is None
    assert set(ours) == set(theirs) and ours["cfg"] == theirs["cfg"]
    for name, value in theirs.items():
        assert torch.equal(ours[name], value) if isinstance(value, Tensor) else ours[name] == value


def test_a_circuit_s_nodes_are_those_that_the_package_keeps(fixture):
    graph = Graph(2, 2, not fixture.names["cfg"]["attn_only"])
    mask = eap_ig.in_our_order(graph, fixture.case["eap_ig.eap_top_20"]).bool()
    scores = EdgeScores(eap_ig.in_our_order(graph, fixture.case["eap_ig.eap"]), graph)
    file = eap_ig.GraphFile.of(scores, 16, Circuit(mask, graph))
    rows = names._places(graph, torch.device("cpu"))[0].squeeze(1)
    assert torch.equal(file._nodes(), fixture.case["eap_ig.eap_nodes"][rows].bool())


@pytest.mark.parametrize("suffix", [".json", ".pt"])
def test_node_and_neuron_scores_survive_a_round_trip(tmp_path, suffix):
    graph = Graph(2, 3, True)
    scores = random_scores(graph)
    node_scores = torch.randn(graph.n_senders).double()
    neuron_scores = torch.randn(graph.n_senders, 4).double()
    file = eap_ig.GraphFile(
        scores.top_n(10), 4, scores, node_scores=node_scores, neurons=neuron_scores > 0, neuron_scores=neuron_scores
    )
    file.save(tmp_path / f"graph{suffix}", sign="metric")
    again = eap_ig.GraphFile.load(tmp_path / f"graph{suffix}")
    assert torch.equal(again.scores.scores, scores.scores) and torch.equal(again.circuit.mask, file.circuit.mask)
    assert torch.equal(again.node_scores, node_scores) and torch.equal(again.neuron_scores, neuron_scores)
    assert torch.equal(again.neurons, neuron_scores > 0)


def test_damaged_graph_files_are_refused_by_name(tmp_path, fixture):
    content = json.loads((fixture.folder / "eap.json").read_text())
    changes = {
        "no cfg": lambda c: c.pop("cfg"),
        "'a9.h0->logits'|a sender is": lambda c: c["edges"].update({"a9.h0->logits": {"score": 1, "in_graph": True}}),
        "is no edge: a0.h0 does not come before m0|'a0.h0->": lambda c: c["cfg"].update(parallel_attn_mlp=True),
        "node 'm7'": lambda c: c["nodes"].update(m7={"in_graph": True}),
    }
    for match, change in changes.items():
        damaged = copy.deepcopy(content)
        change(damaged)
        (tmp_path / "graph.json").write_text(json.dumps(damaged))
        with pytest.raises(ValueError, match=f"must be a graph file of EAP-IG.*({match.replace('no cfg', 'no .cfg')})"):
            eap_ig.GraphFile.load(tmp_path / "graph.json")
    torch.save({"cfg": content["cfg"], "src_nodes": ["x"], "dst_nodes": []}, tmp_path / "graph.pt")
    refused("not those of its cfg", eap_ig.GraphFile.load, tmp_path / "graph.pt")
    (tmp_path / "graph.pt").write_bytes((fixture.folder / "eap.pt").read_bytes()[:500])
    refused(r"graph\.pt must be a graph file", eap_ig.GraphFile.load, tmp_path / "graph.pt")
    refused(r"must end in \.json or \.pt, got 'graph\.csv'", eap_ig.GraphFile.load, tmp_path / "graph.csv")
    with pytest.raises(FileNotFoundError):
        eap_ig.GraphFile.load(tmp_path / "none.json")
    mlps = json.loads((FIXTURES / "gpt2-like" / "eap.json").read_text())
    (tmp_path / "graph.json").write_text(json.dumps(mlps))
    refused("the graph is attention-only", eap_ig.GraphFile.load, tmp_path / "graph.json", attn_only=True)


def test_mib_files_have_its_names_sizes_and_no_scores(tmp_path):
    graph = Graph(6, 6, True)
    scores = random_scores(graph)
    paths = eap_ig.save_mib_circuits(tmp_path / "ioi_gpt2", scores, d_model=12)
    assert [path.name for path in paths] == [f"{p}.json" for p in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)]
    for path in paths:
        content = json.loads(path.read_text())
        assert all(set(edge) == {"in_graph"} for edge in content["edges"].values())
        again = eap_ig.GraphFile.load(path)
        assert again.scores is None
        assert again.circuit.n_edges <= graph.n_edges * float(path.stem) / 100
    assert again.circuit.n_edges > graph.n_edges * 0.4
    path = eap_ig.mib_path(tmp_path, "EAP", "patching", "edge", "arc_easy", "gpt2", suffix=".pt")
    assert path.relative_to(tmp_path).as_posix() == "EAP_patching_edge/arc-easy_gpt2/importances.pt"
    path.parent.mkdir(parents=True)
    eap_ig.GraphFile.of(scores, 12).save(path, sign="loss")
    assert torch.equal(eap_ig.GraphFile.load(path).scores.scores, scores.scores)
    assert torch.equal(eap_ig.in_our_order(graph, torch.load(path)["edges_scores"]), -scores.scores)


# auto-circuit, ACDC and acdcpp


@pytest.mark.parametrize("reduce", ["all", "position"])
def test_prune_scores_are_auto_circuit_s(fixture, reduce):
    by_position = reduce == "position"
    expected = fixture.under("prune_scores_by_position." if by_position else "prune_scores.")
    model = tl.from_hooked_transformer(fixture.hooked())
    scores = attribute(model, fixture.pairs(), "logit_diff", reduce=reduce)
    found = auto_circuit.to_prune_scores(scores, per_position=by_position)
    assert set(found) == set(expected)
    for module, tensor in expected.items():
        assert found[module].shape == tensor.shape
        assert float((found[module] - tensor).abs().max()) <= 1e-10
    again = auto_circuit.from_prune_scores(expected, model.graph)
    assert float((again.scores - scores.scores).abs().max()) <= 1e-10
    assert (again.per_position is not None) == by_position
    assert torch.equal(auto_circuit.from_prune_scores(found, model.graph).scores * 2, auto_circuit.from_prune_scores(
        {module: tensor * 2 for module, tensor in found.items()}, model.graph).scores)  # fmt: skip
    halved = auto_circuit.from_prune_scores(auto_circuit.to_prune_scores(scores, n_batches=2), model.graph)
    assert torch.allclose(halved.scores, 2 * scores.scores)


def test_prune_scores_of_another_model_are_refused(fixture):
    graph = Graph(2, 2, not fixture.names["cfg"]["attn_only"])
    scores = fixture.under("prune_scores.")
    with pytest.raises(ValueError, match=r"lack blocks\.2\.hook_k_input: are they of another model"):
        auto_circuit.from_prune_scores(scores, Graph(3, 2, graph.has_mlp))
    with pytest.raises(ValueError, match=r"blocks\.0\.hook_q_input must be \[3, 1\].* got \[2, 1\]"):
        auto_circuit.from_prune_scores(scores, Graph(2, 3, graph.has_mlp))
    with pytest.raises(ValueError, match="not kept by position"):
        auto_circuit.to_prune_scores(EdgeScores(graph.edge_mask().double(), graph), per_position=True)


def test_auto_circuit_s_edge_names_go_both_ways():
    graph = Graph(2, 2, True)
    names = graph.edge_mask().nonzero().tolist()
    for s, r in names:
        name = graph.edge_name(s, r)
        assert auto_circuit.edge_from_auto_circuit(graph, auto_circuit.edge_to_auto_circuit(graph, name)) == name
    assert auto_circuit.edge_to_auto_circuit(graph, "embed->a1.h0<v>") == "Resid Start->A1.0.V"
    assert auto_circuit.edge_from_auto_circuit(graph, "MLP 1->Resid End") == "m1->logits"
    for wrong in ("MLP 1->A0.0.Q", "A0.0", "A0.0->Q1", "A0.9->MLP 1"):
        with pytest.raises(ValueError):
            auto_circuit.edge_from_auto_circuit(graph, wrong)


@pytest.mark.parametrize("form", acdc_files.FORMS)
@pytest.mark.parametrize("has_mlp", [True, False])
def test_acdc_s_edge_json_survives_a_round_trip(tmp_path, form, has_mlp):
    graph = Graph(2, 12, has_mlp)
    scores = random_scores(graph)
    acdc_files.save_edges(tmp_path / "all.json", scores, form=form)
    circuit, again = acdc_files.load_edges(tmp_path / "all.json", graph)
    assert torch.equal(again.scores, scores.scores) and torch.equal(circuit.mask, graph.edge_mask())
    chosen = scores.top_n(25)
    acdc_files.save_edges(tmp_path / "some.json", scores, chosen, form=form)
    circuit, again = acdc_files.load_edges(tmp_path / "some.json", graph)
    assert torch.equal(circuit.mask, chosen.mask) and torch.equal(again.scores, scores.scores * chosen.mask)


def test_the_files_that_acdc_and_acdcpp_write_are_read(tmp_path):
    graph, path = Graph(2, 2, True), tmp_path / "edges.json"
    embed, head, q = "blocks.0.hook_resid_pre", "blocks.0.attn.hook_result", "blocks.1.hook_q_input"
    rows = [
        [head, "[None, None, 1]", q, "[None, None, 0]", 0.5],  # acdcpp's scores: sender first
        ["blocks.1.hook_resid_post", "[None]", embed, "[None]", -0.25],  # its lists of what is left: receiver first
        [q, "[None, None, 0]", "blocks.1.attn.hook_q", "[None, None, 0]", 0.125],  # inside a head
        ["blocks.0.hook_mlp_out", "[None]", "blocks.1.hook_mlp_in", "[None]", None],
    ]
    path.write_text(json.dumps(rows))
    circuit, scores = acdc_files.load_edges(path, graph)
    assert set(circuit.edges) == {"a0.h1->a1.h0<q>", "embed->logits", "m0->m1"}
    assert [scores[edge] for edge in ("a0.h1->a1.h0<q>", "embed->logits", "m0->m1")] == [-0.5, 0.25, 0.0]
    path.write_text(json.dumps({"0.1": {"0.05": rows[:1], "0.2": []}}))
    assert acdc_files.load_edges(path, graph, thresholds=("0.1", "0.05"))[0].edges == ["a0.h1->a1.h0<q>"]
    refused(r"for the thresholds \[\('0.1', '0.05'\), \('0.1', '0.2'\)\]", acdc_files.load_edges, path, graph)
    path.write_text(json.dumps({"data": [{"text": [f"{head}[:, :, 1] to {q}[:, :, 0]"], "y": [2.0]}]}))
    assert acdc_files.load_edges(path, graph)[1]["a0.h1->a1.h0<q>"] == -2.0
    named = {
        f"{q}[:, :, 0]{head}[:, :, 1]": 0.5, f"blocks.1.hook_resid_post[:]{embed}[:]": -0.25,
        f"{head}[:, :, 1]blocks.0.attn.hook_q[:, :, 1]": 7.0, "blocks.1.attn.hook_q[:, :, 0]" + f"{q}[:, :, 0]": 7.0,
        "blocks.0.hook_mlp_out[:]blocks.0.hook_mlp_in[:]": 7.0,
    }  # fmt: skip
    path.write_text(json.dumps({"-10": named}))
    circuit, scores = acdc_files.load_edges(path, graph, sign="metric")
    assert set(circuit.edges) == {"a0.h1->a1.h0<q>", "embed->logits"} and scores["embed->logits"] == -0.25
    path.write_text(json.dumps({"-10": {}, "0.1": named}))
    refused("must be an edge JSON", acdc_files.load_edges, path, graph)
    path.write_text(json.dumps({"-10": dict.fromkeys(named, 1.0), "0.1": named}))
    refused(r"for the thresholds \['-10', '0.1'\]", acdc_files.load_edges, path, graph)
    assert acdc_files.load_edges(path, graph, thresholds=("0.1", ""), sign="loss")[1]["a0.h1->a1.h0<q>"] == -0.5
    for damaged in ("{", "[[1, 2]]", json.dumps([["hook_pos_embed", "[None]", q, "[None, None, 0]", 1]])):
        path.write_text(damaged)
        refused(r"edges\.json must be an edge JSON of ACDC or acdcpp", acdc_files.load_edges, path, graph)
    refused("form must be one of acdc, acdcpp", acdc_files.save_edges, path, scores, form="json")


# transformers


def test_a_gpt2_shares_its_weights_and_gives_its_logits():
    module = gpt2().double()
    model = from_gpt2(module)
    tokens = torch.randint(0, 29, (3, 7))
    with torch.no_grad():
        error = float((module(tokens, output_hidden_states=True).logits - forward(model, tokens)).abs().max())
    assert error <= 1e-10
    owned = {p.untyped_storage().data_ptr() for p in module.parameters()}
    assert {t.untyped_storage().data_ptr() for _, t in model.weights.named()} <= owned
    assert from_gpt2(module).device == module.device  # the hooks that transformers leaves behind do no harm
    module.transformer.h[1].register_forward_hook(lambda *_: None)
    refused(r"forward hook at transformer\.h\.1, which could change activations", from_gpt2, module)
    refused("expected a transformers GPT2LMHeadModel, got a GPT2Model", from_gpt2, module.transformer)


# Imports

OTHERS = (
    "transformer_lens", "transformers", "auto_circuit", "eap", "numpy.testing", "plotly", "datasets", "huggingface_hub",
    "triton",
)  # fmt: skip


def test_no_adapter_imports_another_tool():
    names = ["", ".acdc_files", ".auto_circuit", ".eap_ig", ".transformer_lens", ".transformers"]
    code = "import sys, importlib\nimport eapcore\n"
    code += "".join(f"importlib.import_module('eapcore.interop{name}')\n" for name in names)
    code += "for name in eapcore.__all__: getattr(eapcore, name)\n"
    code += f"print([name for name in {OTHERS} if name in sys.modules])"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr


def test_a_random_model_of_our_own_is_taken_by_the_drop_in():
    model, pairs = random_case([7, 7, 7], d_vocab=29)
    graph = SimpleNamespace(cfg={}, scores=torch.zeros(eap_ig.their_shape(model.graph), dtype=torch.float64))
    label = torch.stack([pairs.answers[:, 0], pairs.wrong[:, 0]], 1)
    eap_ig.attribute(model, graph, [(pairs.clean, pairs.corrupt, label)], logit_diff, "EAP", quiet=True)
    assert isinstance(model, Model) and torch.equal(graph.scores.ne(0) & ~model.graph.edge_mask(), graph.scores < -1e99)
