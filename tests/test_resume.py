"""A run that is cut off and resumed is the run that wasn't, bit for bit; bad checkpoints say so."""

from __future__ import annotations

import builtins
import errno
import hashlib
import importlib
import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from helpers import training
from helpers.config import ROOT
from helpers.data import Augmentation, Dataset, load_dataset
from helpers.models import build_model
from helpers.runs import load_or_train, load_result
from helpers.training import CheckpointError, Recipe, Trained, load_checkpoint, train

sys.path.insert(0, str(ROOT))  # the benchmarks aren't installed
soak = importlib.import_module("benchmarks.soak")

EPOCHS, STEPS = 4, 5
NEVER = 1e9  # seconds between checkpoints
RECIPES = {
    "sgd": Recipe(
        "sgd",
        "sgd",
        0.05,
        "triangular",
        batch_size=16,
        epochs=EPOCHS,
        nesterov=True,
        weight_decay=5e-4,
        augmentation=Augmentation(crop_padding=4, cutout=8),
    )
}
RECIPES["adam"] = replace(
    RECIPES["sgd"], name="adam", optimizer="adam", learning_rate=1e-3, nesterov=False
)


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    sizes = {"train_size": 80, "validation_size": 40, "test_size": 40}
    return load_dataset("shapes", image_size=16, **sizes)


Attempt = Callable[..., tuple[dict[str, Tensor], Trained]]


@pytest.fixture
def attempt(dataset: Dataset) -> Attempt:
    """Train a fresh network, or go on with what is in the folder; return weights and history."""

    def go(
        folder: Path | None, recipe: str = "sgd", model: str = "simple_cnn", **options: Any
    ) -> tuple[dict[str, Tensor], Trained]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network: nn.Module = build_model(
                model, num_classes=10, image_size=16, width=0.25, dropout=0.3
            )
        options = {"epochs": EPOCHS, "seed": 1, "patience": 3, "identity": "a run"} | options
        trained = train(network, dataset, RECIPES[recipe], folder=folder, **options)
        return network.state_dict(), trained

    return go


def assert_identical(
    one: tuple[dict[str, Tensor], Trained], other: tuple[dict[str, Tensor], Trained]
) -> None:
    for name, value in one[0].items():
        assert torch.equal(value, other[0][name]), name
    first, second = (
        [replace(record, seconds=0.0) for record in trained.history] for _, trained in (one, other)
    )
    assert first == second
    assert one[1].best_epoch == other[1].best_epoch
    assert one[1].stopped_early == other[1].stopped_early


def before_step(
    monkeypatch: pytest.MonkeyPatch, number: int, action: Callable[[], None], every: bool = False
) -> None:
    """Do something in the middle of a step of the run (or of each from there on)."""
    step = training._Loop._train_step

    def acting(self: Any, *rest: Any) -> None:
        now = self.epoch * STEPS + self.step
        step(self, *rest)
        if now == number or (every and now > number):
            action()

    monkeypatch.setattr(training._Loop, "_train_step", acting)


def crash() -> None:
    raise RuntimeError("power cut")


def raising(number: signal.Signals) -> Callable[[], None]:
    return lambda: signal.raise_signal(number)


# --- Interrupts at prescribed places -----------------------------------------------------------


