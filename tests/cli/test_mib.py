"""eapcore mib: one table of methods, and scores as the benchmark's leaderboard takes them."""

from __future__ import annotations

import json

import pytest
import torch

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
