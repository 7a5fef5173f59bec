"""What sending runs to Ray costs, side by side with training them in one process.

`python -m benchmarks.executors` prints a Markdown section; `markdown()` returns it. Twenty short
runs are trained in a fresh process, one after the other or by Ray; the contenders take turns. Ray's
start-up, until the first small runs are finished in its workers, is timed apart. Needs Ray
(`pip install .[ray]`).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.soak import make_study
from helpers import data, runs
from helpers.config import ROOT
from helpers.runs import Run
from helpers.training import RECIPES

LOCAL = "one process, all cores"
RUNS, ROUNDS = 20, 5


def make_runs(count: int, first_seed: int, train_size: int, epochs: int) -> list[Run]:
    """Short runs of SimpleCNN on shapes that differ in their seed."""
    sizes = {"image_size": 16, "train_size": train_size, "validation_size": 100, "test_size": 100}
    fingerprint = data.load_dataset("shapes", **sizes).fingerprint
    recipe = replace(RECIPES["onecycle"], batch_size=20)
    settings = {"recipe": recipe, "epochs": epochs, "width": 0.5, **sizes}
    return [
        Run("shapes", fingerprint, "simple_cnn", seed=first_seed + number, **settings)
        for number in range(count)
    ]


def train_here(cores: int, train_size: int, epochs: int) -> dict[str, float]:
    """Seconds of start-up and of the runs, in this process (cores 0) or by Ray."""
    with tempfile.TemporaryDirectory() as folder:
        study = replace(make_study(Path(folder) / "study"), cores_per_run=max(1, cores))
        executor = "ray" if cores else "local"
        first = make_runs(os.cpu_count() or 1, 1000, train_size, 1)
        wanted = make_runs(RUNS, 0, train_size, epochs)
        begun = time.perf_counter()
        runs.train_all(first, study, executor=executor)
        ready = time.perf_counter()
        runs.train_all(wanted, study, executor=executor)
        return {"start-up": ready - begun, "runs": time.perf_counter() - ready}


def measure(cores: int, train_size: int, epochs: int) -> dict[str, float]:
    """The same in a process of its own."""
    sizes = ["--train-size", str(train_size), "--epochs", str(epochs)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.executors", "--cores", str(cores), *sizes],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
    )
    if done.returncode:
        raise RuntimeError(f"{done.args} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def markdown(tiny: bool = False) -> str:
    """Measure (about ten minutes on two cores) and return this section of RESULTS.md."""
    train_size, epochs, rounds = (40, 1, 1) if tiny else (1000, 5, ROUNDS)
    cores = os.cpu_count() or 1
    contenders = {LOCAL: 0, f"Ray, {cores} cores a run": cores, "Ray, 1 core a run": 1}
    times: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    names = list(contenders)
    for turn in range(rounds):
        for step in range(len(names)):
            name = names[(turn + step) % len(names)]
            times[name].append(measure(contenders[name], train_size, epochs))
    lines = [
        "## Executors",
        "",
        f"`python -m benchmarks.executors`: {RUNS} runs of SimpleCNN, {epochs} epochs of "
        f"{train_size:,} images each, {rounds} alternating rounds, medians (range); ratios within "
        f"a round. {cores} CPU cores, torch {torch.__version__}. Target: Ray with all cores for "
        "each run at most 1.15 times the time in one process, start-up apart.",
        "",
        "| executor | seconds | ratio | start-up (s) |",
        "|---|---|---|---|",
    ]
    for name, found in times.items():
        seconds = [t["runs"] for t in found]
        ratios = [t["runs"] / o["runs"] for t, o in zip(found, times[LOCAL], strict=True)]
        starts = [t["start-up"] for t in found]
        cells = (f"{statistics.median(seconds):.1f} ({min(seconds):.1f} to {max(seconds):.1f})",)
        cells += (f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",)
        cells += (f"{statistics.median(starts):.1f}" if contenders[name] else "",)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="only see that everything runs")
    parser.add_argument("--cores", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--train-size", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--epochs", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.cores is None:
        print(markdown(given.tiny))
    else:
        print(json.dumps(train_here(given.cores, given.train_size, given.epochs)))


if __name__ == "__main__":
    main()
