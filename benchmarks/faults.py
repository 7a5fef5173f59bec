"""Planted faults: does a unit test notice each? (`python -m benchmarks.faults`)

Each of faults.txt is planted in a copy of the project, whose tests of that module are run, and all
others if these don't fail.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from helpers.config import ROOT

# A line each: what goes wrong :: module.function :: what stands there :: what is put there.
FAULTS = (Path(__file__).parent / "faults.txt").read_text().splitlines()


def planted(source: str, function: str, good: str, bad: str) -> str:
    """Return a module's text with a fault in a function; ValueError if it doesn't fit once."""
    node: ast.AST = ast.parse(source)
    for name in function.split("."):
        node = next(part for part in node.body if getattr(part, "name", "") == name)
    lines = source.splitlines(keepends=True)
    before, after = lines[: node.lineno - 1], lines[node.end_lineno :]
    text = "".join(lines[node.lineno - 1 : node.end_lineno])
    if text.count(good) != 1:
        raise ValueError(f"{good!r} stands {text.count(good)} times in {function}; expected once")
    return "".join([*before, text.replace(good, bad), *after])


def first_failure(copy: Path, tests: str) -> str:
    """Return the first test of a copy of the project that fails, or ""."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "2", tests]
    command += ["-k", "not planted_fault"]  # which looks for the faultless text
    environment = os.environ | {"PYTHONPATH": str(copy)}
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    return failed[1] if failed else "" if done.returncode == 0 else done.stdout[-300:]


def markdown() -> str:
    """Plant all (about ten minutes) and return this section of RESULTS.md."""
    rows = ["| fault | in | noticed first by |", "|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "project")
        left_out = shutil.ignore_patterns(".git", ".venv", ".*cache", "runs", "data", "build")
        shutil.copytree(ROOT, copy, ignore=left_out)
        if failed := first_failure(copy, "tests"):
            raise RuntimeError(f"{failed} fails without a fault")
        for what, where, good, bad in (fault.split(" :: ") for fault in FAULTS):
            module, function = where.split(".", 1)
            path, own = copy / "helpers" / f"{module}.py", f"tests/test_{module}.py"
            source = path.read_text()
            path.write_text(planted(source, function, good, bad))
            tests = [own, "tests"] if (copy / own).exists() else ["tests"]
            found = next(filter(None, (first_failure(copy, each) for each in tests)), "**nothing**")
            path.write_text(source)
            rows.append(f"| {what} | {where} | {found.partition('::')[2] or found} |")
            print(rows[-1], file=sys.stderr, flush=True)
    return "\n".join(["## Planted faults", "", "`python -m benchmarks.faults`", "", *rows]) + "\n"


if __name__ == "__main__":
    print(markdown())
