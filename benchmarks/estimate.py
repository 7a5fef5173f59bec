"""Estimate how long training for a full study takes on several GPUs: an estimate, no measurement.

    python -m benchmarks.estimate RUNS_DIR

RUNS_DIR holds the runs of one quick study. Each stands for a run of the full study, at as many
times its width, images, epochs and seeds as the profiles differ by, its images of 32 pixels or
more. A GPU is taken to get through as much cost (`runs.cost`) a second for every network as a
published measurement gives for a ResNet-18: 80 epochs of 50,000 images of 32 pixels in 156 s, on an
A100 with compiled bfloat16 convolutions. Small networks don't reach that, so the truth is longer.
Not in it: the runs that only the full profile has (ResNet-101 and 152, 110 layers), and whatever
isn't training. The hours by number of GPUs go into benchmarks/estimate.json; the README names them.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

from helpers.config import PROFILES
from helpers.runs import Run, cost, read_run
from helpers.training import RECIPES

PUBLISHED = Run("cifar10", "any", "resnet18", RECIPES["fast"], epochs=80, seed=0)
PUBLISHED_SECONDS = 156
ESTIMATED = Path(__file__).parent / "estimate.json"
FULL_TRAIN_SIZE = 45_000  # CIFAR-10 without its validation split


def at_full_size(run: Run) -> Run:
    """Return the run of the full study that a run of the quick one stands for."""
    quick, full = PROFILES["quick"], PROFILES["full"]
    return replace(
        run,
        width=run.width * full.width / quick.width,
        epochs=round(run.epochs * full.epochs / quick.epochs),
        train_size=round(run.train_size * FULL_TRAIN_SIZE / quick.train_size),
        image_size=max(32, run.image_size or 32),
        start=None,
    )


def seconds_on(gpus: int, seconds: list[float]) -> float:
    """Return when the last of several GPUs is done that take the longest run first."""
    busy = [0.0] * gpus
    for each in sorted(seconds, reverse=True):
        first = min(range(gpus), key=busy.__getitem__)
        busy[first] += each
    return max(busy)


def main(runs_dir: Path) -> None:
    """Print the estimate for one GPU and for eight."""
    speed = cost(PUBLISHED) / PUBLISHED_SECONDS
    found = [read_run(path) for path in sorted(runs_dir.glob("*/run.json"))]
    lacking = len(PROFILES["full"].seeds) - len(PROFILES["quick"].seeds)
    every = [*found, *(run for run in found if run.seed < lacking)]
    seconds = [cost(at_full_size(run)) / speed for run in every]
    print(f"{len(found)} runs in {runs_dir} stand for {len(seconds)} of the full study")
    hours = {gpus: round(seconds_on(gpus, seconds) / 3600, 1) for gpus in (1, 8)}
    for gpus, count in hours.items():
        print(f"at least {count} h of training on {gpus} GPU{'s' * (gpus > 1)}")
    ESTIMATED.write_text(json.dumps(hours, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
