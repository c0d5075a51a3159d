"""The house keeps its floors: who imports whom, what an import costs, and what lies at the root."""

from __future__ import annotations

import ast
import graphlib
import importlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import eapcore

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "eapcore"
# What the README says of the rooms, the highest floor first: {folder: floor}.
ROWS = re.findall(r"^\| (\d) \| ([^|]+) \|", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
FLOORS = {name: int(floor) for floor, names in ROWS for name in re.findall(r"`(\w+)`", names)}
NEIGHBOURS = {("evaluation", "search")}  # who may ask whom on one floor
FAMILIES = re.compile(r"gpt|llama|mistral|qwen|gemma|neox|pythia|olmo|smollm|transformer_?lens", re.I)
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


@cache
def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(name, path, known):
    """The modules that a file imports, at its top or inside a function; eapcore's own ones by their full names."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(parsed(path)):
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


def room(name):
    """The folder that a module lies in; None for what hands names on at the top."""
    parts = name.split(".")
    if parts[1:2] == ["_csrc"]:
        return "kernels"
    return parts[1] if (len(parts) > 1 and (PACKAGE / parts[1]).is_dir()) or parts[1:2] == ["kernels"] else None


def own_imports():
    """(module, module that it imports), of the package's own."""
    known = modules()
    for name, path in known.items():
        for target in imports(name, path, known):
            if target.split(".")[0] == "eapcore":
                yield name, target


def names_in(path):
    """Every name, attribute and text that is no docstring in a file's code, as (line, text)."""
    tree = parsed(path)
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute):
            yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield node.lineno, node.value


def test_the_readme_names_every_room():
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()} | {"kernels"}
    assert set(FLOORS) == folders and sorted(set(FLOORS.values())) == list(range(1, 8))


def test_a_room_imports_from_the_floors_below_it_alone():
    seen = set()
    for name, target in own_imports():
        here, there = room(name), room(target)
        if here is None or here == there or target == "eapcore":  # which version this is
            continue
        assert there is not None, f"{name} imports {target}, which hands names on to users: use the full name"
        allowed = FLOORS[there] < FLOORS[here] or (here, there) in NEIGHBOURS
        assert allowed, f"{name}, floor {FLOORS[here]}, imports {target}, floor {FLOORS[there]}"
        seen.add((here, there))
    assert len(seen) > 25
    assert ("attribution", "patching") not in seen and ("patching", "attribution") not in seen
    assert not {there for here, there in seen if here == "models"} - {"graph", "kernels", "text"}
    assert not {there for here, there in seen if here == "report"} - {"graph"}


def test_nobody_imports_a_module_from_the_package_itself():
    public = {"__version__", *eapcore.__all__}
    for name, path in modules().items():
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.ImportFrom) and node.module == "eapcore" and not node.level:
                assert {alias.name for alias in node.names} <= public, name


def test_no_two_files_import_each_other():
    known = modules()
    graph = {name: {t for t in imports(name, path, known) if t in known} for name, path in known.items()}
    # The lazy front names what it would import when asked.
    del graph["eapcore"]
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert order.index("eapcore.graph.graph") < order.index("eapcore.graph.scores")
    assert order.index("eapcore.graph.scores") < order.index("eapcore.attribution.attribute")


def test_devices_and_processes_are_execution_s_affair():
    for name, path in modules().items():
        if room(name) not in ("execution", "kernels"):
            found = [
                (line, text) for line, text in names_in(path) if "torch.cuda" in text or "torch.distributed" in text
            ]
            assert not found, f"{name} knows of devices or processes: {found}"


def test_a_family_is_named_in_its_own_file_alone():
    """In code: prose, messages and help may name what a user would know. checkpoint.py has the Hub's ids of some."""
    seen = 0
    for name, path in modules().items():
        if name.startswith("eapcore.models.families"):
            seen += bool(FAMILIES.search(path.stem))
            continue
        if room(name) not in ("graph", "execution", "attribution", "patching", "search", "evaluation", "models"):
            continue
        for line, text in names_in(path):
            word = len(text.split()) == 1  # a message or help is several words
            hub = name == "eapcore.models.checkpoint" and ("gpt2" in text)
            assert not (word and FAMILIES.search(text)) or hub, f"{path.name}:{line} names a family: {text}"
    assert seen >= 2


def test_the_kernels_know_nothing_of_the_rest():
    known = modules()
    for name, path in known.items():
        if name.startswith("eapcore.kernels"):
            own = {t for t in imports(name, path, known) if t.split(".")[0] == "eapcore"}
            assert all(t == "eapcore._csrc" or t.startswith("eapcore.kernels") for t in own), name


def test_nobody_imports_a_top_level_package_named_kernels():
    known = modules()
    files = known | {str(p): p for folder in ("tests", "bench") for p in (ROOT / folder).rglob("*.py")}
    for name, path in files.items():
        assert not {t for t in imports(name, path, known) if t.split(".")[0] == "kernels"}, name


def test_metrics_know_no_graph_and_the_graph_no_torch_module():
    known = modules()
    metrics = "eapcore.tasks.metrics"
    assert not {t for t in imports(metrics, known[metrics], known) if t.startswith("eapcore")}
    for name in ("graph", "scores", "circuit", "paths", "files"):
        full = f"eapcore.graph.{name}"
        assert not {t for t in imports(full, known[full], known) if "nn" in t.split(".")}


def test_heavy_packages_are_imported_inside_functions_only():
    heavy = {"triton", "transformers", "tokenizers", "huggingface_hub", "tqdm", "matplotlib"}
    for name, path in modules().items():
        if name.startswith("eapcore.kernels.triton_") or name == "eapcore.toys.train":
            continue  # loaded when a Triton kernel is called; a program of its own
        for node in parsed(path).body:
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
    assert "eapcore.attribution.attribute" in result["modules"]
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
    assert set(eapcore.__all__) <= set(dir(eapcore))
    with pytest.raises(AttributeError, match="module 'eapcore' has no attribute 'atribute'; it has Circuit, "):
        _ = eapcore.atribute


def test_no_two_test_files_have_one_name():
    """pytest takes a second one for the first."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names)), sorted(name for name in set(names) if names.count(name) > 1)


def test_the_root_holds_what_it_should_and_nothing_else():
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "-c", "safe.directory=*", "ls-files"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = {line.split("/")[0].strip('"') for line in done.stdout.splitlines()}
    assert {name for name in found if not name.startswith(".")} <= AT_THE_ROOT
    assert {"pyproject.toml", "csrc", "eapcore", "kernels", "tests", "LICENSE"} <= found
