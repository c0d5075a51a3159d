"""The README's page of the public names: every name has an example there, and every example runs."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import types
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Union, get_args, get_origin, get_overloads, get_type_hints

import eapcore.kernels as kernels
import numpy as np
import pytest
import torch
from models import ROOT, random_model, random_pairs
from torch import Tensor

import eapcore
from eapcore.evaluation.agreement import agreement
from eapcore.evaluation.roc import roc
from eapcore.evaluation.stability import stability
from eapcore.interop import auto_circuit, eap_ig
from eapcore.interop.eap_ig.attribute import tokenize
from eapcore.models.forward import forward, sender_buffer
from eapcore.patching.edges import patch_edges
from eapcore.patching.nodes import patch_nodes
from eapcore.search.acdc import acdc
from eapcore.tasks.metrics import METRICS

PAGE = re.search(r"^## API$(.*?)^## ", (ROOT / "README.md").read_text("utf-8"), re.M | re.S)[1]
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, re.S)


def test_there_are_twelve_public_names_and_each_has_an_example():
    assert len(eapcore.__all__) == 12 and PAGE.lstrip().startswith("Twelve names")
    assert sorted(re.findall(r"\*\*`(\w+)`\*\*", PAGE)) == sorted(eapcore.__all__)
    for name in eapcore.__all__:
        assert any(f"eapcore.{name}" in example for example in EXAMPLES), name


@pytest.mark.parametrize("example", EXAMPLES, ids=[re.findall(r"eapcore\.(\w+)", e)[-1] for e in EXAMPLES])
def test_an_example_runs_on_its_own(example, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})
    assert example.count("print(") == 0 or capsys.readouterr().out


def test_a_docstring_says_what_every_argument_and_member_is():
    for name in eapcore.__all__:
        value = getattr(eapcore, name)
        assert inspect.getdoc(value), name
        if inspect.isclass(value):
            for inner, member in vars(value).items():
                for wrapped in ("fget", "func", "__func__"):
                    member = getattr(member, wrapped, member)
                if inspect.isfunction(member) and not inner.startswith("_"):
                    assert inspect.getdoc(member), f"{name}.{inner}"
            continue
        for parameter in inspect.signature(value).parameters.values():
            kinds = parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL
            assert parameter.kind in kinds or re.search(rf"\b{parameter.name}\b", value.__doc__), (name, parameter.name)
        assert "Raises:" in value.__doc__, name


# Shapes in signatures

LETTERS = set(re.findall(r"`([A-Z])`", PAGE))
DTYPES = ("bool", "int64", "float64")
FORWARD = ("forward", "run_with_senders", "sender_buffer")  # the rest of eapcore.models.forward is the models' own
MODULES = (
    "attribution attribution.plan evaluation.agreement evaluation.completeness evaluation.evaluate "
    "evaluation.faithfulness evaluation.roc evaluation.stability evaluation.verify execution.ablation graph "
    "graph.circuit graph.scores kernels kernels.torch_ops models.config models.forward models.load models.model "
    "models.weights patching.circuits patching.edges patching.interpolate patching.nodes patching.paths search.acdc "
    "search.subnetwork_probing tasks tasks.metrics tasks.pairs interop.acdc_files interop.auto_circuit "
    "interop.eap_ig interop.transformer_lens interop.transformers"
).split()


def public():
    """(name, function or class) of what modules list in __all__, or else of all without an underscore."""
    for place in MODULES:
        module = importlib.import_module(f"eapcore.{place}")
        own = [name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
        for name in getattr(module, "__all__", own):
            value = getattr(module, name)
            if place == "models.forward" and name not in FORWARD:
                continue
            if name.startswith("_") or not (inspect.isfunction(value) or inspect.isclass(value)):
                continue
            yield f"{place}.{name}", value
            for inner, member in vars(value).items() if inspect.isclass(value) else ():
                for wrapped in ("fget", "func", "__func__"):  # a property, a cached one, a static method
                    member = getattr(member, wrapped, member)
                if inspect.isfunction(member) and (not inner.startswith("_") or inner == "__getitem__"):
                    yield f"{place}.{name}.{inner}", member


def shapes(hint):
    """Every shape in a type, and None for a Tensor without one. A state dict's tensors have no shape in common."""
    if hint is Tensor:
        yield None
    elif get_origin(hint) is Annotated:
        yield hint.__metadata__[0]
    elif hint != Mapping[str, Tensor]:
        for inner in hint if isinstance(hint, list) else get_args(hint):
            yield from shapes(inner)


