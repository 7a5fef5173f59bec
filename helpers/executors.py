"""Many runs at a time: Ray sends them to the GPUs or CPU cores of one or several machines.

Runs are independent, named by their content and resumable, so spreading them needs a scheduler and
nothing else: each becomes a Ray task, and a task is `load_or_train`.

Needed: Ray (`pip install .[ray]`), and on each machine of a cluster this package and the data at
the same paths. If the machines share RUNS_DIR, a run whose machine dies goes on elsewhere from its
last checkpoint. If they don't, it begins anew there, and finished runs are sent to this process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from helpers.config import ROOT, Study
from helpers.runs import Run, RunError, load_or_train
from helpers.training import Progress, leave, stop_signals, write_atomically

# How often a run is taken up again when its process or its machine dies.
RESTARTS = 5
SECONDS_BETWEEN_REPORTS = 0.5
SECONDS_TO_STOP = 60
RESULT_FILES = ("run.json", "predictions.npz", "model.safetensors", "history.csv", "result.json")


def train_with_ray(runs: Sequence[Run], study: Study, display: Any) -> None:
    """Train runs as Ray tasks, in the order given as far as there is room; return when all ended.

    A run gets one GPU, or `study.cores_per_run` CPU cores. Ray starts on this machine, unless the
    variable RAY_ADDRESS names a cluster that is running. `display` is told when a run begins, how
    far it is and when it is finished. Ctrl-C lets every run write a checkpoint first.

    Raises ImportError without Ray, and RunError at the end, once the others are finished, naming
    the runs that failed for their own reasons or whose process died more than RESTARTS times.
    """
    ray = _start_ray(study)
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    on_gpu = study.device.type == "cuda"
    # The board stays on this machine, whose end is the end of all in any case.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board = ray.remote(num_cpus=0, scheduling_strategy=here)(_Board).remote()
    task = ray.remote(
        num_gpus=1 if on_gpu else 0,
        num_cpus=1 if on_gpu else study.cores_per_run,
        max_calls=0,  # a worker is kept for the next run, with the network it has compiled
        max_retries=RESTARTS,
    )(_train_run)
    pending = {task.remote(run, study, board): run for run in runs}
    failures = {}
    # An exception from a signal handler could get lost in one of Ray's callbacks.
    with stop_signals() as stop:
        try:
            while pending and not stop:
                ended, _ = ray.wait(list(pending), timeout=SECONDS_BETWEEN_REPORTS)
                for run, progress in ray.get(board.now.remote()).items():
                    display.begin(run)
                    display.update(run, progress)
                for reference in ended:
                    run = pending.pop(reference)
                    try:
                        _bring_back(ray.get(reference), study.runs_dir / run.key)
                    except ray.exceptions.RayTaskError as error:  # an exception of the run's own
                        failures[run] = f"{type(error.cause).__name__}: {error.cause}"
                    except ray.exceptions.RayError as error:
                        failures[run] = f"its process died {RESTARTS + 1} times: {error}"
                    display.begin(run)
                    display.finish(run)
            if stop:
                leave(stop[0])
        except (KeyboardInterrupt, SystemExit):
            for reference in pending:
                ray.cancel(reference)  # there a KeyboardInterrupt, on which a checkpoint is written
            ray.wait(list(pending), num_returns=len(pending), timeout=SECONDS_TO_STOP)
            raise
        finally:
            ray.kill(board)
    if failures:
        listed = "\n".join(f"{run.key}: {text}" for run, text in failures.items())
        raise RunError(
            f"{len(failures)} of {len(runs)} runs failed, the others are finished:\n{listed}"
        )


def _start_ray(study: Study) -> Any:
    """Return the module ray, connected to a cluster or to a Ray of this process's own."""
    try:
        import ray
    except ImportError as error:
        raise ImportError(
            "EXECUTOR is ray, but Ray isn't installed: pip install '.[ray]', or unset EXECUTOR"
        ) from error
    if not ray.is_initialized():  # it then stays, for the next runs of this process
        threads = {"OMP_NUM_THREADS": str(study.cores_per_run), "PYTHONPATH": str(ROOT)}
        ray.init(
            log_to_driver=False,
            logging_level="ERROR",
            include_dashboard=False,
            runtime_env={"env_vars": threads},
        )
    return ray


class _Board:
    """A Ray actor that knows how far each run is that is being trained."""

    def __init__(self) -> None:
        self.states: dict[Run, Progress] = {}

    def write(self, run: Run, progress: Progress) -> None:
        self.states[run] = progress

    def wipe(self, run: Run) -> None:
        self.states.pop(run, None)

    def now(self) -> dict[Run, Progress]:
        return self.states


def _train_run(run: Run, study: Study, board: Any) -> dict[str, bytes]:
    """Train one run in a Ray worker and return its files."""
    if study.device.type == "cuda":  # Ray shows a worker its own GPU only, as number 0
        study = replace(study, device=torch.device("cuda"))
    else:
        torch.set_num_threads(study.cores_per_run)
    try:
        result = load_or_train(run, study, on_progress=lambda p: board.write.remote(run, p))
    finally:
        board.wipe.remote(run)
    return {name: (result.folder / name).read_bytes() for name in RESULT_FILES}


def _bring_back(files: dict[str, bytes], folder: Path) -> None:
    """Write a run's files, result.json last, unless they came into being in this folder."""
    if (folder / "result.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    for name in RESULT_FILES:
        write_atomically(folder / name, files[name])
