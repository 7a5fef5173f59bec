"""Run the notebooks headlessly, in order, with progress on the terminal.

    python -m helpers.notebooks                 all of them, in the profile of the environment
    python -m helpers.notebooks 01 04           some of them
    python -m helpers.notebooks --publish       and copy the executed ones over notebooks/

Executed notebooks go to analysis/<set>/notebooks/, saved after every cell; the ones in notebooks/
are only replaced by --publish, once all that were asked for have succeeded. `set_up` is what the
set-up cell of every notebook calls: it does its work on Colab and nothing elsewhere.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from helpers import config
from helpers.config import ROOT, Study
from helpers.data import check_dataset
from helpers.training import write_atomically

NOTEBOOKS_DIR = ROOT / "notebooks"
# In a notebook's first cell, between these marks, --publish writes the measured run time.
RUN_TIME = re.compile(r"(<!-- run time -->).*?(<!-- /run time -->)", re.DOTALL)
ADDRESS = re.compile(r'(ADDRESS = )"[^"]*"')


# --- Set-up ------------------------------------------------------------------------------------


def set_up(keep_runs_on_drive: bool = False) -> None:
    """Prepare Colab: install what's missing, and keep runs on Drive if wanted. Elsewhere: nothing.

    Of requirements.txt only the packages that can't be imported are installed, so the
    preinstalled torch stays as it is.
    """
    if "google.colab" not in sys.modules:
        return
    missing = missing_requirements(ROOT / "requirements.txt")
    if missing:
        print(f"installing {', '.join(missing)}")
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", *missing], check=True)
    if keep_runs_on_drive:
        from google.colab import drive

        drive.mount("/content/drive")
        os.environ["RUNS_DIR"] = "/content/drive/MyDrive/resnet-study/runs"
        config.study.cache_clear()


def missing_requirements(path: Path) -> list[str]:
    """Return the lines of a requirements file whose package can't be imported here."""
    module_names = {
        "opencv-python": "cv2",
        "scikit-learn": "sklearn",
        "pillow": "PIL",
        "pytest-xdist": "xdist",
    }
    missing = []
    for line in path.read_text().splitlines():
        requirement = line.split("#")[0].strip()
        package = re.split(r"[<>=!~\[; ]", requirement)[0]
        module = module_names.get(package, package.replace("-", "_"))
        if requirement and importlib.util.find_spec(module) is None:
            missing.append(requirement)
    return missing


# --- The series --------------------------------------------------------------------------------


def find_notebooks(names: Sequence[str] = ()) -> list[Path]:
    """Return the notebooks in order, or those whose name begins with one of `names`.

    Raises ValueError for a name that fits none.
    """
    everything = sorted(NOTEBOOKS_DIR.glob("[0-9][0-9]_*.ipynb"))
    if not names:
        return everything
    chosen = []
    for name in names:
        fitting = [p for p in everything if p.stem.startswith(name.removesuffix(".ipynb"))]
        if not fitting:
            have = ", ".join(p.stem for p in everything)
            raise ValueError(f"no notebook begins with {name!r}; there are {have}")
        chosen += fitting
    return sorted(dict.fromkeys(chosen))


def run_series(paths: Sequence[Path], study: Study) -> bool:
    """Run notebooks in order, each in its own kernel; return whether all succeeded.

    The first that fails is saved as far as it got, its error is printed, and the series stops.
    """
    out_dir = study.analysis_dir / study.set_name / "notebooks"
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            error.errno,
            f"{out_dir} can't be made ({error.strerror}); set ANALYSIS_DIR to a folder that can be "
            "written",
        ) from error
    times = _read_times(study)
    with _Terminal(paths, times) as terminal:
        for path in paths:
            terminal.begin_notebook(path)
            error = _run_notebook(path, out_dir / path.name, terminal)
            seconds = terminal.end_notebook()
            if error:
                terminal.stop()
                print(
                    f"\n{error}\n\n{path.name} failed in cell {terminal.cell}; as far as it got, "
                    f"with the error's trace: {out_dir / path.name}"
                )
                return False
            # Run times are those of a first run: a later one reads stored runs and is shorter.
            times[path.stem] = max(seconds, times.get(path.stem, 0.0))
            content = json.dumps({k: round(v, 1) for k, v in sorted(times.items())}, indent=1)
            study.results_dir.mkdir(parents=True, exist_ok=True)
            write_atomically(study.results_dir / "run_times.json", content.encode())
    return True


