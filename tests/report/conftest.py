"""Runs as their commands write them, of a small graph, that the report's tests read."""

import json

import pytest
from runs import EVIL, random_scores

from eapcore.graph.graph import Graph


@pytest.fixture(scope="session")
def write_run(tmp_path_factory):
    """A function that writes a run folder with every part: (graph, seed, name) → folder."""

    def write(graph=None, seed=0, name="small"):
        graph = graph or Graph(3, 4, True)
        folder = tmp_path_factory.mktemp("runs") / f"run{seed}"
        folder.mkdir()
        scores = random_scores(graph, seed, positions=5, name=name)
        scores.save(folder / "scores.safetensors")
        circuit = scores.top_n(30)
        circuit.save(folder / "circuit.json")
        top = scores.top(12)
        curve = {
            "sizes": [10, 60, 262],
            "faithfulness": [0.25, 0.75, 1.0],
            "intervals": [[0.1, 0.4], [0.6, 0.9], [1, 1]],
        }
        roc = {"fpr": [0, 0.1, 1], "tpr": [0, 0.8, 1], "auc": 0.85, "rule": "trapezoid"}
        roc["edge_set"] = {"n_true": 30, "n_edges": 262}
        parts = {
            "run": {"command": f"eapcore run --model {name}", "curve": curve},
            "evaluation": {"mib": {"cpr": 0.7, "cmd": 0.2, "signed": curve, "absolute": curve}, "rocs": [roc]},
            "verification": {
                "edges": [edge for edge, _ in top],
                "estimates": [score for _, score in top],
                "effects": [score * 1.25 for _, score in top],
            },
            "prompts": {
                "n_pairs": 2,
                "pairs": [
                    {
                        "clean": ["The", " king", EVIL, " is"],
                        "corrupt": ["The", " queen", EVIL, " is"],
                        "position": 3,
                        "answers": [" he"],
                        "wrong": [" she"],
                        "named": {"subject": 1},
                    }
                ],
            },
        }
        for part, content in parts.items():
            content = {"format": f"eapcore-{part}", "format_version": 1, **content}
            (folder / f"{part}.json").write_text(json.dumps(content), encoding="utf-8")
        return folder

    return write


@pytest.fixture(scope="session")
def folder(write_run):
    return write_run(name=EVIL)


@pytest.fixture(scope="session")
def other(write_run):
    return write_run(seed=1)
