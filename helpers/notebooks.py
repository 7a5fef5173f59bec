"""Run the notebooks headlessly and in order, and prepare Colab for them.

    python -m helpers.notebooks [01 04 ...] [--publish]

Executed notebooks go to analysis/<set>/notebooks/, saved after every cell; --publish copies them
over notebooks/, answers included. `set_up` is what the set-up cell of every notebook calls.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import hashlib
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
import warnings
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from tqdm import tqdm
from traitlets.config import Config

from helpers import config
from helpers.config import ROOT, Study, write_atomically
from helpers.data import check_dataset
from helpers.runs import machine

NOTEBOOKS_DIR, REQUIREMENTS = ROOT / "notebooks", ROOT / "requirements.txt"
DRIVE = Path("/content/drive")
RUN_TIME = re.compile("(?<=<!-- run time -->).*?(?=<!-- /run time -->)")


def set_up(keep_runs_on_drive: bool = False) -> None:
    """Prepare Colab: install what's missing, and keep runs on Drive if wanted. Elsewhere: nothing.

    Only what a notebook imports is installed, and only packages that aren't there in any version,
    so the preinstalled torch stays. Training writes to the local disk, since on Drive there are no
    locks and each checkpoint would fill its trash; finished runs are copied there within a minute.
    """
    if "google.colab" not in sys.modules:
        return
    needed = REQUIREMENTS.read_text().split("# --- only for make")[0].splitlines()
    lines = [line.split("#")[0].strip() for line in needed]
    known = metadata.distributions
    missing = [line for line in lines if line and not [*known(name=re.split("[<>=]", line)[0])]]
    if missing:
        print(f"installing {', '.join(missing)}")
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", *missing], check=True)
    if keep_runs_on_drive:
        from google.colab import drive

        drive.mount(str(DRIVE))
        here = Path(os.path.expanduser(os.environ.get("RUNS_DIR") or ROOT / "runs"))
        keep_runs(here, DRIVE / "MyDrive" / "resnet-study" / "runs")


@functools.cache  # once, however often the cell is run
def keep_runs(here: Path, there: Path, seconds: float = 60.0) -> None:
    """Fetch finished runs from another folder, and from now on copy new ones to it."""
    copy_finished(there, here)

    def watch() -> None:
        while True:
            copy_finished(here, there)
            time.sleep(seconds)

    threading.Thread(target=watch, daemon=True).start()


def copy_finished(source: Path, target: Path) -> None:
    """Copy the finished runs that aren't in the target yet, each whole or not at all."""
    for result in source.glob("*/result.json"):
        run = target / result.parent.name
        if not (run / "result.json").exists():
            shutil.rmtree(unfinished := run.with_name(f".{run.name}"), ignore_errors=True)
            try:
                shutil.copytree(result.parent, unfinished)
                shutil.rmtree(run, ignore_errors=True)
                unfinished.rename(run)
            except OSError as error:  # the target is full, or gone for a while
                warnings.warn(f"can't copy run {run.name} ({error})", stacklevel=1)


def find_notebooks(names: Sequence[str] = ("",)) -> list[Path]:
    """Return the notebooks whose name begins with one of `names`, in order; else ValueError."""
    there = sorted(NOTEBOOKS_DIR.glob("[0-9][0-9]_*.ipynb"))
    for name in names:
        if not any(path.name.startswith(name) for path in there):
            have = ", ".join(path.stem for path in there)
            raise ValueError(f"no notebook begins with {name!r}; there are {have}")
    return [path for path in there if path.name.startswith(tuple(names))]


def executed(path: Path, study: Study) -> Path:
    """Return where a notebook goes when the study has executed it."""
    return study.folder / "notebooks" / path.name


def state(path: Path, study: Study, code: str) -> str:
    """Return a hash of a notebook's code, of all it hangs on, and of the files that it wrote."""
    folder, written = check_dataset(study.dataset), study.folder.glob(f"*/{path.name[:3]}*")
    here = (study, folder and folder.state, machine(study.device))  # machine: torch's version, too
    digest = hashlib.sha256(f"{here} {code}".encode())
    for file in sorted(written):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def run_times(study: Study) -> dict[str, float]:
    """Return the seconds that each of the study's notebooks took when it ran first."""
    path = study.folder / "results" / "run_times.json"
    return json.loads(path.read_text()) if path.exists() else {}


def run_series(paths: Sequence[Path], study: Study, *, answers: bool = False) -> bool:
    """Run notebooks in order, each in its own kernel, until one fails; return whether none did.

    One whose `state` is still that after its last run is left as it is. Without `answers`, those to
    exercises aren't run. Raises KeyboardInterrupt after Ctrl-C or SIGTERM, with the kernel stopped.
    """
    for number, path in enumerate(paths, start=1):
        where, begun = f"[{number}/{len(paths)}] {path.stem}", time.monotonic()
        seal = executed(path, study).with_name(f".{path.stem}.state")
        cells = [cell.source for cell in nbformat.read(path, as_version=4).cells]
        package = [file.read_bytes() for file in sorted((ROOT / "helpers").glob("*.py"))]
        code = f"{RUN_TIME.sub('', str(cells))} {answers} {package}"  # as it runs: it may change
        known = seal.exists() and path.stem in run_times(study)
        if known and seal.read_text() == state(path, study, code):
            print(f"{where} is up to date", flush=True)
            continue
        print(f"{where} ...", flush=True)
        if error := asyncio.run(run_notebook(path, executed(path, study), where, answers)):
            print(f"{where} failed in {error}; its trace is in {executed(path, study)}")
            return False
        seconds, times = time.monotonic() - begun, run_times(study)
        print(f"{where} took {clock(seconds)}", flush=True)
        # Run times are those of a first run: a later one reads stored runs and is shorter.
        times[path.stem] = round(max(seconds, times.get(path.stem, 0)), 1)
        content = json.dumps(times, indent=1, sort_keys=True).encode()
        write_atomically(study.folder / "results" / "run_times.json", content)
        write_atomically(seal, state(path, study, code).encode())
    return True


