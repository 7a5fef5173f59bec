"""The notebooks as documents: set-up, tags, outputs, and that prose numbers are computed."""

from __future__ import annotations

import re
import subprocess
import sys
import types
from importlib import metadata
from pathlib import Path

import nbformat
import pytest

from helpers import config, notebooks

ROOT = config.ROOT
PATHS = notebooks.find_notebooks()
IGNORED = "nbval-ignore-output"
PROJECT = (ROOT / "pyproject.toml").read_text()
ADDRESS = re.search('^Repository = "(.+)"', PROJECT, re.MULTILINE)[1]


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def code_cells(path: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def prose(path: Path) -> str:
    return "\n\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")


# A number with such a unit in the prose could be a result, which has to be computed. Those below
# are none: titles of papers, thresholds of hypotheses, worked examples.
UNITS = r"%|per cent\b|points?\b|seconds?\b|s\b|minutes?\b|min\b|times\b|kB\b|MB\b|images/s\b"
NUMBERS_IN_PROSE = {
    "01_data": {"94%", "3.29 Seconds"},
    "03_regularization": {"5 points", "80 %", "100 %"},
}


def test_the_series_is_there() -> None:
    names = (
        "data architectures regularization depth gradcam dataset_size training_recipes transfer "
        "pruning"
    )
    expected = [f"{number:02d}_{name}" for number, name in enumerate(names.split(), start=1)]
    assert [path.stem for path in PATHS][:9] == expected


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)
class TestEachNotebook:
    def test_set_up_cell_is_first_and_the_same_everywhere(self, path: Path) -> None:
        cells = code_cells(path)
        assert cells[0].metadata.get("tags") == ["set-up"]
        assert cells[0].source == code_cells(PATHS[0])[0].source
        assert f'ADDRESS = "{ADDRESS}"' in cells[0].source

    def test_it_was_executed_from_the_first_cell_to_the_last_without_errors(
        self, path: Path
    ) -> None:
        counts = [cell.execution_count for cell in code_cells(path)]
        rule = "run it with `python -m helpers.notebooks --publish`"
        assert counts == list(range(1, len(counts) + 1)), rule
        for cell in code_cells(path):
            for output in cell.outputs:
                assert output.output_type != "error", cell.source
                assert output.get("name") != "stderr", (cell.source, output.text)

    def test_no_cell_is_skipped_and_nothing_private_is_called(self, path: Path) -> None:
        for cell in code_cells(path):
            tags = cell.metadata.get("tags", [])
            assert set(tags) <= {IGNORED, "set-up", "answer"}, tags
            assert "NBVAL" not in cell.source.upper()
            assert not re.search(r"\w\._(?!_)", cell.source), cell.source

    def test_it_is_short_without_answers_and_text_comes_between(self, path: Path) -> None:
        cells, lines, row, answered = 0, 0, 0, False
        for cell in reversed(read(path).cells):
            code = cell.source.splitlines() if cell.cell_type == "code" else []
            row = row + 1 if code else 0
            assert row <= 2 and len(code) <= 40, f"a long cell, or three in a row: {cell.source}"
            introduces = answered and not code
            answered = "answer" in cell.metadata.get("tags", [])
            cells += not (answered or introduces)
            lines += 0 if answered else sum(bool(line.strip()) for line in code)
        assert cells <= 60 and lines <= 450, (cells, lines)

    def test_opening_states_question_files_and_run_time(self, path: Path) -> None:
        opening = read(path).cells[0].source
        run_time = "<!-- run time -->.* in the [a-z]+ profile<!-- /run time -->"
        for part in ("^# [0-9][0-9] · ", r"\*\*Question\.", r"\*\*Writes\.", run_time):
            assert re.search(part, opening), f"the first cell lacks {part}"

    def test_size_links_and_absolute_paths(self, path: Path) -> None:
        text = path.read_text()
        assert len(text) < 3_000_000
        assert not re.search(r"/(home|root|work|Users)/", text)

    def test_links_lead_to_files_of_the_repository(self, path: Path) -> None:
        for target in re.findall(r"\]\(((?!https?://|#)[^)]+)\)", prose(path)):
            file = (path.parent / target.split("#")[0]).resolve()
            assert file.exists() and file.is_relative_to(ROOT), target

    def test_prose_states_no_measured_number(self, path: Path) -> None:
        text = re.sub(r"<!-- run time -->.*?<!-- /run time -->", "", prose(path))
        found = re.findall(rf"\b\d[\d,.]*\s?(?:{UNITS})", text)
        assert set(found) <= {"95 %"} | NUMBERS_IN_PROSE.get(path.stem, set())

    def test_figures_named_in_the_opening_are_saved(self, path: Path) -> None:
        opening = read(path).cells[0].source
        code = "\n".join(cell.source for cell in code_cells(path))
        named = set(re.findall(r"`(\d\d_\w+)`", opening))
        assert set(re.findall(r'"(\d\d_\w+)"', code)) - {path.stem} == named - {path.stem}