def test_every_public_signature_carries_its_shapes_in_the_readmes_letters():
    seen = 0
    for name, value in public():
        for parameter, hint in get_type_hints(value, include_extras=True).items():
            for shape in shapes(hint):
                assert shape is not None, f"{parameter} of {name} is a Tensor without a shape"
                for axis in re.sub(rf"^({'|'.join(DTYPES)}) ", "", shape).split():
                    letter = re.sub(r"^\d+|'$", "", axis)
                    assert letter in LETTERS or axis in ("|", "()", "...", "n_ctx", "2"), (
                        f"{axis} in {parameter} of {name}"
                    )
                seen += 1
    assert seen > 150


def test_the_array_functions_have_the_shapes_of_the_kernels():
    for name in ("edge_scores", "receiver_grads"):
        ours, theirs = (
            {key: list(shapes(hint)) for key, hint in get_type_hints(f, include_extras=True).items()}
            for f in (getattr(eapcore, name), getattr(kernels, name))
        )
        assert ours == {key: theirs[key] for key in ours} and ours["return"][0]
        forms = get_overloads(getattr(eapcore, name))  # what a type checker says comes back
        assert [get_type_hints(form)["return"] for form in forms] == [np.ndarray, Tensor]


def fits(value: Any, hint: Any, sizes: dict[str, int]) -> bool:
    """Whether a value has the shapes of a type; a letter without a size gets that of the first axis it names."""
    if get_origin(hint) is Annotated:
        return any(
            has_shape(value, shape.split(), sizes, hint.__metadata__[0]) for shape in hint.__metadata__[0].split("|")
        )
    if get_origin(hint) in (Union, types.UnionType):
        return value is None or any(fits(value, option, sizes) for option in get_args(hint) if option is not type(None))
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, hint):
            return False
        hints = get_type_hints(hint, include_extras=True)
        here = {letter: size for letter, size in sizes.items() if letter != "C"}  # a field's channels, no circuits
        return all(fits(getattr(value, field.name), hints[field.name], here) for field in dataclasses.fields(hint))
    if get_origin(hint) is tuple and get_args(hint)[-1] is not ...:
        return isinstance(value, tuple | list) and all(map(fits, value, get_args(hint), [sizes] * len(value)))
    if get_origin(hint) in (tuple, Sequence, list):
        return not isinstance(value, Tensor) and all(fits(item, get_args(hint)[0], sizes) for item in value)
    if get_origin(hint) in (dict, Mapping):
        return all(fits(item, get_args(hint)[1], sizes) for item in value.values())
    return not isinstance(value, Tensor)


