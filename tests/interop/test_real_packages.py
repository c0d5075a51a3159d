"""The adapters against the real packages: bash tests/interop/run.sh runs this with TransformerLens 2.16.1 and 3.9.0."""

from __future__ import annotations

import importlib.util
import os
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from refusal import refused

if os.environ.get("EAPCORE_INTEROP_REQUIRED"):
    import transformer_lens
else:
    transformer_lens = pytest.importorskip("transformer_lens")

from hooked_models import FAMILIES as OTHERS
from hooked_models import (
    FROM_3,
    PAIRS,
    ROTARY,
    config_fields,
    hooked_transformer,
    logit_diff,
    text_batches,
    word_tokenizer,
)
from hooked_scores import hooked_scores

from eapcore import attribute
from eapcore.graph.circuit import Circuit
from eapcore.graph.graph import Graph
from eapcore.graph.scores import EdgeScores
from eapcore.interop import auto_circuit, eap_ig
from eapcore.interop import transformer_lens as tl
from eapcore.interop.eap_ig.attribute import tokenize
from eapcore.interop.transformers import from_gpt2
from eapcore.models.forward import forward
from eapcore.tasks import PromptPairs

pytestmark = pytest.mark.filterwarnings("default")  # the packages warn of each other
FAMILIES = pytest.mark.parametrize("attn_only", [False, True], ids=["gpt2-like", "attn-only"])


def tokens(vocabulary, seed=1, shape=(5, 9)):
    return torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(seed))


def pairs_of(clean, corrupt, answer):
    lists = (clean.tolist(), corrupt.tolist(), answer[:, 0].tolist(), answer[:, 1].tolist())
    return PromptPairs.from_lists(*lists)


class EapGraph:
    """What the drop-in needs of EAP-IG's Graph."""

    def __init__(self, model):
        cfg = model.cfg
        self.cfg = {name: getattr(cfg, name) for name in ("n_layers", "n_heads", "d_model", "parallel_attn_mlp")}
        graph = Graph(cfg.n_layers, cfg.n_heads, True, cfg.parallel_attn_mlp)
        self.scores = torch.zeros(graph.n_senders, graph.n_receivers, dtype=torch.float64)


@FAMILIES
@pytest.mark.parametrize("normalization", ["LN", "LNPre", None])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_logits_are_the_same_with_any_layernorm(attn_only, normalization, dtype, tolerance):
    hooked = hooked_transformer(attn_only, normalization_type=normalization, dtype=dtype)
    if normalization is None:  # nothing bounds the activations then
        with torch.no_grad():
            for parameter in hooked.parameters():
                parameter *= 0.5
    prompts = tokens(hooked.cfg.d_vocab)
    model = tl.from_hooked_transformer(hooked)
    with torch.no_grad():
        expected = hooked(prompts)
    error = float((forward(model, prompts) - expected).abs().max())
    print(f"{normalization} {dtype}: {error:.1e} of {float(expected.abs().max()):.1f}")
    assert error <= tolerance


@FAMILIES
@pytest.mark.parametrize("fold_ln", [True, False])
@pytest.mark.parametrize("center", [True, False])
def test_logits_are_the_same_folded_and_centred(attn_only, fold_ln, center):
    hooked = hooked_transformer(attn_only)
    hooked.process_weights_(fold_ln=fold_ln, center_writing_weights=center, center_unembed=center)
    prompts = tokens(hooked.cfg.d_vocab)
    with torch.no_grad():
        error = float((forward(tl.from_hooked_transformer(hooked), prompts) - hooked(prompts)).abs().max())
    assert error <= 1e-10


@FAMILIES
@pytest.mark.parametrize("changes", [
    {"scale_attn_by_inverse_layer_idx": True},
    {"use_attn_scale": False},
    {"attn_scale": 3.0},
    {"eps": 1e-2},
    {"act_fn": "gelu"},
    {"act_fn": "relu"},
    {"act_fn": "gelu_fast"},
    {"use_attn_result": False, "use_split_qkv_input": False, "use_hook_mlp_in": False},
    {"d_head": 5, "n_heads": 3},
])  # fmt: skip
def test_logits_are_the_same_with_every_convention(attn_only, changes):
    hooked = hooked_transformer(attn_only, **changes)
    prompts = tokens(hooked.cfg.d_vocab)
    with torch.no_grad():
        error = float((forward(tl.from_hooked_transformer(hooked), prompts) - hooked(prompts)).abs().max())
    assert error <= 1e-10