class TestSetUpCell:
    def run_cell(self, folder: Path, monkeypatch: pytest.MonkeyPatch, colab: bool) -> list[list]:
        """Run the cell in a folder as the kernel's, recording the commands that it starts."""
        source = code_cells(PATHS[0])[0].source.replace("/content/", f"{folder}/content/")
        commands: list[list] = []

        def run(command: list, **_: object) -> None:
            commands.append(command)
            if command[0] == "git":
                (folder / "content" / "resnet-study").mkdir(parents=True)

        monkeypatch.setattr(subprocess, "run", run)
        monkeypatch.setattr(sys, "path", list(sys.path))
        if colab:
            for name in ("google", "google.colab"):
                monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        (folder / "notebooks").mkdir(exist_ok=True)
        monkeypatch.chdir(folder / "notebooks")
        exec(compile(source, "set-up", "exec"), {})
        return commands

    def test_does_nothing_outside_colab(self, tmp_path, monkeypatch) -> None:
        assert self.run_cell(tmp_path, monkeypatch, colab=False) == []
        assert sys.path[0] == str(tmp_path)

    def test_clones_the_one_address_on_colab(self, tmp_path, monkeypatch) -> None:
        commands = self.run_cell(tmp_path, monkeypatch, colab=True)
        clone = commands[0]
        assert clone[:2] == ["git", "clone"] and ADDRESS in clone
        assert not any("torch" in part for command in commands[1:] for part in command)
        assert sys.path[0] == str(tmp_path / "content" / "resnet-study")
        # A second notebook of the same session finds the clone.
        assert self.run_cell(tmp_path, monkeypatch, colab=True) == []


def test_on_colab_a_kernel_gets_what_notebooks_and_helpers_import() -> None:
    needed = notebooks.REQUIREMENTS.read_text().split("# --- only for make")[0]
    installed = set(re.findall(r"^([a-z][\w-]*)", needed, re.MULTILINE))
    assert "torch" in installed and not installed & {"jupyterlab", "pytest", "ruff", "typst"}
    sources = [path.read_text() for path in (ROOT / "helpers").glob("*.py")]
    sources += ["\n".join(cell.source for cell in code_cells(path)) for path in PATHS]
    pattern = re.compile(r"^\s*(?:import|from(?= \S+ import)) (\w+)", re.MULTILINE)
    imported = {name for text in sources for name in pattern.findall(text)}
    # Colab's own, the optional Ray, and what comes with ipywidgets and nbclient.
    imported -= {*sys.stdlib_module_names, "helpers", "google", "ray", "IPython", "traitlets"}
    known = metadata.packages_distributions()  # of few packages before Python 3.12
    for name in imported:
        assert installed & {d.lower().replace("_", "-") for d in known.get(name, [name])}, name


def test_readme_names_every_notebook_and_make_target() -> None:
    text = "".join((ROOT / name).read_text() for name in ("README.md", "GUIDE.md"))
    for path in PATHS:
        assert path.stem in text
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    commands = re.findall(r"(?:`|^    )make ([a-z-]+)", text, re.MULTILINE)
    assert {"study", "test"} <= set(commands)
    for target in commands:
        assert target in targets, target
