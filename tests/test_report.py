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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from helpers.config import ROOT

spec = importlib.util.spec_from_file_location("report_build", ROOT / "report" / "build.py")
report_build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(report_build)

PUBLISHED = report_build.published_sets()


def a_study_has_run() -> bool:
    """Whether `make study` has replaced committed results, as far as git is there to tell."""
    command = ["git", "status", "--porcelain", "--", "analysis"]
    told = subprocess.run(command, cwd=ROOT, capture_output=True) if shutil.which("git") else None
    return told is None or bool(told.returncode or told.stdout)


committed = pytest.mark.skipif(a_study_has_run(), reason="a study has replaced committed results")


@pytest.fixture
def copied_set(tmp_path: Path) -> Path:
    if a_study_has_run():
        pytest.skip("a study has replaced some of the committed results")
    copy, rest = tmp_path / "analysis" / PUBLISHED[0].name, ("computed", "notebooks", "runs")
    return shutil.copytree(PUBLISHED[0], copy, ignore=shutil.ignore_patterns(*rest))


@contextmanager
def changed(folder: Path, name: str) -> Iterator[dict[str, Any]]:
    """A result file to be changed in place."""
    path = folder / "results" / f"{name}.json"
    values = json.loads(path.read_text()) if path.exists() else {}
    yield values
    path.write_text(json.dumps(values))


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
    (copied_set / "figures" / "04_cost.svg").unlink()
    with pytest.raises(ValueError, match="04_cost.svg"):
        report_build.build(copied_set)
    with changed(copied_set, "04_depth") as values:
        del values["tables"]["accuracy"]
    with pytest.raises(ValueError, match="accuracy"):
        report_build.build(copied_set)


def test_a_number_or_verdict_that_has_moved_stops_the_build(copied_set: Path) -> None:
    with changed(copied_set, "04_depth") as values:
        values["networks"]["ResNet-18"]["accuracy"]["text"] = "0.1 [0.0, 0.2]"
    with pytest.raises(report_build.MovedError, match=r"ResNet-18 / accuracy has moved.*0\.1"):
        report_build.build(copied_set)
    shutil.copy(PUBLISHED[0] / "results" / "04_depth.json", copied_set / "results")
    with changed(copied_set, "02_architectures") as values:
        values["claims"][1]["verdict"] = "holds"
    with pytest.raises(report_build.MovedError, match=r"H2\.2 has moved"):
        report_build.build(copied_set)
    report_build.build(copied_set.rename(copied_set.with_name("shapes-smoke")))  # has no findings


def test_every_number_of_the_findings_is_compared_with_the_results() -> None:
    told = '#measured("04_depth / a (%)",\n"2.3") layer4 of ResNet-18, @tab-2 // 5'
    assert report_build.unguarded_numbers(told) == []
    assert report_build.unguarded_numbers("7 points\n#shown() 8.") == ["7 points", "8."]


def test_changed_results_change_the_report_and_a_reader_s_own_do_not(copied_set: Path) -> None:
    before = report_build.build(copied_set)
    with changed(copied_set, "10_own") as values:
        values["value"] = 1
    assert report_build.build(copied_set) == before
    with changed(copied_set, "03_regularization") as values:
        values["epochs"] += 1
        values["claims"][0] |= {"source": "all is well", "seeds": 9, "trained_out": False}
    assert report_build.build(copied_set) != before
    claims = json.loads((copied_set / "results" / "claims.json").read_text())
    (mine,) = [claim for claim in claims if claim["source"] == "all is well"]
    assert mine.items() <= (values["claims"][0] | {"notebook": "03_regularization"}).items()


@pytest.mark.parametrize(
    "what", ["03_regularization title", "03_regularization fingerprint", "06_dataset_size title"]
)
def test_results_of_two_datasets_are_not_mixed(copied_set: Path, what: str) -> None:
    name, key = what.split()
    with changed(copied_set, name) as values:
        expected, values["data"][key] = values["data"][key], "changed"
    with pytest.raises(ValueError, match=f"{name}.json is about .*changed.*{re.escape(expected)}"):
        report_build.build(copied_set)


def test_a_second_dataset_is_no_mixture(copied_set: Path) -> None:
    with changed(copied_set, "08_transfer") as values:
        values["data"] |= {"title": "Other", "fingerprint": "0", "role": "second"}
    report_build.build(copied_set)


def test_no_results_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="make study"):
        report_build.build(tmp_path / "nothing")


@committed
@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda p: p.name)
def test_published_figures_are_small(folder: Path) -> None:
    sizes = [figure.stat().st_size for figure in (folder / "figures").glob("*.png")]
    assert len(sizes) >= (20 if folder == PUBLISHED[0] else 1) and max(sizes) <= 300_000
