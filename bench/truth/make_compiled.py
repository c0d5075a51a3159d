"""Compile the programs with tracr, and write the folders of compiled/: for an interpreter that has tracr-pypi too.

    python bench/truth/make_compiled.py

The residual stream of such a model has one direction for each value of each of the program's variables, by name. An
edge carries those that its sender writes and its receiver reads: where both have a weight that is not zero. Tokens move
the directions of variables that depend on the tokens, but that of the token which begins every prompt; positions those
of the other variables; nothing moves the constants. An edge is true if some prompt that has an answer gets other logits
without it, its directions' weights in the receiver set to zero. The others are "idle": constants that only prompts too
short for an answer need.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from tracr.compiler import compiling
from tracr.rasp import rasp

try:
    import eapcore  # noqa: F401
except ImportError:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eapcore import load, run_with_senders
from eapcore.graph.circuit import Circuit
from eapcore.graph.graph import Graph
from truth.compiled import FOLDER, LONGEST, PROGRAMS, Compiled

BEGIN = "BOS"


def back(n: int, name: str) -> Any:
    """The token n places before."""
    place = rasp.Map(lambda i: i - n, rasp.indices).named(f"{name}_place")
    return rasp.Aggregate(rasp.Select(rasp.indices, place, rasp.Comparison.EQ), rasp.tokens, default=None).named(name)


def answer(name: str) -> Any:
    if name == "same-as-before":
        return rasp.SequenceMap(lambda x, y: x == y, back(1, "before"), rasp.tokens)
    if name == "parity":
        return rasp.SequenceMap(lambda x, y: (x or 0) ^ (y or 0), back(1, "first"), back(2, "second"))
    if name == "count":
        return rasp.SelectorWidth(rasp.Select(rasp.tokens, rasp.tokens, rasp.Comparison.EQ))
    is_x = rasp.numerical(rasp.Map(lambda x: int(x == "x"), rasp.tokens)).named("is_x")
    before = rasp.Select(rasp.indices, rasp.indices, rasp.Comparison.LEQ)
    return rasp.numerical(rasp.Aggregate(before, rasp.numerical(is_x), default=0))


def moved_by_tokens(expression: Any) -> dict[str, bool]:
    """For each variable of a program, by name, whether it depends on the tokens."""
    found: dict[str, bool] = {}
    for child in expression.children:
        found |= moved_by_tokens(child)
    names = [plain(child.label) for child in expression.children]
    return found | {plain(expression.label): expression.label == "tokens" or any(found[name] for name in names)}


def plain(label: str) -> str:
    """A direction's name without the number that makes a variable's name unique: before_3:a is before:a."""
    return re.sub(r"_\d+(?=$|[:_])", "", label)


def weights(made: Any) -> dict[str, np.ndarray]:
    """By TransformerLens's names, but for the unembedding."""
    params, config = made.params, made.model_config
    heads, size, width = config.num_heads, config.key_size, len(made.residual_labels)
    out = {"embed.W_E": params["token_embed"]["embeddings"], "pos_embed.W_pos": params["pos_embed"]["embeddings"]}
    for layer in range(config.num_layers):
        at, ours = f"transformer/layer_{layer}", f"blocks.{layer}."
        for part, theirs in zip("QKV", ("query", "key", "value"), strict=True):
            found = params[f"{at}/attn/{theirs}"]
            out[f"{ours}attn.W_{part}"] = np.asarray(found["w"]).reshape(width, heads, size).transpose(1, 0, 2)
            out[f"{ours}attn.b_{part}"] = np.asarray(found["b"]).reshape(heads, size)
        out[ours + "attn.W_O"] = np.asarray(params[f"{at}/attn/linear"]["w"]).reshape(heads, size, width)
        out[ours + "attn.b_O"] = params[f"{at}/attn/linear"]["b"]
        for theirs, part in (("linear_1", "in"), ("linear_2", "out")):
            out[f"{ours}mlp.W_{part}"] = params[f"{at}/mlp/{theirs}"]["w"]
            out[f"{ours}mlp.b_{part}"] = params[f"{at}/mlp/{theirs}"]["b"]
    return {name: np.ascontiguousarray(value, dtype=np.float32) for name, value in out.items()}


