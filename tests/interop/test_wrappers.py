"""What other tools wrap around a model: the weights inside are taken where the wrapper leaves them as they are."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from models import gpt2
from refusal import refused
from torch import nn

import eapcore
from eapcore.interop import auto_circuit
from eapcore.interop import transformer_lens as tl
from eapcore.models.forward import forward

TOKENS = torch.tensor([[1, 2, 3, 4]])


class Component(nn.Module):
    """As a bridge puts it into the place of a part."""

    def __init__(self, part):
        super().__init__()
        self.add_module("_original_component", part)

    def forward(self, *args, **options):
        return self._original_component(*args, **options)


class TransformerBridge(nn.Module):
    compatibility_mode = False

    def __init__(self, module):
        super().__init__()
        for block in module.transformer.h:
            block.ln_1 = Component(block.ln_1)
            block.mlp = Component(block.mlp)
        self.add_module("hook_out", nn.Identity())
        self.hook_out.fwd_hooks = []
        self.__dict__["original_model"] = module

    def forward(self, tokens):
        return self.original_model(tokens).logits


class NNsight:
    """Which is no module itself."""

    def __init__(self, module):
        self._module, self._edits = module, []


def same(model, module, tokens=TOKENS):
    with torch.no_grad():
        return float((forward(model, tokens) - module(tokens).logits).abs().max()) <= 1e-5


def test_a_bridge_is_taken_unless_it_was_changed():
    module = gpt2()
    expected = eapcore.load(module).content_hash
    bridge = TransformerBridge(module)
    for load in (eapcore.load, tl.from_hooked_transformer):
        model = load(bridge)
        assert same(model, module) and model.content_hash == expected
    grouped = {parameter.data_ptr() for parameter in module.parameters()}
    assert {t.data_ptr() for name, t in model.weights.named() if "qkv" not in name} <= grouped | {
        model.weights.w_e.data_ptr()
    }
    refused("has become part of a TransformerBridge: give the bridge itself", eapcore.load, module)
    bridge.hook_out.fwd_hooks = [object()]
    refused(r"has a hook at hook_out, .* bridge\.reset_hooks\(\)", eapcore.load, bridge)
    bridge.hook_out.fwd_hooks = []
    bridge.compatibility_mode = True
    refused(r"processed weights: boot it without enable_compatibility_mode\(\)", eapcore.load, bridge)
    bridge.compatibility_mode = False
    module.transformer.h[0].mlp.register_forward_hook(lambda part, args, out: 2 * out)
    refused("computes something else than the weights inside it", eapcore.load, bridge)


def test_an_nnsight_model_is_taken_unless_it_was_edited():
    module = gpt2()
    wrapped = NNsight(module)
    assert same(eapcore.load(wrapped), module)
    wrapped._edits = [object()]
    refused(r"has edits.* model\.clear_edits\(\)", eapcore.load, wrapped)
    wrapped = NNsight(module)
    module.transformer.h[0].mlp.forward = lambda x: x
    refused("a replaced forward", eapcore.load, wrapped)
    refused(r"has no weights yet: call model\.dispatch\(\) first", eapcore.load, NNsight(gpt2().to("meta")))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_compiled_and_parallel_modules_are_taken():
    module = gpt2()
    for wrapped in (torch.compile(module), nn.DataParallel(module)):
        assert same(eapcore.load(wrapped), module)
    module.transformer.h[1].register_forward_hook(lambda *_: None)
    refused("forward hook at transformer.h.1", eapcore.load, nn.DataParallel(module))


def batch(clean, corrupt, answers, wrong):
    fields = {"clean": clean, "corrupt": corrupt, "answers": answers, "wrong_answers": wrong}
    return SimpleNamespace(**{name: [torch.tensor(row) for row in rows] for name, rows in fields.items()})


class Loader(list):
    kv_cache, diverge_idx, seq_len = None, 0, None


def test_pairs_of_auto_circuit_s_loader():
    first = batch([[9, 9, 5, 6], [9, 4, 5, 6]], [[9, 9, 5, 7], [9, 4, 5, 7]], [[1], [2, 3]], [[4], [5]])
    loader = Loader([first, batch([[9, 1, 2, 3]], [[9, 1, 2, 4]], [[6]], [[7]])])
    pairs = auto_circuit.pairs_of_loader(loader, pad=9)  # which also begins every prompt
    assert pairs.lengths.tolist() == [3, 4, 4] and pairs.clean[0, :3].tolist() == [9, 5, 6]
    assert pairs.corrupt[2].tolist() == [9, 1, 2, 4] and pairs.positions.tolist() == [2, 3, 3]
    assert pairs.answers.tolist() == [[1, -1], [2, 3], [6, -1]] and pairs.wrong.tolist() == [[4], [5], [7]]
    refused("may be padded on the left: give pad=model.tokenizer.pad_token_id", auto_circuit.pairs_of_loader, loader)
    other = Loader([batch([[0, 0, 5], [8, 4, 5]], [[0, 0, 7], [8, 4, 7]], [[1], [2]], [[4], [5]])])
    assert auto_circuit.pairs_of_loader(other, pad=0).lengths.tolist() == [1, 3]
    loader.seq_len = 4
    assert auto_circuit.pairs_of_loader(loader).lengths.tolist() == [4, 4, 4]
    for field, value in (("kv_cache", object()), ("diverge_idx", 2)):
        cut = Loader(loader)
        setattr(cut, field, value)
        refused("cut its prompts behind a prefix.* tail_divergence=False", auto_circuit.pairs_of_loader, cut, pad=9)


@pytest.mark.parametrize("thing", [nn.Linear(2, 2), 3, None])
def test_anything_else_is_refused_in_one_sentence(thing):
    refused("expected a folder, a Hub id, a transformers model|expected a transformers model", eapcore.load, thing)