@pytest.mark.parametrize("model", ["simple_cnn", "resnet20"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_interrupted_after_every_single_step(
    monkeypatch: pytest.MonkeyPatch, attempt: Attempt, tmp_path: Path, recipe: str, model: str
) -> None:
    straight = attempt(None, recipe, model)
    with monkeypatch.context() as patch:
        before_step(patch, 0, raising(signal.SIGINT), every=True)
        resumed, interrupts = None, 0
        for _ in range(STEPS * EPOCHS + 1):
            try:
                resumed = attempt(tmp_path, recipe, model, checkpoint_seconds=NEVER)
                break
            except KeyboardInterrupt:
                interrupts += 1
    assert resumed is not None, "it goes on for ever"
    assert interrupts == STEPS * len(straight[1].history)
    assert_identical(straight, resumed)


@pytest.mark.parametrize("step", [0, 7, 9])  # the first, one in mid-epoch, an epoch's last
@pytest.mark.parametrize(
    ("number", "ending"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_a_signal_leaves_a_checkpoint_after_the_step(
    monkeypatch: pytest.MonkeyPatch,
    attempt: Attempt,
    tmp_path: Path,
    step: int,
    number: signal.Signals,
    ending: type[BaseException],
) -> None:
    with monkeypatch.context() as patch, pytest.raises(ending) as caught:
        before_step(patch, step, raising(number))
        attempt(tmp_path, checkpoint_seconds=NEVER)
    if ending is SystemExit:
        assert caught.value.code == 128 + signal.SIGTERM
    state = load_checkpoint(tmp_path / "resume.pt", "a run")
    assert state["epoch"] * STEPS + state["step"] == step + 1
    assert_identical(attempt(None), attempt(tmp_path))


def test_a_signal_during_validation_keeps_the_epoch(
    monkeypatch: pytest.MonkeyPatch, attempt: Attempt, tmp_path: Path
) -> None:
    predict = training.predict

    def interrupted(*rest: Any, **options: Any) -> Tensor:
        signal.raise_signal(signal.SIGINT)
        return predict(*rest, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "predict", interrupted)
        attempt(tmp_path, checkpoint_seconds=NEVER)
    state = load_checkpoint(tmp_path / "resume.pt", "a run")
    assert (state["epoch"], state["step"], len(state["history"])) == (1, 0, 1)
    assert_identical(attempt(None), attempt(tmp_path))


@pytest.mark.parametrize("model", ["simple_cnn", "resnet20"])
def test_cut_off_without_warning(
    monkeypatch: pytest.MonkeyPatch, attempt: Attempt, tmp_path: Path, model: str
) -> None:
    """Crashes leave only the checkpoints of the interval: steps are repeated, not lost."""
    for step in (3, 5, 5, 12, 19):
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
            before_step(patch, step, crash)
            attempt(tmp_path, model=model, checkpoint_seconds=0.0)
        state = load_checkpoint(tmp_path / "resume.pt", "a run")
        assert state["epoch"] * STEPS + state["step"] == step
    assert_identical(attempt(None, model=model), attempt(tmp_path, model=model))


def test_a_checkpoint_is_written_at_the_end_of_an_epoch(
    monkeypatch: pytest.MonkeyPatch, attempt: Attempt, tmp_path: Path
) -> None:
    """With an interval of which the epoch is more than a tenth, but not the whole."""
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
        clock = iter(range(10_000))  # each look at the clock is a second later
        patch.setattr(training.time, "monotonic", lambda: float(next(clock)))
        before_step(patch, 2 * STEPS, crash)
        attempt(tmp_path, checkpoint_seconds=50.0)
    state = load_checkpoint(tmp_path / "resume.pt", "a run")
    assert (state["epoch"], state["step"]) == (2, 0)
    assert_identical(attempt(None), attempt(tmp_path))


def test_early_stopping_goes_on_where_it_was(
    monkeypatch: pytest.MonkeyPatch, attempt: Attempt, tmp_path: Path
) -> None:
    """The best epoch lies before the interrupt, the stop after it."""
    epoch = 0
    finish = training._Loop._finish_epoch

    def remember(self: Any) -> None:
        nonlocal epoch
        epoch = self.epoch
        finish(self)

    def predict(model: nn.Module, split: Any, *rest: Any, **options: Any) -> Tensor:
        confidence = [1.0, 3.0, 2.0, 2.5, 2.9, 9.0][epoch]
        return confidence * nn.functional.one_hot(split.labels, 10).float()

    monkeypatch.setattr(training._Loop, "_finish_epoch", remember)
    monkeypatch.setattr(training, "predict", predict)
    straight = attempt(None, epochs=6)
    assert (straight[1].best_epoch, len(straight[1].history)) == (2, 5)
    for step in (3 * STEPS + 1, 5 * STEPS - 1):  # the second on the last step before it stops
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            before_step(patch, step, raising(signal.SIGINT))
            attempt(tmp_path, epochs=6, checkpoint_seconds=NEVER)
    assert_identical(straight, attempt(tmp_path, epochs=6))
    # Interrupted in its last validation, a run has nothing left to train.
    assert straight[1].stopped_early


def test_a_finished_training_resumes_to_itself(attempt: Attempt, tmp_path: Path) -> None:
    first = attempt(tmp_path, checkpoint_seconds=0.0)
    assert load_checkpoint(tmp_path / "resume.pt", "a run")["epoch"] == len(first[1].history)
    assert_identical(first, attempt(tmp_path))


def test_seconds_add_up_over_the_interruptions(
    monkeypatch: pytest.MonkeyPatch, attempt: Attempt, tmp_path: Path
) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        before_step(patch, 8, raising(signal.SIGINT))
        attempt(tmp_path)
    before = load_checkpoint(tmp_path / "resume.pt", "a run")["seconds"]
    trained = attempt(tmp_path)[1]
    assert 0 < before < trained.seconds
    assert sum(record.seconds for record in trained.history) == pytest.approx(trained.seconds)


# --- Real signals to real processes ------------------------------------------------------------

SCRIPT = """
import sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from benchmarks import soak
from helpers import training
step = training._Loop._train_step
def slow(self, *rest):
    step(self, *rest)
    if self.epoch == 1 and self.step == 1:
        print("in mid-epoch", flush=True)
    time.sleep(0.02 if self.epoch else 0)
training._Loop._train_step = slow
study = soak.make_study(Path({folder!r}))
run = soak.make_run(Path({images!r}), study, "onecycle", "simple_cnn", epochs=3)
soak.load_or_train(run, study, checkpoint_seconds=1e9)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_a_process(tmp_path: Path, number: signal.Signals) -> None:
    images = soak.draw_folder(tmp_path / "images")
    folder = tmp_path / "stopped"
    script = SCRIPT.format(root=str(ROOT), folder=str(folder), images=str(images))
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "in mid-epoch\n", process.communicate()[1]
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    expected = -signal.SIGINT if number == signal.SIGINT else 128 + signal.SIGTERM
    assert process.returncode == expected, errors
    study, other = soak.make_study(folder), soak.make_study(tmp_path / "straight")
    run = soak.make_run(images, study, "onecycle", "simple_cnn", epochs=3)
    here = study.runs_dir / run.key
    state = load_checkpoint(here / "resume.pt", run.key)
    assert state["epoch"] == 1 and 1 < state["step"] <= STEPS
    assert not (here / "result.json").exists()
    load_or_train(run, other)
    load_or_train(run, study)
    assert soak.differences(run, other.runs_dir / run.key, here) == []


@pytest.mark.parametrize(("recipe", "model"), [("onecycle", "simple_cnn"), ("adam", "resnet20")])
def test_killed_ten_times_at_random_moments(tmp_path: Path, recipe: str, model: str) -> None:
    images = soak.draw_folder(tmp_path / "images")
    epochs = 20 if model == "simple_cnn" else 12
    run = soak.make_run(images, soak.make_study(tmp_path), recipe, model, epochs=epochs)
    done = soak.kill_and_compare(run, tmp_path, kills=10, generator=np.random.default_rng(0))
    assert done.differences == ()
    assert done.kills == 10
    assert list(done.steps) == sorted(done.steps)  # no checkpoint goes back
    assert len(set(done.steps)) >= 3  # the kills hit the run at different steps


# --- Checkpoints that can't be used ------------------------------------------------------------


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch, attempt: Attempt, tmp_path: Path) -> Path:
    """A checkpoint in mid-epoch."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        before_step(patch, 7, raising(signal.SIGINT))
        attempt(tmp_path)
    return tmp_path / "resume.pt"


def assert_refused(attempt: Attempt, path: Path, reason: str, **options: Any) -> None:
    content = path.read_bytes()
    with pytest.raises(CheckpointError, match=reason) as caught:
        attempt(path.parent, **options)
    assert f"{path} " in str(caught.value)
    assert f"Delete {path} to train this run from the start." in str(caught.value)
    assert path.read_bytes() == content  # an error destroys nothing


@pytest.mark.parametrize(
    ("length", "reason"),
    [
        (0, "no checkpoint"),
        (10, "no checkpoint"),
        (40, "is damaged"),
        (-1, "is damaged"),
        (-5000, "is damaged"),
    ],
)
def test_a_truncated_checkpoint(
    attempt: Attempt, interrupted: Path, length: int, reason: str
) -> None:
    interrupted.write_bytes(interrupted.read_bytes()[:length])
    assert_refused(attempt, interrupted, reason)


@pytest.mark.parametrize("share", [0.002, 0.1, 0.5, 0.9, 0.9999])
def test_a_checkpoint_with_a_flipped_bit(attempt: Attempt, interrupted: Path, share: float) -> None:
    content = bytearray(interrupted.read_bytes())
    place = max(len(training.CHECKPOINT_FORMAT), int(share * len(content)))
    content[place] ^= 4
    interrupted.write_bytes(content)
    assert_refused(attempt, interrupted, "is damaged: its checksum")


def test_a_checkpoint_of_another_run(attempt: Attempt, interrupted: Path) -> None:
    reason = "belongs to the run a run, expected another run"
    assert_refused(attempt, interrupted, reason, identity="another run")


def test_a_checkpoint_of_an_older_format(attempt: Attempt, interrupted: Path) -> None:
    content = interrupted.read_bytes().replace(b"checkpoint 2\n", b"checkpoint 1\n", 1)
    interrupted.write_bytes(content)
    assert_refused(attempt, interrupted, "begins with b'resnet-study checkpoint 1'")


def test_deleting_a_bad_checkpoint_is_the_remedy(attempt: Attempt, interrupted: Path) -> None:
    interrupted.write_bytes(b"")
    interrupted.unlink()
    assert_identical(attempt(None), attempt(interrupted.parent))


class _Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_nothing_in_a_checkpoint_is_executed(attempt: Attempt, tmp_path: Path) -> None:
    """Not even with a checksum that fits."""
    trap, buffer = tmp_path / "executed", io.BytesIO()
    torch.save({"identity": "a run", "model": _Malicious(trap)}, buffer)
    payload = buffer.getvalue()
    digest = hashlib.sha256(payload).digest()
    (tmp_path / "resume.pt").write_bytes(training.CHECKPOINT_FORMAT + digest + payload)
    with pytest.raises(CheckpointError, match="isn't a checkpoint"):
        attempt(tmp_path)
    assert not trap.exists()


# --- Full disks and folders that can't be written ----------------------------------------------


def full_disk(patch: pytest.MonkeyPatch, name: str, operation: str) -> None:
    """Let `operation` ("open", "write" or "replace") fail for files of this name."""

    def open_(path: Path, mode: str) -> Any:
        if operation == "replace" or f".{name}." not in path.name:
            return builtins.open(path, mode)
        if operation == "open":
            raise no_space()
        path.write_bytes(b"as far as it fits")
        return _FullFile()

    class Os:
        def __getattr__(self, attribute: str) -> Any:
            return getattr(os, attribute)

        def replace(self, source: Path, target: Path) -> None:
            if operation == "replace" and target.name == name:
                raise no_space()
            os.replace(source, target)

    patch.setattr(training, "open", open_, raising=False)
    patch.setattr(training, "os", Os())


def no_space() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device")


class _FullFile:
    def __enter__(self) -> _FullFile:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def write(self, content: bytes) -> None:
        raise no_space()


@pytest.mark.parametrize("operation", ["open", "write", "replace"])
@pytest.mark.parametrize("name", ["resume.pt", "history.csv"])
def test_a_full_disk_while_training(
    monkeypatch: pytest.MonkeyPatch, attempt: Attempt, interrupted: Path, name: str, operation: str
) -> None:
    content = interrupted.read_bytes()
    with monkeypatch.context() as patch, pytest.raises(OSError, match="Free disk space") as caught:
        full_disk(patch, name, operation)
        attempt(interrupted.parent, checkpoint_seconds=0.0 if name == "resume.pt" else NEVER)
    assert caught.value.errno == errno.ENOSPC
    assert f"{interrupted.parent / name} can't be written" in str(caught.value)
    assert interrupted.read_bytes() == content  # the earlier checkpoint is whole
    assert list(interrupted.parent.glob(".*")) == []  # and no rest takes up space
    assert_identical(attempt(None), attempt(interrupted.parent))


@pytest.mark.parametrize("name", ["predictions.npz", "model.safetensors", "result.json"])
def test_a_full_disk_while_the_result_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    images = soak.draw_folder(tmp_path / "images")
    study, other = soak.make_study(tmp_path / "full"), soak.make_study(tmp_path / "roomy")
    run = replace(soak.make_run(images, study, "adam", "simple_cnn"), epochs=2)
    finished = replace(run, seed=5)
    load_or_train(finished, study)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="Free disk space") as caught:
        full_disk(patch, name, "write")
        load_or_train(run, study, checkpoint_seconds=0.0)
    here = study.runs_dir / run.key
    assert str(here / name) in str(caught.value)
    assert not (here / "result.json").exists() and (here / "resume.pt").exists()
    assert load_result(finished, study.runs_dir / finished.key).run == finished
    with monkeypatch.context() as patch:
        patch.setattr(training._Loop, "_train_step", lambda *_: crash())  # nothing is left to train
        load_or_train(run, study)
    load_or_train(run, other)
    assert soak.differences(run, other.runs_dir / run.key, here) == []


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    images = soak.draw_folder(tmp_path / "images")
    study = soak.make_study(tmp_path)
    run = soak.make_run(images, study, "adam", "simple_cnn")
    study.runs_dir.write_text("a file where the folder should be")
    with pytest.raises(OSError, match="set RUNS_DIR to another folder") as caught:
        load_or_train(run, study)
    assert str(study.runs_dir / run.key) in str(caught.value)


def test_a_read_only_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    images = soak.draw_folder(tmp_path / "images")
    study = soak.make_study(tmp_path)
    run = replace(soak.make_run(images, study, "adam", "simple_cnn"), epochs=1)
    stored = load_or_train(run, study)

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    monkeypatch.setattr(training, "open", refuse, raising=False)
    assert load_or_train(run, study).metrics == stored.metrics  # reading needs no permission
    with pytest.raises(PermissionError, match="Make it writable, or set RUNS_DIR"):
        load_or_train(replace(run, seed=9), study)