def has_shape(value: Any, axes: list[str], sizes: dict[str, int], whole: str) -> bool:
    dtype = whole.split()[0]
    if not isinstance(value, Tensor) or (dtype in DTYPES and value.dtype != getattr(torch, dtype)):
        return False
    axes = [axis for axis in axes if axis not in (*DTYPES, "()")]
    found = {}
    for axis, size in zip(axes, value.shape, strict=False):
        factor, letter = re.fullmatch(r"(\d*)(.+)", axis).groups()
        expected = (sizes | found).get(letter)
        if size % int(factor or 1) or expected not in (None, size // int(factor or 1)):
            return False
        if not letter.endswith("'"):  # some of them, and others the next time
            found[letter] = size // int(factor or 1)
    if len(axes) != value.ndim:
        return False
    sizes |= found
    return True


def checked(f, sizes):
    """The function, which asserts the shapes of what goes in and comes out."""
    hints = get_type_hints(f, include_extras=True)

    def call(*args, **options):
        here = dict(sizes)
        for name, value in inspect.signature(f).bind(*args, **options).arguments.items():
            if name in hints:
                assert fits(value, hints[name], here), (f.__name__, name, hints[name], value, here)
        result = f(*args, **options)
        assert fits(result, hints["return"], here), (f.__name__, hints["return"], result, here)
        return result

    return call


@pytest.fixture
def model():
    return random_model(n_layers=2, n_heads=3, d_model=24, d_head=8, d_mlp=40, d_vocab=29, n_ctx=16)


@pytest.fixture
def pairs(model):
    return random_pairs(model, [7, 6, 7, 5, 7])


@pytest.fixture
def sizes(model):
    """No two letters have the same."""
    config, graph = model.config, model.graph
    known = {
        "S": graph.n_senders,
        "R": graph.n_receivers,
        "E": graph.n_edges,
        "L": config.n_layers,
        "H": config.n_heads,
    }
    known |= {"D": config.d_model, "K": config.d_head, "M": config.d_mlp, "V": config.d_vocab, "n_ctx": config.n_ctx}
    assert len(set(known.values())) == len(known)
    return known


def test_a_wrong_shape_does_not_fit(sizes):
    assert fits(torch.zeros(9, 5, 7, 24), Annotated[Tensor, "S B T D"], dict(sizes))
    assert not fits(torch.zeros(9, 5, 7, 23), Annotated[Tensor, "S B T D"], dict(sizes))
    assert not fits(torch.zeros(9, 5, 24), Annotated[Tensor, "S B T D"], dict(sizes))
    assert not fits(torch.zeros(5, 5, 7), Annotated[Tensor, "B T T"], {})
    assert not fits(torch.zeros(5, 7), Annotated[Tensor, "int64 B T"], {})
    assert fits(torch.zeros(9, 8), Annotated[Tensor, "3H K"], {"H": 3})
    assert fits((torch.zeros(5), None), tuple[Annotated[Tensor, "B"], Annotated[Tensor, "T"] | None], {"B": 5})


def test_models_and_tasks_have_the_shapes_of_their_fields(model, pairs, sizes):
    assert fits(model.weights, type(model.weights), dict(sizes))
    assert fits(pairs, eapcore.PromptPairs, sizes | {"N": 5, "T": 7, "A": 1, "W": 2})
    checked(type(pairs).first_difference, {"N": 5})(pairs)
    attention, channels = model.attentions[1], 3 * sizes["H"]
    checked(type(attention).closed_form, {"C": channels} | sizes)(attention)
    checked(type(model.graph).edge_mask, sizes)(model.graph)


def test_forward_passes_have_the_shapes_of_their_signatures(model, pairs, sizes):
    sizes |= {"B": 5, "T": 7}
    checked(eapcore.run_with_senders, sizes)(model, pairs.clean, checked(sender_buffer, sizes)(model, 5, 7))
    checked(forward, sizes)(model, pairs.clean)
    circuits = [eapcore.Circuit(model.graph.edge_mask(), model.graph)] * 4
    checked(eapcore.run_circuit, sizes)(model, pairs, circuits[0])
    checked(eapcore.run_circuit, sizes | {"C": 4})(model, pairs, circuits)


@pytest.mark.parametrize("level", ["edge", "node", "neuron"])
@pytest.mark.parametrize("reduce", ["pair", "position"])
@pytest.mark.parametrize("name", METRICS)
def test_scores_metrics_and_kernels_have_the_shapes_of_their_signatures(
    name, reduce, level, model, pairs, sizes, monkeypatch
):
    calls = []

    def watched(f, known):
        call = checked(f, known)
        return lambda *args, **options: (calls.append(f.__name__), call(*args, **options))[1]

    # A kernel's senders, receivers and positions are those of one call.
    own = {letter: sizes[letter] for letter in "LHDK"}
    for op in ("edge_scores", "edge_scores_factored", "receiver_grads", "receiver_constants"):
        monkeypatch.setattr(kernels, op, watched(getattr(kernels, op), own))
    monkeypatch.setitem(METRICS, name, watched(METRICS[name], sizes | {"A": 1, "W": 2}))
    attribute = checked(eapcore.attribute, sizes | {"N": 5, "T": 7})
    for storage in ("dense", "factored") if level == "edge" else ("auto",):
        options = {"gradient_at": "corrupt"} if name == "kl" else {}  # which has no gradient at the clean run
        scores = attribute(model, pairs, name, level=level, reduce=reduce, storage=storage, **options)
        if level == "edge":
            checked(type(scores).ranking, sizes)(scores)
            checked(auto_circuit.to_prune_scores, sizes)(scores, per_position=reduce == "position")
    ops = {"receiver_constants", "receiver_grads", "edge_scores", "edge_scores_factored"} if level == "edge" else set()
    assert set(calls) >= ops | {name}


def test_exact_methods_and_judging_have_the_shapes_of_their_signatures(model, pairs, sizes):
    sizes |= {"N": 5, "T": 7}
    exact = checked(patch_edges, sizes)(model, pairs)
    for per_position in (False, True):
        effects = checked(patch_nodes, sizes)(model, pairs, nodes=["embed", "a0.h1", "m1"], per_position=per_position)
        checked(type(effects).__getitem__, {"T": 7})(effects, "m1")
    checked(acdc, sizes)(model, (pairs.clean, pairs.corrupt), threshold=0.1)
    scores = eapcore.attribute(model, pairs, reduce="pair")
    mask = model.graph.edge_mask()
    checked(agreement, sizes)(scores, exact, mask)
    checked(roc, sizes)(scores, exact.top_n(20), edges=mask)
    checked(stability, sizes)(scores.per_pair, model.graph, top_n=20, n_resamples=4)
    theirs = checked(eap_ig.in_their_order, sizes)(model.graph, scores.scores)
    checked(eap_ig.in_our_order, sizes)(model.graph, theirs)
    checked(tokenize, {"B": 5, "T": 7})(model, model, pairs.clean, "prompts")
