"""Run the notebooks headlessly and in order, and prepare Colab for them.

    python -m helpers.notebooks [01 04 ...] [--publish]

Executed notebooks go to analysis/<set>/notebooks/, saved after every cell; --publish copies them
over notebooks/. `set_up` is what the set-up cell of every notebook calls.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from traitlets.config import Config

from helpers import config
from helpers.config import ROOT, Study, write_atomically
from helpers.data import check_dataset

NOTEBOOKS_DIR = ROOT / "notebooks"


def set_up(keep_runs_on_drive: bool = False) -> None:
    """Prepare Colab: install what's missing, and keep runs on Drive if wanted. Elsewhere: nothing.

    Only packages that aren't there are installed, so the preinstalled torch stays as it is.
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
    """Return the lines of a requirements file whose package isn't installed in any version."""
    there = {re.sub(r"[-_.]+", "-", d.name).lower() for d in metadata.distributions()}
    lines = [line.split("#")[0].strip() for line in path.read_text().splitlines()]
    name = re.compile(r"[\w.-]+")
    return [s for s in lines if s and re.sub(r"[-_.]+", "-", name.match(s)[0]).lower() not in there]


def find_notebooks(names: Sequence[str] = ()) -> list[Path]:
    """Return the notebooks in order, or those whose name begins with one of `names`.

    Raises ValueError for a name that fits none.
    """
    there = sorted(NOTEBOOKS_DIR.glob("[0-9][0-9]_*.ipynb"))
    beginnings = [name.removesuffix(".ipynb") for name in names]
    for name in beginnings:
        if not any(path.stem.startswith(name) for path in there):
            have = ", ".join(path.stem for path in there)
            raise ValueError(f"no notebook begins with {name!r}; there are {have}")
    return [path for path in there if not names or path.stem.startswith(tuple(beginnings))]


def executed(path: Path, study: Study) -> Path:
    """Return where a notebook goes when the study has executed it."""
    return study.analysis_dir / study.set_name / "notebooks" / path.name


def run_times(study: Study) -> dict[str, float]:
    """Return the seconds that each of the study's notebooks took when it ran first."""
    path = study.results_dir / "run_times.json"
    return json.loads(path.read_text()) if path.exists() else {}


def run_series(paths: Sequence[Path], study: Study) -> bool:
    """Run notebooks in order, each in its own kernel; return whether all succeeded.

    The first that fails is saved as far as it got, its error is printed, and the series stops.
    Raises KeyboardInterrupt after Ctrl-C or SIGTERM, with the kernel stopped.
    """
    for number, path in enumerate(paths, start=1):
        where, begun = f"[{number}/{len(paths)}] {path.stem}", time.monotonic()
        print(f"{where} ...", flush=True)
        error = run_notebook(path, executed(path, study), where)
        if error:
            print(f"{where} failed in {error}; its trace is in {executed(path, study)}")
            return False
        seconds, times = time.monotonic() - begun, run_times(study)
        print(f"{where} took {clock(seconds)}", flush=True)
        # Run times are those of a first run: a later one reads stored runs and is shorter.
        times[path.stem] = round(max(seconds, times.get(path.stem, 0)), 1)
        content = json.dumps(times, indent=1, sort_keys=True).encode()
        write_atomically(study.results_dir / "run_times.json", content)
    return True


