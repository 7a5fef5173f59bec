"""The house: small modules on clear floors, read from the source itself."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from helpers.config import ROOT

# A module imports from lower floors only.
FLOORS = {
    1: "config shapes models corruptions folders numerics",
    2: "data gradcam",
    3: "loader",
    4: "evaluation recipes",
    5: "cam_metrics training finetuning",
    6: "runs",
    7: "executors results plots",
    8: "explorer notebooks",
}
FLOOR = {module: floor for floor, modules in FLOORS.items() for module in modules.split()}
# Which an installation may lack.
OPTIONAL = {"ray", "google", "ipywidgets", "IPython", "torch_pruning"}
MODULES = {path.stem: path for path in sorted((ROOT / "helpers").glob("[!_]*.py"))}
# Lines in all. They may only fall: 4,000 for helpers is where they are to go.
LIMITS = {"helpers": 4678, "benchmarks": 900, "tests": 6570}
ENVIRONMENT = ("config", "notebooks")  # which hands it on to the processes that it starts
LONGEST_MODULE, LONGEST_FUNCTION = 420, 60
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef


def imports(tree: ast.AST) -> Iterator[tuple[ast.stmt, str]]:
    """Every import with the dotted name of what it imports: helpers.data, torch, os.environ."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            yield from ((node, f"{node.module}.{alias.name}") for alias in node.names)


def faults(module: str, source: str) -> list[str]:
    """What breaks the rules in a module's source, each with its line."""
    tree, found = ast.parse(source), []
    for node, name in imports(tree):
        package, *rest = name.split(".")
        if package == "helpers" and FLOOR.get(rest[0], 9) >= FLOOR[module]:
            found.append(f"line {node.lineno} imports {rest[0]}, which isn't on a lower floor")
        if node not in tree.body and package not in OPTIONAL:
            found.append(f"line {node.lineno} imports {package}, not at the top of the file")
        if package in ("matplotlib", "seaborn") and module != "plots":
            found.append(f"line {node.lineno} imports {package}: figures come from plots")
    for node in ast.walk(tree):
        reads = isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")
        if reads and module not in ENVIRONMENT:
            found.append(f"line {node.lineno} reads the environment")
        if isinstance(node, FUNCTIONS) and node.end_lineno - node.lineno >= LONGEST_FUNCTION:
            found.append(f"{node.name} has {node.end_lineno - node.lineno + 1} lines")
    if len(source.splitlines()) > LONGEST_MODULE:
        found.append(f"{module}.py has {len(source.splitlines())} lines")
    return found


def test_every_module_has_its_floor() -> None:
    assert set(MODULES) == set(FLOOR)


@pytest.mark.parametrize("module", MODULES)
def test_modules_are_small_and_look_downwards(module: str) -> None:
    assert not faults(module, MODULES[module].read_text(encoding="utf-8"))


@pytest.mark.parametrize("folder", LIMITS)
def test_there_is_not_too_much_of_anything(folder: str) -> None:
    lines = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in sorted((ROOT / folder).rglob("*.py"))
    }
    assert sum(lines.values()) <= LIMITS[folder], lines


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("from helpers.config import ROOT\nimport torch\nfrom helpers import shapes", 0),
        ("from helpers import config, runs", 1),
        ("import helpers.data\nfrom helpers.nowhere import x", 2),
        ("def f():\n    import ray\n    from google.colab import drive", 0),
        ("def f():\n    from helpers import config\nif True:\n    import torch", 2),
        ("import matplotlib.pyplot as plt", 1),
        ("import os\nhome = os.environ['HOME']", 1),
        ("def f():\n" + "    f()\n" * 59, 0),
        ("class A:\n    def f(self):\n" + "        f()\n" * 60, 1),
        ("x = 1\n" * 421, 1),
    ],
)
def test_faults_are_found(source: str, count: int) -> None:
    assert len(faults("data", source)) == count
