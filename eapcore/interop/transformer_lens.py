"""TransformerLens: a HookedTransformer's weights as a Model, and its hook names as senders and receivers."""

from __future__ import annotations

import re

from torch import nn

from eapcore.graph.graph import Graph
from eapcore.models.load import load
from eapcore.models.model import Model

_NODE = re.compile(r"(?P<hook>[\w.]+?)(?:\[(?:(?::|None), (?:(?::|None), ))?(?P<head>\d+|:|None)\])?")
_BLOCK = re.compile(r"blocks\.(\d+)\.([\w.]+)")


def from_hooked_transformer(model: nn.Module, *, kv: str = "each") -> Model:
    """A Model that computes with a HookedTransformer's own weights.

    Every matrix is shared, not copied: writing into `model.blocks[0].attn.W_Q` in place is seen here. Only b_Q, b_K and
    b_V are gathered into one tensor of (H + 2G)K numbers a layer, which follows them, and a folded norm (LNPre, RMSPre)
    gets γ = 1. Whatever the module computes with counts: weights as trained or processed (folded, centred, refactored),
    queries grouped or not. The flags use_attn_result, use_split_qkv_input, use_attn_in, use_hook_mlp_in and
    ungroup_grouped_query_attention may be on or off.

    Args:
        model: a HookedTransformer of TransformerLens 2 or 3 with no hook attached: of the kinds of GPT-2, GPT-NeoX,
            GPT-J, Llama, Mistral, Qwen, Gemma and OLMo 2, or attention-only; auto-circuit's PatchableModel of one; or a
            TransformerBridge of release 3 or 4 without processed weights.
        kv: "each" or "grouped" as `load`; with "each" receivers are those of ungroup_grouped_query_attention.

    Raises:
        ValueError: another module, or one with something that is not supported; it is named.
    """
    kinds = {base.__name__ for base in type(model).__mro__}
    if not isinstance(model, nn.Module) or not kinds & {"HookedTransformer", "TransformerBridge", "PatchableModel"}:
        raise ValueError(
            f"expected a HookedTransformer or a TransformerBridge of TransformerLens, got a {type(model).__name__}"
        )
    return load(model, kv=kv)


def sender_hook(graph: Graph, name: str) -> str:
    """The hook that holds what a sender adds to the residual stream.

    >>> sender_hook(Graph(12, 12, True), "a3.h7")
    'blocks.3.attn.hook_result[7]'
    """
    graph.sender(name)
    if name == "embed":
        return "hook_embed"
    if name.startswith("m"):
        return f"blocks.{name[1:]}.hook_mlp_out"
    layer, head = name[1:].split(".h")
    return f"blocks.{layer}.attn.hook_result[{head}]"


def receiver_hook(graph: Graph, name: str) -> str:
    """The hook that holds the residual stream which a receiver reads.

    >>> receiver_hook(Graph(12, 12, True), "a5.h2<q>")
    'blocks.5.hook_q_input[2]'
    """
    graph.receiver(name)
    if name == "logits":
        return f"blocks.{graph.n_layers - 1}.hook_resid_post"
    if name.startswith("m"):
        return f"blocks.{name[1:]}.hook_mlp_in"
    layer, head, part = name[1:].replace(".kv", ".h").replace("<", ".h").removesuffix(">").split(".h")
    return f"blocks.{layer}.hook_{part}_input[{head}]"


def sender_of_hook(graph: Graph, hook: str) -> str:
    """The sender whose output a hook holds; `[7]` and `[:, :, 7]` both name a head.

    Raises:
        ValueError: a hook that holds no sender's output.
    """
    name, head = _split(hook)
    match = _BLOCK.fullmatch(name)
    found = None
    if head is None and name in ("hook_embed", "blocks.0.hook_resid_pre"):
        return "embed"
    if match and match[2] == "attn.hook_result" and head is not None:
        found = f"a{match[1]}.h{head}"
    if match and match[2] == "hook_mlp_out" and head is None:
        found = f"m{match[1]}"
    if found is None:
        raise ValueError(
            f"a sender's hook is hook_embed, blocks.0.hook_resid_pre, blocks.<l>.attn.hook_result[<h>] or "
            f"blocks.<l>.hook_mlp_out, got {hook!r}"
        )
    graph.sender(found)
    return found


def receiver_of_hook(graph: Graph, hook: str) -> str:
    """The receiver that reads what a hook holds; `[2]` and `[:, :, 2]` both name a head.

    Raises:
        ValueError: a hook that no single receiver reads.
    """
    name, head = _split(hook)
    match = _BLOCK.fullmatch(name)
    found = None
    if match and re.fullmatch("hook_[qkv]_input", match[2]) and head is not None:
        each = "h" if match[2][5] == "q" or graph.n_kv is None else "kv"
        found = f"a{match[1]}.{each}{head}<{match[2][5]}>"
    if match and match[2] in ("hook_mlp_in", "hook_resid_mid") and head is None and graph.has_mlp:
        found = f"m{match[1]}"
    if match and match[2] == "hook_resid_post" and head is None and int(match[1]) == graph.n_layers - 1:
        found = "logits"
    if found is None:
        raise ValueError(
            f"a receiver's hook is blocks.<l>.hook_<q|k|v>_input[<h>], blocks.<l>.hook_mlp_in or "
            f"blocks.{graph.n_layers - 1}.hook_resid_post, got {hook!r}"
        )
    graph.receiver(found)
    return found


def _split(hook: str) -> tuple[str, int | None]:
    """A hook's name and the head in brackets behind it, None for no brackets or for all of `[:]`."""
    match = _NODE.fullmatch(hook)
    if match is None:
        return hook, None
    return match["hook"], int(match["head"]) if (match["head"] or "").isdigit() else None