NAMES = [name for name in OTHERS if name not in FROM_3 or not version("transformer-lens").startswith("2.")]


def turn_in_float64(hooked, model):
    """TransformerLens makes the frequencies of "NTK by parts" in float32, and release 3 rounds all tables to it when it
    processes weights: put float64's in their place, from which they may differ by that rounding."""
    for layer, block in enumerate(hooked.blocks):
        rotary = model.config.rotary(layer)
        angles = torch.arange(len(block.attn.rotary_sin))[:, None] * rotary.frequencies
        angles = angles.repeat_interleave(2, 1) if rotary.adjacent else angles.repeat(1, 2)
        for table, exact in ((block.attn.rotary_sin, angles.sin()), (block.attn.rotary_cos, angles.cos())):
            assert float((table - exact).abs().max()) <= 1e-5
            table.copy_(exact)


@pytest.mark.parametrize("name", NAMES)
def test_logits_of_other_families_are_the_same_as_trained_and_processed(name):
    changes = OTHERS[name] | {"n_ctx": 32}
    hooked, prompts, errors = hooked_transformer(False, **changes), tokens(20, 1, (3, 13)), []
    for processed in (False, True):
        if processed and hooked.cfg.original_architecture:
            continue  # its norms, behind heads and MLPs, cannot be folded
        if processed:
            hooked.process_weights_()
            assert hooked.cfg.normalization_type in ("LNPre", "RMSPre")
        turn_in_float64(hooked, tl.from_hooked_transformer(hooked))
        with torch.no_grad():
            expected = hooked(prompts)
        for kv in ("each", "grouped"):
            found = forward(tl.from_hooked_transformer(hooked, kv=kv), prompts)
            errors.append(float((found - expected).abs().max()))
    print(f"{name}: {max(errors[:2]):.1e}, processed {max(errors[-2:]):.1e} of {float(expected.abs().max()):.1f}")
    assert max(errors) <= 1e-12
    single = hooked_transformer(False, **changes | {"dtype": torch.float32})
    with torch.no_grad():
        expected = single(prompts)
    assert float((forward(tl.from_hooked_transformer(single), prompts) - expected).abs().max()) <= 2e-5


@pytest.mark.parametrize("kv", ["each", "grouped"])
@pytest.mark.parametrize("name", NAMES)
def test_scores_of_other_families_are_those_of_hooks_in_float64(name, kv):
    changes = OTHERS[name] | {"ungroup_grouped_query_attention": kv == "each"}
    if kv == "grouped" and changes.get("n_key_value_heads") in (None, 4):
        pytest.skip("its queries are not grouped")
    hooked = hooked_transformer(False, **changes)
    clean, corrupt, answer = (tokens(20, seed, shape) for seed, shape in ((1, (4, 9)), (2, (4, 9)), (3, (4, 2))))
    answer[:, 1] = (answer[:, 0] + 1) % 20
    metric = partial(logit_diff, label=answer)
    model = tl.from_hooked_transformer(hooked, kv=kv)
    turn_in_float64(hooked, model)
    for method, ours in (("EAP", {}), ("EAP-IG-inputs", {"method": "eap-ig", "steps": 3, "points": "left"})):
        expected = hooked_scores(hooked, clean, corrupt, metric, method, ig_steps=3, kv=kv)
        found = attribute(model, pairs_of(clean, corrupt, answer), "logit_diff", **ours).scores
        error, largest = float((found - expected).abs().max()), float(expected.abs().max())
        print(f"{name}, {kv}, {method}: {error:.1e} of {largest:.2f}")
        assert error <= 1e-10 < largest
    if kv == "each":
        graph = EapGraph(hooked)
        batches = [(clean, corrupt, answer)]
        theirs = eap_ig.attribute(hooked, graph, batches, logit_diff, "EAP-IG-inputs", ig_steps=3, quiet=True)
        assert float((theirs.scores - expected).abs().max()) <= 1e-10


