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
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from eapcore.models.model import Model
from eapcore.tasks import PromptPairs

sys.path.append(str(Path(__file__).resolve().parents[2] / "tests" / "interop"))
from hooked_scores import hooked_scores

PACKAGES = {"transformer-lens": "transformer_lens", "auto-circuit": "auto_circuit"}


def why_not(name: str) -> str:
    """Why an implementation cannot run here, in one sentence; "" if it can."""
    package = name.partition(",")[0]
    if importlib.util.find_spec(PACKAGES[package]) is not None:
        return ""
    return f"{package} is not installed (tests/interop/environment-2.16.txt is an environment that has it)"


def hooked_model(sizes: tuple[int, int, int, int], dtype: torch.dtype):
    """A HookedTransformer with random, frozen weights; sizes: layers, heads, d_model, vocabulary."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    n_layers, n_heads, d_model, d_vocab = sizes
    config = HookedTransformerConfig(
        n_layers=n_layers, n_heads=n_heads, d_model=d_model, d_head=d_model // n_heads, d_mlp=4 * d_model,
        d_vocab=d_vocab, n_ctx=64, act_fn="gelu_new", normalization_type="LN", device="cpu", dtype=dtype, seed=0,
        use_attn_result=True, use_split_qkv_input=True, use_hook_mlp_in=True,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 3.9 announces that 4 will not have it
        return HookedTransformer(config).requires_grad_(False)


def hooked_transformer(model: Model):
    """A HookedTransformer with a model's weights, copied."""
    config, weights = model.config, model.weights
    hooked = hooked_model((config.n_layers, config.n_heads, config.d_model, config.d_vocab), model.dtype)
    b_u = torch.zeros(config.d_vocab) if weights.b_u is None else weights.b_u
    state = {"embed.W_E": weights.w_e, "pos_embed.W_pos": weights.w_pos[: hooked.cfg.n_ctx]}
    state |= {"unembed.W_U": weights.w_u, "unembed.b_U": b_u}
    norms = {"ln_final": weights.ln_final}
    for index, ((heads,), (mlp,)) in enumerate(weights.layers):
        at = f"blocks.{index}."
        for part, w, b in zip("QKV", torch.cat(heads.w_qkv).chunk(3), heads.b_qkv.chunk(3), strict=True):
            state |= {f"{at}attn.W_{part}": w, f"{at}attn.b_{part}": b}
        state |= {f"{at}attn.W_O": heads.w_o, f"{at}attn.b_O": heads.b_o}
        state |= {f"{at}mlp.{name}": getattr(mlp, name.lower()) for name in ("W_in", "b_in", "W_out", "b_out")}
        norms |= {f"{at}ln1": heads.norm, f"{at}ln2": mlp.norm}
    for place, norm in norms.items():
        state |= {f"{place}.w": norm.gamma, f"{place}.b": norm.beta}
    hooked.load_state_dict(hooked.state_dict() | state)
    return hooked


def logit_diff(logits: Tensor, clean_logits: Tensor, input_lengths: Tensor, label: Tensor) -> Tensor:
    last = logits[torch.arange(len(logits)), input_lengths - 1]
    return (last.gather(1, label[:, :1]) - last.gather(1, label[:, 1:])).mean()


def implementation(name: str, model: Model, pairs: PromptPairs, batch: int) -> Callable[[], Tensor]:
    """A call that scores every edge batch by batch, [S, R]; of every batch the same number of pairs."""
    hooked = hooked_transformer(model)
    batches = list(pairs.batches(batch))
    if name == "auto-circuit":
        return _auto_circuit(hooked, model, batches)
    if name == "transformer-lens":
        hooked.requires_grad_(True)
    else:  # the gradient has to start at the embedding then
        hooked.embed.requires_grad_(True)

    def run() -> Tensor:
        total = torch.zeros(model.graph.n_senders, model.graph.n_receivers, dtype=model.dtype)
        for part in batches:
            metric = partial(logit_diff, label=torch.cat([part.answers, part.wrong], 1))
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
