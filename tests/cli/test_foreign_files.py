"""Other tools' files on the command line, recognised by what they hold, with their sign asked for."""

from __future__ import annotations

import json

import pytest

from eapcore.interop import acdc_files, eap_ig


def stripped(path):
    """As another tool writes it, without what ours says beside."""
    content = json.loads(path.read_text())
    del content["eapcore"]
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def files(scores, model, tmp_path):
    """Another tool's files by name, of a loss."""
    d_model = model.config.d_model
    found = {name: tmp_path / name for name in ("graph.json", "said.json", "graph.pt", "circuit.json", "edges.json")}
    file = eap_ig.GraphFile.of(scores, d_model)
    for name in ("graph.json", "said.json", "graph.pt"):
        file.save(found[name], sign="loss")
    stripped(found["graph.json"])
    eap_ig.GraphFile(scores.top_n(20), d_model).save(found["circuit.json"])
    acdc_files.save_edges(found["edges.json"], scores)
    return found


def test_scores_of_other_tools_are_read_with_their_sign(eapcore, files, scores):
    signed = [edge for edge, _ in scores.top(5)]
    for name, options in (
        ("graph.json", ["--sign", "loss"]),
        ("edges.json", ["--sign", "loss"]),
        ("said.json", []),
        ("graph.pt", []),
    ):
        status, printed, result = eapcore("verify", "--scores", str(files[name]), "--top-n", "5", *options)
        assert status == 0, printed
        assert result["edges"] == signed
        assert result["estimates"] == pytest.approx([scores[edge] for edge in signed])
    for name in ("graph.json", "edges.json"):
        status, printed, _ = eapcore("verify", "--scores", str(files[name]), "--top-n", "5")
        assert status == 2 and "does not say which way its scores point: give --sign 'metric' if more" in printed
    status, printed, _ = eapcore("verify", "--scores", str(files["said.json"]), "--sign", "metric")
    assert status == 2 and "it says that its sign is 'loss'" in printed
    status, printed, _ = eapcore("verify", "--scores", str(files["circuit.json"]), "--sign", "loss")
    assert status == 2 and "is a circuit without scores" in printed


def test_circuits_of_other_tools_are_read(eapcore, files, scores):
    status, printed, _ = eapcore(
        "patch", "--circuit", str(files["circuit.json"]), "--show", "0", out="effects.safetensors"
    )
    assert status == 0 and "patched  20 edges" in printed
    content = json.loads(files["circuit.json"].read_text())
    content["cfg"]["d_model"] = 7
    files["circuit.json"].write_text(json.dumps(content))
    status, printed, _ = eapcore("patch", "--circuit", str(files["circuit.json"]))
    assert status == 2 and "with d_model 7, but" in printed
    files["circuit.json"].write_text("{")
    status, printed, _ = eapcore("patch", "--circuit", str(files["circuit.json"]))
    assert status == 2 and "must be JSON, but it cannot be read" in printed
