"""Edge attribution patching by TransformerLens hooks, as EAP-IG does it: what the adapter is compared with."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from eapcore.graph.graph import Graph
from eapcore.interop.transformer_lens import receiver_hook, sender_hook


def places(graph: Graph) -> tuple[list[tuple[str, slice]], list[tuple[str, slice]]]:
    """Hook names of the senders and of the receivers, each with its rows or columns of the scores."""
    found: list[dict[str, list[int]]] = [{}, {}]
    for which, (names, hook_of) in enumerate(
        ((graph.sender_names, sender_hook), (graph.receiver_names, receiver_hook))
    ):
        for place, name in enumerate(names):
            found[which].setdefault(hook_of(graph, name).partition("[")[0], []).append(place)
    senders, receivers = ([(hook, slice(p[0], p[-1] + 1)) for hook, p in one.items()] for one in found)
    return senders, receivers


def hooked_scores(
    model, clean: Tensor, corrupt: Tensor, metric: Callable[..., Tensor], method: str = "EAP", *,
    ig_steps: int = 0, mask: Tensor | None = None, kv: str = "each",
) -> Tensor:  # fmt: skip
    """Scores [S, R], mean over pairs, of metric(logits, clean_logits, lengths), which is a mean over the batch.

    model: a HookedTransformer with use_split_qkv_input, use_attn_result and use_hook_mlp_in, and with grouped queries
    ungroup_grouped_query_attention unless kv is "grouped". Where a norm stands behind the heads, one sends its share
    γ∘result/σ of what the norm makes of all.
    """
    cfg = model.cfg
    n_kv = cfg.n_key_value_heads if kv == "grouped" else None
    graph = Graph(cfg.n_layers, cfg.n_heads, not cfg.attn_only, cfg.parallel_attn_mlp, n_kv)
    senders, receivers = places(graph)
    batch, positions = clean.shape
    delta = torch.zeros(batch, positions, graph.n_senders, cfg.d_model, dtype=cfg.dtype)
    scores = torch.zeros(graph.n_senders, graph.n_receivers, dtype=cfg.dtype)
    lengths = torch.full((batch,), positions) if mask is None else mask.sum(1)
    run = model if mask is None else partial(model, attention_mask=mask)

    made: dict[str, Tensor] = {}
    post = "ln1_post" if cfg.use_normalization_before_and_after else "ln1" if cfg.original_architecture else None

    def collect(activation: Tensor, hook: object, *, rows: slice, sign: int) -> None:
        value = activation.detach()
        if value.ndim == 4 and post is not None:
            made[hook.name.split(".")[1]] = value  # until the norm behind says how much of it is sent
            return
        delta[:, :, rows] += sign * (value if value.ndim == 4 else value[:, :, None])

    def share(sigma: Tensor, hook: object, *, rows: slice, sign: int) -> None:
        layer = hook.name.split(".")[1]
        gamma = getattr(model.blocks[int(layer)], post).w.detach()
        delta[:, :, rows] += sign * made[layer] * gamma / sigma.detach()[:, :, None]

    def contract(grad: Tensor, hook: object, *, columns: slice, factor: float) -> None:
        value = grad.detach() if grad.ndim == 4 else grad.detach()[:, :, None]
        before = graph.senders_before(columns.start)
        scores[:before, columns] += factor * torch.einsum("btsd,btrd->sr", delta[:, :, :before], value)

    def collecting(sign: int) -> list:
        hooks = [(hook, partial(collect, rows=rows, sign=sign)) for hook, rows in senders]
        if post is not None:
            for hook, rows in senders:
                if hook.endswith("hook_result"):
                    name = hook.replace("attn.hook_result", f"{post}.hook_scale")
                    hooks.append((name, partial(share, rows=rows, sign=sign)))
        return hooks

    def contracting(factor: float) -> list:
        return [(hook, partial(contract, columns=columns, factor=factor)) for hook, columns in receivers]

    def backward(prompts: Tensor, forward_hooks: list, factor: float) -> None:
        with model.hooks(fwd_hooks=forward_hooks, bwd_hooks=contracting(factor)):
            metric(run(prompts), clean_logits, lengths).backward()
        model.zero_grad()

    with torch.no_grad():
        with model.hooks(fwd_hooks=collecting(1)):
            run(corrupt)
        start = delta[:, :, 0].clone()
        if method == "EAP":
            clean_logits = run(clean)
        else:
            with model.hooks(fwd_hooks=collecting(-1)):
                clean_logits = run(clean)
    if method == "EAP":
        backward(clean, collecting(-1), 1.0)
    elif method == "clean-corrupted":
        backward(clean, [], 0.5)
        backward(corrupt, [], 0.5)
    else:
        way = delta[:, :, 0].clone()  # corrupt − clean of the token embedding
        for k in range(ig_steps):

            def interpolated(activation: Tensor, hook: object, *, alpha: float = k / ig_steps) -> Tensor:
                return (start - alpha * way).requires_grad_()

            backward(clean, [("hook_embed", interpolated)], 1 / ig_steps)
    return scores
