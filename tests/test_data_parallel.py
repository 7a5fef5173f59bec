"""One run trained by several processes: equal shares, one curve, one checkpoint.

The processes talk through gloo on the CPU. Each test starts them as a user would, with torchrun.
"""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from benchmarks import soak
from helpers import data, runs, training
from helpers.config import ROOT, Study
from helpers.data import Augmentation, ResidentLoader, StreamingLoader
from helpers.runs import Run
from helpers.starts import Transfer
from helpers.training import RECIPES, Recipe, load_checkpoint

SIZES = {"image_size": 16, "train_size": 120, "validation_size": 40, "test_size": 40}
RECIPE = Recipe("test", "sgd", 0.05, "triangular", batch_size=24, epochs=2, weight_decay=5e-4)


def make_run(dataset: str = "shapes", **changes: object) -> Run:
    fingerprint = data.load_dataset(dataset, **SIZES).fingerprint
    settings = {"recipe": RECIPE, "epochs": 3, "seed": 0, "width": 0.125, **SIZES}
    return Run(dataset, fingerprint, "resnet18", **settings | changes)


def start(run: Run, study: Study, processes: int, script: str = "") -> subprocess.Popen:
    """Start torchrun on a run's file, or on a script that is told its path."""
    study.runs_dir.mkdir(parents=True, exist_ok=True)
    path = study.runs_dir / "RUN.json"
    path.write_text(json.dumps(asdict(run)))
    what = ["-m", "helpers.training"]
    if script:
        (study.runs_dir / "script.py").write_text(script)
        what = [str(study.runs_dir / "script.py")]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    own = {"RUNS_DIR": str(study.runs_dir), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*launcher, f"--nproc-per-node={processes}", *what, str(path)],
        env=os.environ | own | {"DEVICE": "cpu", "PROGRESS": "none"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def train_together(run: Run, study: Study, processes: int, script: str = "") -> str:
    process = start(run, study, processes, script)
    shown, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    return shown


def losses(run: Run, study: Study) -> list[float]:
    result = runs.load_result(run, study.runs_dir / run.key)
    return result.history["train_loss"].tolist()


# --- Shares ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [ResidentLoader, StreamingLoader])
@pytest.mark.parametrize("ranks", [2, 3])
def test_the_shares_of_a_batch_are_the_batch(kind: type[ResidentLoader], ranks: int) -> None:
    split = data.load_dataset("shapes", **SIZES).train
    augmentation = Augmentation(cutout=8, colour_jitter=0.2, mixup=1.0)
    settings = (split, torch.full((3,), 0.4), torch.full((3,), 0.2), 12, augmentation)
    whole = list(kind(*settings, seed=3).batches(epoch=1, start=4))
    shares = [
        list(kind(*settings, seed=3, rank=r, ranks=ranks).batches(epoch=1, start=4))
        for r in range(ranks)
    ]
    assert len(whole) == 6
    for batch, (images, labels) in enumerate(whole):
        parts = [share[batch] for share in shares]
        assert {len(part) for part, _ in parts} == {12 // ranks}
        found = torch.cat([part for part, _ in parts]), torch.cat([part for _, part in parts])
        key = images.flatten(1).double().sum(1)
        order, order_found = key.argsort(), found[0].flatten(1).double().sum(1).argsort()
        torch.testing.assert_close(found[0][order_found], images[order], rtol=0, atol=0)
        torch.testing.assert_close(found[1][order_found], labels[order], rtol=0, atol=0)


def test_a_batch_that_cannot_be_shared_is_refused() -> None:
    dataset = data.load_dataset("shapes", **SIZES)
    settings = {"augmentation": Augmentation(), "seed": 0, "device": torch.device("cpu")}
    data.make_loader(dataset, batch_size=12, rank=1, ranks=3, **settings)
    with pytest.raises(ValueError, match="batch_size is 20; 3 processes need a multiple of 6"):
        data.make_loader(dataset, batch_size=20, rank=1, ranks=3, **settings)


# --- Training ----------------------------------------------------------------------------------


def test_one_process_gives_the_ordinary_result(study: Study, tmp_path: Path) -> None:
    other = soak.make_study(tmp_path / "alone")
    run = make_run(dropout=0.2, patience=2)
    shown = train_together(run, study, 1)
    assert "test accuracy" in shown and str(study.runs_dir / run.key) in shown
    runs.load_or_train(run, other)
    here, there = study.runs_dir / run.key, other.runs_dir / run.key
    assert soak.differences(run, there, here) == []
    machine = json.loads((here / "result.json").read_text())["machine"]
    assert "processes" not in machine["device"]


def test_two_processes_follow_the_curve_of_one(study: Study, tmp_path: Path) -> None:
    """With fixed batch-norm statistics the sums are the same; with a share's own, they differ."""
    other = soak.make_study(tmp_path / "alone")
    source = make_run()
    gentle = replace(RECIPE, learning_rate=0.005)
    frozen = make_run(start=Transfer(source, frozen=True), seed=1, recipe=gentle)
    assert "test accuracy" in train_together(frozen, study, 2)  # and the source before it
    runs.load_or_train(frozen, other)
    together, alone = losses(frozen, study), losses(frozen, other)
    # The source's weights differ in the two; the curve is compared on equal ones.
    folder = study.runs_dir / source.key
    equal = soak.make_study(tmp_path / "equal")
    equal.runs_dir.mkdir(parents=True)
    os.symlink(folder, equal.runs_dir / source.key)
    runs.load_or_train(frozen, equal)
    assert together == pytest.approx(losses(frozen, equal), rel=2e-3)
    assert together != alone
    assert losses(source, study) == pytest.approx(losses(source, other), rel=0.1)
    machine = json.loads((folder / "result.json").read_text())["machine"]
    assert machine["device"].startswith("2 processes, each on ")


def test_a_stopped_training_goes_on_bit_for_bit(study: Study, tmp_path: Path) -> None:
    """SIGTERM to torchrun reaches both processes, which stop at the same step."""
    other = soak.make_study(tmp_path / "straight")
    run = make_run(epochs=60, dropout=0.3, recipe=replace(RECIPES["onecycle"], batch_size=24))
    process = start(run, study, 2)
    folder = study.runs_dir / run.key
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        history = folder / "history.csv"
        if history.exists() and len(list(csv.reader(history.open()))) > 5:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert not (folder / "result.json").exists(), "it was over before the signal came"
    state = load_checkpoint(folder / "resume.pt", run.key)
    assert 4 <= state["epoch"] < 60 and len(state["generators"]) == 2, errors
    train_together(run, study, 2)
    train_together(run, other, 2)
    assert soak.differences(run, other.runs_dir / run.key, folder) == []


APART = """
import os, sys
os.environ["RUNS_DIR"] += os.environ["RANK"]
from helpers import training
training.main(sys.argv[1:])
"""


class Stopped(Exception):
    pass


def test_folders_that_are_not_shared_are_an_error(study: Study) -> None:
    run = make_run()
    first = replace(study, runs_dir=study.runs_dir.with_name("runs0"))

    def stop(progress: object) -> None:
        raise Stopped

    with pytest.raises(Stopped):
        runs.load_or_train(run, first, on_progress=stop, checkpoint_seconds=0)
    assert (first.runs_dir / run.key / "resume.pt").exists()
    process = start(run, study, 2, APART)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "isn't the same folder for all. Set RUNS_DIR" in errors
    assert not (first.runs_dir / run.key / "result.json").exists()


@pytest.mark.parametrize(
    ("text", "reason"), [("{", "JSONDecodeError"), ("{}", "KeyError"), (None, "No such file")]
)
def test_a_file_that_is_no_run(
    tmp_path: Path, text: str | None, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "RUN.json"
    if text is not None:
        path.write_text(text)
    assert training.main([str(path)]) == 2
    shown = capsys.readouterr().err
    assert str(path) in shown and reason in shown
