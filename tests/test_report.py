"""The report and the README hold what the committed results say."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

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


def test_report_is_that_of_the_committed_results() -> None:
    assert (ROOT / "report" / "report.pdf").read_bytes() == report_build.build(PUBLISHED[0])


def test_readme_tables_are_those_of_the_committed_results() -> None:
    text = (ROOT / "README.md").read_text()
    assert text == report_build.fill_readme(text, PUBLISHED[0])


def test_a_missing_number_is_an_error(copied_set: Path) -> None:
    path = copied_set / "results" / "04_depth.json"
    values = json.loads(path.read_text())
    del values["networks"]["ResNet-34"]["costs"]["parameters"]
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="parameters"):
        report_build.build(copied_set)


def test_a_missing_figure_is_an_error(copied_set: Path) -> None:
    (copied_set / "figures" / "04_cost.png").unlink()
    with pytest.raises(ValueError, match="04_cost.png"):
        report_build.build(copied_set)


def test_a_changed_number_changes_the_report(copied_set: Path) -> None:
    before = report_build.build(copied_set)
    path = copied_set / "results" / "03_regularization.json"
    values = json.loads(path.read_text())
    values["epochs"] += 1
    path.write_text(json.dumps(values))
    assert report_build.build(copied_set) != before


def test_no_results_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="make study"):
        report_build.build(tmp_path / "nothing")


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda p: p.name)
def test_published_figures_are_small(folder: Path) -> None:
    figures = list((folder / "figures").glob("*.png"))
    assert len(figures) >= 20
    assert all(figure.stat().st_size <= 300_000 for figure in figures)