def test_no_second_copy_of_the_weights():
    for attn_only, changes in [(True, {}), (False, {}), *((False, OTHERS[name]) for name in NAMES)]:
        hooked = hooked_transformer(attn_only, **changes)
        if hooked.cfg.gated_mlp:
            with torch.no_grad():
                for block in hooked.blocks:  # or what it adds has to be made
                    block.mlp.b_in.zero_()
        model = tl.from_hooked_transformer(hooked)
        theirs = {parameter.data_ptr() for parameter in hooked.parameters()}
        own = {name for name, tensor in model.weights.named() if tensor.data_ptr() not in theirs}
        assert own == {f"layers.{layer}.b_qkv" for layer in range(2)}


@FAMILIES
def test_the_hooks_that_names_point_to_exist_and_hold_what_they_say(attn_only):
    from eapcore.models.forward import run_with_senders

    hooked = hooked_transformer(attn_only)
    model, prompts = tl.from_hooked_transformer(hooked), tokens(hooked.cfg.d_vocab)
    graph = model.graph
    _, cache = hooked.run_with_cache(prompts)
    _, senders = run_with_senders(model, prompts)
    for s, name in enumerate(graph.sender_names):
        hook, _, head = tl.sender_hook(graph, name).partition("[")
        value = cache[hook][:, :, int(head[:-1])] if head else cache[hook]
        if name == "embed":
            value = value + cache["hook_pos_embed"]
        assert float((value - senders[s]).abs().max()) <= 1e-12
    for name in graph.receiver_names:
        hook, _, head = tl.receiver_hook(graph, name).partition("[")
        assert hook in cache and (not head or cache[hook].shape[2] == graph.n_heads)


@FAMILIES
@pytest.mark.parametrize("method", ["EAP", "EAP-IG-inputs", "clean-corrupted"])
def test_scores_are_those_of_hooks_in_float64(attn_only, method):
    hooked = hooked_transformer(attn_only, n_layers=3, n_heads=4, d_model=32, n_ctx=32, d_vocab=101)
    clean, corrupt, answer = tokens(101, 1), tokens(101, 2), tokens(101, 3, (5, 2))
    options = {"ig_steps": 4} if method == "EAP-IG-inputs" else {}
    start = time.process_time()
    expected = hooked_scores(hooked, clean, corrupt, partial(logit_diff, label=answer), method, **options)
    between = time.process_time()
    graph = EapGraph(hooked)
    found = eap_ig.attribute(hooked, graph, [(clean, corrupt, answer)], logit_diff, method, quiet=True, **options)
    print(f"{method}: hooks {between - start:.3f} s, here {time.process_time() - between:.3f} s of CPU time")
    assert float((found.scores - expected).abs().max()) <= 1e-10 < float(expected.abs().max())
    own = {"EAP": {}, "EAP-IG-inputs": {"method": "eap-ig", "steps": 4, "points": "left"}}
    own["clean-corrupted"] = {"method": "clean-corrupt"}
    ours = attribute(tl.from_hooked_transformer(hooked), pairs_of(clean, corrupt, answer), "logit_diff", **own[method])
    assert float((ours.scores - expected).abs().max()) <= 1e-10


def attention_mask(model, prompts):
    """As EAP-IG makes it, with the package's own function."""
    try:
        from transformer_lens.utilities import get_attention_mask
    except ImportError:  # 2
        from transformer_lens.utils import get_attention_mask
    return get_attention_mask(model.tokenizer, prompts, True)


@FAMILIES
def test_padded_text_is_tokenized_and_scored_as_with_an_attention_mask(attn_only):
    hooked = hooked_transformer(attn_only, tokenizer=True)
    expected, pairs = 0, 0
    for clean, corrupt, label in text_batches():
        prompts, others = (
            hooked.to_tokens(text, prepend_bos=True, padding_side="right", truncate=False) for text in (clean, corrupt)
        )
        mask = attention_mask(hooked, prompts)
        found, lengths = tokenize(tl.from_hooked_transformer(hooked), hooked, clean, "clean prompts")
        assert torch.equal(found, prompts) and torch.equal(lengths, mask.sum(1))
        metric = partial(logit_diff, label=label)
        expected = expected + len(clean) * hooked_scores(hooked, prompts, others, metric, "EAP", mask=mask)
        pairs += len(clean)
    found = eap_ig.attribute(hooked, EapGraph(hooked), text_batches(), logit_diff, "EAP", quiet=True)
    assert float((found.scores - expected / pairs).abs().max()) <= 1e-10


