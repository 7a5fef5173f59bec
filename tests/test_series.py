"""The notebook series: executed in order, stopped at a failure, interrupted without losing work."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from helpers import config, notebooks
from helpers.config import ROOT, Study
from helpers.notebooks import find_notebooks, missing_requirements, run_series

OPENING = "# A notebook\n\nIt takes <!-- run time -->unknown<!-- /run time -->."


def write(path: Path, *cells: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = [new_markdown_cell(OPENING), *(new_code_cell(cell) for cell in cells)]
    nbformat.write(new_notebook(cells=content), path)
    return path


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of the notebooks, in place of the study's own."""
    monkeypatch.setattr(notebooks, "NOTEBOOKS_DIR", tmp_path / "notebooks")
    (tmp_path / "notebooks").mkdir()
    return tmp_path / "notebooks"


def outputs(study: Study, name: str) -> list[Any]:
    path = study.analysis_dir / study.set_name / "notebooks" / f"{name}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    return [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]


# --- Running -----------------------------------------------------------------------------------


def test_a_series_that_succeeds(
    folder: Path, study: Study, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    mark = tmp_path / "mark"
    first = write(
        folder / "01_first.ipynb",
        f"import os, pathlib; pathlib.Path({str(mark)!r}).write_text(os.getcwd())",
        "print(os.environ['PROGRESS'][:5])",
    )
    second = write(
        folder / "02_second.ipynb",
        f"print(pathlib) if 'pathlib' in dir() else print({str(mark)!r})",
    )
    before = first.read_bytes()
    assert run_series([first, second], study) is True
    assert mark.read_text() == str(folder)  # a kernel's folder is that of the notebooks
    assert outputs(study, "01_first")[1][0].text == "file:\n"  # progress stays out of notebooks
    assert outputs(study, "02_second")[0][0].text == f"{mark}\n"  # each has its own kernel
    assert first.read_bytes() == before  # only publishing replaces
    times = json.loads((study.results_dir / "run_times.json").read_text())
    assert set(times) == {"01_first", "02_second"} and all(t > 0 for t in times.values())
    shown = capsys.readouterr().out
    assert shown.index("[1/2] 01_first ...") < shown.index("[2/2] 02_second took")


def test_run_times_are_those_of_the_longest_run(folder: Path, study: Study) -> None:
    path = write(folder / "01_first.ipynb", "1")
    study.results_dir.mkdir(parents=True)
    (study.results_dir / "run_times.json").write_text('{"01_first": 500.0, "09_other": 3.0}')
    assert run_series([path], study)
    times = json.loads((study.results_dir / "run_times.json").read_text())
    assert times == {"01_first": 500.0, "09_other": 3.0}


def environment(study: Study) -> dict[str, str]:
    return {
        "PROFILE": "smoke",
        "DATASET": "shapes",
        "RUNS_DIR": str(study.runs_dir),
        "ANALYSIS_DIR": str(study.analysis_dir),
        "DEVICE": "cpu",
        "PROGRESS": "none",
    }


@pytest.fixture
def from_environment(monkeypatch: pytest.MonkeyPatch, study: Study) -> Any:
    for name, value in environment(study).items():
        monkeypatch.setenv(name, value)
    config.study.cache_clear()
    yield
    config.study.cache_clear()


@pytest.mark.usefixtures("from_environment")
def test_a_failure_stops_the_series_and_is_saved_as_far_as_it_got(
    folder: Path, study: Study, capsys: pytest.CaptureFixture[str]
) -> None:
    write(folder / "01_fails.ipynb", "print('so far')", "1 / 0", "print('too far')")
    write(folder / "02_second.ipynb", "print(1)")
    assert notebooks.main([]) == 1
    so_far, failing, too_far = outputs(study, "01_fails")
    assert so_far[0].text == "so far\n"
    assert failing[0].ename == "ZeroDivisionError"
    assert too_far == []
    shown = capsys.readouterr().out
    assert "\nZeroDivisionError: division by zero\n" in shown and "\x1b" not in shown
    assert "01_fails.ipynb failed in cell 3; as far as it got" in shown
    executed = study.analysis_dir / study.set_name / "notebooks"
    assert [path.name for path in executed.iterdir()] == ["01_fails.ipynb"]
    assert not (study.results_dir / "run_times.json").exists()


@pytest.mark.usefixtures("from_environment")
def test_a_kernel_that_dies_is_a_failure(
    folder: Path, study: Study, capsys: pytest.CaptureFixture[str]
) -> None:
    write(folder / "01_dies.ipynb", "print('so far')", "import os; os.kill(os.getpid(), 9)")
    assert notebooks.main(["01"]) == 1
    assert "the kernel died" in capsys.readouterr().out
    assert outputs(study, "01_dies")[0][0].text == "so far\n"


@pytest.mark.usefixtures("from_environment")
def test_publishing_fills_in_the_run_time(
    folder: Path, study: Study, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(folder / "01_first.ipynb", "print('done')")
    other = write(folder / "02_other.ipynb", "print('not asked for')")
    before = other.read_bytes()
    study.results_dir.mkdir(parents=True)
    (study.results_dir / "run_times.json").write_text('{"01_first": 187.0}')
    assert notebooks.main(["01", "--publish"]) == 0
    published = nbformat.read(path, as_version=4)
    expected = "<!-- run time -->3:07 min in the smoke profile<!-- /run time -->."
    assert published.cells[0].source.endswith(expected)
    assert published.cells[1].outputs[0].text == "done\n"
    assert other.read_bytes() == before
    assert str(study.runs_dir) in capsys.readouterr().out  # where everything is
    assert notebooks.main(["01", "--publish"]) == 0  # and again, over what is there
    assert nbformat.read(path, as_version=4).cells[0].source.endswith(expected)


@pytest.mark.usefixtures("from_environment")
def test_a_failed_series_publishes_nothing(folder: Path) -> None:
    path = write(folder / "01_fails.ipynb", "1 / 0")
    before = path.read_bytes()
    assert notebooks.main(["--publish"]) == 1
    assert path.read_bytes() == before


# --- Interrupting ------------------------------------------------------------------------------

TRAINING = """
import sys, time, pathlib
sys.path.insert(0, {root!r})
from benchmarks import soak
from helpers import training
train_step = training._Loop._train_step
def slow(self, *rest):
    train_step(self, *rest)
    if self.epoch == 1 and self.step == 1:
        pathlib.Path({mark!r}).touch()
    time.sleep(0.1)
training._Loop._train_step = slow
folder = pathlib.Path({folder!r})
study = soak.make_study(folder)
run = soak.make_run(soak.draw_folder(folder / "images"), study, "adam", "simple_cnn")
soak.load_or_train(run, study, checkpoint_seconds=1e9)
"""
SERIES = """
import sys
from pathlib import Path
from helpers import notebooks
notebooks.NOTEBOOKS_DIR = Path(sys.argv[1])
sys.exit(notebooks.main([]))
"""


def test_an_interrupt_leaves_a_checkpoint(folder: Path, study: Study, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    cell = TRAINING.format(root=str(ROOT), mark=str(mark), folder=str(tmp_path / "here"))
    write(folder / "01_trains.ipynb", "print('so far')", cell)
    write(folder / "02_second.ipynb", "print(1)")
    process = subprocess.Popen(
        [sys.executable, "-c", SERIES, str(folder)],
        env=os.environ | environment(study),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not mark.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    shown, _ = process.communicate(timeout=60)
    assert process.returncode == 130, shown
    assert "interrupted; the same command goes on, with training from its last checkpoint" in shown
    (run,) = (tmp_path / "here" / "runs").iterdir()
    assert (run / "resume.pt").exists() and not (run / "result.json").exists()
    assert outputs(study, "01_trains")[0][0].text == "so far\n"
    assert "02_second" not in shown


# --- Choosing notebooks ------------------------------------------------------------------------


def test_notebooks_are_found_in_order(folder: Path) -> None:
    for name in ("10_last", "02_second", "01_first", "notes", "draft_03"):
        write(folder / f"{name}.ipynb")
    names = ["01_first", "02_second", "10_last"]
    assert [path.stem for path in find_notebooks()] == names
    assert [path.stem for path in find_notebooks(["10", "01_first.ipynb"])] == [names[0], names[2]]
    assert [path.stem for path in find_notebooks(["02", "02_second"])] == [names[1]]
    assert [path.stem for path in find_notebooks(["0"])] == names[:2]


@pytest.mark.usefixtures("from_environment")
def test_an_unknown_notebook_is_named_with_what_there_is(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(folder / "01_first.ipynb")
    with pytest.raises(ValueError, match="no notebook begins with '07'; there are 01_first"):
        find_notebooks(["01", "07"])
    assert notebooks.main(["07"]) == 2
    assert "no notebook begins with '07'" in capsys.readouterr().err


def test_an_unknown_profile_ends_with_code_2(
    monkeypatch: pytest.MonkeyPatch, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PROFILE", "huge")
    config.study.cache_clear()
    assert notebooks.main([]) == 2
    assert "PROFILE='huge' is unknown" in capsys.readouterr().err


@pytest.mark.usefixtures("from_environment")
def test_a_folder_that_cannot_be_written_is_named(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write(folder / "01_first.ipynb")
    (tmp_path / "a file").write_text("in the way")
    monkeypatch.setenv("ANALYSIS_DIR", str(tmp_path / "a file"))
    config.study.cache_clear()
    assert notebooks.main([]) == 1
    shown = capsys.readouterr().err
    assert f"{tmp_path / 'a file'}/" in shown and "set ANALYSIS_DIR to a folder" in shown


@pytest.mark.usefixtures("from_environment")
@pytest.mark.parametrize("name", ["cifar11", "./not/there"])
def test_a_mistyped_dataset_is_refused_before_anything_is_written(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    write(folder / "01_first.ipynb")
    monkeypatch.setenv("ANALYSIS_DIR", str(tmp_path / "analysis"))
    monkeypatch.setenv("DATASET", name)
    config.study.cache_clear()
    assert notebooks.main([]) == 2
    assert name.removeprefix(".") in capsys.readouterr().err
    assert not (tmp_path / "analysis").exists()


# --- Set-up ------------------------------------------------------------------------------------


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that set-up would have run."""
    commands: list[list[str]] = []

    def run(command: list[str], *, check: bool) -> None:
        assert check  # a failed installation must not pass silently
        commands.append(command)

    monkeypatch.setattr(subprocess, "run", run)
    return commands


@pytest.fixture
def colab(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A stand-in for the google.colab module; the list holds where Drive was mounted."""
    mounted: list[str] = []
    module = types.ModuleType("google.colab")
    module.drive = types.SimpleNamespace(mount=mounted.append)
    package = types.ModuleType("google")
    package.colab = module
    monkeypatch.setitem(sys.modules, "google", package)
    monkeypatch.setitem(sys.modules, "google.colab", module)
    return mounted


@pytest.fixture
def requirements(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    path = tmp_path / "requirements.txt"
    path.write_text(
        "# networks\ntorch>=2.6\nopencv-python>=4.9  # cv2\nscikit-learn>=1.4\npillow\n\n"
        "surely-not-installed>=1.0  # why\nnor_this[extra]==2; python_version > '3'\n"
    )
    monkeypatch.setattr(notebooks, "ROOT", tmp_path)
    return path


MISSING = ["surely-not-installed>=1.0", "nor_this[extra]==2; python_version > '3'"]


def test_missing_requirements_are_those_that_cannot_be_imported(requirements: Path) -> None:
    assert missing_requirements(requirements) == MISSING


def test_nothing_that_the_study_needs_is_missing_here() -> None:
    assert missing_requirements(ROOT / "requirements.txt") == []


@pytest.mark.usefixtures("requirements")
def test_set_up_does_nothing_outside_colab(
    monkeypatch: pytest.MonkeyPatch, installed: list[list[str]]
) -> None:
    monkeypatch.delenv("RUNS_DIR", raising=False)
    before = dict(os.environ)
    notebooks.set_up(keep_runs_on_drive=True)
    assert installed == [] and dict(os.environ) == before


@pytest.mark.usefixtures("requirements")
def test_set_up_installs_only_what_is_missing_on_colab(
    colab: list[str], installed: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    notebooks.set_up()
    assert installed == [[sys.executable, "-m", "pip", "install", "-q", *MISSING]]
    assert colab == []
    assert "surely-not-installed" in capsys.readouterr().out


def test_set_up_installs_nothing_when_nothing_is_missing(
    colab: list[str], installed: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    notebooks.set_up()
    assert installed == [] and capsys.readouterr().out == ""


def test_set_up_can_keep_runs_on_drive(
    monkeypatch: pytest.MonkeyPatch, colab: list[str], installed: list[list[str]]
) -> None:
    monkeypatch.setenv("RUNS_DIR", "/somewhere/else")
    monkeypatch.setenv("PROFILE", "smoke")
    config.study.cache_clear()
    try:
        config.study()  # already read once
        notebooks.set_up(keep_runs_on_drive=True)
        assert colab == ["/content/drive"]
        assert config.study().runs_dir.is_relative_to(colab[0])
    finally:
        config.study.cache_clear()


def test_the_address_goes_into_the_set_up_cells(
    monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path
) -> None:
    path = write(folder / "01_first.ipynb", 'ADDRESS = "https://old"\nx = 1', 'ADDRESS = "mine"')
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[1].metadata["tags"] = ["set-up"]
    nbformat.write(notebook, path)
    monkeypatch.setattr(notebooks, "ROOT", tmp_path)
    pyproject = tmp_path / "pyproject.toml"
    pyproject.write_text('[project.urls]\nRepository = "https://new/study"\n')
    assert notebooks.main(["--write-address"]) == 0
    cells = nbformat.read(path, as_version=4).cells
    assert cells[1].source == 'ADDRESS = "https://new/study"\nx = 1'
    assert cells[2].source == 'ADDRESS = "mine"'
    pyproject.write_text("[project.urls]\n")
    with pytest.raises(ValueError, match=re.escape("has no line Repository =")):
        notebooks.repository_address()


# --- The display -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.4, "59 s"), (59.6, "1:00 min"), (187, "3:07 min"), (7500, "2:05:00 h")],
)
def test_clock(seconds: float, text: str) -> None:
    assert notebooks.clock(seconds) == text


def test_the_display_says_where_the_series_is(tmp_path: Path) -> None:
    paths = [tmp_path / "01_first.ipynb", tmp_path / "02_second.ipynb"]
    terminal = notebooks._Terminal(paths, {"01_first": 100.0, "02_second": 60.0})
    terminal.number, terminal.cell, terminal.cells = 1, 3, 9
    training = {
        "run": "resnet18, seed 0",
        "number": 2,
        "count": 6,
        "epoch": 4,
        "epochs": 12,
        "state": "loss 0.500",
        "seconds_left": 30.0,
    }
    terminal.progress_file.write_text(json.dumps(training))
    line = terminal._line(terminal._training())
    assert line.startswith("[1/2] 01_first, cell 3/9 | about 2:40 min left | run 2/6, epoch 4/12: ")
    assert line.endswith("4/12: resnet18, seed 0, loss 0.500")
    terminal.times.pop("02_second")  # never run before: only the training can be estimated
    assert "about 30 s left" in terminal._line(training)
    assert "left" not in terminal._line(None)
    terminal.folder.cleanup()


def test_a_study_has_its_own_folder(study: Study) -> None:
    assert replace(study, dataset="/data/Birds").set_name == "birds-smoke"
