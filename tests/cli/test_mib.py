"""eapcore mib: one table of methods, and scores as the benchmark's leaderboard takes them."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import save_file

import eapcore.patching.circuits as circuits
from eapcore.attribution.attribute import attribute
from eapcore.evaluation.faithfulness import MIB_FRACTIONS, mib
from eapcore.interop.eap_ig.files import GraphFile

METHODS = {"eap": "EAP", "eap-ig": "EAP-IG-inputs", "grad-drop": "grad-drop"}


def test_methods_are_judged_side_by_side_and_written_as_a_submission(eapcore, model, pairs, tmp_path):
    names = ["--as-task", "arc_easy", "--as-model", "Qwen/Qwen2.5"]
    status, printed, _ = eapcore("mib", "--methods", ",".join(METHODS), *names, out="circuits")
    assert status == 0
    content = json.loads((tmp_path / "circuits" / "mib.json").read_text())
    assert content["format"] == "eapcore-mib-table" and [row["method"] for row in content["rows"]] == [*METHODS]
    for row in content["rows"]:
        scores = attribute(model, pairs, "logit_diff", method=row["method"])
        expected = mib(model, pairs, "logit_diff", scores)
        found = row["judged"]
        assert found["cpr"] == pytest.approx(expected.cpr, rel=1e-5)
        assert found["cmd"] == pytest.approx(expected.cmd, rel=1e-5)
        assert found["signed"]["fractions"] == list(MIB_FRACTIONS)
        assert found["signed"]["cpr_interval"] == pytest.approx(list(expected.signed.cpr_interval), rel=1e-5)
        assert row["folder"] == f"{METHODS[row['method']]}_patching_edge/arc-easy_Qwen-Qwen2.5/importances.json"
        raw = json.loads((tmp_path / "circuits" / row["folder"]).read_text())
        largest = max(raw["edges"].values(), key=lambda edge: edge["score"])["score"]
        turned = scores.scores if row["method"] == "grad-drop" else -scores.scores  # the benchmark takes the largest
        assert largest == pytest.approx(float(turned.max()), rel=1e-5)
        again = GraphFile.load(tmp_path / "circuits" / row["folder"])
        assert torch.allclose(again.scores.scores, scores.scores.double(), atol=1e-6) and again.d_model == 16
        assert f"{row['method']} " in printed and f"{found['cpr']:.6g}" in printed


def test_another_ablation_than_the_leaderboards_is_said(eapcore, tmp_path):
    status, printed, _ = eapcore("mib", "--methods", "eap", "--ablation", "mean", out="circuits")
    assert status == 0 and "carried mean here; the leaderboard's evaluation patches them (corrupt)" in printed


def test_that_the_leaderboard_norms_heads_otherwise_is_said(eapcore, tmp_path):
    sizes = {"vocab_size": 29, "hidden_size": 12, "intermediate_size": 8, "num_hidden_layers": 1, "head_dim": 4}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}
    shapes = {"embed_tokens": (29, 12), "norm": (12,)} | {
        f"layers.0.{name}": shape
        for name, shape in {
            "self_attn.q_proj": (8, 12), "self_attn.k_proj": (4, 12), "self_attn.v_proj": (4, 12),
            "self_attn.o_proj": (12, 8), "mlp.gate_proj": (8, 12), "mlp.up_proj": (8, 12), "mlp.down_proj": (12, 8),
            "input_layernorm": (12,), "post_attention_layernorm": (12,), "pre_feedforward_layernorm": (12,),
            "post_feedforward_layernorm": (12,),
        }.items()
    }  # fmt: skip
    (tmp_path / "gemma").mkdir()
    (tmp_path / "gemma" / "config.json").write_text(json.dumps({"model_type": "gemma2", **sizes}))
    weights = {f"model.{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
    save_file(weights, tmp_path / "gemma" / "model.safetensors")
    for model, said in (([], False), (["--model", "gemma"], True)):
        status, printed, _ = eapcore("mib", "--methods", "eap", *model, out="circuits")
        assert status == 0 and ("there the evaluation norms anew" in printed) == said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "eap,eap"], "each once"),
        (["--methods", ","], "must be one or several"),
        (["--methods", "acdc"], "method must be one of eap, "),
        (["--kv", "grouped"], "--kv must be each"),
    ],
)
def test_what_cannot_be_submitted_is_refused(eapcore, tmp_path, options, message):
    status, printed, _ = eapcore("mib", *options, out="circuits")
    assert status == 2 and message in printed and not (tmp_path / "circuits").exists()


def test_an_interrupted_table_goes_on_where_it_was(eapcore, tmp_path, monkeypatch):
    asked = ["--methods", "eap,screened", "--resume", "kept"]
    assert eapcore("mib", *asked[:3], "apart", out="whole")[0] == 0
    real, runs = circuits.circuit_logits, []

    def interrupted(recording, masks, count=None):
        runs.append(len(recording.batch.pairs))
        if sum(runs) > 4:  # of the first method all, of the second none
            raise KeyboardInterrupt
        return real(recording, masks, count)

    monkeypatch.setattr(circuits, "circuit_logits", interrupted)
    assert eapcore("mib", *asked, out="x")[0] == 130 and not (tmp_path / "x" / "mib.json").exists()
    runs.clear()
    monkeypatch.setattr(circuits, "circuit_logits", lambda *given: (runs.append(1), real(*given))[1])
    status, printed, _ = eapcore("mib", *asked, out="x")
    assert status == 0 and len(runs) == 1 and re.search(r"\neap .* \d\.\d+\n", printed)
    found, expected = (json.loads((tmp_path / x / "mib.json").read_text()) for x in ("x", "whole"))
    assert found["command"].endswith("--methods eap,screened --resume kept")
    for content in (found, expected):
        del content["command"]
        assert all(row.pop("seconds") > 0 for row in content["rows"])
    assert found == expected
    for row in found["rows"]:
        assert (tmp_path / "x" / row["folder"]).read_bytes() == (tmp_path / "whole" / row["folder"]).read_bytes()
    assert eapcore("mib", *asked, out="x")[0] == 0 and len(runs) == 1
    status, printed, _ = eapcore("mib", *asked, "--metric", "prob_diff", out="x")
    assert status == 2 and "kept/eap/scores.0-of-1.safetensors belongs to another metric" in printed
