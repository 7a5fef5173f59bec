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
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from helpers import config, notebooks
from helpers.config import ROOT, Study, write_atomically
from helpers.notebooks import find_notebooks, run_series

OPENING = "# A notebook\n\nIt takes <!-- run time -->unknown<!-- /run time -->."


def write(path: Path, *cells: str, **metadata: object) -> Path:
    content = [new_markdown_cell(OPENING), *(new_code_cell(c, metadata=metadata) for c in cells)]
    nbformat.write(new_notebook(cells=content), path)
    return path


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of the notebooks, in place of the study's own."""
    monkeypatch.setattr(notebooks, "NOTEBOOKS_DIR", tmp_path / "notebooks")
    (tmp_path / "notebooks").mkdir()
    return tmp_path / "notebooks"


def outputs(study: Study, name: str) -> list[Any]:
    path = study.folder / "notebooks" / f"{name}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    return [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]


@pytest.fixture
def from_environment(monkeypatch: pytest.MonkeyPatch, study: Study) -> Iterator[None]:
    for name, value in {"PROFILE": "smoke", "DATASET": "shapes", "DEVICE": "cpu"}.items():
        monkeypatch.setenv(name, value)
    for name in ("runs_dir", "data_dir", "analysis_dir"):
        monkeypatch.setenv(name.upper(), str(getattr(study, name)))
    config.study.cache_clear()
    yield
    config.study.cache_clear()


Capture = pytest.CaptureFixture[str]


def test_a_series_that_succeeds(folder: Path, study: Study, capsys: Capture) -> None:
    show = "import os; print(os.getcwd()); print(os.environ['PROGRESS'][:5])"
    first = write(folder / "01_first.ipynb", show)
    second = write(folder / "02_second.ipynb", "print('os' in dir())")
    before = first.read_bytes()
    assert run_series([first, second], study) is True
    # A kernel's folder is that of the notebooks; progress stays out of them; each has its kernel.
    assert outputs(study, "01_first")[0][0].text == f"{folder}\nfile:\n"
    assert outputs(study, "02_second")[0][0].text == "False\n"
    assert first.read_bytes() == before  # only publishing replaces
    times = json.loads((study.folder / "results" / "run_times.json").read_text())
    assert set(times) == {"01_first", "02_second"} and all(t > 0 for t in times.values())
    shown = capsys.readouterr().out
    assert shown.index("[1/2] 01_first ...") < shown.index("[2/2] 02_second took")
    assert "\x1b" not in shown and "\r" not in shown  # no line that changes, but on a terminal


def test_only_what_has_changed_runs_again(
    monkeypatch: pytest.MonkeyPatch, folder: Path, study: Study, capsys: Capture
) -> None:
    monkeypatch.setattr(notebooks, "ROOT", folder.parent)
    (helper := folder.parent / "helpers" / "one.py").parent.mkdir()
    text = "A = {}  # <!-- /run time -->".format  # as in the source of notebooks.py
    helper.write_text(text(1))
    path = write(folder / "01_first.ipynb", "print(1)")
    figure, times = map(study.folder.joinpath, ("figures/01_figure.png", "results/run_times.json"))

    def runs(study: Study = study) -> bool:
        assert run_series([path], study)
        return "up to date" not in capsys.readouterr().out

    assert runs() and not runs()
    notebooks.publish([path], study)  # fills in outputs and run time
    assert "took" not in capsys.readouterr().out and not runs()
    changes = [lambda: helper.write_text(text(2)), lambda: write_atomically(figure, b"of it")]
    for change in [*changes, figure.unlink, times.unlink, lambda: write(path, "print(2)")]:
        change()
        assert runs() and not runs()
    assert runs(replace(study, profile=replace(study.profile, epochs=3)))
    write(path, "print(3)", tags=["answer"])
    assert runs() and outputs(study, "01_first") == [[]]
    assert run_series([path], study, answers=True) and outputs(study, "01_first") != [[]]
    write(path, "1 / 0")
    assert not run_series([path], study) and not run_series([path], study), "an error stays one"


def test_a_terminal_shows_the_cell_and_the_last_state_of_the_kernel_s_bar(
    monkeypatch: pytest.MonkeyPatch, folder: Path, study: Study, capsys: Capture
) -> None:
    bar = r"open(os.environ['PROGRESS'][5:], 'w').write('\rruns: 10 %\rruns: 20 % | 2 s left')"
    path = write(folder / "01_first.ipynb", f"import os, time; {bar}; time.sleep(2)", "2")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert run_series([path], study)
    told = r"\r\[1/1\] 01_first, cell 1/2 .*, runs: 20 % \| 2 s left"
    assert re.search(told, capsys.readouterr().out)


