"""The house keeps its floors: who imports whom, what an import costs, and what lies at the root."""

from __future__ import annotations

import ast
import graphlib
import importlib
import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import eapcore

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "eapcore"
# The lowest floor first; a file belongs to the longest name that it begins with.
FLOORS = [
    ("eapcore._csrc", "eapcore.kernels"),
    ("eapcore.config", "eapcore.graph", "eapcore.circuit", "eapcore.nodes", "eapcore.metrics", "eapcore.tasks"),
    (
        "eapcore.weights",
        "eapcore.products",
        "eapcore.modes",
        "eapcore.model",
        "eapcore.rules",
        "eapcore.gradient",
        "eapcore.paired",
        "eapcore.planner",
    ),
    (
        "eapcore.methods",
        "eapcore.ablation",
        "eapcore.softmax",
        "eapcore.window",
        "eapcore.batches",
        "eapcore.passes",
        "eapcore.attribution",
    ),
    ("eapcore.runs", "eapcore.partial", "eapcore.patch"),
    ("eapcore.acdc", "eapcore.compare", "eapcore.evaluate", "eapcore.truth", "eapcore.toys"),
    ("eapcore.report", "eapcore.interop"),
    ("eapcore", "eapcore.cli", "eapcore.cli_options", "eapcore.cli_verify", "eapcore.__main__"),
]
AT_THE_ROOT = {
    "pyproject.toml",
    "csrc",
    "eapcore",
    "kernels",
    "tests",
    "bench",
    "README.md",
    "LICENSE",
    "constraints.txt",
}


def modules():
    """Every module's name and file; kernels/ at the root is eapcore.kernels."""
    found = {}
    for folder, prefix in ((PACKAGE, "eapcore"), (ROOT / "kernels", "eapcore.kernels")):
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join([prefix, *(p for p in parts if p != "__init__")])] = path
    return found


def imports(name, path, known):
    """The modules that a file imports, at its top or inside a function; eapcore's own ones by their full names."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                upper = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*upper, *([base] if base else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield inner if inner in known or inner == "eapcore._csrc" else base


def floor(name):
    """(floor, room) of a module."""
    rooms = [(room, level) for level, names in enumerate(FLOORS) for room in names]
    fitting = [
        (room, level) for room, level in rooms if name == room or (name.startswith(room + ".") and room != "eapcore")
    ]
    assert fitting, f"{name} stands on no floor: give it one in FLOORS"
    room, level = max(fitting, key=lambda pair: len(pair[0]))
    return level, room


def test_a_file_imports_from_its_own_floor_and_lower_ones_only():
    known = modules()
    seen = 0
    for name, path in known.items():
        for target in imports(name, path, known):
            if target != "eapcore" and not target.startswith("eapcore."):
                continue
            assert floor(target)[0] <= floor(name)[0], f"{name} imports {target}, which is on a higher floor"
            seen += 1
    assert seen > 40


def test_no_two_files_import_each_other():
    known = modules()
    graph = {name: {t for t in imports(name, path, known) if t in known} for name, path in known.items()}
    # The lazy front names what it would import when asked.
    del graph["eapcore"]
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert order.index("eapcore.graph") < order.index("eapcore.circuit") < order.index("eapcore.attribution")


def test_the_kernels_know_nothing_of_the_rest():
    known = modules()
    for name, path in known.items():
        if name.startswith("eapcore.kernels"):
            own = {t for t in imports(name, path, known) if t.split(".")[0] == "eapcore"}
            assert all(t == "eapcore._csrc" or t.startswith("eapcore.kernels") for t in own), name


def test_nobody_imports_a_top_level_package_named_kernels():
    known = modules()
    files = known | {f"tests.{p.stem}": p for p in Path(__file__).parent.glob("*.py")}
    files |= {f"bench.{p.stem}": p for p in (ROOT / "bench").glob("*.py")}
    for name, path in files.items():
        assert not {t for t in imports(name, path, known) if t.split(".")[0] == "kernels"}, name


def test_metrics_know_no_graph_and_the_graph_no_torch_module():
    known = modules()
    assert not {t for t in imports("eapcore.metrics", known["eapcore.metrics"], known) if t.startswith("eapcore")}
    assert not {t for t in imports("eapcore.graph", known["eapcore.graph"], known) if "nn" in t.split(".")}


def test_heavy_packages_are_imported_inside_functions_only():
    heavy = {"triton", "transformers", "tokenizers", "huggingface_hub", "tqdm", "matplotlib"}
    for name, path in modules().items():
        if name.startswith("eapcore.kernels.triton_") or name == "eapcore.toys.train":
            continue  # loaded when a Triton kernel is called; a program of its own
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            bad = {n.split(".")[0] for n in names} & heavy
            assert not bad, f"{name} imports {bad} at its top"


IMPORT = """
import json, sys, time
import torch
before = set(sys.modules)
start = time.process_time()
import eapcore
for name in eapcore.__all__:
    getattr(eapcore, name)
seconds = time.process_time() - start
print(json.dumps({"seconds": seconds, "modules": sorted(set(sys.modules) - before)}))
"""


def test_import_takes_no_heavy_package_and_under_a_second_and_a_half(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error", "-c", IMPORT]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    result = json.loads(done.stdout)
    loaded = {name.split(".")[0] for name in result["modules"]}
    assert "eapcore.attribution" in result["modules"]
    assert not loaded & {"triton", "transformers", "tokenizers", "tqdm", "matplotlib", "scipy", "pandas", "networkx"}
    assert result["seconds"] < 1.5


def test_every_public_name_is_there_and_attribute_stays_the_function():
    for name in modules():
        if name != "eapcore.__main__" and not name.startswith("eapcore.kernels.triton_"):  # triton need not be here
            importlib.import_module(name)
    assert len(eapcore.__all__) >= 9 and eapcore.__all__ == sorted(eapcore.__all__)
    for name in eapcore.__all__:
        value = getattr(eapcore, name)
        assert value.__name__ == name and value.__doc__
    assert inspect.isfunction(eapcore.attribute)
    with pytest.raises(AttributeError, match="module 'eapcore' has no attribute 'atribute'; it has Circuit, "):
        _ = eapcore.atribute


def test_the_root_holds_what_it_should_and_nothing_else():
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "-c", "safe.directory=*", "ls-files"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = {line.split("/")[0].strip('"') for line in done.stdout.splitlines()}
    assert {name for name in found if not name.startswith(".")} <= AT_THE_ROOT
    assert {"pyproject.toml", "csrc", "eapcore", "kernels", "tests", "LICENSE"} <= found
