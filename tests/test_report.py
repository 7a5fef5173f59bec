"""The report and the README hold what the committed results say."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from helpers.config import ROOT

spec = importlib.util.spec_from_file_location("report_build", ROOT / "report" / "build.py")
report_build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(report_build)

PUBLISHED = report_build.published_sets()


def a_study_has_run() -> bool:
    """Whether `make study` has replaced committed results here, as the README has one do first."""
    command = ["git", "status", "--porcelain", "--", "analysis"]
    return bool(subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout)


committed = pytest.mark.skipif(a_study_has_run(), reason="a study has replaced committed results")


@pytest.fixture
def copied_set(tmp_path: Path) -> Path:
    folder = tmp_path / "analysis" / PUBLISHED[0].name
    shutil.copytree(PUBLISHED[0], folder)
    return folder


def results_of(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / "results" / f"{name}.json").read_text())


def write_results(folder: Path, name: str, values: dict[str, Any]) -> None:
    (folder / "results" / f"{name}.json").write_text(json.dumps(values))


def change_data(folder: Path, name: str, **changes: str) -> None:
    values = results_of(folder, name)
    write_results(folder, name, values | {"data": values["data"] | changes})


@committed
def test_report_is_that_of_the_committed_results() -> None:
    assert (ROOT / "report" / "report.pdf").read_bytes() == report_build.build(PUBLISHED[0])


@committed
def test_readme_tables_are_those_of_the_committed_results() -> None:
    text = (ROOT / "README.md").read_text()
    assert text == report_build.fill_readme(text, PUBLISHED[0])


def test_the_readme_s_python_runs(tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text()
    (program,) = re.findall(r"^    import os; .*\n(?:    .*\n)*", text, re.MULTILINE)
    program = textwrap.dedent(program) + "print(tuple(maps.shape))"
    environment = os.environ | {"RUNS_DIR": str(tmp_path), "PROGRESS": "none"}
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert (run.returncode, run.stdout) == (0, "(8, 16, 16)\n"), run.stderr


def test_a_missing_number_or_figure_is_an_error(copied_set: Path) -> None:
    (copied_set / "figures" / "04_cost.png").rename(copied_set / "elsewhere.png")
    with pytest.raises(ValueError, match="04_cost.png"):
        report_build.build(copied_set)
    (copied_set / "elsewhere.png").rename(copied_set / "figures" / "04_cost.png")
    values = results_of(copied_set, "04_depth")
    del values["tables"]["accuracy"]
    write_results(copied_set, "04_depth", values)
    with pytest.raises(ValueError, match="accuracy"):
        report_build.build(copied_set)


def test_a_changed_number_changes_the_report_and_a_reader_s_own_results_do_not(
    copied_set: Path,
) -> None:
    before = report_build.build(copied_set)
    write_results(copied_set, "10_own", {"value": 1})
    assert report_build.build(copied_set) == before
    values = results_of(copied_set, "03_regularization")
    write_results(copied_set, "03_regularization", values | {"epochs": values["epochs"] + 1})
    assert report_build.build(copied_set) != before


def test_claims_of_others_are_collected_and_shown(copied_set: Path) -> None:
    values, before = results_of(copied_set, "03_regularization"), report_build.build(copied_set)
    values["claims"][0] |= {"source": "all is well", "seeds": 9, "trained_out": False}
    write_results(copied_set, "03_regularization", values)
    assert report_build.build(copied_set) != before
    claims = json.loads((copied_set / "results" / "claims.json").read_text())
    (mine,) = [claim for claim in claims if claim["source"] == "all is well"]
    assert mine["notebook"] == "03_regularization"
    assert mine.items() <= (values["claims"][0] | {"notebook": mine["notebook"]}).items()


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


def test_no_results_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="make study"):
        report_build.build(tmp_path / "nothing")


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda p: p.name)
def test_published_figures_are_small(folder: Path) -> None:
    figures = list((folder / "figures").glob("*.png"))
    assert len(figures) >= 20
    assert all(figure.stat().st_size <= 300_000 for figure in figures)
