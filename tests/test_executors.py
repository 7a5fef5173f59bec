"""Runs spread by Ray: the same results, and nothing lost when a process or a machine dies.

Two Ray nodes on one machine stand for two machines. Without Ray these tests are skipped;
`make test-scale` installs it and runs them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from benchmarks import soak
from helpers import data, executors, runs
from helpers.config import ROOT, Study
from helpers.runs import Run, RunError
from helpers.training import RECIPES, Progress, Recipe, load_checkpoint

SIZES = {"image_size": 16, "train_size": 120, "validation_size": 40, "test_size": 40}
RECIPE = Recipe("test", "sgd", 0.05, "triangular", batch_size=24, epochs=2)


def make_run(**changes: Any) -> Run:
    fingerprint = data.load_dataset("shapes", **SIZES).fingerprint
    settings = {"recipe": RECIPE, "epochs": 2, "seed": 0, "width": 0.125, **SIZES}
    model = changes.pop("model", "simple_cnn")
    return Run("shapes", fingerprint, model, **settings | changes)


class Record:
    """A display that remembers what it was told."""

    def __init__(self) -> None:
        self.begun: list[Run] = []
        self.finished: list[Run] = []

    def begin(self, run: Run) -> None:
        if run not in self.begun:
            self.begun.append(run)

    def update(self, run: Run, progress: Progress) -> None:
        assert run in self.begun and 1 <= progress.epoch <= run.epochs

    def finish(self, run: Run) -> None:
        self.finished.append(run)


# --- Without Ray -------------------------------------------------------------------------------


def test_ray_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, study: Study) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"Ray isn't installed: pip install '\.\[ray\]'"):
        runs.train_all([make_run()], study, executor="ray")


def test_an_unknown_executor_is_refused(study: Study) -> None:
    with pytest.raises(ValueError, match="executor is 'slurm'; expected local or ray"):
        runs.train_all([make_run()], study, executor="slurm")


def test_the_longest_runs_come_first(monkeypatch: pytest.MonkeyPatch, study: Study) -> None:
    wanted = [
        make_run(),
        make_run(epochs=3),
        make_run(model="resnet18"),
        make_run(seed=1),
        make_run(epochs=3),
    ]
    sent: list[Run] = []
    monkeypatch.setattr(executors, "train_with_ray", lambda all_, *_: sent.extend(all_))
    results = runs.train_all(wanted, replace(study, executor="ray"))
    assert sent == [wanted[2], wanted[1], wanted[0], wanted[3]]
    assert list(results) == [wanted[0], wanted[1], wanted[2], wanted[3]]


def test_costs_are_in_proportion_to_measured_times(study: Study) -> None:
    small, large = (
        runs.cost(make_run(model=name, image_size=32, width=0.25))
        for name in ("simple_cnn", "resnet18")
    )
    assert large / small == pytest.approx(8, rel=0.3)  # images/s on two cores: 8,000 and 1,000


def test_files_are_brought_back_and_never_over_those_that_are_there(
    study: Study, tmp_path: Path
) -> None:
    run, other = make_run(), soak.make_study(tmp_path / "driver")
    result = runs.load_or_train(run, study)
    files = {name: (result.folder / name).read_bytes() for name in executors.RESULT_FILES}
    folder = other.runs_dir / run.key
    executors._bring_back(files, folder)
    assert soak.differences(run, result.folder, folder) == []
    executors._bring_back(files | {"history.csv": b"another"}, folder)
    assert runs.load_result(run, folder).test_accuracy == result.test_accuracy


# --- With Ray ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ray() -> Any:
    return pytest.importorskip("ray", reason="Ray isn't installed; `make test-scale` installs it")


@pytest.fixture
def cluster(ray: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Two nodes with one core each, and a head with none."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    cluster.nodes = [cluster.add_node(num_cpus=1), cluster.add_node(num_cpus=1)]
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def workers() -> list[psutil.Process]:
    """The processes that Ray trains runs in now."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if "ray::_train_run" in " ".join(process.info["cmdline"] or []):
            found.append(process)
    return found


def wait_for(condition: Any, seconds: float = 120) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError(f"{condition} didn't come true in {seconds} s")


def place(study: Study, run: Run) -> tuple[int, int]:
    """Epoch and step of a run's checkpoint; (0, 0) without one."""
    path = study.runs_dir / run.key / "resume.pt"
    try:
        state = load_checkpoint(path, run.key)
    except FileNotFoundError:
        return 0, 0
    return state["epoch"], state["step"]