@pytest.mark.usefixtures("from_environment")
@pytest.mark.parametrize(
    ("cell", "told"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("import os; os.kill(os.getpid(), 9)", "the kernel died, out of memory?"),
    ],
)
def test_a_failure_stops_the_series_and_is_saved_as_far_as_it_got(
    folder: Path, study: Study, capsys: Capture, cell: str, told: str
) -> None:
    path = write(folder / "01_fails.ipynb", "print('so far')", cell, "print('too far')")
    write(folder / "02_second.ipynb", "1")
    before = path.read_bytes()
    assert notebooks.main(["--publish"]) == 1
    assert path.read_bytes() == before
    (so_far,), _, too_far = outputs(study, "01_fails")
    assert (so_far.text, too_far) == ("so far\n", [])
    executed = study.folder / "notebooks"
    line = f"[1/2] 01_fails failed in cell 2: {told}; its trace is in {executed / '01_fails.ipynb'}"
    assert f"{line}\n" in capsys.readouterr().out
    assert [path.name for path in executed.iterdir()] == ["01_fails.ipynb"]
    assert not (study.folder / "results" / "run_times.json").exists()


@pytest.mark.usefixtures("from_environment")
def test_publishing_fills_in_the_run_time(folder: Path, study: Study, capsys: Capture) -> None:
    path = write(folder / "01_first.ipynb", "print('done')")
    other = write(folder / "02_other.ipynb", "print('not asked for')")
    before = other.read_bytes()
    (study.folder / "results").mkdir(parents=True)
    times = study.folder / "results" / "run_times.json"
    times.write_text('{"01_first": 187.0, "09_other": 3.0}')  # of the first run, which is longer
    expected = "<!-- run time -->3:07 min in the smoke profile<!-- /run time -->."
    assert notebooks.main(["01", "--publish"]) == 0
    published = nbformat.read(path, as_version=4)
    assert published.cells[0].source.endswith(expected)
    assert published.cells[1].outputs[0].text == "done\n"
    notebooks.publish([path], study)  # again, over what is there
    assert nbformat.read(path, as_version=4) == published
    write(path, "print('edited while it ran')")
    with pytest.raises(ValueError, match="01_first.ipynb was changed while it ran"):
        notebooks.publish([path], study)
    assert json.loads(times.read_text()) == {"01_first": 187.0, "09_other": 3.0}
    assert other.read_bytes() == before
    assert str(study.runs_dir) in capsys.readouterr().out  # where everything is


TRAINING = """
import sys, time, pathlib
sys.path.insert(0, {root!r})
from helpers import config, data, runs
study = config.study()
run = runs.make_run(study, data.study_data(study), "simple_cnn", seed=0, epochs=10_000)
def mark(record):
    pathlib.Path({mark!r}).touch()
    time.sleep(0.1)
runs.load_or_train(run, study, on_epoch=mark, checkpoint_seconds=0)
"""
SERIES = """
import sys
from pathlib import Path
from helpers import notebooks, results
notebooks.NOTEBOOKS_DIR = Path(sys.argv[1])
sys.exit(notebooks.main([]))
"""


@pytest.mark.usefixtures("from_environment")
def test_an_interrupt_stops_all_and_leaves_a_checkpoint(
    folder: Path, study: Study, tmp_path: Path
) -> None:
    cell = TRAINING.format(root=str(ROOT), mark=str(tmp_path / "mark"))
    write(folder / "01_trains.ipynb", "import os; print(os.getpid())", cell)
    write(folder / "02_second.ipynb", "print(1)")
    command = [sys.executable, "-c", SERIES, str(folder)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, **pipes)
    deadline = time.monotonic() + 120
    while not (tmp_path / "mark").exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    shown, _ = process.communicate(timeout=60)
    assert process.returncode == 130, shown
    told = "interrupted; the same command goes on, with training from its last checkpoint\n"
    assert shown.endswith(told) and "02_second" not in shown and "Traceback" not in shown
    (run,) = study.runs_dir.iterdir()
    assert (run / "resume.pt").exists() and not (run / "result.json").exists()
    kernel = int(outputs(study, "01_trains")[0][0].text)
    with pytest.raises(ProcessLookupError):
        os.kill(kernel, 0)


