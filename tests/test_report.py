"""The report and the README hold what the committed results say."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers.config import ROOT

spec = importlib.util.spec_from_file_location("report_build", ROOT / "report" / "build.py")
report_build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(report_build)

PUBLISHED = report_build.published_sets()


@pytest.fixture
def copied_set(tmp_path: Path) -> Path:
    folder = tmp_path / "analysis" / PUBLISHED[0].name
    shutil.copytree(PUBLISHED[0], folder)
    return folder


def results_of(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / "results" / f"{name}.json").read_text())


def change_data(folder: Path, name: str, **changes: str) -> None:
    values = results_of(folder, name)
    values["data"] |= changes
    (folder / "results" / f"{name}.json").write_text(json.dumps(values))


def test_report_is_that_of_the_committed_results() -> None:
    assert (ROOT / "report" / "report.pdf").read_bytes() == report_build.build(PUBLISHED[0])


def test_readme_tables_are_those_of_the_committed_results() -> None:
    text = (ROOT / "README.md").read_text()
    assert text == report_build.fill_readme(text, PUBLISHED[0])


def test_the_readme_s_python_runs(tmp_path: Path) -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("    import os; "))
    end = next(i for i, line in enumerate(lines) if i > start and not line.startswith("    "))
    program = [line.removeprefix("    ") for line in lines[start:end]]
    run = subprocess.run(
        [sys.executable, "-c", "\n".join([*program, "print(tuple(maps.shape))"])],
        cwd=ROOT,
        env=os.environ | {"RUNS_DIR": str(tmp_path), "PROGRESS": "none"},
        capture_output=True,
        text=True,
    )
    assert (run.returncode, run.stdout) == (0, "(8, 16, 16)\n"), run.stderr


def test_a_missing_number_is_an_error(copied_set: Path) -> None:
    values = results_of(copied_set, "04_depth")
    del values["tables"]["accuracy"]
    (copied_set / "results" / "04_depth.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="accuracy"):
        report_build.build(copied_set)


def test_a_missing_figure_is_an_error(copied_set: Path) -> None:
    (copied_set / "figures" / "04_cost.png").unlink()
    with pytest.raises(ValueError, match="04_cost.png"):
        report_build.build(copied_set)


def test_a_changed_number_changes_the_report(copied_set: Path) -> None:
    before = report_build.build(copied_set)
    values = results_of(copied_set, "03_regularization")
    values["epochs"] += 1
    (copied_set / "results" / "03_regularization.json").write_text(json.dumps(values))
    assert report_build.build(copied_set) != before


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("03_regularization", "title"),
        ("03_regularization", "fingerprint"),
        ("06_dataset_size", "title"),  # of another image size than the others
    ],
)
def test_results_of_two_datasets_are_not_mixed(copied_set: Path, name: str, changed: str) -> None:
    expected = results_of(copied_set, name)["data"][changed]
    change_data(copied_set, name, **{changed: "changed"})
    told = f"{name}.json is about .*changed.*{re.escape(expected)}"
    with pytest.raises(ValueError, match=told):
        report_build.build(copied_set)


def test_a_second_dataset_is_no_mixture(copied_set: Path) -> None:
    change_data(copied_set, "08_transfer", title="Digits", fingerprint="0", role="second")
    report_build.build(copied_set)
    change_data(copied_set, "08_transfer", role="study")
    with pytest.raises(ValueError, match="08_transfer.json is about Digits"):
        report_build.build(copied_set)


def test_results_of_a_reader_s_own_notebook_need_no_dataset(copied_set: Path) -> None:
    before = report_build.build(copied_set)
    (copied_set / "results" / "10_own.json").write_text('{"value": 1}')
    assert report_build.build(copied_set) == before


def test_no_results_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="make study"):
        report_build.build(tmp_path / "nothing")


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda p: p.name)
def test_published_figures_are_small(folder: Path) -> None:
    figures = list((folder / "figures").glob("*.png"))
    assert len(figures) >= 20
    assert all(figure.stat().st_size <= 300_000 for figure in figures)