def unembedding(name: str, labels: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Each answer's logit is its direction; a fraction's is held against a constant half."""
    answers, bias = PROGRAMS[name].answers, np.zeros(len(PROGRAMS[name].answers), dtype=np.float32)
    w = np.zeros((len(labels), len(answers)), dtype=np.float32)
    for index, value in enumerate(answers):
        if f"answer:{value}" in labels:
            w[labels.index(f"answer:{value}"), index] = 1
    if name == "frac-prevs":
        w[labels.index("answer"), 0], bias[1] = 1, 0.5
    assert (w.any(0) | (bias != 0)).all(), f"an answer of {name} has no direction among {labels}"
    return w, bias


def carried(graph: Graph, state: dict[str, np.ndarray], labels: list[str]) -> dict[str, list[str]]:
    """By edge the directions that its sender writes and its receiver reads."""

    def written(sender: str) -> np.ndarray:
        if sender == "embed":
            return np.concatenate([state["embed.W_E"], state["pos_embed.W_pos"]]).any(0)
        layer, _, head = sender[1:].partition(".h")
        at = f"blocks.{layer}."
        return (state[at + "attn.W_O"][int(head)] if head else state[at + "mlp.W_out"]).any(0)

    def read(receiver: str) -> np.ndarray:
        if receiver == "logits":
            return state["unembed.W_U"].any(1)
        layer, _, head = receiver[1:].partition(".h")
        if not head:
            return state[f"blocks.{layer}.mlp.W_in"].any(1)
        return state[f"blocks.{layer}.attn.W_{head[-2].upper()}"][int(head.split("<")[0])].any(1)

    found = {}
    for s, r in graph.edge_mask().nonzero().tolist():
        sender, receiver = graph.sender_names[s], graph.receiver_names[r]
        both = written(sender) & read(receiver)
        if both.any():
            found[f"{sender}->{receiver}"] = [label for label, is_there in zip(labels, both, strict=True) if is_there]
    return found


def used(name: str, config: dict[str, Any], state: dict[str, np.ndarray], receiver: str, directions: list[int]) -> bool:
    """Whether some prompt's logits are others where a receiver does not read some directions."""
    without = {key: torch.from_numpy(value.copy()) for key, value in state.items()}
    if receiver == "logits":
        without["unembed.W_U"][directions] = 0
    elif "<" in receiver:
        layer, _, head = receiver[1:-3].partition(".h")
        without[f"blocks.{layer}.attn.W_{receiver[-2].upper()}"][int(head), directions] = 0
    else:
        without[f"blocks.{receiver[1:]}.mlp.W_in"][directions] = 0
    of, program = Compiled(name), PROGRAMS[name]
    prompts = torch.tensor([of.ids(prompt) for prompt in itertools.product(program.values, repeat=LONGEST)])
    whole = {key: torch.from_numpy(value.copy()) for key, value in state.items()}
    said = [run_with_senders(load(kept, config=config), prompts)[0][:, program.least :] for kept in (whole, without)]
    return bool((said[0] - said[1]).abs().max() > 1e-3)


def make(name: str) -> None:
    program, expression = PROGRAMS[name], answer(name).named("answer")
    made = compiling.compile_rasp_to_model(
        expression, set(program.values), LONGEST, causal=True, compiler_bos=BEGIN, compiler_pad=None
    )
    labels, state, tokens = [plain(label) for label in made.residual_labels], weights(made), made.input_encoder
    assert len(set(labels)) == len(labels), labels
    state["unembed.W_U"], state["unembed.b_U"] = unembedding(name, labels)
    moved = moved_by_tokens(expression)

    def kind(label: str) -> str:
        if label in ("one", f"tokens:{BEGIN}"):
            return "constants"
        variable = max((known for known in moved if label.startswith(known)), key=len)
        return "tokens" if moved[variable] else "positions"

    layers, (heads, width, size) = made.model_config.num_layers, state["blocks.0.attn.W_Q"].shape
    graph = Graph(layers, heads, True)
    config = {
        "n_layers": layers, "n_heads": heads, "d_model": width, "d_head": size,
        "d_mlp": state["blocks.0.mlp.W_in"].shape[1], "d_vocab": len(state["embed.W_E"]),
        "d_vocab_out": len(program.answers), "n_ctx": LONGEST + 1, "act_fn": "relu", "normalization_type": None,
    }  # fmt: skip
    edges = carried(graph, state, labels)
    carries = {
        edge: {k: [x for x in d if kind(x) == k] for k in dict.fromkeys(map(kind, d))} for edge, d in edges.items()
    }
    begin, ids = tokens.encoding_map[BEGIN], [tokens.encoding_map[value] for value in program.values]
    meta = {
        "task": {"name": name, "about": program.about}, "model": {"name": name},
        "made": {"script": "bench/truth/make_compiled.py", "tracr-pypi": importlib.metadata.version("tracr-pypi")},
        "begin": begin, "tokens": ids, "answers": list(program.answers),
    }  # fmt: skip
    folder = FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(state, folder / "model.safetensors")
    circuit = folder / "circuit.json"
    Circuit.from_edges(graph, [], meta).save(circuit)
    places = {label: place for place, label in enumerate(labels)}
    idle = [e for e, d in edges.items() if not used(name, config, state, e.split("->")[1], [places[x] for x in d])]
    meta |= {"carries": carries, "idle": idle}
    Circuit.from_edges(graph, [edge for edge in edges if edge not in idle], meta).save(circuit)
    keys = ("clean", "corrupt", "answer", "wrong")
    rows = [json.dumps(dict(zip(keys, row, strict=True))) for row in Compiled(name).rows(32, 0)]
    (folder / "pairs.jsonl").write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    for program in PROGRAMS:
        make(program)