def run_notebook(path: Path, out: Path, where: str) -> str:
    """Execute a notebook, saving after each cell; return its error in one line, or nothing.

    `where` is what the terminal shows before the number of the code cell.
    """
    notebook = nbformat.read(path, as_version=4)
    count = sum(cell.cell_type == "code" for cell in notebook.cells)
    interrupted = False

    def save(**_: object) -> None:
        write_atomically(out, nbformat.writes(notebook).encode())

    def begin(**_: object) -> None:
        task, loop = asyncio.current_task(), asyncio.get_running_loop()

        def interrupt() -> None:
            nonlocal interrupted
            interrupted = True
            asyncio.ensure_future(client.km.interrupt_kernel())
            loop.call_later(5, task.cancel)  # if that ended no cell

        # In place of nbclient's own handlers, which may wait for ever for a kernel that they ended.
        with contextlib.suppress(RuntimeError):  # not on Windows, nor outside the main thread
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, interrupt)

    def place() -> str:
        text = progress.read_text(errors="ignore") if progress.exists() else ""
        last = text.split("\n")[-1].strip()  # what a bar drew last: reading made \r to \n
        return f"{where}, cell {client.code_cells_executed}/{count}{last and ' | '}{last}"

    with tempfile.TemporaryDirectory() as folder:
        progress = Path(folder) / "progress"
        # Sockets in the file system, where there are any: nobody else can connect to the kernel.
        sockets = {"transport": "ipc", "ip": f"{folder}/kernel"} if os.name == "posix" else {}
        options = {"timeout": None, "record_timing": False, "on_cell_executed": save}
        options |= {"on_notebook_start": begin, "config": Config({"KernelManager": sockets})}
        options |= {"resources": {"metadata": {"path": str(NOTEBOOKS_DIR)}}}
        client = NotebookClient(notebook, **options)
        with shown(place):
            try:
                client.execute(env=os.environ | {"PROGRESS": f"file:{progress}"})
            except (CellExecutionError, DeadKernelError, asyncio.CancelledError) as error:
                if interrupted:
                    raise KeyboardInterrupt from None
                known = isinstance(error, CellExecutionError)
                why = (
                    f"{error.ename}: {error.evalue}" if known else "the kernel died, out of memory?"
                )
                return f"cell {client.code_cells_executed}: {why}"
            finally:
                notebook.metadata.pop("widgets", None)
                save()
    return ""


@contextlib.contextmanager
def shown(line: Callable[[], str]) -> Iterator[None]:
    """Show where things stand: redrawn twice a second on a terminal, else every half minute."""
    live, ended = sys.stdout.isatty(), threading.Event()
    clear = "\r\x1b[K" if live else ""

    def show() -> None:
        while not ended.wait(0.5 if live else 30):
            width = shutil.get_terminal_size().columns - 1 if live else None
            print(clear + line()[:width], end="" if live else "\n", flush=True)

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        print(clear, end="", flush=True)


def clock(seconds: float) -> str:
    """Write a time as 45 s, 3:07 min or 2:05:00 h."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d} h"
    return f"{minutes}:{rest:02d} min" if minutes else f"{rest} s"


def publish(paths: Sequence[Path], study: Study) -> None:
    """Replace notebooks/ by the executed notebooks of this study, run times filled in."""
    for path in paths:
        took = f"{clock(run_times(study)[path.stem])} in the {study.profile.name} profile"
        marks = "<!-- run time -->", "<!-- /run time -->"
        text = re.sub(f"(?<={marks[0]}).*(?={marks[1]})", took, executed(path, study).read_text())
        write_atomically(path, text.encode())
        print(f"published {path}")


def write_address() -> None:
    """Write the repository address of pyproject.toml into the set-up cell of every notebook."""
    for path in find_notebooks():
        line = rf"ADDRESS = \"{repository_address()}\""
        text = re.sub(r"ADDRESS = \\\".*?\\\"", lambda _, line=line: line, path.read_text())
        write_atomically(path, text.encode())
    print(f"the set-up cells now clone {repository_address()}")


def repository_address() -> str:
    """Return the repository's address as pyproject.toml gives it; ValueError if it doesn't."""
    match = re.search(r'^Repository = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    if match is None:
        raise ValueError(f'{ROOT / "pyproject.toml"} has no line Repository = "..."; add one')
    return match[1]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the series as the command line says; return the exit code."""
    parser = argparse.ArgumentParser(description="Run the notebooks in order.")
    parser.add_argument("names", nargs="*", help="notebooks by the beginning of their names")
    parser.add_argument("--publish", action="store_true", help="copy the results to notebooks/")
    parser.add_argument("--write-address", action="store_true", help="update the set-up cells")
    options = parser.parse_args(arguments)
    if options.write_address:
        write_address()
        return 0
    try:
        study, paths = config.study(), find_notebooks(options.names)
        check_dataset(study.dataset)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    what = f"profile {study.profile.name}, dataset {study.dataset}, device {study.device}"
    print(f"notebooks: {len(paths)}, {what}")
    try:
        if not run_series(paths, study):
            return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on, with training from its last checkpoint")
        return 130
    except OSError as error:  # a full disk, or a folder that can't be written
        print(error, file=sys.stderr)
        return 1
    if options.publish:
        publish(paths, study)
    print(f"  notebooks, figures, results  {study.analysis_dir / study.set_name}")
    print(f"  trained runs                 {study.runs_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
