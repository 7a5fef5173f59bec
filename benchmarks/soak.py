"""Kill a training run at random moments, resume it, and compare it with an undisturbed one.

    python -m benchmarks.soak --kills 100

Each round trains a small network twice: once in one go, and once in processes that get SIGKILL
after a random time, so that a kill can hit reading the data, a step, a validation, or the writing
of a checkpoint (one after each epoch) or of the result. Dropout, augmentation and early stopping
are on, since each has a state that a checkpoint could lose. The round passes if the weights, the
history (but for seconds) and the predictions are the same bit for bit.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.golden import draw_folder
from helpers.config import PROFILES, Study
from helpers.data import load_dataset
from helpers.loader import Augmentation
from helpers.recipes import RECIPES
from helpers.runs import Run, load_or_train, load_result

KILLS_A_ROUND = 5
CASES = (("onecycle", "resnet20"), ("adam", "simple_cnn"), ("fast", "simple_cnn"))


@dataclass(frozen=True)
class Round:
    """What a round did: how many kills, how many of them left a checkpoint to go on from.

    `cut_writes` counts the kills that hit the writing of a file, and `differences` names what isn't
    the same as in the undisturbed run.
    """

    kills: int
    resumed: int
    cut_writes: int
    differences: tuple[str, ...]


def make_study(folder: Path) -> Study:
    """Return a study on the CPU that keeps its runs in a folder of its own."""
    places = (folder / "runs", folder.parent / "data", folder / "analysis")
    return Study(PROFILES["smoke"], "shapes", *places, torch.device("cpu"), "none")


def make_run(images: Path, data_dir: Path, recipe: str, model: str, seed: int) -> Run:
    """Return a run of a few steps an epoch with everything on that has a state of its own."""
    augmentation = Augmentation(crop_padding=4, cutout=8)
    return Run(
        dataset=str(images),
        fingerprint=load_dataset(str(images), data_dir=data_dir).fingerprint,
        model=model,
        recipe=replace(RECIPES[recipe], batch_size=16, augmentation=augmentation),
        epochs=60,
        seed=seed,
        width=0.25,
        dropout=0.3,
        patience=55,
    )


def work(run: Run, study: Study) -> None:
    """Load or train a run: what the processes that get killed do."""
    torch.set_num_threads(1)
    load_or_train(run, study, checkpoint_seconds=0.0)


def kill_and_compare(run: Run, folder: Path, kills: int, generator: np.random.Generator) -> Round:
    """Train a run in one go, and again with up to `kills` kills; compare the two.

    The kills come at uniformly random times that add up to about as much as the run takes in one
    go. Raises RuntimeError if a process ends with an error.
    """
    processes = multiprocessing.get_context("forkserver")
    # Importing takes seconds; torch itself imports torch._dynamo with the first optimizer.
    processes.set_forkserver_preload(["helpers.runs", "torch._dynamo"])
    starter = processes.Process(target=time.sleep, args=(0,))  # starts the server, untimed
    starter.start()
    starter.join()
    undisturbed, disturbed = make_study(folder / "undisturbed"), make_study(folder / "disturbed")

    def run_for(seconds: float | None, study: Study) -> bool:
        """Run a process for so long at most; return whether it was killed."""
        process = processes.Process(target=work, args=(run, study))
        process.start()
        process.join(seconds)
        killed = process.exitcode is None
        process.kill()
        process.join()
        if not killed and process.exitcode != 0:
            raise RuntimeError(f"training {run.key} ended with exit code {process.exitcode}")
        return killed

    begun = time.perf_counter()
    run_for(None, undisturbed)
    duration = time.perf_counter() - begun
    here = disturbed.runs_dir / run.key
    killed = resumed = cut_writes = 0
    while killed < kills and run_for(generator.uniform(0, 2 * duration / kills), disturbed):
        killed += 1
        resumed += (here / "resume.pt").exists()
        cut_writes += any(here.glob(".*.tmp"))
    run_for(None, disturbed)
    found = differences(run, undisturbed.runs_dir / run.key, here)
    return Round(killed, resumed, cut_writes, tuple(found))


def differences(run: Run, first: Path, second: Path) -> list[str]:
    """Name what differs between two folders of the same run; nothing for a perfect resume."""
    weights, predictions = "model.safetensors", "predictions.npz"
    found = [
        name
        for name in (weights, predictions)
        if (first / name).read_bytes() != (second / name).read_bytes()
    ]
    one, other = load_result(run, first), load_result(run, second)
    if not one.history.drop(columns="seconds").equals(other.history.drop(columns="seconds")):
        found.append("history.csv")
    same = [
        getattr(one, n) == getattr(other, n) for n in ("metrics", "best_epoch", "stopped_early")
    ]
    if not all(same):
        found.append("result.json")
    kept = {"run.json", "history.csv", "result.json", predictions, weights, "lock"}
    if extra := {path.name for path in second.iterdir()} - kept:
        found.append(f"leftovers {sorted(extra)}")
    return found


def main() -> int:
    """Run rounds until the asked number of kills is reached; return 1 if any round differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="how many processes to kill")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the networks")
    options = parser.parse_args()
    generator = np.random.default_rng(options.seed)
    rounds: list[Round] = []
    begun = time.perf_counter()
    print("recipe    model       seed  kills  resumed  cut writes   verdict")
    with tempfile.TemporaryDirectory() as folder:
        images = draw_folder(Path(folder) / "images")
        while (done := sum(r.kills for r in rounds)) < options.kills:
            recipe, model = CASES[len(rounds) % len(CASES)]
            place, seed = Path(folder) / f"round{len(rounds)}", options.seed + len(rounds)
            run = make_run(images, place.parent / "data", recipe, model, seed)
            result = kill_and_compare(
                run, place, min(KILLS_A_ROUND, options.kills - done), generator
            )
            rounds.append(result)
            verdict = f"DIFFERS: {result.differences}" if result.differences else "same"
            print(
                f"{recipe:10s}{model:12s}{seed:4d}{result.kills:7d}{result.resumed:9d}"
                f"{result.cut_writes:12d}   {verdict}",
                flush=True,
            )
    wrong = sum(bool(r.differences) for r in rounds)
    print(
        f"\n{sum(r.kills for r in rounds)} kills in {len(rounds)} runs, "
        f"{time.perf_counter() - begun:.0f} s: {sum(r.resumed for r in rounds)} left a checkpoint "
        f"to go on from, {sum(r.cut_writes for r in rounds)} cut off the writing of a file; "
        f"{wrong} runs differ from the undisturbed one"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
