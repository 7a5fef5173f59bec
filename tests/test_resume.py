"""A run that is cut off and resumed is the run that wasn't, bit for bit; bad checkpoints say so."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers import runs, training
from helpers.config import Study
from helpers.recipes import RECIPES
from helpers.runs import Result, Run, load_or_train
from helpers.training import EpochRecord

FAST, ADAM = (replace(RECIPES[name], batch_size=16) for name in ("fast", "adam"))
CASES = {
    "momentum": {"recipe": FAST, "epochs": 30},
    "batch norms": {"recipe": ADAM, "model": "resnet20", "epochs": 12},
    "early stopping": {"recipe": ADAM, "epochs": 50, "patience": 16},
}
RESULT_FILES = {"run.json", "history.csv", "predictions.npz", "model.safetensors", "result.json"}


# These processes start in milliseconds: a server has imported what takes seconds.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["helpers.runs", "torch._dynamo"])
every_case = pytest.mark.parametrize("attempt", CASES.values(), ids=CASES, indirect=True)


class Cut(Exception):
    pass


@dataclass(frozen=True)
class Attempt:
    """A run that is to be cut off, in a study of its own."""

    run: Run
    study: Study
    differing: Callable[[Result, Result], list[str]]

    @property
    def folder(self) -> Path:
        return self.study.runs_dir / self.run.key

    def go(self, cut_after: int = 10**6, seconds: float = 0.0) -> Result:
        """Train or go on, as far as the end of the first epoch from `cut_after` on."""

        def on_epoch(record: EpochRecord) -> None:
            if record.epoch >= cut_after:
                raise Cut

        return load_or_train(self.run, self.study, on_epoch=on_epoch, checkpoint_seconds=seconds)

    def elsewhere(self) -> Attempt:
        return replace(self, study=replace(self.study, runs_dir=self.study.runs_dir / "elsewhere"))

    def assert_undisturbed(self, result: Result) -> None:
        """Compare with the run in one go, and look for what is left over."""
        straight = self.elsewhere().go()
        assert straight.stopped_early == (self.run.patience is not None)
        assert self.differing(straight, result) == []
        assert {path.name for path in self.folder.iterdir()} - {"lock"} == RESULT_FILES


@pytest.fixture
def attempt(
    request: pytest.FixtureRequest,
    small_run: Callable[..., Run],
    small_study: Study,
    differing: Callable[[Result, Result], list[str]],
) -> Attempt:
    settings = getattr(request, "param", CASES["momentum"] | {"epochs": 5})
    return Attempt(small_run(**settings), small_study, differing)


@every_case
def test_cut_off_after_epochs_1_2_4_7_and_so_on(attempt: Attempt) -> None:
    resumed, cuts = None, 0
    while resumed is None:
        with contextlib.suppress(Cut):
            resumed = attempt.go(cut_after=1 + cuts * (cuts + 1) // 2)
        cuts += 1
    attempt.assert_undisturbed(resumed)
    assert cuts >= 4


def test_a_checkpoint_is_written_after_an_epoch_once_its_time_has_come(attempt: Attempt) -> None:
    for seconds in (1e9, 0.0):
        with pytest.raises(Cut):
            attempt.go(cut_after=3, seconds=seconds)
        assert (attempt.folder / "resume.pt").exists() == (seconds == 0)
    history = (attempt.folder / "history.csv").read_text()
    (attempt.folder / ".run.json.left.tmp").touch()  # as by a kill while it was written
    resumed = attempt.go()
    # Even the seconds are the same: these epochs weren't trained again.
    assert (attempt.folder / "history.csv").read_text().startswith(history)
    attempt.assert_undisturbed(resumed)


def work(run: Run, study: Study, pipe: Any = None) -> None:
    """Train a run; with a pipe, tell of each epoch and wait for an answer."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a background job lacks
    wait = pipe and (lambda record: (pipe.send(record.epoch), pipe.recv()))
    load_or_train(run, study, on_epoch=wait, checkpoint_seconds=0.0)


@every_case
def test_killed_at_random_moments(attempt: Attempt) -> None:
    """SIGKILL hits reading the data, a step, a validation, or the writing of a file."""

    def killed(attempt: Attempt, seconds: float | None) -> bool:
        process = processes.Process(target=work, args=(attempt.run, attempt.study))
        process.start()
        process.join(seconds)
        was_killed = process.exitcode is None
        process.kill()
        process.join()
        assert was_killed or process.exitcode == 0
        return was_killed

    killed(attempt.elsewhere(), 0)  # starts the server, untimed
    begun = time.perf_counter()
    killed(attempt.elsewhere(), None)
    duration = time.perf_counter() - begun
    generator, kills, resumable = np.random.default_rng(), 0, 0
    # On a busy machine every other kill may come before the first checkpoint.
    while (kills < 4 or not resumable) and killed(attempt, generator.uniform(0, duration / 2)):
        kills += 1
        resumable += (attempt.folder / "resume.pt").exists()
    assert kills
    attempt.assert_undisturbed(attempt.go())


def test_ctrl_c_leaves_the_checkpoint_of_the_last_epoch(attempt: Attempt) -> None:
    here, there = processes.Pipe()
    (process := processes.Process(target=work, args=(attempt.run, attempt.study, there))).start()
    there.close()  # so that a process that dies ends the waiting
    here.send("go on after the first")
    assert (here.recv(), here.recv()) == (1, 2)
    os.kill(process.pid, signal.SIGINT)
    process.join()
    assert process.exitcode == 1  # a KeyboardInterrupt that nobody caught
    history = (attempt.folder / "history.csv").read_text()
    with pytest.raises(Cut):
        attempt.go(cut_after=1)
    *before, third = (attempt.folder / "history.csv").read_text().splitlines()
    assert before == history.splitlines() and third.startswith("3,")


@pytest.mark.parametrize("name", ["predictions.npz", "model.safetensors", "result.json"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("No space left")])
def test_a_result_that_was_cut_off_is_finished_without_training(
    monkeypatch: pytest.MonkeyPatch, attempt: Attempt, name: str, error: BaseException
) -> None:
    write = runs.write_atomically

    def failing(path: Path, content: bytes) -> None:
        if path.name == name:
            raise error
        write(path, content)

    with monkeypatch.context() as patch, pytest.raises(type(error)):
        patch.setattr(runs, "write_atomically", failing)
        attempt.go()
    assert (attempt.folder / "resume.pt").exists()
    assert not (attempt.folder / "result.json").exists()
    attempt.assert_undisturbed(attempt.go(cut_after=0))  # no epoch is trained again


def test_a_checkpoint_of_another_arithmetic_is_begun_anew(
    monkeypatch: pytest.MonkeyPatch, attempt: Attempt
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Cut):
        patch.setattr(training, "compute_dtype", lambda device: torch.float16)  # with a scaler
        attempt.go(cut_after=3)
    monkeypatch.setattr(training, "compute_dtype", lambda device: torch.float32)
    with pytest.warns(match=r"in cpu, torch.float16, now it is cpu, torch.float32: begun anew"):
        result = attempt.go()
    attempt.assert_undisturbed(result)
