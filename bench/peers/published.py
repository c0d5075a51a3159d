"""Edge attribution patching as published tools run it: TransformerLens's hooks, and auto-circuit.

Both need their packages; tests/interop/run.sh makes an environment with them. "transformer-lens": a HookedTransformer
with use_split_qkv_input, use_attn_result and use_hook_mlp_in, hooked as EAP-IG does it, its weights requiring gradients
as from_pretrained and EAP-IG leave them; "…, frozen" without those. "auto-circuit": mask_gradient_prune_scores, which
its authors call the fast equivalent of their edge_attribution_patching_prune_scores, on a patchable model without
gradients of weights, as its own load_tl_model makes it.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from functools import partial

import bench_interop
import torch
from torch import Tensor

from eapcore.models.model import Model
from eapcore.tasks import PromptPairs

PACKAGES = {"transformer-lens": "transformer_lens", "auto-circuit": "auto_circuit"}


def why_not(name: str) -> str:
    """Why an implementation cannot run here, in one sentence; "" if it can."""
    package = name.partition(",")[0]
    if importlib.util.find_spec(PACKAGES[package]) is not None:
        return ""
    return f"{package} is not installed (tests/interop/environment-2.16.txt is an environment that has it)"


def hooked_transformer(model: Model):
    """A HookedTransformer with a model's weights, copied."""
    config, weights = model.config, model.weights
    sizes = (config.n_layers, config.n_heads, config.d_model, config.d_vocab)
    hooked = bench_interop.hooked_model(sizes, model.dtype)

    def fill(target: Tensor, value: Tensor | float) -> None:
        target.copy_(torch.as_tensor(value))

    with torch.no_grad():
        fill(hooked.embed.W_E, weights.w_e)
        fill(hooked.pos_embed.W_pos, weights.w_pos[: hooked.cfg.n_ctx])
        fill(hooked.unembed.W_U, weights.w_u)
        fill(hooked.unembed.b_U, 0.0 if weights.b_u is None else weights.b_u)
        norms = [(hooked.ln_final, weights.ln_final)]
        for block, layer in zip(hooked.blocks, weights.layers, strict=True):
            norms += [(block.ln1, layer.ln1), (block.ln2, layer.ln2)]
            w_qkv, b_qkv = torch.cat(layer.w_qkv).chunk(3), layer.b_qkv.chunk(3)
            for letter, w, b in zip("QKV", w_qkv, b_qkv, strict=True):
                fill(getattr(block.attn, f"W_{letter}"), w)
                fill(getattr(block.attn, f"b_{letter}"), b)
            fill(block.attn.W_O, layer.w_o)
            fill(block.attn.b_O, layer.b_o)
            for name, value in (("W_in", layer.w_in), ("b_in", layer.b_in), ("W_out", layer.w_out)):
                fill(getattr(block.mlp, name), value)
            fill(block.mlp.b_out, layer.b_out)
        for norm, (gamma, beta) in norms:
            fill(norm.w, gamma)
            fill(norm.b, beta)
    return hooked


def implementation(name: str, model: Model, pairs: PromptPairs, batch: int) -> Callable[[], Tensor]:
    """A call that scores every edge batch by batch, [S, R]; of every batch the same number of pairs."""
    hooked = hooked_transformer(model)
    batches = list(pairs.batches(batch))
    sys.path.insert(0, str(bench_interop.ROOT / "tests" / "interop"))
    if name == "auto-circuit":
        return _auto_circuit(hooked, model, batches)
    if name == "transformer-lens":
        hooked.requires_grad_(True)
    else:  # the gradient has to start at the embedding then
        hooked.embed.requires_grad_(True)
    from hooked_scores import hooked_scores

    def run() -> Tensor:
        total = torch.zeros(model.graph.n_senders, model.graph.n_receivers, dtype=model.dtype)
        for part in batches:
            label = torch.cat([part.answers, part.wrong], 1)
            metric = partial(bench_interop.logit_diff, label=label)
            total += hooked_scores(hooked, part.clean, part.corrupt, metric) * len(part)
        return total / len(pairs)

    return run


def _auto_circuit(hooked, model: Model, batches: list[PromptPairs]) -> Callable[[], Tensor]:
    from auto_circuit.data import PromptDataLoader, PromptDataset
    from auto_circuit.prune_algos.mask_gradient import mask_gradient_prune_scores
    from auto_circuit.utils.graph_utils import patchable_model

    from eapcore.interop.auto_circuit import from_prune_scores

    columns = (torch.cat([getattr(part, column) for part in batches]) for column in ("clean", "corrupt", "answers"))
    clean, corrupt, answers = (list(column) for column in columns)
    data = PromptDataset(clean, corrupt, answers, list(torch.cat([part.wrong for part in batches])))
    loader = PromptDataLoader(data, seq_len=None, diverge_idx=0, batch_size=len(batches[0]), shuffle=False)
    patchable = patchable_model(
        hooked, factorized=True, slice_output="last_seq", separate_qkv=True, device=torch.device("cpu")
    )

    def run() -> Tensor:
        found = mask_gradient_prune_scores(
            patchable, loader, None, grad_function="logit", answer_function="avg_diff", mask_val=0.0
        )
        return from_prune_scores(found, model.graph, n_batches=len(batches)).scores

    return run