def test_notebooks_are_found_in_order(folder: Path) -> None:
    for name in ("10_last", "02_second", "01_first", "notes", "draft_03"):
        write(folder / f"{name}.ipynb")
    names = ["01_first", "02_second", "10_last"]
    assert [path.stem for path in find_notebooks()] == names
    assert [path.stem for path in find_notebooks(["10", "01_first.ipynb"])] == [names[0], names[2]]
    assert [path.stem for path in find_notebooks(["02", "02_second"])] == [names[1]]
    assert [path.stem for path in find_notebooks(["0"])] == names[:2]


@pytest.mark.usefixtures("from_environment")
@pytest.mark.parametrize(
    ("variable", "value", "told"),
    [
        ("PROFILE", "huge", "PROFILE='huge' is unknown"),
        ("DATASET", "cifar11", "cifar11"),
        ("DATASET", "./not/there", "/not/there"),
        ("NAME", "07", "no notebook begins with '07'; there are 01_first"),
    ],
)
def test_what_is_mistyped_is_refused_before_anything_is_written(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    study: Study,
    capsys: Capture,
    variable: str,
    value: str,
    told: str,
) -> None:
    write(folder / "01_first.ipynb")
    monkeypatch.setenv(variable, value)
    assert notebooks.main([value] if variable == "NAME" else []) == 2
    assert told in capsys.readouterr().err
    assert not study.analysis_dir.exists()


@pytest.mark.usefixtures("from_environment")
def test_set_up_prepares_colab_and_does_nothing_elsewhere(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    requirements = tmp_path / "requirements.txt"
    requirements.write_text(
        "# networks\ntorch>=2.6\nopencv-python>=4.9  # cv2\nscikit-learn>=1.4\npillow\n\n"
        "surely-not-installed>=1.0  # why\nnor-this==2\n# --- only for make: ---\nnobody-has>=1\n"
    )
    steps = []
    monkeypatch.setattr(notebooks, "REQUIREMENTS", requirements)
    monkeypatch.setattr(subprocess, "run", lambda command, check: steps.append((command, check)))
    monkeypatch.setattr(notebooks, "keep_runs", lambda *folders: steps.append(folders))
    before = config.study(), dict(os.environ)
    notebooks.set_up(keep_runs_on_drive=True)
    assert steps == [] and (config.study(), dict(os.environ)) == before
    colab = types.ModuleType("google.colab")
    colab.drive = types.SimpleNamespace(mount=steps.append)
    monkeypatch.setitem(sys.modules, "google", types.ModuleType("google"))
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    notebooks.set_up()
    command = [sys.executable, "-m", "pip", "install", "-q"]
    command += ["surely-not-installed>=1.0", "nor-this==2"]
    assert steps == [(command, True)]  # whose failure isn't passed over
    notebooks.set_up(keep_runs_on_drive=True)
    runs = config.study().runs_dir, Path("/content/drive/MyDrive/resnet-study/runs")
    assert steps[1:] == [(command, True), "/content/drive", runs]
    assert (config.study(), dict(os.environ)) == before  # training goes on writing here


@pytest.mark.filterwarnings("error")
def test_finished_runs_are_fetched_from_drive_and_copied_to_it(tmp_path: Path) -> None:
    here, drive = tmp_path / "here", tmp_path / "drive"

    def write(folder: Path, *names: str) -> None:
        folder.mkdir(parents=True)
        for name in names:
            (folder / name).write_text(str(folder))

    def arrived(run: str) -> bool:
        return (drive / run / "result.json").exists()

    write(drive / "earlier", "result.json", "model.safetensors")
    write(drive / "cut off", "model.safetensors")  # by a copy that was cut off, before the rename
    notebooks.keep_runs(here, drive, seconds=0.2)
    notebooks.keep_runs(here, drive, seconds=0.2)  # the cell is run again
    assert [path.name for path in here.iterdir()] == ["earlier"]
    write(here / "running", "resume.pt", "lock")
    write(here / "cut off", "model.safetensors", "result.json")
    deadline = time.monotonic() + 60
    while not arrived("cut off"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert (drive / "cut off" / "model.safetensors").read_text() == str(here / "cut off")
    assert (drive / "earlier" / "result.json").read_text() == str(drive / "earlier")
    assert sorted(path.name for path in drive.iterdir()) == ["cut off", "earlier"]


def test_clock() -> None:
    texts = {0: "0 s", 59.4: "59 s", 59.6: "1:00 min", 187: "3:07 min", 7500: "2:05:00 h"}
    assert {seconds: notebooks.clock(seconds) for seconds in texts} == texts
