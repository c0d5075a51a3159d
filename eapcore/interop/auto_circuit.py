"""auto-circuit: PruneScores in its order and sign, its names of edges, and prompt pairs of its loaders."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import torch
from torch import Tensor

from eapcore.graph.graph import Graph
from eapcore.graph.scores import EdgeScores
from eapcore.interop.sign import check_sign, sign_to_write, signed, turned
from eapcore.interop.transformer_lens import receiver_hook
from eapcore.tasks.pairs import PromptPairs

_HEAD = re.compile(r"A(\d+)\.(\d+)(?:\.([QKV]))?")
_MLP = re.compile(r"MLP (\d+)")


Module = Annotated[Tensor, "H S' | S' | T H S' | T S'"]  # the edges into one module from the S' senders before it


def to_prune_scores(
    scores: EdgeScores, *, n_batches: int = 1, per_position: bool = False, sign: str = "loss"
) -> dict[str, Module]:
    """Scores as auto-circuit keeps them: for each module that reads the residual stream, a tensor of its edges.

        prune_scores[module][h, s] = −n_batches · score[s, r]        with sign="metric": n_batches · score[s, r]

    auto-circuit differentiates a loss, the negated answer difference, and adds up its mean over every batch: hence the
    sign, and the factor for a data loader of several batches. The senders s are the graph's, in its order.

    Args:
        scores: of a model that auto-circuit patches with separate_qkv=True.
        n_batches: of the data loader whose scores they shall be comparable to.
        per_position: of `scores.per_position`, with a first axis T, for a model that it patches with seq_len=T.
        sign: of what is returned, see `sign.SIGNS`; "loss" is what its own gradients have.

    Returns:
        `blocks.{l}.hook_{q|k|v}_input` [H, s], `blocks.{l}.hook_mlp_in` [s], `blocks.{L-1}.hook_resid_post` [s].

    Raises:
        ValueError: per_position of scores that were not kept by position; scores whose sign is not known.
    """
    graph = scores.graph
    factor = n_batches * (-1 if sign_to_write(scores, sign, "PruneScores") == "loss" else 1)
    values = scores.per_position if per_position else scores.scores
    if values is None:
        raise ValueError("these scores were not kept by position: score with reduce='position'")
    found = {}
    for module, receivers in _modules(graph).items():
        senders = graph.senders_before(receivers[0])
        part = factor * values[..., :senders, receivers].transpose(-1, -2)  # [(T,) H, s]
        found[module] = (part if len(receivers) > 1 or module.endswith("_input") else part.squeeze(-2)).contiguous()
    return found


def from_prune_scores(
    prune_scores: Mapping[str, Module], graph: Graph, *, n_batches: int = 1, sign: str | None = None
) -> EdgeScores:
    """auto-circuit's PruneScores as EdgeScores; the inverse of `to_prune_scores`.

    Args:
        prune_scores: of a model that was patched with factorized=True and separate_qkv=True, with or without seq_len.
        graph: of the same model.
        n_batches: of its data loader.
        sign: of the prune scores, see `sign.SIGNS`: "loss" for those by the gradient of an answer difference or
            probability, "none" for sizes, as its activation magnitudes. With None they are taken for a loss's, and what
            is returned refuses whatever needs the sign.

    Raises:
        ValueError: modules or shapes that are not the graph's.
    """
    check_sign(sign)
    modules = _modules(graph)
    missing, extra = sorted(set(modules) - set(prune_scores)), sorted(set(prune_scores) - set(modules))
    if missing or extra:
        what = f"lack {missing[0]}" if missing else f"have {extra[0]} besides"
        raise ValueError(
            f"the prune scores {what}: are they of another model, or of one that was patched with separate_qkv=False?"
        )
    shapes = {module: _shape(graph, module, receivers) for module, receivers in modules.items()}
    last = f"blocks.{graph.n_layers - 1}.hook_resid_post"
    steps = tuple(prune_scores[last].shape[:-1])
    dtype = torch.promote_types(prune_scores[last].dtype, torch.float32)
    values = torch.zeros(*steps, graph.n_senders, graph.n_receivers, dtype=dtype, device="cpu")
    for module, receivers in modules.items():
        part = prune_scores[module].detach().cpu()
        if tuple(part.shape) != (*steps, *shapes[module]) or len(steps) > 1:
            raise ValueError(
                f"{module} must be {list(shapes[module])}, or with a position axis before it, got {list(part.shape)}"
            )
        senders = shapes[module][-1]
        whole = part if len(shapes[module]) == 2 else part.unsqueeze(-2)
        values[..., :senders, receivers] = turned(whole.transpose(-1, -2).to(dtype), sign or "loss") / n_batches
    meta = signed(sign, {"method": {"source": "auto-circuit"}})
    if steps:
        return EdgeScores(values.sum(0), graph, meta, per_position=values)
    return EdgeScores(values, graph, meta)


def pairs_of_loader(loader: Iterable[Any], *, pad: int | str | None = "unknown") -> PromptPairs:
    """The prompt pairs that a PromptDataLoader of auto-circuit yields, or any iterable of its PromptPairBatch.

    Answers and wrong answers are sets of tokens in both.

    Args:
        loader: without a prefix cache.
        pad: the token that fills prompts up on the left, as its own tokenizing does; it is taken off, but for the one
            in front of every prompt where the tokenizer begins prompts with it. None where all have one length, which a
            loader with a seq_len says itself.

    Raises:
        ValueError: a loader whose prompts are cut behind a cached prefix, or may be padded with an unknown token.
    """
    given: Any = loader
    if getattr(given, "kv_cache", None) is not None or int(getattr(given, "diverge_idx", 0)) > 0:
        raise ValueError(
            "the loader has cut its prompts behind a prefix, whose cache is that of its first batch: load the data "
            "with tail_divergence=False; what prompts share is run once here in any case"
        )
    if pad == "unknown":
        if getattr(loader, "seq_len", None) is None:
            raise ValueError(
                "the loader's prompts may be padded on the left: give pad=model.tokenizer.pad_token_id, or pad=None if "
                "they have one length"
            )
        pad = None
    rows: list[tuple[list[int], list[int], list[int], list[int]]] = []
    for batch in loader:
        parts = (batch.clean, batch.corrupt, batch.answers, batch.wrong_answers)
        rows += [tuple(part[i].flatten().tolist() for part in parts) for i in range(len(batch.clean))]
    whole = getattr(loader, "dataset", None)
    whole = getattr(whole, "dataset", whole)  # of a subset
    prompts = [row[0] for row in rows] + [p.flatten().tolist() for p in getattr(whole, "clean_prompts", ())]
    first = min((_leading(prompt, pad) for prompt in prompts), default=0)
    cut = [[row[i][max(0, _leading(row[i], pad) - min(first, 1)) :] for i in range(2)] for row in rows]
    return PromptPairs.from_lists(
        [clean for clean, _ in cut], [other for _, other in cut], [row[2] for row in rows], [row[3] for row in rows],
        name="auto-circuit",
    )  # fmt: skip


def _leading(prompt: list[int], pad: int | str | None) -> int:
    """How many tokens at a prompt's beginning are padding, or look like it."""
    return next((i for i, token in enumerate(prompt) if token != pad), len(prompt))


