"""Makes tests/interop/fixtures with the real packages, in the environment of TransformerLens 2.16.1.

    git clone https://github.com/hannamw/EAP-IG     # version 2.0.0, commit 795f560
    PYTHONPATH=. build/interop/tl-2.16/bin/python tests/interop/make_fixtures.py EAP-IG

For a GPT-2-like and an attention-only model: the weights as TransformerLens names them, logits as trained and folded,
tokens of padded prompts, EAP-IG's scores by every method and its two graph files, auto-circuit's PruneScores.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from hooked_models import BATCHES, PAIRS, hooked_transformer, logit_diff, text_batches
from safetensors.torch import save_file
from torch import Tensor

HERE = Path(__file__).resolve().parent / "fixtures"
METHODS = {
    "eap": {"method": "EAP"},
    "eap_ig_inputs_3": {"method": "EAP-IG-inputs", "ig_steps": 3},
    "clean_corrupted": {"method": "clean-corrupted"},
    "zero": {"method": "EAP", "intervention": "zero"},
    "mean": {"method": "EAP", "intervention": "mean"},
    "mean_positional": {"method": "EAP", "intervention": "mean-positional"},
    "eap_mean_over_d_model": {"method": "EAP", "aggregation": "mean"},
    "eap_ig_activations_2": {"method": "EAP-IG-activations", "ig_steps": 2},
    "eap_ig_activations_zero": {"method": "EAP-IG-activations", "ig_steps": 2, "intervention": "zero"},
}


def on_this_device() -> None:
    """EAP-IG writes device="cuda" into its allocations."""
    zeros = torch.zeros

    def here(*args: object, **options: object) -> Tensor:
        return zeros(
            *args, **{**options, "device": "cpu" if options.get("device") == "cuda" else options.get("device")}
        )

    torch.zeros = here


def eap_ig(model, folder: Path) -> dict[str, Tensor]:
    from eap.attribute import attribute
    from eap.graph import Graph

    batches = text_batches()
    # mean-positional needs prompts of one length.
    one_length = [([PAIRS[1][0], PAIRS[1][1]], [PAIRS[1][1], PAIRS[1][0]], batches[0][2][1:2].repeat(2, 1))]
    scores = {}
    for name, options in METHODS.items():
        graph = Graph.from_model(model)
        graph.scores = graph.scores.double()
        given = one_length if name == "mean_positional" else batches
        mean = {"intervention_dataloader": given} if "mean" in options.get("intervention", "") else {}
        attribute(model, graph, given, logit_diff, quiet=True, **options, **mean)
        scores[name] = graph.scores.clone()
        if name == "eap":
            mask = graph.real_edge_mask
            graph.apply_topn(20, absolute=True)
            graph.to_json(folder / "eap.json")
            graph.to_pt(folder / "eap.pt")
            scores["eap_top_20"] = graph.in_graph.double()
            scores["eap_nodes"] = graph.nodes_in_graph.double()
            scores["edge_mask"] = mask.double()
    return scores


def auto_circuit(model, tokens: list[tuple[Tensor, Tensor, Tensor]], seq_len: int | None) -> dict[str, Tensor]:
    from auto_circuit.data import PromptDataLoader, PromptDataset
    from auto_circuit.prune_algos.mask_gradient import mask_gradient_prune_scores
    from auto_circuit.utils.graph_utils import patchable_model

    clean, corrupt, answer = (torch.cat([batch[i] for batch in tokens]) for i in range(3))
    data = PromptDataset(list(clean), list(corrupt), list(answer[:, :1]), list(answer[:, 1:]))
    loader = PromptDataLoader(data, seq_len=seq_len, diverge_idx=0, batch_size=len(clean), shuffle=False)
    patchable = patchable_model(
        model, factorized=True, slice_output="last_seq", seq_len=seq_len, separate_qkv=True, device=torch.device("cpu")
    )
    return mask_gradient_prune_scores(
        patchable, loader, None, grad_function="logit", answer_function="avg_diff", mask_val=0.0
    )


def main(eap_ig_checkout: str) -> None:
    sys.path.insert(0, str(Path(eap_ig_checkout) / "src"))
    on_this_device()
    from transformer_lens.utils import get_attention_mask

    for kind, attn_only in (("gpt2-like", False), ("attn-only", True)):
        folder = HERE / kind
        folder.mkdir(parents=True, exist_ok=True)
        model = hooked_transformer(attn_only, tokenizer=True)
        case: dict[str, Tensor] = {}
        for i, (clean, corrupt, label) in enumerate(text_batches()):
            tokens = model.to_tokens(clean, prepend_bos=True, padding_side="right", truncate=False)
            case[f"clean_{i}"] = tokens
            case[f"corrupt_{i}"] = model.to_tokens(corrupt, prepend_bos=True, padding_side="right", truncate=False)
            case[f"lengths_{i}"] = get_attention_mask(model.tokenizer, tokens, True).sum(1)
            case[f"label_{i}"] = label
        generator = torch.Generator().manual_seed(7)
        vocabulary = model.cfg.d_vocab
        prompts = torch.randint(2, vocabulary, (4, 6), generator=generator)
        other = torch.randint(2, vocabulary, (4, 6), generator=generator)
        answer = torch.randint(2, vocabulary, (4, 2), generator=generator)
        case |= {"prompts": prompts, "other": other, "answer": answer, "logits": model(prompts).detach()}
        case |= {f"weights.{name}": tensor for name, tensor in model.state_dict().items() if "mask" not in name}
        case = {name: tensor for name, tensor in case.items() if "IGNORE" not in name}
        fields = {k: v for k, v in vars(model.cfg).items() if isinstance(v, str | int | float | bool | None)}

        scores = eap_ig(model, folder)
        case |= {f"eap_ig.{name}": tensor for name, tensor in scores.items()}
        for name, seq_len in (("prune_scores", None), ("prune_scores_by_position", 6)):
            fresh = hooked_transformer(attn_only)
            found = auto_circuit(fresh, [(prompts, other, answer)], seq_len)
            case |= {f"{name}.{module}": tensor.detach() for module, tensor in found.items()}

        folded = hooked_transformer(attn_only, tokenizer=True)
        folded.process_weights_(fold_ln=True, center_writing_weights=True, center_unembed=True)
        case["folded_logits"] = folded(prompts).detach()
        case |= {
            f"folded.{name}": tensor
            for name, tensor in folded.state_dict().items()
            if "mask" not in name and "IGNORE" not in name
        }
        case = {name: tensor.contiguous().clone() for name, tensor in case.items()}
        save_file(case, folder / "case.safetensors")
        names = {
            "cfg": fields, "folded_normalization": folded.cfg.normalization_type, "batches": len(BATCHES),
            "texts": [[clean, corrupt] for clean, corrupt, _ in text_batches()],
        }  # fmt: skip
        (folder / "case.json").write_text(json.dumps(names, indent=1))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