def _read_times(study: Study) -> dict[str, float]:
    path = study.results_dir / "run_times.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _run_notebook(path: Path, out: Path, terminal: _Terminal) -> str | None:
    """Execute one notebook, saving after each cell; return its error's text, or None.

    SIGINT (Ctrl-C) and SIGTERM are passed on to the kernel, where training writes a checkpoint;
    then KeyboardInterrupt is raised.
    """
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, DeadKernelError
    from traitlets.config import Config

    notebook = nbformat.read(path, as_version=4)

    def save(**_: object) -> None:
        write_atomically(out, nbformat.writes(notebook).encode())

    interrupted = False

    def interrupt() -> None:
        nonlocal interrupted
        interrupted = True
        asyncio.ensure_future(client.km.interrupt_kernel())

    def begin_notebook(**_: object) -> None:
        # In place of nbclient's own handlers, which shut the kernel down.
        with contextlib.suppress(RuntimeError):  # not on Windows, nor outside the main thread
            for number in (signal.SIGINT, signal.SIGTERM):
                asyncio.get_running_loop().add_signal_handler(number, interrupt)

    def begin(cell: Any, cell_index: int) -> None:
        if interrupted:  # between two cells
            raise asyncio.CancelledError
        terminal.cell = cell_index + 1

    # Sockets in the file system, where there are any: nobody else can connect to the kernel. The
    # path is absolute, since the kernel's working folder is another one.
    sockets = {"transport": "ipc", "ip": f"{terminal.folder.name}/{path.stem}"}
    terminal.cells = len(notebook.cells)
    client = NotebookClient(
        notebook,
        timeout=None,
        record_timing=False,
        resources={"metadata": {"path": str(NOTEBOOKS_DIR)}},
        config=Config({"KernelManager": sockets if os.name == "posix" else {}}),
        on_notebook_start=begin_notebook,
        on_cell_start=begin,
        on_cell_executed=save,
    )
    # The kernel's progress goes to a file that the terminal display reads, not into the notebook.
    environment = os.environ | {"PROGRESS": f"file:{terminal.progress_file}"}
    try:
        client.execute(env=environment)
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
    except CellExecutionError as error:
        if interrupted:
            raise KeyboardInterrupt from None
        return f"{error.ename}: {error.evalue}"
    except DeadKernelError:
        return "the kernel died, perhaps for lack of memory: lower train_size, width or batch_size"
    finally:
        notebook.metadata.pop("widgets", None)
        save()
    return None


class _Terminal:
    """The live display: notebook, cell, what training is doing, time left.

    On a terminal one line is redrawn twice a second; otherwise a plain line is printed for each
    notebook, each training run, and every half minute.
    """

    def __init__(
        self, paths: Sequence[Path], times: dict[str, float], stream: TextIO | None = None
    ) -> None:
        self.paths, self.times, self.stream = paths, times, stream or sys.stdout
        self.live = self.stream.isatty()
        self.begun = self.notebook_begun = time.monotonic()
        self.number, self.cell, self.cells = 0, 0, 0
        self.done: dict[str, float] = {}
        self.folder = tempfile.TemporaryDirectory()
        self.progress_file = Path(self.folder.name) / "progress.json"
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)

    def __enter__(self) -> _Terminal:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()
        self.folder.cleanup()

    def stop(self) -> None:
        """End the display and leave the cursor on a fresh line."""
        if not self._stopped.is_set():
            self._stopped.set()
            self._thread.join()
            if self.live:
                self.stream.write("\r\x1b[K")
                self.stream.flush()

    def begin_notebook(self, path: Path) -> None:
        """Start the clock of a notebook."""
        self.number, self.cell, self.notebook_begun = self.number + 1, 0, time.monotonic()
        self._print(f"[{self.number}/{len(self.paths)}] {path.stem} ...")

    def end_notebook(self) -> float:
        """Return the seconds the notebook took, and say so."""
        seconds = time.monotonic() - self.notebook_begun
        name = self.paths[self.number - 1].stem
        self.done[name] = seconds
        self._print(f"[{self.number}/{len(self.paths)}] {name} took {clock(seconds)}")
        return seconds

    def _print(self, text: str) -> None:
        self.stream.write(("\r\x1b[K" if self.live else "") + text + "\n")
        self.stream.flush()

    def _loop(self) -> None:
        last_run, last_time = None, time.monotonic()
        while not self._stopped.wait(0.5):
            if not self.number:
                continue
            training = self._training()
            line = self._line(training)
            if self.live:
                width = os.get_terminal_size(self.stream.fileno()).columns
                self.stream.write("\r\x1b[K" + line[: max(20, width - 1)])
                self.stream.flush()
                continue
            run = training and training["run"]
            now = time.monotonic()
            if (run and run != last_run) or now - last_time >= 30:
                self._print("  " + line)
                last_run, last_time = run, now

    def _training(self) -> dict[str, Any] | None:
        try:
            return json.loads(self.progress_file.read_text())
        except (OSError, ValueError):
            return None

    def _line(self, training: dict[str, Any] | None) -> str:
        name = self.paths[self.number - 1].stem
        parts = [f"[{self.number}/{len(self.paths)}] {name}, cell {self.cell}/{self.cells}"]
        left = self._seconds_left(training)
        if left is not None:
            parts.append(f"about {clock(left)} left")
        if training:
            parts.append(
                f"run {training['number']}/{training['count']}, epoch {training['epoch']}/"
                f"{training['epochs']}: {training['run']}, {training['state']}"
            )
        return " | ".join(parts)

    def _seconds_left(self, training: dict[str, Any] | None) -> float | None:
        """Estimate from the run times of an earlier study, scaled by the speed of this one.

        Without an earlier one, only the training that goes on can be estimated.
        """
        here = (training or {}).get("seconds_left")
        if any(path.stem not in self.times for path in self.paths):
            return here
        known = [name for name in self.done if self.times[name] > 1]
        scale = sum(map(self.done.get, known)) / sum(map(self.times.get, known)) if known else 1.0
        spent = time.monotonic() - self.notebook_begun
        current = self.times[self.paths[self.number - 1].stem] * scale - spent
        later = sum(self.times[p.stem] for p in self.paths[self.number :]) * scale
        return max(0.0, current, here or 0.0) + later