def _modules(graph: Graph) -> dict[str, list[int]]:
    """The modules that read the residual stream, each with its receivers in the order of its heads."""
    modules: dict[str, list[int]] = {}
    for r, name in enumerate(graph.receiver_names):
        modules.setdefault(receiver_hook(graph, name).partition("[")[0], []).append(r)
    return modules


def _shape(graph: Graph, module: str, receivers: list[int]) -> tuple[int, ...]:
    senders = graph.senders_before(receivers[0])
    return (len(receivers), senders) if module.endswith("_input") else (senders,)


def edge_to_auto_circuit(graph: Graph, name: str) -> str:
    """An edge's name as auto-circuit writes it.

    >>> edge_to_auto_circuit(Graph(12, 12, True), "a3.h7->a5.h2<q>")
    'A3.7->A5.2.Q'
    """
    graph.edge(name)
    sender, receiver = name.split("->")
    return f"{_their_node(sender)}->{_their_node(receiver)}"


def edge_from_auto_circuit(graph: Graph, name: str) -> str:
    """The inverse of `edge_to_auto_circuit`; ValueError for a name that is no edge of the graph."""
    parts = name.split("->")
    if len(parts) != 2:
        raise ValueError(f"an edge of auto-circuit is written 'A0.1->A1.0.Q', got {name!r}")
    edge = "->".join(_our_node(part) for part in parts)
    graph.edge(edge)
    return edge


def _their_node(name: str) -> str:
    if name in ("embed", "logits"):
        return "Resid Start" if name == "embed" else "Resid End"
    if name.startswith("m"):
        return f"MLP {name[1:]}"
    head, _, part = name.removesuffix(">").partition("<")
    return f"A{head[1:].replace('.h', '.')}" + (f".{part.upper()}" if part else "")


def _our_node(name: str) -> str:
    if name in ("Resid Start", "Resid End"):
        return "embed" if name == "Resid Start" else "logits"
    if match := _MLP.fullmatch(name):
        return f"m{match[1]}"
    if match := _HEAD.fullmatch(name):
        return f"a{match[1]}.h{match[2]}" + (f"<{match[3].lower()}>" if match[3] else "")
    raise ValueError(f"a node of auto-circuit is 'Resid Start', 'A0.1', 'A0.1.Q', 'MLP 0' or 'Resid End', got {name!r}")