async def run_notebook(path: Path, out: Path, where: str, answers: bool) -> str:
    """Execute a notebook, saving after each cell; return its error in one line, or nothing."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if not answers and "answer" in cell.metadata.get("tags", ()):
            cell.update(outputs=[], execution_count=None)
    loop, interrupted = asyncio.get_running_loop(), asyncio.Event()

    def save(**_: object) -> None:
        write_atomically(out, nbformat.writes(notebook).encode())

    def interrupt() -> None:
        interrupted.set()
        asyncio.ensure_future(client.km.interrupt_kernel())
        loop.call_later(5, running.cancel)  # if that ended no cell

    def begin(**_: object) -> None:
        # In place of nbclient's own handlers, which may wait for ever for a kernel that they ended.
        with contextlib.suppress(RuntimeError):  # Windows has none
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, interrupt)

    with tempfile.TemporaryDirectory() as folder:
        progress = Path(folder) / "progress"
        progress.touch()
        # Sockets in the file system, where there are any: nobody else can connect to the kernel.
        sockets = {"transport": "ipc", "ip": f"{folder}/kernel"} if os.name == "posix" else {}
        options = {"record_timing": False, "on_notebook_start": begin, "on_cell_executed": save}
        options |= {"resources": {"metadata": {"path": str(NOTEBOOKS_DIR)}}}
        options["skip_cells_with_tag"] = "" if answers else "answer"
        client = NotebookClient(notebook, config=Config({"KernelManager": sockets}), **options)
        environment = os.environ | {"PROGRESS": f"file:{progress}"}
        running = asyncio.create_task(client.async_execute(env=environment))
        try:
            await show(running, client, where, progress)
            await running
        except (CellExecutionError, DeadKernelError, asyncio.CancelledError) as error:
            if interrupted.is_set():
                raise KeyboardInterrupt from None
            known = isinstance(error, CellExecutionError)
            why = f"{error.ename}: {error.evalue}" if known else "the kernel died, out of memory?"
            return f"cell {client.code_cells_executed}: {why}"
        finally:
            notebook.metadata.pop("widgets", None)
            save()
    return ""


async def show(running: asyncio.Task, client: NotebookClient, where: str, progress: Path) -> None:
    """Show on a terminal, until a notebook has run, its code cell and what it wrote last."""
    cells = sum(cell.cell_type == "code" for cell in client.nb.cells)
    look = {"bar_format": "{desc}, cell {n}/{total} {bar:5}{postfix}", "dynamic_ncols": True}
    with tqdm(desc=where, total=cells, file=sys.stdout, leave=False, disable=None, **look) as bar:
        while not running.done():
            bar.n = client.code_cells_executed
            text = progress.read_text(errors="ignore")
            bar.set_postfix_str(text.split("\n")[-1].strip())  # reading made \r to \n
            await asyncio.wait([running], timeout=0.5)


def clock(seconds: float) -> str:
    """Write a time as 45 s, 3:07 min or 2:05:00 h."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d} h"
    return f"{minutes}:{rest:02d} min" if minutes else f"{rest} s"


def publish(paths: Sequence[Path], study: Study) -> None:
    """Replace notebooks/ by the executed notebooks of this study, run times filled in.

    Raises ValueError for one that was changed while it ran.
    """
    for path in paths:
        now, ran = (nbformat.read(p, as_version=4).cells for p in (path, executed(path, study)))
        if [RUN_TIME.sub("", c.source) for c in now] != [RUN_TIME.sub("", c.source) for c in ran]:
            raise ValueError(f"{path} was changed while it ran, and is left as it is: run it again")
        took = f"{clock(run_times(study)[path.stem])} in the {study.profile.name} profile"
        text = RUN_TIME.sub(took, executed(path, study).read_text())
        write_atomically(path, text.encode())
        print(f"published {path}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the series as the command line says; return the exit code."""
    parser = argparse.ArgumentParser(description="Run the notebooks in order.")
    parser.add_argument("names", nargs="*", default=[""], help="beginnings of notebooks' names")
    parser.add_argument("--publish", action="store_true", help="copy the results to notebooks/")
    options = parser.parse_args(arguments)
    try:
        study, paths = config.study(), find_notebooks(options.names)
        for name in ("runs_dir", "data_dir", "analysis_dir"):  # kernels run in another folder
            os.environ[name.upper()] = str(getattr(study, name))
        if folder := check_dataset(study.dataset):
            os.environ["DATASET"] = str(folder.root)
        what = f"profile {study.profile.name}, dataset {study.dataset}, device {study.device}"
        print(f"notebooks: {len(paths)}, {what}")
        if not run_series(paths, study, answers=options.publish):
            return 1
        if options.publish:
            publish(paths, study)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on, with training from its last checkpoint")
        return 130
    except (ValueError, OSError) as error:  # a wrong name; a full disk
        print(error, file=sys.stderr)
        return 2
    print(f"  notebooks, figures, results  {study.folder}")
    print(f"  trained runs                 {study.runs_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