def test_hooks_left_on_the_model_are_refused_and_go_with_reset_hooks():
    hooked = hooked_transformer(False)
    hooked.add_hook("blocks.1.attn.hook_z", lambda activation, hook: activation * 2)
    refused(r"forward hook at blocks\.1\.attn\.hook_z", tl.from_hooked_transformer, hooked)
    hooked.reset_hooks(including_permanent=True)
    tl.from_hooked_transformer(hooked)


@pytest.mark.parametrize(("changes", "named"), [
    ({"positional_embedding_type": "alibi"}, "'alibi'"),
    ({"positional_embedding_type": "shortformer"}, "'shortformer'"),
    ({"attention_dir": "bidirectional"}, "attention_dir 'bidirectional'"),
    ({"act_fn": "solu_ln"}, "'solu_ln'"),
    ({"post_embedding_ln": True}, "post_embedding_ln True"),
    ({"final_rms": True}, "final_rms True"),
])  # fmt: skip
def test_real_models_of_other_kinds_are_refused(changes, named):
    refused(named, tl.from_hooked_transformer, hooked_transformer(False, **changes))


def test_real_models_that_were_changed_are_refused():
    def changed(change, named, **changes):
        hooked = hooked_transformer(False, **changes)
        tl.from_hooked_transformer(hooked)
        change(hooked)
        refused(named, tl.from_hooked_transformer, hooked)

    changed(lambda m: setattr(m.blocks[1].ln2, "eps", 1e-2), r"blocks\.1\.ln2 eps 0\.01")
    changed(lambda m: setattr(m.blocks[0].mlp, "act_fn", torch.relu), r"blocks\.0\.mlp the activation relu")
    changed(lambda m: setattr(m.blocks[0].attn, "attn_scale", 1.0), r"blocks\.0\.attn attn_scale 1,")
    changed(lambda m: m.blocks[1].attn.rotary_sin.mul_(-1), "rotary_sin with other angles", **OTHERS["llama"])
    changed(
        lambda m: m.blocks[1].hook_mlp_out.add_perma_hook(lambda x, hook: 2 * x), r"forward hook at blocks\.1\.hook"
    )
    changed(
        lambda m: m.hook_embed.add_hook(lambda x, hook: None, dir="bwd", is_permanent=True), "backward hook at hook_e"
    )
    changed(lambda m: setattr(m.blocks[0], "ln1", torch.nn.Identity()), "the norm Identity", normalization_type="LNPre")
    if len(hooked_transformer(False).blocks[0].attn.mask):  # which release 3 makes when it runs
        changed(lambda m: m.blocks[0].attn.mask.fill_(True), "mask that hides other keys")


@pytest.mark.parametrize("by_position", [False, True])
@FAMILIES
def test_auto_circuit_s_prune_scores_are_the_same(attn_only, by_position):
    if importlib.util.find_spec("auto_circuit") is None:
        pytest.skip("auto-circuit is not in this environment")
    from make_fixtures import auto_circuit as run_auto_circuit

    clean, corrupt, answer = tokens(22, 1, (4, 6)), tokens(22, 2, (4, 6)), tokens(11, 3, (4, 2))
    answer[:, 1] += 11  # another one than the right answer
    model = tl.from_hooked_transformer(hooked_transformer(attn_only))
    start = time.process_time()
    theirs = run_auto_circuit(hooked_transformer(attn_only), [(clean, corrupt, answer)], 6 if by_position else None)
    between = time.process_time()
    scores = attribute(
        model, pairs_of(clean, corrupt, answer), "logit_diff", reduce="position" if by_position else "all"
    )
    print(f"auto-circuit {between - start:.3f} s, here {time.process_time() - between:.3f} s of CPU time")
    ours = auto_circuit.to_prune_scores(scores, per_position=by_position)
    assert set(ours) == set(theirs)
    for module, tensor in theirs.items():
        assert float((ours[module] - tensor).abs().max()) <= 1e-10
    again = auto_circuit.from_prune_scores(theirs, model.graph)
    assert float((again.scores - scores.scores).abs().max()) <= 1e-10


@pytest.mark.parametrize("name", ["transformer-lens", "transformer-lens, frozen", "auto-circuit"])
def test_what_the_benchmark_times_as_published_gives_the_same_scores(name, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "bench")
    from peers import published
    from pipeline import work as bench

    if published.why_not(name):
        pytest.skip(published.why_not(name))
    work = bench.Work(3, 4, 64, 211, B=2, T=9)
    assert bench.disagreement(work, ["dense", name], torch.float64) <= 1e-10