def test_results_are_those_of_one_process(cluster: Any, study: Study, tmp_path: Path) -> None:
    wanted = [make_run(seed=seed, dropout=0.2) for seed in range(3)] + [make_run(model="resnet20")]
    alone = soak.make_study(tmp_path / "alone")
    found = runs.train_all(wanted, study, executor="ray")
    torch.set_num_threads(1)
    for run, result in runs.train_all(wanted, alone).items():
        assert soak.differences(run, result.folder, found[run].folder) == []
    times = [path.stat().st_mtime_ns for path in study.runs_dir.glob("*/result.json")]
    runs.train_all(wanted, study, executor="ray")  # a second time: nothing to do
    assert [p.stat().st_mtime_ns for p in study.runs_dir.glob("*/result.json")] == times


def kill_worker(cluster: Any) -> None:
    """Kill the one process that trains, as the kernel does when memory is short."""
    (process,) = workers()
    process.send_signal(signal.SIGKILL)


def kill_node(cluster: Any) -> None:
    """Kill the machine that trains: its raylet and all below it."""
    (process,) = workers()
    above = {parent.pid for parent in process.parents()}
    (node,) = (
        n
        for n in cluster.nodes
        if {info.process.pid for all_ in n.all_processes.values() for info in all_} & above
    )
    cluster.remove_node(node, allow_graceful=False)


@pytest.mark.parametrize("kill", [kill_worker, kill_node])
def test_a_death_costs_the_time_since_the_last_checkpoint(
    cluster: Any, study: Study, tmp_path: Path, kill: Any
) -> None:
    short, long = make_run(), make_run(model="resnet20", epochs=80, dropout=0.2)
    alone = soak.make_study(tmp_path / "alone")
    left: list[dict[str, Any]] = []

    def strike() -> None:
        wait_for(lambda: (study.runs_dir / short.key / "result.json").exists())
        wait_for(lambda: place(study, long)[0] >= 2)
        kill(cluster)
        left.append(load_checkpoint(study.runs_dir / long.key / "resume.pt", long.key))

    thread = threading.Thread(target=strike)
    thread.start()
    record = Record()
    executors.train_with_ray([long, short], study, record)
    thread.join()
    (checkpoint,) = left
    assert sorted(record.finished, key=str) == sorted([short, long], key=str)
    # The epochs before the checkpoint weren't trained again: they have the same seconds.
    history = runs.load_result(long, study.runs_dir / long.key).history.to_dict("records")
    assert checkpoint["epoch"] >= 2 and history[: checkpoint["epoch"]] == checkpoint["history"]
    result = runs.load_or_train(long, alone)
    assert soak.differences(long, result.folder, study.runs_dir / long.key) == []


def test_failures_of_a_run_s_own_are_told_once_and_the_others_go_on(
    cluster: Any, study: Study
) -> None:
    diverging = make_run(recipe=replace(RECIPE, learning_rate=1e30))
    good = [make_run(seed=seed) for seed in (1, 2)]
    with pytest.raises(RunError, match="1 of 3 runs failed, the others are finished") as caught:
        runs.train_all([diverging, *good], study, executor="ray")
    assert str(caught.value).count(diverging.key) == 1
    assert "TrainingDiverged: the training loss stopped being finite" in str(caught.value)
    assert all((study.runs_dir / run.key / "result.json").exists() for run in good)
    assert (study.runs_dir / diverging.key / "failed.json").exists()


INTERRUPTED = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import test_executors as here
from benchmarks import soak
from helpers import runs
study = soak.make_study(Path({folder!r}))
runs.train_all(here.long_runs(), study, executor="ray")
"""


def long_runs() -> list[Run]:
    recipe = replace(RECIPES["onecycle"], batch_size=24)
    return [make_run(model="resnet20", recipe=recipe, epochs=80, seed=seed) for seed in (0, 1)]


def test_ctrl_c_leaves_whole_checkpoints(ray: Any, study: Study, tmp_path: Path) -> None:
    folder = tmp_path / "study"
    script = INTERRUPTED.format(tests=str(Path(__file__).parent), folder=str(folder))
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"},
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    both = long_runs()
    wait_for(lambda: all(place(study, run)[0] >= 1 for run in both))
    before = [place(study, run) for run in both]
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0 and "KeyboardInterrupt" in errors
    after = [place(study, run) for run in both]
    assert not list(study.runs_dir.glob("*/result.json")), "it was over before Ctrl-C came"
    # Each went on to where Ctrl-C met it.
    assert all(late > early for early, late in zip(before, after, strict=True))
    alone = soak.make_study(tmp_path / "alone")
    torch.set_num_threads(1)
    for run in both:
        done, straight = runs.load_or_train(run, study), runs.load_or_train(run, alone)
        assert soak.differences(run, straight.folder, done.folder) == []
