"""Compile a small program into a transformer with tracr, for an interpreter that has it: writes program.npz.

    python bench/truth/compile_program.py NAME FILE        NAME: count or previous

count: how many tokens up to here are the last one. previous: the token before plus the last one, modulo 3. All weights
are written by the names of TransformerLens's layout, without normalisation, with the answers' directions as the
unembedding, and `tokens` and `answers`, each token's and each answer's value.
"""

from __future__ import annotations

import sys
from typing import Any

LONGEST = 6
VALUES = (0, 1, 2)


def program(name: str) -> Any:
    from tracr.rasp import rasp

    if name == "count":
        same = rasp.Select(rasp.tokens, rasp.tokens, rasp.Comparison.EQ)
        return rasp.SelectorWidth(same).named("answer")
    before = rasp.Map(lambda i: i - 1, rasp.indices)
    last = rasp.Aggregate(rasp.Select(rasp.indices, before, rasp.Comparison.EQ), rasp.tokens, default=None)
    return rasp.SequenceMap(lambda x, y: ((x or 0) + y) % 3, last, rasp.tokens).named("answer")


def main() -> None:
    import numpy as np
    from tracr.compiler import compiling

    name, path = sys.argv[1:]
    made = compiling.compile_rasp_to_model(
        program(name), set(VALUES), LONGEST, causal=True, compiler_bos="BOS", compiler_pad=None
    )
    params, config = made.params, made.model_config
    heads, size, width = config.num_heads, config.key_size, params["token_embed"]["embeddings"].shape[1]
    out: dict[str, Any] = {}
    for layer in range(config.num_layers):
        at, ours = f"transformer/layer_{layer}", f"blocks.{layer}."
        for part, theirs in zip("QKV", ("query", "key", "value"), strict=True):
            w, b = params[f"{at}/attn/{theirs}"]["w"], params[f"{at}/attn/{theirs}"]["b"]
            out[f"{ours}attn.W_{part}"] = np.asarray(w).reshape(width, heads, size).transpose(1, 0, 2)
            out[f"{ours}attn.b_{part}"] = np.asarray(b).reshape(heads, size)
        linear = params[f"{at}/attn/linear"]
        out[ours + "attn.W_O"] = np.asarray(linear["w"]).reshape(heads, size, width)
        out[ours + "attn.b_O"] = np.asarray(linear["b"])
        for theirs, part in (("linear_1", "in"), ("linear_2", "out")):
            out[f"{ours}mlp.W_{part}"] = np.asarray(params[f"{at}/mlp/{theirs}"]["w"])
            out[f"{ours}mlp.b_{part}"] = np.asarray(params[f"{at}/mlp/{theirs}"]["b"])
    labels = [label for label in made.residual_labels if label.startswith("answer") and ":" in label]
    tokens = made.input_encoder.encoding_map
    vocabulary = 1 + max(len(labels), *tokens.values())
    out["unembed.W_U"], out["unembed.b_U"] = np.zeros((width, vocabulary)), np.zeros(vocabulary)
    for index, label in enumerate(labels):
        out["unembed.W_U"][made.residual_labels.index(label), index] = 1
    embedded = np.asarray(params["token_embed"]["embeddings"])
    out["embed.W_E"] = np.zeros((vocabulary, width))
    out["embed.W_E"][: len(embedded)] = embedded
    out["pos_embed.W_pos"] = np.asarray(params["pos_embed"]["embeddings"])
    out["tokens"] = np.array([tokens[value] for value in (*VALUES, "BOS")])
    out["answers"] = np.array([int(label.split(":")[1]) for label in labels])
    np.savez(path, **out)


if __name__ == "__main__":
    main()