def _counted(paths: Sequence[Path]) -> str:
    return "1 notebook" if len(paths) == 1 else f"{len(paths)} notebooks"


def clock(seconds: float) -> str:
    """Write a time as 45 s, 3:07 min or 2:05:00 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d} min"
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d} h"


# --- Publishing --------------------------------------------------------------------------------


def publish(paths: Sequence[Path], study: Study) -> None:
    """Replace notebooks/ by the executed notebooks of this study, run times filled in."""
    import nbformat

    times = _read_times(study)
    for path in paths:
        executed = study.analysis_dir / study.set_name / "notebooks" / path.name
        notebook = nbformat.read(executed, as_version=4)
        text = f"{clock(times[path.stem])} in the {study.profile.name} profile"
        opening = notebook.cells[0]
        opening.source = RUN_TIME.sub(rf"\g<1>{text}\g<2>", opening.source)
        write_atomically(path, nbformat.writes(notebook).encode())
        print(f"published {path}")


def write_address() -> None:
    """Write the repository address of pyproject.toml into the set-up cell of every notebook."""
    import nbformat

    address = repository_address()
    for path in find_notebooks():
        notebook = nbformat.read(path, as_version=4)
        for cell in notebook.cells:
            if "set-up" in cell.metadata.get("tags", []):
                cell.source = ADDRESS.sub(rf'\g<1>"{address}"', cell.source)
        write_atomically(path, nbformat.writes(notebook).encode())
    print(f"the set-up cells now clone {address}")


def repository_address() -> str:
    """Return the repository's address as pyproject.toml gives it."""
    text = (ROOT / "pyproject.toml").read_text()
    match = re.search(r'^Repository = "([^"]+)"', text, re.MULTILINE)
    if match is None:
        raise ValueError(f'{ROOT / "pyproject.toml"} has no line Repository = "..."; add one')
    return match[1]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the series as the command line says; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m helpers.notebooks", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("names", nargs="*", help="notebooks by the beginning of their names")
    parser.add_argument("--publish", action="store_true", help="copy the results to notebooks/")
    parser.add_argument("--write-address", action="store_true", help="update the set-up cells")
    options = parser.parse_args(arguments)
    if options.write_address:
        write_address()
        return 0
    try:
        study = config.study()
        paths = find_notebooks(options.names)
        check_dataset(study.dataset)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(
        f"{_counted(paths)}, profile {study.profile.name}, dataset {study.dataset}, "
        f"device {study.device}"
    )
    begun = time.monotonic()
    try:
        succeeded = run_series(paths, study)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on, with training from its last checkpoint")
        return 130
    except OSError as error:  # a full disk, or a folder that can't be written
        print(f"\n{error}", file=sys.stderr)
        return 1
    if not succeeded:
        return 1
    if options.publish:
        publish(paths, study)
    print(f"\n{_counted(paths)} in {clock(time.monotonic() - begun)}. Now there are:")
    here = study.analysis_dir / study.set_name
    for what, where in (
        ("executed notebooks", here / "notebooks"),
        ("figures", study.figures_dir),
        ("results", study.results_dir),
        ("trained runs", study.runs_dir),
    ):
        print(f"  {what:20s}{where}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