def test_auto_circuit_s_edges_have_the_names_that_we_give_them():
    if importlib.util.find_spec("auto_circuit") is None:
        pytest.skip("auto-circuit is not in this environment")
    from auto_circuit.utils.graph_utils import graph_edges

    graph = Graph(2, 2, True)
    theirs = {edge.name for edge in graph_edges(hooked_transformer(False), True, separate_qkv=True)[4]}
    names = {auto_circuit.edge_from_auto_circuit(graph, name) for name in theirs}
    assert names == {graph.edge_name(s, r) for s, r in graph.edge_mask().nonzero().tolist()}


def test_a_gpt2_and_its_hooked_transformer_give_one_model():
    import transformers

    fields = config_fields(False)
    torch.manual_seed(0)
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_layer=2, n_head=2, n_embd=16, vocab_size=fields["d_vocab"], n_positions=16, n_inner=24
        )
    ).eval()
    gpt2 = gpt2.double()
    prompts = tokens(fields["d_vocab"])
    with torch.no_grad():
        error = float((gpt2(prompts).logits - forward(from_gpt2(gpt2), prompts)).abs().max())
    assert error <= 1e-10
    assert len(PAIRS) == 5 and word_tokenizer().pad_token_id == 0


SHAPES = {"gpt2-like": {}, "attn-only": {"attn_only": True}, "attn-only, rotary": {"attn_only": True} | ROTARY}
SHAPES |= {name: OTHERS[name] for name in ("llama", "qwen3", "gemma", "neox", "neox, one after the other", "gpt-j")}


@pytest.mark.parametrize("shape", SHAPES)
def test_eap_ig_s_own_graph_is_filled_and_its_files_are_read_by_it(shape, tmp_path, monkeypatch):
    """With a checkout of hannamw/EAP-IG at EAPCORE_EAP_IG, which is on no registry."""
    if not os.environ.get("EAPCORE_EAP_IG"):
        pytest.skip("EAPCORE_EAP_IG names no checkout of EAP-IG")
    monkeypatch.syspath_prepend(Path(os.environ["EAPCORE_EAP_IG"]) / "src")
    pytest.importorskip("matplotlib")
    from eap.attribute import attribute as theirs
    from eap.graph import Graph as EapIgGraph
    from make_fixtures import METHODS, on_this_device

    monkeypatch.setattr(torch, "zeros", torch.zeros)  # put back at the end
    on_this_device()
    changes = {"attn_only": False, "n_ctx": 32} | SHAPES[shape]
    hooked, attn_only = hooked_transformer(tokenizer=True, **changes), changes["attn_only"]
    for name, options in METHODS.items():
        if "mean" in options.get("intervention", ""):
            continue
        expected, graph = EapIgGraph.from_model(hooked), EapIgGraph.from_model(hooked)
        expected.scores, graph.scores = expected.scores.double(), graph.scores.double()
        start = time.process_time()
        theirs(hooked, expected, text_batches(), logit_diff, quiet=True, **options)
        between = time.process_time()
        eap_ig.attribute(hooked, graph, text_batches(), logit_diff, quiet=True, verbatim=True, **options)
        print(f"{name}: EAP-IG {between - start:.3f} s, here {time.process_time() - between:.3f} s of CPU time")
        assert float((graph.scores - expected.scores).abs().max()) <= 1e-10
    graph.apply_topn(15, absolute=True)
    ours = Graph(2, hooked.cfg.n_heads, not attn_only, hooked.cfg.parallel_attn_mlp)
    scores = EdgeScores(eap_ig.in_our_order(ours, graph.scores), ours)
    circuit = Circuit(eap_ig.in_our_order(ours, graph.in_graph), ours)
    for suffix, read in ((".json", EapIgGraph.from_json), (".pt", EapIgGraph.from_pt)):
        eap_ig.GraphFile.of(scores, 16, circuit).save(tmp_path / f"graph{suffix}", sign="metric")
        again = read(str(tmp_path / f"graph{suffix}"))
        assert torch.equal(again.scores, graph.scores.float()) and torch.equal(again.in_graph, graph.in_graph)
        assert torch.equal(again.nodes_in_graph, graph.nodes_in_graph)
