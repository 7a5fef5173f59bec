"""Several runs at a time, side by side with one after the other in one process.

`python -m benchmarks.executors` prints a Markdown section; `markdown()` returns it. Twenty short
runs are trained in a fresh process, by each executor; the contenders take turns. The start-up,
until the first small runs are finished, is timed apart. Ray is measured where it is installed
(`pip install .[ray]`).
"""

from __future__ import annotations

import argparse
import importlib.util
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

from helpers import data, executors
from helpers.config import PROFILES, ROOT, Study
from helpers.recipes import RECIPES
from helpers.runs import Run

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


def train(executor: str, train_size: int, epochs: int) -> dict[str, float]:
    """Seconds of start-up and of the runs, one core each where several are trained at a time."""
    with tempfile.TemporaryDirectory() as folder:
        places = [Path(folder) / name for name in ("runs", "data", "analysis")]
        cpu = torch.device("cpu")
        study = Study(PROFILES["smoke"], "shapes", *places, cpu, "none", executor)
        begun = time.perf_counter()
        executors.train_all(make_runs(os.cpu_count() or 1, 1000, train_size, 1), study)
        ready = time.perf_counter()
        executors.train_all(make_runs(RUNS, 0, train_size, epochs), study)
        return {"start-up": ready - begun, "runs": time.perf_counter() - ready}


def measure(executor: str, train_size: int, epochs: int) -> dict[str, float]:
    """The same in a process of its own."""
    sizes = ["--train-size", str(train_size), "--epochs", str(epochs)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.executors", "--executor", executor, *sizes],
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
    contenders = {LOCAL: "local", "processes, 1 core a run": "processes"}
    if not tiny and importlib.util.find_spec("ray"):
        contenders["Ray, 1 core a run"] = "ray"
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
        f"a round. {os.cpu_count()} CPU cores, torch {torch.__version__}.",
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
        cells += (f"{statistics.median(starts):.1f}",)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="only see that everything runs")
    parser.add_argument("--executor", help=argparse.SUPPRESS)
    parser.add_argument("--train-size", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--epochs", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.executor is None:
        print(markdown(given.tiny))
    else:
        print(json.dumps(train(given.executor, given.train_size, given.epochs)))


if __name__ == "__main__":
    main()
